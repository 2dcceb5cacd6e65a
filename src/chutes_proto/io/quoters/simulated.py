"""The simulated platform of this user, kept on disk: for development and for tests.

Rules kept here:

* a production server does not import this: a simulated root is trusted only on explicit request;
* of several processes that ask for a platform at once, all get the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

from chutes_proto.errors import ConfigurationError, FileUnavailable
from chutes_proto.io.files import create_private, make_directory, read_private
from chutes_proto.testing._directory import PLATFORM_FILE, SEED_SIZE, PlatformRecord


def platform_directory(environment: Mapping[str, str]) -> Path:
    """Return the directory of this user's simulated platform (XDG Base Directory Specification, XDG_STATE_HOME)."""
    state = environment.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        raise FileUnavailable("this user has no home directory; name a directory with --platform DIR") from None
    return base / "chutes-proto" / "platform"


def open_platform(directory: str | Path, now: int) -> PlatformRecord:
    """Return the simulated platform in ``directory``, made at ``now`` (unix seconds) if it is missing.

    Raises `ConfigurationError`, and `FileUnavailable` for a file that cannot be read or written.
    """
    file = make_directory(directory, mode=0o700) / PLATFORM_FILE
    if not file.exists():
        create_private(file, PlatformRecord(secrets.token_bytes(SEED_SIZE), now).encode())
    data = read_private(file)
    try:
        return PlatformRecord.decode(data)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{file}: {exc}") from None
