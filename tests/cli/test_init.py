"""`init`: the files of a new server, which works once its certificate is signed and its template filled."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.io.files import write_file
from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.server import ServerConfig
from tests.cli.conftest import HOTKEY, Ended, end, start_server
from tests.conftest import ROOT


def openssl(*words: object) -> None:
    _ = subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def test_a_new_server_works(
    command: Callable[..., Ended], tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    _ = require_program("openssl")
    site, state = tmp_path / "etc", tmp_path / "state"
    state.mkdir()
    made = command("init", site, "--name", "localhost", "--state", state, "--json")
    assert made.code == 0
    assert [Path(file["path"]).name for file in made.json["files"]] == [
        *("server.toml", "kek", "server.key", "server.csr", "measurements.toml")
    ]
    modes = {path.name: path.stat().st_mode & 0o777 for path in site.iterdir()}
    assert modes == dict.fromkeys(["server.toml", "kek", "server.key"], 0o600) | dict.fromkeys(
        ["server.csr", "measurements.toml"], 0o644
    )
    assert site.stat().st_mode & 0o777 == 0o700

    # What `init` says is left to do; and this platform is a simulated one.
    ca, key = tmp_path / "ca.pem", tmp_path / "ca.key"
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca", "-keyout", key, "-out", ca)
    csr = ("-in", site / "server.csr", "-copy_extensions", "copy")
    openssl("x509", "-req", *csr, "-CA", ca, "-CAkey", key, "-out", site / "server.pem")
    platform = open_platform(tmp_path / "platform", 1).platform
    write_file(site / "boot.quote", platform.quote(bytes(64)))
    write_file(site / "runtime.quote", platform.quote(bytes(64), stage="runtime"))
    names = ("--name", "8xh200", "--version", "1.0")
    profile = command("profile", site / "boot.quote", site / "runtime.quote", *names)
    write_file(site / "measurements.toml", profile.out.encode())
    write_file(site / "root.der", platform.root_der)
    text = (site / "server.toml").read_text()
    text = re.sub(r"\[collateral\].*?\n\n", "", text, flags=re.DOTALL).replace("0.0.0.0:8443", "127.0.0.1:0")
    text = f'roots = "root.der"\ncollateral.directory = "collateral"\n{text.replace("127.0.0.1:9464", "127.0.0.1:0")}'
    write_file(site / "server.toml", text.encode(), mode=0o600)
    (site / "collateral").mkdir()
    write_file(site / "collateral" / f"{platform.fmspc.hex()}.json", platform.collateral_json(int(time.time())))
    checked = command("serve", "--config", site / "server.toml", "--check")
    assert checked.code == 0, checked.err
    server = start_server("--config", site / "server.toml", ca=ca)
    try:
        url = server.url.replace("127.0.0.1", "localhost")
        who = ("--hotkey", HOTKEY, "--vm", "vm-1", "--platform", tmp_path / "platform")
        assert command("boot", url, "--ca", ca, *who).code == 0
        assert command("reload", "--config", site / "server.toml").out.startswith("nothing has changed\n")
    finally:
        end(server.process)
    assert (state / "keys.db").exists()


def test_nothing_is_replaced(command: Callable[..., Ended], tmp_path: Path) -> None:
    assert command("init", tmp_path, "--name", "keys.example").code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "server.toml").unlink()
    again = command("init", tmp_path, "--name", "keys.example")
    assert again.code == 1
    assert "kek: exists, and is not replaced" in again.err
    assert not (tmp_path / "server.toml").exists()
    assert all(path.read_bytes() == data for path, data in before.items() if path.exists())


def test_the_commands_that_remain_can_be_pasted(command: Callable[..., Ended], tmp_path: Path) -> None:
    site = tmp_path / "the $(reboot) 'site'"
    printed = command("init", site, "--name", "keys.example").out.splitlines()
    commands = [shlex.split(line) for line in printed if line.startswith("  chutes-proto")]
    assert [words[-1] for words in commands] == [str(site / "measurements.toml"), "--check", str(site / "server.toml")]
    assert str(site / "server.toml") in commands[1]


def test_as_written_it_says_what_is_missing(command: Callable[..., Ended], tmp_path: Path) -> None:
    assert command("init", tmp_path, "--name", "192.0.2.7").code == 0
    checked = command("serve", "--config", tmp_path / "server.toml", "--check")
    assert checked.code == 1
    assert "server.pem" in checked.err
    assert "measurements" in checked.err
    for name in ("büro.example", "https://keys.example", "keys.example:8443", ""):
        assert command("init", tmp_path / "other", "--name", name).code == 1
    assert not (tmp_path / "other").exists()


def test_any_directory_may_have_the_state(command: Callable[..., Ended], tmp_path: Path) -> None:
    state = tmp_path / 'a "quoted" \\ one\t\x7fé'
    assert command("init", tmp_path, "--name", "keys.example", "--state", state).code == 0
    assert ServerConfig.load(tmp_path / "server.toml").store.url == f"sqlite:{state}/keys.db"


def test_a_directory_of_the_state_that_no_configuration_can_name(command: Callable[..., Ended], tmp_path: Path) -> None:
    refused = command("init", tmp_path / "other", "--name", "keys.example", "--state", os.fsdecode(b"/sta\xffte"))
    assert refused.code == 1
    assert r"--state: '/sta\udcffte' is not UTF-8" in refused.err
    assert not (tmp_path / "other").exists()


# --- the unit of the server ---

UNIT = ROOT / "examples/systemd/chutes-proto.service"


def test_the_unit_leaves_little_exposed(require_program: Callable[[str], str]) -> None:
    analyze = require_program("systemd-analyze")
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=15", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for line in ("DynamicUser=yes", "ProtectSystem=strict"):
        assert line in UNIT.read_text()


@pytest.mark.parametrize("file", [UNIT, ROOT / "docs/how-to/production.md"], ids=lambda file: str(file.name))
def test_a_unit_leaves_the_memory_of_a_server_on_no_disk(file: Path) -> None:
    """A core file of it has the KEK, and swap may have more."""
    assert {"LimitCORE=0", "MemorySwapMax=0"} <= {*file.read_text().splitlines()}


@pytest.mark.parametrize("file", [UNIT, ROOT / "docs/how-to/production.md"], ids=lambda file: str(file.name))
def test_systemd_never_gives_up_on_a_server_that_cannot_start(file: Path) -> None:
    """It does after 5 starts in 10 seconds, if nothing else is set, and takes the socket down with the service."""
    (pause,) = re.findall(r"^RestartSec=(\d+)$", file.read_text(), re.MULTILINE)
    assert 5 * int(pause) > 10


def test_the_unit_hands_over_every_file_that_init_writes(command: Callable[..., Ended], tmp_path: Path) -> None:
    made = command("init", tmp_path, "--name", "keys.example", "--json").json["files"]
    handed = set(re.findall(r"^LoadCredential=(\S+):/etc/chutes-proto/\1$", UNIT.read_text(), re.MULTILINE))
    assert handed == {Path(file["path"]).name for file in made} - {"server.csr"} | {"server.pem"}


# As systemd's MemoryDenyWriteExecute= does it. Source: prctl(2), PR_SET_MDWE.
DENIED = """\
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit(77)
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.transport.tls import server_context
identity = make_server_identity(0, bytes(32))
server_context(identity.chain_pem, identity.key_pem)
"""


def test_the_tls_library_writes_memory_and_executes_it() -> None:
    """So the unit must not deny it. When this fails, cffi needs it no more: set the line in the unit, see ADR 33."""
    done = subprocess.run([sys.executable, "-c", DENIED], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("Linux has PR_SET_MDWE from 6.3 on")
    assert "MemoryError: Cannot allocate write+execute memory for ffi.callback()" in done.stderr
    assert not re.search("^MemoryDenyWriteExecute=", UNIT.read_text(), re.MULTILINE)
