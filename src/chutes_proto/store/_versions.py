"""The schema version of a database: reading it, checking it against this release, and migration to this release's.

Rules kept here:

* a database of another version is refused, and the error says what to run; a server never migrates, an operator does;
* a database with other tables than ours is another program's, and is left alone; one with our tables and without a
  version is damaged;
* all steps of a migration are one transaction, which the caller begins and commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from chutes_proto.errors import StoreError
from chutes_proto.store import sql
from chutes_proto.store.rows import ROWS, ReadTimes

MIGRATE = "chutes-proto store migrate"


@frozen
class Versions:
    """One open database. ``execute`` runs a statement and returns its rows; ``name`` is the store's, for errors."""

    name: str
    dialect: sql.Dialect
    execute: Callable[[str], Sequence[Sequence[Any]]]

    def found(self) -> int | None:
        """The schema version; None for an empty database. Raises `StoreError` for a foreign or damaged one."""
        tables = {name for (name,) in self.execute(sql.TABLES[self.dialect])}
        if not tables:
            return None
        rows = self.execute(sql.READ_VERSION) if "fact" in tables else ()
        if not rows and tables.issuperset(kind.TABLE for kind in ROWS):
            raise self._lost()
        if not rows:
            raise StoreError(f"store {self.name}: it is another program's database; name an empty one, or a new file")
        version: int = rows[0][0]
        return version

    def require(self) -> None:
        """Raise `StoreError`, with what to do, unless the database has our schema version and all facts."""
        self._check(self.found())
        text, _ = sql.statement(ReadTimes())
        if not self.execute(sql.for_driver(text, self.dialect)):
            raise self._lost()

    def check(self, rows: Sequence[Sequence[Any]]) -> None:
        """As `require`, for a store that was open: ``rows`` are the present result of `sql.READ_VERSION`."""
        if not rows:
            raise self._lost()
        self._check(rows[0][0])

    def _check(self, found: int | None) -> None:
        if found == sql.SCHEMA_VERSION:
            return
        state = f"it has schema version {found}, and this release knows version {sql.SCHEMA_VERSION}"
        if found is None:
            state = "it is empty"
        known = found is None or 0 < found < sql.SCHEMA_VERSION
        remedy = f"run `{MIGRATE}`" if known else "run the release that made it"
        raise StoreError(f"store {self.name}: {state}; {remedy}; nothing in it was changed")

    def migrate(self) -> int | None:
        """Migrate to our schema version; returns the previous one. Raises `StoreError` for an unknown version."""
        found = self.found()
        if found is None or 0 < found < sql.SCHEMA_VERSION:
            for statement in sql.schema(self.dialect, found or 0):
                _ = self.execute(statement)
        self.require()
        return found

    def _lost(self) -> StoreError:
        return StoreError(f"store {self.name}: {sql.LostFactError()}")
