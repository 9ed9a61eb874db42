"""What all tests need."""

import os
import signal

# As in the scripts, and before torch is loaded: its threads wait without spinning for long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Started in the background, a process ignores Ctrl-C, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
