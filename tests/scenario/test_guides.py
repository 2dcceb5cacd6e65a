"""How-to guides whose commands need an operator's premises and nothing else: a shell runs them, in order."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scenario.premises import Premises
from tools.docs.pages import DOCS, Step, fences, steps

in_a_file = pytest.mark.parametrize("premises", ["sqlite"], indirect=True)


def commands(page: str) -> list[Step]:
    """The scripts of a guide that call ``chutes-proto``."""
    found = [step for fence in fences(DOCS / "how-to" / f"{page}.md") for step in steps(fence)]
    return [step for step in found if step.command.startswith("chutes-proto ")]


def run(premises: Premises, step: Step, home: Path) -> str:
    program = f'set -e\nchutes-proto() {{ {shlex.quote(sys.executable)} -m chutes_proto "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", program + step.command],
        cwd=premises.directory,
        env=os.environ | {"XDG_STATE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{step.command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@in_a_file
@pytest.mark.parametrize(
    ("page", "least"), [("reference-values", 5), ("upgrade", 2), ("denied-at-night", 2), ("capacity", 1)]
)
def test_a_guide_is_followed(premises: Premises, page: str, least: int, tmp_path: Path) -> None:
    premises.start()
    _ = premises.vm().boot()
    if page == "upgrade":
        premises.stop()
    listed = commands(page)
    assert len(listed) >= least
    for step in listed:
        _ = run(premises, step, tmp_path / "home")
    if page == "reference-values":
        assert 'name = "8xh200"' in (premises.directory / "8xh200-1.1.toml").read_text()
