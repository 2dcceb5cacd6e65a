"""The messages of the API as values: what each operation is asked and what it answers.

Each field says where it travels (`path`, `query`, `header`, `body`); the codec, the endpoint table, and the OpenAPI
document read it from here and nowhere else. The order of an answer's fields is the order of its JSON members.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import Attribute, field, frozen

from chutes_proto.secret import Secret
from chutes_proto.wire import names

Name = names.Name
NAME_PATTERN = names.NAME_PATTERN

PLACE = "place"
WIRE_NAME = "wire_name"
DESCRIPTION = "description"
DOCUMENTED_AS_REQUIRED = "documented_as_required"


def path(description: str) -> Any:
    """A segment of the path, always there."""
    return field(kw_only=True, metadata={PLACE: "path", DESCRIPTION: description})


def query(description: str, *, wire_name: str | None = None, required: bool = False) -> Any:
    """A query parameter. Its absence never fails the decoding: whether it is an error is the operation's to say.

    ``required`` is what the API's description says of it.
    """
    return _optional("query", description, wire_name, required)


def header(name: str, description: str) -> Any:
    """A header field; its absence never fails the decoding. None is shown in a ``repr``: some are secrets."""
    return _optional("header", description, name, required=False)


def body(description: str, **options: Any) -> Any:
    """A member of the JSON body; without a ``default`` it must be there."""
    return field(kw_only=True, metadata={PLACE: "body", DESCRIPTION: description}, **options)


def _optional(place: str, description: str, wire_name: str | None, required: bool) -> Any:
    metadata = {PLACE: place, DESCRIPTION: description, WIRE_NAME: wire_name, DOCUMENTED_AS_REQUIRED: required}
    return field(kw_only=True, default=None, repr=place != "header", metadata=metadata)


def wire_name(attribute: Attribute[Any]) -> str:
    """The name under which a field travels."""
    name: str | None = attribute.metadata.get(WIRE_NAME)
    return name or attribute.name


@frozen
class BootNonceRequest:
    """Operation 1."""

    miner_hotkey: str | None = query("binds the nonce to this hotkey: the boot must then name the same")


@frozen
class NonceAnswer:
    """A nonce, 64 lowercase hex digits, and when it ends (RFC 3339, UTC, whole seconds)."""

    nonce: str = body("32 bytes in lowercase hex")
    expires_at: str = body("when the nonce ends, RFC 3339 in UTC")


@frozen
class BootAttestationRequest:
    """Operation 2. ``quote`` stays text here, because bad base64 is a refusal of its own, later than the nonce's."""

    quote: str = body("Base64 encoded TDX quote")
    vm_name: Name = body("VM name/identifier")
    miner_hotkey: str = body("Miner hotkey that owns this VM")
    nonce: str | None = header("X-Chutes-Nonce", "the boot nonce that the quote's report data begins with")
    hotkey: str | None = header("X-Chutes-Hotkey", "the hotkey that signed this request, if it is signed")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature over hotkey:nonce:sha256(body)")


@frozen
class BootAttestationAnswer:
    """The root passphrase, and what opens the next step: a boot token, or (two-phase) a quote nonce, never both."""

    key: Secret = body("the root disk's passphrase")
    boot_token: Secret | None = body("64 hex digits, for one sync of the volumes within 600 s")
    luks_quote_nonce: Secret | None = body("the nonce of the two-phase exchange's quote", default=None)


@frozen
class CachePassphraseRequest:
    """Operation 3."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = query("Miner hotkey that owns this VM", required=True)
    hotkey_header: str | None = header("X-Chutes-Hotkey", "the same hotkey, for callers that send it as a header")
    boot_token: str | None = header("X-Boot-Token", "the boot token of operation 2")


@frozen
class CachePassphraseAnswer:
    """The passphrase of the first configured volume."""

    passphrase: Secret = body("the volume's passphrase")


@frozen
class VolumeSyncRequest:
    """Operation 4."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = header("X-Chutes-Hotkey", "Miner hotkey that owns this VM")
    hotkey_query: str | None = query("the same hotkey, for callers that send it in the query", wire_name="hotkey")
    boot_token: str | None = header("X-Boot-Token", "the boot token of operation 2; spent by this call")
    volumes: tuple[str, ...] = body("Volume names the VM is managing (defines full set)")
    rekey: tuple[str, ...] | None = body(
        "Volume names that must receive new passphrases because they are about to be formatted; a subset of volumes",
        default=None,
    )
    formatted: tuple[str, ...] | None = body("Volume names that have a LUKS header on the VM's disks", default=None)


@frozen
class VolumeSyncAnswer:
    """One member per volume, in the order of the request, then ``in_use``.

    ``in_use`` names the volumes whose disk is known to hold data: a client that finds a blank disk there does not
    format it.
    """

    passphrases: tuple[tuple[str, Secret], ...] = body("volume name: passphrase")
    in_use: tuple[str, ...] = body("the volumes whose disks are known to hold data")

    IN_USE = "in_use"


@frozen
class VolumePair:
    """A volume's keys of a two-phase boot."""

    current: Secret | None = body("what opens the disk; null where the volume has no key yet")
    next: Secret = body("what the VM adds to the disk, or formats it with where there is no current one")


@frozen
class VolumeConfirmation:
    """What a VM says of a volume that it opened with ``current``, or formatted."""

    rotated: bool = body("the disk has the next key too")


@frozen
class VolumeResult:
    """What came of it."""

    result: str = body("promoted, discarded, or no_pending where there was nothing to decide")


@frozen
class VolumeAttestationRequest:
    """Operation 13. The quote is over the quote nonce, in the state that the VM measures after its boot."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = header("X-Chutes-Hotkey", "Miner hotkey that owns this VM")
    quote_nonce: str | None = header("X-Quote-Nonce", "the luks_quote_nonce of operation 2; spent by this call")
    quote: str = body("Base64 encoded TDX quote")
    volumes: tuple[str, ...] = body("Volume names that the VM is about to open; others are left alone")
    formatted: tuple[str, ...] | None = body("Volume names that have a LUKS header on the VM's disks", default=None)


@frozen
class VolumeAttestationAnswer:
    """The keys of each volume, in the order of the request, and what confirms them.

    ``in_use`` names the volumes whose disk is known to hold data: a client that finds a blank disk there does not
    format it.
    """

    volumes: Mapping[str, VolumePair] = body("volume name: its keys")
    confirm_nonce: Secret = body("64 hex digits, for one confirmation within 300 s")
    k3s_encryption_key: Secret = body("32 bytes in base64, the same at every boot")
    in_use: tuple[str, ...] = body("the volumes whose disks are known to hold data", default=())


@frozen
class VolumeConfirmationRequest:
    """Operation 14."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = header("X-Chutes-Hotkey", "Miner hotkey that owns this VM")
    confirm_nonce: str | None = header("X-Confirm-Nonce", "the confirm_nonce of operation 13")
    volumes: Mapping[str, VolumeConfirmation] = body("volume name: whether its disk has the next key")


@frozen
class VolumeConfirmationAnswer:
    """What came of each volume."""

    status: str = body("confirmed")
    volumes: Mapping[str, VolumeResult] = body("volume name: what came of it")


@frozen
class SignedRequest:
    """What all requests of a hotkey carry: its signature (``README.md`` beside this file, "Signed requests")."""

    hotkey: str | None = header("X-Chutes-Hotkey", "SS58 address of the caller's hotkey")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature, without 0x")
    nonce: str | None = header("X-Chutes-Nonce", "unix seconds; of a runtime attestation the server's nonce")
    authorization: str | None = header("Authorization", "ignored")


@frozen
class NodeArgs:
    """One GPU as its owner declares it; what must hold of it stands in ``server/gpus.py``."""

    uuid: str = body("GPU uuid, unique among all servers")
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
class ListServersRequest(SignedRequest):
    """Operation 6."""


@frozen
class ServerAnswer:
    """One server; times are RFC 3339 in UTC."""

    server_id: str = body("the server's id")
    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")


@frozen
class ServerListAnswer:
    """The caller's servers, newest first: on the wire just the list."""

    servers: tuple[ServerAnswer, ...] = body("the servers")

    LIST = "servers"


@frozen
class RenameServerRequest(SignedRequest):
    """Operation 7."""

    server_id: Name = path("Server ID")
    server_name: Name | None = query("New VM name to set", required=True)


@frozen
class RenamedServerAnswer:
    """The server as it is now."""

    name: str = body("the server's name")
    ip: str = body("the host that it was registered with")
    created_at: str = body("when it was registered")
    updated_at: str | None = body("when it was renamed last")


@frozen
class ServerDetailsRequest(SignedRequest):
    """Operation 8."""

    server_id: Name = path("Server ID")


@frozen
class RemoveServerRequest(SignedRequest):
    """Operation 9."""

    server_name_or_id: Name = path("Server name or ID")


@frozen
class RemovedServerAnswer:
    """The name of what is gone."""

    name: str = body("the server's name")
    message: str = body("what was done")


@frozen
class RuntimeNonceRequest(SignedRequest):
    """Operation 10."""

    server_id: Name = path("Server ID")


@frozen
class RuntimeAttestationRequest(SignedRequest):
    """Operation 11. ``X-Chutes-Nonce`` is the nonce that operation 10 gave; the quote's report data begins with it."""

    server_id: Name = path("Server ID")
    quote: str = body("Base64 encoded TDX quote")


@frozen
class RuntimeAttestationAnswer:
    """An approved TD on the server's platform holds the TLS key of this connection.

    That it is the same TD as the one that booted is not said.
    """

    attestation_id: str = body("names the record; the request id in the server's log")
    verified_at: str = body("RFC 3339 in UTC")
    status: str = body("verified")


@frozen
class AttestationStatusRequest(SignedRequest):
    """Operation 12."""

    server_id: Name = path("Server ID")


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


@frozen
class MeasurementsRequest:
    """Operation 15."""


@frozen
class Registers:
    """RTMR0 to RTMR3 in hex."""

    rtmr0: str = body("48 bytes in hex")
    rtmr1: str = body("48 bytes in hex")
    rtmr2: str = body("48 bytes in hex")
    rtmr3: str = body("48 bytes in hex")


@frozen
class Measurements:
    """One accepted image on accepted hardware."""

    version: str = body("of the image")
    name: str = body("of the profile")
    mrtd: str = body("48 bytes in hex")
    boot_rtmrs: Registers = body("when the VM asks for its keys")
    runtime_rtmrs: Registers = body("later")
    expected_gpus: tuple[str, ...] = body("keys of the GPU table")
    gpu_count: int | None = body("how many; null is any number")
    fingerprint: str | None = body("32 bytes in hex", default=None)


@frozen
class MeasurementsAnswer:
    """All accepted profiles: on the wire just the list."""

    profiles: tuple[Measurements, ...] = body("the profiles")

    LIST = "profiles"


@frozen
class ApiDescriptionRequest:
    """Operation 16."""


@frozen
class ApiDescriptionAnswer:
    """The OpenAPI document, already encoded."""

    document: bytes = body("the document")


Request = (
    BootNonceRequest
    | BootAttestationRequest
    | CachePassphraseRequest
    | VolumeSyncRequest
    | VolumeAttestationRequest
    | VolumeConfirmationRequest
    | RegisterServerRequest
    | ListServersRequest
    | RenameServerRequest
    | ServerDetailsRequest
    | RemoveServerRequest
    | RuntimeNonceRequest
    | RuntimeAttestationRequest
    | AttestationStatusRequest
    | MeasurementsRequest
    | ApiDescriptionRequest
)
Answer = (
    NonceAnswer
    | BootAttestationAnswer
    | CachePassphraseAnswer
    | VolumeSyncAnswer
    | VolumeAttestationAnswer
    | VolumeConfirmationAnswer
    | MessageAnswer
    | ServerListAnswer
    | ServerAnswer
    | RenamedServerAnswer
    | RemovedServerAnswer
    | RuntimeAttestationAnswer
    | AttestationStatusAnswer
    | MeasurementsAnswer
    | ApiDescriptionAnswer
)


def the_list(kind: type[Any]) -> str | None:
    """The one field of an answer that is a list and nothing around it."""
    name: str | None = getattr(kind, "LIST", None)
    return name
