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
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from chutes_proto.collateral.library import Item, choose
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable
from chutes_proto.quote.collateral import Collateral, VerifiedCollateral
from chutes_proto.quote.errors import QuoteError
from chutes_proto.quote.pck import PckIdentity
from chutes_proto.quote.roots import TrustedRoot
from chutes_proto.quote.verify import verify_collateral

MAX_SIZE: Final = 4 * 1024 * 1024
"""No file that is read here needs more bytes."""


def read_file(path: str | Path, *, limit: int = MAX_SIZE) -> bytes:
    """The whole file. Raises `FileUnavailable`, also for one of more than ``limit`` bytes."""
    return _bounded(path, read_head(path, limit + 1), limit)


def read_head(path: str | Path, size: int) -> bytes:
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
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & (0o007 if group_may or _is_credential(Path(path)) else 0o077):
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


@frozen
class _Read:
    """What was made of a file; ``stamp`` changes when the file does."""

    stamp: tuple[int, int, int]
    at: int
    item: Item


class CollateralDirectory:
    """Collateral in the ``*.json`` files of a directory, one platform family a file (`Collateral.from_json`).

    Files may come, go and change at any time. Each is read and verified once; one that does not verify is looked at
    again after a while, because its time may not have begun. Past its time collateral is used for ``grace`` seconds, as
    long as there is none that is valid. May be used from several threads.

    A PCK certificate chain beside the collateral is left out: it is one machine's, and a file here serves many.
    """

    AGAIN_AFTER: Final = 60

    def __init__(self, path: str | Path, root: TrustedRoot, *, grace: int = 0) -> None:
        self.path = Path(path)
        self._root = root
        self._grace = grace
        self._lock = threading.Lock()
        self._read: dict[str, _Read] = {}

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """The collateral for a platform at ``now``. Raises `CollateralUnavailable`."""
        return choose(self.items(now), identity, now, str(self.path))

    def items(self, now: int) -> tuple[Item, ...]:
        """All files, by name. Raises `CollateralUnavailable` if the directory cannot be read."""
        with self._lock:
            try:
                with os.scandir(self.path) as entries:
                    names = sorted(e.name for e in entries if e.name.endswith(".json") and not e.name.startswith("."))
            except OSError as exc:
                raise CollateralUnavailable(f"collateral directory {self.path}: {exc.strerror}") from None
            self._read = {name: self._current(name, now) for name in names}
            return tuple(read.item for read in self._read.values())

    def _current(self, name: str, now: int) -> _Read:
        path = self.path / name
        try:
            found = path.stat()
        except OSError as exc:
            return _Read((0, 0, 0), now, Item(str(path), exc.strerror or "it cannot be read"))
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = self._read.get(name)
        if known is not None and known.stamp == stamp:
            is_verified = isinstance(known.item.content, VerifiedCollateral)
            if is_verified or abs(now - known.at) < self.AGAIN_AFTER:
                return known
        return _Read(stamp, now, Item(str(path), self._verified(path, now)))

    def _verified(self, path: Path, now: int) -> VerifiedCollateral | str:
        try:
            collateral = evolve(Collateral.from_json(read_file(path)), pck_certificate_chain=None)
            return verify_collateral(collateral, now=now, root=self._root, grace=self._grace)
        except (FileUnavailable, QuoteError) as exc:
            return str(exc)


def _is_credential(path: Path) -> bool:
    """Whether it is a credential of systemd's (systemd.exec(5)).

    That is its unit's alone by an access list, whose mask stands where the group's bits of the mode do.
    """
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    return given is not None and Path(given) in path.resolve().parents


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
