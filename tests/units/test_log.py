"""The audit log over any store: sequenced completely and in order, and proven from its tiles."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.errors import LogError, SealBroken, StoreBusy
from chutes_proto.keys.vault import NONCE_SIZE
from chutes_proto.secret import Secret
from chutes_proto.store._rows import (
    AuditRow,
    Insert,
    InsertAll,
    KeyringRow,
    LogStateRow,
    LogTileRow,
    Pin,
    Put,
    Read,
    ReadLog,
    ReadTile,
    ReadUnsequenced,
    Scan,
    Sequence,
    Vm,
)
from chutes_proto.store._run import Ask, Unit
from chutes_proto.store._sql import columns, decode_rows, encode
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM
from chutes_proto.tlog import merkle
from chutes_proto.tlog.merkle import EMPTY_ROOT
from chutes_proto.tlog.notes import Checkpoint
from chutes_proto.units.log import (
    LOG,
    SALT_SIZE,
    SEED_SIZE,
    FindNewest,
    MendTiles,
    OpenLogKey,
    ReadCheckpoint,
    SequenceLog,
    VmChains,
    announced_minimum,
    entry_text,
    leaf_of,
    purged_text,
)
from tests.store.memory import MemoryStore

ROW = AuditRow(NOW, "operator", "key restored", "done", "root: because", VM, keys="storage/1 active")
ENTROPY = b"".join(number.to_bytes(16, "big") for number in range(320))
KEY_ENTROPY = Secret(bytes(range(SEED_SIZE + NONCE_SIZE)))


def rows(first: int, count: int) -> tuple[AuditRow, ...]:
    return tuple(evolve(ROW, request_id=f"r{number}") for number in range(first, first + count))


def filled(count: int) -> MemoryStore:
    store = MemoryStore()
    for first in range(0, count, 1000):
        store.transact(Ask(InsertAll(rows(first, min(1000, count - first)))))
    while store.transact(SequenceLog(ENTROPY, "keys.example/audit")):
        pass
    return store


def checkpoint(store: MemoryStore, held: Checkpoint | None = None) -> Checkpoint:
    found = store.transact(ReadCheckpoint(held))
    assert found is not None
    return found


def test_an_entry_is_the_canonical_text_of_its_row() -> None:
    row = AuditRow(7, "vm", "boot", "granted", 'a "reason"\n\N{EURO SIGN}', VM, "b0", pin=Pin("ppid", b"\1\2"))
    assert entry_text(evolve(row, idx=5, salt=b"\xff")) == (
        '{"actor":"vm","at":7,"boot_id":"b0","decision":"granted","event":"boot","hotkey":"'
        + VM.hotkey
        + '","keys":"","peer_address":"","platform_id":"0102","platform_kind":"ppid",'
        '"reason":"a \\"reason\\"\\n\N{EURO SIGN}","salt":"ff","vm":"vm-0"}'
    )
    assert leaf_of(row) == merkle.leaf_hash(entry_text(row).encode())


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    row=st.builds(
        AuditRow,
        at=st.integers(-(1 << 63), (1 << 63) - 1),
        actor=st.just("vm"),
        event=TEXT,
        decision=st.just("granted"),
        reason=TEXT,
        vm=st.none() | st.just(VM),
        request_id=st.none() | TEXT,
        pin=st.none() | st.builds(Pin, st.just("ppid"), st.binary()),
        quote_digest=st.none() | st.binary(),
        keys=TEXT,
        evidence=st.none() | TEXT,
        idx=st.none() | st.integers(0),
        salt=st.none() | st.binary(),
        vm_version=st.none() | st.integers(0, (1 << 63) - 1),
    ),
    salt=st.binary(),
)
@example(AuditRow(0, "vm", '\x00\x1f\x7f\x80\u2028"\\/\b\f\n\r\t', "granted", "\U0001f600"), b"")
def test_an_entry_is_what_another_encoder_of_json_writes(row: AuditRow, salt: bytes) -> None:
    members = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in zip(columns(AuditRow), encode(row), strict=True)
        if value is not None and name != "idx"
    }
    text = json.dumps(members, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert entry_text(row) == text
    assert leaf_of(row, salt) == leaf_of(evolve(row, salt=salt))


@pytest.mark.parametrize("name", ["hotkey", "vm", "request_id", "platform_id", "quote_digest", "salt"])
@pytest.mark.parametrize("other", [base64.b64decode, bytes.fromhex], ids=["base64", "hex"])
def test_a_value_of_another_type_is_another_entry(name: str, other: Callable[[str], bytes]) -> None:
    """SQLite takes one in any column, and looks for a name no longer find it."""
    cafe, vm = bytes.fromhex("cafe"), Vm("cafe", "cafe")
    row = evolve(ROW, request_id="cafe", vm=vm, pin=Pin("ppid", cafe), quote_digest=cafe, salt=cafe)
    changed: list[Any] = [*encode(row)]
    at = columns(AuditRow).index(name)
    changed[at] = changed[at].hex() if isinstance(changed[at], bytes) else other(changed[at])
    (forged,) = decode_rows(AuditRow, [changed])
    assert encode(forged) == tuple(changed)
    assert entry_text(forged) != entry_text(row)


def test_a_text_that_is_too_long_for_an_entry_becomes_its_digest() -> None:
    members = json.loads(entry_text(evolve(ROW, keys="\N{EURO SIGN}" * 30_000)))
    assert len(members["keys_sha256"]) == 64
    assert "keys" not in members
    members = json.loads(entry_text(evolve(ROW, reason="x" * 70_000, evidence="y")))
    assert {"keys_sha256", "reason_sha256", "evidence"} < members.keys()
    assert "evidence_sha256" not in members
    assert len(entry_text(evolve(ROW, keys="x" * 65_000)).encode()) <= 65_535
    members = json.loads(entry_text(evolve(ROW, reason="x" * 70_000, evidence="y" * 70_000)))
    assert {"keys_sha256", "reason_sha256", "evidence_sha256"} < members.keys()


def test_only_an_entry_of_a_purge_announces_one() -> None:
    told = evolve(ROW, event="audit purged", keys=purged_text(256, 250))
    assert announced_minimum(entry_text(told).encode()) == 256
    for row in (ROW, evolve(told, keys="entries below x: 1"), evolve(told, keys="k" * 70_000)):
        assert announced_minimum(entry_text(row).encode()) == 0
    assert announced_minimum(b'"event":"audit purged", and no JSON') == 0


def test_rows_are_sequenced_once_and_in_their_order() -> None:
    store = filled(600)
    log = store.transact(Ask(ReadLog(0, 1000)))
    assert [(row.idx, row.request_id) for row in log] == [(number, f"r{number}") for number in range(600)]
    assert len({row.salt for row in log[:320]}) == 320
    assert all(row.salt is not None and len(row.salt) == SALT_SIZE for row in log)
    before = checkpoint(store)
    store.transact(Ask(InsertAll(rows(600, 500))))
    assert store.transact(SequenceLog(ENTROPY)) == len(ENTROPY) // SALT_SIZE
    while store.transact(SequenceLog(ENTROPY)):
        pass
    after = checkpoint(store, before)
    assert (after.origin, after.size) == ("keys.example/audit", 1100)
    log = store.transact(Ask(ReadLog(0, 2000)))
    hashes = [leaf_of(row) for row in log]
    tree: dict[tuple[int, int], bytes] = {}
    for tile in store.transact(Ask(Scan(LogTileRow))):
        tree[tile.level, tile.tile] = tile.hashes
    assert b"".join(hashes) == b"".join(tree[0, number] for number in range(5))
    assert [row.idx for row in store.transact(Ask(ReadLog(1098, 9)))] == [1098, 1099]


STATE = LogStateRow(LOG, "o", 0, EMPTY_ROOT)


def test_nothing_is_sequenced_while_another_transaction_does_or_nothing_is_there() -> None:
    store = filled(3)
    assert store.transact(SequenceLog(ENTROPY)) == 0
    play(SequenceLog(ENTROPY), [STATE, None], 0)


def test_a_row_that_goes_while_it_is_sequenced_changes_nothing() -> None:
    with pytest.raises(StoreBusy):
        play(SequenceLog(ENTROPY), [STATE, STATE, ((1, ROW),), (), 0], 0)


def play(unit: Unit[Any], replies: list[Any], result: object) -> None:
    """Run a unit against replies that a store with several writers may give."""
    script = unit.script()
    try:
        _ = next(script)
        for reply in replies:
            _ = script.send(reply)
    except StopIteration as stop:
        assert stop.value == result
    else:
        raise AssertionError


def test_a_log_whose_last_tile_is_damaged_is_not_continued() -> None:
    store = filled(3)
    tile = store.transact(Ask(ReadTile(0, 0)))
    assert tile is not None
    store.transact(Ask(Put(evolve(tile, hashes=tile.hashes[:-32]))))
    store.transact(Ask(Insert(ROW)))
    with pytest.raises(LogError, match=r"tile tile/0/000.p/3 has 64 bytes"):
        store.transact(SequenceLog(ENTROPY))
    assert len(store.transact(Ask(ReadUnsequenced(9)))) == 1
    with pytest.raises(LogError, match="lacks a hash"):
        store.transact(ReadCheckpoint())


@pytest.mark.parametrize("size", [3, 300, 600])
def test_a_damaged_last_tile_is_made_again_as_the_checkpoint_has_it(size: int) -> None:
    store = filled(size)
    held = checkpoint(store)
    store.transact(Ask(InsertAll(rows(size, 2))))
    assert store.transact(SequenceLog(ENTROPY)) == 2
    for tile in store.transact(Ask(Scan(LogTileRow))):
        if len(tile.hashes) < 256 * 32:
            store.transact(Ask(Put(evolve(tile, hashes=tile.hashes[:-32]))))
    assert store.transact(MendTiles(held))
    assert checkpoint(store, held).size == size + 2
    assert store.transact(MendTiles(held)) == ()
    with pytest.raises(LogError, match=r"does not begin with|different roots"):
        store.transact(MendTiles(evolve(held, root=bytes(32))))
    (row,) = store.transact(Ask(ReadLog(size - 1, 1)))
    store.connection.execute("UPDATE audit SET reason = 'forged' WHERE idx = ?", (row.idx,))
    before = store.transact(Ask(Scan(LogTileRow)))
    with pytest.raises(LogError, match=r"does not begin with|different roots"):
        store.transact(MendTiles(held))
    assert store.transact(Ask(Scan(LogTileRow))) == before
    play(MendTiles(held), [None], ())


def test_only_rows_after_a_number_are_looked_at() -> None:
    store = filled(3)
    assert MemoryStore().transact(FindNewest()) == 0
    newest = store.transact(FindNewest())
    store.transact(Ask(InsertAll(rows(3, 2))))
    assert store.transact(SequenceLog(ENTROPY, beyond=newest + 1)) == 1
    assert store.transact(SequenceLog(ENTROPY)) == 1, "the one that was passed by"


@pytest.mark.parametrize("size", [1, 255, 256, 300])
def test_a_log_that_does_not_extend_what_was_signed_is_refused(size: int) -> None:
    held = checkpoint(filled(size))
    later = filled(400)
    assert checkpoint(later, held).size == 400
    for wrong, why in [
        (evolve(held, root=bytes(32)), "does not begin with|lacks"),
        (evolve(held, size=401), "does not extend"),
        (evolve(held, origin="keys.example/other"), "origin"),
    ]:
        with pytest.raises(LogError, match=why):
            later.transact(ReadCheckpoint(wrong))
    with pytest.raises(LogError, match="the store has no log"):
        MemoryStore().transact(ReadCheckpoint(held))
    assert MemoryStore().transact(ReadCheckpoint()) is None


def test_the_key_of_a_log_is_made_once_and_kept_sealed() -> None:
    assert MemoryStore().transact(OpenLogKey(NOW, VAULT, KEY_ENTROPY)) is None
    store = filled(1)
    made = store.transact(OpenLogKey(NOW, VAULT, KEY_ENTROPY))
    again = store.transact(OpenLogKey(NOW + 1, VAULT, Secret(bytes(SEED_SIZE + NONCE_SIZE))))
    assert made is not None
    assert again == made
    assert made.name == "keys.example/audit"
    (row,) = store.transact(Ask(Scan(KeyringRow)))
    assert made.seed.reveal() not in row.wrapped
    told = store.transact(Ask(ReadUnsequenced(9)))[-1][1]
    assert (told.event, told.keys) == ("log key made", str(made.verifier))
    other = store.transact(OpenLogKey(NOW + 2, VAULT, Secret(b"x" * (SEED_SIZE + NONCE_SIZE)), lost_at=NOW))
    assert other is not None
    assert other != made
    assert store.transact(OpenLogKey(NOW + 3, VAULT, KEY_ENTROPY, lost_at=NOW)) == other
    store.transact(Ask(Put(evolve(row, epoch=3))))  # a row that was copied to another place
    with pytest.raises(SealBroken, match="the key audit/3 of the store's own does not open"):
        store.transact(OpenLogKey(NOW, VAULT, KEY_ENTROPY))
    assert store.transact(Ask(Read(LogStateRow, LOG))) is not None
    assert store.transact(Ask(Sequence(((99, 7, b"s"),)))) == 0


def versioned(version: int | None, request: str, at: int = NOW) -> AuditRow:
    return evolve(ROW, at=at, request_id=request, vm_version=version)


@pytest.mark.parametrize("batch", [1, 2, 3, 320])
def test_a_vm_with_two_histories_is_named(batch: int) -> None:
    def sequenced(*written: AuditRow) -> list[str]:
        store, told = filled(3), list[str]()
        store.transact(Ask(InsertAll(written)))
        while store.transact(SequenceLog(ENTROPY[: batch * SALT_SIZE], tell=lambda fork, _: told.append(fork))):
            pass
        follow = VmChains().follow_entry
        entries = (entry_text(row).encode() for row in store.transact(Ask(ReadLog(0, 1000))))
        assert [fork for fork in map(follow, entries) if fork] == told
        return told

    first = [versioned(1, "a"), versioned(1, "a"), versioned(None, "refused"), versioned(2, "b"), versioned(4, "c")]
    assert sequenced(*first, evolve(first[0], vm=evolve(VM, name="another"))) == []
    about = f"VM {VM.hotkey}/{VM.name} has two histories"
    assert sequenced(*first, versioned(2, "other"))[:1] == [f"{about}: version 2 follows version 4"]
    assert sequenced(*first, versioned(4, "other")) == [f"{about}: version 4 follows version 4"]
    assert sequenced(*first, versioned(4, "c", NOW + 1)) == [f"{about}: version 4 follows version 4"]


def test_both_histories_become_entries() -> None:
    store = filled(3)
    store.transact(Ask(InsertAll((versioned(2, "a"), versioned(2, "b")))))
    assert store.transact(SequenceLog(ENTROPY)) == 2


def test_a_text_that_is_not_an_entry_has_no_history() -> None:
    follow = VmChains().follow_entry
    for text in (b'"vm_version":', b'{"vm_version":1}', b'{"at":1,"hotkey":"h","vm":"v","vm_version":"x"}'):
        assert not follow(text)
