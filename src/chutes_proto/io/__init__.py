"""The outside world, by subject: the only package that opens files, sockets and databases. Nothing pure imports it."""

import time


def seconds_left(end: float) -> float:
    """Return the seconds until ``end``, a time of `time.monotonic`. Raises `TimeoutError` after it."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left
