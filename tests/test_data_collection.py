"""Tests of the collector: pytest tests/test_data_collection.py -m "not slow"   (without -m: about six minutes).

The real lyricsgenius client talks to the server of fake_genius.py; every line of lyrics here is invented.
"""

import ast
import errno
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import types
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import fake_genius
import pytest
from conftest import make_device
from fake_genius import ODD_ANSWERS, PASSING_FAULTS, ROOT, TOKEN, FakeGenius, invented
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data_collection as dc

SEPARATOR = "\n<|endoftext|>\n"
CORPUS, DATABASE = Path("assets/input/tede.txt"), Path("assets/input/tede.sqlite")


@pytest.fixture
def genius(tmp_path, monkeypatch):
    """A server with the artist Tede (id 7) behind another one; the collector works in an empty folder."""
    server = FakeGenius()
    server.add_artist(3, "Tedeusz")
    server.add_artist(7, "Tede")
    fake_genius.point_at(server.url, monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENIUS_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


def run(*argv):
    """The collector in this process, without delay."""
    return dc.main(["--delay", "0", *map(str, argv)])


def fail(capsys, status, *argv):
    """Run the collector, which must end with this status; returns what it printed on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == status, err
    return err


def process(server, *argv, **env):
    """The collector in a process of its own."""
    command = [sys.executable, str(ROOT / "tests" / "fake_genius.py"), server.url, "--delay", "0", *map(str, argv)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def ask(query, path=DATABASE):
    """The rows that a query gives, as a person would ask with sqlite3."""
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute(query).fetchall()
        db.commit()
    return rows


def stored(state="lyrics"):
    """The ids of the songs in this state."""
    return [i for (i,) in ask(f"SELECT id FROM song WHERE state = '{state}' ORDER BY id")]


def files(folder="."):
    """Every file below a folder."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def corpus():
    """The songs of the corpus."""
    return CORPUS.read_text(encoding="utf-8").removesuffix("\n").split(SEPARATOR)


def log(line):
    """Keep a figure of a slow test."""
    folder = ROOT / "benchmarks" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "collector_slow.log", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M')} {line}\n")


# ---------- The whole way ----------
def test_a_discography_becomes_a_corpus(genius, capsys):
    for i in range(60):  # two pages; by title in descending order, so not by id
        genius.add_song(7, 500 - i)
    report = run("--artist", "TEDE")
    songs = corpus()
    assert report["songs"] == len(songs) == 60 and report["artist_id"] == 7
    assert songs == [dc.clean(invented(i))[0] for i in range(441, 501)]  # both page forms give the same text
    data = CORPUS.read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and len(data.decode()) == report["characters"]
    assert json.loads(CORPUS.with_suffix(".report.json").read_text()) == json.loads(json.dumps(report))
    out = capsys.readouterr()
    assert "python gpt.py --input assets/input/tede.txt" in out.out and "60 songs" in out.out
    assert "60/60" in out.err and "Utwór" in out.err  # the progress bar with titles
    assert len(genius.page_requests()) == 60 and genius.counts.total() == 60 + 2 + 1


def test_the_list_is_read_to_the_fortieth_page(genius):
    for i in range(1, 1952):
        genius.add_song(7, i, lyrics_state="complete" if i in (1, 1951) else "unreleased")
    report = run()
    assert report["songs"] == 2 and report["excluded"] == {"lyrics not complete": 1949}
    assert sum("/songs?" in path for path in genius.counts) == 40


def test_stanzas_stay_apart_and_containers_do_not_glue(genius):
    genius.add_song(7, 2, lyrics="Raz\nDwa\n\nTrzy\n\nCztery", form="containers")
    genius.add_song(7, 3, lyrics="Ara\nBara\n\nCara\n\nDara", form="state")
    box = '<div data-lyrics-container="true">{}</div>'
    page = box.format("Noc<br/>Dzień<br/>") + "<p>x</p>" + box.format("Zmierzch") + box.format("Świt") + "<![x]></html>"
    genius.add_song(7, 4, lyrics=page, form="raw")
    run()
    assert corpus() == ["Raz\nDwa\n\nTrzy\n\nCztery", "Ara\nBara\n\nCara\n\nDara", "Noc\nDzień\nZmierzch\nŚwit"]


def test_the_same_songs_give_the_same_bytes(genius, capsys):
    for i in random.Random(1).sample(range(1000), 12):
        genius.add_song(7, i)
    run()
    first = CORPUS.read_bytes(), CORPUS.with_suffix(".report.json").read_bytes()
    genius.lists[7].reverse()
    run()
    assert (CORPUS.read_bytes(), CORPUS.with_suffix(".report.json").read_bytes()) == first
    assert max(genius.page_requests().values()) == 1 and "moved" not in capsys.readouterr().out


def test_a_finished_run_looks_for_new_songs(genius):
    genius.add_song(7, 1)
    run()
    genius.add_song(7, 2)
    assert run()["songs"] == 2 and max(genius.page_requests().values()) == 1


# ---------- Which artist ----------
@pytest.mark.parametrize(
    "asked, name",
    [("sokol", "Sokół"), ("O.S.T.R.", "OSTR"), ("ŁONA", "Łona"), ("zażółć gęślą", "Zazolc Gesla"), ("Jay-Z", "JayZ"),
     ("\u200bTede", "Tede"), ("ten typ  mes", "Ten Typ Mes"), ("!!!", "!!!"), ("Nosówska", "Nośowska")],
)  # fmt: skip
def test_names_match_without_case_diacritics_punctuation(asked, name):
    assert dc.normalized(asked) == dc.normalized(name)


@pytest.mark.parametrize("asked, name", [("Tede", "Tedeusz"), ("Te de", "Tede"), ("!!!", "???"), ("A$AP", "AAP")])
def test_other_names_do_not_match(asked, name):
    assert dc.normalized(asked) != dc.normalized(name)


def test_an_artist_with_diacritics_names_the_file(genius):
    genius.add_artist(9, "Żółć & Kłącze")
    genius.add_song(9, 1)
    assert run("--artist", "ZOLC & KLACZE")["output"] == str(Path("assets/input/zolc_klacze.txt"))


def test_a_wrong_artist_stops_with_the_candidates(genius, capsys):
    error = fail(capsys, 2, "--artist", "Tedeus")
    assert error.startswith('error: Genius has no artists like "Tedeus"; choose one') and not files()
    assert "\n  --artist_id 3  # Tedeusz\n  --artist_id 7  # Tede\n" in error
    genius.add_artist(8, "TĘDE")
    error = fail(capsys, 2, "--artist", "Tede")
    assert "2 artists" in error and "7  # Tede\n  --artist_id 8  # TĘDE\n" in error and "Tedeusz" not in error
    genius.artists.clear()
    assert "check the spelling" in fail(capsys, 2, "--artist", "Nikt")


def test_the_right_artist_may_be_on_the_second_page_of_the_search(genius):
    for i in range(100, 106):
        genius.add_artist(i, f"Inny {i}")
    genius.add_artist(200, "Daleki")
    genius.add_song(200, 1)
    assert run("--artist", "daleki")["artist_id"] == 200


def test_an_id_chooses_the_artist(genius, capsys):
    genius.add_song(3, 1)
    assert run("--artist_id", 3)["artist"] == "Tedeusz"
    assert Path("assets/input/artist-3.txt").exists()  # a name comes from the command line, never from a server
    error = fail(capsys, 2, "--artist_id", 99)
    assert "HTTP 404" in error and "search with --artist NAME" in error
    assert not Path("assets/input/artist-99.sqlite").exists()
    assert run("--artist", "Kot", "--artist_id", 3)["output"] == str(Path("assets/input/kot.txt"))
    assert "give another --artist name" in fail(capsys, 2, "--artist", "Kot", "--artist_id", 7)


# ---------- Which songs ----------
def test_what_is_left_out_is_counted_by_reason(genius):
    genius.add_artist(5, "Genius English Translations")
    titles = {1: "Zwykły", 2: "Wspólny", 3: "Gościnny", 4: "Zwykły (English Translation)", 5: "Płyta [Tracklist]",
              6: "Bez słów (Instrumental)", 7: "Credits", 8: "Płyta (Credits)", 9: "Mój album artysty",
              10: "Rozmowa [Wywiad]"}  # fmt: skip
    people = {2: [3, 7], 3: [3], 4: [5]}
    for i, title in titles.items():
        genius.add_song(7, i, title, primary=people.get(i, [7]), featured_artists=[{"id": 7, "name": "Tede"}])
    genius.add_song(7, 11, instrumental=True)
    genius.add_song(7, 12, lyrics_state="unreleased")
    genius.lists[7].append(genius.lists[7][0])  # listed twice
    genius.add_song(7, 13, lyrics="Lyrics for this song have yet to be transcribed", form="none")
    genius.add_song(7, 14, lyrics="12 Contributors")
    genius.add_song(7, 15, lyrics="[Instrumental]")
    genius.add_song(7, 16, lyrics="This song is an Instrumental.")
    genius.add_song(7, 17, lyrics=invented(1).upper() + "!")
    genius.add_song(7, 18, lyrics="This song is an instrumental", form="none")
    del genius.lists[7][1]["primary_artist"]["id"]
    report = run()
    left = {"translations": 1, "annotation pages": 3, "instrumentals": 5, "features": 1,
            "lyrics not complete": 1, "no lyrics": 2, "repeated songs": 1}  # fmt: skip
    assert report["excluded"] == left and report["songs"] == 4
    report = run("--include_features", "--keep_headers")
    assert report["songs"] == 5 and "features" not in report["excluded"] and "[Refren 2]" in CORPUS.read_text()
    assert report["excluded"]["instrumentals"] == 5 and report["excluded"]["no lyrics"] == 2


def test_versions_all_or_first_and_max_songs(genius):
    titles = ["Intro", "Intro", "Noc", "Noc (DJ Kot Remix)", "Noc - Live", "Noc [Na żywo]", "Dzień (Remix)",
              "Live is życie", "Edit"]  # fmt: skip
    for i, title in enumerate(titles):
        genius.add_song(7, i + 1, title)
    assert run()["songs"] == 9
    report = run("--versions", "first")
    assert report["songs"] == 6 and report["excluded"] == {"other versions": 3}
    report = run("--max_songs", 2)
    assert report["songs"] == 2 and report["excluded"] == {"beyond --max_songs": 7}


def test_a_song_cannot_end_itself(genius):
    genius.add_song(7, 1, lyrics="Początek\n<|endoftext|>\nKoniec <|endoftext|> naprawdę")
    report = run()
    assert corpus() == ["Początek\n\nKoniec <|endoftext|> naprawdę"] and report["fixed"]["separators"] == len("<|endoftext|>")


# ---------- Faults ----------
def faults(seed, share=0.1):
    """A seeded random mix of all temporary faults."""
    rng = random.Random(seed)
    return lambda path, number: rng.choice(PASSING_FAULTS) if rng.random() < share else ""


def same_corpus_with_faults(genius, monkeypatch, songs):
    """Collect with and without faults; returns the requests that it took with them."""
    for i in range(songs):
        genius.add_song(7, i + 1)
    run()
    clean, before = CORPUS.read_bytes(), genius.counts.total()
    monkeypatch.chdir(os.mkdir("again") or "again")
    genius.fault = faults(songs)
    monkeypatch.setattr(dc, "TIMEOUT", 0.3)
    genius.slow_seconds = 0.6
    report = run()
    assert CORPUS.read_bytes() == clean and report["songs"] == songs and report["failed"] == []
    return genius.counts.total() - before


def test_faults_do_not_change_the_corpus(genius, monkeypatch):
    assert same_corpus_with_faults(genius, monkeypatch, 60) > 63


@pytest.mark.slow
def test_faults_do_not_change_the_corpus_of_1000_songs(genius, monkeypatch):
    start = time.monotonic()
    requests = same_corpus_with_faults(genius, monkeypatch, 1000)
    assert requests > 1070
    seconds = f"{time.monotonic() - start:.0f} s with the run without faults"
    log(f"1,000 songs, 10 % of the requests failing: {requests:,} requests, same bytes as without faults, {seconds}")


@pytest.mark.parametrize("fault", [*PASSING_FAULTS, "charset"])
def test_each_fault_passes(genius, monkeypatch, fault):
    genius.add_song(7, 1, lyrics="Zażółć gęślą jaźń\nŁódź")
    monkeypatch.setattr(dc, "TIMEOUT", 0.2)
    genius.slow_seconds = 0.4
    genius.fault = lambda path, number: fault if genius.counts[path] == 1 else ""
    run()
    assert corpus() == ["Zażółć gęślą jaźń\nŁódź"]
    assert set(genius.counts.values()) == ({1} if fault == "charset" else {2})


def test_lost_songs_are_listed_and_never_stored(genius, capsys):
    for i in range(1, 5):
        genius.add_song(7, i)
    del genius.pages["/web/song-2-lyrics"]
    captcha = "<html>Are you a robot?</html>"
    genius.add_song(7, 5, lyrics=captcha, form="raw")
    genius.fault = lambda path, number: "503" if "song-3" in path else ""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run()
    out = capsys.readouterr()
    assert stop.value.code == 1 and "error: 3 songs are lost" in out.err and "continue with: python data_" in out.err
    assert "lost: Utwór 00002: HTTP 404" in out.out and "lost: Utwór 00003: no good answer" in out.out
    assert "(https://genius.com/song-5-lyrics)" in out.out and "next: python gpt.py" in out.out
    assert len(corpus()) == 2 and stored("wanted") == [2, 3, 5]
    genius.fault = lambda path, number: ""
    genius.add_song(7, 2)
    genius.lists[7] = genius.lists[7][:5]
    genius.pages["/web/song-5-lyrics"] = ("W końcu są tu słowa", "containers")
    genius.counts.clear()
    assert run()["songs"] == 5 and set(genius.page_requests()) == {f"/web/song-{i}-lyrics" for i in (2, 3, 5)}


@pytest.mark.parametrize("word", ["This song is an instrumental", "Lyrics for this song have yet to be transcribed.",
                                  "Lyrics for this song have yet to be released. Please check back later."])  # fmt: skip
def test_genius_word_that_there_are_no_lyrics_is_remembered(genius, word):
    genius.add_song(7, 1)
    genius.add_song(7, 2, lyrics=word, form="none")
    state = json.dumps({"songPage": {"lyricsData": {"body": {"html": ""}, "lyricsPlaceholderReason": "unreleased"}}})
    page = f"<html><script>window.__PRELOADED_STATE__ = JSON.parse('{state}');</script></html>"
    genius.add_song(7, 3, lyrics=page, form="raw")
    assert run()["songs"] == 1 and stored("none") == [2, 3]
    assert run()["failed"] == [] and max(genius.page_requests().values()) == 1


def test_401_is_a_bad_token_at_once(genius, capsys, monkeypatch):
    monkeypatch.setenv("GENIUS_ACCESS_TOKEN", "wrong-token")
    error = fail(capsys, 2)
    assert "does not accept this token (HTTP 401)" in error and "genius.com/api-clients" in error
    assert error.count("\n") == 1 and "wrong-token" not in error
    assert genius.counts.total() == 2  # the search needs no token; the first request that does ends the run
    assert not list(Path(".").rglob("*.txt")) and not ask("SELECT * FROM sqlite_master")


def test_a_refused_list_stops_at_once_and_a_refused_page_is_left_out(genius, capsys):
    for i in range(1, 11):
        genius.add_song(7, i)
    genius.fault = lambda path, number: "403" if "/v1/" in path else ""
    error = fail(capsys, 1)
    assert "refuses (HTTP 403)" in error and "another computer" in error
    assert error.count("\n") == 1 and genius.counts.total() == 2
    genius.fault = lambda path, number: "403" if "song-6" in path else ""
    assert "1 songs are lost" in fail(capsys, 1) and len(corpus()) == 9 and stored("wanted") == [6]
    genius.fault = lambda path, number: ""
    assert run()["songs"] == 10
    assert {path: n for path, n in genius.page_requests().items() if n > 1} == {"/web/song-6-lyrics": 2}


def test_a_block_ends_with_what_is_there_and_passes_by_songs_that_stay_refused(genius, capsys):
    for i in range(1, 31):
        genius.add_song(7, i)
    genius.fault = lambda path, number: "403" if "/web/" in path and genius.page_requests().total() > 10 else ""
    error = fail(capsys, 1, "--artist", "Tede")
    assert "5 songs in a row: it seems that Genius blocks" in error
    assert "continue with: python data_collection.py --delay 0 --artist Tede" in error
    assert len(corpus()) == 10 and genius.page_requests().total() == 15
    assert json.loads(CORPUS.with_suffix(".report.json").read_text())["stopped"] in error
    refused = {f"/web/song-{i}-lyrics" for i in range(11, 16)}
    genius.fault = lambda path, number: "403" if path in refused else ""
    fail(capsys, 1)  # the songs not yet asked for come first
    assert len(corpus()) == 25
    genius.fault = lambda path, number: ""
    assert run()["songs"] == 30


def test_a_lasting_429_ends_after_a_bounded_time(genius, monkeypatch, capsys):
    for i in range(1, 101):
        genius.add_song(7, i)
    run("--max_songs", 3)
    waits, genius.retry_after = [], "1800"
    monkeypatch.setattr(dc.time, "sleep", waits.append)
    genius.fault = lambda path, number: "429" if "/web/" in path else ""
    error = fail(capsys, 1)
    assert "HTTP 429" in error and "continue with:" in error and len(corpus()) == 3
    assert sum(waits) < 3700 and max(waits) <= 60 and genius.page_requests().total() < 40
    waits.clear()
    genius.counts.clear()
    genius.fault = lambda path, number: "429" if "/web/" in path and genius.counts[path] == 1 else ""
    assert run("--max_songs", 9)["songs"] == 9 and sum(waits) == 6 * 1800  # a good answer resets the patience


def test_a_list_that_cannot_be_read_ends_the_run(genius, capsys):
    genius.add_song(7, 1)
    genius.fault = lambda path, number: "502" if "/songs" in path else ""
    assert "error: there is no song to write: no good answer from Genius (HTTP 502, 6 times)" in fail(capsys, 1)
    genius.close()
    assert "no good answer from Genius (ConnectionError, 6 times)" in fail(capsys, 1)


def test_retry_after_and_delay_are_kept(genius, monkeypatch, capsys):
    genius.add_song(7, 1)
    genius.retry_after = "1"
    genius.fault = lambda path, number: "429" if number == 2 else ""
    dc.main(["--delay", "0.1"])
    gaps = [b - a for a, b in zip(genius.times, genius.times[1:], strict=False)]
    assert len(gaps) == 3 and gaps[1] >= 1 and min(gaps) >= 0.09
    genius.fault = lambda path, number: "404" if "/web/" in path else ""
    for i in range(2, 5):
        genius.add_song(7, i)
    del genius.times[:]
    with pytest.raises(SystemExit):  # the songs that are refused keep the distance, too
        dc.main(["--delay", "0.1"])
    assert len(genius.times) == 4 and min(b - a for a, b in zip(genius.times, genius.times[1:], strict=False)) >= 0.09
    waits = []
    monkeypatch.setattr(dc.time, "sleep", waits.append)
    genius.retry_after = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 300))
    once = iter(["429"])
    genius.fault = lambda path, number: next(once, "")
    capsys.readouterr()
    run()
    err = capsys.readouterr().err
    assert 290 < sum(waits) <= 300 and max(waits) <= 60 and err.count("HTTP 429: waiting") == 5


@pytest.mark.parametrize("header, least, most", [
    ("7", 7, 7), ("7.5", 0, 1), ("-7", 0, 1), ("", 0, 1), ("soon", 0, 1), ("²", 0, 1), ("nan", 0, 1), ("9" * 400, 3600, 3600),
    ("100000", 3600, 3600), ("Sun, 06 Nov 99999 08:49:37 GMT", 0, 1), ("Sun, 06 Nov 1994 08:49:37 GMT", 0, 1),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 3600, 3600), ("Sunday, 06-Nov-94 08:49:37 GMT", 0, 1),
    ("Sun Nov  6 08:49:37 1994", 0, 1), ("Thu, 99 Foo 2040 25:61:61 +9999", 0, 1)])  # fmt: skip
def test_retry_after_in_all_its_forms(genius, monkeypatch, header, least, most):
    genius.add_song(7, 1)
    waits, genius.retry_after = [], header
    monkeypatch.setattr(dc.time, "sleep", waits.append)
    genius.fault = lambda path, number: "429" if number == 2 else ""
    run()
    assert least <= sum(waits) <= most


# ---------- Kills, Ctrl-C, full disk ----------
def survive_kills(genius, kills, songs, seed):
    """Kill the collector at random moments until it ends by itself; returns (times killed, repeated requests)."""
    for i in range(songs):
        genius.add_song(7, i + 1)
    run("--output", "whole.txt")
    expected = Path("whole.txt").read_bytes()
    shutil.rmtree("assets")
    genius.counts.clear()
    rng, killed = random.Random(seed), 0
    while killed < kills:
        child = process(genius)
        served, more = genius.counts.total(), rng.randint(0, songs // kills)
        while child.poll() is None and genius.counts.total() - served < more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.communicate()
        if child.returncode == 0:
            break
    child = process(genius)
    assert child.communicate() and child.returncode == 0
    assert CORPUS.read_bytes() == expected
    return killed, sum(n - 1 for n in genius.page_requests().values()), genius.counts.total()


def test_three_kills_change_nothing(genius):
    killed, repeats, _ = survive_kills(genius, kills=3, songs=120, seed=1)
    assert killed == 3 and repeats <= killed


@pytest.mark.slow
def test_thirty_kills_change_nothing(genius):
    killed, repeats, total = survive_kills(genius, kills=30, songs=2000, seed=30)
    assert killed == 30 and repeats <= killed
    again = f"{repeats} song pages, {total - 2041 - repeats} others"  # 2,041: the search, 40 list pages, 2,000 songs
    log(f"2,000 songs, {killed} SIGKILLs: same corpus; asked for again: {again}")


def faults_and_kills(genius, songs, kills, seed):
    """Collect with 10 % odd answers of all kinds, killed `kills` times; returns what happened."""
    kinds = [*PASSING_FAULTS, *ODD_ANSWERS, "no gzip", "400", "404", "403", "408"]
    for i in range(songs):
        genius.add_song(7, i + 1)
    run("--output", "whole.txt")
    whole = Path("whole.txt").read_bytes()
    texts = whole.decode().removesuffix("\n").split(SEPARATOR)
    shutil.rmtree("assets")
    rng, killed, runs, met = random.Random(seed), 0, 0, Counter()
    genius.slow_seconds = 0.1

    def fault(path, number):
        kind = rng.choice(kinds) if rng.random() < 0.1 else ""
        met[kind] += 1
        return kind

    genius.fault = fault
    while killed < kills:
        child = process(genius)
        served, more = genius.counts.total(), rng.randint(0, 2 * songs // kills)
        while child.poll() is None and genius.counts.total() - served < more:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        _, err = child.communicate()
        assert b"Traceback" not in err
        runs += 1
    lost = 1
    while lost:
        child = process(genius)
        out, err = child.communicate()
        assert b"Traceback" not in err and child.returncode in (0, 1, 2), err
        runs += 1
        report = json.loads(CORPUS.with_suffix(".report.json").read_text()) if CORPUS.exists() else {"songs": 0}
        lost = child.returncode
        if CORPUS.exists() and not report["stopped"] and "odd entries" not in report["excluded"]:
            named = {song["id"] for song in report["failed"]}
            assert corpus() == [text for i, text in enumerate(texts, 1) if i not in named]
    assert CORPUS.read_bytes() == whole
    return killed, runs, met


def test_faults_and_kills(genius):
    killed, _, met = faults_and_kills(genius, 100, 2, seed=4)
    assert killed == 2 and len(met) > 8


@pytest.mark.slow
def test_1000_songs_with_faults_of_all_kinds_and_thirty_kills(genius):
    killed, runs, met = faults_and_kills(genius, 1000, 30, seed=1)
    assert killed == 30 and len(met) > 20
    log(f"1,000 songs, {met.total() - met['']} of {met.total():,} answers faulty in {len(met) - 1} ways, {killed} SIGKILLs, "
        f"{runs} runs: the same bytes as without faults")


def test_an_interrupted_list_is_continued(genius, capsys):
    for i in range(1, 121):
        genius.add_song(7, i)
    genius.fault = lambda path, number: "403" if "page=3" in path else ""
    fail(capsys, 1)
    genius.fault = lambda path, number: ""
    assert run()["songs"] == 120
    assert sorted(n for path, n in genius.counts.items() if "/songs?" in path) == [1, 1, 2]
    assert max(genius.page_requests().values()) == 1


@pytest.mark.parametrize("when", ["artist WHEN NEW.next_page = 3", "song WHEN NEW.new_page = 2"])
def test_a_page_of_the_list_is_stored_with_our_place_in_it(genius, capsys, when):
    for i in range(1, 121):
        genius.add_song(7, i, lyrics_state="complete" if i == 1 else "unreleased")
    run()
    ask(f"CREATE TRIGGER stop BEFORE UPDATE ON {when} BEGIN SELECT RAISE(ABORT, 'no'); END")
    genius.counts.clear()
    assert "tede.sqlite: no" in fail(capsys, 1)
    assert ask("SELECT next_page FROM artist") == [(2,)]
    assert ask("SELECT new_page, count(*) FROM song WHERE new_page NOT NULL GROUP BY new_page") == [(1, 50)]
    ask("DROP TRIGGER stop")
    assert run()["excluded"] == {"lyrics not complete": 119}
    assert sorted(n for path, n in genius.counts.items() if "/songs?" in path) == [1, 1, 2]


def test_each_song_is_stored_before_the_next_is_asked_for(genius):
    seen = []
    for i in range(1, 5):
        genius.add_song(7, i, lyrics=lambda i=i: seen.append(stored()) or invented(i))
    run()
    assert seen == [[], [1], [1, 2], [1, 2, 3]]


def test_a_corpus_is_known_as_ours_before_it_is_in_its_place(genius, monkeypatch, capsys):
    genius.add_song(7, 1)
    replace = os.replace

    def replace_and_break(*paths):
        replace(*paths)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(dc.os, "replace", replace_and_break)
    assert "broken" in fail(capsys, 1)
    monkeypatch.setattr(dc.os, "replace", replace)
    run("--keep_headers")
    assert "[Refren" in corpus()[0] and not [path for path in files("assets") if "previous" in path.name]


def test_ctrl_c_says_how_to_continue(genius, monkeypatch, capsys):
    for i in range(1, 6):
        genius.add_song(7, i)

    def interrupt(path, number):
        if "song-4" in path:
            os.kill(os.getpid(), signal.SIGINT)
        return ""

    genius.fault = interrupt
    error = fail(capsys, 130, "--artist", "Tede")
    assert "continue with: python data_collection.py --delay 0 --artist Tede\n" in error and "Traceback" not in error
    assert stored() in ([1, 2, 3], [1, 2, 3, 4])
    monkeypatch.setattr(dc, "IN_NOTEBOOK", True)
    assert run() == {}  # a notebook cell returns
    genius.fault = lambda path, number: ""
    assert run()["songs"] == 5


def test_a_full_disk_keeps_the_old_corpus(genius, monkeypatch, capsys):
    genius.add_song(7, 1)
    run()
    old = CORPUS.read_bytes()
    genius.add_song(7, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "tede.txt.tmp")

    monkeypatch.setattr(dc.os, "fsync", full)
    error = fail(capsys, 1)
    assert "No space left on device: 'tede.txt.tmp'; what was fetched is kept" in error
    assert CORPUS.read_bytes() == old and not list(Path(".").rglob("*.tmp")) and stored() == [1, 2]


# ---------- Odd answers ----------
@pytest.mark.parametrize("fault", [*ODD_ANSWERS, "no gzip", "400", "404", "408", "418"])
def test_an_odd_answer_is_one_line_and_the_next_run_mends_it(genius, monkeypatch, capsys, fault):
    for i in range(1, 4):
        genius.add_song(7, i)
    for where in ("/public/", "/songs?", "/web/song-2"):
        genius.fault = lambda path, number, where=where: fault if where in path else ""
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run()
        err = capsys.readouterr().err
        assert stop.value.code in (1, 2) and err.count("error: ") == 1 and "Traceback" not in err
        genius.fault = lambda path, number: ""
        assert run()["songs"] == 3 and len(corpus()) == 3
        shutil.rmtree("assets")


@pytest.mark.parametrize("where", ["/public/", "/songs?", "/web/"])
def test_an_answer_that_unpacks_to_400_mb_is_not_read_to_its_end(genius, where):
    for i in range(1, 4):
        genius.add_song(7, i)
    genius.fault = lambda path, number: "bomb" if where in path else ""
    child = process(genius)
    out, err = child.communicate()
    assert child.returncode == 1 and b"too large" in out + err and int(re.search(rb"peak_kib=(\d+)", err)[1]) < 150_000


@pytest.mark.parametrize("following", [1, 0, -1, True, "2", 2.0, 2001, 10**30, [2], {}])
def test_a_list_that_never_ends_ends(genius, monkeypatch, capsys, following):
    genius.add_song(7, 1)
    odd = json.dumps({"response": {"songs": genius.lists[7], "next_page": following}}).encode()
    monkeypatch.setitem(fake_genius.ODD_ANSWERS, "this", odd)
    genius.fault = lambda path, number: "this" if "/songs?" in path else ""
    assert "page 1 of the list" in fail(capsys, 1)
    assert genius.counts.total() == 2


def test_odd_entries_of_the_list_are_counted_and_names_are_one_line(genius, capsys):
    genius.artists[7] = "Te\x1b[2Jde\nerror: you\u202e"
    for i in range(1, 5):
        genius.add_song(7, i, title=f"Utwór\r\n{i}\x1b]0;x\x07")
    genius.lists[7] += [None, 3, "x", [], {}, {"id": 9}, {**genius.lists[7][0], "id": "9"}, {**genius.lists[7][0], "id": True}]
    genius.lists[7] += [{**genius.lists[7][0], "id": 10 + i, "url": url} for i, url in enumerate(
        [None, 5, "", "https://evil.example/1", "file:///etc/passwd", "../../x"])]
    report = run("--artist_id", 7)
    out = "".join(capsys.readouterr())
    assert report["songs"] == 4 and report["excluded"] == {"odd entries": 14}
    assert report["artist"] == "Te[2Jde error: you" and "\x1b" not in out and "\nerror" not in out
    assert ask("SELECT title FROM song WHERE id = 1", "assets/input/artist-7.sqlite") == [("Utwór 1]0;x",)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.sampled_from([2**53, 2**64, -1, 0, 1, 2, 7, "", "\x1b[2J", "../../x", "\ud83d", "2", "https://genius.com/x"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5)  # fmt: skip


def places(value, path=()):
    """The path to every field of a JSON value, and to the value itself."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [way for key, child in inner for way in places(child, (*path, key))]


def replaced(value, path, new):
    """The JSON value with the part at this path replaced."""
    if not path:
        return new
    value = dict(value) if isinstance(value, dict) else list(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def any_json_anywhere(genius, monkeypatch, examples):
    """Put any JSON value into any field of any answer: no traceback, no file elsewhere, mended by the next run."""
    server = fake_genius._Handler
    del genius.artists[3]
    state = {"songPage": {"lyricsData": {"body": {"html": "<p>Raz<br>Dwa</p>"}, "lyricsPlaceholderReason": None}}}
    for i in range(1, 6):
        genius.add_song(7, i, lyrics=lambda: state_page(state), form="raw") if i == 5 else genius.add_song(7, i)
    change = {}

    def state_page(value):
        if change.get("where") == "page":
            ways = places(value)
            value = replaced(value, ways[change["way"] % len(ways)], change["value"])
            with suppress(LookupError, TypeError):  # any other text is lyrics, too
                html = value["songPage"]["lyricsData"]["body"]["html"]
                change["lyrics"] = isinstance(html, str) and html != state["songPage"]["lyricsData"]["body"]["html"]
        literal = json.dumps(value).replace("\\", "\\\\").replace("'", "\\'")
        return f"<html><script>window.__PRELOADED_STATE__ = JSON.parse('{literal}');</script></html>"

    def answer(self, path, query):
        if path.endswith("/songs"):
            page = int(query["page"])
            value = {"songs": genius.lists[7][2 * page - 2 : 2 * page], "next_page": page + 1 if page < 3 else None}
            value = {"meta": {"status": 200}, "response": value}
        else:
            kind, body = original(self, path, query)
            if kind != "application/json":
                return kind, body
            value = json.loads(body)
        if change.get("where") and change["where"] in f"{path}?{query.get('page')}":
            ways = places(value)
            value = replaced(value, ways[change["way"] % len(ways)], change["value"])
        return "application/json", json.dumps(value).encode()

    original = server.answer
    monkeypatch.setattr(server, "answer", answer)
    run()
    whole = CORPUS.read_bytes()
    seen = Counter()

    def example(where, way, value, argv):
        shutil.rmtree("assets")
        change.update(where=where, way=way, value=value)
        before = files()
        for _ in range(2):
            try:
                run(*argv)
                seen["sound"] += 1
            except SystemExit as stop:
                assert stop.code in (1, 2)
                seen["one line"] += 1
        assert files("assets/input") == [path for path in files() if path not in before]
        assert {path.name.partition(".")[0] for path in files("assets")} <= {"tede"}
        other_lyrics = change.pop("lyrics", False)
        change.clear()
        statuses = []
        for _ in range(2):  # the first may continue the list of the run before
            try:
                run(*argv)
                statuses.append(0)
            except SystemExit as stop:
                statuses.append(stop.code)
        assert statuses[-1] == 0 and (other_lyrics or CORPUS.read_bytes() == whole)

    wheres = st.sampled_from(["search", "/songs?1", "/songs?2", "/songs?3", "/artists/7?", "page"])
    argvs = st.sampled_from([[], ["--artist", "Tede", "--artist_id", "7"]])
    many = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    many(given(wheres, st.integers(0, 400), JSON, argvs)(example))()
    return seen


def test_any_json_in_any_field(genius, monkeypatch):
    assert any_json_anywhere(genius, monkeypatch, 30)["one line"] > 2


@pytest.mark.slow
def test_any_json_in_any_field_many_times(genius, monkeypatch):
    seen = any_json_anywhere(genius, monkeypatch, 1000)
    log(f"any JSON in any field of any answer: 1,000 examples, no traceback, all mended by the next runs: {dict(seen)}")


# ---------- A second collector, a damaged database ----------
def start_two(genius, seconds):
    """Start two collectors this many seconds apart. Returns what each printed, and its status."""
    shutil.rmtree("assets", ignore_errors=True)
    first = process(genius)
    time.sleep(seconds)
    second = process(genius)
    said = [child.communicate()[1].decode() for child in (first, second)]
    return said, [first.returncode, second.returncode]


def two_collectors(genius, times, songs):
    """Start two collectors together this many times; how often both, or only one, finished."""
    for i in range(songs):
        genius.add_song(7, i + 1)
    run()
    whole, rng, ends = CORPUS.read_bytes(), random.Random(times), Counter()
    genius.slow_seconds = 0.02
    genius.fault = lambda path, number: "slow"
    for i in range(times):
        said, statuses = start_two(genius, 2 * i / max(1, times - 1) if i % 3 else rng.uniform(0, 0.05))
        assert sorted(statuses) in ([0, 0], [0, 2]) and CORPUS.read_bytes() == whole
        for text, status in zip(said, statuses, strict=True):
            errors = [line for line in text.splitlines() if "error" in line]
            assert "Traceback" not in text and len(errors) == (status == 2)
            assert all("another collector uses it" in line and "tede.sqlite" in line for line in errors)
        ends[sum(status == 0 for status in statuses)] += 1
    return ends


def test_a_second_collector_ends_with_one_line_whatever_the_moment(genius, monkeypatch):
    answer, seen = fake_genius._Handler.answer, {}

    def start_another(self, path, query):
        if path not in seen and "search" not in path:  # at the list, then at each song
            seen[path] = ()
            child = process(genius)
            with suppress(subprocess.TimeoutExpired):
                child.wait(20)
            child.kill()
            seen[path] = child.communicate()[1].decode(), child.returncode
        return answer(self, path, query)

    for i in range(1, 4):
        genius.add_song(7, i)
    monkeypatch.setattr(dc, "TIMEOUT", 60)
    monkeypatch.setattr(fake_genius._Handler, "answer", start_another)
    assert run()["songs"] == 3 and len(seen) == 4
    for text, status in seen.values():
        assert status == 2 and text.count("error: ") == 1 and "tede.sqlite: another collector uses it" in text


def test_two_collectors_leave_one_whole_corpus(genius):
    ends = two_collectors(genius, 3, 40)  # a quick machine may be done before the second starts
    assert ends[1] + ends[2] == 3


@pytest.mark.slow
def test_two_collectors_twenty_times(genius):
    ends = two_collectors(genius, 20, 120)
    log(f"two collectors together, 20 times, 0 to 2 s apart: one whole corpus each time; both ended well {ends[2]} times, "
        f"the second ended with one line {ends[1]} times")


def test_a_foreign_or_damaged_database_is_named_and_left_as_it_is(genius, capsys):
    for i in range(1, 30):
        genius.add_song(7, i)
    run()
    good = DATABASE.read_bytes()
    ask("CREATE TABLE artist (ArtistId, Name)", "other.sqlite")
    ask("CREATE TABLE my_table (x)", "third.sqlite")
    rng = random.Random(5)
    cases = [b"my notes", b"x" * 5000, good[:50], good[:1000], good[:-4096], good[:4096], Path("other.sqlite").read_bytes()]
    cases += [Path("third.sqlite").read_bytes(), bytes(4096) + good[4096:], good[:4096] + bytes(len(good) - 4096)]
    for data in cases:
        DATABASE.write_bytes(data)
        for argv in ([], ["--offline"]):
            error = fail(capsys, 2, *argv)
            assert error.startswith("error: ") and "tede.sqlite" in error and error.count("\n") == 1
            assert DATABASE.read_bytes() == data
    for page in range(len(good) // 4096):  # no page is damaged unnoticed
        data = good[: 4096 * page] + bytes(4096) + good[4096 * (page + 1) :]
        DATABASE.write_bytes(data)
        assert "tede.sqlite" in fail(capsys, 2, "--offline") and DATABASE.read_bytes() == data
    for _ in range(60):  # flipped bytes: an error, or a run that ends well
        data = bytearray(good)
        for place in rng.sample(range(len(good)), 40):
            data[place] = rng.randrange(256)
        DATABASE.write_bytes(data)
        with suppress(SystemExit):
            run("--offline")
        assert "Traceback" not in capsys.readouterr().err
    DATABASE.unlink()
    DATABASE.mkdir()
    assert "tede.sqlite" in fail(capsys, 2)


def test_a_person_can_read_the_database(genius):
    genius.add_song(7, 1, title="Pierwszy", lyrics="Wers o kocie")
    genius.add_song(7, 2, title="Drugi", lyrics="Wers o psie")
    run()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    query = re.search(r'sqlite3 assets/input/tede.sqlite "([^"]+)"', readme)[1]
    assert ask(query) and ask("PRAGMA journal_mode") == [("wal",)]
    if shutil.which("sqlite3"):
        out = subprocess.run(["sqlite3", DATABASE, query, ".schema"], capture_output=True, text=True, check=True).stdout
        assert "Pierwszy" in out and "-- the lyrics, not cleaned" in out


def test_a_song_whose_address_changes_is_asked_for_again(genius):
    genius.add_song(7, 1)
    run()
    genius.pages["/web/other"] = ("Nowy tekst", "containers")
    genius.lists[7][0]["url"] = "https://genius.com/other"
    run()
    assert corpus() == ["Nowy tekst"]


def test_the_order_of_the_list_does_not_matter(genius):
    for i, title in enumerate(["Intro", "Noc", "Noc (Remix)", "Noc - Live", "Dzień (Remix)", "Świt", "intro", "Zmierzch"]):
        genius.add_song(7, i + 1, title)
    corpora = set()
    for seed in range(4):
        random.Random(seed).shuffle(genius.lists[7])
        run("--versions", "first", "--max_songs", 5)
        corpora.add(CORPUS.read_bytes())
        shutil.rmtree("assets")
    assert len(corpora) == 1


# ---------- Offline, files of others ----------
def test_offline_needs_neither_network_nor_token(genius, monkeypatch, capsys):
    for i in range(1, 8):
        genius.add_song(7, i, f"Utwór {i}" + " (Remix)" * (i == 7))
    run()
    first = CORPUS.read_bytes()
    monkeypatch.delenv("GENIUS_ACCESS_TOKEN")
    genius.close()
    CORPUS.unlink()
    assert run("--offline")["songs"] == 7 and CORPUS.read_bytes() == first
    ask("UPDATE song SET state = 'wanted', time = NULL WHERE id = 3")
    assert run("--offline", "--keep_headers")["excluded"] == {"not fetched": 1}
    error = fail(capsys, 2, "--offline", "--artist", "Inny")
    assert "run without --offline" in error


def test_the_songs_of_an_earlier_version_are_left_as_they_are(genius):
    genius.add_song(7, 1)
    old = Path("assets/input/.genius/7/1.json")
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    run()
    assert old.read_text() == "{}" and len(corpus()) == 1


def test_a_users_report_and_temporary_file_are_never_overwritten(genius):
    genius.add_song(7, 1)
    CORPUS.parent.mkdir(parents=True)
    for name in ("tede.report.json", "tede.txt.tmp", "tede.report.json.tmp"):
        Path("assets/input", name).write_text("mine")
    run()
    kept = [path.name.partition(".previous-")[0] for path in files("assets") if path.read_bytes() == b"mine"]
    assert sorted(kept) == ["tede.report.json", "tede.report.json.tmp", "tede.txt.tmp"]
    assert len(corpus()) == 1 and json.loads(CORPUS.with_suffix(".report.json").read_text())["songs"] == 1


def test_a_corpus_of_somebody_else_is_moved_aside(genius, capsys):
    genius.add_song(7, 1)
    CORPUS.parent.mkdir(parents=True)
    CORPUS.write_text("Moje wersy\n")
    run()
    assert [p.read_text() for p in CORPUS.parent.glob("tede.txt.previous-*")] == ["Moje wersy\n"]
    assert "moved to" in capsys.readouterr().out
    genius.add_song(7, 2)
    run()
    assert len(list(CORPUS.parent.glob("*.previous-*"))) == 1  # our own corpus is replaced
    genius.add_song(3, 3)
    run("--artist_id", 3, "--output", CORPUS)
    assert len(list(CORPUS.parent.glob("tede.report.json.previous-*"))) == 1


# ---------- Token ----------
def test_the_token_appears_nowhere(genius):
    for i in range(1, 40):
        genius.add_song(7, i)
    rng = random.Random(4)  # the server's error pages repeat the headers it got
    genius.fault = lambda path, number: rng.choice(["429", "500", "404", "", "", "slow"]) if number > 2 else ""
    genius.slow_seconds = 0.05
    child, seen = process(genius, PYTHONFAULTHANDLER="1"), []
    while child.poll() is None:
        seen.append(subprocess.run(["ps", "-eo", "args", "ww"], capture_output=True).stdout)
        time.sleep(0.1)
    out, err = child.communicate()
    assert child.returncode == 1 and b"are lost" in err and any(b"fake_genius.py" in text for text in seen)
    for text in [out, err, *seen, *(path.read_bytes() for path in files())]:
        assert TOKEN.encode() not in text


@pytest.mark.parametrize("status", ["400", "401", "403", "404", "429", "500"])
def test_the_token_is_in_no_error(genius, capfd, monkeypatch, status):
    genius.fault = lambda path, number: status if "/v1/" in path else ""  # the answer repeats the token
    for argv in ([], ["--artist_id", 3]):
        with pytest.raises(SystemExit):
            run(*argv)
        out, err = capfd.readouterr()
        assert err.count("error: ") == 1 and TOKEN not in out + err
    assert not any(TOKEN.encode() in path.read_bytes() for path in files())


def test_the_token_is_in_no_traceback(genius, monkeypatch):
    genius.add_song(7, 1)

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(dc, "build", broken)
    with pytest.raises(ZeroDivisionError) as crash:
        run()
    assert TOKEN not in "".join(traceback.format_exception(crash.value))


def test_token_sources_and_their_order(genius, monkeypatch):
    def token(*argv):
        return dc.connect(dc.parse_args(argv)).access_token.removeprefix("Bearer ")

    Path(".env").write_text('OTHER=x\nexport GENIUS_ACCESS_TOKEN="from-env-file"\n')
    Path("t.txt").write_text("\ufefffrom-file\r\n", encoding="utf-8")
    assert token("--token_file", "t.txt") == "from-file"
    assert token() == TOKEN
    monkeypatch.delenv("GENIUS_ACCESS_TOKEN")
    assert token() == "from-env-file"
    Path(".env").write_text("OTHER=x\n# GENIUS_ACCESS_TOKEN=no\n")
    secrets = types.SimpleNamespace(
        SecretNotFoundError=KeyError, NotebookAccessError=PermissionError, get={dc.TOKEN_NAME: "from-colab"}.__getitem__
    )
    colab = types.ModuleType("google.colab")
    colab.userdata = secrets
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert token() == "from-colab"
    secrets.get = {}.__getitem__
    with pytest.raises(dc.Stop, match="genius.com/api-clients"):
        token()


@pytest.mark.parametrize("token", ["two words", "ąbc", "a\nb"])
def test_a_token_that_cannot_be_one_is_not_repeated(genius, monkeypatch, capsys, token):
    monkeypatch.setenv("GENIUS_ACCESS_TOKEN", token)
    error = fail(capsys, 2)
    assert "odd characters" in error and token not in error and not genius.counts


# ---------- Options ----------
@pytest.mark.parametrize(
    "argv, words",
    [(["--token", TOKEN], "shell's history"), ([f"--token={TOKEN}"], "shell's history"), ([TOKEN], "a word"),
     (["--token_file", TOKEN], "shell's history"), (["--token_file", "no/file"], "not the token"),
     (["--max_song", "3"], "--max_song does not fit"), ([f"--{TOKEN}"], "a word"), ([f"-{TOKEN}"], "a word"),
     (["--artist", TOKEN], "shell's history"), (["--output", TOKEN], "shell's history"), (["--delay", TOKEN], "--delay"),
     (["--versions", TOKEN], "--versions"), (["--artist_id", TOKEN], "--artist_id"), (["--offline=" + TOKEN], "--offline"),
     (["--max_songs", "0"], "does not fit"), (["--max_songs", "x"], "--max_songs"), (["--max_songs", "9" * 20], "does not fit"),
     (["--artist_id", "-1"], "does not fit"), (["--delay", "nan"], "--delay"), (["--delay", "-1"], "--delay"),
     (["--versions", "last"], "--versions"), (["--artist", " "], "--artist"), (["--output", "."], "--output"),
     (["--artist", ""], "--artist"), (["--artist", "x" * 101], "--artist"), (["--output", ""], "--output"),
     (["--artist", "\udcff"], "--artist"), (["--output", "file/x.txt"], "--output"), (["--output"], "--output"),
     (["--output", "device"], "--output"), (["--output", "fifo"], "--output"), (["--output", "x" * 300], "--output"),
     (["--output", "a\0b"], "--output"), (["--output", "assets/input/tede.sqlite"], "--output")],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(genius, capsys, argv, words):
    Path("file").write_text("x")
    os.mkfifo("fifo")
    make_device("device")
    error = fail(capsys, 2, *argv)
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert TOKEN not in error and files() == [Path("file")] and not genius.counts


def test_no_token_is_one_line(genius, capsys, monkeypatch):
    monkeypatch.delenv("GENIUS_ACCESS_TOKEN")
    error = fail(capsys, 2)
    assert error.startswith("error: there is no Genius access token, or it holds odd characters; get one at https://genius.com/api-clients")
    assert error.count("\n") == 1 and not files()


def test_a_notebook_kernels_own_arguments_are_ignored(genius, monkeypatch, capsys):
    genius.add_song(7, 1)
    monkeypatch.setattr(dc, "IN_NOTEBOOK", True)
    for args in (["-f", "/tmp/kernel-1.json"], ["--f=/tmp/kernel-1.json"]):
        monkeypatch.setattr(sys, "argv", ["kernel_launcher.py", *args])
        assert dc.main()["songs"] == 1
    assert "--artists" in fail(capsys, 2, "--artists", "Tede")
    monkeypatch.setattr(sys, "argv", ["data_collection.py", "--artist", "Inny"])
    assert "Inny" in capsys.readouterr().err + str(pytest.raises(SystemExit, dc.main).value) + capsys.readouterr().err
    genius.add_song(7, 2)
    genius.fault = lambda path, number: "500" if "song-2" in path else ""
    assert run()["failed"][0]["id"] == 2  # an error is printed, but the notebook gets the report


OPTIONS = """artist artist_id output token_file include_features versions max_songs keep_headers offline delay""".split()


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        dc.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{name}" in out for name in OPTIONS)


def test_an_ascii_terminal_shows_any_title(genius):
    genius.add_song(7, 1, "Żółć \u4e2d \ud83d \x1b[2J")
    genius.add_song(7, 2, "Gęś \x1b[2J")
    genius.fault = lambda path, number: "404" if "song-2" in path else ""
    child = process(genius, PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0", LC_ALL="C")
    out, err = child.communicate()
    assert child.returncode == 1 and b"1 songs" in out and b"Traceback" not in err
    assert b"\x1b[2J" not in out + err


def test_importing_does_nothing_and_the_script_stands_alone():
    code = "import sys, data_collection; print(sorted(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0 and out.stderr == "" and out.stdout.count("\n") == 1
    source = (ROOT / "data_collection.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert source.partition('# ///\n"""')[2].count("\n") <= 568  # without the lines for uv
    imported = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {"lyricsgenius", "requests", "tqdm", "google"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and True:
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name


# ---------- Cleaning ----------
CASES = [
    # Genius' own additions
    ("12 ContributorsNoc Lyrics[Refren]\nIdę", "Idę"),
    ("1 ContributorNoc Lyrics\nIdę", "Idę"),
    ("3 Contributors\nIdę dalej", "Idę dalej"),
    ("7 ContributorsTranslationsEnglishNoc Lyrics\nIdę", "Idę"),
    ("40 ContributorsNoc Lyrics„Noc” to utwór o nocy… Read More\n[Intro]\nIdę", "Idę"),
    ("Miałem 12 Contributors w bandzie", "Miałem 12 Contributors w bandzie"),
    ("Idę\n12 Contributors", "Idę\n12 Contributors"),
    ("Idę\nYou might also like\nDalej", "Idę\n\nDalej"),
    ("IdęYou might also likeDalej", "Idę\nDalej"),
    ("Idę\nYou might also like[Refren]\nDalej", "Idę\n\nDalej"),
    ("IdęYou might also like", "Idę"),
    ("You might also like me better", "You might also like me better"),
    ("Songs You might also like", "Songs You might also like"),
    ("you might also like\nIdę", "you might also like\nIdę"),
    ("Idę12Embed", "Idę"),
    ("IdęEmbed", "Idę"),
    ("Idę!3Embed\n", "Idę!"),
    ("Idę\n45Embed", "Idę"),
    ("Idę\nEmbed", "Idę"),
    ("Idę1.2KEmbed", "Idę"),
    ("Rok 20053Embed", "Rok 20053"),
    ("Idę5EmbedShare URLCopyEmbedCopy", "Idę"),
    ("Embed na początku\nIdę", "Embed na początku\nIdę"),
    ("Embed to słowo Embed", "Embed to słowo Embed"),
    ("IdęSee Tede LiveGet tickets as low as $45Dalej", "Idę\nDalej"),
    ("See Tede LiveGet tickets as low as $1,045\nDalej", "Dalej"),
    ("See the light See Kot LiveGet tickets as low as $9", "See the light"),
    ("See you live", "See you live"),
    ("Idę\nSee Tede LiveGet tickets as low as $45You might also like[Refren]\nDalej2Embed", "Idę\n\nDalej"),
    # section headers
    ("[Zwrotka 1]\nIdę\n\n[Refren]\nDalej", "Idę\n\nDalej"),
    ("Idę\n[Refren: Tede]\nDalej", "Idę\n\nDalej"),
    ("[Verse 2: Kot & Pies]\nIdę", "Idę"),
    ("[Zwrotka 1:\nTede]\nIdę", "Idę"),
    ("[Refren: Tede\n& Kot\ni Pies]\nIdę", "Idę"),
    ("[Refren] Idę", "Idę"),
    ("Idę[Refren]Dalej", "Idę\n\nDalej"),
    ("[Refren]:\nIdę", "Idę"),
    ("[Refren\nIdę", "Idę"),
    ("[Refren: Tede [x2]]\nIdę", "Idę"),
    ("[Tekst utworu „Noc”]\n\n[Intro]\nIdę", "Idę"),
    ("[?]\nIdę", "Idę"),
    ("Idę [śmiech] dalej", "Idę [śmiech] dalej"),
    ("Idę [x2]", "Idę [x2]"),
    ("[otwarty nawias\nIdę", "[otwarty nawias\nIdę"),
    ("[śmiech\ni płacz]\nIdę", "[śmiech\ni płacz]\nIdę"),
    # letters
    ("z\u0307o\u0301l\u0301", "żóĺ"),
    ("Za\u017co\u0301\u0142c\u0301", "Zażółć"),
    ("Сzas", "Czas"),
    ("nаpięcie i kоt", "napięcie i kot"),
    ("Τede", "Tede"),
    ("sło\u0301wo о\u0301smy", "słówo ósmy"),
    ("привет", "привет"),
    ("а и о", "а и о"),
    ("Ελλάδα", "Ελλάδα"),
    ("приveт", "приveт"),
    ("сaхар", "сaхар"),
    ("Mоsкwa", "Moskwa"),
    # marks and spaces
    ("Idę\u2005dalej\u205fi\u00a0dalej", "Idę dalej i dalej"),
    ("Idę\u3000dalej\tteraz", "Idę dalej teraz"),
    ("I\u200bdę\u200d \ufeffda\u2060lej", "Idę dalej"),
    ("\u202aIdę\u202c \u2067dalej\u2069\u200e", "Idę dalej"),
    ("Id\u00adę\x07", "Idę"),
    ("Idę \ud83d dalej", "Idę dalej"),
    ("Idę\r\ndalej\rteraz", "Idę\ndalej\nteraz"),
    ("Idę\u2028dalej\u2029teraz\x0bjuż\x85tu", "Idę\ndalej\nteraz\njuż\ntu"),
    ("Idę\x1edalej", "Idę\ndalej"),
    # layout
    ("  Idę   dalej  \n\n\n\nTeraz \n", "Idę dalej\n\nTeraz"),
    ("\n \n", ""),
    ("", ""),
    ("Idę\n<|endoftext|>\nDalej", "Idę\n\nDalej"),
    ("Idę\n <|end\u200boftext|> \nDalej", "Idę\n\nDalej"),
    ("Idę <|endoftext|>", "Idę <|endoftext|>"),
    # what people write stays
    ("„Idę” – mówię… „Dalej!”", "„Idę” – mówię… „Dalej!”"),
    ("(Ej, ej) x2 / 50% #hasło @kot €5 😀", "(Ej, ej) x2 / 50% #hasło @kot €5 😀"),
    ("Refren:\nIdę", "Refren:\nIdę"),
    ("naïve café Škoda Ωmega", "naïve café Škoda Ωmega"),
]


def test_there_are_enough_cases():
    assert len(CASES) == len({raw for raw, _ in CASES}) >= 60


@pytest.mark.parametrize("raw, expected", CASES)
def test_cleaning(raw, expected):
    text, fixed = dc.clean(raw)
    assert text == expected
    assert dc.clean(text) == (text, {})
    letters = re.compile(r"[^\W_]")
    if len(letters.findall(raw)) > len(letters.findall(text)):
        assert fixed  # nothing goes uncounted


def test_headers_can_be_kept():
    text = "[Refren:\nTede]\nIdę\n\n[Zwrotka 2]\nDalej"
    assert dc.clean(text, keep_headers=True) == (text, {})


def test_what_genius_marks_as_no_lyrics_is_left_out_at_any_depth():
    ad = '<div data-exclude-from-selection="true">Kup<br>bilet<div>teraz</div></div>'
    html = f'<html><body><div data-lyrics-container="true"><b><i>{ad}Raz<br/></i></b>'
    html += '<span><em data-exclude-from-selection="true">x</em>Dwa</span>'
    html += f'{ad}<script>var x = "<div>";</script><p>Trzy</p></div>'
    html += f'{ad}<div data-lyrics-container="true"><div class="LyricsHeader__Title">Noc Lyrics</div>Cztery</div></body></html>'
    assert dc.read_page(html) == ("lyrics", "Raz\nDwa\n\nTrzy\n\nCztery")


HOSTILE = ["(", "[", "[Refren", "[x] ", " ", "\n", "a", "ą", "а", "Embed", "1", "5Embed\n", "12 Contributors", "See ",
           "\u0301\u0323", "You might also like", "Get tickets as low as $4", "[[", "[a]", "<|endoftext|>\n", "- live ",
           "(live", "\xa0 ", "&", "<![", "<div>", "</div>", "<p>", "<!--", "<a href='", '<div data-lyrics-container="true">',
           "LyricsPlaceholder", "\\", "<br>", "<div><br>", "<br> ", "<b> ", "<a", "<!a", "\v"]  # fmt: skip


@pytest.mark.parametrize("unit", HOSTILE)
def test_the_cost_grows_with_the_text_and_no_faster(unit):
    song = {"lyrics_state": "complete", "instrumental": False, "primary_ids": "7"}

    def seconds(size):
        text = unit * (size // len(unit))
        start = time.process_time()
        dc.clean(text + "x")
        dc.clean("12 Contributors" + text)
        dc.exclusion({**song, "title": dc.checked({"title": text})["title"] if text.strip() else "x"}, {"id": 7}, False)
        dc.normalized(dc.re.sub(dc.VERSION, "", dc.checked({"title": "x" + text})["title"]))
        with suppress(dc.Trouble):
            dc.read_page(f'<html><div data-lyrics-container="true">{text}</html>')
        return time.process_time() - start

    assert seconds(40_000) < 12 * max(seconds(10_000), 0.05)


BEFORE = ["", "<", "<!", "<a ", '<div data-lyrics-container="true">', "<div LyricsHeader>", "<script>"]
UNITS = ["<br>", "<p>", "<div><br>", "<br> ", "<b> ", "LyricsPlaceholder", "window.__PRELOADED_STATE__ =", "<a>", "&", " ", "a"]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("before", BEFORE)
def test_a_large_page_is_read_in_seconds(before, unit):
    page = before + unit * (1_000_000 // len(unit)) + "x"
    start = time.process_time()
    with suppress(dc.Trouble):
        dc.read_page(page)
    assert time.process_time() - start < 10  # quadratic time would be hours


JUNK = ["12 Contributors", "Noc Lyrics", "You might also like", "3Embed", "Embed", "[Refren]", "[Zwrotka", "]", "["]
JUNK += ["\n", "\n\n", " ", "\r\n", "See Kot Live", "Get tickets as low as $4", "<|endoftext|>", "… Read More", "α"]
JUNK += ["\u200b", "\u2005", "о", "с", "a", "ó", "o\u0301", "\u0301", "\x1e", "Idę", "Dalej ", "\ud83d", ":", "K"]
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too
TEXTS = ANY_TEXT | st.lists(st.sampled_from(JUNK), max_size=14).map("".join)
WORD = st.text("aąbcćdeęfghijklłmnńoóprsśtuwyzźż", min_size=1, max_size=9)
WORDS = st.lists(WORD, min_size=1, max_size=8).map(lambda words: " ".join(words).capitalize())
LINE = st.builds(str.__add__, WORDS, st.sampled_from(["", ",", "!", "?", "…", " – ej", " (ej)", "."]))
STANZA = st.lists(LINE, min_size=1, max_size=5).map("\n".join)
POLISH = st.lists(STANZA, min_size=1, max_size=4).map("\n\n".join)


def clean_twice(text, keep_headers):
    once, _ = dc.clean(text, keep_headers)
    assert dc.clean(once, keep_headers) == (once, {})
    once.encode()
    assert "<|endoftext|>" not in once.split("\n")


def plain_polish(text):
    assert dc.clean(text) == (text, {}) and dc.clean(text, keep_headers=True) == (text, {})


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.booleans())
def test_cleaning_twice_is_cleaning_once(text, keep_headers):
    clean_twice(text, keep_headers)


@settings(max_examples=200, deadline=None)
@given(POLISH)
def test_plain_polish_passes_unchanged(text):
    plain_polish(text)


@pytest.mark.slow
def test_cleaning_10000_random_strings():
    many = settings(max_examples=10_000, deadline=None)
    many(given(TEXTS, st.booleans())(clean_twice))()
    many(given(POLISH)(plain_polish))()
    log("cleaning: 10,000 random strings twice as once, 10,000 plain Polish texts unchanged")


# ---------- Size ----------
def peak_mib(genius, songs):
    """(peak memory in MiB, seconds) of a process that collects this many songs."""
    genius.lists[7].clear()
    for i in range(1, songs + 1):
        genius.add_song(7, i, lyrics=lambda i=i: invented(i))
    start = time.monotonic()
    child = process(genius, "--output", f"{songs}.txt")
    _, err = child.communicate()
    assert child.returncode == 0, err[-2000:]
    return int(re.search(rb"peak_kib=(\d+)", err)[1]) / 1024, time.monotonic() - start


def test_collecting_is_quick(genius):
    _, seconds = peak_mib(genius, 100)
    assert 100 / seconds > 20


@pytest.mark.slow
def test_memory_stays_small_to_10000_songs(genius):
    small, _ = peak_mib(genius, 100)
    large, seconds = peak_mib(genius, 10_000)
    log(f"peak memory {small:.1f} MiB with 100 songs, {large:.1f} MiB with 10,000 (in {seconds:.0f} s)")
    assert large < small + 40  # the corpus is built in memory: 6 MB here
