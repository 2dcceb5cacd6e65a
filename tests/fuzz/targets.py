"""Fuzz targets: every function that reads bytes of a peer, each with the promise that it keeps for all inputs.

``make test`` runs these targets on inputs that Hypothesis makes of the seeds, ``make fuzz`` for longer on inputs that
atheris finds by their coverage. A check raises only where a promise is broken.
"""

from __future__ import annotations

import json as stdlib_json
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain
from struct import pack
from typing import get_args

import pytest
from attrs import frozen

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.boot._flows import BootGrant
from chutes_proto.boot._handoff import Handoff
from chutes_proto.boot._settings import AgentSettings, vm_identity
from chutes_proto.collateral import pcs
from chutes_proto.errors import (
    ChutesError,
    ConfigurationError,
    GpuError,
    HeaderRejected,
    LogError,
    QuoteError,
    Refusal,
    RemoteProtocolError,
    UpstreamError,
)
from chutes_proto.gpu import GpuPolicy, Revocation, Rims, authenticate, parse_report
from chutes_proto.gpu import _xml as xml
from chutes_proto.gpu import verify as verify_gpus
from chutes_proto.gpu._revocation import check_chain_status, check_floor
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.luks.header import check_header
from chutes_proto.quote import _cbor as cbor
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._attested import read_evidence
from chutes_proto.quote._certificates import (
    SGX_EXTENSION,
    check_kind,
    common_name,
    read_certificate,
    read_crl,
    revoked_serials,
)
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._eventlog import first_difference, parse_event_log, parse_event_log_json, replay
from chutes_proto.quote._layout import Quote, parse_quote
from chutes_proto.quote._measurements import parse_profiles_json, parse_profiles_toml
from chutes_proto.quote._pck import read_pck_extension
from chutes_proto.quote._policy import parse_policy_toml
from chutes_proto.quote._policy_set import parse_policy_set
from chutes_proto.quote._policy_words import explain_set, policy_notes
from chutes_proto.quote._published import parse_profile_file
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._statements import read_qe_identity, read_tcb_info
from chutes_proto.quote._verify import open_quote, verify_collateral
from chutes_proto.secret import Secret
from chutes_proto.server import _host_profiles as host_profiles
from chutes_proto.server._observing import trace_of
from chutes_proto.store._mark import Entry, Mark
from chutes_proto.testing._gpus import SimulatedGpus
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform
from chutes_proto.testing._quotes import Form
from chutes_proto.testing._service import CollateralService
from chutes_proto.testing._statements import PCE_SVN, SGX_COMPONENTS
from chutes_proto.tlog.notes import Checkpoint, Note, Signer, Verifier
from chutes_proto.tlog.tiles import Place, bundle, unbundle
from chutes_proto.transport import h1, qgs
from chutes_proto.transport.client import ClientConnection
from chutes_proto.transport.h1 import ServerConnection
from chutes_proto.wire import codec, endpoints, json
from chutes_proto.wire.codec import error_response
from chutes_proto.wire.evidence import decode_evidence
from chutes_proto.wire.fleet import REGISTER_HOST_PROFILE, HostProfileRequest
from chutes_proto.wire.http import HttpRequest, HttpResponse, MalformedRequest
from tests.luks import headers as luks
from tests.qgs import qgs_answer
from tests.quote import test_attested as attested
from tests.quote import test_published as published
from tests.quote.logs import EVENTS, grub, log, spec
from tests.quote.platform_files import encrypted_ppid, pcs_client_file
from tests.quote.simulated import with_certification
from tests.quote.test_registers import EVENTS as RUNTIME_EVENTS

NOW = 1_800_000_000
PLATFORM = SimulatedPlatform(b"a world for fuzzing")
ROOT = TrustedRoot.from_der(PLATFORM.root_der)
GPUS = SimulatedGpus(PLATFORM.seed)
_JSON = (("content-type", "application/json"),)
_HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
_AGENT = AgentSettings(("https://a",))


@frozen
class Target:
    """One promise, and honest inputs to start from."""

    check: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# --- the verifier ---


def check_quote(data: bytes) -> None:
    """A quote parses, and its PCK chain opens, or the verifier's one error says why not."""
    for sgx in (False, True):
        with suppress(QuoteError):
            _ = open_quote(data, now=NOW, root=ROOT, sgx=sgx, pck_certificate_chain=CHAIN)


CHAIN = parse_quote(PLATFORM.quote(bytes(64))).certification
_NAMED = encrypted_ppid(PLATFORM) + bytes(SGX_COMPONENTS) + PCE_SVN.to_bytes(2, "little") + bytes(2)


def quotes() -> list[bytes]:
    return [
        with_certification(PLATFORM.quote(bytes(64)), 3, _NAMED),
        with_certification(PLATFORM.quote(bytes(64)), 4, CHAIN[: CHAIN.index(b"-----END") + 26]),
        *(SimulatedPlatform(PLATFORM.seed, form=form).quote(bytes(64)) for form in get_args(Form)),
        SimulatedPlatform(PLATFORM.seed, ca="processor").quote(bytes(64), padding=16),
        _as_sgx(parse_quote(PLATFORM.quote(bytes(64)))),
    ]


def _as_sgx(quote: Quote) -> bytes:
    """A quote of version 3 of the quoting enclave itself: of the right form, though nobody signed it."""
    header = pack("<HHI4x16s20s", 3, 2, 0, quote.header.qe_vendor_id, quote.header.user_data)
    auth = quote.signature + quote.attestation_key + quote.qe_report_bytes + quote.qe_report_signature
    auth += pack("<H", len(quote.qe_auth)) + quote.qe_auth + pack("<HI", 5, len(quote.certification))
    auth += quote.certification
    return header + quote.qe_report_bytes + pack("<I", len(auth)) + auth


def check_collateral(data: bytes) -> None:
    """Collateral parses and verifies, or the verifier's one error says why not."""
    with suppress(QuoteError):
        _ = verify_collateral(Collateral.from_json(data), now=NOW, root=ROOT)


def check_platform_collaterals(data: bytes) -> None:
    """The pieces for a quote, and all, are found in a file of PcsClientTool, or the one error says why not."""
    with suppress(QuoteError):
        _ = Collateral.all_from_json(data)
    for quote in quotes():
        with suppress(QuoteError):
            _ = Collateral.from_json(data, quote=quote)


def platform_collaterals() -> list[bytes]:
    return [stdlib_json.dumps(pcs_client_file(PLATFORM, now=NOW, prefix=prefix)).encode() for prefix in ("SGX-", "")]


def check_attested_certificate(data: bytes) -> None:
    """The evidence of a certificate is read, or the verifier's one error says why not; CBOR comes back."""
    with suppress(QuoteError):
        _ = read_evidence(data)
    with suppress(QuoteError):
        value = cbor.decode(data)
        assert cbor.decode(cbor.encode(value)) == value


def attested_certificates() -> list[bytes]:
    return [
        attested.certificate({attested.DICE: attested.evidence()}),
        attested.evidence(),
    ]


def collaterals() -> list[bytes]:
    return [PLATFORM.collateral_json(NOW - 1), SimulatedPlatform(PLATFORM.seed, ca="processor").collateral_json(NOW)]


def check_der(data: bytes) -> None:
    """A certificate, a revocation list or a PCK's SGX extension is read, or the verifier's one error says why not."""
    with suppress(QuoteError):
        certificate = read_certificate(data)
        _ = common_name(certificate.subject)
        check_kind(certificate, "CA")
    with suppress(QuoteError):
        _ = revoked_serials(read_crl(data))
    with suppress(QuoteError):
        _ = read_pck_extension(data, ca="platform", tee="TDX")


def ders() -> list[bytes]:
    chain = PLATFORM.pck_chain()
    collateral = PLATFORM.collateral(NOW)
    return [*chain, collateral.root_ca_crl, collateral.pck_crl, read_certificate(chain[0]).extensions[SGX_EXTENSION]]


def check_statement(data: bytes) -> None:
    """TCB info or QE identity, already signed, is read as `strict_json` would, or the verifier's one error says why."""
    for read in (read_tcb_info, read_qe_identity):
        try:
            value = read(data)
        except QuoteError:
            continue
        assert value == read(stdlib_json.dumps(strict_json.decode(data, fractions=True)).encode())


def statements() -> list[bytes]:
    collateral = PLATFORM.collateral(NOW)
    return [collateral.tcb_info, collateral.qe_identity]


def check_policy(data: bytes) -> None:
    """A policy or a list of measurement profiles is read, or the verifier's one error says why not."""
    for read in (parse_policy_toml, parse_profiles_toml, parse_profiles_json):
        with suppress(QuoteError):
            _ = read(data)


def policies() -> list[bytes]:
    registers = {f"rtmr{number}": "00" * 48 for number in range(4)}
    profile = {"name": "p", "version": "1", "mrtd": "00" * 48, "boot_rtmrs": registers, "runtime_rtmrs": registers}
    toml = b'[tcb]\naccepted_statuses = ["UpToDate"]\nmin_evaluation_number = 5\nallow_smt = true\n'
    either = b"[[any_of]]\n[any_of.identity]\nppid = ['" + b"00" * 16 + b"']\n[[any_of]]\n[[any_of.all_of]]\n"
    return [PROFILE.to_toml().encode(), toml + PROFILE.to_toml().encode(), json.encode([profile]), either]


def check_reference_values(data: bytes) -> None:
    """Published reference values are profiles with all registers, or the verifier's one error says why not."""
    with suppress(QuoteError):
        found = parse_profile_file(data, read_yaml, extra_keys=frozenset({"rc", "authorized_hotkeys"}))
        assert found.profiles or found.not_served
        registers = [register for profile, _ in found.profiles for register in profile.measured]
        assert all(isinstance(register, bytes) and len(register) == 48 for register in registers)


def reference_values() -> list[bytes]:
    lists = [published.published(upper=upper) for upper in (True, False)]
    return [published.FLAT.encode(), published.BY_PLATFORM.encode(), *lists]


def check_policy_set(data: bytes) -> None:
    """A policy with exceptions is read, bound and put into words, or the verifier's one error says why not."""
    with suppress(QuoteError):
        policies = parse_policy_set(data)
        assert all(sentences for _, sentences in explain_set(policies))
        _ = policy_notes(policies, NOW)
        bound = policies.bind((PROFILE,))
        assert bound.hotkeys == set(policies.hotkeys)


def policy_sets() -> list[bytes]:
    exceptions = b'[per_profile.simulated.tcb]\nallow_smt = false\n[per_profile."simulated 1".identity]\nppid = ["'
    exceptions += b"00" * 16 + b'"]\n[per_hotkey.a.tcb]\nmin_tcb_date = 2025-01-01\n[[per_hotkey.b.any_of]]\n'
    return [exceptions, b"[tcb]\nplatform_grace = 5\naccepted_statuses = ['OutOfDate']\n" + exceptions]


def check_event_log(data: bytes) -> None:
    """An event log parses, and replays to its own registers, or the verifier's one error says why not."""
    with suppress(QuoteError):
        parsed = parse_event_log(data)
        assert first_difference(parsed, parsed) is None
        boot = replay(parsed, parsed.rtmrs)
        _ = (boot.secure_boot, boot.kernel_command_lines, boot.grub_commands, boot.boot_applications)
    with suppress(QuoteError):
        parsed = parse_event_log_json(data)
        _ = [(event.name, event.value) for event in replay(parsed, parsed.rtmrs).log.events]


def event_logs() -> list[bytes]:
    return [
        log(*EVENTS),
        log(*EVENTS, first=spec((0xC, 48), vendor=b"vendor"), padding=b""),
        log(grub("grub_cmd", b"")),
        stdlib_json.dumps(RUNTIME_EVENTS).encode(),
    ]


# --- the answers of collateral services ---


def check_collateral_answer(data: bytes) -> None:
    """A body, or a header, of a service is read, or its one error says why not; a statement is cut out of its body."""
    with suppress(UpstreamError):
        text, signature = pcs.read_statement(data, "tcbInfo")
        assert text in data
        assert len(signature) == 64
        assert stdlib_json.loads(text) == stdlib_json.loads(data)["tcbInfo"]
    with suppress(UpstreamError):
        assert pcs.read_crl(data)
    with suppress(UpstreamError):
        header = ("tcb-info-issuer-chain", data.decode("latin-1"))
        assert pcs.read_chain(HttpResponse(200, (header,)), "tcb-info-issuer-chain").isascii()
    with suppress(UpstreamError):
        pcs.check_status(HttpResponse(429, (("retry-after", data.decode("latin-1")),)), "x", NOW)


def collateral_answers() -> list[bytes]:
    service = CollateralService((PLATFORM,))
    paths = [f"/tdx/certification/v4/tcb?fmspc={PLATFORM.fmspc.hex()}", "/sgx/certification/v4/rootcacrl"]
    paths += ["/sgx/certification/v4/pckcrl?ca=platform", "/sgx/certification/v4/pckcrl?ca=platform&encoding=der"]
    answers = [service.answer(HttpRequest("GET", path), NOW) for path in paths]
    chain = (answers[0].header("tcb-info-issuer-chain") or "").encode("latin-1")
    return [*(answer.body for answer in answers), chain, b"120", b"Fri, 15 Jan 2027 08:00:30 GMT"]


# --- disks ---


def check_luks(data: bytes) -> None:
    """A header on a disk, or a JSON area whose checksums hold, is as it must be, or the one error says why not."""
    for head in (data, luks.both(data[: luks.AREA - 4096])):
        with suppress(HeaderRejected):
            header = check_header(head, luks.SIZE, "/dev/vdb")
            if header is not None:
                again = check_header(header.area, luks.SIZE, "/dev/vdb")
                assert again is not None
                assert again.whole
                assert (again.cipher, again.area) == ("aes-xts-plain64", header.area)


def luks_headers() -> list[bytes]:
    values = (luks.told(), luks.told(2), {**luks.told(), "keyslots": {"0": luks.slot(kdf=luks.ARGON2ID)}})
    areas = [stdlib_json.dumps(value, separators=(",", ":")).encode() for value in values]
    return [*areas, *(luks.both(area)[: 2 * luks.AREA] for area in areas)]


# --- the answer of a quote generation service ---


def check_qgs_answer(data: bytes) -> None:
    """A framed answer gives a quote that stands at its end, or the one error for a peer's bytes says why not."""
    with suppress(RemoteProtocolError):
        size = qgs.message_size(data[:4])
        quote = qgs.read_quote(data[4 : 4 + size])
        assert quote
        assert data[4 : 4 + size].endswith(quote)


def qgs_answers() -> list[bytes]:
    quote = PLATFORM.quote(bytes(64))
    return [qgs_answer(quote), qgs_answer(quote, key_id=bytes(16), minor=0), qgs_answer(b"", error=0x12001)]


# --- the HTTP connection ---


def exchange(pieces: Iterable[bytes]) -> tuple[list[HttpRequest], bytes]:
    """The requests of a connection that gets these bytes and then the end, and what it sends; it ends by itself."""
    arriving = chain(pieces, [b""] * 3)  # a socket at its end says so whenever it is asked
    connection = ServerConnection(0.0)
    requests: list[HttpRequest] = []
    answers = bytearray()
    while not connection.closed:
        if (request := connection.next_request(0.0)) is not None:
            if isinstance(request, MalformedRequest):
                answer = error_response(request.refusal, "r")
            else:
                requests.append(request)
                answer = HttpResponse(200, _JSON, b"{}")
            connection.send_response(answer, 0.0)
        sent = connection.data_to_send()
        if not sent and request is None:
            connection.receive_data(next(arriving), 0.0)
        answers += sent
    # "100 Continue" may be left out when the body has arrived already.
    return requests, bytes(answers).replace(b"HTTP/1.1 100 \r\n\r\n", b"")


def check_http(data: bytes) -> None:
    """However the bytes are cut, the connection sees the same requests, sends the same answers, and never raises.

    The narrow reader before h11 makes no difference.
    """
    whole = exchange([data] if data else [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h1, "take_plain", lambda *_: None)
        assert whole == exchange([data] if data else [])
    assert whole == exchange(data[i : i + 1] for i in range(len(data)))
    half = len(data) // 2
    assert whole == exchange(filter(None, [data[:half], data[half:]]))


def http_requests() -> list[bytes]:
    get = b"GET /servers/nonce HTTP/1.1\r\nHost: h\r\n\r\n"
    post = b"POST /servers/vm/luks HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    return [
        get,
        get + get.replace(b"\r\nHost", b"\r\nConnection: close\r\nHost") + get,
        post + b'Content-Length: 15\r\n\r\n{"volumes":["a"]}',
        post
        + b'Transfer-Encoding: chunked\r\n\r\n5;x=y\r\n{"vol\r\nA\r\numes":["a"\r\n2\r\n]}\r\n0\r\nT: 1\r\n\r\n'
        + get,
        post + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    ]


# --- JSON bodies ---

_BODIES = [endpoint for endpoint in endpoints.ENDPOINTS if endpoint.method == "POST"]
_PATH = {"vm_name": "vm", "server_id": "s", "server_name_or_id": "s"}


def check_request_body(data: bytes) -> None:
    """A body decodes to a message that encodes to the same message again, or it is a refusal with a text."""
    for endpoint in _BODIES:
        match = endpoints.Match(endpoint, {name: _PATH[name] for name in endpoint.parameters})
        try:
            message = codec.decode_request(match, HttpRequest("POST", endpoint.path, _JSON, data))
        except Refusal as exc:
            _ = str(exc)
        else:
            assert codec.decode_request(match, codec.encode_request(endpoint, message)) == message


def check_host_profile(data: bytes) -> None:
    """A host's profile is kept as it was said, under a fingerprint that no order of members changes; or refused."""
    match = endpoints.Match(REGISTER_HOST_PROFILE, {})
    try:
        message = codec.decode_request(match, HttpRequest("POST", match.endpoint.path, _JSON, data))
        assert isinstance(message, HostProfileRequest)
        kept = host_profiles._encoded(message.profile)
    except Refusal as exc:
        _ = str(exc)
    else:
        assert json.decode(kept[1].encode()) == message.profile
        assert host_profiles._encoded(dict(reversed([*message.profile.items()]))) == kept


def host_profile_bodies() -> list[bytes]:
    gpu = {"vendor": "10de", "device_id": "2335", "pci_class": "0302", "numa_node": 0}
    profile: dict[str, object] = {
        "gpus": [{**gpu, "bars": [{"index": 0, "size_mb": 16, "kind": "p64"}]}],
        "nvswitches": [],
        "ib_devices": [],
        "cpu": {"count": 128, "sockets": 2, "vendor": "GenuineIntel", "processor_id": None},
        "memory": {"guest_gb": 1128},
        "numa": {"node_count": 2},
        "qemu": {"qemu_version": "10.1.0"},
    }
    return [json.encode(profile), b'{"gpus":[1e3,-0.0,9007199254740993],"cpu":{}}']


def check_host_evidence(data: bytes) -> None:
    """A host's answer is evidence, or one error that repeats none of it."""
    with suppress(RemoteProtocolError):
        found = decode_evidence(HttpResponse(200, _JSON, data))
        _ = json.decode(found.gpus.encode())


def host_evidences() -> list[bytes]:
    return [
        b'{"tdx_quote":"QUJD","nvtrust_evidence":"[{\\"a\\":1}]"}',
        b'{"tdx_quote":"","nvtrust_evidence":"\\u007b\\u007d"}',
    ]


def check_answer_body(data: bytes) -> None:
    """A peer's answer becomes a message or one of our errors."""
    for endpoint in endpoints.ENDPOINTS:
        for status in (endpoint.status, 307, 403, 422, 503):
            try:
                _ = codec.decode_answer(endpoint, HttpResponse(status, _JSON, data))
            except ChutesError as exc:
                _ = str(exc)


def answer_in(pieces: Iterable[bytes]) -> HttpResponse | None:
    """Return the answer that a client reads from a server's bytes, after which they end, or None."""
    connection = ClientConnection("h")
    _ = connection.send_request(HttpRequest("GET", "/"))
    with suppress(RemoteProtocolError):
        for piece in chain(pieces, [b""]):
            response = connection.receive_data(piece)
            if response is not None:
                return response
    return None


def check_http_answer(data: bytes) -> None:
    """However the bytes are cut, the client takes the same answer, or its one error says why there is none."""
    assert answer_in([data] if data else []) == answer_in(data[i : i + 1] for i in range(len(data)))


def http_answers() -> list[bytes]:
    return [
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 2\r\nConnection: close\r\n\r\nbusy",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nTrailer: t\r\n\r\n",
        b"HTTP/1.0 307 Elsewhere\r\nLocation: /\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ]


def check_json(data: bytes) -> None:
    """A decoded value equals that of another parser, and is the same after it was encoded and decoded again."""
    try:
        value = json.decode(data)
    except json.JsonError as exc:
        _ = str(exc)
    else:
        assert stdlib_json.loads(data) == value
        assert json.decode(json.encode(value)) == value


def json_bodies() -> list[bytes]:
    values: list[object] = [
        {"quote": "AAAA", "vm_name": "vm", "miner_hotkey": "h"},
        {"volumes": ["a", "b"], "rekey": ["a"], "formatted": []},
        {"key": "k", "boot_token": "t", "nonce": "n", "expires_at": "2027-01-15T08:00:00Z", "passphrase": "p"},
        {"a": "p", "in_use": ["a"]},
        {"detail": "Not found", "code": "not_found", "request_id": "r"},
        {"detail": [{"type": "missing", "loc": ["body", "quote"], "msg": "Field required"}]},
        [None, True, 1.5, -1e10, "\u20ac\\u0000"],
    ]
    return [*(json.encode(value) for value in values), b"[1e999,-0.0,1E+2]"]


def check_target(data: bytes) -> None:
    """Any request line is routed to an operation, nowhere, or once to another path; its query decodes or is refused."""
    target = data.decode("latin-1")
    match endpoints.route("GET", target.partition("?")[0]):
        case endpoints.Redirect(path=path):
            assert not isinstance(endpoints.route("GET", path), endpoints.Redirect)
        case endpoints.Match() as match:
            try:
                _ = codec.decode_request(match, HttpRequest("GET", target))
            except Refusal as exc:
                _ = str(exc)
        case _:
            pass


def targets() -> list[bytes]:
    return [endpoint.path.format_map(_PATH).encode() + b"?hotkey=%C3%A9&x=1" for endpoint in endpoints.ENDPOINTS]


def check_agent_settings(data: bytes) -> None:
    """Settings are taken with all that follows from them, or the one error says why not."""
    try:
        settings = AgentSettings.from_toml(data)
    except ConfigurationError as exc:
        _ = str(exc)
    else:
        assert settings.servers
        assert settings.policy.servers == len(settings.servers)
        assert settings.root_disk is not None or settings.disks


def agent_settings() -> list[bytes]:
    who = f'servers = ["https://a.example:8443", "https://[::1]"]\nvm_name = "vm"\nhotkey = "{_HOTKEY}"\n'
    disks = '[volumes.storage]\ndevice = "/dev/vdb"\n[root]\ndevice = "/dev/vda"\nmapping = "r"\n'
    rest = '[retry]\nattempts = 3\nbase_seconds = 0.5\n[state]\non_disk = true\n[on_failure]\naction = "shell"\n'
    volume = 'servers = ["https://a"]\nsigner = "config-volume"\nconfig_volume.directory = "/v"\nroot.device = "/d"\n'
    return [f"{who}{disks}{rest}".encode(), volume.encode()]


def check_config_volume(data: bytes) -> None:
    """Four files, cut at empty lines, say who the VM is, or the one error says which of them does not."""
    names = ("hostname", "miner-ss58", "miner-seed", "miner-private-key")
    files: dict[str, bytes] = dict(zip(names, data.split(b"\n\n"), strict=False))
    try:
        who = vm_identity(AgentSettings.from_toml(agent_settings()[1]), files)
    except ConfigurationError as exc:
        assert str(exc).startswith("config volume: ")
    else:
        assert who.vm_name.encode() in files["hostname"]
        assert Hotkey.parse(who.hotkey.address) == who.hotkey
        assert who.secret is not None


def config_volumes() -> list[bytes]:
    wallet = stdlib_json.dumps({"ss58Address": _HOTKEY, "secretSeed": "0x" + "5e" * 32}).encode()
    return [b"vm-1\n\n%b\n\n%b\n" % (_HOTKEY.encode(), b"5e" * 32), b"vm.a_b\n\n" + wallet]


def check_hand_off(data: bytes) -> None:
    """The key hand-off of a run is read back byte for byte, or not at all."""
    try:
        left = Handoff.decode(data, _AGENT, boot_id="b", uptime=2.0)
    except ConfigurationError as exc:
        _ = str(exc)
    else:
        assert left.encode() == Secret(data)


def hand_offs() -> list[bytes]:
    identity = ClientIdentity(b"certificate", Secret(b"key"), bytes(32))
    nothing, opener = Secret(b""), Secret(b"70" * 32)
    grants = [BootGrant("h", "vm", nothing, opener), BootGrant("h", "vm", nothing, None, opener)]
    return [Handoff("https://a", 1.5, "b", grant, identity).encode().reveal() for grant in grants]


def check_gpu_evidence(data: bytes) -> None:
    """GPU evidence parses and verifies, as a list and as one report, or the verifier's one error says why not."""
    with suppress(GpuError):
        _ = verify_gpus(
            data,
            nonce=bytes(32),
            now=NOW,
            rims=Rims(),
            revocation=Revocation(),
            policy=GpuPolicy(measurements="unchecked", revocation="off"),
            roots=GPUS.roots,
        )
    with suppress(GpuError):
        report = parse_report(data)
        assert report.signed == data[: len(report.signed)]


def gpu_evidences() -> list[bytes]:
    return [GPUS.evidence_json(bytes(32)), *(one.report for one in GPUS.evidence(bytes(32)))]


def check_rim(data: bytes) -> None:
    """A RIM verifies, or the verifier's one error says why not; what is XML has one canonical form."""
    with suppress(GpuError):
        _ = authenticate_rim(data, roots=GPUS.roots)
    with suppress(GpuError):
        form = xml.canonical(xml.read(data), len(data))
        assert xml.canonical(xml.read(form), len(form)) == form


def rims() -> list[bytes]:
    return [*GPUS.rims(NOW), b'<a xmlns="u" xmlns:p="v" p:x="&lt;&#10;" y=\'"\'><p:b xmlns=""/>&amp;&#13;</a>']


def check_status(data: bytes) -> None:
    """An OCSP answer or a CRL is read, and looked up for a device, or the verifier's one error says why not."""
    with suppress(GpuError):
        device = authenticate(GPUS.evidence(bytes(32))[0], nonce=None, now=NOW, roots=GPUS.roots)
        known = Revocation.of([data])
        check_floor(device.chain, "device's", known)
        _ = check_chain_status(device.chain, "device's", known, now=NOW, grace=0, first=9, hold=False)


def statuses() -> list[bytes]:
    return [*GPUS.status(NOW), *GPUS.crls(NOW, "Simulated GH100 ICA")]


def check_mark(data: bytes) -> None:
    """A mark of a store: refused as a configuration error, or the very bytes that it would be written as."""
    with suppress(ConfigurationError):
        assert Mark.from_bytes(Mark.from_bytes(data).to_bytes()) == Mark.from_bytes(data)


def marks() -> list[bytes]:
    whole = Mark(7, 2, (Entry(1, 1_800_000_000, "0" * 32), Entry(9, 1_800_000_001, "f" * 32))).to_bytes()
    return [whole, Mark(1, 0).to_bytes(), whole[:-9], b"{}"]


def check_log(data: bytes) -> None:
    """Texts of an audit log have one form: each is refused as a log's error, or written as it was read."""
    with suppress(LogError):
        note = Note.parse(data)
        assert str(note).encode() == data
        assert Checkpoint.of(note).text == note.text
    with suppress(LogError):
        assert bundle(unbundle(data)) == data
    with suppress(LogError):
        assert str(Place.parse(data.decode("latin-1"))).encode("latin-1") == data
    with suppress(ConfigurationError):
        assert str(Verifier.parse(data.decode("latin-1"))).encode("latin-1") == data


def logs() -> list[bytes]:
    signer = Signer("keys.example/audit", Secret(bytes(32)))
    note = signer.sign(Checkpoint(signer.name, 3, bytes(32)).text)
    texts = (note, signer.verifier, Place(None, 1234067, 7), Place(0, 0))
    return [*(str(text).encode() for text in texts), bundle([b"", b"one entry"])]


def check_traceparent(data: bytes) -> None:
    """The header of any client: what goes into the log is a trace id as the W3C says, and one header alone names it."""
    value = data.decode("latin-1")
    header = ("traceparent", value)
    assert trace_of(HttpRequest("GET", "/", (header, header), b"", peer_address="", arrived=0.0)) is None
    found = trace_of(HttpRequest("GET", "/", (header,), b"", peer_address="", arrived=0.0))
    if found is not None:
        version, trace, parent, flags, *more = value.split("-")
        assert found == trace
        assert [len(part) for part in (version, trace, parent, flags)] == [2, 32, 16, 2]
        assert set(version + trace + parent + flags) <= set("0123456789abcdef")
        assert int(trace, 16)
        assert int(parent, 16)
        assert version != "ff"
        assert not (version == "00" and more)


def traceparents() -> list[bytes]:
    first = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    return [first, b"cc" + first[2:] + b"-what-the-future-will-be-like", b"01" + first[2:] + b"-"]


TARGETS = {
    "policy_set": Target(check_policy_set, policy_sets),
    "quote": Target(check_quote, quotes),
    "collateral": Target(check_collateral, collaterals),
    "platform-collaterals": Target(check_platform_collaterals, platform_collaterals),
    "attested-certificate": Target(check_attested_certificate, attested_certificates),
    "gpu-evidence": Target(check_gpu_evidence, gpu_evidences),
    "gpu-rim": Target(check_rim, rims),
    "gpu-status": Target(check_status, statuses),
    "der": Target(check_der, ders),
    "statement": Target(check_statement, statements),
    "policy": Target(check_policy, policies),
    "reference-values": Target(check_reference_values, reference_values),
    "event-log": Target(check_event_log, event_logs),
    "collateral-answer": Target(check_collateral_answer, collateral_answers),
    "luks-header": Target(check_luks, luks_headers),
    "qgs-answer": Target(check_qgs_answer, qgs_answers),
    "agent-settings": Target(check_agent_settings, agent_settings),
    "config-volume": Target(check_config_volume, config_volumes),
    "hand-off": Target(check_hand_off, hand_offs),
    "mark": Target(check_mark, marks),
    "audit-log": Target(check_log, logs),
    "http": Target(check_http, http_requests),
    "http-answer": Target(check_http_answer, http_answers),
    "json": Target(check_json, json_bodies),
    "request-body": Target(check_request_body, json_bodies),
    "answer-body": Target(check_answer_body, json_bodies),
    "host-profile": Target(check_host_profile, host_profile_bodies),
    "host-evidence": Target(check_host_evidence, host_evidences),
    "target": Target(check_target, targets),
    "traceparent": Target(check_traceparent, traceparents),
}
