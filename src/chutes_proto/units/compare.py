"""Comparing a store that came back from a backup with the newer store that it replaces, and taking keys from that.

Rules kept here:

* a key is the same where its sealed passphrase is, byte for byte: neither store needs to be opened with a KEK for that;
* only a volume whose keys in the older store are all in the newer one takes over the newer one's keys and their states.
  Where the older store has made another key of the same number since, nothing is overwritten, and the volume differs;
* a key goes to no other platform than the newer store would give it to: where the older one binds the VM to another,
  nothing is taken until an operator rebinds the VM;
* what is taken was opened before: a key under a KEK that the server lacks would only seem to be there.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from attrs import evolve, frozen

from chutes_proto.keys.generations import CALLER_VOLUME
from chutes_proto.keys.vault import Address, Vault
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.keys import by_volume

State: TypeAlias = Literal["missing", "differs", "elsewhere", "taken"]


@frozen
class Difference:
    """Keys of a volume that the older store lacks, by the numbers of their generations.

    ``differs``: it has another key of such a number, or one that the newer store does not have. ``elsewhere``: it binds
    the VM to a platform that the newer store does not bind it to.
    """

    vm: store.Vm
    volume: str
    generations: tuple[int, ...]
    state: State


@frozen
class Newer:
    """The newer store's rows of one VM: its keys, its disks, and its claim."""

    vm: store.Vm
    keys: tuple[store.GenerationRow, ...]
    volumes: tuple[store.VolumeRow, ...]
    claim: store.VmRow | None


@frozen
class Compare(Unit[tuple[int, tuple[Difference, ...]]]):
    """Compare the keys of one VM; returns how many both stores have, and the volumes of which one is missing."""

    newer: Newer

    def script(self) -> Script[tuple[int, tuple[Difference, ...]]]:
        held = by_volume((yield from store.ReadAll(store.GenerationRow, self.newer.vm)))
        claim, newest = (yield from store.Read(store.VmRow, self.newer.vm)), self.newer.claim
        is_elsewhere = claim is not None and (newest is None or newest.pin != claim.pin)
        both = 0
        found: list[Difference] = []
        for volume, rows in by_volume(self.newer.keys).items():
            old = {row.generation: row for row in held[volume]}
            new = {row.generation: row for row in rows}
            both += sum(number in new and _is_same(row, new[number]) for number, row in old.items())
            if difference := _difference(self.newer.vm, volume, old, new):
                is_refused = is_elsewhere and difference.state == "missing"
                found.append(evolve(difference, state="elsewhere") if is_refused else difference)
        return both, tuple(found)


@frozen
class Take(Unit[tuple[Difference, ...]]):
    """Take the missing keys of some VMs, with an audit row for each VM; returns what was taken, and what differs.

    The states of a volume's keys become the newer store's, and it counts as in use if it does there. A VM without a
    claim gets the newer store's, and a claim forgets nothing that the newer one says of the VM. Raises `KeyUnavailable`
    and `SealBroken` for a key that does not open, and then nothing is taken.
    """

    now: int
    newer: tuple[Newer, ...]
    vault: Vault
    reason: str

    def script(self) -> Script[tuple[Difference, ...]]:
        done: list[Difference] = []
        for newer in self.newer:
            _, found = yield from Compare(newer).script()
            taken: list[str] = []
            for difference in found:
                if difference.state == "missing":
                    yield from self._take(newer, difference)
                    taken += [f"{difference.volume}/{number} taken" for number in difference.generations]
                    difference = evolve(difference, state="taken")
                done.append(difference)
            if taken:
                if newer.claim is not None:
                    held = yield from store.Read(store.VmRow, newer.vm)
                    yield from store.Put(_claim(held, newer.claim))
                told = store.AuditRow(self.now, "operator", "keys taken", "done", self.reason, newer.vm)
                yield from store.Insert(evolve(told, keys=", ".join(taken)))
        return tuple(done)

    def _take(self, newer: Newer, difference: Difference) -> Script[None]:
        rows = [row for row in newer.keys if row.volume == difference.volume]
        held = {row.generation: row for row in by_volume((yield from self._held(newer)))[difference.volume]}
        for row in sorted(rows, key=lambda row: row.state in ("active", "candidate")):  # one active key at every moment
            if row.sealed is None:  # the older store keeps its own, if it was not purged there too
                if row.generation not in held:
                    yield from store.Insert(row)  # numbers have no gaps
                elif held[row.generation].sealed is not None:
                    yield from _update(held[row.generation], evolve(row, state="retired"))
                continue
            _ = self.vault.open(Address(row.vm, row.volume, row.generation), row)
            if row.generation not in held:
                yield from store.Insert(row)
            elif held[row.generation].sealed is not None:
                yield from _update(held[row.generation], row)
        for disk in newer.volumes:
            if disk.volume == difference.volume:
                yield from store.Put(evolve(disk, handed=None))

    def _held(self, newer: Newer) -> Script[tuple[store.GenerationRow, ...]]:
        return (yield from store.ReadAll(store.GenerationRow, newer.vm))


def _update(held: store.GenerationRow, newer: store.GenerationRow) -> store.UpdateGeneration:
    """Give a row the newer one's state; its passphrase stays sealed as it is."""
    return store.UpdateGeneration(
        evolve(newer, sealed=held.sealed, kek_id=held.kek_id, wrapped_key=held.wrapped_key, created_at=held.created_at)
    )


def _claim(held: store.VmRow | None, newest: store.VmRow) -> store.VmRow:
    """The claim on the same platform that keeps what either store knows: that it is proven, and how the VM boots."""
    if held is None:
        return evolve(newest, attested=None, booted=None)
    return evolve(
        held,
        proven=held.proven or newest.proven,
        exchange="base" if held.exchange == newest.exchange == "base" else "two-phase",
        nonce_at=max((at for at in (held.nonce_at, newest.nonce_at) if at is not None), default=None),
    )


def _may_be_needed(row: store.GenerationRow) -> bool:
    """Whether a disk may have the key: it was not purged, and if it is a candidate, somebody was handed it."""
    return row.sealed is not None and (row.state != "candidate" or row.delivered_at is not None)


def _is_same(one: store.GenerationRow, other: store.GenerationRow) -> bool:
    """Whether both are the same key, as far as neither was purged."""
    if one.sealed is None or other.sealed is None:
        return (one.created_at, one.origin) == (other.created_at, other.origin)
    return one.sealed == other.sealed


def _difference(
    vm: store.Vm, volume: str, old: dict[int, store.GenerationRow], new: dict[int, store.GenerationRow]
) -> Difference | None:
    if volume == CALLER_VOLUME:  # each boot makes a new one, and no disk has it
        return None
    missing = [number for number, row in new.items() if number not in old and _may_be_needed(row)]
    others = [number for number, row in old.items() if number not in new or not _is_same(row, new[number])]
    if not missing and all(number not in new for number in others):
        return None
    lacking = [*missing, *(number for number in others if number in new)]
    return Difference(vm, volume, tuple(sorted(lacking)), "differs" if others else "missing")
