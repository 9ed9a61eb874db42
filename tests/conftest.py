"""What all tests need."""

import os
import signal
import stat
from pathlib import Path

# As in the scripts, and before torch is loaded: its threads wait without spinning for long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Started in the background, a process ignores Ctrl-C, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_device(path):
    """A device node like /dev/null. The real one only where nobody may rename it: a faulty script run by root did."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        Path(path).symlink_to("/dev/null")
