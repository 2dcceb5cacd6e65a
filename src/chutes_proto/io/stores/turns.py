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
from chutes_proto.io.stores.threads import Threads
from chutes_proto.store._run import Unit
from chutes_proto.store._turns import PAUSE_SECONDS, Found, Turn, Turns


@asynccontextmanager
async def open_turns(store: DurableStore) -> AsyncGenerator[StoreTurns]:
    """Open the turns of ``store``; its `transact` is the ``transact`` of a `Performer`.

    At the end it waits for the transactions that have begun, whose callers may have left.
    """
    async with anyio.create_task_group() as pauses:
        turns = StoreTurns(store, pauses)
        try:
            yield turns
        finally:
            pauses.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await turns.close()


@define(eq=False)
class _Job:
    unit: Unit[Any]
    begun: anyio.Event = field(init=False, factory=anyio.Event)
    ended: anyio.Event = field(init=False, factory=anyio.Event)
    result: Any = field(init=False, default=None)
    fault: BaseException | None = field(init=False, default=None)


class StoreTurns:
    """The turns of one store. A turn whose transaction found the store away pauses in ``pauses``."""

    def __init__(self, store: DurableStore, pauses: anyio.abc.TaskGroup) -> None:
        self._store = store
        self._pauses = pauses
        self._turns = Turns(store.callers)
        self._threads = Threads(f"store {store.name}")
        self._jobs: dict[Turn, _Job] = {}  # of the turns that have not begun
        self._running: dict[Turn, _Job] = {}
        self._closing = False

    async def transact(self, effect: Transact[Any]) -> object:
        """Perform `Transact`. A caller that is cancelled does not end a transaction that has begun."""
        until = anyio.current_time() + effect.seconds
        turn, job = self._turns.ask(), _Job(effect.unit)
        self._jobs[turn] = job
        self._begin()
        if not turn.has_begun:
            await self._wait_for_turn(turn, job, effect.turn_seconds)
        with anyio.CancelScope(deadline=until):
            await job.ended.wait()
        if not job.ended.is_set():
            text = f"store {self._store.name}: no answer within {effect.seconds:.1f} s"
            raise FateUnknown(f"{text}; the change may be committed or not")
        if job.fault is not None:
            raise job.fault
        return job.result

    async def close(self) -> None:
        """Begin no turn any more, and wait for the transactions that run."""
        self._closing = True
        try:
            for job in [*self._running.values()]:
                await job.ended.wait()
        finally:
            self._threads.close()

    async def _wait_for_turn(self, turn: Turn, job: _Job, seconds: float) -> None:
        try:
            with anyio.move_on_after(seconds):
                await job.begun.wait()
        finally:
            if not turn.has_begun:
                self._turns.leave(turn)
                del self._jobs[turn]
        if not turn.has_begun:
            text = f"store {self._store.name}: no turn within {seconds:.1f} s"
            raise StoreBusy(f"{text}; it does not answer, or other transactions take too long")

    def _begin(self) -> None:
        for turn in [] if self._closing else self._turns.begin():
            job = self._running[turn] = self._jobs.pop(turn)
            job.begun.set()
            try:
                self._threads.run(partial(self._carry_out, job), partial(self._end, turn))
            except RuntimeError as exc:  # the system allows no thread
                job.fault = StoreAway(f"store {self._store.name}: {exc}")
                self._end(turn, "away")

    def _carry_out(self, job: _Job) -> Found:
        """Run a transaction, in a thread."""
        try:
            job.result = self._store.transact(job.unit)
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            job.fault = exc
            return _found(exc)
        return "answered"

    def _end(self, turn: Turn, found: Found) -> None:
        self._running.pop(turn).ended.set()
        if found == "away" and not self._closing:
            _ = self._pauses.start_soon(self._pause, turn)
        else:
            self._pass_on(turn, found)

    async def _pause(self, turn: Turn) -> None:
        try:
            await anyio.sleep(PAUSE_SECONDS)
        finally:
            self._pass_on(turn, "away")

    def _pass_on(self, turn: Turn, found: Found) -> None:
        self._turns.end(turn, found)
        self._begin()


def _found(exc: BaseException) -> Found:
    if isinstance(exc, StoreAway):
        return "away"
    return "unknown" if isinstance(exc, (StoreBusy, FateUnknown)) else "answered"
