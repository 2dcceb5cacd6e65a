"""Where a server says it is: a public IPv4 address, or a name that has only public addresses.

A name is resolved once, and what it resolved to is what is kept and compared.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Final

from chutes_proto.codes import Code
from chutes_proto.effects import Resolve
from chutes_proto.errors import BadRequest

if TYPE_CHECKING:
    from chutes_proto.effects import Flow

_LABEL: Final = r"(?!-)[a-z0-9-]{1,63}(?<!-)"
_NAME: Final = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*", re.IGNORECASE | re.ASCII)
_TRANSLATED: Final = IPv6Network("64:ff9b::/96")
"""IPv4 addresses as NAT64 has them (RFC 6052), whatever they lead to."""
_NUMERIC: Final = re.compile(r"(?:0x[0-9a-f]*|[0-9]+)", re.IGNORECASE | re.ASCII)


def locate(host: str) -> Flow[str]:
    """The address of ``host``: its first, IPv4 before IPv6. Raises `BadRequest`."""
    if not _NAME.fullmatch(host):
        raise _invalid("not a name and not an IPv4 address")
    try:
        addresses: list[IPv4Address | IPv6Address] = [IPv4Address(host)]
    except ValueError:
        if _NUMERIC.fullmatch(
            host.rpartition(".")[2]
        ):  # RFC 1123 section 2.1: else resolvers take 127.1 for an address
            raise _invalid("a name whose last label is a number") from None
        addresses = [ip_address(text) for text in (yield from Resolve(host))]
    if not addresses:
        raise _invalid("does not resolve")
    if not all(_is_public(address) for address in addresses):
        raise _invalid("has an address that is not public")
    return str(min(addresses, key=lambda address: (address.version, int(address))))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_public(inner)
        if address in _TRANSLATED or address.teredo is not None:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _invalid(why: str) -> BadRequest:
    return BadRequest(Code.HOST_INVALID, "Invalid verification host provided.", reason=f"host {why}")
