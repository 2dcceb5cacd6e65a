"""How a text names a quoter: for settings and command lines, checked before a machine is there that could quote.

`chutes_proto.io.quoters.choose` makes what is named, and says what each kind is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from chutes_proto.errors import ConfigurationError
from chutes_proto.wire.origin import check_socket_path

COMMAND: Final = "command:"
"""What stands before a program and its arguments."""

_ADDRESS = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")
_FOLLOWED: Final = {
    "auto": "nothing",
    "tsm": "nothing, or :DIR",
    "vsock": "nothing, or :CID:PORT, two numbers below 2^32",
    "unix": ":PATH",
    "simulated": "nothing, or :DIR",
}


def parse_quoter(text: str) -> tuple[str, str]:
    """The kind of quoter, and what follows its colon; a text that begins with no kind's name is a ``command``.

    Raises `ConfigurationError` where something else has to follow.
    """
    kind, colon, rest = text.partition(":")
    if kind not in _FOLLOWED:
        return "command", text.removeprefix(COMMAND)
    fits = {"auto": not colon, "vsock": not colon or _is_address(rest), "unix": bool(rest)}
    if not fits.get(kind, bool(rest) or not colon):
        raise ConfigurationError(f"quoter: {kind} is followed by {_FOLLOWED[kind]}")
    if kind == "unix":
        try:
            _ = check_socket_path(rest)
        except ConfigurationError as exc:
            raise ConfigurationError(f"quoter: {exc}") from None
    return kind, rest


def _is_address(text: str) -> bool:
    found = _ADDRESS.fullmatch(text)
    return found is not None and max(map(int, found.groups())) < 2**32


def cut_command(line: str) -> list[str]:
    """A program and its arguments, cut as a shell would. Raises `ConfigurationError`, for a caller to say of what."""
    import shlex

    try:
        words = shlex.split(line)
    except ValueError as exc:
        raise ConfigurationError(f"it cannot be cut into arguments: {exc}") from None
    return check_command(words)


def check_command(words: Sequence[str]) -> list[str]:
    """The words, if they are a program and its arguments. Raises `ConfigurationError`, for a caller to say of what."""
    if not words or not words[0]:
        raise ConfigurationError("it names no program")
    if any("\0" in word for word in words):
        raise ConfigurationError("it has a NUL")
    return list(words)
