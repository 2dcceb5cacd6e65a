"""Quoters, one a file. `chutes_proto.io.quoters.choose` chooses among them."""

from __future__ import annotations

import time
from typing import Final

MAX_QUOTE: Final = 48 * 1024
"""The longest quote in bytes: in base64 it fits into the 64 KiB body that a server reads."""


def seconds_left(end: float) -> float:
    """Return the seconds until ``end``, a time of `time.monotonic`. Raises `TimeoutError` after it."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left
