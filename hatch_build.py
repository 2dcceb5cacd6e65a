"""What a release says of itself: the README, with links that also work away from the repository.

A relative link leads to the file at the release's tag under the project's URL, a picture to its bytes there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r'(\]\(|\bsrc="|\bsrcset="|\bhref=")(?!https?:|#|mailto:)([^)"\s]+)')


def with_absolute_links(text: str, url: str, version: str) -> str:
    """``text`` with every relative link made absolute."""

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1].startswith("src") else "blob"
        return f"{match[1]}{url}/{kind}/v{version}/{match[2]}"

    return LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Hatchling calls it when it makes the metadata of a wheel or sdist."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the readme."""
        root = Path(self.root)
        version = re.search(r'^__version__ = "(.+)"$', (root / "src/chutes_proto/__init__.py").read_text("utf-8"), re.M)
        if version is None:
            raise ValueError("src/chutes_proto/__init__.py has no line with __version__")
        text = with_absolute_links((root / "README.md").read_text("utf-8"), metadata["urls"]["Source"], version[1])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
