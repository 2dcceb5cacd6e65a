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
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.blocking.stores import DurableStore, StorePlace
from chutes_proto.keys.vault import Address
from chutes_proto.store.rows import AttestationRow, AuditRow, BootRow, BootVolumeRow, GenerationRow, NonceRow, Scan, Vm
from chutes_proto.testing.store_suite import VAULT, VM, Ask
from tests.conftest import ROOT, SOAK
from tests.store.worker import unit

KILLS = 200 if SOAK else 10
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


def begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store."""
    sqlite = f"sqlite:{tmp_path}/keys.db"
    found: str = sqlite if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    StorePlace(found, tmp_path).open(migrate=True).close()
    return found


def test_first_boots_through_four_processes_get_one_root_passphrase(address: str) -> None:
    """64 boots of one VM at once, 16 in each process: 64 answers, one passphrase, one key."""
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(address, "boots", str(number), 16)) for number in range(4)]
        for process in workers:
            begin(process)
        answers = [json.loads(line) for process in workers for line in process.communicate(timeout=60)[0].splitlines()]
    assert len(answers) == 64
    assert len(set(answers)) == 1, set(answers)
    assert len(answers[0]) == 128
    with closing(StorePlace(address, Path.cwd()).open()) as store:
        (key,) = store.transact(Ask(Scan(GenerationRow)))
        assert VAULT.open(Address(VM, "root", 1), key).reveal().decode() == answers[0]
        assert len(store.transact(Ask(Scan(BootRow)))) == 64


def test_a_killed_process_loses_nothing_and_leaves_no_half_unit(address: str) -> None:
    chance = random.Random(0)
    answered: list[dict[str, Any]] = []
    for number in range(KILLS):
        with worker(address, "syncs", str(number), THREADS) as process:
            begin(process)
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(chance.randint(1, 60))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
            assert process.wait(20) == -signal.SIGKILL
        answered += [json.loads(line) for line in lines if line.endswith("\n")]
        with closing(StorePlace(address, Path.cwd()).open()) as store:
            store.check()
            nothing_is_half_done(store)
            nothing_is_lost(store, answered)
    assert sum("sync" in answer for answer in answered) > KILLS


def nothing_is_lost(store: DurableStore, answered: list[dict[str, Any]]) -> None:
    """Each key that was answered is there and opens, and the last syncs are answered the same again."""
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in store.transact(Ask(Scan(GenerationRow))):
        opened = VAULT.open(Address(row.vm, row.volume, row.generation), row)
        keys[row.vm.name, row.volume].add(opened.reveal().decode())
    for answer in answered:
        for volume, passphrase in answer["keys"].items():
            assert passphrase in keys[answer["vm"], volume]
    for answer in [answer for answer in answered if "sync" in answer][-5:]:
        label, vm, volumes, rekey = answer["sync"]
        again = store.transact(unit(label, vm, tuple(volumes), rekey))
        assert again.replayed
        assert {volume: passphrase.reveal().decode() for volume, passphrase in again.passphrases} == answer["keys"]


def nothing_is_half_done(store: DurableStore) -> None:
    """Of each boot and each sync there is all that its unit writes, or nothing."""
    boots = {row.boot_id: row for row in store.transact(Ask(Scan(BootRow)))}
    assert {row.attestation_id for row in store.transact(Ask(Scan(AttestationRow)))} == boots.keys()
    assert len(store.transact(Ask(Scan(NonceRow)))) == len(boots)
    audits = [row for row in store.transact(Ask(Scan(AuditRow))) if row.decision == "granted"]
    told = {event: [row.boot_id for row in audits if row.event == event] for event in ("boot", "sync")}
    assert sorted(map(str, told["boot"])) == sorted(boots)
    spent = sorted(boot_id for boot_id, row in boots.items() if row.spent_at is not None)
    assert sorted(map(str, told["sync"])) == spent
    given = store.transact(Ask(Scan(BootVolumeRow)))
    assert sorted({row.boot_id for row in given}) == spent
    made = {(row.boot_id, words) for row in audits for words in row.keys.split(", ")}
    numbers: dict[tuple[Vm, str], list[GenerationRow]] = defaultdict(list)
    for row in store.transact(Ask(Scan(GenerationRow))):
        numbers[row.vm, row.volume].append(row)
        words = {(row.origin, f"{row.volume}/{row.generation} {word}") for word in ("created", "rekeyed")}
        assert words & made
    for own in numbers.values():
        assert [row.generation for row in own] == list(range(1, len(own) + 1))
        assert sum(row.state == "active" for row in own) <= 1
    for volume in given:
        assert volume.current_generation is not None
        assert volume.current_generation <= len(numbers[boots[volume.boot_id].vm, volume.volume])
