"""The DER reader, and what reads certificates, CRLs, PEM and names with it: a value or `DerError`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote import certificates, der
from chutes_proto.quote.certificates import SGX_EXTENSION, read_certificate, read_crl, read_pem, revoked_serials
from chutes_proto.quote.der import DerError
from chutes_proto.quote.errors import PolicyError
from chutes_proto.quote.pck import read_pck_extension
from chutes_proto.quote.roots import INTEL_ROOT, TrustedRoot
from tests.quote.simulated import PLATFORM, collateral_of

CHAIN = PLATFORM.pck_chain()
PCK = CHAIN[0]
CRL = collateral_of(PLATFORM).pck_crl
EXTENSION = read_certificate(PCK).extensions[SGX_EXTENSION]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("30", "cut off"),
        ("3080", "length"),  # indefinite
        ("308400000001", "length"),  # four bytes of length
        ("308105" + "00" * 5, "shortest"),
        ("30820080" + "00" * 128, "shortest"),
        ("3081", "length"),
        ("3005", "longer"),
        ("1f0101", "tag"),
        ("050005", "cut off"),
    ],
)
def test_what_is_not_strict_der(data: str, problem: str) -> None:
    with pytest.raises(DerError, match=problem):
        _ = der.elements(bytes.fromhex(data), 0, len(data) // 2)


@pytest.mark.parametrize("data", ["0200", "0280", "020180", "02020001", "02030000ff", "0203010000"])
def test_integers(data: str) -> None:
    raw = bytes.fromhex(data)
    with pytest.raises(DerError):
        _ = der.unsigned(raw, der.elements(raw, 0, len(raw))[0], size=2)


def test_integer_with_a_sign_byte() -> None:
    raw = bytes.fromhex("020300ffff")
    assert der.unsigned(raw, der.elements(raw, 0, 5)[0], size=2) == b"\x00\xff\xff"


@pytest.mark.parametrize(
    ("tag", "text", "unix"),
    [
        (0x17, "491231235959Z", 2524607999),
        (0x17, "500101000000Z", -631152000),
        (0x18, "20500101000000Z", 2524608000),
        (0x17, "700101000000Z", 0),
    ],
)
def test_times(tag: int, text: str, unix: int) -> None:
    raw = bytes([tag, len(text)]) + text.encode()
    assert der.time(raw, der.elements(raw, 0, len(raw))[0]) == unix


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x17, "2401010000Z"),
        (0x17, "240101000000+0000"),
        (0x17, "240230000000Z"),
        (0x17, "240101246000Z"),
        (0x17, "24010100000 Z"),
        (0x18, "20240101000000.5Z"),
        (0x0C, "240101000000Z"),
    ],
)
def test_times_that_are_none(tag: int, text: str) -> None:
    raw = bytes([tag, len(text)]) + text.encode()
    with pytest.raises(DerError):
        _ = der.time(raw, der.elements(raw, 0, len(raw))[0])


@pytest.mark.parametrize("data", CHAIN)
def test_a_certificate_says_what_another_reader_reads(data: bytes) -> None:
    ours, theirs = read_certificate(data), x509.load_der_x509_certificate(data)
    assert ours.signed == theirs.tbs_certificate_bytes
    assert ours.signature == theirs.signature
    assert int.from_bytes(ours.serial) == theirs.serial_number
    assert ours.issuer == theirs.issuer.public_bytes()
    assert ours.subject == theirs.subject.public_bytes()
    assert ours.not_before == int(theirs.not_valid_before_utc.timestamp())
    assert ours.not_after == int(theirs.not_valid_after_utc.timestamp())
    assert ours.extensions.keys() == {
        certificates.SGX_EXTENSION if extension.oid.dotted_string.startswith("1.2.840") else _oid(extension.oid)
        for extension in theirs.extensions
    }


def _oid(oid: x509.ObjectIdentifier) -> bytes:
    return bytes([0x55, *map(int, oid.dotted_string.split(".")[2:])])


def test_a_crl_says_what_another_reader_reads() -> None:
    ours, theirs = read_crl(CRL), x509.load_der_x509_crl(CRL)
    assert ours.signed == theirs.tbs_certlist_bytes
    assert {int.from_bytes(serial) for serial in revoked_serials(ours)} == {entry.serial_number for entry in theirs}
    assert theirs.next_update_utc is not None
    assert (ours.this_update, ours.next_update) == (
        int(theirs.last_update_utc.timestamp()),
        int(theirs.next_update_utc.timestamp()),
    )


def test_pem() -> None:
    pem = PLATFORM.quote(bytes(64))
    pem = pem[pem.index(b"-----BEGIN") :]
    assert read_pem(pem) == CHAIN
    assert read_pem(pem.replace(b"\n", b"\r\n") + b"\0\0") == CHAIN
    for wrong in (
        b"",
        b"x" + pem,
        pem + b"x",
        pem.replace(b"-----END CERTIFICATE-----", b"", 1),
        pem + pem,
        pem.replace(b"MII", b"M!I", 1),
        pem.replace(b"MII", b"M\xc3\xa9I", 1),
        b"\n" * (certificates.MAX_PEM + 1),
    ):
        with pytest.raises(DerError):
            _ = read_pem(wrong)


def test_a_root_must_be_a_self_signed_ca() -> None:
    assert TrustedRoot.from_der(CHAIN[2]) != INTEL_ROOT
    for wrong in (CHAIN[0], CHAIN[1], CHAIN[2][:-1], CHAIN[2][:-1] + bytes([CHAIN[2][-1] ^ 1]), b""):
        with pytest.raises(PolicyError, match="root CA"):
            _ = TrustedRoot.from_der(wrong)


READERS: list[tuple[Callable[[bytes], object], bytes]] = [
    (lambda data: certificates.check_kind(read_certificate(data), "end entity"), PCK),
    (lambda data: certificates.check_kind(read_certificate(data), "CA"), CHAIN[1]),
    (lambda data: certificates.common_name(read_certificate(data).subject), PCK),
    (lambda data: revoked_serials(read_crl(data)), CRL),
    (lambda data: read_pck_extension(data, ca="platform", tee="TDX"), EXTENSION),
    (certificates.common_name, INTEL_ROOT.name),
    (read_pem, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
]


@given(st.sampled_from(READERS), st.binary(max_size=300))
def test_any_bytes(reader: tuple[Callable[[bytes], object], bytes], data: bytes) -> None:
    with suppress(DerError):
        _ = reader[0](data)


@given(st.sampled_from(READERS), st.data())
def test_mutated_bytes(reader: tuple[Callable[[bytes], object], bytes], data: st.DataObject) -> None:
    read, seed = reader
    mutated = bytearray(seed)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with suppress(DerError):
        _ = read(bytes(mutated))


def test_every_flipped_bit_of_the_sgx_extension() -> None:
    """A sweep: structure decides, so most flips of tags and lengths are refused, and nothing else is raised."""
    refused = 0
    for at in range(8 * len(EXTENSION)):
        mutated = bytearray(EXTENSION)
        mutated[at // 8] ^= 1 << at % 8
        try:
            _ = read_pck_extension(bytes(mutated), ca="platform", tee="TDX")
        except DerError:
            refused += 1
    assert refused > 4 * len(EXTENSION)
