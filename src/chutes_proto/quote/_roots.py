"""Roots of trust: Intel's, pinned by its key, and any other only as an explicit argument.

Source: Intel SGX PCK Certificate and CRL Profile Specification, 1.3.1; the certificate at
https://certificates.trustedservices.intel.com/IntelSGXRootCA.der.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

from attrs import field, frozen

from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._arguments import BytesLike, as_bytes
from chutes_proto.quote._certificates import Certificate, check_kind, read_certificate
from chutes_proto.quote._der import DerError
from chutes_proto.quote._errors import PolicyError


@frozen(cache_hash=True)
class TrustedRoot:
    """A trusted root CA.

    ``name`` is its subject in DER, ``point`` its key (x ‖ y), ``serial`` the content of its serial number's INTEGER,
    ``digest`` the SHA-256 of its certificate; the times are unix seconds, both inclusive. The digest alone is shown: it
    names the root, which is a default in the signatures that `help` shows.
    """

    name: bytes = field(repr=False)
    point: bytes = field(repr=False)
    serial: bytes = field(repr=False)
    not_before: int = field(repr=False)
    not_after: int = field(repr=False)
    digest: bytes = field(repr=bytes.hex)

    @classmethod
    def from_der(cls, data: BytesLike) -> TrustedRoot:
        """Read the root from a self-signed CA certificate in DER. Raises `PolicyError` for anything else."""
        data = as_bytes(data, "the bytes of a certificate in DER")
        try:
            root = read_certificate(data)
            check_kind(root, "CA", path_length=1)
            check_self_signed(root)
        except DerError as exc:
            raise PolicyError(f"not the certificate of a root CA: {exc}") from None
        return cls(root.subject, root.point, root.serial, root.not_before, root.not_after, sha256(data).digest())


def check_self_signed(certificate: Certificate) -> None:
    """Check that the certificate names itself as issuer and its own key signed it. Raises `DerError`."""
    if certificate.issuer != certificate.subject:
        raise DerError("it names another issuer")
    try:
        ecdsa.verify(ecdsa.load_point(certificate.point), certificate.signature, certificate.signed)
    except (ValueError, ecdsa.InvalidSignature):
        raise DerError("its own key did not sign it") from None


INTEL_ROOT: Final = TrustedRoot(
    name=bytes.fromhex(
        "3068311a301806035504030c11496e74656c2053475820526f6f74204341311a3018060355040a0c11496e74656c20436f72706f72617469"
        "6f6e3114301206035504070c0b53616e746120436c617261310b300906035504080c024341310b3009060355040613025553"
    ),
    point=bytes.fromhex(
        "0ba9c4c0c0c86193a3fe23d6b02cda10a8bbd4e88e48b4458561a36e705525f5"
        "67918e2edc88e40d860bd0cc4ee26aacc988e505a953558c453f6b0904ae7394"
    ),
    serial=bytes.fromhex("22650cd65a9d3489f383b49552bf501b392706ac"),
    not_before=1526899510,  # 2018-05-21T10:45:10Z
    not_after=2524607999,  # 2049-12-31T23:59:59Z
    digest=bytes.fromhex("44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"),
)
"""Intel SGX Root CA."""
