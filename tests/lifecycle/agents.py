"""The VMs' programs: our agent and deployed clients, in each exchange.

Each function is one boot with one disk, from the granted boot on. It returns whether the VM is up, with its disk open.
"""

from __future__ import annotations

import contextlib
from typing import TypeVar

from attrs import evolve

from chutes_proto.errors import Refused
from chutes_proto.store._run import Unit
from chutes_proto.testing.store_suite._parts import confirm, sync
from chutes_proto.units.boot import BootGrant, GrantBoot
from chutes_proto.units.rotation import ConfirmRoot, HandedKeys
from chutes_proto.units.volumes import VolumeKeys
from tests.lifecycle.world import OTHER, VOLUME, Choices, Killed, NoAnswer, World

T = TypeVar("T")

TRIES = 2
"""How often our agent sends a request, the same one each time."""


def boot_once(world: World, choices: Choices) -> bool:
    """One boot under the world's policy."""
    world.pass_time(choices)
    fates = ("there",) if world.policy.backups and world.policy.exchange == "provisioned" else ("there", "missing")
    missing = choices.pick("disk", fates) == "missing"
    agent = {
        ("base", True): _base_ours,
        ("base", False): _base_deployed,
        ("two-phase", True): _two_phase_ours,
        ("two-phase", False): _two_phase_deployed,
        ("provisioned", True): _root_ours,
        ("provisioned", False): _root_deployed,
    }[world.policy.exchange, world.policy.ours]
    try:
        up = agent(world, choices, missing)
    except (Killed, NoAnswer, Refused):
        up = False
    world.deliver(choices)
    return up


def _base_ours(world: World, choices: Choices, missing: bool) -> bool:
    granted = world.granted()
    volumes = [OTHER] if missing else [VOLUME]
    unit = sync(granted, "body", *volumes)
    formatted = frozenset({VOLUME} if world.slots and not missing else ())
    keys = _again(world, evolve(unit, formatted=formatted), choices)
    return not missing and _open_or_format(world, keys, choices, consent=True)


def _base_deployed(world: World, choices: Choices, missing: bool) -> bool:
    granted = world.granted()
    if missing:
        unit = sync(granted, "body", OTHER)
    else:
        unit = sync(granted, "body", VOLUME, rekey=[] if world.slots else [VOLUME])
    keys = world.ask(evolve(unit, certificate=None), choices)
    return not missing and _open_or_format(world, keys, choices, consent=False)


def _open_or_format(world: World, keys: VolumeKeys, choices: Choices, *, consent: bool) -> bool:
    key = dict(keys.passphrases)[VOLUME].reveal()
    if world.slots:
        return key in world.slots
    if consent and VOLUME in keys.in_use:
        return False
    return world.write((key,), choices)


def _two_phase_ours(world: World, choices: Choices, missing: bool) -> bool:
    """Opens with `next` where `current` does not; takes a key off the disk only once it heard which is active, and
    then neither that one nor the one before it."""
    granted = world.granted()
    formatted = [VOLUME] if world.slots and not missing else []
    unit = world.attest(granted, OTHER if missing else VOLUME, formatted=formatted)
    handed = _again(world, unit, choices)
    if missing:
        return False
    current, following = _pair(handed)
    if not world.slots:
        if VOLUME in handed.in_use or not world.write((current or following,), choices):
            return False
    elif {*world.slots}.isdisjoint({current, following}):
        return False
    added = following in world.slots or world.write((*world.slots, following), choices)
    try:
        _ = _again(world, confirm(unit, {VOLUME: added}), choices)
    except (NoAnswer, Refused):
        return True
    if added and current != following:
        kept = tuple(key for key in dict.fromkeys(world.slots) if key in (current, following))
        _ = world.write(kept, choices)
    return True


def _two_phase_deployed(world: World, choices: Choices, missing: bool) -> bool:
    """As image 1.3 does: asks once, acts on the status alone, and takes the new key off again if it is not 200.

    It adds a key that the disk has already in a second slot, and takes a key off one slot."""
    granted = world.granted()
    unit = world.attest(granted, OTHER if missing else VOLUME)
    handed = world.ask(unit, choices)
    if missing:
        return False
    current, following = _pair(handed)
    key, more = (following, None) if current is None else (current, following)
    if not world.slots:
        if not world.write((key,), choices):
            return False
    elif key not in world.slots:
        return False
    added = more is not None and world.write((*world.slots, more), choices)
    try:
        _ = world.ask(confirm(unit, {VOLUME: added}), choices)
        confirmed = True
    except (NoAnswer, Refused):
        confirmed = False
    if added and more is not None:
        slots = [*world.slots]
        slots.remove(key if confirmed else more)
        _ = world.write(tuple(slots), choices)
    return True


def _root_deployed(world: World, choices: Choices, missing: bool) -> bool:
    """The root disk of image 1.4.0, which asks up to `TRIES` times for the boot and once for the confirmation.

    What its storage does is two-phase.
    """
    unit, granted = _root_granted(world, choices, missing, second_key=False)
    if granted.root is None or granted.root_next is None:
        return False
    key, following = granted.root.reveal(), granted.root_next.reveal()
    if key not in world.slots:
        return False
    _remove_mark(world, choices)
    before = world.slots
    if not world.write((*before, following), choices):
        return False
    try:
        _ = world.ask(_confirm_root(unit), choices)
    except (NoAnswer, Refused):
        return world.write(before, choices)
    return world.write((following,), choices)


def _root_ours(world: World, choices: Choices, missing: bool) -> bool:
    """Asks for the second key, opens with any of the three, and takes none off before it heard that the next is active.

    It leaves a disk that the second key opened as it is."""
    unit, granted = _root_granted(world, choices, missing, second_key=True)
    if granted.root is None or granted.root_next is None:
        return False
    key, following = granted.root.reveal(), granted.root_next.reveal()
    second = None if granted.root_second is None else granted.root_second.reveal()
    if {*world.slots}.isdisjoint({key, following}):
        return second in world.slots
    _remove_mark(world, choices)
    if following not in world.slots and not world.write((*world.slots, following), choices):
        return True
    try:
        _ = _again(world, _confirm_root(unit), choices)
    except (NoAnswer, Refused):
        return True
    _ = world.write((following,), choices)
    return True


def _root_granted(world: World, choices: Choices, missing: bool, *, second_key: bool) -> tuple[GrantBoot, BootGrant]:
    """A granted boot. A disk that is ``missing`` is one that its host rolls back, or copies anew."""
    if missing:
        if world.past is None or choices.pick("disk", ("rolled back", "copied anew")) == "copied anew":
            world.copy_image()
        else:
            world.slots, world.fresh = world.past
    world.past = world.slots, world.fresh
    for _ in range(TRIES):
        unit = world.provisioned(second_key=second_key)
        with contextlib.suppress(NoAnswer):
            return unit, world.ask(unit, choices)
    raise NoAnswer


def _remove_mark(world: World, choices: Choices) -> None:
    """Remove the mark of a fresh image, once its disk is open."""
    if world.fresh:
        if choices.pick("token", ("removed", "killed before")) == "killed before":
            raise Killed
        world.fresh, world.data = False, True


def _confirm_root(unit: GrantBoot) -> ConfirmRoot:
    assert unit.rotation
    return ConfirmRoot(
        now=unit.now + 1,
        request_id=f"confirm {unit.boot_id}",
        vm=unit.vm,
        nonce_digest=unit.rotation.confirm_digest,
        body_digest=b"rotated",
        rotated=True,
        vault=unit.vault,
    )


def _pair(handed: HandedKeys) -> tuple[bytes | None, bytes]:
    pair = dict(handed.volumes)[VOLUME]
    return None if pair.current is None else pair.current.reveal(), pair.next.reveal()


def _again(world: World, unit: Unit[T], choices: Choices) -> T:
    """Ask until there is an answer."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(NoAnswer):
            return world.ask(unit, choices)
    return world.ask(unit, choices)
