"""Stage 3: a model that has read a lot of Polish learns the style of the lyrics.

    python gpt_hf.py --input assets/input/input2.txt --epochs 3
    python gpt_hf.py --model_name FOLDER    # any causal model on this machine
    python gpt_hf.py --freeze_layers 8 --batch_size 1  # small machine
    python gpt_hf.py --resume               # go on after Ctrl-C or a crash
    python gpt_hf.py --sample_only --prompt "Noc nad miastem"
    torchrun --nproc_per_node=2 gpt_hf.py   # several GPUs

In a Colab cell:  import gpt_hf; gpt_hf.main(["--input", "lyrics.txt"])
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

# Before torch is loaded: its threads would spin while they wait for each other, and starve beside a second busy program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm.auto import tqdm

# transformers and datasets take seconds to import: that is done where they are used, so that --help does not wait.

# ------------------------------------------------------------------------------------------------ options
class Stop(Exception):
    """Ends the program with one line: Stop(line) for what the user can put right, Stop(line, 1) for what went wrong."""


def option(default, help, low=None, high=1e18, choices=None):
    """A dataclass field that argparse is made from. A number has to lie from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option once: its name, type, default and help."""
    input: str = option("assets/input/input2.txt", "the text to learn from")
    output_dir: str = option("assets/hf_model", "folder for everything that the run writes")
    model_name: str = option("flax-community/papuGaPT2", "pre-trained model: a Hub name or a local folder")
    revision: str = option("", "branch, tag or commit of the model on the Hub (default: the newest)")
    resume: bool = option(False, "go on from the last checkpoint in OUTPUT_DIR")
    sample_only: bool = option(False, "do not train: load the model in OUTPUT_DIR and write samples")
    epochs: int = option(3, "passes over the training text", 1)
    max_steps: int = option(0, "end after so many optimizer steps, if the epochs have more (0: no limit)", 0)
    batch_size: int = option(4, "blocks in a batch (per process)", 1)
    gradient_accumulation_steps: int = option(1, "batches whose gradients are added up before a step", 1)
    block_size: int = option(0, "tokens in a block (0: the model's context, at most 512)", 0)
    learning_rate: float = option(1e-4, "peak learning rate; it falls linearly to 0", 1e-9)
    weight_decay: float = option(0.1, "decoupled weight decay", 0)
    warmup: float = option(0.1, "linear warm-up: below 1 a share of the steps, else their number", 0)
    freeze_layers: int = option(0, "leave the embeddings and the first so many layers as they are", 0)
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    patience: int = option(0, "stop after so many epochs without a better validation loss (0: never)", 0)
    device: str = option("auto", "auto: the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "to compute in; auto: what is fast", choices=("auto", "float32", "bfloat16", "float16"))
    seed: int = option(2115, "seed of everything random", 0, 2**32 - 1)
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(3, "texts to write", 1)
    max_new_tokens: int = option(300, "longest text, in tokens; the model may end the song earlier", 1)
    temperature: float = option(0.85, "below 1 plays safe, above 1 takes risks, 0 takes the likeliest", 0)
    top_k: int = option(50, "draw from the k likeliest tokens (0: all)", 0)
    top_p: float = option(0.92, "draw from the likeliest that make up this share", 1e-9, 1)
    repetition_penalty: float = option(1.3, "above 1: what was written already becomes less likely", 1e-9)
    no_repeat_ngram_size: int = option(3, "never write the same so many tokens twice (0: allowed)", 0)


# With --resume these must be what they were, as they change what a step computes. Others may change,
# epochs and max_steps only grow.
FIXED = {"model_name", "revision", "batch_size", "gradient_accumulation_steps", "block_size", "learning_rate",
         "weight_decay", "warmup", "freeze_layers", "seed"}


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {parser.prog} --help lists the options")

    parser = argparse.ArgumentParser(Path(__file__).name, description=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        note = "" if f.type is bool or f.default == "" else f" (default: {f.default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + note, **kind)
    given = vars(parser.parse_args(argv))
    for f in fields(Config):
        low, high = f.metadata["low"], f.metadata["high"]
        if low is not None and f.name in given and not low <= given[f.name] <= high:
            raise Stop(f"--{f.name} {given[f.name]}: must be a finite number, at least {low} and at most {high:g}")
    if "prompt" in given:  # bytes that are not UTF-8 come from a shell as lone surrogates: drop them
        given["prompt"] = given["prompt"].encode(errors="ignore").decode()
    return given


def make_config(given: dict) -> tuple[Config, dict]:
    """(what was given, else what the resumed run had, else the defaults; the resumed run's run.json, else {})."""
    config = Config(**given)
    if not config.resume:
        return config, {}
    run = read_json(Path(config.output_dir, "run.json"))
    if "options" not in run or config.sample_only:
        raise Stop(f"no run to resume in {config.output_dir}: leave out --resume, or name the run's --output_dir"
                   if not config.sample_only else "--resume does not go with --sample_only: choose one")
    for name in FIXED & given.keys():
        if given[name] != run["options"][name]:
            raise Stop(f"--{name} {given[name]} contradicts the run's {run['options'][name]}: leave it out, or leave "
                       "out --resume")
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
    """Training and validation text, the same in every stage: cut at the song boundary nearest to 90 %.

    If there is none from 85 to 95 %, at the line end nearest to 90 %, else at the character.
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
    """(numbers of a text whose songs are separated by END, whether they decode to exactly that text).

    A song is ordinary text: where it spells out a special token, it does not mean one.
    """
    ids, exact = [], True
    for number, song in enumerate(text.split(END)):
        new = base.tokenizer(song, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        exact &= base.tokenizer.decode(new, clean_up_tokenization_spaces=False) == song
        ids += [base.end] * (number > 0) + new
    return ids, exact


def pack(ids: list[int], size: int, step: int, shortest: int):
    """Rows of `size` tokens, one every `step`, as a Dataset; rows with less than `shortest` are dropped."""
    from datasets import Dataset

    rows = [ids[start:start + size] for start in range(0, len(ids) - shortest + 1, step)]
    fill = dict(input_ids=0, labels=-100)  # -100 does not count. The end of a song does: else it would not be learned
    filled = {name: [row + [value] * (size - len(row)) for row in rows] for name, value in fill.items()}
    return Dataset.from_dict(filled).with_format("torch")


def prepare(text: str, base: SimpleNamespace, size: int) -> SimpleNamespace:
    """Training blocks, and rows to evaluate on: of the validation text, and of as long a part of the training text."""
    train_text, val_text = split_corpus(text)
    part_text = train_text[:len(val_text)]
    (train, exact), (val, also), (part, _) = (encode(piece, base) for piece in (train_text, val_text, part_text))
    if len(train) < size or not val:
        enough = math.ceil((size + 2) * len(train_text) / max(1, len(train)) / 0.84)
        raise Stop(f"--input is too short ({len(text):,} characters): --block_size {size} takes about {enough:,}")
    # Rows to evaluate on overlap by one token, which is there only to be read: the others are predicted exactly once.
    return SimpleNamespace(
        text=train_text, blocks=pack(train, size, size, size), val=pack(train[-1:] + val, size + 1, size, 2),
        part=pack([base.end] + part, size + 1, size, 2), chars=len(val_text) if exact and also else None,
        tokens=len(train), chars_per_token=len(train_text) / len(train))


# -------------------------------------------------------------------------------------------------- model
def load_pretrained(source: str, config: Config, device) -> SimpleNamespace:
    """A causal language model with float32 weights, its tokenizer, end token and context. Stop says what is wrong."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or a thread asks the Hub to convert .bin weights
    import huggingface_hub.utils as hub
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    hub.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.enable_progress_bars()  # those of a download
    local = os.path.isdir(source)
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1 or os.path.exists(source)):
        raise Stop(f"there is no model folder {source}: name a folder that holds a config.json, or a model of the Hub")
    for offline in (True, False):  # what was downloaded once needs no network
        where = dict(revision=not local and config.revision or None, trust_remote_code=False, local_files_only=offline)
        try:
            settings = AutoConfig.from_pretrained(source, **where)
            context = getattr(settings, "max_position_embeddings", None) or sys.maxsize
            if config.block_size > context:
                raise Stop(f"--block_size {config.block_size} is beyond the context of {source}: at most {context}")
            if getattr(settings, "activation_function", "") == "gelu_new":
                settings.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel: faster, smaller
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
            model, report = AutoModelForCausalLM.from_pretrained(source, config=settings, dtype=torch.float32,
                                                                 output_loading_info=True, **where)
            model.tie_weights()  # transformers before 5.4 leaves apart what a .bin file holds twice
            break
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as e:
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            if local:
                raise Stop(f"{source} holds no causal language model that can be read ({reason}): name another") from e
    else:
        raise Stop(f"cannot get {source} ({reason}): go online, or give --model_name a local folder")
    if report["missing_keys"]:
        raise Stop(f"{source} is incomplete ({min(report['missing_keys'])} is missing): name another model")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else model.config.eos_token_id
    if not isinstance(end, int):
        raise Stop(f"the model {source} has no end token (eos_token) to put between songs: name another model")
    top, rows = max(end, *tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if top >= rows:
        raise Stop(f"the tokenizer in {source} does not fit: its numbers go up to {top}, the model's to {rows - 1}")
    with torch.no_grad():  # does the second token change what is predicted after the first?
        first, second = (model.eval()(torch.tensor([[end, token]])).logits[0, 0] for token in (end, (end + 1) % rows))
    if not torch.allclose(first, second):
        raise Stop(f"{source} is no causal language model: {type(model).__name__} sees the future, as BERT does")
    model.config.use_cache = True
    draw = dict(do_sample=True, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    model.generation_config = GenerationConfig(  # what generate() goes by, here and wherever the folder is loaded
        **(draw if config.temperature else {}), max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty, no_repeat_ngram_size=config.no_repeat_ngram_size,
        bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return SimpleNamespace(model=model.to(device), tokenizer=tokenizer, end=end, context=context)


def freeze(model, count: int):
    """Leave the embeddings and the first `count` layers as they are. A head that shares the embedding is frozen too."""
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


def read_json(path: Path) -> dict:
    """What a JSON file holds; {} if it is missing or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_checkpoint(folder: str) -> tuple[str, dict]:
    """(the newest whole checkpoint, its state), or ("", {}). The Trainer writes trainer_state.json last."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    for path in sorted(paths, key=lambda path: int(path.name[11:]), reverse=True):
        if state := read_json(path / "trainer_state.json"):
            return str(path), state
    return "", {}


def set_aside(path: Path, new: Path | None = None):
    """Move what stands at the path to `new`, by default its name with the time: nothing is ever overwritten."""
    new = new or path.with_name(f"{path.name}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
    while new.exists():
        new = new.with_name(new.name + "+")
    if path.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


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
        with amp if base.model.device.type != "cpu" else contextlib.nullcontext():  # one position at a time, casts do not pay
            new = base.model.generate(context, attention_mask=torch.ones_like(context),
                                      max_new_tokens=min(left, base.context - seen))
        ids, seen = ids + new[0, seen:].tolist(), new.size(1)  # the prompt is cut off by its number of tokens
        if ids[-1] == base.end:
            ids.pop()
            break
    given, whole = (base.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt, ids))
    return whole[len(given):]


def write_samples(base: SimpleNamespace, config: Config, amp, name="sample.txt") -> list[str]:
    """Write the texts to a file and to the screen: what is shown is what is saved. Returns them without the prompt."""
    path, texts = Path(config.output_dir, "output", name), []
    set_aside(path)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number in range(config.num_samples):
            texts.append(sample_text(base, config, amp, number))
            text = config.prompt + texts[-1] + (SEPARATOR if number + 1 < config.num_samples else "\n")
            file.write(text)
            print(text, end="", flush=True)
    print(f"-> {path}")
    return texts


# ------------------------------------------------------------------------------------------------- train
def pick_device(name: str) -> torch.device:
    """The device to use; auto: the first of cuda, mps, cpu that is there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(device for device in there if there[device]) if name == "auto" else name
    if not there[name]:
        raise Stop(f"--device {name}: there is none here; use --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def mixed_precision(name: str, device: torch.device) -> torch.autocast:
    """A context to compute in; auto: bfloat16 where the hardware has it, float16 on an older GPU, else float32."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda":  # is_bf16_supported() would count a slow emulation
            name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
        elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            name = "bfloat16"
    return torch.autocast(device.type, getattr(torch, name), enabled=name != "float32")


def keep_memory():
    """Let freed memory stay with the process: glibc gives large tensors back, and a step asks for them anew, page by page."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system or another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: map only what is larger
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back only more


@contextlib.contextmanager
def catch_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that training stops between two steps."""
    caught, old = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class FineTuning:
    """A run. The Trainer takes the steps and saves, and calls the on_... methods in between.

    Its state, which checkpoints hold, tells how far the run has come. Rank 0 alone writes and prints.
    """

    def __init__(self, config: Config, base: SimpleNamespace, data: SimpleNamespace, amp: torch.autocast, device):
        self.config, self.base, self.data, self.amp, self.device = config, base, data, amp, device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        batches = math.ceil(len(data.blocks) / (config.batch_size * self.world))
        self.epoch_steps = math.ceil(batches / config.gradient_accumulation_steps)
        self.total = min(config.epochs * self.epoch_steps, config.max_steps or math.inf)
        self.unit, self.words = ("bpc", "bits/char") if data.chars else ("loss", "nats/token")
        self.folder, self.signal = Path(config.output_dir), 0

    def say(self, text: str):
        """Print a line without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(text)

    def finished(self, state) -> bool:
        """Whether all steps are done, or `patience` epochs brought nothing better."""
        waited = sum(record["iter"] > (state.best_global_step or 0) for record in state.log_history)
        return state.global_step >= self.total or 0 < self.config.patience <= waited

    def must_be_finite(self, loss: float, step: int):
        """Stop before anything is saved if the loss is no number any more."""
        if not math.isfinite(loss):
            raise Stop(f"the loss is NaN at step {step}; the last good checkpoint is kept: lower --learning_rate", 1)

    def on_train_begin(self, args, state, control, **_):
        """A new run is evaluated before it trains: what fine-tuning buys is the difference."""
        self.saved = state.stateful_callbacks  # the Trainer keeps it for its callbacks; for us, the seconds of training
        if not state.log_history:
            self.saved["seconds"] = 0.0
            self.check_up(state, 0.0)

    def on_step_begin(self, *_, **__):
        """The clock runs while a step is taken."""
        self.clock = time.perf_counter()

    def on_log(self, args, state, control, logs, **_):
        """After each step: show the loss; after a signal, save."""
        state.log_history.pop()  # only evaluations are kept there
        if "loss" not in logs:
            return
        self.saved["seconds"] += time.perf_counter() - self.clock
        step, loss = state.global_step, logs["loss"]
        self.must_be_finite(loss, step)
        bits = f" = {loss / math.log(2) / self.data.chars_per_token:.3f} bits/char" if self.data.chars else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}{bits}", refresh=False)
        self.bar.update()
        if self.bar.disable and step % max(1, self.total // 10) == 0:
            minutes = (self.total - step) * self.saved["seconds"] / step / 60
            self.say(f"step {step:>5} of {self.total}  loss {loss:.3f}{bits}  about {minutes:.1f} minutes to go")
        signals = torch.tensor(self.caught[-1] if self.caught else 0, device=self.device)
        if self.world > 1:  # what one process caught stops all, after the same step
            dist.all_reduce(signals, op=dist.ReduceOp.MAX)
        self.signal = int(signals)
        control.should_save = bool(self.signal and step % self.epoch_steps and step < self.total)

    def on_epoch_end(self, args, state, control, lr_scheduler, **_):
        """Evaluate. The Trainer saves next."""
        self.check_up(state, lr_scheduler.get_last_lr()[0])
        control.should_training_stop |= self.finished(state)

    def on_save(self, args, state, control, **_):
        """After a signal, the training ends as soon as its state is saved."""
        if self.signal and not self.finished(state):
            raise KeyboardInterrupt

    def check_up(self, state, rate: float):
        """Evaluate, log, and note which step was the best: its checkpoint is kept beside the last."""
        record = dict(iter=state.global_step, epoch=state.epoch, learning_rate=rate, seconds=self.saved["seconds"])
        for name, rows in (("train", self.data.part), ("val", self.data.val)):
            record[f"{name}_loss"], record[f"{name}_bpc"] = evaluate(self.base.model, rows, self.data.chars, self.amp,
                                                                     self.rank, self.world)
        self.must_be_finite(record["train_loss"] + record["val_loss"], state.global_step)
        better = state.global_step > 0 and record["val_loss"] < (state.best_metric or math.inf)
        if better:
            state.best_metric, state.best_global_step = record["val_loss"], state.global_step
        state.log_history.append(record)
        if self.rank == 0:
            lines = "".join(json.dumps(record) + "\n" for record in state.log_history)
            (self.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
        train, val = record[f"train_{self.unit}"], record[f"val_{self.unit}"]
        self.say(f"step {state.global_step:>5}  epoch {state.epoch:.2f}  train {train:.3f}  val {val:.3f} {self.words}"
                 + "  best" * better)

    def fit(self, checkpoint: str, state: dict) -> int:
        """Train, from the checkpoint if there is one. Returns the signal that ended it early, else 0."""
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
        from transformers import default_data_collator as collate

        config, dtype, self.state = self.config, self.amp.fast_dtype, TrainerState(**state)
        if state and self.finished(self.state):
            return 0
        known = TrainingArguments.__dataclass_fields__  # one option has a new name from 5.23 on
        less_memory = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        args = TrainingArguments(
            config.output_dir, max_steps=self.total, per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps, learning_rate=config.learning_rate,
            weight_decay=config.weight_decay, lr_scheduler_type="linear", seed=config.seed, save_strategy="epoch",
            warmup_steps=int(config.warmup * self.total if config.warmup < 1 else config.warmup), save_total_limit=2,
            bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=self.device.type == "cuda", logging_steps=1, logging_nan_inf_filter=False,
            report_to="none", disable_tqdm=True, log_level="error", **{less_memory: config.gradient_checkpointing})
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs: torchrun, never the slow DataParallel
        calls = {name: getattr(self, name) for name in dir(self) if name.startswith("on_")}
        trainer = Trainer(self.base.model, args, collate, self.data.blocks, processing_class=self.base.tokenizer,
                          callbacks=[type("Callback", (TrainerCallback,), calls)()])
        trainer.remove_callback(PrinterCallback)
        warnings.filterwarnings("ignore", "mtime may not be reliable")  # an early transformers on the order of checkpoints
        hidden = self.rank > 0 or not (sys.stderr.isatty() or IN_NOTEBOOK)  # a file gets lines, not a bar
        with catch_signals() as self.caught, tqdm(
                total=self.total, initial=self.state.global_step, unit="step", leave=False, dynamic_ncols=True,
                disable=hidden) as self.bar, contextlib.suppress(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=checkpoint or None)
        self.state = trainer.state
        return 0 if self.finished(self.state) else self.signal

    def metrics(self) -> dict:
        """What metrics.json holds before the samples are judged."""
        model, data, (before, *after) = self.base.model, self.data, self.state.log_history
        rows, seconds = model.get_input_embeddings().num_embeddings, self.state.stateful_callbacks["seconds"]
        best = min(after, key=lambda record: record["val_loss"], default={})
        return dict(
            stage="hf", params=model.num_parameters(), trainable=model.num_parameters(only_trainable=True),
            vocab_size=rows, chars_per_token=data.chars_per_token, tokens_per_vocab_entry=data.tokens / rows,
            val_loss_before=before["val_loss"], val_bpc_before=before["val_bpc"], val_loss=best.get("val_loss"),
            val_bpc=best.get("val_bpc"), train_bpc=best.get("train_bpc"), best_iter=best.get("iter"),
            iters=self.state.global_step, epochs=self.state.epoch, seconds=seconds,
            tokens_per_second=self.state.epoch * len(data.blocks) * self.config.block_size / max(seconds, 1e-9),
            device=str(self.device), dtype=str(self.amp.fast_dtype).removeprefix("torch."), seed=self.config.seed)

    def leave_model(self) -> dict:
        """Make the folder a model folder: the best weights, samples, a card. The metrics, now with what is copied."""
        base = load_pretrained(str(self.folder / f"checkpoint-{self.state.best_global_step}"), self.config, self.device)
        base.model.save_pretrained(self.folder)  # a kill here does no harm: --resume does it again
        base.tokenizer.save_pretrained(self.folder)
        texts = write_samples(base, self.config, self.amp)
        rate, longest = copy_rate(texts, self.data.text.replace(END, "\n"))
        metrics = dict(self.metrics(), copy_rate=rate, copy_longest=longest)
        old, new = metrics[f"val_{self.unit}_before"], metrics[f"val_{self.unit}"]
        result = (f"Validation: {old:.3f} {self.words} before, {new:.3f} after{' (worse!)' * (new > old)}. Copied from "
                  f"the training text: {rate or 0:.1%} of the samples' runs of 8 words, {longest} words at a stretch.")
        rows = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
        card = CARD.format(config=self.config, result=result, rows=rows, sample=self.config.prompt + texts[0])
        (self.folder / "README.md").write_text(card, encoding="utf-8")
        self.say(f"{result}\n-> {self.folder}")
        return metrics

    def write_report(self, metrics: dict):
        """Write metrics.json and draw both losses: where the curves part, the model begins to learn by heart."""
        from matplotlib.figure import Figure  # here, as it takes a second to import

        (self.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        figure, history = Figure(figsize=(7, 4), layout="constrained"), self.state.log_history
        axes = figure.add_subplot(xlabel="epoch", ylabel=self.words)
        for name, color in (("train", "#0072B2"), ("val", "#D55E00")):
            losses = [record[f"{name}_{self.unit}"] for record in history]
            axes.plot([record["epoch"] for record in history], losses, color=color, marker=".", label=name)
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=120)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
`{config.model_name}`, fine-tuned on `{config.input}` with gpt_hf.py of Mlody-GTP. {result}

It imitates that text, and may repeat it word for word. The rights to the text, and the licence of the base model, hold
for this one, too. `val_bpc`: bits per character on text that it was not trained on.

| measure | value |
| --- | --- |
{rows}

```text
{sample}
```
"""

# -------------------------------------------------------------------------------------------------- main
IN_NOTEBOOK = "kernel" in os.path.basename(sys.argv[0])  # then sys.argv is the kernel's, not ours


def open_folder(config: Config, rank: int):
    """Make the output folder; a new run moves what an earlier one left to previous-<time>. Stop if it can't be used."""
    folder = Path(config.output_dir)
    old = [] if config.resume else [path for name in RUN_FILES for path in sorted(folder.glob(name))]
    if os.path.realpath(folder) == os.path.realpath(config.model_name):
        raise Stop(f"--output_dir {folder} is the folder of --model_name: choose another")
    if old and old[-1].name != "run.json":
        raise Stop(f"{folder} holds {old[0].name}, which no run of this script wrote: choose another --output_dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise Stop(f"cannot write {folder} ({e.strerror}): choose another --output_dir") from None
    previous = folder / f"previous-{time.strftime('%Y%m%d-%H%M%S')}"
    for path in old if rank == 0 else ():
        set_aside(path, previous / path.name)


def run(given: dict) -> dict:
    """Train, then sample; or only sample. All that can be wrong is found before anything is written. The metrics."""
    config, old_run = make_config(given)
    device = pick_device(config.device)
    if device.type == "cpu" and config.dtype == "float16":
        raise Stop("--dtype float16 needs a GPU: use --dtype auto")
    amp = mixed_precision(config.dtype, device)
    if config.sample_only:
        if not Path(config.output_dir, "config.json").exists():
            raise Stop(f"there is no model in {config.output_dir}: train first, or name its folder with --output_dir")
        write_samples(load_pretrained(config.output_dir, config, device), config, amp)
        return read_json(Path(config.output_dir, "metrics.json"))
    text = read_corpus(config.input)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if sha256 != old_run.get("corpus_sha256", sha256):
        raise Stop(f"--input {config.input} is not the text that this run began with (its SHA-256 differs): give that "
                   "one, or start a new run in another --output_dir")
    checkpoint, state = last_checkpoint(config.output_dir) if config.resume else ("", {})
    base = load_pretrained(checkpoint or config.model_name, config, device)
    config = replace(config, block_size=config.block_size or min(512, base.context))
    freeze(base.model, config.freeze_layers)
    keep_memory()
    tuning = FineTuning(config, base, prepare(text, base, config.block_size), amp, device)
    if state and state["global_step"] > tuning.total:
        raise Stop(f"the run is at step {state['global_step']} already: --epochs and --max_steps may only grow")
    open_folder(config, tuning.rank)
    tuning.say(f"{base.model.num_parameters():,} parameters on {device} in {amp.fast_dtype}: {len(text):,} characters, "
               f"{tuning.total} steps, {tuning.epoch_steps} an epoch")
    if not tuning.data.chars:
        tuning.say("warning: this tokenizer does not give the text back exactly, so there are no bits per character")
    if tuning.rank == 0:
        versions = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
        (tuning.folder / "run.json.tmp").write_text(json.dumps(dict(
            options=asdict(config), versions=versions, device=str(device), dtype=str(amp.fast_dtype),
            corpus_sha256=sha256, commit=getattr(base.model.config, "_commit_hash", None)), indent=1))
        os.replace(tuning.folder / "run.json.tmp", tuning.folder / "run.json")
        if not checkpoint:
            tuning.say("before training it writes:")
            write_samples(base, config, amp, "sample_before.txt")
    if state and state["max_steps"] != tuning.total:
        tuning.say(f"note: the learning rate is planned anew for {tuning.total} steps")
    stopped = tuning.fit(checkpoint, state)
    metrics = tuning.metrics() if stopped or tuning.rank else tuning.leave_model()
    if tuning.rank == 0:
        tuning.write_report(metrics)
    if stopped:
        tuning.say(f"stopped and saved; go on with: python gpt_hf.py --resume --output_dir {config.output_dir}")
        return {**metrics, "signal": stopped}
    return metrics


def main(argv=None) -> dict:
    """Run with these arguments, by default the command line's. Returns what metrics.json holds."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8; a file that somebody watches
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        return run(parse_args(([] if IN_NOTEBOOK else sys.argv[1:]) if argv is None else argv))
    except Stop as e:
        message, status = (*e.args, 2)[:2]
    except torch.OutOfMemoryError:
        message, status = "out of memory: lower --batch_size, and raise --gradient_accumulation_steps instead", 1
    except (OSError, SafetensorError) as e:
        message, status = f"cannot write ({getattr(e, 'strerror', 0) or e}): the last good checkpoint is kept", 1
    except RuntimeError as e:  # torch has no narrower error for a full disk, or for a process that was killed
        if "PytorchStreamWriter" in str(e) or "inline_container" in str(e):
            message, status = f"cannot write ({e}): the last good checkpoint is kept", 1
        elif dist.is_initialized() and "Connection" in str(e):
            message, status = "another process of this run is gone; the last good checkpoint is kept: go on with --resume", 1
        else:
            raise
    except KeyboardInterrupt:
        message, status = "stopped", 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    metrics = main()
    sys.exit(128 + metrics["signal"] if "signal" in metrics else 0)
