"""Listening sockets of a server, made before any event loop runs.

Rules kept here:

* a TCP socket carries TLS; a Unix socket carries plain HTTP, because every process that may open it is trusted: its
  mode is 0660;
* a Unix socket that a server left behind is replaced; one on which a server answers is not, nor is any other file;
* a socket that a service manager gave is used only where the configuration names it;
* what a peer does not take stays in the server, where `Connections` bounds it: the kernel holds little of an answer,
  and not for longer than a peer has to take one, after the connection was closed, too;
* a server has no more connections than the system allows it open files.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Final, cast

from attrs import frozen

from chutes_proto.errors import ConfigurationError, LocalProtocolError
from chutes_proto.transport.h1 import DEFAULT_LIMITS
from chutes_proto.transport.tls import ServerContext, TlsSession

ACCEPT_PAUSE: Final = 0.2
"""Seconds to wait after a connection could not be accepted."""

ACCEPT_IN_A_ROW: Final = 16
"""How many connections a listener accepts in one round of the loop, where so many wait.

One for each round takes more of the loop's time. If all were accepted, those that came before would wait longer.
"""

SPARE_FILES: Final = 128
"""How many files a server opens besides connections: listeners, store, collateral, hosts and services it asks."""

_BACKLOG: Final = 1024
_UNSENT: Final = 64 * 1024
"""Bytes of an answer in the kernel, which takes twice as much memory; its own rule would be megabytes."""
_FIRST_INHERITED: Final = 3


def inherited_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the listening sockets that a service manager passed, and remove their variables from ``environ``.

    Source: systemd's sd_listen_fds(3). Raises `ConfigurationError` for what is not a listening stream socket.
    """
    found = [environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")]
    if found[0] != str(os.getpid()) or not found[1].isdecimal():
        return []
    sockets: list[socket.socket] = []
    for descriptor in range(_FIRST_INHERITED, _FIRST_INHERITED + int(found[1])):
        try:
            inherited = socket.socket(fileno=descriptor)
            sockets.append(inherited)
            if not (inherited.type == socket.SOCK_STREAM and _listens(inherited)):
                raise ConfigurationError(
                    "sockets from the service manager: not a listening stream socket; say ListenStream= and Accept=no"
                )
        except OSError as exc:
            raise ConfigurationError(f"sockets from the service manager: {exc.strerror}") from None
        os.set_inheritable(descriptor, False)
    return sockets


def _listens(given: socket.socket) -> bool:
    return bool(given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


class GivenSockets:
    """Listening sockets that another process opened, to be taken by the settings that name them.

    Each has the setting that a supervisor opened it for; empty if it is a service manager's.
    """

    def __init__(self, sockets: Sequence[tuple[str, socket.socket]]) -> None:
        self._left = list(sockets)

    def take_tcp(self, key: str, address: tuple[str, int]) -> list[socket.socket]:
        """Take those on this host and TCP port; on any port for port 0. Raises `ConfigurationError`."""
        host, port = address
        try:
            hosts = {name[0] for *_, name in _addresses(address)} if self._left else set[object]()
        except OSError as exc:
            raise ConfigurationError(f"{key}: {host}:{port}: {_text(exc)}") from None
        hosts |= {"::"} if "0.0.0.0" in hosts else set()  # noqa: S104 - a service manager's socket is of both families

        def is_meant(name: object) -> bool:
            return isinstance(name, tuple) and name[0] in hosts and port in (0, name[1])

        return self._take(key, is_meant)

    def take_unix(self, key: str, path: Path) -> list[socket.socket]:
        """Take those at this path."""
        return self._take(key, lambda name: name == str(path))

    def check_all_taken(self) -> None:
        """Close the others. Raises `ConfigurationError` if there is one."""
        names = [_named(each) for _, each in self._left]
        for _, each in self._left:
            each.close()
        if names:
            raise ConfigurationError(
                f"listen: a socket at {names[0]} was given by the service manager, and the configuration does not"
                " name it; make listen, proxy.unix or admin agree with it"
            )

    def _take(self, key: str, is_meant: Callable[[object], bool]) -> list[socket.socket]:
        taken = [each for name, each in self._left if name in ("", key) and is_meant(each.getsockname())]
        self._left = [(name, each) for name, each in self._left if each not in taken]
        return taken


@frozen
class Listening:
    """A listening socket, and a function that makes the TLS session of a connection, None for plain HTTP."""

    socket: socket.socket
    session: Callable[[], TlsSession | None]


def listen_tls(
    address: tuple[str, int], context: Callable[[], ServerContext | None], *, key: str = "listen"
) -> list[Listening]:
    """Listen on every address of a host and port. ``context`` is called for each connection; None means plain HTTP.

    Raises `ConfigurationError`, about the setting ``key``.
    """
    host, port = address
    listening: list[Listening] = []
    try:
        for family, _, _, _, name in _addresses(address):
            # "::" is every address of the machine, as for other servers: IPv4 clients come as mapped addresses.
            dual = host == "::" and socket.has_dualstack_ipv6()
            bound = socket.create_server(name, family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
            listening.append(serve_tls(bound, context))
    except OSError as exc:
        for opened in listening:
            opened.socket.close()
        raise ConfigurationError(f"{key}: {host}:{port}: {_text(exc)}") from None
    return listening


def serve_tls(bound: socket.socket, context: Callable[[], ServerContext | None]) -> Listening:
    """Serve a listening TCP socket; see `listen_tls`."""
    # Accepted sockets inherit all three. A time-out of 0 is minutes for a closed one whose peer takes nothing.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(DEFAULT_LIMITS.write_seconds * 1000))

    def session() -> TlsSession | None:
        now = context()
        return None if now is None else TlsSession(now)

    return Listening(bound, session)


def listen_unix(path: Path, *, key: str = "proxy.unix") -> Listening:
    """Listen on a Unix socket for plain HTTP. Raises `ConfigurationError`, about the setting ``key``."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_left_behind(path)
        before = os.umask(0o117)
        try:
            bound.bind(str(path))
        finally:
            _ = os.umask(before)
        bound.listen(_BACKLOG)
    except OSError as exc:
        bound.close()
        raise ConfigurationError(f"{key}: {path}: {_text(exc)}") from None
    return serve_plain(bound)


def serve_plain(bound: socket.socket) -> Listening:
    """Serve plain HTTP on a listening Unix socket."""
    return Listening(bound, lambda: None)


def allowed_connections(connections: int) -> int:
    """Raise the process's limit of open files; return how many connections it allows, at most ``connections``.

    At its own limit a server ends an old connection for a new one. At the system's limit it cannot accept the new one:
    then silent peers would keep all others out.
    """
    wanted = connections + SPARE_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return max(1, min(connections, soft - SPARE_FILES))


def urls(listening: list[Listening], scheme: str = "https") -> list[str]:
    """Return the addresses for clients: ``https://host:port`` or ``unix:path``."""
    named = (_named(each.socket) for each in listening)
    return [name if name.startswith("unix:") else f"{scheme}://{name}" for name in named]


def _named(given: socket.socket) -> str:
    match given.getsockname():
        case str(path):
            return f"unix:{path}"
        case (str(host), port, *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case other:
            raise LocalProtocolError(f"socket address {other!r}: give a TCP or Unix socket to serve on")


_Address = tuple[socket.AddressFamily, socket.SocketKind, int, str, "tuple[str, int] | tuple[str, int, int, int]"]


def _addresses(address: tuple[str, int]) -> list[_Address]:
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return cast("list[_Address]", found)


def _text(exc: OSError) -> str:
    """Return the text of an error without the address, which some errors have."""
    if isinstance(exc, socket.gaierror) or exc.errno is None:
        return exc.strerror or str(exc)
    return os.strerror(exc.errno)


def _remove_left_behind(path: Path) -> None:
    """Remove the socket of a server that has ended. Raises `OSError` if the path is anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))  # not a socket
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
