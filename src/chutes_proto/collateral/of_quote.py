"""Fetch the collateral for one quote: for a verifier that has no cache of its own.

    collateral = run(collateral_for(quote, upstreams))            every effect is a request, or the clock

Rules kept here:

* only a quote that its platform made causes requests for collateral, by the rules of ``cache.py``: upstreams in their
  order, until one has collateral that verifies;
* a quote without a PCK chain causes one request before, for the chain, which must verify and be the one it names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from attrs import evolve

from chutes_proto.collateral.cache import GiveUp, fetch, settle
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.pcs import Update, Upstream, ask_pck_chain
from chutes_proto.collateral.platforms import PlatformCache
from chutes_proto.effects import Now
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, TransportError, UpstreamError
from chutes_proto.quote import _layout as layout
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._verify import check_signed, open_quote

if TYPE_CHECKING:
    from chutes_proto.effects import Flow
    from chutes_proto.quote._arguments import BytesLike
    from chutes_proto.quote._collateral import Collateral
    from chutes_proto.quote._layout import Quote


def upstreams_of(services: Sequence[str]) -> list[Upstream]:
    """Read the URLs of services. Raises `ConfigurationError`, and `TypeError` for what are none."""
    if isinstance(services, str):  # to a type checker it is a sequence of texts, too
        raise ConfigurationError(f"services: must be a list of URLs, as in [{services!r}]")
    if not _are_texts(services):
        raise TypeError("services: must be a list of URLs, each a str")
    return [Upstream.parse(service) for service in services]


def _are_texts(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, str) for one in cast("Sequence[object]", value))


def collateral_for(
    quote: BytesLike, upstreams: Sequence[Upstream], *, root: TrustedRoot = INTEL_ROOT, update: Update = "standard"
) -> Flow[Collateral]:
    """Fetch collateral that verifies now for a quote, which is verified as far as it can be without it.

    The result has the quote's PCK chain beside it if the quote has none. Raises `VerificationError` for the quote, and
    `CollateralUnavailable` with the reason of each upstream.
    """
    parsed = layout.parse_quote(quote, sgx=True)
    chain = None
    if parsed.certification_type in (*layout.PPIDS, layout.CERTIFICATION_PCK):
        chain = yield from _pck_chain(parsed, upstreams)
    opened = open_quote(quote, now=(yield from Now()), root=root, sgx=True, pck_certificate_chain=chain)
    _ = check_signed(opened)
    family = Family.of(opened.pck)
    cache = PlatformCache(upstreams, root=root, update=update)
    fetched = yield from fetch(cache, family)
    outcome = yield from settle(cache, family)
    if isinstance(outcome, GiveUp) or fetched is None:
        raise CollateralUnavailable(outcome.reason if isinstance(outcome, GiveUp) else "nothing was fetched")
    return evolve(fetched, pck_certificate_chain=chain)


def _pck_chain(quote: Quote, upstreams: Sequence[Upstream]) -> Flow[bytes]:
    problems: list[str] = []
    for upstream in upstreams:
        try:
            return (yield from ask_pck_chain(upstream, quote))
        except (TransportError, UpstreamError) as exc:
            problems.append(f"{upstream.url}: {exc}")
    raise CollateralUnavailable(f"no PCK chain of the quote: {'; '.join(problems)}")
