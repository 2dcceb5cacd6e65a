"""The transactions of operations 13, 14, 17 and 18: keys handed out to a two-phase boot, and its confirmations.

Rules kept here:

* a quote nonce is checked in this order: known, of a two-phase boot and alive, the hotkey's, the VM's, the attested
  certificate's, not consumed; a confirm nonce likewise, but for the certificate. A refusal changes nothing and consumes
  neither;
* an attestation consumes the quote nonce, hands keys out and issues the confirm nonce, in one transaction, and retires
  nothing: a volume that it leaves out is left alone. The same nonce with the same body gets the same answer again;
* a confirmation counts for the VM's newest attestation alone: an older boot no longer knows which keys the disk has. It
  says of each volume that the key handed out as the current one opens its disk. It decides all its volumes or none, and
  once: the same body again is answered alike;
* the next root key of a provisioned boot has a nonce of its own, of its grant; the confirmation counts for the VM's
  newest grant alone, and otherwise like that of a volume;
* a quote nonce of a provisioned boot is for operation 17, any other for operation 13;
* where no rotation is due, the current key is handed out as the next one, too, and there is none to decide on;
* a confirmed volume is in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from attrs import evolve, frozen

from chutes_proto.errors import KeyUnavailable, Refused
from chutes_proto.keys import generations
from chutes_proto.keys.generations import K3S_VOLUME, ROOT_VOLUME, Pace
from chutes_proto.keys.vault import FreshKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.boot import check_not_void, check_token, taken
from chutes_proto.units.keys import VmKeys, by_volume, disk_of, report
from chutes_proto.units.records import AcceptedQuote, Records
from chutes_proto.units.revocations import NO_REVOCATIONS, Revocations
from chutes_proto.wire.codes import Code

CONFIRM_SECONDS = 300

Result: TypeAlias = Literal["promoted", "discarded", "no_pending"]
"""The outcome of a confirmation for one volume: the next key is active; it is retired; there was none to decide on."""


@frozen
class ConfirmNonce:
    """A confirm nonce (64 lowercase hex digits), and its SHA-256, which the store keeps."""

    nonce: Secret
    digest: bytes


@frozen
class Pair:
    """The key that opens a volume's disk, None where none was made yet, and the key that replaces it, or the same."""

    current: Secret | None
    next: Secret


@frozen
class HandedKeys:
    """Each volume's keys, in the order of the request, and which of the volumes are in use.

    ``replayed`` marks the answer to an earlier request, given again.
    """

    volumes: tuple[tuple[str, Pair], ...]
    confirm_nonce: Secret
    k3s_encryption_key: Secret
    in_use: tuple[str, ...]
    replayed: bool = False


@frozen
class FindQuoteNonce(Unit[store.BootRow]):
    """Find the boot of a quote nonce, without a write. Raises `Refused` (401).

    It saves the verification of a quote that would be refused; `AttestVolumes` makes the same checks again.
    """

    now: int
    vm: store.Vm
    nonce_digest: bytes
    certificate: bytes
    body_digest: bytes
    is_provisioned: bool = False
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """All that it reads."""
        return store.Read(store.BootRow, self.nonce_digest, "token_digest"), store.ReadTimes()

    def script(self) -> Script[store.BootRow]:
        return (yield from _attestable(self))


@frozen
class AttestVolumes(Unit[HandedKeys]):
    """Operation 13, for evidence that holds: consume the quote nonce, hand out keys, issue the confirm nonce.

    ``formatted`` names the volumes whose disks have a LUKS header; None says nothing of them. ``fresh`` has the
    entropy for each of ``volumes`` and, as ``k3s``, for the VM's encryption key. A next key is handed out once the
    store has had it for ``rotate_after`` seconds. ``confirm_nonces`` are those that
    belong to this quote nonce, one under each live KEK, the current one's first; ``certificate`` is the SHA-256 of the
    attested key's SubjectPublicKeyInfo, ``body_digest`` that of the raw body. ``root_ca`` is the certificate itself, as
    PEM, of operation 17 (``is_provisioned``).

    Raises `Refused` for the nonce (401) or the platform (403), `KeyUnavailable`, `SealBroken`.
    """

    now: int
    request_id: str
    vm: store.Vm
    nonce_digest: bytes
    certificate: bytes
    body_digest: bytes
    quote: AcceptedQuote
    peer_address: str
    volumes: tuple[str, ...]
    formatted: frozenset[str] | None
    fresh: Mapping[str, FreshKey]
    confirm_nonces: tuple[ConfirmNonce, ...]
    vault: Vault
    rotate_after: int
    is_provisioned: bool = False
    root_ca: str | None = None
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """The reads of a first attestation, before it writes."""
        token = store.Read(store.BootRow, self.nonce_digest, "token_digest")
        claim, disks = store.Read(store.VmRow, self.vm), store.ReadAll(store.VolumeRow, self.vm)
        return token, store.ReadTimes(), claim, store.ReadLiveGenerations(self.vm), disks

    def script(self) -> Script[HandedKeys]:
        """Check again, consume, hand out, record the answer; or give a recorded answer again."""
        boot, pin = (yield from _attestable(self)), self.quote.pin
        if boot.pin != pin:
            raise taken(self.vm, f"it booted on {boot.pin}, and this quote comes from {pin}")
        claim = yield from store.Read(store.VmRow, self.vm)
        if claim is None or claim.pin != pin:
            raise taken(self.vm, f"{'no claim' if claim is None else claim.pin} binds it, not {pin}")
        if boot.spent_at is not None:
            return (yield from self._replay(boot))
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm)))
        known = yield from store.ReadAll(store.VolumeRow, self.vm)
        changed, in_use = report(known, self.vm, self.volumes, self.formatted or ())
        disks = (*changed, *known)
        seal = keys.sealer(K3S_VOLUME, self.fresh[K3S_VOLUME])
        k3s = yield from keys.supply(generations.fetch(stored[K3S_VOLUME], seal))
        pace = Pace(self.now, self.rotate_after)
        pairs: list[tuple[str, Pair]] = []
        given: list[store.BootVolumeRow] = []
        for position, volume in enumerate(self.volumes):
            before = disk_of(disks, self.vm, volume)
            seal = keys.sealer(volume, self.fresh[volume])
            out = generations.hand_out(stored[volume], seal, pace, before.handed)
            pairs.append((volume, Pair(*(yield from keys.hand_out(out)))))
            current = None if out.current is None else out.current.generation
            # Until a boot confirms, the next attestation needs this to offer the provisional key and the key that it
            # superseded alternately: without it, a disk that has only one of the two would never be offered that one.
            yield from store.Put(evolve(before, handed=current))
            row = store.BootVolumeRow(boot.boot_id, volume, position, current, out.next.generation, volume in in_use)
            given.append(row)
        if given:
            yield from store.InsertBootVolumes(tuple(given))
        confirm = self.confirm_nonces[0]
        yield from store.Put(
            evolve(
                boot,
                spent_at=self.now,
                body_digest=self.body_digest,
                confirm_digest=confirm.digest,
                confirm_expires_at=self.now + CONFIRM_SECONDS,
                root_ca=self.root_ca,
                given=boot.given + len(self.volumes),
            )
        )
        yield from store.Put(evolve(claim, attested=boot.boot_id))
        records = self._records(boot)
        yield from records.verdict("runtime", f"volumes of boot {boot.boot_id}")
        yield from records.audit("attest volumes", "granted", keys=keys.changes)
        return HandedKeys(tuple(pairs), confirm.nonce, k3s, in_use)

    def _records(self, boot: store.BootRow) -> Records:
        return Records(self.now, self.request_id, self.vm, self.quote, self.peer_address, boot.boot_id)

    def _replay(self, boot: store.BootRow) -> Script[HandedKeys]:
        """Give the answer of the request that consumed the nonce again."""
        confirm = next((nonce for nonce in self.confirm_nonces if nonce.digest == boot.confirm_digest), None)
        if confirm is None:
            raise KeyUnavailable(
                f"the confirm nonce of boot {boot.boot_id} was made under a KEK that is not available; name it as"
                " kek_file or kek_previous_file"
            )
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        given = [item for item in (yield from store.ReadBootVolumes(boot.boot_id)) if item.volume != ROOT_VOLUME]
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm, boot.boot_id)))
        pairs: list[tuple[str, Pair]] = []
        for item in given:
            rows = {row.generation: row for row in stored[item.volume]}
            opened = {number: keys.open(rows[number]) for number in _numbers(item)}
            pairs.append((item.volume, Pair(opened.get(item.current_generation or 0), opened[_numbers(item)[-1]])))
        k3s = generations.active(stored[K3S_VOLUME])
        if k3s is None:
            raise KeyUnavailable(f"{self.vm.name!r} of {self.vm.hotkey} has no active encryption key")
        repeated = ", ".join(f"{item.volume}/{number} repeated" for item in given for number in _numbers(item))
        yield from self._records(boot).audit("attest volumes", "replayed", keys=repeated)
        in_use = tuple(item.volume for item in given if item.in_use)
        return HandedKeys(tuple(pairs), confirm.nonce, keys.open(k3s), in_use, replayed=True)


@frozen
class ConfirmVolumes(Unit[tuple[tuple[str, Result], ...]]):
    """Operation 14: the VM confirms that it opened its disks, and says to which of them it added the next key.

    ``rotated`` says that of each volume. Returns the outcome for each, in that order. Raises `Refused`: 401 for the
    nonce, or if another boot has attested since; 409 if a key that the VM added is not active and cannot be made so:
    the VM would otherwise remove the old key and hold a disk that no key of the server opens.
    """

    now: int
    request_id: str
    vm: store.Vm
    nonce_digest: bytes
    body_digest: bytes
    rotated: tuple[tuple[str, bool], ...]
    vault: Vault
    is_provisioned: bool = False
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """The reads that do not depend on the boot which the nonce names."""
        return _confirmed_ahead(store.Read(store.BootRow, self.nonce_digest, "confirm_digest"), self.vm)

    def script(self) -> Script[tuple[tuple[str, Result], ...]]:
        """Check, decide on all volumes, record; or answer the same confirmation again."""
        boot = yield from self._confirmable()
        again = boot.confirm_body_digest is not None
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm, boot.boot_id)))
        given = {item.volume: item for item in (yield from store.ReadBootVolumes(boot.boot_id))}
        known = yield from store.ReadAll(store.VolumeRow, self.vm)
        results: list[tuple[str, Result]] = []
        for volume, rotated in self.rotated:
            item = given.get(volume)
            if item is None and rotated:
                raise _superseded(volume, "this boot was not handed a next key for it")
            if item is not None and not again:
                yield from _decide(keys, stored[volume], item, rotated)
                yield from store.Put(evolve(disk_of(known, self.vm, volume), in_use=True, handed=None))
            elif item is not None and rotated:
                _check_still_active(stored[volume], item)
            results.append((volume, _result(item, rotated)))
        if not again:
            yield from store.Put(evolve(boot, confirm_body_digest=self.body_digest))
        changes = keys.changes or ", ".join(f"{volume} {result}" for volume, result in results)
        records = Records(self.now, self.request_id, self.vm, AcceptedQuote.of(boot), boot_id=boot.boot_id)
        yield from records.audit("confirm volumes", "replayed" if again else "granted", keys=changes)
        return tuple(results)

    def _confirmable(self) -> Script[store.BootRow]:
        boot = yield from store.Read(store.BootRow, self.nonce_digest, "confirm_digest")
        if boot is None or boot.confirm_expires_at is None:
            _ = yield from store.FindLastBoot(self.vm)  # as in `check_token`
            raise _confirm_refused("unknown")
        yield from _check_confirm(boot, self, boot.confirm_expires_at)
        claim = yield from store.Read(store.VmRow, self.vm)
        if claim is None or claim.attested != boot.boot_id:
            raise _confirm_refused("another boot has attested since")
        if boot.confirm_body_digest not in (None, self.body_digest):
            raise _confirm_refused("consumed by a request with another body")
        if boot.is_provisioned != self.is_provisioned:
            raise _confirm_refused(f"of a boot of profile {' '.join(boot.profile)}, which has another exchange")
        return boot


@frozen
class ConfirmRoot(Unit[Result]):
    """Operation 18 for the root disk: the VM opened it with the key handed out, and says whether it has the next one.

    Returns the outcome. Raises `Refused`: 401 for the nonce, or if another boot was granted since; 409 if the next key
    is not active and cannot be made so.
    """

    now: int
    request_id: str
    vm: store.Vm
    nonce_digest: bytes
    body_digest: bytes
    rotated: bool
    vault: Vault
    revocations: Revocations = NO_REVOCATIONS

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """The reads that do not depend on the boot which the nonce names."""
        return _confirmed_ahead(store.Read(store.BootRow, self.nonce_digest, "root_confirm_digest"), self.vm)

    def script(self) -> Script[Result]:
        """Check, decide, record; or answer the same confirmation again."""
        boot = yield from self._confirmable()
        again = boot.root_confirm_body_digest is not None
        keys = VmKeys(self.vm, self.vault, self.now, boot.boot_id)
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm, boot.boot_id)))[ROOT_VOLUME]
        (item,) = [each for each in (yield from store.ReadBootVolumes(boot.boot_id)) if each.volume == ROOT_VOLUME]
        if not again:
            known = yield from store.ReadAll(store.VolumeRow, self.vm)
            yield from _decide(keys, stored, item, self.rotated)
            yield from store.Put(evolve(disk_of(known, self.vm, ROOT_VOLUME), in_use=True, handed=None))
            yield from store.Put(evolve(boot, root_confirm_body_digest=self.body_digest))
        elif self.rotated:
            _check_still_active(stored, item)
        result = _result(item, self.rotated)
        records = Records(self.now, self.request_id, self.vm, AcceptedQuote.of(boot), boot_id=boot.boot_id)
        decision: store.Decision = "replayed" if again else "granted"
        yield from records.audit("confirm root", decision, keys=keys.changes or f"{ROOT_VOLUME} {result}")
        return result

    def _confirmable(self) -> Script[store.BootRow]:
        boot = yield from store.Read(store.BootRow, self.nonce_digest, "root_confirm_digest")
        if boot is None:
            _ = yield from store.FindLastBoot(self.vm)  # as in `check_token`
            raise _confirm_refused("unknown, of a root disk")
        claim = yield from store.Read(store.VmRow, self.vm)
        yield from _check_confirm(boot, self, boot.created_at + CONFIRM_SECONDS)
        if claim is None or claim.booted != boot.boot_id:
            raise _confirm_refused("another boot was granted since")
        if boot.root_confirm_body_digest not in (None, self.body_digest):
            raise _confirm_refused("consumed by a request with another body")
        return boot


def _confirmed_ahead(nonce: store.Read[store.BootRow], vm: store.Vm) -> Sequence[store.StoreOp[Any]]:
    return nonce, store.ReadTimes(), store.Read(store.VmRow, vm), store.ReadAll(store.VolumeRow, vm)


def _check_confirm(boot: store.BootRow, unit: ConfirmVolumes | ConfirmRoot, end: int) -> Script[None]:
    """Check a confirm nonce of ``boot``, valid until ``end``. Raises `Refused`."""
    yield from check_not_void(boot, unit.now, _confirm_refused, unit.revocations)
    if unit.now >= end:
        raise _confirm_refused("expired")
    if boot.vm != unit.vm:
        raise _confirm_refused(f"issued to {boot.vm}, presented by {unit.vm}", "mismatch")


def _decide(keys: VmKeys, rows: list[store.GenerationRow], item: store.BootVolumeRow, rotated: bool) -> Script[None]:
    following = _numbers(item)[-1]
    change = generations.confirm(rows, item.current_generation, following, rotated=rotated, at=keys.now)
    if change is None:
        raise _superseded(item.volume, f"generation {following} was retired since it was handed out")
    yield from keys.settle(item.volume, change)


def _check_still_active(rows: list[store.GenerationRow], item: store.BootVolumeRow) -> None:
    active = generations.active(rows)
    if active is None or active.generation != _numbers(item)[-1]:
        raise _superseded(item.volume, "its key was active and no longer is")


def _attestable(unit: FindQuoteNonce | AttestVolumes) -> Script[store.BootRow]:
    """The boot of the unit's quote nonce, which was not consumed, or by the very same request."""
    found = yield from store.Read(store.BootRow, unit.nonce_digest, "token_digest")
    boot = yield from check_token(found, unit.vm, "two-phase", unit.now, _quote_refused, unit.revocations)
    if boot.vm != unit.vm:
        raise _quote_refused(f"issued to {boot.vm}, presented by {unit.vm}", "mismatch")
    if boot.is_provisioned != unit.is_provisioned:
        raise _quote_refused(f"of a boot of profile {' '.join(boot.profile)}, which has another exchange")
    if boot.certificate != unit.certificate:
        raise _quote_refused("presented with another certificate than the attested one", "mismatch")
    if boot.body_digest not in (None, unit.body_digest):
        raise _quote_refused("consumed by a request with another body")
    return boot


def _numbers(item: store.BootVolumeRow) -> tuple[int, ...]:
    """The generations that a boot was handed for a volume, the next one last."""
    return tuple(number for number in (item.current_generation, item.next_generation) if number is not None)


def _result(item: store.BootVolumeRow | None, rotated: bool) -> Result:
    if item is None or item.current_generation == item.next_generation:
        return "no_pending"
    if rotated:
        return "promoted"
    return "no_pending" if item.current_generation is None else "discarded"


def _quote_refused(why: str, what: str = "not found or expired") -> Refused:
    return Refused(Code.QUOTE_NONCE_INVALID, f"Quote nonce {what}", reason=f"quote nonce: {why}")


def _confirm_refused(why: str, what: str = "not found or expired") -> Refused:
    return Refused(Code.CONFIRM_NONCE_INVALID, f"Confirm nonce {what}", reason=f"confirm nonce: {why}")


def _superseded(volume: str, why: str) -> Refused:
    text = "The rotation was superseded; keep the old key"
    return Refused(Code.ROTATION_SUPERSEDED, text, reason=f"volume {volume}: {why}")
