"""A revocation that was committed before a grant is never missed, on both stores, whatever runs at that moment."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve, field, frozen

from chutes_proto.errors import Refused
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.store._rows import (
    AuditRow,
    BootRow,
    Forget,
    Insert,
    Platform,
    Put,
    Read,
    ReadTimes,
    Scan,
    StoreOp,
    VmRow,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, boot, read, sync
from chutes_proto.units.revocations import (
    NO_REVOCATIONS,
    ReadParty,
    ReadRevocations,
    Revoke,
    check_boot_allowed,
    subject_of,
)
from chutes_proto.wire.codes import Code
from tests.waiting import wait_until

REVOKE = Revoke(NOW, 7, "vm", subject_of(VM), None, "race")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DurableStore]:
    sqlite = f"sqlite:{tmp_path}/keys.db"
    address: str = sqlite if request.param == "sqlite" else request.getfixturevalue("migrated_schema")
    with closing(StorePlace(address, tmp_path, vault=VAULT).open(make=True)) as opened:
        yield opened


@frozen
class Held(Unit[Any]):
    """A unit that waits before its first operation of a kind; a boot that comes to an `Insert` has checked all."""

    unit: Unit[Any]
    before: type[StoreOp[Any]] = Insert
    inside: threading.Event = field(factory=threading.Event)
    leave: threading.Event = field(factory=threading.Event)

    @property
    def ALONE(self) -> bool:  # type: ignore[override]  # noqa: N802
        return self.unit.ALONE

    def script(self) -> Script[Any]:
        script: Generator[Any, Any, Any] = self.unit.script()
        reply: Any = None
        while True:
            try:
                op = script.send(reply)
            except StopIteration as stop:
                return stop.value
            if isinstance(op, self.before):
                self.inside.set()
                assert self.leave.wait(60)
            reply = yield from op


def test_a_revocation_waits_for_the_grants_that_it_was_not_seen_by(store: DurableStore) -> None:
    held = Held(boot("1"))
    threads = [threading.Thread(target=store.transact, args=(unit,)) for unit in (held, REVOKE)]
    threads[0].start()
    assert held.inside.wait(60)
    threads[1].start()
    _ = wait_until(lambda: is_waiting(store) or not threads[1].is_alive())
    held.leave.set()
    for thread in threads:
        thread.join(60)
    audit = store.transact(Ask(Scan(AuditRow)))  # in the order in which they were written
    assert [row.event for row in audit] == ["boot", "vm revoked"]
    (claim,) = store.transact(ReadParty("vm", vm=VM))
    assert claim == store.transact(Ask(Scan(VmRow)))[0]
    refused(store, boot("2"))


def is_waiting(store: Any) -> bool:
    """Whether a unit waits for another one."""
    return bool(store._waiting) if hasattr(store, "_waiting") else waiting(store) > 0


def waiting(store: Any) -> int:
    """The number of sessions of PostgreSQL that wait for a lock."""
    with closing(store._database.connect()) as connection:
        waits = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return len(connection.execute(waits).fetchall())


def test_nothing_begins_beside_a_revocation(migrated_schema: str, tmp_path: Path) -> None:
    """Two that had begun both would wait for each other, until the database ends one of them after a second."""
    with ExitStack() as opened:
        places = (StorePlace(migrated_schema, tmp_path, vault=VAULT) for _ in range(3))
        stores: list[Any] = [opened.enter_context(closing(place.open())) for place in places]
        second = evolve(REVOKE, version=8, kind="hotkey", subject=VM.hotkey)
        units = [Held(REVOKE, before=Put), Held(second, before=Put), Held(ReadRevocations(), before=ReadTimes)]
        threads = [
            threading.Thread(target=store.transact, args=(unit,)) for store, unit in zip(stores, units, strict=True)
        ]
        for thread in threads:
            thread.start()
            assert units[0].inside.wait(60)
        _ = wait_until(lambda: waiting(stores[0]) == 2)
        assert [unit.inside.is_set() for unit in units] == [True, False, False]
        for unit in units:
            unit.leave.set()
        for thread in threads:
            thread.join(60)
        assert [dict(store.rollbacks) for store in stores] == [{}, {}, {}]
        assert len(stores[0].transact(ReadRevocations()).rows) == 2


def refused(store: DurableStore, unit: Unit[Any]) -> None:
    with pytest.raises(Refused) as caught:
        store.transact(unit)
    assert caught.value.code == Code.REVOKED


@frozen
class LaterRequest(Unit[None]):
    """The check of a later request of a boot."""

    boot_id: str

    def script(self) -> Script[None]:
        granted = yield from Read(BootRow, self.boot_id)
        assert granted is not None
        yield from check_boot_allowed(NO_REVOCATIONS, (yield from ReadTimes()), NOW, granted)


ELSEWHERE = VmRow.of(VM, Platform(bytes(16), bytes(16)), NOW)


@pytest.mark.parametrize("since", [Forget(VmRow, VM), Put(ELSEWHERE)], ids=["free", "another platform's"])
def test_a_platform_is_revoked_by_its_boots_row_alone(store: DurableStore, since: StoreOp[None]) -> None:
    """The VM's name may be free, or another platform's, since that boot."""
    granted = boot("1")
    _ = store.transact(granted)
    store.transact(LaterRequest(granted.boot_id))
    store.transact(evolve(REVOKE, kind="platform", subject=str(granted.platform.pin)))
    store.transact(Ask(since))
    refused(store, LaterRequest(granted.boot_id))


def test_of_many_at_once_none_is_granted_later(store: DurableStore) -> None:
    known = store.transact(ReadRevocations())
    granted = boot("0")
    _ = store.transact(granted)
    revoked = threading.Event()
    late: list[str] = []

    def ask(number: int) -> None:
        for turn in range(40):
            is_late = revoked.is_set()
            unit = evolve(boot(f"{number} {turn}"), revocations=known)
            try:
                _ = store.transact(unit)
            except Refused as exc:
                assert exc.code == Code.REVOKED
                return
            if is_late:
                late.append(f"{number} {turn}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    store.transact(REVOKE)
    revoked.set()
    for thread in threads:
        thread.join(120)
    assert not late
    refused(store, sync(granted, "body", "storage"))
    refused(store, read(granted, "storage"))


def test_a_backup_holds_no_revocation_up(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """pg_dump holds its lock on every table for as long as it runs."""
    with closing(StorePlace(request.getfixturevalue("migrated_schema"), tmp_path, vault=VAULT).open()) as store:
        holder: Any = store
        with closing(holder._database.connect()) as backup:
            _ = backup.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; LOCK TABLE fact IN ACCESS SHARE MODE")
            store.transact(REVOKE)
            _ = backup.execute("ROLLBACK")


@pytest.mark.parametrize("store", ["postgresql"], indirect=True)
@pytest.mark.parametrize("long", ["check", "snapshot"])
def test_no_reading_of_the_whole_store_holds_a_revocation_up(store: DurableStore, long: str) -> None:
    """Checks, copies and exports of a large store take minutes, and grant nothing."""
    if long == "snapshot":
        with store.snapshot() as rows:
            assert rows.transact(ReadRevocations()).rows == {}
            store.transact(REVOKE)
            assert rows.transact(ReadRevocations()).rows == {}
    else:
        told = list[bool]()

        def tell(_: int, __: int) -> None:
            if not told:
                told.append(True)
                store.transact(REVOKE)

        assert store.check(tell)["revocation"] == 0
    refused(store, boot("1"))
