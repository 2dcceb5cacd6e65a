"""The asynchronous driver, on trio and asyncio: carries out the effects of a flow; blocking work runs in threads.

No rule is decided here. A cancellation waits for a transaction or an action on a disk that has begun, and for nothing
else.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import httpx

from chutes_proto.effects import (
    ActOnDisk,
    Effect,
    Entropy,
    FetchCollateral,
    FetchEvidence,
    Flow,
    Get,
    InspectDisk,
    Log,
    MakeQuote,
    Now,
    Resolve,
    Send,
    Sleep,
    Transact,
    Uptime,
    run_async,
)
from chutes_proto.io.drivers.sync import (
    RESOLVE_SECONDS,
    RESOLVERS,
    CollateralSource,
    DiskWorker,
    Missing,
    Transactor,
    careful,
    log_record,
    resolve,
    unknown,
    unresolved,
)
from chutes_proto.io.http.evidence import any_certificate, evidence_limits, evidence_request, peer_certificate
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import origin, prepare, prepare_get, received, transport_errors
from chutes_proto.io.quoters.choose import Quoter, take_quote
from chutes_proto.log import Record
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.transport.client import MAX_ANSWER
from chutes_proto.wire.http import HttpRequest, HttpResponse

T = TypeVar("T")


def open_client(context: ssl.SSLContext) -> httpx.AsyncClient:
    """A client that verifies and presents what ``context`` says, and uses no proxy that the environment names."""
    return httpx.AsyncClient(verify=context, trust_env=False)


class HttpxSender:
    """Performs `Send` with an `httpx.AsyncClient`, whose TLS context is the caller's choice.

    ``url`` is the server's origin, ``https://host:port``.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, limits: TimeLimits = TimeLimits()) -> None:
        self._client = client
        self._origin = origin(url)
        self._limits = limits

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """The whole answer. Raises `TransportError`."""
        return await _answer(self._client, prepare(self._client, self._origin, request, self._limits), self._limits)


class HttpxGetter:
    """Performs `Get` with an `httpx.AsyncClient`, whose TLS context is the caller's choice."""

    def __init__(self, client: httpx.AsyncClient, limits: TimeLimits = TimeLimits()) -> None:
        self._client = client
        self._limits = limits

    async def __call__(self, url: str) -> HttpResponse:
        """The whole answer. Raises `TransportError`."""
        return await _answer(self._client, prepare_get(self._client, url, self._limits), self._limits)


async def _fetch_evidence(asked: FetchEvidence) -> tuple[HttpResponse, bytes]:
    limits, certificates = evidence_limits(asked), list[bytes]()
    async with httpx.AsyncClient(verify=any_certificate(), trust_env=False) as client:
        client.event_hooks = {"response": [_keep_certificate(certificates)]}
        answer = await _answer(client, evidence_request(client, asked, limits), limits)
    return answer, certificates[0]


def _keep_certificate(certificates: list[bytes]) -> Callable[[httpx.Response], Awaitable[None]]:
    async def keep(response: httpx.Response) -> None:
        certificates.append(peer_certificate(response))

    return keep


async def _answer(client: httpx.AsyncClient, request: httpx.Request, limits: TimeLimits) -> HttpResponse:
    body = bytearray()
    with anyio.move_on_after(limits.total) as scope, transport_errors():
        response = await client.send(request, stream=True, follow_redirects=False)
        try:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_ANSWER:
                    scope.cancel()  # unwinds httpx's generators from inside, which leaving the loop would not
        finally:
            await response.aclose()
        if len(body) <= MAX_ANSWER:
            return received(response, body)
    raise limits.exceeded(body)


class Performer:
    """Carries out effects with the parts that it is given; quoter, store and collateral source may block.

    ``fetch`` is for a source of collateral that does not, in place of ``collateral``.
    """

    def __init__(
        self,
        *,
        send: Callable[[HttpRequest], Awaitable[HttpResponse]] | None = None,
        get: Callable[[str], Awaitable[HttpResponse]] | None = None,
        quoter: Quoter | None = None,
        store: Transactor | None = None,
        collateral: CollateralSource | None = None,
        fetch: Callable[[PckIdentity, int], Awaitable[VerifiedCollateral]] | None = None,
        disks: DiskWorker | None = None,
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self._send = send or Missing("send")
        self._get = get or Missing("get")
        self._quoter = quoter or Missing("quoter")
        self._store = store or Missing("store")
        self._collateral = collateral or Missing("collateral")
        self._fetch = fetch or self._fetch_in_thread
        self._disks = disks or Missing("disks")
        self._log = careful(log)
        self._resolvers = anyio.CapacityLimiter(RESOLVERS)

    async def run(self, flow: Flow[T]) -> T:
        """Drive ``flow`` to its end."""
        return await run_async(flow, self.perform)

    async def perform(self, effect: Effect[Any]) -> object:
        """Carry out one effect; the reply is as the effect's documentation says."""
        match effect:
            case Send(request):
                return await self._send(request)
            case MakeQuote(report_data):
                return await anyio.to_thread.run_sync(take_quote, self._quoter, report_data, abandon_on_cancel=True)
            case Sleep(seconds):
                await anyio.sleep(seconds)
            case Now():
                return int(time.time())
            case Uptime():
                return anyio.current_time()
            case Entropy(size):
                return os.urandom(size)
            case Get(url):
                return await self._get(url)
            case FetchCollateral(identity, now):
                return await self._fetch(identity, now)
            case Resolve(name):
                return await self._resolve_in_thread(name)
            case FetchEvidence():
                return await _fetch_evidence(effect)
            case Transact(unit):
                return await anyio.to_thread.run_sync(self._store.transact, unit)
            case InspectDisk(device):
                return await anyio.to_thread.run_sync(self._disks.inspect, device)
            case ActOnDisk(action, keys):
                return await anyio.to_thread.run_sync(self._disks.act, action, keys)
            case Log(record):
                self._log(record)
            case _:
                raise unknown(effect)
        return None

    async def _fetch_in_thread(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        at_hand = self._collateral.at_hand(identity, now)
        if at_hand is not None:
            return at_hand
        return await anyio.to_thread.run_sync(self._collateral.fetch, identity, now, abandon_on_cancel=True)

    async def _resolve_in_thread(self, name: str) -> tuple[str, ...]:
        with anyio.move_on_after(RESOLVE_SECONDS):
            return await anyio.to_thread.run_sync(resolve, name, abandon_on_cancel=True, limiter=self._resolvers)
        raise unresolved(name)
