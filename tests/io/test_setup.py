"""The set-up that a configuration makes: what is read from files, and what is said of files that are wrong."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.collateral.upstream import UpstreamCollateral
from chutes_proto.io.http.bounded import BoundedContext
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform
from tests.cli.conftest import HOTKEY
from tests.quote.test_published import FLAT

OTHER = "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"


def set_up(folder: Path, *lines: str) -> ServerSetup:
    write_server(folder, SimulatedPlatform(bytes(32)), int(time.time()))
    configuration = folder / "server.toml"
    _ = configuration.write_text("\n".join(lines) + "\n" + configuration.read_text())
    return make_setup(ServerConfig.load(configuration))


def test_each_listener_has_its_certificate(tmp_path: Path) -> None:
    plain = set_up(tmp_path, 'control = "control"', 'admin.unix = "admin"')
    assert plain.admin_tls is None
    names = 'certificate = "server.pem", key = "server.key", client_ca = "ca.pem"'
    other = tmp_path / "other"
    other.mkdir()
    assert set_up(other, f'admin = {{ listen = "0.0.0.0:0", {names} }}').admin_tls is not None


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('minimum_version = "newest"', "so it cannot be compared"),
        ('policy = "policy.toml"', "policy: .*policy.toml: cannot be read"),
        (f'control = "{"x" * 200}"', "control: "),
        (f'admin.unix = "{"x" * 200}"', "admin.unix: "),
        (f'proxy = [{{ name = "front", unix = "{"x" * 200}" }}]', "proxy.unix: "),
    ],
)
def test_a_setting_that_is_wrong_is_named(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        _ = set_up(tmp_path, line)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("root_pasphrase", r"root_pasphrase: unknown key, .*; did you mean root_passphrase\?"),
        ("name", "name: unknown key, or one that has no default"),
    ],
)
def test_a_default_of_no_profile_is_named_where_it_stands(tmp_path: Path, key: str, problem: str) -> None:
    """And not in the files of measurements, which lack it."""
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    configuration = tmp_path / "server.toml"
    given = configuration.read_text()
    _ = configuration.write_text(given.replace("[profile_defaults]\n", f'[profile_defaults]\n{key} = "vm"\n'))
    with pytest.raises(ConfigurationError, match=rf"^{re.escape(str(configuration))}: profile_defaults\.{problem}$"):
        _ = make_setup(ServerConfig.load(configuration))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[tcb]\nplatform_grace = 1", "tcb.platform_grace: goes with an OutOfDate status"),
        ('measurements = "unchecked"', "measurements: the reference values come from elsewhere"),
        ("[per_profile.simulatd]\ntcb.allow_smt = true", "per_profile.'simulatd': .* did you mean 'simulated'"),
        ("[per_profile.'x 1']\ntcb.allow_smt = true", "per_profile.'x 1': .* correct it, or remove it"),
        ("[per_hotkey.abc]\ntcb.allow_smt = true", "per_hotkey: 'abc' is not a hotkey"),
        (f"[per_hotkey.{OTHER}]\ntcb.allow_smt = true", "is not among hotkeys; add it there"),
    ],
)
def test_a_policy_that_is_not_this_servers_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    _ = (tmp_path / "policy.toml").write_text(text)
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    configuration = tmp_path / "server.toml"
    given = configuration.read_text().replace('hotkeys = "*"', f'hotkeys = ["{HOTKEY}"]\npolicy = "policy.toml"')
    _ = configuration.write_text(given)
    with pytest.raises(ConfigurationError, match=problem):
        _ = make_setup(ServerConfig.load(configuration))


def test_a_release_candidate_that_nobody_may_use_is_told_and_not_loaded(tmp_path: Path) -> None:
    write_server(tmp_path, SimulatedPlatform(bytes(32)), int(time.time()))
    configuration = tmp_path / "server.toml"
    _ = (tmp_path / "published.yaml").write_text(FLAT)
    given = configuration.read_text()
    _ = configuration.write_text(re.sub(r"(?m)^measurements = \[.*\]$", 'measurements = ["published.yaml"]', given))
    loaded = make_setup(ServerConfig.load(configuration))
    assert {version for _, version in loaded.service.profiles} == {"1.10", "1.11"}
    _ = (tmp_path / "published.yaml").write_text(FLAT.replace("    authorized_hotkeys: [5Grw]\n", ""))
    others = make_setup(ServerConfig.load(configuration))
    assert {version for _, version in others.service.profiles} == {"1.10"}
    assert others.not_served == (f"{tmp_path / 'published.yaml'}: 8xh200 1.11: rc without authorized_hotkeys",)


def test_the_policy_says_how_long_expired_collateral_is_used(tmp_path: Path) -> None:
    _ = (tmp_path / "policy.toml").write_text("[tcb]\ncollateral_grace = 60\n[attributes]\nunsafe_allow_debug = true")
    made = set_up(tmp_path, 'policy = "policy.toml"')
    assert made.service.policies.collateral_grace == 60
    assert any("unsafe_allow_debug" in warning for warning in made.warnings)
    given = (tmp_path / "server.toml").read_text().replace('"collateral" }', '"collateral", grace_seconds = 1 }')
    _ = (tmp_path / "server.toml").write_text(given)
    with pytest.raises(ConfigurationError, match=r"says this, as tcb\.collateral_grace"):
        _ = ServerConfig.load(tmp_path / "server.toml")


def test_a_service_of_collateral_is_bounded_in_its_bytes(tmp_path: Path) -> None:
    _ = set_up(tmp_path)
    given = (tmp_path / "server.toml").read_text()
    given = re.sub(r"(?m)^collateral = .*$", 'collateral = { upstreams = ["https://pccs.example"] }', given)
    _ = (tmp_path / "server.toml").write_text(given)
    made = make_setup(ServerConfig.load(tmp_path / "server.toml"))
    assert isinstance(made.collateral, UpstreamCollateral)
    assert isinstance(made.collateral.context, BoundedContext)
