"""Alternate measurement: the compared works take turns, so that a slow moment affects all of them.

Turns are long, so that few measurements have caches that the previous work filled. The time of a work is the median of
its quickest turn: on a shared machine, other processes make a turn slower. Nothing else runs between two measurements:
reading the system's counters would displace a part of the caches.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

Work = Callable[[], object]


def one_core() -> None:
    """Keep this process on one core, if the system allows it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def microseconds(
    works: Mapping[str, tuple[Work, Work]],
    turns: int = 10,
    each: int = 100,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, float]:
    """Return the time of each work: the median of its quickest turn of ``each`` repetitions.

    A work is a pair of functions: one that prepares, which is not measured, and the measured one. With ``thread_time``
    as the ``clock``, time that other processes take on a busy machine does not count.
    """
    medians: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, (prepare, work) in works.items():
                medians[name].append(_turn(prepare, work, each, clock))
    finally:
        gc.enable()
    return {name: min(found) * 1e6 for name, found in medians.items()}


def _turn(prepare: Work, work: Work, each: int, clock: Callable[[], float]) -> float:
    """Return the median in seconds."""
    times: list[float] = []
    for _ in range(each):
        _ = prepare()
        start = clock()
        _ = work()
        times.append(clock() - start)
    return median(times)


def resident() -> int:
    """Return the resident memory in kB; 0 if the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
