"""The client's part of the two-phase exchange: what it sends again, when it begins again, what it makes of answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from chutes_proto.boot._flows import BootGrant, Rotation, attest_volumes, boot, confirm_volumes
from chutes_proto.effects import MakeQuote, Send
from chutes_proto.errors import LocalProtocolError, QuoteUnavailable, Refused, RemoteProtocolError, TransportError
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Playbook
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.boot import talk

NONCE, CONFIRM, K3S = "71" * 32, "c1" * 32, "azNz".ljust(43, "A") + "="
GRANT = BootGrant(talk.HOTKEY, talk.VM, Secret(b"root"), None, Secret(NONCE.encode()))
VOLUMES = {"storage": True, "tdx-cache": False}
PAIRS = {"storage": {"current": "c", "next": "n"}, "tdx-cache": {"current": None, "next": "m"}}
LOST = TransportError("lost", maybe_delivered=True)


def handed(**members: object) -> HttpResponse:
    whole = {"volumes": PAIRS, "confirm_nonce": CONFIRM, "k3s_encryption_key": K3S, "in_use": ["storage"]}
    return talk.answer({**whole, **members})


def confirmed() -> HttpResponse:
    results = {"storage": {"result": "promoted"}, "tdx-cache": {"result": "discarded"}}
    return talk.answer({"status": "confirmed", "volumes": results})


def attest(*script: tuple[Any, object], grant: BootGrant | None = GRANT) -> Rotation:
    flow = attest_volumes(talk.SETTINGS, VOLUMES, grant=grant)
    return Playbook(*script, aside=talk.patient()).run(flow)


def test_the_second_quote_is_over_the_quote_nonce_and_the_client_key() -> None:
    sent: list[HttpRequest] = []

    def is_attest(effect: Any) -> bool:
        if isinstance(effect, Send):
            sent.append(effect.request)
        return isinstance(effect, Send)

    rotation = attest((MakeQuote(bytes.fromhex(NONCE) + talk.DIGEST), b"quote"), (is_attest, handed()))
    (request,) = sent
    assert request.target == f"/servers/{talk.VM}/luks/attest"
    assert request.header_values("x-quote-nonce") == (NONCE,)
    assert request.header_values("x-chutes-hotkey") == (talk.HOTKEY,)
    assert request.body == b'{"quote":"cXVvdGU=","volumes":["storage","tdx-cache"],"formatted":["storage"]}'
    assert {name: (pair.current, pair.next) for name, pair in rotation.keys.items()} == {
        "storage": (Secret(b"c"), Secret(b"n")),
        "tdx-cache": (None, Secret(b"m")),
    }
    assert {name: (pair.is_formatted, pair.is_in_use) for name, pair in rotation.keys.items()} == {
        "storage": (True, True),
        "tdx-cache": (False, False),
    }
    assert [name for name, pair in rotation.keys.items() if pair.may_format] == ["tdx-cache"]
    assert rotation.k3s_encryption_key == Secret(K3S.encode())
    assert CONFIRM not in repr(rotation)


def test_a_lost_answer_is_asked_for_again_with_the_same_bytes_and_no_new_quote() -> None:
    sent: list[HttpRequest] = []

    def same(effect: Any) -> bool:
        if isinstance(effect, Send):
            sent.append(effect.request)
        return isinstance(effect, Send)

    attest((MakeQuote, b"quote"), (same, LOST), (same, talk.refused(503)), (same, handed()))
    assert sent == [sent[0]] * 3


def test_no_quote_is_tried_again() -> None:
    attest((MakeQuote, QuoteUnavailable("busy")), (MakeQuote, b"quote"), (Send, handed()))


def test_a_quote_nonce_that_died_begins_a_new_boot() -> None:
    again = talk.grant_answer(boot_token=None, luks_quote_nonce="22" * 32)
    attest(
        (MakeQuote, b"quote"),
        (Send, talk.refused(401, "quote_nonce_invalid")),
        (talk_nonce, talk.nonce_answer()),
        (MakeQuote, b"quote"),
        (talk.is_attestation, again),
        (MakeQuote(bytes.fromhex("22" * 32) + talk.DIGEST), b"quote"),
        (Send, handed()),
    )


def talk_nonce(effect: Any) -> bool:
    return getattr(effect, "request", None) == talk.ASK_NONCE


def test_a_refusal_is_final() -> None:
    with pytest.raises(Refused, match="platform_mismatch"):
        attest((MakeQuote, b"quote"), (Send, talk.refused(403, "platform_mismatch")))


@pytest.mark.parametrize(
    "members",
    [
        {"volumes": {"storage": PAIRS["storage"]}},
        {"volumes": {**PAIRS, "more": PAIRS["storage"]}},
        {"volumes": {**PAIRS, "storage": {"current": "c"}}},
        {"volumes": {**PAIRS, "storage": {"current": "", "next": "n"}}},
        {"volumes": []},
        {"in_use": ["other"]},
        {"confirm_nonce": "c1"},
        {"k3s_encryption_key": None},
        {"k3s_encryption_key": K3S.removesuffix("=")},
        {"k3s_encryption_key": K3S[:31] + '", "x": "=='},
    ],
    ids=str,
)
def test_an_answer_that_is_not_whole_is_none(members: dict[str, object]) -> None:
    script = [(MakeQuote, b"quote"), *[(Send, handed(**members))] * talk.SETTINGS.retry.attempts]
    with pytest.raises(RemoteProtocolError):
        attest(*script)


def test_a_grant_of_the_base_exchange_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="base exchange"):
        attest(grant=talk.GRANT)


def test_a_boot_that_is_granted_the_other_exchange_says_so() -> None:
    with pytest.raises(LocalProtocolError, match="base exchange"):
        attest(
            (Send, talk.nonce_answer()), (MakeQuote, b"quote"), (talk.is_attestation, talk.grant_answer()), grant=None
        )
    two_phase = talk.grant_answer(boot_token=None, luks_quote_nonce=NONCE)
    script = ((Send, talk.nonce_answer()), (MakeQuote, b"quote"), (Send, two_phase))
    assert Playbook(*script, aside=talk.calm()).run(boot(talk.SETTINGS)).luks_quote_nonce == Secret(NONCE.encode())


def confirm(*script: tuple[Any, object], rotation: Rotation | None = None) -> Mapping[str, str]:
    rotation = rotation or attest((MakeQuote, b"quote"), (Send, handed()))
    rotation.added("storage")
    flow = confirm_volumes(rotation, retry=talk.SETTINGS.retry)
    return Playbook(*script, aside=talk.patient()).run(flow)


def test_a_confirmation_is_repeated_as_it_was() -> None:
    headers = (("x-chutes-hotkey", talk.HOTKEY), ("x-confirm-nonce", CONFIRM), *talk.JSON)
    body = b'{"volumes":{"storage":{"rotated":true},"tdx-cache":{"rotated":false}}}'
    request = HttpRequest("POST", f"/servers/{talk.VM}/luks/confirm", headers, body)
    other = talk.answer({"status": "confirmed", "volumes": {"storage": {"result": "promoted"}}})
    results = confirm(
        (Send(request), LOST), (Send(request), talk.refused(503)), (Send(request), other), (Send(request), confirmed())
    )
    assert results == {"storage": "promoted", "tdx-cache": "discarded"}


@pytest.mark.parametrize(("status", "code"), [(409, "rotation_superseded"), (401, "confirm_nonce_invalid")])
def test_a_confirmation_that_is_refused(status: int, code: str) -> None:
    with pytest.raises(Refused, match=code):
        _ = confirm((Send, talk.refused(status, code)))


@pytest.mark.usefixtures("told_on_purpose")
def test_a_confirm_nonce_that_a_server_repeats_is_in_no_error() -> None:
    with pytest.raises(Refused) as caught:
        _ = confirm((Send, talk.refused(401, "confirm_nonce_invalid", f"no: {CONFIRM}")))
    assert CONFIRM not in f"{caught.value} {caught.value!r} {vars(caught.value)}"


@pytest.mark.usefixtures("told_on_purpose")
def test_a_quote_nonce_that_a_server_repeats_is_in_no_error() -> None:
    with pytest.raises(Refused) as caught:
        attest((MakeQuote, b"quote"), (Send, talk.refused(403, "platform_mismatch", f"no: {NONCE}")))
    assert NONCE not in f"{caught.value} {caught.value!r} {vars(caught.value)}"


def test_a_confirmation_that_stays_lost() -> None:
    with pytest.raises(TransportError):
        _ = confirm(*[(Send, LOST)] * talk.SETTINGS.retry.attempts)


def test_what_is_reported() -> None:
    rotation = attest((MakeQuote, b"quote"), (Send, handed()))
    rotation.left_out("storage")
    for report in (rotation.added, rotation.left_out):
        with pytest.raises(LocalProtocolError, match="not among the volumes"):
            report("storage")
    assert rotation.report == {"tdx-cache": False}
    rotation.left_out("tdx-cache")
    assert Playbook().run(confirm_volumes(rotation)) == {}  # nothing to say, nothing sent
