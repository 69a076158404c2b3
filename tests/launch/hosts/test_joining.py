"""Processes find each other whoever else speaks at their address, and exchange whole messages."""

import contextlib
import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_jax.errors import InputError
from launch.hosts import joining
from launch.hosts.joining import accept_processes, connect, index_of, listen, receive, refusal_of, send
from launch.hosts.processes import event_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


class Accepting:
    """Process 0 of `count`, which waits for the others in a thread."""

    def __init__(self, count, run=""):
        self.server = listen("localhost", 0)
        self.address = ("localhost", self.server.getsockname()[1])
        self.links, self.error = {}, None
        self._thread = threading.Thread(target=self._accept, args=(count, run))

    def _accept(self, count, run):
        try:
            self.links.update(accept_processes(self.server, count, run))
        except InputError as error:
            self.error = error

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._thread.join(20)
        self.server.close()
        assert not self._thread.is_alive()


def say(address, content):
    """Returns a connection that has sent some bytes."""
    link = socket.create_connection(address, timeout=20)
    link.sendall(content)
    return link


def hello(**fields):
    return json.dumps({"process": 1, "processes": 2, "run": ""} | fields).encode().ljust(512)


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n".ljust(1000),
    b"7".ljust(512),
    b"[1, 2]".ljust(512),
    b"null".ljust(512),
    b"NaN".ljust(512),
    b'"text"'.ljust(512),
    b"[" * 512,
    bytes(range(256)) * 2,
    hello(process=None),
    hello(process="1"),
    hello(process=1.0),
    hello(process=True),
    hello(process=[1]),
    hello(process=float("nan")),
    hello(processes=float("inf")),
    hello(run="another"),
]


def test_strangers_are_dropped_and_joining_goes_on():
    with Accepting(2) as first, contextlib.ExitStack() as open_links:
        silent = open_links.enter_context(say(first.address, b""))
        slow = open_links.enter_context(say(first.address, hello()[:100]))
        for content in STRANGERS:
            # Its connection is reset if it had sent more than was read.
            with say(first.address, content) as stranger, contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b"", content
        links = connect(first.address, 1, 2)
    assert list(links.values()) == [0]
    assert list(first.links.values()) == [1]
    del silent, slow


def test_connections_without_end_leave_room(monkeypatch):
    monkeypatch.setattr(joining, "MOST_GUESTS", 4)
    with Accepting(2) as first, contextlib.ExitStack() as open_links:
        for _ in range(20):
            open_links.enter_context(say(first.address, b"{"))
        connect(first.address, 1, 2)
    assert list(first.links.values()) == [1]


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (1, 4, "--processes=4: process 0 was started with 3"),
        (0, 3, "--process=0: another process has this number"),
        (5, 3, "--process=5: is none of 3 processes"),
        (-1, 3, "--process=-1: is none of 3 processes"),
        (2**70, 3, f"--process={2**70}: is none of 3 processes"),
    ],
)
def test_both_sides_are_told_of_a_wrong_number(capfd, index, count, message):
    with Accepting(3) as first:
        with pytest.raises(InputError, match=message):
            connect(first.address, index, count)
        others = [threading.Thread(target=connect, args=(first.address, each, 3)) for each in (2, 1)]
        for thread in others:
            thread.start()
    for thread in others:
        thread.join(20)
    assert sorted(first.links.values()) == [1, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: a process on ") and message in line


def test_a_process_that_dies_while_it_waits_may_start_again():
    with Accepting(3) as first:
        say(first.address, hello(process=2, processes=3)).close()
        others = [threading.Thread(target=connect, args=(first.address, each, 3)) for each in (1, 2)]
        for thread in others:
            thread.start()
    for thread in others:
        thread.join(20)
    assert sorted(first.links.values()) == [1, 2]


def test_who_did_not_come_is_named(monkeypatch):
    monkeypatch.setattr(joining, "JOIN_TIMEOUT_S", 0.3)
    with Accepting(3) as first:
        pass
    assert "--processes=3: processes [1, 2] did not connect within 0.3 s" in str(first.error)
    with pytest.raises(InputError, match=r"--coordinator='localhost:.*process 0 did not answer within 0.3 s"):
        connect(first.address, 1, 2)


def test_another_server_is_not_process_0(monkeypatch):
    monkeypatch.setattr(joining, "JOIN_TIMEOUT_S", 0.3)
    monkeypatch.setattr(joining, "HELLO_TIMEOUT_S", 0.3)
    with (
        listen("localhost", 0) as server,
        pytest.raises(InputError, match="process 0 closed the connection"),
    ):
        connect(("localhost", server.getsockname()[1]), 1, 2)


def test_a_name_that_does_not_resolve_is_told_by_both_sides(monkeypatch):
    monkeypatch.setattr(joining, "RESOLVE_TIMEOUT_S", 0.3)
    for host in ("no-such-host.invalid", "a" * 70):
        with pytest.raises(InputError, match=f"--coordinator='{host}:9876': does not resolve"):
            listen(host, 9876)
        with pytest.raises(InputError, match=f"--coordinator='{host}:9876': does not resolve"):
            connect((host, 9876), 1, 2)


def test_process_0_listens_where_it_was_asked_and_nowhere_else():
    with listen("127.0.0.1", 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"
    with pytest.raises(InputError, match="process 0 cannot listen there"):
        listen("192.0.2.1", 0)  # reserved for documentation: no host has it


def test_messages_arrive_whole_and_an_end_is_none():
    here, there = socket.socketpair()
    with there:
        with here:
            send(here, {"lost": 3})
            send(here, {"done": 0})
        assert [receive(there) for _ in range(3)] == [{"lost": 3}, {"done": 0}, None]
    send(here, {"done": 0})  # the other end is gone


@given(JSON)
def test_no_message_of_a_stranger_is_taken_for_a_process(message):
    assert index_of(message if isinstance(message, dict) else None, "secret") is None
    assert event_of(message if isinstance(message, dict) else None) is None


@given(st.integers(), st.integers(), st.integers(2, 5), st.sets(st.integers(1, 4)))
def test_only_a_free_number_of_the_run_can_join(index, theirs, count, present):
    free = theirs == count and index in set(range(1, count)) - present
    assert (refusal_of(index, theirs, count, present) is None) == free
