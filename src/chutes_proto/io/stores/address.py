"""The store that an operator names: ``sqlite:/path`` or ``postgresql://user@host/database``.

Rules kept here:

* relative paths begin where the address was written: at the configuration file's directory, or at the working one;
* PostgreSQL's driver is imported for a store in PostgreSQL only;
* an address may hold a password, and is shown nowhere; the name of an open store holds none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, TypeVar

from attrs import field, frozen

from chutes_proto.errors import StoreError
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._run import Unit

T = TypeVar("T")


class DurableStore(Protocol):
    """What `SqliteStore` and `PostgresStore` are; may be used from several threads."""

    @property
    def name(self) -> str:
        """Where it is, for people."""
        ...

    @property
    def found_version(self) -> int | None:
        """The schema version that it had when it was opened to migrate it, None if it was empty."""
        ...

    def transact(self, unit: Unit[T], /) -> T:
        """See `chutes_proto.store._run.Store`."""
        ...

    def check(self) -> dict[str, int]:
        """Read everything; returns how many rows each table has. Raises `StoreError`."""
        ...

    def check_writing(self) -> None:
        """That rows may be added, changed and deleted; none is. Raises `StoreError`."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


@frozen
class StorePlace:
    """Where a store is; ``connections`` is how many one process may have open to a database server."""

    address: str = field(repr=False)
    base: Path
    connections: int = 16

    @property
    def path(self) -> Path | None:
        """The file of a store in SQLite."""
        kind, colon, path = self.address.partition(":")
        return self.base / path if colon and kind == "sqlite" else None

    def is_made(self) -> bool:
        """Whether there is anything. False for an SQLite file that opening would make, if it could be made there.

        Raises `StoreError` if it could not.
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
            raise StoreError(f"store {path}: its directory is not there, or this user may not write it")
        return False

    def open(self, *, migrate: bool = False) -> DurableStore:
        """Open it, and with ``migrate`` bring its schema to this release's version.

        Raises `StoreError`, and `ConfigurationError` for an address that leads nowhere.
        """
        if self.path is not None:
            return SqliteStore(self.path, migrate=migrate)
        from chutes_proto.io.stores.postgres import PostgresStore

        return PostgresStore(self.address, connections=self.connections, migrate=migrate)
