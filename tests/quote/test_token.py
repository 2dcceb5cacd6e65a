"""What a verdict says to others: how far a platform is behind, Intel's supplemental data, plain data and tokens."""

from __future__ import annotations

import json
import sys
from hashlib import sha384
from typing import Any

import jwt
import pytest
from attrs import evolve
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

from chutes_proto.quote import AppraisalError, Policy, PolicyError, make_ear, sign_ear
from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._behind import Lack
from chutes_proto.quote._measurements import RegisterRule
from chutes_proto.quote._policy import TcbPolicy
from chutes_proto.quote._statements import TcbStatus
from tests.quote.cases import ABSENT, FOLDER, cases
from tests.quote.simulated import NOW, PLATFORM, PROFILE, ROOT, TD15, verdict_of

POLICY = Policy(profiles=(PROFILE,))
NEWEST = 1755043200  # 2025-08-13


def test_what_is_up_to_date_is_not_behind() -> None:
    assert verdict_of(PLATFORM).behind() == ()


@pytest.mark.parametrize(
    ("fault", "part", "next_status", "lacks"),
    [
        ("tcb_sw_hardening_needed", "platform", "UpToDate", [("TDX TCB component 3", 7, 8)]),
        ("tcb_out_of_date", "platform", "ConfigurationAndSWHardeningNeeded", [("TDX TCB component 3", 4, 5)]),
        ("module_outdated", "TDX module", "UpToDate", [("ISVSVN", 4, 6)]),
        ("qe_outdated", "quoting enclave", "UpToDate", [("ISVSVN", 4, 6)]),
    ],
)
def test_what_each_part_lacks(fault: str, part: str, next_status: str, lacks: list[tuple[str, int, int]]) -> None:
    (behind,) = verdict_of(PLATFORM, fault).behind()
    assert (behind.part, behind.next_status) == (part, next_status)
    assert behind.lacks == tuple(Lack(*lack) for lack in lacks)
    assert behind.advisory_ids == (f"SIMULATED-SA-{behind.status}",)
    assert behind.since in (NEWEST, 1710288000)


def test_the_present_tcb_has_advisories_of_its_own() -> None:
    cured = verdict_of(TD15, "relaunch_advised_configuration_needed")
    assert cured.advisory_ids == ("SIMULATED-SA-OutOfDate",)
    assert cured.current_advisory_ids == ("SIMULATED-SA-ConfigurationNeeded",)
    assert cured.supplemental()["sa_list_current"] == cured.current_advisory_ids
    assert verdict_of(PLATFORM).current_advisory_ids == ()


def test_intels_supplemental_data() -> None:
    verdict = verdict_of(PLATFORM, "tcb_out_of_date")
    data = verdict.supplemental()
    assert data["root_key_id"] == sha384(b"\x04" + ROOT.point).digest()
    assert (data["tcb_eval_ref_num"], data["pck_crl_num"], data["latest_issue_date"]) == (20, 1, NOW)
    assert (data["tcb_status"], data["tcb_status_current"], data["sa_list"]) == (
        "OutOfDate",
        "OutOfDate",
        ("SIMULATED-SA-OutOfDate",),
    )
    assert data["earliest_expiration_date"] == verdict.window[1]
    assert (data["pck_ppid"], data["dynamic_platform"]) == (PLATFORM.ppid, True)


def test_plain_data() -> None:
    said = json.loads(json.dumps(verdict_of(PLATFORM).to_dict()))
    assert (said["tcb_status"], said["behind"], said["root"]) == ("UpToDate", [], ROOT.digest.hex())
    assert "profile" not in said
    said = json.loads(json.dumps(POLICY.appraise(verdict_of(PLATFORM), now=NOW, stage="boot").to_dict()))
    assert (said["profile"], said["stage"], said["unpinned"]) == ({"name": "simulated", "version": "1"}, "boot", [])
    late = json.loads(json.dumps(verdict_of(PLATFORM, "qe_outdated").to_dict()))
    assert late["behind"][0]["lacks"] == [{"component": "ISVSVN", "got": 4, "needed": 6}]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)
def test_real_verdicts_too() -> None:
    found = 0
    for case in cases("real"):
        if case.strict[0] != "ok":
            continue
        verdict = case.verify()
        assert json.loads(json.dumps(verdict.to_dict()))["tcb_status"] == verdict.tcb_status
        assert verdict.supplemental()["tcb_status"] == verdict.tcb_status
        for part in verdict.behind():
            found += 1
            assert part.lacks
            assert part.next_status != part.status
            assert all(lack.got < lack.needed for lack in part.lacks)
            assert part.since <= case.now
    assert found > 0


# --- EAR ---


def test_an_accepted_verdict_is_affirming() -> None:
    accepted = POLICY.appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    claims = make_ear(accepted, policy_id="urn:example:policy", nonce="12345678")
    assert (claims["eat_profile"], claims["iat"]) == ("tag:github.com,2023:veraison/ear", NOW)
    assert (claims["eat_nonce"], claims["ear.verifier-id"]["build"][:12]) == ("12345678", "chutes-proto")
    appraisal = claims["submods"]["tdx"]
    assert appraisal["ear.status"] == "affirming"
    assert appraisal["ear.trustworthiness-vector"] == {"hardware": 2, "configuration": 2, "executables": 3}
    assert appraisal["ear.appraisal-policy-id"] == "urn:example:policy"
    assert appraisal["ear.veraison.annotated-evidence"] == accepted.to_dict()
    with pytest.raises(PolicyError, match="nonce"):
        _ = make_ear(accepted, policy_id="p", nonce="1234567")


@pytest.mark.parametrize(
    ("faults", "vector"),
    [
        (("rtmr1",), {"hardware": 2, "configuration": 2, "executables": 96}),
        (("debug", "tcb_out_of_date"), {"hardware": 32, "configuration": 96}),
        (("sept_ve_disable_clear",), {"hardware": 2, "configuration": 32}),
    ],
)
def test_a_refused_one_is_contraindicated(faults: tuple[str, ...], vector: dict[str, int]) -> None:
    verdict = verdict_of(PLATFORM, *faults)
    with pytest.raises(AppraisalError) as caught:
        _ = POLICY.appraise(verdict, now=NOW, stage="boot")
    appraisal = make_ear(verdict, policy_id="p", refused=caught.value)["submods"]["tdx"]
    assert appraisal["ear.status"] == "contraindicated"
    assert appraisal["ear.trustworthiness-vector"] == vector
    told = appraisal["ear.veraison.policy-claims"]["refusals"]
    assert [one["code"] for one in told] == [one.code for one in caught.value.refusals]


def test_hardware_that_is_refused_is_not_affirmed() -> None:
    """Its TCB is up to date, and not new enough for this policy."""
    verdict = verdict_of(PLATFORM)
    with pytest.raises(AppraisalError, match="tcb_date") as caught:
        _ = Policy(tcb=TcbPolicy(min_tcb_date=NOW), profiles=(PROFILE,)).appraise(verdict, now=NOW, stage="boot")
    appraisal = make_ear(verdict, policy_id="p", refused=caught.value)["submods"]["tdx"]
    assert appraisal["ear.trustworthiness-vector"] == {"hardware": 32, "configuration": 2}


def test_nothing_is_affirmed_that_nobody_appraised_or_pinned() -> None:
    for faults, vector in (((), {"hardware": 2}), (("debug",), {"hardware": 2, "configuration": 96})):
        appraisal = make_ear(verdict_of(PLATFORM, *faults), policy_id="p")["submods"]["tdx"]
        assert (appraisal["ear.status"], appraisal["ear.trustworthiness-vector"]) == ("none", vector)
    rule = RegisterRule(register="RTMR1", stage="boot", check="any")
    zero = evolve(PROFILE, boot=(PROFILE.boot[0], bytes(48), *PROFILE.boot[2:]), rules=(rule,))
    accepted = Policy(profiles=(zero,)).appraise(verdict_of(PLATFORM, "rtmr1"), now=NOW, stage="boot")
    appraisal = make_ear(accepted, policy_id="p")["submods"]["tdx"]
    assert "executables" not in appraisal["ear.trustworthiness-vector"]
    assert appraisal["ear.veraison.annotated-evidence"]["unpinned"] == ["RTMR1"]
    late = TcbPolicy(accepted_statuses=frozenset({TcbStatus.OUT_OF_DATE}))
    accepted = Policy(tcb=late, profiles=(PROFILE,)).appraise(
        verdict_of(PLATFORM, "tcb_out_of_date"), now=NOW, stage="boot"
    )
    assert make_ear(accepted, policy_id="p")["submods"]["tdx"]["ear.trustworthiness-vector"]["hardware"] == 32


@pytest.mark.parametrize(
    ("fault", "policy", "status"),
    [
        (
            "tcb_out_of_date",
            Policy(tcb=TcbPolicy(accepted_statuses=[TcbStatus.OUT_OF_DATE]), profiles=(PROFILE,)),
            "warning",
        ),
        ("debug", Policy(attributes=AttributePolicy(unsafe_allow_debug=True), profiles=(PROFILE,)), "contraindicated"),
    ],
)
def test_no_status_is_better_than_the_worst_claim(fault: str, policy: Policy, status: str) -> None:
    """A reader that looks at the status alone must not take a TD that its host can read for a good one."""
    accepted = policy.appraise(verdict_of(PLATFORM, fault), now=NOW, stage="boot")
    appraisal = make_ear(accepted, policy_id="p")["submods"]["tdx"]
    assert appraisal["ear.status"] == status


def test_what_one_policy_accepts_and_another_refuses_is_not_affirmed() -> None:
    accepted = POLICY.appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    with pytest.raises(AppraisalError) as caught:
        _ = Policy().appraise(accepted, now=NOW, stage="boot")
    appraisal = make_ear(accepted, policy_id="p", refused=caught.value)["submods"]["tdx"]
    assert appraisal["ear.status"] == "contraindicated"
    assert appraisal["ear.trustworthiness-vector"]["executables"] == 96


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (ec.generate_private_key(ec.SECP256R1()), "ES256"),
        (ec.generate_private_key(ec.SECP384R1()), "ES384"),
        (ec.generate_private_key(ec.SECP521R1()), "ES512"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
def test_a_signed_token_is_read_by_others(key: Any, algorithm: str) -> None:
    claims = make_ear(POLICY.appraise(verdict_of(PLATFORM), now=NOW, stage="boot"), policy_id="p")
    token = sign_ear(claims, key, key_id="1")
    header = jwt.get_unverified_header(token)
    assert header == {"alg": algorithm, "kid": "1", "typ": "eat+jwt"}
    read = jwt.decode(token, key.public_key(), algorithms=[algorithm], options={"verify_iat": False})
    assert read == json.loads(json.dumps(claims))
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(jwt.InvalidTokenError):
        _ = jwt.decode(token, other, algorithms=["ES256"], options={"verify_iat": False})


def test_a_key_of_another_kind_signs_nothing() -> None:
    wrong: Any = x25519.X25519PrivateKey.generate()
    with pytest.raises(PolicyError, match="key: must be a private key"):
        _ = sign_ear({}, wrong)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ModuleNotFoundError, match=r"chutes-proto\[token\]"):
        _ = sign_ear({}, ec.generate_private_key(ec.SECP256R1()))
