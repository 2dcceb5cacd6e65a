"""Threads for the blocking work of an event loop, at a small part of the cost of anyio's own.

Those make an event, a scope and a copy of the context for each call; a boot hands over two transactions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias, TypeVar

from chutes_proto.io.loops import call_soon

T = TypeVar("T")

_Works: TypeAlias = "SimpleQueue[Callable[[], None] | None]"
"""The work of one thread; None ends it."""


class Threads:
    """Threads of the running event loop, each started when none is free and kept until `close`.

    Each has a queue of its own, and the one that was free last is handed the next work. Of several that wait at one
    queue, each work would wake two: the one that takes it, and one more that finds nothing.

    All methods are called in the loop's thread. There are never more threads than work was handed over at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._all: list[_Works] = []
        self._free: list[_Works] = []
        self._waiting = deque[Callable[[], None]]()
        self._call_soon = call_soon()

    def run(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Do ``work``, which raises nothing, in a thread, and call ``done`` with what it returns in the loop.

        Where the system allows no further thread, it waits for one of the others. Raises `RuntimeError` if there is
        none; then nothing is done.
        """
        if not self._free and not self._start():
            self._waiting.append(lambda: self.run(work, done))
            return
        works = self._free.pop()

        def carry_out() -> None:
            result = work()
            with suppress(RuntimeError):  # the loop has ended, and nobody waits for it
                _ = self._call_soon(lambda: ended(result))

        def ended(result: T) -> None:
            self._free.append(works)
            if self._waiting:
                self._waiting.popleft()()
            done(result)

        works.put(carry_out)

    def close(self) -> None:
        """End the threads, each after its work."""
        for works in self._all:
            works.put(None)

    def _start(self) -> bool:
        """Start a thread; return whether the system allows it. Raises `RuntimeError` if there is none yet."""
        works: _Works = SimpleQueue()
        try:
            Thread(target=_serve, args=(works,), name=self._name, daemon=True).start()
        except RuntimeError:
            if not self._all:
                raise
            return False
        self._all.append(works)
        self._free.append(works)
        return True


def _serve(works: _Works) -> None:
    while work := works.get():
        work()
        del work  # which has secrets: the next one may never come
