"""What ends is seen coming, by one rule: at the check, at the start, in the log, in the metrics, on the page."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from attrs import evolve
from trio.testing import MockClock

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.files import write_file
from chutes_proto.io.server.checking import check_ends
from chutes_proto.io.server.development import write_collateral, write_gpus, write_server
from chutes_proto.io.server.ends import DAY, EARLY, KEK_SECONDS, KINDS, End, Kind, ends_of
from chutes_proto.io.server.health import read_health
from chutes_proto.io.server.metrics import Metrics
from chutes_proto.io.server.reload import Running
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.io.server.watching import log_ends
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.log import Record
from chutes_proto.server import ServerConfig
from chutes_proto.testing._gpus import SimulatedGpus
from chutes_proto.testing._platform import COLLATERAL_SECONDS, PROFILE, SimulatedPlatform
from chutes_proto.testing.store_suite._parts import VAULT
from tests.cli import conftest
from tests.cli.conftest import Ended

command = conftest.command

PLATFORM = SimulatedPlatform(bytes(32))
NOW = int(time.time())


def set_up(folder: Path, lines: str = "") -> ServerSetup:
    configuration = folder / "server.toml"
    if not configuration.exists():
        write_server(folder, PLATFORM, NOW)
    _ = configuration.write_text(configuration.read_text() + lines)
    return make_setup(ServerConfig.load(configuration))


def states(setup: ServerSetup, now: int) -> dict[Kind, str]:
    return {each.kind: each.state(now) for each in ends_of(setup, now)}


@pytest.mark.parametrize("kind", KINDS)
def test_one_rule_says_when_an_end_is_near(kind: Kind) -> None:
    early = EARLY[kind]
    end = End(kind, "name", 0, 10 * early, "do this")
    outcomes = [end.state(at) for at in (0, end.end - early - 1, end.end - early, end.end - 1, end.end)]
    assert outcomes == ["ok", "ok", "note", "note", "problem" if kind == "certificate" else "note"]
    short = evolve(end, end=6 * DAY)  # a certificate that is renewed every few days would be noted all the time
    assert [short.state(at) for at in (0, 4 * DAY - 1, 4 * DAY)] == ["ok", "ok", "note"]
    assert evolve(short, begin=None).state(0) == ("note" if early > 6 * DAY else "ok")
    assert [end.finding(at).remedy for at in (0, end.end)] == ["", "do this"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate_that_is_not_valid_yet_names_the_clock(kind: Kind) -> None:
    """As on a server whose clock is behind, in `serve --check`, `doctor`, the log and the metrics alike."""
    found = End(kind, "server.pem", NOW + 3600, NOW + 90 * DAY, "do this").finding(NOW)
    expected = {"certificate": "problem", "admin_certificate": "note"}
    assert found.state == expected.get(kind, "ok")
    assert ("is valid from" in found.detail) == (kind in expected) == found.detail.endswith("is the clock right?")
    assert found.remedy == ("do this" if kind in expected else "")


def test_collateral_that_ends_within_a_day_warns(tmp_path: Path, command: Callable[..., Ended]) -> None:
    setup = set_up(tmp_path)
    write_collateral(tmp_path / "collateral", PLATFORM, NOW - COLLATERAL_SECONDS + DAY - 60)
    checked = command("serve", "--config", tmp_path / "server.toml", "--check")
    assert checked.code == 0
    assert re.search(
        r"collateral: \S+ \(\S+\.json\) expires in 2[0-3] hours, at .*; run chutes-proto coll", checked.out
    )
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
        health = read_health(setup, store)
    metrics = Metrics()
    metrics.show(health)
    ask = metrics.registry.get_sample_value
    assert [ask("chutes_proto_check", {"check": kind}) for kind in ("collateral", "certificate")] == [1, 0]
    newer = tmp_path / "collateral" / "newer.json"
    write_file(newer, PLATFORM.collateral_json(NOW))  # the older file beside it is of no matter now
    assert states(setup, NOW)["collateral"] == "ok"


def test_collateral_of_services_counts_and_at_a_check_what_they_kept(tmp_path: Path) -> None:
    _ = set_up(tmp_path)
    text = (tmp_path / "server.toml").read_text()
    services = 'collateral = { upstreams = ["https://127.0.0.1:1"], cache = "collateral" }'
    _ = (tmp_path / "server.toml").write_text(text.replace('collateral = { directory = "collateral" }', services))
    setup = set_up(tmp_path)
    source = setup.collateral
    assert isinstance(source, UpstreamCollateral)
    near = NOW + COLLATERAL_SECONDS - DAY
    assert "collateral" not in states(setup, near)
    (kept,) = [each for each in ends_of(setup, near, kept=True) if each.kind == "collateral"]
    _ = source.restore(NOW)
    (fetched,) = [each for each in ends_of(setup, near) if each.kind == "collateral"]
    assert (fetched.name, fetched.end, fetched.state(near)) == (kept.name, kept.end, "note")


def test_the_age_of_the_kek_and_the_end_of_a_profile_are_told(tmp_path: Path) -> None:
    setup = set_up(tmp_path, "[schedule.simulated]\nnot_before = 2026-01-01\nnot_after = 2099-01-01\n")
    os.utime(tmp_path / "kek", (NOW, made := NOW - KEK_SECONDS + DAY))
    found = {each.kind: each for each in ends_of(setup, NOW)}
    assert (found["kek"].begin, found["kek"].state(NOW), found["profile"].state(NOW)) == (made, "note", "ok")
    assert found["kek"].finding(NOW + 2 * DAY).state == "note"  # it is due, and it works
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
        health = read_health(setup, store)
    metrics = Metrics()
    metrics.show(health)
    kek, ask = {"kek": setup.service.vault.current.kek_id}, metrics.registry.get_sample_value
    assert ask("chutes_proto_kek_created_timestamp_seconds", kek) == made
    profile = {"profile": "simulated 1"}
    assert ask("chutes_proto_profile_ends_timestamp_seconds", profile) == found["profile"].end
    assert {each.kind: each.state(NOW) for each in health.ends} == states(setup, NOW)


def test_signers_of_rims_and_answers_about_gpus_are_told(tmp_path: Path) -> None:
    _ = set_up(tmp_path)
    write_gpus(tmp_path, SimulatedGpus(bytes(32), count=2), NOW, demand="record")
    setup = set_up(tmp_path)
    found = {each.kind: each for each in ends_of(setup, NOW)}
    assert (found["gpu_rim"].state(NOW), found["gpu_status"].state(NOW)) == ("ok", "ok")
    assert "OCSP answer about certificate " in found["gpu_status"].name
    grace = 31_536_000
    write_file(tmp_path / "gpus" / "policy.toml", b"")
    assert {each.kind: each.end for each in ends_of(set_up(tmp_path), NOW)}["gpu_status"] == (
        found["gpu_status"].end - grace
    )
    write_file(tmp_path / "gpus" / "policy.toml", b'revocation = "off"')
    assert "gpu_status" not in states(set_up(tmp_path), NOW)
    assert "gpu_rim" in {finding.what for finding in check_ends(setup)}


@pytest.mark.parametrize(
    ("years", "told"),
    [(-20, "expired at .*; replace it"), (20, "is not valid before .*; wait until then, or set the clock right")],
)
def test_a_certificate_that_is_not_valid_now_stops_the_check_and_the_start(
    years: int, told: str, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    _ = set_up(tmp_path)
    other = make_server_identity(NOW + years * 365 * DAY, bytes(32))
    write_file(tmp_path / "server.pem", other.chain_pem)
    write_file(tmp_path / "server.key", other.key_pem.reveal(), mode=0o600)
    with pytest.raises(ConfigurationError, match=rf"tls: .*server\.pem: {told}"):
        _ = set_up(tmp_path)
    for words in (["--check"], [], ["--workers", "2"]):
        ended = command("serve", "--config", tmp_path / "server.toml", *words)
        assert ended.code == 1, words
        assert re.search(rf"server\.pem: {told}", ended.err), words


def test_the_end_of_a_profile_is_seen_coming(tmp_path: Path) -> None:
    assert "profile" not in [finding.what for finding in check_ends(set_up(tmp_path))]
    soon = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 5 * DAY))
    (found,) = [
        one for one in check_ends(set_up(tmp_path, f"[schedule.simulated]\nnot_after = {soon}\n")) if "prof" in one.what
    ]
    assert (found.state, re.search(f"simulated 1 ends in .*, at {soon}", found.detail) is not None) == ("note", True)
    given = (tmp_path / "server.toml").read_text().replace(soon, "2026-01-01")
    _ = (tmp_path / "server.toml").write_text(given)
    told = {one.what: one.state for one in check_ends(set_up(tmp_path))}
    assert (told["profiles"], told["profile"]) == ("problem", "note")
    with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
        health = read_health(set_up(tmp_path), store)
    assert [one.detail for one in health.findings if one.state == "problem"] == [
        "none counts now, so no VM is granted; change their schedule"
    ]


def test_a_minimum_version_that_no_profile_has_is_a_problem(tmp_path: Path) -> None:
    """Two profiles are older than it; of one that is not, its schedule has not begun."""
    set_up(tmp_path)
    texts = [PROFILE.to_toml(), evolve(PROFILE, name="older", mrtd=bytes(48), version="0.9").to_toml()]
    newest = f"{evolve(PROFILE, mrtd=b'2' * 48, version='2').to_toml()}not_before = 2199-01-01\n"
    _ = (tmp_path / "measurements.toml").write_text("".join([*texts, newest]))
    text = (tmp_path / "server.toml").read_text()
    for version, told in (
        ("1", []),
        (
            "1.0.1",
            ["none that counts now has minimum_version 1.0.1, so no VM is granted; lower it, or load newer ones"],
        ),
    ):
        _ = (tmp_path / "server.toml").write_text(f'minimum_version = "{version}"\n{text}')
        setup = set_up(tmp_path)
        assert [one.detail for one in check_ends(setup) if one.state == "problem"] == told
        with closing(SqliteStore(tmp_path / "keys.db", vault=VAULT)) as store:
            problems = [one.detail for one in read_health(setup, store).findings if one.state == "problem"]
        assert problems == told


@pytest.mark.trio
async def test_the_log_has_it_at_the_start_and_every_day(tmp_path: Path, autojump_clock: MockClock) -> None:
    running = Running(set_up(tmp_path))
    os.utime(tmp_path / "kek", (NOW, NOW - KEK_SECONDS))
    told: list[tuple[float, Record]] = []
    with trio.CancelScope() as scope:

        def log(record: Record) -> None:
            told.append((trio.current_time(), record))
            if len(told) == 3:
                scope.cancel()

        await log_ends(running, log)
    assert {(record.event, record.fields["what"]) for _, record in told} == {("expires", "kek")}
    times = [at for at, _ in told]
    assert [round((later - earlier) / DAY) for earlier, later in pairwise(times)] == [1, 1]
