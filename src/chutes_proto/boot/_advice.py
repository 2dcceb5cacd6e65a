"""What a failed boot means, and what to do next: for who stands before a console at night.

Rules kept here:

* every code that a boot can be answered with has its sentence, and each says what to do; a code of another version gets
  the words of its class;
* nothing here repeats what a peer said: the reason stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from attrs import frozen

from chutes_proto.errors import (
    BootInterrupted,
    ChutesError,
    ConfigurationError,
    DiskError,
    FileUnavailable,
    HandoverRejected,
    HeaderRejected,
    NotInMemory,
    QuoteUnavailable,
    Refusal,
    RemoteProtocolError,
    SignatureUnavailable,
    TransportError,
    Unavailable,
)
from chutes_proto.wire.codes import Code


@frozen
class Advice:
    """``means``: what has happened; ``do``: what to do next. Each is a sentence or two."""

    means: str
    do: str


_IMAGE: Final = "Boot the image that the server's operator released, or have the operator accept this one."
_OPERATOR: Final = "Ask the server's operator, and name the request."
_AGENT: Final = "Update this image, or the server: they do not speak the same version."
_AGAIN: Final = "Boot again. If it comes back, ask the server's operator, and name the request."
_CLAIM: Final = (
    "If the VM was moved here, the operator says: vm rebind NAME --keep-keys. If the name is another's, choose another."
)

BY_CODE: Final[Mapping[str, Advice]] = MappingProxyType(
    {
        Code.MEASUREMENT_MISMATCH: Advice(
            "The server does not accept what was booted here, image or firmware.", _IMAGE
        ),
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
        Code.HOTKEY_UNKNOWN: Advice("The server does not know this hotkey.", "Have it registered, then boot again."),
        Code.SIGNATURE_INVALID: Advice(
            "The server wants the hotkey's signature, and there was none that holds.",
            "Check signer in the settings, and that seed and hotkey belong together.",
        ),
        Code.PLATFORM_MISMATCH: Advice("The VM's name belongs to another platform or owner.", _CLAIM),
        Code.EXCHANGE_DOWNGRADE: Advice(
            "This VM has had the two-phase exchange, and the image booted now asks for the older one.", _IMAGE
        ),
        Code.NONCE_INVALID: Advice(
            "The nonce was too old, used, or of another server.",
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
        Code.BOOT_TOKEN_INVALID: Advice("The boot token was too old, or spent.", _AGAIN),
        Code.QUOTE_NONCE_INVALID: Advice("The quote nonce was too old, or spent.", _AGAIN),
        Code.CONFIRM_NONCE_INVALID: Advice("Another boot of this VM came between.", _AGAIN),
        Code.ROTATION_SUPERSEDED: Advice("The keys were changed at the server meanwhile.", _AGAIN),
        Code.HOTKEY_MISMATCH: Advice("The boot token is another hotkey's.", _AGAIN),
        Code.VM_NAME_MISMATCH: Advice("The boot token is another VM's.", _AGAIN),
        Code.VOLUME_UNKNOWN: Advice(
            "The settings name a volume that the server does not serve.",
            "Compare the volumes of the settings with those in the server's configuration.",
        ),
        Code.KEY_NOT_FOUND: Advice("The server keeps no passphrase for this VM.", _OPERATOR),
        Code.NOT_FOUND: Advice("There is no key server at this address.", "Check servers in the settings."),
        Code.BUSY: Advice("The server has too much to do.", "Boot again later."),
        Code.DRAINING: Advice("The server is being stopped.", "Boot again when it is back."),
        Code.STORE_UNAVAILABLE: Advice("The server cannot reach its store.", _OPERATOR),
        Code.COLLATERAL_UNAVAILABLE: Advice("The server cannot get what it needs to verify this platform.", _OPERATOR),
        Code.KEY_UNAVAILABLE: Advice("The server lacks the key that its rows are sealed under.", _OPERATOR),
        Code.SERVER_FAULT: Advice("Something is wrong at the server.", _OPERATOR),
    }
)


def advise(error: ChutesError) -> Advice:
    """What an error that ended a boot means."""
    match error:
        case Refusal(code=code) if code in BY_CODE:
            return BY_CODE[code]
        case Unavailable():
            return Advice("The server could not answer in all the time there was.", _OPERATOR)
        case Refusal(status=401 | 403 | 404 | 409):
            return Advice("The server refuses this VM.", _OPERATOR)
        case Refusal():
            return Advice("The server does not take what this agent asks.", _AGENT)
        case TransportError():
            return Advice(
                "No server that this agent trusts answered in all the time there was.",
                "If its certificate does not verify, check the VM's clock and the CA file of the settings; else the"
                " VM's network, and whether the server runs.",
            )
        case RemoteProtocolError():
            return Advice(
                "What answered is not a key server of a version that this agent knows.",
                "Check servers in the settings, and what stands between.",
            )
        case SignatureUnavailable():
            return Advice(
                "The program that signs with the hotkey gave no signature.",
                "Check signer in the settings, and that the program gets its key.",
            )
        case QuoteUnavailable():
            return Advice(
                "This machine cannot make a quote.",
                "Check that it is a TD, and that the host's quote generation service runs.",
            )
        case HeaderRejected():
            return Advice(
                "What the disk's header says is not safe to open: it was altered, is damaged, or is another system's.",
                "Attach the right disk, or put this one's header back from a backup. The host may have altered it.",
            )
        case DiskError():
            return Advice(
                "A disk cannot be used as it is, or a program failed on it. No data on it was written over.",
                "See the reason.",
            )
        case BootInterrupted():
            return Advice("The boot was ended before it was done.", "Boot again.")
        case FileUnavailable():
            return Advice("A file or directory that the agent needs cannot be read or written.", "See the reason.")
        case HandoverRejected():
            return Advice(
                "What `agent run` left for the booted system is too old, of another boot, or not as it was left.",
                "Boot again. If it comes back, compare image and settings of both stages, and see what holds"
                " `agent resume` up.",
            )
        case NotInMemory():
            return Advice(
                "A file that the settings name for a token or a key would be on a disk, not in memory.",
                "Name one on tmpfs in state of the settings.",
            )
        case ConfigurationError():
            return Advice("The settings or the config volume say something they cannot say.", "See the reason.")
        case _:
            return Advice("The agent was asked for what it cannot do, or has a fault.", "See the reason.")
