"""The messages and endpoints of a VM: operations 1 to 4, 13, 14, 17 and 18."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

from chutes_proto.secret import Secret
from chutes_proto.wire.codes import Code
from chutes_proto.wire.endpoint import QUOTE_CODES, STORE_CODES, Endpoint, NonceAnswer, body, header, path, query
from chutes_proto.wire.names import Name

# --- messages ---


@frozen
class BootNonceRequest:
    """Operation 1."""

    miner_hotkey: str | None = query("binds the nonce to this hotkey: the boot must then name the same")


@frozen
class BootAttestationRequest:
    """Operation 2. ``quote`` stays text here, because bad base64 is a refusal of its own, later than the nonce's."""

    quote: str = body("Base64 encoded TDX quote")
    vm_name: Name = body("VM name/identifier")
    miner_hotkey: str = body("Miner hotkey that owns this VM")
    first_boot: bool | None = body(
        "The root disk is a fresh copy of the published image: only the build's passphrase opens it", default=None
    )
    second_key: bool | None = body(
        "The VM tries a second root passphrase where the first opens no disk; the answer then has key_second",
        default=None,
    )
    nonce: str | None = header("X-Chutes-Nonce", "the boot nonce that the quote's report data begins with")
    hotkey: str | None = header("X-Chutes-Hotkey", "the hotkey that signed this request, if it is signed")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature over hotkey:nonce:sha256(body)")


@frozen
class BootAttestationAnswer:
    """The root passphrase, and a boot token or a quote nonce for the next step, never both.

    With a quote nonce the exchange is two-phase, or provisioned where the last three members are present.
    """

    key: Secret = body("the root disk's passphrase")
    boot_token: Secret | None = body("64 hex digits, for one sync of the volumes within 600 seconds")
    luks_quote_nonce: Secret | None = body("the nonce of the next step's quote, valid for 600 seconds", default=None)
    root_next: Secret | None = body("the passphrase that replaces the root disk's", default=None)
    root_confirm_nonce: Secret | None = body("confirms root_next, once, within 300 seconds", default=None)
    vm_auth_ss58: str | None = body("the address of the one caller that the VM shall trust", default=None)
    key_second: Secret | None = body(
        "the passphrase that opens the root disk if neither key nor root_next does; for requests with second_key",
        default=None,
    )


@frozen
class CachePassphraseRequest:
    """Operation 3."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = query("Miner hotkey that owns this VM, unless the header X-Chutes-Hotkey has it")
    hotkey_header: str | None = header("X-Chutes-Hotkey", "the same hotkey, for callers that send it as a header")
    boot_token: str | None = header("X-Boot-Token", "the boot token of operation 2", required=True)


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
    boot_token: str | None = header(
        "X-Boot-Token", "the boot token of operation 2; this call redeems it", required=True
    )
    volumes: tuple[str, ...] = body("Volume names the VM is managing (defines full set)", at_least=1)
    rekey: tuple[str, ...] | None = body(
        "Volume names that must receive new passphrases because they are about to be formatted; a subset of volumes",
        default=None,
    )
    formatted: tuple[str, ...] | None = body(
        "Volume names that have a LUKS header on the VM's disks; the answer then has in_use", default=None
    )


@frozen
class VolumeSyncAnswer:
    """One member per volume, in the order of the request, then ``in_use`` where the request has ``formatted``.

    ``in_use`` names the volumes whose disk is known to hold data: a client that finds a blank disk there does not
    format it.
    """

    passphrases: tuple[tuple[str, Secret], ...] = body("volume name: passphrase")
    in_use: tuple[str, ...] | None = body("the volumes whose disks are known to hold data", default=None)

    IN_USE = "in_use"


@frozen
class VolumePair:
    """A volume's keys of a two-phase boot."""

    current: Secret | None = body("the key that opens the disk; null where the volume has no key yet")
    next: Secret = body("the key that the VM adds to the disk, or formats it with where current is null")


@frozen
class VolumeConfirmation:
    """A VM's report on a volume that it opened, with ``current`` or ``next``, or formatted."""

    rotated: bool = body("the disk has the next key too")


@frozen
class VolumeResult:
    """The result of a confirmation."""

    result: str = body("promoted, discarded, or no_pending where there was nothing to decide")


@frozen
class VolumeAttestationRequest:
    """Operation 13. The quote is over the quote nonce, in the state that the VM measures after its boot."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = header("X-Chutes-Hotkey", "Miner hotkey that owns this VM")
    quote_nonce: str | None = header("X-Quote-Nonce", "the luks_quote_nonce of operation 2; this call consumes it")
    quote: str = body("Base64 encoded TDX quote")
    volumes: tuple[str, ...] = body("Volume names that the VM is about to open; others are left alone", at_least=1)
    formatted: tuple[str, ...] | None = body("Volume names that have a LUKS header on the VM's disks", default=None)


@frozen
class VolumeAttestationAnswer:
    """The keys of each volume, in the order of the request, and what confirms them.

    ``in_use`` names the volumes whose disk is known to hold data: a client that finds a blank disk there does not
    format it.
    """

    volumes: Mapping[str, VolumePair] = body("volume name: its keys")
    confirm_nonce: Secret = body("64 hex digits, for one confirmation within 300 seconds")
    k3s_encryption_key: Secret = body("32 bytes in base64, the same at every boot")
    in_use: tuple[str, ...] = body("the volumes whose disks are known to hold data", default=())


@frozen
class VolumeConfirmationRequest:
    """Operation 14."""

    vm_name: Name = path("VM name/identifier")
    hotkey: str | None = header("X-Chutes-Hotkey", "Miner hotkey that owns this VM")
    confirm_nonce: str | None = header("X-Confirm-Nonce", "the confirm_nonce of operation 13")
    volumes: Mapping[str, VolumeConfirmation] = body("volume name: whether its disk has the next key", at_least=1)


@frozen
class VolumeConfirmationAnswer:
    """The result for each volume."""

    status: str = body("confirmed")
    volumes: Mapping[str, VolumeResult] = body("volume name: its result")


@frozen
class ProvisionRequest(VolumeAttestationRequest):
    """Operation 17: operation 13 for a VM that proves its hotkey; the client certificate is its root CA."""

    nonce: str | None = header("X-Chutes-Nonce", "the quote nonce, again: the hotkey's signature is over it")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature over hotkey:nonce:sha256(body)")


@frozen
class ProvisionConfirmationRequest(VolumeConfirmationRequest):
    """Operation 18: of the volumes with the nonce of operation 17, or of ``root`` alone with that of operation 2."""

    nonce: str | None = header("X-Chutes-Nonce", "the confirm nonce, again: the hotkey's signature is over it")
    signature: str | None = header("X-Chutes-Signature", "hex of the sr25519 signature over hotkey:nonce:sha256(body)")


# --- endpoints ---

_TOKEN_CODES = (
    Code.BOOT_TOKEN_REQUIRED,
    Code.HOTKEY_REQUIRED,
    Code.HOTKEY_CONFLICT,
    Code.BOOT_TOKEN_INVALID,
    Code.HOTKEY_MISMATCH,
    Code.VM_NAME_MISMATCH,
    Code.REVOKED,
)

_PROXY_CODES = (Code.PROXY_REQUIRED, Code.PROXY_UNAVAILABLE)

BOOT_NONCE = Endpoint(
    1,
    "get_boot_nonce",
    "GET /servers/nonce",
    BootNonceRequest,
    NonceAnswer,
    "A nonce for a boot attestation",
    (Code.DRAINING,),
)

BOOT_ATTESTATION = Endpoint(
    2,
    "verify_boot_attestation",
    "POST /servers/boot/attestation",
    BootAttestationRequest,
    BootAttestationAnswer,
    "Verify a boot quote and release the root passphrase",
    (
        *QUOTE_CODES,
        Code.HOTKEY_REJECTED,
        Code.HOTKEY_BLACKLISTED,
        Code.SIGNATURE_INVALID,
        Code.VERSION_REJECTED,
        Code.EXCHANGE_MISMATCH,
        Code.EXCHANGE_DOWNGRADE,
        *STORE_CODES,
        Code.DRAINING,
        *_PROXY_CODES,
    ),
    authentication="quote, client certificate, nonce",
)

CACHE_PASSPHRASE = Endpoint(
    3,
    "get_cache_passphrase",
    "GET /servers/{vm_name}/luks",
    CachePassphraseRequest,
    CachePassphraseAnswer,
    "The passphrase of the first volume (older images)",
    (*_TOKEN_CODES, Code.KEY_NOT_FOUND, *STORE_CODES),
    authentication="boot token",
)

VOLUME_SYNC = Endpoint(
    4,
    "sync_volumes",
    "POST /servers/{vm_name}/luks",
    VolumeSyncRequest,
    VolumeSyncAnswer,
    "The passphrases of the VM's volumes, made where there are none",
    (*_TOKEN_CODES, Code.VOLUMES_REQUIRED, Code.VOLUME_UNKNOWN, Code.REKEY_NOT_SUBSET, *STORE_CODES),
    authentication="boot token (redeemed)",
)

VOLUME_ATTESTATION = Endpoint(
    13,
    "attest_volumes",
    "POST /servers/{vm_name}/luks/attest",
    VolumeAttestationRequest,
    VolumeAttestationAnswer,
    "The current and the next key of each volume, for a quote of the booted VM",
    (*QUOTE_CODES, Code.QUOTE_NONCE_INVALID, Code.VOLUMES_REQUIRED, Code.VOLUME_UNKNOWN, *STORE_CODES, *_PROXY_CODES),
    authentication="quote, client certificate, quote nonce (consumed)",
)

VOLUME_CONFIRMATION = Endpoint(
    14,
    "confirm_volumes",
    "POST /servers/{vm_name}/luks/confirm",
    VolumeConfirmationRequest,
    VolumeConfirmationAnswer,
    "The volumes were opened; the next keys become active where they were added",
    (
        Code.CONFIRM_NONCE_INVALID,
        Code.REVOKED,
        Code.VOLUMES_REQUIRED,
        Code.VOLUME_UNKNOWN,
        Code.ROTATION_SUPERSEDED,
        *STORE_CODES,
    ),
    authentication="confirm nonce",
)

PROVISION = Endpoint(
    17,
    "provision",
    "POST /servers/{vm_name}/provision",
    ProvisionRequest,
    VolumeAttestationAnswer,
    "The current and the next key of each volume, for a quote of the booted VM that proves its hotkey",
    (
        *QUOTE_CODES,
        Code.HOTKEY_REJECTED,
        Code.HOTKEY_BLACKLISTED,
        Code.SIGNATURE_INVALID,
        Code.QUOTE_NONCE_INVALID,
        Code.VOLUMES_REQUIRED,
        Code.VOLUME_UNKNOWN,
        *STORE_CODES,
        *_PROXY_CODES,
    ),
    authentication="hotkey signature over the quote nonce (consumed), quote, client certificate",
)

PROVISION_CONFIRMATION = Endpoint(
    18,
    "confirm_provision",
    "POST /servers/{vm_name}/provision/confirm",
    ProvisionConfirmationRequest,
    VolumeConfirmationAnswer,
    "The volumes, or the root disk, were opened; the next keys become active where they were added",
    (
        Code.HOTKEY_REJECTED,
        Code.HOTKEY_BLACKLISTED,
        Code.SIGNATURE_INVALID,
        Code.CONFIRM_NONCE_INVALID,
        Code.REVOKED,
        Code.VOLUMES_REQUIRED,
        Code.VOLUME_UNKNOWN,
        Code.ROTATION_SUPERSEDED,
        *STORE_CODES,
        *_PROXY_CODES,
    ),
    authentication="hotkey signature over the confirm nonce",
)
