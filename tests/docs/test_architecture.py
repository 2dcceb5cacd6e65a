"""The architecture page and the security page name files, symbols and tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_purity import PACKAGES

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MAP = re.findall(r"\| `(src/[\w/.]+)(?::(\w[\w.]*))?` \|", ARCHITECTURE)
SECURITY = (ROOT / "docs" / "security.md").read_text("utf-8")
SHOWN_BY = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)))
PARTIES = (
    "Network peer, Host, Miner, Key server, Database reader, Database writer, Writer of the server's files, Operator,"
    " Past holder of a KEK"
).split(", ")


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


def test_the_map_is_not_empty() -> None:
    assert len(MAP) >= 8


@pytest.mark.parametrize(("file", "symbol"), MAP)
def test_the_map_is_right(file: str, symbol: str) -> None:
    body = ast.parse((ROOT / file).read_text("utf-8")).body if file.endswith(".py") else []
    for name in filter(None, symbol.split(".")):
        body = next(found for node in body if (found := members(node, name)) is not None)


def test_the_table_of_packages_has_their_imports() -> None:
    table = ARCHITECTURE.partition("| package | contents | imports |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| ((?:`\w+`(?:, )?)*) ?\|$", table, re.MULTILINE)
    imports = {package: " ".join(re.findall(r"\w+", others)) for package, others in rows}
    assert {package: imports.get(package) for package in PACKAGES} == PACKAGES


def test_every_party_says_what_it_can_and_cannot_do() -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", SECURITY, re.MULTILINE | re.DOTALL))
    for party in PARTIES:
        assert "| can | test, or why |" in sections[party], party
        assert "| cannot | test |" in sections[party], party


def test_every_line_of_what_a_party_cannot_do_names_a_test() -> None:
    for table in re.findall(r"^\| cannot \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", SECURITY, re.MULTILINE):
        for line in table.splitlines():
            assert re.search(r"`tests/[\w/]+\.py::test_\w+`", line), line


def test_every_line_of_what_a_party_can_do_names_a_test_or_says_why() -> None:
    tables = re.findall(r"^\| can \| test, or why \|\n\|---\|---\|\n((?:\|.*\n)+)", SECURITY, re.MULTILINE)
    assert len(tables) == len(PARTIES)
    for table in tables:
        for line in table.splitlines():
            assert line.rsplit("|", 2)[1].strip(), line


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize(("file", "test"), SHOWN_BY)
def test_what_security_rests_on_exists(file: str, test: str) -> None:
    assert Path(ROOT / file).is_file()
    assert test in functions_of(file)
