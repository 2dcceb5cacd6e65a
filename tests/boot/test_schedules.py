"""Random schedules of failures: a boot with its sync ends, in time, and tells no secret on the way.

Each request meets a drawn mood of the server's (``model.py``) and a drawn fate on the way.
"""

from __future__ import annotations

from typing import Any

import attrs
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from chutes_proto.boot._flows import BootGrant, VolumeKeys, boot_and_sync
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Effect, Send, run
from chutes_proto.errors import BadRequest, QuoteUnavailable, Refused, RemoteProtocolError, TransportError, Unavailable
from chutes_proto.wire.http import HttpResponse
from tests.boot import talk
from tests.boot.model import BAD_MOODS, CANARY, FINAL_MOODS, VOLUMES, WELL, ModelServer
from tests.network import Fate, SimulatedNetwork

POLICY = RetryPolicy(attempts=6, base=1.0, cap=20.0, deadline=120.0)
TIMEOUT = 30.0
BLANK = dict.fromkeys(VOLUMES, False)


def _also_final(effect: Effect[Any]) -> tuple[int, ...]:
    """A 401 is final anywhere but at the sync, where it may only mean that the token is gone."""
    return () if isinstance(effect, Send) and "/luks" in effect.request.target else (401,)


def quoter(report_data: bytes) -> bytes:
    if report_data[0] % 8 == 0:
        raise QuoteUnavailable("the quoting service is busy")
    return b"quote over " + report_data


@pytest.mark.usefixtures("told_on_purpose")  # a mood of the server's repeats the token; what is logged is checked below
@given(
    moods=st.lists(st.sampled_from((WELL, *BAD_MOODS)) | st.sampled_from(FINAL_MOODS), max_size=14),
    fates=st.lists(st.sampled_from(Fate), max_size=14),
    seed=st.binary(max_size=4),
)
def test_every_schedule_ends_in_time_and_tells_nothing(moods: list[object], fates: list[Fate], seed: bytes) -> None:
    server = ModelServer(iter(moods))
    network = SimulatedNetwork(server, quoter=quoter, fates=fates, timeout=TIMEOUT, seed=seed)
    settings = attrs.evolve(talk.SETTINGS, retry=POLICY)
    outcome: tuple[BootGrant, VolumeKeys] | Exception
    final_answers = list[HttpResponse]()

    def perform(effect: Effect[Any]) -> object:
        assert not (final_answers and isinstance(effect, Send)), "asked again after a final answer"
        reply = network.perform(effect)
        if isinstance(reply, HttpResponse) and reply.status in (*FINAL_MOODS, *_also_final(effect)):
            final_answers.append(reply)
        return reply

    try:
        outcome = run(boot_and_sync(settings, BLANK), perform)
    except (Refused, BadRequest, Unavailable, TransportError, RemoteProtocolError, QuoteUnavailable) as exc:
        outcome = exc
    event(type(outcome).__name__)

    # an attempt that began before the deadline takes at most its requests' time-outs more
    assert network.elapsed <= POLICY.deadline + 4 * TIMEOUT
    assert len(network.sent) <= POLICY.attempts * 3 + 1
    assert isinstance(outcome, (Refused, BadRequest)) >= bool(final_answers)
    if isinstance(outcome, tuple):
        assert [key.passphrase.reveal() for key in outcome[1]] == [f"{CANARY}-{name}".encode() for name in VOLUMES]
    # no two attestations share a nonce; a sync repeated on one token is the same request
    nonces = [request.header_values("x-chutes-nonce") for request in network.sent if "attestation" in request.target]
    assert len(nonces) == len({*nonces})
    syncs = {(request.header_values("x-boot-token"), request) for request in network.sent if "/luks" in request.target}
    assert len(syncs) == len({token for token, _ in syncs})
    # the console is for everybody
    told = str([record.as_json("now") for record in network.records]).lower()
    assert CANARY not in told
    for request in network.sent:
        assert not any(token in told for token in request.header_values("x-boot-token"))


@given(st.sampled_from(FINAL_MOODS), st.integers(0, 2))
def test_a_final_refusal_is_never_asked_twice(status: int, good: int) -> None:
    server = ModelServer(iter([WELL] * good + [status]))
    network = SimulatedNetwork(server, quoter=lambda report_data: b"quote")
    with pytest.raises((Refused, BadRequest)):
        run(boot_and_sync(talk.SETTINGS, BLANK), network.perform)
    assert len(network.sent) == good + 1
    assert network.elapsed == 0.0
    assert network.records[-1].event == "boot_stopped"


@given(st.lists(st.sampled_from((Fate.ANSWER_LOST, Fate.REQUEST_LOST, Fate.DOUBLED)), max_size=3))
def test_a_lost_or_doubled_sync_costs_nothing(fates: list[Fate]) -> None:
    server = ModelServer(iter(()))
    network = SimulatedNetwork(server, quoter=lambda r: b"quote", fates=[Fate.DELIVERED] * 2 + fates)
    grant, _ = run(boot_and_sync(talk.SETTINGS, BLANK), network.perform)
    assert grant.boot_token is not None
    assert server.tokens() == {grant.boot_token.reveal().decode()}
