"""Wheel and sdist, and a fresh environment for each extra: its names are there, and what is missing is named."""

from __future__ import annotations

import compileall
import json
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from attrs import frozen
from packaging.requirements import Requirement

from chutes_proto.io.server.development import write_server
from chutes_proto.testing._directory import simulation_files
from chutes_proto.testing._platform import SimulatedPlatform
from tests.test_public import EXPORTED

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import importlib, json, sys
problems = {}
for package, name in json.load(sys.stdin):
    try:
        value = getattr(importlib.import_module(package), name)
        if name == "check_installed":
            value()
    except Exception as exc:
        problems[package] = str(exc)
print(json.dumps(problems))
"""
PROMISED = [
    *EXPORTED,
    ("chutes_proto.auth.hotkey", "check_installed"),
    ("chutes_proto.io.stores.postgres", "has_secret"),
]
NEEDS = {
    "chutes_proto.server": "tls",
    "chutes_proto.auth.hotkey": "hotkey",
    "chutes_proto.io.stores.postgres": "postgres",
    "chutes_proto_trio": "trio",
    "chutes_proto_asyncio": "asyncio",
}
"""The packages that need an extra; all others need none."""
BRINGS = {
    "": set[str](),
    "tls": {"tls"},
    "hotkey": {"hotkey"},
    "postgres": {"postgres"},
    "trio": {"trio", "asyncio", "tls", "hotkey"},  # asyncio itself is Python's
    "asyncio": {"asyncio", "tls", "hotkey"},
    "metrics": {"metrics"},
    "cli": {"cli"},
    "all": {"trio", "asyncio", "tls", "hotkey", "postgres", "metrics", "cli"},
}
COMMANDS = {
    "verify quote.bin --collateral collateral.json --root root.der": "cli",
    "store init --config server.toml": "cli",
    "store check --config server.toml": "cli",
    "hotkey inspect 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY": "cli",
    "serve --config server.toml --check": "asyncio",
    "demo": "trio",
}
"""At least one command of each group, with the extra that it needs."""


@frozen
class Built:
    wheel: Path
    sdist: Path


def build(source: Path, folder: Path) -> Built:
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Built(next(folder.glob("*.whl")), next(folder.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def needed(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """The names of installed distributions that a requirement leads to."""
    for extra in ("", *sorted(requirement.extras)):
        if (requirement.name, extra) in seen:
            continue
        seen.add((requirement.name, extra))
        yield requirement.name
        for text in distribution(requirement.name).requires or ():
            further = Requirement(text)
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                yield from needed(further, seen)


@pytest.fixture(scope="module")
def unpacked(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of the wheel, compiled once for all environments."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(folder)
    assert compileall.compile_dir(folder, quiet=1)
    return folder


def install(unpacked: Path, extra: str, folder: Path) -> Path:
    """An environment with the wheel and the distributions of an extra, by links; the path of its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in unpacked.iterdir():
        (site / path.name).symlink_to(path)
    for name in {*needed(Requirement(f"chutes-proto[{extra}]" if extra else "chutes-proto"), set())} - {"chutes-proto"}:
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(found.locate_file(top)))
    return folder / "bin" / "python"


def run(python: Path, words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-I", "-m", "chutes_proto", *words.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)


def test_the_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, tmp_path / "dist")
    listed = [sorted(zipfile.ZipFile(wheel).namelist()) for wheel in (built.wheel, again.wheel)]
    assert listed[0] == listed[1]
    assert any(name.endswith("chutes_proto/py.typed") for name in listed[0])
    assert not [name for name in listed[0] if name.startswith("tests/")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's files, a quote with collateral, and a hotkey."""
    folder = tmp_path_factory.mktemp("files")
    now = int(time.time())
    platform = SimulatedPlatform(bytes(32))
    write_server(folder, platform, now)
    for name, data in simulation_files(platform, bytes(64), now=now, stage="boot").items():
        _ = (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("extra", BRINGS)
def test_an_extra_brings_its_names_and_commands(unpacked: Path, extra: str, files: Path, tmp_path: Path) -> None:
    python = install(unpacked, extra, tmp_path / "environment")
    done = subprocess.run(
        [python, "-I", "-c", PROBE], input=json.dumps(PROMISED), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    problems = json.loads(done.stdout)
    assert problems.keys() == {package for package, needs in NEEDS.items() if needs not in BRINGS[extra]}
    for package, problem in problems.items():
        assert f"pip install 'chutes-proto[{NEEDS[package]}]'" in problem
        assert "\n" not in problem
    assert run(python, "agent --help", files).returncode == 0
    has_cli = "cli" in BRINGS[extra]
    assert run(python, "--help", files).returncode == (0 if has_cli else 2)
    for words, needs in COMMANDS.items() if has_cli else [("store check --store sqlite:keys.db", "cli")]:
        ended = run(python, words, files)
        if needs in BRINGS[extra]:
            assert (ended.returncode, ended.stderr) == (0, ""), words
        else:
            told = f"chutes-proto: this command needs the extra {needs}: pip install 'chutes-proto[{needs}]'\n"
            assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", told), words
