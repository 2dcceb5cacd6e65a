"""The door of a running server: who may answer there, and what it costs when nobody can be answered."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.takeover import Door, take_over
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


def test_without_file_descriptors_it_waits_and_does_not_spin(tmp_path: Path) -> None:
    door = Door(tmp_path / "door")
    door.open()

    async def ask() -> float:
        began = time.process_time()
        with anyio.move_on_after(1):
            await door.successor("", [])
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
