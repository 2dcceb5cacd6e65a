"""The retry policy: bounds of every wait, budget of attempts and of time, and what the console is told."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.boot._retry import begin, conceal, described
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Entropy, Flow, Log, NextServer, Sleep, Uptime
from chutes_proto.errors import (
    ChutesError,
    LocalProtocolError,
    QuoteUnavailable,
    RemoteProtocolError,
    TransportError,
    Unavailable,
    refusal,
)
from chutes_proto.log import Level, Record
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Aside, Playbook

CUT = TransportError("cut", maybe_delivered=True)


@given(st.integers(1, 5000), st.binary(min_size=1, max_size=8), st.floats(0, 1e6))
def test_a_wait_is_within_its_bounds(failures: int, jitter: bytes, retry_after: float) -> None:
    policy = RetryPolicy(base=0.5, cap=20.0)
    bound = min(20.0, 0.5 * 2 ** min(failures - 1, 10))
    delay = policy.delay(failures, jitter, retry_after)
    assert max(bound / 2, retry_after) <= delay <= max(bound / 2, retry_after) + bound / 2


def test_waits_double_up_to_the_cap_and_jitter_spreads_their_upper_half() -> None:
    policy = RetryPolicy(base=1.0, cap=5.0)
    assert [policy.delay(n, b"\0") for n in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 2.5, 2.5]
    assert [policy.delay(n, b"\x80") for n in (1, 2, 3, 4, 5)] == [0.75, 1.5, 3.0, 3.75, 3.75]


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"base": 0.0}, {"base": 9.0, "cap": 8.0}, {"deadline": 0.0}, {"deadline": math.nan}],
)
def test_a_policy_that_could_not_end_or_begin_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LocalProtocolError):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


def fail(policy: RetryPolicy, *errors: ChutesError) -> Flow[None]:
    budget = yield from begin(policy)
    for error in errors:
        yield from budget.announce("nonce")
        yield from budget.pause("nonce", error)


def test_the_budget_of_attempts() -> None:
    records: list[Record] = []
    book = Playbook(
        *([(Sleep(0.5), None), (Sleep(1.0), None)]),
        aside={Uptime: lambda _: 7.0, Entropy: lambda e: bytes(e.size), Log: lambda e: records.append(e.record)},
    )
    with pytest.raises(TransportError) as raised:
        book.run(fail(RetryPolicy(attempts=3), CUT, CUT, CUT, CUT))
    assert raised.value is CUT
    assert [(r.event, r.fields.get("attempt"), r.level) for r in records] == [
        ("boot_step", "1/3", Level.INFO),
        ("boot_delayed", "1/3", Level.WARNING),
        ("boot_step", "2/3", Level.INFO),
        ("boot_delayed", "2/3", Level.WARNING),
        ("boot_step", "3/3", Level.INFO),
        ("boot_stopped", "3/3", Level.ERROR),
    ]


@pytest.mark.parametrize(("passed", "goes_on"), [(59.4, True), (59.5, False), (1000.0, False)])
def test_no_attempt_begins_after_the_deadline(passed: float, goes_on: bool) -> None:
    clock = [100.0]

    def one() -> Flow[None]:
        budget = yield from begin(RetryPolicy(deadline=60.0))
        clock[0] += passed
        yield from budget.pause("nonce", CUT)

    aside: Aside = {Uptime: lambda _: clock[0], Entropy: lambda e: bytes(e.size), Log: lambda _: None}
    if goes_on:
        Playbook((Sleep(0.5), None), aside=aside).run(one())
    else:
        with pytest.raises(TransportError):
            Playbook(aside=aside).run(one())


def test_retry_after_is_the_least_wait_and_never_a_longer_deadline() -> None:
    records: list[Record] = []
    aside: Aside = {Uptime: lambda _: 0.0, Entropy: lambda e: bytes(e.size), Log: lambda e: records.append(e.record)}
    busy = Unavailable("busy", "Busy.", status=503, retry_after=17)
    Playbook((Sleep(17.0), None), aside=aside).run(fail(RetryPolicy(), busy))
    tomorrow = Unavailable("busy", "Busy.", status=503, retry_after=86400)
    with pytest.raises(Unavailable):
        Playbook(aside=aside).run(fail(RetryPolicy(), tomorrow))
    assert records[-1].fields["reason"] == "Busy.; it asks to wait 86400 s, which ends after the deadline"


def test_an_error_as_the_console_is_told_it() -> None:
    told = described(refusal(403, "measurement_mismatch", "Wrong (RTMR1)", request_id="ab12"))
    assert told == {"reason": "Wrong (RTMR1)", "code": "measurement_mismatch", "request_id": "ab12"}
    assert described(CUT) == {"error": "TransportError", "reason": "cut"}
    assert described(RemoteProtocolError("x" * 10_000))["reason"] == "x" * 297 + "..."
    assert described(RemoteProtocolError("x" * 300))["reason"] == "x" * 300
    problems = refusal(422, "validation_error", [{"loc": ["body", "quote"], "msg": "Field required"}])
    assert "Field required" in str(described(problems)["reason"])


@pytest.mark.usefixtures("told_on_purpose")
@given(st.text(max_size=300), st.text(max_size=300))
def test_what_is_hidden_is_never_told(before: str, after: str) -> None:
    token = "f00d" * 16
    texts = (before + token + after, token.upper() + after)
    for text in texts:
        problems: list[dict[str, object]] = [{"loc": ["body"], "msg": text, "input": {text: [text, 1]}}]
        for error in (
            *(refusal(401, text, told, request_id=text) for told in (text, problems)),
            RemoteProtocolError(text),
        ):
            conceal(error, Secret(token.encode()))
            assert token not in f"{error} {error!r} {vars(error)} {described(error)}".lower()


def shared(*script: tuple[object, object], uptime: float = 7.0, records: list[Record] | None = None) -> Playbook:
    told = [] if records is None else records
    return Playbook(
        *script,  # type: ignore[arg-type]
        aside={Uptime: lambda _: uptime, Entropy: lambda e: bytes(e.size), Log: lambda e: told.append(e.record)},
    )


def test_the_next_of_several_servers_is_asked_but_not_for_a_quote() -> None:
    records: list[Record] = []
    book = shared(
        *[(NextServer(), "https://b"), (Sleep(0.5), None), (Sleep(1.0), None)],
        *[(NextServer(), "https://a"), (Sleep(2.0), None)],
        records=records,
    )
    book.run(fail(RetryPolicy(servers=2), CUT, QuoteUnavailable("busy"), RemoteProtocolError("garbage")))
    moved = [record.fields.get("next_server") for record in records if record.event == "boot_delayed"]
    assert moved == ["https://b", None, "https://a"]


def test_what_one_server_asks_to_wait_is_nothing_to_another_until_all_were_asked() -> None:
    busy = Unavailable("busy", "later", retry_after=86400, status=503)
    book = shared((NextServer, "b"), (Sleep(0.5), None), (NextServer, "a"), (Sleep(30.0), None))
    book.run(fail(RetryPolicy(servers=2), busy, busy))


def test_several_exchanges_share_a_deadline() -> None:
    with pytest.raises(TransportError):
        shared(uptime=10.0).run(fail(RetryPolicy(deadline=5.0, started=5.1), CUT))
    shared((Sleep, None), uptime=10.0).run(fail(RetryPolicy(deadline=5.0), CUT))
