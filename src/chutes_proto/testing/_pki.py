"""Keys, certificates and CRLs of the simulated platform, written as DER from drafts that a fault may change.

Rules kept here:

* everything follows from the seed: keys and serial numbers by HKDF (RFC 5869), signatures by deterministic ECDSA
  (RFC 6979), so that the same drafts give the same bytes;
* subjects have the common names of Intel's PCK Certificate and CRL Profile Specification, because verifiers recognize
  roles by them, and an organisation that cannot be confused with Intel;
* certificates are valid from 2018 to 2049, like Intel's root: only collateral expires.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import sha1
from typing import Final, Literal, TypeAlias

from attrs import frozen
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.auth import der

ROOT_CA: Final = "Intel SGX Root CA"
PLATFORM_CA: Final = "Intel SGX PCK Platform CA"
PROCESSOR_CA: Final = "Intel SGX PCK Processor CA"
PCK_CERTIFICATE: Final = "Intel SGX PCK Certificate"
TCB_SIGNING: Final = "Intel SGX TCB Signing"
ORGANIZATION: Final = "Simulated Platform"

ISSUED: Final = 1526860800  # 2018-05-21
EXPIRES: Final = 2524607999  # 2049-12-31
CRL_URL: Final = "https://certificates.simulated.invalid/{}.crl"
SGX_EXTENSION: Final = "1.2.840.113741.1.13.1"

Curve: TypeAlias = Literal["P-256", "P-384"]
Digest: TypeAlias = Literal["SHA-256", "SHA-384"]
SgxItems: TypeAlias = tuple[tuple[int, bytes], ...]
"""The items of the SGX extension: the last arc of the OID under `SGX_EXTENSION`, and the DER of the value."""


@frozen
class Keys:
    """All keys of a simulated world, by label."""

    seed: bytes

    def draw(self, label: str, size: int) -> bytes:
        """Return ``size`` bytes that follow from ``label`` and the seed."""
        hkdf = HKDF(hashes.SHA256(), size, salt=None, info=b"chutes-proto simulated platform: " + label.encode())
        return hkdf.derive(self.seed)

    def private(self, label: str, curve: Curve = "P-256") -> ec.EllipticCurvePrivateKey:
        return _private_key(self, label, curve)

    def public_point(self, label: str) -> bytes:
        """Return the P-256 key as x ‖ y, 64 bytes."""
        return self.private(label).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]

    def serial(self, label: str) -> int:
        """Return the serial number of the certificate for the key ``label``: 159 bits, never zero."""
        return int.from_bytes(self.draw(f"serial {label}", 20)) >> 1 | 1

    def sign(self, label: str, data: bytes, digest: Digest = "SHA-256") -> bytes:
        """Return an ECDSA signature in DER."""
        algorithm = hashes.SHA256() if digest == "SHA-256" else hashes.SHA384()
        return self.private(label).sign(data, ec.ECDSA(algorithm, deterministic_signing=True))

    def sign_raw(self, label: str, data: bytes) -> bytes:
        """Return an ECDSA signature over SHA-256 as r ‖ s, 64 bytes."""
        r, s = decode_dss_signature(self.sign(label, data))
        return r.to_bytes(32) + s.to_bytes(32)


CURVE_ORDERS: Final[Mapping[Curve, int]] = {
    "P-256": 0xFFFFFFFF_00000000_FFFFFFFF_FFFFFFFF_BCE6FAAD_A7179E84_F3B9CAC2_FC632551,
    "P-384": int("FF" * 24 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16),
}
"""SP 800-186, section 3.2.1: older releases of cryptography, such as Debian's, do not have them."""


@lru_cache(maxsize=64)
def _private_key(keys: Keys, label: str, curve: Curve) -> ec.EllipticCurvePrivateKey:
    group = ec.SECP256R1() if curve == "P-256" else ec.SECP384R1()
    # 16 bytes more than the group order, so that the remainder is uniform; zero has a negligible probability.
    number = int.from_bytes(keys.draw(f"key {curve} {label}", group.key_size // 8 + 16))
    return ec.derive_private_key(number % CURVE_ORDERS[curve], group)


@frozen(kw_only=True)
class CertificateDraft:
    """A certificate before it is bytes. ``key`` and ``signer`` are labels of `Keys`; names are common names."""

    common_name: str
    key: str
    issuer: str
    signer: str
    ca: bool = False
    path_length: int | None = None
    not_before: int = ISSUED
    not_after: int = EXPIRES
    curve: Curve = "P-256"
    digest: Digest = "SHA-256"
    sgx: SgxItems | None = None
    sgx_trailing: bytes = b""
    critical_extension: bool = False
    flip_signature: bool = False

    def der(self, keys: Keys) -> bytes:
        public_key = keys.private(self.key, self.curve).public_key()
        location = der.tlv(0xA0, der.tlv(0xA0, der.tlv(0x86, CRL_URL.format(self.signer).encode())))
        extensions = [
            _extension("2.5.29.35", der.sequence(der.tlv(0x80, _key_identifier(keys, self.signer)))),
            _extension("2.5.29.31", der.sequence(der.sequence(location))),
            _extension("2.5.29.14", der.tlv(0x04, _key_identifier(keys, self.key))),
            # RFC 5280, 4.2.1.3: keyCertSign and cRLSign for a CA, digitalSignature and contentCommitment otherwise.
            _extension("2.5.29.15", bytes.fromhex("03020106" if self.ca else "030206c0"), critical=True),
            _extension("2.5.29.19", _basic_constraints(self.ca, self.path_length), critical=True),
        ]
        if self.sgx is not None:
            extensions.append(_extension(SGX_EXTENSION, _sgx_items(SGX_EXTENSION, self.sgx) + self.sgx_trailing))
        if self.critical_extension:
            extensions.append(_extension("1.3.6.1.4.1.55555.1", der.tlv(0x05), critical=True))
        algorithm = _signature_algorithm(self.digest)
        body = der.sequence(
            der.tlv(0xA0, der.integer(2)),
            der.integer(keys.serial(self.key)),
            algorithm,
            _name(self.issuer),
            der.sequence(der.time(self.not_before), der.time(self.not_after)),
            _name(self.common_name),
            public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
            der.tlv(0xA3, der.sequence(*extensions)),
        )
        return _signed(body, algorithm, keys.sign(self.signer, body, self.digest), self.flip_signature)


@frozen(kw_only=True)
class CrlDraft:
    """A certificate revocation list before it is bytes.

    ``revoked`` are labels of keys with revoked certificates; ``own`` is the key in the platform's own chain;
    ``more_extensions`` are OIDs, values and whether they are critical.
    """

    issuer: str
    signer: str
    this_update: int
    next_update: int
    own: str
    revoked: tuple[str, ...] = ()
    number: int | None = 1
    authority_key_identifier: bool = True
    more_extensions: tuple[tuple[str, bytes, bool], ...] = ()
    trailing: bytes = b""
    flip_signature: bool = False

    def der(self, keys: Keys) -> bytes:
        extensions: list[bytes] = []
        if self.number is not None:
            extensions.append(_extension("2.5.29.20", der.integer(self.number)))
        if self.authority_key_identifier:
            identifier = _key_identifier(keys, self.signer)
            extensions.append(_extension("2.5.29.35", der.sequence(der.tlv(0x80, identifier))))
        extensions += [_extension(oid, value, critical=critical) for oid, value, critical in self.more_extensions]
        reason = der.sequence(_extension("2.5.29.21", enumerated(1)))  # keyCompromise
        entries = [der.sequence(der.integer(keys.serial(key)), der.time(ISSUED), reason) for key in self.revoked]
        algorithm = _signature_algorithm("SHA-256")
        body = der.sequence(
            der.integer(1),
            algorithm,
            _name(self.issuer),
            der.time(self.this_update),
            der.time(self.next_update),
            *([der.sequence(*entries)] if entries else []),
            *([der.tlv(0xA0, der.sequence(*extensions))] if extensions else []),
        )
        return _signed(body, algorithm, keys.sign(self.signer, body), self.flip_signature) + self.trailing


def pem(certificates: Iterable[bytes]) -> str:
    """Return certificates in DER as one PEM text (RFC 7468)."""
    return "".join(der.pem("CERTIFICATE", certificate).decode() for certificate in certificates)


def sgx_tcb(components: tuple[int, ...], pce_svn: int, cpu_svn: bytes) -> bytes:
    """Return the value of the SGX extension's TCB item."""
    items = [(number, der.integer(svn)) for number, svn in enumerate(components, 1)]
    return _sgx_items(f"{SGX_EXTENSION}.2", [*items, (17, der.integer(pce_svn)), (18, der.octets(cpu_svn))])


def sgx_configuration(*flags: bool) -> bytes:
    """Return the value of the configuration item: dynamicPlatform, cachedKeys, SMTenabled."""
    return _sgx_items(
        f"{SGX_EXTENSION}.7", [(n, der.tlv(0x01, b"\xff" if flag else b"\0")) for n, flag in enumerate(flags, 1)]
    )


def enumerated(value: int) -> bytes:
    return der.tlv(0x0A, bytes([value]))


def nested(depth: int) -> bytes:
    """Return SEQUENCEs inside one another."""
    value = b""
    for _ in range(depth):
        value = der.sequence(value)
    return value


def _name(common_name: str) -> bytes:
    parts = (("2.5.4.3", 0x0C, common_name), ("2.5.4.10", 0x0C, ORGANIZATION), ("2.5.4.6", 0x13, "XX"))
    attributes = (der.sequence(der.oid(oid), der.tlv(tag, text.encode())) for oid, tag, text in parts)
    return der.sequence(*(der.tlv(0x31, attribute) for attribute in attributes))


def _extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
    return der.sequence(der.oid(oid), der.tlv(0x01, b"\xff") if critical else b"", der.octets(value))


def _basic_constraints(ca: bool, path_length: int | None) -> bytes:
    if not ca:
        return der.sequence()
    return der.sequence(der.tlv(0x01, b"\xff"), b"" if path_length is None else der.integer(path_length))


def _key_identifier(keys: Keys, label: str) -> bytes:
    return sha1(b"\x04" + keys.public_point(label), usedforsecurity=False).digest()


def _sgx_items(arc: str, items: Iterable[tuple[int, bytes]]) -> bytes:
    return der.sequence(*(der.sequence(der.oid(f"{arc}.{number}"), value) for number, value in items))


def _signature_algorithm(digest: Digest) -> bytes:
    return der.sequence(der.oid("1.2.840.10045.4.3.2" if digest == "SHA-256" else "1.2.840.10045.4.3.3"))


def _signed(body: bytes, algorithm: bytes, signature: bytes, flip: bool) -> bytes:
    return der.sequence(body, algorithm, der.bits(flipped(signature) if flip else signature))


def flipped(data: bytes, offset: int = -1) -> bytes:
    """Return ``data`` with the lowest bit of one byte changed."""
    changed = bytearray(data)
    changed[offset] ^= 1
    return bytes(changed)
