"""The disks of a VM, as its flows see them: simulated ones, whose headers are sets of keys, and real ones in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from attrs import define, field

from chutes_proto.errors import DiskError
from chutes_proto.io.disks.cryptsetup import Disks
from chutes_proto.luks.disk import Blank, Disk, Luks, judge
from chutes_proto.luks.plan import Action, AddKey, Format, KeepKey, Key, Keys, Open
from tests.luks import headers

LUKS = judge(headers.both(headers.told()), [], headers.SIZE, "")


class Killed(Exception):
    """The VM is off."""


class VmDisks(Protocol):
    """The performer of disks' effects, which tells a test how many keys open each."""

    def inspect(self, device: str) -> Disk: ...
    def act(self, action: Action[Any], keys: Keys) -> object: ...
    def slots(self, device: str) -> int: ...


@define
class SimulatedDisks:
    """Disks by their device, each the set of keys that open it. After ``writes`` more writes the VM is off."""

    keys: dict[str, set[bytes]] = field(factory=dict)
    writes: int = 1000

    def inspect(self, device: str) -> Disk:
        return LUKS if self.keys.get(device) else Blank(device, headers.SIZE)

    def slots(self, device: str) -> int:
        return len(self.keys.get(device, ()))

    def act(self, action: Action[Any], keys: Keys) -> object:
        slots = self.keys.setdefault(action.device, set())
        held = {name: secret.reveal() for name, secret in keys.items()}
        match action:
            case Format(key=key):
                assert not slots
                self._write(slots, {held[key]})
            case Open(keys=tried):
                return self._opener(action, slots, held, tried)
            case AddKey(key=key):
                if held[key] not in slots:
                    _ = self._opener(action, slots, held, tuple(held))
                    self._write(slots, {*slots, held[key]})
            case KeepKey(key=key, beside=beside):
                _ = self._opener(action, slots, held, (key,))
                self._write(slots, {held[key], *({held[beside]} & slots if beside else ())})
            case _:
                raise AssertionError(action)
        return None

    def _write(self, slots: set[bytes], keys: set[bytes]) -> None:
        if self.writes == 0:
            raise Killed
        self.writes -= 1
        slots.clear()
        slots |= keys

    @staticmethod
    def _opener(action: Action[Any], slots: set[bytes], held: dict[Key, bytes], tried: tuple[Key, ...]) -> Key:
        for key in tried:
            if held[key] in slots:
                return key
        raise DiskError("key_refused", "no key opens it", action.device)


class RealDisks:
    """Image files in ``folder``, worked on by `cryptsetup`; a new boot has seen nothing yet."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        self.boot()
        for name in names:
            self.blank(name)

    def boot(self) -> None:
        self._disks = Disks(images=True)

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.img"

    def blank(self, name: str, size: int = 20 << 20) -> None:
        """A new disk in the place of the one that is there."""
        self.path(name).unlink(missing_ok=True)
        with self.path(name).open("wb") as file:
            _ = file.truncate(size)

    def inspect(self, device: str) -> Disk:
        return self._disks.inspect(device)

    def act(self, action: Action[Any], keys: Keys) -> object:
        return self._disks.act(action, keys)

    def slots(self, device: str) -> int:
        disk = Disks(images=True).inspect(device)
        return len(disk.header.keyslots) if isinstance(disk, Luks) else 0
