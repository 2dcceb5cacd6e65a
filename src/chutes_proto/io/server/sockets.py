"""Sockets that a server listens on, made before any event loop runs.

Rules kept here:

* a TCP socket carries TLS; a unix socket carries plain HTTP, because whoever may open it is trusted: its mode is 0660;
* a unix socket that a server left behind is replaced; one on which somebody answers is not, nor any other file;
* a server has no more connections than the system lets it open.
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
"""What a server has open beside its connections: listeners, store, collateral, the hosts and services that it asks."""

_BACKLOG: Final = 1024


@frozen
class Listening:
    """A listening socket, and what makes the TLS session of a connection to it, or None where there is no TLS."""

    socket: socket.socket
    session: Callable[[], TlsSession | None]


def listen_tls(address: tuple[str, int], context: Callable[[], ServerContext]) -> list[Listening]:
    """Listen on every address that a host and port mean. ``context`` is asked at each connection.

    Raises `ConfigurationError`.
    """
    host, port = address
    listening: list[Listening] = []
    try:
        for family, _, _, _, name in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            bound = socket.create_server(name, family=family, backlog=_BACKLOG)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # those that it accepts have it from it
            listening.append(Listening(bound, lambda: TlsSession(context())))
    except OSError as exc:
        for place in listening:
            place.socket.close()
        raise ConfigurationError(f"listen: {host}:{port}: {_text(exc)}") from None
    return listening


def listen_unix(path: Path) -> Listening:
    """Listen on a unix socket for plain HTTP. Raises `ConfigurationError`."""
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


def room_for(connections: int) -> int:
    """How many connections may be open, at most ``connections``, once the process may open as many files as it can.

    One that could not be opened would be no connection that another ends for: then silent peers would keep all others
    out.
    """
    wanted = connections + SPARE_FILES
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in _limits())
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _limits()[1]))
    return max(1, min(connections, soft - SPARE_FILES))


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def urls(listening: list[Listening]) -> list[str]:
    """Where clients reach the sockets: ``https://host:port`` or ``unix:path``."""
    found: list[str] = []
    for place in listening:
        match place.socket.getsockname():
            case str(path):
                found.append(f"unix:{path}")
            case (str(host), port, *_):
                found.append(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")
            case other:
                raise LocalProtocolError(f"not a socket to serve on: {other!r}")
    return found


def _text(exc: OSError) -> str:
    """Without the address, which some add."""
    if isinstance(exc, socket.gaierror) or exc.errno is None:
        return exc.strerror or str(exc)
    return os.strerror(exc.errno)


def _remove_left_behind(path: Path) -> None:
    """Remove the socket of a server that is gone. Raises `OSError` where something else is in the way."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))  # it is no socket
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
