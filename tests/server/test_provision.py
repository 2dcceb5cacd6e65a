"""The provisioned exchange in process: the order of checks of its operations, what it grants, and its root key."""

import base64
import hashlib
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import Hotkey, HotkeyPair
from chutes_proto.effects import Transact
from chutes_proto.errors import StoreBusy
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedExchange, ServedProfile
from chutes_proto.server._service import Service
from chutes_proto.store._rows import AttestationRow, AuditRow, BootRow, GenerationRow, NonceRow, Vm, VmRow, VolumeRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.operator import RestoreKey
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse
from tests.server.world import CERTIFICATES, MINER, OTHER, World, answer, refusal, service

BUILD = "the passphrase of the build"
HOTKEY = MINER.hotkey.address
UNPROVEN = "Hotkey authentication is missing or invalid. Sign with the miner's hotkey."
ROOT = {"volumes": {"root": {"rotated": True}}}
BOTH = ("storage", "tdx-cache")


def provisioned(exchange: ServedExchange = "provisioned", **changes: Any) -> Service:
    profile = ServedProfile(PROFILE, Secret(BUILD.encode()), False, False, exchange)
    return service(profiles={PROFILE.identity: profile}, **changes)


@pytest.fixture
def world() -> World:
    return World(App(provisioned()))


def proof(nonce: str, body: Any, pair: HotkeyPair = MINER) -> dict[str, str]:
    address = pair.hotkey.address
    message = f"{address}:{nonce}:{hashlib.sha256(json.encode(body)).hexdigest()}"
    signature = pair.sign(message.encode()).hex()
    return {"x-chutes-hotkey": address, "x-chutes-nonce": nonce, "x-chutes-signature": signature}


def boot(world: World, **members: Any) -> HttpResponse:
    nonce = world.nonce()
    body, _ = world.attestation(nonce, **{"miner_hotkey": HOTKEY, "first_boot": False, **members})
    return world.ask("POST", "/servers/boot/attestation", body, headers=proof(nonce, body))


def volumes_request(world: World, nonce: str, *volumes: str) -> dict[str, Any]:
    data = report_data(bytes.fromhex(nonce), spki_sha256(world.certificate))
    return {"quote": encode_quote(world.platform.quote(data, stage="runtime")), "volumes": list(volumes or BOTH)}


def provision(world: World, nonce: str, *volumes: str) -> HttpResponse:
    body = volumes_request(world, nonce, *volumes)
    headers = {"x-quote-nonce": nonce, **proof(nonce, body)}
    return world.ask("POST", "/servers/vm-1/provision", body, headers=headers)


def confirm(world: World, nonce: str, body: Any, **headers: str) -> HttpResponse:
    sent = {"x-confirm-nonce": nonce, **proof(nonce, body), **headers}
    return world.ask("POST", "/servers/vm-1/provision/confirm", body, headers=sent)


def everything(world: World) -> Any:
    return [world.rows(kind) for kind in (NonceRow, BootRow, VmRow, VolumeRow, GenerationRow)]


# --- what is granted ---


def test_the_whole_exchange(world):
    granted = answer(boot(world, first_boot=True))
    assert list(granted) == [
        *("key", "boot_token", "luks_quote_nonce", "root_next", "root_confirm_nonce", "vm_auth_ss58"),
    ]
    assert (granted["key"], granted["boot_token"]) == (BUILD, None)
    assert len(bytes.fromhex(granted["root_next"])) == 64
    assert granted["vm_auth_ss58"].startswith("5")
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT)) == {
        "status": "confirmed",
        "volumes": {"root": {"result": "promoted"}},
    }
    handed = answer(provision(world, granted["luks_quote_nonce"]))
    assert [pair["current"] for pair in handed["volumes"].values()] == [None, None]
    assert len(base64.b64decode(handed["k3s_encryption_key"])) == 32
    rotated = {"volumes": {name: {"rotated": True} for name in BOTH}}
    assert answer(confirm(world, handed["confirm_nonce"], rotated))["status"] == "confirmed"
    (row,) = world.rows(BootRow)
    assert "BEGIN CERTIFICATE" in row.root_ca
    again = answer(boot(world))
    assert again["key"] == granted["root_next"]
    assert again["vm_auth_ss58"] != granted["vm_auth_ss58"]
    secrets = [granted[name] for name in ("root_next", "root_confirm_nonce", "luks_quote_nonce")]
    kept = repr((world.log, world.asked, *everything(world), world.rows(AuditRow)))
    assert not [secret for secret in secrets if secret in kept]


def test_a_fresh_copy_of_the_image_gets_the_builds_passphrase_and_volumes_keep_their_keys(world):
    first = answer(boot(world, first_boot=True))
    assert answer(confirm(world, first["root_confirm_nonce"], ROOT))
    handed = answer(provision(world, first["luks_quote_nonce"]))
    world.now += 2
    copied = answer(boot(world, first_boot=True))
    assert copied["key"] == BUILD
    assert copied["root_next"] != first["root_next"]
    again = answer(provision(world, copied["luks_quote_nonce"]))
    assert [again["volumes"][name]["current"] for name in BOTH] == [handed["volumes"][name]["next"] for name in BOTH]
    assert again["k3s_encryption_key"] == handed["k3s_encryption_key"]


def test_a_lost_confirmation_is_offered_alternately(world):
    first = answer(boot(world, first_boot=True))
    assert answer(confirm(world, first["root_confirm_nonce"], ROOT))  # and the answer is lost
    offered = [answer(boot(world))["key"] for _ in range(4)]
    assert offered == [first["root_next"], BUILD] * 2


def test_who_asks_for_the_second_key_gets_every_key_that_the_disk_may_have(world):
    """Others get the answer that deployed images know, member for member."""
    first = answer(boot(world, first_boot=True, second_key=True))
    assert "key_second" not in first
    assert answer(confirm(world, first["root_confirm_nonce"], ROOT))  # and the answer is lost
    assert "key_second" not in answer(boot(world, second_key=False))
    turns = [answer(boot(world, second_key=True)) for _ in range(2)]
    assert [(one["key"], one.get("key_second")) for one in turns] == [(BUILD, None), (first["root_next"], BUILD)]
    assert turns[0]["root_next"] == first["root_next"]
    assert list(turns[1])[-1] == "key_second"
    assert [row.keys for row in world.rows(AuditRow)][-1].split(", ")[2] == "root/1 second"
    assert refusal(boot(world, second_key="yes"))[0] == 422


def test_a_second_key_that_does_not_open_keeps_no_vm_from_booting_with_the_first(world):
    first = answer(boot(world, first_boot=True, second_key=True))
    assert answer(confirm(world, first["root_confirm_nonce"], ROOT))
    _ = world.store.connection.execute("UPDATE generation SET sealed = ? WHERE generation = 1", (bytes(64),))
    again = answer(boot(world, second_key=True))
    assert (again["key"], again.get("key_second")) == (first["root_next"], None)
    assert answer(confirm(world, again["root_confirm_nonce"], ROOT))


def test_a_confirmation_counts_for_the_newest_grant_and_once(world):
    older, newer = answer(boot(world)), answer(boot(world))
    assert refusal(confirm(world, older["root_confirm_nonce"], ROOT))[:2] == (401, Code.CONFIRM_NONCE_INVALID)
    assert answer(confirm(world, newer["root_confirm_nonce"], ROOT))
    assert answer(confirm(world, newer["root_confirm_nonce"], ROOT))  # the same body again
    other = {"volumes": {"root": {"rotated": False}}}
    assert refusal(confirm(world, newer["root_confirm_nonce"], other))[1] == Code.CONFIRM_NONCE_INVALID
    latest = answer(boot(world))
    world.now += 300
    assert refusal(confirm(world, latest["root_confirm_nonce"], ROOT))[1] == Code.CONFIRM_NONCE_INVALID


def test_a_key_that_was_left_out_is_confirmed_as_often_as_the_vm_asks(world):
    granted = answer(boot(world))
    left_out = {"volumes": {"root": {"rotated": False}}}
    results = [answer(confirm(world, granted["root_confirm_nonce"], left_out))["volumes"]["root"] for _ in range(2)]
    assert results[0] == results[1]
    assert answer(boot(world))["key"] == granted["key"]


def test_a_late_first_boot_changes_nothing(world):
    """It was sent before an attempt that was granted since, and its nonce is still valid."""
    late = world.nonce()
    body, _ = world.attestation(late, miner_hotkey=HOTKEY, first_boot=True)
    world.now += 2
    granted = answer(boot(world, first_boot=True))
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT))
    before = everything(world)
    response = world.ask("POST", "/servers/boot/attestation", body, headers=proof(late, body))
    assert refusal(response) == (401, Code.NONCE_INVALID, "Invalid nonce supplied")
    assert everything(world) == before


def test_a_first_boot_counts_only_with_a_nonce_younger_than_all_that_were_granted(world):
    """Not with one of the same second, and not after a boot with an older nonce that was granted in between."""
    older = world.nonce()
    world.now += 2
    same, newest = world.nonce(), world.nonce()

    def ask(nonce: str, *, first_boot: bool) -> HttpResponse:
        body, _ = world.attestation(nonce, miner_hotkey=HOTKEY, first_boot=first_boot)
        response: HttpResponse = world.ask("POST", "/servers/boot/attestation", body, headers=proof(nonce, body))
        return response

    assert answer(ask(newest, first_boot=True))
    assert refusal(ask(same, first_boot=True))[:2] == (401, Code.NONCE_INVALID)
    assert answer(ask(older, first_boot=False))
    assert refusal(ask(same, first_boot=True))[:2] == (401, Code.NONCE_INVALID)


def test_the_builds_passphrase_is_replaced_at_once_and_the_next_key_after_a_day(world):
    """Every VM has the build's; a backup has the next one, as both are made in one transaction."""
    world.app = App(provisioned(rotate_after=86_400))
    first = answer(boot(world, first_boot=True))
    assert first["key"] == BUILD != first["root_next"]
    assert answer(confirm(world, first["root_confirm_nonce"], ROOT))
    again = answer(boot(world))
    assert again["key"] == again["root_next"] == first["root_next"]
    assert answer(confirm(world, again["root_confirm_nonce"], ROOT))
    world.now += 86_400
    assert answer(boot(world))["root_next"] != again["key"]


@pytest.mark.parametrize("authorized", [MINER, OTHER])
def test_a_signature_is_checked_once_in_each_request(monkeypatch, authorized):
    checked, check = [], Hotkey.check_signature

    def counted(hotkey: Hotkey, message: bytes, signature: bytes) -> None:
        checked.append(message)
        check(hotkey, message, signature)

    monkeypatch.setattr(Hotkey, "check_signature", counted)
    candidate = evolve(provisioned().profiles[PROFILE.identity], rc=True)
    allowed = evolve(candidate, authorized_hotkeys=frozenset({authorized.hotkey.address}))
    world = World(App(service(profiles={PROFILE.identity: allowed})))
    response = boot(world)
    if authorized is OTHER:
        assert refusal(response)[1] == Code.MEASUREMENT_MISMATCH
        assert len(checked) == 1
        return
    granted = answer(response)
    assert len(checked) == 1
    handed = answer(provision(world, granted["luks_quote_nonce"]))
    assert len(checked) == 2
    rotated = {"volumes": {volume: {"rotated": True} for volume in BOTH}}
    assert answer(confirm(world, handed["confirm_nonce"], rotated))
    assert len(checked) == 3


def test_a_repeated_provision_gets_the_same_answer(world):
    """Without the root key, which the boot was handed beside them."""
    granted = answer(boot(world))
    body = volumes_request(world, nonce := granted["luks_quote_nonce"])
    headers = {"x-quote-nonce": nonce, **proof(nonce, body)}
    first, again = (answer(world.ask("POST", "/servers/vm-1/provision", body, headers=headers)) for _ in range(2))
    assert list(first["volumes"]) == [*BOTH]
    assert again == first


def test_a_repeated_confirmation_is_no_promise_of_a_root_key_that_was_replaced_since(world):
    """Its VM removes the old key from the disk if it hears 200."""
    granted = answer(boot(world, first_boot=True))
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT))
    vm = Vm(HOTKEY, "vm-1")
    world.store.transact(RestoreKey(world.now, vm, "root", 1, "the operator's choice"))
    assert refusal(confirm(world, granted["root_confirm_nonce"], ROOT))[:2] == (409, Code.ROTATION_SUPERSEDED)


def test_a_boot_of_another_exchange_ends_the_confirmation_of_a_root_key(world):
    granted = answer(boot(world, first_boot=True))
    world.app = App(provisioned("two-phase"))
    body, headers = world.attestation(world.nonce(), miner_hotkey=HOTKEY)
    assert answer(world.ask("POST", "/servers/boot/attestation", body, headers=headers))
    world.app = App(provisioned())
    assert refusal(confirm(world, granted["root_confirm_nonce"], ROOT))[:2] == (401, Code.CONFIRM_NONCE_INVALID)


def test_root_and_volumes_have_nonces_of_their_own(world):
    granted = answer(boot(world))
    handed = answer(provision(world, granted["luks_quote_nonce"]))
    volumes = {"volumes": {"storage": {"rotated": True}}}
    for nonce, body in ((granted["root_confirm_nonce"], volumes), (handed["confirm_nonce"], ROOT)):
        assert refusal(confirm(world, nonce, body))[:2] == (401, Code.CONFIRM_NONCE_INVALID)
    mixed = {"volumes": {"root": {"rotated": True}, "storage": {"rotated": True}}}
    assert refusal(confirm(world, handed["confirm_nonce"], mixed))[:2] == (400, Code.VOLUME_UNKNOWN)
    assert answer(confirm(world, handed["confirm_nonce"], volumes))  # no refusal consumed it
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT))


def test_a_nonce_of_one_exchange_is_not_one_of_the_other(world):
    """Else a quote nonce would give the volumes' keys without the proof."""
    granted = answer(boot(world))
    nonce = granted["luks_quote_nonce"]
    headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY}
    unproven = world.ask("POST", "/servers/vm-1/luks/attest", volumes_request(world, nonce), headers=headers)
    assert refusal(unproven)[:2] == (401, Code.QUOTE_NONCE_INVALID)
    confirm_nonce = answer(provision(world, nonce))["confirm_nonce"]
    headers = {"x-confirm-nonce": confirm_nonce, "x-chutes-hotkey": HOTKEY}
    body = {"volumes": {"storage": {"rotated": True}}}
    unproven = world.ask("POST", "/servers/vm-1/luks/confirm", body, headers=headers)
    assert refusal(unproven)[:2] == (401, Code.CONFIRM_NONCE_INVALID)
    world.app = App(provisioned("two-phase"))
    nonce = answer(world.boot(miner_hotkey=HOTKEY))["luks_quote_nonce"]
    assert refusal(provision(world, nonce))[:2] == (401, Code.QUOTE_NONCE_INVALID)


def test_the_root_key_is_never_confirmed_without_proof(world):
    """As pre-releases of the image do, by the operation of the two-phase exchange."""
    granted = answer(boot(world))
    headers = {"x-confirm-nonce": granted["root_confirm_nonce"], "x-chutes-hotkey": HOTKEY}
    before = everything(world)
    unproven = world.ask("POST", "/servers/vm-1/luks/confirm", ROOT, headers=headers)
    assert refusal(unproven)[:2] == (400, Code.VOLUME_UNKNOWN)
    assert everything(world) == before
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT))


def test_an_image_in_a_profile_of_another_exchange_is_one_audit_row(world):
    world.app = App(provisioned("two-phase"))
    assert refusal(boot(world))[:2] == (403, Code.EXCHANGE_MISMATCH)
    (row,) = world.rows(AuditRow)
    said = f"image asked for root_next (its request has first_boot); profile {PROFILE} has exchange two-phase"
    assert (row.decision, row.reason) == ("refused", f"exchange_mismatch: {said}")
    assert [record.fields["reason"] for record in world.log if record.event == "refused"] == [said]


@pytest.mark.parametrize(
    ("granted", "ask", "asked_for"),
    [
        ("two-phase", lambda world: world.sync("", {"volumes": ["storage"]}, hotkey=HOTKEY), "a boot token"),
        ("two-phase", lambda world: provision(world, "0" * 64), "a quote nonce and proof of its hotkey"),
        ("base", lambda world: provision(world, "0" * 64), "a quote nonce and proof of its hotkey"),
        ("base", lambda world: attest(world, "null"), "a quote nonce and without proof of its hotkey"),
        ("provisioned", lambda world: attest(world, "0" * 64), "a quote nonce and without proof of its hotkey"),
    ],
)
def test_a_vm_that_asks_for_its_keys_as_another_exchange_does_is_named(world, granted, ask, asked_for):
    """The answer is the usual one; the audit has one row for the boot, however often the VM asks."""
    world.app = App(provisioned(granted))
    assert answer(boot(world) if granted == "provisioned" else world.boot(miner_hotkey=HOTKEY))
    said = f"image asked for volumes with {asked_for}; profile {PROFILE} has exchange {granted}"
    for _ in range(2):
        assert refusal(ask(world))[1] in (Code.BOOT_TOKEN_REQUIRED, Code.QUOTE_NONCE_INVALID)
        assert world.log[-1].fields["reason"] == said
    (row,) = [row for row in world.rows(AuditRow) if row.decision == "refused"]
    assert (row.event, row.reason) == ("exchange", f"exchange_mismatch: {said}")
    world.now += 600
    _ = refusal(ask(world))
    assert world.log[-1].fields["reason"] != said


def test_whoever_repeats_the_request_of_another_exchange_does_not_fill_the_log(world):
    """It needs no token: the names of a VM that has just booted are enough."""
    world.app = App(provisioned("two-phase"))
    assert answer(world.boot(miner_hotkey=HOTKEY))
    for _ in range(100):
        body = {"volumes": ["storage"]}
        headers = {"x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
        asked = world.ask("POST", "/servers/vm-1/luks", body, headers=headers, peer_certificate=None)
        assert refusal(asked)[1] == Code.BOOT_TOKEN_REQUIRED
    # The recorded one, then those of the VM's name and of the address.
    assert sum(record.event == "refused" for record in world.log) == 1 + 20 + 20


def test_requests_without_a_token_do_not_fill_the_log_while_the_store_is_away(world):
    def away(effect: Any) -> None:
        if isinstance(effect, Transact):
            raise StoreBusy("away")

    world.before = away
    for _ in range(100):
        assert refusal(world.sync("", {"volumes": ["storage"]}))[1] == Code.BOOT_TOKEN_REQUIRED
    assert [record.event for record in world.log] == ["refused"] * 20


def attest(world: World, nonce: str) -> HttpResponse:
    """As an image of 1.3 asks; without a quote nonce it sends the text of a null."""
    headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY}
    body = volumes_request(world, "0" * 64, "storage")
    return world.ask("POST", "/servers/vm-1/luks/attest", body, headers=headers)


# --- who may boot which version ---


def candidate(*authorized: str) -> Service:
    """A server of one release, which the platform does not measure, and of a release candidate, which it does."""
    release = evolve(PROFILE, version="1.4.0", boot=(PROFILE.boot[0], bytes(48), *PROFILE.boot[2:]))
    rc = evolve(PROFILE, version="1.5.0")
    secret = Secret(BUILD.encode())
    profiles = {
        release.identity: ServedProfile(release, secret, False, False, "provisioned"),
        rc.identity: ServedProfile(rc, secret, False, False, "provisioned", True, frozenset(authorized)),
    }
    return service(profiles=profiles)


def test_a_release_candidate_is_for_proven_hotkeys_that_it_names(world):
    """Any other hears what it would hear if there were no candidate, word for word."""
    world.app = App(candidate(HOTKEY))
    granted = answer(boot(world))
    assert answer(provision(world, granted["luks_quote_nonce"]))
    nonce = world.nonce()
    body, headers = world.attestation(nonce, miner_hotkey=HOTKEY, first_boot=False)
    unproven = refusal(world.ask("POST", "/servers/boot/attestation", body, headers=headers))
    world.app = App(candidate(OTHER.hotkey.address))
    unauthorized = refusal(boot(world))
    mismatch = "Quote does not match expected measurements. Ensure you are running a supported VM. (RTMR1)"
    assert unproven == unauthorized == (403, Code.MEASUREMENT_MISMATCH, mismatch)
    proven = [json.decode(row.evidence.encode())["hotkey_proven"] for row in world.rows(AuditRow)]
    assert proven == [True, True, False, True], "without it, nobody could judge the entries again"
    reason = world.log[-1].fields["reason"]
    assert reason.startswith(f"release candidate {PROFILE.name} 1.5.0, and no authorized hotkey is proven")
    listed = answer(world.ask("GET", "/servers/tee/measurements"))
    assert [entry["version"] for entry in listed] == ["1.4.0"]


def test_a_version_that_is_too_old_is_told_the_newest(world):
    old, newest = evolve(PROFILE, version="1.9"), evolve(PROFILE, version="1.10.1", mrtd=bytes(48))
    served = {
        one.identity: ServedProfile(one, Secret(BUILD.encode()), False, False, "provisioned") for one in (old, newest)
    }
    world.app = App(service(profiles=served, minimum_version="1.10"))
    text = (
        "VM version 1.9 is no longer accepted for boot attestation. Please upgrade to the latest VM version (1.10.1)."
    )
    assert refusal(boot(world)) == (403, Code.VERSION_REJECTED, text)
    world.app = App(evolve(world.app.service, minimum_version="1.9"))
    assert answer(boot(world))


def test_a_blacklisted_hotkey_boots_and_registers_nothing(world):
    granted = answer(boot(world))
    world.app = App(evolve(world.app.service, blacklist={HOTKEY: 'sells "H200" that are not'}))
    said = (401, Code.HOTKEY_BLACKLISTED, 'Your hotkey has been blacklisted: sells "H200" that are not')
    assert refusal(boot(world)) == said
    assert refusal(provision(world, granted["luks_quote_nonce"])) == said
    server = {"host": "1.2.3.4", "id": "n1", "gpus": []}
    assert refusal(world.ask_signed("POST", "/servers/", server)) == said


# --- the order of checks, as in test_boot.py: each row's fault and those of all rows below, and the upper one wins ---

NOT_VERIFIED = "Unable to parse provided quote for verification."
BOOT_ORDER = [
    ("body", 422, Code.VALIDATION_ERROR, None),
    ("nonce", 401, Code.NONCE_INVALID, "Invalid nonce supplied"),
    ("no certificate", 401, Code.CLIENT_CERTIFICATE_REQUIRED, None),
    ("quote", 403, Code.QUOTE_MALFORMED, "Invalid base64 quote."),
    ("debug", 403, Code.ATTRIBUTES_REJECTED, NOT_VERIFIED + " (attributes)"),
    ("rtmr1", 403, Code.MEASUREMENT_MISMATCH, None),
    ("hotkey", 403, Code.HOTKEY_REJECTED, "Invalid miner hotkey"),
    ("exchange", 403, Code.EXCHANGE_MISMATCH, None),
    ("no proof", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("another's proof", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("signature", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("platform", 403, Code.PLATFORM_MISMATCH, None),
]


@pytest.mark.parametrize("first", range(len(BOOT_ORDER)), ids=[row[0] for row in BOOT_ORDER])
def test_the_order_of_checks_of_a_boot(world, first):
    """Without its hotkey's proof a VM gets nothing, and its flag resets no key."""
    wrong = [name for name, *_ in BOOT_ORDER[first:]]
    good = world.platform
    assert answer(boot(world))  # keys that a wrong request must not reset
    nonce = world.nonce()
    world.platform = (good.another(1) if "platform" in wrong else good).having(*({"debug", "rtmr1"} & {*wrong}))
    body, _ = world.attestation(nonce, miner_hotkey=HOTKEY, first_boot=True)
    world.platform = good.another(1) if "platform" in wrong else good
    if "body" in wrong:
        body["first_boot"] = "true"
    if "quote" in wrong:
        body["quote"] += "?"
    if "hotkey" in wrong:
        body["miner_hotkey"] = HOTKEY[:-1]
    if "exchange" in wrong:
        world.app = App(provisioned("two-phase"))
    headers = proof(nonce, body, OTHER if "another's proof" in wrong else MINER)
    if "signature" in wrong:
        headers["x-chutes-signature"] = "00" * 64
    if "no proof" in wrong:
        del headers["x-chutes-signature"]
    if "nonce" in wrong:
        headers["x-chutes-nonce"] = "0" * 64
    if "no certificate" in wrong:
        world.certificate = None
    before = everything(world)
    status, code, detail = refusal(world.ask("POST", "/servers/boot/attestation", body, headers=headers))
    _, *expected, text = BOOT_ORDER[first]
    assert [status, code] == expected
    assert text is None or detail == text
    assert everything(world) == before


PROVISION_ORDER = [
    ("body", 422, Code.VALIDATION_ERROR, None),
    ("no volumes", 400, Code.VOLUMES_REQUIRED, None),
    ("no quote nonce", 401, Code.QUOTE_NONCE_INVALID, "Quote nonce (X-Quote-Nonce) and hotkey are required"),
    ("form", 401, Code.QUOTE_NONCE_INVALID, "Quote nonce not found or expired"),
    ("hotkey", 403, Code.HOTKEY_REJECTED, "Invalid miner hotkey"),
    ("two nonces", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("signature", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("no certificate", 401, Code.CLIENT_CERTIFICATE_REQUIRED, None),
    ("another VM", 401, Code.QUOTE_NONCE_INVALID, "Quote nonce mismatch"),
    ("certificate", 401, Code.QUOTE_NONCE_INVALID, "Quote nonce mismatch"),
    ("quote", 403, Code.QUOTE_MALFORMED, "Invalid base64 quote."),
    ("rtmr2", 403, Code.MEASUREMENT_MISMATCH, None),
]


@pytest.mark.parametrize("first", range(len(PROVISION_ORDER)), ids=[row[0] for row in PROVISION_ORDER])
def test_the_order_of_checks_of_a_provision(world, first):
    wrong = [name for name, *_ in PROVISION_ORDER[first:]]
    nonce = answer(boot(world))["luks_quote_nonce"]
    good = world.platform
    if "certificate" in wrong:
        world.certificate = CERTIFICATES[1]
    if "rtmr2" in wrong:
        world.platform = good.having("rtmr2")
    body = volumes_request(world, nonce, *BOTH)
    world.platform = good
    if "quote" in wrong:
        body["quote"] += "?"
    if "no volumes" in wrong:
        body["volumes"] = []
    if "body" in wrong:
        del body["quote"]
    if "form" in wrong:
        nonce = nonce.upper() + "F"
    headers = {"x-quote-nonce": nonce, **proof(nonce, body)}
    if "signature" in wrong:
        headers["x-chutes-signature"] = "00" * 64
    if "two nonces" in wrong:
        headers["x-chutes-nonce"] = "0" * 64
    if "hotkey" in wrong:
        headers["x-chutes-hotkey"] = HOTKEY[:-1]
    if "no quote nonce" in wrong:
        del headers["x-quote-nonce"]
    if "no certificate" in wrong:
        world.certificate = None
    before = everything(world)
    name = "vm-2" if "another VM" in wrong else "vm-1"
    status, code, detail = refusal(world.ask("POST", f"/servers/{name}/provision", body, headers=headers))
    _, *expected, text = PROVISION_ORDER[first]
    assert [status, code] == expected
    assert text is None or detail == text
    assert everything(world) == before
    assert not [row for row in world.rows(AttestationRow) if row.stage == "runtime" and row.code is None]


CONFIRM_ORDER = [
    ("body", 422, Code.VALIDATION_ERROR, None),
    ("unknown volume", 400, Code.VOLUME_UNKNOWN, None),
    ("no nonce", 401, Code.CONFIRM_NONCE_INVALID, "Confirm nonce (X-Confirm-Nonce) and hotkey are required"),
    ("hotkey", 403, Code.HOTKEY_REJECTED, "Invalid miner hotkey"),
    ("two nonces", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("signature", 401, Code.SIGNATURE_INVALID, UNPROVEN),
    ("another VM", 401, Code.CONFIRM_NONCE_INVALID, "Confirm nonce mismatch"),
    ("superseded", 401, Code.CONFIRM_NONCE_INVALID, "Confirm nonce not found or expired"),
]


@pytest.mark.parametrize("of_root", [True, False], ids=["root", "volumes"])
@pytest.mark.parametrize("first", range(len(CONFIRM_ORDER)), ids=[row[0] for row in CONFIRM_ORDER])
def test_the_order_of_checks_of_a_confirmation(world, first, of_root):
    wrong = [name for name, *_ in CONFIRM_ORDER[first:]]
    granted = answer(boot(world))
    handed = answer(provision(world, granted["luks_quote_nonce"]))
    nonce = granted["root_confirm_nonce"] if of_root else handed["confirm_nonce"]
    body: dict[str, Any] = {"volumes": {"root" if of_root else "storage": {"rotated": True}}}
    if "superseded" in wrong:
        assert answer(provision(world, answer(boot(world))["luks_quote_nonce"]))
    if "unknown volume" in wrong:
        body["volumes"]["other"] = {"rotated": True}
    if "body" in wrong:
        body["volumes"] = []
    headers = {"x-confirm-nonce": nonce, **proof(nonce, body)}
    if "signature" in wrong:
        headers["x-chutes-signature"] = "00" * 64
    if "two nonces" in wrong:
        headers["x-chutes-nonce"] = "0" * 64
    if "hotkey" in wrong:
        headers["x-chutes-hotkey"] = HOTKEY[:-1]
    if "no nonce" in wrong:
        del headers["x-confirm-nonce"]
    before = everything(world)
    name = "vm-2" if "another VM" in wrong else "vm-1"
    status, code, detail = refusal(world.ask("POST", f"/servers/{name}/provision/confirm", body, headers=headers))
    _, *expected, text = CONFIRM_ORDER[first]
    assert [status, code] == expected
    assert text is None or detail == text
    assert everything(world) == before


def test_a_proof_over_the_nonce_of_another_step_proves_nothing(world):
    """It is genuine, and whoever saw it could send it with a nonce that was granted to an unproven claim."""
    granted = answer(boot(world))
    quote_nonce, root_nonce = granted["luks_quote_nonce"], granted["root_confirm_nonce"]
    body = volumes_request(world, quote_nonce)
    before = everything(world)
    for path, own, other, sent in (
        ("provision", {"x-quote-nonce": quote_nonce}, root_nonce, body),
        ("provision/confirm", {"x-confirm-nonce": root_nonce}, quote_nonce, ROOT),
    ):
        response = world.ask("POST", f"/servers/vm-1/{path}", sent, headers={**own, **proof(other, sent)})
        assert refusal(response) == (401, Code.SIGNATURE_INVALID, UNPROVEN)
    assert everything(world) == before


def test_a_root_passphrase_of_the_vms_own_is_rotated_too(world):
    profile = ServedProfile(PROFILE, None, False, False, "provisioned")
    world.app = App(service(profiles={PROFILE.identity: profile}))
    granted = answer(boot(world))
    assert answer(confirm(world, granted["root_confirm_nonce"], ROOT))
    assert answer(boot(world))["key"] == granted["root_next"]


def test_any_form_of_quote(world):
    for form in ("v5-td10", "v5-td15"):
        world.platform = evolve(world.platform, form=form)
        assert answer(boot(world))["key"] == BUILD
