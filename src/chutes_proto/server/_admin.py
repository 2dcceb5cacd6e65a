"""The application of the admin listener: pages for the operator and for programs that watch the server, read only.

Rules kept here:

* a page is ready when it is asked for: what it shows was read before, so a store that hangs delays no answer;
* a request that names a foreign host is refused: a browser on the operator's machine may be lured to this address by
  the name of another site, which could then read the answers (DNS rebinding);
* no page shows a secret.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from attrs import define, frozen

from chutes_proto.effects import Flow, Log
from chutes_proto.log import Level, Record
from chutes_proto.wire import json
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse, MalformedRequest

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""The names under which a client on the same machine asks."""

_ALWAYS: Final = (("cache-control", "no-store"), ("x-content-type-options", "nosniff"))


@frozen
class Page:
    """The answer of a page now."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Headers = ()


@define
class AdminApp:
    """Serves ``pages``, by path, to requests whose Host is one of ``hosts``, on any port."""

    hosts: frozenset[str]
    pages: Mapping[str, Callable[[], Page]]
    _end: float = math.inf

    def handle(self, request: HttpRequest | MalformedRequest) -> Flow[HttpResponse]:
        """The answer to ``request``."""
        yield from ()
        page = self._page(request)
        headers = (("content-type", page.content_type), *page.headers, *_ALWAYS)
        return HttpResponse(page.status, headers, page.body)

    def stop(self, now: float, *, handed_over: bool = False) -> float:
        """End at once: the listener goes with the server that it belongs to."""
        self._end = now
        return now

    def ends_at(self, now: float) -> float:
        """The time of `stop`, infinity before it."""
        return self._end

    def sent(self, response: HttpResponse) -> None:
        """Nothing depends on it."""

    def complain(self, event: str, error: Exception) -> Flow[None]:
        """Log a fault of a connection."""
        fields = {"error": f"{type(error).__name__}: {error}", "listener": "admin"}
        yield from Log(Record(Level.ERROR, event, fields))

    def _page(self, request: HttpRequest | MalformedRequest) -> Page:
        if isinstance(request, MalformedRequest):
            return _error(request.refusal.status, "Bad Request")
        host = "".join(request.header_values("host")[:1]).lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if name not in self.hosts:
            return _error(421, "Host is not a name of this listener; add it to admin.hosts")
        make = self.pages.get(request.target.partition("?")[0])
        if make is None:
            return _error(404, f"Not Found; there are {', '.join(self.pages)}")
        if request.method not in ("GET", "HEAD"):
            return _error(405, "Method Not Allowed", ("allow", "GET, HEAD"))
        return make()


def _error(status: int, detail: str, *headers: tuple[str, str]) -> Page:
    return Page(json.encode({"detail": detail}), "application/json", status, headers)
