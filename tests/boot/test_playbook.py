"""A playbook fails when a flow leaves it, and says where."""

from __future__ import annotations

import re

import pytest

from chutes_proto.effects import Effect, Entropy, Flow, Now, Sleep, Uptime
from chutes_proto.errors import TransportError
from chutes_proto.testing._playbook import Playbook, PlaybookError


def dialogue() -> Flow[tuple[int, bytes]]:
    now = yield from Now()
    try:
        yield from Sleep(2)
    except TransportError:
        now = -1
    return now, (yield from Entropy(3))


def swallow() -> Flow[str]:
    """A flow that handles everything, as a server's does."""
    try:
        _ = yield from Now()
    except Exception:  # noqa: BLE001
        return "handled"
    return "done"


def long_sleep(effect: Effect[object]) -> bool:
    return isinstance(effect, Sleep) and effect.seconds > 1


def test_replies_reach_the_flow_and_its_result_comes_back() -> None:
    assert Playbook((Now, 7), (Sleep(2), None), (Entropy(3), b"abc")).run(dialogue()) == (7, b"abc")
    assert Playbook((Now(), 7), (long_sleep, None), (Entropy, b"abc")).run(dialogue()) == (7, b"abc")


def test_an_exception_as_a_reply_is_raised_where_the_flow_asked() -> None:
    cut = TransportError("cut", maybe_delivered=False)
    assert Playbook((Now, 7), (Sleep, cut), (Entropy, b"")).run(dialogue()) == (-1, b"")
    with pytest.raises(TransportError, match="cut"):
        Playbook((Now, cut)).run(dialogue())


def test_what_is_aside_is_answered_at_any_time_but_the_script_comes_first() -> None:
    book = Playbook((Sleep, None), aside={Now: lambda _: 5, Entropy: lambda effect: bytes(effect.size)})
    assert book.run(dialogue()) == (5, bytes(3))
    assert Playbook((Now, 1), (Sleep, None), (Entropy, b"x"), aside={Now: lambda _: 5}).run(dialogue()) == (1, b"x")


@pytest.mark.parametrize(
    ("book", "text"),
    [
        (Playbook(), "nothing is expected after the 0 steps\nthe flow asked for Now()\nso far:\n  nothing"),
        (
            Playbook((Now, 7), (Sleep(3), None)),
            "step 2 of 2 expects Sleep(seconds=3)\nthe flow asked for Sleep(seconds=2)\nso far:\n  Now() -> 7",
        ),
        (Playbook((Now, 7), (Uptime, 0.0)), "step 2 of 2 expects Uptime\nthe flow asked for Sleep(seconds=2)"),
        (Playbook((long_sleep, 7)), "step 1 of 1 expects long_sleep\nthe flow asked for Now()"),
        (
            Playbook((Now, 7), (Sleep, None), (Entropy, b""), (Now, 8)),
            "step 4 of 4 expects Now\nthe flow returned (7, b'')",
        ),
        (
            Playbook((Now, ValueError("no clock")), (Sleep, None)),
            "step 2 of 2 expects Sleep\nthe flow raised ValueError('no clock')",
        ),
    ],
)
def test_a_departure_is_told(book: Playbook, text: str) -> None:
    with pytest.raises(PlaybookError, match="^" + re.escape(text)):
        book.run(dialogue())


def test_no_flow_can_swallow_a_departure() -> None:
    with pytest.raises(PlaybookError, match="the flow asked for Now"):
        Playbook().run(swallow())
    assert Playbook((Now, ValueError())).run(swallow()) == "handled"
