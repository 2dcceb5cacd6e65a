"""A key server in this process: for `serve` until it is stopped, for `demo` as long as it lasts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import anyio
from attrs import define, field

from chutes_proto import __version__
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.collateral.aio import open_performer
from chutes_proto.io.server.aio import Server, run_until_stopped
from chutes_proto.io.server.log_writer import FLUSH_SECONDS, LogWriter
from chutes_proto.io.server.sockets import Listening, listen_tls, listen_unix, room_for, urls
from chutes_proto.log import Level, Record
from chutes_proto.quote._roots import INTEL_ROOT
from chutes_proto.server._app import App

if TYPE_CHECKING:
    from chutes_proto.io.collateral.upstream import UpstreamCollateral
    from chutes_proto.io.drivers.sync import CollateralSource
    from chutes_proto.io.server.setup import ServerSetup
    from chutes_proto.io.stores.address import DurableStore
    from chutes_proto.log import Value
    from chutes_proto.store._run import Store
    from chutes_proto.transport.tls import ServerContext

Transport = Literal["trio", "asyncio"]

END_SECONDS: Final = 2.0
"""How long a server that serves no more goes on, for what is under way and at last for its log.

A store may hang for longer, or for ever.
"""


@contextmanager
def unwrapped() -> Generator[None]:
    """Raise the first exception of a group in place of the group."""
    try:
        yield
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(exc: BaseException) -> BaseException:
    members: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return _first(members[0]) if members else exc


@define
class Certificate:
    """The TLS certificate that new connections get."""

    setup: ServerSetup
    context: ServerContext = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.context = self.setup.tls

    def reload(self) -> Record:
        """Take what the files have now; where that is of no use, keep what there is."""
        try:
            self.context = self.setup.reload_tls()
        except ConfigurationError as exc:
            return Record(Level.ERROR, "certificate_kept", {"error": str(exc)})
        return Record(Level.INFO, "certificate_reloaded", {})


def listen(setup: ServerSetup, certificate: Certificate) -> list[Listening]:
    """Listen where the configuration says. Raises `ConfigurationError`."""
    listening = listen_tls(setup.config.listen_address, lambda: certificate.context)
    try:
        return listening if setup.proxy_socket is None else [*listening, listen_unix(setup.proxy_socket)]
    except ConfigurationError:
        for place in listening:
            place.socket.close()
        raise


@asynccontextmanager
async def open_server(
    setup: ServerSetup,
    store: Store,
    collateral: CollateralSource | UpstreamCollateral,
    log: Callable[[Record], None],
) -> AsyncGenerator[Server]:
    """A server of ``setup`` on the running event loop."""
    wanted = setup.config.limits.connections
    connections = room_for(wanted)
    if connections < wanted:
        about = f"limits.connections: the system lets this process open files for {connections}; raise its limit"
        log(Record(Level.WARNING, "warning", {"about": about}))
    async with open_performer(store, collateral, log=log) as performer:
        yield Server(App(setup.service), performer, limits=setup.limits, connections=connections)


def serve_until_stopped(
    transport: Transport,
    setup: ServerSetup,
    store: DurableStore,
    collateral: CollateralSource | UpstreamCollateral,
    announce: Callable[[list[str]], None],
    stops: Sequence[signal.Signals],
) -> None:
    """Listen, ``announce`` the URLs, and serve until one of the signals ``stops`` has come and no boot is open.

    After a signal it serves for at most ``limits.drain_seconds``, after a second one not at all. SIGHUP, where it is
    none of them, takes the certificate's files anew. Raises `ConfigurationError`.

    The process ends `END_SECONDS` after that, whatever its threads do: what they have not done is not done at all,
    because a unit of the store is one transaction. That holds after this has returned, too, for what else the process
    has to do before it ends.
    """
    if transport not in anyio.get_available_backends():
        raise ConfigurationError(f"{transport} is not installed; run: pip install 'chutes-proto[{transport}]'")
    certificate = Certificate(setup)
    listening = listen(setup, certificate)
    service = setup.service
    places = ExitStack()
    for place in listening:
        _ = places.callback(place.socket.close)
    if setup.proxy_socket is not None:
        _ = places.callback(setup.proxy_socket.unlink, missing_ok=True)

    with closing(LogWriter()) as log:

        def ready() -> None:
            fields: dict[str, Value] = {
                "urls": urls(listening),
                "trust": service.trust,
                "profiles": list(service.profiles),
                "store": store.name,
                "version": __version__,
            }
            log(Record(Level.INFO if service.root == INTEL_ROOT else Level.WARNING, "serving", fields))
            for warning in setup.warnings:
                log(Record(Level.WARNING, "warning", {"about": warning}))
            announce(urls(listening))

        async def main() -> None:
            async with open_server(setup, store, collateral, log) as server:

                def stop(number: signal.Signals) -> None:
                    seconds = server.stop()
                    fields: dict[str, Value] = {
                        "signal": number.name,
                        "open_boots": len(service.boots),
                        "drain_seconds": round(seconds),
                    }
                    log(Record(Level.INFO, "stopping", fields))
                    _end_after(seconds + END_SECONDS, log, places)

                signals: dict[signal.Signals, Callable[[], None]] = {signal.SIGHUP: lambda: log(certificate.reload())}
                signals |= {number: partial(stop, number) for number in stops}
                await run_until_stopped(server, listening, signals, ready)
                _end_after(END_SECONDS, log, places)

        try:
            with unwrapped():
                anyio.run(main, backend=transport)
        finally:
            places.close()
        log(Record(Level.INFO, "stopped", {}))


def _end_after(seconds: float, log: LogWriter, places: ExitStack) -> None:
    """Let the process live for no more than so long; then close ``places``, unless they are closed."""

    def end() -> NoReturn:
        about = "the store, or what else was waited for, did not answer in time"
        log(Record(Level.WARNING, "stopped", {"about": about}))
        with suppress(OSError):
            places.close()
        log.close()
        os._exit(os.EX_OK)

    timer = threading.Timer(seconds - FLUSH_SECONDS, end)
    timer.daemon = True
    timer.start()
