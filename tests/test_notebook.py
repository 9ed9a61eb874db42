"""The notebook, run top to bottom at toy size: pytest tests/test_notebook.py. No clone, Drive, Genius or Hub."""

import copy
import os
import re
import shutil
import time
from pathlib import Path

import hf_models
import nbclient
import nbformat
import pytest

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


@pytest.fixture(scope="module")
def executed(notebook, tmp_path_factory):
    """The notebook after it was run in a copy of the project, and that copy's folder."""
    folder = tmp_path_factory.mktemp("project")
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), ROOT / "requirements.txt", ROOT / "assets/input/input2.txt"]
    for path in files:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    hf_models.save(folder / "toy_model", hf_models.gpt2())
    changed = dict(MLODY_TOY="1", HF_HUB_OFFLINE="1", PIP_NO_INDEX="1", PIP_DISABLE_PIP_VERSION_CHECK="1",
                   OMP_NUM_THREADS="1")  # several threads wait for each other on a busy machine
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        done = copy.deepcopy(notebook)
        nbclient.NotebookClient(done, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return done, folder


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 40_000


def test_cells_are_short_and_each_topic_has_a_text(notebook):
    assert all(len(source.splitlines()) <= 36 for source in sources(notebook, "code"))
    headings = re.findall(r"^#+ (.*)", "\n".join(sources(notebook, "markdown")), re.MULTILINE)
    for word in ("Get the project", "Drive", "text", "Stage 1", "attention", "Stage 2", "Stage 3", "Compare", "Write"):
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
    assert {path.name for path in runs.iterdir() if path.suffix != ".lock"} == {"char", "custom_300", "hf", "comparison"}
    assert (runs / "hf/model/config.json").exists() and not [cell for cell in code if "finished before" in printed(cell)]
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7  # the losses of three stages, attention, three of the comparison
    report = (runs / "comparison" / "comparison.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in report for name in ("char", "custom_300", "hf", "validation text"))
    assert not (folder / "mlody-gtp").exists()  # no clone
    assert "Noc" in printed(code[-2]) and "Noc nad miastem" in printed(code[-1])


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
