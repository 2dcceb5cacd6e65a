"""The key hand-off from the agent in the initramfs to the one in the booted system: a grant, but no disk key.

Rules kept here:

* it holds no passphrase. It holds the boot token, or the quote nonce, and the ephemeral client key: the two-phase
  exchange accepts a quote nonce only with the attested key, and a lost answer is repeated only to its certificate.
  They are valid for `LIFE` seconds, for one VM's name, and end with the boot that made them;
* it is valid in the boot that wrote it, on the clock of `Uptime`, which no correction of the wall clock changes;
* it decides nothing that the settings decide: no request goes to a server that they do not name.
"""

from __future__ import annotations

from typing import Final, cast

from attrs import frozen

from chutes_proto.auth.client_identity import ClientIdentity
from chutes_proto.boot._flows import BootGrant
from chutes_proto.boot._settings import AgentSettings
from chutes_proto.errors import HandoverRejected
from chutes_proto.secret import Secret
from chutes_proto.wire import json
from chutes_proto.wire.names import HEX_32

LIFE: Final = 600
"""Seconds that a boot token and a quote nonce live."""
MAX_SIZE: Final = 16 * 1024

_FORMAT: Final = 1


@frozen
class Handoff:
    """A grant on its way: its server and time, the boot of the machine, and the client key that it is bound to.

    ``granted`` is on the clock of `Uptime`; ``boot_id`` is the kernel's. The grant that comes out has an empty root
    passphrase.
    """

    server: str
    granted: float
    boot_id: str
    grant: BootGrant
    identity: ClientIdentity

    def encode(self) -> Secret:
        """Encode as the bytes of the file."""
        grant, identity = self.grant, self.identity
        members: dict[str, object] = {
            "format": _FORMAT,
            "server": self.server,
            "granted": self.granted,
            "boot_id": self.boot_id,
            "hotkey": grant.miner_hotkey,
            "vm_name": grant.vm_name,
            "boot_token": _text(grant.boot_token),
            "luks_quote_nonce": _text(grant.luks_quote_nonce),
            "vm_auth_ss58": grant.vm_auth_ss58,
            "certificate": identity.certificate_pem.decode("ascii"),
            "key": _text(identity.key_pem),
            "spki_sha256": identity.spki_sha256.hex(),
        }
        return Secret(json.encode(members) + b"\n")

    @classmethod
    def decode(cls, data: bytes, settings: AgentSettings, *, boot_id: str, uptime: float) -> Handoff:
        """Decode and check ``data`` for use now. Raises `HandoverRejected`, whose text repeats nothing of it."""
        try:
            members = json.decode(data)
        except json.JsonError:
            members = None
        handoff = _read(cast("dict[str, object]", members) if isinstance(members, dict) else {})
        if handoff is None or handoff.encode() != Secret(data):
            raise HandoverRejected("not a file of `agent run` of this version; boot again")
        if handoff.boot_id != boot_id or not 0 <= uptime - handoff.granted < LIFE:
            raise HandoverRejected(f"left by another boot, or more than {LIFE} s ago; boot again")
        if handoff.server not in settings.servers:
            raise HandoverRejected("left by a boot at a server that the settings do not name; boot again")
        return handoff


def _read(members: dict[str, object]) -> Handoff | None:
    match members:
        case {
            "server": str(server),
            "granted": float(granted),
            "boot_id": str(boot_id),
            "hotkey": str(hotkey),
            "vm_name": str(vm_name),
            "boot_token": str() | None as token,
            "luks_quote_nonce": str() | None as nonce,
            "vm_auth_ss58": str() | None as caller,
            "certificate": str(certificate),
            "key": str(key),
            "spki_sha256": str(digest),
        } if (token is None) != (nonce is None) and all(map(HEX_32.fullmatch, (token or nonce or "", digest))):
            grant = BootGrant(hotkey, vm_name, Secret(b""), _secret(token), _secret(nonce), caller)
            identity = ClientIdentity(certificate.encode(), Secret(key.encode()), bytes.fromhex(digest))
            return Handoff(server, granted, boot_id, grant, identity)
        case _:
            return None


def _text(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal().decode("ascii")


def _secret(text: str | None) -> Secret | None:
    return None if text is None else Secret(text.encode())
