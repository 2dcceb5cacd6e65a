"""Verify a RIM: NVIDIA's signed reference values for one driver, VBIOS or switch, as a SWID tag with an XML signature.

Rules kept here:

* the signature is of NVIDIA's one form: over the whole document without itself, Canonical XML 1.1, SHA-384, ECDSA over
  P-384, with the signer's chain beside it. Nothing that is not signed may be in it;
* values are read from the tree that was verified, never from the bytes again;
* a RIM is verified once and kept: `VerifiedRim` is made here only, and its times are checked at each use;
* an id does not fix a RIM's content (NVIDIA has signed two for one VBIOS), so its digest is what names it.

Sources: ISO/IEC 19770-2:2015; TCG Reference Integrity Manifest Information Model; XML Signature 1.1; RFC 9231.
"""

from __future__ import annotations

import re
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from functools import lru_cache
from hashlib import sha256, sha384
from typing import Final, Literal, TypeAlias

from attrs import field, frozen

from chutes_proto._proof import PROOF, Proven
from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._certificates import (
    CHAIN_STEPS,
    NVIDIA,
    TIME_STEPS,
    GpuRoots,
    VerifiedChain,
    check_times,
    verify_chain,
)
from chutes_proto.gpu._xml import Element, XmlError, canonical, read
from chutes_proto.quote import _ecdsa as ecdsa
from chutes_proto.quote._arguments import BytesLike, as_bytes, check_kind
from chutes_proto.quote._ecdsa import P384
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._strict_json import digits
from chutes_proto.quote._terms import Window, check_seconds, window

Edition: TypeAlias = Literal["GPU", "SWITCH"]

_SWID: Final = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_SHA384: Final = "http://www.w3.org/2001/04/xmlenc#sha384"
_SIGNATURE: Final = "http://www.w3.org/2000/09/xmldsig#"
_C14N: Final = "http://www.w3.org/2006/12/xml-c14n11"
_ECDSA: Final = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_DIGEST: Final = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_ENVELOPED: Final = f"{_SIGNATURE}enveloped-signature"

_NUMBER: Final = re.compile("0|[1-9][0-9]{0,3}")
_VERSION: Final = re.compile("[!-~]{1,64}")
_MAX_VALUES: Final = 64


@frozen
class RimReference:
    """Which RIM a device was compared with: to find it again by the SHA-256 of its file, and no proof of anything."""

    product: str
    version: str
    edition: Edition
    digest: bytes

    def __str__(self) -> str:
        return f"RIM of {self.product} {self.version} (SHA-256 {self.digest.hex()})"


@frozen(kw_only=True, eq=False)
class VerifiedRim(Proven):
    """A RIM that its signer, under the root, signed.

    ``values`` are the reference values by index, from 0, any of which is good; a measurement of a report has the next
    higher index. ``digest`` is the SHA-256 of the file, ``window`` from when to when its certificates are valid, in
    unix seconds, both inclusive.
    """

    product: str
    version: str
    edition: Edition
    values: dict[int, tuple[bytes, ...]] = field(repr=False)
    digest: bytes
    chain: VerifiedChain = field(repr=False)
    window: Window

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of the steps that it passed."""
        return (*CHAIN_STEPS, *TIME_STEPS, 13, 14, 15, 16, 17)

    @property
    def reference(self) -> RimReference:
        """The values that name it."""
        return RimReference(self.product, self.version, self.edition, self.digest)

    def __str__(self) -> str:
        return str(self.reference)


def verify_rim(data: BytesLike, *, now: int, roots: GpuRoots = NVIDIA) -> VerifiedRim:
    """Verify a RIM at ``now``, in unix seconds (steps 1 to 8 and 13 to 17). Raises `GpuVerificationError`."""
    check_seconds("now", now)
    rim = authenticate_rim(as_bytes(data, "the bytes of a RIM"), roots=roots)
    check_times(rim.chain.terms, now)
    return rim


def authenticate_rim(data: bytes, *, roots: GpuRoots = NVIDIA) -> VerifiedRim:
    """Verify a RIM but for its times, for callers that ask when it is valid. Raises `GpuVerificationError`."""
    check_kind("roots", roots, GpuRoots, "GpuRoots")
    return _authentic(data, roots.rim)


@lru_cache(maxsize=256)
def _authentic(data: bytes, root: TrustedRoot) -> VerifiedRim:
    try:
        document = read(data)  # 13
    except XmlError as exc:
        raise steps.RimFormatError("RIM", str(exc)) from None
    try:
        if document.name != (_SWID, "SoftwareIdentity"):
            raise XmlError("not a SWID tag")
        signature = document.only(_SIGNATURE, "Signature")
        expected, signed, value, ders = _signature_parts(signature)  # 14
    except XmlError as exc:
        raise steps.RimAlgorithmError("RIM", str(exc)) from None
    try:
        document_form = canonical(document, len(data), without=signature)
        signed_form = canonical(signed, len(data))
    except XmlError as exc:
        raise steps.RimFormatError("RIM", str(exc)) from None
    if (got := sha384(document_form).digest()) != expected:  # 15
        raise steps.RimDigestError("RIM", "it was altered after it was signed", got=got, expected=expected)
    chain = verify_chain(ders, root, "RIM signer's")  # 1-6
    try:
        ecdsa.verify_raw(chain.leaf_key, value, signed_form, P384)  # 16
    except ecdsa.InvalidSignature:
        raise steps.RimSignatureError("RIM", "its signer did not sign it") from None
    try:
        product, version, edition = _meta(document.only(_SWID, "Meta"))  # 17
        values = _values(document.only(_SWID, "Payload"))
    except XmlError as exc:
        raise steps.RimContentError("RIM", str(exc)) from None
    return VerifiedRim(
        product=product,
        version=version,
        edition=edition,
        values=values,
        digest=sha256(data).digest(),
        chain=chain,
        window=window(chain.terms),
        proof=PROOF,
    )


def _signature_parts(signature: Element) -> tuple[bytes, Element, bytes, tuple[bytes, ...]]:
    """The digest, the signed part, the signature's value and the signer's chain."""
    signed, value, key_info = signature.members(_SIGNATURE, "SignedInfo", "SignatureValue", "KeyInfo")
    method, algorithm, reference = signed.members(_SIGNATURE, "CanonicalizationMethod", "SignatureMethod", "Reference")
    transforms, digest_method, digest = reference.members(_SIGNATURE, "Transforms", "DigestMethod", "DigestValue")
    enveloped, canonicalized = transforms.members(_SIGNATURE, "Transform", "Transform")
    (data,) = key_info.members(_SIGNATURE, "X509Data")
    certificates = data.elements()
    for element, expected in (
        (method, _C14N),
        (algorithm, _ECDSA),
        (enveloped, _ENVELOPED),
        (canonicalized, _C14N),
        (digest_method, _DIGEST),
    ):
        _check_attributes(element, {"Algorithm": expected})
        if element.content:
            raise XmlError(f"{element.name[1]} is not empty")
    _check_attributes(reference, {"URI": ""})
    for element in (signature, signed, value, key_info, transforms, digest, data, *certificates):
        _check_attributes(element, {})
    if any(certificate.name != (_SIGNATURE, "X509Certificate") for certificate in certificates):
        raise XmlError("X509Data has something else than certificates")
    return _base64(digest), signed, _base64(value), tuple(map(_base64, certificates))


def _check_attributes(element: Element, expected: dict[str, str]) -> None:
    if {name: value for name, (_, value) in element.attributes.items()} != {("", k): v for k, v in expected.items()}:
        raise XmlError(f"{element.name[1]} has other attributes or algorithms than NVIDIA's")


def _base64(element: Element) -> bytes:
    text = "".join(element.text().split())
    try:
        value = a2b_base64(text.encode())
    except Base64Error:
        value = b""
    if not value or b2a_base64(value, newline=False).decode() != text:  # one text for each value
        raise XmlError(f"{element.name[1]} is not base64")
    return value


def _meta(meta: Element) -> tuple[str, str, Edition]:
    product, version, edition = meta.get("product"), meta.get("colloquialVersion"), meta.get("edition")
    if not _VERSION.fullmatch(product) or not _VERSION.fullmatch(version):
        raise XmlError("product or version is not a word")
    if edition == "GPU":
        return product, version, "GPU"
    if edition == "SWITCH":
        return product, version, "SWITCH"
    raise XmlError("it is neither for a GPU nor for a switch")


def _values(payload: Element) -> dict[int, tuple[bytes, ...]]:
    """The active reference values; inactive ones are read as strictly, and left out."""
    found: dict[int, tuple[bytes, ...]] = {}
    seen: set[int] = set()
    for resource in payload.elements():
        if resource.name != (_SWID, "Resource") or resource.get("type") != "Measurement":
            raise XmlError("a resource is not a measurement")
        index, size, count = (_number(resource, name) for name in ("index", "size", "alternatives"))
        active = resource.get("active")
        if index in seen or active not in ("True", "False") or not 1 <= count <= _MAX_VALUES:
            raise XmlError(f"measurement {index} is there twice, or neither active nor inactive, or has no values")
        seen.add(index)
        values = tuple(digits(resource.get(f"Hash{number}", _SHA384)) for number in range(count))
        if any(value is None or len(value) != size for value in values):
            raise XmlError(f"a value of measurement {index} has not its size")
        if active == "True":
            found[index] = tuple(value for value in values if value is not None)
    if not found:
        raise XmlError("no reference value is active")
    return found


def _number(resource: Element, name: str) -> int:
    text = resource.get(name)
    if not _NUMBER.fullmatch(text):
        raise XmlError(f"{name} of a measurement is not a number")
    return int(text)
