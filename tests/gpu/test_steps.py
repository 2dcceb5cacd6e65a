"""The steps of GPU verification, held against simulated devices: each fault is refused by the check it is for."""

from __future__ import annotations

import re

import pytest

from chutes_proto.gpu import EvidenceFormatError, EvidenceRefusedError, GpuError, GpuPolicy, GpuVerificationError
from chutes_proto.gpu import _steps as steps
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpu_faults import GPU_FAULTS
from tests.conftest import ROOT as PROJECT
from tests.gpu.simulated import GPUS, MACHINE, refused, verified
from tools.docs import generate

Step = type[GpuVerificationError]
STEPS: list[Step] = [
    kind for kind in vars(steps).values() if type(kind) is type and kind.__base__ is GpuVerificationError
]
REFUSED = {
    "evidence_format": (
        "report_truncated report_short report_no_signature report_trailing report_large request_version "
        "response_version blocks_fewer blocks_more block_twice block_kind block_size block_cut field_twice field_cut "
        "field_head_cut driver_not_text chip_not_ascii"
    ),
    "chain_form": "chain_garbage chain_long",
    "certificate_format": "leaf_sha256 leaf_p256 leaf_off_curve",
    "certificate_role": (
        "chain_leaf_only leaf_is_ca leaf_may_issue leaf_no_usage brom_not_ca brom_may_not_issue ca_path_length "
        "rim_signer_is_ca"
    ),
    "untrusted_root": "other_root root_missing_ca",
    "certificate_issuer": "chain_missing_ica",
    "certificate_signature": "leaf_signature",
    "certificate_not_yet_valid": "brom_not_yet_valid",
    "certificate_expired": "brom_expired rim_signer_expired status_responder_expired",
    "chip": "leaf_unknown_chip leaf_no_chip report_other_chip report_unknown_chip arch_other",
    "fwid_mismatch": "fwid_other fwid_uncertified fwid_garbage fwid_not_list fwid_not_sequence fwid_short",
    "report_signature": "report_signature report_altered",
    "nonce_mismatch": "nonce_other",
    "rim_format": (
        "rim_doctype rim_comment rim_cdata rim_instruction rim_cut rim_large rim_deep rim_encoding rim_xml_attribute "
        "rim_namespaces rim_escapes rim_prefix rim_prefix_xml rim_prefix_empty rim_attribute_twice"
    ),
    "rim_algorithm": (
        "rim_not_swid rim_unsigned rim_text_in_signature rim_no_key_info rim_not_certificate rim_certificate_id "
        "rim_not_base64 rim_base64_cut rim_nested_value rim_algorithm rim_reference rim_transform_content"
    ),
    "rim_digest": "rim_altered",
    "rim_signature": "rim_other_key",
    "rim_content": (
        "rim_no_meta rim_no_version rim_no_product rim_edition rim_not_measurement rim_index_twice rim_index_word "
        "rim_size rim_no_value rim_not_hex rim_active rim_alternatives rim_no_active"
    ),
    "status_format": (
        "status_unauthorized status_garbage status_large status_digest status_state status_endless status_not_sequence"
    ),
    "status_responder": "status_responder_usage status_responder_garbage status_responder_name",
    "status_signature": "status_signature",
    "status_missing": "status_missing status_missing_rim status_unknown",
    "status_not_yet_valid": "status_future",
    "status_expired": "status_expired",
    "certificate_revoked": "revoked revoked_reason device_on_hold rim_signer_on_hold rim_ca_on_hold",
    "rim_product": "rim_other_product",
    "rim_missing": "rim_driver_missing rim_vbios_missing rims_none",
    "rim_conflict": "rim_conflict",
    "nvdec_status": "nvdec_state",
    "measurement_mismatch": "measurement measurement_vbios measurement_missing",
    "duplicate_device": "duplicate",
    "gpu_count": "empty",
}
"""By the code of the step that refuses them."""
BY_FAULT = {fault: code for code, faults in REFUSED.items() for fault in faults.split()}
LEFT_TO_POLICY = {
    "driver_old": (GpuPolicy(min_driver="550.0"), "driver_too_old"),
    "mode_ppcie": (GpuPolicy(modes=frozenset({"SPT", "MPT"})), "mode"),
    "mode_unknown": (GpuPolicy(modes=frozenset({"SPT", "MPT", "PPCIE"})), "mode"),
    "board_unknown": (GpuPolicy(models=frozenset({"h200"})), "model"),
}

UNUSUAL = (
    "measurement_35 leaf_renewed rim_corrected rim_declared driver_none driver_word vbios_none leaf_no_name "
    "status_version status_no_responder status_extensions status_certificates status_by_issuer status_by_name"
)
"""Refused in some machines only, or nowhere: ``test_policy.py`` has them."""


def test_the_steps_are_in_order() -> None:
    """From the form of the bytes to the policy."""
    found: list[Step] = [EvidenceFormatError, *STEPS]
    assert [step.step for step in found] == list(range(len(found)))
    assert len({step.code for step in found}) == len({step.rule for step in found}) == len(found)


def test_the_reference_lists_the_steps() -> None:
    rows = [f"| {step.step} | `{step.code}` | {step.rule} |" for step in STEPS]
    page = generate.filled((PROJECT / "docs" / "reference" / "gpu-verification.md").read_text("utf-8"))
    assert re.findall(r"^\| \d+ \| `\w+` \| .*$", page, re.MULTILINE) == rows


def test_every_fault_has_one_place() -> None:
    assert sorted([*BY_FAULT, *LEFT_TO_POLICY, *UNUSUAL.split()]) == sorted(GPU_FAULTS)
    assert {step.code for step in STEPS} - {*REFUSED} == {"policy"}


@pytest.mark.parametrize("arch", ["HOPPER", "BLACKWELL"])
def test_honest_devices_pass_every_step(arch: str) -> None:
    gpus = SimulatedGpus(GPUS.seed, count=2, switches=1, arch=arch)  # type: ignore[arg-type]
    accepted = verified(gpus, count=2)
    assert [device.arch for device in accepted.devices] == [arch, arch, "LS10"]
    assert {device.serial_number for device in accepted.gpus} == {
        device.serial_number for device in accepted.devices[:2]
    }
    for device in accepted.gpus:
        assert set(device.steps) == set(range(33)) - {31}
        assert device.is_fresh
        assert device.revocation_checked


@pytest.mark.parametrize("fault", sorted(BY_FAULT))
def test_a_fault_is_refused_by_its_step(fault: str) -> None:
    with pytest.raises(GpuError) as caught:
        _ = verified(GPUS.having(fault))
    assert caught.value.code == BY_FAULT[fault], str(caught.value)


@pytest.mark.parametrize("fault", sorted(LEFT_TO_POLICY))
def test_a_fault_is_left_to_the_policy(fault: str) -> None:
    policy, code = LEFT_TO_POLICY[fault]
    _ = verified(GPUS.having(fault))
    error = refused(GPUS.having(fault), policy=policy)
    assert error.code == code
    assert isinstance(error.error, steps.GpuAppraisalError)
    assert [refusal.code for refusal in error.error.refusals] == [code]


def test_one_faulty_device_refuses_the_machine_and_the_others_are_reported() -> None:
    error = refused(MACHINE.having("report_signature"))
    assert isinstance(error, EvidenceRefusedError)
    assert [device.error is None for device in error.devices] == [False, True, True, True]
    assert error.devices[0].serial_number is None
    assert str(error).startswith("device 0: report: the device did not sign it")
