"""A process that works on a store as a server does: ``python -m tests.store.worker ADDRESS WHAT NAME N``.

It opens the store at ADDRESS, writes ``ready``, and begins when it can read a line. NAME makes what it asks its own.

* ``boots``: N first boots of one VM at once, each as patient as a server; writes what each was given, one line each;
* ``syncs``: N threads boot and sync until they are killed; writes a line for each answer, after it was given.

A line is JSON, so what a killed process has not written whole is no line.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from itertools import count
from pathlib import Path

from chutes_proto.blocking.perform import Performer
from chutes_proto.blocking.stores import DurableStore, StorePlace
from chutes_proto.server.patience import transact_patiently
from chutes_proto.store.rows import Vm
from chutes_proto.testing.store_suite import VM, boot, sync
from chutes_proto.units.volumes import SyncVolumes
from tests.store.harness import together

VOLUMES = ("storage", "tdx-cache")


def say(value: object) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def boots(store: DurableStore, name: str, number: int) -> None:
    def call(index: int) -> str:
        granted = Performer(store=store).run(transact_patiently(boot(f"{name}.{index}"), time.monotonic()))
        assert granted.root is not None
        return granted.root.reveal().decode()

    for outcome in together([lambda index=index: call(index) for index in range(number)]):  # type: ignore[misc]
        say(outcome if isinstance(outcome, str) else f"{type(outcome).__name__}: {outcome}")


def unit(label: str, vm: str, volumes: tuple[str, ...], rekey: list[str]) -> SyncVolumes:
    """The sync of one answer; its boot is ``boot(label)``."""
    return sync(boot(label, vm=Vm(VM.hotkey, vm)), "body", *volumes, rekey=rekey)


def syncs(store: DurableStore, name: str, number: int) -> None:
    def work(index: int) -> None:
        chance = random.Random(f"{name}.{index}")
        for turn in count():
            label, vm = f"{name}.{index}.{turn}", f"vm-{chance.randrange(4)}"
            volumes = tuple(chance.sample(VOLUMES, chance.randint(1, 2)))
            rekey = [volume for volume in volumes if chance.random() < 0.3]
            root = store.transact(boot(label, vm=Vm(VM.hotkey, vm))).root
            assert root is not None
            say({"vm": vm, "keys": {"root": root.reveal().decode()}})
            answer = store.transact(unit(label, vm, volumes, rekey))
            keys = {volume: passphrase.reveal().decode() for volume, passphrase in answer.passphrases}
            say({"vm": vm, "keys": keys, "sync": [label, vm, volumes, rekey]})

    for outcome in together([lambda index=index: work(index) for index in range(number)]):  # type: ignore[misc]
        say(f"{type(outcome).__name__}: {outcome}")


def main(address: str, what: str, name: str, number: str) -> None:
    store = StorePlace(address, Path.cwd()).open()
    say("ready")
    _ = sys.stdin.readline()
    {"boots": boots, "syncs": syncs}[what](store, name, int(number))


if __name__ == "__main__":
    main(*sys.argv[1:])
