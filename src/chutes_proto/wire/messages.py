"""The messages of the API as values: what each operation is asked and what it answers.

Each field says where it travels (`path`, `query`, `header`, `body`); the codec, the endpoint table, and the OpenAPI
document read it from here and nowhere else. The order of an answer's fields is the order of its JSON members.
"""

from __future__ import annotations

from typing import Any, NewType, get_args

import attrs
from attrs import Attribute, field, frozen

from chutes_proto.secret import Secret

Name = NewType("Name", str)
"""The name of a VM or a server: ``[A-Za-z0-9_.-]{1,128}``, but neither ``.`` nor ``..``, which no URL could carry."""

NAME_PATTERN = r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}$"

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
    """A header field; its absence never fails the decoding."""
    return _optional("header", description, name, required=False)


def body(description: str, **options: Any) -> Any:
    """A member of the JSON body; without a ``default`` it must be there."""
    return field(kw_only=True, metadata={PLACE: "body", DESCRIPTION: description}, **options)


def _optional(place: str, description: str, wire_name: str | None, required: bool) -> Any:
    metadata = {PLACE: place, DESCRIPTION: description, WIRE_NAME: wire_name, DOCUMENTED_AS_REQUIRED: required}
    return field(kw_only=True, default=None, metadata=metadata)


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
class ApiDescriptionRequest:
    """Operation 16."""


@frozen
class ApiDescriptionAnswer:
    """The OpenAPI document, already encoded."""

    document: bytes = body("the document")


Request = BootNonceRequest | BootAttestationRequest | CachePassphraseRequest | VolumeSyncRequest | ApiDescriptionRequest
Answer = NonceAnswer | BootAttestationAnswer | CachePassphraseAnswer | VolumeSyncAnswer | ApiDescriptionAnswer

for _message in (*get_args(Request), *get_args(Answer)):
    _ = attrs.resolve_types(_message)  # the OpenAPI document is made from the types themselves
