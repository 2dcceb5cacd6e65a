"""Units, each one transaction as a value, and the function that drives a unit's script.

Rules kept here:

* a unit's script returns: all its changes are kept; it raises: none is;
* a script is pure. A store may run it more than once, against rows that changed in between, so all entropy and the time
  were drawn before and are fields of the unit: a retry must not hand out another passphrase.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar

from attrs import frozen

from chutes_proto.store._rows import StoreOp

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Script: TypeAlias = Generator[StoreOp[Any], Any, T]
"""A generator that yields operations, is sent their replies, and returns ``T``."""


class Unit(Generic[T_co]):
    """One transaction as a frozen value; subclasses define it in `script`.

    ``READS_COMMITTED`` is the one exception from serializable transactions: such a unit sees what others commit
    meanwhile, and conflicts with none of them. It is for a unit that takes a lock of its own first and then moves what
    others have committed, or that only looks for faults, in an order in which a commit meanwhile makes none.

    A unit that runs ``ALONE`` begins when no other one runs, and none begins before it has ended: so a unit that began
    before it was committed before it, too, and every later one sees its changes. A store that runs one transaction at a
    time need not look at either.
    """

    __slots__ = ()
    READS_COMMITTED: ClassVar[bool] = False
    ALONE: ClassVar[bool] = False

    def script(self) -> Script[T_co]:
        """A new run of the transaction."""
        raise NotImplementedError

    def ahead(self) -> Sequence[StoreOp[Any]]:
        """Operations that the script asks for before its first write, in the usual case.

        A store that is far away does them at once; their replies, faults among them, reach the script where it asks.
        They are reads, and such a `Claim` as the script makes in any case, or raises.
        """
        return ()


@frozen
class Ask(Unit[T]):
    """One operation as a transaction of its own."""

    op: StoreOp[T]

    def script(self) -> Script[T]:
        """Perform the operation."""
        return (yield from self.op)


def unit_name(unit: Unit[Any]) -> str:
    """The name of a unit, or of the operation that is asked, for counts."""
    return type(unit.op if isinstance(unit, Ask) else unit).__name__


class Store(Protocol):
    """A store: one method is the whole of persistence."""

    def transact(self, unit: Unit[T], /) -> T:
        """Run ``unit`` as one serializable transaction; return its script's result once that is durable.

        An exception of the script comes out unchanged after a roll-back that leaves no trace. Raises `StoreError` for a
        fault of the store, and `StoreBusy` if a retry may help: then nothing was changed.
        """
        ...


@frozen
class Snapshot:
    """A store whose units all run in one transaction, which another has begun and ends."""

    run: Callable[[Unit[Any]], Any]

    def transact(self, unit: Unit[T]) -> T:
        """Run ``unit`` in that transaction."""
        result: T = self.run(unit)
        return result


def untold(done: int, total: int, /) -> None:
    """Take how much is done, and of how much, and tell nobody."""
    del done, total


def run_script(script: Script[T], perform: Callable[[StoreOp[Any]], Any]) -> T:
    """Drive ``script`` to its end. An exception of ``perform`` ends it: a script does not handle a store's faults."""
    try:
        op = next(script)
        while True:
            op = script.send(perform(op))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        script.close()
