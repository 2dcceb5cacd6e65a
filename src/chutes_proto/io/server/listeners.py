"""The listening sockets of a process: who gave them, the service manager or another server, and who gets them next."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from socket import socket
from typing import TYPE_CHECKING

from attrs import define

from chutes_proto.io.server.control import Control
from chutes_proto.io.server.sockets import (
    GivenSockets,
    Listening,
    inherited_sockets,
    listen_tls,
    listen_unix,
    serve_plain,
    serve_tls,
    urls,
)
from chutes_proto.io.server.takeover import Door, TakenOver, take_over

if TYPE_CHECKING:
    from pathlib import Path

    from chutes_proto.io.server.reload import Running
    from chutes_proto.io.server.setup import ServerSetup
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
        self.handed_over = False
        """Whether another process serves on them, too: then files of Unix sockets are left to it."""
        self.owns_given: bool = False
        """Whether the files of given Unix sockets are this process's to remove: who gave them may still serve there."""
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
        _ = self._opened.callback(self._remove, path, is_given=bool(given))
        return kept

    def _keep(self, key: str, listening: list[Listening]) -> list[Listening]:
        for each in listening:
            _ = self._opened.callback(each.socket.close)
            self.keyed.append((key, each.socket))
        return listening

    def _remove(self, path: Path, *, is_given: bool) -> None:
        if not self.handed_over and (self.owns_given or not is_given):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the sockets and remove the Unix socket; a second call does nothing."""
        self._opened.close()


@define
class Held:
    """The listeners of this process, who gave them, and where the next process asks for them."""

    listeners: Listeners
    by_manager: bool
    taken: TakenOver | None = None
    door: Door | None = None
    life: int | None = None
    """Readable once the supervisor of this worker has ended; None if it has none."""
    control: Control | None = None

    def answer(
        self, path: Path | None, reload: Callable[[str], Mapping[str, object]], log: Callable[[Record], None]
    ) -> None:
        """Listen for requests to reload; those that come before `begin` go to the predecessor."""
        if path is not None and self.life is None:  # a worker's supervisor is asked
            self.control = Control(path, reload, log)

    def begin(self) -> None:
        """Note that this process serves: a successor asks it from now on, and its predecessor ends."""
        if self.door is not None:
            self.door.open()
        if self.control is not None:
            self.control.open()
        if self.taken is not None:
            self.taken.confirm()
            self.listeners.owns_given = True


def take_inherited(setup: ServerSetup) -> list[socket]:
    """Take the sockets of the service manager. Without any, check that the running server uses the same store.

    That is before this one's is opened: a start that is refused makes no other store, and no mark of it. Raises
    `ConfigurationError`.
    """
    inherited, path = inherited_sockets(os.environ), setup.takeover_socket
    if not inherited and path is not None and (taken := take_over(path, setup.store.name)) is not None:
        taken.leave()  # taken only when the store is open: the other waits for nobody meanwhile
    return inherited


@contextmanager
def open_listeners(running: Running, inherited: Sequence[socket] = (), worker: Given | None = None) -> Generator[Held]:
    """Listen on the sockets of the service manager, of the running server, or of this ``worker``, and on new ones.

    Raises `ConfigurationError`.
    """
    if worker is not None:
        with closing(Listeners(running, worker.sockets)) as listeners:
            yield Held(listeners, worker.handed_over, life=worker.life)
        return
    path = running.setup.takeover_socket
    taken = None if path is None or inherited else take_over(path, running.setup.store.name)
    given = [("", each) for each in inherited] if taken is None else taken.sockets
    with ExitStack() as opened:
        if taken is not None:
            _ = opened.callback(taken.connection.close)
        listeners = opened.enter_context(closing(Listeners(running, given)))
        door = None if path is None else Door(path)
        held = Held(listeners, bool(inherited), taken, door)
        try:
            yield held
        finally:
            if held.control is not None:
                held.control.close(is_successors=listeners.handed_over)
            if door is not None:
                door.close(is_successors=listeners.handed_over)
