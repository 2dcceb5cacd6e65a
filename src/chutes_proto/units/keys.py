"""What units do with keys: carry out a change of generations, hand a passphrase out, remember it for the audit row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from chutes_proto.keys.vault import Address
from chutes_proto.store.rows import GenerationRow, Insert, UpdateGeneration, Vm

if TYPE_CHECKING:
    from chutes_proto.keys.generations import Change, Seal, Supply
    from chutes_proto.keys.vault import FreshKey, Vault
    from chutes_proto.secret import Secret
    from chutes_proto.store.run import Script


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

    def retire(self, change: Change) -> Script[None]:
        """Write the rows of ``change``, after which there is no active key."""
        yield from self._write(change)
        self._told.extend(f"{row.volume}/{row.generation} retired" for row in change.updated)

    def open(self, row: GenerationRow) -> Secret:
        """The passphrase of a row of this VM."""
        return self.vault.open(Address(self.vm, row.volume, row.generation), row)

    def _write(self, change: Change) -> Script[None]:
        for row in change.updated:
            yield from UpdateGeneration(row)
        if change.created is not None:
            yield from Insert(change.created)
