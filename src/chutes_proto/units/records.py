"""The rows that record a decision: the verdict on a quote, and the audit row beside each change.

Rules kept here:

* both are written in the transaction of the change that they record;
* text that a peer chose freely is kept as legible text of bounded length.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from attrs import field, frozen

from chutes_proto.store._rows import AttestationRow, AuditRow, BootRow, Decision, EvidenceRow, Insert, Pin, Put, Vm

_NOT_VISIBLE: Final = re.compile(r"[^!-~]")


@frozen
class Quote:
    """A quote as rows name it: SHA-256, its platform if it verified; profile and TCB status if it was accepted.

    ``rested_on`` says what the verdict rested on, for ``AuditRow.evidence``.
    """

    digest: bytes
    pin: Pin | None
    profile_name: str | None
    profile_version: str | None
    tcb_status: str | None
    advisories: str | None = field(default=None, kw_only=True)
    rested_on: str | None = field(default=None, kw_only=True)

    @classmethod
    def refused(cls, digest: bytes, pin: Pin | None = None, rested_on: str | None = None) -> Quote:
        """A quote that was not accepted; without ``pin`` one that did not verify."""
        return Quote(digest, pin, None, None, None, rested_on=rested_on)


@frozen
class AcceptedQuote(Quote):
    """A quote that the policy accepts."""

    pin: Pin
    profile_name: str
    profile_version: str
    tcb_status: str | None

    @property
    def profile(self) -> tuple[str, str]:
        """Name and version of the profile."""
        return self.profile_name, self.profile_version

    @classmethod
    def of(cls, boot: BootRow) -> AcceptedQuote:
        """The quote that a boot was granted for."""
        return cls(boot.quote_digest, boot.pin, boot.profile_name, boot.profile_version, None)


@frozen
class SignedGpu:
    """A GPU whose evidence verified, by the serial numbers that NVIDIA signed (``GpuDeviceRow``)."""

    device_id: str
    serial_number: str


@frozen
class SignedGpus:
    """The result of an appraisal of GPU evidence; ``text`` is for the audit.

    ``is_required``: a device that another server has shown refuses; otherwise the audit row says so.
    """

    text: str
    devices: tuple[SignedGpu, ...] = ()
    is_required: bool = False


@frozen
class Kept:
    """The bytes of a genuine quote, and numbers, dates and digests of its collateral as a JSON object."""

    quote: bytes
    collateral: str

    def granted(self, vm: Vm, attestation_id: str, at: int) -> Put:
        """Keep it as the newest one that ``vm`` was granted a boot for."""
        return Put(EvidenceRow(evidence_id(vm), vm, attestation_id, None, self.quote, self.collateral, at))

    def refused(self, pin: Pin, place: int, vm: Vm, attestation_id: str, code: str, at: int) -> Put:
        """Keep it in one of the places of its platform."""
        name = f"refused {pin} {place}"
        return Put(EvidenceRow(name, vm, attestation_id, code, self.quote, self.collateral, at))


def evidence_id(vm: Vm) -> str:
    """The key of the evidence of a VM's newest granted boot."""
    return f"vm {vm.hotkey}/{vm.name}"


NO_QUOTE = Quote.refused(b"")


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
        finding: str | None = None,
    ) -> Insert:
        """Add the verdict on the quote: granted, or refused with ``code`` and, by the verifier, a ``finding``."""
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
                tcb_status=self.quote.tcb_status,
                advisories=self.quote.advisories,
                finding=finding,
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
                evidence=self.quote.rested_on,
            )
        )


def legible_vm(hotkey: str, name: str) -> Vm:
    """A VM as a peer names it: none has a blank, with which it could pose as more columns of a table."""
    return Vm(*(_NOT_VISIBLE.sub("\N{REPLACEMENT CHARACTER}", text) for text in (hotkey[:64], name[:128])))


def legible(text: str, limit: int) -> str:
    """``text`` as any store takes it: no control characters, no lone surrogates, at most ``limit`` characters."""
    text = text[:limit]
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
