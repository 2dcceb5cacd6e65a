"""What a policy would do to the fleet, against a brute-force oracle: every VM boots again at that date."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from attrs import evolve
from msgspec.structs import asdict

from chutes_proto.errors import CollateralUnavailable
from chutes_proto.quote._collateral import Collateral, CollateralDigests
from chutes_proto.quote._measurements import Schedule
from chutes_proto.quote._policy import Policy, TcbPolicy
from chutes_proto.quote._policy_set import PolicySet
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.server._service import Service
from chutes_proto.server._whatif import judge
from chutes_proto.store._rows import EvidenceRow
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import PROFILE
from chutes_proto.testing._statements import TCB_LADDER, TcbInfo
from chutes_proto.units.boot import REFUSED_KEPT
from chutes_proto.units.erasure import EraseVm
from chutes_proto.units.evidence import ReadEvidence
from tests.server.world import HOTKEY, NOW, PLATFORM, World, answer, refusal, service

DAY = 86_400
KINDS = ("", "tcb_sw_hardening_needed", "tcb_configuration_needed", "tcb_out_of_date")
ANY = frozenset({"UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"})
EVERY = TcbPolicy(accepted_statuses=ANY)
CERTIFICATES_END = int(datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp())
"""The last second of those of the simulated platform."""


def served(
    tcb: TcbPolicy = EVERY,
    schedule: Schedule | None = None,
    *,
    for_hotkey: Policy | None = None,
    signed: bool = False,
    **changes: Any,
) -> Service:
    profile = PROFILE if schedule is None else evolve(PROFILE, schedule=schedule)
    profiles = {PROFILE.identity: ServedProfile(profile, None, signed, False)}
    policies = PolicySet(default=Policy(tcb=tcb))
    if for_hotkey is not None:
        policies = evolve(policies, exceptions={((), HOTKEY): for_hotkey})
    return service(policies=policies, profiles=profiles, **changes)


def name(kind: str) -> str:
    return f"vm-{kind or 'good'}"


@pytest.fixture
def fleet() -> World:
    """VMs on platforms of four kinds, all of which were granted."""
    world = World(App(served()))
    for kind in KINDS:
        world.platform = PLATFORM.having(kind) if kind else PLATFORM
        assert answer(world.boot(vm_name=name(kind)))
    return world


def _recovered(info: TcbInfo) -> TcbInfo:
    best = info.levels[0]
    better = evolve(best, sgx=(TCB_LADDER["UpToDate"] + 1, *best.sgx[1:]))
    levels = (better, evolve(best, status="OutOfDate"), *info.levels[1:])
    return evolve(info, levels=levels, evaluation_number=info.evaluation_number + 1)


RECOVERY = Fault(
    name="recovery",
    what="early TCB info: what is up to date is out of date",
    side="collateral",
    tcb_info=_recovered,
    qe_identity=lambda identity: evolve(identity, evaluation_number=identity.evaluation_number + 1),
)
"""What Intel offers early, before a TCB recovery: a machine needs new microcode to be up to date."""


def judged(world: World, new: Service, at: int, until: int, update: tuple[Fault, ...] = ()) -> dict[str, Any]:
    content = Collateral.from_json(PLATFORM.having(*update).collateral_json(NOW))
    found = verify_collateral(content, now=NOW, root=new.root, grace=100 * 365 * DAY)
    return {
        kept.row.vm.name: judge(new, kept.row, lambda _: found, at, proven=kept.proven, until=until)
        for kept in world.store.transact(ReadEvidence(None, 99))
        if kept.row.code is None
    }


def boots(new: Service, at: int, kind: str, update: tuple[Fault, ...] = ()) -> str:
    """The oracle: what the VM of a kind gets that boots at a date."""
    world = World(App(new), now=at)
    world.platform = PLATFORM.having(*filter(None, (kind,)), *update)
    response = world.boot(vm_name=name(kind))
    return "granted" if response.status == 200 else str(refusal(response)[1])


NEW = [
    pytest.param(served(), id="the same"),
    pytest.param(served(TcbPolicy()), id="UpToDate alone"),
    pytest.param(served(evolve(EVERY, rejected_advisories=frozenset({"SIMULATED-SA-OutOfDate"}))), id="an advisory"),
    pytest.param(served(evolve(EVERY, min_tcb_date=NOW)), id="a floor by date"),
    pytest.param(served(evolve(EVERY, platform_grace=(NOW - 1_500_000_000) // 2 * 2 + 40 * DAY)), id="a grace"),
    pytest.param(served(schedule=Schedule(not_after=NOW + 30 * DAY)), id="an end"),
    pytest.param(served(schedule=Schedule(not_before=NOW + 10 * DAY)), id="a begin"),
    pytest.param(served(schedule=Schedule(not_after=NOW + 30 * DAY, retirement_grace=DAY)), id="a retirement"),
    pytest.param(served(TcbPolicy(), for_hotkey=Policy(tcb=EVERY)), id="an exception for who proves a hotkey"),
    pytest.param(served(hotkeys=frozenset()), id="no hotkey"),
    pytest.param(served(blacklist={HOTKEY: "left"}), id="a blacklist"),
    pytest.param(served(minimum_version="99"), id="a version"),
    pytest.param(served(signed=True), id="proven hotkeys alone"),
]


EARLY = [
    pytest.param(served(TcbPolicy()), id="UpToDate alone"),
    pytest.param(served(evolve(EVERY, platform_grace=(NOW - 1_710_288_000) + 40 * DAY)), id="a grace"),
    pytest.param(served(evolve(EVERY, min_evaluation_number=22)), id="a later evaluation"),
]


@pytest.mark.parametrize("new", NEW)
def test_it_says_what_booting_everything_again_would_say(fleet: World, new: Service) -> None:
    compare(fleet, new, [NOW, NOW + 10 * DAY, NOW + 31 * DAY, NOW + 200 * DAY])


@pytest.mark.parametrize("new", EARLY)
def test_it_says_what_booting_after_a_recovery_would_say(fleet: World, new: Service) -> None:
    compare(fleet, new, [NOW, NOW + 31 * DAY], (RECOVERY,))


def test_it_says_when_a_certificate_ends(fleet: World) -> None:
    found = judged(fleet, served(), CERTIFICATES_END - DAY, CERTIFICATES_END + DAY)
    assert {one.refused_from for one in found.values()} == {CERTIFICATES_END + 1}
    compare(fleet, served(), [CERTIFICATES_END - DAY, CERTIFICATES_END])


def compare(fleet: World, new: Service, dates: list[int], update: tuple[Fault, ...] = ()) -> None:
    """Compare the answer for each VM at each date, and for a later refusal the second before it and its first."""
    horizon = max(dates) + 200 * DAY
    for at in dates:
        expected = {name(kind): boots(new, at, kind, update) for kind in KINDS}
        found = judged(fleet, new, at, horizon, update)
        granted = {vm for vm, one in found.items() if one.state in ("granted", "warned")}
        assert {vm: "granted" if vm in granted else one.code for vm, one in found.items()} == expected
        for kind in KINDS:
            if name(kind) not in granted:
                continue
            one = found[name(kind)]
            if one.refused_from is not None:
                assert one.refused_from > at
                assert boots(new, one.refused_from - 1, kind, update) == "granted"
                assert boots(new, one.refused_from, kind, update) == one.code
            else:
                assert boots(new, horizon, kind, update) == "granted"


def test_a_warning_is_told_and_collateral_may_be_missing(fleet: World) -> None:
    warned = judged(fleet, served(schedule=Schedule(mode="warn")), NOW, NOW)
    assert {one.state for one in warned.values()} == {"warned"}

    def none(_: object) -> Any:
        raise CollateralUnavailable("none")

    (kept, *_) = fleet.store.transact(ReadEvidence(None, 1))
    with pytest.raises(CollateralUnavailable):
        _ = judge(served(), kept.row, none, NOW, proven=False, until=NOW)
    spoilt = evolve(kept.row, quote=kept.row.quote[:700] + b"x" + kept.row.quote[701:])
    assert judge(served(), spoilt, none, NOW, proven=False, until=NOW).state == "refused"


def test_the_newest_evidence_of_each_vm_is_kept_and_of_strangers_a_few(fleet: World) -> None:
    before = {row.evidence_id: row for row in fleet.rows(EvidenceRow)}
    fleet.platform = PLATFORM
    fleet.now += 60
    assert answer(fleet.boot(vm_name="vm-good"))
    after = {row.evidence_id: row for row in fleet.rows(EvidenceRow)}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [f"vm {HOTKEY}/vm-good"]
    assert all(4000 < len(row.quote) < 6000 for row in after.values())
    used = asdict(CollateralDigests.of(Collateral.from_json(PLATFORM.collateral_json(fleet.now))))
    kept = json.loads(after[f"vm {HOTKEY}/vm-good"].collateral)
    assert kept["sha256"] == {name: value.hex() for name, value in used.items()}
    fleet.platform = PLATFORM.having("rtmr1")
    for number in range(3 * REFUSED_KEPT):
        assert refusal(fleet.boot(vm_name=f"stranger-{number}"))[0] == 403
    refused = [row for row in fleet.rows(EvidenceRow) if row.code is not None]
    assert {row.vm.name for row in refused} == {f"stranger-{n}" for n in range(2 * REFUSED_KEPT, 3 * REFUSED_KEPT)}
    fleet.platform = PLATFORM.having("quote_signature")
    assert refusal(fleet.boot(vm_name="forged"))[0] == 403
    assert "forged" not in {row.vm.name for row in fleet.rows(EvidenceRow)}


def test_an_erasure_takes_the_evidence_along(fleet: World) -> None:
    vm = next(row.vm for row in fleet.rows(EvidenceRow) if row.vm.name == "vm-good")
    fleet.platform = PLATFORM.having("rtmr1")
    assert refusal(fleet.boot(vm_name="vm-good"))[0] == 403
    assert len([row for row in fleet.rows(EvidenceRow) if row.vm == vm]) == 2
    _ = fleet.store.transact(EraseVm(NOW, "e", 1, vm, "gone", carry_out=True))
    assert vm not in {row.vm for row in fleet.rows(EvidenceRow)}
