"""The driver without an event loop: it performs the effects of a flow, one after the other, in this thread.

Rules kept here:

* the list of effects is closed; one that is not in it, or whose part this driver was not given, is a
  `LocalProtocolError`;
* a flow sees only errors of this project: each part translates those of its libraries.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

from chutes_proto import effects
from chutes_proto._lazy import LazyModule
from chutes_proto.effects import Effect, Flow
from chutes_proto.errors import LocalProtocolError, TransportError
from chutes_proto.io.quoters.choose import GpuTool, Quoter, take_gpu_evidence, take_quote
from chutes_proto.log import Record
from chutes_proto.wire.http import HttpRequest, HttpResponse

if TYPE_CHECKING:
    from chutes_proto import gpu, store
    from chutes_proto.quote._collateral import VerifiedCollateral
    from chutes_proto.quote._pck import PckIdentity
else:  # an agent loads no store; the type resolves all the same
    store, gpu = LazyModule("chutes_proto.store"), LazyModule("chutes_proto.gpu")

T = TypeVar("T")


class DiskWorker(Protocol):
    """Performs `InspectDisk` and `ActOnDisk`."""

    def inspect(self, device: str) -> object:
        """Return what the disk holds. Raises `DiskError`."""
        ...

    def act(self, action: Any, keys: Any) -> object:
        """Carry out one action of a plan. Raises `DiskError`."""
        ...


class CollateralSource(Protocol):
    """Performs `FetchCollateral`: what is `available` is not fetched. It may be called from several threads at once."""

    def available(self, identity: PckIdentity, now: int) -> VerifiedCollateral | None:
        """Return the result of `fetch` if it is in memory, without blocking."""
        ...

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """Return verified collateral for a platform; may block. Raises `CollateralUnavailable`."""
        ...


class Missing:
    """Stands for a part that a driver was not given: each use of it raises `LocalProtocolError`."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __call__(self, *_: object) -> NoReturn:
        """Raise, where the part would be called."""
        part = self._part
        raise LocalProtocolError(
            f"a flow needs {part!r}, which this driver lacks; give {part}= to it, or to the client"
        )

    transact: Callable[..., NoReturn] = __call__
    fetch: Callable[..., NoReturn] = __call__
    available: Callable[..., NoReturn] = __call__
    inspect: Callable[..., NoReturn] = __call__
    act: Callable[..., NoReturn] = __call__


def log_record(record: Record) -> None:
    """Write a record to the standard library's ``logging``, logger ``chutes_proto``."""
    import json
    import logging

    fields = (f"{name}={json.dumps(value)}" for name, value in record.shown.items())
    logging.getLogger("chutes_proto").log(record.level, "%s", " ".join([record.event, *fields]))


def careful(log: Callable[[Record], None]) -> Callable[[Record], None]:
    """Return ``log``, but without its errors: a decision that is perhaps committed already stays decided."""

    def log_carefully(record: Record) -> None:
        try:
            log(record)
        except Exception:
            import logging

            logging.getLogger("chutes_proto").exception("a log record was lost: %s", record.event)

    return log_carefully


def at_once(
    log: Callable[[Record], None], uptime: Callable[[], float]
) -> dict[type[Effect[Any]], Callable[[Any], Any]]:
    """Return the functions that perform the effects for which no driver waits, most of those of a request."""
    log = careful(log)
    return {
        effects.Now: lambda _: int(time.time()),
        effects.Uptime: lambda _: uptime(),
        effects.Entropy: lambda effect: os.urandom(effect.size),
        effects.Log: lambda effect: log(effect.record),
    }


RESOLVE_SECONDS: Final = 5.0
"""How long `Resolve` may take, where the driver can interrupt it."""
RESOLVERS: Final = 16
"""How many threads may wait for the resolver: not the store's threads, since one that is interrupted waits on."""


def resolve(name: str) -> tuple[str, ...]:
    """Return this machine's addresses for a name, none if it does not exist. Raises `TransportError`."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        return ()
    except OSError as exc:
        if exc.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return ()
        raise unresolved(name, str(exc.strerror)) from None
    return tuple(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found))


def unresolved(name: str, why: str = f"no answer within {RESOLVE_SECONDS:g} s") -> TransportError:
    """Return the error for a name about which the resolver has no answer now."""
    return TransportError(f"{name} cannot be resolved: {why}", maybe_delivered=False)


def unknown(effect: Effect[Any]) -> LocalProtocolError:
    """Return the error for an object that is not in the closed list of effects."""
    return LocalProtocolError(f"{type(effect).__name__} is not an effect that drivers know")


class Performer:
    """Performs effects with the parts that it is given, in the calling thread.

    ``send`` performs `Send` (`HttpsSender`), ``get`` performs `Get` and `Post`, ``next_server`` changes to the next
    server and returns its origin, ``quoter`` makes quotes, ``gpu_tool`` has GPUs make evidence, ``store`` runs
    transactions, ``collateral`` has verified collateral, ``disks`` looks at disks and acts on them, ``gpus`` returns
    RIMs and OCSP answers, ``log`` is called with every record.
    """

    def __init__(
        self,
        *,
        send: Callable[[HttpRequest], HttpResponse] | None = None,
        get: Callable[..., HttpResponse] | None = None,
        next_server: Callable[[], str] | None = None,
        quoter: Quoter | None = None,
        gpu_tool: GpuTool | None = None,
        store: store.Store | None = None,
        collateral: CollateralSource | None = None,
        disks: DiskWorker | None = None,
        gpus: Callable[[], gpu.GpuCollateral] | None = None,
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self._send = send or Missing("send")
        self._get = get or Missing("get")
        self._next_server = next_server or Missing("next_server")
        self._quoter = quoter or Missing("quoter")
        self._gpu_tool = gpu_tool or Missing("gpu_tool")
        self._store = store or Missing("store")
        self._collateral = collateral or Missing("collateral")
        self._disks = disks or Missing("disks")
        self._gpus = gpus or Missing("gpus")
        self._at_once = at_once(log, time.monotonic)

    def run(self, flow: Flow[T]) -> T:
        """Drive ``flow`` to its end; return what it returns, raise what it raises."""
        return effects.run(flow, self.perform)

    def perform(self, effect: Effect[Any]) -> object:
        """Perform one effect; return the reply that the effect documents.

        Raises `LocalProtocolError` for an effect that needs a part that this driver does not have.
        """
        work = self._at_once.get(type(effect))
        if work is not None:
            return work(effect)
        match effect:
            case effects.Send(request):
                return self._send(request)
            case effects.NextServer():
                return self._next_server()
            case effects.MakeQuote(report_data):
                return take_quote(self._quoter, report_data)
            case effects.CollectGpuEvidence(nonce):
                return take_gpu_evidence(self._gpu_tool, nonce)
            case effects.Sleep(seconds):
                time.sleep(seconds)
            case effects.Get(url):
                return self._get(url)
            case effects.Post(url, headers, body):
                return self._get(url, headers, body)
            case effects.FetchCollateral(identity, now):
                available = self._collateral.available(identity, now)
                return self._collateral.fetch(identity, now) if available is None else available
            case effects.FetchGpuCollateral():
                return self._gpus()
            case effects.Resolve(name):
                return resolve(name)
            case effects.FetchEvidence():
                import anyio

                from chutes_proto.io.http.evidence import fetch_evidence  # only this needs httpx

                return anyio.run(fetch_evidence, effect)
            case effects.Transact(unit):
                return self._store.transact(unit)
            case effects.InspectDisk(device):
                return self._disks.inspect(device)
            case effects.ActOnDisk(action, keys):
                return self._disks.act(action, keys)
            case _:
                raise unknown(effect)
        return None
