"""The page of the admin listener: its file, and the state that it shows, which a thread reads while somebody looks.

Rules kept here:

* a request is answered with what was read before, at once;
* the page loads nothing and runs nothing but its own text: its Content-Security-Policy has the digests of its style and
  its script, and it may ask this listener alone;
* reading takes at most `READ_SECONDS` of every `PAUSE_SECONDS`, in short transactions.
"""

from __future__ import annotations

import hashlib
import re
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import anyio

from chutes_proto.errors import StoreError
from chutes_proto.server._admin import Page
from chutes_proto.server._overview import Fleet, Recent, fleet_members, recent_members, what_if_lines
from chutes_proto.store._rows import ReadWhatIf, WhatIf
from chutes_proto.store._run import Ask, Store
from chutes_proto.wire import json

READ_SECONDS: Final = 0.5
PAUSE_SECONDS: Final = 5.0
LOOK_SECONDS: Final = 60.0
"""How long after a request somebody still looks."""
COUNT_SECONDS: Final = 60
"""The time between two counts of the VMs."""

_FILE: Final = Path(__file__).with_name("page.html")


def page() -> Page:
    """The page itself, which asks for the state."""
    body = _FILE.read_bytes()
    style, script = (_digest(body, name) for name in ("style", "script"))
    policy = (
        f"default-src 'none'; style-src {style}; script-src {script}; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"
    )
    headers = (
        ("content-security-policy", policy),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    )
    return Page(body, "text/html; charset=utf-8", headers=headers)


def _digest(body: bytes, name: str) -> str:
    (text,) = re.findall(rb"<%s>(.*?)</%s>" % (name.encode(), name.encode()), body, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(text).digest()).decode()}'"


class Overview:
    """The part of the state that comes from the store's rows; read in a thread, by one call of `read` at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._recent = Recent()
        self._fleet = Fleet()
        self._what_if: WhatIf | None = None
        self._asked = anyio.Event()
        self._asked_at = -LOOK_SECONDS
        self._members: Mapping[str, object] = self._shown(0)

    def state(self, members: Mapping[str, object]) -> Page:
        """The state, with further ``members``; from now on somebody looks."""
        self._asked_at = time.monotonic()
        self._asked.set()
        now = int(time.time())
        return Page(json.encode({"now": now, **members, **self._members}), "application/json")

    async def watch(self) -> None:
        """Read while somebody looks, until cancelled."""
        while True:
            await self._asked.wait()
            if time.monotonic() - self._asked_at > LOOK_SECONDS:
                self._asked = anyio.Event()
                continue
            await anyio.to_thread.run_sync(self.read, abandon_on_cancel=True)
            await anyio.sleep(PAUSE_SECONDS)

    def read(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Read for `READ_SECONDS` at most, and a page of each at least."""
        end, now = clock() + READ_SECONDS, int(time.time())
        counted = self._fleet.counted
        parts: list[Recent | Fleet] = [self._recent]
        if counted is None or self._fleet.so_far is not None or now - counted.at >= COUNT_SECONDS:
            parts = [self._recent, self._fleet]
        try:
            self._what_if = self._store.transact(Ask(ReadWhatIf()))
            while parts:
                parts = [part for part in parts if part.read(self._store, now)]
                if clock() > end:
                    break
        except StoreError:
            pass  # the checks tell it, and the page what was read before
        self._members = self._shown(now)

    def _shown(self, now: int) -> Mapping[str, object]:
        return {
            "fleet": fleet_members(self._fleet),
            "recent": recent_members(self._recent, now),
            "what_if": what_if_lines(self._what_if),
        }
