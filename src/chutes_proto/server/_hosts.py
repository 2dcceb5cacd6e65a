"""The host of a registration: a public IPv4 address, or a name that has only public addresses.

A name is resolved once: its address at that time is stored, compared, and connected to when evidence is fetched. A
second resolution could give an address inside the server's network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

from chutes_proto.effects import Flow, Resolve
from chutes_proto.errors import BadRequest, TransportError, Unavailable
from chutes_proto.server._proxy import Network
from chutes_proto.wire.codes import Code
from chutes_proto.wire.http import plain_address

_LABEL: Final = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_NAME: Final = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*", re.IGNORECASE | re.ASCII)
_UNICAST: Final = IPv6Network("2000::/3")
"""The global unicast addresses of IPv6 (RFC 4291 section 2.4): none of NAT64's, site-local or compatible ones."""
_NOT_PUBLIC: Final = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"), IPv6Network("3fff::/20"))
"""Protocol assignments, 6to4 relays, documentation (RFC 6890, 7526, 9637): not every Python knows them."""
_NUMERIC: Final = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)", re.IGNORECASE | re.ASCII)


def locate(host: str, unsafe_networks: Sequence[Network] = ()) -> Flow[str]:
    """The first address of ``host``, IPv4 before IPv6. Addresses in ``unsafe_networks`` count as public.

    Raises `BadRequest`, and `Unavailable` if the name cannot be resolved now.
    """
    if not _NAME.fullmatch(host):
        raise _invalid("not a name and not an IPv4 address")
    try:
        addresses = [ip_address(host)]
    except ValueError:
        # RFC 1123 section 2.1: otherwise resolvers take 127.1 for an address
        if _NUMERIC.fullmatch(host.rpartition(".")[2]):
            raise _invalid("a name whose last label is a number") from None
        addresses = [ip_address(plain_address(text)) for text in (yield from _resolved(host))]
    if not addresses:
        raise _invalid("does not resolve")
    if not all(_is_public(address) or any(address in one for one in unsafe_networks) for address in addresses):
        raise _invalid("has an address that is not public")
    return str(min(addresses, key=lambda address: (address.version, int(address))))


def _resolved(host: str) -> Flow[tuple[str, ...]]:
    try:
        return (yield from Resolve(host))
    except TransportError as exc:
        raise Unavailable(Code.BUSY, "The host cannot be looked up now. Retry shortly.", reason=str(exc)) from None


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        if address.sixtofour is not None:
            return _is_public(address.sixtofour)
        if address not in _UNICAST or address.teredo is not None:
            return False
    known_not_to_be = address.is_multicast or address.is_reserved or any(address in one for one in _NOT_PUBLIC)
    return address.is_global and not known_not_to_be


def _invalid(why: str) -> BadRequest:
    return BadRequest(Code.HOST_INVALID, "Invalid verification host provided.", reason=f"host {why}")
