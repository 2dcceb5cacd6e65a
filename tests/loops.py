"""Run one call on an event loop, for tests of things that are on a loop or without any.

A test that is on both loops is an ``async def`` marked ``anyio``, and one that is on trio is marked ``trio``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar, TypeVarTuple

import anyio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def on_loop(loop: str, work: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """Call ``work`` with ``arguments`` on a new loop, ``trio`` or ``asyncio``; no longer than a minute."""

    async def bounded() -> T:
        with anyio.fail_after(60):
            return await work(*arguments)

    return anyio.run(bounded, backend=loop)
