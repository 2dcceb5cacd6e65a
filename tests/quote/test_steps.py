"""The table of steps, held against the simulated platform: each of its faults is refused by the check it is for."""

from __future__ import annotations

import re

import pytest

from chutes_proto.quote._policy import Policy
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._steps import STEPS, Step
from chutes_proto.quote._verify import verify
from chutes_proto.quote.errors import AppraisalError, QuoteFormatError, VerificationError
from chutes_proto.testing._faults import FAULTS
from tests.conftest import ROOT as PROJECT
from tests.quote.simulated import NOW, PLATFORM, PROFILE, REPORT_DATA, ROOT, collateral_of, verdict_of

BY_FAULT: dict[str, Step] = {fault: step for step in STEPS for fault in step.faults}
WITHOUT_FAULT = {"root_mismatch"}
"""Only a caller can make it fail."""

FORMAT = {
    "truncated_body": "quote_too_short",
    "truncated_auth": "quote_structure",
    "version": "quote_version",
    "tee_type": "quote_tee_type",
    "key_type": "quote_key_type",
    "body_type": "quote_structure",
    "body_size": "quote_structure",
    "auth_length_huge": "quote_structure",
    "outer_length_huge": "quote_structure",
    "qe_auth_length_huge": "quote_structure",
    "cert_length_huge": "quote_structure",
    "auth_trailing": "quote_structure",
    "inner_trailing": "quote_structure",
    "outer_type": "quote_structure",
}
STATUS = {
    "qe_outdated": "OutOfDate",
    "module_outdated": "OutOfDate",
    "tcb_sw_hardening_needed": "SWHardeningNeeded",
    "tcb_configuration_needed": "ConfigurationNeeded",
    "tcb_configuration_and_sw_hardening_needed": "ConfigurationAndSWHardeningNeeded",
    "tcb_out_of_date": "OutOfDate",
    "tcb_out_of_date_configuration_needed": "OutOfDateConfigurationNeeded",
    "relaunch_advised": "TDRelaunchAdvised",
    "relaunch_advised_configuration_needed": "TDRelaunchAdvisedConfigurationNeeded",
}
AT_PRESENT = {"current_tcb_out_of_date": "OutOfDate"}
ATTRIBUTES = {
    "debug": "debug",
    "profiling": "profiling",
    "reserved_tud": "td_attributes_reserved",
    "reserved_sec": "td_attributes_reserved",
    "reserved_other": "td_attributes_reserved",
    "sept_ve_disable_clear": "sept_ve_disable",
    "migratable": "migratable",
    "servtd_ext": "servtd_ext",
    "service_td": "service_td",
    "xfam": "xfam",
}
MEASUREMENTS = {"mrtd": "MRTD", "rtmr0": "RTMR0", "rtmr1": "RTMR1", "rtmr2": "RTMR2", "rtmr3": "RTMR3"}


def test_the_table_is_in_order() -> None:
    assert [step.number for step in STEPS] == list(range(1, len(STEPS) + 1))
    assert len({step.code for step in STEPS}) == len({step.__name__ for step in STEPS}) == len(STEPS)
    assert all(step.rule and step.__doc__ for step in STEPS)


def test_every_fault_has_one_place() -> None:
    placed = [*BY_FAULT, *FORMAT, *STATUS, *AT_PRESENT, *ATTRIBUTES, *MEASUREMENTS]
    assert sorted(placed) == sorted(FAULTS)
    assert {step.code for step in STEPS if not step.faults} == WITHOUT_FAULT


def test_the_code_carries_the_numbers() -> None:
    quote = PROJECT / "src" / "chutes_proto" / "quote"
    text = "".join((quote / name).read_text("utf-8") for name in ("verify.py", "tcb.py", "terms.py"))
    for step in STEPS:
        assert len(re.findall(rf"\b{step.__name__}\b", text)) >= 2, "imported and raised"
        assert re.search(rf"# (\d+, )*{step.number}\b(?!-)", text), step


@pytest.mark.parametrize("fault", sorted(BY_FAULT))
def test_a_fault_is_refused_by_its_step(fault: str) -> None:
    platform = PLATFORM.having(fault)
    root = TrustedRoot.from_der(platform.root_der) if fault == "root_expired" else ROOT
    with pytest.raises(VerificationError) as caught:
        _ = verify(
            platform.quote(REPORT_DATA), collateral_of(platform), now=NOW, expected_report_data=REPORT_DATA, root=root
        )
    assert type(caught.value) is BY_FAULT[fault], str(caught.value)
    assert f"step {caught.value.number}" in str(caught.value)


@pytest.mark.parametrize(("fault", "code"), FORMAT.items())
def test_a_fault_of_the_form_does_not_parse(fault: str, code: str) -> None:
    with pytest.raises(QuoteFormatError) as caught:
        _ = verdict_of(PLATFORM, fault)
    assert caught.value.code == code


@pytest.mark.parametrize(("fault", "status"), STATUS.items())
def test_a_status_is_graded_and_left_to_the_policy(fault: str, status: str) -> None:
    verdict = verdict_of(PLATFORM, fault)
    assert verdict.tcb_status == status
    _assert_refused(verdict_of(PLATFORM, fault), [("tcb", "tcb_status", None)])


@pytest.mark.parametrize(("fault", "status"), AT_PRESENT.items())
def test_a_status_at_present_is_left_to_the_policy(fault: str, status: str) -> None:
    verdict = verdict_of(PLATFORM, fault)
    assert (verdict.tcb_status, verdict.current_status) == ("UpToDate", status)
    _assert_refused(verdict, [("tcb", "current_tcb_status", None)])


@pytest.mark.parametrize(("fault", "code"), ATTRIBUTES.items())
def test_attributes_are_left_to_the_policy(fault: str, code: str) -> None:
    _assert_refused(verdict_of(PLATFORM, fault), [("attributes", code, None)])


@pytest.mark.parametrize(("fault", "register"), MEASUREMENTS.items())
def test_measurements_are_left_to_the_policy(fault: str, register: str) -> None:
    _assert_refused(verdict_of(PLATFORM, fault), [("measurement", "measurement_mismatch", register)])


def _assert_refused(verdict: object, expected: list[tuple[str, str, str | None]]) -> None:
    with pytest.raises(AppraisalError) as caught:
        _ = Policy(profiles=(PROFILE,)).appraise(verdict, stage="boot")  # type: ignore[arg-type]
    assert [(refusal.part, refusal.code, refusal.register) for refusal in caught.value.refusals] == expected
