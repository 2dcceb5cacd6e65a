"""Unlock a VM's disks, as flows: look at them, get their keys, open or format them, rotate.

Rules kept here:

* every disk is looked at before anything is asked for, and the server learns which of them have a header;
* every step of every disk is planned before the first is taken; a disk that must not be touched stops the boot;
* the exchange follows the grant; with a grant of an earlier run, it continues there;
* one disk's failure does not keep the others from being opened and confirmed; it is raised afterwards;
* keys are wiped once they were used, also after an error.

``docs/explanation/disks.md`` says what happens to a disk and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from attrs import frozen

from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, confirm_volumes, receive_keys
from chutes_proto.boot._retry import described
from chutes_proto.effects import ActOnDisk, Flow, InspectDisk, Log
from chutes_proto.errors import ChutesError, DiskError, LocalProtocolError
from chutes_proto.log import Level, Record
from chutes_proto.luks.disk import Blank, Disk, Luks
from chutes_proto.luks.plan import Action, Format, Key, Keys, Plan, plan_open, plan_promoted, plan_root, plan_rotation
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret

T = TypeVar("T")


@frozen
class OpenVolume:
    """A mapped volume. ``formatted``: this boot made it, and it holds no file system yet."""

    name: str
    device: str
    mapping: str
    formatted: bool


@frozen
class Unlocked:
    """The result of `unlock`. ``k3s_encryption_key`` comes with the two-phase exchange only."""

    grant: BootGrant
    volumes: tuple[OpenVolume, ...]
    k3s_encryption_key: Secret | None = None


@frozen
class Forecast:
    """The steps for one disk, as far as they are known without the server.

    ``base`` and ``two_phase`` are the steps of either exchange; ``error`` is why there are none. ``condition`` is what
    they depend on, empty if on nothing.
    """

    volume: Volume
    disk: Disk | None = None
    base: Plan = ()
    two_phase: Plan = ()
    condition: str = ""
    error: DiskError | None = None


def forecast(volumes: Sequence[Volume]) -> Flow[tuple[Forecast, ...]]:
    """Look at the disks and forecast what `unlock` would do. Writes nothing, asks for no key and raises nothing."""
    seen: list[Forecast] = []
    for volume in volumes:
        disk: Disk | None = None
        try:
            disk = yield from InspectDisk(volume.device)
            base = plan_open(volume, disk, in_use=False)
            two_phase = (*plan_rotation(volume, disk, in_use=False, first=False), *plan_promoted(volume))
        except DiskError as exc:
            seen.append(Forecast(volume, disk, error=exc))
        else:
            consent = "the server does not know it to hold data; else the boot stops"
            seen.append(Forecast(volume, disk, base, two_phase, consent if isinstance(disk, Blank) else ""))
    return tuple(seen)


def unlock_root(root: Volume, grant: BootGrant) -> Flow[OpenVolume]:
    """Open the root disk with the grant's passphrase; it is never formatted. Raises `DiskError`."""
    disks = yield from _inspect([root])
    plan = yield from _planned(root, partial(plan_root, root, disks[root.name]))
    _raise_unopened({root.name: (yield from _carry_out(plan, {Key.CURRENT: grant.root_passphrase}))})
    return _opened(root, plan)


def unlock(settings: BootSettings, volumes: Sequence[Volume], *, grant: BootGrant | None = None) -> Flow[Unlocked]:
    """Open every volume of the VM, format blank disks where that is allowed, rotate keys where the exchange does.

    ``volumes`` is the whole set; a server in the base exchange retires the keys of all others. With a ``grant`` of an
    earlier run it continues there. A next key that cannot be added, and a confirmation that is refused or lost, leave
    the old keys on the disks, which are open all the same.

    Raises as `receive_keys` does, and `DiskError`: for a disk that must not be touched before any disk is, otherwise
    for the first that did not open, once all others are open.
    """
    by_name = {volume.name: volume for volume in volumes}
    if len(by_name) != len(volumes) or not volumes:
        raise LocalProtocolError("a boot needs at least one volume, and a different name for each")
    disks = yield from _inspect(volumes)
    for volume in volumes:  # no answer could make a foreign disk ours
        _ = yield from _planned(volume, partial(plan_open, volume, disks[volume.name], in_use=False))
    formatted = {name: isinstance(disk, Luks) for name, disk in disks.items()}
    received = yield from receive_keys(settings, formatted, grant=grant)
    if isinstance(received, Rotation):
        return (yield from _rotate(settings, by_name, disks, received))
    return (yield from _open(by_name, disks, *received))


def _open(
    volumes: Mapping[str, Volume], disks: Mapping[str, Disk], grant: BootGrant, received: VolumeKeys
) -> Flow[Unlocked]:
    keys = {key.volume: {Key.CURRENT: key.passphrase} for key in received}
    try:
        plans: dict[str, Plan] = {}
        for name, volume in volumes.items():
            plan = partial(plan_open, volume, disks[name], in_use=received[name].is_in_use)
            plans[name] = yield from _planned(volume, plan)
        done = yield from _carry_out_all(plans, keys)
    finally:
        _wipe(keys.values())
    _raise_unopened(done)
    return Unlocked(grant, tuple(_opened(volumes[name], plan) for name, plan in plans.items()))


def _rotate(
    settings: BootSettings, volumes: Mapping[str, Volume], disks: Mapping[str, Disk], rotation: Rotation
) -> Flow[Unlocked]:
    keys: dict[str, dict[Key, Secret]] = {
        name: {Key.NEXT: pair.next} if pair.current is None else {Key.CURRENT: pair.current, Key.NEXT: pair.next}
        for name, pair in rotation.keys.items()
    }
    try:
        plans: dict[str, Plan] = {}
        for name, volume in volumes.items():
            known = {"in_use": rotation.keys[name].is_in_use, "first": rotation.keys[name].current is None}
            plans[name] = yield from _planned(volume, partial(plan_rotation, volume, disks[name], **known))
        done = yield from _carry_out_all(plans, keys)
        for name, came in done.items():
            if came.error is None:
                rotation.added(name)
            elif came.opened is not Key.CURRENT:
                rotation.left_out(name)
        results = yield from _confirm(rotation, settings)
        promoted = {name: plan_promoted(volumes[name]) for name, result in results.items() if result == "promoted"}
        _ = yield from _carry_out_all(promoted, keys)  # what stays on a disk after this opens it, and goes another time
    finally:
        _wipe(keys.values())
    _raise_unopened(done)
    opened = tuple(_opened(volumes[name], plan) for name, plan in plans.items())
    return Unlocked(rotation.grant, opened, rotation.k3s_encryption_key)


def _confirm(rotation: Rotation, settings: BootSettings) -> Flow[Mapping[str, str]]:
    """Confirm a rotation; the result of each volume, none where nothing is known, and then both keys stay."""
    try:
        return (yield from confirm_volumes(rotation, retry=settings.retry))
    except ChutesError as exc:
        yield from Log(Record.of(Level.WARNING, "rotation_undecided", volumes=[*rotation.report], **described(exc)))
        return {}


# --- one disk after the other ---


@frozen
class _Done:
    """The progress of a plan: the key that opened the disk, and the error that ended it early."""

    opened: Key | None
    error: DiskError | None = None


def _inspect(volumes: Sequence[Volume]) -> Flow[dict[str, Disk]]:
    disks: dict[str, Disk] = {}
    for volume in volumes:
        try:
            disk = yield from InspectDisk(volume.device)
        except DiskError as exc:
            yield from tell_failure(volume.name, exc)
            raise
        found = Record.of(Level.INFO, "disk_found", volume=volume.name, device=volume.device, holds=str(disk))
        yield from Log(found)
        disks[volume.name] = disk
    return disks


def _planned(volume: Volume, plan: Callable[[], Plan]) -> Flow[Plan]:
    try:
        return plan()
    except DiskError as exc:
        yield from tell_failure(volume.name, exc)
        raise


def _carry_out_all(plans: Mapping[str, Plan], keys: Mapping[str, Keys]) -> Flow[dict[str, _Done]]:
    done: dict[str, _Done] = {}
    for name, plan in plans.items():
        done[name] = yield from _carry_out(plan, keys[name])
    return done


def _carry_out(plan: Plan, keys: Keys) -> Flow[_Done]:
    """Carry a plan out, step by step, until one fails."""
    opened: Key | None = None
    for action in plan:
        yield from Log(Record.of(Level.INFO, "disk_action", **action.as_dict()))
        try:
            reply = yield from _act(action, keys)
        except DiskError as exc:
            yield from tell_failure(action.volume, exc)
            return _Done(opened, exc)
        if isinstance(reply, Key):
            opened = reply
            opening = Record.of(Level.INFO, "disk_opened", volume=action.volume, device=action.device, key=reply.value)
            yield from Log(opening)
    return _Done(opened)


def _act(action: Action[T], keys: Keys) -> Flow[T]:
    return (yield from ActOnDisk(action, keys))


def tell_failure(volume: str, error: DiskError) -> Flow[None]:
    """Log what is wrong with the disk of a volume."""
    fields = {"volume": volume, "device": error.device, "reason": error.reason, "text": str(error)}
    yield from Log(Record.of(Level.ERROR, "disk_failed", **fields))


def _opened(volume: Volume, plan: Plan) -> OpenVolume:
    formatted = any(isinstance(action, Format) for action in plan)
    return OpenVolume(volume.name, volume.device, f"/dev/mapper/{volume.mapping}", formatted)


def _raise_unopened(done: Mapping[str, _Done]) -> None:
    for came in done.values():
        if came.opened is None and came.error is not None:
            raise came.error


def _wipe(keys: Iterable[Keys]) -> None:
    for ring in keys:
        for secret in ring.values():
            secret.wipe()
