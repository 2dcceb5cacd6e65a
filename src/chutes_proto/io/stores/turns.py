"""A store on an event loop: its transactions run in threads, and a caller that waits for its turn holds none.

No rule is decided here: `Turns` says whose turn it is.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.abc
from attrs import define, field

from chutes_proto.effects import Transact
from chutes_proto.errors import FateUnknown, StoreAway, StoreBusy
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.store._run import Unit
from chutes_proto.store._turns import PAUSE_SECONDS, Found, Turn, Turns


@asynccontextmanager
async def open_turns(store: DurableStore) -> AsyncGenerator[StoreTurns]:
    """Open the turns of ``store``; its `transact` is the ``transact`` of a `Performer`.

    At the end it waits for the transactions that have begun, whose callers may have left.
    """
    async with anyio.create_task_group() as group:
        yield StoreTurns(store, group)
        group.cancel_scope.cancel()


@define(eq=False)
class _Job:
    unit: Unit[Any]
    begun: anyio.Event = field(init=False, factory=anyio.Event)
    ended: anyio.Event = field(init=False, factory=anyio.Event)
    result: Any = field(init=False, default=None)
    fault: Exception | None = field(init=False, default=None)


class StoreTurns:
    """The turns of one store; transactions run in ``group``."""

    def __init__(self, store: DurableStore, group: anyio.abc.TaskGroup) -> None:
        self._store = store
        self._group = group
        self._turns = Turns(store.callers)
        self._jobs: dict[Turn, _Job] = {}
        self._threads = anyio.CapacityLimiter(store.callers + 1)  # and one that asks whether the store is back

    async def transact(self, effect: Transact[Any]) -> object:
        """Perform `Transact`. A caller that is cancelled does not end a transaction that has begun."""
        until = anyio.current_time() + effect.seconds
        turn, job = self._turns.ask(), _Job(effect.unit)
        self._jobs[turn] = job
        self._begin()
        try:
            with anyio.move_on_after(effect.turn_seconds):
                await job.begun.wait()
        finally:
            if not turn.has_begun:
                self._turns.leave(turn)
                del self._jobs[turn]
        if not turn.has_begun:
            text = f"store {self._store.name}: no turn within {effect.turn_seconds:.1f} s"
            raise StoreBusy(f"{text}; it does not answer, or other transactions take too long")
        with anyio.CancelScope(deadline=until):
            await job.ended.wait()
        if not job.ended.is_set():
            text = f"store {self._store.name}: no answer within {effect.seconds:.1f} s"
            raise FateUnknown(f"{text}; the change may be committed or not")
        if job.fault is not None:
            raise job.fault
        return job.result

    def _begin(self) -> None:
        for turn in self._turns.begin():
            job = self._jobs.pop(turn)
            job.begun.set()
            _ = self._group.start_soon(self._run, turn, job)

    async def _run(self, turn: Turn, job: _Job) -> None:
        found: Found = "unknown"
        try:
            try:
                transact = partial(self._store.transact, job.unit)
                job.result = await anyio.to_thread.run_sync(transact, limiter=self._threads)
                found = "answered"
            except Exception as exc:  # noqa: BLE001 - it is the caller's
                job.fault = exc
                found = _found(exc)
            job.ended.set()
            if found == "away":
                await anyio.sleep(PAUSE_SECONDS)
        finally:
            self._turns.end(turn, found)
            self._begin()


def _found(exc: Exception) -> Found:
    if isinstance(exc, StoreAway):
        return "away"
    return "unknown" if isinstance(exc, (StoreBusy, FateUnknown)) else "answered"
