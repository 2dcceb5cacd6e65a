"""Decide when to try again: the budget of one exchange, under a retry policy.

Rules kept here:

* a ``Retry-After`` is the least wait, never a longer deadline;
* no attempt begins after the deadline: where the wait would reach beyond it, the last error is raised at once;
* of several servers, which share one store, the next is asked after every failure that may pass, but for a quote that
  this machine could not make. The exchange table says what is asked there: a new nonce, or the same bytes again. The
  ``Retry-After`` of one server does not delay the others, until all were asked.
"""

from __future__ import annotations

import re
from typing import NoReturn, cast

from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Entropy, Flow, Log, NextServer, Sleep, Uptime
from chutes_proto.errors import ChutesError, QuoteUnavailable, Refusal, Unavailable
from chutes_proto.log import Level, Record, Value
from chutes_proto.secret import Secret

_JITTER_SIZE = 4
_TEXT_SIZE = 300
_CUT = "..."


class Budget:
    """The attempts and the time of one exchange; ``what`` begins the names of its log records."""

    def __init__(self, policy: RetryPolicy, started: float, what: str = "boot") -> None:
        self._policy = policy
        self._started = started
        self._what = what
        self._failures = 0

    def announce(self, step: str) -> Flow[None]:
        """Log which step begins, in which attempt, and how long the exchange may still take."""
        yield from Log(Record(Level.INFO, f"{self._what}_step", self._progress(step, (yield from self._left()))))

    def pause(self, step: str, error: ChutesError) -> Flow[None]:
        """Wait before the next attempt. Raises ``error`` where the policy allows none."""
        jitter = yield from Entropy(_JITTER_SIZE)
        left = yield from self._left()
        asked = self._asked(error)
        delay = self._policy.delay(self._failures + 1, jitter, asked)
        if self._failures + 1 >= self._policy.attempts:
            yield from self.give_up(step, error)
        if delay >= left:
            why = f"; it asks to wait {asked:.0f} s, which ends after the deadline" if asked >= left > 0 else ""
            yield from self.give_up(step, error, why)
        fields = {**self._progress(step, left), "wait": round(delay, 1), **described(error)}
        if self._policy.servers > 1 and not isinstance(error, QuoteUnavailable):
            fields["next_server"] = yield from NextServer()
        yield from Log(Record(Level.WARNING, f"{self._what}_delayed", fields))
        yield from Sleep(delay)
        self._failures += 1

    def give_up(self, step: str, error: ChutesError, why: str = "") -> Flow[NoReturn]:
        """Log why the exchange ends, and raise ``error``; ``why`` no other attempt is made follows its reason."""
        fields = {**self._progress(step, (yield from self._left())), **described(error)}
        fields["reason"] = f"{fields['reason']}{why}"
        yield from Log(Record(Level.ERROR, f"{self._what}_stopped", fields))
        raise error

    def _asked(self, error: ChutesError) -> float:
        """The wait of a ``Retry-After``, in seconds: with several servers, once all were asked, and `cap` at most."""
        asked = error.retry_after if isinstance(error, Unavailable) else 0
        if self._policy.servers == 1:
            return asked
        return 0 if (self._failures + 1) % self._policy.servers else min(asked, self._policy.cap)

    def _left(self) -> Flow[float]:
        return self._policy.deadline - ((yield from Uptime()) - self._started)

    def _progress(self, step: str, left: float) -> dict[str, Value]:
        attempt = f"{self._failures + 1}/{self._policy.attempts}"
        return {"step": step, "attempt": attempt, "seconds_left": round(max(left, 0.0), 1)}


def begin(policy: RetryPolicy, what: str = "boot") -> Flow[Budget]:
    """Make a budget that runs from now on."""
    return Budget(policy, (yield from Uptime()) if policy.started is None else policy.started, what)


def conceal(error: ChutesError, secret: Secret) -> None:
    """Remove ``secret``, which the peer may have repeated, from an error's text and attributes."""
    pattern = re.compile(re.escape(secret.reveal().decode("ascii")), re.IGNORECASE)

    def without(value: object) -> object:
        match value:
            case str() if pattern.search(value):
                return pattern.sub("***", value)
            case list():
                return [without(member) for member in cast("list[object]", value)]
            case tuple():
                return tuple(without(member) for member in cast("tuple[object, ...]", value))
            case dict():
                members = cast("dict[object, object]", value)
                return {without(name): without(member) for name, member in members.items()}
            case _:
                return value

    error.args = cast("tuple[object, ...]", without(error.args))
    for name, value in vars(error).items():
        setattr(error, name, without(value))


def described(error: ChutesError) -> dict[str, Value]:
    """Describe an error as fields of a log record, with the peer's texts cut short."""
    texts = {"error": type(error).__name__, "reason": str(error)}
    if isinstance(error, Refusal):
        texts = {"reason": error.reason, "code": str(error.code), "request_id": error.request_id or ""}
    cut = _TEXT_SIZE - len(_CUT)
    return {name: text if len(text) <= _TEXT_SIZE else text[:cut] + _CUT for name, text in texts.items()}
