"""The DER reader, and what reads certificates, CRLs, PEM and names with it: a value or `DerError`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import permutations
from unittest.mock import Mock

import pytest
from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from chutes_proto.auth import der as write
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _der as der
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._certificates import (
    SGX_EXTENSION,
    Certificate,
    Kind,
    read_certificate,
    read_crl,
    read_pem,
    revoked_serials,
)
from chutes_proto.quote._der import DerError
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._pck import read_pck_extension
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot, check_self_signed
from chutes_proto.testing._pki import CertificateDraft, CrlDraft, Keys, nested, sgx_tcb
from tests.quote.simulated import NOW, PLATFORM, collateral_of
from tests.work import work_of

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


def test_members_are_of_a_number() -> None:
    with pytest.raises(DerError, match="more or fewer members"):
        _ = der.several(bytes.fromhex("0500"), 0, 2, 2, 3)


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
        (0x17, "240101240000Z"),
        (0x17, "240101235960Z"),
        (0x17, "24010100000 Z"),
        (0x18, "20240101000000.5Z"),
        (0x0C, "20240101000000Z"),
    ],
)
def test_times_that_are_none(tag: int, text: str) -> None:
    raw = bytes([tag, len(text)]) + text.encode()
    with pytest.raises(DerError):
        _ = der.time(raw, der.elements(raw, 0, len(raw))[0])


@given(st.from_regex(r"[0-2][0-9]{3}[01][0-9][0-3][0-9][0-3][0-9]([0-6][0-9]){2}Z", fullmatch=True).filter(str.isascii))
def test_a_time_reads_back_as_the_same_digits(text: str) -> None:
    raw = bytes([der.GENERALIZED_TIME, 15]) + text.encode()
    with suppress(DerError):
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=der.time(raw, (der.GENERALIZED_TIME, 0, 2, 17)))
        assert "".join(filter(str.isdigit, moment.isoformat().removesuffix("+00:00"))) + "Z" == text


half = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.binary(max_size=2).map(lambda few: few.rjust(32, b"\0")),
    st.sampled_from([b"\x7f" * 32, b"\x80" * 32, bytes(31) + b"\x80"]),
)


@given(st.builds(bytes.__add__, half, half))
def test_a_signature_in_der_is_the_library_s(signature: bytes) -> None:
    key = Mock(spec=EllipticCurvePublicKey)
    ecdsa.verify_raw(key, signature, b"message")
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    assert key.verify.call_args.args[:2] == (encode_dss_signature(r, s), b"message")


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


def with_extensions(*more: bytes) -> bytes:
    """The PCK certificate with further extensions. Its signature no longer verifies, which nothing here asks."""
    signed, *rest = der.members(PCK, *der.only(PCK, 0, len(PCK), der.SEQUENCE), 0x30, 0x30, 0x03)
    *fields, wrapped = der.elements(PCK, signed[2], signed[3])
    start, end = der.only(PCK, wrapped[2], wrapped[3], der.SEQUENCE)
    extensions = write.tlv(0xA3, write.sequence(PCK[start:end], *more))
    body = write.sequence(*(der.whole(PCK, each) for each in fields), extensions)
    return write.sequence(body, *(der.whole(PCK, each) for each in rest))


def small_extensions(count: int) -> list[bytes]:
    return [write.sequence(write.oid(f"1.2.{number}"), write.octets(b"")) for number in range(count)]


def test_a_certificate_has_so_many_bytes_and_extensions() -> None:
    """It is kept as it was read, before its signature is checked."""
    room = certificates.MAX_EXTENSIONS - len(read_certificate(PCK).extensions)
    filler = write.sequence(write.oid("1.3.1"), write.octets(bytes(14_500)))
    padding = certificates.MAX_CERTIFICATE - len(with_extensions(*small_extensions(room - 1), filler))
    filler = write.sequence(write.oid("1.3.1"), write.octets(bytes(14_500 + padding)))
    largest = with_extensions(*small_extensions(room - 1), filler)
    assert len(largest) == certificates.MAX_CERTIFICATE
    assert len(read_certificate(largest).extensions) == certificates.MAX_EXTENSIONS
    assert work_of(lambda: read_certificate(largest)).peak < 4 * certificates.MAX_CERTIFICATE
    with pytest.raises(DerError, match="more than 32 extensions"):
        _ = read_certificate(with_extensions(*small_extensions(room + 1)))
    with pytest.raises(DerError, match="more than 16384 bytes of certificate"):
        _ = read_certificate(largest + b"\0")


def test_pem() -> None:
    pem = PLATFORM.quote(bytes(64))
    pem = pem[pem.index(b"-----BEGIN") :]
    assert read_pem(pem) == CHAIN
    assert read_pem(pem.replace(b"\n", b"\r\n") + b"\0\0") == CHAIN
    told = pem.replace(b"-----BEGIN", b"Subject: CN = \xe9\n-----BEGIN")  # RFC 7468, 2: as `openssl x509 -text` has it
    assert read_pem(told + b"and more") == CHAIN
    for wrong in (
        b"",
        pem.replace(b"-----END CERTIFICATE-----", b"", 1),
        pem[: pem.rindex(b"\n-----END")],
        pem + pem,
        pem.replace(b"MII", b"M!I", 1),
        pem.replace(b"MII", b"\nMII", 1),
        pem.replace(b"\n", b"\r\n").replace(b"\r\n-----END", b"\r\n\r\n-----END", 1),
        pem.replace(b"MII", b"M\xc3\xa9I", 1),
        pem.replace(b"\n-----END", b"=\n-----END", 1),
        pem + b"\n" * certificates.MAX_PEM,
    ):
        with pytest.raises(DerError):
            _ = read_pem(wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [("AAAA", b"\0\0\0"), ("AAA=", b"\0\0"), ("AA==", b"\0")]
    + [(text, None) for text in ("AAAA=", "AAAA==", "AAB=", "AB==", "AA=", "AA", "A", "A===", "=", "AA==AAAA", "A A=")],
)
def test_base64_has_one_text_for_each_value(text: str, value: bytes | None) -> None:
    """Whatever the interpreter's decoder takes: releases differ."""
    pem = f"-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n".encode()
    if value is None:
        with pytest.raises(DerError, match="base64"):
            _ = read_pem(pem)
    else:
        assert read_pem(pem) == (value,)


def test_a_root_must_be_a_self_signed_ca() -> None:
    assert TrustedRoot.from_der(CHAIN[2]) != INTEL_ROOT
    own = CertificateDraft(common_name="own", key="own", issuer="own", signer="own")
    assert TrustedRoot.from_der(evolve(own, ca=True, path_length=1).der(Keys(b"")))
    others = (own.der(Keys(b"")), evolve(own, ca=True, path_length=0).der(Keys(b"")))  # a PCK CA is below a root
    for wrong in (CHAIN[0], CHAIN[1], CHAIN[2][:-1], CHAIN[2][:-1] + bytes([CHAIN[2][-1] ^ 1]), *others, b""):
        with pytest.raises(PolicyError, match="root CA"):
            _ = TrustedRoot.from_der(wrong)


def test_an_intermediate_is_not_self_signed() -> None:
    with pytest.raises(DerError, match="another issuer"):
        check_self_signed(read_certificate(CHAIN[1]))


# --- constraints, key usage, names ---

BASIC_CONSTRAINTS, KEY_USAGE, KEY_ID = bytes.fromhex("551d13"), bytes.fromhex("551d0f"), bytes.fromhex("551d0e")
END_ENTITY = read_certificate(PCK)


def _with(extensions: dict[bytes, str | None]) -> Certificate:
    changed = {name: bytes.fromhex(value) for name, value in extensions.items() if value is not None}
    kept = {name: value for name, value in END_ENTITY.extensions.items() if name not in extensions}
    return replace(END_ENTITY, extensions={**kept, **changed})


@pytest.mark.parametrize(
    ("kind", "constraints", "usage", "problem"),
    [
        ("CA", "30060101ff020100", "03020106", None),
        ("CA", "30030101ff", "03020186", None),
        ("CA", "3000", "03020106", "not a CA's"),
        ("CA", "30030101ff", "03020780", "not a CA's"),
        ("CA", "30030101ff", "03020204", "not a CA's"),  # certificates but no CRLs
        ("end entity", "3000", "030206c0", None),
        ("end entity", "30030101ff", "030206c0", "are a CA's"),
        ("end entity", "3000", "03020284", "signs statements"),
        ("end entity", "3000", "03020640", "signs statements"),
        ("end entity", "3003020100", "030206c0", "malformed"),  # a path length of no CA
        ("end entity", "300301ff00", "030206c0", "a length"),
        ("end entity", "3003010101", "030206c0", "BOOLEAN"),
        ("end entity", "3000", "030106", "malformed"),
        ("end entity", "3000", "03020880", "malformed"),
        ("end entity", None, "030206c0", "missing"),
        ("end entity", "3000", None, "missing"),
    ],
)
def test_who_may_sign_what(kind: Kind, constraints: str | None, usage: str | None, problem: str | None) -> None:
    certificate = _with({BASIC_CONSTRAINTS: constraints, KEY_USAGE: usage})
    if problem is None:
        certificates.check_kind(certificate, kind)
    else:
        with pytest.raises(DerError, match=problem):
            certificates.check_kind(certificate, kind)


def test_a_path_length_must_reach() -> None:
    certificate = _with({BASIC_CONSTRAINTS: "30060101ff020100", KEY_USAGE: "03020106"})
    with pytest.raises(DerError, match="not a CA's"):
        certificates.check_kind(certificate, "CA", path_length=1)
    with pytest.raises(DerError, match="missing"):
        certificates.check_kind(_with({KEY_ID: None}), "end entity")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("300d310b300906035504030c024341", None),
        ("300d310b3009060355040313024341", None),
        ("300d310b300906035504030402" + "4341", "neither UTF8String"),
        ("300d310b300906035504060c024341", "exactly one"),
        ("301a" + "310b300906035504030c024341" * 2, "exactly one"),
        ("300d300b300906035504030c024341", "malformed"),
        ("3000", "exactly one"),
    ],
)
def test_common_names(name: str, problem: str | None) -> None:
    if problem is None:
        assert certificates.common_name(bytes.fromhex(name)) == b"CA"
    else:
        with pytest.raises(DerError, match=problem):
            _ = certificates.common_name(bytes.fromhex(name))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a003020102", "a003020101"),  # version 2
        ("06082a8648ce3d030107", "06082a8648ce3d030108"),  # another curve
        ("300a06082a8648ce3d040302", "300a06082a8648ce3d040303"),  # another algorithm
        ("0603551d13", "0603551d0f"),  # key usage twice
        ("0603551d130101ff", "0603551d13010101"),  # a BOOLEAN that is neither
        ("0603551d130101ff", "0403551d130101ff"),  # an extension without an identifier
        ("034200", "034201"),  # a key that is not of whole bytes
    ],
)
def test_certificates_of_another_kind(old: str, new: str) -> None:
    changed = PCK.replace(bytes.fromhex(old), bytes.fromhex(new))
    assert changed != PCK
    with pytest.raises(DerError):
        _ = read_certificate(changed)


def test_a_signature_is_of_whole_bytes() -> None:
    ends = range(len(PCK) - 80, len(PCK))
    start = next(at for at in ends if PCK[at] == der.BIT_STRING and at + 2 + PCK[at + 1] == len(PCK))
    with pytest.raises(DerError, match="whole bytes"):
        _ = read_certificate(PCK[: start + 2] + b"\x01" + PCK[start + 3 :])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("020101300a0608", "020100300a0608"),  # version 1
        ("020101300a0608", "040101300a0608"),  # a version that is not a number
        ("0603551d14", "0603551d15"),  # no CRL number
        ("0603551d23", "0603551d24"),  # no authority key identifier
    ],
)
def test_crls_of_another_kind(old: str, new: str) -> None:
    changed = CRL.replace(bytes.fromhex(old), bytes.fromhex(new), 1)
    assert changed != CRL
    with pytest.raises(DerError):
        _ = read_crl(changed)


@pytest.mark.parametrize("oid", ["2.5.29.27", "2.5.29.28"])
@pytest.mark.parametrize("critical", [True, False])
def test_a_crl_that_lists_only_some_is_refused(oid: str, critical: bool) -> None:
    """Delta CRL indicator and issuing distribution point (RFC 5280, 5.2.4 and 5.2.5)."""
    draft = CrlDraft(issuer="CA", signer="CA", this_update=NOW, next_update=NOW + 1, own="")
    assert read_crl(draft.der(Keys(bytes(32)))).number == 1
    partial = evolve(draft, more_extensions=((oid, bytes.fromhex("020101"), critical),))
    with pytest.raises(DerError, match=r"delta|critical"):
        _ = read_crl(partial.der(Keys(bytes(32))))
    other = evolve(draft, more_extensions=(("2.5.29.46", bytes.fromhex("3000"), False),))  # where deltas are
    assert read_crl(other.der(Keys(bytes(32)))).number == 1


def test_a_crl_without_entries_revokes_nothing() -> None:
    assert revoked_serials(read_crl(collateral_of(PLATFORM).root_ca_crl)) == frozenset()
    with pytest.raises(DerError, match="entry"):
        _ = revoked_serials(replace(read_crl(CRL), der=bytes.fromhex("30020500"), entries=(0, 4)))


def _revoked(serial: bytes) -> frozenset[bytes]:
    """The serial numbers of a list with one entry, whose INTEGER has this content."""
    entry = bytes([0x02, len(serial)]) + serial + bytes.fromhex("170d") + b"260101000000Z"
    whole = bytes([0x30, len(entry)]) + entry
    return revoked_serials(replace(read_crl(CRL), der=whole, entries=(0, len(whole))))


@pytest.mark.parametrize("serial", ["00", "01", "7f", "0080", "00ff", "0100", "01" + "ff" * 19, "00" + "ff" * 20])
def test_serial_numbers(serial: str) -> None:
    assert _revoked(bytes.fromhex(serial)) == {bytes.fromhex(serial)}


@pytest.mark.parametrize("serial", ["", "80", "ff01", "0000", "007f", "000080", "01" + "00" * 20, "00" + "ff" * 21])
def test_serial_numbers_that_are_none(serial: str) -> None:
    with pytest.raises(DerError):
        _ = _revoked(bytes.fromhex(serial))


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


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    return bytes([tag, size] if size < 0x80 else [tag, 0x82, size >> 8, size & 0xFF]) + content


def _with_tcb(tcb: bytes) -> bytes:
    """The SGX extension with another TCB."""
    items = der.elements(EXTENSION, *der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE))
    whole = [der.whole(EXTENSION, item) for item in items]
    name = bytes([der.OBJECT_IDENTIFIER, len(SGX_EXTENSION) + 1]) + SGX_EXTENSION + b"\x02"
    assert name in whole[1]
    whole[1] = _tlv(der.SEQUENCE, name + tcb)
    return _tlv(der.SEQUENCE, b"".join(whole))


@pytest.mark.parametrize("value", ["048110", "0411", "0310", "040f"])
def test_an_item_is_of_its_type_and_length(value: str) -> None:
    name = bytes([der.OBJECT_IDENTIFIER, len(SGX_EXTENSION) + 1]) + SGX_EXTENSION + b"\x01"
    ppid = EXTENSION.index(name) + len(name)
    assert EXTENSION[ppid : ppid + 2] == b"\x04\x10"
    items = der.elements(EXTENSION, *der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE))
    changed = name + bytes.fromhex(value) + EXTENSION[ppid + 2 : ppid + 18]
    rest = b"".join(der.whole(EXTENSION, item) for item in items[1:])
    with pytest.raises(DerError, match="PPID"):
        _ = read_pck_extension(_tlv(der.SEQUENCE, _tlv(der.SEQUENCE, changed) + rest), ca="platform", tee="TDX")


svns = st.one_of(
    st.binary(min_size=16, max_size=16), st.lists(st.integers(0, 127), min_size=16, max_size=16).map(bytes)
)


@example(bytes([*range(120, 136)]), 0x7F, 0, 1)  # a number has a second byte from 128 on
@given(svns, st.integers(0, 0xFFFF), st.integers(0, 15), st.integers(1, 255))
def test_components_are_numbers_of_a_byte_and_equal_the_cpusvn(svn: bytes, pce_svn: int, which: int, off: int) -> None:
    identity = read_pck_extension(_with_tcb(sgx_tcb(tuple(svn), pce_svn, svn)), ca="platform", tee="TDX")
    assert (identity.components, identity.cpu_svn, identity.pce_svn) == (svn, svn, pce_svn)
    other = bytearray(svn)
    other[which] ^= off
    with pytest.raises(DerError, match="components"):
        _ = read_pck_extension(_with_tcb(sgx_tcb(tuple(other), pce_svn, svn)), ca="platform", tee="TDX")


@pytest.mark.parametrize("value", [-1, 256, 65536])
def test_a_component_is_no_other_number(value: int) -> None:
    for cpu_svn in (bytes(16), b"\xff" * 16):
        with pytest.raises(DerError, match="components"):
            _ = read_pck_extension(_with_tcb(sgx_tcb((value, *cpu_svn[1:]), 1, cpu_svn)), ca="platform", tee="TDX")


@pytest.mark.parametrize("pce_svn", [-1, 0x10000, 1 << 64])
def test_a_pcesvn_is_a_number_of_two_bytes(pce_svn: int) -> None:
    cpu_svn = bytes(16)
    with pytest.raises(DerError, match="PCESVN"):
        _ = read_pck_extension(_with_tcb(sgx_tcb(tuple(cpu_svn), pce_svn, cpu_svn)), ca="platform", tee="TDX")


@pytest.mark.parametrize("order", [order for order in permutations(range(7)) if order[0] < 2][1::97])
def test_items_stand_in_their_order(order: tuple[int, ...]) -> None:
    items = der.elements(EXTENSION, *der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE))
    whole = [der.whole(EXTENSION, item) for item in items]
    with pytest.raises(DerError):
        _ = read_pck_extension(_tlv(der.SEQUENCE, b"".join(whole[at] for at in order)), ca="platform", tee="TDX")


@pytest.mark.parametrize("left_out", [(), (5,), (6,), (5, 6)])
def test_what_only_the_platform_ca_says_may_be_left_out(left_out: tuple[int, ...]) -> None:
    items = der.elements(EXTENSION, *der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE))
    left = b"".join(der.whole(EXTENSION, item) for at, item in enumerate(items) if at not in left_out)
    identity = read_pck_extension(_tlv(der.SEQUENCE, left), ca="platform", tee="TDX")
    whole = read_pck_extension(EXTENSION, ca="platform", tee="TDX")
    assert None not in (whole.platform_instance_id, whole.dynamic_platform, whole.cached_keys, whole.smt)
    expected = whole
    if 5 in left_out:
        expected = replace(expected, platform_instance_id=None)
    if 6 in left_out:
        expected = replace(expected, dynamic_platform=None, cached_keys=None, smt=None)
    assert identity == expected


def test_an_item_that_intel_may_have_added_is_told_as_such() -> None:
    items = der.elements(EXTENSION, *der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE))
    name = bytes([der.OBJECT_IDENTIFIER, len(SGX_EXTENSION) + 1]) + SGX_EXTENSION
    added = _tlv(der.SEQUENCE, name + b"\x08" + _tlv(der.OCTET_STRING, b"new"))
    whole = b"".join(der.whole(EXTENSION, item) for item in items)
    with pytest.raises(DerError, match="Intel has added an item that this version does not know: look for a newer"):
        _ = read_pck_extension(_tlv(der.SEQUENCE, whole + added), ca="platform", tee="TDX")


@pytest.mark.parametrize("reader", READERS)
def test_what_is_nested_deeply_is_not_descended_into(reader: tuple[Callable[[bytes], object], bytes]) -> None:
    read, _ = reader
    deep = nested(5000)
    assert len(deep) > 2 * 5000
    with pytest.raises(DerError):
        _ = read(deep)
    for tag in (b"\x30\x80", b"\xa0\x80", b"\x24\x80"):  # of indefinite length, constructed
        with pytest.raises(DerError):
            _ = read(tag * 5000)


def test_every_flipped_bit_of_the_sgx_extension() -> None:
    """A sweep: a flip of a value is read as another one, and any other is refused; so nothing is left unread."""
    honest = read_pck_extension(EXTENSION, ca="platform", tee="TDX")
    refused = 0
    for at in range(8 * len(EXTENSION)):
        mutated = bytearray(EXTENSION)
        mutated[at // 8] ^= 1 << at % 8
        try:
            assert read_pck_extension(bytes(mutated), ca="platform", tee="TDX") != honest
        except DerError:
            refused += 1
    assert refused > 4 * len(EXTENSION)


def test_every_cut_of_the_sgx_extension() -> None:
    """With the outer length put right. Optional parts are at the end; nothing else can be missing."""
    begin, end = der.only(EXTENSION, 0, len(EXTENSION), der.SEQUENCE)
    items = der.elements(EXTENSION, begin, end)
    taken: list[int] = []
    for stop in range(begin, end):
        with suppress(DerError):
            _ = read_pck_extension(_tlv(der.SEQUENCE, EXTENSION[begin:stop]), ca="platform", tee="TDX")
            taken.append(stop)
    assert taken == [items[5][1], items[6][1]]
