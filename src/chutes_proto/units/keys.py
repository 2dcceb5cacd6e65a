"""Changes of a VM's keys within a unit: write generations, open passphrases, collect the text for the audit row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from attrs import define, evolve, field

from chutes_proto.keys import generations
from chutes_proto.keys.generations import Change, HandOut, Seal, Supply
from chutes_proto.keys.vault import Address, FreshKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script


def by_volume(rows: Iterable[store.GenerationRow]) -> defaultdict[str, list[store.GenerationRow]]:
    """The generations of each volume; none for a volume that never had a key."""
    volumes: defaultdict[str, list[store.GenerationRow]] = defaultdict(list)
    for row in rows:
        volumes[row.volume].append(row)
    return volumes


def disk_of(known: Iterable[store.VolumeRow], vm: store.Vm, volume: str) -> store.VolumeRow:
    """The row of ``volume`` among those ``known`` of ``vm``; a disk that was never reported is not in use."""
    found = next((row for row in known if row.volume == volume), None)
    return found or store.VolumeRow(vm, volume, in_use=False, format_allowed=False)


@define
class VmKeys:
    """The keys of one VM in one run of one unit. ``origin`` is the boot, or the operator's command, that makes keys.

    A new or revived generation is written in the transaction that hands its passphrase out, never later: a passphrase
    that left without its row would lock the disk for ever.
    """

    vm: store.Vm
    vault: Vault
    now: int
    origin: str
    _changes: list[str] = field(factory=list[str], init=False)

    @property
    def changes(self) -> str:
        """The changes so far, for `AuditRow.keys`."""
        return ", ".join(self._changes)

    def sealer(self, volume: str, fresh: FreshKey) -> Seal:
        """Make the active row of a new generation of ``volume`` from ``fresh``; this unit's answer delivers it."""

        def seal(generation: int) -> store.GenerationRow:
            sealed = self.vault.seal(Address(self.vm, volume, generation), fresh)
            return store.GenerationRow(
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
        yield from self._write(supply)
        return (yield from self.deliver(supply.current, supply.word))

    def hand_out(self, pair: HandOut) -> Script[tuple[Secret | None, Secret]]:
        """Write the rows of ``pair`` and open the current passphrase, if there is one, and the next one."""
        yield from self._write(pair)
        if pair.created is not None and pair.created is not pair.next:
            self._changes.append(f"{pair.created.volume}/{pair.created.generation} candidate")
        current = None if pair.current is None else (yield from self.deliver(pair.current, "current"))
        return current, (yield from self.deliver(pair.next, "next"))

    def settle(self, volume: str, change: Change) -> Script[None]:
        """Write the rows of ``change``, after which there is an active key."""
        yield from self._write(change)
        self._changes.extend(f"{row.volume}/{row.generation} {row.state}" for row in change.updated)
        if not change.updated:
            self._changes.append(f"{volume} unchanged")

    def retire(self, change: Change) -> Script[None]:
        """Write the rows of ``change``, after which no key is active."""
        yield from self._write(change)
        self._changes.extend(f"{row.volume}/{row.generation} retired" for row in change.updated)

    def disown(self) -> Script[None]:
        """Retire all keys, forget the disks and void the tokens: the next owner of the name gets nothing of this one's.

        Nor does this one get anything of the next owner's.
        """
        for rows in by_volume((yield from store.ReadLiveGenerations(self.vm))).values():
            yield from self.retire(generations.disown(rows, self.now))
        for volume in (yield from store.ReadAll(store.VolumeRow, self.vm)):
            yield from store.Put(evolve(volume, in_use=False, format_allowed=False, handed=None))
        yield from store.VoidTokens(self.vm, self.now)

    def open(self, row: store.GenerationRow) -> Secret:
        """The passphrase of a row of this VM. Raises `KeyUnavailable` and `SealBroken`."""
        return self.vault.open(Address(self.vm, row.volume, row.generation), row)

    def deliver(self, row: store.GenerationRow, word: str) -> Script[Secret]:
        """Open the passphrase of ``row``, which leaves with this unit's answer; ``word`` says as what."""
        if row.delivered_at is None:
            yield from store.UpdateGeneration(evolve(row, delivered_at=self.now))
        self._changes.append(f"{row.volume}/{row.generation} {word}")
        return self.open(row)

    def _write(self, change: Change) -> Script[None]:
        # Updates come first: a volume has at most one active generation and one candidate at every moment.
        for row in change.updated:
            yield from store.UpdateGeneration(row)
        if change.created is not None:
            yield from store.Insert(change.created)


def report(
    known: Sequence[store.VolumeRow], vm: store.Vm, volumes: Iterable[str], formatted: Iterable[str]
) -> tuple[list[store.VolumeRow], tuple[str, ...]]:
    """The rows of the disks ``known`` that change, and which of ``volumes`` must not be formatted.

    ``formatted`` are those that are reported to have a LUKS header.
    """
    changed: list[store.VolumeRow] = []
    in_use: list[str] = []
    for volume in volumes:
        before = disk_of(known, vm, volume)
        reported = volume in formatted
        if reported or (before.in_use and not before.format_allowed):
            in_use.append(volume)
        # A permission to format holds for one answer, so it ends here, whether or not this answer used it.
        if before.format_allowed or (reported and not before.in_use):
            changed.append(evolve(before, in_use=before.in_use or reported, format_allowed=False))
    return changed, tuple(in_use)
