"""The rows that tell of a decision: the verdict on a quote, and the audit row beside each change.

Rules kept here:

* both are written in the transaction of the change that they tell of;
* text that a peer chose freely is kept as legible text of bounded length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from attrs import frozen

from chutes_proto.store.rows import AttestationRow, AuditRow, Insert, Pin, Vm

if TYPE_CHECKING:
    from chutes_proto.store.rows import Decision


class Quoted(Protocol):
    """A boot, or a unit that grants something, with the quote that it rests on."""

    @property
    def pin(self) -> Pin | None:
        """The pin of the platform."""
        ...

    @property
    def quote_digest(self) -> bytes:
        """The SHA-256 of the quote."""
        ...

    @property
    def profile_name(self) -> str:
        """The name of the profile that the quote matched."""
        ...

    @property
    def profile_version(self) -> str:
        """The version of that profile."""
        ...


@frozen
class Quote:
    """A quote as rows name it: without a pin where it did not verify, without a profile where it was refused."""

    pin: Pin | None
    digest: bytes
    profile_name: str | None = None
    profile_version: str | None = None

    @classmethod
    def of(cls, given: Quoted) -> Quote:
        """The quote of a boot, or of a unit that grants something for it."""
        return cls(given.pin, given.quote_digest, given.profile_name, given.profile_version)


NO_QUOTE = Quote(None, b"")


@frozen
class Records:
    """The values that the rows of one request have in common."""

    now: int
    request_id: str
    vm: Vm
    quote: Quote = NO_QUOTE
    peer_address: str = ""
    boot_id: str | None = None
    actor: Literal["vm", "miner"] = "vm"

    def verdict(
        self,
        stage: Literal["boot", "runtime"],
        reason: str,
        code: str | None = None,
        registration: str | None = None,
    ) -> Insert:
        """Add the verdict on the quote: granted, or refused with ``code``."""
        return Insert(
            AttestationRow(
                attestation_id=self.request_id,
                stage=stage,
                vm=self.vm,
                pin=self.quote.pin,
                code=code,
                reason=reason,
                profile_name=self.quote.profile_name,
                profile_version=self.quote.profile_version,
                quote_digest=self.quote.digest,
                peer_address=self.peer_address,
                created_at=self.now,
                registration=registration,
            )
        )

    def audit(self, event: str, decision: Decision, reason: str = "", keys: str = "") -> Insert:
        """Add the audit row."""
        name, version = self.quote.profile_name, self.quote.profile_version
        return Insert(
            AuditRow(
                at=self.now,
                actor=self.actor,
                event=event,
                decision=decision,
                reason=reason,
                vm=self.vm,
                boot_id=self.boot_id,
                request_id=self.request_id,
                pin=self.quote.pin,
                profile=None if name is None else f"{name} {version}",
                quote_digest=self.quote.digest or None,
                keys=keys,
                peer_address=self.peer_address,
            )
        )


def legible(text: str, limit: int) -> str:
    """``text`` as any store takes it: no control characters, no lone surrogates, not longer than ``limit``."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:limit])
