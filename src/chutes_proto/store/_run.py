"""Units: what must be atomic, as one value; and how a script is driven.

Rules kept here:

* a unit's script returns: everything is kept; it raises: nothing is;
* a script is pure. A store may run it more than once, against rows that changed in between, so all entropy and the time
  were drawn before and are fields of the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from chutes_proto.store.rows import StoreOp

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Script: TypeAlias = Generator[StoreOp[Any], Any, T]
"""What a script is: it yields operations, is sent replies, and returns ``T``."""


class Unit(Generic[T_co]):
    """One transaction as a frozen value; subclasses say what it does in `script`."""

    __slots__ = ()

    def script(self) -> Script[T_co]:
        """A new run of the transaction."""
        raise NotImplementedError


class Store(Protocol):
    """The whole of persistence."""

    def transact(self, unit: Unit[T], /) -> T:
        """Run ``unit`` as one serializable transaction; return what its script returns once that is durable.

        What the script raises comes out unchanged after a roll-back that leaves no trace. Raises `StoreError` when the
        store is at fault; `StoreBusy`, when trying again may help.
        """
        ...


def run_script(script: Script[T], perform: Callable[[StoreOp[Any]], Any]) -> T:
    """Drive ``script`` to its end. What ``perform`` raises ends it: a script does not handle a store's faults."""
    try:
        op = next(script)
        while True:
            op = script.send(perform(op))
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        script.close()
