"""The schema of a store for two dialects, as steps of which each makes a newer version of it.

A release that changes the schema adds a `Step` to `STEPS`; the number of steps that made a database is its schema
version, and stands in the ``fact`` table beside the oldest version whose servers may still use it.

The names of tables and columns, and the order of these, are those of the row classes (``rows.py``), and ``mac`` after
them. Types are those that both dialects have: TEXT, BIGINT, BOOLEAN and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

from attrs import frozen

Dialect: TypeAlias = Literal["sqlite", "postgresql"]
"""The SQL that a database understands."""

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

_EXPAND: Final = """
{gpus};
CREATE TABLE gpu_device (
  device_id TEXT PRIMARY KEY,
  server_id TEXT NOT NULL REFERENCES server (server_id) ON DELETE CASCADE,
  serial_number TEXT NOT NULL,
  verified_at BIGINT NOT NULL
);
CREATE INDEX gpu_device_server ON gpu_device (server_id);
INSERT INTO fact (name, value) VALUES ('compatible_since', 0);
INSERT INTO fact (name, value) VALUES ('store_id', {number});
INSERT INTO fact (name, value) VALUES ('revocations', 0);
CREATE TABLE revocation (
  kind TEXT NOT NULL CHECK (kind IN ('vm', 'hotkey', 'platform')),
  subject TEXT NOT NULL,
  reason TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  ends_at BIGINT,
  allowed_at BIGINT,
  PRIMARY KEY (kind, subject)
);
CREATE TABLE evidence (
  evidence_id TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  attestation_id TEXT NOT NULL,
  code TEXT,
  quote {bytes} NOT NULL,
  collateral TEXT NOT NULL,
  received_at BIGINT NOT NULL
);
CREATE TABLE erasure (
  erasure_id TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  erased_at BIGINT NOT NULL,
  through TEXT NOT NULL
);
ALTER TABLE vm ADD COLUMN booted TEXT;
ALTER TABLE vm ADD COLUMN nonce_at BIGINT;
ALTER TABLE boot ADD COLUMN root_confirm_digest {bytes};
ALTER TABLE boot ADD COLUMN root_confirm_body_digest {bytes};
ALTER TABLE boot ADD COLUMN root_ca TEXT;
ALTER TABLE attestation ADD COLUMN tcb_status TEXT;
CREATE TABLE key_server (
  name TEXT PRIMARY KEY,
  version TEXT NOT NULL,
  configuration TEXT NOT NULL,
  seen_at BIGINT NOT NULL
);
CREATE TABLE what_if (
  name TEXT PRIMARY KEY,
  tried_at BIGINT NOT NULL,
  found TEXT NOT NULL
);
ALTER TABLE attestation ADD COLUMN finding TEXT;
ALTER TABLE audit ADD COLUMN evidence TEXT;
ALTER TABLE audit ADD COLUMN idx BIGINT;
ALTER TABLE audit ADD COLUMN salt {bytes};
CREATE TABLE log_state (
  log TEXT PRIMARY KEY,
  origin TEXT NOT NULL,
  size BIGINT NOT NULL,
  root {bytes} NOT NULL,
  mac {bytes}
);
CREATE TABLE log_tile (
  level BIGINT NOT NULL,
  tile BIGINT NOT NULL,
  hashes {bytes} NOT NULL,
  PRIMARY KEY (level, tile)
);
CREATE TABLE keyring (
  kind TEXT NOT NULL,
  epoch BIGINT NOT NULL,
  kek_id TEXT NOT NULL,
  wrapped {bytes} NOT NULL,
  created_at BIGINT NOT NULL,
  PRIMARY KEY (kind, epoch)
);
ALTER TABLE attestation ADD COLUMN advisories TEXT;
ALTER TABLE server ADD COLUMN window_id TEXT;
ALTER TABLE server ADD COLUMN target TEXT;
CREATE TABLE host_profile (
  fingerprint TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  profile TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  name TEXT,
  published TEXT
);
ALTER TABLE boot ADD COLUMN given BIGINT;
ALTER TABLE audit ADD COLUMN vm_version BIGINT;
CREATE TABLE head (
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  version BIGINT NOT NULL,
  contents {bytes} NOT NULL,
  mac {bytes} NOT NULL,
  PRIMARY KEY (hotkey, vm)
);
CREATE TABLE store_head (
  name TEXT PRIMARY KEY,
  version BIGINT NOT NULL,
  contents {bytes} NOT NULL,
  mac {bytes} NOT NULL
);
{head_room}
INSERT INTO fact (name, value) VALUES ('seal', 0);
ALTER TABLE vm ADD COLUMN mac {bytes};
ALTER TABLE boot ADD COLUMN mac {bytes};
ALTER TABLE boot_volume ADD COLUMN mac {bytes};
ALTER TABLE generation ADD COLUMN mac {bytes};
ALTER TABLE volume ADD COLUMN mac {bytes};
ALTER TABLE attestation ADD COLUMN mac {bytes};
ALTER TABLE server ADD COLUMN mac {bytes};
ALTER TABLE gpu ADD COLUMN mac {bytes};
ALTER TABLE gpu_device ADD COLUMN mac {bytes};
ALTER TABLE revocation ADD COLUMN mac {bytes};
ALTER TABLE erasure ADD COLUMN mac {bytes};
ALTER TABLE host_profile ADD COLUMN mac {bytes};
ALTER TABLE evidence ADD COLUMN mac {bytes};
ALTER TABLE keyring ADD COLUMN mac {bytes};
ALTER TABLE audit ADD COLUMN mac {bytes};
"""

_INDEXES: Final = (
    # The newest boot of a VM, or from an address, without a look at the others. They make `boot_vm` and `boot_address`
    # superfluous, which a later step may drop.
    "CREATE INDEX boot_vm_newest ON boot (hotkey, vm, created_at)",
    "CREATE INDEX boot_address_newest ON boot (hotkey, peer_address, created_at)",
    # For an operator: a VM by its name alone, its audit rows, and rows whose time is over. The name is an expression,
    # because PostgreSQL would otherwise take this smaller index for a VM's whole key: names of unrelated VMs are
    # neighbours there, and what is read by a page of an index conflicts with what its neighbours write.
    "CREATE INDEX vm_name ON vm ((vm || ''))",
    "CREATE INDEX generation_name ON generation ((vm || ''))",
    "CREATE INDEX audit_vm ON audit (vm, id)",
    # A request by its id, and a hotkey's refusals.
    "CREATE INDEX audit_request ON audit (request_id)",
    "CREATE INDEX audit_refused ON audit (hotkey, id) WHERE decision = 'refused'",
    "CREATE INDEX boot_created ON boot (created_at, boot_id)",
    "CREATE INDEX attestation_created ON attestation (created_at, attestation_id)",
    # The VMs of a platform that is named by its PPID.
    "CREATE INDEX vm_ppid ON vm (ppid)",
    # The evidence of a VM that is erased: its own, and refused quotes that named it.
    "CREATE INDEX evidence_vm ON evidence (hotkey, vm)",
    # A boot that is deleted must not be a server's.
    "CREATE INDEX server_boot ON server (boot_id)",
    "CREATE INDEX server_attested ON server (attested)",
    # A provisioned boot by the nonce that confirms its root key.
    "CREATE INDEX boot_root_confirm ON boot (root_confirm_digest) WHERE root_confirm_digest IS NOT NULL",
    # A declared GPU; version 2 took the uuid for its identity, which it is not.
    "CREATE UNIQUE INDEX gpu_declared ON gpu (uuid, server_id)",
    # The log: an entry by its index, of which there is one, and the rows that are not sequenced yet, which are few.
    "CREATE UNIQUE INDEX audit_idx ON audit (idx) WHERE idx IS NOT NULL",
    "CREATE INDEX audit_unsequenced ON audit (id) WHERE idx IS NULL",
    # The newest version of a VM's head that the log knows; only the sequencer, which conflicts with nobody, writes it.
    "CREATE INDEX audit_version ON audit (hotkey, vm, vm_version) WHERE idx >= 0",
)


@frozen
class Step:
    """A change of the schema: statements with a ``;`` between them, and the oldest version that can live with it.

    Servers of the schema versions from ``compatible_since`` on go on beside a migration to this step and after it;
    None: no older server can. ``indexes`` are ``CREATE INDEX name ON ...`` of tables that may be large: PostgreSQL
    builds them while others write, after ``change`` is committed.
    """

    change: str
    compatible_since: int | None = None
    indexes: tuple[str, ...] = ()


# How a schema changes: expand, and contract a release later.
#
# A step that is released is never edited. One that is not released takes the changes of everyone until it is. Whenever
# possible ``compatible_since`` is the version before, so that servers are replaced one by one, after `store migrate`:
#
# * expand: add tables; columns that are nullable or have a constant default; indexes that are not unique. Servers of
#   the version before neither read nor write these, so a row without them must mean what it meant before. They insert
#   no value of a new enumeration, and must still decode a row that a newer server wrote;
# * a constraint may go that servers of the version before never count on;
# * no NOT NULL without a default, no CHECK, UNIQUE or foreign key on what they write, no rewrite of a table and no
#   UPDATE of many rows: each holds a lock for as long as it works. Fill in by pages, later, from a command;
# * contract: drop or rename only what no server from ``compatible_since`` on uses: so in a later step than the one that
#   made it superfluous, with the ``compatible_since`` of that one at least.
STEPS: Final = (
    Step(_FIRST),
    Step(_CONFIRMATIONS),
    Step(_EXPAND, compatible_since=2, indexes=_INDEXES),  # not released: add to it
)
"""Step n brings a database of schema version n to version n + 1; an empty database has version 0."""

SCHEMA_VERSION: Final = len(STEPS)
"""The schema version of this release."""

READ_VERSION: Final = (
    "SELECT value, (SELECT value FROM fact WHERE name = 'compatible_since'),"
    " (SELECT value FROM fact WHERE name = 'seal') FROM fact WHERE name = 'schema_version'"
)
"""The statement that reads the schema version of a database, and the oldest version whose servers may use it.

The second is NULL in versions 1 and 2, which have servers of their own version only. The third is the state of the
seal (``_sealing.py``), NULL there, too.
"""
READ_HORIZON: Final = "SELECT value FROM fact WHERE name = 'nonce_horizon'"
"""The statement that reads a fact that each database of ours has."""
_WRITE_VERSION: Final = (
    "UPDATE fact SET value = {version} WHERE name = 'schema_version';"
    "UPDATE fact SET value = {compatible_since} WHERE name = 'compatible_since'"
)
INDEX_STATE: Final = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{name}')"
"""The statement that tells whether an index of PostgreSQL is complete: no row if there is none."""
TABLES: Final[dict[Dialect, str]] = {
    "sqlite": "SELECT name FROM sqlite_master",
    "postgresql": "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
}
"""The statement that lists all tables of a database, ours or not."""

_IS_MISSING: Final[dict[Dialect, str]] = {
    "sqlite": "column1 NOT IN (SELECT name FROM sqlite_master)",
    "postgresql": "to_regclass(column1) IS NULL",
}

_TYPES: Final[dict[Dialect, dict[str, str]]] = {
    "sqlite": {
        "bytes": "BLOB",
        "serial": "INTEGER",
        "room": "",
        # SQLite drops no primary key.
        "gpus": """
CREATE TABLE gpu_again (
  uuid TEXT NOT NULL,
  server_id TEXT NOT NULL REFERENCES server (server_id) ON DELETE CASCADE,
  identifier TEXT NOT NULL,
  declared TEXT NOT NULL
);
INSERT INTO gpu_again SELECT uuid, server_id, identifier, declared FROM gpu;
DROP TABLE gpu;
ALTER TABLE gpu_again RENAME TO gpu;
CREATE INDEX gpu_server ON gpu (server_id)""",
        "head_room": "",
        "alone": "",
        "number": "1 + abs(random() % 9007199254740991)",
    },
    "postgresql": {
        "bytes": "BYTEA",
        "serial": "BIGINT GENERATED ALWAYS AS IDENTITY",
        "number": "1 + CAST(floor(random() * 9007199254740991) AS BIGINT)",
        "gpus": "ALTER TABLE gpu DROP CONSTRAINT gpu_pkey",
        # Every unit holds the weakest lock of this table, so none runs beside a migration.
        "alone": "LOCK TABLE fact IN ACCESS EXCLUSIVE MODE",
        # A new version of a row that does not fit beside the old one is entered in every index, where it conflicts
        # with each transaction that read a neighbour there.
        # Half a page has room for a head of many boots, too. PostgreSQL would move one of 2 kB out of its row, in parts
        # with an index of their own.
        "head_room": "ALTER TABLE head SET (fillfactor = 50, toast_tuple_target = 4000);",
        "room": ";".join(f"ALTER TABLE {table} SET (fillfactor = 50)" for table in ("vm", "boot", "volume")),
    },
}


def compatible_since() -> int:
    """The oldest schema version whose servers may use a database of ours."""
    since = (number if step.compatible_since is None else step.compatible_since for number, step in enumerate(STEPS, 1))
    return max(since)


def schema(dialect: Dialect, since: int = 0) -> Iterator[str]:
    """The statements of the transaction that brings a database from schema version ``since`` to ours, one at a time.

    In PostgreSQL those of `indexes` follow it, unless the database was empty.
    """
    alone = "{alone}" if 0 < since < compatible_since() else ""
    at_once = dialect == "sqlite" or not since
    steps = (part for step in STEPS[since:] for part in (step.change, *(step.indexes if at_once else ())))
    text = ";".join((alone, *steps, _WRITE_VERSION))
    text = text.format(version=len(STEPS), compatible_since=compatible_since(), **_TYPES[dialect])
    return (statement for part in text.split(";") if (statement := part.strip()))


def tables() -> tuple[str, ...]:
    """The tables of our schema version, of which servers of a newer one that we can use keep all."""
    found: dict[str, None] = {}
    for statement in schema("postgresql"):
        if match := re.match(r"(CREATE|DROP) TABLE (\w+)", statement):
            _ = found.setdefault(match[2]) if match[1] == "CREATE" else found.pop(match[2])
    return tuple(found)


def missing_table(dialect: Dialect) -> str:
    """The statement that tells one of our tables that a database lacks, or NULL."""
    names = ", ".join(f"('{table}')" for table in tables())
    return f"SELECT min(column1) FROM (VALUES {names}) AS needed WHERE {_IS_MISSING[dialect]}"  # noqa: S608


def indexes() -> Iterator[tuple[str, str]]:
    """The name of each index that PostgreSQL builds while others write, and the statement that does."""
    parts = (index.partition(" INDEX ") for step in STEPS for index in step.indexes)
    return ((rest.split()[0], f"{create} INDEX CONCURRENTLY {rest}") for create, _, rest in parts)


class LostFactError(Exception):
    """A row of the ``fact`` table is missing: a database of ours has all of them from its first instant."""

    def __init__(self) -> None:
        super().__init__("it is damaged: a row of the table fact is missing; stop the server and restore a backup")
