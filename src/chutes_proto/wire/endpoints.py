"""The endpoint table: the one list of operations.

The client's encoder, the server's router and decoder, the OpenAPI document and the README's table are made from it.

Rules of routing: a fixed path wins over one with parameters; ``%2F`` never stands for a separator and matches nothing;
another verb is 405 with ``Allow``; a path that only lacks or has too much of a final slash is redirected with 307.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from attrs import frozen

from chutes_proto.codes import Code
from chutes_proto.wire import messages

if TYPE_CHECKING:
    from chutes_proto.auth.signing import Coverage

_SEGMENT = r"((?:[^/%]|%[0-9A-Fa-f]{2})+)"
_PARAMETER = re.compile(r"\{([a-z_]+)\}")


@frozen
class Endpoint:
    """One operation: where it is, what it takes, what it gives, what it may refuse with."""

    number: int
    operation: str
    method: str
    path: str
    request: type[messages.Request]
    answer: type[messages.Answer]
    authentication: str
    summary: str
    codes: tuple[Code, ...] = ()
    status: int = 200
    signed: Coverage | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names in braces, in order."""
        return tuple(_PARAMETER.findall(self.path))


_QUOTE_REFUSALS = (
    Code.NONCE_MISMATCH,
    Code.QUOTE_MALFORMED,
    Code.CERTIFICATE_MISMATCH,
    Code.QUOTE_REJECTED,
    Code.TCB_REJECTED,
    Code.ATTRIBUTES_REJECTED,
    Code.MEASUREMENT_MISMATCH,
    Code.PLATFORM_MISMATCH,
    Code.COLLATERAL_UNAVAILABLE,
    Code.BUSY,
)
_QUOTE_CODES = (*_QUOTE_REFUSALS, Code.NONCE_INVALID, Code.CLIENT_CERTIFICATE_REQUIRED)
_TOKEN_CODES = (
    Code.BOOT_TOKEN_REQUIRED,
    Code.HOTKEY_REQUIRED,
    Code.HOTKEY_CONFLICT,
    Code.BOOT_TOKEN_INVALID,
    Code.HOTKEY_MISMATCH,
    Code.VM_NAME_MISMATCH,
)
_STORE_CODES = (Code.STORE_UNAVAILABLE, Code.KEY_UNAVAILABLE)

COMMON_CODES = (
    Code.BAD_REQUEST,
    Code.REQUEST_TIMEOUT,
    Code.BODY_TOO_LARGE,
    Code.RATE_LIMITED,
    Code.HEAD_TOO_LARGE,
    Code.SERVER_FAULT,
)
"""What any request may be answered with, before or beside its operation."""

BOOT_NONCE = Endpoint(
    1,
    "get_boot_nonce",
    "GET",
    "/servers/nonce",
    messages.BootNonceRequest,
    messages.NonceAnswer,
    "none",
    "A nonce for a boot attestation",
    (Code.DRAINING,),
)
BOOT_ATTESTATION = Endpoint(
    2,
    "verify_boot_attestation",
    "POST",
    "/servers/boot/attestation",
    messages.BootAttestationRequest,
    messages.BootAttestationAnswer,
    "quote, client certificate, nonce",
    "Verify a boot quote and release the root passphrase",
    (
        *_QUOTE_CODES,
        Code.HOTKEY_REJECTED,
        Code.SIGNATURE_INVALID,
        Code.EXCHANGE_DOWNGRADE,
        *_STORE_CODES,
        Code.DRAINING,
    ),
)
CACHE_PASSPHRASE = Endpoint(
    3,
    "get_cache_passphrase",
    "GET",
    "/servers/{vm_name}/luks",
    messages.CachePassphraseRequest,
    messages.CachePassphraseAnswer,
    "boot token",
    "The passphrase of the first volume (older images)",
    (*_TOKEN_CODES, Code.KEY_NOT_FOUND, *_STORE_CODES),
)
VOLUME_SYNC = Endpoint(
    4,
    "sync_volumes",
    "POST",
    "/servers/{vm_name}/luks",
    messages.VolumeSyncRequest,
    messages.VolumeSyncAnswer,
    "boot token (spent)",
    "The passphrases of the VM's volumes, made where there are none",
    (*_TOKEN_CODES, Code.VOLUMES_REQUIRED, Code.VOLUME_UNKNOWN, Code.REKEY_NOT_SUBSET, *_STORE_CODES),
)
_SIGNATURE_CODES = (Code.SIGNATURE_INVALID, Code.SIGNATURE_STALE, Code.HOTKEY_UNKNOWN)
_OWN_SERVER_CODES = (*_SIGNATURE_CODES, Code.SERVER_NOT_FOUND, Code.STORE_UNAVAILABLE)
_TEE = "hotkey signature, purpose tee"

REGISTER_SERVER = Endpoint(
    5,
    "register_server",
    "POST",
    "/servers/",
    messages.RegisterServerRequest,
    messages.MessageAnswer,
    "hotkey signature over the body",
    "Register a server with its GPUs",
    (
        *_SIGNATURE_CODES,
        Code.HOST_INVALID,
        Code.GPU_INVALID,
        Code.EVIDENCE_UNAVAILABLE,
        *_QUOTE_REFUSALS,
        Code.BOOT_REQUIRED,
        Code.HOST_TAKEN,
        Code.GPU_TAKEN,
        Code.SERVER_TAKEN,
        Code.NAME_TAKEN,
        Code.STORE_UNAVAILABLE,
    ),
    status=201,
    signed="body",
)
LIST_SERVERS = Endpoint(
    6,
    "list_servers",
    "GET",
    "/servers/",
    messages.ListServersRequest,
    messages.ServerListAnswer,
    _TEE,
    "The caller's servers, newest first",
    (*_SIGNATURE_CODES, Code.STORE_UNAVAILABLE),
    signed="purpose",
)
RENAME_SERVER = Endpoint(
    7,
    "rename_server",
    "PATCH",
    "/servers/{server_id}",
    messages.RenameServerRequest,
    messages.RenamedServerAnswer,
    _TEE,
    "Give a server another name; the keys of its VM are not touched",
    (*_OWN_SERVER_CODES, Code.NAME_TAKEN),
    signed="purpose",
)
SERVER_DETAILS = Endpoint(
    8,
    "get_server",
    "GET",
    "/servers/{server_id}",
    messages.ServerDetailsRequest,
    messages.ServerAnswer,
    _TEE,
    "One of the caller's servers",
    _OWN_SERVER_CODES,
    signed="purpose",
)
REMOVE_SERVER = Endpoint(
    9,
    "remove_server",
    "DELETE",
    "/servers/{server_name_or_id}",
    messages.RemoveServerRequest,
    messages.RemovedServerAnswer,
    _TEE,
    "Remove a server; the keys of its VM are kept",
    _OWN_SERVER_CODES,
    signed="purpose",
)
RUNTIME_NONCE = Endpoint(
    10,
    "get_runtime_nonce",
    "GET",
    "/servers/{server_id}/nonce",
    messages.RuntimeNonceRequest,
    messages.NonceAnswer,
    _TEE,
    "A nonce for a runtime attestation of this server",
    _OWN_SERVER_CODES,
    signed="purpose",
)
RUNTIME_ATTESTATION = Endpoint(
    11,
    "verify_runtime_attestation",
    "POST",
    "/servers/{server_id}/attestation",
    messages.RuntimeAttestationRequest,
    messages.RuntimeAttestationAnswer,
    "hotkey signature over the server's nonce, quote, client certificate",
    "Verify a runtime quote: an approved TD on the server's platform holds this TLS key, the booted one or another",
    (*_QUOTE_CODES, *_OWN_SERVER_CODES),
    signed="nonce",
)
ATTESTATION_STATUS = Endpoint(
    12,
    "get_attestation_status",
    "GET",
    "/servers/{server_id}/attestation/status",
    messages.AttestationStatusRequest,
    messages.AttestationStatusAnswer,
    _TEE,
    "The newest runtime verdict and its age",
    _OWN_SERVER_CODES,
    signed="purpose",
)
VOLUME_ATTESTATION = Endpoint(
    13,
    "attest_volumes",
    "POST",
    "/servers/{vm_name}/luks/attest",
    messages.VolumeAttestationRequest,
    messages.VolumeAttestationAnswer,
    "quote, client certificate, quote nonce (spent)",
    "The current and the next key of each volume, for a quote of the booted VM",
    (*_QUOTE_CODES, Code.QUOTE_NONCE_INVALID, Code.VOLUMES_REQUIRED, Code.VOLUME_UNKNOWN, *_STORE_CODES),
)
VOLUME_CONFIRMATION = Endpoint(
    14,
    "confirm_volumes",
    "POST",
    "/servers/{vm_name}/luks/confirm",
    messages.VolumeConfirmationRequest,
    messages.VolumeConfirmationAnswer,
    "confirm nonce",
    "The volumes were opened; the next keys become active where they were added",
    (
        Code.CONFIRM_NONCE_INVALID,
        Code.VOLUMES_REQUIRED,
        Code.VOLUME_UNKNOWN,
        Code.ROTATION_SUPERSEDED,
        *_STORE_CODES,
    ),
)
MEASUREMENTS = Endpoint(
    15,
    "get_measurements",
    "GET",
    "/servers/tee/measurements",
    messages.MeasurementsRequest,
    messages.MeasurementsAnswer,
    "none",
    "The accepted measurement profiles",
)
API_DESCRIPTION = Endpoint(
    16,
    "get_api_description",
    "GET",
    "/openapi.json",
    messages.ApiDescriptionRequest,
    messages.ApiDescriptionAnswer,
    "none",
    "This API as an OpenAPI 3.1 document",
)

ENDPOINTS: tuple[Endpoint, ...] = (
    BOOT_NONCE,
    BOOT_ATTESTATION,
    CACHE_PASSPHRASE,
    VOLUME_SYNC,
    REGISTER_SERVER,
    LIST_SERVERS,
    RENAME_SERVER,
    SERVER_DETAILS,
    REMOVE_SERVER,
    RUNTIME_NONCE,
    RUNTIME_ATTESTATION,
    ATTESTATION_STATUS,
    VOLUME_ATTESTATION,
    VOLUME_CONFIRMATION,
    MEASUREMENTS,
    API_DESCRIPTION,
)


@frozen
class Match:
    """The operation that a request is for, with the path's parameters, percent-decoded."""

    endpoint: Endpoint
    parameters: dict[str, str]


@frozen
class WrongMethod:
    """The path is known, under these other verbs."""

    allow: tuple[str, ...]


@frozen
class Redirect:
    """The path is known with, or without, a final slash."""

    path: str


def route(method: str, path: str) -> Match | WrongMethod | Redirect | None:
    """What a request line asks for; ``path`` still percent-encoded and without its query."""
    here = _matches(path)
    for endpoint, values in here:
        if endpoint.method == method:
            parameters = _parameters(endpoint, values)
            return None if parameters is None else Match(endpoint, parameters)
    if here:
        return WrongMethod(tuple(dict.fromkeys(endpoint.method for endpoint, _ in here)))
    other = path.removesuffix("/") if path.endswith("/") else path + "/"
    return Redirect(other) if _matches(other) else None


def _matches(path: str) -> list[tuple[Endpoint, tuple[str, ...]]]:
    """The endpoints of the first template that fits the path, fixed ones first."""
    for pattern, endpoints in _templates():
        match = pattern.fullmatch(path)
        if match is not None:
            return [(endpoint, match.groups()) for endpoint in endpoints]
    return []


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
def _templates() -> tuple[tuple[re.Pattern[str], tuple[Endpoint, ...]], ...]:
    """Made when a server routes its first request: a client has no use for them."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(_PARAMETER.sub("{}", endpoint.path), []).append(endpoint)
    paths = sorted(by_path, key=lambda path: path.count("{"))
    return tuple((_pattern(path), tuple(by_path[path])) for path in paths)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(_SEGMENT.join(re.escape(part) for part in template.split("{}")))


def markdown_table() -> str:
    """The table of operations as the README shows it."""
    lines = ["| # | operation | method and path | authentication |", "|---|---|---|---|"]
    lines.extend(f"| {e.number} | {e.operation} | `{e.method} {e.path}` | {e.authentication} |" for e in ENDPOINTS)
    return "\n".join(lines)
