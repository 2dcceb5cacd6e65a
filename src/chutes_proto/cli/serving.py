"""A key server in this process, on trio: for `serve` until a signal comes, for `demo` as long as it lasts."""

from __future__ import annotations

import signal
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import trio

from chutes_proto import __version__
from chutes_proto.errors import ConfigurationError
from chutes_proto.log import Level, Record
from chutes_proto.quote.roots import INTEL_ROOT
from chutes_proto.server.app import App
from chutes_proto.transport.h1 import Limits
from chutes_proto_trio import serve
from chutes_proto_trio.collateral import open_performer

if TYPE_CHECKING:
    from chutes_proto.blocking.collateral import UpstreamCollateral
    from chutes_proto.blocking.perform import CollateralSource
    from chutes_proto.blocking.setup import ServerSetup
    from chutes_proto.blocking.stores import DurableStore
    from chutes_proto.log import Value

T = TypeVar("T")


def run_trio(function: Callable[..., Awaitable[T]], *args: object) -> T:
    """`trio.run`; what a nursery raises comes out unwrapped."""
    with unwrapped():
        return trio.run(function, *args)


@contextmanager
def unwrapped() -> Generator[None]:
    """What nurseries inside raise comes out as itself, the first where there are several."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(exc: BaseException) -> BaseException:
    members: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return _first(members[0]) if members else exc


def log_line(record: Record) -> None:
    """One line of JSON on standard error. A full disk behind it must not stop the server: the audit is in the store."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError):
        print(record.as_json(at), file=sys.stderr, flush=True)


async def listen(setup: ServerSetup) -> list[trio.SocketListener]:
    """Listen where the configuration says. Raises `ConfigurationError`."""
    host, port = setup.config.listen_address
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        raise ConfigurationError(f"listen: {setup.config.listen}: {exc.strerror or exc}") from None


def urls(listeners: Sequence[trio.SocketListener]) -> list[str]:
    """Where clients reach the listeners: ``https://host:port``."""
    names = [listener.socket.getsockname() for listener in listeners]
    return [f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}" for host, port, *_ in names]


async def serve_on(
    listeners: Sequence[trio.SocketListener],
    setup: ServerSetup,
    store: DurableStore,
    collateral: CollateralSource | UpstreamCollateral,
    log: Callable[[Record], None],
) -> None:
    """Serve until cancelled."""
    limits = setup.config.limits
    async with open_performer(store, collateral, log=log) as performer:
        await serve(
            listeners,
            App(setup.service),
            performer,
            lambda: setup.tls,
            limits=Limits(
                head_bytes=limits.head_bytes, body_bytes=limits.body_bytes, request_seconds=limits.request_seconds
            ),
            connections=limits.connections,
        )


async def serve_until_signal(
    setup: ServerSetup,
    store: DurableStore,
    collateral: CollateralSource | UpstreamCollateral,
    announce: Callable[[list[str]], None],
    signals: Sequence[signal.Signals],
) -> None:
    """Listen, ``announce`` the URLs, and serve until one of the ``signals`` comes. Raises `ConfigurationError`."""
    listeners = await listen(setup)
    service = setup.service
    with trio.open_signal_receiver(*signals) as received:
        fields: dict[str, Value] = {
            "urls": urls(listeners),
            "trust": service.trust,
            "profiles": list(service.profiles),
            "store": store.name,
            "version": __version__,
        }
        log_line(Record(Level.INFO if service.root == INTEL_ROOT else Level.WARNING, "serving", fields))
        announce(urls(listeners))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_on, listeners, setup, store, collateral, log_line)
            async for number in received:
                log_line(Record(Level.INFO, "stopped", {"signal": signal.Signals(number).name}))
                nursery.cancel_scope.cancel()
