"""`agent`: its help, its closing, and how it ends after a fault of its own, its deadline and signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from chutes_proto.auth import client_identity
from chutes_proto.cli.agent.progress import Progress
from chutes_proto.cli.main import main
from chutes_proto.io.agent import IN_MEMORY, file_system
from chutes_proto.log import Record
from tests.block_devices import Mappings, attached
from tests.cli.conftest import HOTKEY, PROGRAM, Ended
from tests.dev_server import DevServer, dev_server
from tests.luks.headers import image
from tests.waiting import send_twice, wait_until

Command = Callable[..., Ended]

SETTINGS = f"""
servers = ["https://127.0.0.1:1"]
quoter = "command:false"
hotkey = "{HOTKEY}"
vm_name = "vm-1"
retry = {{ attempts = 1 }}
root = {{ device = "/nowhere/root", mapping = "rootfs" }}
volumes.storage.device = "/nowhere/storage"
disk_wait_seconds = 0
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def run(more: str = "") -> Path:
        path = tmp_path / "agent.toml"
        _ = path.write_text(SETTINGS + more)
        return path

    return run


@pytest.mark.parametrize("arguments", [[], ["halt"], ["run"], ["resume", "--config", "a", "--dry-run"]], ids=str)
def test_wrong_usage(command: Command, arguments: list[str]) -> None:
    assert command("agent", *arguments).code == 2


def test_disks_that_are_not_there(command: Command, write: Callable[[str], Path]) -> None:
    ended = command("agent", "run", "--config", write(""))
    assert ended.code == 1
    told = " ".join(ended.err.split())
    assert "BOOT FAILED reason /nowhere/root: it cannot be opened: No such file or directory" in told


@pytest.mark.parametrize("more", [(), ("--json",)], ids=str)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_its_output_changes_no_outcome(
    write: Callable[[str], Path], more: tuple[str, ...], unbuffered: str
) -> None:
    words = [*PROGRAM, "agent", "run", "--config", str(write("")), *more]
    with Path("/dev/full").open("w") as full:
        environ = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=environ, check=False)
    assert ended.returncode == 1
    assert b"No space left" not in ended.stderr


def test_a_fault_of_its_own_is_a_failed_boot_like_any_other(
    command: Command, write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret, perhaps")

    monkeypatch.setattr(client_identity, "make_client_identity", fail)
    gone = tmp_path / "went-off"
    more = f'on_failure = {{ action = "reboot", wait_seconds = 0, reboot = ["touch", "{gone}"] }}\n'
    ended = command("agent", "run", "--config", write(more))
    assert ended.code == 2
    assert "a fault of the agent's own, ZeroDivisionError" in " ".join(ended.err.split())
    assert "perhaps" not in ended.err.replace('raise ZeroDivisionError("a secret, perhaps")', "")
    assert gone.exists()
    assert "next" in ended.err
    gone.unlink()

    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError

    monkeypatch.setattr("sys.stderr", Gone())
    _ = main(["agent", "run", "--config", str(tmp_path / "agent.toml")])
    assert gone.exists()


def write_settings(folder: Path, server: DevServer, said: Mapping[str, object]) -> Path:
    """Settings for a boot at ``server``, and what else they say."""
    usual = {"servers": [server.url], "ca_file": str(server.ca), "hotkey": HOTKEY, "vm_name": "vm-1"}
    lines = {**usual, "quoter": f"simulated:{server.platform}", **said}
    settings = folder / "agent.toml"
    _ = settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    return settings


@pytest.fixture
def cryptsetup(require_program: Callable[[str], str]) -> str:
    """Without the program a boot ends before anything is asked."""
    return require_program("cryptsetup")


@pytest.mark.usefixtures("cryptsetup")
@pytest.mark.parametrize("key", ["quoter", "signer"])
def test_the_deadline_is_that_of_quotes_and_signatures(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("chutes_proto.io.agent.LEAST_SECONDS", 2.0)
    with dev_server(tmp_path / "platform") as server, (tmp_path / "disk").open("wb") as disk:
        _ = disk.truncate(32 << 20)
        said = {key: "command:sleep 600", "retry.deadline_seconds": 3, "volumes.storage.device": disk.name}
        settings = write_settings(tmp_path, server, said)
        begun = time.monotonic()
        ended = command("agent", "run", "--images", "--config", settings)
    assert (ended.code, time.monotonic() - begun < 60) == (2, True)
    told = " ".join(ended.err.split())
    assert "sleep: the deadline, retry.deadline_seconds, ended it means " in told


@pytest.mark.usefixtures("cryptsetup")
def test_a_dry_run_makes_no_platform(command: Command, write: Callable[[str], Path], tmp_path: Path) -> None:
    disk, platform = tmp_path / "disk", tmp_path / "platform"
    _ = disk.write_bytes(bytes(20 << 20))
    settings = write("")
    text = settings.read_text().replace("command:false", f"simulated:{platform}")
    _ = settings.write_text(text.replace("/nowhere/storage", str(disk)).replace("root = ", "# root = "))
    ended = command("agent", "run", "--config", settings, "--images", "--dry-run")
    assert (ended.code, "nothing is mapped" in ended.out) == (0, True)
    assert not platform.exists()


def test_a_dry_run_finds_that_seed_and_hotkey_do_not_belong_together(
    command: Command, write: Callable[[str], Path], tmp_path: Path
) -> None:
    _ = (tmp_path / "miner-seed").write_text("11" * 32)
    settings = write(f'signer = "config-volume"\nconfig_volume.directory = "{tmp_path}"\n')
    ended = command("agent", "run", "--config", settings, "--dry-run")
    assert (ended.code, "config volume: the seed or private key is not that of the hotkey" in ended.err) == (2, True)


def test_a_dry_run_finds_that_state_would_be_left_on_a_disk(
    command: Command, write: Callable[[str], Path], tmp_path: Path
) -> None:
    if file_system(tmp_path) in IN_MEMORY:
        pytest.skip(f"{tmp_path} is in memory")
    left = tmp_path / "state"
    for place in (left / "boot.json", left / "deeper" / "boot.json"):
        ended = command(
            *("agent", "run", "--dry-run", "--config"), write(f'volumes_at = "resume"\nstate.file = "{place}"\n')
        )
        assert (ended.code, f"{place}: on " in ended.err, "not in memory" in ended.err) == (2, True, True), ended.err
    assert not left.exists()


def test_a_ca_file_that_is_none_is_named(command: Command, write: Callable[[str], Path]) -> None:
    ended = command("agent", "run", "--config", write('ca_file = "/dev/null"\n'), "--dry-run")
    assert (ended.code, "/dev/null: not one or more PEM certificates" in ended.err) == (2, True)


# --- signals ---


def heard(agent: subprocess.Popen[str], text: str) -> None:
    assert agent.stderr is not None
    said = ""
    while text not in (line := agent.stderr.readline()):
        said += line
        assert line, f"it ended with {agent.wait(60)} before {text}: {said}"


@pytest.mark.usefixtures("cryptsetup")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], ids=lambda it: it.name)
@pytest.mark.parametrize("ends_boot", [True, False], ids=["boot", "wait"])
def test_a_signal_is_a_failure_or_ends_the_wait(tmp_path: Path, sent: signal.Signals, ends_boot: bool) -> None:
    attempts, awaited, code = (30, "trying again", 128 + sent) if ends_boot else (1, "next  ", 2)
    disk, gone, settings = tmp_path / "disk", tmp_path / "went-off", tmp_path / "agent.toml"
    _ = disk.write_bytes(bytes(20 << 20))
    lines = {
        "servers": ["https://127.0.0.1:1"],
        "hotkey": HOTKEY,
        "vm_name": "vm-1",
        "retry.attempts": attempts,
        "volumes.storage.device": str(disk),
        "on_failure.action": "poweroff",
        "on_failure.wait_seconds": 0 if ends_boot else 3600,
        "on_failure.poweroff": ["touch", str(gone)],
    }
    _ = settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
    command = [*PROGRAM, "agent", "run", "--images", "--config", str(settings)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
        heard(agent, awaited)
        agent.send_signal(sent)
        said = agent.communicate(timeout=60)[1]
    assert agent.returncode == code, said
    if ends_boot:
        told = " ".join(said.split())
        assert f"BOOT FAILED reason ended by {sent.name} means A signal ended the boot." in told
        assert "next poweroff in 0 s" in told
    assert gone.exists()


@pytest.mark.usefixtures("cryptsetup")
def test_a_signal_after_the_boot_does_not_change_how_it_ended(tmp_path: Path) -> None:
    """The initramfs would take a machine whose disks are open for one whose boot failed."""

    def has_ended() -> bool:
        agent.terminate()
        return agent.poll() is not None

    with dev_server(tmp_path / "platform") as server, (tmp_path / "disk").open("wb") as disk:
        _ = disk.truncate(20 << 20)
        settings = write_settings(tmp_path, server, {"volumes.storage.device": disk.name})
        command = [*PROGRAM, "agent", "run", "--images", "--config", str(settings)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
            heard(agent, "DONE")
            _ = wait_until(has_ended)
    assert agent.returncode == 0


def test_a_signal_before_the_boot_begins_is_a_failure(
    command: Command, write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, gone = signal.signal, tmp_path / "went-off"

    def then_send(number: int, handler: Any) -> Any:
        before = register(number, handler)
        if number == signal.SIGTERM and handler is not signal.SIG_DFL:
            signal.raise_signal(number)
        return before

    monkeypatch.setattr(signal, "signal", then_send)
    ended = command(
        *("agent", "run", "--config"),
        write(f'on_failure = {{ action = "poweroff", wait_seconds = 0, poweroff = ["touch", "{gone}"] }}\n'),
    )
    assert (ended.code, "ended by SIGTERM" in ended.err, gone.exists()) == (143, True, True)


@pytest.mark.usefixtures("cryptsetup")
def test_a_signal_before_a_disk_is_touched_leaves_it_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = Progress.__call__

    def then_send(progress: Progress, record: Record) -> None:
        tell(progress, record)
        if record.event == "disk_action":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "__call__", then_send)
    with dev_server(tmp_path / "platform") as server, (tmp_path / "disk").open("wb") as disk:
        _ = disk.truncate(20 << 20)
        settings = write_settings(tmp_path, server, {"volumes.storage.device": disk.name})
        ended = command("agent", "run", "--images", "--config", settings)
    assert ended.code == 143, ended.err
    told = " ".join(ended.err.split())
    assert "storage: format" in told
    assert "disks nothing was written to any" in told
    assert not any((tmp_path / "disk").read_bytes())


@frozen
class Held:
    """A machine with two block devices. Its `cryptsetup` waits when it has mapped the second."""

    folder: Path
    mappings: Mappings

    def start(self, action: str) -> subprocess.Popen[str]:
        command = [*PROGRAM, "agent", action, "--config", str(self.folder / "agent.toml")]
        environment = {**os.environ, "PATH": self.mappings.path}
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)

    def wait_for_the_second(self, agent: subprocess.Popen[str]) -> None:
        def has_begun() -> bool:
            assert agent.poll() is None, agent.communicate()
            return (self.folder / "begun").exists()

        _ = wait_until(has_begun)

    def go_on(self) -> None:
        (self.folder / "go").touch()


HELD = """
    case "$8" in
    *-2)
        touch {folder}/begun
        until [ -e {folder}/go ]; do sleep 0.1; done
        sleep 0.3 ;;
    esac
"""
MAPPINGS = [f"chutes-proto-test-{os.getpid()}-{number}" for number in (1, 2)]


@pytest.fixture
def machine(tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[Held]:
    mappings = Mappings(tmp_path, require_program("cryptsetup"), HELD.format(folder=tmp_path))
    with ExitStack() as stack:
        _ = stack.callback(mappings.close, *MAPPINGS)  # one that a test had killed is still there
        _ = stack.callback((tmp_path / "go").touch)  # nothing waits on where a test failed
        said: dict[str, object] = {"state.file": str(tmp_path / "boot.json"), "state.on_disk": True}
        for name, mapping in zip(("storage", "tdx-cache"), MAPPINGS, strict=True):
            device = stack.enter_context(attached(image(tmp_path / name), require_program))
            said |= {f"volumes.{name}.device": device, f"volumes.{name}.mapping": mapping}
        server = stack.enter_context(dev_server(tmp_path / "platform"))
        _ = write_settings(tmp_path, server, said)
        yield Held(tmp_path, mappings)


@pytest.mark.parametrize(("action", "number"), [("run", signal.SIGTERM), ("resume", signal.SIGINT)])
def test_a_signal_closes_what_was_opened_also_by_what_it_met(
    machine: Held, action: str, number: signal.Signals
) -> None:
    """The program that maps a disk is not killed under it, so that it is known what to close: also by a signal to all
    that run in the foreground of a terminal.
    """
    if action == "resume":
        settings = machine.folder / "agent.toml"
        _ = settings.write_text(f'volumes_at = "resume"\n{settings.read_text()}')
        with machine.start("run") as agent:
            assert agent.wait(60) == 0
    with machine.start(action) as agent:
        machine.wait_for_the_second(agent)
        os.killpg(agent.pid, number)
        machine.go_on()
        said = agent.communicate(timeout=60)[1]
    assert agent.returncode == 128 + number, said
    told = " ".join(said.split())
    assert told.index(f"closed again: {MAPPINGS[1]}") < told.index(f"closed again: {MAPPINGS[0]}")
    assert f"BOOT FAILED reason ended by {number.name} " in told
    assert (machine.mappings.closed, machine.mappings.open) == (MAPPINGS[::-1], [])
    assert (machine.folder / "boot.json").exists() == (action == "resume")  # for another try


def test_a_signal_that_comes_twice_at_once_waits(machine: Held) -> None:
    """`timeout` sends it to its program, and to the group of that."""
    with machine.start("run") as agent:
        machine.wait_for_the_second(agent)
        send_twice(agent.pid, signal.SIGTERM)
        machine.go_on()
        said = agent.communicate(timeout=60)[1]
    assert agent.returncode == 143, said
    assert (machine.mappings.closed, machine.mappings.open) == (MAPPINGS[::-1], [])


def test_a_second_signal_does_not_wait(machine: Held) -> None:
    with machine.start("run") as agent:
        machine.wait_for_the_second(agent)
        for number in (signal.SIGINT, signal.SIGTERM):  # of two that are alike, the kernel may make one
            agent.send_signal(number)
        said = agent.communicate(timeout=60)[1]
    assert agent.returncode == 143, said
    assert (machine.mappings.closed, machine.mappings.open) == (MAPPINGS[:1], [])
