"""Output for people: tables that fit the terminal, times, digests, states, progress.

Rules kept here:

* on a terminal rich draws; in a pipe columns of whole values stand side by side;
* every text is cleaned and none is markup, so a peer or a file neither steers a terminal nor adds a line;
* colour is for the word that says a state, and for nothing else; ``NO_COLOR`` turns it off.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from chutes_proto.cli import console
from chutes_proto.cli.base import wants
from chutes_proto.cli.describe import filled
from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

State = Literal["good", "bad", "warn", ""]
_STYLES = {"good": "green", "bad": "red", "warn": "yellow", "": ""}
_DIGEST = re.compile(r"\b[0-9a-f]{40,}\b")
_ROWS_AT_ONCE = 1000
_WORD = re.compile(r"\w+")
_SHORT = 8
_GAP = 2
_DAY = 86_400
_AGES = ((_DAY * 365, "y"), (_DAY, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_SHOWN_AFTER = 1.0
_LINE_SECONDS = 30.0


class Cell(NamedTuple):
    """A text with what state it says; colour only repeats it."""

    text: str
    state: State = ""


def draws() -> bool:
    """Whether standard output is a terminal, which takes more than plain lines."""
    return sys.stdout.isatty()


Columns = Mapping[str, Callable[[Any], str | Cell]]
"""The columns of a table: by heading, the function that makes the cell of a row, which is the row's object in JSON."""


def table(columns: Columns, rows: Iterable[object], *, empty: str) -> None:
    """Print rows in columns, or a line that says that there is none.

    Rows are printed while they are read, a thousand at a time, however many there are. Where a terminal is too narrow
    for the longest words, each row is a list of its cells.
    """
    widths = [0] * len(columns)
    heads: list[dict[str, Cell]] = [{head: Cell(head) for head in columns}]
    remaining = iter(rows)
    is_over = False
    while not is_over:
        cells: list[dict[str, Cell]] = []
        try:
            chosen = islice(remaining, _ROWS_AT_ONCE)
            cells.extend({head: _as_cell(cell(row)) for head, cell in columns.items()} for row in chosen)
            is_over = not cells
        finally:  # also where a signal ends it: the rows may say what was done
            if cells and draws():
                _console().print(_fitted([*columns], cells, _console().width))
            elif cells:
                widths = _say_lines([*heads, *cells], widths)
            heads = heads if not cells else []
    if heads:
        console.say(empty)


def _as_cell(found: str | Cell) -> Cell:
    return found if isinstance(found, Cell) else Cell(found)


def _say_lines(rows: Sequence[Mapping[str, Cell]], least: Sequence[int]) -> list[int]:
    """Print rows side by side; returns the widths of the columns, which are ``least`` or more."""
    table = [[console.clean(cell.text) for cell in row.values()] for row in rows]
    widths = [max(width, *map(len, column)) for width, *column in zip(least, *table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)
    console.out("\n".join(lines))
    return widths


def _fitted(heads: list[str], rows: Sequence[Mapping[str, Cell]], width: int) -> Table:
    from rich.table import Table

    texts = [{head: _text(cell) for head, cell in row.items()} for row in rows]

    columns = ([head, *(row[head].plain for row in texts)] for head in heads)
    words = ((len(word) for text in column for word in text.split()) for column in columns)
    if sum(max(sizes) + _GAP for sizes in words) - _GAP > width:
        found = Table.grid(padding=(0, _GAP, 0, 0))
        found.add_column(style="bold", no_wrap=True)
        found.add_column(overflow="fold")
        for number, row in enumerate(texts):
            if number:
                found.add_row()
            for head in heads:
                found.add_row(head, row[head])
        return found
    found = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for head in heads:
        found.add_column(head, overflow="fold")
    for row in texts:
        found.add_row(*(row[head] for head in heads))
    return found


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text(console.clean(cell.text), style=_STYLES[cell.state])


def prose(text: str, state: State = "", *, rest: int = 0) -> None:
    """Print a text of the result, whose first word says the state.

    A terminal breaks it between words, later lines begin at ``rest``, and digests in it are short.
    """
    if not draws():
        console.say(text)
        return
    from rich.text import Text

    brief = _DIGEST.sub(lambda match: short(match[0]), text)
    shown = Text(filled(console.clean(brief), console.help_width(), rest=" " * rest))
    if state and (first := _WORD.search(shown.plain)):
        shown.stylize(_STYLES[state], *first.span())
    _console().print(shown, soft_wrap=True)


def short(text: str | None) -> str:
    """A digest, key or address, of which a terminal shows the beginning, and with ``--full`` all."""
    if not text or wants("full") or not draws():
        return text or "-"
    kind, colon, value = text.rpartition(":")
    return text if len(value) <= _SHORT + 1 else f"{kind}{colon}{value[:_SHORT]}…"


def vm(hotkey: str, name: str) -> str:
    """A VM: its hotkey, of which a terminal shows the beginning, and its name."""
    return f"{short(hotkey)}/{name}"


def when(at: int | None, why: str | None = None) -> str:
    """A time: the day, or within one day the time of the day, how long ago or how far ahead it is, and ``why``.

    In a pipe, and with ``--full``, it is a whole time of RFC 3339.
    """
    if at is None:
        return "-"
    day, _, hour = rfc3339(at).partition("T")
    is_brief = draws() and not wants("full")
    first = rfc3339(at) if not is_brief else hour if abs(time.time() - at) < _DAY else day
    rest = [*([age(at)] if is_brief else []), *([why] if why else [])]
    return ", ".join((first, *rest))


def age(at: int) -> str:
    """How long ago a time is, or how far ahead, in the largest unit."""
    seconds = int(time.time()) - at
    told = _span(abs(seconds))
    return f"{told} ago" if seconds >= 0 else f"in {told}"


def _span(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), (1, "s"))
    return f"{int(seconds // size)} {unit}"


class Advance(Protocol):
    """Takes how much is done, and a total where it has changed."""

    def __call__(self, done: int, total: int | None = None, /) -> None: ...


@contextmanager
def progress(doing: str, total: int | None = None) -> Generator[Advance]:
    """Progress on standard error: call the result with how much is done, and with a new total where it changes.

    On a terminal it is a bar with an estimate that appears after a second, elsewhere a line each time that it changes.
    """
    if not sys.stderr.isatty():
        told: set[str] = set()

        def tell(done: int, new_total: int | None = None) -> None:
            of = new_total if new_total is not None else total
            line = f"{doing}: {done}" + (f" of {of}" if of is not None else "")
            if line not in told:
                told.clear()
                told.add(line)
                console.tell(line)

        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Results go to standard output while it is shown: rich would print them beside the bar, on standard error.
    bar = Progress(
        *columns, console=_console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    task = bar.add_task(console.clean(doing), total=total)
    shown = threading.Timer(_SHOWN_AFTER, bar.start)
    shown.start()
    try:
        yield lambda done, new_total=None: bar.update(task, completed=done, total=new_total)
    finally:
        shown.cancel()
        shown.join()
        bar.stop()


def waiting(doing: str, total: int | None = None) -> AbstractContextManager[Advance]:
    """`progress` for people at a terminal; a log has a line with an estimate each half minute, and so none of most."""
    return progress(doing, total) if sys.stderr.isatty() else nullcontext(_now_and_then(doing, total))


def _now_and_then(doing: str, total: int | None) -> Advance:
    began = told = time.monotonic()
    before = 0

    def tell(done: int, new_total: int | None = None, /) -> None:
        nonlocal began, told, before
        now = time.monotonic()
        if done < before:  # a second pass over the same rows
            began = now
        before = done
        if now - told < _LINE_SECONDS:
            return
        told = now
        of = new_total if new_total is not None else total
        rest = "" if of is None else f" of {of}"
        if of is not None and 0 < done < of:
            rest += f", about {_span((now - began) * (of - done) / done)} left"
        console.tell(f"{doing}: {done}{rest}")

    return tell


def untold(done: int, total: int | None = None, /) -> None:
    """Takes how much is done, and tells nobody."""
    del done, total


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)
