"""The control socket: who may ask there, what is answered, and what a command makes of other programs."""

from __future__ import annotations

import errno
import os
import pwd
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.server.control import Control, ask_to_reload
from chutes_proto.log import Record

SYSTEM = "/usr/bin/python3"
DONE: dict[str, object] = {"ok": True, "changes": [], "needs_restart": [], "warnings": [], "configuration": ""}


@pytest.fixture
def callers() -> list[str]:
    return []


@pytest.fixture
def path(tmp_path: Path, callers: list[str]) -> Iterator[Path]:
    def reload(caller: str) -> dict[str, object]:
        callers.append(caller)
        return DONE

    control = Control(tmp_path / "control", reload, log_record)
    control.open()
    yield tmp_path / "control"
    control.close()
    assert not list(tmp_path.glob("control*"))


def test_the_server_answers_and_knows_who_asks(path: Path, callers: list[str]) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask_to_reload(path) == DONE
    assert callers == [f"uid {os.geteuid()}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can ask as another user")
@pytest.mark.skipif(not Path(SYSTEM).exists(), reason="another user may not run this Python")
def test_another_user_is_refused_also_where_the_file_lets_him() -> None:
    """He fills no log either: of each user, twenty lines at once."""
    nobody, logged = pwd.getpwnam("nobody").pw_uid, list[Record]()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder) / "control"
        control = Control(path, lambda _: {"ok": True}, logged.append)
        control.open()
        path.chmod(0o666)
        program = "import socket, sys\nfor _ in range(30):\n    s = socket.socket(socket.AF_UNIX)\n"
        program += "    s.connect(sys.argv[1])\n    print(s.recv(999))"
        asking = [SYSTEM, "-I", "-c", program, str(path)]
        said = subprocess.run(asking, user=nobody, cwd="/", capture_output=True, text=True, check=True).stdout
        control.close()
    assert said.count(f"user {nobody} may not ask") == 30
    assert {record.event for record in logged} == {"stranger_refused"}
    assert f"control: {path}: a process of user {nobody} asked there and was refused" in str(logged[0].fields)
    assert 20 <= len(logged) < 30


def test_another_request_is_refused(path: Path, callers: list[str]) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        stranger.sendall(b"restart")
        assert b"the only request is reload" in stranger.makefile("rb").readline()
    assert callers == []


def test_a_server_without_a_free_descriptor_answers_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, faults = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def scarce(listening: socket.socket) -> tuple[socket.socket, object]:
        if faults:
            raise faults.pop()
        return accept(listening)

    monkeypatch.setattr(socket.socket, "accept", scarce)  # for the second: the first is waited for already
    monkeypatch.setattr("chutes_proto.io.server.control.RELOAD_SECONDS", 20.0)
    assert [ask_to_reload(path) for _ in range(2)] == [DONE] * 2
    assert not faults


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"control: .*No such file"):
        _ = Control(tmp_path / "nowhere" / "control", lambda _: {}, log_record)


@pytest.mark.parametrize("kind", ["a file", "a folder", "a link"])
def test_what_is_not_a_socket_is_not_replaced(tmp_path: Path, kind: str) -> None:
    """A mistyped path may be that of a key."""
    path = tmp_path / "kek"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link":
        path.symlink_to("elsewhere")
    else:
        path.touch()
    before = path.lstat()
    with pytest.raises(ConfigurationError, match=r"control: .*kek: it is not a socket; name another path, or remove"):
        _ = Control(path, lambda _: {}, log_record)
    assert list(tmp_path.iterdir()) == [path]
    assert path.lstat() == before


def test_the_socket_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control"))
    control = Control(tmp_path / "control", lambda _: DONE, log_record)
    control.open()
    assert ask_to_reload(tmp_path / "control") == DONE
    control.close()


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"220 mail ESMTP\r\n", b"x" * (1024 * 1024 + 70_000)),
        *(b"[]", b"{}", b'{"ok": true}', b'{"ok": false}', b'{"ok": 1, "changes": [], "needs_restart": []}'),
        *(b'{"ok": true, "changes": "all", "needs_restart": []}', b'{"ok": true, "changes": [1], "needs_restart": []}'),
        *(
            b'{"ok": true, "changes": [], "needs_restart": [], "configuration": "", "warnings": %s}' % each
            for each in (b"1", b"[1]")
        ),
        b'{"ok": true, "changes": [], "needs_restart": [], "warnings": [], "configuration": null}',
    ],
    ids=lambda said: said[:60].decode(),
)
def test_another_program_is_not_taken_for_a_server(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control"))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                _ = connection.recv(100)
                for begin in range(0, len(said), 65536):
                    try:
                        connection.sendall(said[begin : begin + 65536])
                    except OSError:  # the command has seen enough
                        return

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigurationError, match="no key server answers there; name another path"):
            _ = ask_to_reload(tmp_path / "control")
        thread.join(60)


def test_no_server_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match="no server answers: No such file or directory; start one, or send it SIGHUP"
    ):
        _ = ask_to_reload(tmp_path / "control")


def test_a_server_that_takes_long_is_not_called_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chutes_proto.io.server.control.RELOAD_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control"))
        listening.listen()
        with pytest.raises(ConfigurationError, match="has not answered for 0 s and may still reload: its log"):
            _ = ask_to_reload(tmp_path / "control")
