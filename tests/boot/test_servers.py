"""A miner's flows against the real server in process: what is tried again, and that nothing is done or told twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from attrs import define, evolve, field, frozen

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Effect, Flow, MakeQuote, Send, Sleep, Transact, run
from chutes_proto.errors import (
    LocalProtocolError,
    QuoteUnavailable,
    Refusal,
    Refused,
    RemoteProtocolError,
    StoreBusy,
    TransportError,
    Unavailable,
)
from chutes_proto.miner import _flows as servers
from chutes_proto.miner._flows import AttestationStatus, Miner, RuntimeVerdict, Server
from chutes_proto.store._rows import AttestationRow, ServerRow
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.server.world import CERTIFICATES, GPU, MINER, OTHER, World

LOST = TransportError("the answer was lost", maybe_delivered=True)
NOWHERE = TransportError("nobody listens", maybe_delivered=False)


@frozen
class Unheard:
    """An answer of a server that did nothing."""

    answer: HttpResponse


@define(eq=False)
class Network(World):
    """The way to the server: ``weather`` says of each request whether it is lost, and on which way."""

    weather: Iterator[Any] = field(factory=lambda: iter(()))
    sent: list[HttpRequest] = field(factory=list)
    slept: list[float] = field(factory=list)

    def perform(self, effect: Effect[Any]) -> Any:
        match effect:
            case Send(request):
                return self._send(request)
            case MakeQuote(data):
                return self.platform.quote(data, stage="runtime")
            case Sleep(seconds):
                self.slept.append(seconds)
                self.now += round(seconds)
        return super().perform(effect)

    def _send(self, request: HttpRequest) -> HttpResponse:
        self.sent.append(request)
        weather = next(self.weather, None)
        if weather is NOWHERE:
            raise NOWHERE
        if isinstance(weather, Unheard):
            return weather.answer
        answer = self.ask(request.method, request.target, request.body, headers=dict(request.headers))
        if isinstance(weather, Exception):
            raise weather
        return answer if weather is None else weather


@pytest.fixture
def network() -> Network:
    return Network()


def miner(pair: HotkeyPair = MINER, **policy: Any) -> Miner:
    return Miner(pair.hotkey.address, pair.sign, retry=RetryPolicy(attempts=4, cap=8.0, deadline=100.0, **policy))


def play(network: Network, flow: Flow[Any], *weather: Any) -> Any:
    network.weather = iter(weather)
    network.sent.clear()
    return run(flow, network.perform)


def register(pair: HotkeyPair = MINER, **changes: Any) -> Flow[None]:
    settings: Any = {"server_id": "n1", "name": "vm-1", "host": "1.2.3.4", "gpus": [GPU]} | changes
    return servers.register_server(miner(pair), **settings)


FLOWS: dict[str, Callable[[], Flow[Any]]] = {
    "list": lambda: servers.list_servers(miner()),
    "read": lambda: servers.read_server(miner(), "n1"),
    "rename": lambda: servers.rename_server(miner(), "n1", "vm-2"),
    "attest": lambda: servers.attest_server(miner(), "n1", spki_sha256(CERTIFICATES[0])),
    "status": lambda: servers.read_status(miner(), "n1"),
    "remove": lambda: servers.remove_server(miner(), "n1"),
}


@pytest.mark.parametrize("name", list(FLOWS))
@pytest.mark.parametrize("weather", [NOWHERE, LOST, HttpResponse(502, (), b"<html>"), HttpResponse(200, (), b"")])
def test_what_is_lost_is_asked_again(network: Network, name: str, weather: Any) -> None:
    play(network, register())
    result = play(network, FLOWS[name](), weather)
    assert len(network.sent) == (3 if name == "attest" else 2)  # the nonce again, and then the attestation
    assert result is not None


@pytest.mark.parametrize("weather", [NOWHERE, LOST, HttpResponse(503, (("retry-after", "5"),), b"")])
def test_a_registration_whose_answer_is_lost_is_done(network: Network, weather: Any) -> None:
    play(network, register(), weather)
    (row,) = network.rows(ServerRow)
    assert (row.server_id, row.name, row.host) == ("n1", "vm-1", "1.2.3.4")


def test_each_attempt_is_signed_anew(network: Network) -> None:
    play(network, register(), LOST)
    first, second = (dict(request.headers) for request in network.sent[:2])
    assert int(second["x-chutes-nonce"]) > int(first["x-chutes-nonce"])
    assert first["x-chutes-signature"] != second["x-chutes-signature"]


def test_what_was_there_before_is_no_success(network: Network) -> None:
    """Neither without a lost answer, nor when what is there is not what was asked for, nor another's."""
    play(network, register())
    for lost in ((), (NOWHERE,)):
        with pytest.raises(Refused) as caught:
            play(network, register(), *lost)
        assert caught.value.code == "host_taken"
    others: tuple[dict[str, Any], ...] = ({"name": "vm-2"}, {"host": "5.6.7.8"}, {"server_id": "n2"})
    for changes in others:
        with pytest.raises(Refused, match=r"already registered|registered to you already"):
            play(network, register(**changes), LOST)
    with pytest.raises(Refused):
        play(network, register(OTHER), LOST)
    with pytest.raises(Refused) as caught:
        play(network, register(gpus=[evolve(GPU, uuid="GPU-2")]), LOST)
    assert caught.value.code == "host_taken"


def test_a_removal_whose_answer_is_lost_is_done(network: Network) -> None:
    play(network, register())
    assert play(network, servers.remove_server(miner(), "n1"), LOST) == "n1"
    assert network.rows(ServerRow) == ()
    with pytest.raises(Refused):
        play(network, servers.remove_server(miner(), "n1"), NOWHERE)


def test_a_proxys_page_removes_nothing(network: Network) -> None:
    """Neither request reached the server: a 404 that is not a key server's says nothing of the server."""
    play(network, register())
    pages = [Unheard(HttpResponse(status, (), b"<html>")) for status in (502, 404)]
    with pytest.raises(Refused, match="HTTP status 404"):
        play(network, servers.remove_server(miner(), "n1"), *pages)
    assert len(network.rows(ServerRow)) == 1


@pytest.mark.parametrize(("status", "word"), [(429, "rate_limited"), (503, "busy"), (503, "draining")])
def test_not_now_hides_no_refusal(network: Network, status: int, word: str) -> None:
    """A server that says so has done nothing: what is not there was not removed, what is there was there before."""
    body = b'{"detail":"Retry shortly.","code":"%s","request_id":"r"}' % word.encode()
    not_now = HttpResponse(status, (("content-type", "application/json"),), body)
    with pytest.raises(Refused, match="Server n1 not found"):
        play(network, servers.remove_server(miner(), "n1"), Unheard(not_now))
    play(network, register())
    with pytest.raises(Refused, match="already registered"):
        play(network, register(), Unheard(not_now))


def test_what_was_registered_long_ago_was_not_registered_now(network: Network) -> None:
    play(network, register())
    network.now += 3600
    with pytest.raises(Refused, match="already registered"):
        play(network, register(), LOST)


def test_an_attestation_begins_again_with_a_new_nonce(network: Network) -> None:
    play(network, register())
    answer = play(network, FLOWS["attest"](), None, LOST)
    assert [request.method for request in network.sent] == ["GET", "POST"] * 2
    nonces = [dict(request.headers)["x-chutes-nonce"] for request in network.sent if request.method == "POST"]
    assert len(set(nonces)) == 2
    assert len(network.rows(AttestationRow)) == 2
    assert answer.verified_at == datetime.fromtimestamp(network.now, UTC)
    assert answer.attestation_id in {row.attestation_id for row in network.rows(AttestationRow)}


def test_a_quote_that_cannot_be_made_now(network: Network) -> None:
    play(network, register())
    failing = iter([True, False])

    def before(effect: Effect[Any]) -> None:
        if isinstance(effect, MakeQuote) and next(failing):
            raise QuoteUnavailable("busy")

    perform = network.perform

    def performing(effect: Effect[Any]) -> Any:
        before(effect)
        return perform(effect)

    assert run(FLOWS["attest"](), performing).attestation_id == network.rows(AttestationRow)[-1].attestation_id


def test_not_now_is_waited_for_as_long_as_the_server_says(network: Network) -> None:
    busy = iter([True, False])

    def before(effect: Effect[Any]) -> None:
        if isinstance(effect, Transact) and next(busy, False):
            raise StoreBusy("retry later")

    network.before = before
    assert play(network, servers.list_servers(miner())) == ()
    assert network.slept
    assert network.slept[0] >= 2


@pytest.mark.parametrize("status", [401, 403, 404, 409, 400, 422])
def test_a_refusal_is_final(network: Network, status: int) -> None:
    body = b'{"detail":"No.","code":"unknown","request_id":"r"}'
    answer = HttpResponse(status, (("content-type", "application/json"),), body)
    with pytest.raises(Refusal, match=r"No\.") as caught:
        play(network, servers.list_servers(miner()), answer)
    assert len(network.sent) == 1
    assert not isinstance(caught.value, Unavailable)


def test_what_is_answered_becomes_values_with_times(network: Network) -> None:
    registered_at = datetime.fromtimestamp(network.now, UTC)
    play(network, register())
    registered = Server("n1", "vm-1", "1.2.3.4", registered_at, None)
    assert play(network, FLOWS["list"]()) == (registered,)
    assert play(network, FLOWS["read"]()) == registered
    never = AttestationStatus("n1", "vm-1", None, is_fresh=False, age_seconds=None)
    assert play(network, FLOWS["status"]()) == never
    network.now += 60
    attested_at = datetime.fromtimestamp(network.now, UTC)
    attested = play(network, FLOWS["attest"]())
    assert attested.verified_at == attested_at
    network.now += 5
    verdict = RuntimeVerdict(attested.attestation_id, attested_at, error=None)
    assert play(network, FLOWS["status"]()) == AttestationStatus("n1", "vm-1", verdict, is_fresh=True, age_seconds=5)
    renamed_at = datetime.fromtimestamp(network.now, UTC)
    assert play(network, FLOWS["rename"]()) == evolve(registered, name="vm-2", updated_at=renamed_at)


@pytest.mark.parametrize("time", ["", "yesterday", "2026-11-25", "2026-11-25T00:10:00", "20261125"])
def test_a_time_without_its_offset_is_not_taken_for_local_time(network: Network, time: str) -> None:
    body = b'{"server_id":"n1","name":"vm-1","ip":"1.2.3.4","version":null,"maintenance_pending_window_id":null,'
    body += b'"created_at":"%s","updated_at":null}' % time.encode()
    answer = HttpResponse(200, (("content-type", "application/json"),), body)
    with pytest.raises(RemoteProtocolError, match="not RFC 3339"):
        play(network, servers.read_server(miner(), "n1"), *[answer] * 9)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a\n", "\u00e9", "x" * 129])
def test_a_name_that_no_request_can_carry_is_not_sent(network: Network, name: str) -> None:
    for flow in (
        servers.read_server(miner(), name),
        servers.rename_server(miner(), "n1", name),
        servers.remove_server(miner(), name),
        register(server_id=name),
    ):
        with pytest.raises(LocalProtocolError, match="the id or name of a server is 1 to 128"):
            play(network, flow)
    assert network.sent == []


def test_it_ends(network: Network) -> None:
    with pytest.raises(TransportError):
        play(network, servers.list_servers(miner()), *[NOWHERE] * 9)
    assert len(network.sent) == 4
    with pytest.raises(RemoteProtocolError):
        play(network, servers.list_servers(miner()), *[HttpResponse(200, (), b"x")] * 9)
    events = {record.event for record in network.log}
    assert {"request_delayed", "request_stopped"} <= events
    assert not [event for event in events if event.startswith("boot")]
