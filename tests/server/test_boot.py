"""Operations 1 and 2 in process: order of checks, consumption, texts and codes."""

import base64
import hashlib
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.effects import FetchCollateral, Sleep, Transact, run
from chutes_proto.errors import CollateralUnavailable, FateUnknown, KeyUnavailable, StoreAway, StoreBusy, StoreError
from chutes_proto.log import Level
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._layout import parse_quote
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._config import LimitOptions
from chutes_proto.server._limits import Admission
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._readiness import watch_store
from chutes_proto.server._sweeping import LOOK_SECONDS, sweep_nonces
from chutes_proto.store._rows import AttestationRow, AuditRow, BootRow, Insert, NonceRow, ReadTimes, VmRow
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.boot import REFUSALS_PER_DAY
from chutes_proto.units.operator import StoreRestored
from chutes_proto.wire import json
from chutes_proto.wire.codec import decode_quote
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.server.world import HOTKEY, NOW, World, answer, content, refusal, service

OTHER_HOTKEY = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def attest(world: World, nonce: str | None = None, fault: str | None = None, **members: Any) -> HttpResponse:
    good = world.platform
    if fault:
        world.platform = good.having(fault)
    try:
        return world.boot(nonce, **members)
    finally:
        world.platform = good


def test_a_nonce_is_64_lowercase_hex_and_says_its_end(world):
    members = answer(world.ask("GET", "/servers/nonce"))
    assert list(members) == ["nonce", "expires_at"]
    assert bytes.fromhex(members["nonce"]).hex() == members["nonce"]
    assert members["expires_at"] == "2027-01-15T08:10:00+00:00"
    assert not any(isinstance(effect, Transact) for effect in world.asked)  # issuing one writes nothing


def test_a_boot_is_granted(world):
    members = answer(world.boot())
    assert list(members) == ["key", "boot_token"]
    assert len(bytes.fromhex(members["key"])) == 64
    assert len(bytes.fromhex(members["boot_token"])) == 32
    (boot,) = world.rows(BootRow)
    assert boot.token_digest == hashlib.sha256(members["boot_token"].encode()).digest()
    assert boot.certificate == spki_sha256(world.certificate)
    (attestation,) = world.rows(AttestationRow)
    assert attestation.code is None
    (granted,) = [record for record in world.log if record.event == "boot_granted"]
    assert granted.fields["trust"] == "simulated"
    assert granted.fields["request_id"] == boot.boot_id
    everything = repr((world.log, world.rows(AuditRow), world.asked))
    assert members["key"] not in everything
    assert members["boot_token"] not in everything


def test_the_root_passphrase_stays_the_same_and_is_each_vms_own(world):
    first = answer(world.boot())["key"]
    assert answer(world.boot())["key"] == first
    assert answer(world.boot(vm_name="vm-2"))["key"] != first


def test_the_images_passphrase_is_served_where_the_profile_says_so(world):
    profile = ServedProfile(PROFILE, Secret(b"one for all"), False, False)
    world.app = App(service(profiles={PROFILE.identity: profile}))
    assert answer(world.boot())["key"] == "one for all"
    assert answer(world.boot(vm_name="vm-2"))["key"] == "one for all"


@pytest.mark.parametrize("form", ["v4", "v5-td10", "v5-td15"])
def test_every_form_of_quote(world, form):
    world.platform = evolve(world.platform, form=form)
    assert answer(world.boot())


# Each row: what is wrong, and the status, code and text it gives. A request is made with this row's fault and those of
# all rows below it: the upper one must win, so the table is the order of checks.
NOT_VERIFIED = "Unable to parse provided quote for verification."
NOT_EXPECTED = "Quote does not match expected measurements. Ensure you are running a supported VM."
ORDER = [
    ("body", 422, Code.VALIDATION_ERROR, None),
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
    ("rtmr1", 403, Code.MEASUREMENT_MISMATCH, NOT_EXPECTED + " (RTMR1)"),
    ("hotkey", 403, Code.HOTKEY_REJECTED, "Invalid miner hotkey"),
    ("signature", 401, Code.SIGNATURE_INVALID, None),
    ("platform", 403, Code.PLATFORM_MISMATCH, None),
    ("used nonce", 401, Code.NONCE_INVALID, "Invalid nonce supplied"),
]
PLATFORM_FAULTS = {
    "version",
    "report_data_nonce",
    "report_data_key",
    "pck_expired",
    "quote_signature",
    "qe_prod_id",
    "tcb_out_of_date",
    "debug",
    "rtmr1",
}


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[row[0] for row in ORDER])
def test_the_order_of_checks(world, first):
    wrong = [name for name, *_ in ORDER[first:]]
    good = world.platform
    nonce = world.nonce()
    if "used nonce" in wrong:
        assert answer(world.boot(nonce, vm_name="vm-used"))
    if "platform" in wrong:
        world.platform = good.another(1)
        assert answer(world.boot())  # the name is another platform's now
    world.platform = good.having(*(name for name in wrong if name in PLATFORM_FAULTS))
    body, headers = world.attestation(nonce)
    world.platform = good
    if "body" in wrong:
        body["vm_name"] = 7
    if "nonce" in wrong:
        headers["x-chutes-nonce"] = "0" * 64
    if "no certificate" in wrong:
        world.certificate = None
    if "base64" in wrong:
        body["quote"] += "?"
    if "no collateral" in wrong:
        world.platform = good.another(2)  # whose collateral is all that there is
    if "hotkey" in wrong:
        body["miner_hotkey"] = HOTKEY[:-1] + "Z"
    if "signature" in wrong:
        headers |= {"x-chutes-hotkey": body["miner_hotkey"], "x-chutes-signature": "00" * 64}
    before = world.rows(NonceRow), world.rows(BootRow), world.rows(VmRow)
    response = world.ask("POST", "/servers/boot/attestation", body, headers=headers)
    status, code, detail = refusal(response)
    _, expected_status, expected_code, text = ORDER[first]
    assert (status, code) == (expected_status, expected_code)
    assert text is None or detail == text
    assert response.header("connection") == "close"
    assert (
        world.rows(NonceRow),
        world.rows(BootRow),
        world.rows(VmRow),
    ) == before  # nothing consumed, nothing granted
    recorded = [row.code for row in world.rows(AttestationRow) if row.code]
    dcap_held = first > [name for name, *_ in ORDER].index("qe_prod_id")
    assert recorded == ([expected_code] if dcap_held else [])


def test_a_refusal_costs_no_nonce_and_a_grant_costs_it(world):
    nonce = world.nonce()
    assert refusal(attest(world, nonce, "rtmr2"))[1] == Code.MEASUREMENT_MISMATCH
    assert answer(world.boot(nonce))
    assert refusal(world.boot(nonce)) == (401, Code.NONCE_INVALID, "Invalid nonce supplied")


def test_a_nonce_bound_to_a_hotkey(world):
    nonce = world.nonce(f"?miner_hotkey={HOTKEY}")
    assert refusal(world.boot(nonce, miner_hotkey=OTHER_HOTKEY))[1] == Code.NONCE_INVALID
    assert answer(world.boot(nonce))


@pytest.mark.parametrize(
    ("quote", "detail"),
    [
        (b"", "Quote too short: 0 bytes"),
        (b"\4\0" + bytes(629), "Quote too short: 631 bytes"),
        (b"\7\0\2\0\x81" + bytes(700), "Invalid quote version: 7 (expected 4 or 5)"),
        (b"\4\0\2\0\0\0\0\0" + bytes(700), "Invalid TEE type: 00000000 (expected 0x81 for TDX)"),
        (b"\4\0\5\0\x81\0\0\0" + bytes(700), "Invalid attestation key type: 5"),
        (
            b"\4\0\2\0\x81\0\0\0" + bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(700),
            "Failed to parse quote: its structure is not that of a TDX quote",
        ),
    ],
)
def test_texts_of_quotes_that_do_not_parse(world, quote, detail):
    response = world.boot(quote=base64.b64encode(quote).decode())
    assert refusal(response) == (403, Code.QUOTE_MALFORMED, detail)


@pytest.mark.parametrize("register", ["mrtd", "rtmr0", "rtmr1", "rtmr2", "rtmr3"])
def test_a_wrong_measurement_names_its_register_and_no_value(world, register):
    response = attest(world, fault=register)
    assert refusal(response) == (403, Code.MEASUREMENT_MISMATCH, f"{NOT_EXPECTED} ({register.upper()})")
    (record,) = [record for record in world.log if record.event == "refused"]
    assert register.upper() in str(record.fields["reason"])
    assert record.fields["request_id"] == content(response)["request_id"]


@pytest.mark.parametrize("fault", ["profiling", "reserved_tud", "reserved_sec", "migratable", "servtd_ext", "xfam"])
def test_attributes_that_are_never_accepted(world, fault):
    assert refusal(attest(world, fault=fault))[:2] == (403, Code.ATTRIBUTES_REJECTED)


@pytest.mark.parametrize("fault", ["pck_revoked", "tcb_revoked", "qe_report_signature", "tcb_info_fmspc", "other_root"])
def test_quotes_that_do_not_verify(world, fault):
    world.platform = world.platform.having(fault)
    status, code, detail = refusal(world.boot())
    assert (status, code) in [(403, Code.QUOTE_REJECTED), (503, Code.COLLATERAL_UNAVAILABLE)]
    ends = {"tcb_revoked": "(TCB status)", "other_root": "(root)", "tcb_info_fmspc": "Retry shortly."}
    assert detail.endswith(ends.get(fault, "(signature)"))


def test_names_are_bound_to_their_platform(world):
    assert answer(world.boot())
    world.platform = world.platform.another(1)
    assert refusal(world.boot())[:2] == (403, Code.PLATFORM_MISMATCH)
    assert answer(world.boot(vm_name="vm-2"))


def test_a_platform_has_so_many_names(world):
    world.app = App(service(limits=LimitOptions(claims_per_platform=2)))
    assert answer(world.boot(vm_name="a"))
    assert answer(world.boot(vm_name="b"))
    assert refusal(world.boot(vm_name="c"))[:2] == (403, Code.PLATFORM_MISMATCH)
    assert answer(world.boot(vm_name="a"))


def test_only_known_hotkeys(world):
    world.app = App(service(hotkeys=frozenset({OTHER_HOTKEY})))
    assert refusal(world.boot()) == (403, Code.HOTKEY_REJECTED, "Your hotkey is not registered on 64")
    assert answer(world.boot(miner_hotkey=OTHER_HOTKEY))


def signed(world: World, seed: bytes = b"s" * 32) -> tuple[dict[str, Any], dict[str, str]]:
    pair = HotkeyPair.from_secret(Secret(seed))
    hotkey = pair.hotkey.address
    body, headers = world.attestation(miner_hotkey=hotkey)
    message = f"{hotkey}:{headers['x-chutes-nonce']}:{hashlib.sha256(json.encode(body)).hexdigest()}"
    return body, headers | {"x-chutes-hotkey": hotkey, "x-chutes-signature": pair.sign(message.encode()).hex()}


def test_a_signed_boot_proves_the_hotkey(world):
    body, headers = signed(world)
    assert answer(world.ask("POST", "/servers/boot/attestation", body, headers=headers))
    (row,) = world.rows(VmRow)
    assert row.proven


def test_a_signature_that_does_not_hold(world):
    body, headers = signed(world)
    body["vm_name"] = "vm-2"
    assert refusal(world.ask("POST", "/servers/boot/attestation", body, headers=headers))[:2] == (
        401,
        Code.SIGNATURE_INVALID,
    )


def test_a_signature_of_another_hotkey(world):
    body, headers = signed(world)
    headers["x-chutes-hotkey"] = HOTKEY
    assert refusal(world.ask("POST", "/servers/boot/attestation", body, headers=headers))[1] == Code.SIGNATURE_INVALID


def test_a_profile_can_demand_a_signature(world):
    world.app = App(service(profiles={PROFILE.identity: ServedProfile(PROFILE, None, True, False)}))
    assert refusal(world.boot())[:2] == (401, Code.SIGNATURE_INVALID)
    body, headers = signed(world)
    assert answer(world.ask("POST", "/servers/boot/attestation", body, headers=headers))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreBusy("locked"), Code.STORE_UNAVAILABLE),
        (StoreError("full"), Code.STORE_UNAVAILABLE),
        (KeyUnavailable("kek"), Code.KEY_UNAVAILABLE),
        (RuntimeError("a secret"), Code.SERVER_FAULT),
    ],
)
def test_our_faults_are_503_and_spend_nothing(world, error, code):
    nonce = world.nonce()

    def fail(effect):
        if isinstance(effect, Transact):
            raise error

    world.before = fail
    response = world.boot(nonce)
    assert refusal(response)[:2] == (503, code)
    assert int(response.header("retry-after")) > 0
    assert "a secret" not in repr((response.body, world.log))
    world.before = lambda _: None
    assert answer(world.boot(nonce))


def test_redemptions_are_forgotten_beside_the_boots(world):
    """Once an hour, even if the store is away in between."""

    class EndedError(Exception):
        pass

    nonce = world.nonce()
    assert answer(world.boot(nonce))
    looks = []

    def watch(effect):
        if isinstance(effect, Sleep) and effect.seconds == LOOK_SECONDS:
            looks.append((len(world.rows(NonceRow)), world.store.transact(Ask(ReadTimes())).horizon))
            world.now += 86_400 if len(looks) == 2 else 300
            if len(looks) == 5:
                raise EndedError
        elif isinstance(effect, Transact) and not looks:
            raise StoreAway("away")

    world.before = watch
    with pytest.raises(EndedError):
        run(sweep_nonces(world.app.service.readiness), world.perform)
    kept = NOW + 300 - 86_400  # at the second look; the fourth is too soon
    assert looks == [(1, 0), (1, kept), (0, kept + 86_400), (0, kept + 86_400), (0, kept + 86_400)]


@pytest.mark.parametrize("fault", [StoreAway("away"), StoreBusy("locked"), FateUnknown("no answer in time")])
def test_a_store_that_does_not_answer_leaves_the_server_ready(world, fault):
    """Else quick 503 would end the boots that could wait for it."""

    class EndedError(Exception):
        pass

    def fail(effect):
        if isinstance(effect, (Transact, Sleep)):
            raise fault if isinstance(effect, Transact) else EndedError

    world.before = fail
    with pytest.raises(EndedError):
        run(watch_store(world.app.service.readiness, world.app.service.revoked), world.perform)
    assert world.nonce()


def test_a_refusal_that_cannot_be_recorded_is_the_same_refusal(world):
    def fail(effect):
        if isinstance(effect, Transact):
            raise StoreBusy("locked")

    world.before = fail
    assert refusal(attest(world, fault="rtmr0"))[1] == Code.MEASUREMENT_MISMATCH
    assert [record.event for record in world.log] == ["refusal_not_recorded", "refused"]


def test_the_log_says_once_that_denials_of_a_platform_are_not_recorded_any_more(world):
    """An attacker who writes the database can add what counts, and nobody would miss the entries."""
    attest(world, fault="rtmr0")
    (verdict,) = world.rows(AttestationRow)
    for number in range(1, REFUSALS_PER_DAY):
        world.store.transact(Ask(Insert(evolve(verdict, attestation_id=f"forged {number}"))))
    for _ in range(2):
        attest(world, fault="rtmr0")
    assert [record.event for record in world.log] == ["refused", "refusal_not_recorded", "refused", "refused"]
    assert "100 denials of this day (UTC)" in world.log[1].fields["error"]
    assert len([row for row in world.rows(AuditRow) if row.decision == "refused"]) == 1


def test_missing_collateral_is_our_fault_and_spends_nothing(world):
    nonce = world.nonce()

    def fail(effect):
        if isinstance(effect, FetchCollateral):
            raise CollateralUnavailable("none for this FMSPC")

    world.before = fail
    assert refusal(world.boot(nonce))[:2] == (503, Code.COLLATERAL_UNAVAILABLE)
    world.before = lambda _: None
    assert answer(world.boot(nonce))


def test_verifications_at_once_are_bounded(world):
    world.app = App(service(verifications=Admission(1, share=1)))
    body, headers = world.attestation()
    seen = []

    def again(effect):
        if isinstance(effect, FetchCollateral):
            world.before = lambda _: None
            seen.append(world.ask("POST", "/servers/boot/attestation", body, headers=headers))

    world.before = again
    assert answer(world.ask("POST", "/servers/boot/attestation", body, headers=headers))
    assert refusal(seen[0])[:2] == (503, Code.BUSY)
    assert not world.app.service.verifications.held


def test_slow_collateral_of_one_kind_of_platform_leaves_the_others_their_turn(world):
    """Half of the slots may wait for it; a quote of another kind, whose collateral is there, is verified meanwhile."""
    world.app = App(service(limits=LimitOptions(verifications=4)))
    slow, other = world.platform, world.platform.another(1)
    seen: list[int] = []

    def meanwhile(effect):
        if not isinstance(effect, FetchCollateral) or effect.identity.fmspc != slow.fmspc or len(seen) > 1:
            return
        seen.append(world.app.service.verifications.admitted)
        if len(seen) == 1:
            assert answer(world.boot())  # waits too, in the second slot
            return
        assert refusal(world.boot(vm_name="vm-2"))[:2] == (503, Code.BUSY)
        world.platform = other
        assert answer(world.boot(vm_name="vm-3"))
        world.platform = slow

    world.before = meanwhile
    assert answer(world.boot())
    assert seen == [1, 2]
    assert not world.app.service.verifications.held


def test_draining_sends_boots_away_and_serves_what_is_asked_once(world):
    token = world.token()
    world.app.draining = True
    assert refusal(world.ask("GET", "/servers/nonce"))[:2] == (503, Code.DRAINING)
    assert refusal(world.ask("POST", "/servers/boot/attestation", {}))[:2] == (503, Code.DRAINING)
    assert [record.level for record in world.log if record.event == "refused"] == [Level.WARNING] * 2
    assert answer(world.sync(token, {"volumes": ["storage"]}))


@pytest.mark.parametrize("now", [1000, 1_400_000_000])
def test_a_clock_of_ours_that_is_behind_is_our_fault(world, now):
    world.now = now
    assert refusal(world.boot())[:2] == (503, Code.COLLATERAL_UNAVAILABLE)


def test_collateral_that_ends_while_it_is_fetched_is_our_fault(world):
    nonce = world.nonce()
    body, headers = world.attestation(nonce)
    collateral = world.platform.collateral(NOW - 30 * 86400 + 1)

    def perform(effect):
        match effect:
            case FetchCollateral():
                verified = verify_collateral(collateral, now=world.now, root=world.app.service.root)
                world.now += 2
                return verified
            case _:
                return world.perform(effect)

    request = HttpRequest(
        "POST", "/servers/boot/attestation", tuple(headers.items()), json.encode(body), world.certificate
    )
    assert refusal(run(world.app.handle(request), perform))[:2] == (503, Code.COLLATERAL_UNAVAILABLE)


def test_quotes_with_a_genuine_chain_cannot_fill_the_log(world):
    def fail(effect):
        if isinstance(effect, FetchCollateral):
            raise CollateralUnavailable("none for this FMSPC")

    body, headers = world.attestation()
    world.before = fail
    for _ in range(100):
        assert refusal(world.ask("POST", "/servers/boot/attestation", body, headers=headers))[0] == 503
    assert len(world.log) == 20


@pytest.mark.parametrize("fault", ["quote_signature", "header_altered", "attestation_key", "qe_report_signature"])
def test_who_knows_only_a_platforms_certificates_has_no_collateral_asked_for(world, fault):
    """Else quotes that nobody signed could wait for slow collateral in every slot."""
    world.platform = world.platform.having(fault)
    asked: list[Any] = []
    world.before = lambda effect: asked.append(effect) if isinstance(effect, FetchCollateral) else None
    assert refusal(world.boot())[:2] == (403, Code.QUOTE_REJECTED)
    assert asked == []


def test_a_boot_verifies_the_signature_of_its_quote_once(world, monkeypatch):
    body, headers = world.attestation()
    signed = parse_quote(decode_quote(body["quote"])).signed
    verify_raw = ecdsa.verify_raw
    messages: list[bytes] = []

    def counted(key, signature, message):
        messages.append(message)
        verify_raw(key, signature, message)

    monkeypatch.setattr(ecdsa, "verify_raw", counted)
    assert answer(world.ask("POST", "/servers/boot/attestation", body, headers=headers))["key"]
    assert messages.count(signed) == 1


def test_for_a_minute_after_a_restore_boots_are_told_to_come_again(world):
    token = world.token()
    world.store.transact(StoreRestored(world.now))
    nonce = world.nonce()
    assert refusal(world.boot(nonce))[:2] == (503, Code.STORE_UNAVAILABLE)
    assert refusal(world.sync(token, {"volumes": ["storage"]}))[:2] == (401, Code.BOOT_TOKEN_INVALID)
    world.now += 61
    response = world.boot(nonce)  # it began while boots waited: a 401 would power the VM off
    assert (refusal(response)[:2], response.header("retry-after")) == ((503, Code.STORE_UNAVAILABLE), "1")
    assert answer(world.boot())


def test_a_horizon_in_the_future_is_told_with_the_command_that_mends_it(world):
    world.store.transact(StoreRestored(world.now + 86_400))
    assert refusal(world.boot())[:2] == (503, Code.STORE_UNAVAILABLE)
    assert "a clock was ahead" in world.log[-1].fields["reason"]
    assert "run `chutes-proto store restored`" in world.log[-1].fields["reason"]
    world.store.transact(StoreRestored(world.now))
    assert refusal(world.boot())[:2] == (503, Code.STORE_UNAVAILABLE)
    assert "boots wait until then" in world.log[-1].fields["reason"]
    world.now += 61
    assert answer(world.boot())


def test_a_server_whose_clock_jumped_refuses_no_nonce_for_good(world):
    """Until its store has confirmed the time: a day ahead, the nonces of all other servers would be too old."""
    readiness = world.app.service.readiness
    nonce = world.nonce()
    readiness.note_clock(world.now, world.uptime)
    for jump in (86_400, -86_400):
        world.now += jump
        assert refusal(world.boot(nonce if jump > 0 else "00" * 32))[:2] == (503, Code.SERVER_FAULT)
        assert f"this server's clock was set by {jump:+} s" in world.log[-1].fields["reason"]
        readiness.note_clock(world.now, world.uptime)
    world.now, world.uptime = world.now + 601, world.uptime + 601
    assert refusal(world.boot(nonce))[:2] == (401, Code.NONCE_INVALID)
    readiness.fault = "store keys.db: the database's clock says otherwise"
    assert refusal(world.boot(nonce))[:2] == (503, Code.SERVER_FAULT)
    assert refusal(world.ask("GET", "/servers/nonce"))[:2] == (503, Code.STORE_UNAVAILABLE)
    readiness.fault = None
    assert answer(world.boot())


def test_a_nonce_of_a_server_whose_clock_is_ahead_is_no_final_refusal(world):
    world.now += 86_400
    nonce = world.nonce()
    world.now -= 86_400
    assert refusal(world.boot(nonce))[:2] == (503, Code.SERVER_FAULT)
    assert "compare the clocks of all servers" in world.log[-1].fields["reason"]
    assert answer(world.boot())
