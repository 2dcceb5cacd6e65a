"""The part of building a page that is not rendering its Markdown.

Generated parts are filled in. Links to files of the repository that are not pages lead to the project's URL, and so do
the names of tests, which are shown as words.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

from tools.docs import generate

PAGES = generate.ROOT / "docs"
URL = tomllib.loads((generate.ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Source"]
TEST = re.compile(r"`(tests/[\w/]+\.py)::test_(\w+)`")
LINK = re.compile(r"(\]\()(?!https?:|#|/)([^)#\s]+)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's Markdown, complete. Raises `PluginError` for a part or a file that does not exist."""
    folder = (PAGES / page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        if target.is_relative_to(PAGES) or not target.is_relative_to(generate.ROOT):
            return match[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {match[2]} is no file of the repository")
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{URL}/{kind}/main/{target.relative_to(generate.ROOT)}"

    try:
        text = generate.filled(markdown)
    except ValueError as exc:
        raise PluginError(f"{page.file.src_uri}: {exc}") from None
    text = TEST.sub(lambda match: f"[{match[2].replace('_', ' ')}]({URL}/blob/main/{match[1]})", text)
    minutes = page.meta.get("minutes")
    if minutes:
        text = re.sub(r"^(# .+)$", rf"\1\n\n*Takes less than {minutes} minutes.*", text, count=1, flags=re.MULTILINE)
    return LINK.sub(link, text)
