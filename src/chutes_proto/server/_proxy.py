"""Requests through a proxy that ends TLS: the client's certificate and address in its headers, and the proxy's proof.

Rules kept here:

* only a trusted proxy names its client: a peer on the unix socket, or in a configured network with a live secret in
  ``X-Attestation-Proxy-Auth``. The secret is compared in constant time; no error and no log repeats it;
* a proxy has one certificate header and one address header, which it sets itself on every request; the certificate may
  be absent, the address not. A second value, another such header, or any of them from anyone else is a 400: a client
  that gets a 401 or 403 would give up for good over a proxy's mistake;
* a peer of the networks that sends none of these headers is a client, or a proxy that is not configured to send them.
  If it would be refused for its certificate, it gets a 503 instead: nothing is recorded of it, and the log says what to
  configure;
* of a list of addresses the last one counts that is not a proxy's; if all are proxies', the first;
* flows see the client's certificate and address, never the proxy's, and none of these headers.

``X-Client-Cert`` is PEM, percent-encoded (nginx: ``$ssl_client_escaped_cert``); ``Client-Cert`` is RFC 9440, section
2.2: DER as a byte sequence of RFC 8941, ``:base64:``.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final
from urllib.parse import unquote_to_bytes

from attrs import Factory, field, frozen
from cryptography import x509

from chutes_proto.errors import BadRequest, Refusal, Unavailable
from chutes_proto.secret import Secret
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import HttpRequest, plain_address

PEM_HEADER: Final = "x-client-cert"
RFC9440_HEADER: Final = "client-cert"
CERTIFICATE_HEADERS: Final = (PEM_HEADER, RFC9440_HEADER)
ADDRESS_HEADER: Final = "x-forwarded-for"
SECRET_HEADER: Final = "x-attestation-proxy-auth"

Network = IPv4Network | IPv6Network

_OF_CERTIFICATES: Final = (Code.CLIENT_CERTIFICATE_REQUIRED, Code.CERTIFICATE_MISMATCH)
_ESCAPED: Final = re.compile(r"(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")


def _guarded(proxies: TrustedProxies) -> frozenset[str]:
    return frozenset({*CERTIFICATE_HEADERS, ADDRESS_HEADER, SECRET_HEADER, proxies.address_header})


@frozen
class ProxiedRequest(HttpRequest):
    """A request of a client that a trusted proxy named."""


@frozen
class TrustedProxies:
    """The trusted proxies and their headers (lower case); by default none.

    With ``unix``, peers without an address come over the unix socket. ``secrets`` are live for peers in the
    ``networks``.
    """

    networks: tuple[Network, ...] = ()
    unix: bool = False
    secrets: tuple[Secret, ...] = ()
    certificate_header: str = PEM_HEADER
    address_header: str = ADDRESS_HEADER
    _guarded: frozenset[str] = field(init=False, default=Factory(_guarded, takes_self=True))

    def client_request(self, request: HttpRequest) -> HttpRequest:
        """The request as its client made it. Raises `BadRequest`."""
        given: dict[str, list[str]] = {}
        for name, value in request.headers:
            if name in self._guarded:
                given.setdefault(name, []).append(value)
        if not given and not self._over_unix(request):
            return request
        self._admit(request, given.get(SECRET_HEADER, []))
        if others := given.keys() - {SECRET_HEADER, self.certificate_header, self.address_header}:
            raise _refused(f"the proxy passes on {', '.join(sorted(others))}, which is not its to say")
        if twice := {name for name, values in given.items() if len(values) > 1}:
            raise _refused(f"the proxy gives {', '.join(sorted(twice))} more than once")
        certificate = "".join(given.get(self.certificate_header, []))
        return ProxiedRequest(
            request.method,
            request.target,
            headers=tuple((name, value) for name, value in request.headers if name not in self._guarded),
            body=request.body,
            peer_certificate=_certificate(self.certificate_header, certificate) if certificate else None,
            peer_address=self._address("".join(given.get(self.address_header, []))),
            arrived=request.arrived,
        )

    @contextmanager
    def excusing(self, request: HttpRequest) -> Generator[None]:
        """Raise `Unavailable` in place of a refusal for the certificate if the peer may be a silent proxy.

        ``request`` is the result of `client_request`. Code that records refusals stands outside of this context.
        """
        try:
            yield
        except Refusal as exc:
            may_be_proxy = self._ours(request.peer_address) and not isinstance(request, ProxiedRequest)
            if not may_be_proxy or exc.code not in _OF_CERTIFICATES:
                raise
            needed = f"{self.certificate_header}, {self.address_header}, {SECRET_HEADER}"
            raise Unavailable(
                Code.SERVER_FAULT,
                "A fault of the server's. Retry shortly.",
                reason=f"{exc.reason}; and a peer in proxy.networks sent none of a proxy's headers: if it is a proxy,"
                f" let it set {needed}; if it is a client, take its address out of proxy.networks",
                retry_after=30,
            ) from None

    def _over_unix(self, request: HttpRequest) -> bool:
        return self.unix and not request.peer_address

    def _admit(self, request: HttpRequest, shown: list[str]) -> None:
        """Raises `BadRequest` unless the peer is one of the proxies."""
        if not self._over_unix(request) and not self._ours(request.peer_address):
            of_peer = "proxy.networks" if request.peer_address else "proxy.unix"
            raise _refused(f"a header that only a trusted proxy may set, from another peer; see {of_peer}")
        matches = [
            hmac.compare_digest(value.encode("latin-1"), secret.reveal()) for value in shown for secret in self.secrets
        ]
        if any(matches) or (self._over_unix(request) and not shown):
            return
        raise _refused(f"the proxy shows {'a wrong' if shown else 'no'} secret in {SECRET_HEADER}")

    def _ours(self, address: str) -> bool:
        return bool(address) and any(ip_address(address) in network for network in self.networks)

    def _address(self, text: str) -> str:
        """The client's address in the header that the proxies wrote."""
        address = ""
        for element in reversed(text.split(",")):
            try:
                address = plain_address(element.strip(" \t"))
            except ValueError:
                raise _refused(f"{self.address_header} names no IP address where the client's should be") from None
            if not self._ours(address):
                break
        return address


@lru_cache(maxsize=256)  # each request of a boot has the same one
def _certificate(header: str, text: str) -> x509.Certificate:
    try:
        if header == PEM_HEADER:
            if not _ESCAPED.fullmatch(text):
                raise ValueError
            (certificate,) = x509.load_pem_x509_certificates(unquote_to_bytes(text))
            return certificate
        if not (text.startswith(":") and text.endswith(":")):
            raise ValueError
        return x509.load_der_x509_certificate(base64.b64decode(text[1:-1], validate=True))
    except (ValueError, binascii.Error, x509.InvalidVersion):
        raise _refused(f"{header} does not hold a certificate in its form") from None


def _refused(reason: str) -> BadRequest:
    return BadRequest(Code.BAD_REQUEST, "Bad Request", reason=reason)
