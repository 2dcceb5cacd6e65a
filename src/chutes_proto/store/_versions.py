"""The schema version of a database: reading it, checking it against this release's, and making the schema.

Rules kept here:

* a database of another version is refused and not changed; the error says what to run;
* a database with other tables than ours is another program's, and is left alone; one with our tables and without a
  version is damaged, and so is one that lacks a table: a server reads few of them beside the requests, and boots need
  all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from chutes_proto.errors import StoreError
from chutes_proto.store import _schema
from chutes_proto.store._rows import ROWS


@frozen
class Versions:
    """One open database. ``execute`` runs a statement and returns its rows; ``name`` is the store's, for errors."""

    name: str
    dialect: _schema.Dialect
    execute: Callable[[str], Sequence[Sequence[Any]]]

    def found(self) -> int | None:
        """The schema version; None for an empty database. Raises `StoreError` for a foreign or damaged one."""
        tables = {name for (name,) in self.execute(_schema.TABLES[self.dialect])}
        if not tables:
            return None
        rows = self.execute(_schema.READ_VERSION) if "fact" in tables else ()
        if not rows and tables.issuperset(kind.TABLE for kind in ROWS):
            raise self._lost()
        if not rows:
            raise StoreError(f"store {self.name}: it is another program's database; name an empty one, or a new file")
        version: int = rows[0][0]
        if type(version) is not int:  # SQLite takes a value of another type in any column
            raise self._lost()
        return version

    def require(self) -> None:
        """Raise `StoreError`, with what to do, unless the database is of our version and whole."""
        if self.found() is None:
            raise self._unusable("it is empty, as only a new one may be; run `chutes-proto store init`")
        self.check(self.execute(_schema.READ_VERSION))
        self.require_tables()
        if not self.execute(_schema.READ_HORIZON):
            raise self._lost()

    def check(self, rows: Sequence[Sequence[Any]]) -> None:
        """As `require`, for a store that was open: ``rows`` are the present result of `READ_VERSION`."""
        if not rows or type(rows[0][0]) is not int:
            raise self._lost()
        if (found := rows[0][0]) != _schema.SCHEMA_VERSION:
            raise self._unusable(
                f"it has schema version {found}, and this release knows version {_schema.SCHEMA_VERSION} alone; run the"
                " release that made it, or restore a backup that this one made"
            )

    def require_tables(self) -> None:
        """Raise `StoreError` for a database that lacks one of our tables."""
        ((missing,),) = self.execute(_schema.missing_table(self.dialect))
        if missing is not None:
            raise self.lacks(missing)

    def lacks(self, table: str) -> StoreError:
        """Return the error of a database without ``table``, or raise the one of its version if we cannot use that."""
        if table != "fact":  # which has the version
            self.check(self.execute(_schema.READ_VERSION))
        return StoreError(f"store {self.name}: the table {table} is missing; stop the server and restore a backup")

    def make(self) -> bool:
        """Make the schema in an empty database; return whether it was. Raises `StoreError` for one we cannot use."""
        is_empty = self.found() is None
        for statement in _schema.schema(self.dialect) if is_empty else ():
            _ = self.execute(statement)
        self.require()
        return is_empty

    def _unusable(self, state: str) -> StoreError:
        return StoreError(f"store {self.name}: {state}; nothing in it was changed")

    def _lost(self) -> StoreError:
        return StoreError(f"store {self.name}: {_schema.LostFactError()}")
