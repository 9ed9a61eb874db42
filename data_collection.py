"""Stage 0: collect the lyrics of one artist from Genius into a clean text file, the corpus of the other stages.

    python data_collection.py --artist "Tede"              # -> assets/input/tede.txt and tede.report.json
    python data_collection.py --artist_id 123              # when several artists share a name
    python data_collection.py --artist "Tede" --offline    # rebuild the corpus from the cache: no network, no token

In a Colab cell:  import data_collection; data_collection.main(["--artist", "Tede"])
The access token is free (https://genius.com/api-clients). It comes from --token_file, the environment variable
GENIUS_ACCESS_TOKEN, a line GENIUS_ACCESS_TOKEN=... in the file .env, or Colab's secrets. Songs are kept one by one in
assets/input/.genius/<artist_id>/: after a crash, a kill or a block the same command goes on and asks only for what is
missing. With --delay 0.5, 1,000 songs take nine minutes or more.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import lyricsgenius
import requests
import urllib3
from tqdm.auto import tqdm

ARTIST_NAME = "Tede"  # the default of --artist
SEPARATOR = "<|endoftext|>"  # alone on a line between two songs
FOLDER = Path("assets/input")
CACHE = FOLDER / ".genius"
IN_NOTEBOOK = "ipykernel" in sys.modules  # a Jupyter or Colab kernel
TIMEOUT = 15.0  # seconds without an answer
RETRIES, BACKOFF = 5, 1.0  # further tries after a fault that may pass; seconds before the first, doubled each time
TOKEN_NAME = "GENIUS_ACCESS_TOKEN"
TOKEN_HELP = f"get one at https://genius.com/api-clients, then set {TOKEN_NAME} or give --token_file FILE"


class UserError(Exception):
    """Something the user can put right: one line, exit status 2."""


class RunError(Exception):
    """Something that went wrong while running: one line, exit status 1."""


# ---------- Config ----------
def option(default, help, **more):
    """A dataclass field that argparse is made from."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Config:
    """Every option once: its name, type, default and help."""

    artist: str = option(ARTIST_NAME, "name of the artist; case, diacritics and punctuation do not matter")
    artist_id: int | None = option(None, "Genius id of the artist, instead of the name", type=int)
    output: str | None = option(None, f"corpus file (default: {FOLDER}/<artist>.txt)")
    token_file: str | None = option(None, "file that holds the Genius access token")
    include_features: bool = option(False, "also songs that only feature the artist", action="store_true")
    versions: str = option("all", "remixes, live versions…: all, or only the first of a song", choices=("all", "first"))
    max_songs: int | None = option(None, "at most that many songs, the first by title", type=int)
    keep_headers: bool = option(False, "keep section headers such as [Refren]", action="store_true")
    offline: bool = option(False, "rebuild the corpus from the cache, without network", action="store_true")
    delay: float = option(0.5, "seconds between two requests (default: 0.5)", type=float)


def parse_args(argv: list[str] | None = None) -> Config:
    """Read and check the options. Raises UserError or ArgumentError, without a value that may be a token."""
    if argv is None:
        argv = sys.argv[1:]
        if IN_NOTEBOOK:  # these started the kernel: -f kernel.json (Jupyter, Colab), --f=kernel.json (VS Code)
            argv = argv[2:] if argv[:1] == ["-f"] else [arg for arg in argv if not arg.startswith("--f=")]
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False, description=__doc__.partition("\n")[0])
    for f in fields(Config):
        parser.add_argument(f"--{f.name}", default=f.default, **f.metadata)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((arg.partition("=")[0] for arg in unknown if arg.startswith("-")), "words without an option")
        hint = f"it would stay in the shell's history; {TOKEN_HELP}" if name == "--token" else "see --help"
        raise UserError(f"there is no place for {name}: {hint}")
    config = Config(**vars(args))
    if not 0 <= config.delay <= 3600 or any(n is not None and n < 1 for n in (config.max_songs, config.artist_id)):
        raise UserError("--delay must lie between 0 and 3600, --max_songs and --artist_id must be 1 or more")
    if not (config.artist.strip() and config.artist.isprintable()):
        raise UserError("--artist is empty or holds unprintable characters")
    path = Path(config.output or CACHE / "artist").absolute()
    parent = next(p for p in path.parents if p.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"no file can be made at {path}; give another --output or change the folder")
    return config


# ---------- Token ----------
def find_token(config: Config) -> str:
    """The Genius access token: alone or as a line NAME=token, from the first place that holds one."""
    line = re.compile(rf"^\s*(?:export\s+)?{TOKEN_NAME}\s*=(.*)", re.M)
    place, text = f"the variable {TOKEN_NAME}", os.environ.get(TOKEN_NAME, "")
    if config.token_file:
        try:
            place, text = "--token_file", Path(config.token_file).read_text(encoding="utf-8-sig", errors="replace")
        except OSError:  # the value is not repeated: it may be the token itself
            raise UserError("--token_file can't be read; it takes the name of a file, not the token") from None
    elif not text.strip() and Path(".env").is_file():
        place, text = ".env", "".join(line.findall(Path(".env").read_text(encoding="utf-8-sig", errors="replace"))[:1])
    if not text.strip() and "google.colab" in sys.modules:  # inside a Colab cell
        from google.colab import userdata
        with suppress(userdata.SecretNotFoundError, userdata.NotebookAccessError):
            place, text = "Colab's secret", userdata.get(TOKEN_NAME) or ""
    found = line.search(text)
    token = (found[1] if found else text).strip().strip("\"'")
    if not token:
        raise UserError(f"no Genius access token; {TOKEN_HELP}")
    if not re.fullmatch("[!-~]+", token):  # requests would repeat it in its error message
        raise UserError(f"{place} holds spaces or characters that no token has; copy the token again")
    return token


# ---------- Requests: politeness and faults ----------
class PoliteSession(requests.Session):
    """Keeps a distance between requests and repeats them after faults that may pass; its errors show nothing sent."""

    def __init__(self, genius: lyricsgenius.Genius, delay: float):
        super().__init__()
        self.headers.update(genius._session.headers)
        self.delay, self.public_root, self.ready_at = delay, genius.PUBLIC_API_ROOT, 0.0

    def request(self, method, url, **kwargs):
        """As in requests, but only sound answers come back. Raises RequestException, RunError, UserError."""
        is_page = not kwargs.get("headers") and not url.startswith(self.public_root)
        for wait in [*(BACKOFF * 2**i for i in range(RETRIES)), None]:
            time.sleep(max(0.0, self.ready_at - time.monotonic()))
            try:
                response = super().request(method, url, **kwargs)
            except requests.RequestException as error:
                problem, asked = type(error).__name__, "0"
            else:
                problem, asked = self.problem(response, is_page), response.headers.get("Retry-After", "0")
            self.ready_at = time.monotonic() + self.delay
            if not problem:
                return response
            if wait is None:
                raise requests.RequestException(f"no good answer from Genius ({problem}, {RETRIES + 1} times)")
            with suppress(urllib3.exceptions.InvalidHeader):
                wait = max(wait, urllib3.Retry().parse_retry_after(asked))  # seconds or a date
            if wait >= 5:
                tqdm.write(f"{problem}: waiting {wait:.0f} s", file=sys.stderr)
            time.sleep(wait)

    def problem(self, response, is_page: bool) -> str:
        """What is wrong with an answer but may pass, or ""; raises for what won't pass."""
        status, text = response.status_code, response.content.decode("utf-8", "replace")  # whatever the header says
        if status == 401:
            raise UserError(f"Genius does not accept this token (HTTP 401); {TOKEN_HELP}")
        if status == 403:
            why = "Genius refuses this address (HTTP 403), as it does Colab's and many others'"
            raise RunError(f"{why}: run the same command on your own computer and upload the corpus, or try later")
        if status == 404 and not is_page:
            raise UserError("Genius has no artist with this id; search with --artist NAME")
        if status != 200 and status not in (408, 429) and status < 500:
            raise requests.RequestException(f"Genius answered HTTP {status}")
        if status != 200:
            return f"HTTP {status}"
        if not is_page:
            with suppress(ValueError, TypeError, KeyError):
                return "" if isinstance(json.loads(text)["response"], dict) else "odd JSON"
            return "broken JSON"
        # lyricsgenius joins containers without a line break (see RULES), and its parser rejects "<!["
        text = re.sub(r'<div[^>]*data-lyrics-container="true"[^>]*>', "\\g<0>\x1e", text).replace("\x1e", "", 1)
        response._content, response.encoding = text.replace("<![", "&lt;![").encode(), "utf-8"
        return "" if "</html>" in text and re.search("data-lyrics-container|__PRELOADED_STATE__", text) else "no page"


# ---------- Cache ----------
@contextmanager
def replacing(path: Path):
    """Open a file that takes the place of `path` once the block ends well; a kill leaves the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))


def read_json(path: Path):
    """The value in a JSON file; None if there is none or it is damaged: it is then fetched again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


# ---------- Artist ----------
def normalized(text: str) -> str:
    """A name or a line without case, diacritics, punctuation and invisible marks: "O.S.T.R." -> "ostr"."""
    text = text.casefold().translate(str.maketrans("łøđı", "lodi"))  # these have no decomposition
    kept = (c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c)[0] not in "MPC")
    return " ".join("".join(kept).split()) or text.strip()


def find_artist(genius: lyricsgenius.Genius, name: str) -> dict:
    """Search for the one artist whose normalized name is ours. Raises UserError with the candidates."""
    found = {}  # id -> name, in Genius' order
    for page in range(1, 11):
        sections = genius.search_all(name, per_page=5, page=page).get("sections", [])
        hits = [hit["result"] for section in sections for hit in section["hits"] if hit["index"] == "artist"]
        known, found = len(found), found | {hit["id"]: hit["name"] for hit in hits}
        matches = [i for i in found if normalized(found[i]) == normalized(name)]
        if matches or len(found) == known:
            break
    if len(matches) == 1:
        return {"id": matches[0], "name": found[matches[0]]}
    if not found:
        raise UserError(f'Genius knows no artist "{name}"; check the spelling')
    offered = "".join(f"\n  {i} {found[i]}" for i in matches or found)
    choose = f"choose one: python data_collection.py --artist_id {next(iter(matches or found))}"
    raise UserError(f'{len(matches) or "no"} artists are named "{name}"; Genius offers:{offered}\n{choose}')


def get_artist(genius: lyricsgenius.Genius | None, config: Config) -> dict:
    """Id and name of the artist, from the cache if it is there, else from Genius."""
    known = [artist for artist in map(read_json, CACHE.glob("*/artist.json")) if artist]
    named = [artist for artist in known if normalized(artist["name"]) == normalized(config.artist)]
    known = [artist for artist in known if artist["id"] == config.artist_id] if config.artist_id else named
    if len(known) == 1:
        return known[0]
    if genius is None:
        raise UserError(f"{CACHE} holds {len(known) or 'no'} such artists; run without --offline or give --artist_id")
    if not config.artist_id:
        return find_artist(genius, config.artist)
    return {key: genius.artist(config.artist_id)["artist"][key] for key in ("id", "name")}


# ---------- Songs ----------
TITLE_RULES = {  # why a song is left out, by its title; "Credits" and "Interview" may be songs, so only in brackets
    "translations": r"[(\[][^)\]]*(translat|tłumacz|traduc|traduç|traduz|übersetz|перевод|çeviri|översätt|romaniz)",
    "annotation pages": r"\b(track ?lista?|album art(work)?|liner notes)\b|[(\[][^)\]]*(credits|interview|wywiad)",
    "instrumentals": r"[(\[][^)\]]*\binstrumental",
}
_TAG = r"\b(remix|rmx|live|na żywo|acoustic|akustyczn\w*|unplugged|demo|edit|extended|remaster\w*|mix|version|wersja)\b"
VERSION = re.compile(rf"\s*[(\[][^)\]]*{_TAG}[^)\]]*[)\]]|\s+-\s+[^-]*{_TAG}.*$|\s+(remix|rmx)$", re.I)


def list_songs(genius: lyricsgenius.Genius, folder: Path, artist_id: int) -> None:
    """Fetch the discography into folder/list, a file a page as Genius sent it; an unfinished run's list is kept."""
    whole, partial = folder / "list", folder / "list.partial"
    if whole.exists() and not partial.exists() and not (whole / "finished").exists():
        return
    page = 1
    while page:
        path = partial / f"{page:05}.json"
        answer = read_json(path) or genius.artist_songs(artist_id, per_page=50, page=page, sort="title")
        write_json(path, answer)
        page = answer["next_page"]
    shutil.rmtree(whole, ignore_errors=True)
    os.replace(partial, whole)


def read_list(folder: Path):
    """Yield the songs of the list, one page in memory at a time."""
    pages = folder / "list" if (folder / "list").exists() else folder / "list.partial"  # killed between the two
    for path in sorted(pages.glob("*.json")):
        yield from json.loads(path.read_text(encoding="utf-8"))["songs"]


def exclusion(song: dict, artist: dict, include_features: bool) -> str:
    """Why a song of the list is left out, "" if it is not."""
    for reason, pattern in TITLE_RULES.items():
        if re.search(pattern, song["title"], re.I):
            return reason
    if song.get("instrumental") or song["lyrics_state"] != "complete":
        return "instrumentals" if song.get("instrumental") else "lyrics not complete"
    primary = song.get("primary_artists") or [song["primary_artist"]]
    ours = any(p["id"] == artist["id"] if "id" in p else p["name"] == artist["name"] for p in primary)
    return "" if ours or include_features else "features"


def select(folder: Path, artist: dict, config: Config) -> tuple[set[int], Counter]:
    """The ids of the songs to collect, and what is left out, counted by reason."""
    chosen, excluded, titles = set(), Counter(), set()
    for song in read_list(folder):
        title = normalized(VERSION.sub("", song["title"]))
        reason = "listed twice" if song["id"] in chosen else exclusion(song, artist, config.include_features)
        if not reason and config.versions == "first" and title in titles and VERSION.search(song["title"]):
            reason = "other versions"  # only if marked as such: two songs may both be called "Intro"
        if not reason and len(chosen) == config.max_songs:
            reason = "beyond --max_songs"
        if reason:
            excluded[reason] += 1
        else:
            chosen.add(song["id"])
            titles.add(title)
    return chosen, excluded


def fetch_songs(genius: lyricsgenius.Genius, folder: Path, chosen: set[int]) -> list[dict]:
    """Fetch each chosen song that the cache lacks into folder/<id>.json; returns those that could not be had."""
    failed, left = [], set(chosen)
    often = 0.1 if sys.stderr.isatty() or IN_NOTEBOOK else 30  # seconds between two pictures of the bar
    with tqdm(total=len(chosen), unit="song", mininterval=often, dynamic_ncols=True) as bar:
        for song in (song for song in read_list(folder) if song["id"] in left):
            left.remove(song["id"])
            path = folder / f"{song['id']}.json"
            bar.set_postfix_str(repr(song["title"])[:40], refresh=False)  # repr: a title may hold control characters
            if read_json(path) is None:
                try:
                    write_json(path, {"song": song, "lyrics": genius.lyrics(song_url=song["url"])})
                except requests.RequestException as error:
                    failed.append({"id": song["id"], "title": song["title"], "problem": str(error)})
            bar.update()
    return failed


# ---------- Cleaning ----------
_SECTION = r"(?i:zwrotk|refren|ref\b|intro|outro|verse|chorus|hook|pre-|bridge|interlud|skit|część|part\b|cuty|tekst)"
RULES = {  # name -> (pattern, replacement), in this order
    "joined parts": (r"\n?\x1e", "\n"),  # the mark that PoliteSession puts between two parts of a page
    "line ends": (r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]", "\n"),  # Windows', old Mac's, Unicode's
    "invisible marks": (  # control characters, soft hyphens, zero-width and bidi marks, lone surrogates
        r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
        r"\ud800-\udfff]", ""),  # fmt: skip
    "typographic spaces": (r"[^\S\n ]", " "),  # tabs, no-break, thin, em… spaces
    "separators": (rf"(?m)^ *{re.escape(SEPARATOR)} *$", ""),  # a line that would end the song
    # at the start: "12 ContributorsTranslationsEnglishTitle Lyrics", with a description that ends in "… Read More"
    "contributor counts": (r"\A\s*\d+ Contributors?([^\n]{0,300}? Lyrics([^\n]{0,900}?(…|\.{3}) ?Read More)?)?", ""),
    # "See Somebody LiveGet tickets as low as $45"
    "adverts": (r"(?:See (?:(?!See )[^\n]){1,80}? Live)?Get tickets as low as \$\d+(?:[.,]\d+)*", "\n"),
    # alone on its line or glued between two lines; "You might also like me" is somebody's line
    "You might also like": (r"(?m)(?:^ *|(?<=\S))You might also like(?= *$|[A-ZĄĆĘŁŃÓŚŹŻ0-9\[(\"„“])", "\n"),
    # at the end, with the glued number of embeds; a number after a space may be the song's own and stays
    "Embed": (r"(?m)(?:^ *\d*|(?<=[^\s\d])\d+|(?<=\S))(?:(?<=\d)(?:\.\d+)?K)?Embed(Share URLCopyEmbedCopy)?\s*\Z", ""),
    # [Anything] alone on a line; [Section …] anywhere, over line breaks too, or never closed. Leaves a stanza break.
    "section headers": (
        rf"(?m)^ *\[(?:[^\[\]\n]|\[[^\[\]\n]*\])*\] *:? *$|\[{_SECTION}(?:(?!\n\n)[^\[\]]){{0,100}}\] *:?"
        rf"|^ *\[{_SECTION}[^\[\]\n]{{0,60}}$", "\n\n"),  # fmt: skip
}
LOOK_ALIKES = str.maketrans("АВЕІКМНОРСТУХаеіјкорсухΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορυ", "ABEIKMHOPCTYXaeijkopcyxABEZHIKMNOPTYXavopu")


def fix_look_alikes(text: str) -> tuple[str, int]:
    """Cyrillic and Greek look-alikes to Latin in words whose other letters, at least half, are all Latin."""

    def mend(match: re.Match) -> str:
        word = match[0].translate(LOOK_ALIKES)
        latin = all(unicodedata.combining(c) or unicodedata.name(c, "").startswith("LATIN") for c in word)
        return word if latin and 2 * sum(map(str.__ne__, word, match[0])) <= len(word) else match[0]

    mended = re.sub(r"(?:[^\W\d_]|[\u0300-\u036f])*[\u0370-\u052f](?:[^\W\d_]|[\u0300-\u036f])*", mend, text)
    return mended, sum(map(str.__ne__, mended, text))


def clean(text: str, keep_headers: bool = False) -> tuple[str, Counter]:
    """Lyrics as a person wrote them, and how often each rule applied. Cleaning again changes nothing."""
    fixed, before = Counter(), None
    while text != before:  # one rule may uncover work for another
        before = text
        for name, (pattern, replacement) in RULES.items():
            if not (keep_headers and name == "section headers"):
                text, count = re.subn(pattern, replacement, text)
                fixed[name] += count
        composed = unicodedata.normalize("NFC", text)
        fixed["composed letters (NFC)"] += max(len(text) - len(composed), composed != text)
        text, count = fix_look_alikes(composed)
        fixed["look-alikes"] += count
        text = "\n".join(re.sub(" +", " ", line).strip(" ") for line in text.split("\n"))
        text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
    return text, +fixed


# ---------- Corpus and report ----------
def sketch(text: str) -> list[int]:
    """Eight numbers, drawn from the text's lines, that two texts share to the extent that they share lines."""
    lines = {line for line in map(normalized, text.split("\n")) if " " in line}
    return sorted(int.from_bytes(hashlib.sha256(line.encode()).digest()[:8]) for line in lines)[:8]


def move_aside(output: Path, artist_id: int, sha256: str) -> None:
    """Rename an existing corpus, and its report, unless this artist's run made it or it holds the same bytes."""
    report = output.with_suffix(".report.json")
    found = hashlib.sha256(output.read_bytes()).hexdigest() if output.exists() else sha256
    made = read_json(report) or {}
    if found != sha256 and (made.get("sha256"), made.get("artist_id")) != (found, artist_id):
        for path in filter(Path.exists, (report, output)):
            aside = path.rename(f"{path}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
            print(f"{path} was not made for this artist, or was edited: moved to {aside}")


def build(output: Path, artist: dict, folder: Path, chosen: set[int], excluded: Counter, keep_headers: bool) -> dict:
    """Write the corpus from the cache, sorted by song id, one song in memory at a time; returns the report."""
    report = {"artist": artist["name"], "artist_id": artist["id"], "output": str(output), "songs": 0, "characters": 0}
    report |= {"excluded": excluded, "fixed": Counter(), "repeats": {}, "near_repeats": {}}
    digest, texts, lines = hashlib.sha256(), {}, {}  # hash of a text, of a line -> first song that has it
    with replacing(output) as file:
        for song_id in sorted(chosen):
            song = read_json(folder / f"{song_id}.json") or {}
            text, fixed = clean(song.get("lyrics") or "", keep_headers)
            plain = normalized(text)
            first = texts.setdefault(hashlib.sha256(plain.encode()).digest(), song_id)
            if plain in ("", "instrumental", "this song is an instrumental"):
                excluded["instrumentals" if plain else "no lyrics" if song else "not fetched"] += 1
                continue
            if first != song_id:
                excluded["repeated songs"] += 1
                report["repeats"][song_id] = first
                continue
            numbers = sketch(text)
            shared = Counter(lines.setdefault(number, song_id) for number in numbers)
            for other in [i for i, count in shared.items() if i != song_id and 2 * count >= len(numbers) > 3]:
                report["near_repeats"][song_id] = other
            text = f"{SEPARATOR}\n" * (report["songs"] > 0) + text + "\n"
            file.write(text.encode())
            digest.update(text.encode())
            report["songs"] += 1
            report["characters"] += len(text)
            report["fixed"] += fixed
        if not report["songs"]:
            raise RunError(f"there is no song to write; left out: {dict(excluded)}")
        file.flush()
        move_aside(output, artist["id"], digest.hexdigest())
    return report | {"sha256": digest.hexdigest()}


# ---------- Main ----------
def collect(config: Config) -> dict:
    """Fetch what the cache lacks (unless offline), write corpus and report, print a summary; returns the report."""
    genius = None
    if not config.offline:
        genius = lyricsgenius.Genius(find_token(config), timeout=TIMEOUT, sleep_time=0)
        genius._session = PoliteSession(genius, config.delay)
    artist = get_artist(genius, config)
    folder = CACHE / str(artist["id"])
    slug = re.sub(r"\W+", "_", normalized(artist["name"])).strip("_") or f"artist_{artist['id']}"
    output = Path(config.output or FOLDER / f"{slug}.txt")
    if genius:
        write_json(folder / "artist.json", artist)
        list_songs(genius, folder, artist["id"])
    chosen, excluded = select(folder, artist, config)
    failed = fetch_songs(genius, folder, chosen) if genius else []
    report = build(output, artist, folder, chosen, excluded, config.keep_headers) | {"failed": failed}
    write_json(output.with_suffix(".report.json"), report)
    if genius:
        (folder / "list" / "finished").touch()
    print(f"{artist['name']}: {report['songs']:,} songs, {report['characters']:,} characters -> {output}")
    for kind, counts in (("left out", excluded), ("fixed", report["fixed"])):
        for name, count in counts.most_common():
            print(f"  {kind:8} {count:8,}  {name}")
    for song_id, other in report["near_repeats"].items():
        print(f"  kept, but song {song_id} has most lines of song {other}")
    for song in failed:
        print(f"  lost: {song['id']} {song['title']!r}: {song['problem']}")
    print(f"next: python gpt.py --input {shlex.quote(str(output))}")
    return report


def main(argv: list[str] | None = None) -> dict:
    """Run the collector; returns the report. Ends with SystemExit: 2 bad input, 1 trouble, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a title must not break a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
    report = {}
    try:
        report = collect(parse_args(argv))
        if not report["failed"]:
            return report
        status, message = 1, f"error: {len(report['failed'])} songs are lost (see above); run the same command again"
    except (UserError, argparse.ArgumentError) as error:
        status, message = 2, f"error: {error}"
    except (RunError, requests.RequestException) as error:
        status, message = 1, f"error: {error}; what was fetched is kept, the same command goes on"
    except OSError as error:
        status, message = 1, f"error: {error.filename or 'output'}: {error.strerror}; what was fetched is kept"
    except KeyboardInterrupt:
        status, message = 130, "\nstopped; what was fetched is kept: the same command goes on from there"
    print(message, file=sys.stderr)
    if IN_NOTEBOOK and status != 2:
        return report
    raise SystemExit(status)


if __name__ == "__main__":
    main()
