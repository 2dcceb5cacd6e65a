"""The form of names, nonces, tokens and times on the wire."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final, NewType

from chutes_proto.errors import RemoteProtocolError

Name = NewType("Name", str)
"""The name of a VM or a server: ``[A-Za-z0-9_.-]{1,128}``, but neither ``.`` nor ``..``, which no URL could carry."""

NAME_PATTERN = r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}$"
NAME_RULE = "1 to 128 of the characters A-Z a-z 0-9 _ . - but neither . nor .."
"""`NAME_PATTERN` for people."""

ROOT: Final = "root"
"""The root disk's name among the volumes; no volume has it."""

HEX_32: Final = re.compile(r"[0-9a-f]{64}")
"""A nonce or a token: 32 bytes in lowercase hex."""


def hex_32(text: str, what: str) -> str:
    """Check that ``what`` in a server's answer is 64 lowercase hex digits. Raises `RemoteProtocolError`."""
    if not HEX_32.fullmatch(text):
        raise RemoteProtocolError(f"the server's {what} is not 64 lowercase hex digits")
    return text


def timestamp(at: int) -> str:
    """Format unix seconds by RFC 3339, in UTC with whole seconds and ``+00:00``, which deployed clients know."""
    return datetime.fromtimestamp(at, UTC).isoformat()
