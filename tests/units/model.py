"""The key lifecycle in plain lists and passphrases: the model that the units are compared with.

It knows nothing of rows, generations' numbers, envelopes or stores, and follows ``docs/explanation/key-lifecycle.md``.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Literal

from attrs import define, evolve, field

from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.rotation import AttestVolumes, ConfirmVolumes, HandedKeys, Result
from chutes_proto.units.volumes import SyncVolumes, VolumeKeys

RESERVED = {"root", "k3s"}
KEPT = 3


@define
class Key:
    """One passphrase; ``pruned`` is what may come back, ``old`` what only an operator brings back.

    ``unsure``: a disk may have this one or another: it was promoted and not seen to open, or superseded by such a one.
    """

    text: bytes
    state: Literal["active", "candidate", "pruned", "old", "purged"]
    kek: str
    unsure: bool = False
    since: int = 0
    """When it was retired."""

    def retire(self, at: int, state: Literal["pruned", "old"] = "old") -> None:
        self.state, self.since = state, at


@define
class Volume:
    """The keys of one volume, oldest first, and what is known of its disk."""

    keys: list[Key] = field(factory=list[Key])
    in_use: bool = False
    may_format: bool = False
    handed: Key | None = None
    """The current key of the last attestation, until a confirmation."""

    def find(self, state: str) -> Key | None:
        return next((key for key in self.keys if key.state == state), None)

    @property
    def active(self) -> Key | None:
        return self.find("active")

    @property
    def pinned(self) -> Key | None:
        return next((key for key in self.keys if key.unsure and key.state == "old"), None)

    def settle(self) -> None:
        """From now on no disk can need any but the active key."""
        for key in self.keys:
            key.unsure = False

    def revive(self) -> Key | None:
        """The active key, or the one that a prune retired."""
        if (key := self.active or self.find("pruned")) is not None:
            key.state = "active"
        return key

    def make(self, text: bytes, kek: str, at: int) -> Key:
        """A new active key: all others are of no more use."""
        for key in self.keys:
            if key.state in ("active", "candidate"):
                key.retire(at)
            elif key.state == "pruned":
                key.state = "old"
        self.settle()
        self.keys.append(Key(text, "active", kek))
        return self.keys[-1]

    def doubt(self) -> None:
        """The store came back from a backup: a disk may have the candidate as its only key."""
        for key in self.keys:
            key.unsure |= key.state == "candidate"

    def prune(self, at: int) -> None:
        if key := self.active:
            key.retire(at, "pruned")
        if key := self.find("candidate"):
            key.retire(at)

    def disown(self, at: int) -> None:
        """The name is another's."""
        for key in self.keys:
            if key.state in ("active", "candidate"):
                key.retire(at)
            elif key.state == "pruned":
                key.state = "old"
        self.settle()
        self.in_use = self.may_format = False
        self.handed = None

    def restore(self, key: Key, at: int) -> None:
        """An operator decides that it is this one."""
        for other in self.keys:
            if other.state in ("active", "candidate"):
                other.retire(at)
            elif other.state == "pruned":
                other.state = "old"
        self.settle()
        key.state, self.handed = "active", None

    def purgeable(self, until: int) -> list[Key]:
        return [
            key for key in self.keys[:-KEPT] if key.state in ("old", "pruned") and not key.unsure and key.since <= until
        ]

    def is_barred(self, reported: bool) -> bool:
        """Whether an answer says that the disk must not be formatted; the answer uses a permission up."""
        barred = reported or (self.in_use and not self.may_format)
        self.in_use, self.may_format = self.in_use or reported, False
        return barred

    def hand_out(self, current: bytes | None, following: bytes, kek: str, at: int) -> None:
        """An attestation of the VM was given these."""
        key = self.revive()
        if key is None:
            assert current is None
            self.make(following, kek, at)
            self.handed = None
            return
        candidate = self.find("candidate")
        turns = [key, self.pinned, candidate if candidate and candidate.unsure else None]
        turns = [turn for turn in turns if turn]
        last = next((at for at, turn in enumerate(turns) if turn is self.handed), -1)
        self.handed = turns[(last + 1) % len(turns)]
        if self.handed is not key:
            assert self.handed
            assert (current, following) == (self.handed.text, (key if self.handed is self.pinned else self.handed).text)
            return
        assert current == key.text
        if candidate is None:
            assert following not in {other.text for other in self.keys}
            self.keys.append(Key(following, "candidate", kek))
        else:
            assert following == candidate.text

    def confirm(self, current: bytes | None, following: bytes, rotated: bool, at: int) -> bool:
        """A boot that was given these two opened the disk; False if what it says cannot be so any more."""
        (after,) = (key for key in self.keys if key.text == following)
        opened = next((key for key in self.keys if key.text == current), None)
        if opened is after:
            if opened.state not in ("active", "candidate"):
                return not rotated
            self.settle()
            if (active := self.active) and active is not opened:
                active.retire(at)
            opened.state = "active"
            return True
        if opened is None or (rotated and after.state == "active"):
            return after.state == "active" or not rotated
        if after.state == "candidate" and opened.state == "active":
            self.settle()
            if rotated:
                opened.retire(at)
                after.state = "active"
                opened.unsure = after.unsure = True
            else:
                after.retire(at)
            return True
        if not rotated and after.state == "active" and opened is self.pinned:
            for key in self.keys:
                if key.state in ("active", "candidate"):
                    key.retire(at)
            self.settle()
            opened.state = "active"
        return not rotated


@define
class Machine:
    """The model's state of a VM; ``platform`` is None until its name is claimed."""

    platform: str | None = None
    proven: bool = False
    two_phase: bool = False
    booted: bool = False
    """Whether anybody booted since the name was bound."""
    attested: GrantBoot | None = None
    volumes: defaultdict[str, Volume] = field(factory=lambda: defaultdict(Volume))

    @property
    def texts(self) -> set[bytes]:
        """Every passphrase that there ever was."""
        return {key.text for volume in self.volumes.values() for key in volume.keys}

    @property
    def holds_keys(self) -> bool:
        return any(key.state != "purged" for volume in self.volumes.values() for key in volume.keys)

    def own(self, name: str, text: bytes, kek: str, at: int) -> None:
        """A key of the VM itself was given."""
        volume = self.volumes[name]
        if volume.active is None:
            assert text not in self.texts
            volume.make(text, kek, at)
        assert volume.active is not None
        assert text == volume.active.text

    def synced(self, unit: SyncVolumes, answer: VolumeKeys, kek: str) -> None:
        reported = set(unit.volumes) - unit.rekey if unit.formatted is None else unit.formatted
        assert [name for name, _ in answer.passphrases] == [*unit.volumes]
        for name, passphrase in answer.passphrases:
            volume, text = self.volumes[name], passphrase.reveal()
            key = None if name in unit.rekey else volume.revive()
            if key is None:
                assert text not in self.texts
                volume.make(text, kek, unit.now)
            else:
                assert text == key.text
            assert volume.is_barred(name in reported) == (name in answer.in_use)
        for name in self.volumes.keys() - set(unit.volumes) - RESERVED:
            self.volumes[name].prune(unit.now)

    def handed(self, granted: GrantBoot, unit: AttestVolumes, answer: HandedKeys, kek: str) -> None:
        self.own("k3s", answer.k3s_encryption_key.reveal(), kek, unit.now)
        assert [name for name, _ in answer.volumes] == [*unit.volumes]
        for name, pair in answer.volumes:
            volume = self.volumes[name]
            assert volume.is_barred(name in (unit.formatted or ())) == (name in answer.in_use)
            current = None if pair.current is None else pair.current.reveal()
            volume.hand_out(current, pair.next.reveal(), kek, unit.now)
        self.attested = granted

    def confirmed(self, unit: ConfirmVolumes, given: HandedKeys) -> tuple[tuple[str, Result], ...] | None:
        """The outcome; None if it is refused, and then nothing has changed."""
        after = deepcopy(self.volumes)
        pairs = dict(given.volumes)
        results: list[tuple[str, Result]] = []
        for name, rotated in unit.rotated:
            pair = pairs.get(name)
            if pair is None:
                if rotated:
                    return None
                results.append((name, "no_pending"))
                continue
            current = None if pair.current is None else pair.current.reveal()
            if not after[name].confirm(current, pair.next.reveal(), rotated, unit.now):
                return None
            after[name] = evolve(after[name], in_use=True, handed=None)
            if current in (None, pair.next.reveal()):
                results.append((name, "promoted" if rotated and current is None else "no_pending"))
            else:
                results.append((name, "promoted" if rotated else "discarded"))
        self.volumes = after
        return tuple(results)

    def disown(self, at: int) -> None:
        for volume in self.volumes.values():
            volume.disown(at)


@define
class Token:
    """The model's state of a token or quote nonce, and the answers that were given for it."""

    granted: GrantBoot
    home: str
    void: bool = False
    spent: tuple[SyncVolumes, VolumeKeys] | None = None
    attested: tuple[AttestVolumes, HandedKeys] | None = None
    confirmed: tuple[ConfirmVolumes, tuple[tuple[str, Result], ...]] | None = None
