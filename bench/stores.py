"""Syncs per second at the store, without HTTP: SQLite with many callers, PostgreSQL with several processes.

A sync is the whole transaction of a boot's volumes: token, keys, records. All boots were granted before, and each
caller's are of a VM and a platform of its own. Ratios are to one caller and to one process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter
from typing import Any

from attrs import evolve

from chutes_proto.blocking.sqlite import SqliteStore
from chutes_proto.blocking.stores import StorePlace
from chutes_proto.store.rows import Vm
from chutes_proto.store.run import Store
from chutes_proto.testing.store_suite import VM, boot, platform, sync
from tests.postgres import Cluster, programs, schema

SYNCS = 960
CALLERS = (1, 16, 64)
PROCESSES = (1, 2, 4)
CALLERS_PER_PROCESS = 8

Work = Callable[[], object]


def run() -> None:
    _sqlite()
    installed = programs()
    if installed is None:
        print("\nPostgreSQL: not installed")
        return
    cluster = Cluster(installed)
    try:
        _postgres(cluster.url())
    finally:
        cluster.remove()


def _sqlite() -> None:
    print(f"SQLite, one process; {SYNCS} syncs\n{'callers':>12}{'syncs/s':>12}{'ratio':>12}{'syncs per commit':>20}")
    first = 0.0
    for callers in CALLERS:
        with (
            tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder,
            closing(SqliteStore(Path(folder) / "keys.db", busy_seconds=60)) as store,
        ):
            works = [_prepare(store, f"{caller}", SYNCS // callers) for caller in range(callers)]
            before = store.commits
            rate = SYNCS / _together(works)
            first = first or rate
            shared = SYNCS / (store.commits - before)
            print(f"{callers:>12}{rate:>12.0f}{rate / first:>12.2f}{shared:>20.1f}")


def _postgres(url: str) -> None:
    print(f"\nPostgreSQL, {CALLERS_PER_PROCESS} callers in each process; {SYNCS} syncs")
    print(f"{'processes':>12}{'syncs/s':>12}{'ratio':>12}")
    first = 0.0
    for processes in PROCESSES:
        with schema(url) as own, ExitStack() as stack:
            StorePlace(own, Path.cwd()).open(migrate=True).close()
            workers: list[subprocess.Popen[str]] = []
            for name in range(processes):
                command = [sys.executable, "-m", "bench.stores", own, str(name), str(SYNCS // processes)]
                pipe = subprocess.PIPE
                process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
                workers.append(stack.enter_context(process))
            streams: list[tuple[Any, Any]] = [(worker.stdin, worker.stdout) for worker in workers]
            for _, said in streams:
                assert said.readline() == "ready\n"
            start = perf_counter()
            for told, _ in streams:
                told.write("go\n")
                told.flush()
            for _, said in streams:
                assert said.readline() == "done\n"
            rate = SYNCS / (perf_counter() - start)
            first = first or rate
            print(f"{processes:>12}{rate:>12.0f}{rate / first:>12.2f}")


def _process(address: str, name: str, syncs: str) -> None:
    """One process of several on PostgreSQL."""
    with closing(StorePlace(address, Path.cwd()).open()) as store:
        each = int(syncs) // CALLERS_PER_PROCESS
        works = [_prepare(store, f"{name}.{caller}", each) for caller in range(CALLERS_PER_PROCESS)]
        print("ready", flush=True)
        _ = sys.stdin.readline()
        _ = _together(works)
        print("done", flush=True)


def _prepare(store: Store, caller: str, syncs: int) -> Work:
    """Grant a caller's boots; what comes back does their syncs."""
    vm = Vm(VM.hotkey, f"vm-{caller}")
    boots = [evolve(boot(f"{caller}.{number}", vm=vm), platform=platform(caller)) for number in range(syncs)]
    for granted in boots:
        _ = store.transact(granted)
    units = [sync(granted, "body", "storage", "tdx-cache") for granted in boots]
    return lambda: [store.transact(unit) for unit in units]


def _together(works: Sequence[Work]) -> float:
    """Seconds until all are done."""
    threads = [threading.Thread(target=work) for work in works]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


if __name__ == "__main__":
    _process(*sys.argv[1:])
