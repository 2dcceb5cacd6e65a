"""What ends is seen coming: certificates and profiles, at the check and at the start."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import write_file
from chutes_proto.io.server.checking import check_ends
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform

DAY = 86_400


def set_up(folder: Path, lines: str = "") -> ServerSetup:
    configuration = folder / "server.toml"
    if not configuration.exists():
        write_server(folder, SimulatedPlatform(bytes(32)), int(time.time()))
    _ = configuration.write_text(f"{configuration.read_text()}{lines}")
    return make_setup(ServerConfig.load(configuration))


def test_a_certificate_that_has_expired_stops_the_start(tmp_path: Path) -> None:
    _ = set_up(tmp_path)
    old = make_server_identity(int(time.time()) - 20 * 365 * DAY, bytes(32))
    write_file(tmp_path / "server.pem", old.chain_pem)
    write_file(tmp_path / "server.key", old.key_pem.reveal(), mode=0o600)
    with pytest.raises(ConfigurationError, match=r"tls: .*server\.pem: expired at .*; replace it"):
        _ = set_up(tmp_path)


def test_the_end_of_a_profile_is_seen_coming(tmp_path: Path) -> None:
    assert "profile" not in [finding.what for finding in check_ends(set_up(tmp_path))]
    soon = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 5 * DAY))
    (found,) = [
        one for one in check_ends(set_up(tmp_path, f"[schedule.simulated]\nnot_after = {soon}\n")) if "prof" in one.what
    ]
    assert (found.state, f"simulated 1 ends at {soon}" in found.detail) == ("note", True)
    given = (tmp_path / "server.toml").read_text().replace(soon, "2026-01-01")
    _ = (tmp_path / "server.toml").write_text(given)
    states = {one.what: one.state for one in check_ends(set_up(tmp_path))}
    assert (states["profiles"], states["profile"]) == ("problem", "note")
