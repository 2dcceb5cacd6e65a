"""Taking turns: what is compared is measured alternately, so that a slow moment is everyone's.

Turns are long, so that few of the times are of caches that are full of what had its turn before. Each work's time is
the median of its quickest turn: on a machine that is shared, what makes a turn slower is the neighbours'. Nothing else
is done between two times: a look at the system's counters would cost the next one some of its caches.
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
    """Keep this process on one core, where that can be said."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def microseconds(works: Mapping[str, tuple[Work, Work]], turns: int = 10, each: int = 100) -> dict[str, float]:
    """The time of each work: the median of its quickest turn, in turns of some repetitions.

    A work is what prepares, which is not measured, and what is.
    """
    medians: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(turns):
            for name, (prepare, work) in works.items():
                medians[name].append(_turn(prepare, work, each))
    finally:
        gc.enable()
    return {name: min(found) * 1e6 for name, found in medians.items()}


def _turn(prepare: Work, work: Work, each: int) -> float:
    """Seconds, as a median."""
    times: list[float] = []
    for _ in range(each):
        _ = prepare()
        start = perf_counter()
        _ = work()
        times.append(perf_counter() - start)
    return median(times)


def resident() -> int:
    """Resident memory in kB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
