"""Harnesses of the stores, for the contract suite."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread
import trio

import chutes_proto_asyncio
import chutes_proto_trio
from chutes_proto.blocking.postgres import PostgresStore
from chutes_proto.blocking.sqlite import SqliteStore
from chutes_proto.effects import Transact
from chutes_proto.store.memory import MemoryStore
from chutes_proto.store.run import Store, Unit

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
        self._store = SqliteStore(folder / "keys.db", busy_seconds=30)

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
        self._stores.append(SqliteStore(self._path, busy_seconds=30))
        return self._stores[-1]

    def close(self) -> None:
        for store in self._stores:
            store.check()
            store.close()


class PostgresHarness:
    """Every handle is a store with connections of its own, as in several processes."""

    together = staticmethod(together)

    def __init__(self, url: str) -> None:
        self._url = url
        self._stores = [PostgresStore(url, connections=4, busy_seconds=30, migrate=True)]

    def open(self) -> Store:
        self._stores.append(PostgresStore(self._url, connections=1, busy_seconds=30))
        return self._stores[-1]

    def close(self) -> None:
        for store in self._stores:
            store.close()


class SharedPostgresHarness(PostgresHarness):
    """Every handle is the same object, as in the worker threads of one server."""

    def open(self) -> Store:
        return self._stores[0]


class _Calling(threading.local):
    active = False


class BindingHarness:
    """A store behind a binding's performer: each call is a task's of one loop, as each request's of a server is."""

    def __init__(self, binding: str, harness: MemoryHarness | SharedSqliteHarness | SharedPostgresHarness) -> None:
        self._harness = harness
        self._calling = _Calling()
        if binding == "trio":
            self._run: Callable[..., Any] = trio.run
            self._await: Callable[..., Any] = trio.from_thread.run
            self._perform: Any = chutes_proto_trio.Performer(store=harness.open()).perform
            self._in_thread: Any = trio.to_thread.run_sync
            self._nursery: Any = trio.open_nursery
        else:
            self._run, self._await = anyio.run, anyio.from_thread.run
            self._perform = chutes_proto_asyncio.Performer(store=harness.open()).perform
            self._in_thread = anyio.to_thread.run_sync
            self._nursery = anyio.create_task_group

    def open(self) -> Store:
        return self

    def transact(self, unit: Unit[T]) -> T:
        # A call of `together` is in a worker thread of the loop, and any other is a loop of its own.
        run = self._await if self._calling.active else self._run
        result: T = run(self._perform, Transact(unit))
        return result

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T | Exception]:
        outcomes: list[Any] = [None] * len(calls)

        def call(index: int) -> None:
            self._calling.active = True
            try:
                outcomes[index] = calls[index]()
            except Exception as exc:  # noqa: BLE001 - it is what the call came to
                outcomes[index] = exc
            finally:
                self._calling.active = False

        async def all_at_once() -> None:
            async with self._nursery() as nursery:
                for index in range(len(calls)):
                    nursery.start_soon(partial(self._in_thread, call, index))

        self._run(all_at_once)
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        self._harness.close()
