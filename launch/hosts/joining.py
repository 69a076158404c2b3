"""How the processes of a run find each other: by TCP, with errors of one line.

Process 0 listens at the address it was given, every other process connects to it and says which one it is;
when all are there, process 0 tells them so. JAX's coordination service then takes the same address. JAX alone
would abort a process that does not find the others, with a C++ stack trace.

Whoever reaches the address can join: neither this protocol nor JAX's service checks who asks, so it should be
reachable by the hosts of the run only. What does not speak the protocol is dropped, and joining goes on.

Messages are JSON objects of a fixed size.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

from hfedmoe_jax.errors import InputError

JOIN_TIMEOUT_S = 300.0
"""How long the processes of a run wait for each other at its start."""

RESOLVE_TIMEOUT_S = 30.0
"""How long a name of process 0's host may be unknown: a scheduler may start a process before its name."""

HELLO_TIMEOUT_S = 10.0
"""How long a connection may take to say which process it is."""

MOST_GUESTS = 64
"""Connections that have not said who they are; the oldest is dropped for a further one."""

Address = tuple[str, int]
Links = Mapping[socket.socket, int]
"""Connections with the index of the process at the other end: all others on process 0, only 0 elsewhere."""

_MESSAGE_BYTES = 512
_SAME = "number the processes from 0 to N - 1, with the same --processes=N on every host"


def listen(host: str | None, port: int) -> socket.socket:
    """Returns a socket that listens at one address of this host.

    Args:
      host: name or address, of which the first that this host has is taken; None: every address.
      port: 0 takes any free port.

    Raises:
      InputError: the name does not resolve, the host has none of its addresses, or the port is in use.
    """
    if host is None and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    place = f"{host}:{port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        remedy = "give a name or an address of process 0's host"
        raise InputError("--coordinator", place, f"does not resolve ({_reason(error)})", remedy) from None
    reason = ""
    for family, _, _, _, address in found:
        try:
            return socket.create_server(address[:2], family=family, backlog=MOST_GUESTS)
        except OSError as error:
            reason = _reason(error)
    problem = f"process 0 cannot listen there ({reason})"
    remedy = "give an address of process 0's host and a free port, and --process=0 on that host alone"
    raise InputError("--coordinator", place, problem, remedy)


def accept_processes(server: socket.socket, count: int, run: str = "") -> Links:
    """Accepts processes 1 to `count` - 1, tells each of them that all are there and returns the connections.

    A process that dies while it waits may be started again. One that is refused is told why, as is the user
    of this process by a warning.

    Args:
      server: see `listen`.
      count: of all processes.
      run: a text that strangers do not know, if there is one.

    Raises:
      InputError: not all of them connected within `JOIN_TIMEOUT_S`.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        lobby = _Lobby(server, selector, count, run)
        while len(lobby.links) < count - 1:
            left = deadline - time.monotonic()
            if left < 0:
                lobby.close()
                missing = sorted(set(range(1, count)) - set(lobby.links.values()))
                problem = f"processes {missing} did not connect within {JOIN_TIMEOUT_S:g} s"
                raise InputError("--processes", count, problem, "start the same command on every host")
            lobby.drop_silent()
            for key, _ in selector.select(min(left, 1.0)):
                if key.fileobj is server:
                    lobby.admit()
                else:
                    link: Any = key.fileobj
                    lobby.hear(link)
    for guest in lobby.guests:
        guest.close()
    for link in lobby.links:
        use_keepalive(link)
        send(link, {"joined": count})
    return lobby.links


class _Lobby:
    """Process 0's connections while it waits for the others.

    Attributes:
      guests: connections that have not said who they are, the oldest first: until when they may, and what
        they have said so far.
      links: those of processes of the run.
    """

    def __init__(self, server: socket.socket, selector: selectors.BaseSelector, count: int, run: str):
        self._server, self._selector, self._count, self._run = server, selector, count, run
        self.guests: dict[socket.socket, tuple[float, bytes]] = {}
        self.links: dict[socket.socket, int] = {}
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)

    def admit(self) -> None:
        """Takes a new connection."""
        with contextlib.suppress(OSError):  # it is gone already
            link = self._server.accept()[0]
            link.setblocking(False)
            self._selector.register(link, selectors.EVENT_READ)
            self.guests[link] = time.monotonic() + HELLO_TIMEOUT_S, b""
        if len(self.guests) > MOST_GUESTS:
            self._drop(next(iter(self.guests)))

    def hear(self, link: socket.socket) -> None:
        """Reads what a connection says: it becomes a process of the run, is told why not, or is dropped."""
        if link in self.links:  # a process that is gone, or speaks out of turn
            self._drop(link)
        if link not in self.guests:
            return
        until, said = self.guests[link]
        try:
            part = link.recv(_MESSAGE_BYTES - len(said))
        except OSError:
            part = b""
        said += part
        if part and len(said) < _MESSAGE_BYTES:
            self.guests[link] = until, said
            return
        found = index_of(_parse(said), self._run) if part else None
        refusal = found and refusal_of(*found, self._count, self.links.values())
        if found and refusal:
            _refuse(link, *found, *refusal)
        if not found or refusal:
            self._drop(link)
        else:
            del self.guests[link]
            self.links[link] = found[0]

    def drop_silent(self) -> None:
        """Drops the connections that have not said in time who they are."""
        now = time.monotonic()
        for link in [link for link, (until, _) in self.guests.items() if now > until]:
            self._drop(link)

    def close(self) -> None:
        """Closes all connections."""
        for link in [*self.guests, *self.links]:
            link.close()

    def _drop(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        self.guests.pop(link, None)
        self.links.pop(link, None)
        link.close()


def connect(address: Address, index: int, count: int, run: str = "") -> Links:
    """Connects to process 0, waits until all processes are there and returns the connection.

    Args:
      address: of process 0.
      index: of this process.
      count: of all processes.
      run: see `accept_processes`.

    Raises:
      InputError: the name does not resolve within `RESOLVE_TIMEOUT_S`, process 0 did not answer within
        `JOIN_TIMEOUT_S`, or it refused this process.
    """
    begun = time.monotonic()
    where = f"{address[0]}:{address[1]}"
    problem = "process 0 closed the connection"
    while time.monotonic() < begun + JOIN_TIMEOUT_S:
        try:
            link = socket.create_connection(address, timeout=HELLO_TIMEOUT_S)
        except OSError as error:  # it has not started yet
            problem = f"process 0 did not answer within {JOIN_TIMEOUT_S:g} s ({_reason(error)})"
            if isinstance(error, socket.gaierror) and time.monotonic() > begun + RESOLVE_TIMEOUT_S:
                problem = f"does not resolve ({_reason(error)})"
                break
            time.sleep(0.2)
            continue
        except UnicodeError as error:
            problem = f"does not resolve ({error})"
            break
        # Process 0 waits for the others; it may have begun later than this process.
        link.settimeout(max(begun + JOIN_TIMEOUT_S + HELLO_TIMEOUT_S - time.monotonic(), 1.0))
        send(link, {"process": index, "processes": count, "run": run})
        answer = receive(link) or {}
        if answer.get("joined") == count:
            use_keepalive(link)
            return {link: 0}
        link.close()
        if answer.get("flag") in ("--process", "--processes") and isinstance(answer.get("problem"), str):
            value = {"--process": index, "--processes": count}[answer["flag"]]
            raise InputError(answer["flag"], value, answer["problem"], _SAME)
        time.sleep(0.2)  # another server, or a process 0 that ends
    remedy = "start the same command on every host, with process 0's host and port"
    raise InputError("--coordinator", where, problem, remedy)


def index_of(hello: dict[str, Any] | None, run: str) -> tuple[int, int] | None:
    """Returns the index of the process that sent a message and the number it was started with.

    None for a stranger: anything but two whole numbers and the text of the run.

    >>> index_of({"process": 1, "processes": 2, "run": ""}, "")
    (1, 2)
    """
    if hello is None or hello.get("run") != run:
        return None
    index, count = hello.get("process"), hello.get("processes")
    return (index, count) if type(index) is int and type(count) is int else None


def refusal_of(index: int, theirs: int, count: int, present: Collection[int]) -> tuple[str, str] | None:
    """Returns the flag and the problem of a process that cannot join, or None.

    Args:
      index: of the process.
      theirs: the number of processes it was started with.
      count: the number process 0 was started with.
      present: the indices that have joined.
    """
    if theirs != count:
        return "--processes", f"process 0 was started with {count}"
    if not 0 <= index < count:
        return "--process", f"is none of {count} processes"
    if index in (0, *present):
        return "--process", "another process has this number"
    return None


def _refuse(link: socket.socket, index: int, theirs: int, flag: str, problem: str) -> None:
    host = link.getpeername()[0]
    value = theirs if flag == "--processes" else index
    print(f"warning: a process on {host} cannot join: {flag}={value}: {problem}", file=sys.stderr)
    link.settimeout(1)
    send(link, {"flag": flag, "problem": problem})


def send(link: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message; without effect if the connection is closed."""
    with contextlib.suppress(OSError):
        link.sendall(json.dumps(message).encode().ljust(_MESSAGE_BYTES))


def receive(link: socket.socket) -> dict[str, Any] | None:
    """Returns the next message, or None if the connection is closed or it is not a JSON object."""
    try:
        return _parse(link.recv(_MESSAGE_BYTES, socket.MSG_WAITALL))
    except OSError:
        return None


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def use_keepalive(link: socket.socket) -> None:
    """Removes the timeout and lets TCP keepalive close the connection 15 s after the other host is gone."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
