"""The guard of a store, below the units: it checks the rows that a unit reads, and authenticates what it writes.

* each row has a MAC (``_macs.py``), under a key that the head of the store lists (``_store_group.py``), and an answer
  has the rows that were asked for (``_answers.py``);
* the rows of a VM on which a release of keys depends are a *group*, and so are those of the store as a whole. Each
  group has a *head* (``_heads.py``), which lists its rows and has a version, which grows with each transaction that
  writes. A VM's rows are compared with its head (``_vm_groups.py``);
* an audit row has the version of the head that its transaction wrote. A group that went back as a whole contradicts
  the log, as soon as the log has a later entry. Its MAC counts until then (``_audit_rows.py``);
* the keys of an open store are in ``_custody.py``. ``_sealing.py`` has the operations that seal a new store and begin a
  new epoch, ``_inspection.py`` those that look for faults in a whole store.

This module says what each operation of a unit does to groups, and in which groups its rows are.

A fault is a `RowNotAuthentic`, ends the unit and concerns this VM alone; one of the store's group concerns all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any, ClassVar, Final, TypeVar

from attrs import evolve

from chutes_proto.errors import RowNotAuthentic, StoreError
from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as store
from chutes_proto.store._answers import check_asked, check_types
from chutes_proto.store._audit_rows import VM_VERSION, judged, written
from chutes_proto.store._columns import Rows, Values, columns, decode_rows, encode
from chutes_proto.store._custody import Session
from chutes_proto.store._heads import CREATED_AT, ENTER, OF_STORE, VM_OF
from chutes_proto.store._macs import TAG_SIZE
from chutes_proto.store._rows import StoreOp
from chutes_proto.store._sql import READS_ROWS, decode, kind_read, parts_read, statement
from chutes_proto.store._store_group import Run, StoreGroup
from chutes_proto.store._vm_groups import COMPARE, Remembered, VmGroups, boot_name, pair_of

T_co = TypeVar("T_co", covariant=True)

_HEADS_HELD: Final = 2000
"""How many heads one transaction has in memory before it writes them."""
_PAGE: Final = 1000

_SEALED: Final = tuple(columns(store.GenerationRow).index(name) for name in ("sealed", "wrapped_key"))


class OfGuard(StoreOp[T_co]):
    """An operation that the guard itself carries out."""

    __slots__ = ()
    MAY_TAKE_LONG: ClassVar[bool] = True

    def carry_out(self, guard: Guard) -> T_co:
        raise NotImplementedError


class Guard:
    """The guard of one run of one unit; `finish` writes the heads, after the script has ended.

    ``remembered`` are heads of VMs as a store knows them; see `VmGroups`.
    """

    def __init__(self, session: Session, run: Run, remembered: Remembered | None = None) -> None:
        self.run: Run = run
        self.of_store: StoreGroup = StoreGroup(session, run)
        self.of_vms: VmGroups = VmGroups(session, self.of_store, remembered)
        self.changed_state: bool = False
        """Whether the unit has changed the state of the seal."""

    def perform(self, op: StoreOp[Any]) -> Any:
        """Carry out an operation. Raises `RowNotAuthentic`."""
        of_store = self.of_store
        if of_store.key is None:
            if isinstance(op, OfGuard):
                return op.carry_out(self)
            if type(op) in _KEYED or type(op) in _CHANGES:
                _ = of_store.needed_key()
            rows = self.run(op, *statement(op, self.seal))
            for kind, some in parts_read(op, rows):
                check_types(kind, some)
            return decode(op, rows)
        if len(self.of_vms.heads) > _HEADS_HELD:
            self.finish()
            self.of_vms.heads.clear()
        way: _Way = _WAYS.get(type(op), Guard.carry_out)
        return way(self, op)

    def seal(self, kind: type[store.Row], values: Values) -> bytes:
        """The MAC of a row that is written, and its place in the head of its group."""
        key = self.of_store.needed_key()
        try:
            mac = key.of_row(kind.TABLE, written(values) if kind is store.AuditRow else values)
        except (OverflowError, UnicodeEncodeError) as exc:
            raise StoreError(f"a value of the table {kind.TABLE} cannot be stored: {type(exc).__name__}") from exc
        if kind in ENTER:
            self.of_vms.enter(kind, values, mac[-TAG_SIZE:])
        elif kind in OF_STORE:
            self.of_store.enter(kind, values, mac[-TAG_SIZE:])
        return mac

    def finish(self) -> None:
        """Write the heads that have changed."""
        self.of_vms.finish()
        self.of_store.finish()

    @property
    def versions(self) -> dict[tuple[str, str], int]:
        """The versions of the heads that were written, or only read, after `finish`."""
        return self.of_vms.versions | self.of_store.versions

    # --- ways of carrying out an operation ---

    def carry_out(self, op: StoreOp[Any]) -> Any:
        if isinstance(op, OfGuard):
            return op.carry_out(self)
        return self.write(op)

    def write(self, op: StoreOp[Any]) -> Any:
        return decode(op, self.run(op, *statement(op, self.seal)))

    def insert(self, op: store.Insert) -> None:
        if type(op.row) is store.AuditRow:
            text, values = statement(op)
            _ = self.run(op, text, self._audited(op.row, values))
        else:
            _ = self.run(op, *statement(op, self.seal))

    def _audited(self, row: store.AuditRow, values: Values) -> Values:
        """The values of an audit row with the version that the head of its VM will have, and its MAC."""
        head = None if row.vm is None else self.of_vms.heads.get((row.vm.hotkey, row.vm.name))
        of_unit = values[:-1]
        # A refusal alone changes nothing of the VM, and a stranger may cause it.
        if head is not None and (row.decision != "refused" or head.is_changed):
            head.is_changed = True
            of_unit = (*values[:VM_VERSION], head.version + 1, *values[VM_VERSION + 1 : -1])
        return (*of_unit, self.seal(store.AuditRow, of_unit))

    def change(self, op: StoreOp[Any]) -> Any:
        changed: StoreOp[Any] | tuple[RowNotAuthentic, ...] | None = _CHANGES[type(op)](self, op)
        return self.write(changed) if isinstance(changed, StoreOp) else changed

    def read_rows(self, op: StoreOp[Any]) -> Any:
        text, values = statement(op)
        rows, kind = self.run(op, text, values), kind_read(op)
        if kind is not None:
            tags = self.of_store.check(kind, rows)
            check_asked(op, kind, values, rows)
            belongs = _GROUPS.get((type(op), kind))
            if belongs is not None:
                rows = belongs(self, op, kind, rows, tags)
        return decode(op, rows)

    def read_fleet(self, op: store.ReadFleet) -> Any:
        rows = self.run(op, *statement(op))
        for kind, some in parts_read(op, rows):
            _ = self.of_store.check(kind, some)
        return decode(op, rows)

    def read_otherwise_sealed(self, op: store.ReadOtherwiseSealed) -> Any:
        """Read generations to be rewrapped: one that is not authentic does not open, and stops no other one."""
        rows = self.run(op, *statement(op))
        found: list[Sequence[Any]] = []
        with suppress(RowNotAuthentic):  # the head that is not is read again with its row
            self.of_vms.fetch((row[0], row[1]) for row in rows)
        for row in rows:
            try:
                self.of_vms.check_generation(row)
                found.append(row)
            except RowNotAuthentic:
                emptied = list(row)
                for at in _SEALED:
                    emptied[at] = None
                found.append(emptied)
        return decode(op, found)

    def read_audit(self, op: StoreOp[Any]) -> Any:
        return decode(op, judged(self.of_store, self.run(op, *statement(op))))

    def read_unsequenced(self, op: store.ReadUnsequenced) -> Any:
        """Read the rows that the log is about to know.

        A remembered head that is older than one of its VM's was set back before it was read; the next unit reads it
        again, and compares it with the log.
        """
        found: tuple[tuple[int, store.AuditRow], ...] = self.read_audit(op)
        remembered = self.of_vms.remembered
        for _, row in found:
            if remembered and row.vm is not None and row.vm_version is not None:
                vm = row.vm.hotkey, row.vm.name
                head = remembered.get(vm)
                if head is not None and row.vm_version > head[0]:
                    del remembered[vm]
        return found

    def read_facts(self, op: StoreOp[Any]) -> Any:
        rows = self.run(op, *statement(op))
        _FACT_READS[type(op)](self.of_store, rows)
        return decode(op, rows)

    # --- what operations do to groups ---

    def copied(self, op: store.InsertAll) -> store.InsertAll:
        kind = type(op.rows[0])
        if kind in ENTER:
            self.of_vms.fetch(VM_OF[kind](encode(row)) for row in op.rows)
        versions: dict[tuple[str, str], int] = {}
        for row in op.rows:
            if isinstance(row, store.AuditRow) and row.vm is not None and row.vm_version is not None:
                vm = (row.vm.hotkey, row.vm.name)
                versions[vm] = max(row.vm_version, versions.get(vm, 0))
        self.of_vms.fetch(versions)
        for vm, version in versions.items():
            head = self.of_vms.head(vm)
            if head.version < version:
                head.version, head.is_changed = version, True
        return op

    def rewrapped(self, op: store.RewrapGenerations) -> store.RewrapGenerations:
        self.of_vms.fetch((row.vm.hotkey, row.vm.name) for row in op.rows)
        return op

    def voided(self, op: store.VoidTokens) -> None:
        """Void all boots; one that is hidden meanwhile would have a live token when it is back."""
        vm = (op.vm.hotkey, op.vm.name)
        rows = self.run(None, _guard_sql.READ_UNVOIDED, vm)
        _ = self.of_store.check(store.BootRow, rows)
        rows = (*self.of_vms.listed_boots(vm), *rows)
        for row in {row.boot_id: row for row in decode_rows(store.BootRow, rows) if row.voided_at is None}.values():
            self.perform(store.Put(evolve(row, voided_at=op.at)))

    def doubted(self, _op: store.DoubtCandidates) -> tuple[RowNotAuthentic, ...]:
        """A candidate that is not authentic stops its own VM, and no other one."""
        faults: list[RowNotAuthentic] = []
        after: Sequence[Any] = ("", "", "")
        while rows := self.run(None, _guard_sql.READ_CANDIDATES, (*after, _PAGE)):
            after = rows[-1][:3]
            with suppress(RowNotAuthentic):  # the head that is not is read again with its row
                self.of_vms.fetch((row[0], row[1]) for row in rows)
            for row in rows:
                try:
                    self.of_vms.check_generation(row)
                    (known,) = decode_rows(store.GenerationRow, (row,))
                    self.perform(store.UpdateGeneration(evolve(known, provisional=True)))
                except RowNotAuthentic as exc:
                    faults.append(exc)
        return tuple(faults)

    def forgot(self, op: store.Forget) -> store.Forget:
        head = self.of_vms.head((op.vm.hotkey, op.vm.name))
        _ = head.contents.pop(op.kind.TABLE, None)
        head.is_changed = True
        return op

    def deleted(self, op: store.Delete) -> store.Delete:
        if op.kind is store.BootRow:
            for boot_id, *vm in self.run(None, _guard_sql.vms_of(len(op.keys)), op.keys):
                head = self.of_vms.head((vm[0], vm[1]))
                if head.of("boot").pop(boot_id, None) is not None:
                    head.is_changed = True
        return op

    def set_fact(self, op: Any) -> Any:
        self.of_store.note_fact(_FACT_WRITES[type(op)], op.at if isinstance(op, store.DecideLoss) else op.to)
        return op

    # --- rows of groups that operations read ---

    def part(self, op: Any, kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        """All rows of a kind that the head of a VM lists."""
        vm: store.Vm = getattr(op, _VMS[type(op)])
        COMPARE[kind](self.of_vms, (vm.hotkey, vm.name), rows, tags)
        return rows

    def boots(self, op: Any, _kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        """Boots that are as they were written last; the token of one that too many others have followed is not found.

        By its id such a boot is found, as its VM and platform never change: a server that was registered from it stays
        bound to these.
        """
        is_by_id = isinstance(op, store.Read) and not op.by
        is_newest = self.of_vms.is_newest
        return [row for row, tag in zip(rows, tags, strict=True) if is_newest(row, tag, is_by_id=is_by_id)]

    def last_boot(self, op: store.FindLastBoot, kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        """The newest boot; all those of the head are compared: where one was deleted, its token is not just unknown."""
        check_newest(self.of_vms.listed_boots((op.vm.hotkey, op.vm.name)), rows)
        return self.boots(op, kind, rows, tags)

    def last_boots(self, op: store.FindLastBoots, kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        """The newest boot of each VM, compared as that of one."""
        of_vm = {VM_OF[kind](row): row for row in rows}
        if len(of_vm) < len(rows):
            raise RowNotAuthentic("boot", boot_name(rows[0]), "more than one boot was given as the newest one of a VM")
        vms = [pair_of(vm) for vm in op.vms]
        for vm, listed in self.of_vms.listed_boots_of(vms).items():
            check_newest(listed, [of_vm[vm]] if vm in of_vm else ())
        return self.boots(op, kind, rows, tags)

    def boot_volumes(self, op: store.ReadBootVolumes, _kind: type[store.Row], rows: Rows, _tags: list[bytes]) -> Rows:
        given = self.of_vms.given.get(op.boot_id)
        if given is not None and given != len(rows):
            raise lacking(op.boot_id, given, len(rows))
        return rows

    def whole_table(self, op: Any, kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        self.of_store.compare_table(kind, rows, tags, with_undone=not isinstance(op, store.ReadRevoked))
        return rows

    def revocation(self, op: store.ReadRevocation, _kind: type[store.Row], rows: Rows, tags: list[bytes]) -> Rows:
        self.of_store.compare_revocation(f"{op.kind}/{op.subject}", rows, tags)
        return rows


def check_newest(listed: Rows, given: Rows) -> None:
    """Require that of the boots in the head of a VM none is newer than the given one. Raises `RowNotAuthentic`."""
    newest = max(listed, key=itemgetter(CREATED_AT), default=None)
    if newest is not None and not (given and given[0][CREATED_AT] >= newest[CREATED_AT]):
        raise RowNotAuthentic("boot", boot_name(newest), "it is the newest one, and was not given as such")


def lacking(boot_id: str, given: int, there: int) -> RowNotAuthentic:
    """The fault of a boot that was given another number of volumes than there are."""
    return RowNotAuthentic("boot_volume", boot_id, f"the boot was given {given} volumes, and {there} are there")


def statements_ahead(ops: Iterable[StoreOp[Any]], *, with_heads: bool) -> tuple[tuple[str, Values], ...]:
    """The statements of operations, and with them those of the guard that reads the heads of their VMs."""
    found: dict[tuple[str, Values], None] = {}
    for op in ops:
        vm = getattr(op, _VMS[type(op)]) if type(op) in _VMS else None
        if with_heads and isinstance(vm, store.Vm):
            found[_guard_sql.READ_HEAD, (vm.hotkey, vm.name) * 2] = None
        found[statement(op)] = None
    return tuple(found)


_VMS: Final[dict[type[StoreOp[Any]], str]] = {
    store.Read: "key",
    store.ReadAll: "owner",
    store.ReadLiveGenerations: "vm",
}
"""Where the operations that are compared with the head of a VM have it."""

_FACT_WRITES: Final[dict[type[StoreOp[Any]], str]] = {
    store.SetHorizon: "nonce_horizon",
    store.SetVersion: "revocations",
    store.DecideLoss: "loss_decided_at",
}

_FACT_READS: Final[dict[type[StoreOp[Any]], Callable[[StoreGroup, Rows], None]]] = {
    store.ReadTimes: StoreGroup.compare_times,
    store.ReadLossDecided: StoreGroup.compare_loss,
}

_CHANGES: Final[dict[type[StoreOp[Any]], Callable[[Guard, Any], Any]]] = {
    store.InsertAll: Guard.copied,
    store.RewrapGenerations: Guard.rewrapped,
    store.VoidTokens: Guard.voided,
    store.DoubtCandidates: Guard.doubted,
    store.Forget: Guard.forgot,
    store.Delete: Guard.deleted,
    **dict.fromkeys(_FACT_WRITES, Guard.set_fact),
}
"""Changes of groups before an operation, which is returned, or in place of it, and then its reply."""

_KEYED: Final = frozenset({store.Insert, store.ReadUnsequenced})
"""Operations that need the key of the store, beside changes: a row that is not checked gets no place."""

_OfGroup = Callable[[Guard, Any, type[store.Row], Rows, list[bytes]], Rows]

_GROUPS: Final[dict[tuple[type[StoreOp[Any]], type[store.Row]], _OfGroup]] = {
    (store.Read, store.VmRow): Guard.part,
    (store.Read, store.BootRow): Guard.boots,
    (store.FindLastBoot, store.BootRow): Guard.last_boot,
    (store.FindLastBoots, store.BootRow): Guard.last_boots,
    (store.FindLastBootFrom, store.BootRow): Guard.boots,
    (store.ReadAll, store.GenerationRow): Guard.part,
    (store.ReadLiveGenerations, store.GenerationRow): Guard.part,
    (store.ReadAll, store.VolumeRow): Guard.part,
    (store.ReadBootVolumes, store.BootVolumeRow): Guard.boot_volumes,
    (store.ReadRevoked, store.RevocationRow): Guard.whole_table,
    (store.Scan, store.RevocationRow): Guard.whole_table,
    (store.ReadRevocation, store.RevocationRow): Guard.revocation,
    (store.Scan, store.KeyringRow): Guard.whole_table,
}
"""The operations that read the whole of what a head lists, or one row that it must list."""

_Way = Callable[[Guard, Any], Any]

_WAYS: Final[dict[type[StoreOp[Any]], _Way]] = {
    **dict.fromkeys(READS_ROWS, Guard.read_rows),
    **dict.fromkeys(_CHANGES, Guard.change),
    **dict.fromkeys(_FACT_READS, Guard.read_facts),
    store.ReadFleet: Guard.read_fleet,
    store.ReadOtherwiseSealed: Guard.read_otherwise_sealed,
    store.ReadAudit: Guard.read_audit,
    store.ReadUnsequenced: Guard.read_unsequenced,
    store.Insert: Guard.insert,
    store.Put: Guard.write,
}
"""The ways in which operations are carried out in a store whose key is here."""
