"""A miner's client on trio and asyncio. The flows of ``chutes_proto.miner`` decide everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import httpx

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.io.drivers.aio import HttpxSender, Performer, open_client
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import Quoter, check_quoter
from chutes_proto.log import Record
from chutes_proto.miner._flows import (
    MINER_RETRY,
    AttestationStatus,
    Gpu,
    Miner,
    RuntimeAttestation,
    Server,
    attest_server,
    list_servers,
    read_server,
    read_status,
    register_server,
    remove_server,
    rename_server,
)


class MinerClient:
    """One miner's servers at one key server, on trio or asyncio: an asynchronous context manager.

    Arguments, methods and errors are those of `chutes_proto.sync.MinerClient`; ``quoter`` may block, it runs in a
    thread. An own ``client`` must present the certificate of the ``identity`` that comes with it, and stays open.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        signer: Signer,
        signatures: SigningPolicy = "compatible",
        quoter: Quoter | None = None,
        ca_pem: bytes | None = None,
        identity: ClientIdentity | None = None,
        client: httpx.AsyncClient | None = None,
        retry: RetryPolicy = MINER_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        if quoter is not None:
            check_quoter(quoter)
        self._miner = Miner(hotkey, signer, signatures, retry)
        self._identity = presented(identity, client)
        self._owned = None
        if client is None:
            client = self._owned = open_client(client_context(self._identity, ca_pem))
        self._run = Performer(send=HttpxSender(client, url, limits), quoter=quoter, log=log).run

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned is not None:
            await self._owned.aclose()

    async def register(self, server_id: str, *, host: str, gpus: Sequence[Gpu], name: str | None = None) -> None:
        """Register a server; without ``name`` its id is its name."""
        await self._run(register_server(self._miner, server_id=server_id, host=host, gpus=gpus, name=name))

    async def servers(self) -> tuple[Server, ...]:
        """Return all servers, newest first."""
        return await self._run(list_servers(self._miner))

    async def server(self, server_id: str) -> Server:
        """Return one server."""
        return await self._run(read_server(self._miner, server_id))

    async def rename(self, server_id: str, name: str) -> Server:
        """Give a server another name; the keys of its VM stay where they are."""
        return await self._run(rename_server(self._miner, server_id, name))

    async def remove(self, name_or_id: str) -> str:
        """Remove a server and return its name. The keys of its VM are kept."""
        return await self._run(remove_server(self._miner, name_or_id))

    async def attest(self, server_id: str) -> RuntimeAttestation:
        """Attest a server at runtime, with a quote that binds this client's key. Raises `QuoteUnavailable`, too."""
        return await self._run(attest_server(self._miner, server_id, self._identity.spki_sha256))

    async def status(self, server_id: str) -> AttestationStatus:
        """Return the newest verdict on a runtime quote, and whether it still counts."""
        return await self._run(read_status(self._miner, server_id))
