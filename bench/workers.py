"""Whole boots of one worker and of two, on the same sockets: throughput, and CPU time for a boot.

Boots come from several client processes at once, each over a connection of its own with nonce, attestation and sync.
The clients share the machine with the server, so on few cores its throughput is bounded by them; the CPU time of a boot
is that of all its processes, and shows what more workers cost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from bench.boots import PLATFORM, boot_at
from chutes_proto.io.server.development import write_server

BOOTS: Final = 150
"""Of each client."""
CLIENTS: Final = 4
WARM_UP: Final = 10
WORKERS: Final = (1, 2)


def run() -> None:
    print(f"whole boots on SQLite; {CLIENTS} clients with {BOOTS} boots each, {os.cpu_count()} cores with the clients'")
    print("".join(head.rjust(14) for head in ("workers", "boots/s", "ratio", "CPU ms a boot", "ratio")))
    first: tuple[float, float] | None = None
    for workers in WORKERS:
        with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as name:
            rate, cpu = _measured(Path(name), workers)
        first = first or (rate, cpu)
        print(f"{workers:>14}{rate:>14.1f}{rate / first[0]:>14.2f}{cpu:>14.2f}{cpu / first[1]:>14.2f}")


def _measured(folder: Path, workers: int) -> tuple[float, float]:
    """Return boots in a second, and the CPU time of a boot in ms."""
    write_server(folder, PLATFORM, int(time.time()))
    with _server(folder, workers) as (url, pid):
        _boots(folder, url, 0, WARM_UP)
        before, start = _cpu(pid), time.perf_counter()
        clients = [
            multiprocessing.Process(target=_boots, args=(folder, url, number, BOOTS)) for number in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert not any(client.exitcode for client in clients)
        seconds = time.perf_counter() - start
        return CLIENTS * BOOTS / seconds, 1e3 * (_cpu(pid) - before) / (CLIENTS * BOOTS)


def _boots(folder: Path, url: str, client: int, boots: int) -> None:
    for number in range(boots):
        boot_at(folder, url, f"vm-{client}-{number % 10}")


@contextmanager
def _server(folder: Path, workers: int) -> Generator[tuple[str, int]]:
    command = [sys.executable, "-m", "chutes_proto", "serve", "--config", str(folder / "server.toml")]
    command += ["--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def _cpu(pid: int) -> float:
    """The CPU time of a process and of its children that run, in seconds. Source: proc(5)."""
    ticks = 0
    for each in (pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
