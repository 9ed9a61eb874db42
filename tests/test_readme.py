"""Does the README tell the truth? Its commands parse, its files exist, its figures are those of the published runs."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "assets" / "results"
sys.path.insert(0, str(ROOT / "tools"))
compare = importlib.import_module("compare_stages")
PARSED = {"data_collection.py", "gpt.py", "gpt_tiktoken.py", "gpt_hf.py", "tools/compare_stages.py"}


def commands():
    """Each command of the shell blocks that runs one of the scripts, in words: the script, then its options."""
    for block in re.findall("```bash\n(.*?)```", README, re.DOTALL):
        for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if starts:
                assert words[0] in ("python", "torchrun"), line
                yield words[starts[0]:]


def tables(markdown):
    """{(first cell of a row, heading): cell} of all tables."""
    cells = {}
    for table in re.findall(r"(?:^\|.*\|\n)+", markdown, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        cells |= {(row[0].strip("`"), name): cell for row in rows for name, cell in zip(head, row, strict=True)}
    return cells


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_a_command_parses(words):
    script = ROOT / words[0]
    assert script.exists()
    if words[0] in PARSED:
        importlib.import_module(script.stem).parse_args(words[1:])
    else:
        named = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert all(f'"{name}"' in script.read_text(encoding="utf-8") for name in named)


def test_the_readme_speaks_of_every_script():
    assert {words[0] for words in commands()} >= PARSED | {"tools/export_hf.py", "tools/corpus_report.py"}


def test_what_it_links_to_exists():
    links = re.findall(r"\]\(([^)#]+)\)|(?:src|href)=\"([^\"#]+)\"", README)
    local = {link for pair in links for link in pair if link and "://" not in link}
    assert local and all((ROOT / link).exists() for link in local), local


def test_the_table_shows_what_the_published_runs_measured():
    published, shown = tables((RESULTS / "comparison.md").read_text(encoding="utf-8")), tables(README)
    runs = {run for run, _ in published} & {path.name for path in RESULTS.iterdir() if path.is_dir()}
    checked = [key for key in shown if key[0] in runs]
    assert len(checked) > 20
    for run, heading in checked:
        assert shown[run, heading].strip("`") == published.get((run, heading)), (run, heading)


def test_the_published_table_shows_each_run_s_metrics():
    published = tables((RESULTS / "comparison.md").read_text(encoding="utf-8"))
    folders = [path for path in RESULTS.iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for name in ("params", "vocab_size", "chars_per_token", "val_bpc", "iters", "seconds", "tokens_per_second"):
            heading, how = compare.COSTS[name]
            assert published[folder.name, heading] == f"{metrics[name]:{how}}", (folder.name, name)


def test_its_samples_are_published_ones():
    written = "".join((path / "samples.txt").read_text(encoding="utf-8") for path in RESULTS.iterdir() if path.is_dir())
    samples = re.findall("```text\n(.*?)```", README, re.DOTALL)
    assert len(samples) >= 3
    for sample in samples:
        assert sample.strip() in written
