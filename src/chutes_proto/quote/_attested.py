"""Attested TLS (RA-TLS): a quote in an X.509 certificate, bound to the certificate's key.

    accepted = verify_certificate(der, collateral, now=now, policy=policy)

Rules kept here:

* the evidence is in an extension of one of three forms, looked for in this order: TCG DICE tagged evidence as the
  interoperable RA-TLS has it, Gramine's own, dstack's first;
* the report data is what its form makes of the certificate's public key and of nothing else: a quote for another key,
  or for another purpose, does not verify;
* nothing is believed of the certificate but its key, its times and the evidence: not its names, not who signed it. That
  the peer has the key is shown by the TLS handshake: verify the certificate of the very connection that is used;
* a quote says that a TD had the key when the quote was made. It has no nonce: only the certificate's times, and the
  lifetime of the TD, bound its age.

Sources: CCC Attestation SIG, Interoperable RA-TLS (CBOR tag 60000: the quote, and claims with ``pubkey-hash``, whose
SHA-256 is the report data); TCG DICE Attestation Architecture, 1.1 (2.23.133.5.4.9); Gramine, ``ra_tls_attest.c``
(SHA-256 of the key); dstack, ``ra-tls`` (SHA-512 of ``ratls-cert:`` and the key); RFC 5280, 4.1.2.7 (the key in DER).
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256, sha384, sha512
from typing import Any, Final, Literal, TypeAlias, cast

from attrs import frozen
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.quote import _cbor as cbor
from chutes_proto.quote import _der as der
from chutes_proto.quote import _eventlog as eventlog
from chutes_proto.quote._arguments import BytesLike, as_bytes
from chutes_proto.quote._certificates import MAX_PEM
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, AnyPolicy, check_options, verify
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._terms import Term, check_seconds, check_terms

Form: TypeAlias = Literal["interoperable", "gramine", "dstack"]

DICE_TAGGED_EVIDENCE: Final = "2.23.133.5.4.9"
TEE_QUOTE_TAG: Final = 60000
PUBKEY_HASH: Final = "pubkey-hash"

_GRAMINE: Final = ("1.2.840.113741.1337.6", "0.6.9.42.840.113741.1337.6")
"""As it is meant, and as Gramine writes it: with the OID's own tag and length inside of it."""
_DSTACK_QUOTE: Final = "1.3.6.1.4.1.62397.1.1"
_DSTACK_EVENT_LOG: Final = "1.3.6.1.4.1.62397.1.2"
_DSTACK_LATER: Final = "1.3.6.1.4.1.62397.1.8"
"""Quote, log and more in one value, whose form has changed with dstack's releases; the newest write it alone."""
_DSTACK_PREFIX: Final = b"ratls-cert:"
_HASHES: Final[dict[object, Callable[..., Any]]] = {1: sha256, 7: sha384, 8: sha512}
"""By their identifiers in IANA's registry "Named Information Hash Algorithm"."""
_SHA256: Final = 1


class CertificateEvidenceError(VerificationError):
    """The certificate cannot be read, or has no evidence in a form that is read here, or evidence for another key."""

    step = 39
    code = "certificate_evidence"
    rule = "the certificate has evidence, which names the certificate's key"


@frozen
class CertificateEvidence:
    """Evidence in a certificate; nothing of it is verified.

    ``report_data`` (64 bytes) is what the quote must have to be for the certificate's key. ``event_log`` is the log
    that dstack puts beside the quote. The times are the certificate's, in unix seconds, both inclusive.
    """

    form: Form
    quote: bytes
    report_data: bytes
    event_log: bytes | None
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
        values = {extension.oid.dotted_string: _octets(extension.value) for extension in parsed.extensions}
        times = int(parsed.not_valid_before_utc.timestamp()), int(parsed.not_valid_after_utc.timestamp())
    except Exception as exc:  # noqa: BLE001 - the library raises many kinds, which depend on its release
        raise _refused(f"it cannot be read: {exc}") from None
    if DICE_TAGGED_EVIDENCE in values:
        quote, report_data = _interoperable(values[DICE_TAGGED_EVIDENCE], key)
        return CertificateEvidence("interoperable", quote, report_data, None, *times)
    for name in _GRAMINE:
        if name in values:
            return CertificateEvidence("gramine", values[name], sha256(key).digest() + bytes(32), None, *times)
    if _DSTACK_QUOTE in values:
        quote = _octet_string(values[_DSTACK_QUOTE])
        log = _octet_string(values[_DSTACK_EVENT_LOG]) if _DSTACK_EVENT_LOG in values else None
        return CertificateEvidence("dstack", quote, sha512(_DSTACK_PREFIX + key).digest(), log, *times)
    if _DSTACK_LATER in values:
        raise _refused(f"its evidence: it is in dstack's later form ({_DSTACK_LATER}), which is not read")
    raise _refused(f"it has none of the extensions {DICE_TAGGED_EVIDENCE}, {_GRAMINE[0]} and {_DSTACK_QUOTE}")


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
    arguments are those of `verify`; an event log in the certificate is used for registers that a log must explain. Use
    it on the certificate of the connection itself, after the handshake has shown that the peer has its key.

    Raises `VerificationError` for every refusal; `CertificateEvidenceError` where the certificate itself is at fault.
    """
    check_seconds("now", now)
    check_options(policy=policy, root=root, grace=grace, sgx=sgx, stage=stage, max_collateral_age=max_collateral_age)
    check_source(collateral)
    evidence = read_evidence(certificate)
    check_terms([Term("attested certificate", evidence.not_before, evidence.not_after, is_certificate=True)], now)
    log = None
    if evidence.event_log is not None:
        try:
            log = eventlog.parse_event_log_json(evidence.event_log)
        except eventlog.EventLogFormatError as exc:
            raise _refused(f"its event log: {exc}") from None
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
        event_log=log,
        max_collateral_age=max_collateral_age,
    )


def check_source(collateral: object) -> None:
    """Check what collateral is to come from. Raises `TypeError`."""
    if not isinstance(collateral, Collateral | VerifiedCollateral) and not callable(collateral):
        must = "a Collateral, as of Collateral.load, or a function of the quote that returns one"
        raise TypeError(f"collateral: must be {must}, not {type(collateral).__name__}")


def evidence_for(key: BytesLike) -> tuple[bytes, Callable[[bytes], bytes]]:
    """Prepare the evidence for a key (SubjectPublicKeyInfo in DER), in the interoperable form.

    Returns the 64 bytes of report data to get a quote for, and the function that makes the value of the extension
    `DICE_TAGGED_EVIDENCE` of that quote.
    """
    key = as_bytes(key, "the bytes of a public key in DER", "key")
    claims = cbor.encode({PUBKEY_HASH: cbor.encode([_SHA256, sha256(key).digest()])})
    return _bound(claims), lambda quote: cbor.encode(cbor.Tagged(TEE_QUOTE_TAG, [quote, claims]))


def _bound(claims: bytes) -> bytes:
    return sha256(claims).digest() + bytes(32)


def _interoperable(value: bytes, key: bytes) -> tuple[bytes, bytes]:
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


def _octets(value: x509.ExtensionType) -> bytes:
    """The value of an extension that the library does not know; the others matter to nobody here."""
    return value.value if isinstance(value, x509.UnrecognizedExtension) else b""


def _octet_string(value: bytes) -> bytes:
    try:
        start, end = der.only(value, 0, len(value), der.OCTET_STRING)
    except der.DerError as exc:
        raise _refused(f"its evidence: {exc}") from None
    return value[start:end]


def _refused(problem: str) -> CertificateEvidenceError:
    return CertificateEvidenceError("attested certificate", problem)
