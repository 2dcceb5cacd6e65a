"""A sealed store against whoever can write its database: he gets no key, and what he did is named."""

from __future__ import annotations

import gc
import hmac
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import msgspec
import psycopg
import pytest
from attrs import define, evolve, field, frozen
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chutes_proto.errors import KeyUnavailable, LogError, Refusal, RowNotAuthentic, StoreBusy, StoreError
from chutes_proto.io.log_files import check_stored
from chutes_proto.io.server import scrub
from chutes_proto.io.server.scrub import scrub_heads
from chutes_proto.io.server.store_setup import check_keys
from chutes_proto.io.stores import sealing
from chutes_proto.io.stores.address import StorePlace
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.io.stores.sealing import begin_epoch, end_epoch, find_faults, require_keys
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _guard, _guard_sql
from chutes_proto.store import _rows as rows
from chutes_proto.store import _sql as sql
from chutes_proto.store._audit_rows import judged
from chutes_proto.store._custody import Custody
from chutes_proto.store._guard import Guard
from chutes_proto.store._heads import RECENT_BOOTS
from chutes_proto.store._inspection import InspectRows
from chutes_proto.store._macs import EpochKey, epoch_of
from chutes_proto.store._mark import Mark
from chutes_proto.store._run import Ask, Store, Unit, unit_name
from chutes_proto.store._sealing import SEALED, ReadEpochs
from chutes_proto.store._sql import columns
from chutes_proto.store._store_group import StoreGroup
from chutes_proto.testing.store_suite._parts import NOW, VAULT, boot, read, sync
from chutes_proto.tlog.notes import Checkpoint
from chutes_proto.units.boot import REFUSALS_PER_DAY, GrantBoot, RecordRefusal
from chutes_proto.units.custody import ENTROPY_SIZE, BeginNewEpoch, FindGone
from chutes_proto.units.erasure import EraseVm
from chutes_proto.units.log import ROWS_FORGED, SALT_SIZE, ReadCheckpoint, SequenceLog
from chutes_proto.units.operator import AllowFormat, BindVm, PurgeBoots, RewrapKeys, StoreRestored
from chutes_proto.units.revocations import Allow, ReadRevocations, Revoke
from tests.conftest import SOAK
from tests.store.memory import SealedStore

A = rows.Vm("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY", "vm-a")
B = rows.Vm("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY", "vm-b")
VMS = (A, B)
A_KEY = (A.hotkey, A.name)

NO_DELETION = {"attestation", "server", "gpu", "gpu_device", "evidence", "erasure", "host_profile"}
"""Tables whose rows have a MAC and nothing that tells of a deletion, or of an older version: they release no key."""
OF_LOG = {"audit", "log_state", "log_tile"}
"""Tables that `audit verify` reads."""
SERVER = rows.ServerRow("s1", "r1", A.hotkey, A.name, "host", "192.0.2.1", None, None, NOW)


def granted(label: str, vm: rows.Vm, at: int) -> GrantBoot:
    return boot(f"{label} of {vm.name}", now=NOW + at, vm=vm)


def fill(store: Store) -> None:
    """Two VMs with keys and one unused token each, and a row of every kind."""
    for vm in VMS:
        first = granted("first", vm, 0)
        store.transact(first)
        store.transact(sync(first, f"one of {vm.name}", "storage", "cache"))
        second = granted("second", vm, 100)
        store.transact(second)
        store.transact(sync(second, f"two of {vm.name}", "storage", "cache", rekey=("cache",)))
    for row in (
        SERVER,
        rows.GpuRow("u1", "s1", "h100", "{}"),
        rows.GpuDeviceRow("d1", "s1", "1", NOW),
        rows.EvidenceRow("e1", A, "a1", None, b"quote", "{}", NOW),
        rows.ErasureRow("x1", rows.Vm("hotkey", "gone"), NOW, "{}"),
        rows.HostProfileRow("f1", A.hotkey, "{}", NOW),
    ):
        store.transact(Ask(rows.Insert(row)))
    store.transact(Revoke(NOW, 7, "hotkey", "other", None, "test"))


def go_on(store: Store) -> None:
    """The life after the state to which an attacker goes back: other keys, and one unused token each."""
    for vm in VMS:
        third = granted("third", vm, 200)
        store.transact(third)
        store.transact(sync(third, f"three of {vm.name}", "storage", "cache", rekey=("storage",)))
        store.transact(granted("unused", vm, 300))
    store.transact(Revoke(NOW, 8, "hotkey", "another", None, "test"))
    store.transact(Ask(rows.Put(evolve(SERVER, address="192.0.2.2"))))


@frozen
class Outcome:
    """The passphrases that each VM got, and the tables whose rows were refused."""

    keys: dict[rows.Vm, set[bytes]]
    refused: set[str]


def use(store: Store) -> Outcome:
    """Let both VMs sync with their unused token, boot, sync and read again."""
    keys: dict[rows.Vm, set[bytes]] = {vm: set() for vm in VMS}
    refused: set[str] = set()

    def attempt(vm: rows.Vm, unit: Any) -> None:
        try:
            got = store.transact(unit)
        except RowNotAuthentic as exc:
            refused.add(exc.table)
        except KeyUnavailable:
            refused.add("keyring")
        except Refusal:
            pass
        except StoreError as exc:
            is_of_database = isinstance(exc.__cause__, sqlite3.Error | psycopg.Error)  # which does not take a statement
            refused.update([] if is_of_database else ["fact"])
        else:
            secrets = [secret for _, secret in got.passphrases] if hasattr(got, "passphrases") else []
            root = getattr(got, "root", None)
            secrets += [each for each in (root, got) if isinstance(each, Secret)]
            keys[vm] |= {secret.reveal() for secret in secrets}

    for vm in VMS:
        unused, last = granted("unused", vm, 300), granted("last", vm, 400)
        attempt(vm, sync(unused, f"four of {vm.name}", "storage", "cache"))
        attempt(vm, sync(granted("third", vm, 200), f"three of {vm.name}", "storage", "cache", rekey=("storage",)))
        attempt(vm, last)
        attempt(vm, read(last, "storage"))
        attempt(vm, sync(last, f"five of {vm.name}", "storage", "cache", rekey=("cache",)))
    return Outcome(keys, refused)


def everything(store: Store) -> dict[rows.Vm, set[bytes]]:
    """The passphrases of each VM, in every generation."""
    found: dict[rows.Vm, set[bytes]] = {vm: set() for vm in VMS}
    from chutes_proto.keys.vault import Address

    for row in store.transact(Ask(rows.Scan(rows.GenerationRow))):
        if row.sealed is not None:
            found[row.vm].add(VAULT.open(Address(row.vm, row.volume, row.generation), row).reveal())
    return found


@cache
def images() -> tuple[bytes, bytes]:
    """A filled store, and the same later."""
    store = SealedStore(VAULT)
    fill(store)
    before = store.image()
    go_on(store)
    while store.transact(SequenceLog(bytes(SALT_SIZE * 100), "test")):
        pass
    return before, store.image()


# --- every edit of a row ---


KEYS: dict[str, tuple[str, ...]] = {
    "fact": ("name",),
    "head": ("hotkey", "vm"),
    "store_head": ("name",),
    "audit": ("id",),
    **{kind.TABLE: kind.KEY for kind in rows.ROWS if kind.KEY},
}
"""All tables, and their primary keys."""
ONE_ROW = "store_head"
"""Of this table one row is read, and there is nothing that another one could be taken for."""
WHOLE = {"volume", "generation", "boot_volume", "revocation"}
"""Tables of which a decision reads all rows of a VM, a boot or the store: one too many is noticed, too."""

UNUSED = {("keyring", "created_at"), ("keyring", "mac")}
"""Columns of rows that decide which `use` does not read: the wrapping of the key of MACs is authentic by itself."""


def decides(table: str, row: dict[str, Any]) -> bool:
    """Whether `use` reads this row before it hands out a key."""
    match table:
        case "head" | "store_head" | "vm" | "volume" | "revocation":
            return True
        case "fact":
            return row["name"] in {"nonce_horizon", "revocations", "seal"}
        case "keyring":
            return str(row["kind"]) == "rows"
        case "generation":
            return str(row["state"]) == "active"
        case "boot":
            return row["boot_id"] in {granted(label, vm, 0).boot_id for label in ("third", "unused") for vm in VMS}
        case "boot_volume":  # of the sync that is repeated
            return row["boot_id"] in {granted("third", vm, 0).boot_id for vm in VMS}
        case _:
            return False


@frozen
class Edit:
    """One change of one row, or of two."""

    table: str
    what: str
    statements: tuple[tuple[str, tuple[Any, ...]], ...]
    kind: str = ""
    """What is done to the row, or which column is changed."""
    decides: bool = False
    """Whether `use` reads what is changed before it hands out a key."""

    @property
    def is_covered(self) -> bool:
        """Whether it must be noticed: the others are in the page on custody."""
        match self.table:
            case "nonce":
                return False
            case "audit":  # its index says what its place is, and its hash in the tree what it is
                return self.kind not in {"id", "mac", "swapped"}
            case "log_tile":  # one that the tree does not have is not read
                return self.kind != "doubled"
            case _:
                return not (self.table in NO_DELETION and self.kind in {"deleted", "set back"})


Contents = dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]
"""The columns and rows of each table, in the order of the keys."""


def contents(connection: Any) -> Contents:
    """What is in a database now."""
    found: Contents = {}
    for table, key in KEYS.items():
        cursor = connection.execute(f"SELECT * FROM {table} ORDER BY {', '.join(key)}")
        found[table] = tuple(each[0] for each in cursor.description), [tuple(row) for row in cursor.fetchall()]
    return found


def other(value: Any) -> Iterator[Any]:
    """Other values of the same type; the database refuses some by itself."""
    match value:
        case None:
            yield from (1, "x", b"x")
        case bool():
            yield from (not value, None)
        case int():
            yield from (value + 1, 1 - value, None)
        case str():
            words = ("retired", "active", "candidate", "two-phase", "base", "ppid", "vm", "platform", "runtime")
            yield from (f"{value}x", *(word for word in words if word != value), None)
        case _:
            yield from (bytes((value[0] ^ 1,)) + value[1:] if value else b"x", None)


def edits(now: Contents, before: Contents, *, thorough: bool) -> Iterator[Edit]:
    """Every row changed, deleted, doubled, swapped, given another one's place, and set back.

    ``thorough``: in every row, and every column to several values.
    """
    for table, key in KEYS.items():
        names, found = now[table]
        places = [names.index(name) for name in key]
        where = " AND ".join(f"{name} = ?" for name in key)
        delete = f"DELETE FROM {table} WHERE {where}"
        insert = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"

        def key_of(row: Sequence[Any], places: list[int] = places) -> tuple[Any, ...]:
            return tuple(row[at] for at in places)

        def put(*rows: Sequence[Any], delete: str = delete, insert: str = insert) -> Any:
            """In place of those of these keys."""
            return (*((delete, key_of(row)) for row in rows), *((insert, tuple(row)) for row in rows))

        reads = [decides(table, dict(zip(names, row, strict=True))) for row in found]
        chosen = max((at for at, is_read in enumerate(reads) if is_read), default=len(found) - 1)
        old = {key_of(row): row for row in before[table][1]}
        for at, (row, is_read) in enumerate(zip(found, reads, strict=True)):
            if not thorough and 2 < at != chosen:
                continue

            def edit(kind: str, statements: Any, *, to: str = "", is_read: bool = is_read, row: Any = row) -> Edit:
                return Edit(table, f"{table} {row[:4]}: {kind}{to}", statements, kind, is_read)  # noqa: B023

            if thorough or at == chosen:
                for name, value in zip(names, row, strict=True):
                    for to in list(other(value))[: None if thorough else 1]:
                        text = f"UPDATE {table} SET {name} = ? WHERE {where}"
                        is_used = is_read and (table, name) not in UNUSED
                        yield edit(name, ((text, (to, *key_of(row))),), to=f" = {to!r}", is_read=is_used)
                double = list(row)
                double[places[-1]] = next(other(row[places[-1]]))
                if table != ONE_ROW:
                    yield edit("doubled", put(double), is_read=is_read and table in WHOLE)
                if at:  # all but their keys
                    one, two = list(row), list(found[at - 1])
                    for place in places:
                        one[place], two[place] = two[place], one[place]
                    if set(map(tuple, (one, two))) != {row, found[at - 1]}:
                        yield edit("swapped", put(one, two))
            yield edit("deleted", ((delete, key_of(row)),))
            if old.get(key_of(row), row) != row:
                yield edit("set back", put(old[key_of(row)]))
            if "vm" in names and "hotkey" in names:
                moved = [B.name if value == A.name else A.name if value == B.name else value for value in row]
                if tuple(moved) != row:
                    yield edit("moved", put(moved))


@define
class Trial:
    """What became of edits: no VM may get a key of another one's.

    Where a decision reads what was edited, it is refused; each other edit is refused or named.
    """

    own: dict[rows.Vm, set[bytes]]
    checkpoint: Checkpoint | None
    """Of the log before, as it is kept outside the database."""
    tried: int = 0
    refused: int = 0
    named: int = 0
    silent: int = 0

    def judge(self, edit: Edit, store: Store) -> None:
        """Use the store that has been edited."""
        self.tried += 1
        try:
            faults: list[object] = [*find_faults(store)]
            if edit.table in OF_LOG and self.checkpoint is not None:
                report = check_stored(store, self.checkpoint.size, [self.checkpoint], lambda *_: None)
                faults += report.findings
        except (StoreError, LogError) as exc:
            faults = [exc]
        outcome = use(store)
        for vm, of_other in ((A, B), (B, A)):
            assert not outcome.keys[vm] & self.own[of_other], f"{edit.what}: {vm.name} got a key of {of_other.name}"
        self.refused += bool(outcome.refused)
        self.named += bool(faults)
        assert outcome.refused or not edit.decides, f"{edit.what}: it is not refused"
        if not faults and not outcome.refused:
            self.silent += 1
            assert not edit.is_covered, f"{edit.what}: nothing tells of it"

    def __str__(self) -> str:
        return f"{self.tried} edits: {self.refused} refused, {self.named} named, {self.silent} without effect on keys"


def test_no_edit_of_any_row_releases_a_key() -> None:
    """Each is refused where a decision reads the row, and else named; and no VM gets a key of another one's."""
    before, now = images()
    before_store, now_store = SealedStore(VAULT, before), SealedStore(VAULT, now)
    trial = Trial(everything(now_store), now_store.transact(ReadCheckpoint()))
    store = SealedStore(VAULT, now)
    for edit in edits(contents(now_store.connection), contents(before_store.connection), thorough=SOAK):
        store.connection.deserialize(now)
        store.connection.execute("PRAGMA foreign_keys = 0")
        try:
            for statement in edit.statements:
                store.connection.execute(*statement)
        except sqlite3.Error:  # the database itself does not take it
            continue
        assert store.image() != now, edit.what
        store.custody = Custody("memory")
        store.custody.hold(VAULT.unwrap)
        store.custody.require_epoch(1)  # as the mark of a server does
        trial.judge(edit, store)
    assert trial.tried > 150
    assert trial.refused > 100
    print(trial)


@pytest.mark.parametrize("table", sorted(KEYS))
def test_a_value_of_another_type_ends_no_server(table: str, tmp_path: Path) -> None:
    """SQLite takes any type in any column. It is a fault of the store, which says what to do, and not a defect."""
    now = images()[1]
    sealed = SealedStore(VAULT, now)
    names, found = contents(sealed.connection)[table]
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT, mark_file=tmp_path / "mark")
    (tmp_path / "keys.db").write_bytes(now)
    with closing(place.open()) as store:
        store.keep_mark()
        state = store.transact(ReadCheckpoint())
        assert state is not None
    kept = (tmp_path / "mark").read_bytes()
    where = " AND ".join(f"{name} = ?" for name in KEYS[table])
    chosen = found if table in {"fact", "keyring"} else found[-1:]
    for row in chosen:
        key = tuple(row[names.index(name)] for name in KEYS[table])
        for name, value in zip(names, row, strict=True):
            for each in tmp_path.iterdir():
                each.unlink()
            (tmp_path / "keys.db").write_bytes(now)
            (tmp_path / "mark").write_bytes(kept)
            with closing(sqlite3.connect(tmp_path / "keys.db", isolation_level=None)) as attacker:
                attacker.execute("PRAGMA ignore_check_constraints = 1")
                with suppress(sqlite3.IntegrityError):  # of the numbers of rows, which have their type
                    other_value = "text" if isinstance(value, bytes) else b"\xff"
                    attacker.execute(f"UPDATE {table} SET {name} = ? WHERE {where}", (other_value, *key))
            with suppress(StoreError), closing(place.open()) as store:
                store.keep_mark()
                store.hold_checkpoint(state)
                use(store)
                with suppress(LogError):
                    store.transact(SequenceLog(bytes(SALT_SIZE * 100)))
                with suppress(StoreError):
                    check_keys(store, VAULT)
                with suppress(StoreError):
                    store.transact(StoreRestored(NOW + 500, "test"))
                _ = store.transact(Ask(rows.ReadNames("vm-a"))), store.transact(Ask(rows.ReadUnclaimed(None, 9)))
                with suppress(StoreError, LogError):
                    check_stored(store, state.size, [state], lambda *_: None)
                _ = [*find_faults(store)]
            _ = Mark.from_bytes((tmp_path / "mark").read_bytes())


def test_a_text_that_is_not_utf_8_stops_its_own_vm_alone(tmp_path: Path) -> None:
    """SQLite takes such a text, too. Each look at the store reads the newest audit rows, so one stopped all VMs."""
    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT, mark_file=tmp_path / "mark")
    (tmp_path / "keys.db").write_bytes(images()[1])
    with closing(place.open()) as store:
        run(place, "UPDATE vm SET attested = CAST(X'FF' AS TEXT) WHERE vm = 'vm-b'")
        run(place, "UPDATE boot SET profile_name = CAST(X'FF' AS TEXT) WHERE vm = 'vm-b'")
        values = "1, 'vm', CAST(X'FF' AS TEXT), 'done', '', '', ''"
        run(place, f"INSERT INTO audit (at, actor, event, decision, reason, keys, peer_address) VALUES ({values})")
        store.keep_mark()
        store.transact(granted("last", A, 400))
        with pytest.raises(RowNotAuthentic):
            store.transact(granted("last", B, 400))
        assert {fault.table for fault in find_faults(store)} == {"audit", "boot", "vm"}
        sequence(store)
        assert store.transact(Ask(rows.ReadAudit(1 << 62, 1, backwards=True)))[0][1].event == ROWS_FORGED
    place.open().close()


PART = 1 if SOAK else 25


def test_no_edit_of_a_row_in_postgresql_releases_a_key(empty_schema: str, tmp_path: Path) -> None:
    """The same there; `make soak` makes all of them."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    with psycopg.connect(empty_schema, autocommit=True) as attacker:
        _ = attacker.execute("SET session_replication_role = replica")  # an owner of the tables needs no references
        with closing(place.open(make=True)) as store:
            fill(store)
            before = contents(attacker)
            go_on(store)
            sequence(store)
            trial = Trial(everything(store), store.transact(ReadCheckpoint()))
        listed = attacker.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        tables = [name for (name,) in listed]
        for table in tables:
            _ = attacker.execute(f"CREATE TABLE kept_{table} AS SELECT * FROM {table}".encode())
        for edit in [*edits(contents(attacker), before, thorough=SOAK)][::PART]:
            for table in tables:
                restore = f"DELETE FROM {table}; INSERT INTO {table} OVERRIDING SYSTEM VALUE TABLE kept_{table}"
                _ = attacker.execute(restore.encode())
            try:
                with attacker.transaction():
                    for text, values in edit.statements:
                        _ = attacker.execute(text.replace("?", "%s").encode(), values)
            except psycopg.Error:  # the database itself does not take it
                continue
            try:
                store = place.open()
            except StoreError:
                trial.tried += 1
                trial.refused += 1
                continue
            with closing(store):
                store.custody.require_epoch(1)
                trial.judge(edit, store)
    assert trial.refused
    assert trial.named
    print(trial)


def flips(value: Any) -> Iterator[Any]:
    """The value with one of its bits changed, each once; what is not a text then is left out."""
    match value:
        case int():
            yield from (value ^ 1 << bit for bit in range(63))
        case str():
            for each in flips(value.encode()):
                with suppress(UnicodeDecodeError):
                    yield each.decode()
        case bytes():
            whole = int.from_bytes(value, "big")
            yield from ((whole ^ 1 << bit).to_bytes(len(value), "big") for bit in range(8 * len(value)))


def test_every_bit_of_a_row_that_has_a_mac_counts() -> None:
    store = SealedStore(VAULT, images()[1])
    store.transact(Ask(rows.Insert(rows.AuditRow(NOW, "operator", "event", "done", "reason", A, keys="keys"))))

    def read(_op: object, text: str, values: tuple[Any, ...] = ()) -> list[Any]:
        return store.connection.execute(text, values).fetchall()

    state = read(None, sql.READ_VERSION)[0][1]
    session = store.custody.session(state, lambda text: read(None, text))
    guard = Guard(session, read)

    def check_row(kind: type[rows.Row], row: Any) -> None:
        guard.of_store.check(kind, (row,))

    whole: list[tuple[str, tuple[Any, ...], Callable[[Any], object]]] = []
    for kind in SEALED:
        (row,) = read(None, *sql.statement(rows.ReadPage(kind, None, 1)))
        whole.append((kind.TABLE, row, partial(check_row, kind)))

    def judge(row: Any) -> None:
        if judged(guard.of_store, [(7, *row)]) != [(7, *row)]:
            raise RowNotAuthentic("audit", "7", "")

    def open_store_head(stored: Any) -> None:
        _ = StoreGroup(session, read).head(stored)

    whole.append(("audit", read(None, *sql.statement(rows.ReadUnsequenced(1)))[0][1:], judge))
    whole.append(
        (
            "head",
            read(None, _guard_sql.READ_HEAD, (*A_KEY, *A_KEY))[0][1:],
            lambda row: guard.of_vms.opened(A_KEY, (None, *row)),
        )
    )
    whole.append(("store_head", read(None, _guard_sql.READ_STORE_HEAD)[0], open_store_head))
    flipped = 0
    for table, row, use_row in whole:
        use_row(row)
        for at, value in enumerate(row):
            for other_value in flips(value):
                flipped += 1
                try:
                    use_row((*row[:at], other_value, *row[at + 1 :]))
                except RowNotAuthentic:
                    continue
                pytest.fail(f"{table}, column {at}: {other_value!r} for {value!r}")
    assert flipped > 10_000


def test_half_of_the_macs_are_missing() -> None:
    store = SealedStore(VAULT, images()[1])
    store.connection.execute("PRAGMA foreign_keys = 0")
    removed = 0
    for kind in SEALED:
        removed += store.connection.execute(f"UPDATE {kind.TABLE} SET mac = NULL WHERE rowid % 2").rowcount
    faults = [fault for fault in find_faults(store) if fault.why == "it has no MAC"]
    assert removed >= len(SEALED)
    assert len({(fault.table, fault.key) for fault in faults}) == removed
    own, outcome = everything(SealedStore(VAULT, images()[1])), use(store)
    assert outcome.refused
    assert not outcome.keys[A] & own[B]
    assert not outcome.keys[B] & own[A]


@pytest.mark.parametrize("width", [1, 12, 13, 15, 16, 30])
def test_a_mac_is_the_hmac_of_its_message(width: int) -> None:
    """As docs and other programs may compute it, whatever is hashed beforehand."""
    key = HKDF(SHA256(), 32, None, b"chutes-proto custody").derive(bytes(32))
    values = ("x" * 300, None, True, 7, b"y")[:width] + (-1,) * (width - 5)
    message = msgspec.msgpack.encode(["row", 1, "table", *values])
    right = struct.pack(">BI", 1, 258) + hmac.digest(key, message, "sha256")[:16]
    epoch_key = EpochKey(258, Secret(bytes(32)))
    assert [epoch_key.of_row("table", values) for _ in range(2)] == [right, right]
    assert epoch_key.mac("row", "table", *values) == right


# --- real stores ---

check = StoreGroup.check
OTHER_KEK = KeyEncryptionKey.from_bytes(bytes(range(1, 33)))
BOTH = Vault(OTHER_KEK, VAULT.current)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> StorePlace:
    address: str = "sqlite:keys.db" if request.param == "sqlite" else request.getfixturevalue("empty_schema")
    return StorePlace(address, tmp_path, vault=VAULT)


def run(place: StorePlace, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement as one who can write the database."""
    if place.path is not None:
        with closing(sqlite3.connect(place.path)) as file, file:
            return file.execute(statement).fetchall()
    with psycopg.connect(place.address) as connection:
        _ = connection.execute("SET session_replication_role = replica")  # an owner of the tables needs no references
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def sequence(store: Store) -> None:
    while store.transact(SequenceLog(bytes(SALT_SIZE * 100), "test")):
        pass


def test_a_new_store_is_sealed_and_a_changed_row_stops_its_vm_alone(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        require_keys(store)
        fill(store)
        run(place, f"UPDATE vm SET proven = TRUE WHERE vm = '{A.name}'")
        for label in ("third", "fourth"):
            with pytest.raises(RowNotAuthentic, match=r"vm-a of table vm is not authentic: its MAC .*store check"):
                store.transact(granted(label, A, 200))
        store.transact(granted("third", B, 200))
        assert store.custody.faults == {"vm": 2}
        assert [fault.table for fault in find_faults(store)] == ["vm", "vm"]


def test_a_unit_in_a_snapshot_writes_nothing(place: StorePlace) -> None:
    """It would write heads that are newer than those that are remembered."""
    with closing(place.open(make=True)) as store:
        fill(store)
        with pytest.raises(StoreError, match=r"read-?only"), store.snapshot() as snapshot:
            snapshot.transact(granted("third", A, 200))
        store.transact(granted("third", A, 200))


@pytest.mark.parametrize("vms", [1, 2, 200])
def test_faults_are_found_in_every_page_of_vms(place: StorePlace, vms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_VMS", vms)
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        assert not list(find_faults(store))
        run(place, f"DELETE FROM volume WHERE vm = '{A.name}' AND volume = 'cache'")
        run(place, f"DELETE FROM generation WHERE vm = '{A.name}' AND volume = 'cache' AND generation = 1")
        run(place, f"DELETE FROM boot WHERE vm = '{B.name}' AND created_at = {NOW + 100}")
        rest = ", ".join(columns(rows.VmRow)[2:])
        run(place, f"INSERT INTO vm SELECT hotkey, 'vm-0', {rest}, mac FROM vm WHERE vm = '{B.name}'")
        run(place, f"DELETE FROM vm WHERE vm = '{B.name}'")
        run(place, "INSERT INTO head SELECT 'other', vm, version, contents, mac FROM head WHERE vm = 'vm-a'")
        found = sorted((fault.table, fault.key.removeprefix(f"{A.hotkey}/")) for fault in find_faults(store))
    assert found == [
        ("boot", f"vm-b/{granted('second', B, 100).boot_id}"),
        ("generation", "vm-a/cache/1"),
        ("head", "other/vm-a"),
        ("vm", "vm-0"),  # it has no MAC of its own,
        ("vm", "vm-0"),  # and no VM has that name
        ("vm", "vm-b"),
        ("volume", "vm-a/cache"),
    ]


def test_the_largest_number_that_a_generation_can_have_is_a_fault_like_others(place: StorePlace) -> None:
    """To count up to it would take all memory, of each server that scrubs."""
    with closing(place.open(make=True)) as store:
        fill(store)
        run(place, f"UPDATE generation SET generation = {2**63 - 1} WHERE vm = '{A.name}' AND generation = 1")
        found = [fault.key for fault in find_faults(store) if fault.table == "generation"]
    assert f"{A.hotkey}/vm-a/cache/1" in found
    assert len(found) < 1000


def changed(value: Any, name: str, *, is_sqlite: bool) -> str:
    """The expression of another value of the same type, in either dialect."""
    match value:
        case bool():
            return f"NOT {name}"
        case int():
            return f"{name} + 1"
        case str():
            return f"{name} || 'x'"
        case _:
            return f"CAST({name} || x'00' AS BLOB)" if is_sqlite else f"{name} || '\\x00'::bytea"


def test_every_column_of_every_table_is_authenticated_in_both_databases(place: StorePlace) -> None:
    """Their drivers give the same rows. A sample of the columns; all of them at length."""
    is_thorough, tried = SOAK, 0
    with closing(place.open(make=True)) as store:
        fill(store)
        for kind in SEALED:
            found = run(place, f"SELECT {', '.join(columns(kind))} FROM {kind.TABLE}")
            back = copied(place, kind.TABLE)
            for at, name in enumerate(columns(kind)):
                value = next((row[at] for row in found if row[at] is not None), None)
                if value is None or (at % 4 and not is_thorough):
                    continue
                expression = changed(value, name, is_sqlite=place.path is not None)
                try:
                    run(place, f"UPDATE {kind.TABLE} SET {name} = {expression} WHERE {name} IS NOT NULL")
                except (sqlite3.Error, psycopg.Error):  # the database itself does not take it
                    continue
                faults, _ = store.transact(Ask(InspectRows(kind, None, 1000)))
                changed_rows = sum(row[at] is not None for row in found)
                assert len([each for each in faults if each.table == kind.TABLE]) == changed_rows, (kind, name)
                tried += 1
                back()
        assert tried > (80 if is_thorough else 20)
        assert not list(find_faults(store))


@pytest.mark.parametrize(
    "forged",
    [
        "UPDATE vm SET last_boot_at = last_boot_at - 1 WHERE vm = 'vm-b'",
        "UPDATE boot SET profile_version = '9.9.9' WHERE vm = 'vm-b'",
        "UPDATE attestation SET tcb_status = 'UpToDate', advisories = '[]' WHERE vm = 'vm-b'",
    ],
)
def test_no_forged_row_says_what_a_vm_runs_on(place: StorePlace, forged: str) -> None:
    """An operator reads in the list of VMs which of them need another image, or other firmware."""
    with closing(place.open(make=True)) as store:
        fill(store)
        assert [each.profile_version for each in store.transact(Ask(rows.ReadFleet(None, 9)))] == ["1.0", "1.0"]
        run(place, forged)
        assert len(store.transact(Ask(rows.ReadFleet(None, 1)))) == 1
        with pytest.raises(RowNotAuthentic):
            store.transact(Ask(rows.ReadFleet(None, 9)))


def test_a_forged_boot_opens_nothing(place: StorePlace) -> None:
    """One row, made by hand, and a sync without a certificate."""
    with closing(place.open(make=True)) as store:
        fill(store)
        unused = granted("forged", A, 300)
        names = "boot_id, hotkey, vm, platform_kind, platform_id, certificate, profile_name, profile_version, exchange"
        names += ", quote_digest, token_expires_at, token_needs_certificate, peer_address, created_at, given, mac"
        digest = f"x'{unused.token_digest.hex()}'" if place.path else f"'\\x{unused.token_digest.hex()}'::bytea"
        new = names.replace("boot_id", "'forged'").replace("token_expires_at", str(NOW + 900))
        run(
            place,
            f"INSERT INTO boot ({names}, token_digest) SELECT {new}, {digest} FROM boot WHERE vm = '{A.name}' LIMIT 1",
        )
        with pytest.raises(RowNotAuthentic, match="row forged of table boot"):
            store.transact(evolve(sync(unused, "body", "storage"), certificate=None))


def test_a_deleted_boot_is_not_an_unknown_token(place: StorePlace) -> None:
    """A 401 would power the VM off."""
    with closing(place.open(make=True)) as store:
        fill(store)
        unused = granted("unused", A, 300)
        store.transact(unused)
        run(place, f"DELETE FROM boot WHERE boot_id = '{unused.boot_id}'")
        with pytest.raises(RowNotAuthentic, match="it is missing"):
            store.transact(sync(unused, "body", "storage"))


def test_forged_verdicts_use_up_the_limit_of_a_day_and_are_named(place: StorePlace) -> None:
    """The limit counts rows without reading them: further denials are not recorded."""
    refused = RecordRefusal(NOW, "r1", A, boot("1").platform, "tcb_rejected", "old", b"digest", "192.0.2.1")
    with closing(place.open(make=True)) as store:
        assert store.transact(refused)
        others = ", ".join((*columns(rows.AttestationRow)[1:], "mac"))
        numbers = ", ".join(f"({number})" for number in range(1, REFUSALS_PER_DAY))
        run(
            place,
            f"INSERT INTO attestation (attestation_id, {others})"
            f" SELECT 'forged ' || column1, {others} FROM (VALUES {numbers}) AS numbers CROSS JOIN attestation",
        )
        assert not store.transact(evolve(refused, request_id="r2"))
        forged = [fault for fault in find_faults(store) if fault.table == "attestation"]
        assert len(forged) == REFUSALS_PER_DAY - 1


def test_forged_rows_of_the_operators_page_are_believed(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        require_keys(store)
        run(place, f"INSERT INTO what_if VALUES ('last', {NOW}, '{{}}')")
        run(place, f"INSERT INTO key_server VALUES ('forged', '1.0', '{{}}', {NOW})")
        assert store.transact(Ask(rows.ReadWhatIf())) == rows.WhatIf(NOW, "{}")
        assert store.transact(Ask(rows.ReadKeyServers(0))) == (rows.KeyServer("forged", "1.0", "{}", NOW),)
        assert not [*find_faults(store)]


def test_a_boot_that_many_others_followed_is_found_by_its_id_and_opens_nothing() -> None:
    """A server that was registered from it stays bound to its VM, also when the others are purged."""
    store = SealedStore(VAULT)
    boots = [granted(f"boot {number}", A, 20 * number) for number in range(40)]
    for each in boots:
        store.transact(each)
    early, *others, _ = boots
    for _ in range(2):
        found = store.transact(Ask(rows.Read(rows.BootRow, early.boot_id)))
        assert found is not None
        assert found.vm == A
        with pytest.raises((Refusal, RowNotAuthentic)):
            store.transact(sync(early, "body", "storage"))
        store.transact(Ask(rows.Delete(rows.BootRow, tuple(each.boot_id for each in others))))


def test_of_very_many_boots_in_one_second_the_latest_has_a_token() -> None:
    """Its VM would power off if its token were not found."""
    store = SealedStore(VAULT)
    boots = [granted(f"boot {number}", A, 0) for number in range(4 * RECENT_BOOTS)]
    for each in boots:
        store.transact(each)
        assert store.transact(Ask(rows.Read(rows.BootRow, each.token_digest, by="token_digest"))) is not None
    assert store.transact(Ask(rows.Read(rows.BootRow, boots[0].token_digest, by="token_digest"))) is None
    behind = granted("of a server whose clock is behind", A, -3)
    store.transact(behind)
    store.transact(sync(behind, "body", "storage"))
    assert not list(find_faults(store))


def copied(place: StorePlace, table: str) -> Callable[[], None]:
    """Remember a table; returns what sets it back."""
    run(place, f"CREATE TABLE old_{table} AS SELECT * FROM {table}")

    def set_back() -> None:
        run(place, f"DELETE FROM {table}")
        run(place, f"INSERT INTO {table} SELECT * FROM old_{table}")

    return set_back


def test_a_vm_that_went_back_as_a_whole_contradicts_the_log(place: StorePlace) -> None:
    groups = ("boot_volume", "boot", "vm", "generation", "volume", "head")
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        back = [copied(place, table) for table in groups]
        go_on(store)
        sequence(store)
    for set_back in back:
        set_back()
    with closing(place.open()) as store:
        for vm in VMS:
            with pytest.raises(RowNotAuthentic, match=r"it has version 4, and the log has version 7"):
                store.transact(granted("last", vm, 400))
        assert {fault.table for fault in find_faults(store)} == {"head"}
        run(place, "DELETE FROM audit WHERE vm_version > 4")  # the log then contradicts its signed checkpoint
        store.transact(granted("last", A, 400))
        assert not list(find_faults(store))


@pytest.mark.parametrize("look", ["nobody", "a unit", "the scrub"])
def test_a_vm_that_went_back_before_the_log_knew_its_rows_contradicts_it_afterwards(
    place: StorePlace, look: str
) -> None:
    """Who looks meanwhile finds nothing wrong with its head, and a store may remember that."""
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        back = [copied(place, table) for table in ("boot_volume", "boot", "vm", "generation", "volume", "head")]
        go_on(store)
    for set_back in back:
        set_back()
    with closing(place.open()) as store:
        if look == "a unit":
            assert store.transact(Ask(rows.Read(rows.VmRow, A)))
        elif look == "the scrub":
            assert [finding for _, finding in scrub_heads(store) if finding]
        sequence(store)
        with pytest.raises(RowNotAuthentic, match=r"it has version 4, and the log has version 7"):
            store.transact(granted("last", A, 400))


def test_a_vm_of_which_all_was_deleted_is_not_a_new_one(place: StorePlace) -> None:
    """Its name would be free for the platform of an attacker; the log knows it."""
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        for table in ("boot", "vm", "generation", "volume", "head"):
            run(place, f"DELETE FROM {table} WHERE vm = '{A.name}'")
        with pytest.raises(
            RowNotAuthentic, match="table head is not authentic: it is missing, and the log has version 4"
        ):
            store.transact(granted("last", A, 400))
        store.transact(granted("last", B, 400))


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_a_vm_of_which_all_was_deleted_is_named_and_one_that_was_erased_is_not(
    place: StorePlace, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "_LOGGED", page)
    monkeypatch.setattr(scrub, "_VMS", page)
    gone = rows.Vm(A.hotkey, "vm-c")
    with closing(place.open(make=True)) as store:
        fill(store)
        store.transact(granted("first", gone, 0))
        _ = store.transact(EraseVm(NOW + 1, "x2", 9, B, "decommissioned", carry_out=True))
        _ = store.transact(PurgeBoots(NOW + 500, rows.BootRow, NOW + 450, "old", carry_out=True))
        sequence(store)
        assert [*find_faults(store)] == []
        for vm in (A, gone):
            for table in ("boot", "vm", "generation", "volume", "head"):
                run(place, f"DELETE FROM {table} WHERE vm = '{vm.name}'")
        found = [str(fault) for fault in find_faults(store)]
        assert len(found) == 2
        for text, vm in zip(found, (A, gone), strict=True):
            assert f"{vm.name} of table head is not authentic: it is missing, and the log has version" in text
        assert found == [finding for _, finding in scrub_heads(store) if finding]


def test_few_vms_of_the_log_are_looked_at_in_one_transaction(place: StorePlace) -> None:
    """All entries of each are visited, and in a store of SQLite a boot waits meanwhile."""
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        spy = create_autospec(store, instance=True)
        spy.transact.side_effect = store.transact
        assert [*find_faults(spy)] == []
        read = sum(count for count, _ in scrub_heads(spy))
    looks = [call.args[0] for call in spy.transact.call_args_list if isinstance(call.args[0], FindGone)]
    assert [each.limit for each in looks] == [20, 20]
    assert read == 5 * (1 + 20 + 20), "the store's own group, and a page of VMs and of those of the log"


def test_a_vm_that_went_back_while_the_log_is_stopped_is_named(place: StorePlace) -> None:
    """Its boots are served meanwhile; the audit rows that wait for the log say that it was newer."""
    with closing(place.open(make=True)) as store:
        fill(store)
        sequence(store)
        back = [copied(place, table) for table in ("boot_volume", "boot", "vm", "generation", "volume", "head")]
        run(place, "UPDATE log_state SET mac = " + ("x'00'" if place.path is not None else "'\\x00'"))
        go_on(store)
        with pytest.raises(RowNotAuthentic):
            sequence(store)
        assert [fault.table for fault in find_faults(store)] == ["log_state"]
        forged = "UPDATE audit SET vm_version = 99 WHERE id = (SELECT min(id) FROM audit WHERE vm_version = 5)"
        _ = run(place, forged)  # which says nothing of the VM
    for set_back in back:
        set_back()
    with closing(place.open()) as store:
        told = sorted(str(fault) for fault in find_faults(store) if fault.table == "head")
        assert len(told) == 2
        for text, vm in zip(told, VMS, strict=True):
            assert f"{vm.name} of table head" in text
            assert "it has version 4, and audit row" in text
            assert "has 7" in text
        assert set(told) <= {finding for _, finding in scrub_heads(store)}
        store.transact(granted("last", A, 400))


@frozen
class _Disturbed(Unit[Any]):
    """A unit in whose midst others commit something, each time that it is run."""

    unit: Unit[Any]
    commit: Callable[[], object]

    def script(self) -> Generator[rows.StoreOp[Any], Any, Any]:
        script = self.unit.script()
        try:
            op = next(script)
            while True:
                reply = yield op
                _ = self.commit()
                op = script.send(reply)
        except StopIteration as stop:
            return stop.value


@define
class _Busy(Store):
    """A store in which a VM boots during each unit with a page of more than one row."""

    store: Store
    server: Store
    refused: int = 0

    def transact(self, unit: Unit[Any]) -> Any:
        limit = getattr(getattr(unit, "op", unit), "limit", 0)
        if limit <= 1:
            return self.store.transact(unit)
        try:
            return self.store.transact(_Disturbed(unit, self._boot))
        except StoreBusy:
            self.refused += 1
            raise

    def _boot(self) -> None:
        _ = self.server.transact(granted(os.urandom(8).hex(), A, 300))


def test_a_page_whose_vms_boot_all_the_time_is_made_smaller(empty_schema: str, tmp_path: Path) -> None:
    """PostgreSQL refuses it each time that it is tried: a large fleet has a boot in every moment that it takes."""
    place = StorePlace(empty_schema, tmp_path, vault=VAULT)
    with closing(place.open(make=True)) as store:
        fill(store)
    with (
        closing(PostgresStore(empty_schema, busy_seconds=0.2, vault=BOTH)) as store,
        closing(evolve(place, vault=BOTH).open()) as server,
    ):
        busy = _Busy(store, server)
        assert begin_epoch(busy, BOTH, "test")
        assert end_epoch(busy, "test") == ()
        assert busy.refused
        assert not list(find_faults(server))


def test_until_its_kek_is_named_a_sealed_store_is_read_and_not_written(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        fill(store)
    with closing(evolve(place, vault=None).open()) as store:
        assert len(store.transact(Ask(rows.Scan(rows.VmRow)))) == 2
        for unit in (granted("last", A, 400), StoreRestored(NOW), Ask(rows.SetHorizon(0))):
            with pytest.raises(StoreError, match="sealed, and only its KEK"):
                store.transact(unit)
        with pytest.raises(StoreError, match="--config"):
            require_keys(store)
        store.custody.hold(VAULT.unwrap)
        store.transact(granted("last", A, 400))


@pytest.mark.parametrize("state", [0, -1])
def test_a_store_that_says_it_is_not_sealed_is_refused_by_who_knows_better(place: StorePlace, state: int) -> None:
    place = evolve(place, mark_file=place.base / "store.mark")
    with closing(place.open(make=True)) as store:
        store.keep_mark()
        fill(store)
        run(place, f"UPDATE fact SET value = {state} WHERE name = 'seal'")
        with pytest.raises(StoreError, match="of epoch 0, and"):
            store.transact(granted("last", A, 400))
    assert b'"epoch": 1' in (place.base / "store.mark").read_bytes()
    run(place, "DELETE FROM keyring")
    with pytest.raises(StoreError, match="of epoch 0, and"):
        place.open()


def test_a_server_that_has_the_key_reads_nothing_unchecked_under_another_one(place: StorePlace) -> None:
    """It would remember that nobody is revoked, under the number that the revocations have."""
    with closing(place.open(make=True)) as store:
        fill(store)
        run(place, "CREATE TABLE old_keyring AS SELECT * FROM keyring")
        run(place, "UPDATE old_keyring SET epoch = 2, kek_id = 'another'")
        run(place, "INSERT INTO keyring SELECT * FROM old_keyring")
        run(place, "UPDATE fact SET value = 2 WHERE name = 'seal'")
        run(place, "DELETE FROM revocation")
        with pytest.raises(RowNotAuthentic, match="row rows/2 of table keyring"):
            store.transact(ReadRevocations())
        run(place, "UPDATE fact SET value = 1 WHERE name = 'seal'")
        for unit in (ReadRevocations(), Allow(NOW, 9, "hotkey", "other", "test")):  # all of them, and one
            with pytest.raises(RowNotAuthentic, match="table revocation"):
                store.transact(unit)


def test_a_key_of_the_rows_that_was_altered_is_a_fault_of_the_store(place: StorePlace) -> None:
    """Which callers answer with 503, as they do for any other row that is not authentic."""
    with closing(place.open(make=True)):
        run(place, "UPDATE keyring SET wrapped = (SELECT mac FROM store_head)")
    with pytest.raises(RowNotAuthentic, match=r"row rows/1 of table keyring is not authentic: .*does not open"):
        place.open()
    gc.collect()  # a connection that was left open warns now


def test_all_candidates_are_doubted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once: a page begins after the one before, and not where the first began; however many heads that takes."""
    monkeypatch.setattr(_guard, "_PAGE", 2)
    monkeypatch.setattr(_guard, "_HEADS_HELD", 1)
    store = SealedStore(VAULT)
    vms = [rows.Vm(A.hotkey, f"vm-{number}") for number in range(5)]
    for vm in vms:
        store.transact(
            Ask(rows.Insert(rows.GenerationRow(vm, "v", 1, "candidate", b"", "kek", b"", False, NOW, "test")))
        )
    asked: list[str] = []

    def counted(group: StoreGroup, kind: type[rows.Row], found: Any) -> list[bytes]:
        asked.append(kind.TABLE)
        return check(group, kind, found)

    monkeypatch.setattr(StoreGroup, "check", counted)
    store.transact(StoreRestored(NOW))
    assert asked.count("generation") == len(vms)
    assert all(row.provisional for row in store.transact(Ask(rows.Scan(rows.GenerationRow))))
    assert not list(find_faults(store))


def test_nobody_without_the_keys_decides_that_a_loss_is_accepted(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He puts an older store there, and the fact by which an operator's command would let servers go on."""
    monkeypatch.setattr("chutes_proto.io.stores.marks.MarkKeeper.is_due", lambda _: True)  # not only once a second
    tables = ("boot_volume", "boot", "vm", "generation", "volume", "revocation", "head", "store_head", "fact")
    with closing(place.open(make=True)) as store:
        fill(store)
        ((last,),) = run(place, "SELECT max(id) FROM audit")
        back = [copied(place, table) for table in tables]
        go_on(store)
    place = evolve(place, mark_file=place.base / "store.mark")
    with closing(place.open()) as server:
        server.keep_mark()
        server.transact(granted("seen", A, 1000))
        for set_back in back:
            set_back()
        run(place, f"DELETE FROM audit WHERE id > {last}")
        with pytest.raises(StoreError, match="store restored"):
            server.transact(granted("last", A, 2000))
        run(place, f"INSERT INTO fact (name, value) VALUES ('loss_decided_at', {NOW + 1000})")
        with pytest.raises(RowNotAuthentic, match="loss_decided_at of table fact"):
            server.transact(granted("last", A, 2000))
        assert server.custody.faults == {"fact": 1}
        with pytest.raises(RowNotAuthentic, match="loss_decided_at of table fact"):
            place.open()
        unmarked = evolve(place, mark_file=None)
        with closing(unmarked.open()) as store, pytest.raises(RowNotAuthentic, match="table fact"):
            store.transact(Ask(rows.ReadLossDecided()))  # by it a log that lost entries goes on under another key
        run(place, "DELETE FROM fact WHERE name = 'loss_decided_at'")
        with closing(unmarked.open()) as store:  # as `store restored` does
            store.transact(Ask(rows.DecideLoss(NOW + 1000)))
        server.transact(granted("last", A, 2000))  # though it has seen newer rows
    with closing(place.open()) as store:
        store.transact(granted("again", A, 2001))


def test_nobody_without_the_keys_decides_that_a_log_may_lack_what_was_signed(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row is missing, so the log alone tells it, and the same fact would let servers go on."""
    monkeypatch.setattr("chutes_proto.io.stores.marks.MarkKeeper.is_due", lambda _: True)  # not only once a second
    with closing(evolve(place, mark_file=place.base / "store.mark").open(make=True)) as store:
        fill(store)
        store.hold_checkpoint(Checkpoint("origin", 1, bytes(32)))
        with pytest.raises(StoreError, match="its audit log has 0 entries, and a checkpoint of 1 was signed"):
            store.transact(granted("last", A, 2000))
        run(place, f"INSERT INTO fact (name, value) VALUES ('loss_decided_at', {int(time.time()) + 1000})")
        with pytest.raises(RowNotAuthentic, match="loss_decided_at of table fact"):
            store.transact(granted("last", A, 2000))


OF_STORE = ("revocation", "fact", "keyring", "store_head")
"""The tables of the store's own group, with its head."""


def test_revocations_that_went_back_with_their_head_are_seen_by_the_mark(
    place: StorePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows agree with each other, and with the log, which tells nothing of the store's own head."""
    monkeypatch.setattr("chutes_proto.io.stores.marks.MarkKeeper.is_due", lambda _: True)  # not only once a second
    marked = evolve(place, mark_file=place.base / "store.mark")
    with closing(place.open(make=True)) as operator, closing(marked.open()) as server:
        server.keep_mark()
        fill(operator)
        operator.transact(StoreRestored(NOW, "an earlier decision"))
        back = [copied(place, table) for table in OF_STORE]
        operator.transact(Revoke(NOW + 1, 8, "vm", f"{A.hotkey}/{A.name}", None, "stolen"))
        assert server.transact(ReadRevocations()).version == 8
        run(place, "UPDATE store_head SET version = version + 1000")  # which the mark does not take for true
        run(place, "DELETE FROM fact WHERE name = 'loss_decided_at'")
        with pytest.raises(RowNotAuthentic, match="table store_head"):
            server.transact(ReadRevocations())
        for set_back in back:
            set_back()
        with pytest.raises(StoreError, match=r"its head has version \d, and version \d was seen") as caught:
            server.transact(ReadRevocations())
        assert not isinstance(caught.value, StoreBusy)
    content = (place.base / "store.mark").read_bytes()
    assert Mark.from_bytes(content).head > 1
    with pytest.raises(StoreError, match="its head has version"):
        marked.open()
    with closing(place.open()) as operator:
        assert not list(find_faults(operator))
        operator.transact(Ask(rows.SetHorizon(NOW)))  # as a server without a mark does, which goes on with it
        with pytest.raises(StoreError, match="another one of that version was seen"):
            marked.open()
        operator.transact(StoreRestored(NOW + 2, "found"))
    with closing(marked.open()) as server:
        server.keep_mark()
        assert server.transact(ReadRevocations()).version == 7
    with closing(marked.open()) as server:
        assert server.notes == []


class RaiseAndFail(Unit[None]):
    """Raise the horizon, look at it, and undo that."""

    def script(self) -> Generator[Any, Any, None]:
        yield from rows.SetHorizon(NOW - 1)
        assert (yield from rows.ReadTimes()).horizon == NOW - 1
        raise LookupError


class ReadAfterHead(Unit[rows.Times]):
    """Read the times in a unit that has read the store's head before."""

    def script(self) -> Generator[Any, Any, rows.Times]:
        _ = yield from rows.ReadRevocation("hotkey", A.hotkey)
        return (yield from rows.ReadTimes())


@pytest.mark.parametrize(
    "forged",
    [
        f"UPDATE fact SET value = {NOW - 1} WHERE name = 'nonce_horizon'",
        "UPDATE fact SET value = value + 1 WHERE name = 'revocations'",
        "UPDATE store_head SET version = version - 1",
    ],
)
def test_a_server_that_found_the_times_authentic_sees_their_change(place: StorePlace, forged: str) -> None:
    with closing(place.open(make=True)) as server:
        server.transact(granted("first", A, 0))
        with pytest.raises(LookupError):
            server.transact(RaiseAndFail())
        server.transact(granted("second", A, 1))
        back = [copied(place, table) for table in ("fact", "store_head")]
        run(place, forged)
        for unit in (granted("third", A, 2), ReadAfterHead()):
            with pytest.raises(RowNotAuthentic, match=r"table (fact|store_head)"):
                server.transact(unit)
        for set_back in back:
            set_back()
        server.transact(granted("third", A, 2))


def test_a_rotated_kek_opens_the_key_of_the_rows(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        fill(store)
    both = Vault(OTHER_KEK, VAULT.current)
    with closing(evolve(place, vault=both).open()) as store:
        assert begin_epoch(store, both, "test")
        assert store.transact(RewrapKeys(NOW, os.urandom(12 * 100), both, "test")).count
        assert end_epoch(store, "test") == ()
    with closing(evolve(place, vault=Vault(OTHER_KEK)).open()) as store:
        assert not list(find_faults(store))
    with closing(place.open()) as store, pytest.raises(StoreError, match="only its KEK"):
        store.transact(granted("last", A, 400))


def test_rows_that_say_they_are_not_sealed_are_not_taken_for_a_new_store(place: StorePlace) -> None:
    """By who has no mark: without its rows it is an empty store."""
    with closing(place.open(make=True)) as store:
        fill(store)
    run(place, "UPDATE fact SET value = 0 WHERE name = 'seal'")
    with pytest.raises(StoreError, match=r"it says that it is not sealed, and its table \w+ has rows"):
        place.open()
    with closing(evolve(place, vault=None).open()) as store, pytest.raises(StoreError, match="only its KEK"):
        store.transact(granted("last", A, 400))


def test_an_epoch_whose_commit_fails_leaves_a_store_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a full disk: its key is then not the store's."""

    def fail(*_: object) -> None:
        raise StoreError("the disk is full")

    place = StorePlace("sqlite:keys.db", tmp_path, vault=VAULT)
    with closing(place.open()) as store:
        fill(store)
    with closing(evolve(place, vault=BOTH).open()) as store:
        with monkeypatch.context() as full, pytest.raises(StoreError, match="the disk is full"):
            full.setattr(SqliteStore, "_check_file", fail)
            store.transact(BeginNewEpoch(NOW, BOTH, Secret(bytes(ENTROPY_SIZE)), "test"))
        store.transact(granted("between", A, 1000))
        assert begin_epoch(store, BOTH, "test")
        assert end_epoch(store, "test") == ()
        store.transact(granted("last", A, 2000))
        assert not list(find_faults(store))


def test_a_forged_candidate_stops_no_restore(place: StorePlace) -> None:
    """It is named, and the candidates of all other VMs are provisional afterwards."""
    with closing(place.open(make=True)) as store:
        fill(store)
        for vm in VMS:
            (row, *_) = store.transact(Ask(rows.ReadLiveGenerations(vm)))
            store.transact(Ask(rows.Insert(evolve(row, generation=9, state="candidate", provisional=False))))
        run(place, f"UPDATE generation SET created_at = 1 WHERE state = 'candidate' AND vm = '{A.name}'")
        done = store.transact(StoreRestored(NOW))
        assert [fault.key for fault in done.faults] == [f"{A.hotkey}/{A.name}/cache/9"]
        live = store.transact(Ask(rows.ReadLiveGenerations(B)))
        assert [row.provisional for row in live if row.generation == 9] == [True]
        with pytest.raises(RowNotAuthentic, match="table generation"):
            store.transact(Ask(rows.ReadLiveGenerations(A)))


@pytest.mark.parametrize(
    ("unit", "kek"),
    [(RewrapKeys(NOW, bytes(12 * 100), BOTH, "test"), OTHER_KEK), (StoreRestored(NOW), VAULT.current)],
    ids=["rewrap", "restored"],
)
def test_a_generation_that_went_back_alone_stays_a_fault_after_a_command_that_writes_it(
    place: StorePlace, unit: Unit[Any], kek: KeyEncryptionKey
) -> None:
    """These read it without the others of its VM, and list what they write in the head."""
    cache = f"vm = '{A.name}' AND volume = 'cache' AND generation = 2"
    with closing(place.open(make=True)) as store:
        fill(store)
        live = store.transact(Ask(rows.ReadLiveGenerations(A)))
        (row,) = (each for each in live if (each.volume, each.generation) == ("cache", 2))
        store.transact(Ask(rows.UpdateGeneration(evolve(row, state="candidate"))))
        ((mac,),) = run(place, f"SELECT mac FROM generation WHERE {cache}")
        store.transact(Ask(rows.UpdateGeneration(row)))
        before = f"x'{mac.hex()}'" if place.path else f"'\\x{mac.hex()}'"
        run(place, f"UPDATE generation SET state = 'candidate', mac = {before} WHERE {cache}")
        named = [str(fault) for fault in find_faults(store)]
        assert len(named) == 1
        assert "cache/2 of table generation is not authentic: it is not the row that was written last" in named[0]
    with closing(evolve(place, vault=BOTH).open()) as store:
        store.transact(unit)
        assert [str(fault) for fault in find_faults(store)] == named
        assert {row.kek_id for row in store.transact(Ask(rows.ReadLiveGenerations(B)))} == {kek.kek_id}


def test_operators_commands_keep_a_store_authentic(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        fill(store)
        go_on(store)
        store.transact(StoreRestored(NOW))
        store.transact(Allow(NOW, 9, "hotkey", "other", "test"))
        for vm in VMS:
            store.transact(Ask(rows.VoidTokens(vm, NOW)))
        store.transact(Ask(rows.Forget(rows.VmRow, B)))
        keys = tuple(row.boot_id for row in store.transact(Ask(rows.Scan(rows.BootRow))))
        for kind in (rows.BootVolumeRow, rows.BootRow):
            store.transact(Ask(rows.Delete(kind, keys)))
        assert not list(find_faults(store))
        with pytest.raises(Refusal):
            store.transact(sync(granted("unused", A, 300), "body", "storage"))


# --- a new epoch, after the KEK was replaced ---


def kek_rotated(place: StorePlace, reason: str = "test") -> list[RowNotAuthentic]:
    """As `keys rewrap` does."""
    with closing(evolve(place, vault=BOTH).open()) as store:
        while begin_epoch(store, BOTH, reason):
            if faults := end_epoch(store, reason):
                return list(faults)
        store.transact(RewrapKeys(NOW, os.urandom(12 * 100), BOTH, reason))
    return []


def macs_of(place: StorePlace) -> set[int]:
    """The epochs of all MACs that are stored."""
    found: set[int] = set()
    for table in ("head", "store_head", *(kind.TABLE for kind in SEALED)):
        found |= {epoch_of(bytes(mac)) or 0 for (mac,) in run(place, f"SELECT mac FROM {table}")}
    return found


def test_after_a_rotation_the_key_of_before_makes_no_row(place: StorePlace) -> None:
    """Whoever has the old KEK, the keyring of its time and the database, and a server that still opens both KEKs."""
    place = evolve(place, mark_file=place.base / "store.mark")
    with closing(place.open(make=True)) as store:
        fill(store)
        old = store.custody.older(1, lambda text: run(place, text))
    run(place, "CREATE TABLE kept AS SELECT * FROM keyring")
    run(place, "CREATE TABLE kept_head AS SELECT * FROM store_head")
    with closing(evolve(place, vault=BOTH).open()) as server:
        server.keep_mark()
        server.transact(evolve(granted("before", B, 150), vault=BOTH))
        assert kek_rotated(place) == []
        assert macs_of(place) == {2}
        assert {epoch for kind, epoch in run(place, "SELECT kind, epoch FROM keyring") if kind == "rows"} == {2}
        server.transact(evolve(granted("third", B, 200), vault=BOTH))
        assert not list(find_faults(server))

        # The claim of one VM, as the old key authenticates it, with a head that lists it.
        (row,) = [row for row in server.transact(Ask(rows.Scan(rows.VmRow))) if row.vm == A]
        mac = old.of_row("vm", sql.encode(evolve(row, proven=not row.proven)))
        literal = f"X'{mac.hex()}'" if place.path else f"'\\x{mac.hex()}'"
        run(place, f"UPDATE vm SET proven = NOT proven, mac = {literal} WHERE vm = '{A.name}'")
        run(place, "INSERT INTO keyring SELECT * FROM kept WHERE kind = 'rows'")
        with pytest.raises(RowNotAuthentic, match="table vm is not authentic: its MAC"):
            server.transact(granted("third", A, 200))

        # All of it: the epoch goes back, and the head of the store with it.
        run(place, "UPDATE fact SET value = 1 WHERE name = 'seal'")
        run(place, "DELETE FROM store_head")
        run(place, "INSERT INTO store_head SELECT * FROM kept_head")
        with pytest.raises(StoreError, match="epoch 1, and"):
            server.transact(granted("fourth", B, 250))
    with pytest.raises(
        StoreError, match=r"of epoch 1, and rows of epoch 2 were seen.* stop all servers, move that file alone away"
    ):
        evolve(place, vault=BOTH).open()


def test_a_vm_of_which_only_its_head_is_left_is_no_fault_after_a_rotation(place: StorePlace) -> None:
    with closing(place.open(make=True)) as store:
        store.transact(BindVm(NOW, A, granted("first", A, 0).platform, "it is to come"))
        store.transact(EraseVm(NOW + 1, "x2", 9, A, "it does not come", carry_out=True))
    assert run(place, "SELECT (SELECT count(*) FROM vm) + (SELECT count(*) FROM boot)") == [(0,)]
    assert kek_rotated(place) == []
    with closing(evolve(place, vault=BOTH).open()) as store:
        assert not list(find_faults(store))
        store.transact(evolve(granted("first", A, 2), vault=BOTH))


@frozen
class Stopping:
    """A store for a command that ends before its unit number ``at``; others use it before each."""

    store: Store
    at: int
    between: Callable[[], object]
    units: list[str] = field(factory=list[str])

    def transact(self, unit: Unit[Any]) -> Any:
        if len(self.units) == self.at:
            raise KeyboardInterrupt
        if unit_name(unit) != "CountRows":
            self.units.append(unit_name(unit))
            self.between()
        return self.store.transact(unit)


def test_a_rotation_is_stopped_before_each_step_while_a_server_goes_on(
    place: StorePlace,
) -> None:
    with closing(place.open(make=True)) as store:
        fill(store)
    count = 0
    with closing(evolve(place, vault=BOTH).open()) as server, closing(evolve(place, vault=BOTH).open()) as store:

        def boot_one() -> None:
            nonlocal count
            count += 1
            granting = evolve(granted(f"number {count}", VMS[count % 2], 100 + count), vault=BOTH)
            server.transact(granting)
            server.transact(evolve(sync(granting, f"sync {count}", "storage"), vault=BOTH))

        for at in (0, 1, 7, 15):
            stopping = Stopping(store, at, list)
            with pytest.raises(KeyboardInterrupt):
                _ = begin_epoch(stopping, BOTH, "test")
                _ = end_epoch(stopping, "test")
            assert stopping.units[1:2] != ["EndOldEpochs"]
            assert not list(find_faults(server)), stopping.units
            boot_one()
        assert server.transact(Ask(ReadEpochs())) == (2, 1)
        finished = Stopping(store, 1000, boot_one)
        assert begin_epoch(finished, BOTH, "test")
        assert end_epoch(finished, "test") == ()
        assert finished.units[-1] == "EndOldEpochs"
        boot_one()
        assert macs_of(place) == {2}
        assert not begin_epoch(store, BOTH, "test")
        assert end_epoch(store, "test") == ()  # once more, as another operator may
        assert not list(find_faults(server))
        sequence(server)  # audit rows from before the new epoch get their places in the log
        assert run(place, "SELECT count(*) FROM audit WHERE idx IS NULL OR idx < 0") == [(0,)]


def test_what_is_not_authentic_gets_no_new_mac_and_keeps_the_older_epoch(place: StorePlace) -> None:
    """A row that was changed, one that went back to an older state, and a head: each is refused as before."""
    with closing(place.open(make=True)) as store:
        fill(store)
        set_back = copied(place, "volume")
        store.transact(AllowFormat(NOW, A, "storage", "test"))
    set_back()
    change = f"UPDATE vm SET proven = NOT proven WHERE vm = '{B.name}'"
    run(place, change)
    run(place, f"UPDATE boot SET given = 9 WHERE vm = '{B.name}'")
    assert {fault.table for fault in kek_rotated(place)} == {"vm", "boot"}
    with closing(evolve(place, vault=BOTH).open()) as server:
        found = {(fault.table, fault.key.split("/")[1]) for fault in find_faults(server) if fault.table[0] == "v"}
        assert found == {("vm", "vm-b"), ("volume", "vm-a")}
        assert {1, 2} == macs_of(place)
    run(place, change)
    run(place, f"DELETE FROM boot WHERE vm = '{B.name}'")
    assert kek_rotated(place) == []
    assert macs_of(place) == {2}
