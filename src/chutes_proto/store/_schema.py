"""The schema of a store for two dialects, and its version.

The version stands in the ``fact`` table. A change of the schema makes another version, and a store of another version
is refused (``_versions.py``).

The names of tables and columns, and the order of these, are those of the row classes (``_rows.py``), and ``mac`` after
them. Types are those that both dialects have: TEXT, BIGINT, BOOLEAN and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

Dialect: TypeAlias = Literal["sqlite", "postgresql"]
"""The SQL that a database understands."""

SCHEMA_VERSION: Final = 1
"""The schema version of this release."""

_TABLES: Final = """
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
  attested TEXT,
  booted TEXT,
  nonce_at BIGINT,
  mac {bytes},
  PRIMARY KEY (hotkey, vm)
);
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
  confirm_digest {bytes},
  confirm_expires_at BIGINT,
  confirm_body_digest {bytes},
  root_confirm_digest {bytes},
  root_confirm_body_digest {bytes},
  root_ca TEXT,
  given BIGINT NOT NULL DEFAULT 0,
  mac {bytes},
  CHECK ((spent_at IS NULL) = (body_digest IS NULL))
);
CREATE TABLE boot_volume (
  boot_id TEXT NOT NULL REFERENCES boot (boot_id),
  volume TEXT NOT NULL,
  position BIGINT NOT NULL,
  current_generation BIGINT,
  next_generation BIGINT,
  in_use BOOLEAN NOT NULL,
  mac {bytes},
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
  mac {bytes},
  PRIMARY KEY (hotkey, vm, volume, generation),
  CHECK ((state = 'purged') = (sealed IS NULL)),
  CHECK ((sealed IS NULL) = (wrapped_key IS NULL) AND (sealed IS NULL) = (kek_id IS NULL)),
  CHECK (state = 'purged' OR (state = 'retired') = (retired_at IS NOT NULL)),
  CHECK ((retired_at IS NULL) = (retirement IS NULL))
);
CREATE TABLE volume (
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  volume TEXT NOT NULL,
  in_use BOOLEAN NOT NULL,
  format_allowed BOOLEAN NOT NULL,
  handed BIGINT,
  mac {bytes},
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
  tcb_status TEXT,
  finding TEXT,
  advisories TEXT,
  mac {bytes},
  CHECK (stage = 'runtime' OR platform_kind IS NOT NULL)
);
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
  window_id TEXT,
  target TEXT,
  mac {bytes},
  UNIQUE (hotkey, name)
);
CREATE TABLE gpu (
  uuid TEXT NOT NULL,
  server_id TEXT NOT NULL REFERENCES server (server_id) ON DELETE CASCADE,
  identifier TEXT NOT NULL,
  declared TEXT NOT NULL,
  mac {bytes}
);
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
  peer_address TEXT NOT NULL,
  evidence TEXT,
  idx BIGINT,
  salt {bytes},
  vm_version BIGINT,
  mac {bytes}
);
CREATE TABLE gpu_device (
  device_id TEXT PRIMARY KEY,
  server_id TEXT NOT NULL REFERENCES server (server_id) ON DELETE CASCADE,
  serial_number TEXT NOT NULL,
  verified_at BIGINT NOT NULL,
  mac {bytes}
);
CREATE TABLE revocation (
  kind TEXT NOT NULL CHECK (kind IN ('vm', 'hotkey', 'platform')),
  subject TEXT NOT NULL,
  reason TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  ends_at BIGINT,
  allowed_at BIGINT,
  mac {bytes},
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
  received_at BIGINT NOT NULL,
  mac {bytes}
);
CREATE TABLE erasure (
  erasure_id TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  vm TEXT NOT NULL,
  erased_at BIGINT NOT NULL,
  through TEXT NOT NULL,
  mac {bytes}
);
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
  mac {bytes},
  PRIMARY KEY (kind, epoch)
);
CREATE TABLE host_profile (
  fingerprint TEXT PRIMARY KEY,
  hotkey TEXT NOT NULL,
  profile TEXT NOT NULL,
  created_at BIGINT NOT NULL,
  name TEXT,
  published TEXT,
  mac {bytes}
);
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
INSERT INTO fact (name, value) VALUES ('schema_version', {version});
INSERT INTO fact (name, value) VALUES ('store_id', {number});
INSERT INTO fact (name, value) VALUES ('nonce_horizon', 0);
INSERT INTO fact (name, value) VALUES ('revocations', 0);
INSERT INTO fact (name, value) VALUES ('seal', 0);
"""

_INDEXES: Final = (
    "CREATE INDEX nonce_redeemed ON nonce (redeemed_at)",
    "CREATE INDEX vm_platform ON vm (platform_kind, platform_id)",
    "CREATE UNIQUE INDEX generation_active ON generation (hotkey, vm, volume) WHERE state = 'active'",
    "CREATE UNIQUE INDEX generation_candidate ON generation (hotkey, vm, volume) WHERE state = 'candidate'",
    "CREATE INDEX attestation_platform ON attestation (platform_kind, platform_id, created_at)",
    "CREATE INDEX attestation_registration ON attestation (registration, created_at)",
    "CREATE INDEX gpu_server ON gpu (server_id)",
    "CREATE UNIQUE INDEX boot_confirm ON boot (confirm_digest)",
    "CREATE INDEX generation_kek ON generation (kek_id)",
    "CREATE INDEX gpu_device_server ON gpu_device (server_id)",
    # The newest boot of a VM, or from an address, without a look at the others.
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
    # A declared GPU: its uuid is not an identity.
    "CREATE UNIQUE INDEX gpu_declared ON gpu (uuid, server_id)",
    # The log: an entry by its index, of which there is one, and the rows that are not sequenced yet, which are few.
    "CREATE UNIQUE INDEX audit_idx ON audit (idx) WHERE idx IS NOT NULL",
    "CREATE INDEX audit_unsequenced ON audit (id) WHERE idx IS NULL",
    # The newest version of a VM's head that the log knows; only the sequencer, which conflicts with nobody, writes it.
    "CREATE INDEX audit_version ON audit (hotkey, vm, vm_version) WHERE idx >= 0",
)

READ_VERSION: Final = (
    "SELECT value, (SELECT value FROM fact WHERE name = 'seal') FROM fact WHERE name = 'schema_version'"
)
"""The statement that reads the schema version of a database, and the state of its seal (``_sealing.py``)."""
READ_HORIZON: Final = "SELECT value FROM fact WHERE name = 'nonce_horizon'"
"""The statement that reads a fact that each database of ours has."""
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
    "sqlite": {"bytes": "BLOB", "serial": "INTEGER", "number": "1 + abs(random() % 9007199254740991)"},
    "postgresql": {
        "bytes": "BYTEA",
        "serial": "BIGINT GENERATED ALWAYS AS IDENTITY",
        "number": "1 + CAST(floor(random() * 9007199254740991) AS BIGINT)",
    },
}

_ROOM: Final[dict[Dialect, tuple[str, ...]]] = {
    "sqlite": (),
    "postgresql": (
        # A new version of a row that does not fit beside the old one is entered in every index, where it conflicts
        # with each transaction that read a neighbour there.
        *(f"ALTER TABLE {table} SET (fillfactor = 50)" for table in ("vm", "boot", "volume")),
        # Half a page has room for a head of many boots, too. PostgreSQL would move one of 2 kB out of its row, in parts
        # with an index of their own.
        "ALTER TABLE head SET (fillfactor = 50, toast_tuple_target = 4000)",
    ),
}


def schema(dialect: Dialect) -> Iterator[str]:
    """The statements of the transaction that makes the schema in an empty database, one at a time."""
    text = _TABLES.format(version=SCHEMA_VERSION, **_TYPES[dialect])
    yield from (statement for part in text.split(";") if (statement := part.strip()))
    yield from _INDEXES
    yield from _ROOM[dialect]


def tables() -> tuple[str, ...]:
    """The tables of the schema."""
    return tuple(re.findall(r"CREATE TABLE (\w+)", _TABLES))


def missing_table(dialect: Dialect) -> str:
    """The statement that tells one of our tables that a database lacks, or NULL."""
    names = ", ".join(f"('{table}')" for table in tables())
    return f"SELECT min(column1) FROM (VALUES {names}) AS needed WHERE {_IS_MISSING[dialect]}"  # noqa: S608


class LostFactError(Exception):
    """A row of the ``fact`` table is missing: a database of ours has all of them from its first instant."""

    def __init__(self) -> None:
        super().__init__("it is damaged: a row of the table fact is missing; stop the server and restore a backup")
