"""The connection that ends for another one: never one at work, and first the one that makes the server wait longest."""

from __future__ import annotations

import math
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.transport.connections import UNSENT, Answer, Connections, Receive, Send
from chutes_proto.transport.h1 import FIRST_CALL_SECONDS, LAST_CALL_SECONDS, ServerConnection
from chutes_proto.wire.http import HttpResponse

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
STATES = ["silent", "halfway", "idle", "deaf", "working"]


def connection(address: str, state: str = "silent", now: float = 0.0) -> ServerConnection:
    made = ServerConnection(now, peer_address=address)
    if state == "halfway":
        made.receive_data(GET[:5], now)
    if state in ("working", "idle", "deaf"):
        made.receive_data(GET, now)
        assert made.next_request(now) is not None
    if state in ("idle", "deaf"):
        made.send_response(HttpResponse(200), now)
        assert made.data_to_send()
    if state == "idle":
        assert made.next_request(now) is None
    return made


def opened(size: int, *those: ServerConnection) -> Connections:
    connections = Connections(size, list[ServerConnection]().append, list[HttpResponse]().append)
    for one in those:
        assert connections.make_room(one) == ()
    return connections


def test_the_crowd_of_one_address_ends_before_others() -> None:
    lonely, first, second = connection("1.1.1.1"), connection("2.2.2.2"), connection("2.2.2.2")
    connections = opened(4, lonely, first, second)
    newest = connection("3.3.3.3")
    assert connections.make_room(newest) == (first,)
    assert first.closed
    assert first.deadline < 0
    assert connections.make_room(newest) == ()  # there is room now
    assert connections.make_room(connection("3.3.3.3")) == (lonely,)  # no crowd any more: the oldest


def test_many_from_one_address_are_no_crowd_before_they_have_their_share() -> None:
    """A network of VMs behind one address, and an attacker with many: the attacker's own go before them."""
    strangers = [connection(f"1.1.1.{index}", now=index) for index in range(13)]
    vms = [connection("2.2.2.2", now=20.0 + index) for index in range(2)]
    connections = opened(16, *strangers, *vms)
    for index in range(10):
        assert connections.make_room(connection(f"3.3.3.{index}", now=30.0)) == (strangers[index],)


@pytest.mark.parametrize("state", ["halfway", "idle", "deaf", "silent"])
def test_who_makes_the_server_wait_longest_ends_first(state: str) -> None:
    """Having asked once, or being owed an answer, does not keep a connection open: a VM that boots now comes first."""
    waiting = connection("1.1.1.1", state)
    booting = connection("2.2.2.2", now=1.0)
    connections = opened(3, booting, waiting)
    assert connections.make_room(connection("3.3.3.3", now=2.0)) == (waiting,)


def test_who_goes_on_is_younger_than_who_does_not() -> None:
    first, second = connection("1.1.1.1"), connection("2.2.2.2", now=1.0)
    connections = opened(3, first, second)
    first.receive_data(GET, 2.0)
    assert first.next_request(2.0) is not None
    first.send_response(HttpResponse(200), 3.0)
    assert connections.make_room(connection("3.3.3.3", now=4.0)) == (second,)


def test_dripping_is_no_going_on() -> None:
    first, second = connection("1.1.1.1", "halfway"), connection("2.2.2.2", now=1.0)
    connections = opened(3, first, second)
    first.receive_data(GET[5:6], 2.0)
    assert first.next_request(2.0) is None
    assert connections.make_room(connection("3.3.3.3", now=3.0)) == (first,)


def test_who_is_at_work_or_trusted_does_not_end() -> None:
    connections = opened(3, connection("1.1.1.1", "working"), connection(""))
    newest = connection("1.1.1.1")
    assert connections.make_room(newest) == ()
    assert not newest.closed


def test_one_host_has_many_addresses_of_ipv6() -> None:
    crowd = [connection(f"2001:db8::{index}") for index in range(1, 3)]
    connections = opened(4, connection("2001:db8:1::1"), *crowd)
    assert connections.make_room(connection("1.1.1.1")) == (crowd[0],)


def test_who_is_gone_takes_no_place() -> None:
    first, second = connection("1.1.1.1"), connection("1.1.1.1")
    connections = opened(3, first, second)
    connections.remove(first)
    connections.remove(first)
    assert connections.make_room(connection("1.1.1.1")) == ()


def test_the_oldest_long_answer_ends_for_another_one_once_all_have_too_much_to_take() -> None:
    woken: list[ServerConnection] = []
    answers: dict[ServerConnection, ref[HttpResponse]] = {}
    connections = Connections(100, woken.append, lambda _: None)

    def answered(address: str, size: int) -> ServerConnection:
        made = connection(address, "working")
        answer = HttpResponse(200, body=bytes(size))
        answers[made] = ref(answer)
        made.send_response(answer, 0.0)
        assert isinstance(connections.next_step(made, 0.0), Send)
        return made

    a_third = UNSENT // 3
    boot, proxy = answered("1.1.1.1", 10_000), answered("", a_third)
    reader, slow, slower = (answered("1.1.1.1", a_third) for _ in range(3))
    assert woken == [reader]  # with what HTTP adds, three have more than there is
    assert isinstance(connections.next_step(slow, 1.0), Receive)  # it has taken all
    last = answered("1.1.1.1", a_third)
    assert woken == [reader]
    _ = answered("1.1.1.1", 3 * a_third)
    assert woken == [reader, slower, last]
    assert [one.closed for one in (boot, proxy, slow, *woken)] == [False] * 3 + [True] * 3
    assert {one for one, answer in answers.items() if answer() is None} == {slow, *woken}


def test_who_was_at_work_ends_in_its_turn() -> None:
    worked, silent = connection("1.1.1.1", "working"), connection("2.2.2.2", now=1.0)
    connections = opened(3, worked, silent)
    assert connections.make_room(connection("3.3.3.3", now=2.0)) == (silent,)
    worked.send_response(HttpResponse(200), 3.0)
    late = connection("4.4.4.4", now=4.0)
    (ended,) = connections.make_room(late)
    assert ended.since == 2.0
    assert connections.make_room(connection("5.5.5.5", now=5.0)) == (worked,)


ADDRESSES = st.sampled_from(["", "1.1.1.1", "2.2.2.2", "2001:db8::1", "2001:db8::2"])


@given(st.integers(1, 6), st.lists(st.tuples(ADDRESSES, st.sampled_from(STATES)), max_size=30))
def test_nobody_at_work_ends_and_there_is_room_where_there_can_be(size: int, those: list[tuple[str, str]]) -> None:
    connections, alive = opened(size), list[ServerConnection]()
    for address, state in those:
        newest = connection(address, state)
        ended = connections.make_room(newest)
        alive = [one for one in [*alive, newest] if one not in ended]
        assert not newest.closed
        assert all(one.closed for one in ended)
        assert not any(one.closed for one in alive)
        could = [one for one in alive if one.waits_for_peer and one.peer_address and one is not newest]
        assert len(alive) < size or ended or not could


# --- what is next ---


def test_a_request_is_answered_then_sent_before_anything_is_received() -> None:
    sent: list[HttpResponse] = []
    connections = Connections(2, list[ServerConnection]().append, sent.append)
    one = connection("1.1.1.1")
    assert connections.next_step(one, 0.0) == Receive()
    one.receive_data(GET + GET, 0.0)
    answers = [HttpResponse(200), HttpResponse(201)]
    for answered, answer in enumerate(answers):
        step = connections.next_step(one, 1.0)
        assert isinstance(step, Answer)
        assert step.sent_ahead is bool(answered)
        assert sent == answers[:answered]
        one.send_response(answer, 1.0)
        step = connections.next_step(one, 1.0)
        assert isinstance(step, Send)
        assert step.data.startswith(b"HTTP/1.1 20%d" % answered)
        assert sent == answers[:answered]
    assert connections.next_step(one, 1.0) == Receive()
    assert sent == answers
    one.receive_data(b"", 2.0)
    assert connections.next_step(one, 2.0) is None


def test_an_answer_that_the_peer_does_not_take_is_not_sent() -> None:
    sent: list[HttpResponse] = []
    connections = Connections(2, list[ServerConnection]().append, sent.append)
    one = connection("1.1.1.1", "deaf")
    one.expire(one.deadline)
    assert connections.next_step(one, one.deadline) is None
    assert sent == []


def test_at_the_end_only_requests_and_their_answers_go_on() -> None:
    woken: list[ServerConnection] = []
    connections = Connections(10, woken.append, list[HttpResponse]().append)
    made = {state: connection("1.1.1.1", state) for state in STATES}
    waiting = [made[state] for state in STATES if state != "working"]
    for one in made.values():
        assert connections.make_room(one) == ()
    connections.finish(1.0)
    assert woken == list(made.values())
    assert [one.deadline for one in waiting] == [-math.inf, 1.0 + LAST_CALL_SECONDS, -math.inf, 1.0 + LAST_CALL_SECONDS]
    assert made["working"].deadline == math.inf
    made["working"].send_response(HttpResponse(200), 50.0)
    assert isinstance(connections.next_step(made["working"], 50.0), Send)
    assert made["working"].deadline == 50.0 + LAST_CALL_SECONDS
    assert connections.next_step(made["working"], 50.0) == Receive()
    made["halfway"].receive_data(GET[5:], 1.5)
    assert isinstance(connections.next_step(made["halfway"], 1.5), Answer)
    newcomer = connection("2.2.2.2", now=2.0)
    assert connections.next_step(newcomer, 2.0) is None


def test_who_was_accepted_before_another_process_serves_is_served_here() -> None:
    woken: list[ServerConnection] = []
    connections = Connections(10, woken.append, list[HttpResponse]().append)
    made = {state: connection("1.1.1.1", state) for state in STATES}
    for one in made.values():
        assert connections.make_room(one) == ()
    connections.hand_over(1.0)
    assert woken == list(made.values())
    assert not any(one.closed for one in made.values())
    assert made["working"].deadline == math.inf
    made["halfway"].receive_data(GET[5:], 5.5)
    assert isinstance(connections.next_step(made["halfway"], 5.5), Answer)
    newcomer = connection("2.2.2.2", now=2.0)  # accepted, and its task runs only now
    assert connections.next_step(newcomer, 2.0) == Receive()
    assert newcomer.deadline == 1.0 + FIRST_CALL_SECONDS


def test_others_are_woken_when_they_end_or_are_to_end_soon() -> None:
    woken: list[ServerConnection] = []
    connections = Connections(2, woken.append, list[HttpResponse]().append)
    first, second = connection("1.1.1.1"), connection("2.2.2.2", now=1.0)
    for one in (first, second):
        assert connections.next_step(one, 1.0) == Receive()
    assert woken == [first]
    assert connections.next_step(first, 1.0) is None
    before = second.deadline
    connections.drain(2.0)
    assert woken == [first, second]
    assert second.deadline < before
