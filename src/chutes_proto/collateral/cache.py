"""A cache of what upstream services have: when it is used, when and where it is fetched again, when given up.

    decision = cache.decide(key, now)         Use, Refresh (use, and fetch in the background), Fetch or GiveUp
    kept = yield from fetch(cache, key)       one round: upstreams in their order, until one has it

A kind of collateral is a subclass: that of platforms is in ``platforms.py``, that of GPUs in ``gpus.py``.

Rules kept here:

* the cache is asked only for what verified evidence needs: only real platforms and devices cause fetches;
* cached collateral is used until it expires, and is refreshed in the background long before; a failed fetch does not
  change it;
* expired collateral is used only while it cannot be fetched, and only within the operator's grace (none unless
  configured);
* valid collateral is never replaced by older;
* a platform whose PCK CA has a new key under the old name causes one fetch, and another only after ``unknown`` seconds;
* upstreams are asked in their order. One that does not answer, or asks for it (429, 503, ``Retry-After``), is left
  alone for a while, longer each time; a key that no upstream knows is remembered as such. While none may be asked,
  every caller is refused at once;
* the keys remembered and the fetches per minute are bounded, and half of the fetches are kept for keys that were
  fetched before: new platforms cannot make known ones expire;
* waits are spread by jitter, so that several servers that lost the same upstream do not come back in step.

State changes in `Cache` only. It has no lock: its driver calls it from one thread, and runs one `fetch` at a time for
each key.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

from attrs import evolve, frozen

from chutes_proto.collateral.pcs import MAX_RETRY_AFTER
from chutes_proto.effects import Log, Now, Sleep
from chutes_proto.errors import ConfigurationError, GpuError, TransportError, UpstreamError
from chutes_proto.log import Level, Record
from chutes_proto.quote._errors import QuoteError
from chutes_proto.quote._terms import Window, check_seconds, rfc3339

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.log import Value


class Key(Hashable, Protocol):
    """One piece of collateral; its text is for people."""

    @property
    def log_fields(self) -> Mapping[str, Value]:
        """The key in a log record."""
        ...


class Held(Protocol):
    """Verified collateral."""

    @property
    def window(self) -> Window:
        """From when to when it is valid, in unix seconds, both inclusive."""
        ...

    @property
    def usable_until(self) -> int:
        """The end of the window, or of the grace after it."""
        ...


class Service(Hashable, Protocol):
    """An upstream service."""

    @property
    def url(self) -> str:
        """Its URL, which is its name."""
        ...


K = TypeVar("K", bound=Key)
V = TypeVar("V", bound=Held)
V_co = TypeVar("V_co", bound=Held, covariant=True)
S = TypeVar("S", bound=Service)
R_co = TypeVar("R_co", covariant=True)
"""The form in which collateral is kept for the next process."""


@frozen(kw_only=True)
class CachePolicy:
    """The limits of a cache, in seconds but for the last two.

    ``grace``: how long expired collateral is used while it cannot be fetched. ``refresh``: when cached collateral is
    fetched again, at the latest after three quarters of its remaining validity. ``unknown``: how long a key that no
    upstream knows is remembered. ``retry`` and ``retry_most``: the wait after the first failure, and the longest.
    ``wait``: how long one request waits for a fetch, which goes on after that. ``skew``: how far an upstream's clock
    may be ahead. ``fetches_per_minute`` rounds, so many ``families``, which are keys, remembered.
    """

    grace: int = 0
    refresh: int = 86400
    unknown: int = 600
    retry: int = 5
    retry_most: int = 60
    wait: float = 15.0
    skew: int = 5
    fetches_per_minute: int = 30
    families: int = 256


@frozen
class Use(Generic[V_co]):
    """Use this collateral."""

    collateral: V_co


@frozen
class Refresh(Generic[V_co]):
    """Use this collateral, and run a `fetch` in the background."""

    collateral: V_co


@frozen
class Fetch:
    """Run a `fetch` if none runs, wait ``wait`` seconds for its end, and ask `landed`."""

    wait: float


@frozen
class GiveUp:
    """Raise `CollateralUnavailable` with this reason."""

    reason: str


_OTHER_KEY = "the PCK CA has another key in it than in the platform's chain"

Decision: TypeAlias = Use[V] | Refresh[V] | Fetch | GiveUp


@frozen
class _Entry(Generic[V]):
    """The state of a key: its collateral, ``failures`` since the last success; it is not fetched before ``due``."""

    held: V | None = None
    due: int = 0
    failures: int = 0
    why: str = ""
    renewed_at: int = 0
    """When it was last fetched again because a platform had another key of the CA."""

    def usable(self, now: int) -> V | None:
        """The collateral, if it is valid at ``now`` or within its grace."""
        held = self.held
        return held if held is not None and held.window[0] <= now <= held.usable_until else None


@frozen
class _Health:
    """The health of an upstream: failures since the last answer, and until when it is left alone."""

    failures: int = 0
    rests_until: int = 0


class Cache(ABC, Generic[K, S, V, R_co]):
    """The collateral of keys, the health of the upstreams, and the decision what to do next.

    ``seed`` makes the jitter, from any bytes that other servers do not have.
    """

    def __init__(self, upstreams: Sequence[S], *, policy: CachePolicy, seed: bytes) -> None:
        if not upstreams or len(set(upstreams)) != len(upstreams):
            raise ConfigurationError("name at least one collateral service, and none twice")
        self.upstreams: tuple[S, ...] = tuple(upstreams)
        self.policy = policy
        self._seed = seed
        self._entries: dict[K, _Entry[V]] = {}
        self._health = {upstream: _Health() for upstream in self.upstreams}
        self._allowed = float(policy.fetches_per_minute)
        self._counted_at = 0

    # --- what kinds of collateral differ in ---

    @abstractmethod
    def obtain(self, upstream: S, key: K) -> Flow[tuple[V, R_co]]:
        """Ask an upstream, and verify its answer up to the root; whether it is valid now is checked by `fetch`.

        Raises `TransportError`, `UpstreamError`, and the errors of the verifiers.
        """

    @abstractmethod
    def replaces(self, held: V, fetched: V, now: int) -> bool:
        """Return whether fetched collateral replaces the cached one. Raises `UpstreamError` for one that is older."""

    # --- questions ---

    def decide(self, key: K, now: int, *, instead_of: V | None = None) -> Decision[V]:
        """Decide what to do for this key at ``now`` (unix seconds; `TypeError` unless an integer).

        ``instead_of`` is what the caller was given and cannot use, because its PCK CA has another key.
        """
        check_seconds("now", now)
        entry = self._touch(key)
        usable = entry.usable(now)
        if usable is not None and usable is instead_of:
            if _rests(entry.renewed_at + self.policy.unknown, now, self.policy.unknown):
                return GiveUp(f"no collateral for {key}: {_OTHER_KEY}")
            entry = evolve(entry, due=0, renewed_at=now)
            self._put(key, entry)
            usable = None
        hindrance = self._hindrance(entry, now)
        if usable is not None and (now <= usable.window[1] or hindrance or entry.failures):
            return Use(usable) if hindrance else Refresh(usable)
        return Fetch(self.policy.wait) if hindrance is None else GiveUp(f"no collateral for {key}: {hindrance}")

    def landed(self, key: K, now: int, *, instead_of: V | None = None) -> Use[V] | GiveUp:
        """Decide for a caller that has waited for a fetch; ``instead_of`` as for `decide`."""
        check_seconds("now", now)
        entry = self._touch(key)
        if (usable := entry.usable(now)) is not None:
            return GiveUp(f"no collateral for {key}: {_OTHER_KEY}") if usable is instead_of else Use(usable)
        why = entry.why or self._hindrance(entry, now) or "it is still being fetched"
        return GiveUp(f"no collateral for {key}: {why}")

    def knows(self, key: K) -> bool:
        """Return whether a key was fetched, restored or given up before, and not forgotten since."""
        return key in self._entries

    def trouble(self, key: K, now: int) -> str | None:
        """Return why nothing was fetched for a key since it was restored; None if something was."""
        entry = self._entries.get(key, _Entry[V]())
        return entry.why or (None if entry.due else self._hindrance(entry, now))

    def held(self) -> tuple[V, ...]:
        """All cached collateral, valid or not."""
        entries = list(self._entries.values())  # at once: another thread may ask while there are new ones
        return tuple(entry.held for entry in entries if entry.held is not None)

    # --- changes ---

    def restore(self, key: K, kept: V) -> None:
        """Take collateral that an earlier process kept; it is refreshed in the background at its first use."""
        self._put(key, evolve(self._entries.get(key, _Entry[V]()), held=kept, due=0))

    def begin(self, key: K, now: int) -> tuple[S, ...]:
        """Begin a fetch, and return the upstreams to ask, in order; none if no fetch is allowed now."""
        entry = self._entries.get(key, _Entry[V]())
        if self._hindrance(entry, now) is not None:
            return ()
        self._count(now)
        self._allowed -= 1
        return self._awake(now)

    def take(self, key: K, fetched: V, now: int) -> bool:
        """Keep fetched collateral, unless the cached one is as good. Returns whether it is kept.

        Raises `UpstreamError` for collateral that is older than the cached one, while that is valid.
        """
        entry = self._entries.get(key, _Entry[V]())
        if entry.held is not None and not self.replaces(entry.held, fetched, now):
            return False
        self._put(key, evolve(entry, held=fetched))
        return True

    def succeeded(self, key: K, upstream: S, now: int) -> None:
        """End a round: an upstream gave valid collateral."""
        self._health[upstream] = _Health()
        entry = self._entries.get(key, _Entry[V]())
        left = max(0, entry.held.window[1] - now) if entry.held is not None else 0
        wait = min(max(min(self.policy.refresh, left * 3 // 4), self.policy.retry_most), left + 1)
        self._put(key, evolve(entry, due=now + self._spread(wait, key, 0), failures=0, why=""))

    def failed(self, upstream: S, error: Exception, now: int) -> None:
        """Note the error of an upstream: a fault of the upstream, or about the key only."""
        if isinstance(error, TransportError):
            asked = 0
        elif isinstance(error, UpstreamError) and error.retry_after is not None:
            asked = error.retry_after
        else:
            self._health[upstream] = _Health()
            return
        failures = self._health[upstream].failures + 1
        rest = max(asked, self._backoff(failures, upstream.url))
        self._health[upstream] = _Health(failures, now + rest)

    def gave_up(self, key: K, why: str, now: int, *, unknown: bool) -> None:
        """End a round: no upstream gave valid collateral. ``unknown``: all of them say that there is none."""
        entry = self._entries.get(key, _Entry[V]())
        failures = entry.failures + 1
        wait = self._spread(self.policy.unknown, key, failures) if unknown else self._backoff(failures, key)
        self._put(key, evolve(entry, due=now + wait, failures=failures, why=why))

    # --- the parts ---

    def _hindrance(self, entry: _Entry[V], now: int) -> str | None:
        """The reason why a key must not be fetched now, or None."""
        if _rests(entry.due, now, max(self.policy.refresh, self.policy.unknown, self.policy.retry_most)):
            return entry.why or "it was fetched just now"
        if not self._awake(now):
            return entry.why or "all upstreams are left alone for a while after they failed"
        self._count(now)
        reserve = 0 if entry.held is not None else self.policy.fetches_per_minute // 2
        if self._allowed < 1 + reserve:
            return "there were too many fetches in the last minute"
        return None

    def _awake(self, now: int) -> tuple[S, ...]:
        longest = max(MAX_RETRY_AFTER, self.policy.retry_most)
        return tuple(u for u in self.upstreams if not _rests(self._health[u].rests_until, now, longest))

    def _count(self, now: int) -> None:
        """Refill the allowance, a minute's fetches per minute; a clock that steps back gives none."""
        most = self.policy.fetches_per_minute
        passed = max(0, now - self._counted_at)
        self._allowed = min(float(most), self._allowed + passed * most / 60)
        self._counted_at = now

    def _backoff(self, failures: int, what: object) -> int:
        wait = min(self.policy.retry * 2 ** min(failures - 1, 16), self.policy.retry_most)
        return self._spread(wait, what, failures)

    def _spread(self, wait: int, what: object, count: int) -> int:
        """Spread a wait by jitter: between three quarters of ``wait`` and the whole."""
        digest = sha256(self._seed + f"{what}, {count}".encode()).digest()
        share = int.from_bytes(digest[:4], "big") / 2**32
        return math.ceil(wait * (0.75 + share / 4))

    def _touch(self, key: K) -> _Entry[V]:
        """The state of a key, which becomes the one that is forgotten last."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return _Entry[V]()
        self._entries[key] = entry
        return entry

    def _put(self, key: K, entry: _Entry[V]) -> None:
        _ = self._entries.pop(key, None)
        self._entries[key] = entry
        if len(self._entries) > self.policy.families:
            useless = (other for other, known in self._entries.items() if known.held is None and other != key)
            del self._entries[next(useless, next(iter(self._entries)))]


def fetch(cache: Cache[K, S, V, R_co], key: K) -> Flow[R_co | None]:
    """Fetch collateral for a key: ask upstreams until one gives a valid one; the cache keeps the result.

    Returns collateral to keep for the next process, or None. Raises nothing.
    """
    now = yield from Now()
    kept: R_co | None = None
    problems: list[str] = []
    unknown = True
    upstreams = cache.begin(key, now)
    for upstream in upstreams:
        try:
            verified, raw = yield from cache.obtain(upstream, key)
            yield from _until_valid(cache.policy, verified)
            now = yield from Now()
            if cache.take(key, verified, now):
                kept = raw
            if verified.window[1] < now:
                raise UpstreamError(f"it expired at {rfc3339(verified.window[1])}")
        except Exception as exc:  # noqa: BLE001 - a defect of ours ends no round: the other upstreams are asked
            expected = isinstance(exc, TransportError | UpstreamError | QuoteError | GpuError)
            level, text = (Level.WARNING, str(exc)) if expected else (Level.ERROR, f"{type(exc).__name__}: {exc}")
            now = yield from Now()
            cache.failed(upstream, exc, now)
            unknown = unknown and isinstance(exc, UpstreamError) and exc.unknown
            problems.append(f"{upstream.url}: {text}")
            yield from _log(level, "collateral_upstream_failed", key, upstream=upstream.url, error=text)
        else:
            cache.succeeded(key, upstream, now)
            end = rfc3339(verified.window[1])
            yield from _log(Level.INFO, "collateral_fetched", key, upstream=upstream.url, valid_until=end)
            return kept
    if upstreams:
        cache.gave_up(key, "; ".join(problems), now, unknown=unknown)
    return kept


def clock() -> Flow[int]:
    """Read the clock for a caller of the cache."""
    return (yield from Now())


def settle(cache: Cache[K, S, V, R_co], key: K, instead_of: V | None = None) -> Flow[Use[V] | GiveUp]:
    """Decide for a caller that has waited for a fetch, at the present time; ``instead_of`` as for `decide`."""
    return cache.landed(key, (yield from Now()), instead_of=instead_of)


def _until_valid(policy: CachePolicy, verified: Held) -> Flow[None]:
    """Wait for collateral that an upstream whose clock is ahead has just made. Raises `UpstreamError`."""
    now = yield from Now()
    early = verified.window[0] - now
    if early > policy.skew:
        raise UpstreamError(f"it is valid from {rfc3339(verified.window[0])} only: check the clocks")
    if early > 0:
        yield from Sleep(early)
    if verified.usable_until < now:
        raise UpstreamError(f"it expired at {rfc3339(verified.window[1])}")


def _log(level: Level, event: str, key: Key, **fields: Value) -> Log:
    return Log(Record.of(level, event, **key.log_fields, **fields))


def _rests(until: int, now: int, longest: int) -> bool:
    """Whether a time is in the future; one further away than ``longest`` was set before the clock stepped back."""
    return now < until <= now + longest
