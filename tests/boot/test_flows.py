"""The client's flows, played: every outcome of every step, and what is sent, waited for and told each time."""

from __future__ import annotations

import base64
import hashlib
import json
from itertools import product
from typing import Any

import attrs
import pytest

from chutes_proto.boot._flows import (
    BootGrant,
    BootSettings,
    VolumeKey,
    VolumeKeys,
    attest_boot,
    attest_volumes,
    boot,
    boot_and_sync,
    fetch_nonce,
    read_cache_passphrase,
    receive_keys,
    sync_volumes,
)
from chutes_proto.boot._retry_policy import RetryPolicy
from chutes_proto.effects import Effect, Entropy, Log, MakeQuote, Send, Sleep, Uptime
from chutes_proto.errors import (
    BadRequest,
    ChutesError,
    LocalProtocolError,
    QuoteUnavailable,
    Refusal,
    Refused,
    RemoteProtocolError,
    TransportError,
)
from chutes_proto.log import Record
from chutes_proto.secret import Secret
from chutes_proto.testing._playbook import Aside, Playbook
from chutes_proto.wire.http import HttpRequest, HttpResponse
from tests.boot import talk

CUT = TransportError("cut", maybe_delivered=True)
DOWN = TransportError("connection refused", maybe_delivered=False)
NO_QUOTE = QuoteUnavailable("the quoting service is busy")

ASK_NONCE = (Send(talk.ASK_NONCE), talk.nonce_answer())
MAKE_QUOTE = (MakeQuote(talk.NONCE + talk.DIGEST), talk.QUOTE)
GRANTED = (talk.is_attestation, talk.grant_answer())
BOTH = {"storage": True, "tdx-cache": False}
SYNC_REQUEST = talk.sync_request(formatted=["storage"])
SYNC = Send(SYNC_REQUEST)
STORAGE_KEY = VolumeKey(volume="storage", passphrase=Secret(talk.STORAGE.encode()), is_formatted=True, is_in_use=True)
CACHE_KEY = VolumeKey(volume="tdx-cache", passphrase=Secret(talk.CACHE.encode()), is_formatted=False, is_in_use=False)
KEYS = VolumeKeys((STORAGE_KEY, CACHE_KEY))

PASSING = {
    "request not delivered": DOWN,
    "answer lost": CUT,
    "500": talk.refused(500),
    "500 as plain text": HttpResponse(500, (("content-type", "text/plain"),), b"Internal Server Error"),
    "502 of a proxy": HttpResponse(502, (), b"<html>"),
    "503": talk.refused(503, "busy"),
    "429": talk.refused(429),
    "408": talk.refused(408, "request_timeout"),
    "200 with garbage": HttpResponse(200, talk.JSON, b"{"),
    "200 with nothing": HttpResponse(200, talk.JSON),
    "200 of a portal": HttpResponse(200, (("content-type", "text/html"),), b"<html>"),
    "204": HttpResponse(204),
    "redirect": HttpResponse(307, (("location", "https://elsewhere.example/servers/nonce"),)),
}
"""Failures that may pass."""

FINAL = {400: BadRequest, 401: Refused, 403: Refused, 404: Refused, 405: BadRequest, 409: Refused} | {
    413: BadRequest,
    418: BadRequest,
    422: BadRequest,
    431: BadRequest,
}


# --- boot ---


def test_a_boot() -> None:
    grant = Playbook(ASK_NONCE, MAKE_QUOTE, GRANTED, aside=talk.calm()).run(boot(talk.SETTINGS))
    assert grant == talk.GRANT


def test_what_the_attestation_sends() -> None:
    sent: list[HttpRequest] = []

    def attestation(effect: Effect[Any]) -> bool:
        assert isinstance(effect, Send)
        sent.append(effect.request)
        return True

    book = Playbook((attestation, talk.grant_answer()), aside=talk.calm())
    assert book.run(attest_boot(talk.SETTINGS, talk.NONCE, talk.QUOTE)) == talk.GRANT
    (request,) = sent
    assert (request.method, request.target) == ("POST", "/servers/boot/attestation")
    assert dict(request.headers) == {"x-chutes-nonce": talk.NONCE.hex(), "content-type": "application/json"}
    assert json.loads(request.body) == {
        "quote": base64.b64encode(talk.QUOTE).decode(),
        "vm_name": talk.VM,
        "miner_hotkey": talk.HOTKEY,
    }


def test_a_signer_signs_exactly_the_bytes_that_are_sent() -> None:
    messages: list[bytes] = []
    sent: list[HttpRequest] = []

    def sign(message: bytes) -> bytes:
        messages.append(message)
        return b"\xab" * 64

    def attestation(effect: Effect[Any]) -> bool:
        assert isinstance(effect, Send)
        sent.append(effect.request)
        return True

    settings = attrs.evolve(talk.SETTINGS, signer=sign)
    book = Playbook((attestation, talk.grant_answer()), aside=talk.calm())
    _ = book.run(attest_boot(settings, talk.NONCE, talk.QUOTE))
    digest = hashlib.sha256(sent[0].body).hexdigest()
    assert messages == [f"{talk.HOTKEY}:{talk.NONCE.hex()}:{digest}".encode()]
    assert sent[0].header_values("x-chutes-hotkey") == (talk.HOTKEY,)
    assert sent[0].header_values("x-chutes-signature") == ("ab" * 64,)


@pytest.mark.parametrize("failure", PASSING.values(), ids=PASSING.keys())
@pytest.mark.parametrize("step", [0, 1, 2], ids=["nonce", "quote", "attestation"])
def test_what_may_pass_is_tried_again_with_a_new_nonce(step: int, failure: object) -> None:
    other = bytes(32)
    first: list[tuple[Any, object]] = [ASK_NONCE, MAKE_QUOTE, GRANTED][: step + 1]
    first[step] = (first[step][0], NO_QUOTE if step == 1 else failure)
    again: list[Any] = [
        (Send(talk.ASK_NONCE), talk.nonce_answer(other)),
        (MakeQuote(other + talk.DIGEST), talk.QUOTE),
        (lambda e: talk.is_attestation(e) and e.request.header_values("x-chutes-nonce") == (other.hex(),), GRANTED[1]),
    ]
    script: list[Any] = [*first, (Sleep, None), *again]
    assert Playbook(*script, aside=talk.calm()).run(boot(talk.SETTINGS)) == talk.GRANT


@pytest.mark.parametrize(("status", "kind"), FINAL.items())
@pytest.mark.parametrize("step", ["nonce", "attestation"])
def test_what_is_final_is_raised_at_once(step: str, status: int, kind: type[ChutesError]) -> None:
    answer = talk.refused(status, "some_code")
    script: tuple[Any, ...] = ((Send(talk.ASK_NONCE), answer),)
    if step == "attestation":
        script = (ASK_NONCE, MAKE_QUOTE, (talk.is_attestation, answer))
    with pytest.raises(kind, match=f"{status} some_code, request r-1"):
        Playbook(*script, aside=talk.calm()).run(boot(talk.SETTINGS))


@pytest.mark.parametrize("failure", PASSING.values(), ids=PASSING.keys())
def test_when_the_attempts_are_used_up_the_last_error_is_raised(failure: object) -> None:
    ask = (Send(talk.ASK_NONCE), failure)
    script: list[Any] = [ask, (Sleep, None), ask, (Sleep, None), ask, (Sleep, None), (Send(talk.ASK_NONCE), failure)]
    with pytest.raises((TransportError, Refusal, RemoteProtocolError)):
        Playbook(*script, aside=talk.calm()).run(boot(talk.SETTINGS))


def test_no_quote_in_any_attempt() -> None:
    again = (ASK_NONCE, (MakeQuote, NO_QUOTE), (Sleep, None))
    with pytest.raises(QuoteUnavailable, match="busy"):
        Playbook(*again, *again, *again, ASK_NONCE, (MakeQuote, NO_QUOTE), aside=talk.calm()).run(boot(talk.SETTINGS))


def test_a_slow_exchange_ends_at_its_deadline() -> None:
    clock = [0.0]
    settings = attrs.evolve(talk.SETTINGS, retry=RetryPolicy(attempts=1000, deadline=100.0))

    def pass_time(effect: Sleep) -> None:
        clock[0] += effect.seconds

    def time_out(effect: Send) -> HttpResponse:
        clock[0] += 30.0
        raise CUT

    aside: Aside = {**talk.calm(), Uptime: lambda _: clock[0], Sleep: pass_time, Send: time_out}
    with pytest.raises(TransportError):
        Playbook(aside=aside).run(boot(settings))
    assert 90.0 < clock[0] < 100.0 + 30.0


@pytest.mark.parametrize(
    "nonce", ["", "00" * 31, "00" * 33, "AA" * 32, "zz" * 32, " " + "00" * 32, "0" * 63 + "\uff10"]
)
def test_a_nonce_of_another_shape_is_not_quoted(nonce: str) -> None:
    book = Playbook((Send, talk.answer({"nonce": nonce, "expires_at": "x"})))
    with pytest.raises(RemoteProtocolError, match="nonce"):
        book.run(fetch_nonce(talk.SETTINGS))


@pytest.mark.parametrize(
    "members",
    [
        {"key": ""},
        {"key": "line\nend"},
        {"key": "gr\u00fcn"},
        {"key": 7},
        {"key": None},
        {"boot_token": None},
        {"boot_token": ""},
        {"boot_token": "70" * 31},
        {"boot_token": "AB" * 32},
        {"boot_token": "70" * 31 + "\r\n"},
        {"luks_quote_nonce": "11" * 32},
        {"boot_token": None, "luks_quote_nonce": "11"},
    ],
    ids=str,
)
def test_half_a_grant_is_none(members: dict[str, object]) -> None:
    book = Playbook((Send, talk.grant_answer(**members)), aside=talk.calm())
    with pytest.raises(RemoteProtocolError):
        book.run(attest_boot(talk.SETTINGS, talk.NONCE, talk.QUOTE))


def test_a_grant_of_the_two_phase_exchange() -> None:
    answer = talk.grant_answer(boot_token=None, luks_quote_nonce="11" * 32)
    grant = Playbook((Send, answer), aside=talk.calm()).run(attest_boot(talk.SETTINGS, talk.NONCE, talk.QUOTE))
    assert (grant.boot_token, grant.luks_quote_nonce) == (None, Secret(b"11" * 32))
    with pytest.raises(LocalProtocolError, match="two-phase"):
        Playbook(aside=talk.calm()).run(sync_volumes(grant, BOTH))
    with pytest.raises(LocalProtocolError, match="two-phase"):
        Playbook(aside=talk.calm()).run(read_cache_passphrase(grant))


# --- sync ---


def test_a_sync() -> None:
    assert Playbook((SYNC, talk.keys_answer()), aside=talk.calm()).run(sync_volumes(talk.GRANT, BOTH)) == KEYS


def test_a_key_may_format_only_a_blank_disk_that_is_not_in_use() -> None:
    for formatted, in_use in product((False, True), repeat=2):
        sync = (
            Send(talk.sync_request([*BOTH] if formatted else [])),
            talk.keys_answer(in_use=[*BOTH] if in_use else []),
        )
        volumes = dict.fromkeys(BOTH, formatted)
        keys = Playbook(sync, aside=talk.calm()).run(sync_volumes(talk.GRANT, volumes))
        for key in keys:
            assert (key.is_formatted, key.is_in_use, key.may_format) == (
                formatted,
                in_use,
                not formatted and not in_use,
            )


def test_keys_are_iterated_over_and_found_by_name() -> None:
    assert [*KEYS] == [STORAGE_KEY, CACHE_KEY]
    assert len(KEYS) == 2
    assert KEYS["tdx-cache"] is CACHE_KEY
    assert "storage" in KEYS
    assert "other" not in KEYS
    with pytest.raises(KeyError, match="other"):
        _ = KEYS["other"]


def test_the_keys_come_in_the_order_that_was_asked() -> None:
    answer = talk.answer({"tdx-cache": talk.CACHE, "storage": talk.STORAGE})  # a server that knows no in_use
    keys = Playbook((SYNC, answer), aside=talk.calm()).run(sync_volumes(talk.GRANT, BOTH))
    assert [key.volume for key in keys] == ["storage", "tdx-cache"]
    assert not any(key.is_in_use for key in keys)


@pytest.mark.parametrize("failure", PASSING.values(), ids=PASSING.keys())
def test_a_sync_without_an_answer_is_sent_again_byte_for_byte(failure: object) -> None:
    script: list[Any] = [(SYNC, failure), (Sleep, None), (SYNC, failure), (Sleep, None), (SYNC, talk.keys_answer())]
    assert Playbook(*script, aside=talk.calm()).run(sync_volumes(talk.GRANT, BOTH)) == KEYS


@pytest.mark.parametrize(("status", "kind"), FINAL.items())
@pytest.mark.parametrize("code", ["boot_token_invalid", "vm_name_mismatch"])
def test_a_refused_sync_is_not_sent_again(status: int, kind: type[ChutesError], code: str) -> None:
    with pytest.raises(kind, match=code):
        Playbook((SYNC, talk.refused(status, code)), aside=talk.calm()).run(sync_volumes(talk.GRANT, BOTH))


@pytest.mark.parametrize(
    "content",
    [
        {"storage": talk.STORAGE, "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": talk.CACHE, "other": talk.CACHE, "in_use": []},
        {"storage": talk.STORAGE, "tdx-cach\u00e9": talk.CACHE, "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": "", "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": None, "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": ["c0"], "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": "c0\n", "in_use": []},
        {"storage": talk.STORAGE, "tdx-cache": talk.CACHE, "in_use": ["elsewhere"]},
        {"storage": talk.STORAGE, "tdx-cache": talk.CACHE, "in_use": "storage"},
        [talk.STORAGE, talk.CACHE],
        {},
    ],
    ids=lambda content: json.dumps(content)[:60],
)
def test_an_answer_about_other_volumes_than_asked_is_none(content: object) -> None:
    wrong = (SYNC, talk.answer(content))
    with pytest.raises(RemoteProtocolError):
        Playbook(wrong, (Sleep, None), wrong, aside=talk.calm()).run(
            sync_volumes(talk.GRANT, BOTH, retry=RetryPolicy(attempts=2))
        )


def test_one_volume_twice_in_an_answer_is_none() -> None:
    body = f'{{"storage":"{talk.STORAGE}","tdx-cache":"{talk.CACHE}","storage":"{talk.CACHE}","in_use":[]}}'
    book = Playbook((SYNC, HttpResponse(200, talk.JSON, body.encode())), aside=talk.calm())
    with pytest.raises(RemoteProtocolError):
        book.run(sync_volumes(talk.GRANT, BOTH, retry=RetryPolicy(attempts=1)))


@pytest.mark.parametrize(
    ("volumes", "why"),
    [
        ({}, "at least one name"),
        (["storage"], r"got \['storage'\]"),
        (None, "got None"),
        ({"storage": None}, "'storage': say True or False"),
        ({"storage": 1}, "'storage': say True or False"),
        ({b"storage": True}, "must be a string; got b'storage'"),
    ],
    ids=str,
)
def test_volumes_that_say_nothing_of_a_disk_are_not_sent(volumes: Any, why: str) -> None:
    for flow in (
        sync_volumes(talk.GRANT, volumes),
        boot_and_sync(talk.SETTINGS, volumes),
        attest_volumes(talk.SETTINGS, volumes),
        receive_keys(talk.SETTINGS, volumes),
    ):
        with pytest.raises(LocalProtocolError, match=why):
            Playbook().run(flow)


@pytest.mark.usefixtures("told_on_purpose")
@pytest.mark.parametrize("detail", [f"no: {talk.TOKEN}", [{"loc": ["header"], "msg": "no", "input": talk.TOKEN}]])
def test_a_token_that_a_server_repeats_is_in_no_error(detail: object) -> None:
    book = Playbook((SYNC, talk.refused(403, talk.TOKEN, detail)), aside=talk.calm())
    with pytest.raises(Refused) as caught:
        book.run(sync_volumes(talk.GRANT, BOTH))
    assert "no" in str(caught.value)
    assert talk.TOKEN not in f"{caught.value} {caught.value!r} {vars(caught.value)}"


# --- both in one ---


def test_boot_and_sync() -> None:
    book = Playbook(ASK_NONCE, MAKE_QUOTE, GRANTED, (SYNC, talk.keys_answer()), aside=talk.calm())
    assert book.run(boot_and_sync(talk.SETTINGS, BOTH)) == (talk.GRANT, KEYS)


def test_a_grant_that_is_held_is_used_first() -> None:
    book = Playbook((SYNC, talk.keys_answer()), aside=talk.calm())
    assert book.run(boot_and_sync(talk.SETTINGS, BOTH, grant=talk.GRANT)) == (talk.GRANT, KEYS)


def test_when_the_token_has_died_a_new_boot_begins() -> None:
    token = "71" * 32
    renewed = attrs.evolve(talk.GRANT, boot_token=Secret(token.encode()))
    headers = tuple((n, token if n == "x-boot-token" else v) for n, v in SYNC_REQUEST.headers)
    book = Playbook(
        (SYNC, CUT),
        (Sleep, None),
        (SYNC, talk.refused(401, "boot_token_invalid")),
        (Sleep, None),
        ASK_NONCE,
        MAKE_QUOTE,
        (talk.is_attestation, talk.grant_answer(boot_token=token)),
        (Send(attrs.evolve(SYNC_REQUEST, headers=headers)), talk.keys_answer()),
        aside=talk.calm(),
    )
    assert book.run(boot_and_sync(talk.SETTINGS, BOTH, grant=talk.GRANT)) == (renewed, KEYS)


def test_a_server_that_takes_no_token_is_not_asked_for_ever() -> None:
    once = (ASK_NONCE, MAKE_QUOTE, GRANTED, (SYNC, talk.refused(401, "boot_token_invalid")))
    pause = ((Sleep, None),)
    with pytest.raises(Refused, match="boot_token_invalid"):
        Playbook(*once, *pause, *once, *pause, *once, *pause, *once, aside=talk.calm()).run(
            boot_and_sync(talk.SETTINGS, BOTH)
        )


# --- the older images' read ---


def test_reading_the_cache_passphrase() -> None:
    book = Playbook(
        (Send(talk.ASK_PASSPHRASE), talk.refused(503)),
        (Sleep, None),
        (Send(talk.ASK_PASSPHRASE), talk.answer({"passphrase": talk.STORAGE})),
        aside=talk.calm(),
    )
    assert book.run(read_cache_passphrase(talk.GRANT)) == Secret(talk.STORAGE.encode())


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refused_read(status: int) -> None:
    with pytest.raises((BadRequest, Refused)):
        Playbook((Send, talk.refused(status)), aside=talk.calm()).run(read_cache_passphrase(talk.GRANT))


@pytest.mark.parametrize("content", [{"passphrase": ""}, {"passphrase": 1}, {}, []])
def test_an_empty_passphrase_is_none(content: object) -> None:
    with pytest.raises(RemoteProtocolError):
        Playbook((Send, talk.answer(content)), aside=talk.calm()).run(
            read_cache_passphrase(talk.GRANT, retry=RetryPolicy(attempts=1))
        )


# --- what the operator reads, and what callers get wrong ---


def test_the_console_of_a_boot() -> None:
    records: list[Record] = []
    book = Playbook(
        ASK_NONCE,
        MAKE_QUOTE,
        (talk.is_attestation, talk.refused(503, "collateral_unavailable", "Later.", retry_after="3")),
        (Sleep(3.0), None),
        ASK_NONCE,
        MAKE_QUOTE,
        (talk.is_attestation, talk.refused(403, "measurement_mismatch", "Wrong (RTMR1)")),
        aside={**talk.calm(), Entropy: lambda e: bytes(e.size), Log: lambda e: records.append(e.record)},
    )
    with pytest.raises(Refused):
        book.run(boot(talk.SETTINGS))
    assert [record.event for record in records] == [
        *(["boot_step"] * 3 + ["boot_delayed"]),
        *(["boot_step"] * 3 + ["boot_stopped"]),
    ]
    assert records[3].fields == {
        "step": "attestation",
        "attempt": "1/4",
        "seconds_left": 100.0,
        "wait": 3.0,
        "reason": "Later.",
        "code": "collateral_unavailable",
        "request_id": "r-1",
    }
    assert records[7].fields["reason"] == "Wrong (RTMR1)"
    assert records[7].fields["attempt"] == "2/4"


@pytest.mark.parametrize(
    "wrong",
    [
        {"miner_hotkey": ""},
        {"miner_hotkey": None},
        {"miner_hotkey": "5F\r\nx-boot-token: 1"},
        {"miner_hotkey": "gr\u00fcn"},
        {"vm_name": ""},
        {"vm_name": None},
        {"vm_name": "a/b"},
        {"vm_name": ".."},
        {"vm_name": "x" * 129},
        {"vm_name": "vm\n"},
        {"spki_sha256": b"short"},
    ],
    ids=str,
)
def test_settings_that_no_request_could_carry(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {"miner_hotkey": talk.HOTKEY, "vm_name": talk.VM, "spki_sha256": talk.DIGEST}
    with pytest.raises(LocalProtocolError):
        BootSettings(**{**good, **wrong})


def test_a_signer_needs_a_hotkey() -> None:
    with pytest.raises(LocalProtocolError, match="checksum"):
        _ = BootSettings(talk.HOTKEY[:-1] + "1", talk.VM, talk.DIGEST, signer=lambda _: bytes(64))


def test_what_is_secret_is_not_shown() -> None:
    for value in (talk.GRANT, KEYS):
        for secret in (talk.ROOT, talk.TOKEN, talk.STORAGE, talk.CACHE):
            assert secret not in repr(value)
    assert isinstance(talk.GRANT, BootGrant)
