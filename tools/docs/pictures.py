"""Pictures of the documentation as SVG, drawn from a few lines of text.

A page has the text in a fence, ``boxes`` or ``sequence``, and the site draws it in the reader's colours. The README
needs files: ``python -m tools.docs.pictures`` writes each ``docs/pictures/*.txt`` as SVG for a light and a dark page.

The lines of ``boxes`` (anything from ``#`` on is a comment)::

    size WIDTH HEIGHT
    zone NAME X Y WIDTH HEIGHT Title
    box NAME X Y WIDTH HEIGHT Title | line | line
    arrow FROM TO label           ->, drawn between the edges that face each other; FROM.top, TO.left+20 choose an
                                  edge, and how far from its middle
    line FROM TO label            the same, dashed

The lines of ``sequence``::

    NAME = Title                  a participant, from left to right
    FROM -> TO: label             a message; --> is dashed, for an answer
    NAME: text                    what a participant does by itself
    == title                      a part begins
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from attrs import define, field, frozen

PICTURES: Final = Path(__file__).resolve().parents[2] / "docs" / "pictures"
FONT: Final = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
CHARACTER: Final = 0.54
"""Width of an average character, in font sizes."""


@frozen
class Theme:
    """Colours, as SVG has them."""

    text: str
    faint: str
    fill: str
    accent: str
    page: str


THEMES: Final = {
    "light": Theme("#1f2328", "#59636e", "#f3f5f8", "#3949ab", "#ffffff"),
    "dark": Theme("#e6edf3", "#9198a1", "#1c2128", "#8c9eff", "#0d1117"),
}
SITE: Final = Theme(
    "var(--md-default-fg-color)",
    "var(--md-default-fg-color--light)",
    "var(--md-code-bg-color)",
    "var(--md-typeset-a-color)",
    "var(--md-default-bg-color)",
)


@define
class Drawing:
    """SVG elements, one after the other."""

    theme: Theme
    width: float
    height: float
    title: str = ""
    _parts: list[str] = field(factory=list[str])

    def rectangle(self, x: float, y: float, width: float, height: float, *, dashed: bool = False) -> None:
        fill = "none" if dashed else self.theme.fill
        dash = ' stroke-dasharray="5 5"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}"'
            f' stroke="{self.theme.faint}"{dash}/>'
        )

    def text(self, x: float, y: float, words: str, *, size: float = 14, **style: Any) -> None:
        """A line of text around ``x``; ``bold``, ``faint``, ``anchor``, ``backed`` (the page's colour behind it)."""
        anchor = style.get("anchor", "middle")
        if style.get("backed"):
            width = len(words) * size * CHARACTER + 8
            left = x - width / 2 if anchor == "middle" else x - 4
            self._parts.append(
                f'<rect x="{left:.1f}" y="{y - size:.1f}" width="{width:.1f}" height="{size * 1.35:.1f}"'
                f' fill="{self.theme.page}"/>'
            )
        weight = ' font-weight="600"' if style.get("bold") else ""
        colour = self.theme.faint if style.get("faint") else self.theme.text
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], *, dashed: bool, head: bool = True) -> None:
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        marker = ' marker-end="url(#arrow)"' if head else ""
        colour = self.theme.accent if head else self.theme.faint
        self._parts.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
            f' stroke="{colour}" stroke-width="1.6"{dash}{marker}/>'
        )

    def svg(self) -> str:
        """The whole picture."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}"'
            f' width="{self.width:g}" role="img" aria-label="{escape(self.title)}"'
            f" font-family='{FONT}' style=\"max-width:100%;height:auto\">"
        )
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{self.theme.accent}"/></marker></defs>'
        )
        return "\n".join([head, arrow, *self._parts, "</svg>"]) + "\n"


# --- boxes ---


@frozen
class Box:
    x: float
    y: float
    width: float
    height: float

    def edge(self, side: str) -> tuple[float, float]:
        """The middle of a side, or a point beside it: ``left``, ``top+20``, ``right-8``."""
        name, sign, distance = re.fullmatch(r"(\w+)([+-]?)(\d*)", side).groups()  # type: ignore[union-attr]
        off = float(distance or 0) * (-1 if sign == "-" else 1)
        match name:
            case "left":
                return self.x, self.y + self.height / 2 + off
            case "right":
                return self.x + self.width, self.y + self.height / 2 + off
            case "top":
                return self.x + self.width / 2 + off, self.y
            case _:
                return self.x + self.width / 2 + off, self.y + self.height

    def facing(self, other: Box) -> str:
        across = (other.x + other.width / 2) - (self.x + self.width / 2)
        down = (other.y + other.height / 2) - (self.y + self.height / 2)
        if abs(across) * 0.6 >= abs(down):
            return "right" if across > 0 else "left"
        return "bottom" if down > 0 else "top"


def boxes(source: str, theme: Theme, title: str = "") -> str:
    """The picture that the lines of ``boxes`` in ``source`` describe."""
    drawing = Drawing(theme, 720, 300, title)
    places: dict[str, Box] = {}
    arrows: list[tuple[str, str, str, bool]] = []
    for line in _lines(source):
        word, _, rest = line.partition(" ")
        match word:
            case "size":
                drawing.width, drawing.height = map(float, rest.split())
            case "zone":
                name, x, y, width, height, words = rest.split(maxsplit=5)
                place = places[name] = Box(float(x), float(y), float(width), float(height))
                drawing.rectangle(place.x, place.y, place.width, place.height, dashed=True)
                drawing.text(place.x + 12, place.y + 20, words, size=13, faint=True, anchor="start")
            case "box":
                name, x, y, width, height, words = rest.split(maxsplit=5)
                place = places[name] = Box(float(x), float(y), float(width), float(height))
                drawing.rectangle(place.x, place.y, place.width, place.height)
                heading, *more = (part.strip() for part in words.split("|"))
                top = place.y + place.height / 2 - 9 * len(more) + 5
                drawing.text(place.x + place.width / 2, top, heading, bold=True)
                for number, each in enumerate(more, 1):
                    drawing.text(place.x + place.width / 2, top + 18 * number, each, size=12.5, faint=True)
            case "arrow" | "line":
                start, end, label = [*rest.split(maxsplit=2), ""][:3]
                arrows.append((start, end, label, word == "line"))
            case _:
                raise ValueError(f"a picture has no {word!r}: {line}")
    for arrow in arrows:
        _draw_arrow(drawing, places, *arrow)
    return drawing.svg()


def _draw_arrow(drawing: Drawing, places: dict[str, Box], start: str, end: str, label: str, dashed: bool) -> None:
    first, _, first_side = start.partition(".")
    second, _, second_side = end.partition(".")
    here, there = places[first], places[second]
    a = here.edge(first_side or here.facing(there))
    b = there.edge(second_side or there.facing(here))
    if not first_side and not second_side:
        a, b = _straight(here, there, a, b)
    drawing.line(a, b, dashed=dashed)
    is_level = a[1] == b[1]
    if label:
        y = (a[1] + b[1]) / 2 + (-8 if is_level else 4)
        drawing.text((a[0] + b[0]) / 2, y, label, size=12.5, backed=not is_level)


def _straight(
    here: Box, there: Box, a: tuple[float, float], b: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The same ends, moved along their edges so that the line is level, where the boxes lie side by side."""
    if a[0] in (here.x, here.x + here.width):
        top, bottom = max(here.y, there.y), min(here.y + here.height, there.y + there.height)
        return ((a[0], (top + bottom) / 2), (b[0], (top + bottom) / 2)) if top < bottom else (a, b)
    left, right = max(here.x, there.x), min(here.x + here.width, there.x + there.width)
    return (((left + right) / 2, a[1]), ((left + right) / 2, b[1])) if left < right else (a, b)


# --- sequences ---

_PARTICIPANT = re.compile(r"(\w+) = (.+)")
_MESSAGE = re.compile(r"(\w+) (-->|->) (\w+): (.+)")
_NOTE = re.compile(r"(\w+): (.+)")


def sequence(source: str, theme: Theme, title: str = "") -> str:
    """The sequence diagram that ``source`` describes."""
    titles: dict[str, str] = {}
    steps: list[re.Match[str] | str] = []
    for line in _lines(source):
        if line.startswith("=="):
            steps.append(line.removeprefix("==").strip())
        elif message := _MESSAGE.fullmatch(line):
            steps.append(message)
        elif participant := _PARTICIPANT.fullmatch(line):
            titles[participant[1]] = participant[2]
        elif note := _NOTE.fullmatch(line):
            steps.append(note)
        else:
            raise ValueError(f"a sequence has no such line: {line}")
    names = list(titles)
    side = 115.0
    at = {names[0]: side}
    for before, name in pairwise(names):
        labels = [
            s[4] for s in steps if isinstance(s, re.Match) and s.re is _MESSAGE and {s[1], s[3]} == {before, name}
        ]
        widest = max(map(len, labels), default=0) * 12.5 * CHARACTER
        at[name] = at[before] + max(200.0, widest + 30)
    row, top = 38.0, 62.0
    drawing = Drawing(theme, at[names[-1]] + side, top + row * len(steps) + 22, title)
    for name in names:
        drawing.line((at[name], 46), (at[name], drawing.height - 8), dashed=True, head=False)
        drawing.rectangle(at[name] - 88, 8, 176, 38)
        drawing.text(at[name], 32, titles[name], bold=True)
    for number, step in enumerate(steps):
        y = top + row * (number + 0.6)
        if isinstance(step, str):
            drawing.line((14, y - 10), (drawing.width - 14, y - 10), dashed=False, head=False)
            drawing.text(18, y + 8, step, size=13, bold=True, anchor="start", backed=True)
        elif step.re is _MESSAGE:
            start, dash, end, label = step.groups()
            drawing.line((at[start], y), (at[end], y), dashed=dash == "-->")
            drawing.text((at[start] + at[end]) / 2, y - 7, label, size=12.5, backed=True)
        else:
            name, words = step.groups()
            width = len(words) * 12.5 * CHARACTER + 20
            left = min(max(4.0, at[name] - width / 2), drawing.width - width - 4)
            drawing.rectangle(left, y - 17, width, 26)
            drawing.text(left + width / 2, y, words, size=12.5)
    return drawing.svg()


def _lines(source: str) -> Iterator[str]:
    for line in source.splitlines():
        if text := re.sub(r"(?:^|\s)#.*", "", line).strip():
            yield text


# --- where they are used ---

KINDS: Final = {"boxes": boxes, "sequence": sequence}


def fence(source: str, language: str, _class: str, options: dict[str, str], _markdown: object, **_more: Any) -> str:
    """The picture in place of a fence of a page (the protocol of ``pymdownx.superfences``)."""
    picture = KINDS[language](source, SITE, options.get("title", ""))
    return f'<div class="picture">{picture.replace(chr(10), "")}</div>'


def files() -> Iterator[tuple[Path, str]]:
    """Every file that is drawn from a ``*.txt`` of `PICTURES`, with what it has to hold."""
    for source in sorted(PICTURES.glob("*.txt")):
        text = source.read_text("utf-8")
        title = text.partition("\n")[0].lstrip("# ")
        for name, theme in THEMES.items():
            yield source.with_name(f"{source.stem}-{name}.svg"), boxes(text, theme, title)


def main() -> int:
    for path, picture in files():
        _ = path.write_text(picture, "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
