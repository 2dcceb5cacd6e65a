"""A process that works on a store as a server does: ``python -m tests.store.worker ADDRESS WHAT NAME N``.

It opens the store at ADDRESS, writes ``ready``, and begins when it can read a line of JSON. NAME makes what it asks its
own.

* ``boots``: N first boots of one VM at once, each as patient as a server; writes what each was given, one line each;
* ``lives``: N threads boot until they are killed: one half syncs, the other rotates the key of a disk of its own. The
  line that it reads has the disks' keys by VM. Writes a line for each answer, after it was given.

A line is JSON, so text that a killed process has not written whole is not a line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from attrs import evolve

from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.server._limits import Admission
from chutes_proto.server._retry import transact_patiently
from chutes_proto.store._rows import Vm
from chutes_proto.testing.store_suite._parts import VAULT, VM, attest, boot, confirm, sync
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.rotation import AttestVolumes, HandedKeys
from chutes_proto.units.volumes import SyncVolumes
from chutes_proto.wire.http import HttpRequest
from tests.store.harness import together

VOLUMES = ("storage", "tdx-cache")


def say(value: object) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def boots(store: DurableStore, name: str, number: int, _: Any) -> None:
    def call(index: int) -> str:
        request = HttpRequest("POST", "/", arrived=time.monotonic())
        flow = transact_patiently(Admission(1, share=1).of("any"), boot(f"{name}.{index}"), request)
        granted = Performer(store=store).run(flow)
        assert granted.root is not None
        return granted.root.reveal().decode()

    for outcome in together([partial(call, index) for index in range(number)]):
        say(outcome if isinstance(outcome, str) else f"{type(outcome).__name__}: {outcome}")


def unit(label: str, vm: str, volumes: tuple[str, ...], rekey: list[str]) -> SyncVolumes:
    """The sync of one answer; its boot is ``boot(label)``."""
    return sync(boot(label, vm=Vm(VM.hotkey, vm)), "body", *volumes, rekey=rekey)


def two_phase(label: str, vm: str, is_formatted: bool) -> tuple[GrantBoot, AttestVolumes]:
    """A two-phase boot and the attestation of its one volume."""
    granted = evolve(boot(label, vm=Vm(VM.hotkey, vm)), exchange="two-phase")
    return granted, attest(granted, "body", "storage", formatted=["storage"] if is_formatted else [])


def pair(handed: HandedKeys) -> list[str]:
    """The key that should open the disk, and the one to add; twice the same where it is the first."""
    ((_, keys),) = handed.volumes
    return [key.reveal().decode() for key in (keys.current or keys.next, keys.next)]


def lives(store: DurableStore, name: str, number: int, disks: dict[str, list[str]]) -> None:
    def syncs(index: int) -> None:
        chance = random.Random(f"{name}.{index}")
        for turn in count():
            label, vm = f"{name}.{index}.{turn}", f"vm-{chance.randrange(4)}"
            volumes = tuple(chance.sample(VOLUMES, chance.randint(1, 2)))
            rekey = [volume for volume in volumes if chance.random() < 0.3]
            root = store.transact(boot(label, vm=Vm(VM.hotkey, vm))).root
            assert root is not None
            say({"vm": vm, "keys": {"root": [root.reveal().decode()]}})
            answer = store.transact(unit(label, vm, volumes, rekey))
            keys = {volume: [passphrase.reveal().decode()] for volume, passphrase in answer.passphrases}
            say({"vm": vm, "keys": keys, "sync": [label, vm, volumes, rekey]})

    def rotations(index: int) -> None:
        vm = f"rotating-{index}"
        disk = disks.get(vm, [])
        for turn in count():
            granted, attested = two_phase(f"{name}.{index}.{turn}", vm, bool(disk))
            _ = store.transact(granted)
            opener, following = pair(store.transact(attested))
            opens = opener in disk or not disk
            disk = [opener, following] if opens else disk
            say({"vm": vm, "keys": {"storage": [opener, following]}, "disk": disk})
            if opens:
                _ = store.transact(confirm(attested, {"storage": True}))
                disk = [following]
                say({"vm": vm, "keys": {}, "disk": disk, "rotated": True})

    work = [partial((syncs, rotations)[index % 2], index) for index in range(number)]
    for outcome in together(work):
        say(f"{type(outcome).__name__}: {outcome}")


def main(address: str, what: str, name: str, number: str) -> None:
    store = StorePlace(address, Path.cwd(), vault=VAULT).open()
    say("ready")
    given = json.loads(sys.stdin.readline())
    {"boots": boots, "lives": lives}[what](store, name, int(number), given)


if __name__ == "__main__":
    main(*sys.argv[1:])
