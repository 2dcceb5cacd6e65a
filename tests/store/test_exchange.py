"""Several statements in one round trip: all results or none, values whole, and no connection left in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
import pytest

from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.postgres.exchange import Prepared, Query, Rows, StatementError, exchange
from chutes_proto.testing.store_suite._parts import VAULT
from tests.store.test_postgres import ask
from tests.waiting import wait_until

BEGIN = (b"BEGIN ISOLATION LEVEL SERIALIZABLE", ())
COMMIT = (b"COMMIT", ())


@pytest.fixture
def connect(database: str) -> Iterator[Callable[[], psycopg.Connection[Any]]]:
    """Make connections as the store does, and close them."""
    made: list[psycopg.Connection[Any]] = []

    def connect() -> psycopg.Connection[Any]:
        made.append(psycopg.connect(database, autocommit=True))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


def carry_out(connection: psycopg.Connection[Any], prepared: Prepared, queries: Sequence[Query]) -> list[Rows]:
    return connection.wait(exchange(connection, prepared, queries))


@pytest.fixture
def connection(connect: Callable[[], psycopg.Connection[Any]]) -> psycopg.Connection[Any]:
    return connect()


VALUES = [
    *(b"", b"\0\xff\\x00", bytes(range(256)), None, True, False, "", "\\x00", "é 漢 \N{ROCKET}", "'); --"),
    *(number + more for number in (0, -(2**15), 2**15, -(2**31), 2**31, 2**53, 2**63 - 2) for more in (0, 1)),
    -(2**63),
]


@pytest.mark.parametrize("is_own", [True, False])
def test_values_come_back_as_they_went(connection: psycopg.Connection[Any], is_own: bool) -> None:
    types = {bytes: b"bytea", bool: b"boolean", str: b"text", int: b"bigint", type(None): b"bytea"}
    prepared = Prepared(is_own)
    for _ in range(2):  # prepared by now
        queries = [(b"SELECT $1::" + types[type(value)], (value,)) for value in VALUES]
        assert carry_out(connection, prepared, queries) == [[(value,)] for value in VALUES]
    rows = [(value,) for value in VALUES if type(value) is int]
    marks = b", ".join(b"($%d::bigint)" % (at + 1) for at in range(len(rows)))
    many = [(b"SELECT * FROM (VALUES " + marks + b") AS found", [value for (value,) in rows])]
    assert carry_out(connection, prepared, many) == [rows]


def test_both_sides_may_have_more_to_say_than_fits_between_them(connection: psycopg.Connection[Any]) -> None:
    """Neither waits for the other to listen first: 16 MiB each way, in statements that all are sent before an answer is
    awaited."""
    values = [bytes([number]) * 2**20 for number in range(16)]
    found = carry_out(connection, Prepared(), [(b"SELECT $1::bytea", (value,)) for value in values])
    assert found == [[(value,)] for value in values]


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("state", ["40001", "40P01", "23505", "57014", "XX000"])
def test_after_a_fault_nothing_more_is_carried_out_and_the_connection_works(
    connection: psycopg.Connection[Any], state: str, is_own: bool
) -> None:
    prepared = Prepared(is_own)
    add = b"INSERT INTO seen VALUES ($1::int)"
    fail = f"DO $$ BEGIN RAISE EXCEPTION 'so it is' USING ERRCODE = '{state}'; END $$".encode()
    _ = carry_out(connection, prepared, [(b"CREATE TEMPORARY TABLE seen (number int)", ())])
    for number in range(3):
        after = f"SELECT {number}, number FROM seen".encode()  # is never prepared, and not taken for it
        with pytest.raises(StatementError) as caught:
            _ = carry_out(connection, prepared, [BEGIN, (add, (1,)), (fail, ()), (after, ()), (add, (2,)), COMMIT])
        assert caught.value.at == 2
        assert isinstance(caught.value.error, psycopg.Error)
        assert caught.value.error.sqlstate == state
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR
        assert carry_out(connection, prepared, [(b"ROLLBACK", ()), (after, ())]) == [[], []]
    assert carry_out(connection, prepared, [BEGIN, (add, (3,)), (b"SELECT * FROM seen", ()), COMMIT])[2] == [(3,)]


def test_a_value_that_has_no_form_is_said_before_anything_is_sent(connection: psycopg.Connection[Any]) -> None:
    for value in ("\0", "\ud800"):
        with pytest.raises(StatementError) as caught:
            _ = carry_out(connection, Prepared(), [BEGIN, (b"SELECT $1::text", (value,))])
        assert caught.value.at == 1
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_another_session_never_takes_a_statement_for_another(connect: Callable[[], psycopg.Connection[Any]]) -> None:
    """As behind a pooler that passes on a session's number: it has that statement, or none of that name."""
    one, other = connect(), connect()
    of_one, of_other = Prepared(is_own=True), Prepared(is_own=True)
    _ = carry_out(one, of_one, [(b"SELECT 'one'", ()), (b"SELECT 'both'", ())])
    _ = carry_out(other, of_other, [(b"SELECT 'other'", ()), (b"SELECT 'both'", ())])
    assert carry_out(other, of_one, [(b"SELECT 'both'", ())]) == [[("both",)]]
    with pytest.raises(StatementError) as caught:
        _ = carry_out(other, of_one, [(b"SELECT 'one'", ())])
    assert isinstance(caught.value.error, psycopg.errors.InvalidSqlStatementName)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_session_that_ends_in_the_middle_is_an_error_and_closed(connection: psycopg.Connection[Any], at: int) -> None:
    queries = [(b"SELECT 1", ()), (b"SELECT 2", ())]
    queries.insert(at, (b"SELECT pg_terminate_backend(pg_backend_pid())", ()))
    with pytest.raises((StatementError, psycopg.OperationalError)):
        _ = carry_out(connection, Prepared(), queries)
    assert connection.closed
    with pytest.raises(psycopg.OperationalError):
        _ = carry_out(connection, Prepared(), queries)


def test_a_session_that_was_idle_for_too_long_is_an_error_and_closed(
    connection: psycopg.Connection[Any], database: str
) -> None:
    limit = b"SET LOCAL idle_in_transaction_session_timeout = 1"
    _ = carry_out(connection, Prepared(), [BEGIN, (limit, ())])
    session = f"SELECT 1 FROM pg_stat_activity WHERE pid = {connection.info.backend_pid}"
    _ = wait_until(lambda: not ask(database, session))
    with pytest.raises((StatementError, psycopg.OperationalError)):
        _ = carry_out(connection, Prepared(), [(b"SELECT 1", ()), COMMIT])
    assert connection.closed


def test_a_caller_that_is_interrupted_leaves_nothing_that_runs(migrated_schema: str) -> None:
    """Neither in the database, nor answers that the next one would take for its own."""
    store = PostgresStore(migrated_schema, vault=VAULT)
    connection = store._pool.idle.pop()
    session = f"pid = {connection.info.backend_pid} AND wait_event = 'PgSleep'"
    active = f"SELECT 1 FROM pg_stat_activity WHERE {session}"

    def interrupt() -> None:
        _ = wait_until(lambda: ask(migrated_schema, active))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            queries = [BEGIN, (b"SELECT pg_sleep(600)", ()), (b"SELECT 1", ()), COMMIT]
            _ = store._database._exchanged(connection, (), *queries)
        _ = wait_until(lambda: not ask(migrated_schema, active))
        assert carry_out(connection, Prepared(), [(b"ROLLBACK", ()), (b"SELECT 2", ())]) == [[], [(2,)]]
    finally:
        thread.join()
        _ = signal.signal(signal.SIGINT, before)
        connection.close()
        store.close()
