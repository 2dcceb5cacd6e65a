"""The Unix socket at which an operator's command asks a running server to reload, and the command's end of it.

Rules kept here:

* only the server's user and root may ask: the mode of the socket is 0600, and the kernel says who is at the other end.
  A stranger who got there, as by an access list, is refused and logged;
* a socket that a server left behind is replaced once this one serves, and never what is not a socket.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from struct import calcsize, unpack
from typing import Any, Final, cast

from chutes_proto.errors import ConfigurationError
from chutes_proto.log import Level, Record, Value
from chutes_proto.server._limits import LogThrottle

RELOAD_SECONDS: Final = 120.0
"""How long a command waits for a reload: a database may be slow, and every worker reads its files."""

_ASKED: Final = b"reload\n"
_ASKING_SECONDS: Final = 10.0
_PAUSE: Final = 1.0
_MOST: Final = 1024 * 1024


class Control:
    """Answers at ``path``; ``reload`` is called in a thread of its own, with the words that name the caller.

    Until `open` it has another name. Raises `ConfigurationError` for a path that cannot be used.
    """

    def __init__(
        self, path: Path, reload: Callable[[str], Mapping[str, object]], log: Callable[[Record], None]
    ) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._log = log
        self._refusals = LogThrottle()
        self._made = path.with_name(f"{path.name}.{os.getpid()}")
        before = os.umask(0o177)
        try:
            if not _may_be_replaced(path):
                raise OSError(errno.EEXIST, "it is not a socket; name another path, or remove it")
            self._made.unlink(missing_ok=True)  # of a process with the same number that was killed
            self._socket.bind(str(self._made))
            self._socket.listen()
        except OSError as exc:
            self._socket.close()
            raise self._unusable(exc) from None
        finally:
            _ = os.umask(before)
        self._reload = reload
        self._closed = threading.Event()
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def open(self) -> None:
        """Take the path: who asks there from now on asks this server. Raises `ConfigurationError`."""
        try:
            _ = self._made.replace(self._path)
        except OSError as exc:
            raise self._unusable(exc) from None
        self._made = self._path

    def close(self) -> None:
        """Close it, and remove its file."""
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it
        self._socket.close()
        self._made.unlink(missing_ok=True)

    def _unusable(self, exc: OSError) -> ConfigurationError:
        return ConfigurationError(f"control: {self._path}: {exc.strerror or exc}")

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or no descriptor is free
                if self._closed.wait(_PAUSE):
                    return
                continue
            with connection, suppress(OSError):
                connection.settimeout(_ASKING_SECONDS)
                connection.sendall(json.dumps(self._answer(connection)).encode() + b"\n")

    def _answer(self, connection: socket.socket) -> Mapping[str, object]:
        _, user, _ = unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, calcsize("3i")))
        if user not in (0, os.geteuid()):
            self._note_stranger(user)
            return {"ok": False, "error": f"user {user} may not ask; ask as the server's user or as root"}
        if connection.recv(len(_ASKED), socket.MSG_WAITALL) != _ASKED:
            return {"ok": False, "error": "the only request is reload"}
        return self._reload(f"uid {user}")

    def _note_stranger(self, user: int) -> None:
        if (held_back := self._refusals.admits(str(user), time.monotonic())) is not None:
            about = f"control: {self._path}: a process of user {user} asked there and was refused"
            remedy = "let only the server's user reach it: chmod 600, and no access list for others (getfacl)"
            fields: dict[str, Value] = {"about": f"{about}; {remedy}"}
            fields |= {"held_back": held_back} if held_back else {}
            self._log(Record(Level.WARNING, "stranger_refused", fields, is_noise=True))


def _may_be_replaced(path: Path) -> bool:
    """Whether there is a socket itself, no link to one, or nothing any more: a server may just be ending."""
    try:
        return stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return True


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
    match said:
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
