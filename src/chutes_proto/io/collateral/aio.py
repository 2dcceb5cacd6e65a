"""Collateral from services on the network, on an event loop: one fetch at a time for each key.

No rule is decided here: `Cache` says when to use, to fetch and to give up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic

import anyio
import anyio.abc

from chutes_proto.collateral.cache import Cache, Fetch, GiveUp, K, R_co, Refresh, S, V, clock, fetch, settle
from chutes_proto.collateral.gpus import GpuService, HeldRim, HeldStatus, RimKey, StatusKey, rim_keys, status_keys
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.of_quote import collateral_for, upstreams_of
from chutes_proto.collateral.pcs import INTEL_PCS, Update
from chutes_proto.effects import Log
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.gpu import GenuineDevice, GpuCollateral, Revocation, Rims
from chutes_proto.io.background import keep_at
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory
from chutes_proto.io.collateral.gpu_services import GpuServices
from chutes_proto.io.collateral.upstream import FETCH_LIMITS, UpstreamCollateral
from chutes_proto.io.drivers.aio import HttpxGetter, Performer
from chutes_proto.io.drivers.sync import CollateralSource, log_record
from chutes_proto.io.http.bounded import BoundedContext
from chutes_proto.io.http.httpx_messages import open_client
from chutes_proto.io.http.tls import context_trusting
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.turns import open_turns
from chutes_proto.log import Level, Record
from chutes_proto.quote._arguments import BytesLike
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
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
async def open_gpu_collateral(
    source: GpuServices, *, log: Callable[[Record], None] = log_record
) -> AsyncGenerator[GpuFetcher]:
    """Open the fetcher of ``source``; its `fetch` is the ``fetch_gpus`` of a `Performer`."""
    async with open_client(source.context) as client:
        performer = Performer(get=HttpxGetter(client, source.limits), log=log)
        async with anyio.create_task_group() as group:
            _ = group.start_soon(keep_at, partial(_prune, source, performer), log)
            yield GpuFetcher(source, performer, group)
            group.cancel_scope.cancel()


async def _prune(source: GpuServices, performer: Performer) -> None:
    """Remove the files of pieces that have ended, now and once a day."""
    while True:
        if record := await anyio.to_thread.run_sync(source.prune, await performer.run(clock())):
            _ = await performer.perform(Log(record))
        await anyio.sleep(86_400)


@asynccontextmanager
async def open_performer(
    store: DurableStore,
    source: CollateralSource | UpstreamCollateral,
    *,
    gpus: GpuCollateralDirectory | GpuServices | None = None,
    log: Callable[[Record], None] = log_record,
) -> AsyncGenerator[Performer]:
    """Open the performer of a key server's effects, with collateral from files or from the network."""
    async with AsyncExitStack() as opened:
        turns = await opened.enter_async_context(open_turns(store))
        parts: dict[str, Any] = {"transact": turns.transact}
        if isinstance(source, UpstreamCollateral):
            parts["fetch"] = (await opened.enter_async_context(open_collateral(source, log=log))).fetch
        else:
            parts["collateral"] = source
        if isinstance(gpus, GpuServices):
            parts["fetch_gpus"] = (await opened.enter_async_context(open_gpu_collateral(gpus, log=log))).fetch
        elif gpus is not None:
            parts["gpus"] = gpus.fetch
        yield Performer(**parts, log=log)


class Fetcher(Generic[K, S, V, R_co]):
    """A cache and its fetches, run in ``group`` with ``performer``: one fetch at a time for each key.

    ``keep`` writes what was fetched for a later process, and ``load`` reads what an earlier one kept, when a key is
    first asked for; both may block, and return the log record of a fault.
    """

    def __init__(
        self,
        cache: Cache[K, S, V, R_co],
        keep: Callable[[K, R_co], Record | None],
        performer: Performer,
        group: anyio.abc.TaskGroup,
        load: Callable[[K], V | Record | None] | None = None,
    ) -> None:
        self._cache = cache
        self._keep = keep
        self._load = load
        self._performer = performer
        self._group = group
        self._fetches: dict[K, anyio.Event] = {}

    async def fetch(self, key: K, now: int, instead_of: V | None = None) -> V:
        """Return verified collateral. Raises `CollateralUnavailable`.

        ``instead_of`` is as for `Cache.decide`. A caller that is cancelled does not end the fetch that others wait for.
        """
        if self._load is not None and not self._cache.knows(key):
            await self._restore(key, self._load)
        decision = self._cache.decide(key, now, instead_of=instead_of)
        if isinstance(decision, Fetch):
            with anyio.move_on_after(decision.wait):
                await self._fetch_of(key).wait()
            decision = await self._performer.run(settle(self._cache, key, instead_of))
        if isinstance(decision, Refresh):
            _ = self._fetch_of(key)
        if isinstance(decision, GiveUp):
            raise CollateralUnavailable(decision.reason)
        return decision.collateral

    async def _restore(self, key: K, load: Callable[[K], V | Record | None]) -> None:
        kept = await anyio.to_thread.run_sync(load, key)
        if isinstance(kept, Record):
            _ = await self._performer.perform(Log(kept))
        elif kept is not None and not self._cache.knows(key):
            self._cache.restore(key, kept)

    def _fetch_of(self, key: K) -> anyio.Event:
        """Return the event at the end of the fetch for a key; begin a fetch if none runs."""
        ended = self._fetches.get(key)
        if ended is None:
            ended = self._fetches[key] = anyio.Event()
            _ = self._group.start_soon(self._fetch_once, key, ended)
        return ended

    async def _fetch_once(self, key: K, ended: anyio.Event) -> None:
        """Fetch once. A defect ends this fetch and nothing else."""
        try:
            try:
                fetched = await self._performer.run(fetch(self._cache, key))
            finally:
                del self._fetches[key]
                ended.set()
            if fetched is not None:
                with anyio.CancelScope(shield=True):  # a server that stops now keeps its last fetch
                    if record := await anyio.to_thread.run_sync(self._keep, key, fetched):
                        _ = await self._performer.perform(Log(record))
        except Exception as exc:  # noqa: BLE001 - the callers get an error, and the server goes on
            fields = {"error": f"{type(exc).__name__}: {exc}"}
            _ = await self._performer.perform(Log(Record(Level.ERROR, "collateral_fetch_failed", fields)))


class CollateralFetcher:
    """Collateral from one source, fetched in ``group`` with ``performer``."""

    def __init__(self, source: UpstreamCollateral, performer: Performer, group: anyio.abc.TaskGroup) -> None:
        self._families = Fetcher(source.cache, source.keep, performer, group)

    async def fetch(
        self, identity: PckIdentity, now: int, instead_of: VerifiedCollateral | None = None
    ) -> VerifiedCollateral:
        """Return verified collateral for a platform whose PCK chain was checked. Raises `CollateralUnavailable`.

        ``instead_of`` is collateral under another key of the PCK CA than the platform's: it is fetched again.
        """
        return await self._families.fetch(Family.of(identity), now, instead_of)


class GpuFetcher:
    """RIMs and OCSP answers from services, fetched in ``group`` with ``performer``."""

    def __init__(self, source: GpuServices, performer: Performer, group: anyio.abc.TaskGroup) -> None:
        self._source = source
        self._performer = performer
        self._rims: Fetcher[RimKey, GpuService, HeldRim, bytes] | None = None
        self._status: Fetcher[StatusKey, GpuService, HeldStatus, bytes] | None = None
        if (rims := source.rims) is not None:
            self._rims = Fetcher(rims, source.keep, performer, group, lambda key: source.load(key, rims.read))
        if (status := source.status) is not None:
            self._status = Fetcher(status, source.keep, performer, group, lambda key: source.load(key, status.read))

    async def fetch(self, devices: Sequence[GenuineDevice], now: int) -> GpuCollateral:
        """Return all that there is for these devices; what cannot be fetched is left out, and told in the log.

        Raises `CollateralUnavailable` if the files beside the services cannot be read.
        """
        files = await anyio.to_thread.run_sync(self._source.files)
        rims: list[HeldRim] = [] if self._rims is None else await self._all(self._rims, rim_keys(devices), now)
        found = Rims.of([*files.rims.rims, *(held.rim for held in rims)])
        keys = status_keys(devices, found.fitting(devices))
        status: list[HeldStatus] = [] if self._status is None else await self._all(self._status, keys, now)
        known = Revocation.of(held.data for held in status)
        both = Revocation((*files.revocation.answers, *known.answers), files.revocation.crls)
        return GpuCollateral(found, both)

    async def _all(self, fetcher: Fetcher[K, S, V, R_co], keys: Sequence[K], now: int) -> list[V]:
        """Fetch all keys at once; those that fail are left out."""
        found: dict[K, V] = {}

        async def one(key: K) -> None:
            with suppress(CollateralUnavailable):
                found[key] = await fetcher.fetch(key, now)

        async with anyio.create_task_group() as group:
            for key in keys:
                _ = group.start_soon(one, key)
        return [found[key] for key in keys if key in found]


async def fetch_collateral(
    quote: BytesLike,
    services: Sequence[str] = (INTEL_PCS,),
    *,
    root: TrustedRoot = INTEL_ROOT,
    update: Update = "standard",
    ca_file: str | Path | None = None,
) -> Collateral:
    """Fetch collateral for a quote, as `chutes_proto.sync.fetch_collateral` does. Raises the same errors."""
    upstreams = upstreams_of(services)
    async with open_client(context_trusting(ca_file, kind=BoundedContext)) as client:
        performer = Performer(get=HttpxGetter(client, FETCH_LIMITS), log=lambda _: None)
        return await performer.run(collateral_for(quote, upstreams, root=root, update=update))
