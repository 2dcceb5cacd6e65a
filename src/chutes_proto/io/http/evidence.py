"""`FetchEvidence` with httpx, for both drivers: one connection to one address, for one answer.

Rules kept here:

* a connection goes to the address in the effect and nowhere else; no name is resolved, no proxy used;
* any certificate is accepted, because a quote will prove whose its key is; it is read before the answer's body is;
* a host sends no more bytes than its answer may have. OpenSSL passes over hello requests and httpx over interim answers
  for as long as there are any, and each megabyte of them would cost the loop a second or more.

The limits of ``io/http/httpx_messages.py`` hold here too.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final, TypeVar

import httpx

from chutes_proto.io.http.https import TimeLimits
from chutes_proto.io.http.httpx_messages import open_client, prepare, whole_answer
from chutes_proto.transport.client import MAX_ANSWER

if TYPE_CHECKING:
    from chutes_proto.effects import FetchEvidence
    from chutes_proto.wire.http import HttpResponse

T = TypeVar("T")

_CONNECT_SECONDS: Final = 5.0
_BEFORE_ANSWER: Final = 64 * 1024
"""Bytes that a host may send until the head of its answer is whole. A certificate with a quote has some 10 kB."""


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
        tls: _BoundedTls = response.extensions["network_stream"].get_extra_info("ssl_object")
        tls.left += 2 * MAX_ANSWER  # in pieces and records it is longer
        certificates.append(tls.getpeercert(True) or b"")

    async with open_client(_any_certificate()) as client:
        request = prepare(client, limits, "GET", url, headers=headers, extensions={"sni_hostname": asked.host})
        return await whole_answer(client, request, limits, keep_certificate), certificates[0]


class _BoundedTls(ssl.SSLObject):
    """One connection that takes ``left`` more bytes from its peer."""

    left: int = _BEFORE_ANSWER
    received: ssl.MemoryBIO

    def do_handshake(self) -> None:
        self._counted(super().do_handshake)

    def read(self, *args: Any, **kwargs: Any) -> Any:
        return self._counted(super().read, *args, **kwargs)

    def _counted(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        before = self.received.pending
        try:
            return work(*args, **kwargs)
        finally:
            self.left -= before - self.received.pending
            if self.left < 0:
                raise ssl.SSLError(0, "the host sends more bytes than an answer may have")


class _Context(ssl.SSLContext):
    """Makes connections that are bounded."""

    sslobject_class = _BoundedTls

    def wrap_bio(self, incoming: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> _BoundedTls:
        made = super().wrap_bio(incoming, *args, **kwargs)
        assert isinstance(made, _BoundedTls)  # noqa: S101 - which this context says
        made.received = incoming
        return made


def _any_certificate() -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer that verifies neither chain nor name."""
    context = _Context(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
