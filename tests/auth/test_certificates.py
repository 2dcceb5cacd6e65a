"""Which client keys count, and their digest."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.auth.certificates import ClientKey, client_key, spki_sha256
from chutes_proto.errors import Refused
from chutes_proto.wire.codes import Code
from tests.certificates import NEW_KEY, certificate_pem, self_signed

NOW = 1_800_000_000
ENTROPY = bytes(range(32))


@pytest.mark.parametrize("kind", ["rsa2048", "rsa4096", "p256", "p384", "ed25519"])
def test_keys_that_count(kind: str) -> None:
    key = NEW_KEY[kind]()
    certificate = self_signed(key)
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert client_key(certificate).digest == hashlib.sha256(der).digest() == spki_sha256(certificate)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("rsa1024", "RSA with 1024 bits"),
        ("rsa2040", "RSA with 2040 bits"),
        ("rsa4104", "RSA with 4104 bits"),
        ("p521", "secp521r1"),
        ("secp256k1", "secp256k1"),
        ("ed448", "Ed448"),
        ("dsa2048", "DSA"),
    ],
)
def test_keys_that_do_not(kind: str, named: str) -> None:
    certificate = self_signed(NEW_KEY[kind]())
    with pytest.raises(Refused) as refused:
        client_key(certificate)
    assert refused.value.code is Code.CLIENT_CERTIFICATE_REQUIRED
    assert refused.value.detail == "Invalid client certificate provided."
    assert named in refused.value.reason
    assert len(spki_sha256(certificate)) == 32


def test_no_certificate() -> None:
    with pytest.raises(Refused, match="Invalid client certificate provided") as refused:
        client_key(None)
    assert refused.value.status == 401
    assert refused.value.reason == "no client certificate was presented"


def broken_key_certificate() -> x509.Certificate:
    """A certificate that loads, whose key is not on its curve."""
    certificate = self_signed(ec.generate_private_key(ec.SECP256R1()))
    der = bytearray(certificate.public_bytes(Encoding.DER))
    point = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)[-64:]
    start = bytes(der).index(point)
    der[start : start + 64] = b"\xff" * 64
    return x509.load_der_x509_certificate(bytes(der))


@pytest.mark.parametrize("read", [client_key, spki_sha256])
def test_a_key_that_cannot_be_read_is_refused(read: Callable[[x509.Certificate], object]) -> None:
    with pytest.raises(Refused) as refused:
        read(broken_key_certificate())
    assert "cannot be read" in refused.value.reason


def test_an_expired_certificate_still_carries_its_key() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    assert client_key(self_signed(key, valid=False)) == client_key(self_signed(key))


def test_a_client_key_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        _ = ClientKey(bytes(32), proof=cast("Any", None))
    with pytest.raises(TypeError):
        _ = attrs.evolve(client_key(self_signed(NEW_KEY["rsa2048"]())), digest=bytes(32))


def test_digest_is_that_of_openssl(tmp_path: Path, require_program: Callable[[str], str]) -> None:
    openssl = require_program("openssl")
    certificate = self_signed(NEW_KEY["rsa2048"]())
    (tmp_path / "c.pem").write_bytes(certificate_pem(certificate))
    pem = subprocess.run(
        [openssl, "x509", "-in", tmp_path / "c.pem", "-pubkey", "-noout"], check=True, capture_output=True
    ).stdout
    der = subprocess.run(
        [openssl, "pkey", "-pubin", "-outform", "der"], input=pem, check=True, capture_output=True
    ).stdout
    assert spki_sha256(certificate) == hashlib.sha256(der).digest()
