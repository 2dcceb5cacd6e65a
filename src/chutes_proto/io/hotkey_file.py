"""Hotkeys in the files of wallets."""

from __future__ import annotations

from pathlib import Path

from chutes_proto.auth.hotkey import HotkeyError, HotkeyPair
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import Files


def read_hotkey(path: str | Path, files: Files | None = None) -> HotkeyPair:
    """Return the hotkey in a wallet's file: JSON that only its owner may read.

    It has ``ss58Address``, and ``privateKey`` (64 bytes in hex) or ``secretSeed`` (32). It is read through ``files``,
    if they are given.

    Raises `FileUnavailable`, and `ConfigurationError` for any other file or permissions that are too open; neither
    repeats the content.
    """
    try:
        return HotkeyPair.from_json((files or Files()).read_private(path))
    except HotkeyError as exc:
        raise ConfigurationError(f"{path}: {exc}") from None
