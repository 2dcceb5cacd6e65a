"""A connection to a database in PostgreSQL, which bounds how long an answer may take; and statements on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from attrs import frozen

from chutes_proto.io.stores.postgres.exchange import Prepared
from chutes_proto.store._custody import Session
from chutes_proto.store._rows import AuditRow, Insert, PurgeAudit
from chutes_proto.store._sql import for_driver

if TYPE_CHECKING:
    from psycopg.abc import PQGen

    from chutes_proto.io.stores.marks import Change
    from chutes_proto.io.stores.postgres.exchange import Rows
    from chutes_proto.store._rows import StoreOp
    from chutes_proto.store._sql import Values

T = TypeVar("T")


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that closes, as if it were lost, if an answer takes more than ``answer_seconds`` (None: no limit).

    The kernel does not end it if a process of the database hangs, or if a proxy has lost its other side.
    """

    answer_seconds: float | None = None
    is_looked_at: bool = False
    """Whether the database that it leads to was compared with the mark."""
    timeline: int = 0
    """The timeline of that database in the last transaction."""
    changes: Sequence[Change] = ()
    """The changes to audit rows of the present transaction, or of the last one."""
    session: Session = Session()
    """The keys of the rows in the present transaction."""
    has_begun: bool = False
    """Whether the present transaction, or the last one, was begun and found what it must."""
    is_committing: bool = False
    """Whether its commit may have been sent."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepared: Prepared = Prepared()
        self.ahead: dict[tuple[str, Values], Rows] = {}
        """The rows that statements of the present transaction returned before the unit asks for them."""
        self.held: list[Asked] = []
        """Writes that are sent with the next read, or with the commit."""
        self.heads: dict[tuple[str, str], int] = {}
        """The versions of the heads in the present transaction, or in the last one."""

    def begin_anew(self, answer_seconds: float) -> None:
        """Forget the last transaction."""
        self.has_begun = self.is_committing = False
        self.answer_seconds = answer_seconds
        self.changes, self.heads = (), {}
        self.ahead.clear()
        self.held.clear()

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Wait as psycopg does; nothing is sent before."""
        return super().wait(self._bounded(gen, time.monotonic()), *args, **kwargs)

    def _bounded(self, gen: PQGen[T], asked_at: float) -> PQGen[T]:
        try:
            wanted = next(gen)
            while True:
                # psycopg returns here several times a second; releases differ in the readiness that they then report.
                wanted = gen.send((yield wanted))
                if self.answer_seconds is not None and time.monotonic() - asked_at > self.answer_seconds:
                    self.close()
                    raise psycopg.OperationalError(f"no answer for {self.answer_seconds:g} seconds")
        except StopIteration as stop:
            result: T = stop.value
            return result


@frozen
class Asked:
    """A statement of a unit: the operation that it carries out, None of the guard, and where its changes are noted."""

    op: StoreOp[Any] | None
    text: str
    values: Values
    changes: list[Change]

    @property
    def is_audit(self) -> bool:
        """Whether it adds an audit row, whose number it returns."""
        return isinstance(self.op, Insert) and isinstance(self.op.row, AuditRow)

    @property
    def query(self) -> tuple[bytes, Values]:
        """The statement for the driver, and its values.

        Where an audit row is left out, or has a number that no mark can have, the division fails, and with it the
        COMMIT that is sent in the same round trip.
        """
        text = self.text
        if self.is_audit:
            text = f"WITH added AS ({text} RETURNING id) SELECT max(id), 1 / count(*) FROM added WHERE id > 0"  # noqa: S608 - of ours
        return query_of(text), self.values

    def note(self, rows: Rows) -> None:
        """Note a change of audit rows."""
        if isinstance(self.op, Insert) and isinstance(self.op.row, AuditRow):
            self.changes.append((rows[0][0], self.op.row))
        elif isinstance(self.op, PurgeAudit):
            self.changes.append(self.op)


@lru_cache(256)
def query_of(text: str) -> bytes:
    """A statement of ours for the driver."""
    return for_driver(text, "postgresql").encode()


def rows_of(connection: Connection, text: str) -> list[tuple[Any, ...]]:
    """Run one or several constant statements; return their rows in order."""
    cursor = connection.execute(text.encode(), prepare=False)
    rows: list[tuple[Any, ...]] = []
    while True:
        rows += () if cursor.rownumber is None else cursor.fetchall()
        if not cursor.nextset():
            return rows
