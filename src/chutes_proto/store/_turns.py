"""The callers of a store: which of them run their transactions now, and which wait.

Rules kept here:

* no more run at once than the store allows; the others wait, the first come first, and hold nothing while they do;
* once the store was found away, one caller at a time asks it, whatever the others that still run are waiting for;
* the first that is answered ends that, and all go on. One that began before the store last answered says nothing of
  whether it is away now.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from attrs import define, field

PAUSE_SECONDS: Final = 0.25
"""How long the next caller does not ask a store that was just found away; the caller that found it keeps its turn."""

UNKNOWN: Final = "the change may be committed or not"
"""The end of each message of a `FateUnknown`."""

Found: TypeAlias = Literal["answered", "away", "unknown"]
"""The finding of a transaction about its store; ``unknown`` where another transaction was in its way."""


@define(eq=False)
class Turn:
    """The place of one caller, which waits until it ``has_begun``; ``after`` is how many were answered before that."""

    has_begun: bool = field(init=False, default=False)
    after: int = field(init=False, default=0)


@define
class Turns:
    """The callers of one store in one process. After each change, take what `begin` returns."""

    _waiting: dict[Turn, None] = field(init=False, factory=dict[Turn, None])
    _running: set[Turn] = field(init=False, factory=set[Turn])
    _is_away: bool = field(init=False, default=False)
    _asking: Turn | None = field(init=False, default=None)
    _answers: int = field(init=False, default=0)

    def ask(self) -> Turn:
        """Join those that wait."""
        turn = Turn()
        self._waiting[turn] = None
        return turn

    def leave(self, turn: Turn) -> None:
        """Wait no longer; a turn that has begun stays."""
        _ = self._waiting.pop(turn, None)

    def begin(self, most: int) -> list[Turn]:
        """Return the turns that begin now, if at most ``most`` may run at once."""
        begun: list[Turn] = []
        while self._waiting and (self._asking is None if self._is_away else len(self._running) < most):
            turn = next(iter(self._waiting))
            del self._waiting[turn]
            turn.has_begun = True
            turn.after = self._answers
            self._running.add(turn)
            if self._is_away:
                self._asking = turn
            begun.append(turn)
        return begun

    def end(self, turn: Turn, found: Found) -> None:
        """End a turn that has begun, with what it found."""
        self._running.remove(turn)
        if turn is self._asking:
            self._asking = None
        if found == "answered":
            self._answers += 1
            self._is_away = False
        elif found == "away" and turn.after == self._answers:
            self._is_away = True
