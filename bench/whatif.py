"""`policy try` over a fleet: time and peak memory of the command, on SQLite.

``BENCH_VMS`` is the number of VMs (10,000 by default; 100,000 for the figure that is promised). Each has a quote of its
own; they are on 64 simulated machines, each of a family with collateral of its own. Of a fleet of more machines, each
chain of certificates is verified once, too: two signatures more.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.io.server.development import CONFIGURATION, write_collateral, write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import EvidenceRow, InsertAll, Platform, Vm, VmRow
from chutes_proto.store._run import Script, Unit
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.units.records import evidence_id

VMS: Final = int(os.environ.get("BENCH_VMS", "10000"))
MACHINES: Final = 64
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
    """Load the fleet, and try the present policy on it, and one that refuses every VM."""
    platform = SimulatedPlatform(bytes(32))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        write_server(folder, platform, NOW)
        machines = [platform, *(platform.another(index) for index in range(1, MACHINES))]
        for machine in machines:
            write_collateral(folder / "collateral", machine, NOW)
        with closing(make_store_setup(ServerConfig.load(folder / CONFIGURATION)).store.open()) as store:
            for begin in range(0, VMS, PAGE):
                vms = [Vm(HOTKEY, f"vm-{number}") for number in range(begin, min(begin + PAGE, VMS))]
                claims = tuple(VmRow.of(vm, Platform(None, bytes(16)), NOW) for vm in vms)
                quotes = (machine.quote(vm.name.encode().ljust(64)) for machine, vm in zip(cycle(machines), vms))
                rows = tuple(
                    EvidenceRow(evidence_id(vm), vm, vm.name, None, quote, "{}", NOW)
                    for vm, quote in zip(vms, quotes, strict=True)
                )
                store.transact(_Load(claims, rows))
        size = (folder / "keys.db").stat().st_size
        refuse = folder / "refuse.toml"
        _ = refuse.write_text("[tcb]\nmin_tcb_date = 2100-01-01\n")
        print(f"{VMS} VMs, {size / VMS:.0f} bytes each in the store")
        _try(folder)
        _try(folder, str(refuse))


def _try(folder: Path, *policy: str) -> None:
    command = [sys.executable, "-m", "chutes_proto", "policy", "try", *policy]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run([*command, "--config", folder / CONFIGURATION, "--json"], capture_output=True, check=False)
    seconds, used = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    told = json.loads(done.stdout)
    print(f"policy try: {told['granted']} granted, {told['refused']} refused; exit code {done.returncode}", end="; ")
    print(f"{seconds:.1f} s, {cpu:.1f} s of CPU, {used.ru_maxrss // 1024} MiB at most")


if __name__ == "__main__":
    run()
