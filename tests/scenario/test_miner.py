"""A miner's servers over real sockets and real TLS, by the client of each binding."""

from __future__ import annotations

import json
import time
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from attrs import evolve

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.errors import BadRequest, ConfigurationError, LocalProtocolError, Refused
from chutes_proto.gpu import GpuCollateral, Revocation, Rims, verify_rim
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.hotkey_file import read_hotkey
from chutes_proto.io.http.hotkey_auth import HotkeyAuth
from chutes_proto.io.http.tls import client_context
from chutes_proto.miner import RuntimeVerdict
from chutes_proto.miner import _flows as servers
from chutes_proto.server._gpu_evidence import GpuAppraisal
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._rows import AuditRow, GpuDeviceRow, ServerRow
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire.endpoint import PARAMETER
from chutes_proto.wire.endpoints import ENDPOINTS
from tests.clients import make_client, without_loop
from tests.scenario.operations import SERVER, Scene, Site, Vm, code, rows
from tests.server.world import GPU, MINER, OTHER, PLATFORM, ScanAll, service

pytestmark = pytest.mark.anyio


def client(site: Site, kind: str, pair: HotkeyPair = MINER, **options: Any) -> Any:
    settings: dict[str, Any] = {"hotkey": pair.hotkey.address, "signer": pair.sign, "ca_pem": SERVER.ca_pem}
    settings |= {"quoter": partial(PLATFORM.quote, stage="runtime"), "log": site.log.append}
    return make_client(kind, "MinerClient", site.url, **settings | options)


async def live(site: Site, kind: str, signatures: str) -> None:
    """The life of a server, by clients of one kind."""
    first, second = (client(site, kind, pair, signatures=signatures) for pair in (MINER, OTHER))
    async with first as miner, second as other:
        await miner.register("n1", host="1.2.3.4", gpus=[GPU], name="vm-1")
        assert [server.server_id for server in await miner.servers()] == ["n1"]
        assert (await miner.server("n1")).name == "vm-1"
        assert (await miner.rename("n1", "vm-2")).name == "vm-2"
        assert (await miner.status("n1")).last is None
        attested = await miner.attest("n1")
        status = await miner.status("n1")
        assert (status.is_fresh, status.name) == (True, "vm-2")
        assert status.last == RuntimeVerdict(attested.attestation_id, attested.verified_at, None)
        for refused in (other.server, other.remove, other.attest, other.status):
            with pytest.raises(Refused) as caught:
                await refused("n1")
            assert (caught.value.status, caught.value.code) == (404, "server_not_found")
        with pytest.raises(Refused) as caught:
            await other.register("n1", host="1.2.3.4", gpus=[GPU])
        assert caught.value.status == 409
        with pytest.raises(BadRequest, match="1 to 10"):
            await other.register("n2", host="5.6.7.8", gpus=[])
        assert await miner.remove("vm-2") == "vm-2"
        assert await miner.servers() == ()


def check_life(site: Site) -> None:
    assert [record.event for record in site.log if record.event.startswith("server_")] == [
        "server_registered",
        "server_renamed",
        "server_attested",
        "server_removed",
    ]
    assert site.store.transact(ScanAll(ServerRow)) == ()


@pytest.mark.parametrize("signatures", ["compatible", "request"])
@pytest.mark.parametrize("synchronous", [False, True], ids=["on the loop", "without an event loop"])
async def test_the_life_of_a_server(scene: Scene, loop: str, signatures: str, synchronous: bool) -> None:
    site = scene(signatures=signatures)
    async with site.serving():
        if synchronous:
            await anyio.to_thread.run_sync(without_loop, live(site, "sync", signatures))
        else:
            await live(site, loop, signatures)

    check_life(site)


@pytest.mark.parametrize("synchronous", [False, True], ids=["on the loop", "without an event loop"])
async def test_the_evidence_of_eight_gpus_and_four_switches(scene: Scene, loop: str, synchronous: bool) -> None:
    """It is larger than a body usually may be; a tool may print other lines before it."""
    gpus = SimulatedGpus(b"the GPUs of a large machine", count=8, switches=4)
    profile = evolve(PROFILE, gpu_count=8)
    served = {profile.identity: ServedProfile(profile, None, False, False, gpu_evidence="require")}
    site = scene(profiles=served, gpu_appraisal=GpuAppraisal(roots=gpus.roots))
    now = int(time.time())
    rims = Rims.of(verify_rim(data, now=now, roots=gpus.roots) for data in gpus.rims(now))
    site.gpus = lambda: GpuCollateral(rims, Revocation.of(gpus.status(now)))
    declared = [evolve(GPU, uuid=f"GPU-{number}") for number in range(8)]
    sizes: list[int] = []

    def tool(nonce: bytes) -> bytes:
        evidence = gpus.evidence_json(nonce)
        sizes.append(len(evidence))
        return b"[1] asking the devices\n" + evidence + b"\n"

    async def attest(kind: str) -> None:
        async with client(site, kind) as miner, client(site, kind, gpu_tool=tool) as with_gpus:
            await miner.register("n1", host="1.2.3.4", gpus=declared, name="vm-1")
            with pytest.raises(Refused, match="There is none"):
                await miner.attest("n1")
            _ = await with_gpus.attest("n1")
            assert (await miner.status("n1")).is_fresh

    async with site.serving():
        if synchronous:
            await anyio.to_thread.run_sync(without_loop, attest("sync"))
        else:
            await attest(loop)
    assert min(sizes) > 100_000
    audited = str(site.store.transact(ScanAll(AuditRow))[-1].reason)
    assert "GPU evidence verified: 12 devices" in audited
    assert len(site.store.transact(ScanAll(GpuDeviceRow))) == 12


@pytest.mark.parametrize("evidence", ['[{"a": 1}]', '{"gpus": []}', '[\n {"a": 1}\n]', '{\n "gpus": []\n}'])
def test_the_evidence_in_a_tools_output(evidence: str) -> None:
    """A list, or go-nvattest-tools' collection: on all lines, or on the last one after those of its progress."""
    assert servers._evidence(f"{evidence}\n".encode()) == evidence
    if "\n" not in evidence:
        assert servers._evidence(f"[1] asking\n{{2}} done\n{evidence}\n".encode()) == evidence


async def test_one_vm_removes_no_other_miners_servers(scene: Scene, loop: str) -> None:
    """A boot shows the address that it came from, and no id: a claim to one is refused. A uuid is nobody's."""

    site = scene()
    async with site.serving():
        site.app.service = service(unsafe_networks=(ip_network("127.0.0.0/8"),))
        async with client(site, loop) as miner, client(site, loop, OTHER) as other, Vm(site) as vm:
            await miner.register("n1", host="1.2.3.4", gpus=[GPU], name="vm-1")
            await miner.register("n2", host="5.6.7.8", gpus=[evolve(GPU, uuid="GPU-2")])
            response = await vm.attest(await vm.nonce(), miner_hotkey=OTHER.hotkey.address)
            assert response.status_code == 200
            before = rows(site.store)
            with pytest.raises(Refused) as caught:
                await other.register("n2", host="127.0.0.1", gpus=[evolve(GPU, uuid="GPU-9")], name="vm-1")
            assert (caught.value.status, caught.value.code) == (409, "server_taken")
            assert rows(site.store) == before
            await other.register("n9", host="127.0.0.1", gpus=[evolve(GPU, uuid="GPU-1")], name="vm-1")
            assert [server.server_id for server in await other.servers()] == ["n9"]
            assert {server.server_id for server in await miner.servers()} == {"n1", "n2"}


async def test_signed_requests_of_ones_own_client(scene: Scene) -> None:
    auth = HotkeyAuth(MINER.hotkey.address, MINER.sign)

    site = scene()
    async with site.serving():
        context = client_context(None, SERVER.ca_pem)
        async with httpx.AsyncClient(base_url=site.url, verify=context, trust_env=False, auth=auth, timeout=60) as http:
            body = {"host": "1.2.3.4", "id": "n1", "gpus": []}
            assert code(await http.post("/servers/", json=body)) == (400, "gpu_invalid")  # the signature held
            assert (await http.get("/servers/")).json() == []
            assert code(await http.patch("/servers/n1", params={"server_name": "b c"})) == (422, "validation_error")
            assert code(await http.delete("/servers/a%2Db")) == (404, "server_not_found")
            nonce = {"x-chutes-nonce": "ab" * 32}
            attested = await http.post("/servers/n1/attestation", json={"quote": ""}, headers=nonce)
            assert code(attested) == (404, "server_not_found")
            assert (await http.get("/servers/tee/measurements")).json()[0]["name"] == "simulated"


async def test_ones_own_client_signs_as_each_operation_demands(scene: Scene) -> None:
    """Whatever else an operation makes of an empty request: its signature holds."""
    auth = HotkeyAuth(MINER.hotkey.address, MINER.sign)
    site = scene()
    async with site.serving():
        context = client_context(None, SERVER.ca_pem)
        async with httpx.AsyncClient(base_url=site.url, verify=context, trust_env=False, auth=auth, timeout=60) as http:
            for endpoint in ENDPOINTS:
                if endpoint.signed is not None:
                    headers = {"x-chutes-nonce": "ab" * 32} if endpoint.signed == "nonce" else {}
                    path = PARAMETER.sub("n1", endpoint.path)
                    answered = await http.request(endpoint.method, path, headers=headers)
                    assert answered.status_code != 401, f"{endpoint.operation}: {answered.text}"


async def test_one_signature_over_a_request_is_enough(scene: Scene) -> None:
    auth = HotkeyAuth(MINER.hotkey.address, MINER.sign, signatures="request")

    site = scene(signatures="request")
    async with site.serving():
        context = client_context(None, SERVER.ca_pem)
        async with httpx.AsyncClient(base_url=site.url, verify=context, trust_env=False, timeout=60) as http:
            assert (await http.get("/servers/", auth=auth)).json() == []
            weak = HotkeyAuth(MINER.hotkey.address, MINER.sign)
            assert code(await http.get("/servers/", auth=weak)) == (401, "signature_invalid")


async def test_a_mistyped_signing_policy_sends_nothing(scene: Scene, loop: str) -> None:
    """It would sign less than the caller wants."""
    mistyped: Any = "requests"
    site = scene()
    async with site.serving():
        async with client(site, loop, signatures=mistyped) as miner:
            with pytest.raises(LocalProtocolError, match="must be 'compatible' or 'request', not 'requests'"):
                await miner.servers()
        auth = HotkeyAuth(MINER.hotkey.address, MINER.sign, signatures=mistyped)
        context = client_context(None, SERVER.ca_pem)
        async with httpx.AsyncClient(base_url=site.url, verify=context, trust_env=False, auth=auth) as http:
            with pytest.raises(LocalProtocolError, match="must be 'compatible' or 'request'"):
                _ = await http.get("/servers/")


async def test_signed_requests_without_an_event_loop(scene: Scene) -> None:
    def ask(site: Site) -> object:
        auth = HotkeyAuth(MINER.hotkey.address, MINER.sign)
        with httpx.Client(verify=client_context(None, SERVER.ca_pem), trust_env=False, auth=auth, timeout=60) as http:
            return http.get(f"{site.url}/servers/").json()

    site = scene()
    async with site.serving():
        assert await anyio.to_thread.run_sync(ask, site) == []


def test_a_hotkey_in_a_wallets_file(tmp_path: Path) -> None:
    seed = bytes(range(32))
    path = tmp_path / "hotkey"
    content = {"secretSeed": "0x" + seed.hex(), "ss58Address": OTHER.hotkey.address, "secretPhrase": None}
    path.write_text(json.dumps(content))
    path.chmod(0o600)
    assert read_hotkey(path).hotkey == OTHER.hotkey
    key = OTHER.secret_key.reveal().hex()
    for held in ({"privateKey": f"0x{key}"}, {"privateKey": key, "secretSeed": None}):
        path.write_text(json.dumps(content | held))
        assert read_hotkey(path) == OTHER
    wrong = [
        "",
        "$NACL...",
        "[]",
        "[" * 9000,
        json.dumps(content | {"ss58Address": MINER.hotkey.address}),
        json.dumps(content | {"secretSeed": "0x" + seed.hex()[:-1]}),
        json.dumps(content | {"secretSeed": None}),
        json.dumps(content | {"privateKey": "0x" + seed.hex()[:-1]}),
        json.dumps(content | {"privateKey": MINER.secret_key.reveal().hex()}),
        json.dumps({"secretSeed": seed.hex()}),
    ]
    for text in wrong:
        path.write_text(text)
        with pytest.raises(ConfigurationError) as caught:
            read_hotkey(path)
        assert seed.hex()[:-1] not in str(caught.value)
    path.write_text(json.dumps(content))
    path.chmod(0o644)
    with pytest.raises(ConfigurationError):
        read_hotkey(path)


@pytest.mark.parametrize("name", ["", "..", "a/b", "x" * 129, "a b", "\u0661", "a\n"])
def test_what_no_request_could_carry_is_not_sent(name: str) -> None:
    miner = servers.Miner(MINER.hotkey.address, MINER.sign)
    performer = Performer()
    for flow in (
        servers.read_server(miner, name),
        servers.remove_server(miner, name),
        servers.rename_server(miner, "n1", name),
        servers.attest_server(miner, name, bytes(32)),
        servers.register_server(miner, server_id=name, host="1.2.3.4", gpus=[GPU]),
    ):
        with pytest.raises(LocalProtocolError, match="1 to 128 of the characters"):
            performer.run(flow)
    with pytest.raises(LocalProtocolError, match="needs a hotkey"):
        servers.Miner(MINER.hotkey.address + "1", MINER.sign)
    with pytest.raises(LocalProtocolError, match="needs a hotkey"):
        HotkeyAuth("x", MINER.sign)
