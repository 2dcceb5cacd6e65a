"""The parts of ``waits.py`` on trio, whose only timers are scopes of cancellation: one costs more than a wait."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from heapq import heapify, heappop, heappush
from itertools import count
from socket import socket
from typing import Final

import anyio
import trio
import trio.lowlevel

from chutes_proto.io.waits import HasDeadline, Peer
from chutes_proto.transport.h1 import READ_SIZE


def _call(call: Callable[[], object]) -> None:
    """Call ``call``, which should raise nothing. A defect of it ends neither other calls nor the run, as on asyncio."""
    try:
        _ = call()
    except Exception:
        logging.getLogger("chutes_proto").exception("a call of the event loop failed")


class TrioTimer:
    """See `waits.Timer`."""

    __slots__ = ("_timers", "_when", "call")

    def __init__(self, when: float, call: Callable[[], object], timers: Timers) -> None:
        self._when = when
        self._timers = timers
        self.call: Callable[[], object] | None = call
        """None once it is cancelled or called."""

    def when(self) -> float:
        """See `waits.Timer.when`."""
        return self._when

    def cancel(self) -> None:
        """See `waits.Timer.cancel`."""
        if self.call is not None:
            self.call = None
            if self._when < math.inf:
                self._timers.note_cancelled()


MAX_CANCELLED: Final = 1000
"""So many cancelled timers are kept, however few others there are."""


class Timers:
    """The timers of a run of trio: one task and one scope of cancellation for all of them.

    One that is cancelled stays in the heap, as most are, and the task is not woken for each. It leaves at its time, or
    when all such leave: after `MAX_CANCELLED` cancellations, or half as many as the heap has timers if these are more.
    Peers that come and go must not fill the heap.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, TrioTimer]] = []
        self._number = count()
        self._cancelled = 0  # since all such left
        self._sleep = trio.CancelScope()
        _ = trio.lowlevel.spawn_system_task(self._run)

    def call_at(self, when: float, call: Callable[[], object], /) -> TrioTimer:
        """See `waits.CallAt`."""
        timer = TrioTimer(when, call, self)
        if when < math.inf:
            heappush(self._heap, (when, next(self._number), timer))
        if when < self._sleep.deadline:
            self._sleep.deadline = when
        return timer

    def note_cancelled(self) -> None:
        """Note that a timer in the heap was cancelled; let all such leave if it is time."""
        self._cancelled += 1
        if self._cancelled > MAX_CANCELLED and 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapify(self._heap)
            self._cancelled = 0

    async def _run(self) -> None:
        while True:
            with self._sleep:
                await trio.sleep_forever()
            now = trio.current_time()
            while self._heap and (self._heap[0][0] <= now or self._heap[0][2].call is None):
                _, _, timer = heappop(self._heap)
                call, timer.call = timer.call, None
                if call is not None:
                    _call(call)
            self._sleep = trio.CancelScope(deadline=self._heap[0][0] if self._heap else math.inf)


_TIMERS: Final = trio.lowlevel.RunVar[Timers]("timers")


def timers() -> Timers:
    """Return the timers of this run."""
    try:
        return _TIMERS.get()
    except LookupError:
        made = Timers()
        _ = _TIMERS.set(made)
        return made


class NextRound:
    """Calls functions in the next round of the run, in a task of its own: trio has no such call for its own thread."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], object]] = []
        self._waiting: trio.lowlevel.Task | None = None
        _ = trio.lowlevel.spawn_system_task(self._run)

    def __call__(self, call: Callable[[], object], /) -> None:
        """Have ``call``, which raises nothing, called."""
        self._calls.append(call)
        if self._waiting is not None:
            trio.lowlevel.reschedule(self._waiting)
            self._waiting = None

    async def _run(self) -> None:
        while True:
            if self._calls:  # made in this round
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = trio.lowlevel.current_task()
                _ = await trio.lowlevel.wait_task_rescheduled(self._abort)
            calls, self._calls = self._calls, []
            for call in calls:
                _call(call)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED


class TrioWait:
    """A `waits.Wait` on trio."""

    def __init__(self) -> None:
        self._timers = timers()
        self._waiting: trio.lowlevel.Task | None = None

    async def until(self, deadline: float) -> None:
        """See `waits.Wait.until`."""
        self._waiting = trio.lowlevel.current_task()
        timer = self._timers.call_at(deadline, self.end)
        try:
            _ = await trio.lowlevel.wait_task_rescheduled(self._abort)
        finally:
            timer.cancel()

    def end(self) -> None:
        """See `waits.Wait.end`."""
        if self._waiting is not None:
            trio.lowlevel.reschedule(self._waiting)
            self._waiting = None

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED


async def read(descriptor: int, go_on: Callable[[], bool], deadline: float) -> None:
    """See `waits.Read`."""
    timer = timers().call_at(deadline, lambda: trio.lowlevel.notify_closing(descriptor))
    try:
        while True:
            await trio.lowlevel.wait_readable(descriptor)
            if not go_on() or trio.current_time() >= deadline:
                return
    except trio.ClosedResourceError:
        pass
    finally:
        timer.cancel()


@asynccontextmanager
async def open_nursery() -> AsyncGenerator[trio.Nursery]:
    """Open a nursery of trio's that ends as a group of anyio's does.

    When several tasks of a nursery are cancelled, it raises a group of as many `trio.Cancelled`. A caller that expects
    one, as asyncio has it, would not recognise its cancellation; the group around the nursery raises one.
    """
    async with anyio.create_task_group(), trio.open_nursery() as nursery:
        yield nursery


class TrioPeer(Peer):
    """A `Peer` on trio."""

    def __init__(self, accepted: socket, connection: HasDeadline) -> None:
        super().__init__(accepted, connection, timers().call_at, trio.current_time)
        self._descriptor = accepted.fileno()
        self._is_receiving = False

    async def receive(self) -> bytes | None:
        """See `Peer.receive`."""
        self._is_receiving = True
        try:
            while True:
                self._set_timer()  # again where it went off for a wait that found nothing to read
                await trio.lowlevel.wait_readable(self._descriptor)
                with suppress(BlockingIOError):
                    return self._socket.recv(READ_SIZE)
        except trio.ClosedResourceError:
            return None
        finally:
            self._is_receiving = False

    def _receive_nothing(self) -> None:
        if self._is_receiving:
            trio.lowlevel.notify_closing(self._descriptor)
