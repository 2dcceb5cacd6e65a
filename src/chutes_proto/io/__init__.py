"""The outside world, by subject: the only package that opens files, sockets and databases. Nothing pure imports it."""

import signal
import time


def seconds_left(end: float) -> float:
    """Return the seconds until ``end``, a time of `time.monotonic`. Raises `TimeoutError` after it."""
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def how_it_ended(status: int) -> str:
    """Say how a program failed that ended with ``status``, as `subprocess` has it: negative after a signal."""
    if status >= 0:
        return f"ended with exit status {status}"
    memory = ", as the kernel does if memory runs out" if status == -signal.SIGKILL else ""
    return f"was ended by signal {-status}{memory}"
