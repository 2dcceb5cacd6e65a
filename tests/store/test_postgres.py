"""The PostgreSQL store: durable or refused, retried within bounds, clear when something is wrong; never a password."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import psycopg
import pytest
from attrs import evolve, field, frozen

from chutes_proto.cli.main import main
from chutes_proto.errors import (
    ConfigurationError,
    FateUnknown,
    Refused,
    RowNotAuthentic,
    StoreAway,
    StoreBusy,
    StoreError,
)
from chutes_proto.io.files import write_file
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.postgres import PostgresStore, has_secret, transactions
from chutes_proto.io.stores.postgres.url import name_of
from chutes_proto.store import _sql as sql
from chutes_proto.store._heads import RECENT_BOOTS
from chutes_proto.store._rows import (
    AuditRow,
    BootRow,
    Claim,
    Insert,
    NonceRow,
    ReadTimes,
    Scan,
    SetHorizon,
    StoreOp,
    Vm,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, boot, dump, platform, sync
from chutes_proto.wire.codes import Code
from tests.certificates import NEW_KEY, certificate_pem, key_pem, self_signed
from tests.postgres import PASSWORD, Cluster, schema
from tests.small_disk import fill, remount, schema_on_small_disk
from tests.store.harness import Gate, together
from tests.waiting import wait_until

T = TypeVar("T")


@pytest.fixture
def url(migrated_schema: str) -> str:
    """The URL of a schema with our tables."""
    return migrated_schema


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    with closing(PostgresStore(url, vault=VAULT)) as store:
        yield store


def ask(url: str, text: str) -> list[tuple[Any, ...]]:
    """PostgreSQL's text for an operator."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(text.encode())
        return cursor.fetchall() if cursor.description else []


def told(call: Callable[[], object], text: str, kind: type[StoreError] = StoreError) -> None:
    """The call fails as exactly this kind, with this text, and without a password."""
    with pytest.raises(StoreError, match=text) as caught:
        call()
    assert type(caught.value) is kind
    assert PASSWORD not in str(caught.value)


WATCHED = (
    *("transaction_isolation", "synchronous_commit", "enable_seqscan", "client_min_messages", "lock_timeout"),
    *("statement_timeout", "idle_in_transaction_session_timeout", "jit"),
)


def watch(url: str) -> None:
    """Have each transaction that writes an audit row note its settings, and the session it is in."""
    settings = ", ".join(f"current_setting('{name}') AS {name}" for name in WATCHED)
    ask(
        url,
        f"CREATE TABLE watched AS SELECT {settings}, pg_backend_pid() AS pid WITH NO DATA;"
        f"CREATE FUNCTION watch() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN INSERT INTO watched SELECT {settings}, pg_backend_pid(); RETURN NEW; END $$;"
        f"CREATE TRIGGER watch BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION watch()",
    )


def watched(url: str) -> list[tuple[Any, ...]]:
    """The rows that `watch` had noted, in order."""
    return ask(url, "SELECT * FROM watched ORDER BY ctid")


@contextmanager
def reloaded(cluster: Cluster, store: PostgresStore, setting: str, value: str) -> Iterator[None]:
    """Change the server's configuration while ``store`` has a session open, until that session has seen it."""

    def change(text: str, seen: str) -> None:
        ask(cluster.url(), text)
        ask(cluster.url(), "SELECT pg_reload_conf()")
        (connection,) = store._pool.idle
        _ = wait_until(lambda: connection.execute(f"SHOW {setting}".encode()).fetchall() == [(seen,)])

    ((before,),) = ask(cluster.url(), f"SHOW {setting}")
    change(f"ALTER SYSTEM SET {setting} = {value}", value)
    try:
        yield
    finally:
        change(f"ALTER SYSTEM RESET {setting}", before)


# --- what is refused at the start ---


def test_an_empty_database_is_refused_and_left_alone(empty_schema: str) -> None:
    told(
        lambda: PostgresStore(empty_schema, vault=VAULT),
        "it is empty, as only a new one may be; run `chutes-proto store init`",
    )
    assert ask(empty_schema, sql.TABLES["postgresql"]) == []


def test_another_programs_database_is_refused_and_left_alone(empty_schema: str) -> None:
    ask(empty_schema, "CREATE TABLE guests (name TEXT)")
    for make in (False, True):
        told(lambda: PostgresStore(empty_schema, make=make, vault=VAULT), "another program's database")  # noqa: B023
    assert ask(empty_schema, sql.TABLES["postgresql"]) == [("guests",)]


@pytest.mark.parametrize(
    ("found", "used"),
    [("off", "on"), ("local", "on"), ("remote_write", "on"), ("on", "on"), ("remote_apply", "remote_apply")],
)
def test_a_transaction_waits_for_the_disk_whatever_the_server_says_at_any_time(
    cluster: Cluster, found: str, used: str
) -> None:
    """Set by a reload under an open session, and there already when a session is opened."""
    with schema(cluster.url()) as url, closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        watch(url)
        store.transact(boot("before"))
        with reloaded(cluster, store, "synchronous_commit", found), closing(PostgresStore(url, vault=VAULT)) as newer:
            store.transact(boot("open"))
            newer.transact(boot("new"))
        assert [row[1] for row in watched(url)] == ["on", used, used]


def test_a_transaction_leaves_nothing_set_in_its_session(url: str) -> None:
    """Behind a pooler another program may be given that session next."""
    lax = f"{url}%20-csynchronous_commit%3Doff"
    shown = "SELECT " + ", ".join(f"current_setting('{name}')" for name in WATCHED)
    with closing(PostgresStore(lax, make=True, vault=VAULT)) as store:
        store.transact(boot("first"))
        _ = store.check()
        (connection,) = store._pool.idle
        assert connection.execute(shown.encode()).fetchall() == ask(lax, shown)


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_may_lose_keys_is_refused_from_then_on(cluster: Cluster, setting: str) -> None:
    with schema(cluster.url()) as url, closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        with reloaded(cluster, store, setting, "off"):
            for call in (lambda: store.transact(boot("first")), store.check, lambda: PostgresStore(url, vault=VAULT)):
                told(call, f"{setting} is 'off' there and must be 'on', or keys may be lost")
        store.transact(boot("first"))


def test_a_table_that_a_crash_empties_is_refused(
    store: PostgresStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "LOOK_SECONDS", 0)
    store.transact(boot("first"))
    for table in ("generation", "what_if"):
        ask(url, f"ALTER TABLE {table} SET UNLOGGED")
        for call in (lambda: store.transact(boot("second")), store.check, lambda: PostgresStore(url, vault=VAULT)):
            told(call, f"the table {table} is UNLOGGED.*ALTER TABLE {table} SET LOGGED")
        ask(url, f"ALTER TABLE {table} SET LOGGED")
    store.transact(boot("second"))


def test_an_encoding_that_cannot_hold_every_text_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transactions._MUST_BE, "server_encoding", "EBCDIC")
    told(lambda: PostgresStore(database, vault=VAULT), "server_encoding is 'UTF8' there")


def test_too_old_a_server_is_refused(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "_OLDEST_SERVER", 99_00_00)
    told(lambda: PostgresStore(database, vault=VAULT), "PostgreSQL 99 or newer is needed")


def test_a_database_that_only_reads_is_refused(url: str) -> None:
    told(
        lambda: PostgresStore(f"{url}%20-cdefault_transaction_read_only%3Don", vault=VAULT),
        "session is read-only",
        StoreAway,
    )


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{PASSWORD}%zz@host/keys",
        f"postgresql://me@host/keys?passwort={PASSWORD}",
        f"host=here password={PASSWORD}",
        f"mysql://me:{PASSWORD}@host/keys",
        f"postgresql://me:{PASSWORD}/more@host/keys",
        f"postgresql://me:12/{PASSWORD}@host/keys",
        f"postgresql://me:p@{PASSWORD}@host/keys",
        f"postgresql://me:p@{PASSWORD}@host?sslmode=require",
        f"postgresql://me:p?a@{PASSWORD}@host/keys",
        f"postgresql://me:{PASSWORD}?sslmode=disable/x@host",
    ],
)
def test_what_is_no_url_is_said_without_repeating_it(address: str) -> None:
    with pytest.raises(ConfigurationError, match="not a PostgreSQL URL") as caught:
        PostgresStore(address, vault=VAULT)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{PASSWORD}@host/keys",
        f"postgresql://:{PASSWORD}@host/keys",
        f"postgresql://me:{PASSWORD}?a@host/keys",
        f"postgresql://me:%2F{PASSWORD}@host/keys",
        f"postgresql://host/keys?password={PASSWORD}",
        f"postgresql://host/keys?%70assword={PASSWORD}",
        f"postgresql://host/keys?port=1&pass%77or%64={PASSWORD}",
        f"postgresql://host/keys?sslpassword={PASSWORD}",
        f"postgresql://host/keys?%73slpassword={PASSWORD}&sslmode=require",
        f"postgresql://host?password={PASSWORD}",
    ],
)
def test_a_secret_on_a_command_line_is_refused_however_it_is_written(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("check",):
        assert main(["store", action, "--store", address]) == 2
        said = capsys.readouterr()
        assert "other users can read a command line" in said.err
        assert PASSWORD not in said.err + said.out


@pytest.mark.parametrize("name", ["oauth_client_secret", "scram_client_key", "scram_server_key"])
def test_newer_secrets_of_libpq_are_known(name: str) -> None:
    if name not in {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}:
        pytest.skip("this libpq does not know it")
    assert has_secret(f"postgresql://host/keys?{name}=x")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://",
        "postgresql://me@host/keys",
        "postgresql://me:@host/keys",
        "postgresql://me@host/keys?passfile=/etc/me@here/password",
        "postgresql://host?passfile=/etc/me@here",
        "postgresql://me%40there@[::1]:5432,other:5433/keys%40home?sslkey=/etc/key&sslpassword=",
    ],
)
def test_no_secret_is_seen_where_none_is(address: str) -> None:
    assert not has_secret(address)


def test_a_wrong_password_is_said_and_not_shown(cluster: Cluster) -> None:
    wrong = cluster.url(password=f"wrong-{PASSWORD}")
    told(lambda: PostgresStore(wrong, vault=VAULT), "password authentication failed", StoreAway)
    told(lambda: PostgresStore(cluster.url("nowhere"), vault=VAULT), 'database "nowhere" does not exist', StoreAway)
    told(lambda: PostgresStore(cluster.url(host="/nowhere"), vault=VAULT), "no connection to the database", StoreAway)


def test_a_certificate_that_is_not_trusted_is_said_with_what_to_do_and_taken_once_it_is(
    cluster: Cluster, tmp_path: Path
) -> None:
    """libpq's own advice, which is to verify nothing, gives the password away."""
    advice = "the certificate must be valid now, name this host, and lead to a CA in the file that sslrootcert"
    # The loopback addresses are many: each process of tests has one, with PostgreSQL's own port.
    owner, address = cluster.folder.stat(), f"127.{os.getpid() >> 16}.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
    pem, key_file, trusted = cluster.folder / "server.pem", cluster.folder / "server.key", tmp_path / "ca.pem"
    settings = {"listen_addresses": address, "ssl": "on", "ssl_cert_file": str(pem), "ssl_key_file": str(key_file)}

    def new_certificate(name: str) -> bytes:
        key = NEW_KEY["p256"]()
        content = certificate_pem(self_signed(key, name))
        _ = pem.write_bytes(content)
        write_file(key_file, key_pem(key), mode=0o600)
        os.chown(key_file, owner.st_uid, owner.st_gid)
        cluster.stop()
        cluster.start(**settings)
        return content

    def refused(text: str) -> None:
        pattern = f"{text}((?!disable).)*; {advice}[^;]*; a new file is read [^;]*$"
        told(lambda: behind.transact(Ask(ReadTimes())), pattern, StoreAway)

    with schema(cluster.url()) as url:
        PostgresStore(url, make=True, vault=VAULT).close()
        _ = trusted.write_bytes(new_certificate("database.test"))
        over_tls = f"{url}&sslmode=verify-full&sslrootcert={trusted}".replace(
            quote(str(cluster.folder), safe=""), f"database.test&hostaddr={address}"
        )
        try:
            with closing(PostgresStore(over_tls, busy_seconds=0.1, vault=VAULT)) as behind:
                content = new_certificate("database.test")
                refused("certificate verify failed")
                trusted.unlink()
                refused("root certificate file .* does not exist")
                _ = trusted.write_bytes(content)
                _ = behind.transact(Ask(ReadTimes()))
                _ = trusted.write_bytes(new_certificate("other.test"))
                refused("does not match host name")
        finally:
            cluster.stop()
            cluster.start()


def test_a_session_that_only_reads_is_said_with_what_to_do(url: str) -> None:
    read_only = url + "%20-cdefault_transaction_read_only%3Don"
    told(
        lambda: PostgresStore(read_only, vault=VAULT),
        "session is read-only; is it a standby, .* or default_trans",
        StoreAway,
    )


def test_a_name_says_where_and_as_whom_and_no_more(cluster: Cluster) -> None:
    with schema(cluster.url()) as url, closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        assert store.name == f"postgresql://owner@{cluster.folder}/postgres"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("keys@a:1,b:2/keys", "keys@a:1,b:2/keys"),
        ("a:1,b/keys", "a:1,b/keys"),
        ("a,b/keys", "a,b/keys"),
        ("a:1/keys", "a:1/keys"),
        ("a,b/keys?port=1", "a,b:1/keys"),
    ],
)
def test_each_host_is_named_with_its_port(given: str, name: str) -> None:
    assert name_of(f"postgresql://{given}") == f"postgresql://{name}"


# --- the schema ---


def test_many_may_make_it_at_once(empty_schema: str) -> None:
    def make() -> bool:
        with closing(PostgresStore(empty_schema, make=True, busy_seconds=30, vault=VAULT)) as store:
            store.transact(Ask(ReadTimes()))
            return store.is_new

    found = together([make] * 6)
    assert sorted(map(str, found)) == ["False"] * 5 + ["True"]


# --- bounds ---


@contextmanager
def held(store: PostgresStore) -> Iterator[Gate]:
    gate = Gate()
    thread = threading.Thread(target=store.transact, args=(gate,))
    thread.start()
    assert gate.inside.wait(60)
    try:
        yield gate
    finally:
        gate.leave.set()
        thread.join(60)


def test_no_more_connections_than_allowed(url: str) -> None:
    name = f"{url}&application_name=counted"
    with closing(PostgresStore(name, connections=3, busy_seconds=30, vault=VAULT)) as store:
        assert together([lambda: store.transact(Ask(ReadTimes())).horizon] * 16) == [0] * 16
        count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'counted'"
        assert 1 <= ask(url, count)[0][0] <= 3


def test_a_connection_that_is_not_to_be_had_is_busy(url: str) -> None:
    with (
        closing(PostgresStore(url, connections=1, busy_seconds=0.05, vault=VAULT)) as store,
        held(store),
    ):
        told(lambda: store.transact(Ask(ReadTimes())), "other transactions take too long", StoreBusy)


def test_a_database_without_a_free_connection_is_busy(url: str, database: str) -> None:
    ask(database, "CREATE ROLE crowded LOGIN SUPERUSER PASSWORD 'crowded'")
    try:
        ask(database, "ALTER ROLE crowded NOSUPERUSER CONNECTION LIMIT 0")
        crowded = url.replace(f"owner:{PASSWORD}", "crowded:crowded")
        told(lambda: PostgresStore(crowded, vault=VAULT), "too many connections", StoreAway)
    finally:
        ask(database, "DROP ROLE crowded")


def test_a_row_that_another_transaction_holds_is_busy(url: str) -> None:
    with (
        closing(PostgresStore(url, busy_seconds=0.2, vault=VAULT)) as store,
        psycopg.connect(url) as other,
    ):
        other.execute("UPDATE fact SET value = 3 WHERE name = 'nonce_horizon'")
        told(lambda: store.transact(Ask(SetHorizon(5))), "another transaction takes too long", StoreBusy)
        other.rollback()
        store.transact(Ask(SetHorizon(5)))


def test_a_program_that_locks_a_table_is_named_and_so_is_one_that_waits_to_do_so(url: str) -> None:
    """As a change of a table does behind a long backup, and all boots behind it; not the backup, which only reads."""
    with (
        closing(PostgresStore(url, busy_seconds=0.2, vault=VAULT)) as store,
        ThreadPoolExecutor() as threads,
        psycopg.connect(url, application_name="upgrade") as waiting,
        psycopg.connect(url, application_name="backup") as reading,
    ):
        reading.execute("SELECT count(*) FROM boot")
        changing = threads.submit(waiting.execute, "ALTER TABLE boot ADD COLUMN note TEXT")
        _ = wait_until(lambda: ask(url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
        pid = waiting.info.backend_pid
        for held in ("active", "idle in transaction"):
            since = r"in a transaction since 20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
            who = rf"; session {pid} of owner \(upgrade, {held}, {since}\) locks boot; wait for it, or end it with"
            told(lambda: store.transact(boot("first")), rf"another transaction takes too long \(.*\){who}", StoreBusy)
            reading.rollback()
            _ = changing.result(60)
        waiting.rollback()
        store.transact(boot("first"))


def test_transactions_that_get_in_the_way_are_tried_for_so_long_only(url: str) -> None:
    """Each run reads a row which another transaction changes before this one writes it."""

    @frozen
    class Unlucky(Unit[None]):
        other: PostgresStore
        runs: list[int] = field(factory=list[int])

        def script(self) -> Script[None]:
            horizon = (yield from ReadTimes()).horizon
            self.other.transact(Ask(SetHorizon(horizon + 1)))
            self.runs.append(horizon)
            yield from SetHorizon(10**6)

    with (
        closing(PostgresStore(url, busy_seconds=0.3, vault=VAULT)) as store,
        closing(PostgresStore(url, vault=VAULT)) as other,
    ):
        unit = Unlucky(other)
        told(lambda: store.transact(unit), "other transactions got in the way every time", StoreBusy)
        assert len(unit.runs) > 3
        assert store.transact(Ask(ReadTimes())).horizon == len(unit.runs)


@frozen
class Meeting(Unit[T]):
    """Another unit that does not end, in its first run, before all who come to ``end`` have done theirs."""

    unit: Unit[T]
    end: threading.Barrier
    runs: list[int] = field(factory=list[int])

    def script(self) -> Script[T]:
        result = yield from self.unit.script()
        self.runs.append(1)
        if len(self.runs) == 1:
            _ = self.end.wait(60)
        return result


def test_vms_that_have_nothing_in_common_do_not_get_in_each_others_way(url: str) -> None:
    """Neighbours in tables and indexes: each reads where the other one's rows are, and changes its own."""
    with closing(PostgresStore(url, vault=VAULT)) as store:
        boots = [
            evolve(boot(f"{vm} {number}", vm=Vm(VM.hotkey, f"vm-{vm}")), platform=platform(f"{vm}"))
            for number in range(10)
            for vm in range(4)
        ]
        for granted in boots:
            store.transact(granted)
        for granted in boots[:4]:
            store.transact(sync(granted, "body", "storage"))
        for _ in range(100):
            store._pool.slots.crowding.committed()
        end = threading.Barrier(4)
        units = [Meeting(sync(granted, "body", "storage"), end) for granted in boots[16:20]]
        together([partial(store.transact, unit) for unit in units])
        assert [len(unit.runs) for unit in units] == [1] * 4
        assert store.retries == 0


def test_the_head_of_a_vm_that_boots_often_stays_in_its_row(url: str) -> None:
    """Out of the row it is written in parts, each with an entry of an index, by each of the VM's transactions."""
    with closing(PostgresStore(url, vault=VAULT)) as store:
        for number in range(RECENT_BOOTS):
            granted = boot(f"{number}")
            store.transact(granted)
            store.transact(sync(granted, "body", "storage", "tdx-cache"))
    assert ask(url, "SELECT length(contents) > 2000 FROM head") == [(True,)]
    parts = "SELECT pg_relation_size(reltoastrelid) FROM pg_class WHERE oid = 'head'::regclass"
    assert ask(url, parts) == [(0,)]


def test_a_long_reading_makes_the_database_remember_nothing_of_others(url: str) -> None:
    """What others read is kept in shared memory until it ends, if it takes part in conflicts: some hundred boots."""
    with closing(PostgresStore(url, vault=VAULT)) as store, store.snapshot() as rows:
        before = rows.transact(Ask(ReadTimes()))
        for number in range(10):
            store.transact(boot(f"{number}", vm=Vm(VM.hotkey, f"vm-{number}")))
        store.transact(Ask(SetHorizon(before.horizon + 1)))
        ours = "database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        assert ask(url, f"SELECT count(*) FROM pg_locks WHERE mode = 'SIReadLock' AND {ours}") == [(0,)]
        assert rows.transact(Ask(ReadTimes())).horizon == before.horizon


def test_a_long_reading_may_pause_for_as_long_as_it_likes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store copy` writes elsewhere between two pages; a unit that pauses holds others up, and is ended after 10 s."""
    with closing(PostgresStore(url, vault=VAULT)) as store:
        session = None
        lift_limits = store._database.lift_limits

        def lift(connection: Any) -> None:
            nonlocal session
            session = connection
            lift_limits(connection)

        monkeypatch.setattr(store._database, "lift_limits", lift)
        with store.snapshot() as rows:
            rows.transact(Ask(ReadTimes()))
            assert session is not None
            for limit in ("statement_timeout", "idle_in_transaction_session_timeout"):
                assert session.execute(f"SHOW {limit}".encode()).fetchall() == [("0",)]
            rows.transact(Ask(ReadTimes()))


# --- read ahead ---


@frozen
class Looking(Unit[tuple[int, int]]):
    def ahead(self) -> Sequence[StoreOp[Any]]:
        return (ReadTimes(),)

    def script(self) -> Script[tuple[int, int]]:
        before = (yield from ReadTimes()).horizon
        yield from SetHorizon(before + 5)
        return before, (yield from ReadTimes()).horizon


@frozen
class Careless(Unit[None]):
    """Has a nonce redeemed, and does not look whether it was."""

    def ahead(self) -> Sequence[StoreOp[Any]]:
        return (Claim(NonceRow(b"nonce", "boot", NOW, NOW)),)

    def script(self) -> Script[None]:
        yield from SetHorizon(7)


def test_what_was_read_ahead_counts_until_the_first_write(store: PostgresStore) -> None:
    assert store.transact(Looking()) == (0, 5)
    assert store.transact(Looking()) == (5, 10)


def test_a_unit_that_leaves_out_what_it_announced_does_nothing(store: PostgresStore) -> None:
    with pytest.raises(RuntimeError, match="Careless"):
        store.transact(Careless())
    assert store.transact(Ask(ReadTimes())).horizon == 0
    assert store.transact(Ask(Scan(NonceRow))) == ()


def test_a_forged_key_is_no_strangers_business(url: str) -> None:
    """It is read ahead, and its fault is told where the script asks for it: after the token was checked."""
    with closing(PostgresStore(url, vault=VAULT)) as store:
        granted = boot("first")
        store.transact(granted)
        ask(url, "UPDATE generation SET delivered_at = 0")
        with pytest.raises(Refused) as caught:
            store.transact(sync(boot("unknown"), "body", "storage"))
        assert caught.value.code == Code.BOOT_TOKEN_INVALID
        with pytest.raises(RowNotAuthentic):
            store.transact(sync(granted, "body", "storage"))


def test_a_table_that_is_missing_is_no_strangers_business_nor_a_newer_releases_fault(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marks, "LOOK_SECONDS", math.inf)
    with closing(PostgresStore(url, vault=VAULT)) as store:
        granted = boot("first")
        store.transact(granted)
        ask(url, "DROP TABLE volume")
        with pytest.raises(Refused) as caught:
            store.transact(sync(boot("unknown"), "body", "storage"))
        assert caught.value.code == Code.BOOT_TOKEN_INVALID
        told(lambda: store.transact(sync(granted, "body", "storage")), "a table is missing")
        newer = sql.SCHEMA_VERSION + 1
        ask(url, f"UPDATE fact SET value = {newer} WHERE name = 'schema_version'")
        for seconds in (math.inf, 0):
            monkeypatch.setattr(marks, "LOOK_SECONDS", seconds)
            told(lambda: store.transact(sync(granted, "body", "storage")), f"version {newer}, .*run the release")


def test_a_session_without_its_prepared_statements_is_noticed(store: PostgresStore) -> None:
    """As a pooler that passes on a session's number may hand out another one."""
    for number in range(2):
        store.transact(boot(f"{number}"))
        store._pool.idle[0].execute("DEALLOCATE ALL")
    connection = store._pool.idle[0]
    granted = boot("last")
    store.transact(granted)
    assert not store.transact(sync(granted, "body", "storage")).replayed
    assert store.retries == 1
    assert store._pool.idle == [connection]


def test_a_column_of_another_type_is_no_standby(store: PostgresStore, url: str) -> None:
    """A statement that returns it, and was prepared before, fails as one that a standby does not know."""
    granted = [boot(f"{number}") for number in range(4)]
    for each in granted[:3]:
        store.transact(each)
        store.transact(sync(each, "body", "storage"))
    for _ in range(3):
        store.transact(Ask(Scan(BootRow)))
    ask(url, "ALTER TABLE boot ALTER peer_address TYPE varchar(64)")
    assert len(store.transact(Ask(Scan(BootRow)))) == 3  # which no transaction asks for as it begins
    ask(url, "ALTER TABLE boot ALTER peer_address TYPE text")
    store.transact(granted[3])
    store.transact(sync(granted[3], "body", "storage"))


# --- gone in the middle ---


@frozen
class Bereft(Unit[int]):
    """A unit whose connection is ended from outside in the first of its runs, or whose session ends at its commit."""

    url: str
    at_end: bool
    runs: list[int] = field(factory=list[int])

    def script(self) -> Script[int]:
        horizon = (yield from ReadTimes()).horizon
        self.runs.append(1)
        if len(self.runs) == 1 and self.at_end:
            ask(
                self.url,
                "CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;"
                "CREATE CONSTRAINT TRIGGER leave AFTER UPDATE ON fact DEFERRABLE INITIALLY DEFERRED"
                " FOR EACH ROW EXECUTE FUNCTION leave()",
            )
        elif len(self.runs) == 1:
            ask(
                self.url,
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'bereft' AND state LIKE 'idle in transaction%'",
            )
            _ = yield from ReadTimes()  # a write alone would be sent with the commit
        yield from SetHorizon(horizon + 1)
        return horizon


def test_a_connection_lost_before_the_commit_is_replaced_and_the_unit_done_once(url: str) -> None:
    with closing(PostgresStore(f"{url}&application_name=bereft", vault=VAULT)) as store:
        unit = Bereft(url, at_end=False)
        assert store.transact(unit) == 0
        assert len(unit.runs) == 2
        assert store.transact(Ask(ReadTimes())).horizon == 1


def test_a_connection_lost_at_the_commit_is_said_and_nothing_is_done_again(url: str) -> None:
    with closing(PostgresStore(f"{url}&application_name=bereft", vault=VAULT)) as store:
        unit = Bereft(url, at_end=True)
        told(lambda: store.transact(unit), "the connection was lost at the commit", FateUnknown)
        assert len(unit.runs) == 1
        assert store.transact(Ask(ReadTimes())).horizon == 0


@frozen
class Severed(Unit[None]):
    """A unit whose session is ended between its two round trips."""

    url: str

    def script(self) -> Script[None]:
        yield from ReadTimes()
        ask(self.url, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'severed'")
        yield from SetHorizon(7)


def test_of_a_session_lost_between_the_two_round_trips_the_fate_is_unknown(url: str) -> None:
    """The commit was sent with the writes: nobody says that none arrived."""
    with closing(PostgresStore(f"{url}&application_name=severed", vault=VAULT)) as store:
        told(lambda: store.transact(Severed(url)), "the connection was lost at the commit", FateUnknown)
        assert store.retries == 0
        assert store.transact(Ask(ReadTimes())).horizon == 0


@pytest.mark.parametrize("state", ["40001", "40P01", "23505"])
def test_a_conflict_among_the_writes_is_run_again_on_the_same_connection(url: str, state: str) -> None:
    with closing(PostgresStore(url, vault=VAULT)) as store:
        (session,) = store._pool.idle
        for number in range(4):
            ask(
                url,
                "DROP SEQUENCE IF EXISTS tries; CREATE SEQUENCE tries;"
                "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" IF nextval('tries') = 1 THEN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}'; END IF;"
                " RETURN NULL; END $$;"
                "CREATE OR REPLACE TRIGGER fail BEFORE INSERT ON audit EXECUTE FUNCTION fail()",
            )
            granted = boot(f"{number}", now=NOW + number)
            store.transact(granted)
            assert store.retries == number + 1
            assert not store.transact(sync(granted, f"{number}", "storage")).replayed
        assert len(store.transact(Ask(Scan(AuditRow)))) == 8
        assert store._pool.idle == [session]


def test_idle_connections_that_were_ended_are_replaced(url: str) -> None:
    with closing(PostgresStore(f"{url}&application_name=ended", vault=VAULT)) as store:
        assert together([lambda: store.transact(boot("one"))] + [lambda: store.transact(Ask(ReadTimes()))] * 7)[1:]
        ask(url, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'ended'")
        assert store.transact(Ask(ReadTimes())).horizon == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_server_that_stops_is_busy_and_all_is_there_when_it_is_back(cluster: Cluster, number: signal.Signals) -> None:
    with schema(cluster.url()) as url, closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        granted = boot("first")
        store.transact(granted)
        keys = store.transact(sync(granted, "body", "storage"))
        cluster.stop(number)
        try:
            told(lambda: store.transact(boot("second")), "no connection to the database|failed", StoreAway)
        finally:
            cluster.start()
        assert store.transact(sync(granted, "body", "storage")) == evolve(keys, replayed=True)
        store.transact(boot("second"))


# --- what an operator must see to ---


def fail_with(url: str, state: str) -> None:
    """Every new audit row is refused with this SQLSTATE."""
    ask(
        url,
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}', DETAIL = 'row of a secret'; END $$",
    )
    ask(url, "CREATE OR REPLACE TRIGGER fail BEFORE INSERT ON audit EXECUTE FUNCTION fail()")


@pytest.mark.parametrize(
    ("state", "text", "kind"),
    [
        ("25006", "the database is read-only, and this transaction changed nothing", StoreError),
        ("XX001", "the database is damaged", StoreError),
        ("42501", "the database's user may not do that", StoreError),
        ("57014", "a statement was cancelled", StoreBusy),
        ("53300", "the database has no connection left", StoreBusy),
        ("08P01", "the connection pooler lost the database, or refused", StoreAway),
        ("XX000", "PostgreSQL refused", StoreError),
    ],
)
def test_each_fault_is_said_and_nothing_changes(url: str, state: str, text: str, kind: type[StoreError]) -> None:
    with closing(PostgresStore(url, busy_seconds=0.1, vault=VAULT)) as store:
        granted = boot("first")
        store.transact(granted)
        before = dump(store)
        fail_with(url, state)
        with pytest.raises(StoreError, match=rf"{text}.* \(so it is\)") as caught:
            store.transact(sync(granted, "body", "storage"))
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)
        assert dump(store) == before
        ask(url, "DROP TRIGGER fail ON audit")
        assert not store.transact(sync(granted, "body", "storage")).replayed


def test_a_trigger_that_leaves_audit_rows_out_is_said(store: PostgresStore, url: str) -> None:
    ask(url, "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
    ask(url, "CREATE TRIGGER skip BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION skip()")
    told(lambda: store.transact(boot("first")), "keeps no audit row, or gives it a number below 1")
    assert ask(url, "SELECT count(*) FROM boot") == [(0,)]  # nothing is kept without its audit row
    ask(url, "DROP TRIGGER skip ON audit")
    store.transact(boot("second"))


@pytest.mark.parametrize("number", [0, -1, -(1 << 63)])
def test_a_number_of_an_audit_row_that_no_mark_can_have_is_refused(url: str, tmp_path: Path, number: int) -> None:
    """Else the file of the mark could not be read again, and who wrote the database would be rid of the mark."""
    with closing(PostgresStore(url, mark_file=tmp_path / "mark", vault=VAULT)) as store:
        store.transact(boot("first"))
        store.keep_mark()
        ask(
            url,
            f"ALTER SEQUENCE audit_id_seq INCREMENT BY -1 MINVALUE {-(1 << 63)} MAXVALUE 1000 RESTART WITH {number}",
        )
        told(lambda: store.transact(boot("second")), "keeps no audit row, or gives it a number below 1")
    assert ask(url, "SELECT count(*) FROM boot") == [(1,)]
    with closing(PostgresStore(url, mark_file=tmp_path / "mark", vault=VAULT)) as store:
        ask(url, "ALTER SEQUENCE audit_id_seq INCREMENT BY 1 RESTART WITH 1000")
        store.transact(boot("second"))


def test_a_full_disk_is_said_and_nothing_changes(cluster: Cluster) -> None:
    with schema_on_small_disk(cluster) as (disk, url), closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        granted = boot("first")
        store.transact(granted)
        before = dump(store)

        @frozen
        class Flood(Unit[None]):
            def script(self) -> Script[None]:
                for _ in range(4000):
                    yield from Insert(AuditRow(NOW, "vm", "flood", "granted", reason="x" * 1000))

        told(lambda: store.transact(Flood()), "the database's disk is full; this transaction changed nothing")
        filler = fill(disk)  # what was rolled back is still there, or not
        told(lambda: dump(store), "the database's disk is full")
        filler.unlink()
        remount(disk, "size=32m")
        assert dump(store) == before
        filler = fill(disk)
        assert dump(store) == before  # the one before is forgotten, and this one hinders nobody who reads
        filler.unlink()
        assert not store.transact(sync(granted, "body", "storage")).replayed


def test_a_full_disk_is_said_before_anything_was_written(cluster: Cluster) -> None:
    with schema_on_small_disk(cluster) as (disk, url), closing(PostgresStore(url, make=True, vault=VAULT)) as store:
        store.check_writing()
        filler = fill(disk)
        told(store.check_writing, "the database's disk is full; this transaction changed nothing; make space")
        filler.unlink()
        store.check_writing()


def test_a_database_that_turns_read_only_is_said(store: PostgresStore) -> None:
    store._pool.idle[0].execute("SET default_transaction_read_only = on")
    told(store.check_writing, "the database is read-only, and this transaction changed nothing; is its disk full")
    told(lambda: store.transact(boot("first")), "the database is read-only, and this transaction changed nothing")


def test_what_sql_cannot_hold_is_the_stores_error(store: PostgresStore) -> None:
    for row in (
        AuditRow(2**63, "vm", "boot", "granted"),
        AuditRow(0, "vm", "\ud800", "granted"),
        AuditRow(0, "vm", "\0", "granted"),
    ):
        told(lambda: store.transact(Ask(Insert(row))), "cannot be stored")  # noqa: B023
    assert store.transact(Ask(Scan(AuditRow))) == ()


# --- the rest ---


def test_a_check_counts_the_rows(store: PostgresStore) -> None:
    granted = boot("first")
    store.transact(granted)
    store.transact(sync(granted, "body", "storage", "tdx-cache"))
    counts = store.check()
    assert (counts["boot"], counts["generation"], counts["boot_volume"], counts["volume"]) == (1, 3, 2, 2)


def test_a_closed_store_says_so(url: str) -> None:
    store = PostgresStore(url, vault=VAULT)
    with held(store):
        store.close()
        store.close()
        for call in (store.check, lambda: store.transact(boot("first"))):
            told(call, "was closed")
    assert store._pool.idle == []


def test_several_stores_are_one(url: str) -> None:
    with closing(PostgresStore(url, vault=VAULT)) as one, closing(PostgresStore(url, vault=VAULT)) as other:
        root = one.transact(boot("first")).root
        assert other.transact(boot("second")).root == root
        assert len(one.transact(Ask(Scan(BootRow)))) == 2
