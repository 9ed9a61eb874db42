"""Stage 3: a model that has already read a lot of Polish learns the style of the lyrics (transfer learning).

    python gpt_hf.py --input assets/input/input2.txt --epochs 3
    python gpt_hf.py --model_name FOLDER            # any causal language model in the Hugging Face format
    python gpt_hf.py --freeze_layers 8 --batch_size 1 --max_steps 50        # a small machine
    python gpt_hf.py --resume                       # go on after Ctrl-C or a crash
    python gpt_hf.py --sample_only --prompt "Noc nad miastem"
    torchrun --nproc_per_node=2 gpt_hf.py           # several GPUs

In a Colab cell:  import gpt_hf; gpt_hf.main(["--input", "lyrics.txt"])
The base model, 0.5 GB, is downloaded once. A run leaves a model folder that transformers reads.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm.auto import tqdm

# transformers and datasets take seconds to import: that is done where they are used, so that --help does not wait.

# ------------------------------------------------------------------------------------------------ options


class Stop(Exception):
    """Ends the program with one line: Stop(line) for what the user can put right, Stop(line, 1) for what went wrong."""


NATURAL, FROM_0, ABOVE_0 = ("at least 1", lambda x: x >= 1), ("at least 0", lambda x: x >= 0), ("above 0", lambda x: x > 0)


def option(default, help, must=None, choices=None):
    """A dataclass field that argparse is made from. must: (words, test) that a number has to pass."""
    return field(default=default, metadata=dict(help=help, must=must, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option once: its name, type, default and help."""

    input: str = option("assets/input/input2.txt", "the text to learn from")
    output_dir: str = option("assets/hf_model", "folder for everything that the run writes")
    model_name: str = option("flax-community/papuGaPT2", "pre-trained model: a Hub name or a local folder")
    revision: str = option("", "branch, tag or commit of the model on the Hub (default: the newest)")
    resume: bool = option(False, "go on from the last checkpoint in OUTPUT_DIR")
    sample_only: bool = option(False, "do not train: load the model in OUTPUT_DIR and write samples")
    epochs: int = option(3, "passes over the training text", NATURAL)
    max_steps: int = option(0, "end after so many optimizer steps, if the epochs have more (0: no limit)", FROM_0)
    batch_size: int = option(4, "blocks in a batch (per process)", NATURAL)
    gradient_accumulation_steps: int = option(1, "batches whose gradients are added up before a step", NATURAL)
    block_size: int = option(0, "tokens in a block (0: the model's context, at most 512)", FROM_0)
    learning_rate: float = option(1e-4, "peak learning rate; it falls linearly to 0", ABOVE_0)
    weight_decay: float = option(0.1, "decoupled weight decay", FROM_0)
    warmup: float = option(0.1, "linear warm-up: below 1 a share of the steps, else their number", FROM_0)
    freeze_layers: int = option(0, "leave the embeddings and the first so many layers as they are", FROM_0)
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    patience: int = option(0, "stop after so many epochs without a better validation loss (0: never)", FROM_0)
    device: str = option("auto", "auto: the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: what is fast here; the weights themselves stay in float32",
                        choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = option(2115, "seed of everything random", FROM_0)
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(3, "texts to write", NATURAL)
    max_new_tokens: int = option(300, "longest text, in tokens; the model may end the song earlier", NATURAL)
    temperature: float = option(0.85, "below 1 plays safe, above 1 takes risks, 0 takes the likeliest", FROM_0)
    top_k: int = option(50, "draw from the k likeliest tokens (0: all)", FROM_0)
    top_p: float = option(0.92, "draw from the likeliest that make up this share", ("in (0, 1]", lambda x: 0 < x <= 1))
    repetition_penalty: float = option(1.3, "above 1: what was written already becomes less likely", ABOVE_0)
    no_repeat_ngram_size: int = option(3, "never write the same so many tokens twice (0: allowed)", FROM_0)


# With --resume these may differ from the first run's: they do not change what a step computes. The epochs may grow.
FREE_ON_RESUME = set("input output_dir resume epochs max_steps gradient_checkpointing patience device dtype prompt "
                     "num_samples max_new_tokens temperature top_k top_p repetition_penalty no_repeat_ngram_size".split())


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {parser.prog} --help lists the options")

    parser = argparse.ArgumentParser(Path(__file__).name, description=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        note = f" (default: {f.default})" if f.default else ""
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + note, **kind)
    given = vars(parser.parse_args(argv))
    for f in fields(Config):
        words, test = f.metadata["must"] or ("", None)
        if test and f.name in given and not (math.isfinite(given[f.name]) and test(given[f.name])):
            raise Stop(f"--{f.name} {given[f.name]}: must be a finite number, {words}")
    if given.get("resume") and given.get("sample_only"):
        raise Stop("--resume does not go with --sample_only: choose one")
    return given


def make_config(given: dict) -> tuple[Config, dict]:
    """(what was given, else what the resumed run had, else the defaults; the resumed run's run.json, else {})."""
    config = Config(**given)
    if not config.resume:
        return config, {}
    run = read_json(Path(config.output_dir, "run.json"))
    if "options" not in run:
        raise Stop(f"no run to resume in {config.output_dir}: leave out --resume, or name the run's --output_dir")
    for name in given.keys() - FREE_ON_RESUME:
        if given[name] != run["options"][name]:
            raise Stop(f"--{name} {given[name]} contradicts the run's {run['options'][name]}: leave it out, or start a "
                       "new run in another --output_dir")
    return Config(**{**run["options"], **given}), run


# --------------------------------------------------------------------------------------------------- data

SEPARATOR = "\n<|endoftext|>\n"  # between two songs in a file: with its line breaks it is one token
END = "\0"  # how that token is written inside this program; no text file holds this character


def read_corpus(path: str) -> str:
    """The text of a UTF-8 file, its songs separated by END. A BOM and Windows line ends are tolerated."""
    try:
        raw = Path(path).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as e:
        raise Stop(f"cannot read --input {path} ({e.strerror}): name a text file") from None
    except UnicodeDecodeError as e:
        kind = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {e.start})"
        raise Stop(f"{path} is {kind}: save it as plain UTF-8 text") from None
    if END in text:
        raise Stop(f"{path} is not a text file (it holds zero bytes): save your lyrics as plain UTF-8 text")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    songs = re.split(r"^<\|endoftext\|>$", f"\n{text}\n", flags=re.MULTILINE)  # each with a line break at both ends
    text = END.join(song[1:-1] for song in songs if song.strip("\n"))
    if not text.strip():
        raise Stop(f"{path} is empty: put lyrics in it")
    return text


def split_corpus(text: str) -> tuple[str, str]:
    """Training and validation text: cut at the song boundary nearest to 90 %, else the line end, else the character.

    A boundary counts if it lies within 85 to 95 %. Every stage cuts the same text at the same character.
    """
    target, low, high = (round(len(text) * share) for share in (0.90, 0.85, 0.95))
    for mark in (END, "\n"):
        cuts = (text.rfind(mark, 0, target) + 1, text.find(mark, target) + 1)
        cuts = [cut for cut in cuts if max(low, 1) <= cut <= min(high, len(text) - 1)]
        if cuts:
            target = min(cuts, key=lambda cut: abs(cut - target))
            break
    return text[:target], text[target:]


def encode(text: str, base: SimpleNamespace) -> tuple[list[int], bool]:
    """(token numbers of a text whose songs are separated by END, whether they decode to exactly that text).

    A song is encoded as ordinary text: where it spells out a special token, it does not mean one.
    """
    ids, exact = [], True
    for number, song in enumerate(text.split(END)):
        new = base.tokenizer(song, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        exact &= base.tokenizer.decode(new, clean_up_tokenization_spaces=False) == song
        ids += [base.end] * (number > 0) + new
    return ids, exact


def pack(ids: list[int], size: int, step: int, shortest: int):
    """Rows of `size` tokens, one every `step`, as a Dataset; rows with less than `shortest` are dropped.

    Labels beyond the end are -100 and do not count. The end of a song counts like any other token: a collator that pads
    with the end token would mask it, and the model would never learn to stop.
    """
    from datasets import Dataset

    rows = [ids[start:start + size] for start in range(0, len(ids) - shortest + 1, step)]
    fill = dict(input_ids=0, labels=-100)
    filled = {name: [row + [value] * (size - len(row)) for row in rows] for name, value in fill.items()}
    return Dataset.from_dict(filled).with_format("torch")


def prepare(text: str, base: SimpleNamespace, size: int) -> SimpleNamespace:
    """Training blocks, and rows to evaluate on: of the validation text, and of as long a part of the training text."""
    train_text, val_text = split_corpus(text)
    (train, exact), (val, also), (part, _) = (encode(t, base) for t in (train_text, val_text, train_text[:len(val_text)]))
    if len(train) < size or not val:
        enough = math.ceil((size + 2) * len(train_text) / max(1, len(train)) / 0.84)
        raise Stop(f"--input is too short ({len(text):,} characters): --block_size {size} takes about {enough:,}")
    # Evaluation rows overlap by one token, which is there only to be read: the others are predicted exactly once.
    return SimpleNamespace(
        text=train_text, tokens=len(train), chars_per_token=len(train_text) / len(train),
        blocks=pack(train, size, size, size), val=pack(train[-1:] + val, size + 1, size, 2),
        part=pack([base.end] + part, size + 1, size, 2), chars=len(val_text) if exact and also else None)


# -------------------------------------------------------------------------------------------------- model


def load_pretrained(source: str, config: Config, device) -> SimpleNamespace:
    """A causal language model with float32 weights, its tokenizer, end token and context. Stop says what is wrong."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or a thread asks the Hub to convert .bin weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = os.path.isdir(source)
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1 or os.path.exists(source)):
        raise Stop(f"there is no model folder {source}: name a folder that holds a config.json, or a model of the Hub")
    where = dict(revision=None if local else config.revision or None, trust_remote_code=False)
    try:
        settings = AutoConfig.from_pretrained(source, **where)
        context = getattr(settings, "max_position_embeddings", None) or sys.maxsize
        if config.block_size > context:
            raise Stop(f"--block_size {config.block_size} is beyond the context of {source}: at most {context}")
        if getattr(settings, "activation_function", "") == "gelu_new":
            settings.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel: faster, less memory
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        model, report = AutoModelForCausalLM.from_pretrained(source, config=settings, dtype=torch.float32,
                                                             output_loading_info=True, **where)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as e:
        reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise Stop(f"{source} holds no causal language model that can be read ({reason}): name another folder" if local
                   else f"cannot get the model {source} ({reason}): go online, or give --model_name a local folder") from None
    if report["missing_keys"]:
        raise Stop(f"{source} is incomplete ({min(report['missing_keys'])} is missing): name another model")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    check_fit(source, model.eval(), tokenizer, end)
    model.config.use_cache = True
    draw = dict(do_sample=True, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    model.generation_config = GenerationConfig(  # for generate(), here and in the folder that is left
        **(draw if config.temperature else {}), max_new_tokens=config.max_new_tokens, bos_token_id=end, eos_token_id=end,
        pad_token_id=end, repetition_penalty=config.repetition_penalty, no_repeat_ngram_size=config.no_repeat_ngram_size)
    return SimpleNamespace(model=model.to(device), tokenizer=tokenizer, end=end, context=context)


def check_fit(source: str, model, tokenizer, end: int | None):
    """Stop if songs could not be told apart, if the tokenizer is another model's, or if a position sees the future."""
    if not isinstance(end, int):
        raise Stop(f"the model {source} has no end token (eos_token) to put between songs: name another model")
    top, rows = max(end, *tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if top >= rows:
        raise Stop(f"the tokenizer in {source} does not fit: its numbers go up to {top}, the model's to {rows - 1}")
    with torch.no_grad():  # does the second token change what is predicted after the first?
        first, second = (model(torch.tensor([[end, token]])).logits[0, 0] for token in (end, (end + 1) % rows))
    if not torch.allclose(first, second):
        raise Stop(f"{source} is no causal language model: {type(model).__name__} reads in both directions, as BERT does; "
                   "name one of the GPT kind")


def freeze(model, count: int):
    """Leave the embeddings and the first `count` layers as they are. A head that shares the embedding is frozen, too."""
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    if count > len(layers):
        raise Stop(f"--freeze_layers {count} is too many: the model has {len(layers)}")
    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    for module in [*embeddings, *layers[:count]] if count else []:
        module.requires_grad_(False)


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, rows, chars: int | None, amp, rank=0, world=1) -> tuple[float, float | None]:
    """(nats per token, bits per character or None) over all tokens but the first, each predicted exactly once.

    Bits per character = sum of nats / (ln 2 * characters) can be compared between tokenizers; loss per token cannot.
    The batches do not depend on --batch_size, so the same model always gets the same figure.
    """
    model.eval()
    sums, many = torch.zeros(2, dtype=torch.float64), max(1, 1024 // rows[0]["labels"].numel())
    for start in range(rank * many, len(rows), world * many):
        batch = rows[start:start + many]
        x, y = batch["input_ids"][:, :-1].to(model.device), batch["labels"][:, 1:].to(model.device)  # (B, T)
        with amp:
            logits = model(input_ids=x, use_cache=False).logits  # (B, T, vocab_size)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum")
        sums += torch.tensor([nats.item(), (y != -100).sum().item()], dtype=torch.float64)
    if world > 1:
        sums = sums.to(model.device)
        dist.all_reduce(sums)
    nats, tokens = sums.tolist()
    return nats / tokens, nats / (math.log(2) * chars) if chars else None


def copy_rate(texts: list[str], source: str, length: int = 8) -> tuple[float | None, int]:
    """(share of the texts' runs of `length` words that stand in the source, longest run in words that does).

    Example: copy_rate(["a b c x"], "z a b c", length=2) is (2/3, 3): "a b" and "b c" are copied, "c x" is not.
    """
    source, runs, longest = f" {' '.join(source.split())} ", [], 0
    for words in map(str.split, texts):
        runs += [" ".join(words[i:i + length]) for i in range(len(words) - length + 1)]
        for i in range(len(words)):
            while i + longest < len(words) and f" {' '.join(words[i:i + longest + 1])} " in source:
                longest += 1
    return sum(f" {run} " in source for run in runs) / len(runs) if runs else None, longest


# ---------------------------------------------------------------------------------------------- checkpoint

# What a run writes. run.json comes first and is moved away last: a kill never leaves files that no run seems to own.
RUN_FILES = ("checkpoint-*", "*.safetensors*", "config.json", "generation_config.json", "tokenizer*", "*_tokens*.json",
             "vocab.*", "merges.txt", "*.jinja", "README.md", "metrics.json*", "loss.png", "output", "run.json")


def write_text(path: Path, text: str):
    """Write a temporary file, then rename it: at any moment a kill leaves a whole file at the path."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """What a JSON file holds; {} if it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_checkpoint(folder: str) -> tuple[str, dict]:
    """(the newest whole checkpoint, its state), or ("", {}). The Trainer writes trainer_state.json last."""
    for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int("0" + path.name[11:]), reverse=True):
        if state := read_json(path / "trainer_state.json"):
            return str(path), state
    return "", {}


def set_aside(paths: list[Path]):
    """Move files out of the way, to previous-<time> beside them: nothing is ever overwritten."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for path in paths:
        while (new := path.with_name(f"previous-{stamp}") / path.name).exists():
            stamp += "+"
        new.parent.mkdir(exist_ok=True)
        path.rename(new)


def save_model(base: SimpleNamespace, folder: Path):
    """Save as transformers does, but let each file appear whole."""
    shutil.rmtree(folder / ".saving", ignore_errors=True)  # of a run that was killed here
    base.model.save_pretrained(folder / ".saving")
    base.tokenizer.save_pretrained(folder / ".saving")
    for path in sorted((folder / ".saving").iterdir()):
        os.replace(path, folder / path.name)
    (folder / ".saving").rmdir()


# ---------------------------------------------------------------------------------------------- generate


def sample_text(base: SimpleNamespace, config: Config, amp, number: int) -> str:
    """What the model writes after the prompt, to the end of the song at most. Same seed and number, same text.

    When the context is full, its last half is kept and read again: no position beyond the limit is ever used.
    """
    prompt = encode(config.prompt, base)[0] or [base.end]  # a new song starts where another has ended
    ids, seen = list(prompt), len(prompt)
    torch.manual_seed(hash((config.seed, -1, number)))
    while (left := len(prompt) + config.max_new_tokens - len(ids)) > 0:
        seen = seen if seen < base.context else base.context // 2
        context = torch.tensor([ids[-seen:]], device=base.model.device)  # (1, T)
        with amp:
            new = base.model.generate(context, attention_mask=torch.ones_like(context),
                                      max_new_tokens=min(left, base.context - seen))
        ids += new[0, seen:].tolist()  # the prompt is cut off by its number of tokens, not by its text
        seen = new.size(1)
        if ids[-1] == base.end:
            ids.pop()
            break
    given, whole = (base.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt, ids))
    return whole[len(given):]


def write_samples(base: SimpleNamespace, config: Config, amp, path: Path, show=True) -> list[str]:
    """Write the texts to a file and to the screen: what is shown is what is saved. Returns them without the prompt."""
    path.parent.mkdir(exist_ok=True)
    set_aside([path] if path.exists() else [])
    texts = []
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number in range(config.num_samples):
            texts.append(sample_text(base, config, amp, number))
            text = config.prompt + texts[-1] + (SEPARATOR if number + 1 < config.num_samples else "\n")
            file.write(text)
            print(text if show else "", end="", flush=True)
    print(f"-> {path}", flush=True)
    return texts


# ------------------------------------------------------------------------------------------------- train


def pick_device(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device and the type to compute in. auto: the first of cuda, mps, cpu; the type that is fast there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(device for device in there if there[device]) if name == "auto" else name
    if not there[name] or name == "cpu" and dtype == "float16":
        raise Stop(f"--dtype float16 needs a GPU: use --dtype auto" if there[name] else
                   f"--device {name}: there is none here; use --device auto")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if dtype == "auto" and name == "cuda":  # is_bf16_supported() would count a slow emulation
        dtype = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    elif dtype == "auto":
        fast = [getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile")]
        dtype = "bfloat16" if name == "cpu" and any(fast) else "float32"
    return device, getattr(torch, dtype)


class FineTuning:
    """A run. The Trainer takes the steps and saves; its state, which checkpoints hold, tells how far the run has come.

    The on_... methods are what the Trainer calls in between. Rank 0 alone writes and prints.
    """

    def __init__(self, config: Config, base: SimpleNamespace, data: SimpleNamespace, device, dtype):
        self.config, self.base, self.data, self.device, self.dtype = config, base, data, device, dtype
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        batches = math.ceil(len(data.blocks) / (config.batch_size * self.world))
        self.epoch_steps = math.ceil(batches / config.gradient_accumulation_steps)
        self.total = min(config.epochs * self.epoch_steps, config.max_steps or math.inf)
        self.signal, self.seconds, self.folder = 0, 0.0, Path(config.output_dir)

    def say(self, text: str):
        """Print a line without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def finished(self, state) -> bool:
        """Whether all steps are done, or `patience` epochs brought nothing better."""
        waited = sum(record.get("iter", 0) > (state.best_global_step or 0) for record in state.log_history)
        return state.global_step >= self.total or 0 < self.config.patience <= waited

    def must_be_finite(self, loss: float, step: int):
        """Stop, before anything is saved, if the loss is no number any more."""
        if not math.isfinite(loss):
            raise Stop(f"the loss turned NaN at step {step}; the last good checkpoint is kept: start again with a lower "
                       "--learning_rate", 1)

    def check_up(self, state, rate: float):
        """Evaluate, log, and note which step was the best: its checkpoint is kept beside the last."""
        record = dict(iter=state.global_step, epoch=state.epoch, learning_rate=rate, seconds=self.seconds)
        for name, rows in (("train", self.data.part), ("val", self.data.val)):
            record[f"{name}_loss"], record[f"{name}_bpc"] = evaluate(self.base.model, rows, self.data.chars, self.amp,
                                                                     self.rank, self.world)
        self.must_be_finite(record["train_loss"] + record["val_loss"], state.global_step)
        better = state.global_step > 0 and record["val_loss"] < (state.best_metric or math.inf)
        if better:
            state.best_metric, state.best_global_step = record["val_loss"], state.global_step
        state.log_history.append(record)
        if self.rank == 0:
            lines = (json.dumps(record) + "\n" for record in state.log_history if "iter" in record)
            write_text(self.folder / "metrics.jsonl", "".join(lines))
        unit, (train, val) = self.unit(record)
        self.say(f"step {state.global_step:>5}  epoch {state.epoch:.2f}  train {train:.3f}  val {val:.3f} {unit}"
                 + "  best" * better)

    def on_train_begin(self, args, state, control, **_):
        """A new run is evaluated before it trains: what fine-tuning buys is the difference."""
        self.seconds = state.log_history[-1]["seconds"] if state.log_history else 0.0
        if not state.log_history:
            self.check_up(state, 0.0)

    def on_step_begin(self, args, state, control, **_):
        """The clock runs while a step is taken."""
        self.clock = time.perf_counter()

    def on_log(self, args, state, control, logs, **_):
        """After each step: show the loss; end the training after a signal."""
        state.log_history.pop()  # only evaluations are kept there
        if "loss" not in logs:
            return
        self.seconds += time.perf_counter() - self.clock
        self.must_be_finite(logs["loss"], state.global_step)
        E
