"""The transaction of a boot: claim, nonce, root passphrase, boot token and records, all or nothing.

Rules kept here:

* the checks and the writes are one transaction; a refusal, or a key that cannot be opened, consumes nothing;
* a nonce is redeemed once. Redemptions are forgotten after a day, and from then on no nonce of that age is redeemed;
* a party that is revoked is refused (``revocations.py``);
* a VM's name belongs to the platform that booted it first. Only a hotkey that proves itself takes over a name that was
  never proven, and gets none of the keys that were made under it: else an attacker who boots first would share them;
* a root passphrase is made once per VM and is the same at every boot: a second one would not open the root disk. But a
  provisioned boot rotates it, like the key of any volume: it is handed the current one and the next. As a boot has one
  try, the key of a provisional promotion and the one that it superseded are offered alternately. A fresh disk has the
  build's passphrase alone, which becomes a new generation then, unless it is the active one; others are retired. So a
  request that says that the disk is fresh, and comes late, would lock a disk that was rotated since: it counts only if
  its nonce is younger than all that were granted; clients that ask again wait two seconds.

The order in which the server checks before it comes here is in ``server/_boot.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from attrs import evolve, frozen

from chutes_proto.errors import KeyUnavailable, Refused, SealBroken
from chutes_proto.keys import generations
from chutes_proto.keys.generations import Pace
from chutes_proto.keys.vault import FreshKey, Vault
from chutes_proto.secret import Secret
from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit
from chutes_proto.units.keys import VmKeys, by_volume, disk_of
from chutes_proto.units.nonces import SKEW, Nonce, from_future, redeem_nonce, redemption
from chutes_proto.units.records import AcceptedQuote, Kept, Quote, Records, legible, legible_vm
from chutes_proto.units.revocations import NO_REVOCATIONS, Revocations, check_allowed, check_boot_allowed, pins_of
from chutes_proto.wire.codes import Code

TOKEN_SECONDS = 600
REFUSALS_PER_DAY = 100
REFUSED_KEPT = 8
"""The number of refused quotes of one platform that are kept as evidence."""
DAY = 86_400


@frozen
class BootGrant:
    """A granted boot; ``root`` is None where the measurement profile has the image's own passphrase.

    ``root_next`` replaces it on the disk of a provisioned boot; ``root_second`` is a third one that the disk may have.
    """

    boot_id: str
    root: Secret | None
    root_next: Secret | None = None
    root_second: Secret | None = None


@frozen
class RootRotation:
    """The further input of a provisioned boot: for its root disk, and for the hotkey that it trusts.

    ``build`` is the passphrase of a fresh copy of the image, ``following`` the entropy for the next one; ``first_boot``
    says that the disk is such a copy. But for the build's passphrase, a key is replaced by one that the store has had
    for ``rotate_after`` seconds. ``confirm_digest`` is the SHA-256 of the nonce that confirms the next one,
    ``caller`` the seed of the hotkey. ``second_key``: the VM tries the second key, too.
    """

    build: FreshKey
    following: FreshKey
    caller: FreshKey
    confirm_digest: bytes
    first_boot: bool
    rotate_after: int
    second_key: bool = False


@frozen
class GrantBoot(Unit[BootGrant]):
    """Grant a boot whose evidence holds: check and take the claim, redeem the nonce, read or make the root passphrase.

    ``certificate`` is the SHA-256 of the attested key's SubjectPublicKeyInfo; ``hotkey_proven`` says that the request
    carried the hotkey's signature and that it holds; ``root`` is the entropy for a root passphrase, None where the VM
    gets the image's; ``token_digest`` is the SHA-256 of the boot token, or of the quote nonce in the two-phase
    exchange. ``platform`` is the quote's.

    ``revocations`` are those that the server has in memory.

    Raises `Refused` (``platform_mismatch``, ``exchange_downgrade``, ``nonce_invalid``, ``revoked``), and
    `KeyUnavailable` or `SealBroken` if the root passphrase exists and does not open.
    """

    now: int
    boot_id: str
    nonce: Nonce
    vm: store.Vm
    platform: store.Platform
    hotkey_proven: bool
    certificate: bytes
    profile_name: str
    profile_version: str
    tcb_status: str
    exchange: store.Exchange
    token_needs_certificate: bool
    token_digest: bytes
    quote_digest: bytes
    peer_address: str
    vault: Vault
    root: FreshKey | None = None
    rotation: RootRotation | None = None
    profile_state: str | None = None
    """The state of a profile whose VMs are to be listed, for the audit row."""
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    claims_per_platform: int = 64
    revocations: Revocations = NO_REVOCATIONS
    advisories: str | None = None
    kept: Kept | None = None
    rested_on: str | None = None

    @property
    def quote(self) -> AcceptedQuote:
        """The quote as rows name it."""
        pin = self.platform.pin
        names = (self.profile_name, self.profile_version, self.tcb_status)
        return AcceptedQuote(self.quote_digest, pin, *names, advisories=self.advisories, rested_on=self.rested_on)

    def ahead(self) -> Sequence[store.StoreOp[Any]]:
        """All that a boot reads, and its nonce."""
        disks = () if self.rotation is None else (store.ReadAll(store.VolumeRow, self.vm),)
        claim = store.Read(store.VmRow, self.vm), store.CountClaims(self.platform.pin, self.vm)
        redeemed = store.ReadTimes(), redemption(self.nonce, self.now)
        return *claim, *redeemed, store.ReadLiveGenerations(self.vm), *disks

    def script(self) -> Script[BootGrant]:
        """Claim, nonce, root passphrase, boot, records."""
        keys = VmKeys(self.vm, self.vault, self.now, self.boot_id)
        claim, ground = yield from self._claim(keys)
        times = yield from redeem_nonce(self.nonce, self.now)
        yield from check_allowed(self.revocations, times, self.now, (self.vm,), pins_of(self.platform))
        has_keys = self.rotation is not None or self.root is not None
        stored = by_volume((yield from store.ReadLiveGenerations(self.vm)) if has_keys else ())
        known = () if self.rotation is None else (yield from store.ReadAll(store.VolumeRow, self.vm))
        yield from store.Put(claim)  # before a key is opened: a store that may not be written says so first
        root = following = second = given = None
        if self.rotation is not None:
            root, following, second, given = yield from self._rotate(keys, self.rotation, stored, known)
        elif self.root is not None:
            seal = keys.sealer(generations.ROOT_VOLUME, self.root)
            root = yield from keys.supply(generations.fetch(stored[generations.ROOT_VOLUME], seal))
        yield from store.Insert(
            store.BootRow(
                boot_id=self.boot_id,
                vm=self.vm,
                pin=self.platform.pin,
                certificate=self.certificate,
                profile_name=self.profile_name,
                profile_version=self.profile_version,
                exchange=self.exchange,
                quote_digest=self.quote_digest,
                token_digest=self.token_digest,
                token_expires_at=self.now + TOKEN_SECONDS,
                token_needs_certificate=self.token_needs_certificate,
                peer_address=self.peer_address,
                created_at=self.now,
                root_confirm_digest=None if self.rotation is None else self.rotation.confirm_digest,
                given=0 if given is None else 1,
            )
        )
        if given is not None:
            yield from store.Insert(given)
        records = Records(self.now, self.boot_id, self.vm, self.quote, self.peer_address, self.boot_id)
        yield from records.verdict("boot", ground)
        if self.kept is not None:
            yield from self.kept.granted(self.vm, self.boot_id, self.now)
        reason = ground if self.profile_state is None else f"{ground}; the profile is {self.profile_state}"
        yield from records.audit("boot", "granted", reason, keys.changes)
        return BootGrant(self.boot_id, root, following, second)

    def _rotate(
        self,
        keys: VmKeys,
        rotation: RootRotation,
        stored: Mapping[str, list[store.GenerationRow]],
        known: Sequence[store.VolumeRow],
    ) -> Script[tuple[Secret | None, Secret, Secret | None, store.BootVolumeRow]]:
        """Hand out the root keys, and make the hotkey that the VM trusts."""
        rows: generations.Generations = stored[generations.ROOT_VOLUME]
        before = disk_of(known, self.vm, generations.ROOT_VOLUME)
        seal = keys.sealer(generations.ROOT_VOLUME, rotation.build)
        handed, build = None if rotation.first_boot else before.handed, rotation.build.passphrase
        # A first boot that was cut short comes again: its keys may be in a backup by now, and are handed out again.
        is_anew = rotation.first_boot and not _is_active(keys, rows, build)
        supply = generations.rekey(rows, seal, self.now) if is_anew else generations.fetch(rows, seal)
        if supply.word != "kept":
            _ = yield from keys.supply(supply)
            rows, handed = generations.applied(rows, supply), None
        # The build's passphrase is every VM's, so it is replaced at once. It and the first key after it are made in one
        # transaction: a backup that has the one has the other.
        pace = Pace(self.now, 0 if keys.open(supply.current) == build else rotation.rotate_after)
        out = generations.hand_out(rows, keys.sealer(generations.ROOT_VOLUME, rotation.following), pace, handed)
        current, following = yield from keys.hand_out(out)
        second = None
        # One that does not open is left out: the other two may open the disk, and the boot then does not need it.
        if rotation.second_key and out.second is not None and _opened(keys, out.second) is not None:
            second = yield from keys.deliver(out.second, "second")
        number = None if out.current is None else out.current.generation
        yield from store.Put(evolve(before, handed=number))  # until it confirms: the next boot is offered the other one
        seal = keys.sealer(generations.CALLER_VOLUME, rotation.caller)
        _ = yield from keys.supply(generations.rekey(stored[generations.CALLER_VOLUME], seal, self.now))
        root = generations.ROOT_VOLUME
        given = store.BootVolumeRow(self.boot_id, root, 0, number, out.next.generation, False)
        return current, following, second, given

    def _claim(self, keys: VmKeys) -> Script[tuple[store.VmRow, str]]:
        """Check the claim; reply with the one to write, and in words on what ground the boot has the name."""
        claim, pin = (yield from store.Read(store.VmRow, self.vm)), self.platform.pin
        if claim is None:
            ground = yield from self._new_claim()
            claim = store.VmRow.of(self.vm, self.platform, self.now)
        elif claim.pin == pin:
            ground = "bound to this platform"
        elif self.hotkey_proven and not claim.proven:
            self._check_claims_left((yield from store.CountClaims(self.platform.pin)))
            yield from keys.disown()
            ground = f"taken over from {claim.pin}, which never proved the hotkey; with new keys"
            claim = store.VmRow.of(self.vm, self.platform, self.now)
        else:
            kind = "a proven claim" if claim.proven else "a claim"
            why = f"{kind} binds it to {claim.pin}, and this boot comes from {pin}"
            if claim.instance_id is None and claim.ppid == self.platform.ppid:
                why += (
                    ", which has the same PPID: the claim lacks the instance id of that machine; rebind it with --ppid"
                    f" {claim.ppid.hex()} --instance {pin.value.hex()} --keep-keys"
                )
            raise taken(self.vm, why)
        if claim.exchange == "two-phase" and self.exchange == "base" and self.exchange_downgrade == "refuse":
            text = "This VM was served the two-phase exchange and gets no boot token again."
            reason = f"profile {self.profile_name!r} has exchange 'base', and {self.vm.name!r} was served two-phase"
            raise Refused(Code.EXCHANGE_DOWNGRADE, text, reason=reason)
        exchange: store.Exchange = "two-phase" if "two-phase" in (claim.exchange, self.exchange) else "base"
        proven = claim.proven or self.hotkey_proven
        booted, newest = None, claim.nonce_at
        if self.rotation is not None:
            if self.rotation.first_boot and newest is not None and self.nonce.issued_at <= newest:
                reason = f"first_boot with a nonce of {self.nonce.issued_at}, and one of {newest} was granted"
                raise Refused(Code.NONCE_INVALID, "Invalid nonce supplied", reason=reason)
            booted, newest = self.boot_id, max(self.nonce.issued_at, newest or 0)
        claim = evolve(
            claim,
            instance_id=self.platform.instance_id,
            ppid=self.platform.ppid,
            proven=proven,
            exchange=exchange,
            last_boot_at=self.now,
            booted=booted,
            nonce_at=newest,
        )
        return claim, ground

    def _new_claim(self) -> Script[str]:
        held = generations.holds_keys((yield from store.ReadLiveGenerations(self.vm)))
        if held and not self.hotkey_proven:
            raise taken(
                self.vm,
                "it holds keys and is bound to no platform: boot it with the hotkey's signature, or run"
                " `chutes-proto vm bind`",
            )
        self._check_claims_left((yield from store.CountClaims(self.platform.pin, self.vm)))
        return "first claim, of a name that holds keys" if held else "first claim"

    def _check_claims_left(self, claims: int) -> None:
        pin, most = self.platform.pin, self.claims_per_platform
        if claims >= most:
            text = "This platform holds as many VM names as it may."
            reason = f"{pin} holds {claims} names, and limits.claims_per_platform is {most}"
            raise Refused(Code.PLATFORM_MISMATCH, text, reason=reason)


@frozen
class RecordRefusal(Unit[bool]):
    """Record the refusal of a quote whose DCAP verification held; returns whether it was recorded.

    At most ``per_day`` are recorded of one platform in one day (UTC): anyone with a genuine TD can cause them.
    """

    now: int
    request_id: str
    vm: store.Vm
    platform: store.Platform
    code: str
    reason: str
    quote_digest: bytes
    peer_address: str
    stage: Literal["boot", "runtime"] = "boot"
    finding: str | None = None
    per_day: int = REFUSALS_PER_DAY
    kept: Kept | None = None
    rested_on: str | None = None

    def script(self) -> Script[bool]:
        """Count, then write the verdict, its audit row and, in one of the platform's places, the evidence."""
        pin = self.platform.pin
        count = yield from store.CountRefusals(pin, self.now - self.now % DAY)
        if count >= self.per_day:
            return False
        vm = legible_vm(self.vm.hotkey, self.vm.name)
        reason = legible(self.reason, 2000)
        quote = Quote.refused(self.quote_digest, pin, self.rested_on)
        records = Records(self.now, self.request_id, vm, quote, self.peer_address)
        yield from records.verdict(self.stage, reason, self.code, finding=self.finding)
        if self.kept is not None:
            yield from self.kept.refused(pin, count % REFUSED_KEPT, vm, self.request_id, self.code, self.now)
        event = "boot" if self.stage == "boot" else "attest volumes"
        yield from records.audit(event, "refused", f"{self.code}: {reason}")
        return True


@frozen
class RecordMismatch(Unit[tuple[str, bool] | None]):
    """Name the mistake, if the newest boot of ``vm`` was granted another exchange than the VM speaks; None if not.

    It is recorded once for a boot, whose token is still alive: a stranger may send such a request too. Returns with its
    name whether this recorded it.
    """

    now: int
    request_id: str
    vm: store.Vm
    spoken: Literal["base", "two-phase", "provisioned"]
    asked_for: str
    peer_address: str

    def script(self) -> Script[tuple[str, bool] | None]:
        """Compare, then write the verdict and its audit row unless they exist."""
        boot = yield from store.FindLastBoot(self.vm)
        if boot is None or self.now >= boot.token_expires_at:
            return None
        granted = "provisioned" if boot.is_provisioned else boot.exchange
        if granted == self.spoken:
            return None
        reason = f"image asked for {self.asked_for}; profile {' '.join(boot.profile)} has exchange {granted}"
        records = Records(self.now, f"{boot.boot_id}-exchange", self.vm, AcceptedQuote.of(boot), self.peer_address)
        is_first = (yield from store.Read(store.AttestationRow, records.request_id)) is None
        if is_first:
            code = str(Code.EXCHANGE_MISMATCH)
            yield from records.verdict("boot", reason, code)
            audited = evolve(records, request_id=self.request_id, boot_id=boot.boot_id)
            yield from audited.audit("exchange", "refused", f"{code}: {reason}")
        return reason, is_first


def _is_active(keys: VmKeys, rows: generations.Generations, passphrase: Secret) -> bool:
    """Whether the active key is ``passphrase``; one that does not open is another."""
    row = generations.active(rows)
    return row is not None and _opened(keys, row) == passphrase


def _opened(keys: VmKeys, row: store.GenerationRow) -> Secret | None:
    """The passphrase of ``row``, None if it does not open."""
    try:
        return keys.open(row)
    except (KeyUnavailable, SealBroken):
        return None


def taken(vm: store.Vm, why: str) -> Refused:
    """The refusal of a boot, or of a later request of it, on another platform than the name's."""
    text = "This VM name is bound to another platform."
    return Refused(Code.PLATFORM_MISMATCH, text, reason=f"{vm.name!r} of {vm.hotkey}: {why}")


def check_token(
    boot: store.BootRow | None,
    vm: store.Vm,
    exchange: store.Exchange,
    now: int,
    refused: Callable[[str], Refused],
    revocations: Revocations,
) -> Script[store.BootRow]:
    """The boot of a token of ``exchange`` that is alive; ``vm`` is the VM that presents it.

    Whether the token was consumed is the caller's to check: the same request may come twice. Raises
    ``refused(reason)``, as `check_allowed` does, and `Unavailable` for a boot from the future.
    """
    if boot is None:
        # Was its row deleted? Then the store says so, and this is not the caller's fault.
        _ = yield from store.FindLastBoot(vm)
        raise refused("unknown")
    if boot.exchange != exchange:
        raise refused("a quote nonce, not a boot token" if exchange == "base" else "a boot token, not a quote nonce")
    yield from check_not_void(boot, now, refused, revocations)
    if now >= boot.token_expires_at:
        raise refused("expired")
    return boot


def check_not_void(
    boot: store.BootRow, now: int, refused: Callable[[str], Refused], revocations: Revocations
) -> Script[None]:
    """Check that no operator voided what was issued to ``boot``, for its VM or by a restore for all VMs, or revoked it.

    Raises ``refused(reason)``, and as `check_allowed` does. Raises `Unavailable` for a boot from the future, which a
    clock that was ahead granted: no horizon of the present covers it.
    """
    if boot.voided_at is not None:
        raise refused("voided")
    if boot.created_at > now + SKEW:
        raise from_future("the boot was granted", boot.created_at, now, "this server's")
    times = yield from store.ReadTimes()
    if boot.created_at <= times.horizon:
        raise refused("voided by a restore of the store")
    yield from check_boot_allowed(revocations, times, now, boot)
