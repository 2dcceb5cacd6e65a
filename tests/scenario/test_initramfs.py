"""The server, driven as deployed images drive it: by curl, grep and openssl, against a real process."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dev_server import DevServer, dev_server

SCRIPT = Path(__file__).with_name("initramfs.sh")
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with dev_server(tmp_path_factory.mktemp("platform")) as running:
        yield running


def boot(server: DevServer, vm: str, quote: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, server.url, str(server.ca), HOTKEY, vm, str(quote)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def quote_command(tmp_path: Path, platform: Path, *options: str) -> Path:
    """A program that writes the simulated platform's quote, as a VM's own quote program does."""
    script = tmp_path / "quote"
    out = tmp_path / "out"
    command = [sys.executable, "-m", "chutes_proto", "simulate", "--platform", platform, "--out", out, *options]
    simulate, cat = shlex.join(map(str, command)), shlex.join(["cat", str(out / "quote.bin")])
    script.write_text(f'#!/bin/sh\nset -e\n{simulate} --report-data "$1" >/dev/null\n{cat}\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def programs(require_program: Callable[[str], str]) -> None:
    for program in ("curl", "openssl", "grep", "bash"):
        require_program(program)


@pytest.mark.usefixtures("programs")
def test_two_boots_get_the_same_keys(server, tmp_path):
    quote = quote_command(tmp_path, server.platform)
    first = boot(server, "vm-curl", quote)
    assert first.returncode == 0, first.stderr
    storage, cache, root, before, after = first.stdout.split()
    assert len({storage, cache, root}) == 3
    assert before == "legacy-before:404:none"  # no key yet: the sync makes it
    assert after == "legacy-after:401"  # the sync has consumed the token
    second = boot(server, "vm-curl", quote)
    assert second.returncode == 0, second.stderr
    assert second.stdout.split() == [storage, cache, root, f"legacy-before:200:{storage}", "legacy-after:401"]


@pytest.mark.usefixtures("programs")
def test_a_refusal_can_be_read(server, tmp_path):
    refused = boot(server, "vm-refused", quote_command(tmp_path, server.platform, "--fault", "rtmr1"))
    assert refused.returncode == 1
    assert '"code":"measurement_mismatch"' in refused.stderr
    assert "(RTMR1)" in refused.stderr
    assert '"request_id":"' in refused.stderr
