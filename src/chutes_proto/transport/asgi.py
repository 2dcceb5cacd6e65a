"""An ASGI 3 application, for a key server behind a proxy that ends TLS, and to be mounted into another application.

Rules kept here:

* no event loop is named: its maker gives it a driver of flows, so it runs on its server's loop;
* the limits are those of `ServerConnection`, and the same application answers a request that breaks them. Only a peer
  that sends nothing at all is left to the ASGI server, because nothing wakes this end;
* an ASGI server shows no client certificate: one comes in a header of a trusted proxy, or not at all
  (``chutes_proto/server/_proxy.py``). A peer without an address is one of a unix socket; an ASGI server that rewrites
  addresses from headers (uvicorn, unless told ``--no-proxy-headers``) must not do so here;
* mounted under a path, that path is not seen by the application.

Source: the ASGI specification, version 3, and its HTTP and lifespan protocols.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote_from_bytes, unquote

from chutes_proto._error import ChutesError
from chutes_proto.effects import Flow, Uptime
from chutes_proto.errors import BadRequest, LocalProtocolError
from chutes_proto.transport.h1 import DEFAULT_LIMITS, Application, Limits, bad_request, peer_address
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoints import largest_body
from chutes_proto.wire.http import HttpRequest, MalformedRequest

T = TypeVar("T")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_UNKNOWN: Final = "0.0.0.0"  # noqa: S104 - the unspecified address: of a peer that is not on a unix socket


class Driver(Protocol):
    """A driver of flows: the `Performer` of a binding."""

    async def run(self, flow: Flow[T], /) -> T:
        """Drive ``flow`` to its end."""
        ...


class AsgiApp:
    """``application`` as an ASGI application.

    ``open_driver`` makes a context that is entered when the ASGI server starts and left when it ends. An application
    that mounts this one gets start and end in its place: it does ``async with`` this one.
    """

    def __init__(
        self,
        application: Application,
        open_driver: Callable[[], AbstractAsyncContextManager[Driver]],
        *,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._application = application
        self._open_driver = open_driver
        self._life = AsyncExitStack()
        self._opened: Driver | None = None
        self._limits = limits

    async def __aenter__(self) -> AsgiApp:
        self._opened = await self._life.enter_async_context(self._open_driver())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened = None
        _ = await self._life.__aexit__(kind, value, traceback)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI protocols ``http`` and ``lifespan``; others raise `LocalProtocolError`."""
        match scope["type"]:
            case "http":
                await self._serve(scope, receive, send)
            case "lifespan":
                await self._live(receive, send)
            case other:
                raise LocalProtocolError(f"the ASGI protocol {other!r} is not served; it is http or lifespan")

    async def _live(self, receive: Receive, send: Send) -> None:
        _ = await receive()
        async with AsyncExitStack() as life:
            try:
                _ = await life.enter_async_context(self)
            except ChutesError as exc:  # any other way, some servers would go on without the lifespan protocol
                await send({"type": "lifespan.startup.failed", "message": str(exc)})
                return
            await send({"type": "lifespan.startup.complete"})
            _ = await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self, flow: Flow[T]) -> T:
        if self._opened is None:
            raise LocalProtocolError(
                "the application was not started: run the ASGI server with the lifespan protocol, or enter the"
                " application by `async with` in the one that mounts it"
            )
        return await self._opened.run(flow)

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        request = await self._request(scope, receive)
        if request is None:
            return
        response = await self._run(self._application.handle(request))
        headers = [(name.encode("ascii"), value.encode("latin-1")) for name, value in response.headers]
        left_out = [b"date"]  # ASGI servers add their own
        if not scope.get("http_version", "1.1").startswith("1"):  # RFC 9113, section 8.2.2
            left_out.append(b"connection")
        headers = [(name, value) for name, value in headers if name not in left_out]
        headers.append((b"content-length", b"%d" % len(response.body)))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else response.body})
        self._application.sent(response)

    async def _request(self, scope: Message, receive: Receive) -> HttpRequest | MalformedRequest | None:
        """The whole request; None from a peer that went away."""
        peer = _peer(scope)
        arrived = await self._run(iter(Uptime()))
        try:
            target, headers = self._head(scope)
            body = bytearray()
            more = True
            while more:
                event = await receive()
                if event["type"] != "http.request":
                    return None
                body += event.get("body", b"")
                more = event.get("more_body", False)
                usual = self._limits.body_bytes
                if len(body) > usual and len(body) > largest_body(scope["method"], target, usual):
                    raise BadRequest(Code.BODY_TOO_LARGE, "Request body too large")
                if more and await self._run(iter(Uptime())) - arrived > self._limits.request_seconds:
                    raise BadRequest(Code.REQUEST_TIMEOUT, "Request timeout")
        except BadRequest as exc:
            return MalformedRequest(exc, peer)
        return HttpRequest(scope["method"], target, headers, bytes(body), peer_address=peer, arrived=arrived)

    def _head(self, scope: Message) -> tuple[str, tuple[tuple[str, str], ...]]:
        target = _target(scope)
        fields: Iterable[tuple[bytes, bytes]] = scope["headers"]
        headers = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in fields)
        if len(target) + sum(len(name) + len(value) + 4 for name, value in headers) > self._limits.head_bytes:
            raise BadRequest(Code.HEAD_TOO_LARGE, "Request head too large")
        if not target.startswith("/") or not target.isascii():
            raise bad_request("the request's target is not in origin form")
        return target, headers


def _target(scope: Message) -> str:
    """The request's target as it was sent, without the path of a mount."""
    raw: bytes = scope.get("raw_path") or quote_from_bytes(scope["path"].encode("utf-8", "surrogateescape")).encode()
    path = raw.partition(b"?")[0].decode("latin-1")
    root: str = scope.get("root_path", "").rstrip("/")
    segments = path.split("/")
    depth = root.count("/")
    if root and unquote("/".join(segments[: depth + 1])) == root:
        path = "/" + "/".join(segments[depth + 1 :])
    query: bytes = scope.get("query_string", b"")
    return f"{path}?{query.decode('latin-1')}" if query else path


def _peer(scope: Message) -> str:
    client = scope.get("client")
    return "" if client is None else peer_address((str(client[0]),)) or _UNKNOWN
