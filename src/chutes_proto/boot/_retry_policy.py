"""The retry policy of a client, as a value. `chutes_proto.boot._retry` applies it.

The wait doubles from ``base`` to ``cap``; its upper half is drawn, so that a fleet does not come back in step.
"""

from __future__ import annotations

import math

from attrs import frozen

from chutes_proto.errors import LocalProtocolError


@frozen
class RetryPolicy:
    """A client's retries: at most ``attempts``, none begun later than ``deadline`` seconds after the first.

    The ``n``-th wait is between half and the whole of ``min(cap, base * 2 ** (n - 1))`` seconds. ``servers`` is how
    many the driver was made for. With ``started``, on the clock of `Uptime`, the deadline counts from there, so that
    several exchanges can share it.
    """

    attempts: int = 8
    base: float = 1.0
    cap: float = 30.0
    deadline: float = 300.0
    servers: int = 1
    started: float | None = None

    def __attrs_post_init__(self) -> None:
        if self.attempts < 1 or not 0 < self.base <= self.cap or not self.deadline > 0:
            raise LocalProtocolError("a retry policy needs attempts >= 1, 0 < base <= cap, and a deadline above 0")

    def delay(self, failures: int, jitter: bytes, retry_after: float = 0.0) -> float:
        """The seconds to wait after the ``failures``-th failure (counted from 1); ``jitter`` is random bytes."""
        bound = min(self.cap, math.ldexp(self.base, min(failures - 1, 62)))
        share = int.from_bytes(jitter, "big") / (1 << 8 * len(jitter))
        return max(bound / 2, retry_after) + share * bound / 2


DEFAULT_RETRY = RetryPolicy()
"""The retry policy of a boot agent that sets no other."""
