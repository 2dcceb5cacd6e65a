"""ECDSA over P-256 with SHA-256, the only signatures there are here.

Rules kept here:

* a key is a point on the curve, or it does not load;
* a signature holds, or `InvalidSignature` is raised. (r, n - s) holds as well as (r, s): no signature is an identity.

Sources: FIPS 186-5, chapter 6; SEC 1, 2.3.4 (points).
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

__all__ = ["EllipticCurvePublicKey", "InvalidSignature", "load_point", "verify", "verify_raw"]

_CURVE: Final = SECP256R1()
_ALGORITHM: Final = ECDSA(SHA256())


def load_point(point: bytes) -> EllipticCurvePublicKey:
    """The key x ‖ y (64 bytes). Raises `ValueError` for what is no point of the curve."""
    return EllipticCurvePublicKey.from_encoded_point(_CURVE, b"\x04" + point)


def verify(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    """Check a signature in DER. Raises `InvalidSignature`."""
    key.verify(signature, message, _ALGORITHM)


def verify_raw(key: EllipticCurvePublicKey, signature: bytes, message: bytes) -> None:
    """Check a signature r ‖ s (64 bytes). Raises `InvalidSignature`."""
    if len(signature) != 64:
        raise InvalidSignature
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    key.verify(encode_dss_signature(r, s), message, _ALGORITHM)
