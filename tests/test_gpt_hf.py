"""Stage 3: pytest tests/test_gpt_hf.py. Offline: the models are made by hf_models.py, small but real."""

import errno
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import hf_models
import processes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gpt
import gpt_hf
import gpt_tiktoken

TINY = ["--block_size", "32", "--batch_size", "4", "--learning_rate", "3e-3", "--max_new_tokens", "20", "--num_samples",
        "2", "--device", "cpu", "--dtype", "float32"]
KEYS = set("stage params vocab_size chars_per_token tokens_per_vocab_entry val_loss val_bpc best_iter iters seconds "
           "tokens_per_second device dtype seed val_bpc_before copy_rate copy_longest epochs "
           "refrain_share refrain_bpc other_bpc peak_memory_mb".split())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus and a base model."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "songs.txt").write_text(hf_models.corpus(), encoding="utf-8")
    hf_models.save(folder / "gpt2", hf_models.gpt2())
    return folder


def arguments(made, out, *more):
    """The command line of a small run; what is given twice counts the second time."""
    return ["--input", str(made / "songs.txt"), "--model_name", str(made / "gpt2"), "--output_dir", str(out), *TINY, *more]


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """The metrics and the folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return gpt_hf.main(arguments(made, out, "--epochs", "2")), out


def weights(folder):
    """The weights in a checkpoint or a model folder; of a run, those of the model that it leaves."""
    folder = Path(folder)
    return load_file((folder / "model" if (folder / "model").exists() else folder) / "model.safetensors")


def load(folder):
    return gpt_hf.find_pretrained(str(folder), "cpu")


def resume(folder, *more):
    return ["--resume", "--output_dir", str(folder), *more]


def assert_same(folder, other):
    """The same weights, bit by bit."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def error_of(capsys, argv):
    """(exit status, the one line on stderr) of a run that must not succeed."""
    with pytest.raises(SystemExit) as stop:
        gpt_hf.main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return stop.value.code, lines[0]


# ------------------------------------------------------------------------------------------------ a whole run
def test_epochs_are_obeyed_and_each_is_evaluated(finished):
    metrics, out = finished
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert metrics["epochs"] == 2 and metrics["iters"] == records[-1]["iter"] == 2 * records[1]["iter"]
    assert all(math.isfinite(record[key]) for record in records for key in ("train_bpc", "val_bpc", "train_loss", "val_loss"))
    assert metrics["val_bpc_before"] == records[0]["val_bpc"] > metrics["val_bpc"] == min(r["val_bpc"] for r in records)
    assert metrics["best_iter"] == min(records, key=lambda record: record["val_loss"])["iter"]


def test_the_run_leaves_our_files_and_a_model_folder(finished):
    metrics, out = finished
    assert metrics.keys() >= KEYS and metrics == json.loads((out / "metrics.json").read_text())
    assert {path.name for path in out.iterdir() if not path.name.startswith("checkpoint-")} == {
        "config.json", "metrics.json", "metrics.jsonl", "loss.png", "output", "model"}
    assert {path.name for path in (out / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    assert model.dtype == torch.float32 and model.config.use_cache and model.generation_config.repetition_penalty == 1.3
    ids = tokenizer("Osiedle zasypia", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5).size(1) > ids["input_ids"].size(1)
    assert_same(out, out / f"checkpoint-{metrics['best_iter']}")
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["epochs"] == 2 and config["options"]["block_size"] == 32
    assert config["options"]["max_steps"] == metrics["iters"] and config["versions"]["transformers"]


def test_samples_before_and_after_stand_side_by_side(finished):
    _, out = finished
    before, after = ((out / "output" / name).read_text(encoding="utf-8") for name in ("sample_before.txt", "sample.txt"))
    assert before != after and all(text.count(gpt_hf.SEPARATOR) == 1 for text in (before, after))  # two samples each


@pytest.mark.numeric
def test_the_model_learns_where_songs_end(made, finished):
    base, songs = hf_models.tokenizer(), hf_models.songs(24)[-2:]

    def end_probability(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = [torch.tensor([base(song)["input_ids"][-32:]]) for song in songs]
        return sum(model(row).logits[0, -1].softmax(-1)[base.eos_token_id].item() for row in ids)

    assert end_probability(finished[1] / "model") > 1.5 * end_probability(made / "gpt2")


def test_ctrl_c_ends_with_one_line_and_the_terminal_shows_our_lines_only(made, tmp_path):
    argv = arguments(made, tmp_path / "run", "--epochs", "400")
    with subprocess.Popen([sys.executable, gpt_hf.__file__, *argv], text=True, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step") and "epoch 2.00" in line:  # the first checkpoint is whole
                process.send_signal(signal.SIGINT)
        (end,) = process.stderr.read().splitlines()
    assert process.returncode == 130 and end == (
        f"stopped; the last good checkpoint is kept; continue with: python gpt_hf.py --resume --output_dir '{tmp_path}/run'")
    shown = [line for line in lines[1:] if not line.startswith("step")]
    assert "parameters" in lines[0] and "\r" not in "".join(lines)
    assert not any(word in "".join(shown) for word in ("Loading", "Writing", "transformers", "Warning"))


CELL = """import sys, types
source = open(sys.argv[1], encoding="utf-8").read()
argv, stderr = sys.argv[2:], sys.stderr
sys.argv = ["/usr/lib/python3/dist-packages/colab_kernel_launcher.py", "-f", "kernel-1.json"]
cell = sys.modules["__main__"] = types.ModuleType("__main__")
exec(compile(source.replace('if __name__ == "__main__":', "if False:"), "<cell>", "exec"), cell.__dict__)
sys.stderr = None
print("steps:", cell.main(argv)["iters"])
sys.stderr = stderr
def interrupted(self, *args):
    raise KeyboardInterrupt
cell.ExactTrainer.training_step = interrupted
cell.main(argv)
"""


def test_pasted_into_a_cell_and_stopped_there(made, tmp_path):
    """No __file__, the kernel's sys.argv and, in a first run, no stderr; in a second run the stop button is pressed."""
    argv = arguments(made, tmp_path / "run", "--max_steps", "1")
    done = subprocess.run([sys.executable, "-c", CELL, gpt_hf.__file__, *argv], capture_output=True, text=True,
                          cwd=tmp_path, timeout=120)
    assert done.returncode == 130 and "steps: 1" in done.stdout.splitlines() and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("stopped; continue with: python gpt_hf.py --resume --output_dir ")


# ------------------------------------------------------------------------------------------------ data and metrics
TWINS = """Stop option split_corpus pick_device mixed_precision keep_memory say average join_processes check_values read_corpus
replacing keep_previous is_run write_json main""".split()


@pytest.mark.parametrize("name", TWINS)
def test_what_stage_1_does_too_is_done_the_same_way(name):
    assert inspect.getsource(getattr(gpt_hf, name)) == inspect.getsource(getattr(gpt, name))
    assert (gpt_hf.SEPARATOR, gpt_hf.END, gpt_hf.DAMAGED) == (gpt.SEPARATOR, gpt.END, gpt.DAMAGED)


def test_special_tokens_inside_a_song_are_ordinary_text(made):
    base = load(made / "gpt2")
    song = f"ktoś mówi {hf_models.END} i śpiewa"
    ids, exact = gpt_hf.encode(f"{song}{gpt_hf.END}druga", base)
    assert exact and ids.count(base.end) == 1 and base.tokenizer.decode(ids[:ids.index(base.end)]) == song


def test_blocks_hold_all_but_the_last_short_one_and_every_label_counts(made):
    base = load(made / "gpt2")
    text = gpt_hf.read_corpus(str(made / "songs.txt"))
    data, (train_text, val_text) = gpt_hf.prepare(text, base, 32), gpt_hf.split_corpus(text)
    ids, val_ids = gpt_hf.encode(train_text, base)[0], gpt_hf.encode(val_text, base)[0]
    assert data.blocks["input_ids"][:].flatten().tolist() == ids[:len(ids) // 32 * 32]
    assert torch.equal(data.blocks["labels"][:], data.blocks["input_ids"][:]) and base.end in ids
    assert base.tokenizer.decode(ids).replace(hf_models.END, gpt_hf.END) == train_text
    assert data.val.tolist() == [ids[-1], *val_ids]  # the first is predicted from the last training token
    assert data.part[1:].tolist() == gpt_hf.encode(train_text[:len(val_text)], base)[0] and data.part[0] == base.end
    assert data.chars == len(val_text)


@pytest.mark.numeric
def test_bits_per_character_are_those_of_a_computation_by_hand(made, finished):
    metrics, out = finished
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model").double().eval()
    base = load(out / "model")
    train_text, val_text = gpt_hf.split_corpus(gpt_hf.read_corpus(str(made / "songs.txt")))
    ids = gpt_hf.encode(train_text, base)[0][-1:] + gpt_hf.encode(val_text, base)[0]
    bits = 0.0
    for i in range(1, len(ids)):
        start = (i - 1) // 32 * 32  # windows of 32 inputs
        with torch.no_grad():
            bits -= model(torch.tensor([ids[start:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item() / math.log(2)
    assert metrics["val_bpc"] == pytest.approx(bits / len(val_text), rel=1e-5)
    assert metrics["val_loss"] == pytest.approx(bits * math.log(2) / (len(ids) - 1), rel=1e-5)


class Told:
    """A model that gives each token a probability of its own, whatever came before."""

    def __init__(self, probabilities):
        self.device, self.logits = torch.device("cpu"), torch.tensor(probabilities).log()

    def eval(self):
        pass

    def __call__(self, input_ids, use_cache):
        self.logits, logits = self.logits, self.logits.expand(*input_ids.shape, -1)
        return SimpleNamespace(logits=logits)


def test_evaluation_worked_out_by_hand():
    """The same small example as in the other stages' tests: every token counts once, also in the short last window."""
    ids, chars = torch.tensor([0, 1, 2, 2, 0, 1]), 8  # five tokens to predict: 1, 2, 2, 0, 1
    model, config = Told([1 / 2, 1 / 4, 1 / 4]), gpt_hf.Config(block_size=2, dtype="float32")
    bits = 2 + 2 + 2 + 1 + 2
    loss, bpc = gpt_hf.evaluate(model, ids, chars, config)
    assert loss == pytest.approx(bits * math.log(2) / 5) and bpc == pytest.approx(bits / 8)
    assert gpt_hf.evaluate(model, ids, None, config)[1] is None
    for size in (1, 3, 5, 9):  # the windows do not matter to a model without memory
        assert gpt_hf.evaluate(model, ids, chars, gpt_hf.Config(block_size=size, dtype="float32"))[1] == pytest.approx(bits / 8)


@pytest.mark.numeric
def test_bits_in_repeated_lines_and_elsewhere_make_up_all_bits(finished, made):
    metrics, _ = finished
    share = metrics["refrain_share"]
    marks = gpt_hf.repeated(gpt_hf.split_corpus(gpt_hf.read_corpus(str(made / "songs.txt")))[1])
    assert share == pytest.approx(marks.double().mean().item(), abs=0.05)
    parts = [part * (bits or 0) for part, bits in ((share, metrics["refrain_bpc"]), (1 - share, metrics["other_bpc"]))]
    assert sum(parts) == pytest.approx(metrics["val_bpc"], rel=1e-4)


@pytest.mark.numeric
def test_the_figure_does_not_depend_on_the_batch_size(made, tmp_path):
    figures = {gpt_hf.main(arguments(made, tmp_path / size, "--batch_size", size, "--max_steps", "1", "--num_samples", "1")
                           )["val_bpc_before"] for size in ("1", "5")}
    assert len(figures) == 1


def test_a_tokenizer_that_loses_text_gives_no_bits_per_character(made, tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(hf_models.VERSES[:20], trainers.WordLevelTrainer(special_tokens=["<end>", "[UNK]"]))
    lossy = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="[UNK]")
    hf_models.save(tmp_path / "lossy", hf_models.gpt2(), lossy)
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", "--model_name", str(tmp_path / "lossy"), "--max_steps", "2"))
    assert metrics["val_bpc"] is None and metrics["val_bpc_before"] is None and metrics["val_loss"] > 0
    assert capsys.readouterr().out.count("warning: ") == 1


def test_copy_rate_worked_out_by_hand():
    assert gpt_hf.copy_rate(["A, b c x"], "z a b C", length=2) == (2 / 3, 3)
    source = "raz dwa trzy cztery pięć sześć siedem osiem dziewięć dziesięć"
    # 12 words hold five runs of eight; the first three are copied; ten words in a row stand in the source
    assert gpt_hf.copy_rate([f"{source} jedenaście\ndwanaście"], source.replace(" ", "\n")) == (3 / 5, 10)
    assert gpt_hf.copy_rate(["raz dwa trzy", "cztery pięć"], source) == (None, 3)  # runs do not join two samples
    assert gpt_hf.copy_rate(["az dwa"], source) == (None, 1)  # whole words only
    assert gpt_hf.copy_rate([source] * 2, source) == (1.0, 10)
    assert gpt_hf.copy_rate([f"{source.upper()}!".replace(" ", ", ")], source) == (1.0, 10)  # case and commas do not count
    assert gpt_hf.copy_rate([unicodedata.normalize("NFD", source)], source) == (1.0, 10)
    assert gpt_hf.copy_rate(["raz dwa"], f"raz{gpt_hf.END}dwa", length=2) == (0.0, 1)  # nor two songs
    assert gpt_hf.copy_rate([], "") == (None, 0)


# ------------------------------------------------------------------------------------------------ the base model
@pytest.mark.parametrize("kind", ["bin", "half", "qwen3"])
def test_other_base_models(made, tmp_path, kind):
    if kind == "qwen3":
        hf_models.save(tmp_path / kind, hf_models.qwen3())
    elif kind == "half":
        hf_models.save(tmp_path / kind, hf_models.gpt2().half())
    else:
        shutil.copytree(made / "gpt2", tmp_path / kind)
        (tmp_path / kind / "model.safetensors").unlink()
        torch.save(hf_models.gpt2().state_dict(), tmp_path / kind / "pytorch_model.bin")
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", "--model_name", str(tmp_path / kind), "--epochs", "1"))
    assert metrics["val_bpc"] < metrics["val_bpc_before"]
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    if kind == "bin":  # the same weights in the other format: the same run
        gpt_hf.main(arguments(made, tmp_path / "twin", "--epochs", "1"))
        assert_same(tmp_path / "run", tmp_path / "twin")


@pytest.mark.numeric
def test_the_faster_activation_is_the_same_function(made):
    base = load(made / "gpt2").model.double()
    twin = transformers.AutoModelForCausalLM.from_pretrained(made / "gpt2").double().eval()
    assert twin.config.activation_function == "gelu_new" != base.config.activation_function
    ids = torch.arange(60)[None]
    torch.testing.assert_close(base(ids).logits, twin(ids).logits)


def test_frozen_layers_stay_and_max_steps_ends(made, tmp_path):
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", "--freeze_layers", "1", "--max_steps", "3", "--epochs", "9"))
    assert metrics["iters"] == 3 and metrics["trainable"] < metrics["params"]
    before, after = weights(made / "gpt2"), weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("wte" in name or "wpe" in name or ".h.0." in name for name in moved)
    assert any(".h.1." in name for name in moved) and any("ln_f" in name for name in moved)


@pytest.mark.numeric
def test_gradient_checkpointing_and_accumulation_change_no_figure(made, tmp_path, recwarn):
    one = gpt_hf.main(arguments(made, tmp_path / "one", "--max_steps", "4"))
    two = gpt_hf.main(arguments(made, tmp_path / "two", "--max_steps", "4", "--gradient_checkpointing"))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]
    half = gpt_hf.main(arguments(made, tmp_path / "half", "--max_steps", "4", "--batch_size", "2",
                                 "--gradient_accumulation_steps", "2"))
    assert half["val_loss"] == pytest.approx(one["val_loss"], rel=2e-2)  # dropout is drawn otherwise


@pytest.mark.numeric
def test_bfloat16_computes_but_weights_stay_float32(made, tmp_path):
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", "--dtype", "bfloat16", "--max_steps", "2"))
    assert metrics["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_patience_ends_the_run_and_the_best_model_is_kept(made, tmp_path, monkeypatch, capsys):
    losses = iter([9, 1, 4, 3, 1, 2, 1, 5, 1, 6])  # training, validation, training...: the second epoch is the best
    monkeypatch.setattr(gpt_hf, "evaluate", lambda *_: (float(next(losses)), 1.0))
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", "--epochs", "9", "--patience", "2"))
    assert gpt_hf.main(resume(tmp_path / "run"))["iters"] == metrics["iters"]  # continued, it waits no longer
    assert metrics["epochs"] == 4 and metrics["val_loss"] == 2 and metrics["best_iter"] == metrics["iters"] // 2
    assert_same(tmp_path / "run", tmp_path / "run" / f"checkpoint-{metrics['best_iter']}")


# ------------------------------------------------------------------------------------------------ samples
@pytest.mark.parametrize("prompt", ["Noc nad  miastem, ", f"śpiewa {hf_models.END} i", "\nŁ", ""])
def test_the_prompt_stays_as_it_is_and_no_position_is_exceeded(finished, prompt, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    same = ["--sample_only", "--output_dir", str(tmp_path / "run"), "--prompt", prompt, "--max_new_tokens", "150",
            "--num_samples", "2", "--no_repeat_ngram_size", "0", "--device", "cpu", "--dtype", "float32"]
    outcomes = []
    for seed in ("1", "1", "2"):
        gpt_hf.main([*same, "--seed", seed])
        text = (tmp_path / "run/output/sample.txt").read_text(encoding="utf-8")
        assert text in capsys.readouterr().out  # what is shown is what is saved
        outcomes.append(text[:-1].split(gpt_hf.SEPARATOR))
    assert all(sample.startswith(prompt) for samples in outcomes for sample in samples)
    assert outcomes[0] == outcomes[1] != outcomes[2] and outcomes[0][0] != outcomes[0][1]
    assert len(hf_models.tokenizer()(max(sum(outcomes, []), key=len))["input_ids"]) > 64  # longer than the context
    assert len(list((tmp_path / "run/output").glob("sample.txt.previous-*"))) == 3  # nothing was overwritten
    assert_same(tmp_path / "run", finished[1])


def test_sampling_from_the_folder_gives_the_runs_samples_and_metrics(finished, tmp_path):
    metrics, out = finished
    shutil.copytree(out, tmp_path / "run")
    more = ["--max_new_tokens", "20", "--num_samples", "2", "--device", "cpu", "--dtype", "float32"]
    assert gpt_hf.main(["--sample_only", "--output_dir", str(tmp_path / "run"), *more]) == metrics
    assert (tmp_path / "run/output/sample.txt").read_text() == (out / "output/sample.txt").read_text()


@pytest.mark.parametrize("temperature", ["0", "1e-40"])  # divided by the latter, a score would be infinite
def test_a_prompt_longer_than_the_context_and_the_likeliest_token(finished, tmp_path, temperature):
    shutil.copytree(finished[1], tmp_path / "run")
    prompt = "Liczę drobne w dłoni, starczy na chleb\n" * 9
    gpt_hf.main(["--sample_only", "--output_dir", str(tmp_path / "run"), "--prompt", prompt, "--max_new_tokens", "9",
                 "--temperature", temperature, "--num_samples", "2"])
    one, two = (tmp_path / "run/output/sample.txt").read_text(encoding="utf-8")[:-1].split(gpt_hf.SEPARATOR)
    assert one == two and one.startswith(prompt)


# ------------------------------------------------------------------------------------------------ interrupted
def child(argv, moment):
    """Run main in a process of its own that kills itself: before a step, or halfway through a file of a checkpoint."""
    sys.stdout = sys.stderr = io.StringIO()
    kind, number = moment
    save, step, count = torch.save, gpt_hf.ExactTrainer.training_step, 0

    def half_a_file(data, path, *more):
        nonlocal count
        count += 1
        save(data, path, *more)
        if kind == "write" and count == number:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def last_step(self, *args):
        if kind == "step" and self.state.global_step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    torch.save, gpt_hf.ExactTrainer.training_step = half_a_file, last_step
    gpt_hf.main(argv)


def last(folder):
    """The name of the checkpoint that a run continues from."""
    return Path(gpt_hf.last_checkpoint(Path(folder))[0]).name


@pytest.fixture(scope="module")
def spawn():
    """Start child() in processes that need not import everything again: a server did that once, and forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_models", "transformers.trainer", "datasets", "test_gpt_hf"])

    def start(argv, moment=("", 0)):
        process = context.Process(target=child, args=(argv, moment))
        process.start()
        return process

    return start


def assert_as_uninterrupted(folder, metrics, finished):
    """The same weights, bit by bit, the same figures but for the clock's, the same samples."""
    assert_same(folder, finished[1])
    assert_same(folder / f"checkpoint-{metrics['best_iter']}", finished[1] / f"checkpoint-{metrics['best_iter']}")
    clock = ("seconds", "tokens_per_second", "peak_memory_mb")
    assert {key: metrics[key] for key in metrics if key not in clock} == {
        key: finished[0][key] for key in metrics if key not in clock}
    assert (folder / "output/sample.txt").read_text() == (finished[1] / "output/sample.txt").read_text()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_kills_change_nothing(made, finished, tmp_path, spawn, capsys):
    """SIGKILL halfway through the first checkpoint's optimizer, then in the second epoch: as if nothing had happened."""
    argv = arguments(made, tmp_path / "run", "--epochs", "2")
    process = spawn(argv, ("write", 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (half,) = (tmp_path / "run").glob("checkpoint-*")
    assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
    assert last(tmp_path / "run") == ""
    process = spawn([*argv, "--resume"], ("step", finished[0]["iters"] - 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last(tmp_path / "run") == half.name
    capsys.readouterr()
    metrics = gpt_hf.main(resume(tmp_path / "run"))
    assert f"continuing from {half}\n" in capsys.readouterr().out
    assert_as_uninterrupted(tmp_path / "run", metrics, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_moments_change_nothing(made, finished, tmp_path, spawn, seed):
    """Five SIGKILLs a run, at any time, also while the Trainer writes a checkpoint or the final folder is written."""
    draw, steps = random.Random(seed), finished[0]["iters"]
    argv = arguments(made, tmp_path / "run", "--epochs", "2")
    for _ in range(5):
        moment = draw.choice([("write", draw.randint(1, 8)), ("step", draw.randrange(steps)), ("", 0)])
        process = spawn(argv, moment)
        process.join(timeout=None if moment[0] else draw.uniform(3, 12))
        process.kill()
        process.join()
        argv = resume(tmp_path / "run") if (tmp_path / "run/config.json").exists() else argv
        half = [path.name for path in (tmp_path / "run").glob("checkpoint-*") if not (path / "sha256.json").exists()]
        kept = last(tmp_path / "run") or "no checkpoint"
        print(f"run {seed}: killed at {moment[0] or 'any moment'} {moment[1] or ''}; {kept}, half written: {half}")
    assert_as_uninterrupted(tmp_path / "run", gpt_hf.main(argv), finished)
    print(f"run {seed}: the same weights after {steps} steps as uninterrupted")


def test_resumed_with_the_same_epochs_nothing_is_planned_anew(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    metrics = gpt_hf.main(resume(tmp_path / "run", "--epochs", "2"))
    assert metrics["iters"] == finished[0]["iters"] and "planned anew" not in capsys.readouterr().out


def test_of_two_contradictions_the_first_by_name_is_told(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    status, line = error_of(capsys, resume(tmp_path / "run", "--seed", "3", "--lora", "4"))
    assert status == 2 and "--lora 4 contradicts the run's 0" in line


def test_what_cannot_be_continued_is_not_offered(made, tmp_path, capsys, monkeypatch):
    """The disk is full before the run's first file is written."""
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gpt_hf, "write_json", full)
    status, line = error_of(capsys, arguments(made, tmp_path / "run"))
    assert status == 1 and "No space left" in line and "--resume" not in line


# ------------------------------------------------------------------------------------------------ adapters
LORA = ["--lora", "4", "--learning_rate", "1e-2", "--epochs", "2"]


@pytest.fixture(scope="module")
def adapted(made, tmp_path_factory):
    """The metrics and the folder of a run with adapters."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    return gpt_hf.main(arguments(made, out, *LORA)), out


def adapters(checkpoint):
    return load_file(checkpoint / "adapter_model.safetensors")


def trained_logits(made, out, ids, dtype=torch.float32):
    """The logits of the base model with the best checkpoint's adapters beside it, by peft alone."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(made / "gpt2", dtype=dtype)
    best = json.loads((out / "metrics.json").read_text())["best_iter"]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of what transformers will call otherwise
        return peft.PeftModel.from_pretrained(base, out / f"checkpoint-{best}").eval()(ids).logits


WITHOUT_PEFT = """import sys
sys.modules["peft"] = None  # as if it were not installed
import torch, transformers
ids, folder, result = torch.arange(1, 61)[None], *sys.argv[1:]
model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
torch.save(model.eval()(ids).logits.detach(), result)
"""


def test_adapters_learn_and_are_merged_into_a_model_that_needs_no_peft(made, adapted, tmp_path, capfd):
    metrics, out = adapted
    assert metrics["val_bpc"] < metrics["val_bpc_before"] and metrics["copy_rate"] is not None
    assert metrics["trainable"] < metrics["params"] / 5 and metrics.keys() >= KEYS
    assert {path.name for path in (out / "model").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    before, after = weights(made / "gpt2"), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and moved == {name for name in before if re.search(r"\.(c_\w+)\.weight", name)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_PEFT, out / "model", tmp_path / "logits"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(1, 61)[None]
    torch.testing.assert_close(torch.load(tmp_path / "logits"), trained_logits(made, out, ids), atol=1e-4, rtol=1e-4)


def test_frozen_weights_have_16_bits_and_adapters_32(made, tmp_path, capfd):
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", *LORA, "--dtype", "auto", "--batch_size", "2"))
    assert metrics["dtype"] == "bfloat16" and metrics["val_bpc"] < metrics["val_bpc_before"]
    captured = capfd.readouterr()
    assert captured.err == "" and "arning" not in captured.out
    out, best = tmp_path / "run", tmp_path / "run" / f"checkpoint-{metrics['best_iter']}"
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in adapters(best).values()} == {torch.float32}
    base = gpt_hf.find_pretrained(str(out / "model"), "cpu", dtype="auto")
    assert base.model.dtype == torch.bfloat16 and base.model.config.use_cache
    ids = torch.arange(1, 61)[None]
    torch.testing.assert_close(  # what merging rounds: 8 bits of each weight
        base.model(ids).logits, trained_logits(made, out, ids, torch.bfloat16), atol=0.05, rtol=0.05)
    texts = (out / "output/sample.txt").read_text()
    gpt_hf.main(["--sample_only", "--output_dir", str(out), "--max_new_tokens", "20", "--num_samples", "2", "--device", "cpu"])
    assert (out / "output/sample.txt").read_text() == texts


def test_a_killed_run_with_adapters_ends_with_the_same_bits(made, adapted, tmp_path, spawn):
    process = spawn(arguments(made, tmp_path / "run", *LORA), ("step", adapted[0]["iters"] - 2))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert "model.safetensors" not in os.listdir(checkpoint)  # the adapters alone
    metrics = gpt_hf.main(resume(tmp_path / "run"))
    assert_same(tmp_path / "run", adapted[1])
    ours, theirs = (adapters(folder / f"checkpoint-{metrics['iters']}") for folder in (tmp_path / "run", adapted[1]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics["val_bpc"] == adapted[0]["val_bpc"]
    assert (tmp_path / "run/output/sample.txt").read_text() == (adapted[1] / "output/sample.txt").read_text()


def test_adapters_for_another_architecture(made, tmp_path):
    hf_models.save(tmp_path / "qwen3", hf_models.qwen3())
    metrics = gpt_hf.main(arguments(made, tmp_path / "run", *LORA, "--model_name", str(tmp_path / "qwen3"), "--max_steps", "9"))
    assert metrics["val_bpc"] < metrics["val_bpc_before"]
    before, after = weights(tmp_path / "qwen3"), weights(tmp_path / "run")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("_proj.weight")}


def test_without_peft_there_is_a_command_to_install_it(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, line = error_of(capsys, arguments(made, tmp_path / "run", *LORA))
    assert status == 2 and "pip install peft" in line and os.listdir(tmp_path) == []


def test_a_trainer_s_integration_is_handed_each_loss(made, tmp_path, monkeypatch, capsys):
    from transformers.integrations import integration_utils

    class Book(transformers.TrainerCallback):
        pages = []

        def on_log(self, args, state, control, logs=None, **_):
            self.pages.append((state.global_step, logs))

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Book)
    gpt_hf.main(arguments(made, tmp_path / "run", "--max_steps", "3", "--report_to", "tensorboard"))
    assert {step for step, logs in Book.pages if "loss" in logs} == {1, 2, 3}
    assert [step for step, logs in Book.pages if "val_bpc" in logs] == [0, 3]
    assert "{'loss'" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def another(made, tmp_path_factory):
    """The folder of a run of another model of the same shape, which began with another seed."""
    out = tmp_path_factory.mktemp("another") / "run"
    gpt_hf.main(arguments(made, out, "--epochs", "2", "--seed", "7"))
    return out


def harm(checkpoint, file, how, another):
    """Let a file of a checkpoint be missing, empty, cut in the middle, another run's, or something else."""
    path = checkpoint / file
    content = path.read_bytes()
    place = len(content) // 2
    path.unlink()
    if how != "missing":
        path.write_bytes({
            "empty": b"", "cut": content[:place], "another run's": (another / checkpoint.name / file).read_bytes(),
            "changed": content[:place] + bytes([content[place] ^ 255]) + content[place + 1:],
            "a page": b"<!DOCTYPE html><title>404</title>"}[how])


CHECKPOINT = ["config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "tokenizer.json",
              "trainer_state.json"]


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "another run's", "changed", "a page"])
@pytest.mark.parametrize("file", CHECKPOINT)
def test_a_damaged_checkpoint_is_passed_over(finished, another, tmp_path, capsys, file, how):
    """The newest is damaged: the other is used, and the line says why. If both are: one line names each fault."""
    shutil.copytree(finished[1], tmp_path / "run")
    newest, older = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))
    same = (newest / file).read_bytes() == (another / newest.name / file).read_bytes()
    harm(newest, file, how, another)
    word = "missing" if how == "missing" else "damaged"
    fault = f"{newest.name}: {file} is {word}"
    if same and how == "another run's":  # the same tokenizer: nothing is lost
        assert last(tmp_path / "run") == newest.name
        return
    assert last(tmp_path / "run") == older.name
    assert capsys.readouterr().out == f"continuing from {older} ({fault})\n"
    harm(older, file, how, another)
    before = everything_in(tmp_path)
    status, line = error_of(capsys, resume(tmp_path / "run", "--epochs", "3"))
    assert status == 2 and "is whole" in line and fault in line and f"{older.name}: {file} is {word}" in line
    assert "without --resume" in line and everything_in(tmp_path) == before


def test_the_run_continues_from_the_older_checkpoint_as_before(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    os.truncate(tmp_path / "run" / f"checkpoint-{finished[0]['iters']}" / "optimizer.pt", 1000)
    assert_as_uninterrupted(tmp_path / "run", gpt_hf.main(resume(tmp_path / "run")), finished)


def test_a_checkpoint_without_checksums_was_not_finished(finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    newest, older = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))
    assert json.loads((newest / "sha256.json").read_text()).keys() >= {*CHECKPOINT}
    (newest / "sha256.json").unlink()
    assert last(tmp_path / "run") == older.name
    assert f"({newest.name}: sha256.json is missing, it was not finished)" in capsys.readouterr().out
    (older / "sha256.json").write_text("[]")  # no kill leaves two such
    status, line = error_of(capsys, resume(tmp_path / "run"))
    assert status == 2 and "is whole" in line and line.count("sha256.json") == 2
    shutil.rmtree(newest)
    (older / "sha256.json").unlink()  # but the first one
    assert last(tmp_path / "run") == "" and "starting over" in capsys.readouterr().out


def test_a_checkpoint_whose_best_is_damaged_is_passed_over(finished, tmp_path, capsys):
    """The run would end with the best one's model."""
    shutil.copytree(finished[1], tmp_path / "run")
    newest, older = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda path: -int(path.name[11:]))
    state = json.loads((newest / "trainer_state.json").read_text())
    state["log_history"][1]["val_loss"] = 0.5
    (newest / "trainer_state.json").write_text(json.dumps(state))
    (newest / "sha256.json").write_text(json.dumps(gpt_hf.checksums(newest)))
    assert last(tmp_path / "run") == newest.name
    (older / "model.safetensors").unlink()
    status, line = error_of(capsys, resume(tmp_path / "run"))
    assert status == 2 and f"{newest.name}: of its best, {older.name}, model.safetensors is missing" in line


def test_resume_of_a_finished_run_trains_no_more_unless_epochs_grow(finished, tmp_path):
    metrics, out = finished
    shutil.copytree(out, tmp_path / "run")
    again = gpt_hf.main(resume(tmp_path / "run"))
    assert again | dict(peak_memory_mb=0) == metrics | dict(peak_memory_mb=0)  # that is this process's
    assert_same(tmp_path / "run", out)
    more = gpt_hf.main(resume(tmp_path / "run", "--epochs", "3"))
    assert more["epochs"] == 3 and more["iters"] == metrics["iters"] * 3 // 2


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_full_disk_is_one_line(made, finished, tmp_path, monkeypatch, capsys, epoch):
    import resource
    begin, limits = gpt_hf.ExactTrainer.evaluate, resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def evaluate(self, *args, **named):
        metrics = begin(self, *args, **named)
        if self.state.epoch == epoch:  # the weights fit, the optimizer does not; or not even the weights
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000 if epoch == 2 else 50_000, limits[1]))
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(gpt_hf.ExactTrainer, "evaluate", evaluate)
        try:
            status, line = error_of(capsys, arguments(made, tmp_path / "run", "--epochs", "2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, ignored)
    assert status == 1 and "disk" in line and "--resume" in line
    assert ("the last good checkpoint is kept" in line) == (epoch == 2)  # there is none before
    assert_as_uninterrupted(tmp_path / "run", gpt_hf.main(resume(tmp_path / "run")), finished)


@pytest.mark.parametrize("words, error", [("out of memory: lower", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
                                          ("out of memory: lower", MemoryError()),
                                          ("songs.txt: gone", FileNotFoundError(2, "gone", "songs.txt"))])
def test_what_goes_wrong_while_running_is_one_line(made, tmp_path, monkeypatch, capsys, words, error):
    def fails(self, *args):
        raise error

    monkeypatch.setattr(gpt_hf.ExactTrainer, "training_step", fails)
    status, line = error_of(capsys, arguments(made, tmp_path / "run"))
    assert status == 1 and words in line and "kept" not in line and "--resume" in line


def test_a_loss_that_turns_nan_stops_before_it_is_saved(made, tmp_path, monkeypatch, capsys):
    step = gpt_hf.ExactTrainer.training_step

    def training_step(self, model, *more):
        if self.state.epoch > 1.2:
            next(model.parameters()).data.fill_(math.nan)
        return step(self, model, *more)

    with monkeypatch.context() as patch:
        patch.setattr(gpt_hf.ExactTrainer, "training_step", training_step)
        status, line = error_of(capsys, arguments(made, tmp_path / "run", "--epochs", "3"))
    assert status == 1 and "NaN" in line and "--learning_rate" in line and "the last good checkpoint is kept" in line
    checkpoint = tmp_path / "run" / last(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in weights(checkpoint).values())


# ------------------------------------------------------------------------------------------------ folders
def test_a_new_run_keeps_the_earlier_one_under_another_name(made, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    gpt_hf.main(arguments(made, tmp_path / "run", "--max_steps", "2"))
    (previous,) = tmp_path.glob("run.previous-*")
    assert {path.name for path in previous.iterdir()} == {path.name for path in finished[1].iterdir()} | {"notes.md"}
    assert_same(previous, finished[1])
    assert (previous / "metrics.json").read_text() == (finished[1] / "metrics.json").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["iters"] == 2


def everything_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("kind", ["others", "model", "file", "holds_text", "holds_model", "holds_us", "below_a_file"])
def test_a_folder_that_is_not_a_runs_is_left_alone(made, finished, tmp_path, capsys, monkeypatch, kind):
    folder, more = tmp_path / "run", []
    if kind == "others":
        folder.mkdir()
        (folder / "README.md").write_text("mine")
    elif kind == "model":
        shutil.copytree(made / "gpt2", folder)
    elif kind in ("file", "below_a_file"):
        folder.write_text("mine")
        folder = folder / "below" if kind == "below_a_file" else folder
    else:  # a run's folder, but what is in use would be renamed with it
        shutil.copytree(finished[1], folder)
        shutil.copy(made / "songs.txt", folder)
        more = dict(holds_text=["--input", str(folder / "songs.txt")], holds_model=["--model_name", str(folder / "model")],
                    holds_us=[])[kind]
        monkeypatch.chdir(folder / "output" if kind == "holds_us" else tmp_path)
    before = everything_in(tmp_path)
    status, line = error_of(capsys, arguments(made, folder, *more))
    assert status == 2 and f"cannot write --output_dir {folder}" in line and "choose another" in line
    assert everything_in(tmp_path) == before


def test_a_second_process_is_turned_away(made, finished, tmp_path, capsys):
    import filelock
    shutil.copytree(finished[1], tmp_path / "run")
    before = everything_in(tmp_path / "run")
    with filelock.FileLock(tmp_path / ".run.lock"):
        for argv in (arguments(made, tmp_path / "run"), resume(tmp_path / "run", "--epochs", "3")):
            status, line = error_of(capsys, argv)
            assert status == 2 and "another process writes to --output_dir" in line
    assert everything_in(tmp_path / "run") == before


def test_a_run_writes_where_the_command_line_says_and_nowhere_else(made, finished, tmp_path):
    """Not where its config.json says, which may come from another computer."""
    shutil.copytree(finished[1], tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["options"]["output_dir"] = str(tmp_path / "elsewhere")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert gpt_hf.main(resume(tmp_path / "run"))["iters"] == finished[0]["iters"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", ".run.lock"}


def test_a_run_that_was_carried_elsewhere_is_continued_there(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[1], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    metrics = gpt_hf.main(resume("moved", "--epochs", "3"))
    assert metrics["epochs"] == 3 and (tmp_path / "moved" / f"checkpoint-{metrics['best_iter']}").exists()


# ------------------------------------------------------------------------------------------------ bad input
class Code:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code_ran",)


def packed(content, **options):
    """The bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


NO_WEIGHTS = {
    "no_weights": None, "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "page": b"<!DOCTYPE html><title>404</title>", "nothing": b"", "pickle": pickle.dumps(Code()),
    "code": packed(dict(a=Code())), "old_code": packed(dict(a=Code()), _use_new_zipfile_serialization=False),
    "a_list": packed([1, 2]), "a_number": packed(7), "numbers_as_names": packed({1: torch.zeros(2)})}
LARGE = {f"large_{kind}": NO_WEIGHTS[kind] + bytes(200_000) for kind in ("pointer", "page", "pickle")} | {
    "large_code": packed(dict(a=Code(), b=torch.zeros(50_000)))}
CONFIGS = {
    "fewer_layers": dict(n_layer=1), "more_layers": dict(n_layer=3), "no_layers": dict(n_layer=0),
    "million_layers": dict(n_layer=10**6), "layers": dict(n_layer="two"), "wide": dict(n_embd=10**12),
    "wider": dict(n_inner=10**8), "odd_head": dict(n_head=3), "other_words": dict(vocab_size=390),
    "long": dict(n_positions=10**9), "negative": dict(n_positions=-1), "dropout": dict(attn_pdrop=math.nan),
    "encoder": dict(is_encoder_decoder=True), "list": dict(n_inner=[1])}
TOKENIZERS = {
    "panic": lambda content: content["model"].update(continuing_subword_prefix="##"),
    "late_panic": lambda content: content.update(pre_tokenizer=dict(type="FixedLength", length=0)),
    "far": lambda content: content["model"]["vocab"].update(far=3_000_000_000),
    "unknown": lambda content: content.update(normalizer=dict(type="New"))}


def broken(made, kind, folder):
    """A model folder with a fault."""
    if kind == "no_end":
        return hf_models.save(folder, hf_models.gpt2(eos_token_id=None, bos_token_id=None), hf_models.tokenizer(end=None))
    if kind == "big_tokenizer":
        return hf_models.save(folder, hf_models.gpt2(vocab_size=300))
    if kind == "bert":
        return hf_models.save(folder, hf_models.bert())
    shutil.copytree(made / "gpt2", folder)
    file = folder / dict(config="config.json", tokenizer="tokenizer.json").get(kind, "model.safetensors")
    if kind == "nan":
        tensors = load_file(file)
        tensors["transformer.wpe.weight"][-1, -1] = math.nan  # what short texts never read
        save_file(tensors, file, metadata=dict(format="pt"))
    elif kind == "type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(n_embd="wide")))
    elif kind == "foreign":
        hf_models.qwen3().save_pretrained(folder / "other")
        shutil.move(folder / "other" / "model.safetensors", file)
    elif kind == "remote_code":
        config = json.loads((folder / "config.json").read_text())
        config |= dict(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('code of a model ran')")
    elif kind in NO_WEIGHTS | LARGE:
        (folder / "model.safetensors").unlink()
        if kind != "no_weights":
            (folder / "pytorch_model.bin").write_bytes((NO_WEIGHTS | LARGE)[kind])
    elif kind in CONFIGS:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | CONFIGS[kind]))
    elif kind in TOKENIZERS:
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        TOKENIZERS[kind](content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        file.write_bytes(file.read_bytes()[:len(file.read_bytes()) // 2])
    return folder


@pytest.mark.parametrize("kind, words", [
    ("no_end", "no end token"), ("big_tokenizer", "does not fit"), ("bert", "not a causal language model"),
    ("cut", "can be read"), ("config", "can be read"), ("foreign", "are not those of its config.json"),
    ("remote_code", "can be read"), *((kind, "can be read") for kind in LARGE), ("tokenizer", "can be read"),
    ("nan", "NaN or infinite (transformer.wpe.weight)"),
    ("type", "can be read"), ("no_weights", "can be read"), *((kind, " bytes (") for kind in [*NO_WEIGHTS][1:]),
    ("fewer_layers", "transformer.h.1.attn.c_attn.weight, transformer.h.1.attn.c_proj.bias"),
    ("more_layers", "transformer.h.2.attn.c_attn.bias, "), ("no_layers", " in all"),
    ("million_layers", "1000000 layers"), ("layers", "model"), ("wide", "model"), ("wider", "parameters"),
    ("odd_head", "num_heads"), ("other_words", "wte"), ("long", "parameters"), ("negative", "can be read"),
    ("list", "can be read"), ("dropout", "can be read"), ("encoder", "causal"),
    *((kind, "tokenizer") for kind in TOKENIZERS)])
def test_base_models_that_do_not_work(made, tmp_path, capfd, monkeypatch, kind, words):
    """No line is a library's own, and code in the file makes no folder."""
    monkeypatch.chdir(tmp_path)
    folder = broken(made, kind, tmp_path / "model")
    capfd.readouterr()
    status, line = error_of(capfd, arguments(made, tmp_path / "run", "--model_name", str(folder)))
    assert status == 2 and words in line and (str(folder) in line or "no tokenizer" in line) and "another" in line
    assert os.listdir(tmp_path) == ["model"]


def test_what_is_computed_now_may_stand_in_an_older_file(made, tmp_path):
    """papuGaPT2's weights hold such constants."""
    shutil.copytree(made / "gpt2", tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    constants = {f"transformer.h.{i}.attn.{name}": value for i in range(2) for name, value in (
        ("bias", torch.ones(1, 1, 64, 64).tril()), ("masked_bias", torch.tensor(-1e4)))}
    torch.save(hf_models.gpt2().state_dict() | constants, tmp_path / "old/pytorch_model.bin")
    ours, theirs = (load(folder).model.state_dict() for folder in (tmp_path / "old", made / "gpt2"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


FILES = {"empty": b"", "blank": b"\n \n", "zeros": b"abc\0def", "latin": "źdźbło\n".encode("iso-8859-2") * 99,
         "utf16": "źdźbło\n".encode("utf-16") * 99, "short": "Krótki wiersz\n".encode() * 3}


@pytest.mark.parametrize("kind, words", [
    ("missing", "cannot read"), ("empty", "empty"), ("blank", "empty"), ("zeros", "not a text file"),
    ("latin", "not UTF-8"), ("utf16", "UTF-16"), ("short", "too short")])
def test_texts_that_do_not_work(made, tmp_path, capsys, kind, words):
    if kind in FILES:
        (tmp_path / "text").write_bytes(FILES[kind])
    status, line = error_of(capsys, arguments(made, tmp_path / "run", "--input", str(tmp_path / "text")))
    assert status == 2 and words in line and os.listdir(tmp_path) == ["text"] * (kind in FILES)


def test_a_short_text_is_told_a_length_that_is_enough(made, tmp_path, capsys):
    (tmp_path / "text").write_bytes(FILES["short"])
    _, line = error_of(capsys, arguments(made, tmp_path / "run", "--input", str(tmp_path / "text")))
    enough = int(line.rsplit(" ", 1)[1].replace(",", ""))
    (tmp_path / "text").write_text(("Krótki wiersz\n" * enough)[:enough], encoding="utf-8")
    assert gpt_hf.main(arguments(made, tmp_path / "run", "--input", str(tmp_path / "text"), "--epochs", "1"))["iters"] == 1


@pytest.mark.parametrize("argv, words", [
    (["--block_size", "65"], "at most 64"), (["--block_size", "-1"], "--block_size"), (["--epochs", "0"], "--epochs"),
    (["--learning_rate", "nan"], "finite"), (["--learning_rate", "inf"], "finite"), (["--epoch", "3"], "--epoch"),
    (["--top_p", "1.5"], "--top_p"), (["--freeze_layers", "3"], "has 2"), (["--dtype", "float16"], "float16"),
    (["--device", "cuda"], "cuda"), (["--batch_size", "two"], "--batch_size"), (["--model_name", "x y"], "x y"),
    (["--model_name", "/nowhere/at/all"], "no model folder"), (["--resume"], "no run to resume"),
    (["--sample_only"], "no effect with --sample_only"), (["--revision", "main"], "--revision needs"),
    (["--seed", "4294967296"], "--seed"), (["stray"], "stray"), (["--lora", "4", "--freeze_layers", "1"], "--freeze_layers"),
    (["--report_to", "nobody"], "nobody"), (["--lora", "-1"], "--lora")])
def test_options_that_do_not_work(made, tmp_path, capsys, argv, words):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, line = error_of(capsys, arguments(made, tmp_path / "run", *argv))
    assert status == 2 and words in line and os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv, words", [
    (["--sample_only"], "no model in"), (["--sample_only", "--resume"], "--resume has no effect with --sample_only"),
    (["--sample_only", "--epochs", "3"], "--epochs has no effect with --sample_only"), (["--resume"], "no run to resume")])
def test_options_that_need_a_run_or_go_alone(tmp_path, capsys, argv, words):
    status, line = error_of(capsys, [*argv, "--output_dir", str(tmp_path / "run")])
    assert status == 2 and words in line and os.listdir(tmp_path) == []


def test_resume_refuses_another_text_or_recipe(made, finished, tmp_path, capsys):
    shutil.copytree(finished[1], tmp_path / "run")
    argv = resume(tmp_path / "run")
    status, line = error_of(capsys, [*argv, "--learning_rate", "1e-5"])
    assert status == 2 and "1e-05" in line and "0.003" in line
    status, line = error_of(capsys, [*argv, "--epochs", "1"])
    assert status == 2 and "may only grow" in line
    (tmp_path / "other.txt").write_text(hf_models.corpus(12), encoding="utf-8")
    status, line = error_of(capsys, [*argv, "--input", str(tmp_path / "other.txt")])
    assert status == 2 and "not the text" in line
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["options"]["rdrop"] = 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    status, line = error_of(capsys, argv)
    assert status == 2 and "rdrop" in line and "not an option of this version" in line
    (tmp_path / "run" / "config.json").write_text("{")
    assert error_of(capsys, argv)[0] == 2


def test_a_hub_that_cannot_be_reached(made, tmp_path):
    code = ("import gpt_hf, sys\nassert not {'transformers', 'datasets'} & sys.modules.keys()\n"  # importing does nothing
            f"gpt_hf.main(['--input', {str(made / 'songs.txt')!r}, '--output_dir', {str(tmp_path / 'run')!r}])")
    # Port 9 refuses at once; the Hub's client tries again five times, and would sleep for 23 seconds in between.
    sleepless = "import time\ntime.sleep = lambda seconds: None\n"
    for before, setting in (("", dict(HF_HUB_OFFLINE="1")), (sleepless, dict(HF_ENDPOINT="http://127.0.0.1:9"))):
        done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=120,
                              cwd=Path(gpt_hf.__file__).parent, env={**os.environ, "HF_HOME": str(tmp_path), **setting})
        (line,) = done.stderr.strip().splitlines()
        assert done.returncode == 2 and line.startswith("error: cannot get flax-community/papuGaPT2")
        assert "go online" in line and "local folder" in line
    assert not (tmp_path / "run").exists()


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        gpt_hf.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(len(line) <= 80 for line in text.splitlines())
    assert all(f"--{name}" in text for name in gpt_hf.Config.__dataclass_fields__)
    seen = []
    monkeypatch.setattr(gpt_hf, "run", lambda given: seen.append(given) or {})
    monkeypatch.setattr(sys, "argv", ["gpt_hf.py", *"--input assets/input/input2.txt --epochs 3".split()])
    gpt_hf.main()
    monkeypatch.setattr(gpt_hf, "IN_NOTEBOOK", True)
    gpt_hf.main()
    assert seen == [dict(input="assets/input/input2.txt", epochs=3), {}]


@pytest.mark.parametrize("script", [gpt, gpt_tiktoken, gpt_hf])
def test_a_process_that_is_not_told_where_the_others_are(made, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    argv = ["--input", str(made / "songs.txt"), "--device", "cpu", "--block_size", "16"]
    more = {gpt: [], gpt_tiktoken: ["--tokenizer", "custom", "--vocab_size", "300"],
            gpt_hf: ["--model_name", str(made / "gpt2")]}[script]
    alone = dict(WORLD_SIZE="2", RANK="0")
    assert processes.finish(processes.start(script.__file__, argv + more, "out", environment=alone)) == 2
    line = Path("out").read_text("utf-8").splitlines()[-1]
    assert line.startswith("error: the processes cannot find each other (") and "MASTER_ADDR" in line and "torchrun" in line
    assert os.listdir() == ["out"]


def test_processes_with_other_options_stop(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    children = [processes.start(gpt_hf.__file__, arguments(made, "run", "--max_steps", str(rank + 1)), f"out{rank}",
                                environment=shared | dict(RANK=str(rank))) for rank in range(2)]
    assert [processes.finish(child) for child in children] == [2, 2]
    for rank in range(2):
        (line,) = [line for line in Path(f"out{rank}").read_text("utf-8").splitlines() if not line.startswith("[")]
        assert line == "error: the processes of this run have different texts or options: give them all the same"
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora", "4"]], ids=["all weights", "adapters"])
def test_two_processes_train_as_one(made, tmp_path, more):
    hf_models.save(tmp_path / "base", hf_models.gpt2(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    same = ["--model_name", str(tmp_path / "base"), "--epochs", "1", *more]
    one = gpt_hf.main(arguments(made, tmp_path / "one", *same, "--batch_size", "4"))
    argv = arguments(made, tmp_path / "two", *same, "--batch_size", "2")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", gpt_hf.__file__, *argv],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    assert two["iters"] == one["iters"] and two["val_bpc_before"] == pytest.approx(one["val_bpc_before"], rel=1e-6)
    assert two["val_bpc"] == pytest.approx(one["val_bpc"], rel=1e-3)
    assert done.stdout.count("epoch 1.00") == 1  # rank 0 alone speaks


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_whole_checkpoint(made, tmp_path):
    argv = arguments(made, tmp_path / "run", "--epochs", "200", "--patience", "0")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        shared = dict(os.environ, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    first, second = (subprocess.Popen([sys.executable, gpt_hf.__file__, *argv], stderr=subprocess.PIPE, text=True,
                                      env=dict(shared, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*/sha256.json")):
        assert time.monotonic() < deadline and first.poll() is second.poll() is None
        time.sleep(0.1)
    second.kill()
    error = first.communicate(timeout=120)[1]
    second.communicate()
    assert first.returncode == 1 and "error: another process of this run is gone" in error and "Traceback" not in error
    assert list((tmp_path / "run").glob("checkpoint-*/sha256.json"))


def test_half_a_character_at_the_end_of_a_prompt_is_left_out():
    assert gpt_hf.parse_args(["--prompt", "Noc " + b"\xc5".decode("utf-8", "surrogateescape")])["prompt"] == "Noc "
