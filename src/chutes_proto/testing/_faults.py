"""Every way in which the simulated platform can be wrong, by name: one closed table.

Rules kept here:

* one row is one fault and nothing else: whatever the fault does not name stays as an honest platform makes it, with
  signatures to match, so that the check which refuses it is the check it was made for;
* ``side`` says where the fault travels: in the ``quote``, in the PCK ``certificates`` inside the quote, or in the
  ``collateral``;
* a TCB status is a fault of the quote: the platform runs old parts, and honest collateral says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import sha256, sha384
from typing import Any, Final, Literal, TypeAlias, TypeVar

from attrs import evolve, frozen

from chutes_proto.auth.der import integer, octets
from chutes_proto.testing._pki import (
    EXPIRES,
    ISSUED,
    PCK_CERTIFICATE,
    ROOT_CA,
    TCB_SIGNING,
    CertificateDraft,
    CrlDraft,
    Keys,
    nested,
    sgx_tcb,
)
from chutes_proto.testing._quotes import TD_REPORT, QuoteDraft, QuoteParts, flipped
from chutes_proto.testing._statements import (
    PCE_SVN,
    SGX_COMPONENTS,
    SVN_LADDER,
    QeIdentity,
    TcbInfo,
    tcb_components,
    tee_tcb_svn,
)

Side: TypeAlias = Literal["quote", "certificates", "collateral"]
Chain: TypeAlias = tuple[bytes, ...]
T = TypeVar("T")
D = TypeVar("D", CertificateDraft, CrlDraft, TcbInfo, QeIdentity, QuoteDraft, QuoteParts)
Change: TypeAlias = Callable[[T], T]


def unchanged(value: T) -> T:
    return value


@frozen(kw_only=True)
class Fault:
    """One way to be wrong: what an honest platform makes passes through these changes, in the order of the fields.

    ``what`` is one line for people. ``pck_chain`` and ``tcb_chain`` change lists of certificates in DER, ``quote`` a
    quote before its signatures are made, ``parts`` one after, ``raw`` its bytes, ``collateral`` the members of the JSON
    form. ``other_ca`` puts the CRL of the PCK CA that is not the platform's into the collateral, ``chain_beside`` the
    PCK chain of the platform this many further on.
    """

    name: str
    side: Side
    what: str
    keys: Change[Keys] = unchanged
    root: Change[CertificateDraft] = unchanged
    intermediate: Change[CertificateDraft] = unchanged
    pck: Change[CertificateDraft] = unchanged
    tcb_signer: Change[CertificateDraft] = unchanged
    pck_chain: Change[Chain] = unchanged
    tcb_chain: Change[Chain] = unchanged
    root_crl: Change[CrlDraft] = unchanged
    pck_crl: Change[CrlDraft] = unchanged
    tcb_info: Change[TcbInfo] = unchanged
    qe_identity: Change[QeIdentity] = unchanged
    quote: Change[QuoteDraft] = unchanged
    parts: Change[QuoteParts] = unchanged
    raw: Change[bytes] = unchanged
    other_ca: bool = False
    chain_beside: int | None = None
    collateral: Change[dict[str, str]] = unchanged


_LONG_AGO: Final = ISSUED + 86400
_FAR_OFF: Final = EXPIRES - 86400
_OTHER_32: Final = sha256(b"another").digest()
_OTHER_48: Final = sha384(b"another").digest()


def _row(side: Side, name: str, what: str, **changes: Any) -> Fault:
    return Fault(name=name, side=side, what=what, **changes)


def _set(**changes: Any) -> Callable[[D], D]:
    def change(draft: D) -> D:
        return evolve(draft, **changes)

    return change


def _look_alike(keys: Keys) -> Keys:
    return Keys(keys.draw("look-alike", 32))


def _cut(at: int) -> Change[bytes]:
    return lambda data: data[:at]


def _order(*positions: int) -> Change[Chain]:
    return lambda chain: tuple(chain[position] for position in positions)


def _instead(**members: str) -> Change[dict[str, str]]:
    """Members of the collateral that hold what belongs into others."""
    return lambda files: {**files, **{name: files[other] for name, other in members.items()}}


def _header(**changes: Any) -> Change[QuoteDraft]:
    return lambda draft: evolve(draft, header=evolve(draft.header, **changes))


def _body(**changes: Any) -> Change[QuoteDraft]:
    return lambda draft: evolve(draft, body=evolve(draft.body, **changes))


def _v5(**changes: Any) -> Change[QuoteDraft]:
    """A v5 quote with a TD10 report, unless the changes say otherwise."""
    return lambda draft: evolve(draft, **{"form": "v5-td10", "header": evolve(draft.header, version=5), **changes})


def _td15(**changes: Any) -> Change[QuoteDraft]:
    return lambda draft: _v5(form="v5-td15", body=evolve(draft.body, **changes))(draft)


def _tcb(status: str) -> Change[QuoteDraft]:
    """A platform that runs, and ran at launch, the TCB with this status."""
    return _body(tee_tcb_svn=tee_tcb_svn(status), tee_tcb_svn_2=tee_tcb_svn(status))


def _attributes(*, set_bit: int) -> Change[QuoteDraft]:
    return lambda draft: _body(td_attributes=draft.body.td_attributes | 1 << set_bit)(draft)


def _rtmr(index: int) -> Change[QuoteDraft]:
    def change(draft: QuoteDraft) -> QuoteDraft:
        rtmrs = list(draft.body.rtmrs)
        rtmrs[index] = _OTHER_48
        return _body(rtmrs=tuple(rtmrs))(draft)

    return change


def _report_data(offset: int) -> Change[QuoteDraft]:
    return lambda draft: _body(report_data=flipped(draft.body.report_data, offset))(draft)


def _qe(**changes: Any) -> Change[QuoteDraft]:
    return lambda draft: evolve(draft, qe_report=evolve(draft.qe_report, **changes))


def _flip(part: str, offset: int = -1) -> Change[QuoteParts]:
    return lambda parts: _set(**{part: flipped(getattr(parts, part), offset)})(parts)


def _sgx(number: int, *values: bytes) -> Change[CertificateDraft]:
    """The SGX extension with these values for one item: none, one or more."""

    def change(draft: CertificateDraft) -> CertificateDraft:
        items = draft.sgx or ()
        at = [n for n, _ in items].index(number)
        return evolve(draft, sgx=(*items[:at], *((number, value) for value in values), *items[at + 1 :]))

    return change


def _sgx_order(draft: CertificateDraft) -> CertificateDraft:
    """The second half of the items before the first."""
    items = draft.sgx or ()
    return evolve(draft, sgx=(*items[3:], *items[:3]))


def _revoke_own(draft: CrlDraft) -> CrlDraft:
    return evolve(draft, revoked=(*draft.revoked, draft.own))


def _first_level(**changes: Any) -> Change[TcbInfo]:
    return lambda info: evolve(info, levels=(evolve(info.levels[0], **changes), *info.levels[1:]))


def _first_level_twice(info: TcbInfo) -> TcbInfo:
    return evolve(info, levels=(info.levels[0], *info.levels))


def _replace(old: str, new: str) -> Change[str]:
    return lambda text: text.replace(old, new)


_quote = partial(_row, "quote")
_certificates = partial(_row, "certificates")
_collateral = partial(_row, "collateral")

_TABLE = (
    # The quote's form
    _quote("truncated_body", "the quote ends inside the TD report", raw=_cut(TD_REPORT + 500)),
    _quote(
        "truncated_auth",
        "the quote ends inside the authentication data",
        raw=_cut(TD_REPORT + 584 + 4 + 600),
    ),
    _quote("version", "version 6 in the header", quote=_header(version=6)),
    _quote("tee_type", "TEE type 0 (SGX) in the header", quote=_header(tee_type=0)),
    _quote("key_type", "attestation key type 3 (P-384) in the header", quote=_header(key_type=3)),
    _quote("vendor_id", "a QE vendor id that is not Intel's", quote=_header(vendor_id=bytes(16))),
    _quote("body_type", "v5 with a body type that does not exist", quote=_v5(body_type=9)),
    _quote("body_size", "v5 with a body size that is not its type's", quote=_v5(body_size=583)),
    _quote(
        "auth_length_huge", "a length of the authentication data far beyond the end", parts=_set(auth_length=0xFFFFFFFF)
    ),
    _quote(
        "outer_length_huge",
        "a length of the QE report certification data far beyond the end",
        parts=_set(outer_length=0xFFFFFFFF),
    ),
    _quote(
        "qe_auth_length_huge",
        "a length of the QE authentication data beyond the end",
        parts=_set(qe_auth_length=0xFFFF),
    ),
    _quote(
        "cert_length_huge", "a length of the certificate chain far beyond the end", parts=_set(cert_length=0xFFFFFFFF)
    ),
    _quote(
        "auth_trailing",
        "bytes after the certification data, inside the authentication data",
        parts=_set(auth_trailing=bytes(8)),
    ),
    _quote(
        "inner_trailing",
        "bytes after the certificate chain, inside the QE report certification data",
        parts=_set(inner_trailing=bytes(8)),
    ),
    _quote("outer_type", "outer certification data of type 5 instead of 6", parts=_set(outer_type=5)),
    _quote("cert_type", "inner certification data of type 4 instead of 5", parts=_set(cert_type=4)),
    # The quote's signatures
    _quote("quote_signature", "one bit of the quote signature flipped", parts=_flip("signature")),
    _quote("body_altered", "a bit of the TD report flipped after signing", parts=_flip("signed")),
    _quote("header_altered", "a bit of the header's user data flipped after signing", parts=_flip("signed", 47)),
    _quote(
        "attestation_key",
        "the quote signed by another key than its attestation key",
        quote=_set(signing_key="another attestation key"),
    ),
    _quote(
        "attestation_key_substituted",
        "another attestation key than the QE vouched for, and the quote signed by it",
        quote=_set(signing_key="another attestation key", attestation_key="another attestation key"),
    ),
    _quote(
        "attestation_key_invalid",
        "an attestation key that is no point of the curve, and vouched for",
        quote=_set(attestation_point=bytes(64)),
    ),
    _quote("qe_report_signature", "one bit of the QE report signature flipped", parts=_flip("qe_signature")),
    _quote("qe_report_altered", "a bit of the QE report flipped after signing", parts=_flip("qe_report", 0)),
    _quote(
        "qe_report_data", "QE report data that is not the hash of the attestation key", quote=_qe(report_data=bytes(32))
    ),
    _quote(
        "qe_report_data_tail",
        "the second half of the QE report data not zero",
        quote=_qe(report_data_tail=b"\1" + bytes(31)),
    ),
    _quote("qe_auth_altered", "a bit of the QE authentication data flipped after signing", parts=_flip("qe_auth")),
    # The quoting enclave against its identity
    _quote(
        "qe_debug",
        "a quoting enclave in debug mode",
        quote=_qe(attributes=bytes.fromhex("1700000000000000e700000000000000")),
    ),
    _quote("qe_mrsigner", "a quoting enclave of another signer", quote=_qe(mr_signer=_OTHER_32)),
    _quote("qe_prod_id", "a quoting enclave of another product", quote=_qe(prod_id=1)),
    _quote("qe_misc_select", "a quoting enclave with another MISCSELECT", quote=_qe(misc_select=1)),
    _quote(
        "qe_attributes",
        "a quoting enclave with other attributes",
        quote=_qe(attributes=bytes.fromhex("3500000000000000e700000000000000")),
    ),
    _quote("qe_outdated", "a quoting enclave whose SVN is OutOfDate", quote=_qe(svn=SVN_LADDER["OutOfDate"])),
    _quote("qe_revoked", "a quoting enclave whose SVN is Revoked", quote=_qe(svn=SVN_LADDER["Revoked"])),
    _quote("qe_not_supported", "a quoting enclave whose SVN is below every level", quote=_qe(svn=0)),
    # What the TD report says
    _quote("debug", "a debug TD (TUD bit 0)", quote=_attributes(set_bit=0)),
    _quote("profiling", "a TD with performance profiling (TUD bit 5)", quote=_attributes(set_bit=5)),
    _quote("reserved_tud", "a reserved bit of the TUD byte set", quote=_attributes(set_bit=1)),
    _quote("reserved_sec", "a reserved bit of the SEC part of the TD attributes set", quote=_attributes(set_bit=23)),
    _quote(
        "reserved_other", "a reserved bit of the OTHER part of the TD attributes set", quote=_attributes(set_bit=32)
    ),
    _quote("sept_ve_disable_clear", "a TD without SEPT_VE_DISABLE", quote=_body(td_attributes=0)),
    _quote("migratable", "a migratable TD", quote=_attributes(set_bit=29)),
    _quote("servtd_ext", "a TD with SERVTD_EXT", quote=_attributes(set_bit=17)),
    _quote("service_td", "a TD bound to a service TD (v5, TD15)", quote=_td15(mr_service_td=_OTHER_48)),
    _quote("xfam", "an XFAM without its fixed bits", quote=_body(xfam=0)),
    _quote("mrtd", "another MRTD", quote=_body(mr_td=_OTHER_48)),
    _quote("rtmr0", "another RTMR0", quote=_rtmr(0)),
    _quote("rtmr1", "another RTMR1", quote=_rtmr(1)),
    _quote("rtmr2", "another RTMR2", quote=_rtmr(2)),
    _quote("rtmr3", "another RTMR3", quote=_rtmr(3)),
    _quote("report_data_nonce", "another first half of the report data (the nonce)", quote=_report_data(0)),
    _quote("report_data_key", "another second half of the report data (the TLS key)", quote=_report_data(32)),
    # The TDX module and the TCB of the platform
    _quote("seam_attributes", "SEAM attributes that are not zero", quote=_body(seam_attributes=1)),
    _quote("module_mrsigner", "a TDX module of another signer", quote=_body(mr_signer_seam=_OTHER_48)),
    _quote(
        "module_unknown",
        "a TDX module of a major version without identity",
        quote=_body(tee_tcb_svn=tee_tcb_svn(module_version=9)),
    ),
    _quote(
        "module_outdated",
        "a TDX module whose SVN is OutOfDate",
        quote=_body(tee_tcb_svn=tee_tcb_svn(module="OutOfDate")),
    ),
    _quote(
        "module_revoked", "a TDX module whose SVN is Revoked", quote=_body(tee_tcb_svn=tee_tcb_svn(module="Revoked"))
    ),
    _quote(
        "module_not_supported",
        "a TDX module whose SVN is below every level",
        quote=_body(tee_tcb_svn=tee_tcb_svn(module=None)),
    ),
    _quote("tcb_sw_hardening_needed", "a TCB level that is SWHardeningNeeded", quote=_tcb("SWHardeningNeeded")),
    _quote("tcb_configuration_needed", "a TCB level that is ConfigurationNeeded", quote=_tcb("ConfigurationNeeded")),
    _quote(
        "tcb_configuration_and_sw_hardening_needed",
        "a TCB level that is ConfigurationAndSWHardeningNeeded",
        quote=_tcb("ConfigurationAndSWHardeningNeeded"),
    ),
    _quote("tcb_out_of_date", "a TCB level that is OutOfDate", quote=_tcb("OutOfDate")),
    _quote(
        "tcb_out_of_date_configuration_needed",
        "a TCB level that is OutOfDateConfigurationNeeded",
        quote=_tcb("OutOfDateConfigurationNeeded"),
    ),
    _quote("tcb_revoked", "a TCB level that is Revoked", quote=_tcb("Revoked")),
    _quote("tcb_not_supported", "a TCB below every level", quote=_body(tee_tcb_svn=tee_tcb_svn(None))),
    _quote(
        "relaunch_advised",
        "launched OutOfDate, UpToDate now (v5, TD15)",
        quote=_td15(tee_tcb_svn=tee_tcb_svn("OutOfDate")),
    ),
    _quote(
        "relaunch_advised_configuration_needed",
        "launched OutOfDate, ConfigurationNeeded now (v5, TD15)",
        quote=_td15(tee_tcb_svn=tee_tcb_svn("OutOfDate"), tee_tcb_svn_2=tee_tcb_svn("ConfigurationNeeded")),
    ),
    _quote(
        "current_tcb_out_of_date",
        "launched UpToDate, OutOfDate now (v5, TD15)",
        quote=_td15(tee_tcb_svn_2=tee_tcb_svn("OutOfDate")),
    ),
    _quote(
        "current_tcb_revoked",
        "launched UpToDate, Revoked now (v5, TD15)",
        quote=_td15(tee_tcb_svn_2=tee_tcb_svn("Revoked")),
    ),
    _quote(
        "current_tcb_not_supported",
        "launched UpToDate, below every level now (v5, TD15)",
        quote=_td15(tee_tcb_svn_2=tee_tcb_svn(None)),
    ),
    # The PCK chain in the quote
    _certificates(
        "chain_garbage", "certification data that is no PEM", parts=_set(cert_data=b"no certificate at all\n")
    ),
    _certificates("chain_order", "intermediate before leaf", pck_chain=_order(1, 0, 2)),
    _certificates("chain_extra", "a fourth certificate", pck_chain=_order(0, 1, 2, 2)),
    _certificates("chain_missing_intermediate", "leaf and root only", pck_chain=_order(0, 2)),
    _certificates(
        "other_root",
        "everything under a look-alike root with the same names",
        keys=_look_alike,
    ),
    _certificates("root_expired", "a root certificate past its time", root=_set(not_after=_LONG_AGO)),
    _certificates("intermediate_expired", "an intermediate past its time", intermediate=_set(not_after=_LONG_AGO)),
    _certificates(
        "intermediate_not_yet_valid", "an intermediate before its time", intermediate=_set(not_before=_FAR_OFF)
    ),
    _certificates(
        "intermediate_signature",
        "an intermediate whose signature is not the root's",
        intermediate=_set(flip_signature=True),
    ),
    _certificates(
        "intermediate_issuer", "an intermediate that names another issuer", intermediate=_set(issuer="Another Root CA")
    ),
    _certificates(
        "intermediate_common_name",
        "an intermediate with the wrong common name",
        intermediate=_set(common_name="Another CA"),
    ),
    _certificates("intermediate_not_ca", "an intermediate that is no CA", intermediate=_set(ca=False)),
    _certificates("pck_expired", "a PCK certificate past its time", pck=_set(not_after=_LONG_AGO)),
    _certificates("pck_not_yet_valid", "a PCK certificate before its time", pck=_set(not_before=_FAR_OFF)),
    _certificates(
        "pck_signature", "a PCK certificate whose signature is not the intermediate's", pck=_set(flip_signature=True)
    ),
    _certificates("pck_issuer", "a PCK certificate that names another issuer", pck=_set(issuer="Another CA")),
    _certificates(
        "pck_signed_by_root", "a PCK certificate issued by the root itself", pck=_set(issuer=ROOT_CA, signer="root")
    ),
    _certificates("pck_common_name", "a PCK certificate with the wrong common name", pck=_set(common_name=TCB_SIGNING)),
    _certificates("pck_is_ca", "a PCK certificate that is a CA", pck=_set(ca=True)),
    _certificates("pck_sha384", "a PCK certificate signed with SHA-384", pck=_set(digest="SHA-384")),
    _certificates("pck_curve", "a PCK certificate for a P-384 key", pck=_set(curve="P-384")),
    _certificates(
        "pck_critical_extension",
        "a PCK certificate with an unknown critical extension",
        pck=_set(critical_extension=True),
    ),
    _certificates("sgx_extension_missing", "a PCK certificate without the SGX extension", pck=_set(sgx=None)),
    _certificates(
        "sgx_extension_trailing", "bytes after the SGX extension's sequence", pck=_set(sgx_trailing=bytes(2))
    ),
    _certificates(
        "sgx_extension_deep", "an item of the SGX extension nested a thousand times", pck=_sgx(5, nested(1000))
    ),
    _certificates("sgx_ppid_missing", "SGX extension without PPID", pck=_sgx(1)),
    _certificates("sgx_tcb_missing", "SGX extension without TCB", pck=_sgx(2)),
    _certificates("sgx_pce_id_missing", "SGX extension without PCE-ID", pck=_sgx(3)),
    _certificates("sgx_fmspc_missing", "SGX extension without FMSPC", pck=_sgx(4)),
    _certificates("sgx_type_missing", "SGX extension without SGX type", pck=_sgx(5)),
    _certificates("sgx_order", "SGX extension with FMSPC before PPID", pck=_sgx_order),
    _certificates(
        "sgx_component_missing",
        "SGX extension with fifteen TCB components",
        pck=_sgx(2, sgx_tcb(SGX_COMPONENTS[:15], PCE_SVN, bytes(SGX_COMPONENTS))),
    ),
    _certificates(
        "sgx_fmspc_duplicate",
        "SGX extension with FMSPC twice",
        pck=_sgx(4, octets(_OTHER_32[:6]), octets(_OTHER_32[:6])),
    ),
    _certificates("sgx_fmspc_length", "SGX extension with an FMSPC of seven bytes", pck=_sgx(4, octets(_OTHER_32[:7]))),
    _certificates(
        "sgx_fmspc_type", "SGX extension with an FMSPC that is no OCTET STRING", pck=_sgx(4, integer(0x123456789ABC))
    ),
    _certificates(
        "sgx_cpu_svn",
        "SGX extension whose CPUSVN is not its components",
        pck=_sgx(2, sgx_tcb(SGX_COMPONENTS, PCE_SVN, b"\xff" * 16)),
    ),
    # Revocation
    _collateral("pck_revoked", "the PCK certificate is in the PCK CRL", pck_crl=_revoke_own),
    _collateral("intermediate_revoked", "the intermediate is in the root CRL", root_crl=_revoke_own),
    _collateral(
        "tcb_signer_revoked", "the TCB signing certificate is in the root CRL", root_crl=_set(revoked=("TCB signing",))
    ),
    _collateral("root_revoked", "the root is in its own CRL", root_crl=_set(revoked=("root",))),
    _collateral(
        "root_crl_expired", "a root CRL past its next update", root_crl=_set(this_update=ISSUED, next_update=_LONG_AGO)
    ),
    _collateral(
        "root_crl_future", "a root CRL from the future", root_crl=_set(this_update=_FAR_OFF, next_update=EXPIRES)
    ),
    _collateral(
        "root_crl_signature", "one bit of the root CRL's signature flipped", root_crl=_set(flip_signature=True)
    ),
    _collateral("root_crl_issuer", "a root CRL that names another issuer", root_crl=_set(issuer="Another CA")),
    _collateral("root_crl_no_number", "a root CRL without a CRL number", root_crl=_set(number=None)),
    _collateral(
        "root_crl_no_aki",
        "a root CRL without an authority key identifier",
        root_crl=_set(authority_key_identifier=False),
    ),
    _collateral(
        "pck_crl_expired", "a PCK CRL past its next update", pck_crl=_set(this_update=ISSUED, next_update=_LONG_AGO)
    ),
    _collateral("pck_crl_future", "a PCK CRL from the future", pck_crl=_set(this_update=_FAR_OFF, next_update=EXPIRES)),
    _collateral("pck_crl_signature", "one bit of the PCK CRL's signature flipped", pck_crl=_set(flip_signature=True)),
    _collateral("pck_crl_issuer", "a PCK CRL that names another issuer", pck_crl=_set(issuer="Another CA")),
    _collateral("pck_crl_no_number", "a PCK CRL without a CRL number", pck_crl=_set(number=None)),
    _collateral(
        "pck_crl_no_aki", "a PCK CRL without an authority key identifier", pck_crl=_set(authority_key_identifier=False)
    ),
    _collateral("pck_crl_trailing", "a byte after the PCK CRL", pck_crl=_set(trailing=b"\0")),
    _collateral(
        "crls_swapped",
        "the two CRLs in each other's place",
        collateral=_instead(root_ca_crl="pck_crl", pck_crl="root_ca_crl"),
    ),
    _collateral(
        "pck_crl_chain",
        "the PCK CRL's issuer chain is not the CRL's",
        collateral=_instead(pck_crl_issuer_chain="tcb_info_issuer_chain"),
    ),
    # The TCB signing certificate
    _collateral("tcb_signer_expired", "a TCB signing certificate past its time", tcb_signer=_set(not_after=_LONG_AGO)),
    _collateral(
        "tcb_signer_not_yet_valid", "a TCB signing certificate before its time", tcb_signer=_set(not_before=_FAR_OFF)
    ),
    _collateral(
        "tcb_signer_signature",
        "a TCB signing certificate whose signature is not the root's",
        tcb_signer=_set(flip_signature=True),
    ),
    _collateral(
        "tcb_signer_issuer",
        "a TCB signing certificate that names another issuer",
        tcb_signer=_set(issuer="Another Root CA"),
    ),
    _collateral(
        "tcb_signer_common_name",
        "a TCB signing certificate with the wrong common name",
        tcb_signer=_set(common_name=PCK_CERTIFICATE),
    ),
    _collateral("tcb_signer_is_ca", "a TCB signing certificate that is a CA", tcb_signer=_set(ca=True)),
    _collateral("tcb_chain_order", "root before the TCB signing certificate", tcb_chain=_order(1, 0)),
    # TCB info
    _collateral(
        "tcb_info_expired", "TCB info past its next update", tcb_info=_set(issued=ISSUED, next_update=_LONG_AGO)
    ),
    _collateral("tcb_info_future", "TCB info from the future", tcb_info=_set(issued=_FAR_OFF, next_update=EXPIRES)),
    _collateral(
        "tcb_info_signature", "one bit of the TCB info's signature flipped", tcb_info=_set(flip_signature=True)
    ),
    _collateral(
        "tcb_info_altered",
        "TCB info edited after signing",
        tcb_info=_set(alter=_replace('"tcbStatus":"OutOfDate"', '"tcbStatus":"UpToDate"')),
    ),
    _collateral(
        "tcb_info_whitespace", "TCB info spelled with a space after signing", tcb_info=_set(alter=_replace(",", ", "))
    ),
    _collateral("tcb_info_garbage", "TCB info that is signed but no JSON", tcb_info=_set(respell=_replace("}", ""))),
    _collateral(
        "tcb_info_duplicate_key",
        "TCB info with a member twice",
        tcb_info=_set(respell=_replace('"tcbType":0', '"tcbType":0,"tcbType":0')),
    ),
    _collateral(
        "tcb_info_date",
        "TCB info with a date that is none",
        tcb_info=_set(respell=_replace("T00:00:00Z", "T24:61:00Z")),
    ),
    _collateral("tcb_info_id", "TCB info for SGX", tcb_info=_set(id="SGX")),
    _collateral("tcb_info_version", "TCB info of version 4", tcb_info=_set(version=4)),
    _collateral("tcb_info_tcb_type", "TCB info with tcbType 1", tcb_info=_set(tcb_type=1)),
    _collateral("tcb_info_fmspc", "TCB info of another FMSPC", tcb_info=_set(fmspc=_OTHER_32[:6])),
    _collateral("tcb_info_pce_id", "TCB info of another PCE-ID", tcb_info=_set(pce_id=b"\0\1")),
    _collateral(
        "tcb_info_sgx_components_short",
        "a TCB level with fifteen SGX components",
        tcb_info=_first_level(sgx=SGX_COMPONENTS[:15]),
    ),
    _collateral(
        "tcb_info_tdx_components_short",
        "a TCB level with fifteen TDX components",
        tcb_info=_first_level(tdx=tcb_components("UpToDate")[:15]),
    ),
    _collateral(
        "tcb_info_svn_range", "a TCB level with an SVN of 256", tcb_info=_first_level(sgx=(256, *SGX_COMPONENTS[1:]))
    ),
    _collateral(
        "tcb_info_svn_negative", "a TCB level with a negative SVN", tcb_info=_first_level(sgx=(-1, *SGX_COMPONENTS[1:]))
    ),
    _collateral(
        "tcb_info_svn_float", "a TCB level with an SVN of 2.0", tcb_info=_first_level(sgx=(3.0, *SGX_COMPONENTS[1:]))
    ),
    _collateral(
        "tcb_info_status_unknown", "a TCB level with a status that does not exist", tcb_info=_first_level(status="Fine")
    ),
    _collateral(
        "tcb_info_status_relaunch",
        "a TCB level with a status that only a verifier may give",
        tcb_info=_first_level(status="TDRelaunchAdvised"),
    ),
    _collateral(
        "tcb_info_duplicate_levels",
        "a TCB level twice",
        tcb_info=_first_level_twice,
    ),
    _collateral("tcb_info_no_levels", "no TCB level at all", tcb_info=_set(levels=())),
    _collateral(
        "tcb_info_no_evaluation_number",
        "TCB info without tcbEvaluationDataNumber",
        tcb_info=_set(leave_out="tcbEvaluationDataNumber"),
    ),
    _collateral(
        "module_identities_missing",
        "TCB info without TDX module identities",
        tcb_info=_set(leave_out="tdxModuleIdentities"),
    ),
    # QE identity
    _collateral(
        "qe_identity_expired",
        "a QE identity past its next update",
        qe_identity=_set(issued=ISSUED, next_update=_LONG_AGO),
    ),
    _collateral(
        "qe_identity_future", "a QE identity from the future", qe_identity=_set(issued=_FAR_OFF, next_update=EXPIRES)
    ),
    _collateral(
        "qe_identity_signature", "one bit of the QE identity's signature flipped", qe_identity=_set(flip_signature=True)
    ),
    _collateral(
        "qe_identity_altered",
        "a QE identity edited after signing",
        qe_identity=_set(alter=_replace('"tcbStatus":"OutOfDate"', '"tcbStatus":"UpToDate"')),
    ),
    _collateral(
        "qe_identity_garbage", "a QE identity that is signed but no JSON", qe_identity=_set(respell=_replace("}", ""))
    ),
    _collateral(
        "qe_identity_duplicate_key",
        "a QE identity with a member twice",
        qe_identity=_set(respell=_replace('"isvprodid":2', '"isvprodid":2,"isvprodid":2')),
    ),
    _collateral("qe_identity_id", "a QE identity for SGX's QE", qe_identity=_set(id="QE")),
    _collateral("qe_identity_version", "a QE identity of version 3", qe_identity=_set(version=3)),
    _collateral("qe_identity_no_levels", "a QE identity without levels", qe_identity=_set(levels={})),
    # The collateral as a whole
    _collateral(
        "collateral_of_sgx",
        "TCB info and QE identity for SGX",
        tcb_info=_set(id="SGX"),
        qe_identity=_set(id="QE"),
    ),
    _collateral("collateral_of_other_ca", "a PCK CRL, and its chain, of the other PCK CA", other_ca=True),
    _collateral(
        "pck_chain_other", "a PCK certificate chain beside the collateral that is not the quote's", chain_beside=1
    ),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _TABLE}
"""The table by name, in the order of the checks they meet."""
