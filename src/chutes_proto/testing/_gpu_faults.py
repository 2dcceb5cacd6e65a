"""Faults of simulated GPUs, by name: one closed table.

One row is one fault and nothing else: everything that it does not name stays as honest devices and services make it,
with signatures to match, so that the check which refuses it is the check it was made for. A fault of a device is of the
machine's first one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

from attrs import evolve, field, frozen

from chutes_proto.auth import der
from chutes_proto.gpu._evidence import DeviceEvidence
from chutes_proto.quote import _der as reader
from chutes_proto.testing._gpu_drafts import (
    BEGIN,
    COMPOSITE_ID,
    END,
    TCB_INFO,
    GpuCertificate,
    ReportDraft,
    RimDraft,
    StatusDraft,
    block,
    generalized,
    revoked,
    tcb_info,
)
from chutes_proto.testing._pki import Keys, flipped

T = TypeVar("T")
Change: TypeAlias = Callable[[T], T]
Chain: TypeAlias = tuple[bytes, ...]


def unchanged(value: T) -> T:
    return value


@frozen
class GpuFault:
    """One fault: everything that honest devices and services make passes through these changes.

    ``what`` describes it in one line. ``leaf``, ``brom`` and ``ca`` change the first device's certificates, ``chain``
    them in DER, ``pem`` them as text, ``report`` its report before it is signed, ``raw`` after that; ``devices`` the
    list of all devices. ``status`` changes the OCSP answers about the keys whose labels begin with ``about``.
    """

    name: str
    what: str
    leaf: Change[GpuCertificate] = field(default=unchanged, kw_only=True)
    brom: Change[GpuCertificate] = field(default=unchanged, kw_only=True)
    ca: Change[GpuCertificate] = field(default=unchanged, kw_only=True)
    chain: Change[Chain] = field(default=unchanged, kw_only=True)
    pem: Change[bytes] = field(default=unchanged, kw_only=True)
    report: Change[ReportDraft] = field(default=unchanged, kw_only=True)
    raw: Change[bytes] = field(default=unchanged, kw_only=True)
    devices: Change[tuple[DeviceEvidence, ...]] = field(default=unchanged, kw_only=True)
    driver_rim: Change[RimDraft] = field(default=unchanged, kw_only=True)
    vbios_rim: Change[RimDraft] = field(default=unchanged, kw_only=True)
    rim_signer: Change[GpuCertificate] = field(default=unchanged, kw_only=True)
    rims: Change[Chain] = field(default=unchanged, kw_only=True)
    about: str = field(default="", kw_only=True)
    status: Change[StatusDraft] = field(default=unchanged, kw_only=True)
    answers: Change[dict[str, bytes]] = field(default=unchanged, kw_only=True)


def _set(**changes: Any) -> Change[Any]:
    return lambda value: evolve(value, **changes)


def _field(kind: int, value: bytes | None) -> Change[ReportDraft]:
    def change(report: ReportDraft) -> ReportDraft:
        fields = {number: old for number, old in report.fields.items() if number != kind}
        return evolve(report, fields=fields if value is None else {**fields, kind: value})

    return change


def _measurement(index: int, value: bytes | None) -> Change[ReportDraft]:
    def change(report: ReportDraft) -> ReportDraft:
        rest = {number: old for number, old in report.measurements.items() if number != index}
        return evolve(report, measurements=rest if value is None else {**rest, index: value})

    return change


def _text(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


def _content(name: str, what: str, old: str, new: str) -> GpuFault:
    """A driver RIM with another text, which is signed."""
    return GpuFault(name, what, driver_rim=_set(unsigned=_text(old, new)))


def _form(name: str, what: str, old: str, new: str) -> GpuFault:
    """A driver RIM with another text after it was signed."""
    return GpuFault(name, what, driver_rim=_set(signed=_text(old, new)))


def _info(name: str, what: str, old: str, new: str) -> GpuFault:
    """A driver RIM whose signed part says something else, and is signed so."""
    return GpuFault(name, what, driver_rim=_set(signed_info=_text(old, new)))


def _status(name: str, what: str, about: str = "Simulated GH100 ICA", **changes: Any) -> GpuFault:
    return GpuFault(name, what, about=about, status=_set(**changes))


def _single(change: Callable[[StatusDraft], bytes]) -> Change[StatusDraft]:
    return lambda draft: evolve(draft, single=change(draft))


def _without(prefix: str) -> Change[dict[str, bytes]]:
    return lambda answers: {key: value for key, value in answers.items() if not key.startswith(prefix)}


def _unsigned(text: str) -> str:
    before, _, rest = text.partition("<ds:Signature ")
    return before + rest.partition("</ds:Signature>")[2]


def _corrected(draft: RimDraft) -> RimDraft:
    return evolve(draft, values={**draft.values, 9: (bytes(47) + b"\3",)})


def _members(data: bytes) -> list[bytes]:
    start, stop = reader.only(data, 0, len(data), reader.SEQUENCE)
    return [reader.whole(data, element) for element in reader.elements(data, start, stop)]


def _with_version(data: bytes) -> bytes:
    return der.sequence(der.tlv(0xA0, der.integer(0)), *_members(data))


def _without_responder(data: bytes) -> bytes:
    return der.sequence(der.tlv(0xA3, b""), *_members(data)[1:])


def _with_integer(data: bytes) -> bytes:
    return der.sequence(*_members(data), der.integer(1))


def _with_large_extension(data: bytes) -> bytes:
    return der.sequence(*_members(data), der.tlv(0xA1, bytes(70_000)))


def _self_signed() -> bytes:
    keys = Keys(b"another world of simulated GPUs")
    return GpuCertificate(common_name="Other", key="other", issuer="Other", signer="other").der(keys)


def _twice(devices: tuple[DeviceEvidence, ...]) -> tuple[DeviceEvidence, ...]:
    return (devices[0], *devices)


def _responder(**changes: Any) -> Change[StatusDraft]:
    return lambda draft: evolve(draft, responder=evolve(draft.responder, **changes))


_LONG_AGO: Final = BEGIN + 86400
_OTHER: Final = bytes(47) + b"\2"
_RESOURCE: Final = 'index="5" size="48"'
_SIGNER: Final = "Simulated RIM Signer"
_XML: Final = "http://www.w3.org/XML/1998/namespace"
_NAMESPACES: Final = "".join(f' xmlns:p{number}="u"' for number in range(70))
_QUOTES: Final = "<x y='" + '"' * 100_000 + "'/>"
_RIM_CA: Final = "Simulated Reference Value CA"

_TABLE = (
    # The report's form
    GpuFault("report_truncated", "the report ends inside its measurements", raw=lambda raw: raw[:2000]),
    GpuFault("report_short", "the report ends inside the request", raw=lambda raw: raw[:20]),
    GpuFault("report_no_signature", "the report ends inside its signature", raw=lambda raw: raw[:-1]),
    GpuFault("report_trailing", "bytes after the signature", raw=lambda raw: raw + b"\0\1"),
    GpuFault("report_large", "a report of 40 kB", report=_field(99, bytes(40_000))),
    GpuFault("request_version", "a request of SPDM 1.2", report=_set(versions=(0x12, 0x11))),
    GpuFault("response_version", "a response of SPDM 1.2", report=_set(versions=(0x11, 0x12))),
    GpuFault("blocks_fewer", "fewer measurements than the report says", report=_set(count=65)),
    GpuFault("blocks_more", "more measurements than the report says", report=_set(count=63)),
    GpuFault("block_twice", "a measurement twice", report=_set(blocks=block(1, b"a") * 2, count=2)),
    GpuFault(
        "block_kind", "a measurement not of DMTF's form", report=_set(blocks=block(1, b"a", specification=2), count=1)
    ),
    GpuFault("block_size", "a measurement with two sizes", report=_set(blocks=block(1, b"a", size=9), count=1)),
    GpuFault("block_cut", "a measurement that is cut off", report=_set(blocks=block(1, b"ab")[:-1], count=1)),
    GpuFault("field_twice", "an opaque field twice", report=_set(opaque=b"\3\0\1\0x" * 2)),
    GpuFault("field_cut", "an opaque field that is cut off", report=_set(opaque=b"\3\0\2\0x")),
    GpuFault("field_head_cut", "an opaque field without a length", report=_set(opaque=b"\3\0\2")),
    GpuFault("driver_not_text", "a driver version that is not a text", report=_field(3, b"\x07\x07")),
    GpuFault("chip_not_ascii", "a chip that is not ASCII", report=_field(35, "Ä".encode())),
    # The device's certificates
    GpuFault("chain_garbage", "a chain that is not PEM", pem=lambda _: b"no certificates"),
    GpuFault("chain_long", "a chain with too many certificates", chain=lambda chain: (*chain, *chain)),
    GpuFault("chain_leaf_only", "a device certificate that the root issued", chain=lambda chain: chain[-1:]),
    GpuFault("leaf_sha256", "a device certificate signed with SHA-256", leaf=_set(algorithm="1.2.840.10045.4.3.2")),
    GpuFault("leaf_p256", "a device key on P-256", leaf=_set(curve="P-256")),
    GpuFault("leaf_off_curve", "a device key that is not a point", leaf=_set(off_curve=True)),
    GpuFault("leaf_is_ca", "a device certificate of a CA", leaf=_set(ca=True)),
    GpuFault("leaf_may_issue", "a device certificate that may issue", leaf=_set(usage=bytes.fromhex("03020284"))),
    GpuFault("leaf_no_usage", "a device certificate without a key usage", leaf=_set(usage=None)),
    GpuFault("brom_not_ca", "the certificate of the key in the chip is not a CA's", brom=_set(ca=False)),
    GpuFault("brom_may_not_issue", "the key in the chip may not issue", brom=_set(usage=bytes.fromhex("03020780"))),
    GpuFault("ca_path_length", "a CA that may have no CAs below it", ca=_set(path_length=0)),
    GpuFault("other_root", "the chain ends at another root", chain=lambda chain: (*chain[:-1], _self_signed())),
    GpuFault("root_missing_ca", "a chain that does not lead to the root", chain=lambda chain: chain[:2]),
    GpuFault("chain_missing_ica", "a chain without one of its CAs", chain=lambda chain: (*chain[:2], *chain[3:])),
    GpuFault("leaf_signature", "a bit of the device certificate's signature flipped", leaf=_set(flip=True)),
    GpuFault("brom_not_yet_valid", "a certificate that is not yet valid", brom=_set(not_before=END - 1)),
    GpuFault("brom_expired", "an expired certificate", brom=_set(not_after=_LONG_AGO)),
    # Chip, firmware, signature, nonce
    GpuFault("leaf_unknown_chip", "a device certificate of an unknown chip", leaf=_set(common_name="GA100 A01 LF")),
    GpuFault("leaf_no_chip", "a device certificate that names no chip", leaf=_set(common_name="device")),
    GpuFault("report_other_chip", "a report of another kind of chip", report=_field(35, b"GB100\0")),
    GpuFault("report_unknown_chip", "a report of an unknown chip", report=_field(35, b"XX1\0")),
    GpuFault(
        "arch_other",
        "the host calls the device another kind",
        devices=lambda devices: (evolve(devices[0], arch="BLACKWELL"), *devices[1:]),
    ),
    GpuFault("fwid_other", "other firmware than the device certificate's", report=_field(20, _OTHER)),
    GpuFault("fwid_uncertified", "a device certificate without firmware", leaf=_set(extensions={})),
    GpuFault(
        "fwid_garbage", "a device certificate with malformed firmware", leaf=_set(extensions={COMPOSITE_ID: b"\x30\0"})
    ),
    GpuFault(
        "fwid_not_list",
        "a device certificate with DICE information without firmware",
        leaf=_set(extensions={TCB_INFO: der.sequence(der.tlv(0x80, b"x"))}),
    ),
    GpuFault(
        "fwid_not_sequence",
        "a device certificate with firmware of another form",
        leaf=_set(extensions={TCB_INFO: der.sequence(der.tlv(0xA6, der.integer(1)))}),
    ),
    GpuFault(
        "fwid_short", "a device certificate with a short digest", leaf=_set(extensions={TCB_INFO: tcb_info(b"x")})
    ),
    GpuFault("report_signature", "a bit of the report's signature flipped", raw=flipped),
    GpuFault("report_altered", "a bit of a measurement flipped after signing", raw=lambda raw: flipped(raw, 60)),
    GpuFault("nonce_other", "a report over another nonce", report=lambda draft: evolve(draft, nonce=bytes(32))),
    # The form of RIMs
    _form("rim_doctype", "a RIM with a DTD", "<SoftwareIdentity", "<!DOCTYPE x><SoftwareIdentity"),
    _form("rim_comment", "a RIM with a comment", "<Payload>", "<Payload><!-- -->"),
    _form("rim_cdata", "a RIM with a CDATA section", "<Payload>", "<Payload><![CDATA[ ]]>"),
    _form("rim_instruction", "a RIM with a processing instruction", "<Payload>", "<Payload><?x?>"),
    _form("rim_cut", "a RIM that ends early", "</SoftwareIdentity>", ""),
    _form("rim_large", "a RIM of 300 kB", "<Payload>", "<Payload>" + " " * 300_000),
    _form("rim_deep", "a RIM of many levels", "<Payload>", "<Payload>" + "<x>" * 20 + "</x>" * 20),
    _form("rim_namespaces", "a RIM of 70 namespaces", "<Payload>", f"<Payload{_NAMESPACES}>"),
    _form("rim_escapes", "a RIM whose canonical form is much longer", "<Payload>", "<Payload>" + _QUOTES),
    _form("rim_encoding", "a RIM in another encoding", "<Soft", '<?xml version="1.0" encoding="latin-1"?><Soft'),
    _form("rim_xml_attribute", "a RIM with an attribute of XML itself", "<Payload>", '<Payload xml:lang="en">'),
    _form("rim_prefix", "a RIM with an unknown prefix", "<Payload>", "<Payload><x:y/>"),
    _form("rim_prefix_xml", "a RIM that declares the prefix xml", "<Payload>", f'<Payload xmlns:xml="{_XML}">'),
    _form("rim_prefix_empty", "a RIM with a prefix for nothing", "<Payload>", '<Payload xmlns:x="">'),
    _form(
        "rim_attribute_twice",
        "a RIM with an attribute twice",
        "<Meta ",
        '<Meta xmlns:a="u" xmlns:b="u" a:x="" b:x="" ',
    ),
    # The signature of RIMs
    _form("rim_not_swid", "a RIM that is not a SWID tag", "/2015/schema.xsd", "/2016/schema.xsd"),
    GpuFault("rim_unsigned", "a RIM without a signature", driver_rim=_set(signed=_unsigned)),
    _form("rim_text_in_signature", "a RIM with text in its signature", "<ds:KeyInfo>", "text<ds:KeyInfo>"),
    _form("rim_no_key_info", "a RIM with other parts of a signature", "<ds:X509Data>", "<ds:X509Data/><ds:X509Data>"),
    _form(
        "rim_not_certificate", "a RIM with another part beside certificates", "<ds:X509Data>", "<ds:X509Data><ds:x/>"
    ),
    _form("rim_certificate_id", "a RIM with an attribute in its signature", "<ds:KeyInfo>", '<ds:KeyInfo Id="x">'),
    _form("rim_base64_cut", "a RIM whose signature is cut off", "</ds:SignatureValue>", "A</ds:SignatureValue>"),
    _form("rim_not_base64", "a RIM whose signature is not base64", "<ds:SignatureValue>", "<ds:SignatureValue>*"),
    _form(
        "rim_nested_value",
        "a RIM with an element in its signature's value",
        "<ds:SignatureValue>",
        "<ds:SignatureValue><ds:x/>",
    ),
    _info("rim_algorithm", "a RIM signed with SHA-1", "#ecdsa-sha384", "#ecdsa-sha1"),
    _info("rim_reference", "a RIM of which a part is signed", 'URI=""', 'URI="#x"'),
    _info(
        "rim_transform_content",
        "a RIM with something in a transform",
        'enveloped-signature">',
        'enveloped-signature">x',
    ),
    _form("rim_altered", "a RIM with another value after signing", _RESOURCE, 'index="6" size="48"'),
    GpuFault("rim_other_key", "a RIM that another key signed", driver_rim=_set(other_key=True)),
    GpuFault("rim_signer_is_ca", "a RIM signer that is a CA", rim_signer=_set(ca=True)),
    GpuFault("rim_signer_expired", "a RIM signer that expired", rim_signer=_set(not_before=BEGIN, not_after=_LONG_AGO)),
    # The content of RIMs
    _content("rim_no_meta", "a RIM with meta data twice", "<Meta ", "<Meta></Meta><Meta "),
    _content("rim_no_version", "a RIM without a version", "colloquialVersion", "anotherVersion"),
    _content("rim_no_product", "a RIM without a product", 'product="GH100"', 'product=""'),
    _content("rim_edition", "a RIM for neither GPU nor switch", 'edition="GPU"', 'edition="CPU"'),
    _content("rim_not_measurement", "a RIM with another resource", 'type="Measurement"', 'type="File"'),
    _content("rim_index_twice", "a RIM with an index twice", _RESOURCE, 'index="6" size="48"'),
    _content("rim_index_word", "a RIM with an index that is not a number", _RESOURCE, 'index="five" size="48"'),
    _content("rim_size", "a RIM with a value that has not its size", _RESOURCE, 'index="5" size="47"'),
    _content("rim_no_value", "a RIM without a value", "sha384:Hash0", "sha384:Hash9"),
    _content("rim_not_hex", "a RIM with a value that is not hex", 'Hash0="00', 'Hash0="xx'),
    _content("rim_active", "a RIM that is neither active nor inactive", 'active="False"', 'active="false"'),
    _content("rim_alternatives", "a RIM with no alternatives", 'alternatives="1"', 'alternatives="0"'),
    GpuFault("rim_no_active", "a RIM without an active value", driver_rim=_set(values={})),
    GpuFault("rim_other_product", "a RIM of another chip", driver_rim=_set(product="GB100")),
    GpuFault("rim_driver_missing", "no RIM for the driver", driver_rim=_set(version="1.0")),
    GpuFault("rim_vbios_missing", "no RIM for the VBIOS", vbios_rim=_set(version="1.0")),
    GpuFault("rim_conflict", "an index in both RIMs", vbios_rim=_set(values={5: (_OTHER,)})),
    GpuFault("rims_none", "no RIMs", rims=lambda _: ()),
    # Revocation
    _status("status_unauthorized", "an OCSP service that does not know the certificate", status=6),
    GpuFault("status_garbage", "an OCSP answer that is not DER", answers=lambda answers: {**answers, "x": b"\x30\1x"}),
    _status("status_large", "an OCSP answer of 70 kB", signed=_with_large_extension),
    _status("status_digest", "an OCSP answer with an unknown digest", digest="1.2.3"),
    _status("status_state", "an OCSP answer with an unknown state", state=b"\x85\0"),
    GpuFault(
        "status_endless",
        "an OCSP answer without an end",
        about="Simulated GH100 ICA",
        status=_single(lambda draft: der.sequence(der.sequence(), b"\x80\0", generalized(draft.this_update))),
    ),
    GpuFault(
        "status_not_sequence", "an OCSP answer that is a number", about="BROM", status=_single(lambda _: der.integer(1))
    ),
    GpuFault(
        "status_responder_usage",
        "a responder that may not sign OCSP answers",
        about="Simulated GH100 ICA",
        status=_responder(extensions={}),
    ),
    GpuFault(
        "status_responder_garbage",
        "a responder with malformed usage",
        about="Simulated GH100 ICA",
        status=_responder(extensions={"2.5.29.37": b"x"}),
    ),
    GpuFault(
        "status_responder_expired",
        "a responder that expired",
        about="Simulated GH100 ICA",
        status=_responder(not_after=_LONG_AGO),
    ),
    _status("status_responder_name", "an OCSP answer of a responder with another name", by_name=True, other_name=True),
    _status("status_signature", "a bit of an OCSP answer's signature flipped", flip=True),
    GpuFault("status_missing", "no OCSP answer about a CA", answers=_without("Simulated GH100 ICA")),
    GpuFault("status_missing_rim", "no OCSP answer about the RIM signer", answers=_without(_SIGNER)),
    _status("status_unknown", "an OCSP answer that says unknown", state=b"\x82\0"),
    _status("status_future", "an OCSP answer of the future", this_update=END - 1, next_update=END),
    _status("status_expired", "an OCSP answer that ended", this_update=BEGIN, next_update=_LONG_AGO),
    _status("revoked", "a revoked CA", state=revoked(_LONG_AGO, None)),
    _status("revoked_reason", "a CA that is revoked for a compromise", state=revoked(_LONG_AGO, 1)),
    _status("device_on_hold", "a key in a chip that is on hold", about="BROM", state=revoked(_LONG_AGO, 6)),
    _status("rim_signer_on_hold", "a RIM signer that is on hold", about=_SIGNER, state=revoked(_LONG_AGO, 6)),
    _status("rim_ca_on_hold", "the CA of a RIM signer that is on hold", about=_RIM_CA, state=revoked(_LONG_AGO, 6)),
    # Measurements and the machine
    GpuFault("nvdec_state", "a decoder that is neither enabled nor disabled", report=_field(11, b"\0")),
    GpuFault("measurement", "another measurement at index 9", report=_measurement(10, _OTHER)),
    GpuFault("measurement_vbios", "another measurement at index 52", report=_measurement(53, _OTHER)),
    GpuFault("measurement_missing", "no measurement at index 9", report=_measurement(10, None)),
    GpuFault("measurement_35", "another measurement at index 35, of the decoder", report=_measurement(36, _OTHER)),
    GpuFault("duplicate", "one device twice", devices=_twice),
    GpuFault("empty", "no device", devices=lambda _: ()),
    # Honest, but unusual
    GpuFault("leaf_renewed", "a device certificate after an update of firmware", leaf=_set(key="updated")),
    GpuFault("rim_corrected", "a corrected RIM, with another value at index 9", driver_rim=_corrected),
    GpuFault("driver_none", "a report without a driver", report=_field(3, None)),
    GpuFault("driver_word", "a driver whose version is a word", report=_field(3, b"beta\0")),
    GpuFault("vbios_none", "a report without a VBIOS", report=_field(6, None)),
    GpuFault("leaf_no_name", "a device certificate without a name", leaf=_set(common_name=None)),
    _form("rim_declared", "a RIM with an XML declaration", "<Soft", '<?xml version="1.0" encoding="utf-8"?>\n<Soft'),
    _status("status_version", "an OCSP answer that spells its version out", signed=_with_version),
    _status("status_no_responder", "an OCSP answer that names no responder", signed=_without_responder),
    _status("status_extensions", "an OCSP answer with malformed extensions", signed=_with_integer),
    _status("status_certificates", "an OCSP answer with malformed certificates", certificates=der.integer(1)),
    _status("status_by_issuer", "an OCSP answer by the issuer itself", by_issuer=True),
    _status("status_by_name", "an OCSP answer that names its responder", by_name=True),
    GpuFault("driver_old", "an old driver", report=_field(3, b"535.1\0"), driver_rim=_set(version="535.1")),
    GpuFault("mode_ppcie", "protected PCIe", report=_field(36, b"\2\0")),
    GpuFault("mode_unknown", "a mode that does not exist", report=_field(36, b"\x09\0")),
    GpuFault("board_unknown", "a board that is not known", report=_field(17, b"X000\0")),
)
GPU_FAULTS: Final = {fault.name: fault for fault in _TABLE}
