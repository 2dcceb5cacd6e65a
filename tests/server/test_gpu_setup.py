"""The set-up of a server that appraises GPU evidence: files of ``[gpu_evidence]``, and what a profile demands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.development import CONFIGURATION, write_server
from chutes_proto.io.server.setup import ServerSetup, make_setup
from chutes_proto.server import ServerConfig
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpus import gpu_files
from tests.server.world import PLATFORM

GPUS = SimulatedGpus(b"the GPUs of a set-up's tests")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    now = int(time.time())
    write_server(tmp_path, PLATFORM, now)
    for name, data in gpu_files(GPUS, bytes(32), now).items():
        (tmp_path / "gpus" / name).parent.mkdir(parents=True, exist_ok=True)
        _ = (tmp_path / "gpus" / name).write_bytes(data)
    return tmp_path


def setup(site: Path, *lines: str, demand: str = "record") -> ServerSetup:
    path = site / CONFIGURATION
    defaults = f'gpu_evidence = "{demand}"\n'
    text = path.read_text()
    assert "[profile_defaults]" in text
    text = text.replace("[profile_defaults]\n", f"[profile_defaults]\n{defaults}", 1)
    _ = path.write_text(text + "\n[gpu_evidence]\n" + "\n".join(lines) + "\n")
    return make_setup(ServerConfig.load(path))


def test_a_server_that_appraises_starts(site: Path) -> None:
    _ = (site / "policy.toml").write_text('min_driver = "550.0"\n')
    made = setup(site, 'directory = "gpus"', 'policy = "policy.toml"', 'roots = "gpus"', demand="require")
    assert made.service.gpu_appraisal is not None
    assert made.service.gpu_appraisal.policy.min_driver == "550.0"
    assert made.service.gpu_appraisal.roots.device == GPUS.roots.device
    assert made.gpu_source is not None
    assert len(made.gpu_source().rims.rims) == 2
    assert {profile.gpu_evidence for profile in made.service.profiles.values()} == {"require"}


def test_a_demand_needs_a_directory(site: Path) -> None:
    with pytest.raises(ConfigurationError, match=r'gpu_evidence = "require" needs gpu_evidence\.directory'):
        _ = setup(site, demand="require")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('directory = "missing"', "gpu_evidence.directory"),
        ('roots = "rims"', "gpu_evidence.roots"),
        ('policy = "measurements.toml"', "gpu_evidence.policy"),
    ],
)
def test_a_wrong_file_is_named(site: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        _ = setup(site, line)
