"""TLS for an event loop, from a peer that sends no more bytes than its answer may have.

OpenSSL passes over hello requests and httpx over interim answers for as long as there are any, and each megabyte of
them would cost the loop a second or more. `whole_answer` says when an answer's body begins, and when the next may come.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Final, TypeVar

from chutes_proto.transport.client import MAX_ANSWER

T = TypeVar("T")

_BEFORE_ANSWER: Final = 64 * 1024
"""Bytes that a peer may send until the head of its answer is whole. A certificate with a quote has some 10 kB."""


class BoundedTls(ssl.SSLObject):
    """One connection that takes ``left`` more bytes from its peer."""

    left: int = _BEFORE_ANSWER
    received: ssl.MemoryBIO

    def begin_body(self) -> None:
        """Take as many bytes as the body of an answer may have; in pieces and records it is longer."""
        self.left = 2 * MAX_ANSWER

    def begin_head(self) -> None:
        """Take as many bytes as the head of the next answer may have."""
        self.left = _BEFORE_ANSWER

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
                raise ssl.SSLError(0, "the peer sends more bytes than an answer may have")


class BoundedContext(ssl.SSLContext):
    """Makes connections that are bounded."""

    sslobject_class: type[ssl.SSLObject] = BoundedTls

    def wrap_bio(self, incoming: ssl.MemoryBIO, *args: Any, **kwargs: Any) -> BoundedTls:
        made = super().wrap_bio(incoming, *args, **kwargs)
        assert isinstance(made, BoundedTls)  # noqa: S101 - which this context says
        made.received = incoming
        return made
