"""Certificates for tests: self-signed, of any key."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

PrivateKey = (
    rsa.RSAPrivateKey
    | ec.EllipticCurvePrivateKey
    | ed25519.Ed25519PrivateKey
    | ed448.Ed448PrivateKey
    | dsa.DSAPrivateKey
)

NEW_KEY: dict[str, Callable[[], PrivateKey]] = {
    "rsa1024": lambda: rsa.generate_private_key(65537, 1024),
    "rsa2040": lambda: rsa.generate_private_key(65537, 2040),
    "rsa2048": lambda: rsa.generate_private_key(65537, 2048),
    "rsa4096": lambda: rsa.generate_private_key(65537, 4096),
    "rsa4104": lambda: rsa.generate_private_key(65537, 4104),
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "ed448": ed448.Ed448PrivateKey.generate,
    "dsa2048": lambda: dsa.generate_private_key(2048),
}


def self_signed(key: PrivateKey, common_name: str = "tdx-vm-test", *, valid: bool = True) -> x509.Certificate:
    """A certificate as ``openssl req -x509`` makes one; not ``valid``: it ended long ago."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    end = start + datetime.timedelta(days=30 * 365 if valid else 1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(start).not_valid_after(end)
    unhashed = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    return builder.sign(key, None if unhashed else hashes.SHA256())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def chained(length: int) -> tuple[bytes, bytes]:
    """A certificate and its key in PEM, with so many CAs above it, each issued by the next."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(length + 1)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"level {level}")]) for level in range(length + 1)]
    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    chain = b""
    for level, key in enumerate(keys):
        issuer = min(level + 1, length)
        builder = x509.CertificateBuilder().subject_name(names[level]).issuer_name(names[issuer])
        builder = builder.public_key(key.public_key()).serial_number(1 + level).not_valid_before(start)
        builder = builder.not_valid_after(start + datetime.timedelta(days=30 * 365))
        builder = builder.add_extension(x509.BasicConstraints(ca=level > 0, path_length=None), critical=True)
        chain += certificate_pem(builder.sign(keys[issuer], hashes.SHA256()))
    return chain, key_pem(keys[0])
