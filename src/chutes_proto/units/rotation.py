"""The transactions of operations 13 and 14: what a two-phase boot is handed, and what its confirmation decides.

Rules kept here:

* a quote nonce is checked in this order: known, of a two-phase boot and alive, the hotkey's, the VM's, the attested
  certificate's, not spent; a confirm nonce likewise, but for the certificate. A refusal changes nothing, and burns
  neither;
* an attestation spends the quote nonce, hands keys out and issues the confirm nonce, in one transaction, and retires
  nothing: a volume that it leaves out is left alone. The same nonce with the same body gets the same answer again;
* a confirmation counts for the VM's newest attestation alone, and says of each volume that the key handed out as the
  current one opens its disk. It decides all its volumes or none, and once: the same body again is answered alike;
* a confirmed volume is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

from attrs import evolve, frozen

from chutes_proto.errors import KeyUnavailable, Refused
from chutes_proto.keys import generations
from chutes_proto.keys.generations import K3S_VOLUME
from chutes_proto.store._run import Unit
from chutes_proto.store.rows import (
    BootRow,
    BootVolumeRow,
    FindBoot,
    FindConfirm,
    GenerationRow,
    Insert,
    Pin,
    Put,
    ReadBootVolumes,
    ReadLiveGenerations,
    ReadVm,
    ReadVolumes,
    Vm,
    VmRow,
    VolumeRow,
)
from chutes_proto.units.boot import taken
from chutes_proto.units.keys import Keeper, by_volume, report
from chutes_proto.units.records import Quote, Records
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from chutes_proto.keys.vault import FreshKey, Vault
    from chutes_proto.secret import Secret
    from chutes_proto.store._run import Script

CONFIRM_SECONDS = 300

Result: TypeAlias = Literal["promoted", "discarded", "no_pending"]
"""What a confirmation came to for one volume: the next key is active; it is retired; there was none to decide on."""


@frozen
class ConfirmNonce:
    """A confirm nonce, and the digest that is kept of it."""

    nonce: Secret
    digest: bytes


@frozen
class Pair:
    """The key that opens a volume's disk, None where none was made yet, and the key that is to take its place."""

    current: Secret | None
    next: Secret


@frozen
class HandedKeys:
    """Each volume's keys, in the order of the request, and which of the volumes are in use.

    ``replayed``: the answer of an earlier request, given again.
    """

    volumes: tuple[tuple[str, Pair], ...]
    confirm_nonce: Secret
    k3s_encryption_key: Secret
    in_use: tuple[str, ...]
    replayed: bool = False


@frozen
class FindQuoteNonce(Unit[BootRow]):
    """The boot that a quote nonce names. Reads only; what is checked here is checked again when the nonce is spent.

    Raises `Refused` (401).
    """

    now: int
    vm: Vm
    nonce_digest: bytes
    certificate: bytes
    body_digest: bytes

    def script(self) -> Script[BootRow]:
        """Find and check."""
        return (yield from _attestable(self))


@frozen
class AttestVolumes(Unit[HandedKeys]):
    """Operation 13, for evidence that holds: spend the quote nonce, hand out keys, issue the confirm nonce.

    ``formatted`` names the volumes whose disks have a LUKS header; None says nothing of them. ``fresh`` has the
    entropy for each of ``volumes`` and, as ``k3s``, for the VM's encryption key. ``confirm_nonces`` are those that
    belong to this quote nonce, one under each live key-encryption key, the current one's first. ``pin`` is the quote's
    platform; ``body_digest`` is the SHA-256 of the raw body.

    Raises `Refused` for the nonce (401) or the platform (403), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: Vm
    nonce_digest: bytes
    certificate: bytes
    body_digest: bytes
    quote_digest: bytes
    profile_name: str
    profile_version: str
    pin: Pin
    peer_address: str
    volumes: tuple[str, ...]
    formatted: frozenset[str] | None
    fresh: Mapping[str, FreshKey]
    confirm_nonces: tuple[ConfirmNonce, ...]
    vault: Vault

    def script(self) -> Script[HandedKeys]:
        """Check again, spend, hand out, record what was given; or give a recorded answer again."""
        boot = yield from _attestable(self)
        if boot.pin != self.pin:
            raise taken(self.vm, f"it booted on {boot.pin}, and this quote comes from {self.pin}")
        claim = yield from ReadVm(self.vm)
        if claim is None or claim.pin != self.pin:
            raise taken(self.vm, f"{'no claim' if claim is None else claim.pin} binds it, not {self.pin}")
        if boot.spent_at is not None:
            return (yield from self._replay(boot))
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from ReadLiveGenerations(self.vm)))
        k3s = yield from keeper.supply(
            generations.fetch(stored[K3S_VOLUME], keeper.sealer(K3S_VOLUME, self.fresh[K3S_VOLUME]))
        )
        in_use = yield from report(self.vm, self.volumes, self.formatted or ())
        known = {row.volume: row for row in (yield from ReadVolumes(self.vm))}
        pairs: list[tuple[str, Pair]] = []
        for position, volume in enumerate(self.volumes):
            before = known.get(volume) or VolumeRow(self.vm, volume, in_use=False, format_allowed=False)
            seal = keeper.sealer(volume, self.fresh[volume])
            out = generations.hand_out(stored[volume], seal, before.handed)
            pairs.append((volume, Pair(*(yield from keeper.hand_out(out)))))
            current = None if out.current is None else out.current.generation
            yield from Put(evolve(before, handed=current))
            given = BootVolumeRow(boot.boot_id, volume, position, current, out.next.generation, volume in in_use)
            yield from Insert(given)
        confirm = self.confirm_nonces[0]
        yield from Put(
            evolve(
                boot,
                spent_at=self.now,
                body_digest=self.body_digest,
                confirm_digest=confirm.digest,
                confirm_expires_at=self.now + CONFIRM_SECONDS,
            )
        )
        yield from Put(evolve(claim, attested=boot.boot_id))
        records = Records(self.now, self.request_id, self.vm, Quote.of(self), self.peer_address, boot.boot_id)
        yield from records.verdict("runtime", f"volumes of boot {boot.boot_id}")
        yield from records.audit("attest volumes", "granted", keys=keeper.told)
        return HandedKeys(tuple(pairs), confirm.nonce, k3s, in_use)

    def _replay(self, boot: BootRow) -> Script[HandedKeys]:
        """The answer that spent the nonce, again."""
        confirm = next((nonce for nonce in self.confirm_nonces if nonce.digest == boot.confirm_digest), None)
        if confirm is None:
            raise KeyUnavailable(f"the confirm nonce of boot {boot.boot_id} was made under a key that is not at hand")
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        given = yield from ReadBootVolumes(boot.boot_id)
        stored = by_volume((yield from ReadLiveGenerations(self.vm, boot.boot_id)))
        pairs: list[tuple[str, Pair]] = []
        for item in given:
            rows = {row.generation: row for row in stored[item.volume]}
            opened = {number: keeper.open(rows[number]) for number in _numbers(item)}
            pairs.append((item.volume, Pair(opened.get(item.current_generation or 0), opened[_numbers(item)[-1]])))
        k3s = generations.active(stored[K3S_VOLUME])
        if k3s is None:
            raise KeyUnavailable(f"{self.vm.name!r} of {self.vm.hotkey} has no active encryption key")
        told = ", ".join(f"{item.volume}/{number} repeated" for item in given for number in _numbers(item))
        records = Records(self.now, self.request_id, self.vm, Quote.of(self), self.peer_address, boot.boot_id)
        yield from records.audit("attest volumes", "replayed", keys=told)
        in_use = tuple(item.volume for item in given if item.in_use)
        return HandedKeys(tuple(pairs), confirm.nonce, keeper.open(k3s), in_use, replayed=True)


@frozen
class ConfirmVolumes(Unit[tuple[tuple[str, Result], ...]]):
    """Operation 14: the VM says that it opened its disks, and to which of them it added the next key.

    ``rotated`` says that of each volume. Returns what came of each, in that order. Raises `Refused`: 401 for the nonce,
    or where another boot has attested since; 409 where a key that the VM added is not, and can no more be, active.
    """

    now: int
    request_id: str
    vm: Vm
    nonce_digest: bytes
    body_digest: bytes
    rotated: tuple[tuple[str, bool], ...]
    vault: Vault

    def script(self) -> Script[tuple[tuple[str, Result], ...]]:
        """Check, decide on all volumes, record; or answer the same confirmation again."""
        boot = yield from self._confirmable()
        again = boot.confirm_body_digest is not None
        keeper = Keeper(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from ReadLiveGenerations(self.vm, boot.boot_id)))
        given = {item.volume: item for item in (yield from ReadBootVolumes(boot.boot_id))}
        known = {row.volume: row for row in (yield from ReadVolumes(self.vm))}
        results: list[tuple[str, Result]] = []
        for volume, rotated in self.rotated:
            item = given.get(volume)
            if item is None and rotated:
                raise _superseded(volume, "this boot was not handed a next key for it")
            if item is not None and not again:
                yield from self._decide(keeper, stored[volume], item, rotated)
                before = known.get(volume) or VolumeRow(self.vm, volume, in_use=False, format_allowed=False)
                yield from Put(evolve(before, in_use=True, handed=None))
            elif item is not None and rotated:
                _check_active(volume, stored[volume], item)
            had_choice = item is not None and item.current_generation is not None
            results.append((volume, "promoted" if rotated else "discarded" if had_choice else "no_pending"))
        if not again:
            yield from Put(evolve(boot, confirm_body_digest=self.body_digest))
        told = keeper.told or ", ".join(f"{volume} {result}" for volume, result in results)
        records = Records(self.now, self.request_id, self.vm, Quote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("confirm volumes", "replayed" if again else "granted", keys=told)
        return tuple(results)

    def _decide(self, keeper: Keeper, rows: list[GenerationRow], item: BootVolumeRow, rotated: bool) -> Script[None]:
        following = _numbers(item)[-1]
        change = generations.confirm(rows, item.current_generation, following, rotated=rotated, at=self.now)
        if change is None:
            raise _superseded(item.volume, f"generation {following} was retired since it was handed out")
        yield from keeper.settle(item.volume, change)

    def _confirmable(self) -> Script[BootRow]:
        boot = yield from FindConfirm(self.nonce_digest)
        if boot is None or boot.confirm_expires_at is None:
            raise _confirm_refused("unknown")
        if boot.voided_at is not None:
            raise _confirm_refused("voided")
        if self.now >= boot.confirm_expires_at:
            raise _confirm_refused("expired")
        if boot.vm != self.vm:
            raise _confirm_refused(f"issued to {boot.vm}, presented by {self.vm}", "mismatch")
        claim: VmRow | None = yield from ReadVm(self.vm)
        if claim is None or claim.attested != boot.boot_id:
            raise _confirm_refused("another boot has attested since")
        if boot.confirm_body_digest not in (None, self.body_digest):
            raise _confirm_refused("spent by a request with another body")
        return boot


def _attestable(unit: FindQuoteNonce | AttestVolumes) -> Script[BootRow]:
    """The boot of the unit's quote nonce, unspent or spent by the very same request."""
    boot = yield from FindBoot(unit.nonce_digest)
    if boot is None:
        raise _quote_refused("unknown")
    if boot.exchange != "two-phase":
        raise _quote_refused("a boot token, not a quote nonce")
    if boot.voided_at is not None:
        raise _quote_refused("voided")
    if unit.now >= boot.token_expires_at:
        raise _quote_refused("expired")
    if boot.vm != unit.vm:
        raise _quote_refused(f"issued to {boot.vm}, presented by {unit.vm}", "mismatch")
    if boot.certificate != unit.certificate:
        raise _quote_refused("presented with another certificate than the attested one", "mismatch")
    if boot.body_digest not in (None, unit.body_digest):
        raise _quote_refused("spent by a request with another body")
    return boot


def _check_active(volume: str, rows: list[GenerationRow], item: BootVolumeRow) -> None:
    active = generations.active(rows)
    if active is None or active.generation != _numbers(item)[-1]:
        raise _superseded(volume, "its key was active and is no more")


def _numbers(item: BootVolumeRow) -> tuple[int, ...]:
    """The generations that a boot was handed for a volume, the next one last."""
    return tuple(number for number in (item.current_generation, item.next_generation) if number is not None)


def _quote_refused(why: str, what: str = "not found or expired") -> Refused:
    return Refused(Code.QUOTE_NONCE_INVALID, f"Quote nonce {what}", reason=f"quote nonce: {why}")


def _confirm_refused(why: str, what: str = "not found or expired") -> Refused:
    return Refused(Code.CONFIRM_NONCE_INVALID, f"Confirm nonce {what}", reason=f"confirm nonce: {why}")


def _superseded(volume: str, why: str) -> Refused:
    return Refused(
        Code.ROTATION_SUPERSEDED,
        "The rotation was superseded; keep the old key",
        reason=f"volume {volume}: {why}",
    )
