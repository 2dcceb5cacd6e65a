"""Transactions that an event loop drives, on a real PostgreSQL: where all goes well, and where a thread goes on."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
import pytest
from attrs import evolve, field, frozen

from chutes_proto.effects import Transact
from chutes_proto.errors import FateUnknown, RowNotAuthentic, StoreAway, StoreError
from chutes_proto.io.stores import marks, turns
from chutes_proto.io.stores.attempts import NeedsThread
from chutes_proto.io.stores.postgres import PostgresStore, transactions
from chutes_proto.io.stores.turns import open_turns
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.store.rows import AuditRow, ReadTimes, Scan, SetHorizon, StoreOp, Vm, VmRow
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, attest, boot, confirm, sync
from chutes_proto.units.revocations import Revocations
from tests.postgres import Cluster, schema
from tests.store.test_postgres import ask
from tests.store.test_postgres_silent import SILENCE, Proxy
from tests.store.test_turns import NoThread
from tests.waiting import async_wait_until, wait_until

pytestmark = pytest.mark.anyio

NONE = Revocations.of(0, ())


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    with closing(Proxy(cluster)) as proxy:
        yield proxy


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    with schema(cluster.url()) as url:
        yield url


@pytest.fixture
def store(url: str, proxy: Proxy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresStore]:
    """A sealed store with one connection, whose key is open, and which was compared with the mark."""
    monkeypatch.setattr(marks, "LOOK_SECONDS", 3600)
    monkeypatch.setattr(transactions, "_SILENCE", SILENCE)
    monkeypatch.setattr(turns, "ATTEMPT_SECONDS", 60.0)  # what takes no thread does so on a busy machine, too
    arguments: Any = {"connections": 1, "busy_seconds": 0.1, "migrate": True, "vault": VAULT}
    with closing(PostgresStore(proxy.url(url, cluster), **arguments)) as store:
        store.transact(Ask(ReadTimes()))
        yield store


@frozen
class Probe(Unit[int | None]):
    """Reads what it says that it reads, sets the horizon, and does ``what`` in its first runs, before that or after."""

    what: Callable[[], object] = lambda: None
    at_end: bool = False
    besides: StoreOp[Any] | None = None
    times: int = 1
    runs: list[int | None] = field(factory=list[int | None])

    def ahead(self) -> Sequence[StoreOp[Any]]:
        return (ReadTimes(),)

    def script(self) -> Script[int | None]:
        found = (yield from ReadTimes()).horizon
        self.runs.append(found)
        if len(self.runs) <= self.times and not self.at_end:
            _ = self.what()
        yield from SetHorizon(7)
        if self.besides is not None:
            _ = yield from self.besides
        if len(self.runs) <= self.times and self.at_end:
            _ = self.what()
        return found


def threads(store: PostgresStore) -> int:
    return sum(thread.name == f"store {store.name}" for thread in threading.enumerate())


@asynccontextmanager
async def opened(store: PostgresStore, *, threads_after: int) -> AsyncIterator[Any]:
    """The turns of a store, of which so many threads are needed."""
    async with open_turns(store) as turns:
        yield turns
        assert threads(store) == threads_after
    await async_wait_until(lambda: not threads(store))
    assert len(store._pool.idle) <= 1
    assert not store._pool.slots._held
    with suppress(RuntimeError):  # on trio
        loop = asyncio.get_running_loop()
        assert not any(loop.remove_reader(connection.fileno()) for connection in store._pool.idle)


# --- no thread ---


async def test_a_boot_needs_no_thread(store: PostgresStore) -> None:
    async with opened(store, threads_after=0) as turns:
        for number in range(2):  # a new VM, and a known one
            granted = evolve(boot(f"{number}", now=NOW + 60 * number), revocations=NONE)
            assert (await turns.transact(Transact(granted))).boot_id == granted.boot_id
            unit = evolve(sync(granted, f"{number}", "storage", "tdx-cache"), revocations=granted.revocations)
            assert len((await turns.transact(Transact(unit))).passphrases) == 2
    assert store.retries == 0
    assert [row.event for row in store.transact(Ask(Scan(AuditRow)))].count("boot") == 2


async def test_boots_at_once_are_each_granted_and_wait_for_their_turn_without_a_thread(url: str) -> None:
    granted: list[str] = []
    in_thread: list[Unit[Any]] = []

    async def grant(turns: Any, label: str, number: int, now: int) -> None:
        unit = evolve(boot(f"{label} {number}", vm=Vm(VM.hotkey, f"vm-{number}"), now=now), revocations=NONE)
        granted.append((await turns.transact(Transact(unit, turn_seconds=60, seconds=60))).boot_id)

    with closing(PostgresStore(url, connections=4, migrate=True, vault=VAULT)) as store:
        transact: Any = store.transact

        def noted(unit: Unit[Any]) -> object:
            in_thread.append(unit)
            return transact(unit)

        store.__dict__["transact"] = noted
        async with open_turns(store) as turns:
            for number in range(40):
                await grant(turns, "first", number, NOW)
            in_thread.clear()
            async with anyio.create_task_group() as group:
                for number in range(40):
                    group.start_soon(grant, turns, "second", number, NOW + 60)
        assert len(in_thread) <= 10  # where a connection is made, and where one conflicts
        assert len(store.transact(Ask(Scan(VmRow)))) == 40
    assert len({*granted}) == 80


async def test_a_refusal_needs_no_thread_and_leaves_no_trace(store: PostgresStore, proxy: Proxy) -> None:
    def refuse() -> None:
        raise LookupError

    before = proxy.connections
    async with opened(store, threads_after=0) as turns:
        with pytest.raises(LookupError):
            await turns.transact(Transact(Probe(refuse, at_end=True)))
        assert await turns.transact(Transact(Probe())) == 0
    assert proxy.connections == before


async def test_a_row_that_is_not_authentic_is_counted(store: PostgresStore, url: str) -> None:
    store.transact(boot("first"))
    _ = ask(url, "UPDATE vm SET platform_id = 'another' RETURNING 1")
    async with opened(store, threads_after=0) as turns:
        with pytest.raises(RowNotAuthentic):
            await turns.transact(Transact(boot("second", now=NOW + 60)))
    assert store.custody.faults == {"vm": 1}


async def test_a_closed_store_says_so(store: PostgresStore) -> None:
    async with open_turns(store) as turns:
        store.close()
        with pytest.raises(StoreError, match="it was closed"):
            await turns.transact(Transact(Probe()))


# --- a thread goes on ---


async def test_what_a_unit_reads_besides_is_read_in_a_thread(store: PostgresStore) -> None:
    unit = Probe(besides=Scan(VmRow))
    async with opened(store, threads_after=1) as turns:
        assert await turns.transact(Transact(unit)) == 0
    assert unit.runs == [0, 0]
    assert store.retries == 0


async def test_a_unit_that_reads_further_runs_once(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    run = PostgresStore._run

    def noted(store: PostgresStore, connection: Any, unit: Unit[Any]) -> object:
        ran.append(type(unit).__name__)
        return run(store, connection, unit)

    monkeypatch.setattr(PostgresStore, "_run", noted)
    granted = evolve(boot("first"), exchange="two-phase", revocations=NONE)
    attested = evolve(attest(granted, "quote", "storage"), revocations=NONE)
    async with opened(store, threads_after=1) as turns:
        _ = await turns.transact(Transact(granted))
        _ = await turns.transact(Transact(attested))
        assert not threads(store)
        _ = await turns.transact(Transact(evolve(confirm(attested, {"storage": True}), revocations=NONE)))
    assert ran == ["GrantBoot", "AttestVolumes", "ConfirmVolumes"]


async def test_where_an_answer_waits_for_copies_a_thread_waits(store: PostgresStore) -> None:
    copied: list[str] = []
    store.copy_rows(lambda rows: copied.append(threading.current_thread().name), waits=True)
    async with opened(store, threads_after=1) as turns:
        _ = await turns.transact(Transact(evolve(boot("first"), revocations=NONE)))
    assert copied == [f"store {store.name}"]


async def test_a_connection_that_was_lost_is_replaced_in_a_thread(store: PostgresStore, url: str) -> None:
    _ = ask(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'chutes-proto'")
    unit = Probe()
    async with opened(store, threads_after=1) as turns:
        assert await turns.transact(Transact(unit)) == 0
    assert unit.runs == [0]


def look_often(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "LOOK_SECONDS", 0)


def look_never_done(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a new connection, or one that failed as it looked."""
    for connection in store._pool.idle:
        connection.is_looked_at = False


@pytest.mark.parametrize("due", [look_often, look_never_done])
async def test_a_database_that_lost_rows_serves_nothing_on_the_loop_either(
    store: PostgresStore, url: str, monkeypatch: pytest.MonkeyPatch, due: Callable[..., None]
) -> None:
    store.transact(boot("first"))
    _ = ask(url, "DELETE FROM audit WHERE event = 'boot' RETURNING 1")
    due(store, monkeypatch)
    unit = Probe()
    async with opened(store, threads_after=1) as turns:
        for _ in range(2):  # nor from then on
            with pytest.raises(StoreError, match="it lacks audit row"):
                await turns.transact(Transact(unit))
    assert unit.runs == []


@pytest.fixture
def hang(cluster: Cluster, url: str) -> Iterator[Callable[[], None]]:
    """The database's processes stand still, until a thread waits for them."""
    stopped: list[int] = []
    ended = threading.Event()

    def go_on() -> None:
        running = threading.enumerate
        _ = wait_until(lambda: ended.is_set() or any(thread.name.startswith("store ") for thread in running()))
        for process in stopped:
            os.kill(process, signal.SIGCONT)

    continuing = threading.Thread(target=go_on)

    def stop() -> None:
        find = "SELECT pid FROM pg_stat_activity WHERE application_name = 'chutes-proto'"
        stopped.extend(pid for (pid,) in ask(url, find))
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        continuing.start()

    yield stop
    ended.set()
    if continuing.ident is not None:
        continuing.join()


@pytest.fixture
def impatient(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    del store  # which sets it before
    monkeypatch.setattr(turns, "ATTEMPT_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("at_end", [False, True])
async def test_a_database_that_takes_long_is_waited_for_in_a_thread(
    store: PostgresStore, hang: Callable[[], None], at_end: bool
) -> None:
    unit = Probe(hang if at_end else lambda: None, at_end)
    async with opened(store, threads_after=1) as turns:
        if not at_end:
            hang()
        assert await turns.transact(Transact(unit)) == 0
    assert unit.runs == [0]
    assert store.transact(Ask(ReadTimes())).horizon == 7


@pytest.mark.parametrize(("times", "takes_long", "in_thread"), [(2, False, 0), (3, False, 1), (1, True, 1)])
async def test_a_transaction_in_conflict_is_run_again_on_the_loop_and_at_last_in_a_thread(
    store: PostgresStore,
    url: str,
    hang: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    takes_long: bool,
    in_thread: int,
) -> None:
    if takes_long:
        monkeypatch.setattr("chutes_proto.io.stores.turns.ATTEMPT_SECONDS", 0.05)
    store._busy_seconds = 60  # in which it may be run again
    with closing(PostgresStore(url, vault=VAULT)) as other:
        unit = Probe(lambda: other.transact(Ask(SetHorizon(3 + len(unit.runs)))), times=times)
        async with opened(store, threads_after=in_thread) as turns:
            if takes_long:
                hang()
            assert await turns.transact(Transact(unit)) == 3 + times
    assert unit.runs == [0, *(3 + run for run in range(1, times + 1))]
    assert store.rollbacks == {"Probe": times}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("besides", [None, Scan(VmRow)])
async def test_each_answer_of_a_slow_database_has_the_time_limit(
    store: PostgresStore, proxy: Proxy, besides: StoreOp[Any] | None
) -> None:
    """As in a thread: together they take longer."""
    proxy.delay = 0.6 * (SILENCE + store._busy_seconds)
    async with opened(store, threads_after=1) as turns:
        assert await turns.transact(Transact(Probe(besides=besides), seconds=60)) == 0
    proxy.delay = 0.0


@pytest.mark.usefixtures("impatient")
async def test_a_fault_of_the_wait_itself_leaves_nothing_open(
    store: PostgresStore, hang: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError

    async with opened(store, threads_after=1) as turns:
        hang()
        with monkeypatch.context() as patch, pytest.raises(OSError, match=r"^$"):
            patch.setattr(psycopg.Connection, "wait", fail)
            await turns.transact(Transact(Probe(), seconds=60))
    assert store.transact(Ask(ReadTimes())).horizon == 0


async def test_what_a_caller_leaves_is_committed_in_a_thread(store: PostgresStore, hang: Callable[[], None]) -> None:
    left = anyio.CancelScope()

    def leave() -> None:
        hang()
        left.cancel()

    async with opened(store, threads_after=1) as turns:
        with left:
            await turns.transact(Transact(Probe(leave, at_end=True), seconds=60))
        assert left.cancelled_caught
    assert store.transact(Ask(ReadTimes())).horizon == 7


@pytest.mark.usefixtures("impatient")
async def test_a_caller_that_leaves_as_its_turn_begins_keeps_no_turn(
    store: PostgresStore, hang: Callable[[], None]
) -> None:
    second, left = Probe(), anyio.CancelScope()

    async with opened(store, threads_after=1) as turns, anyio.create_task_group() as group:
        begin = turns._begin

        async def ask_in_turn() -> None:
            with left:
                await turns.transact(Transact(second, turn_seconds=60))

        def begin_and_leave() -> None:
            begin()
            if not turns._jobs:
                left.cancel()

        def hang_and_ask() -> None:
            hang()
            turns._begin = begin_and_leave
            group.start_soon(ask_in_turn)  # which asks before this turn can end: that takes another round of the loop

        await turns.transact(Transact(Probe(hang_and_ask, at_end=True)))
    assert left.cancelled_caught
    assert second.runs == [7]


@pytest.mark.usefixtures("impatient")
async def test_where_no_thread_can_be_started_the_fate_of_what_takes_long_is_unknown(
    store: PostgresStore, hang: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(store, threads_after=0) as turns:
        monkeypatch.setattr("chutes_proto.io.stores.threads.Thread", NoThread)
        with pytest.raises(FateUnknown, match="can't start new thread; the change may be committed or not"):
            await turns.transact(Transact(Probe(hang, at_end=True)))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_caller_that_leaves_as_its_commit_is_answered_takes_no_answer_of_the_next(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On asyncio, where a descriptor has one reader: the next caller would wait for its answer in vain."""
    monkeypatch.setattr(turns, "ATTEMPT_SECONDS", 60.0)
    loop = asyncio.get_running_loop()
    gate = loop.create_future()

    async def later(turns: Any) -> None:
        await gate
        _ = await turns.transact(Transact(Probe(), seconds=600))

    async with open_turns(store) as opened:
        waiting = asyncio.create_task(later(opened))
        first = asyncio.create_task(opened.transact(Transact(Probe(), seconds=600)))
        await anyio.lowlevel.checkpoint()
        (job,) = opened._running.values()
        attempt: Any = job.attempt
        with anyio.fail_after(30):
            while not attempt._connection.is_committing:
                await anyio.lowlevel.checkpoint()
        _ = select.select([attempt.fileno()], [], [])  # the answer, which nobody has read

        def in_one_round() -> None:
            gate.set_result(None)
            _ = first.cancel()

        _ = loop.call_soon(in_one_round)
        _, late = await asyncio.wait([first, waiting], timeout=30)
        assert not late


# --- a database that is lost ---


@pytest.mark.usefixtures("impatient")
async def test_a_database_that_never_answers_is_given_up(store: PostgresStore, proxy: Proxy) -> None:
    proxy.mute.set()
    unit, before = Probe(), proxy.connections
    async with opened(store, threads_after=1) as turns:
        with pytest.raises(StoreAway, match=r"no answer for 0\.7 seconds"):
            await turns.transact(Transact(unit, seconds=60))
    assert not unit.runs
    assert proxy.connections == before  # its time is over, so it is not tried again
    proxy.mute.clear()
    assert store.transact(Ask(ReadTimes())).horizon == 0


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["mute", "cut"])
async def test_of_a_commit_whose_answer_is_lost_the_fate_is_unknown(
    store: PostgresStore, proxy: Proxy, how: str
) -> None:
    unit = Probe(getattr(proxy, how).set, at_end=True)
    async with open_turns(store) as turns:
        with pytest.raises(FateUnknown, match="connection was lost at the commit"):
            await turns.transact(Transact(unit, seconds=60))
    assert unit.runs == [0]


async def test_of_a_connection_that_was_lost_meanwhile_no_descriptor_is_asked(store: PostgresStore) -> None:
    attempt: Any = store.attempt(Probe())
    attempt._connection.close()
    assert not attempt.reads
    store._busy_seconds = 60
    with pytest.raises(NeedsThread):
        attempt.finish()
    assert not store._pool.slots._held


async def test_an_attempt_that_is_dropped_closes_its_connection(store: PostgresStore) -> None:
    attempt: Any = store.attempt(Probe())
    assert not attempt.has_ended
    connection = attempt._connection
    attempt.close()
    assert attempt.has_ended
    assert connection.closed
    assert store.transact(Ask(ReadTimes())).horizon == 0
