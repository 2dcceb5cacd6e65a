"""A store's own clock is the database's, whatever the time of the machine that asks; a file has none."""

from __future__ import annotations

import time
from contextlib import closing
from math import inf
from pathlib import Path

import psycopg
import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import ReadTimes
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VAULT, boot, dump
from chutes_proto.units.operator import StoreRestored
from tests.postgres import replace_now, schema_with_clock
from tests.store.memory import MemoryStore
from tests.waiting import wait_until


def test_postgresql_goes_by_the_databases_clock(database: str) -> None:
    with (
        schema_with_clock(database) as (url, set_clock),
        closing(PostgresStore(url, clock_difference_seconds=inf, make=True, vault=VAULT)) as store,
    ):
        for at in (NOW, NOW - 86_400, NOW + 86_400):
            set_clock(at)
            assert store.transact(Ask(ReadTimes())).clock == at
            assert store.transact(StoreRestored(NOW)).horizon == at + 60


@pytest.mark.parametrize("apart", [-86_400, -20, 20, 86_400])
def test_a_machine_whose_clock_differs_from_the_databases_is_refused_until_it_is_right(
    database: str, apart: int
) -> None:
    """When it connects and later: rows would be dated by two clocks."""
    told = r"the database's clock says 20.*Z, and this machine's says 20.*Z; they may differ by 5 seconds"
    with schema_with_clock(database) as (url, _), psycopg.connect(url, autocommit=True) as connection:
        replace_now(connection, "clock_timestamp()")
        with closing(PostgresStore(url, make=True, vault=VAULT)) as store:
            before = dump(store)
            replace_now(connection, f"clock_timestamp() + {apart} * interval ''1 s''")
            for _ in range(2):
                with pytest.raises(StoreError, match=told) as caught:
                    store.transact(boot("first"))
                assert type(caught.value) is StoreError
            with pytest.raises(StoreError, match=told):
                PostgresStore(url, vault=VAULT)
            PostgresStore(url, clock_difference_seconds=abs(apart) + 5, vault=VAULT).close()
            replace_now(connection, "clock_timestamp()")
            assert dump(store) == before
            store.transact(boot("first"))


def test_the_text_is_the_same_until_the_difference_is_another(database: str) -> None:
    """A server asks every second, and logs each new text."""
    with schema_with_clock(database) as (url, _), psycopg.connect(url, autocommit=True) as connection:
        replace_now(connection, "clock_timestamp()")
        with closing(PostgresStore(url, make=True, vault=VAULT)) as store:

            def told(apart: int) -> str:
                replace_now(connection, f"clock_timestamp() + {apart} * interval ''1 s''")
                with pytest.raises(StoreError, match="the database's clock says") as caught:
                    store.transact(Ask(ReadTimes()))
                return str(caught.value)

            began_at, first = time.time(), told(3600)
            _ = wait_until(lambda: time.time() > began_at + 1.1)  # the times are told in seconds
            assert told(3600) == told(3603) == first
            assert len({first, told(-3600), last := told(3610)}) == 3
            replace_now(connection, "clock_timestamp()")
            _ = store.transact(Ask(ReadTimes()))
            _ = wait_until(lambda: time.time() > began_at + 2.2)
            assert told(3610) != last


def test_other_stores_have_none(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
        assert store.transact(Ask(ReadTimes())).clock is None
    assert MemoryStore().transact(Ask(ReadTimes())).clock is None
