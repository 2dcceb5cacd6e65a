"""Registers as people pin them: any value, the value that a log leads to, and SGX enclaves."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import sha384
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._errors import AppraisalError, PolicyError
from chutes_proto.quote._eventlog import EventLog, EventLogFormatError, parse_event_log_json
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._measurements import Profile, RegisterRule
from chutes_proto.quote._policy import AnyPolicy, Policy, TcbPolicy, parse_policy_toml
from chutes_proto.quote._verify import Verdict
from chutes_proto.server._profiles import serve_profile
from chutes_proto.testing._faults import Fault
from tests.quote.cases import ABSENT, FOLDER, cases
from tests.quote.simulated import NOW, PLATFORM, PROFILE, verdict_of

RUNTIME = 0x08000001
ZERO = bytes(48)


def _event(imr: int, name: str, payload: bytes) -> dict[str, Any]:
    digest = sha384(RUNTIME.to_bytes(4, "little") + b":" + name.encode() + b":" + payload).hexdigest()
    return {"imr": imr, "event_type": RUNTIME, "digest": digest, "event": name, "event_payload": payload.hex()}


BOOT = {"imr": 0, "event_type": 4, "digest": sha384(b"\0" * 4).hexdigest(), "event": "", "event_payload": "00000000"}
EVENTS = [BOOT, _event(3, "system-preparing", b""), _event(3, "app-id", b"app"), _event(3, "compose-hash", b"hash")]
LOG = parse_event_log_json(json.dumps(EVENTS))


def logged(log: EventLog = LOG) -> Verdict:
    """The verdict on a TD whose RTMRs this log leads to."""

    def change(draft: Any) -> Any:
        return evolve(draft, body=evolve(draft.body, rtmrs=log.rtmrs))

    return verdict_of(PLATFORM.having(Fault(name="logged", side="quote", what="RTMRs of a log", quote=change)))


def ruled(**replayed: Any) -> Policy:
    """MRTD any, RTMR0 to RTMR2 pinned, RTMR3 as the log leads to."""
    rules = (
        RegisterRule(register="MRTD", stage=None, check="any"),
        RegisterRule(register="RTMR3", stage="boot", check="replayed", **replayed),
    )
    boot = (*LOG.rtmrs[:3], ZERO)
    return Policy(profiles=(Profile(name="ruled", version="1", mrtd=ZERO, boot=boot, runtime=boot, rules=rules),))


def refused(policy: AnyPolicy, verdict: Verdict, log: EventLog | None = LOG) -> list[str]:
    with pytest.raises(AppraisalError) as caught:
        _ = policy.appraise(verdict, now=NOW, stage="boot", event_log=log)
    assert {refusal.part for refusal in caught.value.refusals} == {"measurement"}
    return [refusal.code for refusal in caught.value.refusals]


def test_what_is_not_pinned_is_told() -> None:
    accepted = ruled().appraise(logged(), now=NOW, stage="boot", event_log=LOG)
    assert (accepted.unpinned, accepted.replayed) == (("MRTD",), ("RTMR3",))
    assert Policy(profiles=(PROFILE,)).appraise(verdict_of(PLATFORM), now=NOW, stage="boot").unpinned == ()
    unchecked = Policy(measurements="unchecked").appraise(verdict_of(PLATFORM), now=NOW, stage="boot")
    assert (unchecked.unpinned[0], len(unchecked.unpinned), unchecked.replayed) == ("MRTD", 5, ())


def test_a_replayed_register_needs_the_log_that_leads_to_it() -> None:
    assert refused(ruled(), logged(), None) == ["event_log"]
    other = parse_event_log_json(json.dumps([*EVENTS, _event(3, "more", b"")]))
    assert refused(ruled(), logged(), other) == ["event_log"]
    reordered = parse_event_log_json(json.dumps([*EVENTS[:2], EVENTS[3], EVENTS[2]]))
    assert refused(ruled(), logged(), reordered) == ["event_log"]
    assert refused(ruled(), verdict_of(PLATFORM)) == [*["measurement_mismatch"] * 3, "event_log"]


@pytest.mark.parametrize(
    ("rule", "codes"),
    [
        ({"prefix": (LOG.of("RTMR3")[0].digest,)}, []),
        ({"prefix": (ZERO,)}, ["event_prefix"]),
        ({"prefix": (*(event.digest for event in LOG.of("RTMR3")), ZERO)}, ["event_prefix"]),
        ({"events": ("system-preparing", "app-id", "compose-hash")}, []),
        ({"events": ("app-id", "compose-hash")}, ["event_name"]),
        ({"events": ("app-id", "compose-hash"), "prefix": (LOG.of("RTMR3")[0].digest,)}, []),
        ({"events": ()}, ["event_name"] * 3),
        ({"values": (("compose-hash", (b"hash",)),)}, []),
        ({"values": (("compose-hash", (b"other", b"hash")), ("app-id", (b"app",)))}, []),
        ({"values": (("compose-hash", (b"other",)),)}, ["event_value"]),
        ({"values": (("absent", (b"",)),)}, ["event_value"]),
    ],
)
def test_the_log_must_say_what_is_expected(rule: dict[str, Any], codes: list[str]) -> None:
    if codes:
        assert refused(ruled(**rule), logged()) == codes
    else:
        _ = ruled(**rule).appraise(logged(), now=NOW, stage="boot", event_log=LOG)


def test_a_name_counts_only_where_the_digest_covers_it() -> None:
    """The log's writer may call an event, and its payload, whatever it likes: the register has the digest only."""
    lying = [*EVENTS[:3], {**EVENTS[3], "event": "system-preparing"}]
    assert parse_event_log_json(json.dumps(lying)).rtmrs == LOG.rtmrs
    log = parse_event_log_json(json.dumps(lying))
    names = ("system-preparing", "app-id", "compose-hash")
    assert refused(ruled(events=names), logged(), log) == ["event_name"]
    payload = parse_event_log_json(json.dumps([*EVENTS[:3], {**EVENTS[3], "event_payload": b"x".hex()}]))
    assert refused(ruled(values=(("compose-hash", (b"x",)),)), logged(), payload) == ["event_name", "event_value"]
    twice = parse_event_log_json(json.dumps([*EVENTS, _event(3, "compose-hash", b"hash")]))
    assert refused(ruled(values=(("compose-hash", (b"hash",)),)), logged(twice), twice) == ["event_value"]
    typed = parse_event_log_json(json.dumps([{**BOOT, "imr": 3, "event": "EV_SEPARATOR"}]))
    assert (typed.events[0].name, typed.events[0].value) == (None, bytes(4))
    of_type_4 = sha384((4).to_bytes(4, "little") + b":compose-hash:hash").hexdigest()
    other = parse_event_log_json(json.dumps([{**EVENTS[3], "event_type": 4, "digest": of_type_4}]))
    assert (other.events[0].name, other.events[0].value) == (None, None)


@pytest.mark.parametrize(
    "hidden",
    [
        {"event_type": 4},
        {"event": ""},
        {"event_payload": ""},
        {"event": "compose-hash:", "event_payload": b"ev:il".hex()},
        {"event": "compose-hash::ev", "event_payload": b"il".hex()},
    ],
)
def test_no_event_hides_behind_another_one_of_its_name(hidden: dict[str, Any]) -> None:
    """A TD's software may extend a register with a second event: the log's writer cannot pass the first off as another.

    The payload has colons, as a hash may have: the digest does not say at which of them the name ends.
    """
    real = _event(3, "compose-hash", b":ev:il")
    policy = ruled(values=(("compose-hash", (b"hash",)),))
    for first in (real, {**real, **hidden}):
        log = parse_event_log_json(json.dumps([*EVENTS[:3], first, EVENTS[3]]))
        assert "event_log" not in refused(policy, logged(log), log)


REGISTERS_TOML = f"""
[[profile]]
name = "ruled"
version = "1"
mrtd = "any"
boot = {{ rtmr0 = "any", rtmr1 = "{"11" * 48}", rtmr2 = "{"22" * 48}", rtmr3 = {{ replayed = {{ REPLAYED }} }} }}
runtime = {{ rtmr0 = "any", rtmr1 = "{"11" * 48}", rtmr2 = "any", rtmr3 = "{"33" * 48}" }}
"""


def test_rules_in_toml() -> None:
    digest = "ab" * 48
    said = f'prefix = ["{digest}"], events = ["app-id"], values = {{ compose-hash = ["00ff"], app-id = ["01", "02"] }}'
    policy = parse_policy_toml(REGISTERS_TOML.replace("REPLAYED", said))
    assert isinstance(policy, Policy)
    (profile,) = policy.profiles
    assert profile.rules_of("boot")["RTMR3"] == RegisterRule(
        register="RTMR3",
        stage="boot",
        check="replayed",
        prefix=(bytes.fromhex(digest),),
        events=("app-id",),
        values=(("app-id", (b"\x01", b"\x02")), ("compose-hash", (b"\x00\xff",))),
    )
    assert {*profile.rules_of("runtime")} == {"MRTD", "RTMR0", "RTMR2"}
    assert (profile.mrtd, profile.boot[1], profile.boot[0]) == (ZERO, b"\x11" * 48, ZERO)
    with pytest.raises(ConfigurationError, match="publishes all registers"):
        _ = serve_profile(profile, {}, {}, lambda _: b"")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (REGISTERS_TOML.replace("REPLAYED", "typo = 1"), "typo"),
        (REGISTERS_TOML.replace("REPLAYED", 'prefix = ["00"]'), "prefix"),
        (REGISTERS_TOML.replace("REPLAYED", "values = { a = [] }"), "values"),
        (REGISTERS_TOML.replace("REPLAYED", 'events = ["a:b"]'), "events: must be names"),
        (REGISTERS_TOML.replace('mrtd = "any"', "mrtd = { replayed = {} }").replace("REPLAYED", ""), "check"),
        (REGISTERS_TOML.replace('mrtd = "any"', 'mrtd = "Any"').replace("REPLAYED", ""), "mrtd"),
        (REGISTERS_TOML.replace('mrtd = "any"', "").replace("REPLAYED", ""), "mrtd: Field required"),
        (REGISTERS_TOML.replace("REPLAYED", "") + "rules = []", "rules: Unknown key"),
        ('measurements = "unchecked"\n[tcb]\nmin_tcb_date = "2025-08-13"', "tcb.min_tcb_date"),
        ('measurements = "unchecked"\n[tcb]\nmin_tcb_date = 2025-08-13T00:00:00', "tcb.min_tcb_date"),
        ('measurements = "unchecked"\n[tcb]\nmin_tcb_date = 1960-01-01', "tcb.min_tcb_date"),
        ('measurements = "unchecked"\n[identity]\nisv_prod_id = [1]', "identity.mr_signer"),
        ('measurements = "unchecked"\n[identity]\nmin_isv_svn = 1', "identity.mr_signer"),
    ],
)
def test_an_error_names_the_key(text: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        _ = parse_policy_toml(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"register": "RTMR4"},
        {"register": "MRTD"},
        {"stage": None},
        {"check": "some"},
        {"check": "any", "prefix": (ZERO,)},
        {"check": "any", "events": ()},
        {"prefix": (b"",)},
        {"prefix": [ZERO]},
        {"events": ("a:b",)},
        {"events": "compose-hash"},
        {"values": (("a", ()),)},
        {"values": (("a:b", (b"",)),)},
        {"values": (("a", b"bytes of which any part would be in them"),)},
        {"values": [("a", (b"",))]},
    ],
)
def test_a_rule_that_cannot_be(changes: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"register": "RTMR1", "stage": "boot", "check": "replayed"}
    with pytest.raises(PolicyError):
        _ = RegisterRule(**{**usual, **changes})


def test_a_register_has_a_value_or_one_rule() -> None:
    rule = RegisterRule(register="RTMR1", stage="boot", check="any")
    with pytest.raises(PolicyError, match="a value and a rule"):
        _ = evolve(PROFILE, rules=(rule,))
    zero = evolve(PROFILE, boot=(PROFILE.boot[0], ZERO, *PROFILE.boot[2:]))
    with pytest.raises(PolicyError, match="has two"):
        _ = evolve(zero, rules=(rule, rule))


# --- the log ---


@pytest.mark.parametrize(
    "entries",
    [
        "{",
        "{}",
        "[1]",
        json.dumps([{**BOOT, "imr": 4}]),
        json.dumps([{**BOOT, "imr": True}]),
        json.dumps([{**BOOT, "event_type": -1}]),
        json.dumps([{**BOOT, "digest": "00"}]),
        json.dumps([{**BOOT, "digest": "x" * 96}]),
        json.dumps([{**BOOT, "event_payload": 1}]),
        json.dumps([{**BOOT, "event_payload": "x"}]),
    ],
)
def test_a_log_that_is_none(entries: str) -> None:
    with pytest.raises(EventLogFormatError):
        _ = parse_event_log_json(entries)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_bytes(data: bytes | str) -> None:
    with suppress(EventLogFormatError):
        _ = parse_event_log_json(data)


# --- SGX, dates ---


@pytest.mark.skipif(not FOLDER.is_dir(), reason=ABSENT)
def test_enclaves_are_pinned_by_measurement_or_signer() -> None:
    case = next(case for case in cases("real") if case.strict[0] == "ok" and "sgx" in case.name)
    verdict = case.verify()
    body: Any = verdict.quote.body
    tcb = TcbPolicy(accepted_statuses=frozenset({verdict.tcb_status}))
    signed = {"mr_signer": (body.mr_signer,), "isv_prod_id": (body.isv_prod_id,), "min_isv_svn": body.isv_svn}

    def codes(**identity: Any) -> list[str]:
        try:
            policy = Policy(tcb=tcb, identity=IdentityPolicy(**identity))
            _ = policy.appraise(verdict, now=verdict.verified_at, stage="boot")
        except AppraisalError as exc:
            return [refusal.code for refusal in exc.refusals]
        return []

    assert codes() == ["not_a_td"]
    assert codes(mr_enclave=(body.mr_enclave,)) == codes(**signed) == []
    assert codes(mr_enclave=(bytes(32),)) == ["mr_enclave"]
    assert codes(**{**signed, "mr_signer": (bytes(32),)}) == ["mr_signer"]
    assert codes(**{**signed, "isv_prod_id": (body.isv_prod_id + 1,)}) == ["isv_prod_id"]
    assert codes(**{**signed, "min_isv_svn": body.isv_svn + 1}) == ["isv_svn"]
    td = Policy(measurements="unchecked", identity=IdentityPolicy(mr_enclave=(bytes(32),)))
    with pytest.raises(AppraisalError, match="mr_enclave: MRENCLAVE is not accepted"):
        _ = td.appraise(verdict_of(PLATFORM), now=NOW, stage="boot")


def test_a_floor_under_the_tcb_date() -> None:
    verdict = verdict_of(PLATFORM)  # its parts are of 2025-08-13
    for text, accepted in (
        ("2025-08-13", True),
        ("2025-08-14", False),
        ("2025-08-13T02:00:00+02:00", True),
        ("2025-08-13T00:00:01Z", False),
    ):
        policy = parse_policy_toml(f'measurements = "unchecked"\n[tcb]\nmin_tcb_date = {text}')
        if accepted:
            _ = policy.appraise(verdict, now=NOW, stage="boot")
        else:
            with pytest.raises(AppraisalError, match=r"tcb_date: .*got 2025-08-13T00:00:00Z, expected at least"):
                _ = policy.appraise(verdict, now=NOW, stage="boot")
    with pytest.raises(PolicyError, match="min_tcb_date"):
        _ = TcbPolicy(min_tcb_date=1.5)  # type: ignore[arg-type]
