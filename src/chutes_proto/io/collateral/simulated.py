"""The simulated collateral service on a port, for tests of tools; it has a thread for each connection."""

from __future__ import annotations

import os
import socket
import ssl
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

from chutes_proto.auth.client_identity import ENTROPY_SIZE
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.testing._service import CollateralService
from chutes_proto.wire.http import HttpRequest


class CollateralServer(ThreadingHTTPServer):
    """Serves `CollateralService` at an address (host, port; port 0: any free one).

    Its clock is ``age`` seconds late. Raises `OSError` if it cannot listen.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: CollateralService, *, age: int = 0) -> None:
        self.service = service
        self.age = age
        self._scheme = "http"
        if ":" in address[0]:
            self.address_family: int = socket.AF_INET6
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """The origin for clients."""
        host, port = self.server_address[:2]
        return f"{self._scheme}://[{host!s}]:{port}" if ":" in str(host) else f"{self._scheme}://{host!s}:{port}"

    def use_tls(self, directory: str | Path, now: int) -> Path:
        """Serve https, with a key made in ``directory``; return the path of the CA certificate to trust.

        Raises `FileUnavailable`.
        """
        identity = make_server_identity(now, os.urandom(ENTROPY_SIZE))
        authority = make_directory(directory) / "ca.pem"
        write_file(authority, identity.ca_pem)
        chain = authority.with_name("server.pem")
        write_file(chain, identity.chain_pem + identity.key_pem.reveal(), mode=0o600)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(chain)
        self.socket: socket.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._scheme = "https"
        return authority

    def handle_error(self, request: object, client_address: object) -> None:
        """Report nothing: clients may leave."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        server = cast("CollateralServer", self.server)
        response = server.service.answer(HttpRequest("GET", self.path), int(time.time()) - server.age)
        self.send_response(response.status)
        for name, value in (*response.headers, ("content-length", str(len(response.body)))):
            self.send_header(name, value)
        self.end_headers()
        _ = self.wfile.write(response.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of what it replaces
        """Write no log."""
