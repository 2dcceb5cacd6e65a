"""Hosts that are asked for their evidence, in process: what is asked and in which order, and hosts that lie."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import Any

import pytest
from attrs import define, evolve, field
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import Hotkey, HotkeyPair
from chutes_proto.auth.signing import purpose_message
from chutes_proto.effects import Effect, FetchCollateral, FetchEvidence, Log, Resolve, Transact
from chutes_proto.errors import CollateralUnavailable, RemoteProtocolError, TransportError
from chutes_proto.keys.generations import CALLER_VOLUME
from chutes_proto.quote._measurements import Schedule
from chutes_proto.secret import Secret
from chutes_proto.server._app import App
from chutes_proto.server._callbacks import SECONDS
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.server._service import Callback
from chutes_proto.store._rows import AttestationRow, AuditRow, GenerationRow, ServerRow, UpdateGeneration
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import PROFILE
from chutes_proto.units.servers import ReadCaller
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.codes import Code
from chutes_proto.wire.evidence import decode_evidence
from chutes_proto.wire.http import HttpResponse
from tests.server import test_provision as provisioning
from tests.server.test_servers import HOST, boot, gpu, register, registered
from tests.server.world import CERTIFICATES, MINER, NOW, OTHER, World, answer, refusal, service

VALIDATOR = HotkeyPair.from_secret(Secret(b"the key server's own hotkey".ljust(32, b"!")))
OTHERS, CERTIFICATE = CERTIFICATES
NO_EVIDENCE = (
    400,
    Code.EVIDENCE_UNAVAILABLE,
    "Server registration failed - Failed to get evidence for attestation.",
)


@define(eq=False)
class Hosted(World):
    """A world in which hosts answer; ``lie`` changes what they say."""

    lie: dict[str, Any] = field(factory=dict)
    calls: list[FetchEvidence] = field(factory=list)

    def perform(self, effect: Effect[Any]) -> Any:
        if not isinstance(effect, FetchEvidence):
            return super().perform(effect)
        self.asked.append(effect)
        self.before(effect)
        self.calls.append(effect)
        if (error := self.lie.get("error")) is not None:
            raise error
        nonce = self.lie.get("nonce") or bytes.fromhex(effect.target.rpartition("=")[2])
        quote = self.platform.quote(
            report_data(nonce, spki_sha256(self.lie.get("leaf", CERTIFICATE))), stage=self.lie.get("stage", "runtime")
        )
        members = {"tdx_quote": encode_quote(quote), "nvtrust_evidence": "[]"} | self.lie.get("members", {})
        body = self.lie.get("body", json.encode(members))
        der = self.lie.get("certificate", self.lie.get("leaf", CERTIFICATE).public_bytes(Encoding.DER))
        return HttpResponse(self.lie.get("status", 200), self.lie.get("headers", ()), body), der


@pytest.fixture
def world() -> Hosted:
    return make_world()


def make_world(**changes: Any) -> Hosted:
    policy = {"registration_evidence": "callback", "callback": Callback(VALIDATOR.hotkey, VALIDATOR.sign)}
    return Hosted(App(service(**(policy | changes))))


def reasons(world: World) -> list[Any]:
    return [record.fields["reason"] for record in world.log if record.event == "refused"]


def test_a_host_shows_its_quote(world):
    registered(register(world))
    (call,) = world.calls
    assert (call.address, call.host, call.port, call.seconds) == (HOST, HOST, 30443, SECONDS)
    path, _, nonce = call.target.partition("=")
    assert (path, len(nonce)) == ("/server/attest?nonce", 64)
    headers = dict(call.headers)
    assert (headers["x-chutes-hotkey"], headers["x-chutes-nonce"]) == (VALIDATOR.hotkey.address, str(NOW))
    message = purpose_message(VALIDATOR.hotkey, str(NOW), "attest")
    assert message.endswith(b":attest")
    VALIDATOR.hotkey.check_signature(message, bytes.fromhex(headers["x-chutes-signature"]))
    (row,) = world.rows(AttestationRow)
    assert (row.stage, row.code, row.profile_name, row.peer_address) == ("runtime", None, PROFILE.name, HOST)
    assert (row.tcb_status, row.advisories) == ("UpToDate", "")  # known, and none
    (audit,) = world.rows(AuditRow)
    assert "GPU evidence NOT verified" in audit.reason
    assert hashlib.sha256(b"[]").hexdigest() in audit.reason
    assert (audit.pin, audit.quote_digest) == (row.pin, row.quote_digest)


def test_a_profile_that_ends_after_its_quote_was_accepted_is_no_fault():
    """The quote was judged by the time at which it came."""
    ending = evolve(PROFILE, schedule=Schedule(not_after=NOW + 1))
    world = make_world(profiles={ending.identity: ServedProfile(ending, None, False, False)})

    def pass_time(effect: Effect[Any]) -> None:
        if isinstance(effect, Log):
            world.now = NOW + 1

    world.before = pass_time
    registered(register(world))


def test_what_a_host_shows_proves_no_owner(world):
    """Nothing in it names the hotkey, so it neither binds a platform nor counts as the owner's attestation."""
    registered(register(world))
    (server,) = world.rows(ServerRow)
    assert (server.pin, server.attested, server.boot_id) == (None, None, None)
    assert refusal(register(world, OTHER, id="n2"))[0] == 409
    boot(world, OTHER, vm="mine")
    registered(register(world, OTHER, id="n2", name="mine"))  # a boot from there is better evidence
    assert [row.server_id for row in world.rows(ServerRow)] == ["n2"]


def owner(
    pair: HotkeyPair = MINER, at: int = NOW, word: str = "tee", changes: dict[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """The headers of a host that names its owner."""
    signature = pair.sign(purpose_message(pair.hotkey, str(at), word)).hex()
    headers = {"x-chutes-hotkey": pair.hotkey.address, "x-chutes-nonce": str(at), "x-chutes-signature": signature}
    return tuple((headers | (changes or {})).items())


@pytest.mark.parametrize("word", ["attest", "tee"])
def test_a_host_that_proves_its_owner_is_evidence(world, word):
    """It binds the platform, counts as the owner's attestation, and a server without evidence yields to it."""
    registered(register(world, OTHER, id="n2", name="mine"))
    world.lie = {"headers": owner(word=word)}
    registered(register(world))
    (server,) = world.rows(ServerRow)
    (row,) = [row for row in world.rows(AttestationRow) if row.attestation_id == server.attested]
    assert (server.server_id, server.pin, row.code) == ("n1", row.pin, None)
    status = answer(world.ask_signed("GET", "/servers/n1/attestation/status"))
    assert (status["attestation_status"], status["fresh"]) == ("verified", True)
    assert [row.reason.partition("; server")[2] for row in world.rows(AuditRow) if row.event == "server yields"] == [
        f" n1 of {MINER.hotkey.address} at {HOST} has the proof of the host there"
    ]
    world.lie = {}
    assert refusal(register(world, OTHER, id="n3", name="again"))[0] == 409


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (owner(OTHER), Code.SIGNATURE_INVALID),
        (owner(at=NOW - 600), Code.SIGNATURE_STALE),
        (owner(at=NOW + 600), Code.SIGNATURE_STALE),
        (owner(word="miner"), Code.SIGNATURE_INVALID),
        (owner(changes={"x-chutes-signature": "00" * 64}), Code.SIGNATURE_INVALID),
        (owner(changes={"x-chutes-hotkey": OTHER.hotkey.address}), Code.SIGNATURE_INVALID),
        (owner()[:2], Code.SIGNATURE_INVALID),
        (owner()[2:], Code.SIGNATURE_INVALID),
        (owner()[:1], Code.SIGNATURE_STALE),
    ],
)
def test_a_host_that_does_not_prove_its_owner_is_refused(world, headers, code):
    world.lie = {"headers": headers}
    text = "Server registration failed - the host does not prove that you own it."
    assert refusal(register(world)) == (401, code, text)
    assert world.rows(ServerRow) == ()


def test_a_name_is_resolved_once_and_pinned(world):
    world.names["host.example"] = ("8.8.4.4",)

    def rebind(effect: Effect[Any]) -> None:
        if isinstance(effect, FetchEvidence):
            world.names["host.example"] = ("127.0.0.1",)  # a second resolution would lead inside

    world.before = rebind
    registered(register(world, host="host.example"))
    assert world.asked.count(Resolve("host.example")) == 1
    (call,) = world.calls
    assert (call.address, call.host) == ("8.8.4.4", "host.example")
    assert world.rows(ServerRow)[0].address == "8.8.4.4"


def test_who_may_not_register_makes_nobody_be_asked(world):
    wrong: tuple[dict[str, Any], ...] = ({"host": "127.0.0.1"}, {"gpus": []}, {"id": "nonce"})
    for changes in wrong:
        assert refusal(register(world, **changes))[0] in (400, 422)
    world.app.service = service(hotkeys=frozenset(), callback=world.app.service.callback)
    assert refusal(register(world))[:2] == (401, Code.HOTKEY_UNKNOWN)
    assert world.calls == []


def test_unsafe_networks_pass_for_public_ones(world):
    world = make_world(unsafe_networks=(ip_network("127.0.0.0/8"),))
    registered(register(world, host="127.0.0.1"))
    assert refusal(register(world, host="10.0.0.1", id="n2"))[:2] == (400, Code.HOST_INVALID)


@pytest.mark.parametrize(
    ("lie", "told"),
    [
        ({"error": TransportError("no route to host", maybe_delivered=False)}, "no route to host"),
        ({"error": TransportError("no whole answer within 20 s", maybe_delivered=True)}, "within 20 s"),
        ({"error": RemoteProtocolError("x")}, "x"),
        ({"status": 302}, "answers 302"),
        ({"status": 500}, "answers 500"),
        ({"body": b""}, "not JSON"),
        ({"body": b"\xff"}, "not UTF-8"),
        ({"body": b"[" * 10_000}, "deep"),
        ({"body": b'{"tdx_quote":"","tdx_quote":"","nvtrust_evidence":""}'}, "twice"),
        ({"members": {"tdx_quote": None}}, "lacks"),
        ({"members": {"nvtrust_evidence": []}}, "lacks"),
        ({"members": {"nvtrust_evidence": "{"}}, "not JSON"),
        ({"members": {"nvtrust_evidence": "[" * 17 + "]" * 17}}, "deep"),
        ({"certificate": b""}, "certificate"),
        ({"certificate": b"\x30\x03\x02\x01\x01"}, "certificate"),
    ],
)
def test_every_fault_of_a_host_is_told_alike(world, lie, told):
    world.lie = lie
    assert refusal(register(world)) == NO_EVIDENCE
    (reason,) = reasons(world)
    assert told in reason
    assert HOST in reason
    assert world.rows(ServerRow) == world.rows(AttestationRow) == world.rows(AuditRow) == ()


@pytest.mark.parametrize(
    ("lie", "status", "code"),
    [
        ({"nonce": bytes(32)}, 400, Code.NONCE_MISMATCH),
        ({"certificate": OTHERS.public_bytes(Encoding.DER)}, 403, Code.CERTIFICATE_MISMATCH),
        ({"members": {"tdx_quote": "AAAA"}}, 403, Code.QUOTE_MALFORMED),
        ({"members": {"tdx_quote": "!"}}, 403, Code.QUOTE_MALFORMED),
        ({"stage": "boot"}, 403, Code.MEASUREMENT_MISMATCH),
    ],
)
def test_a_quote_that_is_not_this_hosts_for_this_question(world, lie, status, code):
    world.lie = lie
    got, word, detail = refusal(register(world))
    assert (got, word) == (status, code)
    assert detail.startswith("Server registration failed - ")
    assert HOST in reasons(world)[0]
    assert world.rows(ServerRow) == world.rows(AttestationRow) == world.rows(AuditRow) == ()


def test_another_hosts_key_is_no_fault_of_the_proxy_that_the_caller_may_be(world):
    proxies = TrustedProxies((TrustedProxy("front", (ip_network("192.0.2.0/24"),)),))
    world.app = App(evolve(world.app.service, proxies=proxies))
    world.lie = {"certificate": OTHERS.public_bytes(Encoding.DER)}
    assert refusal(register(world))[:2] == (403, Code.CERTIFICATE_MISMATCH)


@pytest.mark.parametrize(("fault", "code"), [("debug", "attributes_rejected"), ("rtmr1", "measurement_mismatch")])
def test_a_td_that_is_not_accepted(world, fault, code):
    world.platform = world.platform.having(fault)
    assert refusal(register(world))[:2] == (403, code)


def test_gpus_are_those_of_the_quotes_profile():
    profile = evolve(PROFILE, expected_gpus=("h200",), gpu_count=2)
    served = {profile.identity: ServedProfile(profile, None, False, False)}
    world = make_world(profiles=served)
    assert refusal(register(world))[:2] == (400, Code.GPU_INVALID)
    registered(register(world, gpus=[gpu(), gpu("GPU-1", device_index=1)]))


def test_the_linked_boots_platform_answers(world):
    boot(world)
    world.platform = world.platform.another(1)
    assert refusal(register(world))[:2] == (403, Code.PLATFORM_MISMATCH)
    assert world.rows(ServerRow) == ()
    world.platform = World().platform
    registered(register(world))


def test_collateral_that_is_not_there_is_no_fault_of_the_hosts(world):
    def gone(effect: Effect[Any]) -> None:
        if isinstance(effect, FetchCollateral):
            raise CollateralUnavailable("none")

    world.before = gone
    status, code, _ = refusal(register(world))
    assert (status, code) == (503, Code.COLLATERAL_UNAVAILABLE)
    units = [effect.unit for effect in world.asked if isinstance(effect, Transact)]
    assert all(isinstance(unit, ReadCaller) for unit in units)  # which only reads


def test_hosts_that_are_slow_leave_others_their_turn(world):
    """While one host is asked, its miner waits; others do not, up to a number."""
    seen: list[Any] = []

    def meanwhile(effect: Effect[Any]) -> None:
        if not isinstance(effect, FetchEvidence) or len(world.calls) != 0 or seen:
            return
        seen.append(None)
        seen.append(refusal(register(world, id="n2", name=None, host="5.6.7.8", gpus=[gpu("GPU-1")])))
        registered(register(world, OTHER, id="n3", host="5.6.7.9", gpus=[gpu("GPU-2")]))

    world.before = meanwhile
    registered(register(world))
    status, code, text = seen[1]
    assert (status, code) == (503, Code.BUSY)
    assert "being registered" in text  # and not that quotes are verified
    registered(register(world, id="n2", name=None, host="5.6.7.8", gpus=[gpu("GPU-1")]))  # the turn is given back


@given(st.one_of(st.binary(max_size=200), st.text(max_size=50).map(str.encode)))
def test_any_answer_is_evidence_or_one_error(body):
    try:
        evidence = decode_evidence(HttpResponse(200, (), body))
    except RemoteProtocolError:
        return
    assert isinstance(evidence.quote, str)


def test_a_status_is_as_before(world):
    registered(register(world))
    assert answer(world.ask_signed("GET", "/servers/n1/attestation/status"))["attestation_status"] == "never_attested"
    assert MINER.hotkey.address == world.rows(ServerRow)[0].hotkey


# --- a VM of image 1.4.0 or newer ---


def certified(name: str, issuer: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """A key and its certificate: of a CA of its own, or signed by ``issuer``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuing, by = (key, subject) if issuer is None else (issuer[0], issuer[1].subject)
    begin = datetime.fromtimestamp(NOW, UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(by).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(begin).not_valid_after(begin + timedelta(days=365))
    return key, builder.sign(issuing, hashes.SHA256())


@pytest.fixture
def of_1_4() -> tuple[Hosted, str, Any]:
    """A world with a provisioned VM, the address that it trusts, and its root CA."""
    profile = ServedProfile(PROFILE, Secret(b"build"), False, False, "provisioned")
    world = make_world(profiles={PROFILE.identity: profile})
    root = certified("sek8s-vm-root-ca")
    world.certificate = root[1]
    granted = answer(provisioning.boot(world))
    assert answer(provisioning.provision(world, granted["luks_quote_nonce"]))
    return world, granted["vm_auth_ss58"], root


def shows(world: Hosted, leaf: Any) -> None:
    """Let the host present ``leaf``, whose key its quote binds."""
    world.lie = {"leaf": leaf}


def test_a_provisioned_vm_is_called_by_the_hotkey_of_its_boot(of_1_4):
    world, address, root = of_1_4
    shows(world, certified("vm", root)[1])
    registered(register(world, name="vm-1"))
    headers = dict(world.calls[-1].headers)
    assert headers["x-chutes-hotkey"] == address
    caller = Hotkey.parse(address)
    caller.check_signature(purpose_message(caller, str(NOW), "attest"), bytes.fromhex(headers["x-chutes-signature"]))


@pytest.mark.parametrize("exchange", ["two-phase", "provisioned"])
def test_a_release_candidate_registers_for_hotkeys_that_it_names(exchange):
    """The registration is signed, so the hotkey is proven; any other hears of a mismatch."""
    rc = ServedProfile(PROFILE, Secret(b"build"), False, False, exchange, True, frozenset({MINER.hotkey.address}))
    world = make_world(profiles={PROFILE.identity: rc})
    mismatch = "Server registration failed - Quote does not match expected measurements."
    status, code, detail = refusal(register(world, OTHER, id="n2", name="other"))
    assert (status, code, detail.startswith(mismatch)) == (403, Code.MEASUREMENT_MISMATCH, True)
    assert "no authorized hotkey is proven" in reasons(world)[-1]
    assert world.rows(ServerRow) == ()
    registered(register(world))


@pytest.mark.parametrize("of", ["another CA", "itself", "the root CA's own"])
def test_a_certificate_that_is_not_of_the_vms_root_ca(of_1_4, of):
    world, _, root = of_1_4
    leaves = {"another CA": certified("vm", certified("sek8s-vm-root-ca"))[1], "itself": certified("vm")[1]}
    shows(world, leaves.get(of, root[1]))
    assert refusal(register(world, name="vm-1"))[:2] == (403, Code.CERTIFICATE_MISMATCH)
    assert "not of the VM's root CA" in reasons(world)[-1]
    assert world.rows(ServerRow) == ()


def test_a_caller_whose_vm_is_on_another_platform_now_is_not_used(of_1_4):
    """Nor is the service's own hotkey, which the VM does not trust (no fallback)."""
    world, _, _ = of_1_4
    (row,) = [row for row in world.rows(GenerationRow) if row.volume == CALLER_VOLUME]
    world.store.transact(Ask(UpdateGeneration(evolve(row, state="retired", retired_at=NOW, retirement="takeover"))))
    assert refusal(register(world, name="vm-1"))[:2] == (403, Code.PLATFORM_MISMATCH)
    assert "boot it again" in reasons(world)[-1]
