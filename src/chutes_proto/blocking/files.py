"""Files: what the operator names is read whole and bounded, what others must not read is made so from the start.

Rules kept here:

* a secret in a file that others may read is refused, with the command that mends it;
* a file appears whole or not at all, and a private one is never readable by others, not even for a moment;
* no error repeats what a file holds; each names the file and says what to do.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from chutes_proto.errors import ConfigurationError
from chutes_proto.testing.directory import PLATFORM_FILE, SEED_SIZE, PlatformRecord

MAX_SIZE: Final = 4 * 1024 * 1024
"""No file that is read here needs more bytes."""


class FileUnavailable(ConfigurationError):
    """A file cannot be opened, read or written; the text names it and says why."""


def read_file(path: str | Path, *, limit: int = MAX_SIZE) -> bytes:
    """The whole file. Raises `FileUnavailable`, also for one of more than ``limit`` bytes."""
    try:
        with Path(path).open("rb") as file:
            return _bounded(path, file.read(limit + 1), limit)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise _unavailable(path, "cannot be read", exc) from None


def read_private(path: str | Path, *, limit: int = MAX_SIZE) -> bytes:
    """The whole of a file that only its owner can read. Raises `ConfigurationError`."""
    try:
        with Path(path).open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigurationError(f"{path}: its mode {mode:04o} lets others at a secret; run: chmod 600 {path}")
            return _bounded(path, file.read(limit + 1), limit)
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be read", exc) from None


def write_file(path: str | Path, data: bytes, *, mode: int = 0o644) -> None:
    """Put ``data`` at ``path``, in place of what is there. Raises `FileUnavailable`."""
    try:
        partial = _written_beside(Path(path), data, mode)
        try:
            _ = partial.replace(path)
        except OSError:
            partial.unlink()
            raise
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be written", exc) from None


def create_private(path: str | Path, data: bytes) -> None:
    """Make a file that only its owner can read, unless there is one: of several who try, one has made it.

    Raises `FileUnavailable`.
    """
    try:
        partial = _written_beside(Path(path), data, 0o600)
        try:
            with suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink()
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be written", exc) from None


def make_directory(path: str | Path, *, mode: int = 0o755) -> Path:
    """The directory, made with its parents where it is missing. Raises `FileUnavailable`."""
    try:
        Path(path).mkdir(mode=mode, parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be made", exc) from None
    return Path(path)


def platform_directory(environment: Mapping[str, str]) -> Path:
    """Where this user's simulated platform is kept (XDG Base Directory Specification, ``$XDG_STATE_HOME``)."""
    state = environment.get("XDG_STATE_HOME", "")
    try:
        base = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        raise FileUnavailable("this user has no home directory; name a directory with --platform DIR") from None
    return base / "chutes-proto" / "platform"


def open_platform(directory: str | Path, now: int) -> PlatformRecord:
    """The simulated platform that is kept in ``directory``, made there if it is missing.

    Raises `ConfigurationError`. Whoever asks at the same moment gets the same platform.
    """
    file = make_directory(directory, mode=0o700) / PLATFORM_FILE
    if not file.exists():
        create_private(file, PlatformRecord(secrets.token_bytes(SEED_SIZE), now).encode())
    try:
        return PlatformRecord.decode(read_private(file))
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        raise ConfigurationError(f"{file}: {exc}") from None


def _bounded(path: str | Path, data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FileUnavailable(f"{path}: has more than {limit} bytes, which nothing of this kind has")
    return data


def _written_beside(path: Path, data: bytes, mode: int) -> Path:
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _ = file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        partial.unlink()
        raise
    return partial


def _unavailable(path: str | Path, what: str, exc: Exception) -> FileUnavailable:
    why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return FileUnavailable(f"{path}: {what}: {why}")
