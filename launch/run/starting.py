"""Ctrl-C while a program loads its libraries; imports nothing of them itself."""

import os
import signal
from typing import Any

EXIT_INTERRUPTED = 130


def end_at_interrupt() -> None:
    """Lets Ctrl-C end the process at once, with one line: there is nothing yet to save or to close."""
    # Where the caller of the program has it ignored, e.g. by nohup, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_interrupt() -> None:
    """Lets Ctrl-C raise `KeyboardInterrupt` again, for the work of the program."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    # An exception could be caught or reported by whatever is being imported.
    os.write(2, b"interrupted: nothing had begun\n")
    os._exit(EXIT_INTERRUPTED)
