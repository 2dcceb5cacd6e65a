"""An HTTP/1.1 client connection (RFC 9112) as bytes: a request in, bytes out; bytes in, the whole answer out.

Rules kept here:

* limits hold before more is kept: a head or body that is too large ends the connection, and so do bytes that are not
  HTTP;
* content codings are neither requested nor decoded, so that a small answer cannot become a large one;
* a redirect is an answer like any other;
* a connection is reused only if no bytes of the peer are left that could be taken for the next answer.
"""

from __future__ import annotations

from typing import Final

from chutes_proto.errors import LocalProtocolError, RemoteProtocolError
from chutes_proto.wire.http import HttpRequest, HttpResponse

try:
    import h11
except ImportError:
    raise LocalProtocolError("requests over HTTP need h11: pip install 'chutes-proto[tls]'") from None

MAX_HEAD: Final = 16 * 1024
"""Bytes of head that an answer may have."""
MAX_ANSWER: Final = 1 << 20
"""Bytes of body that an answer may have."""

_TEXT_SIZE: Final = 200


class ClientConnection:
    """The client's end of one connection: one request, then its answer. ``authority`` is ``host`` or ``host:port``."""

    def __init__(self, authority: str) -> None:
        self._authority = authority
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD - 1)
        self._head: h11.Response | None = None
        self._body = bytearray()

    @property
    def reusable(self) -> bool:
        """Whether another request may follow: the last answer is whole, and the peer has sent nothing ahead."""
        return self._h11.our_state is self._h11.their_state is h11.IDLE and not self._h11.trailing_data[0]

    def send_request(self, request: HttpRequest) -> bytes:
        """The bytes to send. Raises `LocalProtocolError` for a request that HTTP/1.1 cannot carry."""
        headers = [("host", self._authority), ("accept-encoding", "identity"), *request.headers]
        if request.body or request.method not in ("GET", "HEAD"):
            headers.append(("content-length", str(len(request.body))))
        self._head, self._body = None, bytearray()
        try:
            head = h11.Request(method=request.method, target=request.target, headers=headers)
            events = (head, h11.Data(data=request.body), h11.EndOfMessage())
            return b"".join(self._h11.send(event) or b"" for event in events)
        except (h11.LocalProtocolError, UnicodeEncodeError) as exc:
            raise LocalProtocolError(f"HTTP/1.1 cannot carry this request: {exc}") from exc

    def receive_data(self, data: bytes) -> HttpResponse | None:
        """Take bytes that the peer sent, ``b""`` when there will be no more; returns the answer once it is whole.

        Raises `RemoteProtocolError`, after which the connection cannot be used.
        """
        ended = not data
        try:
            while True:  # no more at a time than a head may have, however the bytes are cut
                space = MAX_HEAD - len(self._h11.trailing_data[0])
                self._h11.receive_data(data[:space])
                data = data[space:]
                response = self._next_response()
                if response is not None or not data:
                    break
            if data:
                self._h11.receive_data(data)  # sent ahead: it is never taken for an answer
        except h11.RemoteProtocolError as exc:
            if ended:
                raise RemoteProtocolError("the connection ended before the answer was whole") from exc
            raise RemoteProtocolError(f"not an answer of HTTP/1.1: {str(exc)[:_TEXT_SIZE]}") from exc
        return response

    def _next_response(self) -> HttpResponse | None:
        while True:
            match self._h11.next_event():
                case h11.InformationalResponse():
                    pass
                case h11.Response() as head:
                    self._head = head
                case h11.Data(data=data):
                    self._body += data
                    if len(self._body) > MAX_ANSWER:
                        raise RemoteProtocolError(f"the server's answer has more than {MAX_ANSWER} bytes")
                case h11.EndOfMessage() if self._head is not None:
                    if self._h11.our_state is self._h11.their_state is h11.DONE:
                        self._h11.start_next_cycle()
                    given = self._head.headers
                    headers = tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in given)
                    return HttpResponse(self._head.status_code, headers, bytes(self._body))
                case _:
                    return None
