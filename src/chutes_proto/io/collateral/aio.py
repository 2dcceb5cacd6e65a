"""Collateral from services on the network, on an event loop: one fetch at a time for each family.

No rule is decided here: `CollateralCache` says when to use, to fetch and to give up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from chutes_proto.collateral.cache import Fetch, GiveUp, Refresh, clock, fetch, settle
from chutes_proto.collateral.library import Family
from chutes_proto.effects import Log
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.drivers.aio import HttpxGetter, Performer
from chutes_proto.io.drivers.sync import CollateralSource, log_record
from chutes_proto.log import Level, Record
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.store._run import Store


@asynccontextmanager
async def open_collateral(
    source: UpstreamCollateral, *, log: Callable[[Record], None] = log_record
) -> AsyncGenerator[CollateralFetcher]:
    """What performs `FetchCollateral` from ``source``: give its `fetch` to a `Performer`.

    What an earlier process kept is at hand from the beginning; fetches that still fly at the end are cancelled. Raises
    `FileUnavailable` and `CollateralUnavailable` where what was kept cannot be read.
    """
    async with source.client() as client:
        performer = Performer(get=HttpxGetter(client, source.limits), log=log)
        for record in await anyio.to_thread.run_sync(source.restore, await performer.run(clock())):
            log(record)
        async with anyio.create_task_group() as group:
            yield CollateralFetcher(source, performer, group)
            group.cancel_scope.cancel()


@asynccontextmanager
async def open_performer(
    store: Store, source: CollateralSource | UpstreamCollateral, *, log: Callable[[Record], None] = log_record
) -> AsyncGenerator[Performer]:
    """What carries out a key server's effects, whether its collateral comes from files or from the network."""
    if isinstance(source, UpstreamCollateral):
        async with open_collateral(source, log=log) as fetcher:
            yield Performer(store=store, fetch=fetcher.fetch, log=log)
    else:
        yield Performer(store=store, collateral=source, log=log)


class CollateralFetcher:
    """Collateral from one source, fetched in ``group`` with ``performer``."""

    def __init__(self, source: UpstreamCollateral, performer: Performer, group: anyio.abc.TaskGroup) -> None:
        self._source = source
        self._performer = performer
        self._group = group
        self._flights: dict[Family, anyio.Event] = {}

    async def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """Verified collateral for a platform whose PCK chain was checked. Raises `CollateralUnavailable`.

        Who is cancelled while waiting does not end the fetch that others wait for.
        """
        family = Family.of(identity)
        decision = self._source.cache.decide(family, now)
        if isinstance(decision, Fetch):
            with anyio.move_on_after(decision.wait):
                await self._flight(family).wait()
            decision = await self._performer.run(settle(self._source.cache, family))
        if isinstance(decision, Refresh):
            _ = self._flight(family)
        if isinstance(decision, GiveUp):
            raise CollateralUnavailable(decision.reason)
        return decision.collateral

    def _flight(self, family: Family) -> anyio.Event:
        """The end of the fetch that flies for a family; begins one where there is none."""
        landed = self._flights.get(family)
        if landed is None:
            landed = self._flights[family] = anyio.Event()
            _ = self._group.start_soon(self._fly, family, landed)
        return landed

    async def _fly(self, family: Family, landed: anyio.Event) -> None:
        """One fetch. A defect in it ends it and nothing else."""
        try:
            fetched = await self._performer.run(fetch(self._source.cache, family))
        except Exception as exc:  # noqa: BLE001 - whoever waits is told that there is none, and the server goes on
            fetched = None
            fields = {"error": f"{type(exc).__name__}: {exc}"}
            _ = await self._performer.perform(Log(Record(Level.ERROR, "collateral_fetch_failed", fields)))
        finally:
            del self._flights[family]
            landed.set()
        if fetched is not None:
            with anyio.CancelScope(shield=True):  # a server that stops now would have fetched in vain
                if record := await anyio.to_thread.run_sync(self._source.keep, family, fetched):
                    _ = await self._performer.perform(Log(record))
