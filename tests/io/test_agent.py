"""The agent's access to its machine: an untrusted config volume, state in memory, a signer, the end."""

from __future__ import annotations

import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.auth.hotkey import Hotkey, HotkeyPair
from chutes_proto.boot._settings import VmIdentity
from chutes_proto.errors import ConfigurationError, FileUnavailable, HandoverRejected, NotInMemory, SignatureUnavailable
from chutes_proto.io import agent
from chutes_proto.secret import Secret

LIMIT = 64


def read(folder: Path, *names: str) -> dict[str, bytes]:
    return agent.read_config_volume(str(folder), names, limit=LIMIT)


# --- the config volume ---


def test_existing_files_are_read_to_the_limit(tmp_path: Path) -> None:
    _ = (tmp_path / "hostname").write_bytes(b"vm-1\n")
    _ = (tmp_path / "large").write_bytes(bytes(1 << 20))
    assert read(tmp_path, "hostname", "large", "missing") == {"hostname": b"vm-1\n", "large": bytes(LIMIT + 1)}


def a_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("/nowhere")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def a_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("lie", [a_link, a_link_to_nowhere, a_folder, a_pipe, a_socket, a_device])
def test_a_link_pipe_or_device_is_refused_at_once(tmp_path: Path, lie: object) -> None:
    assert callable(lie)
    _ = lie(tmp_path / "hostname")
    with pytest.raises(FileUnavailable, match="config volume: hostname: not a plain file"):
        _ = read(tmp_path, "hostname")


@pytest.mark.parametrize("lie", [a_link, a_pipe, a_device])
def test_a_file_that_is_replaced_after_it_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: Callable[[Path], None]
) -> None:
    file = tmp_path / "hostname"
    file.touch()
    look = os.stat

    def change(path: str, **options: Any) -> os.stat_result:
        found = look(path, **options)
        file.unlink()
        lie(file)
        return found

    monkeypatch.setattr(os, "stat", change)
    with pytest.raises(FileUnavailable, match="config volume: hostname: not a plain file"):
        _ = read(tmp_path, "hostname")


@pytest.mark.parametrize("folder", ["/nowhere", "/etc/hostname", "/a\0b"])
def test_a_missing_config_volume_is_reported(folder: str) -> None:
    with pytest.raises(FileUnavailable, match="is it mounted there"):
        _ = agent.read_config_volume(folder, ["hostname"], limit=LIMIT)


# --- state ---


@pytest.fixture
def in_memory() -> Iterator[Path]:
    if agent.file_system("/dev/shm") not in agent.IN_MEMORY:
        pytest.skip("no tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_state_is_private_and_replaces_an_older_file(in_memory: Path) -> None:
    state = in_memory / "run" / "boot.json"
    agent.write_state(str(state), Secret(b"first"))
    agent.write_state(str(state), Secret(b"second"))
    assert agent.read_state(str(state), limit=LIMIT) == b"second"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    agent.remove_state(str(state))
    agent.remove_state(str(state))
    with pytest.raises(FileUnavailable, match="`agent run` leaves it"):
        _ = agent.read_state(str(state), limit=LIMIT)


def test_a_link_at_the_path_is_neither_followed_nor_kept(in_memory: Path) -> None:
    state, other = in_memory / "boot.json", in_memory / "other"
    _ = other.write_bytes(b"precious")
    state.symlink_to(other)
    with pytest.raises(FileUnavailable, match="a link"):
        _ = agent.read_state(str(state), limit=LIMIT)
    agent.write_state(str(state), Secret(b"state"))
    assert (other.read_bytes(), state.is_symlink()) == (b"precious", False)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_state_that_others_can_read_is_not_used(in_memory: Path, mode: int) -> None:
    state = in_memory / "boot.json"
    agent.write_state(str(state), Secret(b"state"))
    state.chmod(mode)
    with pytest.raises(HandoverRejected, match="this user's alone"):
        _ = agent.read_state(str(state), limit=LIMIT)


def test_state_of_another_user_is_not_used(in_memory: Path) -> None:
    state = in_memory / "boot.json"
    agent.write_state(str(state), Secret(b"state"))
    try:
        os.chown(state, 12345, 12345)
    except PermissionError:
        pytest.skip("only root gives files away")
    with pytest.raises(HandoverRejected, match="this user's alone"):
        _ = agent.read_state(str(state), limit=LIMIT)


def test_a_pipe_at_the_path_does_not_block(in_memory: Path) -> None:
    os.mkfifo(in_memory / "boot.json", 0o600)
    with pytest.raises(HandoverRejected, match="not a plain file"):
        _ = agent.read_state(str(in_memory / "boot.json"), limit=LIMIT)


def test_state_is_written_to_a_disk_only_on_request(tmp_path: Path) -> None:
    kind = agent.file_system(tmp_path)
    if kind in agent.IN_MEMORY:
        pytest.skip(f"{tmp_path} is on {kind}")
    state = tmp_path / "boot.json"
    with pytest.raises(NotInMemory, match=rf"on {kind}, not in memory.*state.on_disk = true"):
        agent.write_state(str(state), Secret(b"state"))
    assert not state.exists()
    agent.write_state(str(state), Secret(b"state"), on_disk=True)
    assert agent.read_state(str(state), limit=LIMIT) == b"state"


def test_the_file_system_of_a_path() -> None:
    assert agent.file_system("/proc") == "proc"
    assert agent.file_system("/proc/self") == "proc"
    assert agent.boot_id() == agent.boot_id() != ""


# --- who signs ---

SEED = Secret(bytes(range(32)))
PAIR = HotkeyPair.from_secret(SEED)


def identity(seed: Secret | None = SEED, hotkey: Hotkey = PAIR.hotkey) -> VmIdentity:
    return VmIdentity("vm-1", hotkey, seed)


def program(tmp_path: Path, text: str) -> str:
    script = tmp_path / "signer"
    _ = script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return f"command:{script}"


def test_without_a_setting_there_is_no_signer() -> None:
    assert agent.make_signer(None, identity()) is None


def test_the_seed_of_the_config_volume_signs() -> None:
    signer = agent.make_signer("config-volume", identity())
    assert signer is not None
    PAIR.hotkey.check_signature(b"message", signer(b"message"))


@pytest.mark.parametrize(
    ("who", "told"),
    [(identity(None), "no seed"), (identity(hotkey=Hotkey(bytes(range(32)))), "private key is not that of the hotkey")],
    ids=["none", "another's"],
)
def test_a_seed_that_does_not_belong_to_the_hotkey(who: VmIdentity, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        _ = agent.make_signer("config-volume", who)


def test_a_program_signs(tmp_path: Path) -> None:
    source = (
        "import sys;from chutes_proto.auth.hotkey import HotkeyPair;from chutes_proto.secret import Secret;"
        "print(HotkeyPair.from_secret(Secret(bytes(range(32)))).sign(bytes.fromhex(sys.stdin.readline())).hex())"
    )
    signer = agent.make_signer(program(tmp_path, f'exec "{sys.executable}" -c "{source}"'), identity(None))
    assert signer is not None
    PAIR.hotkey.check_signature(b"message", signer(b"message"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("exit 3", "^the signature command .* ended with exit status 3"),
        ("echo 00", "did not write a signature"),
        ("head -c 200000 /dev/zero", "^the signature command .* more than 49152 bytes, more than any signature has$"),
    ],
)
def test_a_program_that_does_not_sign_says_so(tmp_path: Path, text: str, told: str) -> None:
    signer = agent.make_signer(program(tmp_path, text), identity(None))
    assert signer is not None
    with pytest.raises(SignatureUnavailable, match=told):
        _ = signer(b"message")


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    signer = agent.command_signer(program(tmp_path, "sleep 60 & sleep 60").removeprefix("command:"), timeout=0.2)
    begun = time.monotonic()
    with pytest.raises(SignatureUnavailable, match=r"did not end within 0\.2 s"):
        _ = signer(b"message")
    assert time.monotonic() - begun < 59  # what it started would take 60


def test_a_program_signs_in_any_thread_where_there_is_no_deadline(tmp_path: Path) -> None:
    signer = agent.make_signer(program(tmp_path, "printf %0128d 7"), identity(None))
    assert signer is not None
    with ThreadPoolExecutor() as threads:
        assert threads.submit(signer, b"message").result() == bytes(63) + b"\x07"


# --- the end ---


def test_the_end_command_runs_after_a_wait(tmp_path: Path) -> None:
    waits: list[float] = []
    assert agent.end_with(["touch", str(tmp_path / "went-off")], 30.0, sleep=waits.append) is None
    assert (waits, (tmp_path / "went-off").exists()) == ([30.0], True)


def test_a_failed_end_command_is_reported() -> None:
    assert agent.end_with(["/nowhere/reboot"], 0.0) == "/nowhere/reboot cannot be run: No such file or directory"
    assert agent.end_with(["false"], 0.0) == "false ended with exit status 1"
