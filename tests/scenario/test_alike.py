"""Two servers with different configuration on one store: warned of or refused, by a setting of the one that starts."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from chutes_proto.io.files import write_file
from tests.cli.conftest import end, start_server
from tests.scenario.premises import Premises
from tests.waiting import wait_until


@pytest.mark.parametrize("premises", ["sqlite"], indirect=True)
def test_servers_that_differ_are_warned_of_or_refused(premises: Premises) -> None:
    premises.start()

    def is_noted() -> bool:
        with closing(sqlite3.connect(premises.directory / "keys.db")) as store:
            return bool(store.execute("SELECT count(*) FROM key_server").fetchone()[0])

    _ = wait_until(is_noted)
    other = premises.directory / "other.toml"
    text = premises.configuration.read_text().replace('store = "sqlite:keys.db"', STORE)

    def write(more: str, action: str) -> None:
        write_file(other, f"{more}\n{text.replace('ACTION', action)}".encode(), mode=0o600)

    write("", "refuse")
    assert premises.run("serve", "--config", other, "--check").code == 0
    write("netuid = 65", "refuse")
    said = "another value of netuid"
    for words in (("serve", "--check"), ("doctor",)):
        checked = premises.run(*words, "--config", other)
        told = " ".join((checked.out + checked.err).split())
        assert (checked.code, said in told, "make them equal" in told) == (1, True, True), told
        assert "run make" not in told.replace("run: ", "run ")
    refused = premises.run("serve", "--config", other)
    assert refused.code == 1
    assert said in refused.err
    assert "make them equal" in refused.err
    write("netuid = 65", "warn")
    checked = premises.run("serve", "--config", other, "--check")
    told = " ".join(checked.out.split())
    assert (checked.code, said in told, "make them equal" in told, '"warn"' in told) == (0, True, True, False)
    log = premises.directory.with_name("other.log")
    with log.open("w") as file:
        server = start_server("--config", other, ca=premises.ca, stderr=file)
    _ = wait_until(lambda: said in log.read_text())
    end(server.process)
    premises.stop()


STORE = 'store = { url = "sqlite:keys.db", different_configuration = "ACTION" }'
