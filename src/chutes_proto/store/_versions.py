"""Schema versions: which one a database has, whether this release can work with it, and how it gets to ours.

Rules kept here:

* a database of another version is refused, with what to do; a server never migrates, an operator does;
* a database that holds anything else than our tables is another program's, and is left alone; one that holds them and
  has lost its version is damaged;
* all steps of a migration are one transaction, which whoever calls this begins and commits.
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
    """One open database. ``execute`` runs a statement and gives its rows; ``name`` is the store's, for errors."""

    name: str
    dialect: sql.Dialect
    execute: Callable[[str], Sequence[Sequence[Any]]]

    def found(self) -> int | None:
        """The schema version; None for an empty database.

        Raises `StoreError` where it is another program's, or damaged.
        """
        tables = {name for (name,) in self.execute(sql.TABLES[self.dialect])}
        if not tables:
            return None
        rows = self.execute(sql.READ_VERSION) if "fact" in tables else ()
        if not rows and tables.issuperset(kind.TABLE for kind in ROWS):
            raise self._lost()
        if not rows:
            raise StoreError(f"store {self.name}: it is another program's database; give the store a place of its own")
        version: int = rows[0][0]
        return version

    def require(self) -> None:
        """Raises `StoreError`, with what to do, unless the database has our schema version and all facts."""
        self._judge(self.found())
        text, _ = sql.statement(ReadTimes())
        if not self.execute(sql.for_driver(text, self.dialect)):
            raise self._lost()

    def judge(self, rows: Sequence[Sequence[Any]]) -> None:
        """As `require`, of a store that was open: ``rows`` are what `sql.READ_VERSION` gives now."""
        if not rows:
            raise self._lost()
        self._judge(rows[0][0])

    def _judge(self, found: int | None) -> None:
        if found == sql.SCHEMA_VERSION:
            return
        told = f"it has schema version {found}, and this release knows version {sql.SCHEMA_VERSION}"
        if found is None:
            told = "it is empty"
        known = found is None or 0 < found < sql.SCHEMA_VERSION
        remedy = f"run `{MIGRATE}`" if known else "run the release that made it"
        raise StoreError(f"store {self.name}: {told}; {remedy}; it was left as it is")

    def migrate(self) -> int | None:
        """Bring the database to our schema version, and return the one that it had.

        Raises `StoreError` for a version that this release does not know.
        """
        found = self.found()
        if found is None or 0 < found < sql.SCHEMA_VERSION:
            for statement in sql.schema(self.dialect, found or 0):
                _ = self.execute(statement)
        self.require()
        return found

    def _lost(self) -> StoreError:
        return StoreError(f"store {self.name}: {sql.LostFactError()}")
