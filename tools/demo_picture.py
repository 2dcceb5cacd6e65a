"""Pictures of `chutes-proto demo` for the documentation: ``python -m tools.demo_picture DIRECTORY``.

Runs the demonstration and writes ``demo-light.svg`` and ``demo-dark.svg`` of the same output. They load no font or
anything else from elsewhere. Fails, and writes nothing, where the demonstration fails.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

import trio
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from chutes_proto.cli.page import Page
from chutes_proto.io.demonstration import show

COLUMNS: Final = 88


def _theme(colours: str) -> TerminalTheme:
    """Background, foreground, and black, red, green, yellow, blue, magenta, cyan and white on it, in hex."""
    background, foreground, *others = [tuple(bytes.fromhex(colour)) for colour in colours.split()]
    return TerminalTheme(background, foreground, others)  # type: ignore[arg-type]


THEMES: Final = {
    "light": _theme("ffffff 1f2328 1f2328 cf222e 1a7f37 9a6700 0969da 8250df 1b7c83 6e7781"),
    "dark": _theme("0d1117 e6edf3 484f58 ff7b72 3fb950 d29922 58a6ff bc8cff 39c5cf b1bac4"),
}


def main(directory: Path) -> int:
    console = Console(
        record=True, file=io.StringIO(), force_terminal=True, color_system="standard", width=COLUMNS, highlight=False
    )
    with tempfile.TemporaryDirectory() as files:
        if not trio.run(show, Path(files), Page(console)):
            print(console.export_text(), file=sys.stderr)
            return 1
    directory.mkdir(parents=True, exist_ok=True)
    for name, theme in THEMES.items():
        picture = console.export_svg(title="chutes-proto demo", theme=theme, clear=False, unique_id="demo")
        picture = re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # they would be fetched
        path = directory / f"demo-{name}.svg"
        _ = path.write_text(picture.replace("Fira Code", "Menlo, Consolas, DejaVu Sans Mono"), "utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
