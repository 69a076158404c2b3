"""TCP connections between the processes of a run: they end together, with one line that says why.

JAX's own coordination service ends a run too: it aborts a process with C++'s stack trace and SIGABRT. See
`launch.hosts.joining` for how the connections are made.
"""

import atexit
import contextlib
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import threading
import time
from typing import Any, NoReturn

import jax

from launch.hosts.joining import Links, receive, send
from launch.run.program import exit_code
from launch.run.starting import exit_now

EXIT_PROCESS_LOST = 3
"""Exit code of a process that stops because another one died or failed."""

LEAVE_TIMEOUT_S = 60.0
"""How long process 0 waits at the end until the others have ended; they have nothing left to do."""

EVENTS = ("done", "failed", "lost")
"""What a message tells of the process whose index it has."""


class Processes:
    """A context in which all processes of a run compute: it ends when all have left it or one has died.

    What is left to a process after it must not compute with the others, and ends with `end_process`.

    The kernel closes the connections of a killed process, and TCP keepalive those of a host that is gone
    (within 15 s), so a death is noticed even while Python or XLA is busy.

    Args:
      links: see `Links`; empty for a run of one process.
      index: of this process.
      count: of all processes.
      checkpoints: the directory that a stopped run continues from; it is named in the message.
    """

    def __init__(self, links: Links, index: int, count: int, checkpoints: pathlib.Path):
        self._links, self._index, self._count = links, index, count
        self._checkpoints = checkpoints
        self._failed = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        if links:
            self._listener.start()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._links:
            return
        if kind is not None:
            # If another process died, a collective fails here, sometimes before the listener notices.
            if issubclass(kind, jax.errors.JaxRuntimeError):
                self._listener.join(timeout=5)
            self._failed = True
            self._send_all({"failed": self._index})
            # JAX's shutdown would wait for the others and then abort.
            atexit.register(exit_now, exit_code(error))
        elif self._index == 0:
            self._listener.join()
            self._send_all({"done": 0})
            deadline = time.monotonic() + LEAVE_TIMEOUT_S
            for link in self._links:  # JAX would abort who is still there when its service is gone
                link.settimeout(max(deadline - time.monotonic(), 0.01))
                receive(link)
        else:
            self._send_all({"done": self._index})
            self._listener.join()

    def hold_connections(self) -> None:
        """Keeps JAX's present connections open for five seconds after this process has died.

        Without it JAX aborts all others within 0.1 s of the death of process 0, with a C++ stack trace and
        SIGABRT, before they can say what happened (measured with jax 0.10.2 and 0.12.0; neither its
        heartbeats nor `jax_enable_recoverability` change that). A small child process inherits process
        0's connections, so that the others have time to exit with their line.
        """
        held = []
        for number in {int(name) for name in os.listdir("/dev/fd")} - {link.fileno() for link in self._links}:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.getpeername()  # fails for what is no connection
                if number > 2 and connection.family in (socket.AF_INET, socket.AF_INET6):
                    held.append(number)
        read, _ = os.pipe()  # the other end stays open for as long as this process lives
        subprocess.Popen(
            ["sh", "-c", "read _; sleep 5"],
            stdin=read,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=held,
            start_new_session=True,  # so that Ctrl-C does not reach it
        )
        os.close(read)

    def _send_all(self, message: dict[str, int]) -> None:
        for link in self._links:
            send(link, message)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self._links:
                selector.register(link, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    link: Any = key.fileobj  # as registered above
                    event, process = event_of(receive(link)) or ("lost", self._links[link])
                    if event != "done" and not self._failed:
                        self._stop(event, process)
                    selector.unregister(link)

    def _stop(self, event: str, process: int) -> None:
        if self._index == 0:
            self._send_all({event: process})
        problem = "stopped responding" if event == "lost" else "stopped with an error"
        steps = [int(path.name) for path in self._checkpoints.glob("*") if path.name.isdigit()]
        found = "starts again from the first round"
        if steps:
            found = f"continues from the last checkpoint (round {max(steps)}) in {self._checkpoints}"
        line = (
            f"error: host {process} of {self._count} {problem}; this one stops. "
            f"The same command on every host {found}"
        )
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.__stderr__)  # Orbax may be silenced at this moment
        if self._index == 0:  # exits last: see `hold_connections`
            for link in self._links:
                link.settimeout(2)
                receive(link)
        exit_now(EXIT_PROCESS_LOST)  # the main thread may be blocked in a collective


def event_of(message: dict[str, Any] | None) -> tuple[str, int] | None:
    """Returns what a message tells and of which process, or None if it is not one of ours."""
    ((event, process),) = message.items() if message and len(message) == 1 else ((None, None),)
    return (event, process) if event in EVENTS and type(process) is int else None


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code, and of several without JAX's shutdown.

    That would wait for the others, whose work is done, and abort with a stack trace if one has died
    meanwhile.
    """
    if jax.distributed.is_initialized():
        exit_now(code)
    sys.exit(code)
