"""Flows and effects: functions that ask for what they need from the outside world and never fetch it themselves.

A flow is a plain generator. ``reply = yield from Effect(...)`` asks for one of the closed list of effects below; all
the rest of a flow is arithmetic. `run` and `run_async` drive a flow with a ``perform`` that carries effects out.

Rules kept here:

* this is the only file of the pure part, next to ``store/_rows.py``, with a bare ``yield``;
* an effect is a frozen value: two equal effects ask for the same thing, so a playbook can compare them;
* whatever ``perform`` raises is thrown into the flow at the place that asked, so a flow handles faults like replies.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from attrs import frozen

from chutes_proto._lazy import LazyModule
from chutes_proto.log import Record
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse

if TYPE_CHECKING:
    from chutes_proto import gpu, quote, store
    from chutes_proto.luks import disk, plan
else:  # a client has no use for the modules of most effects; their types resolve all the same
    disk, plan = LazyModule("chutes_proto.luks.disk"), LazyModule("chutes_proto.luks.plan")
    quote, store = LazyModule("chutes_proto.quote"), LazyModule("chutes_proto.store")
    gpu = LazyModule("chutes_proto.gpu")

__all__ = ["Effect", "Flow", "run", "run_async"]
__all__ += ["ActOnDisk", "CollectGpuEvidence", "Entropy", "FetchCollateral", "FetchEvidence", "FetchGpuCollateral"]
__all__ += ["Get", "InspectDisk", "Log", "MakeQuote", "NextServer", "Now", "Post", "Resolve", "Send", "Sleep"]
__all__ += ["Transact", "Uptime"]
__all__ += ["Headers", "HttpRequest", "HttpResponse"]  # a driver reads the one and makes the other

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Effect(Generic[T_co]):
    """One thing that only the outside world can do; ``yield from`` it for the reply, which has the type ``T_co``."""

    __slots__ = ()

    def __iter__(self) -> Generator[Effect[Any], Any, T_co]:
        reply: T_co = yield self
        return reply


Flow: TypeAlias = Generator[Effect[Any], Any, T]
"""The type of a flow: it yields effects, is sent replies, and returns ``T``."""


@frozen
class Send(Effect[HttpResponse]):
    """Send one HTTP request to the server that the driver was made for, and reply with its whole answer.

    Over TLS that verifies the server and shows the client's certificate; no redirect is followed.
    Raises `TransportError` in the flow without an answer; never for a status.
    """

    request: HttpRequest


@frozen
class NextServer(Effect[str]):
    """Direct `Send` to the next of the servers that the driver was made for; the reply is its origin.

    The first follows the last. Only a driver for several servers carries it out.
    """


@frozen
class Get(Effect[HttpResponse]):
    """GET a URL of any service, following no redirect, and reply with the whole answer.

    Raises `TransportError` in the flow without an answer; never for a status.
    """

    url: str


@frozen
class Post(Effect[HttpResponse]):
    """POST bytes to a URL of any service; all else is as for `Get`."""

    url: str
    headers: Headers
    body: bytes


@frozen
class MakeQuote(Effect[bytes]):
    """Quote 64 bytes of report data on the platform; the reply is the quote. Raises `QuoteUnavailable`."""

    report_data: bytes


@frozen
class CollectGpuEvidence(Effect[bytes]):
    """Have the machine's GPUs make evidence over a nonce, 32 bytes; the reply is a tool's output.

    Raises `QuoteUnavailable`.
    """

    nonce: bytes


@frozen
class Sleep(Effect[None]):
    """Wait for this many seconds."""

    seconds: float


@frozen
class Now(Effect[int]):
    """Read the wall clock, in whole unix seconds."""


@frozen
class Uptime(Effect[float]):
    """Read a clock in seconds that never steps; only differences mean anything. `HttpRequest.arrived` is on it."""


@frozen
class Entropy(Effect[bytes]):
    """Draw ``size`` bytes from the operating system's random source. The reply is secret unless the flow reveals it."""

    size: int


@frozen
class FetchCollateral(Effect["quote.VerifiedCollateral"]):
    """Get verified collateral for the platform of a quote with a checked PCK chain. Raises `CollateralUnavailable`.

    ``instead_of`` is collateral that turned out to be of another key of the PCK CA: a source fetches it again, once.
    """

    identity: quote.PckIdentity
    now: int
    instead_of: quote.VerifiedCollateral | None = None


@frozen
class FetchGpuCollateral(Effect["gpu.GpuCollateral"]):
    """Get the RIMs and the OCSP answers that these devices are verified with, or those of them that there are.

    Raises `CollateralUnavailable`.
    """

    now: int
    devices: tuple[gpu.GenuineDevice, ...]


@frozen
class Resolve(Effect[tuple[str, ...]]):
    """Resolve a host name to all its IP addresses, none if it has none. Raises `TransportError` after 5 seconds."""

    name: str


@frozen
class FetchEvidence(Effect[tuple[HttpResponse, bytes]]):
    """GET ``target`` from a host's very ``address``, over TLS, and reply with the whole answer and its certificate.

    Nothing is resolved: ``host`` is only the name in SNI and Host. TLS shows that the peer holds the key of the
    certificate (DER); the flow decides whose it is. Follows no redirect, takes at most ``seconds``. Raises
    `TransportError` in the flow without an answer; never for a status.
    """

    address: str
    port: int
    host: str
    target: str
    headers: Headers
    seconds: float


@frozen
class Transact(Effect[T_co]):
    """Run one unit as one serializable transaction; the reply is the result of its script.

    It waits at most ``turn_seconds`` for its turn, and the flow is told within ``seconds``, all in all, even if the
    store is not done. A driver without an event loop has one caller, who waits as long as the store takes.

    An error of the script comes out unchanged after a roll-back. Raises `StoreError` when the store is at fault:
    `StoreBusy` if nothing was changed and trying again may help, `FateUnknown` if it may have been committed or not.
    """

    unit: store.Unit[T_co]
    turn_seconds: float = 3.0
    seconds: float = 4.5


@frozen
class InspectDisk(Effect["disk.Disk"]):
    """Classify a disk without writing. Raises `DiskError`; `HeaderRejected` for a LUKS header that is not allowed."""

    device: str


@frozen
class ActOnDisk(Effect[T_co]):
    """Carry out one action of a plan with the keys that it names; the reply is the action's ``T_co``.

    Raises `DiskError`; the content of the disk is then still there, and every key that opened it still does.
    """

    action: plan.Action[T_co]
    keys: plan.Keys


@frozen
class Log(Effect[None]):
    """Log a record for the operator; it never holds a secret."""

    record: Record


def substitute(flow: Flow[T], kind: type[Effect[Any]], by: Callable[[Any], Flow[Any]]) -> Flow[T]:
    """Run ``flow``, with the flow that ``by`` makes in place of each effect of this very ``kind``.

    All other effects are passed on.
    """
    try:
        effect = next(flow)
        while True:
            try:
                reply = (yield from by(effect)) if type(effect) is kind else (yield effect)
            except Exception as exc:
                effect = flow.throw(exc)
            else:
                effect = flow.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()


def run(flow: Flow[T], perform: Callable[[Effect[Any]], Any]) -> T:
    """Drive ``flow`` to its end with a synchronous ``perform``."""
    try:
        effect = next(flow)
        while True:
            try:
                reply = perform(effect)
            except Exception as exc:
                effect = flow.throw(exc)
            else:
                effect = flow.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()


async def run_async(
    flow: Flow[T],
    perform: Callable[[Effect[Any]], Awaitable[Any]],
    at_once: Mapping[type[Effect[Any]], Callable[[Any], Any]] = MappingProxyType({}),
) -> T:
    """Drive ``flow`` to its end with an asynchronous ``perform``, under any event loop.

    Effects of the types in ``at_once``, which wait for nothing, are performed by those functions.
    A cancellation comes out of ``perform``, passes by the flow's ``except Exception`` and closes the flow.
    """
    try:
        effect = next(flow)
        while True:
            try:
                work = at_once.get(type(effect))
                reply = await perform(effect) if work is None else work(effect)
            except Exception as exc:
                effect = flow.throw(exc)
            else:
                effect = flow.send(reply)
    except StopIteration as stop:
        result: T = stop.value
        return result
    finally:
        flow.close()
