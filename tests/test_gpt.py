"""Tests of stage 1: pytest tests/test_gpt.py   (its large counts: pytest tests/test_gpt.py -m slow -s)."""

import contextlib
import dataclasses
import functools
import http.server
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import unicodedata
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import filelock
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import make_device
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

STAGES = {"gpt": {}}  # the scripts that these tests hold for, with options that keep a run of theirs small
TINY = dict(n_layer=2, n_embd=16, n_head=2, block_size=16, batch_size=4, dropout=0.1, max_iters=5, eval_interval=5,
            sample_interval=0, max_new_tokens=20, device="cpu", dtype="float32")
SEPARATOR = "\n<|endoftext|>\n"
SONG = "Noc nad miastem, w oknach śpi światło\nIdę powoli, choć nie jest łatwo\n"
TEXT = SEPARATOR.join(f"{number}. {SONG * 3}" for number in range(6))
RUN = {"config.json", "metrics.jsonl", "metrics.json", "loss.png", "model_best.pt", "model_last.pt", "output"}
RECIPES = ("modern", "classic")
both_recipes = pytest.mark.parametrize("recipe", RECIPES)
numeric = pytest.mark.numeric  # what processors round differently: .ci/run repeats these with other instructions


# ------------------------------------------------------------------------------------------------ helpers
@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    """The script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The same sums in the same order, however busy the machine is; and for models this small, faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def in_float64():
    """Models compute in float64: what two ways of computing round differently stays far below what a fault would change."""
    with pytest.MonkeyPatch.context() as patch:  # AdamW's count of steps stays in float32, as a checkpoint has it
        for optimizer in (torch.optim.Adam, torch.optim.AdamW):  # each has its own in torch 2.6
            patch.setattr(sys.modules[optimizer.__module__], "_get_scalar_dtype", lambda is_fused=None: torch.float32,
                          raising=False)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def float64():
    with in_float64():
        yield


@pytest.fixture(autouse=True)
def quick_plots(request, monkeypatch):
    """Plots take half of a small run's time: most tests do without."""
    if "trained" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write(b"\x89PNG"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in an empty folder with songs.txt, a small corpus of six songs."""
    monkeypatch.chdir(tmp_path)
    Path("songs.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def trained(stage, tmp_path_factory):
    """The folder of a finished run, to be read only."""
    place = tmp_path_factory.mktemp("trained")
    (place / "songs.txt").write_text(TEXT, encoding="utf-8")
    stage.main(tiny(stage, input=place / "songs.txt", run_dir=place / "run"))
    return place / "run"


@pytest.fixture
def run(trained):
    """A copy of the finished run, in ./run."""
    return Path(shutil.copytree(trained, "run"))


def argv(**options):
    """Options as a command line has them; True stands for a flag."""
    return [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def tiny(stage, **options):
    """The command line of a small run."""
    return argv(**TINY | STAGES[stage.__name__] | dict(input="songs.txt", run_dir="run") | options)


def refused(stage, capsys, argv, status=2):
    """Run what must fail. Returns the one line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        stage.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == status and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def tree(path="."):
    """Every file and folder below, with content."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in Path(path).rglob("*")}


def checkpoint(path):
    return torch.load(path, weights_only=True)


def weights(folder):
    return checkpoint(Path(folder, "model_last.pt"))["model"]


def same(a, b):
    """Are two checkpoints, or parts of them, equal bit by bit?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def history(folder):
    """The lines of metrics.jsonl, without the seconds, which differ each time."""
    lines = Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def sample(folder):
    return Path(folder, "output", "sample.txt").read_text("utf-8")


def address(path):
    return Path(path).resolve().as_uri()


def steps_of(path):
    """After how many steps a checkpoint was saved."""
    return checkpoint(path)["history"][-1]["iter"]


def config_of(stage, tokens=0, **options):
    return stage.make_config(dict(dtype="float32") | options, torch.device("cpu"), tokens)


def draw(stage, ids, *args):
    """draw_batch on tokens alone, without what is recalled: (grad_accum, B, T + 1)."""
    return stage.draw_batch(ids[:, None], *args)[..., 0]


def recalled_in(stage, model, text, end=-1):
    """What is recalled in each row. text: (B, T); result: (B, T, orders)."""
    none = model.lm_head.out_features
    found = [[stage.recall(row, n, none, end) for n in model.orders] for row in text]
    return torch.stack([torch.stack(row, dim=-1) if row else text.new_empty(text.size(1), 0) for row in found])


def model_of(stage, recipe="modern", seed=0, vocab_size=20, **shape):
    """A small model; no matrix is zero, so every path counts."""
    torch.manual_seed(seed)
    shape = dict(block_size=12, n_layer=2, n_head=2, n_embd=16, dropout=0.0) | shape
    if recipe == "modern":
        shape = dict(recall="1,3") | shape
    model = stage.GPTLanguageModel(config_of(stage, recipe=recipe, **shape), vocab_size)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


class Learner:
    """A small model that takes steps without a run around it."""

    def __init__(self, stage, **options):
        self.stage, self.config = stage, config_of(stage, **TINY | STAGES[stage.__name__] | options)
        tokenizer = stage.make_tokenizer({}, TEXT, None)
        self.data = stage.with_recall(tokenizer.encode(TEXT), self.config, tokenizer)
        self.model = model_of(stage, self.config.recipe, vocab_size=tokenizer.vocab_size, block_size=16)
        self.optimizers = stage.make_optimizers(self.model, self.config)
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.config.dtype == "float16")
        self.steps = 0

    def step(self):
        rows = self.stage.draw_batch(self.data, self.config, self.steps, 0, 1)
        loss = self.stage.take_step(self.model, self.optimizers, self.scaler, rows, self.config, self.steps)
        self.steps += 1
        return loss.item()


# ------------------------------------------------------------------------------------------------ options
def test_the_original_commands_parse_as_they_stand(stage):
    for line in ("--input assets/input/input2.txt --max_iters 5000",
                 "--input i --output o --save_path s --load_url u --resume --batch_size 64 --block_size 256 --max_iters 5000 "
                 "--eval_interval 100 --learning_rate 0.0003 --eval_iters 200 --n_embd 384 --n_head 6 --n_layer 6 "
                 "--dropout 0.2 --max_new_tokens 500"):
        assert argv(**stage.parse_args(shlex.split(line))) == shlex.split(line)
    assert stage.parse_args([]) == {}


def test_what_is_given_wins_over_size_and_recipe(stage):
    for device, size in (("cpu", "tiny"), ("cuda", "base")):
        for recipe in RECIPES:
            config = stage.make_config(dict(recipe=recipe), torch.device(device), 10**9)
            expected = stage.SIZES[size] | stage.RECIPES[recipe] | dict(size=size, recipe=recipe, seed=2115)
            assert asdict(config) | expected == asdict(config) and None not in asdict(config).values()
    assert stage.make_config({}, torch.device("cpu"), 10**9).recipe == "modern"
    for recipe, tokens, size in (("modern", 1_999_999, "tiny"), ("modern", 2_000_000, "base"), ("classic", 0, "base")):
        assert stage.make_config(dict(recipe=recipe), torch.device("cuda"), tokens).size == size
    config = config_of(stage, size="base", recipe="classic", max_iters=7, learning_rate=0.5)
    assert (config.max_iters, config.learning_rate, config.n_embd, config.weight_decay) == (
        7, 0.5, stage.SIZES["base"]["n_embd"], stage.RECIPES["classic"]["weight_decay"])


def test_modern_is_planned_for_some_passes_over_the_text(stage):
    def plan(tokens, **options):
        config = stage.make_config(options, torch.device("cpu"), tokens)
        return config.max_iters, config.eval_interval, config.sample_interval

    rows = dict(size="tiny", batch_size=4, block_size=512)
    assert plan(20_000, **rows) == (117, 12, 30) and stage.EPOCHS * 20_000 // 2048 == 117
    assert plan(20_000, **rows, grad_accum=2) == plan(10_000, **rows)
    assert plan(2000, **rows) == (100, 10, 25)  # of a few lines more, or nothing would be learned
    for name, size in stage.SIZES.items():
        most = size["max_iters"], size["eval_interval"], size["sample_interval"]
        assert plan(10**9, size=name) == plan(2000, size=name, recipe="classic") == most
    assert plan(20_000, **rows, max_iters=40) == (40, 4, 10)
    assert plan(20_000, **rows, eval_interval=50, sample_interval=0) == (117, 50, 0)  # what is given wins


@given(st.integers(0, 10**10))
def test_tiny_is_evaluated_and_saved_often(tokens):
    """A killed run loses what came after its last evaluation."""
    gpt = importlib.import_module("gpt")
    config = gpt.make_config(dict(size="tiny"), torch.device("cpu"), tokens)
    assert 0 < config.eval_interval <= min(100, math.ceil(config.max_iters / 10))


@both_recipes
def test_settings_are_built_once(stage, recipe, monkeypatch):
    built, real = [], stage.Config.__init__

    def count(config, *args, **options):
        built.append(config)
        real(config, *args, **options)

    monkeypatch.setattr(stage.Config, "__init__", count)
    monkeypatch.setattr(stage, "load_checkpoint", checkpoint)  # the script's own builds another, to compare with
    stage.main(tiny(stage, recipe=recipe, grow=0 if recipe == "classic" else 2, max_iters=8))
    assert len(built) == 1
    stage.main(argv(resume=True, run_dir="run", max_iters=10))
    stage.main(argv(sample_only=True, run_dir="run", device="cpu", max_new_tokens=5))
    assert len(built) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        built[0].max_iters = 3


@both_recipes
def test_what_varies_with_the_step_is_a_function_of_settings_and_step(stage, recipe):
    config = config_of(stage, recipe=recipe, max_iters=30, warmup_iters=4, grow=2, block_size=16)
    steps = list(range(31))
    before = [(stage.learning_rate(config, step), stage.row_length(config, step)) for step in steps[:-1]]
    again = {step: (stage.learning_rate(config, step), stage.row_length(config, step)) for step in reversed(steps)}
    assert before == [again[step] for step in steps[:-1]]
    assert [length for _, length in before] == [4] * 10 + [8] * 10 + [16] * 10


def test_a_run_without_max_iters_plans_its_steps_and_a_resumed_one_keeps_the_plan(stage):
    Path("songs.txt").write_text(TEXT * 2, encoding="utf-8")
    way = argv(**{name: value for name, value in (TINY | STAGES[stage.__name__]).items() if name != "max_iters"},
               input="songs.txt", run_dir="run", patience=1, learning_rate=1, warmup_iters=0)
    metrics = stage.main(way)
    planned = json.loads(Path("run/config.json").read_text())["options"]["max_iters"]
    tokens = round(metrics["tokens_per_vocab_entry"] * metrics["vocab_size"])
    assert planned == checkpoint("run/model_last.pt")["config"]["max_iters"] == stage.EPOCHS * tokens // 64 > 100
    assert metrics["iters"] < planned  # it got no better, so it ended early
    assert stage.main(argv(resume=True, run_dir="run", patience=2))["iters"] < planned
    assert checkpoint("run/model_last.pt")["config"]["max_iters"] == planned
    Path("run/songs.txt").write_text(TEXT, encoding="utf-8")
    further = argv(load_url=address("run/model_best.pt"), input="run/songs.txt", run_dir="further", device="cpu", patience=1,
                   batch_size=64, eval_interval=1, learning_rate=1, warmup_iters=0)
    stage.main(further)  # a new run: a plan of its own
    assert json.loads(Path("further/config.json").read_text())["options"]["max_iters"] == 100


def test_help_fits_a_terminal_and_tells_every_option_and_what_sizes_and_recipes_set(stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        stage.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    assert all(f"--{f.name} " in text or f"--{f.name}\n" in text for f in fields(stage.Config))
    words = " ".join(text.split())
    for name, preset in (stage.SIZES | stage.RECIPES).items():
        told = re.search(rf"{name}: ({next(iter(preset))} .*?)(?= \w+: |$)", words)[1]
        assert {tuple(part.split()) for part in told.split(", ")} == {(option, str(value)) for option, value in preset.items()}


# ------------------------------------------------------------------------------------- tokenizer and text
@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_every_text_comes_back_from_its_numbers(text):
    gpt = importlib.import_module("gpt")
    tokenizer = gpt.make_tokenizer({}, text, None)
    ids = tokenizer.encode(text + gpt.END)
    assert "".join(tokenizer.stream(ids.tolist())) == text + gpt.END
    assert ids[-1] == tokenizer.end == len(set(text)) and tokenizer.count_chars(ids).sum() == len(text) + 1
    again = gpt.CharTokenizer(**tokenizer.state)
    assert torch.equal(again.encode(text), ids[:-1]) and again.start == tokenizer.start


@pytest.mark.parametrize(("characters", "dtype"), [(254, torch.uint8), (255, torch.int32), (3000, torch.int32)])
def test_numbers_are_kept_in_a_small_type(characters, dtype):
    gpt = importlib.import_module("gpt")
    text = "".join(map(chr, range(0x100, 0x100 + characters)))
    tokenizer = gpt.make_tokenizer({}, text, None)
    assert tokenizer.encode(text).dtype == dtype and tokenizer.vocab_size == characters + 1
    assert tokenizer.encode(text).tolist() == list(range(characters))


@pytest.mark.parametrize(("text", "start"), [("ab\ncd\0ef", "\0"), ("ab\ncd", "\n"), ("abcd", "a")])
def test_a_text_without_a_prompt_starts_where_a_song_a_line_or_the_text_does(text, start):
    gpt = importlib.import_module("gpt")
    assert gpt.make_tokenizer({}, text, None).start == start


@pytest.mark.parametrize(("raw", "text"), [
    ("jeden\n<|endoftext|>\ndwa\n", "jeden\0dwa\n"),
    ("\ufeffjeden\r\n<|endoftext|>\r\ndwa <|endoftext|>\r\n", "jeden\0dwa <|endoftext|>\n"),  # a BOM, Windows line ends
    ("jeden\rdwa", "jeden\ndwa"),
    ("<|endoftext|>\njeden\n\n<|endoftext|>\n<|endoftext|>\ndwa\n<|endoftext|>", "jeden\n\0dwa"),  # no empty songs
    ("jeden\n<|endoftext|> \ndwa\n \t<|endoftext|>\ntrzy\r\n <|endoftext|> \r\n", "jeden\0dwa\0trzy"),  # spaces around it
    (" <|endoftext|>\n<|endoftext|> x\n", "<|endoftext|> x\n"),  # the second is not a line of its own
    ("Cho\u0301r\n<|endoftext|>\nz\u0307o\u0301l\u0301c\n", "Chór\0żóĺc\n"),  # decomposed letters, as a Mac has them
])
def test_songs_are_read(stage, raw, text):
    Path("songs.txt").write_bytes(raw.encode())
    assert stage.read_corpus("songs.txt") == text


SONGS = [f"Utwór numer {i}\nidzie sobie noc\na za nią dzień numer {i}" for i in range(9)]


@pytest.mark.parametrize(("text", "mark"), [
    ("\n".join(f"<|startoftext|>{song}<|endoftext|>" for song in SONGS), "<|startoftext|>"),
    ("\n---\n".join(SONGS), "---"), ("\n=====\n".join(SONGS), "====="), ("\n</s>\n".join(SONGS), "</s>"),
    ("<|endoftext|>".join(SONGS), "<|endoftext|>"), ("\n<|EndOfText|>\n".join(SONGS), "<|EndOfText|>"),
    ("\n<|endoftext|>\n".join([*SONGS[:8], f"<|startoftext|>{SONGS[8]}"]), "<|startoftext|>")])
def test_another_mark_between_songs_is_told(stage, capsys, text, mark):
    Path("songs.txt").write_text(text, encoding="utf-8")
    assert stage.read_corpus("songs.txt").replace(stage.END, SEPARATOR) == text
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {mark} in songs.txt is read as text") and "<|endoftext|> separates" in note


@pytest.mark.parametrize("text", ["\n<|endoftext|>\n".join(SONGS), "\n<|endoftext|> \n".join(SONGS), "\n<|endoftext|>\n".join(
    f"{song}\n---\n{song}" for song in SONGS), "Serce <3 i -- kreski\n", SONGS[0]])
def test_no_note_without_a_reason(stage, capsys, text):
    Path("songs.txt").write_text(text, encoding="utf-8")
    stage.read_corpus("songs.txt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("corpus", "prompt"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_decomposed_letters_are_composed_in_text_and_prompt(stage, corpus, prompt):
    text = "Różowa łódź płynie w górę rzeki\nChłód, żółć i gęś, noc i źdźbło\n" * 30
    assert unicodedata.is_normalized("NFC", text)
    for form, folder in ((corpus, "odd"), ("NFC", "plain")):
        Path("songs.txt").write_text(unicodedata.normalize(form, text), encoding="utf-8")
        metrics = stage.main(tiny(stage, run_dir=folder, prompt=unicodedata.normalize(prompt, "górę")))
        assert metrics["vocab_size"] == len(set(text)) + 1 or stage.__name__ != "gpt"
    assert sample("odd") == sample("plain") and sample("odd").startswith("górę") and same(weights("odd"), weights("plain"))
    stage.main(argv(sample_only=True, run_dir="odd", prompt=unicodedata.normalize(prompt, "żółć"), max_new_tokens=5))
    assert sample("odd").startswith("żółć")


@pytest.mark.parametrize(("text", "cut"), [
    ("a" * 100, 90),
    ("a" * 87 + "\0" + "a" * 4 + "\0" + "a" * 7, 88),  # two song boundaries, after 88 and 93: the nearer one
    ("a" * 86 + "\0" + "a" * 4 + "\0" + "a" * 8, 92),
    ("a" * 84 + "\0" + "a" * 4 + "\n" + "a" * 10, 85),  # a song boundary in reach wins over a nearer line end
    ("a" * 83 + "\0" + "a" * 4 + "\n" + "a" * 11, 89),  # out of reach: the line end
    ("a" * 96 + "\0" + "a" * 3, 90),
])
def test_the_split_worked_out_by_hand(stage, text, cut):
    assert stage.split_corpus(text) == (text[:cut], text[cut:])


@given(st.text("a\n\0", min_size=6, max_size=80))
def test_the_split_is_the_best_of_all_cuts(text):
    gpt = importlib.import_module("gpt")
    train, val = gpt.split_corpus(text)
    low, target, high = (round(len(text) * share) for share in (0.85, 0.90, 0.95))
    cuts = range(low, min(high, len(text) - 1) + 1)
    best = next((cuts for cuts in ([cut for cut in cuts if text[cut - 1] == mark] for mark in "\0\n") if cuts), [target])
    assert train + val == text and train and val
    assert abs(len(train) - target) == min(abs(cut - target) for cut in best)


@both_recipes
def test_processes_share_one_draw(stage, recipe):
    config = config_of(stage, recipe=recipe, block_size=8, grow=0, batch_size=6, grad_accum=2)
    whole = draw(stage, torch.arange(100), config, 3, 0, 1)
    assert whole.shape == (2, 6, 9) and torch.equal(whole[..., 1:], (whole[..., :-1] + 1) % 100)
    third = config_of(stage, recipe=recipe, block_size=8, grow=0, batch_size=2, grad_accum=2)
    parts = [draw(stage, torch.arange(100), third, 3, rank, 3).view(4, 9) for rank in range(3)]
    assert torch.equal(torch.stack(parts, dim=1).view(12, 9), whole.view(12, 9))
    assert not torch.equal(draw(stage, torch.arange(100), config, 4, 0, 1), whole)


def followers(text, n, none, end, reach):
    """recall by its definition."""
    found = []
    for here in range(len(text)):
        places = [place for place in range(max(n - 1, here - reach), here)
                  if text[place - n + 1:place + 1] == text[here - n + 1:here + 1] and end not in text[place + 1:here + 1]]
        found.append(text[places[-1] + 1] if places else none)
    return found


@settings(deadline=None, max_examples=300)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=90), n=st.integers(1, 7), end=st.sampled_from([-1, 3]),
       reach=st.integers(1, 60))
def test_what_is_recalled_is_what_followed_the_last_time(text, n, end, reach):
    gpt = importlib.import_module("gpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt, "REACH", reach)
        expected = followers(text, n, 4, end, reach)
        assert gpt.recall(torch.tensor(text, dtype=torch.uint8), n, 4, end).tolist() == expected
        memory = gpt.Memory([n, 2], 4, end)
        assert [memory.add(token)[0] for token in text] == expected


def test_recall_knows_the_rest_of_the_line(stage):
    ids = torch.tensor(list(b"tra la la"))
    assert bytes(stage.recall(ids, 2, 0).tolist()) == b"\0" * 6 + b"la "
    assert bytes(stage.recall(ids, 99, 0).tolist()) == b"\0" * 9


def test_recall_reads_a_long_text_in_parts(stage):
    ids, part = torch.randint(3, (2**20 + 5000,), generator=torch.Generator().manual_seed(1)), slice(2**20 - 4000, None)
    for n in (5, 10):
        whole, alone = stage.recall(ids, n, 3), stage.recall(ids[part], n, 3)
        assert torch.equal(whole[part][stage.REACH + n:], alone[stage.REACH + n:])
        assert 0.1 < (whole == 3).double().mean() or n == 5


def test_a_refrain_is_learned_by_recall(stage):
    """Songs of four random lines that are all sung twice: only by looking them up can the second time be known."""
    words = random.Random(1)
    lines = ["".join(words.choices("abcdefgh", k=24)) for _ in range(200)]
    songs = ["\n".join(lines[i:i + 4] * 2) for i in range(0, 200, 4)]
    Path("songs.txt").write_text(SEPARATOR.join(songs), encoding="utf-8")
    shape = dict(max_iters=80, eval_interval=20, block_size=32, n_embd=32, dropout=0, learning_rate=2e-2)
    metrics = {recall: stage.main(tiny(stage, recall=recall, run_dir=f"run{recall}", **shape)) for recall in ("3,6", "")}
    assert metrics["3,6"]["refrain_share"] == metrics[""]["refrain_share"] > 0.3
    assert metrics["3,6"]["refrain_bpc"] < 0.5 * metrics[""]["refrain_bpc"]
    assert metrics["3,6"]["refrain_bpc"] < 0.5 * metrics["3,6"]["other_bpc"]


def test_a_repeated_line_is_one_that_stood_in_the_3000_characters_before(stage):
    line = "Noc nad miastem!"
    text = f"{line}\nkrótka\n{line.upper()}\0krótka\n{'x' * 2990}\n{line}\n{line[:11]}"
    marked = "".join(char for char, mark in zip(text, stage.repeated(text).tolist()) if mark)
    assert marked == line.upper()
    assert stage.repeated(line + "\n" + line).sum() == len(line)


@numeric
def test_bits_in_repeated_lines_and_elsewhere_make_up_all_bits(stage, run):
    saved = stage.load_checkpoint("run/model_best.pt")
    config, tokenizer = stage.Config(**saved["config"]), stage.make_tokenizer({}, "", saved)
    model = stage.GPTLanguageModel(config, tokenizer.vocab_size)
    model.load_state_dict(saved["model"])
    train, val = stage.split_corpus(stage.read_corpus("songs.txt"))
    ids = torch.cat((tokenizer.encode(train)[-1:], tokenizer.encode(val)))
    data = stage.with_recall(ids, config, tokenizer)
    parts = stage.by_repetition(model, data, tokenizer, config, saved["context"])
    _, bits = stage.evaluate(model, data, tokenizer, config, saved["context"])
    share = parts["refrain_share"]
    assert share * parts["refrain_bpc"] + (1 - share) * parts["other_bpc"] == pytest.approx(bits, rel=1e-4)
    assert parts.items() <= json.loads(Path("run/metrics.json").read_bytes()).items()
    assert share == pytest.approx(stage.repeated(val).double().mean().item(), abs=0.2)


def test_classic_windows_begin_at_every_position(stage):
    config = config_of(stage, recipe="classic", block_size=4, batch_size=200)
    drawn = torch.cat([draw(stage, torch.arange(9), config, step, 0, 1) for step in range(3)])
    assert set(drawn[..., 0].unique().tolist()) == {0, 1, 2, 3, 4} and drawn.max() == 8


@pytest.mark.parametrize("length, batch_size", [(100, 1), (100, 4), (96, 6), (100, 50), (9, 5)])
def test_modern_reads_nothing_twice_before_all_is_read(stage, length, batch_size):
    """... but for less than a window. The text is a ring, each epoch cut and shuffled in its own way."""
    config, rows = config_of(stage, block_size=8, grow=0, batch_size=batch_size, grad_accum=2), length // 8
    steps = range(math.ceil(3 * rows / (2 * batch_size)))
    drawn = torch.cat([draw(stage, torch.arange(length), config, step, 0, 1).flatten(0, 1) for step in steps])
    assert torch.equal(drawn[:, 1:], (drawn[:, :-1] + 1) % length)
    epochs = drawn[:3 * rows, :-1].reshape(3, -1)
    assert [len(epoch.unique()) for epoch in epochs] == [rows * 8] * 3
    assert rows == 1 or len({tuple(epoch.tolist()) for epoch in epochs}) == 3


@both_recipes
def test_rows_grow_until_they_are_as_long_as_the_context(stage, recipe):
    config = config_of(stage, recipe=recipe, block_size=16, batch_size=3, grad_accum=2, grow=2, max_iters=8)
    ids = torch.arange(96)
    shapes = [tuple(draw(stage, ids, config, step, 0, 1).shape) for step in range(8)]
    assert shapes == [(2, 12, 5)] * 3 + [(2, 6, 9)] * 3 + [(2, 3, 17)] * 2  # as many tokens in each step
    whole, third = draw(stage, ids, config, 0, 0, 1), config_of(stage, **asdict(config) | dict(batch_size=1))
    parts = [draw(stage, ids, third, 0, rank, 3).view(8, 5) for rank in range(3)]
    assert torch.equal(torch.stack(parts, dim=1).view(24, 5), whole.view(24, 5))
    if recipe == "modern":  # a step is all of this text, whatever the rows' length
        drawn = [draw(stage, ids, config, step, 0, 1)[..., :-1].flatten().tolist() for step in range(8)]
        assert all(sorted(step) == ids.tolist() for step in drawn)
    assert stage.row_length(config_of(stage, grow=3, block_size=2, max_iters=1), 0) == 1
    assert stage.row_length(config_of(stage, grow=0, block_size=13, max_iters=3), 0) == 13


def test_classic_rows_do_not_grow_unless_asked(stage):
    assert config_of(stage, recipe="classic", size="tiny").grow == 0
    assert config_of(stage, recipe="classic", size="tiny", grow=2).grow == 2


# -------------------------------------------------------------------------------------------------- model
def test_the_original_model_has_its_number_of_parameters(stage):
    shape = dict(size="base", n_layer=6, n_head=6, n_embd=384, block_size=256)
    counts = [sum(p.numel() for p in stage.GPTLanguageModel(config_of(stage, recipe=recipe, **shape), 158).parameters())
              for recipe in ("classic", "modern")]
    assert counts[0] == 10_860_446
    assert abs(counts[1] / counts[0] - 1) < 0.035  # recall has three matrices


@numeric
def test_attention_equals_the_fused_one_in_values_and_gradients(stage, float64):
    attention = model_of(stage, "classic").blocks[0].attention
    x = torch.randn(3, 12, 16, requires_grad=True)
    ours = attention(x, torch.full((12, 12), -math.inf).triu(1))
    parts = attention.query, attention.key, attention.value
    q, k, v = (part(x).view(3, 12, 2, 8).transpose(1, 2) for part in parts)
    fused = attention.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 12, 16))
    torch.testing.assert_close(ours, fused)
    up, leaves = torch.randn_like(ours), [x, *(part.weight for part in parts)]
    for a, b in zip(*(torch.autograd.grad(out, leaves, up, retain_graph=True) for out in (ours, fused))):
        torch.testing.assert_close(a, b)


@numeric
def test_modern_attention_equals_one_with_loops_over_positions_and_heads(stage, float64):
    model = model_of(stage)
    attention, mask, x = model.blocks[0].attention, model.mask, torch.randn(1, 12, 16)
    ours = attention(x, mask, model.rope)
    q, k, v = (part(x).view(12, 2, 8) for part in (attention.query, attention.key, attention.value))  # (T, nh, hs) each
    q, k = attention.qk_norm(q), attention.qk_norm(k)

    def turned(vector, position):
        """Each pair of numbers as a complex one, turned by an angle that grows with the position."""
        pairs = [complex(vector[i].item(), vector[i + 4].item()) for i in range(4)]
        pairs = [pair * complex(math.cos(angle), math.sin(angle)) for i, pair in enumerate(pairs)
                 for angle in [position / 10000 ** (2 * i / 8)]]
        return torch.tensor([pair.real for pair in pairs] + [pair.imag for pair in pairs])

    out = torch.zeros(12, 2, 8)
    for head in range(2):
        for t in range(12):
            scores = [turned(q[t, head], t).dot(turned(k[s, head], s)).item() / math.sqrt(8) for s in range(t + 1)]
            total = sum(map(math.exp, scores))
            for s, score in enumerate(scores):
                out[t, head] += math.exp(score) / total * v[s, head]
    torch.testing.assert_close(ours[0], attention.proj(out.view(12, 16)))


@numeric
def test_feed_forward_is_relu_or_swiglu(stage, float64):
    x = torch.randn(2, 5, 16)
    classic, modern = (model_of(stage, recipe).blocks[0].feed_forward for recipe in ("classic", "modern"))
    expected = (x @ classic.up.weight.T + classic.up.bias).clamp(min=0) @ classic.down.weight.T + classic.down.bias
    torch.testing.assert_close(classic(x), expected)
    gate, up = x @ modern.gate.weight.T, x @ modern.up.weight.T
    torch.testing.assert_close(modern(x), gate * torch.sigmoid(gate) * up @ modern.down.weight.T)


@numeric
def test_the_modern_norm_is_rmsnorm_of_what_is_centred(stage, float64):
    norm, x = model_of(stage).norm, 3 + torch.randn(2, 5, 16)
    torch.testing.assert_close(norm(x), F.rms_norm(x - x.mean(dim=-1, keepdim=True), (16,), norm.weight, eps=norm.eps))


@numeric
@both_recipes
def test_no_position_sees_the_future_and_each_sees_the_whole_past(stage, recipe, float64):
    model, idx = model_of(stage, recipe).eval(), torch.randint(4, (1, 12))  # few letters: much repeats
    before = model(idx, recalled=recalled_in(stage, model, idx))
    for position in range(12):
        changed = idx.clone()
        changed[0, position] = (changed[0, position] + 1) % 20
        after = model(changed, recalled=recalled_in(stage, model, changed))
        differs = ((after - before).abs() > 1e-10).any(dim=-1)[0]  # rounding in float64 is 1e-15
        assert differs.tolist() == [False] * position + [True] * (12 - position)


@numeric
@both_recipes
def test_the_cache_changes_no_scores_however_the_text_is_cut(stage, recipe, float64):
    model, idx = model_of(stage, recipe).eval(), torch.randint(20, (3, 12))
    whole = model(idx)
    for sizes in ([1] * 12, [5, 1, 1, 3, 2], [12], [11, 1]):
        cache, past, parts = {}, 0, []
        for size in sizes:
            parts.append(model(idx[:, past:past + size], cache=cache, past=past))
            past += size
        torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@numeric
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(100_003,), (7, 100, 150)])
def test_dropout_drops_its_share_anywhere_and_keeps_the_mean(stage, p, shape):
    torch.manual_seed(0)
    dropout, x = stage.Dropout(p), torch.ones(shape, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    exact = round(256 * p) / 256
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - exact)]) and torch.equal(x.grad, y)
    for part in (y == 0).flatten().float().chunk(8) + tuple((y == 0).flatten()[i::8].float() for i in range(8)):
        assert part.mean().item() == pytest.approx(exact, abs=0.02)  # about five standard deviations
    assert y.mean().item() == pytest.approx(1, rel=0.05)
    torch.manual_seed(0)
    again = dropout(x)
    assert torch.equal(again, y) and not torch.equal(dropout(x), y)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16
    assert dropout.eval()(x) is x and stage.Dropout(0.0)(x) is x


def test_a_modern_model_starts_as_the_identity(stage):
    shape = dict(block_size=12, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    model, x = stage.GPTLanguageModel(config_of(stage, **shape), 20), torch.randn(1, 12, 16)
    assert torch.equal(model.blocks[0](x, model.mask, model.rope), x)


# ------------------------------------------------------------------------------------------------ learning
def muons_steps(weight, grads, lr, decay):
    """A step of Muon written out: momentum and Nesterov, five Newton-Schulz steps, scaled like AdamW's."""
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        x = 0.95 * momentum + 0.05 * grad
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
        weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(x.shape)) * x
    return weight


@numeric
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muons_step_worked_out_by_hand(stage, shape, float64):
    p, grads = torch.nn.Parameter(torch.randn(shape)), torch.randn(3, *shape)
    expected = muons_steps(p.detach().clone(), grads, lr=0.01, decay=0.1)
    optimizer = stage.Muon([dict(params=[p])], lr=0.01, weight_decay=0.1)
    for p.grad in grads:
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected)


@numeric
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has had one since 2.9")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_takes_the_librarys_step(stage, shape):
    before, grads = torch.randn(shape), torch.randn(3, *shape)
    p, twin = (torch.nn.Parameter(before.clone()) for _ in range(2))
    ours = stage.Muon([dict(params=[p])], lr=0.01, weight_decay=0.1)
    theirs = torch.optim.Muon([twin], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        p.grad, twin.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    # The library iterates in bfloat16: some twenty roundings of up to 0.4 % on the way.
    assert (p - twin).norm() < 0.1 * (p - before).norm()


@numeric
def test_muon_takes_the_matrices_of_a_group_as_separate_ones(stage, float64):
    together = [torch.nn.Parameter(torch.randn(24, 8)) for _ in range(3)]
    apart = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [stage.Muon(groups, lr=0.1, weight_decay=0.1) for groups in (
        [dict(params=together)], [dict(params=[p]) for p in apart])]
    for _ in range(3):
        for p, twin in zip(together, apart):
            p.grad = torch.randn(24, 8)
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, twin in zip(together, apart):
        torch.testing.assert_close(p, twin)


@numeric
@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 8, 8)])
def test_singular_values_are_pushed_towards_one(stage, float64, shape):
    matrices = torch.randn(shape)
    values = torch.linalg.svdvals(stage.orthogonalize(matrices))
    assert 0.6 < values.min() and values.max() < 1.3 and torch.linalg.svdvals(matrices).max() > 4
    turned = torch.linalg.svd(matrices, full_matrices=False)
    out = turned.U.mT @ stage.orthogonalize(matrices) @ turned.Vh.mT  # the directions stay
    torch.testing.assert_close(out, torch.diag_embed(out.diagonal(dim1=1, dim2=2)), atol=1e-9, rtol=0)


@both_recipes
def test_every_parameter_learns_and_the_right_ones_decay(stage, recipe):
    model, config = model_of(stage, recipe), config_of(stage, recipe=recipe, learning_rate=0.1, weight_decay=0.5)
    optimizers = stage.make_optimizers(model, config)
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        decays = recipe == "classic" or "blocks" in name and p.ndim == 2
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays else 1.0), msg=name)


def test_classic_is_adamw_at_a_constant_rate(stage):
    model, config = model_of(stage, "classic"), config_of(stage, recipe="classic")
    (optimizer,) = stage.make_optimizers(model, config)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["betas"] == (0.9, 0.999) and config.grad_clip == 0
    assert [stage.learning_rate(config, step) for step in (0, 1, config.max_iters)] == [3e-4] * 3


def test_the_modern_rate_rises_and_falls_in_straight_lines(stage):
    config = config_of(stage, max_iters=10, warmup_iters=4, learning_rate=0.6)
    assert [stage.learning_rate(config, step) for step in range(11)] == pytest.approx(
        [0.12, 0.24, 0.36, 0.48, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])
    config = config_of(stage, max_iters=4, warmup_iters=0, learning_rate=1.0)
    assert [stage.learning_rate(config, step) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    config = config_of(stage, max_iters=3, warmup_iters=9, learning_rate=1.0)
    assert [stage.learning_rate(config, step) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0])


@numeric
@both_recipes
def test_two_batches_added_up_are_one_of_twice_the_size(stage, recipe, float64):
    common = dict(recipe=recipe, dropout=0.0, warmup_iters=0)
    stage.main(tiny(stage, **common, run_dir="one", batch_size=4))
    stage.main(tiny(stage, **common, run_dir="two", batch_size=2, grad_accum=2))
    for name, p in weights("one").items():
        torch.testing.assert_close(p, weights("two")[name], atol=1e-6, rtol=1e-6)


@numeric
def test_gradients_are_clipped(stage, float64):
    """Plain descent at rate 1 moves the weights by the gradient."""
    norms = {}
    for clip in (0, 0.01):
        learner = Learner(stage, recipe="classic", learning_rate=1.0, grad_clip=clip)
        learner.optimizers = [torch.optim.SGD(learner.model.parameters(), lr=1.0)]
        before = [p.detach().clone() for p in learner.model.parameters()]
        learner.step()
        norms[clip] = math.sqrt(sum((p - old).square().sum().item() for p, old in zip(learner.model.parameters(), before)))
    assert norms[0] > 0.1 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


@numeric
def test_a_step_takes_the_gradient_of_the_mean_loss(stage, float64):
    learner = Learner(stage, recipe="classic", learning_rate=0.5, dropout=0.0, grad_accum=3)
    learner.model = model_of(stage, "classic", vocab_size=learner.model.lm_head.out_features, block_size=16)
    learner.optimizers = [torch.optim.SGD(learner.model.parameters(), lr=9.0)]
    rows = stage.draw_batch(learner.data, learner.config, 0, 0, 1).flatten(0, 1)[..., 0]
    logits = learner.model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in learner.model.named_parameters()}
    learner.model.zero_grad()
    assert learner.step() == pytest.approx(loss.item(), rel=1e-5)  # the loss is in float32
    for name, p in learner.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], atol=1e-5, rtol=1e-5)
        assert p.grad is None


@numeric
@both_recipes
def test_a_model_memorizes_a_text(stage, recipe):
    Path("songs.txt").write_text("Noc nad miastem\n" * 100, encoding="utf-8")
    metrics = stage.main(tiny(stage, recipe=recipe, recall="", max_iters=120, dropout=0, learning_rate=2e-2, temperature=0))
    assert metrics["val_bpc"] < 0.1
    assert "Noc nad miastem\n" in sample("run")


# --------------------------------------------------------------------------------------------- evaluation
@numeric
def test_bits_per_character_worked_out_by_hand(stage):
    """A model that gives a, b, c and the end 1/2, 1/4, 1/8 and 1/8, whatever it reads: a, b, c, a take 1 + 2 + 3 + 1 bits."""
    model = model_of(stage, "classic", vocab_size=4, block_size=3)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    tokenizer = importlib.import_module("gpt").CharTokenizer("abc")
    config = config_of(stage, block_size=3, batch_size=2)
    nats, bits = stage.evaluate(model, tokenizer.encode("cabca")[:, None], tokenizer, config, 3)
    assert bits == pytest.approx(7 / 4, rel=1e-5) and nats == pytest.approx(7 / 4 * math.log(2), rel=1e-5)  # in float32


@numeric
@both_recipes
@pytest.mark.parametrize(("size", "count"), [(12, 40), (12, 37), (12, 36), (12, 5), (12, 2), (2, 9), (7, 50)])
def test_each_validation_token_is_predicted_exactly_once(stage, recipe, size, count, float64):
    model, ids = model_of(stage, recipe, dropout=0.5, block_size=size), torch.randint(20, (count,), dtype=torch.uint8)
    tokenizer = importlib.import_module("gpt").CharTokenizer("".join(map(chr, range(65, 84))))
    nats = []
    config = config_of(stage, recipe=recipe, recall="1,3" if recipe == "modern" else "")
    data = stage.with_recall(ids, config, tokenizer)
    half = max(1, size // 2)
    for position in range(1, count):  # one at a time, from the start of its window
        start = max(0, -(-(position - size) // half) * half)
        told = data[None, start:position].long()
        scores = model.eval()(told[..., 0], recalled=told[..., 1:])[0, -1]
        nats.append(-scores.log_softmax(dim=-1)[int(ids[position])].item())
    for batch in (1, 3, 64):
        config = config_of(stage, block_size=size, batch_size=batch)
        loss, bits = stage.evaluate(model.train(), data, tokenizer, config, size)
        assert loss == pytest.approx(sum(nats) / (count - 1), rel=1e-5) and bits == pytest.approx(loss / math.log(2))
        assert (loss, bits) == stage.evaluate(model.train(), data, tokenizer, config, size)
        config = config_of(stage, block_size=size, batch_size=batch, eval_iters=2)
        seen = nats[:size + (2 * batch - 1) * half]
        assert stage.evaluate(model, data, tokenizer, config, size)[0] == pytest.approx(sum(seen) / len(seen), rel=1e-5)


def test_training_and_validation_read_their_own_part(stage):
    train, val = stage.split_corpus(TEXT)
    train2, val2 = (part.replace("łatwo", "wołat") for part in (train, val))
    texts = dict(whole=train + val, other_val=train + val2, other_train=train2 + val)
    for name, text in texts.items():
        Path(f"{name}.txt").write_text(text, encoding="utf-8")
        stage.main(tiny(stage, input=f"{name}.txt", run_dir=name))
    assert same(weights("whole"), weights("other_val")) and not same(weights("whole"), weights("other_train"))
    first = {name: history(name)[0]["val_loss"] for name in texts}  # before the first step all models are the same
    assert first["whole"] == first["other_train"] != first["other_val"]


# ------------------------------------------------------------------------------------------------ sampling
def by_hand(logits, temperature, top_k, top_p):
    """The probability of each token: the k likeliest, of these the fewest that make up top_p."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k or None]
    shares = [math.exp(logits[i] / temperature) for i in ranked]
    kept, total = [], 0
    for i, share in zip(ranked, shares):
        if total >= top_p * sum(shares) and top_p < 1:
            break
        kept.append((i, share))
        total += share
    return [dict(kept).get(i, 0) / total for i in range(len(logits))]


@numeric
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.5, 4, 0.8), (1.0, 50, 0.95), (1.0, 0, 1e-9),
    (1.0, 1, 1.0)])
def test_tokens_are_drawn_with_their_probabilities(stage, temperature, top_k, top_p):
    logits = [0.3, -1.0, 2.0, 0.1, 1.5, -0.4, 0.9]
    rows, generator = torch.tensor(logits).expand(50_000, -1), torch.Generator().manual_seed(1)
    drawn = stage.draw_token(rows, temperature, top_k, top_p, generator)
    shares = drawn.bincount(minlength=7) / len(drawn)
    expected = torch.tensor(by_hand(logits, temperature, top_k, top_p))
    assert drawn.shape == (50_000,) and torch.equal(shares > 0, expected > 0)
    torch.testing.assert_close(shares, expected, atol=0.0125, rtol=0)  # five and a half standard deviations at most


def test_temperature_zero_takes_the_likeliest(stage):
    logits = torch.randn(9, 20)
    assert torch.equal(stage.draw_token(logits, temperature=0), logits.argmax(dim=-1))


@numeric
@both_recipes
@pytest.mark.parametrize("size", [2, 5, 12])
def test_generate_is_reading_anew_also_past_the_context(stage, recipe, size, float64):
    model, prompt = model_of(stage, recipe, block_size=size, dropout=0.5), torch.randint(20, (2, 15))
    for length, how in ((1, dict(temperature=0)), (size, dict(temperature=0)), (15, dict(temperature=0.9, top_k=9, top_p=0.9))):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        ours = list(stage.generate(model.train(), prompt[:, :length], 30, size, generator=generators[0], end=7, **how))
        text, count, theirs = prompt[:, :length], min(length, size), []  # count: how many positions the model sees
        model.eval()
        for _ in range(30):
            if count > size:
                count = size // 2  # full: the last half is kept
            recalled = recalled_in(stage, model, text, end=7)
            logits = model(text[:, -count:], recalled=recalled[:, -count:])[:, -1]
            theirs.append(stage.draw_token(logits, generator=generators[1], **how))
            text, count = torch.cat((text, theirs[-1][:, None]), dim=1), count + 1
        assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_generate_reads_each_token_once_while_the_text_fits(stage):
    model, read = model_of(stage), []
    model.register_forward_pre_hook(lambda model, args: read.append(args[0].size(1)))
    list(stage.generate(model, torch.zeros(1, 4, dtype=torch.long), 20, 12))
    assert read == [4, 1, 1, 1, 1, 1, 1, 1, 1] + [6, 1, 1, 1, 1, 1, 1] + [6, 1, 1, 1]


@numeric
def test_samples_come_from_the_seed(stage, run):
    def sampled(**options):
        stage.main(argv(sample_only=True, run_dir=run, device="cpu", dtype="float32", max_new_tokens=60, **options))
        return sample(run)

    one, three = sampled(), sampled(num_samples=3)
    assert one == sampled() != sampled(seed=1)
    assert three.startswith(one.removesuffix("\n") + SEPARATOR) and len(set(three.split(SEPARATOR))) >= 3
    greedy = sampled(temperature=0)
    assert greedy == sampled(temperature=0, seed=1) == sampled(top_k=1) == sampled(top_p=1e-9)


def test_what_is_printed_is_what_is_saved(stage, run, capsys):
    stage.main(argv(sample_only=True, run_dir=run, num_samples=2, prompt="Noc", max_new_tokens=100))
    out, text = capsys.readouterr().out, sample(run)
    assert text in out and text.startswith("Noc") and f"{SEPARATOR}Noc" in text and "\0" not in text
    assert out.endswith(f"-> {run / 'output' / 'sample.txt'}\n")


def test_a_text_ends_where_the_song_does_if_asked(stage, run):
    common = dict(sample_only=True, run_dir=run, max_new_tokens=400, temperature=1.5, top_p=1)
    stage.main(argv(**common))
    songs = sample(run).split(SEPARATOR)
    stage.main(argv(**common, stop_at_end=True))
    assert len(songs) > 1 and sample(run) == songs[0] + "\n"


def test_a_prompt_longer_than_the_context_is_kept_whole(stage, run, capsys):
    prompt = SONG[:50]
    stage.main(argv(sample_only=True, run_dir=run, prompt=prompt, temperature=0, max_new_tokens=30))
    assert re.search("^note: .*last 16 tokens", capsys.readouterr().out, re.MULTILINE)
    long = sample(run)
    stage.main(argv(sample_only=True, run_dir=run, prompt=prompt[-16:], temperature=0, max_new_tokens=30))
    assert "note" not in capsys.readouterr().out
    assert long.startswith(prompt) and long[50:] == sample(run)[16:]


def test_looking_at_a_run_does_not_change_it(stage, capsys):
    stage.main(tiny(stage, run_dir="quiet", eval_interval=10, max_iters=6))
    assert "Noc" not in capsys.readouterr().out
    stage.main(tiny(stage, run_dir="watched", eval_interval=1, sample_interval=2, max_iters=6, prompt="Noc"))
    out = capsys.readouterr().out
    assert same(weights("quiet"), weights("watched"))
    assert len(re.findall("^Noc", out, re.MULTILINE)) == 4  # after steps 2, 4 and 6, and the samples at the end


# -------------------------------------------------------------------------------------------------- a run
def test_a_run_leaves_its_files_and_returns_its_metrics(stage, trained):
    run, text = trained, stage.read_corpus("songs.txt")
    assert {path.name for path in run.iterdir()} == RUN
    assert {path.name for path in (run / "output").iterdir()} == {"sample.txt"}
    metrics, last = json.loads((run / "metrics.json").read_text()), checkpoint(run / "model_last.pt")
    assert {"stage", "params", "vocab_size", "chars_per_token", "tokens_per_vocab_entry", "val_loss", "val_bpc", "best_iter",
            "iters", "seconds", "tokens_per_second", "device", "dtype", "seed"} <= metrics.keys()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of this process, which only grows
    assert 100 < metrics["peak_memory_mb"] <= most + 1
    assert metrics["params"] == sum(p.numel() for p in last["model"].values())
    assert metrics["vocab_size"] == len(set(text) | {"\0"}) and metrics["chars_per_token"] == 1
    assert metrics["tokens_per_vocab_entry"] == len(stage.split_corpus(text)[0]) / metrics["vocab_size"]
    assert metrics["tokens_per_second"] == pytest.approx(5 * 4 * 16 / metrics["seconds"])
    assert (metrics["iters"], metrics["device"], metrics["dtype"], metrics["seed"]) == (5, "cpu", "float32", 2115)
    best = min(history(run), key=lambda line: line["val_loss"])
    assert (metrics["val_loss"], metrics["val_bpc"], metrics["best_iter"]) == (best["val_loss"], best["val_bpc"], best["iter"])
    config = json.loads((run / "config.json").read_text())
    assert config["options"] == last["config"] and config["options"].keys() == {f.name for f in fields(stage.Config)}
    assert config["versions"]["torch"] == torch.__version__ and "python" in config["versions"] and config["device"] == "cpu"
    assert config["corpus_sha256"] == last["corpus_sha256"] and re.fullmatch("[0-9a-f]{64}", last["corpus_sha256"])
    assert last.keys() == {"stage", "format_version", "config", "tokenizer", "model", "optimizers", "scaler", "history",
                           "context", "corpus_sha256"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("system, unit", [("linux", 2**10), ("darwin", 2**20), ("win32", None)])
def test_peak_memory_in_each_system_s_unit(stage, monkeypatch, system, unit):
    monkeypatch.setattr(sys, "platform", system)
    if not unit:
        monkeypatch.setitem(sys.modules, "resource", None)  # Windows has no such module
        assert stage.peak_memory("cpu") is None
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        assert stage.peak_memory("cpu") == pytest.approx(peak, rel=0.05, abs=0.1)


def test_main_returns_what_metrics_json_holds(stage):
    metrics = stage.main(tiny(stage, max_iters=7))
    assert metrics == json.loads(Path("run/metrics.json").read_text())
    assert [line["iter"] for line in history("run")] == [0, 5, 7]  # the last step is always evaluated
    config = config_of(stage, max_iters=7)
    assert [line["learning_rate"] for line in history("run")] == [stage.learning_rate(config, step) for step in (0, 5, 7)]


def test_a_run_that_is_sampled_from_again_keeps_all_texts(stage, run):
    known = sample(run)
    stage.main(argv(sample_only=True, run_dir=run, seed=1, max_new_tokens=5))
    stage.main(argv(sample_only=True, run_dir=run, seed=2, max_new_tokens=5))
    kept = [path.read_text("utf-8") for path in (run / "output").iterdir()]
    assert len(kept) == 3 and known in kept and sample(run) in kept


@numeric
def test_a_run_that_gets_no_better_ends_early_and_samples_from_its_best_model(stage):
    metrics = stage.main(tiny(stage, recipe="classic", learning_rate=1, max_iters=50, eval_interval=2, patience=3))
    losses = [line["val_loss"] for line in history("run")]
    assert metrics["iters"] == 2 * (len(losses) - 1) < 50 and losses.index(min(losses)) == len(losses) - 4
    assert metrics["best_iter"] == steps_of("run/model_best.pt") == metrics["iters"] - 6
    text = sample("run")
    stage.main(argv(sample_only=True, run_dir="run", device="cpu", dtype="float32", max_new_tokens=20))
    assert sample("run") == text
    assert stage.main(argv(resume=True, run_dir="run", max_iters=60))["iters"] == metrics["iters"]  # patience is over
    assert stage.main(argv(resume=True, run_dir="run", max_iters=60, patience=0))["iters"] == 60


def test_a_text_of_many_different_characters(stage):
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    Path("songs.txt").write_text(alphabet * 5, encoding="utf-8")
    metrics = stage.main(tiny(stage))
    assert math.isfinite(metrics["val_loss"]) and metrics["vocab_size"] == 301
    assert set(sample("run").replace(SEPARATOR, "")) <= set(alphabet + "\n")


def test_a_text_of_more_characters_than_lie_below_the_surrogates(stage):
    alphabet = "".join(chr(code) for code in range(0x20, 0x11000) if not 0xD800 <= code < 0xE000)
    alphabet = "".join(dict.fromkeys(unicodedata.normalize("NFC", alphabet)))
    Path("songs.txt").write_text(alphabet, encoding="utf-8")
    assert len(set(stage.read_corpus("songs.txt"))) > 55_296
    assert stage.main(tiny(stage, max_iters=1, prompt="\U00010fff", eval_iters=1))["iters"] == 1
    assert sample("run")[0] == "\U00010fff"


@numeric
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_and_continues(stage, dtype):
    metrics = stage.main(tiny(stage, dtype=dtype, max_iters=10))
    assert metrics["dtype"] == dtype and history("run")[-1]["val_loss"] < history("run")[0]["val_loss"]
    assert stage.main(argv(resume=True, run_dir="run", max_iters=12))["dtype"] == dtype


@numeric
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["lm_head.weight", "blocks.0.attention.proj.weight"])
def test_an_overflow_in_float16_skips_the_step_of_both_optimizers(stage, name, bad):
    learner = Learner(stage, dtype="float16")
    parameters = dict(learner.model.named_parameters())
    learner.step()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    hook = parameters[name].register_hook(lambda grad: grad + bad)
    learner.step()
    hook.remove()
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    learner.step()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in parameters.items())


def test_training_works_outside_the_main_thread(stage):
    thread = threading.Thread(target=stage.main, args=(tiny(stage),))
    thread.start()
    thread.join()
    assert {path.name for path in Path("run").iterdir()} == RUN


# ------------------------------------------------------------------------------------------------- resume
@contextlib.contextmanager
def before_step(stage, step, action):
    """Do this just before this step is taken."""
    real = stage.take_step

    def take_step(*args):
        if args[-1] == step:
            action()
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "take_step", take_step)
        yield


def fail(error):
    """A function that raises this."""
    def raises(*args, **options):
        raise error
    return raises


def cut_off(stage, at, argv):
    """Run up to a step, then stop as a crash would."""
    with before_step(stage, at, fail(stage.Stop("cut off", 1))), pytest.raises(SystemExit):
        stage.main(argv)


def test_a_model_uses_the_context_that_it_has_learned(stage, capsys):
    """It is evaluated with rows as long as the last step's, and a checkpoint knows how long they were."""
    seen, real = [], stage.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "evaluate", lambda *args: (seen.append(args[-1]), real(*args))[1])
        common = dict(grow=2, max_iters=6, eval_interval=1, block_size=16, batch_size=4)
        stage.main(tiny(stage, **common, run_dir="whole"))
    assert seen == [16, 4, 4, 8, 8, 16, 16]
    cut_off(stage, 3, tiny(stage, **common, run_dir="cut"))
    assert checkpoint("cut/model_last.pt")["context"] == 8
    capsys.readouterr()
    stage.main(argv(sample_only=True, run_dir="cut", save_path="cut/model_last.pt", prompt="Noc nad tak" * 2))
    assert "sees its last 8 tokens" in capsys.readouterr().out
    stage.main(argv(resume=True, run_dir="cut"))
    assert same(weights("cut"), weights("whole"))


@numeric
@both_recipes
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_resumed_run_is_bit_identical(stage, recipe, dtype):
    common = dict(recipe=recipe, warmup_iters=2, max_iters=10, dropout=0.2, dtype=dtype, grow=1)
    stage.main(tiny(stage, **common, run_dir="whole"))
    cut_off(stage, 7, tiny(stage, **common, run_dir="cut"))
    assert steps_of("cut/model_last.pt") == 5
    torch.manual_seed(time.time_ns())  # a new process would not know the old one's generator
    assert stage.main(argv(resume=True, run_dir="cut"))["iters"] == 10
    assert same(weights("whole"), weights("cut")) and history("whole") == history("cut") and sample("whole") == sample("cut")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_a_resumed_run_is_the_same_to_rounding(stage):
    common = dict(device="cuda", max_iters=10, warmup_iters=2)
    stage.main(tiny(stage, **common, run_dir="whole"))
    cut_off(stage, 7, tiny(stage, **common, run_dir="cut"))
    assert stage.main(argv(resume=True, run_dir="cut"))["iters"] == 10
    for one, two in zip(history("whole"), history("cut")):
        assert one == pytest.approx(two, rel=1e-3)


def test_a_run_killed_just_before_its_last_line_gets_it(stage, run):
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")  # its checkpoint is written already
    stage.main(argv(resume=True, run_dir=run))
    assert (run / "metrics.jsonl").read_text("utf-8") == "".join(lines)


def test_a_longer_run_is_planned_anew_with_a_note(stage, run, capsys):
    metrics = stage.main(argv(resume=True, run_dir=run, max_iters=8))
    out = capsys.readouterr().out
    assert metrics["iters"] == 8 and [line["iter"] for line in history(run)] == [0, 5, 8]
    assert "note: the learning rate and the row length are planned anew for 8 steps" in out
    stage.main(argv(resume=True, run_dir=run))
    assert "planned anew" not in capsys.readouterr().out


def test_lines_later_than_the_checkpoint_are_dropped(stage, run):
    shutil.copy(run / "model_last.pt", "at5.pt")
    stage.main(argv(resume=True, run_dir=run, max_iters=10))
    assert [line["iter"] for line in history(run)] == [0, 5, 10]
    shutil.copy("at5.pt", run / "model_last.pt")
    stage.main(argv(resume=True, run_dir=run, max_iters=7))
    assert [line["iter"] for line in history(run)] == [0, 5, 7]


def test_what_was_not_given_comes_from_the_checkpoint_but_where_to_write(stage):
    stage.main(tiny(stage, size="base", seed=3, prompt="Noc", save_path="best.pt", output="text.txt"))
    before, outside = json.loads(Path("run/config.json").read_text())["options"], tree()
    stage.main(argv(resume=True, run_dir="run"))
    default = dict(save_path="run/model_best.pt", output="run/output/sample.txt")
    assert json.loads(Path("run/config.json").read_text())["options"] == before | default | dict(resume=True)
    assert sample("run") == Path("text.txt").read_text("utf-8")
    assert all(tree()[name] == content for name, content in outside.items() if "run" not in name)


@both_recipes
def test_a_resumed_run_takes_another_weight_decay(stage, recipe):
    for folder, decay in (("strong", 0.9), ("weak", 0.0)):
        stage.main(tiny(stage, recipe=recipe, run_dir=folder, weight_decay=0.0))
        stage.main(argv(resume=True, run_dir=folder, max_iters=8, weight_decay=decay))
    inside = [name for name, p in weights("weak").items() if "blocks" in name and p.ndim == 2]
    strong, weak = (sum(weights(folder)[name].square().sum() for name in inside) for folder in ("strong", "weak"))
    assert strong < weak


def test_a_moved_run_continues_where_it_is_now(stage, run):
    moved = run.rename("moved")
    stage.main(argv(resume=True, run_dir=moved, max_iters=6))
    assert {path.name for path in moved.iterdir()} == RUN and not run.exists()


def test_another_precision_can_continue(stage, run):
    assert stage.main(argv(resume=True, run_dir=run, max_iters=6, dtype="float16"))["dtype"] == "float16"


@pytest.mark.parametrize(("option", "value", "known"), [
    ("n_layer", 3, 2), ("n_head", 1, 2), ("n_embd", 32, 16), ("block_size", 8, 16), ("recipe", "classic", "modern"),
    ("max_iters", 4, 5)])
def test_options_that_contradict_the_checkpoint(stage, run, capsys, option, value, known):
    before = tree()
    error = refused(stage, capsys, argv(resume=True, run_dir=run, **{option: value}))
    assert f"--{option} {value}" in error and str(known) in error and tree() == before


@pytest.mark.parametrize("more", ["Noc", "Ω"])
def test_another_text_than_the_checkpoints(stage, run, capsys, more):
    Path("songs.txt").write_text(TEXT + more, encoding="utf-8")
    before = tree()
    old = checkpoint(run / "model_last.pt")["corpus_sha256"]
    error = refused(stage, capsys, argv(resume=True, run_dir=run, input="songs.txt"))
    assert "songs.txt" in error and old[:8] in error and len(re.findall(r"\b[0-9a-f]{8}\b", error)) == 2 and tree() == before


def kill_again_and_again(stage, recipe, kills, dice):
    """Kill a run with SIGKILL, resume it, and so on; yields a line for each kill. It ends like an undisturbed one."""
    common = dict(recipe=recipe, dropout=0.2, eval_interval=1, max_iters=4 * kills, n_embd=64, warmup_iters=2, patience=0)
    script, whole, cut = stage.__file__, tiny(stage, **common, run_dir="whole"), tiny(stage, **common, run_dir="cut")
    assert processes.finish(processes.start(script, whole, "whole.txt")) == 0
    last = Path("cut/model_last.pt")
    for kill in range(1, kills + 1):
        how = dice.choice(("fsync", "replace", "any moment")) if kills > 2 else ("fsync", "any moment")[kill % 2]
        way = argv(resume=True, run_dir="cut") if last.exists() else cut
        if how == "any moment":
            child, count = processes.start(script, way, "cut.txt"), dice.randrange(1, 4)
            assert processes.wait_until(lambda: processes.evaluations("cut.txt") >= count, child)  # noqa: B023
            time.sleep(dice.random() * 0.02)
            child.kill()
        else:
            child = processes.start(script, way, "cut.txt", (how, dice.randrange(1, 13)))
        assert processes.finish(child) == -signal.SIGKILL
        iteration = steps_of(last) if last.exists() else None
        unfinished = [f"{path.name} of {path.stat().st_size:,} bytes" for path in Path("cut").glob("*.tmp")]
        yield (f"{stage.__name__} {recipe}, kill {kill:2}: {'at any moment' if how == 'any moment' else f'in os.{how}'}; the "
               f"checkpoint is of step {iteration}{''.join(f', beside it {name}' for name in unfinished)}")
    assert iteration < 4 * kills
    assert processes.finish(processes.start(script, argv(resume=True, run_dir="cut"), "cut.txt")) == 0
    assert {path.name for path in Path("cut").iterdir() if "previous" not in path.name} == RUN
    one, other = (checkpoint(f"{folder}/model_last.pt") for folder in ("whole", "cut"))
    assert len(one["history"]) == len(other["history"]) == 4 * kills + 1 and same(one["model"], other["model"])
    assert same(one["optimizers"], other["optimizers"])
    assert same(checkpoint("whole/model_best.pt")["model"], checkpoint("cut/model_best.pt")["model"])
    assert history("whole") == history("cut") and sample("whole") == sample("cut")
    yield f"{stage.__name__} {recipe}, {kills} kills: weights after {4 * kills} steps bit-identical to an uninterrupted run"


@both_recipes
def test_a_killed_run_ends_with_the_same_weights(stage, recipe):
    assert len(list(kill_again_and_again(stage, recipe, 2, random.Random(0)))) == 3


@pytest.mark.slow
@both_recipes
def test_a_run_killed_twenty_times_ends_with_the_same_weights(stage, recipe):
    print(f"\n{time.strftime('%Y-%m-%d %H:%M')} torch {torch.__version__}")
    for line in kill_again_and_again(stage, recipe, 20, random.Random(time.time_ns())):
        print(line)


# ------------------------------------------------------------------------------------------------- Ctrl-C
def test_ctrl_c_gives_the_command_that_continues(stage):
    """A run whose output goes to a file: stopped by Ctrl-C, continued, ended by SIGTERM, continued."""
    common, script = dict(max_iters=200, eval_interval=20, patience=0, grow=1), stage.__file__
    way = tiny(stage, **common)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        child = processes.start(script, way, "out.txt")
        assert processes.wait_until(lambda: processes.evaluations("out.txt") >= 2, child)
        os.kill(child.pid, number)
        assert processes.finish(child) == status
        printed = Path("out.txt").read_bytes()
        assert b"\r" not in printed and b"\x1b" not in printed and b"it/s" not in printed and b"Traceback" not in printed
        if number == signal.SIGINT:
            line = printed.decode().splitlines()[-1]
            assert line.startswith("stopped; the last good checkpoint is kept; continue with: python ")
            way = shlex.split(line.partition("continue with: python ")[2])
            assert way == [f"{stage.__name__}.py", "--resume", "--run_dir", "run"]
            way = way[1:]
        assert 0 < steps_of("run/model_last.pt") < 200 and not list(Path("run").glob("*.tmp"))
        assert {"metrics.json", "loss.png"} <= {path.name for path in Path("run").iterdir()}
    assert processes.finish(processes.start(script, way, "out.txt")) == 0
    assert processes.finish(processes.start(script, tiny(stage, **common, run_dir="whole"), "out.txt")) == 0
    assert same(weights("run"), weights("whole")) and history("run") == history("whole") and sample("run") == sample("whole")


@pytest.mark.parametrize("notebook", [True, False])
def test_ctrl_c_is_one_line_and_keeps_the_last_evaluation(stage, notebook, monkeypatch, capsys):
    monkeypatch.setattr(stage, "IN_NOTEBOOK", notebook)
    common = dict(max_iters=12, warmup_iters=2)
    stage.main(tiny(stage, **common, run_dir="whole"))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for step in (7, 11):
        way = argv(resume=True, run_dir="it's mine") if step > 7 else tiny(stage, **common, run_dir="it's mine")
        capsys.readouterr()
        with before_step(stage, step, fail(KeyboardInterrupt())), pytest.raises(SystemExit) as stop:
            stage.main(way)
        error = capsys.readouterr().err
        assert stop.value.code == 130 and error.count("\n") == 1 and "Traceback" not in error
        command = shlex.split(error.partition("continue with: python ")[2])
        assert steps_of("it's mine/model_last.pt") == step // 5 * 5
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    stage.main(command[1:])
    assert same(weights("it's mine"), weights("whole")) and history("it's mine") == history("whole")


def test_ctrl_c_before_anything_is_saved_promises_nothing(stage, monkeypatch, capsys):
    for name in ("read_corpus", "evaluate"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(stage, name, fail(KeyboardInterrupt()))
            stage.main(tiny(stage))
        assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"
    assert stage.main(tiny(stage))["iters"] == 5


# --------------------------------------------------------------------- files: what is ours, what is the user's
MINE = "my thesis\n" * 9


@pytest.mark.parametrize("way", ["a new run", "resume", "load_url"])
def test_a_checkpoint_does_not_say_where_to_write(stage, run, way):
    Path("thesis.txt").write_text(MINE)
    saved = checkpoint(run / "model_last.pt")
    hostile = dict(save_path="thesis.txt", output="songs.txt", run_dir="elsewhere", load_url="file:///nowhere", resume=True)
    torch.save(saved | dict(config=saved["config"] | hostile), run / "model_last.pt")
    def texts():
        return {path.name: path.read_text("utf-8") for path in Path().glob("*.txt")}

    outside = texts()
    if way == "resume":
        stage.main(argv(resume=True, run_dir="run", max_iters=7))
    elif way == "load_url":
        stage.main(tiny(stage, load_url=address("run/model_last.pt"), run_dir="new"))
    else:
        shutil.copy(run / "model_last.pt", run / "model_best.pt")
        stage.main(argv(sample_only=True, run_dir="run", max_new_tokens=5))
    assert texts() == outside
    assert not Path("elsewhere").exists() and not list(Path().glob("*.previous-*"))


@pytest.mark.parametrize("option", ["save_path", "output"])
@pytest.mark.parametrize("way", ["a new run", "resume", "sample_only"])
def test_a_file_of_the_users_is_kept_under_another_name(stage, run, option, way):
    if (option, way) == ("save_path", "sample_only"):
        return  # there it is what is read
    Path("mine").mkdir()
    options = {option: "mine/thesis.txt"}
    stage_argv = {"a new run": lambda: tiny(stage, run_dir="new", **options),
                  "resume": lambda: argv(resume=True, run_dir="run", max_iters=7, **options),
                  "sample_only": lambda: argv(sample_only=True, run_dir="run", max_new_tokens=5, **options)}[way]()
    for count in (1, 2):
        Path("mine/thesis.txt").write_text(f"{MINE}{count}")
        stage.main(stage_argv)
        previous = sorted(Path("mine").glob("thesis.txt.previous-*"))
        assert {path.read_text() for path in previous} >= {f"{MINE}{number}" for number in range(1, count + 1)}
        assert Path("mine/thesis.txt").read_bytes() and len(list(Path("mine").iterdir())) == count + 1
        if way == "a new run":
            shutil.rmtree("new")


def test_the_best_model_is_copied_to_save_path_each_time(stage):
    stage.main(tiny(stage, save_path="best.pt", output="texts/text.txt"))
    assert Path("best.pt").read_bytes() == Path("run/model_best.pt").read_bytes()
    assert {path.name for path in Path("run").iterdir()} == RUN - {"output"}
    stage.main(argv(sample_only=True, save_path="best.pt", output="new/text.txt", **{
        name: TINY[name] for name in ("device", "dtype", "max_new_tokens")}))
    assert Path("new/text.txt").read_bytes() == Path("texts/text.txt").read_bytes()
    cut_off(stage, 5, argv(resume=True, run_dir="run", max_iters=10, save_path="copy.pt"))
    assert Path("copy.pt").read_bytes() == Path("run/model_best.pt").read_bytes()


def other_files():
    """What exists besides the text and the finished run: another run, and things that are not files."""
    shutil.copytree("run", "other")
    Path("other/tokenizer.json").write_text("{}")
    Path("folder").mkdir()
    os.mkfifo("fifo")
    make_device("device")
    Path("link").symlink_to("songs.txt")


@pytest.mark.parametrize("option", ["save_path", "output"])
@pytest.mark.parametrize("path", [
    "songs.txt", "./run/../songs.txt", "link", "device", "fifo", "folder", ".", "run", "other",
    "other/model_last.pt", "other/model_best.pt", "other/metrics.json", "other/tokenizer.json", "other/new.txt",
    "run/model_last.pt", "run/metrics.jsonl", "run/config.json", "run/tokenizer.json", "run/text.txt", "songs.txt/text.txt"])
def test_what_is_not_the_runs_is_not_written_to(stage, run, capsys, option, path):
    other_files()
    before = tree()
    ways = [tiny(stage, run_dir="run"), tiny(stage, run_dir="new"), argv(resume=True, run_dir="run", input="songs.txt")]
    if option == "output":
        ways.append(argv(sample_only=True, run_dir="run", input="songs.txt"))
    for way in ways:
        if path.startswith("run/") and "new" in way and not Path(path).exists():
            continue
        error = refused(stage, capsys, [*way, f"--{option}", path])
        assert f"--{option} {Path(path).resolve()} " in error and tree() == before
    assert Path("device").is_char_device() and Path("fifo").is_fifo()


def test_the_best_model_and_the_text_do_not_share_a_file(stage, run, capsys):
    shutil.copy("run/model_best.pt", "alone.pt")
    before = tree()
    for way in (tiny(stage, run_dir="new", save_path="one", output="one"),
                tiny(stage, run_dir="run", output="run/model_best.pt"),
                tiny(stage, run_dir="run", output="run/model_best.pt", save_path="best.pt"),
                argv(sample_only=True, save_path="alone.pt", output="alone.pt"),
                argv(sample_only=True, run_dir="run", output="run/model_best.pt")):
        assert "--output" in refused(stage, capsys, way) and tree() == before


@pytest.mark.parametrize("place", [
    ".", "./", "mine", "mine_and_output", "config", "list", "runs", "texts", "..", "songs.txt", "songs.txt/run", "fifo",
    "device"])
def test_a_folder_that_is_no_runs_is_refused_as_run_dir(stage, capsys, monkeypatch, place):
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    Path("songs.txt").write_text(TEXT, encoding="utf-8")
    for name in ("mine/thesis.txt", "mine_and_output/output/sample.txt", "mine_and_output/notes.txt", "config/config.json",
                 "list/config.json", "runs/run/config.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(MINE)
    Path("config/config.json").write_text('{"editor": "mine"}')
    Path("list/config.json").write_text("[1]")
    os.mkfifo("fifo")
    make_device("device")
    Path("texts/output").mkdir(parents=True)  # a run's folder, but for the text in it
    shutil.copy("songs.txt", "texts/output/sample.txt")
    before = tree()
    text = "texts/output/sample.txt" if place == "texts" else "songs.txt"
    assert "--run_dir" in refused(stage, capsys, tiny(stage, run_dir=place, input=text)) and tree() == before


def test_the_whole_disk_is_no_folder_of_a_run(stage):
    with pytest.raises(stage.Stop, match="--run_dir / "):  # main() is not called: who knows what it would do
        stage.check_targets(config_of(stage, input="songs.txt", run_dir="/"))


def test_an_earlier_run_is_renamed_as_a_whole(stage, run):
    (run / "notes.txt").write_text("mine")
    first = tree("run")
    stage.main(tiny(stage, seed=1))
    (previous,) = Path().glob("run.previous-*")
    assert tree(previous) == {name.replace("run", str(previous), 1): content for name, content in first.items()}
    assert {path.name for path in Path("run").iterdir()} == RUN
    stage.main(tiny(stage, seed=2, run_dir=f"{run.resolve()}/"))
    assert len(list(Path().glob("run.previous-*"))) == 2 and Path("run/model_last.pt").exists()


def test_a_run_that_was_cut_off_before_its_first_checkpoint_is_an_earlier_run(stage, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(stage, "evaluate", fail(KeyboardInterrupt()))
        stage.main(tiny(stage))
    assert [path.name for path in Path("run").iterdir()] == ["config.json"]
    assert stage.main(tiny(stage))["iters"] == 5


def test_a_folder_that_is_empty_or_holds_only_samples_is_used(stage, trained):
    Path("run").mkdir()
    stage.main(tiny(stage))
    assert not list(Path().glob("*.previous-*"))
    for seed in (1, 2):
        stage.main(argv(sample_only=True, load_url=address(trained / "model_best.pt"), run_dir="texts", seed=seed))
    texts = {path.read_bytes() for path in Path("texts/output").iterdir()}
    stage.main(tiny(stage, run_dir="texts"))
    (previous,) = Path().glob("texts.previous-*")
    assert {path.read_bytes() for path in (previous / "output").iterdir()} == texts and len(texts) == 2


def test_a_linked_folder_stays_one(stage):
    Path("disk").mkdir()
    Path("run").symlink_to("disk")
    stage.main(tiny(stage))
    stage.main(tiny(stage, seed=1))
    assert Path("run").is_symlink() and {path.name for path in Path("disk").iterdir()} == RUN
    assert len(list(Path().glob("disk.previous-*"))) == 1


def test_one_process_a_folder_at_every_step(stage, capsys):
    said = []

    def intrude():
        before = tree()
        for way in (tiny(stage), argv(resume=True, run_dir="run"), tiny(stage, run_dir="./run/")):
            said.append(refused(stage, capsys, way))
        assert tree() == before

    with before_step(stage, 0, intrude), before_step(stage, 4, intrude):
        assert stage.main(tiny(stage))["iters"] == 5
    assert len(said) == 6 and all("another process writes to --run_dir" in line for line in said)
    assert stage.main(tiny(stage))["iters"] == 5  # the lock is free again


def test_processes_that_start_at_once_share_no_folder(stage):
    """Each ends with a complete run of its own, or with the error line."""
    many = [processes.start(stage.__file__, tiny(stage, max_iters=30, eval_interval=10, seed=seed), f"{seed}.out")
            for seed in range(4)]
    statuses = [processes.finish(child) for child in many]
    assert set(statuses) == {0, 2}
    for seed, status in enumerate(statuses):
        lines = Path(f"{seed}.out").read_text("utf-8").splitlines()
        if status:
            assert len(lines) == 1 and lines[0].startswith("error: another process writes to --run_dir run: ")
    folders = [path for path in Path().glob("run*") if path.is_dir()]
    assert len(folders) == statuses.count(0) and all({path.name for path in folder.iterdir()} == RUN for folder in folders)
    for folder in folders:
        seed = checkpoint(folder / "model_last.pt")["config"]["seed"]
        assert statuses[seed] == 0 and steps_of(folder / "model_last.pt") == 30


def test_the_lock_of_a_killed_process_is_free(stage):
    child = processes.start(stage.__file__, tiny(stage, max_iters=10**6, patience=0), "out.txt")
    assert processes.wait_until(lambda: processes.evaluations("out.txt") >= 1, child)
    for way in (tiny(stage), argv(resume=True, run_dir="run")):
        other = processes.start(stage.__file__, way, "other.txt")
        assert processes.finish(other) == 2 and "another process" in Path("other.txt").read_text()
    child.kill()
    processes.finish(child)
    cut_off(stage, steps_of("run/model_last.pt"), argv(resume=True, run_dir="run"))
    assert stage.main(tiny(stage))["iters"] == 5


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(38, "Function not implemented"),
                                   OSError(95, "Operation not supported"), PermissionError(13, "Permission denied")])
def test_a_file_system_without_locks_is_no_error(stage, monkeypatch, error):
    monkeypatch.setattr(filelock.FileLock, "acquire", fail(error))
    assert stage.main(tiny(stage))["iters"] == 5


def test_what_a_kill_left_unfinished_is_removed(stage, run):
    Path("notes.tmp").write_text("mine")
    before = tree()
    for name in ("run/model_last.pt.1.tmp", "run/loss.png.23.tmp", "run/output/sample.txt.456.tmp"):
        Path(name).write_bytes(b"half")
    stage.main(argv(resume=True, run_dir="run"))
    assert not list(Path("run").rglob("*.tmp")) and before.keys() <= tree().keys() and Path("notes.tmp").exists()


def test_a_text_that_breaks_off_leaves_no_file(stage, run, monkeypatch, capsys):
    known = sample(run)
    monkeypatch.setattr(stage, "draw_token", fail(stage.Stop("broken off", 1)))
    refused(stage, capsys, argv(sample_only=True, run_dir="run", prompt="Noc"), status=1)
    (previous,) = (run / "output").iterdir()
    assert previous.read_text("utf-8") == known


# ------------------------------------------------------------------------------------------- what goes wrong
@contextlib.contextmanager
def full_disk(room):
    """No file can grow beyond this many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_last_good_checkpoint(stage, run, capsys):
    before = (run / "model_last.pt").read_bytes()
    for room in (len(before) // 2, len(before) - 1000, 1):
        with full_disk(room):
            error = refused(stage, capsys, argv(resume=True, run_dir=run, max_iters=10), status=1)
        assert "last good checkpoint is kept" in error and "--resume" in error
        assert (run / "model_last.pt").read_bytes() == before and not list(Path().rglob("*.tmp"))
    assert stage.main(argv(resume=True, run_dir=run, max_iters=10))["iters"] == 10  # there is room again


def test_a_full_disk_before_the_first_checkpoint(stage, capsys):
    with full_disk(4000):
        error = refused(stage, capsys, tiny(stage), status=1)
    assert "last good" not in error and "--resume" not in error


def test_a_disk_that_fails_while_flushing(stage, run, capsys, monkeypatch):
    before = tree(run)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(OSError(28, os.strerror(28))))
        error = refused(stage, capsys, argv(resume=True, run_dir=run, max_iters=10), status=1)
    assert "No space left on device" in error
    assert all(tree(run)[f"run/model_{name}.pt"] == before[f"run/model_{name}.pt"] for name in ("best", "last"))
    assert not list(Path().rglob("*.tmp"))


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:{}: you tried to allocate 68719476736 bytes. Error code 12\n"
FAILING = {"Linux": RuntimeError(ALLOCATOR.format("131] . DefaultCPUAllocator: can't allocate memory")),
           "Windows": RuntimeError(ALLOCATOR.format("117] data. DefaultCPUAllocator: not enough memory")),
           "MemoryError": MemoryError(), "bad_alloc": RuntimeError("std::bad_alloc"),
           "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of ...")}


@pytest.mark.parametrize("kind", FAILING)
@pytest.mark.parametrize("where", ["evaluate", "take_step"])
def test_no_memory_is_one_line_and_a_checkpoint_is_promised_where_there_is_one(stage, monkeypatch, capsys, kind, where):
    with monkeypatch.context() as patch:
        patch.setattr(stage, where, fail(FAILING[kind]))
        error = refused(stage, capsys, tiny(stage), status=1)
    assert error.startswith("error: out of memory: lower --batch_size")
    assert ("the last good checkpoint is kept; continue with: python" in error) == (where == "take_step")
    assert stage.main(argv(resume=True, run_dir="run") if where == "take_step" else tiny(stage))["iters"] == 5


def test_a_fault_of_ours_is_not_hidden(stage, monkeypatch):
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("x")):
        monkeypatch.setattr(stage, "take_step", fail(error))
        with pytest.raises(type(error)):
            stage.main(tiny(stage))


@pytest.mark.parametrize("options", [
    dict(n_embd=6000), dict(n_layer=300, n_embd=512), dict(block_size=20_000),
    dict(batch_size=50_000, n_embd=64, block_size=512), dict(grad_accum=1_000_000, batch_size=1)],
    ids=lambda options: next(iter(options)))
def test_a_model_too_large_for_the_memory_ends_with_one_line(stage, options):
    """In a process that may have 400 MB more than it has at the start."""
    Path("songs.txt").write_text(TEXT * 30, encoding="utf-8")
    child = processes.start(stage.__file__, tiny(stage, **options), "out.txt", memory=400 * 2**20)
    status, lines = processes.finish(child), Path("out.txt").read_text("utf-8").splitlines()
    assert status in (1, 2) and lines[-1].startswith("error: out of memory: lower --batch_size"), lines
    assert not any("Traceback" in line for line in lines)
    assert ("last good checkpoint" in lines[-1]) == Path("run/model_last.pt").exists()


def test_more_than_all_memory_is_refused_before_it_is_asked_for(stage, capsys):
    before = tree()
    for options in (dict(n_embd=65536, n_layer=5), dict(n_layer=100, n_embd=20_000)):
        assert "out of memory" in refused(stage, capsys, tiny(stage, **options)) and tree() == before


NAN = dict(learning_rate=1e15, weight_decay=1e5)  # each step multiplies the weights by -1e20


@numeric
@both_recipes
def test_a_loss_that_turns_nan_stops_and_keeps_the_last_good_checkpoint(stage, recipe, capsys):
    stage.main(tiny(stage, recipe=recipe))
    before = tree("run")
    for options in (dict(max_iters=10, eval_interval=2), dict(max_iters=10, eval_interval=10, sample_interval=3)):
        error = refused(stage, capsys, argv(resume=True, run_dir="run", **NAN, **options), status=1)
        assert "NaN" in error and "kept" in error and "--learning_rate" in error
        changed = {name for name, content in tree("run").items() if before.get(name) != content}
        assert changed <= {"run/config.json"}
    assert stage.main(argv(resume=True, run_dir="run", max_iters=10))["iters"] == 10


def test_a_new_run_whose_loss_turns_nan_keeps_its_first_checkpoint(stage, capsys):
    refused(stage, capsys, tiny(stage, **NAN), status=1)
    for name in ("best", "last"):
        kept = checkpoint(f"run/model_{name}.pt")
        assert len(kept["history"]) == 1 and all(p.isfinite().all() for p in kept["model"].values())
    assert [line["iter"] for line in history("run")] == [0] and not list(Path().rglob("*.tmp"))


# ----------------------------------------------------------------------------------------------- checkpoints
def test_a_damaged_checkpoint_is_refused_or_whole(stage, trained):
    """Cut to any length, or with a byte flipped anywhere: one line, or the very same numbers (padding)."""
    raw, dice = (trained / "model_best.pt").read_bytes(), random.Random(0)
    known, outcomes = checkpoint(trained / "model_best.pt"), []
    broken, contents = [raw[:length] for length in (0, 1, 10, 1000, len(raw) // 2, len(raw) - 1)], raw.index(b"PK\x01\x02")
    for begin, end, count in ((0, contents, 100), (contents, len(raw), 300)):  # the files, and the archive's table of contents
        for _ in range(count):
            flipped = bytearray(raw)
            flipped[dice.randrange(begin, end)] ^= dice.randrange(1, 256)
            broken.append(bytes(flipped))
    for content in broken:
        Path("bad.pt").write_bytes(content)
        try:
            outcomes.append(same(stage.load_checkpoint("bad.pt"), known))
        except stage.Stop as e:
            assert "bad.pt" in str(e) and "\n" not in str(e)
            outcomes.append(None)
    assert outcomes.count(False) == 0 and outcomes[:106].count(None) > 50


def places(value, path=()):
    """The path to each part of a checkpoint, itself included."""
    yield path
    names = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield from places(value[name], (*path, name))


def with_part(saved, path, change):
    """A copy of the checkpoint in which change(parent, name) was made."""
    if not path:
        return change(dict(whole=saved), "whole")["whole"]
    saved = saved.copy()
    if len(path) == 1:
        return change(saved, path[0])
    saved[path[0]] = with_part(saved[path[0]], path[1:], change)
    return saved


def replaced_by(new):
    """A change of a part."""
    def change(parent, name):
        parent[name] = new(parent[name])
        return parent
    return change


def without(parent, name):
    del parent[name]
    return parent


def changes(value):
    """By name, all that is done to a part of a checkpoint: most of it is nonsense."""
    kinds = {name: replaced_by(lambda old, new=new: new) for name, new in dict(
        none=None, text="text", number=7, negative=-1, huge=10**30, real=-0.5, nan=math.nan, infinite=math.inf, large=1e300,
        true=True, list=[], dict={}, tensor=torch.ones(3), path="/dev/null\0").items()}
    if isinstance(value, torch.Tensor):  # there are many: not all of it for each
        kinds = {name: kinds[name] for name in ("none", "text", "number", "nan", "list")}
    kinds["gone"] = without
    if isinstance(value, dict):
        kinds["extra"] = replaced_by(lambda old: old | {"extra": 1})
    if isinstance(value, list):
        kinds["longer"] = replaced_by(lambda old: [*old, *old[-1:]])
        kinds["tuple"] = replaced_by(tuple)
    by_type = {}
    if isinstance(value, str) and value:
        by_type = dict(surrogate=lambda old: old[:-1] + "\ud800", twice=lambda old: old[:-1] + old[0],
                       end=lambda old: old[:-1] + "\0")
    if isinstance(value, torch.Tensor):
        by_type = dict(
            shape=lambda old: torch.ones(2, *old.shape), double=lambda old: old.double(), bytes=lambda old: old.to(torch.int8),
            half=lambda old: old.half(), nans=lambda old: old * math.nan, infinities=lambda old: old / 0,
            negatives=lambda old: -1 - old.abs(), spread=lambda old: old.new_ones(()).expand(old.shape),
            transposed=lambda old: old.mT.contiguous().mT if old.ndim == 2 else old, sparse=lambda old: old.to_sparse())
    return kinds | {name: replaced_by(new) for name, new in by_type.items()}


@pytest.mark.parametrize(("recipe", "share"), [("modern", 6), *(
    pytest.param(recipe, 1, marks=pytest.mark.slow) for recipe in RECIPES)])
def test_every_field_of_a_checkpoint_is_checked_before_use(stage, recipe, share, capsys):
    """Each part, left out or replaced by all sorts of things, is refused in one line; or it is legal, and used as it is.

    share: of the changes to a part, only one in this many is made.
    """
    stage.main(tiny(stage, recipe=recipe, n_layer=1, dtype="float16", run_dir="good"))
    Path("mine.txt").write_text("mine")
    good, mine = checkpoint("good/model_last.pt"), tree()
    Path("run/output").mkdir(parents=True)
    (Path("run") / "config.json").write_bytes(Path("good/config.json").read_bytes())
    legal, wrong, count = [], [], itertools.count()
    for path in places(good):
        value = good
        for name in path:
            value = value[name]
        for kind, change in changes(value).items():
            if not path and kind == "gone" or next(count) % share:
                continue
            name = f"{'.'.join(map(str, path))}: {kind}"
            torch.save(with_part(good, path, change), "run/model_last.pt")
            try:
                stage.load_checkpoint("run/model_last.pt")
            except stage.Stop as e:
                assert "run/model_last.pt" in str(e) and "\n" not in str(e), name
            except Exception as e:
                wrong.append(f"{name}: {e!r}")
            else:
                legal.append((name, Path("run/model_last.pt").read_bytes()))
    assert not wrong
    for name, content in legal:
        if name == "config.compile: true":  # slow
            continue
        Path("run/model_last.pt").write_bytes(content)
        shutil.copy("run/model_last.pt", "run/model_best.pt")
        ways = [dict(resume=True, run_dir="run", max_iters=6), dict(sample_only=True, run_dir="run"), dict(
            load_url=address("run/model_best.pt"), run_dir="new", input="songs.txt", max_iters=1, batch_size=2)]
        for way in ways[:1] if share > 1 and not name.startswith(("model", "tokenizer")) else ways:
            try:
                stage.main(argv(**way, device="cpu", max_new_tokens=3))
            except SystemExit as e:
                error = capsys.readouterr().err
                assert e.code in (1, 2) and error.startswith("error: ") and error.count("\n") == 1, (name, way, error)
        shutil.rmtree("new", ignore_errors=True)
    assert {name: content for name, content in tree().items() if name in mine} == mine


@pytest.mark.parametrize("way", ["sample_only", "resume", "load_url"])
@pytest.mark.parametrize("part", [
    (), ("config",), ("config", "n_embd"), ("config", "max_iters"), ("tokenizer",), ("history",), ("history", 0, "iter"),
    ("optimizers", 0), ("model",), ("model", "lm_head.weight"), ("context",)])
def test_a_checkpoint_with_a_wrong_part_is_refused_in_every_way_to_use_it(stage, run, trained, capsys, way, part):
    for change in (replaced_by(lambda old: None), replaced_by(lambda old: "text"), without):
        if (part, change) == ((), without):
            continue
        for name in ("last", "best"):
            torch.save(with_part(checkpoint(trained / f"model_{name}.pt"), part, change), run / f"model_{name}.pt")
        before = tree()
        options = {"sample_only": dict(sample_only=True, run_dir="run"), "resume": dict(resume=True, run_dir="run"),
                   "load_url": dict(load_url=address("run/model_best.pt"), run_dir="new", input="songs.txt")}[way]
        assert "run/model_" in refused(stage, capsys, argv(**options)) and tree() == before


def test_an_option_that_this_version_does_not_know_is_named(stage, run, capsys):
    saved = checkpoint(run / "model_best.pt")
    saved["config"]["flash_attention"] = True
    torch.save(saved, "new.pt")
    for way in (dict(sample_only=True, save_path="new.pt"), dict(load_url=address("new.pt"))):
        error = refused(stage, capsys, tiny(stage, **way))
        assert "flash_attention" in error and "not an option of this version" in error and "new.pt" in error


def packed(path, target, zeros=None):
    """A checkpoint's archive written anew, deflated; some files replaced by so many megabytes of zeros."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as file:
                size = (zeros or {}).get(name.partition("/")[2])
                file.writelines([bytes(2**20)] * size if size else [old.read(name)])


@pytest.mark.filterwarnings("error")  # a warning would be a second line
@pytest.mark.parametrize("pickled", [b"\x80\x02X\x01", b"\x80\x02NQ.", b"\x80\xa1X\x01"],
                         ids=["cut off", "no storage", "another protocol"])
def test_a_whole_archive_of_a_broken_pickle_is_refused(stage, run, capsys, pickled):
    """torch's unpickler raises struct.error and AssertionError for these."""
    with zipfile.ZipFile(run / "model_best.pt") as old, zipfile.ZipFile("broken.pt", "w") as new:
        for part in old.infolist():
            file = zipfile.ZipInfo(part.filename)
            file.external_attr = 0  # as in torch's own archives
            new.writestr(file, pickled if part.filename.endswith("/data.pkl") else old.read(part))
            new.infolist()[-1].external_attr = 0
    error = refused(stage, capsys, argv(sample_only=True, save_path="broken.pt"))
    assert "broken.pt" in error and "it is damaged" in error


def test_a_folder_whose_config_cannot_be_parsed_is_no_run(stage, capsys):
    Path("run").mkdir()
    Path("run/config.json").write_bytes(b"[" * 10**5)
    assert "--run_dir" in refused(stage, capsys, tiny(stage))


def test_only_the_first_process_writes_samples(stage, run, capsys, monkeypatch):
    before = tree()
    monkeypatch.setattr(stage, "RANK", 1)
    assert stage.main(argv(sample_only=True, run_dir="run"))["iter"] > 0
    assert tree() == before and capsys.readouterr().out == ""


def test_what_goes_wrong_in_a_conversation_is_one_line(stage, capsys, monkeypatch):
    typed = iter(["Noc", "Dzień"])

    def read(prompt):
        with contextlib.suppress(StopIteration):
            return next(typed)
        raise EOFError

    def write(prompt, number):
        yield prompt
        raise stage.Stop(stage.NAN, 1)

    monkeypatch.setattr("builtins.input", read)
    stage.converse(write)
    assert capsys.readouterr().out.splitlines()[1:] == [f"Noc{stage.NAN}", f"Dzień{stage.NAN}", ""]


@pytest.mark.parametrize("way", ["sample_only", "resume", "load_url"])
def test_tensors_that_unpack_to_more_than_the_file_are_refused_unread(stage, run, way):
    """Half a gigabyte of zeros in half a megabyte, in a process that may have 200 MB more than it has at the start."""
    packed(run / "model_best.pt", "bomb.pt", {"data/3": 512})
    assert Path("bomb.pt").stat().st_size < 2**21
    shutil.copy("bomb.pt", run / "model_last.pt")
    before = tree()
    options = {"sample_only": dict(sample_only=True, save_path="bomb.pt"), "resume": dict(resume=True, run_dir="run"),
               "load_url": dict(load_url=address("bomb.pt"), input="songs.txt")}[way]
    child = processes.start(stage.__file__, argv(**options), "out.txt", memory=200 * 2**20)
    assert processes.finish(child) == 2
    (line,) = Path("out.txt").read_text().splitlines()
    assert line.startswith("error: ") and "it is damaged" in line and tree() | before == tree()


def test_an_archive_packed_otherwise_is_damaged_or_whole(stage, run):
    """Deflated though small; damaged so that unpacking fails (zlib.error); said to be packed though it is not."""
    packed(run / "model_best.pt", "packed.pt")
    content, dice, known = Path("packed.pt").read_bytes(), random.Random(1), checkpoint(run / "model_best.pt")
    stored = (run / "model_best.pt").read_bytes()
    entries = [found.start() + 10 for found in re.finditer(b"PK\x01\x02", stored)]
    broken = [content, *(stored[:at] + bytes([method]) + stored[at + 1:] for at in entries[:4] for method in (8, 12, 14, 99))]
    for _ in range(60):
        at = dice.randrange(len(content))
        broken.append(content[:at] + bytes([dice.randrange(256)]) + content[at + 1:])
    for content in broken:
        Path("bad.pt").write_bytes(content)
        try:
            assert same(stage.load_checkpoint("bad.pt"), known)
        except stage.Stop as e:
            assert "bad.pt" in str(e) and "\n" not in str(e)


def test_a_small_file_does_not_stand_for_a_large_model(stage, run, capsys):
    """Each tensor is one number, said to be repeated."""
    saved = checkpoint(run / "model_best.pt")
    saved["model"] = {name: p.new_zeros(()).expand(p.shape) for name, p in saved["model"].items()}
    torch.save(saved, "small.pt")
    assert "small.pt" in refused(stage, capsys, argv(sample_only=True, save_path="small.pt"))


def test_a_damaged_checkpoint_is_refused_in_every_way_to_use_it(stage, run, capsys):
    raw = bytearray((run / "model_best.pt").read_bytes())
    for damaged in (raw[:-100], raw[:3000] + bytes(5000) + raw[8000:]):
        for name in ("best", "last"):
            (run / f"model_{name}.pt").write_bytes(damaged)
        before = tree()
        for options in (dict(sample_only=True), dict(resume=True), dict(load_url=address("run/model_best.pt"), run_dir="new")):
            error = refused(stage, capsys, argv(**dict(run_dir=run) | options))
            assert "run/model_" in error and tree() == before


class Evil:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return Path("pwned").touch, ()


FOREIGN = dict(
    weights=lambda good: {"weight": torch.zeros(3)}, tensor=lambda good: torch.zeros(3), scalar=lambda good: torch.tensor(1.0),
    list=lambda good: [1, 2], nothing=lambda good: None, stage=lambda good: good | dict(stage="another"),
    version=lambda good: good | dict(format_version=99), shapes=lambda good: good | dict(model={
        name: torch.zeros(2, 2) for name in good["model"]}), fewer=lambda good: good | dict(model={}),
    older=lambda good: good | dict(format_version=1, optimizer=good["optimizers"], iter=5))


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_refused(stage, trained, capsys, kind):
    torch.save(FOREIGN[kind](checkpoint(trained / "model_best.pt")), "foreign.pt")
    before = tree()
    for options in (dict(sample_only=True, save_path="foreign.pt"), dict(load_url=address("foreign.pt"))):
        way = tiny(stage, **options)
        assert "foreign.pt" in refused(stage, capsys, way) and tree() == before


@pytest.mark.parametrize("content", [
    b"", b"To nie jest model.\n", b"\x80\x04N.", b"PK\x03\x04" + bytes(99), bytes(range(256)), pickle.dumps(Evil())])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_no_code(stage, capfd, content):
    Path("bad.pt").write_bytes(content)
    Path("run").mkdir()
    shutil.copy("bad.pt", "run/model_last.pt")
    before = tree()
    for way in (argv(sample_only=True, save_path="bad.pt", device="cpu"), argv(resume=True, run_dir="run")):
        assert ".pt" in refused(stage, capfd, way) and tree() == before
    torch.save(dict(model=Evil()), "bad.pt")
    refused(stage, capfd, argv(sample_only=True, save_path="bad.pt", device="cpu"))
    assert not Path("pwned").exists()


@pytest.fixture
def server(monkeypatch):
    """A web server of the current folder; its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=os.getcwd())) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_a_downloaded_checkpoint_samples_and_trains_further(stage, run, server):
    stage.main(argv(sample_only=True, run_dir=run, max_new_tokens=40))
    text = sample(run)
    for number, place in enumerate((f"{server}/run/model_best.pt", address("run/model_best.pt"))):
        stage.main(argv(sample_only=True, load_url=place, run_dir=f"new{number}", max_new_tokens=40))
        assert sample(f"new{number}") == text and {path.name for path in Path(f"new{number}").iterdir()} == {"output"}
    metrics = stage.main(argv(load_url=f"{server}/run/model_best.pt", input="songs.txt", run_dir="further", max_iters=3,
                              batch_size=4, device="cpu", dtype="float32", learning_rate=1e-3))
    assert metrics["iters"] == 3 and checkpoint("further/model_last.pt")["config"]["n_embd"] == 16
    assert history("further")[0]["val_loss"] == pytest.approx(min(line["val_loss"] for line in history(run)))
    assert metrics["val_loss"] < history("further")[0]["val_loss"]


def test_a_downloaded_checkpoint_brings_its_recipe_with_its_settings(stage):
    stage.main(tiny(stage, recipe="classic", run_dir="first"))
    stage.main(argv(load_url=address("first/model_best.pt"), input="songs.txt", run_dir="further", max_iters=1, batch_size=4,
                    device="cpu"))
    options = json.loads(Path("further/config.json").read_text())["options"]
    assert options["recipe"] == "classic"
    assert {name: options[name] for name in stage.RECIPES["classic"]} == stage.RECIPES["classic"]


def test_a_downloaded_checkpoint_must_fit_text_and_options(stage, run, server, capsys):
    place = f"{server}/run/model_best.pt"
    assert "--n_embd 32" in refused(stage, capsys, tiny(stage, run_dir="new", load_url=place, n_embd=32))
    Path("other.txt").write_text(TEXT + "Ω", encoding="utf-8")
    assert "'Ω'" in refused(stage, capsys, tiny(stage, run_dir="new", load_url=place, input="other.txt"))
    assert not Path("new").exists()


@pytest.mark.parametrize("place", [
    "{}/nothing.pt", "{}/", "{}/songs.txt", "http://127.0.0.1:1/model.pt", "file:///nowhere/model.pt", "gopher://x/model.pt", "://",
    "http://[/model.pt", "nowhere.pt", "http://127.0.0.1:port/model.pt", "{}/my model.pt"])
def test_an_address_without_a_checkpoint(stage, server, capsys, place):
    before, place = tree(), place.format(server)
    for way in ({}, dict(sample_only=True)):
        assert place in refused(stage, capsys, tiny(stage, load_url=place, **way)) and tree() == before


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nPK"])
def test_a_server_that_falls_silent_is_not_waited_for_forever(stage, monkeypatch, capsys, answer):
    real, before = stage.urllib.request.urlopen, tree()

    def impatient(address, timeout):  # the script has to give one
        assert 0 < timeout <= 60
        return real(address, timeout=0.3)

    monkeypatch.setattr(stage.urllib.request, "urlopen", impatient)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as web:
        calls, place = [], f"http://127.0.0.1:{web.getsockname()[1]}/model.pt"
        threading.Thread(target=lambda: calls.append(web.accept()[0]) or calls[-1].sendall(answer), daemon=True).start()
        assert place in refused(stage, capsys, tiny(stage, load_url=place)) and tree() == before


def test_sampling_needs_only_the_checkpoint(stage, trained):
    shutil.copy(trained / "model_best.pt", "alone.pt")
    Path("songs.txt").unlink()
    stage.main(argv(sample_only=True, save_path="alone.pt", output="text.txt", prompt="Noc", input="missing.txt",
                    max_new_tokens=5))
    assert Path("text.txt").read_text("utf-8").startswith("Noc")


# ----------------------------------------------------------------------------------------------- bad input
FILES = {"empty.txt": b"", "blank.txt": b" \r\n\n", "separators.txt": b"<|endoftext|>\n<|endoftext|>\n",
         "binary.txt": b"a\0b" * 500, "cp1250.txt": (SONG * 20).encode("cp1250"), "utf16.txt": (SONG * 20).encode("utf-16"),
         "big_endian.txt": b"\xfe\xff" + (SONG * 20).encode("utf-16-be"), "no_bom.txt": (SONG * 20).encode("utf-16-le"),
         "short.txt": b"abc", "one.txt": b"a", "file": b"a file, not a folder"}


@pytest.mark.parametrize(("options", "words"), [
    (dict(input="missing.txt"), "missing.txt"), (dict(input="."), "--input"), (dict(input="file/songs.txt"), "file/songs.txt"),
    (dict(input="empty.txt"), "empty"), (dict(input="blank.txt"), "empty"), (dict(input="separators.txt"), "empty"),
    (dict(input="binary.txt"), "zero bytes"), (dict(input="cp1250.txt"), "UTF-8"), (dict(input="utf16.txt"), "UTF-16"),
    (dict(input="big_endian.txt"), "UTF-16"), (dict(input="no_bom.txt"), "no_bom.txt"),
    (dict(input="short.txt"), "short.txt is too short"), (dict(input="one.txt"), "too short"),
    (dict(block_size=5000), "--block_size 5000"),
    (dict(n_head=3), "--n_embd 16 must be divisible by --n_head 3"), (dict(n_head=16), "even"), (dict(n_embd=6), "even"),
    (dict(recipe="classic", n_head=3), "divisible"),
    (dict(run_dir="file"), "file"), (dict(run_dir="file/run"), "file/run"), (dict(save_path="file/best.pt"), "file/best.pt"),
    (dict(output="file/text.txt"), "file/text.txt"),
    (dict(colour="red"), "--colour"), (dict(max_iter=3), "--max_iter"), (dict(recipe="new"), "--recipe"),
    (dict(size="large"), "--size"), (dict(device="tpu"), "--device"), (dict(dtype="int8"), "--dtype"),
    (dict(prompt="Noc Ω"), "'Ω'"), (dict(resume=True), "run/model_last.pt"), (dict(sample_only=True), "run/model_best.pt"),
    (dict(resume=True, sample_only=True), "--resume"), (dict(resume=True, load_url="http://127.0.0.1:1/m.pt"), "--resume"),
    (dict(input="a\0b"), "--input"), (dict(run_dir="a\0b"), "--run_dir"), (dict(n_head=32), "--n_head 32"),
])
def test_bad_input_is_answered_in_one_line_and_writes_nothing(stage, capsys, options, words):
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    before = tree()
    error = refused(stage, capsys, tiny(stage, **options))
    assert words in error and tree() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(stage, capsys):
    before = tree()
    assert "--device cuda" in refused(stage, capsys, tiny(stage, device="cuda")) and tree() == before


def test_an_argument_that_belongs_to_no_option(stage, capsys):
    assert "songs.txt" in refused(stage, capsys, ["songs.txt"])
    assert "--n_layer" in refused(stage, capsys, ["--n_layer"])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "99999999999999999999", "ten", ""])
def test_numbers_that_are_none(stage, capsys, value):
    before, numbers = tree(), [f.name for f in fields(stage.Config) if f.type in (int, float)]
    assert len(numbers) >= 20
    for name in numbers:
        assert f"--{name}" in refused(stage, capsys, [*tiny(stage), f"--{name}={value}"])
    assert tree() == before


def test_zero_is_refused_where_it_means_nothing(stage, capsys):
    useful = {"dropout", "grow", "weight_decay", "grad_clip", "warmup_iters", "eval_iters", "patience",
              "sample_interval", "seed", "temperature", "top_k"}
    for f in fields(stage.Config):
        if f.type in (int, float) and f.name not in useful:
            assert f"--{f.name} 0" in refused(stage, capsys, tiny(stage, **{f.name: 0}))
    stage.main(tiny(stage, **dict.fromkeys(useful, 0), max_iters=1))


@pytest.mark.parametrize(("text", "size"), [
    ("a" * 500, 2), ("a" * 500, 61), (SONG * 9, 61), (SEPARATOR.join([SONG[:30]] * 20), 61)])
def test_a_text_is_long_enough_if_its_training_part_is_longer_than_the_context(stage, capsys, text, size):
    Path("songs.txt").write_text(text, encoding="utf-8")
    known = len(stage.split_corpus(stage.read_corpus("songs.txt"))[0])
    assert f"--block_size {known}" in refused(stage, capsys, tiny(stage, block_size=known))
    assert "too short" in refused(stage, capsys, tiny(stage, block_size=10_000_000))
    for block_size in (size, known - 1):
        metrics = stage.main(tiny(stage, block_size=block_size, max_iters=1))
        assert math.isfinite(metrics["val_loss"])


@pytest.mark.parametrize("options", [dict(n_embd=4), dict(n_embd=2, n_head=1), dict(n_embd=1, n_head=1, recipe="classic"),
                                     dict(block_size=2), dict(n_layer=1, n_head=1, batch_size=1)])
def test_the_smallest_models_train(stage, options):
    assert math.isfinite(stage.main(tiny(stage, **options))["val_loss"])


def test_a_tiny_temperature_takes_the_likeliest(stage, run):
    texts = []
    for temperature in (0, 1e-4, 1e-40, 1e-60):
        stage.main(argv(sample_only=True, run_dir=run, temperature=temperature, max_new_tokens=40))
        texts.append(sample(run))
    assert len(set(texts)) == 1


def test_samples_that_cannot_be_written(stage, run, capsys):
    Path("file").touch()
    for options in (dict(output="file/text.txt"), dict(load_url=address("run/model_best.pt"), run_dir="file/new")):
        assert "file" in refused(stage, capsys, argv(sample_only=True, **dict(run_dir=run) | options))


# ---------------------------------------------------------------------------- terminals, notebooks, processes
def python(*words, **environment):
    """Run Python in a process of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", **environment)
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, env=environment, timeout=300)


def test_importing_does_nothing_and_a_kernels_arguments_are_not_ours(stage):
    before = tree()
    done = python("-c", f"""
import random, sys, torch
sys.argv = ["/usr/lib/python3/ipykernel_launcher.py", "-f", "/tmp/kernel.json"]
sys.path.insert(0, {os.path.dirname(stage.__file__)!r})
states, initial = (torch.get_rng_state(), random.getstate()), torch.initial_seed()
import {stage.__name__} as stage
assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate() and torch.initial_seed() == initial
print("imported")
for argv in ((), (["--max_iter", "3"],)):
    try:
        stage.main(*argv)
    except SystemExit as e:
        print(e.code)
""", PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout.decode().split() == ["imported", "2", "2"]
    missing, mistyped = done.stderr.decode().splitlines()
    assert "assets/input/input2.txt" in missing and "--max_iter 3" in mistyped and tree() == before


@pytest.mark.parametrize("script", ["gpt", "gpt_tiktoken", "gpt_hf"])
@pytest.mark.parametrize(("users", "expected"), [({}, "1000"), (dict(GOMP_SPINCOUNT="7"), "7")])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(script, users, expected, monkeypatch):
    """GNU OpenMP reads the variable when torch is loaded: it must be there before anything asks for torch."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    done = python("-c", f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):  # called before a module is loaded
        if name == "torch":
            sys.exit(os.environ.get("GOMP_SPINCOUNT", "not set"))
sys.meta_path.insert(0, Watch())
sys.path.insert(0, {os.path.dirname(importlib.import_module(script).__file__)!r})
import {script}
""", **users)
    assert done.stderr.decode().split() == [expected]


def test_a_terminal_that_is_not_utf8(stage, run):
    done = python(stage.__file__, *argv(sample_only=True, run_dir=run, prompt="śpi światło", max_new_tokens=60),
                  PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == b"" and sample(run).startswith("śpi światło")
    assert done.stdout.decode("ascii").startswith(sample(run).encode("ascii", "replace").decode())


@pytest.mark.parametrize("streams", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_streams_that_are_not_there(stage, monkeypatch, streams):  # as under pythonw, or after >&-
    for name in streams:
        monkeypatch.setattr(sys, name, None)
    assert stage.main(tiny(stage, sample_interval=2))["iters"] == 5
    for way, status in ((["--max_iter", "3"], 2), (argv(resume=True, run_dir="none"), 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as stop:
            stage.main(way)
        assert stop.value.code == status


def test_a_script_pasted_into_a_cell_runs(stage):
    """No __file__, and the kernel's own command line."""
    Path("cell.py").write_text(f"""
import sys, types
source = open(sys.argv[1], encoding="utf-8").read()
sys.argv = ["/usr/lib/python3/dist-packages/colab_kernel_launcher.py", "-f", "kernel-1.json"]
module = sys.modules["__main__"] = types.ModuleType("__main__")
try:
    exec(compile(source, "<cell>", "exec"), module.__dict__)
except SystemExit as e:
    print("ended with", e.code)
metrics = module.main({tiny(stage)})
print("steps:", metrics["iters"])
try:
    module.take_step = None
    def interrupted(*args):
        raise KeyboardInterrupt
    module.take_step = interrupted
    module.main({tiny(stage)})
except SystemExit as e:
    print("ended with", e.code)
""")
    done = python("cell.py", stage.__file__)
    out, error = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0 and re.findall("ended with .*|steps: .*", out) == ["ended with 2", "steps: 5", "ended with 130"]
    missing, stopped = error.splitlines()
    assert "assets/input/input2.txt" in missing and "--resume" in stopped
    assert {path.name for path in Path("run").iterdir()} == RUN - {"output", "loss.png"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@numeric
def test_two_processes_train_as_one_with_twice_the_batch(stage, float64):
    common = dict(dropout=0.0, max_iters=6, eval_interval=3, warmup_iters=0, sample_interval=3)
    metrics = stage.main(tiny(stage, **common, run_dir="one", batch_size=4))
    Path("float64.py").write_text(f"""
import runpy, sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_gpt
with test_gpt.in_float64():
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
""")
    done = python("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "float64.py",
                  stage.__file__, *tiny(stage, **common, run_dir="two", batch_size=2))
    assert done.returncode == 0, done.stderr.decode()
    for name, p in weights("one").items():
        torch.testing.assert_close(p, weights("two")[name], atol=1e-6, rtol=1e-6)
    assert {path.name for path in Path("two").iterdir()} == RUN
    for one, two in zip(history("one"), history("two")):
        assert one == pytest.approx(two, rel=1e-6)
    out = done.stdout.decode()
    assert len(re.findall("^step ", out, re.MULTILINE)) == 3 and out.count("-> two/output/sample.txt") == 1
    assert json.loads(Path("two/metrics.json").read_text())["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-6)


def start_together(stage, ways):
    """Processes of one run, as torchrun would start them."""
    shared = dict(WORLD_SIZE=len(ways), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [processes.start(stage.__file__, way, f"{rank}.out", environment=dict(shared, RANK=rank, LOCAL_RANK=rank))
            for rank, way in enumerate(ways)]


@pytest.mark.parametrize("options", [
    dict(input="other.txt"), dict(n_layer=1), dict(max_iters=6), dict(learning_rate=0.1), dict(eval_interval=1), dict(seed=1),
    dict(dropout=0.3), dict(sample_interval=2), dict(grad_accum=2)], ids=lambda options: next(iter(options)))
def test_processes_with_different_texts_or_options_all_end_with_one_line(stage, options):
    Path("other.txt").write_text(TEXT.replace("Noc", "Dni"), encoding="utf-8")
    both = start_together(stage, [tiny(stage), tiny(stage, **options)])
    assert [processes.finish(child) for child in both] == [2, 2]
    for rank in range(2):
        said = Path(f"{rank}.out").read_text("utf-8")
        assert "different texts or options" in said and said.count("error: ") == 1 and "Traceback" not in said
    assert not Path("run").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_a_whole_checkpoint(stage, victim):
    """One of two processes is killed, the other must not wait for it forever."""
    both = start_together(stage, [tiny(stage, max_iters=100_000, eval_interval=5, patience=0)] * 2)
    assert processes.wait_until(lambda: processes.evaluations("0.out") >= 3, both[0])
    both[victim].kill()
    assert [processes.finish(child) for child in both] == [-signal.SIGKILL, 1][::1 if victim == 0 else -1]
    said = Path(f"{1 - victim}.out").read_text("utf-8")
    assert "Traceback" not in said
    if victim == 1:  # the first process is the one that saves
        assert "error: another process of this run is gone; the last good checkpoint is kept" in said and "--resume" in said
    assert steps_of("run/model_last.pt") >= 10


def test_the_time_left_is_told_anew_with_each_evaluation(stage, monkeypatch, capsys):
    """A step takes a minute at first, as with --compile, and later three seconds."""
    ticks = itertools.accumulate([0] + [60, 0] * 10 + [3, 0] * 40)
    monkeypatch.setattr(stage, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks), strftime=time.strftime))
    stage.main(tiny(stage, max_iters=40, eval_interval=10))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    left = [re.findall(r"([\d.]+) minutes left", line) for line in lines]
    assert left == [[], ["30.0"], ["1.0"], ["0.5"], []]


def test_compile_finds_one_graph(stage):  # a break inside each dropout cost all that compiling gains
    model, idx = model_of(stage, "modern", dropout=0.2).train(), torch.randint(20, (2, 12))
    found = torch._dynamo.explain(model)(idx, idx)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(stage):
    stage.main(tiny(stage, dropout=0.0, run_dir="plain"))
    done = python(stage.__file__, *tiny(stage, dropout=0.0, run_dir="compiled", compile=True))
    assert done.returncode == 0
    for name, p in weights("plain").items():
        torch.testing.assert_close(p, weights("compiled")[name], atol=1e-4, rtol=1e-4)
    done = python(stage.__file__, *tiny(stage, run_dir="fallback", compile=True), PATH="/nowhere", CXX="",
                  TORCHINDUCTOR_CACHE_DIR=os.path.abspath("cache"))
    assert done.returncode == 1 and done.stderr.decode().splitlines()[-1].startswith("error: --compile needs a C++ compiler")
    assert b"Traceback" not in done.stderr
