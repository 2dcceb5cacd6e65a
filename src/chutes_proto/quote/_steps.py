"""The steps of verification: one error class each, with its number, its stable code and the rule that it checks.

A new check is one class here, and one function in ``_verify.py`` or ``_tcb.py`` with the step's number beside it.
Steps 3 to 10 are taken for every chain of certificates, 12 to 15 for both CRLs, 16 to 18 for TCB info and QE identity:
the error's ``subject`` says for which piece. The order is that of the parts of Intel's Quote Verification Library: PCK
certificate, CRLs, TCB info, QE identity, quote, TCB levels.
"""

from __future__ import annotations

from chutes_proto.quote._errors import VerificationError

# open_quote: the PCK chain in the quote


class QeVendorError(VerificationError):
    step, code, rule = 1, "qe_vendor", "the quoting enclave is Intel's"


class CertificationTypeError(VerificationError):
    step, code, rule = 2, "certification_type", "the certification data is a PCK chain (type 5), or one is given"


class ChainFormError(VerificationError):
    step, code, rule = 3, "chain_form", "a chain is PEM of its certificates in order, the root last or left out"


class CertificateFormatError(VerificationError):
    step, code, rule = 4, "certificate_format", "a certificate is X.509 v3 with P-256 and SHA-256, in strict DER"


class CertificateRoleError(VerificationError):
    step, code, rule = 5, "certificate_role", "a certificate has the name, constraints and key usage of its place"


class UntrustedRootError(VerificationError):
    step, code, rule = 6, "untrusted_root", "a root certificate is the trusted root's"


class CertificateIssuerError(VerificationError):
    step, code, rule = 7, "certificate_issuer", "a certificate names its issuer as the issuer names itself"


class CertificateSignatureError(VerificationError):
    step, code, rule = 8, "certificate_signature", "a certificate is signed by its issuer"


class CertificateNotYetValidError(VerificationError):
    step, code, rule = 9, "certificate_not_yet_valid", "a certificate has become valid"


class CertificateExpiredError(VerificationError):
    step, code, rule = 10, "certificate_expired", "a certificate has not expired"


class PckExtensionError(VerificationError):
    step, code, rule = 11, "pck_extension", "the PCK certificate's SGX extension is complete"


# verify_collateral: what Intel says of platforms


class CrlFormatError(VerificationError):
    step, code, rule = 12, "crl_format", "a CRL is version 2 in strict DER, with number and authority key identifier"


class CrlIssuerError(VerificationError):
    step, code, rule = 13, "crl_issuer", "a CRL names its issuer as the issuer names itself"


class CrlSignatureError(VerificationError):
    step, code, rule = 14, "crl_signature", "a CRL is signed by its issuer"


class CertificateRevokedError(VerificationError):
    step, code, rule = 15, "certificate_revoked", "neither the root nor a certificate that it issued is revoked"


class StatementSignatureError(VerificationError):
    step, code, rule = 16, "statement_signature", "the TCB signing key signed the text as it stands"


class StatementFormatError(VerificationError):
    step, code, rule = 17, "statement_format", "a statement has all members, of their types, in their ranges, once"


class StatementKindError(VerificationError):
    step, code, rule = 18, "statement_kind", "a statement is of a kind and version that is read here, both of one TEE"


class CollateralNotYetValidError(VerificationError):
    step, code, rule = 19, "collateral_not_yet_valid", "a CRL or statement has become valid"


class CollateralExpiredError(VerificationError):
    step, code, rule = 20, "collateral_expired", "a CRL or statement has not expired, or is within its grace"


# verify_quote: the quote, held against the collateral; 28 to 30 and 33 are taken before, by check_signed


class RootMismatchError(VerificationError):
    step, code, rule = 21, "root_mismatch", "quote and collateral were verified under one root"


class CollateralTeeError(VerificationError):
    step, code, rule = 22, "collateral_tee", "the collateral is for the quote's TEE"


class CollateralCaError(VerificationError):
    step, code, rule = 23, "collateral_ca", "the PCK CRL is of the CA that issued the PCK certificate"


class FmspcMismatchError(VerificationError):
    step, code, rule = 24, "fmspc_mismatch", "the TCB info is for the FMSPC"


class PceIdMismatchError(VerificationError):
    step, code, rule = 25, "pce_id_mismatch", "the TCB info is for the PCE-ID"


class PckChainMismatchError(VerificationError):
    step, code, rule = 26, "pck_chain_mismatch", "a PCK chain beside the quote or the collateral is the quote's"


class PckRevokedError(VerificationError):
    step, code, rule = 27, "pck_revoked", "the PCK certificate is not revoked"


class QeReportSignatureError(VerificationError):
    step, code, rule = 28, "qe_report_signature", "the PCK signed the quoting enclave's report"


class QeReportDataError(VerificationError):
    step, code, rule = 29, "qe_report_data", "the quoting enclave vouches for the attestation key"


class AttestationKeyError(VerificationError):
    step, code, rule = 30, "attestation_key", "the attestation key is a point of P-256"


class QeDebugError(VerificationError):
    step, code, rule = 31, "qe_debug", "the quoting enclave is not a debug enclave"


class QeIdentityMismatchError(VerificationError):
    step, code, rule = 32, "qe_identity_mismatch", "the quoting enclave is the one of the QE identity"


class QuoteSignatureError(VerificationError):
    step, code, rule = 33, "quote_signature", "the attestation key signed the quote"


class TdxModuleMismatchError(VerificationError):
    step, code, rule = 34, "tdx_module_mismatch", "the TDX module is one that Intel names, without SEAM attributes"


class TcbNotSupportedError(VerificationError):
    step, code, rule = 35, "tcb_not_supported", "platform, TDX module and quoting enclave each reach a TCB level"


class TcbRevokedError(VerificationError):
    step, code, rule = 36, "tcb_revoked", "no TCB level that is reached is revoked"


# verify: the caller's expectation


class ReportDataMismatchError(VerificationError):
    step, code, rule = 37, "report_data_mismatch", "the report data is the expected one"
