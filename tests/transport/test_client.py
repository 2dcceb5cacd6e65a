"""A client's end of a connection: why there is no answer is said."""

from __future__ import annotations

import pytest

from chutes_proto.errors import RemoteProtocolError
from chutes_proto.transport.client import ClientConnection
from chutes_proto.wire.http import HttpRequest

BEGUN = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhel"


@pytest.mark.parametrize("sent", [b"", BEGUN[:9], BEGUN], ids=["nothing", "head", "body"])
def test_an_answer_that_is_cut_off_is_not_one_of_another_protocol(sent: bytes) -> None:
    connection = ClientConnection("keys.example")
    _ = connection.send_request(HttpRequest("GET", "/"))
    assert not sent or connection.receive_data(sent) is None
    with pytest.raises(RemoteProtocolError, match="ended before the answer was whole"):
        _ = connection.receive_data(b"")
