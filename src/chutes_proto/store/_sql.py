"""The rows as SQL text: one set of statements for two dialects, without a connection.

The schema is in ``_schema.py``, rows become values and values rows in ``_columns.py``, and the guard has statements of
its own in ``_guard_sql.py``.

Rules kept here:

* an operation is one entry of `_QUERIES`: its statement with parameters, and a function from the result to the reply;
* every value is a parameter, written as its path in the operation (``:vm.name``) and made a ``?``; `for_driver` turns
  that into the driver's mark, and no statement has a ``:``, ``?`` or ``$`` for anything else;
* ``{clock}`` in a statement is the time by the database's own clock, NULL in a dialect without one; ``{lock}`` locks
  the rows that it reads, or leaves them out if another transaction has, in a dialect with several writers;
* table and column names come from the row classes alone;
* the rows of most tables have a MAC, as their last column, which no row class has: a `Seal` makes it, and the store
  checks it before the rows are decoded (``_store_group.py``);
* collations of TEXT differ, so whole results are sorted here, and only a page, which goes on where the one before
  ended, has the order of the database.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import attrs
from attrs import frozen

from chutes_proto.store import _rows as store
from chutes_proto.store._columns import PARTS, Rows, Values, columns, decode_rows, encode, mistyped
from chutes_proto.store._macs import UNSEALED
from chutes_proto.store._schema import (
    READ_VERSION,
    SCHEMA_VERSION,
    TABLES,
    Dialect,
    LostFactError,
    schema,
)

__all__ = ["READ_VERSION", "SCHEMA_VERSION", "TABLES", "Dialect", "LostFactError", "Rows"]
__all__ += ["Values", "columns", "decode", "decode_rows", "encode", "for_driver"]
__all__ += ["is_read", "returns_rows", "schema", "statement"]

Seal: TypeAlias = Callable[[type[store.Row], Values], bytes | None]
"""Makes the MAC of a row from its kind and values, or none."""

_LOCK: Final[dict[Dialect, str]] = {"sqlite": "", "postgresql": " FOR UPDATE SKIP LOCKED"}
_CLOCK: Final[dict[Dialect, str]] = {"sqlite": "NULL", "postgresql": "CAST(floor(extract(epoch FROM now())) AS BIGINT)"}


def for_driver(statement: str, dialect: Dialect) -> str:
    """``statement`` with the parameter marks of the dialect's driver, and what its database says in its own way."""
    statement = statement.replace("{lock}", _LOCK[dialect]).replace("{clock}", _CLOCK[dialect])
    if dialect == "sqlite":
        return statement
    first, *parts = statement.split("?")
    return first + "".join(f"${number}{part}" for number, part in enumerate(parts, 1))


# --- statements ---

_PATH: Final = r":([a-z_.]+)"
_THE_VM: Final = "hotkey = :vm.hotkey AND vm = :vm.name"
_BOUND: Final = "platform_kind = :pin.kind AND platform_id = :pin.value"
_REFUSED: Final = "code IS NOT NULL AND created_at >= :since"
_LIVE: Final = (
    "state IN ('active', 'candidate') OR provisional OR retirement = 'prune' OR (volume, generation) IN"  # noqa: S608
    f" (SELECT volume, max(generation) FROM generation WHERE {_THE_VM} GROUP BY volume)"
)
_GIVEN: Final = (
    "(volume, generation) IN (SELECT volume, current_generation FROM boot_volume WHERE boot_id = :boot_id)"
    " OR (volume, generation) IN (SELECT volume, next_generation FROM boot_volume WHERE boot_id = :boot_id)"
)
_NEWEST: Final = "ORDER BY created_at DESC LIMIT 1"


def stored_columns(kind: type[store.Row]) -> tuple[str, ...]:
    """The columns of a table: those of its row, and the MAC."""
    return columns(kind) if kind in UNSEALED else (*columns(kind), "mac")


def _sealed(row: store.Row, seal: Seal) -> Values:
    kind, values = type(row), encode(row)
    return values if kind in UNSEALED else (*values, seal(kind, values))


def select(kind: type[store.Row], rest: str, *others: str) -> str:
    return f"SELECT {', '.join((*others, *stored_columns(kind)))} FROM {kind.TABLE} {rest}"  # noqa: S608 - names of ours


def _insert(kind: type[store.Row]) -> str:
    names = stored_columns(kind)
    return f"INSERT INTO {kind.TABLE} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608


_FIXED: Final[Mapping[type[store.Row], tuple[str, ...]]] = {
    store.BootRow: ("hotkey", "vm", "token_digest", "peer_address", "created_at")
}
"""Columns that never change after the row is inserted: SQLite would write their indexes with each change again."""


def _put(kind: type[store.Row]) -> str:
    fixed = (*kind.KEY, *_FIXED.get(kind, ()))
    changes = ", ".join(f"{name} = excluded.{name}" for name in stored_columns(kind) if name not in fixed)
    return f"{_insert(kind)} ON CONFLICT ({', '.join(kind.KEY)}) DO UPDATE SET {changes}"


def _insert_all(op: store.InsertAll | store.InsertBootVolumes, seal: Seal) -> tuple[str, Values]:
    kind: type[store.Row] = type(op.rows[0])
    text = _insert(kind) + f", ({', '.join('?' * len(stored_columns(kind)))})" * (len(op.rows) - 1)
    return text, chained(_sealed(row, seal) for row in op.rows)


def _claim(kind: type[store.Row]) -> str:
    return f"{_insert(kind)} ON CONFLICT DO NOTHING RETURNING {kind.KEY[0]}"


@cache
def _read(kind: type[store.Row], columns: tuple[str, ...]) -> str:
    return select(kind, f"WHERE {' AND '.join(f'{name} = ?' for name in columns)}")


def _values(key: str | bytes | store.Vm) -> Values:
    return PARTS[store.Vm](key) if isinstance(key, store.Vm) else (key,)


_SCANS: Final = {kind: select(kind, "" if kind.KEY else "ORDER BY id") for kind in store.ROWS}


# --- replies ---


def _nothing(_: Rows) -> None:
    return None


def _times(rows: Rows) -> store.Times:
    if not rows:
        raise LostFactError
    horizon, clock, version, *_ = rows[0]
    return store.Times(horizon, clock, version or 0)


def _first(kind: type[store.Row], rows: Rows) -> Any:
    return decode_rows(kind, rows)[0] if rows else None


def _sorted(kind: type[store.Row], rows: Rows) -> tuple[Any, ...]:
    return decode_rows(kind, sorted(rows, key=itemgetter(slice(len(kind.KEY)))))


def _vms(rows: Rows) -> tuple[store.Vm, ...]:
    """The VMs that have these names. SQLite takes a value of another type in any column, and no VM has such a name."""
    return tuple([store.Vm(hotkey, name) for hotkey, name in rows if type(hotkey) is type(name) is str])


def _names(rows: Rows) -> tuple[store.Vm, ...]:
    return tuple(sorted(_vms(rows)))


_AUDIT_IDX: Final = columns(store.AuditRow).index("idx")


def _numbered(rows: Rows) -> tuple[tuple[int, store.AuditRow], ...]:
    """Audit rows with their numbers. SQLite takes a value of another type in any column: such a row is forged."""
    read: list[Values] = []
    for row in rows:
        values: Values = tuple(row[1:])
        if wrong := mistyped(store.AuditRow, values):
            values = tuple(wrong.get(at, value) for at, value in enumerate(values))
            values = (*values[:_AUDIT_IDX], -1, *values[_AUDIT_IDX + 1 :])
        read.append(values)
    return tuple(zip([row[0] for row in rows], decode_rows(store.AuditRow, read), strict=True))


# --- operations ---


@frozen
class _Query:
    """An operation in SQL: its statement and parameters, and its reply, from the rows that the statement returned."""

    ask: Callable[[Any], tuple[str, Values]]
    reply: Callable[[Any, Rows], Any]


@frozen
class _Write:
    """An operation that writes rows which may have a MAC, likewise."""

    ask: Callable[[Any, Seal], tuple[str, Values]]
    reply: Callable[[Any, Rows], Any]


def _getter(paths: Sequence[str]) -> Callable[[Any], Values]:
    """Gets what is at these paths of an operation: a tuple, also of one or none."""
    if len(paths) > 1:
        return attrgetter(*paths)
    one = [attrgetter(path) for path in paths]
    return lambda op: tuple([value(op) for value in one])


def _typed(kind: type[Any], values: Sequence[Any]) -> Any:
    """An object of a table without MACs, with an empty value in place of each that is of another type."""
    pairs: Any = zip(values, attrs.fields(kind), strict=True)
    return kind(*(value if type(value) is field.type else field.type() for value, field in pairs))


def _query(text: str, reply: Callable[[Rows], Any] = _nothing) -> _Query:
    marked = re.sub(_PATH, "?", text)
    values = _getter(re.findall(_PATH, text))
    return _Query(lambda op: (marked, values(op)), lambda _, rows: reply(rows))


def _either(holds: Callable[[Any], bool], yes: _Query, no: _Query) -> _Query:
    return _Query(lambda op: (yes if holds(op) else no).ask(op), yes.reply)


def _write(
    text: Callable[[type[store.Row]], str], kinds: Sequence[type[store.Row]], reply: Callable[[Rows], Any]
) -> _Write:
    """The query that writes the operation's whole row."""
    texts = {kind: text(kind) for kind in kinds}
    return _Write(lambda op, seal: (texts[type(op.row)], _sealed(op.row, seal)), lambda _, rows: reply(rows))


def _one(kind: type[store.Row], where: str) -> _Query:
    return _query(select(kind, f"WHERE {where}"), partial(_first, kind))


def _all(kind: type[store.Row], where: str) -> _Query:
    return _query(select(kind, f"WHERE {where}"), partial(_sorted, kind))


def _count(kind: type[store.Row], where: str) -> _Query:
    return _query(f"SELECT count(*) FROM {kind.TABLE} WHERE {where}", lambda rows: rows[0][0])  # noqa: S608


def _page(kind: type[store.Row], order: tuple[str, ...], where: str, *, is_first: bool) -> str:
    """The statement of one page: the values of the last row before it come after those of ``where``, then a limit."""
    beyond = "" if is_first else f" AND ({', '.join(order)}) > ({', '.join('?' * len(order))})"
    return select(kind, f"WHERE {where}{beyond} ORDER BY {', '.join(order)} LIMIT ?")


def _read_page(op: store.ReadPage[Any]) -> tuple[str, Values]:
    kind: type[store.Row] = op.kind
    after = () if op.after is None else encode(op.after)[: len(kind.KEY)]
    return _page(kind, kind.KEY, "TRUE", is_first=op.after is None), (*after, op.limit)


_UNNEEDED: Final[dict[type[store.Row], str]] = {
    store.BootRow: "EXISTS (SELECT 1 FROM boot AS newer WHERE newer.hotkey = boot.hotkey AND newer.vm = boot.vm"
    " AND newer.created_at > boot.created_at)"
    " AND NOT EXISTS (SELECT 1 FROM server WHERE server.boot_id = boot.boot_id)"
    " AND NOT EXISTS (SELECT 1 FROM vm WHERE vm.hotkey = boot.hotkey AND vm.vm = boot.vm"
    " AND (vm.attested = boot.boot_id OR vm.booted = boot.boot_id))",
    store.AttestationRow: "NOT EXISTS (SELECT 1 FROM boot WHERE boot.boot_id = attestation_id)"
    " AND NOT EXISTS (SELECT 1 FROM server WHERE server.attested = attestation_id)",
}


def _read_old(op: store.ReadOld[Any]) -> tuple[str, Values]:
    kind: type[store.Row] = op.kind
    order = ("created_at", *kind.KEY)
    after = () if op.after is None else (op.after.created_at, *encode(op.after)[: len(kind.KEY)])
    text = _page(kind, order, f"created_at < ? AND {_UNNEEDED[kind]}", is_first=op.after is None)
    return text, (op.before, *after, op.limit)


_WANTED: Final = {
    "since": "at >= :wanted.since",
    "until": "at < :wanted.until",
    "hotkey": "hotkey = :wanted.hotkey",
    "name": "vm = :wanted.name",
    "event": "event = :wanted.event",
    "request_id": "request_id = :wanted.request_id",
    "refused": "decision = 'refused'",
}


@cache
def _audit(wanted: tuple[str, ...], *, backwards: bool, through: bool) -> _Query:
    sign, other, order = ("<", ">", " DESC") if backwards else (">", "<", "")
    within = (
        f"id {sign} :beyond",
        *((f"id {other}= :through",) if through else ()),
        *(_WANTED[name] for name in wanted),
    )
    return _query(
        select(store.AuditRow, f"WHERE {' AND '.join(within)} ORDER BY id{order} LIMIT :limit", "id"), _numbered
    )


def _read_audit(op: store.ReadAudit) -> tuple[str, Values]:
    given = attrs.asdict(op.wanted, recurse=False, filter=lambda field, value: value != field.default)
    return _audit(tuple(given), backwards=op.backwards, through=op.through is not None).ask(op)


def _next_vms(where: str) -> _Query:
    """The next VMs that have such a key."""
    # A page without a VM is the last one, so SQLite passes over values of another type, as `_vms` does.
    named = "hotkey || '' = hotkey AND vm || '' = vm"
    text = f"SELECT DISTINCT hotkey, vm FROM generation WHERE {named} AND {where}"  # noqa: S608
    end = "ORDER BY hotkey, vm LIMIT :limit"

    return _either(
        lambda op: op.after is None,
        _query(f"{text} {end}", _vms),
        _query(f"{text} AND (hotkey, vm) > (:after.hotkey, :after.name) {end}", _vms),
    )


_FLEET: Final[dict[str, type[store.Row]]] = {
    "page": store.VmRow,
    "boot": store.BootRow,
    "attestation": store.AttestationRow,
}
"""The rows that are joined for a VM of the fleet, whole, as each has its MAC."""
_FLEET_COLUMNS: Final = tuple(f"{table}.{name}" for table, kind in _FLEET.items() for name in stored_columns(kind))
_SHOWN: Final = ("page.hotkey", "page.vm", "page.last_boot_at", "boot.profile_name", "boot.profile_version")
_of_fleet: Final = itemgetter(*map(_FLEET_COLUMNS.index, (*_SHOWN, "attestation.tcb_status", "attestation.advisories")))


def _fleet_parts(rows: Rows) -> list[tuple[type[store.Row], Rows]]:
    first, split = 0, list[tuple[type[store.Row], Rows]]()
    for kind in _FLEET.values():
        last = first + len(stored_columns(kind))
        parts = [tuple(row[first:last]) for row in rows]
        # Boots of one second have the same VM, and come after each other.
        found = [part for part, before in zip(parts, [None, *parts], strict=False) if part != before]
        split.append((kind, [part for part in found if part.count(None) < len(part)]))
        first = last
    return split


def _read_fleet(op: store.ReadFleet) -> tuple[str, Values]:
    after = () if op.after is None else _values(op.after)
    page = _page(store.VmRow, store.VmRow.KEY, "TRUE", is_first=op.after is None)
    return (
        f"SELECT {', '.join(_FLEET_COLUMNS)} FROM ({page}) AS page"  # noqa: S608
        " LEFT JOIN boot ON boot.hotkey = page.hotkey AND boot.vm = page.vm AND boot.created_at = page.last_boot_at"
        " LEFT JOIN attestation ON attestation_id = boot_id ORDER BY page.hotkey, page.vm"
    ), (*after, op.limit)


def _fleet(rows: Rows) -> tuple[store.FleetVm, ...]:
    """One for each VM; boots of one second may be several."""
    found = {(hotkey, vm): store.FleetVm(store.Vm(hotkey, vm), *rest) for hotkey, vm, *rest in map(_of_fleet, rows)}
    return tuple(found.values())


_KEY: Final = store.GenerationRow.KEY


def _read_otherwise_sealed(op: store.ReadOtherwiseSealed) -> tuple[str, Values]:
    after = () if op.after is None else encode(op.after)[: len(_KEY)]
    text = _page(store.GenerationRow, _KEY, "kek_id IS NOT NULL AND kek_id <> ?", is_first=op.after is None)
    return text, (op.kek_id, *after, op.limit)


def _rewrap_many(count: int, *, is_sealed: bool) -> str:
    # With a cast, SQLite does not think of an index on the values and a scan of the table.
    types = ("TEXT", "TEXT", "TEXT", "BIGINT")
    key = (f"{name} = CAST(fresh.column{number} AS {types[number - 1]})" for number, name in enumerate(_KEY, 1))
    return (
        "UPDATE generation SET kek_id = fresh.column5, wrapped_key = fresh.column6"  # noqa: S608
        f"{', mac = fresh.column7' if is_sealed else ''}"
        f" FROM (VALUES {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * count)}) AS fresh"
        f" WHERE {' AND '.join(key)} AND sealed IS NOT NULL"
    )


def _rewrap(op: store.RewrapGenerations, seal: Seal) -> tuple[str, Values]:
    macs = [_sealed(row, seal)[-1] for row in op.rows]
    rows = (
        (*encode(row)[: len(_KEY)], row.kek_id, row.wrapped_key, mac) for row, mac in zip(op.rows, macs, strict=True)
    )
    # NULLs alone have no type that PostgreSQL could know.
    return _rewrap_many(len(op.rows), is_sealed=macs[0] is not None), chained(rows)


def _sequence(op: store.Sequence) -> tuple[str, Values]:
    text = (
        "UPDATE audit SET idx = CAST(fresh.column2 AS BIGINT), salt = fresh.column3"  # noqa: S608 - no names
        f" FROM (VALUES {', '.join(['(?, ?, ?)'] * len(op.rows))}) AS fresh"
        # The sign keeps SQLite from scanning all rows without an index for each of these.
        " WHERE id = CAST(fresh.column1 AS BIGINT) AND +idx IS NULL RETURNING id"
    )
    return text, chained(op.rows)


def _set_apart(op: store.SetApart) -> tuple[str, Values]:
    # Below all that were set apart before. An attacker can leave no lower index: then this fails, and the log stops.
    text = (
        "UPDATE audit SET idx = (SELECT coalesce(min(idx), 0) FROM audit WHERE idx < 0) - CAST(fresh.column2 AS BIGINT)"  # noqa: S608
        f" FROM (VALUES {', '.join(['(?, ?)'] * len(op.numbers))}) AS fresh WHERE id = CAST(fresh.column1 AS BIGINT)"
    )
    return text, chained((number, at) for at, number in enumerate(op.numbers, 1))


def logged_version(hotkey: str, vm: str) -> str:
    """The newest version of a VM's head that the log knows, or NULL, from one row of the index ``audit_version``.

    ``max`` reads all rows of the VM where PostgreSQL takes them for few: each boot reads more than the one before, and
    conflicts with all others as soon as PostgreSQL notes a read of the whole table in place of so many rows.
    """
    return (
        f"(SELECT vm_version FROM audit WHERE audit.hotkey = {hotkey} AND audit.vm = {vm}"  # noqa: S608 - no names
        " AND idx >= 0 AND vm_version IS NOT NULL ORDER BY vm_version DESC LIMIT 1)"
    )


NAMED_VERSION: Final = logged_version("CAST(column1 AS TEXT)", "CAST(column2 AS TEXT)")


def _read_vm_versions(op: store.ReadVmVersions) -> tuple[str, Values]:
    named = ", ".join(["(?, ?)"] * len(op.vms))
    text = f"SELECT column1, column2, {NAMED_VERSION} FROM (VALUES {named}) AS named"  # noqa: S608 - no names
    return text, chained(map(_values, op.vms))


_NEWEST_OF_NAMED: Final = (
    "SELECT boot_id FROM boot AS own WHERE own.hotkey = CAST(column1 AS TEXT) AND own.vm = CAST(column2 AS TEXT)"  # noqa: S608
    f" {_NEWEST}"
)


def _find_last_boots(op: store.FindLastBoots) -> tuple[str, Values]:
    named = ", ".join(["(?, ?)"] * len(op.vms))
    of_named = f"boot_id IN (SELECT ({_NEWEST_OF_NAMED}) FROM (VALUES {named}) AS named)"  # noqa: S608 - no names
    return select(store.BootRow, f"WHERE {of_named}"), chained(map(_values, op.vms))


def _read_gpus(op: store.ReadGpus) -> tuple[str, Values]:
    return select(store.GpuRow, f"WHERE server_id IN ({', '.join('?' * len(op.server_ids))})"), op.server_ids


def chained(rows: Iterable[Values]) -> Values:
    return tuple(chain.from_iterable(rows))


_STATES: Final[tuple[str, ...]] = tuple(sorted(get_args(store.State)))
_COUNTS: Final = ", ".join(f"count(*) FILTER (WHERE state = '{state}')" for state in _STATES)
_RETIRED: Final = "state = 'retired' AND retired_at <= :until"


_WHERE_KEY: Final = " AND ".join(f"{name} = ?" for name in _KEY)
_UPDATE: Final = (
    "UPDATE generation SET state = ?, provisional = ?, delivered_at = ?, retired_at = ?, retirement = ?, mac = ?"  # noqa: S608
    f" WHERE {_WHERE_KEY}"
)
_EMPTY: Final = (
    "UPDATE generation SET state = 'purged', provisional = FALSE, sealed = NULL, kek_id = NULL, wrapped_key = NULL,"  # noqa: S608
    f" mac = ? WHERE {_WHERE_KEY}"
)


def _update_generation(op: store.UpdateGeneration, seal: Seal) -> tuple[str, Values]:
    row = op.row
    changed = (row.state, row.provisional, row.delivered_at, row.retired_at, row.retirement)
    return _UPDATE, (*changed, _sealed(row, seal)[-1], *encode(row)[: len(_KEY)])


def _empty_generation(
    op: store.EraseGeneration | store.PurgeGeneration, seal: Seal, where: str = ""
) -> tuple[str, Values]:
    row = op.row
    emptied = attrs.evolve(row, state="purged", provisional=False, sealed=None, kek_id=None, wrapped_key=None)
    return _EMPTY + where, (_sealed(emptied, seal)[-1], *encode(row)[: len(_KEY)])


_QUERIES: Final[dict[type[store.StoreOp[Any]], _Query | _Write]] = {
    store.Insert: _write(_insert, store.ROWS, _nothing),
    store.Put: _write(
        _put,
        (
            *(store.VmRow, store.BootRow, store.VolumeRow, store.ServerRow, store.GpuDeviceRow),
            *(store.RevocationRow, store.EvidenceRow, store.LogStateRow, store.LogTileRow, store.KeyringRow),
            store.HostProfileRow,
        ),
        _nothing,
    ),
    store.Claim: _write(_claim, (store.NonceRow, store.ServerRow, store.GpuRow, store.GpuDeviceRow), bool),
    store.Read: _Query(
        lambda op: (_read(op.kind, (op.by,) if op.by else op.kind.KEY), _values(op.key)),
        lambda op, rows: _first(op.kind, rows),
    ),
    store.ReadAll: _Query(
        lambda op: (_read(op.kind, ("hotkey", "vm")[: len(_values(op.owner))]), _values(op.owner)),
        lambda op, rows: _sorted(op.kind, rows),
    ),
    store.Scan: _Query(lambda op: (_SCANS[op.kind], ()), lambda op, rows: _sorted(op.kind, rows)),
    store.ReadGpus: _Query(_read_gpus, lambda _, rows: _sorted(store.GpuRow, rows)),
    store.FindDeclaration: _query("SELECT min(server_id) FROM gpu WHERE uuid = :uuid", lambda rows: rows[0][0]),
    store.ReadHostProfiles: _query(
        select(store.HostProfileRow, "ORDER BY created_at, fingerprint LIMIT :limit"),
        partial(decode_rows, store.HostProfileRow),
    ),
    store.ReadPage: _Query(_read_page, lambda op, rows: decode_rows(op.kind, rows)),
    store.NoteKeyServer: _query(
        "INSERT INTO key_server (name, version, configuration, seen_at)"
        " VALUES (:server.name, :server.version, :server.configuration, :server.seen_at) ON CONFLICT (name) DO UPDATE"
        " SET version = excluded.version, configuration = excluded.configuration, seen_at = excluded.seen_at"
    ),
    store.ReadKeyServers: _query(
        "SELECT name, version, configuration, seen_at FROM key_server WHERE seen_at > :after ORDER BY name LIMIT 100",
        lambda rows: tuple(sorted((_typed(store.KeyServer, values) for values in rows), key=attrgetter("name"))),
    ),
    store.ForgetKeyServers: _query("DELETE FROM key_server WHERE seen_at <= :until"),
    store.NoteWhatIf: _query(
        "INSERT INTO what_if (name, tried_at, found) VALUES ('last', :what_if.tried_at, :what_if.found)"
        " ON CONFLICT (name) DO UPDATE SET tried_at = excluded.tried_at, found = excluded.found"
    ),
    store.ReadWhatIf: _query(
        "SELECT tried_at, found FROM what_if", lambda rows: _typed(store.WhatIf, rows[0]) if rows else None
    ),
    store.ReadFleet: _Query(_read_fleet, lambda _, rows: _fleet(rows)),
    store.ReadOld: _Query(_read_old, lambda op, rows: decode_rows(op.kind, rows)),
    store.CountRows: _Query(
        lambda op: (f"SELECT count(*) FROM {op.kind.TABLE}", ()),  # noqa: S608
        lambda _, rows: rows[0][0],
    ),
    store.InsertAll: _Write(_insert_all, lambda _, rows: _nothing(rows)),
    store.InsertBootVolumes: _Write(_insert_all, lambda _, rows: _nothing(rows)),
    store.Delete: _Query(
        lambda op: (
            f"DELETE FROM {op.kind.TABLE} WHERE {op.kind.KEY[0]} IN ({', '.join('?' * len(op.keys))})",  # noqa: S608
            op.keys,
        ),
        lambda _, rows: _nothing(rows),
    ),
    # nonces
    store.SweepNonces: _query(
        "DELETE FROM nonce WHERE value IN"
        " (SELECT value FROM nonce WHERE redeemed_at <= :until AND issued_at <= :until"
        " ORDER BY redeemed_at LIMIT :limit)"
        " RETURNING value, purpose, issued_at, redeemed_at",
        partial(_sorted, store.NonceRow),
    ),
    store.ReadTimes: _query(
        "SELECT value, {clock}, (SELECT value FROM fact WHERE name = 'revocations'), version, contents, mac"
        " FROM fact LEFT JOIN store_head ON store_head.name = 'store' WHERE fact.name = 'nonce_horizon'",
        _times,
    ),
    # revocations and erasures
    store.SetVersion: _query("UPDATE fact SET value = :to WHERE name = 'revocations'"),
    store.ReadRevoked: _all(store.RevocationRow, "allowed_at IS NULL"),
    store.ReadRevocation: _one(store.RevocationRow, "kind = :kind AND subject = :subject"),
    store.ReadClaims: _either(
        lambda op: op.pin.kind == "ppid",
        _all(store.VmRow, "ppid = :pin.value"),
        _all(store.VmRow, "platform_kind = :pin.kind AND platform_id = :pin.value"),
    ),
    store.EraseGeneration: _Write(_empty_generation, lambda _, rows: _nothing(rows)),
    store.Forget: _Query(
        lambda op: (f"DELETE FROM {op.kind.TABLE} WHERE hotkey = ? AND vm = ?", _values(op.vm)),  # noqa: S608
        lambda _, rows: _nothing(rows),
    ),
    store.DecideLoss: _query(
        "INSERT INTO fact (name, value) VALUES ('loss_decided_at', :at)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    ),
    store.ReadLossDecided: _query(
        "SELECT value FROM fact WHERE name = 'loss_decided_at'", lambda rows: rows[0][0] if rows else 0
    ),
    store.SetHorizon: _query("UPDATE fact SET value = :to WHERE name = 'nonce_horizon'"),
    # names and boots
    store.ReadNames: _either(
        lambda op: op.hotkey == "",
        _query(
            "SELECT hotkey, vm FROM vm WHERE vm || '' = :name"
            " UNION SELECT hotkey, vm FROM generation WHERE vm || '' = :name",
            _names,
        ),
        _query(
            "SELECT hotkey, vm FROM vm WHERE hotkey = :hotkey AND vm = :name"
            " UNION SELECT hotkey, vm FROM generation WHERE hotkey = :hotkey AND vm = :name",
            _names,
        ),
    ),
    store.ReadUnclaimed: _next_vms(
        "state <> 'purged'"
        " AND NOT EXISTS (SELECT 1 FROM vm WHERE vm.hotkey = generation.hotkey AND vm.vm = generation.vm)"
    ),
    store.ReadRetired: _next_vms(_RETIRED),
    store.CountRetired: _query(
        f"SELECT count(*) FROM (SELECT DISTINCT hotkey, vm FROM generation WHERE {_RETIRED}) AS found",  # noqa: S608
        lambda rows: rows[0][0],
    ),
    store.CountClaims: _either(
        lambda op: op.unless is None,
        _count(store.VmRow, _BOUND),
        _count(
            store.VmRow,
            f"{_BOUND} AND NOT EXISTS"  # noqa: S608 - no names
            " (SELECT 1 FROM vm AS own WHERE own.hotkey = :unless.hotkey AND own.vm = :unless.name)",
        ),
    ),
    store.FindLastBoot: _one(store.BootRow, f"{_THE_VM} {_NEWEST}"),
    store.FindLastBoots: _Query(_find_last_boots, lambda _, rows: decode_rows(store.BootRow, rows)),
    store.FindLastBootFrom: _one(store.BootRow, f"hotkey = :hotkey AND peer_address = :address {_NEWEST}"),
    store.VoidTokens: _query(f"UPDATE boot SET voided_at = :at WHERE voided_at IS NULL AND {_THE_VM}"),  # noqa: S608
    store.ReadBootVolumes: _query(
        select(store.BootVolumeRow, "WHERE boot_id = :boot_id ORDER BY position"),
        partial(decode_rows, store.BootVolumeRow),
    ),
    # keys and volumes
    store.ReadLiveGenerations: _either(
        lambda op: op.boot_id is None,
        _all(store.GenerationRow, f"{_THE_VM} AND ({_LIVE})"),
        _all(store.GenerationRow, f"{_THE_VM} AND ({_LIVE} OR {_GIVEN})"),
    ),
    store.UpdateGeneration: _Write(_update_generation, lambda _, rows: _nothing(rows)),
    store.DoubtCandidates: _query(
        "UPDATE generation SET provisional = TRUE WHERE state = 'candidate' AND NOT provisional", lambda _: ()
    ),
    store.RewrapGenerations: _Write(_rewrap, lambda _, rows: _nothing(rows)),
    store.PurgeGeneration: _Write(
        partial(_empty_generation, where=" AND state = 'retired'"), lambda _, rows: _nothing(rows)
    ),
    store.CountSealed: _query(
        "SELECT kek_id, count(*) FROM generation WHERE kek_id IS NOT NULL GROUP BY kek_id",
        lambda rows: tuple(sorted(((kek_id, count) for kek_id, count in rows), key=str)),
    ),
    store.CountStates: _query(  # in one pass: SQLite would sort all rows in memory to group them
        f"SELECT {_COUNTS} FROM generation",  # noqa: S608 - states of ours
        lambda rows: tuple((state, count) for state, count in zip(_STATES, rows[0], strict=True) if count),
    ),
    store.ReadOtherwiseSealed: _Query(_read_otherwise_sealed, lambda _, rows: decode_rows(store.GenerationRow, rows)),
    # servers and verdicts
    store.DeleteServer: _query("DELETE FROM server WHERE server_id = :server_id"),  # and its GPUs, by their reference
    store.CountRefusals: _either(
        lambda op: isinstance(op.of, str),
        _count(store.AttestationRow, f"registration = :of AND {_REFUSED}"),
        _count(store.AttestationRow, f"platform_kind = :of.kind AND platform_id = :of.value AND {_REFUSED}"),
    ),
    # audit
    store.ReadAudit: _Query(_read_audit, lambda _, rows: _numbered(rows)),
    store.LockLog: _one(store.LogStateRow, "log = 'audit'{lock}"),
    store.ReadUnsequenced: _query(
        select(store.AuditRow, "WHERE idx IS NULL AND id > :beyond ORDER BY id LIMIT :limit", "id"), _numbered
    ),
    store.FindBeyond: _query(
        "SELECT id FROM audit WHERE idx >= :size ORDER BY idx LIMIT :limit", lambda rows: tuple(row[0] for row in rows)
    ),
    store.SetApart: _Query(_set_apart, lambda _, rows: _nothing(rows)),
    store.FindNumber: _query("SELECT id FROM audit WHERE idx = :idx", lambda rows: rows[0][0] if rows else 0),
    store.ReadVmVersions: _Query(
        _read_vm_versions,
        lambda _, rows: tuple((store.Vm(hotkey, name), version) for hotkey, name, version in rows),
    ),
    store.Sequence: _Query(_sequence, lambda _, rows: len(rows)),
    store.ReadLog: _query(
        select(store.AuditRow, "WHERE idx >= :first ORDER BY idx LIMIT :limit"), partial(decode_rows, store.AuditRow)
    ),
    store.ReadTile: _one(store.LogTileRow, "level = :level AND tile = :tile"),
    store.FindRecent: _query(
        "SELECT idx FROM audit WHERE idx >= :first AND at >= :since ORDER BY idx LIMIT 1",
        lambda rows: rows[0][0] if rows else None,
    ),
    store.PurgeAudit: _query("DELETE FROM audit WHERE idx < :below AND (idx >= 0 OR at < :before)"),
    store.PurgeTiles: _query("DELETE FROM log_tile WHERE level = 0 AND tile < :below"),
}


_READ: Final[dict[type[store.StoreOp[Any]], type[store.Row] | Literal["its kind"]]] = {
    **dict.fromkeys((store.Read, store.ReadAll, store.Scan, store.ReadPage, store.ReadOld), "its kind"),
    store.ReadGpus: store.GpuRow,
    store.ReadHostProfiles: store.HostProfileRow,
    store.ReadRevoked: store.RevocationRow,
    store.ReadRevocation: store.RevocationRow,
    store.ReadClaims: store.VmRow,
    store.FindLastBoot: store.BootRow,
    store.FindLastBoots: store.BootRow,
    store.FindLastBootFrom: store.BootRow,
    store.ReadBootVolumes: store.BootVolumeRow,
    store.ReadLiveGenerations: store.GenerationRow,
    store.ReadOtherwiseSealed: store.GenerationRow,
    store.LockLog: store.LogStateRow,
}
"""The kind of rows that each operation reads with their MACs; ``its kind`` where the operation says it."""
_CHECKED: Final = frozenset(store.ROWS) - UNSEALED - {store.AuditRow}


def kind_read(op: store.StoreOp[Any]) -> type[store.Row] | None:
    """The kind of the rows that an operation reads with their MACs, which are the last column; otherwise None."""
    found = _READ.get(type(op))
    if found is None:
        return None
    kind: type[store.Row] = cast("Any", op).kind if found == "its kind" else found
    return kind if kind in _CHECKED else None


def parts_read(op: store.StoreOp[Any], rows: Rows) -> Iterable[tuple[type[store.Row], Rows]]:
    """The rows with MACs in what an operation has read, by their kinds."""
    if isinstance(op, store.ReadFleet):
        return _fleet_parts(rows)
    kind = kind_read(op)
    return () if kind is None else ((kind, rows),)


READS_ROWS: Final = frozenset(_READ)
"""The operations for which `kind_read` may find one."""


def is_read(text: str) -> bool:
    """Whether a statement changes nothing."""
    return text.startswith("SELECT ")


def returns_rows(text: str) -> bool:
    """Whether a statement's reply is made of the rows that it returns."""
    return is_read(text) or " RETURNING " in text


def not_sealed(_kind: type[store.Row], _values: Values) -> None:
    """The `Seal` of a store that is not sealed."""
    return


def statement(op: store.StoreOp[Any], seal: Seal = not_sealed) -> tuple[str, Values]:
    """The statement of an operation and its parameters. Raises `TypeError` for any other value."""
    query = _QUERIES.get(type(op))
    if query is None:
        raise TypeError(f"{type(op).__name__} is not a row operation")
    return query.ask(op, seal) if isinstance(query, _Write) else query.ask(op)


def decode(op: store.StoreOp[Any], rows: Rows) -> Any:
    """The reply to an operation, from the rows that its statement returned, which may be none."""
    return _QUERIES[type(op)].reply(op, rows)
