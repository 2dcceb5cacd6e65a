"""Policies in TOML, and results as plain data."""

from __future__ import annotations

import json

import pytest

from chutes_proto.gpu import (
    EvidenceFormatError,
    GpuPolicy,
    GpuPolicyError,
    GpuVerificationError,
    parse_gpu_policy,
    verify_rim,
)
from chutes_proto.gpu._plain import claimed_fields, device_fields, rim_fields
from chutes_proto.gpu._policy import PinnedMeasurements
from tests.gpu.simulated import GPUS, MACHINE, NONCE, NOW, refused, verified

COMPLETE = b"""
min_driver = "570.124.06"
min_vbios = { GH100 = "96.00.9F.00.01" }
modes = ["SPT", "PPCIE"]
models = ["h200"]
boards = { G525_0220_886 = "b200" }
measurements = "rims"
revocation = "grace"
revocation_grace = 3600
allow_rim_signer_on_hold = true

[[pinned]]
chip = "GB100"
driver = "590.48.01"
vbios = "97.00.D9.00.35"
values = { 0 = "0011" }
"""


def test_a_complete_policy_is_read() -> None:
    assert parse_gpu_policy(COMPLETE) == GpuPolicy(
        min_driver="570.124.06",
        min_vbios={"GH100": "96.00.9F.00.01"},
        modes=frozenset({"SPT", "PPCIE"}),
        models=frozenset({"h200"}),
        boards={"G525_0220_886": "b200"},
        revocation="grace",
        revocation_grace=3600,
        allow_rim_signer_on_hold=True,
        pinned=(PinnedMeasurements(chip="GB100", driver="590.48.01", vbios="97.00.D9.00.35", values={0: b"\0\x11"}),),
    )
    assert parse_gpu_policy(b"") == GpuPolicy()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("drivers = 1", "drivers: Unknown key"),
        ("min_driver = 7", "min_driver: Input should be a valid string"),
        ('modes = ["CC"]', "modes: must be some of SPT, MPT, PPCIE"),
        ("models = []", "models: must name at least one"),
        ('min_vbios = { gh100 = "96.00.9F.00.01" }', "min_vbios: 'gh100' names no chip"),
        ("=", "not TOML"),
        ('[[pinned]]\nchip = "GH100"', "pinned.0.driver: Field required"),
        ('[[pinned]]\nchip = "a"\ndriver = "1"\nvbios = "9"\nvalues = { x = "00" }', "values: must be hexadecimal"),
        ('[[pinned]]\nchip = "a"\ndriver = "1"\nvbios = "9"\nvalues = { 1 = "0" }', "values: must be hexadecimal"),
        ("#" * 1_100_000, "bytes of TOML"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_a_wrong_key_is_named(text: str, problem: str) -> None:
    with pytest.raises(GpuPolicyError, match=problem):
        _ = parse_gpu_policy(text.encode())


def test_results_are_plain_data() -> None:
    accepted = verified(GPUS).devices[0]
    fields = json.loads(json.dumps(device_fields(accepted)))
    assert (fields["error"], fields["mismatches"], fields["driver"]) == (None, [], "600.10.01")
    rim = verify_rim(GPUS.rims(NOW)[0], now=NOW, roots=GPUS.roots)
    assert json.loads(json.dumps(rim_fields(rim)))["values"] == 21
    assert accepted.rims[0] == rim.reference
    error = refused(GPUS.having("measurement_missing"))
    told = json.loads(json.dumps(device_fields(error.devices[0])))
    assert (told["code"], told["mismatches"][0]["found"]) == ("measurement_mismatch", None)
    other = json.loads(json.dumps(device_fields(refused(GPUS.having("measurement")).devices[0])))
    assert other["mismatches"][0]["found"].endswith("02")


def test_claims_are_read_without_verification() -> None:
    gpu, *_, switch = (claimed_fields(one) for one in MACHINE.evidence(NONCE))
    assert gpu["rim_ids"] == ["NV_GPU_DRIVER_GH100_600.10.01", "NV_GPU_VBIOS_G520_0280_895_9600FF0001"]
    assert (switch["arch"], switch["rim_ids"]) == ("LS10", ["NV_SWITCH_BIOS_5612_0002_890_9610FF0001"])
    assert claimed_fields(GPUS.having("report_signature").evidence(NONCE)[0])["measurements"]["63"]
    with pytest.raises(EvidenceFormatError):
        _ = claimed_fields(GPUS.having("report_short").evidence(NONCE)[0])
    with pytest.raises(GpuVerificationError):
        _ = claimed_fields(GPUS.having("leaf_no_chip").evidence(NONCE)[0])
    assert claimed_fields(GPUS.having("vbios_none").evidence(NONCE)[0])["rim_ids"] == ["NV_GPU_DRIVER_GH100_600.10.01"]
