"""The parts of a running event loop, asyncio's or trio's, that a server uses where anyio's own cost too much of a boot.

The loops are named here and nowhere else. On asyncio, anyio registers a socket for each wait and makes a timer for each
deadline, which costs a tenth of a boot (docs/adr/0035-no-engine-of-our-own.md).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from socket import socket
from typing import TYPE_CHECKING, Final, Protocol, cast

import anyio
import anyio.lowlevel

from chutes_proto.transport.h1 import READ_SIZE

if TYPE_CHECKING:
    import trio.lowlevel


def clock() -> Callable[[], float]:
    """Return the running loop's clock, which `anyio.current_time` would look for at each of many calls."""
    loop = _running()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.time
    import trio.lowlevel

    return trio.lowlevel.current_clock().current_time


def call_soon() -> Callable[[Callable[[], None]], object]:
    """Return the function of the running loop that has another thread's function called in it.

    It raises `RuntimeError` once the loop has ended.
    """
    loop = _running()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return partial(loop.call_soon_threadsafe, context=copy_context())  # anyio finds its loop by that
    return loop.run_sync_soon


class HasDeadline(Protocol):
    """A connection: the time on the loop's clock until which its peer is waited for, which may move."""

    deadline: float


class Peer:
    """The peer of a ``connection`` at the other end of a socket that does not block; one wait at a time.

    A wait ends at the connection's deadline. Call `look` when that has moved to an earlier time meanwhile, and `close`
    before the socket is closed. Raises `OSError` if the peer went away.
    """

    def __init__(self, accepted: socket, connection: HasDeadline) -> None:
        self._socket: Final = accepted
        self._connection: Final = connection
        self._waiting: anyio.CancelScope | None = None

    async def receive(self) -> bytes | None:
        """Return the next bytes, ``b""`` at the end; None once the deadline has passed."""
        with anyio.CancelScope(deadline=self._connection.deadline) as self._waiting:
            while True:
                await anyio.wait_readable(self._socket)
                with suppress(BlockingIOError):
                    return self._socket.recv(READ_SIZE)
        return None

    async def send(self, data: bytes) -> bool:
        """Send all of ``data``; return False if the deadline passed before."""
        left = self._unsent(memoryview(data))
        if not left:
            return True
        with anyio.CancelScope(deadline=self._connection.deadline) as self._waiting:
            while left:
                await anyio.wait_writable(self._socket)
                left = self._unsent(left)
        return not left

    def look(self) -> None:
        """Look at the deadline again."""
        if self._waiting is not None:
            self._waiting.deadline = self._connection.deadline

    def close(self) -> None:
        """Let go of the socket."""

    def _unsent(self, data: memoryview) -> memoryview:
        """Send without waiting; return the bytes for which the socket has no space now."""
        try:
            return data[self._socket.send(data) :]
        except BlockingIOError:
            return data


class AsyncioPeer(Peer):
    """The same on asyncio, whose socket stays registered from one wait to the next.

    A timer that goes off before the deadline, because that has moved to a later time, is set again.
    """

    def __init__(self, accepted: socket, connection: HasDeadline) -> None:
        super().__init__(accepted, connection)
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Future[bytes | None] | None = None  # of the wait in `receive`
        self._timer: asyncio.TimerHandle | None = None
        self._is_registered = False

    async def receive(self) -> bytes | None:
        """See `Peer.receive`."""
        self._received = self._loop.create_future()
        if not self._is_registered:
            self._loop.add_reader(self._socket, self._read)
            self._is_registered = True
        self._set_timer()
        try:
            return await self._received
        finally:
            self._received = None

    def look(self) -> None:
        """See `Peer.look`."""
        super().look()
        self._set_timer()

    def close(self) -> None:
        """See `Peer.close`."""
        self._unregister()
        if self._timer is not None:
            self._timer.cancel()

    def _read(self) -> None:
        """Read, within the loop's call: if it were left to the task, the loop would call again before."""
        if self._received is None or self._received.done():
            self._unregister()  # nobody waits, and the loop would call again and again
            return
        try:
            self._received.set_result(self._socket.recv(READ_SIZE))
        except BlockingIOError:
            pass
        except OSError as exc:
            self._received.set_exception(exc)

    def _unregister(self) -> None:
        if self._is_registered:
            _ = self._loop.remove_reader(self._socket)
            self._is_registered = False

    def _set_timer(self) -> None:
        deadline = self._connection.deadline
        if self._timer is not None and self._timer.when() > deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline < math.inf:
            self._timer = self._loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._received is None or self._received.done():
            return
        if self._connection.deadline <= self._loop.time():
            self._received.set_result(None)
        else:
            self._set_timer()


def peer() -> type[Peer]:
    """Return the kind of peers on the running loop."""
    return AsyncioPeer if isinstance(_running(), asyncio.AbstractEventLoop) else Peer


def _running() -> asyncio.AbstractEventLoop | trio.lowlevel.TrioToken:
    return cast("asyncio.AbstractEventLoop | trio.lowlevel.TrioToken", anyio.lowlevel.current_token().native_token)
