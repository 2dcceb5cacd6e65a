"""Retries of a busy store and of missing collateral within one request, and the latest start of a transaction.

Deployed clients give up 30 s after they asked and try these operations only once. So a busy store is tried again, for
`RETRY_SECONDS`; and no transaction starts later than `LAST_START_SECONDS` after the request came: its answer would
not reach the client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from chutes_proto.effects import Flow, Sleep, Transact, Uptime
from chutes_proto.errors import StoreBusy, Unavailable
from chutes_proto.store._run import Unit
from chutes_proto.wire.codes import Code

T = TypeVar("T")

RETRY_SECONDS = 20.0
LAST_START_SECONDS = 25.0
_STEP = 0.5


def transact_with_retries(unit: Unit[T], arrived: float) -> Flow[T]:
    """Run ``unit``, waiting for a busy store; ``arrived`` is the `Uptime` at the request's first byte, in seconds.

    Raises `Unavailable` when the store stays busy or the time is over, and what the unit raises.
    """
    began = yield from Uptime()
    while True:
        if (yield from Uptime()) - arrived > LAST_START_SECONDS:
            raise Unavailable(
                Code.STORE_UNAVAILABLE,
                "Too late to begin. Retry shortly.",
                reason=f"no transaction starts {LAST_START_SECONDS:.0f} s after its request",
            )
        try:
            return (yield from Transact(unit))
        except StoreBusy as exc:
            if (yield from Uptime()) - began + _STEP > RETRY_SECONDS:
                raise Unavailable(
                    Code.STORE_UNAVAILABLE,
                    "The store does not answer. Retry shortly.",
                    reason=f"the store stayed busy for {RETRY_SECONDS:.0f} s: {exc}",
                ) from None
        yield from Sleep(_STEP)


def verify_with_retries(attempt: Callable[[], Flow[T]], arrived: float) -> Flow[T]:
    """Run ``attempt``, and again while it raises `Unavailable`; returns its result.

    Raises its last `Unavailable` when `RETRY_SECONDS` are over, or when it is too late for a transaction to follow.
    """
    began = yield from Uptime()
    while True:
        try:
            return (yield from attempt())
        except Unavailable:
            now = yield from Uptime()
            if now - began + _STEP > RETRY_SECONDS or now - arrived + _STEP > LAST_START_SECONDS:
                raise
        yield from Sleep(_STEP)
