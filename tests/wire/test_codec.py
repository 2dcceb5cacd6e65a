"""Messages to HTTP and back, and what is refused on the way."""

from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given
from hypothesis import strategies as st

from chutes_proto._converter import MOST
from chutes_proto.errors import BadRequest, Refusal, Refused, RemoteProtocolError, Unavailable
from chutes_proto.secret import Secret
from chutes_proto.wire import codec, endpoints, json, public, vms
from chutes_proto.wire.codec import error_response
from chutes_proto.wire.codes import NO_CODE, Code
from chutes_proto.wire.endpoint import Message, NonceAnswer
from chutes_proto.wire.http import HttpRequest, HttpResponse
from chutes_proto.wire.names import NAME_PATTERN, Name

NAMES = st.from_regex(NAME_PATTERN, fullmatch=True)
HEADERS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
VOLUMES = st.lists(st.text(max_size=20).filter(lambda s: s.isprintable()), max_size=4).map(tuple)


def matched(request: HttpRequest) -> endpoints.Match:
    match = endpoints.route(request.method, request.target.partition("?")[0])
    assert isinstance(match, endpoints.Match)
    return match


def sync(body: bytes, **changes: Any) -> HttpRequest:
    headers = (("x-boot-token", "t"), ("x-chutes-hotkey", "5F"), ("content-type", "application/json"))
    return evolve(HttpRequest("POST", "/servers/vm/luks", headers, body), **changes)


def problems(request: HttpRequest) -> list[tuple[Any, ...]]:
    with pytest.raises(BadRequest) as caught:
        codec.decode_request(matched(request), request)
    assert (caught.value.status, caught.value.code) == (422, Code.VALIDATION_ERROR)
    assert isinstance(caught.value.detail, list)
    for problem in caught.value.detail:
        assert list(problem) == ["type", "loc", "msg"]
    return [(problem["type"], problem["loc"]) for problem in caught.value.detail]


requests = st.one_of(
    st.builds(vms.BootNonceRequest, miner_hotkey=st.none() | st.text(max_size=60).filter(lambda s: s.isprintable())),
    st.builds(
        vms.BootAttestationRequest,
        quote=st.text(max_size=80).filter(lambda s: s.isprintable()),
        vm_name=NAMES,
        miner_hotkey=HEADERS,
        nonce=st.none() | HEADERS,
        hotkey=st.none() | HEADERS,
        signature=st.none() | HEADERS,
    ),
    st.builds(vms.CachePassphraseRequest, vm_name=NAMES, hotkey=st.none() | HEADERS, boot_token=st.none() | HEADERS),
    st.builds(
        vms.VolumeSyncRequest,
        vm_name=NAMES,
        hotkey=st.none() | HEADERS,
        hotkey_query=st.none() | HEADERS,
        boot_token=st.none() | HEADERS,
        volumes=VOLUMES,
        rekey=st.none() | VOLUMES,
        formatted=st.none() | VOLUMES,
    ),
    st.builds(
        vms.VolumeAttestationRequest,
        vm_name=NAMES,
        hotkey=st.none() | HEADERS,
        quote_nonce=st.none() | HEADERS,
        quote=st.text(max_size=80).filter(lambda s: s.isprintable()),
        volumes=VOLUMES,
        formatted=st.none() | VOLUMES,
    ),
    st.builds(
        vms.VolumeConfirmationRequest,
        vm_name=NAMES,
        hotkey=st.none() | HEADERS,
        confirm_nonce=st.none() | HEADERS,
        volumes=st.dictionaries(NAMES, st.builds(vms.VolumeConfirmation, rotated=st.booleans()), max_size=3),
    ),
    st.just(public.PublicRequest()),
)


@given(requests)
def test_a_request_survives_the_wire(message: Message) -> None:
    endpoint = next(e for e in endpoints.ENDPOINTS if e.request is type(message))
    request = codec.encode_request(endpoint, message)
    match = matched(request)
    assert match.endpoint is endpoint
    assert codec.decode_request(match, request) == message


SECRETS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1).map(lambda s: Secret(s.encode()))
answers = st.one_of(
    st.builds(NonceAnswer, nonce=HEADERS, expires_at=HEADERS),
    st.builds(
        vms.BootAttestationAnswer,
        key=SECRETS,
        boot_token=st.none() | SECRETS,
        luks_quote_nonce=st.none() | SECRETS,
    ),
    st.builds(vms.CachePassphraseAnswer, passphrase=SECRETS),
    st.builds(
        vms.VolumeSyncAnswer,
        passphrases=st.dictionaries(NAMES.filter(lambda n: n != "in_use"), SECRETS, max_size=3).map(
            lambda d: tuple(d.items())
        ),
        in_use=st.lists(NAMES, max_size=3).map(tuple),
    ),
    st.builds(
        vms.VolumeAttestationAnswer,
        volumes=st.dictionaries(
            NAMES, st.builds(vms.VolumePair, current=st.none() | SECRETS, next=SECRETS), max_size=3
        ),
        confirm_nonce=SECRETS,
        k3s_encryption_key=SECRETS,
        in_use=st.lists(NAMES, max_size=3).map(tuple),
    ),
    st.builds(
        vms.VolumeConfirmationAnswer,
        status=HEADERS,
        volumes=st.dictionaries(NAMES, st.builds(vms.VolumeResult, result=HEADERS), max_size=3),
    ),
)


@given(answers)
def test_an_answer_survives_the_wire(answer: Message) -> None:
    endpoint = next(e for e in endpoints.ENDPOINTS if e.answer is type(answer))
    response = codec.encode_answer(endpoint, answer)
    assert (response.status, response.header("content-type")) == (200, "application/json")
    assert codec.decode_answer(endpoint, response) == answer


def test_answers_are_compact_and_in_order() -> None:
    grant = vms.BootAttestationAnswer(key=Secret(b"k1"), boot_token=Secret(b"t1"))
    assert codec.encode_answer(vms.BOOT_ATTESTATION, grant).body == b'{"key":"k1","boot_token":"t1"}'
    two_phase = vms.BootAttestationAnswer(key=Secret(b"k1"), boot_token=None, luks_quote_nonce=Secret(b"n"))
    body = codec.encode_answer(vms.BOOT_ATTESTATION, two_phase).body
    assert body == b'{"key":"k1","boot_token":null,"luks_quote_nonce":"n"}'
    keys = vms.VolumeSyncAnswer(
        passphrases=(("tdx-cache", Secret(b"b")), ("storage", Secret(b"a"))), in_use=("storage",)
    )
    body = codec.encode_answer(vms.VOLUME_SYNC, keys).body
    assert body == b'{"tdx-cache":"b","storage":"a","in_use":["storage"]}'
    handed = vms.VolumeAttestationAnswer(
        volumes={
            "storage": vms.VolumePair(current=None, next=Secret(b"n")),
            "tdx-cache": vms.VolumePair(current=Secret(b"c"), next=Secret(b"d")),
        },
        confirm_nonce=Secret(b"m"),
        k3s_encryption_key=Secret(b"k"),
        in_use=("storage",),
    )
    assert codec.encode_answer(vms.VOLUME_ATTESTATION, handed).body == (
        b'{"volumes":{"storage":{"current":null,"next":"n"},"tdx-cache":{"current":"c","next":"d"}},'
        b'"confirm_nonce":"m","k3s_encryption_key":"k","in_use":["storage"]}'
    )
    older = b'{"volumes":{},"confirm_nonce":"m","k3s_encryption_key":"k"}'
    decoded = codec.decode_answer(vms.VOLUME_ATTESTATION, HttpResponse(200, body=older))
    assert decoded == vms.VolumeAttestationAnswer(
        volumes={}, confirm_nonce=Secret(b"m"), k3s_encryption_key=Secret(b"k"), in_use=()
    )


def test_all_problems_of_a_confirmation_come_in_one_answer() -> None:
    body = b'{"volumes":{"a secret name":{"rotated":1},"b":{},"c":[],"d":{"rotated":true}}}'
    assert problems(HttpRequest("POST", "/servers/vm/luks/confirm", (), body)) == [
        ("bool_type", ["body", "volumes", 0, "rotated"]),
        ("missing", ["body", "volumes", 1, "rotated"]),
        ("dict_type", ["body", "volumes", 2]),
    ]
    listed = HttpRequest("POST", "/servers/vm/luks/confirm", (), b'{"volumes":["storage"]}')
    assert problems(listed) == [("dict_type", ["body", "volumes"])]


def test_all_problems_come_in_one_answer() -> None:
    body = b'{"volumes":[1,2],"rekey":"storage","formatted":{},"more":1}'
    assert problems(sync(body, target="/servers/a%20b/luks")) == [
        ("string_pattern_mismatch", ["path", "vm_name"]),
        ("string_type", ["body", "volumes", 0]),
        ("string_type", ["body", "volumes", 1]),
        ("list_type", ["body", "rekey"]),
        ("list_type", ["body", "formatted"]),
    ]


def test_a_small_request_has_no_large_answer() -> None:
    gpus = HttpRequest("POST", "/servers/", (), b'{"host":"h","id":"i","gpus":[' + b"{}," * 20_000 + b"{}]}")
    assert len(problems(gpus)) == MOST
    assert len(problems(sync(b'{"volumes":[' + b"0," * 30_000 + b"0]}"))) == MOST


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", ("missing", ["body"])),
        (b"[]", ("model_attributes_type", ["body"])),
        (b"null", ("model_attributes_type", ["body"])),
        (b"{", ("json_invalid", ["body"])),
        (b'{"volumes":["a"],"volumes":["b"]}', ("json_invalid", ["body"])),
        (b"{}", ("missing", ["body", "volumes"])),
        (b'{"volumes":null}', ("list_type", ["body", "volumes"])),
        (b'{"volumes":"ab"}', ("list_type", ["body", "volumes"])),
        (b'{"volumes":[null]}', ("string_type", ["body", "volumes", 0])),
        (b'{"volumes":[true]}', ("string_type", ["body", "volumes", 0])),
    ],
)
def test_bad_bodies(body: bytes, expected: tuple[Any, ...]) -> None:
    assert problems(sync(body)) == [expected]


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "a" * 129, "a\n", "\x00", ".", ".."])
def test_bad_names(name: str) -> None:
    body = json.encode({"quote": "", "vm_name": name, "miner_hotkey": "x"})
    request = HttpRequest("POST", "/servers/boot/attestation", (), body)
    assert problems(request) == [("string_pattern_mismatch", ["body", "vm_name"])]


@pytest.mark.parametrize(
    ("request_", "loc"),
    [
        (HttpRequest("GET", "/servers/nonce?miner_hotkey=a%00b"), ["query", "miner_hotkey"]),
        (HttpRequest("GET", "/servers/vm/luks?hotkey=%00", (("x-boot-token", "t"),)), ["query", "hotkey"]),
        (sync(b'{"volumes":["a\\u0000"]}'), ["body", "volumes", 0]),
        (
            HttpRequest(
                "POST", "/servers/boot/attestation", (), b'{"quote":"","vm_name":"a","miner_hotkey":"\\u0000"}'
            ),
            ["body", "miner_hotkey"],
        ),
    ],
)
def test_no_text_has_a_nul_character(request_: HttpRequest, loc: list[object]) -> None:
    assert problems(request_) == [("value_error", loc)]


def test_an_error_never_repeats_the_input() -> None:
    request = sync(b'{"volumes":"s3cret","rekey":{"s3cret":1},"formatted":["x",{"s3cret":2}]}')
    with pytest.raises(BadRequest) as caught:
        codec.decode_request(matched(request), request)
    assert b"s3cret" not in error_response(caught.value, "r").body


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "application/jsonx", "", "application/ json"])
def test_other_content_types(kind: str) -> None:
    request = sync(b'{"volumes":["a"]}', headers=(("content-type", kind),))
    assert problems(request) == [("model_attributes_type", ["body"])]


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_json_content_types(kind: str) -> None:
    request = sync(b'{"volumes":["a"]}', headers=(("content-type", kind),))
    assert codec.decode_request(matched(request), request) == vms.VolumeSyncRequest(vm_name=Name("vm"), volumes=("a",))


def test_an_absent_content_type_is_json() -> None:
    request = sync(b'{"volumes":["a"],"sync":true}', headers=())
    assert codec.decode_request(matched(request), request) == vms.VolumeSyncRequest(vm_name=Name("vm"), volumes=("a",))


@pytest.mark.parametrize(
    "change",
    [
        {"headers": (("x-boot-token", "a"), ("x-boot-token", "a"))},
        {"headers": (("content-type", "application/json"), ("content-type", "application/json"))},
        {"target": "/servers/vm/luks?hotkey=a&hotkey=a"},
    ],
)
def test_what_comes_twice_is_refused(change: dict[str, Any]) -> None:
    request = sync(b'{"volumes":["a"]}', **change)
    with pytest.raises(BadRequest) as caught:
        codec.decode_request(matched(request), request)
    assert (caught.value.status, caught.value.code) == (400, Code.BAD_REQUEST)


@given(st.binary(max_size=120))
def test_any_body_is_decoded_or_a_422(body: bytes) -> None:
    request = sync(body)
    try:
        codec.decode_request(matched(request), request)
    except BadRequest as caught:
        refusal = caught
    else:
        return
    assert refusal.status == 422
    assert error_response(refusal, "r").body.isascii()


@pytest.mark.parametrize("text", ["a", "ab=c", "====", "a b=", "YQ", "YQ==\n", "YQ==YQ==", "\u00e9", "YQ-_"])
def test_base64_is_strict(text: str) -> None:
    with pytest.raises(Refused, match=r"Invalid base64 quote\."):
        codec.decode_quote(text)


@given(st.binary(max_size=60))
def test_base64_round_trip(data: bytes) -> None:
    assert codec.decode_quote(codec.encode_quote(data)) == data


def test_a_refusal_comes_back_as_the_one_that_was_raised() -> None:
    for refusal in (
        Refused(Code.MEASUREMENT_MISMATCH, "no (RTMR1)"),
        BadRequest(Code.VALIDATION_ERROR, [{"type": "missing", "loc": ["body"], "msg": "Field required"}]),
        Unavailable(Code.STORE_UNAVAILABLE, "later", retry_after=7),
    ):
        with pytest.raises(type(refusal)) as caught:
            codec.decode_answer(vms.BOOT_NONCE, error_response(refusal, "ab12"))
        back = caught.value
        assert (back.code, back.detail, back.status) == (refusal.code, refusal.detail, refusal.status)
        assert back.request_id == "ab12"
        assert not isinstance(refusal, Unavailable) or (isinstance(back, Unavailable) and back.retry_after == 7)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b""),
        (200, b"[]"),
        (200, b'{"key":"k"}'),
        (200, b'{"key":"","boot_token":null}'),
        (200, b'{"key":1,"boot_token":null}'),
        (200, b'{"key":"a\\u0000","boot_token":null}'),
        (200, b'{"key":"k","key":"k","boot_token":null}'),
        (200, b"\xff\xfe"),
        (204, b'{"key":"k","boot_token":null}'),
        (302, b""),
        (100, b""),
    ],
)
def test_answers_that_are_neither_grant_nor_refusal(status: int, body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        codec.decode_answer(vms.BOOT_ATTESTATION, HttpResponse(status, (), body))


@pytest.mark.parametrize("request_id", ["$(reboot)", "-x", "a b", "a;b", "a\n", "`a`", "", "a" * 129])
def test_the_id_of_a_request_is_a_word(request_id: str) -> None:
    """It is printed in a command, which an operator pastes."""
    body = json.encode({"detail": "no", "code": request_id, "request_id": request_id})
    with pytest.raises(Refused) as caught:
        codec.decode_answer(vms.BOOT_NONCE, HttpResponse(403, (), body))
    assert (caught.value.request_id, caught.value.code) == (None, NO_CODE)


@pytest.mark.parametrize("detail", ["d" * 1_000_000, [{"loc": ["body"], "msg": "m" * 10_000}] * 50])
def test_the_text_of_a_refusal_is_not_endless(detail: object) -> None:
    """A mebibyte of a server's would push all else off the screen."""
    body = json.encode({"detail": detail, "code": "c" * 10_000, "request_id": "r" * 10_000})
    with pytest.raises(Refused) as caught:
        codec.decode_answer(vms.BOOT_NONCE, HttpResponse(403, (), body))
    assert len(str(caught.value)) < 3000


@given(st.integers(400, 599), st.binary(max_size=60))
@example(403, b"[]")
def test_any_error_page_is_a_refusal_with_its_status(status: int, body: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        codec.decode_answer(vms.BOOT_NONCE, HttpResponse(status, (("retry-after", "soon"),), body))
    assert caught.value.status == status
    assert isinstance(caught.value, Unavailable) == (status >= 500 or status == 429)
