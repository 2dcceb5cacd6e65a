"""Units that wait share one commit, and are one another's business in nothing else."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import evolve, frozen

from chutes_proto.errors import Refused, StoreBusy, StoreError
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import (
    AuditRow,
    BootRow,
    Claim,
    Insert,
    NonceRow,
    ReadTimes,
    Scan,
    SetHorizon,
    Times,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import CALLERS, NOW, VAULT, VM, boot, dump, sync
from chutes_proto.wire.codes import Code
from tests.store.harness import Gate, together

T = TypeVar("T")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path / "keys.db", busy_seconds=10, vault=VAULT)
    yield store
    store.close()


@pytest.fixture(params=["none", "most", "all"])
def gathered(request: pytest.FixtureRequest) -> str:
    """Which units come to the store in one call."""
    gathered: str = request.param
    return gathered


def in_one_commit(store: SqliteStore, units: list[Unit[Any]], gathered: str = "none") -> list[Any]:
    """The outcomes of units that waited, in their order, while another one was written."""
    gate = Gate()
    writer = threading.Thread(target=store.transact, args=(gate,))
    writer.start()
    assert gate.inside.wait(60)
    outcomes: list[Any] = [None] * len(units)

    def call(index: int) -> None:
        try:
            outcomes[index] = store.transact(units[index])
        except BaseException as exc:  # noqa: BLE001 - it is what became of the unit
            outcomes[index] = exc

    def call_all(first: int) -> None:
        together = store.transact_all(units[first:])
        outcomes[first:] = [result if fault is None else fault for result, fault in together]

    alone = {"none": len(units), "most": 1, "all": 0}[gathered]
    threads = [threading.Thread(target=call, args=(index,)) for index in range(alone)]
    if gathered != "none":
        threads.append(threading.Thread(target=call_all, args=(alone,)))
    for count, thread in enumerate(threads, 1):
        thread.start()
        while len(store._waiting) < count:
            assert thread.is_alive()
    gate.leave.set()
    for thread in (writer, *threads):
        thread.join(60)
        assert not thread.is_alive()
    return outcomes


@frozen
class Raising(Unit[None]):
    exc: BaseException

    def script(self) -> Script[None]:
        yield from SetHorizon(10**6)
        raise self.exc


def test_units_that_wait_are_committed_together_in_their_order(store: SqliteStore, gathered: str) -> None:
    before = store.commits
    rows = [AuditRow(NOW, "vm", f"event {index}", "granted") for index in range(40)]
    assert in_one_commit(store, [Ask(Insert(row)) for row in rows], gathered) == [None] * 40
    assert store.commits == before + 2
    assert store.transact(Ask(Scan(AuditRow))) == tuple(rows)


def test_what_raises_is_undone_alone(store: SqliteStore, gathered: str) -> None:
    exc = LookupError("no")
    stop = KeyboardInterrupt()
    outcomes = in_one_commit(
        store,
        [Ask(SetHorizon(3)), Raising(exc), Ask(ReadTimes()), Raising(stop), Ask(SetHorizon(5))],
        gathered,
    )
    assert outcomes == [None, exc, Times(3, None), stop, None]
    assert outcomes[1] is exc
    assert store.transact(Ask(ReadTimes())).horizon == 5


def test_what_the_schema_refuses_is_undone_alone(store: SqliteStore, gathered: str) -> None:
    store.transact(boot("first"))
    (row,) = store.transact(Ask(Scan(BootRow)))
    outcomes = in_one_commit(store, [Ask(SetHorizon(3)), Ask(Insert(row)), Ask(SetHorizon(4))], gathered)
    assert outcomes[0] is outcomes[2] is None
    assert isinstance(outcomes[1], StoreError)
    assert "UNIQUE" in str(outcomes[1])
    assert store.transact(Ask(ReadTimes())).horizon == 4


def test_units_of_one_commit_see_one_another(store: SqliteStore, gathered: str) -> None:
    nonce = NonceRow(bytes(32), "boot", NOW, NOW)
    assert in_one_commit(store, [Ask(Claim(nonce))] * 3, gathered) == [True, False, False]


def fail_at_commit(store: SqliteStore, fault: Callable[[], None]) -> None:
    """Have the check before the next but one commit call ``fault``; the commit after that one is as usual."""
    check, calls = store._check_file, iter((None, fault))

    def checked() -> None:
        if call := next(calls, None):
            call()
        check()

    store._check_file = checked  # type: ignore[method-assign]


def test_a_commit_that_fails_fails_all(store: SqliteStore, gathered: str) -> None:
    granted = boot("first")
    store.transact(granted)
    before = dump(store)

    def full() -> None:
        exc = sqlite3.OperationalError("database or disk is full")
        exc.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise exc

    fail_at_commit(store, full)
    refused = Refused(Code.NONCE_INVALID, "no")
    good = sync(granted, "body", "storage")
    # The first refusal stands whatever becomes of the others. The second rests on a sync that never was.
    outcomes = in_one_commit(store, [Raising(refused), good, sync(granted, "other", "storage")], gathered)
    assert outcomes[0] is refused
    assert [type(outcome) for outcome in outcomes[1:]] == [StoreError, StoreError]
    assert outcomes[1] is not outcomes[2]
    assert all("disk is full; this transaction changed nothing" in str(outcome) for outcome in outcomes[1:])
    assert dump(store) == before
    assert not store.transact(good).replayed


def test_a_transaction_that_sqlite_ended_is_not_taken_for_a_commit(store: SqliteStore) -> None:
    def end() -> None:
        assert store._connection is not None
        _ = store._connection.execute("ROLLBACK")

    check = store._check_file
    store._check_file = end  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="no transaction is active"):
        store.transact(Ask(SetHorizon(3)))
    store._check_file = check  # type: ignore[method-assign]
    assert store.transact(Ask(ReadTimes())).horizon == 0
    with pytest.raises(Refused):
        store.transact(Raising(Refused(Code.NONCE_INVALID, "no")))
    store.transact(Ask(SetHorizon(4)))
    assert store.transact(Ask(ReadTimes())).horizon == 4


def test_an_interrupted_writer_leaves_nobody_waiting(store: SqliteStore) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fail_at_commit(store, interrupt)
    outcomes = in_one_commit(store, [Ask(SetHorizon(3)), Ask(SetHorizon(4)), Ask(SetHorizon(5))])
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyboardInterrupt", "StoreError", "StoreError"]
    assert store.transact(Ask(ReadTimes())).horizon == 0


def test_another_process_that_holds_the_file_makes_all_busy(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    with (
        closing(SqliteStore(path, busy_seconds=0.2, vault=VAULT)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        outcomes = together([lambda: store.transact(Ask(SetHorizon(3)))] * CALLERS)
        other.execute("ROLLBACK")
        assert all(isinstance(outcome, StoreBusy) for outcome in outcomes)
        assert store.transact(Ask(ReadTimes())).horizon == 0


def test_many_callers_share_commits(tmp_path: Path) -> None:
    """At most one commit per 16 syncs with 64 callers, and all syncs are there."""
    callers, rounds = 64, 4
    with closing(SqliteStore(tmp_path / "keys.db", busy_seconds=30, vault=VAULT)) as store:
        names = [[f"{caller}.{number}" for number in range(rounds)] for caller in range(callers)]
        boots = [
            [evolve(boot(name, vm=evolve(VM, name=name)), claims_per_platform=999) for name in own] for own in names
        ]
        for granted in (granted for own in boots for granted in own):
            store.transact(granted)
        before = store.commits

        def call(own: list[Any]) -> list[Any]:
            return [store.transact(sync(granted, "body", "storage")) for granted in own]

        answers = together([lambda own=own: call(own) for own in boots])  # type: ignore[misc]
        assert all(isinstance(answer, list) for answer in answers)
        assert callers * rounds >= 16 * (store.commits - before)
        assert all(row.spent_at is not None for row in store.transact(Ask(Scan(BootRow))))
