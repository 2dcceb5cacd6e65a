"""`FetchEvidence` with httpx, for both drivers: one connection to one address, for one answer.

Rules kept here:

* a connection goes to the address in the effect and nowhere else; no name is resolved, no proxy used;
* any certificate is accepted, because a quote will prove whose its key is; it is read before the answer's body is;
* the limits of ``io/http/httpx_messages.py`` and of ``io/http/bounded.py`` hold here too.
"""

from __future__ import annotations

import ssl
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

import httpx

from chutes_proto.io.http.bounded import BoundedContext
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import open_client, prepare, whole_answer

if TYPE_CHECKING:
    from chutes_proto.effects import FetchEvidence
    from chutes_proto.wire.http import HttpResponse

_CONNECT_SECONDS: Final = 5.0


async def fetch_evidence(asked: FetchEvidence) -> tuple[HttpResponse, bytes]:
    """Return the answer, and the certificate of its connection in DER.

    Raises `TransportError`, and `ValueError` for an address that is not an IP address.
    """
    address = ip_address(asked.address)
    at = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    url = httpx.URL(f"https://{at}:{asked.port}").copy_with(raw_path=asked.target.encode("ascii"))
    headers = (("host", f"{asked.host}:{asked.port}"), *asked.headers)
    limits = TimeLimits(connect=min(_CONNECT_SECONDS, asked.seconds), read=asked.seconds, total=asked.seconds)
    certificates: list[bytes] = []

    def keep_certificate(response: httpx.Response) -> None:
        tls: ssl.SSLObject = response.extensions["network_stream"].get_extra_info("ssl_object")
        certificates.append(tls.getpeercert(True) or b"")

    async with open_client(_any_certificate()) as client:
        request = prepare(client, limits, "GET", url, headers=headers, extensions={"sni_hostname": asked.host})
        return await whole_answer(client, request, limits, keep_certificate), certificates[0]


def _any_certificate() -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer that verifies neither chain nor name."""
    context = BoundedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
