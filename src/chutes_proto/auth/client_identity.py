"""The throw-away identity of a client: a P-256 key and a certificate for it, from entropy.

Rules kept here:

* nothing is drawn: key and serial number follow from the entropy that is given (HKDF, RFC 5869);
* the DER is written here, and not by `cryptography.x509`: a boot agent in an initramfs needs nothing else of that, and
  would pay for all of it in memory and time. The layout is fixed but for names, numbers and times.

Sources: RFC 5280, 4.1 (certificates); RFC 5480, 2 (keys); RFC 5758, 3.2 (the algorithm); RFC 5915, 3 and RFC 5208, 5
(private keys); RFC 7468 (PEM).
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from typing import Final

from attrs import field, frozen

from chutes_proto.errors import LocalProtocolError
from chutes_proto.secret import Secret

try:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError as exc:  # the boot agent as one file has a distribution's Python around it
    raise LocalProtocolError(
        f"certificates need Python's package cryptography ({exc}); Debian: apt-get install python3-cryptography"
    ) from None

ENTROPY_SIZE: Final = 32
"""Bytes of entropy that an identity is made of."""

_P256_SIZE: Final = 32
_P256_ORDER: Final = 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551
"""SP 800-186, section 3.2.1.3: cryptography before 45, which Debian 13 has, does not know it."""
_DAY: Final = 24 * 60 * 60
_LAST: Final = 253_402_300_799  # 9999-12-31T23:59:59Z

_COMMON_NAME: Final = bytes.fromhex("0603550403")
_SUBJECT_KEY_IDENTIFIER: Final = bytes.fromhex("0603551d0e")
_ECDSA_WITH_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
_P256_KEY: Final = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
"""The AlgorithmIdentifier of a key on the curve."""


@frozen
class ClientIdentity:
    """A throw-away client certificate and key in PEM, and the digest of the key."""

    certificate_pem: bytes = field(repr=False)
    key_pem: Secret
    spki_sha256: bytes


def make_client_identity(now: int, entropy: bytes) -> ClientIdentity:
    """A self-signed P-256 certificate as a VM makes one at each boot: ``CN=tdx-vm-{now}``, valid for a day.

    ``entropy`` is 32 secret bytes, never used for anything else. Raises `LocalProtocolError` for entropy of another
    size, and for a time before 1970 or after 9999.
    """
    key = derived_key(entropy, "client key")
    private, public = key.private_numbers().private_value, key.public_key().public_numbers()
    point = b"\x04" + public.x.to_bytes(_P256_SIZE, "big") + public.y.to_bytes(_P256_SIZE, "big")  # SEC 1, 2.3.3
    spki = _sequence(_P256_KEY, _bits(point))
    name = _sequence(_der(0x31, _sequence(_COMMON_NAME, _der(0x0C, f"tdx-vm-{now}".encode()))))
    identifier = _der(0x04, hashlib.sha1(point, usedforsecurity=False).digest())  # RFC 5280, 4.2.1.2: a name
    to_sign = _sequence(
        _der(0xA0, _integer(2)),
        _integer(derived_serial(entropy, "client serial")),
        _ECDSA_WITH_SHA256,
        name,
        _sequence(_time(now), _time(now + _DAY)),
        name,
        spki,
        _der(0xA3, _sequence(_sequence(_SUBJECT_KEY_IDENTIFIER, _der(0x04, identifier)))),
    )
    certificate = _sequence(to_sign, _ECDSA_WITH_SHA256, _bits(key.sign(to_sign, ec.ECDSA(SHA256()))))
    numbers = _sequence(_integer(1), _der(0x04, private.to_bytes(_P256_SIZE, "big")), _der(0xA1, _bits(point)))
    key_info = _sequence(_integer(0), _P256_KEY, _der(0x04, numbers))
    return ClientIdentity(
        _pem("CERTIFICATE", certificate), Secret(_pem("PRIVATE KEY", key_info)), hashlib.sha256(spki).digest()
    )


def derived_key(entropy: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    """A key of P-256 that follows from the entropy and what it is for.

    Raises `LocalProtocolError` for entropy of another size.
    """
    # 16 bytes more than the order make the remainder even over 1 … order - 1 (FIPS 186-5, A.2.1).
    number = _derived(entropy, label, _P256_SIZE + 16)
    return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def derived_serial(entropy: bytes, label: str) -> int:
    """A certificate's serial number, positive and of 16 bytes (RFC 5280, 4.1.2.2). Raises `LocalProtocolError`."""
    return _derived(entropy, label, 16) | 1


def _derived(entropy: bytes, label: str, size: int) -> int:
    if len(entropy) != ENTROPY_SIZE:
        raise LocalProtocolError(f"an identity is made of {ENTROPY_SIZE} bytes of entropy")
    hkdf = HKDF(SHA256(), size, salt=None, info=b"chutes-proto identity: " + label.encode())
    return int.from_bytes(hkdf.derive(entropy), "big")


# --- DER (ITU-T X.690) ---


def _der(tag: int, *content: bytes) -> bytes:
    value = b"".join(content)
    size = len(value)
    if size < 0x80:
        return bytes((tag, size)) + value
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value


def _sequence(*members: bytes) -> bytes:
    return _der(0x30, *members)


def _integer(value: int) -> bytes:
    return _der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _bits(value: bytes) -> bytes:
    return _der(0x03, b"\x00", value)


def _time(moment: int) -> bytes:
    """RFC 5280, 4.1.2.5: two digits of the year are enough until 2049."""
    if not 0 <= moment <= _LAST:
        raise LocalProtocolError(f"a certificate of the time {moment}: it is from 1970 to 9999, in unix seconds")
    when = datetime.fromtimestamp(moment, UTC)
    text = f"{when:%Y%m%d%H%M%SZ}".encode()
    return _der(0x17, text[2:]) if when.year < 2050 else _der(0x18, text)


def _pem(label: str, der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join([f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----".encode(), b""])
