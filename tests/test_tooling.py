"""The tools that guard the project do guard it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import requires
from pathlib import Path

import pytest

from chutes_proto._extras import EXTRAS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def complaints(source: str, folder: Path) -> list[tuple[int, str]]:
    """Line and rule of everything that basedpyright, as configured for this project, has to say."""
    snippet = folder / "snippet.py"
    _ = snippet.write_text(source, "utf-8")
    checker = Path(sys.executable).parent / "basedpyright"
    done = subprocess.run([checker, "--outputjson", snippet], cwd=ROOT, capture_output=True, text=True, check=False)
    return [(d["range"]["start"]["line"] + 1, d["rule"]) for d in json.loads(done.stdout)["generalDiagnostics"]]


def test_a_forgotten_yield_from_is_reported(tmp_path: Path) -> None:
    source = """
from chutes_proto.effects import Entropy, Flow

def flow() -> Flow[bytes]:
    Entropy(32)
    return (yield from Entropy(32))
"""
    assert complaints(source, tmp_path) == [(5, "reportUnusedCallResult")]
    assert complaints(source.replace("    Entropy", "    _ = yield from Entropy"), tmp_path) == []


def test_every_dependency_is_pinned_with_hashes() -> None:
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    pins = re.findall(r"^([a-z0-9-]+)==\S+.*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", constraints, re.M)
    assert len(pins) == len(re.findall(r"^\S+==", constraints, re.M))
    extras = PROJECT["project"]["optional-dependencies"].values()
    lists = [PROJECT["project"]["dependencies"], PROJECT["build-system"]["requires"], *extras]
    names = {re.split(r"[^A-Za-z0-9-]", dependency)[0].lower() for listed in lists for dependency in listed}
    assert names - {"chutes-proto"} <= set(pins)


def test_trio_is_as_new_as_anyio_needs_it() -> None:
    """anyio names trio only in an extra of its own, so pip would install an older one beside it."""
    assert oldest_trio(PROJECT["project"]["optional-dependencies"]["trio"]) >= oldest_trio(requires("anyio") or [])


def oldest_trio(requirements: list[str]) -> tuple[int, ...]:
    """For the newest Python, where there are several."""
    bounds = [found for each in requirements if (found := re.match(r"trio>=(\d+)\.(\d+)", each))]
    return max(tuple(int(part) for part in bound.groups()) for bound in bounds)


def test_every_extra_is_known_to_the_program() -> None:
    """A missing module is told with the extra that brings it."""
    extras = PROJECT["project"]["optional-dependencies"]
    modules = {"click": "click", "rich": "rich", "h11": "h11", "pyOpenSSL": "OpenSSL", "psycopg": "psycopg"}
    modules |= {"pyyaml": "yaml", "py-sr25519-bindings": "sr25519", "anyio": "anyio", "httpx": "httpx", "trio": "trio"}
    modules |= {"prometheus-client": "prometheus_client"}
    brought = {
        name: {modules[re.split(r"[^A-Za-z0-9-]", one)[0]] for one in listed if not one.startswith("chutes-proto")}
        for name, listed in extras.items()
        if name not in ("all", "test", "lint")
    }
    assert set(brought) == set(EXTRAS)
    for name, found in brought.items():
        assert found <= set(EXTRAS[name]), name


@pytest.mark.parametrize(
    ("group", "pins"), [("docs", "tools/docs-requirements.txt"), ("fuzz", "tests/fuzz/requirements.txt")]
)
def test_what_users_do_not_need_is_pinned_too(group: str, pins: str) -> None:
    text = (ROOT / pins).read_text("utf-8")
    pinned = re.findall(r"^([a-z0-9-]+)==\S+.*\\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.M)
    assert len(pinned) == len(re.findall(r"^\S+==", text, re.M))
    assert {re.split(r"[^A-Za-z0-9-]", name)[0].lower() for name in PROJECT["dependency-groups"][group]} <= set(pinned)


def test_the_command_and_the_module_are_installed() -> None:
    assert PROJECT["project"]["scripts"] == {"chutes-proto": "chutes_proto.cli.main:program"}
    for command in ([Path(sys.executable).parent / "chutes-proto"], [sys.executable, "-m", "chutes_proto"]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: chutes-proto ")


def test_each_package_is_marked_as_typed() -> None:
    packages = [path for path in (ROOT / "src").iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    assert {path.name for path in packages} == {"chutes_proto", "chutes_proto_asyncio", "chutes_proto_trio"}
    assert all((path / "py.typed").is_file() for path in packages)
    assert all((path / "__init__.py").is_file() for path in packages)


def test_make_help_names_every_target(require_program: Callable[[str], str]) -> None:
    make = [require_program("make"), "--no-print-directory", "help"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert phony
    assert set(re.findall(r"^  (\w+) +\w", done.stdout, re.M)) == set(phony[1].split())
