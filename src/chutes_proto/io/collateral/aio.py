"""Collateral from services on the network, on an event loop: one fetch at a time for each family.

No rule is decided here: `CollateralCache` says when to use, to fetch and to give up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc

from chutes_proto.collateral.cache import Fetch, GiveUp, Refresh, clock, fetch, settle
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.of_quote import collateral_for
from chutes_proto.collateral.pcs import INTEL_PCS, Update, Upstream
from chutes_proto.effects import Log
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.gpu import GpuCollateral
from chutes_proto.io.collateral.upstream import FETCH_LIMITS, UpstreamCollateral
from chutes_proto.io.drivers.aio import HttpxGetter, Performer
from chutes_proto.io.drivers.sync import CollateralSource, log_record
from chutes_proto.io.http.httpx_messages import open_client
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.turns import open_turns
from chutes_proto.log import Level, Record
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._layout import BytesLike
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot


@asynccontextmanager
async def open_collateral(
    source: UpstreamCollateral, *, log: Callable[[Record], None] = log_record
) -> AsyncGenerator[CollateralFetcher]:
    """Open the fetcher of ``source``; its `fetch` is the ``fetch`` of a `Performer`.

    The collateral of an earlier process is available from the beginning; fetches that run at the end are cancelled.
    Raises `FileUnavailable` and `CollateralUnavailable` if the files of an earlier process cannot be read.
    """
    async with open_client(source.context) as client:
        performer = Performer(get=HttpxGetter(client, source.limits), log=log)
        for record in await anyio.to_thread.run_sync(source.restore, await performer.run(clock())):
            log(record)
        async with anyio.create_task_group() as group:
            yield CollateralFetcher(source, performer, group)
            group.cancel_scope.cancel()


@asynccontextmanager
async def open_performer(
    store: DurableStore,
    source: CollateralSource | UpstreamCollateral,
    *,
    gpus: Callable[[], GpuCollateral] | None = None,
    log: Callable[[Record], None] = log_record,
) -> AsyncGenerator[Performer]:
    """Open the performer of a key server's effects, with collateral from files or from the network."""
    async with open_turns(store) as turns:
        if isinstance(source, UpstreamCollateral):
            async with open_collateral(source, log=log) as fetcher:
                yield Performer(transact=turns.transact, fetch=fetcher.fetch, gpus=gpus, log=log)
        else:
            yield Performer(transact=turns.transact, collateral=source, gpus=gpus, log=log)


class CollateralFetcher:
    """Collateral from one source, fetched in ``group`` with ``performer``."""

    def __init__(self, source: UpstreamCollateral, performer: Performer, group: anyio.abc.TaskGroup) -> None:
        self._source = source
        self._performer = performer
        self._group = group
        self._fetches: dict[Family, anyio.Event] = {}

    async def fetch(
        self, identity: PckIdentity, now: int, instead_of: VerifiedCollateral | None = None
    ) -> VerifiedCollateral:
        """Return verified collateral for a platform whose PCK chain was checked. Raises `CollateralUnavailable`.

        ``instead_of`` is collateral under another key of the PCK CA than the platform's: it is fetched again. A caller
        that is cancelled does not end the fetch that others wait for.
        """
        family = Family.of(identity)
        decision = self._source.cache.decide(family, now, instead_of=instead_of)
        if isinstance(decision, Fetch):
            with anyio.move_on_after(decision.wait):
                await self._fetch_of(family).wait()
            decision = await self._performer.run(settle(self._source.cache, family, instead_of))
        if isinstance(decision, Refresh):
            _ = self._fetch_of(family)
        if isinstance(decision, GiveUp):
            raise CollateralUnavailable(decision.reason)
        return decision.collateral

    def _fetch_of(self, family: Family) -> anyio.Event:
        """Return the event at the end of the fetch for a family; begin a fetch if none runs."""
        ended = self._fetches.get(family)
        if ended is None:
            ended = self._fetches[family] = anyio.Event()
            _ = self._group.start_soon(self._fetch_once, family, ended)
        return ended

    async def _fetch_once(self, family: Family, ended: anyio.Event) -> None:
        """Fetch once. A defect ends this fetch and nothing else."""
        try:
            fetched = await self._performer.run(fetch(self._source.cache, family))
        except Exception as exc:  # noqa: BLE001 - the callers get an error, and the server goes on
            fetched = None
            fields = {"error": f"{type(exc).__name__}: {exc}"}
            _ = await self._performer.perform(Log(Record(Level.ERROR, "collateral_fetch_failed", fields)))
        finally:
            del self._fetches[family]
            ended.set()
        if fetched is not None:
            with anyio.CancelScope(shield=True):  # a server that stops now keeps its last fetch
                if record := await anyio.to_thread.run_sync(self._source.keep, family, fetched):
                    _ = await self._performer.perform(Log(record))


async def fetch_collateral(
    quote: BytesLike,
    services: Sequence[str] = (INTEL_PCS,),
    *,
    root: TrustedRoot = INTEL_ROOT,
    update: Update = "standard",
    ca_file: str | Path | None = None,
) -> Collateral:
    """Fetch collateral for a quote, as `chutes_proto.sync.fetch_collateral` does. Raises the same errors."""
    upstreams = [Upstream.parse(service) for service in services]
    async with open_client(context_trusting(ca_file)) as client:
        performer = Performer(get=HttpxGetter(client, FETCH_LIMITS), log=lambda _: None)
        return await performer.run(collateral_for(quote, upstreams, root=root, update=update))
