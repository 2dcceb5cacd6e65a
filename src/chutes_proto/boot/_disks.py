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

from attrs import frozen

from chutes_proto.boot._flows import (
    BootGrant,
    BootSettings,
    Rotation,
    VolumeKeys,
    confirm_root,
    confirm_volumes,
    receive_keys,
)
from chutes_proto.boot._retry import described
from chutes_proto.effects import ActOnDisk, Flow, InspectDisk, Log
from chutes_proto.errors import ChutesError, DiskError, LocalProtocolError
from chutes_proto.log import Level, Record
from chutes_proto.luks.disk import Blank, Disk, Luks
from chutes_proto.luks.plan import (
    Format,
    Key,
    Keys,
    Plan,
    plan_open,
    plan_promoted,
    plan_root,
    plan_root_rotation,
    plan_rotation,
)
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret


@frozen
class OpenVolume:
    """A mapped volume. ``formatted``: this boot made it, and it holds no file system yet."""

    name: str
    device: str
    path: str
    """Of the open disk: ``/dev/mapper/NAME``."""
    formatted: bool


@frozen
class Unlocked:
    """The open disks of a VM. ``k3s_encryption_key`` comes with the two-phase and the provisioned exchange."""

    grant: BootGrant
    volumes: tuple[OpenVolume, ...]
    k3s_encryption_key: Secret | None = None


@frozen
class Forecast:
    """The steps for one disk, as far as they are known without the server.

    ``base``, ``two_phase`` and ``provisioned`` are the steps of each exchange; ``error`` is why there are none.
    ``condition`` is what they depend on, empty if on nothing.
    """

    volume: Volume
    disk: Disk | None = None
    base: Plan = ()
    two_phase: Plan = ()
    provisioned: Plan = ()
    condition: str = ""
    error: DiskError | None = None


def foresee(root: Volume | None, volumes: Sequence[Volume]) -> Flow[tuple[Forecast, ...]]:
    """Look at the disks and forecast what `unlock_root` and `unlock` would do, as far as that needs no server.

    Writes nothing, asks for no key and raises nothing.
    """
    seen: list[Forecast] = []
    for volume in volumes if root is None else (root, *volumes):
        disk: Disk | None = None
        try:
            disk = yield from InspectDisk(volume.device)
            if volume is root:
                base = two_phase = plan_root(volume, disk)
                keys = (Key.CURRENT, Key.NEXT, Key.SECOND)
                provisioned = (
                    *plan_root(volume, disk, keys),
                    *plan_root_rotation(volume),
                    *plan_promoted(volume, first=True),
                )
            else:
                base = plan_open(volume, disk, in_use=False)
                two_phase = provisioned = (
                    *plan_rotation(volume, disk, in_use=False, first=False),
                    *plan_promoted(volume, first=False),
                )
        except DiskError as exc:
            seen.append(Forecast(volume, disk, error=exc))
        else:
            consent = "the server does not know it to hold data; else the boot stops"
            condition = consent if isinstance(disk, Blank) else ""
            seen.append(Forecast(volume, disk, base, two_phase, provisioned, condition))
    return tuple(seen)


def unlock_root(settings: BootSettings, root: Volume, grant: BootGrant) -> Flow[OpenVolume]:
    """Open the root disk with one of the grant's passphrases, and rotate its key where the exchange does.

    It is never formatted. A key that cannot be added, and a confirmation that is refused or lost, leave the old keys on
    the disk, which is open all the same. Raises `DiskError`.
    """
    disks = yield from _inspect([root])
    keys: dict[Key, Secret] = {Key.CURRENT: grant.root_passphrase}
    if grant.root is not None:
        keys |= {Key.NEXT: grant.root.next} if grant.root.next != grant.root_passphrase else {}
        keys |= {Key.SECOND: grant.root.second} if grant.root.second is not None else {}
    plans = yield from _plan_all([root], lambda root: plan_root(root, disks[root.name], tuple(keys)))
    done = yield from _carry_out_all(plans, {root.name: keys})
    opened = _opened([root], plans, done)[0]
    if grant.root is not None and done[root.name].error is None and done[root.name].opened is not Key.SECOND:
        yield from _rotate_root(settings, root, grant, {**keys, Key.NEXT: grant.root.next})
    return opened


def _rotate_root(settings: BootSettings, root: Volume, grant: BootGrant, keys: Keys) -> Flow[None]:
    """Add the next key, confirm it, and take the others off.

    A disk that the second key opened stays as it is: the server offers that key as the current one to the next boot,
    which rotates. Else a host that rolled this disk back would have one that no key of the server opens.
    """
    added = yield from _carry_out(plan_root_rotation(root), keys)
    if added.error is None:
        try:
            _ = yield from confirm_root(settings, grant)
        except ChutesError as exc:
            yield from Log(Record.of(Level.WARNING, "rotation_undecided", volumes=[root.name], **described(exc)))
        else:
            _ = yield from _carry_out(plan_promoted(root, first=True), keys)


def unlock(settings: BootSettings, volumes: Sequence[Volume], *, grant: BootGrant | None = None) -> Flow[Unlocked]:
    """Open every volume of the VM, format blank disks where that is allowed, rotate keys where the exchange does.

    ``volumes`` is the whole set; a server in the base exchange retires the keys of all others. With a ``grant`` of an
    earlier run it continues there. A next key that cannot be added, and a confirmation that is refused or lost, leave
    the old keys on the disks, which are open all the same.

    Raises as `receive_keys` does, and `DiskError`: for a disk that must not be touched before any disk is, otherwise
    for the first that did not open, once all others are open.
    """
    if len({volume.name for volume in volumes}) != len(volumes) or not volumes:
        raise LocalProtocolError("a boot needs at least one volume, and a different name for each")
    disks = yield from _inspect(volumes)
    # no answer could make a foreign disk ours
    _ = yield from _plan_all(volumes, lambda volume: plan_open(volume, disks[volume.name], in_use=False))
    formatted = {name: isinstance(disk, Luks) for name, disk in disks.items()}
    received = yield from receive_keys(settings, formatted, grant=grant)
    if isinstance(received, Rotation):
        return (yield from _rotate(settings, volumes, disks, received))
    return (yield from _open(volumes, disks, *received))


def _open(
    volumes: Sequence[Volume], disks: Mapping[str, Disk], grant: BootGrant, received: VolumeKeys
) -> Flow[Unlocked]:
    def planned(volume: Volume) -> Plan:
        return plan_open(volume, disks[volume.name], in_use=received[volume.name].is_in_use)

    keys = {key.volume: {Key.CURRENT: key.passphrase} for key in received}
    try:
        plans = yield from _plan_all(volumes, planned)
        done = yield from _carry_out_all(plans, keys)
    finally:
        _wipe(keys.values())
    return Unlocked(grant, _opened(volumes, plans, done))


def _rotate(
    settings: BootSettings, volumes: Sequence[Volume], disks: Mapping[str, Disk], rotation: Rotation
) -> Flow[Unlocked]:
    def planned(volume: Volume) -> Plan:
        pair = rotation.keys[volume.name]
        if pair.current == pair.next:  # no rotation is due
            return plan_open(volume, disks[volume.name], in_use=pair.is_in_use)
        return plan_rotation(volume, disks[volume.name], in_use=pair.is_in_use, first=pair.current is None)

    keys: dict[str, dict[Key, Secret]] = {
        name: {Key.NEXT: pair.next} if pair.current is None else {Key.CURRENT: pair.current, Key.NEXT: pair.next}
        for name, pair in rotation.keys.items()
    }
    try:
        plans = yield from _plan_all(volumes, planned)
        done = yield from _carry_out_all(plans, keys)
        for name, came in done.items():
            if came.error is None:
                rotation.added(name)
            elif came.opened is not Key.CURRENT:
                rotation.left_out(name)
        results = yield from _confirm(rotation, settings)
        promoted = {
            volume.name: plan_promoted(volume, first=rotation.keys[volume.name].current is None)
            for volume in volumes
            if results.get(volume.name) == "promoted"
        }
        _ = yield from _carry_out_all(promoted, keys)  # what stays on a disk after this opens it, and goes another time
    finally:
        _wipe(keys.values())
    return Unlocked(rotation.grant, _opened(volumes, plans, done), rotation.k3s_encryption_key)


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


def _plan_all(volumes: Sequence[Volume], planned: Callable[[Volume], Plan]) -> Flow[dict[str, Plan]]:
    plans: dict[str, Plan] = {}
    for volume in volumes:
        try:
            plans[volume.name] = planned(volume)
        except DiskError as exc:
            yield from tell_failure(volume.name, exc)
            raise
    return plans


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
            reply: Key | None = yield from ActOnDisk(action, keys)
        except DiskError as exc:
            yield from tell_failure(action.volume, exc)
            return _Done(opened, exc)
        if isinstance(reply, Key):
            opened = reply
            opening = Record.of(Level.INFO, "disk_opened", volume=action.volume, device=action.device, key=reply.value)
            yield from Log(opening)
    return _Done(opened)


def tell_failure(volume: str, error: DiskError) -> Flow[None]:
    """Log what is wrong with the disk of a volume."""
    fields = {"volume": volume, "device": error.device, "reason": error.reason, "text": str(error)}
    yield from Log(Record.of(Level.ERROR, "disk_failed", **fields))


def _opened(volumes: Sequence[Volume], plans: Mapping[str, Plan], done: Mapping[str, _Done]) -> tuple[OpenVolume, ...]:
    """The volumes as they are now. Raises the `DiskError` of the first that did not open."""
    for came in done.values():
        if came.opened is None and came.error is not None:
            raise came.error
    formatted = {name for name, plan in plans.items() if any(isinstance(action, Format) for action in plan)}
    return tuple(OpenVolume(v.name, v.device, f"/dev/mapper/{v.mapping}", v.name in formatted) for v in volumes)


def _wipe(keys: Iterable[Keys]) -> None:
    for ring in keys:
        for secret in ring.values():
            secret.wipe()
