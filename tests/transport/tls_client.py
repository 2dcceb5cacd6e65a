"""The standard library's TLS client over memory buffers, and a server session for it to talk to."""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from functools import cache

from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.transport.tls import ServerContext, TlsSession, server_context

NOW = int(time.time())
_IDENTITY = make_server_identity(NOW, bytes(32))


@cache
def context() -> ServerContext:
    return server_context(_IDENTITY.chain_pem, _IDENTITY.key_pem)


def session() -> TlsSession:
    return TlsSession(context())


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    """Verifies the server as any client does; with a ``version``, only that one."""
    settings = ssl.create_default_context(cadata=_IDENTITY.ca_pem.decode())
    if version is not None:
        settings.minimum_version = settings.maximum_version = version
    return settings


class TlsClient:
    """A client; what it is to send waits for the end of the handshake."""

    def __init__(self, settings: ssl.SSLContext, *, resume: ssl.SSLSession | None = None) -> None:
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = settings.wrap_bio(self._in, self._out, server_hostname="localhost", session=resume)
        self._waiting = b""
        self._shaken = False
        self.received = b""
        self.ended = False
        self._advance()

    def send(self, data: bytes) -> None:
        self._waiting += data
        self._advance()

    def receive_data(self, data: bytes) -> None:
        self._in.write(data)
        self._advance()

    def data_to_send(self) -> bytes:
        return self._out.read()

    def close(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self.tls.unwrap()

    def _advance(self) -> None:
        with suppress(ssl.SSLWantReadError):
            if not self._shaken:
                self.tls.do_handshake()
                self._shaken = True
            if self._waiting:
                self.tls.write(self._waiting)
                self._waiting = b""
            try:
                while piece := self.tls.read(65536):
                    self.received += piece
            except ssl.SSLZeroReturnError:  # as it is told after a close of one's own
                pass
            self.ended = True
