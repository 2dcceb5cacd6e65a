"""Collateral for a quote in one call, on the three doors, over real HTTP."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import chutes_proto.sync
import chutes_proto_asyncio
import chutes_proto_trio
from chutes_proto.collateral.pcs import Upstream as Service
from chutes_proto.collateral.pcs import ask_pck_chain
from chutes_proto.effects import Get, Now
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, UpstreamError
from chutes_proto.io.collateral.simulated import CollateralServer
from chutes_proto.quote import Collateral, VerificationError, parse_quote, verify_genuine
from chutes_proto.testing._pki import pem
from chutes_proto.testing._playbook import Playbook
from chutes_proto.testing._service import CollateralService
from chutes_proto.wire.http import HttpResponse
from tests.collateral.network import PLATFORM, ROOT, Upstream, running
from tests.io.peers import make_credentials, peer, read_request
from tests.loops import on_loop
from tests.quote.platform_files import encrypted_ppid
from tests.quote.simulated import with_certification

QUOTE = PLATFORM.quote(bytes(64))
PCK = pem(PLATFORM.pck_chain()[:1]).encode()


def _named(platform: Any = PLATFORM) -> bytes:
    from chutes_proto.testing._statements import PCE_SVN, SGX_COMPONENTS

    tcb = bytes(SGX_COMPONENTS) + PCE_SVN.to_bytes(2, "little") + bytes(2)
    return with_certification(PLATFORM.quote(bytes(64)), 3, encrypted_ppid(platform) + tcb)


DOORS: dict[str, Callable[..., Collateral]] = {
    "sync": chutes_proto.sync.fetch_collateral,
    "trio": lambda *args, **options: on_loop("trio", lambda: chutes_proto_trio.fetch_collateral(*args, **options)),
    "asyncio": lambda *args, **options: on_loop(
        "asyncio", lambda: chutes_proto_asyncio.fetch_collateral(*args, **options)
    ),
}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with running(Upstream()) as upstream:
        yield upstream


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "quote", [QUOTE, _named(), with_certification(QUOTE, 4, PCK)], ids=["type 5", "type 3", "type 4"]
)
def test_it_verifies_the_quote(door: str, quote: bytes, upstream: Upstream) -> None:
    collateral = DOORS[door](quote, [upstream.url], root=ROOT)
    now = int(time.time()) + 1
    verdict = verify_genuine(quote, collateral, now=now, report_data=bytes(64), root=ROOT)
    assert (verdict.tcb_status, verdict.pck.ppid) == ("UpToDate", PLATFORM.ppid)
    assert (collateral.pck_certificate_chain is None) == (quote is QUOTE)


@pytest.mark.parametrize("door", DOORS)
def test_over_tls_with_a_ca_of_the_callers(door: str, tmp_path: Path) -> None:
    import threading

    with CollateralServer(("127.0.0.1", 0), CollateralService((PLATFORM,))) as server:
        ca = server.use_tls(tmp_path, int(time.time()))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert DOORS[door](QUOTE, [server.url], root=ROOT, ca_file=ca).root_ca_crl
        with pytest.raises(CollateralUnavailable, match="certificate"):
            _ = DOORS[door](QUOTE, [server.url], root=ROOT)
        server.shutdown()


@pytest.mark.parametrize("door", ["trio", "asyncio"])
def test_a_service_that_sends_interim_answers_without_an_end_does_not_keep_a_loop(door: str, tmp_path: Path) -> None:
    """Each costs a loop some 50 us; a service with 10 Mbit/s could have all of its time."""
    credentials = make_credentials(tmp_path)
    ca = tmp_path / "ca.pem"
    _ = ca.write_bytes(credentials.ca_pem)

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        while True:
            stream.sendall(b"HTTP/1.1 100 \r\n\r\n" * 1000)

    with peer(credentials, behave) as (url, _), pytest.raises(CollateralUnavailable, match="more bytes than an answer"):
        _ = DOORS[door](QUOTE, [url], root=ROOT, ca_file=ca)


@pytest.mark.parametrize("door", DOORS)
def test_a_tcb_evaluation_data_number_may_be_asked_for(door: str, upstream: Upstream) -> None:
    _ = DOORS[door](QUOTE, [upstream.url], root=ROOT, update=20)
    wanted = [target for target in upstream.asked if "tcbEvaluationDataNumber=20" in target]
    assert [target.partition("?")[0].rpartition("/")[2] for target in wanted] == ["tcb", "identity"]
    with pytest.raises(CollateralUnavailable, match="its TCB evaluation data number is 20, not 17"):
        _ = DOORS[door](QUOTE, [upstream.url], root=ROOT, update=17)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("update", ["late", "", True, 0, -1, 17.0, None])
def test_another_update_is_refused(door: str, update: Any, upstream: Upstream) -> None:
    with pytest.raises(ConfigurationError, match=r"^update: must be"):
        _ = DOORS[door](QUOTE, [upstream.url], root=ROOT, update=update)
    assert upstream.asked == []


@pytest.mark.parametrize("door", DOORS)
def test_only_a_genuine_quote_causes_requests_but_for_a_missing_chain(door: str, upstream: Upstream) -> None:
    wrong = PLATFORM.having("quote_signature").quote(bytes(64))
    with pytest.raises(VerificationError, match="did not sign"):
        _ = DOORS[door](wrong, [upstream.url], root=ROOT)
    assert upstream.asked == []
    for kind, data in ((3, parse_quote(_named()).certification), (4, PCK)):
        with pytest.raises(VerificationError, match="did not sign"):
            _ = DOORS[door](with_certification(wrong, kind, data), [upstream.url], root=ROOT)
        (first,) = upstream.asked  # nothing can be verified without the chain
        assert "/pckc" in first
        upstream.asked.clear()
    with pytest.raises(ConfigurationError, match="use https"):
        _ = DOORS[door](QUOTE, ["http://pccs.example"], root=ROOT)
    with pytest.raises(ConfigurationError, match=r"a list of URLs, as in \['https://pccs\.example'\]"):
        _ = DOORS[door](QUOTE, "https://pccs.example", root=ROOT)
    for services in (None, 5, [5], [b"https://pccs.example"]):
        with pytest.raises(TypeError, match=r"^services: must be a list of URLs, each a str$"):
            _ = DOORS[door](QUOTE, services, root=ROOT)


def test_a_chain_that_is_not_text_is_refused() -> None:
    asked = ask_pck_chain(Service.parse("https://pccs.example"), parse_quote(_named()))
    with pytest.raises(UpstreamError, match="PCK certificate: the answer is not PEM"):
        Playbook((Get, HttpResponse(200, (), PCK + b"\xff")), aside={Now: lambda _: 0}).run(asked)


@pytest.mark.parametrize("door", DOORS)
def test_every_service_says_why_it_has_none(door: str, upstream: Upstream) -> None:
    stranger = PLATFORM.another(9)
    with pytest.raises(CollateralUnavailable, match="TCB info: status 404"):
        _ = DOORS[door](stranger.quote(bytes(64)), [upstream.url], root=ROOT)
    with pytest.raises(CollateralUnavailable, match=r"no PCK chain of the quote: .*PCK certificate: status 404"):
        _ = DOORS[door](_named(stranger), [upstream.url], root=ROOT)
