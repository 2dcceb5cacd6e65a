"""The endpoint table: the one list of operations.

The client's encoder, the server's router and decoder, the OpenAPI document and the reference are made from it.

Rules of routing: a fixed path wins over one with parameters; ``%2F`` never stands for a separator and matches nothing;
HEAD is served wherever GET is (RFC 9110, section 9.3.2); another verb is 405 with ``Allow``; a path that only lacks or
has too much of a final slash is redirected with 307.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

from attrs import frozen

from chutes_proto.wire import fleet, miners, public, vms
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import PARAMETER, Endpoint

_SEGMENT = r"((?:[^/%]|%[0-9A-Fa-f]{2})+)"

_ByMethod: TypeAlias = Mapping[str, Endpoint]

COMMON_CODES = (
    Code.BAD_REQUEST,
    Code.REQUEST_TIMEOUT,
    Code.BODY_TOO_LARGE,
    Code.RATE_LIMITED,
    Code.HEAD_TOO_LARGE,
    Code.SERVER_FAULT,
)
"""The codes that any request may be answered with, besides those of its operation."""

ENDPOINTS: tuple[Endpoint, ...] = (
    vms.BOOT_NONCE,
    vms.BOOT_ATTESTATION,
    vms.CACHE_PASSPHRASE,
    vms.VOLUME_SYNC,
    miners.REGISTER_SERVER,
    miners.LIST_SERVERS,
    miners.RENAME_SERVER,
    miners.SERVER_DETAILS,
    miners.REMOVE_SERVER,
    miners.RUNTIME_NONCE,
    miners.RUNTIME_ATTESTATION,
    miners.ATTESTATION_STATUS,
    vms.VOLUME_ATTESTATION,
    vms.VOLUME_CONFIRMATION,
    public.MEASUREMENTS,
    public.API_DESCRIPTION,
    vms.PROVISION,
    vms.PROVISION_CONFIRMATION,
    public.SIGNING_KEYS,
    fleet.MAINTENANCE_POLICY,
    fleet.MAINTENANCE_PREFLIGHT,
    fleet.BEGIN_MAINTENANCE,
    fleet.INVENTORY,
    fleet.RUNNING_GPUS,
    fleet.TDX_HOST_STATUS,
    fleet.SNP_HOST_STATUS,
    fleet.REGISTER_HOST_PROFILE,
    fleet.HOST_PROFILES,
    fleet.HOST_PREFLIGHT,
)


@frozen
class Match:
    """The operation of a request, with the path's parameters, percent-decoded."""

    endpoint: Endpoint
    parameters: dict[str, str]


@frozen
class WrongMethod:
    """The path is known, under these other verbs."""

    allow: tuple[str, ...]


@frozen
class Redirect:
    """The path is known with, or without, a final slash.

    ``path`` is relative to the one that was asked for, so that it holds behind a proxy and under a mount.
    """

    path: str


Routed: TypeAlias = Match | WrongMethod | Redirect | None


def route(method: str, path: str) -> Routed:
    """Route a request line; ``path`` is still percent-encoded and without its query."""
    here, values = _found(path)
    endpoint = here.get("GET" if method == "HEAD" else method)
    if endpoint is not None:
        parameters = _parameters(endpoint, values)
        return None if parameters is None else Match(endpoint, parameters)
    if here:
        return WrongMethod(tuple(dict.fromkeys(verb for endpoint in here.values() for verb in _verbs(endpoint))))
    stem = path.removesuffix("/")
    last = stem.rpartition("/")[2]
    other, reference = (path + "/", f"./{last}/") if path == stem else (stem, f"../{last}")
    return Redirect(reference) if _found(other)[0] else None


def largest_body(method: str, target: str, usual: int) -> int:
    """How many bytes a request's body may have: the usual number, or more where its operation needs more."""
    if usual >= _most():
        return usual
    found = route(method, target.partition("?")[0])
    return max(usual, found.endpoint.body_bytes) if isinstance(found, Match) else usual


@cache
def _most() -> int:
    return max(endpoint.body_bytes for endpoint in ENDPOINTS)


def _verbs(endpoint: Endpoint) -> tuple[str, ...]:
    return ("GET", "HEAD") if endpoint.method == "GET" else (endpoint.method,)


def _found(path: str) -> tuple[_ByMethod, tuple[str, ...]]:
    """The endpoints of a path, empty for an unknown one, and the values of its parameters."""
    fixed, templates = _routes()
    if path in fixed:
        return fixed[path], ()
    for pattern, endpoints in templates:
        match = pattern.fullmatch(path)
        if match is not None:
            return endpoints, match.groups()
    return {}, ()


def _parameters(endpoint: Endpoint, values: tuple[str, ...]) -> dict[str, str] | None:
    decoded: dict[str, str] = {}
    for name, value in zip(endpoint.parameters, values, strict=True):
        try:
            text = unquote_to_bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            return None
        if "/" in text or text in (".", ".."):
            return None
        decoded[name] = text
    return decoded


@cache
def _routes() -> tuple[Mapping[str, _ByMethod], tuple[tuple[re.Pattern[str], _ByMethod], ...]]:
    """Fixed paths, and patterns of the others. Made when a server routes its first request: a client needs none."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(PARAMETER.sub("{}", endpoint.path), {})[endpoint.method] = endpoint
    fixed = {path: endpoints for path, endpoints in by_path.items() if "{}" not in path}
    templates = sorted((path for path in by_path if path not in fixed), key=lambda path: path.count("{}"))
    patterns = [re.compile(_SEGMENT.join(map(re.escape, path.split("{}")))) for path in templates]
    return fixed, tuple(zip(patterns, map(by_path.__getitem__, templates), strict=True))
