"""`register`, `servers`, `attest`, `status` against a server in a process of its own, and `hotkey` by itself."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.cli import console
from chutes_proto.secret import Secret
from tests.cli.conftest import Ended, Server, start_server

Command = Callable[..., Ended]

SEEDS = {"mine": bytes(range(32)), "other": bytes(range(1, 33))}
PAIRS = {name: HotkeyPair.from_secret(Secret(seed)) for name, seed in SEEDS.items()}
GPU = {
    "uuid": "GPU-1",
    "name": "NVIDIA H200",
    "memory": 150_000_000_000,
    "clock_rate": 1980000,
    "device_index": 0,
    "gpu_identifier": "h200",
    "verification_host": "1.2.3.4",
    "verification_port": 30443,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miner")
    for name, seed in SEEDS.items():
        content = {"secretSeed": f"0x{seed.hex()}", "ss58Address": PAIRS[name].hotkey.address}
        (folder / name).write_text(json.dumps(content))
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = start_server("--dev", "--platform", folder / "platform")
    yield started
    assert started.stop(signal.SIGTERM).code == 0


@pytest.fixture
def miner(command: Command, server: Server, folder: Path) -> Command:
    """Runs one command of a miner's against the server."""

    def run(*arguments: object, hotkey: str = "mine", url: str = server.url) -> Ended:
        name, *rest = arguments
        words = [name, rest.pop(0), url] if name == "servers" else [name, url]
        ended = command(*words, *rest, "--ca", server.ca, "--hotkey-file", folder / hotkey)
        assert SEEDS[hotkey].hex() not in ended.out + ended.err
        return ended

    return run


@pytest.fixture
def register(miner: Command, tmp_path: Path) -> Command:
    def run(*arguments: object, gpus: Any = (GPU,), **options: Any) -> Ended:
        path = tmp_path / "gpus.json"
        path.write_text(gpus if isinstance(gpus, str) else json.dumps(gpus))
        return miner("register", "--gpus", path, *arguments, **options)

    return run


def test_the_life_of_a_server(
    miner: Command, register: Command, command: Command, server: Server, folder: Path
) -> None:
    assert miner("servers", "list").out == "no servers\n"
    done = register("--id", "n1", "--name", "vm-1", "--host", "1.2.3.4")
    assert (done.code, done.out) == (0, "registered: n1 (vm-1) at 1.2.3.4, 1 GPU\n")
    head, row = miner("servers", "list").out.splitlines()
    assert head.split() == ["SERVER_ID", "NAME", "HOST", "CREATED_AT", "UPDATED_AT"]
    assert row.split()[:3] == ["n1", "vm-1", "1.2.3.4"]
    assert miner("status", "n1").out == "never attested: n1 (vm-1)\n"
    platform = ("--platform", folder / "platform")
    assert miner("attest", "n1", *platform).out.startswith("verified: n1 at ")
    assert " s ago, fresh" in miner("status", "n1").out
    with_gpus = ("attest", "n1", *platform, "--gpu-tool")
    assert miner(*with_gpus, "simulated").out.startswith("verified: n1 at ")
    audited = command("audit", "list", "--config", server.ca.with_name("server.toml"), "--json").out
    assert "GPU evidence verified: 1 devices" in audited
    failed = miner(*with_gpus, "false", "--wait", "0")
    assert (failed.code, "GPU evidence command false" in failed.err) == (console.USAGE, True)
    assert miner(*with_gpus, "'", "--wait", "0").code == console.USAGE
    told = miner("status", "n1", "--json", "--signatures", "request").json
    assert (told["is_fresh"], told["last"]["error"]) == (True, None)
    assert datetime.fromisoformat(told["last"]["created_at"]).utcoffset() == timedelta(0)
    assert [one["name"] for one in miner("servers", "list", "--json").json["servers"]] == ["vm-1"]
    renamed = miner("servers", "rename", "n1", "vm-2", "--json").json
    assert (renamed["granted"], renamed["name"]) == (True, "vm-2")
    assert [one["name"] for one in miner("servers", "list", "--json").json["servers"]] == ["vm-2"]
    again = register("--id", "n1", "--host", "1.2.3.4", "--json", hotkey="other")
    assert (again.code, again.json["granted"], again.json["status"]) == (console.REFUSED, False, 409)
    for arguments in (("servers", "rename", "n1", "vm-3"), ("servers", "remove", "vm-2"), ("status", "n1")):
        ended = miner(*arguments, hotkey="other")
        assert ended.code == console.REFUSED
        assert ended.out.startswith("refused: Server ")
        assert ended.out.splitlines()[1] == "server_not_found: the hotkey has no such server"
        assert "request" in ended.out.splitlines()[2]
    removed = miner("servers", "remove", "vm-2")
    assert (removed.code, removed.out) == (0, "removed: vm-2; the keys of its VM are kept\n")
    assert miner("attest", "n1", *platform, "--json").json["code"] == "server_not_found"


@pytest.mark.parametrize("away", [-3600, 3600])
def test_a_clock_that_is_wrong_is_said(miner: Command, monkeypatch: pytest.MonkeyPatch, away: int) -> None:
    monkeypatch.setattr("time.time", lambda now=time.time: now() + away)
    refused = miner("servers", "list")
    assert refused.code == console.REFUSED
    assert "are 10 minutes apart or more: set this one's first" in refused.out


def test_a_registration_that_is_refused_says_why(register: Command) -> None:
    ended = register("--id", "n9", "--host", "10.0.0.1")
    assert ended.code == console.REFUSED
    assert "Invalid verification host provided. (400 host_invalid" in ended.out
    assert "host_invalid: the host is not a public address, nor a name that has only public ones\n" in ended.out
    assert "memory is not 140 GB" in register("--id", "n9", "--host", "1.2.3.4", gpus=[GPU | {"memory": 1}]).out


@pytest.mark.parametrize("gpus", ["", "{}", "[1]", '[{"uuid":1}]', "[[", '[{"a":1,"a":2}]'])
def test_a_file_that_is_no_list_of_gpus(register: Command, gpus: str) -> None:
    ended = register("--id", "n1", "--host", "1.2.3.4", gpus=gpus)
    assert ended.code == console.USAGE
    assert "gpus.json: not a list of GPUs" in ended.err


def test_hotkey_files_and_servers_that_are_not_there(miner: Command, folder: Path, command: Command) -> None:
    assert miner("servers", "list", url="https://127.0.0.1:9").code == console.USAGE
    ended = command("servers", "list", "https://127.0.0.1:9", "--hotkey-file", folder / "nothing")
    assert (ended.code, "nothing" in ended.err) == (console.USAGE, True)
    assert miner("status", "..").code == console.USAGE


def test_hotkeys(command: Command, tmp_path: Path) -> None:
    pair = PAIRS["mine"]
    address = pair.hotkey.address
    seen = command("hotkey", "inspect", address, "--json")
    assert (seen.code, seen.json["public_key"]) == (0, pair.hotkey.public_key.hex())
    assert pair.hotkey.public_key.hex() in command("hotkey", "inspect", address).out
    signature = pair.sign(b"text").hex()
    (tmp_path / "m").write_bytes(b"text")
    for message in (("--message", "text"), ("--message-file", tmp_path / "m")):
        checked = command("hotkey", "check", address, *message, "--signature", signature)
        assert (checked.code, checked.out.startswith("valid: ")) == (0, True)
    for text, signed in (("other", signature), ("text", "00" * 64), ("text", "0x" + signature), ("text", "")):
        wrong = command("hotkey", "check", address, "--message", text, "--signature", signed)
        assert (wrong.code, wrong.out.startswith("invalid: ")) == (console.REFUSED, True)
    refused = command("hotkey", "inspect", address[:-1] + "1", "--json")
    assert (refused.code, refused.json["valid"]) == (console.REFUSED, False)


def test_a_real_wallets_addresses_and_signatures(command: Command, vectors: Path) -> None:
    wallet = json.loads((vectors / "signing.json").read_text())
    for address in wallet["bad_addresses"]:
        assert command("hotkey", "inspect", "--", address).code == console.REFUSED
    for row in wallet["rows"]:
        ended = command("hotkey", "check", row["hotkey"], "--message", row["message"], "--signature", row["signature"])
        assert ended.code == (0 if row["valid"] else console.REFUSED)
