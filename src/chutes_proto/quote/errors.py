"""The verifier's errors, one tree::

    QuoteError
    ├── QuoteFormatError        the bytes are no quote of a kind that is read here
    ├── CollateralFormatError   the bytes are no collateral file
    ├── VerificationError       a step of verification refuses; ``steps.py`` has one class for each step
    ├── AppraisalError          a verified quote is not what the policy accepts; ``refusals`` has all reasons
    └── PolicyError             the caller's policy, profiles or root cannot mean what they say

``code`` is a stable word of each: texts may change, codes do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto import ChutesError

__all__ = [
    "AppraisalError",
    "CollateralFormatError",
    "PolicyError",
    "QuoteError",
    "QuoteFormatCode",
    "QuoteFormatError",
    "Refusal",
    "VerificationError",
    "shown",
    "spans",
]

QuoteFormatCode: TypeAlias = Literal[
    "quote_too_short", "quote_version", "quote_tee_type", "quote_key_type", "quote_structure"
]
"""Too few bytes for any quote; a number in the header that is not read here; anything else."""

Part: TypeAlias = Literal["tcb", "attributes", "measurement"]
"""The parts of a policy."""


def shown(value: object) -> str:
    """A value as error texts print it: bytes in hex."""
    return value.hex() if isinstance(value, bytes) else str(value)


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: ``1-5, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


class QuoteError(ChutesError):
    """Root of everything that the verifier raises on purpose."""

    code: str = "quote"


class QuoteFormatError(QuoteError):
    """The bytes are no quote of a kind that is read here.

    ``got`` is the number that was found: of bytes for ``quote_too_short``, in the header for ``quote_version``,
    ``quote_tee_type`` and ``quote_key_type``, otherwise 0.
    """

    def __init__(self, code: QuoteFormatCode, message: str, got: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.got = got


class CollateralFormatError(QuoteError):
    """The bytes are no collateral file; the text names the member."""

    code = "collateral_format"


class VerificationError(QuoteError):
    """A step of verification refuses.

    ``number``, ``code``, ``rule`` and ``faults`` are the step's, from its row in ``steps.py``; ``subject`` is the piece
    that fails it, ``got`` and ``expected`` the values where there are any.
    """

    number: ClassVar[int] = 0
    code = "verification"
    rule: ClassVar[str] = ""
    faults: ClassVar[tuple[str, ...]] = ()

    def __init__(self, subject: str, problem: str, *, got: object = None, expected: object = None) -> None:
        super().__init__(subject, problem)
        self.subject = subject
        self.problem = problem
        self.got = got
        self.expected = expected

    def __str__(self) -> str:
        values = [f"{name} {shown(v)}" for name, v in (("got", self.got), ("expected", self.expected)) if v is not None]
        detail = f" ({', '.join(values)})" if values else ""
        return f"{self.subject}: {self.problem}{detail} [step {self.number}: {self.rule}]"


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


class AppraisalError(QuoteError):
    """A verified quote is not what the policy accepts; ``refusals`` has all reasons, and at least one.

    ``steps`` are the numbers of the steps of verification that it passed.
    """

    code = "appraisal"

    def __init__(self, refusals: Sequence[Refusal], steps: Sequence[int]) -> None:
        super().__init__("; ".join(f"{refusal.code}: {refusal.detail}" for refusal in refusals))
        self.refusals = tuple(refusals)
        self.steps = tuple(steps)

    def explain(self) -> str:
        """A paragraph for an operator: all reasons, and what to do about each kind of them."""
        count = "one reason" if len(self.refusals) == 1 else f"{len(self.refusals)} reasons"
        passed = f"The quote is genuine (it passed steps {spans(self.steps)})"
        sentences = [f"{passed}, but the policy does not accept it, for {count}."]
        for about, advice in _ADVICE.items():
            if details := [r.detail for r in self.refusals if _ABOUT.get(r.code, r.part) == about]:
                sentences += [f"{'; '.join(details)[:1].upper()}{'; '.join(details)[1:]}.", advice]
        return " ".join(sentences)


_ABOUT: Final[dict[str, str]] = {
    "evaluation_number": "collateral",
    "tcb_info_version": "collateral",
    "collateral_grace": "collateral",
    "no_profiles": "profiles",
    "not_a_td": "profiles",
}
"""Refusals that something else cures than the others of their part."""

_ADVICE: Final[dict[str, str]] = {
    "collateral": "This is about the collateral: get newer (`chutes-proto collateral fetch`; with `--update early` it"
    " has what a TCB recovery will demand), or let the policy demand less of it.",
    "tcb": "This is about the machine: its owner updates or configures it, or the policy names what else it accepts.",
    "attributes": "This is about how the TD is started: start it with other attributes.",
    "measurement": "This is about what runs in the TD: run the image that was measured, or give the policy the"
    " measurements of this one; `chutes-proto replay` finds where a boot went another way.",
    "profiles": "This is about the policy: give it the measurements of the TDs that it accepts, as `[[profile]]`, or"
    ' say `measurements = "unchecked"` to compare none.',
}


class PolicyError(QuoteError):
    """A policy, measurement profiles or a trusted root cannot mean what they say; the text names the key."""

    code = "policy"
