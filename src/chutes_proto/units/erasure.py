"""Decommissioning: all keys of a VM are destroyed at once, its name is forgotten, and a restored store does it again.

Rules kept here:

* unlike a purge, an erasure keeps nothing: active keys, candidates and the newest generations go as well, so the VM's
  disks can never be opened again with what this store has;
* the rows stay in state ``purged``, so a later VM of the name gets other numbers; the claim goes, and with it its place
  among the names of its platform;
* what was erased is recorded as numbers of generations, and when. Where a backup brings these back, the same are erased
  again; keys that were made later, for another VM of the name, are not touched, even if they have the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from attrs import frozen

from chutes_proto.errors import Refused
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.revocations import subject_of
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code


@frozen
class Erased:
    """The keys and the quotes that an erasure destroys, the claim that it frees, and its record, if it was carried out.

    The quotes are of granted boots of the VM, and of refused ones that named it.
    """

    keys: tuple[store.GenerationRow, ...]
    evidence: tuple[store.EvidenceRow, ...] = ()
    claim: store.VmRow | None = None
    record: store.ErasureRow | None = None


@frozen
class EraseVm(Unit[Erased]):
    """Destroy every key of a VM for ever, void its tokens, and forget its claim and its disks.

    Without ``carry_out`` nothing is changed, and neither is it for a VM that was erased and has nothing since: so the
    command can be run again where it could not remove all copies. ``erasure_id`` and ``version`` (62 bits) are random.
    Raises `Refused` for another VM that has neither keys nor a claim.
    """

    now: int
    erasure_id: str
    version: int
    vm: store.Vm
    reason: str
    carry_out: bool = False

    def script(self) -> Script[Erased]:
        """Read, erase, record."""
        rows = yield from store.ReadAll(store.GenerationRow, self.vm)
        keys = tuple(row for row in rows if row.sealed is not None)
        claim = yield from store.Read(store.VmRow, self.vm)
        if not keys and claim is None:
            if any(record.vm == self.vm for record in (yield from store.Scan(store.ErasureRow))):
                return Erased(())
            raise Refused(Code.KEY_NOT_FOUND, f"{subject_of(self.vm)} has no keys and is bound to no platform")
        evidence = yield from store.ReadAll(store.EvidenceRow, self.vm)
        if not self.carry_out:
            return Erased(keys, evidence, claim)
        through = {row.volume: row.generation for row in rows}  # by volume and number
        text = json.encode(through).decode()
        erased_at = max([self.now, *(row.created_at for row in keys)])  # clocks differ by seconds
        record = store.ErasureRow(self.erasure_id, self.vm, erased_at, text)
        yield from store.Insert(record)
        yield from _erase(self.now, self.version, record, keys, evidence, "vm erased", self.reason)
        yield from _forget(self.vm)
        return Erased(keys, evidence, claim, record)


@frozen
class RepeatErasure(Unit[int | None]):
    """Do an erasure again that the store has lost, as after a restore; returns how many keys it destroyed.

    None if the store knows it and has none of the keys. That it knows it is not enough: who writes the database can
    put the record, which is authentic, into a store that was restored from before.
    """

    now: int
    version: int
    record: store.ErasureRow

    def script(self) -> Script[int | None]:
        """Look, and erase up to the recorded numbers."""
        record = self.record
        is_known = (yield from store.Read(store.ErasureRow, record.erasure_id)) is not None
        through = through_of(record)
        rows = yield from store.ReadAll(store.GenerationRow, record.vm)
        old = [
            row for row in rows if row.generation <= through.get(row.volume, 0) and row.created_at <= record.erased_at
        ]
        keys = [row for row in old if row.sealed is not None]
        if is_known and not keys:
            return None
        reason = f"erased at {rfc3339(record.erased_at)}; repeated, because the store had lost that"
        kept = yield from store.ReadAll(store.EvidenceRow, record.vm)
        evidence = [row for row in kept if row.received_at <= record.erased_at]
        if not is_known:
            yield from store.Insert(record)
        yield from _erase(self.now, self.version, record, keys, evidence, "vm erased again", reason)
        claim = yield from store.Read(store.VmRow, record.vm)
        if claim is not None and claim.created_at <= record.erased_at and len(old) == len(rows):
            yield from _forget(record.vm)
        return len(keys)


def through_of(record: store.ErasureRow) -> dict[str, int]:
    """The newest generation that was erased, by volume. Raises `ValueError` for another form."""
    through: Any = json.decode(record.through.encode())
    if type(through) is not dict or not all(type(number) is int for number in cast("Any", through).values()):
        raise ValueError("through: must be a JSON object of numbers")
    return cast("dict[str, int]", through)


def _erase(
    now: int,
    version: int,
    record: store.ErasureRow,
    keys: Sequence[store.GenerationRow],
    evidence: Sequence[store.EvidenceRow],
    event: str,
    reason: str,
) -> Script[None]:
    for row in keys:
        yield from store.EraseGeneration(row)
    if evidence:
        yield from store.Delete(store.EvidenceRow, tuple(row.evidence_id for row in evidence))
    yield from store.VoidTokens(record.vm, now)
    yield from store.SetVersion(version)
    erased = ", ".join(f"{row.volume}/{row.generation} erased" for row in keys)
    yield from store.Insert(store.AuditRow(now, "operator", event, "done", reason, record.vm, keys=erased))


def _forget(vm: store.Vm) -> Script[None]:
    yield from store.Forget(store.VmRow, vm)
    yield from store.Forget(store.VolumeRow, vm)
