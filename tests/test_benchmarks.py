"""The benchmarks run to their end at toy size (figures come from the real thing): pytest -m slow tests/test_benchmarks.py"""

import re
import subprocess
import sys
from pathlib import Path

import busy
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def lyrics(folder):
    text = folder / "text.txt"
    text.write_text("Noc nad miastem, w oknach śpi światło\nA ja liczę gwiazdy\n" * 80, encoding="utf-8")
    return text


def spin_rows(out):
    return [line.strip("| ").split(" | ") for line in out.splitlines()[4:]]


def test_a_step_is_measured_with_and_without_spinning_threads(monkeypatch, capsys):
    step = "import json, os; print(json.dumps(dict(seconds=1 + len(os.environ.get('GOMP_SPINCOUNT', '')))))"
    monkeypatch.setattr(busy, "STEP", [sys.executable, "-c", step])
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    busy.main(["--rounds", "1"])
    assert spin_rows(capsys.readouterr().out) == [["not set", "1000", "1000", "1.00"], ["1000", "5000", "5000", "1.00"]]


@pytest.mark.slow
def test_a_step_beside_a_busy_program(capsys):
    busy.main(["--rounds", "1", "--steps", "2"])
    rows = spin_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["not set", "1000"] and all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
def test_the_gpu_script_on_a_cpu(tmp_path):
    text = lyrics(tmp_path)
    done = subprocess.run(
        [sys.executable, FOLDER / "gpu.py", "--device", "cpu", "--size", "tiny", "--input", text, "--seconds", "0.1", "--race",
         "8", "--tokens", "5"], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(("| modern", "| classic"))]
    assert len(rows) == 12 and len({tuple(row[:4]) for row in rows}) == 12
    assert all(int(row[4].replace(",", "")) > 0 for row in rows)
    assert re.search(r"classic: best at step \d", done.stdout)
    assert done.stdout.count("\nmodern, ") == 4 and done.stdout.count("tokens/s\n") == 2


@pytest.mark.slow
def test_quality_gives_each_run_its_minutes_and_trains_none_twice(tmp_path):
    command = [sys.executable, FOLDER / "quality.py", "--input", lyrics(tmp_path), "--minutes", "0.1", "--jobs", "2", "--out",
               tmp_path / "runs", "--runs", "classic_128_0.001", "modern_2115"]
    tables = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        tables.append([line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]])
    assert tables[0] == tables[1] and [row[0] for row in tables[0]] == ["classic_128_0.001", "modern_2115"]
    assert all(int(row[3]) > 5 and 0 < float(row[6]) < 7 for row in tables[0])
