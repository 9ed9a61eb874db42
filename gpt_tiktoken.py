# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "tiktoken>=0.12", "tokenizers>=0.22.1", "transformers>=5.0",
#                 "tqdm>=4.66.3", "matplotlib>=3.9", "filelock>=3.16"]
# ///
"""Stage 2: the same GPT on sub-words: less to spell, but each is seen less often.

    python gpt_tiktoken.py  # the gpt2 vocabulary; two cores: 2 to 4 minutes
    python gpt_tiktoken.py --input assets/input/input2.txt --max_iters 5000
    python gpt_tiktoken.py --tokenizer custom --vocab_size 2000  # your text's
    python gpt_tiktoken.py --tokenizer polish  # that of a Polish GPT-2
    python gpt_tiktoken.py --resume         # continue after Ctrl-C or a crash
    python gpt_tiktoken.py --sample_only --prompt "Noc nad miastem"
    torchrun --nproc_per_node=2 gpt_tiktoken.py --size base      # several GPUs

In a Colab cell:  import gpt_tiktoken; gpt_tiktoken.main(["--input", "a.txt"])
New here: the tokenizer and the sliced loss; everything else is as in gpt.py.
"""

import argparse
import codecs
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import sys
import textwrap
import time
import unicodedata
import urllib.request
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from http.client import HTTPException
from pathlib import Path

import filelock

# torch's threads spin while they wait; if they spin for long, a second busy program slows them down.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------------ options
# What the lesson uses and does not define (Dropout, mixed_precision, average, say, save, RANK, WORLD, ...) is
# plumbing, in the second half of the file.
STAGE, SCRIPT = "bpe", "gpt_tiktoken.py"
POLISH = "flax-community/papuGaPT2"  # whose tokenizer --tokenizer polish takes

# Options that are not given come from the size and the recipe.
SIZES = {
    # 13.7 million parameters with the gpt2 vocabulary: minutes on two cores
    "tiny": dict(n_layer=4, n_head=2, n_embd=128, block_size=256, grow=2, batch_size=4, dropout=0.2,
                 max_iters=300, eval_interval=50, sample_interval=100),
    # the original's shape: for a GPU
    "base": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, grow=0, batch_size=64, dropout=0.2,
                 max_iters=5000, eval_interval=100, sample_interval=500),
}
RECIPES = {  # modern: today's architecture and optimizer; classic: the original project's
    "modern": dict(recall="4,8", learning_rate=5e-3, weight_decay=0.1, grad_clip=1.0, warmup_iters=20),
    "classic": dict(learning_rate=3e-4, weight_decay=0.1, grad_clip=0.0, warmup_iters=0, grow=0),
}
LARGE = 2_000_000  # training tokens; with fewer, base memorizes: it was no better than tiny on 400,000
EPOCHS = 12  # modern's default length: passes over the text (see make_config); after that it memorizes
SHAPE = ("recipe", "n_layer", "n_head", "n_embd", "block_size", "recall",  # what the weights depend on
         "tokenizer", "encoding", "vocab_size", "prune_vocab")
# Set on the command line only, never by a loaded file: above all, where a run writes.
UNINHERITED = {"run_dir", "save_path", "output", "load_url", "sample_only", "interactive", "tokenizer_path"}


class Stop(Exception):
    """Ends the program with one line. Stop(line): the user can fix it; Stop(line, 1): a failure."""


def option(default, help, low=0, high=1e9, choices=None):
    """A field of Config, and so a command-line option. A number must lie from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option: its name, type, default and help. None: set by --size or --recipe."""
    seed: int = option(2115, "random seed", 0, 2**62)
    # files
    input: str = option("assets/input/input2.txt", "the text to learn from")
    run_dir: str = option("assets/tiktoken_model", "folder for everything that the run writes")
    save_path: str = option("", "best checkpoint (default: RUN_DIR/model_best.pt)")
    output: str = option("", "generated text (default: RUN_DIR/output/sample.txt)")
    resume: bool = option(False, "continue from RUN_DIR/model_last.pt")
    load_url: str = option("", "start from the checkpoint at this http(s) or file address")
    sample_only: bool = option(False, "do not train: load the best checkpoint and write samples")
    interactive: bool = option(False, "do not train: continue what you type, again and again")
    # the tokenizer
    tokenizer: str = option("auto", "auto: --tokenizer_path, else tiktoken's, else a custom one",
                            choices=("auto", "tiktoken", "custom", "polish"))
    tokenizer_path: str = option("", "a tokenizer.json, or a folder with vocab.json and merges.txt; "
                                     "made if missing, but not for polish")
    encoding: str = option("gpt2", "tiktoken's encoding", choices=("gpt2", "cl100k_base", "o200k_base"))
    vocab_size: int = option(2000, "entries of a custom tokenizer", 257, 2**20)
    prune_vocab: bool = option(False, "keep the entries that the training text uses; spell the rest with bytes")
    # the model
    size: str = option("auto", "auto: base on a GPU with a long text, else tiny", choices=("auto", *SIZES))
    recipe: str = option("modern", "modern, or the original's classic", choices=tuple(RECIPES))
    n_layer: int = option(None, "transformer blocks", 1, 1000)
    n_head: int = option(None, "attention heads in a block", 1)
    n_embd: int = option(None, "width: length of the vector at each position", 1, 2**16)
    block_size: int = option(None, "context: how many tokens the model sees", 2)
    recall: str = option("", "show what followed the last N tokens earlier, for each N (\"\": off)")
    dropout: float = option(None, "fraction of activations zeroed in training", 0, 0.99)
    grow: int = option(None, "start with short rows that double in length this many times", 0, 10)
    # training
    batch_size: int = option(None, "rows in a batch (per process)", 1, 2**20)
    grad_accum: int = option(1, "batches whose gradients are accumulated for one step", 1)
    max_iters: int = option(None, f"steps; modern: by default {EPOCHS} passes over the text", 1)
    learning_rate: float = option(None, "peak learning rate", 1e-9, 1e18)
    weight_decay: float = option(None, "decoupled weight decay")
    grad_clip: float = option(None, "largest gradient norm (0: no clipping)")
    warmup_iters: int = option(None, "steps of linear warm-up")
    eval_interval: int = option(None, "evaluate and save every N steps", 1)
    eval_iters: int = option(0, "evaluate on at most N batches (0: the whole validation split)")
    patience: int = option(10, "stop after N evaluations without a better loss (0: never)")
    sample_interval: int = option(None, "write a few lines every N steps (0: never)")
    # the computer
    device: str = option("auto", "auto: the first available", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: the fastest", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model")
    # sampling
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(1, "texts to write", 1)
    max_new_tokens: int = option(500, "length of each text, in tokens", 1)
    temperature: float = option(0.8, "below 1 plays safe, above 1 takes risks, 0: the likeliest")
    top_k: int = option(0, "draw from the k likeliest tokens (0: all)")
    top_p: float = option(0.95, "draw from the likeliest that add up to this probability", 1e-9, 1)
    stop_at_end: bool = option(False, "stop each text where the model ends the song")


# ---------------------------------------------------------------------------------------- tokenizer
END_TEXT = "<|endoftext|>"
SEPARATOR = f"\n{END_TEXT}\n"  # between two songs in a file; one token, line breaks included
END = "\0"  # that token inside this program; no text file contains this character


def learn_merges(words: Counter, count: int) -> list[tuple[str, str]]:
    """How a BPE is learned (Sennrich et al., arXiv:1508.07909): join the most frequent pair, again and again.

    words: how often each word occurs in the text. Returns the first `count` pairs that are joined. The
    library does the same on bytes, and much faster. Example: learn_merges(Counter(["tak", "tam", "tu"]), 1)
    is [("t", "a")].
    """
    split = {word: list(word) for word in words}  # at first single characters
    merges = []
    for _ in range(count):
        pairs = Counter()  # how often two pieces are adjacent
        for word, pieces in split.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:  # each word is one piece
            break
        best = max(pairs, key=pairs.get)
        merges.append(best)
        split = {word: join(pieces, best) for word, pieces in split.items()}
    return merges


def join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair. Example: join(["t", "a", "k"], ("t", "a")) is ["ta", "k"]."""
    joined = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def cut_word(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Split a word into pieces: join its characters by all merges, in the order they were learned."""
    pieces = list(word)
    for pair in merges:
        pieces = join(pieces, pair)
    return pieces


def byte_level(model: models.BPE) -> Tokenizer:
    """A tokenizer that applies the BPE to the bytes of each word, with the space before it, as GPT-2's does."""
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # words, as bytes
    core.decoder = decoders.ByteLevel()
    return core


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the songs: no entry spans two. Stop if the text is too short for vocab_size."""
    core = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # an entry for each byte, seen or not
    core.train_from_iterator(text.split(END), trainer)
    size = core.get_vocab_size()
    if size < vocab_size:
        raise Stop(f"--vocab_size {vocab_size} is too large for this text: it makes {size} entries at most; "
                   f"take --tokenizer custom --vocab_size {size}")
    return core


class BPETokenizer:
    """Maps text to numbers and back with a byte-level BPE. encode("sto lat") may be tensor([812, 466]).

    A token stands for a few bytes, often a word or a part of one. There is one for each single byte, so any
    text can be encoded, and is decoded exactly. source: the text of a tokenizer.json. keep: the entries that
    --prune_vocab keeps; all others are spelled with their bytes. self.core is the library's tokenizer.
    """

    def __init__(self, source: str, keep: list[int] | None = None, start: str = END):
        self.state = dict(source=source, keep=keep, start=start)  # saved in a checkpoint
        self.start = start  # what a text starts from if there is no prompt
        self.core = library(Tokenizer.from_str, source)  # library: its errors become one line
        self.core.encode_special_tokens = True  # the words <|endoftext|> in a line are ordinary text
        self.core.model.dropout = None  # some files ask for BPE dropout,
        self.core.no_truncation()  # for truncation,
        self.core.no_padding()  # or for padding
        self.core.add_special_tokens([END_TEXT])  # if it is there, it keeps its number
        # A byte-level vocabulary spells each byte as a character, such as Ġ for a space.
        byte_of, vocab = byte_symbols(), numbers_of(self.core)
        if not byte_of.keys() <= vocab.keys() or self.core.decoder is None:
            raise Stop("that tokenizer is not byte-level, or has no decoder: take another")
        added = self.core.get_added_tokens_decoder()  # these are plain text
        pieces = [b""] * (max(vocab.values()) + 1)  # the bytes of each entry
        for token, i in vocab.items():
            if i in added or not set(token) <= byte_of.keys():
                pieces[i] = token.encode()
            else:
                pieces[i] = bytes(byte_of[symbol] for symbol in token)
        self.end = vocab[END_TEXT]
        pieces[self.end] = END.encode()
        self.spell = None  # pruned: for each old number, the new ones that spell it
        if keep is not None:
            new = {old: i for i, old in enumerate(keep)}
            byte = {value: new[vocab[symbol]] for symbol, value in byte_of.items()}
            self.spell = [[byte[b] for b in piece] for piece in pieces]
            for old in keep:
                self.spell[old] = [new[old]]
            pieces = [pieces[old] for old in keep]
            self.end = new[self.end]
        self.pieces, self.vocab_size = pieces, len(pieces)
        # In UTF-8 each character has exactly one byte that is not 10xxxxxx: count those.
        chars = [sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]
        self.chars = torch.tensor(chars)

    def encode(self, text: str) -> torch.Tensor:
        """Token numbers, shape (n,), in a small integer type."""
        # GPT-2's rules split after a line break, unless a space or a slash follows, and so do tiktoken's:
        # lines can be encoded one by one.
        cuts = (cut.start() for cut in re.finditer(rf"(?={END})|(?<=[^\s{END}]\n)(?=[^\s/])", text))
        bounds = itertools.pairwise(itertools.chain([0], cuts, [len(text)]))
        lines = (text[start:stop] for start, stop in bounds)
        parts = []
        end = self.core.token_to_id(END_TEXT)  # before pruning
        small = torch.uint16 if self.vocab_size < 2**16 else torch.int32
        while batch := list(itertools.islice(lines, 10_000)):  # not all at once, to save memory
            ids = []
            plain = [line.removeprefix(END) for line in batch]  # END begins the first line of a song
            coded = library(self.core.encode_batch_fast, plain, add_special_tokens=False)
            for line, code in zip(batch, coded):
                ids += [end] * line.startswith(END) + code.ids
            if self.spell:  # pruned: spell removed entries with bytes
                ids = [new for old in ids for new in self.spell[old]]
            parts.append(torch.tensor(ids, dtype=small))
        return torch.cat(parts)

    def decode(self, ids: torch.Tensor) -> str:
        """The text of token numbers, shape (n,)."""
        written = b"".join(self.pieces[i] for i in ids.tolist())
        return written.decode("utf-8", "ignore")

    def stream(self, ids):
        """Yield the text of each token as it arrives; a character of several tokens comes with the last one."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        return (decoder.decode(self.pieces[i]) for i in ids)

    def count_chars(self, ids: torch.Tensor) -> torch.Tensor:
        """How many characters begin in each token. Shape in and out: (n,)."""
        return self.chars[ids.long()]

    def describe(self, text: str, ids: torch.Tensor) -> dict:
        """How the vocabulary fits the training text. Density: how often an entry is seen on average."""
        size = self.vocab_size
        words = sum(1 for _ in re.finditer(r"\w+", text))
        seen = torch.zeros(size, dtype=torch.long)  # how often each entry occurs
        for part in ids.split(2**20):  # in parts, to save memory
            seen += torch.bincount(part.int(), minlength=size)
        return dict(
            vocab_size=size, tokens=len(ids), tokens_per_word=len(ids) / max(1, words),
            chars_per_token=len(text) / len(ids), tokens_per_vocab_entry=len(ids) / size,
            entries_never_seen=(seen == 0).sum().item(), entries_seen_once=(seen == 1).sum().item())


def show_pieces(tokenizer: BPETokenizer, text: str):
    """Print a line of the text in pieces, what a BPE of the text's words joins first, and a word cut by that.

    A character split over several pieces is shown in the last one.
    """
    lines = re.split(f"[\n{END}]", text[:2000])
    line = max(lines, key=len)[:80]
    ids = tokenizer.encode(line).tolist()
    say("pieces: " + "|".join(tokenizer.stream(ids)))
    words = re.findall(r"\w+", text[:20_000])  # learn_merges is slow, so only a part
    merges = learn_merges(Counter(words), 8)
    first = ", ".join(f"{a}+{b}" for a, b in merges)
    cut = [cut_word(word, merges) for word in re.findall(r"\w+", line)]
    joined = [pieces for pieces in cut if len(pieces) < len("".join(pieces))]
    example = "|".join(joined[0]) if joined else ""
    say(f"a BPE of this text begins with {first}: {example}")


# --------------------------------------------------------------------------------------------- data
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
REACH = 1536  # how many tokens recall looks back


def recall(ids: torch.Tensor, n: int, none: int, end: int = -1) -> torch.Tensor:
    """For each position, what followed the last time the same n tokens occurred in this song; else `none`.

    Songs repeat: if you have heard a refrain once, its first line tells you the second. Large models learn
    to look this up by themselves (induction heads: Olsson et al., arXiv:2209.11895). A small model does not
    learn it from a single text, so it gets it as an input. Example: at the last "a" of "tra la la", with
    n = 2, the result is the space, because that is what followed the first "la".

    none: the number that stands for nothing; end: the token that ends a song. Shape in and out: (N,).
    """
    found = torch.full_like(ids, none)
    for begin in range(0, len(ids), 2**20):  # in parts, to save memory
        start = max(0, begin - REACH - n)
        part = ids[start:begin + 2**20].long()
        key = (part == end).cumsum(0)  # a hash of the song's number
        for _ in range(n):  # and the last n tokens
            previous = F.pad(key, (1, 0))[:-1]  # the key one position earlier
            key = previous * 1_000_003 + part + 1  # one more digit (never 0); int64 wraps around
        order = key.argsort(stable=True)  # equal keys side by side, in the order of the text
        before, here = order[:-1], order[1:]  # if their keys are equal: the last time, now
        again = (key[before] == key[here]) & (here - before <= REACH)
        followed = torch.full_like(part, none)
        followed[here[again]] = part[before[again] + 1]
        found[begin:begin + 2**20] = followed[begin - start:]
    return found


class Memory:
    """recall() one token at a time, for generation: a dictionary stores where the last n tokens occurred."""

    def __init__(self, orders: list[int], none: int, end: int):
        self.orders, self.none, self.end = orders, none, end
        self.read, self.after = [], {}  # all tokens; n tokens -> position of the next one

    def add(self, token: int) -> list[int]:
        """Read a token. Returns what followed the last time, for each n."""
        self.read.append(token)
        if token == self.end:
            self.after.clear()  # a new song
        here = len(self.read)  # position of the next token
        lasts = [(n, *self.read[-n:]) for n in self.orders]
        places = [self.after.get(last, -REACH) for last in lasts]
        self.after.update((last, here) for last in lasts)
        return [self.read[place] if here - place <= REACH else self.none for place in places]


def with_recall(ids: torch.Tensor, config: Config, tokenizer) -> torch.Tensor:
    """The tokens and, for each n, what is recalled at each position: shape (N, 1 + orders)."""
    orders = recall_orders(config)  # each n, for example [10, 20]
    data = ids.new_empty(len(ids), 1 + len(orders))
    data[:, 0] = ids
    for column, n in enumerate(orders, start=1):
        data[:, column] = recall(ids, n, tokenizer.vocab_size, tokenizer.end)
    return data


def row_length(config: Config, step: int) -> int:
    """Tokens in a row at this step: the length doubles `grow` times, at even intervals, up to the context.

    Nearby context is learned first, and short rows are fast, because attention looks at all pairs of
    positions (Press et al., "Shortformer", arXiv:2012.15832).
    """
    doublings = step * (config.grow + 1) // config.max_iters  # so far: 0, 1, ..., grow
    return max(1, config.block_size // 2**(config.grow - doublings))


@functools.lru_cache(2)  # drawn once an epoch, not once a step; a step may span two epochs
def shuffled_windows(length: int, size: int, seed: int) -> torch.Tensor:
    """Where an epoch's windows begin, in random order: one every `size` tokens of a ring. (length // size,)"""
    generator = torch.Generator().manual_seed(seed)
    cut = torch.randint(length, (1,), generator=generator)  # a new offset each epoch
    return cut + size * torch.randperm(length // size, generator=generator)


def read_at(data: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The rows of data at these places, as int64: shape (*places.shape, 1 + orders)."""
    # With NumPy: torch before 2.10 cannot index tensors of 16-bit numbers, which stage 2 has.
    return torch.from_numpy(data.numpy()[places.numpy()]).long()


def draw_batch(data, config: Config, step: int, rank: int, world: int) -> torch.Tensor:
    """The rows of a step for process `rank` of `world`, shape (grad_accum, B, T + 1, 1 + orders).

    classic: windows anywhere. modern: epochs: while rows do not grow, nothing is read twice before
    everything is read once. The draw depends only on seed and step: a resumed run draws the same.
    """
    size = row_length(config, step)  # T
    rows = config.batch_size * (config.block_size // size)  # shorter rows, but more of them
    count = config.grad_accum * rows * world  # rows in this step, in all processes
    if config.recipe == "classic":
        generator = torch.Generator().manual_seed(hash((config.seed, step)))
        starts = torch.randint(len(data) - size, (count,), generator=generator)
        starts = starts[rank::world]  # this process's share
    else:
        per_epoch = len(data) // size  # rows
        numbers = torch.arange(step * count + rank, (step + 1) * count, world)  # of all the run's rows
        first = step * count // per_epoch  # the epoch of the step's first row
        last = ((step + 1) * count - 1) // per_epoch  # and of its last: a step may span two
        epochs = [shuffled_windows(len(data), size, hash((config.seed, epoch)))
                  for epoch in range(first, last + 1)]
        starts = torch.cat(epochs)[numbers - first * per_epoch]
    places = starts[:, None] + torch.arange(size + 1)  # (grad_accum * rows, T + 1): inputs and targets
    read = read_at(data, places % len(data))  # after the end comes the beginning
    return read.view(config.grad_accum, rows, size + 1, -1)


# -------------------------------------------------------------------------------------------- model
def rotate(x, rope):
    """Rotary positions (Su et al., arXiv:2104.09864): rotate pairs of numbers by angles that grow with the position.

    The dot product of a query and a key then depends on the distance between them. x: (..., T, hs).
    """
    cos, sin = rope.to(x.dtype)  # (T, hs) each; the first half of sin is negated
    a, b = x.chunk(2, dim=-1)  # the pairs: one number from each half
    return x * cos + torch.cat((b, a), dim=-1) * sin  # a cos - b sin, b cos + a sin


class MultiHeadAttention(nn.Module):
    """Self-attention written out, all heads in one batched product (Vaswani et al., arXiv:1706.03762)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.block_size = config.n_head, config.block_size
        self.modern = config.recipe == "modern"
        C = config.n_embd
        self.query = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.proj = nn.Linear(C, C, bias=not self.modern)  # mixes the heads
        self.dropout = Dropout(config.dropout)  # nn.Dropout, but faster on a CPU
        if self.modern:  # QK-norm (Henry et al., arXiv:2010.04245) keeps the scores within bounds
            self.qk_norm = nn.LayerNorm(C // config.n_head, bias=False)

    def forward(self, x, mask, rope=None, cache=None):
        """Mix into each position what came before it. x: (B, T, C); mask: (T, S), 0 or -inf; S: T and the cached."""
        B, T, C = x.shape  # rows, positions, width
        heads = B, T, self.n_head, C // self.n_head  # nh heads of size hs
        q = self.query(x).view(heads).transpose(1, 2)  # what a position looks for, (B, nh, T, hs)
        k = self.key(x).view(heads).transpose(1, 2)  # what it can be found by
        v = self.value(x).view(heads).transpose(1, 2)  # what it has to say
        if self.modern:
            q, k = rotate(self.qk_norm(torch.stack((q, k))), rope)  # both at once
        if cache is not None:  # in generation, k and v of earlier positions are kept
            S = mask.size(1)  # all positions so far, the last T of them new
            if self not in cache:
                cache[self] = k.new_empty(2, B, self.n_head, self.block_size, q.size(-1))
            kept = cache[self][..., :S, :]  # (2, B, nh, S, hs)
            kept[..., S - T:, :] = torch.stack((k, v))
            k, v = kept
        q = q * q.size(-1) ** -0.5  # or scores grow with the size of a head
        scores = q @ k.transpose(-2, -1)  # (B, nh, T, S)
        scores = scores + mask.to(scores.dtype)  # -inf hides the future
        weights = self.dropout(scores.softmax(dim=-1))  # each row sums to 1, before dropout
        out = weights @ v  # (B, nh, T, hs)
        out = out.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """What each position does on its own: ReLU, or the modern SwiGLU with a gate (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        self.modern = config.recipe == "modern"
        C = config.n_embd
        hidden = 4 * C
        if self.modern:  # three matrices of two thirds the size have as many parameters as two
            hidden = 32 * max(1, round(C * 8 / 3 / 32))  # a multiple of 32
            self.gate = nn.Linear(C, hidden, bias=False)
        self.up = nn.Linear(C, hidden, bias=not self.modern)
        self.down = nn.Linear(hidden, C, bias=not self.modern)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        """Shape in and out: (B, T, C)."""
        if self.modern:
            x = F.silu(self.gate(x)) * self.up(x)  # (B, T, hidden)
        else:
            x = F.relu(self.up(x))  # (B, T, 4C)
        return self.dropout(self.down(x))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: Config):
        super().__init__()
        # LayerNorm without a bias is RMSNorm (arXiv:1910.07467) of a centred x, but faster on a CPU.
        bias = config.recipe == "classic"
        self.norm1 = nn.LayerNorm(config.n_embd, bias=bias)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=bias)
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, mask, rope=None, cache=None):
        """Shape in and out: (B, T, C)."""
        x = x + self.attention(self.norm1(x), mask, rope, cache)  # look back
        return x + self.feed_forward(self.norm2(x))  # think


class SlicedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head that never holds all logits: for 16,384 tokens they take 3.3 GB.

    The tokens go through the head a slice at a time, and each slice adds its part of the gradients right
    away, in float32; then its logits are freed.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        """The loss in nats per token. x: (N, C); weight: (V, C); bias: (V,) or None; targets: (N,), -100: ignored."""
        count, total = (targets >= 0).sum(), 0  # how many tokens are predicted; the sum of their nats
        grads = [None if tensor is None else torch.zeros_like(tensor, dtype=torch.float32)
                 for tensor in (x, weight, bias)]
        size = max(1, 2**24 // weight.size(0))  # 64 MB of logits
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), size):
                end = start + size
                part = x[start:end].float()
                target = targets[start:end]
                logits = F.linear(part, weight, bias)  # (n, V)
                total = total + F.cross_entropy(logits, target, reduction="sum")
                share = (target >= 0)[:, None] / count  # (n, 1): each token's weight in the mean
                answer = target.clamp(min=0)[:, None]  # (n, 1)
                error = logits.softmax(dim=-1)  # the gradient of the logits, (n, V): the prediction
                error.scatter_add_(1, answer, -torch.ones_like(share))  # minus the target
                error *= share
                torch.mm(error, weight, out=grads[0][start:end])  # (n, C)
                grads[1].addmm_(error.T, part)  # (V, C)
                if bias is not None:
                    grads[2] += error.sum(dim=0)
        ctx.save_for_backward(*grads)
        return total / count

    @staticmethod
    def backward(ctx, scale):
        """The gradients are computed already; only the outer factor is applied."""
        grads = [None if grad is None else grad * scale for grad in ctx.saved_tensors]
        return *grads, None


class GPTLanguageModel(nn.Module):
    """For each position, a score for every token that may come next."""

    def __init__(self, config: Config, vocab_size: int):
        super().__init__()
        self.modern = config.recipe == "modern"
        self.orders = recall_orders(config)
        T, C = config.block_size, config.n_embd  # context and width
        entries = vocab_size + (1 if self.orders else 0)  # the last one: nothing is recalled
        self.token_embedding = nn.Embedding(entries, C)  # C numbers for each token
        self.recall = nn.ModuleList(nn.Linear(C, C, bias=False) for _ in self.orders)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(C, bias=not self.modern)  # before the head
        self.lm_head = nn.Linear(C, vocab_size, bias=not self.modern)
        future = torch.full((T, T), -math.inf).triu(1)  # 0 up to each position, -inf after it
        self.register_buffer("mask", future, persistent=False)  # not saved with the weights
        if self.modern:
            head_size = C // config.n_head  # hs
            speed = 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)  # radians per position
            angles = torch.outer(torch.arange(T), speed).repeat(1, 2)  # (T, hs), for both halves
            signs = torch.tensor([-1, 1]).repeat_interleave(head_size // 2)  # see rotate
            rope = torch.stack((angles.cos(), angles.sin() * signs))  # (2, T, hs)
            self.register_buffer("rope", rope, persistent=False)
        else:
            self.position_embedding = nn.Embedding(T, C)
        self.apply(self.init_weights)  # to each module, a block after its parts
        for matrix in self.recall:  # training adds as much of recall as helps
            nn.init.zeros_(matrix.weight)

    def init_weights(self, module):
        """Small random numbers. modern: each block starts as the identity."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block) and self.modern:
            nn.init.zeros_(module.attention.proj.weight)
            nn.init.zeros_(module.feed_forward.down.weight)

    def forward(self, idx, targets=None, recalled=None, cache=None, past=0):
        """Logits (B, T, vocab_size), or with targets (B, T) the mean loss. idx: (B, T), after `past` cached tokens.

        recalled: (B, T, orders), what followed the last time; None: no recall.
        """
        S = past + idx.size(1)  # all positions so far, the last T of them new
        x = self.token_embedding(idx)  # (B, T, C)
        if recalled is not None:
            for matrix, followed in zip(self.recall, recalled.unbind(dim=-1)):  # for each n
                x = x + matrix(self.token_embedding(followed))
        rope = self.rope[:, past:S] if self.modern else None
        if not self.modern:
            x = x + self.position_embedding.weight[past:S]
        mask = self.mask[past:S, :S]  # (T, S)
        for block in self.blocks:
            x = block(x, mask, rope, cache)
        x = self.norm(x)
        head = self.lm_head
        if targets is None:
            return head(x)  # (B, T, vocab_size)
        return SlicedLoss.apply(x.flatten(0, 1), head.weight, head.bias, targets.flatten())


# --------------------------------------------------------------------------- optimizer and schedule
def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Push all singular values of each matrix (n, rows, cols) towards 1: Newton-Schulz steps instead of an SVD.

    Coefficients of Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """
    if matrices.size(1) > matrices.size(2):  # take the smaller of the two Gram matrices
        return orthogonalize(matrices.mT).mT
    norms = matrices.norm(dim=(1, 2), keepdim=True)
    x = matrices / norms.clamp(min=1e-7)  # now no singular value is above 1
    for _ in range(5):
        a = x @ x.mT  # (n, rows, rows)
        a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)  # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, a, x, beta=3.4445)  # 3.4445 x + a x
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum: every direction of a weight matrix learns at the same pace (Jordan et al., 2024).

    The step of torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (arXiv:2502.16982: one learning rate
    for Muon and AdamW), but all matrices of a group have the same shape and share one batched product.
    """

    def __init__(self, groups, lr: float, weight_decay: float):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """One step for all parameters."""
        for group in self.param_groups:
            params = group["params"]  # matrices of the same shape
            lr, beta = group["lr"], 0.95
            grad = torch.stack([p.grad for p in params])  # (n, rows, cols)
            momentum = self.state[params[0]].setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 1 - beta)  # a running mean of the gradients
            updates = orthogonalize(grad.lerp_(momentum, beta))  # Nesterov: look one step ahead
            scale = 0.2 * math.sqrt(max(params[0].shape))  # as large as a typical step of AdamW
            for p, update in zip(params, updates):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * scale)


def make_optimizers(model: GPTLanguageModel, config: Config) -> list[torch.optim.Optimizer]:
    """classic: AdamW for everything. modern: Muon for the matrices inside the blocks, AdamW without decay for the rest."""
    lr, decay = config.learning_rate, config.weight_decay
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    if config.recipe == "classic":
        return [torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=fused)]
    shapes, rest = {}, []  # matrices of the same shape are orthogonalized together
    for name, p in model.named_parameters():
        if "blocks" in name and p.ndim == 2:
            shapes.setdefault(p.shape, []).append(p)
        else:
            rest.append(p)
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    groups = [dict(params=matrices) for matrices in shapes.values()]
    return [Muon(groups, lr, decay), adamw]


def learning_rate(config: Config, step: int) -> float:
    """classic: constant. modern: linear warm-up, then linear decay, to zero at max_iters."""
    if config.recipe == "classic":
        return config.learning_rate
    rise = (step + 1) / (config.warmup_iters + 1)  # small steps at first
    steps_to_fall = max(1, config.max_iters - config.warmup_iters)
    fall = (config.max_iters - step) / steps_to_fall  # and at the end
    return config.learning_rate * min(rise, fall)


# --------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def token_losses(model, data, config: Config, context: int) -> torch.Tensor:
    """Nats for each token but the first, each predicted exactly once: at most (N - 1,). Nothing is random.

    Each window begins in the middle of the previous one, and only its new half counts: after the first
    window, every token is predicted from at least half a context, as in generation.
    """
    model.eval()
    device = next(model.parameters()).device
    stride = max(1, context // 2)  # from a window to the next
    rows = config.batch_size * (config.block_size // context)  # as many tokens as in training,
    most = 2**24 // (context * model.lm_head.out_features)  # but at most 64 MB of logits
    rows = min(rows, max(1, most))
    stop = len(data) - 1 - context + stride  # so the last window reaches the last token
    starts = torch.arange(0, max(1, stop), stride)
    losses = []
    for start in starts.split(rows)[:config.eval_iters or None]:  # (B,)
        places = start[:, None] + torch.arange(context + 1)  # (B, T + 1)
        read = read_at(data, places.clamp(max=len(data) - 1))  # (B, T + 1, 1 + orders)
        read = read.to(device)
        inputs = read[:, :-1, 0]  # (B, T)
        recalled = read[:, :-1, 1:]  # (B, T, orders)
        targets = read[:, 1:, 0].flatten()  # (B * T,)
        with mixed_precision(config.dtype, device):
            logits = model(inputs, recalled=recalled)  # (B, T, vocab_size)
        logits = logits.flatten(0, 1).float()  # (B * T, vocab_size)
        nats = F.cross_entropy(logits, targets, reduction="none")  # (B * T,)
        new = places[:, 1:] < len(data)  # within the text,
        new[start > 0, :context - stride] = False  # and not in the previous window
        losses.append(nats.cpu()[new.flatten()])
    return torch.cat(losses).double()


def evaluate(model, data, tokenizer, config: Config, context: int) -> tuple[float, float]:
    """(nats per token, bits per character): the same model always gets the same figure.

    Bits per character, nats / (ln 2 * characters), can be compared between tokenizers.
    """
    nats = token_losses(model, data, config, context)
    ids = data[1:len(nats) + 1, 0]
    chars = tokenizer.count_chars(ids).sum().item()  # a token may be several characters
    bits = nats.sum().item() / math.log(2)
    return nats.mean().item(), bits / chars


# ----------------------------------------------------------------------------------------- sampling
def draw_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token per row from the scores: logits (B, vocab_size), result (B,)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)  # the likeliest
    scores = logits.float() / temperature
    scores, order = scores.sort(dim=-1, descending=True)  # the likeliest first
    probs = scores[:, :top_k or None].softmax(dim=-1)  # (B, k), or all of them
    if probs.isnan().any():
        raise Stop(NAN, 1)
    if top_p < 1:  # nucleus sampling (Holtzman et al., arXiv:1904.09751)
        likelier = probs.cumsum(dim=-1) - probs  # the sum of those before it
        probs[likelier >= top_p] = 0
    drawn = torch.multinomial(probs, 1, generator=generator)  # places in that order, (B, 1)
    return order.gather(-1, drawn).squeeze(1)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, context, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             end=-1):
    """Yield the next token of each row, shape (B,), max_new_tokens times. idx: (B, T), the prompt.

    The cache keeps each block's keys and values, so a new token costs only one position. When the context
    is full, its last half is kept and read again.
    """
    model.eval()
    memories = [Memory(model.orders, model.lm_head.out_features, end) for _ in idx]
    rows = [[] for _ in idx]  # for each row its tokens, with what each recalls
    new = idx  # tokens not read yet: the prompt, then one a row, (B, T)
    cache, past = {}, 0  # past: how many positions the cache holds
    for _ in range(max_new_tokens):
        for row, memory, tokens in zip(rows, memories, new.tolist()):
            row.extend([token, *memory.add(token)] for token in tokens)
        T = new.size(1)
        if past + T > context:  # full
            T = max(1, context // 2) if past else context  # of a long prompt, all that fits
            cache, past = {}, 0
        read = torch.tensor([row[-T:] for row in rows], device=idx.device)  # (B, T, 1 + orders)
        idx = read[..., 0]  # (B, T)
        recalled = read[..., 1:]  # (B, T, orders)
        logits = model(idx, recalled=recalled, cache=cache, past=past)  # (B, T, vocab_size)
        past += T
        token = draw_token(logits[:, -1], temperature, top_k, top_p, generator)
        yield token
        new = token[:, None]  # (B, 1)


def sample_text(model, tokenizer, config: Config, context: int, number=0, length=None, prompt=None):
    """Yield a text piece by piece, the prompt first. The same seed and number give the same text."""
    device = next(model.parameters()).device
    seed = hash((config.seed, -1, number))  # -1: no training step draws the same numbers
    generator = torch.Generator(device).manual_seed(seed)
    prompt = config.prompt if prompt is None else prompt
    idx = tokenizer.encode(prompt or tokenizer.start)
    idx = idx.long().to(device)[None]  # (1, T)
    yield prompt  # not drawn, but part of the text
    # On a CPU, with one position at a time, casts to bfloat16 cost more than they save.
    with mixed_precision("float32" if device.type == "cpu" else config.dtype, device):
        tokens = generate(model, idx, length or config.max_new_tokens, context,
                          config.temperature, config.top_k, config.top_p, generator, tokenizer.end)
        ids = (token.item() for token in tokens)
        if config.stop_at_end:
            ids = itertools.takewhile(lambda token: token != tokenizer.end, ids)
        for piece in tokenizer.stream(ids):
            yield piece.replace(END, SEPARATOR)


# ----------------------------------------------------------------------------------------- training
def take_step(network, optimizers, scaler, rows, config: Config, step: int) -> torch.Tensor:
    """One optimizer step on rows (grad_accum, B, T + 1, 1 + orders). Returns the mean loss, in nats per token."""
    torch.manual_seed(hash((config.seed, step, RANK)))  # for dropout, so no RNG state must be saved
    network.train()  # dropout on
    amp = mixed_precision(config.dtype, rows.device)
    total = 0  # adds up to the mean loss
    for batch in rows:
        idx = batch[:, :-1, 0]  # (B, T)
        targets = batch[:, 1:, 0]  # what comes next
        recalled = batch[:, :-1, 1:]  # (B, T, orders)
        with amp:
            loss = network(idx, targets, recalled) / config.grad_accum
        scaler.scale(loss).backward()  # in float16 small gradients vanish unless scaled
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)  # back to their true size
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
    norm = nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        if not scaler.is_enabled() or norm.isfinite():  # an overflow in float16 skips the step
            with amp:  # Muon's matrix products, too
                scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    return total


def train(config: Config, model, tokenizer, train_data, val_data, facts: dict,
          saved: dict | None) -> list[dict]:
    """Train to max_iters, or until `patience` evaluations bring no improvement. Returns all evaluations' records."""
    device = next(model.parameters()).device
    network = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
    if config.compile:
        network = torch.compile(network, dynamic=False)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=facts["dtype"] == "float16")
    history, start, seconds = [], 0, 0.0  # seconds: of the steps alone
    if saved:  # continue from the last evaluation
        history = saved["history"]
        start, seconds = history[-1]["iter"], history[-1]["seconds"]
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
    context, losses, told = config.block_size, [], seconds  # told: seconds at the last report
    hidden = None if RANK == 0 and sys.stderr else True  # None: hidden unless on a terminal
    bar = tqdm(total=config.max_iters, initial=start, unit="step", leave=False, disable=hidden)
    for step in range(start, config.max_iters + 1):

        # Once in a while: evaluate, keep the best model and a checkpoint to continue from.
        due = step % config.eval_interval == 0 or step == config.max_iters
        if due and not (saved and step == start):  # a resumed run has evaluated that step
            val_loss, val_bpc = map(average, evaluate(model, val_data, tokenizer, config, context))
            train_loss = average(torch.stack(losses).mean().item()) if losses else val_loss
            best = all(val_loss < record["val_loss"] for record in history)
            history.append(dict(
                iter=step, train_loss=train_loss, val_loss=val_loss, val_bpc=val_bpc,
                learning_rate=learning_rate(config, step), seconds=seconds))
            state = make_checkpoint(config, tokenizer, model, optimizers, scaler, history, context)
            save(best, state, facts)
            pace = (seconds - told) / max(1, len(losses))  # seconds per step
            left = (config.max_iters - step) * pace / 60  # minutes, without evaluations
            report = f"step {step:>5}  train {train_loss:.3f}  val {val_loss:.3f} nats/token = {val_bpc:.3f} bits/char"
            report += "  best" * best
            report += f"  {left:.1f} minutes left" * (left > 0)
            say(report)
            losses, told = [], seconds

        # Once in a while: let it write.
        if config.sample_interval and step > start and step % config.sample_interval == 0:
            text = "".join(sample_text(model, tokenizer, config, context, length=120))
            say(text + "\n")

        since_best = len(history) - 1 - history.index(best_of(history))
        if step == config.max_iters or 0 < config.patience <= since_best:
            bar.close()
            return history

        # One step.
        began = time.perf_counter()  # evaluating and sampling are not timed
        rows = draw_batch(train_data, config, step, RANK, WORLD)
        rows = rows.to(device, non_blocking=True)
        losses.append(take_step(network, optimizers, scaler, rows, config, step))
        context = row_length(config, step)  # how far back the model has learned to look
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {losses[-1].item():.3f}")  # item() waits for a GPU
        seconds += time.perf_counter() - began
        bar.update()


# ------------------------------- the end of the lesson: devices, files, command line
class Dropout(nn.Dropout):
    """nn.Dropout (Srivastava et al., 2014), faster on a CPU: torch draws a double for each number, we a byte."""

    def forward(self, x):
        """In training, zero a fraction p (rounded to 256ths) and scale the rest by 1 / (1 - p). Any shape."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        bound = round(256 * self.p)  # a byte below it means zero
        count = math.ceil(x.numel() / 8)
        words = torch.randint(-2**63, 2**63 - 1, (count,))  # 64 random bits each
        numbers = words.view(torch.uint8)[:x.numel()]
        numbers = numbers.view(x.shape).to(x.dtype)
        keep = torch.ge(numbers, bound, out=torch.empty_like(numbers))  # 0 or 1, in x's dtype
        return x * keep.mul_(256 / (256 - bound))


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


def recall_orders(config: Config) -> list[int]:
    """The numbers in --recall. Stop if they are invalid."""
    if not re.fullmatch(r"([1-9]\d{0,2}(,[1-9]\d{0,2}){0,9})?", config.recall):
        raise Stop(f"--recall {config.recall}: must be numbers from 1 to 999, such as 10,20")
    if config.recall and config.recipe == "classic":
        raise Stop("--recall needs --recipe modern")
    return [int(n) for n in config.recall.split(",") if n]


def repeated(text: str) -> torch.Tensor:
    """For each character: is it in a line of 12 or more that occurs in the 3,000 before it? Case is ignored."""
    marks = torch.zeros(len(text), dtype=torch.bool)
    for line in re.finditer(rf"[^\n{END}]{{12,}}", text):
        begin, end = line.span()
        recent = text[max(0, begin - 3000):begin]
        marks[begin:end] = line[0].lower() in recent.lower()
    return marks


def by_repetition(model, data, tokenizer, config: Config, context: int) -> dict:
    """Does the model use what it has read? Bits per character in repeated lines and elsewhere, and their share.

    A token counts where its last character is. None where there is nothing to measure.
    """
    nats = token_losses(model, data, config, context)
    ids = data[1:len(nats) + 1, 0]
    chars = tokenizer.count_chars(ids)
    text = "".join(tokenizer.stream(ids.tolist()))
    ends = (chars.cumsum(0) - 1).clamp(min=0)  # where each token ends in it
    marks = repeated(text)[ends]

    def bits(part):
        count = chars[part].sum().item()
        if not count:
            return None
        return nats[part].sum().item() / math.log(2) / count

    share = chars[marks].sum().item() / chars.sum().item()
    return dict(refrain_share=share, refrain_bpc=bits(marks), other_bpc=bits(~marks))


def best_of(history: list[dict]) -> dict:
    """The record of the evaluation with the lowest loss."""
    return min(history, key=lambda record: record["val_loss"])


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

    presets = []  # what each size and recipe sets
    for name, preset in (SIZES | RECIPES).items():
        values = ", ".join(f"{option} {value}" for option, value in preset.items())
        presets.append(textwrap.fill(f"{name}: {values}", 79))
    parser = argparse.ArgumentParser(
        SCRIPT, description=__doc__, epilog="\n".join(presets),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        help = f.metadata["help"]
        if f.default not in ("", False):
            help += f" (default: {f.default or 'by size or recipe'})"
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
    return given


def inherit(given: dict, checkpoint: dict | None) -> dict:
    """The given options, completed by the checkpoint's: by all of them to resume, else by the model's shape."""
    if not checkpoint:
        return given
    old = checkpoint["config"]
    for name in SHAPE:
        asked = given.get(name, old[name])
        if asked != old[name]:
            raise Stop(f"--{name} {asked} contradicts the checkpoint's {old[name]!r}: leave it out, or retrain")
    names = set(SHAPE)  # a new run from old weights
    if given.get("resume"):
        asked = given.get("max_iters", math.inf)
        if asked < old["max_iters"]:
            raise Stop(f"--max_iters {asked} is below the checkpoint's {old['max_iters']}: it may only grow")
        names = old.keys() - UNINHERITED  # the same run
    return {name: old[name] for name in names} | given


def make_config(given: dict, device: torch.device, tokens: int = 0) -> Config:
    """Fill in what was not given: from the recipe, the size and, in modern, the number of training tokens.

    modern makes EPOCHS passes over the text, but takes at least 100 steps and at most the size's number,
    with at least ten evaluations and four samples.
    """
    size, recipe = given.get("size", "auto"), given.get("recipe", Config.recipe)
    if size == "auto":
        enough = tokens >= LARGE or recipe == "classic"
        size = "base" if device.type == "cuda" and enough else "tiny"
    known = SIZES[size] | RECIPES[recipe] | given | dict(size=size)
    if recipe != "classic" and "max_iters" not in given:
        rows = known.get("grad_accum", 1) * known["batch_size"] * WORLD  # in a step
        steps = EPOCHS * tokens // (rows * known["block_size"])
        known["max_iters"] = min(known["max_iters"], max(100, steps))
    for name, times in (("eval_interval", 10), ("sample_interval", 4)):
        if name not in given:
            interval = math.ceil(known["max_iters"] / times)
            known[name] = min(known[name], interval)
    run_dir = given.get("run_dir", Config.run_dir)
    known.setdefault("save_path", f"{run_dir}/model_best.pt")
    known.setdefault("output", f"{run_dir}/output/sample.txt")
    config = Config(**known)
    recall_orders(config)
    head_size, rest = divmod(config.n_embd, config.n_head)  # heads share the width
    if rest or config.recipe == "modern" and head_size % 2:
        raise Stop(f"--n_embd {config.n_embd} must be divisible by --n_head {config.n_head} (modern: into an even number)")
    return config


def byte_symbols() -> dict[str, int]:
    """The byte for each character of a byte-level vocabulary (Radford et al., 2019, GPT-2's encoder.py).

    Printable ones stand for themselves, the others are numbered from 256.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): byte for byte in printable}
    return symbols | {chr(256 + i): byte for i, byte in enumerate(others)}


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


def numbers_of(core: Tokenizer) -> dict[str, int]:
    """The number of each entry. Stop if two share one, or if most have no entry: a list would fill the memory."""
    vocab = core.get_vocab()
    numbers = set(vocab.values())
    if len(numbers) < len(vocab) or max(numbers, default=0) > 2 * len(vocab):
        raise Stop("that tokenizer gives a number to two entries, or leaves most numbers out: take another")
    return vocab


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """OpenAI's encoding as a tokenizer that a checkpoint can store. OSError or ValueError if it cannot be fetched."""
    encoding = tiktoken.get_encoding(name)
    symbols = {byte: symbol for symbol, byte in byte_symbols().items()}
    vocab = {"".join(symbols[byte] for byte in entry): number
             for entry, number in encoding._mergeable_ranks.items()}
    merges = []  # tiktoken joins any two pieces that make up an entry, early entries first
    for entry in sorted(vocab, key=vocab.get):
        halves = [(entry[:cut], entry[cut:]) for cut in range(1, len(entry))]
        pairs = [(a, b) for a, b in halves if a in vocab and b in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    core = byte_level(models.BPE(vocab, merges, ignore_merges=True))
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")  # the library reads {1,3}+ as any number
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.add_special_tokens([END_TEXT])
    return core


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, or a folder with one or with vocab.json and merges.txt. Stop if it is invalid."""
    try:
        file = path / "tokenizer.json" if path.is_dir() else path
        if path.is_dir() and not file.exists():
            parts = str(path / "vocab.json"), str(path / "merges.txt")
            core = byte_level(library(models.BPE.from_file, *parts))
        else:
            core = library(Tokenizer.from_file, str(file))
        if not isinstance(core.model, models.BPE):
            raise Stop("its tokenizer is not of BPE kind: take another")
        numbers_of(core)
        return core
    except Stop as e:
        raise Stop(f"--tokenizer_path {path}: {e}") from None


def find_tokenizer(given: dict, text: str) -> tuple[Tokenizer, str]:
    """The tokenizer that was asked for, and its name.

    An existing --tokenizer_path wins; auto: else tiktoken's, else one made of the text.
    """
    kind = given.get("tokenizer", Config.tokenizer)
    named = given.get("tokenizer_path")
    path = Path(named or "")
    if kind == "tiktoken" and named:
        raise Stop("--tokenizer tiktoken takes no --tokenizer_path: leave one of them out")
    if "vocab_size" in given and kind != "custom":
        raise Stop("--vocab_size needs --tokenizer custom")
    if named and (path.exists() or kind == "polish"):
        return read_tokenizer(path), str(path)
    if kind == "polish":
        from transformers import AutoTokenizer  # here, as it takes seconds to import

        try:
            return AutoTokenizer.from_pretrained(POLISH).backend_tokenizer, POLISH
        except OSError as e:
            raise Stop(f"cannot fetch the tokenizer of {POLISH} ({type(e).__name__}): go online once, or give a copy "
                       "of it as --tokenizer_path") from None
    note = ""
    if kind in ("auto", "tiktoken"):
        encoding = given.get("encoding", Config.encoding)
        try:
            return tiktoken_tokenizer(encoding), f"tiktoken's {encoding}"
        except (OSError, ValueError) as e:  # ValueError: the download is not that file
            note = f"tiktoken's {encoding} cannot be fetched ({type(e).__name__})"
            if kind == "tiktoken":
                raise Stop(f"{note}: go online once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or "
                           "take --tokenizer custom") from None
    size = given.get("vocab_size", Config.vocab_size)
    core = train_tokenizer(split_corpus(text)[0], size)
    name = f"custom, {size:,} entries from the training part"
    return core, f"{name}, as {note}" if note else name


def make_tokenizer(given: dict, text: str, checkpoint: dict | None) -> BPETokenizer:
    """The checkpoint's tokenizer, or a new one for the text. Stop if it would lose a character of the text."""
    named = given.get("tokenizer_path")
    path = Path(named or "")  # "": the current folder, so it exists
    for name in ("save_path", "output"):
        if named and given.get(name) and path.resolve() == Path(given[name]).resolve():
            raise Stop(f"--tokenizer_path and --{name} are the same file: choose another")
    if not path.exists():
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        writable = parent.is_dir() and os.access(parent, os.W_OK)
        if not writable or is_run(path.absolute().parent):
            raise Stop(f"cannot write --tokenizer_path {path} ({parent} is not a writable folder, "
                       "or the file belongs to a run): choose another")
    if checkpoint:
        state = checkpoint["tokenizer"]
        if named and path.exists():
            theirs = BPETokenizer(read_tokenizer(path).to_str())
            if theirs.pieces != BPETokenizer(state["source"]).pieces:
                raise Stop(f"--tokenizer_path {path} is not the checkpoint's tokenizer: leave it out")
        return BPETokenizer(**state)
    core, name = find_tokenizer(given, text)
    source = core.to_str()
    start = next((char for char in END + "\n" if char in text), text[:1])
    tokenizer = BPETokenizer(source, start=start)
    for begin in range(0, len(text), 2**20):  # in parts, to save memory
        part = text[begin:begin + 2**20]
        if tokenizer.decode(tokenizer.encode(part)) != part:
            raise Stop("that tokenizer loses characters of the text: take another")
    if given.get("prune_vocab"):
        seen = set(tokenizer.encode(split_corpus(text)[0]).tolist())
        single = {i for i, piece in enumerate(tokenizer.pieces) if len(piece) == 1}  # the bytes and the end
        tokenizer = BPETokenizer(source, sorted(seen | single), start)
    say(f"tokenizer: {name}")
    show_pieces(tokenizer, text)
    return tokenizer


def save_tokenizer(tokenizer: BPETokenizer, config: Config):
    """Write RUN_DIR/tokenizer.json and, if there is none, the file at --tokenizer_path."""
    given = Path(config.tokenizer_path)  # "": the current folder, which exists
    paths = [Path(config.run_dir, "tokenizer.json")]
    if not config.resume and not given.exists():
        given.parent.mkdir(parents=True, exist_ok=True)
        paths.append(given)
    for path in paths:
        with replacing(path) as file:
            file.write(tokenizer.state["source"].encode())


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


# ----------------------------------------------------------------------------------------- checkpoints
FORMAT_VERSION = 4
NAN = "the loss turned NaN: lower --learning_rate"
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
           AssertionError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)  # what a bad file may raise


def make_checkpoint(config: Config, tokenizer, model, optimizers, scaler, history: list, context: int) -> dict:
    """Everything needed to sample and to continue."""
    return dict(
        stage=STAGE, format_version=FORMAT_VERSION, config=asdict(config), tokenizer=tokenizer.state,
        model=model.state_dict(), optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
        scaler=scaler.state_dict(), history=history, context=context)


def form(value):
    """The structure of a checkpoint: names, types and shapes, without the numbers."""
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    if isinstance(value, list):
        return [form(part) for part in value]
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.layout, value.stride()
    return type(value)


def is_finite(saved: dict) -> bool:
    """Are the losses, the weights and the optimizers' states all finite?"""
    losses = torch.tensor([record["val_loss"] for record in saved["history"]])
    numbers = [losses, *saved["model"].values()]
    for states in saved["optimizers"]:
        for state in states.values():
            numbers += state.values()
    return all(number.isfinite().all() for number in numbers)


def check_checkpoint(saved: dict):
    """Raise an error unless a loaded file has the structure of this script's checkpoints, and sane values."""
    if (saved["stage"], saved["format_version"]) != (STAGE, FORMAT_VERSION):
        raise Stop("another script or version wrote it")
    check_values(saved["config"])
    config = Config(**saved["config"])
    tokenizer = make_tokenizer({}, "", saved)
    history = saved["history"]
    with torch.device("meta"):  # shapes without memory
        model = GPTLanguageModel(config, tokenizer.vocab_size)
    optimizers = make_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        if state:  # there is none before the first step
            optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=bool(saved["scaler"]))
    record = dict(iter=0, train_loss=0.0, val_loss=0.0, val_bpc=0.0, learning_rate=0.0, seconds=0.0)
    ours = make_checkpoint(config, tokenizer, model, optimizers, scaler, [record] * len(history), 1)
    sane = [
        form(saved) == form(ours | dict(corpus_sha256="")),
        is_finite(saved),
        len(history) > 0,
        0 < saved["context"] <= config.block_size,
        len(tokenizer.encode(tokenizer.start)) > 0]
    for record in history:
        sane.append(0 <= record["iter"] <= config.max_iters)
    for number in saved["scaler"].values():
        sane.append(0 <= number < {int: 2**31, float: 1e30}[type(number)])
    if not all(sane):
        raise ValueError


def load_checkpoint(path: str) -> dict:
    """Load this stage's checkpoint from a file or an address, to the CPU. Stop if it is missing or damaged."""
    try:
        source = urllib.request.urlopen(path, timeout=30) if "://" in path else open(path, "rb")
        with source:
            file = io.BytesIO(source.read())  # read once, checked, then loaded
        archive = zipfile.ZipFile(file)
        parts = archive.infolist()
        packed = any(part.compress_type or part.external_attr for part in parts)  # ours never do
        too_large = sum(part.file_size for part in parts) > len(file.getbuffer())
        if packed or too_large or archive.testzip():  # torch.load does not notice damaged numbers
            raise ValueError
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # of what a damaged file says of itself
            saved = torch.load(file, map_location="cpu", weights_only=True)  # so that it cannot run code
        check_checkpoint(saved)
        return saved
    except (OSError, HTTPException) as e:  # no file, no such address
        raise Stop(f"no checkpoint at {path} ({e}): train first, or give the right --run_dir or address") from None
    except Stop as e:
        reason = f"is not a checkpoint for {SCRIPT} ({e})"
    except DAMAGED:
        reason = f"is not a checkpoint of {SCRIPT}, or it is damaged"
    raise Stop(f"{path} {reason}: take another, or train again")


# ------------------------------------------------------------------------------------------------ files
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


def check_targets(config: Config):
    """Stop unless the run may write where it is told to. Changes nothing."""
    folder = Path(config.run_dir).resolve()
    best = Path(config.save_path).resolve()
    text = Path(config.input).resolve()
    names = ["run_dir", "save_path", "output"]
    for name in names[2 if config.sample_only else 1 if config.resume else 0:]:
        path = Path(getattr(config, name)).resolve()
        if name == "run_dir":
            reason = "it is not a run's folder, or it contains the text or the current folder"
            parts = (part.name for part in path.rglob("*"))  # a whole disk is not walked through
            ours = is_run(path) or all(re.match(r"output$|sample\.txt|.*\.tmp$", part) for part in parts)
            bad = path.exists() and not (path.is_dir() and ours)
            bad |= text.is_relative_to(path) or Path.cwd().is_relative_to(path)
        else:
            reason = "it is the text, the best checkpoint, a folder or a device, or it belongs to a run"
            bad = path == text or path.exists() and not path.is_file()
            if name == "output" or path != folder / "model_best.pt":
                bad |= path == best and name == "output"
                bad |= path.parent == folder or is_run(path.parent)
        parent = next((parent for parent in path.parents if parent.exists()), path)
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            bad, reason = True, parent
        if bad:
            raise Stop(f"cannot write --{name} {path} ({reason}): choose another")


@contextlib.contextmanager
def run_folder(config: Config, facts: dict):
    """Lock the run's folder for this process. An earlier run's folder is kept under another name."""
    folder = Path(config.run_dir).resolve()
    best = Path(config.save_path).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()  # until the run has ended
    except filelock.Timeout:
        raise Stop(f"another process writes to --run_dir {config.run_dir}: wait, or choose another") from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        if not config.resume and folder.exists() and any(folder.iterdir()):
            keep_previous(folder)  # as a whole
        folder.mkdir(exist_ok=True)
        for unfinished in folder.rglob("*.tmp"):  # left by a kill
            unfinished.unlink()
        versions = dict(python=sys.version, torch=torch.__version__)
        write_json(folder / "config.json", dict(facts, options=asdict(config), versions=versions))
        if best != folder / "model_best.pt":
            best.parent.mkdir(parents=True, exist_ok=True)
            keep_previous(best)
            if config.resume:
                with replacing(best) as file:
                    file.write((folder / "model_best.pt").read_bytes())
        yield
    except FAILURES as e:
        if (folder / "model_last.pt").exists():
            e.add_note("the last good checkpoint is kept; continue with: "
                       f"python {SCRIPT} --resume --run_dir {config.run_dir!r}")
        raise
    finally:
        lock.release()


def save(best: bool, checkpoint: dict, facts: dict):
    """Write a checkpoint as the last one and, if it is, as the best; then the report. Stop if a number is NaN."""
    if not is_finite(checkpoint):
        raise Stop(NAN, 1)
    config = checkpoint["config"]
    folder = config["run_dir"]
    checkpoint = checkpoint | dict(corpus_sha256=facts["corpus_sha256"])
    paths = [config["save_path"], f"{folder}/model_best.pt"] if best else []
    paths.append(f"{folder}/model_last.pt")  # what --resume reads comes last
    for path in dict.fromkeys(paths) if RANK == 0 else ():
        with replacing(path) as file:
            torch.save(checkpoint, file)
    write_report(folder, checkpoint["history"], facts)


def write_json(path: str, content: dict):
    """Write a dictionary as readable JSON."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def write_report(folder: str, history: list[dict], facts: dict) -> dict:
    """Write and return the metrics, and plot the losses."""
    last, best = history[-1], best_of(history)
    tokens = last["iter"] * facts["tokens_per_step"]
    rate = tokens / max(last["seconds"], 1e-9)
    metrics = dict(
        facts, stage=STAGE, val_loss=best["val_loss"], val_bpc=best["val_bpc"],
        best_iter=best["iter"], iters=last["iter"], seconds=last["seconds"],
        tokens_per_second=rate, chars_per_second=rate * facts["chars_per_token"],
        peak_memory_mb=peak_memory(facts["device"]))
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
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    steps = [record["iter"] for record in history]
    for name, color, label in (("train", "#0072B2", "training"), ("val", "#D55E00", "validation")):
        losses = [record[f"{name}_loss"] for record in history]
        axes.plot(steps, losses, color=color, marker=".", label=label)
    best = best_of(history)
    label = f"best: {best['val_loss']:.3f} = {best['val_bpc']:.3f} bits per character"
    axes.plot(best["iter"], best["val_loss"], "o", color="#D55E00", fillstyle="none", markersize=12, label=label)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120)


def write_samples(model, tokenizer, config: Config, context: int):
    """Write the texts to --output and to the screen at the same time: what is shown is what is saved."""
    if len(tokenizer.encode(config.prompt)) > context:
        print(f"note: the prompt is longer than the context; the model sees its last {context} tokens")
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    keep_previous(Path(config.output))
    with replacing(config.output) as file:
        for number in range(config.num_samples):
            end = SEPARATOR if number + 1 < config.num_samples else "\n"
            for piece in itertools.chain(sample_text(model, tokenizer, config, context, number), [end]):
                file.write(piece.encode())
                print(piece, end="", flush=True)
    print(f"-> {config.output}")


# ------------------------------------------------------------------------------------------------- main
FAILURES = (Stop, OSError, MemoryError, RuntimeError, KeyboardInterrupt)  # what may end a run
MEMORY = "out of memory: lower --batch_size (and raise --grad_accum), --block_size or --n_embd"
KNOWN = {"alloc": MEMORY, "out of memory": MEMORY, "connection": "another process of this run is gone",
         "compiler": "--compile needs a C++ compiler: install g++, or leave --compile out",
         "inline_container": "a checkpoint cannot be written: is the disk full?"}


def read_data(given: dict, saved: dict | None):
    """(tokenizer, training tokens, validation tokens, facts about the text). The text itself is not kept."""
    path = given.get("input", Config.input)
    text = "" if given.get("sample_only") else read_corpus(path)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    began_with = saved["corpus_sha256"] if given.get("resume") else sha256
    if sha256 != began_with:
        raise Stop(f"--input {path} (SHA-256 {sha256[:8]}) is not the text that this run began with "
                   f"({began_with[:8]}): give that one, or start a new run in another --run_dir")
    tokenizer = make_tokenizer(given, text, saved)
    train_text, val_text = split_corpus(text)
    train_ids = tokenizer.encode(train_text)
    val_ids = torch.cat((train_ids[-1:], tokenizer.encode(val_text)))  # the first is only context
    if not text:
        return tokenizer, train_ids, val_ids, {}
    facts = dict(tokenizer.describe(train_text, train_ids), characters=len(text), corpus_sha256=sha256)
    return tokenizer, train_ids, val_ids, facts


def make_facts(config: Config, tokenizer, device: torch.device) -> dict:
    """Facts about a run before it starts. Stop if its parameters alone need more memory than there is."""
    with torch.device("meta"):  # shapes without memory
        model = GPTLanguageModel(config, tokenizer.vocab_size)
    params = sum(p.numel() for p in model.parameters())
    if hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if 16 * params > memory:  # a weight, its gradient and two numbers of the optimizer, four bytes each
            raise Stop(MEMORY)
    tokens = config.grad_accum * config.batch_size * config.block_size * WORLD
    dtype = mixed_precision(config.dtype, device).fast_dtype
    return dict(params=params, tokens_per_step=tokens, device=str(device), seed=config.seed,
                dtype=str(dtype).removeprefix("torch."))


def load_source(given: dict) -> dict | None:
    """The checkpoint to start from, if any."""
    folder = given.get("run_dir", Config.run_dir)
    if given.get("resume"):
        if given.get("load_url") or given.get("sample_only"):
            raise Stop("--resume continues a run: leave out --load_url and --sample_only")
        return load_checkpoint(f"{folder}/model_last.pt")
    source = given.get("load_url")
    if given.get("sample_only"):
        source = source or given.get("save_path") or f"{folder}/model_best.pt"
    return load_checkpoint(source) if source else None


def run(given: dict) -> dict:
    """Train, then sample; or only sample. Bad input is found before anything is written. Returns the metrics."""
    saved = load_source(given)
    given = inherit(given, saved)  # options from the checkpoint
    device = pick_device(given.get("device", "auto"))
    tokenizer, train_data, val_data, facts = read_data(given, saved)
    tokenizer.encode(given.get("prompt", ""))  # Stop if a character is unknown
    config = make_config(given, device, len(train_data))
    if not config.interactive:
        check_targets(config)  # before anything is written
    if config.sample_only:
        if RANK > 0:
            return best_of(saved["history"])
        model = GPTLanguageModel(config, tokenizer.vocab_size).to(device)
        model.load_state_dict(saved["model"])
        if config.interactive:
            converse(lambda prompt, number: sample_text(
                model, tokenizer, config, saved["context"], number, prompt=prompt))
        else:
            write_samples(model, tokenizer, config, saved["context"])
        return best_of(saved["history"])
    if len(train_data) <= config.block_size or len(val_data) < 2:
        raise Stop(f"{config.input} is too short ({facts['characters']:,} characters) for --block_size "
                   f"{config.block_size}: lower it, or bring more text")
    facts |= make_facts(config, tokenizer, device)
    join_processes(asdict(config) | facts)
    train_data = with_recall(train_data, config, tokenizer)
    val_data = with_recall(val_data, config, tokenizer)
    with run_folder(config, facts) if RANK == 0 else contextlib.nullcontext():
        say("{size}, {recipe}, {params:,} parameters on {device} in {dtype}; {characters:,} characters, "
            "{vocab_size:,} entries in the vocabulary, each seen {tokens_per_vocab_entry:,.1f} times"
            .format(size=config.size, recipe=config.recipe, **facts))
        if RANK == 0:
            save_tokenizer(tokenizer, config)
        return train_and_sample(config, tokenizer, train_data, val_data, facts, saved, device)


def train_and_sample(config: Config, tokenizer, train_data, val_data, facts: dict,
                     saved: dict | None, device) -> dict:
    """The run itself, inside its folder. Returns the metrics."""
    passes = config.max_iters * facts["tokens_per_step"] / len(train_data)
    say(f"{config.max_iters} steps of {facts['tokens_per_step']:,} tokens, {passes:.1f} passes over the text")
    if config.resume and config.max_iters > saved["config"]["max_iters"]:
        say(f"note: the learning rate and the row length are planned anew for {config.max_iters} steps")
    keep_memory()
    torch.manual_seed(config.seed)
    model = GPTLanguageModel(config, tokenizer.vocab_size).to(device)
    if saved:
        model.load_state_dict(saved["model"])
    history = train(config, model, tokenizer, train_data, val_data, facts, saved if config.resume else None)
    if RANK > 0:
        return write_report(config.run_dir, history, facts)
    best = load_checkpoint(f"{config.run_dir}/model_best.pt")
    model.load_state_dict(best["model"])
    write_samples(model, tokenizer, config, best["context"])
    repeats = by_repetition(model, val_data, tokenizer, config, best["context"])
    if repeats["refrain_bpc"] is not None:
        say("validation, bits per character: {refrain_bpc:.3f} in lines that occurred shortly before "
            "({refrain_share:.1%}), {other_bpc:.3f} elsewhere".format(**repeats))
    return write_report(config.run_dir, history, facts | repeats)


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
