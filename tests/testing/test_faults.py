"""What this project's own verifier and policy make of the simulated platform, fault by fault."""

from __future__ import annotations

import pytest

from chutes_proto.quote.errors import AppraisalError, QuoteFormatError, VerificationError
from chutes_proto.quote.pck import Ca
from chutes_proto.quote.policy import Policy
from chutes_proto.quote.steps import STEPS
from chutes_proto.quote.verify import Verdict, verify
from chutes_proto.testing.faults import FAULTS
from chutes_proto.testing.platform import PROFILE, SimulatedPlatform
from chutes_proto.testing.quotes import Form

NOW = 1_780_000_000
REPORT_DATA = bytes(range(64))
HONEST = SimulatedPlatform(b"a world to be wrong in")
POLICY = Policy(profiles=(PROFILE,))

STEP_OF = {fault: step for step in STEPS for fault in step.faults}

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
"""The faults that are no quote, with the code."""

APPRAISED = {
    "debug": {"debug"},
    "profiling": {"profiling"},
    "reserved_tud": {"td_attributes_reserved"},
    "reserved_sec": {"td_attributes_reserved"},
    "reserved_other": {"td_attributes_reserved"},
    "sept_ve_disable_clear": {"sept_ve_disable"},
    "migratable": {"migratable"},
    "servtd_ext": {"servtd_ext"},
    "service_td": {"service_td"},
    "xfam": {"xfam"},
    "mrtd": {"MRTD"},
    "rtmr0": {"RTMR0"},
    "rtmr1": {"RTMR1"},
    "rtmr2": {"RTMR2"},
    "rtmr3": {"RTMR3"},
    "qe_outdated": {"tcb_status"},
    "module_outdated": {"tcb_status"},
    "tcb_sw_hardening_needed": {"tcb_status"},
    "tcb_configuration_needed": {"tcb_status"},
    "tcb_configuration_and_sw_hardening_needed": {"tcb_status"},
    "tcb_out_of_date": {"tcb_status"},
    "tcb_out_of_date_configuration_needed": {"tcb_status"},
    "relaunch_advised": {"tcb_status"},
    "relaunch_advised_configuration_needed": {"tcb_status"},
}
"""The faults that verify and that a policy refuses, with its codes, or the register's name."""


def ask(platform: SimulatedPlatform) -> Verdict:
    return verify(
        platform.quote(REPORT_DATA),
        platform.collateral(NOW),
        now=NOW,
        expected_report_data=REPORT_DATA,
        root=HONEST.root,
    )


@pytest.mark.parametrize("ca", ["platform", "processor"])
@pytest.mark.parametrize("form", ["v4", "v5-td10", "v5-td15"])
def test_an_honest_platform_is_accepted_and_named(form: Form, ca: Ca) -> None:
    machine = SimulatedPlatform(HONEST.seed, index=3, form=form, ca=ca)
    verdict = ask(machine)
    assert POLICY.appraise(verdict, stage="boot").profile == PROFILE
    pck = verdict.pck
    assert (pck.ca, pck.fmspc, pck.ppid) == (ca, machine.fmspc, machine.ppid)
    assert pck.platform_instance_id == machine.platform_instance_id
    with pytest.raises(AppraisalError, match="RTMR3"):
        _ = POLICY.appraise(verdict, stage="runtime")


def test_every_fault_is_refused_in_one_known_way() -> None:
    assert STEP_OF.keys() | FORMAT.keys() | APPRAISED.keys() == FAULTS.keys()
    assert len(STEP_OF) + len(FORMAT) + len(APPRAISED) == len(FAULTS)


@pytest.mark.parametrize("name", FORMAT)
def test_what_is_no_quote_does_not_parse(name: str) -> None:
    with pytest.raises(QuoteFormatError) as caught:
        _ = ask(HONEST.having(name))
    assert caught.value.code == FORMAT[name]


@pytest.mark.parametrize("name", STEP_OF)
def test_the_step_that_names_a_fault_refuses_it(name: str) -> None:
    with pytest.raises(VerificationError) as caught:
        _ = ask(HONEST.having(name))
    assert type(caught.value) is STEP_OF[name]


@pytest.mark.parametrize("name", APPRAISED)
def test_what_verifies_all_the_same_is_the_policys_to_refuse(name: str) -> None:
    verdict = ask(HONEST.having(name))
    with pytest.raises(AppraisalError) as caught:
        _ = POLICY.appraise(verdict, stage="boot")
    assert {refusal.register or refusal.code for refusal in caught.value.refusals} == APPRAISED[name]
