"""A PostgreSQL that goes silent, and one that works long: the first is given up in time, the second only for a unit."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from attrs import evolve, field, frozen

from chutes_proto.errors import FateUnknown, StoreAway, StoreBusy
from chutes_proto.io.stores import marks
from chutes_proto.io.stores.postgres import PostgresStore, transactions
from chutes_proto.io.stores.postgres.connection import Connection
from chutes_proto.io.stores.postgres.url import parse
from chutes_proto.store._rows import (
    CountSealed,
    CountStates,
    Read,
    ReadAudit,
    ReadNames,
    ReadOtherwiseSealed,
    ReadPage,
    ReadTimes,
    ReadUnclaimed,
    Scan,
    SetHorizon,
    StoreOp,
    Vm,
    VmRow,
    VoidTokens,
)
from chutes_proto.store._run import Ask, Script, Unit
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, boot, sync
from chutes_proto.units.operator import StoreRestored
from chutes_proto.units.revocations import Revocations
from tests.postgres import Cluster, schema
from tests.store.test_postgres import ask, told

SILENCE = 0.6
"""How long the database may be silent here, in seconds, but for ``busy_seconds``."""


UNITS_ONLY = "CASE current_setting('transaction_isolation') WHEN 'serializable' THEN 1 ELSE 0 END"
"""One second in a unit, none while the store is compared with the mark."""


READY = b"Z\0\0\0\5I"
"""The database's word that it has said all, outside a transaction."""


class Proxy:
    """Stands between a store and the database, and turns mute when told: it takes everything, and sends nothing.

    Told to ``cut``, it passes the database's next answer on without its end, and closes. It keeps each answer for
    ``delay`` seconds. ``turns`` is how often the store has sent something after the database had.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._target = f"{cluster.folder}/.s.PGSQL.5432"
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.mute = threading.Event()
        self.cut = threading.Event()
        self.delay = 0.0
        self.connections = 0
        self.turns = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                threading.Thread(target=self._pump, args=(client,), daemon=True).start()

    def _pump(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self._target)
            last = server
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    self.turns += ready is client and last is server
                    last = ready
                    if ready is server and self.cut.is_set():
                        client.sendall(data.removesuffix(READY))
                        return
                    if ready is server and self.delay:
                        time.sleep(self.delay)
                    if not self.mute.is_set():
                        (server if ready is client else client).sendall(data)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)  # so that who accepts is told
        self._listening.close()

    def url(self, url: str, cluster: Cluster) -> str:
        return url.replace(quote(str(cluster.folder), safe=""), "127.0.0.1") + f"&port={self.port}"


@pytest.fixture
def url(cluster: Cluster) -> Iterator[str]:
    """A schema with our tables, in a cluster whose processes are here."""
    with schema(cluster.url()) as url:
        PostgresStore(url, make=True, vault=VAULT).close()
        yield url


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    with closing(Proxy(cluster)) as proxy:
        yield proxy


@pytest.fixture
def behind(url: str, proxy: Proxy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresStore]:
    """A store with one connection, through the proxy."""
    monkeypatch.setattr(transactions, "_SILENCE", SILENCE)
    with closing(PostgresStore(proxy.url(url, cluster), connections=1, busy_seconds=0.1, vault=VAULT)) as store:
        yield store


@frozen
class Silenced(Unit[None]):
    """Reads and writes, and does ``what`` before or after it in its first run."""

    what: Callable[[], object]
    at_end: bool
    runs: list[int] = field(factory=list[int])

    def script(self) -> Script[None]:
        self.runs.append(1)
        if not self.at_end:
            self.what()
            _ = yield from ReadTimes()  # a write alone would be sent with the commit
        yield from SetHorizon(7)
        if self.at_end:
            self.what()


@contextmanager
def bounded() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert SILENCE <= time.monotonic() - began < SILENCE + 60  # without the bound it would be for ever


# --- silent ---


def test_a_boot_takes_four_round_trips(proxy: Proxy, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for the attestation, and two for the sync of two volumes, in a sealed store; a nonce asks for nothing."""
    monkeypatch.setattr(marks, "LOOK_SECONDS", 3600)  # the comparison with the mark, once a second
    with (
        schema(proxy.url(cluster.url(), cluster)) as url,
        closing(PostgresStore(url, make=True, vault=VAULT)) as store,
    ):
        store.transact(boot("first", vm=Vm(VM.hotkey, "another")))
        for number in range(3):  # a new VM, and then a known one
            before = proxy.turns
            granted = evolve(boot(f"{number}", now=NOW + 60 * number), revocations=Revocations.of(0, ()))
            store.transact(granted)
            synced = evolve(sync(granted, f"{number}", "storage", "tdx-cache"), revocations=Revocations.of(0, ()))
            assert len(store.transact(synced).passphrases) == 2
            assert proxy.turns - before == 4
        assert store.retries == 0


def test_a_connection_that_turns_mute_is_given_up_and_replaced(behind: PostgresStore, proxy: Proxy) -> None:
    behind.transact(Ask(Scan(VmRow)))  # what lifts the bounds of one transaction does not of the next
    unit = Silenced(proxy.mute.set, at_end=False)
    with bounded():
        told(
            lambda: behind.transact(unit), r"connection to the database failed \(no answer for 0.7 seconds\)", StoreAway
        )
    assert len(unit.runs) == 1
    proxy.mute.clear()
    assert behind.transact(Ask(ReadTimes())).horizon == 0


def test_of_a_commit_whose_answer_has_no_end_the_fate_is_unknown(behind: PostgresStore, proxy: Proxy) -> None:
    unit = Silenced(proxy.cut.set, at_end=True)
    told(lambda: behind.transact(unit), "connection was lost at the commit", FateUnknown)
    assert len(unit.runs) == 1


def test_of_a_commit_that_is_not_answered_the_fate_is_unknown(behind: PostgresStore, proxy: Proxy) -> None:
    unit = Silenced(proxy.mute.set, at_end=True)
    with bounded():
        told(lambda: behind.transact(unit), "connection was lost at the commit; .*may be committed or not", FateUnknown)
    assert len(unit.runs) == 1
    proxy.mute.clear()
    behind.transact(Ask(ReadTimes()))


def test_a_roll_back_that_is_not_answered_keeps_nobody(behind: PostgresStore, proxy: Proxy) -> None:
    @frozen
    class Refusing(Unit[None]):
        def script(self) -> Script[None]:
            yield from SetHorizon(7)
            proxy.mute.set()
            raise LookupError

    with bounded(), pytest.raises(LookupError):
        behind.transact(Refusing())
    proxy.mute.clear()
    assert behind.transact(Ask(ReadTimes())).horizon == 0


def test_a_store_is_not_opened_where_nothing_is_answered(behind: PostgresStore, proxy: Proxy) -> None:
    """After a connection was made; until then libpq's own bound holds."""
    connect = Connection.connect

    def mute(*args: Any, **kwargs: Any) -> Connection:
        connection = connect(*args, **kwargs)
        proxy.mute.set()
        return connection

    behind._pool.drop()
    with pytest.MonkeyPatch.context() as patch, bounded():
        patch.setattr(Connection, "connect", mute)
        told(lambda: behind.transact(Ask(ReadTimes())), "no answer for", StoreAway)


def test_a_backend_that_stands_still_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "_SILENCE", SILENCE)
    with closing(PostgresStore(url, connections=1, busy_seconds=0.1, vault=VAULT)) as store:
        stopped = store._pool.idle[0].info.backend_pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            with bounded():
                told(lambda: store.transact(Ask(SetHorizon(7))), "no answer for", StoreAway)
            assert store.transact(Ask(ReadTimes())).horizon == 0
            assert store._pool.idle[0].info.backend_pid != stopped
        finally:
            os.kill(stopped, signal.SIGCONT)


def test_a_host_that_is_gone_is_noticed_by_the_kernel() -> None:
    """The options of the socket, which an address of the operator's may set otherwise."""
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)

    def options(query: str) -> list[int]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = f"postgresql://me@127.0.0.1:{listening.getsockname()[1]}/keys?sslmode=disable{query}"
            connection = psycopg.pq.PGconn.connect_start(parse(address)[0].encode())
            with listening.accept()[0], socket.socket(fileno=os.dup(connection.socket)) as used:
                connection.connect_poll()
                found = [used.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)]
                found += [used.getsockopt(socket.IPPROTO_TCP, name) for name in names]
            connection.finish()
        return found

    assert options("") == [1, 10, 5, 3, 10_000]
    assert options("&keepalives_idle=60&keepalives_count=9") == [1, 60, 5, 9, 10_000]


# --- slow ---


@pytest.fixture
def slow(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[PostgresStore]:
    """A store in which each statement of VMs, keys and boots takes longer than a unit's may."""
    with closing(PostgresStore(url, vault=VAULT)) as store:
        store.transact(boot("first"))
    for table in ("vm", "generation", "audit"):
        ask(
            url,
            f"ALTER TABLE {table} RENAME TO {table}_;"
            f"CREATE VIEW {table} AS SELECT {table}_.* FROM {table}_, pg_sleep({UNITS_ONLY})",
        )
    ask(
        url,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;"
        "CREATE TRIGGER slow BEFORE UPDATE ON boot EXECUTE FUNCTION slow()",
    )
    monkeypatch.setattr(transactions, "_WORK", 0.3)
    monkeypatch.setattr(transactions, "_SILENCE", SILENCE)
    with closing(PostgresStore(url, connections=1, busy_seconds=0.1, vault=VAULT)) as store:
        yield store


@pytest.mark.parametrize("op", [Read(VmRow, VM), VoidTokens(VM, NOW)], ids=lambda op: type(op).__name__)
def test_a_statement_of_a_unit_that_takes_too_long_is_cancelled(slow: PostgresStore, op: StoreOp[object]) -> None:
    (connection,) = slow._pool.idle
    told(lambda: slow.transact(Ask(op)), r"a statement was cancelled \(.*statement timeout\)", StoreBusy)
    assert slow.transact(Ask(ReadTimes())).horizon == 0
    assert slow._pool.idle == [connection]


@pytest.mark.parametrize(
    "op",
    [
        Scan(VmRow),
        ReadAudit(0, 9),
        ReadNames(VM.name),
        ReadPage(VmRow, None, 9),
        ReadUnclaimed(None, 9),
        CountSealed(),
        CountStates(),
        ReadOtherwiseSealed("none", 9),
    ],
    ids=repr,
)
def test_what_operators_ask_of_whole_tables_takes_its_time(slow: PostgresStore, op: StoreOp[object]) -> None:
    began = time.monotonic()
    slow.transact(Ask(op))
    assert time.monotonic() - began > 1
    told(lambda: slow.transact(Ask(Read(VmRow, VM))), "a statement was cancelled", StoreBusy)  # the bounds are back


def test_a_restore_takes_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes every candidate of every VM."""
    ask(
        url,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;"
        "CREATE TRIGGER slow BEFORE UPDATE ON generation EXECUTE FUNCTION slow()",
    )
    monkeypatch.setattr(transactions, "_WORK", 0.3)
    monkeypatch.setattr(transactions, "_SILENCE", SILENCE)
    with closing(PostgresStore(url, busy_seconds=0.1, vault=VAULT)) as store:
        assert store.transact(StoreRestored(NOW)).before == 0


def test_a_check_takes_its_time(slow: PostgresStore) -> None:
    assert slow.check()["vm"] == 1
