"""The README says nothing that the code does not: its tables are rendered, its symbols exist, its examples run."""

import ast
import re
from pathlib import Path

import pytest

from chutes_proto.client import exchange
from chutes_proto.codes import Code
from chutes_proto.wire import endpoints

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", README.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


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
