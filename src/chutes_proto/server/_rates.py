"""How often one may ask, or be told of: a bucket of tokens for each, in a table that does not grow without end."""

from __future__ import annotations

import math
from collections import OrderedDict

from attrs import Factory, define, field

from chutes_proto.errors import Unavailable
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import address_prefix

_Bucket = tuple[float, float]
"""Tokens, and when they were counted."""


@define
class Buckets:
    """A bucket for each key: ``size`` tokens at most, into which ``per_second`` flow.

    ``most`` keys are remembered, those that came last; a bucket that was forgotten is full.
    """

    size: float
    per_second: float
    most: int
    _buckets: OrderedDict[bytes, _Bucket] = field(init=False, factory=OrderedDict[bytes, _Bucket])

    def take(self, key: bytes, now: float) -> float:
        """0 where there was a token, which is taken; else in how many seconds there is one. ``now`` never steps."""
        tokens, at = self._buckets.pop(key, (self.size, now))
        tokens = min(self.size, tokens + (now - at) * self.per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.per_second
        self._buckets[key] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > self.most:
            _ = self._buckets.popitem(last=False)
        return wait


def _of_addresses(rates: Rates) -> Buckets:
    return Buckets(rates.per_minute, rates.per_minute / 60, rates.most)


@define
class Rates:
    """``per_minute`` requests of one address (of IPv6 one /64), as many of them at once; 0: as often as it likes.

    ``most`` addresses are remembered, those that asked last. A peer without an address is not counted.
    """

    per_minute: int
    most: int = 16384
    _buckets: Buckets = field(init=False, default=Factory(_of_addresses, takes_self=True))

    def count(self, address: str, now: float) -> float:
        """Count one request; ``now`` never steps. 0, or for one too many in how many seconds it were none."""
        return self._buckets.take(address_prefix(address), now) if self.per_minute and address else 0.0

    def take(self, address: str, now: float) -> None:
        """The same; raises `Unavailable`, 429, for one too many."""
        if wait := self.count(address, now):
            text = "Too many requests. Retry shortly."
            raise Unavailable(Code.RATE_LIMITED, text, retry_after=math.ceil(wait))
