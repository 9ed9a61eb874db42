"""A local HTTP server that answers like Genius, for the real lyricsgenius client, with faults on demand.

python tests/fake_genius.py URL --artist "Tede"    # the collector as a process, against that server
"""

import functools
import gzip
import json
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TOKEN = "T0kenThatMustNotShowUpAnywhere-42"
SYLLABLES = "ba ko le mi ru szo ża ćwi dło trzą nę wę śli źre gó fa pło cha dze nia".split()
CONSENT = b"<!DOCTYPE html><html><head><title>Before you continue</title></head><body>We use cookies</body></html>"
ODD_ANSWERS = {  # name -> what is sent instead of the answer, with status 200
    "empty": b"",
    "html": CONSENT,
    "captcha": b"<html><head><title>Just a moment...</title></head><body>Are you a robot?</body></html>",
    "no containers": b'<html><body><div class="NewLayout">Wers<br>Wers</div></body></html>',
    "empty container": b'<html><body><div data-lyrics-container="true"></div></body></html>',
    "odd state": b"<html><script>window.__PRELOADED_STATE__ = JSON.parse('{\"songPage\": [1, {}]}');</script></html>",
    "null": b"null",
    "number": b"17",
    "list": b'[{"response": {}}]',
    "no response": b'{"meta": {"status": 200}, "error": "maintenance"}',
    "wrong types": b'{"response": {"songs": "many", "sections": 3, "artist": [], "next_page": "2"}}',
    "nulls": b'{"response": {"songs": [null, {"id": null}], "sections": [null], "artist": null, "next_page": true}}',
    "deep": b'{"response": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"response": {"songs": [], "next_page": ' + b"9" * 5000 + b"}}",
    "binary": bytes(range(256)) * 20,
}
PASSING_FAULTS = ("429", "500", "502", "503", "504", "slow", "reset", "cut", "broken")


def invented(seed, stanzas=3, lines=4):
    """Made-up Polish-looking lyrics with section headers, always the same for a seed."""
    rng = random.Random(seed)

    def word():
        return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3)))

    def line():
        return " ".join(word() for _ in range(rng.randint(3, 7))).capitalize()

    return "\n\n".join(
        "\n".join([f"[{'Refren' if i % 2 else 'Zwrotka'} {i + 1}]", *(line() for _ in range(lines))])
        for i in range(stanzas)
    )


@functools.cache
def bomb():
    """0.4 MB that unpack to 400."""
    return gzip.compress(bytes(400_000_000), 6)


def page_html(lyrics, form, padding=""):
    """A song page: lyrics in `containers` (two, with a widget between them) or in the page's embedded `state`.

    The form `none` shows the text where Genius says why there are no lyrics; `raw` is the page itself.
    """
    if form == "raw":
        return lyrics
    if form == "none":
        return f'<html><body><div class="LyricsPlaceholder__Message-sc-1">{lyrics}</div></body></html>'
    markup = lyrics.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br/>")
    if form == "state":
        state = json.dumps({"songPage": {"lyricsData": {"body": {"html": f"<p>{markup}</p>"}}}, "padding": padding})
        literal = state.replace("\\", "\\\\").replace("'", "\\'").replace("</", "<\\/")
        return f"<html><body><script>window.__PRELOADED_STATE__ = JSON.parse('{literal}');</script></body></html>"
    first, _, rest = markup.partition("<br/><br/>")
    parts = [first, *([f"<br/>{rest}"] if rest else [])]  # the second part starts with the empty line
    box = '<div data-lyrics-container="true" class="Lyrics__Container-sc-1">{}<a href="/1"><span>{}</span></a></div>'
    boxes = '<div class="RightSidebar">See also</div>'.join(
        box.format('<div class="LyricsHeader__Container">12 Contributors</div>' if i == 0 else "", part)
        for i, part in enumerate(parts)
    )
    return f"<!DOCTYPE html><html><head><script>{padding}</script></head><body>{boxes}</body></html>"


class FakeGenius:
    """Artists, lists of songs, pages; counts requests by path. Its `fault(path, number)` names a fault or ""."""

    def __init__(self):
        self.artists, self.lists, self.pages = {}, {}, {}
        self.counts, self.times, self.lock = Counter(), [], threading.Lock()
        self.fault = lambda path, number: ""
        self.retry_after = "0"
        self.slow_seconds = 1.0
        self.padding = ""  # what makes pages as long as real ones
        fake = self

        class Handler(_Handler):
            genius = fake

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def add_artist(self, artist_id, name):
        """An artist with an empty discography."""
        self.artists[artist_id], self.lists[artist_id] = name, []

    def add_song(self, artist_id, song_id, title=None, lyrics=None, form=None, primary=None, **more):
        """A song in an artist's list; lyrics are a text or a function that makes one when asked."""
        title = f"Utwór {song_id:05}" if title is None else title
        primary = [artist_id] if primary is None else primary
        people = [{"id": i, "name": self.artists[i]} for i in primary]
        song = {"id": song_id, "title": title, "url": f"https://genius.com/song-{song_id}-lyrics"}
        song |= {"lyrics_state": "complete", "instrumental": False, "primary_artists": people, "featured_artists": []}
        song["primary_artist"] = {**people[0], "name": " & ".join(p["name"] for p in people)}
        self.lists[artist_id].append(song | more)
        form = form or ("containers", "state")[song_id % 2]
        self.pages[f"/web/song-{song_id}-lyrics"] = (lyrics if lyrics is not None else invented(song_id), form)

    def page_requests(self):
        """How often each song page was asked for."""
        return Counter({path: n for path, n in self.counts.items() if path.startswith("/web/")})


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """Ignore a client that went away: the tests do that on purpose, and the collector did not print it."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def send(self, status, body, kind="application/json", cut=False, **headers):
        """One answer in one write."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode() + (body[: len(body) // 2] if cut else body))
        self.close_connection = cut

    def do_GET(self):
        """Answer, or fail as the server's `fault` says."""
        fake, parts = self.genius, urlsplit(self.path)
        path, query = parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}
        with fake.lock:
            fake.counts[self.path] += 1
            fake.times.append(time.monotonic())
            fault = fake.fault(self.path, fake.counts.total())
        if fault == "slow":
            time.sleep(fake.slow_seconds)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            self.wfile = open("/dev/null", "wb")
            return
        if fault.isdigit():  # an error page that repeats what was sent, as careless servers do
            sent = json.dumps(dict(self.headers)).encode()
            return self.send(int(fault), sent, **({"Retry_After": fake.retry_after} if fault == "429" else {}))
        if path.startswith("/v1/") and self.headers["authorization"] != f"Bearer {TOKEN}":
            return self.send(401, {"error": "invalid_token"})
        if fault in ODD_ANSWERS:
            return self.send(200, ODD_ANSWERS[fault], "text/html" if fault in ("html", "captcha") else "application/json")
        if fault == "bomb":
            return self.send(200, bomb(), Content_Encoding="gzip")
        if fault == "no gzip":
            return self.send(200, b"these bytes are no gzip", Content_Encoding="gzip")
        kind, body = self.answer(path, query)
        if body is None:
            return self.send(404, {"meta": {"status": 404}})
        if fault == "broken":
            body = body[: len(body) * 2 // 3]
        if fault == "charset":
            kind = "text/html"  # which means ISO-8859-1
        self.send(200, body, kind, cut=fault == "cut")

    def answer(self, path, query):
        """(content type, body) of a path."""
        fake, page = self.genius, int(query.get("page") or 1)
        if path in fake.pages:
            lyrics, form = fake.pages[path]
            html = page_html(lyrics() if callable(lyrics) else lyrics, form, fake.padding)
            return "text/html; charset=utf-8", html.encode()
        if path == "/public/search/multi":
            size = int(query["per_page"])
            names = list(fake.artists.items())[(page - 1) * size : page * size]
            hits = [{"index": "artist", "result": {"id": i, "name": name}} for i, name in names]
            answer = {
                "sections": [
                    {"type": "top_hit", "hits": hits[:1]},
                    {"type": "song", "hits": []},
                    {"type": "artist", "hits": hits},
                ]
            }
        elif path.startswith("/v1/artists/") and int(path.split("/")[3]) in fake.artists:
            artist_id = int(path.split("/")[3])
            answer = {"artist": {"id": artist_id, "name": fake.artists[artist_id], "api_path": "", "url": ""}}
            if path.endswith("/songs"):
                size, songs = int(query["per_page"]), fake.lists[artist_id]
                more = page + 1 if page * size < len(songs) else None
                answer = {"songs": songs[(page - 1) * size : page * size], "next_page": more}
        else:
            return "", None
        return "application/json", json.dumps({"meta": {"status": 200}, "response": answer}).encode()


def point_at(url, set_attribute=setattr, timeout=0.5):
    """Send lyricsgenius to the server at `url`, and make the collector's patience short."""
    import lyricsgenius

    import data_collection

    for name, path in (("API_ROOT", "v1/"), ("PUBLIC_API_ROOT", "public/"), ("WEB_ROOT", "web/")):
        set_attribute(lyricsgenius.Genius, name, url + path)
    set_attribute(data_collection, "BACKOFF", 0.001)
    set_attribute(data_collection, "TIMEOUT", timeout)
    return data_collection


if __name__ == "__main__":
    try:
        point_at(sys.argv[1], timeout=5.0).main(sys.argv[2:])
    finally:  # not ru_maxrss: that starts with the peak of the process that started this one
        status = Path("/proc/self/status")
        peak = status.read_text().partition("VmHWM:")[2].split()[0] if status.exists() else 0
        print(f"peak_kib={peak}", file=sys.stderr)
