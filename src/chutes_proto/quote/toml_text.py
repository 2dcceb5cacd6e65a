"""TOML, whose errors name the key of the line at fault, and never a value: that could be a password.

Source: TOML 1.0.0.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, Final

_LINE: Final = re.compile(r"at line ([0-9]+)")
_KEY: Final = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*=")


def decode_toml(data: bytes) -> dict[str, Any]:
    """The table in ``data``. Raises `ValueError`, and `RecursionError` for what is nested too deeply."""
    text = data.decode("utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        line = _LINE.search(str(exc))
        key = _KEY.match(text.split("\n")[int(line[1]) - 1]) if line else None
        raise ValueError(f"{exc}; the key there is {key[1]}" if key else str(exc)) from None
