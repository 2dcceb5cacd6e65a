"""The few rows without which nothing holds: a store that has lost one of them is damaged, and says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from chutes_proto.errors import StoreError
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.store._rows import BootRow, ReadTimes, Scan
from chutes_proto.store._run import Ask
from chutes_proto.store._sql import SCHEMA_VERSION
from chutes_proto.testing.store_suite._parts import VAULT, boot

DAMAGED = "it is damaged: a row of the table fact is missing; stop the server and restore a backup"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("migrated_schema")
    place = StorePlace(address, tmp_path, vault=VAULT)
    place.open(make=True).close()
    return place


def change(place: StorePlace, statement: str) -> None:
    """As someone does who should not."""
    if place.path:
        with closing(sqlite3.connect(place.path)) as file, file:
            file.execute(statement)
    else:
        with psycopg.connect(place.address) as connection:
            connection.execute(statement.encode())


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(StoreError, match=DAMAGED) as caught:
        call()
    assert type(caught.value) is StoreError


@pytest.mark.parametrize("fact", ["schema_version", "nonce_horizon"])
def test_a_lost_fact_is_damage(place: StorePlace, fact: str) -> None:
    with closing(place.open()) as store:
        store.transact(boot("first"))
        change(place, f"DELETE FROM fact WHERE name = '{fact}'")
        for _ in range(2):
            refused(lambda: store.transact(boot("second")))
            refused(store.check)
        change(place, f"INSERT INTO fact VALUES ('{fact}', {SCHEMA_VERSION if fact == 'schema_version' else 0})")
        assert len(store.transact(Ask(Scan(BootRow)))) == 1
        store.check()


@pytest.mark.parametrize("fact", ["schema_version", "nonce_horizon"])
@pytest.mark.parametrize("make", [False, True])
def test_a_store_that_has_lost_a_fact_is_neither_opened_nor_made(place: StorePlace, fact: str, make: bool) -> None:
    change(place, f"DELETE FROM fact WHERE name = '{fact}'")
    refused(lambda: place.open(make=make))


def test_a_unit_that_asks_for_no_lost_fact_goes_on(place: StorePlace) -> None:
    with closing(place.open()) as store:
        change(place, "DELETE FROM fact WHERE name = 'nonce_horizon'")
        assert store.transact(Ask(Scan(BootRow))) == ()
        refused(lambda: store.transact(Ask(ReadTimes())))
