"""Several processes are one server; and one that is killed loses nothing that it had answered, and leaves no half unit.

The processes run the server's units on a real store, without HTTP, so that a kill falls into a transaction more often.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.keys.vault import Address
from chutes_proto.store._rows import AttestationRow, AuditRow, BootRow, BootVolumeRow, GenerationRow, NonceRow, Scan, Vm
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import VAULT, VM
from tests.conftest import ROOT, SOAK
from tests.store.worker import pair, two_phase, unit

KILLS = 200 if SOAK else 5
THREADS = 8


@contextmanager
def worker(address: str, what: str, name: str, number: int) -> Iterator[subprocess.Popen[str]]:
    """A worker that is ready, and is killed at the end."""
    command = [sys.executable, "-m", "tests.store.worker", address, what, name, str(number)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == '"ready"\n'
            yield process
        finally:
            process.kill()


def begin(process: subprocess.Popen[str], given: object = None) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    sqlite = f"sqlite:{tmp_path}/keys.db"
    found: str = sqlite if request.param == "sqlite" else request.getfixturevalue("migrated_schema")
    StorePlace(found, tmp_path, vault=VAULT).open(make=True).close()
    return found


def test_first_boots_through_four_processes_get_one_root_passphrase(address: str) -> None:
    """64 boots of one VM at once, 16 in each process: 64 answers, one passphrase, one key."""
    if not SOAK and not address.startswith("sqlite:"):
        pytest.skip("it runs in make soak: to PostgreSQL the threads of the contract are sessions, as processes are")
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(address, "boots", str(number), 16)) for number in range(4)]
        for process in workers:
            begin(process)
        answers = [json.loads(line) for process in workers for line in process.communicate(timeout=60)[0].splitlines()]
    assert len(answers) == 64
    assert len(set(answers)) == 1, set(answers)
    assert len(answers[0]) == 128
    with closing(StorePlace(address, Path.cwd(), vault=VAULT).open()) as store:
        (key,) = store.transact(Ask(Scan(GenerationRow)))
        assert VAULT.open(Address(VM, "root", 1), key).reveal().decode() == answers[0]
        assert len(store.transact(Ask(Scan(BootRow)))) == 64


def test_a_killed_process_loses_nothing_and_leaves_no_half_unit(address: str, figure: Callable[[str], None]) -> None:
    """Killed in the middle of boots, syncs, attestations and confirmations."""
    chance = random.Random(0)
    answered: list[dict[str, Any]] = []
    disks: dict[str, list[str]] = {}
    for number in range(KILLS):
        with worker(address, "lives", str(number), THREADS) as process:
            begin(process, disks)
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(chance.randint(1, 60))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
            assert process.wait(60) == -signal.SIGKILL
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        answered += told
        disks |= {answer["vm"]: answer["disk"] for answer in told if "disk" in answer}
        for disk in disks.values():  # who heard nothing of a confirmation keeps both keys, or takes the new one off
            del disk[chance.randint(1, len(disk)) :]
        with closing(StorePlace(address, Path.cwd(), vault=VAULT).open()) as store:
            store.check()
            nothing_is_half_done(store)
            nothing_is_lost(store, answered)
            disks_open(store, str(number), disks)
    syncs, rotations = (sum(what in answer for answer in answered) for what in ("sync", "rotated"))
    assert min(syncs, rotations) > KILLS
    figure(f"{KILLS} kills, {len(answered)} answers, {syncs} of them to syncs and {rotations} to rotations")


def nothing_is_lost(store: DurableStore, answered: list[dict[str, Any]]) -> None:
    """Each key that was answered is there and opens, and the last syncs are answered the same again."""
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in store.transact(Ask(Scan(GenerationRow))):
        opened = VAULT.open(Address(row.vm, row.volume, row.generation), row)
        keys[row.vm.name, row.volume].add(opened.reveal().decode())
    for answer in answered:
        for volume, passphrases in answer["keys"].items():
            assert set(passphrases) <= keys[answer["vm"], volume]
    for answer in [answer for answer in answered if "sync" in answer][-5:]:
        label, vm, volumes, rekey = answer["sync"]
        again = store.transact(unit(label, vm, tuple(volumes), rekey))
        assert again.replayed
        assert {volume: [passphrase.reveal().decode()] for volume, passphrase in again.passphrases} == answer["keys"]


def disks_open(store: DurableStore, name: str, disks: dict[str, list[str]]) -> None:
    """Of two boots of a VM at least one is handed a key that is on its disk; the same request gets the same again."""
    for vm, disk in disks.items():
        openers: list[str] = []
        for turn in range(2):
            granted, attested = two_phase(f"{name}.again.{vm}.{turn}", vm, is_formatted=True)
            _ = store.transact(granted)
            handed = store.transact(attested)
            assert store.transact(attested) == evolve(handed, replayed=True)
            openers.append(pair(handed)[0])
        assert set(openers) & set(disk)


MADE = ("created", "rekeyed", "next", "candidate")
"""The words of a boot's audit row for keys that it made."""


def nothing_is_half_done(store: DurableStore) -> None:
    """Of each boot and each sync there is all that its unit writes, or nothing."""
    boots = {row.boot_id: row for row in store.transact(Ask(Scan(BootRow)))}
    verdicts = store.transact(Ask(Scan(AttestationRow)))
    assert {row.attestation_id for row in verdicts if row.stage == "boot"} == boots.keys()
    assert len(store.transact(Ask(Scan(NonceRow)))) == len(boots)
    audits = [row for row in store.transact(Ask(Scan(AuditRow))) if row.decision == "granted"]
    told: dict[str, list[str]] = defaultdict(list)
    for audit in audits:
        told[audit.event].append(str(audit.boot_id))
    assert sorted(told["boot"]) == sorted(boots)
    spent = sorted(boot_id for boot_id, row in boots.items() if row.spent_at is not None)
    attested = sorted(boot_id for boot_id in spent if boots[boot_id].exchange == "two-phase")
    assert sorted(told["sync"] + told["attest volumes"]) == spent
    assert sorted(told["attest volumes"]) == attested
    assert sorted(row.reason.split()[-1] for row in verdicts if row.stage == "runtime") == attested
    assert sorted(boot_id for boot_id, row in boots.items() if row.confirm_digest is not None) == attested
    confirmed = sorted(boot_id for boot_id, row in boots.items() if row.confirm_body_digest is not None)
    assert sorted(told["confirm volumes"]) == confirmed
    given = store.transact(Ask(Scan(BootVolumeRow)))
    assert sorted({row.boot_id for row in given}) == spent
    made = {(row.boot_id, words) for row in audits for words in row.keys.split(", ")}
    numbers: dict[tuple[Vm, str], list[GenerationRow]] = defaultdict(list)
    for row in store.transact(Ask(Scan(GenerationRow))):
        numbers[row.vm, row.volume].append(row)
        words = {(row.origin, f"{row.volume}/{row.generation} {word}") for word in MADE}
        assert words & made
    for own in numbers.values():
        assert [row.generation for row in own] == list(range(1, len(own) + 1))
        assert sum(row.state == "active" for row in own) <= 1
        assert sum(row.state == "candidate" for row in own) <= 1
        assert sum(row.provisional for row in own) in (0, 2)  # a promotion, and what it superseded
    for volume in given:
        handed = {volume.current_generation, volume.next_generation} - {None}
        assert handed <= {row.generation for row in numbers[boots[volume.boot_id].vm, volume.volume]}
        assert handed
