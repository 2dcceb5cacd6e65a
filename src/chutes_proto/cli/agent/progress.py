"""The boot agent's progress: lines for people at a serial console, or one JSON object a line.

Rules kept here:

* lines have at most 79 characters of ASCII and nothing that steers a terminal, whatever a peer or a disk said;
* each says how much time is left, and what failed says at which server, why, under which request, and what comes next;
* progress goes to standard error; the JSON lines, which are all there is to read then, to standard output;
* a console that takes nothing more keeps no boot from its end: one that is gone is told nothing, one that stands still
  is waited for once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TextIO

from chutes_proto.cli import console
from chutes_proto.log import Level, Record, Value

if TYPE_CHECKING:
    from chutes_proto.errors import ChutesError
    from chutes_proto.luks.plan import Action

WIDTH: Final = 79
STUCK: Final = 30.0
"""Seconds for which a console may take nothing: somebody may have stopped it to read."""
_INDENT: Final = 7  # "  299s "

_STEPS: Final = {
    "nonce": "asking {server} for a nonce",
    "quote": "having the platform quote it",
    "attestation": "attesting to {server}",
    "sync": "asking {server} for the volumes' keys",
    "root confirmation": "telling {server} that the root disk has its next key",
    "runtime quote": "having the platform quote a second nonce",
    "volumes": "attesting to {server} for the keys",
    "confirmation": "telling {server} what became of the keys",
}
_ASCII: Final = str.maketrans({"…": "...", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"})


class Progress:
    """Tells a boot's records. ``server`` says which server is asked now; the deadline is ``seconds`` from now.

    ``step`` is what is asked now, ``stopped`` has the fields of the record that says why it ended, ``written`` what was
    done to disks, ``close`` closes those that the boot has opened.
    """

    def __init__(self, *, as_json: bool, seconds: float, server: Callable[[], str] = str) -> None:
        self._as_json = as_json
        self._deadline = time.monotonic() + seconds
        self.server = server
        self.step: str = ""
        self.stopped: Mapping[str, Value] = {}
        self.written: list[str] = []
        self.close: Callable[[], None] = lambda: None
        self._writes = False

    def __call__(self, record: Record) -> None:
        """One record: a line or two."""
        fields = record.shown  # a text of a peer that fills the console for minutes would be the last one
        if "step" in fields:
            fields["server"] = self.server()
            self.step = str(fields["step"])
        fields = {"seconds_left": self._left(), **fields}
        match record.event, fields:
            case "boot_stopped", _:
                self.stopped = fields
            case "rotation_undecided", _:
                self.stopped = {}  # that did not end it
            case "disk_failed", _ if self._writes:
                self._writes = False
                self.written[-1] += ": FAILED"
            case _:
                pass
        if self._as_json:
            self._say_json(Record(record.level, record.event, fields))
            return
        for line in _lines(record.event, {name: _text(value) for name, value in fields.items()}):
            self.tell(line)

    def acts(self, action: Action[Any]) -> None:
        """An action on a disk begins. Its record does not say so: a signal may come between."""
        from chutes_proto.luks.plan import Open

        self._writes = not isinstance(action, Open)
        self.written += [str(action)] if self._writes else []

    def tell(self, text: str) -> None:
        """One thing for people, with the time that is left before it."""
        if self._as_json:
            self._say_json(Record(Level.INFO, "told", {"text": text, "seconds_left": self._left()}))
            return
        write(text, first=f"{self._left():5.0f}s ", rest=" " * _INDENT)

    def finish(self, event: str, fields: Mapping[str, Value], lines: list[tuple[str, str]], *, failed: bool) -> None:
        """The last word: a record for programs, or lines of a name and a text for people."""
        if self._as_json:
            self._say_json(Record(Level.ERROR if failed else Level.INFO, event, fields))
            return
        write("")
        width = max((len(name) for name, _ in lines[1:]), default=0) + 2
        for index, (name, text) in enumerate(lines):
            write(text, first=name.ljust(width if index else 0), rest=" " * (width if index else 0))

    def _say_json(self, record: Record) -> None:
        put(record.as_json(datetime.now(UTC).isoformat(timespec="milliseconds")), sys.stdout)

    def _left(self) -> float:
        return round(max(self._deadline - time.monotonic(), 0.0), 1)


def write(text: str, *, first: str = "", rest: str = "") -> None:
    """A text for people on standard error, cut into lines that a serial console has room for."""
    plain = console.clean(text.translate(_ASCII)).encode("ascii", "backslashreplace").decode("ascii")
    lines = textwrap.wrap(plain, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    put("\n".join(lines or [first.rstrip()]), sys.stderr)


def put(text: str, stream: TextIO) -> None:
    """Print lines, in the main thread. A stream that fails, or takes nothing for `STUCK` seconds, gets no more."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    with suppress(OSError):
        before = signal.signal(signal.SIGALRM, give_up)
        _ = signal.setitimer(signal.ITIMER_REAL, STUCK)
        try:
            print(text, file=stream, flush=True)
        except BlockingIOError:
            raise  # it may take more later
        except OSError:
            # The rest of the stream's buffer would be written once more, and the boot end as that does: it would wait,
            # or fail.
            _ = os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        finally:
            _ = signal.setitimer(signal.ITIMER_REAL, 0)
            _ = signal.signal(signal.SIGALRM, before)


def said(error: ChutesError, stopped: Mapping[str, Value]) -> dict[str, str]:
    """Reason, code and request of an error, as far as it has them.

    Where the record of a stopped exchange has them, they are taken from there: short, and without its nonce or token,
    which a server may have repeated.
    """
    told = {name: str(stopped[name]) for name in ("reason", "code", "request_id") if name in stopped}
    return {**_said(error), **told}


def _said(error: ChutesError) -> dict[str, str]:
    from chutes_proto.errors import DiskError, Refusal

    match error:
        case Refusal():
            code = {"status": str(error.status), "code": str(error.code)}
            return {"reason": error.reason, **code, "request_id": error.request_id or ""}
        case DiskError():
            return {"reason": str(error), "code": error.reason, "device": error.device}
        case _:
            return {"reason": str(error), "error": type(error).__name__}


_TEXTS: Final = {
    "grant_received": "granted",
    "rotation_confirmed": "the server took note: {volumes}",
    "disks_looked_at": "looking at {devices}",
    "disks_awaited": "waiting at most {wait} s for {devices} to appear",
    "disk_found": "{volume}: {holds}",
    "disk_action": "{text}",
    "disk_failed": "{volume}: FAILED: {text}",
    "disk_closed": "closed again: {mapping}",
    "disk_left_open": "could not be closed: /dev/mapper/{mapping}: {text}",
}
"""The events that are told with the fields of their record alone."""


def _lines(event: str, fields: Mapping[str, str]) -> list[str]:
    if event in _TEXTS:
        return [_TEXTS[event].format_map(fields)]
    match event:
        case "boot_step":
            step = _STEPS.get(fields["step"], fields["step"]).format(server=fields["server"])
            return [f"{step} (attempt {fields['attempt']})"]
        case "boot_delayed":
            again = f"trying again in {fields['wait']} s"
            if "next_server" in fields:
                again += f" at {fields['next_server']}"
            return [f"RETRY LATER: {_why(fields)}", again]
        case "boot_stopped":
            return [f"STOPPED: {_why(fields)}"]
        case "volumes_received" | "keys_received":
            used = f"; known to hold data: {fields['in_use']}" if fields["in_use"] else ""
            return [f"keys received for {fields['volumes']}{used}"]
        case "rotation_undecided":
            return [
                f"the server did not take note of the new keys of {fields['volumes']}: {_why(fields)}",
                "old and new keys stay on the disks; the next boot decides",
            ]
        case "disk_opened":
            return [f"{fields['volume']}: open" + (", by the next key" if fields["key"] == "next" else "")]
        case _:
            return [" ".join([event, *(f"{name}={json.dumps(value)}" for name, value in fields.items())])]


def _why(fields: Mapping[str, str]) -> str:
    request = f", request {fields['request_id']}" if fields.get("request_id") else ""
    return f"{fields['reason']} ({fields['code']}{request})" if "code" in fields else fields["reason"]


def _text(value: Value) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
