"""The steps of verification, as one table: number, error class, code, what holds once it passes, and the faults of the
simulated platform (``chutes_proto.testing``) that it refuses.

A new check is one row here, and one function in ``verify.py`` or ``tcb.py`` with the row's number beside it. Steps 3 to
10 are taken for every chain of certificates, 12 to 15 for both CRLs, 16 to 18 for TCB info and QE identity: the error's
``subject`` says for which piece. The order is that of the parts of Intel's Quote Verification Library: PCK certificate,
CRLs, TCB info, QE identity, quote, TCB levels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias, cast

from attrs import frozen

from chutes_proto.quote.errors import VerificationError

Step: TypeAlias = type[VerificationError]


def _step(number: int, name: str, code: str, rule: str, faults: str = "") -> Step:
    members = {
        "__module__": __name__,
        "__doc__": f"Step {number}: {rule}.",
        "number": number,
        "code": code,
        "rule": rule,
        "faults": tuple(faults.split()),
    }
    return cast("Step", type(name, (VerificationError,), members))


# fmt: off
# open_quote: the PCK chain in the quote
QeVendor = _step(1, "QeVendor", "qe_vendor", "the quoting enclave is Intel's", "vendor_id")
CertificationType = _step(
    2, "CertificationType", "certification_type", "the certification data is a PCK chain (type 5)", "cert_type")
ChainForm = _step(
    3, "ChainForm", "chain_form", "a chain is PEM of its certificates in order, the root last or left out",
    "chain_garbage chain_extra")
CertificateFormat = _step(
    4, "CertificateFormat", "certificate_format", "a certificate is X.509 v3 with P-256 and SHA-256, in strict DER",
    "pck_sha384 pck_curve pck_critical_extension")
CertificateRole = _step(
    5, "CertificateRole", "certificate_role", "a certificate has the name, constraints and key usage of its place",
    "chain_order chain_missing_intermediate intermediate_common_name intermediate_not_ca pck_common_name pck_is_ca "
    "tcb_signer_common_name tcb_signer_is_ca pck_crl_chain")
UntrustedRoot = _step(
    6, "UntrustedRoot", "untrusted_root", "a root certificate is the trusted one's",
    "other_root tcb_chain_order")
CertificateIssuer = _step(
    7, "CertificateIssuer", "certificate_issuer", "a certificate names its issuer as the issuer names itself",
    "intermediate_issuer pck_issuer pck_signed_by_root tcb_signer_issuer")
CertificateSignature = _step(
    8, "CertificateSignature", "certificate_signature", "a certificate is signed by its issuer",
    "intermediate_signature pck_signature tcb_signer_signature")
CertificateNotYetValid = _step(
    9, "CertificateNotYetValid", "certificate_not_yet_valid", "a certificate's time has begun",
    "intermediate_not_yet_valid pck_not_yet_valid tcb_signer_not_yet_valid")
CertificateExpired = _step(
    10, "CertificateExpired", "certificate_expired", "a certificate's time has not ended",
    "root_expired intermediate_expired pck_expired tcb_signer_expired")
PckExtension = _step(
    11, "PckExtension", "pck_extension", "the PCK certificate's SGX extension is whole",
    "sgx_extension_missing sgx_extension_trailing sgx_extension_deep sgx_ppid_missing sgx_tcb_missing "
    "sgx_pce_id_missing sgx_fmspc_missing sgx_type_missing sgx_component_missing sgx_fmspc_duplicate "
    "sgx_fmspc_length sgx_fmspc_type sgx_order sgx_cpu_svn")
# verify_collateral: what Intel says of platforms
CrlFormat = _step(
    12, "CrlFormat", "crl_format", "a CRL is version 2 in strict DER, with number and authority key identifier",
    "root_crl_no_number root_crl_no_aki pck_crl_no_number pck_crl_no_aki pck_crl_trailing")
CrlIssuer = _step(
    13, "CrlIssuer", "crl_issuer", "a CRL names its issuer as the issuer names itself",
    "root_crl_issuer pck_crl_issuer crls_swapped")
CrlSignature = _step(
    14, "CrlSignature", "crl_signature", "a CRL is signed by its issuer", "root_crl_signature pck_crl_signature")
CertificateRevoked = _step(
    15, "CertificateRevoked", "certificate_revoked", "neither the root nor a certificate that it issued is revoked",
    "intermediate_revoked tcb_signer_revoked root_revoked")
StatementSignature = _step(
    16, "StatementSignature", "statement_signature", "the TCB signing key signed the text as it stands",
    "tcb_info_signature tcb_info_altered tcb_info_whitespace qe_identity_signature qe_identity_altered")
StatementFormat = _step(
    17, "StatementFormat", "statement_format", "a statement has all members, of their types, in their ranges, once",
    "tcb_info_garbage tcb_info_duplicate_key tcb_info_date tcb_info_sgx_components_short tcb_info_tdx_components_short "
    "tcb_info_svn_range tcb_info_svn_negative tcb_info_svn_float tcb_info_status_unknown tcb_info_status_relaunch "
    "tcb_info_duplicate_levels tcb_info_no_levels tcb_info_no_evaluation_number qe_identity_garbage "
    "qe_identity_duplicate_key qe_identity_no_levels")
StatementKind = _step(
    18, "StatementKind", "statement_kind", "a statement is of a kind and version that is read here, both of one TEE",
    "tcb_info_id tcb_info_version tcb_info_tcb_type qe_identity_id qe_identity_version")
CollateralNotYetValid = _step(
    19, "CollateralNotYetValid", "collateral_not_yet_valid", "a CRL's or statement's time has begun",
    "root_crl_future pck_crl_future tcb_info_future qe_identity_future")
CollateralExpired = _step(
    20, "CollateralExpired", "collateral_expired", "a CRL's or statement's time, or the grace after it, has not ended",
    "root_crl_expired pck_crl_expired tcb_info_expired qe_identity_expired")
# verify_quote: the quote, held against the collateral; 28 to 30 and 33 are taken before, by check_signed
RootMismatch = _step(21, "RootMismatch", "root_mismatch", "quote and collateral were verified under one root")
CollateralTee = _step(
    22, "CollateralTee", "collateral_tee", "the collateral is for the quote's TEE", "collateral_of_sgx")
CollateralCa = _step(
    23, "CollateralCa", "collateral_ca", "the PCK CRL is of the CA that issued the PCK certificate",
    "collateral_of_other_ca")
FmspcMismatch = _step(24, "FmspcMismatch", "fmspc_mismatch", "the TCB info is for the FMSPC", "tcb_info_fmspc")
PceIdMismatch = _step(25, "PceIdMismatch", "pce_id_mismatch", "the TCB info is for the PCE-ID", "tcb_info_pce_id")
PckChainMismatch = _step(
    26, "PckChainMismatch", "pck_chain_mismatch", "a PCK chain beside the collateral is the quote's", "pck_chain_other")
PckRevoked = _step(27, "PckRevoked", "pck_revoked", "the PCK certificate is not revoked", "pck_revoked")
QeReportSignature = _step(
    28, "QeReportSignature", "qe_report_signature", "the PCK signed the quoting enclave's report",
    "qe_report_signature qe_report_altered")
QeReportData = _step(
    29, "QeReportData", "qe_report_data", "the quoting enclave vouches for the attestation key",
    "qe_report_data qe_report_data_tail qe_auth_altered attestation_key_substituted")
AttestationKey = _step(
    30, "AttestationKey", "attestation_key", "the attestation key is a point of P-256", "attestation_key_invalid")
QeDebug = _step(31, "QeDebug", "qe_debug", "the quoting enclave is no debug enclave", "qe_debug")
QeIdentityMismatch = _step(
    32, "QeIdentityMismatch", "qe_identity_mismatch", "the quoting enclave is the one of the QE identity",
    "qe_mrsigner qe_prod_id qe_misc_select qe_attributes")
QuoteSignature = _step(
    33, "QuoteSignature", "quote_signature", "the attestation key signed the quote",
    "quote_signature body_altered header_altered attestation_key")
TdxModuleMismatch = _step(
    34, "TdxModuleMismatch", "tdx_module_mismatch", "the TDX module is one that Intel names, without SEAM attributes",
    "seam_attributes module_mrsigner module_unknown module_identities_missing")
TcbNotSupported = _step(
    35, "TcbNotSupported", "tcb_not_supported", "platform, TDX module and quoting enclave each reach a TCB level",
    "qe_not_supported module_not_supported tcb_not_supported current_tcb_not_supported")
TcbRevoked = _step(
    36, "TcbRevoked", "tcb_revoked", "no TCB level that is reached is revoked",
    "qe_revoked module_revoked tcb_revoked current_tcb_revoked")
# verify: the caller's expectation
ReportDataMismatch = _step(
    37, "ReportDataMismatch", "report_data_mismatch", "the report data is the expected one",
    "report_data_nonce report_data_key")
# fmt: on

STEPS: Final[tuple[Step, ...]] = tuple(VerificationError.__subclasses__())
"""The table, in order."""


@frozen
class Checked:
    """What a piece passed: the numbers of the steps; ``remembered`` if not now, but earlier for the same bytes."""

    subject: str
    steps: tuple[int, ...]
    remembered: bool


@lru_cache(maxsize=256)
def checked(subject: str, *steps: int, remembered: bool = False) -> Checked:
    """The same `Checked` for the same words: there are few, and a verdict has many."""
    return Checked(subject, steps, remembered)
