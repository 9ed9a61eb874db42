"""How much faster the key/value cache makes generation: tokens a second with it and without.

    python benchmarks/generate.py [--tokens 2000]

gpt.py's `generate` at base size (6 layers, 384 wide, context 256, random weights) on the CPU, one row, against a loop that
reads the context again for each token with the same model and the same drawing. By turns, a hundred tokens each.
"""

import argparse
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

CHUNK = 100  # tokens of a turn
SHAPE = dict(n_layer=6, n_head=6, n_embd=384, block_size=256)


@torch.inference_mode()
def generate_without_cache(model, idx, max_new_tokens, context, *how):
    """Yield tokens as gpt.generate does, each from a fresh look at the whole context."""
    model.eval()
    none = model.lm_head.out_features
    for _ in range(max_new_tokens):
        recalled = torch.stack([gpt.recall(idx[0], n, none) for n in model.orders] or [idx[0]], dim=1)[None, -context:]
        token = gpt.draw_token(model(idx[:, -context:], recalled=recalled)[:, -1], *how)
        idx = torch.cat((idx, token[:, None]), dim=1)
        yield token


def main(argv=None):
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args(argv)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
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
