"""The transaction of a boot: claim, nonce, root passphrase, boot token and records, all or nothing.

Rules kept here:

* what is checked and what is written is one transaction; a refusal, or a key that cannot be opened, spends nothing;
* a nonce is redeemed once. Redemptions are forgotten after a day, and then no nonce of that age is redeemed at all;
* a VM's name belongs to the platform that booted it first. Only a hotkey that proves itself takes a name over that was
  never proven, and gets none of the keys that were made under it;
* a root passphrase is made once per VM and is the same at every boot.

The order in which the server checks before it comes here is in ``server/_boot.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attrs import evolve, frozen

from chutes_proto.errors import Refused
from chutes_proto.keys import generations
from chutes_proto.store._run import Unit
from chutes_proto.store.rows import (
    BootRow,
    CountClaims,
    CountRefusals,
    Exchange,
    Insert,
    Pin,
    Platform,
    Put,
    ReadLiveGenerations,
    ReadVm,
    Vm,
    VmRow,
)
from chutes_proto.units.keys import Keeper, by_volume
from chutes_proto.units.nonces import redeem_nonce
from chutes_proto.units.records import Quote, Records, legible
from chutes_proto.wire.codes import Code

if TYPE_CHECKING:
    from chutes_proto.keys.vault import FreshKey, Vault
    from chutes_proto.secret import Secret
    from chutes_proto.store._run import Script

TOKEN_SECONDS = 600
REFUSALS_PER_DAY = 100
DAY = 86_400


@frozen
class BootGrant:
    """What a boot was granted; ``root`` is None where the measurement profile has the image's own passphrase."""

    boot_id: str
    root: Secret | None


@frozen
class GrantBoot(Unit[BootGrant]):
    """Grant a boot whose evidence holds: check and take the claim, redeem the nonce, read or make the root passphrase.

    ``nonce`` is 32 bytes whose tag, age and purpose hold; ``certificate`` the SHA-256 of the attested key's
    SubjectPublicKeyInfo; ``hotkey_proven`` says that the request carried the hotkey's signature and that it holds;
    ``root`` is the entropy for a root passphrase, None where the VM gets the image's; ``token_digest`` is what is kept
    of the token: of the boot token, or with ``exchange="two-phase"`` of the quote nonce.

    Raises `Refused` (``platform_mismatch``, ``exchange_downgrade``, ``nonce_invalid``), and `KeyUnavailable` or
    `SealBroken` if the root passphrase is there and does not open.
    """

    now: int
    boot_id: str
    nonce: bytes
    nonce_purpose: str
    nonce_issued_at: int
    vm: Vm
    platform: Platform
    hotkey_proven: bool
    certificate: bytes
    profile_name: str
    profile_version: str
    exchange: Exchange
    token_needs_certificate: bool
    token_digest: bytes
    quote_digest: bytes
    peer_address: str
    vault: Vault
    root: FreshKey | None = None
    exchange_downgrade: Literal["refuse", "allow"] = "refuse"
    claims_per_platform: int = 64

    @property
    def pin(self) -> Pin:
        """The platform, as the name is bound to it."""
        return self.platform.pin

    def script(self) -> Script[BootGrant]:
        """Claim, nonce, root passphrase, boot, records."""
        keeper = Keeper(self.vm, self.vault, self.now, self.boot_id)
        how = yield from self._claim(keeper)
        yield from redeem_nonce(self.nonce, self.nonce_purpose, self.nonce_issued_at, self.now)
        root = None
        if self.root is not None:
            rows = by_volume((yield from ReadLiveGenerations(self.vm)))
            supply = generations.fetch(rows[generations.ROOT_VOLUME], keeper.sealer(generations.ROOT_VOLUME, self.root))
            root = yield from keeper.supply(supply)
        yield from Insert(
            BootRow(
                boot_id=self.boot_id,
                vm=self.vm,
                pin=self.pin,
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
            )
        )
        records = Records(self.now, self.boot_id, self.vm, Quote.of(self), self.peer_address, self.boot_id)
        yield from records.verdict("boot", how)
        yield from records.audit("boot", "granted", how, keeper.told)
        return BootGrant(self.boot_id, root)

    def _claim(self, keeper: Keeper) -> Script[str]:
        """Check the claim and take it; the reply says in words on what ground the boot has the name."""
        claim = yield from ReadVm(self.vm)
        if claim is None:
            ground = yield from self._new_claim()
            claim = self._claim_of_mine()
        elif claim.pin == self.pin:
            ground = "bound to this platform"
            claim = evolve(
                claim,
                instance_id=self.platform.instance_id,
                ppid=self.platform.ppid,
                proven=claim.proven or self.hotkey_proven,
            )
        elif self.hotkey_proven and not claim.proven:
            yield from self._check_room()
            yield from keeper.disown()
            ground = f"taken over from {claim.pin}, which never proved the hotkey; with new keys"
            claim = self._claim_of_mine()
        else:
            proven = "a proven claim" if claim.proven else "a claim"
            raise taken(self.vm, f"{proven} binds it to {claim.pin}, and this boot comes from {self.pin}")
        if claim.exchange == "two-phase" and self.exchange == "base" and self.exchange_downgrade == "refuse":
            raise Refused(
                Code.EXCHANGE_DOWNGRADE,
                "This VM was served the two-phase exchange and gets no boot token again.",
                reason=f"profile {self.profile_name!r} has exchange 'base', and {self.vm.name!r} was served two-phase",
            )
        exchange: Exchange = "two-phase" if "two-phase" in (claim.exchange, self.exchange) else "base"
        yield from Put(evolve(claim, exchange=exchange, last_boot_at=self.now))
        return ground

    def _claim_of_mine(self) -> VmRow:
        return VmRow(
            vm=self.vm,
            pin=self.pin,
            instance_id=self.platform.instance_id,
            ppid=self.platform.ppid,
            proven=self.hotkey_proven,
            exchange=self.exchange,
            created_at=self.now,
            last_boot_at=self.now,
        )

    def _new_claim(self) -> Script[str]:
        held = generations.holds_keys((yield from ReadLiveGenerations(self.vm)))
        if held and not self.hotkey_proven:
            raise taken(
                self.vm, "it holds keys and is bound to no platform; a hotkey signature or the operator opens it"
            )
        yield from self._check_room()
        return "first claim, of a name that holds keys" if held else "first claim"

    def _check_room(self) -> Script[None]:
        claims = yield from CountClaims(self.pin)
        if claims >= self.claims_per_platform:
            raise Refused(
                Code.PLATFORM_MISMATCH,
                "This platform holds as many VM names as it may.",
                reason=f"{self.pin} holds {claims} names, claims_per_platform is {self.claims_per_platform}",
            )


@frozen
class RecordRefusal(Unit[bool]):
    """Keep a refusal of a quote whose DCAP verification held; returns whether it was recorded.

    At most ``per_day`` are kept of one platform in one day (UTC). What the peer chose freely is kept as legible text of
    bounded length.
    """

    now: int
    request_id: str
    vm: Vm
    platform: Platform
    code: str
    reason: str
    quote_digest: bytes
    peer_address: str
    stage: Literal["boot", "runtime"] = "boot"
    per_day: int = REFUSALS_PER_DAY

    def script(self) -> Script[bool]:
        """Count, then write the verdict and its audit row."""
        pin = self.platform.pin
        if (yield from CountRefusals(pin, self.now - self.now % DAY)) >= self.per_day:
            return False
        vm = Vm(legible(self.vm.hotkey, 64), legible(self.vm.name, 128))
        reason = legible(self.reason, 2000)
        records = Records(self.now, self.request_id, vm, Quote(pin, self.quote_digest), self.peer_address)
        yield from records.verdict(self.stage, reason, self.code)
        event = "boot" if self.stage == "boot" else "attest volumes"
        yield from records.audit(event, "refused", f"{self.code}: {reason}")
        return True


def taken(vm: Vm, why: str) -> Refused:
    """The refusal of a boot, or of what follows it, on another platform than the name's."""
    return Refused(
        Code.PLATFORM_MISMATCH,
        "This VM name is bound to another platform.",
        reason=f"{vm.name!r} of {vm.hotkey}: {why}",
    )
