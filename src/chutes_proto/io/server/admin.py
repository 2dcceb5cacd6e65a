"""The admin listener of a server process: its pages, and the task that reads what they show.

Rules kept here:

* pages show the latest look, and how old it is: a look that hangs is itself a problem;
* the pages are those of one process; the store's numbers are the same from each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import anyio

from chutes_proto import __version__
from chutes_proto.errors import StoreError
from chutes_proto.io.background import keep_at
from chutes_proto.io.drivers.aio import Performer
from chutes_proto.io.finding import Finding
from chutes_proto.io.server.aio import Server
from chutes_proto.io.server.health import Counts, Health, read_counts, read_health
from chutes_proto.io.server.metrics import Metrics
from chutes_proto.io.server.overview import Overview, page
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.sockets import Listening
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.log import Record
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._admin import LOOPBACK, AdminApp, Page
from chutes_proto.server._app import App
from chutes_proto.wire import json

LOOK_SECONDS: Final = 5.0
"""The time between two looks at the checks."""

COUNT_SECONDS: Final = 60.0
"""The shortest time between two counts of rows; one that took long is followed by a pause of `COUNT_SHARE` times that.

A count reads whole tables."""

COUNT_SHARE: Final = 50

STALE_SECONDS: Final = 30.0
"""A look that is older is a problem of its own: the store hangs, for example."""

CONNECTIONS: Final = 64

MOST_ENDS: Final = 200
"""The most ends on the page, the first ones."""


class Admin:
    """The admin listener of one server process."""

    def __init__(
        self, running: Running, store: DurableStore, app: App, metrics: Metrics, log: Callable[[Record], None]
    ) -> None:
        self._running = running
        self._store = store
        self._app = app
        self._metrics = metrics
        self._log = log
        self._health: Health | None = None
        self._counts: Counts | None = None
        self._looked_at = time.monotonic()
        self._overview = Overview(store)
        self._open_connections: Callable[[], int] = lambda: 0
        self._began = int(time.time())

    async def serve(
        self, listening: Sequence[Listening], performer: Performer, open_connections: Callable[[], int]
    ) -> None:
        """Serve the pages until cancelled. Begins with a look, so that the first answer knows the state."""

        def look() -> None:
            self._metrics.look(
                self._running.setup.service, self._store, open_connections(), draining=self._app.draining
            )
            if self._running.scrubber is not None:
                self._metrics.scrubbed(self._running.scrubber.last)

        def metrics() -> Page:
            look()
            return Page(self._metrics.text(), self._metrics.content_type)

        self._open_connections = open_connections
        whole = page()
        pages = {
            "/": lambda: whole,
            "/state": self._state,
            "/livez": lambda: Page(b"ok\n"),
            "/readyz": self._readyz,
            "/metrics": metrics,
        }
        hosts = LOOPBACK | {host.lower() for host in self._running.setup.config.admin.hosts}
        async with anyio.create_task_group() as group:
            _ = group.start_soon(keep_at, partial(self._watch, look), self._log)
            _ = group.start_soon(keep_at, self._overview.watch, self._log)
            await Server(AdminApp(hosts, pages), performer, connections=CONNECTIONS).serve(listening)

    def _readyz(self) -> Page:
        members = self._readiness()
        return Page(json.encode(members), "application/json", 200 if members["ready"] else 503)

    def _readiness(self) -> dict[str, object]:
        findings = list(self._findings())
        checks = [
            {"check": each.what, "state": each.state, "reason": each.detail, "remedy": each.remedy} for each in findings
        ]
        return {"ready": all(finding.state != "problem" for finding in findings), "checks": checks}

    def _state(self) -> Page:
        """All that the page at ``/`` shows."""
        return self._overview.state(
            {
                **self._readiness(),
                "version": __version__,
                "ends": self._ends(),
                "servers": self._servers(),
                "facts": self._facts(),
            }
        )

    def _servers(self) -> list[dict[str, object]]:
        """This server and the others of its store, as it last saw them."""
        alike = self._running.setup.alike
        rows = [(alike.row(int(time.time())), True), *((each, False) for each in alike.others)]
        return [
            {
                "name": row.name,
                "version": row.version,
                "differs": alike.different_keys(row),
                "seen_at": row.seen_at,
                "is_this": is_this,
            }
            for row, is_this in rows
        ]

    def _ends(self) -> list[dict[str, object]]:
        """All that ends, with begin, end and state."""
        if (health := self._health) is None:
            return []
        return [
            {
                "what": each.kind.replace("_", " "),
                "name": each.name,
                "begin": each.begin,
                "end": each.end,
                "state": each.state(health.at),
            }
            for each in health.ends[:MOST_ENDS]
        ]

    def _facts(self) -> list[tuple[str, str | int]]:
        """Of the store, and of this process."""
        store, counts = self._store, self._counts
        found: list[tuple[str, str | int]] = [("store", store.name)]
        if counts is not None:
            found += [(f"keys, {state}", number) for state, number in counts.states.items()]
            found += [(f"passphrases under KEK {kek}", number) for kek, number in counts.sealed.items()]
            found.append(("newest audit row", counts.audit_position))
        found += [("note", note) for note in store.notes]
        return [
            *found,
            ("this process", str(os.getpid())),
            ("serves since", rfc3339(self._began)),
            ("open connections", self._open_connections()),
            ("open boots", len(self._running.setup.service.boots)),
        ]

    def _findings(self) -> list[Finding]:
        found = [] if self._health is None else list(self._health.findings)
        age = time.monotonic() - self._looked_at
        if self._health is None or age > STALE_SECONDS:
            found.append(Finding("problem", "checks", f"the last look began {age:.0f} s ago and has not ended"))
        if self._app.draining:
            found.append(Finding("problem", "server", "it was told to stop"))
        return found

    async def _watch(self, look: Callable[[], None]) -> None:
        count_at = 0.0
        while True:
            begun = time.monotonic()
            health = await anyio.to_thread.run_sync(
                read_health, self._running.setup, self._store, abandon_on_cancel=True
            )
            self._health, self._looked_at = health, begun
            self._metrics.show(health)
            look()  # another worker may be asked for the metrics of all
            if begun >= count_at:
                began = time.monotonic()
                await self._count()
                took = time.monotonic() - began
                count_at = began + max(COUNT_SECONDS, COUNT_SHARE * took)
            await anyio.sleep(LOOK_SECONDS)

    async def _count(self) -> None:
        try:
            self._counts = await anyio.to_thread.run_sync(read_counts, self._store, abandon_on_cancel=True)
            self._metrics.count(self._counts)
        except StoreError:
            return  # the checks tell it
