"""Transactions that take no thread while they wait for the database: an event loop drives them, or a thread does.

A thread that only waits costs a boot more than all its waiting: it is woken, and takes the interpreter from the loop's
thread and gives it back, for each answer of the database. Where such an attempt meets anything out of the ordinary, a
thread goes on.
"""

from __future__ import annotations

from typing import Final, Protocol, TypeVar, runtime_checkable

from chutes_proto.store._run import Unit

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

UNKNOWN: Final = "the change may be committed or not"
"""The end of each message of a `FateUnknown`."""


class NeedsThread(Exception):
    """An attempt left no trace, and the unit is to be run by `Store.transact`, in a thread."""


class Conflict(NeedsThread):
    """Another transaction was in the way: the unit may also be attempted again."""


class Attempt(Protocol[T_co]):
    """One transaction that was begun; its caller calls its methods until it ``has_ended``, one at a time.

    Then ``result`` is that of the unit's script. They raise whatever `Store.transact` does, or `NeedsThread`.
    """

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to be done, because it was committed or because a method has raised."""
        ...

    @property
    def result(self) -> T_co:
        """The result of the unit's script, once it has ended."""
        ...

    def fileno(self) -> int:
        """Return the descriptor of the connection to the database."""
        ...

    @property
    def reads(self) -> bool:
        """Whether `go_on` is to be called when there is something to read; if not, and it has not ended, `finish`."""
        ...

    def go_on(self) -> None:
        """Do what can be done without waiting."""
        ...

    def finish(self) -> None:
        """Do all that is left, in a thread of the caller's that may wait."""
        ...

    def close(self) -> None:
        """Drop it with its connection, whatever becomes of it: it may be committed or not."""
        ...


@runtime_checkable
class Attempts(Protocol):
    """A store that can begin a transaction without a thread."""

    def attempt(self, unit: Unit[T], /) -> Attempt[T]:
        """Begin to run ``unit`` as `Store.transact` does, without waiting. Raises `NeedsThread` if that cannot be."""
        ...
