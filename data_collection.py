# /// script
# requires-python = ">=3.11"
# dependencies = ["lyricsgenius>=3.15,<4", "tqdm>=4.66.3"]
# ///
"""Stage 0: collect the lyrics of one artist from Genius into a clean text file, for the other stages.

    python data_collection.py --artist "Tede"              # -> assets/input/tede.txt, tede.report.json
    python data_collection.py --artist "Tede" --offline    # build the corpus again: without network

In a Colab cell:  import data_collection; data_collection.main(["--artist", "Tede"])
It needs a free token (https://genius.com/api-clients): in the variable GENIUS_ACCESS_TOKEN, in .env, in
Colab's secrets or in --token_file. Songs are stored in assets/input/tede.sqlite as they come: after a
crash, a kill or a block the same command continues. 1,000 songs take about ten minutes.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sqlite3
import sys
import time
import unicodedata
from collections import Counter
from contextlib import closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from html import unescape
from pathlib import Path

import lyricsgenius
import requests
from tqdm.auto import tqdm

ARTIST_NAME = "Tede"  # the default of --artist
FOLDER = Path("assets/input")  # where the files go
SEPARATOR = "<|endoftext|>"  # alone on a line between two songs
GIVE_UP = 5  # failed songs in a row
IN_NOTEBOOK = "ipykernel" in sys.modules  # a Jupyter or Colab kernel


class Stop(Exception):
    """Ends the program with one line that says what to do, and status 2."""


class Trouble(Exception):
    """An answer that could not be fetched or understood. It is not stored: the next run asks again."""


# ------------------------------------------------------------------------------------------ database
SCHEMA = """
CREATE TABLE artist (id INTEGER PRIMARY KEY, name TEXT NOT NULL,
    next_page INTEGER DEFAULT 1,      -- of the list, to ask for next; NULL: the list is whole
    odd_entries INTEGER DEFAULT 0);   -- in the list: without id, title, address or artist
CREATE TABLE song (id INTEGER PRIMARY KEY, title TEXT NOT NULL, url TEXT NOT NULL,
    lyrics_state TEXT NOT NULL,       -- as the list says: complete, unreleased, instrumental...
    primary_ids TEXT NOT NULL,        -- the ids of its main artists
    page INTEGER, new_page INTEGER,   -- of the list; of a list that is not whole yet
    state TEXT DEFAULT 'wanted' CHECK (state IN ('wanted', 'lyrics', 'none')),
    text TEXT,                        -- the lyrics, not cleaned; else why there are none
    time TEXT);                       -- when its page was last asked for
CREATE TABLE written (sha256 TEXT PRIMARY KEY);  -- the files that were made from this database
"""
INSERT_SONG = """INSERT INTO song (id, title, url, lyrics_state, primary_ids, new_page)
VALUES (:id, :title, :url, :lyrics_state, :primary_ids, :page) ON CONFLICT (id) DO UPDATE SET
state = iif(url = :url, state, 'wanted'), title = :title, url = :url, lyrics_state = :lyrics_state,
primary_ids = :primary_ids, new_page = :page"""


# --------------------------------------------------------------- what a server sends is checked here
def dicts(value):
    """The objects in a JSON list; [] if it is not a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def checked(thing):
    """Id and texts of an artist or a song; 0 or "" in place of an invalid one."""
    thing = thing if isinstance(thing, dict) else {}
    number = thing.get("id")
    kept = {"id": number if type(number) is int and 0 < number < 2**53 else 0}  # True is not a number here
    for key in ("name", "title", "url", "lyrics_state"):
        text = thing[key] if isinstance(thing.get(key), str) else ""
        text = "".join(c if c.isprintable() else " " * c.isspace() for c in text)  # no control characters
        kept[key] = " ".join(text.split())[:300]  # one line
    return kept


def checked_song(entry):
    """An entry of the list as a row of the table; empty without id, title, address or artist."""
    song = checked(entry)
    people = dicts(entry.get("primary_artists")) or dicts([entry.get("primary_artist")])
    song["primary_ids"] = " ".join(str(checked(person)["id"]) for person in people)
    song["lyrics_state"] = song["lyrics_state"] or "complete"  # if it is missing, the page says
    if entry.get("instrumental") is True:
        song["lyrics_state"] = "instrumental"
    whole = song["id"] and song["title"] and people
    return song if whole and song["url"].startswith("https://genius.com/") else {}


# ------------------------------------------------------------------------------------------- artist
def normalized(text: str) -> str:
    """A text without case, diacritics, punctuation, invisible marks: "O.S.T.R." -> "ostr"."""
    text = text.casefold().translate(str.maketrans("łøđı", "lodi"))  # these do not decompose
    kept = (c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c)[0] not in "MPC")
    return " ".join("".join(kept).split()) or text.strip()


def find_artist(genius, args):
    """The artist with the given id or, ignoring case and marks, name. Else raises Stop with candidates."""
    if args.artist_id:
        name = checked(genius.artist(args.artist_id).get("artist"))["name"]
        return {"id": args.artist_id, "name": name or f"artist {args.artist_id}"}
    found, matches, page, more = {}, [], 1, True  # found: id -> name, in Genius' order
    while more and not matches and page <= 10:  # the right one may come after others
        sections = dicts(genius.search_all(args.artist, per_page=5, page=page).get("sections"))
        hits = [hit for section in sections for hit in dicts(section.get("hits"))]
        artists = [checked(hit.get("result")) for hit in hits if hit.get("index") == "artist"]
        new = {artist["id"]: artist["name"] for artist in artists if artist["id"] and artist["name"]}
        found, page, more = found | new, page + 1, new.keys() - found.keys()
        matches = [i for i in found if normalized(found[i]) == normalized(args.artist)]
    if len(matches) == 1:  # never the first of several
        return {"id": matches[0], "name": found[matches[0]]}
    offered = "".join(f"\n  --artist_id {i}  # {found[i]}" for i in matches or found)
    hint = f"choose one:{offered}" if found else "check the spelling"
    raise Stop(f'Genius has {len(matches) or "no"} artists like "{args.artist}"; {hint}')


# -------------------------------------------------------------------------------------------- songs
TITLE_RULES = {  # why an entry is left out; "Credits" may be a song, "Album (Credits)" is none
    "translations": r"[(\[][^()\[\]]*(translat|tłumacz|traduc|traduç|traduz|übersetz|перевод|çeviri|översätt|romaniz)",
    "annotation pages": r"\b(track ?lista?|album art(work)?|liner notes)\b"  # anywhere in the title
    r"| discography$| [-–] credits$|[(\[][^()\[\]]*(credits|interview|wywiad|booklet|setlist)",
    "instrumentals": r"[(\[][^()\[\]]*\binstrumental",  # in brackets
}
TAG = r"\b(remix|rmx|live|na żywo|acoustic|akustyczn\w*|unplugged|demo|edit|extended|remaster\w*|mix|version|wersja)\b"
VERSION = rf"(?i) ?[(\[][^()\[\]]*{TAG}[^()\[\]]*[)\]]| - [^-]*{TAG}.*$| (remix|rmx)$"


def list_songs(genius, db):
    """Fetch the discography page by page; an interrupted list is continued."""
    artist_id, page, odd = db.execute("SELECT id, next_page, odd_entries FROM artist").fetchone()
    while page:
        answer = genius.artist_songs(artist_id, per_page=50, page=page, sort="title")
        entries, following = answer.get("songs"), answer.get("next_page", 0)
        fits = following is None or type(following) is int and page < following <= 2000  # 100,000 songs
        if not fits or not isinstance(entries, list):
            raise Trouble(f"page {page} of the list is malformed")
        songs = [song | {"page": page} for song in map(checked_song, dicts(entries)) if song]
        odd = len(entries) - len(songs) + (odd if page > 1 else 0)
        with db:  # one transaction: the songs of the page and our place in the list
            db.executemany(INSERT_SONG, songs)
            db.execute("UPDATE artist SET next_page = ?, odd_entries = ?", [following, odd])
            if not following:  # the new list is whole: it takes the place of the old one
                db.execute("UPDATE song SET page = new_page, new_page = NULL")
        page = following


def exclusion(song, artist, include_features: bool) -> str:
    """Why a song of the list is left out, "" if it is not."""
    for reason, pattern in TITLE_RULES.items():
        if re.search(pattern, song["title"], re.I):
            return reason
    if song["lyrics_state"] != "complete":  # nothing to ask for
        return "instrumentals" if song["lyrics_state"] == "instrumental" else "lyrics not complete"
    return "" if include_features or str(artist["id"]) in song["primary_ids"].split() else "features"


def select(db, args):
    """The ids of the songs to collect, and what is left out, counted by reason."""
    artist = db.execute("SELECT * FROM artist").fetchone()
    chosen, titles, excluded = set(), set(), Counter({"odd entries": artist["odd_entries"]})
    for song in db.execute("SELECT * FROM song WHERE page NOT NULL ORDER BY title, id"):
        title, is_version = re.subn(VERSION, "", song["title"])
        reason = exclusion(song, artist, args.include_features)
        if not reason and args.versions == "first" and is_version and normalized(title) in titles:
            reason = "other versions"  # if marked as such: two songs may be called "Intro"
        if not reason and len(chosen) == args.max_songs:
            reason = "beyond --max_songs"
        if reason:
            excluded[reason] += 1
        else:
            chosen.add(song["id"])
            titles.add(normalized(title))
    return chosen, +excluded


def fetch_songs(genius, db, chosen):
    """Fetch the page of each chosen song that is still wanted. Raises Trouble if GIVE_UP in a row fail."""
    found = db.execute("SELECT id, title, url FROM song WHERE state = 'wanted' ORDER BY time, title, id")
    wanted = [song for song in found if song["id"] in chosen]  # songs that failed before come last
    often = 0.1 if sys.stderr.isatty() or IN_NOTEBOOK else 30  # seconds between updates of the bar
    failures = 0
    for song in (bar := tqdm(wanted, unit="song", mininterval=often, dynamic_ncols=True)):
        bar.set_postfix_str(song["title"][:40], refresh=False)
        url = song["url"].replace("https://genius.com/", genius.WEB_ROOT)
        try:
            (state, text), failures = read_page(genius._session.request("GET", url).text), 0
        except Trouble as trouble:
            state, text, failures = "wanted", str(trouble), failures + 1
        with db:  # one transaction a song
            db.execute("UPDATE song SET state = ?, text = ?, time = datetime() WHERE id = ?", [state, text, song["id"]])
        if failures == GIVE_UP:
            raise Trouble(f"{text}, {GIVE_UP} songs in a row: it seems that Genius blocks us")


# ------------------------------------------------------------------------------------------- a page
ELEMENT = re.compile(r"<(/?)([a-zA-Z][^\s<>/]*+)([^<>]*+)>|<[!?][^<>]*+>")  # linear time on any page
LYRICS = re.compile(r"""data-lyrics-container\s*=\s*["']?true""")  # an attribute
NOT_LYRICS = re.compile(r"""data-exclude-from-selection\s*=\s*["']?true|LyricsHeader""")
BREAKS = {"br": "\n", "p": "\n\n"} | dict.fromkeys("div li h1 h2 h3 h4 h5 h6".split(), "\v")
STATE = r"(?s)window\.__PRELOADED_STATE__\s*=\s*JSON\.parse\('((?:[^'\\]|\\.)*+)'\)"


def lyrics_text(html: str) -> str:
    """The text of a page's lyrics containers, without what Genius marks as not part of them."""
    parts, end = [], 0
    box, inside, skipped, depth = "", 0, "", 0  # a container, a skipped part: its tag, how many are open
    for tag in ELEMENT.finditer(html):  # no tree: a page may nest 100,000 elements
        name, step, attributes = (tag[2] or "").lower(), -1 if tag[1] else 1, tag[3] or ""
        if inside and not depth:  # the text before this tag is lyrics
            parts += [unescape(re.sub(r"\s+", " ", html[end : tag.start()])), BREAKS.get(name, "")]
        end = tag.end()
        if depth:  # in a script only its end counts
            depth += step * (name == skipped and (step < 0 or name not in ("script", "style")))
        elif name in ("script", "style") or NOT_LYRICS.search(attributes):
            skipped, depth = name, int(name not in ("br", "hr", "img", "input"))  # void tags
        elif inside:
            inside += step * (name == box)
        elif LYRICS.search(attributes):
            box, inside = name, 1
            parts.append("\v")
    text = "".join(parts).encode("utf-8", "ignore").decode()  # no lone surrogates
    text = re.sub(r" ?([\n\v]) ?", r"\1", re.sub(" +", " ", text))
    text = re.sub(r"(?<![\n\v])\v+", "\n", text).replace("\v", "")  # \v: on a line of its own
    return re.sub("\n\n+", "\n\n", text).strip()


def read_page(page: str):
    """("lyrics", the text) or ("none", why there are none). Raises Trouble if the page says neither."""
    with suppress(ValueError, OverflowError, TypeError, LookupError, AttributeError, RecursionError):
        lyrics, words = lyrics_text(page), re.findall(r"LyricsPlaceholder[^<>]{0,200}>([^<]*)", page)
        if not lyrics and (state := re.search(STATE, page)):
            state = json.loads(lyricsgenius.utils.decode_js_string(state[1]))
            data = state["songPage"]["lyricsData"]
            words.append(str(data.get("lyricsPlaceholderReason")))
            lyrics = lyrics_text('<p data-lyrics-container="true">' + data["body"]["html"] + "</p>")
        if lyrics:
            return "lyrics", lyrics
        if re.search("instrumental|transcribed|released", " ".join(words)):  # Genius' own words
            return "none", " ".join(words)[:200]
    raise Trouble("no page with lyrics, nor one that says why there are none")


# ----------------------------------------------------------------------------------------- cleaning
LOOK_ALIKES = str.maketrans("АВЕІКМНОРСТУХаеіјкорсухΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορυ", "ABEIKMHOPCTYXaeijkopcyxABEZHIKMNOPTYXavopu")


def mend_word(match) -> str:
    """Cyrillic and Greek look-alikes to Latin in a word whose other letters, at least half, are Latin."""
    word = match[0].translate(LOOK_ALIKES)
    mended = sum(map(str.__ne__, word, match[0]))
    names = (unicodedata.name(c, "") for c in word if not unicodedata.combining(c))
    fits = 0 < 2 * mended <= len(word) and all(name.startswith("LATIN") for name in names)
    return word if fits else match[0]


SECTION = r"(?i:zwrotk|refren|ref\b|intro|outro|verse|chorus|hook|pre-|bridge|interlud|skit|część|part\b|cuty|tekst)"
MARKS = "\u0300-\u036f\u0483-\u0489\u0591-\u05c7\u0610-\u065f\u0e31-\u0e4e\u1dc0-\u1dff\u20d0-\u20ff"
RULES = {  # name -> (pattern, replacement), in this order; each takes time linear in the text
    "line ends": (r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]", "\n"),  # Windows', old Mac's, Unicode's
    # control characters, soft hyphens, zero-width and bidi marks, lone surrogates
    "invisible marks": (r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f"
                        r"\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]", ""),
    "spaces": (r"[^\S\n]+", " "),  # several; tabs, no-break, thin, em... spaces
    "ends of lines": (r"(?m)^ | $", ""),
    "empty lines": (r"\A\n+|(?<=\n\n)\n+|\n+\Z", ""),
    "stacked marks": (f"(?<=[{MARKS}]{{4}})[{MARKS}]+", ""),  # sorting n of them takes n * n steps
    # "12 ContributorsTranslationsEnglishTitle Lyrics", a description that ends in "... Read More"
    "contributor counts": (r"\A\s*\d[\d.,]* Contributors?([^\n]{0,300}? Lyrics((?s:.{0,5000}?)(…|\.{3}) ?Read More)?)?", ""),
    # "See Somebody LiveGet tickets as low as $45"
    "adverts": (r"(?:See (?:(?!See )[^\n]){1,80}? Live)?Get tickets as low as "
                r"(?:[^\w\s]|[A-Z]{2,3}\$?)? ?\d+(?:[.,]\d+)*", "\n"),
    # alone on its line or glued between two lines; "You might also like me" is somebody's line
    "You might also like": (r"(?m)(?:^\d*|(?<=\S))You might also like(?= ?$|[A-ZĄĆĘŁŃÓŚŹŻ0-9\[(\"„“])", "\n"),
    # at the end, with the number of embeds; a number after a space may be the song's own and stays
    "Embed": (r"(?m)(?:^\d*|(?<=[^\s\d])\d+|(?<=\S))(?:(?<=\d)(?:\.\d+)?K)?Embed(Share URLCopyEmbedCopy)?\s*\Z", ""),
    # [anything] alone on a line; [section ...] anywhere, over line breaks too, or never closed
    "section headers": (r"(?m)^\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\] ?:? ?$|"
                        rf"\[{SECTION}(?:(?!\n\n)[^\[\]]){{0,100}}\] ?:?|^\[{SECTION}[^\[\]\n]{{0,60}}$", "\n\n"),
    "separators": (rf"(?m)^ ?{re.escape(SEPARATOR)} ?$", ""),  # a line that would end the song
    "composed letters (NFC)": (r"(?s).+", lambda match: unicodedata.normalize("NFC", match[0])),
    "look-alikes": (r"(?:[^\W\d_]|[\u0300-\u036f])+", mend_word),
}  # fmt: skip
def clean(text: str, keep_headers: bool = False):
    """(clean lyrics, characters that each rule removed). Cleaning them again changes nothing."""
    fixed = Counter()
    for _ in range(20):  # one rule may make work for another; no lyrics need more
        before = text
        for name, (pattern, replacement) in RULES.items():
            if not (keep_headers and name == "section headers"):
                old, text = text, re.sub(pattern, replacement, text)
                fixed[name] += max(len(old) - len(text), old != text)  # at least one
        if text == before:
            break
    return text, +fixed


# ------------------------------------------------------------------------------------------- corpus
def build(db, args):
    """The corpus, its songs in the order of their ids, and the report on it."""
    chosen, excluded = select(db, args)
    corpus, texts, fixed, failed = [], set(), Counter(), []
    for song_id in sorted(chosen):  # whatever order they came in
        song = db.execute("SELECT id, title, url, state, text, time FROM song WHERE id = ?", [song_id]).fetchone()
        text, counts = clean(song["text"] if song["state"] == "lyrics" else "", args.keep_headers)
        plain = normalized(text)
        if song["state"] == "wanted":
            excluded["not fetched"] += 1
            failed += [dict(song)] if song["time"] else []  # with what went wrong
        elif plain in ("", "instrumental", "this song is an instrumental"):
            excluded["instrumentals" if "instrumental" in song["text"].lower() else "no lyrics"] += 1
        elif plain in texts:  # the same but for case and punctuation
            excluded["repeated songs"] += 1
        else:
            texts.add(plain)
            corpus.append(text)  # in memory: a megabyte for 500 songs
            fixed += counts
    text, songs = f"\n{SEPARATOR}\n".join(corpus) + "\n", len(corpus)
    return text, dict(songs=songs, characters=len(text), excluded=excluded, fixed=fixed, failed=failed)


def collect(args):
    """Fetch what the database lacks, write corpus and report; returns the report."""
    genius, stopped = None if args.offline else connect(args), ""
    with database(args, genius) as db:
        try:
            if genius:
                list_songs(genius, db)
                fetch_songs(genius, db, select(db, args)[0])
        except Trouble as trouble:  # write what there is anyway
            stopped = str(trouble)
        artist = db.execute("SELECT id AS artist_id, name AS artist FROM artist").fetchone()
        corpus, report = build(db, args)
        report |= {**artist, "output": str(args.output), "stopped": stopped}
        for kind, unit in (("excluded", "songs"), ("fixed", "characters")):
            for why, count in report[kind].items():
                print(f"  {kind:8} {count:8,} {unit}: {why}")
        for song in report["failed"][:20]:
            print(f"  lost: {song['title']}: {song['text']} ({song['url']})")
        if not report["songs"]:
            raise Trouble(f"there is no song to write: {stopped or 'see above'}")
        write(db, args.output, corpus)
        write(db, args.report, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        with db:  # after a whole run the next one looks for new songs
            db.execute("UPDATE artist SET next_page = 1 WHERE ?", [bool(genius and not stopped)])
    print(f"{report['artist']}: {report['songs']:,} songs, {len(corpus):,} characters -> {args.output}")
    print(f"next: python gpt.py --input {shlex.quote(str(args.output))}")
    return report


# -------------------------------------- the end of the lesson: requests, files, token, command line
TIMEOUT, HOUR = 15.0, 3600.0  # seconds: for an answer; of retrying between two good answers
RETRIES, BACKOFF = 5, 1.0  # further tries after a fault; seconds before the first, then doubled
LARGEST = 4_000_000  # bytes of an answer, unpacked
TOKEN_NAME = "GENIUS_ACCESS_TOKEN"
TOKEN_HELP = f"get one at https://genius.com/api-clients, then set {TOKEN_NAME} or --token_file FILE"
SEARCH_HELP = "; if it is the search: give --artist_id, from genius://artists/ID in the artist's page's source"
REFUSED = "Genius refuses (HTTP 403), as it does many data centres: another computer may help"


class PoliteSession(requests.Session):
    """Spaces requests out, retries them after faults, and returns only sound answers."""

    delay, patience = 0.0, HOUR

    def request(self, method, url, **kwargs):
        """As in requests, or raises Trouble or Stop, which never quote what was sent."""
        is_page = "params" not in kwargs  # lyricsgenius asks for JSON, and with parameters
        kwargs |= {"timeout": TIMEOUT, "stream": True}  # read no more than LARGEST
        for seconds in (*(BACKOFF * 2**i for i in range(RETRIES)), 0):
            time.sleep(self.delay)
            asked = ""
            try:
                with super().request(method, url, **kwargs) as response:
                    asked = response.headers.get("Retry-After", "")
                    problem = self.fault(response, is_page)
            except (requests.RequestException, ValueError, RecursionError) as error:
                problem = type(error).__name__
            if not problem:
                self.patience = HOUR  # a good answer resets it
                return response
            with suppress(ValueError, OverflowError, TypeError, IndexError):  # a number or a date
                number = float(asked) if asked.isdecimal() else 0.0
                seconds = max(seconds, number or parsedate_to_datetime(asked).timestamp() - time.time())
            seconds = round(min(seconds, self.patience))
            self.patience -= seconds
            for left in range(seconds, 0, -60):  # say so every minute
                tqdm.write(f"{problem}: waiting {left} s", file=sys.stderr)
                time.sleep(min(left, 60))
        raise Trouble(f"no good answer from Genius ({problem}, {RETRIES + 1} times)")

    def fault(self, response, is_page):
        """A temporary fault of an answer, or "". Raises Stop or Trouble for a permanent one."""
        status, body = response.status_code, bytearray()
        if status == 401:
            raise Stop(f"Genius does not accept this token (HTTP 401); {TOKEN_HELP}")
        if status == 404 and not is_page:
            raise Stop("Genius has no artist with this id (HTTP 404); search with --artist NAME")
        if status in (408, 429) or status >= 500:  # temporary
            return f"HTTP {status}"
        if status != 200:
            raise Trouble(f"HTTP {status}" if status != 403 else REFUSED + SEARCH_HELP * (not is_page))
        for chunk in response.iter_content(8192):
            body += chunk
            if len(body) > LARGEST:
                raise Trouble("an answer is too large")
        response._content, response.encoding = bytes(body), "utf-8"  # whatever the header says
        if is_page:
            return "" if "</html>" in response.text else "half a page"
        answer = json.loads(body)
        response.json = lambda: answer  # parsed once: JSON nested too deeply has raised an error by now
        sound = isinstance(answer, dict) and isinstance(answer.get("response"), dict)
        return "" if sound else "odd JSON"


@contextmanager
def database(args, genius):
    """The artist's database, for this process only; created if missing. Raises Stop or Trouble."""
    path, kind = args.database, Stop
    if args.offline and not path.exists():
        raise Stop(f"there is no {path} yet; run without --offline first")
    artist = None if path.exists() else find_artist(genius, args)  # a wrong name leaves no file
    try:
        lock, db = sqlite3.connect(f"{path}.lock", timeout=1), sqlite3.connect(path)
        with closing(lock), closing(db):
            lock.execute("BEGIN EXCLUSIVE")  # until this process ends, however it ends
            db.row_factory = sqlite3.Row
            if genius and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                artist = artist or find_artist(genius, args)
                db.executescript(f"PRAGMA journal_mode = WAL; BEGIN; {SCHEMA}")
                db.execute("INSERT INTO artist (id, name) VALUES (:id, :name)", artist)  # not committed:
                # that comes with the first page of the list, so that a wrong id is forgotten
            found = db.execute("SELECT id, next_page, odd_entries FROM artist").fetchone()
            if not found or db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("damaged")
            if args.artist_id not in (None, found[0]):
                raise Stop(f"{path} belongs to artist {found[0]}; give another --artist name")
            kind = Trouble
            yield db
    except (sqlite3.Error, UnicodeDecodeError) as error:
        why = "another collector uses it; wait until it ends" if "locked" in str(error) else error
        raise kind(f"{path}: {why}; it is left as it is: move it away or repair it") from None


def write(db, path, text):
    """Replace a file by a text, atomically. A file that we did not write is moved aside."""
    data, temporary = text.encode("utf-8", "replace"), Path(f"{path}.{time.time_ns()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a kill leaves the old file or the new one
        with db:
            db.execute("INSERT OR IGNORE INTO written VALUES (?)", [hashlib.sha256(data).hexdigest()])
        old = hashlib.sha256(path.read_bytes() if path.exists() else data).hexdigest()
        if not db.execute("SELECT 1 FROM written WHERE sha256 = ?", [old]).fetchone():
            aside = path.rename(f"{path}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
            print(f"{path} was not made from this database, or was edited: moved to {aside}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def connect(args):
    """The Genius client, with the token from the first place that has one, alone or as NAME=token."""
    line = rf"(?m)^\s*(?:export\s+)?{TOKEN_NAME}\s*=(.*)"
    text = os.environ.get(TOKEN_NAME, "").strip()
    try:
        if args.token_file:
            text = Path(args.token_file).read_text("utf-8-sig", "replace")
        elif not text and Path(".env").is_file():
            text = "".join(re.findall(line, Path(".env").read_text("utf-8-sig", "replace"))[:1])
    except (OSError, ValueError):  # the value is not repeated: it may be the token itself
        raise Stop("--token_file can't be read; it takes a file's name, not the token") from None
    if not text and "google.colab" in sys.modules:  # inside a Colab cell
        from google.colab import userdata
        with suppress(userdata.SecretNotFoundError, userdata.NotebookAccessError):
            text = userdata.get(TOKEN_NAME) or ""
    token = "".join(re.findall(line, text)[:1] or text).strip().strip("\"'")
    if not re.fullmatch("[!-~]+", token):
        raise Stop(f"there is no Genius access token, or it holds odd characters; {TOKEN_HELP}")
    genius = lyricsgenius.Genius(token, timeout=TIMEOUT, sleep_time=0)
    headers, genius._session = genius._session.headers, PoliteSession()  # in place of its own
    genius._session.headers, genius._session.delay = headers, args.delay
    return genius


def parse_args(argv):
    """Read and check the options. Raises Stop, which never quotes a value: it may be a token."""

    def refuse(message):
        """Name the option, if there is one."""
        name = re.findall("--[a-z_]+", message)[:1] or ["a word"]
        raise Stop(f"{name[0]} does not fit, see --help; a token would stay in the shell's history: {TOKEN_HELP}")

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.error, add = refuse, parser.add_argument
    add("--artist", help=f"name; case and diacritics do not matter (default: {ARTIST_NAME})")
    add("--artist_id", type=int, help="Genius id of the artist; --artist then only names the files")
    add("--output", type=Path, help=f"corpus file (default: {FOLDER}/<artist>.txt)")
    add("--token_file", help="file that holds the Genius access token")
    add("--include_features", action="store_true", help="also songs that only feature the artist")
    add("--versions", default="all", choices=("all", "first"), help="remixes, live versions...: all or the first")
    add("--max_songs", type=int, help="at most this many songs, the first by title")
    add("--keep_headers", action="store_true", help="keep section headers such as [Refren]")
    add("--offline", action="store_true", help="build the corpus from the database alone")
    add("--delay", type=float, default=0.5, help="seconds between two requests (default: 0.5)")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        is_token = re.fullmatch(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[\w-]{30,}", str(value))
        is_odd = type(value) is int and not 0 < value < 2**53
        if is_token or is_odd or name == "delay" and not 0 <= value <= 3600:
            refuse(f"--{name}")
    if args.artist is None and not args.artist_id:
        args.artist = ARTIST_NAME
    name = f"artist-{args.artist_id}" if args.artist is None else normalized(args.artist)
    if not 0 < len(name) <= 100 or not name.isprintable():
        refuse("--artist")
    name = re.sub(r"[^\w -]", lambda match: f"%{ord(match[0])}", name).replace(" ", "_")  # unambiguous
    args.database, args.output = FOLDER / f"{name}.sqlite", args.output or FOLDER / f"{name}.txt"
    with suppress(OSError, ValueError):  # a name that no file can have
        args.report = args.output.with_suffix(".report.json")
        for path in (args.database, args.output, args.report):
            path.parent.mkdir(parents=True, exist_ok=True)
            usable = path.is_file() or not path.exists() and str(path).isprintable()  # no device, no folder
            if not (usable and os.access(path.parent, os.W_OK)) or args.output.suffix in (".sqlite", ".lock"):
                raise ValueError
        return args
    raise Stop(f"cannot create {args.output} or {args.database}; give another --output")


def main(argv=None):
    """Run the collector; returns the report, or ends with a status: 2 bad input, 1 trouble, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a title must not break a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
    if argv is None:  # a notebook's kernel was started with arguments of its own
        argv = [] if "kernel" in Path(sys.argv[0]).name else sys.argv[1:]
    kept = f"what was fetched is kept; continue with: python data_collection.py {shlex.join(map(str, argv))}"
    report, status = {}, 1  # of trouble
    try:
        report = collect(parse_args(argv))
        if not report["failed"] and not report["stopped"]:
            return report
        lost = f"{len(report['failed'])} songs are lost, see above"
        message = f"error: {report['stopped'] or lost}; {kept}"
    except Stop as stop:
        status, message = 2, f"error: {stop}"
    except (Trouble, OSError) as trouble:
        message = f"error: {trouble}; {kept}"
    except KeyboardInterrupt:
        status, message = 130, f"\nstopped; {kept}"
    print(message, file=sys.stderr)
    if IN_NOTEBOOK and status != 2:  # the next cells can still run
        return report
    raise SystemExit(status)


if __name__ == "__main__":
    main()
