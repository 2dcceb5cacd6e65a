"""Plans for disks: each action is first a value, which can be printed, and then carried out.

Rules kept here:

* an action names keys by their part in the exchange and never holds one, so its text holds no secret;
* a disk is formatted only if it is blank and the server does not know it to be in use; one that holds anything else, or
  is too small, stops the boot before any disk is touched;
* a key is taken off a disk only when the server said that the next one is promoted, and the next one opens the disk.
  The key that it replaced stays until then: a store that is restored from a backup may know that one only. But a root
  disk keeps the next one alone: the key that it replaced may be the build's, which every VM has.

``docs/explanation/disks.md`` has the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import ClassVar, Generic, TypeAlias, TypeVar

from attrs import frozen

from chutes_proto.errors import DiskError
from chutes_proto.luks.disk import LEAST_SIZE, Blank, Disk, Foreign, Luks
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret

T_co = TypeVar("T_co", covariant=True)


class Key(Enum):
    """A key by its part in the exchange. The base exchange knows the current one alone, and only a root disk a second.

    The second is tried where the others do not open the disk, and is never written.
    """

    CURRENT = "current"
    NEXT = "next"
    SECOND = "second"


Keys: TypeAlias = Mapping[Key, Secret]


@frozen
class Action(Generic[T_co]):
    """One thing done to the disk of one volume; carrying it out replies with ``T_co``. `str` describes it."""

    name: ClassVar[str]

    volume: str
    device: str

    def as_dict(self) -> dict[str, str]:
        """The action as fields of a log record or of JSON."""
        return {"volume": self.volume, "action": self.name, "device": self.device, "text": str(self)}


@frozen
class _KeyAction(Action[None]):
    """An action with one key; ``text`` describes it."""

    text: ClassVar[str]

    key: Key

    def __str__(self) -> str:
        return f"{self.volume}: {self.text.format(device=self.device, key=self.key.value)}"


@frozen
class Format(_KeyAction):
    """Make a blank disk a LUKS2 volume that ``key`` opens."""

    name = "format"
    text = "format {device} as LUKS2 with the {key} key"


@frozen
class Open(Action[Key]):
    """Map the volume, trying ``keys`` in their order; the reply is the one that opened it."""

    name = "open"

    mapping: str
    keys: tuple[Key, ...]

    def __str__(self) -> str:
        keys = ", else with the ".join(key.value for key in self.keys)
        return f"{self.volume}: open {self.device} as /dev/mapper/{self.mapping} with the {keys} key"


@frozen
class AddKey(_KeyAction):
    """Add ``key`` to the volume unless it opens it already, and test it."""

    name = "add_key"
    text = "add the {key} key to {device} unless it has it, and test it"


@frozen
class KeepKey(_KeyAction):
    """Take every key off the disk but ``key``, which must open it, and ``beside``, if that one opens it."""

    name = "keep_key"
    text = "take every key but the {key} one off {device}"

    beside: Key | None = None

    def __str__(self) -> str:
        both = self.key.value if self.beside is None else f"{self.key.value} and the {self.beside.value}"
        return f"{self.volume}: {self.text.format(device=self.device, key=both)}"


@frozen
class RemoveMark(Action[None]):
    """Remove the token that marks the root disk as a fresh copy of the published image, once the disk is open."""

    name = "remove_mark"

    def __str__(self) -> str:
        return f"{self.volume}: remove the mark of a fresh image from {self.device}"


Step: TypeAlias = Format | Open | AddKey | KeepKey | RemoveMark
Plan: TypeAlias = tuple[Step, ...]


def plan_open(volume: Volume, disk: Disk, *, in_use: bool) -> Plan:
    """Plan the base exchange: open with the one key; format a blank disk first if the server does not forbid it.

    ``in_use``: the server knows the disk to hold data. Raises `DiskError` where the boot must stop.
    """
    return _plan(volume, disk, in_use, (Key.CURRENT,))


def plan_rotation(volume: Volume, disk: Disk, *, in_use: bool, first: bool) -> Plan:
    """Plan the two-phase exchange up to its confirmation: open with the current key, else the next; add the next.

    ``first``: the server never had a key for it, and has the next one only. Raises `DiskError` where the boot must
    stop.
    """
    if first:
        return _plan(volume, disk, in_use, (Key.NEXT,))
    return (*_plan(volume, disk, in_use, (Key.CURRENT, Key.NEXT)), AddKey(volume.name, volume.device, Key.NEXT))


def plan_promoted(volume: Volume, *, first: bool) -> Plan:
    """Plan the end of a rotation, once the server has promoted the next key.

    ``first``: it is the only key that may stay, because it replaced none, or one of a root disk.
    """
    return (KeepKey(volume.name, volume.device, Key.NEXT, None if first else Key.CURRENT),)


def plan_root(volume: Volume, disk: Disk, keys: tuple[Key, ...] = (Key.CURRENT,)) -> Plan:
    """Plan the root disk: open it with one of ``keys``, never format it. Raises `DiskError` where the boot must stop.

    Another key would lock a fresh copy of the image if the mark stayed, so its removal is part of opening it.
    """
    if isinstance(disk, Blank):
        raise DiskError(
            "blank_root", "the root disk is blank; attach the right one, it is never formatted", volume.device
        )
    opening = _plan(volume, disk, True, keys)
    is_fresh = isinstance(disk, Luks) and disk.header.is_fresh_image
    return (*opening, RemoveMark(volume.name, volume.device)) if is_fresh else opening


def plan_root_rotation(volume: Volume) -> Plan:
    """Plan the rotation of an open root disk's key up to its confirmation."""
    return (AddKey(volume.name, volume.device, Key.NEXT),)


def _plan(volume: Volume, disk: Disk, in_use: bool, keys: tuple[Key, ...]) -> Plan:
    match disk:
        case Luks():
            return (Open(volume.name, volume.device, volume.mapping, keys),)
        case Blank() if in_use:
            raise DiskError(
                "blank_in_use",
                f"the disk of {volume.name} is blank, but the server knows it to hold data: it is not formatted; attach"
                f" the right disk, or have the operator run: keys allow-format NAME {volume.name}",
                volume.device,
            )
        case Blank(size=size) if size < LEAST_SIZE:
            raise DiskError(
                "too_small",
                f"the disk of {volume.name} has {size} bytes; a volume needs {LEAST_SIZE} or more: attach a larger one",
                volume.device,
            )
        case Blank():
            key = keys[0]
            opening = Open(volume.name, volume.device, volume.mapping, (key,))
            return (Format(volume.name, volume.device, key), opening)
        case Foreign(found=found):
            raise DiskError(
                "foreign",
                f"the disk of {volume.name} is neither blank nor LUKS2 ({found}): it is not touched; attach the right"
                " disk, or wipe this one if nothing on it is needed",
                volume.device,
            )
