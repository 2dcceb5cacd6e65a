"""Time and peak memory of most operator's commands, on a store of many VMs: SQLite and PostgreSQL, on this disk.

``BENCH_VMS`` is the number of VMs (10,000 by default, which takes a minute or two; 1,000,000 takes an hour). A VM has
three keys, two disks, a boot with two volumes and its verdict, and three audit rows. Of every tenth, a key was retired,
and a boot and an audit row were made, before the end of their retention; and it is registered as a server with a GPU.
The rows are copied into the store as they would stand after years, and their KEK is then rotated. The memory is the
largest resident size of the command's process, with Python and the libraries in it; memory and processor time of
PostgreSQL's own processes are not counted, and it has 1 GB of shared buffers. At last, new VMs boot in that store, for
the first time and again; and before all this, the same in a store of `FEW` VMs.

``BENCH_COMMANDS`` are the beginnings of the commands to run, in this order, with commas between them, and
``BENCH_STORES`` the stores: all of both by default.

It ends with 1 if a command failed, needed more than `MOST_MEMORY`, or, of `MOST_SECONDS`, took longer.
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any, Final

import psycopg
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.herd import boots, together
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.io.server.development import CONFIGURATION, write_server
from chutes_proto.io.server.store_setup import make_store_setup
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.keys.vault import NONCE_SIZE, Address, KeyEncryptionKey, Vault
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import ROWS, Row, SetHorizon, Vm
from chutes_proto.store._run import Ask
from chutes_proto.store._sql import columns, decode_rows
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.units.contents import PAGE, Fill, Page
from tests import postgres

VMS: Final = int(os.environ.get("BENCH_VMS", "10000"))
DISK: Final = "/var/tmp"  # noqa: S108 - a million VMs do not fit into memory
HOTKEYS: Final = 1000
VOLUMES: Final = ("root", "storage", "tdx-cache")
NOW: Final = int(time.time())
LONG_AGO: Final = NOW - 400 * 86_400
CLIENTS: Final = 16
FEW: Final = 1000
STORES: Final = tuple(os.environ.get("BENCH_STORES", "SQLite,PostgreSQL").split(","))
BEGINNINGS: Final = tuple(os.environ.get("BENCH_COMMANDS", "").split(","))

BOOTS: Final = 20
"""VMs of each client that boot."""

MOST_MEMORY: Final = 200
"""MB that a command may need, however many VMs there are."""

MOST_SECONDS: Final = {"keys rewrap": 600}
"""How long it may take, of up to a million VMs."""

_ONE: Final = "HOTKEY-0/vm-0"
_ANSWERS: Final = (0, 1)
"""Exit codes of commands that did their work; 1: `why` found no refusal, or `vm erase` names copies that it left."""

COPY: Final = "store copy"
COMPARE: Final = "store compare"

COMMANDS: Final = (
    "serve --check",
    "doctor",
    "store check",
    "vm list",
    "vm list --json",
    "registrations list",
    "keys history vm-1",
    "audit list",
    f"audit list --vm {_ONE}",
    "audit list --event no-such-event",
    "audit list --since 2020-01-01 --until 2020-01-02",
    "audit checkpoint",
    "audit verify",
    "audit export",
    "audit export --proof 0",
    f"why {_ONE}",
    "profiles vms",
    "revocations",
    "hosts list",
    f"vm revoke {_ONE} --until 2099-01-01",
    f"vm allow {_ONE}",
    "hotkey revoke HOTKEY-2",
    "hotkey allow HOTKEY-2",
    f"platform revoke --ppid {'00' * 16}",
    f"platform allow --ppid {'00' * 16}",
    "registrations remove server-0",
    "vm erase HOTKEY-3/vm-3",
    "vm erase HOTKEY-3/vm-3 --yes",
    f"vm rebind {_ONE} --ppid {'00' * 16} --keep-keys",
    f"keys restore {_ONE} storage 1",
    f"keys allow-format {_ONE} storage",
    f"vm bind HOTKEY-1/unbound --ppid {'00' * 16}",
    "keys rewrap",
    "keys purge",
    "keys purge --yes",
    "vm purge-boots",
    "vm purge-boots --yes",
    "audit purge",
    "audit purge --yes",
    "store init",
    "store restored",
    COPY,
    COMPARE,
)
"""The commands in the order in which they run; ``HOTKEY-N`` is the hotkey of that number."""

Values = tuple[Any, ...]


def run() -> None:
    failed: list[str] = []
    for kind in STORES:
        installed = postgres.programs()
        if kind == "SQLite":
            with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-", dir=DISK) as folder:
                failed += _measure(kind, Path(folder), "sqlite:keys.db")
        elif installed is None:
            print("\nPostgreSQL: not installed")
        else:
            cluster = postgres.Cluster(installed, settings={"max_wal_size": "4GB", "shared_buffers": "1GB"}, place=DISK)
            try:
                with tempfile.TemporaryDirectory(prefix="chutes-proto-bench-", dir=DISK) as folder:
                    failed += _measure(kind, Path(folder), cluster.url())
            finally:
                cluster.remove()
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


def _measure(kind: str, folder: Path, address: str) -> list[str]:
    """Print the figures of a store; return the commands that failed, or needed too much."""
    write_server(folder, SimulatedPlatform(bytes(32)), NOW)
    configuration = folder / CONFIGURATION
    text = configuration.read_text().replace('"sqlite:keys.db"', f'"{address}"')
    _ = configuration.write_text(text)
    _few(kind, folder, address)
    began = time.monotonic()
    fill(StorePlace(address, folder, vault=Vault(_kek(folder))), VMS)
    _ = (folder / "kek").rename(folder / "kek.previous")
    (folder / "kek").touch(0o600)
    _ = (folder / "kek").write_bytes(os.urandom(32))
    lines = text.splitlines(keepends=True)
    lines.insert(
        next(i for i, line in enumerate(lines) if line.startswith("kek_file")), 'kek_previous_file = "kek.previous"\n'
    )
    _ = configuration.write_text("".join(lines))
    took = time.monotonic() - began
    size = _size(folder, address) / 1e9
    print(f"\n{kind}, {VMS} VMs, {3 * VMS} keys, {size:.2f} GB; loaded in {took:.0f} s", flush=True)
    print(f"{'command':<58}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}", flush=True)
    origin = f"sqlite:{folder}/keys.db" if kind == "SQLite" else _passfile(folder, address)
    copied = folder / "copy.toml"
    _ = copied.write_text(configuration.read_text().replace(f'"{address}"', '"sqlite:copy.db"'))
    more = {COPY: ("--from", origin), COMPARE: (f"sqlite:{folder}/copy.db", origin)}
    wanted = (words for beginning in BEGINNINGS for words in COMMANDS if words.startswith(beginning))
    failed: list[str] = []
    for words in dict.fromkeys(wanted):
        config = () if words == COMPARE else ("--config", str(copied if words == COPY else configuration))
        if fault := _run(words, *more.get(words, ()), *config):
            failed.append(f"{words} ({kind}): {fault}")
    _herd(make_store_setup(ServerConfig.load(configuration)).store)  # at last: their keys are under another KEK
    return failed


def _few(kind: str, folder: Path, address: str) -> None:
    """Print how long boots take in a small store."""
    with ExitStack() as stack:
        address = "sqlite:few.db" if kind == "SQLite" else stack.enter_context(postgres.schema(address))
        place = StorePlace(address, folder, vault=Vault(_kek(folder)))
        fill(place, FEW)
        print(f"\n{kind}, {FEW} VMs", flush=True)
        _herd(place)


def _size(folder: Path, address: str) -> int:
    """Return the bytes of the store on disk, with its indexes, without a write-ahead log."""
    if address.startswith("sqlite:"):
        return (folder / "keys.db").stat().st_size
    with psycopg.connect(address) as postgresql:
        row = postgresql.execute("SELECT pg_database_size(current_database())").fetchone()
    assert row is not None
    size: int = row[0]
    return size


def _herd(place: StorePlace) -> None:
    """Boot VMs beside the others, each with its sync: for the first time, and again."""
    with closing(place.open()) as store:
        _ = store.transact(Ask(SetHorizon(0)))  # the nonces of these boots are of a time before `store restored`
        for kind, number in (("first", 0), ("later", 1)):
            took: list[float] = []
            before = store.rollbacks.total()
            _ = together([partial(boots, store, f"{client}", range(BOOTS), number, took) for client in range(CLIENTS)])
            rollbacks = (store.rollbacks.total() - before) / len(took)
            slow = sorted(took)[len(took) * 99 // 100]
            print(
                f"{kind} boots, {CLIENTS} clients: median {median(took) * 1e3:.0f} ms, p99 {slow * 1e3:.0f} ms,"
                f" {rollbacks:.2f} rollbacks for each",
                flush=True,
            )


def _passfile(folder: Path, address: str) -> str:
    """The address without its password, which others could read on a command line."""
    path = folder / "pgpass"
    path.touch(0o600)
    _ = path.write_text(f"*:*:*:*:{postgres.PASSWORD}\n")
    return address.replace(f":{postgres.PASSWORD}@", "@") + f"&passfile={path}"


_WATCHED: Final = """
import sys, time
from pathlib import Path
from chutes_proto.cli.main import main
code = main(sys.argv[2:])
status = Path("/proc/self/status").read_text().splitlines()
peak = next(line.split()[1] for line in status if line.startswith("VmHWM:"))
Path(sys.argv[1]).write_text(f"{time.process_time()} {peak}")
sys.exit(code)
"""
"""The command in a process that tells its processor time in seconds, and its largest resident memory in kB."""


def _run(words: str, *options: str) -> str:
    """Print the figures of a command; return what is wrong with them, or empty."""
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as told:
        spelt = [re.sub(r"HOTKEY-([0-9]+)", lambda found: _hotkey(int(found[1])), word) for word in words.split()]
        command = [sys.executable, "-c", _WATCHED, told.name, *spelt, *options]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
        seconds = time.monotonic() - began
        processor, memory = map(float, (told.read() or "0 0").split())
    fault = ""
    if done.returncode not in _ANSWERS:
        fault = done.stderr[-300:]
    elif memory / 1024 > MOST_MEMORY:
        fault = f"more than {MOST_MEMORY} MB"
    elif VMS <= 1_000_000 and seconds > (most := MOST_SECONDS.get(words, seconds)):
        fault = f"longer than {most} s"
    said = f"  FAILED: {fault}" if fault else ""
    print(f"{words[:56]:<58}{seconds:>10.1f}{processor:>10.1f}{memory / 1024:>10.0f}{said}", flush=True)
    return fault


# --- the store ---


def fill(place: StorePlace, vms: int) -> None:
    """Make a store, and fill it with the rows of so many VMs."""
    assert place.vault is not None
    key = place.vault.current
    with closing(place.open(make=True)) as store:
        store.transact(Fill(0, lambda: _pages(vms, key), NOW, "bench"))
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as connection:
            _ = connection.execute("ANALYZE")
    else:
        with psycopg.connect(place.address, autocommit=True) as postgresql:
            _ = postgresql.execute("VACUUM ANALYZE")


def _pages(vms: int, key: KeyEncryptionKey) -> Iterator[Page]:
    """The rows of so many VMs, whose keys are under ``key``."""
    for kind, rows in _filled(vms, key):
        values = iter(rows)
        while page := decode_rows(kind, tuple(islice(values, PAGE))):
            yield page


def _kek(folder: Path) -> KeyEncryptionKey:
    return KeyEncryptionKey.from_bytes((folder / "kek").read_bytes())


def _hotkey(number: int) -> str:
    return Hotkey(hashlib.sha256(b"%d" % number).digest()).address


def _digest(label: str, number: int) -> bytes:
    return hashlib.sha256(f"{label} {number}".encode()).digest()


def _filled(vms: int, key: KeyEncryptionKey) -> Iterator[tuple[type[Row], Iterable[Values]]]:
    """The rows of each table; columns that were added later are empty."""
    for kind, rows in _rows(vms, key):
        count = len(columns(kind))
        yield kind, ((*row, *(None,) * (count - len(row))) for row in rows)


def _rows(vms: int, key: KeyEncryptionKey) -> Iterator[tuple[type[Row], Iterable[Values]]]:
    """The rows of each table, as values of its columns."""
    makers = {"vm": _vms, "boot": _boots, "boot_volume": _boot_volumes, "volume": _volumes, "audit": _audits}
    makers |= {"attestation": _attestations, "server": _servers, "gpu": _gpus}
    for kind in ROWS:
        if kind.TABLE == "generation":
            yield kind, _generations(vms, key)
        elif kind.TABLE in makers:
            yield kind, makers[kind.TABLE](vms)


HOTKEY_OF: Final = [_hotkey(number) for number in range(HOTKEYS)]


def _names(vms: int) -> Iterator[tuple[int, str, str]]:
    for number in range(vms):
        yield number, HOTKEY_OF[number % HOTKEYS], f"vm-{number}"


def _vms(vms: int) -> Iterator[Values]:
    for number, hotkey, vm in _names(vms):
        ppid = _digest("ppid", number)[:16]
        yield hotkey, vm, "ppid", ppid, None, ppid, True, "base", NOW - 9_000_000, NOW - number % 80 * 86_400, None


def _boot_ids(number: int) -> list[tuple[str, int]]:
    """The boots of a VM, with their times."""
    found = [(_digest("boot", number).hex()[:32], NOW - number % 80 * 86_400)]
    return found if number % 10 else [(_digest("old boot", number).hex()[:32], LONG_AGO), *found]


def _boots(vms: int) -> Iterator[Values]:
    for number, hotkey, vm in _names(vms):
        ppid = _digest("ppid", number)[:16]
        for boot_id, at in _boot_ids(number):
            token = hashlib.sha256(boot_id.encode()).digest()
            yield (
                *(boot_id, hotkey, vm, "ppid", ppid, token, "simulated", "1", "base", token, token, at + 600, True),
                *("192.0.2.7", at, at + 9, token, None, None, None, None),
            )


def _boot_volumes(vms: int) -> Iterator[Values]:
    for number in range(vms):
        for boot_id, _ in _boot_ids(number):
            for position, volume in enumerate(VOLUMES[1:]):
                yield boot_id, volume, position, 1, None, True


def _generations(vms: int, key: KeyEncryptionKey) -> Iterator[Values]:
    wrap = AESGCM(key.key.reveal()).encrypt
    sealed = os.urandom(156)
    for number, hotkey, vm in _names(vms):
        for volume in VOLUMES:
            is_old = volume == "storage" and number % 10 == 0
            for generation in range(1, 5 if is_old else 2):
                address = Address(Vm(hotkey, vm), volume, generation)
                nonce = _digest(volume, number * 10 + generation)[:NONCE_SIZE]
                wrapped = nonce + wrap(nonce, bytes(32), address.associated_data(b"data key"))
                retired = (LONG_AGO, "rekey") if is_old and generation < 4 else (None, None)
                yield (
                    *(hotkey, vm, volume, generation, "retired" if retired[0] else "active", sealed, key.kek_id),
                    *(wrapped, False, LONG_AGO, "origin", LONG_AGO, *retired),
                )


def _volumes(vms: int) -> Iterator[Values]:
    for _, hotkey, vm in _names(vms):
        for volume in VOLUMES[1:]:
            yield hotkey, vm, volume, True, False, None


def _attestations(vms: int) -> Iterator[Values]:
    for number, hotkey, vm in _names(vms):
        ppid = _digest("ppid", number)[:16]
        for boot_id, at in _boot_ids(number):
            digest = hashlib.sha256(boot_id.encode()).digest()
            yield (
                *(boot_id, "boot", hotkey, vm, "ppid", ppid, None, "", "simulated", "1", digest, "192.0.2.7", at, None),
            )


def _servers(vms: int) -> Iterator[Values]:
    for number, hotkey, vm in _names(vms):
        if number % 10 == 0:
            host = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
            boot_id = _boot_ids(number)[-1][0]
            yield f"server-{number}", f"registration-{number}", hotkey, vm, host, host, boot_id, None, None, NOW, None


def _gpus(vms: int) -> Iterator[Values]:
    for number in range(0, vms, 10):
        yield f"gpu-{number}", f"server-{number}", "h200", "{}"


def _audits(vms: int) -> Iterator[Values]:
    """The old ones first, as they were written."""
    for is_old, event in product((True, False), ("boot", "sync", "boot")):
        for number, hotkey, vm in _names(vms):
            if is_old != (number % 10 == 0):
                continue
            at = LONG_AGO if number % 10 == 0 else NOW - number % 80 * 86_400
            boot_id = _boot_ids(number)[0][0]
            yield (
                *(at, "vm", event, "granted", "", hotkey, vm, boot_id, boot_id, "ppid", _digest("ppid", number)[:16]),
                *("simulated 1", bytes(32), "storage/1 created, tdx-cache/1 created", "192.0.2.7"),
            )
