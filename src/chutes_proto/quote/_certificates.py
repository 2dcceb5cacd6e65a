"""Read certificates and revocation lists of the SGX/TDX PKI, or of another with the same discipline, from their DER.

Rules kept here:

* X.509 version 3, keys and signatures of one `Suite` (Intel's is P-256 with SHA-256), and nothing else;
* names stay DER and are compared as such; a serial number is the content of its INTEGER;
* every extension has its place once; one that is critical and not known here is refused, and one, critical or not,
  by which a CRL would list only some of what is revoked;
* nothing is verified here: who signed what is ``_verify.py``'s to check.

Sources: RFC 5280, 4.1, 4.2 and 5.1-5.3; RFC 7468 (PEM); Intel SGX PCK Certificate and CRL Profile Specification.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from chutes_proto.quote import _der as der
from chutes_proto.quote._der import DerError

ROOT_CA: Final = b"Intel SGX Root CA"
PLATFORM_CA: Final = b"Intel SGX PCK Platform CA"
PROCESSOR_CA: Final = b"Intel SGX PCK Processor CA"
PCK: Final = b"Intel SGX PCK Certificate"
TCB_SIGNING: Final = b"Intel SGX TCB Signing"

MAX_PEM: Final = 64 * 1024
MAX_CERTIFICATE: Final = 16 * 1024
MAX_EXTENSIONS: Final = 32
"""Certificates are remembered as they were read, before their signatures are checked: those of Intel and NVIDIA have at
most 1300 bytes and 6 extensions, and each small extension takes more than ten times its bytes of memory."""
MAX_CHAIN: Final = 3

_VERSION_3: Final = bytes.fromhex("a003020102")
_CRL_VERSION_2: Final = bytes.fromhex("020101")

_MEMBERS: Final = (0xA0, der.INTEGER, *[der.SEQUENCE] * 5, 0xA3)
"""The tags of a certificate's members."""

_TRUE: Final = bytes([der.BOOLEAN, 1, 0xFF])
"""DER leaves a critical flag that is false out."""

_COMMON_NAME: Final = bytes.fromhex("550403")
SUBJECT_KEY_ID: Final = bytes.fromhex("551d0e")
KEY_USAGE: Final = bytes.fromhex("551d0f")
BASIC_CONSTRAINTS: Final = bytes.fromhex("551d13")
_CRL_NUMBER: Final = bytes.fromhex("551d14")
_DELTA_CRL_INDICATOR: Final = bytes.fromhex("551d1b")
_ISSUING_DISTRIBUTION_POINT: Final = bytes.fromhex("551d1c")
_CRL_DISTRIBUTION_POINTS: Final = bytes.fromhex("551d1f")
AUTHORITY_KEY_ID: Final = bytes.fromhex("551d23")
SGX_EXTENSION: Final = bytes.fromhex("2a864886f84d010d01")

EXTENDED_KEY_USAGE: Final = bytes.fromhex("551d25")

_OF_CERTIFICATES: Final = frozenset(
    {SUBJECT_KEY_ID, KEY_USAGE, BASIC_CONSTRAINTS, _CRL_DISTRIBUTION_POINTS, AUTHORITY_KEY_ID}
)
_OF_CRLS: Final = frozenset({_CRL_NUMBER, AUTHORITY_KEY_ID})
_OF_PARTIAL_CRLS: Final = frozenset({_DELTA_CRL_INDICATOR, _ISSUING_DISTRIBUTION_POINT})

_DIGITAL_SIGNATURE: Final = 0x80
_CERT_AND_CRL_SIGN: Final = 0x06

Kind: TypeAlias = Literal["CA", "end entity"]


class Suite(Struct, frozen=True):
    """The form of a PKI's certificates and CRLs.

    ``algorithm`` is the AlgorithmIdentifier of every signature in DER, ``key`` the SubjectPublicKeyInfo of every key,
    an uncompressed point, up to the point of ``point_size`` bytes; ``critical`` are the extensions that its
    certificates may have as critical ones.
    """

    algorithm: bytes
    key: bytes
    point_size: int
    critical: frozenset[bytes]


P256_SHA256: Final = Suite(
    bytes.fromhex("300a06082a8648ce3d040302"),
    bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004"),
    64,
    _OF_CERTIFICATES | {SGX_EXTENSION},
)
P384_SHA384: Final = Suite(
    bytes.fromhex("300a06082a8648ce3d040303"),
    bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004"),
    96,
    _OF_CERTIFICATES | {EXTENDED_KEY_USAGE},
)


class Certificate(Struct, frozen=True, eq=False):
    """The content of a certificate. ``point`` is its key, x ‖ y (64 bytes); times are unix seconds, both inclusive."""

    der: bytes
    signed: bytes
    signature: bytes
    serial: bytes
    issuer: bytes
    subject: bytes
    not_before: int
    not_after: int
    point: bytes
    extensions: dict[bytes, bytes]


class Crl(Struct, frozen=True, eq=False):
    """The content of a CRL, but for its entries: `revoked_serials` reads them once its signature verifies."""

    der: bytes
    signed: bytes
    signature: bytes
    issuer: bytes
    this_update: int
    next_update: int
    number: int
    entries: tuple[int, int]


def read_pem(data: bytes, most: int = MAX_CHAIN) -> tuple[bytes, ...]:
    """The DER of one to ``most`` certificates in PEM; text around them counts for nothing (RFC 7468, section 2).

    Lines may be of any length, but not empty. Raises `DerError`.
    """
    if len(data) > MAX_PEM:
        raise DerError(f"more than {MAX_PEM} bytes of PEM")
    _, *blocks = data.split(b"-----BEGIN CERTIFICATE-----", most + 1)
    if not 1 <= len(blocks) <= most:
        raise DerError(f"not 1 to {most} certificates in PEM")
    bodies: list[bytes] = []
    for block in blocks:
        body, end, _ = block.partition(b"-----END CERTIFICATE-----")
        if not end:
            raise DerError("a PEM block that does not end")
        bodies.append(body)
    return (*map(_read_body, bodies),)


@lru_cache(maxsize=64)
def _read_body(body: bytes) -> bytes:
    lines = body.replace(b"\r", b"")
    if lines.rfind(b"\n\n") >= 0:  # before it stand headers, for who reads RFC 1421; "in" takes three times as long
        raise DerError("an empty line in a PEM block")
    text = lines.replace(b"\n", b"")
    try:
        value = a2b_base64(text)
    except Base64Error:
        value = b""
    if b2a_base64(value, newline=False) != text:  # one text for each value, whatever a decoder takes besides
        raise DerError("a PEM block that is not base64")
    return value


@lru_cache(maxsize=256)
def read_certificate(data: bytes, suite: Suite = P256_SHA256) -> Certificate:
    """Read a certificate from DER (RFC 5280, 4.1), or remember it as it was read. Raises `DerError`."""
    if len(data) > MAX_CERTIFICATE:
        raise DerError(f"more than {MAX_CERTIFICATE} bytes of certificate")
    signed, signature = _split(data, suite)
    version, serial, algorithm, issuer, validity, subject, key, wrapped = der.members(data, *signed[2:], *_MEMBERS)
    if not data.startswith(_VERSION_3, version[1]):
        raise DerError("not an X.509 certificate of version 3")
    _check_algorithm(data, algorithm, suite)
    if not data.startswith(suite.key, key[1]):
        raise DerError("the key is not on the curve of this PKI")
    begin, end = der.several(data, validity[2], validity[3], 2, 2)
    number = der.unsigned(data, serial, size=20)
    names = der.whole(data, issuer), der.whole(data, subject)
    times = der.time(data, begin), der.time(data, end)
    point, extensions = data[key[3] - suite.point_size : key[3]], _read_extensions(data, wrapped, suite.critical)
    return Certificate(data, der.whole(data, signed), signature, number, *names, *times, point, extensions)


def read_crl(data: bytes, suite: Suite = P256_SHA256) -> Crl:
    """Read a revocation list from DER (RFC 5280, 5.1). Raises `DerError`."""
    signed, signature = _split(data, suite)
    fields = der.several(data, signed[2], signed[3], 6, 7)
    if len(fields) == 6:
        fields.insert(5, (der.SEQUENCE, 0, 0, 0))  # a CRL without entries leaves their list out
    version, algorithm, issuer, this_update, next_update, entries, wrapped = fields
    if (version[0], issuer[0], entries[0], wrapped[0]) != (der.INTEGER, der.SEQUENCE, der.SEQUENCE, 0xA0):
        raise DerError("not a certificate revocation list")
    if not data.startswith(_CRL_VERSION_2, version[1]):
        raise DerError("not a certificate revocation list of version 2")
    _check_algorithm(data, algorithm, suite)
    extensions = _read_extensions(data, wrapped, _OF_CRLS)
    if not extensions.keys() >= _OF_CRLS:
        raise DerError("no CRL number, or no authority key identifier")
    if not extensions.keys().isdisjoint(_OF_PARTIAL_CRLS):
        raise DerError("a delta CRL, or one of a distribution point: it may lack certificates that are revoked")
    number = extensions[_CRL_NUMBER]
    (value,) = der.members(number, 0, len(number), der.INTEGER)
    times = der.time(data, this_update), der.time(data, next_update)
    count = int.from_bytes(der.unsigned(number, value, size=20))
    return Crl(data, der.whole(data, signed), signature, der.whole(data, issuer), *times, count, entries[2:])


def revoked_serials(crl: Crl) -> frozenset[bytes]:
    """Read the serial numbers on the list: each is revoked, whatever else its entry says. Raises `DerError`."""
    data = crl.der
    serials: set[bytes] = set()
    add = serials.add
    for tag, _, start, stop in der.elements(data, *crl.entries):
        begin = start + 2
        end = begin + data[start + 1] if stop > begin else start
        if tag != der.SEQUENCE or not start < end < stop:
            raise DerError("malformed CRL entry")
        sign = data[begin] == 0
        if data[start] == der.INTEGER and 0 < end - begin - sign <= 20 and (data[begin + sign] > 0x7F) == sign:
            add(data[begin:end])  # as nearly all are
        else:
            add(der.unsigned(data, (data[start], start, begin, end), size=20))
    return frozenset(serials)


@lru_cache(maxsize=64)
def common_name(name: bytes) -> bytes:
    """The one common name in a name. Raises `DerError`."""
    found: list[bytes] = []
    for tag, _, start, stop in der.elements(name, *der.only(name, 0, len(name), der.SEQUENCE)):
        if tag != der.SET:
            raise DerError("malformed name")
        for attribute in der.elements(name, start, stop):
            kind, value = der.several(name, attribute[2], attribute[3], 2, 2)
            if der.content(name, kind) == _COMMON_NAME:
                if value[0] not in (der.UTF8_STRING, der.PRINTABLE_STRING):
                    raise DerError("a common name that is neither UTF8String nor PrintableString")
                found.append(der.content(name, value))
    if len(found) != 1:
        raise DerError("not exactly one common name")
    return found[0]


def check_kind(certificate: Certificate, kind: Kind, *, path_length: int = 0) -> None:
    """Check constraints and key usage: of a CA with ``path_length`` CAs below it, or of no CA. Raises `DerError`."""
    extensions = certificate.extensions
    if not extensions.keys() >= {SUBJECT_KEY_ID, AUTHORITY_KEY_ID, BASIC_CONSTRAINTS, KEY_USAGE}:
        raise DerError("basic constraints, key usage or a key identifier is missing")
    is_ca, allowed_path = basic_constraints(extensions[BASIC_CONSTRAINTS])
    usage = key_usage(extensions[KEY_USAGE])
    if kind == "CA":
        if not is_ca or (allowed_path is not None and allowed_path < path_length):
            raise DerError("the basic constraints are not a CA's")
        if usage & _CERT_AND_CRL_SIGN != _CERT_AND_CRL_SIGN:
            raise DerError("the key usage is not a CA's")
    else:
        if is_ca:
            raise DerError("the basic constraints are a CA's")
        if usage & _CERT_AND_CRL_SIGN or not usage & _DIGITAL_SIGNATURE:
            raise DerError("the key usage is not that of a certificate that signs statements only")


def _split(data: bytes, suite: Suite) -> tuple[der.Element, bytes]:
    """Split into the signed element and the signature, both in DER."""
    start, stop = der.only(data, 0, len(data), der.SEQUENCE)
    signed, algorithm, signature = der.members(data, start, stop, der.SEQUENCE, der.SEQUENCE, der.BIT_STRING)
    _check_algorithm(data, algorithm, suite)
    return signed, der.bits(data, signature)


def _check_algorithm(data: bytes, element: der.Element, suite: Suite) -> None:
    if not data.startswith(suite.algorithm, element[1]):
        raise DerError("the signature algorithm is not that of this PKI")


def _read_extensions(data: bytes, wrapped: der.Element, known: frozenset[bytes]) -> dict[bytes, bytes]:
    found = der.elements(data, *der.only(data, wrapped[2], wrapped[3], der.SEQUENCE))
    if len(found) > MAX_EXTENSIONS:
        raise DerError(f"more than {MAX_EXTENSIONS} extensions")
    extensions: dict[bytes, bytes] = {}
    for tag, _, start, stop in found:
        if tag != der.SEQUENCE or stop - start < 2 or data[start] != der.OBJECT_IDENTIFIER or data[start + 1] > 0x7F:
            raise DerError("malformed extension")
        end = start + 2 + data[start + 1]
        name = data[start + 2 : end]
        critical = data.startswith(_TRUE, end)
        begin, end = der.only(data, end + 3 if critical else end, stop, der.OCTET_STRING)
        if name in extensions:
            raise DerError("an extension twice")
        if critical and name not in known:
            raise DerError("an unknown critical extension")
        extensions[name] = data[begin:end]
    return extensions


def basic_constraints(value: bytes) -> tuple[bool, int | None]:
    """Whether basic constraints are a CA's, and their path length. Raises `DerError`."""
    fields = der.elements(value, *der.only(value, 0, len(value), der.SEQUENCE))
    is_ca = bool(fields) and fields[0][0] == der.BOOLEAN and der.boolean(value, fields.pop(0))
    path_length = int.from_bytes(der.unsigned(value, fields.pop(0), size=1)) if fields and is_ca else None
    if fields:
        raise DerError("malformed basic constraints")
    return is_ca, path_length


def key_usage(value: bytes) -> int:
    """The first eight bits of a key usage, digitalSignature the highest. Raises `DerError`."""
    start, stop = der.only(value, 0, len(value), der.BIT_STRING)
    if stop - start < 2 or value[start] > 7:
        raise DerError("malformed key usage")
    return value[start + 1]
