"""The messages and endpoints of a miner: operations 5 to 12."""

from __future__ import annotations

from functools import partial

from attrs import frozen

from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import QUOTE_CODES, QUOTE_REFUSALS, Endpoint, NonceAnswer, body, header, path, query
from chutes_proto.wire.names import Name

# --- messages ---


@frozen
class SignedRequest:
    """The headers of every request of a hotkey, and all of operation 6: its signature.

    ``docs/reference/wire.md`` describes it in section 9.
    """

    hotkey: str | None = header("X-Chutes-Hotkey", "SS58 address of the caller's hotkey")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature, without 0x")
    nonce: str | None = header("X-Chutes-Nonce", "unix seconds; of a runtime attestation the server's nonce")
    authorization: str | None = header("Authorization", "ignored")


@frozen
class ServerRequest(SignedRequest):
    """Operations 8, 10 and 12: of one server."""

    server_id: Name = path("Server ID")


@frozen
class NodeArgs:
    """One GPU as its owner declares it; ``server/_gpus.py`` checks it."""

    uuid: str = body("GPU uuid, as declared; other servers may declare it too")
    name: str = body("model name as the driver has it")
    memory: int = body("bytes")
    clock_rate: float = body("kHz")
    device_index: int = body("0 to 9")
    gpu_identifier: str = body("key of the GPU table, for example h200")
    verification_host: str = body("where the GPU's verifier listens")
    verification_port: int = body("80 to 65535")
    major: int | None = body("compute capability", default=None)
    minor: int | None = body("compute capability", default=None)
    processors: int | None = body("streaming multiprocessors", default=None)
    max_threads_per_processor: int | None = body("threads", default=None)
    concurrent_kernels: bool | None = body("whether kernels run at once", default=None)
    ecc: bool | None = body("whether ECC is on", default=None)
    sxm: bool | None = body("whether it is an SXM module", default=None)


@frozen
class RegisterServerRequest(SignedRequest):
    """Operation 5."""

    host: str = body("Public IP address or DNS Name of the server")
    id: Name = body("Server ID (e.g. k8s node uid)")
    name: Name | None = body("Server name (defaults to server id if omitted)", default=None)
    gpus: tuple[NodeArgs, ...] = body("GPU info for this server")


@frozen
class MessageAnswer:
    """A sentence for people."""

    message: str = body("what was done")


@frozen
class ServerAnswer:
    """One server; times are RFC 3339 in UTC."""

    server_id: str = body("the server's id")
    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")


@frozen
class ServerDetailsAnswer:
    """One server with the version of its image; times are RFC 3339 in UTC."""

    server_id: str = body("the server's id")
    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    version: str | None = body("of the image that the VM of this name booted last")
    maintenance_pending_window_id: str | None = body("the maintenance that has begun; null: none has")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")
    target_version: str | None = body("the version that ends its maintenance; only while in maintenance", default=None)


@frozen
class ServerListAnswer:
    """The caller's servers, newest first: on the wire just the list."""

    servers: tuple[ServerAnswer, ...] = body("the servers")

    LIST = "servers"


@frozen
class RenameServerRequest(ServerRequest):
    """Operation 7."""

    server_name: Name | None = query("New VM name to set", required=True)


@frozen
class RenamedServerAnswer:
    """The server as it is now."""

    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")


@frozen
class RemoveServerRequest(SignedRequest):
    """Operation 9."""

    server_name_or_id: Name = path("Server name or ID")


@frozen
class RemovedServerAnswer:
    """The name of the removed server."""

    name: str = body("the server's name")
    message: str = body("what was done")


@frozen
class RuntimeAttestationRequest(ServerRequest):
    """Operation 11. ``X-Chutes-Nonce`` is the nonce that operation 10 gave; the quote's report data begins with it."""

    quote: str = body("Base64 encoded TDX quote")
    gpu_evidence: str | None = body(
        "the GPUs' evidence over the same nonce, JSON as the host's tool made it", default=None
    )


@frozen
class RuntimeAttestationAnswer:
    """An approved TD on the server's platform holds the TLS key of this connection.

    It does not say that this is the TD that booted.
    """

    attestation_id: str = body("names the record; the request id in the server's log")
    verified_at: str = body("RFC 3339 in UTC")
    status: str = body("verified")


@frozen
class LastAttestation:
    """One verdict on a runtime quote. ``verified`` exactly where ``verification_error`` is null."""

    attestation_id: str = body("names the record")
    verified: bool = body("whether the quote was accepted")
    created_at: str = body("RFC 3339 in UTC")
    verified_at: str | None = body("RFC 3339 in UTC; null where it was not accepted")
    verification_error: str | None = body("why it was not accepted")


@frozen
class AttestationStatusAnswer:
    """The newest verdict and its age. ``fresh``: it is a success, and not older than the server counts as fresh."""

    server_id: str = body("the server's id")
    last_attestation: LastAttestation | None = body("the newest verdict")
    attestation_status: str = body("never_attested, verified or failed")
    name: str = body("the server's name")
    fresh: bool = body("whether the newest verdict is a success that still counts")
    age_seconds: int | None = body("seconds since the newest verdict")


# --- endpoints ---

SIGNATURE_CODES = (Code.SIGNATURE_INVALID, Code.SIGNATURE_STALE, Code.HOTKEY_UNKNOWN)
_OWN_SERVER_CODES = (*SIGNATURE_CODES, Code.SERVER_NOT_FOUND, Code.STORE_UNAVAILABLE)
_of_hotkey = partial(
    Endpoint, codes=_OWN_SERVER_CODES, authentication="hotkey signature, purpose tee", signed="purpose"
)

REGISTER_SERVER = Endpoint(
    5,
    "register_server",
    "POST /servers/",
    RegisterServerRequest,
    MessageAnswer,
    "Register a server with its GPUs",
    (
        *SIGNATURE_CODES,
        Code.HOTKEY_BLACKLISTED,
        Code.HOST_INVALID,
        Code.GPU_INVALID,
        Code.EVIDENCE_UNAVAILABLE,
        *QUOTE_REFUSALS,
        Code.GPU_EVIDENCE_REJECTED,
        Code.BOOT_REQUIRED,
        Code.HOST_TAKEN,
        Code.GPU_TAKEN,
        Code.SERVER_TAKEN,
        Code.NAME_TAKEN,
        Code.SERVERS_FULL,
        Code.STORE_UNAVAILABLE,
    ),
    status=201,
    signed="body",
    authentication="hotkey signature over the body",
)

LIST_SERVERS = _of_hotkey(
    6,
    "list_servers",
    "GET /servers/",
    SignedRequest,
    ServerListAnswer,
    "The caller's servers, newest first",
    codes=(*SIGNATURE_CODES, Code.STORE_UNAVAILABLE),
)

RENAME_SERVER = _of_hotkey(
    7,
    "rename_server",
    "PATCH /servers/{server_id}",
    RenameServerRequest,
    RenamedServerAnswer,
    "Give a server another name; the keys of its VM are not touched",
    codes=(*_OWN_SERVER_CODES, Code.NAME_TAKEN),
)

SERVER_DETAILS = _of_hotkey(
    8, "get_server", "GET /servers/{server_id}", ServerRequest, ServerDetailsAnswer, "One of the caller's servers"
)

REMOVE_SERVER = _of_hotkey(
    9,
    "remove_server",
    "DELETE /servers/{server_name_or_id}",
    RemoveServerRequest,
    RemovedServerAnswer,
    "Remove a server; the keys of its VM are kept",
)

RUNTIME_NONCE = _of_hotkey(
    10,
    "get_runtime_nonce",
    "GET /servers/{server_id}/nonce",
    ServerRequest,
    NonceAnswer,
    "A nonce for a runtime attestation of this server",
)

RUNTIME_ATTESTATION = Endpoint(
    11,
    "verify_runtime_attestation",
    "POST /servers/{server_id}/attestation",
    RuntimeAttestationRequest,
    RuntimeAttestationAnswer,
    "Verify a runtime quote: an approved TD on the server's platform holds this TLS key, the booted one or another",
    (*QUOTE_CODES, Code.GPU_EVIDENCE_REJECTED, *_OWN_SERVER_CODES, Code.GPU_TAKEN),
    signed="nonce",
    authentication="hotkey signature over the server's nonce, quote, client certificate",
    body_bytes=256 * 1024,  # of eight GPUs and four switches: 150 kB of evidence
)

ATTESTATION_STATUS = _of_hotkey(
    12,
    "get_attestation_status",
    "GET /servers/{server_id}/attestation/status",
    ServerRequest,
    AttestationStatusAnswer,
    "The newest runtime verdict and its age",
)
