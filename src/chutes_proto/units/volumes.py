"""The transactions of operations 3 and 4: passphrases for a boot token.

Rules kept here:

* a token is checked in this order: known and alive, the hotkey's, the VM's, the attested certificate's, not consumed; a
  refusal changes nothing;
* `SyncVolumes` consumes the token in the same transaction as the changes of keys; `ReadVolume` only checks it;
* a lost answer loses nothing. The same token with the same body bytes, from a caller that presents the attested
  certificate, gets the same answer again while the token is alive: it is read from the generations recorded with the
  boot, and nothing is done twice. Any other use of a consumed token is refused;
* a volume is in use once a boot reported that its disk has a LUKS header, and stays so; an operator's permission to
  format is valid for one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from chutes_proto.errors import Refused
from chutes_proto.keys import generations
from chutes_proto.keys.generations import RESERVED_VOLUMES, Supply
from chutes_proto.keys.vault import FreshKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.boot import check_token
from chutes_proto.units.keys import VmKeys, by_volume, report
from chutes_proto.units.records import AcceptedQuote, Records
from chutes_proto.units.revocations import NO_REVOCATIONS, Revocations
from chutes_proto.wire.codes import Code


@frozen
class VolumeKeys:
    """Each volume's passphrase, in the order of the request, and which of the volumes are in use.

    ``replayed`` marks the answer to an earlier request, given again.
    """

    passphrases: tuple[tuple[str, Secret], ...]
    in_use: tuple[str, ...]
    replayed: bool = False


@frozen
class ReadVolume(Unit[Secret]):
    """Operation 3: the passphrase of one volume, which is in use from then on: its VM is about to open the disk.

    ``certificate`` is the SHA-256 of the presented key's SubjectPublicKeyInfo, None where none was presented. Raises
    `Refused` for the token (401) or for a volume without an active key (404), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: store.Vm
    token_digest: bytes
    certificate: bytes | None
    volume: str
    vault: Vault
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """All that it reads."""
        return _ahead(self)

    def script(self) -> Script[Secret]:
        """Check the token, open the active key."""
        boot = yield from _boot_of(self)
        if boot.spent_at is not None:
            raise _not_found("consumed")
        rows = by_volume((yield from store.ReadLiveGenerations(self.vm)))
        current = generations.active(rows[self.volume])
        if current is None:
            text = "No cache passphrase found for this VM. This shouldn't happen for encrypted volumes."
            reason = f"{self.vm.name!r} of {self.vm.hotkey} has no active key for volume {self.volume!r}"
            raise Refused(Code.KEY_NOT_FOUND, text, reason=reason)
        known = yield from store.ReadAll(store.VolumeRow, self.vm)
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        passphrase = yield from keys.supply(Supply(word="kept", current=current))
        changed, _ = report(known, self.vm, (self.volume,), {self.volume})
        for disk in changed:
            yield from store.Put(disk)
        records = Records(self.now, self.request_id, self.vm, AcceptedQuote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("read", "granted", keys=keys.changes)
        return passphrase


@frozen
class SyncVolumes(Unit[VolumeKeys]):
    """Operation 4: the passphrases of all volumes that the VM names, each once, in the order of ``volumes``.

    A volume without a key gets one; one in ``rekey`` gets a new one; the key of one that is left out is retired.
    ``formatted`` names the volumes whose disks have a LUKS header; None means those that are not in ``rekey``, as
    deployed images have it. ``fresh`` has the entropy for each of ``volumes``; ``body_digest`` is the SHA-256 of the
    raw body.

    Raises `Refused` for the token (401), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: store.Vm
    token_digest: bytes
    certificate: bytes | None
    body_digest: bytes
    volumes: tuple[str, ...]
    rekey: frozenset[str]
    formatted: frozenset[str] | None
    fresh: Mapping[str, FreshKey]
    vault: Vault
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """All that a first sync reads."""
        return _ahead(self)

    def script(self) -> Script[VolumeKeys]:
        """Check and consume the token, change the keys, record the answer; or give a recorded answer again."""
        boot = yield from _boot_of(self)
        if boot.spent_at is not None:
            return (yield from self._replay(boot))
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm)))
        known = yield from store.ReadAll(store.VolumeRow, self.vm)
        passphrases: list[tuple[str, Secret]] = []
        given: dict[str, int] = {}
        for volume in dict.fromkeys(self.volumes):
            seal = keys.sealer(volume, self.fresh[volume])
            rows = stored[volume]
            renews = volume in self.rekey
            supply = generations.rekey(rows, seal, self.now) if renews else generations.fetch(rows, seal)
            passphrases.append((volume, (yield from keys.supply(supply))))
            given[volume] = supply.current.generation
        for volume in sorted(stored.keys() - given.keys() - RESERVED_VOLUMES):
            yield from keys.retire(generations.prune(stored[volume], self.now))
        formatted = given.keys() - self.rekey if self.formatted is None else self.formatted
        changed, in_use = report(known, self.vm, given, formatted)
        for disk in changed:
            yield from store.Put(disk)
        number = boot.given + len(given)
        yield from store.Put(evolve(boot, spent_at=self.now, body_digest=self.body_digest, given=number))
        answered = tuple(
            store.BootVolumeRow(boot.boot_id, volume, position, generation, None, volume in in_use)
            for position, (volume, generation) in enumerate(given.items())
        )
        if answered:
            yield from store.InsertBootVolumes(answered)
        records = Records(self.now, self.request_id, self.vm, AcceptedQuote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("sync", "granted", keys=keys.changes)
        return VolumeKeys(tuple(passphrases), in_use)

    def _replay(self, boot: store.BootRow) -> Script[VolumeKeys]:
        """Give the answer of the request that consumed the token again, to the holder of the attested key only."""
        if self.certificate is None:
            raise _not_found("consumed, and no certificate is presented")
        if self.body_digest != boot.body_digest:
            raise _not_found("consumed by a request with another body")
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        given = yield from store.ReadBootVolumes(boot.boot_id)
        stored = yield from store.ReadLiveGenerations(self.vm, boot.boot_id)
        rows: dict[tuple[str, int | None], store.GenerationRow] = {(row.volume, row.generation): row for row in stored}
        passphrases = tuple((item.volume, keys.open(rows[item.volume, item.current_generation])) for item in given)
        repeated = ", ".join(f"{item.volume}/{item.current_generation} repeated" for item in given)
        records = Records(self.now, self.request_id, self.vm, AcceptedQuote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("sync", "replayed", keys=repeated)
        return VolumeKeys(passphrases, tuple(item.volume for item in given if item.in_use), replayed=True)


def _ahead(unit: ReadVolume | SyncVolumes) -> Sequence[store.StoreOp[Any]]:
    token = store.Read(store.BootRow, unit.token_digest, "token_digest")
    disks = store.ReadAll(store.VolumeRow, unit.vm)
    return token, store.ReadTimes(), store.ReadLiveGenerations(unit.vm), disks


def _boot_of(unit: ReadVolume | SyncVolumes) -> Script[store.BootRow]:
    """The boot that the token was issued to; whether it was consumed is the caller's to check."""
    vm, certificate = unit.vm, unit.certificate
    found = yield from store.Read(store.BootRow, unit.token_digest, "token_digest")
    boot = yield from check_token(found, vm, "base", unit.now, _not_found, unit.revocations)
    if boot.vm.hotkey != vm.hotkey:
        reason = f"issued to hotkey {boot.vm.hotkey}, presented by {vm.hotkey}"
        raise Refused(Code.HOTKEY_MISMATCH, "Hotkey does not match boot token", reason=reason)
    if boot.vm.name != vm.name:
        reason = f"issued to VM {boot.vm.name!r}, presented by {vm.name!r}"
        raise Refused(Code.VM_NAME_MISMATCH, "VM name does not match boot token", reason=reason)
    if certificate is None and boot.token_needs_certificate:
        raise _not_found("presented without the certificate that its profile asks for")
    if certificate is not None and certificate != boot.certificate:
        raise _not_found("presented with another certificate than the attested one")
    return boot


def _not_found(why: str) -> Refused:
    return Refused(Code.BOOT_TOKEN_INVALID, "Boot token not found or expired", reason=f"boot token: {why}")
