"""Who the platform is: the SGX extension of its PCK certificate.

Rules kept here:

* every item that Intel's profile has is there once, of its type and length; an unknown one is refused;
* the components of the TCB, which decide about TCB levels, equal the CPUSVN.

Source: Intel SGX PCK Certificate and CRL Profile Specification, 1.3.5.
"""

from __future__ import annotations

from itertools import product
from typing import Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto.quote import der
from chutes_proto.quote.certificates import SGX_EXTENSION
from chutes_proto.quote.der import DerError
from chutes_proto.quote.layout import Tee

Ca: TypeAlias = Literal["platform", "processor"]
SgxType: TypeAlias = Literal["standard", "scalable", "scalable with integrity"]

_HEAD: Final = bytes([der.OBJECT_IDENTIFIER, len(SGX_EXTENSION) + 1]) + SGX_EXTENSION
_TCB_HEAD: Final = bytes([der.OBJECT_IDENTIFIER, len(SGX_EXTENSION) + 2]) + SGX_EXTENSION + b"\x02"
_INTEGERS: Final = tuple(bytes([der.INTEGER, 1, n] if n < 0x80 else [der.INTEGER, 2, 0, n]) for n in range(256))
"""The DER of the numbers of one byte."""
_NAMES: Final = tuple(_TCB_HEAD + bytes([arc]) for arc in range(1, 17))
_HEADS: Final = tuple(tuple(bytes([der.SEQUENCE, len(name) + size]) + name for name in _NAMES) for size in (3, 4))
"""What stands before the number of each component, by the size of that number's DER."""
_ITEM: Final = len(_HEADS[0][0]) + 3
_COMPONENTS: Final = b"".join(head + _INTEGERS[0] for head in _HEADS[0])
"""The DER of sixteen components of which each has one byte: the last of each `_ITEM` bytes is its number."""
_KNOWN: Final = frozenset(range(1, 8))
_NEEDED: Final = _KNOWN - {6, 7}


def _configuration(*flags: bool | None) -> bytes:
    """The DER of the platform configuration with these flags; None leaves one out."""
    content = b""
    for arc, flag in enumerate(flags, 1):
        if flag is not None:
            name = SGX_EXTENSION + bytes([7, arc])
            content += bytes([der.SEQUENCE, len(name) + 5, der.OBJECT_IDENTIFIER, len(name)]) + name
            content += bytes([der.BOOLEAN, 1, 0xFF * flag])
    return bytes([der.SEQUENCE, len(content)]) + content


_FLAGS: Final = {b"": (None, None, None)} | {
    _configuration(*flags): flags for flags in product((True, False, None), repeat=3)
}
"""Dynamic platform, cached keys and SMT, by the DER of the platform configuration; there are few."""
_SGX_TYPES: Final[tuple[SgxType, ...]] = ("standard", "scalable", "scalable with integrity")


@frozen
class PckIdentity:
    """What the PCK certificate says of a platform, and so what collateral to ask for: ``fmspc``, ``ca`` and ``tee``.

    The last three fields and ``platform_instance_id`` are known under the platform CA only.
    """

    fmspc: bytes
    pce_id: bytes
    ca: Ca
    tee: Tee
    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    sgx_type: SgxType
    platform_instance_id: bytes | None = None
    dynamic_platform: bool | None = None
    cached_keys: bool | None = None
    smt: bool | None = None

    @property
    def components(self) -> bytes:
        """The sixteen SVNs of the SGX TCB components, a byte each: they equal ``cpu_svn``."""
        return self.cpu_svn


def read_pck_extension(value: bytes, *, ca: Ca, tee: Tee) -> PckIdentity:
    """The identity in the SGX extension's value. Raises `DerError`."""
    items = _items(value, *der.only(value, 0, len(value), der.SEQUENCE), _HEAD)
    if not _NEEDED <= items.keys() <= _KNOWN:
        raise DerError("an item of the SGX extension is missing or not known")
    cpu_svn, pce_svn = _tcb(items[2])
    flags = _FLAGS.get(items.get(7, b""))
    if flags is None:
        raise DerError("the platform configuration is not a SEQUENCE of the flags that are known, in their order")
    return PckIdentity(
        ppid=_octets(items[1], 16, "PPID"),
        cpu_svn=cpu_svn,
        pce_svn=pce_svn,
        pce_id=_octets(items[3], 2, "PCE-ID"),
        fmspc=_octets(items[4], 6, "FMSPC"),
        sgx_type=_sgx_type(items[5]),
        platform_instance_id=_octets(items[6], 16, "platform instance id") if 6 in items else None,
        dynamic_platform=flags[0],
        cached_keys=flags[1],
        smt=flags[2],
        ca=ca,
        tee=tee,
    )


def _items(value: bytes, start: int, stop: int, head: bytes) -> dict[int, bytes]:
    """Pairs of an OID that begins with ``head`` and a value: by the OID's last arc all that follows it."""
    items: dict[int, bytes] = {}
    size = len(head)
    for tag, _, begin, end in der.elements(value, start, stop):
        arc = begin + size
        if tag != der.SEQUENCE or not value.startswith(head, begin) or arc >= end or value[arc] in items:
            raise DerError("an item of the SGX extension is no pair of a known OID and a value, or is there twice")
        items[value[arc]] = value[arc + 1 : end]
    return items


def _tcb(value: bytes) -> tuple[bytes, int]:
    """CPUSVN and PCESVN; the components before them are just those that the CPUSVN has, in their order."""
    start, end = der.only(value, 0, len(value), der.SEQUENCE)
    if end - start < 16:
        raise DerError("the TCB has no CPUSVN at its end")
    cpu_svn = value[-16:]
    if cpu_svn.isascii():
        table = bytearray(_COMPONENTS)
        table[_ITEM - 1 :: _ITEM] = cpu_svn
        components = bytes(table)
    else:
        components = b"".join([_HEADS[svn > 0x7F][i] + _INTEGERS[svn] for i, svn in enumerate(cpu_svn)])
    if not value.startswith(components, start):
        raise DerError("the TCB does not begin with the sixteen components in the CPUSVN at its end")
    items = _items(value, start + len(components), end, _TCB_HEAD)
    if items.keys() != {17, 18}:
        raise DerError("the TCB has not just sixteen components, PCESVN and CPUSVN")
    pce_svn = der.unsigned(items[17], der.single(items[17], 0, len(items[17])), size=2)
    return _octets(items[18], 16, "CPUSVN"), int.from_bytes(pce_svn)


def _octets(value: bytes, size: int, name: str) -> bytes:
    if len(value) != 2 + size or value[0] != der.OCTET_STRING or value[1] != size:
        raise DerError(f"the {name} is no OCTET STRING of {size} bytes")
    return value[2:]


def _sgx_type(value: bytes) -> SgxType:
    if len(value) != 3 or value[0] != der.ENUMERATED or value[1] != 1 or value[2] >= len(_SGX_TYPES):
        raise DerError("the SGX type is not one that is known")
    return _SGX_TYPES[value[2]]
