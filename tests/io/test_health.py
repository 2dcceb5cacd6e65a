"""What a check of a server finds, at several times."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chutes_proto.io.server.admin import Admin
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.health import Health, read_counts, read_health
from chutes_proto.io.server.metrics import Metrics
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.server import ServerConfig
from chutes_proto.server._app import App
from chutes_proto.store._rows import SetHorizon
from chutes_proto.store._run import Ask
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT, boot

DAY = 86_400


@pytest.fixture
def setup(tmp_path: Path) -> ServerSetup:
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    return make_setup(ServerConfig.load(tmp_path / "server.toml"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as opened:
        yield opened


def states(health: Health) -> dict[str, str]:
    return {finding.what: finding.state for finding in health.findings}


def has_problem(health: Health) -> bool:
    return "problem" in states(health).values()


def test_a_certificate_is_noted_before_it_ends_and_a_problem_afterwards(setup: ServerSetup, store: SqliteStore) -> None:
    (certificate,) = read_health(setup, store).ends_of("certificate")
    end = certificate.end
    for at, state in ((end - 60 * DAY, "ok"), (end - DAY, "note"), (end, "problem"), (0, "problem")):
        health = read_health(setup, store, at)
        assert (states(health)["certificate"], has_problem(health)) == (state, state == "problem")


def test_a_sink_that_does_not_take_audit_rows_is_noted(setup: ServerSetup, store: SqliteStore) -> None:
    store.copies.failing["audit.file: audit.jsonl"] = 0, 1
    health = read_health(setup, store)
    assert (states(health)["store"], has_problem(health)) == ("note", False)
    assert health.findings[0].detail == "audit rows are not copied: audit.file: audit.jsonl"


def test_a_certificate_that_cannot_be_read_again_is_noted(setup: ServerSetup, store: SqliteStore) -> None:
    path = Path(setup.base, setup.config.tls.certificate)
    for spoil in (lambda: path.write_text("no certificate"), path.unlink, lambda: os.mkfifo(path)):
        spoil()
        health = read_health(setup, store)
        assert (states(health)["certificate"], has_problem(health)) == ("note", False)


def test_a_certificate_that_was_renewed_and_not_loaded_does_not_hide_the_end_of_the_loaded_one(
    setup: ServerSetup, store: SqliteStore
) -> None:
    (certificate,) = read_health(setup, store).ends_of("certificate")
    write_server(setup.base, SimulatedPlatform(bytes(32)), int(time.time()))
    for at, state in ((None, "note"), (certificate.end, "problem")):
        (told,) = [each for each in read_health(setup, store, at).findings if each.what == "certificate"]
        assert (told.state, "server.pem is not the loaded one" in told.detail) == (state, True)
        assert told.remedy == f"chutes-proto reload --config {setup.config.path}"


def test_collateral_that_has_expired_is_named(setup: ServerSetup, store: SqliteStore) -> None:
    now = read_health(setup, store)
    assert states(now)["collateral"] == "ok"
    (family,) = now.ends_of("collateral")
    for at in (family.end - DAY, family.end + 1):
        later = read_health(setup, store, at)
        (told,) = [finding for finding in later.findings if finding.what == "collateral"]
        assert (told.state, family.name in told.detail, has_problem(later)) == ("note", True, False)


def test_a_store_that_cannot_be_asked_is_a_problem(setup: ServerSetup, store: SqliteStore) -> None:
    remedy = f"chutes-proto store check --config {setup.config.path}"
    setup.service.readiness.fault = "it lacks audit row 7"
    told = read_health(setup, store).findings[0]
    assert (told.what, told.state, told.remedy) == ("store", "problem", remedy)
    setup.service.readiness.fault = None
    store.close()
    told = read_health(setup, store).findings[0]
    assert (told.what, told.state, told.remedy) == ("store", "problem", remedy)


@pytest.mark.parametrize(("ahead", "state"), [(60, "note"), (30 * DAY, "problem")])
def test_a_store_that_redeems_no_nonce_is_told(setup: ServerSetup, store: SqliteStore, ahead: int, state: str) -> None:
    """As for the minute after a restore; or because a clock was ahead, which ends when somebody mends it."""
    now = int(time.time())
    store.transact(Ask(SetHorizon(now + ahead)))
    told = read_health(setup, store, now).findings[0]
    assert (told.what, told.state) == ("store", state)
    assert told.detail.startswith("no boot is granted: all nonces issued until ")
    assert states(read_health(setup, store, now + ahead + 1))["store"] == "ok"


def test_a_look_that_does_not_end_is_a_problem(
    setup: ServerSetup, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that hangs answers nothing, and so the last state that is known would be shown for ever."""
    admin = Admin(Running(setup), store, App(setup.service), Metrics(), lambda _: None)
    assert [one.what for one in admin._findings()] == ["checks"]  # before the first look
    admin._health = read_health(setup, store)
    assert "checks" not in [one.what for one in admin._findings()]
    later = time.monotonic() + 31
    monkeypatch.setattr("time.monotonic", lambda: later)
    last = admin._findings()[-1]
    assert (last.what, last.state) == ("checks", "problem")
    assert last.detail.startswith("the last look began 31 s ago")


def test_rows_are_counted(store: SqliteStore) -> None:
    assert (read_counts(store).audit_position, read_counts(store).states) == (0, {})
    store.transact(boot("1"))
    counts = read_counts(store)
    assert (counts.audit_position > 0, sum(counts.states.values()), sum(counts.sealed.values())) == (True, 1, 1)


class Odd(SqliteStore):
    """A store with less replication than it should have."""

    @property
    def replication_warning(self) -> str:
        return "store: no standby confirms a commit"


def test_a_clock_that_differs_and_a_standby_that_lacks_are_noted(setup: ServerSetup, tmp_path: Path) -> None:
    with closing(Odd(tmp_path / "odd.db")) as odd:
        odd.clock_skew = -61
        found = {finding.what: finding for finding in read_health(setup, odd).findings}
    assert (found["store"].state, found["store"].detail) == ("note", "no standby confirms a commit")
    assert (found["clock"].state, found["clock"].detail) == ("note", "-61 s beside the database's")
    assert found["clock"].remedy.startswith("chronyc")


def test_a_late_log_is_noted_while_it_is_late(setup: ServerSetup, store: SqliteStore) -> None:
    for warning in ("the audit log is late", ""):
        store.log_warning = warning
        (found,) = (finding for finding in read_health(setup, store).findings if finding.what == "store")
        assert (found.state == "note", found.detail == warning) == (bool(warning), bool(warning))


def test_collateral_that_cannot_be_used_is_noted(setup: ServerSetup, store: SqliteStore) -> None:
    folder = setup.base / "collateral"
    _ = (folder / "000000000000.json").write_text("{}")
    (told,) = [finding for finding in read_health(setup, store).findings if finding.what == "collateral"]
    assert (told.state, told.remedy.endswith(f"--out {folder}")) == ("note", True)
    shutil.rmtree(folder)
    health = read_health(setup, store)
    assert (states(health)["collateral"], health.ends_of("collateral")) == ("note", ())
