"""The listening sockets of a process: those that the service manager or the supervisor gave, and new ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from socket import socket
from typing import TYPE_CHECKING

from attrs import define

from chutes_proto.io.server.control import Control
from chutes_proto.io.server.sockets import (
    GivenSockets,
    Listening,
    listen_tls,
    listen_unix,
    serve_plain,
    serve_tls,
    urls,
)

if TYPE_CHECKING:
    from pathlib import Path

    from chutes_proto.io.server.reload import Running
    from chutes_proto.io.server.workers import Given
    from chutes_proto.log import Record
    from chutes_proto.transport.tls import ServerContext


class Listeners:
    """The listening sockets of a server; new connections get the TLS certificate by which it is ``running``.

    Those among ``given`` are used; the others are opened. Raises `ConfigurationError` for an address or path that
    cannot be used, and for a given socket that the configuration does not name.
    """

    def __init__(self, running: Running, given: Sequence[tuple[str, socket]] = ()) -> None:
        setup = running.setup
        self.all_given: bool = False
        """Whether each at which VMs ask was given. The operator's may be this process's own, and go with it."""
        self.keyed: list[tuple[str, socket]] = []
        """Each socket, after the setting that it was opened for."""
        self._offered = GivenSockets(given)
        admin = setup.config.admin
        with ExitStack() as self._opened:
            self.sockets: list[Listening] = self._tcp("listen", setup.config.listen_address, lambda: running.setup.tls)
            self.sockets += self._unix("proxy.unix", setup.proxy_socket)
            self.all_given = {each.socket for each in self.sockets} <= {each for _, each in given}
            self.admin: list[Listening] = []
            if admin.address is not None:
                self.admin += self._tcp("admin.listen", admin.address, lambda: running.setup.admin_tls)
            self.admin += self._unix("admin.unix", setup.admin_socket)
            self._offered.check_all_taken()
            self.urls: list[str] = urls(self.sockets)
            self.admin_urls: list[str] = urls(self.admin, "http" if setup.admin_tls is None else "https")
            self._opened = self._opened.pop_all()

    def _tcp(self, key: str, address: tuple[str, int], context: Callable[[], ServerContext | None]) -> list[Listening]:
        given = self._offered.take_tcp(key, address)
        return self._keep(key, [serve_tls(each, context) for each in given] or listen_tls(address, context, key=key))

    def _unix(self, key: str, path: Path | None) -> list[Listening]:
        if path is None:
            return []
        given = self._offered.take_unix(key, path)
        kept = self._keep(key, [serve_plain(each) for each in given] or [listen_unix(path, key=key)])
        if not given:  # who gave one may still serve there
            _ = self._opened.callback(path.unlink, missing_ok=True)
        return kept

    def _keep(self, key: str, listening: list[Listening]) -> list[Listening]:
        for each in listening:
            _ = self._opened.callback(each.socket.close)
            self.keyed.append((key, each.socket))
        return listening

    def close(self) -> None:
        """Close the sockets and remove the Unix socket; a second call does nothing."""
        self._opened.close()


@define
class Held:
    """The listeners of this process, who gave them, and the socket at which it is asked to reload."""

    listeners: Listeners
    by_manager: bool
    life: int | None = None
    """Readable once the supervisor of this worker has ended; None if it has none."""
    control: Control | None = None

    def answer(
        self, path: Path | None, reload: Callable[[str], Mapping[str, object]], log: Callable[[Record], None]
    ) -> None:
        """Listen for requests to reload, which reach the server once it serves (`begin`)."""
        if path is not None and self.life is None:  # a worker's supervisor is asked
            self.control = Control(path, reload, log)

    def begin(self) -> None:
        """Note that this process serves: it may be asked to reload from now on."""
        if self.control is not None:
            self.control.open()


@contextmanager
def open_listeners(running: Running, inherited: Sequence[socket] = (), worker: Given | None = None) -> Generator[Held]:
    """Listen on the sockets ``inherited`` from the service manager, or on those of this ``worker``, and on new ones.

    Raises `ConfigurationError`.
    """
    given = [("", each) for each in inherited] if worker is None else worker.sockets
    with closing(Listeners(running, given)) as listeners:
        if worker is not None:
            yield Held(listeners, worker.handed_over, life=worker.life)
            return
        held = Held(listeners, bool(inherited))
        try:
            yield held
        finally:
            if held.control is not None:
                held.control.close()
