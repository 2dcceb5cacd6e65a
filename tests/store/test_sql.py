"""The SQL text agrees with the row classes, in both dialects."""

from __future__ import annotations

import re
from decimal import Decimal
from functools import partial

import attrs
import pytest
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as rows
from chutes_proto.store import _sql as sql
from chutes_proto.store._macs import UNSEALED
from chutes_proto.store._rows import (
    ROWS,
    AuditRow,
    Insert,
    KeyServer,
    Pin,
    ReadKeyServers,
    ReadWhatIf,
    Row,
    Scan,
    StoreOp,
    Vm,
    VolumeRow,
    WhatIf,
)
from chutes_proto.store._sql import columns, decode, decode_rows, encode, for_driver, schema, statement
from tests.store.memory import MemoryStore


@pytest.mark.parametrize("kind", ROWS)
def test_each_table_has_the_columns_of_its_row_in_their_order(kind: type[Row]) -> None:
    store = MemoryStore()
    found = store.connection.execute(f"PRAGMA table_info({kind.TABLE})").fetchall()
    names = tuple(name for _, name, *_ in found)
    stored = columns(kind) if kind in UNSEALED else (*columns(kind), "mac")
    assert sorted(names) == sorted(("id", *stored) if kind is AuditRow else stored)
    assert [name for name in names if name not in ("id", "mac")] == list(columns(kind))
    if kind is not AuditRow:
        primary = [name for place, name in sorted((place, name) for _, name, *_, place in found) if place]
        unique = [name for _, _, name in store.connection.execute("PRAGMA index_info(gpu_declared)")]
        assert tuple(primary or unique) == kind.KEY == columns(kind)[: len(kind.KEY)]
    needed = {name for _, name, _, is_needed, _, place in found if is_needed or place}
    for field in attrs.fields(kind):
        optional = any(word in str(field.type) for word in ("None", "Optional"))
        for column in columns_of(field):
            assert optional == (column not in needed), column


def columns_of(field: attrs.Attribute[object]) -> tuple[str, ...]:
    if "Vm" in str(field.type):
        return "hotkey", "vm"
    return ("platform_kind", "platform_id") if "Pin" in str(field.type) else (field.name,)


def test_postgresql_gets_its_own_types_and_marks() -> None:
    text = "\n".join(schema("postgresql"))
    assert "BLOB" not in text
    assert "BYTEA" in text
    assert for_driver(statement(Scan(AuditRow))[0], "postgresql") == statement(Scan(AuditRow))[0]
    insert, values = statement(Insert(AuditRow(1, "vm", "boot", "granted")))
    marks = [f"${number}" for number in range(1, len(values) + 1)]
    assert re.findall(r"\$[0-9]+", for_driver(insert, "postgresql")) == marks
    assert insert.count("?") == len(values)
    assert "$" not in insert
    assert for_driver(insert, "sqlite") == insert


@given(
    st.none() | st.builds(Vm, st.text(), st.text()),
    st.none() | st.builds(Pin, st.sampled_from(["instance", "ppid"]), st.binary()),
    st.none() | st.binary(),
    st.integers(0, 2**63 - 1),
)
def test_rows_survive_the_way_through_values(vm: Vm | None, pin: Pin | None, digest: bytes | None, at: int) -> None:
    row = evolve(AuditRow(at, "vm", "boot", "granted"), vm=vm, pin=pin, quote_digest=digest)
    assert decode_rows(AuditRow, [encode(row)]) == (row,)
    assert len(encode(row)) == len(columns(AuditRow))


def test_a_number_that_stands_for_a_boolean_becomes_one() -> None:
    (row,) = decode_rows(VolumeRow, [("hotkey", "vm", "storage", 1, 0, None)])
    assert row.in_use is True
    assert row.format_allowed is False


def test_values_of_other_types_are_empty_ones_in_tables_without_macs() -> None:
    """SQLite takes any value in any column, and PostgreSQL in one that somebody changed."""
    rows = [(None, 1, b"{}", Decimal("NaN")), ("one", "0.1.0", "{}", 7)]
    assert decode(ReadKeyServers(0), rows) == (KeyServer("", "", "", 0), KeyServer("one", "0.1.0", "{}", 7))
    assert decode(ReadWhatIf(), [(Decimal("1.5"), None)]) == WhatIf(0, "")


def test_every_operation_has_its_query() -> None:
    kinds = {kind for kind in vars(rows).values() if isinstance(kind, type) and issubclass(kind, StoreOp)}
    assert kinds - {StoreOp} == sql._QUERIES.keys()


A_VM = Vm("hotkey", "vm")
A_KEY = rows.GenerationRow(A_VM, "storage", 1, "active", b"", "kek", b"", False, 1, "")
A_BOOT = rows.BootRow("b", A_VM, Pin("ppid", b""), b"", "", "", "base", b"", b"", 1, True, "", 1)
A_VERDICT = rows.AttestationRow("a", "boot", A_VM, Pin("ppid", b""), None, "", None, None, b"", "", 1)


@pytest.mark.parametrize(
    ("op", "index"),
    [
        (rows.FindLastBoot(A_VM), "boot_vm_newest"),
        (rows.FindLastBoots((A_VM, A_VM)), "boot_vm_newest"),
        (rows.FindLastBootFrom("hotkey", "192.0.2.1"), "boot_address_newest"),
        (rows.ReadGpus(("n0", "n1")), "gpu_server"),
        (rows.ReadNames("vm"), "generation_name"),
        (rows.ReadAudit(0, 9, wanted=rows.AuditWanted(name="vm")), "audit_vm"),
        (rows.ReadAudit(1 << 62, 9, True, wanted=rows.AuditWanted(hotkey="hotkey", name="vm")), "audit_vm"),
        (rows.ReadAudit(1 << 62, 9, True, wanted=rows.AuditWanted(request_id="id")), "audit_request"),
        (rows.ReadAudit(1 << 62, 9, True, wanted=rows.AuditWanted(hotkey="h", refused=True)), "audit_refused"),
        (rows.ReadOld(rows.BootRow, 9, A_BOOT, 9), "boot_created"),
        (rows.ReadOld(rows.AttestationRow, 9, A_VERDICT, 9), "attestation_created"),
        *(
            (rows.ReadPage(kind, None, 9), f"sqlite_autoindex_{kind.TABLE}_1")
            for kind in ROWS
            if kind.KEY and kind is not rows.GpuRow
        ),
        (rows.ReadPage(rows.GpuRow, None, 9), "gpu_declared"),
        (rows.FindDeclaration("uuid"), "gpu_declared"),
        (rows.ReadOtherwiseSealed("kek", 9, A_KEY), "sqlite_autoindex_generation_1"),
        (rows.ReadUnclaimed(A_VM, 9), "sqlite_autoindex_generation_1"),
        (rows.ReadRetired(9, A_VM, 9), "sqlite_autoindex_generation_1"),
        (rows.RewrapGenerations((A_KEY,) * 100), "sqlite_autoindex_generation_1"),
    ],
)
def test_an_index_finds_the_rows_and_their_order(op: StoreOp[object], index: str) -> None:
    plan = plan_of(op)
    assert any(index in step for step in plan), plan
    of_tables = [step for step in plan if re.match(r"SCAN (vm|generation|audit|boot|attestation)\b", step)]
    assert all("USING" in step for step in of_tables), plan
    # A newer SQLite sorts both halves of a UNION to merge them: no other rows than those of the answer.
    if "MERGE (UNION)" not in plan:
        assert not [step for step in plan if "TEMP B-TREE FOR ORDER" in step], plan


def test_a_page_of_the_fleet_reads_no_more_than_its_vms() -> None:
    plan = plan_of(rows.ReadFleet(A_VM, 9))
    for index in ("sqlite_autoindex_vm_1", "boot_vm_newest", "sqlite_autoindex_attestation_1"):
        assert any(index in step for step in plan), plan
    assert [step for step in plan if step.startswith("SCAN")] == ["SCAN page"], plan


def plan_of(op: StoreOp[object]) -> list[str]:
    text, values = statement(op)
    store = MemoryStore()
    return [row[3] for row in store.connection.execute(f"EXPLAIN QUERY PLAN {text}", values)]


def test_a_stranger_is_no_operation() -> None:
    @frozen
    class Stranger(StoreOp[None]):
        pass

    with pytest.raises(TypeError, match="Stranger is not a row operation"):
        statement(Stranger())


def vms_of_page(store: MemoryStore, after: tuple[str, str]) -> list[tuple[str, str]]:
    return [(row[0], row[1]) for row in store.connection.execute(*_guard_sql.next_heads(after, 30))]


def test_a_page_of_vms_costs_no_more_in_a_larger_store() -> None:
    """A page that reads the rest of each table would make `store check` quadratic."""
    steps: list[int] = []
    for count in (100, 1000):
        store = MemoryStore()
        names = [("hotkey", f"vm-{number:04}") for number in range(count)]
        for table, rest in (("volume", "'root', TRUE, FALSE, NULL, NULL"), ("head", "1, x'', x''")):
            _ = store.connection.executemany(f"INSERT INTO {table} VALUES (?, ?, {rest})", names)
        taken: list[None] = []
        store.connection.set_progress_handler(partial(taken.append, None), 1)
        page = vms_of_page(store, ("", ""))
        store.connection.set_progress_handler(None, 0)
        steps.append(len(taken))
        found: list[tuple[str, str]] = []
        while page:
            found += page
            page = vms_of_page(store, page[-1])
        assert found == names
    assert steps[1] < 1.1 * steps[0]
