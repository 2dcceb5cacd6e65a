"""Miners' own wallet at a key server, over real sockets: its files, its signatures, and requests as its tools make."""

from __future__ import annotations

import hashlib
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.io.hotkey_file import read_hotkey
from chutes_proto.io.http.tls import client_context
from chutes_proto.server._app import App
from tests.conftest import CI
from tests.scenario.operations import LOOPS, SERVER, Site, code, open_store
from tests.server.test_servers import server
from tests.server.world import GPU, PLATFORM, service

try:
    import bittensor_wallet
except ImportError:
    if CI:
        raise
    pytest.skip("bittensor-wallet is not installed: pip install 'chutes-proto[test]'", allow_module_level=True)

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def wallet(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A wallet on disk with a hotkey of its own, made by the wallet itself."""
    made = bittensor_wallet.Wallet(name="w", hotkey="h", path=str(tmp_path_factory.mktemp("wallets")))
    made.create_new_hotkey(use_password=False, overwrite=False, suppress=True)
    return made


@pytest.fixture
def pair(wallet: Any) -> HotkeyPair:
    """The same hotkey, read from the wallet's file."""
    return read_hotkey(Path(wallet.path) / "w" / "hotkeys" / "h")


def test_the_file_and_the_signatures_are_the_wallets(wallet: Any, pair: HotkeyPair, loop: str) -> None:
    assert pair.hotkey.address == wallet.hotkey.ss58_address
    assert pair.hotkey.public_key == bytes(wallet.hotkey.public_key)
    message = loop.encode()
    pair.hotkey.check_signature(message, wallet.hotkey.sign(message))
    assert wallet.hotkey.verify(message, pair.sign(message))
    assert not wallet.hotkey.verify(message + b".", pair.sign(message))


async def test_a_wallet_signs_for_the_client(wallet: Any, loop: str, tmp_path: Path) -> None:
    """The key stays in the wallet: the client calls it."""
    policy = service(hotkeys=frozenset({wallet.hotkey.ss58_address}))
    site = Site(LOOPS[loop], open_store(tmp_path), App(policy))
    settings: Any = {"ca_pem": SERVER.ca_pem, "quoter": partial(PLATFORM.quote, stage="runtime")}
    async with (
        site.serving(),
        site.loop.MinerClient(
            site.url, hotkey=wallet.hotkey.ss58_address, signer=wallet.hotkey.sign, log=site.log.append, **settings
        ) as miner,
    ):
        await miner.register("n1", host="1.2.3.4", gpus=[GPU], name="vm-1")
        _ = await miner.attest("n1")
        assert (await miner.status("n1")).is_fresh
        assert await miner.remove("n1") == "vm-1"


async def test_requests_as_miners_tools_make_them(wallet: Any, loop: str, tmp_path: Path) -> None:
    """JSON with spaces, the time as nonce, hex without 0x; one set of headers for a series of calls."""
    site = Site(LOOPS[loop], open_store(tmp_path), App(service()))
    hotkey = wallet.hotkey

    def signed(third: str) -> dict[str, str]:
        nonce = str(int(time.time()))
        signature = hotkey.sign(f"{hotkey.ss58_address}:{nonce}:{third}".encode()).hex()
        named = {"Hotkey": hotkey.ss58_address, "Nonce": nonce, "Signature": signature}
        return {f"X-Chutes-{name}": value for name, value in named.items()}

    context = client_context(None, SERVER.ca_pem)
    async with (
        site.serving(),
        httpx.AsyncClient(base_url=site.url, verify=context, trust_env=False, timeout=60) as http,
    ):
        body = json.dumps(server()).encode()
        assert b": " in body
        headers = signed(hashlib.sha256(body).hexdigest()) | {"Content-Type": "application/json"}
        registered = await http.post("/servers/", content=body, headers=headers)
        assert (registered.status_code, registered.json()) == (201, {"message": "Server registered successfully."})
        assert code(await http.post("/servers/", content=body + b" ", headers=headers)) == (
            401,
            "signature_invalid",
        )
        again = signed("tee")
        for name in ("vm-2", "vm-3"):
            renamed = await http.patch("/servers/n1", params={"server_name": name}, headers=again)
            assert renamed.json()["name"] == name
        assert (await http.get("/servers/n1", headers=again)).json()["name"] == "vm-3"
        assert (await http.delete("/servers/vm-3", headers=again)).status_code == 200
        assert code(await http.get("/servers/", headers=signed("miner"))) == (401, "signature_invalid")
