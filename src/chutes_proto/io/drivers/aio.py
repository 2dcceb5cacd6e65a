"""The asynchronous driver, on trio and asyncio: performs the effects of a flow; blocking work runs in threads.

No rule is decided here. A cancellation waits for a transaction or an action on a disk that has begun, and for nothing
else.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from chutes_proto import effects
from chutes_proto._lazy import LazyModule
from chutes_proto.effects import Effect, Flow
from chutes_proto.gpu import GenuineDevice, GpuCollateral
from chutes_proto.io.drivers import sync
from chutes_proto.io.drivers.sync import CollateralSource, DiskWorker, Missing, log_record, unknown
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import origin, prepare, whole_answer
from chutes_proto.io.quoters.choose import GpuTool, Quoter
from chutes_proto.log import Record
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.store._run import Store
from chutes_proto.wire.http import TRACEPARENT, Headers, HttpRequest, HttpResponse

if TYPE_CHECKING:
    import httpx
else:
    httpx = LazyModule("httpx")

T = TypeVar("T")


class HttpxSender:
    """Performs `Send` with an `httpx.AsyncClient`, whose TLS context is the caller's choice.

    ``url`` is the server's origin, ``https://host:port``. Raises `LocalProtocolError` for anything else.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, limits: TimeLimits = TimeLimits()) -> None:
        self._client = client
        self._origin = origin(url)
        self._limits = limits

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        """Return the whole answer. Raises `TransportError`."""
        url = self._origin.copy_with(raw_path=request.target.encode("ascii"))  # the target exactly as it is
        message = prepare(
            self._client, self._limits, request.method, url, headers=request.headers, content=request.body
        )
        return await whole_answer(self._client, message, self._limits)


class HttpxGetter:
    """Performs `Get` and `Post` with an `httpx.AsyncClient`, whose TLS context is the caller's choice."""

    def __init__(self, client: httpx.AsyncClient, limits: TimeLimits = TimeLimits()) -> None:
        self._client = client
        self._limits = limits

    async def __call__(self, url: str, headers: Headers = (), body: bytes | None = None) -> HttpResponse:
        """Return the whole answer. Raises `TransportError`."""
        method = "GET" if body is None else "POST"
        if traceparent := TRACEPARENT.get():
            headers = (*headers, ("traceparent", traceparent))
        message = prepare(self._client, self._limits, method, url, headers=headers, content=body)
        return await whole_answer(self._client, message, self._limits)


class Performer:
    """Performs effects with the parts that it is given, on trio or asyncio.

    Parts are as for `chutes_proto.sync.Performer`; quoter, tool, store, collateral source and disks may block, they run
    in threads. ``send`` and ``get`` are asynchronous: `HttpxSender`, for example. ``fetch`` is an asynchronous source
    of collateral, in place of ``collateral``, and ``fetch_gpus`` one in place of ``gpus``. ``transact`` performs
    `Transact` in place of ``store``, which is called at once and waited for as long as it takes.
    """

    def __init__(
        self,
        *,
        send: Callable[[HttpRequest], Awaitable[HttpResponse]] | None = None,
        get: Callable[..., Awaitable[HttpResponse]] | None = None,
        quoter: Quoter | None = None,
        gpu_tool: GpuTool | None = None,
        store: Store | None = None,
        collateral: CollateralSource | None = None,
        fetch: Callable[[PckIdentity, int, VerifiedCollateral | None], Awaitable[VerifiedCollateral]] | None = None,
        transact: Callable[[effects.Transact[Any]], Awaitable[object]] | None = None,
        disks: DiskWorker | None = None,
        gpus: Callable[[], GpuCollateral] | None = None,
        fetch_gpus: Callable[[Sequence[GenuineDevice], int], Awaitable[GpuCollateral]] | None = None,
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self._send = send or Missing("send")
        self._get = get or Missing("get")
        self._collateral = collateral or Missing("collateral")
        self._fetch = fetch or self._fetch_in_thread
        self._fetch_gpus = fetch_gpus
        self._transact = transact or self._perform_in_thread
        self._blocking = sync.Performer(quoter=quoter, gpu_tool=gpu_tool, store=store, disks=disks, gpus=gpus)
        self._at_once = sync.at_once(log, anyio.current_time)
        self._resolvers = anyio.CapacityLimiter(sync.RESOLVERS)

    async def run(self, flow: Flow[T]) -> T:
        """Drive ``flow`` to its end; return what it returns, raise what it raises."""
        return await effects.run_async(flow, self.perform, self._at_once)

    async def perform(self, effect: Effect[Any]) -> object:
        """Perform one effect; return the reply that the effect documents.

        Raises `LocalProtocolError` for an effect that needs a part that this driver does not have.
        """
        work = self._at_once.get(type(effect))
        if work is not None:
            return work(effect)
        match effect:
            case effects.Transact():
                return await self._transact(effect)
            case effects.Send(request):
                return await self._send(request)
            case effects.Get(url):
                return await self._get(url)
            case effects.Post(url, headers, body):
                return await self._get(url, headers, body)
            case effects.Sleep(seconds):
                await anyio.sleep(seconds)
                return None
            case effects.FetchCollateral(identity, now, instead_of):
                return await self._fetch(identity, now, instead_of)
            case effects.Resolve(name):
                return await self._resolve_in_thread(name)
            case effects.FetchEvidence():
                from chutes_proto.io.http.evidence import fetch_evidence  # only this needs httpx

                return await fetch_evidence(effect)
            case effects.FetchGpuCollateral(now, devices) if self._fetch_gpus is not None:
                return await self._fetch_gpus(devices, now)
            case effects.MakeQuote() | effects.CollectGpuEvidence() | effects.FetchGpuCollateral():
                return await anyio.to_thread.run_sync(self._blocking.perform, effect, abandon_on_cancel=True)
            case effects.InspectDisk() | effects.ActOnDisk():
                return await self._perform_in_thread(effect)
            case _:
                raise unknown(effect)

    async def _perform_in_thread(self, effect: Effect[Any]) -> object:
        return await anyio.to_thread.run_sync(self._blocking.perform, effect)

    async def _fetch_in_thread(
        self, identity: PckIdentity, now: int, _: VerifiedCollateral | None
    ) -> VerifiedCollateral:
        if (available := self._collateral.available(identity, now)) is not None:
            return available
        return await anyio.to_thread.run_sync(self._collateral.fetch, identity, now, abandon_on_cancel=True)

    async def _resolve_in_thread(self, name: str) -> tuple[str, ...]:
        with anyio.move_on_after(sync.RESOLVE_SECONDS):
            return await anyio.to_thread.run_sync(sync.resolve, name, abandon_on_cancel=True, limiter=self._resolvers)
        raise sync.unresolved(name)
