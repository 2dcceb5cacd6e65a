"""Requests to services, and their answers: both spellings, every form, and whatever else comes."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.collateral import pcs
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.pcs import Upstream, ask, check_status, read_chain, read_crl, read_statement
from chutes_proto.effects import Get, Now
from chutes_proto.errors import ConfigurationError, UpstreamError
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing._playbook import Playbook
from chutes_proto.testing._service import CollateralService
from chutes_proto.wire.http import HttpRequest, HttpResponse

NOW = 1_800_000_000
PLATFORM = SimulatedPlatform(bytes(32))
FAMILY = Family(PLATFORM.fmspc, "platform", "TDX")
SERVICE = CollateralService((PLATFORM,))
COLLATERAL = PLATFORM.collateral(NOW)
UPSTREAM = Upstream.parse("https://pccs.example:8081")
API = "https://pccs.example:8081"


def answers() -> dict[str, HttpResponse]:
    """The honest answers, by URL."""
    urls = [UPSTREAM.tcb_info(FAMILY, "standard"), UPSTREAM.qe_identity(FAMILY, "standard")]
    urls += [UPSTREAM.pck_crl(FAMILY), UPSTREAM.root_ca_crl]
    return {url: SERVICE.answer(HttpRequest("GET", url.removeprefix(API)), NOW) for url in urls}


def test_the_requests_of_a_platform() -> None:
    assert list(answers()) == [
        f"{API}/tdx/certification/v4/tcb?fmspc={PLATFORM.fmspc.hex()}",
        f"{API}/tdx/certification/v4/qe/identity",
        f"{API}/sgx/certification/v4/pckcrl?ca=platform&encoding=der",
        f"{API}/sgx/certification/v4/rootcacrl",
    ]
    sgx = Family(bytes(6), "processor", "SGX")
    assert UPSTREAM.tcb_info(sgx, "early") == f"{API}/sgx/certification/v4/tcb?fmspc=000000000000&update=early"
    assert UPSTREAM.qe_identity(sgx, "early") == f"{API}/sgx/certification/v4/qe/identity?update=early"
    assert UPSTREAM.pck_crl(sgx).endswith("?ca=processor&encoding=der")


def test_four_answers_are_collateral() -> None:
    found = Playbook(*((Get(url), answer) for url, answer in answers().items()), aside={Now: lambda _: NOW}).run(
        ask(UPSTREAM, FAMILY, "standard")
    )
    assert found == COLLATERAL
    assert verify_collateral(found, now=NOW, root=PLATFORM.root).fmspc == PLATFORM.fmspc


def test_who_does_not_know_the_platform_is_asked_no_more() -> None:
    with pytest.raises(UpstreamError, match="TCB info: status 404") as caught:
        _ = Playbook((Get(next(iter(answers()))), HttpResponse(404)), aside={Now: lambda _: NOW}).run(
            ask(UPSTREAM, FAMILY, "standard")
        )
    assert (caught.value.unknown, caught.value.retry_after) == (True, None)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://h", "https://h"),
        ("https://h:8081/", "https://h:8081"),
        ("https://h/sgx/certification/v4/", "https://h"),
        ("https://h/a/b/tdx/certification/v4", "https://h/a/b"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("http://[::1]:1", "http://[::1]:1"),
        ("http://localhost", "http://localhost"),
    ],
)
def test_the_url_of_a_service(url: str, base: str) -> None:
    assert Upstream.parse(url) == Upstream(base, f"{base}/sgx/certification/v4/rootcacrl")
    assert Upstream.parse(url, "https://crl/IntelSGXRootCA.der").root_ca_crl == "https://crl/IntelSGXRootCA.der"


def test_intel_has_the_crl_of_its_root_elsewhere() -> None:
    assert Upstream.parse(f"{pcs.INTEL_PCS}/sgx/certification/v4") == Upstream(pcs.INTEL_PCS, pcs.INTEL_ROOT_CA_CRL)


@pytest.mark.parametrize(
    "url",
    [
        "", "h", "//h", "https://", "ftp://localhost", "http://h", "http://10.0.0.1", "http://127.0.0.1.example",
        "https://h:99999", "https://h?x=1", "https://h#x", "https://user:secret@h", "https://h/a b", "https://h/\n",
        "https://h/%2e", "https://\u0131ntel", "https://[::1", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_service(url: str) -> None:
    for arguments in ((url,), ("https://h", url)):
        with pytest.raises(ConfigurationError) as caught:
            _ = Upstream.parse(*arguments)
        assert "secret" not in str(caught.value)


@given(st.text())
def test_any_text_as_a_url(url: str) -> None:
    try:
        upstream = Upstream.parse(url)
    except ConfigurationError:
        return
    assert upstream.url.startswith(("https://", "http://"))


# --- CRLs ---


def pem(der: bytes, width: int = 64, end: str = "\n") -> bytes:
    import base64

    text = base64.b64encode(der).decode()
    lines = [text[i : i + width] for i in range(0, len(text), width)]
    return end.join(["-----BEGIN X509 CRL-----", *lines, "-----END X509 CRL-----", ""]).encode()


@pytest.mark.parametrize(
    "form",
    [
        lambda der: der,
        lambda der: der.hex().encode(),
        lambda der: der.hex().upper().encode() + b"\r\n",
        pem,
        lambda der: pem(der, 76, "\r\n"),
    ],
    ids=["DER", "hex", "HEX", "PEM", "PEM of CRLF"],
)
def test_a_crl_in_every_form(form: Any) -> None:
    for der in (COLLATERAL.pck_crl, COLLATERAL.root_ca_crl):
        assert read_crl(form(der)) == der


@pytest.mark.parametrize(
    "body",
    [b"", b"308", b"<html>", b"{}", pem(b"x")[:-30], pem(b""), b'"3082"', pem(b"x").replace(b"eA", b"e=A"), b"\xff"],
)
def test_what_is_no_crl(body: bytes) -> None:
    with pytest.raises(UpstreamError):
        _ = read_crl(body)


# --- statements ---


def test_the_text_is_cut_out_as_it_was_signed() -> None:
    text = b'{ "b" : [1, {"c": "}\\"{"}] ,\t"a":{}, "\\u00e9":"\xc3\xa9" }'
    signature = bytes(range(64))
    quoted = b'"%s"' % signature.hex().encode()
    for body in (
        b'{"tcbInfo":' + text + b',"signature":' + quoted + b"}",
        b' {\n"signature" :' + quoted + b' , "tcbInfo"\r\n: ' + text + b"}\n",
        b'{"more":{"tcbInfo":{"x":1}},"tcb\\u0049nfo":' + text + b',"signature":' + quoted.upper() + b"}",
    ):
        assert read_statement(body, "tcbInfo") == (text, signature)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"tcbInfo":{}}',
        b'{"tcbInfo":[],"signature":"%s"}' % (b"0" * 128),
        b'{"tcbInfo":{},"signature":"%s"}' % (b"0" * 126),
        b'{"tcbInfo":{},"signature":"%s"}' % (b" " * 128),
        b'{"tcbInfo":{},"signature":1}',
        b'{"tcbInfo":{},"tcbInfo":{},"signature":"%s"}' % (b"0" * 128),
        b'{"tcbInfo":{"a":1e999},"signature":"%s"}' % (b"0" * 128),
        b'{"tcbInfo":' + b'{"a":' * 30 + b"1" + b"}" * 30 + b',"signature":"%s"}' % (b"0" * 128),
        b'\xef\xbb\xbf{"tcbInfo":{},"signature":"%s"}' % (b"0" * 128),
        b" " * 1_100_000,
    ],
)
def test_what_is_no_statement(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="tcbInfo"):
        _ = read_statement(body, "tcbInfo")


# --- chains ---

CHAIN = COLLATERAL.tcb_info_issuer_chain
NAME = "tcb-info-issuer-chain"


@pytest.mark.parametrize("name", [NAME, f"sgx-{NAME}"])
@pytest.mark.parametrize("safe", ["", "-+/= "])
def test_a_chain_under_both_names(name: str, safe: str) -> None:
    assert read_chain(HttpResponse(200, ((name, quote(CHAIN, safe=safe)),)), NAME) == CHAIN
    twice = ((NAME, quote(CHAIN)), (f"sgx-{NAME}", quote(CHAIN)))
    assert read_chain(HttpResponse(200, twice), NAME) == CHAIN


@pytest.mark.parametrize(
    "values", [(), ("",), ("%",), ("%4",), ("%zz",), ("%ff",), ("a\x7f",), ("a", "b"), ("a\u20ac",)]
)
def test_what_is_no_chain(values: tuple[str, ...]) -> None:
    with pytest.raises(UpstreamError, match=NAME):
        _ = read_chain(HttpResponse(200, tuple((NAME, value) for value in values)), NAME)


# --- statuses ---


@pytest.mark.parametrize(
    ("status", "header", "unknown", "retry_after"),
    [
        (404, None, True, None),
        (400, None, False, None),
        (301, None, False, None),
        (206, None, False, None),
        (429, "7", False, 7),
        (429, "Fri, 15 Jan 2027 08:00:30 GMT", False, 30),
        (429, "Fri, 15 Jan 2027 07:00:30 GMT", False, 0),
        (503, "999999999", False, pcs.MAX_RETRY_AFTER),
        (503, "-5", False, 0),
        (503, "soon", False, 0),
        (503, "Fri, 15 Jan 2027 08:00:30 +99999999999999999999", False, 0),
        (503, None, False, 0),
        (500, "7", False, 0),
        (460, None, False, None),
    ],
)
def test_statuses(status: int, header: str | None, unknown: bool, retry_after: int | None) -> None:
    headers = () if header is None else (("retry-after", header),)
    with pytest.raises(UpstreamError, match=f"x: status {status}") as caught:
        check_status(HttpResponse(status, headers), "x", NOW, says_unknown=True)
    assert (caught.value.unknown, caught.value.retry_after) == (unknown, retry_after)
    with pytest.raises(UpstreamError) as caught:
        check_status(HttpResponse(404), "x", NOW)
    assert not caught.value.unknown


@given(st.text())
def test_any_retry_after(text: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        check_status(HttpResponse(429, (("retry-after", text),)), "x", NOW)
    assert 0 <= (caught.value.retry_after or 0) <= pcs.MAX_RETRY_AFTER


# --- the simulated service ---


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/tdx/certification/v4/tcb", 404),
        ("/tdx/certification/v4/tcb?fmspc=000000000000", 404),
        ("/sgx/certification/v4/tcb?fmspc=000000000000", 404),
        ("/sgx/certification/v4/pckcrl", 400),
        ("/sgx/certification/v4/pckcrl?ca=platform", 200),
        ("/IntelSGXRootCA.der", 200),
        ("/", 404),
    ],
)
def test_the_service(target: str, status: int) -> None:
    assert SERVICE.answer(HttpRequest("GET", target), NOW).status == status
    assert SERVICE.answer(HttpRequest("POST", target), NOW).status == 405


def test_the_forms_of_the_services_crls() -> None:
    targets = ["/sgx/certification/v4/pckcrl?ca=platform", "/sgx/certification/v4/pckcrl?ca=platform&encoding=der"]
    assert {read_crl(SERVICE.answer(HttpRequest("GET", target), NOW).body) for target in targets} == {
        COLLATERAL.pck_crl
    }
    targets = ["/sgx/certification/v4/rootcacrl", "/IntelSGXRootCA.der"]
    assert {read_crl(SERVICE.answer(HttpRequest("GET", target), NOW).body) for target in targets} == {
        COLLATERAL.root_ca_crl
    }
