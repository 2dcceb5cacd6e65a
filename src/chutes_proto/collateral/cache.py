"""Cache of collateral from upstream services: when it is used, when and where it is fetched again, when given up.

    decision = cache.decide(family, now)         Use, Refresh (use, and fetch in the background), Fetch or GiveUp
    kept = yield from fetch(cache, family)       one round: upstreams in their order, until one has it

Rules kept here:

* the cache is asked only for a platform whose PCK chain was verified up to the root: only real platforms cause fetches;
* cached collateral is used until it expires, and is refreshed in the background long before; a failed fetch does not
  change it;
* expired collateral is used only while it cannot be fetched, and only within the operator's grace (none unless
  configured);
* valid collateral is never replaced by older: lower TCB evaluation data or CRL numbers;
* a platform whose PCK CA has a new key under the old name causes one fetch, and another only after ``unknown`` seconds;
* TCB info and QE identity are of one TCB recovery: an upstream with two is asked again later;
* upstreams are asked in their order. One that does not answer, or asks for it (429, 503, ``Retry-After``), is left
  alone for a while, longer each time; a family that no upstream knows is remembered as such. While none may be asked,
  every caller is refused at once;
* the families remembered and the fetches per minute are bounded, and half of the fetches are kept for families that
  were fetched before: new platforms cannot make known ones expire;
* waits are spread by jitter, so that several servers that lost the same upstream do not come back in step.

State changes in `CollateralCache` only. It has no lock: its driver calls it from one thread, and runs one `fetch` at a
time for each family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, TypeAlias

from attrs import evolve, frozen

from chutes_proto.collateral.library import Family
from chutes_proto.collateral.pcs import MAX_RETRY_AFTER, Update, Upstream, ask
from chutes_proto.effects import Log, Now, Sleep
from chutes_proto.errors import ConfigurationError, TransportError, UpstreamError
from chutes_proto.log import Level, Record
from chutes_proto.quote._errors import QuoteError
from chutes_proto.quote._terms import check_seconds, rfc3339
from chutes_proto.quote._verify import authenticate_collateral

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.log import Value
    from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
    from chutes_proto.quote._roots import TrustedRoot


@frozen(kw_only=True)
class CachePolicy:
    """The limits of a cache, in seconds but for the last two.

    ``grace``: how long expired collateral is used while it cannot be fetched. ``refresh``: when cached collateral is
    fetched again, at the latest after three quarters of its remaining validity. ``unknown``: how long a family that no
    upstream knows is remembered. ``retry`` and ``retry_most``: the wait after the first failure, and the longest.
    ``wait``: how long one request waits for a fetch, which goes on after that. ``skew``: how far an upstream's clock
    may be ahead. ``fetches_per_minute`` rounds, ``families`` remembered.
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
class Use:
    """Use this collateral."""

    collateral: VerifiedCollateral


@frozen
class Refresh:
    """Use this collateral, and run a `fetch` in the background."""

    collateral: VerifiedCollateral


@frozen
class Fetch:
    """Run a `fetch` if none runs, wait ``wait`` seconds for its end, and ask `landed`."""

    wait: float


@frozen
class GiveUp:
    """Raise `CollateralUnavailable` with this reason."""

    reason: str


_OTHER_KEY = "the PCK CA has another key in it than in the platform's chain"

Decision: TypeAlias = Use | Refresh | Fetch | GiveUp


@frozen
class _Entry:
    """The state of a family: its collateral, ``failures`` since the last success; it is not fetched before ``due``."""

    held: VerifiedCollateral | None = None
    due: int = 0
    failures: int = 0
    why: str = ""
    renewed_at: int = 0
    """When it was last fetched again because a platform had another key of the CA."""

    def usable(self, now: int) -> VerifiedCollateral | None:
        """The collateral, if it is valid at ``now`` or within its grace."""
        held = self.held
        return held if held is not None and held.window[0] <= now <= held.usable_until else None


@frozen
class _Health:
    """The health of an upstream: failures since the last answer, and until when it is left alone."""

    failures: int = 0
    rests_until: int = 0


class CollateralCache:
    """The collateral of families, the health of the upstreams, and the decision what to do next.

    Collateral is verified up to ``root``; ``seed`` makes the jitter, from any bytes that other servers do not have.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        *,
        root: TrustedRoot,
        policy: CachePolicy = CachePolicy(),
        update: Update = "standard",
        seed: bytes = b"",
    ) -> None:
        if not upstreams or len(set(upstreams)) != len(upstreams):
            raise ConfigurationError("name at least one collateral service, and none twice")
        self.upstreams: tuple[Upstream, ...] = tuple(upstreams)
        self.root = root
        self.policy = policy
        self.update: Update = update
        self._seed = seed
        self._entries: dict[Family, _Entry] = {}
        self._health = {upstream: _Health() for upstream in self.upstreams}
        self._allowed = float(policy.fetches_per_minute)
        self._counted_at = 0

    # --- questions ---

    def decide(self, family: Family, now: int, *, instead_of: VerifiedCollateral | None = None) -> Decision:
        """Decide what to do for a platform of this family at ``now`` (unix seconds; `TypeError` unless an integer).

        ``instead_of`` is what the caller was given and cannot use, because its PCK CA has another key.
        """
        check_seconds("now", now)
        entry = self._touch(family)
        usable = entry.usable(now)
        if usable is not None and usable is instead_of:
            if _rests(entry.renewed_at + self.policy.unknown, now, self.policy.unknown):
                return GiveUp(f"no collateral for {family}: {_OTHER_KEY}")
            entry = evolve(entry, due=0, renewed_at=now)
            self._put(family, entry)
            usable = None
        hindrance = self._hindrance(entry, now)
        if usable is not None and (now <= usable.window[1] or hindrance or entry.failures):
            return Use(usable) if hindrance else Refresh(usable)
        return Fetch(self.policy.wait) if hindrance is None else GiveUp(f"no collateral for {family}: {hindrance}")

    def landed(self, family: Family, now: int, *, instead_of: VerifiedCollateral | None = None) -> Use | GiveUp:
        """Decide for a caller that has waited for a fetch; ``instead_of`` as for `decide`."""
        check_seconds("now", now)
        entry = self._touch(family)
        if (usable := entry.usable(now)) is not None:
            return GiveUp(f"no collateral for {family}: {_OTHER_KEY}") if usable is instead_of else Use(usable)
        why = entry.why or self._hindrance(entry, now) or "it is still being fetched"
        return GiveUp(f"no collateral for {family}: {why}")

    def held(self) -> tuple[VerifiedCollateral, ...]:
        """All cached collateral, valid or not."""
        return tuple(entry.held for entry in self._entries.values() if entry.held is not None)

    # --- changes ---

    def restore(self, kept: VerifiedCollateral) -> None:
        """Take collateral that an earlier process kept; it is refreshed in the background at its first use."""
        family = Family.of(kept)
        self._put(family, evolve(self._entries.get(family, _Entry()), held=kept, due=0))

    def begin(self, family: Family, now: int) -> tuple[Upstream, ...]:
        """Begin a fetch, and return the upstreams to ask, in order; none if no fetch is allowed now."""
        entry = self._entries.get(family, _Entry())
        if self._hindrance(entry, now) is not None:
            return ()
        self._count(now)
        self._allowed -= 1
        return self._awake(now)

    def take(self, family: Family, fetched: VerifiedCollateral, now: int) -> bool:
        """Keep fetched collateral, unless the cached one is as good. Returns whether it is kept.

        Raises `UpstreamError` for collateral that is older than the cached one, while that is valid.
        """
        entry = self._entries.get(family, _Entry())
        held = entry.held
        if held is not None and held.window[0] <= now <= held.window[1]:
            same_ca = fetched.issuer_point == held.issuer_point
            numbers, before = _numbers(fetched, same_ca), _numbers(held, same_ca)
            if any(new < old for new, old in zip(numbers, before, strict=True)):
                raise UpstreamError("it is older than the cached collateral")
            if same_ca and numbers == before and fetched.window[1] <= held.window[1]:
                return False
        elif held is not None and held.window[1] >= fetched.window[1]:
            return False
        self._put(family, evolve(entry, held=fetched))
        return True

    def succeeded(self, family: Family, upstream: Upstream, now: int) -> None:
        """End a round: an upstream gave valid collateral."""
        self._health[upstream] = _Health()
        entry = self._entries.get(family, _Entry())
        left = max(0, entry.held.window[1] - now) if entry.held is not None else 0
        wait = min(max(min(self.policy.refresh, left * 3 // 4), self.policy.retry_most), left + 1)
        self._put(family, evolve(entry, due=now + self._spread(wait, family, 0), failures=0, why=""))

    def failed(self, upstream: Upstream, error: Exception, now: int) -> None:
        """Note the error of an upstream: a fault of the upstream, or about the family only."""
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

    def gave_up(self, family: Family, why: str, now: int, *, unknown: bool) -> None:
        """End a round: no upstream gave valid collateral. ``unknown``: all of them say that there is none."""
        entry = self._entries.get(family, _Entry())
        failures = entry.failures + 1
        wait = self._spread(self.policy.unknown, family, failures) if unknown else self._backoff(failures, family)
        self._put(family, evolve(entry, due=now + wait, failures=failures, why=why))

    # --- the parts ---

    def _hindrance(self, entry: _Entry, now: int) -> str | None:
        """The reason why a family must not be fetched now, or None."""
        if _rests(entry.due, now, max(self.policy.refresh, self.policy.unknown, self.policy.retry_most)):
            return entry.why or "it was fetched just now"
        if not self._awake(now):
            return entry.why or "all upstreams are left alone for a while after they failed"
        self._count(now)
        reserve = 0 if entry.held is not None else self.policy.fetches_per_minute // 2
        if self._allowed < 1 + reserve:
            return "there were too many fetches in the last minute"
        return None

    def _awake(self, now: int) -> tuple[Upstream, ...]:
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

    def _touch(self, family: Family) -> _Entry:
        """The state of a family, which becomes the one that is forgotten last."""
        entry = self._entries.pop(family, None)
        if entry is None:
            return _Entry()
        self._entries[family] = entry
        return entry

    def _put(self, family: Family, entry: _Entry) -> None:
        _ = self._entries.pop(family, None)
        self._entries[family] = entry
        if len(self._entries) > self.policy.families:
            useless = (other for other, known in self._entries.items() if known.held is None and other != family)
            del self._entries[next(useless, next(iter(self._entries)))]


def fetch(cache: CollateralCache, family: Family) -> Flow[Collateral | None]:
    """Fetch collateral for a family: ask upstreams until one gives a valid one; the cache keeps the result.

    Returns collateral to keep for the next process, or None. Raises nothing.
    """
    now = yield from Now()
    kept: Collateral | None = None
    problems: list[str] = []
    unknown = True
    upstreams = cache.begin(family, now)
    for upstream in upstreams:
        try:
            collateral = yield from ask(upstream, family, cache.update)
            verified = yield from _verified(cache, family, collateral)
            now = yield from Now()
            if cache.take(family, verified, now):
                kept = collateral
            if verified.window[1] < now:
                raise UpstreamError(f"it expired at {rfc3339(verified.window[1])}")
        except Exception as exc:  # noqa: BLE001 - a defect of ours ends no round: the other upstreams are asked
            expected = isinstance(exc, TransportError | UpstreamError | QuoteError)
            level, text = (Level.WARNING, str(exc)) if expected else (Level.ERROR, f"{type(exc).__name__}: {exc}")
            now = yield from Now()
            cache.failed(upstream, exc, now)
            unknown = unknown and isinstance(exc, UpstreamError) and exc.unknown
            problems.append(f"{upstream.url}: {text}")
            yield from _log(level, "collateral_upstream_failed", family, upstream=upstream.url, error=text)
        else:
            cache.succeeded(family, upstream, now)
            end = rfc3339(verified.window[1])
            yield from _log(Level.INFO, "collateral_fetched", family, upstream=upstream.url, valid_until=end)
            return kept
    if upstreams:
        cache.gave_up(family, "; ".join(problems), now, unknown=unknown)
    return kept


def clock() -> Flow[int]:
    """Read the clock for a caller of the cache."""
    return (yield from Now())


def settle(cache: CollateralCache, family: Family, instead_of: VerifiedCollateral | None = None) -> Flow[Use | GiveUp]:
    """Decide for a caller that has waited for a fetch, at the present time; ``instead_of`` as for `decide`."""
    return cache.landed(family, (yield from Now()), instead_of=instead_of)


def _verified(cache: CollateralCache, family: Family, collateral: Collateral) -> Flow[VerifiedCollateral]:
    """Verify an upstream's collateral: of the root, of this family, of one TCB recovery, and already valid.

    Raises `UpstreamError` and `QuoteError`.
    """
    verified = authenticate_collateral(collateral, root=cache.root, grace=cache.policy.grace)
    if Family.of(verified) != family:
        raise UpstreamError(f"it is for {Family.of(verified)}")
    of_info, of_qe = verified.issue.tcb_info_number, verified.issue.qe_identity_number
    if of_info != of_qe:  # it published a TCB recovery between two answers, or one of its caches is old
        raise UpstreamError(f"its TCB info has TCB evaluation data number {of_info}, its QE identity {of_qe}")
    now = yield from Now()
    early = verified.window[0] - now
    if early > cache.policy.skew:
        raise UpstreamError(f"it is valid from {rfc3339(verified.window[0])} only: check the clocks")
    if early > 0:
        yield from Sleep(early)
    if verified.usable_until < now:
        raise UpstreamError(f"it expired at {rfc3339(verified.window[1])}")
    return verified


def _log(level: Level, event: str, family: Family, **fields: Value) -> Log:
    return Log(Record.of(level, event, fmspc=family.fmspc.hex(), ca=family.ca, tee=family.tee, **fields))


def _numbers(collateral: VerifiedCollateral, same_ca: bool) -> tuple[int, ...]:
    """The numbers that must never decrease: those of the PCK CRL, as long as it is of the same CA.

    CRLs count by date as well: Intel's all have the number 1.
    """
    issue = collateral.issue
    return (
        issue.tcb_info_number,
        issue.qe_identity_number,
        issue.root_crl_number,
        issue.root_crl_issued,
        *((issue.pck_crl_number, issue.pck_crl_issued) if same_ca else ()),
    )


def _rests(until: int, now: int, longest: int) -> bool:
    """Whether a time is in the future; one further away than ``longest`` was set before the clock stepped back."""
    return now < until <= now + longest
