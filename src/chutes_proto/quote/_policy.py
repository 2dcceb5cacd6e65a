"""Policies: a caller's demands on the TCB, on the TD's attributes and on its measurements.

    policy = Policy(profiles=profiles)
    accepted = policy.appraise(verdict, now=now, stage="boot")

Rules kept here:

* a verdict is of the time at which it was verified: `Policy.appraise` takes the present time, by which it decides, and
  refuses a verdict of `MAX_AGE` seconds before it, unless the caller names another age;

* a policy is checked when it is made: meaningless values are refused then, and nothing is ignored;
* the defaults accept what is up to date and nothing less, and no measurement at all: profiles must be given, or the
  policy must say that measurements are not its business (``measurements="unchecked"``);
* an `AcceptedVerdict` is made by `Policy.appraise` only; an `AppraisalError` lists all reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, cast, get_args, get_type_hints

from attrs import field, fields, frozen

from chutes_proto._lazy import LazyModule
from chutes_proto._proof import PROOF
from chutes_proto.quote._arguments import BytesLike, check_flag, check_kind
from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._collateral import Collateral, PathLike, VerifiedCollateral
from chutes_proto.quote._errors import AppraisalError, Part, PolicyError, Refusal, mismatch
from chutes_proto.quote._files import CONVERTER, UnixTime, read_toml, within
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._layout import SgxAttributes, SgxReport, TdReport10
from chutes_proto.quote._measurements import (
    REGISTERS,
    Profile,
    ProfileState,
    ProfileTables,
    Stage,
    Tables,
    VouchedEvent,
    check_distinct,
    read_profiles,
)
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._statements import Stated, TcbStatus
from chutes_proto.quote._tcb import OUT_OF_DATE
from chutes_proto.quote._terms import check_duration, check_seconds, rfc3339
from chutes_proto.quote._verify import Verdict, verify_genuine

if TYPE_CHECKING:
    from chutes_proto.quote import _eventlog as eventlog
else:  # most appraisals replay nothing; the types of public functions resolve all the same
    eventlog = LazyModule("chutes_proto.quote._eventlog")

MAX_AGE: Final = 300
"""The seconds for which a verdict may be appraised, if the caller does not say: for what a program does in between."""

_ADVISORY: Final = re.compile(f"INTEL-(SA|DOC)-[0-9]{{5}}|SIMULATED-SA-({'|'.join(TcbStatus)})".upper())
"""Intel's, and the simulated platform's: an identifier that nobody issues would refuse nothing."""


def _statuses(values: Any) -> frozenset[TcbStatus]:
    refused = f"accepted_statuses: must be a list of {', '.join(_ACCEPTABLE)}"
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PolicyError(refused)
    names = tuple(cast("Iterable[str]", values))
    for name in names:
        if name not in _ACCEPTABLE:
            raise PolicyError(f"{refused}; {str(name)[:80]!r} is not one")
    return frozenset(map(TcbStatus, names))


def _advisories(values: Any) -> frozenset[str]:
    refused = 'rejected_advisories: must be a list of identifiers like "INTEL-SA-00837"'
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise PolicyError(refused)
    names = [str(name).upper() for name in cast("Iterable[object]", values)]
    for name in names:
        if not _ADVISORY.fullmatch(name):
            raise PolicyError(f"{refused}; {name[:80]!r} is not one")
    return frozenset(names)


_ACCEPTABLE: Final = tuple(status for status in TcbStatus if status is not TcbStatus.REVOKED)


def _resolve_init(kind: type[Any]) -> None:
    """Resolve the types of the ``__init__`` that attrs made, for `typing.get_type_hints`.

    Its globals lack names that its module defines later, and those of a base class's module.
    """
    made: Any = kind.__init__
    hints = get_type_hints(kind)
    made.__annotations__.update({name: hints[name] for name in made.__annotations__ if name in hints})


@frozen(kw_only=True)
class TcbPolicy:
    """The demands on the platform's TCB. Raises `PolicyError` for fields that contradict each other.

    ``accepted_statuses`` are `TcbStatus` or their texts; a revoked TCB is refused before. A report with the current TCB
    is refused if that is out of date, unless such a status is accepted. Advisories, at launch and at present, are
    refused only if they are listed.
    ``min_evaluation_number`` is a lower bound for the collateral's TCB evaluation data numbers, which no clock lowers;
    with 0, the supplier of the collateral chooses the TCB recovery by which the platform is appraised.
    ``evaluation_numbers`` "equal" refuses TCB info and QE identity of two TCB recoveries, "any" accepts them.
    ``min_tcb_date`` (unix seconds) is a lower bound for the TCB date: that of the oldest part's level.
    ``min_tcb_info_version`` is a lower bound for the version of TCB info. The three flags, if false, refuse platforms
    that have, or may have, the named feature.

    Graces are seconds. Where the status is out of date and accepted, platform and TDX module (``platform_grace``) and
    the quoting enclave (``qe_grace``) may be so until this long after the date of the level that they reach; None sets
    no limit. ``collateral_grace`` is how long collateral that was verified with a grace may have been expired.
    """

    accepted_statuses: frozenset[TcbStatus] = field(default=frozenset({TcbStatus.UP_TO_DATE}), converter=_statuses)
    rejected_advisories: frozenset[str] = field(default=frozenset(), converter=_advisories)
    min_evaluation_number: int = 0
    evaluation_numbers: Literal["equal", "any"] = "equal"
    min_tcb_date: UnixTime | None = None
    min_tcb_info_version: int = 2
    allow_dynamic_platform: bool = True
    allow_cached_keys: bool = True
    allow_smt: bool = True
    platform_grace: int | None = None
    qe_grace: int | None = None
    collateral_grace: int = 0

    def __attrs_post_init__(self) -> None:
        if not self.accepted_statuses:
            raise PolicyError(f"accepted_statuses: must be some of {', '.join(_ACCEPTABLE)}")
        if type(self.min_evaluation_number) is not int or self.min_evaluation_number < 0:
            raise PolicyError("min_evaluation_number: must be a whole number that is not negative")
        if self.evaluation_numbers not in ("equal", "any"):
            raise PolicyError('evaluation_numbers: must be "equal" or "any"')
        for name in ("allow_dynamic_platform", "allow_cached_keys", "allow_smt"):
            if type(getattr(self, name)) is not bool:
                raise PolicyError(f"{name}: must be true or false")
        if type(self.min_tcb_info_version) is not int or self.min_tcb_info_version not in (2, 3):
            raise PolicyError("min_tcb_info_version: must be 2 or 3")
        if self.min_tcb_date is not None and (type(self.min_tcb_date) is not int or self.min_tcb_date < 0):
            raise PolicyError("min_tcb_date: must be a date, in code whole unix seconds")
        for name in ("platform_grace", "qe_grace", "collateral_grace"):
            grace = getattr(self, name)
            may_be_unlimited = name != "collateral_grace"
            if (grace is not None or not may_be_unlimited) and (type(grace) is not int or grace < 0):
                raise PolicyError(f"{name}: must be a whole number of seconds that is not negative")
            if grace is not None and may_be_unlimited and not self.accepted_statuses & OUT_OF_DATE:
                raise PolicyError(f"{name}: goes with an OutOfDate status in accepted_statuses")

    def refusals(self, verdict: Verdict, *, now: int) -> list[Refusal]:
        """List every reason to refuse the platform of a verdict at a time, in unix seconds."""
        found: list[Refusal] = []

        def refuse(code: str, detail: str, got: object, expected: object) -> None:
            part: Part = "collateral" if code in _OF_COLLATERAL else "tcb"
            found.append(mismatch(part, code, detail, str(got), str(expected)))

        if verdict.tcb_status not in self.accepted_statuses:
            accepted = " or ".join(status for status in _ACCEPTABLE if status in self.accepted_statuses)
            refuse("tcb_status", "the TCB status is not accepted", verdict.tcb_status, accepted)
        if verdict.current_status in OUT_OF_DATE - self.accepted_statuses:
            refuse("current_tcb_status", "the current TCB is out of date", verdict.current_status, "another status")
        applying = {*verdict.advisory_ids, *verdict.current_advisory_ids}
        rejected = sorted(a for a in applying if a.upper() in self.rejected_advisories)
        if rejected:
            refuse("advisory", "an advisory applies that is not accepted", ", ".join(rejected), "none of these")
        if self.min_tcb_date is not None and verdict.tcb_date < self.min_tcb_date:
            got, floor = rfc3339(verdict.tcb_date), f"at least {rfc3339(self.min_tcb_date)}"
            refuse("tcb_date", "a part has the TCB of an earlier date", got, floor)
        if verdict.evaluation_number < self.min_evaluation_number:
            floor = f"at least {self.min_evaluation_number}"
            refuse("evaluation_number", "the collateral is of an old TCB recovery", verdict.evaluation_number, floor)
        of_info, of_qe = verdict.collateral.tcb_info_number, verdict.collateral.qe_identity_number
        if of_info != of_qe and self.evaluation_numbers == "equal":
            got = f"{of_info} and {of_qe}"
            refuse("evaluation_numbers", "TCB info and QE identity are of two TCB recoveries", got, "equal numbers")
        if verdict.tcb_info_version < self.min_tcb_info_version:
            floor = f"at least {self.min_tcb_info_version}"
            refuse("tcb_info_version", "the TCB info is of an old version", verdict.tcb_info_version, floor)
        outdated = verdict.tcb_status in OUT_OF_DATE  # not where a relaunch cures it
        for code, grace, begin in (
            ("platform_grace", self.platform_grace, _reached(verdict.platform, verdict.module) if outdated else None),
            ("qe_grace", self.qe_grace, _reached(verdict.qe) if outdated else None),
            ("collateral_grace", self.collateral_grace, verdict.window[1]),
        ):
            if grace is not None and begin is not None and now > begin + grace:
                refuse(code, _GRACES[code], rfc3339(now), f"at most {rfc3339(begin + grace)}")
        pck = verdict.pck
        for name, allowed, has in (
            ("dynamic_platform", self.allow_dynamic_platform, pck.dynamic_platform),
            ("cached_keys", self.allow_cached_keys, pck.cached_keys),
            ("smt", self.allow_smt, pck.smt),
        ):
            if not allowed and has is not False:
                got = "unknown" if has is None else "yes"
                refuse(name, f"{name} is not allowed and not excluded by the PCK certificate", got, "no")
        return found


_OF_COLLATERAL: Final = frozenset({"evaluation_number", "evaluation_numbers", "tcb_info_version", "collateral_grace"})
"""The codes of refusals that are about the collateral, not the platform."""

_GRACES: Final = {
    "platform_grace": "platform or TDX module have been out of date for too long",
    "qe_grace": "the quoting enclave has been out of date for too long",
    "collateral_grace": "the collateral expired too long ago",
}


def _reached(*parts: Stated | None) -> int | None:
    """The earliest date of the levels that are out of date; None if none is."""
    return min((part.date for part in parts if part is not None and part.status in OUT_OF_DATE), default=None)


@frozen(kw_only=True, eq=False)
class AcceptedVerdict(Verdict):
    """A verdict that a policy accepts in a stage, at ``appraised_at``, the caller's ``now`` in unix seconds.

    ``matched`` is None if the policy leaves measurements unchecked.
    """

    stage: Stage
    matched: Profile | None
    appraised_at: int
    _instead: ClassVar[str] = "the policy accepts it; a quote that is refused raises VerificationError"

    @property
    def profile(self) -> Profile:
        """The profile that the TD's measurements match. Raises `PolicyError` if measurements were left unchecked."""
        if self.matched is None:
            raise PolicyError("measurements were left unchecked, so no profile matched")
        return self.matched

    @property
    def profile_state(self) -> ProfileState | None:
        """The state of the matched profile at the time of appraisal: "warned" and "retiring" are to be listed."""
        return None if self.matched is None else self.matched.schedule.state(self.appraised_at)

    @property
    def unpinned(self) -> tuple[str, ...]:
        """The registers that were accepted with any value: by a rule of the profile, or all without a profile."""
        return REGISTERS if self.matched is None else self._ruled("any")

    @property
    def replayed(self) -> tuple[str, ...]:
        """The registers whose values were accepted because the event log leads to them."""
        return self._ruled("replayed")

    def _ruled(self, check: str) -> tuple[str, ...]:
        rules = {} if self.matched is None else self.matched.rules_of(self.stage)
        return tuple(register for register in REGISTERS if register in rules and rules[register].check == check)


_resolve_init(AcceptedVerdict)


def _accepted(verdict: Verdict, now: int, stage: Stage, matched: Profile | None) -> AcceptedVerdict:
    members: dict[str, Any] = {name: getattr(verdict, name) for name in _OF_VERDICT}
    return AcceptedVerdict(**members, stage=stage, matched=matched, appraised_at=now, proof=PROOF)


_OF_VERDICT: Final = tuple(member.name for member in fields(Verdict) if member.name != "proof")


@frozen(kw_only=True)
class Policy:
    """A caller's appraisal policy for evidence. Raises `PolicyError` for fields that contradict each other."""

    tcb: TcbPolicy = TcbPolicy()
    attributes: AttributePolicy = AttributePolicy()
    profiles: tuple[Profile, ...] = ()
    measurements: Literal["profiles", "unchecked"] = "profiles"
    identity: IdentityPolicy = IdentityPolicy()

    def __attrs_post_init__(self) -> None:
        for name, kind in (("tcb", TcbPolicy), ("attributes", AttributePolicy), ("identity", IdentityPolicy)):
            if not isinstance(getattr(self, name), kind):
                raise PolicyError(f"{name}: must be {kind.__name__}")
        profiles: Any = self.profiles
        if type(profiles) is not tuple or not all(isinstance(profile, Profile) for profile in cast("Any", profiles)):
            raise PolicyError("profiles: must be a tuple of Profile")
        if self.measurements not in ("profiles", "unchecked"):
            raise PolicyError('measurements: must be "profiles" or "unchecked"')
        if self.measurements == "unchecked" and self.profiles:
            raise PolicyError('measurements: "unchecked" goes without profiles')
        check_distinct(self.profiles)

    @classmethod
    def load(cls, path: str | PathLike, *, extra_keys: frozenset[str] = frozenset()) -> AnyPolicy:
        """Read a policy from a TOML file of the form that `parse_policy_toml` reads.

        Raises `chutes_proto.errors.FileUnavailable` and `PolicyError`; both name the file.
        """
        from chutes_proto.io.files import read_file

        data = read_file(path)
        try:
            return parse_policy_toml(data, extra_keys=extra_keys)
        except PolicyError as exc:
            raise PolicyError(f"{path}: {exc}") from None

    def appraise(
        self,
        verdict: Verdict,
        *,
        now: int,
        stage: Stage,
        event_log: eventlog.EventLog | None = None,
        max_age: int = MAX_AGE,
        max_collateral_age: int | None = None,
    ) -> AcceptedVerdict:
        """Accept a verdict in a stage. Raises `AppraisalError` with all reasons not to; `TypeError` for no verdict.

        ``now`` is the present time, in whole unix seconds. A verdict of more than ``max_age`` seconds before it is
        refused; so is one of a later time, and one whose TCB info, QE identity or PCK CRL was issued more than
        ``max_collateral_age`` seconds before it (None: no limit but their own end).

        ``event_log`` is that of the TD, for profiles with registers that a log must explain; nothing vouches for it
        before. Of several profiles that match the TD's measurements, the first whose attributes accept it counts, if it
        counts at that time. Where none matches, the refusals are against the one that differs in the
        fewest registers.
        """
        _check_appraised(verdict, now, stage, event_log, max_age, max_collateral_age)
        body = verdict.quote.body
        refusals = _aged(verdict, now, max_age, max_collateral_age)
        refusals += self.tcb.refusals(verdict, now=now) + self.identity.refusals(verdict.pck, body)
        if isinstance(body, SgxReport):
            refusals += self._of_enclave(body)
            matched = None
        else:
            events = _events(self.profiles, body, stage, event_log)
            candidates: list[tuple[list[Refusal], list[Refusal], Profile]] = []
            for profile in self.profiles:
                measured = profile.refusals(body, stage, events)
                refused = (profile.attributes or self.attributes).refusals(body)
                refused += profile.untimely(now)
                candidates.append((measured, refused, profile))
                if not measured and not refused:
                    break
            if not candidates:
                measured = [] if self.measurements == "unchecked" else [_NO_PROFILES]
                refused, matched = self.attributes.refusals(body) + measured, None
            else:
                measured, refused, matched = min(candidates, key=lambda found: (len(found[0]), len(found[1])))
                refused = refused + measured
            refusals += refused
        if refusals:
            nearest = None if matched is None else str(matched)
            raise AppraisalError(refusals, verdict.steps, nearest=nearest, stage=stage)
        return _accepted(verdict, now, stage, matched)

    def _of_enclave(self, body: SgxReport) -> list[Refusal]:
        """List the refusals of an SGX enclave: it has no TD attributes and no RTMRs, so profiles never accept it."""
        found: list[Refusal] = []
        if body.flags & SgxAttributes.DEBUG and not self.attributes.unsafe_allow_debug:
            problem, got = "the enclave can be debugged by its host", f"0x{body.flags:016x}"
            found.append(mismatch("attributes", "debug", problem, got, "bit 1 clear"))
        if self.measurements != "unchecked" and not self.identity.pins_enclaves:
            problem = "an SGX enclave has none of a TD's registers, and the policy names no MRENCLAVE or MRSIGNER"
            found.append(Refusal("measurement", "not_a_td", problem))
        return found


def _aged(verdict: Verdict, now: int, max_age: int, max_collateral_age: int | None) -> list[Refusal]:
    """List the refusals of a verdict that is not of this time, or whose collateral is too old."""
    found: list[Refusal] = []
    made, issued = verdict.verified_at, verdict.collateral.issued_at
    if now - made > max_age:
        problem, floor = "the verdict was made too long ago", f"at least {rfc3339(now - max_age)}"
        found.append(mismatch("verdict", "verdict_age", problem, rfc3339(made), floor))
    if made > now:
        problem = "the verdict is of a later time than it is now; is the time right?"
        found.append(mismatch("verdict", "verdict_age", problem, rfc3339(made), f"at most {rfc3339(now)}"))
    if max_collateral_age is not None and now - issued > max_collateral_age:
        problem, floor = "the collateral was issued too long ago", f"at least {rfc3339(now - max_collateral_age)}"
        found.append(mismatch("collateral", "collateral_age", problem, rfc3339(issued), floor))
    return found


def _events(
    profiles: Iterable[Profile], body: TdReport10, stage: Stage, log: eventlog.EventLog | None
) -> Mapping[str, Sequence[VouchedEvent]] | str:
    """The events of a log that leads to the registers of the report, or why there are none; only if a rule asks."""
    if not any(rule.check == "replayed" for profile in profiles for rule in profile.rules_of(stage).values()):
        return ""
    if log is None:
        return "it must be replayed, and no event log was given"
    try:
        replayed = eventlog.replay(log, body.rtmrs)
    except eventlog.EventLogMismatchError as exc:
        return str(exc)
    return {register: replayed.log.of(register) for register in REGISTERS}


_NO_PROFILES: Final = Refusal("measurement", "no_profiles", "the policy has no measurement profile to compare with")


@frozen
class _Combined:
    """Policies that are appraised together."""

    policies: tuple[AnyPolicy, ...]

    def __attrs_post_init__(self) -> None:
        policies: tuple[object, ...] = cast("Any", self.policies)
        name = type(self).__name__
        if type(policies) is not tuple or not all(isinstance(policy, AnyPolicy) for policy in policies):
            raise PolicyError(f"{name}: must be a tuple of policies")
        if not policies:
            raise PolicyError(f"{name}: must have at least one policy")


class AllOf(_Combined):
    """Accept a verdict if all of these policies do. Raises `PolicyError` unless there is at least one."""

    __slots__ = ()

    def appraise(
        self,
        verdict: Verdict,
        *,
        now: int,
        stage: Stage,
        event_log: eventlog.EventLog | None = None,
        max_age: int = MAX_AGE,
        max_collateral_age: int | None = None,
    ) -> AcceptedVerdict:
        """Accept a verdict that all of these accept; ``matched`` is the first profile that one of these matched.

        The arguments are those of `Policy.appraise`. Raises `AppraisalError` with all reasons of all of these;
        `TypeError` for no verdict.
        """
        matched: Profile | None = None
        nearest: str | None = None
        refusals: list[Refusal] = []
        for policy in self.policies:
            try:
                accepted = policy.appraise(
                    verdict,
                    now=now,
                    stage=stage,
                    event_log=event_log,
                    max_age=max_age,
                    max_collateral_age=max_collateral_age,
                )
                matched = matched or accepted.matched
            except AppraisalError as exc:
                refusals += exc.refusals
                nearest = nearest or exc.nearest
        if refusals:
            raise AppraisalError(tuple(dict.fromkeys(refusals)), verdict.steps, nearest=nearest, stage=stage)
        return _accepted(verdict, now, stage, matched)


class AnyOf(_Combined):
    """Accept a verdict if one of these policies does. Raises `PolicyError` unless there is at least one."""

    __slots__ = ()

    def appraise(
        self,
        verdict: Verdict,
        *,
        now: int,
        stage: Stage,
        event_log: eventlog.EventLog | None = None,
        max_age: int = MAX_AGE,
        max_collateral_age: int | None = None,
    ) -> AcceptedVerdict:
        """Accept a verdict that one of these accepts; the result is that of the first which does.

        The arguments are those of `Policy.appraise`. Raises `AppraisalError` with all reasons of all of these;
        `TypeError` for no verdict.
        """
        nearest: str | None = None
        refusals: list[Refusal] = []
        for policy in self.policies:
            try:
                return policy.appraise(
                    verdict,
                    now=now,
                    stage=stage,
                    event_log=event_log,
                    max_age=max_age,
                    max_collateral_age=max_collateral_age,
                )
            except AppraisalError as exc:
                refusals += exc.refusals
                nearest = nearest or exc.nearest
        raise AppraisalError(tuple(dict.fromkeys(refusals)), verdict.steps, nearest=nearest, stage=stage)


AnyPolicy: TypeAlias = Policy | AllOf | AnyOf
"""Every kind of policy."""

_resolve_init(_Combined)


_STAGES: Final[tuple[Stage, ...]] = get_args(Stage)


def _check_appraised(
    verdict: object, now: int, stage: Stage, log: object, max_age: int, max_collateral_age: int | None
) -> None:
    check_kind("verdict", verdict, Verdict, "a Verdict, as of verify_genuine")
    check_seconds("now", now)
    check_duration("max_age", max_age)
    _check_how(stage, log, max_collateral_age)


def check_options(
    *,
    policy: object,
    root: object,
    grace: object,
    sgx: object,
    stage: object,
    max_collateral_age: object,
    event_log: object = None,
) -> None:
    """Check the arguments of `verify` that say how to verify, before there is anything to verify.

    Raises `TypeError`, `ValueError` for negative seconds, and `PolicyError` for another stage.
    """
    check_kind("policy", policy, get_args(AnyPolicy), "a Policy, AllOf or AnyOf, as of Policy.load")
    check_kind("root", root, TrustedRoot, "a TrustedRoot, as of TrustedRoot.from_der")
    check_duration("grace", grace)
    check_flag("sgx", sgx)
    _check_how(stage, event_log, max_collateral_age)


def _check_how(stage: object, log: object, max_collateral_age: object) -> None:
    if stage not in _STAGES:
        raise PolicyError(f"stage: must be one of {', '.join(_STAGES)}")
    if max_collateral_age is not None:
        check_duration("max_collateral_age", max_collateral_age)
    if log is not None:
        check_kind("event_log", log, eventlog.EventLog, eventlog.LOG)


def verify(
    data: BytesLike,
    collateral: Collateral | VerifiedCollateral,
    *,
    now: int,
    report_data: bytes | None,
    policy: AnyPolicy,
    root: TrustedRoot = INTEL_ROOT,
    grace: int = 0,
    sgx: bool = False,
    stage: Stage = "boot",
    event_log: eventlog.EventLog | None = None,
    max_collateral_age: int | None = None,
) -> AcceptedVerdict:
    """Verify a quote against Intel's collateral, and return a verdict only if the policy accepts it.

    ``data`` are the bytes of a TDX quote, with ``sgx`` also those of an SGX quote. ``now`` is the time of verification,
    in whole unix seconds. ``report_data`` are the 64 bytes that the quote must bind; pass None only if something else
    binds it to the peer, because a genuine quote of another machine verifies as well. ``root`` is the CA to trust in
    place of Intel's, ``grace`` the seconds for which expired CRLs, TCB info and QE identity are still accepted, if the
    policy's ``collateral_grace`` accepts them, too. ``stage`` says which registers of the policy's profiles count,
    ``event_log`` explains those that a profile leaves to it; a log that no profile asks for is compared with nothing
    (`replay` does that), and ``verdict.replayed`` is empty. ``collateral`` may be what `verify_collateral`
    returned, which is kept for many quotes; then its times are verified again, and its own grace counts.
    ``max_collateral_age`` is as for `Policy.appraise`: how many seconds ago its pieces may have been issued.

    Raises `VerificationError` for every refusal, with its step: the quote does not parse, is not genuine, or is not
    accepted by the policy (`AppraisalError`). Raises `TypeError` for arguments of another type, `ValueError` for
    negative seconds, and `PolicyError` for another stage.
    """
    check_options(
        policy=policy,
        root=root,
        grace=grace,
        sgx=sgx,
        stage=stage,
        max_collateral_age=max_collateral_age,
        event_log=event_log,
    )
    verdict = verify_genuine(data, collateral, now=now, report_data=report_data, root=root, grace=grace, sgx=sgx)
    return policy.appraise(
        verdict, now=now, stage=stage, event_log=event_log, max_age=0, max_collateral_age=max_collateral_age
    )


# --- policies in TOML ---


def parse_policy_toml(data: bytes | str, *, extra_keys: frozenset[str] = frozenset()) -> AnyPolicy:
    """Read the policy in a TOML file, or in its text (``docs/reference/policies.md`` has the form).

    Profiles may have keys of ``extra_keys``, which are ignored. Raises `PolicyError`, which names the key.
    """
    return within("", read_policy, read_toml(data), extra_keys, MAX_DEPTH)


def read_policy(table: Mapping[str, object], extra_keys: frozenset[str], depth: int) -> AnyPolicy:
    """Read a policy from a file's tables, in which policies are at most ``depth`` deep. Raises `PolicyError`."""
    for name, combine in _COMBINED.items():
        if name not in table:
            continue
        if other := sorted(table.keys() - {name}):
            raise PolicyError(f"{other[0]}: does not go beside {name}, whose members say all")
        if depth == 0:
            raise PolicyError(f"{name}: more than {MAX_DEPTH} levels of policies in policies")
        entries = within(name, CONVERTER.structure, table[name], Tables)
        if not entries:
            raise PolicyError(f"{name}: must have at least one policy")
        members = enumerate(entries, 1)
        return combine(
            tuple(within(f"{name} {number}", read_policy, entry, extra_keys, depth - 1) for number, entry in members)
        )
    form = CONVERTER.structure(table, _PolicyForm)
    return Policy(
        tcb=form.tcb,
        attributes=form.attributes,
        profiles=tuple(profile for profile, _ in read_profiles(form, extra_keys)),
        measurements=form.measurements,
        identity=form.identity,
    )


MAX_DEPTH: Final = 4
_COMBINED: Final[dict[str, type[AllOf | AnyOf]]] = {"all_of": AllOf, "any_of": AnyOf}
COMBINED: Final = _COMBINED.keys()
"""The keys of policies in a policy."""


@frozen(kw_only=True)
class _PolicyForm(ProfileTables):
    """The tables of one policy."""

    measurements: Literal["profiles", "unchecked"] = "profiles"
    tcb: TcbPolicy = TcbPolicy()
    attributes: AttributePolicy = AttributePolicy()
    identity: IdentityPolicy = IdentityPolicy()
