"""Stage 3: a model that has read a lot of Polish learns the style of the lyrics.

    python gpt_hf.py --input assets/input/input2.txt --epochs 3
    python gpt_hf.py --model_name FOLDER    # any causal model on this machine
    python gpt_hf.py --freeze_layers 8 --batch_size 1  # small machine
    python gpt_hf.py --resume               # continue after Ctrl-C or a crash
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
import pickle
import re
import shutil
import sys
import time
import unicodedata
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import filelock

# torch's threads spin while they wait; if they spin for long, a second busy program slows them down.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

# transformers and datasets take seconds to import: that is done where they are used, so that --help does not wait.

# ------------------------------------------------------------------------------------------ options
STAGE, SCRIPT = "hf", "gpt_hf.py"


class Stop(Exception):
    """Ends the program with one line. Stop(line): the user can put it right; Stop(line, 1): a failure."""


def option(default, help, low=0, high=1e9, choices=None):
    """A dataclass field that argparse is made from. A number must lie from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option: its name, type, default and help."""
    seed: int = option(2115, "seed of everything random", 0, 2**32 - 1)
    # files
    input: str = option("assets/input/input2.txt", "the text to learn from")
    output_dir: str = option("assets/hf_model", "folder for everything that the run writes")
    resume: bool = option(False, "continue from the last checkpoint in OUTPUT_DIR")
    sample_only: bool = option(False, "do not train: load OUTPUT_DIR/model and write samples")
    # the model
    model_name: str = option("flax-community/papuGaPT2", "pre-trained model: a Hub name or a local folder")
    revision: str = option("", "branch, tag or commit of the model on the Hub (default: the newest)")
    block_size: int = option(0, "tokens in a block (0: the model's context, at most 512)")
    freeze_layers: int = option(0, "leave the embeddings and the first N layers as they are")
    # training
    epochs: int = option(3, "passes over the training text", 1)
    max_steps: int = option(0, "stop after N optimizer steps, if the epochs have more (0: no limit)")
    batch_size: int = option(4, "blocks in a batch (per process)", 1, 2**20)
    gradient_accumulation_steps: int = option(1, "batches whose gradients are added up before a step", 1)
    learning_rate: float = option(1e-4, "peak learning rate; it falls linearly to 0", 1e-9)
    weight_decay: float = option(0.1, "decoupled weight decay")
    warmup: float = option(0.1, "linear warm-up: below 1 a share of the steps, else their number")
    patience: int = option(0, "stop after N epochs without a better validation loss (0: never)")
    # the computer
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    device: str = option("auto", "auto: the first available", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: the fastest", choices=("auto", "float32", "bfloat16", "float16"))
    # sampling
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(3, "texts to write", 1)
    max_new_tokens: int = option(300, "longest text, in tokens; the model may end the song earlier", 1)
    temperature: float = option(0.85, "below 1 plays safe, above 1 takes risks, 0: the likeliest")
    top_k: int = option(50, "draw from the k likeliest tokens (0: all)")
    top_p: float = option(0.92, "draw from the likeliest that have this probability", 1e-9, 1)
    repetition_penalty: float = option(1.3, "above 1: what was written already becomes less likely", 1e-9)
    no_repeat_ngram_size: int = option(3, "never write the same N tokens twice (0: allowed)")


# ---------------------------------------------------------------- a model that has read before
class Pretrained(NamedTuple):
    """What stages 1 and 2 have to learn from nothing, and what is needed to use it."""
    model: torch.nn.Module
    tokenizer: Any  # the one that the model was trained with: its numbers mean nothing to another
    end: int  # the token that ends a song
    context: int  # how many tokens the model sees


def load_pretrained(source: str, device, revision: str = "", offline: bool = True) -> Pretrained:
    """A causal language model in a folder or on the Hub, its weights in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = dict(revision=revision or None, local_files_only=offline, trust_remote_code=False)
    settings = AutoConfig.from_pretrained(source, **where)
    if getattr(settings, "activation_function", "") == "gelu_new":
        settings.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel: faster, smaller
    tokenizer = AutoTokenizer.from_pretrained(source, **where)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, config=settings, dtype=torch.float32, output_loading_info=True, **where)
    model.tie_weights()  # transformers before 5.4 leaves apart what a .bin file holds twice
    model.config.use_cache = True  # to generate
    end = tokenizer.eos_token_id
    if end is None:
        end = model.config.eos_token_id
    check_pretrained(source, model, tokenizer, end, report["missing_keys"])
    context = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    return Pretrained(model.to(device), tokenizer, end, context)


def freeze(model, count: int):
    """Leave the embeddings and the first `count` layers as they are. A head that shares the embedding is frozen too."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len)
    if count > len(layers):
        raise Stop(f"--freeze_layers {count} is too many: the model has {len(layers)}")
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    for module in [*embeddings, *layers[:count]] if count else ():
        module.requires_grad_(False)


# --------------------------------------------------------------------------------------------- data
SEPARATOR = "\n<|endoftext|>\n"  # between two songs in a file: with its line breaks, one token
END = "\0"  # that token inside this program; no text file holds this character


def split_corpus(text: str) -> tuple[str, str]:
    """Training and validation text, the same in every stage: cut at the song boundary nearest to 90 %.

    If there is none from 85 to 95 %, at the line end nearest to 90 %, else at the character.
    """
    target, low, high = (round(len(text) * share) for share in (0.90, 0.85, 0.95))
    for mark in (END, "\n"):
        cuts = [text.rfind(mark, 0, target) + 1, text.find(mark, target) + 1]  # before it, after it
        cuts = [cut for cut in cuts if max(low, 1) <= cut <= min(high, len(text) - 1)]
        if cuts:
            target = min(cuts, key=lambda cut: abs(cut - target))
            break
    return text[:target], text[target:]


def encode(text: str, base: Pretrained) -> tuple[list[int], bool]:
    """(tokens of a text whose songs are separated by END, whether they decode to exactly that text).

    A song is ordinary text: where it spells out a special token, it does not mean one.
    """
    ids, exact = [], True
    for number, song in enumerate(text.split(END)):
        new = base.tokenizer(song, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        exact &= base.tokenizer.decode(new, clean_up_tokenization_spaces=False) == song
        if number > 0:
            ids.append(base.end)
        ids += new
    return ids, exact


class Data(NamedTuple):
    """What a run reads."""
    blocks: Any  # to train on: a Dataset of rows of equal length
    part: torch.Tensor  # as long a part of the training text as the validation text has: (tokens + 1,)
    val: torch.Tensor  # the validation text: (tokens + 1,), as the first is only there to be read
    chars: int | None  # of the validation text; None: the tokenizer loses some
    text: str  # the training text
    tokens: int  # of the training text


def prepare(text: str, base: Pretrained, block_size: int) -> Data:
    """Pack the songs: one long row of tokens, an end after each song, cut into blocks. No place is wasted on padding.

    The end counts as a label like any other token: otherwise the model would not learn where a song ends.
    """
    from datasets import Dataset

    train_text, val_text = split_corpus(text)
    train, exact = encode(train_text, base)
    val, val_exact = encode(val_text, base)
    part, _ = encode(train_text[:len(val_text)], base)
    if len(train) < block_size or not val:
        enough = math.ceil((block_size + 2) * len(train_text) / max(1, len(train)) / 0.84)
        raise Stop(f"--input is too short ({len(text):,} characters): --block_size {block_size} takes about {enough:,}")
    starts = range(0, len(train) - block_size + 1, block_size)
    rows = [train[start:start + block_size] for start in starts]
    blocks = Dataset.from_dict(dict(input_ids=rows, labels=rows)).with_format("torch")
    return Data(blocks, torch.tensor([base.end, *part]), torch.tensor([train[-1], *val]),
                len(val_text) if exact and val_exact else None, train_text, len(train))


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, ids, chars: int | None, config: Config) -> tuple[float, float | None]:
    """(nats per token, bits per character or None) over all tokens but the first, each predicted exactly once.

    Consecutive windows that overlap by one token, in batches that do not depend on --batch_size: the
    same model always gets the same figure. `chars`: how many characters the tokens stand for.
    """
    model.eval()
    size = config.block_size
    lacking = -(len(ids) - 1) % size  # tokens that the last window is short of
    inputs = F.pad(ids[:-1], (0, lacking)).view(-1, size)
    targets = F.pad(ids[1:], (0, lacking), value=-100).view(-1, size)  # -100: none
    rows = max(1, 1024 // size)
    batches = list(zip(inputs.split(rows), targets.split(rows)))
    nats = tokens = 0.0  # sums
    for x, y in batches[RANK::WORLD]:  # (B, T) each
        with mixed_precision(config.dtype, model.device):
            logits = model(input_ids=x.to(model.device), use_cache=False).logits  # (B, T, vocab_size)
        nats += F.cross_entropy(logits.flatten(0, 1).float(), y.to(model.device).flatten(), reduction="sum").item()
        tokens += (y >= 0).sum().item()  # the last window may be short
    nats, tokens = average(nats), average(tokens)
    return nats / tokens, nats * WORLD / (math.log(2) * chars) if chars else None


def best_of(history: list[dict]) -> dict:
    """The record of the evaluation with the lowest loss, not counting the one before training."""
    return min(history[1:] or history, key=lambda record: record["val_loss"])


def is_done(history: list[dict], config: Config) -> bool:
    """Are all steps taken, or did `patience` epochs bring nothing better?"""
    since_best = len(history) - 1 - history.index(best_of(history))
    return history[-1]["iter"] >= config.max_steps or 0 < config.patience <= since_best


# -------------------------------------------------------------------------------------- fine-tuning
class ExactTrainer:
    """What of transformers' Trainer is replaced; fine_tune mixes this in. The Trainer does the rest:

    it draws the batches, takes the steps, and after each epoch evaluates and saves a checkpoint, of which
    it keeps the last and the best. A run that is continued from one goes the same way to the last bit.
    """

    def training_step(self, *args):
        """Forward and backward on one batch. The clock starts: it stands still while the Trainer evaluates and saves."""
        self.began = self.began or time.perf_counter()
        return super().training_step(*args)

    def log(self, logs: dict, start_time=None):
        """After each step: stop if the loss is no number, else show it. The history holds evaluations alone."""
        if "loss" not in logs:  # the Trainer's closing summary
            return
        loss, step, total = logs["loss"], self.state.global_step, self.config.max_steps
        if not math.isfinite(loss):
            raise Stop(NAN, 1)
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()
        if step % max(1, total // 10) == 0:
            pace = (time.perf_counter() - self.began) / (step - self.state.log_history[-1]["iter"])
            say(f"step {step:>5} of {total}  loss {loss:.3f}  {(total - step) * pace / 60:.1f} minutes left")

    def evaluate(self, *_, **__) -> dict:
        """Before training and after each epoch. The Trainer's own eval_loss is a mean over batches of unequal size.

        EarlyStoppingCallback is not right for us either: it starts counting anew when a run is continued.
        """
        history = self.state.log_history  # part of each checkpoint
        seconds = history[-1]["seconds"] if history else 0.0
        if self.began:
            seconds += time.perf_counter() - self.began
        self.began = None
        train_loss, train_bpc = evaluate(self.model, self.data.part, self.data.chars, self.config)
        val_loss, val_bpc = evaluate(self.model, self.data.val, self.data.chars, self.config)
        if not math.isfinite(train_loss + val_loss):
            raise Stop(NAN, 1)  # before anything is saved
        history.append(dict(
            iter=self.state.global_step, epoch=self.state.epoch or 0, train_loss=train_loss, train_bpc=train_bpc,
            val_loss=val_loss, val_bpc=val_bpc, learning_rate=self.lr_scheduler.get_last_lr()[0], seconds=seconds))
        best = len(history) > 1 and best_of(history) is history[-1]
        bits = f" = {val_bpc:.3f} bits/char" if val_bpc else ""
        say(f"step {self.state.global_step:>5}  epoch {history[-1]['epoch']:.2f}  train {train_loss:.3f}  "
            f"val {val_loss:.3f} nats/token{bits}" + "  best" * best)
        write_report(self.config.output_dir, history, self.facts)
        if is_done(history, self.config):
            self.control.should_training_stop = True
        return dict(eval_loss=val_loss)


def fine_tune(config: Config, base: Pretrained, data: Data, facts: dict, checkpoint: str) -> list[dict]:
    """Train, from the checkpoint if there is one. The history: a record an evaluation."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    class LyricsTrainer(ExactTrainer, Trainer):
        """transformers' Trainer, with exact figures."""

    names = TrainingArguments.__dataclass_fields__  # one option has a new name from transformers 5.23 on
    less_memory = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    device, warmup = base.model.device.type, config.warmup
    arguments = TrainingArguments(
        config.output_dir, seed=config.seed, report_to="none", disable_tqdm=True,
        # The steps: AdamW, a rate that rises to its peak and falls linearly to zero, gradients clipped to norm 1.
        max_steps=config.max_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        warmup_steps=int(warmup * config.max_steps if warmup < 1 else warmup),
        # Evaluate before the first step: what fine-tuning buys is the difference. Then after each epoch.
        eval_on_start=not checkpoint, eval_strategy="epoch",
        # Save then, too, and keep two checkpoints: the last and, by the loss that evaluate returns, the best.
        save_strategy="epoch", save_total_limit=2, metric_for_best_model="loss", greater_is_better=False,
        # Call log after each step, with the loss as it is.
        logging_steps=1, logging_nan_inf_filter=False,
        # The computer: half the bits in matrix products, float32 in the weights.
        bf16=facts["dtype"] == "bfloat16", fp16=facts["dtype"] == "float16",
        use_cpu=device == "cpu", dataloader_pin_memory=device == "cuda", **{less_memory: config.gradient_checkpointing})
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: torchrun, never the slow DataParallel
    trainer = LyricsTrainer(base.model, arguments, default_data_collator, data.blocks, data.val,
                            processing_class=base.tokenizer)
    trainer.config, trainer.data, trainer.facts, trainer.began = config, data, facts, None
    done = int(checkpoint.rpartition("-")[2] or 0)  # steps
    hidden = None if RANK == 0 and sys.stderr else True  # None: hidden where nobody watches
    with tqdm(total=config.max_steps, initial=done, unit="step", leave=False, disable=hidden) as trainer.bar:
        trainer.train(resume_from_checkpoint=checkpoint or None)
    return trainer.state.log_history


# ----------------------------------------------------------------------------------------- sampling
def sampling_settings(config: Config, end: int):
    """What generate() goes by, here and wherever the model folder is loaded."""
    from transformers import GenerationConfig

    draw = dict(do_sample=True, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return GenerationConfig(
        **(draw if config.temperature else {}),  # else the likeliest
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        bos_token_id=end, eos_token_id=end, pad_token_id=end)


def sample_text(base: Pretrained, config: Config, number: int) -> str:
    """What the model writes after the prompt, to the end of the song at most. Same seed and number, same text.

    When the context is full, its last half is kept and read again: no position beyond the limit is ever used.
    """
    device = base.model.device
    torch.manual_seed(hash((config.seed, -1, number)))
    prompt = encode(config.prompt, base)[0] or [base.end]  # a new song starts where another has ended
    ids, seen = list(prompt), len(prompt)  # seen: how many of the last tokens the model reads
    while len(ids) < len(prompt) + config.max_new_tokens and ids[len(prompt):][-1:] != [base.end]:
        if seen >= base.context:
            seen = base.context // 2
        context = torch.tensor([ids[-seen:]], device=device)  # (1, T)
        room = min(len(prompt) + config.max_new_tokens - len(ids), base.context - seen)
        # On a CPU casts to bfloat16 cost more than they save, with one position at a time.
        with mixed_precision("float32" if device.type == "cpu" else config.dtype, device):
            new = base.model.generate(context, attention_mask=torch.ones_like(context), max_new_tokens=room)
        ids += new[0, seen:].tolist()
        seen = new.size(1)
    if ids[len(prompt):][-1:] == [base.end]:
        ids.pop()
    given, whole = (base.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (prompt, ids))
    return whole[len(given):]


# -------------------------------------------------------------------------------- how much is copied
def words_of(text: str) -> list[str]:
    """The words, without case and punctuation. Example: words_of("Raz, dwa!") is ["raz", "dwa"]."""
    return re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower())


def copy_rate(texts: list[str], source: str, length: int = 8) -> tuple[float | None, int]:
    """(share of the texts' runs of `length` words that stand in the source, longest run in words that does).

    Example: copy_rate(["A, b c x"], "z a b C", length=2) is (2/3, 3): "a b" and "b c" are copied, "c x" is not.
    """
    songs = [" ".join(words_of(song)) for song in source.split(END)]
    source = "".join(f" {song} \n" for song in songs)  # no run goes from one song to the next
    runs, longest = [], 0
    for text in texts:
        words = words_of(text)
        runs += [" ".join(words[i:i + length]) for i in range(len(words) - length + 1)]
        for i in range(len(words)):
            while i + longest < len(words) and f" {' '.join(words[i:i + longest + 1])} " in source:
                longest += 1
    copied = sum(f" {run} " in source for run in runs)
    return copied / len(runs) if runs else None, longest


# ------------------------------- the end of the lesson: devices, files, command line
def pick_device(name: str) -> torch.device:
    """The device to use; auto: the first available of cuda, mps, cpu."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise Stop(f"--device {name}: there is none here; use --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def mixed_precision(name: str, device: torch.device) -> torch.autocast:
    """A context to compute in; auto: bfloat16 where the hardware has it, float16 on an older GPU, else float32."""
    if name == "auto" and device.type == "cuda":  # is_bf16_supported() would count a slow emulation
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    elif name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if fast and device.type == "cpu" else "float32"
    return torch.autocast(device.type, getattr(torch, name), enabled=name != "float32")


def keep_memory():
    """Let freed memory stay with the process: glibc gives large tensors back, and each step asks for them anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: map only what is larger
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give back only more


# Several processes, as torchrun starts them: each has a rank. The first alone writes and prints.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
IN_NOTEBOOK = "kernel" in os.path.basename((sys.argv or [""])[0])  # then sys.argv is the kernel's


def say(text: str):
    """Print a line above the progress bar, in the first process alone."""
    if RANK == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def average(number: float) -> float:
    """The mean of a number over all processes."""
    total = torch.tensor(number, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(total)
    return total.item() / WORLD


def join_processes(facts: dict):
    """Meet the other processes of this run. Stop if they differ in the text or in what they make of it."""
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in facts["device"] else "gloo")
        everybodys = [None] * WORLD
        dist.all_gather_object(everybodys, facts | dict(device=""))
        if any(other != everybodys[0] for other in everybodys):
            raise Stop("the processes of this run have different texts or options: give all the same")


# --------------------------------------------------------------------------------- options and text
# With --resume these must be what they were, as they change what a step computes. Others may change,
# epochs and max_steps only grow.
FIXED = {"model_name", "revision", "batch_size", "gradient_accumulation_steps", "block_size", "learning_rate",
         "weight_decay", "warmup", "freeze_layers", "seed"}
# All that has an effect with --sample_only.
SAMPLING = {"output_dir", "sample_only", "seed", "device", "dtype", "prompt", "num_samples", "max_new_tokens", "temperature",
            "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"}


def check_values(options: dict):
    """Stop if an option is not known, or its value is of another type or out of its range."""
    for name, value in options.items():
        f = Config.__dataclass_fields__.get(name)
        if not f or type(value) is not f.type:
            raise Stop(f"--{name} {value!r} is not an option of this version")
        low, high, choices = (f.metadata[limit] for limit in ("low", "high", "choices"))
        if choices and value not in choices or f.type in (int, float) and not low <= value <= high:
            raise Stop(f"--{name} {value}: must be {choices or f'a finite number, at least {low} and at most {high:g}'}")


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {SCRIPT} --help lists the options")

    parser = argparse.ArgumentParser(SCRIPT, description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        note = "" if f.default in ("", False) else f" (default: {f.default})"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + note, **kind)
    given = vars(parser.parse_args(argv))
    check_values(given)  # the ranges: argparse knows types and choices
    if "prompt" in given:  # bytes that are not UTF-8 come from a shell as lone surrogates: drop them
        given["prompt"] = unicodedata.normalize("NFC", given["prompt"].encode(errors="ignore").decode())
    for name in given.keys() - SAMPLING if "sample_only" in given else ():
        raise Stop(f"--{name} has no effect with --sample_only: leave one of them out")
    if "revision" in given and os.path.isdir(given.get("model_name", "")):
        raise Stop("--revision needs a --model_name of the Hub, not a folder: leave it out")
    return given


def inherit(given: dict, folder: Path) -> tuple[dict, dict]:
    """(the options that were given and, where they say nothing, those of the run to resume; that run's config.json)."""
    if "resume" not in given:
        return given, {}
    if not is_run(folder):
        raise Stop(f"no run to resume in {folder}: leave out --resume, or name the run's --output_dir")
    run = read_json(folder / "config.json")
    old = dict(run["options"])
    check_values(old)
    for name in FIXED & given.keys():
        if given[name] != old.get(name):
            raise Stop(f"--{name} {given[name]} contradicts the run's {old.get(name)}: leave it out, or leave out --resume")
    if "epochs" in given:  # then the steps are counted anew
        old.pop("max_steps")
    for name in ("output_dir", "sample_only"):  # where a run writes is said by the command line alone
        old.pop(name)
    return old | given, run


def make_config(given: dict, data: Data, history: list[dict]) -> Config:
    """Settle the number of steps: those of all epochs, or --max_steps."""
    known = asdict(Config(**given))
    batches = math.ceil(len(data.blocks) / (known["batch_size"] * WORLD))
    steps = known["epochs"] * math.ceil(batches / known["gradient_accumulation_steps"])
    known["max_steps"] = min(known["max_steps"] or steps, steps)
    if history and known["max_steps"] < history[-1]["iter"]:
        raise Stop(f"the run is at step {history[-1]['iter']} already: --epochs and --max_steps may only grow")
    return Config(**known)


def read_corpus(path: str) -> str:
    """The text of a UTF-8 file, its songs separated by END. A BOM and Windows line ends are tolerated."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # also turns \r\n into \n
    except OSError as e:
        raise Stop(f"cannot read --input {path} ({e.strerror}): name a text file") from None
    except UnicodeDecodeError:
        raise Stop(f"{path} is not UTF-8 (UTF-16, cp1250?): save it as UTF-8 text") from None
    if END in text:
        raise Stop(f"{path} is not a text file (it holds zero bytes): save it as UTF-8 text")
    text = unicodedata.normalize("NFC", text)  # ó as one character, not o and an accent
    pieces = re.split(r"^[ \t]*<\|endoftext\|>[ \t]*$", f"\n{text}\n", flags=re.MULTILINE)
    songs = [piece[1:-1] for piece in pieces if piece.strip("\n")]  # each between two line breaks
    text = END.join(songs)
    if not text.strip():
        raise Stop(f"{path} is empty: put lyrics in it")
    rule = r"|^[-=*#_~]{3,}$" if len(songs) == 1 else ""  # inside songs such a line may be theirs
    mark = re.search(r"<\|?/?\w+\|?>" + rule, text, re.MULTILINE)
    if mark:
        say(f"note: {mark[0]} in {path} is read as text, {len(songs)} song(s) in all; "
            "a line that holds only <|endoftext|> separates two")
    return text


# --------------------------------------------------------------------------- models and checkpoints
NAN = "the loss turned NaN: lower --learning_rate"
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
           pickle.UnpicklingError, zipfile.BadZipFile)  # what a file that is none may raise


def find_pretrained(source: str, device, revision: str = "") -> Pretrained:
    """load_pretrained, first without the network: what was downloaded once needs none. Stop says what is wrong."""
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or a thread asks the Hub to convert .bin weights
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    hub.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.enable_progress_bars()  # those of a download
    warnings.filterwarnings("ignore", "mtime may not be reliable")  # an early transformers on the order of checkpoints
    local = os.path.isdir(source)
    if not local and (source.startswith((".", "/", "~")) or source.count("/") > 1 or os.path.exists(source)):
        raise Stop(f"there is no model folder {source}: name a folder that holds a config.json, or a model of the Hub")
    for offline in (True, False):
        try:
            return load_pretrained(source, device, revision, offline)
        except (*DAMAGED, OSError, ImportError, SafetensorError) as e:
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
        if local:
            raise Stop(f"{source} holds no causal language model that can be read ({reason}): name another")
    raise Stop(f"cannot get {source} ({reason}): go online, or give --model_name a local folder")


def check_pretrained(source: str, model, tokenizer, end, missing):
    """Stop unless it is a whole causal language model, with a tokenizer that fits and an end token."""
    if missing:
        raise Stop(f"{source} is incomplete ({min(missing)} is missing): name another model")
    if not isinstance(end, int):
        raise Stop(f"the model {source} has no end token (eos_token) to put between songs: name another model")
    top, rows = max(end, *tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if top >= rows:
        raise Stop(f"the tokenizer in {source} does not fit: its numbers go up to {top}, the model's to {rows - 1}")
    with torch.no_grad():  # two texts that differ in the second token: what is predicted after the first?
        one, other = (model.eval()(torch.tensor([[end, token]])).logits[0, 0] for token in (end, (end + 1) % rows))
    if not one.isfinite().all():
        raise Stop(f"the weights in {source} hold numbers that are NaN or infinite: name another model")
    if not torch.allclose(one, other):
        raise Stop(f"{source} is no causal language model: {type(model).__name__} sees the future, as BERT does")


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def fault_of(checkpoint: Path) -> str:
    """The first file of a checkpoint that is missing or damaged; "" if it is whole."""
    ranks = [f"rng_state_{rank}.pth" for rank in range(WORLD)] if WORLD > 1 else ["rng_state.pth"]
    needed = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", *ranks]
    for path in [checkpoint / name for name in needed] + sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                safe_open(path, "pt")  # it compares the lengths
            elif path.suffix in (".pt", ".pth") and zipfile.ZipFile(path).testzip():
                raise ValueError  # a wrong checksum
            if path.name == "trainer_state.json":
                best_of(content["log_history"])  # is it one of this script's?
        except FileNotFoundError:
            return f"{path.name} is missing"
        except (*DAMAGED, OSError, SafetensorError):
            return f"{path.name} is damaged"
    return ""


def last_checkpoint(folder: Path) -> tuple[str, list[dict]]:
    """(the newest whole checkpoint, its history), or ("", []) if none was ever finished. Stop if all are damaged.

    The Trainer writes straight into checkpoint-N, trainer_state.json last, and its get_last_checkpoint
    takes what a kill left half written.
    """
    paths = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    finished = [path for path in paths if (path / "trainer_state.json").exists()]
    faults = []
    for path in sorted(finished, key=lambda path: int(path.name[11:]), reverse=True):
        fault = fault_of(path)
        if not fault:
            say(f"continuing from {path}" + "".join(f" ({fault})" for fault in faults))
            return str(path), read_json(path / "trainer_state.json")["log_history"]
        faults.append(f"{path.name}: {fault}")
    if faults:
        raise Stop(f"no checkpoint in {folder} is whole ({'; '.join(faults)}): start a new run without --resume")
    say(f"there is no finished checkpoint in {folder}: starting over")
    return "", []


# ------------------------------------------------------------------------------------------------ files
@contextlib.contextmanager
def replacing(path):
    """A new file that takes the place of the one at the path once it is whole: a kill leaves one or the other."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk, not only on its way there
        os.replace(temporary, path)  # at once: nobody sees half a file
    finally:
        temporary.unlink(missing_ok=True)


def keep_previous(path: Path):
    """Rename what stands at the path: nothing is ever overwritten."""
    new = path.with_name(f"{path.name}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
    while new.exists():
        new = new.with_name(new.name + "+")
    if path.exists():
        path.rename(new)


def is_run(folder: Path) -> bool:
    """Does the folder belong to a run? Its config.json says so."""
    try:
        return {"options", "corpus_sha256"} <= json.loads((folder / "config.json").read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def write_json(path: str, content: dict):
    """Write a dictionary that a person can read."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def check_targets(given: dict):
    """Stop unless the run may write where it is told to. Leaves no trace."""
    folder = Path(given.get("output_dir", Config.output_dir)).resolve()
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Stop(f"cannot write --output_dir {folder} ({parent}): choose another")
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()) or is_run(folder))
    held = [Path.cwd(), *(Path(given.get(name, getattr(Config, name))).resolve() for name in ("input", "model_name"))]
    if taken or "resume" not in given and any(path.is_relative_to(folder) for path in held):
        raise Stop(f"cannot write --output_dir {folder} (it is no folder of a run, or it holds the text, the model or the "
                   "current folder): choose another")


@contextlib.contextmanager
def run_folder(config: Config, facts: dict):
    """The run's folder, for this process alone. What an earlier run left there is kept under another name."""
    folder = Path(config.output_dir).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()  # until the run has ended
    except filelock.Timeout:
        raise Stop(f"another process writes to --output_dir {config.output_dir}: wait, or choose another") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        if not config.resume and folder.exists() and any(folder.iterdir()):
            keep_previous(folder)  # as a whole
        folder.mkdir(exist_ok=True)
        for unfinished in folder.glob("*.tmp"):  # left by a kill
            unfinished.unlink()
        versions = {name: version(name) for name in ("torch", "transformers", "datasets", "accelerate")}
        write_json(folder / "config.json", dict(facts, options=asdict(config), versions=versions))
        yield
    except FAILURES as e:
        if any(folder.glob("checkpoint-*/trainer_state.json")):
            e.add_note("the last good checkpoint is kept")
        e.add_note(f"continue with: python {SCRIPT} --resume --output_dir {config.output_dir!r}")
        raise
    finally:
        lock.release()


def write_report(folder: str, history: list[dict], facts: dict, **copied) -> dict:
    """Write metrics, which are returned, and the plot of both losses: where they part, the model begins to memorize."""
    from matplotlib.figure import Figure  # here, as it takes a second to import

    before, last, best = history[0], history[-1], best_of(history)
    tokens = last["epoch"] * facts["tokens_per_epoch"]
    metrics = dict(
        facts, stage=STAGE, val_loss_before=before["val_loss"], val_bpc_before=before["val_bpc"], val_loss=best["val_loss"],
        val_bpc=best["val_bpc"], train_bpc=best["train_bpc"], best_iter=best["iter"], iters=last["iter"], epochs=last["epoch"],
        seconds=last["seconds"], tokens_per_second=tokens / max(last["seconds"], 1e-9), **copied)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss, nats per token")
    for name, color, label in (("train_loss", "#0072B2", "training"), ("val_loss", "#D55E00", "validation")):
        axes.plot([r["epoch"] for r in history], [r[name] for r in history], color=color, marker=".", label=label)
    axes.legend()
    if RANK == 0:
        write_json(f"{folder}/metrics.json", metrics)
        with replacing(f"{folder}/metrics.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in history)
        with replacing(f"{folder}/loss.png") as file:
            figure.savefig(file, dpi=120)
    return metrics


def write_samples(base: Pretrained, config: Config, name: str) -> list[str]:
    """Write the texts to a file and to the screen: what is shown is what is saved. Returns them without the prompt."""
    base.model.generation_config = sampling_settings(config, base.end)
    path, texts = Path(config.output_dir, "output", name), []
    path.parent.mkdir(exist_ok=True)
    keep_previous(path)
    with replacing(path) as file:
        for number in range(config.num_samples):
            texts.append(sample_text(base, config, number))
            text = config.prompt + texts[-1] + (SEPARATOR if number + 1 < config.num_samples else "\n")
            file.write(text.encode())
            print(text, end="", flush=True)
    print(f"-> {path}")
    return texts


def write_model(base: Pretrained, folder: Path):
    """Write a model folder, as from_pretrained reads it, beside the old one, and only then put it in its place."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # left by a kill
    base.model.save_pretrained(new)
    base.tokenizer.save_pretrained(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


# ------------------------------------------------------------------------------------------------- main
FAILURES = (Stop, OSError, MemoryError, RuntimeError, SafetensorError, KeyboardInterrupt)  # what may end a run
MEMORY = "out of memory: lower --batch_size (and raise --gradient_accumulation_steps) or --block_size"
DISK = "cannot write: is the disk full?"
KNOWN = {"allocate": MEMORY, "out of memory": MEMORY, "connection": "another process of this run is gone",
         "pytorchstreamwriter": DISK, "inline_container": DISK, "serializ": DISK}


def make_facts(config: Config, base: Pretrained, data: Data, text: str) -> dict:
    """What can be said of a run before it starts."""
    model = base.model
    rows = model.get_input_embeddings().num_embeddings
    return dict(
        params=model.num_parameters(), trainable=model.num_parameters(only_trainable=True), vocab_size=rows,
        chars_per_token=len(data.text) / data.tokens, tokens_per_vocab_entry=data.tokens / rows,
        tokens_per_epoch=len(data.blocks) * config.block_size,
        device=str(model.device), dtype=str(mixed_precision(config.dtype, model.device).fast_dtype).removeprefix("torch."),
        seed=config.seed, corpus_sha256=hashlib.sha256(text.encode()).hexdigest())


def sample(given: dict, folder: Path, device) -> dict:
    """Write samples of the model that a run left. Its metrics."""
    config = Config(**given)
    if not is_run(folder) or not (folder / "model").is_dir():
        raise Stop(f"there is no model in {folder}: train first, or name the run's --output_dir")
    write_samples(find_pretrained(str(folder / "model"), device), config, "sample.txt")
    return read_json(folder / "metrics.json")


def finish(config: Config, history: list[dict], facts: dict, data: Data, device) -> dict:
    """Leave the best model in OUTPUT_DIR/model, and samples of what it writes. The metrics, with what is copied."""
    folder = Path(config.output_dir)
    base = find_pretrained(str(folder / f"checkpoint-{best_of(history)['iter']}"), device)
    texts = write_samples(base, config, "sample.txt")
    write_model(base, folder / "model")
    rate, longest = copy_rate(texts, data.text)
    metrics = write_report(config.output_dir, history, facts, copy_rate=rate, copy_longest=longest)
    name, unit = ("bpc", "bits/char") if data.chars else ("loss", "nats/token")
    old, new = metrics[f"val_{name}_before"], metrics[f"val_{name}"]
    say(f"Validation: {old:.3f} {unit} before, {new:.3f} after{' (worse!)' * (new > old)}. Copied from the training text: "
        f"{rate or 0:.1%} of the samples' runs of 8 words, {longest} words at a stretch.\n-> {folder / 'model'}")
    return metrics


def run(given: dict) -> dict:
    """Train, then sample; or only sample. All that can be wrong is found before anything is written. The metrics."""
    folder = Path(given.get("output_dir", Config.output_dir))
    given, old_run = inherit(given, folder)
    device = pick_device(given.get("device", "auto"))
    if device.type == "cpu" and given.get("dtype") == "float16":
        raise Stop("--dtype float16 needs a GPU: use --dtype auto")
    if "sample_only" in given:
        return sample(given, folder, device)
    check_targets(given)
    text = read_corpus(given.get("input", Config.input))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if old_run and sha256 != old_run["corpus_sha256"]:
        raise Stop("--input is not the text that this run began with (its SHA-256 differs): give that one, or start a new "
                   "run in another --output_dir")
    checkpoint, history = last_checkpoint(folder) if old_run else ("", [])
    name, revision = (given.get(name, getattr(Config, name)) for name in ("model_name", "revision"))
    base = find_pretrained(checkpoint or name, device, "" if checkpoint else revision)
    block_size = given.get("block_size") or min(512, base.context)
    if block_size > base.context:
        raise Stop(f"--block_size {block_size} is beyond the context of the model: at most {base.context}")
    data = prepare(text, base, block_size)
    config = make_config(given | dict(block_size=block_size), data, history)
    freeze(base.model, config.freeze_layers)
    facts = make_facts(config, base, data, text)
    join_processes(facts)
    keep_memory()
    with run_folder(config, facts) if RANK == 0 else contextlib.nullcontext():
        say(f"{facts['params']:,} parameters on {facts['device']} in {facts['dtype']}: {len(text):,} characters, "
            f"{config.max_steps} steps")
        if not data.chars:
            say("warning: this tokenizer does not give the text back exactly, so there are no bits per character")
        if old_run and old_run["options"]["max_steps"] != config.max_steps:
            say(f"note: the learning rate is planned anew for {config.max_steps} steps")
        if RANK == 0 and not checkpoint:
            say("before training it writes:")
            write_samples(base, config, "sample_before.txt")
        if not history or not is_done(history, config):
            history = fine_tune(config, base, data, facts, checkpoint)
        if RANK == 0:
            return finish(config, history, facts, data, device)
        return write_report(config.output_dir, history, facts)


def main(argv=None) -> dict:
    """Run with these arguments, by default the command line's. Returns what metrics.json holds."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8; a file that somebody watches
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        if argv is None:
            argv = [] if IN_NOTEBOOK else sys.argv[1:]
        return run(parse_args(argv))
    except FAILURES as e:
        failure, message, status = e, str(e), 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if isinstance(failure, Stop):
        message, status = (*failure.args, 2)[:2]
    elif isinstance(failure, KeyboardInterrupt):
        message, status = "stopped", 130
    elif isinstance(failure, OSError):
        message = f"{failure.filename or 'writing'}: {failure.strerror}"
    else:
        message = "allocate" if isinstance(failure, MemoryError) else message.lower()
        message = next((line for sign, line in KNOWN.items() if sign in message), None)
        if not message:
            raise failure
    line = "; ".join([message, *getattr(failure, "__notes__", ())])
    print(line if status == 130 else f"error: {line}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
