"""A store for tests: rows go through the statements that a file in SQLite gets, and are gone with the store."""

from __future__ import annotations

import sqlite3
import weakref
from functools import cache
from typing import Any, TypeVar

from chutes_proto.errors import StoreError
from chutes_proto.store import sql
from chutes_proto.store._run import Unit, run_script
from chutes_proto.store.rows import StoreOp

T = TypeVar("T")


class MemoryStore:
    """An empty store, or one that holds what the ``image`` of another one holds. One transaction at a time."""

    def __init__(self, image: bytes | None = None) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.connection.deserialize(image or _empty())
        _ = self.connection.execute("PRAGMA foreign_keys = 1")
        # Not __del__: in a cycle that is collected, the connection may be finalized first, and warns.
        _ = weakref.finalize(self, self.connection.close)

    def image(self) -> bytes:
        """All that the store holds, as it is now."""
        return self.connection.serialize()

    def perform(self, op: StoreOp[Any]) -> Any:
        text, values = sql.statement(op)
        try:
            rows = self.connection.execute(sql.for_driver(text, "sqlite"), values).fetchall()
        except sqlite3.Error as exc:
            raise StoreError(str(exc)) from exc
        return sql.decode(op, rows)

    def transact(self, unit: Unit[T]) -> T:
        _ = self.connection.execute("BEGIN")
        try:
            result = run_script(unit.script(), self.perform)
        except BaseException:
            _ = self.connection.execute("ROLLBACK")
            raise
        _ = self.connection.execute("COMMIT")
        return result


@cache
def _empty() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in sql.schema("sqlite"):
        _ = connection.execute(statement)
    image = connection.serialize()
    connection.close()
    return image
