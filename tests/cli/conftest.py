"""The command line as a user runs it: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from fcntl import F_SETPIPE_SZ, fcntl, ioctl
from pathlib import Path
from struct import unpack
from termios import FIONREAD
from typing import IO, Any

import httpx
import pytest
from attrs import define, frozen

from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.cli.main import main
from tests.waiting import wait_until

PROGRAM = [sys.executable, "-m", "chutes_proto"]
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


@frozen
class Ended:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output."""
        (line,) = self.out.splitlines()
        return json.loads(line)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs one command in this process: ``command("verify", path, …)``."""

    def run(*arguments: object) -> Ended:
        _ = capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ended(code, captured.out, captured.err)

    return run


_LINE = 40


def killed_after_a_line(command: Sequence[object]) -> str:
    """What a command says first on standard error, where it is killed before it has said the next line.

    There is no room for that one: the command waits with it, however late this process is.
    """
    heard, said = os.pipe()
    size = fcntl(said, F_SETPIPE_SZ, 1)  # a page, which is the least
    _ = os.write(said, bytes(size - _LINE))

    def has_spoken() -> bool:
        (waiting,) = unpack("i", ioctl(heard, FIONREAD, bytes(4)))
        return waiting > size - _LINE or process.poll() is not None

    with subprocess.Popen([*map(str, command)], stderr=said, stdout=subprocess.DEVNULL) as process:
        _ = wait_until(has_spoken)
        process.kill()
    line = os.read(heard, size)[size - _LINE :].decode()
    os.close(heard)
    os.close(said)
    return line


@define
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    ca: Path
    said: list[str]

    def stop(self, signal: int) -> Ended:
        """Send a signal, wait for the end, and hand out what else it said."""
        self.process.send_signal(signal)
        out, err = self.process.communicate(timeout=60)
        return Ended(self.process.returncode, out, err)


def start_server(*arguments: object, ca: Path | None = None, stderr: int | IO[str] = subprocess.PIPE) -> Server:
    """Start ``serve`` with more arguments, and read its standard output until it has said what it is."""
    command = [*PROGRAM, "serve", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    url = ""
    said: list[str] = []
    while not url or ca is None:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        said.append(line)
        last = line.split()[-1]
        if last.startswith("https://"):
            url = last
        elif last.endswith(".pem"):
            ca = Path(last)
    return Server(process, url, ca, said)


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """`start_server`, for servers that end with the test."""
    started: list[Server] = []

    def run(*arguments: object, **settings: Any) -> Server:
        started.append(start_server(*arguments, **settings))
        return started[-1]

    yield run
    for server in started:
        end(server.process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process as an operator does, so that it removes what it made; kill it only where it does not heed that."""
    process.terminate()
    try:
        _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _ = process.communicate()


@pytest.fixture(autouse=True)
def no_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing here touches the platform of the user who runs the tests."""
    state = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    return state


def is_root() -> bool:
    """Root reads everything, so that what is unreadable cannot be tried."""
    return os.geteuid() == 0


ONCE = RetryPolicy(attempts=1)


def is_ready(server: Server) -> bool:
    """As a balancer asks."""
    context = ssl.create_default_context(cafile=server.ca)
    return httpx.get(f"{server.url}/servers/nonce", verify=context).status_code == httpx.codes.OK
