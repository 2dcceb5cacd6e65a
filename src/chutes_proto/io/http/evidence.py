"""`FetchEvidence` with httpx, for both drivers: one connection to one address, for one answer.

Rules kept here:

* a connection goes to the address in the effect and nowhere else; no name is resolved, no proxy used;
* any certificate is accepted, because a quote will prove whose its key is; it is read before the answer's body is.

The limits of ``io/http/httpx_messages.py`` hold here too.
"""

from __future__ import annotations

import ssl
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

import httpx

from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import prepare, whole_answer

if TYPE_CHECKING:
    from chutes_proto.effects import FetchEvidence
    from chutes_proto.wire.http import HttpResponse

_CONNECT_SECONDS: Final = 5.0


def fetch_evidence(asked: FetchEvidence) -> tuple[HttpResponse, bytes]:
    """Perform `FetchEvidence` without an event loop, where nothing can interrupt a read. Raises `TransportError`."""
    limits, certificates = evidence_limits(asked), list[bytes]()
    with httpx.Client(verify=any_certificate(), trust_env=False) as client:
        request = evidence_request(client, asked, limits)
        answer = whole_answer(client, request, limits, partial(keep_certificate, certificates))
    return answer, certificates[0]


def any_certificate() -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer that verifies neither chain nor name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def evidence_limits(asked: FetchEvidence) -> TimeLimits:
    """Return the time limits of one fetch: no single wait is longer than the whole."""
    return TimeLimits(connect=min(_CONNECT_SECONDS, asked.seconds), read=asked.seconds, total=asked.seconds)


def evidence_request(
    client: httpx.Client | httpx.AsyncClient, asked: FetchEvidence, limits: TimeLimits
) -> httpx.Request:
    """Return the request as httpx has it. Raises `ValueError` for a text that is not an IP address."""
    address = ip_address(asked.address)
    at = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    url = httpx.URL(f"https://{at}:{asked.port}").copy_with(raw_path=asked.target.encode("ascii"))
    headers = (("host", f"{asked.host}:{asked.port}"), *asked.headers)
    return prepare(client, limits, "GET", url, headers=headers, extensions={"sni_hostname": asked.host})


def keep_certificate(certificates: list[bytes], response: httpx.Response) -> None:
    """Append the certificate, in DER, of the connection of an answer, which must be open."""
    certificates.append(response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True))
