"""The cost of authenticated rows and of the log: boots and syncs in a sealed store beside one that is not.

The two take turns, in this thread, so that a slow moment affects both; CPU time is this thread's. A boot has three
volumes. Its two audit rows are sequenced afterwards, in batches: a store that is not sealed has a log, too, so the
sequencer counts whole, and not only for what it costs more in the sealed store. SQLite remembers the heads of more VMs
than the largest fleet here has. In PostgreSQL each unit reads the head, as it does in SQLite for a still larger fleet.
The CPU of the database's session is told beside ours, with its part of the sequencer, and does not count for the limit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from statistics import median
from time import thread_time

from attrs import evolve

from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import Vault
from chutes_proto.store._run import Store
from chutes_proto.store.rows import Vm
from chutes_proto.testing.store_suite._parts import VAULT, boot, sync
from chutes_proto.units.log import SALT_SIZE, SequenceLog
from chutes_proto.units.revocations import Revocations
from tests.postgres import Cluster, programs, schema

_NONE = Revocations.of(0, ())
BOOTS = 600
FLEETS = (50, 1200, 12_000)
BATCH = 50
VOLUMES = ("storage", "tdx-cache", "scratch")
LIMIT_MS = 0.25
"""The most that a boot may cost more than without MACs, heads and the log."""
VAULTS: Mapping[str, Vault | None] = {"not sealed": None, "sealed": VAULT}


def run() -> None:
    print(f"Rows of a boot with a sync of {len(VOLUMES)} volumes; ms of CPU, medians of {BOOTS} boots;")
    print(f"their entries are sequenced in batches of {2 * BATCH}")
    for vms in FLEETS:
        with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-") as folder, ExitStack() as opened:
            stores = {
                name: opened.enter_context(closing(SqliteStore(Path(folder) / f"{name}.db", vault=vault)))
                for name, vault in VAULTS.items()
            }
            _measure("SQLite", vms, stores)
    installed = programs()
    if installed is None:
        print("\nPostgreSQL: not installed")
        return
    with ExitStack() as opened:
        cluster = Cluster(installed)
        _ = opened.callback(cluster.remove)
        sessions = {
            name: opened.enter_context(
                closing(PostgresStore(opened.enter_context(schema(cluster.url())), make=True, vault=vault))
            )
            for name, vault in VAULTS.items()
        }
        began = {name: _spent_by_database(store) for name, store in sessions.items()}
        _measure("PostgreSQL", FLEETS[0], sessions)
        spent = {name: _spent_by_database(store) - began[name] for name, store in sessions.items()}
    if all(spent.values()):
        base, sealed = (took / (FLEETS[0] + BOOTS) for took in spent.values())
        print(f"the database: {base:.3f} ms a boot with its part of the log, and {sealed - base:.3f} ms more sealed")


def _measure(where: str, vms: int, stores: Mapping[str, Store]) -> None:
    boots: dict[str, list[float]] = {name: [] for name in stores}
    sequenced: dict[str, list[float]] = {name: [] for name in stores}
    for number in range(vms + BOOTS):
        for name, store in stores.items():
            took = _cpu(partial(_boot, store, number, vms))
            if number >= vms:  # the first boot of each VM is another
                boots[name].append(took)
        if number % BATCH == BATCH - 1:
            for name, store in stores.items():
                unit = SequenceLog(os.urandom(SALT_SIZE * 4 * BATCH), "bench")
                sequenced[name].append(_cpu(partial(store.transact, unit)) / BATCH)
    print(f"\n{where}, {vms} VMs")
    print(f"{'':>12}{'units':>10}{'sequencer':>12}{'both':>10}")
    for name in stores:
        parts = median(boots[name]), median(sequenced[name])
        print(f"{name:>12}{parts[0]:10.3f}{parts[1]:12.3f}{sum(parts):10.3f}")
    base = median(boots["not sealed"])
    rows, log = median(boots["sealed"]) - base, median(sequenced["sealed"])
    held = "within" if rows + log <= LIMIT_MS else "NOT within"
    print(f"MACs and heads cost {rows:.3f} ms a boot, and the log's sequencer, counted whole, {log:.3f} ms")
    print(f"both {rows + log:.3f} ms, a ratio of {(base + rows + log) / base:.2f}: {held} the limit of {LIMIT_MS} ms")


def _boot(store: Store, number: int, vms: int) -> None:
    vm = Vm(VM_OWNER, f"vm-{number % vms}")
    granted = boot(f"bench {number}", now=1_700_000_000 + 60 * number, vm=vm)
    # A server has the revocations in memory, and a unit compares their version.
    _ = store.transact(evolve(granted, revocations=_NONE, claims_per_platform=vms))
    _ = store.transact(evolve(sync(granted, f"bench {number}", *VOLUMES), revocations=_NONE))


VM_OWNER = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


def _cpu(work: Callable[[], object]) -> float:
    """The CPU of this thread, in ms."""
    begin = thread_time()
    _ = work()
    return 1000 * (thread_time() - begin)


def _spent_by_database(store: PostgresStore) -> float:
    """The CPU of the database's process for the only session of ``store``, in ms; 0 if the system does not tell."""
    with store._pool.reserve() as connection:
        told = Path(f"/proc/{connection.info.backend_pid}/schedstat")
    return int(told.read_text().split()[0]) / 1e6 if told.exists() else 0
