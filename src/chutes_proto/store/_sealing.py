"""The operations that seal a new store, and replace the key of its MACs: an epoch begins, and ends the one before.

Guarantees:

* a store is sealed before it has a row: the fact ``seal`` is the epoch of the key, and 0 until then;
* in a new epoch all is written under its key, the head of the store first. A row that is authentic under an older key
  gets a MAC of the new one, and its head the new tag in place of the old one: so what was a fault before stays one;
* when no row is left under the older key, it is deleted from the head and the keyring, and counts no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from attrs import frozen

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.secret import Secret
from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as store
from chutes_proto.store._audit_rows import fault_of, written
from chutes_proto.store._columns import Values, decode_rows, encode
from chutes_proto.store._custody import rows_key
from chutes_proto.store._guard import Guard, OfGuard
from chutes_proto.store._heads import ENTER, OF_STORE, PLACE_OF, VM_OF, Head
from chutes_proto.store._macs import TAG_SIZE, UNSEALED, EpochKey, epoch_of
from chutes_proto.store._sql import statement
from chutes_proto.store._vm_groups import WRITTEN, last_vm, next_heads

SEALED: Final = tuple(kind for kind in store.ROWS if kind not in UNSEALED and kind is not store.AuditRow)
"""The kinds of rows that have MACs, but for audit rows, whose MACs count until they are sequenced."""


@frozen
class ReadSeal(OfGuard[bool]):
    """Whether the store is sealed."""

    def carry_out(self, guard: Guard) -> bool:
        return guard.of_store.epoch > 0


@frozen
class BeginSeal(OfGuard[None]):
    """Seal a store without rows under the key ``random``, which ``row`` has wrapped."""

    row: store.KeyringRow
    random: Secret

    def carry_out(self, guard: Guard) -> None:
        _ = guard.run(None, _guard_sql.SET_SEAL, (self.row.epoch,))
        guard.changed_state = True
        guard.of_store.key = EpochKey(self.row.epoch, self.random)
        guard.of_store.begin()
        guard.perform(store.Insert(self.row))


# --- a new epoch ---


@frozen
class ReadEpochs(OfGuard[tuple[int, ...]]):
    """The epochs of which MACs count, the newest first."""

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
        _ = guard.run(None, _guard_sql.SET_SEAL, (self.row.epoch,))
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
        kind, key = self.kind, guard.of_store.needed_key()
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
        key = guard.of_store.needed_key()
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
                guard.of_vms.hold(vm, head)
        return tuple(faults), last_vm(stored) if len(stored) == self.limit else None


@frozen
class RenewAudit(OfGuard[tuple[int, int | None]]):
    """Give the next audit rows that are not sequenced a MAC of the newest epoch, if they have one of an older one.

    One that is not authentic is left as it is. Replies how many got one, and the last number.
    """

    after: int
    limit: int

    def carry_out(self, guard: Guard) -> tuple[int, int | None]:
        key = guard.of_store.needed_key()
        rows = guard.run(None, _guard_sql.READ_QUEUE, (self.after, self.limit))
        stale = [row for row in rows if epoch_of(row[-1]) != key.epoch and not fault_of(guard.of_store, row)]
        bare = [(row[0], key.of_row("audit", written(row[1:-1]))) for row in stale]
        for first in range(0, len(bare), WRITTEN):
            _ = guard.run(None, *_guard_sql.set_audit_macs(bare[first : first + WRITTEN]))
        return len(bare), rows[-1][0] if len(rows) == self.limit else None


@frozen
class EndEpoch(OfGuard[int]):
    """Let no MAC of an older epoch count from now on, and delete their keys; replies the epoch that counts."""

    def carry_out(self, guard: Guard) -> int:
        newest, *older = guard.of_store.epochs
        head = guard.of_store.head()
        for epoch in older:
            _ = guard.run(None, _guard_sql.DELETE_ROWS_KEY, (epoch,))
            del head.of("keyring")[rows_key(epoch)]
            head.is_changed = True
        return newest


def _set_macs(guard: Guard, kind: type[store.Row], macs: list[Values]) -> None:
    """Give rows MACs; each is a row's key, and its MAC."""
    for first in range(0, len(macs), WRITTEN):
        _ = guard.run(None, *_guard_sql.set_macs(kind, macs[first : first + WRITTEN]))
