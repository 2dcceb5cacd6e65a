"""Registers that were refused, traced to the events of a log that lead to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from attrs import frozen

from chutes_proto.quote._eventlog import Difference as EventDifference
from chutes_proto.quote._eventlog import Event, EventLog, difference_in
from chutes_proto.quote._measurements import REGISTERS
from chutes_proto.server._why import Difference

_SHOWN: Final = 120


@frozen
class Traced:
    """An RTMR that was refused, traced to the event of a log that differs.

    ``is_of_boot``: the log leads to the value that was found; otherwise it is another boot's, and says nothing.
    ``is_good``: the good log leads to the value of the nearest profile; None without one. ``difference`` is the first
    event of the register that differs between the two.
    """

    register: str
    is_of_boot: bool
    is_good: bool | None
    difference: EventDifference | None

    def __str__(self) -> str:
        if not self.is_of_boot:
            return f"{self.register}: the event log is not of this boot: it leads to another value than was found"
        if self.is_good is None:
            return (
                f"{self.register}: the event log leads to the value found; --against GOOD names the event that differs"
            )
        good = "" if self.is_good else ", though the good log does not lead to the expected value"
        if self.difference is None:
            return f"{self.register}: no event differs from the good log{good}"
        got, expected = _told(self.difference.got), _told(self.difference.expected)
        return f"{self.register}: first event that differs: found {got}, expected {expected}{good}"


def _told(event: Event | None) -> str:
    """An event, with the beginning of the data that its digest covers."""
    if event is None:
        return "no more events"
    return f"{event}{f', {event.measured[:_SHOWN]!r}' if event.measured else ''}"


def trace(differences: Iterable[Difference], log: EventLog, good: EventLog | None) -> tuple[Traced, ...]:
    """Trace each RTMR among the differences of a refusal to the event of ``log`` that is not that of ``good``."""

    def trace_one(each: Difference) -> Traced:
        leads, ought = (None if one is None else _value(one, each.what) for one in (log, good))
        is_good = None if ought is None else ought == each.expected.lower()
        difference = None if good is None else difference_in(each.what, log, good)
        return Traced(each.what, leads == each.found.lower(), is_good, difference)

    return tuple(trace_one(each) for each in differences if each.what in REGISTERS[1:])


def _value(log: EventLog, register: str) -> str:
    return log.rtmrs[REGISTERS.index(register) - 1].hex()
