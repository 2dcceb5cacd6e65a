"""The supervisor of workers, with programs that are none: what it gives them, and what it does if one cannot start."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from threading import Event, get_ident

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server import workers
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.log_writer import LogWriter
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.serving import tell_manager
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.server.workers import Supervisor
from chutes_proto.io.stop_signals import SignalsToStop
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform
from tests.waiting import wait_until


def children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread ended meanwhile
            found += map(int, (task / "children").read_text().split())
    return found


def test_a_second_signal_to_stop_is_another_number_or_a_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.001, 10.002, 10.003, 10.503, 10.504])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    term, interrupt = signal.SIGTERM, signal.SIGINT
    to_stop = SignalsToStop()
    assert [*map(to_stop.is_another, [term, term, interrupt, interrupt, interrupt, interrupt])] == [
        True, False, True, False, True, False
    ]  # fmt: skip


def no_thread(_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_a_worker_that_cannot_be_started_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "manager"))
    program, log = tmp_path / "worker", tmp_path / "log"
    _ = program.write_text("#!/bin/sh\necho https://127.0.0.1:1\nexec sleep 3600\n")
    program.chmod(0o700)
    others, ready = set(children()), Event()
    site = tmp_path / "site"
    site.mkdir()
    write_server(site, SimulatedPlatform(bytes(32)), int(time.time()))
    running = Running(make_setup(ServerConfig.load(site / "server.toml")))

    def upgrade() -> None:
        try:
            assert ready.wait(60)
            first, second = workers = sorted(set(children()) - others)
            assert all(b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes() for pid in workers)
            away = program.rename(tmp_path / "away")
            os.kill(first, signal.SIGKILL)
            _ = wait_until(lambda: "worker_not_started" in log.read_text())
            assert second in children()
            with monkeypatch.context() as patch:
                patch.setattr("threading.Thread.start", no_thread)
                _ = away.rename(program)
                _ = wait_until(lambda: "can't start new thread" in log.read_text())
                assert second in children()
            _ = wait_until(lambda: len(set(children()) - others) == 2)
        finally:
            os.kill(os.getpid(), signal.SIGUSR2)

    with log.open("wb") as file, closing(LogWriter(file.fileno())) as writer, ThreadPoolExecutor() as threads:
        upgraded = threads.submit(upgrade)
        supervisor = Supervisor(running, 2, [str(program)], [], False, writer, keeps_metrics=False, stop_seconds=60)
        supervisor.run([signal.SIGUSR2], ready.set)
        upgraded.result()
    assert set(children()) <= others


@pytest.mark.parametrize("all_are_told", [False, True], ids=["the supervisor", "every process"])
def test_a_start_that_is_stopped_is_not_one_that_failed(tmp_path: Path, all_are_told: bool) -> None:
    """systemd tells every process, a container runtime the first one. The start of a worker may take long."""
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    running = Running(make_setup(ServerConfig.load(tmp_path / "server.toml")))
    others, log = set(children()), tmp_path / "log"

    def stop() -> None:
        _ = wait_until(lambda: len(set(children()) - others) == 2)
        workers = set(children()) - others
        os.kill(os.getpid(), signal.SIGUSR2)
        for pid in workers if all_are_told else ():
            os.kill(pid, signal.SIGTERM)

    with log.open("wb") as file, closing(LogWriter(file.fileno())) as writer, ThreadPoolExecutor() as one:
        told = one.submit(stop)
        program = ["sleep", "60"]
        supervisor = Supervisor(running, 2, program, [], False, writer, keeps_metrics=False, stop_seconds=60)
        begun = time.monotonic()
        supervisor.run([signal.SIGUSR2], lambda: pytest.fail("it serves"))
        assert time.monotonic() - begun < 30
        told.result()
    assert set(children()) <= others
    assert '"stopping"' in log.read_text()


def test_a_worker_that_ends_during_a_reload_is_replaced_later_and_nobody_waits(tmp_path: Path) -> None:
    """The thread that replaces it is the one that hears signals to stop."""
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    running = Running(make_setup(ServerConfig.load(tmp_path / "server.toml")))
    with closing(LogWriter(os.open("/dev/null", os.O_WRONLY))) as writer, ThreadPoolExecutor() as one:
        supervisor = Supervisor(running, 1, ["false"], [], False, writer, keeps_metrics=False, stop_seconds=60)
        with supervisor._reloading:
            one.submit(supervisor._replace, 0, -1, {}).result(30)
        assert [(event, worker) for _, event, worker in supervisor._due] == [("start", 0)]


def test_a_signal_that_does_not_end_the_wait_is_carried_out(tmp_path: Path) -> None:
    """The kernel may hand it to another thread, or just before the wait: it then ends no system call."""
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    running = Running(make_setup(ServerConfig.load(tmp_path / "server.toml")))
    program, stopped = ["sh", "-c", "echo https://127.0.0.1:1; exec sleep 3600"], Event()

    def stop() -> None:
        main = Path(f"/proc/self/task/{os.getpid()}/stat")
        _ = wait_until(lambda: main.read_text().rpartition(")")[2].split()[0] == "S")
        signal.pthread_kill(get_ident(), signal.SIGUSR2)
        if not stopped.wait(30):
            os.kill(os.getpid(), signal.SIGUSR2)
            pytest.fail("the signal was not carried out")

    with (
        (tmp_path / "log").open("wb") as file,
        closing(LogWriter(file.fileno())) as writer,
        ThreadPoolExecutor() as one,
    ):
        ending: list[Future[None]] = []
        supervisor = Supervisor(running, 1, program, [], False, writer, keeps_metrics=False, stop_seconds=60)
        supervisor.run([signal.SIGUSR2], lambda: ending.append(one.submit(stop)))
        stopped.set()
        ending[0].result()


def test_workers_without_a_place_for_their_counts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/']")

    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    running = Running(make_setup(ServerConfig.load(tmp_path / "server.toml")))
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with (tmp_path / "log").open("wb") as file, closing(LogWriter(file.fileno())) as writer:
        supervisor = Supervisor(running, 2, ["false"], [], False, writer, keeps_metrics=True, stop_seconds=60)
        with pytest.raises(
            ConfigurationError, match=r"make one, and name it in TMPDIR \(No usable temporary directory"
        ):
            supervisor.run([signal.SIGUSR2], lambda: None)


def test_servers_that_start_at_once_keep_their_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One takes a directory that another has just made, and not yet locked, for one that was left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def start(_: int) -> bool:
        with workers._counts_directory() as directory:
            return directory.is_dir()

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(start, range(1200)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can see what another user left")
def test_the_counts_of_another_users_server_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with workers._counts_directory() as another:
        pass
    another.mkdir()
    os.chown(another, 65534, 65534)
    with workers._counts_directory():
        assert another.is_dir()


@pytest.mark.parametrize("name", ["manager", "user@1000"])
def test_a_service_manager_is_told_at_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / name))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / name))
        tell_manager("READY=1")
        assert manager.recv(64) == b"READY=1"
