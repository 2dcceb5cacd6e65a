"""Files: what the operator names is read whole and bounded, what others must not read is made so from the start.

Rules kept here:

* a secret in a file that others may read is refused, with the command that mends it;
* a file appears whole or not at all, and a private one is never readable by others, not even for a moment;
* no error repeats what a file holds; each names the file and says what to do.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from chutes_proto.errors import ConfigurationError, FileUnavailable

MAX_SIZE: Final = 4 * 1024 * 1024
"""No file that is read here needs more bytes."""


def read_file(path: str | os.PathLike[str], *, limit: int = MAX_SIZE) -> bytes:
    """The whole file. Raises `FileUnavailable`, also for one of more than ``limit`` bytes."""
    return _bounded(path, read_head(path, limit + 1), limit)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the path from the root, by the present working directory."""
    return str(Path(path).absolute())


def read_head(path: str | os.PathLike[str], size: int) -> bytes:
    """The first ``size`` bytes of the file, or all that it has. Raises `FileUnavailable`."""
    try:
        with Path(path).open("rb") as file:
            return file.read(size)
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise _unavailable(path, "cannot be read", exc) from None


def read_lines(path: str | Path, *, limit: int) -> Iterator[bytes]:
    """The lines of a file of any size. Raises `FileUnavailable`, also for a line of more than ``limit`` bytes."""
    try:
        with Path(path).open("rb") as file:
            while line := file.readline(limit + 1):
                yield _bounded(f"{path}: a line", line, limit)
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be read", exc) from None


def read_private(path: str | Path, *, limit: int = MAX_SIZE, group_may: bool = False) -> bytes:
    """The whole of a file that only its owner, or with ``group_may`` its group too, can get at.

    Raises `ConfigurationError`.
    """
    try:
        with Path(path).open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()), group_may)
            return _bounded(path, file.read(limit + 1), limit)
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be read", exc) from None


def check_private(path: str | Path, *, group_may: bool = False) -> None:
    """What `read_private` looks at, of a file that was read. Raises `ConfigurationError`."""
    try:
        _check_mode(path, Path(path).stat(), group_may)
    except (OSError, ValueError) as exc:
        raise _unavailable(path, "cannot be read", exc) from None


def _check_mode(path: str | Path, found: os.stat_result, group_may: bool) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & (0o007 if group_may or _is_credential(Path(path)) else 0o077):
        better = "640" if group_may else "600"
        raise ConfigurationError(f"{path}: its mode {mode:04o} lets others at a secret; run: chmod {better} {path}")


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


def _is_credential(path: Path) -> bool:
    """Whether it is a credential of systemd's (systemd.exec(5)).

    That is its unit's alone by an access list, whose mask stands where the group's bits of the mode do.
    """
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    return given is not None and Path(given) in path.resolve().parents


def _bounded(path: str | os.PathLike[str], data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FileUnavailable(f"{path}: has more than {limit} bytes, which nothing of this kind has")
    return data


def _written_beside(path: Path, data: bytes, mode: int) -> Path:
    partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
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


def _unavailable(path: str | os.PathLike[str], what: str, exc: Exception) -> FileUnavailable:
    why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return FileUnavailable(f"{path}: {what}: {why}")
