"""The OpenAPI 3.1 document of this API: made from the endpoint table and the messages, nothing of it by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args, get_origin

import attrs

from chutes_proto import __version__
from chutes_proto.secret import Secret
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import (
    AT_LEAST,
    DESCRIPTION,
    DOCUMENTED_AS_REQUIRED,
    PLACE,
    Endpoint,
    sole_field,
    wire_name,
)
from chutes_proto.wire.endpoints import COMMON_CODES, ENDPOINTS
from chutes_proto.wire.fleet import HOST_PROFILE_KEYS, HostProfileRequest
from chutes_proto.wire.names import NAME_PATTERN, Name
from chutes_proto.wire.vms import VolumeSyncAnswer

_TITLE = "chutes-proto key server"
_ERROR: dict[str, object] = {"$ref": "#/components/schemas/Error"}
_INVALID: dict[str, object] = {"$ref": "#/components/schemas/ValidationError"}


def document(endpoints: Sequence[Endpoint] = ENDPOINTS) -> bytes:
    """Make the document, as the server answers it.

    Templates that differ in their parameters' names only are one path (OpenAPI 3.1, section 4.8.8.2), the first one's.
    """
    templates: dict[str, Endpoint] = {}
    paths: dict[str, dict[str, object]] = {}
    for endpoint in endpoints:
        template = templates.setdefault(re.sub(r"\{\w+\}", "{}", endpoint.path), endpoint)
        names = dict(zip(endpoint.parameters, template.parameters, strict=True))
        paths.setdefault(template.path, {})[endpoint.method.lower()] = _operation(endpoint, names)
    return json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": _TITLE, "version": __version__},
            "paths": paths,
            "components": {"schemas": _schemas()},
        }
    )


def _fields(message: type[Any]) -> Sequence[attrs.Attribute[Any]]:
    """The fields of a message with their types resolved."""
    fields: Sequence[attrs.Attribute[Any]] = attrs.fields(attrs.resolve_types(message))
    return fields


def _operation(endpoint: Endpoint, names: Mapping[str, str]) -> dict[str, object]:
    fields = [f for f in _fields(endpoint.request) if f.metadata[PLACE] != "body"]
    has_body = len(fields) < len(_fields(endpoint.request))
    operation: dict[str, object] = {
        "operationId": endpoint.operation,
        "summary": endpoint.summary,
        "description": f"Authentication: {endpoint.authentication}.",
        "parameters": [_parameter(field, names) for field in fields],
    }
    if has_body:
        content = {"application/json": {"schema": _reference(endpoint.request)}}
        operation["requestBody"] = {"required": True, "content": content}
    operation["responses"] = _responses(endpoint, takes_input=bool(fields) or has_body)
    return operation


def _parameter(field: attrs.Attribute[Any], names: Mapping[str, str]) -> dict[str, object]:
    place = field.metadata[PLACE]
    name = wire_name(field)
    return {
        "name": names.get(name, name) if place == "path" else name,
        "in": place,
        "required": place == "path" or field.metadata[DOCUMENTED_AS_REQUIRED],
        "description": field.metadata[DESCRIPTION],
        "schema": _schema(_present(field.type)),
    }


def _responses(endpoint: Endpoint, *, takes_input: bool) -> dict[str, object]:
    granted = _reference(endpoint.answer)
    codes = [*endpoint.codes, *COMMON_CODES, *([Code.VALIDATION_ERROR] if takes_input else [])]
    responses: dict[str, object] = {
        str(endpoint.status): {"description": "Granted", "content": {"application/json": {"schema": granted}}}
    }
    for status in sorted({code.status for code in codes}):
        lines = [f"`{code}`: {code.meaning}" for code in dict.fromkeys(codes) if code.status == status]
        schema = _INVALID if status == Code.VALIDATION_ERROR.status else _ERROR
        if endpoint.refusal is not None and status in (403, 409):
            schema = _error({"anyOf": [{"type": "string"}, _reference(endpoint.refusal)]})
        responses[str(status)] = {"description": "; ".join(lines), "content": {"application/json": {"schema": schema}}}
    return responses


def _reference(message: type[Any]) -> dict[str, object]:
    return {"$ref": f"#/components/schemas/{message.__name__}"}


def _schemas() -> dict[str, object]:
    schemas: dict[str, object] = {}
    for endpoint in ENDPOINTS:
        for message in (endpoint.request, endpoint.answer):
            _describe(message, schemas)
    schemas["Error"] = _error({"type": "string"})
    loc = {"type": "array", "items": {"type": ["string", "integer"]}}
    problem = {"type": {"type": "string"}, "loc": loc, "msg": {"type": "string"}}
    listed = {"type": "object", "properties": problem, "required": list(problem)}
    schemas["ValidationError"] = _error({"type": "array", "items": listed})
    return schemas


def _describe(message: type[Any], schemas: dict[str, object]) -> None:
    """Add the schema of a message's body, and those of the values in it."""
    fields = [f for f in _fields(message) if f.metadata[PLACE] == "body"]
    if not fields or message.__name__ in schemas:
        return
    schemas[message.__name__] = _object(message, fields)
    for field in fields:
        for kind in (_present(field.type), *get_args(field.type)):
            if attrs.has(cast("type[Any]", kind)):
                _describe(cast("type[Any]", kind), schemas)


def _object(message: type[Any], fields: Sequence[attrs.Attribute[Any]]) -> dict[str, object]:
    if message is HostProfileRequest:
        properties: dict[str, object] = {name: {"type": ["object", "array"]} for name in HOST_PROFILE_KEYS}
        return {"type": "object", "properties": properties, "additionalProperties": False}
    verbatim = sole_field(message, "BYTES") or sole_field(message, "OBJECT")
    if verbatim is not None:
        return {"type": "object", "description": next(f.metadata[DESCRIPTION] for f in fields if f.name == verbatim)}
    if message is VolumeSyncAnswer:
        in_use = {"type": "array", "items": {"type": "string"}}
        return {
            "type": "object",
            "description": "One member per volume with its passphrase, then `in_use` if the request has `formatted`.",
            "properties": {VolumeSyncAnswer.IN_USE: in_use},
            "additionalProperties": {"type": "string"},
        }
    name = sole_field(message, "LIST")
    if name is not None:
        return _schema(next(f.type for f in fields if f.name == name))
    properties = {f.name: _property(f) for f in fields}
    required = [f.name for f in fields if f.default is attrs.NOTHING]
    return {"type": "object", "properties": properties, "required": required}


def _property(field: attrs.Attribute[Any]) -> dict[str, object]:
    schema = _schema(field.type)
    if least := field.metadata.get(AT_LEAST):
        schema["minItems" if schema["type"] == "array" else "minProperties"] = least
    return {**schema, "description": field.metadata[DESCRIPTION]}


def _error(detail: dict[str, object]) -> dict[str, object]:
    code = {"type": "string", "enum": [str(code) for code in Code]}
    properties = {"detail": detail, "code": code, "request_id": {"type": "string"}}
    return {"type": "object", "properties": properties, "required": list(properties)}


_PLAIN: Mapping[type[Any], str] = {str: "string", Secret: "string", int: "integer", float: "number", bool: "boolean"}


def _schema(kind: object) -> dict[str, object]:
    """The JSON schema of a field's type."""
    if kind is Name:
        return {"type": "string", "pattern": NAME_PATTERN}
    if isinstance(kind, type) and kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if isinstance(kind, type) and attrs.has(kind):
        return _reference(kind)
    if kind is object:
        return {}
    if get_origin(kind) is Mapping:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1])}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0])}
    variant = _present(kind)
    if variant is kind:
        raise TypeError(f"no JSON schema for {kind!r}")
    schema = _schema(variant)
    if "$ref" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [cast("str", schema["type"]), "null"]}


def _present(kind: object) -> object:
    """A type without its ``None``."""
    variants = [variant for variant in get_args(kind) if variant is not type(None)]
    return variants[0] if type(None) in get_args(kind) and len(variants) == 1 else kind
