"""The set-up of a server that appraises GPU evidence: files of ``[gpu_evidence]``, and what a profile demands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from chutes_proto.errors import ConfigurationError
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory
from chutes_proto.io.collateral.gpu_services import GpuServices
from chutes_proto.io.http.bounded import BoundedContext
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
    assert isinstance(made.gpus, GpuCollateralDirectory)
    assert len(made.gpus.fetch().rims.rims) == 2
    assert {profile.gpu_evidence for profile in made.service.profiles.values()} == {"require"}


def test_services_are_a_source_beside_a_directory_or_without(site: Path) -> None:
    rims, ocsp = 'rim_services = ["https://rims.example"]', 'ocsp_services = ["https://ocsp.example"]'
    made = setup(site, rims, ocsp, 'cache = "gpu-cache"', 'roots = "gpus"', 'directory = "gpus"', demand="require")
    assert isinstance(made.gpus, GpuServices)
    assert made.gpus.directory == site / "gpu-cache"
    assert isinstance(made.gpus.context, BoundedContext)
    assert len(made.gpus.files().rims.rims) == 2
    assert made.service.gpu_appraisal is not None


def test_services_that_the_policy_does_not_need_are_not_asked(site: Path) -> None:
    _ = (site / "policy.toml").write_text('measurements = "unchecked"\nrevocation = "off"\n')
    made = setup(
        site, 'rim_services = ["https://rims.example"]', 'policy = "policy.toml"', 'ocsp_services = ["https://o"]'
    )
    assert isinstance(made.gpus, GpuServices)
    assert (made.gpus.rims, made.gpus.status) == (None, None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('cache = "gpu-cache"', "gpu_evidence.cache: goes with rim_services or ocsp_services"),
        ('rim_services = ["http://rims.example"]', "gpu_evidence.rim_services: .* use https"),
        ('ocsp_services = ["https://a", "https://a"]', "gpu_evidence.ocsp_services: a service is given twice"),
        ('ocsp_services = ["https://a"]\nca_file = "missing.pem"', "gpu_evidence.ca_file"),
    ],
)
def test_wrong_services_are_told(site: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        _ = setup(site, line)


def test_a_demand_needs_a_directory(site: Path) -> None:
    with pytest.raises(ConfigurationError, match=r'gpu_evidence = "require" needs gpu_evidence\.directory'):
        _ = setup(site, demand="require")


@pytest.mark.parametrize(("given", "missing"), [("rim", "ocsp"), ("ocsp", "rim")])
def test_a_demand_needs_both_kinds_of_services_that_the_policy_needs(site: Path, given: str, missing: str) -> None:
    line = f'{given}_services = ["https://services.example"]'
    with pytest.raises(ConfigurationError, match=f"needs gpu_evidence.directory, or {missing}_services"):
        _ = setup(site, line, demand="require")


def test_a_demand_needs_no_services_that_the_policy_does_not_need(site: Path) -> None:
    _ = (site / "policy.toml").write_text('revocation = "off"\n')
    made = setup(site, 'rim_services = ["https://rims.example"]', 'policy = "policy.toml"', demand="require")
    assert isinstance(made.gpus, GpuServices)


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
