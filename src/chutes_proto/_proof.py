"""Results of checks: none has a truth value, and those that prove a check can only be made by it.

Rules kept here:

* a result is never a bool, and an ``if`` takes none for one: without ``__bool__`` any object is true, a refusal too;
* a `Proven` is made with ``proof=PROOF``, which only the checks pass. ``attrs.evolve`` cannot make an altered one, nor
  can a decoder: msgspec takes the types of fields for what to decode, and calls no converters;
* a `Proven` stays in the process in which it was made. A pickle is of any time, and of anybody's making.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, NoReturn, Self

from attrs import field, frozen


class Proof:
    """A type that no decoder makes a value of."""


PROOF: Final = Proof()


def _redeem(proof: object) -> Any:
    if proof is not PROOF:
        raise TypeError("this value proves a check and is made by that check only")
    return None  # attrs.evolve would pass on what is kept


class NoTruthValue:
    """A result that is neither true nor false, so that no ``if`` mistakes it for a decision."""

    __slots__ = ()
    _instead: ClassVar[str] = "what is refused raises an error"
    """The text that says what to look at in its place."""

    def __bool__(self) -> NoReturn:
        """Raises `TypeError`."""
        raise TypeError(f"{type(self).__name__} is neither true nor false: {self._instead}")


@frozen(kw_only=True, eq=False)
class Proven(NoTruthValue):
    """A value that proves a check. It takes `PROOF` and keeps nothing of it; a copy of it is the value itself."""

    proof: Proof = field(converter=_redeem, repr=False, eq=False)

    def __reduce_ex__(self, _: object) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} is not pickled: it proves a check of this process; keep what it was made of, and"
            " verify that again"
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self
