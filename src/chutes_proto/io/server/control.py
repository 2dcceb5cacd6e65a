"""The Unix socket at which an operator's command asks a running server to reload, and the command's end of it.

Rules kept here:

* only the server's user and root may ask: the socket is a private one, and the kernel says who asks.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.sockets import PrivateSocket, StrangerError
from chutes_proto.log import Record

RELOAD_SECONDS: Final = 120.0
"""How long a command waits for a reload: a database may be slow, and every worker reads its files."""

_ASKED: Final = b"reload\n"
_ASKING_SECONDS: Final = 10.0
_PAUSE: Final = 1.0
_MOST: Final = 1024 * 1024


class Control(PrivateSocket):
    """Answers at ``path``; ``reload`` is called in a thread of its own, with the words that name the caller.

    Until `open` it has another name. Raises `ConfigurationError` for a path that cannot be used.
    """

    def __init__(
        self, path: Path, reload: Callable[[str], Mapping[str, object]], log: Callable[[Record], None]
    ) -> None:
        super().__init__("control", path)
        self._log = log
        self._reload = reload
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def close(self, *, is_successors: bool) -> None:
        """Close it, and remove its file unless the path ``is_successors``."""
        self._closed.set()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
        super().close(is_successors=is_successors)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed, or no descriptor is free
                if self._closed.wait(_PAUSE):
                    return
                continue
            with connection, suppress(OSError):
                connection.settimeout(_ASKING_SECONDS)
                connection.sendall(json.dumps(self._answer(connection)).encode() + b"\n")

    def _answer(self, connection: socket.socket) -> Mapping[str, object]:
        try:
            user = self.peer(connection, self._log)
        except StrangerError as exc:
            return {"ok": False, "error": f"user {exc.user} may not ask; ask as the server's user or as root"}
        if connection.recv(len(_ASKED), socket.MSG_WAITALL) != _ASKED:
            return {"ok": False, "error": "the only request is reload"}
        return self._reload(f"uid {user}")


def ask_to_reload(path: Path) -> dict[str, Any]:
    """Ask the server at ``path`` to reload, and return its answer. Raises `ConfigurationError` if none answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(RELOAD_SECONDS)
        try:
            connection.connect(str(path))
            connection.sendall(_ASKED)
            said = b""
            while piece := connection.recv(65536):
                said += piece
                if len(said) > _MOST:
                    break
            answer = _answer_of(json.loads(said))
        except PermissionError:
            raise ConfigurationError(
                f"control: {path}: only root and the server's user may ask; run it as one of them"
            ) from None
        except TimeoutError:
            raise ConfigurationError(
                f"control: {path}: the server has not answered for {RELOAD_SECONDS:.0f} s and may still reload: its log"
                " says reloaded or reload_refused"
            ) from None
        except OSError as exc:
            raise ConfigurationError(
                f"control: {path}: no server answers: {exc.strerror or exc}; start one, or send it SIGHUP if it was"
                " started with another control"
            ) from None
        except ValueError:
            raise ConfigurationError(f"control: {path}: no key server answers there; name another path") from None
        return answer


def _answer_of(said: Any) -> dict[str, Any]:
    """The answer of a key server. Raises `ValueError` for anything else."""
    since: dict[str, object] = {"warnings": [], "configuration": ""}  # an older release does not say these
    found: Any = since | cast("dict[str, Any]", said) if isinstance(said, dict) else since
    match found:
        case {
            "ok": True,
            "changes": [*changes],
            "needs_restart": [*names],
            "warnings": [*warnings],
            "configuration": str(),
        } if all(isinstance(text, str) for text in (*changes, *names, *warnings)):
            pass
        case {"ok": False, "error": str()}:
            pass
        case _:
            raise ValueError("not the answer of a key server")
    return cast("dict[str, Any]", said)
