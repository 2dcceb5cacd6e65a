"""Values that prove a check can only be made by it.

A class that declares ``proof: Proof = proven()`` needs ``proof=PROOF`` when it is made. ``attrs.evolve`` cannot make an
altered one, nor can a decoder: msgspec takes the types of fields for what to decode, and calls no converters. Only the
checks themselves pass `PROOF`.
"""

from __future__ import annotations

from typing import Any, Final, cast

from attrs import field


class Proof:
    """A type that no decoder makes a value of."""


PROOF: Final = Proof()


def _redeem(proof: object) -> None:
    if proof is not PROOF:
        raise TypeError("this value proves a check and is made by that check only")


def proven() -> Any:
    """The field that guards a class: it takes `PROOF` and keeps nothing."""
    return cast("Any", field(converter=_redeem, repr=False, eq=False, kw_only=True))
