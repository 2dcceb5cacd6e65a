"""Tokens, replays, what a volume's disk is known to hold, and what is never kept in the clear."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.errors import KeyUnavailable, Refused, Unavailable
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._rows import (
    AuditRow,
    BootRow,
    BootVolumeRow,
    GenerationRow,
    Insert,
    Put,
    ReadAll,
    ReadTimes,
    Scan,
    StoreOp,
    Vm,
    VolumeRow,
)
from chutes_proto.store._run import Ask, Unit, run_script
from chutes_proto.testing.store_suite._parts import (
    NOW,
    VAULT,
    VM,
    attest,
    boot,
    confirm,
    dump,
    fresh,
    platform,
    read,
    sync,
)
from chutes_proto.units.boot import GrantBoot, RecordRefusal
from chutes_proto.units.keys import VmKeys
from chutes_proto.units.operator import StoreRestored
from chutes_proto.units.rotation import HandedKeys
from chutes_proto.units.volumes import SyncVolumes, VolumeKeys
from chutes_proto.wire.codes import Code
from tests.store.memory import MemoryStore

OTHER = Vault(KeyEncryptionKey.from_bytes(b"x" * 32))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def granted(store: MemoryStore, label: str = "first", **changes: object) -> GrantBoot:
    unit = evolve(boot(label), **changes)  # type: ignore[arg-type]
    store.transact(unit)
    return unit


def refused(store: MemoryStore, unit: Unit[object]) -> Refused:
    """The refusal; asserts that nothing changed."""
    before = dump(store)
    with pytest.raises(Refused) as caught:
        store.transact(unit)
    assert dump(store) == before
    return caught.value


def known(store: MemoryStore) -> dict[str, tuple[bool, bool]]:
    return {row.volume: (row.in_use, row.format_allowed) for row in store.transact(Ask(ReadAll(VolumeRow, VM)))}


def audits(store: MemoryStore) -> list[tuple[str, str, str]]:
    return [(row.event, row.decision, row.keys) for row in store.transact(Ask(Scan(AuditRow)))]


# --- tokens ---


def test_texts_and_codes_in_the_order_of_the_checks(store: MemoryStore) -> None:
    unit = sync(granted(store), "body", "storage")
    all_wrong = evolve(unit, vm=Vm("other", "other"), certificate=bytes(32))
    unknown = refused(store, evolve(all_wrong, token_digest=bytes(32)))
    hotkey = refused(store, all_wrong)
    name = refused(store, evolve(all_wrong, vm=Vm(VM.hotkey, "other")))
    certificate = refused(store, evolve(all_wrong, vm=VM))
    assert [(r.status, r.code, r.detail) for r in (unknown, hotkey, name, certificate)] == [
        (401, Code.BOOT_TOKEN_INVALID, "Boot token not found or expired"),
        (401, Code.HOTKEY_MISMATCH, "Hotkey does not match boot token"),
        (401, Code.VM_NAME_MISMATCH, "VM name does not match boot token"),
        (401, Code.BOOT_TOKEN_INVALID, "Boot token not found or expired"),
    ]
    assert "unknown" in unknown.reason
    assert "another certificate" in certificate.reason
    assert not store.transact(unit).replayed


def test_a_token_is_good_without_a_certificate_unless_the_profile_asks_for_one(store: MemoryStore) -> None:
    store.transact(evolve(sync(granted(store), "body", "storage"), certificate=None))
    strict = granted(store, "strict", token_needs_certificate=True)
    refusal = refused(store, evolve(sync(strict, "body", "storage"), certificate=None))
    assert refusal.code is Code.BOOT_TOKEN_INVALID
    assert "without the certificate" in refusal.reason
    refused(store, evolve(read(strict, "storage"), certificate=None))
    store.transact(sync(strict, "body", "storage"))


# --- replays ---


def test_a_lost_answer_is_given_again_and_nothing_is_done_twice(store: MemoryStore) -> None:
    unit = granted(store)
    first = evolve(sync(unit, "body", "tdx-cache", "storage", rekey=["storage"]), formatted=frozenset({"tdx-cache"}))
    answer = store.transact(first)
    rows = store.transact(Ask(Scan(GenerationRow)))
    again = evolve(first, now=NOW + 500, request_id="again", fresh={v: fresh(v) for v in ("storage", "tdx-cache")})
    assert store.transact(again) == evolve(answer, replayed=True)
    assert store.transact(Ask(Scan(GenerationRow))) == rows
    assert audits(store)[1:] == [
        ("sync", "granted", "tdx-cache/1 created, storage/1 created"),
        ("sync", "replayed", "tdx-cache/1 repeated, storage/1 repeated"),
    ]
    assert store.transact(Ask(Scan(AuditRow)))[-1].request_id == "again"


def test_a_token_consumed_without_a_certificate_is_replayed_to_the_attested_one_only(store: MemoryStore) -> None:
    unit = granted(store)
    bare = evolve(sync(unit, "body", "storage"), certificate=None)
    answer = store.transact(bare)
    assert "no certificate" in refused(store, bare).reason
    assert store.transact(evolve(bare, certificate=unit.certificate)) == evolve(answer, replayed=True)


# --- keys ---


def test_the_answer_keeps_the_order_and_names_each_volume_once(store: MemoryStore) -> None:
    unit = sync(granted(store), "body", "tdx-cache", "storage", "tdx-cache")
    answer = store.transact(unit)
    assert [volume for volume, _ in answer.passphrases] == ["tdx-cache", "storage"]
    assert [len(passphrase) for _, passphrase in answer.passphrases] == [128, 128]
    given = store.transact(Ask(Scan(BootVolumeRow)))
    assert [(row.volume, row.position, row.current_generation) for row in given] == [
        ("storage", 1, 1),
        ("tdx-cache", 0, 1),
    ]


def test_a_boot_without_volumes_is_given_none(store: MemoryStore) -> None:
    first, second = granted(store), granted(store, "second", exchange="two-phase")
    assert store.transact(sync(first, "body")) == VolumeKeys((), ())
    assert store.transact(attest(second, "body")).volumes == ()
    assert {(row.spent_at, row.given) for row in store.transact(Ask(Scan(BootRow)))} == {(NOW + 1, 0)}


def test_keys_of_the_vm_itself_are_not_pruned(store: MemoryStore) -> None:
    unit = granted(store)
    k3s = VmKeys(VM, VAULT, NOW, "boot").sealer("k3s", fresh("k3s"))(1)
    store.transact(Ask(Insert(k3s)))
    store.transact(sync(unit, "body", "storage"))
    rows = store.transact(Ask(Scan(GenerationRow)))
    assert {(row.volume, row.state) for row in rows} == {("k3s", "active"), ("root", "active"), ("storage", "active")}


def test_a_prune_leaves_a_tombstone_which_comes_back_unless_it_is_rekeyed(store: MemoryStore) -> None:
    first = store.transact(sync(granted(store, "1"), "body", "storage", "tdx-cache"))
    store.transact(sync(granted(store, "2"), "body", "tdx-cache"))
    assert audits(store)[-1][2] == "tdx-cache/1 kept, storage/1 retired"
    revived = store.transact(sync(granted(store, "3"), "body", "storage", "tdx-cache"))
    assert revived.passphrases == first.passphrases
    assert audits(store)[-1][2] == "storage/1 revived, tdx-cache/1 kept"
    store.transact(sync(granted(store, "4"), "body", "tdx-cache"))
    anew = store.transact(sync(granted(store, "5"), "body", "storage", rekey=["storage"]))
    assert anew.passphrases[0] != first.passphrases[0]
    assert audits(store)[-1][2] == "storage/2 created, tdx-cache/1 retired"


def test_a_missing_key_spends_no_token(store: MemoryStore) -> None:
    unit = granted(store)
    store.transact(sync(granted(store, "2"), "body", "storage"))
    before = dump(store)
    for attempt in (sync(unit, "body", "storage"), read(unit, "storage")):
        with pytest.raises(KeyUnavailable):
            store.transact(evolve(attempt, vault=OTHER))
    assert dump(store) == before
    store.transact(sync(unit, "body", "storage"))


def test_what_a_request_reads_does_not_grow_with_the_keys(store: MemoryStore) -> None:
    for number in range(30):
        store.transact(sync(granted(store, f"rekeyed {number}"), "body", "storage", rekey=["storage"]))
    synced = granted(store, "synced")
    attested = attest(granted(store, "attested", exchange="two-phase", exchange_downgrade="allow"), "body", "storage")
    units: list[Unit[object]] = [
        *(evolve(boot("another"), exchange_downgrade="allow"), read(synced, "storage")),
        *(sync(synced, "body", "storage"), sync(synced, "body", "storage")),  # and its replay
        *(attested, attested, confirm(attested, {"storage": True}), confirm(attested, {"storage": True})),
        evolve(boot("taken over"), platform=platform("elsewhere"), hotkey_proven=True),
    ]
    replies: list[object] = []

    def perform(op: StoreOp[Any]) -> object:
        replies.append(store.perform(op))
        return replies[-1]

    for unit in units:
        run_script(unit.script(), perform)
    of_keys = [reply for reply in replies if isinstance(reply, tuple) and reply and isinstance(reply[0], GenerationRow)]
    assert len(of_keys) >= len(units)
    assert max(map(len, of_keys)) <= 4  # root, k3s, active, candidate


def test_a_row_imported_without_a_delivery_is_marked_when_it_is_given(store: MemoryStore) -> None:
    unit = granted(store)
    row = VmKeys(VM, VAULT, NOW, "import").sealer("storage", fresh("imported"))(1)
    store.transact(Ask(Insert(evolve(row, delivered_at=None))))
    store.transact(sync(unit, "body", "storage"))
    (after,) = (row for row in store.transact(Ask(Scan(GenerationRow))) if row.volume == "storage")
    assert after == evolve(row, delivered_at=NOW + 1)


# --- operation 3 ---


def test_a_read_gives_the_active_key_and_spends_nothing(store: MemoryStore) -> None:
    answer = store.transact(sync(granted(store, "1"), "body", "storage"))
    unit = granted(store, "2")
    for _ in range(2):
        assert store.transact(read(unit, "storage")) == answer.passphrases[0][1]
    assert audits(store)[-1] == ("read", "granted", "storage/1 kept")
    assert not store.transact(sync(unit, "body", "storage")).replayed


@pytest.mark.parametrize("state", ["never", "pruned"])
def test_a_read_without_a_key_is_404(store: MemoryStore, state: str) -> None:
    if state == "pruned":
        store.transact(sync(granted(store, "1"), "body", "storage"))
        store.transact(sync(granted(store, "2"), "body", "tdx-cache"))
    refusal = refused(store, read(granted(store, "3"), "storage"))
    assert (refusal.status, refusal.code) == (404, Code.KEY_NOT_FOUND)
    assert refusal.detail == "No cache passphrase found for this VM. This shouldn't happen for encrypted volumes."


# --- disks ---


def answer_of(store: MemoryStore, label: str, *volumes: str, **changes: object) -> VolumeKeys:
    unit: SyncVolumes = evolve(sync(granted(store, label), label, *volumes), **changes)  # type: ignore[arg-type]
    return store.transact(unit)


def test_a_disk_is_in_use_once_a_header_was_reported(store: MemoryStore) -> None:
    nothing: frozenset[str] = frozenset()
    assert answer_of(store, "1", "storage", "tdx-cache", formatted=nothing).in_use == ()
    assert answer_of(store, "2", "storage", "tdx-cache", formatted=frozenset({"storage"})).in_use == ("storage",)
    assert answer_of(store, "3", "tdx-cache", "storage", formatted=nothing).in_use == ("storage",)
    assert known(store) == {"storage": (True, False)}


def test_a_deployed_image_reports_what_it_does_not_rekey(store: MemoryStore) -> None:
    assert answer_of(store, "1", "storage", "tdx-cache", rekey=frozenset({"storage"})).in_use == ("tdx-cache",)
    assert answer_of(store, "2", "storage", "tdx-cache").in_use == ("storage", "tdx-cache")
    assert answer_of(store, "3", "storage", rekey=frozenset({"storage"})).in_use == ("storage",)


def test_a_report_of_a_volume_that_is_not_listed_counts_for_nothing(store: MemoryStore) -> None:
    assert answer_of(store, "1", "storage", formatted=frozenset({"tdx-cache"})).in_use == ()
    assert known(store) == {}


def test_a_read_is_a_report(store: MemoryStore) -> None:
    answer_of(store, "1", "storage", formatted=frozenset())
    store.transact(read(granted(store, "2"), "storage"))
    assert known(store) == {"storage": (True, False)}


@pytest.mark.parametrize("found", [False, True])
def test_a_permission_to_format_is_good_for_one_answer(store: MemoryStore, found: bool) -> None:
    answer_of(store, "1", "storage", "tdx-cache")
    store.transact(Ask(Put(VolumeRow(VM, "storage", in_use=True, format_allowed=True))))
    unit = evolve(sync(granted(store, "2"), "2", "storage"), formatted=frozenset({"storage"} if found else ()))
    answer = store.transact(unit)
    assert answer.in_use == (("storage",) if found else ())
    assert store.transact(unit) == evolve(answer, replayed=True)
    assert known(store)["storage"] == (True, False)
    assert answer_of(store, "3", "storage", formatted=frozenset()).in_use == ("storage",)


def test_a_permission_waits_for_a_boot_that_lists_the_volume(store: MemoryStore) -> None:
    answer_of(store, "1", "storage", "tdx-cache")
    store.transact(Ask(Put(VolumeRow(VM, "storage", in_use=True, format_allowed=True))))
    answer_of(store, "2", "tdx-cache")
    assert known(store)["storage"] == (True, True)


# --- restore ---


def test_after_a_restore_no_token_and_no_nonce_of_before_counts(store: MemoryStore) -> None:
    unit = granted(store)
    store.transact(StoreRestored(NOW + 10))
    assert store.transact(Ask(ReadTimes())).horizon == NOW + 70
    assert "voided" in refused(store, sync(unit, "body", "storage")).reason
    assert [row.voided_at for row in store.transact(Ask(Scan(BootRow)))] == [None]  # no row is rewritten
    audit = store.transact(Ask(Scan(AuditRow)))[-1]
    assert (audit.actor, audit.event, audit.decision) == ("operator", "store restored", "done")
    assert audit.keys == f"nonce horizon from {rfc3339(0)} to {rfc3339(NOW + 70)}"


def test_a_boot_from_the_future_is_a_fault_of_ours(store: MemoryStore) -> None:
    """A clock that was ahead granted it, and `store restored` under the right clock cannot cover its time."""
    unit = granted(store)
    store.transact(StoreRestored(NOW - 1000))
    with pytest.raises(Unavailable) as caught:
        store.transact(evolve(sync(unit, "body", "storage"), now=NOW - 900))
    assert (caught.value.code, "the boot was granted at" in caught.value.reason) == (Code.SERVER_FAULT, True)


# --- secrets ---


def test_nothing_secret_is_in_a_file_a_repr_or_an_audit_row(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "keys.db", vault=VAULT)
    token = hashlib.sha256(b"a token").hexdigest().encode()
    unit = evolve(boot("canary"), token_digest=hashlib.sha256(token).digest())
    first = sync(unit, "body", "storage", "tdx-cache", rekey=["storage"])
    refusal = RecordRefusal(NOW, "r", VM, platform("home"), "tcb_rejected", "why", bytes(32), "")
    root = store.transact(unit)
    shown = [repr(unit), repr(root), repr(first), repr(refusal)]
    shown += [repr(store.transact(first)), repr(store.transact(first)), repr(store.transact(refusal))]
    second = boot("second")
    store.transact(second)
    shown += [repr(read(second, "storage")), repr(store.transact(read(second, "storage"))), repr(dump(store))]
    keys = (*first.fresh.values(), unit.root, second.root)
    secrets = [VAULT.current.key.reveal(), token, bytes.fromhex(token.decode())]
    for key in keys:
        assert key is not None
        secrets += [key.passphrase.reveal(), bytes.fromhex(key.passphrase.reveal().decode()), key.data_key.reveal()]
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    store.close()
    files += b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert unit.boot_id.encode() in files
    text = "\n".join(shown)
    for secret in secrets:
        for form in (secret, secret.hex().encode(), repr(secret)[2:-1].encode()):
            assert form not in files
            assert form.decode("latin-1") not in text


# --- two phases ---


def handed(keys: HandedKeys) -> list[tuple[str, bytes | None, bytes]]:
    return [
        (volume, None if pair.current is None else pair.current.reveal(), pair.next.reveal())
        for volume, pair in keys.volumes
    ]


def test_a_lost_attestation_is_given_again_with_both_keys(store: MemoryStore) -> None:
    first = attest(granted(store, "1", exchange="two-phase"), "body", "storage", "tdx-cache")
    _ = store.transact(first)
    _ = store.transact(confirm(first, {"storage": True, "tdx-cache": True}))
    second = attest(granted(store, "2", exchange="two-phase"), "body", "tdx-cache", "storage")
    given = store.transact(second)
    again = store.transact(evolve(second, request_id="again"))
    assert (given.replayed, again.replayed) == (False, True)
    assert handed(again) == handed(given)
    assert [volume for volume, _, _ in handed(given)] == ["tdx-cache", "storage"]
    assert all(current not in (None, following) for _, current, following in handed(given))
    assert again.k3s_encryption_key == given.k3s_encryption_key
    assert again.confirm_nonce == given.confirm_nonce


def test_audit_rows_of_a_vm_name_boot_profile_and_quote(store: MemoryStore) -> None:
    base = granted(store, "base")
    for _ in range(2):
        _ = store.transact(sync(base, "body", "storage"))
    reader = granted(store, "reader")
    two = granted(store, "two", exchange="two-phase", exchange_downgrade="allow")
    attested = attest(two, "body", "storage")
    for unit in (read(reader, "storage"), attested, confirm(attested, {"storage": True})):
        _ = store.transact(unit)
    rows = store.transact(Ask(Scan(AuditRow)))
    assert {row.profile for row in rows} == {"profile 1.0"}
    events = [(row.boot_id, row.event, row.decision) for row in rows]
    assert sorted(events) == sorted(
        [(unit.boot_id, "boot", "granted") for unit in (base, reader, two)]
        + [(base.boot_id, "sync", "granted"), (base.boot_id, "sync", "replayed"), (reader.boot_id, "read", "granted")]
        + [(two.boot_id, "attest volumes", "granted"), (two.boot_id, "confirm volumes", "granted")]
    )
    of_quotes = {unit.boot_id: unit.quote_digest for unit in (base, reader, two)}
    assert all(row.quote_digest in (of_quotes[row.boot_id or ""], attested.quote.digest) for row in rows)


def test_a_lost_attestation_needs_the_keys_that_it_was_given(store: MemoryStore) -> None:
    attested = attest(granted(store, "1", exchange="two-phase"), "body", "storage")
    _ = store.transact(attested)
    other = attest(boot("2"), "body", "storage").confirm_nonces
    with pytest.raises(KeyUnavailable, match="confirm nonce"):  # it was made under another key-encryption key
        _ = store.transact(evolve(attested, request_id="again", confirm_nonces=other))
    _ = store.connection.execute(
        "UPDATE generation SET state = 'retired', retired_at = 1, retirement = 'prune' WHERE volume = 'k3s'"
    )
    with pytest.raises(KeyUnavailable, match="no active encryption key"):
        _ = store.transact(evolve(attested, request_id="again"))
