"""``chutes-proto gpu``: exit codes and JSON, on simulated GPUs and on NVIDIA's evidence."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpus import gpu_files
from tests.cli.conftest import Ended
from tests.collateral.test_gpu_services import GPUS as ON_A_NETWORK
from tests.collateral.test_gpu_services import serving
from tests.collateral.test_gpus import by_serial
from tests.gpu.vectors import ABSENT, GPU

NOW = 1_800_000_000
NONCE = bytes(range(32))
GPUS = SimulatedGpus(b"the world of the command's tests", count=2)


@pytest.fixture
def verify(tmp_path: Path, command: Callable[..., Ended]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Verify the evidence of a machine with these faults; each option given again replaces the usual one."""

    def run(*faults: str, **options: str) -> tuple[int, dict[str, Any]]:
        for name, data in gpu_files(GPUS.having(*faults), NONCE, NOW).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            _ = (tmp_path / name).write_bytes(data)
        usual = {"rim": f"{tmp_path}/rims", "revocation": f"{tmp_path}/status", "roots": str(tmp_path), "at": str(NOW)}
        words = [f"--{name}={value}" for name, value in {**usual, **options}.items() if value]
        ended = command("gpu", "verify", f"{tmp_path}/evidence.json", *words, "--json")
        return ended.code, json.loads(ended.out) if ended.out else {}

    return run


def test_accepted_evidence_says_what_was_checked(verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, report = verify(nonce=NONCE.hex(), count="2")
    assert (code, report["accepted"], report["nonce"], report["revocation"]) == (0, True, "checked", "checked")
    assert [gpu["error"] for gpu in report["gpus"]] == [None, None]
    assert report["gpus"][0]["steps"][-1] == 32
    code, report = verify(rim="none", revocation="off")
    assert (code, report["measurements"], report["revocation"]) == (0, "unchecked", "unchecked")
    assert [gpu["reference"] for gpu in report["gpus"]] == ["unchecked", "unchecked"]


@pytest.mark.parametrize(
    ("options", "expected", "remedy"),
    [
        ({"nonce": "00" * 32}, "nonce_mismatch", ""),
        ({"count": "3"}, "gpu_count", ""),
        ({"rim": ""}, "rim_missing", "gpu fetch"),
        ({"revocation": ""}, "status_missing", "gpu fetch"),
        ({"roots": ""}, "untrusted_root", "--roots"),
        ({"at": str(NOW + 90_000)}, "status_expired", "gpu fetch"),
    ],
)
def test_refused_evidence_names_the_step(
    options: dict[str, str], expected: str, remedy: str, verify: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    code, report = verify(**options)
    assert (code, report["accepted"], report["code"]) == (1, False, expected)
    assert remedy in (report["hint"] or "")


def test_a_grace_and_a_policy_are_used(tmp_path: Path, verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    assert verify(at=str(NOW + 90_000), grace="4000")[0] == 0
    policy = tmp_path / "policy.toml"
    _ = policy.write_text('min_driver = "700.1"\nmodels = ["h200"]\n')
    code, report = verify(policy=str(policy))
    assert (code, report["code"]) == (1, "driver_too_old")
    for text in ("drivers = 1", "min_driver = 7", 'modes = ["CC"]', "models = []", "=", '[[pinned]]\nchip = "GH100"'):
        _ = policy.write_text(text)
        assert verify(policy=str(policy))[0] == 2, text


def test_every_mismatch_is_in_the_answer(verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, report = verify("measurement", "measurement_vbios")
    assert code == 1
    mismatches = report["gpus"][0]["mismatches"]
    assert [(one["index"], one["source"], one["shared"]) for one in mismatches] == [
        (9, "driver", False),
        (52, "vbios", False),
    ]
    assert all(len(one["expected"]) == 2 and one["found"] for one in mismatches)


def test_files_that_cannot_be_used_are_named(verify: Callable[..., tuple[int, dict[str, Any]]]) -> None:
    code, report = verify("rim_altered")
    assert (code, report["code"]) == (1, "rim_missing")
    assert [one.get("code") for one in report["rims"]] == ["rim_digest", None]
    code, report = verify("status_unauthorized")
    assert (code, report["code"], len(report["unreadable"])) == (1, "status_missing", 1)


def test_a_file_of_a_directory_that_cannot_be_read_ends_nothing(
    verify: Callable[..., tuple[int, dict[str, Any]]], tmp_path: Path, command: Callable[..., Ended]
) -> None:
    assert verify(nonce=NONCE.hex())[0] == 0
    for directory in ("rims", "status"):
        with (tmp_path / directory / "image.iso").open("wb") as file:
            _ = file.truncate(1 << 30)
        (tmp_path / directory / "older").mkdir()
        os.mkfifo(tmp_path / directory / "pipe")
    code, report = verify(nonce=NONCE.hex())
    assert (code, report["accepted"]) == (0, True)
    (unread,) = (one for one in report["rims"] if "error" in one)
    assert (unread["code"], unread["error"].startswith("has more than")) == (None, True)
    assert ["image.iso: has more than" in one for one in report["unreadable"]] == [True]
    named = ("gpu", "verify", tmp_path / "evidence.json", "--rim", tmp_path / "rims" / "image.iso")
    assert command(*named).code == 2


def test_what_is_no_evidence_is_unreadable(tmp_path: Path, command: Callable[..., Ended]) -> None:
    for data in (b"", b"{}", b"[1]", b"\xff"):
        _ = (tmp_path / "x").write_bytes(data)
        assert command("gpu", "verify", tmp_path / "x", "--rim", "none", "--revocation", "off").code == 2
        assert command("gpu", "show", tmp_path / "x").code == 2
    assert command("gpu", "verify", tmp_path / "missing").code == 2
    assert command("gpu", "verify", tmp_path / "x", "--chain", tmp_path / "x").code == 2
    assert command("gpu", "verify", tmp_path / "x", "--nonce", "00").code == 2


def test_what_was_fetched_is_a_bundle_for_offline_use(tmp_path: Path, command: Callable[..., Ended]) -> None:
    now = int(time.time())
    for name, data in gpu_files(ON_A_NETWORK, NONCE, now).items():
        if "/" not in name:
            _ = (tmp_path / name).write_bytes(data)
    trust, bundle = ("--roots", tmp_path), tmp_path / "bundle"
    with serving() as services:
        named = ("--rim-service", services.url, "--ocsp-service", services.url)
        fetch = ("gpu", "fetch", tmp_path / "evidence.json", *trust, *named, "--out", bundle, "--json")
        fetched = command(*fetch)
        assert (fetched.code, fetched.json["problems"]) == (0, [])
        assert sorted(fetched.json["files"]) == sorted(map(str, bundle.glob("*/*")))
        services.down = True
        refused = command(*fetch)
        assert (refused.code, refused.json["fetched"], refused.json["files"]) == (1, False, [])
        assert refused.json["hint"] is None
    kept = ("--rim", bundle / "rims", "--revocation", bundle / "status")
    verify = ("gpu", "verify", tmp_path / "evidence.json", "--nonce", NONCE.hex(), *kept, "--count", 2)
    assert command(*verify, *trust, "--json").json["accepted"]
    check = ("gpu", "check", bundle, *trust, "--json")
    valid = command(*check)
    assert (valid.code, valid.json["valid"], len(valid.json["pieces"])) == (0, True, len(fetched.json["files"]))
    tomorrow = command(*check, "--at", now + 90_000)
    assert (tomorrow.code, tomorrow.json["valid"]) == (1, False)
    first, *_, last = tomorrow.json["pieces"]
    assert (first["piece"].split()[0], first["valid"], last["piece"].split()[0], last["valid"]) == (
        *("OCSP", False),
        *("RIM", True),
    )
    _ = (bundle / "rims" / "other.xml").write_bytes(b"<no/>")
    spoilt = command(*check)
    assert (spoilt.code, len(spoilt.json["problems"])) == (1, 1)
    assert command("gpu", "check", tmp_path / "nowhere").code == 2


def test_older_answers_and_rims_replace_none_that_verify(tmp_path: Path, command: Callable[..., Ended]) -> None:
    """A service that is old, or that somebody speaks for, would take a revocation back."""
    now = int(time.time())
    for name, data in gpu_files(ON_A_NETWORK, NONCE, now).items():
        if "/" not in name:
            _ = (tmp_path / name).write_bytes(data)
    revoked = by_serial(ON_A_NETWORK.having("revoked").status(now))
    newest = by_serial(ON_A_NETWORK.status(now))
    with serving() as services:
        named = ("--rim-service", services.url, "--ocsp-service", services.url, "--roots", tmp_path)
        fetch = ("gpu", "fetch", tmp_path / "evidence.json", *named, "--out", tmp_path / "bundle", "--json")
        for kept, older, why in (
            (newest, by_serial(ON_A_NETWORK.status(now - 7200)), "it is older than the cached answer"),
            (revoked, newest, "it takes a revocation back"),
        ):
            services.status = kept
            assert command(*fetch).code == 0
            bundle = {path: path.read_bytes() for path in (tmp_path / "bundle").glob("*/*")}
            services.status = older
            ended = command(*fetch)
            assert {path: path.read_bytes() for path in (tmp_path / "bundle").glob("*/*")} == bundle
            assert (ended.code, ended.json["fetched"]) == (1, False)
            assert all("is left as it is: " in problem and why in problem for problem in ended.json["problems"])
    check = command("gpu", "check", tmp_path / "bundle", "--roots", tmp_path, "--json")
    assert check.json["problems"] == []


@pytest.mark.skipif(not GPU.is_dir(), reason=ABSENT)
def test_one_report_of_nvidias_is_verified_with_its_chain(command: Callable[..., Ended]) -> None:
    files = (GPU / "full-report.bin", "--chain", GPU / "full-chain.pem")
    rims = ("--rim", GPU / "full-rim-driver.xml", "--rim", GPU / "full-rim-vbios.xml")
    at = ("--revocation", "off", "--at", "2025-08-21", "--json")
    ended = command("gpu", "verify", *files, *rims, *at)
    assert (ended.code, json.loads(ended.out)["gpus"][0]["vbios"]) == (0, "96.00.9F.00.01")
    after_one = ("--rim", GPU / "full-rim-driver.xml", GPU / "full-rim-vbios.xml")
    assert command("gpu", "verify", *files, *after_one, *at).json == ended.json
    assert command("gpu", "verify", *files, GPU / "full-rim-vbios.xml", *at).code == 2
    shown = command("gpu", "show", *files, "--json")
    assert json.loads(shown.out)["gpus"][0]["rim_ids"] == [
        "NV_GPU_DRIVER_GH100_550.90.07",
        "NV_GPU_VBIOS_1010_0200_882_96009F0001",
    ]
