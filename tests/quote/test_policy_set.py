"""Policy files with exceptions: who is judged by which policy, hostile files, and every rule in words."""

from __future__ import annotations

import itertools
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote._attributes import ATTRIBUTES_KNOWN, AttributePolicy
from chutes_proto.quote._errors import AppraisalError, PolicyError
from chutes_proto.quote._files import MAX_SIZE
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._measurements import RegisterRule
from chutes_proto.quote._policy import AllOf, AnyOf, Policy, TcbPolicy
from chutes_proto.quote._policy_set import MOST, BoundPolicies, PolicySet, leaves, parse_policy_set
from chutes_proto.quote._policy_words import explain, explain_set, policy_notes
from chutes_proto.quote._statements import TcbStatus
from tests.conftest import ROOT as PROJECT
from tests.quote.simulated import NOW, PLATFORM, PROFILE, verdict_of

OTHER = attrs.evolve(PROFILE, name="other", mrtd=bytes(48))
STALE = verdict_of(PLATFORM, "tcb_out_of_date")
OUTDATED = 'tcb.accepted_statuses = ["UpToDate", "OutOfDate"]'
FLOOR = "tcb.min_evaluation_number = 18"
NOBODY = f'identity.ppid = ["{"07" * 16}"]'


def _accepts(text: str, **who: Any) -> bool:
    """Whether a file's policies, with two profiles, accept a platform that is out of date."""
    try:
        _ = parse_policy_set(text).bind((OTHER, PROFILE)).appraise(STALE, now=NOW, stage="boot", **who)
    except AppraisalError as exc:
        assert {refusal.code for refusal in exc.refusals} <= {"tcb_status", "ppid"}  # of the profile that matches
        return False
    return True


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("", False),
        (OUTDATED, True),
        (f"[per_profile.simulated]\n{OUTDATED}", True),
        (f"[per_profile.'simulated 1']\n{OUTDATED}", True),
        (f"[per_profile.'simulated 2']\n{OUTDATED}", False),
        (f"[per_profile.other]\n{OUTDATED}", False),
        (f"{OUTDATED}\n[per_profile.simulated]\n{NOBODY}", False),
        (f"{OUTDATED}\n[per_profile.other]\n{NOBODY}", True),
        # key by key: the exception leaves the default's other keys in force
        (f"{NOBODY}\n[per_profile.simulated]\n{OUTDATED}", False),
        # that of name and version comes after that of the name
        (
            "[per_profile.simulated]\n"
            + OUTDATED
            + '\n[per_profile."simulated 1".tcb]\naccepted_statuses = ["UpToDate"]',
            False,
        ),
        # any_of says all
        (f"{NOBODY}\n[per_profile.simulated]\n[[per_profile.simulated.any_of]]\n{OUTDATED}", True),
        (f"[[any_of]]\n{NOBODY}\n[per_profile.simulated]\n{OUTDATED}", True),
    ],
)
def test_the_policy_of_a_profile(text: str, accepted: bool) -> None:
    assert _accepts(text) == accepted


@pytest.mark.parametrize(
    ("text", "claimed", "proven"),
    [
        (f"[per_hotkey.me]\n{OUTDATED}", False, True),  # a claim loosens nothing
        (f"{OUTDATED}\n[per_hotkey.me]\n{NOBODY}", False, False),  # and escapes nothing
        (f"{OUTDATED}\n[per_hotkey.me]\n{OUTDATED}", True, True),
        (f"[per_hotkey.you]\n{OUTDATED}", False, False),
        (f"[per_profile.simulated]\n{NOBODY}\n[per_hotkey.me]\n{OUTDATED}", False, False),
    ],
)
def test_the_policy_of_a_hotkey_is_for_who_proves_it(text: str, claimed: bool, proven: bool) -> None:
    assert _accepts(text, claimed="me") == claimed
    assert _accepts(text, claimed="me", proven="me") == proven
    assert _accepts(text, claimed="another") == (text.startswith(OUTDATED))


def test_a_claimed_hotkey_gets_no_profile_that_the_default_refuses() -> None:
    """Two profiles accept this TD: the default by one, the exception by both, of which the first is another."""
    twin = attrs.evolve(PROFILE, name="twin", attributes=AttributePolicy(sept_ve_disable="any"))
    mine = f'[per_hotkey.me]\nidentity.ppid = ["{PLATFORM.ppid.hex()}"]'
    bound = parse_policy_set(f"{OUTDATED}\n[per_profile.twin]\n{NOBODY}\n{mine}").bind((twin, PROFILE))
    assert bound.appraise(STALE, now=NOW, stage="boot", proven="me").profile == twin
    for claimed in (None, "me"):
        assert bound.appraise(STALE, now=NOW, stage="boot", claimed=claimed).profile == PROFILE
    texts = (f"[per_profile.{name}]\n{OUTDATED}" for name in ("simulated", "twin"))
    default, own = (parse_policy_set(text).bind((twin, PROFILE))._groups[None] for text in texts)
    apart = BoundPolicies((twin, PROFILE), {None: default, "me": own})
    assert apart.appraise(STALE, now=NOW, stage="boot").profile == PROFILE
    assert apart.appraise(STALE, now=NOW, stage="boot", proven="me").profile == twin
    with pytest.raises(AppraisalError, match="TCB status"):
        _ = apart.appraise(STALE, now=NOW, stage="boot", claimed="me")


def test_the_refusals_are_those_of_the_nearest_profile() -> None:
    bound = parse_policy_set("[per_profile.other]\ntcb.allow_smt = false").bind((OTHER, PROFILE))
    with pytest.raises(AppraisalError) as caught:
        _ = bound.appraise(verdict_of(PLATFORM, "rtmr0"), now=NOW, stage="boot")
    assert [(one.code, one.register) for one in caught.value.refusals] == [("measurement_mismatch", "RTMR0")]
    with pytest.raises(AppraisalError) as caught:
        _ = PolicySet().bind(()).appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    assert [one.code for one in caught.value.refusals] == ["no_profiles"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("[tcb]\nacepted_statuses = []", "tcb.acepted_statuses: Unknown key; did you mean accepted_statuses?"),
        (
            "[per_hotkey.a.tcb]\nallow_smtt = true",
            "per_hotkey.'a': tcb.allow_smtt: Unknown key; did you mean allow_smt?",
        ),
        ("[per_hotkeys.a]", "per_hotkeys: Unknown key"),
        ("tcb.platform_grace = 1", "tcb.platform_grace: goes with an OutOfDate status"),
        # only together do these two contradict each other
        (
            f"{OUTDATED}\n[per_profile.a]\ntcb.qe_grace = 1\n[per_hotkey.b]\ntcb.accepted_statuses = ['UpToDate']",
            "per_profile.'a' with per_hotkey.'b': tcb.qe_grace: goes with an OutOfDate status",
        ),
        ("[per_profile.a]\n[per_profile.a]", "not TOML"),
        ("tcb = { allow_smt = 1 }", "tcb.allow_smt: Input should be a valid boolean"),
        ("tcb.min_tcb_date = '2025-01-01'", "must be a date like 2025-08-13, without quotes"),
        ("per_profile = 1", "per_profile: Input should be a table of names and values"),
        ("per_profile.a = 1", "per_profile.a: Input should be a table of names and values"),
        ("[[per_hotkey]]\na = {}", "per_hotkey: Input should be a table of names and values"),
        ("[per_profile.a]", "per_profile.'a': says nothing"),
        ("[per_profile.a]\nmeasurements = 'unchecked'", "per_profile.'a': measurements: an exception cannot say this"),
        ("[[per_profile.a.any_of]]\nmeasurements = 'unchecked'", "an exception has no profiles of its own"),
        ("identity.ppid = []", "identity.ppid: an empty list would accept nothing"),
        ("a = " + "[" * 100_000, "not TOML"),
        ("\n".join(f"[[{'.'.join(['any_of'] * n)}]]" for n in range(1, 7)), "more than 4 levels"),
        ("#" * (MAX_SIZE + 1), f"more than {MAX_SIZE} bytes"),
        ("".join(f"[per_hotkey.h{n}]\n{OUTDATED}\n" for n in range(MOST)), "combinations, more than"),
    ],
)
def test_a_wrong_file_names_the_key(text: str, refused: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _ = parse_policy_set(text)
    assert refused in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_reference_values_come_from_one_place() -> None:
    own = f"[[profile]]{PROFILE.to_toml().removeprefix('[[profile]]')}"
    for text, key in ((own, "profile: "), ('measurements = "unchecked"', "measurements: ")):
        with pytest.raises(PolicyError, match=key):
            _ = parse_policy_set(text).bind((PROFILE,))
    assert parse_policy_set(own).with_own_profiles() == Policy(profiles=(PROFILE,))
    bound = parse_policy_set(f"{own}[per_profile.simulated]\n{OUTDATED}").with_own_profiles()
    assert isinstance(bound, BoundPolicies)
    assert bound.appraise(STALE, now=NOW, stage="boot").profile == PROFILE
    with pytest.raises(PolicyError, match=r"go with \[\[profile\]\]"):
        _ = parse_policy_set(f"[per_profile.simulated]\n{OUTDATED}").with_own_profiles()
    for name in ("Simulated", "simulated 2"):
        with pytest.raises(PolicyError, match=f"per_profile.'{name}': no profile of this file has this name"):
            _ = parse_policy_set(f"{own}[per_profile.'{name}']\n{OUTDATED}")
    assert parse_policy_set(f"{own}[per_profile.'simulated 1']\n{OUTDATED}").exceptions


NAMES = ("simulated", "simulated 1", "other")
LAYERS = st.fixed_dictionaries(
    {},
    optional={
        "min_evaluation_number": st.integers(0, 9),
        "allow_smt": st.booleans(),
        "min_tcb_info_version": st.just(3),
    },
)


@given(LAYERS, st.dictionaries(st.sampled_from(NAMES), LAYERS), st.dictionaries(st.sampled_from(["me", "you"]), LAYERS))
def test_keys_come_from_the_most_special_layer_that_has_them(
    default: dict[str, Any], profiles: dict[str, dict[str, Any]], hotkeys: dict[str, dict[str, Any]]
) -> None:
    lines = ["[tcb]", *_lines(default)]
    for kind, layers in (("per_profile", profiles), ("per_hotkey", hotkeys)):
        for name, layer in layers.items():
            lines += [f'[{kind}."{name}".tcb]', *_lines(layer)]
    policies = parse_policy_set("\n".join(lines))
    for profile, hotkey in itertools.product((PROFILE, OTHER), ("me", "you", "neither", None)):
        applied = [
            default,
            profiles.get(profile.name, {}),
            profiles.get(str(profile), {}),
            hotkeys.get(hotkey or "", {}),
        ]
        expected = TcbPolicy(**{key: value for layer in applied for key, value in layer.items()})
        assert policies.of(profile, hotkey) == Policy(tcb=expected)


def _lines(layer: dict[str, Any]) -> list[str]:
    return [f"{key} = {str(value).lower()}" for key, value in layer.items()]


# --- in words ---

MR = b"\x51" * 48
CHANGED: dict[type[Any], dict[str, Any]] = {
    TcbPolicy: {
        "accepted_statuses": ["UpToDate", "OutOfDate"],
        "rejected_advisories": ["INTEL-SA-00837"],
        "min_evaluation_number": 18,
        "evaluation_numbers": "any",
        "min_tcb_date": NOW,
        "min_tcb_info_version": 3,
        "allow_dynamic_platform": False,
        "allow_cached_keys": False,
        "allow_smt": False,
        "platform_grace": 86400,
        "qe_grace": 7200,
        "collateral_grace": 61,
    },
    AttributePolicy: {
        "sept_ve_disable": "any",
        "migratable": "allowed",
        "servtd_ext": "allowed",
        "service_td": "allowed",
        "mr_service_td": (MR, MR[::-1][:-1] + b"\1"),
        "attributes_allowed": ATTRIBUTES_KNOWN - 1,
        "xfam_required": 0x7,
        "xfam_allowed": 0x7,
        "unsafe_allow_debug": True,
    },
    IdentityPolicy: {
        **dict.fromkeys(("mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"), (MR,)),
        **dict.fromkeys(("ppid", "platform_instance_id"), (bytes(16),)),
        **dict.fromkeys(("mr_enclave", "mr_signer"), (bytes(32),)),
        "isv_prod_id": (7,),
        "min_isv_svn": 9,
    },
}
COMPANIONS: dict[str, Any] = {
    "platform_grace": {"accepted_statuses": ["UpToDate", "OutOfDate"]},
    "qe_grace": {"accepted_statuses": ["UpToDate", "OutOfDate"]},
    "migratable": {"mr_service_td": (MR,), "service_td": "allowed"},
    "service_td": {"mr_service_td": (MR,), "migratable": "allowed"},
    "mr_service_td": {"service_td": "allowed", "mr_service_td": (MR,)},
    "isv_prod_id": {"mr_signer": (bytes(32),)},
    "min_isv_svn": {"mr_signer": (bytes(32),)},
}
"""What a rule goes with, with and without it."""
PARTS = {TcbPolicy: "tcb", AttributePolicy: "attributes", IdentityPolicy: "identity"}


@pytest.mark.parametrize("part", PARTS)
def test_every_rule_has_words(part: type[Any]) -> None:
    assert {*CHANGED[part]} == {*attrs.fields_dict(part)}
    for key, value in CHANGED[part].items():
        before = part(**COMPANIONS.get(key, {}))
        told = [explain(Policy(**{PARTS[part]: one})) for one in (before, attrs.evolve(before, **{key: value}))]
        assert told[0] != told[1], key


def test_the_example_says_every_default_and_means_none_else() -> None:
    text = (PROJECT / "examples" / "policy.toml").read_text("utf-8")
    assert parse_policy_set(text) == PolicySet()
    for part in PARTS:
        for key in attrs.fields_dict(part):
            assert f"\n{key} = " in text or f"\n# {key} = " in text, key


def test_a_file_in_words() -> None:
    text = f"[tcb]\nmin_evaluation_number = 18\n[per_profile.old]\n{NOBODY}\n[per_hotkey.me]\n{OUTDATED}"
    told = dict(explain_set(parse_policy_set(text)))
    assert "The collateral must be of TCB recovery 18 or a later one." in told["Every VM"]
    assert told["VMs of the profile old"] == (f"The machine's PPID must be {'07' * 16}.",)
    assert told["VMs of the hotkey me"] == ("The TCB status must be UpToDate or OutOfDate.",)
    assert explain(Policy(profiles=(OTHER, PROFILE)))[-1].startswith("The measurements must be those of other")
    assert "VMs that name one of these hotkeys without proof" in told
    own = f"[[profile]]{PROFILE.to_toml().removeprefix('[[profile]]')}[per_profile.simulated]\n{NOBODY}"
    by_profile = dict(explain_set(parse_policy_set(own)))
    assert [*by_profile] == ["Every VM", "VMs of the profile simulated"], "and nothing of hotkeys"
    assert by_profile["VMs of the profile simulated"] == told["VMs of the profile old"]
    either = explain(AnyOf((Policy(), AllOf((Policy(measurements="unchecked"),)))))
    assert either[0] == "It must be accepted by at least one of 2 policies:"
    assert "        Measurements are not checked." in either


def test_what_a_profile_leaves_open_is_in_words() -> None:
    """A register without a value, and attributes in place of the policy's, are accepted by the profile's name."""
    zero = bytes(48)
    rules = (
        RegisterRule(register="MRTD", stage=None, check="any"),
        RegisterRule(register="RTMR2", stage="boot", check="replayed"),
        RegisterRule(
            register="RTMR3",
            stage="boot",
            check="replayed",
            prefix=(MR, MR),
            events=("app-id", "compose-hash"),
            values=(("compose-hash", (b"\1", b"\2")),),
        ),
        RegisterRule(register="RTMR3", stage="runtime", check="replayed", events=()),
    )
    boot, runtime = (*PROFILE.boot[:2], zero, zero), (*PROFILE.runtime[:3], zero)
    lax = AttributePolicy(sept_ve_disable="any")
    profile = attrs.evolve(PROFILE, mrtd=zero, boot=boot, runtime=runtime, rules=rules, attributes=lax)
    told = explain(Policy(profiles=(profile,)))
    at = told.index("The measurements must be those of simulated 1.")
    logged = "may have any value that the VM's event log leads to"
    demands = (
        "begin with 2 known events, and then have only events of the name app-id or compose-hash,"
        " and have just one compose-hash, of the value 01 or 02"
    )
    assert told[at + 1 :][:5] == (
        "Of simulated 1, MRTD may have any value.",
        f"Of simulated 1, RTMR2 at boot {logged}.",
        f"Of simulated 1, RTMR3 at boot {logged}, which must {demands}.",
        f"Of simulated 1, RTMR3 at runtime {logged}, which must have no other event.",
        "Of simulated 1, these attributes count instead of those above:",
    )
    assert f"{' ' * 2}SEPT_VE_DISABLE may be clear." in told[at + 6 :]


def test_notes_say_what_is_probably_not_meant() -> None:
    assert policy_notes(parse_policy_set(FLOOR), NOW) == ()
    enclave = f'identity.mr_signer = ["{"07" * 32}"]'
    assert policy_notes(parse_policy_set(f"measurements = 'unchecked'\n{enclave}\n{FLOOR}"), NOW) == ()
    assert len(policy_notes(parse_policy_set(f"measurements = 'unchecked'\n{FLOOR}"), NOW)) == 1
    text = f"{OUTDATED}\ntcb.min_tcb_date = 2199-01-01\nattributes.unsafe_allow_debug = true"
    keys = [note.partition(":")[0] for note in policy_notes(parse_policy_set(text), NOW)]
    assert keys == [
        "tcb.min_tcb_date",
        "attributes.unsafe_allow_debug",
        "tcb.min_evaluation_number",
        "tcb.platform_grace",
    ]
    assert len(leaves(parse_policy_set("[[any_of]]\n[[any_of]]").default)) == 2
    assert TcbStatus.OUT_OF_DATE in parse_policy_set(text).policies[0].tcb.accepted_statuses
