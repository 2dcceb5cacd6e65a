"""A store of another schema version: refused with what to do, and left alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import psycopg
import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.store import _schema
from chutes_proto.testing.store_suite._parts import VAULT, boot, dump
from chutes_proto.units.revocations import NO_REVOCATIONS, ReadRevocations


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path, vault=VAULT)


def execute(place: StorePlace, statement: str) -> None:
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as connection, connection:
            connection.execute(statement)
    else:
        with psycopg.connect(place.address) as other:
            other.execute(statement.encode())


@pytest.mark.parametrize("version", [0, _schema.SCHEMA_VERSION + 1])
def test_another_version_is_refused_and_left_alone(place: StorePlace, version: int) -> None:
    """By who opens it, who makes it, and who has it open."""
    refusal = f"schema version {version}, and this release knows version {_schema.SCHEMA_VERSION} alone; run the"
    with closing(place.open(make=True)) as store:
        assert store.is_new
        store.transact(boot("first"))
        before = dump(store)
        execute(place, f"UPDATE fact SET value = {version} WHERE name = 'schema_version'")
        calls = (store.check, partial(store.transact, boot("second")), place.open, partial(place.open, make=True))
        for call in calls:
            with pytest.raises(StoreError, match=refusal):
                _ = call()
    execute(place, f"UPDATE fact SET value = {_schema.SCHEMA_VERSION} WHERE name = 'schema_version'")
    with closing(place.open(make=True)) as store:
        assert not store.is_new
        assert dump(store) == before


def test_a_table_that_is_gone_is_noticed_by_one_who_does_not_read_it(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the look of a server does not, which else stays ready while no boot is granted."""
    monkeypatch.setattr(marks, "LOOK_SECONDS", 0)
    with closing(place.open(make=True)) as store:
        for table in ("nonce", "generation", "head", "fact"):
            _ = store.transact(ReadRevocations(NO_REVOCATIONS))
            execute(place, f"ALTER TABLE {table} RENAME TO gone")
            for call in (partial(store.transact, ReadRevocations(NO_REVOCATIONS)), store.check):
                with pytest.raises(StoreError, match=f"(the table {table} is missing|a table is missing.*{table})"):
                    _ = call()
            with pytest.raises(StoreError):
                place.open()
            execute(place, f"ALTER TABLE gone RENAME TO {table}")


@pytest.mark.parametrize("damage", [lambda path: path.chmod(0), lambda path: path.write_bytes(b"no database" * 999)])
def test_a_file_that_cannot_be_read_is_left_alone(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    place.open().close()
    path = tmp_path / "keys.db"
    damage(path)
    content = path.read_bytes()
    try:
        place.open(make=True).close()
    except StoreError:
        assert path.read_bytes() == content
    else:  # root may open what nobody may
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute(_schema.READ_VERSION).fetchone()[0] == _schema.SCHEMA_VERSION
