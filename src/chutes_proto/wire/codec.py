"""Convert messages to HTTP and back, for both sides, driven by the endpoint table.

Rules kept here:

* a request is decoded whole or not at all, and one 422 lists all of its problems, without repeating the input;
* types are strict: a number is not a string, a string is not a list;
* no text has a NUL character: PostgreSQL stores none and compares with none, so a stranger's would look like its fault;
* members that a message does not know are ignored;
* a declared header or query parameter that comes twice is a 400: two readers could see two callers;
* an answer of the server that does not decode is a `RemoteProtocolError`, never half a value.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast
from urllib.parse import parse_qsl, quote, urlencode

import attrs

from chutes_proto._converter import MismatchError, ProblemsError, StrictConverter, list_of, string, valid_list
from chutes_proto.errors import (
    BadRequest,
    Refusal,
    Refused,
    RemoteProtocolError,
    Unavailable,
    ValidationProblem,
    refusal,
)
from chutes_proto.secret import Secret
from chutes_proto.wire import json
from chutes_proto.wire.codes import NO_CODE, Code
from chutes_proto.wire.endpoint import PLACE, Endpoint, Message, sole_field, wire_name
from chutes_proto.wire.http import Headers, HttpRequest, HttpResponse
from chutes_proto.wire.names import NAME_PATTERN, Name
from chutes_proto.wire.vms import VolumeSyncAnswer

if TYPE_CHECKING:
    from chutes_proto.wire.endpoints import Match

T = TypeVar("T")

_NAME = re.compile(NAME_PATTERN, re.ASCII)
_JSON_TYPE = re.compile(r"\s*application/(?:json|[!-~]+\+json)\s*(?:;.*)?", re.IGNORECASE)
JSON_HEADERS = (("content-type", "application/json"),)
_PLACES = ("path", "query", "header", "body")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")
_LONGEST_TEXT = 2000
_LARGEST_LIST = 32 * 1024
"""The most bytes of a refusal whose list of problems is shown."""


# --- requests ---


def encode_request(endpoint: Endpoint, message: Message, headers: Headers = ()) -> HttpRequest:
    """Encode ``message`` as a request to ``endpoint``; fields that are None are left out."""
    values: dict[str, dict[str, Any]] = {place: {} for place in _PLACES}
    for attribute in attrs.fields(type(message)):
        value = getattr(message, attribute.name)
        if value is not None:
            values[_place(attribute)][wire_name(attribute)] = _CONVERTER.unstructure(value)
    path = "/".join(
        quote(values["path"][segment[1:-1]], safe="") if segment.startswith("{") else segment
        for segment in endpoint.path.split("/")
    )
    target = f"{path}?{urlencode(values['query'])}" if values["query"] else path
    fields = tuple((name.lower(), value) for name, value in values["header"].items())
    if not any(_place(attribute) == "body" for attribute in attrs.fields(endpoint.request)):
        return HttpRequest(endpoint.method, target, (*fields, *headers))
    whole = sole_field(endpoint.request, "OBJECT")
    content = json.encode(values["body"] if whole is None else values["body"][whole])
    return HttpRequest(endpoint.method, target, (*fields, *JSON_HEADERS, *headers), content)


def decode_request(match: Match, request: HttpRequest) -> Message:
    """Decode the message of ``request``. Raises `BadRequest` (400, 422)."""
    places = _places(match.endpoint.request)
    raw: dict[str, Any] = {}
    for place, names in places.items():
        source = _SOURCES[place](match, request, names)
        raw.update([(field, source[name]) for name, field in names.items() if name in source])
    try:
        return _CONVERTER.structure(raw, match.endpoint.request)
    except ProblemsError as exc:
        origins = {field: [place, name] for place, names in places.items() for name, field in names.items()}
        problems: list[ValidationProblem] = [
            {"type": p.kind, "loc": [*origins[str(p.path[0])], *p.path[1:]], "msg": p.msg} for p in exc.problems
        ]
        raise BadRequest(Code.VALIDATION_ERROR, problems) from None


def decode_list(data: bytes, kind: type[T]) -> tuple[T, ...]:
    """Decode a JSON list of one kind of a message's parts. Raises `ValueError`, whose text repeats none of it."""
    return _CONVERTER.structure(json.decode(data), tuple[kind, ...])  # type: ignore[valid-type]


def decode_quote(text: str) -> bytes:
    """Decode the quote of an attestation: standard base64 with padding (RFC 4648, section 4). Raises `Refused`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(Code.QUOTE_MALFORMED, "Invalid base64 quote.") from None


def encode_quote(data: bytes) -> str:
    """Encode a quote as `decode_quote` reads it."""
    return base64.b64encode(data).decode("ascii")


# --- answers ---


def encode_answer(endpoint: Endpoint, answer: Message) -> HttpResponse:
    """Encode an answer: compact JSON, members in the documented order."""
    return HttpResponse(endpoint.status, JSON_HEADERS, _answer_content(answer))


def plain(message: Message) -> dict[str, object]:
    """A message as plain data, for the detail of a refusal."""
    return cast("dict[str, object]", _CONVERTER.unstructure(message))


def error_response(refusal: Refusal, request_id: str) -> HttpResponse:
    """``{"detail","code","request_id"}`` with the refusal's status, and ``Retry-After`` where trying again may help."""
    headers = (*JSON_HEADERS, *refusal.headers)
    if isinstance(refusal, Unavailable):
        headers = (*headers, ("retry-after", str(refusal.retry_after)))
    content = {"detail": refusal.detail, "code": str(refusal.code), "request_id": request_id}
    return HttpResponse(refusal.status, headers, json.encode(content))


def _answer_content(answer: Message) -> bytes:
    match answer:
        case VolumeSyncAnswer(passphrases=passphrases, in_use=in_use):
            members: dict[str, object] = {volume: _CONVERTER.unstructure(secret) for volume, secret in passphrases}
            return json.encode(members if in_use is None else {**members, VolumeSyncAnswer.IN_USE: list(in_use)})
        case _ if (verbatim := sole_field(type(answer), "BYTES")) is not None:
            return cast("bytes", getattr(answer, verbatim))
        case _:
            name = sole_field(type(answer), "LIST")
            return json.encode(_CONVERTER.unstructure(answer if name is None else getattr(answer, name)))


def decode_answer(endpoint: Endpoint, response: HttpResponse) -> Message:
    """Decode the answer in ``response``.

    Raises the `Refusal` that the server raised, or `RemoteProtocolError` where the bytes are neither.
    """
    if response.status != endpoint.status:
        raise _refusal(response)
    if (verbatim := sole_field(endpoint.answer, "BYTES")) is not None:
        return endpoint.answer(**{verbatim: response.body})
    name = sole_field(endpoint.answer, "LIST")
    content = _answer_object(response) if name is None else {name: _answer_json(response)}
    if endpoint.answer is VolumeSyncAnswer:
        in_use = content.pop(VolumeSyncAnswer.IN_USE, None)
        content = {"passphrases": list(content.items()), "in_use": in_use}
    try:
        return _CONVERTER.structure(content, endpoint.answer)
    except ProblemsError as exc:
        raise RemoteProtocolError(f"the server's answer is not what it should be: {exc}") from None


def _answer_json(response: HttpResponse) -> Any:
    try:
        return json.decode(response.body)
    except json.JsonError as exc:
        raise RemoteProtocolError(
            f"the server answered {response.status} with bytes that are not JSON: {exc}"
        ) from None


def _answer_object(response: HttpResponse) -> dict[str, Any]:
    content = _answer_json(response)
    if not isinstance(content, dict):
        raise RemoteProtocolError(f"the server answered {response.status} with JSON that is not an object")
    return cast("dict[str, Any]", content)


def _refusal(response: HttpResponse) -> Refusal:
    """Decode a refusal, of this server or of a proxy in front of it.

    It is shown to people: texts are cut, and a request's id, which people put into a command, is a word.
    """
    if not 400 <= response.status < 600:
        raise RemoteProtocolError(f"the server answered {response.status}, which is neither a grant nor a refusal")
    content: dict[str, Any] = {}
    with suppress(RemoteProtocolError):  # a proxy's error page: its status still counts
        content = _answer_object(response)
    detail, code, request_id = (content.get(name) for name in ("detail", "code", "request_id"))
    is_problems = isinstance(detail, list) and all(isinstance(item, dict) for item in cast("list[object]", detail))
    if isinstance(detail, str):
        detail = detail if len(detail) <= _LONGEST_TEXT else f"{detail[:_LONGEST_TEXT]}…"
    elif not is_problems or len(response.body) > _LARGEST_LIST:
        detail = f"HTTP status {response.status}, without a text of a key server"
    return refusal(
        response.status,
        _word(code) or NO_CODE,
        cast("Any", detail),
        retry_after=_retry_after(response),
        request_id=_word(request_id),
    )


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _retry_after(response: HttpResponse) -> int:
    """Seconds of ``Retry-After``; the form with a date (RFC 9110 section 10.2.3) counts as the default."""
    text = response.header("retry-after") or ""
    return int(text) if re.fullmatch(r"[0-9]{1,5}", text) else 2


# --- the parts of a request ---


def _place(attribute: attrs.Attribute[Any]) -> str:
    return cast("str", attribute.metadata[PLACE])


@cache
def _places(message_type: type[Message]) -> Mapping[str, Mapping[str, str]]:
    """The names on the wire in each place of a request that the message is in, and the fields that they are."""
    places: dict[str, dict[str, str]] = {place: {} for place in _PLACES}
    for attribute in attrs.fields(message_type):
        places[_place(attribute)][wire_name(attribute)] = attribute.name
    return {place: names for place, names in places.items() if names}


def _query(_: Match, request: HttpRequest, names: Container[str]) -> dict[str, str]:
    pairs = parse_qsl(request.target.partition("?")[2], keep_blank_values=True, encoding="utf-8", errors="replace")
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise BadRequest(Code.BAD_REQUEST, f"The query parameter {name} is given twice")
        if name in names:
            values[name] = value
    return values


def decode_headers(request: HttpRequest, names: Iterable[str]) -> dict[str, str]:
    """Read the headers ``names``, as far as they are present. Raises `BadRequest` for one that is present twice."""
    values: dict[str, str] = {}
    given = [name for name, _ in request.headers]
    for name in names:
        key = name.lower()
        if key in given:
            if given.count(key) > 1:
                raise BadRequest(Code.BAD_REQUEST, f"The header {name} is given twice")
            values[name] = request.headers[given.index(key)][1]
    return values


def _body(match: Match, request: HttpRequest, _: object) -> dict[str, Any]:
    content_type = decode_headers(request, ["Content-Type"]).get("Content-Type", "application/json")
    not_an_object = "Input should be a valid dictionary or object to extract fields from"
    if not _JSON_TYPE.fullmatch(content_type):
        _invalid_body("model_attributes_type", not_an_object)
    if not request.body:
        _invalid_body("missing", "Field required")
    try:
        value = json.decode(request.body)
    except json.JsonError as exc:
        _invalid_body("json_invalid", f"JSON decode error: {exc}")
    if not isinstance(value, dict):
        _invalid_body("model_attributes_type", not_an_object)
    whole = sole_field(match.endpoint.request, "OBJECT")
    return cast("dict[str, Any]", value) if whole is None else {whole: value}


_SOURCES: Mapping[str, Callable[[Match, HttpRequest, Any], Mapping[str, Any]]] = {
    "path": lambda match, _, __: match.parameters,
    "query": _query,
    "header": lambda _, request, names: decode_headers(request, names),
    "body": _body,
}


def _invalid_body(kind: str, msg: str) -> NoReturn:
    raise BadRequest(Code.VALIDATION_ERROR, [{"type": kind, "loc": ["body"], "msg": msg}])


# --- strict structuring ---


def _text(value: object, kind: object) -> str:
    text = string(value, kind)
    if "\0" in text:
        raise MismatchError("value_error", "Input should have no NUL character")
    return text


def _name(value: object, _: object) -> str:
    text = string(value)
    if not _NAME.fullmatch(text):
        raise MismatchError("string_pattern_mismatch", f"String should match pattern '{NAME_PATTERN}'")
    return text


def _secret(value: object, _: object = None) -> Secret:
    text = string(value)
    if not text or not text.isascii() or not text.isprintable():
        raise MismatchError("value_error", "Input should be printable ASCII, and not empty")
    return Secret(text.encode("ascii"))


def _passphrase(value: object) -> tuple[str, Secret]:
    name, secret = cast("tuple[str, object]", value)
    return name, _secret(secret)


_CONVERTER = StrictConverter(
    {str: _text, Name: _name, Secret: _secret, tuple[tuple[str, Secret], ...]: list_of(_passphrase, valid_list)},
    plain={Secret: lambda secret: secret.reveal().decode("ascii")},
    omit_none=True,
)
