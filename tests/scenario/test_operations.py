"""Every operation of a VM over real sockets and real TLS, on each loop."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.from_thread
import httpx
import pytest
import trio
from attrs import define
from cryptography.x509 import load_pem_x509_certificate

from chutes_proto.auth.binding import report_data
from chutes_proto.auth.signing import messages_to_sign, signature_headers
from chutes_proto.effects import Effect, Transact, run_async
from chutes_proto.server._app import App
from chutes_proto.server._profiles import ServedProfile
from chutes_proto.store._run import Unit
from chutes_proto.testing._platform import PROFILE
from chutes_proto.wire import openapi
from chutes_proto.wire.codec import encode_quote
from chutes_proto.wire.endpoint import Coverage
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.scenario.operations import (
    LOOPS,
    SERVER,
    VOLUMES,
    Scene,
    Site,
    Vm,
    code,
    open_store,
    rows,
)
from tests.server.test_servers import server
from tests.server.world import HOTKEY, MINER, PLATFORM, service

T = TypeVar("T")

pytestmark = pytest.mark.anyio


async def test_boot_sync_and_what_comes_after(scene: Scene) -> None:
    secrets: set[str] = set()

    site = scene()
    async with site.serving():
        async with Vm(site) as vm:
            nonce = await vm.nonce()
            granted = await vm.attest(nonce)
            grant = granted.json()
            assert list(grant) == ["key", "boot_token"]
            assert granted.text == json.dumps(grant, separators=(",", ":"))
            assert code(await vm.attest(nonce)) == (401, "nonce_invalid")  # a nonce is redeemed once
            assert code(await vm.read(grant["boot_token"])) == (404, "key_not_found")
            synced = await vm.sync(grant["boot_token"])
            keys = synced.json()
            assert list(keys) == [*VOLUMES]
            again = await vm.sync(grant["boot_token"])  # the answer was lost: the same one
            assert (again.status_code, again.content) == (200, synced.content)
            assert code(await vm.sync(grant["boot_token"], volumes=VOLUMES[:1])) == (401, "boot_token_invalid")
            assert code(await vm.read(grant["boot_token"])) == (401, "boot_token_invalid")
        async with vm.stranger() as rebooted:  # a new key at each boot, the same passphrases
            grant = await rebooted.boot()
            read = await rebooted.read(grant["boot_token"])
            assert read.json() == {"passphrase": keys["storage"]}
            secrets.update((*grant.values(), *(keys[name] for name in VOLUMES), granted.json()["boot_token"], nonce))
            kept = (await rebooted.sync(grant["boot_token"])).json()
            assert {name: kept[name] for name in VOLUMES} == {name: keys[name] for name in VOLUMES}

    assert [record.event for record in site.log if record.event == "boot_granted"] == ["boot_granted"] * 2
    logged = "".join(record.as_json("") for record in site.log)
    assert len(secrets) == 6
    assert not [secret for secret in secrets if secret in logged]


async def test_refusals(scene: Scene) -> None:
    site = scene()
    async with site.serving(), Vm(site) as vm, vm.bare() as bare, vm.stranger() as stranger:
        nonce = await vm.nonce()
        assert code(await bare.attest(nonce)) == (401, "client_certificate_required")
        quote_of_vm = vm.attestation(nonce)["quote"]
        assert code(await stranger.attest(nonce, quote=quote_of_vm)) == (403, "certificate_mismatch")
        assert code(await vm.attest(nonce, quote="!")) == (403, "quote_malformed")
        assert code(await vm.attest(nonce, PLATFORM.having("rtmr1"))) == (403, "measurement_mismatch")
        assert code(await vm.attest(nonce, PLATFORM.having("debug"))) == (403, "attributes_rejected")
        assert code(await vm.attest(nonce, miner_hotkey=HOTKEY[:-1])) == (403, "hotkey_rejected")
        assert code(await vm.attest("0" * 64)) == (401, "nonce_invalid")
        assert code(await vm.attest(nonce, vm_name=7)) == (422, "validation_error")
        assert (await vm.attest(nonce)).status_code == 200  # no refusal redeemed it
        assert code(await vm.sync("0" * 64)) == (401, "boot_token_invalid")
        assert code(await vm.http.get("/nowhere")) == (404, "not_found")
        assert code(await vm.http.get(f"/servers/a%2Fb/luks?hotkey={HOTKEY}")) == (404, "not_found")
        wrong = await vm.http.put("/servers/vm-1/luks")
        assert code(wrong) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "GET, HEAD, POST"
        assert (await vm.http.get("/servers/nonce/")).headers["location"] == "../nonce"
        forged = await vm.http.get("/servers/nonce", headers={"x-client-cert": "x"})
        assert code(forged) == (400, "bad_request")
        large = await vm.http.post("/servers/vm-1/luks", content=b"x" * 70_000)
        assert code(large) == (413, "body_too_large")
        head = await vm.http.get("/servers/nonce", headers={"x": "x" * 20_000})
        assert code(head) == (431, "head_too_large")

    refused = {record.fields["code"] for record in site.log if record.event == "refused"}
    assert {"certificate_mismatch", "head_too_large", "nonce_invalid"} <= refused


async def test_two_phases_by_the_boot_agent_also_while_draining(loop: str, tmp_path: Path) -> None:
    profiles = {PROFILE.identity: ServedProfile(PROFILE, None, False, False, "two-phase")}
    site = Site(LOOPS[loop], open_store(tmp_path), App(service(profiles=profiles)))
    stages: Any = itertools.cycle(["boot", "runtime"])

    def quoter(data: bytes) -> bytes:
        return PLATFORM.quote(data, stage=next(stages))

    async def boot(*, is_formatted: bool, stop: bool = False) -> Any:
        settings: Any = {"hotkey": HOTKEY, "vm_name": "vm-1", "quoter": quoter, "ca_pem": SERVER.ca_pem}
        async with site.loop.BootAgent(site.url, **settings, log=site.log.append) as agent:
            await agent.boot()
            if stop:
                site.server.stop()
            async with agent.rotate(dict.fromkeys(VOLUMES, is_formatted)) as rotation:
                for volume in VOLUMES:
                    rotation.added(volume)
            return rotation

    async with site.serving():
        first = await boot(is_formatted=False)
        second = await boot(is_formatted=True, stop=True)
        for volume in VOLUMES:
            assert second.keys[volume].current == first.keys[volume].next
            assert second.keys[volume].next != second.keys[volume].current


async def test_the_description(scene: Scene) -> None:
    site = scene()
    async with site.serving(), Vm(site).bare() as anyone:
        assert (await anyone.http.get("/openapi.json")).content == openapi.document()


async def test_while_draining_boots_are_sent_away_and_syncs_served(scene: Scene) -> None:
    site = scene()
    async with site.serving(), Vm(site) as vm, vm.stranger() as other:
        grant = await vm.boot()
        nonce = await other.nonce()
        site.server.stop()
        sent_away = await other.attest(nonce)
        assert code(sent_away) == (503, "draining")
        assert sent_away.headers["connection"] == "close"
        assert "retry-after" in sent_away.headers
        assert code(await other.http.get("/servers/nonce")) == (503, "draining")
        assert (await vm.read(grant["boot_token"])).status_code == 404
        synced = await vm.sync(grant["boot_token"])
        assert synced.status_code == 200
        assert synced.headers["connection"] == "close"


# --- cancellation ---


@define
class Interruption:
    """A cancellation at an effect: before it is carried out, or ``within`` its transaction. Also the store's place."""

    site: Site
    number: int
    within: bool
    count: int = 0
    scope: Any = None
    armed: bool = False

    async def answer(self, request: HttpRequest) -> HttpResponse | None:
        performer = self.site.loop.Performer(store=self, collateral=self.site.collateral, log=self.site.log.append)
        perform = performer.perform

        async def counted(effect: Effect[Any]) -> Any:
            self.count += 1
            if self.count == self.number and self.within and isinstance(effect, Transact):
                self.armed = True
            elif self.count == self.number:
                self.scope.cancel()
            return await perform(effect)

        with anyio.CancelScope() as self.scope:  # not by `run`, which performs in place what waits for nothing
            answered: HttpResponse = await run_async(self.site.app.handle(request), counted)
            return answered
        return None

    def transact(self, unit: Unit[T]) -> T:
        if self.armed:
            threads: Any = trio.from_thread if self.site.loop is LOOPS["trio"] else anyio.from_thread
            threads.run_sync(self.scope.cancel)
        result: T = self.site.store.transact(unit)
        return result


async def asked(vm: Vm, operation: str) -> tuple[HttpRequest, str]:
    """The request for an operation and the nonce or token it rests on, after what must come before."""
    if operation == "boot":
        proof = await vm.nonce()
        target, body = "/servers/boot/attestation", json.dumps(vm.attestation(proof))
        headers = [("x-chutes-nonce", proof)]
    else:
        proof = (await vm.boot())["boot_token"]
        if operation == "read":
            assert (await vm.sync(proof)).status_code == 200
            proof = (await vm.boot())["boot_token"]
        target = "/servers/vm-1/luks"
        body = httpx.Request("POST", target, json={"volumes": VOLUMES}).content.decode()  # as `Vm.sync` sends it again
        headers = [("x-boot-token", proof), ("x-chutes-hotkey", HOTKEY)]
    assert vm.identity is not None
    request = HttpRequest(
        "GET" if operation == "read" else "POST",
        target,
        (("content-type", "application/json"), *headers),
        body.encode(),
        load_pem_x509_certificate(vm.identity.certificate_pem),
        "127.0.0.1",
        arrived=anyio.current_time(),
    )
    return request, proof


def signed(method: str, target: str, body: bytes = b"", nonce: str = "", certificate: Any = None) -> HttpRequest:
    """A request of a miner's."""
    coverage: Coverage = "nonce" if nonce else "body" if method == "POST" else "purpose"
    nonce = nonce or str(int(time.time()))
    message, *_ = messages_to_sign(coverage, "compatible", MINER.hotkey, nonce, method, target, body, "tee")
    headers = (("content-type", "application/json"), *signature_headers(MINER.hotkey, nonce, message, MINER.sign))
    return HttpRequest(method, target, headers, body, certificate, "127.0.0.1", arrived=anyio.current_time())


SIGNED: dict[str, tuple[int, set[str], int]] = {  # the status, the rows that change, and the status of doing it again
    "register": (201, {"ServerRow", "GpuRow", "AuditRow"}, 409),
    "rename": (200, {"ServerRow", "AuditRow"}, 200),
    "remove": (200, {"ServerRow", "GpuRow", "AuditRow"}, 404),
    "attest": (200, {"ServerRow", "AttestationRow", "NonceRow", "AuditRow"}, 401),
}


async def of_a_miner(site: Site, vm: Vm, operation: str) -> HttpRequest:
    """The request for an operation of a miner's, after what must come before."""
    performer = site.performer()
    registration = signed("POST", "/servers/", json.dumps(server()).encode())
    if operation == "register":
        return registration
    assert (await performer.run(site.app.handle(registration))).status == 201
    match operation:
        case "rename":
            return signed("PATCH", "/servers/n1?server_name=vm-9")
        case "remove":
            return signed("DELETE", "/servers/n1")
        case _:
            issued = await performer.run(site.app.handle(signed("GET", "/servers/n1/nonce")))
            nonce = json.loads(issued.body)["nonce"]
            assert vm.identity is not None
            data = report_data(bytes.fromhex(nonce), vm.identity.spki_sha256)
            body = json.dumps({"quote": encode_quote(PLATFORM.quote(data, stage="runtime"))}).encode()
            certificate = load_pem_x509_certificate(vm.identity.certificate_pem)
            return signed("POST", "/servers/n1/attestation", body, nonce, certificate)


@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("operation", list(SIGNED))
async def test_a_cancelled_call_of_a_miner_is_done_or_not(
    operation: str, within: bool, loop: str, tmp_path: Path
) -> None:
    status, rows_of_it, again = SIGNED[operation]

    async def play(number: int) -> tuple[bool, bool]:
        directory = tmp_path / str(number)
        directory.mkdir()
        site = Site(LOOPS[loop], open_store(directory))
        async with site.serving(), Vm(site) as vm:
            request = await of_a_miner(site, vm, operation)
            before = rows(site.store)
            response = await Interruption(site, number, within).answer(request)
            after = rows(site.store)
            changed = {name for name in after if after[name] != before[name]}
            assert changed in (set(), rows_of_it)
            later = await site.performer().run(site.app.handle(request))
            assert later.status == (again if changed else status)
            return response is not None, bool(changed)

    seen: list[tuple[bool, bool]] = []
    while not seen or not seen[-1][0]:
        seen.append(await play(len(seen) + 1))
    assert len(seen) > 3
    committed = [changed for _, changed in seen]
    assert committed == sorted(committed)


@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
@pytest.mark.parametrize("operation", ["boot", "sync", "read"])
async def test_a_cancellation_leaves_nothing_half_done(operation: str, within: bool, loop: str, tmp_path: Path) -> None:
    """Whichever effect it hits: the store is as before or as after, and the VM gets what it asks for afterwards."""

    async def play(number: int) -> tuple[bool, bool]:
        directory = tmp_path / str(number)
        directory.mkdir()
        site = Site(LOOPS[loop], open_store(directory))
        async with site.serving(), Vm(site) as vm:
            request, proof = await asked(vm, operation)
            before = rows(site.store)
            response = await Interruption(site, number, within).answer(request)
            after = rows(site.store)
            changed = {name for name in after if after[name] != before[name]}
            match operation:
                case "boot" if changed:  # granted, and the answer lost: the nonce is redeemed, the next boot is granted
                    assert {"NonceRow", "VmRow", "BootRow", "AttestationRow"} <= changed
                    assert code(await vm.attest(proof)) == (401, "nonce_invalid")
                    assert await vm.boot()
                case "boot":
                    assert (await vm.attest(proof)).status_code == 200
                case "sync":
                    assert not changed or {"BootRow", "BootVolumeRow", "GenerationRow", "VolumeRow"} <= changed
                    assert (await vm.sync(proof)).status_code == 200
                case _:
                    assert (await vm.read(proof)).status_code == 200
            return response is not None, bool(changed)

    seen: list[tuple[bool, bool]] = []
    while not seen or not seen[-1][0]:
        seen.append(await play(len(seen) + 1))
    assert len(seen) > 3
    committed = [changed for _, changed in seen]
    assert committed == sorted(committed)  # what is committed stays so, however late the cancellation
