"""The steps of verification: one error class each, with its number, its stable code and what holds once it passes.

A new check is one class here, and one function in ``_verify.py`` or ``_tcb.py`` with the step's number beside it.
Steps 3 to 10 are taken for every chain of certificates, 12 to 15 for both CRLs, 16 to 18 for TCB info and QE identity:
the error's ``subject`` says for which piece. The order is that of the parts of Intel's Quote Verification Library: PCK
certificate, CRLs, TCB info, QE identity, quote, TCB levels.
"""

from __future__ import annotations

from functools import lru_cache

from attrs import frozen

from chutes_proto.quote.errors import VerificationError

# open_quote: the PCK chain in the quote


class QeVendorError(VerificationError):
    step = 1
    code = "qe_vendor"
    rule = "the quoting enclave is Intel's"


class CertificationTypeError(VerificationError):
    step = 2
    code = "certification_type"
    rule = "the certification data is a PCK chain (type 5)"


class ChainFormError(VerificationError):
    step = 3
    code = "chain_form"
    rule = "a chain is PEM of its certificates in order, the root last or left out"


class CertificateFormatError(VerificationError):
    step = 4
    code = "certificate_format"
    rule = "a certificate is X.509 v3 with P-256 and SHA-256, in strict DER"


class CertificateRoleError(VerificationError):
    step = 5
    code = "certificate_role"
    rule = "a certificate has the name, constraints and key usage of its place"


class UntrustedRootError(VerificationError):
    step = 6
    code = "untrusted_root"
    rule = "a root certificate is the trusted one's"


class CertificateIssuerError(VerificationError):
    step = 7
    code = "certificate_issuer"
    rule = "a certificate names its issuer as the issuer names itself"


class CertificateSignatureError(VerificationError):
    step = 8
    code = "certificate_signature"
    rule = "a certificate is signed by its issuer"


class CertificateNotYetValidError(VerificationError):
    step = 9
    code = "certificate_not_yet_valid"
    rule = "a certificate's time has begun"


class CertificateExpiredError(VerificationError):
    step = 10
    code = "certificate_expired"
    rule = "a certificate's time has not ended"


class PckExtensionError(VerificationError):
    step = 11
    code = "pck_extension"
    rule = "the PCK certificate's SGX extension is whole"


# verify_collateral: what Intel says of platforms


class CrlFormatError(VerificationError):
    step = 12
    code = "crl_format"
    rule = "a CRL is version 2 in strict DER, with number and authority key identifier"


class CrlIssuerError(VerificationError):
    step = 13
    code = "crl_issuer"
    rule = "a CRL names its issuer as the issuer names itself"


class CrlSignatureError(VerificationError):
    step = 14
    code = "crl_signature"
    rule = "a CRL is signed by its issuer"


class CertificateRevokedError(VerificationError):
    step = 15
    code = "certificate_revoked"
    rule = "neither the root nor a certificate that it issued is revoked"


class StatementSignatureError(VerificationError):
    step = 16
    code = "statement_signature"
    rule = "the TCB signing key signed the text as it stands"


class StatementFormatError(VerificationError):
    step = 17
    code = "statement_format"
    rule = "a statement has all members, of their types, in their ranges, once"


class StatementKindError(VerificationError):
    step = 18
    code = "statement_kind"
    rule = "a statement is of a kind and version that is read here, both of one TEE"


class CollateralNotYetValidError(VerificationError):
    step = 19
    code = "collateral_not_yet_valid"
    rule = "a CRL's or statement's time has begun"


class CollateralExpiredError(VerificationError):
    step = 20
    code = "collateral_expired"
    rule = "a CRL's or statement's time, or the grace after it, has not ended"


# verify_quote: the quote, held against the collateral; 28 to 30 and 33 are taken before, by check_signed


class RootMismatchError(VerificationError):
    step = 21
    code = "root_mismatch"
    rule = "quote and collateral were verified under one root"


class CollateralTeeError(VerificationError):
    step = 22
    code = "collateral_tee"
    rule = "the collateral is for the quote's TEE"


class CollateralCaError(VerificationError):
    step = 23
    code = "collateral_ca"
    rule = "the PCK CRL is of the CA that issued the PCK certificate"


class FmspcMismatchError(VerificationError):
    step = 24
    code = "fmspc_mismatch"
    rule = "the TCB info is for the FMSPC"


class PceIdMismatchError(VerificationError):
    step = 25
    code = "pce_id_mismatch"
    rule = "the TCB info is for the PCE-ID"


class PckChainMismatchError(VerificationError):
    step = 26
    code = "pck_chain_mismatch"
    rule = "a PCK chain beside the collateral is the quote's"


class PckRevokedError(VerificationError):
    step = 27
    code = "pck_revoked"
    rule = "the PCK certificate is not revoked"


class QeReportSignatureError(VerificationError):
    step = 28
    code = "qe_report_signature"
    rule = "the PCK signed the quoting enclave's report"


class QeReportDataError(VerificationError):
    step = 29
    code = "qe_report_data"
    rule = "the quoting enclave vouches for the attestation key"


class AttestationKeyError(VerificationError):
    step = 30
    code = "attestation_key"
    rule = "the attestation key is a point of P-256"


class QeDebugError(VerificationError):
    step = 31
    code = "qe_debug"
    rule = "the quoting enclave is not a debug enclave"


class QeIdentityMismatchError(VerificationError):
    step = 32
    code = "qe_identity_mismatch"
    rule = "the quoting enclave is the one of the QE identity"


class QuoteSignatureError(VerificationError):
    step = 33
    code = "quote_signature"
    rule = "the attestation key signed the quote"


class TdxModuleMismatchError(VerificationError):
    step = 34
    code = "tdx_module_mismatch"
    rule = "the TDX module is one that Intel names, without SEAM attributes"


class TcbNotSupportedError(VerificationError):
    step = 35
    code = "tcb_not_supported"
    rule = "platform, TDX module and quoting enclave each reach a TCB level"


class TcbRevokedError(VerificationError):
    step = 36
    code = "tcb_revoked"
    rule = "no TCB level that is reached is revoked"


# verify: the caller's expectation


class ReportDataMismatchError(VerificationError):
    step = 37
    code = "report_data_mismatch"
    rule = "the report data is the expected one"


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
