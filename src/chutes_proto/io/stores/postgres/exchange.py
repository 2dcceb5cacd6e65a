"""Several statements in one round trip to PostgreSQL: libpq's pipeline mode, on a connection of psycopg.

psycopg's own pipelines send each statement by itself, and take several times the CPU. Values and results are psycopg's;
results come in PostgreSQL's binary format, so that no bytes are written out as hex and read again.

Rules kept here:

* all statements are sent before the first answer is awaited. After one that fails the database carries out none of the
  others;
* a statement is prepared where it is first used, if the session is the connection's own. Behind a pooler nothing is.
  The name says which statement it is: in another session it is that same one, or none;
* a connection is left in no state in between: either each answer was received, or it is closed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import psycopg
from attrs import define, field
from psycopg import errors, generators
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import ConnStatus, ExecStatus, Format
from psycopg.waiting import Wait

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


def exchange(connection: psycopg.Connection[Any], prepared: Prepared, queries: Sequence[Query]) -> PQGen[list[Rows]]:
    """Carry out statements in their order, and return the rows of each; who drives it waits. Raises `StatementError`.

    A connection that is lost meanwhile raises `psycopg.OperationalError`, or as a statement's error what the database
    said last.
    """
    transformer = Transformer.from_context(connection)
    asked = _dumped(transformer, queries)
    pgconn = connection.pgconn
    new: dict[int, _Key] = {}  # by the index of the statement that is prepared before it is carried out
    is_whole = False
    try:
        pgconn.enter_pipeline_mode()
        for at, (text, values, types, formats) in enumerate(asked):
            name = prepared.names.get((text, types)) if prepared.is_own else None
            if name is None and prepared.is_own and len(prepared.names) < _PREPARED:
                new[at] = text, types
                name = prepared.names[text, types] = _name(text, types)
                pgconn.send_prepare(name, text, types)
            if name is None:
                pgconn.send_query_params(text, values, types, formats, result_format=Format.BINARY)
            else:
                pgconn.send_query_prepared(name, values, formats, result_format=Format.BINARY)
        pgconn.pipeline_sync()
        results = iter((yield from _receive(pgconn, len(asked) + len(new) + 1)))
        if pgconn.status == ConnStatus.OK:
            pgconn.exit_pipeline_mode()
            is_whole = True
    finally:
        if not is_whole:
            connection.close()
    rows: list[Rows] = []
    try:
        for at in range(len(asked)):
            if at in new:
                _ = _checked(at, results)
                del new[at]
            rows.append(_rows(transformer, _checked(at, results)))
        _ = _checked(len(asked), results)
    finally:
        for key in new.values():  # of these nothing was carried out
            del prepared.names[key]
    return rows


_Key: TypeAlias = tuple[bytes, tuple[int, ...]]
"""A statement, and the types of its parameters."""


def _dumped(
    transformer: abc.Transformer, queries: Sequence[Query]
) -> list[tuple[bytes, Sequence[Any], tuple[int, ...], Sequence[Any]]]:
    """Each statement with the values, types and formats of its parameters, as PostgreSQL takes them.

    Before the first is sent: a value may have no form in PostgreSQL. psycopg 3.2 takes no values and formats but in
    lists. Raises `StatementError`.
    """
    asked: list[tuple[bytes, Sequence[Any], tuple[int, ...], Sequence[Any]]] = []
    for text, values in queries:
        dumped: Sequence[Any] = []
        try:
            if values:
                dumped = transformer.dump_sequence(values, [PyFormat.AUTO] * len(values))
        except (psycopg.DataError, UnicodeEncodeError) as exc:
            raise StatementError(len(asked), exc) from exc
        types, formats = (transformer.types or (), transformer.formats or []) if values else ((), [])
        asked.append((text, dumped, types, formats))
    return asked


def _name(text: bytes, types: tuple[int, ...]) -> bytes:
    return b"chutes_" + hashlib.sha256(repr((text, types)).encode()).hexdigest()[:32].encode()


def _receive(pgconn: PGconn, count: int) -> PQGen[list[PGresult]]:
    """Send what is in the pipeline, and receive so many results; fewer if the connection is lost.

    psycopg's `fetch_many` would release the GIL four times for each statement, and `is_busy` does it once: each time
    a thread that waits for it is woken, mostly for nothing.
    """
    yield from generators.send(pgconn)
    found: list[PGresult] = []
    while len(found) < count:
        while pgconn.is_busy():
            while not (yield Wait.R):
                pass
            try:
                pgconn.consume_input()
            except psycopg.OperationalError:
                if not found:
                    raise
                return found  # the last result says why
        if (result := pgconn.get_result()) is None:
            break
        found.append(result)
        if result.status != ExecStatus.PIPELINE_SYNC:
            _ = pgconn.get_result()  # a statement has one result, and None, which libpq has already
    return found


def _checked(at: int, results: Iterator[PGresult]) -> PGresult:
    result = next(results, None)
    if result is None:
        raise psycopg.OperationalError("the connection was lost")
    if result.status not in _GOOD:
        raise StatementError(at, errors.error_from_result(result, encoding="utf-8"))
    return result


_GOOD: Final = frozenset({ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.PIPELINE_SYNC})


def _rows(transformer: abc.Transformer, result: PGresult) -> Rows:
    if not result.nfields:
        return []
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)
