"""A store's own clock is the database's, whatever the time of the machine that asks; a file has none."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import ReadTimes
from chutes_proto.testing.store_suite._parts import NOW
from chutes_proto.units.operator import StoreRestored
from tests.postgres import schema_with_clock
from tests.store.memory import MemoryStore


def test_postgresql_goes_by_the_databases_clock(database: str) -> None:
    with schema_with_clock(database) as (url, set_clock), closing(PostgresStore(url, migrate=True)) as store:
        for at in (NOW, NOW - 86_400, NOW + 86_400):
            set_clock(at)
            assert store.transact(Ask(ReadTimes())).clock == at
            assert store.transact(StoreRestored(NOW)).horizon == at + 60


def test_other_stores_have_none(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "keys.db")) as store:
        assert store.transact(Ask(ReadTimes())).clock is None
    assert MemoryStore().transact(Ask(ReadTimes())).clock is None
