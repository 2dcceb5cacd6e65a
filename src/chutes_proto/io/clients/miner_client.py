"""A miner's client on an event loop (trio or asyncio)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import httpx

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.io.drivers.aio import HttpxSender, Performer
from chutes_proto.io.drivers.sync import log_record
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import Quoter
from chutes_proto.log import Record
from chutes_proto.miner._flows import (
    MINER_RETRY,
    Miner,
    attest_server,
    list_servers,
    read_server,
    read_status,
    register_server,
    remove_server,
    rename_server,
)
from chutes_proto.wire.miners import (
    AttestationStatusAnswer,
    NodeArgs,
    RenamedServerAnswer,
    RuntimeAttestationAnswer,
    ServerAnswer,
)


class MinerClient:
    """One miner's servers at one key server: an asynchronous context manager.

    ``url`` is ``https://host:port``; ``hotkey`` is the SS58 address, and ``signer`` signs with it: `HotkeyPair.sign`,
    or a function that asks whatever holds the key. ``ca_pem`` is the CA bundle to trust instead of the system's.
    `attest` needs a ``quoter``, and proves the throw-away client key that the client makes, or that of ``identity``. An
    own ``client`` must present the certificate of the ``identity`` that comes with it, and stays open.

    The methods raise as the flows of ``chutes_proto.miner._flows`` do.
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
        self._miner = Miner(hotkey, signer, signatures, retry)
        self._identity = presented(identity, client)
        self._owned = None
        if client is None:
            client = self._owned = httpx.AsyncClient(verify=client_context(self._identity, ca_pem), trust_env=False)
        self._performer = Performer(send=HttpxSender(client, url, limits), quoter=quoter, log=log)

    async def __aenter__(self) -> MinerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned is not None:
            await self._owned.aclose()

    async def register(self, server_id: str, *, host: str, gpus: Sequence[NodeArgs], name: str | None = None) -> None:
        """Register a server; without ``name`` its id is its name."""
        await self._performer.run(register_server(self._miner, server_id=server_id, host=host, gpus=gpus, name=name))

    async def servers(self) -> tuple[ServerAnswer, ...]:
        """All servers, newest first."""
        return await self._performer.run(list_servers(self._miner))

    async def server(self, server_id: str) -> ServerAnswer:
        """One server."""
        return await self._performer.run(read_server(self._miner, server_id))

    async def rename(self, server_id: str, name: str) -> RenamedServerAnswer:
        """Give a server another name."""
        return await self._performer.run(rename_server(self._miner, server_id, name))

    async def remove(self, name_or_id: str) -> str:
        """Remove a server; the result is its name. The keys of its VM are kept."""
        return await self._performer.run(remove_server(self._miner, name_or_id))

    async def attest(self, server_id: str) -> RuntimeAttestationAnswer:
        """Attest a server at runtime, with a quote that binds this client's key."""
        return await self._performer.run(attest_server(self._miner, server_id, self._identity.spki_sha256))

    async def status(self, server_id: str) -> AttestationStatusAnswer:
        """What came of the newest runtime attestation, and whether it still counts."""
        return await self._performer.run(read_status(self._miner, server_id))
