"""Addresses of stores: ``sqlite:/path`` or ``postgresql://user@host/database``.

Rules kept here:

* relative paths begin at the configuration file's directory, or at the working directory on a command line;
* PostgreSQL's driver is imported for a store in PostgreSQL only;
* an address may hold a password, and is never shown; the name of an open store holds none.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from attrs import evolve, field, frozen

from chutes_proto.errors import StoreError
from chutes_proto.io.files import is_there, name_file
from chutes_proto.io.stores.marks import Copy, MarkKeeper
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import Vault
from chutes_proto.store._copies import Copies
from chutes_proto.store._custody import Custody
from chutes_proto.store._mark import Entry
from chutes_proto.store._run import Store, untold
from chutes_proto.tlog.notes import Checkpoint


class DurableStore(Store, Protocol):
    """A store on disk: `SqliteStore` or `PostgresStore`. May be used from several threads."""

    name: str
    """Its address for people, without a password."""
    is_new: bool
    """Whether it was made when it was opened."""
    custody: Custody
    """The key of its rows' MACs, and the rows that were not authentic."""
    audit_waits: float
    """For how many seconds audit rows have waited for their place in the log, as its sequencer found last."""
    log_warning: str
    """Why what the audit log does not have yet matters, as its sequencer found last; empty while the log is in time."""
    rollbacks: Counter[str]
    """The number of repeated transactions of each unit, since it was opened."""

    @property
    def clock_skew(self) -> int | None:
        """Seconds of this machine's clock minus the store's own, compared last; None for a store without a clock.

        It is compared in every transaction, in one that is refused for it, too.
        """
        ...

    @property
    def callers(self) -> int:
        """The number of transactions that may run at once now, without waiting for each other in here."""
        ...

    def check(self, tell: Callable[[int, int], object] = untold) -> dict[str, int]:
        """Read everything; return the number of rows of each table. Raises `StoreError`.

        ``tell`` takes how much is read, and of how much, now and then.
        """
        ...

    def snapshot(self) -> AbstractContextManager[Store]:
        """One transaction, without a time limit, that reads the store as it is when the block begins.

        A unit that writes raises `StoreError`: what is remembered of the store would be wrong.
        """
        ...

    def check_writing(self) -> None:
        """Check, without a change, that rows may be added, changed and deleted. Raises `StoreError`."""
        ...

    def keep_mark(self) -> None:
        """Write the file of its mark from now on, as a server does; see `MarkKeeper`."""
        ...

    @property
    def store_id(self) -> int:
        """The random number of this store, which a restored backup of it has, too, and no copy."""
        ...

    @property
    def audited(self) -> threading.Event:
        """Set when this process has added audit rows, and committed that."""
        ...

    def hold_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Refuse this store from now on if its audit log does not extend ``checkpoint``; see `MarkKeeper`."""
        ...

    def take_acknowledged(self, age: float) -> list[tuple[Entry, float]]:
        """Return, once, the audit rows that this process committed ``age`` seconds ago; see `MarkKeeper`."""
        ...

    def copy_rows(self, copy: Copy) -> None:
        """Give ``copy`` the audit rows that this process adds, each with its number, once that is committed.

        It is called before the unit returns; what it raises, the unit's caller gets, and the rows stay.
        """
        ...

    @property
    def copies(self) -> Copies:
        """The state of the copies that `copy_rows` makes."""
        ...

    def add_note(self, note: str) -> None:
        """Add to `notes`, once."""
        ...

    @property
    def replication_warning(self) -> str:
        """Why a fail-over would lose what was acknowledged, or no commit ends, as found last; else empty."""
        ...

    @property
    def mark_warning(self) -> str:
        """Why the file of the mark cannot be written now; empty while it can, and where there is none."""
        ...

    @property
    def notes(self) -> list[str]:
        """Findings since it was opened that an operator should know."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


@frozen
class StorePlace:
    """The address of a store, and how it is opened; the options are those of `PostgresStore`."""

    address: str = field(repr=False)
    base: Path
    connections: int = 16
    clock_difference_seconds: float = 5.0
    require_synchronous: bool = False
    mark_file: Path | None = None
    vault: Vault | None = field(default=None, repr=False)
    """The KEKs that open the key of the rows' MACs."""

    @property
    def path(self) -> Path | None:
        """The file of a store in SQLite, otherwise None."""
        kind, colon, path = self.address.partition(":")
        return self.base / path if colon and kind == "sqlite" else None

    @property
    def name(self) -> str:
        """The store's name for people, without a password. Raises `ConfigurationError` for a wrong address."""
        if self.path is not None:
            return str(self.path.resolve())
        from chutes_proto.io.stores.postgres import name_of

        return name_of(self.address)

    def is_made(self) -> bool:
        """Return whether the store exists; False for an SQLite file that `open` can make.

        Raises `StoreError` for a path at which it cannot be made, and for one beside a mark, which is of another store.
        """
        path = self.path
        if path is None:
            return True
        try:
            if is_there(path) and path.stat().st_size > 0:
                return True
        except OSError as exc:
            raise StoreError(f"store {path}: {exc.strerror}") from None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise StoreError(f"store {path}: its directory does not exist, or this user may not write it")
        MarkKeeper(self.name, self.mark_file, Custody(self.name)).refuse_new("it does not exist")
        return False

    def require_made(self, mark_file: Path | None, *, new: bool = False) -> None:
        """Raise `StoreError` for a store that does not exist, unless it may be ``new``, and as `is_made` does.

        ``mark_file`` is that of its server, which no store may be made beside.
        """
        if not evolve(self, mark_file=mark_file).is_made() and not new:
            raise StoreError(f"store {self.path}: not made yet; a server makes it, or `chutes-proto store init`")

    @contextmanager
    def filling(self) -> Generator[DurableStore]:
        """Open it, alone, to be filled. An SQLite file that was not there gets its name when the block has ended well.

        So a copy that is interrupted, even by SIGKILL, leaves no file that looks like a store. Raises as `open` does.
        """
        path = self.path
        if path is None or self.is_made():
            with closing(self.open(alone=True)) as store:
                yield store
            return
        partial = path.with_name(f"{path.name}.partial")
        try:
            with closing(SqliteStore(partial, alone=True, vault=self.vault)) as store:
                yield store
            name_file(partial, path)
        finally:
            for end in ("", "-wal", "-shm"):
                with suppress(OSError):
                    Path(f"{partial}{end}").unlink()

    def open(self, *, make: bool = False, alone: bool = False) -> DurableStore:
        """Open it; with ``make``, make the schema in an empty database of PostgreSQL. An SQLite file is always made.

        With ``alone`` an SQLite file that any other process has open is refused, and nobody else can open it until it
        is closed; of a database in PostgreSQL it is noted, as a pooler may keep sessions of a server that was stopped.
        Raises `StoreError`, and `ConfigurationError` for an address that is not one of a store.
        """
        if self.path is not None:
            return SqliteStore(self.path, alone=alone, mark_file=self.mark_file, vault=self.vault)
        from chutes_proto.io.stores.postgres import PostgresStore

        return PostgresStore(
            self.address,
            connections=self.connections,
            clock_difference_seconds=self.clock_difference_seconds,
            require_synchronous=self.require_synchronous,
            mark_file=self.mark_file,
            make=make,
            alone=alone,
            vault=self.vault,
        )
