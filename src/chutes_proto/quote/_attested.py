"""Attested TLS (RA-TLS): a quote in an X.509 certificate, bound to the certificate's key.

    accepted = verify_certificate(der, collateral, now=now, policy=policy)

Rules kept here:

* the evidence is in the extension for TCG DICE tagged evidence, as the interoperable RA-TLS has it;
* the report data is the SHA-256 of the claims, which name the certificate's public key by its hash: a quote for another
  key, or for another purpose, does not verify;
* nothing is believed of the certificate but its key, its times and the evidence: not its names, not who signed it. That
  the peer has the key is shown by the TLS handshake: verify the certificate of the very connection that is used;
* a quote says that a TD had the key when the quote was made. It has no nonce: only the certificate's times, and the
  lifetime of the TD, bound its age.

Sources: CCC Attestation SIG, Interoperable RA-TLS (CBOR tag 60000: the quote, and claims with ``pubkey-hash``, whose
SHA-256 is the report data); TCG DICE Attestation Architecture, 1.1 (2.23.133.5.4.9); RFC 5280, 4.1.2.7 (the key in
DER).
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256, sha384, sha512
from typing import Any, Final, cast

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.quote import _cbor as cbor
from chutes_proto.quote._arguments import BytesLike, as_bytes
from chutes_proto.quote._certificates import MAX_PEM
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, AnyPolicy, check_options, verify
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._terms import Term, check_seconds, check_terms

DICE_TAGGED_EVIDENCE: Final = "2.23.133.5.4.9"
TEE_QUOTE_TAG: Final = 60000
PUBKEY_HASH: Final = "pubkey-hash"

_HASHES: Final[dict[object, Callable[..., Any]]] = {1: sha256, 7: sha384, 8: sha512}
"""By their identifiers in IANA's registry "Named Information Hash Algorithm"."""
_SHA256: Final = 1


class CertificateEvidenceError(VerificationError):
    """The certificate cannot be read, or has no evidence that is read here, or evidence for another key."""

    step = 39
    code = "certificate_evidence"
    rule = "the certificate has evidence, which names the certificate's key"


@frozen
class CertificateEvidence:
    """Evidence in a certificate; nothing of it is verified.

    ``report_data`` (64 bytes) is what the quote must have to be for the certificate's key. The times are the
    certificate's, in unix seconds, both inclusive.
    """

    quote: bytes
    report_data: bytes
    not_before: int
    not_after: int


def read_evidence(certificate: BytesLike) -> CertificateEvidence:
    """Read the evidence of a certificate in DER. Raises `CertificateEvidenceError`."""
    certificate = as_bytes(certificate, "the bytes of a certificate in DER", "certificate")
    if len(certificate) > MAX_PEM:
        raise _refused(f"more than {MAX_PEM} bytes of certificate")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        values = {extension.oid.dotted_string: extension.value for extension in parsed.extensions}
        times = int(parsed.not_valid_before_utc.timestamp()), int(parsed.not_valid_after_utc.timestamp())
    except Exception as exc:  # noqa: BLE001 - the library raises many kinds, which depend on its release
        raise _refused(f"it cannot be read: {exc}") from None
    value = values.get(DICE_TAGGED_EVIDENCE)
    if not isinstance(value, x509.UnrecognizedExtension):
        raise _refused(f"it does not have the extension {DICE_TAGGED_EVIDENCE}")
    return CertificateEvidence(*_evidence(value.value, key), *times)


def verify_certificate(
    certificate: BytesLike,
    collateral: Collateral | VerifiedCollateral | Callable[[bytes], Collateral | VerifiedCollateral],
    *,
    now: int,
    policy: AnyPolicy,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
    stage: Stage = "boot",
    max_collateral_age: int | None = None,
) -> AcceptedVerdict:
    """Verify the quote in a certificate (DER), and return a verdict only if it is bound to the key and accepted.

    ``collateral`` may be a function that gets the quote and returns collateral for it, verified or not. The other
    arguments are those of `verify`. Use it on the certificate of the connection itself, after the handshake has shown
    that the peer has its key.

    Raises `VerificationError` for every refusal; `CertificateEvidenceError` where the certificate itself is at fault.
    """
    check_seconds("now", now)
    check_options(policy=policy, root=root, grace=grace, sgx=sgx, stage=stage, max_collateral_age=max_collateral_age)
    check_source(collateral)
    evidence = read_evidence(certificate)
    check_terms([Term("attested certificate", evidence.not_before, evidence.not_after, is_certificate=True)], now)
    return verify(
        evidence.quote,
        collateral if isinstance(collateral, Collateral | VerifiedCollateral) else collateral(evidence.quote),
        now=now,
        report_data=evidence.report_data,
        policy=policy,
        root=root,
        grace=grace,
        sgx=sgx,
        stage=stage,
        max_collateral_age=max_collateral_age,
    )


def check_source(collateral: object) -> None:
    """Check what collateral is to come from. Raises `TypeError`."""
    if not isinstance(collateral, Collateral | VerifiedCollateral) and not callable(collateral):
        must = "a Collateral, as of Collateral.load, or a function of the quote that returns one"
        raise TypeError(f"collateral: must be {must}, not {type(collateral).__name__}")


def evidence_for(key: BytesLike) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Prepare the evidence for a key (SubjectPublicKeyInfo in DER).

    Returns the 64 bytes of report data to get a quote for, and the function that makes the value of the extension
    `DICE_TAGGED_EVIDENCE` of that quote.
    """
    key = as_bytes(key, "the bytes of a public key in DER", "key")
    claims = cbor.encode({PUBKEY_HASH: cbor.encode([_SHA256, sha256(key).digest()])})
    return _bound(claims), lambda quote: cbor.encode(cbor.Tagged(TEE_QUOTE_TAG, [quote, claims]))


def _bound(claims: bytes) -> bytes:
    return sha256(claims).digest() + bytes(32)


def _evidence(value: bytes, key: bytes) -> tuple[bytes, bytes]:
    """The quote, and the report data for claims that name the key."""
    try:
        evidence = cbor.decode(value)
        match evidence:
            case cbor.Tagged(tag=60000, value=[bytes() as quote, bytes() as claims]):
                table = cbor.decode(claims)
                named: object = (
                    cast("dict[object, object]", table).get(PUBKEY_HASH) if isinstance(table, dict) else None
                )
                if isinstance(named, bytes):
                    named = cbor.decode(named)
            case _:
                raise _refused(f"its tagged evidence is not a quote and claims under the tag {TEE_QUOTE_TAG}")
    except cbor.CborError as exc:
        raise _refused(f"its tagged evidence: {exc}") from None
    match named:
        case [int() as algorithm, bytes() as digest] if algorithm in _HASHES:
            if _HASHES[algorithm](key).digest() != digest:
                raise _refused("its evidence is for another key")
        case _:
            raise _refused(f"its claims have no {PUBKEY_HASH} of SHA-256, SHA-384 or SHA-512")
    return quote, _bound(claims)


def _refused(problem: str) -> CertificateEvidenceError:
    return CertificateEvidenceError("attested certificate", problem)
