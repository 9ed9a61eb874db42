"""The comparison of the stages: pytest tests/test_compare_stages.py. Two tiny models are really trained; no network."""

import doctest
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import compare_stages as compare
import corpus_report
import hf_models
import pytest
import torch

import gpt
import gpt_hf
import gpt_tiktoken

TINY = compare.flags(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=8, max_iters=40, eval_interval=20,
                     sample_interval=0, max_new_tokens=10, device="cpu", dtype="float32")
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=4, max_iters=40, dropout=0.0, grow=1, eval_interval=20,
             sample_interval=0)
SONG = "Szyba drży, gdy jedzie tramwaj\nKtoś po schodach idzie sam, aj\nKot na dachu liczy gwiazdy\n"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small run no faster with several threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus, a finished run of stage 1 in char and one of stage 2 in bpe: to be read only."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "songs.txt").write_text(hf_models.corpus(60), encoding="utf-8")
    for script, name, *more in ((gpt, "char"), (gpt_tiktoken, "bpe", "--tokenizer=custom", "--vocab_size=300")):
        script.main([*TINY, *compare.flags(input=folder / "songs.txt", run_dir=folder / name), *more])
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Samples of 200 characters, and an empty folder to work in."""
    monkeypatch.setattr(compare, "LENGTH", 200)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(made, tmp_path):
    """A copy of the two runs: their folders."""
    return [str(shutil.copytree(made / name, tmp_path / name)) for name in ("char", "bpe")]


def run_of(name, **values):
    """A run made up for the claims: of stage 1 and with 3 bits per character unless told otherwise."""
    stage, options, errors = (values.pop(key, default) for key, default in (("stage", "char"), ("options", {}), ("errors", {})))
    return compare.Run(name, stage=stage, options=options, values=dict(val_bpc=3.0, vocab_size=100) | values, errors=errors)


def error_of(capsys, argv):
    """The one line on stderr of a call that has to exit with 2."""
    with pytest.raises(SystemExit) as stop:
        compare.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- measures -----------------------------------------------------------------------------------------------
def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(compare).attempted == 4
    assert doctest.testmod(compare).failed == 0
    assert compare.running_words("Raz,\nDwa!") == ["raz", "dwa"]
    assert compare.line_lengths("Szara noc") == ([3], [9])
    assert compare.excerpts("raz\ndwa\ntrzy\n", 2, 4) == ["raz\n", "dwa\n"]
    assert compare.flags(size="tiny", resume=True) == ["--size=tiny", "--resume"]


def test_measures_by_hand():
    training = SONG + "<|endoftext|>\nNoc nad blokiem\nRano z rogiem\n"
    # 6 lines of 16 and 8 words: "klałka", twice, is neither known nor a word; "deszcz" is only new.
    text = SONG.replace("Kot", "Deszcz") + "<|endoftext|>\nNoc nad blokiem\nNoc nad blokiem\nklałka, Klałka\n"
    measures = compare.measure(text, training)
    assert [len(compare.running_words(song)) for song in corpus_report.split_songs(text)] == [16, 8]
    assert measures["unseen"] == pytest.approx(100 * 3 / 24) and measures["real"] == pytest.approx(100 * 22 / 24)
    assert measures["rhyming"] == pytest.approx(100 * corpus_report.rhyming_share(text))
    assert measures["distinct"] == pytest.approx(100 * 5 / 6)
    # Song 1 has 9 runs of 8 words: those without "deszcz", its 12th word, begin at words 1 to 4. Song 2 has one, not copied.
    assert measures["copied"] == pytest.approx(100 * 4 / 10) and measures["longest"] == 11
    ours, theirs = [len(line) for line in corpus_report.all_lines(text)], [30, 30, 26, 15, 13]
    assert [len(line) for line in corpus_report.all_lines(training)] == theirs
    assert measures["characters"] == pytest.approx(compare.wasserstein(ours, theirs))


def test_a_copy_across_line_ends_and_case_counts_and_one_across_songs_does_not():
    training = "raz dwa trzy cztery\n<|endoftext|>\npięć sześć siedem osiem"
    assert compare.copied("Raz; DWA\n\ntrzy", training, 2) == (1, 3)
    assert compare.copied("trzy cztery pięć sześć", training, 2) == (2 / 3, 2)
    assert compare.copied("trzy cztery\n<|endoftext|>\npięć sześć", training, 2) == (1, 2)  # nor is there a run across ours
    assert compare.copied("wa trzy", training) == (0, 1)  # "wa" is the end of a word, no word
    assert compare.copied("raz dwa", training) == (0, 2) and compare.copied("", training) == (0, 0)  # too short for a run of 8
    assert compare.unseen_words_share("!", training) == 0


def test_the_copy_rate_is_that_of_stage_3_in_which_case_and_commas_do_not_count():
    songs = hf_models.songs(12)
    training = corpus_report.join_songs(songs)
    assert "," in training and training != training.upper()
    for text in (training.upper(), training.replace(",", ""), training.lower().replace(" ", ", "),
                 training.replace("\n", ";\n")):
        text = text.replace("<|ENDOFTEXT|>", "<|endoftext|>").replace("<|endoftext|>;", "<|endoftext|>")
        rate, longest = compare.copied(text, training)
        assert rate >= 0.95 and text != training
        assert (rate, longest) == gpt_hf.copy_rate(corpus_report.split_songs(text), gpt_hf.END.join(songs))
        assert compare.measure(text, training)["copied"] == 100 * rate
    assert compare.copied(" ".join(reversed(training.split())), training)[0] < 0.05


def test_wasserstein_is_the_mean_distance_of_sorted_values_and_a_distance():
    assert compare.wasserstein([5, 5], [6, 8]) == 2
    assert compare.wasserstein([0], [0, 0, 0, 4]) == 1  # of unlike sizes: a quarter of the weight travels 4
    dice = random.Random(1)
    for _ in range(200):
        a, b, c = ([dice.randrange(20) for _ in range(12)] for _ in range(3))
        direct = sum(abs(x - y) for x, y in zip(sorted(a), sorted(b))) / 12
        assert compare.wasserstein(a, b) == pytest.approx(direct) == pytest.approx(compare.wasserstein(b, a))
        assert compare.wasserstein(a, c) <= compare.wasserstein(a, b) + compare.wasserstein(b, c) + 1e-9
        assert compare.wasserstein(a, a * 3) == 0


def test_excerpts_begin_with_a_line_and_do_not_overlap():
    text = "\n".join(f"wers {number}" for number in range(500))
    parts = compare.excerpts(text, 5, 1000)
    lines = [line for part in parts for line in part.splitlines()]
    assert len(lines) == len(set(lines)) and set(lines) <= set(text.splitlines())
    assert all(700 < len(part) <= 1000 for part in parts) and lines[0] == "wers 0"
    assert sum(map(len, compare.excerpts(text, 5, 1000))) < len(text)
    assert compare.excerpts("krótki", 5, 1000) == [""] * 5 or max(map(len, compare.excerpts("krótki", 5, 1000))) <= 6


def test_standard_errors_come_from_sample_to_sample():
    together, errors = compare.measure_samples([SONG, "brzdęgoli"], SONG)
    assert together["unseen"] == pytest.approx(100 / 17)
    assert errors["unseen"] == pytest.approx(50)  # 0 % and 100 %: sd 70.7, over the root of 2
    assert compare.measure_samples([SONG], SONG)[1] == {}


def test_without_morfeusz_the_real_words_are_left_out(monkeypatch):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    together, errors = compare.measure_samples([SONG, SONG], SONG)
    assert together["real"] is None and "real" not in errors and together["copied"] == 100


# --- runs ---------------------------------------------------------------------------------------------------
def files(folders):
    """What each file below the folders holds."""
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def test_two_runs_are_compared_and_the_second_call_needs_no_model(runs, tmp_path):
    before = files(runs)
    figures = compare.main([*runs, "--out", "out"])
    after = files(runs)
    assert all(after.pop(path) == content for path, content in before.items())  # nothing else in the runs has changed
    assert {path.parent.name for path in after} == {"samples"} and len(after) == 2 * 6
    *ours, real = figures
    for run, folder in zip(ours, runs):
        said = json.loads(Path(folder, "metrics.json").read_text())
        assert all(run.values[name] == said[name] for name in set(compare.COSTS) - {"device", "epochs"})
        tokens = said["tokens_per_vocab_entry"] * said["vocab_size"]
        assert run.values["epochs"] == pytest.approx(40 * 8 * 32 / tokens)  # 40 steps of 8 x 32 tokens
        assert run.values["unseen"] > real.values["unseen"] == 0  # the songs of the corpus repeat each other's lines
        assert all(0 < len(corpus_report.flatten(text)) <= 200 for text in run.texts) and len(set(run.texts)) == 5
    assert real.name == "validation text" and real.values["real"] == 100 and real.values["copied"] == 100

    report = Path("out/comparison.md").read_text(encoding="utf-8")
    for run in ours:
        row = next(line for line in report.splitlines() if line.startswith(f"| {run.name} |"))
        assert f"| {run.values['val_bpc']:.3f} |" in row and f"| {run.values['params']:,} |" in row
    tables = [line.count("|") for line in report.splitlines() if line.startswith("|")]
    assert tables == [14] * 4 + [10] * 5 + [4] * (2 + len(compare.CLAIMS))
    assert report.count("```text") == 3 and real.texts[0].splitlines()[0] in report
    assert Path("out/comparison.png").read_bytes().startswith(b"\x89PNG")
    for run, folder in zip(ours, runs):
        kept = Path("out", run.name)
        assert {path.name for path in kept.iterdir()} == {"metrics.json", "loss.png", "samples.txt"}
        assert (kept / "metrics.json").read_bytes() == Path(folder, "metrics.json").read_bytes()
        assert all(text in (kept / "samples.txt").read_text(encoding="utf-8") for text in run.texts)

    for model in tmp_path.rglob("*.pt"):
        model.unlink()
    Path("out/comparison.md").unlink()
    assert [run.values for run in compare.main([*runs, "--out", "out"])] == [run.values for run in figures]
    assert Path("out/comparison.md").read_text(encoding="utf-8") == report
    other = str(shutil.copytree(runs[0], tmp_path / "second" / "char"))  # two runs of one name go by their paths
    assert [run.name for run in compare.main([runs[0], other, "--out", "out"])] == [runs[0], other, "validation text"]


def test_samples_of_another_training_are_written_anew(runs):
    run = compare.read_run(runs[0])
    first = compare.samples(run)
    paths = sorted(Path(runs[0], "samples").glob("*.txt"))
    for path in paths:
        path.write_text("Stary tekst\n", encoding="utf-8")
    assert compare.samples(run) == ["Stary tekst\n"] * 5
    metrics = Path(runs[0], "metrics.json")
    metrics.write_text(metrics.read_text() + "\n")
    assert compare.samples(run) == first


def test_mistakes_are_answered_in_one_line(made, runs, capsys):
    assert "name run folders" in error_of(capsys, [])
    assert "--minutes" in error_of(capsys, ["--run", "--minutes", "0"])
    assert "--minuten" in error_of(capsys, [runs[0], "--minuten", "3"])
    assert "nowhere holds no finished run" in error_of(capsys, ["nowhere"])
    assert "no text" not in error_of(capsys, [runs[0], "--input", "missing.txt"])
    Path("other.txt").write_text(SONG * 20, encoding="utf-8")
    assert "did not learn from other.txt" in error_of(capsys, [*runs, "--input", "other.txt"])
    Path("file").touch()
    assert "choose another --out" in error_of(capsys, [*runs, "--out", "file/deeper"])
    Path(runs[0], "model_best.pt").unlink()
    assert "no checkpoint" in error_of(capsys, runs)
    assert not Path(runs[0], "samples", "metrics.sha256").exists()


# --- claims -------------------------------------------------------------------------------------------------
def test_claims_hold_fall_or_are_too_close():
    char = run_of("char", rhyming=40.0, syllables=0.5, characters=1.0, errors=dict(rhyming=3.0))
    verdicts = {}
    for rhyming, expected in ((20.0, "holds"), (39.0, "too close"), (60.0, "falls")):
        bpe = run_of("bpe", stage="bpe", vocab_size=2000, rhyming=rhyming, syllables=1.0, characters=0.5,
                     errors=dict(rhyming=4.0))
        verdicts = {row[0]: row[1:] for row in compare.claims([char, bpe])}
        assert verdicts["Characters master rhyme endings"][0] == expected  # two standard errors are 2 * 5
    verdict, figures = verdicts["Characters master the texture of lines"]
    assert verdict == "falls"  # better in syllables, worse in characters: both have to hold
    assert "syllables per line: distance: char 0.50, bpe 1.00; characters per line: distance: char 1.00, bpe 0.50" == figures
    assert verdicts["50,000 entries starve"] == ["not tested", "no such runs"]


def test_claims_compare_with_the_strongest_rival_and_name_it():
    full, small, char = (run_of("gpt2", stage="bpe", vocab_size=50257, val_bpc=3.1, tokens_per_vocab_entry=2.0),
                         run_of("custom_2k", stage="bpe", vocab_size=2000, val_bpc=2.7, tokens_per_vocab_entry=30.0),
                         run_of("char", val_bpc=2.5, tokens_per_vocab_entry=1500.0))
    rows = {row[0]: row[1:] for row in compare.claims([full, small, char])}
    assert rows["50,000 entries starve"] == [
        "holds", "training tokens per entry: gpt2 2.0, custom_2k 30.0; val bits/char: gpt2 3.100, custom_2k 2.700"]
    full.values["val_bpc"] = 2.71
    assert {row[0]: row[1] for row in compare.claims([full, small, char])}["50,000 entries starve"] == "too close"


def test_runs_are_told_apart_by_tokenizer_size_and_epochs():
    runs = [run_of("a", stage="bpe", vocab_size=2000), run_of("b", stage="bpe", vocab_size=8000),
            run_of("c", stage="bpe", vocab_size=50257),
            run_of("d", stage="bpe", vocab_size=50257, options=dict(tokenizer="polish")),
            run_of("e"), run_of("f", stage="hf", epochs=4, val_bpc=2.0), run_of("g", stage="hf", epochs=50, val_bpc=None)]
    names = {kind: "".join(run.name for run in members) for kind, members in compare.kinds(runs).items()}
    assert names == {"small": "a", "middle": "b", "full": "c", "polish": "d", "char": "e", "hf": "fg", "hf, short": "f",
                     "hf, long": "g"}
    assert "hf, long" not in compare.kinds(runs[:-1])


# --- training -----------------------------------------------------------------------------------------------
def test_run_trains_skips_what_is_done_and_continues_what_is_not(made, monkeypatch, capsys):
    for script in (gpt, gpt_tiktoken):
        monkeypatch.setitem(script.SIZES, "tiny", SHAPE)
    monkeypatch.setattr(compare, "TRAINING", {"char": {}, "custom": dict(tokenizer="custom", vocab_size=300),
                                              "too_large": dict(tokenizer="custom", vocab_size=50_000)})
    argv = ["--run", *compare.flags(input=made / "songs.txt", runs="runs", out="out", minutes=0.5, size="tiny")]
    plan = next(compare.plans(compare.parse_args(argv)))
    seconds, most = compare.probe(plan)
    training, _ = gpt.split_corpus(gpt.read_corpus(made / "songs.txt"))
    assert 0 < seconds < 2 and most == pytest.approx(gpt.EPOCHS * len(training) / (32 * 4))  # a step reads 4 x 32 characters
    monkeypatch.setattr(compare, "probe", lambda plan: (1.0, 20.0 if plan.name == "custom" else math.inf))
    char, custom, _ = compare.main(argv)
    out, err = capsys.readouterr()
    assert "too_large: left out" in out and "--vocab_size 50000 is too large" in err
    for run, steps in ((char, 30), (custom, 20)):  # half a minute at one second a step; enough passes over the text
        assert run.values["iters"] == run.options["max_iters"] == steps
        assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 11  # at the start, then every tenth
    Path("runs/custom/metrics.json").unlink()  # as if it had been killed
    capsys.readouterr()
    again = compare.main(argv)
    out = capsys.readouterr().out
    assert "char: finished before" in out and "custom: continued" in out
    assert [run.values["val_bpc"] for run in again[:2]] == [run.values["val_bpc"] for run in (char, custom)]


def test_ctrl_c_ends_the_whole_comparison(capsys):
    def interrupted(argv):
        raise SystemExit(130)

    plan = SimpleNamespace(name="char", hf=False, options=[], place="run_dir", folder=Path("run"),
                           script=SimpleNamespace(main=interrupted))
    with pytest.raises(SystemExit) as stop:
        compare.train(plan, 1.0)
    assert stop.value.code == 130 and "the same command continues" in capsys.readouterr().out


def test_ctrl_c_while_stage_3_writes_samples_ends_the_comparison_too(runs, monkeypatch, capsys):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "samples", interrupted)
    with pytest.raises(SystemExit) as stop:
        compare.main(runs)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped; the same command continues from here\n"


def test_a_run_is_told_by_its_config_and_a_model_folder_is_none(tmp_path):
    setup = dict(options=dict(epochs=4), corpus_sha256="ab")
    assert compare.read_setup(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert compare.read_setup(tmp_path) == {}
    (tmp_path / "config.json").write_text(json.dumps(setup))
    assert compare.read_setup(tmp_path) == setup


def test_stage_3_is_trained_with_a_budget_and_compared(made, runs, tmp_path, monkeypatch, capsys):
    base = hf_models.save(tmp_path / "base", hf_models.gpt2())
    monkeypatch.setattr(compare, "TRAINING", {})
    short, long = compare.plans(SimpleNamespace(input=str(made / "songs.txt"), runs="runs", size="auto", polish="", hf=base,
                                               hf_rate=1e-4))
    assert [short.name, long.name] == ["hf_short", "hf_long"]
    short.options.append("--max_new_tokens=5")
    monkeypatch.setattr(compare, "plans", lambda args, plan=short: [plan])
    argv = ["--run", *compare.flags(input=made / "songs.txt", runs="runs", hf=base, minutes=0.002, out="out")]
    char, short, _ = compare.main([runs[0], *argv])
    assert short.name == "hf_short" and short.options["epochs"] == 4
    assert 1 <= short.values["iters"] <= short.options["max_steps"] and len(short.texts) == 5
    assert short.values["chars_per_second"] == pytest.approx(
        short.values["tokens_per_second"] * short.values["chars_per_token"])
    assert not list(Path("runs").rglob("*.previous-*"))  # sampling leaves the run's own sample alone
    verdicts = {row[0]: row[1] for row in compare.claims([char, short])}
    assert verdicts["Transfer brings meaning (here: real words and a better guess)"] != "not tested"
    capsys.readouterr()
    compare.main(argv)
    assert "hf_short: finished before" in capsys.readouterr().out


def test_stage_3_interrupted_ends_the_comparison_and_continues_within_its_budget(made, tmp_path, monkeypatch, capsys):
    base = hf_models.save(tmp_path / "base", hf_models.gpt2())
    monkeypatch.setattr(compare, "TRAINING", {})
    monkeypatch.setattr(compare, "probe", lambda plan: (1.0, math.inf))
    argv = ["--run", *compare.flags(input=made / "songs.txt", runs="runs", hf=base, minutes=5 / 60, out="out")]
    plan = next(compare.plans(compare.parse_args(argv)))
    plan.options.append("--max_new_tokens=5")
    monkeypatch.setattr(compare, "plans", lambda args: [plan])
    step = gpt_hf.ExactTrainer.training_step

    def interrupted(trainer, *args):
        if trainer.state.global_step == 2:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt_hf.ExactTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            compare.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 130 and err.startswith("stopped; ") and "the same command continues from here" in out
    assert not Path("out/comparison.md").exists()
    tuned, _ = compare.main(argv)
    assert "hf_short: continued" in capsys.readouterr().out
    assert tuned.values["iters"] == tuned.options["max_steps"] == 5  # not as many as the epochs have
