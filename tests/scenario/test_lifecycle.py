"""The life of a disk: real LUKS2 images, a real server over TLS, an operator's commands.

After each step some key that the server still hands out opens the image. Boots are played request by request, so that
each of them can end anywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
from attrs import define

from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.boot._disks import Unlocked, unlock
from chutes_proto.boot._flows import BootSettings
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import ActOnDisk, Effect, Send, Sleep, run
from chutes_proto.errors import ChutesError, TransportError
from chutes_proto.io.disks.cryptsetup import Disks
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpsSender
from chutes_proto.io.http.tls import client_context
from chutes_proto.luks.volume import Volume
from tests.cli.conftest import HOTKEY
from tests.conftest import SOAK
from tests.scenario.premises import Premises

SIZE = 20 * 1024 * 1024
CHEAP = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


@define
class Disk:
    """An image with what `cryptsetup` makes of it."""

    image: Path
    program: str

    @property
    def formatted(self) -> list[str]:
        """A boot's report of it."""
        luks = subprocess.run([self.program, "isLuks", str(self.image)], check=False).returncode == 0
        return ["storage"] if luks else []

    def blank(self) -> None:
        self.image.unlink(missing_ok=True)
        with self.image.open("wb") as file:
            _ = file.truncate(SIZE)

    def format(self, passphrase: str) -> None:
        self.blank()
        assert self._run("luksFormat", "--type=luks2", *CHEAP, "--key-file={}", keys=[passphrase])

    def opens(self, passphrase: str | None) -> bool:
        return self._run("open", "--test-passphrase", "--key-file={}", keys=[passphrase or ""])

    def add(self, there: str, new: str) -> None:
        assert self._run("luksAddKey", *CHEAP, "--key-file={}", keys=[there, new])

    def remove(self, passphrase: str) -> None:
        assert self._run("luksRemoveKey", keys=[passphrase])

    def _run(self, action: str, *options: str, keys: list[str]) -> bool:
        """Whether it was done. The first key goes where ``{}`` is, what is left after the image's name."""
        files = [os.memfd_create("key") for _ in keys]
        for file, passphrase in zip(files, keys, strict=True):
            _ = os.write(file, passphrase.encode())
        paths = [f"/dev/fd/{file}" for file in files]
        placed = [option.replace("{}", paths.pop(0)) if "{}" in option else option for option in options]
        command = [self.program, action, "--batch-mode", *placed, str(self.image), *paths]
        try:
            done = subprocess.run(command, pass_fds=files, capture_output=True, timeout=60, check=False)
        finally:
            for file in files:
                os.close(file)
        assert done.returncode in (0, 2), done.stderr  # 2: no key slot opens
        return done.returncode == 0


@pytest.fixture
def disk(require_program: Callable[[str], str], tmp_path: Path) -> Disk:
    disk = Disk(tmp_path / "storage.img", require_program("cryptsetup"))
    disk.blank()
    return disk


def key(premises: Premises, disk: Disk, **members: Any) -> str:
    """The key that a boot with the base exchange is handed for the disk."""
    vm = premises.vm()
    answer = vm.sync(vm.boot()["boot_token"], formatted=disk.formatted, **members)
    return str(answer["storage"])


def pair(premises: Premises, disk: Disk) -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    """The keys of the disk that a two-phase boot is handed, and how it confirms."""
    vm = premises.vm()
    answer = vm.attest(vm.boot()["luks_quote_nonce"], "storage", formatted=disk.formatted)
    nonce = answer["confirm_nonce"]
    return answer["volumes"]["storage"], lambda rotated: vm.confirm(nonce, storage=rotated)


def test_the_base_exchange(premises: Premises, disk: Disk) -> None:
    premises.start()
    first = key(premises, disk)
    disk.format(first)
    assert disk.opens(key(premises, disk))
    # rekey means: I am about to format
    second = key(premises, disk, rekey=["storage"])
    assert second != first
    disk.format(second)
    assert disk.opens(key(premises, disk))
    # ... and one that was then not formatted takes an operator
    assert not disk.opens(key(premises, disk, rekey=["storage"]))
    assert premises.here("keys", "restore", "vm-1", "storage", 2, "--reason", "rekeyed, not formatted").code == 0
    assert disk.opens(key(premises, disk))
    # a disk that was missing at one boot, or at several
    for _ in range(2):
        vm = premises.vm()
        _ = vm.sync(vm.boot()["boot_token"], "tdx-cache", formatted=[])
    states = {g["generation"]: g["retirement"] for g in history(premises) if g["volume"] == "storage"}
    assert states[2] == "prune"
    assert disk.opens(key(premises, disk))
    # a host swaps in a blank disk: the answer says that the volume is in use, so that nothing is formatted
    kept = disk.image.with_name("kept.img")
    _ = shutil.move(disk.image, kept)
    disk.blank()
    vm = premises.vm()
    answer = vm.sync(vm.boot()["boot_token"], formatted=disk.formatted)
    assert answer["in_use"] == ["storage"]
    # the operator permits one format
    assert premises.here("keys", "allow-format", "vm-1", "storage").code == 0
    vm = premises.vm()
    answer = vm.sync(vm.boot()["boot_token"], formatted=disk.formatted)
    assert answer["in_use"] == []
    disk.format(answer["storage"])
    assert disk.opens(key(premises, disk))
    assert Disk(kept, disk.program).opens(key(premises, disk))  # no key was made for it
    # the server dies in between
    premises.kill()
    premises.start()
    assert disk.opens(key(premises, disk))


def test_the_two_phase_exchange(premises: Premises, disk: Disk) -> None:
    premises.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')
    premises.start("--transport", "asyncio")
    keys, confirm = pair(premises, disk)
    assert keys["current"] is None
    disk.format(keys["next"])
    # the first confirmation does not arrive
    keys, confirm = pair(premises, disk)
    assert disk.opens(keys["current"])
    # a rotation as it should be
    disk.add(keys["current"], keys["next"])
    assert confirm(True)["volumes"]["storage"]["result"] == "promoted"
    disk.remove(keys["current"])
    old = keys
    keys, confirm = pair(premises, disk)
    assert disk.opens(keys["current"])
    _ = confirm(False)
    # the confirmation is lost on its way to the server: both keys stay on the disk
    keys, confirm = pair(premises, disk)
    disk.add(keys["current"], keys["next"])
    again, confirm = pair(premises, disk)
    assert again == keys
    assert disk.opens(again["current"])
    # the confirmation arrives and its answer is lost: a deployed client takes the new key off again
    _ = confirm(True)
    disk.remove(keys["next"])
    opened = 0
    for _ in range(4):  # nobody confirms: alternately
        keys, confirm = pair(premises, disk)
        opened += disk.opens(keys["current"])
    assert opened == 2
    turns = (pair(premises, disk) for _ in range(2))
    confirm = next(confirm for keys, confirm in turns if disk.opens(keys["current"]))
    _ = confirm(False)
    assert disk.opens(pair(premises, disk)[0]["current"])
    # the server is killed before it has answered anything of the next
    keys, confirm = pair(premises, disk)
    disk.add(keys["current"], keys["next"])
    premises.kill()
    premises.start()
    again, confirm = pair(premises, disk)
    assert disk.opens(again["current"])
    assert disk.opens(again["next"])
    assert confirm(True)["status"] == "confirmed"
    # the disk comes back from a backup that knows only the first key of all
    disk.format(old["current"])
    assert not disk.opens(pair(premises, disk)[0]["current"])
    (first,) = [g["generation"] for g in history(premises) if g["volume"] == "storage" and g["generation"] == 1]
    assert premises.here("keys", "restore", "vm-1", "storage", first).code == 0
    assert disk.opens(pair(premises, disk)[0]["current"])


def test_keys_are_wrapped_anew_while_disks_are_opened(premises: Premises, disk: Disk) -> None:
    """`keys rewrap` is killed in the middle while a server goes on; the next one does the rest."""
    premises.start()
    disk.format(key(premises, disk))
    premises.plant({f"other-{number}": {"storage": "x", "tdx-cache": "y"} for number in range(1000)})
    premises.stop()
    premises.new_key()
    premises.start()
    before = _sealed_under(premises)
    assert premises.killed_after_a_line("keys", "rewrap").startswith("keys wrapped: 1000 of ")
    between = _sealed_under(premises)
    assert len(between) == 2
    assert sum(between.values()) == sum(before.values()) + 1  # the new key of the rows is beside the old one
    assert disk.opens(key(premises, disk))
    done = premises.here("keys", "rewrap")
    assert (done.code, "no key is under another" in done.out) == (0, True)
    assert disk.opens(key(premises, disk))
    premises.stop()
    premises.edit('kek_previous_file = "kek.old"\n', "")
    (premises.directory / "kek.old").unlink()
    premises.start()
    assert disk.opens(key(premises, disk))
    assert list(_sealed_under(premises).values()) == [sum(before.values())]


def history(premises: Premises) -> list[dict[str, Any]]:
    generations: list[dict[str, Any]] = premises.json("keys", "history", "vm-1")["generations"]
    return generations


def _sealed_under(premises: Premises) -> dict[str, int]:
    counted: dict[str, int] = premises.json("store", "check")["keys_sealed_under"]
    return counted


# --- the agent's own flow, which is cut off, or whose server is, at each of its steps ---


class Off(Exception):
    """The VM is off."""


FATES = ("before", "after", "lost", "server")
STEPS = {"base": 4, "two-phase": 7}


@define
class Agent:
    """A VM that boots with `unlock`; its disk is an image."""

    premises: Premises
    name: str
    disk: Disk

    def boot(self, step: int = 0, fate: str = "") -> Unlocked:
        """A boot; at this request, or action on the disk, something happens. Raises what it ends with."""
        identity = make_client_identity(self.premises.now - 60, os.urandom(32))
        stages = iter(["boot", "runtime"])
        steps = count(1)

        def quote(data: bytes) -> bytes:
            return self.premises.platform.quote(data, stage=cast("Any", next(stages)))

        def perform(effect: Effect[Any]) -> object:
            if not isinstance(effect, Send | ActOnDisk) or next(steps) != step:
                return None if isinstance(effect, Sleep) else performer.perform(effect)
            if fate == "before":
                raise Off
            reply = performer.perform(effect)
            if fate == "after":
                raise Off
            if fate == "lost" and isinstance(effect, Send):
                raise TransportError("the answer was lost", maybe_delivered=True)
            if fate == "server":
                self.premises.kill()
                self.premises.start()
            return reply

        settings = BootSettings(HOTKEY, self.name, identity.spki_sha256, retry=RetryPolicy(attempts=1))
        context = client_context(identity, self.premises.ca.read_bytes())
        disks = Disks(self.disk.program, images=True)
        with HttpsSender(context, self.premises.url) as send:
            performer = Performer(send=send, quoter=quote, disks=disks, log=lambda _: None)
            return run(unlock(settings, [Volume("storage", str(self.disk.image))]), perform)

    def identity_of_disk(self) -> str:
        """Of its header: another one after each format."""
        return subprocess.run(
            [self.disk.program, "luksUUID", str(self.disk.image)], capture_output=True, text=True, check=False
        ).stdout


@pytest.mark.parametrize(
    ("premises", "exchange"),
    [("sqlite", "base"), ("sqlite", "two-phase"), ("postgresql", "two-phase")],
    indirect=["premises"],
)
def test_a_boot_that_is_cut_off_anywhere(premises: Premises, disk: Disk, exchange: str) -> None:
    """The first boot, and one of a disk in use; after each the disk opens within two boots, and is the same disk.

    The short form has one fate at each step, in turn, and the other store the next one; the long form has all.
    """
    premises.edit('root_passphrase = "vm"', f'root_passphrase = "vm"\nexchange = "{exchange}"')
    premises.start()
    premises.edit("127.0.0.1:0", premises.url.removeprefix("https://"))
    cuts = [(step, fate) for step in range(1, STEPS[exchange] + 1) for fate in FATES]
    begin = 0 if premises.store.startswith("sqlite:") else 1
    for number, (step, fate) in enumerate(cuts if SOAK else cuts[begin::5]):
        agent = Agent(premises, f"vm-{number}", disk)
        disk.blank()
        in_use = ""
        for cut in (step, 0, step, 0):
            try:
                opened = agent.boot(cut, fate)
            except (Off, ChutesError):
                if not cut:
                    opened = agent.boot()  # alternately: the other key
                else:
                    continue
            assert [volume.name for volume in opened.volumes] == ["storage"]
            in_use = in_use or agent.identity_of_disk()
            assert in_use
            assert agent.identity_of_disk() == in_use, (step, fate)
    assert premises.do("store", "check").code == 0
