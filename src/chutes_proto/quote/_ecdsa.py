"""Verify ECDSA signatures over P-256 with SHA-256, the only ones in quotes and collateral.

Rules kept here:

* a key is a point on the curve, or it does not load;
* a signature holds, or `InvalidSignature` is raised. (r, n - s) holds as well as (r, s): no signature is an identity.

Sources: FIPS 186-5, chapter 6; SEC 1, 2.3.4 (points).
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256

__all__ = ["EllipticCurvePublicKey", "InvalidSignature", "load_point", "verify", "verify_raw"]

_CURVE: Final = SECP256R1()
_ALGORITHM: Final = ECDSA(SHA256())


def load_point(point: bytes) -> EllipticCurvePublicKey:
    """Load the key x ‖ y (64 bytes). Raises `ValueError` unless it is a point of the curve."""
    return EllipticCurvePublicKey.from_encoded_point(_CURVE, b"\x04" + point)


def verify(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    """Check a signature in DER. Raises `InvalidSignature`."""
    key.verify(signature, message, _ALGORITHM)


def verify_raw(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    """Check a signature r ‖ s (64 bytes). Raises `InvalidSignature`."""
    if len(signature) != 64:
        raise InvalidSignature
    pair = _integer(signature[:32]) + _integer(signature[32:])
    key.verify(b"\x30%c%b" % (len(pair), pair), message, _ALGORITHM)


def _integer(value: bytes) -> bytes:
    """The INTEGER in DER: without zeros in front, but for one that keeps it from being negative."""
    value = value.lstrip(b"\0")
    if not value or value[0] > 0x7F:
        value = b"\0" + value
    return b"\x02%c%b" % (len(value), value)
