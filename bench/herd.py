"""Boots of many VMs at once, at a store alone: what `stores` and `operators` measure."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

from attrs import evolve

from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.store._rows import Vm
from chutes_proto.store._run import Store
from chutes_proto.testing.store_suite._parts import VM, boot, platform, sync


def together(works: Sequence[Callable[[], object]]) -> float:
    """Return the seconds until all are done."""
    threads = [threading.Thread(target=work) for work in works]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


def boots(
    store: Store, caller: str, vms: Iterable[int], number: int, took: list[float], *, are_neighbours: bool = True
) -> None:
    """Boot each of a caller's VMs for the ``number``-th time, with its sync; note the seconds that each took.

    The VMs are neighbours in the indexes: all are one hotkey's. Otherwise each has a hotkey of its own.
    """
    for vm in vms:
        named = f"{caller}-{vm}"
        hotkey = VM.hotkey if are_neighbours else Hotkey(hashlib.sha256(named.encode()).digest()).address
        granted = evolve(boot(f"{named}.{number}", vm=Vm(hotkey, f"vm-{named}")), platform=platform(named))
        start = perf_counter()
        _ = store.transact(granted)
        _ = store.transact(sync(granted, "body", "storage", "tdx-cache"))
        took.append(perf_counter() - start)
