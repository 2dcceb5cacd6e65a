"""Threads for the blocking work of an event loop, at a small part of the cost of anyio's own.

Those make an event, a scope and a copy of the context for each call; a boot hands over two transactions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from chutes_proto.io.loops import call_soon

T = TypeVar("T")


class Threads:
    """Threads of the running event loop, each started when none is free and kept until `close`.

    All methods are called in the loop's thread. There are never more threads than work was handed over at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting = SimpleQueue[Callable[[], None] | None]()
        self._busy = self._started = 0
        self._call_soon = call_soon()

    def run(self, work: Callable[[], T], done: Callable[[T], None]) -> None:
        """Do ``work``, which raises nothing, in a thread, and call ``done`` with what it returns in the loop.

        Where the system allows no further thread, it waits for one of the others. Raises `RuntimeError` if there is
        none; then nothing is done.
        """

        def carry_out() -> None:
            result = work()
            with suppress(RuntimeError):  # the loop has ended, and nobody waits for it
                _ = self._call_soon(lambda: ended(result))

        def ended(result: T) -> None:
            self._busy -= 1
            done(result)

        if self._busy >= self._started:
            try:
                Thread(target=self._serve, name=self._name, daemon=True).start()
                self._started += 1
            except RuntimeError:
                if not self._started:
                    raise
        self._busy += 1
        self._waiting.put(carry_out)

    def close(self) -> None:
        """End the threads, each after its work."""
        for _ in range(self._started):
            self._waiting.put(None)

    def _serve(self) -> None:
        while work := self._waiting.get():
            work()
