"""The site's tools: pictures, the check of the built site, and the newcomer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tools.docs import check, newcomer, pages, pictures

# --- pictures ---


@pytest.mark.parametrize("kind", pictures.KINDS)
def test_the_pictures_of_pages_are_drawn(kind: str) -> None:
    found = [f for page in pages.DOCS.rglob("*.md") for f in pages.fences(page) if f.language == kind]
    assert found
    for fence in found:
        drawn = ET.fromstring(pictures.KINDS[kind](fence.text, pictures.SITE))
        assert drawn.tag.endswith("svg")


def test_a_line_that_is_no_picture_is_an_error() -> None:
    for kind in pictures.KINDS.values():
        with pytest.raises(ValueError, match="circle 1 2"):
            _ = kind("circle 1 2", pictures.SITE)


def test_text_in_a_picture_cannot_be_markup() -> None:
    assert "<b>" not in pictures.boxes("box a 0 0 9 9 <b>", pictures.SITE)


# --- the check of the built site ---


def site_of(folder: Path, **files: str) -> list[str]:
    for name, text in files.items():
        _ = (folder / f"{name.replace('_', '.')}").write_text(text)
    return list(check.problems(folder))


def test_a_site_without_faults(tmp_path: Path) -> None:
    page = '<a href="#x">a</a><a href="https://example.org">b</a><p id="x"><img src="a.css"><a href="b.html#y">c</a>'
    assert site_of(tmp_path, a_html=page, b_html="<h1 id=y>", a_css="p { background: url(data:x) }") == []


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link rel="preconnect" href="https://fonts.gstatic.com">',
        '<img src="//elsewhere.example/a.png">',
        "<style>@import url(https://fonts.example/a.css);</style>",
        '<p style="background: url(https://a.example/b.png)">',
        '<a href="nothing.html">x</a>',
        '<a href="#nothing">x</a>',
    ],
)
def test_a_fault_of_a_page_is_found(tmp_path: Path, page: str) -> None:
    assert len(site_of(tmp_path, a_html=page)) == 1


def test_a_style_sheet_that_loads_fonts_from_elsewhere_is_found(tmp_path: Path) -> None:
    assert len(site_of(tmp_path, a_html="", a_css='@font-face { src: url("https://a.example/f.woff2") }')) == 1


def test_no_site_is_a_fault(tmp_path: Path) -> None:
    assert site_of(tmp_path) == [f"{tmp_path}: holds no page; run make docs"]


def test_a_public_name_that_no_page_describes_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "reference" / "api" / "front"
    folder.mkdir(parents=True)
    _ = (folder / "index.html").write_text('<h2 id="package.One">')
    surface = tmp_path / "surface.txt"
    _ = surface.write_text("package: One\npackage: Two\n")
    (found,) = check.missing_names(tmp_path, surface)
    assert "package exports Two" in found


# --- commands of pages ---


def test_a_backslash_continues_a_command() -> None:
    fence = pages.Fence("console", "", "$ a \\\n    b\nc\nd\n$ e\n", "")
    assert list(pages.steps(fence)) == [pages.Step("a \\\n    b", "c\nd\n"), pages.Step("e", "")]


# --- the newcomer ---


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("", ""),
        ("a\n", "a\n"),
        ("a\n", "a"),
        ("…\n", ""),
        ("…\n", "a\nb\n"),
        ("a…c\n", "abc\n"),
        ("…\nb\n…\n", "a\nb\n"),
        ("a…\n", "a\n"),
    ],
)
def test_an_output_as_the_page_shows_it(expected: str, printed: str) -> None:
    assert newcomer.agrees(expected, printed)


@pytest.mark.parametrize(("expected", "printed"), [("", "a\n"), ("a\n", ""), ("a…c\n", "a\nc\n"), ("a\n", "ab\n")])
def test_another_output(expected: str, printed: str) -> None:
    assert not newcomer.agrees(expected, printed)


def follow(folder: Path, page: str) -> list[str]:
    build = pages.ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as name:  # folders of tests have the same names in each worker
        path = Path(name) / "page.md"
        _ = path.write_text(page, "utf-8")
        return list(newcomer.follow(path, folder, dict(os.environ)))


def test_a_page_is_followed(tmp_path: Path) -> None:
    page = """# A page
```text title="a file"
port 8443
```
```console
$ mkdir below && cd below && word=hello
$ echo $word > said; cat said "../a file"
hello
port …
$ false
$ echo $?
1
```
```console title="Terminal 1"
$ echo begun; cat /dev/zero
begun
```
"""
    assert len(follow(tmp_path, page)) == 5
    assert (tmp_path / "below" / "said").read_text() == "hello\n"
    assert (tmp_path / "a file").read_text() != "port 8443\n"


@pytest.mark.parametrize(
    "commands",
    ["$ false", "$ echo a\nb", "$ false\n$ echo $?\n0", "$ exit 1"],
    ids=["fails", "prints", "status", "ends"],
)
def test_a_page_that_promises_something_else(tmp_path: Path, commands: str) -> None:
    with pytest.raises(newcomer.NotAsPromised):
        _ = follow(tmp_path, f"```console\n{commands}\n```\n")


def test_a_page_leaves_nothing_beside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs in a terminal of its own may end its work at the end of the page."""
    page, temporary = tmp_path / "page", tmp_path / "temporary"
    page.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    served = "(trap 'sleep 0.3; rm $TMPDIR/made; exit' TERM; touch $TMPDIR/made; echo begun; sleep 60)"
    _ = follow(page, f'```console title="Terminal 1"\n$ {served} 2>&1\nbegun\n```\n')
    assert list(temporary.iterdir()) == []


def test_what_a_command_also_writes_to_a_file_is_there_for_the_next(tmp_path: Path) -> None:
    """``tee`` prints first."""
    slow = "tee() { read line; echo $line; sleep 0.3; echo $line >$1; cat; }"
    page = f"""```console title="Terminal 1"
$ {slow}; (echo begun; sleep 60) | tee said
begun
```

```console
$ cat said
begun
```
"""
    assert len(follow(tmp_path, page)) == 2


@pytest.mark.parametrize("page", newcomer.PAGES, ids=lambda page: page.stem)
def test_a_newcomer_gets_through_every_tutorial(
    page: Path, require_program: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    """With the packages of this environment; `.ci/run` does it in one of its own."""
    if needed := {"boot-agent": "cryptsetup", "key-server": "openssl"}.get(page.stem):
        _ = require_program(needed)
    assert newcomer.main(["--quick", str(page)]) == 0, capfd.readouterr().err


# --- the API ---


def test_a_value_has_the_fields_of_its_bases(tmp_path: Path) -> None:
    griffe = pytest.importorskip("griffe", reason="make docs installs it")
    from tools.docs.values import ValueFields

    (tmp_path / "things.py").write_text(
        """
class Op:
    KIND = "any"
    takes_long: bool = False

@frozen
class Thing(Op):
    name: str

@frozen(kw_only=True)
class Heavy(Thing):
    kilograms: int
    _owner: str = ""

class Bytes(Struct):
    first: bytes

class More(Bytes):
    second: bytes
"""
    )
    read = griffe.load("things", search_paths=[tmp_path], extensions=griffe.Extensions(ValueFields()))
    fields = {name: [each.name for each in read[name].parameters][1:] for name in ("Thing", "Heavy", "Bytes", "More")}
    assert fields == {
        "Thing": ["name"],
        "Heavy": ["name", "kilograms", "owner"],
        "Bytes": ["first"],
        "More": ["first", "second"],
    }
    assert [each.kind.value for each in read["Heavy"].parameters][1:] == ["keyword-only"] * 3
