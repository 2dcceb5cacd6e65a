"""Harnesses of the stores, for the contract suite."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import field, frozen

from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._rows import ReadTimes, StoreOp
from chutes_proto.store._run import Script, Store, Unit
from chutes_proto.testing.store_suite._parts import VAULT
from tests.store.memory import MemoryStore

T = TypeVar("T")


def together(calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
    """All calls at once, as near as threads come to it."""
    outcomes: list[T | Exception | None] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(index: int) -> None:
        start.wait()
        try:
            outcomes[index] = calls[index]()
        except Exception as exc:  # noqa: BLE001 - it is what the call came to
            outcomes[index] = exc

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcome for outcome in outcomes if outcome is not None]


@frozen
class Gate(Unit[None]):
    """Stays inside its transaction, between two operations, until it is let go."""

    first: StoreOp[Any] = ReadTimes()
    last: StoreOp[Any] = ReadTimes()
    inside: threading.Event = field(factory=threading.Event)
    leave: threading.Event = field(factory=threading.Event)

    def script(self) -> Script[None]:
        yield from self.first
        self.inside.set()
        assert self.leave.wait(60)
        yield from self.last


class Locked:
    """A store that is used by one thread at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()

    def transact(self, unit: Unit[T]) -> T:
        with self._lock:
            return self.store.transact(unit)


class MemoryHarness:
    together = staticmethod(together)

    def __init__(self, store: Store | None = None) -> None:
        self._store = Locked(store or MemoryStore())

    def open(self) -> Store:
        return self._store

    def close(self) -> None:
        pass


class SharedSqliteHarness:
    """Every handle is the same object, as in the worker threads of one server."""

    together = staticmethod(together)

    def __init__(self, folder: Path) -> None:
        self._store = SqliteStore(folder / "keys.db", busy_seconds=30, vault=VAULT)

    def open(self) -> Store:
        return self._store

    def close(self) -> None:
        self._store.close()


class SqliteHarness:
    """Every handle is a connection of its own, as in several processes."""

    together = staticmethod(together)

    def __init__(self, folder: Path) -> None:
        self._path = folder / "keys.db"
        self._stores: list[SqliteStore] = []

    def open(self) -> Store:
        self._stores.append(SqliteStore(self._path, busy_seconds=30, vault=VAULT))
        return self._stores[-1]

    def close(self) -> None:
        for store in self._stores:
            store.check()
            store.close()


class PostgresHarness:
    """Every handle is a store with connections of its own, as in several processes; our tables are at ``url``."""

    together = staticmethod(together)

    def __init__(self, url: str) -> None:
        self._url = url
        self._stores: list[PostgresStore] = []

    def open(self) -> Store:
        self._stores.append(PostgresStore(self._url, connections=1, busy_seconds=30, vault=VAULT))
        return self._stores[-1]

    def close(self) -> None:
        for store in self._stores:
            store.close()


class SharedPostgresHarness(PostgresHarness):
    """Every handle is the same object, as in the worker threads of one server."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._store = PostgresStore(url, connections=4, busy_seconds=30, vault=VAULT)
        self._stores.append(self._store)

    def open(self) -> Store:
        return self._store
