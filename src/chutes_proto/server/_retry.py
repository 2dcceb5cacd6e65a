"""How long one request waits for the store and for collateral, and how late it is answered.

Deployed clients give up `CLIENT_SECONDS` after they asked. The operations of a boot wait for a store that does not
answer, because a VM powers off after three quick refusals at its boot, and after one of any later request. No
transaction starts later than `LAST_START_SECONDS` after the request came, and the answer leaves by
`LATEST_ANSWER_SECONDS`, whatever the store does. How many wait is bounded: those with a verified quote, or a token that
followed one (`Service.attested`), apart from all others (`Service.strangers`). One more, and every other operation, is
told to come again within seconds (the limits of `Transact`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, TypeVar

from chutes_proto.effects import Flow, Sleep, Transact, Uptime
from chutes_proto.errors import FateUnknown, StoreBusy, StoreError, Unavailable
from chutes_proto.store._run import Unit
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest

T = TypeVar("T")

CLIENT_SECONDS: Final = 30.0
LAST_START_SECONDS: Final = 25.0
LATEST_ANSWER_SECONDS: Final = 28.0
COLLATERAL_SECONDS: Final = 20.0
_STEP: Final = 0.5


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
        while (waited := (yield from _waited(request))) <= LAST_START_SECONDS:
            left = LAST_START_SECONDS - waited
            try:
                return (yield from Transact(unit, turn_seconds=left, seconds=LATEST_ANSWER_SECONDS - waited))
            except StoreBusy as exc:
                fault = exc
            except FateUnknown as exc:
                if not is_repeatable:
                    raise
                fault = exc
            if (yield from _waited(request)) + _STEP > LAST_START_SECONDS:
                break
            yield from Sleep(_STEP)
    raise _too_late(fault)


def _waited(request: HttpRequest) -> Flow[float]:
    return (yield from Uptime()) - request.arrived


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
