"""The cache of collateral for platforms.

Rules kept here:

* collateral is of the platform's family, and verifies up to the root;
* TCB info and QE identity are of one TCB recovery: an upstream with two is asked again later;
* valid collateral is never replaced by one with a lower TCB evaluation data number, CRL number or CRL date.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from chutes_proto.collateral.cache import Cache, CachePolicy
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.pcs import Update, Upstream, ask
from chutes_proto.errors import ConfigurationError, UpstreamError
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import authenticate_collateral

if TYPE_CHECKING:
    from chutes_proto.effects import Flow


class PlatformCache(Cache[Family, Upstream, VerifiedCollateral, Collateral]):
    """A `Cache` of the collateral of families, which is verified up to ``root``."""

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        *,
        root: TrustedRoot,
        policy: CachePolicy = CachePolicy(),
        update: Update = "standard",
        seed: bytes = b"",
    ) -> None:
        super().__init__(upstreams, policy=policy, seed=seed)
        if update not in ("standard", "early") and (type(update) is not int or update < 1):
            raise ConfigurationError(f'update: must be "standard", "early" or an evaluation number, not {update!r}')
        self.root = root
        self.update: Update = update

    def obtain(self, upstream: Upstream, key: Family) -> Flow[tuple[VerifiedCollateral, Collateral]]:
        """See `Cache.obtain`."""
        collateral = yield from ask(upstream, key, self.update)
        verified = authenticate_collateral(collateral, root=self.root, grace=self.policy.grace)
        if Family.of(verified) != key:
            raise UpstreamError(f"it is for {Family.of(verified)}")
        of_info, of_qe = verified.issue.tcb_info_number, verified.issue.qe_identity_number
        if of_info != of_qe:  # it published a TCB recovery between two answers, or one of its caches is old
            raise UpstreamError(f"its TCB info has TCB evaluation data number {of_info}, its QE identity {of_qe}")
        if self.update not in ("standard", "early", of_info):
            raise UpstreamError(f"its TCB evaluation data number is {of_info}, not {self.update}")
        return verified, collateral

    def replaces(self, held: VerifiedCollateral, fetched: VerifiedCollateral, now: int) -> bool:
        """See `Cache.replaces`."""
        if not held.window[0] <= now <= held.window[1]:
            return held.window[1] < fetched.window[1]
        same_ca = fetched.issuer_point == held.issuer_point
        numbers, before = _numbers(fetched, same_ca), _numbers(held, same_ca)
        if any(new < old for new, old in zip(numbers, before, strict=True)):
            raise UpstreamError("it is older than the cached collateral")
        return not same_ca or numbers != before or fetched.window[1] > held.window[1]


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
