"""The JSON of this API.

Accepted is the JSON of `strict_json` (RFC 8259 in UTF-8, nested at most 16 deep, no member twice, no lone surrogates),
with numbers that a float holds. Written is compact JSON, because deployed VM images cut answers apart with ``grep``.
"""

from __future__ import annotations

import json
from typing import Any

from chutes_proto.quote import _strict_json as strict_json


class JsonError(ValueError):
    """Bytes that are not JSON of this API; the text names the problem and repeats none of the input."""


def decode(data: bytes) -> Any:
    """Decode ``data``. Raises `JsonError`."""
    try:
        return strict_json.decode(data, fractions=True)
    except strict_json.JsonError as exc:
        raise JsonError(exc.problem) from None


def encode(value: object) -> bytes:
    """Encode as compact JSON in ASCII, members in the order of ``value``."""
    return _compact(value).encode("ascii")


_compact = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # dumps makes an encoder each time
