"""Every benchmark runs to its end at toy size: pytest tests/test_benchmarks.py. Figures come from the real thing.

What a benchmark would start as a process of its own is run inside this one, where torch is loaded already. Two of them
run as they are, compilers and all: pytest -m slow tests/test_benchmarks.py
"""

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import busy
import generate
import gpu
import hf_models
import hf_step
import large_corpus
import prose
import pytest
import quality
import smollm2
import time_to_loss
import tokenizer_files
import torch
import training_step
import transfer

import gpt
import gpt_tiktoken

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=4, dropout=0.1, grow=0)
NUMBER = r"\d[\d,]*(?:\.\d+)?"


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """An empty folder to work in, one thread, and a size tiny that is really tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for stage in (gpt, gpt_tiktoken):
        monkeypatch.setitem(stage.SIZES, "tiny", SHAPE | dict(max_iters=20, eval_interval=20, sample_interval=0))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    """A small corpus, one song."""
    path = tmp_path / "text.txt"
    path.write_text(tokenizer_files.babble(300), encoding="utf-8")
    return path


def in_process(command, **_):
    """What subprocess.run would do with `python SCRIPT ARGUMENTS`, without a new process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        importlib.import_module(Path(command[1]).stem).main([str(word) for word in command[2:]])
    return SimpleNamespace(stdout=out.getvalue())


def table(out, *first):
    """The cells of the rows whose first cell begins with one of the words."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0].startswith(first)]


def figures(cells):
    """Cells as numbers."""
    return [float(cell.replace(",", "").rstrip("%")) for cell in cells]


# ------------------------------------------------------------------------------------------- speed and memory
def test_training_step_measures_each_row(monkeypatch, capsys):
    for stage in (gpt, gpt_tiktoken):
        monkeypatch.setitem(stage.SIZES, "base", stage.SIZES["tiny"] | dict(n_layer=2))
    monkeypatch.setattr(training_step.subprocess, "run", in_process)
    training_step.main(["--steps", "2"])
    rows = table(capsys.readouterr().out, "tiny", "base")
    assert [row[0] for row in rows] == list(training_step.ROWS) and len(rows) == 6
    assert all(row[1] in ("bfloat16", "float32") for row in rows)
    assert all(min(figures(row[3:5])) > 0 for row in rows)
    training_step.main(["--steps", "2", "--only", "classic"])
    assert len(table(capsys.readouterr().out, "tiny", "base")) == 2


def spin_rows(out):
    return [line.strip("| ").split(" | ") for line in out.splitlines()[4:]]


def test_a_step_is_measured_with_and_without_spinning_threads(monkeypatch, capsys):
    step = "import json, os; print(json.dumps(dict(seconds=1 + len(os.environ.get('GOMP_SPINCOUNT', '')))))"
    monkeypatch.setattr(busy, "STEP", [sys.executable, "-c", step])
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    busy.main(["--rounds", "1"])
    assert spin_rows(capsys.readouterr().out) == [["not set", "1000", "1000", "1.00"], ["1000", "5000", "5000", "1.00"]]


def test_the_plain_loss_of_training_step_is_that_of_the_slices():
    config = gpt_tiktoken.make_config(SHAPE | dict(dropout=0.0), torch.device("cpu"))
    model, rows = gpt_tiktoken.GPTLanguageModel(config, 300), torch.randint(300, (2, 33))
    plain, sliced = (network(rows[:, :-1], rows[:, 1:]).item() for network in (training_step.Plain(model), model))
    assert plain == pytest.approx(sliced, rel=1e-5)


def test_generate_compares_cache_and_no_cache(monkeypatch, capsys):
    monkeypatch.setattr(generate, "SHAPE", dict(n_layer=1, n_head=2, n_embd=16, block_size=8))
    monkeypatch.setattr(generate, "CHUNK", 6)
    generate.main(["--tokens", "12"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["modern", "classic"]
    assert all(re.fullmatch(rf"\w+: {NUMBER} tokens/s with the cache, {NUMBER} without: {NUMBER} times .*median {NUMBER}\)",
                            line) for line in lines)


def test_generate_compares_a_batch_with_single_rows(monkeypatch, capsys, text):
    monkeypatch.setattr(generate, "CHUNK", 20)
    gpt.main([f"--input={text}", "--run_dir=run", "--device=cpu", "--dtype=float32", "--max_new_tokens=1"])
    for source in ([], ["--run_dir", "run"]):
        capsys.readouterr()
        generate.main(["--batch", "4", "--tokens", "40", *source])
        rate, single, double = capsys.readouterr().out.splitlines()[1:]
        assert re.fullmatch(rf"batch of 4: {NUMBER} tokens/s, one row after the other {NUMBER}: {NUMBER} times", rate)
        assert single.startswith("float32: ") and double == (
            "float64: 0 of 4 rows of 40 tokens part from what is drawn alone")


def test_both_ways_to_generate_give_the_same_tokens():
    config = gpt.make_config(dict(generate.SHAPE, n_layer=2, n_embd=12, block_size=64), torch.device("cpu"))
    torch.manual_seed(0)
    model, start = gpt.GPTLanguageModel(config, 20), torch.zeros(1, 1, dtype=torch.long)
    with_cache, without = ([int(token) for token in how(model, start, 60, 64, 0.0)]
                           for how in (gpt.generate, generate.generate_without_cache))
    assert with_cache == without


def test_time_to_loss_trains_the_peer_and_ours(monkeypatch, capsys, text):
    monkeypatch.setattr(time_to_loss, "PEER_STEPS", 3)
    monkeypatch.setattr(time_to_loss, "OURS", time_to_loss.OURS | dict(n_embd=32, max_iters=20))
    time_to_loss.main(["--input", str(text), "--seeds", "1"])
    out = capsys.readouterr().out
    assert re.search(rf"seed 0: peer {NUMBER} parameters, {NUMBER} after {NUMBER} s", out)
    assert re.search(rf"ours in float32: {NUMBER} parameters, {NUMBER} after {NUMBER} s; reached", out)
    assert re.search(rf"median, float32: {NUMBER} times faster", out)


def test_large_corpus_measures_a_run(monkeypatch, capsys, tmp_path, text):
    memory, first, whole = large_corpus.first_step("gpt.py", [], text, tmp_path / "run")  # really
    assert memory > 50e6 and 0 < first <= whole
    assert json.loads((tmp_path / "run/metrics.json").read_text())["iters"] == 1
    stub = tmp_path / "stub.py"
    stub.write_text("import os, sys, time\nfolder = sys.argv[sys.argv.index('--run_dir') + 1]\nos.mkdir(folder)\n"
                    "open(folder + '/metrics.jsonl', 'w').close()\ntime.sleep(0.3)\n")
    monkeypatch.setattr(large_corpus, "SCRIPTS", {str(stub): ["--tokenizer", "custom"]})
    large_corpus.main(["--input", str(text), "--megabytes", "0.1"])
    small, large = table(capsys.readouterr().out, str(stub))
    assert figures(small[1:2]) == [len(text.read_text(encoding="utf-8"))] and small[3] == ""
    assert 90_000 < figures(large[1:2])[0] < 110_000 and figures(large[2:3])[0] > 0 and large[3] != ""


def test_hf_step_takes_turns(monkeypatch, capsys):
    stub = ("import json, sys\nfor number, _ in enumerate(sys.stdin):\n"
            "    print(json.dumps(dict(kind=sys.argv[1], number=number)), flush=True)")
    answers = hf_step.take_turns([sys.executable, "-c", stub], "folder", 2)
    assert answers == {kind: [dict(kind=kind, number=number) for number in (0, 1)] for kind in ("plain", "ours")}

    def here(command, folder, steps):
        wanted = hf_step.argparse.ArgumentParser()
        for name, kind in (("rows", int), ("length", int), ("dtype", str)):
            wanted.add_argument(f"--{name}", type=kind)
        args, answers = wanted.parse_args(command[2:-1]), {}
        assert command[1].endswith("hf_step.py") and command[-1] == "--worker"
        for kind in ("plain", "ours"):
            out = io.StringIO()
            with monkeypatch.context() as patch, contextlib.redirect_stdout(out):
                patch.setattr(sys, "stdin", io.StringIO("\n" * steps))
                hf_step.worker(kind, folder, args.dtype, args.rows, args.length)
            answers[kind] = [json.loads(line) for line in out.getvalue().splitlines()]
        return answers

    monkeypatch.setattr(hf_step, "take_turns", here)
    monkeypatch.setattr(hf_step, "SHAPE", hf_step.SHAPE | dict(n_layer=1, n_head=2, n_embd=16, vocab_size=90, n_positions=32,
                                                               bos_token_id=0, eos_token_id=0))
    hf_step.main(["--steps", "2", "--rows", "2", "--length", "8", "--dtype", "float32"])
    out = capsys.readouterr().out
    plain, ours = table(out, "plain", "ours")
    assert plain[1] == ours[1] == "float32" and plain[5] == ours[5]  # the same steps
    assert re.search(rf"Ours is {NUMBER} times faster", out) and "2 x 8 tokens, 2 steps" in out


def test_gpu_prints_all_its_tables(monkeypatch, capsys, text):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)  # takes minutes
    gpu.main(["--device", "cpu", "--size", "tiny", "--input", str(text), "--seconds", "0.01", "--race", "4", "--tokens", "3"])
    check_gpu(capsys.readouterr().out)


def check_gpu(out):
    rows = table(out, "modern", "classic")
    assert len(rows) == 12 and len({tuple(row[:4]) for row in rows}) == 12
    assert all(figures(row[4:5])[0] > 0 for row in rows)
    assert re.search(r"classic: best at step \d", out)
    assert out.count("\nmodern, ") == 3 and out.count("tokens/s\n") == 2


def test_fused_attention_is_attention_by_hand():
    for recipe in gpt.RECIPES:
        config = gpt.make_config(SHAPE | dict(dropout=0.0, recipe=recipe), torch.device("cpu"))
        model, idx = gpt.GPTLanguageModel(config, 20), torch.randint(20, (2, 32))
        attention, x = model.blocks[0].attention, torch.randn(2, 32, 16)
        rope = model.rope if recipe == "modern" else None
        torch.nn.init.normal_(attention.proj.weight)
        torch.testing.assert_close(gpu.fused_attention(attention, x, None, rope), attention(x, model.mask, rope))
        assert model(idx).isfinite().all()


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_gpu_sh_keeps_what_gpu_py_prints(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(FOLDER / "gpu.sh", tmp_path / "benchmarks")
    (tmp_path / "python").write_text("#!/bin/sh\necho measured \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    subprocess.run(["bash", "benchmarks/gpu.sh", "--size", "tiny"], check=True, capture_output=True,
                   env=dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}"))
    log = (tmp_path / "benchmarks/logs/gpu.log").read_text(encoding="utf-8")
    assert "measured benchmarks/gpu.py --size tiny" in log


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_versions_sh_runs_the_tests_with_the_lowest_and_the_newest(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(FOLDER / "versions.sh", tmp_path / "benchmarks")
    (tmp_path / "requirements.txt").write_text("torch>=2.6\ntqdm>=4.66\n")
    (tmp_path / "uv").write_text("""#!/bin/sh
if [ "$1" = venv ]; then for folder; do :; done; mkdir -p "$folder/bin"; ln -s /bin/echo "$folder/bin/python"; fi
if [ "$2" = list ]; then printf 'torch 2.6.0\nother 1\n'; fi
""")
    (tmp_path / "uv").chmod(0o755)
    done = subprocess.run(["bash", "benchmarks/versions.sh"], check=True, capture_output=True, text=True, cwd=tmp_path,
                          env=dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}"))
    expected = [line for kind in ("lowest-direct", "highest") for line in (f"== {kind}", "torch 2.6.0", "-m pytest -q")]
    assert done.stdout.splitlines() == expected


# ------------------------------------------------------------------------------------------- quality
class OneByOne(ThreadPoolExecutor):
    """A pool whose work is done here, in turn."""

    def map(self, work, things):
        return map(work, things)


def test_quality_gives_each_run_its_minutes_and_trains_none_twice(monkeypatch, capsys, text):
    toy = [f"--{name}={value}" for name, value in SHAPE.items() if name != "grow"]

    def tiny(command, **more):
        return in_process([*(word for word in command if word != "--compile"), *toy], **more)

    monkeypatch.setattr(quality.subprocess, "run", tiny)
    monkeypatch.setattr(quality, "ThreadPoolExecutor", OneByOne)  # several would share this process's output
    monkeypatch.setattr(quality, "PROBE", dict(max_iters=18, eval_interval=3, eval_iters=1))
    names = ["classic_128_0.001", "bpe_modern_2115"]
    for name in names:
        script, options = quality.RUNS[name]
        smaller = options | (dict(vocab_size=270) if "vocab_size" in options else {})
        monkeypatch.setitem(quality.RUNS, name, (script, smaller))
    tables = []
    for _ in range(2):
        quality.main(["--input", str(text), "--minutes", "0.0005", "--out", "runs", "--runs", *names])
        tables.append(table(capsys.readouterr().out, *names))
    assert tables[0] == tables[1] and [row[0] for row in tables[0]] == names
    assert all(1 <= figures(row[3:4])[0] <= 5000 and 0 < figures(row[6:7])[0] < 12 for row in tables[0])
    assert {path.name for path in Path("runs").iterdir() if path.name[0] != "."} == {*names, "probe"}


def test_quality_s_runs_are_command_lines_of_the_scripts():
    for script, options in quality.RUNS.values():
        stage = {"gpt.py": gpt, "gpt_tiktoken.py": gpt_tiktoken}[script]
        given = stage.parse_args([f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()])
        assert given == options and stage.make_config(given, torch.device("cpu"), 1000)


def test_transfer_compares_fine_tuning_with_training_from_scratch(monkeypatch, capsys, tmp_path, text):
    small = SHAPE | dict(tokenizer="custom", vocab_size=300, sample_interval=0, max_new_tokens=5, device="cpu")
    monkeypatch.setattr(transfer, "TEACHER", small | dict(recall="", eval_interval=2))
    monkeypatch.setattr(transfer, "TUNED", transfer.TUNED | dict(epochs=1, block_size=16, max_new_tokens=5))
    monkeypatch.setattr(transfer, "SCRATCH", {size: small | dict(vocab_size=size) for size in (260, 270)})
    monkeypatch.setattr(transfer, "STEPS", {2000: 3, None: 4})
    (tmp_path / "prose.txt").write_text(tokenizer_files.babble(300, seed=1), encoding="utf-8")
    argv = ["--prose", "prose.txt", "--input", str(text), "--out", "out", "--iters", "4"]
    transfer.main(argv)
    first = table(capsys.readouterr().out, "2000", "all")
    assert [row[0] for row in first] == ["2000", "all"]
    for row in first:
        before, tuned, _, _, scratch, size, _ = figures(row[1:])
        assert 0 < tuned < before < 12 and 0 < scratch < 12 and size in (260, 270)
    densities = [json.loads(Path(f"out/scratch-260-{length}/metrics.json").read_text())["tokens"] for length in (2000, None)]
    assert densities[0] < densities[1] / 2  # it is the training part that is cut
    monkeypatch.setattr(gpt_tiktoken, "main", None)  # nothing is trained a second time
    transfer.main(argv)
    assert table(capsys.readouterr().out, "2000", "all") == first


# ------------------------------------------------------------------------------------------- data
def test_smollm2_fine_tunes_fully_and_with_adapters(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(smollm2.subprocess, "run", in_process)
    model = hf_models.save(tmp_path / "model", hf_models.qwen3())  # in SmolLM2's place
    (tmp_path / "songs.txt").write_text(hf_models.corpus(), encoding="utf-8")
    smollm2.main([str(model), "--input", str(tmp_path / "songs.txt"), "--steps", "4", "--block_size", "16"])
    out = capsys.readouterr().out
    rows = {way: figures([trained, *numbers]) for way, trained, _, *numbers in table(out, "full", "lora")}
    assert rows["lora"][0] < rows["full"][0] and len(out.split("```text")) == 3
    assert all(after < before and seconds > 0 and peak > 0.1 for _, before, after, seconds, peak in rows.values())


def test_prose_makes_a_corpus_and_a_tokenizer(capsys, tmp_path):
    share = tmp_path / "packages/usr/share"
    (share / "php/Faker/Provider/pl_PL").mkdir(parents=True)
    (share / "games/fortunes/pl").mkdir(parents=True)
    story = tokenizer_files.babble(200)
    (share / "php/Faker/Provider/pl_PL/Text.php").write_text(f"<?php = <<<'EOT'\n{story}\nEOT;\n", encoding="utf-8")
    (share / "games/fortunes/pl/jokes").write_bytes("Żart pierwszy.\t \n%\nz\u0307art drugi\n%\n".encode())
    (share / "games/fortunes/pl/old").write_bytes("Zażółć\n%\n".encode("iso8859-2"))
    (share / "games/fortunes/pl/jokes.dat").write_bytes(b"\xff")
    prose.main(["packages", "prose.txt", "--tokenizer", "300"])
    songs = Path("prose.txt").read_text(encoding="utf-8").removesuffix("\n").split(prose.SEPARATOR)
    assert songs == [story.replace("\n", " "), "Żart pierwszy.", "żart drugi", "Zażółć"]
    assert "4 texts" in capsys.readouterr().out
    assert gpt_tiktoken.read_tokenizer(Path("prose.json")).get_vocab_size() == 300


def test_collector_logs_a_line_for_each_case(monkeypatch, tmp_path, capsys):
    collector = importlib.import_module("collector")
    monkeypatch.setattr(collector, "LOG", tmp_path / "logs" / "bench.log")
    monkeypatch.setattr(collector, "CASES", ((3, 0), (2, 1000)))
    collector.main()
    lines = (tmp_path / "logs" / "bench.log").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == capsys.readouterr().out.splitlines()
    assert [re.fullmatch(rf" *(\d+) songs, pages of ({NUMBER}) kB: *{NUMBER} songs/s, peak {NUMBER} MiB", line).groups()
            for line in lines[1:]] == [("3", "3"), ("2", "4")]


# ------------------------------------------------------------------------------------------- as they are
def lyrics(folder):
    path = folder / "lyrics.txt"
    path.write_text("Noc nad miastem, w oknach śpi światło\nA ja liczę gwiazdy\n" * 80, encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_step_beside_a_busy_program(capsys):
    busy.main(["--rounds", "1", "--steps", "2"])
    rows = spin_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["not set", "1000"] and all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
def test_the_gpu_script_on_a_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "gpu.py", "--device", "cpu", "--size", "tiny", "--input", lyrics(tmp_path), "--seconds",
         "0.1", "--race", "8", "--tokens", "5"], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    check_gpu(done.stdout)


@pytest.mark.slow
def test_quality_as_it_is(tmp_path):
    command = [sys.executable, FOLDER / "quality.py", "--input", lyrics(tmp_path), "--minutes", "0.1", "--jobs", "2", "--out",
               tmp_path / "runs", "--runs", "classic_128_0.001", "modern_2115"]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        tables.append(table(done.stdout, "classic", "modern"))
    assert tables[0] == tables[1] and [row[0] for row in tables[0]] == ["classic_128_0.001", "modern_2115"]
    assert all(figures(row[3:4])[0] > 5 and 0 < figures(row[6:7])[0] < 7 for row in tables[0])
