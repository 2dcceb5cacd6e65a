"""The bytes of a quote, and nothing else: where each field stands, and that every length is one that can be.

Rules kept here:

* whatever the bytes, `parse_quote` returns or raises `QuoteFormatError`;
* every length is checked against what is there before anything is cut by it; nothing is allocated by a length;
* inside a declared length nothing may be left over; bytes after the quote are outside every signature, are allowed
  (hosts pad) and ignored;
* nothing is verified here: a parsed quote says what someone claims.

All integers are little-endian. Sources: Intel TDX DCAP Quote Generation Library and Quote Verification Library,
appendix 3 (versions 4 and 5), Intel SGX ECDSA Quote Library Reference, appendix A (version 3), Intel TDX Module Base
Architecture Specification (TD attributes, XFAM), Intel 64 and IA-32 Architectures Software Developer's Manual, volume
1, chapter 13 (the bits of XCR0 and IA32_XSS, which are XFAM's).
"""

from __future__ import annotations

from enum import KEEP, IntFlag
from struct import Struct
from typing import Any, Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto.quote.errors import QuoteFormatError

Tee: TypeAlias = Literal["TDX", "SGX"]

TEE_SGX: Final = 0
TEE_TDX: Final = 0x81
KEY_ECDSA_P256: Final = 2
INTEL_VENDOR_ID: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_PCK_CHAIN: Final = 5
CERTIFICATION_QE_REPORT: Final = 6
MAX_QE_AUTH: Final = 4096

_HEADER: Final = Struct("<HHIHH16s20s")
_V5_BODY: Final = Struct("<HI")
_U32: Final = Struct("<I")
_CERTIFICATION: Final = Struct("<HI")
_SGX_REPORT: Final = Struct("<16s4s28s16s32s32s32s96sHH60s64s")
_TD10: Final = Struct("<16s48s48sQQQ48s48s48s48s48s48s48s48s64s")
_TD15: Final = Struct("<16s48s")
_TD15_EX: Final = Struct("<B32s48s48sQ16s16s12s48sQ")
_SIGNATURES: Final = Struct("<64s64s")
_QE_REPORT: Final = Struct("<384s64sH")

MIN_TDX: Final = _HEADER.size + _TD10.size
MIN_SGX: Final = _HEADER.size + _SGX_REPORT.size


class TdAttributes(IntFlag, boundary=KEEP):
    """The bits of TD attributes that have names: ``TdAttributes(body.td_attributes)``."""

    DEBUG = 1 << 0
    HGS_PLUS_PROF = 1 << 4
    PERF_PROF = 1 << 5
    PMT_PROF = 1 << 6
    ICSSD = 1 << 16
    SERVTD_EXT = 1 << 17
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    TPA = 1 << 62
    PERFMON = 1 << 63


class Xfam(IntFlag, boundary=KEEP):
    """The extended features that a TD may use, those that have names: ``Xfam(body.xfam)``."""

    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2
    AVX512_OPMASK = 1 << 5
    AVX512_ZMM_HI256 = 1 << 6
    AVX512_HI16_ZMM = 1 << 7
    PT = 1 << 8
    PKRU = 1 << 9
    PASID = 1 << 10
    CET_U = 1 << 11
    CET_S = 1 << 12
    HDC = 1 << 13
    UINTR = 1 << 14
    LBR = 1 << 15
    HWP = 1 << 16
    TILECFG = 1 << 17
    TILEDATA = 1 << 18


class SgxAttributes(IntFlag, boundary=KEEP):
    """The flags of an SGX report (the first eight bytes of its attributes) that have names."""

    INIT = 1 << 0
    DEBUG = 1 << 1
    MODE64BIT = 1 << 2
    PROVISION_KEY = 1 << 4
    EINITTOKEN_KEY = 1 << 5
    CET = 1 << 6
    KSS = 1 << 7


@frozen
class Header:
    """The 48 bytes before the report.

    The two SVNs and ``user_data`` are signed by the attestation key but no CPU vouches for them: base nothing on them.
    """

    version: int
    key_type: int
    tee_type: int
    qe_svn: int
    pce_svn: int
    qe_vendor_id: bytes
    user_data: bytes


@frozen
class SgxReport:
    """An enclave's report (384 bytes): the body of an SGX quote, and the quoting enclave's in every quote."""

    cpu_svn: bytes
    misc_select: bytes
    reserved_1: bytes
    attributes: bytes
    mr_enclave: bytes
    reserved_2: bytes
    mr_signer: bytes
    reserved_3: bytes
    isv_prod_id: int
    isv_svn: int
    reserved_4: bytes
    report_data: bytes

    @property
    def flags(self) -> int:
        """Bits of `SgxAttributes`."""
        return int.from_bytes(self.attributes[:8], "little")


@frozen
class TdReport10:
    """A TD report (TDX 1.0, 584 bytes). Measurements have 48 bytes, the attributes and XFAM are 64-bit numbers."""

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: int
    td_attributes: int
    xfam: int
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes


@frozen
class TdReport15(TdReport10):
    """A TD report of TDX 1.5 (648 bytes): the TCB at present and the service TD besides."""

    tee_tcb_svn_2: bytes
    mr_service_td: bytes


@frozen
class TdReport15Ex(TdReport15):
    """An extended TD report of TDX 1.5 (885 bytes)."""

    vm_id: int
    td_id: bytes
    dev_info: bytes
    init_servtd_hash: bytes
    init_servtd_attributes: int
    init_cpu_svn: bytes
    init_tee_tcb_svn: bytes
    init_tee_fmspc: bytes
    current_servtd_hash: bytes
    current_servtd_attributes: int


TdReport: TypeAlias = TdReport10
"""Every TD report: the later ones extend the first."""


@frozen
class Quote:
    """A parsed quote. Nothing in it is verified.

    ``signed`` are the bytes that ``signature`` (r ‖ s) is over; ``attestation_key`` is x ‖ y. ``qe_report_bytes`` is
    the quoting enclave's report as it was signed with ``qe_report_signature``; ``certification`` is what says whose
    signature that is, by ``certification_type``. ``trailing`` counts the bytes after the quote.
    """

    header: Header
    body: TdReport10 | SgxReport
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report_bytes: bytes
    qe_report_signature: bytes
    qe_auth: bytes
    certification_type: int
    certification: bytes
    trailing: int

    @property
    def version(self) -> int:
        return self.header.version

    @property
    def tee_type(self) -> int:
        return self.header.tee_type

    @property
    def tee(self) -> Tee:
        return "TDX" if self.header.tee_type == TEE_TDX else "SGX"

    @property
    def qe_report(self) -> SgxReport:
        return parse_sgx_report(self.qe_report_bytes)


def parse_sgx_report(data: bytes) -> SgxReport:
    """The fields of exactly 384 bytes."""
    return SgxReport(*_SGX_REPORT.unpack(data))


def parse_quote(data: bytes, *, sgx: bool = False) -> Quote:
    """The fields of a TDX quote of version 4 or 5, with ``sgx`` also those of an SGX quote of version 3.

    Raises `QuoteFormatError`, and nothing else, whatever the bytes. The checks, in this order: enough bytes for the
    smallest quote, the version, the TEE type, the type of the attestation key, then the structure.
    """
    size = len(data)
    if size < (MIN_SGX if sgx else MIN_TDX):
        raise QuoteFormatError("quote_too_short", f"{size} bytes are too few for a quote", size)
    header = Header(*_HEADER.unpack_from(data))
    if header.version not in (4, 5) and not (sgx and header.version == 3):
        raise QuoteFormatError("quote_version", f"quote version {header.version} is not read here", header.version)
    if header.tee_type != (TEE_SGX if header.version == 3 else TEE_TDX):
        text = f"TEE type 0x{header.tee_type:x} is not read here in a version {header.version} quote"
        raise QuoteFormatError("quote_tee_type", text, header.tee_type)
    if header.key_type != KEY_ECDSA_P256:
        text = f"attestation key type {header.key_type} is not ECDSA over P-256"
        raise QuoteFormatError("quote_key_type", text, header.key_type)
    cursor = _Cursor(data, _HEADER.size, size)
    body = _body(cursor, header.version)
    signed = data[: cursor.pos]
    (length,) = cursor.unpack(_U32, "the length of the authentication data")
    auth = cursor.inner(length, "authentication data")
    signature, attestation_key = auth.unpack(_SIGNATURES, "the signature and attestation key")
    inner = auth
    if header.version != 3:
        kind, length = auth.unpack(_CERTIFICATION, "the certification data's header")
        if kind != CERTIFICATION_QE_REPORT:
            raise _structure(f"certification data of type {kind} stands where the QE report (type 6) must")
        inner = auth.inner(length, "QE report certification data")
        auth.finish("authentication data")
    qe_report, qe_report_signature, qe_auth_size = inner.unpack(_QE_REPORT, "the QE report")
    if qe_auth_size > MAX_QE_AUTH:
        raise _structure(f"{qe_auth_size} bytes of QE authentication data are more than {MAX_QE_AUTH}")
    qe_auth = inner.take(qe_auth_size, "QE authentication data")
    certification_type, length = inner.unpack(_CERTIFICATION, "the PCK certification data's header")
    certification = inner.take(length, "PCK certification data")
    inner.finish("QE report certification data")
    return Quote(
        header,
        body,
        signed,
        signature,
        attestation_key,
        qe_report,
        qe_report_signature,
        qe_auth,
        certification_type,
        certification,
        size - cursor.pos,
    )


def _body(cursor: _Cursor, version: int) -> TdReport10 | SgxReport:
    if version == 3:
        return SgxReport(*cursor.unpack(_SGX_REPORT, "the report"))
    kind = 2
    if version == 5:
        kind, size = cursor.unpack(_V5_BODY, "the body's header")
        if kind not in _V5_SIZES:
            raise _structure(f"body type {kind} is not a TD report")
        if size != _V5_SIZES[kind]:
            raise _structure(f"a body of type {kind} has {_V5_SIZES[kind]} bytes, not {size}")
    (*head, rtmr0, rtmr1, rtmr2, rtmr3, report_data) = cursor.unpack(_TD10, "the TD report")
    fields: Any = (*head, (rtmr0, rtmr1, rtmr2, rtmr3), report_data)
    if kind == 2:
        return TdReport10(*fields)
    fields += cursor.unpack(_TD15, "the TD report")
    if kind == 3:
        return TdReport15(*fields)
    fields += cursor.unpack(_TD15_EX, "the TD report")
    return TdReport15Ex(*fields)


_V5_SIZES: Final = {
    2: _TD10.size,
    3: _TD10.size + _TD15.size,
    4: _TD10.size + _TD15.size + _TD15_EX.size,
}
"""Body type of a version 5 quote to size: TD 1.0, TD 1.5, TD 1.5 extended."""


class _Cursor:
    """A position in a part of the bytes that ends at ``end``."""

    __slots__ = ("data", "end", "pos")

    def __init__(self, data: bytes, pos: int, end: int) -> None:
        self.data = data
        self.pos = pos
        self.end = end

    def unpack(self, struct: Struct, what: str) -> tuple[Any, ...]:
        pos = self.pos
        self._advance(struct.size, what)
        return struct.unpack_from(self.data, pos)

    def take(self, size: int, what: str) -> bytes:
        pos = self.pos
        self._advance(size, what)
        return self.data[pos : self.pos]

    def inner(self, size: int, what: str) -> _Cursor:
        pos = self.pos
        self._advance(size, what)
        return _Cursor(self.data, pos, self.pos)

    def finish(self, what: str) -> None:
        if self.pos != self.end:
            raise _structure(f"{self.end - self.pos} bytes are left over in the {what}")

    def _advance(self, size: int, what: str) -> None:
        left = self.end - self.pos
        if size > left:
            raise _structure(f"{what}: {size} bytes are declared or needed, {left} are there")
        self.pos += size


def _structure(message: str) -> QuoteFormatError:
    return QuoteFormatError("quote_structure", message)
