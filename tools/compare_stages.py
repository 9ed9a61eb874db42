"""Compares runs of the three stages on the same text: what each model costs, and how its text differs from the real one.

    python tools/compare_stages.py assets/char_model assets/tiktoken_model assets/hf_model
    python tools/compare_stages.py --run --input assets/input/input2.txt --minutes 3   # trains them all first
    python tools/compare_stages.py --run --polish FOLDER --hf MODEL    # with a Polish tokenizer, and stage 3

Writes comparison.md and three pictures to assets/results (--out), and in a folder for each run its metrics, plot and
some of its samples. Each run's best model writes 64 texts (--texts) of 2,000 characters, about a song, in batches,
each from the start of a song. They are kept in RUN_DIR/samples.json: while the run is unchanged, a second call needs
no model. --run trains each model in --runs/NAME for about --minutes of training steps (evaluations are extra), stages
1 and 2 for at most as many passes over the text as they make by default, as a longer run memorizes it; the long
fine-tuning may take five times as long. Finished runs are skipped; after a stop or a kill, the same command
continues. --readme FILE puts the new tables and samples between the marks <!-- NAME --> and <!-- /NAME --> of a file.
morfeusz2 and pyppmd (requirements-dev.txt) recognize real words and give a yardstick; without them both are left out.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus_report as corpus  # noqa: E402
import measures  # noqa: E402
import pictures  # noqa: E402
import yardsticks  # noqa: E402

LENGTH, BATCH, SHOWN = 2000, 32, 8  # characters of a text; texts that are written at a time, and that are published
DRAW = dict(temperature=0.8, top_k=0, top_p=0.95)  # how all models write: the default of stages 1 and 2
SEED, FEW = 2115, 1000  # tokens that are looked at first when one is drawn
SCRIPTS = {"char": "gpt", "bpe": "gpt_tiktoken", "hf": "gpt_hf"}  # stage -> script
SEPARATOR = "\n<|endoftext|>\n"  # between two songs; inside the scripts it is a zero byte

COSTS = {  # what a run's metrics.json says: name -> heading, format
    "params": ("parameters", ",.0f"), "vocab_size": ("vocabulary", ",.0f"), "chars_per_token": ("chars/token", ".2f"),
    "tokens_per_vocab_entry": ("density", ",.1f"), "val_bpc": ("bits/char", ".3f"),
    "iters": ("steps", ",.0f"), "epochs": ("epochs", ".1f"), "best_iter": ("best at", ",.0f"), "seconds": ("seconds", ",.0f"),
    "tokens_per_second": ("tokens/s", ",.0f"), "chars_per_second": ("chars/s", ",.0f"), "device": ("device", "")}
REFRAINS = {  # what the stages say of the validation text
    "refrain_share": ("repeated lines in the validation text, share", ".3f"), "refrain_bpc": ("bits/char in them", ".3f"),
    "other_bpc": ("bits/char elsewhere", ".3f")}
CHANCE = {"rhyming_chance": ("shuffled", ".1f"), "assonance_chance": ("shuffled", ".1f"),
          "longest": ("longest copied run, words", ".0f")}
LABELS = COSTS | REFRAINS | CHANCE | measures.MEASURES
SHORT = ("tokens_per_vocab_entry", "val_bpc", "real", "rhyming")  # the README's columns

BPE = ("syllables", "small", "middle", "full", "polish")  # kinds of stage 2, see kinds()
CLAIMS = (  # claim, kind it speaks of, kinds it compares with, measures: +1 if it says more, -1 if it says less
    ("Characters master the texture of lines", "char", BPE, {"syllable_distance": -1, "char_distance": -1}),
    ("Characters master rhyme endings", "char", BPE, {"rhyming": 1}),
    ("On one text, characters guess better than any sub-words", "char", BPE, {"val_bpc": -1}),
    ("50,000 entries starve", "full", ("char", "small", "middle"), {"tokens_per_vocab_entry": -1, "val_bpc": 1}),
    ("A small vocabulary (2k) fragments words", "small", ("full",), {"chars_per_token": -1, "real": -1}),
    ("A Polish tokenizer keeps words whole", "polish", ("small", "middle", "full"), {"chars_per_token": 1, "real": 1}),
    ("Transfer brings meaning (here: real words and a better guess)", "hf", ("char", *BPE), {"val_bpc": -1, "real": 1}),
    ("A few epochs of fine-tuning speak prose, many copy", "hf, long", ("hf, short",),
     {"copied": 1, "syllable_distance": -1}))
# The smallest lead that supports a claim. A lead that is surely smaller does not.
WORTH = dict(real=1.0, rhyming=1.0, copied=1.0, syllable_distance=0.1, char_distance=0.3)
BPC_NOISE = 0.02  # bits per character by which runs with different seeds differ
NOTES = f"""**How it was measured.** Each run's best model (*last*: its last one) wrote {{texts}} texts of {LENGTH:,}
characters, each from the start of a song, with temperature {DRAW["temperature"]} and top-p {DRAW["top_p"]}; the
validation text is cut into pieces of that length. In parentheses: 95 % bootstrap intervals over the texts. *Density*:
how often an entry of the vocabulary is seen in a pass over the training text, on average. *Bits/char*: bits per
character of the validation text, lower is better. *Real words*: known to Morfeusz2. *Rhyming*: with a line at most
four before or after it, from the vowel before the last one on; *assonance*: the last two vowels. *Shuffled*: the same
lines in random order, which is chance. *Syllables between neighbours*: by how many two lines that follow each other
in a verse differ. *Distance*: Wasserstein-1, from the training text's lines; 0 is alike. *Repeated*: the line occurs
earlier in the same song. *Copied*: occurs in the training text, ignoring case and punctuation. *Letters by bigrams*:
each letter drawn by the one before it."""
YARDSTICKS = """**Yardsticks.** Kneser-Ney counts which character followed the last five; it does not change after the
training text, like a model. PPMd and xz compress: their figure is what the validation text adds to the size of
the training text. They keep learning from the validation text while they read it, which a trained model may not."""
VERDICTS = """A claim *holds* if the whole interval of each lead, over the strongest rival, lies above zero; it *does not hold*
if one lies below what is worth a claim ({}); else it is *undecided*, with the number of texts that would decide it. Bits per
character have no texts: there a lead must exceed {} bits, by which seeds differ."""
TRAINING = {  # what --run trains: name -> options of gpt.py or gpt_tiktoken.py
    "char": {}, **{f"custom_{name}": dict(tokenizer="custom", vocab_size=size)
                   for name, size in (("500", 500), ("2k", 2000), ("5k", 5000))},
    "gpt2": dict(tokenizer="tiktoken"), "gpt2_pruned": dict(tokenizer="tiktoken", prune_vocab=True)}
TUNING = {"hf_short": (4, 1), "hf_long": (20, 5)}  # name -> epochs, times --minutes that they may take


# --- runs ---------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A finished run, or with stage "" a text to compare with, or a yardstick."""
    name: str
    folder: Path | None = None
    stage: str = ""
    options: dict = field(default_factory=dict)
    sha256: str = ""
    last: bool = False  # the last model of a fine-tuning, not the best
    values: dict = field(default_factory=dict)  # metrics and measures by their names in LABELS
    draws: dict = field(default_factory=dict)  # of the bootstrap, by the measures' names
    curve: list = field(default_factory=list)  # (characters read, bits per character)
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


def read_run(folder: str) -> list[Run]:
    """The run in a folder; if its last model is worse than its best by a tenth of a bit, that one as a second run: it
    has memorized. A missing or unfinished run exits 2."""
    path = Path(folder)
    metrics, setup = read_json(path / "metrics.json"), read_setup(path)
    training = metrics.get("stage") == "hf" and "copy_rate" not in metrics  # stage 3 writes that when all is done
    if metrics.get("stage") not in SCRIPTS or not setup or training:
        corpus.fail(f"{folder} holds no finished run (metrics.json beside config.json): train it, or name another")
    metrics.setdefault("chars_per_second", metrics["tokens_per_second"] * metrics["chars_per_token"])
    metrics.setdefault("epochs", metrics["tokens_per_second"] * metrics["seconds"] / (  # stage 3 says it itself
        metrics["tokens_per_vocab_entry"] * metrics["vocab_size"]))
    metrics["device"] = f"{metrics['device']}, {metrics['dtype']}"
    history = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    read = metrics["chars_per_second"] * metrics["seconds"] / max(1, metrics["iters"])  # characters in a step
    curve = [(record["iter"] * read, record["val_bpc"]) for record in history if record["val_bpc"] is not None]
    run = Run(path.resolve().name, path, metrics["stage"], setup["options"], setup["corpus_sha256"], values=metrics,
              curve=curve)
    worse = run.stage == "hf" and curve and curve[-1][1] > metrics["val_bpc"] + 0.1
    if not worse or not (path / f"checkpoint-{metrics['iters']}").is_dir():
        return [run]
    values = metrics | dict(val_bpc=curve[-1][1], best_iter=metrics["iters"])
    return [run, replace(run, name=f"{run.name}, last", last=True, values=values, curve=[])]


def read_parts(runs: list[Run], path: str) -> tuple[str, str]:
    """Training and validation part of the text that all runs learned from; another text than theirs exits 2."""
    import gpt  # here, as it takes seconds to import
    text = gpt.read_corpus(path)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if others := [run.folder for run in runs if run.sha256 != sha256]:
        corpus.fail(f"{others[0]} did not learn from {path} as it is now: compare runs of the text in --input")
    return gpt.split_corpus(text)


def excerpts(text: str) -> list[str]:
    """Parts of a text as long as a sample, each from the start of a song or, if there are none, of a line."""
    starts = [0, *(match.end() for match in re.finditer(re.escape(SEPARATOR), text))]
    if len(starts) < 5:
        count = max(1, len(text) // LENGTH)
        starts = [text.rfind("\n", 0, i * len(text) // count) + 1 for i in range(count)]
    kept: list[int] = []
    for start in starts:  # two may overlap by a fifth
        if not kept or start >= kept[-1] + 0.8 * LENGTH:
            kept.append(start)
    parts = [text[start:start + 2 * LENGTH] for start in kept]
    whole = [corpus.cut(part, LENGTH) for part in parts if len(corpus.flatten(part)) >= 0.8 * LENGTH]
    return whole or [corpus.cut(text, LENGTH)]


# --- what they write ----------------------------------------------------------------------------------------
@contextlib.contextmanager
def quick_draws(script):
    """Let a script draw from the FEW likeliest tokens where these make up top_p, with the same probabilities: sorting
    50,257 entries takes 8 milliseconds a row, several times as long as the model."""
    import torch
    from_all = script.draw_token

    def draw_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        if logits.size(-1) <= 2 * FEW or top_k or temperature < 1e-6:
            return from_all(logits, temperature, top_k, top_p, generator)
        logits = logits.float() / temperature  # (B, vocab_size)
        scores, order = logits.topk(FEW, dim=-1)  # (B, FEW), the likeliest first
        probs = (scores - logits.logsumexp(dim=-1, keepdim=True)).exp()  # among all
        if not (probs.sum(dim=-1) >= top_p).all():  # or nan
            return from_all(logits, 1.0, top_k, top_p, generator)
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0
        return order.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)

    script.draw_token = draw_token
    try:
        yield
    finally:
        script.draw_token = from_all


def write(run: Run, count: int) -> Iterator[str]:
    """Texts of LENGTH characters or more by stage 1 or 2, a batch of them at a time."""
    import torch
    script = importlib.import_module(SCRIPTS[run.stage])
    saved, device = script.load_checkpoint(f"{run.folder}/model_best.pt"), script.pick_device("auto")
    config, tokenizer = script.Config(**saved["config"]), script.make_tokenizer({}, "", saved)
    model = script.GPTLanguageModel(config, tokenizer.vocab_size).to(device)
    model.load_state_dict(saved["model"])
    generator = torch.Generator(device).manual_seed(SEED)
    start = tokenizer.encode(tokenizer.start).long().to(device)
    for done in range(0, count, BATCH):
        rows = min(BATCH, count - done)
        tokens, chars = [], torch.zeros(rows, dtype=torch.long)
        with quick_draws(script), script.mixed_precision("float32" if device.type == "cpu" else config.dtype, device):
            for token in script.generate(model, start.expand(rows, -1), 4 * LENGTH, saved["context"], **DRAW,
                                         generator=generator, end=tokenizer.end):
                tokens.append(token.cpu())
                chars += tokenizer.count_chars(tokens[-1])
                if chars.min() >= LENGTH:
                    break
        for ids in torch.stack(tokens, dim=1).tolist():
            yield "".join(tokenizer.stream(ids)).replace(script.END, SEPARATOR)


def write_songs(script, base, config, count: int) -> list[str]:
    """Songs by stage 3's model in one batch, one a row, each up to its end or to config.max_new_tokens.

    As in sample_text, when the context is full, its last half is read again; a finished row leaves the batch."""
    import torch
    base.model.generation_config = script.sampling_settings(config, base.end)
    songs: list[list[int]] = [[] for _ in range(count)]
    rows, ids, seen = list(range(count)), torch.full((count, 1), base.end, device=base.model.device), 1
    while rows and ids.size(1) <= config.max_new_tokens:
        seen = base.context // 2 if seen >= base.context else seen
        context = ids[:, -seen:]  # (B, T)
        room = min(config.max_new_tokens + 1 - ids.size(1), base.context - seen)
        out = base.model.generate(context, attention_mask=torch.ones_like(context), max_new_tokens=room)
        new = out[:, seen:]  # (B, new)
        seen = out.size(1)
        for row, drawn in zip(rows, new.tolist()):
            songs[row] += drawn[:drawn.index(base.end)] if base.end in drawn else drawn
        still = (new != base.end).all(dim=1)
        ids = torch.cat((ids, new), dim=1)[still]
        rows = [row for row, goes_on in zip(rows, still.tolist()) if goes_on]
    return [base.tokenizer.decode(song, clean_up_tokenization_spaces=False) for song in songs]


def write_tuned(run: Run, count: int) -> Iterator[str]:
    """Texts of LENGTH characters or more by stage 3: as many songs as it takes, without a penalty on what repeats."""
    import torch
    script = importlib.import_module(SCRIPTS["hf"])
    config = script.Config(
        output_dir=str(run.folder), max_new_tokens=math.ceil(1.2 * LENGTH / run.values["chars_per_token"]), **DRAW,
        repetition_penalty=1.0, no_repeat_ngram_size=0)
    source = run.folder / (f"checkpoint-{run.values['iters']}" if run.last else "model")
    base = script.find_pretrained(str(source), script.pick_device(config.device))
    base.model.eval()
    torch.manual_seed(SEED)
    for done in range(0, count, BATCH):
        texts: list[list[str]] = [[] for _ in range(min(BATCH, count - done))]
        with script.mixed_precision("float32" if base.model.device.type == "cpu" else config.dtype, base.model.device):
            while short := [text for text in texts if sum(len(song) + 1 for song in text) < LENGTH]:
                for text, song in zip(short, write_songs(script, base, config, len(short))):
                    text.append(song)
        yield from (SEPARATOR.join(text) for text in texts)


def samples(run: Run, count: int) -> list[str]:
    """What the run's model writes, from RUN_DIR/samples.json if that belongs to this very run."""
    path = run.folder / ("samples_last.json" if run.last else "samples.json")
    key = dict(metrics=hashlib.sha256((run.folder / "metrics.json").read_bytes()).hexdigest(), length=LENGTH, **DRAW)
    kept = read_json(path)
    if kept.get("key") != key or len(kept["texts"]) < count:
        print(f"{run.name}: writing {count} texts of {LENGTH:,} characters", flush=True)
        texts = (write_tuned if run.stage == "hf" else write)(run, count)
        kept = dict(key=key, texts=[corpus.cut(text.replace("\r", "\n"), LENGTH) for text in texts])
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(kept, ensure_ascii=False, indent=0), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    return kept["texts"][:count]


def measure(run: Run, training: str):
    """Add to a run or a text what is measured on its texts."""
    values, run.draws = measures.measure(run.texts, training)
    keys = dict(rhyming_chance=corpus.rhyme_key, assonance_chance=corpus.assonance_key)
    run.values |= values | {name: measures.by_chance(run.texts, key) for name, key in keys.items()}


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
              for name, (epochs, _) in TUNING.items() if args.hf}
    for name, options in known.items():
        stage = "hf" if "model_name" in options else "bpe" if "tokenizer" in options else "char"
        yield SimpleNamespace(
            name=name, script=importlib.import_module(SCRIPTS[stage]), hf=stage == "hf", folder=Path(args.runs, name),
            place="output_dir" if stage == "hf" else "run_dir", options=flags(input=args.input, **options))


def call(plan, **options) -> dict:
    """The metrics that the script returns."""
    return plan.script.main([*plan.options, *flags(**options)])


def probe(plan) -> tuple[float, float]:
    """(seconds a training step takes here, steps in as many passes over the text as the script makes by default).

    Measured by a short run in a temporary folder. Rows grow there, too: the mean of all but the first steps.
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
    """Train for about that many minutes, or continue a stopped run. The folder; [] if the model is unavailable."""
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
            minutes *= TUNING.get(plan.name, (0, 1))[1]
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
        groups.setdefault("hf, last" if run.last else run.stage if run.stage != "bpe" else kind, []).append(run)
    tuned = sorted(groups.get("hf", []), key=lambda run: run.values["epochs"])
    if tuned and tuned[-1].values["epochs"] >= 2 * tuned[0].values["epochs"]:
        long = [run for run in groups.get("hf, last", []) if run.folder == tuned[-1].folder]
        groups |= {"hf, short": tuned[:1], "hf, long": long or tuned[-1:]}
    return groups


def judge(ours: Run, others: list[Run], name: str, sign: int) -> tuple[str, float, str]:
    """(verdict, texts that would decide it, figures) of one measure: has ours more (sign +1) or less (-1) of it than every
    other run? The lead of 3.1 over 2.5 and 2.7 is 0.4, that over the strongest rival."""
    others = [run for run in others if run.values.get(name) is not None]
    if not others or ours.values.get(name) is None:
        return "", 0, ""
    rival = max(others, key=lambda run: sign * run.values[name])
    lead, needed = sign * (ours.values[name] - rival.values[name]), 0.0
    if name in ours.draws and name in rival.draws:
        low, high = measures.interval(sign * (ours.draws[name] - rival.draws[name]))
        verdict = "holds" if low > 0 else "does not hold" if high < WORTH[name] else "undecided"
        distances = [gap for gap in (lead, WORTH[name] - lead) if gap > 0]  # from the two bounds
        needed = len(ours.texts) * min((high - low) / 2 / gap for gap in distances) ** 2
    else:
        noise = BPC_NOISE if name == "val_bpc" else 0
        verdict = "holds" if lead > noise else "does not hold" if lead <= 0 else "undecided"
    return verdict, needed, f"{LABELS[name][0]}: {ours.name} {cell(ours, name)}, {rival.name} {cell(rival, name)}"


def claims(runs: list[Run]) -> list[list[str]]:
    """Each claim with its verdict (does not hold if one of its measures does not, holds if all do) and the figures."""
    groups, rows = kinds(runs), []
    for claim, subject, rivals, signs in CLAIMS:
        ours, others = groups.get(subject, [])[:1], [run for kind in rivals for run in groups.get(kind, [])]
        judged = [judge(ours[0], others, name, sign) for name, sign in signs.items()] if ours else []
        found = {verdict for verdict, _, _ in judged}
        verdict = next((v for v in ("does not hold", "undecided", "holds") if v in found), "not tested")
        if verdict == "undecided":
            needed = max(needed for verdict, needed, _ in judged if verdict == "undecided")
            verdict += f": {needed:,.0f} texts would decide" if needed else f": within {BPC_NOISE} bits"
        rows.append([claim, verdict, "; ".join(figures for _, _, figures in judged if figures) or "no such runs"])
    return rows


# --- report -------------------------------------------------------------------------------------------------
def cell(run: Run, name: str) -> str:
    """A figure as the tables show it, with its interval if it has one; – where there is none. Example:
    >>> cell(Run("", values={"real": 93.21}, draws={"real": [92.0, 92.0, 94.0, 94.0]}), "real"), cell(Run(""), "real")
    ('93.2 (92.0–94.0)', '–')
    """
    value, how = run.values.get(name), LABELS[name][1]
    if value is None or value != value:
        return "–"
    bounds = measures.interval(run.draws[name]) if name in run.draws else ()
    return f"{value:{how}}" + (f" ({bounds[0]:{how}}–{bounds[1]:{how}})" if bounds and bounds[0] == bounds[0] else "")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, figures are right-aligned."""
    lines = [heads, ["---"] + ["---:" if heads[1] != "verdict" else "---"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figures(rows: list[Run], names, first: str = "text") -> str:
    """The table of these measures."""
    heads = [first, *(LABELS[name][0] for name in names)]
    return table(heads, [[run.name, *(cell(run, name) for name in names)] for run in rows])


def excerpt(run: Run, number: int, lines: int) -> str:
    """The first lines of a run's text, so many, that have no blank line between them, else its very first ones."""
    text = run.texts[number % len(run.texts)].strip("\n") + "\n"
    found = re.search(rf"(?:^.+\n){{{lines}}}", text, re.MULTILINE) or re.search(rf"(?:.*\n){{1,{lines}}}", text)
    return f"```text\n{found[0].rstrip()}\n```"


def short_row(run: Run) -> list[str]:
    """A row of the README's table: rhymes, then what the same lines have by chance."""
    cells = [run.name, *(cell(run, name) for name in SHORT)]
    if cells[-1] != "–":
        cells[-1] += f", {cell(run, 'rhyming_chance')}"
    return cells


def blocks(runs: list[Run], texts: list[Run], yards: list[Run]) -> dict[str, str]:
    """What a README may show, by the name of its place: the short table, the verdicts, a sample of each stage's best run."""
    heads = ["run", *(LABELS[name][0] for name in SHORT[:-1]), "rhyming lines, shuffled, %"]
    found = {"results": table(heads, [short_row(run) for run in [*runs, texts[0], texts[-1], *yards]]),
             "claims": "\n".join(f"- *{claim}*: **{verdict}**" for claim, verdict, _ in claims(runs))}
    best: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.values["val_bpc"] or math.inf):
        if not run.last:
            best.setdefault(run.stage, run)
            best.setdefault("first", run)
    return found | {f"sample {stage}": f"`{run.name}`:\n\n{excerpt(run, 0 if stage == 'first' else 1, 4)}"
                    for stage, run in best.items()}


def fill(path: Path, parts: dict[str, str]):
    """Put each part between its marks in a file, where the file has them."""
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- /{name} -->")
        if mark and end:
            text = "".join((before, mark, part, end, after))
    path.write_text(text, encoding="utf-8", newline="\n")


def markdown(runs: list[Run], texts: list[Run], parts: dict[str, str], source: str) -> str:
    """The report: the short table, costs, texts, claims, and the beginning of a text of each run."""
    written, worth = [*runs, *texts], ", ".join(f"{LABELS[name][0]} {least:g}" for name, least in WORTH.items())
    sections = [
        "# Comparison", f"All runs learned from `{source}` and are validated on the same part of it.", parts["results"],
        NOTES.format(texts=len(runs[0].texts)), YARDSTICKS,
        "![bits per character while they learn](curves.png)", "![bits per character by density](density.png)",
        "![rhymes, real words and repeated lines](texts.png)",
        "## Claims", parts["claims"], table(["claim", "verdict", "figures"], claims(runs)),
        VERDICTS.format(worth, BPC_NOISE), "## Costs", figures(runs, COSTS, "run")]
    for heading, names in (
            ("## Words", ("real", "unseen", "distinct_words", "copied", "longest")),
            ("## Sound", ("rhyming", "rhyming_chance", "assonance", "assonance_chance")),
            ("## Lines", ("syllables", "uneven", "syllable_distance", "char_distance")),
            ("## Songs", ("verse_lines", "song_verses", "headers", "distinct_lines", "repeated"))):
        sections += [heading, figures(written, names)]
    sections += ["## What they make of refrains in the validation text", figures(runs, REFRAINS, "run"), "## Samples"]
    sections += [f"**{run.name}**\n\n{excerpt(run, 0, 8)}" for run in written]
    return "\n\n".join([*sections, *(part for name, part in parts.items() if name.startswith("sample"))]) + "\n"


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
            ("hf", "", "also fine-tune this model: a Hub name or a folder; for few epochs and for many"),
            ("hf_rate", 1e-4, "learning rate of the fine-tuning (default: %(default)s)"),
            ("texts", 64, "texts that each model writes (default: %(default)s)"),
            ("readme", "", "also put the tables and samples between the marks in this file")):
        parser.add_argument(f"--{name}", default=default, type=type(default), help=help)
    parser.add_argument("--run", action="store_true", help="train the models first")
    args = parser.parse_args(argv)
    if not (args.run or args.folders) or not 0 < args.minutes < math.inf or args.texts < 2:
        corpus.fail("name run folders to compare, or train some with --run and --minutes above 0; --texts 2 or more")
    return args


def compare(args) -> list[Run]:
    """Write the report; the runs with all their figures, then the texts to compare with, the validation text first."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    args.input = args.input or "assets/input/input2.txt" * args.run
    for plan in plans(args) if args.run else ():
        args.folders += train(plan, args.minutes)
    runs = [run for folder in args.folders for run in read_run(folder)]
    if not runs:
        corpus.fail("no model could be trained")
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(run.folder) + ", last" * run.last) for run in runs]
    args.input = args.input or runs[0].options["input"]
    training, validation = read_parts(runs, args.input)
    yards = [Run(name, values=dict(val_bpc=bits)) for name, bits in yardsticks.measure(training, validation).items()]
    training, validation = (part.replace(yardsticks.END, SEPARATOR) for part in (training, validation))
    letters = [yardsticks.babble(corpus.flatten(training), LENGTH, seed) for seed in range(args.texts)]
    real = excerpts(validation)
    texts = [Run("validation text", texts=real), Run("its lines shuffled", texts=corpus.shuffled(real, SEED)),
             Run("letters by bigrams", texts=letters)]
    for run in [*runs, *texts]:
        run.texts = run.texts or samples(run, args.texts)
        measure(run, training)
    parts = blocks(runs, texts, yards)
    report = markdown(runs, texts, parts, Path(args.input).name)
    (out / "comparison.md").write_text(report, encoding="utf-8", newline="\n")
    pictures.draw(out, runs, texts, yards)
    for run in runs:
        folder = out / run.name.replace("/", "_").replace(", ", "_")  # a path, where two runs have one name
        folder.mkdir(exist_ok=True)
        for name in ("metrics.json", "metrics.jsonl", "loss.png") if not run.last else ():
            shutil.copy(run.folder / name, folder)
        (folder / "samples.txt").write_text(SEPARATOR.join(run.texts[:SHOWN]), encoding="utf-8", newline="\n")
    if args.readme:
        fill(Path(args.readme), parts)
    print(f"-> {out / 'comparison.md'}")
    return [*runs, *texts]


def main(argv: list[str] | None = None) -> list[Run]:
    """Run with these arguments, by default the command line's; see compare(). Exits 2 on bad input."""
    try:
        return compare(parse_args(argv))
    except OSError as reason:
        corpus.fail(f"{reason.filename}: {reason.strerror}; choose another --out or --readme")
    except tuple(sys.modules[name].Stop for name in SCRIPTS.values() if name in sys.modules) as reason:
        corpus.fail(reason.args[0])
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
