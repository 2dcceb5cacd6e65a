"""`Get` with httpx, and `Send` on an event loop: conversion of requests, answers and errors.

Rules kept here, for both drivers:

* the one map from httpx's errors to `TransportError` is here;
* a request of `Send` goes to the one origin its sender was made for, over https; none follows a redirect;
* an answer is bounded in size; content codings are neither asked for nor undone, so it cannot swell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import httpx

from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import Headers, HttpResponse
from chutes_proto.wire.origin import Origin

_NOT_DELIVERED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


class HttpxGetter:
    """Performs `Get` with an `httpx.Client`, whose TLS context is the caller's choice.

    Without an event loop nothing can interrupt a read: the whole may take one ``read`` longer than ``total``, and the
    head of an answer that drips is only bounded in its size.
    """

    def __init__(self, client: httpx.Client, limits: TimeLimits = TimeLimits()) -> None:
        self._client = client
        self._limits = limits

    def __call__(self, url: str) -> HttpResponse:
        """Return the whole answer. Raises `TransportError`."""
        return whole_answer(self._client, prepare(self._client, self._limits, "GET", url), self._limits)


def whole_answer(
    client: httpx.Client,
    request: httpx.Request,
    limits: TimeLimits,
    begun: Callable[[httpx.Response], None] = lambda _: None,
) -> HttpResponse:
    """Return the whole answer; call ``begun`` before its body is read. Raises `TransportError`."""
    end = time.monotonic() + limits.total
    body = bytearray()
    with transport_errors():
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            begun(response)
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MAX_ANSWER or time.monotonic() > end:
                    raise limits.exceeded(body)
        finally:
            response.close()
    return received(response, body)


def origin(url: str) -> httpx.URL:
    """Return the origin of ``https://host[:port]``. Raises `LocalProtocolError` for anything else."""
    return httpx.URL(f"https://{Origin.parse(url).authority}")


def prepare(
    client: httpx.Client | httpx.AsyncClient,
    limits: TimeLimits,
    method: str,
    url: httpx.URL | str,
    *,
    headers: Headers = (),
    content: bytes | None = None,
    extensions: dict[str, str] | None = None,
) -> httpx.Request:
    """Return the request as httpx has it, for an answer without content coding."""
    return client.build_request(
        method,
        url,
        headers=[*headers, ("accept-encoding", "identity")],
        content=content,
        timeout=httpx.Timeout(limits.read, connect=limits.connect),
        extensions=extensions,
    )


def received(response: httpx.Response, body: bytearray) -> HttpResponse:
    """Return httpx's answer as a response of this project."""
    headers = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw)
    return HttpResponse(response.status_code, headers, bytes(body))


@contextmanager
def transport_errors() -> Generator[None]:
    """Turn the errors of httpx and of the operating system into `TransportError`."""
    try:
        yield
    except httpx.LocalProtocolError as exc:
        raise LocalProtocolError(f"HTTP/1.1 cannot carry the request: {exc}") from exc
    except _NOT_DELIVERED as exc:
        raise TransportError(_text(exc), maybe_delivered=False) from exc
    except (httpx.TransportError, OSError) as exc:
        raise TransportError(_text(exc), maybe_delivered=True) from exc


def _text(exc: Exception) -> str:
    """Return the text of the first error in the chain of causes that has one."""
    cause: BaseException | None = exc
    while cause is not None and not str(cause):
        cause = cause.__cause__ or cause.__context__
    return f"{type(exc).__name__}: {cause}" if cause is not None else type(exc).__name__
