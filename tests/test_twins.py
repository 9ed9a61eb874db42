"""Stages 1 and 2 are twins, to the letter and in what they do: pytest tests/test_twins.py

Each script can be read alone, so the model, its training and its files are written down twice. Here a changed line, comment or
decorator on one side only is an error, unless EXEMPT or GROWN says why both sides differ.
"""

import ast
import functools
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_gpt import numeric
from test_gpt_tiktoken import sum_error

import gpt
import gpt_tiktoken

ONE, TWO = (Path(stage.__file__).read_text(encoding="utf-8") for stage in (gpt, gpt_tiktoken))
EXEMPT = {  # what both define and may write differently
    "docstring": "each script says what it is for and how to run it",
    "STAGE": "the stage's name",
    "SIZES": "each script's own tiny, as measured",
    "RECIPES": "the original project decayed weights by 0.01 in stage 1, by 0.1 in stage 2",
    "SHAPE": "stage 2's weights depend on the tokenizer, too",
    "Config.run_dir": "each stage has a folder of its own",
    "SEPARATOR": "stage 2 needs the words inside it by themselves",
    "make_tokenizer": "characters here; tiktoken's, custom or Polish sub-words there",
    "describe": "stage 2 says more about its vocabulary",
    "GPTLanguageModel.forward": "the loss: plain over a hundred characters, in slices over 50,257 sub-words",
}
GROWN = {  # where stage 2 has every line of stage 1, in order, and some more
    "run": "the export, and the run's tokenizer.json",
}


# -------------------------------------------------------------------------------------------- the comparison
def name_of(node):
    """What a statement is called: the name that it defines, else its first line."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    return ast.unparse(node).partition("\n")[0]


def parts(lines, nodes, first, last, prefix=""):
    """The text of each statement in the lines first to last (from 1), by name; under the prefix alone: what is left over.

    To a statement belong its decorators, the comments right above it and those at the ends of its lines. Of a class each
    method and field is a statement, "Class.method"; "Class." is its head.
    """
    found, rest = {}, set(range(first, last + 1))
    for node in nodes:
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        while lines[start - 2].lstrip().startswith("#") and not lines[start - 2].startswith("# ---"):
            start -= 1
        span = range(start, node.end_lineno + 1)
        rest -= set(span)
        if isinstance(node, ast.ClassDef):
            body = [child for child in node.body if name_of(child) != "docstring"]
            new = parts(lines, body, start, node.end_lineno, f"{node.name}.")
        else:
            new = {prefix + name_of(node): "\n".join(lines[number - 1] for number in span)}
        assert not new.keys() & found.keys(), f"{name_of(node)} is defined twice"
        found |= new
    return found | {prefix: "\n".join(lines[number - 1] for number in sorted(rest) if lines[number - 1].strip())}


@functools.cache
def pieces(source):
    """The text of all that a script defines, by name. What is in no statement, such as banners, has the name ""."""
    lines = source.splitlines()
    return parts(lines, ast.parse(source).body, 1, len(lines))


def differences(one, two):
    """What both define but write differently: both texts by name."""
    one, two = pieces(one), pieces(two)
    return {name: (one[name], two[name]) for name in one if name in two and one[name] != two[name]}


def grown(one, two):
    """Are all lines of one in two, in their order?"""
    lines = iter(two.splitlines())
    return one != two and all(line in lines for line in one.splitlines())


def complaints(one, two, exempt=EXEMPT, grows=GROWN):
    """The names whose twins differ without a reason, or whose exemption is no longer needed."""
    different = differences(one, two)
    wrong = different.keys() - exempt.keys() - grows.keys()
    wrong |= {name for name in exempt if name not in different}
    wrong |= {name for name in grows if name not in different or not grown(*different[name])}
    common = (pieces(one).keys() & pieces(two).keys()) - exempt.keys()
    order = [[name for name in pieces(source) if name in common] for source in (one, two)]
    return wrong | ({"the order"} if order[0] != order[1] else set())


# ---------------------------------------------------------------------------------------------- the same text
KNOWN = complaints(ONE, TWO)


def test_twins_are_the_same_to_the_letter():
    wrong, different = KNOWN, differences(ONE, TWO)
    for name in sorted(wrong):
        print(f"--- {name}:", *different.get(name, ["an exemption without a difference"]), sep="\n+++\n")
    assert not wrong


def test_twins_have_the_same_syntax_tree():
    one, two = ({name: ast.dump(ast.parse(textwrap.dedent(text))) for name, text in pieces(source).items() if name[-1:] != "."}
                for source in (ONE, TWO))
    assert {name for name in one if name in two and one[name] != two[name]} <= EXEMPT.keys() | GROWN.keys()


def test_all_of_stage_1_but_its_tokenizer_is_in_stage_2():
    one, two = pieces(ONE).keys(), pieces(TWO).keys()
    assert {name.partition(".")[0] for name in one - two} == {"CharTokenizer"}
    assert {f"BPETokenizer.{name.partition('.')[2]}" for name in one - two} <= two  # the methods that the twins call
    classes = {name.partition(".")[0] for name in one & two if "." in name}
    assert {"Config", "Trainer", "GPTLanguageModel", "Block", "Muon"} < classes
    assert {name.partition(".")[0] for name in two - one if "." in name} & classes == {"Config"}  # more options, nothing else


# ------------------------------------------------------------------------------------------ a test of this test
CHANGES = [
    ("rotate", "x * cos + torch.cat", "x * cos - torch.cat"),  # code
    ("FORMAT_VERSION", "FORMAT_VERSION = 1", "FORMAT_VERSION = 2"),
    ("Muon.__init__", "momentum: float = 0.95", "momentum: float = 0.9"),
    ("Config.seed", "option(2115,", "option(2116,"),
    ("Config.dropout", "share of activations dropped in training", "share of activations dropped"),
    ("make_optimizers", 'if "blocks" in name and', 'if "block" in name and'),
    ("main", 'message, status = "stopped", 130', 'message, status = "stopped", 1'),
    ("if __name__ == '__main__':", "128 + metrics", "127 + metrics"),
    ("learning_rate", '"""classic: constant. modern', '"""classic: constant; modern'),  # a docstring
    ("GPTLanguageModel.", '"""Tokens in; out,', '"""Tokens in, out,'),
    ("rotate", "# (T, hs) each", "# (T, hs / 2) each"),  # comments, also above a definition
    ("Block.__init__", "# LayerNorm without bias is", "# LayerNorm without a bias is"),
    ("Trainer.__init__", "# How far the run has come,", "# How far it has come,"),
    ("read_corpus", "def read_corpus", "# A new comment.\ndef read_corpus"),
    ("Block.", "class Block", "# A new comment.\nclass Block"),
    ("", "---- train\n", "---- training\n"),
    ("evaluate", "@torch.no_grad()\ndef evaluate", "def evaluate"),  # decorators
    ("generate", "@torch.inference_mode()", "@torch.no_grad()"),
    ("Muon.step", "    @torch.no_grad()\n    def step", "    def step"),
    ("GPTConfig.", "@dataclass(frozen=True)\nclass GPTConfig", "@dataclass\nclass GPTConfig"),
    ("run", 'raise Stop(f"the weights in', 'raise Stop(f"the numbers in'),  # a line that stage 2 has from stage 1
]


@pytest.mark.parametrize(("side", "name", "old", "new"), [(i % 2, *change) for i, change in enumerate(CHANGES)])
def test_a_change_on_one_side_is_found(side, name, old, new):
    sources = [ONE, TWO]
    assert sources[side].count(old) == 1
    sources[side] = sources[side].replace(old, new)
    assert complaints(*sources) - KNOWN == {name}


def test_a_definition_that_moved_is_found():
    for first, second in (("draw_token", "pick_device"), ("Trainer.metrics", "Trainer.save")):
        one, two = pieces(TWO)[first], pieces(TWO)[second]
        swapped = TWO.replace(one, "<here>").replace(two, one).replace("<here>", two)
        assert complaints(ONE, swapped) - KNOWN == {"the order"}


def test_an_exemption_that_is_no_longer_needed_is_found():
    for name, (one, two) in differences(ONE, TWO).items():
        assert name in complaints(ONE, TWO.replace(two, one))  # both are equal again
        fewer = [{other: "?" for other in table if other != name} for table in (EXEMPT, GROWN)]
        assert name in complaints(ONE, TWO, *fewer)
    for name in ("rotate", "no_such_name", "BPETokenizer", "CharTokenizer.encode"):  # equal, in neither, in one only
        for tables in ((EXEMPT | {name: "?"}, GROWN), (EXEMPT, GROWN | {name: "?"})):
            assert complaints(ONE, TWO, *tables) - KNOWN == {name}


# ------------------------------------------------------------------------------------------- the same behaviour
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models are faster so, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


both_recipes = pytest.mark.parametrize("recipe", ["modern", "classic"])


def models(recipe, shape=(50, 12, 2, 2, 16, 0.0), seed=7):
    """Both scripts' models of one configuration and seed."""
    for stage in (gpt, gpt_tiktoken):
        torch.manual_seed(seed)
        yield stage.GPTLanguageModel(stage.GPTConfig(*shape, recipe == "modern"))


@numeric
@both_recipes
def test_the_same_seed_gives_the_same_model(recipe):
    one, two = models(recipe)
    weights = one.state_dict(), two.state_dict()
    assert list(weights[0]) == list(weights[1]) and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    idx = torch.randint(50, (3, 12))
    assert one(idx).shape == (3, 12, 50) and torch.equal(one(idx), two(idx))
    two.load_state_dict(weights[0])  # so stage 2's class can read what stage 1's has learned


@numeric
@pytest.mark.parametrize(("recipe", "vocab_size", "ignored"), [
    ("modern", 50, 0), ("modern", 50, 5), ("classic", 50, 0), ("classic", 50, 5),
    ("classic", 1_000_003, 7)])  # sixteen tokens a slice
def test_the_loss_in_slices_is_the_plain_one(recipe, vocab_size, ignored):
    one, two = models(recipe, (vocab_size, 12, 1, 1, 12, 0.0))
    for p, twin in zip(one.parameters(), two.parameters()):
        torch.nn.init.normal_(p, std=0.3)
        twin.data.copy_(p.data)
    idx, targets = torch.randint(vocab_size, (2, 2, 12))
    targets.view(-1)[torch.randperm(24)[:ignored]] = -100
    losses = [model(idx, targets) for model in (one, two)]
    (losses[1] / 3).backward()
    error = sum_error(vocab_size)  # and 1e-5 for the layers below, which compute in float32
    expected = F.cross_entropy(one.double()(idx).flatten(0, 1), targets.flatten())  # in float64
    (expected / 3).backward()
    for loss in losses:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5 + error)
    for (name, p), twin in zip(one.named_parameters(), two.parameters()):
        assert (p.grad - twin.grad).norm() <= (1e-5 + error) * p.grad.norm(), name


@numeric
@both_recipes
@pytest.mark.parametrize("rdrop", ["0", "1"])
def test_the_same_text_is_learned_in_the_same_steps(recipe, rdrop, tmp_path, monkeypatch):
    """Stage 2 with stage 1's tokenizer goes the same way: same losses, same files but the tokenizer's, same sample.

    Its sliced loss rounds otherwise: then the weights are those to rounding, and a sample may part from the other at a tie.
    """
    (tmp_path / "songs.txt").write_text("Idzie noc, a za nią świt\nKtoś na dachu liczy zyski\n" * 20, encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(gpt_tiktoken, "make_tokenizer", lambda config, text, checkpoint: Characters(gpt.make_tokenizer(
            config, text, checkpoint)))
        results = [stage.main([
            "--input", str(tmp_path / "songs.txt"), "--run_dir", str(tmp_path / stage.__name__), "--recipe", recipe,
            "--n_layer", "2", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--batch_size", "4", "--dropout", "0.1",
            "--rdrop", rdrop, "--grow", "1", "--max_iters", "12", "--eval_interval", "4", "--sample_interval", "0",
            "--weight_decay", "0.1", "--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "60"])
            for stage in (gpt, gpt_tiktoken)]
    assert results[0]["val_bpc"] == pytest.approx(results[1]["val_bpc"], rel=1e-4)
    assert results[0]["params"] == results[1]["params"] and results[0].keys() < results[1].keys()
    runs = [tmp_path / stage.__name__ for stage in (gpt, gpt_tiktoken)]
    files = [{path.name for path in run.iterdir() if "previous" not in path.name} for run in runs]
    assert files[0] | {"tokenizer.json"} == files[1]
    one, two = (torch.load(run / "model_last.pt", weights_only=True) for run in runs)
    assert one.keys() == two.keys() and one["model_config"] == two["model_config"]
    for name, p in one["model"].items():
        assert (p - two["model"][name]).norm() <= 1e-3 * p.norm(), name  # AdamW divides rounding by gradients near zero
    for a, b in zip(one["history"], two["history"]):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4) and a["iter"] == b["iter"]
    assert rdrop == "0" or len({(run / "output" / "sample.txt").read_text(encoding="utf-8") for run in runs}) == 1


class Characters:
    """Stage 1's tokenizer, with the source that stage 2 writes to tokenizer.json."""

    def __init__(self, tokenizer):
        self.__dict__.update(vars(tokenizer), encode=tokenizer.encode, stream=tokenizer.stream,
                             count_chars=tokenizer.count_chars, state=dict(tokenizer.state, source="{}"),
                             decode=lambda ids: "".join(tokenizer.stream(ids.tolist())))
