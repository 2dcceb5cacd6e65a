"""The machine that decides: use, refresh, fetch, serve stale, give up; by example, and whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve, frozen
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from chutes_proto._proof import PROOF
from chutes_proto.collateral.cache import (
    CachePolicy,
    Decision,
    Fetch,
    GiveUp,
    Refresh,
    Use,
    clock,
    fetch,
    settle,
)
from chutes_proto.collateral.library import Family
from chutes_proto.collateral.pcs import Upstream
from chutes_proto.collateral.platforms import PlatformCache
from chutes_proto.effects import Effect, Get, Log, Now, Sleep, run
from chutes_proto.errors import ConfigurationError, TransportError
from chutes_proto.log import Level, Record
from chutes_proto.quote._collateral import CollateralIssue, VerifiedCollateral
from chutes_proto.quote._verify import authenticate_collateral, verify_collateral
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from chutes_proto.testing._playbook import Playbook
from chutes_proto.testing._service import CollateralService
from chutes_proto.testing._statements import EVALUATION_NUMBER
from chutes_proto.wire.http import HttpRequest, HttpResponse

NOW = 1_800_000_000
PLATFORM = SimulatedPlatform(bytes(32))
ROOT = PLATFORM.root
SERVICE = CollateralService((PLATFORM, PLATFORM.another(1)))
FIRST, SECOND = Upstream.parse("https://first"), Upstream.parse("https://second")
NEXT_RECOVERY = Fault(
    name="next TCB recovery",
    side="collateral",
    what="a QE identity of the next TCB evaluation data number",
    qe_identity=lambda draft: evolve(draft, evaluation_number=EVALUATION_NUMBER + 1),
)
NEW_CA_KEY = Fault(
    name="new CA key",
    side="certificates",
    what="a PCK CA with a new key under its old name",
    intermediate=lambda draft: evolve(draft, key="platform CA, renewed"),
)
LATE = NOW + COLLATERAL_SECONDS + 1


def family(index: int = 0) -> Family:
    return Family(PLATFORM.another(index).fmspc, "platform", "TDX")


def verified(at: int = NOW, **changes: Any) -> VerifiedCollateral:
    found = verify_collateral(PLATFORM.collateral(at), now=at, root=ROOT)
    return evolve(found, proof=PROOF, **changes) if changes else found


class World:
    """A clock, and upstreams that are ``down``, or answer with a ``status``, or honestly with what is ``age`` old.

    With ``only``, the answer of ``status`` is for this path alone.

    To ask one that is ``broken`` meets a defect of ours.
    """

    def __init__(self, *upstreams: Upstream, **policy: Any) -> None:
        self.cache = PlatformCache(upstreams or (FIRST,), root=ROOT, policy=CachePolicy(**policy), seed=b"seed")
        self.now = NOW
        self.down: set[str] = set()
        self.broken: set[str] = set()
        self.status: dict[str, HttpResponse] = {}
        self.only: str | None = None
        self.service = SERVICE
        self.age = 0
        self.asked: list[str] = []
        self.log: list[Record] = []

    def perform(self, effect: Effect[Any]) -> object:
        match effect:
            case Get(url):
                return self._get(url)
            case Now():
                return self.now
            case Sleep(seconds):
                self.now += int(seconds)
            case Log(record):
                self.log.append(record)
            case _:
                raise AssertionError(effect)
        return None

    def _get(self, url: str) -> HttpResponse:
        host, path = url.removeprefix("https://").split("/", 1)
        self.asked.append(url)
        if host in self.down:
            raise TransportError("no route", maybe_delivered=False)
        if host in self.broken:
            raise RuntimeError("a defect")
        honest = self.service.answer(HttpRequest("GET", "/" + path), self.now - self.age)
        return honest if self.only not in (None, "/" + path) else self.status.get(host, honest)

    def decide(self, of: Family | None = None) -> Decision[VerifiedCollateral]:
        return self.cache.decide(of or family(), self.now)

    def fetch(self, of: Family | None = None) -> Any:
        return run(fetch(self.cache, of or family()), self.perform)

    def landed(self, of: Family | None = None) -> Use[VerifiedCollateral] | GiveUp:
        return run(settle(self.cache, of or family()), self.perform)

    def warm(self) -> VerifiedCollateral:
        assert isinstance(self.decide(), Fetch)
        assert self.fetch() is not None
        decision = self.decide()
        assert isinstance(decision, Use | Refresh)
        return decision.collateral


def reason(decision: Decision[VerifiedCollateral]) -> str:
    assert isinstance(decision, GiveUp)
    return decision.reason


def test_fetch_first_then_use_then_refresh_then_fetch_again() -> None:
    world = World()
    held = world.warm()
    assert held.window == (NOW, NOW + COLLATERAL_SECONDS)
    assert world.landed() == Use(held)
    world.now += 86400 * 3 // 4 - 1
    assert world.decide() == Use(held)
    world.now = NOW + 86400
    assert world.decide() == Refresh(held)
    world.now = LATE - 1
    assert world.decide() == Refresh(held)
    world.now = LATE
    assert isinstance(world.decide(), Fetch)


@pytest.mark.parametrize("wrong", [float("nan"), float(NOW), True])
def test_a_time_is_an_integer(wrong: Any) -> None:
    world = World()
    _ = world.warm()
    for ask in (world.cache.decide, world.cache.landed):
        with pytest.raises(TypeError, match="now: must be an int"):
            _ = ask(family(), wrong)


def test_what_ends_soon_is_refreshed_soon() -> None:
    world = World()
    world.age = COLLATERAL_SECONDS - 4000
    held = world.warm()
    world.now += 2000
    assert world.decide() == Use(held)
    world.now = NOW + 3001
    assert world.decide() == Refresh(held)
    world.age = COLLATERAL_SECONDS - 10
    last = World()
    last.age = COLLATERAL_SECONDS - 10
    _ = last.warm()
    last.now += 11
    assert isinstance(last.decide(), Fetch)  # nothing waits until its end


def test_a_refresh_that_fails_changes_nothing_and_waits_longer_each_time() -> None:
    world = World(retry=8, retry_most=64)
    held = world.warm()
    world.now += 86400
    world.down.add("first")
    waits = []
    for _ in range(6):
        assert world.decide() == Refresh(held)
        assert world.fetch() is None
        began = world.now
        while world.decide() != Refresh(held):
            assert world.decide() == Use(held)
            world.now += 1
        waits.append(world.now - began)
    for wait, most in zip(waits, [8, 16, 32, 64, 64, 64], strict=True):
        assert most * 3 // 4 <= wait <= most
    world.down.clear()
    assert world.fetch() is not None
    assert world.decide() != Use(held)


def test_a_defect_is_told_the_others_are_asked_and_it_rests_like_any_failure() -> None:
    world = World(retry=8, retry_most=64)
    world.broken.add("first")
    assert world.fetch() is None
    assert "first: RuntimeError: a defect" in reason(world.landed())
    assert [(record.level, record.event) for record in world.log] == [(Level.ERROR, "collateral_upstream_failed")]
    assert world.fetch() is None
    assert len(world.asked) == 1  # not again at once
    assert isinstance(world.decide(), GiveUp)
    world.now += 8
    assert isinstance(world.decide(), Fetch)
    both = World(FIRST, SECOND)
    both.broken.add("first")
    assert both.fetch() is not None
    assert isinstance(both.landed(), Use)


def test_upstreams_are_asked_in_order_and_the_dead_are_left_alone() -> None:
    world = World(FIRST, SECOND, retry=10, retry_most=60)
    world.down.add("first")
    _ = world.warm()
    assert [url.split("/")[2] for url in world.asked] == ["first", *["second"] * 4]
    world.asked.clear()
    assert world.fetch(family(1)) is not None
    assert [url.split("/")[2] for url in world.asked] == ["second"] * 4
    assert [record.event for record in world.log] == [
        "collateral_upstream_failed",
        "collateral_fetched",
        "collateral_fetched",
    ]
    world.down = {"second"}
    world.now += 86400
    world.asked.clear()
    assert world.fetch() is not None
    assert [url.split("/")[2] for url in world.asked] == ["first"] * 4  # it came back, and is the first again


def test_retry_after_is_kept_to() -> None:
    world = World(retry=1, retry_most=4)
    world.status["first"] = HttpResponse(429, (("retry-after", "100"),))
    assert isinstance(world.decide(), Fetch)
    assert world.fetch() is None
    assert "https://first: TCB info: status 429" in reason(world.landed())
    for of in (family(), family(1)):
        for world.now in (NOW, NOW + 99):
            assert isinstance(world.decide(of), GiveUp)
            assert world.fetch(of) is None
    assert len(world.asked) == 1
    world.now = NOW + 100
    world.status.clear()
    assert world.fetch() is not None


def test_an_unknown_family_is_remembered_only_if_all_say_so() -> None:
    world = World(FIRST, SECOND, unknown=600, retry=5, retry_most=60)
    assert world.fetch(family(7)) is None
    assert len(world.asked) == 2
    assert "status 404" in reason(world.decide(family(7)))
    world.now += 449
    assert isinstance(world.decide(family(7)), GiveUp)
    world.now = NOW + 600
    assert isinstance(world.decide(family(7)), Fetch)
    world.down.add("second")
    assert world.fetch(family(7)) is None
    world.now += 10
    assert isinstance(world.decide(family(7)), Fetch)


def test_fetches_per_minute_and_the_share_of_the_known() -> None:
    world = World(fetches_per_minute=10, refresh=0, retry=0, retry_most=0)
    held = world.warm()
    fetched = 0
    for index in range(100, 200):
        if isinstance(world.decide(family(index)), Fetch):
            _ = world.fetch(family(index))
            fetched += 1
    assert fetched == 4  # ten, but for one that was fetched and five that are not for the new
    assert "too many fetches" in reason(world.decide(family(200)))
    world.now += 1
    for _ in range(5):
        assert isinstance(world.decide(), Refresh)
        _ = world.fetch()
    assert isinstance(world.decide(), Use)
    assert isinstance(world.decide(family(200)), GiveUp)
    asked = len(world.asked)
    _ = world.fetch()  # a caller is refused
    assert len(world.asked) == asked
    world.now += 60
    assert isinstance(world.decide(), Refresh)
    assert isinstance(world.decide(family(200)), Fetch)
    assert held.fmspc == PLATFORM.fmspc


def test_a_clock_that_steps_back_stops_nothing() -> None:
    world = World(retry=60, retry_most=60)
    world.down.add("first")
    assert world.fetch() is None
    assert isinstance(world.decide(), GiveUp)
    world.now -= 10 * 86400
    assert isinstance(world.decide(), Fetch)
    world.down.clear()
    assert world.fetch() is not None
    assert isinstance(world.decide(), Use)


def test_collateral_of_later_is_not_used_once_the_clock_stepped_back() -> None:
    world = World()
    world.cache.restore(family(), verified(NOW))
    assert isinstance(world.cache.decide(family(), NOW), Refresh)
    assert isinstance(world.cache.decide(family(), NOW - 1), Fetch)


def test_stale_needs_a_grace_and_an_outage() -> None:
    for grace, after, is_used in ((0, 0, False), (600, 0, True), (600, 599, True), (600, 600, False)):
        world = World(grace=grace, retry=5, retry_most=60)
        held = world.warm()
        world.now = LATE + after
        fresh_first = world.decide()
        assert isinstance(fresh_first, Fetch)
        world.down.add("first")
        assert world.fetch() is None
        assert world.landed() == Use(held) if is_used else isinstance(world.landed(), GiveUp)
        assert isinstance(world.decide(), Use if is_used else GiveUp)
        world.now += 5
        if is_used and after == 0:
            assert world.decide() == Refresh(held)  # the outage is known: nobody waits for it again
            world.down.clear()
            assert world.fetch() is not None
            assert world.landed() != Use(held)


def test_a_certificate_that_ends_before_the_rest_is_an_end_too_and_knows_no_grace() -> None:
    ends = Fault(name="ends", side="collateral", what="", tcb_signer=lambda draft: evolve(draft, not_after=NOW + 10))
    world = World(grace=3600)
    world.cache.restore(
        family(), verify_collateral(PLATFORM.having(ends).collateral(NOW), now=NOW, root=ROOT, grace=3600)
    )
    world.now = NOW + 10
    assert isinstance(world.decide(), Refresh)
    world.now = NOW + 11
    assert isinstance(world.decide(), Fetch)
    assert world.fetch() is not None
    assert isinstance(world.landed(), Use)


def test_a_fresh_answer_is_before_a_stale_one() -> None:
    world = World(FIRST, SECOND, grace=600)
    stale = SERVICE.answer(HttpRequest("GET", f"/tdx/certification/v4/tcb?fmspc={PLATFORM.fmspc.hex()}"), NOW)
    assert stale.status == 200
    world.age = COLLATERAL_SECONDS + 60
    kept = world.fetch()
    assert kept is not None  # better than nothing
    assert isinstance(world.landed(), Use)
    assert [record.event for record in world.log] == ["collateral_upstream_failed"] * 2
    world.age = 0
    world.now += 60
    assert isinstance(world.decide(), Refresh)
    assert world.fetch() is not None
    assert world.log[-1].event == "collateral_fetched"


def test_nothing_is_replaced_by_what_is_older() -> None:
    world = World()
    held = world.warm()
    newer = verified(NOW, issue=replace(held.issue, root_crl_number=held.issue.root_crl_number + 1))
    world.cache.restore(family(), newer)
    world.now += 10
    assert world.fetch() is None
    assert "it is older than the cached collateral" in str(world.log[-1].fields["error"])
    assert world.decide() == Use(newer)
    world.now = LATE  # but an expired one does not refuse
    assert world.fetch() is not None


def test_nothing_that_is_valid_is_replaced_by_what_has_expired() -> None:
    world = World()
    numbers = dict.fromkeys(CollateralIssue.__struct_fields__, 0)  # below those of any answer
    held = verified(NOW, issue=CollateralIssue(**numbers))
    world.cache.restore(family(), held)
    world.age = COLLATERAL_SECONDS + 60
    assert world.fetch() is None
    assert "it expired at" in str(world.log[-1].fields["error"])
    assert world.landed() == Use(held)


@pytest.mark.parametrize("issued", ["pck_crl_issued", "root_crl_issued"])
def test_no_younger_crl_is_replaced_by_an_older_one_of_the_same_number(issued: str) -> None:
    world = World()
    issue = world.warm().issue
    world.cache.restore(family(), verified(NOW, issue=replace(issue, **{issued: getattr(issue, issued) + 60})))
    world.now += 61
    world.age = 30
    assert world.fetch() is None
    assert "it is older than the cached collateral" in str(world.log[-1].fields["error"])


def test_what_has_expired_is_replaced_by_what_ends_later() -> None:
    cache, older, newer, late = World().cache, verified(NOW - 60), verified(NOW), NOW + 2 * COLLATERAL_SECONDS
    assert cache.replaces(older, newer, late)
    assert not cache.replaces(newer, older, late)


def test_collateral_of_two_tcb_recoveries_is_fetched_again() -> None:
    """As when Intel publishes one between two answers; the next round mends it."""
    world = World(FIRST, SECOND)
    later = CollateralService((PLATFORM.having(NEXT_RECOVERY),))
    target = FIRST.qe_identity(family(), "standard").removeprefix("https://first")
    world.status["first"] = later.answer(HttpRequest("GET", target), NOW)
    world.only = target
    assert world.fetch() is not None
    failed = next(record for record in world.log if record.event == "collateral_upstream_failed")
    assert "TCB evaluation data number 20, its QE identity 21" in str(failed.fields["error"])
    world.down.add("second")
    world.cache = PlatformCache((FIRST, SECOND), root=ROOT, seed=b"seed")
    assert isinstance(world.decide(), Fetch)
    assert world.fetch() is None
    assert "QE identity 21" in reason(world.landed())
    world.only = None
    world.status.clear()
    world.now += 120
    assert world.fetch() is not None


def test_a_new_key_of_the_ca_causes_one_fetch() -> None:
    """Collateral under the CA's old key is useless for a platform with a new one, however long it is valid."""
    world = World()
    old = world.warm()
    assert isinstance(world.decide(), Use)
    assert isinstance(world.cache.decide(family(), world.now, instead_of=old), Fetch)
    renewed = CollateralService((PLATFORM.having(NEW_CA_KEY),))
    world.service = renewed
    world.now += 1
    assert world.fetch() is not None
    decision = run(settle(world.cache, family(), old), world.perform)
    assert isinstance(decision, Use)
    assert decision.collateral.issuer_point != old.issuer_point
    assert isinstance(world.cache.decide(family(), world.now, instead_of=old), Use)  # who still has the old one


def test_a_ca_key_that_no_upstream_knows_causes_one_fetch_only() -> None:
    world = World()
    old = world.warm()
    assert isinstance(world.cache.decide(family(), world.now, instead_of=old), Fetch)
    assert world.fetch() is None
    given_up = run(settle(world.cache, family(), old), world.perform)
    assert "another key" in reason(given_up)
    assert "another key" in reason(world.cache.decide(family(), world.now + 60, instead_of=old))
    assert isinstance(world.decide(), Use)  # others are served as before
    world.now += world.cache.policy.unknown + 1
    assert isinstance(world.cache.decide(family(), world.now, instead_of=old), Fetch)


def test_the_same_again_is_no_news() -> None:
    world = World()
    held = world.warm()
    world.now += 86400
    world.age = 86400
    assert world.fetch() is None
    assert world.decide() == Use(held)
    assert world.log[-1].event == "collateral_fetched"


def test_a_service_whose_clock_is_ahead_is_waited_for_a_little() -> None:
    world = World(skew=5)
    world.age = -3
    assert world.fetch() is not None
    assert world.now == NOW + 3
    assert isinstance(world.decide(), Use)
    world = World(skew=5)
    world.age = -6
    assert world.fetch() is None
    assert world.now == NOW
    assert "check the clocks" in reason(world.decide())


def test_what_was_kept_is_used_at_once_and_refreshed() -> None:
    world = World()
    held = verified()
    world.cache.restore(family(), held)
    assert world.cache.held() == (held,)
    world.now += 60
    assert world.decide() == Refresh(held)
    assert world.fetch() is not None
    assert isinstance(world.decide(), Use)
    late = World()
    late.cache.restore(family(), held)
    late.now = LATE
    assert isinstance(late.decide(), Fetch)


def test_families_are_bounded_and_the_useless_go_first() -> None:
    world = World(families=4, fetches_per_minute=1000)
    held = world.warm()
    for index in range(50, 60):
        _ = world.fetch(family(index))
    assert world.decide() == Use(held)
    assert isinstance(world.decide(family(59)), GiveUp)
    assert isinstance(world.decide(family(50)), Fetch)
    full = World(families=1)
    _ = full.warm()
    assert full.fetch(family(1)) is not None
    assert [Family.of(one) for one in full.cache.held()] == [family(1)]


def test_jitter_differs_between_servers() -> None:
    waits = set()
    for seed in range(20):
        cache = PlatformCache([FIRST], root=ROOT, policy=CachePolicy(unknown=1000), seed=bytes([seed]))
        cache.gave_up(family(), "nobody knows", NOW, unknown=True)
        waits.add(next(s for s in range(2000) if isinstance(cache.decide(family(), NOW + s), Fetch)))
    assert len(waits) > 10
    assert all(750 <= wait <= 1000 for wait in waits)


def test_upstreams_are_named_and_none_twice() -> None:
    for upstreams in ((), (FIRST, FIRST)):
        with pytest.raises(ConfigurationError):
            _ = PlatformCache(upstreams, root=ROOT)


def test_a_round_as_a_dialogue() -> None:
    cache = PlatformCache([FIRST, SECOND], root=ROOT)
    answers = [
        (Get(url), SERVICE.answer(HttpRequest("GET", url.removeprefix("https://second")), NOW))
        for url in (
            SECOND.tcb_info(family(), "standard"),
            SECOND.qe_identity(family(), "standard"),
            SECOND.pck_crl(family()),
            SECOND.root_ca_crl,
        )
    ]
    told: list[Record] = []
    kept = Playbook(
        (Get(FIRST.tcb_info(family(), "standard")), TransportError("cut", maybe_delivered=True)),
        *answers,
        aside={Now: lambda _: NOW, Log: lambda effect: told.append(effect.record)},
    ).run(fetch(cache, family()))
    assert kept is not None
    assert authenticate_collateral(kept, root=ROOT).fmspc == PLATFORM.fmspc
    assert told[0].fields == {
        "fmspc": PLATFORM.fmspc.hex(),
        "ca": "platform",
        "tee": "TDX",
        "upstream": "https://first",
        "error": "cut",
    }
    assert told[1].fields["valid_until"] == "2027-02-14T08:00:00Z"
    assert Playbook((Now, 7)).run(clock()) == 7


@frozen
class _Begun:
    at: int
    is_known: bool


class Whatever(RuleBasedStateMachine):
    """Upstreams come and go, time passes, families ask: what is handed out may always be used, and bounds hold."""

    POLICY = CachePolicy(grace=3600, unknown=300, retry=3, retry_most=30, fetches_per_minute=6, families=4)

    @initialize(grace=st.sampled_from([0, 3600]))
    def begin(self, grace: int) -> None:
        self.world = World(FIRST, SECOND)
        self.world.cache = PlatformCache((FIRST, SECOND), root=ROOT, policy=evolve(self.POLICY, grace=grace))
        self.begun: list[_Begun] = []
        self.resting_until: dict[str, int] = {}

    @rule(host=st.sampled_from(["first", "second"]), how=st.sampled_from(["down", "busy", "broken", "honest"]))
    def change(self, host: str, how: str) -> None:
        self.world.down.discard(host)
        _ = self.world.status.pop(host, None)
        if how == "down":
            self.world.down.add(host)
        elif how != "honest":
            broken = HttpResponse(200, (), b"<html>")
            self.world.status[host] = HttpResponse(429, (("retry-after", "40"),)) if how == "busy" else broken

    @rule(seconds=st.sampled_from([1, 7, 40, 301, 86400, COLLATERAL_SECONDS - 100, COLLATERAL_SECONDS]))
    def wait(self, seconds: int) -> None:
        self.world.now += seconds

    @rule(age=st.sampled_from([0, 100, COLLATERAL_SECONDS - 50, COLLATERAL_SECONDS + 50, -3, -3600]))
    def serve_what_is_old(self, age: int) -> None:
        self.world.age = age

    @rule(index=st.sampled_from([0, 1, 2, 3, 4, 5, 6]))
    def ask(self, index: int) -> None:
        world, of = self.world, family(index)
        decision = world.decide(of)
        if isinstance(decision, Fetch | Refresh):
            before, began = len(world.asked), world.now
            _ = world.fetch(of)
            hosts = {url.split("/")[2] for url in world.asked[before:]}
            assert hosts, "a fetch was decided, and none was made"
            for host in hosts:
                assert began >= self.resting_until.get(host, 0), "it asked to be left alone"
                if host in world.status and world.status[host].status == 429:
                    self.resting_until[host] = world.now + 40
            self.begun.append(_Begun(began, isinstance(decision, Refresh)))
            again = world.decide(of)
            assert not isinstance(again, Fetch), "who failed, or succeeded, does not fetch again at once"
            decision = world.landed(of) if isinstance(decision, Fetch) else decision
        if isinstance(decision, Use | Refresh):
            held = decision.collateral
            assert Family.of(held) == of
            assert held.window[0] <= world.now <= held.window[1] + world.cache.policy.grace + 5  # it waits for clocks

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "begun"):
            return
        assert len(self.world.cache.held()) <= 4
        lately = [one for one in self.begun if one.at > self.world.now - 60]
        assert len(lately) <= 2 * self.POLICY.fetches_per_minute


Whatever.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestWhatever = Whatever.TestCase
