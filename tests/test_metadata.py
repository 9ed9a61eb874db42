"""Each script says itself what it needs, so that `uv run gpt.py` works: pytest tests/test_metadata.py"""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("gpt.py", "gpt_tiktoken.py", "gpt_hf.py", "data_collection.py")
UNSEEN = {"gpt_hf.py": {"accelerate"}}  # nobody imports it by name: transformers' Trainer does


def requirements(lines):
    """{package: the line that asks for it}."""
    found = (line.partition("#")[0].strip() for line in lines)
    return {re.match(r"[\w-]+", line)[0]: line for line in found if line}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_asks_for_what_it_imports_within_the_same_bounds(script):
    source = (ROOT / script).read_text(encoding="utf-8")
    block = re.search(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source)  # PEP 723's own
    assert block["type"] == "script"
    metadata = tomllib.loads(re.sub("(?m)^# ?", "", block["content"]))
    nodes = list(ast.walk(ast.parse(source)))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    needed = {name.partition(".")[0] for name in imported} | UNSEEN.get(script, set())
    ours = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert requirements(metadata["dependencies"]) == {name: ours[name] for name in needed & ours.keys()}
    assert metadata["requires-python"] == ">=3.11"
