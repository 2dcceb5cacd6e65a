"""The exchange table is whole, reachable, and the machine does what it says and nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.boot._exchange import TRANSITIONS, Exchange, Input, State, failure
from chutes_proto.errors import (
    ChutesError,
    LocalProtocolError,
    QuoteUnavailable,
    RemoteProtocolError,
    TransportError,
    refusal,
)
from chutes_proto.wire.codes import Code


def test_every_state_has_a_row_and_every_input_a_use() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {happened for row in TRANSITIONS.values() for happened in row} == set(Input)


def test_every_state_can_be_reached_and_left_to_an_end() -> None:
    reached, fresh = set[State](), {State.START}
    while fresh:
        reached |= fresh
        fresh = {end for state in fresh for end in TRANSITIONS[state].values()} - reached
    assert reached == set(State)
    assert [state for state in State if not TRANSITIONS[state]] == [State.CONFIRMED, State.STOPPED]


def test_whatever_a_failure_is_it_is_in_the_table() -> None:
    errors: list[ChutesError] = [refusal(status, "unknown", "No.") for status in (*range(400, 452), *range(500, 512))]
    errors += [refusal(code.status, code, "No.") for code in Code]
    errors += [TransportError("x", maybe_delivered=True), RemoteProtocolError("x"), QuoteUnavailable("x")]
    for state in set(State) - {State.CONFIRMED, State.STOPPED}:
        for error in errors:
            assert failure(state, error) in TRANSITIONS[state], (state, error)


@pytest.mark.parametrize(
    ("status", "code", "state", "expected"),
    [
        (401, "nonce_invalid", State.QUOTED, Input.FINAL),
        (403, "quote_rejected", State.QUOTED, Input.FINAL),
        (401, "boot_token_invalid", State.TOKEN_HELD, Input.TOKEN_GONE),
        (401, "unknown", State.TOKEN_HELD, Input.TOKEN_GONE),  # a server of another make
        (401, "hotkey_mismatch", State.TOKEN_HELD, Input.FINAL),
        (401, "vm_name_mismatch", State.TOKEN_HELD, Input.FINAL),
        (401, "boot_token_invalid", State.SYNCED, Input.TOKEN_GONE),
        (401, "quote_nonce_invalid", State.REQUOTED, Input.NONCE_GONE),
        (403, "platform_mismatch", State.REQUOTED, Input.FINAL),
        (401, "confirm_nonce_invalid", State.HANDED, Input.FINAL),
        (409, "rotation_superseded", State.HANDED, Input.FINAL),
        (503, "store_unavailable", State.HANDED, Input.RETRY_LATER),
        (404, "key_not_found", State.TOKEN_HELD, Input.FINAL),
        (422, "validation_error", State.QUOTED, Input.FINAL),
        (408, "request_timeout", State.START, Input.RETRY_LATER),
        (408, "unknown", State.HANDED, Input.RETRY_LATER),
        (429, "unknown", State.START, Input.RETRY_LATER),
        (500, "unknown", State.QUOTED, Input.RETRY_LATER),
        (503, "draining", State.START, Input.RETRY_LATER),
    ],
)
def test_what_is_final_and_what_is_not(status: int, code: str, state: State, expected: Input) -> None:
    assert failure(state, refusal(status, code, "No.")) is expected


@given(st.lists(st.sampled_from(Input)))
def test_an_illegal_input_changes_nothing(inputs: list[Input]) -> None:
    exchange, expected = Exchange(), State.START
    for happened in inputs:
        following = TRANSITIONS[expected].get(happened)
        if following is None:
            with pytest.raises(LocalProtocolError, match=re.escape(repr(happened.value))):
                exchange.take(happened)
        else:
            assert exchange.take(happened) is following
            expected = following
        assert exchange.state is expected
