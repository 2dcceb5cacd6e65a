"""`policy try` over a fleet: time and peak memory of the command, on SQLite.

``BENCH_VMS`` is the number of VMs (10,000 by default; 100,000 for the figure that is promised). Each has a quote of its
own; all are of one simulated platform, so that the chain of its PCK certificate is verified once and remembered. Of a
fleet of many platforms, each chain is verified, too.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.io.server.development import CONFIGURATION, write_server
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._run import Script, Unit
from chutes_proto.store.rows import EvidenceRow, InsertAll, Platform, Vm, VmRow
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.units.records import evidence_id

VMS: Final = int(os.environ.get("BENCH_VMS", "10000"))
PAGE: Final = 1000
HOTKEY: Final = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
NOW: Final = int(time.time())


@frozen
class _Load(Unit[None]):
    claims: tuple[VmRow, ...]
    evidence: tuple[EvidenceRow, ...]

    def script(self) -> Script[None]:
        yield from InsertAll(self.claims)
        yield from InsertAll(self.evidence)


def run() -> None:
    """Load the fleet, and try the present policy on it."""
    platform = SimulatedPlatform(bytes(32))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        write_server(folder, platform, NOW)
        with closing(SqliteStore(folder / "keys.db")) as store:
            for begin in range(0, VMS, PAGE):
                vms = [Vm(HOTKEY, f"vm-{number}") for number in range(begin, min(begin + PAGE, VMS))]
                claims = tuple(VmRow.of(vm, Platform(None, bytes(16)), NOW) for vm in vms)
                rows = tuple(
                    EvidenceRow(
                        evidence_id(vm), vm, vm.name, None, platform.quote(vm.name.encode().ljust(64)), "{}", NOW
                    )
                    for vm in vms
                )
                store.transact(_Load(claims, rows))
        size = (folder / "keys.db").stat().st_size
        command = [
            sys.executable,
            "-m",
            "chutes_proto",
            "policy",
            "try",
            "--config",
            str(folder / CONFIGURATION),
            "--json",
        ]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, check=False)
        seconds = time.monotonic() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{VMS} VMs, {size / VMS:.0f} bytes each in the store; exit code {done.returncode}")
    print(f"policy try: {seconds:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU, {used.ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    run()
