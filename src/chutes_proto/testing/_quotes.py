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
"""Where the TD report of a v4 quote starts; in a v5 quote 6 bytes later."""


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
    """``extended`` is what an extended report of TDX 1.5 has behind the rest."""

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
    """``report_data`` None stands for the hash that vouches for the attestation key."""

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

    Keys are labels: of who signs the quote, of the attestation key in it, of the key that the QE report vouches for.
    ``attestation_point`` stands in the place of the last two.
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
    """A quote whose signatures are made, before it is put together. A length that is None is the true one."""

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
        qe_auth_length = len(self.qe_auth) if self.qe_auth_length is None else self.qe_auth_length
        cert_length = len(self.cert_data) if self.cert_length is None else self.cert_length
        inner = (
            self.qe_report
            + self.qe_signature
            + pack("<H", qe_auth_length)
            + self.qe_auth
            + pack("<HI", self.cert_type, cert_length)
            + self.cert_data
            + self.inner_trailing
        )
        outer_length = len(inner) if self.outer_length is None else self.outer_length
        auth = (
            self.signature
            + self.attestation_key
            + pack("<HI", self.outer_type, outer_length)
            + inner
            + self.auth_trailing
        )
        return self.signed + pack("<I", len(auth) if self.auth_length is None else self.auth_length) + auth


def flipped(data: bytes, offset: int = -1) -> bytes:
    """``data`` with the lowest bit of one byte changed."""
    changed = bytearray(data)
    changed[offset] ^= 1
    return bytes(changed)
