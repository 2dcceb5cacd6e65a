"""A value that was erased is found in a file wherever it stands, and nothing else is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from chutes_proto.io.stores import erasures
from chutes_proto.io.stores.erasures import SHORTEST, holds


@pytest.mark.parametrize("longest", [SHORTEST, 47, 48, 156])
def test_a_value_is_found_at_any_place(tmp_path: Path, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over the border of two blocks, and at the very end."""
    monkeypatch.setattr(erasures, "_BLOCK", 512)
    drawn = random.Random(longest)
    values = [drawn.randbytes(longest), drawn.randbytes(SHORTEST), drawn.randbytes(longest)]
    around = drawn.randbytes(1100)
    file = tmp_path / "file"
    for value in values:
        for at in range(496, 513):
            _ = file.write_bytes(around[:at] + value + around[at:])
            assert holds(file, values)
            _ = file.write_bytes(around[:at] + value)
            assert holds(file, values)
            _ = file.write_bytes(around[:at] + value[:-1] + bytes([value[-1] ^ 1]) + around[at:])
            assert not holds(file, values)


def test_no_value_and_no_file_hold_nothing(tmp_path: Path) -> None:
    _ = (tmp_path / "file").write_bytes(bytes(4096))
    assert not holds(tmp_path / "file", [])
    assert not holds(tmp_path / "none", [bytes(SHORTEST)])
    assert holds(tmp_path / "file", [bytes(SHORTEST)])
