"""Operations 10 to 12 in process: order of checks, consumption, records, and the age of a success."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.signing import messages_to_sign
from chutes_proto.effects import Transact
from chutes_proto.errors import StoreBusy
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.store._rows import AttestationRow, AuditRow, NonceRow, ServerRow, Vm
from chutes_proto.units.boot import REFUSALS_PER_DAY
from chutes_proto.units.records import Quote
from chutes_proto.units.servers import RecordRuntimeRefusal
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse
from tests.server.test_servers import boot, gpu, register, registered
from tests.server.world import CERTIFICATES, MINER, NOW, OTHER, World, answer, refusal, service

PATH = "/servers/n1/attestation"


@pytest.fixture
def world(world: World) -> World:
    boot(world)
    registered(register(world))
    return world


def nonce_of(world: World, server: str = "n1") -> str:
    return str(answer(world.ask_signed("GET", f"/servers/{server}/nonce"))["nonce"])


def quote(world: World, nonce: str) -> bytes:
    data = report_data(bytes.fromhex(nonce), spki_sha256(world.certificate))
    return world.platform.quote(data, stage="runtime")


def attest(world: World, nonce: str | None = None, path: str = PATH, **options: Any) -> HttpResponse:
    nonce = nonce or nonce_of(world)
    body = {"quote": encode_quote(quote(world, nonce))}
    return world.ask_signed("POST", path, body, **({"nonce": nonce, "coverage": "nonce"} | options))


def signed(pair: HotkeyPair, nonce: str, coverage: Any, body: bytes) -> dict[str, str]:
    message, *_ = messages_to_sign(coverage, "compatible", pair.hotkey, nonce, "POST", PATH, body, "tee")
    names = {"hotkey": pair.hotkey.address, "nonce": nonce, "signature": pair.sign(message).hex()}
    return {f"x-chutes-{name}": value for name, value in names.items()}


def status(world: World) -> Any:
    return answer(world.ask_signed("GET", "/servers/n1/attestation/status"))


def runtime_rows(world: World) -> Any:
    return [row for row in world.rows(AttestationRow) if row.registration is not None]


def test_a_server_attests(world):
    never = {
        "server_id": "n1",
        "last_attestation": None,
        "attestation_status": "never_attested",
        "name": "vm-1",
        "fresh": False,
        "age_seconds": None,
    }
    assert status(world) == never
    members = answer(attest(world))
    assert list(members) == ["attestation_id", "verified_at", "status"]
    assert (members["verified_at"], members["status"]) == ("2027-01-15T08:00:00+00:00", "verified")
    last = {
        "attestation_id": members["attestation_id"],
        "verified": True,
        "created_at": "2027-01-15T08:00:00+00:00",
        "verified_at": "2027-01-15T08:00:00+00:00",
        "verification_error": None,
    }
    verified = {**never, "last_attestation": last, "attestation_status": "verified", "fresh": True, "age_seconds": 0}
    told = status(world)
    assert told == verified
    assert list(told) == list(never)
    assert list(told["last_attestation"]) == list(last)
    (record,) = [record for record in world.log if record.event == "server_attested"]
    assert record.fields["trust"] == "simulated"
    assert [row.event for row in world.rows(AuditRow)][-1] == "attest server"
    (row,), (server,) = runtime_rows(world), world.rows(ServerRow)
    assert (row.attestation_id, row.registration) == (members["attestation_id"], server.registration)
    assert (row.vm, row.peer_address) == (Vm(server.hotkey, server.name), "192.0.2.1")


def test_a_success_grows_old(world):
    world.app = App(service(fresh_seconds=60))
    answer(attest(world))
    for later, fresh in ((60, True), (1, False)):
        world.now += later
        told = status(world)
        assert (told["attestation_status"], told["fresh"]) == ("verified", fresh)
    assert told["age_seconds"] == 61


def test_a_failure_is_the_newest_verdict_and_names_its_reason(world):
    answer(attest(world))
    good = world.platform
    world.platform = good.having("rtmr2")
    assert refusal(attest(world))[1] == Code.MEASUREMENT_MISMATCH
    told = status(world)
    assert (told["attestation_status"], told["fresh"]) == ("failed", False)
    error = "Quote does not match expected measurements. Ensure you are running a supported VM. (RTMR2)"
    assert told["last_attestation"]["verification_error"] == error
    assert told["last_attestation"]["verified_at"] is None
    world.platform = good
    answer(attest(world))
    assert status(world)["attestation_status"] == "verified"


# As in test_boot.py: a request has this row's fault and those of all rows below it, and the upper one must win.
NOT_VERIFIED = "Unable to parse provided quote for verification."
NOT_EXPECTED = "Quote does not match expected measurements. Ensure you are running a supported VM."
ORDER = [
    ("signature", 401, Code.SIGNATURE_INVALID, None),
    ("unknown hotkey", 401, Code.HOTKEY_UNKNOWN, "Hotkey is not registered on netuid 64"),
    ("body", 422, Code.VALIDATION_ERROR, None),
    ("stranger", 404, Code.SERVER_NOT_FOUND, "Server n1 not found"),
    ("nonce", 401, Code.NONCE_INVALID, "Invalid nonce supplied"),
    ("no certificate", 401, Code.CLIENT_CERTIFICATE_REQUIRED, "Invalid client certificate provided."),
    ("base64", 403, Code.QUOTE_MALFORMED, "Invalid base64 quote."),
    ("version", 403, Code.QUOTE_MALFORMED, "Invalid quote version: 6 (expected 4 or 5)"),
    ("report_data_nonce", 400, Code.NONCE_MISMATCH, "Quote nonce does not match expected nonce."),
    ("report_data_key", 403, Code.CERTIFICATE_MISMATCH, "Invalid client certificate provided."),
    ("pck_expired", 403, Code.QUOTE_REJECTED, NOT_VERIFIED + " (signature)"),
    ("quote_signature", 403, Code.QUOTE_REJECTED, NOT_VERIFIED + " (signature)"),
    ("no collateral", 503, Code.COLLATERAL_UNAVAILABLE, None),
    ("qe_prod_id", 403, Code.QUOTE_REJECTED, NOT_VERIFIED + " (signature)"),
    ("tcb_out_of_date", 403, Code.TCB_REJECTED, NOT_VERIFIED + " (TCB status)"),
    ("debug", 403, Code.ATTRIBUTES_REJECTED, NOT_VERIFIED + " (attributes)"),
    ("boot stage", 403, Code.MEASUREMENT_MISMATCH, NOT_EXPECTED + " (RTMR3)"),
    ("platform", 403, Code.PLATFORM_MISMATCH, "This server is bound to another platform."),
    ("used nonce", 401, Code.NONCE_INVALID, "Invalid nonce supplied"),
]
NAMES = [row[0] for row in ORDER]
FAULTS = {
    "version",
    "report_data_nonce",
    "report_data_key",
    "pck_expired",
    "quote_signature",
    "qe_prod_id",
    "tcb_out_of_date",
    "debug",
}


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("first", range(len(ORDER)), ids=NAMES)
def test_the_order_of_checks(world, first, replayed):
    """``replayed``: the nonce was redeemed before. Then nothing is recorded: anybody may have sent this."""
    if first == len(ORDER) - 1 and not replayed:
        return
    wrong = NAMES[first:]
    nonce = nonce_of(world)
    good = world.platform
    if replayed:
        answer(attest(world, nonce))
    sender = good.another(1) if "platform" in wrong else good
    stage: Any = "boot" if "boot stage" in wrong else "runtime"
    sender = sender.having(*(name for name in wrong if name in FAULTS))
    data = report_data(bytes.fromhex(nonce), spki_sha256(world.certificate))
    body: dict[str, Any] = {"quote": encode_quote(sender.quote(data, stage=stage))}
    world.platform = sender
    if "no collateral" in wrong:
        world.platform = good.another(2)
    if "base64" in wrong:
        body["quote"] += "?"
    if "no certificate" in wrong:
        world.certificate = None
    if "nonce" in wrong:
        nonce = "0" * 64
    if "body" in wrong:
        body = {"quote": 7}
    if "unknown hotkey" in wrong:
        world.app = App(service(hotkeys=frozenset()))
    before = world.rows(NonceRow), world.rows(ServerRow)
    coverage: Any = "body" if "signature" not in wrong else "purpose"
    signed_nonce = nonce if "signature" not in wrong else "1" * 64
    request = signed(MINER if "stranger" not in wrong else OTHER, signed_nonce, coverage, json.encode(body))
    response = world.ask("POST", PATH, json.encode(body), headers={**request, "x-chutes-nonce": nonce})
    got_status, code, detail = refusal(response)
    _, expected_status, expected_code, text = ORDER[first]
    assert (got_status, code) == (expected_status, expected_code)
    assert text is None or detail == text
    assert response.header("connection") == "close"
    assert world.rows(NonceRow) == before[0]
    recorded = [row.code for row in runtime_rows(world) if row.code]
    kept = not replayed and first > NAMES.index("no certificate") and ORDER[first][1] != 503
    assert recorded == ([expected_code] if kept else [])
    after = {row.server_id: evolve(row, attested=None) for row in world.rows(ServerRow)}
    assert after == {row.server_id: evolve(row, attested=None) for row in before[1]}


@pytest.mark.parametrize(("shown", "code"), [(None, Code.CLIENT_CERTIFICATE_REQUIRED), (1, Code.CERTIFICATE_MISMATCH)])
def test_of_a_proxy_that_sends_none_of_its_headers_nothing_is_recorded(world, shown, code):
    certificate = None if shown is None else CERTIFICATES[shown]
    answer(attest(world))
    kept = {kind: world.rows(kind) for kind in (AttestationRow, AuditRow, NonceRow, ServerRow)}
    proxies = TrustedProxies((TrustedProxy("front", (ip_network("192.0.2.0/24"),), secrets=(Secret(b"secret"),)),))
    world.app = App(service(proxies=proxies))
    silent = attest(world, peer_certificate=certificate)
    assert refusal(silent)[:2] == (503, Code.SERVER_FAULT)
    assert silent.header("connection") == "close"
    assert "networks of proxy front" in str(world.log[-1].fields["reason"])
    assert {kind: world.rows(kind) for kind in kept} == kept
    assert status(world)["attestation_status"] == "verified"
    world.app = App(service())
    assert refusal(attest(world, peer_certificate=certificate))[1] == code


@pytest.mark.parametrize("coverage", ["nonce", "purpose", "body"])
def test_the_signatures_that_are_taken(world, coverage):
    assert answer(attest(world, coverage=coverage))


def test_under_the_policy_request_only_the_whole_request(world):
    answer(attest(world, policy="request"))
    nonce = nonce_of(world)
    world.app = App(service(signatures="request"))
    assert refusal(attest(world, nonce))[1] == Code.SIGNATURE_INVALID
    assert refusal(attest(world, nonce, coverage="purpose"))[1] == Code.SIGNATURE_INVALID
    answer(attest(world, nonce, policy="request"))


def test_a_nonce_is_for_one_server_one_purpose_and_once(world):
    registered(register(world, id="n2", name="b", host="5.6.7.8", gpus=[gpu("GPU-1")]))
    for nonce in (nonce_of(world, "n2"), world.nonce(), world.nonce(f"?miner_hotkey={MINER.hotkey.address}")):
        assert refusal(attest(world, nonce))[:2] == (401, Code.NONCE_INVALID)
    nonce = nonce_of(world)
    answer(attest(world, nonce))
    assert refusal(attest(world, nonce))[:2] == (401, Code.NONCE_INVALID)
    nonce = nonce_of(world)
    world.now += 601
    assert refusal(attest(world, nonce))[:2] == (401, Code.NONCE_INVALID)


@pytest.mark.parametrize("nonce", ["1800000000", "AB" * 32, "ab" * 31, "\u0661" * 64, ""])
def test_what_is_no_nonce_of_a_server(world, nonce):
    headers = {
        "x-chutes-hotkey": MINER.hotkey.address,
        "x-chutes-nonce": nonce,
        "x-chutes-signature": "00" * 64,
    }
    response = world.ask("POST", PATH, b"{}", headers=headers)
    assert refusal(response) == (401, Code.NONCE_INVALID, "Invalid nonce supplied")


def test_without_a_link_the_first_success_binds_the_platform(world):
    registered(register(world, id="n2", name="b", host="5.6.7.8", gpus=[gpu("GPU-1")]))
    path = "/servers/n2/attestation"
    answer(attest(world, nonce_of(world, "n2"), path))
    first, world.platform = world.platform, world.platform.another(1)
    assert refusal(attest(world, nonce_of(world, "n2"), path))[1] == Code.PLATFORM_MISMATCH
    world.platform = first
    answer(attest(world, nonce_of(world, "n2"), path))


def test_a_server_that_attested_does_not_yield(world):
    registered(register(world, id="n2", name="b", host="5.6.7.8", gpus=[gpu("GPU-1")]))
    answer(attest(world, nonce_of(world, "n2"), "/servers/n2/attestation"))
    boot(world, OTHER, vm="x", address="5.6.7.8")
    claims = register(world, OTHER, id="n3", name="x", host="5.6.7.8", gpus=[gpu("GPU-2")])
    assert refusal(claims)[:2] == (409, Code.HOST_TAKEN)
    assert "n2" in [row.server_id for row in world.rows(ServerRow)]


def test_a_removed_servers_verdicts_are_not_the_next_ones(world):
    answer(attest(world))
    answer(world.ask_signed("DELETE", "/servers/n1"))
    registered(register(world, OTHER))
    told = answer(world.ask_signed("GET", "/servers/n1/attestation/status", pair=OTHER))
    assert told["attestation_status"] == "never_attested"
    assert len(runtime_rows(world)) == 1


def test_refusals_are_recorded_up_to_a_number_a_day(world):
    (server,) = world.rows(ServerRow)
    unit = RecordRuntimeRefusal(
        now=NOW,
        request_id="0",
        server=server,
        nonce=bytes(32),
        quote=Quote.refused(bytes(32)),
        code="quote_rejected",
        detail="d",
        reason="r",
        peer_address="",
    )
    kept = [world.store.transact(evolve(unit, request_id=f"{number}")) for number in range(REFUSALS_PER_DAY + 1)]
    assert kept == [True] * REFUSALS_PER_DAY + [False]
    assert world.store.transact(evolve(unit, request_id="later", now=NOW + 86_400))


def test_a_store_that_is_busy_is_a_503_and_a_record_that_fails_changes_no_refusal(world):
    nonce = nonce_of(world)

    def busy(effect: Any) -> None:
        if isinstance(effect, Transact) and type(effect.unit).__name__ in ("GrantRuntime", "RecordRuntimeRefusal"):
            raise StoreBusy("busy")

    world.before = busy
    assert refusal(attest(world, nonce))[:2] == (503, Code.STORE_UNAVAILABLE)
    world.platform = world.platform.having("rtmr1")
    assert refusal(attest(world, nonce))[1] == Code.MEASUREMENT_MISMATCH
    assert runtime_rows(world) == []


@given(quote=st.text(max_size=300) | st.binary(max_size=700).map(encode_quote))
def test_any_quote_is_refused_and_recorded(quote):
    world = World()
    registered(register(world))
    nonce = nonce_of(world)
    try:
        body = json.encode({"quote": quote})
    except UnicodeEncodeError:
        return
    response = world.ask_signed("POST", PATH, body, nonce=nonce, coverage="nonce")
    assert refusal(response)[0] in (403, 422)
    assert len(runtime_rows(world)) == (response.status == 403)
