# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "transformers>=5.0", "datasets>=3.0", "accelerate>=1.7",
#                 "tqdm>=4.66.3", "matplotlib>=3.9", "filelock>=3.16", "safetensors>=0.4.3"]
# ///
"""Stage 3: a model that has read a lot of Polish learns the style of the lyrics.

    python gpt_hf.py --input lyrics.txt     # two cores: 20 minutes a megabyte
    python gpt_hf.py --model_name FOLDER    # any causal model on this machine
    python gpt_hf.py --freeze_layers 8 --batch_size 1    # small machine
    python gpt_hf.py --lora 16 --learning_rate 1e-3      # large model
    python gpt_hf.py --resume               # continue after Ctrl-C or a crash
    python gpt_hf.py --sample_only --prompt "Noc nad miastem"
    torchrun --nproc_per_node=2 gpt_hf.py   # several GPUs

It writes OUTPUT_DIR/model, a folder that transformers' from_pretrained loads.

In a Colab cell:  import gpt_hf; gpt_hf.main(["--input", "lyrics.txt"])
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import tempfile
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
from safetensors import SafetensorError
from tqdm.auto import tqdm

# transformers and datasets take seconds to import: only where they are used, so that --help is quick.

# ------------------------------------------------------------------------------------------ options
STAGE, SCRIPT = "hf", "gpt_hf.py"


class Stop(Exception):
    """Ends the program with one line. Stop(line): the user can fix it; Stop(line, 1): a failure."""


def option(default, help, low=0, high=1e9, choices=None):
    """A field of Config, and so a command-line option. A number must lie from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option: its name, type, default and help."""
    seed: int = option(2115, "random seed", 0, 2**32 - 1)
    # files
    input: str = option("assets/input/input2.txt", "the text to learn from")
    output_dir: str = option("assets/hf_model", "folder for everything that the run writes")
    resume: bool = option(False, "continue from the last checkpoint in OUTPUT_DIR")
    sample_only: bool = option(False, "do not train: load OUTPUT_DIR/model and write samples")
    interactive: bool = option(False, "do not train: continue what you type, again and again")
    # the model
    model_name: str = option("flax-community/papuGaPT2", "pre-trained model: a Hub name or a folder")
    revision: str = option("", "branch, tag or commit on the Hub (default: the newest)")
    block_size: int = option(0, "tokens in a block (0: the model's context, at most 512)")
    freeze_layers: int = option(0, "freeze the embeddings and the first N layers")
    lora: int = option(0, "train only adapters of this rank (0: off); try --learning_rate 1e-3", 0, 1024)
    # training
    epochs: int = option(3, "passes over the training text", 1)
    max_steps: int = option(0, "stop after N steps, if the epochs have more (0: no limit)")
    batch_size: int = option(4, "blocks in a batch (per process)", 1, 2**20)
    gradient_accumulation_steps: int = option(1, "batches whose gradients are accumulated for one step", 1)
    learning_rate: float = option(1e-4, "peak learning rate; it falls linearly to 0", 1e-9)
    weight_decay: float = option(0.1, "decoupled weight decay")
    warmup: float = option(0.1, "linear warm-up: below 1 a fraction of the steps, else their number")
    patience: int = option(0, "stop after N epochs without a better validation loss (0: never)")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    report_to: str = option("none", "where the Trainer logs to, such as tensorboard or wandb")
    # the computer
    device: str = option("auto", "auto: the first available", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: the fastest", choices=("auto", "float32", "bfloat16", "float16"))
    # sampling
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(3, "texts to write", 1)
    max_new_tokens: int = option(300, "longest text, in tokens; the song may end earlier", 1)
    temperature: float = option(0.85, "below 1 plays safe, above 1 takes risks, 0: the likeliest")
    top_k: int = option(50, "draw from the k likeliest tokens (0: all)")
    top_p: float = option(0.92, "draw from the likeliest that add up to this probability", 1e-9, 1)
    repetition_penalty: float = option(1.3, "above 1: tokens already written become less likely", 1e-9)
    no_repeat_ngram_size: int = option(3, "never write the same N tokens twice (0: allowed)")


# ---------------------------------------------------------------- a model that has read before
# A run: load_pretrained, prepare, freeze or add_adapters, fine_tune, sample_text; see `run` at the end.
# What is used before it is defined (say, average, RANK) is in the second half of the file.
class Pretrained(NamedTuple):
    """A pre-trained model, and what is needed to use it."""
    model: torch.nn.Module
    tokenizer: Any  # the one the model was trained with: others number tokens differently
    end: int  # the number of the token that ends a song
    context: int  # how many tokens the model sees at most


def load_pretrained(source: str, device, revision: str = "", offline: bool = True, dtype=torch.float32) -> Pretrained:
    """The causal language model in a folder or on the Hub.

    Stages 1 and 2 begin with random weights; these were learned from gigabytes of text. Some are stored
    in 16 bits, where a small step would be rounded away: they are loaded and trained in float32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = dict(revision=revision or None, local_files_only=offline, trust_remote_code=False)
    settings = AutoConfig.from_pretrained(source, **where)
    check_settings(source, settings)
    if getattr(settings, "activation_function", "") == "gelu_new":
        settings.activation_function = "gelu_pytorch_tanh"  # the same in one kernel: faster, less memory
    tokenizer = library(AutoTokenizer.from_pretrained, source, **where)
    model, report = AutoModelForCausalLM.from_pretrained(
        source, config=settings, dtype=dtype, output_loading_info=True,
        ignore_mismatched_sizes=True, **where)  # they are in the report
    model.tie_weights()  # transformers before 5.4 does not tie what a .bin file stores twice
    model.config.use_cache = True  # for generation; the Trainer turns it off, and saves that
    end = tokenizer.eos_token_id
    if end is None:
        end = model.config.eos_token_id
    context = getattr(settings, "max_position_embeddings", None) or sys.maxsize  # or no limit
    base = Pretrained(model.to(device), tokenizer, end, context)
    check_pretrained(source, base, report)
    return base


def freeze(model, count: int):
    """Freeze the embeddings and the first `count` layers: less memory, less forgetting.

    A head that shares its weights with the embedding is frozen with it.
    """
    # Architectures name their layers differently; they are always the longest list of modules.
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=len)
    if count > len(layers):
        raise Stop(f"--freeze_layers {count} is too many: the model has {len(layers)}")
    if count:
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) or module in layers[:count]:
                module.requires_grad_(False)


def add_adapters(base: Pretrained, config: Config) -> Pretrained:
    """LoRA (Hu et al., arXiv:2106.09685): the weights are frozen; x W becomes x W + 2 x A B.

    A has --lora columns and B as many rows: for a W of 1024 x 1024 and --lora 16, 33 thousand numbers
    are trained instead of a million, so gradients and AdamW need little memory. As W never changes, it
    may have 16 bits.
    """
    import peft

    torch.manual_seed(config.seed)  # A is drawn at random; B is zero, so at first nothing changes
    with warnings.catch_warnings(action="ignore"):  # that GPT-2 stores its matrices transposed
        model = peft.get_peft_model(base.model, peft.LoraConfig(
            task_type="CAUSAL_LM", r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear"))
    return base._replace(model=model)


def merge_adapters(base: Pretrained, checkpoint: Path) -> Pretrained:
    """Add a checkpoint's 2 A B to each W. The result is an ordinary model that does not need peft."""
    base.model.load_adapter(checkpoint, "default")  # peft's name for the only adapter
    model = base.model.merge_and_unload()
    model.config.use_cache = True  # as load_pretrained has it
    return base._replace(model=model)


# --------------------------------------------------------------------------------------------- data
SEPARATOR = "\n<|endoftext|>\n"  # between two songs in a file; one token, line breaks included
END = "\0"  # that token inside this program; no text file contains this character


def split_corpus(text: str) -> tuple[str, str]:
    """Training and validation text, the same in every stage: cut at the song boundary nearest to 90 %.

    If there is none between 85 and 95 %, at the line end nearest to 90 %; failing that, at exactly 90 %.
    """
    target = round(0.90 * len(text))
    low = round(0.85 * len(text))
    high = min(len(text) - 1, round(0.95 * len(text)))  # no part may be empty
    for mark in (END, "\n"):
        before = text.rfind(mark, 0, target) + 1
        after = text.find(mark, target) + 1
        cuts = [cut for cut in (before, after) if low <= cut <= high]
        if cuts:
            target = min(cuts, key=lambda cut: abs(cut - target))
            break
    return text[:target], text[target:]


def encode(text: str, base: Pretrained) -> tuple[list[int], bool]:
    """(tokens of a text with END between its songs, whether they decode to exactly that text).

    A song is ordinary text: a special token that is spelled out in it is not treated as one.
    """
    ids, exact = [], True
    for song in text.split(END):
        new = library(base.tokenizer, song, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        exact &= base.tokenizer.decode(new, clean_up_tokenization_spaces=False) == song
        ids += [*new, base.end]
    return ids[:-1], exact  # ends only between songs


class Data(NamedTuple):
    """What a run reads."""
    text: str  # the training text
    tokens: int  # its number of tokens
    blocks: Any  # to train on: a Dataset of rows of block_size tokens
    val_text: str
    val: torch.Tensor  # its tokens, (tokens + 1,): the first is only context
    part: torch.Tensor  # of the training text's beginning, as long as val_text: what is memorized?
    chars: int | None  # characters in val and in part; None if the tokenizer loses some


def prepare(text: str, base: Pretrained, block_size: int) -> Data:
    """Pack the songs: one long row of tokens with an end between songs, cut into blocks; nothing is padded.

    The end is a label like any other token, or the model would not learn where a song ends.
    """
    from datasets import Dataset

    train_text, val_text = split_corpus(text)  # as in the other stages, so figures can be compared
    train, train_exact = encode(train_text, base)
    val, val_exact = encode(val_text, base)
    part, _ = encode(train_text[:len(val_text)], base)
    if len(train) < block_size or not val:
        chars_per_token = len(train_text) / max(1, len(train))
        enough = math.ceil((block_size + 2) * chars_per_token / 0.84)  # 85 % or more are to train on
        raise Stop(f"--input is too short ({len(text):,} characters): "
                   f"--block_size {block_size} takes about {enough:,}")
    starts = range(0, len(train) - block_size + 1, block_size)  # the rest, too short for a block, is left out
    rows = [train[start:start + block_size] for start in starts]
    return Data(
        text=train_text, tokens=len(train),
        # Labels are the inputs: the model itself shifts them by one.
        blocks=Dataset.from_dict(dict(input_ids=rows, labels=rows)).with_format("torch"),
        val_text=val_text, val=torch.tensor([train[-1], *val]), part=torch.tensor([base.end, *part]),
        chars=len(val_text) if train_exact and val_exact else None)


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def token_losses(model, ids, config: Config, rank: int = 0, world: int = 1) -> torch.Tensor:
    """Nats for each token but the first, each predicted once: (tokens,); of process `rank`, its share.

    Consecutive windows that overlap by one token, in batches that do not depend on --batch_size.
    """
    model.eval()
    size, device, losses = config.block_size, model.device, [torch.zeros(0)]
    lacking = -(len(ids) - 1) % size  # tokens missing from the last window
    inputs = F.pad(ids[:-1], (0, lacking)).view(-1, size)
    targets = F.pad(ids[1:], (0, lacking), value=-100).view(-1, size)  # -100: no token there
    rows = max(1, 1024 // size)
    batches = list(zip(inputs.split(rows), targets.split(rows)))  # the same in every process
    for x, y in batches[rank::world]:  # (B, T) each
        with mixed_precision(config.dtype, device):
            logits = model(input_ids=x.to(device), use_cache=False).logits  # (B, T, vocab_size)
        logits = logits.flatten(0, 1).float()  # (B * T, vocab_size)
        nats = F.cross_entropy(logits, y.to(device).flatten(), reduction="none").cpu()
        losses.append(nats[y.flatten() >= 0])  # the last window may be short
    return torch.cat(losses).double()


def evaluate(model, ids, chars: int | None, config: Config) -> tuple[float, float | None]:
    """(nats per token, bits per character or None): the same model always gets the same figure.

    `chars`: how many characters the tokens stand for. Every process takes a share.
    """
    losses = token_losses(model, ids, config, RANK, WORLD)
    nats, tokens = average(losses.sum().item()), average(len(losses))  # of a process
    bits = nats * WORLD / math.log(2)  # of all processes
    return nats / tokens, (bits / chars if chars else None)


def best_of(history: list[dict]) -> dict:
    """The record of the evaluation with the lowest loss, not counting the one before training."""
    return min(history[1:] or history, key=lambda record: record["val_loss"])


def is_done(history: list[dict], config: Config) -> bool:
    """Are all steps taken, or did `patience` epochs bring no improvement?"""
    # make_config has set max_steps to the number of all steps: it is not 0 here.
    since_best = len(history) - 1 - history.index(best_of(history))
    gave_up = 0 < config.patience <= since_best
    return gave_up or history[-1]["iter"] >= config.max_steps


# -------------------------------------------------------------------------------------- fine-tuning
class ExactTrainer:
    """Four methods for transformers' Trainer. fine_tune mixes them in; it sets config, data, facts, bar.

    The Trainer shuffles the blocks, takes the steps, and after each epoch evaluates and saves a checkpoint;
    it keeps the last one and the best. On a CPU, a continued run is bit-identical to an uninterrupted one.
    """
    began = None  # when the clock was started: at the first step after an evaluation

    def training_step(self, *args):
        """Forward and backward on one batch, as the Trainer does it; this starts the clock."""
        self.began = self.began or time.perf_counter()  # evaluating and saving are not timed
        return super().training_step(*args)

    def log(self, logs: dict, start_time=None):
        """After each step: stop if the loss is not finite, else show it."""
        if "loss" not in logs:  # the Trainer's closing summary
            return
        loss, step, total = logs["loss"], self.state.global_step, self.config.max_steps
        if not math.isfinite(loss):
            raise Stop(NAN, 1)  # the last checkpoint was written before
        # To --report_to. The Trainer's own log would also add it to the history, kept for evaluations.
        self.callback_handler.on_log(self.args, self.state, self.control, logs)
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update()
        if step % max(1, total // 10) == 0:
            steps = step - self.state.log_history[-1]["iter"]  # since the last evaluation
            minutes = (time.perf_counter() - self.began) / steps * (total - step) / 60
            say(f"step {step:>5} of {total}  loss {loss:.3f}  {minutes:.1f} minutes left")

    def evaluate(self, *_, **__) -> dict:
        """Evaluate before training and after each epoch. The returned loss decides which checkpoint is the best."""
        # The Trainer's own eval_loss is a mean over batches, although the last one is smaller. And its
        # EarlyStoppingCallback forgets on resume how long it has waited: see is_done.
        history = self.state.log_history  # saved in each checkpoint
        seconds = history[-1]["seconds"] if history else 0.0  # training time only
        if self.began:
            seconds += time.perf_counter() - self.began
            self.began = None
        # The function above, not this method.
        train_loss, train_bpc = evaluate(self.model, self.data.part, self.data.chars, self.config)
        val_loss, val_bpc = evaluate(self.model, self.data.val, self.data.chars, self.config)
        if not math.isfinite(train_loss + val_loss):
            raise Stop(NAN, 1)  # before anything is saved
        step, epoch = self.state.global_step, self.state.epoch or 0
        rate = self.lr_scheduler.get_last_lr()[0]
        history.append(dict(
            iter=step, epoch=epoch, learning_rate=rate, seconds=seconds,
            train_loss=train_loss, train_bpc=train_bpc, val_loss=val_loss, val_bpc=val_bpc))
        best = step > 0 and best_of(history) is history[-1]
        bits = f" = {val_bpc:.3f} bits/char" if val_bpc else ""
        say(f"step {step:>5}  epoch {epoch:.2f}  train {train_loss:.3f}  val {val_loss:.3f} nats/token{bits}"
            + "  best" * best)
        self.callback_handler.on_log(self.args, self.state, self.control, dict(history[-1]))
        write_report(self.config, history, self.facts)  # metrics and plot
        self.control.should_training_stop = is_done(history, self.config)
        return dict(eval_loss=val_loss)

    def _save_checkpoint(self, *args):
        """Write a checkpoint and, last, the checksums of its files: if they are missing, it is unfinished."""
        super()._save_checkpoint(*args)
        average(0.0)  # wait until each process has written its part
        if RANK == 0:
            folder = Path(self.config.output_dir, f"checkpoint-{self.state.global_step}")
            write_json(folder / CHECKSUMS, checksums(folder))


def fine_tune(config: Config, base: Pretrained, data: Data, facts: dict, checkpoint: str) -> list[dict]:
    """Train. Returns a record for each evaluation.

    facts: see make_facts. checkpoint: the folder of the one to continue from, or "".
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

    class LyricsTrainer(ExactTrainer, Trainer):
        """transformers' Trainer, with exact figures."""

    device, warmup = base.model.device.type, config.warmup
    # Less memory, more time; always with --lora. Its names: since transformers 5.23, and before.
    names = "activation_checkpointing", "gradient_checkpointing"
    less_memory = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    arguments = TrainingArguments(
        config.output_dir,  # for the checkpoints
        seed=config.seed,  # for the order of the blocks and for dropout
        report_to=config.report_to, disable_tqdm=True,  # we print our own lines
        # The steps: AdamW, a rate that rises and then falls to zero, gradients clipped to norm 1.
        max_steps=config.max_steps, per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        warmup_steps=int(warmup * config.max_steps if warmup < 1 else warmup),
        # Evaluate before the first step (the gain of fine-tuning is the difference) and after each epoch.
        eval_on_start=not checkpoint, eval_strategy="epoch",
        # Save after each epoch, too; keep the last checkpoint and the best, by the loss from evaluate.
        save_strategy="epoch", save_total_limit=2, metric_for_best_model="loss",
        # Call log after each step, with the loss as it is.
        logging_steps=1, logging_nan_inf_filter=False,
        # The computer: matrix products in 16 bits if facts say so; the weights keep theirs.
        bf16=facts["dtype"] == "bfloat16", fp16=facts["dtype"] == "float16",
        use_cpu=device == "cpu", dataloader_pin_memory=device == "cuda",
        **{less_memory: config.gradient_checkpointing or config.lora > 0})
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs: torchrun, not the slow DataParallel
    trainer = LyricsTrainer(
        model=base.model, args=arguments, processing_class=base.tokenizer,
        data_collator=default_data_collator, train_dataset=data.blocks,
        eval_dataset=data.val)  # it must be given; evaluate does not ask for it
    trainer.remove_callback(PrinterCallback)  # it would print each log as a dictionary
    trainer.config, trainer.data, trainer.facts = config, data, facts
    done = int(checkpoint.rpartition("-")[2] or 0)  # checkpoint-40 was written after 40 steps
    hidden = None if RANK == 0 and sys.stderr else True  # None: hidden unless on a terminal
    total = config.max_steps
    with tqdm(total=total, initial=done, unit="step", leave=False, disable=hidden) as trainer.bar:
        trainer.train(resume_from_checkpoint=checkpoint or None)
    return trainer.state.log_history


# ----------------------------------------------------------------------------------------- sampling
def sampling_settings(config: Config, end: int):
    """The settings of generate(), here and wherever the model folder is loaded."""
    from transformers import GenerationConfig

    draw = {}  # the likeliest token is taken
    if config.temperature >= 1e-6:  # below, a score may overflow
        draw = dict(do_sample=True, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    return GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        bos_token_id=end, eos_token_id=end, pad_token_id=end, **draw)


def sample_text(base: Pretrained, config: Config, number: int, prompt=None) -> str:
    """What the model writes after the prompt, up to the end of the song. Same seed and number, same text.

    When the context is full, its last half is kept and read again: no position beyond the limit is used.
    """
    device = base.model.device
    base.model.generation_config = sampling_settings(config, base.end)
    torch.manual_seed(hash((config.seed, -1, number)))
    text = config.prompt if prompt is None else prompt
    prompt = encode(text, base)[0] or [base.end]  # a song starts where another ends
    ids, seen = [], len(prompt)  # the new tokens; how many of all, the last ones, the model reads
    while len(ids) < config.max_new_tokens and ids[-1:] != [base.end]:
        if seen >= base.context:  # full
            seen = base.context // 2
        context = torch.tensor([[*prompt, *ids][-seen:]], device=device)  # (1, T)
        room = min(config.max_new_tokens - len(ids), base.context - seen)
        # On a CPU, with one position at a time, casts to bfloat16 cost more than they save.
        with mixed_precision("float32" if device.type == "cpu" else config.dtype, device):
            mask = torch.ones_like(context)  # read all of it
            out = base.model.generate(context, attention_mask=mask, max_new_tokens=room)  # (1, T + new)
        ids += out[0, seen:].tolist()
        seen = out.size(1)
    if ids[-1:] == [base.end]:
        ids.pop()  # not part of the text
    # A character may be spread over several tokens: decode the whole, then leave out the prompt.
    whole = base.tokenizer.decode([*prompt, *ids], clean_up_tokenization_spaces=False)
    return whole[len(base.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)):]


# ------------------------------------------------------------------------------ how much is copied
def words_of(text: str) -> list[str]:
    """The words, without case and punctuation. Example: words_of("Raz, dwa!") is ["raz", "dwa"]."""
    return re.findall(r"[^\W\d_]+", unicodedata.normalize("NFC", text).lower())


def copy_rate(texts: list[str], source: str, length: int = 8) -> tuple[float | None, int]:
    """(share of the texts' runs of `length` words that occur in the source, words in the longest such run).

    Example: copy_rate(["A, b c x"], "z a b C", length=2) is (2/3, 3): "a b" and "b c" are, "c x" is not.
    """
    songs = [" ".join(words_of(song)) for song in source.split(END)]
    source = "".join(f" {song} \n" for song in songs)  # no run spans two songs
    runs, longest = [], 0
    for text in texts:
        words = words_of(text)
        starts = range(len(words) - length + 1)
        runs += [" ".join(words[i:i + length]) for i in starts]
        for i in range(len(words)):
            # Is there one from here that is longer than the longest so far?
            while i + longest < len(words) and f" {' '.join(words[i:i + longest + 1])} " in source:
                longest += 1
    copied = [run for run in runs if f" {run} " in source]  # whole words only
    return (len(copied) / len(runs) if runs else None), longest


# ------------------------------- the end of the lesson: devices, files, command line
def pick_device(name: str) -> torch.device:
    """The device to use; auto: the first available of cuda, mps, cpu."""
    available = dict(
        cuda=torch.cuda.is_available(),
        mps=torch.backends.mps.is_available(),
        cpu=True)
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise Stop(f"--device {name}: not available here; use --device auto")
    if name == "cuda":
        return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name)


def mixed_precision(name: str, device: torch.device) -> torch.autocast:
    """The autocast context; auto: bfloat16 where the hardware has it, float16 on an older GPU, else float32."""
    if name == "auto" and device.type == "cuda":  # is_bf16_supported() also accepts slow emulation
        name = "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    elif name == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bfloat16" if fast and device.type == "cpu" else "float32"
    return torch.autocast(device.type, getattr(torch, name), enabled=name != "float32")


def keep_memory():
    """Keep freed memory in the process: glibc returns large tensors, and each step asks for them again."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: map only what is larger
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: return only what exceeds this
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # of earlier runs in this process


def peak_memory(device: str) -> float | None:
    """The most memory so far, in MB: on a GPU that of tensors, else the process's. None on Windows."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, else KB
    return round(peak / unit, 1)


# Several processes, as torchrun starts them: each has a rank. Only the first writes and prints.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
IN_NOTEBOOK = "kernel" in os.path.basename((sys.argv or [""])[0])  # then sys.argv is the kernel's


def say(text: str):
    """Print a line above the progress bar, in the first process only."""
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
    """Connect to the other processes of this run. Stop if their texts or options differ."""
    if WORLD > 1:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in facts["device"] else "gloo")
        except (ValueError, RuntimeError) as e:  # an address that is missing or in use
            reason = str(e).partition("\n")[0]
            raise Stop(f"the processes cannot find each other ({reason}): start them with torchrun") from None
        everybodys = [None] * WORLD
        dist.all_gather_object(everybodys, facts | dict(device=""))
        if any(other != everybodys[0] for other in everybodys):
            raise Stop("the processes of this run have different texts or options: give them all the same")


def repeated(text: str) -> torch.Tensor:
    """For each character: is it in a line of 12 or more that occurs in the 3,000 before it? Case is ignored."""
    marks = torch.zeros(len(text), dtype=torch.bool)
    for line in re.finditer(rf"[^\n{END}]{{12,}}", text):
        begin, end = line.span()
        recent = text[max(0, begin - 3000):begin]
        marks[begin:end] = line[0].lower() in recent.lower()
    return marks


def by_repetition(base: Pretrained, data: Data, config: Config) -> dict:
    """Does the model use what it has read? Bits per character in repeated lines and elsewhere, and their share.

    A token counts where its last character is. None where there is nothing to measure, or places are unknown.
    """
    if not data.chars or not base.tokenizer.is_fast:
        return dict(refrain_share=None, refrain_bpc=None, other_bpc=None)
    ends, start = [], 0  # where each token ends in the text
    for song in data.val_text.split(END):
        coded = base.tokenizer(song, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        ends += [start + end for _, end in coded["offset_mapping"]]
        start += len(song) + 1
        ends.append(start)  # the end of the song
    ends = torch.tensor(ends[:-1])  # no end after the last song
    chars = ends.diff(prepend=torch.tensor([0]))  # how many each token stands for
    marks = repeated(data.val_text)[(ends - 1).clamp(min=0)]
    nats = token_losses(base.model, data.val, config)

    def bits(part):
        count = chars[part].sum().item()
        if not count:
            return None
        return nats[part].sum().item() / math.log(2) / count

    share = chars[marks].sum().item() / chars.sum().item()
    return dict(refrain_share=share, refrain_bpc=bits(marks), other_bpc=bits(~marks))


def converse(write):
    """Continue what is typed, again and again, until Ctrl-D.

    write(prompt, number) yields the pieces of a text, the prompt first.
    """
    print("Type a beginning; Ctrl-D ends.")
    for number in itertools.count():
        try:
            for piece in write(as_text(input("> ")), number):
                print(piece, end="", flush=True)
            print()
        except Stop as e:  # such as a character that the model does not know
            print(e.args[0])
        except UnicodeError as e:
            print(e)
        except EOFError:  # Ctrl-D
            print()
            return


# --------------------------------------------------------------------------------- options and text
# With --resume these must stay the same, as they change what a step computes. Others may change;
# epochs and max_steps may not end before the checkpoint.
FIXED = {"model_name", "revision", "batch_size", "gradient_accumulation_steps", "block_size",
         "learning_rate", "weight_decay", "warmup", "freeze_layers", "lora", "seed"}
# What has an effect with --sample_only.
SAMPLING = {"output_dir", "sample_only", "interactive", "seed", "device", "dtype", "prompt", "num_samples",
            "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size"}


def check_values(options: dict):
    """Stop if an option is unknown, or its value has the wrong type or is out of range."""
    for name, value in options.items():
        f = Config.__dataclass_fields__.get(name)
        no_text = re.search("[\0\ud800-\udc7f\udd00-\udfff]", str(value))  # nor a file name
        if not f or type(value) is not f.type or no_text:
            raise Stop(f"--{name} {value!r} is not an option of this version")
        low, high, choices = (f.metadata[limit] for limit in ("low", "high", "choices"))
        if choices and value not in choices:
            raise Stop(f"--{name} {value}: must be {choices}")
        if f.type in (int, float) and not low <= value <= high:
            raise Stop(f"--{name} {value}: must be a finite number, at least {low} and at most {high:g}")


def as_text(typed: str) -> str:
    """Composed characters, as in the texts. Bytes that are not UTF-8 come as lone surrogates: they are dropped."""
    return unicodedata.normalize("NFC", typed.encode(errors="ignore").decode())


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {SCRIPT} --help lists the options")

    parser = argparse.ArgumentParser(
        SCRIPT, description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        help = f.metadata["help"]
        if f.default not in ("", False):
            help += f" (default: {f.default})"
        kind = dict(type=f.type, choices=f.metadata["choices"])
        if f.type is bool:
            kind = dict(action="store_true")
        parser.add_argument(f"--{f.name}", help=help, **kind)
    given = vars(parser.parse_args(argv))
    check_values(given)  # ranges; argparse has checked types and choices
    if "prompt" in given:
        given["prompt"] = as_text(given["prompt"])
    if "interactive" in given:
        given["sample_only"] = True
    idle = given.keys() - SAMPLING
    if "sample_only" in given and idle:
        raise Stop(f"--{min(idle)} has no effect with --sample_only: leave one of them out")
    if "revision" in given and os.path.isdir(given.get("model_name", "")):
        raise Stop("--revision needs a --model_name on the Hub, not a folder: leave it out")
    return given


def inherit(given: dict) -> tuple[dict, dict]:
    """(all options: as given, else as in the run to resume, else by default; that run's config.json)."""
    defaults = asdict(Config())
    if "resume" not in given:
        return defaults | given, {}
    folder = Path(given.get("output_dir", Config.output_dir))
    run = read_json(folder / "config.json")
    old = run.get("options")
    if not isinstance(old, dict) or "corpus_sha256" not in run:
        raise Stop(f"no run to resume in {folder}: leave out --resume, or name the run's --output_dir")
    check_values(old)  # it may come from another version or person
    for name in sorted(FIXED & given.keys()):
        if given[name] != old.get(name):
            raise Stop(f"--{name} {given[name]} contradicts the run's {old.get(name)}: leave it out, "
                       "or leave out --resume")
    # Only the command line says where a run writes. New epochs mean a new number of steps.
    names = ["output_dir", "sample_only"]
    if "epochs" in given:
        names.append("max_steps")
    reset = {name: defaults[name] for name in names}
    return defaults | old | reset | given, run


def make_config(options: dict, blocks, history: list[dict]) -> Config:
    """Set the number of steps: those of all epochs, or --max_steps if fewer."""
    batches = math.ceil(len(blocks) / (options["batch_size"] * WORLD))  # in an epoch
    steps = options["epochs"] * math.ceil(batches / options["gradient_accumulation_steps"])
    if options["max_steps"]:
        steps = min(steps, options["max_steps"])
    if history and steps < history[-1]["iter"]:
        raise Stop(f"the run is at step {history[-1]['iter']} already: --epochs, --max_steps may only grow")
    return Config(**options | dict(max_steps=steps))


def read_corpus(path: str) -> str:
    """The text of a UTF-8 file, its songs separated by END. A BOM and Windows line endings are accepted."""
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
    text = END.join(piece[1:-1] for piece in pieces if piece.strip("\n"))  # each between line breaks
    songs = text.count(END) + 1
    if not text.strip():
        raise Stop(f"{path} is empty: put lyrics in it")
    rule = r"|^[-=*#_~]{3,}$" if songs == 1 else ""  # several songs may contain such lines
    mark = re.search(r"<\|?/?\w+\|?>" + rule, text, re.MULTILINE)
    if mark:
        say(f"note: {mark[0]} in {path} is read as text, {songs} song(s) in all; "
            "a line that holds only <|endoftext|> separates two")
    return text


# --------------------------------------------------------------------------- models and checkpoints
NAN = "the loss turned NaN: lower --learning_rate"
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
           AssertionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)  # what a bad file may raise


def find_pretrained(source: str, device, revision: str = "", dtype=torch.float32) -> Pretrained:
    """load_pretrained, first without the network: a downloaded model needs none. Stop says why it fails."""
    # Otherwise a thread asks the Hub to convert weights in an old format.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    import huggingface_hub.utils as hub
    from huggingface_hub.errors import StrictDataclassError
    from transformers.utils import logging

    hub.logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.enable_progress_bars()  # those of a download
    warnings.filterwarnings("ignore", "mtime may not be reliable")  # an early transformers, on checkpoints
    local = os.path.isdir(source)
    a_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or os.path.exists(source)
    if a_path and not local:  # nor can it be a name on the Hub
        raise Stop(f"there is no model folder {source}: name one, or a model on the Hub")
    for offline in (True, False):
        try:
            return load_pretrained(source, device, revision, offline, dtype)
        except (*DAMAGED, OSError, ImportError, SafetensorError, StrictDataclassError) as e:
            reason = " ".join(str(e).split())[:200] or type(e).__name__
        if local:
            raise Stop(f"{source} holds no causal language model that can be read ({reason}): "
                       "name another, or make it again")
    raise Stop(f"cannot get {source} ({reason}): go online, or give --model_name a local folder")


def library(call, *args, **options):
    """Call the tokenizers library and return the result. Stop says why, if it fails."""
    nowhere, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)  # in this order: stderr may be closed
    os.dup2(nowhere, 2)  # where the library itself reports a panic
    try:
        return call(*args, **options)
    except BaseException as e:  # it raises nothing narrower, and a panic is not even an Exception
        if type(e) is not Exception and type(e).__name__ != "PanicException":
            raise
        raise Stop(f"no tokenizer ({e}): take another") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def check_settings(source: str, settings):
    """Stop if config.json or tokenizer.json would fill the memory before they are found to be wrong."""
    from transformers import AutoModelForCausalLM

    words = Path(source, "tokenizer.json")
    if words.is_file() and re.search(rb'":\s*[1-9]\d{8}', words.read_bytes()):  # the library counts up to it
        raise Stop(f"the tokenizer in {source} does not fit: it numbers far more tokens than it has: name another model")
    layers = getattr(settings, "num_hidden_layers", 1)
    if layers > 1000:
        raise Stop(f"config.json in {source} asks for {layers} layers: name another model")
    with torch.device("meta"):  # shapes without memory
        params = AutoModelForCausalLM.from_config(settings).num_parameters()
    files = [path for path in Path(source).glob("*") if path.suffix in (".safetensors", ".bin")]
    held = sum(path.stat().st_size for path in files)  # a parameter takes a byte or more
    if files and params > held:
        raise Stop(f"config.json in {source} asks for {params:,} parameters, its weights are {held:,} bytes "
                   "(cut, a Git LFS pointer, a page?): name another model, or fetch it again")


def check_pretrained(source: str, base: Pretrained, report: dict):
    """Stop unless it is a complete causal language model with a matching tokenizer, and both work.

    report: how the weights in the files differ from those that config.json describes. Missing weights
    would be random; extra ones, such as the last layers, would be dropped.
    """
    model, tokenizer, end, _ = base
    # Constants that older files hold, papuGaPT2's among them: newer models compute them.
    computed = ".attn.bias", ".masked_bias", "position_ids", ".inv_freq"
    more = [name for name in report["unexpected_keys"] if not name.endswith(computed)]
    other = [name for name, *_ in report["mismatched_keys"]]
    wrong = sorted({*report["missing_keys"], *more, *other})
    if wrong:
        raise Stop(f"the weights in {source} are not those of its config.json "
                   f"({', '.join(wrong[:3])}; {len(wrong)} in all): name another model")
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        raise Stop(f"{source} holds weights that are NaN or infinite ({broken[0]}): name another model")
    if not isinstance(end, int):
        raise Stop(f"{source} has no end token (eos_token) to put between songs: name another model")
    # An embedding may have more rows than there are tokens, but not fewer.
    top = max(end, *tokenizer.get_vocab().values())
    rows = model.get_input_embeddings().num_embeddings
    if top >= rows:
        raise Stop(f"the tokenizer in {source} does not fit: its numbers go up to {top}, "
                   f"the model's to {rows - 1}: name another model")
    # Two texts that differ in the second token: is the prediction after the first the same?
    pairs = torch.tensor([[end, end], [end, (end + 1) % rows]], device=model.device)
    with torch.no_grad():
        model.train()(pairs)  # with dropout, too
        one, other = model.eval()(pairs).logits[:, 0]  # (V,) each
    near = max(1e-5, 4 * torch.finfo(one.dtype).eps)  # rounding may differ between rows
    if model.config.is_encoder_decoder or not torch.allclose(one, other, near, near):
        raise Stop(f"{source} is not a causal language model: "
                   f"{type(model).__name__} sees the future, as BERT does: name another")
    writes = model.generation_config  # sample_text sets its own
    sample_text(base, Config(prompt="Raz, dwa", max_new_tokens=2), 0)
    model.generation_config = writes
    with tempfile.TemporaryDirectory() as folder:  # can it be saved again?
        library(tokenizer.save_pretrained, folder)
        model.config.save_pretrained(folder)


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; {} if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


CHECKSUMS = "sha256.json"  # written last in a checkpoint


def checksums(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by name."""
    sums = {}
    for path in checkpoint.glob("*"):
        if path.name != CHECKSUMS and path.is_file():
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def fault_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, such as a file that is missing or of another run; "" if it is whole."""
    written, found = read_json(checkpoint / CHECKSUMS), checksums(checkpoint)
    if not written:
        return f"{CHECKSUMS} is missing, it was not finished"
    ranks = ["rng_state.pth"]  # the Trainer's random state, a file for each process
    if WORLD > 1:
        ranks = [f"rng_state_{rank}.pth" for rank in range(WORLD)]
    for name in sorted({*written, *ranks}):
        if name not in found:
            return f"{name} is missing"
        if found[name] != written.get(name):
            return f"{name} is damaged"
    return ""


def last_checkpoint(folder: Path) -> tuple[str, list[dict]]:
    """(the newest whole checkpoint, its history), or ("", []) if none was finished. Stop if all are damaged.

    The best one has to be whole, too, as the run ends with its model. The Trainer's get_last_checkpoint
    would accept one that a kill left half-written.
    """
    paths = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    paths.sort(key=lambda path: int(path.name[11:]), reverse=True)  # the newest first
    faults = []
    for path in paths:
        fault = fault_of(path)
        if not fault:
            history = read_json(path / "trainer_state.json")["log_history"]
            best = folder / f"checkpoint-{best_of(history)['iter']}"
            lacks = fault_of(best) if best != path else ""
            fault = lacks and f"of its best, {best.name}, {lacks}"
        if not fault:
            say(f"continuing from {path}" + f" ({'; '.join(faults)})" * bool(faults))
            return str(path), history
        faults.append(f"{path.name}: {fault}")
    # A single one without checksums was cut off while it was written: nothing is lost by starting over.
    if len(paths) > 1 or paths and (paths[0] / CHECKSUMS).exists():
        raise Stop(f"no checkpoint in {folder} is whole ({'; '.join(faults)}): "
                   "start a new run without --resume")
    say(f"there is no finished checkpoint in {folder}: starting over")
    return "", []


# -------------------------------------------------------------------------------------------- files
@contextlib.contextmanager
def replacing(path):
    """A new file that replaces the one at the path once it is complete: a kill leaves the old one or the new one."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk, not just in a buffer
        os.replace(temporary, path)  # atomic: no reader ever sees a partial file
    finally:
        temporary.unlink(missing_ok=True)


def keep_previous(path: Path):
    """Rename what is at the path: nothing is ever overwritten."""
    new = path.with_name(f"{path.name}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
    while new.exists():
        new = new.with_name(new.name + "+")
    if path.exists():
        path.rename(new)


def is_run(folder: Path) -> bool:
    """Does the folder belong to a run? Its config.json says so."""
    try:
        return {"options", "corpus_sha256"} <= json.loads((folder / "config.json").read_bytes()).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def write_json(path: str, content: dict):
    """Write a dictionary as readable JSON."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def check_targets(options: dict):
    """Stop unless the run may write where it is told to. Changes nothing."""
    folder = Path(options["output_dir"]).resolve()
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Stop(f"cannot write --output_dir {folder} ({parent}): choose another")
    empty = not folder.exists() or folder.is_dir() and not any(folder.iterdir())
    in_use = [Path.cwd(), Path(options["input"]).resolve(), Path(options["model_name"]).resolve()]
    moves = not options["resume"] and any(path.is_relative_to(folder) for path in in_use)
    if moves or not empty and not is_run(folder):
        raise Stop(f"cannot write --output_dir {folder} (it is not a run's folder, or it contains the text, "
                   "the model or the current folder): choose another")


@contextlib.contextmanager
def run_folder(config: Config, facts: dict):
    """Lock the run's folder for this process. An earlier run's folder is kept under another name."""
    folder = Path(config.output_dir).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()  # until the run has ended
    except filelock.Timeout:
        raise Stop(f"another process writes to --output_dir {config.output_dir}: "
                   "wait, or choose another") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        if not config.resume and folder.exists() and any(folder.iterdir()):
            keep_previous(folder)  # as a whole
        folder.mkdir(exist_ok=True)
        for unfinished in folder.rglob("*.tmp"):  # left by a kill
            unfinished.unlink()
        packages = "torch", "transformers", "datasets", "accelerate", *["peft"] * (config.lora > 0)
        versions = {name: version(name) for name in packages}
        write_json(folder / "config.json", dict(facts, options=asdict(config), versions=versions))
        yield
    except FAILURES as e:
        if any(folder.glob(f"checkpoint-*/{CHECKSUMS}")):
            e.add_note("the last good checkpoint is kept")
        if is_run(folder):
            e.add_note(f"continue with: python {SCRIPT} --resume --output_dir {config.output_dir!r}")
        raise
    finally:
        lock.release()


def write_report(config: Config, history: list[dict], facts: dict, **copied) -> dict:
    """Write and return the metrics, and plot the losses."""
    folder, before, last, best = config.output_dir, history[0], history[-1], best_of(history)
    tokens = last["epoch"] * facts["tokens_per_epoch"]
    metrics = dict(
        facts, stage=STAGE, val_loss_before=before["val_loss"], val_bpc_before=before["val_bpc"],
        val_loss=best["val_loss"], val_bpc=best["val_bpc"], train_bpc=best["train_bpc"],
        best_iter=best["iter"], iters=last["iter"], epochs=last["epoch"], seconds=last["seconds"],
        tokens_per_second=tokens / max(last["seconds"], 1e-9),
        peak_memory_mb=peak_memory(facts["device"]), **copied)
    if RANK == 0:
        write_json(f"{folder}/metrics.json", metrics)
        with replacing(f"{folder}/metrics.jsonl") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in history)
        if len(history) > 1:  # before the first step there is no curve yet
            plot_losses(f"{folder}/loss.png", history)
    return metrics


def plot_losses(path: str, history: list[dict]):
    """Plot the training and the validation loss: where they diverge, the model begins to memorize."""
    from matplotlib.figure import Figure  # here, as it takes half a second to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss, nats per token")
    epochs = [record["epoch"] for record in history]
    for name, color, label in (("train", "#0072B2", "training"), ("val", "#D55E00", "validation")):
        losses = [record[f"{name}_loss"] for record in history]
        axes.plot(epochs, losses, color=color, marker=".", label=label)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120)


def write_samples(base: Pretrained, config: Config, name: str) -> list[str]:
    """Write the texts to a file and to the screen, the same in both. Returns them without the prompt."""
    path, texts = Path(config.output_dir, "output", name), []
    path.parent.mkdir(exist_ok=True)
    keep_previous(path)
    with replacing(path) as file:
        for number in range(config.num_samples):
            texts.append(sample_text(base, config, number))
            end = SEPARATOR if number + 1 < config.num_samples else "\n"
            text = config.prompt + texts[-1] + end
            file.write(text.encode())
            print(text, end="", flush=True)
    print(f"-> {path}")
    return texts


# --------------------------------------------------------------------------------------------- main
# What may end a run, and the messages for it.
FAILURES = (Stop, OSError, MemoryError, RuntimeError, SafetensorError, KeyboardInterrupt)
MEMORY = "out of memory: lower --batch_size (raise --gradient_accumulation_steps) or --block_size"
DISK = "cannot write: is the disk full?"
KNOWN = {"alloc": MEMORY, "out of memory": MEMORY,
         "pytorchstreamwriter": DISK, "inline_container": DISK, "serializ": DISK,
         "connection": "another process of this run is gone"}


def check_extras(options: dict):
    """Stop if an option asks for a package that is not installed, or for another one to be left out."""
    if options["lora"] and not importlib.util.find_spec("peft"):
        raise Stop("--lora needs the package peft: pip install peft")
    if options["lora"] and options["freeze_layers"]:
        raise Stop("--lora freezes all layers: leave out --freeze_layers")
    if options["report_to"] != "none":
        from transformers.integrations import get_available_reporting_integrations

        known = ["none", "all", *get_available_reporting_integrations()]
        if options["report_to"] not in known:
            raise Stop(f"--report_to {options['report_to']} is not installed here: take one of {', '.join(known)}")


def make_facts(config: Config, base: Pretrained, data: Data, sha256: str) -> dict:
    """Facts about a run before it starts."""
    model = base.model
    entries = model.get_input_embeddings().num_embeddings  # may be more than the tokenizer has
    dtype = mixed_precision(config.dtype, model.device).fast_dtype
    return dict(
        params=model.num_parameters(), trainable=model.num_parameters(only_trainable=True),
        vocab_size=entries, tokens_per_vocab_entry=data.tokens / entries,
        chars_per_token=len(data.text) / data.tokens, tokens_per_epoch=len(data.blocks) * config.block_size,
        device=str(model.device), dtype=str(dtype).removeprefix("torch."), seed=config.seed,
        corpus_sha256=sha256)


def sample(config: Config, device) -> dict:
    """Write samples of the model that a run left. Its metrics."""
    folder = Path(config.output_dir)
    if not is_run(folder) or not (folder / "model").is_dir():
        raise Stop(f"there is no model in {folder}: train first, or name the run's --output_dir")
    base = find_pretrained(str(folder / "model"), device, dtype="auto")  # as it was written
    if config.interactive:
        converse(lambda prompt, number: [prompt, sample_text(base, config, number, prompt)])
    else:
        write_samples(base, config, "sample.txt")
    return read_json(folder / "metrics.json")


def finish(config: Config, history: list[dict], facts: dict, data: Data, base: Pretrained) -> dict:
    """Save the best model to OUTPUT_DIR/model, and samples. Returns the metrics, now with the copy rate."""
    folder = Path(config.output_dir)
    # From its checkpoint: load_best_model_at_end does nothing if a run is resumed after its last step.
    best = folder / f"checkpoint-{best_of(history)['iter']}"
    base = merge_adapters(base, best) if config.lora else find_pretrained(str(best), base.model.device)
    texts = write_samples(base, config, "sample.txt")
    new = folder / "model.new"  # if killed here, --resume writes it again
    shutil.rmtree(new, ignore_errors=True)  # half-written
    base.model.save_pretrained(new)
    base.tokenizer.save_pretrained(new)
    shutil.rmtree(folder / "model", ignore_errors=True)
    new.rename(folder / "model")
    rate, longest = copy_rate(texts, data.text)
    repeats = by_repetition(base, data, config)
    metrics = write_report(config, history, facts, copy_rate=rate, copy_longest=longest, **repeats)
    name, unit = ("bpc", "bits/char") if data.chars else ("loss", "nats/token")
    before, after = metrics[f"val_{name}_before"], metrics[f"val_{name}"]
    say(f"Validation: {before:.3f} {unit} before, {after:.3f} after" + " (worse!)" * (after > before))
    if repeats["refrain_bpc"] is not None:
        say("validation, bits per character: {refrain_bpc:.3f} in lines that occurred shortly before "
            "({refrain_share:.1%}), {other_bpc:.3f} elsewhere".format(**repeats))
    say(f"Copied from the training text: {rate or 0:.1%} of the samples' runs of 8 words, "
        f"{longest} words at a stretch\n-> {folder / 'model'}")
    return metrics


def run(given: dict) -> dict:
    """Train, then sample; or only sample. Bad input is found before anything is written. Returns the metrics."""
    options, old_run = inherit(given)
    device = pick_device(options["device"])
    if device.type == "cpu" and options["dtype"] == "float16":
        raise Stop("--dtype float16 needs a GPU: use --dtype auto")
    if options["sample_only"]:
        return sample(Config(**options), device)
    check_extras(options)
    check_targets(options)
    text = read_corpus(options["input"])
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    if old_run and sha256 != old_run["corpus_sha256"]:
        raise Stop("--input is not the text that this run began with (its SHA-256 differs): give that one, "
                   "or start a new run in another --output_dir")
    checkpoint, history = last_checkpoint(Path(options["output_dir"])) if old_run else ("", [])
    source = checkpoint or options["model_name"]
    dtype = torch.float32  # of the weights: small steps would be lost in 16 bits
    if options["lora"]:  # frozen weights may have 16
        source = options["model_name"]  # a checkpoint holds the adapters alone
        if options["dtype"] == "auto" and device.type == "cpu":
            options["dtype"] = "bfloat16"
        dtype = mixed_precision(options["dtype"], device).fast_dtype
    base = find_pretrained(source, device, options["revision"], dtype)
    options["block_size"] = options["block_size"] or min(512, base.context)
    if options["block_size"] > base.context:
        raise Stop(f"--block_size {options['block_size']} is beyond the model's context: at most {base.context}")
    data = prepare(text, base, options["block_size"])
    config = make_config(options, data.blocks, history)
    freeze(base.model, config.freeze_layers)
    if config.lora:
        base = add_adapters(base, config)
    facts = make_facts(config, base, data, sha256)
    join_processes(asdict(config) | facts)
    keep_memory()
    with run_folder(config, facts) if RANK == 0 else contextlib.nullcontext():
        say(f"{facts['params']:,} parameters on {facts['device']} in {facts['dtype']}; "
            f"{len(text):,} characters, {config.max_steps} steps")
        if not data.chars:
            say("warning: this tokenizer loses some of the text, so there are no bits per character")
        if old_run and old_run["options"].get("max_steps") != config.max_steps:
            say(f"note: the learning rate is planned anew for {config.max_steps} steps")
        if RANK == 0 and not checkpoint:
            say("before training it writes:")
            write_samples(base, config, "sample_before.txt")
        if not history or not is_done(history, config):
            history = fine_tune(config, base, data, facts, checkpoint)
        if RANK == 0:
            return finish(config, history, facts, data, base)
        return write_report(config, history, facts)


def main(argv=None) -> dict:
    """Run with these arguments, by default the command line's. Returns what metrics.json holds."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8; a file being watched
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        if argv is None:
            argv = [] if IN_NOTEBOOK else sys.argv[1:]
        return run(parse_args(argv))
    except FAILURES as e:
        failure, status = e, 1
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
        message = "allocate" if isinstance(failure, MemoryError) else str(failure).lower()
        message = next((line for sign, line in KNOWN.items() if sign in message), None)
        if not message:
            raise failure
    notes = getattr(failure, "__notes__", ())
    line = "; ".join([message, *notes]).replace("\n", " ")
    print(line if status == 130 else f"error: {line}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
