"""The ephemeral identity of a server, for development and tests: a CA and a certificate under it, from entropy.

Nothing is drawn: keys and serial numbers follow from the entropy that is given (`client_identity`).
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from typing import Final

from attrs import field, frozen
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from chutes_proto.auth.client_identity import derived_key, derived_serial
from chutes_proto.errors import LocalProtocolError
from chutes_proto.secret import Secret

_DAY: Final = 24 * 60 * 60


@frozen
class ServerIdentity:
    """A CA certificate, a server's chain under it, and the server's key, in PEM. The CA's own key is not kept."""

    ca_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    key_pem: Secret


def make_server_identity(
    now: int, entropy: bytes, hosts: Sequence[str] = ("localhost", "127.0.0.1", "::1"), *, days: int = 365
) -> ServerIdentity:
    """Make a server certificate for ``hosts`` (names or IP addresses) under a CA of its own.

    Valid from an hour before ``now``, because clocks differ, for ``days``. ``entropy`` is 32 secret bytes, never used
    for anything else. Raises `LocalProtocolError` without a host.
    """
    if not hosts:
        raise LocalProtocolError("a server certificate names at least one host")
    not_before, not_after = now - 3600, now + days * _DAY
    ca_key, key = derived_key(entropy, "CA key"), derived_key(entropy, "server key")
    ca_serial = derived_serial(entropy, "CA serial")
    ca_name = _name(f"chutes-proto development CA {ca_serial & 0xFFFFFFFF:08x}")
    ca = (
        _builder(ca_name, ca_key.public_key(), ca_name, ca_serial, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    serial = derived_serial(entropy, "server serial")
    certificate = (
        _builder(_name(hosts[0]), key.public_key(), ca_name, serial, not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ServerIdentity(ca.public_bytes(Encoding.PEM), certificate.public_bytes(Encoding.PEM), Secret(key_pem))


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
    others = "content_commitment key_encipherment data_encipherment key_agreement encipher_only decipher_only".split()
    ca = dict.fromkeys(("key_cert_sign", "crl_sign"), signs_certificates)
    return x509.KeyUsage(digital_signature=not signs_certificates, **ca, **dict.fromkeys(others, False))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
