"""The boot agent's whole run, as flows: the root disk, then the volumes, here or in the booted system.

Rules kept here:

* all disks of a run are looked at before a server is asked for anything, and one that must not be opened ends it there;
* everything shares one deadline, which counts from the beginning;
* the root passphrase opens the root disk and is wiped; the root disk is never formatted, for no answer permits that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import evolve, frozen

from chutes_proto.boot._disks import Forecast, OpenVolume, forecast, tell_failure, unlock, unlock_root
from chutes_proto.boot._flows import BootGrant, BootSettings, boot
from chutes_proto.effects import Flow, InspectDisk, Log, Sleep, Uptime
from chutes_proto.errors import DiskError, LocalProtocolError
from chutes_proto.log import Level, Record, Value
from chutes_proto.luks.disk import Disk
from chutes_proto.luks.plan import plan_root
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret

_LOOK_AGAIN: Final = 0.5


@frozen
class Booted:
    """What a run has done. ``grant`` is still of use where volumes are left to a later one, when it was made at ``at``.

    ``k3s_encryption_key`` is of the two-phase exchange only.
    """

    grant: BootGrant
    at: float
    opened: tuple[OpenVolume, ...] = ()
    k3s_encryption_key: Secret | None = None


def run_agent(
    settings: BootSettings, root: Volume | None, volumes: Sequence[Volume], *, patience: float = 0.0
) -> Flow[Booted]:
    """Boot and open what there is: the root disk, and the volumes, which are the whole set, or none to leave them.

    ``patience`` is how many seconds disks may take to appear. Raises as `unlock` does, also before anything was asked,
    for a disk that must not be opened.
    """
    settings = yield from _begun(settings)
    yield from _look(root, volumes, patience)
    grant = yield from boot(settings)
    at = yield from Uptime()
    try:
        opened = () if root is None else ((yield from unlock_root(root, grant)),)
    finally:
        grant.root_passphrase.wipe()
    if not volumes:
        return Booted(grant, at, opened)
    return (yield from _go_on(settings, volumes, grant, at, opened))


def resume_agent(
    settings: BootSettings, volumes: Sequence[Volume], grant: BootGrant, *, patience: float = 0.0
) -> Flow[Booted]:
    """Open the volumes that an earlier run left, with its grant. Arguments and errors are those of `run_agent`."""
    if not volumes:
        raise LocalProtocolError("there is nothing to go on with: no volumes")
    settings = yield from _begun(settings)
    yield from _look(None, volumes, patience)
    return (yield from _go_on(settings, volumes, grant, (yield from Uptime()), ()))


def foresee(root: Volume | None, volumes: Sequence[Volume]) -> Flow[tuple[Forecast, ...]]:
    """What `run_agent` would do to each disk, as far as no server need be asked; it raises nothing."""
    first = () if root is None else ((yield from _foresee_root(root)),)
    return (*first, *(yield from forecast(volumes)))


def _begun(settings: BootSettings) -> Flow[BootSettings]:
    """The same, with a deadline that counts from now for all that is asked."""
    return evolve(settings, retry=evolve(settings.retry, started=(yield from Uptime())))


def _look(root: Volume | None, volumes: Sequence[Volume], patience: float) -> Flow[None]:
    """Raises the `DiskError` of the first disk that must not be opened, or has not appeared in time; tells all."""
    began = yield from Uptime()
    disks = [] if root is None else [root.device]
    looked_at: dict[str, Value] = {"devices": [*disks, *(volume.device for volume in volumes)]}
    yield from Log(Record(Level.INFO, "disks_looked_at", looked_at))
    awaited = False
    while True:
        errors = {
            seen.volume.name: seen.error for seen in (yield from foresee(root, volumes)) if seen.error is not None
        }
        if not errors:
            return
        missing = all(error.reason == "unavailable" for error in errors.values())
        if not missing or (yield from Uptime()) - began >= patience:
            for name, error in errors.items():
                yield from tell_failure(name, error)
            raise next(iter(errors.values()))
        if not awaited:
            fields: dict[str, Value] = {"devices": [error.device for error in errors.values()], "wait": patience}
            yield from Log(Record(Level.INFO, "disks_awaited", fields))
            awaited = True
        yield from Sleep(_LOOK_AGAIN)


def _foresee_root(root: Volume) -> Flow[Forecast]:
    disk: Disk | None = None
    try:
        disk = yield from InspectDisk(root.device)
        plan = plan_root(root, disk)
    except DiskError as exc:
        return Forecast(root, disk, error=exc)
    return Forecast(root, disk, plan, plan)


def _go_on(
    settings: BootSettings, volumes: Sequence[Volume], grant: BootGrant, at: float, opened: tuple[OpenVolume, ...]
) -> Flow[Booted]:
    unlocked = yield from unlock(settings, volumes, grant=grant)
    unlocked.grant.root_passphrase.wipe()
    return Booted(unlocked.grant, at, (*opened, *unlocked.volumes), unlocked.k3s_encryption_key)
