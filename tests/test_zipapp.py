"""The boot agent as one file, run by the system's Python in a clean environment."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from chutes_proto.auth.server_identity import make_server_identity
from tests.conftest import CI, ROOT
from tools.agent_zipapp import MAIN, OLDEST, build

SYSTEM = "/usr/bin/python3"
_NEEDED = "import sys, cryptography; sys.exit(sys.version_info < (3, 11))"


@pytest.fixture(scope="module")
def system() -> str:
    """The system's interpreter, with its own cryptography."""
    done = (
        subprocess.run([SYSTEM, "-I", "-c", _NEEDED], capture_output=True, check=False)
        if Path(SYSTEM).exists()
        else None
    )
    if done is None or done.returncode != 0:
        refuse = pytest.fail if CI else pytest.skip
        refuse(f"{SYSTEM} is not Python 3.11 or newer with cryptography (Debian: python3-cryptography)")
    return SYSTEM


@pytest.fixture(scope="module")
def agent(system: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zipapp") / "agent.pyz"
    build(out, system)
    return out


def run(
    agent: Path, *arguments: str | Path, python: str = SYSTEM, flags: tuple[str, ...] = ("-I",)
) -> tuple[int, str, str]:
    """Exit code, output and error of the file in a clean environment, somewhere else."""
    command = [python, *flags, agent, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={}, cwd="/", timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def after(statement: str) -> tuple[str, ...]:
    """The flags to run a file with after a statement."""
    return (
        "-I",
        "-c",
        f"import runpy, sys; {statement}; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')",
    )


def test_it_is_the_agent_and_nothing_else(agent: Path) -> None:
    assert run(agent, "--version")[:2] == (0, "chutes-proto 0.1.0\n")
    assert run(agent, "agent", "run", "--help")[1].startswith("Usage: chutes-proto agent run")
    code, _, complaint = run(agent, "serve")
    assert code == 2
    assert "invalid choice: 'serve'" in complaint
    done = subprocess.run([agent, "--version"], capture_output=True, text=True, env={}, check=True)
    assert done.stdout == "chutes-proto 0.1.0\n"


def test_a_python_that_is_too_old_is_told(agent: Path) -> None:
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text()
    _ = ast.parse(MAIN, feature_version=(3, 4))
    code, _, complaint = run(agent, "--help", flags=after("sys.version_info = (3, 10, 9)"))
    assert (code, complaint) == (2, "chutes-proto: this is Python 3.10; the agent needs Python 3.11 or newer\n")


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_python_without_cryptography_is_told(agent: Path, tmp_path: Path, more: list[str]) -> None:
    settings = tmp_path / "agent.toml"
    ca = tmp_path / "ca.pem"
    _ = ca.write_bytes(make_server_identity(int(time.time()), bytes(32)).ca_pem)
    who = 'hotkey = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"\nvm_name = "vm-1"'
    disk = f'[volumes.storage]\ndevice = "{settings}"'
    _ = settings.write_text(f'servers = ["https://localhost"]\nca_file = "{ca}"\n{who}\n{disk}\n')
    without = after("sys.modules['cryptography'] = None")
    code, _, complaint = run(agent, "agent", "run", "--images", "--config", settings, *more, flags=without)
    assert code == 2
    assert "apt-get install python3-cryptography" in " ".join(complaint.split())
    assert "File" not in complaint, "no trace"


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("/nowhere/python3", "cannot be run: No such file or directory"),
        ("echo 3.9.18 False", "is Python 3.9.18; the agent needs Python 3.11 or newer"),
        ("false", "does not run as Python"),
    ],
)
def test_a_target_that_is_none(tmp_path: Path, python: str, why: str) -> None:
    if "/" not in python:
        script = tmp_path / "python"
        _ = script.write_text(f"#!/bin/sh\n{python}\n")
        script.chmod(0o755)
        python = str(script)
    command = [sys.executable, "-m", "tools.agent_zipapp", str(tmp_path / "agent.pyz"), "--python", python]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{python} {why}")
    assert not (tmp_path / "agent.pyz").exists()


def test_byte_code_is_what_is_loaded(agent: Path, tmp_path: Path) -> None:
    """Broken sources go unnoticed beside it, and only beside it."""
    for suffixes, code in (((".py", ".pyc"), 0), ((".py",), 1)):
        broken = tmp_path / f"broken-{code}.pyz"
        with zipfile.ZipFile(agent) as whole, zipfile.ZipFile(broken, "w") as archive:
            for entry in whole.infolist():
                if entry.filename.endswith(suffixes):
                    archive.writestr(entry, b"broken" if entry.filename.endswith(".py") else whole.read(entry))
        assert run(broken, "agent", "run", "--help")[0] == code


def test_byte_code_has_no_docstrings(agent: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(agent)!r}); import chutes_proto.errors as e; print(e.__doc__)"
    done = subprocess.run([SYSTEM, "-I", "-c", code], capture_output=True, text=True, env={}, check=True)
    assert done.stdout == "None\n"


def test_another_python_takes_the_source(agent: Path) -> None:
    ours = f"Python {sys.version_info.major}.{sys.version_info.minor}."
    if run(agent, flags=("-V",))[1].startswith(ours):
        pytest.skip("this Python is the system's")
    flags = (
        "-c",
        f"import sys; sys.path.insert(0, {str(agent)!r}); import chutes_proto.errors as e; print(e.__file__)",
    )
    done = subprocess.run([sys.executable, "-I", *flags], capture_output=True, text=True, env={}, check=True)
    assert done.stdout == f"{agent}/chutes_proto/errors.py\n"


@pytest.mark.no_cover  # nothing of the package runs
def test_the_same_sources_make_the_same_bytes(
    agent: Path, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build(Path("again") / "other.pyz", system)
    again = (tmp_path / "again" / "other.pyz").read_bytes()
    assert again == agent.read_bytes()
    assert str(ROOT).encode() not in again
    assert b"/tmp/" not in again
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    build(tmp_path / "later.pyz", system)
    with zipfile.ZipFile(tmp_path / "later.pyz") as later, zipfile.ZipFile(agent) as first:
        assert {entry.date_time for entry in later.infolist()} == {(2023, 11, 14, 22, 13, 20)}
        assert later.namelist() == first.namelist() == sorted(first.namelist())


def test_nothing_of_the_server_is_in_it(agent: Path) -> None:
    with zipfile.ZipFile(agent) as archive:
        names = [name.removesuffix(".py") for name in archive.namelist() if name.endswith(".py")]
    rooms = {"/".join(name.split("/")[:2]) for name in names}
    others = {"attr", "attrs", "cattrs", "h11", "typing_extensions"}
    assert {name.split("/")[0] for name in names} == {"__main__", "chutes_proto", *others}
    assert rooms.isdisjoint(f"chutes_proto/{room}" for room in ("server", "store", "units", "keys"))


def test_all_that_is_in_it_can_be_imported(agent: Path) -> None:
    with zipfile.ZipFile(agent) as archive:
        files = [Path(name) for name in archive.namelist() if name.startswith("chutes_proto/") and name.endswith(".py")]
    names = [".".join(file.parent.parts if file.stem == "__init__" else file.with_suffix("").parts) for file in files]
    imports = "; ".join(f"import {name}" for name in names if not name.endswith("__main__"))
    code = f"import sys; sys.path.insert(0, {str(agent)!r}); {imports}"
    done = subprocess.run([SYSTEM, "-I", "-c", code], capture_output=True, text=True, env={}, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_simulated_platform_is_reported(agent: Path) -> None:
    make = "from chutes_proto.io.quoters.choose import make_quoter; make_quoter('simulated:/tmp')"
    code = f"import sys; sys.path.insert(0, {str(agent)!r}); {make}"
    done = subprocess.run([SYSTEM, "-I", "-c", code], capture_output=True, text=True, env={}, check=False)
    assert done.stderr.splitlines()[-1].startswith(
        "chutes_proto.errors.ConfigurationError: quoter: this agent has no simulated platform"
    )


def test_settings_that_cannot_be_read_are_named(agent: Path, tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    _ = settings.write_text(json.dumps("text"))
    code, _, complaint = run(agent, "agent", "run", "--config", settings)
    assert code == 2
    assert complaint.startswith(f"chutes-proto: {settings}: not TOML")
