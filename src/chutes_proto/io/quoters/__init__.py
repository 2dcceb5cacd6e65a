"""Where quotes come from on a real machine, one quoter a file. `chutes_proto.io.quoters.choose` chooses among them."""

from __future__ import annotations

import time
from typing import Final

MAX_QUOTE: Final = 48 * 1024
"""No more than this fits, in base64, into the 64 KiB body that a server reads."""


def seconds_left(end: float) -> float:
    """Until ``end``, in seconds of `time.monotonic`. Raises `TimeoutError` when that is over."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left
