"""The boot agent on an event loop (trio or asyncio)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

import httpx

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer
from chutes_proto.boot._flows import (
    BootGrant,
    BootSettings,
    Rotation,
    VolumeKeys,
    attest_volumes,
    boot,
    boot_and_sync,
    confirm_volumes,
    read_cache_passphrase,
)
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.io.drivers.aio import HttpxSender, Performer
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import Quoter, check_quoter
from chutes_proto.log import Record
from chutes_proto.secret import Secret


class BootAgent:
    """One VM's boot against one key server: an asynchronous context manager.

    ``url`` is ``https://host:port``, ``quoter`` makes a quote of 64 bytes of report data (it may block), ``ca_pem`` is
    the CA bundle to trust instead of the system's, ``signer`` proves the hotkey. The agent makes a throw-away client
    key, or takes ``identity``; it uses no proxy that the environment names. An own ``client`` must present the
    certificate of the ``identity`` that comes with it, and stays open.

    The methods raise as the flows of ``chutes_proto.boot._flows`` do.
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
        client: httpx.AsyncClient | None = None,
        retry: RetryPolicy = DEFAULT_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        check_quoter(quoter)
        identity = presented(identity, client)
        self._settings = BootSettings(hotkey, vm_name, identity.spki_sha256, signer, retry)
        self._owned = None
        if client is None:
            client = self._owned = httpx.AsyncClient(verify=client_context(identity, ca_pem), trust_env=False)
        self._performer = Performer(send=HttpxSender(client, url, limits), quoter=quoter, log=log)
        self._grant: BootGrant | None = None

    async def __aenter__(self) -> BootAgent:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned is not None:
            await self._owned.aclose()

    async def boot(self) -> BootGrant:
        """Attest until the server grants."""
        self._grant = await self._performer.run(boot(self._settings))
        return self._grant

    async def sync(self, volumes: Sequence[str], *, formatted: Sequence[str], rekey: Sequence[str] = ()) -> VolumeKeys:
        """The passphrases of ``volumes``, the whole set; ``formatted`` names those with a LUKS header on their disks.

        Boots first where there is no grant yet, or where its token has died.
        """
        flow = boot_and_sync(self._settings, volumes, rekey, formatted, grant=self._grant)
        self._grant, keys = await self._performer.run(flow)
        return keys

    @asynccontextmanager
    async def rotate(self, volumes: Sequence[str], *, formatted: Sequence[str]) -> AsyncGenerator[Rotation]:
        """The current and the next keys of ``volumes``, confirmed when the block ends as the caller reported.

        For profiles with the two-phase exchange; ``formatted`` names the volumes with a LUKS header on their disks.
        Boots first where there is no grant yet, or where its keys were handed out. A block that raises confirms
        nothing. What the confirmation raises comes out of the block, and then no key may be taken off a disk::

            async with agent.rotate(["storage"], formatted=["storage"]) as rotation:
                ...  # open the disk with rotation.keys["storage"].current, add .next
                rotation.added("storage")
            ...  # take the other keys off the disk
        """
        grant, self._grant = self._grant, None
        rotation = await self._performer.run(attest_volumes(self._settings, volumes, formatted, grant=grant))
        yield rotation
        _ = await self._performer.run(confirm_volumes(rotation, retry=self._settings.retry))

    async def cache_passphrase(self) -> Secret:
        """The passphrase of the server's first volume; boots first where there is no grant yet."""
        grant = self._grant or await self.boot()
        return await self._performer.run(read_cache_passphrase(grant, retry=self._settings.retry))
