"""`agent` in this process: its help, what it closes, and what becomes of a fault of its own."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.auth import certificates
from chutes_proto.cli.agent import close_opened
from chutes_proto.cli.main import main
from chutes_proto.cli.progress import Progress
from chutes_proto.client.settings import AgentSettings
from chutes_proto.log import Level, Record
from tests.cli.conftest import HOTKEY, Ended
from tests.dev_server import dev_server

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


@pytest.mark.parametrize("action", [[], ["run"], ["resume"]], ids=str)
def test_help_has_examples_and_exit_codes(command: Command, action: list[str]) -> None:
    ended = command("agent", *action, "--help")
    assert ended.code == 0
    assert "examples:\n  chutes-proto agent " in ended.out
    assert "exit code: 0 done; 1 refused" in ended.out


@pytest.mark.parametrize("arguments", [[], ["halt"], ["run"], ["resume", "--config", "a", "--dry-run"]], ids=str)
def test_wrong_usage(command: Command, arguments: list[str]) -> None:
    assert command("agent", *arguments).code == 2


def test_disks_that_are_not_there(command: Command, write: Callable[[str], Path]) -> None:
    ended = command("agent", "run", "--config", write(""))
    assert ended.code == 1
    told = " ".join(ended.err.split())
    assert "BOOT FAILED reason /nowhere/root: it cannot be opened: No such file or directory" in told


def test_what_was_opened_is_closed_the_last_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "told"
    program = tmp_path / "cryptsetup"
    _ = program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = AgentSettings.from_toml(SETTINGS.encode())
    progress = Progress(as_json=False, seconds=1.0)
    close_opened(settings, progress)
    assert not told.exists()
    for volume in ("root", "storage"):
        progress(Record(Level.INFO, "disk_opened", {"volume": volume, "key": "current"}))
    close_opened(settings, progress)
    assert told.read_text().splitlines() == ["close storage", "close rootfs"]
    assert "closed again: rootfs, storage" in capsys.readouterr().err
    program.unlink()
    monkeypatch.setattr("chutes_proto.blocking.disks.find_cryptsetup", lambda: "/nowhere/cryptsetup")
    close_opened(settings, progress)
    assert "could not be closed: /dev/mapper/storage" in " ".join(capsys.readouterr().err.split())


def test_a_fault_of_its_own_is_a_failed_boot_like_any_other(
    command: Command, write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a secret, perhaps")

    monkeypatch.setattr(certificates, "make_client_identity", fail)
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


@pytest.mark.parametrize("key", ["quoter", "signer"])
def test_the_deadline_is_that_of_quotes_and_signatures(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("chutes_proto.blocking.agent.LEAST_SECONDS", 0.5)
    with dev_server(tmp_path / "platform") as server, (tmp_path / "disk").open("wb") as disk:
        _ = disk.truncate(32 << 20)
        lines = {
            "servers": [server.url],
            "ca_file": str(server.ca),
            "hotkey": HOTKEY,
            "vm_name": "vm-1",
            "quoter": f"simulated:{server.platform}",
            key: "command:sleep 600",
            "retry.deadline_seconds": 1,
            "volumes.storage.device": disk.name,
        }
        settings = tmp_path / "agent.toml"
        _ = settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items()))
        begun = time.monotonic()
        ended = command("agent", "run", "--images", "--config", settings)
    assert (ended.code, time.monotonic() - begun < 15) == (2, True)
    told = " ".join(ended.err.split())
    assert "sleep: the deadline, retry.deadline_seconds, ended it means This machine cannot make a quote." in told


def test_a_dry_run_makes_no_platform(command: Command, write: Callable[[str], Path], tmp_path: Path) -> None:
    disk, platform = tmp_path / "disk", tmp_path / "platform"
    _ = disk.write_bytes(bytes(1 << 20))
    settings = write("")
    text = settings.read_text().replace("command:false", f"simulated:{platform}")
    _ = settings.write_text(text.replace("/nowhere/storage", str(disk)).replace("root = ", "# root = "))
    ended = command("agent", "run", "--config", settings, "--images", "--dry-run")
    assert (ended.code, "nothing is mapped" in ended.out) == (0, True)
    assert not platform.exists()


def test_a_ca_file_that_is_none_is_named(command: Command, write: Callable[[str], Path]) -> None:
    ended = command("agent", "run", "--config", write('ca_file = "/dev/null"\n'), "--dry-run")
    assert (ended.code, "/dev/null: not one or more PEM certificates" in ended.err) == (2, True)
