"""Which connection ends when there is no room: never one at work, and the crowd of one address before all others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.transport.connections import Connections
from chutes_proto.transport.h1 import ServerConnection
from chutes_proto.wire.http import HttpResponse

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def connection(address: str, state: str = "silent") -> ServerConnection:
    made = ServerConnection(0.0, peer_address=address)
    if state == "halfway":
        made.receive_data(GET[:5], 0.0)
    if state in ("working", "idle", "deaf"):
        made.receive_data(GET, 0.0)
        assert made.next_request(0.0) is not None
    if state in ("idle", "deaf"):
        made.send_response(HttpResponse(200), 0.0)
        assert made.data_to_send()
    if state == "idle":
        assert made.next_request(0.0) is None
    return made


def opened(size: int, *those: ServerConnection) -> Connections:
    connections = Connections(size)
    for one in those:
        assert connections.make_room(one) == ()
    return connections


def test_there_is_room() -> None:
    _ = opened(3, connection("1.1.1.1"), connection("1.1.1.1"))


def test_the_oldest_of_the_most_crowded_address_ends() -> None:
    lonely, first, second = connection("1.1.1.1"), connection("2.2.2.2"), connection("2.2.2.2")
    connections = opened(4, lonely, first, second)
    newest = connection("3.3.3.3")
    assert connections.make_room(newest) == (first,)
    assert first.closed
    assert first.close_reason == "others needed its place"
    assert first.deadline < 0
    assert connections.make_room(newest) == ()  # there is room now
    assert connections.make_room(connection("3.3.3.3")) == (lonely,)  # no crowd any more: the oldest


def test_who_never_asked_ends_first() -> None:
    idle, halfway = connection("1.1.1.1", "idle"), connection("1.1.1.1", "halfway")
    connections = opened(3, idle, halfway)
    newest = connection("1.1.1.1")
    assert connections.make_room(newest) == (halfway,)
    last = connection("1.1.1.1", "idle")
    assert connections.make_room(last) == (newest,)
    assert connections.make_room(connection("1.1.1.1")) == (idle,)


def test_who_takes_no_answer_ends_last() -> None:
    deaf, idle = connection("1.1.1.1", "deaf"), connection("1.1.1.1", "idle")
    connections = opened(3, deaf, idle)
    newest = connection("2.2.2.2", "working")
    assert connections.make_room(newest) == (idle,)
    assert connections.make_room(connection("2.2.2.2", "working")) == (deaf,)


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


STATES = st.sampled_from(["silent", "halfway", "idle", "deaf", "working"])
ADDRESSES = st.sampled_from(["", "1.1.1.1", "2.2.2.2", "2001:db8::1", "2001:db8::2"])


@given(st.integers(1, 6), st.lists(st.tuples(ADDRESSES, STATES), max_size=30))
def test_nobody_at_work_ends_and_there_is_room_where_there_can_be(size: int, those: list[tuple[str, str]]) -> None:
    connections, alive = Connections(size), list[ServerConnection]()
    for address, state in those:
        newest = connection(address, state)
        ended = connections.make_room(newest)
        alive = [one for one in [*alive, newest] if one not in ended]
        assert not newest.closed
        assert all(one.closed for one in ended)
        assert not any(one.closed for one in alive)
        could = [one for one in alive if one.waits_for_peer and one.peer_address and one is not newest]
        assert len(alive) < size or ended or not could
