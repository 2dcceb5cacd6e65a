"""The bytes of a simulated TDX quote, from drafts that a fault may change before or after the signatures are made.

Layouts: Intel TDX DCAP Quoting Library API, appendix A (quote formats v4 and v5); Intel TDX Module ABI (TD report, TD
attributes, XFAM). Everything is little-endian but keys and signatures.
"""

from __future__ import annotations

from hashlib import sha256
from struct import pack
from typing import Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto.testing._pki import Keys

Form: TypeAlias = Literal["v4", "v5-td10", "v5-td15", "v5-td15ex"]
"""The format of the quote and the type of the TD report in it."""

_BODY_TYPES: Final = {"v5-td10": 2, "v5-td15": 3, "v5-td15ex": 4}

INTEL_QE_VENDOR_ID: Final = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
SEPT_VE_DISABLE: Final = 1 << 28
TD_REPORT: Final = 48
"""Offset of the TD report in a v4 quote; in a v5 quote it is 6 bytes later."""


@frozen(kw_only=True)
class HeaderDraft:
    version: int
    key_type: int = 2
    tee_type: int = 0x81
    vendor_id: bytes = INTEL_QE_VENDOR_ID
    user_data: bytes

    def encode(self) -> bytes:
        return pack("<HHI4x16s20s", self.version, self.key_type, self.tee_type, self.vendor_id, self.user_data)


@frozen(kw_only=True)
class TdReportDraft:
    """A TD report; ``extended`` is the end of an extended report of TDX 1.5."""

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes = bytes(48)
    seam_attributes: int = 0
    td_attributes: int = SEPT_VE_DISABLE
    xfam: int = 0x602E7
    mr_td: bytes
    rtmrs: tuple[bytes, ...]
    report_data: bytes
    tee_tcb_svn_2: bytes
    mr_service_td: bytes = bytes(48)
    extended: bytes = bytes(237)

    def encode(self, form: Form) -> bytes:
        td10 = pack(
            "<16s48s48sQQQ48s48x48x48x48s48s48s48s64s",
            self.tee_tcb_svn,
            self.mr_seam,
            self.mr_signer_seam,
            self.seam_attributes,
            self.td_attributes,
            self.xfam,
            self.mr_td,
            *self.rtmrs,
            self.report_data,
        )
        match form:
            case "v4" | "v5-td10":
                return td10
            case "v5-td15":
                return td10 + self.tee_tcb_svn_2 + self.mr_service_td
            case "v5-td15ex":
                return td10 + self.tee_tcb_svn_2 + self.mr_service_td + self.extended


@frozen(kw_only=True)
class QeReportDraft:
    """A report of the quoting enclave; ``report_data`` None stands for the hash of the attestation key."""

    cpu_svn: bytes
    misc_select: int = 0
    attributes: bytes = bytes.fromhex("1500000000000000e700000000000000")
    mr_enclave: bytes
    mr_signer: bytes
    prod_id: int = 2
    svn: int
    report_data: bytes | None = None
    report_data_tail: bytes = bytes(32)

    def encode(self, vouches_for: bytes) -> bytes:
        return pack(
            "<16sI28x16s32s32x32s96xHH60x32s32s",
            self.cpu_svn,
            self.misc_select,
            self.attributes,
            self.mr_enclave,
            self.mr_signer,
            self.prod_id,
            self.svn,
            self.report_data if self.report_data is not None else sha256(vouches_for).digest(),
            self.report_data_tail,
        )


@frozen(kw_only=True)
class QuoteDraft:
    """A quote before its signatures.

    Keys are labels: the key that signs the quote, the attestation key in it, the key that the QE report vouches for.
    ``attestation_point`` replaces the last two.
    """

    form: Form
    header: HeaderDraft
    body: TdReportDraft
    qe_report: QeReportDraft
    body_type: int | None = None
    body_size: int | None = None
    qe_auth: bytes = bytes(range(32))
    signing_key: str
    attestation_key: str
    vouched_key: str
    attestation_point: bytes | None = None
    pck_key: str
    cert_data: bytes

    def sign(self, keys: Keys) -> QuoteParts:
        body = self.body.encode(self.form)
        descriptor = b""
        if self.form != "v4":
            kind = self.body_type if self.body_type is not None else _BODY_TYPES[self.form]
            descriptor = pack("<HI", kind, self.body_size if self.body_size is not None else len(body))
        signed = self.header.encode() + descriptor + body
        point = self.attestation_point
        vouched = keys.public_point(self.vouched_key) if point is None else point
        qe_report = self.qe_report.encode(vouched + self.qe_auth)
        return QuoteParts(
            signed=signed,
            signature=keys.sign_raw(self.signing_key, signed),
            attestation_key=keys.public_point(self.attestation_key) if point is None else point,
            qe_report=qe_report,
            qe_signature=keys.sign_raw(self.pck_key, qe_report),
            qe_auth=self.qe_auth,
            cert_data=self.cert_data,
        )


@frozen(kw_only=True)
class QuoteParts:
    """A quote with its signatures, before it is put together. A length that is None is the true one."""

    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    qe_auth: bytes
    cert_data: bytes
    outer_type: int = 6
    cert_type: int = 5
    auth_length: int | None = None
    outer_length: int | None = None
    qe_auth_length: int | None = None
    cert_length: int | None = None
    auth_trailing: bytes = b""
    inner_trailing: bytes = b""

    def encode(self) -> bytes:
        qe_auth = pack("<H", _length(self.qe_auth, self.qe_auth_length)) + self.qe_auth
        certificates = pack("<HI", self.cert_type, _length(self.cert_data, self.cert_length)) + self.cert_data
        inner = self.qe_report + self.qe_signature + qe_auth + certificates + self.inner_trailing
        outer = pack("<HI", self.outer_type, _length(inner, self.outer_length)) + inner
        auth = self.signature + self.attestation_key + outer + self.auth_trailing
        return self.signed + pack("<I", _length(auth, self.auth_length)) + auth


def _length(data: bytes, claimed: int | None) -> int:
    return len(data) if claimed is None else claimed
