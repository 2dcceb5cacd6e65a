"""One VM's exchanges with one key server, as flows that share a grant; clients run them with their own driver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from attrs import define

from chutes_proto.boot import _flows as flows
from chutes_proto.boot._agent import resume_agent, run_agent
from chutes_proto.boot._disks import Unlocked
from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, Volumes
from chutes_proto.effects import Flow
from chutes_proto.errors import LocalProtocolError
from chutes_proto.luks.volume import Volume
from chutes_proto.secret import Secret


@define
class BootSession:
    """A client's state between its steps: the grant of the last boot, which the next step uses if it is valid.

    The flows raise as `boot` does.
    """

    settings: BootSettings
    grant: BootGrant | None = None

    def boot(self) -> Flow[BootGrant]:
        """Attest until the server grants."""
        self.grant = yield from flows.boot(self.settings)
        return self.grant

    def unlock(self, volumes: Mapping[str, str], root: str | None, disk_wait_seconds: float) -> Flow[Unlocked]:
        """Open the root disk and the volumes, or the volumes with the grant of a run that opened the root disk."""
        given = cast("object", volumes)  # of a caller without a type checker
        if not isinstance(given, Mapping):
            raise LocalProtocolError(
                f"volumes must map each name to its device, as in {{'storage': '/dev/vdb'}}; got {given!r}"
            )
        top = None if root is None else Volume("root", root)
        others = [Volume(name, device) for name, device in volumes.items()]
        if top is None and not others:
            raise LocalProtocolError("no disk is named to be opened; name the root disk, or at least one volume")
        grant, self.grant = self.grant, None
        if top is None and grant is not None:
            done = yield from resume_agent(self.settings, others, grant, disk_wait_seconds=disk_wait_seconds)
        else:
            done = yield from run_agent(self.settings, top, others, disk_wait_seconds=disk_wait_seconds)
        if not others:
            self.grant = done.grant
        return Unlocked(done.grant, done.opened, done.k3s_encryption_key)

    def sync(self, volumes: Volumes) -> Flow[VolumeKeys]:
        """Get the keys of ``volumes``; boots first without a grant, or where its token has expired."""
        self.grant, keys = yield from flows.boot_and_sync(self.settings, volumes, grant=self.grant)
        return keys

    def confirm_root(self) -> Flow[str]:
        """Confirm that the root disk has the next key of the last boot."""
        if self.grant is None:
            raise LocalProtocolError(
                "no root key can be confirmed before a boot, or once a rotation has begun: boot, confirm, rotate"
            )
        return (yield from flows.confirm_root(self.settings, self.grant))

    def begin_rotation(self, volumes: Volumes) -> Flow[Rotation]:
        """Get the current and next keys of ``volumes``. A grant serves one rotation."""
        grant, self.grant = self.grant, None
        return (yield from flows.attest_volumes(self.settings, volumes, grant=grant))

    def confirm(self, rotation: Rotation) -> Flow[Mapping[str, str]]:
        """Send the server the caller's report."""
        return (yield from flows.confirm_volumes(rotation, retry=self.settings.retry))

    def cache_passphrase(self) -> Flow[Secret]:
        """Read the passphrase of the server's first volume; boots first without a grant."""
        grant = self.grant or (yield from self.boot())
        return (yield from flows.read_cache_passphrase(grant, retry=self.settings.retry))
