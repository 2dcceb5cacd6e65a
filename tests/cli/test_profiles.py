"""``chutes-proto profiles import``: what would change, the question, the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from chutes_proto.quote import parse_profiles_json
from tests.cli.conftest import Ended
from tests.dev_server import dev_server
from tests.quote.test_published import BY_PLATFORM, FLAT, RTMR1, published

Command = Callable[..., Ended]


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "measurements.json"


def test_what_would_change_is_shown_first(command: Command, tmp_path: Path, into: Path) -> None:
    """Without a terminal nobody can be asked, so that a script says --yes."""
    source = tmp_path / "published.json"
    _ = source.write_bytes(published(upper=True))
    asked = command("profiles", "import", str(source), "--into", str(into))
    assert asked.code == 1
    assert "added" in asked.out
    assert "--yes" in asked.err
    as_json = command("profiles", "import", str(source), "--into", str(into), "--json")
    assert (as_json.code, as_json.json["imported"], "--yes" in as_json.err) == (1, False, True)
    assert not into.exists()
    done = command("profiles", "import", str(source), "--into", str(into), "--yes")
    assert (done.code, into.read_bytes()) == (0, source.read_bytes())
    again = command("profiles", "import", str(source), "--into", str(into))
    assert (again.code, again.out) == (0, f"{into} has these values already\n")


def test_the_difference_names_the_registers(command: Command, tmp_path: Path, into: Path) -> None:
    source = tmp_path / "published.yaml"
    _ = into.write_text(FLAT)
    _ = source.write_text(BY_PLATFORM.replace(RTMR1, "ee" * 48, 1).partition('- version: "1.11"')[0])
    done = command("profiles", "import", str(source), "--into", str(into), "--yes", "--json")
    found = json.loads(done.out)
    assert found == {
        "ok": True,
        "imported": True,
        "changes": [
            {"change": "changed", "name": "8xh200", "version": "1.10", "parts": "RTMR1 (boot), RTMR1 (runtime)"},
            {"change": "changed", "name": "8xb200", "version": "1.10", "parts": "RTMR1 (boot), RTMR1 (runtime)"},
            {"change": "removed", "name": "8xh200", "version": "1.11", "parts": ""},
        ],
        "not_served": ["8xh200 1.10: SEV-SNP"],
    }
    assert into.read_text() == source.read_text()  # SEV-SNP stays in the file


def test_a_key_servers_list_is_fetched(command: Command, tmp_path: Path, into: Path) -> None:
    with dev_server(tmp_path / "platform") as server:
        url = f"{server.url}/servers/tee/measurements"
        done = command("profiles", "import", url, "--ca-file", str(server.ca), "--into", str(into), "--yes")
        wrong = command("profiles", "import", f"{server.url}/nowhere", "--ca-file", str(server.ca), "--into", str(into))
    assert done.code == 0, done.err
    assert [one.name for one, _ in parse_profiles_json(into.read_bytes())] == ["simulated"]
    assert wrong.code == 2
    assert "answers 404" in wrong.err


def test_a_file_that_is_none_changes_nothing(command: Command, tmp_path: Path, into: Path) -> None:
    _ = (tmp_path / "bad").write_text("measurements: [x]\n")
    ended = command("profiles", "import", str(tmp_path / "bad"), "--into", str(into), "--yes")
    assert ended.code == 2
    assert not into.exists()
