"""Whole boots of one worker and of two, on the same sockets: throughput, CPU time for a boot, and rollbacks.

Boots come from several client processes at once, each over a connection of its own with nonce, attestation and sync.
The clients share the machine with the server, so on few cores its throughput is bounded by them; the CPU time of a boot
is that of all processes of the server, and of PostgreSQL's where the store is there, and shows what more workers cost.
The workers take turns, and each figure is the median of `TURNS`: beside other programs one turn says little.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Final

import psycopg
from attrs import frozen

from bench.boots import PLATFORM, boot_at
from chutes_proto.io.server.development import write_server
from chutes_proto.io.stores.postgres import PostgresStore
from tests.postgres import Cluster, programs

BOOTS: Final = 20
"""Of each client, in each turn."""
CLIENTS: Final = 16
VMS: Final = 2
"""Of each client, which it boots by turns."""
WARM_UP: Final = 10
TURNS: Final = 5
WORKERS: Final = (1, 2)


@frozen
class _Turn:
    rate: float
    cpu: float
    """The CPU time of a boot in ms."""
    of_database: float
    rollbacks: float
    """The transactions of PostgreSQL that were rolled back for each boot."""


def run() -> None:
    print(
        f"{CLIENTS} clients with {BOOTS} boots each, medians of {TURNS} turns, {os.cpu_count()} cores with the clients'"
    )
    heads = ("workers", "boots/s", "ratio", "CPU ms a boot", "ratio", "of PostgreSQL", "rollbacks")
    for store in ("SQLite", "PostgreSQL"):
        installed = programs()
        if store == "PostgreSQL" and installed is None:
            print("\nPostgreSQL: not installed")
            return
        with ExitStack() as stack:
            servers = [
                stack.enter_context(_server(workers, installed if store != "SQLite" else None)) for workers in WORKERS
            ]
            for boots in servers:
                _ = boots(WARM_UP)
            turns = [[boots(BOOTS) for boots in servers] for _ in range(TURNS)]
        print(f"\n{store}\n" + "".join(head.rjust(15) for head in heads))
        found = [[median(getattr(turn[at], part) for turn in turns) for part in _PARTS] for at in range(len(WORKERS))]
        for workers, (rate, cpu, of_database, rollbacks) in zip(WORKERS, found, strict=True):
            print(
                f"{workers:>15}{rate:>15.1f}{rate / found[0][0]:>15.2f}{cpu:>15.2f}{cpu / found[0][1]:>15.2f}", end=""
            )
            print(f"{of_database:>15.2f}{rollbacks:>15.2f}")


_PARTS: Final = ("rate", "cpu", "of_database", "rollbacks")


@contextmanager
def _server(workers: int, installed: Path | None) -> Generator[Callable[[int], _Turn]]:
    """Start a server, with a cluster of its own if the programs of PostgreSQL are given; yields what boots there."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chutes-proto-bench-")))
        write_server(folder, PLATFORM, int(time.time()))
        cluster = Cluster(installed) if installed is not None else None
        if cluster is not None:
            _ = stack.callback(cluster.remove)
            PostgresStore(cluster.url(), make=True).close()
            config = folder / "server.toml"
            _ = config.write_text(config.read_text().replace("sqlite:keys.db", cluster.url()))
        command = [sys.executable, "-m", "chutes_proto", "serve", "--config", str(folder / "server.toml")]
        command += ["--workers", str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        _ = stack.callback(process.wait, 60)
        _ = stack.callback(process.send_signal, signal.SIGTERM)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        counts = stack.enter_context(_counts(cluster))

        def boots(each: int) -> _Turn:
            before, start = (_cpu([process.pid]), *counts()), time.perf_counter()
            clients = [
                multiprocessing.Process(target=_boots, args=(folder, url, number, each)) for number in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert not any(client.exitcode for client in clients)
            seconds, number = time.perf_counter() - start, CLIENTS * each
            own, of_database, rollbacks = (
                after - was for after, was in zip((_cpu([process.pid]), *counts()), before, strict=True)
            )
            return _Turn(
                number / seconds, 1e3 * (own + of_database) / number, 1e3 * of_database / number, rollbacks / number
            )

        yield boots


@contextmanager
def _counts(cluster: Cluster | None) -> Generator[Callable[[], tuple[float, float]]]:
    """Yields what returns the CPU seconds of a database until now, and its rollbacks."""
    if cluster is None:
        yield lambda: (0.0, 0.0)
        return
    with closing(psycopg.connect(cluster.url(), autocommit=True)) as connection:
        # A session tells what it has done a second later at the latest, or when it ends.
        text = b"SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()"

        def counts() -> tuple[float, float]:
            time.sleep(1.1)
            found = connection.execute(text).fetchone()
            assert found is not None
            assert cluster is not None
            return _cpu(cluster.processes()[:1]), float(found[0])

        yield counts


def _boots(folder: Path, url: str, client: int, boots: int) -> None:
    for number in range(boots):
        boot_at(folder, url, f"vm-{client}-{number % VMS}")


def _cpu(processes: Iterable[int]) -> float:
    """The CPU time of processes, of their children that run, and of those that ended, in seconds. Source: proc(5)."""
    ticks = 0
    for pid in processes:
        for each in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
