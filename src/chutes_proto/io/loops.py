"""The two parts of an event loop that a server does not take from anyio, because a boot would cost a tenth more CPU.

asyncio and trio are named here and nowhere else (docs/adr/0035-no-engine-of-our-own.md has the figures):

* anyio's threads make an event, a scope and a copy of the context for each call; a boot hands over two transactions;
* on asyncio, anyio registers a socket for each wait, and takes a round of the loop more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from socket import socket
from threading import Thread
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import anyio
import anyio.lowlevel

from chutes_proto.transport.h1 import READ_SIZE

if TYPE_CHECKING:
    import trio.lowlevel

T = TypeVar("T")


def receiver(accepted: socket) -> Receiver:
    """Return the receiver of a socket that does not block, on the running loop."""
    return AsyncioReceiver(accepted) if isinstance(_running(), asyncio.AbstractEventLoop) else Receiver(accepted)


class Receiver:
    """Receives from a socket that does not block, one caller at a time. Call `close` before the socket is closed."""

    def __init__(self, accepted: socket) -> None:
        self._socket = accepted

    async def receive(self) -> bytes:
        """Return the next bytes, ``b""`` at the end. Raises `OSError` if the peer went away."""
        while True:
            await anyio.wait_readable(self._socket)
            with suppress(BlockingIOError):
                return self._socket.recv(READ_SIZE)

    def close(self) -> None:
        """Let go of the socket."""


class AsyncioReceiver(Receiver):
    """A receiver on asyncio, whose socket stays registered from one wait to the next."""

    def __init__(self, accepted: socket) -> None:
        super().__init__(accepted)
        self._loop = asyncio.get_running_loop()
        self._received: asyncio.Future[bytes] | None = None
        self._is_registered = False

    async def receive(self) -> bytes:
        """See `Receiver.receive`."""
        self._received = self._loop.create_future()
        if not self._is_registered:
            self._loop.add_reader(self._socket.fileno(), self._read)
            self._is_registered = True
        try:
            return await self._received
        finally:
            self._received = None

    def close(self) -> None:
        """See `Receiver.close`."""
        if self._is_registered:
            _ = self._loop.remove_reader(self._socket.fileno())
            self._is_registered = False

    def _read(self) -> None:
        """Read, within the loop's call: if it were left to the task, the loop would call again before."""
        if self._received is None or self._received.done():
            self.close()  # nobody waits, and the loop would call again and again
            return
        try:
            self._received.set_result(self._socket.recv(READ_SIZE))
        except BlockingIOError:
            pass
        except OSError as exc:
            self._received.set_exception(exc)


_Works: TypeAlias = "SimpleQueue[Callable[[], None] | None]"
"""The work of one thread; None ends it."""


class Threads:
    """Threads of the running event loop, each started when none is free and kept until `close`.

    Each has a queue of its own, and the one that was free last is handed the next work. Of several that wait at one
    queue, each work would wake two: the one that takes it, and one more that finds nothing.

    All methods are called in the loop's thread. There are never more threads than work was handed over at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._all: list[_Works] = []
        self._free: list[_Works] = []
        self._waiting = deque[Callable[[], None]]()
        self._call_soon = _call_soon()

    def run(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Do ``work``, which raises nothing, in a thread, and call ``done`` with what it returns in the loop.

        Where the system allows no further thread, it waits for one of the others. Raises `RuntimeError` if there is
        none; then nothing is done.
        """
        if not self._free and not self._start():
            self._waiting.append(lambda: self.run(work, done))
            return
        works = self._free.pop()

        def carry_out() -> None:
            result = work()
            with suppress(RuntimeError):  # the loop has ended, and nobody waits for it
                _ = self._call_soon(lambda: ended(result))

        def ended(result: T) -> None:
            self._free.append(works)
            if self._waiting:
                self._waiting.popleft()()
            done(result)

        works.put(carry_out)

    def close(self) -> None:
        """End the threads, each after its work."""
        for works in self._all:
            works.put(None)

    def _start(self) -> bool:
        """Start a thread; return whether the system allows it. Raises `RuntimeError` if there is none yet."""
        works: _Works = SimpleQueue()
        try:
            Thread(target=_serve, args=(works,), name=self._name, daemon=True).start()
        except RuntimeError:
            if not self._all:
                raise
            return False
        self._all.append(works)
        self._free.append(works)
        return True


def _serve(works: _Works) -> None:
    while work := works.get():
        work()
        del work  # which has secrets: the next one may never come


def _call_soon() -> Callable[[Callable[[], None]], object]:
    """Return the function of the running loop by which another thread has a function called in it.

    It raises `RuntimeError` once the loop has ended.
    """
    loop = _running()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return partial(loop.call_soon_threadsafe, context=copy_context())  # anyio finds its loop by that
    return loop.run_sync_soon


def _running() -> asyncio.AbstractEventLoop | trio.lowlevel.TrioToken:
    return cast("asyncio.AbstractEventLoop | trio.lowlevel.TrioToken", anyio.lowlevel.current_token().native_token)
