"""The work of a server beside its requests: it looks at the store all the time, and logs what it finds."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import anyio
from attrs import asdict

from chutes_proto._error import ChutesError
from chutes_proto.errors import StoreError
from chutes_proto.io.background import keep_at
from chutes_proto.io.server.checking import check_ends
from chutes_proto.io.server.ends import DAY
from chutes_proto.io.server.store_setup import erasures_file
from chutes_proto.io.stores.erasures import keep_erasures
from chutes_proto.log import Level, Record
from chutes_proto.server._alike import watch_servers
from chutes_proto.server._known import learn_vms
from chutes_proto.server._readiness import WATCH_SECONDS, watch_store
from chutes_proto.server._sweeping import sweep_nonces

if TYPE_CHECKING:
    from chutes_proto.io.drivers.aio import Performer
    from chutes_proto.io.finding import Finding
    from chutes_proto.io.server.reload import Running
    from chutes_proto.io.stores.address import DurableStore
    from chutes_proto.keys.vault import Vault


@asynccontextmanager
async def watching(
    running: Running,
    store: DurableStore,
    performer: Performer,
    log: Callable[[Record], None],
    worker: int | None = None,
) -> AsyncGenerator[None]:
    """Look at the store all the time, to know whether it can serve boots; log what is found; forget nonces."""
    setup = running.setup
    async with anyio.create_task_group() as background:
        service, run = setup.service, performer.run
        works: list[Callable[[], Awaitable[object]]] = [
            lambda: run(watch_store(service.readiness, service.revoked)),
            lambda: run(watch_servers(setup.alike, service.readiness)),
            lambda: run(sweep_nonces(service.readiness)),
            lambda: run(learn_vms(service.known)),
            partial(log_notes, store, log),
            partial(watch_erasures, running, store, log),
        ]
        if worker in (None, 0):  # one of all workers
            works.append(partial(log_ends, running, log))
        for work in works:
            _ = background.start_soon(keep_at, work, log)
        yield
        background.cancel_scope.cancel()


async def watch_erasures(running: Running, store: DurableStore, log: Callable[[Record], None]) -> None:
    """Note erasures and revocations in the file of this server, and repeat those that the store has lost.

    After a reload with another KEK, the file is written under that one, too.
    """

    def found() -> tuple[int, Vault]:
        service = running.setup.service
        return service.revoked.now.version, service.vault

    path, seen, failed = erasures_file(running.setup.config), found(), ""
    while path is not None:
        await anyio.sleep(WATCH_SECONDS)
        now = found()
        if now == seen:
            continue
        try:
            repeated = await anyio.to_thread.run_sync(keep_erasures, store, path, now[1], abandon_on_cancel=True)
            seen, failed = now, ""
        except StoreError as exc:
            if str(exc) != failed:  # it is tried again every second
                failed = str(exc)
                log(Record(Level.ERROR, "erasures_not_kept", {"error": failed}))
            continue
        if repeated:
            log(Record(Level.WARNING, "erasures_repeated", asdict(repeated)))


async def log_ends(running: Running, log: Callable[[Record], None]) -> None:
    """Log at the start and every day what ends soon, and what has ended."""

    def look() -> list[Finding]:
        return [*check_ends(running.setup, kept=False)]

    while True:
        found: list[Finding] = []
        with suppress(ChutesError, ValueError, OSError):  # a file is away: the checks tell it
            found = await anyio.to_thread.run_sync(look, abandon_on_cancel=True)
        for finding in found:
            if finding.state != "ok":
                log(Record(Level.WARNING, "expires", {"what": finding.what, "about": finding.detail}))
        await anyio.sleep(DAY)


async def log_notes(store: DurableStore, log: Callable[[Record], None]) -> None:
    """Log each note of the store that comes up after the start."""
    told = {*store.notes}
    while True:
        await anyio.sleep(WATCH_SECONDS)
        found = store.notes
        for note in found:
            if note not in told:
                log(Record(Level.WARNING, "warning", {"about": note}))
        told = {*found}
