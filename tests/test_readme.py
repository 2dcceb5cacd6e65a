"""The README says nothing that the code does not: its tables are rendered, its symbols exist, its examples run."""

import ast
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from chutes_proto.boot import _exchange as exchange
from chutes_proto.quote.errors import VerificationError
from chutes_proto.testing._directory import PLATFORM_FILE, PlatformRecord
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire import endpoints
from chutes_proto.wire.codes import Code
from tests.dev_server import dev_server

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def code(number: int) -> dict[str, Any]:
    """What the README's Python of this number defines."""
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number], names)
    return names


def test_the_agent_of_the_readme_is_given_its_keys(tmp_path):
    hotkey = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
    with dev_server(tmp_path) as server:
        quoter = PlatformRecord.decode((tmp_path / PLATFORM_FILE).read_bytes()).platform.quote
        unlock = partial(code(0)["unlock"], server.url, hotkey, "vm-1", quoter, server.ca.read_bytes())
        root, keys, in_use = trio.run(unlock)
    assert len(root) == len(keys["storage"]) == len(keys["tdx-cache"]) == 128
    assert in_use == {"storage"}


def test_the_verifier_of_the_readme_trusts_intel_alone(vectors):
    folder = vectors / "real" / "tdx-v4-00806f050000-00b2526a-20250611"
    expected = json.loads((folder / "expected.json").read_bytes())
    quote, collateral = (folder / "quote.bin").read_bytes(), (folder / "collateral.json").read_bytes()
    now = int((folder / "now.txt").read_text())
    status, mr_td = code(1)["check"](quote, collateral, now, bytes.fromhex(expected["parsed"]["report"]["report_data"]))
    assert (status, mr_td.hex()) == (expected["tcb_status"], expected["parsed"]["report"]["mr_td"])
    with pytest.raises(VerificationError):
        code(1)["check"](quote, collateral, now, b"another report data, of 64 bytes".ljust(64))
    platform = SimulatedPlatform(bytes(32))
    with pytest.raises(VerificationError):
        code(1)["check"](platform.quote(bytes(64)), platform.collateral_json(now), now, bytes(64))


def test_it_is_short():
    assert len(README.split()) <= 900


def test_the_endpoint_table_is_the_codes():
    assert endpoints.markdown_table() in README


def test_the_state_diagram_is_the_transition_tables():
    assert exchange.mermaid().strip() in README


def test_the_codes_are_the_closed_list():
    said = re.findall(r"`([a-z_]+)`", section("Error codes"))
    assert said == [str(code) for code in Code]


PLACES = re.findall(r"\| `(src/[\w/.]+)(?::(\w[\w.]*))?` \|", section("Where is…"))


def test_the_map_is_not_empty():
    assert len(PLACES) >= 8


@pytest.mark.parametrize(("file", "symbol"), PLACES)
def test_the_map_is_right(file, symbol):
    body = ast.parse((ROOT / file).read_text("utf-8")).body if file.endswith(".py") else []
    for name in filter(None, symbol.split(".")):
        body = next(found for node in body if (found := members(node, name)) is not None)


def members(node: ast.stmt, name: str) -> list[ast.stmt] | None:
    match node:
        case ast.ClassDef(name=named, body=body) | ast.FunctionDef(name=named, body=body) if named == name:
            return body
        case ast.Assign(targets=[ast.Name(named)]) if named == name:
            return []
        case ast.AnnAssign(target=ast.Name(named)) if named == name:
            return []
        case _:
            return None
