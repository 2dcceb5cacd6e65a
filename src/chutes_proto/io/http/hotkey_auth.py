"""Signatures for requests of the caller's own httpx client."""

from __future__ import annotations

import time
from collections.abc import Generator

import httpx

from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.auth.signing import Signer, SigningPolicy, messages_to_sign, request_message, signature_headers
from chutes_proto.errors import LocalProtocolError
from chutes_proto.wire.endpoints import Match, route
from chutes_proto.wire.names import HEX_32


class HotkeyAuth(httpx.Auth):
    """Signs the requests of an `httpx.Client` or `httpx.AsyncClient` to a key server with a hotkey.

    ``hotkey`` is the SS58 address; ``signer`` signs with it. Each signature covers the parts that its operation
    requires, or with ``signatures="request"`` the whole request; for a path that is not an operation of the server it
    always covers the whole request. A header ``X-Chutes-Nonce`` that holds a server's nonce, as a runtime attestation
    has it, is kept. A signature does not survive a redirect: leave ``follow_redirects`` off.

    Raises `LocalProtocolError` for a text that is not a hotkey.
    """

    requires_request_body = True

    def __init__(self, hotkey: str, signer: Signer, *, signatures: SigningPolicy = "compatible") -> None:
        try:
            self._hotkey = Hotkey.parse(hotkey)
        except HotkeyError as exc:
            raise LocalProtocolError(f"hotkey: a signature needs a hotkey: {exc}") from None
        self._signer = signer
        self._signatures: SigningPolicy = signatures

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the three signature headers to the request."""
        target = request.url.raw_path.decode("ascii")
        given = request.headers.get("x-chutes-nonce", "")
        nonce = given if HEX_32.fullmatch(given) else str(int(time.time()))
        match route(request.method, target.partition("?")[0]):
            case Match(endpoint) if endpoint.signed is not None:
                parts = (request.method, target, request.content, endpoint.purpose)
                message, *_ = messages_to_sign(endpoint.signed, self._signatures, self._hotkey, nonce, *parts)
            case _:
                message = request_message(self._hotkey, nonce, request.method, target, request.content)
        request.headers.update(signature_headers(self._hotkey, nonce, message, self._signer))
        yield request
