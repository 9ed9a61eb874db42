"""Stage 2: the same GPT on sub-words: what they buy, and what they cost.

    python gpt_tiktoken.py    # OpenAI's gpt2 vocabulary; two cores: 2 minutes
    python gpt_tiktoken.py --input assets/input/input2.txt --max_iters 5000
    python gpt_tiktoken.py --tokenizer custom --vocab_size 2000   # of your text
    python gpt_tiktoken.py --tokenizer polish           # that of a Polish GPT-2
    python gpt_tiktoken.py --resume         # go on after Ctrl-C or a crash
    python gpt_tiktoken.py --sample_only --prompt "Noc nad miastem"
    torchrun --nproc_per_node=2 gpt_tiktoken.py --size base      # several GPUs

In a Colab cell:  import gpt_tiktoken; gpt_tiktoken.main(["--input", "a.txt"])
The model and its training are those of gpt.py; new are the tokenizer, the loss
in slices and the export to Hugging Face.
"""

import argparse
import codecs
import contextlib
import ctypes
import functools
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Before torch is loaded: its threads would spin while they wait for each other, and starve beside a second busy program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------------------ options
STAGE = "bpe"
POLISH = "flax-community/papuGaPT2"

# Options that were not given come from the size and the recipe.
SIZES = {
    "tiny": dict(n_layer=4, n_head=2, n_embd=128, block_size=256, batch_size=4, max_iters=300, dropout=0.2,
                 grow=2, eval_interval=50, sample_interval=100),
    "base": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, max_iters=5000, dropout=0.2,
                 grow=0, eval_interval=100, sample_interval=500),
}
RECIPES = {
    "modern": dict(learning_rate=5e-3, weight_decay=0.1, grad_clip=1.0, warmup_iters=20,
                   max_iters=None, eval_interval=None, sample_interval=None),  # as long as the text: see planned
    "classic": dict(learning_rate=3e-4, weight_decay=0.1, grad_clip=0.0, warmup_iters=0, grow=0),
}
EPOCHS = 12  # passes over the text that modern makes by default: in more, it begins to learn it by heart
SHAPE = ("recipe", "n_layer", "n_head", "n_embd", "block_size",  # what a checkpoint's weights depend on
         "tokenizer", "encoding", "vocab_size", "prune_vocab")


class Stop(Exception):
    """Ends the program with one line: Stop(line) for what the user can put right, Stop(line, 1) for what went wrong."""


def option(default, help, low=None, high=1e18, choices=None):
    """A dataclass field that argparse is made from. A number has to lie from low to high."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every option once: its name, type, default and help. None: decided by --size or --recipe."""
    input: str = option("assets/input/input2.txt", "the text to learn from")
    run_dir: str = option("assets/tiktoken_model", "folder for everything that the run writes")
    save_path: str = option("", "best checkpoint (default: RUN_DIR/model_best.pt)")
    output: str = option("", "generated text (default: RUN_DIR/output/sample.txt)")
    resume: bool = option(False, "go on from RUN_DIR/model_last.pt")
    load_url: str = option("", "start from the checkpoint at this http(s) or file address")
    sample_only: bool = option(False, "do not train: load the best checkpoint and write samples")
    tokenizer: str = option("auto", "auto: the file at --tokenizer_path, else tiktoken's, else a custom one",
                            choices=("auto", "tiktoken", "custom", "polish"))
    tokenizer_path: str = option("", "a tokenizer.json, or a folder with vocab.json and merges.txt; custom: made if missing")
    encoding: str = option("gpt2", "tiktoken's encoding", choices=("gpt2", "cl100k_base", "o200k_base"))
    vocab_size: int = option(2000, "entries of a custom tokenizer", 257)
    prune_vocab: bool = option(False, "keep the entries that the training text uses; spell all others with bytes")
    export_hf: str = option("", "folder to write the best model to as a Hugging Face model")
    size: str = option("auto", "preset for what is not given; auto: base on a GPU, else tiny", choices=("auto", *SIZES))
    recipe: str = option("modern", "modern, or the original project's classic", choices=tuple(RECIPES))
    n_layer: int = option(None, "transformer blocks", 1)
    n_head: int = option(None, "attention heads in a block", 1)
    n_embd: int = option(None, "width: numbers that stand for one position", 1)
    block_size: int = option(None, "context: tokens that the model sees", 2)
    dropout: float = option(None, "share of activations dropped in training", 0, 0.99)
    rdrop: float = option(0.0, "weight of R-Drop: two dropouts of the same rows shall agree (0: off)", 0)
    grow: int = option(None, "begin with short rows that double in length so many times, their number halving", 0, 10)
    batch_size: int = option(None, "rows in a batch (per process)", 1)
    grad_accum: int = option(1, "batches whose gradients are added up before a step", 1)
    max_iters: int = option(None, f"optimizer steps; modern: by default at most {EPOCHS} passes over the text", 1)
    learning_rate: float = option(None, "peak learning rate", 1e-9)
    weight_decay: float = option(None, "decoupled weight decay", 0)
    grad_clip: float = option(None, "largest gradient norm (0: no clipping)", 0)
    warmup_iters: int = option(None, "steps of linear warm-up", 0)
    eval_interval: int = option(None, "evaluate and save every so many steps", 1)
    eval_iters: int = option(0, "evaluate on so many batches at most (0: the whole validation split)", 0)
    patience: int = option(10, "stop after so many evaluations without a better loss (0: never)", 0)
    sample_interval: int = option(None, "write a few lines every so many steps (0: never)", 0)
    device: str = option("auto", "auto: the first of cuda, mps, cpu", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = option("auto", "auto: what is fast here", choices=("auto", "float32", "bfloat16", "float16"))
    compile: bool = option(False, "torch.compile the model")
    seed: int = option(2115, "seed of everything random", 0, 2**62)
    prompt: str = option("", "text to continue (default: start a new song)")
    num_samples: int = option(1, "texts to write", 1)
    max_new_tokens: int = option(500, "length of each text, in tokens", 1)
    temperature: float = option(0.8, "below 1 plays safe, above 1 takes risks, 0 takes the likeliest", 0)
    top_k: int = option(0, "draw from the k likeliest tokens (0: all)", 0)
    top_p: float = option(0.95, "draw from the likeliest that make up this share", 1e-9, 1)
    stop_at_end: bool = option(False, "end a text where the model ends the song")


def parse_args(argv) -> dict:
    """The options that were given, by name. Stop names the first bad one."""
    def usage_error(message):
        raise Stop(f"{message}; {parser.prog} --help lists the options")

    parser = argparse.ArgumentParser(Path(__file__).name, description=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = usage_error
    for f in fields(Config):
        note = "" if f.type is bool or f.default == "" else f" (default: {f.default})"
        note = " (set by size or recipe)" if f.default is None else note
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


def make_config(given: dict, device: torch.device, checkpoint: dict | None) -> Config:
    """What was given, else the resumed checkpoint's (else its shape alone), else what size and recipe say, else the default."""
    asked = Config(**given)
    old = {"grow": 0, **checkpoint["config"]} if checkpoint else {}  # runs from before rows grew do not say so
    size = asked.size if asked.size != "auto" else "base" if device.type == "cuda" else "tiny"
    known = SIZES[size] | RECIPES[old.get("recipe", asked.recipe)]
    for name in SHAPE if checkpoint else ():
        if given.get(name, old[name]) != old[name]:
            raise Stop(f"--{name} {given[name]} contradicts the checkpoint's {old[name]}: leave it out, or train anew")
    if asked.resume and given.get("max_iters", math.inf) < old["max_iters"]:
        raise Stop(f"--max_iters {given['max_iters']} is below the checkpoint's {old['max_iters']}: it may only grow")
    known |= old if asked.resume else {name: old[name] for name in SHAPE if checkpoint}
    for name, default in (("save_path", "model_best.pt"), ("output", "output/sample.txt")):
        if not asked.resume or old[name] == f"{old['run_dir']}/{default}":  # a resumed run may have moved
            known[name] = f"{asked.run_dir}/{default}"
    config = Config(**{**known, "size": old["size"] if asked.resume else size, **given, "run_dir": asked.run_dir})
    if config.size == "auto":
        config = replace(config, size=size)
    if config.rdrop and not config.dropout:
        raise Stop(f"--rdrop {config.rdrop} compares what two dropouts say: give --dropout, too")
    if config.n_embd % config.n_head or config.recipe == "modern" and config.n_embd // config.n_head % 2:
        raise Stop(f"--n_embd {config.n_embd} must be divisible by --n_head {config.n_head} (modern: into an even number)")
    return config


# ---------------------------------------------------------------------------------------------- tokenizer
END_TEXT = "<|endoftext|>"
SEPARATOR = f"\n{END_TEXT}\n"  # between two songs in a file: with its line breaks it is one token
END = "\0"  # how that token is written inside this program; no text file holds this character


def byte_symbols() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al., 2019, GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class BPETokenizer:
    """Text to numbers and back with a byte-level BPE (Sennrich et al., arXiv:1508.07909; over bytes: GPT-2).

    A token stands for a few bytes, often a word or a part of one. There is a token for each single byte, so any text can
    be written, and comes back character for character. source: a tokenizer.json. keep: with --prune_vocab, the entries
    that stay; all others are spelt with their bytes. Example: tokenizer.encode("sto lat") may be tensor([812, 466]).
    """

    def __init__(self, source: str, keep: list[int] | None = None, start: str = END):
        self.state = dict(source=source, keep=keep, start=start)  # what a checkpoint keeps: BPETokenizer(**state) is this one
        self.core, self.start = Tokenizer.from_str(source), start  # start: what a text without a prompt starts from
        self.core.encode_special_tokens = True  # the words <|endoftext|> inside a line mean nothing special
        self.core.model.dropout = None  # some files ask for random cuts,
        self.core.no_truncation()  # or for short texts
        if self.core.token_to_id(END_TEXT) is None:
            self.core.add_special_tokens([END_TEXT])
        byte_of, vocab = byte_symbols(), self.core.get_vocab()
        pieces = [b""] * (max(vocab.values()) + 1)  # the bytes of each entry
        for token, i in vocab.items():
            pieces[i] = bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        self.end = self.core.token_to_id(END_TEXT)
        pieces[self.end] = END.encode()
        if any(symbol not in vocab for symbol in byte_of) or self.core.decoder is None:
            raise Stop("that tokenizer is not a byte-level one with its decoder: it would lose characters; take another")
        self.spell = None  # old number -> new numbers
        if keep is not None:
            new = {old: i for i, old in enumerate(keep)}
            byte = {value: new[vocab[symbol]] for symbol, value in byte_of.items()}
            self.spell = [[new[i]] if i in new else [byte[b] for b in piece] for i, piece in enumerate(pieces)]
            pieces, self.end = [pieces[i] for i in keep], new[self.end]
        self.pieces, self.vocab_size = pieces, len(pieces)
        # A character has one byte that does not look like 10xxxxxx: counting those counts characters.
        self.chars = torch.tensor([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces])

    def encode(self, text: str) -> torch.Tensor:
        """Token numbers, shape (n,), in a small integer type."""
        # Between a line break and a letter every such tokenizer cuts anyway: lines can be encoded side by side.
        cuts = (cut.start() for cut in re.finditer(rf"(?={END})|(?<=[^\s{END}]\n)(?=[^\s/])", text))
        bounds = itertools.pairwise(itertools.chain([0], cuts, [len(text)]))
        lines, parts = (text[start:end] for start, end in bounds), []
        while batch := list(itertools.islice(lines, 10_000)):  # not all at once: lines take more room than their tokens
            ids = []
            coded = self.core.encode_batch_fast([line.removeprefix(END) for line in batch], add_special_tokens=False)
            for line, code in zip(batch, coded):
                ids += [self.core.token_to_id(END_TEXT)] * line.startswith(END) + code.ids
            if self.spell:
                ids = [new for old in ids for new in self.spell[old]]
            parts.append(torch.tensor(ids, dtype=torch.uint16 if self.vocab_size <= 2**16 else torch.int32))
        return torch.cat(parts)

    def decode(self, ids: torch.Tensor) -> str:
        """The text of token numbers, shape (n,)."""
        return b"".join(self.pieces[i] for i in ids.tolist()).decode("utf-8", "ignore")

    def stream(self, ids):
        """Yield the text of each token number as it comes; a character of several tokens comes with the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        return (decoder.decode(self.pieces[i]) for i in ids)

    def count_chars(self, ids: torch.Tensor) -> int:
        """How many characters the tokens stand for."""
        return self.chars[ids.long()].sum().item()


def describe(tokenizer: BPETokenizer, text: str, ids: torch.Tensor) -> dict:
    """What the vocabulary makes of the training text: how much a token says, and how often an entry is seen."""
    size, words = tokenizer.vocab_size, sum(1 for _ in re.finditer(r"\w+", text))
    seen = sum(torch.bincount(part.int(), minlength=size) for part in ids.split(2**20))
    return dict(vocab_size=size, tokens=len(ids), chars_per_token=len(text) / len(ids),
                tokens_per_word=len(ids) / max(1, words), tokens_per_vocab_entry=len(ids) / size,
                entries_never_seen=(seen == 0).sum().item(), entries_seen_once=(seen == 1).sum().item())


def byte_level(model: models.BPE) -> Tokenizer:
    """A BPE over bytes as GPT-2 has it: words with the space before them, nothing lost."""
    core = Tokenizer(model)
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return core


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the text's own words. Stop if the text is too short for so many entries."""
    core = byte_level(models.BPE())
    core.train_from_iterator(text.split(END), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    if core.get_vocab_size() < vocab_size:
        raise Stop(f"--vocab_size {vocab_size} is too large for this text: it makes {core.get_vocab_size()} entries at most")
    return core


def tiktoken_tokenizer(name: str) -> Tokenizer:
    """OpenAI's encoding, downloaded at first use, as a tokenizer.json that a checkpoint can hold. OSError without network."""
    encoding = tiktoken.get_encoding(name)
    ranks, symbols = encoding._mergeable_ranks, {byte: symbol for symbol, byte in byte_symbols().items()}
    merges = []  # tiktoken joins any two pieces that make up an entry, early entries first: each such pair is a merge here
    for piece in sorted(ranks, key=ranks.get):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(ranks[a], ranks[b], a, b) for a, b in pairs if a in ranks and b in ranks]
        merges += [(a, b) for _, _, a, b in sorted(known)]
    written = {piece: "".join(symbols[byte] for byte in piece) for piece in ranks}
    core = byte_level(models.BPE({written[piece]: rank for piece, rank in ranks.items()},
                                 [(written[a], written[b]) for a, b in merges], ignore_merges=True))
    pattern = encoding._pat_str.replace("{1,3}+", "{1,3}")  # to the other engine that + would mean: again and again
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.add_special_tokens([END_TEXT])
    return core


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a folder with one or with vocab.json and merges.txt. Stop if it is none."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_dir() and not file.exists():
            return byte_level(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
        core = Tokenizer.from_file(str(file))
    except Exception as e:
        if type(e) is not Exception:  # the library raises nothing narrower
            raise
        raise Stop(f"--tokenizer_path {path} holds no tokenizer ({e}): give a tokenizer.json, or a folder with vocab.json "
                   "and merges.txt") from None
    if not isinstance(core.model, models.BPE):
        raise Stop(f"--tokenizer_path {path} holds no tokenizer of BPE kind: take another")
    return core


def find_tokenizer(config: Config, text: str) -> tuple[Tokenizer, str]:
    """The tokenizer that was asked for, and what it is; auto: the file, else tiktoken's, else one of the text's own."""
    kind, path = config.tokenizer, Path(config.tokenizer_path)
    if config.tokenizer_path and kind == "tiktoken":
        raise Stop("--tokenizer tiktoken takes no --tokenizer_path: leave one of them out")
    if config.tokenizer_path and (path.exists() or kind == "polish"):
        return read_tokenizer(path), str(path)
    if kind == "polish":
        from transformers import AutoTokenizer
        try:
            return AutoTokenizer.from_pretrained(POLISH).backend_tokenizer, POLISH
        except OSError as e:
            raise Stop(f"cannot fetch the tokenizer of {POLISH} ({type(e).__name__}): go online once, or give a copy of it "
                       "as --tokenizer_path") from None
    note = ""
    if kind in ("auto", "tiktoken"):
        try:
            return tiktoken_tokenizer(config.encoding), f"tiktoken's {config.encoding}"
        except (OSError, ValueError) as e:  # ValueError: something else came in place of the file
            note = f"tiktoken's {config.encoding} cannot be fetched ({type(e).__name__})"
            if kind == "tiktoken":
                raise Stop(f"{note}: go online once, set TIKTOKEN_CACHE_DIR to a folder that holds it, or take --tokenizer "
                           "custom") from None
    core = train_tokenizer(split_corpus(text)[0], config.vocab_size)
    return core, f"custom, {config.vocab_size:,} entries from the training part" + (f", as {note}" if note else "")


def make_tokenizer(config: Config, text: str, checkpoint: dict | None) -> BPETokenizer:
    """The checkpoint's tokenizer, or a new one for the text. Stop if it would lose a character of the text."""
    if checkpoint:
        tokenizer = BPETokenizer(**checkpoint["tokenizer"])
        path, keep = Path(config.tokenizer_path), tokenizer.state["keep"]
        if config.tokenizer_path and path.exists():
            core = read_tokenizer(path)
            vocab = core.get_vocab()
            if keep and max(keep) >= len(vocab) or BPETokenizer(core.to_str(), keep).pieces != tokenizer.pieces:
                raise Stop(f"--tokenizer_path {path} is not the tokenizer that the checkpoint was trained with: leave it out")
        return tokenizer
    core, name = find_tokenizer(config, text)
    if os.environ.get("RANK", "0") == "0":
        print(f"tokenizer: {name}")
    source = core.to_str()
    tokenizer = BPETokenizer(source, start=next((c for c in END + "\n" if c in text), text[:1]))
    for part in (text[i:i + 2**20] for i in range(0, len(text), 2**20)):  # not all at once, to save memory
        if tokenizer.decode(tokenizer.encode(part)) != part:
            raise Stop("that tokenizer loses characters of the text: take another")
    if config.prune_vocab:
        seen = set(tokenizer.encode(split_corpus(text)[0]).tolist())
        single = {i for i, piece in enumerate(tokenizer.pieces) if len(piece) == 1}  # the bytes, and the end of a song
        tokenizer = BPETokenizer(source, sorted(seen | single), tokenizer.start)
    return tokenizer


def save_tokenizer(tokenizer: BPETokenizer, config: Config):
    """Write RUN_DIR/tokenizer.json, and a new custom tokenizer at --tokenizer_path. A file that was given stays as it is."""
    ours, given = Path(config.run_dir, "tokenizer.json"), Path(config.tokenizer_path)
    if not config.resume and not (config.tokenizer_path and given.resolve() == ours.resolve()):
        set_aside(ours, Path(config.run_dir, f"previous-{time.strftime('%Y%m%d-%H%M%S')}", ours.name))
    for path in [ours] + [given] * (bool(config.tokenizer_path) and not config.resume):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tokenizer.state["source"], encoding="utf-8")


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


@functools.lru_cache(2)  # once an epoch, not once a step
def shuffled_windows(length: int, size: int, seed: int) -> torch.Tensor:
    """Where an epoch's windows begin, shape (length // size,): the text is a ring, cut at random, then every `size` tokens."""
    generator = torch.Generator().manual_seed(seed)
    cut = torch.randint(length, (1,), generator=generator)
    return cut + size * torch.randperm(max(1, length // size), generator=generator)


def growing(config: Config, step: int) -> Config:
    """The config with the rows of this step: they double in length `grow` times, at even intervals, up to the context.

    Each time they become half as many. What stands near is learned first, and short rows are quick: attention looks at all
    pairs of positions (Press et al., "Shortformer", arXiv:2012.15832).
    """
    factor = 2 ** (config.grow - step * (config.grow + 1) // config.max_iters)
    return replace(config, block_size=max(1, config.block_size // factor), batch_size=config.batch_size * factor)


def draw_batch(ids, config: Config, step: int, rank: int, world: int) -> torch.Tensor:
    """Rows rank::world of the batch that all processes draw together, shape (grad_accum, batch_size, block_size + 1).

    classic: windows anywhere, so that some characters are read three times before others once. modern: epochs. The draw
    depends on the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
    """
    count, size = config.grad_accum * config.batch_size * world, config.block_size
    if config.recipe == "classic":
        generator = torch.Generator().manual_seed(hash((config.seed, step)))
        starts = torch.randint(len(ids) - size, (count,), generator=generator)
    else:
        rows = max(1, len(ids) // size)  # in an epoch
        first, last = step * count // rows, ((step + 1) * count - 1) // rows  # a batch may end one epoch and begin another
        epochs = [shuffled_windows(len(ids), size, hash((config.seed, epoch))) for epoch in range(first, last + 1)]
        starts = torch.cat(epochs)[step * count - first * rows:][:count]
    places = (starts[rank::world, None] + torch.arange(size + 1)) % len(ids)
    rows = torch.from_numpy(ids.numpy()[places.numpy()])  # torch before 2.10 cannot take entries out of its uint16
    return rows.long().view(config.grad_accum, config.batch_size, size + 1)


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


def rotate(x, rope):
    """Rotary positions (Su et al., arXiv:2104.09864): turn pairs of numbers by angles that grow with the position.

    The product of a query and a key then depends on how far apart they stand. Shape in and out: (..., T, hs).
    """
    cos, sin = rope.to(x.dtype)  # (T, hs) each
    a, b = x.chunk(2, dim=-1)  # a becomes a cos - b sin, b becomes b cos + a sin
    return x * cos + torch.cat((b, a), dim=-1) * sin


class Dropout(nn.Dropout):
    """Zeroes a share p of the numbers in training (Srivastava et al., 2014), so that none can be relied on alone.

    On a CPU torch draws a double for each number, which takes longer than to compute with it; here it is a byte, and p
    counts in 256ths.
    """

    def forward(self, x):
        """Shape in and out: any. The numbers that stay grow by 1 / (1 - p): the mean stays, too."""
        if not self.training or not self.p:  # at once: generation passes here for each token and layer
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        bound = round(256 * self.p)
        words = torch.randint(-2**63, 2**63 - 1, (math.ceil(x.numel() / 8),))  # 64 random bits each
        numbers = words.view(torch.uint8)[:x.numel()].view(x.shape).to(x.dtype)  # so that --compile finds vectors
        return x * torch.ge(numbers, bound, out=torch.empty_like(numbers)).mul_(256 / (256 - bound))


class MultiHeadAttention(nn.Module):
    """Self-attention by hand, all heads in one batched product (Vaswani et al., arXiv:1706.03762)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.block_size, self.modern = config.n_head, config.block_size, config.modern
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)  # query, key and value in one product
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=not config.modern)
        self.dropout = Dropout(config.dropout)
        if config.modern:  # QK-norm (Henry et al., arXiv:2010.04245) keeps the scores from growing without bound
            self.qk_norm = nn.LayerNorm(config.n_embd // config.n_head, bias=False)

    def forward(self, x, mask, rope=None, cache=None):
        """Mix into each position what came before it. x: (B, T, C); mask: (T, S), 0 or -inf; cache: see generate."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, nh, hs)
        q, k, v = qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if self.modern:
            q, k = rotate(self.qk_norm(qkv[:2]), rope)
        if cache is not None:  # k and v of all S positions so far; T of them are new
            S = mask.size(1)
            if self not in cache:
                cache[self] = [k.new_empty(B, self.n_head, self.block_size, C // self.n_head) for _ in "kv"]
            for kept, new in zip(cache[self], (k, v)):
                kept.narrow(2, S - T, T).copy_(new)
            k, v = (kept.narrow(2, 0, S) for kept in cache[self])  # (B, nh, S, hs) each
        scores = (q * k.size(-1) ** -0.5) @ k.transpose(-2, -1)  # (B, nh, T, S)
        weights = self.dropout((scores + mask.to(scores.dtype)).softmax(dim=-1))  # -inf hides the future; a row sums to 1
        out = (weights @ v).transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.dropout(self.proj(out))


class FeedForward(nn.Module):
    """What each position does on its own: ReLU, or the modern SwiGLU (Shazeer, arXiv:2002.05202) with a gate."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.modern, bias = config.modern, not config.modern
        # Three matrices instead of two: at two thirds of the width they have as many parameters.
        hidden = 32 * max(1, round(config.n_embd * 8 / 3 / 32)) if config.modern else 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, 2 * hidden if config.modern else hidden, bias=bias)
        self.down = nn.Linear(hidden, config.n_embd, bias=bias)
        self.dropout = Dropout(config.dropout)

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
        # LayerNorm without bias is RMSNorm (arXiv:1910.07467) of a centred x; on a CPU torch's is several times faster.
        self.norm1, self.norm2 = (nn.LayerNorm(config.n_embd, bias=not config.modern) for _ in range(2))
        self.attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x, mask, rope=None, cache=None):
        """Shape in and out: (B, T, C)."""
        x = x + self.attention(self.norm1(x), mask, rope, cache)
        return x + self.feed_forward(self.norm2(x))


class SlicedLoss(torch.autograd.Function):
    """Mean cross-entropy of a linear head without ever holding all logits: 16,384 tokens x 50,257 entries are 3.3 GB a copy.

    The tokens go through the head a slice at a time, and each slice leaves its part of the gradients at once, in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        """The loss in nats per token. x: (N, C); weight: (V, C); bias: (V,) or None; targets: (N,), -100 is not counted."""
        count, total = (targets >= 0).sum(), 0
        learns = ctx.needs_input_grad[0]  # not in evaluation
        grads = [torch.zeros_like(t, dtype=torch.float32) if learns and t is not None else None for t in (x, weight, bias)]
        size = max(1, 2**24 // weight.size(0))  # 64 MB of logits
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), size):
                part, target = x[start:start + size].float(), targets[start:start + size]
                logits = F.linear(part, weight, bias)  # (n, V)
                total = total + F.cross_entropy(logits, target, reduction="sum")
                if not learns:
                    continue
                told = (target >= 0)[:, None] / count  # (n, 1): what each token's loss weighs
                error = logits.softmax(dim=-1)  # the gradient of cross-entropy: what was expected less what came
                error.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(told))
                error *= told
                torch.mm(error, weight, out=grads[0][start:start + size])
                grads[1].addmm_(error.T, part)
                if bias is not None:
                    grads[2] += error.sum(dim=0)
        ctx.save_for_backward(*grads)
        return total / count

    @staticmethod
    def backward(ctx, scale):
        """The gradients are there already; they only take the outer factor."""
        return *(None if grad is None else grad * scale for grad in ctx.saved_tensors), None


class GPTLanguageModel(nn.Module):
    """Tokens in; out, for each position, the scores of the token that comes next."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=not config.modern)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=not config.modern)
        mask = torch.full((config.block_size, config.block_size), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        if config.modern:
            head_size = config.n_embd // config.n_head
            speed = 10000.0 ** -(torch.arange(0, head_size, 2) / head_size)  # (hs / 2,), radians per position
            cos, sin = (wave(torch.outer(torch.arange(config.block_size), speed)) for wave in (torch.cos, torch.sin))
            # The cosines, and the sines with the signs that rotate() needs for its first and its second half.
            rope = torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))  # (2, block_size, hs)
            self.register_buffer("rope", rope, persistent=False)
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

    def forward(self, idx, targets=None, cache=None, past=0):
        """Logits (B, T, vocab_size), or with targets (B, T) the mean loss. idx: (B, T), after `past` cached positions."""
        S = past + idx.size(1)
        x = self.token_embedding(idx)  # (B, T, C)
        rope = self.rope[:, past:S] if self.config.modern else None
        if not self.config.modern:
            x = x + self.position_embedding.weight[past:S]
        mask = self.mask[past:S, :S]
        for block in self.blocks:
            x = block(x, mask, rope, cache)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)  # (B, T, vocab_size)
        return SlicedLoss.apply(x.flatten(0, 1), self.lm_head.weight, self.lm_head.bias, targets.flatten())


def rdrop_loss(logits, targets, weight: float):
    """R-Drop (Liang et al., arXiv:2106.14448): a row that goes through two dropouts shall be predicted alike.

    logits: (2B, T, V), the rows twice; targets: (B, T). Returns (loss, nats): the mean nats of both, and with them `weight`
    times the Kullback-Leibler divergence of the two, the mean of both directions.
    """
    p, q = logits.float().log_softmax(dim=-1).chunk(2)  # (B, T, V) each
    nats = -(p + q).gather(-1, targets[..., None]).mean() / 2
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(dim=-1).mean() / 2
    return nats + weight * divergence, nats


# ---------------------------------------------------------------------------------- optimizer and schedule
def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix (n, rows, cols) towards 1: Newton-Schulz steps instead of an SVD.

    Coefficients of Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """
    if matrices.size(1) > matrices.size(2):  # take the smaller of the two Gram matrices
        return orthogonalize(matrices.mT, steps).mT
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum: every direction of a weight matrix learns at the same pace (Jordan et al., 2024).

    The step of torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (arXiv:2502.16982: one learning rate for Muon and
    AdamW), but all matrices of a "shape" in one batched product; query, key and value are one weight here, gate and up
    another: both are taken apart.
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


def planned(config: Config, tokens: int, tokens_per_step: int) -> Config:
    """The config with what it leaves to the length of the training text.

    modern makes EPOCHS passes over it, in 100 steps at least and the size's own number at most, and shows in between what it
    has learned: ten evaluations or more, four samples or more.
    """
    size = SIZES[config.size]
    steps = config.max_iters or min(size["max_iters"], max(100, EPOCHS * tokens // tokens_per_step))
    plan = dict(max_iters=steps, eval_interval=min(size["eval_interval"], math.ceil(steps / 10)),
                sample_interval=min(size["sample_interval"], math.ceil(steps / 4)))
    return replace(config, **{name: value for name, value in plan.items() if getattr(config, name) is None})


# ---------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, ids, tokenizer, config: Config, amp, rank=0, world=1) -> tuple[float, float]:
    """(nats per token, bits per character) over all tokens but the first, each predicted exactly once.

    Consecutive windows that overlap by one token, no random draw: the same model always gets the same figure.
    Bits per character = sum of nats / (ln 2 * characters) can be compared between tokenizers; loss per token cannot.
    """
    model.eval()
    device, short = next(model.parameters()).device, -(len(ids) - 1) % config.block_size  # of a last full window
    inputs = F.pad(ids[:-1].long(), (0, short)).view(-1, config.block_size).split(config.batch_size)
    targets = F.pad(ids[1:].long(), (0, short), value=-100).view(-1, config.block_size).split(config.batch_size)  # -100: none
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, characters
    for x, y in list(zip(inputs, targets))[:config.eval_iters or None][rank::world]:
        told = y[y >= 0]
        with amp:
            nats = model(x.to(device), y.to(device)).item() * len(told)
        sums += torch.tensor([nats, len(told), tokenizer.count_chars(told)], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    nats, tokens, chars = sums.tolist()
    return nats / tokens, nats / (math.log(2) * chars)


# ---------------------------------------------------------------------------------------------- checkpoint
FORMAT_VERSION = 1
RUN_FILES = ("config.json", "metrics.jsonl", "metrics.json", "loss.png", "model_best.pt", "model_last.pt", "output")


def save_checkpoint(path: str, checkpoint: dict):
    """Write a temporary file, flush it to the disk, rename it: at any moment a kill leaves a whole file at the path."""
    data = io.BytesIO()
    torch.save(checkpoint, data)
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise Stop(f"cannot write {path} ({e.strerror}): the last good checkpoint is kept; make room, then --resume", 1) from e


def load_checkpoint(path: str, name: str = "") -> dict:
    """This stage's checkpoint in a file or at a URL, on the CPU. weights_only: a malicious file cannot run code."""
    name = name or path  # what the user calls it
    try:
        if "://" in path:
            with tempfile.TemporaryDirectory() as folder:
                torch.hub.download_url_to_file(path, f"{folder}/download.pt", progress=sys.stderr.isatty())
                return load_checkpoint(f"{folder}/download.pt", path)
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings(action="ignore"):  # a foreign file gets one line, below
            if archive.testzip():  # torch.load takes damaged numbers as they are
                raise ValueError
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and (checkpoint["stage"], checkpoint["format_version"]) == (STAGE, FORMAT_VERSION):
            return checkpoint
    except (OSError, http.client.HTTPException) as e:  # no file, no such address
        raise Stop(f"no checkpoint at {name} ({e}): train first, or give the right --run_dir or address") from None
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
        pass
    raise Stop(f"{name} is no checkpoint of {Path(__file__).name}, or it is damaged: take another, or train again")


def load_weights(model: GPTLanguageModel, checkpoint: dict):
    """Take a checkpoint's weights, and the context that they have learned to use. RuntimeError: they do not fit the model."""
    model.load_state_dict(checkpoint["model"])
    model.config = replace(model.config, block_size=checkpoint["model_config"]["block_size"])


def check_writable(*paths: str):
    """Stop if a file cannot be written at one of the paths. Leaves no trace."""
    for path in map(Path, paths):
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()
        except OSError as e:
            raise Stop(f"cannot write {path} ({e.strerror}): choose another --run_dir, --save_path or --output") from None


def set_aside(path: Path, new: Path | None = None):
    """Move what stands at the path to `new`, by default its name with the time: nothing is ever overwritten."""
    new = new or path.with_name(f"{path.name}.previous-{time.strftime('%Y%m%d-%H%M%S')}")
    while new.exists():
        new = new.with_name(new.name + "+")
    if path.exists():
        new.parent.mkdir(parents=True, exist_ok=True)
        path.rename(new)


def check_paths(config: Config):
    """Stop if --export_hf or --tokenizer_path asks for what cannot be: found before the training, not after it."""
    if config.export_hf and (config.recipe == "classic" or config.prune_vocab):
        raise Stop("--export_hf: no Hugging Face class holds classic's head bias, and no tokenizer file a pruned vocabulary: "
                   "take --recipe modern without --prune_vocab")
    used = (Path.cwd(), Path(config.run_dir).resolve())
    if config.export_hf and any(place.is_relative_to(Path(config.export_hf).resolve()) for place in used):
        raise Stop(f"--export_hf {config.export_hf} is a folder in use: name one of its own")
    check_writable(*[f"{config.export_hf}/config.json"] * bool(config.export_hf),
                   *[config.tokenizer_path] * (bool(config.tokenizer_path) and not Path(config.tokenizer_path).exists()))


def export_hf(model: GPTLanguageModel, tokenizer: BPETokenizer, folder: str):
    """Write a modern model and its tokenizer as a Hugging Face folder (Qwen3ForCausalLM) that needs no code of ours.

    Qwen3 norms by the root mean square, we by the standard deviation: both agree where the mean is 0. So the mean is taken
    out of all that is added to the residual stream, and out of queries and keys; no figure that leaves the model changes.
    """
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_aside(Path(folder))
    config, weights = model.config, {}

    def centred(weight, dim=0):
        return weight - weight.mean(dim=dim, keepdim=True)

    ours = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    for i in range(config.n_layer):
        block = {name.split(".", 2)[2]: p for name, p in ours.items() if name.startswith(f"blocks.{i}.")}
        q, k, v = block["attention.qkv.weight"].chunk(3)
        q, k = (centred(part.view(config.n_head, -1, config.n_embd), dim=1).reshape(part.shape) for part in (q, k))
        gate, up = block["feed_forward.up.weight"].chunk(2)
        layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": centred(block["attention.proj.weight"]),
                 "self_attn.q_norm": block["attention.qk_norm.weight"], "self_attn.k_norm": block["attention.qk_norm.weight"],
                 "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": centred(block["feed_forward.down.weight"]),
                 "input_layernorm": block["norm1.weight"], "post_attention_layernorm": block["norm2.weight"]}
        weights |= {f"model.layers.{i}.{name}.weight": p.clone() for name, p in layer.items()}
    weights |= {"model.embed_tokens.weight": centred(ours["token_embedding.weight"], dim=1),
                "model.norm.weight": ours["norm.weight"], "lm_head.weight": ours["lm_head.weight"]}
    theirs = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=gate.size(0),
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_head,
        head_dim=config.n_embd // config.n_head, max_position_embeddings=config.block_size, rms_norm_eps=model.norm.eps,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False, attention_dropout=0.0,
        bos_token_id=tokenizer.end, eos_token_id=tokenizer.end, pad_token_id=tokenizer.end))
    theirs.load_state_dict(weights)
    theirs.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.core, bos_token=END_TEXT, eos_token=END_TEXT, pad_token=END_TEXT,
                            model_max_length=config.block_size).save_pretrained(folder)
    print(f"-> {folder}: a Hugging Face model; gpt_hf.py --model_name {folder} fine-tunes it")


# ---------------------------------------------------------------------------------------------- generate
NAN = "the loss turned NaN; the last good checkpoint is kept: lower --learning_rate"


def draw_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token a row from the scores: logits (B, vocab_size), result (B,)."""
    if temperature < 1e-6:
        return logits.argmax(dim=-1)
    scores, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    probs = scores[:, :top_k or None].softmax(dim=-1)
    if probs.isnan().any():
        raise Stop(NAN, 1)
    if top_p < 1:  # nucleus sampling (Holtzman et al., arXiv:1904.09751)
        probs[probs.cumsum(dim=-1) - probs >= top_p] = 0  # those before it already make up top_p
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yield max_new_tokens times the next token of each row, shape (B,). idx: (B, T), the prompt.

    The cache keeps each block's keys and values, so a new token costs one position. While the text fits the context the
    result is, token for token, that of reading it all anew; then the last half is kept, and read again.
    """
    model.eval()
    size = model.config.block_size
    context = new = idx[:, -size:]
    cache, past = {}, 0
    for _ in range(max_new_tokens):
        if past + new.size(1) > size:
            new, past = context[:, -(size // 2):], 0
        logits = model(new, cache=cache, past=past)[:, -1]  # (B, vocab_size)
        past += new.size(1)
        token = draw_token(logits, temperature, top_k, top_p, generator)
        new = token[:, None]
        context = torch.cat((context, new), dim=1)[:, -size:]
        yield token


def sample_text(model, tokenizer, config: Config, amp, number=0, length=None):
    """Yield one text piece by piece, the prompt first. The same seed and number give the same text."""
    device = next(model.parameters()).device
    idx = tokenizer.encode(config.prompt or tokenizer.start).long().to(device)[None]  # (1, T)
    how = (length or config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    yield config.prompt
    with amp if device.type != "cpu" else contextlib.nullcontext():  # one position at a time, casts cost more than they save
        tokens = generate(model, idx, *how, torch.Generator(device).manual_seed(hash((config.seed, -1, number))))
        ids = (token.item() for token in tokens)
        ids = itertools.takewhile(lambda token: token != tokenizer.end, ids) if config.stop_at_end else ids
        for piece in tokenizer.stream(ids):
            yield piece.replace(END, SEPARATOR)


def write_samples(model, tokenizer, config: Config, amp):
    """Write the texts to --output and to the screen at the same time: what is shown is what is saved."""
    if len(tokenizer.encode(config.prompt)) > model.config.block_size:
        print(f"note: the prompt is longer than the context; the model sees its last {model.config.block_size} tokens")
    set_aside(Path(config.output))
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with open(config.output, "w", encoding="utf-8", newline="\n") as file:
        for number in range(config.num_samples):
            end = SEPARATOR if number + 1 < config.num_samples else "\n"
            for piece in itertools.chain(sample_text(model, tokenizer, config, amp, number), [end]):
                file.write(piece)
                print(piece, end="", flush=True)
    print(f"-> {config.output}")


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


def compiled(network, device: torch.device):
    """The network as torch.compile makes it, fewer and larger kernels; as it is, with a note, where no compiler is there."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except RuntimeError as e:
        print(f"note: --compile finds no compiler here ({type(e).__name__}): the model runs as it is")
        return network
    return torch.compile(network, dynamic=False)  # anew for each length of the rows


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


class Trainer:
    """A run: a model, its optimizers, how far it has come, and the files it writes. Rank 0 alone writes and prints."""

    def __init__(self, config: Config, model, tokenizer, text: str, resumed: dict | None = None):
        self.config, self.model, self.tokenizer, self.device = config, model, tokenizer, next(model.parameters()).device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.corpus_sha256 = hashlib.sha256(text.encode()).hexdigest()
        if resumed and resumed["corpus_sha256"] != self.corpus_sha256:
            raise Stop(f"--input {config.input} (SHA-256 {self.corpus_sha256[:8]}) is not the text that this run began "
                       f"with ({resumed['corpus_sha256'][:8]}): give that one, or start a new run in another --run_dir")
        train_text, val_text = split_corpus(text)
        self.train_ids, val_ids = tokenizer.encode(train_text), tokenizer.encode(val_text)
        self.val_ids, self.facts = torch.cat((self.train_ids[-1:], val_ids)), describe(tokenizer, train_text, self.train_ids)
        if len(self.train_ids) <= config.block_size or not len(val_ids):
            needed = math.ceil((config.block_size + 1) / 0.85 * len(text) / (len(self.train_ids) + len(val_ids))) + 1
            raise Stop(f"{config.input} is too short ({len(text):,} characters): --block_size {config.block_size} takes "
                       f"about {needed:,}")
        self.amp = mixed_precision(config.dtype, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp.fast_dtype == torch.float16)
        self.optimizers = make_optimizers(model, config)
        keep_memory()
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.network = nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        self.network = compiled(self.network, self.device) if config.compile else self.network
        self.tokens_per_step = config.grad_accum * config.batch_size * config.block_size * self.world
        self.config = planned(config, len(self.train_ids), self.tokens_per_step)
        self.say = tqdm.write if self.rank == 0 else lambda text: None  # prints above the progress bar
        # How far the run has come, as its checkpoints hold it. losses: those since the last evaluation.
        self.now = dict(iter=0, best_iter=0, best_val_loss=math.inf, evals_since_best=0, seconds=0.0, losses=[], history=[])
        if resumed:
            self.now = {name: resumed[name] for name in self.now}
            self.now["losses"] = [loss.to(self.device) for loss in self.now["losses"]]
            if resumed["scaler"]:  # empty unless in float16
                self.scaler.load_state_dict(resumed["scaler"])
            for optimizer, state in zip(self.optimizers, resumed["optimizer"]):
                for group, old in zip(optimizer.param_groups, state["param_groups"]):
                    old["weight_decay"] = group["weight_decay"]  # --weight_decay may have changed
                optimizer.load_state_dict(state)

    def open_folder(self):
        """Make the run's folder; what an earlier run left there moves to previous-<time>, unless this one goes on from it."""
        config, previous = self.config, Path(self.config.run_dir, f"previous-{time.strftime('%Y%m%d-%H%M%S')}")
        check_writable(f"{config.run_dir}/config.json", config.save_path, config.output)
        if not config.resume:
            for name in RUN_FILES:
                set_aside(Path(config.run_dir, name), previous / name)
            set_aside(Path(config.save_path))
        for path in (config.run_dir, Path(config.save_path).parent):
            Path(path).mkdir(parents=True, exist_ok=True)
        Path(config.run_dir, "config.json").write_text(json.dumps(dict(
            options=asdict(config), versions=dict(python=sys.version, torch=torch.__version__), device=str(self.device),
            dtype=str(self.amp.fast_dtype), corpus_sha256=self.corpus_sha256), indent=1))
        self.write_history()

    def write_history(self):
        """Write metrics.jsonl: a line for each evaluation that this run has behind it, none that a kill has undone."""
        lines = "".join(json.dumps(record) + "\n" for record in self.now["history"])
        Path(self.config.run_dir, "metrics.jsonl").write_text(lines, encoding="utf-8")

    def save(self, path: str):
        """Write a checkpoint that is enough to go on from, and to sample from; never one whose numbers are not finite."""
        now, finite = self.now, all(p.isfinite().all() for p in self.model.parameters())
        if not finite or not math.isfinite(now["history"][-1]["val_loss"]):
            raise Stop(NAN, 1)
        if self.rank == 0:
            save_checkpoint(path, dict(
                now, format_version=FORMAT_VERSION, stage=STAGE, model=self.model.state_dict(), scaler=self.scaler.state_dict(),
                optimizer=[optimizer.state_dict() for optimizer in self.optimizers], config=asdict(self.config),
                model_config=asdict(self.model.config), tokenizer=self.tokenizer.state, corpus_sha256=self.corpus_sha256))

    def step(self):
        """One optimizer step. What is random depends on seed, step and rank alone: no generator state needs saving."""
        config, step = self.config, self.now["iter"]
        torch.manual_seed(hash((config.seed, step, self.rank)))  # for dropout
        rows = growing(config, step)
        if self.model.config.block_size != rows.block_size:  # the context that the model has learned to use
            self.model.config = replace(self.model.config, block_size=rows.block_size)
        batch = draw_batch(self.train_ids, rows, step, self.rank, self.world).to(self.device, non_blocking=True)
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
        total = 0
        for rows in batch:  # (B, T + 1)
            inputs, targets = rows[:, :-1], rows[:, 1:]
            with self.amp:
                if config.rdrop:
                    loss, nats = rdrop_loss(self.network(inputs.repeat(2, 1)), targets, config.rdrop)
                else:
                    loss = nats = self.network(inputs, targets)
            self.scaler.scale(loss / config.grad_accum).backward()
            total += nats.detach() / config.grad_accum
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        with self.amp:  # Muon's matrix products, too
            for optimizer in self.optimizers:
                if not self.scaler.is_enabled() or norm.isfinite():  # float16: an overflow anywhere skips the whole step
                    self.scaler.step(optimizer)
        self.scaler.update()
        self.now["losses"].append(total)
        self.now["iter"] += 1

    def check_up(self):
        """Evaluate, log, keep the best model and the state to go on from."""
        now, config = self.now, self.config
        size = self.model.config.block_size  # as long as the rows that the last step learned from
        rows = replace(config, block_size=size, batch_size=config.batch_size * (config.block_size // size))
        val_loss, val_bpc = evaluate(self.model, self.val_ids, self.tokenizer, rows, self.amp, self.rank, self.world)
        losses = torch.stack(now["losses"]) if now["losses"] else torch.tensor([val_loss], dtype=torch.float64)
        train_loss = losses.mean() / self.world
        if self.world > 1:  # each process has seen rows of its own
            dist.all_reduce(train_loss)
        train_loss = train_loss.item()
        better = val_loss < now["best_val_loss"]
        now.update(losses=[], evals_since_best=now["evals_since_best"] + 1)
        if better:
            now.update(best_iter=now["iter"], best_val_loss=val_loss, evals_since_best=0)
        now["history"].append(dict(iter=now["iter"], train_loss=train_loss, val_loss=val_loss, val_bpc=val_bpc,
                                   learning_rate=learning_rate(config, now["iter"]), seconds=now["seconds"]))
        for path in [config.save_path] * better + [f"{config.run_dir}/model_last.pt"]:
            self.save(path)
        if self.rank == 0:
            self.write_history()
        self.say(f"step {now['iter']:>5}  train {train_loss:.3f}  val {val_loss:.3f} nats/token = {val_bpc:.3f} "
                 f"bits/char  {self.metrics()['chars_per_second']:,.0f} chars/s{'  best' if better else ''}")

    def train(self) -> int:
        """Train to max_iters, or until `patience` evaluations brought nothing (0), or a signal (its number)."""
        config, now, start = self.config, self.now, self.now["iter"]
        hidden = self.rank > 0 or not (sys.stderr.isatty() or IN_NOTEBOOK)  # a file gets lines, not a bar
        with catch_signals() as caught, tqdm(total=config.max_iters, initial=start, unit="step", leave=False,
                                             dynamic_ncols=True, disable=hidden) as bar:
            while True:
                seen = now["history"][-1]["iter"] if now["history"] else -1  # a resumed run has looked at this step before
                if (now["iter"] % config.eval_interval == 0 or now["iter"] == config.max_iters) and seen < now["iter"]:
                    self.check_up()
                if config.sample_interval and now["iter"] > start and now["iter"] % config.sample_interval == 0:
                    self.say("".join(sample_text(self.model, self.tokenizer, config, self.amp, length=120)) + "\n")
                if now["iter"] == config.max_iters or 0 < config.patience <= now["evals_since_best"]:
                    return 0
                stop = torch.tensor(caught[0] if caught else 0)
                if self.world > 1:  # what one process caught stops all, after the same step
                    dist.all_reduce(stop, op=dist.ReduceOp.MAX)
                if stop:
                    self.save(f"{config.run_dir}/model_last.pt")
                    return int(stop)
                clock = time.perf_counter()
                self.step()
                if now["iter"] % 10 == 0:  # a GPU works behind our back: item() waits for it
                    bar.set_postfix_str(f"loss {now['losses'][-1].item():.3f}")
                now["seconds"] += time.perf_counter() - clock
                bar.update()
                if now["iter"] == start + 10:
                    early = now["seconds"]  # the first steps take longer, with --compile by far
                if now["iter"] == start + 20:
                    minutes = (config.max_iters - now["iter"]) * (now["seconds"] - early) / 10 / 60
                    self.say(f"about {minutes:.1f} minutes of training to go")

    def metrics(self) -> dict:
        """What metrics.json holds."""
        now, rate = self.now, self.now["iter"] * self.tokens_per_step / max(self.now["seconds"], 1e-9)
        best = min(now["history"], key=lambda record: record["val_loss"], default={})
        return dict(
            self.facts, stage=STAGE, params=sum(p.numel() for p in self.model.parameters()), val_loss=best.get("val_loss"),
            val_bpc=best.get("val_bpc"), best_iter=best.get("iter"), iters=now["iter"], seconds=now["seconds"],
            tokens_per_second=rate, chars_per_second=rate * self.facts["chars_per_token"], device=str(self.device),
            dtype=str(self.amp.fast_dtype).removeprefix("torch."), seed=self.config.seed)

    def write_report(self):
        """Write metrics.json and draw both losses: where the curves part, the model begins to learn by heart."""
        from matplotlib.figure import Figure  # here, as it takes a second to import

        Path(self.config.run_dir, "metrics.json").write_text(json.dumps(self.metrics(), indent=1) + "\n", encoding="utf-8")
        history = self.now["history"]
        best = min(history, key=lambda record: record["val_loss"])
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
        for name, color, label in (("train_loss", "#0072B2", "training"), ("val_loss", "#D55E00", "validation")):
            axes.plot([r["iter"] for r in history], [r[name] for r in history], color=color, marker=".", label=label)
        axes.plot(best["iter"], best["val_loss"], "o", color="#D55E00", fillstyle="none", markersize=12,
                  label=f"best: {best['val_loss']:.3f} = {best['val_bpc']:.3f} bits per character")
        axes.legend()
        figure.savefig(Path(self.config.run_dir, "loss.png"), dpi=120)


# -------------------------------------------------------------------------------------------------- main
IN_NOTEBOOK = "kernel" in os.path.basename(sys.argv[0])  # then sys.argv is the kernel's, not ours


def run(given: dict) -> dict:
    """Train, then sample; or only sample. All that can be wrong is found before anything is written. The metrics."""
    asked, source = Config(**given), given.get("load_url")
    if asked.resume and source:
        raise Stop("--resume goes on from the run's own checkpoint, --load_url starts from another: leave one of them out")
    if asked.resume or asked.sample_only and not source:
        source = f"{asked.run_dir}/model_last.pt" if asked.resume else asked.save_path or f"{asked.run_dir}/model_best.pt"
    checkpoint = load_checkpoint(source) if source else None
    device = pick_device(given.get("device", checkpoint["config"]["device"] if asked.resume else "auto"))
    config = make_config(given, device, checkpoint)
    check_paths(config)
    text = "" if config.sample_only else read_corpus(config.input)
    tokenizer = make_tokenizer(config, text, checkpoint)
    tokenizer.encode(config.prompt)  # does it know all of it?
    if not config.sample_only and len(text) <= config.block_size:  # before a mask of that size is made
        raise Stop(f"{config.input} is too short ({len(text):,} characters) for --block_size {config.block_size}, which takes "
                   f"about {math.ceil((config.block_size + 1) / 0.85) + 1:,}")
    torch.manual_seed(config.seed)
    model = GPTLanguageModel(GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head,
                                       config.n_embd, config.dropout, config.recipe == "modern")).to(device)
    try:
        if checkpoint:
            load_weights(model, checkpoint)
    except RuntimeError:
        raise Stop(f"the weights in {source} do not fit its options: it is damaged; take another") from None
    if config.sample_only:
        check_writable(config.output)
        write_samples(model, tokenizer, config, mixed_precision(config.dtype, device))
        if config.export_hf:
            export_hf(model, tokenizer, config.export_hf)
        return {name: checkpoint[name] for name in ("stage", "best_iter", "best_val_loss", "iter")}
    trainer = Trainer(config, model, tokenizer, text, checkpoint if config.resume else None)
    config = trainer.config  # now with its plan
    if trainer.rank == 0:
        trainer.open_folder()
        save_tokenizer(tokenizer, config)
    passes = config.max_iters * trainer.tokens_per_step / len(trainer.train_ids)
    trainer.say(f"{config.size}, {config.recipe}, {trainer.metrics()['params']:,} parameters on {device} in "
                f"{trainer.metrics()['dtype']}: {len(text):,} characters, {config.max_iters} steps of "
                f"{trainer.tokens_per_step:,} tokens, {passes:.1f} passes over the text")
    trainer.say(", ".join(f"{name.replace('_', ' ')} {round(value, 3):,}" for name, value in trainer.facts.items()))
    if config.resume and config.max_iters > checkpoint["config"]["max_iters"]:
        trainer.say(f"note: the learning rate is planned anew for {config.max_iters} steps")
    stopped = trainer.train()
    if trainer.rank == 0:
        trainer.write_report()
    if stopped:
        trainer.say(f"stopped and saved; go on with: python {Path(__file__).name} --resume --run_dir {config.run_dir}")
        return {**trainer.metrics(), "signal": stopped}
    if trainer.rank == 0:
        load_weights(model, load_checkpoint(config.save_path))
        write_samples(model, tokenizer, config, trainer.amp)
        if config.export_hf:
            export_hf(model, tokenizer, config.export_hf)
    return trainer.metrics()


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
        message, status = "out of memory: lower --batch_size, and raise --grad_accum instead", 1
    except OSError as e:
        message, status = f"{e.filename or 'writing'}: {e.strerror}; the last good checkpoint is kept", 1
    except RuntimeError as e:
        if not dist.is_initialized() or "Connection" not in str(e):  # torch has no narrower error
            raise
        message, status = "another process of this run is gone; the last good checkpoint is kept: go on with --resume", 1
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
