"""Revocation: OCSP answers and CRLs as values with times.

Rules kept here:

* an OCSP answer counts for the certificate whose issuer and serial number it names, and for no other;
* it is by the issuer, or by a responder that the issuer certified for this (RFC 6960, 4.2.2.2);
* of several answers the latest counts, but a revocation stands for ever: only "on hold" can end;
* an OCSP nonce is not needed, because the answer's window is checked: an older answer is used only until it ends;
* a CRL is a floor: what it names is revoked. It does not replace an OCSP answer, because NVIDIA's name CAs only.

Sources: RFC 6960, 4.2; RFC 5280, 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from attrs import Factory, field, frozen
from msgspec import Struct

from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._certificates import VerifiedChain, check_times, verify_chain
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _der as der
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._arguments import as_bytes
from chutes_proto.quote._certificates import P384_SHA384, Certificate, Crl
from chutes_proto.quote._der import DerError
from chutes_proto.quote._ecdsa import P384
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._terms import NOT_YET_VALID, Term, check_duration, check_seconds, rfc3339

State: TypeAlias = Literal["good", "revoked", "hold", "unknown"]

MAX_SIZE: Final = 64 * 1024

_BASIC: Final = bytes.fromhex("2b0601050507300101")
_OCSP_SIGNING: Final = bytes.fromhex("2b06010505070309")
_DIGESTS: Final = {
    bytes.fromhex("2b0e03021a"): "sha1",
    bytes.fromhex("608648016503040201"): "sha256",
    bytes.fromhex("608648016503040202"): "sha384",
    bytes.fromhex("608648016503040203"): "sha512",
}
_HOLD: Final = 6


class CertId(Struct, frozen=True):
    """The certificate that an answer is about: digests of its issuer's name and key, and its serial number."""

    digest: str
    name: bytes
    key: bytes
    serial: bytes


class Answer(Struct, frozen=True):
    """One certificate's status in an OCSP answer; times are unix seconds, both inclusive."""

    about: CertId
    state: State
    this_update: int
    next_update: int


class OcspAnswer(Struct, frozen=True, eq=False):
    """The content of an OCSP answer, unverified. ``responder`` is the responder's certificate in DER, or None."""

    signed: bytes
    signature: bytes
    responder_name: bytes | None
    responder_key: bytes | None
    answers: tuple[Answer, ...]
    responder: bytes | None


class Status(Struct, frozen=True):
    """The verified status of one certificate, by the OCSP answer that says it."""

    subject: str
    state: State
    this_update: int
    next_update: int


def _by_serial(known: Revocation) -> Mapping[bytes, Sequence[tuple[OcspAnswer, Answer]]]:
    found: dict[bytes, list[tuple[OcspAnswer, Answer]]] = {}
    for ocsp in known.answers:
        for answer in ocsp.answers:
            found.setdefault(answer.about.serial, []).append((ocsp, answer))
    return found


@frozen(eq=False)
class Revocation:
    """Everything that is known about revoked certificates: OCSP answers and CRLs, read but not verified.

    They are verified when a certificate is looked up, because only its issuer says whose they may be.
    """

    answers: tuple[OcspAnswer, ...] = ()
    crls: tuple[Crl, ...] = ()
    by_serial: Mapping[bytes, Sequence[tuple[OcspAnswer, Answer]]] = field(
        init=False, repr=False, default=Factory(_by_serial, takes_self=True)
    )
    """The answers by the serial number that each is about: a directory may have those of many machines."""

    @classmethod
    def of(cls, pieces: Iterable[bytes]) -> Revocation:
        """Read OCSP answers and CRLs, in DER. Raises `GpuVerificationError` for another piece (step 18)."""
        answers: list[OcspAnswer] = []
        crls: list[Crl] = []
        for piece in pieces:
            read = read_status(as_bytes(piece, "the bytes of OCSP answers and CRLs", "pieces"))
            if isinstance(read, Crl):
                crls.append(read)
            else:
                answers.append(read)
        return cls(tuple(answers), tuple(crls))


@lru_cache(maxsize=512)
def read_status(data: bytes) -> OcspAnswer | Crl:
    """Step 18: an OCSP answer or a CRL from DER."""
    if len(data) > MAX_SIZE:
        raise steps.StatusFormatError("status", f"more than {MAX_SIZE} bytes")
    try:
        if data[:1] == b"\x30" and _is_ocsp(data):
            return _read_ocsp(data)
        crl = certificates.read_crl(data, P384_SHA384)
        _ = certificates.revoked_serials(crl)
    except DerError as exc:
        raise steps.StatusFormatError("status", str(exc)) from None
    return crl


def check_chain_status(
    chain: VerifiedChain, subject: str, revocation: Revocation, *, now: int, grace: int, first: int, hold: bool
) -> tuple[Status, ...]:
    """Check that no certificate of a chain is revoked (steps 19 to 24); those from ``first`` on must have an answer.

    ``grace`` seconds are added to the end of OCSP answers. ``hold`` accepts a first certificate that is on hold.
    Returns each status. Raises `GpuVerificationError`.
    """
    check_seconds("now", now)
    check_duration("grace", grace)
    found: list[Status] = []
    for place in range(len(chain.certificates)):
        name = f"{subject} certificate" if place == 0 else f"issuer {place} of the {subject} certificate"
        accepted: tuple[State, ...] = ("good", "hold") if hold and place == 0 else ("good",)
        status = _status(chain, place, name, revocation, now, grace, accepted)
        if status is not None:
            found.append(status)
        elif place >= first:
            serial = chain.certificates[place].serial
            raise steps.StatusMissingError(name, "no OCSP answer about it", got=serial)
    return tuple(found)


def answer_about(data: bytes, issuer: bytes, point: bytes, serial: bytes, name: str) -> tuple[Answer, tuple[Term, ...]]:
    """Verify an OCSP answer about one certificate, of whatever time (steps 18 to 20).

    ``issuer`` and ``point`` are name and key of the certificate's issuer. Returns the validity of the responder's
    certificate, too. Raises `GpuVerificationError`.
    """
    ocsp = read_status(data)
    if not isinstance(ocsp, OcspAnswer):
        raise steps.StatusFormatError("status", "it is a CRL")
    for answer in ocsp.answers:
        if answer.about == _cert_id(answer.about.digest, issuer, point, serial):
            return answer, _verify_ocsp(ocsp, issuer, point, name)
    raise steps.StatusMissingError(name, "the OCSP answer is not about this certificate", got=serial)


def check_floor(chain: VerifiedChain, subject: str, revocation: Revocation) -> None:
    """Check that no verified CRL, of whatever time, names a certificate of the chain (steps 20 and 24)."""
    for place, certificate in enumerate(chain.certificates):
        issuer, point = chain.issuer_of(place)
        for crl in revocation.crls:
            if crl.issuer == issuer and certificate.serial in _serials(crl.der, issuer, point):
                raise steps.CertificateRevokedError(
                    f"issuer {place} of the {subject} certificate" if place else f"{subject} certificate",
                    "a CRL names it",
                    got=certificate.serial,
                )


def _status(
    chain: VerifiedChain,
    place: int,
    name: str,
    revocation: Revocation,
    now: int,
    grace: int,
    accepted: tuple[State, ...],
) -> Status | None:
    """The status of one certificate; None if no answer says one."""
    certificate = chain.certificates[place]
    issuer, point = chain.issuer_of(place)
    best: tuple[Answer, tuple[Term, ...]] | None = None
    for ocsp, answer in revocation.by_serial.get(certificate.serial, ()):
        if answer.about != _cert_id(answer.about.digest, issuer, point, certificate.serial):
            continue
        terms = _verify_ocsp(ocsp, issuer, point, name)  # 19, 20
        if answer.state == "revoked":
            raise steps.CertificateRevokedError(name, "revoked", got=certificate.serial)
        if answer.state != "unknown" and (best is None or answer.this_update > best[0].this_update):
            best = answer, terms
    if best is None:
        return None
    answer, terms = best
    if now < answer.this_update:
        got, expected = rfc3339(now), f"at least {rfc3339(answer.this_update)}"
        raise steps.StatusNotYetValidError(f"OCSP answer about the {name}", NOT_YET_VALID, got=got, expected=expected)
    if now > answer.next_update + grace:
        got, expected = rfc3339(now), f"at most {rfc3339(answer.next_update)}"
        raise steps.StatusExpiredError(f"OCSP answer about the {name}", "expired", got=got, expected=expected)
    check_times(terms, min(now, answer.next_update))  # the responder was one when it answered
    if answer.state not in accepted:
        raise steps.CertificateRevokedError(name, "on hold", got=certificate.serial)
    return Status(name, answer.state, answer.this_update, answer.next_update)


@lru_cache(maxsize=512)
def _cert_id(digest: str, issuer: bytes, point: bytes, serial: bytes) -> CertId:
    def hashed(value: bytes) -> bytes:
        return hashlib.new(digest, value, usedforsecurity=False).digest()

    return CertId(digest, hashed(issuer), hashed(b"\x04" + point), serial)


def _verify_ocsp(answer: OcspAnswer, issuer: bytes, point: bytes, name: str) -> tuple[Term, ...]:
    """Steps 19 and 20; the validity of the responder's certificate."""
    subject = f"OCSP answer about the {name}"
    terms: tuple[Term, ...] = ()
    responder_name, responder_point = issuer, point
    if answer.responder is not None:
        certificate = _responder(answer.responder, issuer, point, f"{subject}: responder's")
        responder_name, responder_point = certificate.subject, certificate.point
        terms = (Term(f"{subject}: responder's certificate", certificate.not_before, certificate.not_after, True),)
    key_digest = hashlib.sha1(b"\x04" + responder_point, usedforsecurity=False).digest()
    if answer.responder_name not in (None, responder_name) or answer.responder_key not in (None, key_digest):
        raise steps.StatusResponderError(subject, "its certificate is not that of the responder it names")
    try:
        ecdsa.recall(responder_point, answer.signature, answer.signed, P384)
    except ecdsa.InvalidSignature:
        raise steps.StatusSignatureError(subject, "the responder did not sign it") from None
    return terms


def _responder(data: bytes, issuer: bytes, point: bytes, subject: str) -> Certificate:
    """The certificate of a responder that the issuer certified. Raises `GpuVerificationError`."""
    root = TrustedRoot(issuer, point, b"", 0, 0, b"")
    certificate = verify_chain((data,), root, subject).leaf
    try:
        usage = certificate.extensions.get(certificates.EXTENDED_KEY_USAGE, b"\x30\0")
        purposes = der.elements(usage, *der.only(usage, 0, len(usage), der.SEQUENCE))
    except DerError as exc:
        raise steps.StatusResponderError(subject, str(exc)) from None
    if _OCSP_SIGNING not in [der.content(usage, purpose) for purpose in purposes]:
        raise steps.StatusResponderError(subject, "it may not sign OCSP answers")
    return certificate


@lru_cache(maxsize=256)
def _serials(data: bytes, issuer: bytes, point: bytes) -> frozenset[bytes]:
    """Step 20: the serial numbers on a CRL."""
    crl = certificates.read_crl(data, P384_SHA384)
    try:
        ecdsa.verify(ecdsa.load_point(point, P384), crl.signature, crl.signed, P384)
    except ecdsa.InvalidSignature:
        raise steps.StatusSignatureError("CRL", "its issuer did not sign it") from None
    return certificates.revoked_serials(crl)


# --- the form of an OCSP answer (RFC 6960, 4.2.1) ---


def _is_ocsp(data: bytes) -> bool:
    """Whether it begins as an OCSP answer: with a number; a CRL begins with a SEQUENCE."""
    start, _ = der.only(data, 0, len(data), der.SEQUENCE)
    return data[start : start + 1] == bytes([der.ENUMERATED])


def _read_ocsp(data: bytes) -> OcspAnswer:
    status, *rest = der.several(data, *der.only(data, 0, len(data), der.SEQUENCE), 1, 2)
    if der.content(data, status) != b"\0" or not rest:
        raise DerError("the OCSP service answers that it cannot answer")
    (wrapper,) = der.members(data, rest[0][2], rest[0][3], der.SEQUENCE)
    kind, octets = der.members(data, wrapper[2], wrapper[3], der.OBJECT_IDENTIFIER, der.OCTET_STRING)
    if rest[0][0] != 0xA0 or der.content(data, kind) != _BASIC:
        raise DerError("not a basic OCSP answer")
    start, stop = der.only(data, octets[2], octets[3], der.SEQUENCE)
    signed, algorithm, signature, *certs = der.several(data, start, stop, 3, 4)
    if (signed[0], algorithm[0]) != (der.SEQUENCE, der.SEQUENCE) or not data.startswith(
        P384_SHA384.algorithm, algorithm[1]
    ):
        raise DerError("the signature algorithm is not that of this PKI")
    name, key, answers = _read_signed(data, signed)
    return OcspAnswer(
        der.whole(data, signed), der.bits(data, signature), name, key, answers, _read_responder(data, certs)
    )


def _read_responder(data: bytes, certs: list[der.Element]) -> bytes | None:
    """The responder's certificate, the first of those that are there."""
    if not certs:
        return None
    if certs[0][0] != 0xA0:
        raise DerError("malformed certificates")
    found = der.elements(data, *der.only(data, certs[0][2], certs[0][3], der.SEQUENCE))
    return der.whole(data, found[0]) if found else None


def _read_signed(data: bytes, signed: der.Element) -> tuple[bytes | None, bytes | None, tuple[Answer, ...]]:
    members = der.several(data, signed[2], signed[3], 3, 5)
    if members[0][0] == 0xA0:  # version 1 may be spelled out
        raise DerError("an OCSP answer of another version than 1, or with its default version")
    responder, produced, responses, *extensions = members
    if len(extensions) > 1 or (extensions and extensions[0][0] != 0xA1) or responses[0] != der.SEQUENCE:
        raise DerError("malformed OCSP answer")
    _ = der.time(data, produced)
    name = key = None
    if responder[0] == 0xA1:
        name = data[responder[2] : responder[3]]
    elif responder[0] == 0xA2:
        key = der.content(data, (0, 0, *der.only(data, responder[2], responder[3], der.OCTET_STRING)))
    else:
        raise DerError("an OCSP answer names no responder")
    answers = tuple(_read_single(data, one) for one in der.elements(data, responses[2], responses[3]))
    return name, key, answers


def _read_single(data: bytes, single: der.Element) -> Answer:
    if single[0] != der.SEQUENCE:
        raise DerError("malformed OCSP answer about a certificate")
    about, state, this_update, *rest = der.several(data, single[2], single[3], 3, 5)
    if about[0] != der.SEQUENCE or not rest or rest[0][0] != 0xA0 or any(more[0] != 0xA1 for more in rest[1:]):
        raise DerError("an OCSP answer without a time at which it ends")
    (next_update,) = der.elements(data, rest[0][2], rest[0][3])[:1] or [(0, 0, 0, 0)]
    algorithm, name, key, serial = der.members(
        data, about[2], about[3], der.SEQUENCE, der.OCTET_STRING, der.OCTET_STRING, der.INTEGER
    )
    oid, *_ = der.several(data, algorithm[2], algorithm[3], 1, 2)
    digest = _DIGESTS.get(der.content(data, oid), "")
    if not digest:
        raise DerError("an OCSP answer with an unknown digest")
    identity = CertId(digest, der.content(data, name), der.content(data, key), der.unsigned(data, serial, size=20))
    return Answer(identity, _read_state(data, state), der.time(data, this_update), der.time(data, next_update))


def _read_state(data: bytes, state: der.Element) -> State:
    match state[0]:
        case 0x80:
            return "good"
        case 0x82:
            return "unknown"
        case 0xA1:
            at, *reason = der.several(data, state[2], state[3], 1, 2)
            _ = der.time(data, at)
            if reason:
                number = der.members(data, reason[0][2], reason[0][3], der.ENUMERATED)[0]
                if der.content(data, number) == bytes([_HOLD]):
                    return "hold"
            return "revoked"
        case _:
            raise DerError("an OCSP answer that says nothing known")
