"""The simulated collateral service on a real port of loopback, and ways in which it misbehaves."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import Any, ClassVar

from attrs import define, evolve, field

from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.testing._service import CollateralService
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.slow_peer import drip

PLATFORM = SimulatedPlatform(b"a world for collateral" * 2)
ROOT = PLATFORM.root

Fault = Callable[["Handler", HttpResponse], "HttpResponse | None"]
"""Makes another answer of the honest one, or says it itself, on the socket, and returns None."""


@define(eq=False)
class Upstream:
    """A service that runs: ``asked`` has every target, in order; ``age`` is how old what it gives is, in seconds."""

    service: CollateralService = field(factory=lambda: CollateralService((PLATFORM, PLATFORM.another(1))))
    fault: Fault | None = None
    only: str = ""
    age: int = 0
    asked: list[str] = field(factory=list)
    traces: list[str | None] = field(factory=list)
    url: str = ""
    port: int = 0

    def rounds(self) -> int:
        """How many times collateral was fetched, or begun to be."""
        return sum("/tcb?" in target for target in self.asked)


class Handler(BaseHTTPRequestHandler):
    """One connection to the service."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[Upstream]

    def do_GET(self) -> None:
        upstream = self.upstream
        upstream.asked.append(self.path)
        upstream.traces.append(self.headers["traceparent"])
        honest = upstream.service.answer(HttpRequest("GET", self.path), int(time.time()) - upstream.age)
        fault = upstream.fault if upstream.only in self.path else None
        response = honest if fault is None else fault(self, honest)
        if response is not None:
            self.say(response)

    def say(self, response: HttpResponse) -> None:
        self.send_response(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self.send_header("content-length", str(len(response.body)))
        self.end_headers()
        _ = self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name of the one that it replaces)
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away, or a fault


@contextmanager
def running(upstream: Upstream, context: ssl.SSLContext | None = None) -> Iterator[Upstream]:
    """Serve, at the port that it had before if it had one."""
    handler = type("OneHandler", (Handler,), {"upstream": upstream})
    server = _Server(("127.0.0.1", upstream.port), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    upstream.port = server.server_address[1]
    upstream.url = f"http://127.0.0.1:{upstream.port}" if context is None else f"https://localhost:{upstream.port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield upstream
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- faults ---


def status(code: int, *headers: tuple[str, str]) -> Fault:
    return lambda _, __: HttpResponse(code, headers, b"<html>no</html>")


def slow(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """Too late."""
    time.sleep(0.6)
    return honest


def dripping(handler: Handler, honest: HttpResponse) -> None:
    """Each byte in time, the whole never."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    with suppress(OSError):
        drip(handler.wfile.write, repeat(b"x", 40), 0.05)  # which is not buffered


def truncated(handler: Handler, honest: HttpResponse) -> None:
    """Half of the body, and the plug is pulled."""
    handler.send_response(200)
    for name, value in honest.headers:
        handler.send_header(name, value)
    handler.send_header("content-length", str(len(honest.body)))
    handler.end_headers()
    _ = handler.wfile.write(honest.body[: len(honest.body) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def oversized(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """More than any answer has."""
    return evolve(honest, body=honest.body + b" " * 2_000_000)


def redirecting(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """To the same place, where the answer would be the right one."""
    return HttpResponse(307, (("location", handler.path + "&again"),))


def garbage(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """Another content under the right headers."""
    return evolve(honest, body=b"<html>Welcome to the airport</html>")


def altered(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """One digit of what was signed, or a bit of what ends the CRL."""
    if b'"fmspc"' in honest.body:
        return evolve(honest, body=honest.body.replace(b"UpToDate", b"uptodate", 1))
    return evolve(honest, body=honest.body[:-1] + bytes([honest.body[-1] ^ 1]))


def no_chain(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """Without the header that has the issuer chain."""
    return evolve(honest, headers=tuple(h for h in honest.headers if not h[0].endswith("issuer-chain")))


def of_another(handler: Handler, honest: HttpResponse) -> HttpResponse:
    """Collateral of another FMSPC."""
    service = handler.upstream.service
    return service.answer(
        HttpRequest("GET", f"/tdx/certification/v4/tcb?fmspc={PLATFORM.another(1).fmspc.hex()}"), int(time.time())
    )
