"""The transactions of operations 3 and 4: a boot token, and the passphrases that it is good for.

Rules kept here:

* a token is checked in this order: known and alive, the hotkey's, the VM's, the attested certificate's, not spent; a
  refusal changes nothing;
* `SyncVolumes` spends the token in the same transaction as the changes of keys; `ReadVolume` only checks it;
* a lost answer loses nothing. The same token with the same body bytes, from a caller that presents the attested
  certificate, gets the same answer again within the token's life: it is read from the generations recorded with the
  boot, and nothing is done twice. Any other use of a spent token is refused;
* a volume is in use once a boot reported that its disk has a LUKS header, and stays so; an operator's permission to
  format is good for one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import frozen

from chutes_proto.errors import Refused
from chutes_proto.keys import generations
from chutes_proto.keys.generations import RESERVED_VOLUMES, Supply
from chutes_proto.store._run import Unit
from chutes_proto.store.rows import (
    BootRow,
    BootVolumeRow,
    FindBoot,
    GenerationRow,
    Insert,
    ReadBootVolumes,
    ReadLiveGenerations,
    SpendToken,
    Vm,
)
from chutes_proto.units.keys import Keeper, by_volume, report
from chutes_proto.units.records import Quote, Records
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from chutes_proto.keys.vault import FreshKey, Vault
    from chutes_proto.secret import Secret
    from chutes_proto.store._run import Script


@frozen
class VolumeKeys:
    """Each volume's passphrase, in the order of the request, and which of the volumes are in use.

    ``replayed``: the answer of an earlier request, given again.
    """

    passphrases: tuple[tuple[str, Secret], ...]
    in_use: tuple[str, ...]
    replayed: bool = False


@frozen
class ReadVolume(Unit["Secret"]):
    """Operation 3: the passphrase of one volume. Who asks for it is about to open a disk, so the volume is in use.

    ``certificate`` is the SHA-256 of the presented key's SubjectPublicKeyInfo, None where none was presented. Raises
    `Refused` for the token (401) or where there is no key (404), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: Vm
    token_digest: bytes
    certificate: bytes | None
    volume: str
    vault: Vault

    def script(self) -> Script[Secret]:
        """Check the token, open the active key."""
        boot = yield from _boot_of(self.token_digest, self.vm, self.certificate, self.now)
        if boot.spent_at is not None:
            raise _not_found("spent")
        rows = by_volume((yield from ReadLiveGenerations(self.vm)))
        current = generations.active(rows[self.volume])
        if current is None:
            raise Refused(
                Code.KEY_NOT_FOUND,
                "No cache passphrase found for this VM. This shouldn't happen for encrypted volumes.",
                reason=f"{self.vm.name!r} of {self.vm.hotkey} has no active key for volume {self.volume!r}",
            )
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        passphrase = yield from keeper.supply(Supply(word="kept", current=current))
        _ = yield from report(self.vm, (self.volume,), {self.volume})
        records = Records(self.now, self.request_id, self.vm, Quote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("read", "granted", keys=keeper.told)
        return passphrase


@frozen
class SyncVolumes(Unit[VolumeKeys]):
    """Operation 4: the passphrases of all volumes that the VM names, each once, in the order of ``volumes``.

    A volume without a key gets one; one in ``rekey`` gets a new one; one that is left out has its key retired.
    ``formatted`` names the volumes whose disks have a LUKS header; with None, those are the ones not in ``rekey``,
    which is what deployed images mean by it. ``fresh`` has the entropy for each of ``volumes``; ``body_digest`` is the
    SHA-256 of the raw body.

    Raises `Refused` for the token (401), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: Vm
    token_digest: bytes
    certificate: bytes | None
    body_digest: bytes
    volumes: tuple[str, ...]
    rekey: frozenset[str]
    formatted: frozenset[str] | None
    fresh: Mapping[str, FreshKey]
    vault: Vault

    def script(self) -> Script[VolumeKeys]:
        """Check and spend the token, change the keys, record what was given; or give a recorded answer again."""
        boot = yield from _boot_of(self.token_digest, self.vm, self.certificate, self.now)
        if boot.spent_at is not None:
            return (yield from self._replay(boot))
        _ = yield from SpendToken(boot.boot_id, self.now, self.body_digest)
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from ReadLiveGenerations(self.vm)))
        passphrases: list[tuple[str, Secret]] = []
        given: dict[str, int] = {}
        for volume in dict.fromkeys(self.volumes):
            seal = keeper.sealer(volume, self.fresh[volume])
            rows = stored[volume]
            renews = volume in self.rekey
            supply = generations.rekey(rows, seal, self.now) if renews else generations.fetch(rows, seal)
            passphrases.append((volume, (yield from keeper.supply(supply))))
            given[volume] = supply.current.generation
        for volume in sorted(stored.keys() - given.keys() - RESERVED_VOLUMES):
            yield from keeper.retire(generations.prune(stored[volume], self.now))
        formatted = given.keys() - self.rekey if self.formatted is None else self.formatted
        in_use = yield from report(self.vm, given, formatted)
        for position, (volume, generation) in enumerate(given.items()):
            yield from Insert(BootVolumeRow(boot.boot_id, volume, position, generation, None, volume in in_use))
        records = Records(self.now, self.request_id, self.vm, Quote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("sync", "granted", keys=keeper.told)
        return VolumeKeys(tuple(passphrases), in_use)

    def _replay(self, boot: BootRow) -> Script[VolumeKeys]:
        """The answer that spent the token, again, for who can only be the caller that it was meant for."""
        if self.certificate is None:
            raise _not_found("spent, and no certificate is presented")
        if self.body_digest != boot.body_digest:
            raise _not_found("spent by a request with another body")
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        given = yield from ReadBootVolumes(boot.boot_id)
        stored = yield from ReadLiveGenerations(self.vm, boot.boot_id)
        rows: dict[tuple[str, int | None], GenerationRow] = {(row.volume, row.generation): row for row in stored}
        passphrases = tuple((item.volume, keeper.open(rows[item.volume, item.current_generation])) for item in given)
        told = ", ".join(f"{item.volume}/{item.current_generation} repeated" for item in given)
        records = Records(self.now, self.request_id, self.vm, Quote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("sync", "replayed", keys=told)
        return VolumeKeys(passphrases, tuple(item.volume for item in given if item.in_use), replayed=True)


def _boot_of(token_digest: bytes, vm: Vm, certificate: bytes | None, now: int) -> Script[BootRow]:
    """The boot that the token was issued to. That it is not spent is the caller's to check."""
    boot = yield from FindBoot(token_digest)
    if boot is None:
        raise _not_found("unknown")
    if boot.exchange != "base":
        raise _not_found("a quote nonce, not a boot token")
    if boot.voided_at is not None:
        raise _not_found("voided")
    if now >= boot.token_expires_at:
        raise _not_found("expired")
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
