"""A PostgreSQL store behind pgbouncer, of which each transaction may meet another session of the database.

The contract suite runs behind it as well, in `test_suite.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import psycopg
import pytest
from attrs import evolve

from chutes_proto.errors import FateUnknown, Refused, StoreBusy, StoreError
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.store._rows import ReadTimes, Vm
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import VAULT, VM, boot, platform
from chutes_proto.wire.codes import Code
from tests.postgres import Pooler
from tests.store.harness import together
from tests.store.test_postgres import Bereft, told, watch, watched

RACES = 40


@pytest.mark.parametrize(("mode", "sessions"), [("session", 1), ("transaction", 3)])
def test_each_transaction_has_the_settings_it_needs_in_whichever_session(
    pooler: Callable[[str], Pooler], pooled: Callable[[str], str], mode: str, sessions: int
) -> None:
    """More transactions of one kind in each session than it takes for the driver to prepare statements."""
    url = pooled(mode)
    with closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        watch(url)
        until = time.monotonic() + 60
        transactions = 0
        while len({row[-1] for row in watched(url)}) < sessions or transactions < 10 * sessions:
            assert time.monotonic() < until
            store.transact(boot(f"{transactions}"))
            transactions += 1
            if transactions % 10 == 0:
                pooler(mode).recycle()
    assert {row[:-1] for row in watched(url)} == {("serializable", "on", "off", "warning", "5s", "8s", "10s", "off")}


def test_two_machines_never_get_one_vms_passphrase(
    pooler: Callable[[str], Pooler], pooled: Callable[[str], str]
) -> None:
    """Through two servers, after the sessions that they began with have ended."""
    url = pooled("transaction")
    PostgresStore(url, make=True, vault=VAULT).close()
    with (
        closing(PostgresStore(url, busy_seconds=60, vault=VAULT)) as one,
        closing(PostgresStore(url, busy_seconds=60, vault=VAULT)) as other,
    ):
        for race in range(RACES):
            pooler("transaction").recycle()
            vm = Vm(VM.hotkey, f"vm-{race}")
            units = [evolve(boot(f"{race}.{turn}", vm=vm), platform=platform(f"{race}.{turn}")) for turn in range(2)]
            outcomes = together([partial(one.transact, units[0]), partial(other.transact, units[1])])
            (refused,) = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert isinstance(refused, Refused)
            assert refused.code == Code.PLATFORM_MISMATCH


def test_a_program_that_locks_a_table_is_named_and_another_server_is_not(pooled: Callable[[str], str]) -> None:
    """Whatever name the URL gives to servers: to end the session of one may lose what it commits."""
    url = f"{pooled('transaction')}&application_name=servers"
    with (
        closing(PostgresStore(url, busy_seconds=0.2, make=True, vault=VAULT)) as store,
        psycopg.connect(url) as server,
        psycopg.connect(url.replace("=servers", "=console")) as console,
    ):
        for other, named in ((server, ""), (console, r"; session \d+ of \w+ \(console, idle in .*\) locks boot; .*")):
            other.execute("LOCK TABLE boot")
            text = rf"another transaction takes too long \([\w ]+\){named}$"
            told(partial(store.transact, boot("first")), text, StoreBusy)
            other.rollback()


@pytest.mark.parametrize("mode", ["session", "transaction"])
def test_a_session_that_is_lost(pooled: Callable[[str], str], mode: str) -> None:
    """As without a pooler: before the commit the unit is done again, at the commit its fate is unknown."""
    url = pooled(mode)
    PostgresStore(url, make=True, vault=VAULT).close()
    with closing(PostgresStore(f"{url}&application_name=bereft", vault=VAULT)) as store:
        before, at_end = Bereft(url, at_end=False), Bereft(url, at_end=True)
        assert store.transact(before) == 0
        told(lambda: store.transact(at_end), "the connection was lost at the commit", FateUnknown)
        assert (len(before.runs), len(at_end.runs)) == (2, 1)
        assert store.transact(Ask(ReadTimes())).horizon == 1


def test_a_pooler_that_keeps_no_transaction_together_is_refused(pooled: Callable[[str], str]) -> None:
    url = pooled("statement")
    for make in (False, True):
        told(
            lambda: PostgresStore(url, make=make, vault=VAULT),  # noqa: B023
            "statement pooling mode; set pool_mode of the connection pooler to transaction or session",
            StoreError,
        )


def test_a_schema_in_the_url_is_kept_by_a_pooler_or_refused(pooled: Callable[[str], str]) -> None:
    """One that does not track it refuses it. One that does confuses sessions, if PostgreSQL (before 18) is silent."""
    url = pooled("transaction")
    PostgresStore(url, make=True, vault=VAULT).close()
    with closing(psycopg.connect(url, autocommit=True, prepare_threshold=None)) as connection:
        schemas = ("one", "other")
        for schema in schemas:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        for turn in range(5):
            for schema in schemas:
                try:
                    with closing(
                        PostgresStore(f"{url}&options=-csearch_path%3D{schema}", make=True, vault=VAULT)
                    ) as store:
                        store.transact(boot(f"{schema}-{turn}", vm=Vm(schema, VM.name)))
                except StoreError as exc:
                    assert "search_path" in str(exc)
        where = connection.execute("SELECT schemaname FROM pg_tables WHERE tablename = 'boot'").fetchall()
        assert ("public",) in where
        for (schema,) in where:
            found = connection.execute(f"SELECT DISTINCT hotkey FROM {schema}.boot".encode()).fetchall()
            assert found in ([], [(schema,)])
