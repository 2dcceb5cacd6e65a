"""A store for tests: rows go through the statements that a file in SQLite gets, and are gone with the store."""

from __future__ import annotations

import sqlite3
import weakref
from functools import cache
from typing import Any, TypeVar

from chutes_proto.errors import StoreError
from chutes_proto.keys.vault import Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _sql as sql
from chutes_proto.store._custody import Custody
from chutes_proto.store._guard import Guard
from chutes_proto.store._rows import StoreOp
from chutes_proto.store._run import Unit, run_script
from chutes_proto.store._versions import Versions
from chutes_proto.units.custody import ENTROPY_SIZE, SealNew

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


class SealedStore(MemoryStore):
    """The same, with the guard of the real stores; a new one is sealed."""

    def __init__(self, vault: Vault, image: bytes | None = None) -> None:
        super().__init__(image)
        self.custody = Custody("memory")
        self.custody.hold(vault.unwrap)
        self.transact(SealNew(0, vault, Secret(bytes(range(ENTROPY_SIZE)))))

    def transact(self, unit: Unit[T]) -> T:
        _ = self.connection.execute("BEGIN")
        try:
            found = self._run(None, sql.READ_VERSION, ())
            Versions("memory", "sqlite", lambda text: self._run(None, text, ())).check(found)
            state = found[0][1]
            session = self.custody.session(state, lambda text: self._run(None, text, ()))
            guard = Guard(session, self._run)
            result = run_script(unit.script(), guard.perform)
            guard.finish()
        except (sqlite3.Error, sql.LostFactError) as exc:
            _ = self.connection.execute("ROLLBACK")
            raise StoreError(str(exc)) from exc
        except BaseException:
            _ = self.connection.execute("ROLLBACK")
            raise
        _ = self.connection.execute("COMMIT")
        return result

    def _run(self, _op: StoreOp[Any] | None, text: str, values: sql.Values) -> sql.Rows:
        return self.connection.execute(sql.for_driver(text, "sqlite"), values).fetchall()


@cache
def _empty() -> bytes:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    for statement in sql.schema("sqlite"):
        _ = connection.execute(statement)
    image = connection.serialize()
    connection.close()
    return image
