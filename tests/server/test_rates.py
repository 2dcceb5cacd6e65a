"""How often one address may ask: what is counted, of whom, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.effects import Transact
from chutes_proto.log import Level
from chutes_proto.server._app import App
from chutes_proto.server._config import LimitOptions
from chutes_proto.server._limits import TokenBuckets
from chutes_proto.server._proxy import TrustedProxies, TrustedProxy
from chutes_proto.wire.codes import Code
from tests.server.world import HOTKEY, World, answer, refusal, service


def world(per_minute: int, **changes: object) -> World:
    limits = LimitOptions(requests_per_minute=per_minute)
    return World(App(service(limits=limits, **changes)))


def test_one_too_many_waits_and_others_do_not() -> None:
    one = world(6)
    for _ in range(6):
        assert one.nonce()
    refused = one.ask("GET", "/servers/nonce")
    assert refusal(refused)[:2] == (429, Code.RATE_LIMITED)
    assert refused.header("retry-after") == "10"
    assert answer(one.ask("GET", "/servers/nonce", peer_address="192.0.2.2"))
    one.uptime += 10
    assert one.nonce()
    assert refusal(one.ask("GET", "/nowhere"))[:2] == (429, Code.RATE_LIMITED)
    assert [record.level for record in one.log if record.event == "refused"] == [Level.WARNING] * 2


def test_by_default_nobody_is_counted() -> None:
    one = world(0)
    for _ in range(1000):
        assert one.nonce()


def test_what_is_asked_once_is_answered() -> None:
    one = world(2)
    token = one.token()  # a nonce and an attestation
    assert refusal(one.ask("GET", "/servers/nonce"))[0] == 429
    for _ in range(10):
        assert answer(one.sync(token, {"volumes": ["storage"]}))
    assert refusal(one.ask("POST", "/servers/vm-1/luks/confirm", {}))[0] != 429


def test_behind_a_proxy_the_client_is_counted() -> None:
    one = world(1, proxies=TrustedProxies((TrustedProxy("front", unix=True),)))
    for address in ("198.51.100.1", "198.51.100.2"):
        asked = [one.ask("GET", "/servers/nonce", headers={"x-forwarded-for": address}, peer_address="") for _ in "12"]
        assert [response.status for response in asked] == [200, 429]


def test_a_network_of_ipv6_is_one_host() -> None:
    rates = TokenBuckets(1, 1 / 60)
    assert not rates.take("2001:db8::1", 0.0)
    assert rates.take("2001:db8::2", 0.0) == 60
    assert not rates.take("2001:db8:0:1::1", 0.0)


def test_a_peer_without_an_address_is_not_counted() -> None:
    one = world(1)
    assert [one.ask("GET", "/servers/nonce", peer_address="").status for _ in "123"] == [200, 200, 200]


def test_the_table_is_bounded() -> None:
    rates = TokenBuckets(1, 1 / 60, most=2)
    for address in ("1.1.1.1", "2.2.2.2", "3.3.3.3"):
        assert not rates.take(address, 0.0)
    assert rates.take("3.3.3.3", 0.0)
    assert not rates.take("1.1.1.1", 0.0)  # forgotten


@given(st.integers(1, 100), st.lists(st.floats(0, 5), max_size=200))
def test_never_more_than_the_bucket_and_what_flows_in(per_minute: int, waits: list[float]) -> None:
    rates, now, taken = TokenBuckets(per_minute, per_minute / 60), 0.0, 0
    for wait in waits:
        now += wait
        taken += not rates.take("1.1.1.1", now)
        assert taken <= per_minute + now * per_minute / 60 + 1e-6


JUNK = "5a" * 32
ASKED_ONCE = {
    3: ("GET", "/servers/vm-1/luks", None, "x-boot-token"),
    4: ("POST", "/servers/vm-1/luks", {"volumes": ["storage"]}, "x-boot-token"),
    13: ("POST", "/servers/vm-1/luks/attest", {"quote": "", "volumes": ["storage"]}, "x-quote-nonce"),
    14: ("POST", "/servers/vm-1/luks/confirm", {"volumes": {"storage": {"rotated": True}}}, "x-confirm-nonce"),
}


@pytest.mark.parametrize("operation", ASKED_ONCE)
def test_tokens_that_do_not_hold_count_against_what_else_is_asked(operation: int) -> None:
    one = world(3)
    method, target, body, header = ASKED_ONCE[operation]
    headers = {header: JUNK, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    asked = [one.ask(method, target, body, headers=headers) for _ in range(5)]
    assert [response.status for response in asked] == [401] * 5
    told = {(record.fields["status"], record.fields["code"], record.fields["reason"]) for record in one.log}
    assert (len(one.log), len(told)) == (5, 1)  # the operator hears what the client did, each time
    waits = one.ask("GET", "/servers/nonce")
    assert (refusal(waits)[0], waits.header("retry-after")) == (429, "20")
    assert one.ask(method, target, body, headers=headers, peer_address="192.0.2.2").status == 401


def test_other_refusals_count_once() -> None:
    one = world(2)
    body, headers = one.attestation("5a" * 32)
    asked = [one.ask("POST", "/servers/boot/attestation", body, headers=headers) for _ in "123"]
    assert [response.status for response in asked] == [401, 401, 429]


def test_who_holds_a_token_is_served_whatever_its_neighbours_ask() -> None:
    one = world(2)
    token = one.token()
    for _ in range(5):
        assert refusal(one.sync(JUNK, {"volumes": ["storage"]}))[0] == 401
    assert answer(one.sync(token, {"volumes": ["storage"]}))


@pytest.mark.parametrize("operation", ASKED_ONCE)
@pytest.mark.parametrize("token", ["x", JUNK[1:], JUNK + "0", JUNK.upper(), f" {JUNK}", "\xff" * 64])
def test_what_is_no_token_is_not_looked_up(operation: int, token: str) -> None:
    one = world(0)
    method, target, body, header = ASKED_ONCE[operation]
    headers = {header: token, "x-chutes-hotkey": HOTKEY, "content-type": "application/json"}
    status, code, told = refusal(one.ask(method, target, body, headers=headers))
    assert (status, "not found or expired" in told) == (401, True)
    assert not [effect for effect in one.asked if isinstance(effect, Transact)]
    headers[header] = JUNK
    assert refusal(one.ask(method, target, body, headers=headers)) == (401, code, told)  # no other text for the other
    assert [effect for effect in one.asked if isinstance(effect, Transact)]
