"""Parse the bytes of a quote: where each field is, and whether every length is possible.

Rules kept here:

* whatever the bytes, `parse_quote` returns or raises `QuoteFormatError`;
* every length is checked against what is there before anything that was cut by it is used; nothing is allocated by a
  length;
* inside a declared length nothing may be left over; bytes after the quote are outside every signature, are allowed
  (hosts pad) and ignored;
* nothing is verified here: a parsed quote says what someone claims.

All integers are little-endian. Sources: Intel TDX DCAP Quote Generation Library and Quote Verification Library,
appendix 3 (versions 4 and 5), Intel SGX ECDSA Quote Library Reference, appendix A (version 3), Intel TDX Module Base
Architecture Specification (TD attributes, XFAM), Intel 64 and IA-32 Architectures Software Developer's Manual, volume
1, chapter 13 (the bits of XCR0 and IA32_XSS, which are XFAM's).
"""

from __future__ import annotations

import struct
from enum import KEEP, IntFlag
from typing import Any, Final, Literal, TypeAlias

from msgspec import Struct

from chutes_proto.quote._arguments import BytesLike, as_bytes, check_flag
from chutes_proto.quote._errors import QuoteFormatError

Tee: TypeAlias = Literal["TDX", "SGX"]

TEE_SGX: Final = 0
TEE_TDX: Final = 0x81
KEY_ECDSA_P256: Final = 2
INTEL_VENDOR_ID: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
CERTIFICATION_PPID_RSA2048: Final = 2
CERTIFICATION_PPID_RSA3072: Final = 3
CERTIFICATION_PCK: Final = 4
CERTIFICATION_PCK_CHAIN: Final = 5
CERTIFICATION_QE_REPORT: Final = 6
MAX_QE_AUTH: Final = 4096

_HEADER: Final = struct.Struct("<HHIHH16s20s")
_V5_BODY: Final = struct.Struct("<HI")
_CERTIFICATION: Final = struct.Struct("<HI")
_SGX_REPORT: Final = struct.Struct("<16s4s28s16s32s32s32s96sHH60s64s")
_TD10: Final = struct.Struct("<16s48s48sQQQ48s48s48s48s48s48s48s48s64s")
_TD15: Final = struct.Struct("<16s48s")
_TD15_EX: Final = struct.Struct("<B32s48s48sQ16s16s12s48sQ")
_AUTH_V3: Final = struct.Struct("<I64s64s384s64sH")
_AUTH: Final = struct.Struct("<I64s64sHI384s64sH")
"""From the authentication data's length to that of the QE authentication data; in versions 4 and 5 the QE report and
what follows it is certification data of its own."""

PPIDS: Final = {CERTIFICATION_PPID_RSA2048: 256, CERTIFICATION_PPID_RSA3072: 384}
"""The size of the encrypted PPID, which CPUSVN, PCESVN and PCE-ID follow, by the type of certification data."""
_PCK_TCB_SIZE: Final = 16 + 2 + 2

_QE_REPORT_SIZE: Final = struct.Struct("<384s64sH").size

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
    """The extended features that a TD may use, as far as they have names: ``Xfam(body.xfam)``."""

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


class Header(Struct, frozen=True):
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


class SgxReport(Struct, frozen=True):
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


class TdReport10(Struct, frozen=True):
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


class TdReport15(TdReport10, frozen=True):
    """A TD report of TDX 1.5 (648 bytes), which adds the current TCB and the service TD."""

    tee_tcb_svn_2: bytes
    mr_service_td: bytes


class TdReport15Ex(TdReport15, frozen=True):
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


class PckReference(Struct, frozen=True):
    """Certification data of type 2 or 3, in place of a PCK certificate: it names the one of this platform and TCB."""

    encrypted_ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: bytes


class Quote(Struct, frozen=True):
    """A parsed quote. Nothing in it is verified, and no verification takes it: copies of it can say anything.

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
    def tee(self) -> Tee:
        return "TDX" if self.header.tee_type == TEE_TDX else "SGX"

    @property
    def pck_reference(self) -> PckReference | None:
        """The PCK certificate that the quote names without bringing it (types 2 and 3); None for other types.

        Raises `QuoteFormatError` for another length.
        """
        size = PPIDS.get(self.certification_type)
        if size is None:
            return None
        data = self.certification
        if len(data) != size + _PCK_TCB_SIZE:
            kind = self.certification_type
            raise _structure(f"{len(data)} bytes of certification data of type {kind}, not {size + _PCK_TCB_SIZE}")
        pce_svn = int.from_bytes(data[-4:-2], "little")
        return PckReference(data[:size], data[size : size + 16], pce_svn, data[-2:])

    @property
    def qe_id(self) -> bytes:
        """The 16 bytes by which a caching service knows the platform; no CPU vouches for them."""
        return self.header.user_data[:16]

    @property
    def qe_report(self) -> SgxReport:
        return parse_sgx_report(self.qe_report_bytes)


def parse_sgx_report(data: bytes) -> SgxReport:
    """Parse an SGX report of exactly 384 bytes."""
    return SgxReport(*_SGX_REPORT.unpack(data))


def parse_quote(data: BytesLike, *, sgx: bool = False) -> Quote:
    """Parse a TDX quote of version 4 or 5, with ``sgx`` also an SGX quote of version 3.

    Raises `QuoteFormatError`, and nothing else, whatever the bytes; `TypeError` for an object without bytes. The order
    of checks: enough bytes for the smallest quote, the version, the TEE type, the attestation key's type, the
    structure.
    """
    check_flag("sgx", sgx)
    data = as_bytes(data, "the bytes of a quote")
    size = len(data)
    least = MIN_SGX if sgx else MIN_TDX
    if size < least:
        text = f"{size} bytes are too few for a quote"
        raise QuoteFormatError("quote_too_short", text, got=size, expected=f"at least {least}")
    header = Header(*_HEADER.unpack_from(data))
    if header.version not in (4, 5) and not (sgx and header.version == 3):
        text, expected = f"quote version {header.version} is not read here", "3, 4 or 5" if sgx else "4 or 5"
        if header.version == 3:
            text = "quote version 3 is of SGX, and only quotes of TDX are read here (sgx=True reads both)"
        elif data[:16].isalnum():
            text = "these bytes look like a text; decode its hexadecimal digits or base64 first"
        raise QuoteFormatError("quote_version", text, got=header.version, expected=expected)
    tee_type = TEE_SGX if header.version == 3 else TEE_TDX
    if header.tee_type != tee_type:
        text = f"TEE type 0x{header.tee_type:x} is not read here in a version {header.version} quote"
        raise QuoteFormatError("quote_tee_type", text, got=header.tee_type, expected=tee_type)
    if header.key_type != KEY_ECDSA_P256:
        text = f"attestation key type {header.key_type} is not ECDSA over P-256"
        raise QuoteFormatError("quote_key_type", text, got=header.key_type, expected=KEY_ECDSA_P256)
    body, signed_size = _body(data, header.version)
    layout = _AUTH_V3 if header.version == 3 else _AUTH
    fields = _unpack(layout, data, signed_size, "the signature, the attestation key and the QE report")
    auth_size, signature, attestation_key, *outer, qe_report, qe_report_signature, qe_auth_size = fields
    pos = signed_size + layout.size
    end = signed_size + 4 + auth_size
    if not pos <= end <= size:
        raise _structure(f"authentication data of {auth_size} bytes are declared, {size - signed_size - 4} are there")
    if outer:
        kind, outer_size = outer
        if kind != CERTIFICATION_QE_REPORT:
            raise _structure(f"certification data of type {kind} stands where the QE report (type 6) must")
        if outer_size != end - pos + _QE_REPORT_SIZE:
            raise _structure(f"{outer_size} bytes of QE report certification data do not fill the authentication data")
    if qe_auth_size > MAX_QE_AUTH:
        raise _structure(f"{qe_auth_size} bytes of QE authentication data are more than {MAX_QE_AUTH}")
    qe_auth = data[pos : pos + qe_auth_size]
    pos += qe_auth_size
    certification_type, certification_size = _unpack(_CERTIFICATION, data, pos, "the PCK certification data's header")
    pos += _CERTIFICATION.size
    if pos + certification_size != end:
        raise _structure(f"{certification_size} bytes of PCK certification data do not fill the authentication data")
    return Quote(
        header,
        body,
        data[:signed_size],
        signature,
        attestation_key,
        qe_report,
        qe_report_signature,
        qe_auth,
        certification_type,
        data[pos:end],
        size - end,
    )


def _body(data: bytes, version: int) -> tuple[TdReport10 | SgxReport, int]:
    """The report, and where it ends."""
    pos = _HEADER.size
    if version == 3:
        return SgxReport(*_unpack(_SGX_REPORT, data, pos, "the report")), pos + _SGX_REPORT.size
    kind = 2
    if version == 5:
        kind, size = _unpack(_V5_BODY, data, pos, "the body's header")
        if kind not in _V5_SIZES:
            raise _structure(f"body type {kind} is not a TD report")
        if size != _V5_SIZES[kind]:
            raise _structure(f"a body of type {kind} has {_V5_SIZES[kind]} bytes, not {size}")
        pos += _V5_BODY.size
    (*head, rtmr0, rtmr1, rtmr2, rtmr3, report_data) = _unpack(_TD10, data, pos, "the TD report")
    fields: Any = (*head, (rtmr0, rtmr1, rtmr2, rtmr3), report_data)
    pos += _TD10.size
    if kind == 2:
        return TdReport10(*fields), pos
    fields += _unpack(_TD15, data, pos, "the TD report")
    pos += _TD15.size
    if kind == 3:
        return TdReport15(*fields), pos
    fields += _unpack(_TD15_EX, data, pos, "the TD report")
    return TdReport15Ex(*fields), pos + _TD15_EX.size


_V5_SIZES: Final = {2: _TD10.size, 3: _TD10.size + _TD15.size, 4: _TD10.size + _TD15.size + _TD15_EX.size}
"""Body type of a version 5 quote to size: TD 1.0, TD 1.5, TD 1.5 extended."""


def _unpack(form: struct.Struct, data: bytes, pos: int, what: str) -> tuple[Any, ...]:
    left = len(data) - pos
    if left < form.size:
        raise _structure(f"{what}: {form.size} bytes are needed, {left} are there")
    return form.unpack_from(data, pos)


def _structure(message: str) -> QuoteFormatError:
    return QuoteFormatError("quote_structure", message)
