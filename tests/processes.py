"""A stage's script in processes of its own, without paying for the import of torch each time.

A server imports torch once and forks; each child then does what `python SCRIPT ARGV > OUTPUT 2>&1` would.
"""

import itertools
import multiprocessing
import os
import pty
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["torch._dynamo", "matplotlib.figure"])


def start(script, argv, output, dies_in=None, memory=None, environment=None):
    """Start the script in the current folder.

    dies_in=("fsync", 3) kills it inside its third call of os.fsync; memory: bytes that it may have besides those at its start.
    """
    Path(output).unlink(missing_ok=True)
    args = (str(script), list(map(str, argv)), os.path.abspath(output), os.getcwd(), dies_in, memory, environment or {})
    child = FORKING.Process(target=run, args=args, daemon=True)
    child.start()
    return child


def finish(child):
    """Wait until the child has ended; its exit status, negative for a signal."""
    child.join(300)
    assert child.exitcode is not None, "the script hangs"
    return child.exitcode


def wait_until(condition, child):
    """Wait until the condition holds; False if the child ends before that."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        if not child.is_alive():
            return condition()
        time.sleep(0.002)
    return True


def evaluations(output):
    """How many evaluations the script has reported so far."""
    path = Path(output)
    return sum(line.startswith("step ") for line in path.read_text("utf-8").splitlines()) if path.exists() else 0


def run(script, argv, output, folder, dies_in, memory, environment):
    """The child: the script as __main__."""
    import matplotlib.figure
    import torch

    torch.set_num_threads(1)  # runs that are to agree bit by bit need the same number
    matplotlib.figure.Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")  # half of a small run's time
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ.update({name: str(value) for name, value in environment.items()})
    if dies_in:
        die_in(*dies_in)
    if memory:
        pages = int(Path("/proc/self/statm").read_text().split()[0])  # of address space
        resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + memory] * 2)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def die_in(name, call):
    """Let the process kill itself in the given call of os.fsync, its file half written, or of os.replace."""
    real, count = getattr(os, name), itertools.count(1)

    def deadly(*args):
        if next(count) == call:
            if name == "fsync":
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(os, name, deadly)


def talk(script, argv, typed):
    """Run the script in a pseudo-terminal, type each of the bytes when it asks; (what the terminal shows, the exit status)."""
    shown, last, typed, (ours, its) = b"", b"", iter(typed), pty.openpty()
    deadline = time.monotonic() + 300
    environment = os.environ | dict(OMP_NUM_THREADS="1", TERM="dumb", PYTHONIOENCODING="utf-8:strict")
    # Its controlling terminal, for Ctrl-C. By a program of its own: after a fork of threads little is safe.
    code = ("import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    process = subprocess.Popen([sys.executable, "-c", code, script, *argv], stdin=its, stdout=its, stderr=its,
                               env=environment, start_new_session=True)
    os.close(its)
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 2**16)
                if re.search(rb"\n> $", shown):
                    last = next(typed, b"too few")
                    os.write(ours, last)
            elif last == b"\x03":  # Python misses a Ctrl-C that comes just before it waits for a line
                os.write(ours, last)
    except OSError:  # the script has ended, and with it its terminal
        pass
    finally:
        os.close(ours)  # hangs up
        status = process.wait(60)
    return shown.decode("utf-8", "replace").replace("\r\n", "\n"), status
