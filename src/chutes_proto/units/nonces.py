"""A nonce is redeemed once, in the same transaction as what it grants.

Rules kept here:

* redemptions are forgotten after a day, and the horizon then covers them: no nonce issued at or before it is redeemed.
  It is raised by one unit and they are deleted by later ones, apart from boots: each boot reads the horizon and adds a
  redemption, so a unit that does both would conflict with every boot of its time;
* any server's clock may be wrong. A store with a clock of its own forgets nothing younger than a day by that clock, and
  redeems no nonce issued more than `SKEW` later than it: so the horizon of a restore, `SKEW` after it, covers every
  redemption that may be lost. Where the store has none, all servers are on one machine and have one clock;
* a nonce with our tag from the future, or that a restore voided, is not the fault of the VM: retry, not a final
  refusal. A server goes on to issue nonces while the horizon lies ahead, and a boot may begin before that and end
  after. By a clock that is ahead, another server's nonce is too old; that cannot be told from one that came late, and
  is refused.
"""

from __future__ import annotations

from attrs import frozen

from chutes_proto.errors import Refused, Unavailable
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._rows import Claim, NonceRow, ReadTimes, SetHorizon, SweepNonces, Times
from chutes_proto.store._run import Script, Unit
from chutes_proto.wire.codes import Code

SKEW = 60
"""How far ahead of our clocks a nonce may have been issued, in seconds."""

NONCE_KEPT_SECONDS = 86_400
NONCES_SWEPT = 1000
SWEEP_SECONDS = 3600
"""How often redemptions are forgotten."""


@frozen
class Nonce:
    """A nonce of this server (32 bytes) whose tag, age, purpose and binding hold; only `NonceMint.check` makes one."""

    value: bytes
    purpose: str
    issued_at: int


def redemption(nonce: Nonce, now: int) -> Claim:
    """The operation that redeems ``nonce``, unless it was redeemed."""
    return Claim(NonceRow(nonce.value, nonce.purpose, nonce.issued_at, now))


def redeem_nonce(nonce: Nonce, now: int) -> Script[Times]:
    """Redeem ``nonce``; ``now`` is the server's time. Returns the times of the store that allow it.

    Raises `Refused` for one that was redeemed. Raises `Unavailable` for one from the future, while the horizon lies
    ahead, as it does for a minute after a restore, and for one issued at or before it: none of these is at fault.
    """
    times = yield from ReadTimes()
    horizon, clock = times.horizon, times.clock
    if (why := why_void(times, now)) is not None:
        text = "No nonce can be redeemed now. Retry shortly."
        raise Unavailable(Code.STORE_UNAVAILABLE, text, retry_after=10, reason=why)
    if clock is not None and nonce.issued_at > clock + SKEW:
        raise from_future("nonce was issued", nonce.issued_at, clock, "the database's")
    if nonce.issued_at <= horizon:  # of an age that is accepted: so a restore voided it, and a new one counts
        why = f"nonce issued at {rfc3339(nonce.issued_at)}, and all issued until {rfc3339(horizon)} are void"
        text = "This nonce is void. Retry with a new one."
        raise Unavailable(Code.STORE_UNAVAILABLE, text, retry_after=1, reason=why)
    if not (yield from redemption(nonce, now)):
        raise Refused(Code.NONCE_INVALID, "Invalid nonce supplied", reason="nonce redeemed before")
    return times


@frozen
class RaiseHorizon(Unit[bool]):
    """Raise the horizon to a day ago, if it is `SWEEP_SECONDS` older than that; return whether it was.

    So of several servers one does it. ``now`` is the server's time.
    """

    now: int

    def script(self) -> Script[bool]:
        """Compare, and set."""
        times = yield from ReadTimes()
        until = _forgettable(times, self.now)
        if times.horizon > until - SWEEP_SECONDS:
            return False
        yield from SetHorizon(until)
        return True


@frozen
class ForgetNonces(Unit[int]):
    """Delete up to `NONCES_SWEPT` redemptions that the horizon covers; return how many.

    ``now`` is the server's time.
    """

    now: int

    def script(self) -> Script[int]:
        """Read the horizon, and delete."""
        times = yield from ReadTimes()
        # A row from the future, which a clock that was ahead has left, stays until its time has passed.
        until = min(times.horizon, _forgettable(times, self.now))
        return len((yield from SweepNonces(until, NONCES_SWEPT)))


def _forgettable(times: Times, now: int) -> int:
    """The latest time at which a nonce was issued and redeemed that may be forgotten."""
    return (now if times.clock is None else min(now, times.clock)) - NONCE_KEPT_SECONDS


def from_future(what: str, at: int, time: int, whose: str) -> Unavailable:
    """The answer to something of ours that is dated later than ``time``, which is by ``whose`` clock."""
    times = f"{what} at {rfc3339(at)}, and {whose} clock says {rfc3339(time)}"
    text = "A fault of the server's. Retry shortly."
    return Unavailable(Code.SERVER_FAULT, text, retry_after=10, reason=f"{times}; {_COMPARE}")


_COMPARE = "compare the clocks of all servers and of the database"


def why_void(times: Times, now: int) -> str | None:
    """Why no nonce can be redeemed, and what an operator does about it; None if nonces can be."""
    horizon, clock = times.horizon, times.clock
    if horizon < now:
        return None
    why = f"all nonces issued until {rfc3339(horizon)} are void, and this server's clock says {rfc3339(now)}"
    if clock is not None:
        why += f", the database's {rfc3339(clock)}"
    if lies_ahead(times, now):
        why += f"; a clock was ahead: {_COMPARE}, set them right, and run `chutes-proto store restored`"
    elif clock is not None and now < clock - SKEW:
        why += f"; {_COMPARE}, and set this server's right"
    else:
        why += ", as after `chutes-proto store restored`; boots wait until then"
    return why


def lies_ahead(times: Times, now: int) -> bool:
    """Return whether the horizon is later than a restore sets it: only a clock that was ahead does that."""
    return times.horizon > (now if times.clock is None else times.clock) + SKEW
