"""A store on an event loop: its transactions run on the loop or in threads; who waits for a turn holds neither.

A store that can do so begins a transaction on the loop, which waits for its database as for any other peer; what meets
anything out of the ordinary, or takes long, goes on in a thread.

A store that shares commits is handed all transactions at once that have their turn at the end of a round of the loop,
while others gather for the next commit: so a commit takes one thread, and one call of it into the loop. Where callers
come one by one, the round is not waited for. Any other store is handed each for itself.

While the units of a commit run, the loop gives way. Two threads that compute take turns, and change over whenever one
calls SQLite or the system: that takes longer than most of these calls. The loop goes on when only the commit is left,
which waits for the disk, and in any case after the time that the interpreter leaves to a thread.

No rule is decided here: `Turns` says whose turn it is.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from threading import Lock
from typing import Any, Final, Protocol, runtime_checkable

import anyio
from attrs import define, field

from chutes_proto.effects import Transact
from chutes_proto.errors import FateUnknown, StoreAway, StoreBusy
from chutes_proto.io.loops import call_at, call_next, clock, reading, wait
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.attempts import UNKNOWN, Attempt, Attempts, Conflict, NeedsThread
from chutes_proto.io.stores.threads import Threads
from chutes_proto.io.waits import Wait
from chutes_proto.store._run import Unit
from chutes_proto.store._turns import PAUSE_SECONDS, Found, Turn, Turns

ATTEMPT_SECONDS: Final = 0.5
"""How long the loop waits for a database, until a thread does: it has the time limits."""
ATTEMPTS: Final = 3
"""How often the loop runs a transaction with which others conflict. A thread pauses before it tries again."""


@asynccontextmanager
async def open_turns(store: DurableStore) -> AsyncGenerator[StoreTurns]:
    """Open the turns of ``store``; its `transact` and `give_way` are those of a `Performer`.

    At the end it waits for the transactions that have begun, whose callers may have left.
    """
    turns = StoreTurns(store)
    try:
        yield turns
    finally:
        with anyio.CancelScope(shield=True):
            await turns.close()


@runtime_checkable
class SharesCommits(Protocol):
    """A store that runs several units in one commit."""

    def transact_all(
        self, units: Sequence[Unit[Any]], have_run: Callable[[], object], /
    ) -> list[tuple[Any, BaseException | None]]:
        """Run units, each as a transaction of its own; return the result of each, and what it raised.

        ``have_run`` is called when all of them have run, and only their commit is left. It need not be if they fail.
        """
        ...


@define(eq=False)
class _Job:
    turn: Turn
    unit: Unit[Any]
    caller: Wait
    attempt: Attempt[Any] | None = field(init=False, default=None)  # a thread finishes it
    is_in_conflict: bool = field(init=False, default=False)
    has_ended: bool = field(init=False, default=False)
    result: Any = field(init=False, default=None)
    fault: BaseException | None = field(init=False, default=None)


class StoreTurns:
    """The turns of one store, on the running event loop."""

    def __init__(self, store: DurableStore) -> None:
        self._store = store
        self._now, self._call_at, self._call_next, self._wait = clock(), call_at(), call_next(), wait()
        self._turns = Turns()
        self._threads = Threads(f"store {store.name}")
        self._read = reading()
        self._attempts = store if isinstance(store, Attempts) else None
        self._sharing = store if isinstance(store, SharesCommits) else None
        self._is_gathering = False
        self._is_crowded = False  # the last commit was shared, or others came meanwhile
        self._units_run: Lock | None = None  # locked until the units of the commit that comes next have run
        self._jobs: dict[Turn, _Job] = {}  # of the turns that have not begun
        self._running: dict[Turn, _Job] = {}
        self._ready: list[_Job] = []  # of these, those that no thread has yet
        self._threads_in_use = 0
        self._closing = False
        self._all_ended = anyio.Event()

    async def transact(self, effect: Transact[Any]) -> object:
        """Perform `Transact`. A caller that is cancelled does not end a transaction that has begun."""
        until = self._now() + effect.seconds
        turn = self._turns.ask()
        job = self._jobs[turn] = _Job(turn, effect.unit, self._wait())
        self._begin()
        try:
            if not turn.has_begun:
                await self._wait_for_turn(job, effect.turn_seconds)
            if self._attempts is not None:
                await self._attempt(job, self._attempts, until)
        finally:
            # It takes long, is out of the ordinary, or the caller leaves.
            if self._attempts is not None and turn.has_begun and not job.has_ended:
                self._ready.append(job)
                self._hand_over()
        if not job.has_ended:
            await job.caller.until(until)
        self.give_way()
        if not job.has_ended:
            raise FateUnknown(f"store {self._store.name}: no answer within {effect.seconds:.1f} s; {UNKNOWN}")
        if job.fault is not None:
            raise job.fault
        return job.result

    def give_way(self) -> None:
        """Wait while units of a shared commit run, for as long as the interpreter would let them; then go on.

        Call it where the loop begins to compute for someone. It waits once for a commit.
        """
        units_run, self._units_run = self._units_run, None
        if units_run is not None:
            _ = units_run.acquire(timeout=sys.getswitchinterval())

    async def close(self) -> None:
        """Begin no turn any more, and wait for the transactions that run."""
        self._closing = True
        self._hand_over()  # what was gathered for the next round, which may not come
        try:
            if self._running:
                await self._all_ended.wait()
        finally:
            self._threads.close()

    async def _wait_for_turn(self, job: _Job, seconds: float) -> None:
        try:
            await job.caller.until(self._now() + seconds)
        finally:
            if not job.turn.has_begun:
                self._turns.leave(job.turn)
                del self._jobs[job.turn]
        if not job.turn.has_begun:
            text = f"store {self._store.name}: no turn within {seconds:.1f} s"
            raise StoreBusy(f"{text}; it does not answer, or other transactions take too long")

    async def _attempt(self, job: _Job, store: Attempts, until: float) -> None:
        """Carry out a transaction whose turn has begun, or as much of it as the loop can."""
        for _ in range(ATTEMPTS):
            try:
                attempt = job.attempt = store.attempt(job.unit)
            except NeedsThread:
                return
            except BaseException as exc:  # noqa: BLE001 - it is the caller's
                job.fault = exc
                self._end([job])
                return
            job.is_in_conflict = False
            if attempt.reads:
                latest = min(until, self._now() + ATTEMPT_SECONDS)
                await self._read(attempt.fileno(), partial(self._go_on, job, attempt), latest)
            if not job.is_in_conflict:
                return

    def _go_on(self, job: _Job, attempt: Attempt[Any]) -> bool:
        """Go on with a transaction that can read; return whether it waits to read again."""
        try:
            attempt.go_on()
        except NeedsThread as exc:
            job.attempt = None
            job.is_in_conflict = isinstance(exc, Conflict)
            return False
        except BaseException as exc:  # noqa: BLE001 - it is the caller's
            job.fault = exc
        else:
            if not attempt.has_ended:
                return attempt.reads
            job.result = attempt.result
        self._end([job])
        return False

    def _begin(self) -> None:
        for turn in [] if self._closing else self._turns.begin(self._store.callers):
            job = self._running[turn] = self._jobs.pop(turn)
            job.caller.end()
            if self._attempts is None:
                self._ready.append(job)
        if self._sharing is None or not self._is_crowded:
            self._hand_over()
        elif self._ready and not self._threads_in_use and not self._is_gathering:
            self._is_gathering = True
            _ = self._call_next(self._hand_over)

    def _hand_over(self) -> None:
        self._is_gathering = False
        while self._ready and (self._sharing is None or not self._threads_in_use):
            so_many = 1 if self._sharing is None else self._store.callers
            jobs, self._ready = self._ready[:so_many], self._ready[so_many:]
            self._threads_in_use += 1
            carry_out = partial(self._transact, jobs)
            if self._sharing is not None:
                self._units_run = Lock()
                _ = self._units_run.acquire()
                carry_out = partial(self._transact_all, self._sharing, jobs, self._units_run)
            try:
                self._threads.run(carry_out, self._end_in_thread)
            except RuntimeError as exc:  # the system allows no thread
                self._units_run = None
                for job in jobs:
                    job.fault = StoreAway(f"store {self._store.name}: {exc}")
                    if job.attempt is not None:
                        job.attempt.close()
                        job.fault = FateUnknown(f"store {self._store.name}: {exc}; {UNKNOWN}")
                self._end_in_thread(jobs)

    def _transact(self, jobs: list[_Job]) -> list[_Job]:
        """Run a transaction, in a thread; return it."""
        for job in jobs:
            try:
                job.result = self._result(job)
            except BaseException as exc:  # noqa: BLE001 - it is the caller's
                job.fault = exc
        return jobs

    def _result(self, job: _Job) -> object:
        if job.attempt is not None:
            with suppress(NeedsThread):
                job.attempt.finish()
                return job.attempt.result
        return self._store.transact(job.unit)

    def _transact_all(self, sharing: SharesCommits, jobs: list[_Job], units_run: Lock) -> list[_Job]:
        """Run transactions in one commit, in a thread; return them."""

        def have_run() -> None:  # is called in one thread at a time
            if units_run.locked():
                units_run.release()

        try:
            outcomes = sharing.transact_all([job.unit for job in jobs], have_run)
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.result, job.fault = outcome
        except BaseException as exc:  # noqa: BLE001 - it is the callers'
            for job in jobs:
                job.fault = exc
        finally:
            have_run()
        return jobs

    def _end_in_thread(self, jobs: list[_Job]) -> None:
        self._threads_in_use -= 1
        self._end(jobs)

    def _end(self, jobs: list[_Job]) -> None:
        self._is_crowded = len(jobs) > 1 or bool(self._ready)
        for job in jobs:
            del self._running[job.turn]
            job.has_ended = True
            job.caller.end()
            found = _found(job.fault)
            if found == "away" and not self._closing:
                _ = self._call_at(self._now() + PAUSE_SECONDS, partial(self._end_turn, job.turn, found))
            else:
                self._turns.end(job.turn, found)
        self._begin()
        if self._closing and not self._running:
            self._all_ended.set()

    def _end_turn(self, turn: Turn, found: Found) -> None:
        self._turns.end(turn, found)
        self._begin()


def _found(exc: BaseException | None) -> Found:
    if isinstance(exc, StoreAway):
        return "away"
    return "unknown" if isinstance(exc, (StoreBusy, FateUnknown)) else "answered"
