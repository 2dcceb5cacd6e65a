"""Operations 13 and 14: order of checks, consumption, lost answers, confirmations."""

import base64
import re
from ipaddress import ip_network
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.effects import FetchCollateral, Transact
from chutes_proto.errors import CollateralUnavailable, StoreBusy
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._limits import Admission
from chutes_proto.server._nonces import NonceMint
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.server._service import Service
from chutes_proto.store._rows import AttestationRow, AuditRow, BootRow, GenerationRow, Put, VmRow, VolumeRow
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.units.operator import StoreRestored
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse
from tests.server.world import CERTIFICATES, HOTKEY, World, answer, refusal, service

OTHER_HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"
EXPIRED = "Quote nonce not found or expired"
UNCONFIRMED = "Confirm nonce not found or expired"


def two_phase(**changes: Any) -> Service:
    return service(profiles={PROFILE.identity: ServedProfile(PROFILE, None, False, False, "two-phase")}, **changes)


@pytest.fixture
def world() -> World:
    return World(App(two_phase()))


def quote_nonce(world: World, **members: Any) -> str:
    return str(answer(world.boot(**members))["luks_quote_nonce"])


def request_of(
    world: World, nonce: str, *volumes: str, platform: SimulatedPlatform | None = None, **members: Any
) -> dict[str, Any]:
    data = report_data(bytes.fromhex(nonce), spki_sha256(world.certificate))
    quote = (platform or world.platform).quote(data, stage="runtime")
    return {"quote": encode_quote(quote), "volumes": list(volumes or ("storage",)), **members}


def send(world: World, path: str, body: Any, header: str, nonce: str, **changes: str) -> HttpResponse:
    headers = {header: nonce, "x-chutes-hotkey": changes.get("hotkey", HOTKEY), "content-type": "application/json"}
    return world.ask("POST", f"/servers/{changes.get('vm', 'vm-1')}/luks/{path}", body, headers=headers)


def attest(world: World, nonce: str, *volumes: str, body: Any = None, **changes: str) -> HttpResponse:
    body = request_of(world, nonce, *volumes) if body is None else body
    return send(world, "attest", body, "x-quote-nonce", nonce, **changes)


def confirm(world: World, nonce: str, body: Any = None, /, **changes: Any) -> HttpResponse:
    rotated = {name: value for name, value in changes.items() if name not in ("hotkey", "vm")}
    who = {name: value for name, value in changes.items() if name in ("hotkey", "vm")}
    body = body or {"volumes": {name.replace("_", "-"): {"rotated": value} for name, value in rotated.items()}}
    return send(world, "confirm", body, "x-confirm-nonce", nonce, **who)


def boot(world: World, *volumes: str) -> Any:
    """Boot and attest; the members of the answer."""
    return answer(attest(world, quote_nonce(world), *volumes))


def pair(world: World) -> tuple[str | None, str]:
    keys = boot(world)["volumes"]["storage"]
    return keys["current"], keys["next"]


def states(world: World) -> dict[int, str]:
    rows = [row for row in world.rows(GenerationRow) if row.volume == "storage"]
    return {row.generation: row.retirement or row.state + " provisional" * row.provisional for row in rows}


# --- the shapes ---


def test_a_boot_is_given_a_quote_nonce_and_no_token(world):
    members = answer(world.boot())
    assert list(members) == ["key", "boot_token", "luks_quote_nonce"]
    assert members["boot_token"] is None
    assert re.fullmatch("[0-9a-f]{64}", members["luks_quote_nonce"])
    assert refusal(world.sync(members["luks_quote_nonce"], {"volumes": ["storage"]}))[1] == Code.BOOT_TOKEN_INVALID


def test_the_whole_exchange(world):
    response = attest(world, quote_nonce(world), "storage", "tdx-cache")
    members = answer(response)
    assert list(members) == ["volumes", "confirm_nonce", "k3s_encryption_key", "in_use"]
    assert list(members["volumes"]) == ["storage", "tdx-cache"]
    assert [list(keys) for keys in members["volumes"].values()] == [["current", "next"]] * 2
    assert [keys["current"] for keys in members["volumes"].values()] == [None, None]
    assert all(len(bytes.fromhex(keys["next"])) == 64 for keys in members["volumes"].values())
    assert len(base64.b64decode(members["k3s_encryption_key"], validate=True)) == 32
    assert members["in_use"] == []
    done = answer(confirm(world, members["confirm_nonce"], storage=False, tdx_cache=True))
    assert done == {
        "status": "confirmed",
        "volumes": {"storage": {"result": "no_pending"}, "tdx-cache": {"result": "promoted"}},
    }
    again = boot(world, "storage", "tdx-cache")
    assert again["k3s_encryption_key"] == members["k3s_encryption_key"]
    assert again["in_use"] == ["storage", "tdx-cache"]
    for name, keys in again["volumes"].items():
        assert keys["current"] == members["volumes"][name]["next"]
        assert keys["next"] not in (keys["current"], None)
    secrets = [keys["next"] for keys in members["volumes"].values()]
    secrets += [members["confirm_nonce"], members["k3s_encryption_key"]]
    kept = repr((world.log, world.rows(GenerationRow), world.rows(BootRow)))
    assert not [secret for secret in secrets if secret in kept]


@pytest.mark.parametrize("shows_none", [True, False], ids=["no certificate", "another than the quote's"])
def test_a_proxy_that_sends_none_of_its_headers_is_told_at_once_and_spends_nothing(world, shows_none):
    nonce = quote_nonce(world)
    good = world.certificate
    proxies = TrustedProxies((TrustedProxy("front", (ip_network("192.0.2.0/24"),), secrets=(Secret(b"secret"),)),))
    world.app = App(two_phase(proxies=proxies))
    world.certificate = CERTIFICATES[1]
    body, world.certificate = request_of(world, nonce), None if shows_none else good
    uptime = world.uptime
    assert refusal(attest(world, nonce, body=body))[:2] == (503, Code.SERVER_FAULT)
    assert world.uptime == uptime
    world.certificate = good
    assert answer(attest(world, nonce))["volumes"]


def test_deployed_clients_cut_the_first_match_out(world):
    """The matches of ``grep -o '"name":"[^"]*"'``, for each name that a client looks for."""
    pair(world)
    body = attest(world, quote_nonce(world), "storage").body
    for name in (b"current", b"next", b"confirm_nonce", b"k3s_encryption_key"):
        assert len(re.findall(b'"%s":"[^"]*"' % name, body)) == 1


def test_what_is_recorded(world):
    members = boot(world)
    answer(confirm(world, members["confirm_nonce"], storage=True))
    first, attested, confirmed = world.rows(AuditRow)
    (row,) = world.rows(BootRow)
    assert [(r.event, r.decision, r.boot_id) for r in (first, attested, confirmed)] == [
        ("boot", "granted", row.boot_id),
        ("attest volumes", "granted", row.boot_id),
        ("confirm volumes", "granted", row.boot_id),
    ]
    assert attested.keys == "k3s/1 created, storage/1 next"
    assert attested.quote_digest not in (None, first.quote_digest)
    assert attested.profile == "simulated 1"
    assert all(r.vm is not None and r.pin is not None for r in (first, attested, confirmed))
    assert [r.stage for r in world.rows(AttestationRow)].count("runtime") == 1


# --- operation 13, refusals ---


def test_texts_and_codes_of_the_quote_nonce(world):
    nonce = quote_nonce(world)
    body = request_of(world, nonce)
    required = (401, Code.QUOTE_NONCE_INVALID, "Quote nonce (X-Quote-Nonce) and hotkey are required")
    for headers in ({"x-quote-nonce": nonce}, {"x-chutes-hotkey": HOTKEY}, {}):
        assert refusal(world.ask("POST", "/servers/vm-1/luks/attest", body, headers=headers)) == required
    for wrong in ("0" * 64, nonce.upper(), "x", nonce + "0"):
        assert refusal(attest(world, wrong, body=body)) == (401, Code.QUOTE_NONCE_INVALID, EXPIRED)
    mismatch = (401, Code.QUOTE_NONCE_INVALID, "Quote nonce mismatch")
    assert refusal(attest(world, nonce, body=body, hotkey=OTHER_HOTKEY)) == mismatch
    assert refusal(attest(world, nonce, body=body, vm="vm-2")) == mismatch
    world.certificate = CERTIFICATES[1]
    assert refusal(attest(world, nonce, body=request_of(world, nonce))) == mismatch
    world.certificate = None
    assert refusal(attest(world, nonce, body=body))[:2] == (401, Code.CLIENT_CERTIFICATE_REQUIRED)
    world.certificate = CERTIFICATES[0]
    assert answer(attest(world, nonce, body=body))  # nothing of that burned it


def test_a_quote_nonce_lives_ten_minutes(world):
    nonce = quote_nonce(world)
    world.now += 599
    kept = attest(world, nonce)
    assert answer(kept)
    world.now += 1
    assert refusal(attest(world, nonce))[2] == EXPIRED


def test_a_boot_token_is_no_quote_nonce(world):
    world.app = App(service())
    assert refusal(attest(world, world.token()))[1] == Code.QUOTE_NONCE_INVALID


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"quote": "", "volumes": []}, (400, Code.VOLUMES_REQUIRED)),
        ({"quote": "", "volumes": ["root"]}, (400, Code.VOLUME_UNKNOWN)),
        ({"quote": "", "volumes": ["storage"], "formatted": ["k3s"]}, (400, Code.VOLUME_UNKNOWN)),
        ({"quote": "!", "volumes": ["storage"]}, (403, Code.QUOTE_MALFORMED)),
        ({"volumes": ["storage"]}, (422, Code.VALIDATION_ERROR)),
        (b"{", (422, Code.VALIDATION_ERROR)),
    ],
)
def test_bad_requests_burn_nothing(world, body, expected):
    nonce = quote_nonce(world)
    assert refusal(attest(world, nonce, body=body))[:2] == expected
    assert answer(attest(world, nonce))


def test_the_quote_is_of_the_runtime_stage_and_of_the_boots_platform(world):
    nonce = quote_nonce(world)
    data = report_data(bytes.fromhex(nonce), spki_sha256(world.certificate))
    early = {**request_of(world, nonce), "quote": encode_quote(world.platform.quote(data))}
    assert refusal(attest(world, nonce, body=early))[:2] == (403, Code.MEASUREMENT_MISMATCH)
    other = request_of(world, "11" * 32)
    assert refusal(attest(world, nonce, body=other))[:2] == (400, Code.NONCE_MISMATCH)
    good, world.platform = world.platform, world.platform.another(1)
    assert refusal(attest(world, nonce))[:2] == (403, Code.PLATFORM_MISMATCH)
    assert {row.code for row in world.rows(AttestationRow)} == {None, "measurement_mismatch", "platform_mismatch"}
    world.platform = good
    assert answer(attest(world, nonce))


def test_a_name_that_was_rebound_meanwhile(world):
    nonce = quote_nonce(world)
    (claim,) = world.rows(VmRow)
    world.store.transact(Ask(Put(evolve(claim, pin=evolve(claim.pin, value=bytes(16))))))
    assert refusal(attest(world, nonce))[:2] == (403, Code.PLATFORM_MISMATCH)
    other = world.platform.another(1)
    (booted,) = {row.pin for row in world.rows(BootRow)}
    world.store.transact(Ask(Put(evolve(claim, pin=evolve(claim.pin, value=other.platform_instance_id)))))
    world.platform = other  # the name is bound to it now, and the boot was another machine's
    status, code, *_ = refusal(attest(world, nonce))
    assert (status, code) == (403, Code.PLATFORM_MISMATCH)
    assert f"it booted on {booted}" in world.rows(AuditRow)[-1].reason


@pytest.mark.parametrize("busy", ["collateral", "slots", "store"])
@pytest.mark.parametrize(("seconds", "granted"), [(19, True), (26, False)])
def test_what_is_busy_is_waited_for(world, busy, seconds, granted):
    nonce = quote_nonce(world)
    body = request_of(world, nonce)
    until = world.uptime + seconds
    taken = Admission(0, share=64)
    world.app = App(two_phase(verifications=taken)) if busy == "slots" else world.app

    def before(effect):
        taken.size = 64 if world.uptime >= until else 0
        if world.uptime < until and busy == "collateral" and isinstance(effect, FetchCollateral):
            raise CollateralUnavailable("retry later")
        if world.uptime < until and busy == "store" and isinstance(effect, Transact):
            raise StoreBusy("retry later")

    world.before = before
    response = attest(world, nonce, body=body)
    assert response.status == (200 if granted else 503)
    if not granted:
        assert response.header("retry-after")
        world.uptime = until
        assert answer(attest(world, nonce, body=body))


def test_no_transaction_begins_after_25_seconds(world):
    nonce = quote_nonce(world)
    body, arrived = request_of(world, nonce), world.uptime

    def before(effect):
        if isinstance(effect, FetchCollateral):
            world.uptime = arrived + 26

    world.before = before
    headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY}
    response = world.ask("POST", "/servers/vm-1/luks/attest", body, headers=headers)
    assert refusal(response)[:2] == (503, Code.STORE_UNAVAILABLE)
    assert [row.spent_at for row in world.rows(BootRow)] == [None]


def test_both_are_served_while_the_server_drains(world):
    nonce = quote_nonce(world)
    world.app.draining = True
    members = answer(attest(world, nonce))
    assert answer(confirm(world, members["confirm_nonce"], storage=False))


# --- lost answers ---


def test_a_lost_answer_is_given_again(world):
    nonce = quote_nonce(world)
    body = request_of(world, nonce, "storage", "tdx-cache", formatted=["storage"])
    first = attest(world, nonce, body=body)
    rows = world.rows(GenerationRow)
    assert attest(world, nonce, body=body).body == first.body
    assert world.rows(GenerationRow) == rows
    assert [row.decision for row in world.rows(AuditRow)] == ["granted", "granted", "replayed"]
    assert refusal(attest(world, nonce, body={**body, "more": 1}))[2] == EXPIRED
    confirm_nonce = answer(first)["confirm_nonce"]
    assert answer(confirm(world, confirm_nonce, storage=False, tdx_cache=False))


def test_a_lost_answer_is_given_again_after_a_new_key_encryption_key(world):
    nonce = quote_nonce(world)
    body = request_of(world, nonce)
    first = attest(world, nonce, body=body)
    old = world.app.service.vault.current
    vault = Vault(KeyEncryptionKey.from_bytes(b"n" * 32), old)
    world.app = App(two_phase(vault=vault, mint=NonceMint.of(vault)))
    assert attest(world, nonce, body=body).body == first.body


def test_an_attestation_whose_answer_was_lost_hands_out_the_same_next_key(world):
    answer(confirm(world, boot(world)["confirm_nonce"], storage=False))
    assert pair(world) == pair(world)


# --- operation 14 ---


def test_texts_and_codes_of_the_confirm_nonce(world):
    nonce = boot(world)["confirm_nonce"]
    body = {"volumes": {"storage": {"rotated": False}}}
    required = (401, Code.CONFIRM_NONCE_INVALID, "Confirm nonce (X-Confirm-Nonce) and hotkey are required")
    for headers in ({"x-confirm-nonce": nonce}, {"x-chutes-hotkey": HOTKEY}, {}):
        assert refusal(world.ask("POST", "/servers/vm-1/luks/confirm", body, headers=headers)) == required
    for wrong in ("0" * 64, nonce.upper(), "x"):
        assert refusal(confirm(world, wrong, body)) == (401, Code.CONFIRM_NONCE_INVALID, UNCONFIRMED)
    mismatch = (401, Code.CONFIRM_NONCE_INVALID, "Confirm nonce mismatch")
    assert refusal(confirm(world, nonce, body, hotkey=OTHER_HOTKEY)) == mismatch
    assert refusal(confirm(world, nonce, body, vm="vm-2")) == mismatch
    for wrong_body, code in (({"volumes": {}}, 400), ({"volumes": {"k3s": {"rotated": False}}}, 400), ({}, 422)):
        headers = {"x-confirm-nonce": nonce, "x-chutes-hotkey": HOTKEY}
        assert refusal(world.ask("POST", "/servers/vm-1/luks/confirm", wrong_body, headers=headers))[0] == code
    world.certificate = None  # deployed clients present none
    assert answer(confirm(world, nonce, body))
    world.now += 300
    assert refusal(confirm(world, nonce, body))[2] == UNCONFIRMED


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["storage", "rotated", ""]), inner),
        max_leaves=6,
    )
)
def test_any_body_of_a_confirmation_is_answered(volumes):
    world = World(App(two_phase()))
    headers = {"x-confirm-nonce": "0" * 64, "x-chutes-hotkey": HOTKEY}
    response = world.ask("POST", "/servers/vm-1/luks/confirm", {"volumes": volumes}, headers=headers)
    assert response.status in (400, 401, 422)


def test_a_rotation_promotes_and_pins(world):
    answer(confirm(world, boot(world)["confirm_nonce"], storage=False))
    following = pair(world)[1]
    members = boot(world)
    done = confirm(world, members["confirm_nonce"], storage=True)
    assert answer(done)["volumes"] == {"storage": {"result": "promoted"}}
    assert states(world) == {1: "superseded", 2: "active provisional"}
    assert confirm(world, members["confirm_nonce"], storage=True).body == done.body  # the same again
    told = [(row.decision, row.keys) for row in world.rows(AuditRow) if row.event == "confirm volumes"]
    assert told[1:] == [("granted", "storage/1 retired, storage/2 active"), ("replayed", "storage promoted")]
    assert refusal(confirm(world, members["confirm_nonce"], storage=False))[:2] == (401, Code.CONFIRM_NONCE_INVALID)
    after = boot(world)
    assert after["volumes"]["storage"]["current"] == following
    answer(confirm(world, after["confirm_nonce"], storage=False))
    assert states(world) == {1: "superseded", 2: "active", 3: "dropped"}
    assert not any(row.provisional for row in world.rows(GenerationRow))


def test_a_confirmation_that_promoted_nothing_is_answered_alike_again(world):
    """A client that is told otherwise removes a key from its disk."""
    answer(confirm(world, boot(world)["confirm_nonce"], storage=False))
    nonce = boot(world)["confirm_nonce"]
    done = confirm(world, nonce, storage=False, tdx_cache=False)
    assert answer(done)["volumes"] == {"storage": {"result": "discarded"}, "tdx-cache": {"result": "no_pending"}}
    before = world.rows(GenerationRow)
    assert confirm(world, nonce, storage=False, tdx_cache=False).body == done.body
    assert world.rows(GenerationRow) == before


def test_a_boot_that_does_not_confirm_gets_the_other_key_next_time_by_turns(world):
    answer(confirm(world, boot(world)["confirm_nonce"], storage=False))
    members = boot(world)
    old, new = members["volumes"]["storage"].values()
    answer(confirm(world, members["confirm_nonce"], storage=True))
    first, second, third, fourth = pair(world), pair(world), pair(world), pair(world)
    assert (first[0], second, third, fourth) == (new, (old, new), first, (old, new))
    members = boot(world)
    assert members["volumes"]["storage"]["current"] == new
    members = boot(world)
    answer(confirm(world, members["confirm_nonce"], storage=False))  # the old one it is
    assert states(world) == {1: "active", 2: "dropped", 3: "dropped"}
    assert pair(world)[0] == old


def test_only_the_newest_attestation_confirms(world):
    older, newer = boot(world), boot(world)
    assert refusal(confirm(world, older["confirm_nonce"], storage=False)) == (
        401,
        Code.CONFIRM_NONCE_INVALID,
        UNCONFIRMED,
    )
    assert answer(confirm(world, newer["confirm_nonce"], storage=True))
    assert refusal(confirm(world, older["confirm_nonce"], storage=True))[0] == 401


def test_after_a_restore_from_a_backup_no_attestation_of_before_confirms(world):
    nonce, unspent = boot(world)["confirm_nonce"], quote_nonce(world)
    world.store.transact(StoreRestored(world.now - 60, ""))
    assert refusal(confirm(world, nonce, storage=False))[:2] == (401, Code.CONFIRM_NONCE_INVALID)
    assert refusal(attest(world, unspent))[:2] == (401, Code.QUOTE_NONCE_INVALID)


def test_a_rotation_that_something_else_overtook_is_refused_whole(world):
    answer(confirm(world, boot(world, "storage", "tdx-cache")["confirm_nonce"], storage=False, tdx_cache=False))
    members = boot(world, "storage", "tdx-cache")
    world.app = App(service(exchange_downgrade="allow"))
    answer(world.sync(world.token(), {"volumes": ["storage", "tdx-cache"], "rekey": ["tdx-cache"]}))
    before = world.rows(GenerationRow)
    superseded = refusal(confirm(world, members["confirm_nonce"], storage=True, tdx_cache=True))
    assert superseded[:2] == (409, Code.ROTATION_SUPERSEDED)
    assert world.rows(GenerationRow) == before  # storage neither
    done = answer(confirm(world, members["confirm_nonce"], storage=True))
    assert done["volumes"] == {"storage": {"result": "promoted"}}


def test_a_volume_that_was_not_handed_out(world):
    nonce = boot(world)["confirm_nonce"]
    assert refusal(confirm(world, nonce, storage=False, tdx_cache=True))[:2] == (409, Code.ROTATION_SUPERSEDED)
    done = answer(confirm(world, nonce, storage=False, tdx_cache=False))
    assert done["volumes"]["tdx-cache"] == {"result": "no_pending"}
    assert {row.volume for row in world.rows(VolumeRow)} == {"storage"}


def test_a_volume_that_is_left_out_is_left_alone(world):
    members = boot(world, "storage", "tdx-cache")
    answer(confirm(world, members["confirm_nonce"], storage=False, tdx_cache=False))
    boot(world, "storage")
    again = boot(world, "tdx-cache")
    assert again["volumes"]["tdx-cache"]["current"] == members["volumes"]["tdx-cache"]["next"]


def test_format_consent(world):
    assert boot(world)["in_use"] == []
    nonce = quote_nonce(world)
    body = request_of(world, nonce, "storage", formatted=["storage"])
    assert answer(attest(world, nonce, body=body))["in_use"] == ["storage"]
    assert boot(world)["in_use"] == ["storage"]
    (row,) = world.rows(VolumeRow)
    world.store.transact(Ask(Put(evolve(row, format_allowed=True))))
    assert boot(world)["in_use"] == []
    assert boot(world)["in_use"] == ["storage"]  # good for one answer


def test_a_vm_once_served_two_phase_gets_no_boot_token_again(world):
    boot(world)
    world.app = App(service())
    assert refusal(world.boot())[:2] == (403, Code.EXCHANGE_DOWNGRADE)
