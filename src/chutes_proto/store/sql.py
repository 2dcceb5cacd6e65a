"""The rows as SQL text: one schema and one set of statements for two dialects, without a connection.

Rules kept here:

* statements are written with ``?``; `placeholders` turns them into what a driver wants, and no statement has a ``?`` or
  a ``%`` for anything else;
* every value is a parameter; table and column names come from the row classes alone;
* types are what both dialects have: TEXT, BIGINT, BOOLEAN and bytes; no TEXT is compared but for equality, because
  collations differ, so order is made here;
* a release that changes the schema adds a step to `STEPS`; the number of steps that made a database is its schema
  version, and stands in the ``fact`` table.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Final, Literal, TypeAlias, Union, get_args, get_origin

import attrs
from attrs import frozen

from chutes_proto.store.rows import (
    ROWS,
    AttestationRow,
    AuditRow,
    BootRow,
    BootVolumeRow,
    Claim,
    CountClaims,
    CountRefusals,
    CountSealed,
    CountServerRefusals,
    DeleteServer,
    FindBoot,
    FindConfirm,
    FindLastBoot,
    FindLastBootFrom,
    FindServer,
    GenerationRow,
    GpuRow,
    Insert,
    IsRedeemed,
    NonceRow,
    Pin,
    PurgeGeneration,
    Put,
    RaiseHorizon,
    ReadAttestation,
    ReadAudit,
    ReadBoot,
    ReadBootVolumes,
    ReadGenerations,
    ReadGpu,
    ReadHorizon,
    ReadLiveGenerations,
    ReadNames,
    ReadOtherwiseSealed,
    ReadServer,
    ReadServers,
    ReadVm,
    ReadVolumes,
    RedeemNonce,
    RewrapGeneration,
    Row,
    Scan,
    ServerRow,
    SpendToken,
    StoreOp,
    SweepNonces,
    UpdateGeneration,
    Vm,
    VmRow,
    VoidTokens,
    VolumeRow,
)

Dialect: TypeAlias = Literal["sqlite", "postgresql"]
Values: TypeAlias = tuple[Any, ...]

_FIRST: Final = """
CREATE TABLE fact (
  name TEXT PRIMARY KEY,
  value BIGINT NOT NULL
);
CREATE TABLE nonce (
  value {bytes} PRIMARY KEY,
  purpose TEXT NOT NULL,
  issued_at BIGINT NOT NULL,
  redeemed_at BIGINT NOT NULL
);
CREATE INDEX nonce_redeemed ON nonce (redeemed_at);
CREATE TABLE vm (
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  platform_kind TEXT NOT NULL CHECK (platform_kind IN ('instance', 'ppid')),
  platform_id {bytes} NOT NULL,
  instance_id {bytes},
  ppid {bytes} NOT NULL,
  proven BOOLEAN NOT NULL,
  exchange TEXT NOT NULL CHECK (exchange IN ('base', 'two-phase')),
  created_at BIGINT NOT NULL,
  last_boot_at BIGINT NOT NULL,
  PRIMARY KEY (hotkey, vm)
);
CREATE INDEX vm_platform ON vm (platform_kind, platform_id);
CREATE TABLE boot (
  boot_id TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  platform_kind TEXT NOT NULL CHECK (platform_kind IN ('instance', 'ppid')),
  platform_id {bytes} NOT NULL,
  certificate {bytes} NOT NULL,
  profile_name TEXT NOT NULL,
  profile_version TEXT NOT NULL,
  exchange TEXT NOT NULL CHECK (exchange IN ('base', 'two-phase')),
  quote_digest {bytes} NOT NULL,
  token_digest {bytes} NOT NULL UNIQUE,
  token_expires_at BIGINT NOT NULL,
  token_needs_certificate BOOLEAN NOT NULL,
  peer_address TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  spent_at BIGINT,
  body_digest {bytes},
  voided_at BIGINT,
  CHECK ((spent_at IS NULL) = (body_digest IS NULL))
);
CREATE INDEX boot_vm ON boot (hotkey, vm);
CREATE INDEX boot_address ON boot (hotkey, peer_address);
CREATE TABLE boot_volume (
  boot_id TEXT NOT NULL REFERENCES boot (boot_id),
  volume TEXT NOT NULL,
  position BIGINT NOT NULL,
  current_generation BIGINT,
  next_generation BIGINT,
  in_use BOOLEAN NOT NULL,
  PRIMARY KEY (boot_id, volume)
);
CREATE TABLE generation (
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  volume TEXT NOT NULL,
  generation BIGINT NOT NULL CHECK (generation > 0),
  state TEXT NOT NULL CHECK (state IN ('active', 'candidate', 'retired', 'purged')),
  sealed {bytes},
  kek_id TEXT,
  wrapped_key {bytes},
  provisional BOOLEAN NOT NULL,
  created_at BIGINT NOT NULL,
  origin TEXT NOT NULL,
  delivered_at BIGINT,
  retired_at BIGINT,
  retirement TEXT
    CHECK (retirement IN ('rekey', 'prune', 'relisted', 'takeover', 'dropped', 'superseded')),
  PRIMARY KEY (hotkey, vm, volume, generation),
  CHECK ((state = 'purged') = (sealed IS NULL)),
  CHECK ((sealed IS NULL) = (wrapped_key IS NULL) AND (sealed IS NULL) = (kek_id IS NULL)),
  CHECK (state = 'purged' OR (state = 'retired') = (retired_at IS NOT NULL)),
  CHECK ((retired_at IS NULL) = (retirement IS NULL))
);
CREATE UNIQUE INDEX generation_active ON generation (hotkey, vm, volume) WHERE state = 'active';
CREATE UNIQUE INDEX generation_candidate ON generation (hotkey, vm, volume) WHERE state = 'candidate';
CREATE TABLE volume (
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  volume TEXT NOT NULL,
  in_use BOOLEAN NOT NULL,
  format_allowed BOOLEAN NOT NULL,
  PRIMARY KEY (hotkey, vm, volume)
);
CREATE TABLE attestation (
  attestation_id TEXT PRIMARY KEY,
  stage TEXT NOT NULL CHECK (stage IN ('boot', 'runtime')),
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  platform_kind TEXT CHECK (platform_kind IN ('instance', 'ppid')),
  platform_id {bytes},
  code TEXT,
  reason TEXT NOT NULL,
  profile_name TEXT,
  profile_version TEXT,
  quote_digest {bytes} NOT NULL,
  peer_address TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  registration TEXT,
  CHECK (stage = 'runtime' OR platform_kind IS NOT NULL)
);
CREATE INDEX attestation_platform ON attestation (platform_kind, platform_id, created_at);
CREATE INDEX attestation_registration ON attestation (registration, created_at);
CREATE TABLE server (
  server_id TEXT PRIMARY KEY,
  registration TEXT NOT NULL UNIQUE,
  hotkey TEXT NOT NULL,
  name TEXT NOT NULL,
  host TEXT NOT NULL,
  address TEXT NOT NULL UNIQUE,
  boot_id TEXT REFERENCES boot (boot_id),
  platform_kind TEXT CHECK (platform_kind IN ('instance', 'ppid')),
  platform_id {bytes},
  created_at BIGINT NOT NULL,
  updated_at BIGINT,
  attested TEXT,
  UNIQUE (hotkey, name)
);
CREATE TABLE gpu (
  uuid TEXT PRIMARY KEY,
  server_id TEXT NOT NULL REFERENCES server (server_id) ON DELETE CASCADE,
  identifier TEXT NOT NULL,
  declared TEXT NOT NULL
);
CREATE INDEX gpu_server ON gpu (server_id);
CREATE TABLE audit (
  id {serial} PRIMARY KEY,
  at BIGINT NOT NULL,
  actor TEXT NOT NULL CHECK (actor IN ('vm', 'miner', 'operator')),
  event TEXT NOT NULL,
  decision TEXT NOT NULL CHECK (decision IN ('granted', 'refused', 'replayed', 'done')),
  reason TEXT NOT NULL,
  hotkey TEXT,
  vm TEXT,
  boot_id TEXT,
  request_id TEXT,
  platform_kind TEXT,
  platform_id {bytes},
  profile TEXT,
  quote_digest {bytes},
  keys TEXT NOT NULL,
  peer_address TEXT NOT NULL
);
INSERT INTO fact (name, value) VALUES ('nonce_horizon', 0);
INSERT INTO fact (name, value) VALUES ('schema_version', 0);
"""

_CONFIRMATIONS: Final = """
ALTER TABLE vm ADD COLUMN attested TEXT;
ALTER TABLE boot ADD COLUMN confirm_digest {bytes};
ALTER TABLE boot ADD COLUMN confirm_expires_at BIGINT;
ALTER TABLE boot ADD COLUMN confirm_body_digest {bytes};
CREATE UNIQUE INDEX boot_confirm ON boot (confirm_digest);
ALTER TABLE volume ADD COLUMN handed BIGINT;
CREATE INDEX generation_kek ON generation (kek_id);
{room}
"""

STEPS: Final = (_FIRST, _CONFIRMATIONS)
"""Step n brings a database of schema version n to version n + 1; an empty database has version 0."""

SCHEMA_VERSION: Final = len(STEPS)

READ_VERSION: Final = "SELECT value FROM fact WHERE name = 'schema_version'"
_WRITE_VERSION: Final = "UPDATE fact SET value = {version} WHERE name = 'schema_version'"
TABLES: Final[dict[Dialect, str]] = {
    "sqlite": "SELECT name FROM sqlite_master",
    "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
}
"""What there is in a database, ours or not."""

_TYPES: Final[dict[Dialect, dict[str, str]]] = {
    "sqlite": {"bytes": "BLOB", "serial": "INTEGER", "room": "", "alone": ""},
    "postgresql": {
        "bytes": "BYTEA",
        "serial": "BIGINT GENERATED ALWAYS AS IDENTITY",
        # Every unit holds the weakest lock of this table, so none runs beside a migration.
        "alone": "LOCK TABLE fact IN ACCESS EXCLUSIVE MODE",
        # A new version of a row that finds no room beside the old one is entered in every index, where it conflicts
        # with each transaction that read a neighbour there.
        "room": ";".join(f"ALTER TABLE {table} SET (fillfactor = 50)" for table in ("vm", "boot", "volume")),
    },
}


def schema(dialect: Dialect, since: int = 0) -> Iterator[str]:
    """The statements that bring a database from schema version ``since`` to ours, one at a time."""
    alone = "{alone}" if since else ""
    text = ";".join((alone, *STEPS[since:], _WRITE_VERSION)).format(version=len(STEPS), **_TYPES[dialect])
    return (statement for part in text.split(";") if (statement := part.strip()))


def placeholders(statement: str, dialect: Dialect) -> str:
    """``statement`` with the parameter marks of the dialect's driver."""
    return statement if dialect == "sqlite" else statement.replace("?", "%s")


# --- rows and columns ---


def _type_of(attribute: attrs.Attribute[Any]) -> Any:
    """The type of a field, without its ``None``."""
    kind: Any = attribute.type
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (member for member in get_args(kind) if member is not types.NoneType)
    return kind


_COLUMNS_OF: Final[dict[Any, tuple[str, ...]]] = {Vm: ("hotkey", "vm"), Pin: ("platform_kind", "platform_id")}
_VM: Final[Callable[[Vm], Values]] = attrgetter("hotkey", "name")
_PIN: Final[Callable[[Pin], Values]] = attrgetter("kind", "value")
_PARTS: Final[dict[Any, Callable[[Any], Values]]] = {Vm: _VM, Pin: _PIN}
"""The values of what has more than one column."""


@frozen
class _Layout:
    """How a row's fields are its columns: each is one, but for those that are ``spread`` over several."""

    columns: tuple[str, ...]
    fields: Callable[[Row], Values]
    spread: tuple[tuple[int, Any, int], ...]
    """Place, type and number of columns."""
    flags: tuple[int, ...]
    """The places of the booleans."""
    key: tuple[int, ...]
    """Which values are the primary key's."""

    @classmethod
    def of(cls, kind: type[Any]) -> _Layout:
        fields = [(field.name, _type_of(field)) for field in attrs.fields(kind)]
        columns = tuple(column for name, of in fields for column in _COLUMNS_OF.get(of, (name,)))
        return cls(
            columns=columns,
            fields=attrgetter(*(name for name, _ in fields)),
            spread=tuple((at, of, len(_COLUMNS_OF[of])) for at, (_, of) in enumerate(fields) if of in _COLUMNS_OF),
            flags=tuple(at for at, (_, of) in enumerate(fields) if of is bool),
            key=tuple(columns.index(column) for column in kind.KEY),
        )


_LAYOUTS: Final = {kind: _Layout.of(kind) for kind in ROWS}


def columns(kind: type[Row]) -> tuple[str, ...]:
    """The names of a row's columns, in the order of its values."""
    return _LAYOUTS[kind].columns


def encode(row: Row) -> Values:
    """The values of a row, one for each column."""
    layout = _LAYOUTS[type(row)]
    values = list(layout.fields(row))
    for at, of, count in reversed(layout.spread):
        whole = values[at]
        values[at : at + 1] = (None,) * count if whole is None else _PARTS[of](whole)
    return tuple(values)


def decode_row(kind: type[Any], values: Sequence[Any]) -> Any:
    """The row of ``kind`` that has these values; drivers without a boolean type give 0 and 1."""
    layout = _LAYOUTS[kind]
    members = list(values)
    for at, of, count in layout.spread:
        parts = members[at : at + count]
        members[at : at + count] = (None if parts[0] is None else of(*parts),)
    for at in layout.flags:
        members[at] = bool(members[at])
    return kind(*members)


def key_of(row: Row) -> Values:
    """The values of a row's primary key."""
    return _key_of(type(row), encode(row))


def _key_of(kind: type[Row], values: Sequence[Any]) -> Values:
    return tuple(values[at] for at in _LAYOUTS[kind].key)


# --- statements ---


def _select(kind: type[Row], where: str) -> str:
    return f"SELECT {', '.join(columns(kind))} FROM {kind.TABLE} {where}"  # noqa: S608 - names of ours


def _insert(kind: type[Row]) -> str:
    names = columns(kind)
    return f"INSERT INTO {kind.TABLE} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608


def _put(kind: type[Row]) -> str:
    changes = ", ".join(f"{name} = excluded.{name}" for name in columns(kind) if name not in kind.KEY)
    return f"{_insert(kind)} ON CONFLICT ({', '.join(kind.KEY)}) DO UPDATE SET {changes}"


_INSERTS: Final = {kind: _insert(kind) for kind in ROWS}
_PUTS: Final = {kind: _put(kind) for kind in (VmRow, BootRow, VolumeRow, ServerRow)}
_CLAIMS: Final = {
    kind: f"{_insert(kind)} ON CONFLICT DO NOTHING RETURNING {kind.KEY[0]}" for kind in (ServerRow, GpuRow)
}
_SCANS: Final = {kind: _select(kind, "" if kind.KEY else "ORDER BY id") for kind in ROWS}
_REDEEM = f"{_insert(NonceRow)} ON CONFLICT (value) DO NOTHING RETURNING value"
_IS_REDEEMED = "SELECT value FROM nonce WHERE value = ?"
_SWEEP = (
    "DELETE FROM nonce"
    " WHERE value IN (SELECT value FROM nonce WHERE redeemed_at <= ? ORDER BY redeemed_at LIMIT ?)"
    " RETURNING value, purpose, issued_at, redeemed_at"
)
_READ_HORIZON = "SELECT value FROM fact WHERE name = 'nonce_horizon'"
_RAISE_HORIZON = "UPDATE fact SET value = ? WHERE name = 'nonce_horizon' AND value < ?"
_READ_VM = _select(VmRow, "WHERE hotkey = ? AND vm = ?")
_READ_NAMES = "SELECT hotkey, vm FROM vm UNION SELECT hotkey, vm FROM generation"
_READ_NAMES_CALLED = "SELECT hotkey, vm FROM vm WHERE vm = ? UNION SELECT hotkey, vm FROM generation WHERE vm = ?"
_COUNT_CLAIMS = "SELECT count(*) FROM vm WHERE platform_kind = ? AND platform_id = ?"
_FIND_BOOT = _select(BootRow, "WHERE token_digest = ?")
_FIND_CONFIRM = _select(BootRow, "WHERE confirm_digest = ?")
_SPEND = "UPDATE boot SET spent_at = ?, body_digest = ? WHERE boot_id = ? AND spent_at IS NULL RETURNING boot_id"
_VOID_ALL = "UPDATE boot SET voided_at = ? WHERE voided_at IS NULL"
_VOID = f"{_VOID_ALL} AND hotkey = ? AND vm = ?"
_READ_BOOT_VOLUMES = _select(BootVolumeRow, "WHERE boot_id = ? ORDER BY position")
_READ_GENERATIONS = _select(GenerationRow, "WHERE hotkey = ? AND vm = ?")
_LIVE = (
    "state IN ('active', 'candidate') OR provisional OR retirement = 'prune' OR (volume, generation) IN"
    " (SELECT volume, max(generation) FROM generation WHERE hotkey = ? AND vm = ? GROUP BY volume)"
)
_GIVEN = (
    "(volume, generation) IN (SELECT volume, current_generation FROM boot_volume WHERE boot_id = ?)"
    " OR (volume, generation) IN (SELECT volume, next_generation FROM boot_volume WHERE boot_id = ?)"
)
_READ_LIVE = _select(GenerationRow, f"WHERE hotkey = ? AND vm = ? AND ({_LIVE})")
_READ_LIVE_AND_GIVEN = _select(GenerationRow, f"WHERE hotkey = ? AND vm = ? AND ({_LIVE} OR {_GIVEN})")
_UPDATE_GENERATION = (
    "UPDATE generation SET state = ?, provisional = ?, delivered_at = ?, retired_at = ?, retirement = ?"
    " WHERE hotkey = ? AND vm = ? AND volume = ? AND generation = ?"
)
_OF_GENERATION = "WHERE hotkey = ? AND vm = ? AND volume = ? AND generation = ?"
_REWRAP = f"UPDATE generation SET kek_id = ?, wrapped_key = ? {_OF_GENERATION} AND sealed IS NOT NULL"  # noqa: S608
_PURGE = (
    "UPDATE generation SET state = 'purged', provisional = ?, sealed = NULL, kek_id = NULL, wrapped_key = NULL"  # noqa: S608
    f" {_OF_GENERATION} AND state = 'retired'"
)
_COUNT_SEALED = "SELECT kek_id, count(*) FROM generation WHERE kek_id IS NOT NULL GROUP BY kek_id"
_READ_OTHERWISE_SEALED = _select(GenerationRow, "WHERE kek_id IS NOT NULL AND kek_id <> ? LIMIT ?")
_AUDIT_COLUMNS = f"id, {', '.join(columns(AuditRow))}"
_READ_AUDIT = f"SELECT {_AUDIT_COLUMNS} FROM audit WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608
_READ_AUDIT_BACKWARDS = f"SELECT {_AUDIT_COLUMNS} FROM audit WHERE id < ? ORDER BY id DESC LIMIT ?"  # noqa: S608
_READ_SERVER = _select(ServerRow, "WHERE server_id = ?")
_FIND_SERVER = _select(ServerRow, "WHERE address = ?")
_READ_SERVERS = _select(ServerRow, "WHERE hotkey = ?")
_DELETE_SERVER = "DELETE FROM server WHERE server_id = ?"  # and its GPUs, by their reference
_READ_GPU = _select(GpuRow, "WHERE uuid = ?")
_READ_BOOT = _select(BootRow, "WHERE boot_id = ?")
_LAST_BOOT_OF = _select(BootRow, "WHERE hotkey = ? AND vm = ? ORDER BY created_at DESC LIMIT 1")
_LAST_BOOT_FROM = _select(BootRow, "WHERE hotkey = ? AND peer_address = ? ORDER BY created_at DESC LIMIT 1")
_READ_ATTESTATION = _select(AttestationRow, "WHERE attestation_id = ?")
_COUNT_SERVER_REFUSALS = (
    "SELECT count(*) FROM attestation WHERE registration = ? AND created_at >= ? AND code IS NOT NULL"
)
_READ_VOLUMES = _select(VolumeRow, "WHERE hotkey = ? AND vm = ?")
_COUNT_REFUSALS = (
    "SELECT count(*) FROM attestation"
    " WHERE platform_kind = ? AND platform_id = ? AND code IS NOT NULL AND created_at >= ?"
)


def statement(op: StoreOp[Any]) -> tuple[str, Values]:
    """The statement of an operation and its parameters."""
    match op:
        case Insert(row):
            return _INSERTS[type(row)], encode(row)
        case Put(row):
            return _PUTS[type(row)], encode(row)
        case RedeemNonce(row):
            return _REDEEM, encode(row)
        case IsRedeemed(value):
            return _IS_REDEEMED, (value,)
        case SweepNonces(redeemed_until, limit):
            return _SWEEP, (redeemed_until, limit)
        case ReadHorizon():
            return _READ_HORIZON, ()
        case RaiseHorizon(to):
            return _RAISE_HORIZON, (to, to)
        case ReadVm(vm):
            return _READ_VM, _VM(vm)
        case ReadNames(None):
            return _READ_NAMES, ()
        case ReadNames(name):
            return _READ_NAMES_CALLED, (name, name)
        case CountClaims(pin):
            return _COUNT_CLAIMS, _PIN(pin)
        case FindBoot(digest):
            return _FIND_BOOT, (digest,)
        case FindConfirm(digest):
            return _FIND_CONFIRM, (digest,)
        case SpendToken(boot_id, at, body_digest):
            return _SPEND, (at, body_digest, boot_id)
        case VoidTokens(None, at):
            return _VOID_ALL, (at,)
        case VoidTokens(Vm() as vm, at):
            return _VOID, (at, *_VM(vm))
        case ReadBootVolumes(boot_id):
            return _READ_BOOT_VOLUMES, (boot_id,)
        case ReadGenerations(vm):
            return _READ_GENERATIONS, _VM(vm)
        case ReadLiveGenerations(vm, None):
            return _READ_LIVE, (*_VM(vm), *_VM(vm))
        case ReadLiveGenerations(vm, boot_id):
            return _READ_LIVE_AND_GIVEN, (*_VM(vm), *_VM(vm), boot_id, boot_id)
        case UpdateGeneration(row):
            state = (row.state, row.provisional, row.delivered_at, row.retired_at, row.retirement)
            return _UPDATE_GENERATION, (*state, *_VM(row.vm), row.volume, row.generation)
        case RewrapGeneration(row):
            return _REWRAP, (row.kek_id, row.wrapped_key, *_VM(row.vm), row.volume, row.generation)
        case PurgeGeneration(row):
            return _PURGE, (False, *_VM(row.vm), row.volume, row.generation)
        case CountSealed():
            return _COUNT_SEALED, ()
        case ReadOtherwiseSealed(kek_id, limit):
            return _READ_OTHERWISE_SEALED, (kek_id, limit)
        case ReadVolumes(vm):
            return _READ_VOLUMES, _VM(vm)
        case CountRefusals(pin, since):
            return _COUNT_REFUSALS, (*_PIN(pin), since)
        case Claim(row):
            return _CLAIMS[type(row)], encode(row)
        case ReadServer(server_id):
            return _READ_SERVER, (server_id,)
        case FindServer(address):
            return _FIND_SERVER, (address,)
        case ReadServers(hotkey):
            return _READ_SERVERS, (hotkey,)
        case DeleteServer(server_id):
            return _DELETE_SERVER, (server_id,)
        case ReadGpu(uuid):
            return _READ_GPU, (uuid,)
        case ReadBoot(boot_id):
            return _READ_BOOT, (boot_id,)
        case FindLastBoot(vm):
            return _LAST_BOOT_OF, _VM(vm)
        case FindLastBootFrom(hotkey, address):
            return _LAST_BOOT_FROM, (hotkey, address)
        case ReadAttestation(attestation_id):
            return _READ_ATTESTATION, (attestation_id,)
        case CountServerRefusals(registration, since):
            return _COUNT_SERVER_REFUSALS, (registration, since)
        case ReadAudit(beyond, limit, backwards):
            return _READ_AUDIT_BACKWARDS if backwards else _READ_AUDIT, (beyond, limit)
        case Scan(kind):
            return _SCANS[kind], ()
        case _:
            raise TypeError(f"{type(op).__name__} is not a row operation")


def decode(op: StoreOp[Any], rows: Sequence[Sequence[Any]]) -> Any:
    """The reply to an operation, from what its statement returned (nothing, for one that returns no rows)."""
    match op:
        case ReadVm():
            return decode_row(VmRow, rows[0]) if rows else None
        case FindBoot() | FindConfirm() | ReadBoot() | FindLastBoot() | FindLastBootFrom():
            return decode_row(BootRow, rows[0]) if rows else None
        case ReadServer() | FindServer():
            return decode_row(ServerRow, rows[0]) if rows else None
        case ReadGpu():
            return decode_row(GpuRow, rows[0]) if rows else None
        case ReadAttestation():
            return decode_row(AttestationRow, rows[0]) if rows else None
        case ReadServers():
            return _sorted(ServerRow, rows)
        case RedeemNonce() | IsRedeemed() | SpendToken() | Claim():
            return bool(rows)
        case SweepNonces():
            return _sorted(NonceRow, rows)
        case ReadHorizon() | CountClaims() | CountRefusals() | CountServerRefusals():
            return rows[0][0]
        case ReadBootVolumes():
            return tuple(decode_row(BootVolumeRow, values) for values in rows)
        case CountSealed():
            return tuple(sorted((kek_id, count) for kek_id, count in rows))
        case ReadGenerations() | ReadLiveGenerations() | ReadOtherwiseSealed():
            return _sorted(GenerationRow, rows)
        case ReadNames():
            return tuple(sorted(Vm(*values) for values in rows))
        case ReadVolumes():
            return _sorted(VolumeRow, rows)
        case ReadAudit():
            return tuple((values[0], decode_row(AuditRow, values[1:])) for values in rows)
        case Scan(kind):
            return _sorted(kind, rows)
        case _:
            return None


def _sorted(kind: type[Row], rows: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(decode_row(kind, values) for values in sorted(rows, key=partial(_key_of, kind)))
