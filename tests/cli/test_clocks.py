"""A wrong clock: it is told at once, stops nobody else, and a command mends what it left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from chutes_proto.errors import Unavailable
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.health import read_health
from chutes_proto.io.server.setup import make_setup
from chutes_proto.io.stores.postgres import PostgresStore
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import SetHorizon
from chutes_proto.store._run import Ask
from chutes_proto.sync import BootAgent
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import HOTKEY, ONCE, Ended, Server, is_ready
from tests.postgres import replace_now, schema_with_clock
from tests.waiting import wait_until

PLATFORM = SimulatedPlatform(bytes(32))
DAY = 86_400


def write_site(folder: Path, store: str) -> Path:
    write_server(folder, PLATFORM, int(time.time()))
    configuration = folder / "server.toml"
    configuration.write_text(configuration.read_text().replace("sqlite:keys.db", store))
    return configuration


def test_a_check_notes_a_clock_before_the_store_is_refused_for_it(database: str, tmp_path: Path) -> None:
    with schema_with_clock(database) as (url, _), psycopg.connect(url, autocommit=True) as connection:
        replace_now(connection, "clock_timestamp()")
        setup = make_setup(ServerConfig.load(write_site(tmp_path, url)))
        with closing(PostgresStore(url, make=True, vault=setup.service.vault)) as store:
            for apart, states in (0, ("ok", "ok")), (4, ("ok", "note")), (60, ("problem", "note")):
                replace_now(connection, f"clock_timestamp() - {apart} * interval ''1 s''")
                health = read_health(setup, store)
                found = {finding.what: finding.state for finding in health.findings}
                assert (found["store"], found["clock"]) == states
                assert health.clock_skew in (apart, apart + 1)


def test_a_server_whose_clock_differs_from_the_databases_is_not_ready_until_it_does_not(
    database: str, start: Callable[..., Server], command: Callable[..., Ended], tmp_path: Path
) -> None:
    with schema_with_clock(database) as (url, _), psycopg.connect(url, autocommit=True) as connection:
        replace_now(connection, "clock_timestamp()")
        PostgresStore(url, make=True).close()
        site = write_site(tmp_path, url)
        server = start("--config", site, ca=tmp_path / "ca.pem")
        options = {"quoter": PLATFORM.quote, "ca_pem": server.ca.read_bytes(), "retry": ONCE, "log": lambda _: None}
        with BootAgent(server.url, hotkey=HOTKEY, vm_name="vm-1", **options) as agent:  # type: ignore[arg-type]
            agent.boot()
            assert is_ready(server)
            replace_now(connection, "clock_timestamp() - interval ''1 day''")
            _ = wait_until(lambda: not is_ready(server))
            with pytest.raises(Unavailable):
                agent.boot()
            for words in (["serve"], ["serve", "--check"], ["store", "restored"]):
                refused = command(*words, "--config", site)
                assert (refused.code, "the database's clock says" in refused.err) == (1, True), refused
            replace_now(connection, "clock_timestamp()")
            _ = wait_until(lambda: is_ready(server))
            agent.boot()
        said = server.stop(signal.SIGTERM).err
    assert [said.count(f'"event":"{event}"') for event in ("store_refused", "store_accepted")] == [1, 1]


@pytest.mark.parametrize("ahead", [30, 3 * DAY])
def test_a_horizon_in_the_future_is_told_at_the_check_and_at_the_start(
    start: Callable[..., Server], command: Callable[..., Ended], tmp_path: Path, ahead: int
) -> None:
    """A file has no clock of its own, so the machine's may have moved the horizon wrongly. One command mends it."""
    site = write_site(tmp_path, "sqlite:keys.db")
    with closing(make_setup(ServerConfig.load(site)).store.open()) as store:
        store.transact(Ask(SetHorizon(int(time.time()) + ahead)))
    checked = command("serve", "--config", site, "--check")
    told = checked.err if ahead > DAY else checked.out
    assert checked.code == (1 if ahead > DAY else 0)
    assert "store: no boot is granted: all nonces issued until" in told
    assert "`chutes-proto store restored`" in told
    server = start("--config", site, ca=tmp_path / "ca.pem")
    said = server.stop(signal.SIGTERM).err
    assert '"event":"warning","about":"store: no boot is granted: all nonces issued until' in said
    mended = command("store", "restored", "--config", site, "--json").json
    assert mended["nonce_horizon"] < mended["nonce_horizon_before"] or ahead < DAY
    again = command("serve", "--config", site, "--check")
    assert (again.code, "as after `chutes-proto store restored`" in again.out) == (0, True)
