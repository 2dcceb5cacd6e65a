"""`ServerConnection` and `TlsSession` together."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

from chutes_proto.transport.h1 import Limits
from chutes_proto.wire.http import HttpResponse
from tests.certificates import NEW_KEY, certificate_pem, key_pem, self_signed
from tests.transport.talk import Talk, answers
from tests.transport.tls_client import TlsClient, client_context, session

GET = b"GET /servers/nonce HTTP/1.1\r\nHost: h\r\n\r\n"
LAST = (("connection", "close"),)


def carry(client: TlsClient, talk: Talk, *, bytewise: bool = False) -> None:
    """Until neither has more to say."""
    while data := client.data_to_send():
        pieces = [data[i : i + 1] for i in range(len(data))] if bytewise else [data]
        client.receive_data(talk.feed(*pieces))


@pytest.mark.parametrize("bytewise", [False, True])
def test_a_request_carries_the_client_certificate(bytewise: bool, tmp_path: Path) -> None:
    key = NEW_KEY["rsa2048"]()
    certificate = self_signed(key)
    (tmp_path / "client.pem").write_bytes(certificate_pem(certificate) + key_pem(key))
    settings = client_context()
    settings.load_cert_chain(tmp_path / "client.pem")
    client, talk = TlsClient(settings), Talk(tls=session())
    client.send(GET + GET)
    carry(client, talk, bytewise=bytewise)
    assert [request.peer_certificate for request in talk.requests] == [certificate] * 2
    assert [answer.status for answer in answers(client.received)] == [200, 200]
    client.close()
    carry(client, talk, bytewise=bytewise)
    assert client.ended
    talk.feed(b"")
    assert talk.connection.closed


def test_the_last_answer_is_followed_by_a_close() -> None:
    client, talk = TlsClient(client_context()), Talk(lambda _: HttpResponse(403, LAST, b"no"), tls=session())
    client.send(GET)
    carry(client, talk)
    assert answers(client.received)[0].body == b"no"
    assert client.ended
    assert not talk.connection.closed
    client.send(GET * 20)  # what still comes is swallowed
    talk.feed(client.data_to_send(), b"")
    assert talk.connection.closed
    assert len(talk.requests) == 1


def test_the_peer_may_close_its_side_before_the_answer() -> None:
    client, talk = TlsClient(client_context()), Talk(tls=session())
    carry(client, talk)
    client.send(GET)
    client.close()
    sent = talk.feed(client.data_to_send())
    assert len(talk.requests) == 1
    assert sent
    assert talk.connection.closed


@pytest.mark.parametrize("data", [GET, b"\0" * 100, b"\x16\x03\x01\x00\x05hello"])
def test_what_is_no_tls_ends_the_connection(data: bytes) -> None:
    talk = Talk(tls=session())
    sent = talk.feed(data)
    assert b"HTTP" not in sent
    assert talk.connection.deadline == (talk.now + 2.0 if sent else inf)  # an alert has time to arrive
    assert talk.connection.closed is not bool(sent)
    talk.feed(GET, b"")
    assert talk.connection.closed
    assert talk.requests == []


def test_the_end_within_the_handshake() -> None:
    talk = Talk(tls=session())
    talk.feed(TlsClient(client_context()).data_to_send()[:100], b"")
    assert talk.connection.closed


def test_a_handshake_has_its_time() -> None:
    talk = Talk(tls=session(), limits=Limits(handshake_seconds=5.0))
    talk.now += 4.0
    talk.feed(TlsClient(client_context()).data_to_send()[:100])
    assert talk.connection.deadline == 1005.0
    assert talk.expire() == b""
    assert talk.connection.closed


def test_a_request_timeout_is_heard_through_tls() -> None:
    client, talk = TlsClient(client_context()), Talk(tls=session())
    client.send(GET[:-2])
    carry(client, talk)
    client.receive_data(talk.expire())
    assert [answer.status for answer in answers(client.received)] == [408]
    assert client.ended


def test_an_idle_peer_hears_the_close() -> None:
    client, talk = TlsClient(client_context()), Talk(tls=session())
    client.send(GET)
    carry(client, talk)
    client.receive_data(talk.expire())
    assert client.ended


def test_a_damaged_record_after_a_request() -> None:
    client, talk = TlsClient(client_context()), Talk(tls=session())
    client.send(GET)
    carry(client, talk)
    talk.feed(b"\x17\x03\x03\x00\x20" + bytes(32))
    talk.feed(b"")
    assert talk.connection.closed
