"""Output for people: tables that fit the terminal, times, digests, states, progress.

Rules kept here:

* on a terminal rich draws; in a pipe, or with ``--plain``, columns of whole values stand side by side;
* every text is cleaned and none is markup, so a peer or a file steers no terminal;
* colour says a state, and nothing else; ``NO_COLOR`` turns it off.
"""

from __future__ import annotations

import re
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from chutes_proto.cli import console
from chutes_proto.cli.base import wants
from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.text import Text

    from chutes_proto.store.rows import Vm

State = Literal["good", "bad", "warn", ""]
_STYLES = {"good": "green", "bad": "red", "warn": "yellow", "": ""}
_DIGEST = re.compile(r"\b[0-9a-f]{40,}\b")
_WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}
_SHORT = 8
_NARROW = 100
_DAY = 86_400
_AGES = ((_DAY * 365, "y"), (_DAY, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_SHOWN_AFTER = 1.0
_WATCH_SECONDS = 2.0


class Cell(NamedTuple):
    """A text with what state it says; colour only repeats it."""

    text: str
    state: State = ""

    def __str__(self) -> str:
        return self.text


def draws() -> bool:
    """Whether standard output is a terminal that takes more than plain lines."""
    return sys.stdout.isatty() and not wants("plain")


def table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]], *, empty: str) -> None:
    """Print rows in columns, or a line that says that there is none."""
    cells = [[one if isinstance(one, Cell) else Cell(one) for one in row] for row in rows]
    if not cells:
        console.say(empty)
        return
    if not draws():
        console.say_table(heads, [[cell.text for cell in row] for row in cells])
        return
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in cells:
        drawn.add_row(*(_text(cell) for cell in row))
    _console().print(drawn)


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text("\n".join(map(console.clean, cell.text.split("\n"))), style=_STYLES[cell.state])


def say(text: str, state: State) -> None:
    """Print one line of the result that says a state."""
    if not draws():
        console.say(text)
        return
    _console().print(_text(Cell(text, state)), soft_wrap=True)


def prose(text: str, state: State = "", *, rest: int = 0) -> None:
    """Print a text of the result. A terminal breaks it between words, later lines begin at ``rest``, and digests in it
    are short."""
    if not draws():
        console.say(text)
        return
    brief = _DIGEST.sub(lambda match: short(match[0]), text)
    for line in textwrap.wrap(brief, console.help_width(), subsequent_indent=" " * rest, **_WHOLE_WORDS):
        say(line, state)


def short(text: str | None) -> str:
    """A digest, key or address, of which a terminal shows the beginning, and with ``--full`` all."""
    if not text or wants("full") or not draws():
        return text or "-"
    kind, colon, value = text.rpartition(":")
    return text if len(value) <= _SHORT + 1 else f"{kind}{colon}{value[:_SHORT]}…"


def vm(named: Vm) -> str:
    """A VM: its hotkey, of which a terminal shows the beginning, and its name; in a narrow one below each other."""
    return f"{named.name}\n{short(named.hotkey)}" if _is_narrow() else f"{short(named.hotkey)}/{named.name}"


def when(at: int | None) -> str:
    """A time: the day, or within one day the time of the day, and how long ago or how far ahead it is.

    In a pipe, and with ``--full``, it is a whole time of RFC 3339.
    """
    if at is None or not draws() or wants("full"):
        return "-" if at is None else rfc3339(at)
    day, _, hour = rfc3339(at).partition("T")
    between = "\n" if _is_narrow() else ", "
    return f"{hour if abs(time.time() - at) < _DAY else day}{between}{age(at)}"


def _is_narrow() -> bool:
    return draws() and _console().width < _NARROW


def age(at: int) -> str:
    """How long ago a time is, or how far ahead, in the largest unit."""
    seconds = int(time.time()) - at
    size, unit = next(((size, unit) for size, unit in _AGES if abs(seconds) >= size), (1, "s"))
    told = f"{abs(seconds) // size} {unit}"
    return f"{told} ago" if seconds >= 0 else f"in {told}"


class Advance(Protocol):
    """Takes how much is done, and a total where it has changed."""

    def __call__(self, done: int, total: int | None = None, /) -> None: ...


@contextmanager
def progress(doing: str, total: int | None = None) -> Generator[Advance]:
    """Progress on standard error: call the result with how much is done, and with a new total where it changes.

    On a terminal it is a bar with an estimate that appears after a second, elsewhere a line each time.
    """
    if not sys.stderr.isatty() or wants("plain"):

        def tell(done: int, new_total: int | None = None) -> None:
            of = new_total if new_total is not None else total
            console.tell(f"{doing}: {done}" + (f" of {of}" if of is not None else ""))

        yield tell
        return
    began = time.monotonic()
    bar: Bar | None = None

    def advance(done: int, new_total: int | None = None) -> None:
        nonlocal bar, total
        total = new_total if new_total is not None else total
        if bar is None and time.monotonic() - began >= _SHOWN_AFTER:
            bar = _bar()
            _ = bar.add_task(console.clean(doing), total=total)
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=_console(stderr=True), transient=True)


def watching(draw: Callable[[], int]) -> int:
    """Run ``draw`` once, or with ``--watch`` until SIGINT, on a terminal each time on an empty screen."""
    while wants("watch"):
        if draws():
            console.out("\x1b[H\x1b[2J\x1b[3J", end="")
        _ = draw()
        time.sleep(_WATCH_SECONDS)
    return draw()


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
