"""The steps of the verification of GPU evidence: one error class each, with its number, its stable code and its rule.

Steps 1 to 8 are taken for every chain of certificates: a device's, a RIM signer's, an OCSP responder's. The error's
``subject`` says for which piece.
"""

from __future__ import annotations

from collections.abc import Sequence

from chutes_proto.gpu._errors import GpuVerificationError
from chutes_proto.gpu._findings import GpuRefusal, Mismatch

# authenticate: the device's chain and its report


class ChainFormError(GpuVerificationError):
    step, code, rule = 1, "chain_form", "a chain is its certificates in order, the root last or left out"


class CertificateFormatError(GpuVerificationError):
    step, code, rule = 2, "certificate_format", "a certificate is X.509 v3 with P-384 and SHA-384, in strict DER"


class CertificateRoleError(GpuVerificationError):
    step, code, rule = 3, "certificate_role", "a certificate has the constraints and key usage of its place"


class UntrustedRootError(GpuVerificationError):
    step, code, rule = 4, "untrusted_root", "a root certificate is the trusted root's"


class CertificateIssuerError(GpuVerificationError):
    step, code, rule = 5, "certificate_issuer", "a certificate names its issuer as the issuer names itself"


class CertificateSignatureError(GpuVerificationError):
    step, code, rule = 6, "certificate_signature", "a certificate is signed by its issuer"


class CertificateNotYetValidError(GpuVerificationError):
    step, code, rule = 7, "certificate_not_yet_valid", "a certificate has become valid"


class CertificateExpiredError(GpuVerificationError):
    step, code, rule = 8, "certificate_expired", "a certificate has not expired"


class ChipError(GpuVerificationError):
    step, code, rule = 9, "chip", "the device's certificate names a chip that is read here, and all else agrees with it"


class FwidMismatchError(GpuVerificationError):
    step, code, rule = 10, "fwid_mismatch", "the firmware in the report is the one in the device's certificate"


class ReportSignatureError(GpuVerificationError):
    step, code, rule = 11, "report_signature", "the device signed the report"


class NonceMismatchError(GpuVerificationError):
    step, code, rule = 12, "nonce_mismatch", "the report is over the expected nonce, all 32 bytes"


# verify_rim: NVIDIA's reference values


class RimFormatError(GpuVerificationError):
    step, code, rule = 13, "rim_format", "a RIM is small, plain XML: no DTD, entity, comment, CDATA or instruction"


class RimAlgorithmError(GpuVerificationError):
    step, code, rule = 14, "rim_algorithm", "a RIM has one XML signature of exactly NVIDIA's form and algorithms"


class RimDigestError(GpuVerificationError):
    step, code, rule = 15, "rim_digest", "the signature's digest is that of the whole RIM without the signature"


class RimSignatureError(GpuVerificationError):
    step, code, rule = 16, "rim_signature", "the signer of the RIM signed it"


class RimContentError(GpuVerificationError):
    step, code, rule = 17, "rim_content", "a RIM names its product and version, and has at least one active value"


# revocation, of a device's chain and of a RIM signer's


class StatusFormatError(GpuVerificationError):
    step, code, rule = 18, "status_format", "an OCSP answer or CRL is in strict DER, and the answer is a successful one"


class StatusResponderError(GpuVerificationError):
    step, code, rule = 19, "status_responder", "an OCSP answer is by the certificate's issuer or a responder of that"


class StatusSignatureError(GpuVerificationError):
    step, code, rule = 20, "status_signature", "an OCSP answer or CRL is signed by who it says"


class StatusMissingError(GpuVerificationError):
    step, code, rule = 21, "status_missing", "each certificate between device or RIM and root has an OCSP answer"


class StatusNotYetValidError(GpuVerificationError):
    step, code, rule = 22, "status_not_yet_valid", "an OCSP answer has become valid"


class StatusExpiredError(GpuVerificationError):
    step, code, rule = 23, "status_expired", "an OCSP answer has not expired, or is within the policy's grace"


class CertificateRevokedError(GpuVerificationError):
    step, code, rule = 24, "certificate_revoked", "no certificate is revoked, or on hold"


# compare: the report, held against the RIMs


class RimProductError(GpuVerificationError):
    step, code, rule = 25, "rim_product", "a RIM of the report's version is of the report's chip"


class RimMissingError(GpuVerificationError):
    step, code, rule = 26, "rim_missing", "there is a RIM for the driver and one for the VBIOS of the report"


class RimConflictError(GpuVerificationError):
    step, code, rule = 27, "rim_conflict", "no index has a reference value in both RIMs"


class NvdecStatusError(GpuVerificationError):
    step, code, rule = 28, "nvdec_status", "the decoder is enabled or disabled: index 35 counts or does not"


class MeasurementMismatchError(GpuVerificationError):
    """Measurements differ from all their reference values; ``mismatches`` has every one."""

    step, code, rule = 29, "measurement_mismatch", "every measurement with a reference value has one of its values"

    def __init__(self, mismatches: Sequence[Mismatch]) -> None:
        self.mismatches = tuple(mismatches)
        named = "; ".join(map(str, self.mismatches))
        super().__init__("measurements", f"{len(self.mismatches)} without a match: {named}")


# appraise: the machine and the caller's policy


class DuplicateDeviceError(GpuVerificationError):
    step, code, rule = 30, "duplicate_device", "each device is in the evidence once"


class GpuCountError(GpuVerificationError):
    step, code, rule = 31, "gpu_count", "there are as many GPUs as expected, at least one unless none is"


class GpuAppraisalError(GpuVerificationError):
    """A genuine device is not what the policy accepts; ``refusals`` has all reasons, and at least one.

    ``code`` is that of the first reason.
    """

    step, code, rule = 32, "policy", "the policy accepts it"

    def __init__(self, refusals: Sequence[GpuRefusal]) -> None:
        first = refusals[0]
        self.refusals = tuple(refusals)
        problem = "; ".join(refusal.detail for refusal in self.refusals)
        super().__init__("policy", problem, got=first.got, expected=first.expected)
        self.code = first.code

    def __str__(self) -> str:
        return "; ".join(map(str, self.refusals))
