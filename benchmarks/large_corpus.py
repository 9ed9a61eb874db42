"""A corpus of 100 MB, made by shuffling the lines of a small one: peak memory, and time from Enter to the first step.

    python benchmarks/large_corpus.py --input assets/input/input2.txt

Each script runs as a user runs it, for one step, on the small text and on the large one: the extra memory, divided by
the characters of the large one, is the memory per character. Unix only: only there is a child's memory counted.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--size", "tiny", "--max_iters", "1", "--eval_iters", "1", "--max_new_tokens", "1", "--device", "cpu"]
SCRIPTS = {"gpt.py": [], "gpt_tiktoken.py": ["--tokenizer", "custom"]}


def shuffled(text: str, size: int, path: Path):
    """Write at least `size` bytes: the lines of the text, in a new order again and again."""
    lines, dice, written = text.splitlines(keepends=True), random.Random(2115), 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while written < size:
            dice.shuffle(lines)
            file.writelines(lines)
            written += len("".join(lines).encode())


def first_step(script: str, options: list[str], text: Path, folder: Path) -> tuple[int, float, float]:
    """(peak memory in bytes, seconds to the first step, seconds to the end) of a run of one step."""
    began, first, metrics = time.perf_counter(), None, folder / "metrics.jsonl"
    child = subprocess.Popen([sys.executable, ROOT / script, "--input", text, "--run_dir", folder, *QUICK, *options],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = (0, 0, None)
    while not done[0]:  # the evaluation before the first step writes the first line
        if first is None and metrics.exists():
            first = time.perf_counter() - began
        time.sleep(0.02)
        done = os.wait4(child.pid, os.WNOHANG)
    assert done[1] == 0, f"{script} ended with status {done[1]}"
    return done[2].ru_maxrss * (1 if sys.platform == "darwin" else 1024), first, time.perf_counter() - began


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", default=str(ROOT / "assets/input/input2.txt"), help="the small text (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=100, help="size of the large one (default: %(default)s)")
    args = parser.parse_args(argv)
    print("| script | characters | peak memory, MB | bytes per character | seconds to the first step |\n" + "| --- " * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder, "large.txt")
        shuffled(Path(args.input).read_text(encoding="utf-8"), int(args.megabytes * 1e6), large)
        for script, options in SCRIPTS.items():
            base = 0
            for i, text in enumerate((Path(args.input), large)):
                memory, seconds, _ = first_step(script, options, text, Path(folder, f"{script}-{i}"))
                characters = len(text.read_text(encoding="utf-8"))
                more = f"{(memory - base) / characters:.1f}" if base else ""
                base = memory
                print(f"| {script} | {characters:,} | {memory / 1e6:,.0f} | {more} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
