"""The groups of VMs in one transaction: their heads, and complete reads of their rows compared with these.

Guarantees:

* a head has a MAC; it is not older than the newest version that the log has for the VM, nor than one that this process
  has seen; and it is there if either knows the VM. So a VM that went back as a whole is noticed;
* what is read of a VM as a whole (claim, live generations, volumes) has exactly the rows that the head lists;
* a boot that is found is the one that was written last, and if the token of one that is listed may be alive, it is
  found only as it is listed;
* a head that has changed is written at the end of the unit, with the next version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.store import _guard_sql
from chutes_proto.store import _rows as store
from chutes_proto.store._answers import key_text
from chutes_proto.store._columns import Rows, Values, columns
from chutes_proto.store._custody import REMEMBERED, Session
from chutes_proto.store._heads import (
    CREATED_AT,
    ENTER,
    LIVE,
    VM_OF,
    Boots,
    Head,
    expect,
    expect_all,
    generation_tags,
    is_live,
    name_of,
    of_number,
)
from chutes_proto.store._macs import TAG_SIZE, is_same
from chutes_proto.store._store_group import Run, StoreGroup

Remembered: TypeAlias = dict[tuple[str, str], tuple[int, bytes]]
"""The heads of VMs as they are stored: version and contents, which take less memory than a `Head`."""

WRITTEN: Final = 100
"""How many heads or MACs a statement writes."""
_HEAD_WIDTH: Final = 5
"""How many values a head has as a row."""

_GIVEN: Final = columns(store.BootRow).index("given")


class VmGroups:
    """The groups of VMs in the transaction of ``session``; ``of_store`` has its keys.

    ``remembered`` are heads that nobody else has changed since, as a store knows them. One that is used is taken out,
    and is remembered again only if the unit ends well.
    """

    def __init__(self, session: Session, of_store: StoreGroup, remembered: Remembered | None = None) -> None:
        self._of_store = of_store
        self._seen, self._began_at = session.seen, session.began_at
        self.remembered: Remembered = {} if remembered is None else remembered
        self.heads: dict[tuple[str, str], Head] = {}
        """The heads in use, by VM."""
        self.given: dict[str, int] = {}
        """The number of volumes that each boot was given, of those that were read."""

    # --- heads ---

    def head(self, vm: tuple[str, str]) -> Head:
        """The head of a VM's group, a new one for a VM without rows."""
        heads = self.heads
        if vm in heads:
            return heads[vm]
        known = self.remembered.pop(vm, None)
        if known is None:
            (stored,) = self._of_store.run(None, _guard_sql.READ_HEAD, (*vm, *vm))
            found = self.opened(vm, stored) or Head(0, {})
        else:
            found = Head.of_stored(*known)
        heads[vm] = found
        return found

    def fetch(self, vms: Iterable[tuple[str, str]]) -> None:
        """Read the heads of VMs at once that are about to be asked for one by one."""
        unread = sorted({*vms} - self.heads.keys(), key=str)
        for hotkey, name, *stored in self._of_store.run(None, *_guard_sql.read_heads(unread)) if unread else ():
            vm = (hotkey, name)
            self.hold(vm, self.opened(vm, stored) or Head(0, {}))

    def hold(self, vm: tuple[str, str], head: Head) -> None:
        """Take a head for that of the VM from now on."""
        _ = self.remembered.pop(vm, None)
        self.heads[vm] = head

    def opened(self, vm: tuple[str, str], stored: Sequence[Any]) -> Head | None:
        """A VM's head as it is stored, after the version that the log knows; None where there is neither.

        Raises `RowNotAuthentic`.
        """
        known, version, contents, mac = stored
        least = 0 if self._seen is None else self._seen.least(vm, self._began_at)
        if version is None:
            if known is not None:
                raise gone(vm, known)
            if least:
                raise RowNotAuthentic("head", name_of(vm), f"it is missing, and version {least} was seen")
            return None
        is_right = is_same(mac, self._of_store.needed_key().mac("head", *vm, version, contents))
        if not is_right and (older := self._of_store.older_key(mac)) is not None:
            is_right = is_same(mac, older.mac("head", *vm, version, contents))
        if not is_right:
            raise RowNotAuthentic("head", name_of(vm), "its MAC is not that of its columns and place")
        if known is not None and not (type(known) is int and known <= version):
            raise RowNotAuthentic("head", name_of(vm), f"it has version {version}, and the log has version {known}")
        if version < least:
            raise RowNotAuthentic("head", name_of(vm), f"it has version {version}, and version {least} was seen")
        return Head.of_stored(version, contents)

    def enter(self, kind: type[store.Row], values: Values, tag: bytes) -> None:
        """Enter a row that is the newest of its key, and that a head lists, into that head."""
        head = self.head(VM_OF[kind](values))
        ENTER[kind](head, values, tag)
        head.is_changed = True

    def finish(self) -> None:
        """Write the heads that have changed."""
        values: list[Any] = []
        for vm, head in self.heads.items():
            if head.is_changed:
                head.advance()
                key = self._of_store.needed_key()
                values += (*vm, head.version, head.stored, key.mac("head", *vm, head.version, head.stored))
        for first in range(0, len(values), WRITTEN * _HEAD_WIDTH):
            some = values[first : first + WRITTEN * _HEAD_WIDTH]
            _ = self._of_store.run(None, _guard_sql.put_heads(len(some) // _HEAD_WIDTH), tuple(some))

    def remember(self) -> None:
        """Remember the heads that were written, or only read, after `finish`: the unit is not undone by itself."""
        for vm, head in self.heads.items():
            if head.version:
                self.remembered[vm] = head.version, head.stored
        while len(self.remembered) > REMEMBERED:  # the one that was used the longest ago
            del self.remembered[next(iter(self.remembered))]

    @property
    def versions(self) -> dict[tuple[str, str], int]:
        """The versions of the heads that were written, or only read, after `finish`."""
        return {vm: head.version for vm, head in self.heads.items() if head.version}

    # --- complete reads ---

    def compare_claim(self, vm: tuple[str, str], _rows: Rows, tags: list[bytes]) -> None:
        """Compare the claim on a VM's name, or none."""
        expect("vm", name_of(vm), tags[0] if tags else None, self.head(vm).of("vm").get(""))

    def compare_generations(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        """Compare all generations that the head lists; settled ones may have been read besides."""
        listed = self.head(vm).of("generation")
        found = {f"{row[2]}/{row[3]}": tag for row, tag in zip(rows, tags, strict=True)}
        if found != {key: entry[:TAG_SIZE] for key, entry in listed.items()}:  # a settled one may be read besides
            expect_all("generation", generation_tags(zip(rows, tags, strict=True)), listed, vm)

    def compare_volumes(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        """Compare all volumes."""
        found = {values[2]: tag for values, tag in zip(rows, tags, strict=True)}
        expect_all("volume", found, self.head(vm).of("volume"), vm)

    def compare_boots(self, vm: tuple[str, str], rows: Rows, tags: list[bytes]) -> None:
        """Compare all boots since the oldest one in the head; where it has none, these are all that are stored."""
        boots = Boots(self.head(vm).of("boot"))
        found: dict[str, bytes] = {}
        for row, tag in zip(rows, tags, strict=True):
            if row[0] in boots.entries or not boots.is_full:
                found[row[0]] = of_number(row[CREATED_AT]) + tag
        expect_all("boot", found, boots.entries, vm)

    def listed_boots(self, vm: tuple[str, str]) -> Rows:
        """The boots since the oldest one in the head of their VM, after all were compared with it."""
        if not (entries := self.head(vm).of("boot")):
            return ()
        stored = self._of_store.run(None, _guard_sql.READ_BOOTS_SINCE, (*vm, Boots(entries).oldest()))
        self.compare_boots(vm, stored, self._of_store.check(store.BootRow, stored))
        return stored

    def listed_boots_of(self, vms: Iterable[tuple[str, str]]) -> OfVms:
        """The same for several VMs at once; those whose head lists no boot are left out."""
        vms = tuple(vms)
        self.fetch(vms)
        since = {vm: Boots(entries).oldest() for vm in vms if (entries := self.head(vm).of("boot"))}
        stored = boots_of(self._of_store.run, since)
        for vm in since:
            rows = stored.get(vm, ())
            self.compare_boots(vm, rows, self._of_store.check(store.BootRow, rows))
        return stored

    # --- single rows ---

    def is_newest(self, row: Sequence[Any], tag: bytes, *, is_by_id: bool) -> bool:
        """Whether a boot is as it was written last; False for one that too many others have followed.

        One that was asked for by its id is so, too, if its head no longer lists it. Raises `RowNotAuthentic`.
        """
        head = self.head(VM_OF[store.BootRow](row))
        self.given[row[0]] = row[_GIVEN]
        boots, created_at = Boots(head.of("boot")), row[CREATED_AT]
        entry = boots.entries.get(row[0])
        if entry is None:
            if is_by_id or boots.is_expired(created_at):
                return True
            if boots.is_full:
                return False
        expect("boot", boot_name(row), of_number(created_at) + tag, entry)
        return True

    def check_generation(self, row: Sequence[Any]) -> None:
        """Check a generation that is read without the others of its VM, and is about to be written.

        Its head lists it as it is, or, as a settled one, not at all: otherwise the row that is written would be listed
        in place of the newest one. Raises `RowNotAuthentic`.
        """
        (tag,) = self._of_store.check(store.GenerationRow, (row,))
        live = is_live(row)
        listed = self.head((row[0], row[1])).of("generation").get(f"{row[2]}/{row[3]}")
        if live or listed is not None:
            expect("generation", key_text(store.GenerationRow, row), tag + LIVE[live], listed)


def boot_name(row: Sequence[Any]) -> str:
    """A boot, as faults of its group name it."""
    return f"{name_of(VM_OF[store.BootRow](row))}/{row[0]}"


def gone(vm: tuple[str, str], known: object) -> RowNotAuthentic:
    """The fault of a VM of which no head is left, and the log has this version."""
    return RowNotAuthentic("head", name_of(vm), f"it is missing, and the log has version {known}")


COMPARE: Final[dict[type[store.Row], Callable[[VmGroups, tuple[str, str], Rows, list[bytes]], None]]] = {
    store.VmRow: VmGroups.compare_claim,
    store.GenerationRow: VmGroups.compare_generations,
    store.VolumeRow: VmGroups.compare_volumes,
    store.BootRow: VmGroups.compare_boots,
}
"""The comparison of each part of a VM's group with its head."""


# --- many VMs at once ---

OfVms: TypeAlias = dict[tuple[str, str], Rows]
"""The stored rows of one kind of each VM that has any."""


def pair_of(vm: store.Vm | None) -> tuple[str, str]:
    """A VM's columns; those of None come before any."""
    return ("", "") if vm is None else (vm.hotkey, vm.name)


def last_vm(rows: Rows) -> store.Vm:
    """The VM of the last of rows that begin with one."""
    return store.Vm(rows[-1][0], rows[-1][1])


def next_heads(run: Run, after: store.Vm | None, limit: int) -> Rows:
    """The next VMs with any row or a head, each with what `VmGroups.opened` takes."""
    return run(None, *_guard_sql.next_heads(pair_of(after), limit))


def rows_of_vms(run: Run, after: store.Vm | None, last: store.Vm) -> dict[type[store.Row], OfVms]:
    """The claims, volumes and generations of the VMs after ``after`` until ``last``."""
    return {
        kind: _grouped(kind, run(None, _guard_sql.READ_OF_VMS[kind], (*pair_of(after), *pair_of(last))))
        for kind in (store.VmRow, store.VolumeRow, store.GenerationRow)
    }


def boots_of(run: Run, since: dict[tuple[str, str], int]) -> OfVms:
    """The boots of each VM from a time on."""
    return _grouped(store.BootRow, run(None, *_guard_sql.boots_since(since)) if since else ())


def _grouped(kind: type[store.Row], rows: Rows) -> OfVms:
    found: dict[tuple[str, str], list[Sequence[Any]]] = {}
    for row in rows:
        found.setdefault(VM_OF[kind](row), []).append(row)
    return dict(found)
