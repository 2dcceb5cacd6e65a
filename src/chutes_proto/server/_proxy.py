"""Requests through a proxy that ends TLS: the client's certificate and address in its headers, and the proxy's proof.

Rules kept here:

* only a trusted proxy names its client: a peer on the unix socket, or in a configured network, that shows a live secret
  in its own secret header. The secret is compared in constant time; no error and no log repeats it. A unix socket that
  one proxy alone uses is proof enough;
* a proxy has one secret header, one certificate header and one address header, which it sets itself on every request;
  the certificate may be absent, the address not. A second value, another such header, or any of them from anyone else
  is a 400: a client that gets a 401 or 403 would give up for good over a proxy's mistake;
* the fleet has two generations of images, each with a proxy of its own. Once a proxy is configured for one of them
  alone, the operations in `OPERATIONS` are served only through a proxy for their generation: else they get 403, also
  for a wrong secret, and 503 if none is configured. All other operations are served on every way;
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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote_to_bytes

from attrs import Factory, field, frozen
from cryptography import x509

from chutes_proto.errors import BadRequest, Refusal, Refused, Unavailable
from chutes_proto.secret import Secret
from chutes_proto.wire import vms
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import Endpoint
from chutes_proto.wire.http import HttpRequest, plain_address

PEM_HEADER: Final = "x-client-cert"
RFC9440_HEADER: Final = "client-cert"
CERTIFICATE_HEADERS: Final = (PEM_HEADER, RFC9440_HEADER)
ADDRESS_HEADER: Final = "x-forwarded-for"
SECRET_HEADERS: Final = ("x-attestation-proxy-auth", "x-cvm-proxy-auth")
"""The secret headers of the fleet's two proxies: nobody else may send one, whether or not it is configured."""

Generation: TypeAlias = Literal["1.3", "1.4"]
"""Images before 1.4.0, and those from 1.4.0 on."""
GENERATIONS: Final[tuple[Generation, ...]] = ("1.3", "1.4")
OPERATIONS: Final[Mapping[Endpoint, frozenset[Generation]]] = {
    vms.BOOT_ATTESTATION: frozenset(GENERATIONS),
    vms.VOLUME_ATTESTATION: frozenset(GENERATIONS),
    vms.PROVISION: frozenset({"1.4"}),
    vms.PROVISION_CONFIRMATION: frozenset({"1.4"}),
}
"""The operations that the fleet's VMs send through a proxy, and whose proxies pass them on."""

Network = IPv4Network | IPv6Network

_OF_CERTIFICATES: Final = (Code.CLIENT_CERTIFICATE_REQUIRED, Code.CERTIFICATE_MISMATCH)
_ESCAPED: Final = re.compile(r"(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")


@frozen
class TrustedProxy:
    """A trusted proxy and its headers (lower case); several that are configured alike are one.

    With ``unix``, a peer without an address may be it. ``secrets`` are live, one or two.
    """

    name: str
    networks: tuple[Network, ...] = ()
    unix: bool = False
    secrets: tuple[Secret, ...] = ()
    header: str = SECRET_HEADERS[0]
    serves: frozenset[Generation] = frozenset(GENERATIONS)
    certificate_header: str = PEM_HEADER
    address_header: str = ADDRESS_HEADER

    @property
    def headers(self) -> tuple[str, str, str]:
        """The headers that it sets on every request."""
        return self.certificate_header, self.address_header, self.header

    def is_near(self, address: str) -> bool:
        """Whether it may be the peer with this address, which is empty over a unix socket."""
        return any(ip_address(address) in network for network in self.networks) if address else self.unix


def _guarded(proxies: TrustedProxies) -> frozenset[str]:
    of_proxies = (header for proxy in proxies.proxies for header in proxy.headers)
    return frozenset({*CERTIFICATE_HEADERS, ADDRESS_HEADER, *SECRET_HEADERS, *of_proxies})


@frozen
class ProxiedRequest(HttpRequest):
    """A request of a client that a trusted proxy named."""

    proxy: TrustedProxy = field(kw_only=True)


@frozen
class TrustedProxies:
    """The trusted proxies, by default none. Their secret headers differ."""

    proxies: tuple[TrustedProxy, ...] = ()
    _guarded: frozenset[str] = field(init=False, default=Factory(_guarded, takes_self=True))

    def client_request(self, request: HttpRequest, endpoint: Endpoint | None = None) -> HttpRequest:
        """The request for ``endpoint`` as its client made it.

        Raises `BadRequest`; for a wrong secret `check_way`'s refusal, where that would refuse a request without one.
        """
        given: dict[str, list[str]] = {}
        for name, value in request.headers:
            if name in self._guarded:
                given.setdefault(name, []).append(value)
        near = [proxy for proxy in self.proxies if proxy.is_near(request.peer_address)]
        if not given and (request.peer_address or not near):
            return request
        proxy = _identified(near, request.peer_address, given)
        if proxy is None:
            fault = f"a peer at the place of proxy {_names(near)} shows no secret that is live"
            raise _refused(fault) if (serving := self._serving(endpoint)) is None else _not_served(fault, serving)
        if others := given.keys() - {*proxy.headers}:
            raise _refused(f"proxy {proxy.name} passes on {', '.join(sorted(others))}, which is not its to say")
        if twice := {name for name, values in given.items() if len(values) > 1}:
            raise _refused(f"proxy {proxy.name} gives {', '.join(sorted(twice))} more than once")
        certificate = "".join(given.get(proxy.certificate_header, []))
        return ProxiedRequest(
            request.method,
            request.target,
            headers=tuple((name, value) for name, value in request.headers if name not in self._guarded),
            body=request.body,
            peer_certificate=_certificate(proxy.certificate_header, certificate) if certificate else None,
            peer_address=self._address(proxy.address_header, "".join(given.get(proxy.address_header, []))),
            arrived=request.arrived,
            proxy=proxy,
        )

    def check_way(self, request: HttpRequest, endpoint: Endpoint) -> None:
        """Check that ``endpoint`` is served on the way that ``request``, a result of `client_request`, came by.

        Raises `Refused`; `Unavailable` if it is served through proxies only, of which none is configured.
        """
        serving = self._serving(endpoint)
        proxy = request.proxy if isinstance(request, ProxiedRequest) else None
        if serving is not None and proxy not in serving:
            raise _not_served("it came past every proxy" if proxy is None else f"it came through {proxy.name}", serving)

    @contextmanager
    def excusing(self, request: HttpRequest) -> Generator[None]:
        """Raise `Unavailable` in place of a refusal for the certificate if the peer may be a silent proxy.

        ``request`` is the result of `client_request`. Code that records refusals stands outside of this context.
        """
        try:
            yield
        except Refusal as exc:
            is_direct = bool(request.peer_address) and not isinstance(request, ProxiedRequest)
            near = [proxy for proxy in self.proxies if is_direct and proxy.is_near(request.peer_address)]
            if not near or exc.code not in _OF_CERTIFICATES:
                raise
            needed = " or ".join(", ".join(proxy.headers) for proxy in near)
            raise Unavailable(
                Code.SERVER_FAULT,
                "A fault of the server's. Retry shortly.",
                reason=f"{exc.reason}; and a peer in the networks of proxy {_names(near)} sent none of a proxy's"
                f" headers: if it is a proxy, let it set {needed}; if it is a client, take its address out of networks",
                retry_after=30,
            ) from None

    def _serving(self, endpoint: Endpoint | None) -> list[TrustedProxy] | None:
        """The proxies through which alone ``endpoint`` is served; None if it is served on every way."""
        generations = None if endpoint is None else OPERATIONS.get(endpoint)
        if generations is None or all(proxy.serves == frozenset(GENERATIONS) for proxy in self.proxies):
            return None
        return [proxy for proxy in self.proxies if proxy.serves & generations]

    def _address(self, header: str, text: str) -> str:
        """The client's address in the header that the proxies wrote."""
        address = ""
        for element in reversed(text.split(",")):
            try:
                address = plain_address(element.strip(" \t"))
            except ValueError:
                raise _refused(f"{header} names no IP address where the client's should be") from None
            if not any(proxy.is_near(address) for proxy in self.proxies):
                break
        return address


def _identified(near: Sequence[TrustedProxy], peer: str, given: Mapping[str, list[str]]) -> TrustedProxy | None:
    """The one of the proxies at the peer's address that shows its secret; None if it shows none that is live.

    Raises `BadRequest` for a peer elsewhere, and for the secret headers of two proxies.
    """
    if not near:
        key = "networks" if peer else "unix"
        raise _refused(f"a header that only a trusted proxy may set, from another peer; see {key} in [[proxy]]")
    shown = sorted(given.keys() & {*SECRET_HEADERS, *(proxy.header for proxy in near)})
    if len(shown) > 1:
        raise _refused(f"it has {' and '.join(shown)}: a proxy sets its own and removes any other")
    if not shown and not peer and len(near) == 1 and not near[0].secrets:
        return near[0]
    for proxy in near:
        matches = [
            hmac.compare_digest(value.encode("latin-1"), secret.reveal())
            for value in given.get(proxy.header, [])
            for secret in proxy.secrets
        ]
        if any(matches):
            return proxy
    return None


def _names(proxies: Sequence[TrustedProxy]) -> str:
    return " or ".join(proxy.name for proxy in proxies)


def _not_served(fault: str, serving: Sequence[TrustedProxy]) -> Refusal:
    if not serving:
        reason = f"{fault}; no [[proxy]] serves this operation: add one, or remove serves from the others"
        text = "No proxy for this operation is configured."
        return Unavailable(Code.PROXY_UNAVAILABLE, text, reason=reason, retry_after=30)
    reason = f"{fault}; this operation is served through {_names(serving)} only (serves in [[proxy]])"
    return Refused(Code.PROXY_REQUIRED, "This operation is not served on this way.", reason=reason)


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
