"""What a server receives of a connection's peer, on both loops."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import anyio
import anyio.lowlevel
import pytest

from chutes_proto.io.loops import AsyncioReceiver, receiver
from chutes_proto.transport.h1 import READ_SIZE

pytestmark = pytest.mark.anyio

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a socket: ours, which receives, and the other one."""
    ours, other = socket.socketpair()
    with ours, other:
        ours.setblocking(False)
        yield ours, other


async def test_bytes_that_come_while_nobody_waits_are_kept_and_the_loop_has_its_rest(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = ends
    calls = 0
    read = AsyncioReceiver._read

    def counted(self: AsyncioReceiver) -> None:
        nonlocal calls
        calls += 1
        read(self)

    monkeypatch.setattr(AsyncioReceiver, "_read", counted)
    with closing(receiver(ours)) as receiving:
        other.send(b"first")
        assert await receiving.receive() == b"first"
        other.send(b"second")
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        assert calls <= 2  # one that read, one that found nobody waiting
        assert await receiving.receive() == b"second"
        other.send(bytes(READ_SIZE + 1))
        assert [len(await receiving.receive()) for _ in range(2)] == [READ_SIZE, 1]
        other.close()
        assert await receiving.receive() == b""
        assert await receiving.receive() == b""


async def test_a_wait_that_is_cancelled_takes_nothing_with_it(ends: Ends) -> None:
    ours, other = ends
    with closing(receiver(ours)) as receiving:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await receiving.receive()
        other.send(b"a")
        assert await receiving.receive() == b"a"


async def test_a_socket_that_was_let_go_of_is_anothers(ends: Ends) -> None:
    ours, other = ends
    receiving = receiver(ours)
    other.send(b"a")
    assert await receiving.receive() == b"a"
    receiving.close()
    other.send(b"b")
    await anyio.wait_readable(ours)
    assert ours.recv(1) == b"b"


async def test_a_peer_that_went_away_is_an_error_of_the_system(ends: Ends) -> None:
    ours, other = ends
    with closing(receiver(ours)) as receiving:
        ours.send(b"unread")
        other.close()  # with bytes of ours that it has not read: a reset
        with pytest.raises(ConnectionResetError):
            await receiving.receive()
