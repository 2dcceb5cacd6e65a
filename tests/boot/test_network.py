"""The simulated network does to each message what it was told, and time passes only when somebody waits."""

from __future__ import annotations

import pytest

from chutes_proto.effects import Entropy, FetchCollateral, Flow, MakeQuote, Now, Send, Sleep, Uptime, run
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, TransportError
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.network import Fate, SimulatedNetwork

REQUEST = HttpRequest("GET", "/")


@pytest.mark.parametrize(
    ("fate", "served", "answered"),
    [(Fate.DELIVERED, 1, True), (Fate.REQUEST_LOST, 0, False), (Fate.ANSWER_LOST, 1, False), (Fate.DOUBLED, 2, True)],
)
def test_fates(fate: Fate, served: int, answered: bool) -> None:
    seen: list[HttpRequest] = []

    def server(request: HttpRequest) -> HttpResponse:
        seen.append(request)
        return HttpResponse(200, body=b"%d" % len(seen))

    network = SimulatedNetwork(server, fates=[fate], timeout=12.0)
    if answered:
        response = network.perform(Send(REQUEST))
        assert isinstance(response, HttpResponse)
        assert response.body == b"%d" % served
        assert network.elapsed == 0.0
    else:
        with pytest.raises(TransportError) as raised:
            network.perform(Send(REQUEST))
        assert raised.value.maybe_delivered
        assert network.elapsed == 12.0
    assert len(seen) == served
    network.perform(Send(REQUEST))
    assert len(seen) == served + 1
    assert network.sent == [REQUEST, REQUEST]


def test_time_and_entropy() -> None:
    def flow() -> Flow[tuple[int, float, bytes, bytes]]:
        yield from Sleep(1.5)
        return (yield from Now()), (yield from Uptime()), (yield from Entropy(40)), (yield from Entropy(40))

    def outcome(seed: bytes) -> tuple[int, float, bytes, bytes]:
        return run(flow(), SimulatedNetwork(lambda _: HttpResponse(200), started=1000, seed=seed).perform)

    now, uptime, one, other = outcome(b"a")
    assert (now, uptime) == (1001, 1.5)
    assert one != other
    assert len(one) == len(other) == 40
    assert outcome(b"a") == (now, uptime, one, other)
    assert outcome(b"b")[2] != one


def test_what_it_cannot_do() -> None:
    network = SimulatedNetwork(lambda _: HttpResponse(200))
    with pytest.raises(QuoteUnavailable):
        network.perform(MakeQuote(bytes(64)))
    with pytest.raises(LocalProtocolError, match="FetchCollateral"):
        network.perform(FetchCollateral(None, 0))  # type: ignore[arg-type]
