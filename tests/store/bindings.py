"""A store behind a binding's performer, with turns as a server has them, for the contract suite."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, TypeVar

import anyio
from anyio.from_thread import start_blocking_portal

from chutes_proto.effects import Transact
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.stores.turns import open_turns
from chutes_proto.store._run import Store, Unit
from tests.store.harness import together

T = TypeVar("T")


class BindingHarness:
    """A store behind a binding's performer: each call is a task of one loop, as each request of a server is."""

    together = staticmethod(together)

    def __init__(self, loop: str, harness: Any) -> None:
        self._stack = ExitStack()
        _ = self._stack.callback(harness.close)
        self._loop = self._stack.enter_context(start_blocking_portal(backend=loop))
        turns = self._stack.enter_context(self._loop.wrap_async_context_manager(open_turns(harness.open())))
        self._perform: Any = Performer(transact=turns.transact).perform

    def open(self) -> Store:
        return self

    def transact(self, unit: Unit[T]) -> T:
        outcome, fault = self._loop.call(self._outcome, unit)
        if fault is not None:
            raise fault
        result: T = outcome
        return result

    async def _outcome(self, unit: Unit[T]) -> tuple[Any, BaseException | None]:
        """What the unit comes to: an exception of any kind is the caller's, and would end the loop."""
        try:
            with anyio.fail_after(60):
                return await self._perform(Transact(unit)), None
        except BaseException as exc:  # noqa: BLE001
            return None, exc

    def close(self) -> None:
        self._stack.close()
