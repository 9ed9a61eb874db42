"""What one training step costs: time, share of the machine's own matrix rate, peak memory.

    python benchmarks/training_step.py                # tiny and base of both scripts, as they run on this machine
    python benchmarks/training_step.py --only tiny

Each row is a process of its own, on random tokens. Share: the step's model flops (per token 6 for each matrix weight
and 12 * layers * width * context for attention; no optimizer), divided by its time and by the machine's matrix
product rate, measured in the same process just before and after. Memory: the largest resident size less that before
the model was made. plain: gpt_tiktoken.py with cross_entropy(lm_head(x)) instead of its sliced loss.
"""

import argparse
import importlib
import json
import platform
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


class Plain(torch.nn.Module):
    """A model of gpt_tiktoken.py with the plain loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, recalled=None):
        """Mean loss in nats per token."""
        return F.cross_entropy(self.model(idx, recalled=recalled).flatten(0, 1).float(), targets.flatten())


def measure(name: str, steps: int) -> dict:
    """One row, in this process."""
    script, recipe, size, options = ROWS[name]
    stage, cpu = importlib.import_module(script), torch.device("cpu")
    given = {key: value for key, value in options.items() if key != "plain"}
    given |= dict(size=size, recipe=recipe, grow=0)  # rows as long as the context
    vocab_size = 50257 if script == "gpt_tiktoken" else 76
    ids = torch.randint(vocab_size, (60000,), generator=torch.Generator().manual_seed(0))
    config = stage.make_config(given, cpu, len(ids))
    none = vocab_size
    data = torch.stack([ids, *(stage.recall(ids, n, none) for n in stage.recall_orders(config))], dim=1)
    tokens, hidden = config.batch_size * config.block_size, 3 * config.n_embd
    before, dtype = peak(), stage.mixed_precision(config.dtype, cpu).fast_dtype
    rate = matrix_rate(tokens, config.n_embd, hidden, dtype)
    stage.keep_memory()
    model = stage.GPTLanguageModel(config, vocab_size)
    network = Plain(model) if options.get("plain") else model
    optimizers, scaler = stage.make_optimizers(model, config), torch.amp.GradScaler("cpu", enabled=False)
    times = []
    for step in range(steps):
        began = time.perf_counter()
        rows = stage.draw_batch(data, config, step, 0, 1)
        stage.take_step(network, optimizers, scaler, rows, config, step)
        times.append(time.perf_counter() - began)
    rate = (rate + matrix_rate(tokens, config.n_embd, hidden, dtype)) / 2
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name)
    flops = tokens * (6 * weights + 12 * config.n_layer * config.n_embd * config.block_size)
    seconds = statistics.median(times[1:])
    return dict(seconds=seconds, tokens_per_second=tokens / seconds, rate=rate, share=flops / seconds / rate,
                memory=peak() - before, dtype=str(dtype).removeprefix("torch."))


def measure_alone(name: str, steps: int) -> dict:
    """One row, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", name, "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout)


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="the first is not counted (default: 12 of tiny, 3 of base)")
    args = parser.parse_args(argv)
    if args.row:
        print(json.dumps(measure(args.row, args.steps or (12 if "tiny" in args.row else 3))))
        return
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| step | computes in | seconds | tokens/s | matrix rate, GFLOP/s | share of it | peak memory, GB |")
    print("| --- " * 7 + "|")
    for name in ROWS:
        if args.only in name:
            row = measure_alone(name, args.steps or 0)
            print(f"| {name} | {row['dtype']} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} | "
                  f"{row['rate'] / 1e9:.0f} | {row['share']:.0%} | {row['memory']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
