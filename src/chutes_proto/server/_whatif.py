"""The evidence of a boot, judged again under another policy, other reference values or another date.

Rules kept here:

* the answer is that of a boot at that time with the same quote: the quote is verified again, and then appraised as a
  boot is. Only the parts of a new request are left out: nonce, TLS key, the claim on the name;
* collateral is taken as it is now, renewed in time: its end does not refuse at a later date. Certificates expire;
* the first date of a refusal is one of few: where a certificate, a grace or the schedule of a profile ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

from attrs import frozen

from chutes_proto._proof import NoTruthValue
from chutes_proto.auth.hotkey import Hotkey
from chutes_proto.errors import Refusal, Refused, Unavailable
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._errors import VerificationError
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._policy_set import leaves
from chutes_proto.quote._verify import Verdict, certificates_end, check_signed, foresee, open_quote, verify_quote
from chutes_proto.server._boot import known_hotkey
from chutes_proto.server._evidence import OURS, Evidence, appraise
from chutes_proto.server._service import Service
from chutes_proto.store._rows import EvidenceRow
from chutes_proto.wire.codes import Code

State: TypeAlias = Literal["granted", "warned", "refused", "not judged"]

NOT_JUDGED: Final = frozenset({Code.REVOKED, Code.PLATFORM_MISMATCH, Code.EXCHANGE_MISMATCH, Code.EXCHANGE_DOWNGRADE})
"""The codes of refusals for what the store or the request says of a genuine quote: under each policy they stand."""


@frozen
class Judged(NoTruthValue):
    """The outcome for one VM: at the date asked for, and ``refused_from``, the first date of a refusal if there is one.

    ``code`` and ``reason`` are those of the refusal; of a VM that is granted, those of the first later one.
    """

    state: State
    code: str = ""
    reason: str = ""
    refused_from: int | None = None


def judge(
    service: Service,
    row: EvidenceRow,
    collateral: Callable[[PckIdentity], VerifiedCollateral],
    at: int,
    *,
    proven: bool,
    until: int,
) -> Judged:
    """Judge kept evidence at a date, in unix seconds, and look for refusals until ``until``.

    ``proven``: the boot proved its hotkey. Whatever ``collateral`` raises means that the evidence cannot be judged.
    """
    try:
        opened = open_quote(row.quote, now=row.received_at, root=service.root)
        signed = check_signed(opened)
        found = collateral(opened.pck)
        verdict = verify_quote(signed, found, now=max(row.received_at, found.window[0]), report_data=None)
    except VerificationError as exc:
        if isinstance(exc, OURS):
            return Judged("not judged", str(Code.COLLATERAL_UNAVAILABLE), f"{exc.code}: {exc}", at)
        return Judged("refused", str(Code.QUOTE_REJECTED), f"{exc.code}: {exc}", at)
    ends = certificates_end(verdict)

    def refusal(when: int) -> tuple[Refusal | None, State]:
        try:
            foreseen = foresee(verdict, at=when)
        except VerificationError as exc:
            return Refused(Code.QUOTE_REJECTED, "", reason=f"{exc.code}: {exc}"), "refused"
        return _appraised(service, foreseen, row, when, proven=proven)

    now, state = refusal(at)
    if now is not None:
        return Judged("not judged" if isinstance(now, Unavailable) else "refused", str(now.code), now.reason, at)
    for when in sorted({*_dates(service, verdict), ends + 1}):
        if at < when <= until and (later := refusal(when)[0]) is not None:
            return Judged(state, str(later.code), later.reason, when)
    return Judged(state)


def _appraised(
    service: Service, verdict: Verdict, row: EvidenceRow, when: int, *, proven: bool
) -> tuple[Refusal | None, State]:
    """Steps 5 to 7 of a boot, but for what only a new request can show."""

    def prove() -> Hotkey:
        if not proven:
            raise Refused(Code.SIGNATURE_INVALID, "", reason="the hotkey was not proven")
        return Hotkey.parse(row.vm.hotkey)

    try:
        accepted = appraise(service, Evidence(verdict, row.quote), "boot", row.vm.hotkey, prove)
        service.check_version(accepted.profile, when)
        _ = known_hotkey(service, row.vm.hotkey)
        if service.profiles[accepted.profile.identity].require_hotkey_signature:
            _ = prove()
    except Refusal as exc:
        return exc, "refused"
    return None, "granted" if accepted.profile_state == "enforced" else "warned"


def _dates(service: Service, verdict: Verdict) -> Iterator[int]:
    """The dates after which this verdict may be refused, although it is accepted before."""
    reached = [stated.date for stated in (verdict.platform, verdict.module, verdict.qe) if stated is not None]
    for bound in service.policy.policies:
        for policy in leaves(bound):
            for grace in (policy.tcb.platform_grace, policy.tcb.qe_grace):
                yield from (() if grace is None else (date + grace + 1 for date in reached))
    for profile in service.policy.profiles:
        yield from profile.schedule.changes
