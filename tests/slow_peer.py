"""A peer that is slow on purpose: its slowness is the behaviour under test, and the limit of who listens ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


def drip(send: Callable[[bytes], object], pieces: Iterable[bytes], pause_seconds: float) -> None:
    """Send one of ``pieces`` now and then, until they end or ``send`` raises."""
    for piece in pieces:
        _ = send(piece)
        time.sleep(pause_seconds)
