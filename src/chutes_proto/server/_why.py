"""Why a request was refused, in words for an operator: one text for the log, the command ``why`` and admin pages.

Rules kept here:

* nothing here reads or decides: `explain` turns what a refusal has kept into words;
* a refusal after which a VM gives up has its own remedy; any other gets the one of its class;
* no text has a secret, and none is for the peer: it names values that the answer does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from attrs import field, frozen

from chutes_proto._converter import ProblemsError, StrictConverter
from chutes_proto.auth.hotkey import Hotkey, HotkeyError
from chutes_proto.quote._errors import AppraisalError, VerificationError, shown
from chutes_proto.store._rows import AttestationRow, AuditRow, Vm
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code

Stage = Literal["boot", "runtime"]


@frozen
class Difference:
    """One thing that was found otherwise than expected: a register, a part of the platform, a field of the quote."""

    what: str
    found: str
    expected: str


@frozen
class Finding:
    """The outcome of the verifier: the step that refused (``docs/reference/verification.md``), its code and its rule.

    ``profile`` is the nearest profile, by name and version, where measurements or attributes differ.
    """

    step: int
    code: str
    rule: str
    stage: Stage | None = None
    profile: str | None = None
    differences: tuple[Difference, ...] = ()

    @classmethod
    def of(cls, error: VerificationError) -> Finding:
        """Take the verifier's refusal."""
        if isinstance(error, AppraisalError):
            differences = tuple(
                Difference(each.register or each.code, each.got or "", each.expected or "") for each in error.refusals
            )
            return cls(error.step, error.code, error.rule, error.stage, error.nearest, differences)
        values = (error.got, error.expected)
        one = () if values == (None, None) else (Difference(error.subject, *map(_text, values)),)
        return cls(error.step, error.code, f"{error.rule}; {error.subject}: {error.problem}", None, None, one)

    def to_json(self) -> str:
        """The finding as a row of the store keeps it."""
        return json.encode(_CONVERTER.unstructure(self)).decode()

    @classmethod
    def from_json(cls, text: str) -> Finding | None:
        """Read what `to_json` made; None for anything else, as of a newer release."""
        try:
            found: Finding = _CONVERTER.structure(json.decode(text.encode()), cls)
        except (json.JsonError, ProblemsError):
            return None
        return found


@frozen
class Denial:
    """One refusal, as the log or the store keeps it; a text is empty where it is not known."""

    code: str
    reason: str
    request_id: str = ""
    hotkey: str = ""
    vm: str = ""
    event: str = ""
    finding: Finding | None = None


@frozen
class Why:
    """A refusal explained: what was refused, where, which values differed, and the remedy.

    ``step`` is the verifier's number, None for a check of the server's own.
    """

    what: str
    where: str
    step: int | None
    profile: str | None
    remedy: str
    differences: tuple[Difference, ...] = field(default=())

    def lines(self) -> list[str]:
        """The text, a line for each thing."""
        named = f"nearest profile: {self.profile}"
        values = [
            f"{each.what}: found {each.found or '-'}, expected {each.expected or '-'}" for each in self.differences
        ]
        return [self.what, self.where, *([named] if self.profile else []), *values, f"do: {self.remedy}"]

    def __str__(self) -> str:
        return "; ".join(self.lines())


def recorded(row: AuditRow, verdict: AttestationRow | None) -> Denial:
    """The refusal that an audit row records, with its verdict, which may be gone."""
    code, _, reason = row.reason.partition(": ")
    if code not in _CODES:
        code, reason = "", row.reason
    finding = None
    if verdict is not None:
        code, reason = verdict.code or code, verdict.reason
        finding = None if verdict.finding is None else Finding.from_json(verdict.finding)
    vm = row.vm or Vm("", "")
    return Denial(code, reason, row.request_id or "", vm.hotkey, vm.name, row.event, finding)


def explain(denial: Denial) -> Why:
    """Explain one refusal."""
    finding = denial.finding
    whose = f"VM {denial.vm or '(not named)'} of hotkey {denial.hotkey or '(not named)'}"
    about = f" ({denial.event})" if denial.event else ""
    what = f"{whose} was refused{about}: {denial.code}"
    where = f"the server's own check: {denial.reason}"
    if finding is not None:
        stage = f", {finding.stage} stage" if finding.stage else ""
        where = f"at step {finding.step} of verification{stage} ({finding.code}), whose rule is: {finding.rule}"
    return Why(
        what,
        where,
        None if finding is None else finding.step,
        None if finding is None else finding.profile,
        _of_schedule(finding) or _of_hotkey(denial) or remedy(denial.code),
        () if finding is None else finding.differences,
    )


def remedy(code: str) -> str:
    """Tell an operator the remedy for refusals of this code."""
    return _REMEDIES.get(code) or (_OURS if code in _FAULTS else _OTHERWISE)


def _of_schedule(finding: Finding | None) -> str | None:
    """The remedy for a VM that its profile's schedule alone refuses: its image is known, so there is none to add."""
    differing = () if finding is None else finding.differences
    return _SCHEDULED.get(differing[0].what) if len(differing) == 1 else None


def _of_hotkey(denial: Denial) -> str | None:
    """The remedy for a text that is not a hotkey: `hotkeys` of the configuration does not take it."""
    if denial.code == str(Code.HOTKEY_REJECTED):
        try:
            _ = Hotkey.parse(denial.hotkey)
        except HotkeyError:
            return _NOT_A_HOTKEY
    return None


def _text(value: object) -> str:
    return "" if value is None else shown(value)


_CONVERTER: Final = StrictConverter()
_CODES: Final = frozenset(map(str, Code))
_FAULTS: Final = frozenset(str(code) for code in Code if code.status >= 500)
_OURS: Final = (
    "the fault is the server's, and the VM tries again: run `chutes-proto serve --check`, and read the reason"
)
_OTHERWISE: Final = "the request itself is wrong: read the reason, and compare the client's version with the server's"
_SHARED: Final = "if it comes back, compare the clocks, and whether all servers share one store"
_AGAIN: Final = f"boot the VM again; {_SHARED}"
_PROXY: Final = "compare what ends TLS before the server with [[proxy]] of the configuration"

_ADD_HOTKEY: Final = (
    "add the hotkey to `hotkeys` of the configuration if you serve its owner, and run `chutes-proto reload`"
)
_NOT_A_HOTKEY: Final = (
    "the VM's hotkey is not an SS58 address of prefix 42: correct it in the VM's settings or its config volume"
)
_FREE: Final = (
    "`chutes-proto registrations list` shows whose server that is: its owner frees it, or `registrations remove ID`"
)
_SCHEDULED: Final = {
    "profile_ended": "boot a newer image on it, or move `not_after` of its profile and `chutes-proto reload`;"
    " `chutes-proto profiles list` shows the schedule, `profiles vms` the VMs that need another image",
    "profile_not_yet": "boot an older image on it, wait, or move `not_before` of its profile and `chutes-proto reload`;"
    " `chutes-proto profiles list` shows the schedule",
}
_REMEDIES: Final[Mapping[str, str]] = {
    Code.MEASUREMENT_MISMATCH: "if you rolled this image, firmware or kernel command line out, add its reference values"
    " (`chutes-proto profiles import`, then `reload`); `chutes-proto why --event-log` names the event that differs."
    " Otherwise accept nothing: somebody else changed the VM",
    Code.TCB_REJECTED: "update firmware, microcode or TDX module of the host, or let the policy accept it:"
    " `chutes-proto policy try` says for which VMs that counts, `reload` lets it count",
    Code.ATTRIBUTES_REJECTED: "start the TD without debug and with the attributes that the profile names",
    Code.QUOTE_REJECTED: "`chutes-proto verify` of the VM's quote names the step: the platform is revoked, or its quote"
    " or collateral is of another root",
    Code.QUOTE_MALFORMED: "check the VM's quoter: what it sent is not a TDX quote",
    Code.CERTIFICATE_MISMATCH: f"the quote binds another TLS key than the client's: {_PROXY}",
    Code.CLIENT_CERTIFICATE_REQUIRED: f"no client certificate arrived: {_PROXY}",
    Code.NONCE_MISMATCH: "the quote is not over this request's nonce: check the VM's quoter, and boot or attest again",
    Code.NONCE_INVALID: f"boot the VM again, or attest the server again if it was no boot; {_SHARED}",
    Code.BOOT_TOKEN_INVALID: _AGAIN,
    Code.QUOTE_NONCE_INVALID: _AGAIN,
    Code.CONFIRM_NONCE_INVALID: _AGAIN,
    Code.ROTATION_SUPERSEDED: "boot the VM again: another decision about its keys came between",
    Code.HOTKEY_REJECTED: _ADD_HOTKEY,
    Code.HOTKEY_UNKNOWN: _ADD_HOTKEY,
    Code.HOTKEY_BLACKLISTED: "remove the hotkey from `blacklist` if it may boot again",
    Code.HOTKEY_MISMATCH: "the token is another hotkey's: look for a client that mixes VMs",
    Code.VM_NAME_MISMATCH: "the token is another VM's: look for a client that mixes VMs",
    Code.SIGNATURE_INVALID: "check that the VM signs with the key of its hotkey; `chutes-proto hotkey check` does",
    Code.SIGNATURE_STALE: "set the caller's clock right",
    Code.REVOKED: "an operator revoked it: `chutes-proto revocations` says when and why; `vm allow`, `hotkey allow` or"
    " `platform allow` undoes it, and the VM must be started again",
    Code.PLATFORM_MISMATCH: "if you moved the disk, run `chutes-proto vm rebind VM --keep-keys`; if a server moved that"
    " no boot is linked to, remove it and register it again; if nothing moved, somebody else uses the name",
    Code.VERSION_REJECTED: "upgrade the image, or lower `minimum_version`",
    Code.EXCHANGE_MISMATCH: "give the profile the exchange that its image speaks",
    Code.EXCHANGE_DOWNGRADE: 'boot an image of the two-phase exchange, or set `exchange_downgrade = "allow"`',
    Code.GPU_EVIDENCE_REJECTED: "`chutes-proto gpu verify` names what the evidence lacks",
    Code.EVIDENCE_UNAVAILABLE: "let the host answer at `registration.evidence_port`; the reason names what failed",
    Code.HOST_INVALID: "the miner must give a public IPv4 address, or a name that has public addresses only",
    Code.HOST_TAKEN: _FREE,
    Code.SERVER_TAKEN: _FREE,
    Code.NAME_TAKEN: "the miner chooses another name, or renames or removes the server that has this one",
    Code.SERVERS_FULL: "the miner removes servers that it does not need; `chutes-proto registrations list` shows them",
    Code.GPU_TAKEN: _FREE,
    Code.BOOT_REQUIRED: "boot the VM of this name, or from this address, before it is registered",
    Code.PROXY_REQUIRED: "if it is a proxy of yours, compare its header, secret and `serves` with [[proxy]] of the"
    " configuration; else let the VM connect to that proxy",
    Code.KEY_NOT_FOUND: "`chutes-proto keys history VM` shows which keys there are",
    Code.SERVER_NOT_FOUND: "`chutes-proto registrations list` shows whose servers there are",
    Code.MAINTENANCE_DENIED: "open a window in `maintenance` of the configuration; the reason says what is against it",
    Code.MAINTENANCE_CONFLICT: "boot the target version on the servers that are in maintenance: that ends it",
    Code.PROXY_UNAVAILABLE: "add a [[proxy]] that serves this operation's images, or remove `serves` from the others",
    Code.HOST_PROFILES_FULL: "`chutes-proto hosts list`, then `hosts remove` the profiles that nobody needs",
    Code.RATE_LIMITED: "wait, or raise `limits.requests_per_minute`",
}
