"""A quote in a certificate: its form, its binding to the key, and certificates that are anything else."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256, sha384, sha512
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote import _cbor as cbor
from chutes_proto.quote._attested import CertificateEvidenceError, evidence_for, read_evidence, verify_certificate
from chutes_proto.quote._errors import AppraisalError, VerificationError
from chutes_proto.quote._measurements import Stage
from chutes_proto.quote._policy import AcceptedVerdict, Policy
from chutes_proto.quote._steps import CertificateExpiredError, CertificateNotYetValidError, ReportDataMismatchError
from chutes_proto.quote._verify import verify_collateral
from tests.quote.simulated import NOW, PLATFORM, PROFILE, ROOT, collateral_of

KEY = ec.derive_private_key(7, ec.SECP256R1())
SPKI = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
OTHER = (
    ec.derive_private_key(8, ec.SECP384R1()).public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
)
POLICY = Policy(profiles=(PROFILE,))
DICE = "2.23.133.5.4.9"


def certificate(extensions: dict[str, bytes], begin: int = NOW - 60, end: int = NOW + 60) -> bytes:
    """A self-signed certificate of `KEY` with these extensions, in DER."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "RATLS")])
    builder = x509.CertificateBuilder(name, name, KEY.public_key(), 1)
    builder = builder.not_valid_before(datetime.fromtimestamp(begin, UTC))
    builder = builder.not_valid_after(datetime.fromtimestamp(end, UTC))
    for oid, value in extensions.items():
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(KEY, SHA256()).public_bytes(Encoding.DER)


def evidence(
    algorithm: int = 1, digest: bytes | None = None, *, nested: bool = True, key: bytes = SPKI, stage: Stage = "boot"
) -> bytes:
    """Evidence as of Interoperable RA-TLS; Gramine puts the hash into a string of its own."""
    hashes: dict[int, Any] = {1: sha256, 7: sha384, 8: sha512}
    entry = [algorithm, digest or hashes.get(algorithm, sha256)(key).digest()]
    claims = cbor.encode({"nonce": b"any", "pubkey-hash": cbor.encode(entry) if nested else entry})
    quote = PLATFORM.quote(sha256(claims).digest() + bytes(32), stage=stage)
    return cbor.encode(cbor.Tagged(60000, [quote, claims]))


def checked(certificate: bytes, policy: Policy = POLICY, now: int = NOW) -> AcceptedVerdict:
    return verify_certificate(certificate, collateral_of(PLATFORM), now=now, policy=policy, root=ROOT)


@pytest.mark.parametrize("value", [evidence(), evidence(7), evidence(8, nested=False)])
def test_evidence_is_verified_with_collateral_from_anywhere(value: bytes) -> None:
    made = certificate({DICE: value})
    assert checked(made).profile is PROFILE
    asked: list[bytes] = []

    def fetch(quote: bytes) -> Any:
        asked.append(quote)
        return collateral_of(PLATFORM)

    _ = verify_certificate(made, fetch, now=NOW, policy=POLICY, root=ROOT)
    assert asked == [read_evidence(made).quote]
    kept = verify_collateral(collateral_of(PLATFORM), now=NOW, root=ROOT)
    assert verify_certificate(made, kept, now=NOW, policy=POLICY, root=ROOT).verified is kept
    assert verify_certificate(made, lambda _: kept, now=NOW, policy=POLICY, root=ROOT).verified is kept


def test_collateral_may_be_only_so_old() -> None:
    """Kept collateral is valid for a month, in which Intel may have revoked the platform."""
    made = certificate({DICE: evidence()}, end=NOW + 86400)
    kept = verify_collateral(collateral_of(PLATFORM), now=NOW, root=ROOT)
    options: dict[str, Any] = {"policy": POLICY, "root": ROOT, "max_collateral_age": 3600}
    accepted = verify_certificate(made, kept, now=NOW + 3600, **options)
    assert accepted.appraised_at == accepted.verified_at == NOW + 3600
    with pytest.raises(AppraisalError, match="collateral_age: the collateral was issued too long ago"):
        _ = verify_certificate(made, lambda _: kept, now=NOW + 3601, **options)


def test_the_form_that_is_made_here() -> None:
    report_data, extension = evidence_for(SPKI)
    made = certificate({DICE: extension(PLATFORM.quote(report_data))})
    assert checked(made).quote.body.report_data == report_data


@pytest.mark.parametrize("value", [evidence(key=OTHER), evidence(1, sha256(OTHER).digest())])
def test_a_quote_for_another_key_is_refused(value: bytes) -> None:
    with pytest.raises(CertificateEvidenceError, match="its evidence is for another key"):
        _ = checked(certificate({DICE: value}))


def test_claims_that_the_quote_does_not_bind_are_refused() -> None:
    """The quote of another machine's certificate, under claims for one's own key."""
    theirs = cbor.decode(evidence(key=OTHER))
    mine = cbor.decode(evidence())
    assert isinstance(theirs, cbor.Tagged)
    assert isinstance(mine, cbor.Tagged)
    quote, claims = theirs.value[0], mine.value[1]  # type: ignore[index]
    with pytest.raises(ReportDataMismatchError):
        _ = checked(certificate({DICE: cbor.encode(cbor.Tagged(60000, [quote, claims]))}))


@pytest.mark.parametrize(
    ("extensions", "problem"),
    [
        ({}, "it does not have the extension 2.23.133.5.4.9"),
        ({"1.2.840.113741.1337.6": PLATFORM.quote(bytes(64))}, "it does not have the extension"),  # Gramine's own form
        ({DICE: b""}, "cut off"),
        ({DICE: cbor.encode(cbor.Tagged(60001, [b"", b""]))}, "not a quote and claims under the tag 60000"),
        ({DICE: cbor.encode([b"", b""])}, "not a quote and claims"),
        ({DICE: evidence() + b"\0"}, "left over"),
        ({DICE: cbor.encode(cbor.Tagged(60000, [b"", cbor.encode({})]))}, "no pubkey-hash"),
        ({DICE: cbor.encode(cbor.Tagged(60000, [b"", cbor.encode([])]))}, "no pubkey-hash"),
        ({DICE: evidence(2, bytes(32))}, "no pubkey-hash of SHA-256"),
        ({DICE: evidence(1, bytes(31))}, "for another key"),
    ],
)
def test_evidence_that_cannot_be_used_is_refused(extensions: dict[str, bytes], problem: str) -> None:
    with pytest.raises(CertificateEvidenceError, match=problem) as caught:
        _ = checked(certificate(extensions))
    assert (caught.value.step, caught.value.code) == (39, "certificate_evidence")


def test_only_in_the_time_of_the_certificate_and_only_as_the_policy_says() -> None:
    made = certificate({DICE: evidence()})
    with pytest.raises(CertificateExpiredError, match="attested certificate"):
        _ = checked(made, now=NOW + 61)
    late = certificate({DICE: evidence()}, begin=NOW + 1)
    with pytest.raises(CertificateNotYetValidError, match="attested certificate"):
        _ = checked(late)
    with pytest.raises(AppraisalError, match="no_profiles"):
        _ = checked(made, Policy())


def test_registers_count_as_in_the_named_stage() -> None:
    made = certificate({DICE: evidence(stage="runtime")})
    collateral = collateral_of(PLATFORM)
    assert verify_certificate(made, collateral, now=NOW, policy=POLICY, root=ROOT, stage="runtime").stage == "runtime"
    with pytest.raises(AppraisalError, match="boot stage"):
        _ = checked(made)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    with suppress(CertificateEvidenceError):
        _ = read_evidence(data)
    with suppress(VerificationError):
        _ = checked(certificate({DICE: data}))


VALUES: Any = st.recursive(
    st.integers(0, 2**64 - 1) | st.binary(max_size=30) | st.text(max_size=30),
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 99), some, max_size=3)
        | st.builds(cbor.Tagged, st.integers(0, 2**32), some)
    ),
    max_leaves=5,
)


@given(VALUES)
def test_cbor_comes_back(value: Any) -> None:
    with suppress(cbor.CborError):  # it may be nested deeply
        assert cbor.decode(cbor.encode(value)) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_cbor_or_not(data: bytes) -> None:
    with suppress(cbor.CborError):
        _ = cbor.decode(data)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("", "cut off"),
        ("18", "a number is cut off"),
        ("1f", "indefinite"),
        ("4201", "a string is cut off"),
        ("61ff", "UTF-8"),
        ("9bffffffffffffffff", "an array or map is cut off"),
        ("20", "not read here"),
        ("f6", "not read here"),
        ("a2010201" + "02", "a key twice"),
        ("a18001", "neither a string nor a number"),
        ("81" * 20 + "01", "deeper"),
        ("0000", "left over"),
    ],
)
def test_what_is_not_read(data: str, problem: str) -> None:
    with pytest.raises(cbor.CborError, match=problem):
        _ = cbor.decode(bytes.fromhex(data))


def test_what_is_not_written() -> None:
    with pytest.raises(TypeError):
        _ = cbor.encode(-1)


def test_a_certificate_that_is_too_large_is_not_read() -> None:
    with pytest.raises(CertificateEvidenceError, match="more than"):
        _ = read_evidence(bytes(100_000))
