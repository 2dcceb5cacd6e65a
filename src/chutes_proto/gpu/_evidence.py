"""Read the evidence of a machine: a JSON list with one object for each device, as hosts' tools write it.

``certificate`` is PEM, leaf first, and ``evidence`` the report, both in base64; ``arch`` is the host's word for the
kind of device. A member ``nonce`` and others beside them are ignored: nothing signs them. The collections of
go-nvattest-tools are read too: an object with ``gpus`` and ``nvswitches``, whose members are called otherwise.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Mapping
from typing import Any, Final, cast

from attrs import field, frozen

from chutes_proto.gpu._certificates import MAX_CHAIN
from chutes_proto.gpu._errors import EvidenceFormatError
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._arguments import BytesLike, as_bytes, check_kind

MAX_SIZE: Final = 1024 * 1024
MAX_DEVICES: Final = 64


@frozen
class DeviceEvidence:
    """One device's evidence, unverified: its report, its chain in PEM, and the host's word for its kind, or None."""

    report: bytes = field(repr=False)
    chain: bytes = field(repr=False)
    arch: str | None = None

    def __attrs_post_init__(self) -> None:
        check_kind("report", self.report, bytes, "bytes")
        check_kind("chain", self.chain, bytes, "bytes")
        check_kind("arch", self.arch, (str, type(None)), "a str, or None")


def parse_evidence(data: BytesLike) -> tuple[DeviceEvidence, ...]:
    """Read the evidence of a machine; there may be none in it. Raises `EvidenceFormatError`."""
    data = as_bytes(data, "the bytes of evidence")
    try:
        value = cast("Any", strict_json.decode(data, limit=MAX_SIZE, fractions=True))
    except strict_json.JsonError as exc:
        raise _refused(exc.problem) from None
    entries: Any = value
    read = _entry
    if isinstance(value, dict):
        collection = cast("dict[str, Any]", value)
        if not collection.keys() & {"gpus", "nvswitches"}:
            raise _refused("neither a list of devices nor a collection of gpus and nvswitches")
        entries = [*_listed(collection.get("gpus", [])), *_listed(collection.get("nvswitches", []))]
        read = _collected
    found = _listed(entries)
    if len(found) > MAX_DEVICES:
        raise _refused(f"more than {MAX_DEVICES} devices")
    return tuple(read(number, entry) for number, entry in enumerate(found))


def _listed(value: object) -> list[object]:
    if not isinstance(value, list):
        raise _refused("not a list of devices")
    return cast("list[object]", value)


def _entry(number: int, entry: object) -> DeviceEvidence:
    match entry:
        case {"certificate": str(chain), "evidence": str(report), "arch": str(arch)}:
            return DeviceEvidence(_decoded(number, report), _decoded(number, chain), arch)
        case {"certificate": str(chain), "evidence": str(report)} if "arch" not in cast("Mapping[str, Any]", entry):
            return DeviceEvidence(_decoded(number, report), _decoded(number, chain))
        case _:
            raise _refused(f"device {number}: the strings certificate, evidence and arch are not all there")


def _collected(number: int, entry: object) -> DeviceEvidence:
    match entry:
        case {
            "AttestationReport": {"py/b64": str(report)},
            "CertificateChains": {"GpuAttestationCertificateChain": object() as chain},
        }:
            arch = cast("Mapping[str, Any]", entry).get("Arch")
        case {"attestation_report": {"py/b64": str(report)}, "attestation_cert_chain": object() as chain}:
            arch = "LS10"
        case _:
            raise _refused(f"device {number}: the report or the certificate chain is not there")
    certificates = _listed(chain)
    if len(certificates) > MAX_CHAIN:
        raise _refused(f"device {number}: more than {MAX_CHAIN} certificates")
    pem = b"".join(_decoded(number, _pem(number, certificate)) for certificate in certificates)
    return DeviceEvidence(_decoded(number, report), pem, arch if isinstance(arch, str) else None)


def _pem(number: int, certificate: object) -> str:
    match certificate:
        case {"pem": str(text)}:
            return text
        case _:
            raise _refused(f"device {number}: a certificate is not there")


def _decoded(number: int, text: str) -> bytes:
    try:
        return a2b_base64(text.encode(), strict_mode=True)
    except Base64Error:
        raise _refused(f"device {number}: it is not base64") from None


def _refused(problem: str) -> EvidenceFormatError:
    return EvidenceFormatError("evidence", problem)
