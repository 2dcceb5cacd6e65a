"""The boot agent on trio and asyncio. The flows of ``chutes_proto.boot`` decide everything."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import httpx

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer
from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, Volumes
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.boot._session import BootSession
from chutes_proto.io.drivers.aio import HttpxSender, Performer, open_client
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import Quoter, check_quoter
from chutes_proto.log import Record
from chutes_proto.secret import Secret


class BootAgent:
    """One VM's boot against one key server, on trio or asyncio: an asynchronous context manager.

    Arguments, methods and errors are those of `chutes_proto.sync.BootAgent`; ``quoter`` may block, it runs in a thread.
    An own ``client`` must present the certificate of the ``identity`` that comes with it, and stays open.
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
        self._session = BootSession(BootSettings(hotkey, vm_name, identity.spki_sha256, signer, retry))
        self._owned = None
        if client is None:
            client = self._owned = open_client(client_context(identity, ca_pem))
        self._run = Performer(send=HttpxSender(client, url, limits), quoter=quoter, log=log).run

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned is not None:
            await self._owned.aclose()

    async def boot(self) -> BootGrant:
        """See `chutes_proto.sync.BootAgent.boot`."""
        return await self._run(self._session.boot())

    async def sync(self, volumes: Volumes) -> VolumeKeys:
        """See `chutes_proto.sync.BootAgent.sync`."""
        return await self._run(self._session.sync(volumes))

    @asynccontextmanager
    async def rotate(self, volumes: Volumes) -> AsyncGenerator[Rotation]:
        """See `chutes_proto.sync.BootAgent.rotate`; entered with ``async with``."""
        rotation = await self._run(self._session.begin_rotation(volumes))
        yield rotation
        _ = await self._run(self._session.confirm(rotation))

    async def cache_passphrase(self) -> Secret:
        """See `chutes_proto.sync.BootAgent.cache_passphrase`."""
        return await self._run(self._session.cache_passphrase())
