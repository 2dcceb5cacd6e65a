"""A rolling upgrade: servers of the release before go on while the store is migrated, and after it."""

from __future__ import annotations

import signal
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.store import _schema
from chutes_proto.store._schema import Step
from chutes_proto.sync import BootAgent
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import HOTKEY, Ended, Server
from tests.store.test_versions import CURRENT, EXPANSION, set_release
from tests.waiting import wait_until

PLATFORM = SimulatedPlatform(bytes(32))
ONCE = RetryPolicy(attempts=1)


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An operator's directory, whose store has the schema of this release."""
    write_server(tmp_path, PLATFORM, int(time.time()))
    configuration = tmp_path / "server.toml"
    if request.param == "postgresql":
        url = request.getfixturevalue("migrated_schema")
        configuration.write_text(configuration.read_text().replace("sqlite:keys.db", url))
    make_setup(ServerConfig.load(configuration)).store.open(migrate=True).close()
    return configuration


class Load:
    """VMs that boot again and again, each request asked once only: their number, and whatever went wrong."""

    def __init__(self, server: Server) -> None:
        self.boots = 0
        self.faults: list[BaseException] = []
        self._server = server
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._boot, args=(f"vm-{number}",)) for number in range(3)]
        for thread in self._threads:
            thread.start()

    def _boot(self, vm: str) -> None:
        options: dict[str, Any] = {"quoter": PLATFORM.quote, "ca_pem": self._server.ca.read_bytes(), "retry": ONCE}
        while not self._over.is_set() and not self.faults:
            try:
                with BootAgent(self._server.url, hotkey=HOTKEY, vm_name=vm, log=lambda _: None, **options) as agent:
                    agent.boot()
                    agent.sync({"storage": True, "tdx-cache": True})
                self.boots += 1
            except Exception as exc:  # noqa: BLE001 - the test is about these
                self.faults.append(exc)

    def go_on(self) -> None:
        """Wait until more boots were granted."""
        wanted = self.boots + 6
        _ = wait_until(lambda: self.faults or self.boots >= wanted)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        assert self.faults == []


def is_ready(server: Server) -> bool:
    """As a balancer asks."""
    context = ssl.create_default_context(cafile=server.ca)
    return httpx.get(f"{server.url}/servers/nonce", verify=context).status_code == httpx.codes.OK


def test_a_server_of_the_release_before_serves_while_the_store_is_migrated(
    site: Path, start: Callable[..., Server], command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start("--config", site, ca=site.parent / "ca.pem")
    load = Load(server)
    try:
        load.go_on()
        set_release(monkeypatch, *CURRENT, EXPANSION)  # of this process, which is the operator's
        if (url := ServerConfig.load(site).store.url).startswith("postgresql:"):
            with psycopg.connect(url) as reporting:  # a reader of all tables, which the migration must wait for
                reporting.execute("SELECT count(*) FROM boot")
                ending = threading.Timer(1.5, reporting.rollback)
                ending.start()
                migrated = command("store", "migrate", "--config", site, "--json")
                ending.join()
        else:
            migrated = command("store", "migrate", "--config", site, "--json")
        assert migrated.code == 0, migrated.err
        assert migrated.json["schema_version"] == len(CURRENT) + 1
        load.go_on()
        assert is_ready(server)
    finally:
        load.end()
    server.stop(signal.SIGTERM)
    monkeypatch.undo()
    checked = command("serve", "--config", site, "--check")
    assert checked.code == 0, checked.err
    newer = f"version {len(CURRENT) + 1}, which is newer than this release's ({len(CURRENT)}) and compatible; upgrade"
    assert newer in checked.out
    assert newer in command("store", "check", "--config", site, "--json").json["note"]
    other = f"sqlite:{site.parent}/other.db"
    assert command("store", "migrate", "--store", other).code == 0
    copied = command("store", "copy", "--from", other, "--config", site)  # it might lose columns that it does not know
    assert (copied.code, newer in copied.err) == (1, True)


def test_a_server_that_a_migration_shuts_out_is_not_ready(
    site: Path, start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its probe agrees with its boots, although nobody boots there any more; and again after the way back."""
    server = start("--config", site, ca=site.parent / "ca.pem")
    assert is_ready(server)
    place = make_setup(ServerConfig.load(site)).store
    with monkeypatch.context() as newer:
        set_release(newer, *CURRENT, Step(""))
        place.open(migrate=True).close()
    _ = wait_until(lambda: not is_ready(server))
    with monkeypatch.context() as mending:
        set_release(mending, *CURRENT, Step(""), Step("", compatible_since=len(CURRENT)))
        mending.setattr(_schema, "compatible_since", lambda: len(CURRENT))
        place.open(migrate=True).close()
    _ = wait_until(lambda: is_ready(server))
    said = server.stop(signal.SIGTERM).err
    assert '"event":"store_refused","error":"store ' in said
    assert f"schema version {len(CURRENT) + 1}, and this release knows version {len(CURRENT)}" in said
    assert '"event":"store_accepted"' in said
