"""Wait for an event of another task, thread or process: never for a time that should be enough."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from pathlib import Path
from typing import Any

import anyio

LIMIT_SECONDS = 60.0
"""How long any event may take. Generous: a slow machine is not a failure."""
PAUSE_SECONDS = 0.005


def wait_until(holds: Callable[[], object], limit_seconds: float = LIMIT_SECONDS) -> Any:
    """Return the first true result of ``holds``. Raises `AssertionError` where there is none within the limit."""
    end = time.monotonic() + limit_seconds
    while not (result := holds()):
        assert time.monotonic() < end, f"not true within {limit_seconds:g} s: {holds}"
        time.sleep(PAUSE_SECONDS)
    return result


async def async_wait_until(
    holds: Callable[[], object | Awaitable[object]], limit_seconds: float = LIMIT_SECONDS
) -> Any:
    """As `wait_until`, and other tasks of the event loop go on meanwhile."""
    end = time.monotonic() + limit_seconds
    while True:
        result = holds()
        if isawaitable(result):
            result = await result
        if result:
            return result
        assert time.monotonic() < end, f"not true within {limit_seconds:g} s: {holds}"
        await anyio.sleep(PAUSE_SECONDS)


def send_twice(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process twice at once, as `timeout` does; of two that are pending the kernel may make one."""

    def has_none_pending() -> bool:
        return re.search(r"^ShdPnd:\t0+$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE) is not None

    for _ in range(2):
        os.kill(pid, number)
        _ = wait_until(has_none_pending)
