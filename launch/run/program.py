"""What every program of `launch` does around its work: help, quiet libraries, errors and exit codes."""

import errno
import io
import logging
import sys
import warnings
from collections.abc import Callable

from absl import logging as absl_logging

from hfedmoe_jax.errors import InputError
from launch.run.starting import EXIT_INTERRUPTED, end_at_once, exit_at_interrupt, raise_at_interrupt

EXIT_ERROR = 1
EXIT_INPUT_ERROR = 2
EXIT_NOTHING_TRAINED = 4
REMEDIES = {
    errno.ENOSPC: "make room on the file system",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "put back what was removed",
    errno.EACCES: "give yourself the right to it",
    errno.EROFS: "mount it for writing",
}
"""What to do about an error of the operating system."""


class NothingTrainedError(RuntimeError):
    """A run that has written its results, but whose every round left the model as it was."""


def run_program(arguments: list[str], usage: str, work: Callable[[], None], when_interrupted: str) -> int:
    """Runs a program and returns its exit code; a mistake in the input is one line on stderr.

    Args:
      arguments: the command line without the program's name; `--help` prints the usage and does no work.
      usage: the text of `--help`.
      work: what the program does.
      when_interrupted: what the user reads after Ctrl-C or SIGTERM, before the notes of the exception.

    Raises:
      ValueError, RuntimeError: an error of the program and not of its input, so that its traceback is shown.
    """
    if {"--help", "-help", "-h"} & set(arguments):
        print(usage.strip())
        return 0
    quiet_libraries()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a label is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        raise_at_interrupt(when_interrupted)
        work()
        exit_at_interrupt(0)
    except (KeyboardInterrupt, MemoryError, OSError, RuntimeError, ValueError) as error:
        code = exit_code(error)
        exit_at_interrupt(code)
        if not is_one_line(error):
            raise
        line = f"error: {line_of(error)}"
        if code == EXIT_INTERRUPTED:
            line = "; ".join([when_interrupted, *getattr(error, "__notes__", [])])
        print(line, file=sys.stderr)
        if code in (EXIT_ERROR, EXIT_INTERRUPTED):
            end_at_once(code)
        return code
    return 0


def line_of(error: BaseException) -> str:
    """Returns an error as one line: of the operating system's the path and what to do, and all notes.

    >>> line_of(OSError(errno.ENOSPC, "No space left on device", "a/metrics.csv"))
    'a/metrics.csv: No space left on device; make room on the file system and give the same command again'
    """
    text = str(error)
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno or 0, "mend it")
        place = f"{error.filename}: " if error.filename else ""
        text = f"{place}{error.strerror or error}; {remedy} and give the same command again"
    if is_memory_error(error):
        reason = text.partition("\n")[0] or "out of memory"
        text = f"the memory of this machine is not enough ({reason}); use smaller batches or a smaller model"
    return " ".join("; ".join([text, *getattr(error, "__notes__", [])]).split())


def exit_code(error: BaseException | None) -> int:
    """Returns the exit code of a process that ends with this error.

    >>> exit_code(KeyboardInterrupt()), exit_code(InputError("seed", "x", "is not a whole number", "give 0"))
    (130, 2)
    """
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, NothingTrainedError):
        return EXIT_NOTHING_TRAINED
    return EXIT_INPUT_ERROR if is_input_error(error) else EXIT_ERROR


def is_memory_error(error: BaseException) -> bool:
    """Says whether Python, NumPy or XLA found no memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def is_one_line(error: BaseException) -> bool:
    """Says whether an error is told in one line; of others, faults of a program, the traceback is shown."""
    told = isinstance(error, KeyboardInterrupt | NothingTrainedError | OSError)
    return told or is_memory_error(error) or is_input_error(error)


def is_input_error(error: BaseException | None) -> bool:
    """Says whether an error is the `InputError` of either package."""
    if not isinstance(error, ValueError):
        return False
    # Imported here: importing slide_jax takes a second, which an HFedMoE run need not wait for.
    from slide_jax.errors import InputError as SlideInputError

    return isinstance(error, InputError | SlideInputError)


def quiet_libraries() -> None:
    """Keeps the logs of third-party libraries, errors excepted, off the user's screen."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax raises what it logs as an error
    for name in ("jax", "orbax", "tensorboardX", "datasets", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # A compiled program that cannot be read or kept is compiled again.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
