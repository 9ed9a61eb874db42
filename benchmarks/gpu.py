"""gpt.py on a GPU: training steps, the race of the recipes, generation. benchmarks/gpu.sh runs it in 8 minutes.

    python benchmarks/gpu.py --input assets/input/input2.txt
    python benchmarks/gpu.py --device cpu --size tiny --seconds 1 --race 30 --tokens 40     # a rehearsal without a GPU

Steps: tokens per second, model flops as a share of the card's own bfloat16 rate (measured here, 4096 x 4096), peak
memory; attention by hand and torch's fused one, float16 and bfloat16, eager and compiled. Race: classic trains for
--race steps; modern for its default number of steps, with and without rows that grow, then for twice as many: when is
it as good as classic at its best? Generation: one row and 64, the best of three. All at --size (base).
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402


def fused_attention(self, x, mask, rope=None, cache=None):
    """MultiHeadAttention.forward with torch's kernel instead of the four lines by hand; for training only."""
    B, T, C = x.shape
    q, k, v = (part(x).view(B, T, self.n_head, -1).transpose(1, 2) for part in (self.query, self.key, self.value))
    if self.modern:
        q, k = (gpt.rotate(self.qk_norm(part), rope).to(v.dtype) for part in (q, k))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p * self.training, is_causal=True)
    return self.dropout(self.proj(out.transpose(1, 2).reshape(B, T, C)))


def wait(device: str):
    """A GPU works asynchronously: wait until it has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def per_second(work, device: str, seconds: float) -> float:
    """How many times per second `work` runs, after a few rounds that do not count (allocation, compilation)."""
    for _ in range(3):
        work()
    wait(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            work()
        wait(device)
        count += 5
    return count / (time.perf_counter() - began)


def prepare(args, **options):
    """(settings, model, the text): all that a training step needs."""
    device = torch.device(args.device)
    text = gpt.read_corpus(args.input)
    tokenizer = gpt.make_tokenizer({}, text, None)
    ids = tokenizer.encode(text)
    config = gpt.make_config(dict(options, size=args.size, max_iters=10**6), device, len(ids))  # more than are timed
    data = gpt.with_recall(ids, config, tokenizer)
    torch.manual_seed(config.seed)
    return config, gpt.GPTLanguageModel(config, tokenizer.vocab_size).to(device), data


def steps_per_second(args, config, model, data) -> float:
    """How many training steps a second gpt.py takes with these settings."""
    device, numbers = torch.device(args.device), itertools.count()
    network = torch.compile(model, dynamic=False) if config.compile else model
    optimizers = gpt.make_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")

    def work():
        step = next(numbers)
        rows = gpt.draw_batch(data, config, step, 0, 1).to(device, non_blocking=True)
        gpt.take_step(network, optimizers, scaler, rows, config, step)

    return per_second(work, args.device, args.seconds)


def steps(args, rate: float):
    """Print the table of training steps."""
    print("| recipe | attention | dtype | | tokens/s | share of the bf16 rate | peak memory, GB |\n" + "| --- " * 7 + "|")
    for recipe in gpt.RECIPES:
        for dtype, compiled in (("float16", False), ("bfloat16", False), ("bfloat16", True)):
            for attention in ("by hand", "fused"):
                forward = fused_attention if attention == "fused" else gpt.MultiHeadAttention.forward
                torch.compiler.reset()
                with patch.object(gpt.MultiHeadAttention, "forward", forward):
                    config, model, data = prepare(args, recipe=recipe, dtype=dtype, compile=compiled)
                    if args.device == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    tokens = config.batch_size * config.block_size * steps_per_second(args, config, model, data)
                memory = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else math.nan
                weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name)
                flops = 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size  # a token
                print(f"| {recipe} | {attention} | {dtype} | {'compiled' if compiled else 'eager'} | {tokens:,.0f} | "
                      f"{tokens * flops / rate:.0%} | {memory:.2f} |", flush=True)


def race(args):
    """Print when classic was at its best, and when modern was as good."""
    def history(folder, **options):
        run_dir = Path(folder, "run")
        given = dict(options, input=args.input, device=args.device, size=args.size, run_dir=str(run_dir), patience=0,
                     sample_interval=0)
        with contextlib.redirect_stdout(io.StringIO()), patch.object(gpt, "write_samples"):
            gpt.run(given)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    with tempfile.TemporaryDirectory() as folder:
        target = min(history(folder, recipe="classic", max_iters=args.race), key=lambda record: record["val_bpc"])
    print(f"classic: best at step {target['iter']}, {target['val_bpc']:.3f} bits per character after {target['seconds']:.1f} s")
    plans, steps = {"by default": {}, "--grow 2": dict(grow=2), "twice as long": None}, 0
    for name, options in plans.items():
        options = dict(max_iters=2 * steps) if options is None else options
        with tempfile.TemporaryDirectory() as folder:
            records = history(folder, eval_interval=10, **options)
        best, steps = min(records, key=lambda record: record["val_bpc"]), records[-1]["iter"]
        there = next((record for record in records if record["val_bpc"] <= target["val_bpc"]), None)
        verdict = "not as good as classic" if not there else (
            f"as good as classic after {there['seconds']:.1f} s, {target['seconds'] / max(there['seconds'], 1e-9):.1f} times "
            "sooner")
        print(f"modern, {name}, {steps} steps: best {best['val_bpc']:.3f} at step {best['iter']} after {best['seconds']:.1f} "
              f"s; {verdict}", flush=True)


def generation(args):
    """Print tokens a second of one row and of 64."""
    config, model, _ = prepare(args)
    for rows in (1, 64):
        start = torch.zeros(rows, 1, dtype=torch.long, device=args.device)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            with gpt.mixed_precision("auto", torch.device(args.device)):
                for _ in gpt.generate(model, start, args.tokens, config.block_size, 0.8, 0, 0.95):
                    pass
            wait(args.device)
            times.append(time.perf_counter() - began)
        print(f"generation, {rows} rows: {rows * args.tokens / min(times):,.0f} tokens/s", flush=True)


def main(argv=None):
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, help in (
            ("input", "assets/input/input2.txt", "the text"), ("device", "cuda", "cuda, or cpu for a rehearsal"),
            ("size", "base", "tiny or base"), ("seconds", 3.0, "how long each kind of step is measured"),
            ("race", 3000, "steps of the classic recipe"), ("tokens", 1000, "tokens to generate in each row")):
        parser.add_argument(f"--{name}", default=default, type=type(default), help=f"{help} (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; rehearse with --device cpu --size tiny")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    a = torch.randn(2, 4096 if args.device == "cuda" else 512, 4096, device=args.device, dtype=torch.bfloat16)
    rate = 2 * a.size(1) ** 2 * 4096 * per_second(lambda: a[0] @ a[1].mT, args.device, args.seconds)
    print(f"{name}, python {platform.python_version()}, torch {torch.__version__}, bfloat16 rate {rate / 1e12:.2f} TFLOP/s\n")
    steps(args, rate)
    print()
    race(args)
    generation(args)


if __name__ == "__main__":
    main()
