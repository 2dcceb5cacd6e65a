"""The SQL text agrees with the row classes, in both dialects."""

from __future__ import annotations

import re

import attrs
import pytest
from attrs import evolve, frozen
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.store import rows, sql
from chutes_proto.store.rows import ROWS, AuditRow, Insert, Pin, Row, Scan, StoreOp, Vm, VolumeRow
from chutes_proto.store.sql import SCHEMA_VERSION, columns, decode_rows, encode, for_driver, schema, statement


@pytest.mark.parametrize("kind", ROWS)
def test_each_table_has_the_columns_of_its_row_in_their_order(kind: type[Row]) -> None:
    (table,) = (text for text in schema("sqlite") if text.startswith(f"CREATE TABLE {kind.TABLE} ("))
    added = f"ALTER TABLE {kind.TABLE} ADD COLUMN "
    table += "".join(f"\n  {text.removeprefix(added)}" for text in schema("sqlite") if text.startswith(added))
    names = tuple(re.findall(r"^  ([a-z_]+) (?:TEXT|BIGINT|BOOLEAN|BLOB|INTEGER)", table, re.MULTILINE))
    assert names == (("id", *columns(kind)) if kind is AuditRow else columns(kind))
    key = re.search(r"PRIMARY KEY \(([^)]*)\)", table)
    if kind is not AuditRow:
        key_columns = tuple(key[1].split(", ")) if key else names[:1]
        assert key_columns == kind.KEY == columns(kind)[: len(kind.KEY)]
    for field in attrs.fields(kind):
        optional = any(word in str(field.type) for word in ("None", "Optional"))
        for column in columns_of(field):
            constraint = re.search(rf"^  {column} [A-Z]+(.*)$", table, re.MULTILINE)
            assert constraint is not None
            assert optional == ("NOT NULL" not in constraint[1] and "PRIMARY KEY" not in constraint[1]), column


def columns_of(field: attrs.Attribute[object]) -> tuple[str, ...]:
    if "Vm" in str(field.type):
        return "hotkey", "vm"
    return ("platform_kind", "platform_id") if "Pin" in str(field.type) else (field.name,)


def test_postgresql_gets_its_own_types_and_marks() -> None:
    text = "\n".join(schema("postgresql"))
    assert "BLOB" not in text
    assert "BYTEA" in text
    assert f"SET value = {SCHEMA_VERSION} WHERE name = 'schema_version'" in text
    assert for_driver(statement(Scan(AuditRow))[0], "postgresql") == statement(Scan(AuditRow))[0]
    insert, values = statement(Insert(AuditRow(1, "vm", "boot", "granted")))
    assert "%" not in insert
    assert for_driver(insert, "postgresql").count("%s") == insert.count("?") == len(values)
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


def test_every_operation_has_its_query() -> None:
    kinds = {kind for kind in vars(rows).values() if isinstance(kind, type) and issubclass(kind, StoreOp)}
    assert kinds - {StoreOp} == sql._QUERIES.keys()


def test_a_stranger_is_no_operation() -> None:
    @frozen
    class Stranger(StoreOp[None]):
        pass

    with pytest.raises(TypeError, match="Stranger is not a row operation"):
        statement(Stranger())
