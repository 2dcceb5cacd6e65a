"""Choose the collateral for a platform from a directory source.

Rules kept here:

* collateral is for one FMSPC, one CA and one TEE; of several that fit, a valid one is preferred to an expired one, then
  the one with the highest TCB evaluation data number, then the one that expires last: an old file beside a new one
  changes nothing;
* collateral that is neither valid now nor within the grace that it was verified with is never chosen. Expired files are
  the operator's problem (`CollateralUnavailable`), while a verifier that gets them must refuse the quote, and so the
  VM;
* the text of the error names the file, and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attrs import frozen

from chutes_proto.errors import CollateralUnavailable
from chutes_proto.log import Value
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._layout import Tee
from chutes_proto.quote._pck import Ca, PckIdentity
from chutes_proto.quote._terms import check_seconds, rfc3339

_MOST_NAMED: Final = 5
"""How many files an error names."""


@frozen
class Family:
    """All platforms that share collateral: those with one FMSPC (6 bytes), under one CA, for one TEE."""

    fmspc: bytes
    ca: Ca
    tee: Tee

    @classmethod
    def of(cls, member: PckIdentity | VerifiedCollateral) -> Family:
        """The family of a platform, or that of the platforms that collateral is for."""
        return cls(member.fmspc, member.ca, member.tee)

    @property
    def name(self) -> str:
        """The family as a word, for file names."""
        return f"{self.fmspc.hex()}-{self.ca}-{self.tee.lower()}"

    @property
    def log_fields(self) -> Mapping[str, Value]:
        """The family in a log record."""
        return {"fmspc": self.fmspc.hex(), "ca": self.ca, "tee": self.tee}

    def __str__(self) -> str:
        """The family for people."""
        return f"FMSPC {self.fmspc.hex()}, {self.ca} CA, {self.tee}"


@frozen
class Item:
    """One file of collateral: its name, and its content or, in words, why it cannot be used."""

    name: str
    content: VerifiedCollateral | str

    def __str__(self) -> str:
        """The file in one line, for the operator."""
        if isinstance(self.content, str):
            return f"{self.name}: unusable: {self.content}"
        begin, end = self.content.window
        return f"{self.name}: {Family.of(self.content)}, valid {rfc3339(begin)} to {rfc3339(end)}"


def choose(items: Iterable[Item], identity: PckIdentity, now: int, where: str) -> VerifiedCollateral:
    """Choose the collateral for a platform at ``now`` (unix seconds) from the ``items`` that were found at ``where``.

    Raises `CollateralUnavailable`; `TypeError` unless ``now`` is an integer.
    """
    check_seconds("now", now)
    items = tuple(items)
    family = Family.of(identity)
    fitting = [
        (item, item.content)
        for item in items
        if isinstance(item.content, VerifiedCollateral) and Family.of(item.content) == family
    ]
    if current := [content for _, content in fitting if content.window[0] <= now <= content.usable_until]:
        return max(current, key=lambda content: _preference(content, now))
    doubtful = [item for item, _ in fitting] or [item for item in items if isinstance(item.content, str)]
    named = "".join(f"; {item}" for item in doubtful[:_MOST_NAMED])
    clock = ", or set this machine's clock right" if any(now < content.window[0] for _, content in fitting) else ""
    remedy = f"put a fresh file there{clock}"
    raise CollateralUnavailable(
        f"no collateral for {family} that is valid at {rfc3339(now)} is in {where}: {remedy}{named}"
    )


def _preference(content: VerifiedCollateral, now: int) -> tuple[bool, int, int, int, int]:
    """Prefer valid ones, then the newest in each respect. CRLs count by date: Intel's all have the number 1."""
    issue = content.issue
    return (
        now <= content.window[1],
        issue.evaluation_number,
        issue.pck_crl_issued,
        issue.root_crl_issued,
        content.window[1],
    )
