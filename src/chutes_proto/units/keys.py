"""What units do with keys: carry out a change of generations, hand a passphrase out, remember it for the audit row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from chutes_proto.keys import generations
from chutes_proto.keys.vault import Address
from chutes_proto.store.rows import (
    GenerationRow,
    Insert,
    Put,
    ReadLiveGenerations,
    ReadVolumes,
    UpdateGeneration,
    Vm,
    VoidTokens,
    VolumeRow,
)

if TYPE_CHECKING:
    from chutes_proto.keys.generations import Change, HandOut, Seal, Supply
    from chutes_proto.keys.vault import FreshKey, Vault
    from chutes_proto.secret import Secret
    from chutes_proto.store._run import Script


def by_volume(rows: Iterable[GenerationRow]) -> defaultdict[str, list[GenerationRow]]:
    """The generations of each volume; none for a volume that never had a key."""
    volumes = defaultdict[str, list[GenerationRow]](list)
    for row in rows:
        volumes[row.volume].append(row)
    return volumes


@define
class Keeper:
    """One run of one unit over one VM's keys."""

    vm: Vm
    vault: Vault
    now: int
    origin: str
    _told: list[str] = field(factory=list[str], init=False)

    @property
    def told(self) -> str:
        """What was done so far, for `AuditRow.keys`."""
        return ", ".join(self._told)

    def sealer(self, volume: str, fresh: FreshKey) -> Seal:
        """Makes the active row of a new generation of ``volume`` from ``fresh``; this unit's answer delivers it."""

        def seal(generation: int) -> GenerationRow:
            sealed = self.vault.seal(Address(self.vm, volume, generation), fresh)
            return GenerationRow(
                vm=self.vm,
                volume=volume,
                generation=generation,
                state="active",
                sealed=sealed.sealed,
                kek_id=sealed.kek_id,
                wrapped_key=sealed.wrapped_key,
                provisional=False,
                created_at=self.now,
                origin=self.origin,
                delivered_at=self.now,
            )

        return seal

    def supply(self, supply: Supply) -> Script[Secret]:
        """Write the rows of ``supply`` and open the passphrase that is active afterwards, be it new or old."""
        row = supply.current
        yield from self._write(supply)
        if row.delivered_at is None:
            yield from UpdateGeneration(evolve(row, delivered_at=self.now))
        self._told.append(f"{row.volume}/{row.generation} {supply.word}")
        return self.open(row)

    def hand_out(self, pair: HandOut) -> Script[tuple[Secret | None, Secret]]:
        """Write the rows of ``pair`` and open the current passphrase, if there is one, and the next one."""
        yield from self._write(pair)
        for what, row in (("current", pair.current), ("next", pair.next)):
            if row is not None:
                if row.delivered_at is None:
                    yield from UpdateGeneration(evolve(row, delivered_at=self.now))
                self._told.append(f"{row.volume}/{row.generation} {what}")
        return None if pair.current is None else self.open(pair.current), self.open(pair.next)

    def settle(self, volume: str, change: Change) -> Script[None]:
        """Write the rows of ``change``, after which there is an active key."""
        yield from self._write(change)
        self._told.extend(f"{row.volume}/{row.generation} {row.state}" for row in change.updated)
        if not change.updated:
            self._told.append(f"{volume} unchanged")

    def retire(self, change: Change) -> Script[None]:
        """Write the rows of ``change``, after which there is no active key."""
        yield from self._write(change)
        self._told.extend(f"{row.volume}/{row.generation} retired" for row in change.updated)

    def disown(self) -> Script[None]:
        """Nothing of the name's holder reaches the next one, nor the other way round: keys, disks or tokens."""
        for rows in by_volume((yield from ReadLiveGenerations(self.vm))).values():
            yield from self.retire(generations.disown(rows, self.now))
        for volume in (yield from ReadVolumes(self.vm)):
            yield from Put(evolve(volume, in_use=False, format_allowed=False, handed=None))
        yield from VoidTokens(self.vm, self.now)

    def open(self, row: GenerationRow) -> Secret:
        """The passphrase of a row of this VM."""
        return self.vault.open(Address(self.vm, row.volume, row.generation), row)

    def _write(self, change: Change) -> Script[None]:
        for row in change.updated:
            yield from UpdateGeneration(row)
        if change.created is not None:
            yield from Insert(change.created)


def report(vm: Vm, volumes: Iterable[str], formatted: Iterable[str]) -> Script[tuple[str, ...]]:
    """Keep which of ``volumes`` are reported to have a LUKS header; reply with those that must not be formatted."""
    known = {row.volume: row for row in (yield from ReadVolumes(vm))}
    in_use: list[str] = []
    for volume in volumes:
        before = known.get(volume) or VolumeRow(vm, volume, in_use=False, format_allowed=False)
        reported = volume in formatted
        if reported or (before.in_use and not before.format_allowed):
            in_use.append(volume)
        if before.format_allowed or (reported and not before.in_use):
            yield from Put(evolve(before, in_use=before.in_use or reported, format_allowed=False))
    return tuple(in_use)
