"""Syncs per second at the store, without HTTP: SQLite with many callers, PostgreSQL with several processes.

A sync is the whole transaction of a boot's volumes: token, keys, records. The stores are sealed, as new ones are; the
bare store, which makes no MAC, is not. All boots were granted before, and each
caller has a VM and a platform of its own. Ratios are to one caller and to one process.

Callers that share a commit save its cost, so SQLite is measured on the present disk, and with a disk that needs
`SLOW_FLUSH` for each flush (with a library that is loaded before libc, if there is a C compiler). ``of the best`` is
the ratio to the rate of all syncs in one transaction, by processor time, which no sharing can exceed. The bare store is
the limit: as many threads share commits in the same way, with the same statements and the same keys to open, and no
other code. Its ratio is to one caller of our store. If 64 callers are not `WANTED` times as fast as one, the duration
of a flush at which they would be is printed.

First of PostgreSQL, what all transactions read besides their own rows. Its callers have made their connections and
prepared their statements before. The number of repeated transactions, which could not be serialized with others, is
printed for each sync. Then whole boots, of 16 and of 64 clients at once, in one process and in four: how many
transactions were rolled back for each boot, and how long the slowest took. First of VMs that are neighbours in every
index of an empty store, which is the worst; then of VMs of a hotkey each, in a store of `HERD_STORE` other VMs.
Operators' commands, and boots beside a million VMs, are the subject `operators`, which takes an hour.
"""

from __future__ import annotations

import json
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
from itertools import chain, count
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from attrs import evolve, frozen
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench import operators
from bench.herd import boots, together
from bench.measure import microseconds
from chutes_proto.io.stores import sqlite
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import NONCE_SIZE, Address
from chutes_proto.store._rows import ReadLiveGenerations, StoreOp, Vm
from chutes_proto.store._run import Script, Store, Unit, run_script
from chutes_proto.store._sql import decode, statement
from chutes_proto.testing.store_suite._parts import VAULT, VM, boot, platform, sync
from chutes_proto.units.volumes import SyncVolumes
from tests.postgres import Cluster, programs, schema

SYNCS = 960
CALLERS = (1, 16, 64)
PROCESSES = (1, 2, 4)
HERD = (16, 64)
HERD_PROCESSES = (1, 4)
HERD_BOOTS = 640
HERD_STORE = 20_000
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
    print(
        "Operators' commands, and boots beside a million VMs: make bench BENCH_SUBJECTS=operators BENCH_VMS=1000000\n"
    )
    _sqlite()
    _sqlite_on_a_slow_disk()
    installed = programs()
    if installed is None:
        print("\nPostgreSQL: not installed")
        return
    cluster = Cluster(installed)
    try:
        _beginning(cluster.url())
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
        with closing(SqliteStore(Path(folder) / "keys.db", vault=VAULT)) as store:
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
            closing(SqliteStore(Path(folder) / "keys.db", busy_seconds=60, vault=VAULT)) as store,
        ):
            works = [_prepare(store, f"{caller}", SYNCS // callers) for caller in range(callers)]
            before = store.commits
            rate = SYNCS / together(works)
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
        with closing(SqliteStore(path, vault=VAULT)) as store:
            units = [_units(store, f"{caller}", SYNCS // 64) for caller in range(64)]
        with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as connection:
            for setting, value in sqlite._SETTINGS:
                _ = connection.execute(f"PRAGMA {setting} = {value}").fetchone()
            _ = connection.execute("BEGIN")
            works = [[_bare_sync(connection, unit) for unit in caller] for caller in units]
            _ = connection.execute("ROLLBACK")
            bare = _BareStore(connection, units[0][0].vault.current.key.reveal())
            seconds = together([partial(_each, bare.sync, work) for work in works])
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


def _beginning(url: str) -> None:
    """Measure what each transaction asks for at its beginning beside its own work, and what is asked once a second."""

    def nothing() -> None:
        return None

    with schema(url) as own, closing(PostgresStore(own, make=True, vault=VAULT)) as store:
        numbers = count()

        def one_boot() -> None:
            boots(store, "alone", [0], next(numbers), [])

        with store._pool.reserve() as connection:

            def begun(queries: Sequence[tuple[bytes, tuple[Any, ...]]]) -> None:
                _ = store._database._exchanged(connection, (), *queries)
                _ = connection.execute("ROLLBACK")

            bare = partial(begun, [(b"BEGIN ISOLATION LEVEL SERIALIZABLE", ())])
            works = {
                "bare": (nothing, bare),
                "ours": (nothing, partial(begun, store._database.serializable.queries)),
                "look": (nothing, partial(store._look, connection)),
            }
            times = microseconds(works) | microseconds({"boot": (nothing, one_boot)}, turns=4, each=50)
    more = 2 * (times["ours"] - times["bare"])
    print(f"\nPostgreSQL, one caller: a boot with its sync takes {times['boot']:.0f} us.")
    print(f"Its two transactions read clock, settings and versions for {more:.0f} us ({more / times['boot']:.1%}).")
    print(f"Once a second, the store is compared with the mark for {times['look']:.0f} us.")


def _postgres(url: str) -> None:
    print(f"\nPostgreSQL, {CALLERS_PER_PROCESS} callers in each process; {SYNCS} syncs")
    print(f"{'processes':>12}{'syncs/s':>12}{'ratio':>12}{'retries per sync':>20}")
    first = 0.0
    for processes in PROCESSES:
        with schema(url) as own, ExitStack() as stack:
            StorePlace(own, Path.cwd(), vault=VAULT).open(make=True).close()
            workers = [_worker(stack, "syncs", own, name, SYNCS // processes) for name in range(processes)]
            start = perf_counter()
            retries = sum(map(int, _go(workers)))
            rate = SYNCS / (perf_counter() - start)
            first = first or rate
            print(f"{processes:>12}{rate:>12.0f}{rate / first:>12.2f}{retries / SYNCS:>20.2f}")


def _herd(url: str) -> None:
    """Boot and sync VMs: all for the first time at once, then all again."""
    _herds(url, "neighbours", load=False)
    _herds(url, "unrelated", load=True)


def _herds(url: str, vms: str, *, load: bool) -> None:
    kind = f"unrelated VMs, in a store of {HERD_STORE} others" if load else "VMs that are neighbours in an empty store"
    print(f"\nPostgreSQL; {HERD_BOOTS} boots with their syncs, of {kind}")
    heads = ("processes", "clients", "boots", "boots/s", "rollbacks per boot", "median ms", "p99 ms")
    print("".join(head.rjust(20 if "per" in head else 12) for head in heads))
    for processes in HERD_PROCESSES:
        for clients in HERD:
            with schema(url) as own, ExitStack() as stack:
                place = StorePlace(own, Path.cwd(), vault=VAULT)
                if load:
                    operators.fill(place, HERD_STORE)
                else:
                    place.open(make=True).close()
                each, of_each_client = clients // processes, HERD_BOOTS // clients
                workers = [_worker(stack, vms, own, name, each, of_each_client) for name in range(processes)]
                for kind in ("first", "later"):
                    start = perf_counter()
                    found: list[tuple[int, list[float]]] = [json.loads(line) for line in _go(workers)]
                    rate = HERD_BOOTS / (perf_counter() - start)
                    took = sorted(chain.from_iterable(some for _, some in found))
                    of_each = sum(rollbacks for rollbacks, _ in found) / len(took)
                    print(f"{processes:>12}{clients:>12}{kind:>12}{rate:>12.0f}{of_each:>20.2f}", end="")
                    print(f"{median(took) * 1e3:>12.0f}{took[len(took) * 99 // 100] * 1e3:>12.0f}", flush=True)


def _worker(stack: ExitStack, *arguments: object) -> subprocess.Popen[str]:
    """Start one of several processes on PostgreSQL, which is ready when this returns."""
    command = [sys.executable, "-m", "bench.stores", *map(str, arguments)]
    pipe = subprocess.PIPE
    process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _go(workers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Let all begin at once; return the line that each prints when it is done."""
    streams: list[tuple[Any, Any]] = [(worker.stdin, worker.stdout) for worker in workers]
    for start_signal, _ in streams:
        start_signal.write("go\n")
        start_signal.flush()
    return [output.readline() for _, output in streams]


def _work_on_syncs(address: str, name: str, syncs: str) -> None:
    with closing(StorePlace(address, Path.cwd(), vault=VAULT).open()) as store:
        assert isinstance(store, PostgresStore)
        callers = [f"{name}.{caller}" for caller in range(CALLERS_PER_PROCESS)]
        _ = together([_prepare(store, caller, WARMING) for caller in callers])
        works = [_prepare(store, caller, int(syncs) // CALLERS_PER_PROCESS, WARMING) for caller in callers]
        print("ready", flush=True)
        _ = sys.stdin.readline()
        before = store.retries
        _ = together(works)
        print(store.retries - before, flush=True)


def _work_on_boots(address: str, name: str, clients: str, vms: str, *, are_neighbours: bool) -> None:
    with closing(PostgresStore(address, connections=int(clients), busy_seconds=60, vault=VAULT)) as store:
        print("ready", flush=True)
        for number, _ in enumerate(sys.stdin):
            took: list[float] = []
            before = store.retries
            callers = [f"{name}.{client}" for client in range(int(clients))]
            herd = partial(boots, store, vms=range(int(vms)), number=number, took=took, are_neighbours=are_neighbours)
            _ = together([partial(herd, caller=caller) for caller in callers])
            print(json.dumps([store.retries - before, took]), flush=True)


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


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["syncs", *arguments]:
            _work_on_syncs(*arguments)
        case ["neighbours" | "unrelated" as vms, *arguments]:
            _work_on_boots(*arguments, are_neighbours=vms == "neighbours")
        case _:
            _sqlite()
