"""Other people's files, mutated: pytest tests/test_fuzz.py   (thousands: pytest tests/test_fuzz.py -m slow -s).

Checkpoints, a tokenizer.json and the files of a model folder are changed as trees of values or as bytes; then the
script reads them. Each time it must continue, or end with one line, within LIMIT seconds and MEMORY bytes, and write
nothing outside its run folder. One server loads torch and the rest once and forks a child for each input: one that is
aborted takes nothing with it.
"""

import copy
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import hf_models
import pytest
import tokenizer_files
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gpt
import gpt_hf
import gpt_tiktoken

LIMIT, MEMORY = 30, 2 * 2**30  # seconds, bytes
SCRIPTS = dict(gpt=gpt, gpt_tiktoken=gpt_tiktoken, gpt_hf=gpt_hf)
TINY = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 2 --max_iters 2 --eval_interval 1 --sample_interval 0 "
        "--max_new_tokens 5 --input songs.txt").split()
TINY_HF = "--block_size 16 --batch_size 4 --max_steps 1 --max_new_tokens 5 --num_samples 1 --input songs.txt".split()
CPU = "--device cpu --dtype float32".split()
FEW = "--num_samples 1 --max_new_tokens 5".split()  # a file may ask for millions of texts: that is no fault, but takes time
# What is changed: the script, its command line, and the file.
TARGETS = {
    "checkpoint of stage 1": ("gpt", ["--resume", "--max_iters", "3", "--run_dir", "char", *FEW], "char/model_last.pt"),
    "checkpoint of stage 2": ("gpt_tiktoken", ["--resume", "--max_iters", "3", "--run_dir", "bpe", *FEW], "bpe/model_last.pt"),
    "tokenizer.json of stage 2": ("gpt_tiktoken", [*TINY, "--run_dir", "new", "--tokenizer_path", "mine.json"], "mine.json"),
    **{f"{file} of stage 3": ("gpt_hf", [*TINY_HF, "--output_dir", "new", "--model_name", "model"], f"model/{file}")
       for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")},
    **{f"{file} of a run of stage 3": ("gpt_hf", ["--resume", "--max_steps", "3", "--epochs", "9", "--output_dir", "hf", *FEW],
                                       f"hf/{file}") for file in ("config.json", "checkpoint-2/trainer_state.json")},
}


# ------------------------------------------------------------------------------------------------ the server
def serve(connection):
    """Run scripts in children: receive (script, command line, folder), send (exit status, output, seconds, bytes)."""
    import datasets  # noqa: F401
    import matplotlib.figure
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    import transformers.trainer  # noqa: F401

    torch.set_num_threads(1)
    matplotlib.figure.Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")
    while request := connection.recv():
        began, child = time.monotonic(), os.fork()
        if not child:
            act(*request)
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            time.sleep(0.002)
            if time.monotonic() - began > LIMIT:
                os.kill(child, 9)
        status, used = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_maxrss * 1024
        text = Path(request[2] + ".txt").read_text("utf-8", errors="replace")
        connection.send((status, text, time.monotonic() - began, used))


def act(script, argv, folder):
    """The child: the script's main in the folder, with its output in a file beside it."""
    os.chdir(folder)
    file = os.open(folder + ".txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + 2 * MEMORY] * 2)  # the machine has other work
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 99  # after a traceback
    try:
        SCRIPTS[script].main(argv)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        if status == 99:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="module")
def run():
    """A function that runs a script in the server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # the threads of the library do not survive a fork
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=serve, args=(theirs,), daemon=True)
        server.start()

    def ask(*request):
        ours.send(request)
        assert ours.poll(LIMIT + 90), "the server hangs"
        return ours.recv()

    yield ask
    ours.send(None)
    server.join()


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A folder with a text, runs of all stages, a tokenizer.json and a model folder, all intact."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "songs.txt").write_text(hf_models.corpus(6), encoding="utf-8")
    (folder / "mine.json").write_text(tokenizer_files.bytes_and(("a", "b"), ("ab", "c")), encoding="utf-8")
    hf_models.save(folder / "model", hf_models.gpt2())
    for script, argv in (
            ("gpt", [*TINY, "--run_dir", "char"]),
            ("gpt_tiktoken", [*TINY, "--run_dir", "bpe", "--tokenizer", "custom", "--vocab_size", "265"]),
            ("gpt_hf", [*TINY_HF, "--max_steps", "2", "--model_name", "model", "--output_dir", "hf"])):
        status, text, _, _ = run(script, argv + CPU, str(folder))
        assert status == 0, text
    for lock in folder.glob(".*.lock"):
        lock.unlink()
    return folder


# ------------------------------------------------------------------------------------------------ mutations
numbers = st.floats() | st.sampled_from(
    [0, 1, -1, 2, 7, 1000, 10**6, 2**31, 3 * 10**9, 2**63, 10**12, 10**30, 0.5, -0.5, 1e300])
words = st.sampled_from(
    ["", "a", "\0", "\ud800", "..", "/", "../new", "a" * 10**5, "ł", "<|endoftext|>", "BPE", "cpu", "llama"])
values = st.none() | st.booleans() | numbers | words | st.integers() | st.sampled_from([[], {}, [1], {"a": 1}, [[]]])
HOW = ["another value", "another value", "a near one", "another's", "left out", "once more", "another name"]


def places(tree):
    """(container, key) of each value in a tree of dictionaries and lists. Of many, only those at both ends."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    for key in keys[:30] + keys[30:][-10:]:
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def change(data, tree, found):
    """Change one value of a tree in place."""
    inside, key = data.draw(st.sampled_from(found), label="place")
    if key not in (inside if isinstance(inside, dict) else range(len(inside))):
        return  # an earlier change took it away
    value, how = inside[key], data.draw(st.sampled_from(HOW), label="how")
    if how == "a near one" and type(value) in (int, float):
        inside[key] = data.draw(st.sampled_from([value + 1, value - 1, -value, 2 * value, float(value), str(value)]))
    elif how == "a near one" and isinstance(value, torch.Tensor) and value.numel():
        inside[key] = data.draw(st.sampled_from([
            value.flatten()[:0], value[None], value.double(), value.bool(), value * float("nan"), value.to("meta"),
            value.flatten()[0].expand(value.shape), torch.zeros(7)]))
    elif how == "another's":
        other, name = data.draw(st.sampled_from(found))
        there = name in (other if isinstance(other, dict) else range(len(other)))
        inside[key] = copy.deepcopy(other[name]) if there else None  # a copy: no value may contain itself
    elif how == "left out":
        del inside[key]
    elif how == "once more" and isinstance(inside, list):
        inside.append(value)
    elif how == "another name" and isinstance(inside, dict):
        inside[data.draw(words)] = inside.pop(key)
    else:
        inside[key] = data.draw(values, label="value")


def mutated_tree(data, tree):
    """A copy with one to three changes."""
    tree = copy.deepcopy(tree)
    found = list(places(tree))
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, tree, found)
    return tree


def mutated_bytes(data, raw):
    """The bytes truncated, padded, flipped, overwritten or replaced."""
    how = data.draw(st.sampled_from(["flip", "cut", "fill", "join", "zeros", "other"]))
    place = data.draw(st.integers(0, len(raw) - 1))
    if how == "flip":
        return raw[:place] + bytes([raw[place] ^ 1 << data.draw(st.integers(0, 7))]) + raw[place + 1:]
    if how == "cut":
        return raw[:place]
    if how == "fill":
        more = data.draw(st.binary(max_size=40))
        return raw[:place] + more + raw[place + len(more):]
    if how == "join":
        return raw[:place] + raw[data.draw(st.integers(0, len(raw) - 1)):]
    if how == "zeros":
        return raw[:place] + bytes(len(raw) - place)
    return data.draw(st.sampled_from([b"", b"{}", b"[]", b"null", b"7", b"[" * 10**5, bytes(10**4), b"\xef\xbb\xbf" + raw,
                                      b"version https://git-lfs.github.com/spec/v1\nsize 7\n", b"<!DOCTYPE html>"]))


def mutated_pickle(data, raw):
    """A checkpoint with other bytes in its pickle; the archive around it is whole, its checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(zipfile.ZipInfo(name), mutated_bytes(data, part) if name.endswith("/data.pkl") else part)
            new.infolist()[-1].external_attr = 0  # as in torch's own archives
    return file.getvalue()


def mutated(data, path):
    """The bytes of a file, changed as a tree or as bytes."""
    raw = path.read_bytes()
    if path.suffix == ".pt" and data.draw(st.booleans(), label="in its pickle"):
        return mutated_pickle(data, raw)
    if path.suffix == ".safetensors" or data.draw(st.integers(0, 3), label="as bytes if 0") == 0:
        return mutated_bytes(data, raw)
    if path.suffix == ".json":
        return json.dumps(mutated_tree(data, json.loads(raw))).encode()
    file = io.BytesIO()
    torch.save(mutated_tree(data, torch.load(path, weights_only=True)), file)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------ what must hold
def content(folder, own):
    """Each file in a folder, without those of the run."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.relative_to(folder).parts[0] not in own}


def fault(data, target, run, whole, folder, found):
    """Change a file and run the script; what it did wrong, or ""."""
    script, argv, name = TARGETS[target]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / name).write_bytes(mutated(data, whole / name))
    own = argv[argv.index("--output_dir" if script == "gpt_hf" else "--run_dir") + 1]
    before, beside = content(folder, [own]), sorted(folder.parent.iterdir())
    status, text, seconds, used = run(script, argv + CPU, str(folder))
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    found["inputs"] += 1
    found[{0: "taken", 1: "failed while running", 2: "refused"}.get(status, "wrong")] += 1
    found["most MB"] = max(found["most MB"], used >> 20)
    found["most ms"] = max(found["most ms"], int(1000 * seconds))
    Path(f"{folder}.txt").unlink()
    right = [
        status in (0, 1, 2), "Traceback" not in text, "panicked" not in text, seconds < LIMIT, used < MEMORY,
        len(errors) == (status != 0), text.endswith(f"{errors[0]}\n" if errors else "\n"),
        content(folder, [own, f".{own}.lock"]) == before, sorted(folder.parent.iterdir()) == beside]
    if all(right):
        return ""
    kept = folder.parent.parent / f"wrong-{found['inputs']}-{Path(name).name}"
    shutil.copy(folder / name, kept)
    return f"{right} {status} {seconds:.1f} s {used >> 20} MB {kept}\n{text[-2500:]}"


def fuzz(target, run, whole, folder, count):
    found, faults = Counter(), []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data):
        faults.append(fault(data, target, run, whole, folder, found))

    folder.parent.mkdir()
    one()
    print(f"\n{target}: {dict(found)}, {len(faults) - faults.count('')} faults")
    assert not any(faults), "\n\n".join(filter(None, faults))


@pytest.mark.parametrize("target", TARGETS)
def test_some_mutations(target, run, whole, tmp_path):
    fuzz(target, run, whole, tmp_path / "in" / "case", 5)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_mutations(target, run, whole, tmp_path):
    fuzz(target, run, whole, tmp_path / "in" / "case", int(os.environ.get("FUZZ", 150)))
