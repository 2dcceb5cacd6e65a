"""Read a platform's identity from the SGX extension of its PCK certificate.

Rules kept here:

* the items of Intel's profile are there once, in its order, of their types and lengths, and nothing else; the platform
  instance id, the platform configuration and each flag in it may be left out;
* the components of the TCB, which decide about TCB levels, equal the CPUSVN.

DER has one form for each value, so a value is read where it must stand and what is around it compared.

Source: Intel SGX PCK Certificate and CRL Profile Specification, 1.3.5.
"""

from __future__ import annotations

from itertools import product
from typing import Final, Literal, TypeAlias

from msgspec import Struct

from chutes_proto.quote import _der as der
from chutes_proto.quote._certificates import SGX_EXTENSION
from chutes_proto.quote._der import DerError
from chutes_proto.quote._layout import Tee

Ca: TypeAlias = Literal["platform", "processor"]
SgxType: TypeAlias = Literal["standard", "scalable", "scalable with integrity"]


def _oid(*arcs: int) -> bytes:
    """The DER of an OID below the extension's."""
    name = SGX_EXTENSION + bytes(arcs)
    return bytes([der.OBJECT_IDENTIFIER, len(name)]) + name


def _head(tag: int, size: int, *arcs: int) -> bytes:
    """The DER of the item with this OID, up to its value's ``size`` bytes."""
    start = _oid(*arcs) + bytes([tag, size])
    return bytes([der.SEQUENCE, len(start) + size]) + start


_PPID: Final = _head(der.OCTET_STRING, 16, 1)
_TCB: Final = _oid(2)
_SVNS: Final = tuple(_head(der.INTEGER, 1, 2, arc) for arc in range(1, 17))
_GREAT_SVNS: Final = tuple(_head(der.INTEGER, 2, 2, arc) + b"\0" for arc in range(1, 17))
"""The DER before the number of each component; one above 127 has a zero before it, so that it is not negative."""
_SVN_SIZE: Final = len(_SVNS[0]) + 1
_COMPONENTS: Final = b"".join(head + b"\0" for head in _SVNS)
"""Sixteen components of at most 127: the last of each `_SVN_SIZE` bytes is the number."""
_PCE_SVN: Final = tuple(_head(der.INTEGER, size, 2, 17) for size in (1, 2, 3))
"""By the size of the number's DER, less one."""
_CPU_SVN: Final = _head(der.OCTET_STRING, 16, 2, 18)
_PCE_ID: Final = _head(der.OCTET_STRING, 2, 3)
_FMSPC: Final = _head(der.OCTET_STRING, 6, 4)
_SGX_TYPE: Final = _head(der.ENUMERATED, 1, 5)
_INSTANCE_ID: Final = _head(der.OCTET_STRING, 16, 6)


_LONG: Final = 4
"""The size of the header that `_long` puts before its content."""


def _configuration(*flags: bool | None) -> bytes:
    """The DER of the platform configuration with these flags; None leaves one out."""
    content = b"".join(
        _head(der.BOOLEAN, 1, 7, arc) + bytes([0xFF * flag]) for arc, flag in enumerate(flags, 1) if flag is not None
    )
    return _head(der.SEQUENCE, len(content), 7) + content


_FLAGS: Final = {b"": (None, None, None)} | {
    _configuration(*flags): flags for flags in product((True, False, None), repeat=3)
}
"""Dynamic platform, cached keys and SMT, by the DER of the platform configuration; there are few."""
_SGX_TYPES: Final[tuple[SgxType, ...]] = ("standard", "scalable", "scalable with integrity")


class PckIdentity(Struct, frozen=True):
    """A platform's identity by its PCK certificate; ``fmspc``, ``ca`` and ``tee`` say which collateral it needs.

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
    """Read the identity from the SGX extension's value. Raises `DerError`."""
    pos, _ = der.only(value, 0, len(value), der.SEQUENCE)
    ppid, pos = _content(value, pos, _PPID, "PPID")
    cpu_svn, pce_svn, pos = _tcb(value, pos)
    pce_id, pos = _content(value, pos, _PCE_ID, "PCE-ID")
    fmspc, pos = _content(value, pos, _FMSPC, "FMSPC")
    (sgx_type,), pos = _content(value, pos, _SGX_TYPE, "SGX type")
    if sgx_type >= len(_SGX_TYPES):
        raise DerError("unknown SGX type")
    instance_id = None
    if value.startswith(_INSTANCE_ID, pos):
        instance_id, pos = _content(value, pos, _INSTANCE_ID, "platform instance id")
    flags = _FLAGS.get(value[pos:])
    if flags is None:
        raise DerError(
            "the SGX extension ends with neither a platform instance id nor a configuration of the profile;"
            " if the certificate is genuine, Intel has added an item that this version does not know: look for a newer"
        )
    return PckIdentity(fmspc, pce_id, ca, tee, ppid, cpu_svn, pce_svn, _SGX_TYPES[sgx_type], instance_id, *flags)


def _content(value: bytes, pos: int, head: bytes, name: str) -> tuple[bytes, int]:
    """Cut the content that follows ``head``, which must be at ``pos``; also return where it ends."""
    start = pos + len(head)
    end = start + head[-1]
    if not value.startswith(head, pos) or end > len(value):
        raise DerError(f"the {name} is not in its place, or of another type or length")
    return value[start:end], end


def _tcb(value: bytes, pos: int) -> tuple[bytes, int, int]:
    """CPUSVN and PCESVN of the TCB that must be at ``pos``, and where it ends."""
    end = pos + _LONG + int.from_bytes(value[pos + 2 : pos + _LONG])
    cpu_svn = value[end - 16 : end]
    if len(cpu_svn) == 16:
        components = _components(cpu_svn)
        number = pos + 2 * _LONG + len(_TCB) + len(components) + len(_PCE_SVN[0])
        pce_svn = int.from_bytes(value[number : end - 16 - len(_CPU_SVN)])
        if pce_svn <= 0xFFFF:
            size = pce_svn.bit_length() // 8 + 1
            svns = b"%b%b%b%b%b" % (components, _PCE_SVN[size - 1], pce_svn.to_bytes(size), _CPU_SVN, cpu_svn)
            if value.startswith(_long(_TCB + _long(svns)), pos):
                return cpu_svn, pce_svn, end
    raise DerError("the TCB is not sixteen components, PCESVN and CPUSVN, or the components are not the CPUSVN's")


def _components(cpu_svn: bytes) -> bytes:
    """The DER of the sixteen components that this CPUSVN has."""
    if cpu_svn.isascii():
        table = bytearray(_COMPONENTS)
        table[_SVN_SIZE - 1 :: _SVN_SIZE] = cpu_svn
        return bytes(table)
    return b"".join([(_GREAT_SVNS if svn > 0x7F else _SVNS)[i] + bytes([svn]) for i, svn in enumerate(cpu_svn)])


def _long(content: bytes) -> bytes:
    """A SEQUENCE of 256 bytes or more, fewer than 65536."""
    return b"\x30\x82%b%b" % (len(content).to_bytes(2), content)
