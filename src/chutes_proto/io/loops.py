"""The parts of a running event loop, asyncio's or trio's, that a server uses where anyio's own cost too much of a boot.

The loops are named here, in ``trio_loop.py``, and nowhere else. For each wait with a deadline anyio makes a scope of
cancellation, and on asyncio it registers the socket, too (docs/adr/0035-no-engine-of-our-own.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import copy_context
from functools import partial
from socket import socket
from typing import TYPE_CHECKING, cast

import anyio
import anyio.lowlevel

from chutes_proto.io.waits import CallAt, Group, HasDeadline, Peer, Read, Wait
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


def call_at() -> CallAt:
    """Return the function of the running loop that has another one called at a time."""
    loop = _running()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return loop.call_at
    from chutes_proto.io.trio_loop import timers

    return timers().call_at


def call_next() -> Callable[[Callable[[], object]], object]:
    """Return the function of the running loop that has another one called, in the loop's next round."""
    loop = _running()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return lambda call: loop.call_at(loop.time(), call)  # `call_soon` comes before what is ready then
    from chutes_proto.io.trio_loop import NextRound

    return NextRound()


class AsyncioWait:
    """A `Wait` on asyncio."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] | None = None

    async def until(self, deadline: float) -> None:
        """See `Wait.until`."""
        self._ended = self._loop.create_future()
        timer = self._loop.call_at(deadline, self.end)
        try:
            await self._ended
        finally:
            timer.cancel()

    def end(self) -> None:
        """See `Wait.end`."""
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


async def _read_on_asyncio(descriptor: int, go_on: Callable[[], bool], deadline: float) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def end() -> None:
        if not ended.done():
            _ = loop.remove_reader(descriptor)  # before another one waits for it
            ended.set_result(None)

    def answered() -> None:
        if not ended.done() and not go_on():  # of a caller that leaves, a thread may have it by now
            end()

    loop.add_reader(descriptor, answered)
    timer = loop.call_at(deadline, end)
    try:
        await ended
    finally:
        timer.cancel()
        if ended.cancelled():
            _ = loop.remove_reader(descriptor)


def reading() -> Read:
    """Return the function of the running loop that has another one called whenever there is something to read."""
    if isinstance(_running(), asyncio.AbstractEventLoop):
        return _read_on_asyncio
    from chutes_proto.io.trio_loop import read

    return read


def wait() -> Callable[[], Wait]:
    """Return the kind of waits on the running loop."""
    if isinstance(_running(), asyncio.AbstractEventLoop):
        return AsyncioWait
    from chutes_proto.io.trio_loop import TrioWait

    return TrioWait


def open_group() -> AbstractAsyncContextManager[Group]:
    """Return a group of tasks. On trio it is trio's: anyio's makes a scope and an event for each task."""
    if isinstance(_running(), asyncio.AbstractEventLoop):
        return anyio.create_task_group()
    from chutes_proto.io.trio_loop import open_nursery

    return open_nursery()


class AsyncioPeer(Peer):
    """A `Peer` on asyncio, whose socket stays registered from one wait to the next."""

    def __init__(self, accepted: socket, connection: HasDeadline) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(accepted, connection, self._loop.call_at, self._loop.time)
        self._received: asyncio.Future[bytes | None] | None = None  # of the wait in `receive`
        self._is_registered = False

    async def receive(self) -> bytes | None:
        """See `Peer.receive`."""
        self._received = self._loop.create_future()
        if not self._is_registered:
            self._loop.add_reader(self._socket.fileno(), self._read)
            self._is_registered = True
        self._set_timer()
        try:
            return await self._received
        finally:
            self._received = None

    def close(self) -> None:
        """See `Peer.close`."""
        super().close()
        self._unregister()

    def _receive_nothing(self) -> None:
        if self._received is not None and not self._received.done():
            self._received.set_result(None)

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
            _ = self._loop.remove_reader(self._socket.fileno())
            self._is_registered = False


def peer() -> Callable[[socket, HasDeadline], Peer]:
    """Return the kind of peers on the running loop."""
    if isinstance(_running(), asyncio.AbstractEventLoop):
        return AsyncioPeer
    from chutes_proto.io.trio_loop import TrioPeer

    return TrioPeer


def _running() -> asyncio.AbstractEventLoop | trio.lowlevel.TrioToken:
    return cast("asyncio.AbstractEventLoop | trio.lowlevel.TrioToken", anyio.lowlevel.current_token().native_token)
