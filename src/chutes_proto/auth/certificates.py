"""Client certificates: which keys count; and makers of the two throw-away identities that the library itself needs.

Rules kept here:

* a client certificate is a carrier of its key and nothing else: names, dates and issuer are not looked at, because the
  quote, not a CA, says whose key it is; possession is proved by the TLS handshake;
* keys that count are RSA of 2048 to 4096 bits, P-256, P-384 and Ed25519;
* a key's digest is SHA-256 of its SubjectPublicKeyInfo in DER (RFC 5280, section 4.1), which is what
  ``openssl x509 -pubkey -noout | openssl pkey -pubin -outform der | sha256sum`` prints;
* the makers draw nothing: their keys and serial numbers follow from the entropy that they are given (HKDF, RFC 5869).
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from chutes_proto.codes import Code
from chutes_proto.errors import LocalProtocolError, Refused
from chutes_proto.secret import Secret

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as exc:  # the boot agent as one file has a distribution's Python around it
    raise LocalProtocolError(
        f"certificates need Python's package cryptography ({exc}); Debian: apt-get install python3-cryptography"
    ) from None

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

ENTROPY_SIZE: Final = 32
"""Bytes of entropy that an identity is made of."""

_P256_SIZE: Final = 32
_P256_ORDER: Final = 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551
"""SP 800-186, section 3.2.1.3: cryptography before 45, which Debian 13 has, does not know it."""
_MADE_HERE: Final = object()
_DAY: Final = 24 * 60 * 60


@frozen
class ClientKey:
    """Proof that a peer presented a certificate with a key that counts; only `client_key` makes one.

    ``digest`` is the SHA-256 of its SubjectPublicKeyInfo, 32 bytes.
    """

    digest: bytes
    _made_by: object = field(repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        if self._made_by is not _MADE_HERE:
            raise LocalProtocolError("only client_key() makes a ClientKey")


def client_key(certificate: x509.Certificate | None) -> ClientKey:
    """The key of a presented certificate. Raises `Refused` when there is none, or its key is of another kind."""
    if certificate is None:
        raise _refused("no client certificate was presented")
    key = _public_key(certificate)
    match key:
        case rsa.RSAPublicKey() if 2048 <= key.key_size <= 4096:
            pass
        case ec.EllipticCurvePublicKey(curve=ec.SECP256R1() | ec.SECP384R1()):
            pass
        case ed25519.Ed25519PublicKey():
            pass
        case _:
            raise _refused(f"the client key is {_kind(key)}; RSA 2048 to 4096, P-256, P-384 and Ed25519 count")
    return ClientKey(_digest(key), _MADE_HERE)


def spki_sha256(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's SubjectPublicKeyInfo, 32 bytes, whatever kind its key is.

    Raises `Refused` if the key cannot be read at all.
    """
    return _digest(_public_key(certificate))


def _public_key(certificate: x509.Certificate) -> CertificatePublicKeyTypes:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise _refused(f"the client certificate's key cannot be read: {exc}") from None


def _digest(key: CertificatePublicKeyTypes) -> bytes:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


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


# --- identities ---


@frozen
class ClientIdentity:
    """A throw-away client certificate and key in PEM, and the digest of the key."""

    certificate_pem: bytes = field(repr=False)
    key_pem: Secret
    spki_sha256: bytes


@frozen
class ServerIdentity:
    """A CA certificate, a server's chain under it, and the server's key, in PEM. The CA's own key is gone."""

    ca_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    key_pem: Secret


def make_client_identity(now: int, entropy: bytes) -> ClientIdentity:
    """A self-signed P-256 certificate as a VM makes one at each boot: ``CN=tdx-vm-{now}``, valid for a day.

    ``entropy`` is 32 secret bytes, never used for anything else.
    """
    key = _derived_key(entropy, "client key")
    name = _name(f"tdx-vm-{now}")
    builder = _builder(name, key.public_key(), name, _serial(entropy, "client serial"), now, now + _DAY)
    certificate = builder.sign(key, hashes.SHA256())
    return ClientIdentity(_pem(certificate), _key_pem(key), spki_sha256(certificate))


def make_server_identity(
    now: int, entropy: bytes, hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"), *, days: int = 365
) -> ServerIdentity:
    """A server certificate for ``hosts`` (names or IP addresses) under a CA of its own, for development and tests.

    Valid from an hour before ``now``, because clocks differ, for ``days``. ``entropy`` is 32 secret bytes, never used
    for anything else. Raises `LocalProtocolError` without a host.
    """
    if not hosts:
        raise LocalProtocolError("a server certificate names at least one host")
    not_before, not_after = now - 3600, now + days * _DAY
    ca_key, key = _derived_key(entropy, "CA key"), _derived_key(entropy, "server key")
    ca_serial = _serial(entropy, "CA serial")
    ca_name = _name(f"chutes-proto development CA {ca_serial & 0xFFFFFFFF:08x}")
    ca = (
        _builder(ca_name, ca_key.public_key(), ca_name, ca_serial, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    serial = _serial(entropy, "server serial")
    certificate = (
        _builder(_name(hosts[0]), key.public_key(), ca_name, serial, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return ServerIdentity(_pem(ca), _pem(certificate), _key_pem(key))


def _derived(entropy: bytes, label: str, size: int) -> int:
    if len(entropy) != ENTROPY_SIZE:
        raise LocalProtocolError(f"an identity is made of {ENTROPY_SIZE} bytes of entropy")
    hkdf = HKDF(hashes.SHA256(), size, salt=None, info=b"chutes-proto identity: " + label.encode())
    return int.from_bytes(hkdf.derive(entropy), "big")


def _derived_key(entropy: bytes, label: str) -> ec.EllipticCurvePrivateKey:
    # 16 bytes more than the group's order make the remainder even over 1 … order - 1 (FIPS 186-5, A.2.1).
    number = _derived(entropy, label, _P256_SIZE + 16)
    return ec.derive_private_key(number % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def _serial(entropy: bytes, label: str) -> int:
    return _derived(entropy, label, 16) | 1  # RFC 5280, 4.1.2.2: positive, at most 20 bytes


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, serial: int, not_before: int, not_after: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(datetime.datetime.fromtimestamp(not_before, datetime.UTC))
        .not_valid_after(datetime.datetime.fromtimestamp(not_after, datetime.UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> Secret:
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
