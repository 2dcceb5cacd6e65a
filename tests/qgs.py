"""Intel's quote generation service, played by the simulated platform: it speaks the framing, on any socket.

Source: Intel DCAP, ``QuoteGeneration/quote_wrapper/qgs_msg_lib/inc/qgs_msg_lib.h``.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.guest_device import REPORT_DATA_AT


def qgs_answer(quote: bytes, *, key_id: bytes = b"", error: int = 0, minor: int = 1) -> bytes:
    """The framed answer with a quote, as a service of Intel's gives it."""
    body = struct.pack("<II", len(key_id), len(quote)) + key_id + quote
    message = struct.pack("<HHIII", 1, minor, 1, 16 + len(body), error) + body
    return struct.pack(">I", len(message)) + message


def take_request(connection: socket.socket) -> bytes:
    """A framed request, in small pieces."""
    request = b""
    while len(request) < 4 or len(request) < 4 + int.from_bytes(request[:4], "big"):
        request += connection.recv(100)
    return request


def requested_report(request: bytes) -> bytes:
    """The TDREPORT in a framed request; what is not one fails the test."""
    frame, major, _, kind, size, error, report_size, ids = struct.unpack_from(">I", request) + struct.unpack_from(
        "<HHIIIII", request, 4
    )
    assert (major, kind, error, ids) == (1, 0, 0, 0)
    assert frame == size == len(request) - 4
    assert report_size == 1024 == len(request) - 28
    return request[28:]


def quoting(quote: Callable[[bytes], bytes], minor: int = 1) -> Callable[[socket.socket], None]:
    """A service that answers one request with the quote of its report's report data."""

    def serve(connection: socket.socket) -> None:
        report = requested_report(take_request(connection))
        connection.sendall(qgs_answer(quote(report[REPORT_DATA_AT : REPORT_DATA_AT + 64]), minor=minor))

    return serve


@contextmanager
def listening(listener: socket.socket, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """``serve`` gets each connection of ``listener``, one after the other, in a thread."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the quoter has gone away
                serve(connection)

    listener.listen()
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(60)
