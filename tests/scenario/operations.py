"""A key server of either binding on a real socket, and clients of it; both on the loop that the test runs on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
from attrs import define, evolve, field

import chutes_proto_asyncio
import chutes_proto_trio
from chutes_proto.auth.binding import report_data
from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.io.http.tls import client_context
from chutes_proto.io.server.sockets import listen_tls
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.log import Record
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.server._app import App
from chutes_proto.store._rows import ROWS
from chutes_proto.store._run import Store
from chutes_proto.transport.tls import server_context
from chutes_proto.wire.codec import encode_quote
from tests.server.world import HOTKEY, PLATFORM, ScanAll, service

VOLUMES = ["storage", "tdx-cache"]
SERVER = make_server_identity(int(time.time()), bytes(range(32)))
CONTEXT = server_context(SERVER.chain_pem, SERVER.key_pem)
LOOPS = {"trio": chutes_proto_trio, "asyncio": chutes_proto_asyncio}


@define
class FreshCollateral:
    """Collateral of the simulated platform, made at the time it is asked for."""

    kept: VerifiedCollateral | None = None

    def available(self, identity: PckIdentity, now: int) -> VerifiedCollateral | None:
        return self.kept

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        if identity.fmspc != PLATFORM.fmspc:
            raise CollateralUnavailable("of another platform")
        if self.kept is None:
            collateral = Collateral.from_json(PLATFORM.collateral_json(now))
            self.kept = verify_collateral(collateral, now=now, root=service().root)
        return self.kept


_OPEN: list[SqliteStore] = []


def open_store(directory: Path) -> SqliteStore:
    """A store that `close_stores` closes, which is done after each test; all are one to a server (tests/store)."""
    store = SqliteStore(directory / "keys.db", vault=service().vault)
    _OPEN.append(store)
    return store


def close_stores() -> None:
    while _OPEN:
        _OPEN.pop().close()


def rows(store: Store) -> dict[str, list[str]]:
    """All that the store holds."""
    return {kind.__name__: sorted(map(repr, store.transact(ScanAll(kind)))) for kind in ROWS}


@define
class Site:
    """One server. ``loop`` is a binding's package."""

    loop: Any
    store: Any
    app: App = field(factory=lambda: App(service()))
    log: list[Record] = field(factory=list)
    collateral: FreshCollateral = field(factory=FreshCollateral)
    gpus: Any = None
    fetch_gpus: Any = None
    url: str = ""
    server: Any = None

    def performer(self) -> Any:
        return self.loop.Performer(
            store=self.store,
            collateral=self.collateral,
            gpus=self.gpus,
            fetch_gpus=self.fetch_gpus,
            log=self.log.append,
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Site]:
        listening = listen_tls(("127.0.0.1", 0), lambda: CONTEXT)
        self.url = f"https://localhost:{listening[0].socket.getsockname()[1]}"
        async with anyio.create_task_group() as group:
            self.server = self.loop.Server(self.app, self.performer())
            group.start_soon(self.server.serve, listening)
            with anyio.fail_after(60):
                yield self
            group.cancel_scope.cancel()


Scene = Callable[..., Site]
"""Makes the server of a test, for its loop and with its store; takes what is else than usual in its policy."""


@define
class Vm:
    """A VM with an ephemeral TLS key; each of its methods is one request."""

    site: Site
    name: str = "vm-1"
    identity: ClientIdentity | None = field(factory=lambda: make_client_identity(int(time.time()) - 60, os.urandom(32)))
    http: Any = None

    async def __aenter__(self) -> Vm:
        self.http = httpx.AsyncClient(
            base_url=self.site.url, verify=client_context(self.identity, SERVER.ca_pem), trust_env=False, timeout=60
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def nonce(self) -> str:
        return str((await self.http.get("/servers/nonce")).json()["nonce"])

    def attestation(self, nonce: str, platform: Any = PLATFORM, **members: Any) -> dict[str, Any]:
        digest = hashlib.sha256(b"").digest() if self.identity is None else self.identity.spki_sha256
        quote = platform.quote(report_data(bytes.fromhex(nonce), digest))
        return {"quote": encode_quote(quote), "miner_hotkey": HOTKEY, "vm_name": self.name} | members

    async def attest(self, nonce: str, platform: Any = PLATFORM, **members: Any) -> httpx.Response:
        body = self.attestation(nonce, platform, **members)
        response: httpx.Response = await self.http.post(
            "/servers/boot/attestation", json=body, headers={"x-chutes-nonce": nonce}
        )
        return response

    async def boot(self) -> dict[str, str]:
        response = await self.attest(await self.nonce())
        assert response.status_code == 200, response.text
        members: dict[str, str] = response.json()
        return members

    async def sync(self, token: str, **members: Any) -> httpx.Response:
        headers = {"x-boot-token": token, "x-chutes-hotkey": HOTKEY}
        response: httpx.Response = await self.http.post(
            f"/servers/{self.name}/luks", json={"volumes": VOLUMES} | members, headers=headers
        )
        return response

    async def read(self, token: str) -> httpx.Response:
        response: httpx.Response = await self.http.get(
            f"/servers/{self.name}/luks", params={"hotkey": HOTKEY}, headers={"x-boot-token": token}
        )
        return response

    def stranger(self) -> Vm:
        """The same VM with another TLS key."""
        return Vm(self.site, self.name)

    def bare(self) -> Vm:
        """The same VM without a certificate."""
        return evolve(self, identity=None, http=None)


def code(response: httpx.Response) -> tuple[int, str]:
    """Status and code of a refusal, which must have the documented shape."""
    members = response.json()
    assert list(members) == ["detail", "code", "request_id"]
    return response.status_code, members["code"]
