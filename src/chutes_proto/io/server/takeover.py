"""A running server hands its listening sockets to the next one, over a Unix socket that only its user may open.

Rules kept here:

* the sockets stay open in one process or the other at every moment, so connections that arrive meanwhile wait in the
  kernel's queue and none is refused;
* the running server goes on as if nothing had happened until its successor says that it serves;
* the successor uses the same store, because it redeems the tokens and nonces of the other's boots.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Final

import anyio
from attrs import frozen

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.sockets import ACCEPT_PAUSE, PrivateSocket, StrangerError, check_peer
from chutes_proto.log import Record

START_SECONDS: Final = 60.0
"""How long a running server waits for a successor that has taken its sockets and does not serve yet."""

_MOST_SOCKETS: Final = 64
_MOST_BYTES: Final = 4096
_SERVES: Final = b"s"


@frozen
class TakenOver:
    """The listening ``sockets`` of a running server; it waits on ``connection`` to hear that this one serves."""

    sockets: tuple[tuple[str, socket.socket], ...]
    """Each with the setting that it was opened for."""
    connection: socket.socket

    def confirm(self) -> None:
        """Tell the other server that this one serves; it accepts no more from now on."""
        with suppress(OSError), self.connection:  # it may have ended meanwhile
            self.connection.sendall(_SERVES)

    def leave(self) -> None:
        """Leave the sockets to the other server, which goes on."""
        for each in (self.connection, *(each for _, each in self.sockets)):
            each.close()


def take_over(path: Path, store: str) -> TakenOver | None:
    """Return the sockets of the server that answers at ``path``; None if none does.

    Raises `ConfigurationError` if that server does not use the store with the name ``store``.
    """
    with ExitStack() as opened:
        connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(START_SECONDS)
        try:
            connection.connect(str(path))
            _ = check_peer(connection)  # a stranger could go on accepting on his sockets
            data, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, _MOST_SOCKETS)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except ConnectionResetError:  # it handed over to another one while we waited for our turn, or it has ended
            return take_over(path, store)
        except StrangerError as exc:
            raise ConfigurationError(
                f"takeover: {path}: a process of user {exc.user} answers there; name another path"
            ) from None
        except OSError as exc:
            raise ConfigurationError(f"takeover: {path}: {exc.strerror or exc}") from None
        sockets = [opened.enter_context(socket.socket(fileno=descriptor)) for descriptor in descriptors]
        try:
            offered = json.loads(data)
            running, keys = str(offered["store"]), [str(key) for key in offered["sockets"]]
            named = tuple(zip(keys, sockets, strict=True))
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"takeover: {path}: no key server answers there; name another path") from None
        if running != store:
            raise ConfigurationError(
                f"takeover: the running server uses the store {running} and this configuration {store};"
                " stop that server, or name another path"
            )
        _ = opened.pop_all()
        return TakenOver(named, connection)


class Door(PrivateSocket):
    """The socket at which a successor asks. Until `open` it has another name, so that the present server keeps its own.

    Raises `ConfigurationError` for a path that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("takeover", path)
        self.socket.setblocking(False)

    async def successor(
        self, store: str, sockets: Sequence[tuple[str, socket.socket]], log: Callable[[Record], None]
    ) -> None:
        """Offer ``sockets``, each with its setting, to all who ask; return once one of them serves on them."""
        message = json.dumps({"store": store, "sockets": [key for key, _ in sockets]}).encode()
        descriptors = [each.fileno() for _, each in sockets]
        while True:
            await anyio.wait_readable(self.socket)
            try:
                connection, _ = self.socket.accept()
            except OSError:  # the other went away, or there are no file descriptors left
                await anyio.sleep(ACCEPT_PAUSE)
                continue
            with suppress(OSError, StrangerError), closing(connection), anyio.move_on_after(START_SECONDS):
                _ = self.peer(connection, log)
                connection.setblocking(False)
                _ = socket.send_fds(connection, [message], descriptors)
                await anyio.wait_readable(connection)
                if connection.recv(1) == _SERVES:
                    return
