"""Which of the collateral at hand serves a platform now.

Rules kept here:

* collateral is for one FMSPC, one CA and one TEE; of several that serve, the one with the highest TCB evaluation data
  number does, and of those the one that ends last: an old file beside a new one changes nothing;
* what is not valid now is never handed out. That it has grown old is the operator's matter (`CollateralUnavailable`),
  while a verifier that is given it must refuse the quote, and so the VM;
* the text of the error tells the operator which file it is about, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from attrs import frozen

from chutes_proto.errors import CollateralUnavailable
from chutes_proto.quote.collateral import VerifiedCollateral
from chutes_proto.quote.pck import PckIdentity

_TOLD: Final = 5
"""How many files an error names."""


@frozen
class Item:
    """One file of collateral: its name, and what it holds or, in words, why it is of no use."""

    name: str
    content: VerifiedCollateral | str

    def __str__(self) -> str:
        """One line for the operator."""
        if isinstance(self.content, str):
            return f"{self.name}: of no use: {self.content}"
        begin, end = self.content.window
        return f"{self.name}: {_platforms(self.content)}, valid {_date(begin)} to {_date(end)}"


def choose(items: Iterable[Item], identity: PckIdentity, now: int, where: str) -> VerifiedCollateral:
    """The collateral for a platform at ``now`` (unix seconds), of the ``items`` that were found at ``where``.

    Raises `CollateralUnavailable`.
    """
    items = tuple(items)
    fitting = [
        (item, item.content)
        for item in items
        if isinstance(item.content, VerifiedCollateral) and _serves(item.content, identity)
    ]
    if current := [content for _, content in fitting if content.window[0] <= now <= content.window[1]]:
        return max(current, key=_preference)
    doubtful = [item for item, _ in fitting] or [item for item in items if isinstance(item.content, str)]
    told = "".join(f"; {item}" for item in doubtful[:_TOLD])
    raise CollateralUnavailable(
        f"no collateral for {_platforms(identity)} that is valid at {_date(now)} is in {where}: put a fresh file there"
        + told
    )


def _serves(content: VerifiedCollateral, identity: PckIdentity) -> bool:
    return (content.fmspc, content.ca, content.tee) == (identity.fmspc, identity.ca, identity.tee)


def _preference(content: VerifiedCollateral) -> tuple[int, int]:
    number = min(content.tcb_info.evaluation_number, content.qe_identity.evaluation_number)
    return number, content.window[1]


def _platforms(of: VerifiedCollateral | PckIdentity) -> str:
    return f"FMSPC {of.fmspc.hex()}, {of.ca} CA, {of.tee}"


def _date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat()
