"""The set-up that a configuration makes: what is read from files, and what is said of files that are wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.development import write_server
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import SimulatedPlatform


def set_up(folder: Path, *lines: str) -> ServerSetup:
    write_server(folder, SimulatedPlatform(bytes(32)), int(time.time()))
    configuration = folder / "server.toml"
    _ = configuration.write_text("\n".join(lines) + "\n" + configuration.read_text())
    return make_setup(ServerConfig.load(configuration))


def test_certificates_are_read_again_for_each_listener(tmp_path: Path) -> None:
    plain = set_up(tmp_path, 'takeover = "door"', 'admin.unix = "admin"')
    assert plain.reload_tls() is not plain.tls
    assert plain.reload_admin_tls() is None
    names = 'certificate = "server.pem", key = "server.key", client_ca = "ca.pem"'
    other = tmp_path / "other"
    other.mkdir()
    assert set_up(other, f'admin = {{ listen = "0.0.0.0:0", {names} }}').reload_admin_tls() is not None


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('minimum_version = "newest"', "so it cannot be compared"),
        (f'takeover = "{"x" * 200}"', "takeover: "),
        (f'admin.unix = "{"x" * 200}"', "admin.unix: "),
        (f'proxy.unix = "{"x" * 200}"', "proxy.unix: "),
    ],
)
def test_a_setting_that_is_wrong_is_named(tmp_path: Path, line: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        _ = set_up(tmp_path, line)
