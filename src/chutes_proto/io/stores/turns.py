"""A store on an event loop: its transactions run in threads, and a caller that waits for its turn holds none.

A store that shares commits gets at once all transactions whose turn has come, while others gather for the next commit.
If callers came together before, it waits for those of the loop's present round. Any other store gets each by itself.

No rule is decided here: `Turns` says whose turn it is.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import anyio
import anyio.lowlevel
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from attrs import define, field

from chutes_proto.effects import Transact
from chutes_proto.errors import FateUnknown, StoreAway, StoreBusy
from chutes_proto.io.loops import Threads
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.store._run import Unit
from chutes_proto.store._turns import PAUSE_SECONDS, UNKNOWN, Found, Turn, Turns


@asynccontextmanager
async def open_turns(store: DurableStore) -> AsyncGenerator[StoreTurns]:
    """Open the turns of ``store``; its `transact` is that of a `Performer`.

    At the end it waits for the transactions that have begun, whose callers may have left.
    """
    asked, to_wait = anyio.create_memory_object_stream[Turn | None](math.inf)
    async with asked, to_wait, anyio.create_task_group() as group:
        turns = StoreTurns(store, asked)
        _ = group.start_soon(turns.wait, to_wait)
        try:
            yield turns
        finally:
            await turns.close()
            group.cancel_scope.cancel()


@runtime_checkable
class SharesCommits(Protocol):
    """A store that runs several units in one commit."""

    def transact_all(self, units: Sequence[Unit[Any]], /) -> list[tuple[Any, BaseException | None]]:
        """Run units, each as a transaction of its own; return the result of each, and what it raised."""
        ...


@define(eq=False)
class _Job:
    turn: Turn
    unit: Unit[Any]
    begun: anyio.Event = field(init=False, factory=anyio.Event)
    ended: anyio.Event = field(init=False, factory=anyio.Event)
    result: Any = field(init=False, default=None)
    fault: BaseException | None = field(init=False, default=None)


class StoreTurns:
    """The turns of one store, on the running event loop.

    A call of the loop's that ends a transaction waits for nothing and starts no task: it is ``asked`` of `wait`.
    """

    def __init__(self, store: DurableStore, asked: MemoryObjectSendStream[Turn | None]) -> None:
        self._store = store
        self._asked = asked
        self._turns = Turns()
        self._threads = Threads(f"store {store.name}")
        self._sharing = store if isinstance(store, SharesCommits) else None
        self._running = 0  # transactions or, of a store that shares them, commits
        self._is_gathering = False
        self._is_crowded = False  # the last commit was shared, or others came meanwhile
        self._closing = False
        self._all_ended = anyio.Event()
        self._waiting: dict[Turn, _Job] = {}
        self._ready: list[_Job] = []  # their turn has begun

    async def transact(self, effect: Transact[Any]) -> object:
        """Perform `Transact`. A caller that is cancelled does not end a transaction that has begun."""
        until = anyio.current_time() + effect.seconds
        turn = self._turns.ask()
        job = self._waiting[turn] = _Job(turn, effect.unit)
        self._begin()
        if not turn.has_begun:
            await self._wait_for_turn(job, effect.turn_seconds)
        with anyio.CancelScope(deadline=until):
            await job.ended.wait()
        if not job.ended.is_set():
            raise FateUnknown(f"store {self._store.name}: no answer within {effect.seconds:.1f} s; {UNKNOWN}")
        if job.fault is not None:
            raise job.fault
        return job.result

    async def _wait_for_turn(self, job: _Job, seconds: float) -> None:
        try:
            with anyio.move_on_after(seconds):
                await job.begun.wait()
        finally:
            if not job.turn.has_begun:
                self._turns.leave(job.turn)
                del self._waiting[job.turn]
        if not job.turn.has_begun:
            text = f"store {self._store.name}: no turn within {seconds:.1f} s"
            raise StoreBusy(f"{text}; it does not answer, or other transactions take too long")

    def _begin(self) -> None:
        if self._closing:
            return
        for turn in self._turns.begin(self._store.callers):
            job = self._waiting.pop(turn)
            job.begun.set()
            self._ready.append(job)
        if self._sharing is None or not self._is_crowded:
            self._hand_over()
        elif self._ready and not self._running and not self._is_gathering:
            self._is_gathering = True
            self._asked.send_nowait(None)

    async def wait(self, asked: MemoryObjectReceiveStream[Turn | None]) -> None:
        """Wait for the end of the loop's round, and for the pause of each turn that found the store away."""
        async with anyio.create_task_group() as pauses:
            async for turn in asked:
                if turn is not None:
                    _ = pauses.start_soon(self._pause, turn)
                    continue
                await anyio.lowlevel.checkpoint()
                self._is_gathering = False
                self._hand_over()

    def _hand_over(self) -> None:
        while self._ready and (self._sharing is None or not self._running):
            so_many = 1 if self._sharing is None else len(self._ready)
            jobs, self._ready = self._ready[:so_many], self._ready[so_many:]
            self._running += 1
            try:
                self._threads.run(partial(self._transact, jobs), self._end)
            except RuntimeError as exc:  # the system allows no thread
                for job in jobs:
                    job.fault = StoreAway(f"store {self._store.name}: {exc}")
                self._end(jobs)

    def _end(self, jobs: list[_Job]) -> None:
        self._running -= 1
        self._is_crowded = len(jobs) > 1 or bool(self._ready)
        for job in jobs:
            job.ended.set()
            found = _found(job.fault)
            if found == "away" and not self._closing:
                self._asked.send_nowait(job.turn)
            else:
                self._turns.end(job.turn, found)
        self._begin()
        if self._closing and not self._running:
            self._all_ended.set()

    async def _pause(self, turn: Turn) -> None:
        await anyio.sleep(PAUSE_SECONDS)
        self._turns.end(turn, "away")
        self._begin()

    async def close(self) -> None:
        """Begin no turn any more, and wait for the transactions that run."""
        self._closing = True
        try:
            if self._running:
                with anyio.CancelScope(shield=True):
                    await self._all_ended.wait()
        finally:
            self._threads.close()

    def _transact(self, jobs: list[_Job]) -> list[_Job]:
        """Run transactions, in a thread; return them, with their outcomes."""
        try:
            if self._sharing is None:
                (job,) = jobs
                job.result = self._store.transact(job.unit)
                return jobs
            outcomes = self._sharing.transact_all([job.unit for job in jobs])
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.result, job.fault = outcome
        except BaseException as exc:  # noqa: BLE001 - it is the callers'
            for job in jobs:
                job.fault = exc
        return jobs


def _found(exc: BaseException | None) -> Found:
    if isinstance(exc, StoreAway):
        return "away"
    return "unknown" if isinstance(exc, (StoreBusy, FateUnknown)) else "answered"
