"""Signals to stop a program that ends its work first, and at a second one ends at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from socket import socket, socketpair
from typing import Final

STOPS: Final = (signal.SIGINT, signal.SIGTERM)

_SAME_SECONDS: Final = 0.5
"""Longer than a busy machine takes for the two ways, shorter than a person takes to press a key again."""


class SignalsToStop:
    """Tells a second signal from one that comes by two ways, as `timeout` sends it to a process and to its group."""

    def __init__(self) -> None:
        self._last = 0
        self._until = 0.0

    def is_another(self, number: int) -> bool:
        """Whether a signal that has arrived now is not the one before."""
        now = time.monotonic()
        if number == self._last and now < self._until:
            return False
        self._last, self._until = number, now + _SAME_SECONDS
        return True


def ignore(numbers: Iterable[int]) -> None:
    """Let signals do nothing to this process, which ends: ended by one, it would lose its log and leave its files.

    Python sets a handler back to the default before the process has ended, and lets this be.
    """
    for number in numbers:
        _ = signal.signal(number, signal.SIG_IGN)


@contextmanager
def heard(numbers: Collection[int]) -> Generator[socket]:
    """A socket whose bytes are the numbers of signals that come from now on; at the end they are ignored.

    An event loop that stops to listen for a signal sets the default for a moment. Must be entered in the main thread.
    """
    reader, writer = socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            for number in numbers:
                _ = signal.signal(number, _noted)
            yield reader
        finally:
            ignore(numbers)
            _ = signal.set_wakeup_fd(before)


def _noted(*_: object) -> None:
    """Python has written the number to the socket."""
