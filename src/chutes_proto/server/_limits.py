"""Limits on the work and the log lines that peers cause in one process, at once and over time; never stored."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Hashable
from contextlib import contextmanager

from attrs import define, field

from chutes_proto.errors import Unavailable
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import address_prefix


@define
class Admission:
    """Admits at most ``size`` at once, and ``share`` of them of one party, so that none keeps all others out."""

    size: int
    share: int
    code: Code = Code.BUSY
    text: str = "Too many verifications at once. Retry shortly."
    held: dict[Hashable, int] = field(init=False, factory=dict[Hashable, int])

    @property
    def admitted(self) -> int:
        """How many are admitted now."""
        return sum(self.held.values())

    @contextmanager
    def of(self, party: Hashable) -> Generator[None]:
        """Admit one of ``party`` while the context lasts. Raises `Unavailable` beyond a limit."""
        held = self.held.get(party, 0)
        if held >= self.share or self.admitted >= self.size:
            raise Unavailable(self.code, self.text)
        self.held[party] = held + 1
        try:
            yield
        finally:
            if self.held[party] > 1:
                self.held[party] -= 1
            else:
                del self.held[party]


@define
class TokenBuckets:
    """A bucket for each address: ``size`` tokens at most (0: no limit), into which ``per_second`` flow.

    An IPv6 address counts by its /64; IPv4 counts whole, because tenants of a data centre's network are strangers. The
    latest ``most`` addresses are remembered; a bucket that was forgotten is full.
    """

    size: float
    per_second: float
    most: int = 16384
    _buckets: OrderedDict[bytes, tuple[float, float]] = field(
        init=False, factory=OrderedDict[bytes, "tuple[float, float]"]
    )
    """Tokens, and when they were counted."""

    def take(self, address: str, now: float) -> float:
        """Take a token and return 0, or the seconds until there is one; ``now`` is a monotonic clock's."""
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
    """Limits log lines, of each address and of all together.

    The limit of all is that of twenty addresses: an attacker with fewer cannot hide the lines about a VM.
    """

    each: TokenBuckets = field(factory=lambda: TokenBuckets(20, 0.2, most=1024))
    all: TokenBuckets = field(factory=lambda: TokenBuckets(400, 4))
    _held_back: int = field(init=False, default=0)

    def admits(self, address: str, now: float) -> int | None:
        """None to hold this line back, else the number held back since the last one; ``now`` is a monotonic clock's."""
        if self.each.take(address, now) or self.all.take("", now):
            self._held_back += 1
            return None
        held_back, self._held_back = self._held_back, 0
        return held_back
