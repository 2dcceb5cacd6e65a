"""The verifier's errors as one tree::

    QuoteError
    ├── VerificationError            the quote is refused; ``step`` is the number of the step
    │   ├── QuoteFormatError         step 0: the bytes are not a quote of a kind that is read here
    │   ├── (one class for each)     steps 1 to 37: it is not genuine; ``_steps.py`` has them
    │   ├── AppraisalError           step 38: it is genuine, but the policy does not accept it
    │   └── CertificateEvidenceError step 39: a certificate has no evidence for its key (``_attested.py``)
    ├── CollateralFormatError        the bytes are not a collateral file
    ├── EventLogFormatError          the bytes are not an event log of a TD
    ├── EventLogMismatchError        the event log does not lead to the RTMRs of the quote
    └── PolicyError                  the caller's policy, profiles or root cannot mean what they say

``code`` is a stable word of each: texts may change, codes do not. Whatever the bytes of a quote, its refusal is a
`VerificationError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto._error import ChutesError

__all__ = ["AppraisalError", "PolicyError", "QuoteError", "QuoteFormatError", "VerificationError"]
__all__ += ["CollateralFormatError", "QuoteFormatCode", "Refusal", "mismatch", "shown", "spans"]

QuoteFormatCode: TypeAlias = Literal[
    "quote_too_short", "quote_version", "quote_tee_type", "quote_key_type", "quote_structure"
]
"""Too few bytes for any quote; a number in the header that is not read here; anything else."""

Part: TypeAlias = Literal["verdict", "collateral", "tcb", "attributes", "measurement"]
"""The parts of an appraisal: the age of the verdict, and the demands of a policy on the collateral, the platform, how a
TD is started and what runs in it."""


def shown(value: object) -> str:
    """Format a value for error texts: bytes in hex."""
    return value.hex() if isinstance(value, bytes) else str(value)


def spans(numbers: Sequence[int]) -> str:
    """Format ascending numbers for people: ``1-5, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class QuoteError(ChutesError):
    """Root of all errors that the verifier raises on purpose."""

    code: str = "quote"


class CollateralFormatError(QuoteError):
    """The bytes are not a collateral file; the text names the member."""

    code = "collateral_format"


class FailedCheck(Exception):
    """A check of evidence that failed; `VerificationError` describes its members."""

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


class VerificationError(FailedCheck, QuoteError):
    """The quote is refused: it is not genuine, or the policy does not accept it.

    ``step``, ``code`` and ``rule`` are those of the check that refuses it, ``subject`` is the piece that fails it, and
    ``problem`` how. ``got`` and ``expected`` are the values, bytes, numbers or texts, or None where there are none to
    compare.
    """


class QuoteFormatError(VerificationError):
    """The bytes are not a quote of a kind that is read here.

    ``got`` and ``expected`` are the number of bytes for ``quote_too_short``, the number in the header for
    ``quote_version``, ``quote_tee_type`` and ``quote_key_type``, otherwise None.
    """

    step = 0
    rule = "the bytes are a quote"

    def __init__(self, code: QuoteFormatCode, message: str, *, got: int | None = None, expected: Any = None) -> None:
        super().__init__("quote", message, got=got, expected=expected)
        self.code = code

    def __str__(self) -> str:
        return self.problem


@frozen
class Refusal:
    """One reason why a policy does not accept a verified quote.

    ``part`` is the part of the policy that refuses, ``register`` the measurement register if it is one, ``got`` and
    ``expected`` are texts for people (registers in hex).
    """

    part: Part
    code: str
    detail: str
    register: str | None = None
    got: str | None = None
    expected: str | None = None


def mismatch(part: Part, code: str, problem: str, got: str, expected: str, register: str | None = None) -> Refusal:
    """Make a refusal whose text has both values."""
    return Refusal(part, code, f"{problem} (got {got}, expected {expected})", register, got, expected)


class AppraisalError(VerificationError):
    """A genuine quote is not what the policy accepts; ``refusals`` has all reasons, and at least one.

    ``code``, ``got`` and ``expected`` are those of the first reason, ``subject`` is the part of the policy that gives
    it. ``steps`` are the numbers of the steps of verification that the quote passed. ``nearest`` is the profile that
    the reasons are against, by name and version, and ``stage`` the stage in which the quote was appraised.
    """

    step = 38
    rule = "the policy accepts it"

    def __init__(
        self,
        refusals: Sequence[Refusal],
        steps: Sequence[int],
        *,
        nearest: str | None = None,
        stage: Literal["boot", "runtime"] | None = None,
    ) -> None:
        first = refusals[0]
        super().__init__(first.part, first.detail, got=first.got, expected=first.expected)
        self.code: str = first.code
        self.refusals: tuple[Refusal, ...] = tuple(refusals)
        self.steps: tuple[int, ...] = tuple(steps)
        self.nearest = nearest
        self.stage: Literal["boot", "runtime"] | None = stage

    def __str__(self) -> str:
        return "; ".join(f"{refusal.code}: {refusal.detail}" for refusal in self.refusals)

    def explain(self) -> str:
        """Explain the refusal to an operator: all reasons, and what to do about each kind of them."""
        count = "one reason" if len(self.refusals) == 1 else f"{len(self.refusals)} reasons"
        passed = f"The quote is genuine (it passed steps {spans(self.steps)})"
        sentences = [f"{passed}, but the policy does not accept it, for {count}."]
        for about, advice in _ADVICE.items():
            if details := [r.detail for r in self.refusals if _ABOUT.get(r.code, r.part) == about]:
                sentences += [f"{'; '.join(details)[:1].upper()}{'; '.join(details)[1:]}.", advice]
        return " ".join(sentences)


_ABOUT: Final[dict[str, str]] = {
    "no_profiles": "profiles",
    "not_a_td": "enclaves",
}
"""Refusals whose remedy differs from that of the others of their part."""

_ADVICE: Final[dict[str, str]] = {
    "verdict": "This is about the program that appraises: verify the quote again, and appraise the verdict at once.",
    "collateral": "This is about the collateral: get newer (`chutes-proto collateral fetch`; with `--update early` it"
    " has what a TCB recovery will demand), or let the policy demand less of it.",
    "tcb": "This is about the machine: its owner updates or configures it, or the policy names what else it accepts.",
    "attributes": "This is about how the TD is started: start it with other attributes.",
    "measurement": "This is about what runs in the TD: run the image that was measured, or give the policy the"
    " measurements of this one; `chutes-proto replay` finds where a boot went another way.",
    "profiles": "This is about the policy: give it the measurements of the TDs that it accepts, as `[[profile]]`, or"
    ' say `measurements = "unchecked"` to compare none.',
    "enclaves": "This is about the policy: name the enclaves that it accepts in `[identity]`, by `mr_enclave`, or by"
    ' `mr_signer` with `isv_prod_id`, or say `measurements = "unchecked"` to accept any.',
}


class PolicyError(QuoteError):
    """A policy, measurement profiles or a trusted root cannot mean what they say; the text names the key."""

    code = "policy"
