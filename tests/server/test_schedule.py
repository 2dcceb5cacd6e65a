"""Profiles that count for a time: over the server, at each side of each time."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._measurements import Profile, Schedule, parse_profiles_toml
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import AuditRow
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire.codes import Code
from tests.server.test_provision import volumes_request
from tests.server.world import HOTKEY, NOW, World, answer, refusal, service


def made(**keys: Any) -> Schedule:
    return Schedule(**keys)


TERM = made(not_before=NOW, not_after=NOW + 1000, retirement_grace=500)
MISMATCH = "Quote does not match expected measurements. Ensure you are running a supported VM."


def serving(*profiles: Profile, **options: Any) -> World:
    served = {one.identity: ServedProfile(one, None, False, False) for one in profiles}
    return World(App(service(profiles=served, **options)))


@pytest.mark.parametrize(
    ("at", "state"),
    [
        (NOW - 1, "scheduled"),
        (NOW, None),
        (NOW + 999, None),
        (NOW + 1000, "retiring"),
        (NOW + 1499, "retiring"),
        (NOW + 1500, "ended"),
    ],
)
def test_a_profile_counts_from_its_begin_to_the_end_of_its_grace(at: int, state: str | None) -> None:
    world = serving(evolve(PROFILE, schedule=TERM))
    world.now = at
    response = world.boot()
    published = answer(world.ask("GET", "/servers/tee/measurements"))
    if state in ("scheduled", "ended"):
        assert refusal(response) == (403, Code.MEASUREMENT_MISMATCH, MISMATCH)
        code = {"scheduled": "profile_not_yet: profile simulated 1 does not count now", "ended": "profile_ended"}[state]
        (told,) = [record for record in world.log if record.event == "refused"]
        assert code in str(told.fields["reason"])
        assert published == []
        return
    assert answer(response)["boot_token"]
    assert [one["version"] for one in published] == [PROFILE.version]
    (granted,) = [record for record in world.log if record.event == "boot_granted"]
    assert granted.fields.get("profile_state") == state
    (row,) = [row for row in world.rows(AuditRow) if row.event == "boot"]
    assert row.reason.endswith("; the profile is retiring") == (state == "retiring")


def test_warn_lists_a_vm_that_matches_and_grants_none_that_does_not() -> None:
    world = serving(evolve(PROFILE, schedule=made(mode="warn")))
    assert answer(world.boot())
    (granted,) = [record for record in world.log if record.event == "boot_granted"]
    assert granted.fields["profile_state"] == "warned"
    world.platform = world.platform.having("rtmr1")
    assert refusal(world.boot()) == (403, Code.MEASUREMENT_MISMATCH, f"{MISMATCH} (RTMR1)")


def test_versions_of_one_name_live_side_by_side() -> None:
    old = evolve(PROFILE, version="1.9", schedule=made(not_after=NOW + 10))
    new = evolve(PROFILE, version="1.10", mrtd=bytes(48), schedule=made(not_before=NOW + 5))
    world = serving(old, new, minimum_version="2.0")
    for at, versions in ((NOW, ["1.9"]), (NOW + 5, ["1.9", "1.10"]), (NOW + 10, ["1.10"])):
        world.now = at
        assert [one["version"] for one in answer(world.ask("GET", "/servers/tee/measurements"))] == versions
        told = refusal(world.boot())[2]
        assert told == MISMATCH if at == NOW + 10 else f"latest VM version ({versions[-1]})" in told


def test_a_runtime_quote_is_held_to_the_schedule_too() -> None:
    two_phase = ServedProfile(evolve(PROFILE, schedule=made(not_after=NOW + 1)), None, False, False, "two-phase")
    world = World(App(service(profiles={PROFILE.identity: two_phase})))
    nonce = answer(world.boot())["luks_quote_nonce"]
    body = volumes_request(world, nonce, "storage")
    world.now = NOW + 1
    headers = {"x-quote-nonce": nonce, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    late = refusal(world.ask("POST", "/servers/vm-1/luks/attest", body, headers=headers))
    assert late == (403, Code.MEASUREMENT_MISMATCH, MISMATCH)


TIMES = st.none() | st.integers(0, 30)


@given(TIMES, TIMES, st.integers(0, 9), st.sampled_from(["enforce", "warn"]), st.integers(0, 50))
def test_a_state_is_one_of_five(before: int | None, after: int | None, grace: int, mode: Any, now: int) -> None:
    try:
        schedule = made(not_before=before, not_after=after, retirement_grace=grace, mode=mode)
    except PolicyError:
        assert (after is None and grace) or (before is not None and after is not None and after <= before)
        return
    is_early = before is not None and now < before
    is_late = after is not None and now >= after + grace
    assert (schedule.state(now) == "scheduled", schedule.state(now) == "ended") == (is_early, is_late)
    assert schedule.accepts(now) == (not is_early and not is_late)
    assert schedule.state(now) in ("scheduled", "ended", "retiring") or (schedule.state(now) == "warned") == (
        mode == "warn"
    )
    changed = {at for at in range(1, 50) if schedule.state(at) != schedule.state(at - 1)}
    assert changed <= schedule.changes


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("not_before = 2026-02-01\nnot_after = 2026-01-01", "not_after: must be later than not_before"),
        ("not_after = 2026-01-01\nnot_before = 2026-01-01", "not_after: must be later than not_before"),
        ("not_after = 1767225600", "not_after: must be a date like"),
        ("not_after = 2026-01-01T00:00:00", "or a time with its offset from UTC"),
        ("not_after = 1960-01-01", "not_after: must be a date"),
        ("retirement_grace = 5", "retirement_grace: goes with not_after"),
        ("not_after = 2026-01-01\nretirement_grace = -1", "retirement_grace: must be a whole number of seconds"),
        ("not_after = 2026-01-01\nretirement_grace = true", "retirement_grace: Input should be a valid integer"),
        ("schedule = 1", "Unknown key; mode, not_after, not_before, retirement_grace are keys of the profile"),
        ('mode = "off"', 'mode: Input should be "enforce" or "warn"'),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(lines: str, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem):
        _ = parse_profiles_toml(PROFILE.to_toml() + lines)


def test_a_mode_is_one_of_two() -> None:
    with pytest.raises(PolicyError, match="mode"):
        _ = made(mode="off")


def test_defaults_may_have_a_schedule() -> None:
    text = f"[profile_defaults]\nnot_after = 2026-01-01\n{PROFILE.to_toml()}"
    ((profile, _),) = parse_profiles_toml(text)
    assert profile.schedule == made(not_after=1_767_225_600)
