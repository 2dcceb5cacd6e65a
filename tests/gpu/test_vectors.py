"""Evidence, RIMs and OCSP answers that NVIDIA's devices and services made decide as expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from chutes_proto.gpu import (
    DeviceEvidence,
    EvidenceRefusedError,
    GpuError,
    GpuPolicy,
    Report,
    Revocation,
    Rims,
    parse_evidence,
    parse_report,
    verify,
    verify_rim,
)
from tests.gpu.vectors import (
    ABSENT,
    COLLECTED_AT,
    GPU,
    RIM_STATUS_AT,
    RIMS_ONLY,
    UNCHECKED,
    at,
    complete_rims,
    complete_set,
    read,
)

pytestmark = pytest.mark.skipif(not GPU.is_dir(), reason=ABSENT)

NONCE_OF_SDK = bytes.fromhex("e97b23a1718095a0e9e35edca810768c70a6a5a389b705e753b197912bc11576")
NONCE_OF_CHUTES = bytes.fromhex("931d8dd0add203ac3d8b4fbde75e115278eefcdceac5b87671a748f32364dfcb")


def one(report: str, chain: str) -> Callable[[], tuple[DeviceEvidence, ...]]:
    return lambda: (DeviceEvidence(read(report), read(chain)),)


def listed(name: str) -> Callable[[], tuple[DeviceEvidence, ...]]:
    return lambda: parse_evidence(read(name))


EVIDENCE: dict[str, tuple[Callable[[], tuple[DeviceEvidence, ...]], bytes | None, str]] = {
    "full-report.bin": (one("full-report.bin", "full-chain.pem"), NONCE_OF_CHUTES, "accepted"),
    "nvtrust-report.bin": (one("nvtrust-report.bin", "nvtrust-chain.pem"), NONCE_OF_CHUTES, "accepted"),
    "mpt-evidence.json": (listed("mpt-evidence.json"), None, "accepted"),
    "sdk-hopper-evidence.json": (listed("sdk-hopper-evidence.json"), NONCE_OF_SDK, "accepted"),
    "sdk-switch-evidence.json": (listed("sdk-switch-evidence.json"), NONCE_OF_CHUTES, "accepted"),
    "sdk-bad-signature-report.bin": (one("sdk-bad-signature-report.bin", "full-chain.pem"), None, "fwid_mismatch"),
    "trustee-hopper_cert_chain_case1.txt": (
        one("full-report.bin", "trustee-hopper_cert_chain_case1.txt"),
        None,
        "accepted",
    ),
    "trustee-hopper_cert_chain_case3.txt": (
        one("full-report.bin", "trustee-hopper_cert_chain_case3.txt"),
        None,
        "certificate_issuer",
    ),
    # the chain of another device
    "trustee-hopper_coco_certs1.txt": (one("full-report.bin", "trustee-hopper_coco_certs1.txt"), None, "fwid_mismatch"),
    # a device certificate alone
    "trustee-hopper_signing_cert.pem": (
        one("full-report.bin", "trustee-hopper_signing_cert.pem"),
        None,
        "untrusted_root",
    ),
}
"""By file: the evidence, the nonce if it is known, and the decision: the code of the step, or accepted."""

OF_NVTRUST = "2024-01-15"
RIMS: dict[str, tuple[str, str]] = {
    "full-rim-driver.xml": ("2025-10-24", "GH100 550.90.07, 21 values"),
    "full-rim-vbios.xml": ("2025-10-24", "GH100 96.00.9F.00.01, 12 values"),
    "rim-00-1010_0200_882_96005E0001_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.5E.00.01, 12 values"),
    "rim-02-1010_0200_882_96005E0003_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.5E.00.03, 12 values"),
    "rim-04-1010_0200_882_960074001C_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.1C, 12 values"),
    "rim-06-1010_0205_862_96005E0004_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.5E.00.04, 12 values"),
    "rim-08-1010_0205_862_9600740020_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.20, 12 values"),
    "rim-10-1010_0215_866_9600740010_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.10, 12 values"),
    "rim-12-g520_0200_885_9600740001_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.01, 12 values"),
    "rim-14-g520_0202_885_96006D0008_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.6D.00.08, 12 values"),
    "rim-16-g520_0202_885_9600740014_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.14, 12 values"),
    "rim-18-g520_0205_865_9600740006_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.06, 12 values"),
    "rim-20-g520_0207_865_9600740015_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.74.00.15, 12 values"),
    "rim-22-g520_0213_881_96006D0007_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.6D.00.07, 12 values"),
    "rim-24-g520_0228_889_96006D000A_PROD.swidtag": (OF_NVTRUST, "GH100 96.00.6D.00.0A, 12 values"),
    "rim-26-NV_GPU_DRIVER_GH100_550.144.03.xml": ("2026-11-29", "GH100 550.144.03, 21 values"),
    "rim-28-incorrect_signature_driver_rim.xml": ("2026-11-29", "rim_signature"),
    "rim-30-NV_GPU_DRIVER_GH100_570.124.03_expired.xml": ("2025-01-01", "rim_digest"),
    "rim-32-NV_SWITCH_BIOS_5612_0002_890_9610550001_invalid_signature.xml": ("2025-10-24", "rim_digest"),
    "rim-34-switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml": (
        "2026-11-29",
        "LS10 96.10.55.00.01, 31 values",
    ),
}
"""By file: a day on which its certificates are valid, and its content, or the code of the step that refuses it."""


def decided(check: Callable[[], object]) -> str:
    try:
        return str(check())
    except GpuError as exc:
        return exc.code


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_decides_as_expected(name: str) -> None:
    make, nonce, expected = EVIDENCE[name]

    def check() -> str:
        options: dict[str, Any] = {"now": COLLECTED_AT, "rims": Rims(), "revocation": Revocation(), "policy": UNCHECKED}
        _ = verify(make(), nonce=nonce, count=0 if name == "sdk-switch-evidence.json" else None, **options)
        return "accepted"

    assert decided(check) == expected


@pytest.mark.parametrize("name", RIMS)
def test_a_rim_decides_as_expected(name: str) -> None:
    day, expected = RIMS[name]

    def check() -> str:
        rim = verify_rim(read(name), now=at(day))
        return f"{rim.product} {rim.version}, {len(rim.values)} values"

    assert decided(check) == expected


def test_malformed_rims_are_refused_before_their_content_is_read() -> None:
    names = [path.name for path in sorted(GPU.glob("rim-failure_*"))]
    assert len(names) == 18
    for name in names:
        with pytest.raises(GpuError) as caught:
            _ = verify_rim(read(name), now=COLLECTED_AT)
        assert caught.value.code == "rim_algorithm", name


def test_every_vector_is_in_a_table() -> None:
    """The tables here, and the tests below, name every file of the index."""
    elsewhere = {"root", "chain", "ocsp", "oracle", "rim-bad"}
    names = {entry["file"] for entry in json.loads(read("index.json")) if entry["kind"] not in elsewhere}
    assert names == EVIDENCE.keys() | RIMS.keys() | {"trustee-hopperAttestationReport-claims.txt"}


def test_a_complete_set_has_all_reference_values() -> None:
    accepted = verify(
        (complete_set(),),
        nonce=NONCE_OF_CHUTES,
        now=COLLECTED_AT,
        rims=complete_rims(),
        revocation=Revocation(),
        policy=RIMS_ONLY,
        count=1,
    )
    (device,) = accepted.devices
    assert (device.driver, device.vbios, device.model, device.mode) == ("550.90.07", "96.00.9F.00.01", "h100", "SPT")
    assert (device.serial_number, device.device_id) == (
        "53C22BA15E5D68088282DA074ED9FB37AA585771",
        "41431D480FE5E87274",
    )
    assert (device.reference, device.compared, device.mismatches) == ("rims", 33, ())
    assert device.is_fresh
    assert not device.revocation_checked


def test_each_certificate_of_the_complete_set_is_good_by_its_ocsp_answer() -> None:
    """No one time is in all windows: the answers about device and RIMs are two months apart."""
    status = Revocation.of(path.read_bytes() for path in sorted(GPU.glob("full-ocsp-*.der")))
    only_device = GpuPolicy(measurements="unchecked")
    options: dict[str, Any] = {"nonce": None, "revocation": status}
    assert verify((complete_set(),), now=COLLECTED_AT, rims=Rims(), policy=only_device, **options).devices
    graceful = GpuPolicy(revocation="grace", revocation_grace=65 * 86400)
    rims = complete_rims(RIM_STATUS_AT)
    (device,) = verify((complete_set(),), now=RIM_STATUS_AT, rims=rims, policy=graceful, **options).devices
    assert device.revocation_checked

    def late() -> None:
        _ = verify((complete_set(),), now=RIM_STATUS_AT, rims=rims, policy=GpuPolicy(), **options)

    assert decided(late) == "status_expired"
    for name in ("certificate_l2", "certificate_l3", "certificate_l4", "driver_rim_l3", "driver_rim_l4", "vbios_l4"):
        rest = (path for path in sorted(GPU.glob("full-ocsp-*.der")) if name not in path.name)
        lacking = Revocation.of(path.read_bytes() for path in rest)
        with pytest.raises(EvidenceRefusedError) as caught:
            _ = verify((complete_set(),), nonce=None, now=RIM_STATUS_AT, rims=rims, policy=graceful, revocation=lacking)
        assert caught.value.code == "status_missing", name


def test_rims_of_another_version_or_chip_are_missing() -> None:
    others = (
        "rim-26-NV_GPU_DRIVER_GH100_550.144.03.xml",
        "rim-34-switchVBIOSRim_NV_SWITCH_BIOS_5612_0002_890_9610550001.xml",
    )
    rims = Rims.of(verify_rim(read(name), now=at("2026-11-29")) for name in others)
    with pytest.raises(EvidenceRefusedError, match=r"NV_GPU_DRIVER_GH100_550\.90\.07") as caught:
        _ = verify(
            (complete_set(),), nonce=None, now=COLLECTED_AT, rims=rims, revocation=Revocation(), policy=RIMS_ONLY
        )
    assert caught.value.code == "rim_missing"


def test_a_report_reads_as_nvidias_parser_reads_it() -> None:
    """The oracle is of a report that is not among the vectors; it has the form of those that are."""
    oracle = json.loads(read("sdk-spdm-parsed.json"))
    report = rebuilt(oracle)
    fields = oracle["OpaqueData"]["OpaqueDataField"]
    blocks = oracle["MeasurementRecord"]["MeasurementBlocks"]
    assert {str(index): f"0x{value.hex()}" for index, value in report.measurements.items()} == {
        index: block["DMTFSpecMeasurementValue"] for index, block in blocks.items()
    }
    assert (report.driver, report.vbios, report.project, report.project_sku, report.chip_sku, report.mode) == (
        "580.159.03",
        "96.00.74.00.20",
        "1010",
        "0205",
        "862",
        "SPT",
    )
    assert report.fwid == bytes.fromhex(fields["OPAQUE_FIELD_ID_FWID"][2:])
    assert report.signature == bytes.fromhex(oracle["Signature"][2:])


def rebuilt(oracle: dict[str, Any]) -> Report:
    """The report that the oracle was made of, but for the request."""
    record = b""
    for index, block in oracle["MeasurementRecord"]["MeasurementBlocks"].items():
        value = bytes.fromhex(block["DMTFSpecMeasurementValue"][2:])
        body = bytes([block["DMTFSpecMeasurementValueType"]]) + len(value).to_bytes(2, "little") + value
        record += bytes([int(index), 1]) + len(body).to_bytes(2, "little") + body
    numbers = {"DRIVER_VERSION": 3, "VBIOS_VERSION": 6, "NVDEC0_STATUS": 11, "CHIP_SKU": 15, "PROJECT": 17}
    numbers |= {"PROJECT_SKU": 18, "FWID": 20, "PROTECTED_PCIE_STATUS": 21}
    opaque = b""
    for name, number in numbers.items():
        value = bytes.fromhex(oracle["OpaqueData"]["OpaqueDataField"][f"OPAQUE_FIELD_ID_{name}"][2:])
        opaque += number.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value
    head = bytes([0x11, 0xE0, 1, 0xFF]) + bytes(33) + bytes([0x11, 0x60, 0, 0, oracle["NumberOfBlocks"]])
    tail = bytes.fromhex(oracle["Nonce"][2:]) + len(opaque).to_bytes(2, "little") + opaque
    signature = bytes.fromhex(oracle["Signature"][2:])
    return parse_report(head + len(record).to_bytes(3, "little") + record + tail + signature)


def test_trustees_claims_are_those_of_the_same_report() -> None:
    claims = json.loads(read("trustee-hopperAttestationReport-claims.txt"))
    report = parse_report(read("full-report.bin"))
    config = claims["config"]
    assert (config["driver_version"], config["fwid"]) == (report.driver, report.fwid and report.fwid.hex())
