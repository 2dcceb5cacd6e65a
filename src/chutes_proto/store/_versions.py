"""The schema version of a database: reading it, checking it against this release, and migration to this release's.

Rules kept here:

* a database of an older version is refused, and so is one of a newer version that says that servers of ours cannot use
  it; the error says what to run; a server never migrates, an operator does;
* a database with other tables than ours is another program's, and is left alone; one with our tables and without a
  version is damaged, and so is one that lacks a table: a server reads few of them beside the requests, and boots need
  all;
* all steps of a migration are one transaction, which the caller begins and commits, except for indexes that
  PostgreSQL builds meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from chutes_proto.errors import StoreError
from chutes_proto.store import _schema
from chutes_proto.store.rows import ROWS

MIGRATE = "chutes-proto store migrate"


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

    def require(self) -> int:
        """Return the schema version. Raises `StoreError`, with what to do, unless we can use it and it is whole."""
        if self.found() is None:
            raise self._unusable("it is empty, as only a new one may be", is_older=True)
        version = self.check(self.execute(_schema.READ_VERSION))
        self.require_tables()
        if not self.execute(_schema.READ_HORIZON):
            raise self._lost()
        return version

    def check(self, rows: Sequence[Sequence[Any]]) -> int:
        """As `require`, for a store that was open: ``rows`` are the present result of `READ_VERSION`."""
        if not rows or type(rows[0][0]) is not int:
            raise self._lost()
        found, since, *_ = rows[0]
        if found != _schema.SCHEMA_VERSION and not (
            found > _schema.SCHEMA_VERSION and type(since) is int and 0 < since <= _schema.SCHEMA_VERSION
        ):
            state = f"it has schema version {found}, and this release knows version {_schema.SCHEMA_VERSION}"
            raise self._unusable(state, is_older=0 < found < _schema.SCHEMA_VERSION)
        version: int = found
        return version

    def require_tables(self) -> None:
        """Raise `StoreError` for a database that lacks one of our tables."""
        ((missing,),) = self.execute(_schema.missing_table(self.dialect))
        if missing is not None:
            raise self.lacks(missing)

    def lacks(self, table: str) -> StoreError:
        """Return the error of a database without ``table``, or raise the one of its version if we cannot use that."""
        if table != "fact":  # which has the version
            _ = self.check(self.execute(_schema.READ_VERSION))
        return StoreError(f"store {self.name}: the table {table} is missing; stop the server and restore a backup")

    def require_indexes(self) -> None:
        """Raise `StoreError` if an index that PostgreSQL builds apart is not complete; a newer release needs others."""
        for name, _ in _schema.indexes() if self.found() == _schema.SCHEMA_VERSION else ():
            if list(self.execute(_schema.INDEX_STATE.format(name=name))) != [(True,)]:
                raise StoreError(f"store {self.name}: the index {name} is missing or incomplete; run `{MIGRATE}`")

    def migrate(self) -> int | None:
        """Migrate to our schema version; returns the previous one. Raises `StoreError` for an unknown version."""
        found = self.found()
        if found is None or 0 < found < _schema.SCHEMA_VERSION:
            for statement in _schema.schema(self.dialect, found or 0):
                _ = self.execute(statement)
        _ = self.require()
        return found

    def _unusable(self, state: str, *, is_older: bool) -> StoreError:
        remedy = f"run `{MIGRATE}`" if is_older else "run the release that made it"
        return StoreError(f"store {self.name}: {state}; {remedy}; nothing in it was changed")

    def _lost(self) -> StoreError:
        return StoreError(f"store {self.name}: {_schema.LostFactError()}")
