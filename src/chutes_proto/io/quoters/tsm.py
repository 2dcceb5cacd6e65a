"""Quotes from the kernel's configfs-TSM (Linux 6.7 and newer).

Source: Linux ``Documentation/ABI/testing/configfs-tsm``, ``drivers/virt/coco/tsm.c``, ``drivers/virt/coco/tdx-guest``,
``fs/configfs/file.c``.

Rules kept here:

* each quote has a directory of its own, with an unpredictable name, which is removed in every case;
* a quote is used only if the kernel counted our one write between the two readings of ``generation``, and no other;
* an attempt that met a temporary fault is repeated until the time limit.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from chutes_proto.errors import QuoteUnavailable
from chutes_proto.io.quoters import MAX_QUOTE

ROOT: Final = "/sys/kernel/config/tsm/report"

_PROVIDER: Final = b"tdx_guest"
_PASSES: Final = frozenset({errno.EBUSY, errno.EWOULDBLOCK, errno.EINTR, errno.ETIMEDOUT, errno.ENOENT, errno.EEXIST})
"""EBUSY: the host still processes an earlier request; ENOENT, once there is an entry: somebody removed it."""
_SETTLE: Final = 1.0
"""How many seconds the kernel may take to count a write; nearly always it has when ``close`` returns."""
_PAUSES: Final = (0.05, 2.0)


class TsmQuoter:
    """The kernel's configfs-TSM at ``root`` as a quoter; ``timeout`` is in seconds, over all attempts.

    No attempt begins after ``timeout``. The last one can take as long as the kernel waits for the host (30 s), in a
    call that only a signal interrupts.
    """

    def __init__(self, root: str | Path = ROOT, *, timeout: float = 30.0) -> None:
        self._root = Path(root)
        self._timeout = timeout

    def __str__(self) -> str:
        return f"configfs-TSM at {self._root}"

    def __call__(self, report_data: bytes) -> bytes:
        """Return the quote of 64 bytes of report data. Raises `QuoteUnavailable`, which says what to do."""
        end = time.monotonic() + self._timeout
        pause, longest = _PAUSES
        while True:
            try:
                return self._attempt(report_data)
            except _AgainError as exc:
                left = end - time.monotonic()
                if left <= 0:
                    raise QuoteUnavailable(f"{self} gave no quote within {self._timeout:g} s: {exc}") from exc
                time.sleep(min(pause, left))
                pause = min(pause * 2, longest)

    def _attempt(self, report_data: bytes) -> bytes:
        entry = self._root / f"chutes-proto-{os.urandom(16).hex()}"
        try:
            entry.mkdir(mode=0o700)
        except OSError as exc:
            if exc.errno in _PASSES and self._root.is_dir():
                raise _AgainError(f"{entry} cannot be made: {exc.strerror}") from exc
            raise QuoteUnavailable(f"{self}: {_why_not_there(exc)}") from exc
        try:
            return self._quote(entry, report_data)
        except OSError as exc:
            if exc.errno in _PASSES:
                raise _AgainError(f"{exc.filename}: {exc.strerror}") from exc
            raise QuoteUnavailable(f"{self}: {exc.filename}: {exc.strerror}") from exc
        finally:
            _remove(entry)

    def _quote(self, entry: Path, report_data: bytes) -> bytes:
        provider = _read(entry / "provider", 64).strip()
        if provider != _PROVIDER:
            name = provider.decode("ascii", "backslashreplace")
            raise QuoteUnavailable(f"{self}: its provider is {name!r}, not {_PROVIDER.decode()!r}; is this a TD?")
        before = _generation(entry)
        _write(entry / "inblob", report_data)
        written = _wait_for_change(entry, before)
        if written == before:
            # configfs passes the write on when the file is closed, and drops its result.
            raise _AgainError("the kernel did not take the report data")
        if written != before + 1:
            raise _AgainError(f"somebody else wrote to {entry}")
        quote = _read(entry / "outblob", MAX_QUOTE)
        if _generation(entry) != written:
            raise _AgainError(f"somebody else wrote to {entry}")
        if not quote:
            raise QuoteUnavailable(
                f"{self}: the kernel's answer is empty: the host has no quote generation service, or it failed;"
                " the host's log says more"
            )
        return quote


class _AgainError(Exception):
    """A temporary fault: another attempt may succeed."""


def _why_not_there(exc: OSError) -> str:
    match exc.errno:
        case errno.ENOENT:
            return "not there: this takes Linux 6.7 or newer, the module tdx_guest, and configfs mounted"
        case errno.ENXIO:
            return "no provider: load the module tdx_guest; is this a TD?"
        case errno.EACCES | errno.EPERM:
            return f"only root makes entries there: {exc.strerror}"
        case _:
            return f"no entry can be made: {exc.strerror}"


def _wait_for_change(entry: Path, before: int) -> int:
    end = time.monotonic() + _SETTLE
    while (now := _generation(entry)) == before and time.monotonic() < end:
        time.sleep(0.01)
    return now


def _generation(entry: Path) -> int:
    text = _read(entry / "generation", 64).strip()
    if not text.isdigit():
        raise QuoteUnavailable(f"{entry}/generation is not a number")
    return int(text)


@contextmanager
def _attribute(path: Path, flags: int) -> Generator[int]:
    """Open an attribute; every `OSError` of the block names it."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, str(path)) from exc
    finally:
        os.close(descriptor)


def _read(path: Path, limit: int) -> bytes:
    """Return the whole attribute. Raises `OSError`, also for more than ``limit`` bytes."""
    data = bytearray()
    with _attribute(path, os.O_RDONLY) as descriptor:
        while piece := os.read(descriptor, limit + 1 - len(data)):
            data += piece
            if len(data) > limit:
                raise OSError(errno.EFBIG, f"more than {limit} bytes")
    return bytes(data)


def _write(path: Path, data: bytes) -> None:
    with _attribute(path, os.O_WRONLY) as descriptor:
        if (count := os.write(descriptor, data)) != len(data):
            raise OSError(errno.EIO, f"took {count} bytes of {len(data)}")


def _remove(entry: Path) -> None:
    try:
        entry.rmdir()
    except FileNotFoundError:
        pass
    except OSError as exc:
        import logging

        logging.getLogger("chutes_proto").warning("%s cannot be removed: %s", entry, exc.strerror)
