"""Verify ECDSA signatures: over P-256 with SHA-256, as in quotes and collateral, or with another scheme.

Rules kept here:

* a key is a point on the curve, or it does not load;
* a signature holds, or `InvalidSignature` is raised. (r, n - s) holds as well as (r, s): no signature is an identity;
* one that held is remembered by its key and all its bytes, where many quotes bring the same: those of certificates and
  of quoting enclaves. It is a fact about bytes: times, revocation and who is trusted are checked each time. One that
  did not hold is never remembered.

Sources: FIPS 186-5, chapter 6; SEC 1, 2.3.4 (points).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from msgspec import Struct

__all__ = ["P256", "P384", "EllipticCurvePublicKey", "InvalidSignature", "Scheme", "load_point", "verify", "verify_raw"]
__all__ += ["recall", "recall_raw"]


class Scheme(Struct, frozen=True):
    """A curve with a digest; ``size`` is that of a coordinate, and of each half of a raw signature, in bytes."""

    curve: SECP256R1 | SECP384R1
    algorithm: ECDSA
    size: int


P256: Final = Scheme(SECP256R1(), ECDSA(SHA256()), 32)
P384: Final = Scheme(SECP384R1(), ECDSA(SHA384()), 48)


@lru_cache(maxsize=256)
def load_point(point: bytes, scheme: Scheme = P256) -> EllipticCurvePublicKey:
    """Load the key x ‖ y. Raises `ValueError` unless it is a point of the curve."""
    return EllipticCurvePublicKey.from_encoded_point(scheme.curve, b"\x04" + point)


def verify(key: EllipticCurvePublicKey, signature: bytes, message: bytes, scheme: Scheme = P256) -> None:
    """Check a signature in DER. Raises `InvalidSignature`."""
    key.verify(signature, message, scheme.algorithm)


def verify_raw(key: EllipticCurvePublicKey, signature: bytes, message: bytes, scheme: Scheme = P256) -> None:
    """Check a signature r ‖ s. Raises `InvalidSignature`."""
    size = scheme.size
    if len(signature) != 2 * size:
        raise InvalidSignature
    pair = _integer(signature[:size]) + _integer(signature[size:])
    key.verify(b"\x30%c%b" % (len(pair), pair), message, scheme.algorithm)


@lru_cache(maxsize=1024)  # a machine with eight GPUs has about 25: certificates, and answers about them
def recall(point: bytes, signature: bytes, message: bytes, scheme: Scheme = P256) -> None:
    """Check a signature in DER by the key x ‖ y, or remember that it holds. Raises as `load_point` and `verify`."""
    verify(load_point(point, scheme), signature, message, scheme)


@lru_cache(maxsize=256)
def recall_raw(point: bytes, signature: bytes, message: bytes) -> None:
    """Check a signature r ‖ s over P-256 likewise. Raises as `load_point` and `verify_raw`."""
    verify_raw(load_point(point), signature, message)


def _integer(value: bytes) -> bytes:
    """The INTEGER in DER: without zeros in front, but for one that keeps it from being negative."""
    value = value.lstrip(b"\0")
    if not value or value[0] > 0x7F:
        value = b"\0" + value
    return b"\x02%c%b" % (len(value), value)
