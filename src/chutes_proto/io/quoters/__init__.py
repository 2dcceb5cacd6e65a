"""Where quotes come from on a real machine, one quoter a file. `chutes_proto.io.quoters.choose` chooses among them."""

from __future__ import annotations

import time


def seconds_left(end: float) -> float:
    """Until ``end``, in seconds of `time.monotonic`. Raises `TimeoutError` when that is over."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left
