"""The errors of the verifier of GPU evidence as one tree::

    GpuError
    ├── GpuVerificationError         a report, RIM or status is refused; ``step`` is the number of the step
    │   ├── EvidenceFormatError      step 0: the bytes are not evidence of a kind that is read here
    │   └── (one class for each)     steps 1 to 32; ``_steps.py`` has them
    ├── EvidenceRefusedError         evidence of a machine is refused; it has a report on every device
    └── GpuPolicyError               the caller's policy or root cannot mean what it says

``code`` is a stable word of each. Whatever the bytes of evidence, its refusal is a `GpuError`.
"""

from __future__ import annotations

from chutes_proto._error import ChutesError
from chutes_proto.quote._errors import FailedCheck

__all__ = ["EvidenceFormatError", "GpuError", "GpuPolicyError", "GpuVerificationError"]


class GpuError(ChutesError):
    """Root of all errors that the verifier of GPU evidence raises on purpose."""

    code: str = "gpu"


class GpuVerificationError(FailedCheck, GpuError):
    """A piece of evidence is refused. The members are those of `chutes_proto.quote.VerificationError`."""


class EvidenceFormatError(GpuVerificationError):
    """The bytes are not GPU evidence of a kind that is read here."""

    step = 0
    code = "evidence_format"
    rule = "the bytes are evidence: a list of reports with chains, SPDM 1.1 inside"


class GpuPolicyError(GpuError):
    """A policy or a trusted root cannot mean what it says; the text names the key."""

    code = "gpu_policy"
