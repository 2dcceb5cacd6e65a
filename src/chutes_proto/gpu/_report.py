"""Read a device's report: an SPDM 1.1 GET_MEASUREMENTS request and the response to it, one after the other.

Rules kept here:

* every length is exact; nothing is left over but zeros after the signature, which some hosts send;
* no measurement and no opaque field twice; fields that are not known are kept, and mean nothing;
* measurements are numbered as in the report, from 1: a RIM's index is one less.

Sources: DMTF DSP0274 (SPDM) 1.1.2, 10.11; NVIDIA's public verifiers for the opaque fields.
"""

from __future__ import annotations

from struct import Struct as Layout
from typing import Final

from msgspec import Struct

from chutes_proto.gpu._errors import EvidenceFormatError
from chutes_proto.quote._arguments import BytesLike, as_bytes

MAX_SIZE: Final = 32 * 1024
"""More bytes than any report has: those of a GPU have about 4200."""

NONCE_SIZE: Final = 32
SIGNATURE_SIZE: Final = 96
MAX_PADDING: Final = 64

_REQUEST: Final = Layout("<BBBB32sB")
_RESPONSE: Final = Layout("<BBBBB3s")
_BLOCK: Final = Layout("<BBHBH")
_FIELD: Final = Layout("<HH")
_DMTF_HEADER: Final = 3
_GET_MEASUREMENTS: Final = (0x11, 0xE0)
_MEASUREMENTS: Final = (0x11, 0x60)

DRIVER, VBIOS, NVDEC, CHIP_SKU, PROJECT, PROJECT_SKU, FWID = 3, 6, 11, 15, 17, 18, 20
PROTECTED_PCIE, SWITCH_PDI, CHIP, FEATURE = 21, 22, 35, 36

_PDI_SIZE: Final = 8
_VBIOS_SIZE: Final = 8
_ENABLED: Final = b"\xaa"
_DISABLED: Final = b"\x55"
_MODES: Final = {0: "SPT", 1: "MPT", 2: "PPCIE"}


class Report(Struct, frozen=True, eq=False):
    """The content of a report; nothing of it is verified here.

    ``measurements`` are by their SPDM index, ``fields`` the opaque fields by their type. ``signed`` are the bytes that
    ``signature`` (r ‖ s, 96 bytes) is over. The texts are None where the report lacks their field. ``mode`` is ``SPT``,
    ``MPT`` or ``PPCIE`` (one GPU or several passed through, protected PCIe), another text for a number that is not
    known, or None.
    """

    nonce: bytes
    measurements: dict[int, bytes]
    fields: dict[int, bytes]
    signed: bytes
    signature: bytes
    driver: str | None
    vbios: str | None
    chip: str | None
    project: str | None
    project_sku: str | None
    chip_sku: str | None
    mode: str | None

    @property
    def fwid(self) -> bytes | None:
        """The firmware's digest."""
        return self.fields.get(FWID)

    @property
    def nvdec(self) -> bytes | None:
        """The state of the video decoder as it stands in the report."""
        return self.fields.get(NVDEC)

    @property
    def pdis(self) -> tuple[bytes, ...]:
        """The identifiers of the switch ports beside the device, 8 bytes each."""
        value = self.fields.get(SWITCH_PDI, b"")
        return tuple(value[start : start + _PDI_SIZE] for start in range(0, len(value), _PDI_SIZE))


def parse_report(data: BytesLike) -> Report:
    """Read a report. Raises `EvidenceFormatError`."""
    data = as_bytes(data, "the bytes of a report")
    if len(data) > MAX_SIZE:
        raise _refused(f"more than {MAX_SIZE} bytes")
    if len(data) < _REQUEST.size + _RESPONSE.size:
        raise _refused("too few bytes for a report")
    version, code, _, _, nonce, _ = _REQUEST.unpack_from(data)
    if (version, code) != _GET_MEASUREMENTS:
        raise _refused("it does not begin with a GET_MEASUREMENTS request of SPDM 1.1")
    version, code, _, _, count, length = _RESPONSE.unpack_from(data, _REQUEST.size)
    if (version, code) != _MEASUREMENTS:
        raise _refused("no MEASUREMENTS response of SPDM 1.1 follows the request")
    start = _REQUEST.size + _RESPONSE.size
    stop = start + int.from_bytes(length, "little")
    opaque = stop + NONCE_SIZE + 2
    if len(data) < opaque:
        raise _refused("the measurements are cut off")
    measurements = _blocks(data, start, stop, count)
    end = opaque + int.from_bytes(data[opaque - 2 : opaque], "little")
    if len(data) < end + SIGNATURE_SIZE:
        raise _refused("the opaque data or the signature is cut off")
    padding = data[end + SIGNATURE_SIZE :]
    if len(padding) > MAX_PADDING or any(padding):
        raise _refused("there are bytes after the signature")
    fields = _fields(data, opaque, end)
    return Report(
        nonce=nonce,
        measurements=measurements,
        fields=fields,
        signed=data[:end],
        signature=data[end : end + SIGNATURE_SIZE],
        driver=_text(fields, DRIVER),
        vbios=_vbios(fields.get(VBIOS)),
        chip=_text(fields, CHIP),
        project=_text(fields, PROJECT),
        project_sku=_text(fields, PROJECT_SKU),
        chip_sku=_text(fields, CHIP_SKU),
        mode=_mode(fields),
    )


def _blocks(data: bytes, pos: int, stop: int, count: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for _ in range(count):
        if pos + _BLOCK.size > stop:
            raise _refused("fewer measurements than it says")
        index, specification, size, _, value_size = _BLOCK.unpack_from(data, pos)
        if specification != 1 or size != value_size + _DMTF_HEADER:
            raise _refused("a measurement is not of DMTF's form")
        value = pos + _BLOCK.size
        pos = value + value_size
        if index in found or not value_size or pos > stop:
            raise _refused("a measurement is there twice, empty or cut off")
        found[index] = data[value:pos]
    if pos != stop:
        raise _refused("more measurements than it says")
    return found


def _fields(data: bytes, pos: int, end: int) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while pos < end:
        if pos + _FIELD.size > end:
            raise _refused("an opaque field is cut off")
        kind, size = _FIELD.unpack_from(data, pos)
        value = pos + _FIELD.size
        pos = value + size
        if kind in found or pos > end:
            raise _refused("an opaque field is there twice or cut off")
        found[kind] = data[value:pos]
    return found


def _text(fields: dict[int, bytes], kind: int) -> str | None:
    """A text, which zeros may follow; None for none."""
    value = fields.get(kind, b"").rstrip(b"\0").strip()
    if not value:
        return None
    if not value.isascii() or not (text := value.decode("ascii")).isprintable():
        raise _refused(f"the opaque field {kind} is not a text")
    return text


def _vbios(value: bytes | None) -> str | None:
    """The version as people write it: a GPU has a number whose halves are the other way round, a switch a text."""
    if value is None:
        return None
    if len(value) != _VBIOS_SIZE:
        return _text({VBIOS: value}, VBIOS)
    number = value[::-1]
    return ".".join(f"{byte:02X}" for byte in (*number[4:], number[3]))


def _mode(fields: dict[int, bytes]) -> str | None:
    """The mode, as newer drivers say it, or as it follows from protected PCIe, which older ones say."""
    if (feature := fields.get(FEATURE)) is not None:
        number = int.from_bytes(feature, "little")
        return _MODES.get(number, f"mode {number}")
    return {_ENABLED: "PPCIE", _DISABLED: "SPT"}.get(fields.get(PROTECTED_PCIE, b""))


def _refused(problem: str) -> EvidenceFormatError:
    return EvidenceFormatError("report", problem)
