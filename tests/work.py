"""Counts the work that a function does, instead of the time that it takes, which depends on the machine."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Final, NamedTuple

MIB: Final = 1 << 20


class Work(NamedTuple):
    """Calls of functions, those written in C among them, and the most bytes that were allocated at once."""

    calls: int
    peak: int


def work_of(function: Callable[[], object]) -> Work:
    """Call ``function`` twice and count. It must not remember anything from one call to the next."""
    calls = 0

    def count(_: FrameType, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        _ = function()
    finally:
        sys.setprofile(before)
    _ = gc.collect()
    tracemalloc.start()
    try:
        _ = function()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return Work(calls, peak)
