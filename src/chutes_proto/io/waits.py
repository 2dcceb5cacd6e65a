"""How a server waits, without a scope of cancellation for each deadline; ``loops.py`` has the kinds of each loop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from socket import socket
from typing import Final, Protocol, TypeVarTuple

import anyio

Ts = TypeVarTuple("Ts")


class Timer(Protocol):
    """A call at a time to come."""

    def when(self) -> float:
        """Return that time."""
        ...

    def cancel(self) -> None:
        """Call nothing; does nothing after the call."""
        ...


class CallAt(Protocol):
    """Has a function called at a time on the loop's clock."""

    def __call__(self, when: float, call: Callable[[], object], /) -> Timer:
        """Call ``call``, which raises nothing, in the loop at the time ``when``."""
        ...


class Wait(Protocol):
    """Waits of one task, one at a time."""

    async def until(self, deadline: float) -> None:
        """Wait until `end` is called, or until this time on the loop's clock."""
        ...

    def end(self) -> None:
        """End the wait; does nothing while there is none."""
        ...


class Read(Protocol):
    """Has a function called that reads from a descriptor."""

    async def __call__(self, descriptor: int, go_on: Callable[[], bool], deadline: float, /) -> None:
        """Call ``go_on``, which raises nothing, each time there is something to read, while it returns True.

        Return then, or at this time on the loop's clock. Nobody else may wait for ``descriptor`` meanwhile.
        """
        ...


class Group(Protocol):
    """Tasks that run beside each other, within a block that ends after them."""

    def start_soon(self, work: Callable[[*Ts], Coroutine[object, object, object]], /, *arguments: *Ts) -> object:
        """Start a task."""
        ...


class HasDeadline(Protocol):
    """A connection: the time on the loop's clock until which its peer is waited for, which may move."""

    deadline: float


class Peer(ABC):
    """The peer of a ``connection`` at the other end of a socket that does not block; one wait at a time.

    A wait ends at the connection's deadline. Call `look` when that has moved to an earlier time meanwhile, and `close`
    before the socket is closed. Raises `OSError` if the peer went away.

    One timer serves for all waits: if it goes off before the deadline, because that has moved to a later time, it is
    set again.
    """

    def __init__(self, accepted: socket, connection: HasDeadline, call_at: CallAt, now: Callable[[], float]) -> None:
        self._socket: Final = accepted
        self._connection: Final = connection
        self._call_at: Final = call_at
        self._now: Final = now
        self._timer: Timer | None = None
        self._sending: anyio.CancelScope | None = None

    @abstractmethod
    async def receive(self) -> bytes | None:
        """Return the next bytes, ``b""`` at the end; None once the deadline has passed."""

    async def send(self, data: bytes) -> bool:
        """Send all of ``data``; return False if the deadline passed before."""
        left = self._unsent(memoryview(data))
        if not left:
            return True
        with anyio.CancelScope(deadline=self._connection.deadline) as self._sending:
            while left:
                await anyio.wait_writable(self._socket)
                left = self._unsent(left)
        return not left

    def look(self) -> None:
        """Look at the deadline again."""
        if self._sending is not None:
            self._sending.deadline = self._connection.deadline
        self._set_timer()

    def close(self) -> None:
        """Let go of the socket."""
        if self._timer is not None:
            self._timer.cancel()

    @abstractmethod
    def _receive_nothing(self) -> None:
        """End the wait in `receive` if there is one; it then returns None."""

    def _unsent(self, data: memoryview) -> memoryview:
        """Send without waiting; return the bytes for which the socket has no space now."""
        try:
            return data[self._socket.send(data) :]
        except BlockingIOError:
            return data

    def _set_timer(self) -> None:
        deadline = self._connection.deadline
        if self._timer is not None and self._timer.when() > deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and deadline < math.inf:
            self._timer = self._call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._connection.deadline <= self._now():
            self._receive_nothing()
        else:
            self._set_timer()
