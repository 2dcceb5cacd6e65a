"""A key server in this process: `serve` until cancelled, `serve_until_stopped` until a signal, or an ASGI application.

All three check the store before they serve, log their configuration, and release everything at the end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, closing, contextmanager, nullcontext, suppress
from functools import partial
from importlib.util import find_spec
from socket import AF_UNIX, SOCK_DGRAM, socket
from typing import TYPE_CHECKING, Final, Literal, NoReturn, TypeVar

import anyio

from chutes_proto import __version__
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.collateral.aio import open_performer
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.server.aio import Server, run_until_stopped
from chutes_proto.io.server.copier import copying
from chutes_proto.io.server.listeners import Listeners, open_listeners
from chutes_proto.io.server.log_writer import FLUSH_SECONDS, LogWriter
from chutes_proto.io.server.reload import Reloader, Running, prepare, record_start
from chutes_proto.io.server.scrub import Scrubber, scrubbing
from chutes_proto.io.server.sequencer import sequencing
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.server.sockets import Listening, allowed_connections, inherited_sockets
from chutes_proto.io.server.store_setup import (
    check_keys,
    erasures_file,
    find_differences,
    read_sinks,
    store_findings,
)
from chutes_proto.io.server.watching import watching
from chutes_proto.io.server.workers import (
    STOP_AT_ONCE,
    Given,
    Supervisor,
    in_background,
    obey,
    reload_at_signal,
    worker_command,
)
from chutes_proto.io.stop_signals import SignalsToStop
from chutes_proto.io.stores.erasures import keep_erasures
from chutes_proto.log import Level, Record
from chutes_proto.quote._roots import INTEL_ROOT
from chutes_proto.server._app import App
from chutes_proto.server._config import ServerConfig
from chutes_proto.tlog.notes import Checkpoint, Note
from chutes_proto.transport.asgi import AsgiApp

if TYPE_CHECKING:
    from chutes_proto.io.collateral.upstream import UpstreamCollateral
    from chutes_proto.io.drivers.aio import Performer
    from chutes_proto.io.drivers.sync import CollateralSource
    from chutes_proto.io.stores.address import DurableStore
    from chutes_proto.log import Value
    from chutes_proto.secret import Secret
    from chutes_proto.store._rows import KeyringRow

T = TypeVar("T")

Transport = Literal["trio", "asyncio"]

END_SECONDS: Final = 2.0
"""How many seconds a server that has stopped lives on, for running work and then for its log.

A store may hang for longer, or for ever.
"""

_ENDING: Final = threading.Lock()


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


@contextmanager
def open_store(running: Running, worker: Given | None = None) -> Generator[tuple[DurableStore, list[str]]]:
    """Open the store of a server; check that it can be written and its keys opened. Yields warnings, too.

    The start is recorded where evidence is judged by other files than before; that of a ``worker`` is its supervisor's.
    Raises `StoreError`.
    """
    setup = running.setup
    with closing(setup.store.open()) as store:
        store.custody.hold(partial(_unwrapped, running))
        store.check_writing()
        _ = check_keys(store, setup.service.vault)
        different = [str(each) for each in find_differences(store, setup.alike)]
        sinks, required = read_sinks(setup.config, setup.base), setup.config.audit.required
        with copying(store, sinks, required=required) as copy_checkpoint:
            repeated = keep_erasures(store, erasures_file(setup.config), setup.service.vault)
            store.keep_mark()
            file = setup.checkpoint_file

            def signed(note: Note) -> None:
                store.hold_checkpoint(Checkpoint.of(note))
                copy_checkpoint(str(note))

            with sequencing(store, lambda: running.setup.service.vault, setup.config.audit.origin, file, signed):
                if worker is None:
                    record_start(store, setup)
                found = [f"erasures: {repeated}"] if repeated else []
                yield store, [*found, *(str(finding) for finding in store_findings(store)), *different]


def _unwrapped(running: Running, row: KeyringRow) -> Secret:
    """A key of the store's own, opened by the KEK of now: a reload may bring another one."""
    return running.setup.service.vault.unwrap(row)


@asynccontextmanager
async def open_server(
    running: Running,
    store: DurableStore,
    collateral: CollateralSource | UpstreamCollateral,
    log: Callable[[Record], None],
    admin: Sequence[Listening] = (),
    worker: int | None = None,
) -> AsyncGenerator[Server]:
    """Make a server on the running event loop; its ``admin`` listeners are served as long as it lives.

    ``worker`` is the number of this process among several on the same listeners.
    """
    setup = running.setup
    wanted = setup.config.limits.connections
    connections = allowed_connections(wanted)
    if connections < wanted:
        about = f"limits.connections: the limit of open files allows {connections} of {wanted}; raise it (LimitNOFILE)"
        log(Record(Level.WARNING, "warning", {"about": about}))
    if worker in (None, 0):  # of several, one is enough
        running.scrubber = Scrubber(store, store.add_note)
    async with (
        open_performer(store, collateral, gpus=setup.gpus, log=log) as performer,
        _scrubbing(running.scrubber),
        watching(running, store, performer, log, worker),
    ):
        if not admin:
            yield Server(
                running.follow(App(setup.service)),
                performer,
                limits=setup.limits,
                connections=connections,
                is_one_of_several=worker is not None,
            )
            return
        from chutes_proto.io.server.admin import Admin
        from chutes_proto.io.server.metrics import MeteredPerformer, Metrics

        metrics = Metrics(worker)
        app = running.follow(App(setup.service, metrics))
        server = Server(
            app,
            MeteredPerformer(performer, metrics),
            limits=setup.limits,
            connections=connections,
            ended=lambda connection: metrics.handshake(done=connection.has_shaken_hands),
            is_one_of_several=worker is not None,
        )
        watched = Admin(running, store, app, metrics, log)
        async with anyio.create_task_group() as beside:
            _ = beside.start_soon(watched.serve, admin, performer, lambda: server.open_connections)
            yield server
            beside.cancel_scope.cancel()


@asynccontextmanager
async def _scrubbing(scrubber: Scrubber | None) -> AsyncGenerator[None]:
    with nullcontext() if scrubber is None else scrubbing(scrubber):
        yield


async def serve(
    config: ServerConfig,
    *,
    ready: Callable[[Sequence[str]], object] = lambda _: None,
    log: Callable[[Record], None] = log_record,
) -> None:
    """Serve keys until cancelled.

    Reads the files that ``config`` names, checks the store, listens, and calls ``ready`` with the URLs: from then on
    requests are answered. ``log`` is called with each record and must not block; by default it writes to the standard
    library's ``logging``, logger ``chutes_proto``.

    When cancelled, it ends the connections, waits for transactions that have begun, closes the store and removes
    the Unix socket. It handles no signals and does not drain: `chutes-proto serve` does.

    Raises `ConfigurationError` with all problems, one a line, and `StoreError` for a store that cannot be used.
    """
    async with (
        _in_thread(_opened(config)) as (running, store, warnings, listeners),
        open_server(running, store, running.setup.collateral, log, listeners.admin) as server,
    ):
        setup = running.setup
        _log_start(setup, store, warnings, listeners.urls, log, listeners.admin_urls)
        _ = ready(listeners.urls)
        await server.serve(listeners.sockets)


@contextmanager
def _opened(config: ServerConfig) -> Generator[tuple[Running, DurableStore, list[str], Listeners]]:
    setup = make_setup(config)
    running = Running(setup)
    with open_store(running) as (store, warnings), closing(Listeners(running)) as listeners:
        yield running, store, warnings, listeners


@asynccontextmanager
async def _in_thread(opening: AbstractContextManager[T]) -> AsyncGenerator[T]:
    """Enter and leave ``opening`` in a worker thread, because it waits for files, names and a database."""
    opened = await anyio.to_thread.run_sync(opening.__enter__)
    try:
        yield opened
    finally:
        with anyio.CancelScope(shield=True):
            _ = await anyio.to_thread.run_sync(opening.__exit__, None, None, None)


def make_asgi_app(config: ServerConfig) -> AsgiApp:
    """See `chutes_proto.server.asgi_app`."""
    if not config.proxy:
        raise ConfigurationError(
            "proxy: missing, and an ASGI server passes on no client certificate, so that every VM would be refused for"
            " good; add [[proxy]] with a name and the unix socket or networks of the proxy that ends TLS, or use serve,"
            " which ends it itself"
        )
    setup = make_setup(config)
    running = Running(setup)
    with open_store(running):
        pass  # opened again in the process that serves: an ASGI server may fork before

    @asynccontextmanager
    async def open_driver() -> AsyncGenerator[Performer]:
        async with (
            _in_thread(open_store(running)) as (store, warnings),
            open_performer(store, setup.collateral, gpus=setup.gpus) as performer,
            watching(running, store, performer, log_record),
        ):
            _log_start(setup, store, warnings, [], log_record)
            yield performer

    return AsgiApp(App(setup.service), open_driver, limits=setup.limits)


def _log_start(
    setup: ServerSetup,
    store: DurableStore,
    warnings: list[str],
    where: list[str],
    log: Callable[[Record], None],
    admin: Sequence[str] = (),
) -> None:
    service = setup.service
    fields: dict[str, Value] = {
        "urls": where,
        "trust": service.trust,
        "profiles": [str(profile) for profile in service.policy.profiles],
        "store": store.name,
        "version": __version__,
    }
    if admin:
        fields["admin"] = list(admin)
    log(Record(Level.INFO if service.root == INTEL_ROOT else Level.WARNING, "serving", fields))
    for warning in (*setup.warnings, *warnings):
        log(Record(Level.WARNING, "warning", {"about": warning}))


def serve_until_stopped(
    transport: Transport,
    setup: ServerSetup,
    collateral: CollateralSource | UpstreamCollateral,
    announce: Callable[[Sequence[str]], None],
    stops: Sequence[signal.Signals],
    worker: Given | None = None,
) -> None:
    """Listen, ``announce`` the URLs, and serve until one of the signals ``stops`` has arrived and no boot is open.

    After a signal it serves for at most ``limits.drain_seconds``, after a second one not at all. SIGHUP, if it is not
    in ``stops``, and a request at the socket ``control`` reload the files (``reload.py``). Raises `ConfigurationError`
    and `StoreError`.

    The listening sockets are those that the service manager passed, and new ones. While others hold its sockets, a
    server that stops accepts no more and waits for no open boot, because others on the same store serve these. A
    ``worker`` uses what its supervisor gave.

    The process ends `END_SECONDS` after that, whatever its threads do: unfinished work leaves no trace, because a unit
    of the store is one transaction. This limit also holds for the work of the process after this function.
    """
    if find_spec(transport) is None:
        raise ConfigurationError(f"{transport} is not installed; run: pip install 'chutes-proto[{transport}]'")
    running = Running(setup)
    inherited = [] if worker is not None else inherited_sockets(os.environ)
    source = running if collateral is setup.collateral and isinstance(collateral, CollateralDirectory) else collateral
    with (
        open_store(running, worker) as (store, warnings),
        open_listeners(running, inherited, worker) as held,
        closing(LogWriter()) as log,
    ):
        listeners = held.listeners
        reloader = Reloader(running, store, log)
        held.answer(setup.control_socket, reloader.reload, log)

        if worker is not None:
            in_background(obey, worker.channel, partial(prepare, running, None), running.replace)

        def ready() -> None:
            held.begin()
            _log_start(setup, store, warnings, listeners.urls, log, listeners.admin_urls)
            announce(listeners.urls)
            tell_manager("READY=1")
            if worker is None:  # a worker's supervisor reloads it
                hear_hangups()

        number = None if worker is None else worker.number

        async def main() -> None:
            async with open_server(running, store, source, log, listeners.admin, number) as server:

                def stop(why: str, *, handed_over: bool) -> None:
                    seconds = server.stop(handed_over=handed_over)
                    fields: dict[str, Value] = {
                        "signal": why,
                        "open_boots": len(setup.service.boots),
                        "drain_seconds": round(seconds),
                        "handed_over": handed_over,
                    }
                    log(Record(Level.INFO, "stopping", fields))
                    tell_manager("STOPPING=1")
                    _end_after(seconds + END_SECONDS, log, listeners)

                to_stop = SignalsToStop()

                def stop_at_signal(number: signal.Signals, *, handed_over: bool) -> None:
                    """The supervisor tells a worker, and so may a service manager or a terminal that tells all."""
                    if to_stop.is_another(number) and (held.life is None or not server.is_stopping):
                        stop(number.name, handed_over=handed_over)

                async def end_with_supervisor() -> None:
                    if held.life is not None:
                        await anyio.wait_readable(held.life)
                        # Its successor must be able to listen at once, and serves the open boots.
                        stop("supervisor", handed_over=True)

                signals: dict[signal.Signals, Callable[[], None]] = {
                    signal.SIGHUP: lambda: None if worker is not None else reload_at_signal(reloader.reload, log)
                }
                handed_over = held.by_manager and listeners.all_given
                signals |= {number: partial(stop_at_signal, number, handed_over=handed_over) for number in stops}
                if held.life is not None:
                    signals[STOP_AT_ONCE] = partial(stop, STOP_AT_ONCE.name, handed_over=handed_over)
                await run_until_stopped(server, listeners.sockets, signals, ready, end_with_supervisor)
                _end_after(END_SECONDS, log, listeners)

        try:
            with unwrapped():
                anyio.run(main, backend=transport)
        finally:
            listeners.close()
        log(Record(Level.INFO, "stopped", {}))


def supervise_until_stopped(
    workers: int,
    transport: Transport,
    setup: ServerSetup,
    announce: Callable[[Sequence[str]], None],
    stops: Sequence[signal.Signals],
) -> None:
    """Listen, start ``workers`` processes that serve, ``announce`` the URLs, and see to them until a signal to stop.

    Sockets are as for `serve_until_stopped`. Raises `ConfigurationError` and `StoreError`. Must run in the main thread.
    """
    if setup.config.path is None:
        raise ConfigurationError("--workers: a worker reads the configuration from its file; name one")
    running = Running(setup)
    inherited = inherited_sockets(os.environ)
    with open_store(running):
        pass  # opened again by each worker
    seconds = setup.config.limits.drain_seconds + 2 * END_SECONDS
    with open_listeners(running, inherited) as held, closing(LogWriter()) as log:
        supervisor = Supervisor(
            running,
            workers,
            worker_command(setup.config.path, transport),
            held.listeners.keyed,
            held.by_manager and held.listeners.all_given,
            log,
            keeps_metrics=bool(held.listeners.admin),
            stop_seconds=seconds,
        )

        held.answer(setup.control_socket, supervisor.reload, log)

        def ready() -> None:
            held.begin()
            announce(held.listeners.urls)
            tell_manager("READY=1")
            hear_hangups()

        supervisor.run(stops, ready)
        log(Record(Level.INFO, "stopped", {}))


def tell_manager(state: str) -> None:
    """Tell systemd the state of the service, if it asked for it. Source: sd_notify(3)."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket(AF_UNIX, SOCK_DGRAM) as manager, suppress(OSError):
            _ = manager.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def hear_hangups() -> None:
    """Let SIGHUP reach its handler: the program has blocked it until here, and one that came meanwhile arrives now."""
    _ = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def _end_after(seconds: float, log: LogWriter, listeners: Listeners) -> None:
    """End the process after ``seconds``, with ``listeners`` closed and the log written."""

    def end() -> NoReturn:
        _ = _ENDING.acquire()  # never released: of several that are due, one ends the process
        about = "the store, or another service, did not answer in time"
        log(Record(Level.WARNING, "stopped", {"about": about}))
        with suppress(OSError):
            listeners.close()
        log.close()
        os._exit(os.EX_OK)

    timer = threading.Timer(seconds - FLUSH_SECONDS, end)
    timer.daemon = True
    with suppress(RuntimeError):  # the system allows no thread: then it ends when its work does
        timer.start()
