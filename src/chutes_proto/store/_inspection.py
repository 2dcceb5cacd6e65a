"""The operations that look for faults in a whole store, a page at a time, and change nothing.

Each replies the faults that it found, and where to go on. A fault ends none of them: `store check` and the scrub name
every row that is not authentic, and every VM whose rows contradict its head.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import Final

from attrs import frozen

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as store
from chutes_proto.store._audit_rows import HOTKEY, VM, VM_VERSION, fault_of
from chutes_proto.store._columns import Rows, decode_rows
from chutes_proto.store._guard import Guard, OfGuard, lacking
from chutes_proto.store._heads import FACTS, Boots, Head, expect, in_head, name_of, numbers_of, of_number
from chutes_proto.store._sql import statement
from chutes_proto.store._vm_groups import COMPARE, boots_of, gone, last_vm, next_heads, pair_of, rows_of_vms

_MISSING: Final = 100
"""How many missing generations of a volume are named: a number that somebody has written may have any size."""
_ALWAYS: Final = -(2**63)


@frozen
class InspectRows(OfGuard[tuple[tuple[RowNotAuthentic, ...], store.Row | None]]):
    """The faults of the next rows of a kind, and the row to go on after."""

    kind: type[store.Row]
    after: store.Row | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Row | None]:
        rows = guard.run(None, *statement(store.ReadPage(self.kind, self.after, self.limit)))
        faults = _faults(guard, self.kind, rows)
        if self.kind is store.BootRow and rows:
            keys = tuple(row[0] for row in rows)
            for boot_id, given, there in guard.run(None, _guard_sql.count_given(len(keys)), keys):
                faults.append(lacking(boot_id, given, there))
        return tuple(faults), decode_rows(self.kind, rows[-1:])[0] if len(rows) == self.limit else None


def _faults(guard: Guard, kind: type[store.Row], rows: Rows) -> list[RowNotAuthentic]:
    try:
        _ = guard.of_store.check(kind, rows)
    except RowNotAuthentic as exc:
        if len(rows) == 1:
            return [exc]
        return [fault for row in rows for fault in _faults(guard, kind, (row,))] or [exc]
    return []


@frozen
class InspectAudit(OfGuard[tuple[tuple[RowNotAuthentic, ...], int | None]]):
    """The faults of the next audit rows that are not sequenced, by number, and the last number."""

    after: int
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], int | None]:
        rows = guard.run(None, _guard_sql.READ_QUEUE, (self.after, self.limit))
        whys = [(row, fault_of(guard.of_store, row)) for row in rows]
        faults = [RowNotAuthentic("audit", str(row[0]), why) for row, why in whys if why]
        faults += _set_back(guard, [row for row, why in whys if row[-1] is not None and not why])
        last = rows[-1][0] if len(rows) == self.limit else None
        if last is None:
            why = "it has a place that the log has not given yet"
            beyond = guard.run(None, _guard_sql.READ_BEYOND, ())
            faults += [RowNotAuthentic("audit", str(row[0]), why) for row in beyond]
        return tuple(faults), last


def _set_back(guard: Guard, waiting: Rows) -> list[RowNotAuthentic]:
    """The heads of VMs that are older than authentic audit rows say, which have no place in the log yet.

    No unit looks at these rows: they are what its neighbours add, so all would conflict with each other.
    """
    newest: dict[tuple[str, str], tuple[int, int]] = {}
    for number, *values in waiting:
        if (version := values[VM_VERSION]) is not None:
            vm = values[HOTKEY], values[VM]
            newest[vm] = max((version, number), newest.get(vm, (0, 0)))
    faults: list[RowNotAuthentic] = []
    for vm, (version, number) in newest.items():
        with suppress(RowNotAuthentic):  # one that is not authentic by itself is found with its VM
            head = guard.of_vms.head(vm)
            if head.version < version:
                why = f"it has version {head.version}, and audit row {number}, which waits for the log, has {version}"
                faults.append(RowNotAuthentic("head", name_of(vm), why))
    return faults


@frozen
class InspectVms(OfGuard[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """The faults of the groups of the next VMs of which there is any row, or a head; and the VM to go on after.

    There is one for each part of each group at most, and one for each generation that is missing.
    """

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        stored = next_heads(guard.run, self.after, self.limit)
        if not stored:
            return (), None
        faults: list[RowNotAuthentic] = []
        since: dict[tuple[str, str], int] = {}
        for hotkey, name, *head_stored in stored:
            vm = (hotkey, name)
            try:
                head = guard.of_vms.opened(vm, head_stored) or Head(0, {})
            except RowNotAuthentic as exc:
                faults.append(exc)
            else:
                guard.of_vms.hold(vm, head)
                boots = head.of("boot")
                since[vm] = Boots(boots).oldest() if boots else _ALWAYS
        found = rows_of_vms(guard.run, self.after, last_vm(stored))
        numbers = {vm: numbers_of(rows) for vm, rows in found[store.GenerationRow].items()}
        found[store.GenerationRow] = {vm: in_head(rows) for vm, rows in found[store.GenerationRow].items()}
        found[store.BootRow] = boots_of(guard.run, since)
        for vm in guard.of_vms.heads:
            for kind, compare in COMPARE.items():
                rows = found[kind].get(vm, ())
                try:
                    compare(guard.of_vms, vm, rows, guard.of_store.check(kind, rows))
                except RowNotAuthentic as exc:
                    faults.append(exc)
            for volume, there in numbers.get(vm, {}).items():
                missing = (number for number in range(1, max(there)) if number not in there)
                for number in islice(missing, _MISSING):
                    key = f"{name_of(vm)}/{volume}/{number}"
                    faults.append(RowNotAuthentic("generation", key, "it is missing: no generation is ever deleted"))
        return tuple(faults), last_vm(stored) if len(stored) == self.limit else None


@frozen
class InspectLogged(OfGuard[tuple[tuple[RowNotAuthentic, ...], store.Vm | None]]):
    """The next VMs of the log of which neither a row nor a head is left, as faults; and the VM to go on after.

    No unit deletes a head: that of a VM that was erased, or whose boots were purged, stays.
    """

    after: store.Vm | None
    limit: int

    def carry_out(self, guard: Guard) -> tuple[tuple[RowNotAuthentic, ...], store.Vm | None]:
        stored = guard.run(None, _guard_sql.NEXT_LOGGED, (*pair_of(self.after), self.limit))
        faults = [gone((hotkey, name), known) for hotkey, name, known, is_gone in stored if is_gone]
        return tuple(faults), last_vm(stored) if len(stored) == self.limit else None


@frozen
class InspectStore(OfGuard[tuple[RowNotAuthentic, ...]]):
    """The faults of the store's own group."""

    def carry_out(self, guard: Guard) -> tuple[RowNotAuthentic, ...]:
        faults: list[RowNotAuthentic] = []
        try:
            head = guard.of_store.head()
        except RowNotAuthentic as exc:
            return (exc,)
        facts = {name: of_number(value) for name, value in guard.run(None, _guard_sql.READ_FACTS, ())}
        for name in sorted(facts.keys() | head.of(FACTS).keys(), key=str):
            try:
                expect(FACTS, name, facts.get(name), head.of(FACTS).get(name))
            except RowNotAuthentic as exc:
                faults.append(exc)
        for op in (store.Scan(store.RevocationRow), store.Scan(store.KeyringRow)):
            try:
                guard.perform(op)
            except RowNotAuthentic as exc:
                faults.append(exc)
        return tuple(faults)
