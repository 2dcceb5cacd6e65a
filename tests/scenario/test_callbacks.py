"""Registrations whose host is asked, over real sockets on both sides: one that is what it says, and hosts that lie."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from itertools import repeat
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from attrs import define, evolve, field
from cryptography.x509 import load_pem_x509_certificates

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.signing import purpose_message
from chutes_proto.effects import Effect, FetchEvidence, Resolve
from chutes_proto.errors import BadRequest, Refusal
from chutes_proto.gpu import GpuCollateral, Revocation, Rims, verify_rim
from chutes_proto.secret import Secret
from chutes_proto.server import _callbacks as callbacks
from chutes_proto.server._app import App
from chutes_proto.server._gpu_evidence import GpuAppraisal
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._service import Callback
from chutes_proto.store._rows import AttestationRow, AuditRow, GpuDeviceRow, ServerRow
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire import json
from chutes_proto.wire.codec import encode_quote
from tests.io.peers import Behaviour, Credentials, answering, make_credentials, peer, read_request
from tests.loops import on_loop
from tests.scenario.operations import LOOPS, Site, open_store
from tests.scenario.test_miner import client
from tests.server.world import GPU, PLATFORM, ScanAll, service
from tests.slow_peer import drip

pytestmark = pytest.mark.anyio

NAME = "host.example"
EIGHT = SimulatedGpus(b"the GPUs of a host that is asked", count=8)
VALIDATOR = HotkeyPair.from_secret(Secret(b"the key server's own hotkey".ljust(32, b"!")))
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return make_credentials(tmp_path_factory.mktemp("host"))


@define
class Asking(Site):
    """A key server whose resolver is the test's: the first answer is the host's address, each later one another's."""

    asked: list[Effect[Any]] = field(factory=list)
    answers: Iterator[tuple[str, ...]] = field(factory=lambda: iter([("127.0.0.1",), ("127.0.0.2",)]))

    def performer(self) -> Any:
        performer = super().performer()
        perform = performer.perform

        async def watched(effect: Effect[Any]) -> Any:
            if isinstance(effect, Resolve | FetchEvidence):
                self.asked.append(effect)
            return next(self.answers) if isinstance(effect, Resolve) else await perform(effect)

        performer.perform = watched
        return performer


def evidence(nonce: bytes, digest: bytes, **members: Any) -> bytes:
    quote = PLATFORM.quote(report_data(nonce, digest), stage="runtime")
    return json.encode({"tdx_quote": encode_quote(quote), "nvtrust_evidence": "[]"} | members)


def nonce_in(head: bytes) -> bytes:
    found = re.match(rb"GET /server/attest\?nonce=([0-9a-f]{64}) HTTP/1.1\r\n", head)
    assert found
    return bytes.fromhex(found[1].decode())


def showing(make: Callable[[bytes], bytes]) -> Behaviour:
    """A host that answers with what ``make`` makes of the nonce."""

    def behave(stream: ssl.SSLSocket) -> None:
        body = make(nonce_in(read_request(stream)))
        stream.sendall(HEAD % len(body) + body)

    return behave


def register(
    loop: str,
    directory: Path,
    credentials: Credentials,
    behaviour: Behaviour,
    *,
    count: int = 1,
    gpus: Callable[[], GpuCollateral] | None = None,
    **options: Any,
) -> Asking:
    """Register a server with ``count`` GPUs whose host behaves like that. Raises what the miner is told.

    ``gpus`` returns the RIMs and OCSP answers of the key server, ``options`` are of its policy.
    """
    declared = [evolve(GPU, uuid=f"GPU-{number}") for number in range(count)]
    with peer(credentials, behaviour) as (url, _):
        port = urlsplit(url).port
        assert port is not None
        policy = {"callback": Callback(VALIDATOR.hotkey, VALIDATOR.sign, port), "registration_evidence": "callback"}
        networks = (ip_network("127.0.0.0/8"),)
        app = App(service(**policy, **options, unsafe_networks=networks))
        site = Asking(LOOPS[loop], open_store(directory), app, gpus=gpus)
        failed: list[Refusal] = []

        async def main() -> None:
            async with site.serving(), client(site, loop) as miner:
                try:
                    await miner.register("n1", host=NAME, gpus=declared, name="vm-1")
                except Refusal as exc:
                    failed.append(exc)

        on_loop(loop, main)
    for exc in failed:
        assert site.store.transact(ScanAll(ServerRow)) == ()
        assert site.store.transact(ScanAll(AttestationRow)) == ()
        raise exc
    return site


def test_a_host_that_is_what_it_says(loop: str, tmp_path: Path, credentials: Credentials) -> None:
    leaf, *_ = load_pem_x509_certificates(credentials.chain.read_bytes())
    heads: list[bytes] = []

    def behave(stream: ssl.SSLSocket) -> None:
        heads.append(read_request(stream))
        body = evidence(nonce_in(heads[-1]), spki_sha256(leaf))
        stream.sendall(HEAD % len(body) + body)

    site = register(loop, tmp_path, credentials, behave)
    (head,) = heads
    headers = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:] if line)
    assert headers["host"].startswith(f"{NAME}:")
    signature = re.search(rb"(?i)x-chutes-signature: ([0-9a-f]{128})", head)
    assert signature
    message = purpose_message(VALIDATOR.hotkey, headers["x-chutes-nonce"], "attest")
    VALIDATOR.hotkey.check_signature(message, bytes.fromhex(signature[1].decode()))
    resolved, fetched = site.asked  # the name once; then the address that it had, whatever the name is by now
    assert resolved == Resolve(NAME)
    assert isinstance(fetched, FetchEvidence)
    assert (fetched.address, fetched.host) == ("127.0.0.1", NAME)
    (row,) = site.store.transact(ScanAll(ServerRow))
    assert (row.address, row.host) == ("127.0.0.1", NAME)
    (audit,) = site.store.transact(ScanAll(AuditRow))
    assert "GPU evidence NOT verified" in audit.reason


def test_eight_gpus_are_verified_at_a_registration(loop: str, tmp_path: Path, credentials: Credentials) -> None:
    """Their evidence is over the nonce of the question; the next registration shows that of another one."""
    leaf, *_ = load_pem_x509_certificates(credentials.chain.read_bytes())
    now = int(time.time())
    rims = Rims.of(verify_rim(data, now=now, roots=EIGHT.roots) for data in EIGHT.rims(now))
    collateral = GpuCollateral(rims, Revocation.of(EIGHT.status(now)))
    served = {PROFILE.identity: ServedProfile(PROFILE, None, False, False, gpu_evidence="require")}
    options: dict[str, Any] = {"profiles": served, "gpu_appraisal": GpuAppraisal(roots=EIGHT.roots)}
    options |= {"count": 8, "gpus": lambda: collateral}

    def honest(nonce: bytes) -> bytes:
        return evidence(nonce, spki_sha256(leaf), nvtrust_evidence=EIGHT.evidence_json(nonce).decode())

    site = register(loop, tmp_path, credentials, showing(honest), **options)
    (audit,) = site.store.transact(ScanAll(AuditRow))
    assert "GPU evidence verified: 8 devices" in audit.reason
    assert len(site.store.transact(ScanAll(GpuDeviceRow))) == 8

    def replayed(nonce: bytes) -> bytes:
        return evidence(nonce, spki_sha256(leaf), nvtrust_evidence=EIGHT.evidence_json(bytes(32)).decode())

    (tmp_path / "second").mkdir()
    with pytest.raises(Refusal, match="nonce_mismatch"):
        _ = register(loop, tmp_path / "second", credentials, showing(replayed), **options)


def redirects(stream: ssl.SSLSocket) -> None:
    port = stream.getsockname()[1]
    answer = f"HTTP/1.1 307 x\r\nlocation: https://127.0.0.1:{port}/\r\ncontent-length: 0\r\n\r\n"
    answering(answer.encode())(stream)


def drips(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    stream.sendall(HEAD % 1000)
    drip(stream.sendall, repeat(b" "), 0.05)


def drips_its_head(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    drip(stream.sendall, repeat(b"HTTP/1.1 100 Continue\r\n\r\n"), 0.05)


def sends_100_megabytes(stream: ssl.SSLSocket) -> None:
    _ = read_request(stream)
    stream.sendall(HEAD % 100_000_000)
    for _ in range(1526):
        stream.sendall(bytes(65536))


NETWORK = {
    "redirect": (redirects, "answers 307"),
    "drip": (drips, "within 1 s"),
    "endless head": (drips_its_head, "within 1 s"),
    "100 MB": (sends_100_megabytes, "more than"),
    "no HTTP": (answering(b"SSH-2.0\r\n\r\n"), ""),
    "hangs up": (lambda stream: None, ""),
    "no JSON": (answering(HEAD % 2 + b"{]"), "not JSON"),
    "no evidence": (answering(HEAD % 2 + b"{}"), "lacks"),
}


@pytest.mark.parametrize("name", list(NETWORK))
def test_faults_of_the_network_are_told_alike(
    name: str,
    loop: str,
    tmp_path: Path,
    credentials: Credentials,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    behaviour, told = NETWORK[name]
    monkeypatch.setattr(callbacks, "SECONDS", 1.0)
    sites: list[Asking] = []
    serving = Asking.serving

    def watched(site: Asking) -> Any:
        sites.append(site)
        return serving(site)

    monkeypatch.setattr(Asking, "serving", watched)
    with pytest.raises(BadRequest) as caught:
        _ = register(loop, tmp_path, credentials, behaviour)
    assert (caught.value.code, caught.value.detail) == (
        "evidence_unavailable",
        "Server registration failed - Failed to get evidence for attestation.",
    )
    (line,) = [record.fields for record in sites[0].log if record.event == "refused"]
    assert told in str(line["reason"])
    assert NAME in str(line["reason"])
    assert len(sites[0].asked) == 2  # nothing is asked again


@pytest.mark.parametrize("lie", ["nonce", "key", "quote"])
def test_a_quote_of_somebody_else(loop: str, tmp_path: Path, credentials: Credentials, lie: str) -> None:
    leaf, *_ = load_pem_x509_certificates(credentials.chain.read_bytes())
    digest = spki_sha256(leaf)
    lies = {
        "nonce": (lambda nonce: evidence(bytes(32), digest), "nonce_mismatch"),
        "key": (lambda nonce: evidence(nonce, bytes(32)), "certificate_mismatch"),
        "quote": (lambda nonce: evidence(nonce, digest, tdx_quote="AAAA"), "quote_malformed"),
    }
    make, word = lies[lie]
    with pytest.raises(Refusal) as caught:
        _ = register(loop, tmp_path, credentials, showing(make))
    assert caught.value.code == word
