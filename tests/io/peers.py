"""Servers that misbehave on purpose, over real sockets and real TLS, and the certificates they need."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import frozen

from chutes_proto.auth.server_identity import make_server_identity

Behaviour = Callable[[ssl.SSLSocket], None]
"""The behaviour of a server on one connection, before it has read the request."""


@frozen
class Credentials:
    """A CA and a server certificate that it signed for ``localhost``."""

    ca_pem: bytes
    chain: Path


def make_credentials(folder: Path) -> Credentials:
    identity = make_server_identity(int(time.time()), os.urandom(32), ["localhost"])
    chain = folder / "server.pem"
    _ = chain.write_bytes(identity.chain_pem + identity.key_pem.reveal())
    return Credentials(identity.ca_pem, chain)


@contextmanager
def peer(
    credentials: Credentials, behaviour: Behaviour, *, client_ca: bytes | None = None
) -> Generator[tuple[str, list[BaseException | None]]]:
    """Serve on a loopback port; yield the origin and the outcome of each connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(credentials.chain)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=client_ca.decode())
    ended: list[BaseException | None] = []
    workers: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve_one(raw: socket.socket) -> None:
        raw.settimeout(20)
        try:
            with raw, context.wrap_socket(raw, server_side=True) as stream:
                behaviour(stream)
            ended.append(None)
        except (OSError, ValueError) as exc:
            ended.append(exc)

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            worker = threading.Thread(target=serve_one, args=(raw,))
            worker.start()
            workers.append(worker)

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"https://localhost:{listener.getsockname()[1]}", ended
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for worker in workers:
            worker.join()


@contextmanager
def flooding() -> Generator[tuple[int, list[bool]]]:
    """Send hello requests to the one client for 20 s; yield the port, and whether the client ended it.

    OpenSSL passes over them (RFC 5246, 7.4.1.1) for as long as there are any, before it knows the peer.
    """
    hello_requests = (b"\x16\x03\x03\x00\x04" + bytes(4)) * 30_000
    ended: list[bool] = []

    def flood(listener: socket.socket) -> None:
        until = time.monotonic() + 20
        with listener.accept()[0] as connection, suppress(OSError):
            while time.monotonic() < until:
                connection.sendall(hello_requests)
        ended.append(time.monotonic() < until)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        worker = threading.Thread(target=flood, args=(listener,))
        worker.start()
        try:
            yield listener.getsockname()[1], ended
        finally:
            worker.join()


def read_request(stream: ssl.SSLSocket) -> bytes:
    """Read one whole request, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := stream.recv(65536)):
            raise ValueError("no whole request")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    sizes = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < sum(sizes):
        body += stream.recv(65536)
    return head + b"\r\n\r\n" + body


def answering(response: bytes) -> Behaviour:
    """Return a behaviour that reads a request, sends ``response`` and closes."""

    def behave(stream: ssl.SSLSocket) -> None:
        _ = read_request(stream)
        stream.sendall(response)

    return behave
