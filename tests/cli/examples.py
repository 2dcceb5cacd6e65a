"""The files and the server that the examples of miners' and verifiers' commands name."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.secret import Secret
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._directory import simulation_files
from chutes_proto.testing._gpus import SIMULATED_SEED, gpu_files
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import HOTKEY, Ended, Server, end, start_server
from tests.cli.test_miner import GPU
from tests.cli.test_replay import GOOD, quote_of
from tests.conftest import ROOT

URL = "https://127.0.0.1:8443"
_PUBLIC = {"198.51.100.7": "1.2.3.4"}  # no server takes an address for documentation
_SEED = bytes.fromhex("e5be9a5092b81bca64be81d212e7f2f9eba183bb7a90954f7b76361f6edb5c0a")  # that of HOTKEY, well known
_QUOTER = """#!/bin/sh
{python} -m chutes_proto simulate --report-data "$1" --stage "$STAGE" --out made >&2 && cat made/quote.bin
"""


_RTMRS = {f"RTMR{number}": f"{number:02}" * 48 for number in range(4)}
_PUBLISHED = {"version": "1.4.0", "name": "8xh200", "mrtd": "AB" * 48, "boot_rtmrs": _RTMRS, "runtime_rtmrs": _RTMRS}


def write_files(folder: Path, platform: SimulatedPlatform, now: int) -> None:
    """Quotes, an event log, a hotkey with a signature of it, GPUs, and a program that makes quotes."""
    pair = HotkeyPair.from_secret(Secret(_SEED))
    assert pair.hotkey.address == HOTKEY
    simulated = simulation_files(platform, bytes(64), now=now, stage="boot")
    files = {
        **{f"sim/{name}": data for name, data in simulated.items()},
        **{f"gpus/{name}": data for name, data in gpu_files(SimulatedGpus(SIMULATED_SEED), bytes(32), now).items()},
        "quote.bin": quote_of(GOOD),
        "policy.toml": (ROOT / "examples" / "policy.toml").read_bytes(),
        "CCEL": GOOD,
        "good/CCEL": GOOD,
        "boot.quote": platform.quote(bytes(64)),
        "runtime.quote": platform.quote(bytes(64), stage="runtime"),
        "message.bin": b"message",
        "signature.hex": pair.sign(b"message").hex().encode(),
        "hotkey": json.dumps({"secretSeed": f"0x{_SEED.hex()}", "ss58Address": HOTKEY}).encode(),
        "published.json": json.dumps([_PUBLISHED]).encode(),
        "gpus.json": json.dumps([GPU]).encode(),
        "my-quoter": _QUOTER.format(python=sys.executable).encode(),
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _ = (folder / name).write_bytes(data)
    (folder / "hotkey").chmod(0o600)
    (folder / "my-quoter").chmod(0o755)


def write_agent(folder: Path, server: Server) -> None:
    """Settings of a boot agent with one blank disk, which is an image."""
    with (folder / "disk.img").open("wb") as disk:
        _ = disk.truncate(32 * 1024 * 1024)
    said = {"ca_file": str(server.ca), "quoter": "simulated", "hotkey": HOTKEY, "vm_name": "vm-of-agent"}
    lines = [f"servers = [{json.dumps(server.url)}]", *(f"{key} = {json.dumps(value)}" for key, value in said.items())]
    disks = f'[volumes.storage]\ndevice = "{folder}/disk.img"\n'
    _ = (folder / "agent.toml").write_text("\n".join([*lines, disks]))


@contextmanager
def served(state: Path) -> Iterator[Server]:
    """A server that trusts the simulated platform of a user whose state is kept there."""
    server = start_server("--dev", "--platform", state / "chutes-proto" / "platform")
    try:
        yield server
    finally:
        end(server.process)


def run_against(
    server: Server, state: Path, example: str, command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> Ended:
    """Run an example against ``server`` in place of the one that it names, where the server n1 is registered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    monkeypatch.setenv("PATH", f"{Path.cwd()}:/usr/bin:/bin")
    monkeypatch.setenv("STAGE", "runtime" if " attest " in example else "boot")

    def run(text: str) -> Ended:
        for named, real in {URL: server.url, "ca.pem": str(server.ca), **_PUBLIC}.items():
            text = text.replace(named, real)
        return command(*shlex.split(text)[1:])

    at = f"{URL} --ca ca.pem --hotkey-file hotkey"
    if " boot " not in example and " register " not in example:
        assert run(f"chutes-proto register {at} --id n1 --name vm-1 --host 198.51.100.7 --gpus gpus.json").code == 0
    ended = run(example)
    _ = run(f"chutes-proto servers remove {at} n1")
    return ended
