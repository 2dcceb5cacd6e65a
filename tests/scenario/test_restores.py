"""Disks after a restore from a backup: real LUKS2 images, a real server, our agent and what deployed images run.

The deployed clients act with `cryptsetup` itself, as images 1.3 and 1.4.0 do: they add the next key in a further slot,
and then take a slot off by the old key, or every slot that stood before by its number.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import pytest
from attrs import define

from chutes_proto.errors import ChutesError
from tests.scenario.premises import Premises
from tests.scenario.test_lifecycle import CHEAP, SIZE, Agent, Disk

in_a_file = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)

HOUR = 3600
BY_KEY, BY_NUMBER = "image 1.3", "image 1.4.0"


class PowerLost(Exception):
    """The VM is off."""


@define
class Slots:
    """The key slots of an image. ``writes`` are left until the power is lost."""

    image: Path
    program: str
    writes: int = 1000

    def cryptsetup(self, action: str, *words: str, keys: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """Run it; each ``{}`` among ``words`` is the file of a key."""
        if action in ("luksFormat", "luksAddKey", "luksRemoveKey", "luksKillSlot"):
            if self.writes == 0:
                raise PowerLost
            self.writes -= 1
        files = [os.memfd_create("key") for _ in keys]
        for file, key in zip(files, keys, strict=True):
            _ = os.write(file, key.encode())
        paths = [f"/dev/fd/{file}" for file in files]
        command = [
            self.program,
            action,
            *(word.replace("{}", paths.pop(0)) if "{}" in word else word for word in words),
        ]
        try:
            return subprocess.run(
                command, pass_fds=files, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        finally:
            for file in files:
                os.close(file)

    def format(self, key: str) -> None:
        with self.image.open("wb") as file:
            _ = file.truncate(SIZE)
        options = ["--type=luks2", "--batch-mode", *CHEAP, "--key-file={}"]
        assert self.cryptsetup("luksFormat", *options, str(self.image), keys=(key,)).returncode == 0

    def opens(self, key: str) -> bool:
        done = self.cryptsetup("open", "--test-passphrase", "--key-file={}", str(self.image), keys=(key,))
        return done.returncode == 0

    def numbers(self) -> list[str]:
        dumped = self.cryptsetup("luksDump", "--dump-json-metadata", str(self.image))
        return [*json.loads(dumped.stdout)["keyslots"]]

    def rotate(self, image: str, current: str, following: str, confirm: Callable[[bool], bool]) -> None:
        """The part of a boot that follows the opening; ``confirm`` is whether 200 came back."""
        before = self.numbers()
        device = str(self.image)
        added = self.cryptsetup("luksAddKey", device, "{}", "--key-file={}", *CHEAP, keys=(following, current))
        if added.returncode != 0:
            _ = confirm(False)
        elif not confirm(True):
            assert self.cryptsetup("luksRemoveKey", device, "--key-file={}", keys=(following,)).returncode == 0
        elif image == BY_KEY:
            assert self.cryptsetup("luksRemoveKey", device, "--key-file={}", keys=(current,)).returncode == 0
        else:
            for slot in before:
                done = self.cryptsetup("luksKillSlot", "--key-file={}", device, slot, keys=(following,))
                assert done.returncode == 0, done.stderr


def answer(heard: bool, _: bool) -> bool:
    """A confirmation that is answered, or lost."""
    return heard


@pytest.fixture
def program(require_program: Callable[[str], str]) -> str:
    return require_program("cryptsetup")


@pytest.mark.parametrize("image", [BY_KEY, BY_NUMBER])
def test_the_present_key_as_the_next_one_keeps_the_disk_open(image: str, program: str, tmp_path: Path) -> None:
    """No rotation is due: the confirmation is answered, or lost, or the power is lost after each write."""
    slots = Slots(tmp_path / "disk.img", program)
    slots.format("present")
    for answered in (True, False, True):
        slots.rotate(image, "present", "present", partial(answer, answered))
        assert slots.opens("present")
        assert len(slots.numbers()) == 1
    for answered in (True, False):
        for writes in (0, 1, 2):
            slots.writes = writes
            with suppress(PowerLost):
                slots.rotate(image, "present", "present", partial(answer, answered))
            slots.writes = 1000
            assert slots.opens("present")
    # whatever that has left, a rotation that is due leaves the next key on the disk
    slots.rotate(image, "present", "next", lambda _: True)
    assert slots.opens("next")
    assert slots.opens("present") == (image == BY_KEY)  # that one takes off one slot of several


# --- a store that comes back ---


@define
class Fleet:
    """VMs with a disk each, of our agent and of deployed images, and their server."""

    premises: Premises
    program: str
    folder: Path
    names: tuple[str, ...]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.img"

    def boot(self, name: str) -> bool:
        """A boot of a VM; whether its disk is open."""
        slots = Slots(self.path(name), self.program)
        if name.startswith("ours"):
            if not slots.image.exists():
                Disk(slots.image, self.program).blank()
            try:
                _ = Agent(self.premises, name, Disk(slots.image, self.program)).boot()
            except ChutesError:
                return False
            return True
        vm = self.premises.vm(name)
        answer = vm.attest(vm.boot()["luks_quote_nonce"], "storage")
        current, following = (answer["volumes"]["storage"][word] for word in ("current", "next"))

        def confirm(rotated: bool) -> bool:
            _ = vm.confirm(answer["confirm_nonce"], storage=rotated)
            return True

        if current is None:
            slots.format(following)
            return confirm(name.startswith("new"))
        if not slots.opens(current):
            return False
        slots.rotate(BY_KEY if name.startswith("old") else BY_NUMBER, current, following, confirm)
        return slots.opens(following)

    def pass_hours(self, hours: int) -> None:
        """So much older is every row."""
        for change in ("generation SET created_at = created_at", "fact SET value = value"):
            only = " WHERE name = 'nonce_horizon'" if change.startswith("fact") else ""
            self.premises.turn(f"UPDATE {change} - {hours * HOUR}{only}")

    @property
    def keys(self) -> Path:
        return self.premises.directory / "keys.db"

    def back_up(self) -> Path:
        backup = self.premises.directory / "keys.backup"
        with closing(sqlite3.connect(self.keys)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        return backup

    def restore(self, backup: Path) -> None:
        self.premises.stop()
        for path in self.premises.directory.glob("keys.db*"):
            path.unlink()
        _ = shutil.copy(backup, self.keys)
        assert self.premises.here("store", "restored", "--reason", "the disk failed").code == 0
        self.pass_hours(1)  # boots are granted after a minute
        self.premises.start_here()


UNTOUCHED = ("ours-untouched", "old-untouched", "new-untouched")
REBOOTED = ("ours-1", "old-1", "new-1")


@in_a_file
@pytest.mark.parametrize(("rotate_after", "lost"), [(48, ()), (0, REBOOTED)], ids=["aged keys", "at each boot"])
def test_a_restored_backup_opens_every_disk(
    premises: Premises, program: str, tmp_path: Path, rotate_after: int, lost: tuple[str, ...]
) -> None:
    """A VM whose key rotated twice since the backup is lost where keys rotate at each boot; else none is."""
    premises.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')
    premises.edit("rotate_after_hours = 0", f"rotate_after_hours = {rotate_after}")
    premises.start_here()
    fleet = Fleet(premises, program, tmp_path, (*UNTOUCHED, *REBOOTED))
    for _ in range(2):  # the first format, and a boot that makes a candidate
        assert all(map(fleet.boot, fleet.names))
    fleet.pass_hours(30)
    backup = fleet.back_up()
    fleet.pass_hours(20)
    for _ in range(2):
        assert all(map(fleet.boot, REBOOTED))
    fleet.restore(backup)
    tries = {name: next((n for n in (1, 2, 3) if fleet.boot(name)), None) for name in fleet.names}
    assert [name for name, number in tries.items() if number is None] == [*lost]
    if not lost:
        assert all(tries[name] == 1 for name in (*UNTOUCHED, "ours-1"))
        assert {tries[name] for name in ("old-1", "new-1")} == {2}
        assert all(map(fleet.boot, fleet.names))
