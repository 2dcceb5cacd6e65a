"""The facts of each request for those who measure the server, and the trace that a request belongs to.

Rules kept here:

* the words that may become labels of a metric are from closed lists: operations, codes, statuses. No name of a VM, no
  address, no id;
* ``traceparent`` is taken as the W3C says (Trace Context, level 1, section 3.2): an invalid one counts as absent. It
  decides nothing: log records have its trace, and the requests that the server sends for it, such as those for
  collateral. A fetch that many requests wait for belongs to the trace of the one that caused it.
"""

from __future__ import annotations

import re
from typing import Final, Protocol

from attrs import frozen

from chutes_proto.wire.http import HttpRequest

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_VERSION_0: Final = re.compile(r"00-[0-9a-f-]{52}")


@frozen
class Answered:
    """One request that was answered: ``code`` is empty for a grant, ``seconds`` begin with the request's first byte."""

    operation: str
    status: int
    code: str
    seconds: float


class Observer(Protocol):
    """Is told of each request that was answered; must not block or raise."""

    def __call__(self, answered: Answered, /) -> None:
        """Take note of it."""
        ...


def ignore(_: Answered) -> None:
    """Take no note."""


def trace_of(request: HttpRequest) -> str | None:
    """The id of the trace that ``request`` belongs to, 32 hex digits; None if it names none."""
    found = _parsed(request)
    return None if found is None else found[1]


def traceparent_of(request: HttpRequest) -> str:
    """`TRACEPARENT` for what is sent for ``request``: of version 00, whatever the peer sends after it."""
    found = _parsed(request)
    return "" if found is None else f"00-{found[1]}-{found[2]}-{int(found[3], 16) & 1:02x}"


def _parsed(request: HttpRequest) -> re.Match[str] | None:
    values = request.header_values("traceparent")
    found = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    is_bad = found is None or (values[0].startswith("00") and not _VERSION_0.fullmatch(values[0]))
    return None if is_bad else found
