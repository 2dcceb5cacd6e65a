"""What an agent in the initramfs leaves to one in the booted system: enough to ask for the volumes' keys, and no key.

Rules kept here:

* no passphrase is in it. The boot token, or the quote nonce, and the throw-away client key are: the two-phase exchange
  takes a quote nonce only together with the attested key, and a lost answer is given again only to its certificate.
  They are worth something for `LIFE` seconds, at one VM's name, and end with the boot that made them;
* it counts in the boot that wrote it, on the clock of `Uptime`, which steps over a correction of the wall clock;
* it says nothing that the settings decide: a server that they do not name is not asked.
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
class Handover:
    """A grant on its way: where and when it was given, in which boot of the machine, and the key it is bound to.

    ``granted`` is on the clock of `Uptime`; ``boot_id`` is the kernel's. The grant that comes out has an empty root
    passphrase.
    """

    server: str
    granted: float
    boot_id: str
    grant: BootGrant
    identity: ClientIdentity

    def encode(self) -> Secret:
        """The bytes of the file."""
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
            "certificate": identity.certificate_pem.decode("ascii"),
            "key": _text(identity.key_pem),
            "spki_sha256": identity.spki_sha256.hex(),
        }
        return Secret(json.encode(members) + b"\n")

    @classmethod
    def decode(cls, data: bytes, settings: AgentSettings, *, boot_id: str, uptime: float) -> Handover:
        """What ``data`` says, for use now. Raises `HandoverRejected`, whose text repeats nothing of it."""
        try:
            members = json.decode(data)
        except json.JsonError:
            members = None
        handover = _read(cast("dict[str, object]", members) if isinstance(members, dict) else {})
        if handover is None or handover.encode() != Secret(data):
            raise HandoverRejected("not what `agent run` of this version leaves; boot again")
        if handover.boot_id != boot_id or not 0 <= uptime - handover.granted < LIFE:
            raise HandoverRejected(f"left by another boot, or more than {LIFE} s ago; boot again")
        if handover.server not in settings.servers:
            raise HandoverRejected("left by a boot at a server that the settings do not name; boot again")
        return handover


def _read(members: dict[str, object]) -> Handover | None:
    match members:
        case {
            "server": str(server),
            "granted": float(granted),
            "boot_id": str(boot_id),
            "hotkey": str(hotkey),
            "vm_name": str(vm_name),
            "boot_token": str() | None as token,
            "luks_quote_nonce": str() | None as nonce,
            "certificate": str(certificate),
            "key": str(key),
            "spki_sha256": str(digest),
        } if (token is None) != (nonce is None) and all(map(HEX_32.fullmatch, (token or nonce or "", digest))):
            grant = BootGrant(hotkey, vm_name, Secret(b""), _secret(token), _secret(nonce))
            identity = ClientIdentity(certificate.encode(), Secret(key.encode()), bytes.fromhex(digest))
            return Handover(server, granted, boot_id, grant, identity)
        case _:
            return None


def _text(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal().decode("ascii")


def _secret(text: str | None) -> Secret | None:
    return None if text is None else Secret(text.encode())
