"""A store of an older release: refused with what to do, left alone, and migrated when an operator says so."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path

import psycopg
import pytest
from attrs import evolve

from chutes_proto.errors import StoreError
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.postgres import migration
from chutes_proto.store import _schema
from chutes_proto.store._run import Ask
from chutes_proto.store._schema import Step
from chutes_proto.store.rows import (
    Claim,
    DeleteServer,
    FindDeclaration,
    GpuRow,
    ReadGpus,
    ReadTimes,
    Scan,
    SetHorizon,
)
from chutes_proto.testing.store_suite._parts import boot, dump, sync
from chutes_proto.units.revocations import NO_REVOCATIONS, ReadRevocations
from tests.store.harness import Gate
from tests.waiting import wait_until

CURRENT = _schema.STEPS
EXPANSION = Step(
    "CREATE TABLE owner (name TEXT); ALTER TABLE vm ADD COLUMN note TEXT; ALTER TABLE boot ADD COLUMN note TEXT",
    compatible_since=len(CURRENT),
    indexes=("CREATE INDEX boot_profile ON boot (profile_name)",),
)
"""Servers of this release can live with it."""


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path)


def set_release(monkeypatch: pytest.MonkeyPatch, *steps: Step) -> None:
    """From here on this is a release with these steps."""
    monkeypatch.setattr(_schema, "STEPS", steps)
    monkeypatch.setattr(_schema, "SCHEMA_VERSION", len(steps))


@pytest.mark.parametrize("version", range(1, len(CURRENT)))
def test_each_older_schema_becomes_ours(place: StorePlace, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_release(monkeypatch, *CURRENT[:version])
    place.open(migrate=True).close()
    set_release(monkeypatch, *CURRENT)
    with pytest.raises(
        StoreError, match=f"schema version {version}, .*; run `chutes-proto store migrate`; nothing in it was changed"
    ):
        place.open()
    with closing(place.open(migrate=True)) as store:
        assert store.found_version == version
        granted = boot("first")
        store.transact(granted)
        store.transact(sync(granted, "body", "storage"))
        assert store.check()["boot"] == 1


def test_declared_gpus_are_kept_and_are_nobodys_from_version_3_on(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of version 2 goes on beside the migration: it writes its rows, with a uuid of its own."""
    set_release(monkeypatch, *CURRENT[:2])
    place.open(migrate=True).close()
    servers = ", ".join(f"('n{n}', 'r{n}', 'hotkey', 'name {n}', 'host', '192.0.2.{n}', 1)" for n in range(3))
    names = "server_id, registration, hotkey, name, host, address, created_at"
    execute(place, f"INSERT INTO server ({names}) VALUES {servers}")
    declare = "INSERT INTO gpu (uuid, server_id, identifier, declared) VALUES ('{}', '{}', 'h200', '{{}}')"
    execute(place, declare.format("gpu", "n0"))
    set_release(monkeypatch, *CURRENT)
    with closing(place.open(migrate=True)) as store:
        execute(place, f"{declare.format('other', 'n1')} ON CONFLICT DO NOTHING")
        row = GpuRow("gpu", "n0", "h200", "{}")
        claims = [store.transact(Ask(Claim(evolve(row, server_id=server)))) for server in ("n0", "n2")]
        assert claims == [False, True]
        assert store.transact(Ask(FindDeclaration("gpu"))) == "n0"
        assert store.transact(Ask(ReadGpus(("n0",)))) == (row,)
        store.transact(Ask(DeleteServer("n0")))
        assert [gpu.server_id for gpu in store.transact(Ask(Scan(GpuRow)))] == ["n2", "n1"]


def execute(place: StorePlace, statement: str) -> None:
    """As a server of another release."""
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as connection, connection:
            connection.execute(statement)
    else:
        with psycopg.connect(place.address) as other:
            other.execute(statement.encode())


def test_a_newer_release_keeps_the_rows_and_the_older_one_refuses_them(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(place.open(migrate=True)) as store:
        assert store.found_version is None
        store.transact(boot("first"))
        before = dump(store)
    set_release(monkeypatch, *CURRENT, Step("CREATE TABLE owner (name TEXT)"))
    with pytest.raises(StoreError, match="run `chutes-proto store migrate`"):
        place.open()
    with closing(place.open(migrate=True)) as store:
        assert store.found_version == len(CURRENT)
        assert dump(store) == before
    with closing(place.open(migrate=True)) as store:
        assert store.found_version == len(CURRENT) + 1
    set_release(monkeypatch, *CURRENT)
    for migrate in (False, True):
        with pytest.raises(StoreError, match="run the release that made it"):
            place.open(migrate=migrate)


def test_a_table_that_is_gone_is_noticed_by_one_who_does_not_read_it(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the look of a server does not, which else stays ready while no boot is granted."""
    monkeypatch.setattr(marks, "LOOK_SECONDS", 0)
    with closing(place.open(migrate=True)) as store:
        for table in ("nonce", "generation", "head", "fact"):
            _ = store.transact(ReadRevocations(NO_REVOCATIONS))
            execute(place, f"ALTER TABLE {table} RENAME TO gone")
            for call in (partial(store.transact, ReadRevocations(NO_REVOCATIONS)), store.check):
                with pytest.raises(StoreError, match=f"(the table {table} is missing|a table is missing.*{table})"):
                    _ = call()
            with pytest.raises(StoreError):
                place.open()
            execute(place, f"ALTER TABLE gone RENAME TO {table}")


def test_a_table_that_a_newer_release_has_dropped_is_not_missing(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who opens the store, and who has it open, hear of its version."""
    with closing(place.open(migrate=True)) as older:
        set_release(monkeypatch, *CURRENT, Step("DROP TABLE what_if"))
        with closing(place.open(migrate=True)) as newer:
            newer.transact(boot("first"))
        set_release(monkeypatch, *CURRENT)
        for call in (partial(older.transact, ReadRevocations(NO_REVOCATIONS)), place.open):
            with pytest.raises(StoreError, match="run the release that made it"):
                _ = call()


def test_a_step_that_fails_leaves_no_trace(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    place.open(migrate=True).close()
    set_release(monkeypatch, *CURRENT, Step("CREATE TABLE owner (name TEXT); CREATE TABLE vm (name TEXT)"))
    with pytest.raises(StoreError, match="already exists"):
        place.open(migrate=True)
    set_release(monkeypatch, *CURRENT)
    with closing(place.open()) as store:
        store.check()
    set_release(monkeypatch, *CURRENT, Step("CREATE TABLE owner (name TEXT)"))
    place.open(migrate=True).close()


@pytest.mark.parametrize("damage", [lambda path: path.chmod(0), lambda path: path.write_bytes(b"no database" * 999)])
def test_what_cannot_be_read_is_not_migrated(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    place = StorePlace("sqlite:keys.db", tmp_path)
    place.open().close()
    path = tmp_path / "keys.db"
    damage(path)
    content = path.read_bytes()
    try:
        place.open(migrate=True).close()
    except StoreError:
        assert path.read_bytes() == content
    else:  # root may open what nobody may
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute(_schema.READ_VERSION).fetchone()[:2] == (
                _schema.SCHEMA_VERSION,
                _schema.compatible_since(),
            )


def test_a_server_that_was_migrated_under_is_refused(place: StorePlace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The migration waits for what the older server is at; after it the older server changes nothing more."""
    place.open(migrate=True).close()
    older = place.open()
    gate = Gate(SetHorizon(3), SetHorizon(4))
    with closing(older), ThreadPoolExecutor() as threads:
        running = threads.submit(older.transact, gate)
        assert gate.inside.wait(60)
        with monkeypatch.context() as newer:
            set_release(newer, *CURRENT, Step("UPDATE fact SET value = value * 10 WHERE name = 'nonce_horizon'"))
            migrating = threads.submit(place.open, migrate=True)
            assert not wait((migrating,), timeout=0.3).done
            gate.leave.set()
            running.result(30)
            with closing(migrating.result(30)) as store:
                assert store.transact(Ask(ReadTimes())).horizon == 40
        for _ in range(2):
            with pytest.raises(StoreError, match=r"schema version 4, .* knows version 3; run the release that made it"):
                older.transact(Ask(SetHorizon(50)))
        with pytest.raises(StoreError, match="schema version 4"):
            older.check()
        set_release(monkeypatch, *CURRENT, Step(""))
        with closing(place.open()) as store:
            assert store.transact(Ask(ReadTimes())).horizon == 40


def test_who_begins_during_a_migration_waits_and_is_refused(
    empty_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL what a transaction reads is as old as its first statement, so that the lock must come first."""
    place = StorePlace(empty_schema, tmp_path)
    place.open(migrate=True).close()
    with monkeypatch.context() as newer:
        set_release(newer, *CURRENT, Step(""))
        migration = [*_schema.schema("postgresql", len(CURRENT))]
    with (
        closing(place.open()) as older,
        psycopg.connect(empty_schema, autocommit=True) as other,
        ThreadPoolExecutor() as threads,
    ):
        older.transact(Ask(ReadTimes()))
        with psycopg.connect(empty_schema) as migrating:
            for statement in migration:
                migrating.execute(statement.encode())
            asking = threads.submit(older.transact, Ask(ReadTimes()))
            waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'fact'::regclass"
            _ = wait_until(lambda: other.execute(waits.encode()).fetchone() != (0,))
        with pytest.raises(StoreError, match="schema version 4"):
            asking.result(30)


# --- servers of two releases on one store ---


def test_a_newer_schema_that_says_so_is_used_by_the_release_before(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.open(migrate=True).close()
    with closing(place.open()) as older:
        older.transact(boot("before"))
        with monkeypatch.context() as newer:
            set_release(newer, *CURRENT, EXPANSION)
            with pytest.raises(StoreError, match="run `chutes-proto store migrate`"):
                place.open()
            with closing(place.open(migrate=True)) as store:
                assert (store.found_version, store.schema_version) == (len(CURRENT), len(CURRENT) + 1)
                store.transact(boot("newer"))
                store.check()
        older.transact(boot("after"))
        assert older.check()["boot"] == 3
    for migrate in (False, True):
        with closing(place.open(migrate=migrate)) as again:
            assert again.schema_version == len(CURRENT) + 1
            again.transact(boot(f"again {migrate}"))
    # A later step removes what only this release still needs.
    set_release(monkeypatch, *CURRENT, EXPANSION, Step("", compatible_since=len(CURRENT) + 1))
    with closing(place.open(migrate=True)) as store:
        assert store.check()["boot"] == 5
    set_release(monkeypatch, *CURRENT)
    with pytest.raises(StoreError, match="run the release that made it"):
        place.open()


def test_a_migration_that_gets_no_lock_says_who_has_it(
    empty_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = StorePlace(empty_schema, tmp_path)
    place.open(migrate=True).close()
    set_release(monkeypatch, *CURRENT, EXPANSION)
    with psycopg.connect(empty_schema, application_name="a report") as other, ThreadPoolExecutor() as threads:
        other.execute("SELECT count(*) FROM boot")
        with monkeypatch.context() as hasty:
            hasty.setattr(migration, "_MIGRATION_SECONDS", 0.0)
            state = r"\(a report, idle in transaction, in a transaction since \S+Z\)"
            held = rf"session {other.info.backend_pid} of \w+ {state} locks boot; wait for it, or end it"
            with pytest.raises(StoreError, match=f"does not get the locks.*{held}"):
                place.open(migrate=True)
        migrating = threads.submit(place.open, migrate=True)
        _ = wait_until(lambda: waits_for_a_lock(empty_schema))
        _ = wait_until(lambda: not waits_for_a_lock(empty_schema))  # it lets the others work meanwhile
        _ = wait_until(lambda: waits_for_a_lock(empty_schema))
        other.rollback()
        migrating.result(60).close()


def test_an_expansion_has_one_second_for_its_locks_and_for_each_statement(
    empty_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In milliseconds, as PostgreSQL has them in force while the step runs."""
    place = StorePlace(empty_schema, tmp_path)
    place.open(migrate=True).close()
    limits = "SELECT setting FROM pg_settings WHERE name IN ('lock_timeout', 'statement_timeout')"
    step = Step(f"CREATE TABLE owner (name TEXT); INSERT INTO owner {limits}", compatible_since=len(CURRENT))
    set_release(monkeypatch, *CURRENT, step)
    place.open(migrate=True).close()
    with psycopg.connect(empty_schema) as connection:
        found = [int(name) for (name,) in connection.execute("SELECT name FROM owner")]
    assert len(found) == 2
    assert all(0 < limit <= 1000 for limit in found)


def test_an_expansion_that_takes_longer_by_itself_is_given_up(
    empty_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every server would wait for the locks that it has."""
    place = StorePlace(empty_schema, tmp_path)
    place.open(migrate=True).close()
    monkeypatch.setattr(migration, "_MIGRATION_SECONDS", 0.0)
    with monkeypatch.context() as newer:
        set_release(newer, *CURRENT, evolve(EXPANSION, change=f"{EXPANSION.change}; SELECT pg_sleep(3)"))
        with pytest.raises(StoreError, match="its own statements take longer than a second, for which servers would"):
            place.open(migrate=True)
    with psycopg.connect(empty_schema) as connection:
        assert connection.execute("SELECT to_regclass('owner')").fetchone() == (None,)
    with closing(place.open()) as store:
        assert store.schema_version == len(CURRENT)
        store.check()


def waits_for_a_lock(url: str) -> bool:
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'boot'::regclass")
        return found.fetchone() is not None


def test_an_index_whose_build_was_interrupted_is_built_again(
    empty_schema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built beside a migration that stays open, as a server's transaction does."""
    place = StorePlace(empty_schema, tmp_path)
    place.open(migrate=True).close()
    set_release(monkeypatch, *CURRENT, EXPANSION)
    with psycopg.connect(empty_schema) as blocking, ThreadPoolExecutor() as threads:
        blocking.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        blocking.execute("SELECT 1 FROM attestation")  # the build waits for everyone who may still see the older rows
        migrating = threads.submit(place.open, migrate=True)
        with psycopg.connect(empty_schema, autocommit=True) as other:
            building = "SELECT pid FROM pg_stat_progress_create_index WHERE index_relid = to_regclass('boot_profile')"
            (pid,) = wait_until(lambda: other.execute(building.encode()).fetchone())
            other.execute("SELECT pg_cancel_backend(%s)", (pid,))
            with pytest.raises(StoreError, match="a statement was cancelled"):
                migrating.result(60)
            with closing(place.open()) as store:  # it is right without the index, and slower
                store.transact(boot("first"))
                with pytest.raises(StoreError, match="the index boot_profile is missing or incomplete; run `chutes"):
                    store.check()
    with closing(place.open(migrate=True)) as store:
        assert store.check()["boot"] == 1
