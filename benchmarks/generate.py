"""How much faster the key/value cache makes generation, and a batch of rows: tokens a second with it and without.

    python benchmarks/generate.py [--tokens 2000]
    python benchmarks/generate.py --batch 32 [--run_dir assets/char_model]

gpt.py's `generate` at base size (6 layers, 384 wide, context 256, random weights) on the CPU, one row, against a loop that
rereads the context for each token, with the same model and sampling. They take turns, a hundred tokens each.

--batch N: N rows at a time against one row, in turns, at tiny size (random weights) or with a run's best model; and
how many rows differ from the same row generated alone with the same generator, because rounding differs.
"""

import argparse
import contextlib
import itertools
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402

CHUNK = 100  # tokens in a turn
SHAPE = dict(n_layer=6, n_head=6, n_embd=384, block_size=256)


@torch.inference_mode()
def generate_without_cache(model, idx, max_new_tokens, context, *how):
    """Yield tokens as gpt.generate does, but reread the whole context for each."""
    model.eval()
    none = model.lm_head.out_features
    for _ in range(max_new_tokens):
        recalled = torch.stack([gpt.recall(idx[0], n, none) for n in model.orders] or [idx[0]], dim=1)[None, -context:]
        token = gpt.draw_token(model(idx[:, -context:], recalled=recalled)[:, -1], *how)
        idx = torch.cat((idx, token[:, None]), dim=1)
        yield token


def load(run_dir):
    """(model, context, start): a run's best model, or one of size tiny with random weights."""
    if run_dir:
        saved = gpt.load_checkpoint(f"{run_dir}/model_best.pt")
        config, tokenizer = gpt.Config(**saved["config"]), gpt.make_tokenizer({}, "", saved)
        model = gpt.GPTLanguageModel(config, tokenizer.vocab_size)
        model.load_state_dict(saved["model"])
        return model, saved["context"], tokenizer.encode(tokenizer.start).long()
    torch.manual_seed(0)
    config = gpt.make_config(dict(size="tiny"), torch.device("cpu"))
    model = gpt.GPTLanguageModel(config, 76)
    for p in model.parameters():  # or the blocks add nothing
        p.data += 0.02 * torch.randn_like(p)
    return model, config.block_size, torch.zeros(1, dtype=torch.long)


@contextlib.contextmanager
def own_generators(rows):
    """Let gpt.py draw each row with its own generator, so that a row does not depend on the others."""
    draw, generators = gpt.draw_token, [torch.Generator().manual_seed(row) for row in rows]
    gpt.draw_token = lambda logits, *how: torch.cat(
        [draw(row[None], *how[:3], generator) for row, generator in zip(logits, generators)])
    try:
        yield
    finally:
        gpt.draw_token = draw


def compare_batch(args):
    """Print the rates of a batch and of one row, their ratio, and how many rows differ."""
    model, context, start = load(args.run_dir)
    how = args.tokens, context, 0.8, 0, 0.95
    streams = {rows: gpt.generate(model, start.expand(rows, -1), *how) for rows in (1, args.batch)}
    seconds = {rows: 0.0 for rows in streams}
    for _ in range(math.ceil(args.tokens / CHUNK)):
        for rows, stream in streams.items():
            began = time.perf_counter()
            for _ in itertools.islice(stream, CHUNK):
                pass
            seconds[rows] += time.perf_counter() - began
    alone, together = (rows * args.tokens / seconds[rows] for rows in streams)
    print(f"batch of {args.batch}: {together:.0f} tokens/s, one row after the other {alone:.0f}: {together / alone:.1f} times",
          flush=True)

    def texts(rows):
        with own_generators(rows):
            return torch.stack(list(gpt.generate(model, start.expand(len(rows), -1), *how)), dim=1)

    for name in ("float32", "float64"):
        model = model.to(getattr(torch, name))
        batch = texts(range(args.batch))
        shared = [(batch[row] == texts([row])[0]).int().cummin(0).values.sum().item() for row in range(args.batch)]
        parted = [length for length in shared if length < args.tokens]
        print(f"{name}: {len(parted)} of {args.batch} rows of {args.tokens} tokens part from what is drawn alone"
              + f", after {min(parted, default=0)} tokens or more" * bool(parted), flush=True)


def main(argv=None):
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=0, help="compare this many rows at a time with one row")
    parser.add_argument("--run_dir", default="", help="with --batch: the run of gpt.py whose best model writes")
    args = parser.parse_args(argv)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    if args.batch:
        return compare_batch(args)
    for recipe in gpt.RECIPES:
        torch.manual_seed(0)
        config = gpt.make_config(dict(SHAPE, recipe=recipe), torch.device("cpu"))
        model = gpt.GPTLanguageModel(config, 158)
        start = torch.zeros(1, 1, dtype=torch.long)
        how = model, start, args.tokens, config.block_size, 0.8, 0, 0.95
        streams = dict(cache=gpt.generate(*how), plain=generate_without_cache(*how))
        seconds = {name: [] for name in streams}
        for _ in range(math.ceil(args.tokens / CHUNK)):
            for name, stream in streams.items():
                began = time.perf_counter()
                for _ in itertools.islice(stream, CHUNK):
                    pass
                seconds[name].append(time.perf_counter() - began)
        cached, plain = (args.tokens / sum(seconds[name]) for name in streams)
        each = sorted(b / a for a, b in zip(*seconds.values()))
        print(f"{recipe}: {cached:.0f} tokens/s with the cache, {plain:.1f} without: {cached / plain:.1f} times "
              f"(by turns: {each[0]:.1f} to {each[-1]:.1f}, median {statistics.median(each):.1f})", flush=True)


if __name__ == "__main__":
    main()
