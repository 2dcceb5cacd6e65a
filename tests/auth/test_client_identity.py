"""The ephemeral identity of a client: its bytes are those that `cryptography.x509` writes."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto.auth.certificates import client_key
from chutes_proto.auth.client_identity import make_client_identity
from chutes_proto.errors import LocalProtocolError

NOW = 1_800_000_000
ENTROPY = bytes(range(32))
DAY = 86400
LAST = 253_402_300_799
END_OF_2049 = 2_524_607_999


def utc(moment: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC)


@given(st.integers(0, LAST - DAY), st.binary(min_size=32, max_size=32))
@example(END_OF_2049 - DAY, ENTROPY)
@example(END_OF_2049 - DAY + 1, ENTROPY)
@example(END_OF_2049 + 1, ENTROPY)
@example(LAST - DAY, ENTROPY)
def test_certificate_and_key_are_as_the_library_writes_them(now: int, entropy: bytes) -> None:
    identity = make_client_identity(now, entropy)
    certificate = x509.load_pem_x509_certificate(identity.certificate_pem)
    key = load_pem_private_key(identity.key_pem.reveal(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, f"tdx-vm-{now}")])
    theirs = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(certificate.serial_number)
        .not_valid_before(utc(now))
        .not_valid_after(utc(now + DAY))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    assert certificate.tbs_certificate_bytes == theirs.tbs_certificate_bytes
    assert certificate.signature_algorithm_oid == theirs.signature_algorithm_oid
    assert certificate.public_bytes(Encoding.PEM) == identity.certificate_pem
    certificate.verify_directly_issued_by(certificate)
    assert identity.key_pem.reveal() == key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert identity.spki_sha256 == client_key(certificate).digest


def test_openssl_presents_it(tmp_path: Path) -> None:
    identity = make_client_identity(NOW, ENTROPY)
    _ = (tmp_path / "both.pem").write_bytes(identity.certificate_pem + identity.key_pem.reveal())
    ssl.create_default_context().load_cert_chain(tmp_path / "both.pem")


def test_key_and_serial_number_follow_from_the_entropy() -> None:
    made = [make_client_identity(now, entropy) for now, entropy in ((NOW, ENTROPY), (0, ENTROPY), (0, ENTROPY[::-1]))]
    digests = [identity.spki_sha256 for identity in made]
    assert digests[0] == digests[1] != digests[2]
    serials = [x509.load_pem_x509_certificate(identity.certificate_pem).serial_number for identity in made]
    assert serials[0] == serials[1] != serials[2]
    assert 0 < min(serials) < max(serials) < 1 << 128


@pytest.mark.parametrize("size", [0, 31, 33])
def test_it_needs_its_entropy(size: int) -> None:
    with pytest.raises(LocalProtocolError, match="32 bytes of entropy"):
        make_client_identity(NOW, bytes(size))


@pytest.mark.parametrize("now", [-1, -62_135_596_800, LAST - DAY + 1, 10**30])
def test_a_time_that_no_certificate_has(now: int) -> None:
    with pytest.raises(LocalProtocolError, match="from 1970 to 9999"):
        make_client_identity(now, ENTROPY)


def test_its_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(make_client_identity(NOW, ENTROPY))
