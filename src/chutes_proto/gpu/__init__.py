"""Verify the evidence of NVIDIA GPUs, and appraise it. No I/O, no clock: bytes and times come from the caller.

    rims = Rims.of(verify_rim(data, now=now) for data in files)
    accepted = verify(evidence, nonce=nonce, now=now, rims=rims, revocation=Revocation.of(ocsp), policy=GpuPolicy())

`verify` returns only evidence that the policy accepts, and raises `GpuError` for everything else; an
`EvidenceRefusedError` has a report on every device, with every measurement that differs. `authenticate`, `verify_rim`
and `compare` are its stages. The rules are in ``docs/reference/gpu-verification.md``.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.gpu._certificates import NVIDIA, GpuRoots, read_root
    from chutes_proto.gpu._collateral import GpuCollateral
    from chutes_proto.gpu._errors import EvidenceFormatError, GpuError, GpuPolicyError, GpuVerificationError
    from chutes_proto.gpu._evidence import DeviceEvidence, parse_evidence
    from chutes_proto.gpu._findings import GpuRefusal, Mismatch
    from chutes_proto.gpu._policy import (
        AcceptedEvidence,
        DeviceReport,
        EvidenceRefusedError,
        GpuPolicy,
        PinnedMeasurements,
        verify,
    )
    from chutes_proto.gpu._policy_file import parse_gpu_policy
    from chutes_proto.gpu._report import Report, parse_report
    from chutes_proto.gpu._revocation import Revocation
    from chutes_proto.gpu._rim import RimReference, VerifiedRim, verify_rim
    from chutes_proto.gpu._service import ServiceBinding, VerifiedService, verify_service
    from chutes_proto.gpu._verify import Comparison, GenuineDevice, Rims, authenticate, compare
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.gpu._certificates": "NVIDIA GpuRoots read_root",
            "chutes_proto.gpu._collateral": "GpuCollateral",
            "chutes_proto.gpu._errors": "EvidenceFormatError GpuError GpuPolicyError GpuVerificationError",
            "chutes_proto.gpu._evidence": "DeviceEvidence parse_evidence",
            "chutes_proto.gpu._findings": "GpuRefusal Mismatch",
            "chutes_proto.gpu._policy": (
                "AcceptedEvidence DeviceReport EvidenceRefusedError GpuPolicy PinnedMeasurements verify"
            ),
            "chutes_proto.gpu._policy_file": "parse_gpu_policy",
            "chutes_proto.gpu._report": "Report parse_report",
            "chutes_proto.gpu._revocation": "Revocation",
            "chutes_proto.gpu._rim": "RimReference VerifiedRim verify_rim",
            "chutes_proto.gpu._service": "ServiceBinding VerifiedService verify_service",
            "chutes_proto.gpu._verify": "Comparison GenuineDevice Rims authenticate compare",
        },
    )

__all__ = ["authenticate", "compare", "parse_evidence", "parse_gpu_policy", "parse_report", "verify", "verify_rim"]
__all__ += ["AcceptedEvidence", "Comparison", "DeviceEvidence", "DeviceReport", "GenuineDevice", "Mismatch", "Report"]
__all__ += ["NVIDIA", "GpuPolicy", "GpuRefusal", "GpuRoots", "PinnedMeasurements", "Revocation", "RimReference", "Rims"]
__all__ += ["VerifiedRim"]
__all__ += ["EvidenceFormatError", "EvidenceRefusedError", "GpuError", "GpuPolicyError", "GpuVerificationError"]
__all__ += ["GpuCollateral", "ServiceBinding", "VerifiedService", "read_root", "verify_service"]
