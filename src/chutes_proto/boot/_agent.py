"""The boot agent's whole run, as flows: the root disk, then the volumes, here or in the booted system.

Rules kept here:

* all disks of a run are looked at before a server is asked for anything, and one that must not be opened ends it there;
* everything shares one deadline, which counts from the beginning;
* the root passphrase opens the root disk and is wiped; the root disk is never formatted, for no answer permits that;
* a fresh copy of the published image is known by its mark, and the server is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import evolve, frozen

from chutes_proto.boot._disks import OpenVolume, foresee, tell_failure, unlock, unlock_root
from chutes_proto.boot._flows import BootGrant, BootSettings, boot
from chutes_proto.effects import Flow, Log, Sleep, Uptime
from chutes_proto.errors import LocalProtocolError
from chutes_proto.log import Level, Record
from chutes_proto.luks.disk import Disk, Luks
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret

_LOOK_AGAIN: Final = 0.5


@frozen
class Booted:
    """The result of a run. ``grant`` was received at ``at`` (`Uptime`) and serves a later run that opens the volumes.

    ``k3s_encryption_key`` comes with the two-phase and the provisioned exchange.
    """

    grant: BootGrant
    at: float
    opened: tuple[OpenVolume, ...] = ()
    k3s_encryption_key: Secret | None = None


def run_agent(
    settings: BootSettings, root: Volume | None, volumes: Sequence[Volume], *, disk_wait_seconds: float = 0.0
) -> Flow[Booted]:
    """Boot, then open the root disk and ``volumes``: the VM's whole set, or none to leave them to a later run.

    Disks may take ``disk_wait_seconds`` to appear, as far as the deadline permits. Raises as `unlock` does; for a disk
    that must not be opened, before any request is sent.
    """
    settings = yield from _begun(settings)
    disks = yield from _look(settings, root, volumes, disk_wait_seconds)
    is_fresh = any(isinstance(disk, Luks) and disk.header.is_fresh_image for disk in disks[: 1 if root else 0])
    settings = evolve(settings, first_boot=is_fresh)
    grant = yield from boot(settings)
    at = yield from Uptime()
    try:
        opened = () if root is None else ((yield from unlock_root(settings, root, grant)),)
    finally:
        grant.wipe()
    if not volumes:
        return Booted(grant, at, opened)
    return (yield from _go_on(settings, volumes, grant, at, opened))


def resume_agent(
    settings: BootSettings, volumes: Sequence[Volume], grant: BootGrant, *, disk_wait_seconds: float = 0.0
) -> Flow[Booted]:
    """Open the volumes that an earlier run left, with its grant. Arguments and errors are those of `run_agent`."""
    if not volumes:
        raise LocalProtocolError("there are no volumes to open; name at least one in the settings")
    settings = yield from _begun(settings)
    _ = yield from _look(settings, None, volumes, disk_wait_seconds)
    return (yield from _go_on(settings, volumes, grant, (yield from Uptime()), ()))


def _begun(settings: BootSettings) -> Flow[BootSettings]:
    """Start the deadline: it counts from now, for all requests of the run."""
    return evolve(settings, retry=evolve(settings.retry, started=(yield from Uptime())))


def _look(
    settings: BootSettings, root: Volume | None, volumes: Sequence[Volume], wait: float
) -> Flow[list[Disk | None]]:
    """Return what the disks hold, the root disk first.

    Raises the `DiskError` of the first that must not be opened or does not appear in time, and logs all of them.
    """
    began = yield from Uptime()
    wait = min(wait, settings.retry.deadline)  # which has begun just now
    devices = [volume.device for volume in ([] if root is None else [root]) + [*volumes]]
    if devices:  # a run that leaves the volumes to a later one, without a root disk, has none
        yield from Log(Record.of(Level.INFO, "disks_looked_at", devices=devices))
    awaited = False
    while True:
        found = yield from foresee(root, volumes)
        errors = {seen.volume.name: seen.error for seen in found if seen.error is not None}
        if not errors:
            return [seen.disk for seen in found]
        missing = all(error.reason == "unavailable" for error in errors.values())
        if not missing or (yield from Uptime()) - began >= wait:
            for name, error in errors.items():
                yield from tell_failure(name, error)
            raise next(iter(errors.values()))
        if not awaited:
            devices = [error.device for error in errors.values()]
            yield from Log(Record.of(Level.INFO, "disks_awaited", devices=devices, wait=wait))
            awaited = True
        yield from Sleep(_LOOK_AGAIN)


def _go_on(
    settings: BootSettings, volumes: Sequence[Volume], grant: BootGrant, at: float, opened: tuple[OpenVolume, ...]
) -> Flow[Booted]:
    unlocked = yield from unlock(settings, volumes, grant=grant)
    unlocked.grant.wipe()
    return Booted(unlocked.grant, at, (*opened, *unlocked.volumes), unlocked.k3s_encryption_key)
