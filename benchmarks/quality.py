"""How few bits per character half an hour yields: modern against classic at the best of three widths and rates.

    python benchmarks/quality.py --input FILE --minutes 3 --out FOLDER             # all runs: a screening
    python benchmarks/quality.py --input FILE --minutes 30 --out FOLDER --runs classic_256_0.001 modern_2115

A run gets as many steps as fit into the minutes, at a speed measured first, and is evaluated 20 times; its best
counts. modern is planned for 5,000 or 8,000 steps at most: its rate decays to the end, and a longer plan memorizes
the text first (LOG.md). --jobs 2 trains two at a time, each on its share of the cores. Finished runs in FOLDER are
not trained again; stopped ones continue. Figures: benchmarks/README.md.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(block_size=256, batch_size=8)
CLASSIC = {f"classic_{width}_{rate:g}": dict(SHAPE, recipe="classic", n_embd=width, n_head=width // 64, learning_rate=rate,
                                             dropout=0.2)  # the original project's dropout
           for width in (128, 256, 384) for rate in (3e-4, 1e-3, 3e-3)}
LONG = dict(n_layer=8, dropout=0.2, learning_rate=3e-3, max_iters=5000, compile=True)
MODERN = {f"modern_{seed}": dict(LONG, seed=seed) for seed in (2115, 2116)}
BPE = dict(tokenizer="custom", vocab_size=500)
PROBE = dict(max_iters=150, eval_interval=5, eval_iters=1)  # a short run to measure how long a step takes
RUNS = {name: ("gpt.py", options) for name, options in (CLASSIC | MODERN).items()}
RUNS |= {f"bpe_{name}": ("gpt_tiktoken.py", options | BPE) for name, options in CLASSIC.items()}
RUNS |= {f"bpe_{name}": ("gpt_tiktoken.py", options | BPE | dict(grow=3, dropout=0.25, max_iters=8000))
         for name, options in MODERN.items()}


def call(script: str, threads: int, **options) -> dict:
    """Run a stage on the CPU. Returns its metrics.json."""
    options |= dict(size="tiny", device="cpu", sample_interval=0, patience=0, max_new_tokens=1)
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
    subprocess.run([sys.executable, ROOT / script, *words], check=True, stdout=subprocess.DEVNULL,
                   env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    return json.loads(Path(options["run_dir"], "metrics.json").read_text())


def read_history(folder: Path) -> list[dict]:
    """A run's log, a dict for each evaluation."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(name: str, args) -> str:
    """Train this run to its end. Returns its row of the table."""
    try:
        return train(name, args)
    except subprocess.CalledProcessError as e:
        return f"| {name} | ended with status {e.returncode}: the same command continues |"


def train(name: str, args) -> str:
    """The row of a run that finished."""
    (script, options), folder, threads = RUNS[name], Path(args.out, name), max(1, (os.cpu_count() or 1) // args.jobs)
    options = dict(options, input=args.input)
    longest = options.pop("max_iters", math.inf)
    if (folder / "model_last.pt").exists():  # a finished run is only read
        metrics = call(script, threads, run_dir=folder, input=args.input, resume=True)
    else:
        call(script, threads, **options, run_dir=f"{args.out}/probe/{name}", **PROBE)
        seen = [record["seconds"] for record in read_history(Path(args.out, "probe", name))]  # every five steps
        times = sorted(after - before for before, after in itertools.pairwise(seen))[:-4]  # the others wait for --compile
        seconds = statistics.mean(times) / 5
        steps = min(longest, max(1, int(60 * args.minutes / seconds)))
        metrics = call(script, threads, **options, run_dir=folder, max_iters=steps, eval_interval=math.ceil(steps / 20))
    setup = json.loads((folder / "config.json").read_text())["options"]
    history = read_history(folder)
    tokens = metrics["tokens_per_vocab_entry"] * metrics["vocab_size"]
    epochs = metrics["iters"] * setup["batch_size"] * setup["grad_accum"] * setup["block_size"] / tokens
    return (f"| {name} | {metrics['params']:,} | {metrics['vocab_size']:,} | {metrics['iters']:,} | {epochs:.0f} | "
            f"{metrics['best_iter']:,} | {metrics['val_bpc']:.3f} | {history[-1]['val_bpc']:.3f} | {metrics['seconds']:,.0f} |")


def main(argv=None):
    """Train, and print a row for each run as soon as it is ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(ROOT / "assets/input/input2.txt"), help="the text (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="training time of each run (default: %(default)s)")
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, help="which (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    print("| run | parameters | vocabulary | steps | epochs | best at | bits/char | at the end | seconds |")
    print("| --- " * 9 + "|", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for text in pool.map(lambda name: row(name, args), args.runs):
            print(text, flush=True)


if __name__ == "__main__":
    main()
