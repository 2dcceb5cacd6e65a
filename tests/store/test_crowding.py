"""Transactions of unrelated VMs that conflict in PostgreSQL: fewer run at once, and hardly one is rolled back."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import StoreBusy
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.store import _guard_sql
from chutes_proto.store import _sql as sql
from chutes_proto.store._crowding import Crowding
from chutes_proto.store._rows import (
    AuditWanted,
    FindLastBoot,
    FindLastBootFrom,
    FindLastBoots,
    Read,
    ReadAudit,
    ReadLiveGenerations,
    ReadTimes,
    ReadVmVersions,
    StoreOp,
    Vm,
    VmRow,
)
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import VAULT, VM, boot, platform, sync
from tests.conftest import SOAK
from tests.store.harness import Gate, together

ROLLBACKS = 0.1
"""The most rollbacks for each boot, of VMs that have booted before or not."""


@given(st.integers(1, 64), st.lists(st.booleans(), max_size=300))
def test_the_limit_stays_within_its_bounds_and_follows(most: int, conflicts: list[bool]) -> None:
    crowding = Crowding(most)
    for conflicted in conflicts:
        before = crowding.allowed
        crowding.conflicted() if conflicted else crowding.committed()
        assert 1 <= crowding.allowed <= most
        assert crowding.allowed <= before if conflicted else crowding.allowed >= before
    for _ in range(100 * most):
        crowding.committed()
    assert crowding.allowed == most
    for _ in range(10):
        crowding.conflicted()
    assert crowding.allowed == 1


@pytest.mark.parametrize("clients", [16, 64])
def test_boots_of_unrelated_vms_are_hardly_rolled_back(
    migrated_schema: str, clients: int, figure: Callable[[str], None]
) -> None:
    """All VMs are neighbours in every index, and boot for the first time at once: the worst herd."""
    boots = 40 if SOAK else 320 // clients
    took: list[float] = []

    def live(store: PostgresStore, number: int) -> None:
        for index in range(boots):
            granted = boot(f"{number}.{index}", vm=Vm(VM.hotkey, f"vm-{number}"))
            granted = evolve(granted, platform=platform(f"{number}"))
            began = time.perf_counter()
            store.transact(granted)
            store.transact(sync(granted, "body", "storage", "tdx-cache"))
            took.append(time.perf_counter() - began)

    with closing(PostgresStore(migrated_schema, connections=clients, busy_seconds=60, vault=VAULT)) as store:
        assert together([partial(live, store, number) for number in range(clients)]) == []
        of_each = store.retries / (clients * boots)
        slow = sorted(took)[len(took) * 99 // 100]
        figure(f"{of_each:.2f} rollbacks for each boot {dict(store.rollbacks)}, p99 {slow:.2f} s")
    assert of_each <= ROLLBACKS


MANY = """
INSERT INTO vm SELECT md5(n::text), 'vm-' || n, 'instance', sha256(n::text::bytea), sha256(n::text::bytea),
  sha256(n::text::bytea), TRUE, 'base', 1, 1 FROM generate_series(1, {many}) AS n;
INSERT INTO boot SELECT md5(n::text), md5(n::text), 'vm-' || n, 'instance', sha256(n::text::bytea), '',
  'profile', '1', 'base', '', sha256(n::text::bytea), 1, TRUE, '192.0.2.1', n FROM generate_series(1, {many}) AS n;
INSERT INTO boot_volume SELECT boot_id, 'storage', 0, 1, NULL, TRUE FROM boot;
INSERT INTO volume SELECT hotkey, vm, 'storage', TRUE, FALSE FROM vm;
INSERT INTO generation SELECT hotkey, vm, 'storage', 1, 'active', '', 'kek', '', FALSE, 1, '' FROM vm;
ANALYZE;
"""
"""The rows of as many VMs, of a hotkey and a name each, on platforms of the kind that boots come from.

The index of platforms begins with the kind: those of another one would be no neighbours of these."""

AUDITED = b"""
INSERT INTO audit (at, actor, event, decision, reason, hotkey, vm, boot_id, request_id, keys, peer_address)
  SELECT created_at, 'vm', 'boot', CASE WHEN created_at % 10 = 0 THEN 'refused' ELSE 'granted' END, '', hotkey, vm,
  boot_id, boot_id, '', peer_address FROM boot;
ANALYZE audit;
"""
"""An audit row for each of their boots."""


def test_each_question_finds_its_rows_by_an_index(migrated_schema: str) -> None:
    """That of a boot not by one in which VMs of other hotkeys with like names are neighbours, so that all conflict."""
    vm = Vm("hotkey", "vm-1")
    newest = partial(ReadAudit, 1 << 62, 100, backwards=True)
    expected: list[tuple[StoreOp[Any], str]] = [
        (Read(VmRow, vm), "vm_pkey"),
        (ReadLiveGenerations(vm), "generation_pkey"),
        (FindLastBoot(vm), "boot_vm_newest"),
        (FindLastBootFrom("hotkey", "192.0.2.1"), "boot_address_newest"),
        (newest(), "audit_pkey"),
        (newest(wanted=AuditWanted(hotkey="hotkey", name="vm-1")), "audit_vm"),
        (newest(wanted=AuditWanted(request_id="request")), "audit_request"),
        (newest(wanted=AuditWanted(hotkey="hotkey", refused=True)), "audit_refused"),
    ]
    with psycopg.connect(migrated_schema, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(MANY.format(many=2000).encode())
        connection.execute(AUDITED)
        for op, index in expected:
            text, values = sql.statement(op)
            found = connection.execute(f"EXPLAIN {sql.for_driver(text, 'postgresql')}".encode(), values).fetchall()
            scans = [line for (line,) in found if "Scan" in line]
            assert scans
            assert all(re.search(rf"(using|on) {index}\b", line) for line in scans if "Bitmap Heap" not in line), found


@pytest.mark.parametrize(
    "statement",
    [
        sql.statement(FindLastBoots(tuple(Vm("hotkey", f"vm-{n}") for n in range(30)))),
        _guard_sql.boots_since({("hotkey", f"vm-{n}"): 1 for n in range(30)}),
    ],
    ids=["newest", "since"],
)
def test_a_list_of_servers_reads_not_all_boots(migrated_schema: str, statement: tuple[str, tuple[Any, ...]]) -> None:
    """Every boot that is granted meanwhile would conflict with it."""
    text, values = statement
    with psycopg.connect(migrated_schema, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(MANY.format(many=10_000).encode())
        connection.execute(b"SET LOCAL enable_seqscan = off")
        found = connection.execute(f"EXPLAIN {sql.for_driver(text, 'postgresql')}".encode(), values).fetchall()
    scans = [(line, after) for (line,), (after,) in pairwise(found) if "Scan using boot" in line]
    assert scans
    assert all("Index Cond" in after for _, after in scans), found


LOGGED = """
INSERT INTO audit (at, actor, event, decision, reason, hotkey, vm, keys, peer_address, idx, vm_version)
  SELECT n, 'vm', 'boot', 'granted', '', 'hotkey', 'vm-' || n, '', '', n, 1 FROM generate_series(1, 2000) AS n;
ANALYZE audit;
INSERT INTO audit (at, actor, event, decision, reason, hotkey, vm, keys, peer_address, idx, vm_version)
  SELECT n, 'vm', 'boot', 'granted', '', 'hotkey', 'vm-1', '', '', 2000 + n, n FROM generate_series(1, 300) AS n;
"""
"""The log where one VM has booted often, and the others once: PostgreSQL takes the rows of each VM for few."""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (_guard_sql.READ_HEAD, ("hotkey", "vm-1") * 2),
        _guard_sql.read_heads([("hotkey", "vm-1")]),
        sql.statement(ReadVmVersions((Vm("hotkey", "vm-1"),))),
    ],
)
def test_the_version_that_the_log_knows_is_one_row_however_often_a_vm_has_booted(
    migrated_schema: str, text: str, values: tuple[object, ...]
) -> None:
    """Of many rows PostgreSQL notes the whole table, and every boot would conflict with every other one."""
    with psycopg.connect(migrated_schema, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(LOGGED.encode())
        connection.execute(b"SET LOCAL enable_seqscan = off")
        explained = f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql.for_driver(text, 'postgresql')}".encode()
        found = [line for (line,) in connection.execute(explained, values)]
        (row,) = connection.execute(sql.for_driver(text, "postgresql").encode(), values).fetchall()
    assert 300 in row
    (scan,) = [line for line in found if " on audit " in line]
    # From PostgreSQL 18 on rows are counted with two decimals.
    assert re.search(r"using audit_version on audit \(actual rows=1(\.00)? ", scan), found


@pytest.mark.skipif(not SOAK, reason="it runs in make soak: a store is filled before")
@pytest.mark.parametrize("clients", [16, 64])
def test_boots_of_unrelated_vms_at_four_servers_are_hardly_rolled_back(
    migrated_schema: str, clients: int, figure: Callable[[str], None]
) -> None:
    """The VMs of hotkeys of their own, in a store that has many: their rows are neighbours by chance alone."""
    boots = 640 // clients
    PostgresStore(migrated_schema, vault=VAULT).close()  # it is sealed, so that no server looks for rows
    with psycopg.connect(migrated_schema, cursor_factory=psycopg.RawCursor) as connection:
        connection.execute(MANY.format(many=100_000).encode())

    def live(store: PostgresStore, number: int) -> None:
        for index in range(boots):
            name = f"{number}.{index}"
            vm = Vm(hashlib.sha256(name.encode()).hexdigest(), f"vm-{name}")
            granted = evolve(boot(name, vm=vm), platform=platform(name))
            store.transact(granted)
            store.transact(sync(granted, "body", "storage", "tdx-cache"))

    with ExitStack() as opened:
        each = clients // 4
        servers = [PostgresStore(migrated_schema, connections=each, busy_seconds=60, vault=VAULT) for _ in range(4)]
        for server in servers:
            opened.callback(server.close)
        works = [
            partial(live, server, at * each + number) for at, server in enumerate(servers) for number in range(each)
        ]
        assert together(works) == []
        of_each = sum(server.retries for server in servers) / (clients * boots)
        units = [dict(server.rollbacks) for server in servers]
        figure(f"{of_each:.2f} rollbacks for each boot at four servers: {units}")
    assert of_each <= ROLLBACKS


@pytest.fixture
def one_at_a_time(migrated_schema: str) -> Iterator[PostgresStore]:
    with closing(PostgresStore(migrated_schema, connections=8, busy_seconds=30, vault=VAULT)) as store:
        for _ in range(10):
            store._pool.slots.crowding.conflicted()
        yield store


def test_a_slot_goes_to_the_first_that_waits_and_one_that_left_is_passed_over(one_at_a_time: PostgresStore) -> None:
    store, gate = one_at_a_time, Gate()
    done: list[int] = []
    threads = [threading.Thread(target=store.transact, args=(gate,))]
    threads[0].start()
    assert gate.inside.wait(60)
    store._pool._busy_seconds = 0.01
    with pytest.raises(StoreBusy, match="other transactions take too long"):
        store.transact(Ask(ReadTimes()))
    store._pool._busy_seconds = 30
    assert not store._pool.slots._waiting

    def follow(number: int) -> None:
        store.transact(Ask(ReadTimes()))
        done.append(number)

    threads += [threading.Thread(target=follow, args=(number,)) for number in range(3)]
    for thread in threads[1:]:
        thread.start()
    gate.leave.set()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == [0, 1, 2]
    assert store._pool.slots._held == 0
