"""A store that went back, as an operator meets it: what is said, and the command that lets servers go on."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from chutes_proto.errors import Unavailable
from chutes_proto.io.server.development import write_server
from chutes_proto.io.stores import marks
from chutes_proto.sync import BootAgent
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import HOTKEY, ONCE, Ended, Server, is_ready
from tests.store.test_marks import backup_of, put_back
from tests.waiting import wait_until

PLATFORM = SimulatedPlatform(bytes(32))


def test_a_server_under_which_an_older_store_is_put_is_not_ready_until_an_operator_decides(
    start: Callable[..., Server],
    command: Callable[..., Ended],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_server(tmp_path, PLATFORM, int(time.time()))
    site, path = tmp_path / "server.toml", tmp_path / "keys.db"
    table = 'store = { url = "sqlite:keys.db", mark_file = "store.mark" }'
    site.write_text(site.read_text().replace('store = "sqlite:keys.db"', table))
    server = start("--config", site, ca=tmp_path / "ca.pem")
    assert command("serve", "--config", site, "--check").code == 0
    options = {"quoter": PLATFORM.quote, "ca_pem": server.ca.read_bytes(), "retry": ONCE, "log": lambda _: None}
    with BootAgent(server.url, hotkey=HOTKEY, vm_name="vm-1", **options) as agent:  # type: ignore[arg-type]
        agent.boot()
        wait_until((tmp_path / "store.mark.checkpoint").exists)  # a row tells of the start, and one of the log's key
        backup = backup_of(path)
        agent.boot()
        put_back(path, backup)
        with pytest.raises(Unavailable):
            agent.boot()
        _ = wait_until(lambda: not is_ready(server))
        said = server.stop(signal.SIGTERM).err
        assert f"{tmp_path}/store.mark did not exist; a mark of the store begins now" in said
        mark = (tmp_path / "store.mark").read_bytes()
        for words in (["serve"], ["serve", "--check"]):
            refused = command(*words, "--config", site)
            assert refused.code == 1
            for text in ("it lacks audit row 4 of", "store restored"):
                assert text in refused.err
                assert text in said
        found = command("store", "check", "--config", site, "--json")
        assert (found.code, found.json["ok"]) == (1, False)
        assert "servers refuse the store: " in found.json["mark"]
        assert "it lacks audit row 4 of" in found.json["mark"]
        assert (tmp_path / "store.mark").read_bytes() == mark
        decided = command("store", "restored", "--config", site, "--reason", "an older file", "--json")
        assert decided.code == 0, decided.err
    server = start("--config", site, ca=tmp_path / "ca.pem")
    assert is_ready(server)
    wait_until(lambda: "store is not behind it" in command("store", "check", "--config", site, "--json").json["mark"])
    assert "it lacks audit row 4 of" in server.stop(signal.SIGTERM).err  # what is lost stays in the log
    assert "no boot is granted" in command("serve", "--config", site, "--check").out
    noted = "store.mark does not exist, and the store is in use"
    assert noted not in command("serve", "--config", site, "--check").out
    (tmp_path / "store.mark").rename(tmp_path / "forgotten")
    assert noted in command("serve", "--config", site, "--check").out
    (tmp_path / "forgotten").rename(tmp_path / "store.mark")
    (tmp_path / "store.mark.checkpoint").unlink()
    monkeypatch.setattr(marks, "FIRST_CHECKPOINT_SECONDS", 0)  # the key of the log is not as old yet
    found = command("store", "check", "--config", site, "--json")
    assert "store.mark.checkpoint is missing beside the mark" in found.json["mark"]
    assert "store.mark.checkpoint is missing beside the mark" in command("serve", "--check", "--config", site).out
    rows = command("audit", "list", "--config", site, "--json").json["rows"]
    events = [row["event"] for row in rows if row["event"] != "log key made"]
    assert events[-1] == "store restored"


def test_a_command_believes_no_sealed_store_that_says_it_is_not(
    start: Callable[..., Server], command: Callable[..., Ended], tmp_path: Path
) -> None:
    """Whoever writes the database would have what he forged sealed, or written without a MAC."""
    write_server(tmp_path, PLATFORM, int(time.time()))
    site, path = tmp_path / "server.toml", tmp_path / "keys.db"
    table = 'store = { url = "sqlite:keys.db", mark_file = "store.mark" }'
    site.write_text(site.read_text().replace('store = "sqlite:keys.db"', table))
    _ = start("--config", site, ca=tmp_path / "ca.pem").stop(signal.SIGTERM)
    with closing(sqlite3.connect(path)) as attacker, attacker:
        _ = attacker.execute("UPDATE fact SET value = 0 WHERE name = 'seal'")
    for words in (["hotkey", "revoke", HOTKEY], ["store", "restored"]):
        refused = command(*words, "--config", site, "--reason", "test")
        assert refused.code == 1, words
        assert "it says that it is not sealed, and its table" in refused.err
    with closing(sqlite3.connect(path)) as attacker:
        assert attacker.execute("SELECT value FROM fact WHERE name = 'seal'").fetchall() == [(0,)]
