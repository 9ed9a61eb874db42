"""The comparison of the stages: pytest tests/test_compare_stages.py. Two tiny models are really trained; no network."""

import contextlib
import doctest
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import compare_stages as compare
import corpus_report
import hf_models
import measures
import numpy as np
import pictures
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
    """Six texts of 200 characters, in batches of four, and an empty folder to work in."""
    monkeypatch.setattr(compare, "LENGTH", 200)
    monkeypatch.setattr(compare, "BATCH", 4)
    parse = compare.parse_args
    monkeypatch.setattr(compare, "parse_args", lambda argv: parse(argv if "--texts" in argv else ["--texts=6", *argv]))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(made, tmp_path):
    """A copy of the two runs: their folders."""
    return [str(shutil.copytree(made / name, tmp_path / name)) for name in ("char", "bpe")]


def run_of(name, **values):
    """A run made up for the claims: of stage 1 and with 3 bits per character unless told otherwise; 64 texts."""
    kept = {key: values.pop(key) for key in ("stage", "options", "draws", "last", "folder") if key in values}
    dice = np.random.default_rng(len(name))
    kept["draws"] = {key: dice.permutation(np.linspace(*bounds, 2001)) for key, bounds in kept.get("draws", {}).items()}
    return compare.Run(name, **{"stage": "char", **kept}, values=dict(val_bpc=3.0, vocab_size=100) | values, texts=[""] * 64)


def error_of(capsys, argv):
    """The one line on stderr of a call that has to exit with 2."""
    with pytest.raises(SystemExit) as stop:
        compare.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- measures -----------------------------------------------------------------------------------------------
def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(compare) == (0, 1) and doctest.testmod(measures) == (0, 3) and doctest.testmod(pictures) == (0, 1)
    assert compare.flags(size="tiny", resume=True) == ["--size=tiny", "--resume"]
    assert measures.interval(np.arange(101.0)) == (2.5, 97.5)


def test_measures_by_hand():
    training = SONG + "<|endoftext|>\nNoc nad blokiem\nRano z rogiem\n"
    # 6 lines of 16 and 8 words: "klałka", twice, is neither known nor a word; "deszcz" is only new.
    text = SONG.replace("Kot", "Deszcz") + "<|endoftext|>\n[Refren]\nNoc nad blokiem\nNoc nad blokiem\n\nklałka, Klałka\n"
    values, draws = measures.measure([text], training)
    assert values["unseen"] == pytest.approx(100 * 3 / 24) and values["distinct_words"] == pytest.approx(100 * 20 / 24)
    assert values["rhyming"] == 0 == corpus_report.rhyming_share(text)  # "tramwaj" and "aj" are of one and of two syllables
    assert values["distinct_lines"] == pytest.approx(100 * 5 / 6) and values["repeated"] == pytest.approx(100 * 1 / 6)
    assert (values["verse_lines"], values["song_verses"], values["headers"]) == (2, 1.5, 0.5)
    assert values["uneven"] == 0 and measures.measure(["raz\nraz dwa\n\nraz dwa raz"], "raz")[0]["uneven"] == 1
    # Song 1 has 9 runs of 8 words: those without "deszcz", its 12th word, begin at words 1 to 4. Song 2 has two, not copied:
    # stage 3 counts the header's word.
    assert values["copied"] == pytest.approx(100 * 4 / 11) and values["longest"] == 11
    ours, theirs = [len(line) for line in corpus_report.all_lines(text)], [30, 30, 26, 15, 13]
    assert [len(line) for line in corpus_report.all_lines(training)] == theirs
    both = [np.bincount(lengths, minlength=40) for lengths in (ours, theirs)]
    assert values["char_distance"] == pytest.approx(measures.distance(*both))
    if "real" in values:
        assert values["real"] == pytest.approx(100 * 22 / 24)
    assert all(measures.interval(draws[name]) == (values[name], values[name]) for name in draws)  # one text: no spread


def test_a_copy_across_line_ends_and_case_counts_and_one_across_songs_does_not():
    training = "raz dwa trzy cztery\n<|endoftext|>\npięć sześć siedem osiem"
    assert measures.copied("Raz; DWA\n\ntrzy", training, 2) == (1, 3)
    assert measures.copied("trzy cztery pięć sześć", training, 2) == (2 / 3, 2)
    assert measures.copied("trzy cztery\n<|endoftext|>\npięć sześć", training, 2) == (1, 2)  # nor is one across ours
    assert measures.copied("wa trzy", training) == (0, 1)  # "wa" is the end of a word, no word
    assert measures.copied("raz dwa", training) == (0, 2) and measures.copied("", training) == (0, 0)  # none of 8


def test_the_copy_rate_is_that_of_stage_3_in_which_case_and_commas_do_not_count():
    songs = hf_models.songs(12)
    training = corpus_report.join_songs(songs)
    assert "," in training and training != training.upper()
    for text in (training.upper(), training.replace(",", ""), training.lower().replace(" ", ", "),
                 training.replace("\n", ";\n")):
        text = text.replace("<|ENDOFTEXT|>", "<|endoftext|>").replace("<|endoftext|>;", "<|endoftext|>")
        rate, longest = measures.copied(text, training)
        assert rate >= 0.95 and text != training
        assert (rate, longest) == gpt_hf.copy_rate(corpus_report.split_songs(text), gpt_hf.END.join(songs))
        values, _ = measures.measure([text, " ".join(reversed(training.split()))], training)
        runs, _ = measures.count_copied([text], training)
        assert runs[0][0] == pytest.approx(rate * runs[0][1]) and 30 < values["copied"] < 70
    assert measures.copied(" ".join(reversed(training.split())), training)[0] < 0.05


def test_the_distance_is_that_of_sorted_values():
    dice = np.random.default_rng(1)
    for _ in range(100):
        a, b = dice.integers(20, size=(2, 12))
        counts = [np.bincount(values, minlength=21) for values in (a, b)]
        direct = np.abs(np.sort(a) - np.sort(b)).mean()
        assert measures.distance(*counts) == pytest.approx(direct) == pytest.approx(measures.distance(*counts[::-1]))
        assert measures.distance(counts[0], 3 * counts[0]) == pytest.approx(0)


def test_the_interval_is_that_of_the_mean_and_a_text_counts_by_its_length():
    dice = np.random.default_rng(2)
    texts = ["\n".join(("woda" if dice.random() < 0.5 else "klałka") for _ in range(20)) for _ in range(64)]
    values, draws = measures.measure(texts, "woda")
    low, high = measures.interval(draws["unseen"])
    spread = 1.96 * 100 * (0.25 / (20 * 64)) ** 0.5
    assert low < values["unseen"] < high and (high - low) / 2 == pytest.approx(spread, rel=0.25)
    values, _ = measures.measure(["woda\n" * 3, "klałka"], "woda")
    assert values["unseen"] == 25


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    dice = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        counts = np.stack((dice.binomial(30, 0.2, size=64), np.full(64, 30)), axis=1)
        times = dice.multinomial(64, np.full(64, 1 / 64), size=500)
        low, high = measures.interval(measures.figure("rhyming", times @ counts, ""))
        held += low <= 20 <= high
    assert held >= 180


def test_without_morfeusz_the_real_words_are_left_out(monkeypatch):
    monkeypatch.setattr(measures.importlib.util, "find_spec", lambda name: None)
    values, draws = measures.measure([SONG, SONG], SONG)
    assert "real" not in values and "real" not in draws and values["copied"] == 100
    assert compare.cell(compare.Run("", values=values, draws=draws), "real") == "–"


def test_by_chance_is_what_shuffled_lines_rhyme():
    couplets = [f"Noc {number} {a}\nDzień {number} {b}" for number, (a, b) in enumerate(
        [("morze", "może"), ("góra", "chmura"), ("krew", "gniew"), ("but", "chłód"), ("leci", "dzieci")] * 8)]
    songs = ["\n".join(couplets[i:i + 4]) for i in range(0, 40, 4)]
    assert measures.measure(songs, "")[0]["rhyming"] == 100
    assert 5 < measures.by_chance(songs, corpus_report.rhyme_key) < 60
    assert measures.by_chance(songs, corpus_report.rhyme_key) == measures.by_chance(songs, corpus_report.rhyme_key)


def test_excerpts_begin_with_a_song_or_else_with_a_line():
    text = "\n".join(f"wers {number}" for number in range(150))
    parts = compare.excerpts(text)
    lines = [line for part in parts for line in part.splitlines()]
    assert len(parts) == len(text) // 200 and len(lines) == len(set(lines)) and set(lines) <= set(text.splitlines())
    assert all(160 <= len(part) <= 200 for part in parts) and lines[0] == "wers 0"
    songs = [f"pieśń {number}\n" + "la la la\n" * 20 for number in range(9)]
    parts = compare.excerpts(compare.SEPARATOR.join(song.rstrip() for song in songs))
    assert [part.splitlines()[0] for part in parts] == [f"pieśń {number}" for number in range(9)]
    assert all(len(corpus_report.flatten(part)) <= 200 for part in parts)
    assert compare.excerpts("krótki") == ["krótki"]


# --- runs ---------------------------------------------------------------------------------------------------
def files(folders):
    """What each file below the folders holds."""
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


def test_two_runs_are_compared_and_the_second_call_needs_no_model(made, runs, tmp_path):
    before = files(runs)
    figures = compare.main([*runs, "--out", "out"])
    after = files(runs)
    assert all(after.pop(path) == content for path, content in before.items())  # nothing else in the runs has changed
    assert {path.name for path in after} == {"samples.json"} and len(after) == 2
    short = Path("out/comparison.md").read_text(encoding="utf-8").split("**How it was")[0]
    assert all(f"), {run.values['rhyming_chance']:.1f} |" in short for run in [*figures[:3], figures[-1]])
    *ours, real, mixed, letters = figures
    for run, folder in zip(ours, runs):
        said = json.loads(Path(folder, "metrics.json").read_text())
        assert all(run.values[name] == said[name] for name in set(compare.COSTS) - {"device", "epochs"})
        tokens = said["tokens_per_vocab_entry"] * said["vocab_size"]
        assert run.values["epochs"] == pytest.approx(40 * 8 * 32 / tokens)  # 40 steps of 8 x 32 tokens
        assert [bits for _, bits in run.curve][-1] == pytest.approx(said["val_bpc"], abs=0.5) and len(run.curve) == 3
        assert run.curve[-1][0] == pytest.approx(40 * 8 * 32 * said["chars_per_token"])  # characters read
        assert run.values["unseen"] > real.values["unseen"] == 0  # the songs of the corpus repeat each other's lines
        assert all(0 < len(corpus_report.flatten(text)) <= 200 for text in run.texts) and len(set(run.texts)) == 6
    assert [run.name for run in (real, mixed, letters)] == [
        "validation text", "its lines shuffled", "letters by bigrams"]
    assert real.values["copied"] == 100 > letters.values["copied"] == 0 and letters.values["unseen"] > 60
    assert sorted(corpus_report.all_lines("\n".join(mixed.texts))) == sorted(corpus_report.all_lines("\n".join(real.texts)))

    report = Path("out/comparison.md").read_text(encoding="utf-8")
    for run in ours:
        row = next(line for line in report.splitlines() if line.startswith(f"| {run.name} |"))
        assert f"| {run.values['val_bpc']:.3f} |" in row
    tables = {line.count("|") - 1 for line in report.split("## Costs")[0].splitlines() if line.startswith("| char")}
    assert tables == {5}
    rows = report.splitlines()
    assert any(row.startswith("| xz | – | ") for row in rows) and any(row.startswith("| Kneser-Ney, order 6 |") for row in rows)
    for name in ("curves", "density", "texts"):
        assert Path(f"out/{name}.png").read_bytes().startswith(b"\x89PNG") and f"]({name}.png)" in report
    for run, folder in zip(ours, runs):
        kept = Path("out", run.name)
        assert {path.name for path in kept.iterdir()} == {"metrics.json", "metrics.jsonl", "loss.png", "samples.txt"}
        assert (kept / "metrics.json").read_bytes() == Path(folder, "metrics.json").read_bytes()
        assert all(text in (kept / "samples.txt").read_text(encoding="utf-8") for text in run.texts)

    for model in tmp_path.rglob("*.pt"):
        model.unlink()
    Path("out/comparison.md").unlink()
    Path("README.md").write_text("Tu:\n<!-- results -->\nstare\n<!-- /results -->\n<!-- claims -->\n", encoding="utf-8")
    again = compare.main([*runs, "--out", "out", "--readme", "README.md"])
    assert [repr(run.values) for run in again] == [repr(run.values) for run in figures]  # nan is not nan
    assert Path("out/comparison.md").read_text(encoding="utf-8") == report
    filled = Path("README.md").read_text(encoding="utf-8")
    assert filled.startswith("Tu:\n<!-- results -->\n| run |") and filled.endswith("|\n<!-- /results -->\n<!-- claims -->\n")
    assert filled.split("-->\n")[1].split("\n<!--")[0] in report
    other = str(shutil.copytree(runs[0], tmp_path / "second" / "char"))  # two runs of one name go by their paths
    assert [run.name for run in compare.main([runs[0], other, "--out", "out"])][:3] == [runs[0], other, "validation text"]


def test_samples_of_another_training_or_too_few_are_written_anew(runs):
    run, = compare.read_run(runs[0])
    first = compare.samples(run, 6)
    path = Path(runs[0], "samples.json")
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | dict(texts=["Stary tekst\n"] * 6)))
    assert compare.samples(run, 5) == ["Stary tekst\n"] * 5
    assert len(compare.samples(run, 7)) == 7 and compare.samples(run, 4) == first[:4]
    path.write_text(json.dumps(kept | dict(texts=["Stary tekst\n"] * 6)))
    metrics = Path(runs[0], "metrics.json")
    metrics.write_text(metrics.read_text() + "\n")
    assert compare.samples(run, 6) == first
    path.write_text("{", encoding="utf-8")  # cut short
    assert compare.samples(run, 6) == first


# --- batches ------------------------------------------------------------------------------------------------
def models(made):
    """The two stages with their trained models in float64: (script, model, tokenizer, context)."""
    for script, name in ((gpt, "char"), (gpt_tiktoken, "bpe")):
        saved = script.load_checkpoint(str(made / name / "model_best.pt"))
        tokenizer = script.make_tokenizer({}, "", saved)
        model = script.GPTLanguageModel(script.Config(**saved["config"]), tokenizer.vocab_size).double()
        model.load_state_dict(saved["model"])
        torch.manual_seed(1)
        for p in model.parameters():  # or such a small model repeats one letter
            p.data += 0.3 * torch.randn_like(p)
        yield script, model, tokenizer, saved["context"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_texts_of_a_batch_are_those_drawn_alone(made, monkeypatch, temperature):
    for script, model, tokenizer, context in models(made):
        single, generators = script.draw_token, []

        def draw(logits, *how, single=single, generators=generators):
            """Its own generator for each row, so that a row does not depend on the others."""
            return torch.cat([single(row[None], *how[:3], generator) for row, generator in zip(logits, generators)])

        monkeypatch.setattr(script, "draw_token", draw)
        prompts = torch.stack([tokenizer.encode(hf_models.VERSES[i] * 2)[i:i + 12].long() for i in range(5)])

        def texts(rows, script=script, generators=generators, model=model, tokenizer=tokenizer, context=context,
                  prompts=prompts):
            generators[:] = [torch.Generator().manual_seed(row) for row in rows]
            tokens = script.generate(model, prompts[rows], 90, context, temperature, 0, 0.95, end=tokenizer.end)
            return torch.stack(list(tokens), dim=1)  # (B, 90), further than the context

        together = texts([0, 1, 2, 3, 4])
        assert len({tuple(row) for row in together.tolist()}) >= 3
        assert all(torch.equal(together[i], texts([i])[0]) for i in range(5))


def test_quick_draws_have_the_same_probabilities(monkeypatch):
    monkeypatch.setattr(compare, "FEW", 4)
    logits, from_all = torch.tensor([[0.0, 2.0, -1.0, 1.0, 0.5, -2.0, 1.5, -3.0, -4.0, -5.0]]), gpt.draw_token
    for top_p in (0.3, 0.7, 0.95):  # 0.95 takes more than four
        counts = []
        for quick in (False, True):
            with compare.quick_draws(gpt) if quick else contextlib.nullcontext():
                assert (gpt.draw_token is from_all) != quick
                drawn = gpt.draw_token(logits.expand(20_000, -1), 0.8, 0, top_p, torch.Generator().manual_seed(1))
                counts.append(torch.bincount(drawn, minlength=10) / 20_000)
        assert torch.equal(counts[0] > 0, counts[1] > 0) and (counts[0] - counts[1]).abs().max() < 0.02
    assert gpt.draw_token is from_all
    with compare.quick_draws(gpt), pytest.raises(gpt.Stop):
        gpt.draw_token(logits * math.nan, 0.8, 0, 0.9)


def test_the_songs_of_a_batch_are_those_that_stage_3_draws_alone(monkeypatch, tmp_path):
    base = gpt_hf.load_pretrained(hf_models.save(tmp_path / "base", hf_models.qwen3()), torch.device("cpu"))
    base.model.double()
    config = gpt_hf.Config(max_new_tokens=150, temperature=0.0)  # the context is 64
    alone = gpt_hf.sample_text(base, config, 0)
    assert compare.write_songs(gpt_hf, base, config, 3) == [alone] * 3 and len(alone) > 64
    made = {}

    def scripted(context, attention_mask, max_new_tokens):
        """Row 0 ends its song after 5 tokens, the others never do."""
        assert attention_mask.shape == context.shape and context.size(1) + max_new_tokens <= 64
        new = torch.randint(300, 399, (len(context), max_new_tokens), generator=made.setdefault("g", torch.Generator()))
        if "ended" not in made:
            new[0, 5:] = base.end
            made["ended"] = new[0, :5].tolist()
        return torch.cat((context, new), dim=1)

    monkeypatch.setattr(base.model, "generate", scripted)
    songs = compare.write_songs(gpt_hf, base, config, 3)
    assert songs[0] == base.tokenizer.decode(made["ended"])
    assert all(len(base.tokenizer.encode(song)) > 100 for song in songs[1:])


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
    assert "--texts" in error_of(capsys, [runs[0], "--texts=1"])
    Path(runs[0], "model_best.pt").unlink()
    assert "no checkpoint" in error_of(capsys, runs)
    assert not Path(runs[0], "samples.json").exists()


# --- claims -------------------------------------------------------------------------------------------------
def test_claims_hold_or_not_or_are_undecided_with_the_texts_that_would_decide():
    char = run_of("char", rhyming=40.0, syllable_distance=0.5, char_distance=1.0,
                  draws=dict(rhyming=(39, 41), syllable_distance=(0.5, 0.5), char_distance=(1.0, 1.0)))
    for rhyming, expected in ((20.0, "holds"), (39.5, "undecided"), (45.0, "does not hold"), (39.9, "undecided")):
        bpe = run_of("bpe", stage="bpe", vocab_size=2000, rhyming=rhyming, syllable_distance=1.0, char_distance=0.5,
                     draws=dict(rhyming=(rhyming - 1, rhyming + 1), syllable_distance=(1.0, 1.0), char_distance=(0.5, 0.5)))
        verdicts = {row[0]: row[1:] for row in compare.claims([char, bpe])}
        assert verdicts["Characters master rhyme endings"][0].partition(":")[0] == expected
        assert ("texts would decide" in verdicts["Characters master rhyme endings"][0]) == (expected == "undecided")
    verdict, figures = verdicts["Characters master the texture of lines"]
    assert verdict == "does not hold"  # better in syllables, worse in characters: both have to hold
    assert "syllables: distance: char 0.50 (0.50–0.50), bpe 1.00 (1.00–1.00); characters: distance: char 1.00" in figures
    assert verdicts["50,000 entries starve"] == ["not tested", "no such runs"]


@pytest.mark.parametrize(("lead", "half", "verdict", "needed"), [
    (2.0, 1.0, "holds", 16), (0.8, 1.6, "undecided", 256), (0.2, 1.6, "undecided", 256), (-0.5, 1.0, "does not hold", 29),
    (0.1, 0.4, "does not hold", 13), (-3.0, 8.0, "undecided", 256),
])
def test_a_lead_is_judged_by_its_interval(lead, half, verdict, needed):
    rng = np.random.default_rng(0)
    ours = run_of("ours", rhyming=10 + lead)
    rival = run_of("rival", rhyming=10.0)
    ours.draws["rhyming"] = rng.permutation(np.linspace(10 + lead - half / 0.95, 10 + lead + half / 0.95, 2001))
    rival.draws["rhyming"] = np.full(2001, 10.0)
    found, texts, _ = compare.judge(ours, [rival, run_of("weak", rhyming=1.0)], "rhyming", 1)
    assert found == verdict and texts == pytest.approx(needed, rel=0.05)  # 64 (half / gap)^2


def test_the_number_of_texts_that_is_named_does_decide():
    """With as many texts as a verdict names, four of five comparisons of the same two models are decided."""
    rng = np.random.default_rng(5)

    def compared(n):
        runs = []
        for name, rate in (("ours", 0.10), ("rival", 0.08)):
            counts = np.stack((rng.binomial(40, rate, size=n), np.full(n, 40)), axis=1)
            times = rng.multinomial(n, np.full(n, 1 / n), size=400)
            runs.append(compare.Run(name, values=dict(rhyming=measures.figure("rhyming", counts.sum(axis=0), "")),
                                    draws=dict(rhyming=measures.figure("rhyming", times @ counts, "")), texts=[""] * n))
        return compare.judge(runs[0], runs[1:], "rhyming", 1)

    named = [needed for verdict, needed, _ in (compared(40) for _ in range(40)) if verdict == "undecided"]
    assert len(named) > 5
    enough = 2 * int(np.median(named))
    assert sum(compared(enough)[0] != "undecided" for _ in range(40)) >= 32


def test_bits_per_character_lead_by_more_than_seeds_differ():
    for theirs, verdict in ((3.03, "holds"), (3.01, "undecided"), (3.0, "does not hold"), (2.9, "does not hold")):
        found = compare.judge(run_of("ours"), [run_of("rival", val_bpc=theirs)], "val_bpc", -1)
        assert found == (verdict, 0, f"bits/char: ours 3.000, rival {theirs:.3f}")


def test_claims_compare_with_the_strongest_rival_and_name_it():
    full, small, char = (run_of("gpt2", stage="bpe", vocab_size=50257, val_bpc=3.1, tokens_per_vocab_entry=2.0),
                         run_of("custom_2k", stage="bpe", vocab_size=2000, val_bpc=2.7, tokens_per_vocab_entry=30.0),
                         run_of("char", val_bpc=2.5, tokens_per_vocab_entry=1500.0))
    rows = {row[0]: row[1:] for row in compare.claims([full, small, char])}
    assert rows["50,000 entries starve"] == [
        "holds", "density: gpt2 2.0, custom_2k 30.0; bits/char: gpt2 3.100, custom_2k 2.700"]
    full.values["val_bpc"] = 2.71
    assert {row[0]: row[1] for row in compare.claims([full, small, char])}["50,000 entries starve"] == (
        "undecided: within 0.02 bits")


def test_runs_are_told_apart_by_tokenizer_size_and_epochs():
    runs = [run_of("a", stage="bpe", vocab_size=2000), run_of("b", stage="bpe", vocab_size=8000),
            run_of("c", stage="bpe", vocab_size=50257),
            run_of("d", stage="bpe", vocab_size=50257, options=dict(tokenizer="polish")),
            run_of("e"), run_of("f", stage="hf", epochs=4, val_bpc=2.0), run_of("g", stage="hf", epochs=50, val_bpc=None)]
    names = {kind: "".join(run.name for run in members) for kind, members in compare.kinds(runs).items()}
    assert names == {"small": "a", "middle": "b", "full": "c", "polish": "d", "char": "e", "hf": "fg", "hf, short": "f",
                     "hf, long": "g"}
    assert "hf, long" not in compare.kinds(runs[:-1])
    runs[-1].folder = Path("g")
    last = run_of("g, last", stage="hf", last=True, epochs=50, folder=Path("g"))
    groups = compare.kinds([*runs, last])
    assert groups["hf, long"] == [last] and last not in groups["hf"]  # what 50 epochs make is the last model, not the best


# --- pictures -----------------------------------------------------------------------------------------------
def test_labels_are_spread_and_keep_their_order():
    dice = np.random.default_rng(4)
    for _ in range(50):
        values = dice.uniform(0, 10, size=9).tolist()
        heights = pictures.spread(values, 1.0, (0, 10))
        placed = sorted(heights)
        assert all(b - a >= 1 - 1e-6 for a, b in zip(placed, placed[1:])) and placed[0] >= -1e-9
        assert sorted(range(9), key=values.__getitem__) == sorted(range(9), key=heights.__getitem__)
    assert pictures.spread([5.0], 1.0, (0, 10)) == [5.0]


def test_no_two_of_twenty_runs_look_the_same():
    assert len({tuple(pictures.style(number).items()) for number in range(20)}) == 20


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
    char, custom, *_ = compare.main(argv)
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
    def interrupted(run, count):
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
    char, short, *_ = compare.main([runs[0], *argv])
    assert short.name == "hf_short" and short.options["epochs"] == 4
    assert 1 <= short.values["iters"] <= short.options["max_steps"] and len(short.texts) == 6
    assert all(0 < len(corpus_report.flatten(text)) <= 200 for text in short.texts) and len(set(short.texts)) == 6
    assert short.values["chars_per_second"] == pytest.approx(
        short.values["tokens_per_second"] * short.values["chars_per_token"])
    assert not list(Path("runs").rglob("*.previous-*"))  # sampling leaves the run's own sample alone
    verdicts = {row[0]: row[1] for row in compare.claims([char, short])}
    assert verdicts["Transfer brings meaning (here: real words and a better guess)"] != "not tested"
    capsys.readouterr()
    compare.main(argv)
    assert "hf_short: finished before" in capsys.readouterr().out


def test_a_model_that_has_memorized_is_a_run_of_its_own(made, tmp_path, monkeypatch):
    base = hf_models.save(tmp_path / "base", hf_models.gpt2())
    gpt_hf.main(compare.flags(input=made / "songs.txt", output_dir="tuned", model_name=base, epochs=3, batch_size=8,
                              block_size=32, max_new_tokens=5, num_samples=1, device="cpu", dtype="float32"))
    assert [run.name for run in compare.read_run("tuned")] == ["tuned"]
    history = [json.loads(line) for line in Path("tuned/metrics.jsonl").read_text().splitlines()]
    history[-1]["val_bpc"] += 1  # as if it had
    Path("tuned/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
    best, last = compare.read_run("tuned")
    assert last.name == "tuned, last" and last.last and last.values["val_bpc"] == history[-1]["val_bpc"]
    assert last.values["best_iter"] == last.values["iters"] == history[-1]["iter"]
    figures = compare.main(["tuned", "--out", "out"])
    assert [run.name for run in figures[:2]] == ["tuned", "tuned, last"] and figures[1].texts != figures[2].texts
    assert {path.name for path in Path("tuned").glob("samples*.json")} == {"samples.json", "samples_last.json"}
    assert Path("out/tuned_last/samples.txt").exists() and not Path("out/tuned_last/metrics.json").exists()


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
    tuned, *_ = compare.main(argv)
    assert "hf_short: continued" in capsys.readouterr().out
    assert tuned.values["iters"] == tuned.options["max_steps"] == 5  # not as many as the epochs have
