"""Phrases that the project does not use do not come back in texts that people read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.language import files, hits, texts

ROOTS = ("README.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md", "RELEASE.md", "docs", "examples", "src")
"""What is read; the texts of tests and tools are not."""


@pytest.mark.parametrize(
    "path", list(files([ROOT / root for root in ROOTS])), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_text_is_in_the_words_of_the_glossary(path: Path) -> None:
    found = [f"{path}:{line}: {hit}" for line, text in texts(path) for hit in hits(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["It is spent.", "What it is given.", "Read on. Whoever asks gets it.", "which is no grant"]
)
def test_a_phrase_is_found(text: str) -> None:
    assert list(hits(text))


@pytest.mark.parametrize("text", ["What does it cost?", "It is no longer there.", "no grant was given"])
def test_other_words_are_not(text: str) -> None:
    assert not list(hits(text))
