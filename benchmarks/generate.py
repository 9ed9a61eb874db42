"""How much faster the key/value cache makes generation: tokens a second with it and without.

    python benchmarks/generate.py [--tokens 2000] [--repeats 3]

gpt.py's `generate` at base size (6 layers, 384 wide, context 256, random weights) on the CPU, one row, against a loop that
reads the context again for each token with the same model and the same drawing. In turn; medians.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402


@torch.inference_mode()
def generate_without_cache(model, idx, max_new_tokens, *how):
    """Yield tokens as gpt.generate does, each from a fresh look at the whole context."""
    model.eval()
    for _ in range(max_new_tokens):
        token = gpt.draw_token(model(idx[:, -model.config.block_size:])[:, -1], *how)
        idx = torch.cat((idx, token[:, None]), dim=1)
        yield token


def main():
    """Print each repeat and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for recipe in gpt.RECIPES:
        torch.manual_seed(0)
        model = gpt.GPTLanguageModel(gpt.GPTConfig(158, 256, 6, 6, 384, 0.2, recipe == "modern"))
        rates = {gpt.generate: [], generate_without_cache: []}
        for _ in range(args.repeats):
            for function, measured in rates.items():
                list(function(model, torch.zeros(1, 1, dtype=torch.long), 20, 0.8, 0, 0.95))
                began = time.perf_counter()
                list(function(model, torch.zeros(1, 1, dtype=torch.long), args.tokens, 0.8, 0, 0.95))
                measured.append(args.tokens / (time.perf_counter() - began))
        cached, plain = (statistics.median(measured) for measured in rates.values())
        each = ", ".join(f"{a / b:.1f}" for a, b in zip(*rates.values()))
        print(f"{recipe}: {cached:.0f} tokens/s with the cache, {plain:.1f} without: {cached / plain:.1f} times ({each})",
              flush=True)


if __name__ == "__main__":
    main()
