"""One request, as the handler of its operation gets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from attrs import frozen

if TYPE_CHECKING:
    from chutes_proto.auth.hotkey import Hotkey
    from chutes_proto.wire.http import HttpRequest

M = TypeVar("M")


@frozen
class Call(Generic[M]):
    """A decoded request; ``now`` is the time in unix seconds when its handling began."""

    request: HttpRequest
    message: M
    request_id: str
    now: int


@frozen
class SignedCall(Call[M]):
    """A request that the hotkey ``caller`` has signed."""

    caller: Hotkey
