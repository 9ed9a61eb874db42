"""What one training step costs: time, share of the machine's own matrix rate, peak memory.

    python benchmarks/training_step.py                # tiny and base of both scripts, as they run on this machine
    python benchmarks/training_step.py --only tiny

Each row is a process of its own, on invented text. Share: the step's model flops (6 for each weight of a matrix and token,
12 * layers * width * context for attention, no optimizer), by its time, by the rate of the same machine's matrix product
measured in the same process just before and after. Memory: the largest resident size less that before the model was made.
plain: gpt_tiktoken.py with cross_entropy(lm_head(x)) instead of its sliced loss.
"""

import argparse
import importlib
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ROWS = {  # name: (script, recipe, size, options)
    "tiny, characters, modern": ("gpt", "modern", "tiny", {}),
    "tiny, characters, classic": ("gpt", "classic", "tiny", {}),
    "base, characters, modern": ("gpt", "modern", "base", {}),
    "base, characters, classic": ("gpt", "classic", "base", {}),
    "base, 50,257 entries, batch 16, sliced": ("gpt_tiktoken", "modern", "base", dict(batch_size=16)),
    "base, 50,257 entries, batch 16, plain": ("gpt_tiktoken", "modern", "base", dict(batch_size=16, plain=True)),
}


def matrix_rate(tokens: int, width: int, hidden: int, dtype, repeats: int = 15) -> float:
    """Median rate of a block's widest product, (tokens, width) x (width, hidden), in flops a second."""
    a, b = torch.randn(tokens, width, dtype=dtype), torch.randn(width, hidden, dtype=dtype)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * tokens * width * hidden / statistics.median(times)


def peak() -> float:
    """The largest resident size so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class FiftyThousand:
    """Stands for a tokenizer of gpt2's size: each character is a number below 50,257."""

    vocab_size, end, state = 50257, 50256, {}

    def encode(self, text):
        """A number for each character."""
        return torch.tensor([ord(c) * 7919 % 50257 for c in text], dtype=torch.int32)

    def count_chars(self, ids):
        """One for each token."""
        return ids.numel()

    def decode(self, ids):
        """As many letters as tokens."""
        return "a" * len(ids)

    def stream(self, ids):
        """Nothing to read."""
        return ("a" for _ in ids)


def plain_forward(model, idx, targets=None, cache=None, past=0):
    """gpt_tiktoken's forward with the plain loss."""
    head = model.lm_head
    model.lm_head = torch.nn.Identity()
    x = type(model).forward(model, idx)
    model.lm_head = head
    return F.cross_entropy(head(x).flatten(0, 1).float(), targets.flatten())


def measure(name: str, steps: int) -> dict:
    """One row, in this process."""
    script, recipe, size, options = ROWS[name]
    stage, plain = importlib.import_module(script), options.pop("plain", False)
    random.seed(0)
    text = "".join(random.choice("aąbcdeę fghijklłmn\noóprsśtuwyzźż") for _ in range(60000))
    given = dict(input="-", device="cpu", size=size, recipe=recipe, grow=0, **options)  # rows as long as the context
    config = stage.make_config(given, torch.device("cpu"), None)
    tokenizer = FiftyThousand() if script == "gpt_tiktoken" else stage.make_tokenizer(config, text, None)
    tokens, hidden = config.batch_size * config.block_size, 3 * config.n_embd
    before, dtype = peak(), stage.mixed_precision(config.dtype, torch.device("cpu")).fast_dtype
    rate = matrix_rate(tokens, config.n_embd, hidden, dtype)
    model = stage.GPTLanguageModel(stage.GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head,
                                                   config.n_embd, config.dropout, recipe == "modern"))
    trainer = stage.Trainer(config, model, tokenizer, text)
    if plain:
        trainer.network = lambda x, y: plain_forward(model, x, y)
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        trainer.step()
        times.append(time.perf_counter() - began)
    rate = (rate + matrix_rate(tokens, config.n_embd, hidden, dtype)) / 2
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name)
    flops = tokens * (6 * weights + 12 * config.n_layer * config.n_embd * config.block_size)
    seconds = statistics.median(times[1:])
    return dict(seconds=seconds, tokens_per_second=tokens / seconds, rate=rate, share=flops / seconds / rate,
                memory=peak() - before, dtype=str(dtype).removeprefix("torch."))


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="the first is not counted (default: 12 of tiny, 3 of base)")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.steps or (12 if "tiny" in args.row else 3))))
        return
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| step | computes in | seconds | tokens/s | matrix rate, GFLOP/s | share of it | peak memory, GB |")
    print("| --- " * 7 + "|")
    for name in ROWS:
        if args.only in name:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(Path(__file__).resolve()), "--row", name, "--steps", str(args.steps or 0)]
                row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout)
            print(f"| {name} | {row['dtype']} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} | "
                  f"{row['rate'] / 1e9:.0f} | {row['share']:.0%} | {row['memory']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
