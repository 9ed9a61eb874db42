"""Compares runs of the three stages on the same text: what each model costs, and how its text differs from the real one.

    python tools/compare_stages.py assets/char_model assets/tiktoken_model assets/hf_model
    python tools/compare_stages.py --run --input assets/input/input2.txt --minutes 3   # trains them all first
    python tools/compare_stages.py --run --polish FOLDER --hf MODEL    # with a Polish tokenizer, and stage 3

Writes comparison.md and comparison.png to assets/results (--out), and in a folder for each run its metrics, plot and
samples. Each run's best model writes 5 samples of 1,000 characters, kept in RUN_DIR/samples: as long as the run stays
the same, a second call needs no model. --run trains each model in --runs/NAME for about --minutes of training steps
(evaluations come on top), stages 1 and 2 for at most as many passes over the text as they make by default: a longer
plan memorizes it. It skips what is finished; stopped or killed, the same command continues. morfeusz2
(requirements-dev.txt) tells real words; without it that measure is left out.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import math
import shutil
import statistics
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus_report as corpus  # noqa: E402

SAMPLES, LENGTH = 5, 1000  # texts that each model writes, characters of each
RUN = 8  # words in a row that count as copied
SCRIPTS = {"char": "gpt", "bpe": "gpt_tiktoken", "hf": "gpt_hf"}  # stage -> script
SEPARATOR = "\n<|endoftext|>\n"  # between two songs; inside the scripts it is a zero byte

COSTS = {  # what a run's metrics.json says: name -> heading, format
    "params": ("parameters", ",.0f"), "vocab_size": ("vocabulary", ",.0f"), "chars_per_token": ("chars/token", ".2f"),
    "tokens_per_vocab_entry": ("training tokens per entry", ",.1f"), "val_bpc": ("val bits/char", ".3f"),
    "iters": ("steps", ",.0f"), "epochs": ("epochs", ".1f"), "best_iter": ("best at", ",.0f"), "seconds": ("seconds", ",.0f"),
    "tokens_per_second": ("tokens/s", ",.0f"), "chars_per_second": ("chars/s", ",.0f"), "device": ("device", "")}
TEXTS = {  # what is measured on a text
    "real": ("real words, %", ".1f"), "unseen": ("words not in the training text, %", ".1f"),
    "rhyming": ("rhyming lines, %", ".1f"), "syllables": ("syllables per line: distance", ".2f"),
    "characters": ("characters per line: distance", ".2f"), "distinct": ("distinct lines, %", ".1f"),
    "copied": (f"copied runs of {RUN} words, %", ".1f"), "longest": ("longest copied run, words", ".0f")}
LABELS = COSTS | TEXTS

BPE = ("syllables", "small", "middle", "full", "polish")  # kinds of stage 2, see kinds()
CLAIMS = (  # claim, kind it speaks of, kinds it compares with, measures: +1 if it says more, -1 if it says less
    ("Characters master the texture of lines", "char", BPE, {"syllables": -1, "characters": -1}),
    ("Characters master rhyme endings", "char", BPE, {"rhyming": 1}),
    ("On one text, characters guess better than any sub-words", "char", BPE, {"val_bpc": -1}),
    ("50,000 entries starve", "full", ("char", "small", "middle"), {"tokens_per_vocab_entry": -1, "val_bpc": 1}),
    ("A small vocabulary (2k) fragments words", "small", ("full",), {"chars_per_token": -1, "real": -1}),
    ("A Polish tokenizer keeps words whole", "polish", ("small", "middle", "full"), {"chars_per_token": 1, "real": 1}),
    ("Transfer brings meaning (here: real words and a better guess)", "hf", ("char", *BPE), {"val_bpc": -1, "real": 1}),
    ("4 epochs of fine-tuning speak prose, 50 copy", "hf, long", ("hf, short",), {"copied": 1, "syllables": -1}))
BPC_MARGIN = 0.02  # bits per character that are called no difference
NOTE = f"""Measured on {SAMPLES} samples of {LENGTH:,} characters that each run's best model wrote with its script's own
sampling settings, and on as many evenly spaced excerpts of the validation text. *Real words*: known to Morfeusz2. *Rhyming*:
with one of the two lines before or after. *Distance*: Wasserstein-1, from the training text's lines; 0 is alike. *Copied*:
stands in the training text, whatever case and punctuation. ±: standard error over the samples. A claim is *too close* to
call within two of them, or within {BPC_MARGIN} bits per character."""
TRAINING = {  # what --run trains: name -> options of gpt.py or gpt_tiktoken.py
    "char": {}, **{f"custom_{name}": dict(tokenizer="custom", vocab_size=size)
                   for name, size in (("500", 500), ("2k", 2000), ("5k", 5000))},
    "gpt2": dict(tokenizer="tiktoken"), "gpt2_pruned": dict(tokenizer="tiktoken", prune_vocab=True)}


# --- measures -----------------------------------------------------------------------------------------------
@cache
def running_words(text: str) -> list[str]:
    """The lower-cased words of the lines, in their order. Example: `running_words("Raz,\\nDwa!")` is `["raz", "dwa"]`."""
    return [word.lower() for line in corpus.all_lines(text) for word in corpus.words(line)]


def unseen_words_share(text: str, training: str) -> float:
    """The share (0 to 1) of running words that do not stand in the training text: invented, or only new. Example:
    >>> unseen_words_share("Noc nad klałkami, noc", "Noc minęła nad miastem")
    0.25
    """
    seen, ours = set(running_words(training)), running_words(text)
    return sum(word not in seen for word in ours) / max(1, len(ours))


def copied(text: str, training: str, length: int = RUN) -> tuple[float, int]:
    """What stage 3 calls its copy rate: the share (0 to 1) of runs of `length` words that stand in the training text, 0 if
    the text is too short for one; and the words in the longest run that does. Whatever case and marks; no run joins two
    songs. Of three runs of two words, `szara noc` and `noc nad` are copied here, `nad wodą` is not:
    >>> copied("Szara noc\\nnad wodą", "Była szara noc, nad miastem cisza", length=2)
    (0.6666666666666666, 3)
    """
    import gpt_hf  # here, as it takes seconds to import
    rate, longest = gpt_hf.copy_rate(corpus.split_songs(text), gpt_hf.END.join(corpus.split_songs(training)), length)
    return rate or 0.0, longest


def wasserstein(ours: list[int], theirs: list[int]) -> float:
    """The Wasserstein-1 distance of two distributions: the area between their cumulative shares, which is how far a line
    has to grow or shrink on average for one to become the other. Here, half of the lines by two:
    >>> wasserstein([7, 7], [7, 9])
    1.0
    """
    ours, theirs = sorted(ours), sorted(theirs)
    return sum((high - low) * abs(bisect_right(ours, low) / len(ours) - bisect_right(theirs, low) / len(theirs))
               for low, high in itertools.pairwise(sorted({*ours, *theirs})))


@cache
def line_lengths(text: str) -> tuple[list[int], list[int]]:
    """The syllables and the characters of each line. Example: `line_lengths("Szara noc")` is `([3], [9])`."""
    lines = corpus.all_lines(text) or [""]
    return [corpus.syllables(line) for line in lines], [len(line) for line in lines]


def measure(text: str, training: str) -> dict[str, float | None]:
    """All measures of a text beside the training text, by their names in TEXTS; None for what can't be had here."""
    real = 100 * corpus.known_words_share(text) if importlib.util.find_spec("morfeusz2") else None
    (ours, our_chars), (theirs, their_chars) = line_lengths(text), line_lengths(training)
    rate, longest = copied(text, training)
    return dict(
        real=real, unseen=100 * unseen_words_share(text, training), rhyming=100 * corpus.rhyming_share(text),
        syllables=wasserstein(ours, theirs), characters=wasserstein(our_chars, their_chars),
        distinct=100 * corpus.distinct_share(corpus.all_lines(text)), copied=100 * rate, longest=longest)


def measure_samples(texts: list[str], training: str) -> tuple[dict, dict]:
    """(the measures of all samples together, their standard errors: how far chance moves them, from sample to sample)."""
    each = [measure(text, training) for text in texts]
    errors = {name: statistics.stdev(one[name] for one in each) / math.sqrt(len(each))
              for name in TEXTS if len(each) > 1 and each[0][name] is not None}
    return measure(corpus.join_songs(texts), training), errors


def excerpts(text: str, count: int, length: int) -> list[str]:
    """Evenly spaced parts, from a line's start on. Example: `excerpts("raz\\ndwa\\ntrzy\\n", 2, 4)`: `["raz\\n", "dwa\\n"]`."""
    step = len(text) // count
    return [corpus.cut(text[text.rfind("\n", 0, i * step) + 1:], min(length, step)) for i in range(count)]


# --- runs ---------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A finished run, or with stage "" the validation text as the yardstick."""
    name: str
    folder: Path | None = None
    stage: str = ""
    options: dict = field(default_factory=dict)
    sha256: str = ""
    values: dict = field(default_factory=dict)  # metrics and measures by their names in LABELS
    errors: dict = field(default_factory=dict)  # standard errors of the measures
    texts: list = field(default_factory=list)


def read_json(path: Path) -> dict:
    """What a JSON file holds; {} if it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_setup(folder: Path) -> dict:
    """The options that a run was given, and its text's checksum; {} if the folder holds no run.

    A model folder of Hugging Face has a config.json, too: another one.
    """
    setup = read_json(folder / "config.json")
    return setup if {"options", "corpus_sha256"} <= setup.keys() else {}


def read_run(folder: str) -> Run:
    """The run in a folder; one that is not there, or not finished, exits 2."""
    path = Path(folder)
    metrics, setup = read_json(path / "metrics.json"), read_setup(path)
    if metrics.get("stage") not in SCRIPTS or not setup:
        corpus.fail(f"{folder} holds no finished run (metrics.json beside config.json): train it, or name another")
    metrics.setdefault("chars_per_second", metrics["tokens_per_second"] * metrics["chars_per_token"])
    metrics.setdefault("epochs", metrics["tokens_per_second"] * metrics["seconds"] / (  # stage 3 says it itself
        metrics["tokens_per_vocab_entry"] * metrics["vocab_size"]))
    metrics["device"] = f"{metrics['device']}, {metrics['dtype']}"
    return Run(path.resolve().name, path, metrics["stage"], setup["options"], setup["corpus_sha256"], metrics)


def read_parts(runs: list[Run], path: str) -> tuple[str, str]:
    """Training and validation part of the text that all runs learned from; another text than theirs exits 2."""
    import gpt  # here, as it takes seconds to import
    text = gpt.read_corpus(path)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if others := [run.folder for run in runs if run.sha256 != sha256]:
        corpus.fail(f"{others[0]} did not learn from {path} as it is now: compare runs of one text, and name it with --input")
    return tuple(part.replace("\0", SEPARATOR) for part in gpt.split_corpus(text))


def write(run: Run) -> Iterator[str]:
    """Samples: stages 1 and 2 through their script's own --sample_only, stage 3 as many whole songs as it takes."""
    script, tokens = importlib.import_module(SCRIPTS[run.stage]), math.ceil(LENGTH / run.values["chars_per_token"])
    tokens += tokens // 2 if run.stage == "bpe" else 0  # a weak model writes shorter tokens than those of the training text
    if run.stage == "hf":
        config, songs = script.Config(output_dir=str(run.folder), max_new_tokens=tokens), itertools.count()
        base = script.find_pretrained(str(run.folder / "model"), script.pick_device(config.device))
    for number in range(SAMPLES):
        text = ""
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            while run.stage == "hf" and len(text) < LENGTH:
                text += script.sample_text(base, config, next(songs)) + SEPARATOR
            if run.stage != "hf":
                output = Path(folder, "sample.txt")
                script.main(["--sample_only", *flags(run_dir=run.folder, output=output, max_new_tokens=tokens, seed=number)])
                text = output.read_text(encoding="utf-8")
        yield text


def samples(run: Run) -> list[str]:
    """What the run's best model writes, from RUN_DIR/samples if that is of this very run."""
    folder, sha256 = run.folder / "samples", hashlib.sha256((run.folder / "metrics.json").read_bytes()).hexdigest()
    stamp, paths = folder / "metrics.sha256", [folder / f"{number}.txt" for number in range(1, SAMPLES + 1)]
    if not all(path.exists() for path in (stamp, *paths)) or stamp.read_text() != sha256:
        print(f"{run.name}: writing {SAMPLES} samples of {LENGTH:,} characters", flush=True)
        folder.mkdir(exist_ok=True)
        stamp.unlink(missing_ok=True)
        for path, text in zip(paths, write(run)):
            path.write_text(text[:2 * LENGTH], encoding="utf-8", newline="\n")
        stamp.write_text(sha256)
    return [corpus.cut(path.read_text(encoding="utf-8"), LENGTH) for path in paths]


# --- training -----------------------------------------------------------------------------------------------
def flags(**options) -> list[str]:
    """Options as a command line has them. Example: `flags(size="tiny", resume=True)` is `["--size=tiny", "--resume"]`."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def plans(args) -> Iterator[SimpleNamespace]:
    """What --run is to train: the name, the script as a module, whether it is stage 3, folder and options."""
    known = {name: dict(options, size=args.size) for name, options in TRAINING.items()}
    if args.polish:
        known["polish"] = dict(tokenizer="polish", tokenizer_path=args.polish, size=args.size)
    known |= {name: dict(model_name=args.hf, epochs=epochs, learning_rate=args.hf_rate)
              for name, epochs in (("hf_short", 4), ("hf_long", 50)) if args.hf}
    for name, options in known.items():
        stage = "hf" if "model_name" in options else "bpe" if "tokenizer" in options else "char"
        yield SimpleNamespace(
            name=name, script=importlib.import_module(SCRIPTS[stage]), hf=stage == "hf", folder=Path(args.runs, name),
            place="output_dir" if stage == "hf" else "run_dir", options=flags(input=args.input, **options))


def call(plan, **options) -> dict:
    """The metrics that the script returns."""
    return plan.script.main([*plan.options, *flags(**options)])


def probe(plan) -> tuple[float, float]:
    """(seconds a training step takes here, steps that make the passes over the text which the script would make itself).

    By a short run in a folder that is thrown away. Rows grow there, too: the mean of all but the first steps.
    """
    short = dict(max_iters=60, eval_interval=4, eval_iters=1, sample_interval=0)
    if plan.hf:
        short = dict(max_steps=3, num_samples=1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        metrics = call(plan, **{plan.place: f"{folder}/run"}, **short, max_new_tokens=1)
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before, last = (json.loads(lines[i]) for i in (-2 if plan.hf else 1, -1))
    seconds = (last["seconds"] - before["seconds"]) / (last["iter"] - before["iter"])
    if plan.hf:  # its --epochs limit it
        return seconds, math.inf
    tokens = metrics["tokens_per_vocab_entry"] * metrics["vocab_size"]
    return seconds, plan.script.EPOCHS * tokens / (metrics["tokens_per_second"] * metrics["seconds"] / metrics["iters"])


def train(plan, minutes: float) -> list[str]:
    """Train for about that many minutes, or continue a run that was stopped. The folder; [] if the model can't be had here."""
    metrics, options = read_json(plan.folder / "metrics.json"), read_setup(plan.folder).get("options", {})
    started = bool(options) if plan.hf else (plan.folder / "model_last.pt").exists()
    try:
        if "copy_rate" in metrics or metrics.get("iters", -1) >= options.get("max_iters", math.inf):
            print(f"{plan.name}: finished before", flush=True)  # stage 3 writes its copy rate when all is done
        elif started:
            print(f"{plan.name}: continued", flush=True)
            limits = dict(max_steps=options["max_steps"]) if plan.hf else {}  # as --epochs would plan them anew
            call(plan, **{plan.place: plan.folder}, resume=True, **limits)
        else:
            seconds, most = probe(plan)
            steps = max(1, int(60 * minutes / seconds))
            print(f"{plan.name}: {minutes:g} minutes are about {steps:,} steps" + (
                f"; {most:,.0f} are enough passes over the text" if most < steps else ""), flush=True)
            steps = steps if steps <= most else max(1, round(most))
            limits = dict(max_steps=steps) if plan.hf else dict(max_iters=steps, eval_interval=math.ceil(steps / 10),
                                                                sample_interval=0, patience=0)
            call(plan, **{plan.place: plan.folder}, **limits)
    except SystemExit as end:
        if end.code != 2:
            print("the same command continues from here", flush=True)
            raise
        print(f"{plan.name}: left out, for the reason above", flush=True)
        return []
    return [str(plan.folder)]


# --- claims -------------------------------------------------------------------------------------------------
def kinds(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs by what the claims call them, the best first. Up to 1,000 entries: syllables; to 3,000: small; 40,000: full."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.values["val_bpc"] or math.inf):
        size = run.values["vocab_size"]
        kind = "polish" if run.options.get("tokenizer") == "polish" else (
            "syllables" if size <= 1000 else "small" if size <= 3000 else "full" if size >= 40_000 else "middle")
        groups.setdefault(run.stage if run.stage != "bpe" else kind, []).append(run)
    tuned = sorted(groups.get("hf", []), key=lambda run: run.values["epochs"])
    if tuned and tuned[-1].values["epochs"] >= 2 * tuned[0].values["epochs"]:
        groups |= {"hf, short": tuned[:1], "hf, long": tuned[-1:]}
    return groups


def judge(ours: Run, others: list[Run], name: str, sign: int) -> tuple[str, str]:
    """(verdict, figures) of one measure: has ours more (sign +1) or less (-1) of it than every other run, by more than
    chance, which is two standard errors of the samples, or BPC_MARGIN? 3.1 "more" than 2.5 and 2.7: 2.7 is what counts."""
    others = [run for run in others if run.values.get(name) is not None]
    if not others or ours.values.get(name) is None:
        return "", ""
    rival = max(others, key=lambda run: sign * run.values[name])
    lead = sign * (ours.values[name] - rival.values[name])
    margin = BPC_MARGIN if name == "val_bpc" else 2 * math.hypot(*(run.errors.get(name, 0) for run in (ours, rival)))
    verdict = "holds" if lead > margin else "falls" if lead < -margin else "too close"
    return verdict, f"{LABELS[name][0]}: {ours.name} {cell(ours, name)}, {rival.name} {cell(rival, name)}"


def claims(runs: list[Run]) -> list[list[str]]:
    """Each claim with its verdict (falls if any of its measures does, holds if all do) and the figures."""
    groups, rows = kinds(runs), []
    for claim, subject, rivals, measures in CLAIMS:
        ours, others = groups.get(subject, [])[:1], [run for kind in rivals for run in groups.get(kind, [])]
        judged = [judge(ours[0], others, name, sign) for name, sign in measures.items()] if ours else []
        verdict = next((v for v in ("falls", "too close", "holds") if v in dict(judged)), "not tested")
        rows.append([claim, verdict, "; ".join(figures for _, figures in judged if figures) or "no such runs"])
    return rows


# --- report -------------------------------------------------------------------------------------------------
def cell(run: Run, name: str) -> str:
    """A figure as the tables show it, a share with its standard error; – where there is none. Example:
    >>> cell(Run("", values={"real": 93.21}, errors={"real": 0.84}), "real"), cell(Run(""), "val_bpc")
    ('93.2 ± 0.8', '–')
    """
    value, error, how = run.values.get(name), run.errors.get(name), LABELS[name][1]
    if value is None:
        return "–"
    return f"{value:{how}}" + (f" ± {error:{how}}" if error is not None and name in ("real", "rhyming", "copied") else "")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, figures stand on the right."""
    lines = [heads, ["---"] + ["---:" if heads[1] != "verdict" else "---"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(runs: list[Run], yardstick: Run, text: str) -> str:
    """The report: costs, texts, claims, and the beginning of a sample of each run."""
    costs = [[run.name, *(cell(run, name) for name in COSTS)] for run in runs]
    texts = [[run.name, *(cell(run, name) for name in TEXTS)] for run in [*runs, yardstick]]
    parts = ["# Comparison", f"All runs learned from `{text}` and are validated on the same part of it.",
             table(["run", *(head for head, _ in COSTS.values())], costs), "## What they write",
             table(["text", *(head for head, _ in TEXTS.values())], texts), NOTE,
             "![bits per character; real words and copied runs](comparison.png)",
             "## Claims", table(["claim", "verdict", "figures"], claims(runs)), "## Samples"]
    for run in [*runs, yardstick]:
        start = corpus.cut("\n".join(corpus.all_lines(run.texts[0])[:8]), 400)
        parts.append(f"**{run.name}**\n\n```text\n{start.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def draw(runs: list[Run], path: Path):
    """Bars of bits per character, and beside them of real words and copied runs. Colours of Okabe and Ito."""
    from matplotlib.figure import Figure  # here, as it takes a second to import
    figure = Figure(figsize=(10, 1.6 + 0.55 * len(runs)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_yticks(range(len(runs)), [run.name for run in runs])
    left.invert_yaxis()
    for axes, name, color, height, shift in ((left, "val_bpc", "#0072B2", 0.7, 0), (right, "real", "#009E73", 0.35, -0.18),
                                             (right, "copied", "#D55E00", 0.35, 0.18)):
        shown = {i + shift: run.values[name] for i, run in enumerate(runs) if run.values.get(name) is not None}
        bars = axes.barh(list(shown), list(shown.values()), height, color=color, label=LABELS[name][0])
        axes.bar_label(bars, [f"{value:{LABELS[name][1]}}" for value in shown.values()], padding=3)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="bits per character on the validation text (less is better)")
    right.set(xlabel="%, in what they write")
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


# --- main ---------------------------------------------------------------------------------------------------
def parse_args(argv):
    """The options; a mistake exits 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: corpus.fail(f"{message}; see --help")
    parser.add_argument("folders", nargs="*", metavar="RUN_DIR", help="finished runs of any stage")
    for name, default, help in (
            ("input", "", "the text (default: the first run's; with --run: the sample corpus)"),
            ("out", "assets/results", "folder for the report (default: %(default)s)"),
            ("runs", "assets/runs", "folder that --run trains in (default: %(default)s)"),
            ("minutes", 3.0, "training time of each model (default: %(default)s)"),
            ("size", "auto", "auto, tiny or base: of the models made from scratch"),
            ("polish", "", "also train on the Polish tokenizer in this file or folder"),
            ("hf", "", "also fine-tune this model: a Hub name or a folder; 4 epochs, and 50 or what the minutes allow"),
            ("hf_rate", 1e-4, "learning rate of the fine-tuning (default: %(default)s)")):
        parser.add_argument(f"--{name}", default=default, type=type(default), help=help)
    parser.add_argument("--run", action="store_true", help="train the models first")
    args = parser.parse_args(argv)
    if not (args.run or args.folders) or not 0 < args.minutes < math.inf:
        corpus.fail("name run folders to compare, or train some with --run and --minutes above 0")
    return args


def compare(args) -> list[Run]:
    """Write the report; the runs with all their figures, the validation text last."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    args.input = args.input or "assets/input/input2.txt" * args.run
    for plan in plans(args) if args.run else ():
        args.folders += train(plan, args.minutes)
    runs = [read_run(folder) for folder in args.folders]
    if not runs:
        corpus.fail("no model could be trained")
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder)) for run in runs]
    args.input = args.input or runs[0].options["input"]
    training, validation = read_parts(runs, args.input)
    yardstick = Run("validation text", texts=excerpts(validation, SAMPLES, LENGTH))
    for run in [*runs, yardstick]:
        run.texts = run.texts or samples(run)
        measures, run.errors = measure_samples(run.texts, training)
        run.values |= measures
    report = markdown(runs, yardstick, Path(args.input).name)
    (out / "comparison.md").write_text(report, encoding="utf-8", newline="\n")
    draw([*runs, yardstick], out / "comparison.png")
    for run in runs:
        folder = out / run.name.replace("/", "_")  # a path, where two runs have one name
        folder.mkdir(exist_ok=True)
        for name in ("metrics.json", "loss.png"):
            shutil.copy(run.folder / name, folder)
        (folder / "samples.txt").write_text(SEPARATOR.join(run.texts), encoding="utf-8", newline="\n")
    print(f"-> {out / 'comparison.md'}, {out / 'comparison.png'}")
    return [*runs, yardstick]


def main(argv: list[str] | None = None) -> list[Run]:
    """Run with these arguments, by default the command line's; see compare(). Exits 2 on bad input."""
    try:
        return compare(parse_args(argv))
    except OSError as reason:
        corpus.fail(f"{reason.filename}: {reason.strerror}; choose another --out")
    except tuple(sys.modules[name].Stop for name in SCRIPTS.values() if name in sys.modules) as reason:
        corpus.fail(reason.args[0])
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
