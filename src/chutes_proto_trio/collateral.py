"""Collateral from services on the network, on trio: it moves bytes, and one fetch flies at a time for each family.

Nothing is decided here: `CollateralCache` says when to use, to fetch and to give up.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import trio

from chutes_proto.collateral.cache import Fetch, GiveUp, Refresh, clock, fetch, settle
from chutes_proto.collateral.library import Family
from chutes_proto.effects import Log
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.drivers.sync import CollateralSource, log_record
from chutes_proto.log import Level, Record
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.store._run import Store
from chutes_proto_trio.perform import HttpxGetter, Performer


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
        for record in await trio.to_thread.run_sync(source.restore, await performer.run(clock())):
            log(record)
        async with trio.open_nursery() as nursery:
            yield CollateralFetcher(source, performer, nursery)
            nursery.cancel_scope.cancel()


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
    """Collateral from one source, fetched in ``nursery`` with ``performer``."""

    def __init__(self, source: UpstreamCollateral, performer: Performer, nursery: trio.Nursery) -> None:
        self._source = source
        self._performer = performer
        self._nursery = nursery
        self._flights: dict[Family, trio.Event] = {}

    async def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """Verified collateral for a platform whose PCK chain was checked. Raises `CollateralUnavailable`.

        Who is cancelled while waiting does not end the fetch that others wait for.
        """
        family = Family.of(identity)
        decision = self._source.cache.decide(family, now)
        if isinstance(decision, Fetch):
            with trio.move_on_after(decision.wait):
                await self._flight(family).wait()
            decision = await self._performer.run(settle(self._source.cache, family))
        if isinstance(decision, Refresh):
            _ = self._flight(family)
        if isinstance(decision, GiveUp):
            raise CollateralUnavailable(decision.reason)
        return decision.collateral

    def _flight(self, family: Family) -> trio.Event:
        """The end of the fetch that flies for a family; begins one where there is none."""
        landed = self._flights.get(family)
        if landed is None:
            landed = self._flights[family] = trio.Event()
            self._nursery.start_soon(self._fly, family, landed)
        return landed

    async def _fly(self, family: Family, landed: trio.Event) -> None:
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
            with trio.CancelScope(shield=True):  # a server that stops now would have fetched in vain
                if record := await trio.to_thread.run_sync(self._source.keep, family, fetched):
                    _ = await self._performer.perform(Log(record))
