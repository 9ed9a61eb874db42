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
            words = shlex.split(line.replace("uv run", "python"), comments=True)  # which installs what the script asks for
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


def blocks():
    """What tools/compare_stages.py --readme has put between marks, by its name."""
    return dict(re.findall(r"<!-- ([\w ]+) -->\n(.*?)\n<!-- /\1 -->", README, re.DOTALL))


def test_the_first_screen_shows_a_picture_a_sample_and_the_commands():
    first = README.splitlines()[:25]
    assert any(line.startswith("![") and "assets/results/" in line for line in first)
    assert "git clone ADDRESS mlody-gtp && cd mlody-gtp" in first and any("pip install" in line for line in first)
    sample = README.split("```text\n")[1].split("\n```")[0]
    assert 3 <= len(sample.splitlines()) <= 4 and "minutes" in README.partition("git clone")[2][:400]
    assert README.index("<!-- /sample first -->") < README.index("git clone")


def test_it_is_short():
    assert len(README.split()) <= 2500
    rows = re.findall(r"^\|.*\|$", README, re.MULTILINE)
    assert rows and max(row.count("|") for row in rows) <= 6  # at most five columns


def test_tables_verdicts_and_samples_are_published_ones():
    published = (RESULTS / "comparison.md").read_text(encoding="utf-8")
    assert set(blocks()) == {"results", "claims", *(f"sample {name}" for name in ("first", "char", "bpe", "hf"))}
    for name, block in blocks().items():
        assert block.strip() and block in published, name


def test_every_claim_has_its_verdict_and_no_other_sentence_judges():
    verdicts = re.findall(r"^- \*(.*?)\*: \*\*(.*?)\*\*$", blocks()["claims"], re.MULTILINE)
    assert [claim for claim, _ in verdicts] == [claim for claim, *_ in compare.CLAIMS]
    rest = README
    for block in blocks().values():
        rest = rest.replace(block, "")
    assert not re.search(r"\b(?:rhymes|starve|copies|beats?)\b", rest)  # that is for the table to say


def test_every_measured_figure_of_the_text_is_a_published_one():
    """Bits per character have three decimals; seconds, gigabytes and ratios are in benchmarks/README.md, too."""
    published = "".join(path.read_text(encoding="utf-8") for path in (
        RESULTS / "comparison.md", ROOT / "benchmarks/README.md", ROOT / "benchmarks/LOG.md"))
    figures = set(re.findall(r"(?<![\d.,])\d\.\d{3}(?!\d)|\d+(?:\.\d+)?(?= times)|\d+(?:\.\d+)? s(?=[,: ])", README))
    assert len(figures) > 10
    numbers = {figure.removesuffix(" s") for figure in figures}
    assert not [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", published)]


def test_the_published_table_shows_each_run_s_metrics():
    published = tables((RESULTS / "comparison.md").read_text(encoding="utf-8"))
    folders = [path for path in RESULTS.iterdir() if (path / "metrics.json").exists()]
    assert folders
    for folder in folders:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for name in ("params", "vocab_size", "chars_per_token", "val_bpc", "iters", "seconds", "tokens_per_second"):
            heading, how = compare.COSTS[name]
            assert published[folder.name, heading] == f"{metrics[name]:{how}}", (folder.name, name)


def test_its_samples_are_published_ones():
    written = "".join((path / "samples.txt").read_text(encoding="utf-8") for path in RESULTS.iterdir() if path.is_dir())
    samples = re.findall("```text\n(.*?)```", README, re.DOTALL)
    assert len(samples) >= 4
    for sample in samples:
        assert sample.strip() in written
