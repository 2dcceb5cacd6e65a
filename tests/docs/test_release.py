"""The description of a release: a wheel with the README, its links absolute, and the URLs of the project."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from chutes_proto import __version__
from tests.conftest import ROOT

URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]


def test_there_is_one_project_url() -> None:
    assert all(url.startswith(URLS["Source"]) for url in URLS.values())
    assert not [
        path
        for path in [*ROOT.glob("*.md"), *(ROOT / "src").rglob("*.py"), ROOT / "hatch_build.py"]
        if URLS["Source"] in path.read_text("utf-8")
    ]


def test_a_wheels_description_has_absolute_links(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _ = subprocess.run([*build, "--no-build-isolation", "--wheel-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata, _, description = archive.read(name).decode("utf-8").partition("\n\n")
    assert "Description-Content-Type: text/markdown" in metadata
    for label, url in URLS.items():
        assert f"Project-URL: {label}, {url}" in metadata
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)"]+)', description)
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    assert f"{URLS['Source']}/blob/v{__version__}/docs/security.md" in links
    assert f"{URLS['Source']}/raw/v{__version__}/docs/pictures/overview-light.svg" in links


def test_a_release_in_the_changelog_is_grouped_by_its_readers() -> None:
    """Branches that append lines merge by union, so that text which one of them removed may come back."""
    for release in re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)[1:]:
        title, _, text = release.partition("\n")
        if title != "[Unreleased]":
            assert not re.search(r"^- ", text.partition("\n### ")[0], re.MULTILINE), title
