"""Listening sockets of a server, made before any event loop runs.

Rules kept here:

* a TCP socket carries TLS; a Unix socket carries plain HTTP, because every process that may open it is trusted: its
  mode is 0660;
* a Unix socket that a server left behind is replaced; one on which a server answers is not, nor is any other file;
* a server has no more connections than the system allows it open files.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from attrs import frozen

from chutes_proto.errors import ConfigurationError, LocalProtocolError
from chutes_proto.transport.tls import ServerContext, TlsSession

ACCEPT_PAUSE: Final = 0.2
"""Seconds to wait after a connection could not be accepted."""

SPARE_FILES: Final = 128
"""How many files a server opens besides connections: listeners, store, collateral, hosts and services it asks."""

_BACKLOG: Final = 1024


@frozen
class Listening:
    """A listening socket, and a function that makes the TLS session of a connection, None for plain HTTP."""

    socket: socket.socket
    session: Callable[[], TlsSession | None]


def listen_tls(address: tuple[str, int], context: Callable[[], ServerContext]) -> list[Listening]:
    """Listen on every address of a host and port. ``context`` is called for each connection.

    Raises `ConfigurationError`.
    """
    host, port = address
    listening: list[Listening] = []
    try:
        for family, _, _, _, name in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            # "::" is every address of the machine, as for other servers: IPv4 clients come as mapped addresses.
            dual = host == "::" and socket.has_dualstack_ipv6()
            bound = socket.create_server(name, family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
            listening.append(Listening(bound, lambda: TlsSession(context())))
    except OSError as exc:
        for opened in listening:
            opened.socket.close()
        raise ConfigurationError(f"listen: {host}:{port}: {_text(exc)}") from None
    return listening


def listen_unix(path: Path) -> Listening:
    """Listen on a Unix socket for plain HTTP. Raises `ConfigurationError`."""
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
        raise ConfigurationError(f"proxy.unix: {path}: {_text(exc)}") from None
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


def urls(listening: list[Listening]) -> list[str]:
    """Return the addresses for clients: ``https://host:port`` or ``unix:path``."""
    found: list[str] = []
    for each in listening:
        match each.socket.getsockname():
            case str(path):
                found.append(f"unix:{path}")
            case (str(host), port, *_):
                found.append(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")
            case other:
                raise LocalProtocolError(f"socket address {other!r}: give a TCP or Unix socket to serve on")
    return found


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
