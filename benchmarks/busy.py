"""What a second busy program costs: a step of gpt.py's tiny, alone and beside one, by how torch's threads wait.

    python benchmarks/busy.py

The threads of torch's GNU OpenMP spin while they wait for each other. Beside a second program one of them may not be
running, and the others spin for it: GOMP_SPINCOUNT limits how long. The scripts set it to 1000. Each figure is a
median over rounds, all four cases in turn, of what training_step.py measures in a fresh process. Times: beside /
alone. """

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEP = [sys.executable, str(Path(__file__).resolve().with_name("training_step.py")), "--row", "tiny, characters, modern"]
SPINS = {"not set": None, "1000": "1000"}  # heading: value


@contextlib.contextmanager
def busy_program():
    """A program that keeps a core busy, until the end of the block."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        program.kill()
        program.wait()


def measure(spin: str | None, busy: bool, steps: int) -> float:
    """Seconds of a step in a process of its own, which loads torch before the script could set anything."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spin:
        environment["GOMP_SPINCOUNT"] = spin
    with tempfile.TemporaryDirectory() as folder, busy_program() if busy else contextlib.nullcontext():
        done = subprocess.run([*STEP, "--steps", str(steps)], capture_output=True, text=True, check=True, cwd=folder,
                              env=environment)
    return json.loads(done.stdout)["seconds"]


def main(argv=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    cases = [(spin, busy) for spin in SPINS for busy in (False, True)]
    seconds = {case: [] for case in cases}
    for _ in range(args.rounds):
        for spin, busy in cases:
            seconds[spin, busy].append(measure(SPINS[spin], busy, args.steps))
    print(f"python {platform.python_version()}, {os.cpu_count()} processors, {args.rounds} rounds of {args.steps} steps\n")
    print("| GOMP_SPINCOUNT | alone, ms | beside a busy program, ms | times |\n" + "| --- " * 4 + "|")
    for spin in SPINS:
        alone, beside = (1000 * statistics.median(seconds[spin, busy]) for busy in (False, True))
        print(f"| {spin} | {alone:.0f} | {beside:.0f} | {beside / alone:.2f} |")


if __name__ == "__main__":
    main()
