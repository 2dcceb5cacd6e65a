"""The examples against a served development server, over TLS; they import public names only."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.miner import HotkeyPair
from chutes_proto.secret import Secret
from tests.clients import run
from tests.conftest import ROOT
from tests.dev_server import DevServer, dev_server
from tests.luks import headers
from tests.server.world import GPU
from tests.test_public import PUBLIC

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
PROGRAMS = [example for example in EXAMPLES if "sys.argv" in example.read_text("utf-8")]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with dev_server(tmp_path_factory.mktemp("platform")) as server:
        yield server


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["sync", "trio", "asyncio"])
def test_a_boot_agent_opens_disks_and_formats_only_blank_ones(kind: str, server: DevServer, tmp_path: Path) -> None:
    disks = {"storage": tmp_path / "storage", "tdx-cache": tmp_path / "cache"}
    with disks["storage"].open("wb") as disk:
        _ = disk.truncate(headers.SIZE)
        _ = disk.write(headers.both(headers.told()))
    with disks["tdx-cache"].open("wb") as disk:
        _ = disk.truncate(headers.SIZE)
    example = load(f"boot_agent_{kind}")
    opened: list[tuple[str, int, bool]] = []
    example.open_disk = lambda volume, secret, *, may_format: opened.append((volume, len(secret), may_format))
    example.has_luks_header = partial(example.has_luks_header, images=True)
    quoter = example.make_quoter(f"simulated:{server.platform}")

    async def unlock() -> None:
        done = example.unlock(server.url, HOTKEY, f"vm-{kind}", quoter, server.ca.read_bytes(), disks)
        if inspect.isawaitable(done):
            await done

    run(kind, unlock)
    assert opened == [("root", 128, False), ("storage", 128, False), ("tdx-cache", 128, True)]


def test_a_miner_registers_and_attests_a_server(server: DevServer, capsys: pytest.CaptureFixture[str]) -> None:
    example = load("miner_client")
    pair = HotkeyPair.from_seed(Secret(bytes(range(32))))
    quoter = example.make_quoter(f"simulated:{server.platform}", stage="runtime")
    for _again in range(2):
        example.attest(server.url, pair, quoter, server.ca.read_bytes(), "node-1", "1.2.3.4", [GPU])
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("node-1 at 1.2.3.4, registered ")
        assert line.endswith(": fresh")


@each_example
def test_an_example_imports_public_names_only(example: Path) -> None:
    for node in ast.walk(ast.parse(example.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chutes_proto"):
            assert node.module in PUBLIC
            exported = getattr(importlib.import_module(node.module), "__all__", ())
            assert {alias.name for alias in node.names} <= {*exported}
        elif isinstance(node, ast.Import):
            assert all(alias.name in PUBLIC or "chutes_proto" not in alias.name for alias in node.names)


@pytest.mark.parametrize("example", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_without_arguments_says_how_it_is_used(example: Path) -> None:
    ended = subprocess.run([sys.executable, example], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("usage: ")
