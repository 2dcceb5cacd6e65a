"""A store behind a binding's performer, for the contract suite."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import anyio.to_thread

from chutes_proto.effects import Transact
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.store._run import Store, Unit
from tests.loops import on_loop
from tests.store.harness import MemoryHarness, SharedPostgresHarness, SharedSqliteHarness

T = TypeVar("T")


class _Calling(threading.local):
    active = False


class BindingHarness:
    """A store behind a binding's performer: each call is a task's of one loop, as each request's of a server is."""

    def __init__(self, loop: str, harness: MemoryHarness | SharedSqliteHarness | SharedPostgresHarness) -> None:
        self._harness = harness
        self._calling = _Calling()
        self._run: Callable[..., Any] = partial(on_loop, loop)
        self._perform: Any = Performer(store=harness.open()).perform

    def open(self) -> Store:
        return self

    def transact(self, unit: Unit[T]) -> T:
        # A call of `together` is in a worker thread of the loop, and any other is a loop of its own.
        run = anyio.from_thread.run if self._calling.active else self._run
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
            async with anyio.create_task_group() as nursery:
                for index in range(len(calls)):
                    nursery.start_soon(anyio.to_thread.run_sync, call, index)

        self._run(all_at_once)
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        self._harness.close()
