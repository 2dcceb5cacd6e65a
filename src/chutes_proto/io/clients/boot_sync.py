"""The boot agent without an event loop: the flows of ``chutes_proto.boot`` decide everything."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer
from chutes_proto.boot._disks import Unlocked
from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, Volumes
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.boot._session import BootSession
from chutes_proto.io.clients.connected_sync import Connected
from chutes_proto.io.disks.cryptsetup import Disks
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.quoters.choose import Quoter, check_quoter
from chutes_proto.log import Record
from chutes_proto.secret import Secret


class BootAgent(Connected):
    """One VM's boot against one key server, without an event loop: a context manager.

    ``url`` is ``https://host:port``. ``hotkey`` is the SS58 address of the miner that owns the VM, ``vm_name`` the VM's
    name. ``quoter`` is called with 64 bytes of report data and returns the quote: see `auto_quoter`, `make_quoter`.
    ``ca_pem`` is the CA bundle to trust instead of the system's. ``signer`` proves the hotkey, for servers that require
    it. The agent makes an ephemeral client key, which the quotes bind, or uses ``identity``. ``retry`` limits each
    method, ``limits`` each request; ``log`` is called with every record, none of which holds a secret. Proxies of the
    environment are not used. ``images``, for tests, lets disks be regular files, on which keys are only tried.

    The methods raise `Refused` or `BadRequest` at the first final answer, and, after the last attempt, the last of
    `Unavailable`, `BadRequest` with status 408, `TransportError`, `RemoteProtocolError`, `QuoteUnavailable`. They raise
    `LocalProtocolError`, before anything is sent, for values that no request can carry, for a method of an exchange
    that was not granted, and after the block has ended.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        vm_name: str,
        quoter: Quoter,
        ca_pem: bytes | None = None,
        signer: Signer | None = None,
        identity: ClientIdentity | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
        images: bool = False,
    ) -> None:
        check_quoter(quoter)
        self._disks = Disks(images=images)
        self._log = log
        super().__init__(url, identity, ca_pem, limits, quoter, log, disks=self._disks)
        self._session = BootSession(BootSettings(hotkey, vm_name, self._identity.spki_sha256, signer, retry))

    def unlock(
        self, volumes: Mapping[str, str], *, root: str | None = None, disk_wait_seconds: float = 0.0
    ) -> Unlocked:
        """Boot, and open the root disk and the volumes: all that a VM's agent has to do, by whichever exchange it has.

        ``volumes`` is the whole set of the VM's volumes, the name and device of each, and ``root`` the device of the
        root disk; each becomes ``/dev/mapper/NAME``. A blank volume is formatted if the server does not know it to hold
        data, and has no file system then; the root disk never is. Keys rotate where the server has them rotate. With
        ``root`` and no volumes only that disk is opened, and the next call, without ``root``, goes on with the volumes.
        Disks may take ``disk_wait_seconds`` to appear. This needs the program `cryptsetup`.

        May also raise `DiskError`: for a disk that must not be touched, before anything is sent; for the first that
        does not open, once all others are open. Whatever it raises, what it had opened is closed again by then, and
        `unlock` can be called again; what cannot be closed is logged as ``disk_left_open``.
        ``docs/explanation/disks.md`` says what happens to a disk, and why.
        """
        self._disks.opened.clear()  # what earlier calls have opened stays open
        try:
            return self._run(self._session.unlock(volumes, root, disk_wait_seconds))
        except BaseException:
            self._disks.close(self._log)
            raise

    def boot(self) -> BootGrant:
        """Attest until the server grants; return the root passphrase and the token of the next method."""
        return self._run(self._session.boot())

    def sync(self, volumes: Volumes) -> VolumeKeys:
        """Return the keys of ``volumes``: each name, and whether its disk has a LUKS header.

        For disks that `unlock` cannot open. ``volumes`` is the whole set of the VM's volumes; the server retires the
        keys of all others. Boots first without a grant, or if its token has expired or was redeemed.
        """
        return self._run(self._session.sync(volumes))

    def confirm_root(self) -> str:
        """Confirm that the root disk has the key ``grant.root.next``; return the server's word, ``promoted`` usually.

        For profiles with the provisioned exchange, between `boot` and `rotate`. Then every other key may be taken off
        that disk; if this raises, all stay on it.
        """
        return self._run(self._session.confirm_root())

    @contextmanager
    def rotate(self, volumes: Volumes) -> Generator[Rotation]:
        """Get the current and next keys of ``volumes``; the end of the block confirms the keys that were added.

        For profiles with the two-phase exchange, and disks that `unlock` cannot open. Boots first without a grant, or
        if it has served a rotation. A block that raises confirms nothing. If the confirmation raises, so does the
        block, and then no key may be removed from a disk::

            with agent.rotate({"storage": True}) as rotation:
                ...  # open the disk with rotation.keys["storage"].current, add .next
                rotation.added("storage")
            ...  # remove the other keys from the disk
        """
        rotation = self._run(self._session.begin_rotation(volumes))
        yield rotation
        _ = self._run(self._session.confirm(rotation))

    def cache_passphrase(self) -> Secret:
        """Return the passphrase of the server's first volume, as older images need it; boots first without a grant."""
        return self._run(self._session.cache_passphrase())
