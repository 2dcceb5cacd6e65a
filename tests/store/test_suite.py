"""Every store keeps the contract; and a store that breaks it in any of many ways is found out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
from attrs import evolve

from chutes_proto.store._rows import (
    BootRow,
    Claim,
    CountClaims,
    CountRefusals,
    Insert,
    NonceRow,
    Put,
    Read,
    ReadBootVolumes,
    ReadTimes,
    Row,
    SetHorizon,
    StoreOp,
    SweepNonces,
    Times,
    UpdateGeneration,
    VmRow,
    VoidTokens,
)
from chutes_proto.store._run import Store, Unit, run_script
from chutes_proto.store._sql import encode, statement
from chutes_proto.testing.store_suite import CASES, Case, Harness
from chutes_proto.testing.store_suite._parts import DAY, NOW
from chutes_proto.testing.store_suite._transactions import a_unit_that_raises_leaves_no_trace
from tests.store.bindings import BindingHarness
from tests.store.harness import (
    MemoryHarness,
    PostgresHarness,
    SharedPostgresHarness,
    SharedSqliteHarness,
    SqliteHarness,
    together,
)
from tests.store.memory import MemoryStore

T = TypeVar("T")


STORES = [
    *("memory", "sqlite", "sqlite-shared", "postgresql", "postgresql-shared"),
    *("pgbouncer-session", "pgbouncer-transaction"),
]


@pytest.fixture(params=STORES)
def harness(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Harness]:
    with closing(make(request.param, request, tmp_path)) as harness:
        yield harness


def make(name: str, request: pytest.FixtureRequest, folder: Path) -> Any:
    match name:
        case "memory":
            return MemoryHarness()
        case "sqlite":
            return SqliteHarness(folder)
        case "sqlite-shared":
            return SharedSqliteHarness(folder)
        case "pgbouncer-session" | "pgbouncer-transaction":
            pooler = request.getfixturevalue("pooler")(name.removeprefix("pgbouncer-"))
            return PostgresHarness(pooler.before(request.getfixturevalue("migrated_database")))
        case _:
            kind = PostgresHarness if name == "postgresql" else SharedPostgresHarness
            return kind(request.getfixturevalue("migrated_schema"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_contract(case: Case, harness: Harness) -> None:
    case(harness)


BINDINGS = [("trio", "sqlite-shared"), ("asyncio", "postgresql-shared")]


@pytest.mark.no_cover  # to measure what other tests cover doubles the time
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize(("binding", "store"), BINDINGS)
def test_contract_behind_a_binding(
    case: Case, binding: str, store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same with each binding's performer between; it does with every store alike."""
    with closing(BindingHarness(binding, make(store, request, tmp_path))) as harness:
        case(harness)


# --- the suite bites ---

Perform = Callable[[StoreOp[Any]], Any]
Fault = Callable[[MemoryStore, StoreOp[Any], Perform], Any]


def forget(kind: type[StoreOp[Any]], reply: object = None) -> Fault:
    """A store that does not carry out one kind of operation."""

    def fault(_: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
        return reply if isinstance(op, kind) else perform(op)

    return fault


def read_nothing(kind: type[Row]) -> Fault:
    """A store that finds no row of one kind by its key."""
    return lambda _, op, perform: None if isinstance(op, Read) and op.kind is kind else perform(op)


def claim_nothing(kind: type[Row]) -> Fault:
    """A store that says it added a row of one kind, and did not."""
    return lambda _, op, perform: True if isinstance(op, Claim) and isinstance(op.row, kind) else perform(op)


def spend_nothing(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    return None if isinstance(op, Put) and isinstance(op.row, BootRow) else perform(op)


def void_all(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    if isinstance(op, VoidTokens):
        statement = "UPDATE boot SET voided_at = ? WHERE voided_at IS NULL"
        return store.connection.execute(statement, (op.at,)).fetchone()
    return perform(op)


def prune_deletes(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    if isinstance(op, UpdateGeneration) and op.row.state == "retired":
        key = "(hotkey, vm, volume, generation) = (?, ?, ?, ?)"
        return store.connection.execute(
            f"DELETE FROM generation WHERE {key}", encode(op.row)[: len(op.row.KEY)]
        ).fetchone()
    return perform(op)


def overwrite(store: MemoryStore, row: Row) -> object:
    """Whatever other rows there are with the same key."""
    text, values = statement(Insert(row))
    return store.connection.execute(text.replace("INSERT", "INSERT OR REPLACE"), values).fetchone()


def update_overwrites_key(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    return overwrite(store, op.row) if isinstance(op, UpdateGeneration) else perform(op)


def insert_overwrites(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    return overwrite(store, op.row) if isinstance(op, Insert) else perform(op)


def sweep_all(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    return perform(evolve(op, limit=10**6) if isinstance(op, SweepNonces) else op)


def sweep_young(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    return perform(evolve(op, until=10**12) if isinstance(op, SweepNonces) else op)


def sweep_by_redemption(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    """Takes also what a clock that was ahead has issued for a time to come."""
    if not isinstance(op, SweepNonces):
        return perform(op)
    _ = store.connection.execute("UPDATE nonce SET issued_at = min(issued_at, redeemed_at)")
    return perform(op)


def horizon_sticks(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    """A horizon that only rises, as it does at a sweep."""
    return None if isinstance(op, SetHorizon) and op.to < perform(ReadTimes()).horizon else perform(op)


def with_clock(clock: int | None) -> Fault:
    """Not a fault: a store that may have a clock of its own."""

    def fault(_: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
        reply = perform(op)
        return evolve(reply, clock=clock) if isinstance(reply, Times) else reply

    return fault


def volumes_backwards(store: MemoryStore, op: StoreOp[Any], perform: Perform) -> object:
    reply = perform(op)
    return reply[::-1] if isinstance(op, ReadBootVolumes) else reply


class Faulty(MemoryStore):
    """A memory store with one fault in its operations."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self._fault = fault

    def perform(self, op: StoreOp[Any]) -> Any:
        return self._fault(self, op, super().perform)


class NoRollBack(MemoryStore):
    def transact(self, unit: Unit[T]) -> T:
        return run_script(unit.script(), self.perform)


class CommitsAtRefusal(MemoryStore):
    """Keeps what a refused script wrote: the classic of a ``finally: commit``."""

    def transact(self, unit: Unit[T]) -> T:
        _ = self.connection.execute("BEGIN")
        try:
            return run_script(unit.script(), self.perform)
        finally:
            _ = self.connection.execute("COMMIT")


class LastWriterWins:
    """Transactions that do not see one another: the last to commit undoes the others."""

    def __init__(self) -> None:
        self._image = MemoryStore().image()

    def transact(self, unit: Unit[T]) -> T:
        copy = MemoryStore(self._image)
        result = copy.transact(unit)
        time.sleep(0.005)
        self._image = copy.image()
        return result


class Open:
    """A harness without a lock around its store."""

    together = staticmethod(together)

    def __init__(self, store: Store) -> None:
        self._store = store

    def open(self) -> Store:
        return self._store


FAULTS: dict[str, Callable[[], Harness]] = {
    **{
        name: lambda fault=fault: MemoryHarness(Faulty(fault))  # type: ignore[misc]
        for name, fault in {
            "spend nothing": spend_nothing,
            "redeem nothing": claim_nothing(NonceRow),
            "void nothing": forget(VoidTokens),
            "void all": void_all,
            "sweep nothing": forget(SweepNonces, ()),
            "sweep all": sweep_all,
            "sweep young": sweep_young,
            "sweep by redemption": sweep_by_redemption,
            "no horizon": forget(SetHorizon),
            "horizon sticks": horizon_sticks,
            "horizon unread": forget(ReadTimes, Times(0, None)),
            "no claims": read_nothing(VmRow),
            "claims uncounted": forget(CountClaims, 0),
            "refusals uncounted": forget(CountRefusals, 0),
            "no boots": read_nothing(BootRow),
            "nothing updated": forget(UpdateGeneration),
            "prune deletes": prune_deletes,
            "update overwrites the key": update_overwrites_key,
            "insert overwrites": insert_overwrites,
            "volumes backwards": volumes_backwards,
        }.items()
    },
    "no roll-back": lambda: MemoryHarness(NoRollBack()),
    "commits at a refusal": lambda: MemoryHarness(CommitsAtRefusal()),
    "last writer wins": lambda: Open(LastWriterWins()),
}


@pytest.mark.no_cover  # to measure what other tests cover doubles the time
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_store_is_found_out(fault: str) -> None:
    quick_first = sorted(CASES, key=lambda case: case is a_unit_that_raises_leaves_no_trace)
    assert any(_fails(case, FAULTS[fault]()) for case in quick_first)


def _fails(case: Case, harness: Harness) -> bool:
    try:
        case(harness)
    except Exception:  # noqa: BLE001 - however a case fails
        return True
    return False


@pytest.mark.parametrize("clock", [None, NOW + 1000 * DAY], ids=["no clock", "a clock"])
def test_a_sound_store_behind_the_same_harness_is_not(clock: int | None) -> None:
    assert not any(_fails(case, MemoryHarness(Faulty(with_clock(clock)))) for case in CASES)
