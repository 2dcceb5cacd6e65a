"""HTTP requests and answers as values, between transports and flows."""

from __future__ import annotations

from contextvars import ContextVar
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from chutes_proto._lazy import LazyModule

if TYPE_CHECKING:
    from cryptography import x509

    from chutes_proto.errors import BadRequest
else:
    x509 = LazyModule("cryptography.x509")  # the wire needs only the name of the type

Headers = tuple[tuple[str, str], ...]
"""Names and values of fields in their order; a name may come more than once (RFC 9110, section 5)."""

TRACEPARENT: Final[ContextVar[str]] = ContextVar("traceparent", default="")
"""The ``traceparent`` of requests that are sent for the one that this task answers; empty without a trace."""


@frozen
class HttpRequest:
    """One whole request.

    ``target`` is the origin form of RFC 9112 section 3.2.1, still percent-encoded. Header names are lower case and
    values Latin-1 text, in the order of arrival. ``peer_certificate`` is what the peer presented in the TLS handshake:
    possession of its key is proved, nothing else. ``peer_address`` is an IP address or empty. ``arrived`` is when its
    first byte came, in seconds of the `Uptime` clock (0 on the client's side). Headers and body may hold secrets, so
    neither is in the ``repr``. A client's transport adds ``host`` and ``content-length``.
    """

    method: str
    target: str
    headers: Headers = field(default=(), repr=False)
    body: bytes = field(default=b"", repr=False)
    peer_certificate: x509.Certificate | None = field(default=None, repr=False, eq=False)
    peer_address: str = ""
    arrived: float = field(default=0.0, eq=False)

    def header_values(self, name: str) -> tuple[str, ...]:
        """All values of a header; ``name`` in lower case."""
        return tuple([value for key, value in self.headers if key == name])


@frozen
class MalformedRequest:
    """Bytes that are not a request: the refusal that answers them, and the peer's address."""

    refusal: BadRequest
    peer_address: str = ""


@frozen
class HttpResponse:
    """One whole answer; header names in lower case. A server's transport adds ``content-length``.

    ``("connection", "close")`` among the headers ends the connection after the answer.
    """

    status: int
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)

    def header(self, name: str) -> str | None:
        """The first value of a header, or None; ``name`` in lower case."""
        return next((value for key, value in self.headers if key == name), None)


@lru_cache(maxsize=1024)
def plain_address(text: str) -> str:
    """Normalise an IP address: an IPv4 address mapped into IPv6 becomes the IPv4 address.

    Raises `ValueError` for anything else, and for an address with a zone (RFC 4007).
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError("an address with a zone means something on its own host only")
        return str(address.ipv4_mapped or address)
    return str(address)


@lru_cache(maxsize=1024)
def address_prefix(address: str) -> bytes:
    """The part of an address that stands for one host: all of IPv4, the /64 of IPv6; empty without an address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address.encode()
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return parsed.packed[:8]
    return parsed.packed[-4:]  # of IPv4, mapped into IPv6 or not
