"""Limits on what peers can make one process do and print: how much at once, and how often. All may be lost."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Generator, Hashable
from contextlib import contextmanager

from attrs import define, field

from chutes_proto.errors import Unavailable
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import address_prefix


@define
class Admission:
    """At most ``size`` under way at once, and ``share`` of them for one party, so that none keeps all others out."""

    size: int
    share: int
    held: Counter[Hashable] = field(init=False, factory=Counter[Hashable])

    @contextmanager
    def of(self, party: Hashable) -> Generator[None]:
        """Admit one of ``party`` while the context lasts. Raises `Unavailable` where there are too many."""
        if self.held.total() >= self.size or self.held[party] >= self.share:
            raise Unavailable(Code.BUSY, "Too many verifications at once. Retry shortly.")
        self.held[party] += 1
        try:
            yield
        finally:
            self.held[party] -= 1
            if not self.held[party]:
                del self.held[party]


@define
class TokenBuckets:
    """A bucket for each address: ``size`` tokens at most (0: as many as one likes), into which ``per_second`` flow.

    Of IPv6 an address is its /64; IPv4 counts whole, because those who share a network of a data centre need not know
    each other. ``most`` addresses are remembered, those that came last; a bucket that was forgotten is full.
    """

    size: float
    per_second: float
    most: int = 16384
    _buckets: OrderedDict[bytes, tuple[float, float]] = field(
        init=False, factory=OrderedDict[bytes, "tuple[float, float]"]
    )
    """Tokens, and when they were counted."""

    def take(self, address: str, now: float) -> float:
        """Take a token and return 0, or the seconds until there is one; ``now`` never steps."""
        if not self.size:
            return 0.0
        key = address_prefix(address)
        tokens, at = self._buckets.pop(key, (self.size, now))
        tokens = min(self.size, tokens + (now - at) * self.per_second)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.per_second
        self._buckets[key] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > self.most:
            _ = self._buckets.popitem(last=False)
        return wait


@define
class LogThrottle:
    """Decides which log lines are written: of each address so many at once and as they flow in, and of all together.

    All together have room for what twenty addresses may cause, so nobody with fewer hides what is said of a VM.
    """

    _each: TokenBuckets = field(factory=lambda: TokenBuckets(20, 0.2, most=1024))
    _all: TokenBuckets = field(factory=lambda: TokenBuckets(400, 4))
    _held_back: int = field(init=False, default=0)

    def admits(self, address: str, now: float) -> int | None:
        """None: hold this line back. Else the number of lines held back since the last one; ``now`` never steps."""
        if self._each.take(address, now) or self._all.take("", now):
            self._held_back += 1
            return None
        held_back, self._held_back = self._held_back, 0
        return held_back
