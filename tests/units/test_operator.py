"""An operator's commands on rows: keys, names, and the audit row of each."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from chutes_proto.errors import KeyUnavailable, Refused
from chutes_proto.keys.vault import NONCE_SIZE, Address, FreshKey, KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store._rows import (
    AuditRow,
    AuditWanted,
    CountSealed,
    ErasureRow,
    GenerationRow,
    Insert,
    LogTileRow,
    Platform,
    Read,
    ReadAll,
    ReadLog,
    ReadUnclaimed,
    RewrapGenerations,
    Scan,
    Vm,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask, Unit
from chutes_proto.testing.store_suite._parts import (
    NOW,
    VAULT,
    VM,
    attest,
    boot,
    confirm,
    dump,
    entropy,
    platform,
    sync,
)
from chutes_proto.units.erasure import EraseVm, RepeatErasure
from chutes_proto.units.log import OpenLogKey, SequenceLog
from chutes_proto.units.operator import (
    AllowFormat,
    BindVm,
    History,
    ImportKeys,
    PurgeAudits,
    Purged,
    PurgeKeys,
    ReadAuditPage,
    RebindVm,
    RecordReload,
    RecordStart,
    RestoreKey,
    RewrapKeys,
    StoreRestored,
)
from chutes_proto.units.rotation import AttestVolumes, Pair
from chutes_proto.wire.codes import Code
from tests.store.memory import MemoryStore

WHY = "operator: because"
NEW = Vault(KeyEncryptionKey.from_bytes(b"n" * 32), VAULT.current)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def booted(store: MemoryStore, label: str, *volumes: str, **more: Any) -> dict[str, bytes]:
    granted = boot(label)
    store.transact(granted)
    answer = store.transact(sync(granted, "body", *volumes, **more))
    return {volume: passphrase.reveal() for volume, passphrase in answer.passphrases}


def refused(store: MemoryStore, unit: Unit[Any]) -> Refused:
    before = dump(store)
    with pytest.raises(Refused) as caught:
        store.transact(unit)
    assert dump(store) == before
    return caught.value


def last_audit(store: MemoryStore) -> AuditRow:
    row = store.transact(Ask(Scan(AuditRow)))[-1]
    assert (row.actor, row.decision) == ("operator", "done")
    return row


def audit(store: MemoryStore, **chosen: Any) -> tuple[AuditRow, ...]:
    return store.transact(ReadAuditPage(AuditWanted(**chosen))).rows


def sealed(store: MemoryStore) -> dict[str, int]:
    return dict(store.transact(Ask(CountSealed())))


def states(store: MemoryStore, volume: str = "storage") -> list[tuple[int, str, str | None]]:
    rows = store.transact(Ask(ReadAll(GenerationRow, VM)))
    return [(row.generation, row.state, row.retirement) for row in rows if row.volume == volume]


def test_a_purge_takes_the_first_entries_that_are_old(store: MemoryStore) -> None:
    for at in (5, 3, *[9] * 600, 10, 4):
        store.transact(Ask(Insert(AuditRow(at, "vm", f"at {at}", "granted"))))
    assert store.transact(PurgeAudits(NOW, 10, WHY)) == Purged(0, None), "nothing is sequenced"
    while store.transact(SequenceLog(entropy("salts", 16 * 999))):
        pass
    log = store.transact(Ask(ReadLog(0, 999)))
    before = dump(store)
    assert store.transact(PurgeAudits(NOW, 10, WHY)) == Purged(512, None)
    assert store.transact(PurgeAudits(NOW, 10, WHY, beyond=512)) == Purged(0, None)
    assert dump(store) == before, "nothing is deleted before it is to be carried out"
    assert store.transact(PurgeAudits(NOW, 10, WHY, span=256, carry_out=True)) == Purged(256, 256)
    told = last_audit(store)
    assert (told.event, told.reason, told.keys) == ("audit purged", WHY, "entries below 256: 256")
    assert store.transact(PurgeAudits(NOW, 10, WHY, beyond=256, carry_out=True)) == Purged(256, None)
    assert store.transact(Ask(ReadLog(0, 999))) == log[512:]
    assert [row.tile for row in store.transact(Ask(Scan(LogTileRow))) if row.level == 0] == [2]
    assert store.transact(PurgeAudits(NOW, 9, WHY)) == Purged(0, None)


# --- keys ---


def test_a_rekeyed_key_is_restored(store: MemoryStore) -> None:
    first = booted(store, "1", "storage")
    booted(store, "2", "storage", rekey=["storage"])
    row = store.transact(RestoreKey(NOW + 9, VM, "storage", 1, WHY))
    assert (row.generation, row.state, row.retired_at) == (1, "active", None)
    assert states(store) == [(1, "active", None), (2, "retired", "superseded")]
    assert booted(store, "3", "storage") == first
    (told,) = audit(store, event="key restored")
    assert (told.keys, told.reason, told.vm) == ("storage/2 retired, storage/1 active", WHY, VM)
    for generation, state in ((1, "active"), (9, "not there")):
        assert state in str(refused(store, RestoreKey(NOW, VM, "storage", generation, WHY)).detail)


def test_a_restore_ends_a_rotation_that_is_open(store: MemoryStore) -> None:
    for label in ("1", "2"):
        granted = evolve(boot(label), exchange="two-phase")
        store.transact(granted)
        attested = attest(granted, "body", "storage")
        store.transact(attested)
        if label == "1":
            store.transact(confirm(attested, {"storage": False}))
    store.transact(RestoreKey(NOW + 2, VM, "storage", 2, WHY))
    assert states(store) == [(1, "retired", "superseded"), (2, "active", None)]
    store.transact(RestoreKey(NOW + 2, VM, "storage", 1, WHY))
    assert refused(store, confirm(attested, {"storage": True})).code is Code.ROTATION_SUPERSEDED


def test_a_confirmation_that_a_restore_undid_is_refused_when_it_is_repeated(store: MemoryStore) -> None:
    for label, rotated in (("1", False), ("2", True)):
        granted = evolve(boot(label), exchange="two-phase")
        store.transact(granted)
        attested = attest(granted, "body", "storage")
        store.transact(attested)
        store.transact(confirm(attested, {"storage": rotated}))
    store.transact(RestoreKey(NOW + 2, VM, "storage", 1, WHY))
    assert refused(store, confirm(attested, {"storage": True})).code is Code.ROTATION_SUPERSEDED


def test_a_purge_keeps_what_it_must(store: MemoryStore) -> None:
    for label in "12345":
        booted(store, label, "storage", rekey=["storage"])
    late = NOW + 1000
    assert store.transact(PurgeKeys(late, 1000, WHY, (VM,))) == ()  # retired at NOW + 1
    before = dump(store)
    chosen = store.transact(PurgeKeys(late, 900, WHY, (VM,)))
    assert [row.generation for row in chosen] == [1, 2]
    assert dump(store) == before
    assert store.transact(PurgeKeys(late, 900, WHY, (Vm("other", "vm"),), carry_out=True)) == ()
    assert store.transact(PurgeKeys(late, 900, WHY, (VM,), carry_out=True)) == chosen
    assert [state for _, state, _ in states(store)] == ["purged", "purged", "retired", "retired", "active"]
    gone = store.transact(Ask(ReadAll(GenerationRow, VM)))[1:3]
    assert [(row.sealed, row.wrapped_key, row.kek_id) for row in gone] == [(None, None, None)] * 2
    assert last_audit(store).keys == "storage/1 purged, storage/2 purged"
    assert store.transact(PurgeKeys(late, 900, WHY, (VM,), carry_out=True)) == ()
    assert "purged" in str(refused(store, RestoreKey(NOW, VM, "storage", 1, WHY)).detail)
    assert booted(store, "6", "storage")


def test_a_rewrap_goes_on_where_it_stopped(store: MemoryStore) -> None:
    for label in "123":
        keys = booted(store, label, "storage", "tdx-cache", rekey=["storage"])
    before = store.transact(Ask(Scan(GenerationRow)))
    passphrases = [VAULT.open(Address(row.vm, row.volume, row.generation), row) for row in before]
    first = store.transact(RewrapKeys(NOW, entropy("seeds", 2 * NONCE_SIZE), NEW, WHY))
    assert first.count == 2
    assert sealed(store) == {NEW.current.kek_id: 2, VAULT.current.kek_id: len(before) - 2}
    granted = boot("during")
    store.transact(evolve(granted, vault=NEW))
    answer = store.transact(evolve(sync(granted, "body", "storage", "tdx-cache"), vault=NEW))
    assert {volume: passphrase.reveal() for volume, passphrase in answer.passphrases} == keys
    rest = store.transact(RewrapKeys(NOW, entropy("more", 100 * NONCE_SIZE), NEW, WHY))
    assert rest.count == len(before) - 2
    assert (rest.last, sealed(store)) == (None, {NEW.current.kek_id: len(before)})
    assert last_audit(store).keys == f"{rest.count} under {NEW.current.kek_id}"
    after = store.transact(Ask(Scan(GenerationRow)))
    assert [row.sealed for row in after] == [row.sealed for row in before]
    alone = Vault(NEW.current)
    assert [alone.open(Address(row.vm, row.volume, row.generation), row) for row in after] == passphrases
    assert len({row.wrapped_key[:NONCE_SIZE] for row in after if row.wrapped_key}) == len(after)
    audits = store.transact(Ask(Scan(AuditRow)))
    assert store.transact(RewrapKeys(NOW, entropy("none", NONCE_SIZE), NEW, WHY)).count == 0
    assert store.transact(Ask(Scan(AuditRow))) == audits
    with pytest.raises(KeyUnavailable):
        store.transact(RewrapKeys(NOW, entropy("lost", NONCE_SIZE), VAULT, WHY))


def test_a_rewrap_wraps_the_key_of_the_log_too(store: MemoryStore) -> None:
    booted(store, "1", "storage")
    store.transact(SequenceLog(entropy("salts", 16)))
    seed = Secret(entropy("seed", 44))
    signer = store.transact(OpenLogKey(NOW, VAULT, seed))
    keys = len(store.transact(Ask(Scan(GenerationRow))))
    assert store.transact(RewrapKeys(NOW, entropy("all", 99 * NONCE_SIZE), NEW, WHY)).count == keys + 1
    assert store.transact(RewrapKeys(NOW, entropy("again", 99 * NONCE_SIZE), NEW, WHY)).count == 0
    assert store.transact(OpenLogKey(NOW, Vault(NEW.current), seed)) == signer
    with pytest.raises(KeyUnavailable, match="audit/1 of the store's own is sealed under"):
        store.transact(OpenLogKey(NOW, Vault(VAULT.current), seed))


def test_a_rewrap_gets_past_rows_that_do_not_open(store: MemoryStore) -> None:
    """However many there are: the next page begins after them."""
    for label in ("1", "2", "3"):
        _ = booted(store, label, "storage", rekey=["storage"])
    rows = store.transact(Ask(Scan(GenerationRow)))
    assert len(rows) == 4
    for row in rows[:2]:
        store.transact(Ask(RewrapGenerations((evolve(row, wrapped_key=bytes(60)),))))
    first = store.transact(RewrapKeys(NOW, entropy("seeds", 2 * NONCE_SIZE), NEW, WHY))
    broken = tuple(Address(row.vm, row.volume, row.generation) for row in rows[:2])
    assert (first.count, first.broken) == (0, broken)
    then = store.transact(RewrapKeys(NOW, entropy("more", 2 * NONCE_SIZE), NEW, WHY, first.last))
    assert (then.count, then.broken) == (2, ())
    assert sealed(store) == {NEW.current.kek_id: 2, VAULT.current.kek_id: 2}


def test_one_format_is_allowed(store: MemoryStore) -> None:
    assert "is known to be in use" in str(refused(store, AllowFormat(NOW, VM, "storage", WHY)).detail)
    booted(store, "1", "storage")
    store.transact(AllowFormat(NOW, VM, "storage", WHY))
    (known,) = store.transact(Ask(ReadAll(VolumeRow, VM)))
    assert (known.in_use, known.format_allowed) == (True, True)
    assert (last_audit(store).event, last_audit(store).keys) == ("format allowed", "storage")


# --- import and names ---


def imported(*keys: tuple[str, bytes], home: bool) -> ImportKeys:
    made = {name: FreshKey.of_passphrase(Secret(text), entropy(name, FreshKey.SIZE)) for name, text in keys}
    return ImportKeys(NOW, VM, made, platform("home") if home else None, VAULT, WHY)


def test_an_import_with_its_platform(store: MemoryStore) -> None:
    unit = imported(("storage", b"an older passphrase"), home=True)
    assert store.transact(unit) == ("storage",)
    assert (last_audit(store).keys, str(platform("home").pin) in last_audit(store).reason) == (
        "storage/1 created",
        True,
    )
    before = dump(store)
    assert store.transact(unit) == ()  # again
    assert dump(store) == before
    assert refused(store, evolve(boot("thief"), platform=platform("elsewhere"))).code is Code.PLATFORM_MISMATCH
    assert booted(store, "1", "storage") == {"storage": b"an older passphrase"}
    (known,) = store.transact(Ask(ReadAll(VolumeRow, VM)))
    assert known.in_use
    other = imported(("tdx-cache", b"new"), ("storage", b"another"), home=True)
    assert "another key already" in str(refused(store, other).detail)


def test_an_import_without_its_platform_opens_to_the_operator_or_the_hotkey(store: MemoryStore) -> None:
    store.transact(imported(("storage", b"an older passphrase"), home=False))
    assert refused(store, boot("anyone")).code is Code.PLATFORM_MISMATCH
    assert store.transact(Ask(ReadUnclaimed(None, 9))) == (VM,)
    store.transact(BindVm(NOW, VM, platform("home"), WHY))
    assert (last_audit(store).event, last_audit(store).pin) == ("vm bound", platform("home").pin)
    assert booted(store, "1", "storage") == {"storage": b"an older passphrase"}
    assert refused(store, BindVm(NOW, VM, platform("home"), WHY)).code is Code.PLATFORM_MISMATCH


def test_an_imported_key_was_not_handed_out_until_a_boot_gets_it(store: MemoryStore) -> None:
    store.transact(imported(("storage", b"an older passphrase"), home=True))
    assert store.transact(Ask(ReadAll(GenerationRow, VM)))[0].delivered_at is None
    booted(store, "1", "storage")
    assert [row.delivered_at for row in store.transact(Ask(ReadAll(GenerationRow, VM))) if row.volume == "storage"] == [
        NOW + 1
    ]


@pytest.mark.parametrize("home", [True, False])
def test_nothing_is_imported_for_whoever_took_the_name_before(store: MemoryStore, home: bool) -> None:
    stranger = evolve(boot("stranger"), platform=platform("elsewhere"), exchange="two-phase")
    store.transact(stranger)
    store.transact(attest(stranger, "body", "tdx-cache"))
    unit = imported(("storage", b"an older passphrase"), home=home)
    assert refused(store, unit).code is Code.PLATFORM_MISMATCH
    store.transact(RebindVm(NOW, VM, platform("home"), False, VAULT, WHY))
    both = imported(("storage", b"an older passphrase"), ("tdx-cache", b"another"), home=home)
    assert store.transact(both) == ("storage", "tdx-cache")
    assert last_audit(store).keys == "storage/1 created, tdx-cache/2 created"
    # the owner is kept to nothing that the stranger did, the exchange among it
    assert booted(store, "1", "storage", "tdx-cache") == {"storage": b"an older passphrase", "tdx-cache": b"another"}
    assert refused(store, evolve(boot("2"), platform=platform("elsewhere"))).code is Code.PLATFORM_MISMATCH


@pytest.mark.parametrize("changes", [{"hotkey_proven": True}, {"platform": platform("home")}])
def test_an_import_for_whom_it_is_known_to_be(store: MemoryStore, changes: dict[str, Any]) -> None:
    store.transact(evolve(boot("1"), **{"platform": platform("elsewhere"), **changes}))
    assert store.transact(imported(("storage", b"an older passphrase"), home=True)) == ("storage",)


@pytest.mark.parametrize("keep", [True, False])
def test_a_name_is_rebound(store: MemoryStore, keep: bool) -> None:
    elsewhere = platform("elsewhere")
    unit = RebindVm(NOW, VM, elsewhere, keep, VAULT, WHY)
    assert refused(store, unit).code is Code.PLATFORM_MISMATCH
    granted = boot("open")
    store.transact(granted)
    first = booted(store, "1", "storage")
    store.transact(unit)
    assert refused(store, sync(granted, "body", "storage")).code is Code.BOOT_TOKEN_INVALID  # voided
    assert refused(store, boot("old place")).code is Code.PLATFORM_MISMATCH
    moved = evolve(boot("moved"), platform=elsewhere)
    store.transact(moved)
    answer = store.transact(sync(moved, "body", "storage"))
    assert (answer.passphrases[0][1].reveal() == first["storage"]) == keep
    (told,) = audit(store, hotkey=VM.hotkey, name=VM.name, event="vm rebound")
    assert told.pin == elsewhere.pin
    assert ("with its keys" if keep else "with new keys") in told.reason
    assert ("retired" in told.keys) != keep
    claim = store.transact(Ask(Read(VmRow, VM)))
    assert claim is not None
    assert (claim.pin, claim.attested) == (elsewhere.pin, None)


def test_a_name_that_its_owner_proved_stays_so_where_its_disks_move(store: MemoryStore) -> None:
    """Else the old machine, whose VM proves the same hotkey, takes the name and retires the keys of the moved disks."""
    store.transact(evolve(boot("1"), hotkey_proven=True))
    elsewhere = platform("elsewhere")
    store.transact(RebindVm(NOW, VM, elsewhere, True, VAULT, WHY))
    old_place = evolve(boot("old place"), hotkey_proven=True)
    assert refused(store, old_place).code is Code.PLATFORM_MISMATCH
    store.transact(evolve(boot("moved"), platform=elsewhere))
    assert refused(store, old_place).code is Code.PLATFORM_MISMATCH
    store.transact(RebindVm(NOW, VM, platform("third"), False, VAULT, WHY))
    store.transact(old_place)  # with new keys, the name is whose hotkey is proven first


def test_a_later_vm_of_the_name_keeps_it_where_an_erasure_is_repeated(store: MemoryStore) -> None:
    """It has no key of its own yet, as its image has the root passphrase."""
    store.transact(evolve(boot("later"), root=None))
    record = ErasureRow("e", VM, NOW - 1, '{"storage":2}')
    assert store.transact(RepeatErasure(NOW + 1, 1, record)) == 0
    assert store.transact(Ask(Read(VmRow, VM))) is not None
    assert store.transact(RepeatErasure(NOW + 1, 2, ErasureRow("f", VM, NOW, "{}"))) == 0
    assert store.transact(Ask(Read(VmRow, VM))) is None


def test_a_name_that_was_rebound_without_the_instance_id_of_its_machine(store: MemoryStore) -> None:
    store.transact(boot("1"))
    home = platform("home")
    assert home.instance_id is not None
    store.transact(RebindVm(NOW, VM, Platform(None, home.ppid), True, VAULT, WHY))
    refusal = refused(store, boot("2"))
    assert f"rebind it with --ppid {home.ppid.hex()} --instance {home.instance_id.hex()}" in refusal.reason
    assert "same PPID" not in refused(store, evolve(boot("3"), platform=platform("elsewhere"))).reason
    store.transact(RebindVm(NOW, VM, home, True, VAULT, WHY))
    store.transact(boot("4"))


def test_what_is_shown(store: MemoryStore) -> None:
    booted(store, "1", "storage")
    rows, volumes = store.transact(History(VM))
    assert [(row.volume, row.generation) for row in rows] == [("root", 1), ("storage", 1)]
    assert [row.volume for row in volumes] == ["storage"]
    store.transact(StoreRestored(NOW + 5, WHY))
    assert last_audit(store).reason == WHY
    everything = audit(store)
    assert [row.event for row in everything] == ["boot", "sync", "store restored"]
    assert audit(store, since=NOW + 1, until=NOW + 5) == everything[1:2]
    assert audit(store, name=VM.name) == audit(store, hotkey=VM.hotkey, name=VM.name) == everything[:2]
    assert audit(store, event="boot") == everything[:1]
    assert audit(store, hotkey="other", name=VM.name) == audit(store, name="other") == ()


def test_a_rotation_since_the_backup_opens_again(store: MemoryStore) -> None:
    """The backup has the next key, which had its age; whose turn it is, one boot or the next is handed it."""

    def attested(label: str) -> tuple[AttestVolumes, Pair]:
        granted = evolve(boot(label), exchange="two-phase")
        store.transact(granted)
        unit = attest(granted, "body", "storage")
        return unit, store.transact(unit).volumes[0][1]

    first, _ = attested("1")
    store.transact(confirm(first, {"storage": False}))
    second, pair = attested("2")
    backup = store.image()
    assert store.transact(confirm(second, {"storage": True})) == (("storage", "promoted"),)
    # while nobody says that it was restored, only the key before is handed out
    for label in ("3", "4"):
        store = MemoryStore(backup)
        assert attested(label)[1].current == pair.current
    store = MemoryStore(backup)
    store.transact(StoreRestored(NOW - 70, WHY))
    written = store.connection.total_changes
    store.transact(StoreRestored(NOW - 70, WHY))
    assert store.connection.total_changes - written == 3  # horizon, decision and audit row: no key a second time
    turns = [attested(label) for label in ("5", "6", "7")]
    assert [turn.current for _, turn in turns] == [pair.next, pair.current, pair.next]
    assert turns[2][1].next == pair.next
    assert store.transact(confirm(turns[2][0], {"storage": True})) == (("storage", "no_pending"),)
    assert [row[1] for row in states(store)] == ["retired", "active"]
    assert attested("8")[1].current == pair.next


def test_audit_rows_are_read_in_pages(store: MemoryStore) -> None:
    for index in range(10):
        store.transact(StoreRestored(NOW + index, f"{index}"))
    forwards: list[list[str]] = []
    beyond: int | None = None
    while not forwards or beyond is not None:
        page = store.transact(ReadAuditPage(AuditWanted(NOW + 1, NOW + 8), beyond=beyond, limit=3, span=4))
        assert len(page.rows) <= 3
        forwards.append([row.reason for row in page.rows])
        beyond = page.beyond
    assert forwards == [["1", "2", "3"], ["4", "5", "6"], ["7"], []]
    newest = store.transact(ReadAuditPage(backwards=True, limit=4))
    assert [row.reason for row in newest.rows] == ["9", "8", "7", "6"]
    rest = store.transact(ReadAuditPage(backwards=True, beyond=newest.beyond, span=5))
    assert [row.reason for row in rest.rows] == ["5", "4", "3", "2", "1"]
    last = store.transact(ReadAuditPage(backwards=True, beyond=rest.beyond, span=5))
    assert [row.reason for row in last.rows] == ["0"]
    assert store.transact(ReadAuditPage(backwards=True, beyond=last.beyond, span=5)).beyond is None
    refused = store.transact(ReadAuditPage(AuditWanted(refused=True), span=4))
    assert refused.rows == ()
    assert refused.beyond is not None, "no index finds the refusals of all, so there is more to look at"


# --- a VM that is decommissioned ---


def test_an_erasure_is_done_once_and_may_be_asked_for_again() -> None:
    store = MemoryStore()
    granted = boot("1")
    _ = store.transact(granted)
    _ = store.transact(sync(granted, "body", "storage"))
    erase = EraseVm(NOW, "e1", 1, VM, "sold", carry_out=True)
    done = store.transact(erase)
    assert {row.volume for row in done.keys} == {"root", "storage"}
    assert done.record is not None
    assert store.transact(RepeatErasure(NOW, 2, done.record)) is None
    before = dump(store)
    again = store.transact(evolve(erase, erasure_id="e2", version=3))
    assert (again.keys, again.claim, again.record) == ((), None, None)
    assert dump(store) == before
    with pytest.raises(Refused, match="has no keys"):
        _ = store.transact(evolve(erase, vm=Vm(VM.hotkey, "another")))


@pytest.mark.parametrize("evidence", [None, "", "not JSON", "[]", '{"after": 1}'])
def test_a_start_after_a_row_without_digests_is_recorded_as_the_first(store: MemoryStore, evidence: str | None) -> None:
    store.transact(RecordReload(NOW, WHY, evidence, "s"))
    assert store.transact(RecordStart(NOW, "s", {"policy": "1"}))
    assert not store.transact(RecordStart(NOW, "s", {"policy": "1"}))
    assert store.transact(RecordStart(NOW, "s", {"policy": "2", "root": "3"}))
    reasons = [row.reason for row in audit(store, event="started")]
    assert reasons == ["s: the first start", "s: changed: policy, root"]
