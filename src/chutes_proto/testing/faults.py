"""Every way in which the simulated platform can be wrong, by name: one closed table.

Rules kept here:

* one row is one fault and nothing else: whatever the fault does not name stays as an honest platform makes it, so that the
  check which refuses it is the check it was made for;
* ``side`` says where the fault travels: in the ``quote``, in the PCK ``certificates`` inside the quote, or in the
  ``collateral``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from attrs import frozen

Side: TypeAlias = Literal["quote", "certificates", "collateral"]


@frozen
class Fault:
    """One way to be wrong. ``what`` is one line for people."""

    name: str
    side: Side
    what: str


def _quote(name: str, what: str) -> Fault:
    return Fault(name, "quote", what)


def _certificates(name: str, what: str) -> Fault:
    return Fault(name, "certificates", what)


def _collateral(name: str, what: str) -> Fault:
    return Fault(name, "collateral", what)


_TABLE = (
    # The quote's form
    _quote("truncated_body", "the quote ends inside the TD report"),
    _quote("truncated_auth", "the quote ends inside the authentication data"),
    _quote("version", "version 6 in the header"),
    _quote("tee_type", "TEE type 0 (SGX) in the header"),
    _quote("key_type", "attestation key type 3 (P-384) in the header"),
    _quote("vendor_id", "a QE vendor id that is not Intel's"),
    _quote("body_type", "v5 with a body type that does not exist"),
    _quote("body_size", "v5 with a body size that is not its type's"),
    _quote("auth_length_huge", "a length of the authentication data far beyond the end"),
    _quote("outer_length_huge", "a length of the QE report certification data far beyond the end"),
    _quote("qe_auth_length_huge", "a length of the QE authentication data beyond the end"),
    _quote("cert_length_huge", "a length of the certificate chain far beyond the end"),
    _quote("auth_trailing", "bytes after the certification data, inside the authentication data"),
    _quote("inner_trailing", "bytes after the certificate chain, inside the QE report certification data"),
    _quote("outer_type", "outer certification data of type 5 instead of 6"),
    _quote("cert_type", "inner certification data of type 4 instead of 5"),
    # The quote's signatures
    _quote("quote_signature", "one bit of the quote signature flipped"),
    _quote("body_altered", "a bit of the TD report flipped after signing"),
    _quote("header_altered", "a bit of the header's user data flipped after signing"),
    _quote("attestation_key", "the quote signed by another attestation key than the QE vouched for"),
    _quote("qe_report_signature", "one bit of the QE report signature flipped"),
    _quote("qe_report_altered", "a bit of the QE report flipped after signing"),
    _quote("qe_report_data", "QE report data that is not the hash of the attestation key"),
    _quote("qe_report_data_tail", "the second half of the QE report data not zero"),
    _quote("qe_auth_altered", "a bit of the QE authentication data flipped after signing"),
    # The quoting enclave against its identity
    _quote("qe_debug", "a quoting enclave in debug mode"),
    _quote("qe_mrsigner", "a quoting enclave of another signer"),
    _quote("qe_prod_id", "a quoting enclave of another product"),
    _quote("qe_misc_select", "a quoting enclave with another MISCSELECT"),
    _quote("qe_attributes", "a quoting enclave with other attributes"),
    _quote("qe_outdated", "a quoting enclave whose SVN is OutOfDate"),
    _quote("qe_revoked", "a quoting enclave whose SVN is Revoked"),
    _quote("qe_not_supported", "a quoting enclave whose SVN is below every level"),
    # What the TD report says
    _quote("debug", "a debug TD (TUD bit 0)"),
    _quote("profiling", "a TD with performance profiling (TUD bit 5)"),
    _quote("reserved_tud", "a reserved bit of the TUD byte set"),
    _quote("reserved_sec", "a reserved bit of the SEC part of the TD attributes set"),
    _quote("reserved_other", "a reserved bit of the OTHER part of the TD attributes set"),
    _quote("sept_ve_disable_clear", "a TD without SEPT_VE_DISABLE"),
    _quote("migratable", "a migratable TD"),
    _quote("servtd_ext", "a TD with SERVTD_EXT"),
    _quote("service_td", "a TD bound to a service TD (v5, TD15)"),
    _quote("xfam", "an XFAM without its fixed bits"),
    _quote("mrtd", "another MRTD"),
    _quote("rtmr0", "another RTMR0"),
    _quote("rtmr1", "another RTMR1"),
    _quote("rtmr2", "another RTMR2"),
    _quote("rtmr3", "another RTMR3"),
    _quote("report_data_nonce", "another first half of the report data (the nonce)"),
    _quote("report_data_key", "another second half of the report data (the TLS key)"),
    # The TDX module and the TCB of the platform
    _quote("seam_attributes", "SEAM attributes that are not zero"),
    _quote("module_mrsigner", "a TDX module of another signer"),
    _quote("module_unknown", "a TDX module of a major version without identity"),
    _quote("module_outdated", "a TDX module whose SVN is OutOfDate"),
    _quote("module_revoked", "a TDX module whose SVN is Revoked"),
    _quote("module_not_supported", "a TDX module whose SVN is below every level"),
    _quote("tcb_sw_hardening_needed", "a TCB level that is SWHardeningNeeded"),
    _quote("tcb_configuration_needed", "a TCB level that is ConfigurationNeeded"),
    _quote("tcb_configuration_and_sw_hardening_needed", "a TCB level that is ConfigurationAndSWHardeningNeeded"),
    _quote("tcb_out_of_date", "a TCB level that is OutOfDate"),
    _quote("tcb_out_of_date_configuration_needed", "a TCB level that is OutOfDateConfigurationNeeded"),
    _quote("tcb_revoked", "a TCB level that is Revoked"),
    _quote("tcb_not_supported", "a TCB below every level"),
    _quote("relaunch_advised", "launched OutOfDate, UpToDate now (v5, TD15)"),
    _quote("relaunch_advised_configuration_needed", "launched OutOfDate, ConfigurationNeeded now (v5, TD15)"),
    _quote("current_tcb_revoked", "launched UpToDate, Revoked now (v5, TD15)"),
    _quote("current_tcb_not_supported", "launched UpToDate, below every level now (v5, TD15)"),
    # The PCK chain in the quote
    _certificates("chain_garbage", "certification data that is no PEM"),
    _certificates("chain_order", "intermediate before leaf"),
    _certificates("chain_extra", "a fourth certificate"),
    _certificates("chain_missing_intermediate", "leaf and root only"),
    _certificates("other_root", "everything under a look-alike root with the same names"),
    _certificates("root_expired", "a root certificate past its time"),
    _certificates("intermediate_expired", "an intermediate past its time"),
    _certificates("intermediate_not_yet_valid", "an intermediate before its time"),
    _certificates("intermediate_signature", "an intermediate whose signature is not the root's"),
    _certificates("intermediate_issuer", "an intermediate that names another issuer"),
    _certificates("intermediate_common_name", "an intermediate with the wrong common name"),
    _certificates("intermediate_not_ca", "an intermediate that is no CA"),
    _certificates("pck_expired", "a PCK certificate past its time"),
    _certificates("pck_not_yet_valid", "a PCK certificate before its time"),
    _certificates("pck_signature", "a PCK certificate whose signature is not the intermediate's"),
    _certificates("pck_issuer", "a PCK certificate that names another issuer"),
    _certificates("pck_signed_by_root", "a PCK certificate issued by the root itself"),
    _certificates("pck_common_name", "a PCK certificate with the wrong common name"),
    _certificates("pck_is_ca", "a PCK certificate that is a CA"),
    _certificates("pck_sha384", "a PCK certificate signed with SHA-384"),
    _certificates("pck_curve", "a PCK certificate for a P-384 key"),
    _certificates("pck_critical_extension", "a PCK certificate with an unknown critical extension"),
    _certificates("sgx_extension_missing", "a PCK certificate without the SGX extension"),
    _certificates("sgx_extension_trailing", "bytes after the SGX extension's sequence"),
    _certificates("sgx_extension_deep", "an item of the SGX extension nested a thousand times"),
    _certificates("sgx_ppid_missing", "SGX extension without PPID"),
    _certificates("sgx_tcb_missing", "SGX extension without TCB"),
    _certificates("sgx_pce_id_missing", "SGX extension without PCE-ID"),
    _certificates("sgx_fmspc_missing", "SGX extension without FMSPC"),
    _certificates("sgx_type_missing", "SGX extension without SGX type"),
    _certificates("sgx_component_missing", "SGX extension with fifteen TCB components"),
    _certificates("sgx_fmspc_duplicate", "SGX extension with FMSPC twice"),
    _certificates("sgx_fmspc_length", "SGX extension with an FMSPC of seven bytes"),
    _certificates("sgx_fmspc_type", "SGX extension with an FMSPC that is no OCTET STRING"),
    _certificates("sgx_cpu_svn", "SGX extension whose CPUSVN is not its components"),
    # Revocation
    _collateral("pck_revoked", "the PCK certificate is in the PCK CRL"),
    _collateral("intermediate_revoked", "the intermediate is in the root CRL"),
    _collateral("tcb_signer_revoked", "the TCB signing certificate is in the root CRL"),
    _collateral("root_revoked", "the root is in its own CRL"),
    _collateral("root_crl_expired", "a root CRL past its next update"),
    _collateral("root_crl_future", "a root CRL from the future"),
    _collateral("root_crl_signature", "one bit of the root CRL's signature flipped"),
    _collateral("root_crl_issuer", "a root CRL that names another issuer"),
    _collateral("root_crl_no_number", "a root CRL without a CRL number"),
    _collateral("root_crl_no_aki", "a root CRL without an authority key identifier"),
    _collateral("pck_crl_expired", "a PCK CRL past its next update"),
    _collateral("pck_crl_future", "a PCK CRL from the future"),
    _collateral("pck_crl_signature", "one bit of the PCK CRL's signature flipped"),
    _collateral("pck_crl_issuer", "a PCK CRL that names another issuer"),
    _collateral("pck_crl_no_number", "a PCK CRL without a CRL number"),
    _collateral("pck_crl_no_aki", "a PCK CRL without an authority key identifier"),
    _collateral("pck_crl_trailing", "a byte after the PCK CRL"),
    _collateral("crls_swapped", "the two CRLs in each other's place"),
    _collateral("pck_crl_chain", "the PCK CRL's issuer chain is not the CRL's"),
    # The TCB signing certificate
    _collateral("tcb_signer_expired", "a TCB signing certificate past its time"),
    _collateral("tcb_signer_not_yet_valid", "a TCB signing certificate before its time"),
    _collateral("tcb_signer_signature", "a TCB signing certificate whose signature is not the root's"),
    _collateral("tcb_signer_issuer", "a TCB signing certificate that names another issuer"),
    _collateral("tcb_signer_common_name", "a TCB signing certificate with the wrong common name"),
    _collateral("tcb_signer_is_ca", "a TCB signing certificate that is a CA"),
    _collateral("tcb_signer_is_pck", "TCB info and QE identity signed by the PCK key"),
    _collateral("tcb_chain_order", "root before the TCB signing certificate"),
    # TCB info
    _collateral("tcb_info_expired", "TCB info past its next update"),
    _collateral("tcb_info_future", "TCB info from the future"),
    _collateral("tcb_info_signature", "one bit of the TCB info's signature flipped"),
    _collateral("tcb_info_altered", "TCB info edited after signing"),
    _collateral("tcb_info_whitespace", "TCB info spelled with a space after signing"),
    _collateral("tcb_info_garbage", "TCB info that is signed but no JSON"),
    _collateral("tcb_info_duplicate_key", "TCB info with a member twice"),
    _collateral("tcb_info_date", "TCB info with a date that is none"),
    _collateral("tcb_info_id", "TCB info for SGX"),
    _collateral("tcb_info_version", "TCB info of version 4"),
    _collateral("tcb_info_tcb_type", "TCB info with tcbType 1"),
    _collateral("tcb_info_fmspc", "TCB info of another FMSPC"),
    _collateral("tcb_info_pce_id", "TCB info of another PCE-ID"),
    _collateral("tcb_info_sgx_components_short", "a TCB level with fifteen SGX components"),
    _collateral("tcb_info_tdx_components_short", "a TCB level with fifteen TDX components"),
    _collateral("tcb_info_svn_range", "a TCB level with an SVN of 256"),
    _collateral("tcb_info_svn_negative", "a TCB level with a negative SVN"),
    _collateral("tcb_info_svn_float", "a TCB level with an SVN of 2.0"),
    _collateral("tcb_info_status_unknown", "a TCB level with a status that does not exist"),
    _collateral("tcb_info_status_relaunch", "a TCB level with a status that only a verifier may give"),
    _collateral("tcb_info_duplicate_levels", "a TCB level twice"),
    _collateral("tcb_info_no_levels", "no TCB level at all"),
    _collateral("tcb_info_no_evaluation_number", "TCB info without tcbEvaluationDataNumber"),
    _collateral("module_identities_missing", "TCB info without TDX module identities"),
    # QE identity
    _collateral("qe_identity_expired", "a QE identity past its next update"),
    _collateral("qe_identity_future", "a QE identity from the future"),
    _collateral("qe_identity_signature", "one bit of the QE identity's signature flipped"),
    _collateral("qe_identity_altered", "a QE identity edited after signing"),
    _collateral("qe_identity_garbage", "a QE identity that is signed but no JSON"),
    _collateral("qe_identity_duplicate_key", "a QE identity with a member twice"),
    _collateral("qe_identity_id", "a QE identity for SGX's QE"),
    _collateral("qe_identity_version", "a QE identity of version 3"),
    _collateral("qe_identity_no_levels", "a QE identity without levels"),
    # The collateral as a whole
    _collateral("pck_chain_other", "a PCK certificate chain beside the collateral that is not the quote's"),
)

FAULTS: dict[str, Fault] = {fault.name: fault for fault in _TABLE}
"""The table by name, in the order of the checks they meet."""
