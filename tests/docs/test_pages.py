"""The site's pages: what is generated follows from the code, and what they tell a reader to type is right."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import attrs
import pytest

from chutes_proto.boot import _exchange as exchange
from chutes_proto.boot._settings import AgentSettings
from chutes_proto.server import ServerConfig
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoints import ENDPOINTS
from tests.cli.conftest import HOTKEY
from tests.conftest import ROOT
from tests.test_public import PUBLIC
from tools.docs import commands, generate, pages

DOCS = sorted(pages.DOCS.rglob("*.md"))
WITH_COMMANDS = [(page, line) for page in [ROOT / "README.md", *DOCS] for line in pages.command_lines(page)]


def filled(name: str) -> str:
    return generate.filled((pages.DOCS / name).read_text("utf-8"))


# --- what is generated ---


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(pages.DOCS)))
def test_every_part_that_a_page_asks_for_is_generated(page: Path) -> None:
    assert "<!-- generate" not in generate.filled(page.read_text("utf-8"))


def test_a_part_that_nobody_generates_is_an_error() -> None:
    with pytest.raises(ValueError, match="'nothing'"):
        _ = generate.filled("<!-- generate: nothing -->")


def test_every_operation_is_described() -> None:
    page = filled("reference/wire.md")
    for endpoint in ENDPOINTS:
        assert f"| [{endpoint.operation}](#{endpoint.operation}) | `{endpoint.method} {endpoint.path}` |" in page
        section = page.partition(f"{{#{endpoint.operation}}}\n")[2].partition("\n### ")[0]
        assert all(f"`{code}`" in section for code in endpoint.codes)


def test_every_code_has_its_cause_and_its_cure() -> None:
    page = filled("reference/errors.md")
    sections = dict(re.findall(r"^### `(\w+)` \{#\1\}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == {str(code) for code in Code}
    for code in Code:
        assert f"**{code.status}.**" in sections[code]
        assert "**Cause.**" in sections[code]
        assert "**Cure.**" in sections[code]


@pytest.mark.parametrize(
    ("page", "settings"), [("configuration", ServerConfig), ("agent-settings", AgentSettings)], ids=["server", "agent"]
)
def test_every_setting_is_described(page: str, settings: type[attrs.AttrsInstance]) -> None:
    text = filled(f"reference/{page}.md")
    for field in attrs.fields(attrs.resolve_types(settings)):
        if isinstance(field.type, type) and attrs.has(field.type) and field.default is not attrs.NOTHING:
            section = text.partition(f"### `[{field.name}]`\n")[2].partition("\n### ")[0]
            assert all(f"\n| `{inner.name}` | " in section for inner in attrs.fields(field.type))
        elif "Mapping" not in str(field.type) and field.name not in ("path", "proxy"):
            assert f"\n| `{field.name}` | " in text


def test_a_setting_that_the_example_does_not_explain_is_an_error(tmp_path: Path) -> None:
    example = tmp_path / "server.toml"
    _ = example.write_text(
        "# About the file.\n\n# The store.\nstore = 1\n\n# [[proxy]]\n# A path.\n# unix = 'x'  # and more\n"
    )
    assert generate.comments(example) == {"store": "The store.", "[proxy]": "", "proxy.unix": "A path. and more"}


def test_the_transitions_are_all_in_the_page() -> None:
    page = filled("explanation/exchanges.md")
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| `(\w+)` \|$", page, re.MULTILINE)
    shown = {(start, happened, end) for start, labels, end in rows for happened in labels.split(", ")}
    assert shown == {
        (state.value, happened.value, following.value)
        for state, row in exchange.TRANSITIONS.items()
        for happened, following in row.items()
    }


def test_the_picture_of_the_states_shows_them_and_leads_where_the_table_does() -> None:
    page = pages.DOCS / "explanation" / "exchanges.md"
    (picture,) = [fence.text for fence in pages.fences(page) if fence.language == "boxes"]
    states = dict(re.findall(r"^box (\w+) .* (\w+)$", picture, re.MULTILINE))
    assert {exchange.State(name) for name in states.values()} == {*exchange.State} - {exchange.State.STOPPED}
    arrows = re.findall(r"^arrow (\w+)\S* (\w+)\S* (.+)$", picture, re.MULTILINE)
    assert len(arrows) >= len(states) - 1
    for start, end, happened in arrows:
        row = exchange.TRANSITIONS[exchange.State(states[start])]
        assert row[exchange.Input(happened)] is exchange.State(states[end])


def test_every_command_is_described() -> None:
    page = filled("reference/commands.md")
    names = [f"chutes-proto {command.words}".strip() for command in commands.all_commands()]
    assert len(names) > 30
    assert re.findall(r"^## `(chutes-proto(?: [\w -]+)?)` ", page, re.MULTILINE) == names


def test_every_public_package_has_a_page() -> None:
    shown = {name for page in DOCS for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)}
    assert shown == set(PUBLIC)


# --- what a reader types ---


@pytest.mark.parametrize(("page", "line"), WITH_COMMANDS, ids=[line for _, line in WITH_COMMANDS])
def test_every_command_line_is_one(page: Path, line: str) -> None:
    """As far as its parser can tell; `tests/scenario/test_recipes.py` and the newcomer run them."""
    line = re.sub(r"\$\([^()]*(?:\([^()]*\))?[^()]*\)", "0" * 128, re.sub(r"\s[<>]+\s*(?:\"[^\"]*\"|\S+)", "", line))
    line = line.replace(" HOTKEY ", f" {HOTKEY} ")
    problem = commands.problem_of(shlex.split(line)[1:])
    assert problem is None, f"{page}: {problem}"


def test_a_command_line_that_is_none_is_found() -> None:
    assert commands.problem_of(["keys", "history", "vm-1"])
    assert commands.problem_of(["keys", "history", "vm-1", "--config", "server.toml"]) is None


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(pages.DOCS)))
def test_the_toml_of_pages_is_toml(page: Path) -> None:
    for fence in pages.fences(page):
        if fence.language == "toml" and "collateral" not in page.name:  # whose two lines are alternatives
            _ = tomllib.loads(fence.text)


def test_the_configuration_for_production_is_one() -> None:
    (text,) = [f.text for f in pages.fences(pages.DOCS / "how-to" / "production.md") if f.language == "toml"]
    assert ServerConfig.from_toml(text.encode()).listen == "0.0.0.0:8443"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(pages.DOCS)))
def test_links_of_pages_lead_to_files(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8")))
    assert listed == {str(page.relative_to(pages.DOCS)) for page in DOCS}
