"""How long an operation retries a busy store or missing collateral, and from when on it starts nothing new.

Deployed clients give up 30 s after they asked and try these operations only once. So what is busy is tried again, for
`RETRY_SECONDS`; and no transaction starts later than `LAST_START_SECONDS` after the request came: its answer would
reach nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from chutes_proto.effects import Sleep, Transact, Uptime
from chutes_proto.errors import StoreBusy, Unavailable
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from collections.abc import Callable

    from chutes_proto.effects import Flow
    from chutes_proto.store._run import Unit

T = TypeVar("T")

RETRY_SECONDS = 20.0
LAST_START_SECONDS = 25.0
_STEP = 0.5


def transact_with_retries(unit: Unit[T], arrived: float) -> Flow[T]:
    """Run ``unit``, waiting for a busy store. ``arrived`` is when the request's first byte came, on the `Uptime` clock.

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
    """What ``attempt`` returns, which is made again while it says that it cannot be done now.

    Raises `Unavailable` as it did when `RETRY_SECONDS` is over, or when it is too late for a transaction to follow.
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
