"""The statements of the guard itself, for rows and heads that no operation reads or writes.

They are written as those of operations are; see ``_sql.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

from chutes_proto.store import _rows as store
from chutes_proto.store._columns import Values
from chutes_proto.store._sql import NAMED_VERSION, chained, logged_version, select, stored_columns

READ_HEAD: Final = (
    f"SELECT known.version, head.version, contents, mac FROM (SELECT {logged_version('?', '?')} AS version) AS known"  # noqa: S608
    " LEFT JOIN head ON head.hotkey = ? AND head.vm = ?"
)
"""The statement that reads the newest version of a VM's head that the log knows, and the head; NULLs without one."""
READ_UNVOIDED: Final = select(store.BootRow, "WHERE voided_at IS NULL AND hotkey = ? AND vm = ? ORDER BY created_at")
READ_BOOTS_SINCE: Final = select(store.BootRow, "WHERE hotkey = ? AND vm = ? AND created_at >= ? ORDER BY created_at")
READ_CANDIDATES: Final = select(
    store.GenerationRow,
    "WHERE state = 'candidate' AND NOT provisional AND (hotkey, vm, volume) > (?, ?, ?)"
    " ORDER BY hotkey, vm, volume LIMIT ?",
)
"""The statement that reads the next candidates that are not in doubt; a volume has one at most."""


def read_heads(vms: Sequence[tuple[str, str]]) -> tuple[str, Values]:
    """The statement that reads what `READ_HEAD` does, after the VM, of each of these VMs."""
    return (
        f"SELECT column1, column2, {NAMED_VERSION}, head.version, contents, mac"  # noqa: S608
        f" FROM (VALUES {', '.join(['(?, ?)'] * len(vms))}) AS of"
        " LEFT JOIN head ON head.hotkey = CAST(column1 AS TEXT) AND head.vm = CAST(column2 AS TEXT)"
    ), chained(vms)


_OF_VM: Final = ("vm", "generation", "volume", "boot")


def _has_row(hotkey: str, vm: str) -> str:
    return " OR ".join(
        f"EXISTS (SELECT 1 FROM {of} WHERE {of}.hotkey = {hotkey} AND {of}.vm = {vm})"  # noqa: S608 - names of ours
        for of in _OF_VM
    )


_NEXT_VMS: Final = (
    "SELECT hotkey, vm FROM ("  # noqa: S608
    + " UNION ".join(
        # Each table is read for one page alone, and not to its end for every page.
        f"SELECT * FROM (SELECT DISTINCT hotkey, vm FROM {table} WHERE (hotkey, vm) > (?, ?)"  # noqa: S608
        f" ORDER BY hotkey, vm LIMIT ?) AS next_of_{table}"
        for table in (*_OF_VM, "head")
    )
    + ") AS every_vm ORDER BY hotkey, vm LIMIT ?"
)
NEXT_HEADS: Final = (
    f"SELECT page.hotkey, page.vm, {logged_version('page.hotkey', 'page.vm')}, head.version, contents, mac"  # noqa: S608
    f" FROM ({_NEXT_VMS}) AS page LEFT JOIN head ON head.hotkey = page.hotkey AND head.vm = page.vm"
    " ORDER BY page.hotkey, page.vm"
)
"""The statement of `next_heads`."""
READ_OF_VMS: Final = {
    kind: select(kind, "WHERE (hotkey, vm) > (?, ?) AND (hotkey, vm) <= (?, ?)")
    for kind in (store.VmRow, store.VolumeRow, store.GenerationRow)
}
"""The statements that read the rows of the VMs after one until another one."""


@cache
def put_heads(count: int) -> str:
    """The statement that writes the heads of so many VMs."""
    return (
        f"INSERT INTO head (hotkey, vm, version, contents, mac) VALUES {', '.join(['(?, ?, ?, ?, ?)'] * count)}"  # noqa: S608
        " ON CONFLICT (hotkey, vm)"
        " DO UPDATE SET version = excluded.version, contents = excluded.contents, mac = excluded.mac"
    )


def next_heads(after: tuple[str, str], limit: int) -> tuple[str, Values]:
    """The statement that reads what `READ_HEAD` does, after the VM, of the next VMs with any row or a head."""
    return NEXT_HEADS, (*after, limit) * (len(_OF_VM) + 1) + (limit,)


NEXT_LOGGED: Final = (
    f"SELECT page.hotkey, page.vm, {logged_version('page.hotkey', 'page.vm')},"  # noqa: S608
    f" head.vm IS NULL AND NOT ({_has_row('page.hotkey', 'page.vm')})"
    " FROM (SELECT DISTINCT hotkey, vm FROM audit WHERE (hotkey, vm) > (?, ?) AND idx >= 0 AND vm_version IS NOT NULL"
    " ORDER BY hotkey, vm LIMIT ?) AS page"
    " LEFT JOIN head ON head.hotkey = page.hotkey AND head.vm = page.vm ORDER BY page.hotkey, page.vm"
)
"""The statement that reads the next VMs of the log, the newest version of each, and whether it has no row and no head.

It takes the VM after which to begin, and the most VMs to read.
"""


def boots_since(since: Mapping[tuple[str, str], int]) -> tuple[str, Values]:
    """The statement that reads the boots of each VM from a time on, the oldest first."""
    named = ", ".join(f"boot.{name}" for name in stored_columns(store.BootRow))
    text = (
        f"SELECT {named} FROM (VALUES {', '.join(['(?, ?, ?)'] * len(since))}) AS of"  # noqa: S608
        " JOIN boot ON boot.hotkey = CAST(of.column1 AS TEXT) AND boot.vm = CAST(of.column2 AS TEXT)"
        " AND boot.created_at >= CAST(of.column3 AS BIGINT) ORDER BY boot.created_at"
    )
    return text, chained((*vm, at) for vm, at in since.items())


def set_macs(kind: type[store.Row], rows: Sequence[Values]) -> tuple[str, Values]:
    """The statement that gives rows MACs; each is a row's key, and its MAC."""
    types = ["BIGINT" if isinstance(value, int) else "TEXT" for value in rows[0][:-1]]
    key = (f"{name} = CAST(fresh.column{at} AS {types[at - 1]})" for at, name in enumerate(kind.KEY, 1))
    marks = f"({', '.join('?' * len(rows[0]))})"
    text = (
        f"UPDATE {kind.TABLE} SET mac = fresh.column{len(rows[0])}"  # noqa: S608
        f" FROM (VALUES {', '.join([marks] * len(rows))}) AS fresh WHERE {' AND '.join(key)}"
    )
    return text, chained(rows)


READ_QUEUE: Final = select(store.AuditRow, "WHERE idx IS NULL AND id > ? ORDER BY id LIMIT ?", "id")
"""The statement that reads the next audit rows that are not sequenced, each after its number."""
READ_BEYOND: Final = (
    "SELECT id FROM audit WHERE idx >= coalesce((SELECT size FROM log_state WHERE log = 'audit'), 0)"
    " ORDER BY idx LIMIT 1000"
)
"""The statement that reads the numbers of audit rows that claim a place which the log has not given yet."""


def set_audit_macs(rows: Sequence[Values]) -> tuple[str, Values]:
    """The statement that gives audit rows MACs; each is a row's number, and its MAC."""
    text = (
        "UPDATE audit SET mac = fresh.column2"  # noqa: S608
        f" FROM (VALUES {', '.join(['(?, ?)'] * len(rows))}) AS fresh"
        " WHERE id = CAST(fresh.column1 AS BIGINT)"
    )
    return text, chained(rows)


def vms_of(count: int) -> str:
    """The statement that reads the VMs of boots."""
    return f"SELECT boot_id, hotkey, vm FROM boot WHERE boot_id IN ({', '.join('?' * count)})"  # noqa: S608


def count_given(count: int) -> str:
    """The statement that reads those of some boots which were given another number of volumes than there are."""
    return (
        "SELECT boot_id, given, there FROM (SELECT boot_id, given,"  # noqa: S608
        " (SELECT count(*) FROM boot_volume WHERE boot_volume.boot_id = boot.boot_id) AS there"
        f" FROM boot WHERE boot_id IN ({', '.join('?' * count)})) AS counted WHERE given <> there"
    )


READ_STORE_HEAD: Final = "SELECT version, contents, mac FROM store_head WHERE name = 'store'"
PUT_STORE_HEAD: Final = (
    "INSERT INTO store_head (name, version, contents, mac) VALUES ('store', ?, ?, ?) ON CONFLICT (name)"
    " DO UPDATE SET version = excluded.version, contents = excluded.contents, mac = excluded.mac"
)
READ_FACTS: Final = "SELECT name, value FROM fact WHERE name NOT IN ('schema_version', 'seal')"
"""The facts that the head of the store's own group has; ``seal`` is known from the keyring and the mark."""
SET_SEAL: Final = "UPDATE fact SET value = ? WHERE name = 'seal'"
DELETE_ROWS_KEY: Final = "DELETE FROM keyring WHERE kind = 'rows' AND epoch = ?"
