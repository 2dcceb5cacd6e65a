"""RIMs and OCSP answers in a directory: they come, go and change while a server runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from chutes_proto.errors import CollateralUnavailable, ConfigurationError
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, read_gpu_roots
from chutes_proto.io.files import MAX_SIZE
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpus import gpu_files

NOW = 1_800_000_000
GPUS = SimulatedGpus(b"the GPUs of a directory's tests")


def fill(folder: Path) -> None:
    for name, data in gpu_files(GPUS, bytes(32), NOW).items():
        (folder / name).parent.mkdir(exist_ok=True)
        _ = (folder / name).write_bytes(data)


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    fill(tmp_path)
    source = GpuCollateralDirectory(tmp_path, read_gpu_roots(tmp_path))
    first = source.fetch()
    assert (len(first.rims.rims), source.problems) == (2, ())
    assert source.fetch() is first
    _ = (tmp_path / "rims" / "0.xml").write_bytes(b"<no/>")
    _ = (tmp_path / "status" / "0.der").write_bytes(b"")
    again = source.fetch()
    assert len(again.rims.rims) == 1
    assert len(again.revocation.answers) == len(first.revocation.answers) - 1
    assert [problem.split(":")[0].rpartition("/")[2] for problem in source.problems] == ["0.xml", "0.der"]
    os.truncate(tmp_path / "rims" / "0.xml", MAX_SIZE + 1)
    _ = source.fetch()
    assert source.problems[0].startswith(f"{tmp_path}/rims/0.xml: has more than {MAX_SIZE} bytes")


def test_a_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    fill(tmp_path)
    source = GpuCollateralDirectory(tmp_path, read_gpu_roots(tmp_path))
    _ = (tmp_path / "rims").rename(tmp_path / "elsewhere")
    with pytest.raises(CollateralUnavailable, match="rims"):
        _ = source.fetch()
    _ = (tmp_path / "rim-root.der").write_bytes(b"no certificate")
    with pytest.raises(ConfigurationError, match="not the certificate of a root CA"):
        _ = read_gpu_roots(tmp_path)
