"""Playbooks: tests of a flow as a dialogue of expected effects and their replies.

::

    keys = Playbook(
        (Send(request), TransportError("cut", maybe_delivered=True)),  # an exception is raised in the flow
        (Sleep, None),  # any effect of this class
        (Send(request), HttpResponse(200, body=b"...")),  # an effect equal to this one
        (lambda effect: isinstance(effect, Send), answer),  # an effect for which this is true
        aside={Uptime: lambda _: 0.0, Log: records.append},  # these are answered at any time
    ).run(flow)

Rules kept here: every expectation is met in its order, no other effect is allowed except those of ``aside``, and an
error shows the whole dialogue so far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

from chutes_proto.effects import Effect, Flow, run

T = TypeVar("T")

Expected: TypeAlias = Effect[Any] | type[Effect[Any]] | Callable[[Effect[Any]], bool]
Aside: TypeAlias = Mapping[type[Any], Callable[[Any], object]]


class PlaybookError(AssertionError):
    """The flow left its playbook; the text says where, and shows the dialogue so far."""


class Playbook:
    """Expected effects with their replies: an effect, a class of effects or a function; a reply or an exception.

    ``aside`` has a function for each class of effects that is answered at any time: its result is the reply, and its
    exception is raised in the flow.
    """

    def __init__(self, *script: tuple[Expected, object], aside: Aside | None = None) -> None:
        self._script = script
        self._aside: Aside = aside or {}

    def run(self, flow: Flow[T]) -> T:
        """Return or raise what the flow does. Raises `PlaybookError` if it leaves the script or ends too early."""
        reading = _Reading(self._script, self._aside)
        try:
            result = run(flow, reading.perform)
        except _Departure as exc:
            raise PlaybookError(str(exc)) from None
        except Exception as exc:
            if reading.unfinished():
                raise PlaybookError(reading.report(f"the flow raised {exc!r}")) from exc
            raise
        if reading.unfinished():
            raise PlaybookError(reading.report(f"the flow returned {result!r}"))
        return result


class _Departure(BaseException):
    """The flow left the script. It is not an `Exception`, so that no flow handles it."""


class _Reading:
    """One performance of a script."""

    def __init__(self, script: tuple[tuple[Expected, object], ...], aside: Aside) -> None:
        self._script = script
        self._aside = aside
        self._position = 0
        self._dialogue: list[str] = []

    def perform(self, effect: Effect[Any]) -> object:
        if self.unfinished() and _meets(self._script[self._position][0], effect):
            reply = self._script[self._position][1]
            self._position += 1
            self._dialogue.append(f"{effect!r} -> {reply!r}")
            if isinstance(reply, Exception):
                raise reply
            return reply
        if type(effect) in self._aside:
            return self._aside[type(effect)](effect)
        raise _Departure(self.report(f"the flow asked for {effect!r}"))

    def unfinished(self) -> bool:
        return self._position < len(self._script)

    def report(self, what: str) -> str:
        if self.unfinished():
            step = f"step {self._position + 1} of {len(self._script)}"
            expected = f"{step} expects {_name(self._script[self._position][0])}"
        else:
            expected = f"nothing is expected after the {len(self._script)} steps"
        return "\n".join([expected, what, "so far:", *(f"  {line}" for line in self._dialogue or ["nothing"])])


def _meets(expected: Expected, effect: Effect[Any]) -> bool:
    if isinstance(expected, type):
        return isinstance(effect, expected)
    return expected == effect if isinstance(expected, Effect) else expected(effect)


def _name(expected: Expected) -> str:
    return getattr(expected, "__name__", repr(expected)) if callable(expected) else repr(expected)
