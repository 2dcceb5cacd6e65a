"""How `demo` looks: numbered sections, a mark for every check, tables; at most 100 columns wide.

Rules kept here:

* a mark is green or red by what the caller observed; colour never says anything that the text does not;
* without a terminal, and with ``plain``, there are no escape codes and only ASCII characters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final, NoReturn

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from chutes_proto.cli import console as lines

_WIDEST: Final = 100
_NAME_WIDTH: Final = 10
_INDENT: Final = (0, 0, 0, 3)
_ASCII: Final = str.maketrans({"✓": "ok", "✗": "NO", "…": "..", "≠": "!=", "→": "->", "─": "-"})


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Raise what rich hides: its own exit code, 1, says that a check failed."""
        raise  # noqa: PLE0704 - rich calls this while it handles the BrokenPipeError


def make_console(*, plain: bool) -> Console:
    """A console for standard output, without escape codes where ``NO_COLOR`` is set or nobody looks."""
    found = _Console(highlight=False)
    styled = found.is_terminal and not plain and not os.environ.get("NO_COLOR")
    return _Console(highlight=False, width=min(found.width, _WIDEST), color_system="auto" if styled else None)


class Page:
    """Prints each step as it ends, and counts those that passed and those that did not."""

    def __init__(self, console: Console, *, plain: bool = False) -> None:
        self._console = console
        encoding = (console.encoding or "ascii").lower()
        self._plain = plain or not console.is_terminal or not encoding.startswith("utf")
        self._began = time.monotonic()
        self._sections = 0
        self.passed: int = 0
        self.failed: int = 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def title(self, text: str, explanation: str) -> None:
        """The first lines."""
        self._print(self._text(text, "bold"))
        self._print(self._text(explanation, "dim"))

    def section(self, title: str) -> None:
        """A numbered heading."""
        self._sections += 1
        self._print()
        self._print(self._text(f"{self._sections}  {title}", "bold"))

    def step(self, name: str, text: str, *, passed: bool = True) -> None:
        """One line: a mark, a name, what was observed, and when."""
        row = Table.grid(padding=(0, 2, 0, 0), pad_edge=False, expand=True)
        row.add_column(width=self._mark_width)
        row.add_column(width=_NAME_WIDTH)
        row.add_column(ratio=1, overflow="fold")
        row.add_column(justify="right", no_wrap=True)
        row.add_row(self._mark(passed), self._text(name), self._text(text), self._text(f"{self.seconds:.2f} s", "dim"))
        self._print(Padding(row, _INDENT))

    def table(self, heads: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> None:
        """Rows of whether it passed, and cells. The last column is never wrapped."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column(width=self._mark_width)
        for number, head in enumerate(heads):
            last = number == len(heads) - 1
            table.add_column(head, overflow="fold", no_wrap=last, min_width=0 if number else _NAME_WIDTH)
        for passed, cells in rows:
            table.add_row(self._mark(passed), *map(self._text, cells))
        self._print(Padding(table, _INDENT, expand=False))

    def note(self, text: str) -> None:
        """A remark that is not a check."""
        self._print(Padding(self._text(text, "dim"), _INDENT, expand=False))

    def summary(self, text: str, *, passed: bool) -> None:
        """The last word."""
        colour = "bold green" if passed else "bold red"
        self._print()
        self._print(self._text(f"{'✓' if passed else '✗'} {text}", colour))

    @property
    def _mark_width(self) -> int:
        return 2 if self._plain else 1

    def _mark(self, passed: bool) -> Text:
        self.passed += passed
        self.failed += not passed
        return self._text("✓", "green") if passed else self._text("✗", "bold red")

    def _text(self, text: str, style: str = "") -> Text:
        """``text`` without anything that steers a terminal."""
        clean = lines.clean(text)
        return Text(clean.translate(_ASCII) if self._plain else clean, style=style)

    def _print(self, content: Text | Padding | str = "") -> None:
        with lines.writing():
            self._console.print(content)
