"""A quote parses, or `QuoteFormatError` says why not, whatever the bytes."""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from struct import pack, unpack_from

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote._attributes import XFAM_KNOWN
from chutes_proto.quote._errors import QuoteFormatError
from chutes_proto.quote._layout import TdAttributes, TdReport10, TdReport15, TdReport15Ex, Xfam, parse_quote
from chutes_proto.quote._plain import quote_fields
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import SimulatedPlatform
from tests.quote.simulated import PLATFORM, REPORT_DATA, TD15, with_certification

V4 = PLATFORM.quote(REPORT_DATA)
V5 = TD15.quote(REPORT_DATA)
AUTH_V4 = 48 + 584


def _put(data: bytes, offset: int, value: bytes) -> bytes:
    return data[:offset] + value + data[offset + len(value) :]


def test_version_4() -> None:
    quote = parse_quote(V4)
    assert (quote.version, quote.tee, quote.trailing) == (4, "TDX", 0)
    assert quote.body.report_data == REPORT_DATA
    assert quote.signed == V4[:AUTH_V4]
    assert quote.certification.startswith(b"-----BEGIN CERTIFICATE-----")
    assert quote.qe_id == quote.header.user_data[:16]


@pytest.mark.parametrize("kind", [3, 5])
def test_a_quote_without_a_chain_that_can_be_read_is_shown_without_a_platform(kind: int) -> None:
    assert quote_fields(parse_quote(V4))["pck"]
    assert quote_fields(parse_quote(with_certification(V4, kind, b"no PEM")))["pck"] is None


def test_version_5_has_the_present_tcb_and_the_service_td() -> None:
    quote = parse_quote(V5)
    assert quote.version == 5
    assert isinstance(quote.body, TdReport15)
    assert (len(quote.body.tee_tcb_svn_2), len(quote.body.mr_service_td)) == (16, 48)
    assert quote.signed == V5[: 48 + 6 + 648]


def test_an_extended_report_of_tdx_1_5() -> None:
    extended = bytes(range(237))
    changed = Fault(
        name="extended",
        side="quote",
        what="bytes of other values",
        quote=lambda draft: attrs.evolve(draft, body=attrs.evolve(draft.body, extended=extended)),
    )
    quote = parse_quote(SimulatedPlatform(PLATFORM.seed, form="v5-td15ex").having(changed).quote(REPORT_DATA))
    body = quote.body
    assert isinstance(body, TdReport15Ex)
    assert len(quote.signed) == 48 + 6 + 885
    assert (body.report_data, body.mr_service_td, body.vm_id) == (REPORT_DATA, bytes(48), 0)
    assert (body.td_id, body.dev_info) == (extended[1:33], extended[33:81])
    assert (body.init_servtd_hash, body.init_servtd_attributes) == (extended[81:129], 0x8887868584838281)
    assert (body.init_cpu_svn, body.init_tee_tcb_svn) == (extended[137:153], extended[153:169])
    assert (body.init_tee_fmspc, body.current_servtd_hash) == (extended[169:181], extended[181:229])
    assert body.current_servtd_attributes == 0xECEBEAE9E8E7E6E5


def test_attributes_have_names() -> None:
    body = parse_quote(V4).body
    assert isinstance(body, TdReport10)
    assert TdAttributes(body.td_attributes) == TdAttributes.SEPT_VE_DISABLE
    assert [flag.name for flag in Xfam(0b10_0000_0011)] == ["X87", "SSE", "PKRU"]
    assert XFAM_KNOWN & ~sum(Xfam) == 0


@pytest.mark.parametrize("padding", [1, 70, 3000])
def test_bytes_after_the_quote_are_ignored(padding: int) -> None:
    quote = parse_quote(V4 + b"\x5a" * padding)
    assert quote.trailing == padding
    assert quote.signed == V4[:AUTH_V4]


@pytest.mark.parametrize(
    ("data", "code", "got"),
    [
        (b"", "quote_too_short", 0),
        (V4[:631], "quote_too_short", 631),
        (b"\x06" * 631, "quote_too_short", 631),
        (V4[:632], "quote_structure", None),
        (_put(V4, 0, pack("<H", 6)), "quote_version", 6),
        (_put(V4, 0, pack("<H", 3)), "quote_version", 3),
        (_put(_put(V4, 0, pack("<H", 9)), 4, bytes(4)), "quote_version", 9),
        (_put(V4, 4, bytes(4)), "quote_tee_type", 0),
        (_put(V4, 4, pack("<I", 0x8100)), "quote_tee_type", 0x8100),
        (_put(V4, 2, pack("<H", 3)), "quote_key_type", 3),
        (_put(V5, 48, pack("<H", 1)), "quote_structure", None),
        (_put(V5, 48, pack("<HI", 3, 649)), "quote_structure", None),
        (_put(V5, 48, pack("<HI", 4, 885)), "quote_structure", None),
        (_put(V4, AUTH_V4, b"\xff" * 4), "quote_structure", None),
        (_put(V4, AUTH_V4 + 4 + 128, pack("<H", 5)), "quote_structure", None),
        (_put(V4, AUTH_V4 + 4 + 128 + 6 + 448, pack("<H", 4097)), "quote_structure", None),
        (V4[:-1], "quote_structure", None),
    ],
)
def test_what_is_no_quote_has_a_code_and_the_number(data: bytes, code: str, got: int | None) -> None:
    with pytest.raises(QuoteFormatError) as caught:
        _ = parse_quote(data)
    assert (caught.value.code, caught.value.got) == (code, got)
    assert (caught.value.expected is None) == (got is None)


def test_the_refusal_of_an_sgx_quote_says_how_it_is_read() -> None:
    with pytest.raises(QuoteFormatError, match=r"of SGX.*sgx=True"):
        _ = parse_quote(pack("<HHI", 3, 2, 0) + bytes(1000))


@pytest.mark.parametrize("text", [V4.hex(), V4.hex().upper(), f"0x{V4.hex()}", b64encode(V4).decode(), V5.hex()])
def test_the_refusal_of_a_quote_in_digits_says_to_decode_it(text: str) -> None:
    with pytest.raises(QuoteFormatError, match="decode its hexadecimal digits or base64 first") as refused:
        _ = parse_quote(text.encode())
    assert refused.value.code == "quote_version"


def test_sgx_only_if_asked_for_and_only_in_version_3() -> None:
    sgx = pack("<HHI", 3, 2, 0) + bytes(40 + 384)
    with pytest.raises(QuoteFormatError, match="too few"):
        _ = parse_quote(sgx)
    with pytest.raises(QuoteFormatError, match="attestation key"):
        _ = parse_quote(sgx, sgx=True)
    for version, tee in ((3, 0x81), (4, 0), (5, 0)):
        with pytest.raises(QuoteFormatError) as caught:
            _ = parse_quote(pack("<HHI", version, 2, tee) + bytes(1000), sgx=True)
        assert caught.value.code == "quote_tee_type"


@pytest.mark.parametrize("data", [V4, V5])
def test_every_cut_is_refused(data: bytes) -> None:
    for size in range(len(data)):
        with pytest.raises(QuoteFormatError):
            _ = parse_quote(data[:size], sgx=True)


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes(data: bytes, sgx: bool) -> None:
    with suppress(QuoteFormatError):
        _ = parse_quote(data, sgx=sgx)


@given(st.sampled_from([V4, V5]), st.integers(0, 1600), st.binary(max_size=8))
def test_a_mutated_quote(data: bytes, offset: int, value: bytes) -> None:
    try:
        quote = parse_quote(_put(data, offset, value))
    except QuoteFormatError:
        return
    assert len(quote.signature) == len(quote.attestation_key) == 64


@pytest.mark.parametrize(("size", "taken"), [(0, True), (32, True), (4096, True), (4097, False), (0xFFFF, False)])
def test_qe_authentication_data_have_a_bound(size: int, taken: bool) -> None:
    length = AUTH_V4
    outer = length + 4 + 128 + 2
    qe_auth = outer + 4 + 384 + 64
    (old,) = unpack_from("<H", V4, qe_auth)
    more = size - old
    data = _put(V4, length, pack("<I", unpack_from("<I", V4, length)[0] + more))
    data = _put(data, outer, pack("<I", unpack_from("<I", V4, outer)[0] + more))
    data = data[:qe_auth] + pack("<H", size) + bytes(size) + data[qe_auth + 2 + old :]
    if taken:
        assert parse_quote(data).qe_auth == bytes(size)
    else:
        with pytest.raises(QuoteFormatError, match="QE authentication data are more"):
            _ = parse_quote(data)
