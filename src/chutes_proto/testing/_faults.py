"""Faults of the simulated platform, by name: one closed table.

Rules kept here:

* one row is one fault and nothing else: everything that the fault does not name stays as an honest platform makes it,
  with signatures to match, so that the check which refuses it is the check it was made for;
* ``side`` says where the fault travels: in the ``quote``, in the PCK ``certificates`` inside the quote, or in the
  ``collateral``;
* a TCB status is a fault of the quote: the platform runs old parts, and honest collateral says so.

A row is written by the maker of the draft that it changes: ``_pck("pck_is_ca", …, ca=True)`` sets a field of the PCK
certificate's draft.
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
    flipped,
    nested,
    sgx_tcb,
)
from chutes_proto.testing._quotes import TD_REPORT, QuoteDraft, QuoteParts
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
Change: TypeAlias = Callable[[T], T]


def unchanged(value: T) -> T:
    return value


@frozen(kw_only=True)
class Fault:
    """One fault: everything that an honest platform makes passes through these changes, in the order of the fields.

    ``what`` describes it in one line. ``pck_chain`` and ``tcb_chain`` change lists of certificates in DER, ``quote`` a
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
_PAST: Final = {"issued": ISSUED, "next_update": _LONG_AGO}
_FUTURE: Final = {"issued": _FAR_OFF, "next_update": EXPIRES}
_PAST_CRL: Final = {"this_update": ISSUED, "next_update": _LONG_AGO}
_FUTURE_CRL: Final = {"this_update": _FAR_OFF, "next_update": EXPIRES}
_OTHER_32: Final = sha256(b"another").digest()
_OTHER_48: Final = sha384(b"another").digest()
_FIFTEEN: Final = SGX_COMPONENTS[:15]
_OTHER_KEY: Final = "another attestation key"


# --- changes ---


def _look_alike(keys: Keys) -> Keys:
    return Keys(keys.draw("look-alike", 32))


def _set(**changes: Any) -> Change[Any]:
    return lambda draft: evolve(draft, **changes)


def _set_in(part: str, **changes: Any) -> Change[QuoteDraft]:
    """Changes of one part of a quote."""
    return lambda draft: evolve(draft, **{part: evolve(getattr(draft, part), **changes)})


def _v5(**changes: Any) -> Change[QuoteDraft]:
    """A v5 quote with a TD10 report, unless the changes say otherwise."""
    return lambda draft: evolve(draft, **{"form": "v5-td10", "header": evolve(draft.header, version=5), **changes})


def _td15(**changes: Any) -> Change[QuoteDraft]:
    return lambda draft: _v5(form="v5-td15", body=evolve(draft.body, **changes))(draft)


def _attribute(bit: int) -> Change[QuoteDraft]:
    return lambda draft: _set_in("body", td_attributes=draft.body.td_attributes | 1 << bit)(draft)


def _qe_attributes(flags: int) -> bytes:
    return bytes([flags, *bytes(7), 0xE7, *bytes(7)])


def _rtmr(index: int) -> Change[QuoteDraft]:
    def change(draft: QuoteDraft) -> QuoteDraft:
        rtmrs = list(draft.body.rtmrs)
        rtmrs[index] = _OTHER_48
        return _set_in("body", rtmrs=tuple(rtmrs))(draft)

    return change


def _report_data(offset: int) -> Change[QuoteDraft]:
    return lambda draft: _set_in("body", report_data=flipped(draft.body.report_data, offset))(draft)


def _flip(part: str, offset: int = -1) -> Change[QuoteParts]:
    return lambda parts: _set(**{part: flipped(getattr(parts, part), offset)})(parts)


def _item(number: int, *values: bytes) -> Change[CertificateDraft]:
    """The SGX extension with these values for one item: none, one or more."""

    def change(draft: CertificateDraft) -> CertificateDraft:
        items = draft.sgx or ()
        at = [n for n, _ in items].index(number)
        return evolve(draft, sgx=(*items[:at], *((number, value) for value in values), *items[at + 1 :]))

    return change


def _fmspc_first(draft: CertificateDraft) -> CertificateDraft:
    """The second half of the SGX extension's items before the first."""
    items = draft.sgx or ()
    return evolve(draft, sgx=(*items[3:], *items[:3]))


def _cut(at: int) -> Change[bytes]:
    return lambda data: data[:at]


def _order(*positions: int) -> Change[Chain]:
    return lambda chain: tuple(chain[position] for position in positions)


def _revoke_own(draft: CrlDraft) -> CrlDraft:
    return evolve(draft, revoked=(*draft.revoked, draft.own))


def _first_level_twice(info: TcbInfo) -> TcbInfo:
    return evolve(info, levels=(info.levels[0], *info.levels))


def _replace(old: str, new: str) -> Change[str]:
    return lambda text: text.replace(old, new)


def _twice(member: str) -> Change[str]:
    return _replace(member, f"{member},{member}")


_UPGRADE: Final = _replace('"tcbStatus":"OutOfDate"', '"tcbStatus":"UpToDate"')


# --- rows ---


def _row(side: Side, name: str, what: str, **changes: Any) -> Fault:
    return Fault(name=name, side=side, what=what, **changes)


def _rows_of(side: Side, part: str, setting: Callable[..., Change[Any]] = _set) -> Callable[..., Fault]:
    """Return the maker of rows that change one draft: by a function, or by values for some of its fields."""

    def row(name: str, what: str, change: Change[Any] | None = None, **fields: Any) -> Fault:
        return _row(side, name, what, **{part: change or setting(**fields)})

    return row


_certificates, _collateral = partial(_row, "certificates"), partial(_row, "collateral")
_quote = _rows_of("quote", "quote")
_header, _report, _enclave = (
    _rows_of("quote", "quote", partial(_set_in, part)) for part in ("header", "body", "qe_report")
)
_parts, _bytes = _rows_of("quote", "parts"), _rows_of("quote", "raw")
_root, _intermediate, _pck, _chain = (
    _rows_of("certificates", part) for part in ("root", "intermediate", "pck", "pck_chain")
)
_root_crl, _pck_crl, _tcb_signer, _tcb_info, _qe_identity, _members = (
    _rows_of("collateral", part)
    for part in ("root_crl", "pck_crl", "tcb_signer", "tcb_info", "qe_identity", "collateral")
)


def _launched(name: str, what: str, status: str | None = "UpToDate", **module: Any) -> Fault:
    return _report(name, what, tee_tcb_svn=tee_tcb_svn(status, **module))


def _tcb(name: str, status: str) -> Fault:
    """A platform that runs, and ran at launch, the TCB with this status."""
    svns = tee_tcb_svn(status)
    return _report(name, f"a TCB level that is {status}", tee_tcb_svn=svns, tee_tcb_svn_2=svns)


def _relaunch(name: str, launched: str, now: str | None) -> Fault:
    what = f"launched {launched}, {now or 'below every level'} now (v5, TD15)"
    return _quote(name, what, _td15(tee_tcb_svn=tee_tcb_svn(launched), tee_tcb_svn_2=tee_tcb_svn(now)))


def _sgx(name: str, what: str, number: int, *values: bytes) -> Fault:
    return _pck(name, f"SGX extension {what}", _item(number, *values))


def _level(name: str, what: str, **fields: Any) -> Fault:
    def change(info: TcbInfo) -> TcbInfo:
        return evolve(info, levels=(evolve(info.levels[0], **fields), *info.levels[1:]))

    return _tcb_info(name, f"a TCB level {what}", change)


def _swapped(name: str, what: str, **members: str) -> Fault:
    """Make a row with members of the collateral that have the content of others."""

    def change(files: dict[str, str]) -> dict[str, str]:
        return {**files, **{member: files[other] for member, other in members.items()}}

    return _members(name, what, change)


_TABLE = (
    # The quote's form
    _bytes("truncated_body", "the quote ends inside the TD report", _cut(TD_REPORT + 500)),
    _bytes("truncated_auth", "the quote ends inside the authentication data", _cut(TD_REPORT + 584 + 4 + 600)),
    _header("version", "version 6 in the header", version=6),
    _header("tee_type", "TEE type 0 (SGX) in the header", tee_type=0),
    _header("key_type", "attestation key type 3 (P-384) in the header", key_type=3),
    _header("vendor_id", "a QE vendor id that is not Intel's", vendor_id=bytes(16)),
    _quote("body_type", "v5 with a body type that does not exist", _v5(body_type=9)),
    _quote("body_size", "v5 with a body size that is not its type's", _v5(body_size=583)),
    _parts("auth_length_huge", "a length of the authentication data far beyond the end", auth_length=0xFFFFFFFF),
    _parts("outer_length_huge", "a length of the QE certification data far beyond the end", outer_length=0xFFFFFFFF),
    _parts("qe_auth_length_huge", "a length of the QE authentication data beyond the end", qe_auth_length=0xFFFF),
    _parts("cert_length_huge", "a length of the certificate chain far beyond the end", cert_length=0xFFFFFFFF),
    _parts("auth_trailing", "authentication data with bytes after the certification data", auth_trailing=bytes(8)),
    _parts("inner_trailing", "certification data with bytes after the certificate chain", inner_trailing=bytes(8)),
    _parts("outer_type", "outer certification data of type 5 instead of 6", outer_type=5),
    _parts("cert_type", "inner certification data of type 4 instead of 5", cert_type=4),
    # The quote's signatures
    _parts("quote_signature", "one bit of the quote signature flipped", _flip("signature")),
    _parts("body_altered", "a bit of the TD report flipped after signing", _flip("signed")),
    _parts("header_altered", "a bit of the header's user data flipped after signing", _flip("signed", 47)),
    _quote("attestation_key", "the quote signed by another key than its attestation key", signing_key=_OTHER_KEY),
    _quote(
        "attestation_key_substituted",
        "another attestation key than the QE vouched for, and the quote signed by it",
        signing_key=_OTHER_KEY,
        attestation_key=_OTHER_KEY,
    ),
    _quote("attestation_key_invalid", "a vouched-for attestation key off the curve", attestation_point=bytes(64)),
    _parts("qe_report_signature", "one bit of the QE report signature flipped", _flip("qe_signature")),
    _parts("qe_report_altered", "a bit of the QE report flipped after signing", _flip("qe_report", 0)),
    _enclave("qe_report_data", "QE report data that is not the hash of the attestation key", report_data=bytes(32)),
    _enclave("qe_report_data_tail", "QE report data with a second half that is not zero", report_data_tail=_OTHER_32),
    _parts("qe_auth_altered", "a bit of the QE authentication data flipped after signing", _flip("qe_auth")),
    # The quoting enclave against its identity
    _enclave("qe_debug", "a quoting enclave in debug mode", attributes=_qe_attributes(0x17)),
    _enclave("qe_mrsigner", "a quoting enclave of another signer", mr_signer=_OTHER_32),
    _enclave("qe_prod_id", "a quoting enclave of another product", prod_id=1),
    _enclave("qe_misc_select", "a quoting enclave with another MISCSELECT", misc_select=1),
    _enclave("qe_attributes", "a quoting enclave with other attributes", attributes=_qe_attributes(0x35)),
    _enclave("qe_outdated", "a quoting enclave whose SVN is OutOfDate", svn=SVN_LADDER["OutOfDate"]),
    _enclave("qe_revoked", "a quoting enclave whose SVN is Revoked", svn=SVN_LADDER["Revoked"]),
    _enclave("qe_not_supported", "a quoting enclave whose SVN is below every level", svn=0),
    # The TD report
    _quote("debug", "a debug TD (TUD bit 0)", _attribute(0)),
    _quote("profiling", "a TD with performance profiling (TUD bit 5)", _attribute(5)),
    _quote("reserved_tud", "a reserved bit of the TUD byte set", _attribute(1)),
    _quote("reserved_sec", "a reserved bit of the SEC part of the TD attributes set", _attribute(23)),
    _quote("reserved_other", "a reserved bit of the OTHER part of the TD attributes set", _attribute(32)),
    _report("sept_ve_disable_clear", "a TD without SEPT_VE_DISABLE", td_attributes=0),
    _quote("migratable", "a migratable TD", _attribute(29)),
    _quote("servtd_ext", "a TD with SERVTD_EXT", _attribute(17)),
    _quote("service_td", "a TD bound to a service TD (v5, TD15)", _td15(mr_service_td=_OTHER_48)),
    _report("xfam", "an XFAM without its fixed bits", xfam=0),
    _report("mrtd", "another MRTD", mr_td=_OTHER_48),
    _quote("rtmr0", "another RTMR0", _rtmr(0)),
    _quote("rtmr1", "another RTMR1", _rtmr(1)),
    _quote("rtmr2", "another RTMR2", _rtmr(2)),
    _quote("rtmr3", "another RTMR3", _rtmr(3)),
    _quote("report_data_nonce", "another first half of the report data (the nonce)", _report_data(0)),
    _quote("report_data_key", "another second half of the report data (the TLS key)", _report_data(32)),
    # The TDX module and the TCB of the platform
    _report("seam_attributes", "SEAM attributes that are not zero", seam_attributes=1),
    _report("module_mrsigner", "a TDX module of another signer", mr_signer_seam=_OTHER_48),
    _launched("module_unknown", "a TDX module of a major version without identity", module_version=9),
    _launched("module_outdated", "a TDX module whose SVN is OutOfDate", module="OutOfDate"),
    _launched("module_revoked", "a TDX module whose SVN is Revoked", module="Revoked"),
    _launched("module_not_supported", "a TDX module whose SVN is below every level", module=None),
    _tcb("tcb_sw_hardening_needed", "SWHardeningNeeded"),
    _tcb("tcb_configuration_needed", "ConfigurationNeeded"),
    _tcb("tcb_configuration_and_sw_hardening_needed", "ConfigurationAndSWHardeningNeeded"),
    _tcb("tcb_out_of_date", "OutOfDate"),
    _tcb("tcb_out_of_date_configuration_needed", "OutOfDateConfigurationNeeded"),
    _tcb("tcb_revoked", "Revoked"),
    _launched("tcb_not_supported", "a TCB below every level", None),
    _relaunch("relaunch_advised", "OutOfDate", "UpToDate"),
    _relaunch("relaunch_advised_configuration_needed", "OutOfDate", "ConfigurationNeeded"),
    _relaunch("current_tcb_out_of_date", "UpToDate", "OutOfDate"),
    _relaunch("current_tcb_revoked", "UpToDate", "Revoked"),
    _relaunch("current_tcb_not_supported", "UpToDate", None),
    # The PCK chain in the quote
    _certificates(
        "chain_garbage", "certification data that is not PEM", parts=_set(cert_data=b"no certificate at all\n")
    ),
    _chain("chain_order", "intermediate before leaf", _order(1, 0, 2)),
    _chain("chain_extra", "a fourth certificate", _order(0, 1, 2, 2)),
    _chain("chain_missing_intermediate", "leaf and root only", _order(0, 2)),
    _certificates("other_root", "everything under a look-alike root with the same names", keys=_look_alike),
    _root("root_expired", "a root certificate past its time", not_after=_LONG_AGO),
    _intermediate("intermediate_expired", "an intermediate past its time", not_after=_LONG_AGO),
    _intermediate("intermediate_not_yet_valid", "an intermediate before its time", not_before=_FAR_OFF),
    _intermediate("intermediate_signature", "an intermediate whose signature is not the root's", flip_signature=True),
    _intermediate("intermediate_issuer", "an intermediate that names another issuer", issuer="Another Root CA"),
    _intermediate("intermediate_common_name", "an intermediate with the wrong common name", common_name="Another CA"),
    _intermediate("intermediate_not_ca", "an intermediate that is not a CA", ca=False),
    _pck("pck_expired", "a PCK certificate past its time", not_after=_LONG_AGO),
    _pck("pck_not_yet_valid", "a PCK certificate before its time", not_before=_FAR_OFF),
    _pck("pck_signature", "a PCK certificate whose signature is not the intermediate's", flip_signature=True),
    _pck("pck_issuer", "a PCK certificate that names another issuer", issuer="Another CA"),
    _pck("pck_signed_by_root", "a PCK certificate issued by the root itself", issuer=ROOT_CA, signer="root"),
    _pck("pck_common_name", "a PCK certificate with the wrong common name", common_name=TCB_SIGNING),
    _pck("pck_is_ca", "a PCK certificate that is a CA", ca=True),
    _pck("pck_sha384", "a PCK certificate signed with SHA-384", digest="SHA-384"),
    _pck("pck_curve", "a PCK certificate for a P-384 key", curve="P-384"),
    _pck("pck_critical_extension", "a PCK certificate with an unknown critical extension", critical_extension=True),
    _pck("sgx_extension_missing", "a PCK certificate without the SGX extension", sgx=None),
    _pck("sgx_extension_trailing", "bytes after the SGX extension's sequence", sgx_trailing=bytes(2)),
    _sgx("sgx_extension_deep", "with an item nested a thousand times", 5, nested(1000)),
    _sgx("sgx_ppid_missing", "without PPID", 1),
    _sgx("sgx_tcb_missing", "without TCB", 2),
    _sgx("sgx_pce_id_missing", "without PCE-ID", 3),
    _sgx("sgx_fmspc_missing", "without FMSPC", 4),
    _sgx("sgx_type_missing", "without SGX type", 5),
    _pck("sgx_order", "SGX extension with FMSPC before PPID", _fmspc_first),
    _sgx("sgx_component_missing", "with fifteen TCB components", 2, sgx_tcb(_FIFTEEN, PCE_SVN, bytes(SGX_COMPONENTS))),
    _sgx("sgx_fmspc_duplicate", "with FMSPC twice", 4, octets(_OTHER_32[:6]), octets(_OTHER_32[:6])),
    _sgx("sgx_fmspc_length", "with an FMSPC of seven bytes", 4, octets(_OTHER_32[:7])),
    _sgx("sgx_fmspc_type", "with an FMSPC that is not an OCTET STRING", 4, integer(0x123456789ABC)),
    _sgx("sgx_cpu_svn", "whose CPUSVN is not its components", 2, sgx_tcb(SGX_COMPONENTS, PCE_SVN, b"\xff" * 16)),
    # Revocation
    _pck_crl("pck_revoked", "the PCK certificate is in the PCK CRL", _revoke_own),
    _root_crl("intermediate_revoked", "the intermediate is in the root CRL", _revoke_own),
    _root_crl("tcb_signer_revoked", "the TCB signing certificate is in the root CRL", revoked=("TCB signing",)),
    _root_crl("root_revoked", "the root is in its own CRL", revoked=("root",)),
    _root_crl("root_crl_expired", "a root CRL past its next update", **_PAST_CRL),
    _root_crl("root_crl_future", "a root CRL from the future", **_FUTURE_CRL),
    _root_crl("root_crl_signature", "one bit of the root CRL's signature flipped", flip_signature=True),
    _root_crl("root_crl_issuer", "a root CRL that names another issuer", issuer="Another CA"),
    _root_crl("root_crl_no_number", "a root CRL without a CRL number", number=None),
    _root_crl("root_crl_no_aki", "a root CRL without an authority key identifier", authority_key_identifier=False),
    _pck_crl("pck_crl_expired", "a PCK CRL past its next update", **_PAST_CRL),
    _pck_crl("pck_crl_future", "a PCK CRL from the future", **_FUTURE_CRL),
    _pck_crl("pck_crl_signature", "one bit of the PCK CRL's signature flipped", flip_signature=True),
    _pck_crl("pck_crl_issuer", "a PCK CRL that names another issuer", issuer="Another CA"),
    _pck_crl("pck_crl_no_number", "a PCK CRL without a CRL number", number=None),
    _pck_crl("pck_crl_no_aki", "a PCK CRL without an authority key identifier", authority_key_identifier=False),
    _pck_crl("pck_crl_trailing", "a byte after the PCK CRL", trailing=b"\0"),
    _swapped("crls_swapped", "the two CRLs in each other's place", root_ca_crl="pck_crl", pck_crl="root_ca_crl"),
    _swapped("pck_crl_chain", "another issuer chain for the PCK CRL", pck_crl_issuer_chain="tcb_info_issuer_chain"),
    # The TCB signing certificate
    _tcb_signer("tcb_signer_expired", "a TCB signing certificate past its time", not_after=_LONG_AGO),
    _tcb_signer("tcb_signer_not_yet_valid", "a TCB signing certificate before its time", not_before=_FAR_OFF),
    _tcb_signer("tcb_signer_signature", "a TCB signing certificate that the root did not sign", flip_signature=True),
    _tcb_signer("tcb_signer_issuer", "a TCB signing certificate that names another issuer", issuer="Another Root CA"),
    _tcb_signer("tcb_signer_common_name", "a TCB signing certificate with a PCK's name", common_name=PCK_CERTIFICATE),
    _tcb_signer("tcb_signer_is_ca", "a TCB signing certificate that is a CA", ca=True),
    _collateral("tcb_chain_order", "root before the TCB signing certificate", tcb_chain=_order(1, 0)),
    # TCB info
    _tcb_info("tcb_info_expired", "TCB info past its next update", **_PAST),
    _tcb_info("tcb_info_future", "TCB info from the future", **_FUTURE),
    _tcb_info("tcb_info_signature", "one bit of the TCB info's signature flipped", flip_signature=True),
    _tcb_info("tcb_info_altered", "TCB info edited after signing", alter=_UPGRADE),
    _tcb_info("tcb_info_whitespace", "TCB info spelled with a space after signing", alter=_replace(",", ", ")),
    _tcb_info("tcb_info_garbage", "TCB info that is signed but is not JSON", respell=_replace("}", "")),
    _tcb_info("tcb_info_duplicate_key", "TCB info with a member twice", respell=_twice('"tcbType":0')),
    _tcb_info(
        "tcb_info_date", "TCB info with a date that does not exist", respell=_replace("T00:00:00Z", "T24:61:00Z")
    ),
    _tcb_info("tcb_info_id", "TCB info for SGX", id="SGX"),
    _tcb_info("tcb_info_version", "TCB info of version 4", version=4),
    _tcb_info("tcb_info_tcb_type", "TCB info with tcbType 1", tcb_type=1),
    _tcb_info("tcb_info_fmspc", "TCB info of another FMSPC", fmspc=_OTHER_32[:6]),
    _tcb_info("tcb_info_pce_id", "TCB info of another PCE-ID", pce_id=b"\0\1"),
    _level("tcb_info_sgx_components_short", "with fifteen SGX components", sgx=SGX_COMPONENTS[:15]),
    _level("tcb_info_tdx_components_short", "with fifteen TDX components", tdx=tcb_components("UpToDate")[:15]),
    _level("tcb_info_svn_range", "with an SVN of 256", sgx=(256, *SGX_COMPONENTS[1:])),
    _level("tcb_info_svn_negative", "with a negative SVN", sgx=(-1, *SGX_COMPONENTS[1:])),
    _level("tcb_info_svn_float", "with an SVN of 3.0", sgx=(3.0, *SGX_COMPONENTS[1:])),
    _level("tcb_info_status_unknown", "with a status that does not exist", status="Fine"),
    _level("tcb_info_status_relaunch", "with a status that only a verifier may give", status="TDRelaunchAdvised"),
    _tcb_info("tcb_info_duplicate_levels", "a TCB level twice", _first_level_twice),
    _tcb_info("tcb_info_no_levels", "no TCB level at all", levels=()),
    _tcb_info("tcb_info_no_evaluation_number", "TCB info without its number", leave_out="tcbEvaluationDataNumber"),
    _tcb_info("module_identities_missing", "TCB info without TDX module identities", leave_out="tdxModuleIdentities"),
    # QE identity
    _qe_identity("qe_identity_expired", "a QE identity past its next update", **_PAST),
    _qe_identity("qe_identity_future", "a QE identity from the future", **_FUTURE),
    _qe_identity("qe_identity_signature", "one bit of the QE identity's signature flipped", flip_signature=True),
    _qe_identity("qe_identity_altered", "a QE identity edited after signing", alter=_UPGRADE),
    _qe_identity("qe_identity_garbage", "a QE identity that is signed but is not JSON", respell=_replace("}", "")),
    _qe_identity("qe_identity_duplicate_key", "a QE identity with a member twice", respell=_twice('"isvprodid":2')),
    _qe_identity("qe_identity_id", "a QE identity for SGX's QE", id="QE"),
    _qe_identity("qe_identity_version", "a QE identity of version 3", version=3),
    _qe_identity("qe_identity_no_levels", "a QE identity without levels", levels={}),
    # The collateral as a whole
    _collateral("collateral_of_sgx", "collateral for SGX", tcb_info=_set(id="SGX"), qe_identity=_set(id="QE")),
    _collateral("collateral_of_other_ca", "a PCK CRL, and its chain, of the other PCK CA", other_ca=True),
    _collateral("pck_chain_other", "another machine's PCK certificate chain beside the collateral", chain_beside=1),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _TABLE}
"""The table by name, in the order of the checks they meet."""
