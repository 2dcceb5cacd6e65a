"""Policies: strict by default, checked when they are made, and refusing with all reasons."""

from __future__ import annotations

import re
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from chutes_proto.quote._attributes import RESERVED, AttributePolicy
from chutes_proto.quote._errors import AppraisalError, PolicyError, Refusal
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._layout import SgxReport, TdAttributes, TdReport10, TdReport15
from chutes_proto.quote._measurements import Schedule, Stage
from chutes_proto.quote._policy import (
    MAX_AGE,
    MAX_DEPTH,
    AllOf,
    AnyOf,
    AnyPolicy,
    Policy,
    TcbPolicy,
    parse_policy_toml,
    verify,
)
from chutes_proto.quote._policy_set import BoundPolicies, parse_policy_set
from chutes_proto.quote._statements import TcbStatus
from chutes_proto.quote._terms import rfc3339
from chutes_proto.quote._verify import Verdict, verify_genuine
from chutes_proto.testing._platform import SimulatedPlatform
from tests.conftest import ROOT as PROJECT
from tests.quote.cases import ABSENT, FOLDER, cases
from tests.quote.simulated import (
    NOW,
    PLATFORM,
    PROFILE,
    REPORT_DATA,
    ROOT,
    TD15,
    collateral_of,
    verdict_of,
    verified_of,
)

SERVICE_TD = b"\x51" * 48
MR = bytes(range(48))
UNCHECKED = Policy(measurements="unchecked")
POLICY = Policy(profiles=(PROFILE,))


def _refused(policy: AnyPolicy, verdict: Verdict, stage: Stage = "boot") -> list[str]:
    with pytest.raises(AppraisalError) as caught:
        _ = policy.appraise(verdict, now=verdict.verified_at, stage=stage)
    for refusal in caught.value.refusals:
        assert refusal.code in str(caught.value)
        assert refusal.detail in str(caught.value)
    return [refusal.code for refusal in caught.value.refusals]


def _report(**changes: Any) -> TdReport15:
    body = verdict_of(TD15).quote.body
    assert isinstance(body, TdReport15)
    return replace(body, **changes)


# --- the whole ---


def test_an_honest_platform_is_accepted_in_its_stage() -> None:
    boot, runtime = verdict_of(PLATFORM), verdict_of(PLATFORM, stage="runtime")
    accepted = POLICY.appraise(boot, now=NOW, stage="boot")
    assert (accepted.profile, accepted.stage) == (PROFILE, "boot")
    for member in attrs.fields(Verdict):
        assert member.name == "proof" or getattr(accepted, member.name) is getattr(boot, member.name)
    assert POLICY.appraise(runtime, now=NOW, stage="runtime").profile is PROFILE
    assert _refused(POLICY, runtime, "boot") == _refused(POLICY, boot, "runtime") == ["measurement_mismatch"]
    with pytest.raises(PolicyError, match="stage"):
        _ = POLICY.appraise(boot, now=NOW, stage="later")  # type: ignore[arg-type]


def test_without_profiles_nothing_is_accepted_unless_said() -> None:
    assert _refused(Policy(), verdict_of(PLATFORM)) == ["no_profiles"]
    accepted = UNCHECKED.appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    assert accepted.matched is None
    with pytest.raises(PolicyError, match="unchecked"):
        _ = accepted.profile


def test_all_reasons_are_given() -> None:
    verdict = verdict_of(PLATFORM, "debug", "tcb_out_of_date", "rtmr1", "rtmr3", "sept_ve_disable_clear")
    with pytest.raises(AppraisalError) as caught:
        _ = POLICY.appraise(verdict, now=NOW, stage="boot")
    refusals = caught.value.refusals
    assert [(refusal.part, refusal.code, refusal.register) for refusal in refusals] == [
        ("tcb", "tcb_status", None),
        ("attributes", "sept_ve_disable", None),
        ("measurement", "measurement_mismatch", "RTMR1"),
        ("measurement", "measurement_mismatch", "RTMR3"),
    ]
    body = verdict.quote.body
    assert isinstance(body, TdReport10)
    assert (refusals[2].got, refusals[2].expected) == (body.rtmrs[1].hex(), PROFILE.boot[1].hex())
    assert "OutOfDate" in refusals[0].detail
    assert "UpToDate" in refusals[0].detail


def test_the_closest_profile_is_named() -> None:
    far = attrs.evolve(PROFILE, name="far", mrtd=bytes(48), boot=(bytes(48),) * 4)
    policy = Policy(profiles=(far, PROFILE))
    with pytest.raises(AppraisalError) as caught:
        _ = policy.appraise(verdict_of(PLATFORM, "rtmr0"), now=NOW, stage="boot")
    assert [(refusal.register, "'simulated'" in refusal.detail) for refusal in caught.value.refusals] == [
        ("RTMR0", True)
    ]


def test_a_profile_replaces_the_attributes() -> None:
    lenient = attrs.evolve(PROFILE, name="lenient", attributes=AttributePolicy(sept_ve_disable="any"))
    verdict = verdict_of(PLATFORM, "sept_ve_disable_clear")
    assert Policy(profiles=(lenient,)).appraise(verdict, now=NOW, stage="boot").profile is lenient
    assert Policy(profiles=(PROFILE, lenient)).appraise(verdict, now=NOW, stage="boot").profile is lenient
    assert _refused(POLICY, verdict) == ["sept_ve_disable"]
    strict = attrs.evolve(PROFILE, name="strict", attributes=AttributePolicy())
    policy = Policy(profiles=(strict,), attributes=AttributePolicy(sept_ve_disable="any"))
    assert _refused(policy, verdict) == ["sept_ve_disable"]


def test_debug_only_by_an_unsafe_name() -> None:
    unsafe = Policy(measurements="unchecked", attributes=AttributePolicy(unsafe_allow_debug=True))
    for fault in ("debug", "profiling"):
        assert unsafe.appraise(verdict_of(PLATFORM, fault), now=NOW, stage="boot").matched is None
        assert _refused(UNCHECKED, verdict_of(PLATFORM, fault)) == [fault]
    assert _refused(unsafe, verdict_of(PLATFORM, "reserved_tud")) == ["td_attributes_reserved"]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)
def test_an_enclave_is_no_td() -> None:
    (case,) = (case for case in cases("synthetic") if case.name.endswith("/valid-sgx-v3-platform"))
    verdict = case.verify()
    assert isinstance(verdict.quote.body, SgxReport)
    accepting = TcbPolicy(accepted_statuses=frozenset({verdict.tcb_status}))
    assert _refused(Policy(tcb=accepting, profiles=(PROFILE,)), verdict) == ["not_a_td"]
    advice = _explained(Policy(tcb=accepting), verdict)
    assert "by `mr_enclave`" in advice
    assert "[[profile]]" not in advice
    at = verdict.verified_at
    assert Policy(tcb=accepting, measurements="unchecked").appraise(verdict, now=at, stage="boot").matched is None
    (debug,) = (case for case in cases("synthetic") if case.name.endswith("/attr-sgx-debug"))
    assert _refused(Policy(tcb=accepting, measurements="unchecked"), debug.verify()) == ["debug"]


# --- TCB ---


@pytest.mark.parametrize("status", sorted(set(TcbStatus) - {TcbStatus.REVOKED, TcbStatus.UP_TO_DATE}))
def test_only_up_to_date_unless_said(status: TcbStatus) -> None:
    fault = {
        "TDRelaunchAdvised": "relaunch_advised",
        "TDRelaunchAdvisedConfigurationNeeded": "relaunch_advised_configuration_needed",
        "SWHardeningNeeded": "tcb_sw_hardening_needed",
        "ConfigurationNeeded": "tcb_configuration_needed",
        "ConfigurationAndSWHardeningNeeded": "tcb_configuration_and_sw_hardening_needed",
        "OutOfDate": "tcb_out_of_date",
        "OutOfDateConfigurationNeeded": "tcb_out_of_date_configuration_needed",
    }[status]
    verdict = verdict_of(PLATFORM, fault)
    assert _refused(UNCHECKED, verdict) == ["tcb_status"]
    tcb = TcbPolicy(accepted_statuses=[str(status)])
    assert Policy(tcb=tcb, measurements="unchecked").appraise(verdict, now=NOW, stage="boot").tcb_status == status
    assert _refused(Policy(tcb=tcb, measurements="unchecked"), verdict_of(PLATFORM)) == ["tcb_status"]


def test_the_tcb_at_present_is_not_out_of_date_either() -> None:
    verdict = verdict_of(PLATFORM, "current_tcb_out_of_date")
    assert (verdict.tcb_status, verdict.current_status) == ("UpToDate", "OutOfDate")
    assert _refused(UNCHECKED, verdict) == ["current_tcb_status"]
    accepting = TcbPolicy(accepted_statuses=["UpToDate", "OutOfDate"])
    _ = Policy(tcb=accepting, measurements="unchecked").appraise(verdict, now=NOW, stage="boot")


def test_advisories_are_refused_only_if_listed() -> None:
    verdict = verdict_of(PLATFORM, "tcb_out_of_date")
    assert verdict.advisory_ids
    accepting = TcbPolicy(accepted_statuses=frozenset({TcbStatus.OUT_OF_DATE}))
    _ = Policy(tcb=accepting, measurements="unchecked").appraise(verdict, now=NOW, stage="boot")
    rejecting = attrs.evolve(accepting, rejected_advisories=[verdict.advisory_ids[0].lower()])
    assert _refused(Policy(tcb=rejecting, measurements="unchecked"), verdict) == ["advisory"]


def test_an_advisory_of_the_tcb_at_present_is_refused_as_well() -> None:
    """An update of a running TD's module can bring a weakness that the module of its launch did not have."""
    verdict = verdict_of(TD15, "relaunch_advised_configuration_needed")
    assert verdict.current_advisory_ids != verdict.advisory_ids
    tcb = TcbPolicy(accepted_statuses=[verdict.tcb_status], rejected_advisories=verdict.current_advisory_ids)
    assert _refused(Policy(tcb=tcb, measurements="unchecked"), verdict) == ["advisory"]


def test_a_floor_under_the_evaluation_number() -> None:
    number = verdict_of(PLATFORM).evaluation_number
    policy = Policy(tcb=TcbPolicy(min_evaluation_number=number), measurements="unchecked")
    _ = policy.appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    policy = Policy(tcb=TcbPolicy(min_evaluation_number=number + 1), measurements="unchecked")
    assert _refused(policy, verdict_of(PLATFORM)) == ["evaluation_number"]


@pytest.mark.parametrize("name", ["dynamic_platform", "cached_keys", "smt"])
def test_flags_of_the_platform(name: str) -> None:
    tcb: Any = TcbPolicy(**{f"allow_{name}": False})  # type: ignore[arg-type]
    policy = Policy(tcb=tcb, measurements="unchecked")
    verdict = verdict_of(PLATFORM)
    if getattr(verdict.pck, name):
        assert _refused(policy, verdict) == [name]
    else:
        _ = policy.appraise(verdict, now=NOW, stage="boot")
    silent = verdict_of(SimulatedPlatform(PLATFORM.seed, ca="processor"))
    assert getattr(silent.pck, name) is None
    assert _refused(policy, silent) == [name]


OUT_OF_DATE = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE})


@pytest.mark.parametrize(
    ("fault", "name", "part"),
    [
        ("tcb_out_of_date", "platform_grace", "platform"),
        ("module_outdated", "platform_grace", "module"),
        ("qe_outdated", "qe_grace", "qe"),
    ],
)
def test_out_of_date_only_for_so_long(fault: str, name: str, part: str) -> None:
    verdict = verdict_of(PLATFORM, fault)
    age = verdict.verified_at - getattr(verdict, part).date
    for grace, codes in ((age, []), (age - 1, [name])):
        tcb: Any = TcbPolicy(accepted_statuses=OUT_OF_DATE, **{name: grace})
        policy = Policy(tcb=tcb, measurements="unchecked")
        if codes:
            assert _refused(policy, verdict) == codes
        else:
            _ = policy.appraise(verdict, now=NOW, stage="boot")
    strict = TcbPolicy(accepted_statuses=OUT_OF_DATE, platform_grace=0, qe_grace=0)
    _ = Policy(tcb=strict, measurements="unchecked").appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    cured = verdict_of(PLATFORM, "relaunch_advised")
    assert cured.platform.status == TcbStatus.OUT_OF_DATE
    relaunching = attrs.evolve(strict, accepted_statuses=OUT_OF_DATE | {TcbStatus.TD_RELAUNCH_ADVISED})
    _ = Policy(tcb=relaunching, measurements="unchecked").appraise(cured, now=NOW, stage="boot")


def test_collateral_past_its_end_only_for_so_long() -> None:
    collateral = collateral_of(PLATFORM)
    end = verified_of(PLATFORM).window[1]
    verdict = verify_genuine(
        PLATFORM.quote(bytes(64)), collateral, now=end + 10, report_data=bytes(64), root=ROOT, grace=100
    )
    assert _refused(UNCHECKED, verdict) == ["collateral_grace"]
    with pytest.raises(PolicyError, match="collateral_grace: must be a whole number"):
        _ = TcbPolicy(collateral_grace=None)  # type: ignore[arg-type]
    accepting = Policy(tcb=TcbPolicy(collateral_grace=10), measurements="unchecked")
    _ = accepting.appraise(verdict, now=end + 10, stage="boot")
    assert _refused(Policy(tcb=TcbPolicy(collateral_grace=9), measurements="unchecked"), verdict) == [
        "collateral_grace"
    ]
    with pytest.raises(AppraisalError, match=f"got {rfc3339(end + 10)}, expected at most {rfc3339(end)}"):
        _ = UNCHECKED.appraise(verdict, now=end + 10, stage="boot")


@pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)
def test_a_floor_under_the_version_of_tcb_info() -> None:
    case = next(case for case in cases("real") if case.hint == "tcb_info_v2")
    verdict = case.verify()
    assert verdict.tcb_info_version == 2
    accepting = TcbPolicy(accepted_statuses=frozenset({verdict.tcb_status}))
    _ = Policy(tcb=accepting, measurements="unchecked").appraise(verdict, now=verdict.verified_at, stage="boot")
    strict = attrs.evolve(accepting, min_tcb_info_version=3)
    assert _refused(Policy(tcb=strict, measurements="unchecked"), verdict) == ["tcb_info_version"]
    identity = IdentityPolicy(mr_seam=(bytes(48),))
    assert _refused(Policy(tcb=accepting, identity=identity, measurements="unchecked"), verdict) == ["mr_seam"]


# --- age ---

COMBINED = [POLICY, AllOf((POLICY, UNCHECKED)), AnyOf((POLICY, UNCHECKED)), parse_policy_set(b"").bind((PROFILE,))]


@pytest.mark.parametrize("policy", COMBINED, ids=lambda policy: type(policy).__name__)
def test_a_verdict_is_accepted_only_for_so_long(policy: Any) -> None:
    verdict = verdict_of(PLATFORM)
    for later, max_age in ((0, 0), (MAX_AGE, MAX_AGE), (86400, 86400)):
        accepted = policy.appraise(verdict, now=NOW + later, stage="boot", max_age=max_age)
        assert (accepted.verified_at, accepted.appraised_at) == (NOW, NOW + later)
    for options in ({"now": NOW + MAX_AGE + 1}, {"now": NOW + 1, "max_age": 0}, {"now": NOW - 1}):
        with pytest.raises(AppraisalError, match=f"verdict_age: .*got {rfc3339(NOW)}, expected at ") as caught:
            _ = policy.appraise(verdict, stage="boot", **options)
        assert [(one.part, one.code) for one in caught.value.refusals] == [("verdict", "verdict_age")]
        assert "verify the quote again" in caught.value.explain()
    with pytest.raises(TypeError, match="'now'"):
        _ = policy.appraise(verdict, stage="boot")


@pytest.mark.parametrize("policy", COMBINED, ids=lambda policy: type(policy).__name__)
def test_collateral_is_accepted_only_for_so_long(policy: Any) -> None:
    late = NOW + 86400
    options: dict[str, Any] = {"now": late, "report_data": REPORT_DATA, "root": ROOT}
    verdict = verify_genuine(PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM), **options)
    assert verdict.collateral.root_crl_issued <= verdict.collateral.issued_at == NOW
    _ = policy.appraise(verdict, now=late, stage="boot", max_collateral_age=86400)
    with pytest.raises(AppraisalError, match=f"collateral_age: .*got {rfc3339(NOW)}, expected at least ") as caught:
        _ = policy.appraise(verdict, now=late + 1, stage="boot", max_collateral_age=86400)
    assert {(one.part, one.code) for one in caught.value.refusals} == {("collateral", "collateral_age")}
    if not isinstance(policy, BoundPolicies):
        _ = verify(PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM), policy=policy, **options)
        with pytest.raises(AppraisalError, match="collateral_age"):
            _ = verify(
                PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM), policy=policy, max_collateral_age=86399, **options
            )


def test_a_policy_decides_by_the_present_time() -> None:
    """Also about what ended after the verdict was made."""
    verdict = verdict_of(PLATFORM)
    end = verdict.window[1]
    _ = POLICY.appraise(verdict, now=end, stage="boot", max_age=end - NOW)
    with pytest.raises(AppraisalError, match="collateral_grace"):
        _ = POLICY.appraise(verdict, now=end + 1, stage="boot", max_age=end + 1 - NOW)
    ended = Policy(profiles=(attrs.evolve(PROFILE, schedule=Schedule(not_after=NOW + 11)),))
    assert ended.appraise(verdict, now=NOW + 10, stage="boot").profile_state == "enforced"
    with pytest.raises(AppraisalError, match="profile"):
        _ = ended.appraise(verdict, now=NOW + 11, stage="boot")


# --- identity ---


@pytest.mark.parametrize(
    ("name", "register"),
    [
        ("mr_seam", "MRSEAM"),
        ("mr_config_id", "MRCONFIGID"),
        ("mr_owner", "MROWNER"),
        ("mr_owner_config", "MROWNERCONFIG"),
        ("ppid", None),
        ("platform_instance_id", None),
    ],
)
def test_only_who_is_on_the_list(name: str, register: str | None) -> None:
    verdict = verdict_of(PLATFORM)
    got: bytes = getattr(verdict.quote.body if register else verdict.pck, name)
    other = bytes(len(got) - 1) + b"\x07"
    listed: dict[str, Any] = {name: (other, got)}
    accepting = Policy(measurements="unchecked", identity=IdentityPolicy(**listed))
    _ = accepting.appraise(verdict, now=NOW, stage="boot")
    listed = {name: (other,)}
    refusing = Policy(measurements="unchecked", identity=IdentityPolicy(**listed))
    with pytest.raises(AppraisalError) as caught:
        _ = refusing.appraise(verdict, now=NOW, stage="boot")
    (refusal,) = caught.value.refusals
    assert (refusal.code, refusal.register, refusal.got, refusal.expected) == (name, register, got.hex(), other.hex())
    assert refusal.part == ("measurement" if register else "tcb")


def test_a_platform_that_does_not_say_who_it_is_is_on_no_list() -> None:
    silent = verdict_of(SimulatedPlatform(PLATFORM.seed, ca="processor"))
    policy = Policy(measurements="unchecked", identity=IdentityPolicy(platform_instance_id=(bytes(16),)))
    assert _refused(policy, silent) == ["platform_instance_id"]


# --- several ---

LENIENT = Policy(measurements="unchecked", attributes=AttributePolicy(unsafe_allow_debug=True))


def test_all_of_these() -> None:
    both = AllOf((UNCHECKED, POLICY))
    assert both.appraise(verdict_of(PLATFORM), now=NOW, stage="boot").profile is PROFILE
    assert _refused(AllOf((LENIENT, POLICY)), verdict_of(PLATFORM, "debug", "rtmr1")) == [
        "debug",
        "measurement_mismatch",
    ]
    assert _refused(AllOf((UNCHECKED, UNCHECKED)), verdict_of(PLATFORM, "debug")) == ["debug"]
    with pytest.raises(PolicyError, match="stage"):
        _ = both.appraise(verdict_of(PLATFORM), now=NOW, stage="later")  # type: ignore[arg-type]


OTHERS = (
    Policy(profiles=(attrs.evolve(PROFILE, name="other", mrtd=bytes(48)),)),
    Policy(measurements="unchecked", tcb=TcbPolicy(min_evaluation_number=1 << 20)),
    Policy(profiles=(PROFILE,), attributes=AttributePolicy(xfam_allowed=0x3)),
)
"""Policies that refuse an honest platform, each in another part."""


@given(st.lists(st.sampled_from([POLICY, LENIENT, UNCHECKED, *OTHERS]), min_size=1, max_size=4).map(tuple))
def test_all_is_every_one_and_any_is_one_in_whatever_order(policies: tuple[AnyPolicy, ...]) -> None:
    verdict = verdict_of(PLATFORM)
    reasons = [_reasons(policy, verdict) for policy in policies]
    every = list(dict.fromkeys(refusal for refusals in reasons for refusal in refusals))
    assert _reasons(AllOf(policies), verdict) == every
    assert _reasons(AnyOf(policies), verdict) == ([] if [] in reasons else every)


def _reasons(policy: AnyPolicy, verdict: Verdict) -> list[Refusal]:
    try:
        _ = policy.appraise(verdict, now=NOW, stage="boot")
    except AppraisalError as exc:
        return list(exc.refusals)
    return []


def test_any_of_these() -> None:
    debug = verdict_of(PLATFORM, "debug")
    either = AnyOf((POLICY, LENIENT))
    assert either.appraise(verdict_of(PLATFORM), now=NOW, stage="boot").profile is PROFILE
    assert either.appraise(debug, now=NOW, stage="boot").matched is None
    assert _refused(AnyOf((POLICY, UNCHECKED)), debug) == ["debug"]
    assert _refused(AllOf((either, AnyOf((POLICY,)))), debug) == ["debug"]


def test_an_explanation_for_operators() -> None:
    with pytest.raises(AppraisalError) as caught:
        _ = POLICY.appraise(verdict_of(PLATFORM, "debug", "tcb_out_of_date", "rtmr1"), now=NOW, stage="boot")
    text = caught.value.explain()
    assert "\n" not in text
    assert text.startswith(
        "The quote is genuine (it passed steps 1-25, 27-37), but the policy does not accept it, for 3"
    )
    assert all(refusal.detail[1:] in text for refusal in caught.value.refusals)
    assert all(about in text for about in ("about the machine", "how the TD is started", "what runs in the TD"))
    with pytest.raises(AppraisalError) as caught:
        _ = POLICY.appraise(verdict_of(PLATFORM, "debug"), now=NOW, stage="boot")
    assert "for one reason. The TD can be debugged" in caught.value.explain()
    assert "about the machine" not in caught.value.explain()


def _explained(policy: AnyPolicy, verdict: Verdict) -> str:
    with pytest.raises(AppraisalError) as caught:
        _ = policy.appraise(verdict, now=verdict.verified_at, stage="boot")
    return caught.value.explain()


@pytest.mark.parametrize(
    "tcb", [TcbPolicy(min_evaluation_number=1 << 20), TcbPolicy(collateral_grace=0)], ids=["number", "grace"]
)
def test_fresh_collateral_is_what_old_collateral_asks_for(tcb: TcbPolicy) -> None:
    now = verified_of(PLATFORM).window[1] + 1
    verdict = verify_genuine(
        PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM), now=now, report_data=None, root=ROOT, grace=1
    )
    text = _explained(Policy(tcb=tcb, measurements="unchecked"), verdict)
    assert "`chutes-proto collateral fetch`" in text
    assert "about the machine" not in text


def test_the_cure_for_no_profiles_is_a_policy() -> None:
    text = _explained(Policy(), verdict_of(PLATFORM, "tcb_out_of_date"))
    assert "`[[profile]]`" in text
    assert '`measurements = "unchecked"`' in text
    assert "about the machine" in text
    assert "run the image" not in text


# --- attributes ---


def _codes(refusals: list[Refusal]) -> list[str]:
    return [refusal.code for refusal in refusals]


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_the_attributes(bit: int) -> None:
    """Bits 16, 27, 28, 30, 31, 62 and 63 are free, 18 to 22 if allowed; all others have a reason to be refused."""
    report = _report(td_attributes=TdAttributes.SEPT_VE_DISABLE | 1 << bit)
    free, unnamed = {16, 27, 28, 30, 31, 62, 63}, {18, 19, 20, 21, 22}
    named = {0: "debug", 4: "profiling", 5: "profiling", 6: "profiling", 17: "servtd_ext", 29: "migratable"}
    named |= dict.fromkeys(unnamed, "td_attributes")
    codes = [] if bit in free else [named.get(bit, "td_attributes_reserved")]
    assert _codes(AttributePolicy().refusals(report)) == codes
    assert bool(RESERVED >> bit & 1) == (bit not in free and bit not in named)
    every = AttributePolicy(attributes_allowed=(1 << 64) - 1)
    assert _codes(every.refusals(report)) == ([] if bit in unnamed else codes)
    none_else = AttributePolicy(attributes_allowed=int(TdAttributes.SEPT_VE_DISABLE))
    assert ("td_attributes" in _codes(none_else.refusals(report))) == (not RESERVED >> bit & 1 and bit != 28)


@pytest.mark.parametrize(
    ("xfam", "accepted"),
    [
        (0x3, True),
        (0x6DBE7, True),
        (0x602E7, True),
        (0, False),
        (0x1, False),
        (0x2, False),
        (0x13, False),
        (1 << 63 | 3, False),
    ],
)
def test_xfam(xfam: int, accepted: bool) -> None:
    assert _codes(AttributePolicy().refusals(_report(xfam=xfam))) == ([] if accepted else ["xfam"])
    assert AttributePolicy(xfam_required=0, xfam_allowed=(1 << 64) - 1).refusals(_report(xfam=xfam)) == []


SEPT = int(TdAttributes.SEPT_VE_DISABLE)
MIGRATABLE = SEPT | int(TdAttributes.MIGRATABLE)
LISTED = {"mr_service_td": (SERVICE_TD,)}


@pytest.mark.parametrize(
    ("allowed", "attributes", "bound", "codes"),
    [
        ({}, SEPT, bytes(48), []),
        ({}, SEPT, SERVICE_TD, ["service_td"]),
        ({}, MIGRATABLE, bytes(48), ["migratable"]),
        ({}, MIGRATABLE, SERVICE_TD, ["migratable", "service_td"]),
        ({"service_td": "allowed", **LISTED}, SEPT, SERVICE_TD, []),
        ({"service_td": "allowed", **LISTED}, SEPT, bytes(48), []),
        ({"service_td": "allowed", **LISTED}, SEPT, b"\x52" * 48, ["service_td"]),
        ({"service_td": "allowed", **LISTED}, MIGRATABLE, SERVICE_TD, ["migratable"]),
        ({"migratable": "allowed", **LISTED}, MIGRATABLE, SERVICE_TD, []),
        ({"migratable": "allowed", **LISTED}, MIGRATABLE, bytes(48), ["service_td"]),
        ({"migratable": "allowed", **LISTED}, MIGRATABLE, b"\x52" * 48, ["service_td"]),
        ({"migratable": "allowed", **LISTED}, SEPT, SERVICE_TD, ["service_td"]),
        ({"servtd_ext": "allowed"}, SEPT | int(TdAttributes.SERVTD_EXT), bytes(48), []),
    ],
)
def test_who_may_hold_a_td(allowed: dict[str, Any], attributes: int, bound: bytes, codes: list[str]) -> None:
    report = _report(td_attributes=attributes, mr_service_td=bound)
    assert _codes(AttributePolicy(**allowed).refusals(report)) == codes


def test_a_migratable_td_must_say_to_whom() -> None:
    """A TD 1.0 report has no MRSERVICETD, so nothing vouches for who moves the TD."""
    policy = AttributePolicy(migratable="allowed", **LISTED)  # type: ignore[arg-type]
    body = verdict_of(PLATFORM, "migratable").quote.body
    assert isinstance(body, TdReport10)
    assert _codes(policy.refusals(body)) == ["service_td"]


# --- what cannot be a policy ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: AttributePolicy(sept_ve_disable="Any"),  # type: ignore[arg-type]
        lambda: AttributePolicy(migratable="yes"),  # type: ignore[arg-type]
        lambda: AttributePolicy(migratable="allowed"),
        lambda: AttributePolicy(service_td="allowed"),
        lambda: AttributePolicy(mr_service_td=(SERVICE_TD,)),
        lambda: AttributePolicy(service_td="allowed", mr_service_td=(bytes(48),)),
        lambda: AttributePolicy(service_td="allowed", mr_service_td=(b"\1" * 47,)),
        lambda: AttributePolicy(service_td="allowed", mr_service_td=[SERVICE_TD]),  # type: ignore[arg-type]
        lambda: AttributePolicy(unsafe_allow_debug=1),  # type: ignore[arg-type]
        lambda: AttributePolicy(xfam_allowed=1 << 64 | 3),
        lambda: AttributePolicy(xfam_allowed=-1),
        lambda: AttributePolicy(xfam_allowed=0x6DBE4),
        lambda: TcbPolicy(accepted_statuses=frozenset()),
        lambda: TcbPolicy(accepted_statuses={"UpToDate", "Uptodate"}),
        lambda: TcbPolicy(accepted_statuses="UpToDate"),
        lambda: TcbPolicy(accepted_statuses={TcbStatus.REVOKED}),
        lambda: TcbPolicy(rejected_advisories="INTEL-SA-00837"),
        lambda: TcbPolicy(rejected_advisories=["INTEL-SA-837"]),
        lambda: TcbPolicy(rejected_advisories=["INTEL-SA-00837", "INTLE-SA-00837"]),
        lambda: TcbPolicy(rejected_advisories=["INTEL-AS-00837"]),
        lambda: TcbPolicy(rejected_advisories=["SIMULATED-SA-00837"]),
        lambda: TcbPolicy(rejected_advisories=["INTEL-SA-00837\n"]),
        lambda: TcbPolicy(rejected_advisories=5),
        lambda: TcbPolicy(min_evaluation_number=-1),
        lambda: TcbPolicy(evaluation_numbers="some"),  # type: ignore[arg-type]
        lambda: TcbPolicy(min_evaluation_number=True),
        lambda: TcbPolicy(allow_smt="no"),  # type: ignore[arg-type]
        lambda: TcbPolicy(min_tcb_info_version=4),
        lambda: TcbPolicy(min_tcb_info_version=True),
        lambda: TcbPolicy(platform_grace=1),
        lambda: TcbPolicy(qe_grace=1),
        lambda: TcbPolicy(accepted_statuses=["OutOfDate"], qe_grace=-1),
        lambda: TcbPolicy(collateral_grace=-1),
        lambda: TcbPolicy(collateral_grace=True),
        lambda: IdentityPolicy(ppid=()),
        lambda: IdentityPolicy(mr_signer=(bytes(32),), isv_prod_id=()),
        lambda: IdentityPolicy(mr_signer=(bytes(32),), isv_prod_id=(65536,)),
        lambda: IdentityPolicy(mr_signer=(bytes(32),), min_isv_svn=65536),
        lambda: IdentityPolicy(ppid=(bytes(15),)),
        lambda: IdentityPolicy(mr_seam=bytes(48)),  # type: ignore[arg-type]
        lambda: IdentityPolicy(mr_owner=("00" * 48,)),  # type: ignore[arg-type]
        lambda: AllOf(()),
        lambda: AnyOf(()),
        lambda: AllOf([UNCHECKED]),  # type: ignore[arg-type]
        lambda: AnyOf((TcbPolicy(),)),  # type: ignore[arg-type]
        lambda: Policy(tcb=None),  # type: ignore[arg-type]
        lambda: Policy(profiles=[PROFILE]),  # type: ignore[arg-type]
        lambda: Policy(profiles=("8xh200",)),  # type: ignore[arg-type]
        lambda: Policy(identity=AttributePolicy()),  # type: ignore[arg-type]
        lambda: Policy(measurements="none"),  # type: ignore[arg-type]
        lambda: Policy(measurements="unchecked", profiles=(PROFILE,)),
        lambda: Policy(profiles=(PROFILE, PROFILE)),
    ],
)
def test_what_contradicts_itself_is_no_policy(make: Any) -> None:
    with pytest.raises(PolicyError):
        _ = make()


# --- TOML ---


def _registers(values: tuple[bytes, ...]) -> str:
    return "{" + ", ".join(f'rtmr{index} = "{value.hex()}"' for index, value in enumerate(values)) + "}"


PROFILE_TOML = f"""
[[profile]]
name = "simulated"
version = "1"
mrtd = "{PROFILE.mrtd.hex()}"
boot = {_registers(PROFILE.boot)}
runtime = {_registers(PROFILE.runtime)}
"""


def test_an_empty_file_is_the_default() -> None:
    assert parse_policy_toml(b"") == Policy()


def test_everything_that_a_file_can_say() -> None:
    text = f"""
        [tcb]
        accepted_statuses = ["UpToDate", "OutOfDate"]
        rejected_advisories = ["INTEL-SA-00837"]
        min_evaluation_number = 17
        evaluation_numbers = "any"
        allow_dynamic_platform = false
        allow_cached_keys = false
        allow_smt = false
        min_tcb_info_version = 3
        platform_grace = 86400
        qe_grace = 0
        collateral_grace = 3600
        [identity]
        mr_seam = ["{MR.hex()}"]
        mr_config_id = ["{MR.hex()}", "{bytes(48).hex()}"]
        mr_owner = ["{MR.hex()}"]
        mr_owner_config = ["{MR.hex()}"]
        ppid = ["{MR[:16].hex()}"]
        platform_instance_id = ["{MR[:16].hex()}"]
        [attributes]
        sept_ve_disable = "any"
        migratable = "allowed"
        servtd_ext = "allowed"
        service_td = "allowed"
        mr_service_td = ["{SERVICE_TD.hex()}"]
        xfam_required = 0x7
        xfam_allowed = 0xE7
        unsafe_allow_debug = true
        """
    expected = Policy(
        tcb=TcbPolicy(
            accepted_statuses=frozenset({TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE}),
            rejected_advisories=frozenset({"INTEL-SA-00837"}),
            min_evaluation_number=17,
            evaluation_numbers="any",
            allow_dynamic_platform=False,
            allow_cached_keys=False,
            allow_smt=False,
            min_tcb_info_version=3,
            platform_grace=86400,
            qe_grace=0,
            collateral_grace=3600,
        ),
        identity=IdentityPolicy(
            mr_seam=(MR,),
            mr_config_id=(MR, bytes(48)),
            mr_owner=(MR,),
            mr_owner_config=(MR,),
            ppid=(MR[:16],),
            platform_instance_id=(MR[:16],),
        ),
        attributes=AttributePolicy(
            sept_ve_disable="any",
            migratable="allowed",
            servtd_ext="allowed",
            service_td="allowed",
            mr_service_td=(SERVICE_TD,),
            xfam_required=0x7,
            xfam_allowed=0xE7,
            unsafe_allow_debug=True,
        ),
        profiles=(PROFILE,),
    )
    assert parse_policy_toml((text + PROFILE_TOML).encode()) == expected
    assert parse_policy_toml(b'measurements = "unchecked"') == UNCHECKED


def test_text_is_read_as_its_bytes_are() -> None:
    assert parse_policy_toml(PROFILE_TOML) == parse_policy_toml(PROFILE_TOML.encode()) == POLICY
    with pytest.raises(PolicyError, match="not TOML"):
        _ = parse_policy_toml("measurements = '\ud800'")


def test_the_reference_shows_the_defaults() -> None:
    page = (PROJECT / "docs/reference/policies.md").read_text("utf-8")
    block = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0]
    assert parse_policy_toml(block.encode()) == Policy()
    parts: list[type[Any]] = [TcbPolicy, IdentityPolicy, AttributePolicy]
    assert all(field.name in block for part in parts for field in attrs.fields(part))


def test_keys_of_the_callers_may_stand_in_profiles() -> None:
    text = (PROFILE_TOML + 'root_passphrase = "vm"').encode()
    assert parse_policy_toml(text, extra_keys=frozenset({"root_passphrase"})) == POLICY
    with pytest.raises(PolicyError, match="root_passphrase"):
        _ = parse_policy_toml(text)


def test_policies_of_policies() -> None:
    text = f"""
        [[any_of]]
        measurements = "unchecked"
        identity = {{ ppid = ["{PLATFORM.ppid.hex()}"] }}
        [[any_of]]
        [[any_of.all_of]]
        {PROFILE_TOML.replace("[[profile]]", "[[any_of.all_of.profile]]")}
        [[any_of.all_of]]
        measurements = "unchecked"
        tcb = {{ min_tcb_info_version = 3 }}
        """
    known = Policy(measurements="unchecked", identity=IdentityPolicy(ppid=(PLATFORM.ppid,)))
    measured = AllOf((POLICY, Policy(measurements="unchecked", tcb=TcbPolicy(min_tcb_info_version=3))))
    policy = parse_policy_toml(text.encode())
    assert policy == AnyOf((known, measured))
    assert policy.appraise(verdict_of(PLATFORM, "rtmr1"), now=NOW, stage="boot").matched is None
    stranger = PLATFORM.another(1)
    assert policy.appraise(verdict_of(stranger), now=NOW, stage="boot").profile == PROFILE
    assert _refused(policy, verdict_of(stranger, "rtmr1")) == ["ppid", "measurement_mismatch"]


def test_an_empty_policy_among_others_accepts_nothing() -> None:
    assert _refused(parse_policy_toml(b"[[any_of]]"), verdict_of(PLATFORM)) == ["no_profiles"]


def test_policies_of_policies_have_a_bottom() -> None:
    def nested(levels: int) -> bytes:
        return ("any_of = [{" * levels + "}]" * levels).encode()

    assert parse_policy_toml(nested(MAX_DEPTH))
    with pytest.raises(PolicyError, match=f"more than {MAX_DEPTH} levels"):
        _ = parse_policy_toml(nested(MAX_DEPTH + 1))
    for levels in (100, 10_000):
        with pytest.raises(PolicyError):
            _ = parse_policy_toml(nested(levels))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("any_of = []", "any_of"),
        ("any_of = 1", "any_of"),
        ("any_of = [1]", "any_of: 0"),
        ("anyof = []", "anyof"),
        ("[any_of]", "any_of"),
        ("[[any_of]]\n[[any_of]]\n[any_of.tbc]", "any_of 2: tbc"),
        ("[[any_of]]\n[any_of.tcb]\nallow_smt = 0", "any_of 1: tcb.allow_smt"),
        ('[[any_of]]\n[[any_of.all_of]]\nmeasurements = "none"', "any_of 1: all_of 1: measurements"),
        ("[[any_of]]\nany_of = []", "any_of 1: any_of"),
        ("[tcb]\n[[any_of]]", "tcb"),
        ("[[all_of]]\n[[any_of]]", "any_of"),
        ("[[any_of]]\n[[any_of.profile]]\nname = 1", "any_of 1: profile 1: name"),
        (
            "[[any_of]]\n" + PROFILE_TOML.replace("[[profile]]", "[[any_of.profile]]") + "x = 1",
            "any_of 1: profile 'simulated': x",
        ),
        ("tbc = 1", "tbc"),
        ("tcb = 1", "tcb"),
        ('measurements = "none"', "measurements"),
        ("[tcb]\naccepted_status = []", "tcb.accepted_status"),
        ("[tcb]\naccepted_statuses = [[]]", "tcb.accepted_statuses.0"),
        ("[tcb]\nrejected_advisories = [1]", "tcb.rejected_advisories.0"),
        ('[tcb]\nmin_evaluation_number = "17"', "tcb.min_evaluation_number"),
        ('[tcb]\ncollateral_grace = "1 h"', "tcb.collateral_grace"),
        ('[identity]\nppids = ["00"]', "identity.ppids"),
        ('[identity]\nmr_owner = "00"', "identity.mr_owner"),
        ('[attributes]\nsept_ve_disabled = "any"', "attributes.sept_ve_disabled"),
        ("[attributes]\nmr_service_td = [1]", "attributes.mr_service_td.0"),
        ('[attributes]\nunsafe_allow_debug = "yes"', "attributes.unsafe_allow_debug"),
        (
            PROFILE_TOML + "[profile.attributes]\nunsafe_allow_debug = true",
            "profile 'simulated': attributes.unsafe_allow_debug",
        ),
        ("= 1", "TOML"),
        ("a = 1\na = 1", "TOML"),
        ("\0", "TOML"),
    ],
)
def test_an_error_names_the_key(text: str, key: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _ = parse_policy_toml(text.encode())
    assert str(caught.value).startswith((key + ":", f"not {key}"))


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    try:
        policy = parse_policy_toml(data)
    except PolicyError:
        return
    assert isinstance(policy, Policy)
    assert policy.tcb.accepted_statuses == {TcbStatus.UP_TO_DATE}
