"""Client certificates, of which only the key counts.

Rules kept here:

* a client certificate is a carrier of its key and nothing else: names, dates and issuer are not looked at, because the
  quote, not a CA, says whose key it is; possession is proved by the TLS handshake;
* accepted keys are RSA of 2048 to 4096 bits, P-256, P-384 and Ed25519;
* a key's digest is SHA-256 of its SubjectPublicKeyInfo in DER (RFC 5280, section 4.1), which is what
  ``openssl x509 -pubkey -noout | openssl pkey -pubin -outform der | sha256sum`` prints.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

from attrs import frozen
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto._proof import PROOF, Proven
from chutes_proto.errors import Refused
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes


@frozen
class ClientKey(Proven):
    """Proof that a peer presented a certificate with an accepted key; only `client_key` makes one.

    ``digest`` is the SHA-256 of its SubjectPublicKeyInfo, 32 bytes.
    """

    digest: bytes


def client_key(certificate: x509.Certificate | None) -> ClientKey:
    """Read the key of a presented certificate. Raises `Refused` without one, or for a key of another kind."""
    if certificate is None:
        raise _refused("no client certificate was presented")
    key = _public_key(certificate)
    match key:
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1()) | ed25519.Ed25519PublicKey():
            pass
        case rsa.RSAPublicKey() if 2048 <= key.key_size <= 4096:
            pass
        case _:
            raise _refused(f"the client key is {_kind(key)}; RSA 2048 to 4096, P-256, P-384 and Ed25519 are accepted")
    return ClientKey(spki_sha256(certificate), proof=PROOF)


@lru_cache(maxsize=256)  # each operation of a boot asks for it, and encoding a key is slow
def spki_sha256(certificate: x509.Certificate) -> bytes:
    """Return the SHA-256 of a certificate's SubjectPublicKeyInfo (32 bytes), for a key of any kind.

    Raises `Refused` if the key cannot be read at all.
    """
    encoded = _public_key(certificate).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(encoded).digest()


def _public_key(certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _refused(f"the client certificate's key cannot be read: {exc}") from None


def _kind(key: CertificatePublicKeyTypes) -> str:
    match key:
        case rsa.RSAPublicKey():
            return f"RSA with {key.key_size} bits"
        case ec.EllipticCurvePublicKey():
            return key.curve.name
        case _:
            return type(key).__name__.removesuffix("PublicKey")


def _refused(reason: str) -> Refused:
    return Refused(Code.CLIENT_CERTIFICATE_REQUIRED, "Invalid client certificate provided.", reason=reason)
