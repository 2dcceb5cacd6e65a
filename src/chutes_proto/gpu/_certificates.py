"""Verify chains of NVIDIA's certificates: of devices, of RIM signers, of OCSP responders.

Rules kept here:

* P-384 with SHA-384 and nothing else, in strict DER (``quote/_certificates.py`` reads it);
* no chain is built: each certificate is issued by the next one, the last by the root, which is pinned by its key;
* the first certificate may sign and issue nothing, all others are CAs. NVIDIA's names have no fixed places, so a place
  is told by constraints and key usage;
* a certificate as it was read, and a signature that holds, are remembered. Times and revocation are not.

Sources: RFC 5280, 4.2.1.3, 4.2.1.9 and 6.1; NVIDIA/nvtrust for the roots.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Final

from attrs import frozen
from msgspec import Struct

from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._errors import GpuPolicyError
from chutes_proto.quote import _certificates as certificates
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._arguments import BytesLike, as_bytes, check_kind
from chutes_proto.quote._certificates import P384_SHA384, Certificate
from chutes_proto.quote._der import DerError
from chutes_proto.quote._ecdsa import P384, EllipticCurvePublicKey
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._terms import NOT_YET_VALID, Term, check_seconds, rfc3339

MAX_CHAIN: Final = 6
"""One more than NVIDIA's chains have, with their root."""

CHAIN_STEPS: Final = (1, 2, 3, 4, 5, 6)
TIME_STEPS: Final = (7, 8)

_CERT_SIGN: Final = 0x04
_DIGITAL_SIGNATURE: Final = 0x80


@frozen
class GpuRoots:
    """The roots to trust: of devices, and of the signers of RIMs. NVIDIA's, unless others are given."""

    device: TrustedRoot
    rim: TrustedRoot

    def __attrs_post_init__(self) -> None:
        check_kind("device", self.device, TrustedRoot, "a TrustedRoot, as of read_root")
        check_kind("rim", self.rim, TrustedRoot, "a TrustedRoot, as of read_root")


class VerifiedChain(Struct, frozen=True, eq=False):
    """Certificates, leaf first and without the root, each issued by the next and the last by the root."""

    certificates: tuple[Certificate, ...]
    root: TrustedRoot
    leaf_key: EllipticCurvePublicKey
    terms: tuple[Term, ...]

    @property
    def leaf(self) -> Certificate:
        return self.certificates[0]

    def issuer_of(self, place: int) -> tuple[bytes, bytes]:
        """Name and point of the issuer of the certificate at ``place``."""
        if place + 1 < len(self.certificates):
            issuer = self.certificates[place + 1]
            return issuer.subject, issuer.point
        return self.root.name, self.root.point


def read_root(der: BytesLike) -> TrustedRoot:
    """Read a root from a self-signed CA certificate in DER. Raises `GpuPolicyError` for anything else."""
    der = as_bytes(der, "the bytes of a certificate in DER", "der")
    try:
        root = certificates.read_certificate(der, P384_SHA384)
        _check_role(root, 1)
        if root.issuer != root.subject:
            raise DerError("it names another issuer")
        ecdsa.verify(ecdsa.load_point(root.point, P384), root.signature, root.signed, P384)
    except (DerError, ValueError, ecdsa.InvalidSignature) as exc:
        raise GpuPolicyError(
            f"not the certificate of a root CA of P-384: {exc or 'its own key did not sign it'}"
        ) from None
    return TrustedRoot(root.subject, root.point, root.serial, root.not_before, root.not_after, sha256(der).digest())


def read_chain(pem: bytes, subject: str) -> tuple[bytes, ...]:
    """Step 1: the certificates in PEM, in DER."""
    try:
        return certificates.read_pem(pem, MAX_CHAIN)
    except DerError as exc:
        raise steps.ChainFormError(subject, str(exc)) from None


def verify_chain(ders: tuple[bytes, ...], root: TrustedRoot, subject: str) -> VerifiedChain:
    """Verify a chain but for its times (steps 1 to 6). Raises `GpuVerificationError`."""
    if not 1 <= len(ders) <= MAX_CHAIN:
        raise steps.ChainFormError(subject, "it is too short or too long", got=len(ders), expected=f"1 to {MAX_CHAIN}")
    names = [
        f"{subject} certificate",
        *(f"issuer {number} of the {subject} certificate" for number in range(1, len(ders))),
    ]
    found = [read(der, name) for der, name in zip(ders, names, strict=True)]
    terms = [Term("root certificate", root.not_before, root.not_after, is_certificate=True)]
    if len(found) > 1 and found[-1].subject == found[-1].issuer:
        _check_root(found.pop(), root)
    elif found[-1].issuer != root.name:
        raise steps.UntrustedRootError(subject, "the chain does not lead to the trusted root")
    issuer, point = root.name, root.point
    for place in reversed(range(len(found))):
        _link(found[place], names[place], issuer, point, place)
        issuer, point = found[place].subject, found[place].point
        terms.append(Term(names[place], found[place].not_before, found[place].not_after, is_certificate=True))
    return VerifiedChain(tuple(found), root, ecdsa.load_point(found[0].point, P384), tuple(terms))


def check_times(terms: Iterable[Term], now: int) -> None:
    """Check that certificates are valid at ``now`` (steps 7 and 8). Raises `GpuVerificationError`."""
    check_seconds("now", now)
    for term in terms:
        if now < term.begin:
            got, expected = rfc3339(now), f"at least {rfc3339(term.begin)}"
            raise steps.CertificateNotYetValidError(term.subject, NOT_YET_VALID, got=got, expected=expected)
        if now > term.end:
            got, expected = rfc3339(now), f"at most {rfc3339(term.end)}"
            raise steps.CertificateExpiredError(term.subject, "expired", got=got, expected=expected)


def read(der: bytes, subject: str) -> Certificate:
    """Step 2: a certificate from DER, with its key."""
    try:
        certificate = certificates.read_certificate(der, P384_SHA384)
        _ = ecdsa.load_point(certificate.point, P384)
    except DerError as exc:
        raise steps.CertificateFormatError(subject, str(exc)) from None
    except ValueError:
        raise steps.CertificateFormatError(subject, "its key is not a point of P-384") from None
    return certificate


def _check_root(certificate: Certificate, root: TrustedRoot) -> None:
    """Step 4: the pinned certificate itself."""
    if (digest := sha256(certificate.der).digest()) != root.digest:
        raise steps.UntrustedRootError("root certificate", "untrusted", got=digest, expected=root.digest)


def _link(certificate: Certificate, subject: str, issuer: bytes, point: bytes, place: int) -> None:
    """Steps 3, 5 and 6 for the certificate at ``place``, with so many below it."""
    try:
        _check_role(certificate, place)
    except DerError as exc:
        raise steps.CertificateRoleError(subject, str(exc)) from None
    if certificate.issuer != issuer:
        raise steps.CertificateIssuerError(subject, "its issuer is not the next certificate of the chain")
    try:
        ecdsa.recall(point, certificate.signature, certificate.signed, P384)
    except ecdsa.InvalidSignature:
        raise steps.CertificateSignatureError(subject, "its issuer did not sign it") from None


def _check_role(certificate: Certificate, place: int) -> None:
    """Check constraints and key usage: of a CA with ``place`` - 1 CAs below it, or at place 0 of no CA."""
    extensions = certificate.extensions
    usage = certificates.key_usage(extensions.get(certificates.KEY_USAGE, b""))
    constraints = extensions.get(certificates.BASIC_CONSTRAINTS)
    is_ca, most = (False, None) if constraints is None else certificates.basic_constraints(constraints)
    if place == 0:
        if is_ca or usage & _CERT_SIGN or not usage & _DIGITAL_SIGNATURE:
            raise DerError("it is not one that signs, and issues nothing")
    elif not is_ca or not usage & _CERT_SIGN or (most is not None and most < place - 1):
        raise DerError("it is not a CA's, or not one with so many CAs below it")


NVIDIA: Final = GpuRoots(
    device=TrustedRoot(
        name=bytes.fromhex(
            "30353122302006035504030c194e564944494120446576696365204964656e74697479204341310f300d060355040a0c064e5649"
            "444941"
        ),
        point=bytes.fromhex(
            "0e4c14a33bf8a5626658db4129607e4cbf4519c4412716f4d0d917c4978005bdeabeaefd57bc66082d718a4f8b6052e1"
            "516ee8a7c422b84de857071bb58fd395bea0cfa1c63ee7c80d6bd63901d91cbbd187d3857dc16b5cceaf238ff8c27dbd"
        ),
        serial=bytes.fromhex("2d3670b1ca100411c1fec0e82a065b54"),
        not_before=1636070400,  # 2021-11-05T00:00:00Z
        not_after=253402300799,  # 9999-12-31T23:59:59Z
        digest=bytes.fromhex("102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"),
    ),
    rim=TrustedRoot(
        name=bytes.fromhex(
            "3045310b3009060355040613025553310f300d060355040a0c064e56494449413125302306035504030c1c4e564944494120436f"
            "52494d207369676e696e6720526f6f74204341"
        ),
        point=bytes.fromhex(
            "b840b28bdbcd33e230da57d4cf2065747030682d4717b4c2829d7641c1325139b74da831c2be3c779e7e2b6548956608"
            "0e4ecd94021075c57f15fedeb862c8f906ae8fddc7b12238597dbdf0fa56e78453833f6d0be43af3871a47f057584799"
        ),
        serial=bytes.fromhex("45dae3a00e5037bddf875375ecb5e270"),
        not_before=1678981054,  # 2023-03-16T15:37:34Z
        not_after=2625061054,  # 2053-03-08T15:37:34Z
        digest=bytes.fromhex("12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"),
    ),
)
"""NVIDIA Device Identity CA, and NVIDIA CoRIM signing Root CA."""
