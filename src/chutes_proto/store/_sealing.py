"""The operations that seal a store, and replace the key of its MACs: an epoch begins, and ends the one before.

Guarantees:

* the fact ``seal`` says how far that is: twice the epoch of the key, and one more once all rows are sealed. Until then
  a row without a MAC, and a VM without a head, are accepted; both are written with every change;
* in a new epoch all is written under its key, the head of the store first. A row that is authentic under an older key
  gets a MAC of the new one, and its head the new tag in place of the old one: so what was a fault before stays one;
* when no row is left under the older key, it is deleted from the head and the keyring, and counts no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from attrs import frozen

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.secret import Secret
from chutes_proto.store import _guard_sql
from chutes_proto.store import rows as store
from chutes_proto.store._answers import key_text
from chutes_proto.store._audit_rows import fault_of, written
from chutes_proto.store._columns import Rows, Values, decode_rows, encode
from chutes_proto.store._custody import rows_key
from chutes_proto.store._guard import Guard, OfGuard
from chutes_proto.store._heads import ENTER, OF_STORE, PLACE_OF, RECENT_SECONDS, VM_OF, Head, generation_tags, in_head
from chutes_proto.store._macs import TAG_SIZE, UNSEALED, EpochKey, epoch_of
from chutes_proto.store._store_group import StoreGroup
from chutes_proto.store._vm_groups import WRITTEN, OfVms, boots_of, last_vm, next_heads, rows_of_vms
from chutes_proto.store.sql import statement

SEALED: Final = tuple(kind for kind in store.ROWS if kind not in UNSEALED and kind is not store.AuditRow)
"""The kinds of rows that have MACs, but for audit rows, whose MACs count until they are sequenced."""


@frozen
class ReadSeal(OfGuard[tuple[bool, bool]]):
    """Whether rows get MACs, and whether all have one."""

    def carry_out(self, guard: Guard) -> tuple[bool, bool]:
        of_store = guard.of_store
        return of_store.key is not None or of_store.is_locked, of_store.is_final


# --- sealing ---


@frozen
class BeginSeal(OfGuard[None]):
    """Write MACs and heads from now on, under the key ``random``, which ``row`` has wrapped."""

    row: store.KeyringRow
    random: Secret

    def carry_out(self, guard: Guard) -> None:
        _ = guard.run(None, _guard_sql.SET_SEAL, (2 * self.row.epoch,))
        guard.changed_state = True
        guard.of_store.key, guard.of_store.is_locked = EpochKey(self.row.epoch, self.random), False
        guard.perform(store.Insert(self.row))


@frozen
class AdoptRows(OfGuard[tuple[int, store.Row | None]]):
    """Give the next rows of a kind a MAC that have none; replies how many, and the row to go on after."""

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[int, store.Row | None]:
        key = _key_of(guard.of_store)
        rows = guard.run(None, *statement(store.ReadPage(self.kind, self.after, self.limit)))
        found = decode_rows(self.kind, rows)
        _ = guard.of_store.check(self.kind, rows)
        bare = [encode(row) for row, values in zip(found, rows, strict=True) if values[-1] is None]
        _set_macs(guard, self.kind, [(*each[: len(self.kind.KEY)], key.of_row(self.kind.TABLE, each)) for each in bare])
        return len(bare), found[-1] if len(found) == self.limit else None


@frozen
class AdoptVms(OfGuard[tuple[tuple[store.Vm, ...], store.Vm | None]]):
    """Give the next VMs heads that have none, from their rows as they are; replies which, and the VM to go on after."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[store.Vm, ...], store.Vm | None]:
        _ = _key_of(guard.of_store)
        stored = next_heads(guard.run, self.after, self.limit)
        bare = [(row[0], row[1]) for row in stored if guard.of_vms.opened((row[0], row[1]), row[2:]) is None]
        found: dict[type[store.Row], OfVms] = {}
        if bare:
            found = rows_of_vms(guard.run, self.after, last_vm(stored))
            newest = {(row[0], row[1]): row[2] for row in guard.run(None, *_guard_sql.newest_boots(bare))}
            found[store.BootRow] = boots_of(guard.run, {vm: at - RECENT_SECONDS for vm, at in newest.items()})
        for vm in bare:
            head = Head(0, {}, is_changed=True)
            _ = guard.of_vms.hold(vm, head)
            for kind in (store.VmRow, store.VolumeRow, store.BootRow):
                rows = found[kind].get(vm, ())
                for values, tag in zip(rows, _adopted(guard, kind, rows), strict=True):
                    ENTER[kind](head, tuple(values[:-1]), tag)
            rows = in_head(found[store.GenerationRow].get(vm, ()))
            tags = _adopted(guard, store.GenerationRow, rows)
            head.contents["generation"] = generation_tags(zip(rows, tags, strict=True))
        return tuple(store.Vm(*vm) for vm in bare), last_vm(stored) if len(stored) == self.limit else None


def _adopted(guard: Guard, kind: type[store.Row], rows: Rows) -> list[bytes]:
    """The tags of rows that have been given MACs."""
    tags = guard.of_store.check(kind, rows)
    if b"" in tags:
        raise RowNotAuthentic(kind.TABLE, key_text(kind, rows[tags.index(b"")]), "its MAC was removed meanwhile")
    return tags


@frozen
class AdoptAudit(OfGuard[tuple[int, int | None]]):
    """Give the next audit rows that are not sequenced a MAC of the newest epoch, if they have none or an older one.

    One that is not authentic is left as it is. Replies how many got one, and the last number.
    """

    after: int
    limit: int

    def carry_out(self, guard: Guard) -> tuple[int, int | None]:
        key = _key_of(guard.of_store)
        rows = guard.run(None, _guard_sql.READ_QUEUE, (self.after, self.limit))
        stale = [row for row in rows if epoch_of(row[-1]) != key.epoch and not fault_of(guard.of_store, row)]
        bare = [(row[0], key.of_row("audit", written(row[1:-1]))) for row in stale]
        for first in range(0, len(bare), WRITTEN):
            _ = guard.run(None, *_guard_sql.set_audit_macs(bare[first : first + WRITTEN]))
        return len(bare), rows[-1][0] if len(rows) == self.limit else None


@frozen
class EndSeal(OfGuard[None]):
    """Accept no row without a MAC from now on, and no VM without a head."""

    def carry_out(self, guard: Guard) -> None:
        of_store = guard.of_store
        of_store.begin()
        epoch = 0 if of_store.key is None else of_store.key.epoch
        _ = guard.run(None, _guard_sql.SET_SEAL, (2 * epoch + 1,))
        guard.changed_state = of_store.is_final = True


# --- a new epoch ---


@frozen
class ReadEpochs(OfGuard[tuple[int, ...]]):
    """The epochs of which MACs count, the newest first; none of a store that is not sealed."""

    def carry_out(self, guard: Guard) -> tuple[int, ...]:
        return guard.of_store.epochs


@frozen
class BeginEpoch(OfGuard[None]):
    """Write all MACs in the epoch of ``row`` from now on, under the key ``random``, which ``row`` has wrapped.

    Those of the present epoch count until `EndEpoch`. `ReadEpochs` came before in the unit, and replied that one alone.
    """

    row: store.KeyringRow
    random: Secret

    def carry_out(self, guard: Guard) -> None:
        _ = guard.run(None, _guard_sql.SET_SEAL, (2 * self.row.epoch + 1,))
        guard.changed_state = True
        guard.of_store.key = EpochKey(self.row.epoch, self.random)
        guard.perform(store.Insert(self.row))  # the head is written under the new key


@frozen
class RenewMacs(OfGuard[tuple[tuple[RowNotAuthentic, ...], store.Row | None]]):
    """Give the next rows of a kind a MAC of the newest epoch that have one of an older one.

    Replies those that are not authentic and were left as they are, and the row to go on after. A head that lists
    a row as it was lists it as it is now; a row that it does not list as it was stays a fault.
    """

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        kind, key = self.kind, guard.of_store.key
        if key is None:
            raise guard.of_store.locked()
        rows = guard.run(None, *statement(store.ReadPage(kind, self.after, self.limit)))
        found = decode_rows(kind, rows)
        stale = [row for row in rows if epoch_of(row[-1]) != key.epoch]
        if kind in ENTER:
            with suppress(RowNotAuthentic):  # it is read again, and named, with its rows
                guard.of_vms.fetch(VM_OF[kind](row) for row in stale)
        faults: list[RowNotAuthentic] = []
        macs: list[Values] = []
        for row in stale:
            try:
                (old,) = guard.of_store.check(kind, (row,))
                head = _head_of(guard, kind, row)
            except RowNotAuthentic as exc:
                faults.append(exc)
                continue
            values = encode(decode_rows(kind, (row,))[0])
            mac = key.of_row(kind.TABLE, values)
            macs.append((*values[: len(kind.KEY)], mac))
            if head is not None:
                place = PLACE_OF[kind](values)
                listed = head.of(kind.TABLE).get(place, b"")
                if old in listed:
                    head.of(kind.TABLE)[place] = listed.replace(old, mac[-TAG_SIZE:])
                    head.is_changed = True
        _set_macs(guard, kind, macs)
        return tuple(faults), found[-1] if len(found) == self.limit else None


def _head_of(guard: Guard, kind: type[store.Row], row: Sequence[Any]) -> Head | None:
    """The head that lists a row, if any does."""
    if kind in ENTER:
        return guard.of_vms.head(VM_OF[kind](row))
    return guard.of_store.head() if kind in OF_STORE else None


@frozen
class RenewHeads(OfGuard[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """Give the heads of the next VMs MACs of the newest epoch; replies as `RenewMacs` does."""

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        key = guard.of_store.key
        if key is None:
            raise guard.of_store.locked()
        stored = next_heads(guard.run, self.after, self.limit)
        faults: list[RowNotAuthentic] = []
        for hotkey, name, *head_stored in stored:
            if head_stored[-1] is not None and epoch_of(head_stored[-1]) == key.epoch:
                continue
            vm = (hotkey, name)
            try:
                head = guard.of_vms.opened(vm, head_stored)
            except RowNotAuthentic as exc:
                faults.append(exc)
                continue
            if head is not None:
                head.is_changed = True
                _ = guard.of_vms.hold(vm, head)
        return tuple(faults), last_vm(stored) if len(stored) == self.limit else None


@frozen
class EndEpoch(OfGuard[int]):
    """Let no MAC of an older epoch count from now on, and delete their keys; replies the epoch that counts."""

    def carry_out(self, guard: Guard) -> int:
        newest, *older = guard.of_store.epochs
        head = guard.of_store.head()
        for epoch in older:
            _ = guard.run(None, _guard_sql.DELETE_ROWS_KEY, (epoch,))
            if head is not None:
                del head.of("keyring")[rows_key(epoch)]
                head.is_changed = True
        return newest


# --- both ---


def _key_of(of_store: StoreGroup) -> EpochKey:
    if of_store.key is None:
        raise StoreError("the store has no key for its rows yet")
    return of_store.key


def _set_macs(guard: Guard, kind: type[store.Row], macs: list[Values]) -> None:
    """Give rows MACs; each is a row's key, and its MAC."""
    for first in range(0, len(macs), WRITTEN):
        _ = guard.run(None, *_guard_sql.set_macs(kind, macs[first : first + WRITTEN]))
