"""Explain a failed boot, and say what to do next: for an operator at a console at night.

Rules kept here:

* every code that can answer a boot has its sentence, and each says what to do; a code of another version gets the
  advice of its class;
* nothing here repeats a peer's words: they are in the reason beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from attrs import frozen

from chutes_proto import errors
from chutes_proto.errors import ChutesError
from chutes_proto.wire.codes import NO_CODE, Code


@frozen
class Advice:
    """``means``: what has happened; ``do``: what to do next. Each is a sentence or two."""

    means: str
    do: str


_IMAGE: Final = "Boot the image that the server's operator released, or have the operator accept this one."
_OPERATOR: Final = "Ask the server's operator, and name the request."
_AGENT: Final = "Update this image, or the server: they do not speak the same version."
_REASON: Final = "See the reason."
_AGAIN: Final = "Boot again. If it comes back, ask the server's operator, and name the request."
_CLAIM: Final = (
    "If the VM was moved here, the operator runs: vm rebind NAME --keep-keys. If the name is another's, choose another."
)

BY_CODE: Final[Mapping[str, Advice]] = {
    Code.MEASUREMENT_MISMATCH: Advice("The server does not accept what was booted here, image or firmware.", _IMAGE),
    Code.TCB_REJECTED: Advice(
        "The platform's firmware or microcode is too old for the server.",
        "Update BIOS, microcode and TDX module of the host; the server's log says what it wants.",
    ),
    Code.ATTRIBUTES_REJECTED: Advice(
        "The TD was started with debug on, or with attributes that are not accepted.",
        "Start the VM without debug; compare its TD attributes with the measurement profile.",
    ),
    Code.QUOTE_REJECTED: Advice(
        "The quote or its platform does not verify.",
        "Check that the host's quote generation service is provisioned for this platform; then ask the operator.",
    ),
    Code.QUOTE_MALFORMED: Advice(
        "The quoter gave something that is not a TDX quote.", "Check the quoter that the settings name."
    ),
    Code.HOTKEY_REJECTED: Advice(
        "The server does not know this hotkey.", "Check the hotkey in the settings or the config volume."
    ),
    Code.HOTKEY_BLACKLISTED: Advice("The server's operator shut out this hotkey.", _OPERATOR),
    Code.HOTKEY_UNKNOWN: Advice("The server does not know this hotkey.", "Have it registered, then boot again."),
    Code.SIGNATURE_INVALID: Advice(
        "The server wants the hotkey's signature, and there was none that holds.",
        "Check signer in the settings, and that seed and hotkey belong together.",
    ),
    Code.REVOKED: Advice("The server's operator shut out this VM, its hotkey or its platform.", _OPERATOR),
    Code.PLATFORM_MISMATCH: Advice("The VM's name belongs to another platform or owner.", _CLAIM),
    Code.EXCHANGE_DOWNGRADE: Advice(
        "This VM has had the two-phase exchange, and the image booted now asks for the older one.", _IMAGE
    ),
    Code.EXCHANGE_MISMATCH: Advice(
        "The server expects another exchange of this image.",
        "The server's operator gives the image's measurement profile the exchange of this image.",
    ),
    Code.VERSION_REJECTED: Advice("This image is too old for the server.", "Boot a newer image."),
    Code.PROXY_REQUIRED: Advice(
        "The server serves this step through another proxy only.",
        "Check servers in the settings: they name the proxy for images of this version.",
    ),
    Code.PROXY_UNAVAILABLE: Advice("The server has no proxy for images of this version.", _OPERATOR),
    Code.NONCE_INVALID: Advice(
        "The nonce was expired, consumed, or of another server.",
        "Check that all servers of the settings share one store; then boot again.",
    ),
    Code.NONCE_MISMATCH: Advice("The quote is not over this boot's nonce.", "Check the quoter that is in use."),
    Code.CERTIFICATE_MISMATCH: Advice(
        "The quote is not over this boot's TLS key, or something between ends TLS.",
        "Check the quoter, and that a proxy before the server passes client certificates on.",
    ),
    Code.CLIENT_CERTIFICATE_REQUIRED: Advice(
        "The client certificate did not reach the server.",
        "Check that a proxy before the server passes client certificates on.",
    ),
    Code.BOOT_TOKEN_INVALID: Advice("The boot token was expired or redeemed.", _AGAIN),
    Code.QUOTE_NONCE_INVALID: Advice("The quote nonce was expired or consumed.", _AGAIN),
    Code.CONFIRM_NONCE_INVALID: Advice("Another boot of this VM came between.", _AGAIN),
    Code.ROTATION_SUPERSEDED: Advice("The keys were changed at the server meanwhile.", _AGAIN),
    Code.HOTKEY_MISMATCH: Advice("The boot token is another hotkey's.", _AGAIN),
    Code.VM_NAME_MISMATCH: Advice("The boot token is another VM's.", _AGAIN),
    Code.VOLUME_UNKNOWN: Advice(
        "The settings name a volume that the server does not serve.",
        "Compare the volumes of the settings with those in the server's configuration.",
    ),
    Code.KEY_NOT_FOUND: Advice("The server keeps no passphrase for this VM.", _OPERATOR),
    Code.NOT_FOUND: Advice("This address does not belong to a key server.", "Check servers in the settings."),
    Code.RATE_LIMITED: Advice(
        "The server got too many requests from this address.",
        "Boot again later. If many VMs share the address, the operator raises the limit.",
    ),
    Code.REQUEST_TIMEOUT: Advice(
        "The request reached the server too slowly.",
        "Check the network. The server's operator can raise limits.request_seconds.",
    ),
    Code.BUSY: Advice("The server has too much to do.", "Boot again later."),
    Code.DRAINING: Advice("The server is being stopped.", "Boot again when it is back."),
    Code.STORE_UNAVAILABLE: Advice("The server cannot reach its store.", _OPERATOR),
    Code.COLLATERAL_UNAVAILABLE: Advice("The server cannot get what it needs to verify this platform.", _OPERATOR),
    Code.KEY_UNAVAILABLE: Advice("The server lacks the key that its rows are sealed under.", _OPERATOR),
    Code.SERVER_FAULT: Advice("Something is wrong at the server.", _OPERATOR),
    Code.BAD_REQUEST: Advice(
        "The request did not reach the server as this agent sent it, or a proxy before the server is not configured.",
        "Check any proxy on the way; the server's log has the reason.",
    ),
    NO_CODE: Advice(
        "The answer has no code: it may be that of a proxy or of another service.",
        "Check servers in the settings, and any proxy on the way.",
    ),
}


_BY_KIND: Final[Mapping[type[ChutesError], Advice]] = {
    errors.Unavailable: Advice("The server could not answer before the deadline.", _OPERATOR),
    errors.Refused: Advice("The server refuses this VM.", _OPERATOR),
    errors.Refusal: Advice("The server does not accept this agent's request.", _AGENT),
    errors.TransportError: Advice(
        "No server that this agent trusts answered before the deadline.",
        "If its certificate does not verify, check the VM's clock and the CA file of the settings; else the VM's"
        " network, and whether the server runs.",
    ),
    errors.RemoteProtocolError: Advice(
        "The peer is not a key server of a version that this agent knows.",
        "Check servers in the settings, and any proxy on the way.",
    ),
    errors.SignatureUnavailable: Advice(
        "The program that signs with the hotkey gave no signature.",
        "Check signer in the settings, and that the program gets its key.",
    ),
    errors.QuoteUnavailable: Advice(
        "This machine cannot make a quote.", "Check that it is a TD, and that the host's quote generation service runs."
    ),
    errors.HeaderRejected: Advice(
        "The disk's header is not safe to open: it was altered, is damaged, or belongs to another system.",
        "Attach the right disk, or restore its header from a backup. The host may have altered it.",
    ),
    errors.DiskError: Advice(
        "A disk cannot be used as it is, or a program failed on it. No data on it was overwritten.", _REASON
    ),
    errors.BootInterrupted: Advice("A signal ended the boot.", "Boot again."),
    errors.FileUnavailable: Advice("A file or directory that the agent needs cannot be read or written.", _REASON),
    errors.HandoverRejected: Advice(
        "The key hand-off of `agent run` to the booted system is too old, of another boot, or was altered.",
        "Boot again. If it comes back, compare image and settings of both stages, and look for a delay of"
        " `agent resume`.",
    ),
    errors.NotInMemory: Advice(
        "A file that the settings name for a token or a key would be on a disk, not in memory.",
        "Name one on tmpfs in state of the settings.",
    ),
    errors.ConfigurationError: Advice("The settings or the config volume are wrong.", _REASON),
    ChutesError: Advice("The agent was called wrongly, or has a fault.", _REASON),
}
"""The advice where there is none for a code: that of the error's nearest class."""


def advise(error: ChutesError) -> Advice:
    """Explain an error that ended a boot."""
    if isinstance(error, errors.Refusal) and error.code in BY_CODE:
        return BY_CODE[error.code]
    return next(_BY_KIND[kind] for kind in type(error).__mro__ if kind in _BY_KIND)
