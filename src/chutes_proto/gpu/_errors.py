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

from typing import Any, ClassVar

from chutes_proto._error import ChutesError
from chutes_proto.quote._errors import shown

__all__ = ["EvidenceFormatError", "GpuError", "GpuPolicyError", "GpuVerificationError"]


class GpuError(ChutesError):
    """Root of all errors that the verifier of GPU evidence raises on purpose."""

    code: str = "gpu"


class GpuVerificationError(GpuError):
    """A piece of evidence is refused.

    ``step``, ``code`` and ``rule`` are those of the check that refuses it, ``subject`` is the piece that fails it.
    ``got`` and ``expected`` are the values, bytes, numbers or texts, or None where there are none to compare.
    """

    step: ClassVar[int]
    rule: ClassVar[str]

    def __init__(self, subject: str, problem: str, *, got: Any = None, expected: Any = None) -> None:
        super().__init__(subject, problem)
        self.subject = subject
        self.problem = problem
        self.got = got
        self.expected = expected

    def __str__(self) -> str:
        values = [f"{name} {shown(v)}" for name, v in (("got", self.got), ("expected", self.expected)) if v is not None]
        detail = f" ({', '.join(values)})" if values else ""
        return f"{self.subject}: {self.problem}{detail} [step {self.step}: {self.rule}]"


class EvidenceFormatError(GpuVerificationError):
    """The bytes are not GPU evidence of a kind that is read here."""

    step = 0
    code = "evidence_format"
    rule = "the bytes are evidence: a list of reports with chains, SPDM 1.1 inside"


class GpuPolicyError(GpuError):
    """A policy or a trusted root cannot mean what it says; the text names the key."""

    code = "gpu_policy"
