"""The units in examples/systemd, as systemd reads them."""

from __future__ import annotations

import re
import shlex
import subprocess
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
