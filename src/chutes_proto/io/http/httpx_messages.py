"""`Get` by httpx, and `Send` where there is an event loop: requests and answers as httpx has them, its errors as ours.

Rules kept here, for all three drivers:

* the one map from what httpx raises to `TransportError` is here;
* a request of `Send` goes to the one origin its sender was made for, over https; none follows a redirect;
* an answer is bounded in size; content codings are neither asked for nor undone, so it cannot swell.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

import httpx

from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import HttpRequest, HttpResponse
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
        """The whole answer. Raises `TransportError`."""
        return whole_answer(self._client, prepare_get(self._client, url, self._limits), self._limits)


def whole_answer(client: httpx.Client, request: httpx.Request, limits: TimeLimits) -> HttpResponse:
    """What ``client`` is answered. Raises `TransportError`."""
    end = time.monotonic() + limits.total
    body = bytearray()
    with transport_errors():
        response = client.send(request, stream=True, follow_redirects=False)
        try:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MAX_ANSWER or time.monotonic() > end:
                    raise limits.exceeded(body)
        finally:
            response.close()
    return received(response, body)


def origin(url: str) -> httpx.URL:
    """The origin of ``https://host`` or ``https://host:port``. Raises `LocalProtocolError` for anything else."""
    return httpx.URL(f"https://{Origin.parse(url).authority}")


def prepare(
    client: httpx.Client | httpx.AsyncClient, where: httpx.URL, request: HttpRequest, limits: TimeLimits
) -> httpx.Request:
    """The request as httpx has it: the target exactly as it stands, and no coding of the answer."""
    return client.build_request(
        request.method,
        where.copy_with(raw_path=request.target.encode("ascii")),
        headers=[*request.headers, ("accept-encoding", "identity")],
        content=request.body,
        timeout=httpx.Timeout(limits.read, connect=limits.connect),
    )


def prepare_get(client: httpx.Client | httpx.AsyncClient, url: str, limits: TimeLimits) -> httpx.Request:
    """The request of a `Get` as httpx has it."""
    timeout = httpx.Timeout(limits.read, connect=limits.connect)
    return client.build_request("GET", url, headers=[("accept-encoding", "identity")], timeout=timeout)


def received(response: httpx.Response, body: bytearray) -> HttpResponse:
    """The answer as ours."""
    headers = tuple((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.headers.raw)
    return HttpResponse(response.status_code, headers, bytes(body))


@contextmanager
def transport_errors() -> Generator[None]:
    """Turns what httpx and the operating system raise into `TransportError`."""
    try:
        yield
    except httpx.LocalProtocolError as exc:
        raise LocalProtocolError(f"not a request that HTTP/1.1 can carry: {exc}") from exc
    except _NOT_DELIVERED as exc:
        raise TransportError(_text(exc), maybe_delivered=False) from exc
    except (httpx.TransportError, OSError) as exc:
        raise TransportError(_text(exc), maybe_delivered=True) from exc


def _text(exc: Exception) -> str:
    """What happened, in the words of the first error on the way down that has any."""
    cause: BaseException | None = exc
    while cause is not None and not str(cause):
        cause = cause.__cause__ or cause.__context__
    return f"{type(exc).__name__}: {cause}" if cause is not None else type(exc).__name__
