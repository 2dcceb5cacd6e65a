"""Checks a built site: ``python -m tools.docs.check build/site``.

Every link and anchor inside the site leads somewhere, nothing is loaded from elsewhere when a page is read, and every
public name is in the API reference.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from attrs import define, field

SURFACE = Path(__file__).resolve().parents[2] / "tests" / "public_surface.txt"
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "image": "href",
    "img": "src",
    "input": "src",
    "object": "data",
    "script": "src",
    "source": "src srcset",
    "use": "href",
    "video": "src poster",
}
"""Everything that a browser loads by itself, by element and attribute; ``link`` depends on its ``rel``."""
LOADING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch", "manifest"}
_IN_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")


@define
class Page(HTMLParser):
    """The links of a page, the addresses that it loads, and its anchors."""

    links: list[str] = field(factory=list[str])
    loaded: list[str] = field(factory=list[str])
    anchors: set[str] = field(factory=set[str])

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag says."""
        values = {name: value or "" for name, value in attrs}
        if anchor := values.get("id") or (values.get("name") if tag == "a" else ""):
            self.anchors.add(anchor)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and set(values.get("rel", "").split()) & LOADING_LINKS:
            self.loaded.append(values.get("href", ""))
        self.loaded += [values[name] for name in LOADED.get(tag, "").split() if name in values]
        self.loaded += _IN_CSS.findall(values.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Note what a style sheet within the page loads."""
        if self.get_starttag_text() and self.lasttag == "style":
            self.loaded += _IN_CSS.findall(data)


def read(path: Path) -> Page:
    """The page in the file at ``path``."""
    page = Page()
    page.feed(path.read_text("utf-8"))
    return page


def is_foreign(url: str) -> bool:
    """Whether a browser would ask another host for ``url``."""
    return bool(urlsplit(url).netloc)


def problems(site: Path) -> Iterator[str]:
    """Everything that is wrong with the site in the directory ``site``."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site}: holds no page; run make docs"
    for path, page in pages.items():
        name = path.relative_to(site)
        for url in page.loaded:
            if is_foreign(url):
                yield f"{name}: loads {url} from elsewhere; put a copy beside the page"
        for url in page.links:
            yield from (f"{name}: {problem}" for problem in _link(site, path, url, pages))
    for path in sorted(site.rglob("*.css")):
        for url in _IN_CSS.findall(path.read_text("utf-8")):
            yield f"{path.relative_to(site)}: loads {url} from elsewhere"


def _link(site: Path, path: Path, url: str, pages: dict[Path, Page]) -> Iterator[str]:
    if is_foreign(url) or urlsplit(url).scheme:
        return
    target, anchor = urldefrag(urljoin(f"/{path.relative_to(site)}", url))
    found = site / unquote(target).lstrip("/")
    if found.is_dir():
        found /= "index.html"
    if path.name == "404.html" and not found.exists():
        return  # its links are as of the site's address
    if not found.exists():
        yield f"the link {url} leads nowhere"
    elif anchor and found in pages and unquote(anchor) not in pages[found].anchors and anchor != "__":
        yield f"the link {url} leads to a page without the anchor {anchor}"


def missing_names(site: Path, surface: Path) -> Iterator[str]:
    """Every public name of the file ``surface`` that the API reference of the site does not describe."""
    pages = [read(path) for path in (site / "reference" / "api").rglob("*.html")]
    described = {anchor for page in pages for anchor in page.anchors}
    for line in surface.read_text("utf-8").splitlines():
        package, _, name = line.partition(": ")
        if f"{package}.{name}" not in described:
            yield f"reference/api: {package} exports {name}, which no page describes; write its docstring"


def main(arguments: list[str]) -> int:
    site = Path(arguments[0] if arguments else "build/site")
    found = [*problems(site), *missing_names(site, SURFACE)]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
