"""TCP connections between the processes of a run: they meet at its start and detect each other's death.

Process 0 listens; every other process connects to it. Messages are small JSON objects of a fixed size.
"""

import atexit
import contextlib
import json
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax

from hfedmoe_jax.errors import InputError
from launch.run.program import exit_code

EXIT_PROCESS_LOST = 3
"""Exit code of a process that stops because another one died or failed."""

JOIN_TIMEOUT_S = 300.0
"""How long the processes of a run wait for each other at its start."""

Address = tuple[str, int]
Links = Mapping[socket.socket, int]
"""Connections with the index of the process at the other end: all others on process 0, only 0 elsewhere."""

_MESSAGE_BYTES = 512


def listen(port: int) -> socket.socket:
    """Returns a listening socket for IPv4 and, where there is one, IPv6; port 0 takes any free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def accept_processes(server: socket.socket, count: int, answer: dict[str, Any]) -> Links:
    """Accepts processes 1 to `count` - 1, sends each of them the answer and returns the connections.

    Raises:
      InputError: not all of them connected within `JOIN_TIMEOUT_S`.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    links: dict[socket.socket, int] = {}
    while len(links) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            link, _ = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count)) - set(links.values()))
            problem = f"processes {missing} did not connect within {JOIN_TIMEOUT_S:g} s"
            raise InputError("--processes", count, problem, "start the same command on every host") from None
        link.settimeout(10)  # a client of another program must not block the others
        hello = receive(link)
        if hello is None or not {"process", "processes"} <= set(hello):
            link.close()
        elif hello["processes"] != count:
            send(link, {"flag": "--processes", "problem": f"process 0 was started with {count}"})
        elif hello["process"] in (0, *links.values()):
            send(link, {"flag": "--process", "problem": "another process has this number"})
        else:
            _use_keepalive(link)
            links[link] = hello["process"]
    for link in links:
        send(link, answer)
    return links


def connect(address: Address, index: int, count: int) -> tuple[Links, dict[str, Any]]:
    """Connects to process 0 and returns the connection with its answer, sent once all processes are there.

    Raises:
      InputError: process 0 did not answer within `JOIN_TIMEOUT_S`, or rejected this process.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    where = f"{address[0]}:{address[1]}"
    answer = None
    problem = "process 0 closed the connection"
    while answer is None and time.monotonic() < deadline:
        try:
            link = socket.create_connection(address, timeout=10)
        except OSError as error:  # it has not started yet
            problem = f"process 0 did not answer within {JOIN_TIMEOUT_S:g} s ({error.strerror or error})"
            time.sleep(0.2)
            continue
        link.settimeout(JOIN_TIMEOUT_S + 10)  # process 0 waits for the others
        send(link, {"process": index, "processes": count})
        answer = receive(link)
        if answer is None:  # another server, or one that ends
            link.close()
            time.sleep(0.2)
    if answer is None:
        remedy = "start the same command on every host, with process 0's host and port"
        raise InputError("--coordinator", where, problem, remedy)
    if "problem" in answer:
        value = {"--process": index, "--processes": count}[answer["flag"]]
        remedy = "number the processes from 0 to N - 1, with the same --processes=N on every host"
        raise InputError(answer["flag"], value, answer["problem"], remedy)
    _use_keepalive(link)
    return {link: 0}, answer


class Processes:
    """A context in which all processes of a run compute: it ends when all have left it or one has died.

    The kernel closes the connections of a killed process, and TCP keepalive those of a host that is gone,
    so a death is noticed even while Python or XLA is busy.

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
            atexit.register(_exit_now, exit_code(error))
        elif self._index == 0:
            self._listener.join()
            self._send_all({"done": 0})
        else:
            self._send_all({"done": self._index})
            self._listener.join()

    def hold_connections(self) -> None:
        """Keeps JAX's present connections open for five seconds after this process has died.

        JAX aborts a process, with a C++ stack trace, when its connection to process 0 closes. A small
        child process inherits process 0's connections, so that the others have time to exit cleanly.
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
                    message = receive(link) or {"lost": self._links[link]}
                    if "done" not in message and not self._failed:
                        self._stop(message)
                    selector.unregister(link)

    def _stop(self, message: dict[str, int]) -> None:
        if self._index == 0:
            self._send_all(message)
        ((event, process),) = message.items()
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
        _exit_now(EXIT_PROCESS_LOST)  # the main thread may be blocked in a collective


def send(link: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message; without effect if the connection is closed."""
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode().ljust(_MESSAGE_BYTES))


def receive(link: socket.socket) -> dict[str, Any] | None:
    """Returns the next message, or None if the connection is closed or the message is not one of ours."""
    try:
        return json.loads(link.recv(_MESSAGE_BYTES, socket.MSG_WAITALL))
    except (OSError, ValueError):
        return None


def _use_keepalive(link: socket.socket) -> None:
    """Removes the timeout and lets TCP keepalive close the connection 15 s after the other host is gone."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _exit_now(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
