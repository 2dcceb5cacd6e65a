"""Two servers with different configuration on one store: the one that starts warns of it."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from chutes_proto.io.files import write_file
from tests.cli.conftest import end, start_server
from tests.scenario.premises import Premises
from tests.waiting import wait_until


@pytest.mark.parametrize("premises", ["sqlite"], indirect=True)
def test_servers_that_differ_are_warned_of(premises: Premises) -> None:
    premises.start()

    def is_noted() -> bool:
        with closing(sqlite3.connect(premises.directory / "keys.db")) as store:
            return bool(store.execute("SELECT count(*) FROM key_server").fetchone()[0])

    _ = wait_until(is_noted)
    other = premises.directory / "other.toml"
    write_file(other, f"netuid = 65\n{premises.configuration.read_text()}".encode(), mode=0o600)
    said = "another value of netuid"
    checked = premises.run("serve", "--config", other, "--check")
    told = " ".join(checked.out.split())
    assert (checked.code, said in told, "make them equal" in told) == (0, True, True)
    log = premises.directory.with_name("other.log")
    with log.open("w") as file:
        server = start_server("--config", other, ca=premises.ca, stderr=file)
    _ = wait_until(lambda: said in log.read_text())
    end(server.process)
    premises.stop()
