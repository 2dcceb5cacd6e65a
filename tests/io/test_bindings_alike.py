"""What both bindings have, they have line for line alike; only the names of the loops' libraries differ."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
TRIO, ASYNCIO = SRC / "chutes_proto_trio", SRC / "chutes_proto_asyncio"
FILES = sorted(file.name for file in TRIO.glob("*.py"))


def test_both_have_the_same_files() -> None:
    assert sorted(file.name for file in ASYNCIO.glob("*.py")) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_both(name: str) -> None:
    on_trio = (TRIO / name).read_text("utf-8").replace("trio", "asyncio")
    on_asyncio = (ASYNCIO / name).read_text("utf-8").replace("anyio", "asyncio")
    ours, theirs = on_trio.splitlines(), on_asyncio.splitlines()
    assert difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio() >= 0.9
