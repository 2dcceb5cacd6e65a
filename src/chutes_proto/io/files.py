"""Files of operators, read whole and bounded; files with secrets, private from the start.

Rules kept here:

* a secret in a file that others may read is refused, with the command that repairs it;
* a file appears whole or not at all, and a private one is never readable by others, not even for a moment;
* no error repeats the content of a file; each names the file and says what to do.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from chutes_proto.errors import ConfigurationError, FileUnavailable

MAX_SIZE: Final = 4 * 1024 * 1024
"""The size limit, in bytes, of files that are read here."""


def read_file(path: str | os.PathLike[str], *, limit: int = MAX_SIZE, plain: bool = False) -> bytes:
    """Return the whole file. Raises `FileUnavailable`, also for more than ``limit`` bytes.

    ``plain`` refuses what is not a plain file, as a pipe without a writer would never be opened. It is for a server
    that runs, and for a file that an operator does not name, in a folder that others may write.
    """
    return _bounded(path, read_head(path, limit + 1, plain=plain), limit)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or directory. Raises `OSError` where that cannot be found out.

    `Path.exists` says no then, from Python 3.14 on: a mark on a disk that fails would pass for one that is missing.
    """
    try:
        _ = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def absolute(path: str | os.PathLike[str]) -> str:
    """Return the absolute path, from the working directory."""
    return str(Path(path).absolute())


def read_head(path: str | os.PathLike[str], size: int, *, plain: bool = False) -> bytes:
    """Return the first ``size`` bytes of the file, or all that it has; see `read_file`. Raises `FileUnavailable`."""
    with _opened(path, plain) as file:
        return file.read(size)


def read_lines(path: str | Path, *, limit: int, plain: bool = False) -> Iterator[bytes]:
    """Yield the lines of a file of any size; see `read_file`.

    Raises `FileUnavailable`, also for a line of more than ``limit`` bytes.
    """
    with _opened(path, plain) as file:
        while line := file.readline(limit + 1):
            yield _bounded(f"{path}: a line", line, limit)


@contextmanager
def _opened(path: str | os.PathLike[str], plain: bool) -> Generator[BinaryIO]:
    """Open a file to read. Not by a number: that is a file descriptor, which is somebody else's and would be closed."""
    with (
        unavailable(path, "cannot be read"),
        open(os.fspath(path), "rb", opener=_open_plain if plain else None) as file,
    ):
        yield file


def _open_plain(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a plain file")
    return descriptor


def read_private(path: str | Path, *, group_may: bool = False, plain: bool = False) -> bytes:
    """Return the whole of a file that only its owner, or with ``group_may`` its group too, can read; see `read_file`.

    Raises `ConfigurationError` for permissions that are too open, and `FileUnavailable`.
    """
    with _opened(path, plain) as file:
        _check_mode(path, os.fstat(file.fileno()), group_may=group_may)
        return _bounded(path, file.read(MAX_SIZE + 1), MAX_SIZE)


class Files:
    """Files of one set-up, each read once: a second look at it, here or in another process, has the same bytes.

    ``content`` are the bytes of files that were read before, by path; their permissions were checked then. ``plain`` as
    of `read_file`.
    """

    def __init__(self, content: Mapping[str, bytes] | None = None, *, plain: bool = False) -> None:
        self.content: dict[str, bytes] = dict(content or {})
        self._plain = plain
        self._stamps: dict[str, object] = {}

    def read(self, path: str | os.PathLike[str]) -> bytes:
        """See `read_file`."""
        return self._once(path, lambda: read_file(path, plain=self._plain))

    def read_private(self, path: str | Path, *, group_may: bool = False) -> bytes:
        """See `read_private`."""
        return self._once(path, lambda: read_private(path, group_may=group_may, plain=self._plain))

    def _once(self, path: str | os.PathLike[str], read: Callable[[], bytes]) -> bytes:
        key = absolute(path)
        if key not in self.content:
            self._stamps[key] = _stamp(key)  # before it is read: a change from now on is seen
            self.content[key] = read()
        return self.content[key]

    def check_settled(self) -> None:
        """Raise `ConfigurationError` if a file was changed or replaced since it was read: it may be half of two."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                raise ConfigurationError(
                    f"{shown(path)}: was changed while the files were read; wait for that, and ask again"
                )


def _stamp(path: str) -> object:
    """A value that changes with the file."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # reading it says why
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_private(path: str | Path) -> None:
    """Check the permissions of a file that was read, as `read_private` does if the group may. Raises as it does."""
    with unavailable(path, "cannot be read"):
        _check_mode(path, Path(path).stat(), group_may=True)


def _check_mode(path: str | Path, found: os.stat_result, *, group_may: bool) -> None:
    mode = stat.S_IMODE(found.st_mode)
    if mode & (0o007 if group_may or is_credential(Path(path)) else 0o077):
        better = "640" if group_may else "600"
        mend = f"chmod {better} {shlex.quote(str(path))}"
        raise ConfigurationError(f"{shown(path)}: permissions are {mode:04o}, which is too open; run: {mend}")


def write_file(path: str | Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write the file at ``path``, in place of an older one. Raises `FileUnavailable`."""
    with unavailable(path, "cannot be written"):
        partial = _written_beside(Path(path), data, mode)
        try:
            _ = partial.replace(path)
        except OSError:
            partial.unlink()
            raise


def make_file(path: Path, mode: int) -> None:
    """Make an empty file unless something is there; one that root makes belongs to the user of its folder.

    So an operator's command that comes before the server does not shut it out. The server's user may write the folder,
    so nothing is followed that he put there: a link would give him a file of root's anywhere. Raises `OSError`.
    """
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            give_to_owner_of(path.parent, descriptor)
        finally:
            os.close(descriptor)


def give_to_owner_of(folder: Path, file: int | Path) -> None:
    """Give a file that root made in ``folder`` to the folder's user; of a link, the link itself."""
    if os.geteuid() == 0:
        owner = folder.stat()
        with suppress(OSError):  # the root of a container may own only some users' files
            if isinstance(file, int):
                os.fchown(file, owner.st_uid, owner.st_gid)
            else:
                os.lchown(file, owner.st_uid, owner.st_gid)


def no_links_of_others(folder: Path) -> int:
    """Return the flag of `os.open` for a file that is in ``folder``: root follows no link that another user put there.

    It would have him write into any file of root's, or make one anywhere. Raises `OSError`.
    """
    return os.O_NOFOLLOW if os.geteuid() == 0 and folder.stat().st_uid != 0 else 0


def create_private(path: str | Path, data: bytes) -> None:
    """Make a file that only its owner can read, unless it exists; of several callers at once, one makes it.

    Raises `FileUnavailable`.
    """
    with unavailable(path, "cannot be written"):
        partial = _written_beside(Path(path), data, 0o600)
        try:
            with suppress(FileExistsError):
                os.link(partial, path)
        finally:
            partial.unlink()


def name_file(partial: Path, path: Path) -> None:
    """Give a complete file its name, durably, unless a file has it. Raises `FileUnavailable`."""
    with unavailable(path, "cannot be written"):
        os.link(partial, path)  # unlike a rename, it replaces no file
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_directory(path: str | Path, *, mode: int = 0o755) -> Path:
    """Return the directory, made with its parents if it is missing. Raises `FileUnavailable`."""
    with unavailable(path, "cannot be made"):
        Path(path).mkdir(mode=mode, parents=True, exist_ok=True)
    return Path(path)


def is_credential(path: Path) -> bool:
    """Return whether this is a credential of systemd (systemd.exec(5)).

    An access list keeps that for its unit alone; the mask of the list is in the group's bits of the mode.
    """
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    return given is not None and Path(given) in path.resolve().parents


def _bounded(path: str | os.PathLike[str], data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise FileUnavailable(
            f"{shown(path)}: has more than {limit} bytes, the limit for such a file; is it the right one?"
        )
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


@contextmanager
def unavailable(path: str | os.PathLike[str], what: str) -> Generator[None]:
    """Turn the operating system's errors of the block into `FileUnavailable`, as ``path: what: reason``."""
    try:
        yield
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        is_not_given = isinstance(exc, FileNotFoundError) and is_credential(Path(path))
        mend = f"; give the unit a line LoadCredential={Path(path).name}:FILE" if is_not_given else ""
        if isinstance(exc, PermissionError):
            mend = f" to {_user()}; give that user access, or run this as another"
        raise FileUnavailable(f"{shown(path)}: {what}: {reason(exc)}{mend}") from None


def reason(exc: Exception, path: str | os.PathLike[str] = "") -> str:
    """Return the text of an error without the ``path`` before it, which the caller says."""
    if isinstance(exc, OSError) and exc.errno == errno.ELOOP:
        return "not a plain file, but a link or a loop of links"
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc).removeprefix(f"{shown(path)}: ")


def shown(path: str | os.PathLike[str]) -> str:
    """Return the path for a line of text: quoted if it has a line break, or anything else that is not printable."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def _user() -> str:
    """The user as whom files are opened."""
    import pwd

    number = os.geteuid()
    try:
        return f"user {pwd.getpwuid(number).pw_name} (uid {number})"
    except KeyError:  # a container may have no name for it
        return f"uid {number}"
