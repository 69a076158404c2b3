"""Processes find each other, refuse strangers and exchange whole messages."""

import socket
import threading

import pytest

from hfedmoe_jax.errors import InputError
from launch.hosts import processes
from launch.hosts.processes import accept_processes, connect, listen, receive, send


def test_impostors_are_refused_and_strangers_ignored():
    with listen(0) as server:
        address = ("localhost", server.getsockname()[1])
        links = {}
        first = threading.Thread(target=lambda: links.update(accept_processes(server, 3, {"answer": 1})))
        first.start()
        with socket.create_connection(address) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n".ljust(1000))
        with pytest.raises(InputError, match="--processes=4: process 0 was started with 3"):
            connect(address, 1, 4)
        with pytest.raises(InputError, match="--process=0: another process has this number"):
            connect(address, 0, 3)
        others = [threading.Thread(target=connect, args=(address, index, 3)) for index in (2, 1)]
        for thread in others:
            thread.start()
        for thread in (first, *others):
            thread.join(20)
    assert sorted(links.values()) == [1, 2]


def test_who_did_not_come_is_named(monkeypatch):
    monkeypatch.setattr(processes, "JOIN_TIMEOUT_S", 0.3)
    with listen(0) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=r"processes \[1, 2\] did not connect"):
            accept_processes(server, 3, {})
    with pytest.raises(InputError, match=r"--coordinator='localhost:.*process 0 did not answer"):
        connect(("localhost", port), 1, 2)


def test_messages_arrive_whole_and_an_end_is_none():
    here, there = socket.socketpair()
    with there:
        with here:
            send(here, {"lost": 3})
            send(here, {"done": 0})
        assert [receive(there) for _ in range(3)] == [{"lost": 3}, {"done": 0}, None]
    send(here, {"done": 0})  # the other end is gone
