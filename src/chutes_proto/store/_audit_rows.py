"""Audit rows that wait for their place in the log: each has a MAC over all that its unit wrote, until it has its place.

One that is not authentic does not end the unit that reads it, as the log would stop: it gets a negative index, which
says so. Once it has its place, the tree of the log has what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from chutes_proto.store import _rows as store
from chutes_proto.store._columns import Rows, columns
from chutes_proto.store._macs import is_same
from chutes_proto.store._store_group import StoreGroup

VM_VERSION: Final = columns(store.AuditRow).index("vm_version")
HOTKEY: Final = columns(store.AuditRow).index("hotkey")
VM: Final = columns(store.AuditRow).index("vm")
_IDX: Final = columns(store.AuditRow).index("idx")
_SALT: Final = columns(store.AuditRow).index("salt")
_WRITTEN_WIDTH: Final = len(columns(store.AuditRow)) - 2


def written(values: Sequence[Any]) -> Sequence[Any]:
    """The columns of an audit row that its unit wrote: all but those that the sequencer writes."""
    return (*values[:_IDX], *values[_SALT + 1 :])


def judged(group: StoreGroup, rows: Rows) -> Rows:
    """Audit rows, each after its number: with a negative index if one is not sequenced and not authentic."""
    if group.key is not None:
        macs = group.key.of_table("audit", _WRITTEN_WIDTH)
        waiting = [(*row[1 : 1 + _IDX], *row[2 + _SALT :]) for row in rows if row[1 + _IDX] is None]
        if None in macs.tags(waiting, ()):
            rows = [_judged_alone(group, row) for row in rows]
    return rows


def _judged_alone(group: StoreGroup, row: Sequence[Any]) -> Sequence[Any]:
    if row[1 + _IDX] is not None or not fault_of(group, row):
        return row
    return (*row[: 1 + _IDX], -1, *row[2 + _IDX :])


def fault_of(group: StoreGroup, row: Sequence[Any]) -> str:
    """Why an audit row after its number, which has no place yet, is not authentic; or an empty text."""
    mac = row[-1]
    if mac is None:
        return "it has no MAC"
    of_unit = written(row[1:-1])
    is_right = is_same(mac, group.needed_key().of_row("audit", of_unit))
    if not is_right and (older := group.older_key(mac)) is not None:
        is_right = is_same(mac, older.of_row("audit", of_unit))
    return "" if is_right else "its MAC is not that of its columns"
