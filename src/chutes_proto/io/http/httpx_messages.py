"""Requests with httpx, on an event loop: conversion of requests, answers and errors.

Rules kept here:

* the one map from httpx's errors to `TransportError` is here;
* a request of `Send` goes to the one origin its sender was made for, over https; none follows a redirect;
* an answer is bounded in size, with a `BoundedContext` also in the bytes before it, and in the pieces that it comes in,
  because each of them costs the loop some time;
* content codings are neither asked for nor undone, so that an answer cannot swell;
* a peer's cookies are not even read: no request of ours has one.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Final, cast

import anyio

from chutes_proto._lazy import LazyModule
from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.http.bounded import BoundedTls
from chutes_proto.io.http.https import TimeLimits, why_not
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import Headers, HttpResponse
from chutes_proto.wire.origin import Origin

if TYPE_CHECKING:
    import httpx
else:
    httpx = LazyModule("httpx")  # a server that asks nobody would spend a tenth of its start on it

MAX_PIECES: Final = 2048
"""Pieces of body that an answer may have: one of 1 MiB, 512 bytes at a time. A peer could send single bytes."""


def open_client(context: ssl.SSLContext) -> httpx.AsyncClient:
    """Return a client with the trust and the identity of ``context``. It takes no proxy from the environment."""
    from http.cookiejar import CookieJar  # as httpx, which loads it

    class NoCookies(CookieJar):
        def extract_cookies(self, response: object, request: object) -> None:
            del response, request

    return httpx.AsyncClient(verify=context, trust_env=False, cookies=NoCookies())


async def whole_answer(
    client: httpx.AsyncClient,
    request: httpx.Request,
    limits: TimeLimits,
    begun: Callable[[httpx.Response], None] = lambda _: None,
) -> HttpResponse:
    """Return the whole answer; call ``begun`` before its body is read, while its connection is open."""
    if client.is_closed:
        raise LocalProtocolError("the client is closed; make a request within its `async with` block")
    body, pieces = bytearray(), 0
    with anyio.move_on_after(limits.total) as scope, _transport_errors(request.url.netloc.decode("ascii"), limits):
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            begun(response)
            stream = response.extensions.get("network_stream")  # no transport for tests has one
            tls: ssl.SSLObject | None = stream and stream.get_extra_info("ssl_object")
            if isinstance(tls, BoundedTls):
                tls.begin_body()
            async for chunk in response.aiter_raw():
                body += chunk
                pieces += 1
                if len(body) > MAX_ANSWER or pieces > MAX_PIECES:
                    scope.cancel()  # unwinds httpx's generators from inside, which leaving the loop would not
            _check_end(response, tls)
            if isinstance(tls, BoundedTls):
                tls.begin_head()
        finally:
            await response.aclose()
        if len(body) <= MAX_ANSWER and pieces <= MAX_PIECES:
            headers = tuple(
                (name.decode("latin-1").lower(), text.decode("latin-1")) for name, text in response.headers.raw
            )
            return HttpResponse(response.status_code, headers, bytes(body))
    if pieces > MAX_PIECES:
        raise TransportError(f"the server's answer has more than {MAX_PIECES} pieces", maybe_delivered=True)
    raise limits.exceeded(body)


def _check_end(response: httpx.Response, tls: ssl.SSLObject | None) -> None:
    """Check that an answer which ends with its connection ends with an alert of TLS: httpcore does without.

    Raises `ssl.SSLError`.
    """
    is_framed = response.status_code in (204, 304) or not response.http_version.startswith("HTTP/1.")
    if is_framed or tls is None or response.headers.keys() & {"content-length", "transfer-encoding"}:
        return
    with suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
        _ = tls.read(1)


def origin(url: str) -> httpx.URL:
    """Return the origin of ``https://host[:port]``. Raises `LocalProtocolError` for anything else."""
    return httpx.URL(f"https://{Origin.parse(url).authority}")


def prepare(
    client: httpx.AsyncClient,
    limits: TimeLimits,
    method: str,
    url: httpx.URL | str,
    *,
    headers: Headers = (),
    content: bytes | None = None,
    extensions: dict[str, str] | None = None,
) -> httpx.Request:
    """Return the request as httpx has it, for an answer without content coding."""
    request = client.build_request(
        method,
        url,
        headers=[*headers, ("accept-encoding", "identity")],
        content=content,
        timeout=httpx.Timeout(limits.read, connect=limits.connect),
        extensions=extensions,
    )
    request.stream = _body_type()(request.content)
    return request


@cache
def _body_type() -> Callable[[bytes], httpx.AsyncByteStream]:
    """Return the type of a body in one piece.

    httpx's own is a generator, which httpcore leaves without an end where a request is cancelled; trio then warns.
    """

    class Body(httpx.AsyncByteStream):
        def __init__(self, body: bytes) -> None:
            self._body = body
            self._left: list[bytes] = []

        def __aiter__(self) -> AsyncIterator[bytes]:
            self._left = [self._body]
            return self

        async def __anext__(self) -> bytes:
            if not self._left:
                raise StopAsyncIteration
            return self._left.pop()

    return Body


@contextmanager
def _transport_errors(authority: str, limits: TimeLimits) -> Generator[None]:
    """Turn the errors of httpx and of the operating system into `TransportError`, in the words of `HttpsSender`."""
    try:
        yield
    except httpx.LocalProtocolError as exc:
        raise LocalProtocolError(f"HTTP/1.1 cannot carry the request: {exc}") from exc
    except (
        httpx.ConnectError,
        httpx.ConnectTimeout,
        httpx.PoolTimeout,
        httpx.ProxyError,
        httpx.UnsupportedProtocol,
    ) as exc:
        why = f"none within {limits.connect:g} s" if isinstance(exc, httpx.ConnectTimeout) else why_not(_root(exc))
        raise TransportError(f"no connection to {authority}: {why}", maybe_delivered=False) from exc
    except UnicodeError as exc:  # trio encodes a name before it asks for its addresses; no label is empty or long
        raise TransportError(f"no connection to {authority}: it is not a host name", maybe_delivered=False) from exc
    except httpx.TimeoutException as exc:
        raise TransportError(f"the server was silent for {limits.read:g} s", maybe_delivered=True) from exc
    except (httpx.TransportError, OSError) as exc:
        raise TransportError(f"the connection broke: {why_not(_root(exc))}", maybe_delivered=True) from exc


def _root(exc: Exception) -> BaseException:
    """Return the error of the operating system or of TLS that caused ``exc``, or else the first one with a text."""
    causes: list[BaseException] = [exc]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        if isinstance(cause, BaseExceptionGroup):  # one of each address; the last speaks for all, as without a loop
            cause = cast("BaseExceptionGroup[BaseException]", cause).exceptions[-1]
        causes.append(cause)
    named = (cause for cause in causes if isinstance(cause, OSError) and cause.strerror is not None)
    return next(named, next((cause for cause in causes if str(cause)), exc))
