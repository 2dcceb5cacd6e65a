"""Several statements in one round trip to PostgreSQL: libpq's pipeline mode, on a connection of psycopg.

psycopg's own pipelines send each statement by itself, and take several times the CPU. Values and results are psycopg's.

Rules kept here:

* all statements are sent before the first answer is awaited. After one that fails the database carries out none of the
  others;
* a statement is prepared where it is first used, if the session is the connection's own. Behind a pooler nothing is.
  The name says which statement it is: in another session it is that same one, or none;
* a connection is left in no state in between: either each answer was received, or it is closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import psycopg
from attrs import define, field, frozen
from psycopg import errors, generators
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ConnStatus, ExecStatus

if TYPE_CHECKING:
    from psycopg import abc
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn, PGresult

Query: TypeAlias = tuple[bytes, Sequence[Any]]
"""A statement with PostgreSQL's own marks, and its parameters."""
Rows: TypeAlias = list[tuple[Any, ...]]

_PREPARED: Final = 200
"""The most statements that are prepared in a session."""


class StatementError(Exception):
    """The statement with the index ``at`` failed with ``error``: none after it was carried out.

    An index after the last is the end of all, which a connection that was lost did not reach.
    """

    def __init__(self, at: int, error: Exception) -> None:
        super().__init__(at, error)
        self.at = at
        self.error = error


@define
class Prepared:
    """The statements that are prepared in a session.

    ``is_own``: each transaction meets that session; None before the first.
    """

    is_own: bool | None = None
    names: dict[_Key, bytes] = field(factory=dict["_Key", bytes])


def exchange(connection: psycopg.Connection[Any], prepared: Prepared, queries: Sequence[Query]) -> list[Rows]:
    """Carry out statements in their order, and return the rows of each. Raises `StatementError`.

    A connection that is lost meanwhile raises `psycopg.OperationalError`, or as a statement's error what the database
    said last.
    """
    transformer = Transformer.from_context(connection)
    asked: list[_Asked] = []
    for at, (text, values) in enumerate(queries):  # before the first is sent: a value may have no form in PostgreSQL
        try:
            made = transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
        except (psycopg.DataError, UnicodeEncodeError) as exc:
            raise StatementError(at, exc) from exc
        asked.append(_Asked(text, made, transformer.types or (), transformer.formats or ()))
    pgconn = connection.pgconn
    known = set(prepared.names)
    is_whole = False
    try:
        pgconn.enter_pipeline_mode()
        begun = [_send(pgconn, prepared, each) for each in asked]
        pgconn.pipeline_sync()
        results = connection.wait(_receive(pgconn, len(begun) + sum(begun) + 1))
        if pgconn.status == ConnStatus.OK:
            pgconn.exit_pipeline_mode()
            is_whole = True
    finally:
        if not is_whole:
            connection.close()
    rows: list[Rows] = []
    left = iter(results)
    try:
        for at, (each, is_new) in enumerate(zip(asked, begun, strict=True)):
            if is_new:
                _ = _checked(at, next(left, None))
                known.add(each.key)
            rows.append(_rows(transformer, _checked(at, next(left, None))))
        _ = _checked(len(asked), next(left, None))
    finally:
        for key in prepared.names.keys() - known:  # of these nothing was carried out
            del prepared.names[key]
    return rows


_Key: TypeAlias = tuple[bytes, tuple[int, ...]]
"""A statement, and the types of its parameters."""


@frozen
class _Asked:
    text: bytes
    values: Sequence[Any]
    types: tuple[int, ...]
    formats: Sequence[Any]

    @property
    def key(self) -> _Key:
        return self.text, self.types

    def new_name(self) -> bytes:
        return b"chutes_" + hashlib.sha256(repr(self.key).encode()).hexdigest()[:32].encode()


def _send(pgconn: PGconn, prepared: Prepared, asked: _Asked) -> bool:
    """Put a statement into the pipeline; return whether it is prepared before."""
    name = prepared.names.get(asked.key) if prepared.is_own else None
    if name is None and (not prepared.is_own or len(prepared.names) >= _PREPARED):
        pgconn.send_query_params(asked.text, asked.values, asked.types, asked.formats)
        return False
    is_new = name is None
    if name is None:
        name = prepared.names[asked.key] = asked.new_name()
        pgconn.send_prepare(name, asked.text, asked.types)
    pgconn.send_query_prepared(name, asked.values, asked.formats)
    return is_new


def _receive(pgconn: PGconn, count: int) -> PQGen[list[PGresult]]:
    """Send what is in the pipeline, and receive so many results; fewer if the connection is lost."""
    yield from generators.send(pgconn)
    found: list[PGresult] = []
    while len(found) < count:
        try:
            more = yield from generators.fetch_many(pgconn)
        except psycopg.OperationalError:
            if not found:
                raise
            break  # the last result says why
        if not more:
            break
        found += more
    return found


def _checked(at: int, result: PGresult | None) -> PGresult:
    if result is None:
        raise psycopg.OperationalError("the connection was lost")
    if result.status not in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.PIPELINE_SYNC):
        raise StatementError(at, errors.error_from_result(result, encoding="utf-8"))
    return result


def _rows(transformer: abc.Transformer, result: PGresult) -> Rows:
    if result.status != ExecStatus.TUPLES_OK:
        return []
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)
