"""The claim, the nonce, the root passphrase, the records: each rule of a boot by itself."""

from __future__ import annotations

import re

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.errors import KeyUnavailable, Refused, SealBroken, Unavailable
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.store._rows import (
    AttestationRow,
    AuditRow,
    BootRow,
    Claim,
    GenerationRow,
    Insert,
    NonceRow,
    Pin,
    Platform,
    Put,
    Read,
    ReadTimes,
    Scan,
    SetHorizon,
    UpdateGeneration,
    Vm,
    VmRow,
    VolumeRow,
)
from chutes_proto.store._run import Ask
from chutes_proto.testing.store_suite._parts import NOW, VAULT, VM, boot, dump, entropy, fresh, platform, sync
from chutes_proto.units.boot import BootGrant, GrantBoot, RecordRefusal
from chutes_proto.units.keys import VmKeys
from chutes_proto.units.nonces import SWEEP_SECONDS, ForgetNonces, Nonce, RaiseHorizon
from chutes_proto.wire.codes import Code
from tests.store.memory import MemoryStore

HOME, AWAY = platform("home"), platform("away")
OTHER = Vault(KeyEncryptionKey.from_bytes(b"x" * 32))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def refused(store: MemoryStore, unit: GrantBoot, code: Code) -> Refused:
    """The refusal; asserts that nothing changed."""
    before = dump(store)
    with pytest.raises(Refused) as caught:
        store.transact(unit)
    assert caught.value.code is code
    assert dump(store) == before
    return caught.value


def claim(store: MemoryStore, vm: Vm = VM) -> VmRow:
    row = store.transact(Ask(Read(VmRow, vm)))
    assert row is not None
    return row


def keys(store: MemoryStore) -> list[tuple[str, int, str, str | None]]:
    rows = store.transact(Ask(Scan(GenerationRow)))
    return [(row.volume, row.generation, row.state, row.retirement) for row in rows]


# --- what a grant leaves behind ---


def test_a_first_boot_and_all_that_it_writes(store: MemoryStore) -> None:
    unit = boot("first")
    grant = store.transact(unit)
    assert unit.root is not None
    assert grant == BootGrant(unit.boot_id, unit.root.passphrase)
    assert claim(store) == VmRow(VM, HOME.pin, HOME.instance_id, HOME.ppid, False, "base", NOW, NOW)
    assert store.transact(Ask(Scan(NonceRow))) == (NonceRow(unit.nonce.value, "boot", NOW - 5, NOW),)
    (row,) = store.transact(Ask(Scan(BootRow)))
    assert (row.boot_id, row.token_digest, row.certificate) == (unit.boot_id, unit.token_digest, unit.certificate)
    assert (row.token_expires_at, row.spent_at, row.voided_at) == (NOW + 600, None, None)
    (key,) = store.transact(Ask(Scan(GenerationRow)))
    assert (key.volume, key.generation, key.state, key.origin) == ("root", 1, "active", unit.boot_id)
    assert (key.delivered_at, key.provisional) == (NOW, False)
    (verdict,) = store.transact(Ask(Scan(AttestationRow)))
    assert (verdict.attestation_id, verdict.code, verdict.reason) == (unit.boot_id, None, "first claim")
    (audit,) = store.transact(Ask(Scan(AuditRow)))
    assert audit == AuditRow(
        at=NOW,
        actor="vm",
        event="boot",
        decision="granted",
        reason="first claim",
        vm=VM,
        boot_id=unit.boot_id,
        request_id=unit.boot_id,
        pin=HOME.pin,
        profile="profile 1.0",
        quote_digest=unit.quote_digest,
        keys="root/1 created",
        peer_address="192.0.2.1",
    )


def test_the_root_passphrase_is_made_once(store: MemoryStore) -> None:
    roots = [store.transact(boot(str(index), now=NOW + index)).root for index in range(3)]
    assert roots[0] == roots[1] == roots[2]
    assert keys(store) == [("root", 1, "active", None)]
    assert claim(store).last_boot_at == NOW + 2
    assert store.transact(evolve(boot("image"), root=None)).root is None
    assert [row.keys for row in store.transact(Ask(Scan(AuditRow)))] == [
        "root/1 created",
        "root/1 kept",
        "root/1 kept",
        "",
    ]


# --- nonces ---


def test_a_replay_is_refused_whatever_else_is_new(store: MemoryStore) -> None:
    store.transact(boot("first"))
    replay = evolve(boot("second", now=NOW + 1), nonce=evolve(boot("first").nonce, purpose="runtime"))
    assert refused(store, replay, Code.NONCE_INVALID).reason == "nonce redeemed before"


def test_old_redemptions_go_a_thousand_at_a_time_and_stay_refused(store: MemoryStore) -> None:
    until = NOW + 2 * SWEEP_SECONDS
    for index in range(1500):
        store.transact(Ask(Claim(NonceRow(entropy(str(index), 32), "boot", NOW + index, NOW + index + 7))))
    late = until + 86_400
    assert store.transact(RaiseHorizon(late))
    assert store.transact(Ask(ReadTimes())).horizon == until
    assert not store.transact(RaiseHorizon(late + SWEEP_SECONDS - 1))  # another server, or too soon
    assert [store.transact(ForgetNonces(late)) for _ in range(3)] == [1000, 500, 0]
    again = boot("again", now=late)
    with pytest.raises(Unavailable):
        store.transact(evolve(again, nonce=Nonce(entropy("1", 32), "boot", NOW + 1)))
    store.transact(again)


def test_nothing_is_forgotten_that_the_horizon_does_not_cover(store: MemoryStore) -> None:
    store.transact(boot("first"))
    assert store.transact(ForgetNonces(NOW + 10 * 86_400)) == 0
    store.transact(Ask(SetHorizon(NOW + 10 * 86_400)))  # as after a clock that was ahead
    assert store.transact(ForgetNonces(NOW + 60)) == 0


def test_redemptions_of_the_last_day_stay(store: MemoryStore) -> None:
    store.transact(boot("first"))
    store.transact(boot("second", now=NOW + 86_399))
    store.transact(RaiseHorizon(NOW + 86_399 - 60))
    assert store.transact(ForgetNonces(NOW + 86_399 - 60)) == 0
    assert len(store.transact(Ask(Scan(NonceRow)))) == 2


# --- claims ---


def test_a_name_belongs_to_its_platform(store: MemoryStore) -> None:
    store.transact(boot("first"))
    refusal = refused(store, evolve(boot("thief"), platform=AWAY), Code.PLATFORM_MISMATCH)
    assert refusal.status == 403
    assert refusal.detail == "This VM name is bound to another platform."
    assert str(HOME.pin) in refusal.reason
    assert str(AWAY.pin) in refusal.reason
    store.transact(boot("again"))


def test_the_instance_id_counts_and_the_ppid_where_there_is_none(store: MemoryStore) -> None:
    assert platform("a").pin.kind == "instance"
    store.transact(boot("first"))
    store.transact(evolve(boot("same instance"), platform=Platform(HOME.instance_id, bytes(16))))
    assert claim(store).ppid == bytes(16)
    refused(store, evolve(boot("no instance"), platform=Platform(None, HOME.ppid)), Code.PLATFORM_MISMATCH)
    bare = evolve(boot("bare", vm=Vm("other", "vm")), platform=Platform(None, HOME.ppid))
    store.transact(bare)
    assert claim(store, bare.vm).pin == Pin("ppid", HOME.ppid)
    confused = evolve(bare, platform=Platform(HOME.ppid, HOME.ppid), nonce=boot("x").nonce, boot_id="x")
    refused(store, confused, Code.PLATFORM_MISMATCH)


def test_another_hotkeys_vm_of_the_same_name_is_another_vm(store: MemoryStore) -> None:
    store.transact(boot("first"))
    store.transact(evolve(boot("other", vm=Vm("other", VM.name)), platform=AWAY))


def test_a_proven_hotkey_takes_an_unproven_claim_over_with_new_keys(store: MemoryStore) -> None:
    squatter = boot("squatter")
    squatted = store.transact(squatter)
    store.transact(sync(squatter, "s", "storage"))
    replayed = sync(squatter, "s", "storage")
    unspent = boot("unspent", now=NOW + 2)
    store.transact(unspent)
    owner = evolve(boot("owner", now=NOW + 3), platform=AWAY, hotkey_proven=True)
    taken = store.transact(owner)
    assert taken.root not in (None, squatted.root)
    assert (claim(store).pin, claim(store).proven, claim(store).created_at) == (AWAY.pin, True, NOW + 3)
    assert keys(store) == [
        ("root", 1, "retired", "takeover"),
        ("root", 2, "active", None),
        ("storage", 1, "retired", "takeover"),
    ]
    assert store.transact(Ask(Scan(VolumeRow))) == (VolumeRow(VM, "storage", False, False),)
    for old in (replayed, evolve(replayed, body_digest=bytes(32)), evolve(sync(unspent, "t", "storage"), now=NOW + 4)):
        with pytest.raises(Refused) as caught:
            store.transact(old)
        assert caught.value.reason == "boot token: voided"
    answer = store.transact(sync(owner, "o", "storage"))
    assert answer.in_use == ("storage",)
    assert ("storage", 2, "active", None) in keys(store)
    assert "taken over from instance:" in store.transact(Ask(Scan(AuditRow)))[-2].reason
    assert store.transact(Ask(Scan(AuditRow)))[-2].keys == "root/1 retired, storage/1 retired, root/2 created"
    refused(store, boot("squatter again"), Code.PLATFORM_MISMATCH)


def test_a_pruned_key_is_not_revived_for_the_new_owner(store: MemoryStore) -> None:
    squatter = boot("squatter")
    store.transact(squatter)
    store.transact(sync(squatter, "s", "storage"))
    second = boot("second")
    store.transact(second)
    store.transact(sync(second, "t", "tdx-cache"))
    owner = evolve(boot("owner"), platform=AWAY, hotkey_proven=True)
    store.transact(owner)
    store.transact(sync(owner, "o", "storage", "tdx-cache"))
    assert [key for key in keys(store) if key[2] == "active"] == [
        ("root", 2, "active", None),
        ("storage", 2, "active", None),
        ("tdx-cache", 2, "active", None),
    ]


def test_a_proven_claim_is_taken_over_by_no_boot(store: MemoryStore) -> None:
    store.transact(boot("first"))
    store.transact(evolve(boot("proven"), hotkey_proven=True))
    assert claim(store).proven
    refusal = refused(store, evolve(boot("thief"), platform=AWAY, hotkey_proven=True), Code.PLATFORM_MISMATCH)
    assert "a proven claim binds it" in refusal.reason
    store.transact(boot("unsigned"))
    assert claim(store).proven


def import_key(store: MemoryStore, state: str = "active") -> None:
    row = VmKeys(VM, VAULT, NOW, "import").sealer("storage", fresh("imported"))(1)
    store.transact(Ask(Insert(row)))
    if state != "active":
        store.transact(Ask(UpdateGeneration(evolve(row, state="retired", retired_at=NOW, retirement="rekey"))))


@pytest.mark.parametrize("state", ["active", "retired"])
def test_a_free_name_that_holds_keys_is_opened_by_a_signature_only(store: MemoryStore, state: str) -> None:
    import_key(store, state)
    refusal = refused(store, boot("unsigned"), Code.PLATFORM_MISMATCH)
    assert "holds keys and is bound to no platform" in refusal.reason
    signed = evolve(boot("signed"), hotkey_proven=True)
    store.transact(signed)
    assert claim(store).proven
    answer = store.transact(sync(signed, "body", "storage"))
    assert (answer.passphrases[0][1] == fresh("imported").passphrase) == (state == "active")


def test_a_purged_key_holds_no_name(store: MemoryStore) -> None:
    row = VmKeys(VM, VAULT, NOW, "import").sealer("storage", fresh("imported"))(1)
    store.transact(Ask(Insert(evolve(row, state="purged", sealed=None, kek_id=None, wrapped_key=None))))
    store.transact(boot("first"))


def test_a_platform_holds_so_many_names(store: MemoryStore) -> None:
    for index in range(2):
        store.transact(evolve(boot(str(index), vm=Vm(VM.hotkey, f"vm-{index}")), claims_per_platform=2))
    third = evolve(boot("third", vm=Vm(VM.hotkey, "vm-2")), claims_per_platform=2)
    refusal = refused(store, third, Code.PLATFORM_MISMATCH)
    assert "holds 2 names, and limits.claims_per_platform is 2" in refusal.reason
    store.transact(evolve(boot("known", vm=Vm(VM.hotkey, "vm-1")), claims_per_platform=2))
    store.transact(evolve(third, platform=AWAY))
    takeover = evolve(boot("takeover", vm=third.vm), hotkey_proven=True, claims_per_platform=2)
    refused(store, takeover, Code.PLATFORM_MISMATCH)


# --- exchange ---


def test_what_was_served_two_phase_gets_no_token_again(store: MemoryStore) -> None:
    two_phase = evolve(boot("first"), exchange="two-phase")
    store.transact(two_phase)
    with pytest.raises(Refused, match="Boot token not found or expired"):
        store.transact(sync(two_phase, "body", "storage"))
    refused(store, boot("downgrade"), Code.EXCHANGE_DOWNGRADE)
    store.transact(evolve(boot("allowed"), exchange_downgrade="allow"))
    refused(store, boot("downgrade"), Code.EXCHANGE_DOWNGRADE)
    store.transact(evolve(boot("two-phase"), exchange="two-phase"))


def test_an_upgrade_is_welcome_and_a_new_owner_starts_afresh(store: MemoryStore) -> None:
    store.transact(boot("base"))
    store.transact(evolve(boot("upgrade"), exchange="two-phase"))
    assert claim(store).exchange == "two-phase"
    store.transact(evolve(boot("owner"), platform=AWAY, hotkey_proven=True))
    assert claim(store).exchange == "base"


# --- keys that are not available ---


def test_a_missing_key_spends_nothing(store: MemoryStore) -> None:
    store.transact(boot("first"))
    before = dump(store)
    with pytest.raises(KeyUnavailable):
        store.transact(evolve(boot("second"), vault=OTHER))
    assert dump(store) == before
    store.transact(evolve(boot("second"), vault=Vault(OTHER.current, VAULT.current)))


def test_a_row_of_another_vm_does_not_open(store: MemoryStore) -> None:
    stolen, thief = boot("1"), boot("2", vm=Vm(VM.hotkey, "thief"))
    store.transact(stolen)
    (row,) = store.transact(Ask(Scan(GenerationRow)))
    store.transact(Ask(Insert(evolve(row, vm=thief.vm))))
    store.transact(Ask(Put(evolve(claim(store), vm=thief.vm))))
    with pytest.raises(SealBroken):
        store.transact(thief)


# --- refusals ---


def refusal(label: str = "1", **changes: object) -> RecordRefusal:
    unit = RecordRefusal(
        now=NOW,
        request_id=label,
        vm=VM,
        platform=HOME,
        code="measurement_mismatch",
        reason="RTMR1 differs",
        quote_digest=bytes(32),
        peer_address="192.0.2.1",
    )
    return evolve(unit, **changes)  # type: ignore[arg-type]


def test_a_refusal_is_kept_with_its_reason(store: MemoryStore) -> None:
    assert store.transact(refusal()) is True
    (verdict,) = store.transact(Ask(Scan(AttestationRow)))
    assert (verdict.code, verdict.reason, verdict.pin) == ("measurement_mismatch", "RTMR1 differs", HOME.pin)
    (audit,) = store.transact(Ask(Scan(AuditRow)))
    assert (audit.decision, audit.reason) == ("refused", "measurement_mismatch: RTMR1 differs")
    assert (audit.request_id, audit.boot_id, audit.keys) == ("1", None, "")


def test_so_many_refusals_of_a_platform_are_kept_a_day(store: MemoryStore) -> None:
    midnight = NOW - NOW % 86_400
    recorded = [store.transact(refusal(str(i), per_day=3, now=midnight + 86_399)) for i in range(5)]
    assert recorded == [True, True, True, False, False]
    assert len(store.transact(Ask(Scan(AuditRow)))) == 3
    assert store.transact(refusal("away", per_day=3, platform=AWAY, now=midnight + 86_399))
    assert store.transact(refusal("tomorrow", per_day=3, now=midnight + 86_400))
    store.transact(boot("granted", now=midnight + 86_400))
    assert store.transact(refusal("after", per_day=2, now=midnight + 86_400)), "a grant does not count"


@example("5Grwva/vm-1  granted   root/1 created  first claim", "\u3164", "")
@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=5000))
def test_hostile_text_is_kept_legible_and_short(hotkey: str, name: str, reason: str) -> None:
    store = MemoryStore()
    store.transact(refusal(vm=Vm(hotkey, name), reason=reason))
    (row,) = store.transact(Ask(Scan(AttestationRow)))
    for text, given_text, limit in (
        (row.vm.hotkey, hotkey, 64),
        (row.vm.name, name, 128),
        (row.reason, reason, 2000),
    ):
        assert text.isprintable()
        assert len(text) == min(len(given_text), limit)
        text.encode()
    assert re.fullmatch("[!-~\ufffd]*", row.vm.hotkey + row.vm.name), "a blank would pose as more columns of a table"
