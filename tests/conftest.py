"""What all tests need."""

import signal

# Started in the background, a process ignores Ctrl-C, and so would all that the tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
