"""The ephemeral identity of a client: a P-256 key and a certificate for it, from entropy.

Rules kept here:

* nothing is drawn: key and serial number follow from the entropy that is given (HKDF, RFC 5869);
* the DER is written by hand, and not by `cryptography.x509`: a boot agent in an initramfs needs nothing else of that,
  and would pay for all of it in memory and time. The layout is fixed but for names, numbers and times.

Sources: RFC 5280, 4.1 (certificates); RFC 5480, 2 (keys); RFC 5758, 3.2 (the algorithm); RFC 5915, 3 and RFC 5208, 5
(private keys).
"""

from __future__ import annotations

import hashlib
from typing import Final

from attrs import field, frozen

from chutes_proto.auth import der
from chutes_proto.errors import LocalProtocolError
from chutes_proto.secret import Secret

try:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as _missing:  # the boot agent as one file has a distribution's Python around it
    raise LocalProtocolError(
        f"certificates need Python's package cryptography ({_missing}); Debian: apt-get install python3-cryptography"
    ) from None

ENTROPY_SIZE: Final = 32
"""Bytes of entropy that an identity is made of."""

_P256_SIZE: Final = 32
_P256_ORDER: Final = 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551
"""SP 800-186, section 3.2.1.3: cryptography before 45, which Debian 13 has, does not know it."""
_DAY: Final = 24 * 60 * 60

_ECDSA_WITH_SHA256: Final = der.sequence(der.oid("1.2.840.10045.4.3.2"))
_P256_KEY: Final = der.sequence(der.oid("1.2.840.10045.2.1"), der.oid("1.2.840.10045.3.1.7"))
"""The AlgorithmIdentifier of a key on the curve."""
_COMMON_NAME: Final = der.oid("2.5.4.3")
_SUBJECT_KEY_IDENTIFIER: Final = der.oid("2.5.29.14")


@frozen
class ClientIdentity:
    """An ephemeral client certificate and key in PEM, and the SHA-256 of the key's SPKI (32 bytes)."""

    certificate_pem: bytes = field(repr=False)
    key_pem: Secret
    spki_sha256: bytes


def make_client_identity(now: int, entropy: bytes) -> ClientIdentity:
    """Make the self-signed P-256 certificate of one boot: ``CN=tdx-vm-{now}``, valid for a day.

    ``entropy`` is 32 secret bytes, never used for anything else. Raises `LocalProtocolError` for entropy of another
    size, and for a time before 1970 or after 9999.
    """
    key = derived_key(entropy, "client key")
    private, public = key.private_numbers().private_value, key.public_key().public_numbers()
    point = b"\x04" + public.x.to_bytes(_P256_SIZE, "big") + public.y.to_bytes(_P256_SIZE, "big")  # SEC 1, 2.3.3
    spki = der.sequence(_P256_KEY, der.bits(point))
    name = der.sequence(der.tlv(0x31, der.sequence(_COMMON_NAME, der.tlv(0x0C, f"tdx-vm-{now}".encode()))))
    identifier = der.octets(hashlib.sha1(point, usedforsecurity=False).digest())  # RFC 5280, 4.2.1.2: a name
    to_sign = der.sequence(
        der.tlv(0xA0, der.integer(2)),
        der.integer(derived_serial(entropy, "client serial")),
        _ECDSA_WITH_SHA256,
        name,
        der.sequence(der.time(now), der.time(now + _DAY)),
        name,
        spki,
        der.tlv(0xA3, der.sequence(der.sequence(_SUBJECT_KEY_IDENTIFIER, der.octets(identifier)))),
    )
    certificate = der.sequence(to_sign, _ECDSA_WITH_SHA256, der.bits(key.sign(to_sign, ec.ECDSA(SHA256()))))
    secret = der.octets(private.to_bytes(_P256_SIZE, "big"))
    numbers = der.sequence(der.integer(1), secret, der.tlv(0xA1, der.bits(point)))
    key_info = der.sequence(der.integer(0), _P256_KEY, der.octets(numbers))
    return ClientIdentity(
        der.pem("CERTIFICATE", certificate), Secret(der.pem("PRIVATE KEY", key_info)), hashlib.sha256(spki).digest()
    )


def derived_key(entropy: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    """Derive a P-256 key from 32 bytes of entropy for one purpose.

    Raises `LocalProtocolError` for entropy of another size.
    """
    # 16 bytes more than the order make the remainder even over 1 … order - 1 (FIPS 186-5, A.2.1).
    number = _derived(entropy, label, _P256_SIZE + 16)
    return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def derived_serial(entropy: bytes, label: str) -> int:
    """Derive a positive serial number of 16 bytes (RFC 5280, 4.1.2.2). Raises `LocalProtocolError`."""
    return _derived(entropy, label, 16) | 1


def _derived(entropy: bytes, label: str, size: int) -> int:
    if len(entropy) != ENTROPY_SIZE:
        raise LocalProtocolError(f"an identity needs {ENTROPY_SIZE} bytes of entropy, not {len(entropy)}")
    hkdf = HKDF(SHA256(), size, salt=None, info=b"chutes-proto identity: " + label.encode())
    return int.from_bytes(hkdf.derive(entropy), "big")
