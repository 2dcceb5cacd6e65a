"""Collateral for a quote in one call, without an event loop and on one.

No rule is decided here: `collateral_for` is the flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chutes_proto.collateral.of_quote import collateral_for, upstreams_of
from chutes_proto.collateral.pcs import INTEL_PCS, Update
from chutes_proto.io.collateral.upstream import FETCH_LIMITS
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpGetter
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.quote._arguments import BytesLike
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot


def fetch_collateral(
    quote: BytesLike,
    services: Sequence[str] = (INTEL_PCS,),
    *,
    root: TrustedRoot = INTEL_ROOT,
    update: Update = "standard",
    ca_file: str | Path | None = None,
) -> Collateral:
    """Fetch collateral for a quote from the first of ``services`` that has some which verifies.

    ``services`` are URLs of Intel's PCS, which is the default, or of a PCCS. ``update`` "standard" is the TCB recovery
    in force, "early" the newest, a number the one with this TCB evaluation data number. ``ca_file`` has CAs to trust
    for TLS in place of the system's; https is required but for this machine. The quote is verified up to ``root`` as
    far as it can be without collateral, before anything else is fetched. If it names its PCK certificate without a
    chain, that is fetched first, so anyone's quote causes this one request, and is in the result.

    Raises `VerificationError` for the quote, `CollateralUnavailable` with the reason of each service, and
    `ConfigurationError` for a URL, a file or another ``update``.
    """
    upstreams = upstreams_of(services)
    performer = Performer(get=HttpGetter(context_trusting(ca_file), FETCH_LIMITS), log=lambda _: None)
    return performer.run(collateral_for(quote, upstreams, root=root, update=update))
