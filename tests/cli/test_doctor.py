"""`doctor` and `serve --check`: what a machine or a configuration lacks, each with the command that mends it."""

from __future__ import annotations

import re
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chutes_proto._extras import EXTRAS
from chutes_proto.io import machine
from chutes_proto.io.server.development import write_server
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from tests.cli.conftest import Ended

Command = Callable[..., Ended]
PLATFORM = SimulatedPlatform(bytes(32))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_server(tmp_path, PLATFORM, int(time.time()))
    return tmp_path


def found(ended: Ended) -> dict[str, Any]:
    """The findings of `--json`, by what was looked at."""
    assert ended.json["ok"] == (ended.code == 0)
    return {finding["what"]: finding for finding in ended.json["findings"]}


def test_a_machine_for_a_verifier_lacks_nothing(command: Command) -> None:
    ended = command("doctor", "--for", "verifier")
    assert ended.code == 0
    assert f"ok       Python: {sys.version_info.major}.{sys.version_info.minor}." in ended.out
    assert "extra cli: installed" in ended.out
    assert "clock: " in ended.out


def test_a_missing_extra_and_program_come_with_the_command_that_installs_them(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "find_cryptsetup", lambda: None)
    monkeypatch.setitem(EXTRAS, "hotkey", ("not_installed",))
    ended = command("doctor", "--for", "server", "--json")
    assert (ended.code, found(ended)["extra hotkey"]["remedy"]) == (1, "pip install 'chutes-proto[hotkey]'")
    ended = command("doctor", "--for", "vm", "--json")
    assert found(ended)["cryptsetup"]["remedy"] == "apt-get install cryptsetup-bin"
    assert found(ended)["extra hotkey"]["state"] == "note"


def test_outside_a_td_there_is_no_quote(command: Command) -> None:
    if Path("/dev/tdx_guest").exists():
        pytest.skip("this is a TD")
    ended = command("doctor", "--for", "vm")
    assert ended.code == 1
    assert ended.out.count("run: modprobe tdx_guest") == 2


def test_a_good_configuration_lacks_nothing(command: Command, site: Path) -> None:
    ended = command("serve", "--check", "--config", site / "server.toml")
    assert ended.code == 0
    assert "certificate: " in ended.out
    assert "server.pem expires in " in ended.out
    assert re.search(r"\.json\) expires in (29|30) days, at 2", ended.out)
    assert "problem" not in ended.out


def test_permissions_that_are_too_open(command: Command, site: Path) -> None:
    (site / "kek").chmod(0o644)
    ended = command("serve", "--check", "--config", site / "server.toml")
    assert ended.code == 1
    assert ended.err.startswith(f"chutes-proto: kek_file: {site}/kek: ")
    assert ended.err.endswith(f"; run chmod 600 {site}/kek\n")
    assert ended.out == "configuration: the rest is looked at once these problems are mended\n"


def test_the_store_is_looked_at_beside_a_configuration_that_serves_nobody(command: Command, site: Path) -> None:
    SqliteStore(site / "keys.db").close()
    (site / "server.pem").unlink()
    ended = command("serve", "--check", "--config", site / "server.toml", "--json")
    assert (ended.code, found(ended)["tls"]["state"]) == (1, "problem")
    assert found(ended)["store"]["detail"].startswith(f"{site}/keys.db: sealed keys: ")
    with closing(sqlite3.connect(site / "keys.db", isolation_level=None)) as database:
        database.execute("UPDATE fact SET value = 999 WHERE name = 'schema_version'")
    ended = command("serve", "--check", "--config", site / "server.toml", "--json")
    assert found(ended)["tls"]["state"] == found(ended)[f"store {site}/keys.db"]["state"] == "problem"


def test_a_configuration_that_cannot_be_read_is_all_there_is(command: Command, site: Path) -> None:
    (site / "server.toml").write_text("kek = 1\n")
    ended = command("serve", "--check", "--config", site / "server.toml", "--json")
    assert {finding["state"] for finding in ended.json["findings"]} == {"problem"}


def test_a_remedy_is_for_a_shell(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "key server"
    folder.mkdir()
    write_server(folder, PLATFORM, int(time.time()))
    (folder / "kek").chmod(0o644)
    wrong = command("serve", "--check", "--config", folder / "server.toml", "--json")
    assert found(wrong)["kek_file"]["remedy"] == f"chmod 600 '{folder}/kek'"
    (folder / "kek").chmod(0o600)
    (path,) = (folder / "collateral").iterdir()
    path.write_bytes(PLATFORM.collateral_json(int(time.time()) - COLLATERAL_SECONDS - 60))
    wrong = command("serve", "--check", "--config", folder / "server.toml", "--json")
    assert found(wrong)["collateral"]["remedy"].endswith(f" --out '{folder}/collateral'")


def test_collateral_that_has_expired(command: Command, site: Path) -> None:
    (path,) = (site / "collateral").iterdir()
    path.write_bytes(PLATFORM.collateral_json(int(time.time()) - COLLATERAL_SECONDS - 60))
    ended = command("serve", "--check", "--config", site / "server.toml", "--json")
    (problem,) = [each for each in ended.json["findings"] if each["state"] == "problem"]
    assert (ended.code, problem["what"]) == (1, "collateral")
    assert problem["remedy"] == f"chutes-proto collateral fetch --quote QUOTE --upstream URL --out {site}/collateral"


def test_collateral_that_soon_expires(command: Command, site: Path) -> None:
    (path,) = (site / "collateral").iterdir()
    path.write_bytes(PLATFORM.collateral_json(int(time.time()) - COLLATERAL_SECONDS + 3 * 86_400 + 60))
    ended = command("serve", "--check", "--config", site / "server.toml", "--json")
    assert (ended.code, found(ended)["collateral"]["state"]) == (0, "note")
    assert "expires in 3 days" in found(ended)["collateral"]["detail"]
    fetch = f"chutes-proto collateral fetch --fmspc {PLATFORM.fmspc.hex()} --ca platform --tee TDX --upstream URL"
    assert found(ended)["collateral"]["remedy"] == f"{fetch} --out {site}/collateral"


@pytest.mark.parametrize(
    "words", [("serve", "--check", "--config", "nowhere.toml"), ("serve", "--dev", "--json"), ("doctor", "--for", "x")]
)
def test_usage(command: Command, words: tuple[str, ...]) -> None:
    assert command(*words).code == 2
