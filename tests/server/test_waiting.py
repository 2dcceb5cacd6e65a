"""Places to wait for a store that does not answer: bounded, and no stranger takes those of VMs.

How long they wait is on the world's clock.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.effects import Effect, Flow, Transact, Uptime
from chutes_proto.errors import FateUnknown, StoreBusy
from chutes_proto.keys.vault import KeyEncryptionKey, Vault
from chutes_proto.server._app import App
from chutes_proto.server._limits import Admission
from chutes_proto.server._retry import CLIENT_SECONDS, LAST_START_SECONDS, LATEST_ANSWER_SECONDS, bound_store
from chutes_proto.server._tokens import RANDOM_SIZE, TokenMint
from chutes_proto.store._rows import VmRow
from chutes_proto.testing._playbook import Playbook
from chutes_proto.units.contents import CountAll
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.server import test_provision, test_rotation, test_runtime, test_servers
from tests.server.world import HOTKEY, World, answer, refusal, service

BOTH = {"volumes": ["storage", "tdx-cache"]}
OLD, NEW = KeyEncryptionKey.from_bytes(b"o" * 32), KeyEncryptionKey.from_bytes(b"n" * 32)


def limits(places: int) -> dict[str, Admission]:
    """So many places of both kinds; one address and one platform may have one."""
    return {
        kind: Admission(places, share=1, code=Code.STORE_UNAVAILABLE, text="Too many.")
        for kind in ("attested", "strangers")
    }


def stranger(world: World, path: str, header: str, body: Any, address: str) -> HttpResponse:
    """A request with a token that nobody issued."""
    headers = {header: "ab" * 32, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    return world.ask("POST", f"/servers/vm-1/{path}", body, headers=headers, peer_address=address)


def while_they_wait(world: World, requests: list[Callable[[], HttpResponse]], then: Callable[[], None]) -> None:
    """Do ``then`` while each of ``requests`` waits for the store, where each has come after the one before."""

    def next_one(effect: object) -> None:
        if not isinstance(effect, Transact):
            return
        if rest:
            outcomes.append(rest.pop(0)())
            return
        world.before = lambda _: None
        try:
            then()
        except AssertionError as exc:  # the application would answer it
            failed.append(exc)

    rest, failed, outcomes = [*requests[1:]], list[AssertionError](), list[HttpResponse]()
    world.before = next_one
    outcomes.append(requests[0]())
    if failed:
        raise failed[0]
    assert {response.status for response in outcomes} == {401}  # no VM's


STRANGERS = {
    "luks": ("x-boot-token", BOTH),
    "luks/confirm": ("x-confirm-nonce", {"volumes": {"storage": {"rotated": True}}}),
}


def base(world: World) -> None:
    assert answer(world.sync(world.token(), BOTH))
    headers = {"x-boot-token": world.token()}
    assert answer(world.ask("GET", f"/servers/vm-1/luks?hotkey={HOTKEY}", headers=headers))


def two_phase(world: World) -> None:
    handed = test_rotation.boot(world, "storage")
    assert answer(test_rotation.confirm(world, handed["confirm_nonce"], storage=True))


def provisioned(world: World) -> None:
    granted = answer(test_provision.boot(world, first_boot=True))
    assert answer(test_provision.confirm(world, granted["root_confirm_nonce"], test_provision.ROOT))
    handed = answer(test_provision.provision(world, granted["luks_quote_nonce"]))
    rotated = {"volumes": {name: {"rotated": True} for name in BOTH["volumes"]}}
    assert answer(test_provision.confirm(world, handed["confirm_nonce"], rotated))


@pytest.mark.parametrize("path", STRANGERS)
@pytest.mark.parametrize(
    ("serve", "exchange"),
    [(service, base), (test_rotation.two_phase, two_phase), (test_provision.provisioned, provisioned)],
)
def test_strangers_do_not_take_the_places_of_vms(serve: Any, exchange: Callable[[World], None], path: str) -> None:
    world = World(App(serve(**limits(2))))
    header, body = STRANGERS[path]
    ask = partial(stranger, world, path, header, body)

    def then() -> None:
        exchange(world)
        response = ask("192.0.2.9")  # who is one too many is told so at once
        assert refusal(response)[:2] == (503, Code.STORE_UNAVAILABLE)
        assert response.header("retry-after")

    while_they_wait(world, [partial(ask, "192.0.2.1"), partial(ask, "192.0.2.2")], then)


def test_one_address_of_strangers_and_one_platform_have_a_share() -> None:
    world = World(App(service(**limits(2))))
    ask = partial(stranger, world, "luks", *STRANGERS["luks"])
    token = world.token()
    (vm,) = world.rows(VmRow)

    def then() -> None:
        assert refusal(ask("192.0.2.1"))[:2] == (503, Code.STORE_UNAVAILABLE)
        assert refusal(ask("192.0.2.2"))[0] == 401
        with world.app.service.attested.of(vm.pin):
            assert refusal(world.boot())[:2] == (503, Code.STORE_UNAVAILABLE)
            assert answer(world.sync(token, BOTH))

    while_they_wait(world, [partial(ask, "192.0.2.1")], then)


# --- how long ---


def timed(world: World, takes: list[float], ask: Callable[[], HttpResponse]) -> tuple[HttpResponse, float]:
    """The answer, and its seconds, of a store that takes so long for one transaction after another; then it hangs."""

    def take(effect: Effect[Any]) -> None:
        if isinstance(effect, Transact):
            starts.append(world.uptime - arrived)
            needed = left.pop(0) if left else 1e9
            world.uptime += min(needed, effect.seconds)
            if needed > effect.seconds:
                raise FateUnknown("no answer in time")

    left, arrived, starts = [*takes], world.uptime, list[float]()
    world.before = take
    response = ask()
    world.before = lambda _: None
    assert max(starts) < LATEST_ANSWER_SECONDS
    return response, world.uptime - arrived


def refused_boot(world: World) -> Callable[[], HttpResponse]:
    assert answer(world.boot())
    world.platform = world.platform.another(1)
    nonce = world.nonce()
    return lambda: world.boot(nonce)


def refused_sync(world: World) -> Callable[[], HttpResponse]:
    assert answer(world.boot())
    return lambda: world.sync("ab" * 32, BOTH)


def refused_attestation(world: World) -> Callable[[], HttpResponse]:
    """It reads the server, redeems the nonce, which is used up, and records that."""
    test_servers.boot(world)
    test_servers.registered(test_servers.register(world))
    nonce = test_runtime.nonce_of(world)
    assert answer(test_runtime.attest(world, nonce))
    return lambda: test_runtime.attest(world, nonce)


def listing(world: World) -> Callable[[], HttpResponse]:
    return lambda: world.ask_signed("GET", "/servers/")


@pytest.mark.parametrize("first", [20.0, 27.9, 1e9])
@pytest.mark.parametrize("operation", [refused_boot, refused_sync])
def test_vms_are_answered_within_28_s_though_refused_late(world: World, operation: Any, first: float) -> None:
    """The store answers ``first``, and not the transaction that records the refusal."""
    assert LAST_START_SECONDS + 2 < LATEST_ANSWER_SECONDS < CLIENT_SECONDS == 30
    response, seconds = timed(world, [first], operation(world))
    assert min(first, 25) <= seconds <= 28
    assert response.status == (503 if first > 28 else 403 if operation is refused_boot else 401)
    is_recorded = operation is refused_boot  # a token that is unknown never is
    assert ("refusal_not_recorded" in [record.event for record in world.log]) == (is_recorded and first < 28)


@pytest.mark.parametrize("takes", [[], [1.9], [1.9, 1.9], [4.4]])
@pytest.mark.parametrize("operation", [refused_attestation, listing])
def test_other_operations_are_answered_within_5_s(world: World, operation: Any, takes: list[float]) -> None:
    """However many transactions they have."""
    response, seconds = timed(world, takes, operation(world))
    assert seconds < 5
    assert takes or refusal(response)[:2] == (503, Code.STORE_UNAVAILABLE)


def test_a_store_is_not_asked_for_a_transaction_that_no_time_is_left_for() -> None:
    request = HttpRequest("GET", "/", arrived=0.0)

    def handling() -> Flow[None]:
        for _ in range(2):
            _ = yield from Transact(CountAll())

    times = iter([0.0, LATEST_ANSWER_SECONDS, LATEST_ANSWER_SECONDS])
    playbook = Playbook((Transact, None), aside={Uptime: lambda _: next(times)})
    with pytest.raises(StoreBusy, match="no time is left"):
        playbook.run(bound_store(handling(), request, is_patient=True))


def test_a_refusal_is_recorded_late_if_the_store_answers(world: World) -> None:
    response, seconds = timed(world, [27.0, 0.5], refused_boot(world))
    assert (response.status, seconds) == (403, 27.5)
    assert "refusal_not_recorded" not in [record.event for record in world.log]


# --- tokens ---


@given(st.binary(min_size=RANDOM_SIZE, max_size=RANDOM_SIZE), st.integers(0, 255))
def test_a_token_is_recognised_under_each_live_key_and_no_other(random: bytes, bit: int) -> None:
    before, during, after = (TokenMint.of(Vault(*keys)) for keys in ((OLD,), (NEW, OLD), (NEW,)))
    for token in (before.issue(random), *before.confirm_nonces(random.hex().encode())):
        text = token.reveal()
        assert [mint.recognises(text) for mint in (before, during, after)] == [True, True, False]
        changed = (int(text, 16) ^ 1 << bit).to_bytes(32, "big").hex().encode()
        assert not before.recognises(changed)
    assert not before.recognises(b"")
