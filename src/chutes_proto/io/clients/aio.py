"""The boot agent and the miner's client on trio and asyncio: the flows of ``boot`` and ``miner`` decide everything."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import anyio
import anyio.to_thread
import httpx

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.auth.signing import Signer, SigningPolicy
from chutes_proto.boot._disks import Unlocked
from chutes_proto.boot._flows import BootGrant, BootSettings, Rotation, VolumeKeys, Volumes
from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
from chutes_proto.boot._session import BootSession
from chutes_proto.io.disks.cryptsetup import Disks
from chutes_proto.io.drivers.aio import HttpxSender, Performer
from chutes_proto.io.drivers.sync import DiskWorker, log_record
from chutes_proto.io.http.bounded import BoundedContext
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import open_client
from chutes_proto.io.http.tls import client_context, presented
from chutes_proto.io.quoters.choose import GpuTool, Quoter, check_gpu_tool, check_quoter
from chutes_proto.log import Record
from chutes_proto.miner import _flows as flows
from chutes_proto.miner._flows import MINER_RETRY, AttestationStatus, Gpu, Miner, RuntimeAttestation, Server
from chutes_proto.secret import Secret


class _Connected:
    """A client's connection and driver. The connection is closed at the end, unless the caller brought it."""

    def __init__(
        self,
        url: str,
        identity: ClientIdentity | None,
        ca_pem: bytes | None,
        client: httpx.AsyncClient | None,
        limits: TimeLimits,
        quoter: Quoter | None,
        log: Callable[[Record], None],
        gpu_tool: GpuTool | None = None,
        disks: DiskWorker | None = None,
    ) -> None:
        if quoter is not None:
            check_quoter(quoter)
        if gpu_tool is not None:
            check_gpu_tool(gpu_tool)
        self._identity = presented(identity, client)
        self._owned = None
        if client is None:
            client = self._owned = open_client(client_context(self._identity, ca_pem, kind=BoundedContext))
        send = HttpxSender(client, url, limits)
        self._run = Performer(send=send, quoter=quoter, gpu_tool=gpu_tool, disks=disks, log=log).run

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owned is not None:
            await self._owned.aclose()


class BootAgent(_Connected):
    """One VM's boot against one key server, on trio or asyncio: an asynchronous context manager.

    Arguments, methods and errors are those of `chutes_proto.sync.BootAgent`; ``quoter`` may block, it runs in a thread,
    and so does the work on disks; ``signer`` is called on the event loop. A ``client`` of the caller must present the
    certificate of ``identity``, and stays open.
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
        images: bool = False,
    ) -> None:
        check_quoter(quoter)
        self._disks = Disks(images=images)
        self._log = log
        super().__init__(url, identity, ca_pem, client, limits, quoter, log, disks=self._disks)
        self._session = BootSession(BootSettings(hotkey, vm_name, self._identity.spki_sha256, signer, retry))

    async def unlock(
        self, volumes: Mapping[str, str], *, root: str | None = None, disk_wait_seconds: float = 0.0
    ) -> Unlocked:
        """See `chutes_proto.sync.BootAgent.unlock`."""
        self._disks.opened.clear()
        try:
            return await self._run(self._session.unlock(volumes, root, disk_wait_seconds))
        except BaseException:
            told: list[Record] = []
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._disks.close, told.append)
            for record in told:
                self._log(record)
            raise

    async def boot(self) -> BootGrant:
        """See `chutes_proto.sync.BootAgent.boot`."""
        return await self._run(self._session.boot())

    async def sync(self, volumes: Volumes) -> VolumeKeys:
        """See `chutes_proto.sync.BootAgent.sync`."""
        return await self._run(self._session.sync(volumes))

    async def confirm_root(self) -> str:
        """Confirm that the root disk has the key ``grant.root.next``; return the server's word, ``promoted`` usually.

        For profiles with the provisioned exchange, between `boot` and `rotate`. Then every other key may be taken off
        that disk; if this raises, all stay on it.
        """
        return await self._run(self._session.confirm_root())

    @asynccontextmanager
    async def rotate(self, volumes: Volumes) -> AsyncGenerator[Rotation]:
        """See `chutes_proto.sync.BootAgent.rotate`; entered with ``async with``."""
        rotation = await self._run(self._session.begin_rotation(volumes))
        yield rotation
        _ = await self._run(self._session.confirm(rotation))

    async def cache_passphrase(self) -> Secret:
        """See `chutes_proto.sync.BootAgent.cache_passphrase`."""
        return await self._run(self._session.cache_passphrase())


class MinerClient(_Connected):
    """One miner's servers at one key server, on trio or asyncio: an asynchronous context manager.

    Arguments, methods and errors are those of `chutes_proto.sync.MinerClient`; ``quoter`` and ``gpu_tool`` may
    block, they run in threads; ``signer`` is called on the event loop. A ``client`` of the caller must present the
    certificate of ``identity``, and stays open.
    """

    def __init__(
        self,
        url: str,
        *,
        hotkey: str,
        signer: Signer,
        signatures: SigningPolicy = "compatible",
        quoter: Quoter | None = None,
        gpu_tool: GpuTool | None = None,
        ca_pem: bytes | None = None,
        identity: ClientIdentity | None = None,
        client: httpx.AsyncClient | None = None,
        retry: RetryPolicy = MINER_RETRY,
        limits: TimeLimits = TimeLimits(),
        log: Callable[[Record], None] = log_record,
    ) -> None:
        self._miner = Miner(hotkey, signer, signatures, retry)
        self._with_gpus = gpu_tool is not None
        super().__init__(url, identity, ca_pem, client, limits, quoter, log, gpu_tool)

    async def register(self, server_id: str, *, host: str, gpus: Sequence[Gpu], name: str | None = None) -> None:
        """Register a server at ``host``, a name or address; without ``name`` its id is its name."""
        await self._run(flows.register_server(self._miner, server_id=server_id, host=host, gpus=gpus, name=name))

    async def servers(self) -> tuple[Server, ...]:
        """Return all servers of the hotkey, newest first."""
        return await self._run(flows.list_servers(self._miner))

    async def server(self, server_id: str) -> Server:
        """Return the server with this id."""
        return await self._run(flows.read_server(self._miner, server_id))

    async def rename(self, server_id: str, name: str) -> Server:
        """Give a server another name; the keys of its VM stay where they are."""
        return await self._run(flows.rename_server(self._miner, server_id, name))

    async def remove(self, name_or_id: str) -> str:
        """Remove a server and return its name; the keys of its VM are kept."""
        return await self._run(flows.remove_server(self._miner, name_or_id))

    async def attest(self, server_id: str) -> RuntimeAttestation:
        """Attest a server at runtime, with a quote that binds this client's key; may also raise `QuoteUnavailable`."""
        return await self._run(
            flows.attest_server(self._miner, server_id, self._identity.spki_sha256, with_gpus=self._with_gpus)
        )

    async def status(self, server_id: str) -> AttestationStatus:
        """Return the newest verdict on a runtime quote, and whether it is still valid."""
        return await self._run(flows.read_status(self._miner, server_id))
