"""The parts of simulated GPUs: certificates, reports, RIMs and OCSP answers, as drafts that a fault may change.

Rules kept here:

* everything follows from the seed (`Keys`), keys are on P-384, digests are SHA-384, and signatures deterministic;
* a RIM is written in its canonical form, by hand, so that no canonicalization of ours is needed to sign it;
* common names begin as NVIDIA's, because verifiers tell a chip by them; the organisation cannot be confused with it.

Sources: those of ``chutes_proto.gpu``.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha1, sha384
from typing import Final, TypeAlias

from attrs import field, frozen
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chutes_proto.auth import der
from chutes_proto.testing._pki import Curve, Keys, flipped

Text: TypeAlias = Callable[[str], str]

ORGANIZATION: Final = "Simulated GPUs"
BEGIN: Final = 1602892800  # 2020-10-17, as NVIDIA's
END: Final = 253_402_300_799  # 9999-12-31

CERT_SIGN: Final = bytes.fromhex("03020204")
DIGITAL_SIGNATURE: Final = bytes.fromhex("03020780")
COMPOSITE_ID: Final = "2.23.133.5.4.1"
TCB_INFO: Final = "2.23.133.5.4.1.1"
OCSP_SIGNING: Final = "1.3.6.1.5.5.7.3.9"

_SHA384: Final = der.oid("2.16.840.1.101.3.4.2.2")
_SWID: Final = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_DS: Final = "http://www.w3.org/2000/09/xmldsig#"
_HASHES: Final = "http://www.w3.org/2001/04/xmlenc#sha384"
_NAMESPACES: Final = f'xmlns="{_SWID}" xmlns:sha384="{_HASHES}"'


def sign(keys: Keys, label: str, data: bytes, curve: Curve = "P-384") -> bytes:
    """Sign, with a signature in DER."""
    return keys.private(label, curve).sign(data, ec.ECDSA(hashes.SHA384(), deterministic_signing=True))


def sign_raw(keys: Keys, label: str, data: bytes) -> bytes:
    """Sign, with a signature r ‖ s."""
    r, s = decode_dss_signature(sign(keys, label, data))
    return r.to_bytes(48) + s.to_bytes(48)


def point(keys: Keys, label: str) -> bytes:
    """The key as 0x04 ‖ x ‖ y."""
    return keys.private(label, "P-384").public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def name(common_name: str | None) -> bytes:
    parts = (("2.5.4.3", 0x0C, common_name), ("2.5.4.10", 0x0C, ORGANIZATION), ("2.5.4.6", 0x13, "XX"))
    return der.sequence(
        *(der.tlv(0x31, der.sequence(der.oid(oid), der.tlv(tag, text.encode()))) for oid, tag, text in parts if text)
    )


def composite_id(keys: Keys, key: str, fwid: bytes) -> bytes:
    """The extension of Hopper's device certificates: the composite device id, with the firmware's digest."""
    public = keys.private(key, "P-384").public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return der.sequence(der.integer(1), public, der.sequence(_SHA384, der.octets(fwid)))


def tcb_info(fwid: bytes) -> bytes:
    """The extension of Blackwell's device certificates: DICE TcbInfo, with the firmware's digest first."""
    fwids = (der.sequence(_SHA384, der.octets(digest)) for digest in (fwid, bytes(48)))
    return der.sequence(der.tlv(0x80, b"Simulated"), der.tlv(0xA6, *fwids))


@frozen(kw_only=True)
class GpuCertificate:
    """A certificate before it is bytes. ``key`` and ``signer`` are labels of `Keys`; names are common names."""

    common_name: str | None
    key: str
    issuer: str
    signer: str
    ca: bool = True
    path_length: int | None = None
    usage: bytes | None = CERT_SIGN
    constraints: bytes | None = None
    not_before: int = BEGIN
    not_after: int = END
    curve: Curve = "P-384"
    algorithm: str = "1.2.840.10045.4.3.3"
    extensions: Mapping[str, bytes] = field(factory=dict[str, bytes])
    off_curve: bool = False
    flip: bool = False

    def der(self, keys: Keys) -> bytes:
        public = keys.private(self.key, self.curve).public_key()
        spki = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if self.off_curve:
            spki = flipped(spki)
        length = b"" if self.path_length is None else der.integer(self.path_length)
        constraints = der.sequence(der.tlv(0x01, b"\xff"), length) if self.ca else None
        extensions = {"2.5.29.19": self.constraints or constraints, "2.5.29.15": self.usage, **self.extensions}
        algorithm = der.sequence(der.oid(self.algorithm))
        body = der.sequence(
            der.tlv(0xA0, der.integer(2)),
            der.integer(keys.serial(self.key)),
            algorithm,
            name(self.issuer),
            der.sequence(der.time(self.not_before), der.time(self.not_after)),
            name(self.common_name),
            spki,
            der.tlv(
                0xA3,
                der.sequence(
                    *(
                        der.sequence(der.oid(oid), der.octets(value))
                        for oid, value in extensions.items()
                        if value is not None
                    )
                ),
            ),
        )
        signature = sign(keys, self.signer, body)
        return der.sequence(body, algorithm, der.bits(flipped(signature) if self.flip else signature))


@frozen(kw_only=True)
class ReportDraft:
    """A report before it is signed. ``measurements`` are by SPDM index, ``fields`` the opaque fields by type."""

    nonce: bytes
    measurements: Mapping[int, bytes]
    fields: Mapping[int, bytes]
    blocks: bytes | None = None
    opaque: bytes | None = None
    count: int | None = None
    versions: tuple[int, int] = (0x11, 0x11)

    def encode(self, keys: Keys, label: str) -> bytes:
        blocks = self.blocks
        if blocks is None:
            blocks = b"".join(block(index, value) for index, value in self.measurements.items())
        opaque = self.opaque
        if opaque is None:
            opaque = b"".join(_u16(kind) + _u16(len(value)) + value for kind, value in self.fields.items())
        count = len(self.measurements) if self.count is None else self.count
        signed = b"".join(
            (
                bytes((self.versions[0], 0xE0, 1, 0xFF)) + self.nonce + b"\0",
                bytes((self.versions[1], 0x60, 0, 0, count)) + len(blocks).to_bytes(3, "little") + blocks,
                keys.draw("responder nonce", 32) + _u16(len(opaque)) + opaque,
            )
        )
        return signed + sign_raw(keys, label, signed)


def block(index: int, value: bytes, *, specification: int = 1, size: int | None = None) -> bytes:
    """One measurement of a report."""
    size = len(value) + 3 if size is None else size
    return bytes((index, specification)) + _u16(size) + b"\1" + _u16(len(value)) + value


def _u16(number: int) -> bytes:
    return number.to_bytes(2, "little")


@frozen(kw_only=True)
class RimDraft:
    """A RIM before it is signed.

    ``values`` are by RIM index; ``unsigned``, ``signed_info`` and ``signed`` change the text before it is signed, the
    part that is signed, and the whole after that.
    """

    product: str
    version: str
    edition: str
    values: Mapping[int, tuple[bytes, ...]]
    signer: str
    unsigned: Text = str
    signed_info: Text = str
    signed: Text = str
    other_key: bool = False

    def encode(self, keys: Keys, chain: tuple[bytes, ...]) -> bytes:
        resources = "".join(
            self._resource(index, self.values.get(index, (bytes(48),)), index in self.values) for index in range(64)
        )
        meta = f'colloquialVersion="{self.version}" edition="{self.edition}" product="{self.product}"'
        head = f'<SoftwareIdentity {_NAMESPACES} name="{self.product}" tagId="simulated">'
        body = f"\n<Meta {meta}></Meta>\n<Payload>{resources}\n</Payload>\n"
        before = self.unsigned(f"{head}{body}")
        end = "</SoftwareIdentity>"
        digest = b64encode(sha384((before + end).encode()).digest()).decode()
        # In the document the namespaces are known from outside; canonical for itself, the part names them.
        info = self.signed_info(_signed_info("", digest))
        canonical = info.replace(
            "<ds:SignedInfo>", f'<ds:SignedInfo xmlns="{_SWID}" xmlns:ds="{_DS}" xmlns:sha384="{_HASHES}">', 1
        )
        signature = sign_raw(keys, f"another {self.signer}" if self.other_key else self.signer, canonical.encode())
        value = b64encode(signature).decode()
        certificates = "".join(f"<ds:X509Certificate>{b64encode(one).decode()}\n</ds:X509Certificate>" for one in chain)
        return self.signed(
            f'{before}<ds:Signature xmlns:ds="{_DS}">{info}<ds:SignatureValue>{value}</ds:SignatureValue>'
            f"<ds:KeyInfo><ds:X509Data>{certificates}</ds:X509Data></ds:KeyInfo></ds:Signature>{end}"
        ).encode()

    def _resource(self, index: int, values: tuple[bytes, ...], active: bool) -> str:
        found = "".join(f' sha384:Hash{number}="{value.hex()}"' for number, value in enumerate(values))
        plain = f'active="{active}" alternatives="{len(values)}" index="{index}" size="48" type="Measurement"'
        return f"\n<Resource {plain}{found}></Resource>"


def _signed_info(namespaces: str, digest: str) -> str:
    c14n = "http://www.w3.org/2006/12/xml-c14n11"
    more = "http://www.w3.org/2001/04/xmldsig-more"
    return (
        f"<ds:SignedInfo{namespaces}>"
        f'<ds:CanonicalizationMethod Algorithm="{c14n}"></ds:CanonicalizationMethod>'
        f'<ds:SignatureMethod Algorithm="{more}#ecdsa-sha384"></ds:SignatureMethod>'
        '<ds:Reference URI=""><ds:Transforms>'
        f'<ds:Transform Algorithm="{_DS}enveloped-signature"></ds:Transform>'
        f'<ds:Transform Algorithm="{c14n}"></ds:Transform></ds:Transforms>'
        f'<ds:DigestMethod Algorithm="{more}#sha384"></ds:DigestMethod>'
        f"<ds:DigestValue>{digest}</ds:DigestValue></ds:Reference></ds:SignedInfo>"
    )


@frozen(kw_only=True)
class StatusDraft:
    """An OCSP answer about one certificate before it is signed; ``state`` is its DER, ``responder`` who signs it."""

    serial: int
    issuer: str
    issuer_key: str
    this_update: int
    next_update: int
    responder: GpuCertificate
    state: bytes = b"\x80\0"
    digest: str = "2.16.840.1.101.3.4.2.2"
    status: int = 0
    by_name: bool = False
    by_issuer: bool = False
    other_name: bool = False
    flip: bool = False
    single: bytes | None = None
    certificates: bytes | None = None
    signed: Callable[[bytes], bytes] = bytes

    def encode(self, keys: Keys) -> bytes:
        signer = self.issuer_key if self.by_issuer else self.responder.key
        about = der.sequence(
            der.sequence(der.oid(self.digest), der.tlv(0x05)),
            der.octets(sha384(name(self.issuer)).digest()),
            der.octets(sha384(point(keys, self.issuer_key)).digest()),
            der.integer(self.serial),
        )
        until = der.tlv(0xA0, generalized(self.next_update))
        single = self.single or der.sequence(about, self.state, generalized(self.this_update), until)
        called = f"another {self.responder.common_name}" if self.other_name else self.responder.common_name
        identifier = sha1(point(keys, signer), usedforsecurity=False).digest()
        who = der.tlv(0xA1, name(called)) if self.by_name else der.tlv(0xA2, der.octets(identifier))
        data = self.signed(der.sequence(who, generalized(self.this_update), der.sequence(single)))
        signature = sign(keys, signer, data)
        certificates = [] if self.by_issuer else [der.tlv(0xA0, der.sequence(self.responder.der(keys)))]
        if self.certificates is not None:
            certificates = [self.certificates]
        basic = der.sequence(
            data,
            der.sequence(der.oid("1.2.840.10045.4.3.3")),
            der.bits(flipped(signature) if self.flip else signature),
            *certificates,
        )
        wrapped = der.sequence(der.oid("1.3.6.1.5.5.7.48.1.1"), der.octets(basic))
        body = () if self.status else (der.tlv(0xA0, wrapped),)
        return der.sequence(der.tlv(0x0A, bytes([self.status])), *body)


def generalized(moment: int) -> bytes:
    """A GeneralizedTime, which OCSP uses for all times."""
    return der.tlv(0x18, f"{datetime.fromtimestamp(moment, UTC):%Y%m%d%H%M%SZ}".encode())


def revoked(moment: int, reason: int | None) -> bytes:
    """The state of a certificate that is revoked, or with reason 6 on hold."""
    why = b"" if reason is None else der.tlv(0xA0, der.tlv(0x0A, bytes([reason])))
    return der.tlv(0xA1, generalized(moment), why)


def crl(keys: Keys, issuer: str, signer: str, serials: tuple[int, ...], now: int) -> bytes:
    """A CRL that names these certificates."""
    algorithm = der.sequence(der.oid("1.2.840.10045.4.3.3"))
    entries = [der.sequence(der.integer(serial), der.time(BEGIN)) for serial in serials]
    extensions = [
        der.sequence(der.oid("2.5.29.20"), der.octets(der.integer(1))),
        der.sequence(der.oid("2.5.29.35"), der.octets(der.sequence(der.tlv(0x80, bytes(20))))),
    ]
    body = der.sequence(
        der.integer(1),
        algorithm,
        name(issuer),
        der.time(now),
        der.time(now + 86400),
        *([der.sequence(*entries)] if entries else []),
        der.tlv(0xA0, der.sequence(*extensions)),
    )
    return der.sequence(body, algorithm, der.bits(sign(keys, signer, body)))
