"""Lines on standard output and standard error, and the types of options that several commands share.

Rules kept here:

* a text from a peer or a file reaches the terminal without control characters;
* results go to standard output, progress and complaints to standard error.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from chutes_proto._error import ChutesError

GRANTED, REFUSED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
"""Exit codes. The last two are what a shell makes of a program that died of SIGINT and of SIGPIPE."""

_COLUMNS = 80
_PARTS_AT_ONCE = 100
_NARROWEST = 20
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})?)?"
)
_LAST = 253_402_300_799  # 9999-12-31T23:59:59Z


def help_width() -> int:
    """As wide as the terminal, but no wider than lines are read with ease, and never too narrow for a word."""
    return max(min(_columns() - 2, 100), _NARROWEST)


def _columns() -> int:
    try:
        return int(os.environ.get("COLUMNS", "0")) or os.get_terminal_size().columns or _COLUMNS
    except (ValueError, OSError):
        return _COLUMNS


def clean(text: str) -> str:
    """``text`` with everything that is not printable spelled out, so that it cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def out(text: str, end: str = "\n") -> None:
    """Write to standard output, at once. Raises `OSError` as `writing` does."""
    with writing():
        if text or end:  # else it may be a write of no bytes, which a device can refuse
            print(text, end=end)
        _ = sys.stdout.flush()


@contextmanager
def writing() -> Generator[None]:
    """Raise the error that keeps standard output from being written with that name."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, "standard output") from None


def say(text: str = "") -> None:
    """One line of the result."""
    out(clean(text))


_SURROGATES = re.compile(r"\\\\|\\ud[89ab]..\\ud[c-f]..|\\ud[89a-f]..")
"""An escaped backslash, a surrogate pair, or a lone surrogate in JSON."""


def _json(value: object) -> str:
    """JSON in ASCII; what is not UTF-8 in the name of a file is spelled out, as on a terminal.

    Python has a lone surrogate for each such byte, and many readers of JSON refuse the whole text for one.
    """
    text = json.dumps(value)
    return _SURROGATES.sub(lambda found: "\\" * (len(found[0]) == 6) + found[0], text) if "\\ud" in text else text


def say_json(value: object) -> None:
    """The result as one JSON object on one line."""
    out(_json(value))


def say_json_list(
    before: Mapping[str, object], name: str, members: Iterable[object], ok: Callable[[], bool] = lambda: True
) -> None:
    """The result as one JSON object on one line, with a list that is printed while it is read.

    ``ok`` is asked after the last and printed there. An error that ends the list ends the line as it is.
    """
    out(_json({**before, name: []})[:-2], end="")
    try:
        _out_parts(map(_json, members), ", ")
    except ChutesError:
        out("")
        raise
    out(f'], "ok": {json.dumps(ok())}}}')


def say_json_lines(values: Iterable[object]) -> None:
    """The result as one JSON object on each line, printed while it is read."""
    _out_parts((f"{_json(value)}\n" for value in values), "")


def _out_parts(parts: Iterable[str], between: str) -> None:
    """Write many parts, and see to it that those are out which were read, also where an error ends them."""
    remaining, before = iter(parts), ""
    is_over = False
    while not is_over:
        some: list[str] = []
        try:
            some.extend(islice(remaining, _PARTS_AT_ONCE))
            is_over = not some
        finally:
            if some:
                out(before + between.join(some), end="")
                before = between


def plain(value: Any) -> dict[str, Any]:
    """Return an attrs value as plain data for JSON; times are RFC 3339."""
    from datetime import datetime

    import attrs

    return attrs.asdict(
        value, value_serializer=lambda _, __, member: member.isoformat() if isinstance(member, datetime) else member
    )


def tell(text: str) -> None:
    """One line beside the result: progress, or what is wrong. A stream that takes none changes no outcome."""
    with suppress(OSError):  # the next line may be taken: a disk has room again
        print(clean(text), file=sys.stderr, flush=True)


def tell_lines(text: str) -> None:
    """A text of several lines beside the result."""
    for line in text.splitlines():
        tell(line)


def complain(text: str, help_of: str = "") -> None:
    """An error, "what failed: why; what to do": one line in a log, and one for each part on a terminal.

    An error that does not say what to do refers a terminal to the help of the command ``help_of``. Several errors, as
    of a configuration, are one a line.
    """
    for problem in text.splitlines():
        _complain(problem, help_of)


def _complain(text: str, help_of: str) -> None:
    if not sys.stderr.isatty():
        tell(f"chutes-proto: {text}")
        return
    from chutes_proto.cli.describe import filled

    problem, semicolon, remedy = text.rpartition("; ")
    what, colon, why = (problem if semicolon else text).partition(": ")
    remedy = remedy if semicolon else f"see {help_of} --help" if help_of else ""
    for first, part in (("chutes-proto: ", what + colon.strip()), ("  ", why), ("  ", remedy)):
        if part:
            tell_lines(filled(clean(part), help_width(), first, "  "))


# --- types of options ---


def report_data(text: str) -> bytes:
    """64 bytes in hex, in either case."""
    if not re.fullmatch(r"[0-9a-fA-F]{128}", text):
        raise ValueError("report data is 64 bytes, so 128 hex digits")
    return bytes.fromhex(text)


def moment(text: str) -> int:
    """A time from 1970 to 9999 in unix seconds. A date begins at midnight; what names no zone is in UTC (RFC 3339)."""
    from datetime import UTC, datetime

    try:
        if re.fullmatch(r"(?![0-9]{8}$)[0-9]{1,12}", text):  # of eight digits some would be a date
            seconds = int(text)
        elif _RFC3339.fullmatch(text):
            time = datetime.fromisoformat(text)
            seconds = int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
        else:
            seconds = -1
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= _LAST:
        raise ValueError(
            "a time is a date or a time of RFC 3339, or whole unix seconds,"
            " for example 2026-05-28, 2026-05-28T20:26:40Z or 1780000000"
        )
    return seconds
