"""The HTTP connection: requests, their limits, and bytes that are not requests."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chutes_proto.errors import LocalProtocolError
from chutes_proto.transport import h1
from chutes_proto.transport.h1 import DEFAULT_LIMITS, LAST_CALL_SECONDS, Limits, ServerConnection, peer_address
from chutes_proto.transport.plain import take_plain
from chutes_proto.wire import json
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.transport.talk import JSON, Talk, answers, outcome

GET = b"GET /servers/nonce HTTP/1.1\r\nHost: h\r\n\r\n"
POST = b"POST /servers/vm/luks HTTP/1.1\r\nHost: h\r\n"
LINGER = b"x" * 1000


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def refusal(data: bytes, status: int, code: str) -> None:
    """The bytes get this one refusal, however they are cut, and the connection ends, once the peer has heard it."""
    for pieces in ([data], bytewise(data) if len(data) < 20_000 else [data[:7], data[7:]]):
        talk = Talk()
        sent = talk.feed(*pieces)
        (answer,) = answers(sent)
        assert (answer.status, talk.requests) == (status, [])
        assert answer.headers["connection"] == "close"
        assert answer.headers["content-type"] == "application/json"
        content = json.decode(answer.body)
        assert (list(content), content["code"], content["request_id"]) == (["detail", "code", "request_id"], code, "r1")
        assert answer.body == json.encode(content)
        assert talk.feed(LINGER, GET) == b""
        assert not talk.connection.closed
        talk.feed(b"")
        assert talk.connection.closed
        assert talk.connection.data_to_send() == b""


# --- requests and answers ---


def test_a_request_and_its_answer() -> None:
    talk = Talk(lambda _: HttpResponse(200, JSON, b'{"a":1}'))
    talk.now = 1003.0
    sent = talk.feed(b"POST /a%20b?c=d HTTP/1.1\r\nHOST: h\r\nX-Odd:  caf\xe9 \r\nContent-Length: 3\r\n\r\nabc")
    assert talk.requests == [
        HttpRequest(
            "POST",
            "/a%20b?c=d",
            (("host", "h"), ("x-odd", "caf\xe9"), ("content-length", "3")),
            b"abc",
            peer_address="192.0.2.1",
        )
    ]
    assert sent == b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 7\r\n\r\n{"a":1}'
    assert not talk.connection.closed


def test_a_request_arrives_with_its_first_byte() -> None:
    talk = Talk()
    talk.now = 1005.0
    talk.feed(GET[:1])
    talk.now = 1009.0
    talk.feed(GET[1:])
    talk.now = 1020.0
    talk.feed(GET)
    assert [request.arrived for request in talk.requests] == [1005.0, 1020.0]
    assert {request.peer_certificate for request in talk.requests} == {None}


def test_one_request_at_a_time() -> None:
    connection = ServerConnection(0.0)
    connection.receive_data(GET + GET.replace(b"nonce", b"second"), 0.0)
    assert connection.next_request(1.0) is not None
    assert connection.next_request(1.0) is None
    with pytest.raises(LocalProtocolError):
        connection.receive_data(GET, 1.0)
    connection.send_response(HttpResponse(200), 2.0)
    assert connection.next_request(2.0) is None  # the first answer has not been sent
    assert connection.data_to_send()
    second = connection.next_request(3.0)
    assert isinstance(second, HttpRequest)
    assert (second.target, second.arrived) == ("/servers/second", 3.0)
    assert connection.sent_ahead
    connection.send_response(HttpResponse(200), 4.0)
    assert connection.data_to_send()
    assert connection.next_request(5.0) is None
    connection.receive_data(GET, 6.0)
    assert connection.next_request(6.0) is not None
    assert not connection.sent_ahead


def test_answers_to_pipelined_requests_are_in_order() -> None:
    targets = [f"/{n}" for n in range(20)]
    data = b"".join(b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % target.encode() for target in targets)
    sent = answers(Talk().feed(data))
    assert [json.decode(answer.body)[1] for answer in sent] == targets


@pytest.mark.parametrize(
    ("request_bytes", "headers"),
    [
        (GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), ()),
        (GET, (("connection", "close"),)),
        (b"GET / HTTP/1.0\r\n\r\n", ()),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", ()),
    ],
)
def test_the_last_answer_says_so(request_bytes: bytes, headers: tuple[tuple[str, str], ...]) -> None:
    talk = Talk(lambda _: HttpResponse(200, headers, b"x"))
    (answer,) = answers(talk.feed(request_bytes + GET))
    assert (answer.headers["connection"], answer.body) == ("close", b"x")
    assert talk.feed(GET) == b""
    assert not talk.connection.closed
    talk.feed(b"")
    assert talk.connection.closed
    assert len(talk.requests) == 1


def test_draining_makes_the_next_answer_the_last() -> None:
    talk = Talk()
    assert "connection" not in answers(talk.feed(GET))[0].headers
    talk.connection.drain(talk.now)
    assert answers(talk.feed(GET + GET))[0].headers["connection"] == "close"
    talk.feed(b"")
    assert talk.connection.closed
    assert len(talk.requests) == 2


def test_draining_does_not_wait_long_for_a_request() -> None:
    talk = Talk()
    talk.connection.drain(talk.now)
    assert talk.connection.deadline == talk.now + LAST_CALL_SECONDS
    talk.feed(GET[:9])  # one that is under way has its time
    assert talk.connection.deadline == talk.now + Limits().request_seconds
    assert answers(talk.feed(GET[9:]))[0].headers["connection"] == "close"
    late = Talk()
    late.connection.drain(late.now + 29.5)
    assert late.connection.deadline == late.now + 30
    idle = Talk()
    idle.connection.drain(idle.now)
    assert idle.expire() == b""
    assert idle.connection.closed


def test_a_connection_of_a_server_that_was_replaced_may_send_one_more_request() -> None:
    fresh = Talk()
    fresh.connection.hand_over(fresh.now, fresh.now + 5)
    assert fresh.connection.deadline == fresh.now + 5
    fresh.feed(GET[:9])
    assert fresh.connection.deadline == 1005  # no part of a request prolongs it
    fresh.now += 4
    assert answers(fresh.feed(GET[9:]))[0].headers["connection"] == "close"
    assert fresh.connection.deadline == fresh.now + Limits().linger_seconds
    answered = Talk()
    answered.feed(GET)
    answered.connection.hand_over(answered.now, answered.now + 5)
    assert answered.connection.deadline == answered.now + LAST_CALL_SECONDS
    silent = Talk()
    silent.connection.hand_over(silent.now, silent.now + 5)
    assert silent.expire() == b""
    assert silent.connection.closed


def test_head_has_no_body_and_keeps_the_framing() -> None:
    talk = Talk(lambda request: HttpResponse(405 if request.method == "HEAD" else 200, JSON, b"{}"))
    head = talk.feed(GET.replace(b"GET", b"HEAD"))
    assert head == b"HTTP/1.1 405 Method Not Allowed\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"
    assert answers(talk.feed(GET))[0].body == b"{}"


def test_connect_and_upgrade_are_requests_like_others() -> None:
    talk = Talk(lambda _: HttpResponse(405))
    sent = talk.feed(GET.replace(b"GET", b"CONNECT") + GET.replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\n\r\n"), GET)
    assert [answer.status for answer in answers(sent)] == [405, 405, 405]


def test_a_chunked_body() -> None:
    talk = Talk()
    body = b'5;x="y"\r\n{"vol\r\nA\r\numes":["a"\r\n2\r\n]}\r\n0\r\nTrailer: 1\r\n\r\n'
    talk.feed(POST + b"Transfer-Encoding: Chunked\r\n\r\n" + body + GET)
    assert [request.body for request in talk.requests] == [b'{"volumes":["a"]}', b""]
    assert "trailer" not in dict(talk.requests[0].headers)


def test_continue_is_said_to_who_asks_for_it() -> None:
    talk = Talk()
    head = POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    assert talk.feed(head) == b"HTTP/1.1 100 \r\n\r\n"
    assert [answer.status for answer in answers(talk.feed(b"{}"))] == [200]
    assert [answer.status for answer in answers(talk.feed(head + b"{}"))] == [100, 200]


@pytest.mark.parametrize(
    "response",
    [HttpResponse(200, (("x", "a\r\nSet-Cookie: b"),)), HttpResponse(99), HttpResponse(200, (("a b", "c"),))],
)
def test_an_answer_that_is_none_changes_nothing(response: HttpResponse) -> None:
    connection = ServerConnection(0.0)
    connection.receive_data(GET, 0.0)
    assert connection.next_request(0.0) is not None
    with pytest.raises(LocalProtocolError, match="not an answer of HTTP"):
        connection.send_response(response, 0.0)
    assert connection.data_to_send() == b""
    connection.send_response(HttpResponse(200), 0.0)
    assert connection.data_to_send()


# --- refusals ---


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"\0\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
        b"GET / HTTP/0.9\r\nHost: h\r\n\r\n",
        b"GET / http/1.1\r\nHost: h\r\n\r\n",
        b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET http://h/servers/nonce HTTP/1.1\r\nHost: h\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nNo colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nSpace : x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\0b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\rb\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        POST + b"Content-Length: +1\r\n\r\na",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 0x1\r\n\r\na",
        POST + b"Content-Length: \xb2\r\n\r\na",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
        POST + b"Content-Length: 1, 1\r\n\r\na",
        POST + b"content-length: 1\r\nA: b\r\nCONTENT-LENGTH:1 , 1\r\n\r\na",
        POST + b"Content-Length: 01\r\n\r\na",
        POST + b"Content-Length:\r\n 1\r\n\r\na",
        POST + b"Content-Length: 1\r\n\t\r\n\r\na",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
        b"GET / HTTP/1.1\nHost: h\n\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nT: 1\r\n 2\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nT: 1\r\n\t2\r\nU: 3\r\n\r\n",
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1;a\rb\r\nx\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n1;\r\r\nx\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n0;a\rb\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request(data: bytes) -> None:
    refusal(data, 400, "bad_request")


CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n\n\n\r\n0\r\nT: 1\r\nU: 2\r\n\r\n"


@pytest.mark.parametrize("at", [match.start() for match in re.finditer(b"\r\n", CHUNKED)])
def test_a_line_that_no_cr_ends(at: int) -> None:
    assert [request.body for request in outcome(bytewise(CHUNKED + GET))[0]] == [b"\n\n", b""]
    refusal(CHUNKED[:at] + CHUNKED[at + 1 :], 400, "bad_request")


def fastest(do: Callable[[], object]) -> float:
    """Seconds of the processor's, of the fastest of a few."""
    taken: list[float] = []
    for _ in range(5):
        began = time.process_time()
        _ = do()
        taken.append(time.process_time() - began)
    return min(taken)


@pytest.mark.parametrize("between", [b" ", b"\t", b" \t"])
@pytest.mark.parametrize("before", [b"", b"5,"])
def test_a_long_length_takes_no_longer_than_it_is(before: bytes, between: bytes) -> None:
    head = POST + b"Content-Length:" + before + (between * 16_000)[:16_000] + b"5\r\n\r\n"

    def h11_alone() -> None:
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(head)
        with suppress(h11.RemoteProtocolError):
            _ = reader.next_event()

    assert fastest(lambda: Talk().feed(head)) < 50 * fastest(h11_alone)


def head_of(size: int) -> bytes:
    filler = size - len(GET) - len(b"X: \r\n")
    return GET.replace(b"\r\n\r\n", b"\r\nX: " + b"a" * filler + b"\r\n\r\n")


def test_the_head_has_a_limit() -> None:
    largest = head_of(16 * 1024)
    for pieces in ([largest], [largest[:-99], *bytewise(largest[-99:])], [GET + largest + GET]):
        assert {answer.status for answer in answers(Talk().feed(*pieces))} == {200}
    refusal(head_of(16 * 1024 + 1), 431, "head_too_large")
    refusal(b"A" * 17_000, 431, "head_too_large")
    refusal(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 3000, 431, "head_too_large")
    refusal(POST + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 17_000, 431, "head_too_large")
    refusal(POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"x" * 17_000, 431, "head_too_large")


def test_a_body_that_is_announced_too_large_is_not_read() -> None:
    for size in (b"65537", b"99999999999999999999"):
        refusal(POST + b"Content-Length: " + size + b"\r\n\r\n", 413, "body_too_large")
        refusal(POST + b"Expect: 100-continue\r\nContent-Length: " + size + b"\r\n\r\n", 413, "body_too_large")
    refusal(POST + b"Content-Length: 65537\r\n\r\n" + b"x" * 65537, 413, "body_too_large")  # sent ahead


def test_a_chunked_body_has_the_same_limit() -> None:
    chunked = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    piece = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    talk = Talk()
    talk.feed(chunked + piece * 16 + b"0\r\n\r\n")
    assert [len(request.body) for request in talk.requests] == [65536]
    refusal(chunked + piece * 16 + b"1\r\nx\r\n", 413, "body_too_large")
    refusal(chunked + b"FFFFFFFF\r\n" + b"x" * 70_000, 413, "body_too_large")


def test_an_operation_that_needs_a_larger_body_may_have_it() -> None:
    attestation = POST.replace(b"vm/luks", b"n1/attestation")
    chunked = b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 64 + b"0\r\n\r\n"
    for rest in (b"Content-Length: 262144\r\n\r\n" + b"x" * 262144, chunked):
        talk = Talk()
        talk.feed(attestation + rest)
        assert [len(request.body) for request in talk.requests] == [262144]
    refusal(attestation + b"Content-Length: 262145\r\n\r\n", 413, "body_too_large")
    other = attestation.replace(b"/attestation", b"/attestation/status")
    refusal(other + b"Content-Length: 65537\r\n\r\n", 413, "body_too_large")


# --- the end of the peer's bytes ---


@pytest.mark.parametrize("data", [GET[:1], GET[:-1], POST + b"Content-Length: 9\r\n\r\n12345678"])
def test_a_request_that_ends_early(data: bytes) -> None:
    requests, sent, closed = outcome([data])
    (answer,) = answers(sent)
    assert (requests, answer.status, closed) == ([], 400, True)


def test_no_bytes_at_all() -> None:
    assert outcome([]) == ([], b"", True)


# --- deadlines ---


def test_a_silent_peer_is_left() -> None:
    talk = Talk()
    assert talk.connection.deadline == 1030.0
    assert talk.expire() == b""
    assert talk.connection.closed  # at once: a proxy that keeps it would send a request on it, and lose that
    assert talk.connection.deadline == math.inf


def test_each_request_has_its_time() -> None:
    talk = Talk()
    talk.now = 1010.0
    talk.feed(*bytewise(GET[:-2]))
    for _ in range(10):
        talk.now += 1
        talk.feed(b"A: b\r\n")
    assert talk.connection.deadline == 1040.0
    (answer,) = answers(talk.expire())
    assert (answer.status, json.decode(answer.body)["code"]) == (408, "request_timeout")
    assert answer.headers["connection"] == "close"
    assert talk.connection.deadline == talk.now + 2.0
    assert talk.requests == []


def test_the_time_begins_anew_after_an_answer() -> None:
    talk = Talk()
    talk.now = 1020.0
    talk.feed(GET)
    assert talk.connection.deadline == 1050.0
    talk.now = 1049.0
    talk.feed(POST)
    assert talk.connection.deadline == 1079.0


def test_no_deadline_while_the_application_works() -> None:
    connection = ServerConnection(0.0)
    connection.receive_data(GET, 0.0)
    assert connection.next_request(0.0) is not None
    assert connection.deadline == math.inf
    connection.expire(1e9)
    connection.send_response(HttpResponse(200), 10.0)
    assert connection.deadline == 40.0
    assert connection.data_to_send()


def test_a_peer_that_does_not_read_is_cut_off() -> None:
    connection = ServerConnection(0.0)
    connection.receive_data(GET, 0.0)
    assert connection.next_request(0.0) is not None
    connection.send_response(HttpResponse(200), 10.0)
    assert connection.data_to_send()
    connection.expire(40.0)
    assert connection.closed
    assert connection.data_to_send() == b""
    connection.expire(41.0)
    connection.receive_data(GET, 42.0)
    assert connection.next_request(42.0) is None


def test_a_peer_that_does_not_read_a_continue_gets_no_second_text() -> None:
    connection = ServerConnection(0.0)
    connection.receive_data(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", 0.0)
    assert connection.next_request(0.0) is None
    assert connection.data_to_send()
    connection.expire(30.0)
    assert connection.closed
    assert connection.data_to_send() == b""


def test_lingering_is_bounded() -> None:
    talk = Talk(limits=Limits(linger_bytes=5000))
    talk.feed(b"\r\n\r\n")
    assert talk.connection.deadline == talk.now + 2.0
    talk.now += 1.0
    talk.feed(LINGER)
    assert talk.connection.deadline == talk.now + 1.0
    talk.feed(*[LINGER] * 3)
    assert not talk.connection.closed
    talk.feed(LINGER)
    assert talk.connection.closed
    late = Talk()
    late.feed(b"\r\n\r\n")
    assert late.expire() == b""
    assert late.connection.closed


# --- any bytes, any cuts ---

PARTS = [
    GET,
    POST,
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"GET / HTTP/1.1\r\n",
    b"HEAD /x HTTP/1.0\r\n",
    b"Host: h\r\n",
    b"Connection: close\r\n",
    b"Connection: keep-alive, Upgrade\r\n",
    b"Expect: 100-continue\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 70000\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"\r\n5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"hello",
    b"x" * 300,
    b"\0",
    b"\xff",
]
SMALL = Limits(head_bytes=256, body_bytes=64)


@st.composite
def cut(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> tuple[bytes, list[bytes]]:
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return whole, [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def by_h11(pieces: Iterable[bytes], limits: Limits = DEFAULT_LIMITS) -> tuple[list[HttpRequest], bytes, bool]:
    """The outcome where h11 reads every request."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h1, "take_plain", lambda *_: None)
        return outcome(pieces, limits)


@given(cut(st.binary(max_size=400) | st.lists(st.sampled_from(PARTS), max_size=12).map(b"".join)))
@example((GET + GET[:-2], [GET + GET[:-2]]))
def test_cuts_change_nothing(data: tuple[bytes, list[bytes]]) -> None:
    whole, pieces = data
    expected = outcome([whole], SMALL)
    assert expected == outcome(pieces, SMALL) == outcome(bytewise(whole), SMALL) == by_h11([whole], SMALL)
    assert expected[2]
    assert set(re.findall(rb"HTTP/1.1 (\d+)", expected[1])) <= {b"100", b"200", b"400", b"413", b"431"}


TOKEN = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789!#$%&'*+-.^_`|~", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")).map(str.strip)
RESERVED = {"host", "connection", "content-length", "transfer-encoding", "expect", "upgrade"}


@st.composite
def requests(draw: st.DrawFn) -> tuple[HttpRequest, bytes]:
    """A request, and bytes that say it."""
    method = draw(st.sampled_from(["GET", "POST", "PATCH", "DELETE", "PUT"]))
    target = "/" + draw(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40))
    fields = draw(st.lists(st.tuples(TOKEN.filter(lambda name: name.lower() not in RESERVED), VALUE), max_size=5))
    body = draw(st.binary(max_size=200))
    headers = [("Host", "h"), *fields]
    if draw(st.booleans()):
        headers.append(("Content-Length", str(len(body))))
        content = body
    else:
        headers.append(("Transfer-Encoding", "chunked"))
        size = draw(st.integers(1, 50))
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        content = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    expected = tuple((name.lower(), value) for name, value in headers)
    return (
        HttpRequest(method, target, expected, body, peer_address="192.0.2.1"),
        "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content,
    )


@settings(max_examples=25)
@given(st.lists(requests(), min_size=1, max_size=3), st.data())
def test_every_request_arrives_as_it_was_said(said: list[tuple[HttpRequest, bytes]], data: st.DataObject) -> None:
    _, pieces = data.draw(cut(st.just(b"".join(text for _, text in said))))
    got, sent, closed = outcome(pieces)
    assert got == [request for request, _ in said]
    assert [answer.status for answer in answers(sent)] == [200] * len(said)
    assert closed


# --- the narrow reader before h11 ---

PLAIN = POST + b"X-A:b\r\nX-Empty: \tc d\t \r\nContent-Length: 5\r\n\r\nhello"
BYTES = [bytes([byte]) for byte in b" \t\r\n:,019/\0\x0b\x7f\x80\xb2"] + [b"", b"\r\n"]
LINES = [
    *(b"Host: i", b"Host:", b"Content-Length: 5", b"Content-Length: 05", b"Content-Length: 4", b"content-length:5, 5"),
    *(b"Transfer-Encoding: chunked", b"transfer-encoding:identity", b"Expect: 100-continue", b"Upgrade: h2c"),
    *(b"Connection: close", b"CONNECTION: keep-alive", b" folded", b"\tfolded", b"X: \xe9", b"X:", b"X : y", b": y"),
    *(b"TE: trailers", b"Content-Length : 5", b"Content-Length: +5", b"Content-Length: 5 5", b"Content-Length: 65537"),
]


@st.composite
def nearly_plain(draw: st.DrawFn) -> bytes:
    """A few requests, most of them plain but for a line or some bytes."""
    said: list[bytes] = []
    for plain in draw(st.lists(st.sampled_from([GET, PLAIN]), min_size=1, max_size=3)):
        lines = plain.split(b"\r\n")
        for line in draw(st.lists(st.sampled_from(LINES), max_size=1)):
            lines.insert(draw(st.integers(1, len(lines) - 2)), line)
        text = b"\r\n".join(lines)
        for put in draw(st.lists(st.sampled_from(BYTES), max_size=2)):
            at = draw(st.integers(0, len(text)))
            text = text[:at] + put + text[at + draw(st.integers(0, 2)) :]
        said.append(text)
    return b"".join(said)


@given(cut(nearly_plain()), st.sampled_from([DEFAULT_LIMITS, Limits(head_bytes=len(PLAIN) - 5, body_bytes=5)]))
def test_a_request_that_is_read_at_once_is_what_h11_reads(data: tuple[bytes, list[bytes]], limits: Limits) -> None:
    whole, pieces = data
    assert outcome([whole], limits) == outcome(pieces, limits) == by_h11([whole], limits)


def test_whole_and_plain_requests_alone_are_read_at_once() -> None:
    data = bytearray(PLAIN + GET + PLAIN[:-1])
    taken = [take_plain(data, 16384, 65536) for _ in range(3)]
    headers = (("host", "h"), ("x-a", "b"), ("x-empty", "c d"), ("content-length", "5"))
    assert taken[0] == ("POST", "/servers/vm/luks", headers, b"hello")
    assert taken[1:] == [("GET", "/servers/nonce", (("host", "h"),), b""), None]
    assert data == PLAIN[:-1]
    for line in LINES:
        unusual = bytearray(PLAIN.replace(b"X-A:b", line))
        assert take_plain(unusual, 16384, 65536) is None


def test_reading_at_once_takes_no_longer_than_the_head_is() -> None:
    for filler in (b"a:" + b"\t" * 16000, b"a:" + b"b " * 8000, b"a" * 16000, b"a:b\r\n" * 3000):
        head = bytearray(GET[:-2] + filler + b"\0\r\n\r\n")
        assert fastest(lambda head=head: take_plain(head, 1 << 20, 1 << 20)) < 0.01  # type: ignore[misc]


@given(st.lists(st.sampled_from([GET, GET[:9], b"\r\n\r\n", b"", "expire", "drain", "hand over", "send"]), max_size=12))
def test_no_order_of_calls_makes_it_raise(calls: list[bytes | str]) -> None:
    connection = ServerConnection(0.0)
    for now, call in enumerate(calls, 1):
        match call:
            case bytes():
                connection.receive_data(call, now)
            case "expire":
                connection.expire(now)
            case "drain":
                connection.drain(now)
            case "hand over":
                connection.hand_over(now, now + 2)
            case _:
                connection.data_to_send()
        if connection.next_request(now) is not None:
            connection.send_response(HttpResponse(200), now)
        assert connection.closed == (connection.deadline == math.inf)
        if connection.closed:
            assert connection.data_to_send() == b""


# --- the rest ---


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (("192.0.2.1", 1), "192.0.2.1"),
        (("2001:DB8::1", 1, 0, 0), "2001:db8::1"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::1"),
        (("::ffff:192.0.2.1", 1, 0, 0), "192.0.2.1"),
        (("h", 1), ""),
        ((), ""),
        ("", ""),
        (b"", ""),
        ("/run/x.sock", ""),
    ],
)
def test_peer_addresses(name: tuple[object, ...] | str | bytes, address: str) -> None:
    assert peer_address(name) == address
