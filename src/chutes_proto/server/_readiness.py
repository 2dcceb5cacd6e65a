"""Readiness: whether boots would be granted, found out beside the requests, for balancers that ask.

Rules kept here:

* a server whose store refuses every transaction until an operator acts (another schema, for example) is not ready. The
  store is asked all the time, so a server without requests finds out as well, and gets ready again by itself. The look
  only reads; whether the store takes a change is known from the row that this server writes (``_alike.py``);
* a store that is away or busy does not change this: all servers share the fault, and boots wait for it;
* a server whose clock is in doubt refuses nothing for good: a nonce of another server is too old only by a right clock.
"""

from __future__ import annotations

from typing import Final, NoReturn

from attrs import define, field

from chutes_proto.effects import Flow, Log, Now, Sleep, Transact, Uptime
from chutes_proto.errors import FateUnknown, Refusal, StoreAway, StoreBusy, StoreError, Unavailable
from chutes_proto.log import Level, Record
from chutes_proto.store._rows import StoreOp
from chutes_proto.store._run import Ask
from chutes_proto.units.revocations import NO_REVOCATIONS, ReadRevocations, Revocations
from chutes_proto.wire.codes import Code

WATCH_SECONDS: Final = 1.0
"""The time between two looks at the store."""

STEP_SECONDS: Final = 5.0
"""By how much the clock may be set between two looks."""


@define
class Revoked:
    """The revocations as this process has read them last; a unit reads them again if there are others by then."""

    now: Revocations = NO_REVOCATIONS


@define
class Readiness:
    """The fault of the store that the last look found, None if it takes transactions."""

    fault: str | None = None
    unwritten: str | None = None
    """The fault of the latest write beside the requests: a store that is read-only, or full, may be read."""
    _booted_at: float | None = field(init=False, default=None)
    """The start of `Uptime` by the clock of `Now`, when the store last took a transaction."""

    def require(self) -> None:
        """Raise `Unavailable` while boots are not served."""
        if self.fault is not None:
            text = "The store cannot be used. Retry shortly."
            raise Unavailable(Code.STORE_UNAVAILABLE, text, reason=self.fault)

    def attempt_writing(self, op: StoreOp[None]) -> Flow[None]:
        """Carry out ``op``, which writes, and note whether the store takes it. Raises `StoreError`."""
        try:
            yield from Transact(Ask(op))
            self.unwritten = None
        except (StoreBusy, FateUnknown):
            raise
        except StoreError as exc:
            self.unwritten = str(exc)
            raise

    def note_clock(self, now: int, uptime: float) -> None:
        """Note that the store has taken a transaction, which it does not where the clocks differ."""
        self._booted_at = now - uptime

    def doubt(self, refusal: Refusal) -> Flow[Refusal]:
        """The answer in place of a final ``refusal``: 503 while the store refuses us, or after our clock jumped.

        Nothing is in doubt for a server whose store is not watched.
        """
        if self._booted_at is None:
            return refusal
        why = self.fault
        step = (yield from Now()) - (yield from Uptime()) - self._booted_at
        if why is None and abs(step) > STEP_SECONDS:
            why = f"this server's clock was set by {step:+.0f} s, and the store has not confirmed it yet"
        if why is None:
            return refusal
        reason = f"{why}; otherwise: {refusal.reason}"
        text = "A fault of the server's. Retry shortly."
        return Unavailable(Code.SERVER_FAULT, text, reason=reason, retry_after=10, headers=refusal.headers)


def watch_store(readiness: Readiness, revoked: Revoked) -> Flow[NoReturn]:
    """Look at the store for ever, and read its revocations; log each change of what is found."""
    away: str | None = None
    while True:
        was_away = away
        now, uptime = (yield from Now()), (yield from Uptime())
        try:
            revoked.now = yield from Transact(ReadRevocations(revoked.now))
            fault, away = readiness.unwritten, None
            readiness.note_clock(now, uptime)
        except StoreAway as exc:
            fault, away = readiness.fault, str(exc)
        except (StoreBusy, FateUnknown):
            fault = readiness.fault
        except StoreError as exc:
            fault, away = str(exc), None
        if fault != readiness.fault:
            readiness.fault = fault
            yield from Log(
                Record(Level.INFO, "store_accepted", {})
                if fault is None
                else Record(Level.ERROR, "store_refused", {"error": fault})
            )
        if (away is None) != (was_away is None):
            yield from Log(
                Record(Level.INFO, "store_back", {})
                if away is None
                else Record(Level.ERROR, "store_away", {"error": away})
            )
        yield from Sleep(WATCH_SECONDS)
