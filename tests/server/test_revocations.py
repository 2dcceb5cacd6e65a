"""A party that is revoked gets nothing from any operation, consumes nothing, and all of it again once it is allowed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from chutes_proto.server._app import App
from chutes_proto.store._rows import GenerationRow, NonceRow, Pin, Revocable, RevocationRow, Vm, VmRow
from chutes_proto.units.erasure import EraseVm
from chutes_proto.units.revocations import Allow, ReadRevocations, RepeatRevocation, Revoke
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpResponse
from tests.server import test_provision as provisioned
from tests.server import test_runtime as runtime
from tests.server import test_servers as servers
from tests.server.world import HOTKEY, MINER, NOW, World, answer, refusal

VERSIONS = count(1)
SYNC = {"volumes": ["storage"], "rekey": []}
STORAGE = f"/servers/vm-1/luks?hotkey={HOTKEY}"


def names(world: World, hotkey: str = HOTKEY, vm: str = "vm-1") -> dict[str, tuple[Revocable, str]]:
    """Every way in which an operator may name the party of a VM that has booted."""
    (claim,) = world.rows(VmRow)
    assert claim.instance_id is not None
    return {
        "vm": ("vm", f"{hotkey}/{vm}"),
        "hotkey": ("hotkey", hotkey),
        "instance": ("platform", str(Pin("instance", claim.instance_id))),
        "ppid": ("platform", str(Pin("ppid", claim.ppid))),
    }


def revoke(world: World, party: tuple[Revocable, str], ends_at: int | None = None) -> None:
    world.store.transact(Revoke(world.now, next(VERSIONS), *party, ends_at, "somebody: stolen"))


def allow(world: World, party: tuple[Revocable, str]) -> None:
    assert world.store.transact(Allow(world.now, next(VERSIONS), *party, "somebody")).subject == party[1]


def refused(response: HttpResponse) -> None:
    status, code, detail = refusal(response)
    assert (status, code) == (403, Code.REVOKED)
    assert "stolen" not in detail  # the operator's reason is not the peer's


@pytest.fixture(params=[False, True], ids=["unread", "read"])
def learn(request: pytest.FixtureRequest) -> Callable[[World], None]:
    """Let the server read the revocations beside its requests, or not: it must not matter."""

    def read(world: World) -> None:
        if request.param:
            revoked = world.app.service.revoked
            revoked.now = world.store.transact(ReadRevocations(revoked.now))

    return read


@pytest.mark.parametrize("name", ["vm", "hotkey", "instance", "ppid"])
def test_no_nonce_and_no_token(world: World, learn: Callable[[World], None], name: str) -> None:
    key = answer(world.sync(world.token(), SYNC))["storage"]
    token, nonce = world.token(), world.nonce()
    learn(world)
    party = names(world)[name]
    revoke(world, party)
    before = world.store.image()
    header = {"x-boot-token": token}
    for _ in range(2):
        refused(world.sync(token, SYNC))
        refused(world.ask("GET", STORAGE, headers=header))
        learn(world)
    assert world.store.image() == before
    redeemed = world.rows(NonceRow)
    refused(world.boot(nonce))
    assert world.rows(NonceRow) == redeemed
    told = [record.fields for record in world.log if record.event == "refused"][-1]
    assert "somebody: stolen" in str(told["reason"])
    assert "chutes-proto revocations" in str(told["why"])
    allow(world, party)
    learn(world)
    assert answer(world.ask("GET", STORAGE, headers=header))["passphrase"] == key
    assert answer(world.sync(token, SYNC))["storage"] == key
    assert answer(world.boot(nonce))


@pytest.mark.parametrize("name", ["vm", "hotkey", "instance", "ppid"])
def test_no_step_of_a_provisioned_boot(learn: Callable[[World], None], name: str) -> None:
    world = World(App(provisioned.provisioned()))
    granted = answer(provisioned.boot(world))
    party = names(world, provisioned.HOTKEY)[name]
    learn(world)

    def only_allowed(ask: Callable[[], HttpResponse]) -> Any:
        revoke(world, party)
        refused(ask())
        learn(world)
        allow(world, party)
        return answer(ask())

    nonce = granted["root_confirm_nonce"]
    only_allowed(lambda: provisioned.confirm(world, nonce, provisioned.ROOT))
    handed = only_allowed(lambda: provisioned.provision(world, granted["luks_quote_nonce"]))
    body = {"volumes": {"storage": {"rotated": True}}}
    only_allowed(lambda: provisioned.confirm(world, handed["confirm_nonce"], body))


def test_an_erased_vm_gets_no_key_by_what_its_boot_was_granted(world: World) -> None:
    """Also if it was erased in the middle of its boot: else it would have keys, and no claim to its name."""

    def erase(world: World, hotkey: str = HOTKEY) -> None:
        unit = EraseVm(world.now, f"e{next(VERSIONS)}", next(VERSIONS), Vm(hotkey, "vm-1"), "sold", carry_out=True)
        assert world.store.transact(unit).record

    assert answer(world.sync(world.token(), SYNC))
    token = world.token()
    erase(world)
    for response in (world.sync(token, SYNC), world.ask("GET", STORAGE, headers={"x-boot-token": token})):
        assert refusal(response)[:2] == (401, Code.BOOT_TOKEN_INVALID)
    assert not any(row.sealed for row in world.rows(GenerationRow))

    world = World(App(provisioned.provisioned()))
    granted = answer(provisioned.boot(world))
    handed = answer(provisioned.provision(world, granted["luks_quote_nonce"]))
    again = answer(provisioned.boot(world))
    erase(world, provisioned.HOTKEY)
    body = {"volumes": {"storage": {"rotated": True}}}
    for response in (
        provisioned.confirm(world, again["root_confirm_nonce"], provisioned.ROOT),
        provisioned.provision(world, again["luks_quote_nonce"]),
        provisioned.confirm(world, handed["confirm_nonce"], body),
    ):
        assert response.status == 401, response.body
    assert not any(row.sealed for row in world.rows(GenerationRow))


@pytest.mark.parametrize("name", ["vm", "hotkey", "instance", "ppid"])
def test_no_attestation_and_no_registration(world: World, learn: Callable[[World], None], name: str) -> None:
    servers.boot(world)
    servers.registered(servers.register(world))
    assert answer(runtime.attest(world))
    (claim,) = world.rows(VmRow)
    party = names(world, MINER.hotkey.address, claim.vm.name)[name]
    status = "/servers/n1/attestation/status"
    assert answer(world.ask_signed("GET", status))["fresh"]
    revoke(world, party)
    learn(world)
    nonce = runtime.nonce_of(world)
    refused(runtime.attest(world, nonce))
    assert not answer(world.ask_signed("GET", status))["fresh"]
    assert answer(world.ask_signed("DELETE", "/servers/n1"))
    refused(servers.register(world))
    allow(world, party)
    servers.registered(servers.register(world))
    assert answer(runtime.attest(world))


def test_a_server_without_a_link_is_another_vms_once_it_is_renamed(world: World) -> None:
    """Nothing but its name says whose it is, and its owner may register it under another one, too."""
    servers.registered(servers.register(world))
    assert answer(runtime.attest(world))
    revoke(world, ("vm", f"{MINER.hotkey.address}/vm-1"))
    refused(runtime.attest(world, runtime.nonce_of(world)))
    assert answer(world.ask_signed("PATCH", "/servers/n1?server_name=vm-2"))
    assert answer(runtime.attest(world, runtime.nonce_of(world)))
    assert answer(world.ask_signed("GET", "/servers/n1/attestation/status"))["fresh"]


def test_until_a_date_and_for_others_not_at_all(world: World) -> None:
    world.token()
    revoke(world, ("vm", f"{HOTKEY}/vm-1"), ends_at=NOW + 60)
    refused(world.boot())
    assert answer(world.boot(vm_name="vm-2"))
    world.now += 60
    assert answer(world.boot())


def test_a_version_that_comes_back_after_a_restore_is_not_taken_for_the_old_set(world: World) -> None:
    """A version is random, so a store that was restored, and revokes others, has none that a server knows."""
    image = world.store.image()
    revoke(world, ("vm", f"{HOTKEY}/vm-1"))
    world.app.service.revoked.now = known = world.store.transact(ReadRevocations())
    world.store = type(world.store)(image)
    assert answer(world.boot())
    revoke(world, ("vm", f"{HOTKEY}/vm-2"))
    assert world.store.transact(ReadRevocations(known)).version != known.version
    refused(world.boot(vm_name="vm-2"))


def test_a_change_is_repeated_once_and_never_over_a_later_one(world: World) -> None:
    """Several servers, and an operator's command, may repeat what a restored store lacks at the same moment."""
    row = RevocationRow("hotkey", HOTKEY, "somebody: stolen", NOW, None)
    repeat = RepeatRevocation(NOW + 9, next(VERSIONS), row)
    assert world.store.transact(repeat)
    assert not world.store.transact(repeat)
    refused(world.boot())
    allow(world, ("hotkey", HOTKEY))
    assert not world.store.transact(repeat)
    assert answer(world.boot())
