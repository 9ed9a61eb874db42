"""Tests of stage 2: pytest tests/test_gpt_tiktoken.py   (its large counts: pytest tests/test_gpt_tiktoken.py -m slow -s).

What both stages share is tested in test_gpt.py, and kept equal by test_twins.py: here is only what stage 2 adds.
"""

import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import processes
import pytest
import test_gpt
import tiktoken
import tokenizer_files
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gpt import SONG, TEXT, address, argv, checkpoint, history, numeric, refused, same, sample, tree, weights
from tokenizer_files import END_TEXT, babble, bytes_and
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import gpt
import gpt_tiktoken
from gpt_tiktoken import END, SEPARATOR, BPETokenizer

ROOT = Path(gpt_tiktoken.__file__).parent
SAMPLE_CORPUS = ROOT / "assets" / "input" / "input2.txt"
TINY = test_gpt.TINY | dict(n_layer=1, batch_size=2, tokenizer="custom", vocab_size=290)
RUN = test_gpt.RUN | {"tokenizer.json"}
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ helpers
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder with tiktoken's cache, a Polish-like tokenizer as a file and as a folder, and a corpus."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer_files.fill_cache(folder / "cache")
    tokenizer_files.save_polish(folder / "polish.json", folder / "polish")
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, shared):
    """Each test works in an empty folder with songs.txt; the network does not answer, tiktoken's files are in its cache."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("songs.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def no_cache(monkeypatch):
    """A machine that has never loaded an encoding, and cannot."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", os.path.abspath("empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


@pytest.fixture(scope="session")
def corpus():
    return gpt_tiktoken.read_corpus(str(SAMPLE_CORPUS))


def made(text, **options):
    """The tokenizer that a run with these options would have."""
    return gpt_tiktoken.make_tokenizer(options, text, None)


@pytest.fixture(scope="session")
def tokenizers(shared, corpus):
    """Every kind of tokenizer, without and with pruning, as it comes out for the sample corpus."""
    kinds = {"tiktoken": dict(tokenizer="tiktoken"), "custom 2000": dict(tokenizer="custom"),
             "custom 300": dict(tokenizer="custom", vocab_size=300), "bytes": dict(tokenizer="custom", vocab_size=257),
             "polish file": dict(tokenizer="polish", tokenizer_path=str(shared / "polish.json")),
             "polish folder": dict(tokenizer="polish", tokenizer_path=str(shared / "polish"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "cache"))
        patch.setattr(gpt_tiktoken, "tiktoken_tokenizer", functools.cache(gpt_tiktoken.tiktoken_tokenizer))
        return {f"{name}{', pruned' * prune}": made(corpus, **options, prune_vocab=prune)
                for name, options in kinds.items() for prune in (False, True)}


def tiny(**options):
    """The command line of a small run."""
    words = TINY | dict(input="songs.txt", run_dir="run") | options
    if words["tokenizer"] != "custom" and "vocab_size" not in options:
        del words["vocab_size"]
    return argv(**words)


def train(**options):
    return gpt_tiktoken.main(tiny(**options))


def no(capsys, way, status=2):
    """The one line with which this is refused, before anything is written."""
    before = tree()
    error = refused(gpt_tiktoken, capsys, way, status)
    assert tree() == before
    return error


def decoded(tokenizer, ids):
    return "".join(tokenizer.stream(ids.tolist()))


def forbid(monkeypatch, *names):
    """Make every call of these functions of the script fail."""
    for name in names:
        def called(*args, name=name, **options):
            raise AssertionError(f"{name} was called")
        monkeypatch.setattr(gpt_tiktoken, name, called)


def files(folder):
    return {path.name for path in Path(folder).iterdir() if "previous" not in path.name}


any_text = st.text(st.characters(exclude_categories=["Cs"]))
any_word = any_text | st.sampled_from(["", END, "Noc nad miastem", END_TEXT, " ", "\t", "ż", "🦊", "12345", "'s"])
any_lines = st.builds(str.join, st.sampled_from(["", "\n", " ", END]), st.lists(any_word, max_size=12))


# ----------------------------------------------------------------------------------------- text and numbers
TEXTS = {
    "nothing": "", "line breaks": "\n\n a\n\n\n b \n", "spaces": "  a   b\t\tc  \n  ", "Polish": "Zażółć gęślą jaźń.\nŁÓDŹ!\n",
    "odd spaces": "a\u00a0b\u2005c\u205fd\u3000e\u2028f\u2029g\x85h", "Windows": "a\r\nb\rc\n",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🦊🦊 👍🏽 🇵🇱", "control characters": "".join(map(chr, [*range(1, 32), *range(127, 160)])),
    "bidi": "abc \u202eשלום\u202c مرحبا \u200f\u200e\u2067x\u2069", "zero width": "a\u200bb\u200cc\u200dd\ufeffe\u00ad",
    "combining marks": "z\u0307o\u0301łc\u0301 \u0301a a" + "\u0302" * 40, "composed and not": "ó o\u0301 Å A\u030a Å",
    "beyond the first plane": "𝔅𝔩𝔬𝔨 𐍈 𠜎 \U0010ffff \uffff \ufffd", "Cyrillic among Latin": "Wаrszаwа",
    "numbers": "12345 6,78 ٣٤ ²½", "the words of the end": f"to nie {END_TEXT} koniec\n {END_TEXT}\n{END_TEXT} \n",
    "other special words": "<s> <pad> </s> <mask>", "symbols of the bytes": "Ġ Ċ Ä ł Ń Ģ ĠĠa",
    "English": "I'll don't we've it's THEY'RE", "two songs": f"a b\n{END}c\n", "ends": END * 3, "long": "słowo" * 999,
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_comes_back(tokenizers, name):
    text = TEXTS[name]
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert decoded(tokenizer, ids) == text, kind
        assert tokenizer.count_chars(ids).sum() == len(text), kind
        assert ids.tolist().count(tokenizer.end) == text.count(END), kind


def comes_back(tokenizers, text):
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert decoded(tokenizer, ids) == text and tokenizer.count_chars(ids).sum() == len(text), kind


@settings(max_examples=300, deadline=None)
@given(any_text | any_lines)
def test_random_text_comes_back(tokenizers, text):
    comes_back(tokenizers, text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(any_text | any_lines)
def test_10_000_random_texts_come_back(tokenizers, text):
    comes_back(tokenizers, text)


def test_the_corpus_comes_back_from_every_tokenizer(tokenizers, corpus):
    songs = corpus.count(END)
    lengths = {}
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(corpus)
        assert decoded(tokenizer, ids) == corpus and tokenizer.count_chars(ids).sum() == len(corpus), kind
        assert ids.tolist().count(tokenizer.end) == songs, kind
        lengths[kind] = len(ids)
    assert lengths["custom 2000"] < lengths["polish file"] < lengths["bytes"] and lengths["custom 300"] < lengths["bytes"]
    assert lengths["polish file"] == lengths["polish folder"]


def test_the_end_of_a_song_is_one_token_and_its_words_in_a_line_are_not(tokenizers):
    Path("songs.txt").write_text(f"raz {END_TEXT}{SEPARATOR}dwa\n{END_TEXT} \n {END_TEXT} x\n", encoding="utf-8")
    text = gpt_tiktoken.read_corpus("songs.txt")
    assert text == f"raz {END_TEXT}{END}dwa{END} {END_TEXT} x\n"
    for tokenizer in tokenizers.values():
        ids, apart = tokenizer.encode(text).tolist(), [tokenizer.encode(song).tolist() for song in text.split(END)]
        assert ids == [*apart[0], tokenizer.end, *apart[1], tokenizer.end, *apart[2]]
        assert tokenizer.end not in itertools.chain(*apart)


def test_lines_encoded_side_by_side_are_what_they_are_together(tokenizers, corpus):
    for kind, tokenizer in tokenizers.items():
        whole = []
        for song in corpus[:20_000].split(END):
            whole += [tokenizer.core.token_to_id(END_TEXT)] * bool(whole) + tokenizer.core.encode(song).ids
        if tokenizer.spell:
            whole = [new for old in whole for new in tokenizer.spell[old]]
        assert tokenizer.encode(corpus[:20_000]).tolist() == whole, kind


def test_numbers_are_kept_in_a_small_type():
    for size, dtype in ((2**16 - 1, torch.uint16), (2**16, torch.int32)):
        source = json.loads(bytes_and())
        source["model"]["vocab"] |= {"x" * 4 + str(i): i for i in range(256, size - 1)}  # the end comes last
        tokenizer = BPETokenizer(json.dumps(source))
        ids = tokenizer.encode("aż\n")
        assert tokenizer.vocab_size == size and ids.dtype == dtype and tokenizer.encode("").dtype == dtype
        assert ids.tolist() == list("aż\n".encode()) and tokenizer.count_chars(ids).sum() == 3


def test_a_tokenizer_is_its_state_again(tokenizers):
    torch.save({kind: tokenizer.state for kind, tokenizer in tokenizers.items() if "tiktoken" not in kind}, "states.pt")
    text = "Zażółć 🦊\n" + END + babble(5)
    for kind, state in torch.load("states.pt", weights_only=True).items():
        again, tokenizer = BPETokenizer(**state), tokenizers[kind]
        assert torch.equal(again.encode(text), tokenizer.encode(text)) and again.pieces == tokenizer.pieces
        assert (again.end, again.start, again.vocab_size) == (tokenizer.end, tokenizer.start, tokenizer.vocab_size)


@pytest.mark.parametrize(("text", "start"), [(f"ab\ncd{END}ef" * 9, END), ("ab\ncd" * 9, "\n"), ("abcd" * 9, "a")])
def test_a_text_without_a_prompt_starts_where_a_song_a_line_or_the_text_does(text, start):
    assert made(text, tokenizer="custom", vocab_size=257).start == start


# ---------------------------------------------------------------------------------------------- a BPE by hand
def librarys_merges(words, count):
    """What the tokenizers library learns from the same words: the tokenizer, its merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    symbols = len(set(itertools.chain(*words)))
    core.train_from_iterator([" ".join(words.elements())], trainers.BpeTrainer(
        vocab_size=symbols + count, show_progress=False))
    return core, [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def counts(words, merges):
    """How often each pair stood in the text when it was joined; each time it was the most frequent."""
    split, joined = {word: list(word) for word in words}, []
    for pair in merges:
        pairs = Counter()
        for word, parts in split.items():
            for together in zip(parts, parts[1:]):
                pairs[together] += words[word]
        joined.append(pairs[pair])
        assert pairs[pair] == max(pairs.values())
        split = {word: by_hand(parts, pair) for word, parts in split.items()}
    return joined


def by_hand(parts, pair):
    """Join a pair wherever it stands, left to right."""
    if len(parts) < 2:
        return parts
    if tuple(parts[:2]) == pair:
        return ["".join(pair), *by_hand(parts[2:], pair)]
    return [parts[0], *by_hand(parts[1:], pair)]


def test_merges_worked_out_by_hand():
    """ta stands in all three words: 3 + 2 + 1 times; then tak is there 3 times, tam twice; ma and a|ta once, ma comes first."""
    words = Counter(["tak"] * 3 + ["tam"] * 2 + ["mata"])
    merges = [("t", "a"), ("ta", "k"), ("ta", "m"), ("m", "a"), ("ma", "ta")]
    assert gpt_tiktoken.learn_merges(words, 9) == merges and counts(words, merges) == [6, 3, 2, 1, 1]
    for count in range(6):
        assert gpt_tiktoken.learn_merges(words, count) == merges[:count]
    assert gpt_tiktoken.learn_merges(Counter(["tak", "tam", "tu"]), 1) == [("t", "a")]  # the docstring's
    cuts = {"tak": ["tak"], "tamtam": ["tam", "tam"], "matka": ["ma", "t", "k", "a"], "x": ["x"], "": []}
    assert {word: gpt_tiktoken.cut_word(word, merges) for word in cuts} == cuts
    assert gpt_tiktoken.cut_word("tamtam", []) == list("tamtam")
    assert gpt_tiktoken.learn_merges(Counter(), 3) == gpt_tiktoken.learn_merges(Counter("ab"), 3) == []


@pytest.mark.parametrize(("word", "pair", "joined"), [
    ("tak", "ta", ["ta", "k"]), ("atata", "ta", ["a", "ta", "ta"]), ("aaa", "aa", ["aa", "a"]), ("aaaa", "aa", ["aa", "aa"]),
    ("aaaaa", "aa", ["aa", "aa", "a"]), ("kot", "ta", ["k", "o", "t"]), ("", "ta", []), ("at", "ta", ["a", "t"])])
def test_a_pair_is_joined_from_left_to_right(word, pair, joined):
    assert gpt_tiktoken.join(list(word), tuple(pair)) == by_hand(list(word), tuple(pair)) == joined


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba"]), max_size=12), st.tuples(*[st.sampled_from(["a", "b", "ab"])] * 2))
def test_any_pair_is_joined_from_left_to_right(parts, pair):
    before = list(parts)
    assert gpt_tiktoken.join(parts, pair) == by_hand(before, pair) and parts == before


def test_the_library_learns_the_same_merges_from_the_corpus(corpus):
    """Where two pairs are as frequent, either may come first: the counts are the same, and so is all up to there."""
    words = Counter(re.findall(r"\w+", corpus[:20_000]))
    ours = gpt_tiktoken.learn_merges(words, 80)
    core, theirs = librarys_merges(words, 80)
    frequencies = counts(words, ours)
    assert frequencies == counts(words, theirs) and len(ours) == 80
    tie = next(i for i, count in enumerate(frequencies) if frequencies.count(count) > 1)
    assert tie > 10 and ours[:tie] == theirs[:tie] and len(set(ours) & set(theirs)) >= 76
    for word in (*words, "Konstantynopolitańczykowianeczka"):
        assert gpt_tiktoken.cut_word(word, theirs) == core.encode(word).tokens or not set(word) <= set("".join(words))


@pytest.mark.parametrize("words", [dict(aaaa=3, aaa=2, baa=1), dict(abab=5, ba=4), dict(żółw=2, żółty=3, łyżwy=1)])
def test_the_library_joins_words_of_few_letters_as_often(words):
    ours = gpt_tiktoken.learn_merges(Counter(words), 50)
    core, theirs = librarys_merges(Counter(words), 50)
    assert counts(words, ours) == counts(words, theirs)
    assert {word: gpt_tiktoken.cut_word(word, ours) for word in words} == {word: [word] for word in words}


SHOWN = {"sub-words": TEXT, "short lines": f"Noc ż\nnad{END}miasto\n" * 20, "one line": "bez końca wiersza 🦊 " * 600,
         "no words": "?! ... -- ?!\n" * 9, "marks": "a | b || c\n" * 9, "one letter": "a"}


@pytest.mark.parametrize("text", SHOWN.values(), ids=SHOWN)
def test_the_pieces_that_are_shown_join_to_a_line(tokenizers, text, capsys):
    for kind, tokenizer in tokenizers.items():
        gpt_tiktoken.show_pieces(tokenizer, text)
        pieces, merges = capsys.readouterr().out.splitlines()
        line = pieces.removeprefix("pieces: ")
        whole = [whole for whole in re.split(f"[\n{END}]", text) if line.replace("|", "") in whole.replace("|", "")]
        assert line and whole and "\ufffd" not in line and len(line.replace("|", "")) <= 80, kind
        if "|" not in text:
            assert line.count("|") == len(tokenizer.encode(line.replace("|", ""))) - 1, kind
        assert merges.startswith("a BPE of this text begins with ")


def test_what_is_shown_worked_out_by_hand(capsys):
    r"""The words: ab 20 times, abc 19, ż 38. ab is joined first, then abc; ż is two bytes, so it stands in the second piece."""
    text = "ab\n" + "ż abc ż ab\n" * 19
    gpt_tiktoken.show_pieces(BPETokenizer(bytes_and(("a", "b"))), text)
    assert capsys.readouterr().out == "pieces: |ż| |ab|c| ||ż| |ab\na BPE of this text begins with a+b, ab+c: abc\n"


def test_pieces_and_merges_are_shown_at_the_start_of_a_run(capsys):
    train(max_iters=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines[:3]] == ["tokenizer:", "pieces:", "a"]
    assert lines[1].replace("|", "")[8:] in TEXT.splitlines()
    gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=2))
    assert "pieces:" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- the gpt2 encoding
def tiktokens_own(encoding, text):
    ids = [[encoding.eot_token, *encoding.encode_ordinary(song)] for song in text.split(END)]
    return list(itertools.chain(*ids))[1:]


def test_gpt2_gives_tiktokens_own_numbers_for_the_corpus(tokenizers, corpus, shared):
    encoding, tokenizer = tiktoken.get_encoding("gpt2"), tokenizers["tiktoken"]
    assert tokenizer.vocab_size == encoding.n_vocab == 50257 and tokenizer.end == encoding.eot_token
    assert tokenizer.encode(corpus).tolist() == tiktokens_own(encoding, corpus)
    assert all(tokenizer.pieces[i] == encoding.decode_single_token_bytes(i) for i in range(50256))
    for text in TEXTS.values():
        assert tokenizer.encode(text).tolist() == tiktokens_own(encoding, text)


@settings(max_examples=300, deadline=None)
@given(any_text | any_lines)
def test_gpt2_gives_tiktokens_own_numbers(tokenizers, text):
    assert tokenizers["tiktoken"].encode(text).tolist() == tiktokens_own(tiktoken.get_encoding("gpt2"), text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(any_text | any_lines)
def test_gpt2_gives_tiktokens_own_numbers_10_000_times(tokenizers, text):
    assert tokenizers["tiktoken"].encode(text).tolist() == tiktokens_own(tiktoken.get_encoding("gpt2"), text)


@pytest.fixture(params=["cl100k_base", "o200k_base"])
def other_encoding(request, monkeypatch):
    """tiktoken's newer ways to cut a text, with a small vocabulary, as their files are not at hand: (tiktoken's, ours)."""
    import tiktoken_ext.openai_public as public

    ranks = {bytes([byte]): byte for byte in range(256)}
    for merge in ("!\n", "!\n/", "12", "34", "123", "45", " a", "ab", "'l", "'ll", "ę", "\n\n", "  "):
        ranks[merge.encode()] = len(ranks)
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *args, **options: ranks)
    pattern = getattr(public, request.param)()["pat_str"]
    theirs = tiktoken.Encoding(request.param, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_TEXT: len(ranks)})
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, request.param, theirs)
    return theirs, BPETokenizer(gpt_tiktoken.tiktoken_tokenizer(request.param).to_str())


def test_newer_encodings_give_tiktokens_own_numbers(other_encoding):
    theirs, ours = other_encoding
    assert ours.vocab_size == theirs.n_vocab and ours.end == theirs.eot_token
    for name, text in TEXTS.items():
        if name != "numbers":
            assert ours.encode(text).tolist() == tiktokens_own(theirs, text), name


def test_newer_encodings_give_tiktokens_own_numbers_for_digits_and_slashes(other_encoding):
    theirs, ours = other_encoding
    for text in ("12345 12", "raz!\n/dwa", "...\n/"):
        assert decoded(ours, ours.encode(text)) == text
        assert ours.encode(text).tolist() == tiktokens_own(theirs, text), text


# -------------------------------------------------------------------------------------------------- streaming
def test_a_text_cut_inside_a_character_shows_no_replacement_character(tokenizers):
    text = "Zażółć gęślą jaźń: 🦊, 👩‍👩‍👧 i 𠜎"
    for kind, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text).tolist()
        inside = 0
        for cut in range(len(ids) + 1):
            first, second = ("".join(tokenizer.stream(part)) for part in (ids[:cut], ids[cut:]))
            assert text.startswith(first) and text.endswith(second), kind
            inside += len(first + second) < len(text)
        assert inside >= 4, kind  # there are cuts inside a character
        assert len(list(tokenizer.stream(ids))) == len(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_in_any_order_stream_as_they_read_whole(raw):
    tokenizer = bytes_only()
    streamed = list(tokenizer.stream(raw))
    assert "".join(streamed) == bytes(raw).decode("utf-8", "ignore") and "\ufffd" not in streamed
    assert len(streamed) == len(raw)


@functools.cache
def bytes_only():
    """A tokenizer whose numbers are the bytes, and 256 the end of a song."""
    return BPETokenizer(bytes_and())


def test_samples_hold_whole_characters_only(capsys):
    """An untrained model of bytes at a high temperature: most of what it draws is not valid text."""
    train(vocab_size=257, max_iters=1, temperature=100, top_p=1, max_new_tokens=200, prompt="Noc ż", num_samples=2)
    out, text = capsys.readouterr().out, Path("run/output/sample.txt").read_bytes().decode()
    assert text in out and text.count("Noc ż") == 2 and "\ufffd" not in out and "\0" not in text
    assert 20 < len(text.encode()) < 400


def test_a_prompt_that_ends_inside_a_character_does_not_crash(capsys):
    train(max_iters=1)
    way = argv(sample_only=True, run_dir="run", prompt="Noc " + b"\xc5".decode("utf-8", "surrogateescape"), max_new_tokens=5)
    try:
        gpt_tiktoken.main(way)
    except SystemExit:
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "prompt" in error
    else:
        assert sample("run").startswith("Noc ") and "\ufffd" not in sample("run")


# ----------------------------------------------------------------------------------------- which tokenizer it is
def choice(capsys):
    return re.search("^tokenizer: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]


def test_auto_takes_the_file(shared, capsys, monkeypatch):
    forbid(monkeypatch, "tiktoken_tokenizer", "train_tokenizer")
    for path, kind in itertools.product((shared / "polish.json", shared / "polish"), ("auto", "polish", "custom")):
        tokenizer = made(TEXT, tokenizer=kind, tokenizer_path=str(path))
        assert choice(capsys) == str(path) and tokenizer.vocab_size == 700


def test_auto_takes_tiktokens_where_there_is_no_file(capsys, monkeypatch):
    forbid(monkeypatch, "train_tokenizer", "read_tokenizer")
    monkeypatch.setattr(gpt_tiktoken, "tiktoken_tokenizer", functools.cache(gpt_tiktoken.tiktoken_tokenizer))
    assert gpt_tiktoken.Config().tokenizer == "auto" and gpt_tiktoken.Config().encoding == "gpt2"
    for options in (dict(tokenizer_path="missing.json"), dict(tokenizer="tiktoken")):
        assert made(TEXT, **options).vocab_size == 50257
        assert choice(capsys) == "tiktoken's gpt2"


def test_auto_takes_a_custom_one_without_network_and_cache(no_cache, capsys):
    metrics = train(tokenizer="auto", tokenizer_path="missing.json", input=SAMPLE_CORPUS, max_iters=1)
    said = choice(capsys)
    assert metrics["vocab_size"] == 2000 and said.startswith("custom, 2,000 entries") and "gpt2 cannot be fetched" in said
    assert files("run") == RUN and not Path("empty").exists()
    train(vocab_size=2000, input=SAMPLE_CORPUS, max_iters=1, run_dir="custom")
    assert choice(capsys) == "custom, 2,000 entries from the training part"
    for path in ("custom/tokenizer.json", "missing.json"):
        assert Path(path).read_bytes() == Path("run/tokenizer.json").read_bytes()


def test_what_was_found_and_what_it_is_called(shared):
    train_text = gpt_tiktoken.split_corpus(TEXT)[0]
    path = shared / "polish.json"
    for asked, size, name in ((dict(tokenizer_path=str(path)), 700, str(path)), (dict(tokenizer="tiktoken"), 50257,
                              "tiktoken's gpt2"), (dict(tokenizer="custom", vocab_size=280), 280, "custom, 280 entries")):
        core, said = gpt_tiktoken.find_tokenizer(asked, TEXT)
        assert core.get_vocab_size() == size and said.startswith(name)
    assert core.get_vocab() == gpt_tiktoken.train_tokenizer(train_text, 280).get_vocab()


@pytest.mark.parametrize("options", [{}, dict(tokenizer="auto"), dict(tokenizer="tiktoken"), dict(tokenizer="polish"),
                                     dict(tokenizer="auto", tokenizer_path="missing.json")])
def test_a_vocabulary_size_needs_a_custom_tokenizer(capsys, options):
    words = {name: value for name, value in TINY.items() if name != "tokenizer"} | options
    assert "--vocab_size needs --tokenizer custom" in no(capsys, argv(**words, input="songs.txt", run_dir="run"))


def test_tiktoken_by_name_without_its_files_is_an_error(no_cache, capsys):
    for encoding in ("gpt2", "cl100k_base", "o200k_base"):
        error = no(capsys, tiny(tokenizer="tiktoken", encoding=encoding))
        assert encoding in error and "TIKTOKEN_CACHE_DIR" in error and "--tokenizer custom" in error


def test_tiktoken_with_a_portal_in_its_way_is_an_error(no_cache, capsys, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", lambda place: b"<html>Please log in.</html>")
    assert "TIKTOKEN_CACHE_DIR" in no(capsys, tiny(tokenizer="tiktoken"))


def test_polish_without_network_is_an_error(capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at the start
    monkeypatch.setattr(constants, "HF_HUB_CACHE", os.path.abspath("empty"))
    error = no(capsys, tiny(tokenizer="polish"))
    assert "flax-community/papuGaPT2" in error and "--tokenizer_path" in error and "online" in error


def test_polish_comes_from_the_hub(shared, capsys, monkeypatch):
    import transformers

    asked = []

    def from_pretrained(name, *args, **options):
        asked.append(name)
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(shared / "polish.json"))

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    metrics = train(tokenizer="polish")
    assert asked == ["flax-community/papuGaPT2"] == [choice(capsys)] and metrics["vocab_size"] == 700
    assert gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=6))["iters"] == 6 and len(asked) == 1


def test_the_training_part_alone_makes_the_vocabulary():
    """The validation part's only word would be among the first to get an entry: no pair of bytes is more frequent."""
    train_part, val_part = babble(120) + END, "xqxqxqxqxq " * 30
    assert gpt_tiktoken.split_corpus(train_part + val_part) == (train_part, val_part)
    pieces = made(train_part + val_part, tokenizer="custom", vocab_size=400).pieces
    assert pieces == made(train_part + "y" * len(val_part), tokenizer="custom", vocab_size=400).pieces
    assert not any(b"xq" in piece for piece in pieces) and any(b"sto" in piece for piece in pieces)
    pieces = BPETokenizer(gpt_tiktoken.train_tokenizer(train_part + val_part, 260).to_str()).pieces
    assert any(b"xq" in piece for piece in pieces)


def test_songs_do_not_run_into_each_other_in_the_vocabulary():
    pieces = made(f"bb aa{END}bb aa{END}" * 50, tokenizer="custom", vocab_size=260).pieces
    assert Counter(piece for piece in pieces if len(piece) > 1) == Counter([b"aa", b"bb", b" aa"])


# ---------------------------------------------------------------------------------------------- --tokenizer_path
def stamp(path):
    return Path(path).read_bytes(), os.stat(path).st_mtime_ns


@pytest.mark.parametrize("kind", ["auto", "custom"])
def test_an_existing_file_is_used_and_never_rewritten(shared, kind, capsys):
    shutil.copy(shared / "polish.json", "mine.json")
    os.utime("mine.json", (1, 1))
    before, way = stamp("mine.json"), dict(tokenizer=kind, tokenizer_path="mine.json")
    assert train(**way)["vocab_size"] == 700 and choice(capsys) == "mine.json"
    train(**way, seed=1)  # anew in the same folder
    gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=7))
    gpt_tiktoken.main(argv(sample_only=True, run_dir="run", tokenizer_path="mine.json"))
    assert stamp("mine.json") == before and files("run") == RUN
    text = "Cąmiasto żeby\n🦊"
    core = Tokenizer.from_file("run/tokenizer.json")
    assert core.encode(text).ids == Tokenizer.from_file("mine.json").encode(text).ids


def test_the_tokenizer_of_an_earlier_run_in_the_same_folder_is_taken_and_kept(shared):
    train(tokenizer="polish", tokenizer_path=shared / "polish.json", max_iters=1)
    before = stamp("run/tokenizer.json")
    metrics = train(tokenizer="auto", tokenizer_path="run/tokenizer.json", max_iters=1)
    (previous,) = Path().glob("run.previous-*")
    assert stamp(previous / "tokenizer.json") == before and stamp("run/tokenizer.json")[0] == before[0]
    assert metrics["vocab_size"] == 700 and files("run") == files(previous) == RUN


def test_a_folder_with_a_tokenizer_alone_is_no_run(shared, capsys):
    Path("run").mkdir()
    shutil.copy(shared / "polish.json", "run/tokenizer.json")
    assert "--run_dir" in no(capsys, tiny(tokenizer="auto", tokenizer_path="run/tokenizer.json"))


def test_a_missing_file_is_trained_and_saved_there(capsys):
    metrics = train(tokenizer_path="mine.json")
    assert choice(capsys).startswith("custom") and metrics["vocab_size"] == 290
    assert Path("mine.json").read_bytes() == Path("run/tokenizer.json").read_bytes()
    before = stamp("mine.json")
    again = train(tokenizer_path="mine.json", run_dir="again", vocab_size=300)
    assert choice(capsys) == "mine.json" and again["vocab_size"] == 290 and stamp("mine.json") == before
    assert same(weights("run"), weights("again"))


def test_a_missing_file_in_a_missing_folder(capsys):
    train(tokenizer_path="new/mine.json")
    assert Path("new/mine.json").read_bytes() == Path("run/tokenizer.json").read_bytes()


def test_a_missing_file_that_cannot_be_written_is_found_first(capsys, run):
    Path("file").touch()
    for way in ({}, dict(load_url=address("run/model_best.pt"), run_dir="new")):
        error = no(capsys, tiny(tokenizer_path="file/mine.json", **way))
        assert "cannot write --tokenizer_path file/mine.json" in error


def test_a_full_disk_leaves_no_half_of_a_tokenizer(capsys):
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        error = refused(gpt_tiktoken, capsys, tiny(tokenizer_path="new.json"), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "too large" in error and not Path("new.json").exists() and files("run") == {"config.json"}


def test_a_missing_file_in_the_folder_of_another_run_is_refused(capsys, run):
    assert "belongs to a run" in no(capsys, tiny(tokenizer_path="run/mine.json", run_dir="new"))


@pytest.mark.parametrize("option", ["save_path", "output"])
def test_the_tokenizer_and_another_result_are_not_the_same_file(corpus, capsys, shared, option):
    """Else the user's tokenizer would be renamed to make room for a checkpoint or a text."""
    Path("mine.json").write_bytes((shared / "polish.json").read_bytes())
    before = stamp("mine.json")
    way = {"tokenizer": "polish", "tokenizer_path": "mine.json", option: "./mine.json"}
    assert f"--tokenizer_path and --{option} are the same file" in no(capsys, tiny(**way))
    assert stamp("mine.json") == before


def test_the_size_that_a_short_text_allows_is_told_without_network_too(capsys, no_cache):
    error = no(capsys, tiny(tokenizer="auto"))
    size = re.search(r"; take --tokenizer custom --vocab_size (\d+)$", error)[1]
    assert train(vocab_size=int(size))["vocab_size"] == int(size)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_missing_file_in_a_folder_that_is_read_only_is_found_first(capsys):
    Path("closed").mkdir(mode=0o500)
    assert "cannot write --tokenizer_path" in no(capsys, tiny(tokenizer_path="closed/mine.json"))


def test_a_folder_of_two_files_is_a_tokenizer(shared, tokenizers):
    shutil.copytree(shared / "polish", "mine")
    before = tree("mine")
    assert train(tokenizer="polish", tokenizer_path="mine")["vocab_size"] == 700
    assert tree("mine") == before and BPETokenizer(Path("run/tokenizer.json").read_text("utf-8")).end == 699
    text = babble(9, seed=3)
    assert torch.equal(tokenizers["polish folder"].encode(text), tokenizers["polish file"].encode(text))
    shutil.copy(shared / "polish.json", "mine/tokenizer.json")  # it wins over the other two
    Path("mine/vocab.json").write_text("{}")
    assert made(TEXT, tokenizer_path="mine").vocab_size == 700


def test_a_tokenizer_without_an_end_gets_one():
    source = json.loads(bytes_and(("a", "b")))
    source["added_tokens"] = []
    Path("mine.json").write_text(json.dumps(source))
    tokenizer = made(TEXT, tokenizer_path="mine.json")
    assert tokenizer.vocab_size == 258 and tokenizer.end == 257 and decoded(tokenizer, tokenizer.encode(TEXT)) == TEXT
    assert BPETokenizer(**tokenizer.state).end == 257


def changed(**parts):
    """A good tokenizer.json of bytes, with other parts."""
    return json.dumps(json.loads(bytes_and(("a", "b"))) | parts).encode()


def of_kind(kind, **parts):
    vocab = json.loads(bytes_and())["model"]["vocab"]
    return changed(model=dict(type=kind, vocab=vocab, unk_token="[UNK]") | parts)


def of_vocab(**more):
    return of_kind("BPE", vocab=json.loads(bytes_and(("a", "b")))["model"]["vocab"] | more, merges=[["a", "b"]])


def fewer_bytes():
    source = json.loads(bytes_and())
    del source["model"]["vocab"]["ł"]
    return json.dumps(source).encode()


LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
BAD_TOKENIZERS = {
    "empty": b"", "half": changed()[:300], "not JSON": b"To nie jest tokenizer.\n", "not UTF-8": b"\xff\xfe\0", "a list": b"[]",
    "another JSON": b'{"model": "gpt2"}', "no model": changed(model=None), "unknown model": changed(model=dict(type="New")),
    "a merge of unknown entries": of_kind("BPE", merges=[["zz", "qq"]]),
    "without a decoder": changed(decoder=None), "a byte is missing": fewer_bytes(),
    "not byte-level": of_kind("BPE", vocab={"Noc": 0, "nad": 1, "[UNK]": 2}, merges=[]),
    "white space is lost": changed(pre_tokenizer=dict(type="Whitespace")), "no bytes are made": changed(pre_tokenizer=None),
    "a space before each line": changed(pre_tokenizer=LEVEL | dict(add_prefix_space=True)),
    "small letters only": changed(normalizer=dict(type="Lowercase")),
    "two entries of one number": of_vocab(zz=5), "a number far away": of_vocab(zz=3_000_000_000),
    "most numbers have no entry": of_vocab(zz=1000),
    "a panic when it is read": changed(model=json.loads(bytes_and(("a", "b")))["model"] | dict(continuing_subword_prefix="##")),
    "another panic": changed(normalizer=dict(type="Precompiled", precompiled_charsmap="AAAA")),
    "a panic when it cuts": changed(pre_tokenizer=dict(type="FixedLength", length=0)),
    "words": of_kind("WordLevel", vocab=json.loads(bytes_and())["model"]["vocab"] | {"[UNK]": 256}),
}
HARMLESS = {
    "cut to length": changed(truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)),
    "filled to length": changed(padding=dict(
        strategy=dict(Fixed=9), direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token="[PAD]")),
    "filled to the longest": changed(padding=dict(
        strategy="BatchLongest", direction="Left", pad_to_multiple_of=8, pad_id=0, pad_type_id=0, pad_token="[PAD]")),
    "random cuts": changed(model=json.loads(bytes_and(("a", "b")))["model"] | dict(dropout=0.5))}
NOT_BPE = {"words without an unknown": of_kind("WordLevel"), "word pieces": of_kind("WordPiece", continuing_subword_prefix="##",
                                                                             max_input_chars_per_word=100)}


ADDED = dict(id=257, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)


@pytest.mark.parametrize("special", [True, False])
def test_the_words_of_the_end_token_are_text_inside_a_line(special):
    """Whatever the tokenizer's file says of them."""
    added = ADDED | dict(content="<|endoftext|>", special=special)
    tokenizer = BPETokenizer(changed(added_tokens=[added]).decode())
    text = f"a <|endoftext|> b{END}c"
    ids = tokenizer.encode(text)
    assert decoded(tokenizer, ids) == text and (ids == tokenizer.end).sum() == 1


def test_an_added_entry_is_text_even_if_its_letters_stand_for_bytes():
    """The letter ą spells byte 5 in a byte-level vocabulary."""
    added = ADDED | dict(content="<początek>")
    tokenizer = BPETokenizer(changed(added_tokens=[added]).decode())
    text = "Noc <początek> nad\n"
    assert decoded(tokenizer, tokenizer.encode(text)) == text


@pytest.mark.parametrize("path", [".", "here", "../mine"])
def test_the_current_folder_may_hold_the_tokenizer(shared, monkeypatch, path):
    shutil.copytree(shared / "polish", "mine")
    monkeypatch.chdir("mine")
    assert made(TEXT, tokenizer_path=os.getcwd() if path == "here" else path).vocab_size == 700


def test_a_closed_stderr_is_no_error():
    """As after 2>&- in a shell."""
    way = [sys.executable, gpt_tiktoken.__file__, *map(str, tiny(max_iters=1))]
    done = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *way], stdout=subprocess.PIPE)
    assert done.returncode == 0 and (Path("run") / "metrics.json").exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_tokenizer_file_that_shortens_fills_or_shuffles_is_read_without_that(name):
    Path("mine.json").write_bytes(HARMLESS[name])
    text = "Noc nad miastem, abecadło z pieca spadło.\n\na\n" * 20
    tokenizer = made(text, tokenizer_path="mine.json")
    ids, plain = tokenizer.encode(text), BPETokenizer(changed().decode()).encode(text)
    assert decoded(tokenizer, ids) == text and torch.equal(ids, plain)
    assert torch.equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("name", [*BAD_TOKENIZERS, *NOT_BPE])
def test_a_bad_tokenizer_file_is_refused(name, capfd):
    capsys = capfd  # what the library writes of a panic counts, too
    Path("mine.json").write_bytes((BAD_TOKENIZERS | NOT_BPE)[name])
    for kind in ("auto", "custom", "polish"):
        error = no(capsys, tiny(tokenizer=kind, tokenizer_path="mine.json"))
        assert "tokenizer" in error and ("take another" in error or "mine.json: no tokenizer (" in error)


@pytest.mark.parametrize("content", [
    {}, {"vocab.json": b"{}"}, {"vocab.json": b'{"a": 1', "merges.txt": b"a b\n"}, {"vocab.json": b"{}", "merges.txt": b""},
    {"vocab.json": b"[1]", "merges.txt": b"a b\n"}, {"vocab.json": b'{"a": 1, "b": 2}', "merges.txt": b"a b c\n"},
    {"vocab.json": b'{"a": 1}', "merges.txt": b"#version: 0.2\na b\n"}, {"tokenizer.json": b"{}"}])
def test_a_folder_that_holds_no_tokenizer_is_refused(content, capsys):
    Path("mine").mkdir()
    for name, raw in content.items():
        Path("mine", name).write_bytes(raw)
    error = no(capsys, tiny(tokenizer="polish", tokenizer_path="mine"))
    assert "--tokenizer_path mine: no tokenizer (" in error and "merges.txt" in error or "take another" in error


def test_a_folder_whose_numbers_are_far_away_is_refused(capsys):
    Path("mine").mkdir()
    Path("mine/vocab.json").write_text(json.dumps(json.loads(bytes_and())["model"]["vocab"] | dict(zz=3_000_000_000)))
    Path("mine/merges.txt").write_text("")
    assert "most numbers" in no(capsys, tiny(tokenizer="polish", tokenizer_path="mine"))


def test_a_polish_file_that_is_not_there_is_refused(capsys):
    assert "missing.json" in no(capsys, tiny(tokenizer="polish", tokenizer_path="missing.json"))


def test_the_size_of_a_custom_vocabulary(capsys):
    for size in (256, 1, 0, -5):
        assert f"--vocab_size {size}" in no(capsys, tiny(vocab_size=size))
    error = no(capsys, tiny(vocab_size=9999))
    most = int(re.search(r"makes (\d+) entries at most", error)[1])
    assert "--vocab_size 9999 is too large for this text" in error and 290 < most < 400
    assert f"--vocab_size {most + 1}" in no(capsys, tiny(vocab_size=most + 1))
    assert train(vocab_size=most)["vocab_size"] == most and train(vocab_size=257)["vocab_size"] == 257


# ------------------------------------------------------------------------------------------- a run and its tokenizer
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, to be read only."""
    place = tmp_path_factory.mktemp("trained")
    (place / "songs.txt").write_text(TEXT, encoding="utf-8")
    train(input=place / "songs.txt", run_dir=place / "run", tokenizer_path=place / "mine.json")
    return place / "run"


@pytest.fixture
def run(trained):
    """A copy of the finished run, in ./run. The tokenizer file that it was given is in another folder."""
    return Path(shutil.copytree(trained, "run"))


def test_a_run_leaves_its_files_with_a_tokenizer_that_others_can_read(trained):
    assert files(trained) == RUN
    metrics, last = json.loads((trained / "metrics.json").read_text()), checkpoint(trained / "model_last.pt")
    tokenizer, core = BPETokenizer(**last["tokenizer"]), Tokenizer.from_file(str(trained / "tokenizer.json"))
    assert core.encode(SONG).ids == tokenizer.encode(SONG).tolist() and core.decode(core.encode(SONG).ids) == SONG
    assert metrics["vocab_size"] == core.get_vocab_size() == 290 and metrics["stage"] == last["stage"] == "bpe"
    assert metrics["params"] == sum(p.numel() for p in last["model"].values())
    for path in (trained / "tokenizer.json", trained.parent / "mine.json"):
        assert path.read_text("utf-8") == last["tokenizer"]["source"]
    assert metrics["chars_per_second"] == pytest.approx(metrics["tokens_per_second"] * metrics["chars_per_token"])


def test_an_earlier_run_is_moved_aside_with_its_tokenizer():
    train()
    first = tree("run")
    train(vocab_size=280)
    (previous,) = Path().glob("run.previous-*/tokenizer.json")
    assert previous.read_bytes() == first["run/tokenizer.json"] != Path("run/tokenizer.json").read_bytes()
    assert files("run") == RUN


def test_a_resumed_run_makes_reads_and_downloads_no_tokenizer(run, monkeypatch):
    forbid(monkeypatch, "find_tokenizer", "train_tokenizer", "tiktoken_tokenizer")
    shutil.rmtree(run / "output")
    (run / "tokenizer.json").unlink()
    old = checkpoint(run / "model_last.pt")["tokenizer"]
    way = dict(run_dir=run, max_iters=8, input="songs.txt")
    assert gpt_tiktoken.main(argv(resume=True, **way))["iters"] == 8
    assert checkpoint(run / "model_last.pt")["tokenizer"] == old and files(run) == RUN
    gpt_tiktoken.main(argv(sample_only=True, run_dir=run, prompt="Noc"))
    assert sample(run).startswith("Noc")
    gpt_tiktoken.main(argv(load_url=address("run/model_best.pt"), input="songs.txt", run_dir="new", max_iters=2, batch_size=2,
                           device="cpu", dtype="float32"))
    assert checkpoint("new/model_last.pt")["tokenizer"] == old and files("new") == RUN


def test_a_checkpoint_alone_is_enough_to_sample(trained, monkeypatch):
    forbid(monkeypatch, "find_tokenizer", "train_tokenizer", "tiktoken_tokenizer", "read_tokenizer")
    shutil.copy(trained / "model_best.pt", "alone.pt")
    Path("songs.txt").unlink()
    gpt_tiktoken.main(argv(sample_only=True, save_path="alone.pt", output="text.txt", prompt="Noc"))
    assert Path("text.txt").read_text("utf-8").startswith("Noc")


@pytest.mark.parametrize("prune", [False, True])
def test_a_run_continues_without_the_tokenizer_file_it_was_given(shared, prune):
    shutil.copy(shared / "polish.json", "mine.json")
    common = dict(tokenizer="polish", tokenizer_path="mine.json", max_iters=10) | (dict(prune_vocab=True) if prune else {})
    train(**common, run_dir="whole")
    test_gpt.cut_off(gpt_tiktoken, 7, tiny(**common, run_dir="cut"))
    Path("mine.json").unlink()
    Path("cut/tokenizer.json").unlink()
    assert gpt_tiktoken.main(argv(resume=True, run_dir="cut"))["iters"] == 10
    assert same(weights("whole"), weights("cut")) and history("whole") == history("cut") and sample("whole") == sample("cut")


def test_a_run_continues_without_the_folder_of_its_tokenizer_file(shared):
    Path("place").mkdir()
    shutil.copy(shared / "polish.json", "place/mine.json")
    train(tokenizer_path="place/mine.json")
    shutil.rmtree("place")
    assert gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=6))["iters"] == 6


def test_a_resumed_run_writes_no_file_in_place_of_a_folder(shared):
    shutil.copytree(shared / "polish", "mine")
    train(tokenizer="polish", tokenizer_path="mine")
    shutil.rmtree("mine")
    gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=6))
    assert not Path("mine").exists()


def test_a_pruned_run_continues_with_its_tokenizer_file_in_place(shared):
    train(prune_vocab=True, tokenizer_path=shared / "polish.json")
    assert gpt_tiktoken.main(argv(resume=True, run_dir="run", max_iters=6))["iters"] == 6


def test_a_file_beside_tiktoken_is_refused(shared, capsys):
    error = no(capsys, tiny(tokenizer="tiktoken", tokenizer_path=shared / "polish.json"))
    assert "--tokenizer tiktoken takes no --tokenizer_path" in error


def test_a_tokenizer_of_another_vocabulary_than_the_checkpoints_is_refused(run, shared, capsys):
    other = dict(tokenizer_path=shared / "polish.json")
    for way in (argv(resume=True, run_dir=run, **other), argv(sample_only=True, run_dir=run, **other),
                tiny(load_url=address("run/model_best.pt"), run_dir="new", **other)):
        error = no(capsys, way)
        assert "polish.json is not the checkpoint's tokenizer" in error
    own = dict(tokenizer_path="run/tokenizer.json")
    gpt_tiktoken.main(argv(sample_only=True, run_dir=run, **own))
    assert gpt_tiktoken.main(argv(resume=True, run_dir=run, max_iters=6, **own, input="songs.txt"))["iters"] == 6
    Path("bad.json").write_bytes(b"{")
    assert "bad.json" in no(capsys, argv(sample_only=True, run_dir=run, tokenizer_path="bad.json"))


def test_another_tokenizer_than_that_of_a_pruned_run_is_refused(shared, capsys):
    train(prune_vocab=True, tokenizer="polish", tokenizer_path=shared / "polish.json", max_iters=1)
    Path("small.json").write_text(bytes_and(("a", "b")))
    Path("large.json").write_text(gpt_tiktoken.train_tokenizer(babble(600, seed=1), 800).to_str())  # bytes with other numbers
    for path, way in itertools.product(("small.json", "large.json"), (dict(resume=True), dict(sample_only=True))):
        error = no(capsys, argv(run_dir="run", tokenizer_path=path, **way))
        assert f"{path} is not the checkpoint's tokenizer" in error


@pytest.mark.parametrize(("option", "value", "known"), [
    ("tokenizer", "tiktoken", "custom"), ("tokenizer", "auto", "custom"), ("tokenizer", "polish", "custom"),
    ("vocab_size", 300, 290), ("encoding", "o200k_base", "gpt2"), ("prune_vocab", True, False)])
def test_options_that_contradict_the_checkpoint(run, capsys, option, value, known):
    for way in (dict(resume=True), dict(sample_only=True)):
        error = no(capsys, argv(run_dir=run, **way, **{option: value}))
        assert f"--{option} {value}" in error and str(known) in error
    way = tiny(load_url=address("run/model_best.pt"), run_dir="new", **{option: value})
    assert f"--{option} {value}" in no(capsys, way)


def test_a_run_that_is_cut_off_before_its_second_evaluation_continues_as_if_nothing_happened():
    common = dict(max_iters=10)
    train(**common, run_dir="whole")
    test_gpt.cut_off(gpt_tiktoken, 3, tiny(**common, run_dir="cut"))
    gpt_tiktoken.main(argv(resume=True, run_dir="cut"))
    assert same(weights("whole"), weights("cut")) and history("whole") == history("cut")
    one, two = (checkpoint(f"{folder}/model_last.pt") for folder in ("whole", "cut"))
    assert same(one["optimizers"], two["optimizers"]) and one["tokenizer"] == two["tokenizer"]


def test_a_resumed_run_has_all_options_but_where_it_reads_and_writes(shared):
    shutil.copy(shared / "polish.json", "mine.json")
    train(tokenizer="polish", tokenizer_path="mine.json", prune_vocab=True, save_path="best.pt", output="text.txt", top_k=3,
          max_iters=1, seed=3)
    before = stamp("mine.json")
    Path("run").rename("moved")
    metrics = gpt_tiktoken.main(argv(resume=True, run_dir="moved", max_iters=2))
    old, new = (json.loads(Path("moved/config.json").read_text())["options"], checkpoint("moved/model_last.pt")["config"])
    assert old == new and metrics["seed"] == 3
    given = dict(run_dir="moved", save_path="moved/model_best.pt", output="moved/output/sample.txt", tokenizer_path="",
                 resume=True, max_iters=2, sample_only=False, interactive=False, load_url="")
    assert gpt_tiktoken.UNINHERITED | {"resume", "max_iters"} == given.keys()
    first = gpt_tiktoken.make_config(gpt_tiktoken.parse_args(tiny(
        tokenizer="polish", prune_vocab=True, top_k=3, max_iters=1, seed=3)), CPU)
    assert new == vars(first) | given and stamp("mine.json") == before


def kill_again_and_again(recipe, kills, shared):
    """Kill a run with SIGKILL, take its tokenizer files away, resume it, and so on; yields a line for each kill."""
    shutil.copy(shared / "polish.json", "mine.json")
    common = dict(recipe=recipe, dropout=0.2, eval_interval=1, max_iters=10 * kills, warmup_iters=2, patience=0, n_embd=32,
                  tokenizer="polish", tokenizer_path="mine.json")
    script, last = gpt_tiktoken.__file__, Path("cut/model_last.pt")
    assert processes.finish(processes.start(script, tiny(**common, run_dir="whole"), "whole.txt")) == 0
    way = tiny(**common, run_dir="cut")
    for kill in range(1, kills + 1):
        how = ("fsync", "replace", None)[kill % 3]
        child = processes.start(script, way, "cut.txt", (how, 6 + kill % 3) if how else None)
        if not how:
            assert processes.wait_until(lambda: processes.evaluations("cut.txt") >= 2, child)
            child.kill()
        assert processes.finish(child) == -signal.SIGKILL, Path("cut.txt").read_text("utf-8")
        for path in ("mine.json", "cut/tokenizer.json"):
            Path(path).unlink(missing_ok=True)
        way = argv(resume=True, run_dir="cut")
        yield f"{recipe}, kill {kill:2}: {f'in os.{how}' if how else 'at any moment'}, step {test_gpt.steps_of(last)}"
    assert processes.finish(processes.start(script, way, "cut.txt")) == 0
    assert "tokenizer:" not in Path("cut.txt").read_text("utf-8") and files("cut") == files("whole") == RUN
    one, two = checkpoint("whole/model_last.pt"), checkpoint(last)
    assert same(one["model"], two["model"]) and one["tokenizer"] == two["tokenizer"]
    assert test_gpt.steps_of("whole/model_last.pt") == test_gpt.steps_of(last) == 10 * kills
    assert history("whole") == history("cut") and sample("whole") == sample("cut")
    yield (f"{recipe}, {kills} kills, after each the tokenizer's files deleted: weights after {10 * kills} steps bit-identical "
           "to an uninterrupted run")


def test_a_killed_run_ends_with_the_same_weights(shared):
    assert len(list(kill_again_and_again("modern", 2, shared))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", test_gpt.RECIPES)
def test_a_run_killed_twenty_times_ends_with_the_same_weights(shared, recipe):
    print(f"\n{time.strftime('%Y-%m-%d %H:%M')} torch {torch.__version__}")
    for line in kill_again_and_again(recipe, 20, shared):
        print(line)


# ------------------------------------------------------------------------------------------------- --prune_vocab
def test_a_pruned_vocabulary_keeps_what_is_seen(tokenizers, corpus):
    train_text, val_text = gpt_tiktoken.split_corpus(corpus)
    for kind, whole in tokenizers.items():
        if kind.endswith("pruned"):
            continue
        pruned, seen = tokenizers[f"{kind}, pruned"], whole.encode(train_text)
        ours = pruned.encode(train_text)
        assert [whole.pieces[i] for i in seen.tolist()] == [pruned.pieces[i] for i in ours.tolist()], kind
        used = set(seen.tolist())
        assert pruned.vocab_size == len(used | {i for i, piece in enumerate(whole.pieces) if len(piece) == 1}), kind
        assert {bytes([byte]) for byte in range(256)} <= set(pruned.pieces) and pruned.pieces[pruned.end] == b"\0", kind
        val_ids, val_pruned = whole.encode(val_text), pruned.encode(val_text)
        spelt = [len(whole.pieces[i]) for i in val_ids.tolist() if i not in used]
        assert len(val_pruned) == len(val_ids) - len(spelt) + sum(spelt), kind
        assert pruned.count_chars(val_pruned).sum() == len(val_text), kind
    assert tokenizers["tiktoken, pruned"].vocab_size < 8_000 < tokenizers["tiktoken"].vocab_size


def test_pruning_worked_out_by_hand():
    Path("mine.json").write_text(bytes_and(("a", "b"), ("ab", "c"), ("b", "c")))
    text = "ab ab ab\n" * 9 + "abc bc\n"
    whole = made(text, tokenizer_path="mine.json")
    pruned = made(text, tokenizer_path="mine.json", prune_vocab=True)
    assert [piece for piece in whole.pieces if len(piece) > 1] == [b"ab", b"abc", b"bc"] and whole.vocab_size == 260
    assert [piece for piece in pruned.pieces if len(piece) > 1] == [b"ab"] and pruned.vocab_size == 258
    assert [pruned.pieces[i] for i in pruned.encode("abc bc").tolist()] == [b"a", b"b", b"c", b" ", b"b", b"c"]
    assert pruned.encode("ab\0ab").tolist() == [256, 257, 256]


def test_a_pruned_run(shared):
    results = {}
    for name, prune in (("whole", {}), ("pruned", dict(prune_vocab=True))):
        results[name] = train(tokenizer="polish", tokenizer_path=shared / "polish.json", max_iters=1, run_dir=name, **prune)
        assert files(name) == RUN
    whole, pruned = results["whole"], results["pruned"]
    assert whole["vocab_size"] == 700 and 257 < pruned["vocab_size"] < 320 and pruned["params"] < whole["params"]
    assert whole["tokens"] == pruned["tokens"] and whole["chars_per_token"] == pruned["chars_per_token"]
    assert pruned["tokens_per_vocab_entry"] > 2 * whole["tokens_per_vocab_entry"]
    assert pruned["entries_never_seen"] < whole["entries_never_seen"]
    assert pruned["entries_seen_once"] == whole["entries_seen_once"]
    gpt_tiktoken.main(argv(sample_only=True, run_dir="pruned", prompt="Zupełnie inne słowa: 🦊\n"))
    assert sample("pruned").startswith("Zupełnie inne słowa: 🦊\n")


# -------------------------------------------------------------------------------------------------------- facts
def test_facts_worked_out_by_hand():
    r"""ab|_|b|a|\n|ż|ż|ab: 8 tokens (ż has two bytes), 9 characters, 3 words; ab is there twice, 6 entries once, 251 never."""
    tokenizer = BPETokenizer(bytes_and(("a", "b")))
    text = "ab ba\nżab"
    ids = tokenizer.encode(text)
    assert [tokenizer.pieces[i] for i in ids.tolist()] == [b"ab", b" ", b"b", b"a", b"\n", b"\xc5", b"\xbc", b"ab"]
    assert tokenizer.describe(text, ids) == dict(
        vocab_size=258, tokens=8, chars_per_token=9 / 8, tokens_per_word=8 / 3, tokens_per_vocab_entry=8 / 258,
        entries_never_seen=251, entries_seen_once=6)
    for text, expected in (("ab - ab!", 6 / 2), ("?!", 2)):  # a dash is no word; no word at all
        assert tokenizer.describe(text, tokenizer.encode(text))["tokens_per_word"] == expected


def test_facts_are_of_the_training_part_printed_and_kept(capsys):
    metrics = train()
    out, text = capsys.readouterr().out, gpt_tiktoken.read_corpus("songs.txt")
    tokenizer = BPETokenizer(**checkpoint("run/model_last.pt")["tokenizer"])
    train_text = gpt_tiktoken.split_corpus(text)[0]
    ids = tokenizer.encode(train_text)
    facts = tokenizer.describe(train_text, ids)
    assert len(facts) == 7 and metrics == metrics | facts == json.loads(Path("run/metrics.json").read_text())
    counts = Counter(ids.tolist())
    assert facts["entries_seen_once"] == list(counts.values()).count(1) and facts["entries_never_seen"] == 290 - len(counts)
    said = f"290 entries in the vocabulary, each seen {facts['tokens_per_vocab_entry']:,.1f} times\n"
    assert out.index(said) < out.index("step     0")  # at the start


def uniform(tokenizer, size=4):
    """A model to which every token is equally likely, whatever it reads."""
    model = test_gpt.model_of(gpt_tiktoken, "classic", vocab_size=tokenizer.vocab_size, block_size=size)
    for p in model.lm_head.parameters():
        torch.nn.init.zeros_(p)
    return model


@numeric
@pytest.mark.parametrize("size", [2, 4, 7, 50])
def test_bits_per_character_worked_out_by_hand(size):
    r"""The 8 tokens of ab|_|b|a|\n|ż|ż|ab at log2(258) bits each stand for 9 characters; the end of a song is one, too."""
    tokenizer = BPETokenizer(bytes_and(("a", "b")))
    config = gpt_tiktoken.make_config(dict(block_size=size, batch_size=1, dtype="float32"), CPU)
    model = uniform(tokenizer, size)
    ids = tokenizer.encode(f"{END}ab ba\nżab")  # the first is there to be read, not to be predicted
    assert gpt_tiktoken.evaluate(model, ids[:, None], tokenizer, config, size) == pytest.approx(
        (math.log(258), 8 * math.log2(258) / 9), rel=1e-5)  # in float32
    model.lm_head.bias.data[tokenizer.end] = 50.0  # sure that the song ends
    for text, nats, chars in ((END + END, 0, 2), ("a" + END, 50, 2), (END + "ab", 50, 3)):
        ids = tokenizer.encode(END + text)
        assert gpt_tiktoken.evaluate(model, ids[:, None], tokenizer, config, size) == pytest.approx(
            (nats / 2, nats / math.log(2) / chars), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("text", [TEXT, "bez końca wiersza 🦊 " * 60])
def test_both_stages_validate_on_the_same_characters(text, monkeypatch):
    Path("songs.txt").write_text(text, encoding="utf-8")
    common = dict(max_iters=1, input="songs.txt", block_size=8)
    counted = []

    def counting(tokenizer_class):
        real = tokenizer_class.count_chars
        monkeypatch.setattr(tokenizer_class, "count_chars", lambda self, ids: counted.append(real(self, ids)) or counted[-1])

    counting(BPETokenizer)
    counting(gpt.CharTokenizer)
    totals = set()
    for stage, options in ((gpt, {}), *((gpt_tiktoken, dict(tokenizer="custom", vocab_size=258) | prune)
                                        for prune in ({}, dict(prune_vocab=True)))):
        counted.clear()
        stage.main(argv(**test_gpt.TINY | common | options | dict(run_dir=f"{stage.__name__}{len(options)}", eval_interval=9)))
        totals.add(sum(chars.sum().item() for chars in counted) / 3)  # at the start, at the end, and by repetition
    assert totals == {len(gpt.split_corpus(gpt.read_corpus("songs.txt"))[1])}
    assert gpt_tiktoken.split_corpus(gpt_tiktoken.read_corpus("songs.txt")) == gpt.split_corpus(gpt.read_corpus("songs.txt"))


# ------------------------------------------------------------------------------------------------ the sliced loss
def sliced(x, weight, bias, targets, factor=1.0):
    """(loss, gradients) of SlicedLoss, whose result is multiplied by a factor afterwards."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    loss = gpt_tiktoken.SlicedLoss.apply(*(leaves if bias is not None else [*leaves, None]), targets)
    (loss * factor).backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def plain(x, weight, bias, targets, factor=1.0):
    """The same in float64, token by token to save memory, by torch's own cross-entropy and gradients."""
    x, *head = leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    losses = []
    for row, target in zip(x.split(1), targets.split(1)):
        losses.append(F.cross_entropy(F.linear(row, *head), target, reduction="sum") / (targets >= 0).sum())
        (losses[-1] * factor).backward()
    return sum(losses).detach(), [leaf.grad for leaf in leaves]


def sum_error(count):
    """How far a float32 sum of this many computed numbers may be off: the worst case, relative to their sizes.

    Each addition rounds by 2**-24 at most (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2).
    """
    return (count + 32) * 2.0**-24


@numeric
@pytest.mark.parametrize(("N", "V", "C", "biased"), [
    (2, 5, 3, False), (41, 300, 16, True),  # in one slice
    (400, 50_257, 4, False), (400, 50_257, 4, True),  # 333 tokens a slice
    (48, 2**20 - 1, 2, True)])  # 16 tokens a slice, and one slice without any target
def test_the_sliced_loss_and_its_gradients_are_the_plain_ones(N, V, C, biased):
    torch.manual_seed(N)
    x, weight, bias = torch.randn(N, C), torch.randn(V, C), torch.randn(V) if biased else None
    targets = torch.randint(V, (N,))
    targets[N // 3:2 * N // 3] = -100
    factor = 1.0 if N % 2 else 1024 / 3
    ours, theirs = sliced(x, weight, bias, targets, factor), plain(x, weight, bias, targets, factor)
    assert ours[0].dtype == torch.float32 and ours[0].item() == pytest.approx(theirs[0].item(), rel=sum_error(V))
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() <= sum_error(V) * b.norm()
    assert ours[1][0][N // 3:2 * N // 3].count_nonzero() == 0


@numeric
def test_a_slice_has_a_token_at_least():
    V = 2**24 + 1  # one token's logits are more than a slice is to hold
    loss, (_, grad) = sliced(torch.ones(1, 1), torch.zeros(V, 1), None, torch.tensor([7]))
    assert loss.item() == pytest.approx(math.log(V), rel=1e-5)
    assert grad[7].item() == pytest.approx(-1, rel=1e-5) and grad[8].item() == pytest.approx(1 / V, rel=1e-5)


@numeric
@pytest.mark.parametrize("recipe", test_gpt.RECIPES)
def test_evaluation_leaves_no_gradients_and_gives_the_same_loss(recipe):
    model, idx = test_gpt.model_of(gpt_tiktoken, recipe), torch.randint(20, (2, 12))
    loss = model(idx, idx)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            again = model(idx, idx)
        assert not again.requires_grad and again.item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert loss.item() == pytest.approx(F.cross_entropy(model(idx).flatten(0, 1).double(), idx.flatten()).item(), rel=1e-5)


@numeric
@pytest.mark.parametrize("recipe", test_gpt.RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sliced_loss_in_mixed_precision(recipe, dtype):
    """The head stays in float32, so the loss is as exact as what comes into it; a gradient scaler's factor passes through."""
    model, idx = test_gpt.model_of(gpt_tiktoken, recipe, recall=""), torch.randint(20, (4, 12))
    with torch.autocast("cpu", dtype):
        loss = model(idx, idx)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss / 3).backward()
    assert loss.dtype == torch.float32
    mixed = {name: p.grad / 2.0**12 for name, p in model.named_parameters()}
    model.zero_grad()
    exact = model(idx, idx)
    (exact / 3).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    for name, p in model.named_parameters():
        assert mixed[name].isfinite().all() and mixed[name].dtype == torch.float32
        assert F.cosine_similarity(mixed[name].flatten(), p.grad.flatten(), dim=0) > 0.98, name


# ------------------------------------------------------------------------------------------------------ bad input
SHARED_CASES = test_gpt.test_bad_input_is_answered_in_one_line_and_writes_nothing.pytestmark[0].args[1]


def test_what_stage_1_refuses_is_refused(capsys):
    cases = [(options, words) for options, words in SHARED_CASES if "Ω" not in words]  # here every character is known
    for name, content in test_gpt.FILES.items():
        Path(name).write_bytes(content)
    assert len(cases) > 25
    for options, words in cases:
        error = refused(gpt_tiktoken, capsys, tiny(**dict(vocab_size=257) | options))
        assert not list(Path().rglob("*.pt")) and words.replace("gpt.py", "gpt_tiktoken.py") in error


@pytest.mark.parametrize("options", [
    dict(tokenizer="gpt2"), dict(encoding="gpt4"), dict(vocab_size="many"), dict(vocab_size="nan"), dict(tokenizer_file="x"),
    dict(export_hf="hf"), dict(rdrop=1)])
def test_options_of_stage_2_that_are_none(options, capsys):
    (name,) = options
    assert f"--{name}" in no(capsys, tiny(**options))


def test_a_checkpoint_of_stage_1_is_refused(capsys):
    gpt.main(argv(**test_gpt.TINY, input="songs.txt", run_dir="one"))
    for way in (dict(resume=True, run_dir="one"), dict(sample_only=True, run_dir="one"),
                dict(sample_only=True, load_url=address("one/model_best.pt"))):
        assert "is not a checkpoint for gpt_tiktoken.py (another script" in no(capsys, argv(**way))


ODD_TOKENIZERS = {
    "none": None, "a list": [1], "empty": {}, "no source": dict(keep=None, start="\n"), "one more": dict(more=1),
    "source is none": dict(source=None), "source is a number": dict(source=7), "source is no JSON": dict(source="{"),
    "source is another's": dict(source=bytes_and(("a", "b"))), "source is a word": dict(source='"gpt2"'),
    "keep is text": dict(keep="abc"), "keep is a number": dict(keep=7), "keep lacks bytes": dict(keep=[1, 2, 3]),
    "keep is empty": dict(keep=[]), "keep has holes": dict(keep=[None] * 290),
    "keep is beyond": dict(keep=list(range(291))), "keep has floats": dict(keep=[float(i) for i in range(290)]),
    "start is a number": dict(start=1), "start is nothing": dict(start=""), "start is none": dict(start=None),
    "start is bytes": dict(start=b"a")}
ODD_OPTIONS = [
    dict(vocab_size=10**9), dict(vocab_size=290.0), dict(vocab_size="290"), dict(tokenizer="new"), dict(tokenizer=None),
    dict(encoding=2), dict(prune_vocab=1), dict(tokenizer_path=None), dict(tokenizer_file="mine.json")]


@pytest.mark.parametrize("odd", [*ODD_TOKENIZERS.values(), *ODD_OPTIONS], ids=[*ODD_TOKENIZERS, *map(str, ODD_OPTIONS)])
def test_a_checkpoint_with_an_odd_tokenizer_or_option_is_refused(run, odd, capsys):
    saved = checkpoint("run/model_last.pt")
    if odd in ODD_OPTIONS:
        saved["config"] |= odd
    elif isinstance(odd, dict) and odd.keys() <= {"source", "keep", "start", "more"} and len(odd) == 1:
        saved["tokenizer"] |= odd
    else:
        saved["tokenizer"] = odd
    for name in ("last", "best"):
        torch.save(saved, f"run/model_{name}.pt")
    for way in (argv(resume=True, run_dir="run"), argv(sample_only=True, run_dir="run"),
                tiny(load_url=address("run/model_best.pt"), run_dir="new")):
        error = no(capsys, way)
        assert "model_" in error and ("not a checkpoint" in error or "damaged" in error)


def test_an_unknown_character_in_the_prompt_is_no_error(run):
    gpt_tiktoken.main(argv(sample_only=True, run_dir=run, prompt="Ω 🦊", max_new_tokens=3))
    assert sample(run).startswith("Ω 🦊")


def test_help_fits_a_terminal_and_tells_every_option(capsys, monkeypatch):
    test_gpt.test_help_fits_a_terminal_and_tells_every_option_and_what_sizes_and_recipes_set(gpt_tiktoken, capsys, monkeypatch)
