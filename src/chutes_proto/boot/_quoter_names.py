"""Names of quoters in settings and on command lines, checked without a machine that could quote.

`chutes_proto.io.quoters.choose` makes the quoters, and describes each kind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from chutes_proto.errors import ConfigurationError
from chutes_proto.wire.origin import check_socket_path

COMMAND: Final = "command:"
"""The prefix of a program and its arguments."""

_ADDRESS = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")
_FOLLOWED: Final = {
    "auto": "nothing",
    "tsm": "nothing, or :DIR",
    "vsock": "nothing, or :CID:PORT, two numbers below 2^32",
    "unix": ":PATH",
    "simulated": "nothing, or :DIR",
}


def parse_quoter(text: str) -> tuple[str, str]:
    """Split into the kind of quoter and the text after its colon; without a kind it is a ``command``.

    Raises `ConfigurationError` where the kind needs another text.
    """
    kind, colon, rest = text.partition(":")
    if kind not in _FOLLOWED:
        return "command", text.removeprefix(COMMAND)
    address = _ADDRESS.fullmatch(rest)
    is_address = address is not None and max(map(int, address.groups())) < 2**32
    fits = {"auto": not colon, "vsock": not colon or is_address, "unix": bool(rest)}
    if not fits.get(kind, bool(rest) or not colon):
        raise ConfigurationError(f"quoter: {kind} is followed by {_FOLLOWED[kind]}")
    if kind == "unix":
        try:
            _ = check_socket_path(rest)
        except ConfigurationError as exc:
            raise ConfigurationError(f"quoter: {exc}") from None
    return kind, rest


def cut_command(line: str) -> list[str]:
    """Cut a program and its arguments as a shell would. Raises `ConfigurationError`; the caller adds the key."""
    import shlex

    try:
        words = shlex.split(line)
    except ValueError as exc:
        raise ConfigurationError(f"it cannot be split into arguments: {exc}") from None
    return check_command(words)


def check_command(words: Sequence[str]) -> list[str]:
    """Check that the words are a program and its arguments. Raises `ConfigurationError`; the caller adds the key."""
    if not words or not words[0]:
        raise ConfigurationError("it names no program")
    if any("\0" in word for word in words):
        raise ConfigurationError("it contains a NUL")
    return list(words)
