"""How the process of a program ends, also by Ctrl-C and SIGTERM; imports none of the program's libraries."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_own_process = False
"""Whether a program has called `end_at_interrupt`, so that the process is its own and not a caller's."""


def end_at_interrupt() -> None:
    """Lets Ctrl-C and SIGTERM end the process at once, with one line: there is nothing to save or close."""
    global _own_process
    _own_process = True
    for number in _SIGNALS:
        # Where the caller of the program has one ignored, e.g. by nohup, it stays so.
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _end)


def raise_at_interrupt(line: str) -> None:
    """Lets them raise `KeyboardInterrupt`, for the work of the program.

    Args:
      line: what the user reads where Python would drop the exception, in a finalizer: the process ends there.
    """
    if _handle(_end, _raise):
        report = sys.unraisablehook

        def end_or_report(unraisable: "sys.UnraisableHookArgs") -> None:
            if issubclass(unraisable.exc_type, KeyboardInterrupt):
                _end_with(line)
            # What TensorStore tells an event loop of Orbax whose save has failed; that is told already.
            if "Event loop is closed" not in str(unraisable.exc_value):
                report(unraisable)

        sys.unraisablehook = end_or_report


def exit_at_interrupt(code: int) -> None:
    """Lets them end the process at once with the exit code that it would end with: its work is over."""
    _handle(_raise, lambda *_: os._exit(code))


def end_at_once(code: int) -> None:
    """Ends the process of a program that has failed and said so; without effect in another process.

    Threads of a save that failed or was interrupted could hold it for minutes, and report what they left.
    """
    if _own_process:
        exit_now(code)


def exit_now(code: int) -> NoReturn:
    """Ends the process with what it has printed, and without what Python and libraries do at their end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _handle(before: Callable, now: Callable) -> bool:
    """Replaces a handler of this module by another, and says whether it was there."""
    found = [number for number in _SIGNALS if signal.getsignal(number) is before]
    for number in found:
        signal.signal(number, now)
    return bool(found)


def _raise(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # An exception could be caught or reported by whatever is being imported.
    _end_with("interrupted: nothing had begun")


def _end_with(line: str) -> NoReturn:
    os.write(2, f"{line}\n".encode())
    os._exit(EXIT_INTERRUPTED)
