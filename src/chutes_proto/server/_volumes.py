"""Operations 3 and 4: the passphrases of a VM's volumes, for the boot token of its last boot.

Checks without rows are made here, in the order in which deployed clients know the texts; the unit checks the token
(``units/volumes.py``) and consumes it in the same transaction as the keys that it grants.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from chutes_proto.auth.certificates import spki_sha256
from chutes_proto.effects import Entropy, Flow
from chutes_proto.errors import BadRequest, Refused
from chutes_proto.keys.vault import FreshKey
from chutes_proto.server._boot import token_digest
from chutes_proto.server._call import Call
from chutes_proto.server._retry import transact_patiently
from chutes_proto.server._service import Service
from chutes_proto.store._rows import Vm
from chutes_proto.units.volumes import ReadVolume, SyncVolumes
from chutes_proto.wire.codes import Code
from chutes_proto.wire.names import HEX_32
from chutes_proto.wire.vms import CachePassphraseAnswer, CachePassphraseRequest, VolumeSyncAnswer, VolumeSyncRequest


def read_cache_passphrase(service: Service, call: Call[CachePassphraseRequest]) -> Flow[CachePassphraseAnswer]:
    """Operation 3: the first configured volume's passphrase; the token is checked, not redeemed."""
    message = call.message
    token, hotkey = _credentials(message.boot_token, message.hotkey_header, message.hotkey)
    known = check_shape(token, Code.BOOT_TOKEN_INVALID, "Boot token")
    vm = Vm(hotkey, message.vm_name)
    volume = service.volumes[0]
    passphrase = yield from transact_patiently(
        service.waiting(known, call.request),
        ReadVolume(
            now=call.now,
            request_id=call.request_id,
            vm=vm,
            token_digest=token_digest(known),
            certificate=_presented(call),
            volume=volume,
            vault=service.vault,
            revocations=service.revoked.now,
        ),
        call.request,
    )
    yield from call.log("passphrase_read", vm=vm.name, hotkey=vm.hotkey, trust=service.trust, volume=volume)
    return CachePassphraseAnswer(passphrase=passphrase)


def sync_volumes(service: Service, call: Call[VolumeSyncRequest]) -> Flow[VolumeSyncAnswer]:
    """Operation 4: the passphrases of all volumes that the VM names; the token is redeemed."""
    message = call.message
    token, hotkey = _credentials(message.boot_token, message.hotkey, message.hotkey_query)
    volumes = tuple(dict.fromkeys(message.volumes))
    rekey = tuple(dict.fromkeys(message.rekey or ()))
    check_volumes(service, volumes)
    if strangers := [volume for volume in rekey if volume not in volumes]:
        raise BadRequest(
            Code.REKEY_NOT_SUBSET, f"rekey must be a subset of volumes; not in volumes: {_some(strangers)}"
        )
    if message.formatted is not None:
        check_names("formatted volume", message.formatted, service.volumes)
    known = check_shape(token, Code.BOOT_TOKEN_INVALID, "Boot token")
    parts = yield from entropy_parts(len(volumes))
    fresh = {volume: FreshKey.from_entropy(part) for volume, part in zip(volumes, parts, strict=True)}
    vm = Vm(hotkey, message.vm_name)
    keys = yield from transact_patiently(
        service.waiting(known, call.request),
        SyncVolumes(
            now=call.now,
            request_id=call.request_id,
            vm=vm,
            token_digest=token_digest(known),
            certificate=_presented(call),
            body_digest=hashlib.sha256(call.request.body).digest(),
            volumes=volumes,
            rekey=frozenset(rekey),
            formatted=None if message.formatted is None else frozenset(message.formatted),
            fresh=fresh,
            vault=service.vault,
            revocations=service.revoked.now,
        ),
        call.request,
    )
    yield from call.log(
        "volumes_synced",
        vm=vm.name,
        hotkey=vm.hotkey,
        trust=service.trust,
        volumes=list(volumes),
        rekey=list(rekey),
        replayed=keys.replayed,
    )
    # Deployed clients take every member of the answer for a passphrase; only one that sends `formatted` knows the list.
    return VolumeSyncAnswer(passphrases=keys.passphrases, in_use=None if message.formatted is None else keys.in_use)


def _credentials(token: str | None, in_header: str | None, in_query: str | None) -> tuple[str, str]:
    """The token and the hotkey. Older images send the hotkey in the query; if it comes twice, both must agree."""
    if not token:
        raise BadRequest(Code.BOOT_TOKEN_REQUIRED, "Boot token is required (X-Boot-Token header)")
    if in_header and in_query and in_header != in_query:
        raise BadRequest(Code.HOTKEY_CONFLICT, "Hotkey differs between header and query")
    hotkey = in_header or in_query
    if not hotkey:
        raise BadRequest(Code.HOTKEY_REQUIRED, "Hotkey is required")
    return token, hotkey


def entropy_parts(count: int) -> Flow[list[bytes]]:
    """Draw entropy for ``count`` keys at once, in parts of `FreshKey.SIZE` bytes."""
    entropy = yield from Entropy(FreshKey.SIZE * count)
    return [entropy[FreshKey.SIZE * index :][: FreshKey.SIZE] for index in range(count)]


def check_shape(text: str, code: Code, what: str) -> bytes:
    """A token or nonce as it is digested: its text. Raises `Refused` unless it is 64 lowercase hex digits."""
    if not HEX_32.fullmatch(text):
        raise Refused(code, f"{what} not found or expired", reason=f"{what.lower()}: not 64 lowercase hex digits")
    return text.encode("ascii")


def check_volumes(service: Service, volumes: Sequence[str]) -> None:
    """Raise `BadRequest` for an empty list, and for a volume that this server does not serve."""
    if not volumes:
        raise BadRequest(Code.VOLUMES_REQUIRED, "volumes is required and must be non-empty")
    check_names("volume", volumes, service.volumes)


def check_names(what: str, names: Iterable[str], served: tuple[str, ...]) -> None:
    """Raise `BadRequest` for a name that this server does not serve."""
    if unknown := [name for name in names if name not in served]:
        raise BadRequest(Code.VOLUME_UNKNOWN, f"Invalid {what} name(s): {_some(unknown)}. Supported: {list(served)}")


def _some(names: list[str]) -> str:
    """The first four names, cut: an answer must not be as long as the request."""
    shown = str([name[:64] for name in names[:4]])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _presented(call: Call[Any]) -> bytes | None:
    """The SHA-256 of the presented certificate's key. The boot says whether one must be presented."""
    certificate = call.request.peer_certificate
    return None if certificate is None else spki_sha256(certificate)
