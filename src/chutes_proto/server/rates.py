"""How often one address may ask: a bucket of tokens for each, in a table that does not grow without end."""

from __future__ import annotations

import math
from collections import OrderedDict

from attrs import define, field

from chutes_proto.codes import Code
from chutes_proto.errors import Unavailable
from chutes_proto.wire.http import address_prefix

_Bucket = tuple[float, float]
"""Tokens, and when they were counted."""


@define
class Rates:
    """``per_minute`` requests of one address (of IPv6 one /64), as many of them at once; 0: as often as it likes.

    ``most`` addresses are remembered, those that asked last. A peer without an address is not counted.
    """

    per_minute: int
    most: int = 16384
    _buckets: OrderedDict[bytes, _Bucket] = field(init=False, factory=OrderedDict[bytes, _Bucket])

    def take(self, address: str, now: float) -> None:
        """Count one request; ``now`` never steps. Raises `Unavailable`, 429, for one too many."""
        if not self.per_minute or not address:
            return
        prefix = address_prefix(address)
        tokens, at = self._buckets.pop(prefix, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + (now - at) * self.per_minute / 60)
        allowed = tokens >= 1
        self._buckets[prefix] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > self.most:
            _ = self._buckets.popitem(last=False)
        if not allowed:
            wait = math.ceil((1 - tokens) * 60 / self.per_minute)
            raise Unavailable(Code.RATE_LIMITED, "Too many requests. Retry shortly.", retry_after=wait)
