"""How fast the collector is without a delay, and how much memory it takes, against the tests' local server.

python benchmarks/collector.py                # writes benchmarks/logs/collector_bench.log, about three minutes
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "benchmarks" / "logs" / "collector_bench.log"
CASES = ((100, 0), (1000, 0), (10_000, 0), (300, 300_000))  # songs, bytes of padding in each page
sys.path.insert(0, str(ROOT / "tests"))
from fake_genius import TOKEN, FakeGenius, invented  # noqa: E402


def measure(songs: int, page_bytes: int) -> tuple[float, float]:
    """Collect that many songs in a process of its own; returns (seconds, peak memory in MiB)."""
    genius = FakeGenius()
    genius.padding = "x" * page_bytes
    genius.add_artist(7, "Tede")
    for i in range(1, songs + 1):
        genius.add_song(7, i, lyrics=lambda i=i: invented(i, stanzas=6, lines=8))
    command = [sys.executable, str(ROOT / "tests" / "fake_genius.py"), genius.url, "--delay", "0"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        env = {**os.environ, "GENIUS_ACCESS_TOKEN": TOKEN}
        child = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - start
    genius.close()
    return seconds, int(re.search(r"peak_kib=(\d+)", child.stderr)[1]) / 1024


def main():
    """Print and log one line for each measurement of a whole process, including its start."""
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with open(LOG, "w", encoding="utf-8") as file:
        lines = [f"{time.strftime('%Y-%m-%d')} Python {platform.python_version()}, {os.cpu_count()} CPU cores"]
        print(lines[0], file=file)
        for songs, page_bytes in CASES:
            seconds, mib = measure(songs, page_bytes)
            speed = f"{songs / seconds:6.1f} songs/s, peak {mib:.1f} MiB"
            line = f"{songs:6,} songs, pages of {page_bytes / 1000 + 3:.0f} kB: {speed}"
            print(line, file=file, flush=True)
            print(line)


if __name__ == "__main__":
    main()
