"""The notebook, run top to bottom at toy size: pytest tests/test_notebook.py. No clone, Drive, Genius or Hub."""

import contextlib
import copy
import errno
import os
import queue
import re
import shutil
import sys
import time
import types
import zipfile
from pathlib import Path

import hf_models
import jupyter_client
import nbclient
import nbformat
import pytest
import tokenizer_files

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "assets" / "mlody_gtp_colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    """The notebook as it is committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook, kind):
    """The texts of all cells of a kind."""
    return [cell.source for cell in notebook.cells if cell.cell_type == kind]


def printed(cell):
    """What a cell that was run has printed, errors included."""
    return "".join(output.get("text", "") for output in cell.outputs)


TINY = "--n_layer 2 --n_head 2 --n_embd 32 --block_size 64 --batch_size 8 --max_iters 20 --eval_interval 10 --eval_iters 5"
TOY_SETTINGS = f"""
ARTIST, MODEL, LENGTH, TEXTS = "", "toy_model", 30, 4
VOCABULARIES = {{"custom_300": "--tokenizer custom --vocab_size 300", "gpt2": "--tokenizer tiktoken --prune_vocab"}}
STAGE_1 = STAGE_2 = "{TINY} --max_new_tokens 40"
STAGE_3 = "--epochs 1 --max_steps 4 --num_samples 1 --max_new_tokens 20"
"""
SHORT_TEXTS = "compare_stages.LENGTH = 100"  # else the comparison takes a minute


def copy_project(folder):
    """The project in a folder, with a toy text and a toy model, and what a kernel there must know."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), ROOT / "requirements.txt"]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "assets/input").mkdir(parents=True)
    songs = (ROOT / "assets/input/input2.txt").read_text(encoding="utf-8").split(hf_models.END)[:12]
    (folder / "assets/input/input2.txt").write_text(hf_models.END.join(songs), encoding="utf-8")
    hf_models.save(folder / "toy_model", hf_models.gpt2())
    tokenizer_files.fill_cache(folder / "tiktoken")
    return os.environ | dict(
        TIKTOKEN_CACHE_DIR=str(folder / "tiktoken"), HF_HUB_OFFLINE="1", PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1",
        OMP_NUM_THREADS="1")  # several threads wait for each other on a busy machine


def toy_sources(notebook):
    """The code of all cells, with the settings of a toy run."""
    cells = sources(notebook, "code")
    settings = next(i for i, source in enumerate(cells) if source.startswith("# SETTINGS"))
    cells[settings] += TOY_SETTINGS
    imports = next(i for i, source in enumerate(cells) if "import compare_stages" in source)
    cells[imports] += "\n" + SHORT_TEXTS
    return cells


@pytest.fixture(scope="module")
def executed(notebook, tmp_path_factory):
    """The notebook after it was run in a copy of the project, and that copy's folder."""
    folder = tmp_path_factory.mktemp("project")
    environment = copy_project(folder)
    done = copy.deepcopy(notebook)
    for cell, source in zip((cell for cell in done.cells if cell.cell_type == "code"), toy_sources(notebook), strict=True):
        cell.source = source
    client = nbclient.NotebookClient(done, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return done, folder


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 50_000


def test_cells_are_short_and_each_topic_has_a_text(notebook):
    assert all(len(source.splitlines()) <= 36 for source in sources(notebook, "code"))
    headings = re.findall(r"^#+ (.*)", "\n".join(sources(notebook, "markdown")), re.MULTILINE)
    for word in ("Get the project", "Drive", "text", "Stage 1", "guesses", "surprises", "attention", "letters", "Stage 2",
                 "Stage 3", "Before and after", "Compare", "Write", "Download"):
        assert any(word in heading for heading in headings), word


def test_pytorch_is_left_alone(notebook):
    installs = [line for source in sources(notebook, "code") for line in source.splitlines() if "pip" in line]
    assert installs == ["%pip install -q -r requirements.txt morfeusz2"]


def test_it_runs_top_to_bottom(executed):
    done, folder = executed
    code = [cell for cell in done.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not [printed(cell) for cell in code if "error:" in printed(cell)]
    runs = folder / "assets" / "runs" / "input2"
    assert {path.name for path in runs.iterdir() if path.is_dir()} == {"char", "custom_300", "gpt2", "hf", "comparison"}
    assert (runs / "hf/model/config.json").exists() and not [cell for cell in code if "finished before" in printed(cell)]
    report = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in report for name in ("char", "custom_300", "gpt2", "hf", "validation text"))
    assert not (folder / "mlody-gtp").exists()  # no clone
    written = [printed(cell) for cell in code if "--sample_only" in cell.source]
    assert len(written) == 2 and all("Noc nad" in text for text in written)


def test_it_shows_the_pictures_of_the_lesson(executed):
    done, _ = executed
    outputs = {cell.source: [output.get("data", {}) for output in cell.outputs] for cell in done.cells if "outputs" in cell}

    def count(code, kind):
        """How many outputs of a kind the cells have that hold this code."""
        return sum(kind in data for source, found in outputs.items() if code in source for data in found)

    for drawing, pictures in {
            "lesson.next_tokens(char": 1, "lesson.surprise(char": 1, "lesson.looking_back(": 1, "lesson.letter_map(": 1,
            "lesson.cuts(": 1, "lesson.surprise(smallest": 2, "pictures.learning_curves(": 1, "run(compare_stages": 2,
            "train(gpt, ": 1, "train(gpt_tiktoken, ": 2, "run(gpt_hf, \"--input": 1}.items():
        assert count(drawing, "image/png") == pictures, drawing
    tables = [data["text/html"] for found in outputs.values() for data in found if "<table" in data.get("text/html", "")]
    assert [re.findall(r"<th[^>]*>(temperature [\d.]+|before|after)", table) for table in tables] == [
        ["temperature 0.3", "temperature 0.8", "temperature 1.5"], ["before", "after"]]


def test_the_download_holds_what_is_small_and_the_models_that_were_asked_for(executed):
    _, folder = executed
    names = zipfile.ZipFile(folder / "assets/runs/input2.zip").namelist()
    assert {"input2/char/model_best.pt", "input2/char/output/sample.txt", "input2/comparison/comparison.md",
            "input2/hf/metrics.json", "input2/curves.png"} <= set(names)
    assert not [name for name in names if re.search(r"model_last|checkpoint-|safetensors|custom_300/model_best|lock", name)]


def test_what_is_new_is_copied_to_drive_and_back(notebook, tmp_path):
    cell = next(source for source in sources(notebook, "code") if "def copy_new" in source)
    names = dict(os=os, Path=Path)
    exec(cell, names)
    here, drive = tmp_path / "here", tmp_path / "drive"
    for name in ("char/model_last.pt", "char/model_last.pt.tmp", "hf/checkpoint-3/model.safetensors",
                 "hf/model.new/config.json", "hf/model/model.safetensors", "char.previous-20250101-000000/model_best.pt",
                 ".char.lock"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("alt")
    names["copy_new"](here, drive)
    assert {path.relative_to(drive).as_posix() for path in drive.rglob("*.*") if path.is_file()} == {
        "char/model_last.pt", "hf/model/model.safetensors"}
    (here / "char/model_last.pt").write_text("neu")
    os.utime(here / "char/model_last.pt", (time.time() + 60, time.time() + 60))
    (drive / "hf/model/model.safetensors").write_text("Drive's own")  # not older: it stays
    names["copy_new"](here, drive)
    assert (drive / "char/model_last.pt").read_text() == "neu"
    assert (drive / "hf/model/model.safetensors").read_text() == "Drive's own"
    shutil.rmtree(here)
    names["copy_new"](drive, here)
    assert (here / "char/model_last.pt").read_text() == "neu"
    names["copy_new"](tmp_path / "nothing there", here)  # a first session: Drive is empty


@pytest.fixture
def colab(monkeypatch):
    """As if this were Colab: what stands for its modules, to be told how Drive answers."""
    module = types.ModuleType("google.colab")
    module.drive = types.SimpleNamespace(mount=lambda path: None)
    module.files = types.SimpleNamespace(download=lambda path: None)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return module


def drive_cells(notebook):
    """What the two cells for Drive have defined, after they were run."""
    names = dict(os=os, sys=sys, Path=Path, USE_DRIVE=True)
    for source in sources(notebook, "code"):
        if "def copy_new" in source or "def exchange" in source:
            exec(source, names)
    return names


def test_drive_may_be_declined(notebook, colab, capsys):
    def declines(path):
        raise Exception("Error: credential propagation was unsuccessful")  # Colab's own class of error

    colab.drive.mount = declines
    names = drive_cells(notebook)
    assert names["DRIVE"] is None
    names["save"]()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and printed.startswith("without Drive (Error: credential propagation")


def test_a_full_drive_is_one_line_and_leaves_no_half_copy(notebook, tmp_path, capsys, monkeypatch):
    names = drive_cells(notebook)
    here, names["DRIVE"] = tmp_path / "here", tmp_path / "drive"
    (here / "char").mkdir(parents=True)
    (here / "char/model_best.pt").write_text("weights")
    names["ALL_RUNS"] = here

    def full(source, target):
        Path(target).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", full)
        names["save"]()
    printed = capsys.readouterr().out
    assert printed == "note: not everything was copied (No space left on device). Is Drive full? Empty its trash.\n"
    assert not [path for path in names["DRIVE"].rglob("*") if path.is_file()]
    names["save"]()
    assert (names["DRIVE"] / "runs/char/model_best.pt").read_text() == "weights"


def test_colab_downloads_the_archive(notebook, colab, tmp_path):
    taken = []
    colab.files.download = taken.append
    (tmp_path / "input2/char").mkdir(parents=True)
    (tmp_path / "input2/char/metrics.json").write_text("{}")
    names = dict(re=re, sys=sys, DOWNLOAD=[], ALL_RUNS=tmp_path, RUNS=tmp_path / "input2", CORPUS=Path("input2.txt"))
    exec(sources(notebook, "code")[-1], names)
    assert taken == [str(tmp_path / "input2.zip")]
    assert zipfile.ZipFile(taken[0]).namelist() == ["input2/char/metrics.json"]


class Kernel:
    """A kernel that is used as by a notebook: cells are queued, and the button interrupts."""

    def __init__(self, folder, environment):
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=environment)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run_all(self, cells, interrupt_at=None):
        """Queue all cells at once. interrupt_at: what must be printed before the button is pressed.

        Returns each cell's status, what was printed, and the errors' texts.
        """
        numbers = [self.client.execute(cell) for cell in cells]
        replies, idle, text, errors = {}, set(), "", []
        deadline = time.monotonic() + 240
        while not set(numbers) <= replies.keys() or not {n for n in numbers if replies[n] != "aborted"} <= idle:
            assert time.monotonic() < deadline, text[-2000:]
            with contextlib.suppress(queue.Empty):
                message = self.client.get_shell_msg(timeout=0.05)
                replies[message["parent_header"]["msg_id"]] = message["content"]["status"]
            with contextlib.suppress(queue.Empty):
                message = self.client.get_iopub_msg(timeout=0.05)
                content = message["content"]
                text += content.get("text", "")
                if message["msg_type"] == "error":
                    errors.append("\n".join(content["traceback"]))
                if content.get("execution_state") == "idle":  # all that the cell has printed is here
                    idle.add(message["parent_header"]["msg_id"])
                if interrupt_at and re.search(interrupt_at, text):
                    self.manager.interrupt_kernel()
                    interrupt_at = None
        return [replies[number] for number in numbers], text, errors

    def close(self):
        """End it."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def test_the_stop_button_stops_all_cells_that_follow(notebook, tmp_path):
    empty, folder = tmp_path / "empty", tmp_path / "project"
    empty.mkdir()
    folder.mkdir()
    kernel = Kernel(empty, copy_project(folder))
    cells = toy_sources(notebook)
    cells[0] += "STAGE_1 = STAGE_1.replace('--max_iters 20', '--max_iters 100000 --patience 0')\n"
    project = next(i for i, source in enumerate(cells) if "git clone" in source)
    first = next(i for i, source in enumerate(cells) if source.startswith("train(gpt, "))
    collects = next(source for source in cells if "data_collection.main" in source)
    try:
        status, _, errors = kernel.run_all([*cells[:project + 1], "print('and on')"])
        assert status == ["ok", "error", "aborted"]  # the address was forgotten
        assert errors == ["Put the address of your copy of the project into REPO_URL in the SETTINGS cell, then run all."]

        installs = cells[project].replace("%pip install -q -r requirements.txt", "!echo installing; sleep 100")
        status, _, errors = kernel.run_all([f"%cd {folder}", installs, "print('and on')"], "installing")
        assert status == ["ok", "error", "aborted"]
        assert errors == ["The installation did not finish: see above, then run this cell again."]

        status, text, errors = kernel.run_all(cells, r"step +10 ")
        assert status == ["ok"] * first + ["error"] + ["aborted"] * (len(cells) - first - 1)
        assert errors == ["Stopped. Run this cell again: it continues."]
        assert "stopped; the last good checkpoint is kept" in text and "step    10 " in text and "Traceback" not in text

        status, text, errors = kernel.run_all([cells[first], "print('and on')"], r"step +\d+ .*\n(.*\n)*step +\d+ ")
        assert status == ["error", "aborted"] and "step     0 " not in text and "step    10 " not in text  # it continued

        status, text, errors = kernel.run_all(["run(gpt, '--max_iters', 'many')", "print('and on')"])
        assert status == ["error", "aborted"] and errors == ["Stopped by the error above."]
        assert "error: argument --max_iters" in text
        status, text, errors = kernel.run_all(["lesson.load(gpt, 'nowhere')", "print('and on')"])  # an error outside main
        assert status == ["error", "aborted"] and text == "" and len(errors[0].splitlines()) == 1
        assert errors[0].startswith("no checkpoint at nowhere")

        slow = """
def slow(argv):
    try:
        print("collecting", flush=True)
        time.sleep(100)
    except KeyboardInterrupt:
        raise SystemExit(130)  # as the collector does
data_collection.main, ARTIST = slow, "Nobody"
"""
        status, _, errors = kernel.run_all([slow, collects, "print('and on')"], "collecting")
        assert status == ["ok", "error", "aborted"] and errors == ["Stopped. Run this cell again: it continues."]
    finally:
        kernel.close()
