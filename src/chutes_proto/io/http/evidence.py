"""`FetchEvidence` by httpx, for all three drivers: one connection to one address, for one answer.

Rules kept here:

* what is connected to is the address of the effect, and nothing else; no name is looked up, no proxy used;
* any certificate is taken, because a quote will say whose its key is; it is read before the answer's body is.

The limits of ``io/http/httpx_messages.py`` hold here too.
"""

from __future__ import annotations

import ssl
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

import httpx

from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import whole_answer

if TYPE_CHECKING:
    from chutes_proto.effects import FetchEvidence
    from chutes_proto.wire.http import HttpResponse

_CONNECT_SECONDS: Final = 5.0


def fetch_evidence(asked: FetchEvidence) -> tuple[HttpResponse, bytes]:
    """Performs `FetchEvidence` without an event loop, where nothing can interrupt a read. Raises `TransportError`."""
    limits, certificates = evidence_limits(asked), list[bytes]()

    def keep_certificate(response: httpx.Response) -> None:
        certificates.append(peer_certificate(response))

    with httpx.Client(verify=any_certificate(), trust_env=False) as client:
        client.event_hooks = {"response": [keep_certificate]}
        answer = whole_answer(client, evidence_request(client, asked, limits), limits)
    return answer, certificates[0]


def any_certificate() -> ssl.SSLContext:
    """A context for TLS 1.2 or newer that asks for no CA and no name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def evidence_limits(asked: FetchEvidence) -> TimeLimits:
    """No single wait is longer than the whole."""
    return TimeLimits(connect=min(_CONNECT_SECONDS, asked.seconds), read=asked.seconds, total=asked.seconds)


def evidence_request(
    client: httpx.Client | httpx.AsyncClient, asked: FetchEvidence, limits: TimeLimits
) -> httpx.Request:
    """The request as httpx has it. Raises `ValueError` for an address that is none."""
    address = ip_address(asked.address)
    at = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    return client.build_request(
        "GET",
        httpx.URL(f"https://{at}:{asked.port}").copy_with(raw_path=asked.target.encode("ascii")),
        headers=[("host", f"{asked.host}:{asked.port}"), *asked.headers, ("accept-encoding", "identity")],
        timeout=httpx.Timeout(limits.read, connect=limits.connect),
        extensions={"sni_hostname": asked.host},
    )


def peer_certificate(response: httpx.Response) -> bytes:
    """The certificate, in DER, of the connection that an answer comes over, while it is open."""
    certificate: bytes = response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
    return certificate
