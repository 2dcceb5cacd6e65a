"""The door of a running server: who may answer there, and what it costs when nobody can be answered."""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.server.takeover import Door, take_over
from chutes_proto.log import Record
from tests.loops import on_loop

STRANGER = 65534
LISTEN = f"import os, socket, sys; os.setuid({STRANGER}); socket.socket(fileno=int(sys.argv[1])).listen()"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_strangers_sockets_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(path))
        listen = [sys.executable, "-I", "-S", "-c", LISTEN, str(door.fileno())]
        _ = subprocess.run(listen, pass_fds=[door.fileno()], check=True)
        with pytest.raises(ConfigurationError, match=f"a process of user {STRANGER} answers there"):
            _ = take_over(path, "sqlite:keys.db")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_stranger_gets_no_sockets_also_where_the_file_lets_him(tmp_path: Path) -> None:
    """The access list of a folder may say more than the mode of the file."""
    path, heard, logged = tmp_path / "door", list[str](), list[Record]()
    tmp_path.chmod(0o755)
    ask = "import os, socket, sys; s = socket.socket(fileno=int(sys.argv[1])); os.setuid(int(sys.argv[2]));"
    ask += " s.connect(sys.argv[3]); said, sockets, *_ = socket.recv_fds(s, 99, 9); print(said, len(sockets))"

    def asking(user: int) -> None:
        with socket.socket(socket.AF_UNIX) as asker:
            words = [sys.executable, "-I", "-S", "-c", ask, str(asker.fileno()), str(user), path.name]
            with subprocess.Popen(
                words, pass_fds=[asker.fileno()], cwd=tmp_path, stdout=subprocess.PIPE, text=True
            ) as process:
                heard.append(process.communicate(timeout=60)[0])

    async def main() -> None:
        with socket.socket() as listening:
            async with anyio.create_task_group() as group:
                _ = group.start_soon(door.successor, "keys", [("listen", listening)], logged.append)
                for user in (STRANGER, 0):
                    await anyio.to_thread.run_sync(asking, user)
                group.cancel_scope.cancel()

    door = Door(path)
    door.open()
    path.chmod(0o666)
    on_loop("trio", main)
    door.close(is_successors=False)
    assert heard == ["b'' 0\n", """b'{"store": "keys", "sockets": ["listen"]}' 1\n"""]
    (record,) = logged
    assert record.event == "stranger_refused"
    assert f"takeover: {path}: a process of user {STRANGER} asked there and was refused; let only" in str(record.fields)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_sockets_go_to_a_successor_with_the_same_store(tmp_path: Path, loop: str) -> None:
    path = tmp_path / "door"
    assert take_over(path, "keys") is None
    door = Door(path)
    door.open()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def ask() -> None:
            with pytest.raises(ConfigurationError, match="uses the store keys and this configuration other"):
                _ = take_over(path, "other")
            left = take_over(path, "keys")
            assert left is not None
            left.leave()  # at once: a connection that reached a socket of one who does not accept would wait for ever
            assert [each.fileno() for each in (left.connection, *(each for _, each in left.sockets))] == [-1, -1]
            taken = take_over(path, "keys")
            assert taken is not None
            ((key, given),) = taken.sockets
            with given:
                assert (key, given.getsockname()) == ("listen", listening.getsockname())
            taken.confirm()

        async def main() -> None:
            with anyio.fail_after(60):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, ask)
                    await door.successor("keys", [("listen", listening)], log_record)

        on_loop(loop, main)
    door.close(is_successors=True)
    assert path.exists()
    assert take_over(path, "keys") is None


def test_one_that_waits_while_another_takes_over_asks_that_one(tmp_path: Path) -> None:
    """The connections that a server has not accepted are reset when its door closes."""
    path = tmp_path / "door"
    taken: list[str] = []

    async def main() -> None:
        with anyio.move_on_after(20):
            await second.successor("keys", [("listen", listening)], log_record)

    def ask() -> None:
        found = take_over(path, "keys")
        assert found is not None
        for key, each in found.sockets:
            each.close()
            taken.append(key)
        found.confirm()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        first = Door(path)
        first.open()
        second = Door(path)
        asking = threading.Thread(target=ask)
        asking.start()
        assert select.select([first.socket], [], [], 60)[0]
        second.open()
        first.close(is_successors=True)
        on_loop("trio", main)
        asking.join(60)
    second.close(is_successors=True)
    assert taken == ["listen"]


@pytest.mark.parametrize("said", [b"", b"{}", b"[]", b'{"store": "keys", "sockets": ["listen"]}', b"\xff"])
def test_another_program_is_not_taken_for_a_server(tmp_path: Path, said: bytes) -> None:
    path = tmp_path / "door"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()

        def answer() -> None:
            accepted, _ = other.accept()
            with accepted:
                accepted.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigurationError, match="no key server answers there"):
            _ = take_over(path, "keys")
        thread.join()


def test_a_door_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"takeover: .*No such file"):
        _ = Door(tmp_path / "nowhere" / "door")


def test_without_file_descriptors_it_waits_and_does_not_spin(tmp_path: Path) -> None:
    door = Door(tmp_path / "door")
    door.open()

    async def ask() -> float:
        began = time.process_time()
        with anyio.move_on_after(1):
            await door.successor("", [], log_record)
        return time.process_time() - began

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(tmp_path / "door"))

        async def main() -> float:
            await anyio.lowlevel.checkpoint()  # the loop has its own by now
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
            try:
                return await ask()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        assert on_loop("trio", main) < 0.1
    door.close(is_successors=False)
