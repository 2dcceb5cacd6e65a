"""How long one request waits for the store and for collateral, and how late it is answered.

Deployed clients give up `CLIENT_SECONDS` after they asked. The operations of a boot wait for a store that does not
answer, because a VM powers off after three quick refusals at its boot, and after one of any later request. No
grant starts later than `LAST_START_SECONDS` after the request came. How many wait is bounded: those with a verified
quote, or a token that followed one (`Service.attested`), apart from all others (`Service.strangers`). One more, and
every other operation, is told to come again once it has waited `QUICK_SECONDS` for the store in all.

No transaction keeps an answer from leaving by `LATEST_ANSWER_SECONDS`, whatever the store does: one that records a
refusal ends by then, too, or is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from chutes_proto.effects import Flow, Sleep, Transact, Uptime, substitute
from chutes_proto.errors import FateUnknown, StoreBusy, StoreError, Unavailable
from chutes_proto.store._run import Unit
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest

T = TypeVar("T")

CLIENT_SECONDS: Final = 30.0
LAST_START_SECONDS: Final = 25.0
LATEST_ANSWER_SECONDS: Final = 28.0
QUICK_SECONDS: Final = 4.5
COLLATERAL_SECONDS: Final = 20.0
_STEP: Final = 0.5


def bound_store(flow: Flow[T], request: HttpRequest, *, is_patient: bool) -> Flow[T]:
    """Run ``flow``, which handles ``request``, with transactions that end in time.

    Unless the operation ``is_patient``, all of them together wait `QUICK_SECONDS`. A transaction that has no time left
    raises `StoreBusy` in the flow. Raises what the flow raises.
    """
    left = LATEST_ANSWER_SECONDS if is_patient else QUICK_SECONDS

    def transact(effect: Transact[Any]) -> Flow[Any]:
        nonlocal left
        began = yield from Uptime()
        seconds = min(left, LATEST_ANSWER_SECONDS - (began - request.arrived))
        if seconds <= 0:
            raise StoreBusy("no time is left for a transaction")
        try:
            reply = yield from Transact(effect.unit, min(effect.turn_seconds, seconds), min(effect.seconds, seconds))
        except Exception:
            left -= (yield from Uptime()) - began
            raise
        left -= (yield from Uptime()) - began
        return reply

    return substitute(flow, Transact, transact)


def transact_patiently(
    place: AbstractContextManager[None], unit: Unit[T], request: HttpRequest, *, is_repeatable: bool = True
) -> Flow[T]:
    """Run ``unit`` of ``request``, waiting for a busy store in a ``place`` of an `Admission`.

    ``is_repeatable``: the same unit, run again after it was committed, gives the same answer; then one that may have
    been committed runs again. Raises `Unavailable` when the time is over or too many wait, `StoreError`, and what the
    unit raises.
    """
    with place:
        fault: StoreError | None = None
        while (waited := (yield from Uptime()) - request.arrived) <= LAST_START_SECONDS:
            left = LAST_START_SECONDS - waited
            try:
                return (yield from Transact(unit, turn_seconds=left, seconds=LATEST_ANSWER_SECONDS - waited))
            except StoreBusy as exc:
                fault = exc
            except FateUnknown as exc:
                if not is_repeatable:
                    raise
                fault = exc
            if (yield from Uptime()) - request.arrived + _STEP > LAST_START_SECONDS:
                break
            yield from Sleep(_STEP)
    raise _too_late(fault)


def _too_late(fault: StoreError | None) -> Unavailable:
    reason = f"no transaction starts {LAST_START_SECONDS:.0f} s after its request"
    if fault is None:
        return Unavailable(Code.STORE_UNAVAILABLE, "Too late to begin. Retry shortly.", reason=reason)
    text = "The store does not answer. Retry shortly."
    return Unavailable(Code.STORE_UNAVAILABLE, text, reason=f"{reason}: {type(fault).__name__}: {fault}")


def verify_with_retries(attempt: Callable[[], Flow[T]], arrived: float) -> Flow[T]:
    """Run ``attempt``, and again while it raises `Unavailable`; returns its result.

    ``arrived`` is the `Uptime` at the request's first byte, in seconds. Raises its last `Unavailable` when
    `COLLATERAL_SECONDS` are over, or when it is too late for a transaction to follow.
    """
    began = yield from Uptime()
    while True:
        try:
            return (yield from attempt())
        except Unavailable:
            now = yield from Uptime()
            if now - began + _STEP > COLLATERAL_SECONDS or now - arrived + _STEP > LAST_START_SECONDS:
                raise
        yield from Sleep(_STEP)
