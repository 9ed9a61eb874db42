"""The export to a Hugging Face folder: pytest tests/test_export_hf.py. Two tiny models are really trained; no network."""

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import export_hf
import pytest
import tokenizer_files
import torch
from compare_stages import flags
from conftest import make_device
from tokenizer_files import END_TEXT, babble

import gpt_tiktoken

TOOL = Path(export_hf.__file__)
ROOT = TOOL.parent.parent
CPU = torch.device("cpu")
VERSE = "Noc nad miastem, świt za rzeką\n"
TEXTS = (
    "", "\n\n a\n\n\n b \n", "  a   b\t\tc  \n  ", "Zażółć gęślą jaźń.\nŁÓDŹ!\n", "a\u00a0b\u2005c\u2028f\x85h",
    "a\r\nb\rc\n", "👩‍👩‍👧‍👦 🏳️‍🌈 🦊🦊 👍🏽", "".join(map(chr, [*range(1, 32), *range(127, 160)])),
    "z\u0307o\u0301łc\u0301", "12345 6,78 ٣٤ ²½", "I'll don't we've it's", "słowo" * 99, babble(9))
TINY = dict(input="songs.txt", recall="", n_layer=1, n_head=2, n_embd=16, batch_size=2, block_size=16, max_iters=2, dropout=0.0,
            eval_interval=1, sample_interval=0, max_new_tokens=5, tokenizer="custom", vocab_size=265, device="cpu",
            dtype="float32")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder with tiktoken's cache, and a Polish-like tokenizer as a file and as a folder."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer_files.fill_cache(folder / "cache")
    tokenizer_files.save_polish(folder / "polish.json", folder / "polish")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run whose best model is not its last: to be read only."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "songs.txt").write_text(VERSE * 50, encoding="utf-8")
    metrics = train(folder / "run", input=folder / "songs.txt", learning_rate=20.0, warmup_iters=0, max_iters=4, patience=0)
    assert metrics["best_iter"] < 4
    return folder / "run"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, shared):
    """Each test works in an empty folder with songs.txt, without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("songs.txt").write_text(VERSE * 50, encoding="utf-8")
    return tmp_path


def train(folder, **options):
    return gpt_tiktoken.main(flags(**TINY | options, run_dir=folder))


def loaded(folder):
    """What someone without our code gets from the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def random_model(config, vocab_size):
    """Every weight is random, the norms' too, and no mean is zero, so each part of the translation counts."""
    torch.manual_seed(0)
    model = gpt_tiktoken.GPTLanguageModel(config, vocab_size)
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
        else:
            torch.nn.init.normal_(p, mean=0.1, std=0.3)
    return model.eval()


def error_of(capsys, *argv):
    """The one line on stderr of a call that has to exit with 2 and write nothing."""
    before = tree()
    with pytest.raises(SystemExit) as stop:
        export_hf.main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert tree() == before
    return lines[0]


def tree():
    """What each file below the current folder holds; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


# ----------------------------------------------------------------------------------------- the same model
@pytest.mark.parametrize(("kind", "shape"), [
    ("custom", dict(n_layer=3, n_head=2, n_embd=24, block_size=32)), ("polish.json", dict(n_layer=1, n_head=1, n_embd=40)),
    ("polish", dict(n_layer=2, n_head=6, n_embd=36)), ("tiktoken", dict(n_layer=2, n_head=4, n_embd=32, block_size=20))])
def test_the_exported_model_gives_the_same_scores_and_texts(shared, kind, shape):
    file = shared / kind
    given = dict(tokenizer="polish", tokenizer_path=str(file)) if file.exists() else dict(tokenizer=kind)
    given |= dict(vocab_size=300) if kind == "custom" else {}
    tokenizer = gpt_tiktoken.make_tokenizer(given, babble(300), None)
    config = gpt_tiktoken.make_config(given | dict(block_size=12, recall="") | shape, CPU)
    model, context = random_model(config, tokenizer.vocab_size), config.block_size - 2  # as if rows had not grown to the end
    saved = dict(config=asdict(config), tokenizer=tokenizer.state, model=model.state_dict(), context=context)
    Path("hf").mkdir()
    export_hf.write_export(saved, Path("hf"))
    theirs, words = loaded("hf")
    idx = torch.randint(tokenizer.vocab_size, (3, context))
    with torch.no_grad():
        ours, scores = model(idx), theirs(idx).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(scores, ours, atol=1e-4, rtol=1e-4)
    for text in TEXTS:
        ids = words(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist() and words.decode(ids) == text
    assert words.eos_token == END_TEXT and words.eos_token_id == tokenizer.end == theirs.config.eos_token_id
    assert theirs.generation_config.eos_token_id == tokenizer.end
    assert words.model_max_length == theirs.config.max_position_embeddings == context
    assert len(words) == theirs.config.vocab_size == tokenizer.vocab_size and not theirs.config.tie_word_embeddings
    assert words(f"a\n{END_TEXT}b")["input_ids"].count(tokenizer.end) == 1
    prompt = torch.tensor([words("No")["input_ids"]])
    new = [int(token) for token in gpt_tiktoken.generate(model, prompt, context - prompt.size(1), context, temperature=0)]
    with torch.no_grad():
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=len(new))
    new = list(itertools.takewhile(lambda token: token != tokenizer.end, new))
    assert out[0, prompt.size(1):][:len(new)].tolist() == new


def test_a_trained_run_writes_the_same_text_and_an_earlier_export_is_kept(capsys):
    """The text is memorized, so that what is written is long and whole."""
    train("run", n_embd=32, max_iters=30, eval_interval=30, learning_rate=4e-2, block_size=40, prompt="Noc", temperature=0.0,
          max_new_tokens=30)
    capsys.readouterr()
    export_hf.main(["run", "deep/hf"])
    assert "gpt_hf.py --model_name deep/hf fine-tunes it" in capsys.readouterr().out
    model, words = loaded("deep/hf")
    out = model.generate(**words("Noc", return_tensors="pt"), do_sample=False, max_new_tokens=30)
    text = Path("run/output/sample.txt").read_text(encoding="utf-8")
    assert words.decode(out[0], skip_special_tokens=True) + "\n" == text and text.startswith(VERSE)

    export_hf.main(["run/model_best.pt", "deep/hf"])
    (previous,) = Path("deep").glob("hf.previous-*")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (previous, Path("deep/hf"))]
    assert weights[0] == weights[1]
    assert {path.name for path in Path("deep").iterdir()} == {"hf", previous.name}  # no temporary folder is left


def test_the_best_model_is_exported_not_the_last(run):
    export_hf.main([str(run), "hf"])
    best = gpt_tiktoken.load_checkpoint(str(run / "model_best.pt"))
    assert torch.equal(loaded("hf")[0].lm_head.weight, best["model"]["lm_head.weight"])
    mark = json.loads(Path("hf/export.json").read_text(encoding="utf-8"))
    assert mark["sha256"].keys() == {path.name for path in Path("hf").iterdir()} - {"export.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= mark["sha256"].keys()


def test_it_runs_from_the_project_s_folder(run, folder):
    """It is run from elsewhere in the test of the full disk below."""
    subprocess.run([sys.executable, "tools/export_hf.py", run, folder / "hf"], cwd=ROOT, check=True, capture_output=True)
    assert Path("hf/config.json").exists()


# ----------------------------------------------------------------------------------------- what it refuses
@pytest.mark.parametrize(("options", "reason"), [(dict(recipe="classic"), "head bias"), (dict(prune_vocab=True), "pruned")])
def test_what_no_hugging_face_folder_can_hold_is_refused(options, reason, capsys):
    train("run", **options)
    assert reason in error_of(capsys, "run", "hf")


def test_what_is_no_run_is_refused(run, capsys):
    assert "no checkpoint at" in error_of(capsys, "nowhere", "hf")
    Path("empty").mkdir()
    assert "no checkpoint at" in error_of(capsys, "empty", "hf")
    assert "not a checkpoint of gpt_tiktoken.py" in error_of(capsys, "songs.txt", "hf")
    shutil.copy(run / "model_best.pt", "cut.pt")
    os.truncate("cut.pt", 10_000)
    assert "damaged" in error_of(capsys, "cut.pt", "hf")


def test_only_an_earlier_export_gives_way(run, capsys):
    shutil.copytree(run, "run")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    Path("hf").mkdir()
    shutil.copy(run / "config.json", "hf")  # a model folder, but none of ours
    make_device("device")
    for target in ("mine", "hf", "songs.txt", "run", ".", "..", "device"):
        assert "choose another" in error_of(capsys, "run", target), target
    export_hf.main(["run", "out"])
    os.chdir("out")
    assert "in use" in error_of(capsys, "../run", ".")
    os.chdir("..")
    mark = Path("out/export.json").read_bytes()
    for name, content in {"mine.txt": b"mine", "export.json": b"{", "more/mine.txt": b"mine"}.items():
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_bytes(content)
        assert "choose another" in error_of(capsys, "run", "out")
        Path("out", name).unlink()
        Path("out/export.json").write_bytes(mark)
    Path("new").mkdir()
    export_hf.main(["run", "new"])  # an empty folder is as good as none
    assert Path("new/model.safetensors").exists() and not list(Path().glob("new.previous-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_done(run):
    """No file may grow beyond a limit, which stands in for a full disk; here the weights do."""
    export_hf.main([str(run), "hf"])
    before = tree()
    done = subprocess.run(
        [sys.executable, TOOL, run, "hf"], capture_output=True, text=True, encoding="utf-8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: cannot write")
    assert tree() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x"), Exception("No space left (os error 28)")])
def test_nothing_is_left_where_a_write_fails(run, monkeypatch, capsys, error):
    """The tokenizers library raises a bare Exception when the disk is full."""
    from transformers import PreTrainedTokenizerFast

    export_hf.main([str(run), "hf"])
    before = tree()
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *args: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as stop:
        export_hf.main([str(run), "hf"])
    assert stop.value.code == 1 and tree() == before
    assert "No space left" in capsys.readouterr().err
