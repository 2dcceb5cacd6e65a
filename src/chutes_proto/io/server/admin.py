"""The admin listener of a server process: its pages, and the task that reads what they show.

Rules kept here:

* pages show the latest look, and how old it is: a look that hangs is itself a problem;
* the pages are those of one process; the store's numbers are the same from each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from chutes_proto.errors import StoreError
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.finding import Finding
from chutes_proto.io.server.aio import Server
from chutes_proto.io.server.health import Health, read_counts, read_health
from chutes_proto.io.server.metrics import Metrics
from chutes_proto.io.server.setup import ServerSetup
from chutes_proto.io.server.sockets import Listening
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.server._admin import LOOPBACK, AdminApp, Page
from chutes_proto.server._app import App
from chutes_proto.wire import json

LOOK_SECONDS: Final = 5.0
"""The time between two looks at the checks."""

COUNT_LOOKS: Final = 12
"""Rows are counted at every so many looks."""

STALE_SECONDS: Final = 30.0
"""A look that is older is a problem of its own: the store hangs, for example."""

CONNECTIONS: Final = 64


class Admin:
    """The admin listener of one server process."""

    def __init__(self, setup: ServerSetup, store: DurableStore, app: App, metrics: Metrics) -> None:
        self._setup = setup
        self._store = store
        self._app = app
        self._metrics = metrics
        self._health: Health | None = None
        self._looked_at = time.monotonic()

    async def serve(
        self, listening: Sequence[Listening], performer: Performer, open_connections: Callable[[], int]
    ) -> None:
        """Serve the pages until cancelled. Begins with a look, so that the first answer knows the state."""

        def look() -> None:
            self._metrics.look(self._setup.service, self._store, open_connections(), draining=self._app.draining)

        def metrics() -> Page:
            look()
            return Page(self._metrics.text(), self._metrics.content_type)

        pages = {"/livez": lambda: Page(b"ok\n"), "/readyz": self._readyz, "/metrics": metrics}
        hosts = LOOPBACK | {host.lower() for host in self._setup.config.admin.hosts}
        async with anyio.create_task_group() as group:
            _ = group.start_soon(self._watch, look)
            await Server(AdminApp(hosts, pages), performer, connections=CONNECTIONS).serve(listening)

    def _readyz(self) -> Page:
        findings = list(self._findings())
        is_ready = all(finding.state != "problem" for finding in findings)
        members = {
            "ready": is_ready,
            "checks": [
                {"check": each.what, "state": each.state, "reason": each.detail, "remedy": each.remedy}
                for each in findings
            ],
        }
        return Page(json.encode(members), "application/json", 200 if is_ready else 503)

    def _findings(self) -> list[Finding]:
        found = [] if self._health is None else list(self._health.findings)
        age = time.monotonic() - self._looked_at
        if self._health is None or age > STALE_SECONDS:
            found.append(Finding("problem", "checks", f"the last look began {age:.0f} s ago and has not ended"))
        if self._app.draining:
            found.append(Finding("problem", "server", "it was told to stop"))
        return found

    async def _watch(self, look: Callable[[], None]) -> None:
        looks = 0
        while True:
            begun = time.monotonic()
            health = await anyio.to_thread.run_sync(read_health, self._setup, self._store, abandon_on_cancel=True)
            self._health, self._looked_at = health, begun
            self._metrics.show(health)
            look()  # another worker may be asked for the metrics of all
            if looks % COUNT_LOOKS == 0:
                await self._count()
            looks += 1
            await anyio.sleep(LOOK_SECONDS)

    async def _count(self) -> None:
        try:
            self._metrics.count(await anyio.to_thread.run_sync(read_counts, self._store, abandon_on_cancel=True))
        except StoreError:
            return  # the checks tell it
