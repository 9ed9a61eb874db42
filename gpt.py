"""Stage 1: a GPT built by hand learns to write lyrics, one character at a time.

    python gpt.py                   # laptop or GPU: the size is chosen for you
    python gpt.py --input assets/input/input2.txt --max_iters 5000
    python gpt.py --resume          # go on after Ctrl-C or a crash
    python gpt.py --sample_only --prompt "Noc nad miastem" --num_samples 3
    torchrun --nproc_per_node=2 gpt.py --size base      # several GPUs

In a Colab cell:  import gpt; gpt.main(["--input", "lyrics.txt"])
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------------------ options

STAGE = "char"

# Options that were not given come from the size and the recipe.
SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=192, block_size=128, batch_size=32, max_iters=600, dropout=0.0,
                 eval_interval=100, sample_interval=200),
    "base": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, max_iters=5000, dropout=0.2,
                 eval_interval=100, sample_interval=500),
}
RECIPES = {
    "modern": dict(learning_rate=5e-3, weight_decay=0.1, grad_clip=1.0, warmup_iters=20),
    "classic": dict(learning_rate=3e-4, weight_decay=0.01, grad_clip=0.0, warmup_iters=0),
}


class Stop(Exception):
    """Ends the program with one line: Stop(line) for what the user can put right, Stop(line, 1) for what went wrong."""


NATURAL, FROM_0, ABOVE_0 = ("at least 1", lambda x: x >= 1), ("at least 0", lambda x: x >= 0), ("above 0", lambda x: x > 0)


def option(default, help, must=None, choices=None):
    """A dataclass field that argparse is made from. must: (words, test) that a number has to pass."""
    return field(default=default, metadata=dict(help=help, must=must, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option once: its name, type, default and help. None: decided by --size or --recipe."""

    input: str = option("assets/input/input2.txt", "the text to learn from")
    run_dir: str = option("assets/char_model", "folder for everything that the run writes")
    save_path: str = option("", "best checkpoint (default: RUN_DIR/model_best.pt)")
    output: str = option("", "generated text (default: RUN_DIR/output/sample.txt)")
    resume: bool = option(False, "go on from RUN_DIR/model_last.pt")
    load_url: str = option("", "start from the checkpoint at this http(s) or file address")
    sample_only: bool = option(False, "do not train: load the best checkpoint and write samples")
    size: str = option("auto", "preset for what is not given; auto: base on a GPU, else tiny", choices=("auto", *SIZES))
    recipe: str = option("modern", "modern, or the original project's classic", choices=tuple(RECIPES))
    n_layer: int = option(None, "transformer blocks", NATURAL)
    n_head: int = option(None, "attention heads in a block", NATURAL)
    n_embd: int = option(None, "width: numbers that stand for one position", NATURAL)
    block_size: int = option(None, "context: tokens that the model sees", ("at least 2", lambda x: x >= 2))
    dropout: float = option(None, "share of activations dropped in training", ("in [0, 1)", lambda x: 0 <= x < 1))
    batch_size: int = option(None, "rows in a batch (per process)", NATURAL)
    grad_accum: int = option(1, "batches whose gradients are added up before a step", NATURAL)
    max_iters: int = option(None, "optimizer steps", NATURAL)
    learning_rate: float = option(None, "peak learning rate", ABOVE_0)
    weight_decay: float = option(None, "decoupled weight decay", FROM_0)
    grad_clip: float = option(None, "largest gradient norm (0: no clipping)", FROM_0)
    warmup_iters: int = option(None, "steps of linear warm-up", FROM_0)
    eval_interval: int = option(None, "evaluate and save every so many steps", NATURAL)
    eval_iters: int = option(0, "evaluate on so many batches at most (0: the whole validation split)", FROM_0)
    patience: int = option(10, "stop after so many evaluations without a better loss (0: never)", FROM_0)
    sample_interval: int = option(None, "write a few lines every so many steps (0: never)", FROM_0)
    device: str = option("auto", "auto: the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: what is fast here", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model")
    seed: int = option(2115, "seed of everything random", FROM_0)
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(1, "texts to write", NATURAL)
    max_new_tokens: int = option(500, "length of each text, in tokens", NATURAL)
    temperature: float = option(0.8, "below 1 plays safe, above 1 takes risks, 0 takes the likeliest", FROM_0)
    top_k: int = option(0, "draw from the k likeliest tokens (0: all)", FROM_0)
    top_p: float = option(0.95, "draw from the likeliest that make up this share", ("in (0, 1]", lambda x: 0 < x <= 1))
    stop_at_end: bool = option(False, "end a text where the model ends the song")


SHAPE = {"recipe", "n_layer", "n_head", "n_embd", "block_size"}
# With --resume these may differ from the first run's: they change neither the weights nor what is measured.
FREE_ON_RESUME = set("input run_dir save_path output resume max_iters eval_interval patience sample_interval device dtype "
                     "compile prompt num_samples max_new_tokens temperature top_k top_p stop_at_end".split())


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {parser.prog} --help lists the options")

    parser = argparse.ArgumentParser(Path(__file__).name, description=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        note = " (set by size or recipe)" if f.default is None else f" (default: {f.default})" if f.default else ""
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f"--{f.name}", help=f.metadata["help"] + note, **kind)
    given = vars(parser.parse_args(argv))
    for f in fields(Config):
        words, test = f.metadata["must"] or ("", None)
        if test and f.name in given and not (math.isfinite(given[f.name]) and test(given[f.name])):
            raise Stop(f"--{f.name} {given[f.name]}: must be a finite number, {words}")
    return given


def make_config(given: dict, device: torch.device, checkpoint: dict | None) -> Config:
    """The whole configuration: what was given, else the checkpoint's, else what size and recipe say, else the default."""
    asked = Config(**given)
    size = asked.size if asked.size != "auto" else "base" if device.type == "cuda" else "tiny"
    known = dict(**SIZES[size], **RECIPES[asked.recipe], size=size, save_path=f"{asked.run_dir}/model_best.pt",
                 output=f"{asked.run_dir}/output/sample.txt")
    if checkpoint:
        old = checkpoint["config"]
        for name in old.keys() - FREE_ON_RESUME if asked.resume else SHAPE:
            if given.get(name, old[name]) not in (old[name], "auto"):
                raise Stop(f"--{name} {given[name]} contradicts the checkpoint's {old[name]}: leave it out, or start a new "
                           "run in another --run_dir")
        if asked.resume and given.get("max_iters", math.inf) < old["max_iters"]:
            raise Stop(f"--max_iters {given['max_iters']} is below the checkpoint's {old['max_iters']}: it may only grow")
        known |= {name: old[name] for name in (old.keys() - {"run_dir", "save_path", "output"} if asked.resume else SHAPE)}
    return Config(**{**known, **given, "size": known["size"]})


# ---------------------------------------------------------------------------------------------- tokenizer

SEPARATOR = "\n<|endoftext|>\n"  # between two songs in a file: with its line breaks it is one token
END = "\0"  # how that token is written inside this program; no text file holds this character


class CharTokenizer:
    """Characters to numbers and back. The last number is the end-of-song token.

    Example: CharTokenizer("abc").encode("cab") is tensor([2, 0, 1]).
    """

    def __init__(self, chars: str, start: str = END):
        self.state = dict(chars=chars, start=start)  # what a checkpoint keeps: CharTokenizer(**state) is this one again
        self.chars, self.start = chars, start  # start: what a text without a prompt starts from
        self.end, self.vocab_size = len(chars), len(chars) + 1

    @classmethod
    def from_text(cls, text: str):
        """The tokenizer whose vocabulary is the characters of a text."""
        return cls("".join(sorted(set(text) - {END})), start=END if END in text else "\n" if "\n" in text else text[0])

    def encode(self, text: str) -> torch.Tensor:
        """Token numbers, shape (len(text),), in a small integer type. Stop names a character that is not known."""
        unknown = set(text) - set(self.chars + END)
        if unknown:
            raise Stop(f"the text that the model learned from has no {min(unknown)!r}: leave that character out")
        numbers = text.translate({ord(c): i for i, c in enumerate(self.chars + END)})  # as characters 0, 1, 2...
        encoding, dtype = ("latin-1", torch.uint8) if self.vocab_size <= 256 else ("utf-32-le", torch.int32)
        return torch.frombuffer(bytearray(numbers, encoding), dtype=dtype) if text else torch.empty(0, dtype=dtype)

    def decode(self, ids) -> str:
        """The text of token numbers."""
        return "".join((self.chars + END)[i] for i in ids)

    def stream(self, ids):
        """Yield the text of each token as it comes."""
        return (self.decode([i]) for i in ids)

    def count_chars(self, ids: torch.Tensor) -> int:
        """How many characters the tokens stand for."""
        return ids.numel()

# --------------------------------------------------------------------------------------------------- data


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


def draw_batch(ids, config: Config, step: int, rank: int, world: int) -> torch.Tensor:
    """Rows r::N of the batch that all processes draw together, shape (grad_accum, batch_size, block_size + 1).

    The draw depends on the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
    """
    generator = torch.Generator().manual_seed(hash((config.seed, step)))
    count = config.grad_accum * config.batch_size * world
    starts = torch.randint(len(ids) - config.block_size, (count,), generator=generator)[rank::world]
    rows = ids[starts[:, None] + torch.arange(config.block_size + 1)].long()
    return rows.view(config.grad_accum, config.batch_size, config.block_size + 1)


# -------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model: all that is needed to build it."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    modern: bool


def make_norm(config: GPTConfig, width: int) -> nn.Module:
    """LayerNorm, or the modern RMSNorm that only scales (Zhang and Sennrich, arXiv:1910.07467)."""
    return nn.RMSNorm(width, eps=1e-6) if config.modern else nn.LayerNorm(width)


def rotate(x, rope):
    """Rotary positions (Su et al., arXiv:2104.09864): turn pairs of numbers by angles that grow with the position.

    The product of a query and a key then depends on how far apart they stand. Shape in and out: (B, nh, T, hs).
    """
    cos, sin = rope  # (T, hs / 2) each
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MultiHeadAttention(nn.Module):
    """Self-attention by hand, all heads in one batched product (Vaswani et al., arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, head_size = config.n_head, config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query, key and value in one product
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=not config.modern)
        self.dropout = nn.Dropout(config.dropout)
        if config.modern:  # QK-norm (Henry et al., arXiv:2010.04245) keeps the scores from growing without bound
            self.q_norm, self.k_norm = make_norm(config, head_size), make_norm(config, head_size)

    def forward(self, x, mask, rope=None, cache=None):
        """Mix into each position what came before it. x: (B, T, C); mask: (T, S), 0 or -inf; cache: see generate."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if rope is not None:
            q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))  # (B, nh, S, hs)
            cache[self] = k, v
        scores = (q * k.size(-1) ** -0.5) @ k.transpose(-2, -1) + mask  # (B, nh, T, S); -inf hides the future
        weights = self.dropout(scores.softmax(dim=-1))  # (B, nh, T, S), each row sums to 1
        out = (weights @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """What each position does on its own: ReLU, or the modern SwiGLU (Shazeer, arXiv:2002.05202) with a gate."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.modern = config.modern
        # Three matrices instead of two: at two thirds of the width they have as many parameters.
        hidden = 32 * round(config.n_embd * 8 / 3 / 32) if config.modern else 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, 2 * hidden if config.modern else hidden, bias=not config.modern)
        self.down = nn.Linear(hidden, config.n_embd, bias=not config.modern)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        """Shape in and out: (B, T, C)."""
        x = self.up(x)  # modern: (B, T, 2H), classic: (B, T, 4C)
        if self.modern:
            gate, x = x.chunk(2, dim=-1)  # (B, T, H) each
        return self.dropout(self.down(F.silu(gate) * x if self.modern else F.relu(x)))


class Block(nn.Module):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config, config.n_embd), make_norm(config, config.n_embd)
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, mask, rope=None, cache=None):
        """Shape in and out: (B, T, C)."""
        x = x + self.attention(self.norm1(x), mask, rope, cache)
        return x + self.feed_forward(self.norm2(x))


class GPTLanguageModel(nn.Module):
    """Tokens in; out, for each position, the scores of the token that comes next."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=not config.modern)
        mask = torch.full((config.block_size, config.block_size), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        if config.modern:
            head_size = config.n_embd // config.n_head
            speed = 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)  # (hs / 2,), radians per position
            angles = torch.outer(torch.arange(config.block_size), speed)  # (block_size, hs / 2)
            self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())), persistent=False)
        else:
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.apply(self.init_weights)

    def init_weights(self, module):
        """Small random numbers. In the modern recipe a block adds nothing at first: it starts as the identity."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if self.config.modern and isinstance(module, Block):
            nn.init.zeros_(module.attention.proj.weight)
            nn.init.zeros_(module.feed_forward.down.weight)

    def forward(self, idx, targets=None, cache=None):
        """Logits (B, T, vocab_size), or with targets (B, T) the mean loss in nats per token. idx: (B, T)."""
        T, past = idx.size(1), next(iter(cache.values()))[0].size(2) if cache else 0
        x = self.token_embedding(idx)  # (B, T, C)
        rope = self.rope[:, past:past + T] if self.config.modern else None
        if not self.config.modern:
            x = x + self.position_embedding(torch.arange(past, past + T, device=idx.device))
        mask = self.mask[past:past + T, :past + T]  # (T, S)
        for block in self.blocks:
            x = block(x, mask, rope, cache)
        logits = self.lm_head(self.norm(x))  # (B, T, vocab_size)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# ---------------------------------------------------------------------------------- optimizer and schedule


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix (n, rows, cols) towards 1, without an SVD.

    A quintic Newton-Schulz iteration; coefficients of Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.mT if matrices.size(1) > matrices.size(2) else matrices  # the smaller of the two Gram matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.size(1) > matrices.size(2) else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum: every direction of a weight matrix learns at the same pace (Jordan et al., 2024).

    The step of torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al., arXiv:2502.16982: Muon and AdamW then
    share one learning rate), but all matrices of one shape in one batched product. Each parameter group names that
    "shape"; a weight that holds several matrices side by side, such as query, key and value, is taken apart.
    """

    def __init__(self, groups, lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """One step for all parameters."""
        for group in self.param_groups:
            params, shape, lr = group["params"], group["shape"], group["lr"]
            grad = torch.cat([p.grad.view(-1, *shape) for p in params])  # (n, rows, cols)
            state = self.state[params[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(grad)).lerp_(grad, 1 - group["momentum"])
            update = orthogonalize(grad.lerp_(momentum, group["momentum"]))  # Nesterov: look one step ahead
            for p, u in zip(params, update.split([p.numel() // math.prod(shape) for p in params])):
                p.mul_(1 - lr * group["weight_decay"]).add_(u.reshape(p.shape), alpha=-lr * 0.2 * math.sqrt(max(shape)))


def make_optimizers(model: GPTLanguageModel, config: Config) -> list[torch.optim.Optimizer]:
    """classic: AdamW for everything. modern: Muon for the matrices inside the blocks, AdamW without decay for the rest."""
    settings = dict(lr=config.learning_rate, fused=next(model.parameters()).device.type in ("cuda", "cpu"))
    if config.recipe == "classic":
        return [torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, **settings)]
    shapes, rest = {}, []
    for name, p in model.named_parameters():
        if "blocks" in name and p.ndim == 2:
            parts = 3 if "qkv" in name else 2 if "up" in name else 1  # matrices side by side
            shapes.setdefault((p.size(0) // parts, p.size(1)), []).append(p)
        else:
            rest.append(p)
    groups = [dict(params=params, shape=shape) for shape, params in shapes.items()]
    return [Muon(groups, lr=config.learning_rate, weight_decay=config.weight_decay),
            torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0, **settings)]


def learning_rate(config: Config, step: int) -> float:
    """classic: constant. modern: linear warm-up, then linear decay, to zero at max_iters."""
    if config.recipe == "classic":
        return config.learning_rate
    rise = (step + 1) / (config.warmup_iters + 1)
    return config.learning_rate * min(rise, (config.max_iters - step) / max(1, config.max_iters - config.warmup_iters))


# ---------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, ids, tokenizer, config: Config, amp, rank=0, world=1) -> tuple[float, float]:
    """(nats per token, bits per character) over all tokens but the first, each predicted exactly once.

    Consecutive windows that overlap by one token, no random draw: the same model always gets the same figure.
    Bits per character = sum of nats / (ln 2 * characters) can be compared between tokenizers; loss per token cannot.
    """
    model.eval()
    device, size, whole = next(model.parameters()).device, config.block_size, (len(ids) - 1) // config.block_size
    batches = list(ids[:whole * size + 1].unfold(0, size + 1, size).split(config.batch_size)) if whole else []
    if (len(ids) - 1) % size:
        batches.append(ids[None, whole * size:])  # what is left is shorter than the context
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, characters
    for batch in batches[:config.eval_iters or None][rank::world]:
        x, y = batch[:, :-1].long().to(device), batch[:, 1:].long().to(device)
        with amp:
            nats = model(x, y).item() * y.numel()
        sums += torch.tensor([nats, y.numel(), tokenizer.count_chars(y)], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    nats, tokens, chars = sums.tolist()
    return nats / tokens, nats / (math.log(2) * chars)


# ---------------------------------------------------------------------------------------------- checkpoint

FORMAT_VERSION = 1
RUN_FILES = ("config.json", "metrics.jsonl", "metrics.json", "loss.png", "model_best.pt", "model_last.pt", "output",
             "tokenizer.json")


def save_checkpoint(path: str, checkpoint: dict):
    """Write a temporary file, flush it to the disk, rename it: at any moment a kill leaves a whole file at the path."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        Path(temporary).unlink(missing_ok=True)
        reason = getattr(e, "strerror", None) or "is the disk full?"
        raise Stop(f"cannot write {path} ({reason}): the last good checkpoint is kept; make room, then --resume", 1) from None


def load_checkpoint(path: str) -> dict:
    """A checkpoint of this stage, on the CPU. weights_only: a malicious file cannot run code. Stop if it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # a foreign file gets one line, below
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["stage"] == STAGE and checkpoint["format_version"] == FORMAT_VERSION:
            return checkpoint
    except FileNotFoundError:
        raise Stop(f"no checkpoint at {path}: train first, or name the folder with --run_dir") from None
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError):
        pass
    raise Stop(f"{path} is no checkpoint of {Path(__file__).name}, or it is damaged: take another, or train again")


def download_checkpoint(url: str) -> dict:
    """Fetch a checkpoint to a temporary file and load it from there."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.hub.download_url_to_file(url, f"{folder}/download.pt", progress=sys.stderr.isatty())
        except (OSError, ValueError) as e:
            raise Stop(f"cannot download --load_url {url} ({e}): check the address") from None
        return load_checkpoint(f"{folder}/download.pt")


def set_aside(path: Path, folder: Path | None = None):
    """Move what stands at the path out of the way, next to it or into a folder: nothing is ever overwritten."""
    if path.exists():
        new = folder / path.name if folder else path.with_name(f"{path.name}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
        while new.exists():
            new = new.with_name(new.name + "+")
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


# ---------------------------------------------------------------------------------------------- generate


def draw_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token a row from the scores: logits (B, vocab_size), result (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(dim=-1)
    if top_p < 1:  # nucleus sampling (Holtzman et al., arXiv:1904.09751)
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0  # those before it already make up top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yield max_new_tokens times the next token of each row, shape (B,). idx: (B, T), the prompt.

    The cache keeps each block's keys and values, so a new token costs one position. While the text fits the context the
    result is, token for token, that of reading it all anew; then the last half is kept, and read again.
    """
    model.eval()
    size = model.config.block_size
    context = new = idx[:, -size:]
    cache, length = {}, 0
    for _ in range(max_new_tokens):
        if length + new.size(1) > size:
            new, cache, length = context[:, -(size // 2):], {}, 0
        logits = model(new, cache=cache)[:, -1]  # (B, vocab_size)
        length += new.size(1)
        token = draw_token(logits, temperature, top_k, top_p, generator)
        new = token[:, None]
        context = torch.cat((context, new), dim=1)[:, -size:]
        yield token


def sample_text(model, tokenizer, config: Config, amp, number=0, length=None):
    """Yield one text piece by piece, the prompt first. The same seed and number give the same text."""
    device = next(model.parameters()).device
    idx = tokenizer.encode(config.prompt or tokenizer.start).long().to(device)[None]
    generator = torch.Generator(device).manual_seed(hash((config.seed, -1, number)))

    def numbers():
        with amp:
            for token in generate(model, idx, length or config.max_new_tokens, config.temperature,
                                  config.top_k, config.top_p, generator):
                if config.stop_at_end and token.item() == tokenizer.end:
                    return
                yield token.item()

    yield config.prompt
    for piece in tokenizer.stream(numbers()):
        yield piece.replace(END, SEPARATOR)


def write_samples(model, tokenizer, config: Config, amp):
    """Write the texts to --output and to the screen at the same time: what is shown is what is saved."""
    set_aside(Path(config.output))
    with open(config.output, "w", encoding="utf-8", newline="\n") as file:
        for number in range(config.num_samples):
            end = SEPARATOR if number + 1 < config.num_samples else "\n"
            for piece in itertools.chain(sample_text(model, tokenizer, config, amp, number), [end]):
                file.write(piece)
                print(piece, end="", flush=True)
    print(f"-> {config.output}", flush=True)


# ------------------------------------------------------------------------------------------------- train


def pick_device(name: str) -> torch.device:
    """The device to use; auto: the first of cuda, mps, cpu that is there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(device for device in there if there[device]) if name == "auto" else name
    if not there[name]:
        raise Stop(f"--device {name}: there is none here; use --device auto")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in; auto: bfloat16 where the hardware has it, float16 on an older CUDA card, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # is_bf16_supported() would count a slow emulation
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = [getattr(torch.cpu, f"_is_{feature}_supported", bool)() for feature in ("avx512_bf16", "amx_tile")]
    return torch.bfloat16 if device.type == "cpu" and any(has) else torch.float32


@contextlib.contextmanager
def catch_signals():
    """Collect Ctrl-C and SIGTERM in a list, so that training can stop between two steps."""
    caught, old = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def compile_or_not(network, device):
    """The network compiled, or, where there is no compiler, as it is."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return torch.compile(network)
    except (RuntimeError, OSError, ImportError) as e:
        print(f"warning: going on without --compile ({type(e).__name__}: no working compiler)", file=sys.stderr)
        return network


class Trainer:
    """A run: a model, its optimizers, how far it has come, and the files it writes. Rank 0 alone writes and prints."""

    def __init__(self, config: Config, model, tokenizer, train_ids, val_ids, corpus_sha256, dtype, resumed=None):
        self.config, self.model, self.tokenizer, self.corpus_sha256 = config, model, tokenizer, corpus_sha256
        self.train_ids, self.val_ids = train_ids, torch.cat((train_ids[-1:], val_ids))
        self.device, self.dtype = next(model.parameters()).device, dtype
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.amp = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.optimizers = make_optimizers(model, config)
        self.network = nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        if config.compile:
            self.network = compile_or_not(self.network, self.device)
        self.last_path = os.path.join(config.run_dir, "model_last.pt")
        self.tokens_per_step = config.grad_accum * config.batch_size * config.block_size * self.world
        # How far the run has come, as its checkpoints hold it. losses: those since the last evaluation.
        self.now = dict(iter=0, best_iter=0, best_val_loss=math.inf, evals_since_best=0, seconds=0.0, losses=[], history=[])
        if resumed:
            self.now = {name: resumed[name] for name in self.now}
            self.scaler.load_state_dict(resumed["scaler"])
            for optimizer, state in zip(self.optimizers, resumed["optimizer"]):
                optimizer.load_state_dict(state)

    def say(self, text: str):
        """Print a line without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def save(self, path: str):
        """Write a checkpoint that is enough to go on from, and to sample from; never one whose numbers are not finite."""
        finite = all(p.isfinite().all() for p in self.model.parameters())
        if not finite or not math.isfinite(self.now["history"][-1]["val_loss"]):
            raise Stop(f"the loss turned NaN by step {self.now['iter']}; the last good checkpoint is kept: start again with "
                       "a lower --learning_rate", 1)
        if self.rank == 0:
            save_checkpoint(path, dict(
                self.now, format_version=FORMAT_VERSION, stage=STAGE, model=self.model.state_dict(),
                optimizer=[optimizer.state_dict() for optimizer in self.optimizers], scaler=self.scaler.state_dict(),
                model_config=asdict(self.model.config), tokenizer=self.tokenizer.state, config=asdict(self.config),
                corpus_sha256=self.corpus_sha256))

    def step(self):
        """One optimizer step. What is random depends on seed, step and rank alone: no generator state needs saving."""
        config, step = self.config, self.now["iter"]
        torch.manual_seed(hash((config.seed, step, self.rank)))  # for dropout
        batch = draw_batch(self.train_ids, config, step, self.rank, self.world).to(self.device, non_blocking=True)
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
        total = 0
        for rows in batch:  # (B, T + 1)
            with self.amp:
                loss = self.network(rows[:, :-1], rows[:, 1:]) / config.grad_accum
            self.scaler.scale(loss).backward()
            total += loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.now["losses"].append(total)
        self.now["iter"] += 1

    def check_up(self):
        """Evaluate, log, keep the best model and the state to go on from."""
        now, config = self.now, self.config
        val_loss, val_bpc = evaluate(self.model, self.val_ids, self.tokenizer, config, self.amp, self.rank, self.world)
        train_loss = torch.stack(now["losses"]).mean().item() if now["losses"] else val_loss
        better = val_loss < now["best_val_loss"]
        now["evals_since_best"] += 1
        if better:
            now.update(best_iter=now["iter"], best_val_loss=val_loss, evals_since_best=0)
        now["history"].append(dict(iter=now["iter"], train_loss=train_loss, val_loss=val_loss, val_bpc=val_bpc,
                                   learning_rate=learning_rate(config, now["iter"]), seconds=now["seconds"]))
        now["losses"] = []
        for path in [config.save_path] * better + [self.last_path]:
            self.save(path)
        if self.rank == 0:
            lines = "".join(json.dumps(record) + "\n" for record in now["history"])
            Path(config.run_dir, "metrics.jsonl").write_text(lines, encoding="utf-8")
        self.say(f"step {now['iter']:>5}  train {train_loss:.3f}  val {val_loss:.3f} nats/token = {val_bpc:.3f} "
                 f"bits/char  {self.summary()['tokens_per_second']:,.0f} tokens/s{'  best' if better else ''}")

    def fit(self) -> int:
        """Train to max_iters, or until `patience` evaluations brought nothing (0), or a signal (its number)."""
        config, now, start, clock = self.config, self.now, self.now["iter"], time.perf_counter()
        hidden = self.rank > 0 or not (sys.stderr.isatty() or in_notebook())  # a file gets lines, not a bar
        with catch_signals() as caught, tqdm(total=config.max_iters, initial=start, unit="step", leave=False,
                                             dynamic_ncols=True, disable=hidden) as bar:
            while True:
                now["seconds"] += time.perf_counter() - clock
                if now["iter"] > start or not start:  # a resumed run has done this before
                    if now["iter"] % config.eval_interval == 0 or now["iter"] == config.max_iters:
                        self.check_up()
                    if config.sample_interval and now["iter"] and now["iter"] % config.sample_interval == 0:
                        self.say("".join(sample_text(self.model, self.tokenizer, config, self.amp, length=120)) + "\n")
                if now["iter"] == config.max_iters or 0 < config.patience <= now["evals_since_best"]:
                    return 0
                stop = torch.tensor(caught[0] if caught else 0)
                if self.world > 1:  # what one process caught stops all, after the same step
                    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
                if stop:
                    self.save(self.last_path)
                    return int(stop)
                clock = time.perf_counter()
                self.step()
                bar.update()
                if now["iter"] % 10 == 0:
                    rate = self.summary()["tokens_per_second"]
                    bar.set_postfix_str(f"loss {now['losses'][-1]:.3f}, {rate:,.0f} tokens/s")
                    if now["iter"] == start + 10:
                        minutes = (config.max_iters - now["iter"]) * self.tokens_per_step / rate / 60
                        self.say(f"about {minutes:.1f} minutes of training to go")

    def summary(self) -> dict:
        """What metrics.json holds."""
        now, ids = self.now, self.train_ids
        best = min(now["history"], key=lambda record: record["val_loss"], default={})
        return dict(
            stage=STAGE, params=sum(p.numel() for p in self.model.parameters()), vocab_size=self.tokenizer.vocab_size,
            chars_per_token=self.tokenizer.count_chars(ids) / len(ids),
            tokens_per_vocab_entry=len(ids) / self.tokenizer.vocab_size, val_loss=best.get("val_loss"),
            val_bpc=best.get("val_bpc"), best_iter=best.get("iter"), iters=now["iter"], seconds=now["seconds"],
            tokens_per_second=now["iter"] * self.tokens_per_step / max(now["seconds"], 1e-9), device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."), seed=self.config.seed)

    def finish(self) -> dict:
        """Write metrics.json and loss.png; the metrics."""
        Path(self.config.run_dir, "metrics.json").write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")
        plot_losses(self.now["history"], Path(self.config.run_dir, "loss.png"))
        return self.summary()


def plot_losses(history: list, path: Path):
    """Draw both losses, the best point marked: where the curves part, the model begins to learn by heart."""
    from matplotlib.figure import Figure  # here, as it takes a second to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
    for name, color, label in (("train_loss", "#0072B2", "training"), ("val_loss", "#D55E00", "validation")):
        axes.plot([r["iter"] for r in history], [r[name] for r in history], color=color, marker=".", label=label)
    best = min(history, key=lambda record: record["val_loss"])
    axes.plot(best["iter"], best["val_loss"], "o", color="#D55E00", fillstyle="none", markersize=12,
              label=f"best: {best['val_loss']:.3f} = {best['val_bpc']:.3f} bits per character")
    axes.legend()
    figure.savefig(path, dpi=120)


# -------------------------------------------------------------------------------------------------- main


def in_notebook() -> bool:
    """Whether a notebook kernel runs this: then sys.argv is the kernel's, not ours."""
    return "kernel" in os.path.basename(sys.argv[0])


def open_run(given: dict, device: torch.device):
    """(config, model, tokenizer, text, checkpoint): all that can be wrong is found here, before anything is written."""
    asked, checkpoint, text = Config(**given), None, ""
    if asked.resume and (asked.sample_only or asked.load_url):
        raise Stop("--resume goes with neither --sample_only nor --load_url: choose one")
    if asked.load_url:
        checkpoint = download_checkpoint(asked.load_url)
    elif asked.resume or asked.sample_only:
        best = asked.save_path or f"{asked.run_dir}/model_best.pt"
        checkpoint = load_checkpoint(f"{asked.run_dir}/model_last.pt" if asked.resume else best)
    config = make_config(given, device, checkpoint)
    if not config.sample_only:
        text = read_corpus(config.input)
    if config.resume and hashlib.sha256(text.encode()).hexdigest() != checkpoint["corpus_sha256"]:
        raise Stop(f"--input {config.input} is not the text that this run began with (its SHA-256 differs): give that one, "
                   "or start a new run in another --run_dir")
    tokenizer = CharTokenizer(**checkpoint["tokenizer"]) if checkpoint else CharTokenizer.from_text(text)
    tokenizer.encode(config.prompt)  # does it know all of it?
    if config.n_embd % config.n_head or config.recipe == "modern" and config.n_embd // config.n_head % 2:
        raise Stop(f"--n_embd {config.n_embd} must be divisible by --n_head {config.n_head}, for the modern recipe into an "
                   "even number")
    model = GPTLanguageModel(GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd,
                                       config.dropout, config.recipe == "modern"))
    if checkpoint:
        try:
            model.load_state_dict(checkpoint["model"])
        except RuntimeError:
            raise Stop("the checkpoint's weights do not fit its options: it is damaged; take another") from None
    for path in (config.save_path, config.output):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Stop(f"cannot write {path} ({e.strerror}): choose another --run_dir") from None
    return config, model.to(device), tokenizer, text, checkpoint


def run(given: dict) -> dict:
    """Train, then sample; or only sample. The metrics."""
    device = pick_device(given.get("device", "auto"))
    torch.manual_seed(given.get("seed", Config.seed))
    config, model, tokenizer, text, checkpoint = open_run(given, device)
    dtype = pick_dtype(config.dtype, device)
    if config.sample_only:
        write_samples(model, tokenizer, config, torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        return {name: checkpoint[name] for name in ("stage", "best_iter", "best_val_loss", "iter")}
    train_text, val_text = split_corpus(text)
    train_ids, val_ids = tokenizer.encode(train_text), tokenizer.encode(val_text)
    if len(train_ids) <= config.block_size or not len(val_ids):
        raise Stop(f"{config.input} is too short ({len(text):,} characters): with --block_size {config.block_size} it takes "
                   f"at least {math.ceil(config.block_size / 0.84) + 2:,}")
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    trainer = Trainer(config, model, tokenizer, train_ids, val_ids, sha256, dtype, checkpoint if config.resume else None)
    if rank == 0:
        if not config.resume:
            start_folder(config)
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        Path(config.run_dir, "config.json").write_text(json.dumps(dict(
            options=asdict(config), versions=versions, device=str(device), dtype=str(dtype), corpus_sha256=sha256), indent=1))
    trainer.say(f"{config.size}, {config.recipe}, {trainer.summary()['params']:,} parameters on {device} in {dtype}: "
                f"{len(text):,} characters, {config.max_iters} steps of {trainer.tokens_per_step:,} tokens")
    stopped = trainer.fit()
    metrics = trainer.finish() if rank == 0 else trainer.summary()
    if stopped:
        trainer.say(f"stopped and saved; go on with: python {Path(__file__).name} --resume --run_dir {config.run_dir}")
        return {**metrics, "signal": stopped}
    if rank == 0:
        if os.path.exists(config.save_path):
            model.load_state_dict(load_checkpoint(config.save_path)["model"])
        write_samples(model, tokenizer, config, trainer.amp)
    return metrics


def start_folder(config: Config):
    """A new run in an old folder: what the earlier run wrote moves to previous-<time>."""
    previous = Path(config.run_dir, f"previous-{time.strftime('%Y%m%d-%H%M%S')}")
    for name in RUN_FILES:
        set_aside(Path(config.run_dir, name), previous)
    set_aside(Path(config.save_path))
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)


def main(argv=None) -> dict:
    """Run with these arguments, by default the command line's. Returns what metrics.json holds."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8
    try:
        return run(parse_args(([] if in_notebook() else sys.argv[1:]) if argv is None else argv))
    except Stop as e:
        message, status = (*e.args, 2)[:2]
    except torch.OutOfMemoryError:
        message, status = "out of memory: lower --batch_size, and raise --grad_accum instead", 1
    except OSError as e:
        message, status = f"{e.filename or 'writing'}: {e.strerror}; the last good checkpoint is kept", 1
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
    if "signal" in metrics:
        sys.exit(128 + metrics["signal"])
