"""The units in examples/systemd, as systemd reads them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.cli.main import main
from tests.conftest import ROOT

UNITS = sorted((ROOT / "examples/systemd").glob("chutes-proto-*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_knows_every_line(unit: Path, require_program: Callable[[str], str]) -> None:
    analyze = require_program("systemd-analyze")
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_is_one_of_ours(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.M)
    python, isolated, agent, *arguments = shlex.split(line)
    assert (python, isolated, agent) == ("/usr/bin/python3", "-I", "/usr/lib/chutes-proto/agent.pyz")
    assert arguments[:2] == ["agent", "resume" if "resume" in unit.stem else "run"]
    assert main([*arguments[:3], "/no/such/agent.toml"]) == 2
    assert "/no/such/agent.toml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_sigterm_is_for_the_agent_alone(unit: Path) -> None:
    """By default it goes to every process of the unit: to the one, too, that the agent has work on a disk."""
    assert re.findall(r"^KillMode=(.*)$", unit.read_text(), re.M) == ["mixed"]


CAP_DAC_READ_SEARCH = 1 << 2  # capabilities(7); the root of a container lacks it


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_config_volume_may_keep_the_owner_and_the_modes_of_its_files(
    unit: Path, tmp_path: Path, require_program: Callable[[str], str]
) -> None:
    """A host makes it as it likes; `mkisofs -R` keeps both."""
    held = int(Path("/proc/self/status").read_text().partition("CapEff:")[2].split()[0], 16)
    if not held & CAP_DAC_READ_SEARCH:
        pytest.skip("takes the rights of a machine's root")
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.M)
    rights = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in line.split())])
    folder = tmp_path / "config"
    folder.mkdir(mode=0o700)
    _ = (folder / "miner-seed").write_text("11" * 32)
    (folder / "miner-seed").chmod(0o600)
    for path in (folder, folder / "miner-seed"):
        os.chown(path, 1000, 1000)
    read = "import sys; from chutes_proto.io.agent import read_config_volume as read;"
    read += "print(read(sys.argv[1], ['miner-seed'], limit=100))"
    command = [require_program("setpriv"), "--bounding-set", rights, "--inh-caps", rights, sys.executable, "-c", read]
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout) == ("", str({"miner-seed": b"11" * 32}) + "\n")
