"""The scripts are twins, to the letter and in what they do: pytest tests/test_twins.py   (every mutant: -m slow)

Each script can be read alone, so the model, its training and its files are written down twice. Here a changed line, comment or
decorator on one side only is an error, unless EXEMPT or OWN says why both sides differ. Whether that is found is tested by
mutation: of each definition that two scripts share, in one script alone, an operator, a number, a string, a name, a comment or
a docstring is changed, or a statement dropped.
"""

import ast
import functools
import io
import itertools
import keyword
import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_gpt import numeric
from test_gpt_tiktoken import sum_error

import gpt
import gpt_tiktoken

SCRIPTS = {name: Path(gpt.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
           for name in ("gpt", "gpt_tiktoken", "gpt_hf", "data_collection")}
PAIRS = list(itertools.combinations(SCRIPTS, 2))
TWINS = PAIRS[0]  # of these two, all that stage 1 has is in stage 2, in its order and under its banners
OTHER_SCRIPT = {
    "docstring": "each script says what it is for and how to run it",
    "": "a script's own sections",
}
FINE_TUNING = OTHER_SCRIPT | {  # stage 3 trains a model that has read before, through transformers' Trainer
    "STAGE, SCRIPT": "the stage's and the script's names",
    "Config.seed": "the Trainer seeds NumPy, too, which takes 32 bits",
    "Config.resume": "the Trainer's checkpoints are folders in OUTPUT_DIR",
    "Config.sample_only": "the result is a folder that from_pretrained loads",
    "Config.block_size": "the pre-trained model's context bounds it",
    "Config.patience": "stage 3 evaluates once an epoch, and has few of them",
    "Config.max_new_tokens": "stage 3 always ends a text with its song",
    **dict.fromkeys(["Config.batch_size", "Config.learning_rate", "Config.weight_decay"],
                    "a default for fine-tuning; in stages 1 and 2 the size or the recipe sets it"),
    **dict.fromkeys(["Config.num_samples", "Config.temperature", "Config.top_k", "Config.top_p"],
                    "a default for a model that has read before"),
    "token_losses": "a model of transformers, which sees so far that windows need not overlap; every process takes a share",
    "by_repetition": "the characters of a token are where the library's offsets say",
    "evaluate": "a model of transformers; every process takes a share; no figure per character if text is lost",
    "sample_text": "transformers' generate, whole texts at a time",
    "best_of": "stage 3 evaluates before training, too",
    "inherit": "a run's options are in its config.json; there is no checkpoint of one file, no SHAPE",
    "make_config": "stage 3 has no sizes and recipes: it counts the steps of its epochs",
    "check_targets": "stage 3 writes in one folder, and must spare the model's",
    "write_report": "a record an epoch, and the one before training to compare with",
    "write_samples": "stage 3 writes before and after training, and measures what was copied",
    "FAILURES": "safetensors has an error of its own",
    "MEMORY": "the option is named like the Trainer's; the width is given",
    "KNOWN": "safetensors' message of a full disk; nothing is compiled",
    "make_facts": "the model is there already; some of it may be frozen",
    "run": "a pre-trained model is loaded, the Trainer trains it, samples are written before and after",
}
COLLECTION = OTHER_SCRIPT | {
    "SEPARATOR": "stage 0 writes lines, so that their ends are no part of it",
    "Stop.": "stage 0 has a class of its own for failures",
    "IN_NOTEBOOK": "stage 0 asks for any kernel, as a cell goes on after a failure",
    "parse_args": "stage 0 repeats no value of an option, as it may be a token",
    "main": "stage 0 returns its report, also after a failure in a notebook",
}
EXEMPT = {  # what two scripts define and may write differently: pair -> name -> reason
    TWINS: {
        "docstring": OTHER_SCRIPT["docstring"],
        "STAGE, SCRIPT": "the stage's and the script's names",
        "SIZES.tiny": "each script's own tiny, as measured",
        "RECIPES.modern": "recall: sub-words are longer than characters, so fewer of them make a line",
        "RECIPES.classic": "the original project decayed weights by 0.01 in stage 1, by 0.1 in stage 2",
        "SHAPE": "stage 2's weights depend on the tokenizer, too",
        "UNINHERITED": "stage 2 writes a tokenizer, too, where the command line says",
        "Config.run_dir": "each stage has a folder of its own",
        "SEPARATOR": "stage 2 needs the words inside it by themselves",
        "make_tokenizer": "characters here; tiktoken's, custom or Polish sub-words there",
    },
    ("gpt", "gpt_hf"): FINE_TUNING,
    ("gpt_tiktoken", "gpt_hf"): FINE_TUNING | {"SEPARATOR": "stage 2 needs the words inside it by themselves"},
    ("gpt", "data_collection"): COLLECTION,
    ("gpt_tiktoken", "data_collection"): COLLECTION,
    ("gpt_hf", "data_collection"): COLLECTION,
}
FINE_TUNING_OWN = {  # what stages 1 and 2 have in these, and what stage 3 has; the rest is the same
    "Config.": ("stage 3 has no sizes and recipes",
                '    """Every option: its name, type, default and help. None: set by --size or --recipe."""',
                '    """Every option: its name, type, default and help."""'),
    "parse_args": ("stage 3 has no presets to list, and says which options have no effect", '''\
    presets = []  # what each size and recipe sets
    for name, preset in (SIZES | RECIPES).items():
        values = ", ".join(f"{option} {value}" for option, value in preset.items())
        presets.append(textwrap.fill(f"{name}: {values}", 79))
        SCRIPT, description=__doc__, epilog="\\n".join(presets),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
            help += f" (default: {f.default or 'by size or recipe'})"''', """\
        SCRIPT, description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
            help += f" (default: {f.default})"
    idle = given.keys() - SAMPLING
    if "sample_only" in given and idle:
        raise Stop(f"--{min(idle)} has no effect with --sample_only: leave one of them out")
    if "revision" in given and os.path.isdir(given.get("model_name", "")):
        raise Stop("--revision needs a --model_name on the Hub, not a folder: leave it out")"""),
    "plot_losses": ("over epochs; the best one is not marked", """\
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    steps = [record["iter"] for record in history]
        axes.plot(steps, losses, color=color, marker=".", label=label)
    best = best_of(history)
    label = f"best: {best['val_loss']:.3f} = {best['val_bpc']:.3f} bits per character"
    axes.plot(best["iter"], best["val_loss"], "o", color="#D55E00", fillstyle="none", markersize=12, label=label)""", """\
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss, nats per token")
    epochs = [record["epoch"] for record in history]
        axes.plot(epochs, losses, color=color, marker=".", label=label)"""),
    "run_folder": ("other names of folders; the best checkpoint is in the run's own", """\
    folder = Path(config.run_dir).resolve()
    best = Path(config.save_path).resolve()
        raise Stop(f"another process writes to --run_dir {config.run_dir}: wait, or choose another") from None
        versions = dict(python=sys.version, torch=torch.__version__)
        if best != folder / "model_best.pt":
            best.parent.mkdir(parents=True, exist_ok=True)
            keep_previous(best)
            if config.resume:
                with replacing(best) as file:
                    file.write((folder / "model_best.pt").read_bytes())
        if (folder / "model_last.pt").exists():
            e.add_note("the last good checkpoint is kept; continue with: "
                       f"python {SCRIPT} --resume --run_dir {config.run_dir!r}")""", """\
    folder = Path(config.output_dir).resolve()
        raise Stop(f"another process writes to --output_dir {config.output_dir}: "
                   "wait, or choose another") from None
        packages = "torch", "transformers", "datasets", "accelerate", *["peft"] * (config.lora > 0)
        versions = {name: version(name) for name in packages}
        if any(folder.glob(f"checkpoint-*/{CHECKSUMS}")):
            e.add_note("the last good checkpoint is kept")
        if is_run(folder):
            e.add_note(f"continue with: python {SCRIPT} --resume --output_dir {config.output_dir!r}")"""),
}
OWN = {  # lines that one of two has alone, while the rest of the definition is the same: pair -> name -> reason, lines of each
    TWINS: {
        "GPTLanguageModel.forward": ("the loss: plain over a hundred characters, in slices over 50,257 sub-words", """\
        logits = self.lm_head(self.norm(x))  # (B, T, vocab_size)
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())""", """\
        x = self.norm(x)
        head = self.lm_head
            return head(x)  # (B, T, vocab_size)
        return SlicedLoss.apply(x.flatten(0, 1), head.weight, head.bias, targets.flatten())"""),
        "run": ("the run's tokenizer.json", "", """\
        if RANK == 0:
            save_tokenizer(tokenizer, config)"""),
    },
    ("gpt", "gpt_hf"): FINE_TUNING_OWN,
    ("gpt_tiktoken", "gpt_hf"): FINE_TUNING_OWN,
}
ALONE = {"CharTokenizer": "stage 2 has BPETokenizer in its place"}  # what stage 1 has and stage 2 lacks


# -------------------------------------------------------------------------------------------- the comparison
def name_of(node):
    """What a statement is called: the name that it defines, else its first line."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return target.id if isinstance(target, ast.Name) else ast.unparse(target).strip("()")
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return "docstring"
    return ast.unparse(node).partition("\n")[0]


def above(lines, number):
    """The number of the line where the comments above a line begin; a banner is none of them."""
    while lines[number - 2].lstrip().startswith("#") and not lines[number - 2].startswith("# ---"):
        number -= 1
    return number


def spans(lines, nodes, first, last, prefix=""):
    """The line numbers of each statement in the lines first to last (from 1), by name; under the prefix alone: what is left.

    To a statement belong its decorators, the comments right above it and those at the ends of its lines. Of a class each
    method and field is a statement, "Class.method"; "Class." is its head. So is each entry that has a line of a dictionary.
    """
    found, rest = {}, set(range(first, last + 1))
    for node in nodes:
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        start = above(lines, start)
        rest -= set(range(start, node.end_lineno + 1))
        name, value = prefix + name_of(node), getattr(node, "value", None)
        if isinstance(node, ast.ClassDef):
            body = [child for child in node.body if name_of(child) != "docstring"]
            new = spans(lines, body, start, node.end_lineno, f"{name}.")
        elif isinstance(value, ast.Dict) and len({value.lineno, *(key.lineno for key in value.keys)}) > len(value.keys):
            starts = [above(lines, key.lineno) for key in value.keys]
            ends = [start - 1 for start in starts[1:]] + [value.end_lineno - 1]
            new = {f"{name}.{ast.literal_eval(key)}": list(range(*span)) for key, *span in zip(
                value.keys, starts, (end + 1 for end in ends))}
            new[f"{name}."] = sorted(set(range(start, node.end_lineno + 1)).difference(*new.values()))
        else:
            new = {name: list(range(start, node.end_lineno + 1))}
        assert not new.keys() & found.keys(), f"{name} is defined twice"
        found |= new
    return found | {prefix: [number for number in sorted(rest) if lines[number - 1].strip()]}


parsed = functools.lru_cache(8)(ast.parse)


@functools.lru_cache(8)
def places(source):
    """The line numbers of all that a script defines, by name. What is in no statement, such as banners, has the name ""."""
    lines = source.splitlines()
    return spans(lines, parsed(source).body, 1, len(lines))


@functools.lru_cache(8)
def pieces(source):
    """The text of all that a script defines, by name."""
    lines = source.splitlines()
    return {name: "\n".join(lines[number - 1] for number in numbers) for name, numbers in places(source).items()}


def without(text, own):
    """The lines of a text without those of its own, each of which stands in it; None if one does not."""
    kept = text.splitlines()
    for line in own.splitlines():
        if line not in kept:
            return None
        kept.remove(line)
    return kept


def shared(one, two):
    """What both define: both texts by name."""
    one, two = pieces(one), pieces(two)
    return {name: (one[name], two[name]) for name in one if name in two}


def differences(one, two):
    """What both define but write differently: both texts by name."""
    return {name: texts for name, texts in shared(one, two).items() if texts[0] != texts[1]}


def complaints(pair, one, two, exempt=EXEMPT, own=OWN):
    """The names that two scripts write differently without a reason, or whose exemption is no longer needed."""
    exempt, own, different = exempt.get(pair, {}), own.get(pair, {}), differences(one, two)
    wrong = different.keys() - exempt.keys()
    wrong |= exempt.keys() - different.keys()
    for name, (_, *lines) in own.items():
        kept = [without(text, own_lines) for text, own_lines in zip(different.get(name, ("", "")), lines)]
        wrong = wrong - {name} if kept[0] and kept[0] == kept[1] else wrong | {name}
    if pair == TWINS:
        wrong |= {name for name in pieces(one).keys() - pieces(two).keys() if name.partition(".")[0] not in ALONE}
        wrong |= {"the order"} if list(shared(one, two)) != list(shared(two, one)) else set()
    return wrong


@functools.lru_cache(8)
def trees(source):
    """The syntax tree of each function, class, method and field of a script: another way to see what differs."""
    found = {}
    for node in parsed(source).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name_of(child)}": ast.dump(child) for child in node.body}
            head = ast.Tuple([*node.bases, *node.keywords, *node.decorator_list])
            found[f"{node.name}."] = ast.dump(head) + found.pop(f"{node.name}.docstring", "")
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
    return found


def other_trees(one, two):
    """What both define, but with another syntax tree."""
    one, two = trees(one), trees(two)
    return {name for name in one.keys() & two.keys() if one[name] != two[name]}


# ---------------------------------------------------------------------------------------------- the same text
KNOWN = {pair: complaints(pair, *map(SCRIPTS.get, pair)) for pair in PAIRS}


def functions(script):
    """The names of a script's functions and classes."""
    return {*re.findall(r"^(?:def|class) (\w+)", SCRIPTS[script], re.MULTILINE)}


# How many functions and classes each script shares with each: one that is renamed on one side is no longer compared.
SHARED = {TWINS: len(functions("gpt") - ALONE.keys()), ("gpt", "gpt_hf"): 36, ("gpt", "data_collection"): 3,
          ("gpt_tiktoken", "gpt_hf"): 37, ("gpt_tiktoken", "data_collection"): 3, ("gpt_hf", "data_collection"): 3}
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)


@every_pair
def test_twins_are_the_same_to_the_letter(pair):
    different = differences(*map(SCRIPTS.get, pair))
    for name in sorted(KNOWN[pair]):
        print(f"--- {name}:", *different.get(name, ["in one alone, moved, or an exemption without need"]), sep="\n+++\n")
    assert not KNOWN[pair]


@every_pair
def test_twins_have_the_same_syntax_tree(pair):
    assert other_trees(*map(SCRIPTS.get, pair)) <= EXEMPT[pair].keys() | OWN.get(pair, {}).keys()


@every_pair
def test_so_many_definitions_are_shared(pair):
    one, two = map(functions, pair)
    assert len(one & two) == SHARED[pair]
    assert one & two == {name.partition(".")[0] for name in shared(*map(SCRIPTS.get, pair))} & (one | two)


def test_stage_2_has_more_options_and_no_other_members_than_stage_1():
    one, two = (pieces(SCRIPTS[name]).keys() for name in TWINS)
    assert {f"BPETokenizer.{name.partition('.')[2]}" for name in one - two} <= two  # the methods that the twins call
    classes = {name.partition(".")[0] for name in one & two if "." in name}
    assert {"Config", "GPTLanguageModel", "Block", "Muon", "Dropout", "SIZES", "RECIPES"} < classes
    assert {name.partition(".")[0] for name in two - one if "." in name} & classes == {"Config"}
    for name in ("SHAPE", "UNINHERITED"):
        assert set(getattr(gpt, name)) < set(getattr(gpt_tiktoken, name))


# --------------------------------------------------------------------------------------- a test of the comparison
OTHER = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "/", "%": "/", "**": "*", "@": "*", "|": "&", "&": "|", "+=": "-=",
         "-=": "+=", "*=": "+=", "|=": "&=", "<": "<=", ">": ">=", "<=": "<", ">=": ">", "==": "!=", "!=": "==", "and": "or",
         "or": "and", "not": ""}
CODE = {"operator", "number", "string", "name", "statement", "docstring"}  # what changes the syntax tree


def own_names(lines, nodes):
    """Where each definition's own name stands, (line, first column, last column): to change it is another matter."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, *re.compile(r"(?:def|class) (\w+)").search(lines[node.lineno - 1], node.col_offset).span(1)
            if isinstance(node, ast.ClassDef):
                yield from own_names(lines, node.body)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            for part in (getattr(node, "target", None) or node.targets[0], *keys):
                yield part.lineno, part.col_offset, part.end_col_offset
        elif not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):  # its first line is its name
            last = node.test.end_lineno if isinstance(node, ast.If) else node.end_lineno
            yield from ((line, 0, 999) for line in range(node.lineno, last + 1))


@functools.cache
def mutants(source):
    """All that can be changed in each definition: name -> kind -> [(first line, column, last line, column, new text)]."""
    lines, tree = source.splitlines(), parsed(source)
    owner = {number: name for name, numbers in places(source).items() for number in numbers}
    found = {name: defaultdict(list) for name in places(source)}
    skipped = defaultdict(list)
    for line, first, last in own_names(lines, tree.body):
        skipped[line].append(range(first, last))
    before = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, where = token.type, token.string, (*token.start, *token.end)
        line_begins = before is None or before.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        operand = before and (before.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING) or before.string in (")", "]"))
        if kind not in (tokenize.NL, tokenize.COMMENT):
            before = token
        if token.start[0] not in owner or any(token.start[1] in columns for columns in skipped[token.start[0]]):
            continue
        kinds = found[owner[token.start[0]]]
        if kind == tokenize.COMMENT:
            kinds["comment"].append((*where, f"{text}~"))
        elif kind == tokenize.NEWLINE:
            kinds["new comment"].append((*token.start, *token.start, "  # new"))
        elif kind == tokenize.NUMBER:
            kinds["number"].append((*where, "1" if text == "0" else f"{text}1"))
        elif kind == tokenize.STRING or kind == getattr(tokenize, "FSTRING_MIDDLE", None):
            quotes = re.match("[A-Za-z]*(\"\"\"|\"|')", text) if kind == tokenize.STRING else None
            inside = quotes.end() if quotes else 0
            kinds["docstring" if line_begins else "string"].append((*where, f"{text[:inside]}~{text[inside:]}"))
        elif text in OTHER and (operand or text == "not"):
            kinds["operator"].append((*where, OTHER[text]))
        elif kind == tokenize.NAME and not keyword.iskeyword(text):
            kinds["name"].append((*where, f"{text}_"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for part in (part for child in ast.walk(node) for part in (getattr(child, name, ()) for name in (
                "body", "orelse", "finalbody")) if isinstance(part, list)):
            for statement in part:
                first = min([statement.lineno, *(word.lineno for word in getattr(statement, "decorator_list", ()))])
                line, column = lines[statement.lineno - 1], statement.col_offset
                if not isinstance(statement, ast.Pass) and not line[column:].startswith("elif"):
                    edit = first, column, statement.end_lineno, len(lines[statement.end_lineno - 1]), "pass"
                    kinds = found[owner[first]]
                    if edit not in kinds["statement"]:  # of a function inside a function
                        kinds["statement"].append(edit)
    return found


def changed(source, edits):
    """The source with these edits, which do not overlap."""
    lines = source.splitlines(keepends=True)
    for first, column, last, end, new in sorted(edits, reverse=True):
        lines[first - 1:last] = [lines[first - 1][:column] + new + lines[last - 1][end:]]
    return "".join(lines)


def some(places, count):
    """At most this many of them, from first to last."""
    count = min(count, len(places))
    return [places[i * (len(places) - 1) // max(1, count - 1)] for i in range(count)]


def all_are_caught(pair, side, count):
    """Change `count` places of each kind in each definition that a pair shares, in one of its scripts alone; how many mutants.

    One place of every definition is changed at a time: exactly these definitions must be found.
    """
    sources = [SCRIPTS[name] for name in pair]
    chosen = {name: [(kind, edit) for kind, edits in mutants(sources[side])[name].items() for edit in some(edits, count)]
              for name in shared(*sources) if name not in EXEMPT[pair]}
    mutated = list(sources)
    for number in range(max(map(len, chosen.values()), default=0)):
        changes = {name: places[number] for name, places in chosen.items() if number < len(places)}
        mutated[side] = changed(sources[side], [edit for _, edit in changes.values()])
        assert complaints(pair, *mutated) == changes.keys() | KNOWN[pair], changes
        code = {name for name, (kind, _) in changes.items() if kind in CODE}
        assert code & trees(sources[side]).keys() <= other_trees(*mutated), changes
    return {name: len(places) for name, places in chosen.items() if places}


@every_pair
def test_every_mutant_is_caught(pair, count=3):
    for side in (0, 1):
        caught = all_are_caught(pair, side, count)
        few = [name for name, number in caught.items() if number < 3]
        print(f"\n{pair[side]} changed, {pair[1 - side]} not: {len(caught)} definitions, {sum(caught.values())} mutants, all "
              f"caught; fewer than three of: {', '.join(few) or 'none'}", end="")
        assert all(len(list(itertools.chain(*mutants(SCRIPTS[pair[side]])[name].values()))) == caught[name] for name in few)
        assert pair != TWINS or len(caught) > 100 and sum(caught.values()) > 1000


@pytest.mark.slow
def test_every_mutant_of_the_twins_is_caught():
    test_every_mutant_is_caught(TWINS, count=10**6)


@pytest.mark.parametrize("side", [0, 1])
def test_a_definition_that_has_another_name_on_one_side_is_found(side):
    sources = [SCRIPTS[name] for name in TWINS]
    names = functions("gpt") & functions("gpt_tiktoken")
    sources[side] = re.sub(rf"^(def|class) ({'|'.join(names)})\b", r"\1 \2_", sources[side], flags=re.MULTILINE)
    found = {name.partition(".")[0] for name in complaints(TWINS, *sources)}
    assert {f"{name}_" if side == 0 else name for name in names} <= found


def test_a_definition_that_moved_is_found():
    one, two = (SCRIPTS[name] for name in TWINS)
    for first, second in (("draw_token", "pick_device"), ("Muon.__init__", "Muon.step")):
        texts = pieces(two)[first], pieces(two)[second]
        swapped = two.replace(texts[0], "<here>").replace(texts[1], texts[0]).replace("<here>", texts[1])
        assert complaints(TWINS, one, swapped) - KNOWN[TWINS] == {"the order"}


@every_pair
def test_an_exemption_that_is_not_needed_is_found(pair):
    one, two = map(SCRIPTS.get, pair)
    exempt, own = EXEMPT[pair], OWN.get(pair, {})
    for name, texts in some(list(differences(one, two).items()), 10):
        if texts[1] and two.count(texts[1]) == 1:
            assert name in complaints(pair, one, two.replace(texts[1], texts[0]))  # both are equal again
        fewer = [{pair: {other: reason for other, reason in table.items() if other != name}} for table in (exempt, own)]
        assert name in complaints(pair, one, two, *fewer)
    for name in ("rotate", "no_such_name", "BPETokenizer", "CharTokenizer.encode"):  # equal, in neither, in one only
        for tables in (({pair: exempt | {name: "?"}}, OWN), (EXEMPT, {pair: own | {name: ("?", "", "")}})):
            assert complaints(pair, one, two, *tables) - KNOWN[pair] == {name}
    for name, (reason, *lines) in own.items():  # a line that is not there
        assert name in complaints(pair, one, two, EXEMPT, {pair: own | {name: (reason, lines[0], lines[1] + "\npass")}})


# ------------------------------------------------------------------------------------------- the same behaviour
@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


both_recipes = pytest.mark.parametrize("recipe", ["modern", "classic"])
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, dropout=0.0)


def models(recipe, vocab_size=50, seed=7, **shape):
    """Both scripts' models of one configuration and seed."""
    for stage in (gpt, gpt_tiktoken):
        torch.manual_seed(seed)
        yield stage.GPTLanguageModel(stage.make_config(SHAPE | shape | dict(recipe=recipe), torch.device("cpu")), vocab_size)


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
    one, two = models(recipe, vocab_size, recall="", n_layer=1, n_head=1, n_embd=12)
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


class Characters:
    """Stage 1's tokenizer, with the source that stage 2 writes to tokenizer.json."""

    def __init__(self, given, text, checkpoint):
        if checkpoint:
            state = {name: part for name, part in checkpoint["tokenizer"].items() if name != "source"}
            checkpoint = checkpoint | dict(tokenizer=state)
        tokenizer = gpt.make_tokenizer(given, text, checkpoint)
        self.__dict__.update(vars(tokenizer), state=tokenizer.state | dict(source="{}"))
        for name in ("encode", "stream", "count_chars", "describe"):
            setattr(self, name, getattr(tokenizer, name))


@numeric
@both_recipes
def test_the_same_text_is_learned_in_the_same_steps(recipe, tmp_path, monkeypatch):
    """Stage 2 with stage 1's tokenizer goes the same way: same losses, same files but the tokenizer's.

    Its sliced loss rounds otherwise: the weights are equal up to rounding, and a sample may differ after a tie.
    """
    (tmp_path / "songs.txt").write_text("Idzie noc, a za nią świt\nKtoś na dachu liczy zyski\n" * 20, encoding="utf-8")
    monkeypatch.setattr(gpt_tiktoken, "make_tokenizer", Characters)
    results = [stage.main([
        "--input", str(tmp_path / "songs.txt"), "--run_dir", str(tmp_path / stage.__name__), "--recipe", recipe,
        "--n_layer", "2", "--n_embd", "16", "--n_head", "2", "--block_size", "16", "--batch_size", "4", "--dropout", "0.1",
        "--grow", "1", "--max_iters", "12", "--eval_interval", "4", "--sample_interval", "0", "--grad_accum", "2",
        "--weight_decay", "0.1", "--device", "cpu", "--dtype", "float32", "--temperature", "0", "--max_new_tokens", "60",
        "--recall", "3,5" if recipe == "modern" else ""])
        for stage in (gpt, gpt_tiktoken)]
    assert results[0]["val_bpc"] == pytest.approx(results[1]["val_bpc"], rel=1e-4)
    assert results[0].keys() == results[1].keys() and results[0]["params"] == results[1]["params"]
    runs = [tmp_path / stage.__name__ for stage in (gpt, gpt_tiktoken)]
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in runs]
    assert files[0] | {"tokenizer.json"} == files[1]
    one, two = (torch.load(run / "model_last.pt", weights_only=True) for run in runs)
    assert one.keys() == two.keys() and one["context"] == two["context"] and one["config"].keys() < two["config"].keys()
    for name, p in one["model"].items():
        assert (p - two["model"][name]).norm() <= 1e-3 * p.norm(), name  # AdamW divides rounding by gradients near zero
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4) and a["iter"] == b["iter"]
        assert a["learning_rate"] == b["learning_rate"] and a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
    assert one["history"][-1]["val_loss"] < one["history"][0]["val_loss"]
