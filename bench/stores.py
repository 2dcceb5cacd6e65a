"""Syncs per second at the store, without HTTP: SQLite with many callers, PostgreSQL with several processes.

A sync is the whole transaction of a boot's volumes: token, keys, records. All boots were granted before, and each
caller has a VM and a platform of its own. Ratios are to one caller and to one process.

Callers that share a commit save its cost, so SQLite is measured on the present disk, and with a disk that needs
`SLOW_FLUSH` for each flush (with a library that is loaded before libc, if there is a C compiler). ``of the best`` is
the ratio to the rate of all syncs in one transaction, by processor time, which no sharing can exceed. The bare store is
the limit: as many threads share commits in the same way, with the same statements and the same keys to open, and no
other code. Its ratio is to one caller of our store. If 64 callers are not `WANTED` times as fast as one, the duration
of a flush at which they would be is printed.

PostgreSQL's callers have made their connections and prepared their statements before. The number of repeated
transactions, which could not be serialized with others, is printed for each sync. Then whole boots, of 16 and of 64
clients at once: how many transactions were rolled back for each boot, and how long the slowest took.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from attrs import evolve, frozen
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from chutes_proto.io.stores import sqlite
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import NONCE_SIZE, Address
from chutes_proto.store._run import Script, Store, Unit, run_script
from chutes_proto.store.rows import ReadLiveGenerations, StoreOp, Vm
from chutes_proto.store.sql import decode, statement
from chutes_proto.testing.store_suite._parts import VM, boot, platform, sync
from chutes_proto.units.volumes import SyncVolumes
from tests.postgres import Cluster, programs, schema

SYNCS = 960
CALLERS = (1, 16, 64)
PROCESSES = (1, 2, 4)
HERD = (16, 64)
HERD_BOOTS = 640
CALLERS_PER_PROCESS = 8
WANTED = 4
WARMING = 8
"""Syncs of each caller before the measurement: psycopg prepares a statement at its sixth use."""

SLOW_FLUSH = 0.002
"""Seconds of a flush, as on a disk without a protected write cache."""

_SLOW_C = f"""
#include <sys/syscall.h>
#include <unistd.h>
static int slow(long call, int fd) {{ usleep({SLOW_FLUSH * 1e6:.0f}); return syscall(call, fd); }}
int fsync(int fd) {{ return slow(SYS_fsync, fd); }}
int fdatasync(int fd) {{ return slow(SYS_fdatasync, fd); }}
"""

Work = Callable[[], object]


def run() -> None:
    _sqlite()
    _sqlite_on_a_slow_disk()
    installed = programs()
    if installed is None:
        print("\nPostgreSQL: not installed")
        return
    cluster = Cluster(installed)
    try:
        _postgres(cluster.url())
        _herd(cluster.url())
    finally:
        cluster.remove()


@frozen
class _All(Unit[None]):
    """Several units as one transaction."""

    units: tuple[Unit[Any], ...]

    def script(self) -> Script[None]:
        for unit in self.units:
            _ = yield from unit.script()


def _sqlite() -> None:
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder:
        with closing(SqliteStore(Path(folder) / "keys.db")) as store:
            units = [unit for caller in range(64) for unit in _units(store, f"{caller}", SYNCS // 64)]
            start = process_time()
            store.transact(_All(tuple(units)))
            best = SYNCS / (process_time() - start)
        flush = _flush(Path(folder) / "flushed")
    print(f"SQLite, one process; {SYNCS} syncs; a flush of 4 KiB takes {flush * 1e6:.0f} us")
    print(f"{'callers':>12}{'syncs/s':>12}{'ratio':>12}{'of the best':>14}{'syncs per commit':>20}")
    first = rate = shared = 0.0
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
            print(f"{callers:>12}{rate:>12.0f}{rate / first:>12.2f}{rate / best:>14.2f}{shared:>20.1f}")
    bare, bare_shared = _bare_store()
    print(f"{'bare, 64':>12}{bare:>12.0f}{bare / first:>12.2f}{'':>14}{bare_shared:>20.1f}")
    if rate < WANTED * first:
        more = (WANTED / rate - 1 / first) / (1 - WANTED / shared)
        print(f"a ratio of {WANTED} takes a flush of {(flush + more) * 1e6:.0f} us or more")


@frozen
class _BareSync:
    """Record a sync's SQL statements, and the keys that it opens: key, box, associated data."""

    statements: Sequence[tuple[str, Sequence[Any]]]
    boxes: Sequence[tuple[tuple[bytes, bytes], tuple[bytes, bytes]]]

    def run(self, connection: sqlite3.Connection, key: bytes) -> None:
        for text, values in self.statements:
            _ = connection.execute(text, values).fetchall()
        for (wrapped, of_key), (sealed, of_passphrase) in self.boxes:
            data_key = AESGCM(key).decrypt(wrapped[:NONCE_SIZE], wrapped[NONCE_SIZE:], of_key)
            _ = AESGCM(data_key).decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], of_passphrase)


class _BareStore:
    """A caller that finds no writer runs all waiting units, in one transaction."""

    def __init__(self, connection: sqlite3.Connection, key: bytes) -> None:
        self._connection = connection
        self._key = key
        self._lock = threading.Lock()
        self._waiting: list[tuple[_BareSync, threading.Lock]] = []
        self._done: set[threading.Lock] = set()
        self._busy = False
        self.commits = 0

    def sync(self, sync: _BareSync) -> None:
        turn = threading.Lock()
        _ = turn.acquire()
        with self._lock:
            self._waiting.append((sync, turn))
            mine, self._busy = not self._busy, True
        if not mine:
            _ = turn.acquire()
            if turn in self._done:
                self._done.remove(turn)
                return
        _ = self._connection.execute("BEGIN IMMEDIATE")
        with self._lock:
            taken, self._waiting = self._waiting, []
        for other, _ in taken:
            other.run(self._connection, self._key)
        _ = self._connection.execute("COMMIT")
        self.commits += 1
        for _, other_turn in taken:
            if other_turn is not turn:
                self._done.add(other_turn)
                other_turn.release()
        with self._lock:
            self._busy = bool(self._waiting)
            if self._busy:
                self._waiting[0][1].release()


def _bare_store() -> tuple[float, float]:
    """Return the syncs a second of 64 callers, and the syncs of a commit."""
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder:
        path = Path(folder) / "keys.db"
        with closing(SqliteStore(path)) as store:
            units = [_units(store, f"{caller}", SYNCS // 64) for caller in range(64)]
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
            for setting, value in sqlite._SETTINGS:
                _ = connection.execute(f"PRAGMA {setting} = {value}").fetchone()
            _ = connection.execute("BEGIN")
            works = [[_bare_sync(connection, unit) for unit in caller] for caller in units]
            _ = connection.execute("ROLLBACK")
            bare = _BareStore(connection, units[0][0].vault.current.key.reveal())
            seconds = _together([partial(_each, bare.sync, work) for work in works])
            return SYNCS / seconds, SYNCS / bare.commits


def _each(do: Callable[[_BareSync], None], syncs: Sequence[_BareSync]) -> None:
    for one in syncs:
        do(one)


def _bare_sync(connection: sqlite3.Connection, unit: SyncVolumes) -> _BareSync:
    statements: list[tuple[str, Sequence[Any]]] = []
    boxes: list[tuple[tuple[bytes, bytes], tuple[bytes, bytes]]] = []

    def perform(op: StoreOp[Any]) -> object:
        statements.append(statement(op))
        rows = decode(op, connection.execute(*statements[-1]).fetchall())
        for row in rows if isinstance(op, ReadLiveGenerations) else ():
            address = Address(unit.vm, row.volume, row.generation)
            boxes.append(
                (
                    (row.wrapped_key, address.associated_data(b"data key")),
                    (row.sealed, address.associated_data(b"passphrase")),
                )
            )
        return rows

    _ = run_script(unit.script(), perform)
    return _BareSync(statements, boxes)


def _flush(path: Path) -> float:
    """Return the median in seconds."""
    times: list[float] = []
    with path.open("wb", buffering=0) as file:
        for _ in range(100):
            _ = file.write(bytes(4096))
            start = perf_counter()
            os.fdatasync(file.fileno())
            times.append(perf_counter() - start)
    return median(times)


def _sqlite_on_a_slow_disk() -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        print("\nno C compiler: not tried with a slower disk")
        return
    with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder:
        source, library = Path(folder) / "slow.c", Path(folder) / "slow.so"
        _ = source.write_text(_SLOW_C)
        _ = subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
        print(flush=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        _ = subprocess.run([sys.executable, "-m", "bench.stores"], check=True, env=environment)


def _postgres(url: str) -> None:
    print(f"\nPostgreSQL, {CALLERS_PER_PROCESS} callers in each process; {SYNCS} syncs")
    print(f"{'processes':>12}{'syncs/s':>12}{'ratio':>12}{'retries per sync':>20}")
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
            for _, output in streams:
                assert output.readline() == "ready\n"
            start = perf_counter()
            for start_signal, _ in streams:
                start_signal.write("go\n")
                start_signal.flush()
            retries = sum(int(output.readline()) for _, output in streams)
            rate = SYNCS / (perf_counter() - start)
            first = first or rate
            print(f"{processes:>12}{rate:>12.0f}{rate / first:>12.2f}{retries / SYNCS:>20.2f}")


def _herd(url: str) -> None:
    """Boot and sync VMs that are neighbours in every index: all for the first time at once, then all again."""
    print(f"\nPostgreSQL, one process; {HERD_BOOTS} boots with their syncs")
    print(f"{'clients':>12}{'boots':>12}{'boots/s':>12}{'rollbacks per boot':>20}{'median ms':>12}{'p99 ms':>12}")
    for clients in HERD:
        with schema(url) as own:
            PostgresStore(own, migrate=True).close()
            with closing(PostgresStore(own, connections=clients, busy_seconds=60)) as store:
                for kind, first, boots in (("first", 0, 1), ("later", 1, HERD_BOOTS // clients)):
                    took: list[float] = []
                    before = store.retries
                    numbers = range(first, first + boots)
                    seconds = _together(
                        [partial(_boots, store, f"{client}", numbers, took) for client in range(clients)]
                    )
                    of_each = (store.retries - before) / len(took)
                    slow = sorted(took)[len(took) * 99 // 100]
                    print(f"{clients:>12}{kind:>12}{len(took) / seconds:>12.0f}{of_each:>20.2f}", end="")
                    print(f"{median(took) * 1e3:>12.0f}{slow * 1e3:>12.0f}")


def _boots(store: Store, caller: str, numbers: Sequence[int], took: list[float]) -> None:
    vm = Vm(VM.hotkey, f"vm-{caller}")
    for number in numbers:
        granted = evolve(boot(f"{caller}.{number}", vm=vm), platform=platform(caller))
        start = perf_counter()
        _ = store.transact(granted)
        _ = store.transact(sync(granted, "body", "storage", "tdx-cache"))
        took.append(perf_counter() - start)


def _process(address: str, name: str, syncs: str) -> None:
    """Run one of several processes on PostgreSQL."""
    with closing(StorePlace(address, Path.cwd()).open()) as store:
        assert isinstance(store, PostgresStore)
        callers = [f"{name}.{caller}" for caller in range(CALLERS_PER_PROCESS)]
        _ = _together([_prepare(store, caller, WARMING) for caller in callers])
        works = [_prepare(store, caller, int(syncs) // CALLERS_PER_PROCESS, WARMING) for caller in callers]
        print("ready", flush=True)
        _ = sys.stdin.readline()
        before = store.retries
        _ = _together(works)
        print(store.retries - before, flush=True)


def _units(store: Store, caller: str, syncs: int, after: int = 0) -> list[SyncVolumes]:
    """Grant a caller's boots; return their syncs."""
    vm = Vm(VM.hotkey, f"vm-{caller}")
    numbers = range(after, after + syncs)
    boots = [evolve(boot(f"{caller}.{number}", vm=vm), platform=platform(caller)) for number in numbers]
    for granted in boots:
        _ = store.transact(granted)
    return [sync(granted, "body", "storage", "tdx-cache") for granted in boots]


def _prepare(store: Store, caller: str, syncs: int, after: int = 0) -> Work:
    """Grant a caller's boots, ``after`` so many earlier ones; return a function that does their syncs."""
    units = _units(store, caller, syncs, after)
    return lambda: [store.transact(unit) for unit in units]


def _together(works: Sequence[Work]) -> float:
    """Return the seconds until all are done."""
    threads = [threading.Thread(target=work) for work in works]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:]:
        _process(*sys.argv[1:])
    else:
        _sqlite()
