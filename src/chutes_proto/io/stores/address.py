"""Addresses of stores: ``sqlite:/path`` or ``postgresql://user@host/database``.

Rules kept here:

* relative paths begin at the configuration file's directory, or at the working directory on a command line;
* PostgreSQL's driver is imported for a store in PostgreSQL only;
* an address may hold a password, and is never shown; the name of an open store holds none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from attrs import field, frozen

from chutes_proto.errors import StoreError
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._run import Store


class DurableStore(Store, Protocol):
    """A store on disk: `SqliteStore` or `PostgresStore`. May be used from several threads."""

    name: str
    """Its address for people, without a password."""
    found_version: int | None
    """The schema version that it had when it was opened with ``migrate``, None if it was empty."""
    schema_version: int
    """The schema version that it has; it may be newer than this release's, if it says that we can use it."""

    def check(self) -> dict[str, int]:
        """Read everything; return the number of rows of each table. Raises `StoreError`."""
        ...

    def check_writing(self) -> None:
        """Check, without a change, that rows may be added, changed and deleted. Raises `StoreError`."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


@frozen
class StorePlace:
    """The address of a store; ``connections`` is how many one process may have open to a database server."""

    address: str = field(repr=False)
    base: Path
    connections: int = 16

    @property
    def path(self) -> Path | None:
        """The file of a store in SQLite, otherwise None."""
        kind, colon, path = self.address.partition(":")
        return self.base / path if colon and kind == "sqlite" else None

    def is_made(self) -> bool:
        """Return whether the store exists; False for an SQLite file that `open` can make.

        Raises `StoreError` for a path at which it cannot be made.
        """
        path = self.path
        if path is None:
            return True
        try:
            if path.exists() and path.stat().st_size > 0:
                return True
        except OSError as exc:
            raise StoreError(f"store {path}: {exc.strerror}") from None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StoreError(f"store {path}: its directory does not exist, or this user may not write it")
        return False

    def open(self, *, migrate: bool = False) -> DurableStore:
        """Open it; with ``migrate``, bring its schema to this release's version.

        Raises `StoreError`, and `ConfigurationError` for an address that is not one of a store.
        """
        if self.path is not None:
            return SqliteStore(self.path, migrate=migrate)
        from chutes_proto.io.stores.postgres import PostgresStore

        return PostgresStore(self.address, connections=self.connections, migrate=migrate)
