"""No key is ever lost: all that can befall a VM with one volume, and its disk opens afterwards.

Tried are both exchanges, our agent and the deployed clients; each message lost, doubled or delayed to any later point;
VM and server killed before and after each effect; the disk missing for a boot; in the two-phase exchange, also the
store backed up, and restored from that backup while it is younger than ``rotate_after``, with rotations in between:
some key of the backup opens the disk, and is handed out. Two such boots exhaustively, of a blank disk and of a
formatted one; longer lives at random.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import pytest
from attrs import define, evolve, field, frozen
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import Refused
from chutes_proto.keys import generations
from chutes_proto.keys.generations import Change, HandOut
from chutes_proto.store import _rows as rows
from chutes_proto.store._rows import Exchange, Read, VmRow
from chutes_proto.testing.store_suite._parts import VM, boot
from chutes_proto.units import rotation
from chutes_proto.units.boot import GrantBoot
from chutes_proto.units.operator import RestoreKey
from tests.conftest import SOAK
from tests.lifecycle.agents import boot_once
from tests.lifecycle.world import PASSES, VOLUME, Choices, Policy, World, explore

T = TypeVar("T")

unmeasured = pytest.mark.no_cover
"""To measure what `test_every_life_of_a_few_boots` covers would double the time of the others."""

EXCHANGES: tuple[Exchange, ...] = ("base", "two-phase")
POLICIES = [Policy(*policy) for policy in itertools.product(EXCHANGES, (True, False))]
BACKUPS = [Policy("two-phase", ours, backups=True) for ours in (True, False)]
DEPLOYED = Policy("two-phase", ours=False)
ROOT = Policy("provisioned", ours=False)
OUR_ROOT = Policy("provisioned", ours=True)
POLICIES += [ROOT, OUR_ROOT]
BACKUPS += [evolve(policy, backups=True) for policy in (ROOT, OUR_ROOT)]
RECOVERY = 3
"""How many undisturbed boots it may take until the VM is up again."""
STEADY = 2
"""For how many more it must stay up."""


@frozen
class Bounds:
    """How far a search goes: boots, messages under way at once, mishaps in one boot (None: all that can be)."""

    boots: int = 2
    in_flight: int = 1
    mishaps: int | None = None


def bounds(policy: Policy) -> tuple[Bounds, ...]:
    """The long form is two boots with all that can be, and three with less. Our agent asks again, so that it has many
    more ways than others through the same states. A third mishap in a boot leads deployed clients to no further one."""
    if policy.backups:
        return (Bounds(mishaps=2), Bounds(3, 0, 2)) if SOAK else (Bounds(3, 0, 1),)
    if policy.exchange == "base":
        return (Bounds(), Bounds(3, 2, 4)) if SOAK else (Bounds(),)
    if policy.exchange == "provisioned":
        if policy.ours:  # three: a host that rolls a disk back by a boot, and again
            return (Bounds(mishaps=2), Bounds(3, 0, 1)) if SOAK else (Bounds(mishaps=1), Bounds(3, 0, 1))
        return (Bounds(mishaps=3), Bounds(3, 2, 2)) if SOAK else (Bounds(mishaps=1),)
    return (Bounds(), Bounds(3, 2, 2 if policy.ours else 3)) if SOAK else (Bounds(mishaps=2),)


def disturbed(world: World, choices: Choices) -> World:
    """One boot of a copy."""
    after = world.copy()
    _ = boot_once(after, choices)
    return after


def undisturbed(world: World) -> bool:
    """One boot to which nothing happens; what was under way is lost."""
    world.flight = ()
    return boot_once(world, Choices())


def comes_up(world: World) -> int | None:
    """How many boots it takes, after which it stays up; None if it does not."""
    kept = world.copy()
    tries = next((number + 1 for number in range(RECOVERY) if undisturbed(kept)), None)
    return tries if all(undisturbed(kept) for _ in range(STEADY)) else None


def is_excused(world: World) -> bool:
    """The exception: a rekey that no format followed. It ends with an operator's restore, so that is tried."""
    opening = [row for row in world.rows() if world.opens(row) and row.state == "retired"]
    allowed = set() if world.policy.ours else {"rekey", "relisted"}  # "relisted": a prune came before the rekey
    if world.policy.exchange != "base" or not opening or not {row.retirement for row in opening} <= allowed:
        return False
    restored = world.copy()
    _ = restored.transact(RestoreKey(0, VM, VOLUME, opening[-1].generation, ""))
    return comes_up(restored) == 1


@define
class Search:
    """All worlds that some disturbed boots can lead to, and their ends."""

    policy: Policy
    in_flight: int = 1
    mishaps: int | None = None
    ways: int = 0
    excused: int = 0
    slowest: int = 0
    settled: set[object] = field(factory=set)

    def run(self, boots: int) -> str | None:
        """The story of a life after which the disk does not open; None if there is none."""
        blank, formatted = World(self.policy, self.in_flight), World(self.policy, self.in_flight)
        if self.policy.exchange == "provisioned":
            blank.copy_image()
            formatted.copy_image()
        assert undisturbed(formatted)
        worlds = [(blank, ""), (formatted, "formatted; ")]
        if self.policy.backups:
            aged = formatted.copy()
            assert undisturbed(aged)
            aged.now += PASSES
            aged.back_up(Choices([1]))
            worlds = [(aged, "formatted, a candidate made, and backed up; "), *(worlds if SOAK else ())]
        for number in range(boots):
            found: list[tuple[World, str]] = []
            for world, told in worlds:
                for after, choices in explore(partial(disturbed, world), self.mishaps):
                    self.ways += 1
                    if after.key not in self.settled:
                        story = f"{told}boot {number + 1}: {', '.join(choices.told) or 'as usual'}; "
                        if not self._settles(after):
                            return story
                        self.settled.add(after.key)
                        found.append((after, story))
            worlds = found
        return None

    def _settles(self, world: World) -> bool:
        tries = comes_up(world)
        self.slowest = max(self.slowest, tries or 0)
        if tries is None and is_excused(world):
            self.excused += 1
            return True
        return tries is not None


@pytest.mark.parametrize("policy", [*POLICIES, *BACKUPS], ids=str)
def test_every_life_of_a_few_boots(policy: Policy, figure: Callable[[str], None]) -> None:
    for bound in bounds(policy):
        search = Search(policy, bound.in_flight, bound.mishaps)
        assert search.run(bound.boots) is None
        assert len(search.settled) > 15
        assert search.ways > 100
        # the exception is reached where it is said to be, and nowhere else
        assert bool(search.excused) == (policy.exchange == "base" and not policy.ours)
        # a deployed client may have to wait for its turn of the two keys; ours tries both, and of a root disk a third
        takes_turns = policy.exchange != "base" and not policy.ours
        may_wait = policy.backups and not (policy == evolve(OUR_ROOT, backups=True) and bound.mishaps == 1)
        assert search.slowest == 1 + (takes_turns or may_wait)
        told = f"{search.ways} lives to {len(search.settled)} worlds; {search.excused} need an operator's restore"
        figure(f"{bound.boots} boots, mishaps in each {'any' if bound.mishaps is None else bound.mishaps}: {told}")


@pytest.mark.parametrize("ours", [True, False], ids=["our agent", "deployed client"])
def test_the_way_back_to_the_base_exchange(ours: bool) -> None:
    """It is refused, unless an operator allows it. Then the active key is given, and opens, but where the deployed
    client did not hear of its last rotation: there the pinned key does, once it is restored or the VM comes back."""
    policy = Policy("two-phase", ours)
    formatted = World(policy)
    assert undisturbed(formatted)
    locked = 0
    for world, _ in explore(partial(disturbed, formatted), 2):
        with pytest.raises(Refused, match="gets no boot token again"):
            world.copy().transact(boot("downgrade"))
        back = evolve(world.copy(), policy=evolve(policy, exchange="base"))
        opens = undisturbed(back)
        if not opens:
            locked += 1
            pinned = generations.pinned(back.rows())
            assert pinned
            assert world.opens(pinned)
            assert not generations.purgeable(back.rows(), 10**12, 0, 0)
            restored = back.copy()
            restored.transact(RestoreKey(0, VM, VOLUME, pinned.generation, ""))
            assert comes_up(restored) == 1
        assert comes_up(evolve(back.copy(), policy=policy)) is not None
    assert bool(locked) != ours


def test_a_first_boot_that_is_cut_short_comes_again_with_the_same_keys() -> None:
    """The store is backed up in between, and restored afterwards: the backup has the key that the disk got."""
    world = World(evolve(ROOT, backups=True))
    world.copy_image()
    assert not boot_once(world, Choices([0, 0, 0, 0, 0, 1]))  # killed before the token is removed
    world.back_up(Choices([1]))
    assert undisturbed(world)
    assert boot_once(world, Choices([0, 1])) or comes_up(world)


# --- random lives ---


class Drawn(Choices):
    """Choices of Hypothesis; usual ones are the more likely."""

    def __init__(self, draw: Callable[[Any], int]) -> None:
        super().__init__()
        self._draw = draw

    def pick(self, what: str, options: Sequence[T]) -> T:
        index = self._draw(st.just(0) | st.integers(0, len(options) - 1))
        if index:
            self.told.append(f"{what}: {options[index]}")
        return options[index]


@unmeasured
@pytest.mark.parametrize("policy", [*POLICIES, *BACKUPS], ids=str)
@given(st.data())
def test_long_lives(policy: Policy, data: st.DataObject) -> None:
    world = World(policy, in_flight=3)
    if policy.exchange == "provisioned":
        world.copy_image()
    for _ in range(data.draw(st.integers(1, 7), "boots")):
        choices = Drawn(data.draw)
        _ = boot_once(world, choices)
        forgotten = data.draw(st.integers(0, len(world.flight)), "forgotten")
        world.flight = world.flight[forgotten:]
    assert comes_up(world) is not None or is_excused(world)


# --- the model is not fooled ---


def hand_out_without_turns(*arguments: Any) -> HandOut:
    return HAND_OUT(*arguments[:3])


def confirm_retires_what_was_not_rotated(
    rows: Any, current: int | None, following: int, *, rotated: bool, at: int
) -> Change | None:
    (after,) = [row for row in rows if row.generation == following]
    if not rotated and after.state == "active":
        return Change((evolve(after, state="retired", retired_at=at, retirement="dropped", provisional=False),))
    return CONFIRM(rows, current, following, rotated=rotated, at=at)


def confirm_pins_nothing(*arguments: Any, **more: Any) -> Change | None:
    change = CONFIRM(*arguments, **more)
    return change and evolve(change, updated=tuple(evolve(row, provisional=False) for row in change.updated))


def prune_that_cannot_be_revived(rows: Any, at: int) -> Change:
    change = PRUNE(rows, at)
    return evolve(change, updated=tuple(evolve(row, retirement="rekey") for row in change.updated))


def fetch_that_always_renews(rows: Any, seal: Any, *_: Any) -> Any:
    return generations.rekey(rows, seal, 0)


HAND_OUT, CONFIRM, PRUNE = generations.hand_out, generations.confirm, generations.prune
BASE = Policy("base", ours=True)


@unmeasured
@pytest.mark.parametrize(
    ("policy", "name", "broken"),
    [
        (DEPLOYED, "hand_out", hand_out_without_turns),
        (DEPLOYED, "confirm", confirm_retires_what_was_not_rotated),
        (DEPLOYED, "confirm", confirm_pins_nothing),
        (ROOT, "hand_out", hand_out_without_turns),
        (ROOT, "confirm", confirm_pins_nothing),
        (OUR_ROOT, "confirm", confirm_pins_nothing),
        (BASE, "prune", prune_that_cannot_be_revived),
        (BASE, "fetch", fetch_that_always_renews),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_broken_rule_locks_a_disk(policy: Policy, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, name, broken)
    assert Search(policy, mishaps=1 if policy == OUR_ROOT else None).run(2) is not None


@unmeasured
def test_a_late_request_of_a_first_boot_locks_a_rotated_root_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That it counts only while its nonce is the youngest is a rule that matters."""
    arrived = itertools.count()

    def in_the_order_of_arrival(self: World, unit: Any) -> Any:
        if isinstance(unit, GrantBoot):
            unit = evolve(unit, nonce=evolve(unit.nonce, issued_at=unit.now - 10**6 + next(arrived)))
        return TRANSACT(self, unit)

    monkeypatch.setattr(World, "transact", in_the_order_of_arrival)
    assert Search(ROOT, mishaps=2).run(1) is not None


TRANSACT = World.transact


def hand_out_at_once(rows: Any, seal: Any, pace: Any, handed: int | None = None) -> HandOut:
    return HAND_OUT(rows, seal, evolve(pace, rotate_after=0), handed)


def hand_out_undoubting(rows: Any, *arguments: Any) -> HandOut:
    sure = [evolve(row, provisional=False) if row.state == "candidate" else row for row in rows]
    return HAND_OUT(sure, *arguments)


@unmeasured
@pytest.mark.parametrize("broken", [hand_out_at_once, hand_out_undoubting])
def test_a_broken_rule_locks_a_disk_after_a_restore(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "hand_out", broken)
    with pytest.raises(AssertionError, match=r"no key of the backup opens the disk|the disk is locked"):
        assert Search(BACKUPS[1], in_flight=0, mishaps=1).run(2) is None, "the disk is locked"


@unmeasured
def test_a_confirmation_of_an_older_boot_locks_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That only the newest attestation counts is a rule that matters: without it a late message locks a disk."""

    class Newest:
        """Whatever boot confirms is taken for the newest."""

        def __eq__(self, _: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class ReadAnything(Read[Any]):
        def __iter__(self) -> Any:
            row = yield from Read(self.kind, self.key, self.by)
            return evolve(row, attested=Newest()) if isinstance(row, VmRow) else row  # type: ignore[arg-type]

    def confirmable(unit: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "Read", ReadAnything)
            return (yield from CONFIRMABLE(unit))

    monkeypatch.setattr(rotation.ConfirmVolumes, "_confirmable", confirmable)
    assert Search(DEPLOYED, mishaps=2).run(2) is not None


CONFIRMABLE = rotation.ConfirmVolumes._confirmable
