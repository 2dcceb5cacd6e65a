"""Copies of the audit log outside the store: a file and the journal, from where log shippers take them.

Rules kept here:

* each audit row is copied when its transaction is committed, each checkpoint when it is signed: in a server by threads
  that nothing waits for (``copier.py``), with ``audit.required`` and in an operator's command before the answer leaves;
* a copy that fails is told once; with ``audit.required`` the request fails, too, although its transaction is kept: it
  can be repeated, as after any lost answer. It is told when the sink takes lines again, and how many rows it lacked,
  and the next time that it fails; meanwhile the checks have a note;
* a line is one JSON object, ``{"audit":number,"entry":{…}}`` or ``{"checkpoint":"…"}``, in one write: several
  processes may append to one file. The number is that of the row in the store; its index in the log comes later;
* of a line that a full disk took in part, the rest is missing: the next begins on a line of its own;
* the file is opened for each write, so it may be moved away for rotation at any time.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

from attrs import define, field, frozen

from chutes_proto.errors import StoreError
from chutes_proto.io.files import make_file, no_links_of_others, reason
from chutes_proto.quote._terms import rfc3339
from chutes_proto.store._copies import Copies
from chutes_proto.store._rows import AuditRow
from chutes_proto.units.log import entry_text

JOURNAL: Final = Path("/run/systemd/journal/socket")
"""The socket of the journal (systemd-journald)."""
KINDS: Final = ("audit.file", "audit.journal")
"""The sinks that there are: what the name of each begins with."""
JOURNAL_SECONDS: Final = 2.0
"""How long the journal may let us wait for a place in its queue."""


class Sink(Protocol):
    """A place for lines. Raises `OSError` for those that it did not take."""

    @property
    def name(self) -> str: ...

    def write(self, lines: Sequence[str]) -> None: ...


@frozen
class FileSink:
    """A file that lines are appended to; ``is_durable``: each write waits for the disk."""

    path: Path
    is_durable: bool = False

    @property
    def name(self) -> str:
        return f"audit.file: {self.path}"

    def write(self, lines: Sequence[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        make_file(self.path, 0o640)
        # Nobody may read a pipe, or nobody any more: then it takes nothing, and is not waited for.
        access = os.O_WRONLY | os.O_NONBLOCK if self.path.is_fifo() else os.O_RDWR
        access |= no_links_of_others(self.path.parent)
        descriptor = os.open(self.path, access | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            if _ends_within_line(descriptor):
                data = b"\n" + data
            if os.write(descriptor, data) != len(data):
                raise OSError("the disk is full")
            if self.is_durable:
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def _ends_within_line(descriptor: int) -> bool:
    """Whether a file ends with a line that was written in part."""
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_size > 0 and os.pread(descriptor, 1, found.st_size - 1) != b"\n"


@define
class JournalSink:
    """The journal, by its native protocol: a datagram for each line.

    One that stands still is waited for once, and not again until it takes a line.
    """

    path: Path = JOURNAL
    _stands_still: bool = field(init=False, default=False)

    @property
    def name(self) -> str:
        return "audit.journal"

    def write(self, lines: Sequence[str]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.settimeout(0.0 if self._stands_still else JOURNAL_SECONDS)
            journal.connect(str(self.path))
            try:
                for line in lines:  # JSON has no line end, so the short form of a field does
                    _ = journal.send(f"PRIORITY=6\nSYSLOG_IDENTIFIER=chutes-proto-audit\nMESSAGE={line}\n".encode())
            except (TimeoutError, BlockingIOError):
                self._stands_still = True
                raise OSError("the journal does not take it") from None
            self._stands_still = False


def row_line(number: int, row: AuditRow) -> str:
    """The line of an audit row."""
    return f'{{"audit":{number},"entry":{entry_text(row)}}}'


def checkpoint_line(note: str) -> str:
    """The line of a checkpoint."""
    return json.dumps({"checkpoint": note}, ensure_ascii=False)


class Sinks:
    """Sinks, whose state is in ``copies``. May be used from several threads."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        *,
        required: bool,
        tell: Callable[[str], object],
        copies: Copies | None = None,
    ) -> None:
        self._copies = Copies() if copies is None else copies
        self._sinks = sinks
        self._required = required
        self._tell = tell
        self._one_at_a_time = threading.Lock()
        self._of_state = threading.Lock()

    def rows(self, rows: Sequence[tuple[int, AuditRow]]) -> None:
        """Copy rows that are committed. Raises `StoreError` if they must be, and are not."""
        failed = self.write([row_line(*each) for each in rows])
        if failed and self._required:
            raise StoreError(f"{failed[0]}; audit.required is set, so the answer does not leave")

    def checkpoint(self, note: str) -> None:
        """Copy a checkpoint."""
        _ = self.write([checkpoint_line(note)])

    def write(self, lines: Sequence[str]) -> list[str]:
        """Write lines; returns which sinks did not take them, and why."""
        failed: list[str] = []
        with self._one_at_a_time:
            for sink in self._sinks:
                try:
                    sink.write(lines)
                except OSError as exc:
                    failed.append(f"{sink.name}: {reason(exc)}")
                    self.missed(sink.name, failed[-1], len(lines))
                else:
                    self._worked(sink.name)
        return failed

    def missed(self, name: str, why: str, lines: int) -> None:
        """Count lines that the sink ``name`` did not take, and tell the first time. Waits for no sink."""
        with self._of_state:
            copies = self._copies
            copies.missed[name.partition(":")[0]] += lines
            since, count = copies.failing.get(name, (int(time.time()), 0))
            copies.failing[name] = since, count + lines
        if not count:
            _ = self._tell(f"{why}; lines are missing there from {rfc3339(since)} on")

    def _worked(self, name: str) -> None:
        with self._of_state:
            since, count = self._copies.failing.pop(name, (0, 0))
        if count:
            during = f"{rfc3339(since)} to {rfc3339(int(time.time()))}"
            _ = self._tell(f"{name}: it takes lines again; {count} of {during} are not in it: see `audit export`")
