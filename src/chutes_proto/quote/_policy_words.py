"""A policy in plain words: one sentence for each rule, the defaults too, so that nothing is accepted unseen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from chutes_proto.quote._attributes import ATTRIBUTES_KNOWN, XFAM_FIXED, XFAM_KNOWN, AttributePolicy
from chutes_proto.quote._identity import IdentityPolicy
from chutes_proto.quote._measurements import Profile, RegisterRule
from chutes_proto.quote._policy import AllOf, AnyPolicy, Policy, TcbPolicy
from chutes_proto.quote._policy_set import PolicySet
from chutes_proto.quote._statements import TcbStatus
from chutes_proto.quote._tcb import OUT_OF_DATE
from chutes_proto.quote._terms import rfc3339

_INDENT: Final = "  "
_DAY: Final = 86_400


def explain_set(policies: PolicySet) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Explain each part of a policy file: its title, and its sentences; of an exception those that differ."""
    default = explain(policies.default)
    parts = [("Every VM", default)]
    for names, hotkey in policies.exceptions:
        if len(names) + (hotkey is not None) > 1:
            continue  # a combination of others, which are explained
        title = f"VMs of the profile {names[0]}" if names else f"VMs of the hotkey {hotkey}"
        own = explain(policies.exceptions[names, hotkey])
        changed = tuple(sentence for sentence in own if sentence not in (*default, _NO_PROFILES))
        parts.append((title, changed or ("The same as every VM.",)))
    if policies.hotkeys:
        both = "They must be accepted as that hotkey's and as every other VM."
        parts.append(("VMs that name one of these hotkeys without proof", (both,)))
    return tuple(parts)


def explain(policy: AnyPolicy) -> tuple[str, ...]:
    """Explain a policy, one sentence a rule; the members of ``any_of`` and ``all_of`` are indented."""
    return tuple(_sentences(policy))


def _sentences(policy: AnyPolicy) -> Iterator[str]:
    if isinstance(policy, Policy):
        yield from _tcb(policy.tcb)
        yield from _identity(policy.identity)
        yield from _attributes(policy.attributes)
        yield from _measurements(policy)
        return
    which = "each" if isinstance(policy, AllOf) else "at least one"
    yield f"It must be accepted by {which} of {len(policy.policies)} policies:"
    for index, member in enumerate(policy.policies, 1):
        yield f"{_INDENT}Policy {index}:"
        yield from (f"{_INDENT * 2}{sentence}" for sentence in _sentences(member))


def _tcb(tcb: TcbPolicy) -> Iterator[str]:
    yield f"The TCB status must be {_or(status for status in TcbStatus if status in tcb.accepted_statuses)}."
    for grace, parts in ((tcb.platform_grace, "the platform or its TDX module"), (tcb.qe_grace, "the quoting enclave")):
        if grace is not None:
            yield f"If {parts} is out of date, that is accepted for {_time(grace)} after the date of its TCB level."
    if tcb.rejected_advisories:
        yield f"A platform to which {_or(sorted(tcb.rejected_advisories))} applies is refused."
    else:
        yield "No advisory alone refuses a platform."
    if tcb.min_evaluation_number:
        yield f"The collateral must be of TCB recovery {tcb.min_evaluation_number} or a later one."
    else:
        yield "Collateral of any TCB recovery counts, so who supplies it chooses the recovery."
    if tcb.evaluation_numbers == "any":
        yield "TCB info and QE identity may be of two TCB recoveries."
    else:
        yield "TCB info and QE identity must be of one TCB recovery."
    if tcb.min_tcb_date is not None:
        yield f"No part may have the TCB of a date before {rfc3339(tcb.min_tcb_date)}."
    if tcb.min_tcb_info_version > 2:
        yield f"The TCB info must have version {tcb.min_tcb_info_version}."
    for allowed, what in (
        (tcb.allow_dynamic_platform, "to which packages can be added"),
        (tcb.allow_cached_keys, "whose keys Intel keeps"),
        (tcb.allow_smt, "with simultaneous multithreading"),
    ):
        yield f"A platform {what} is {'accepted' if allowed else 'refused, and so is one that does not say'}."
    if tcb.collateral_grace:
        yield f"Collateral is used for {_time(tcb.collateral_grace)} after it has expired, if there is none fresher."
    else:
        yield "Expired collateral is not used."


_CALLED: Final = {
    "mr_seam": "MRSEAM, the TDX module,",
    "mr_config_id": "MRCONFIGID",
    "mr_owner": "MROWNER",
    "mr_owner_config": "MROWNERCONFIG",
    "ppid": "The machine's PPID",
    "platform_instance_id": "The machine's platform instance id",
    "mr_enclave": "MRENCLAVE, of an SGX enclave,",
    "mr_signer": "MRSIGNER, of an SGX enclave,",
}


def _identity(identity: IdentityPolicy) -> Iterator[str]:
    for name, called in _CALLED.items():
        if (values := getattr(identity, name)) is not None:
            yield f"{called} must be {_or(value.hex() for value in values)}."
    if identity.ppid is None and identity.platform_instance_id is None:
        yield "Every machine is accepted."
    if identity.isv_prod_id is not None:
        yield f"ISVPRODID, of an SGX enclave, must be {_or(map(str, identity.isv_prod_id))}."
    if identity.min_isv_svn:
        yield f"ISVSVN, of an SGX enclave, must be {identity.min_isv_svn} or more."


def _attributes(attributes: AttributePolicy) -> Iterator[str]:
    if attributes.unsafe_allow_debug:
        yield "UNSAFE: a host may debug and profile a VM, and so read its memory."
    else:
        yield "A VM that its host can debug or profile is refused."
    if attributes.sept_ve_disable == "required":
        yield "SEPT_VE_DISABLE must be set, so that a host cannot inject exceptions at memory accesses."
    else:
        yield "SEPT_VE_DISABLE may be clear."
    yield f"A VM that can be migrated is {_accepted(attributes.migratable)}."
    yield f"SERVTD_EXT is {_accepted(attributes.servtd_ext)}."
    yield f"A VM that is bound to a service TD is {_accepted(attributes.service_td)}."
    if attributes.mr_service_td:
        yield f"The service TD must be {_or(value.hex() for value in attributes.mr_service_td)}."
    if attributes.attributes_allowed != ATTRIBUTES_KNOWN:
        yield f"TD attributes may have no other bits than 0x{attributes.attributes_allowed:x}."
    if (attributes.xfam_required, attributes.xfam_allowed) != (XFAM_FIXED, XFAM_KNOWN):
        allowed, required = attributes.xfam_allowed, attributes.xfam_required
        yield f"XFAM must have the bits 0x{required:x} and may have no other than 0x{allowed:x}."


def _measurements(policy: Policy) -> Iterator[str]:
    if policy.measurements == "unchecked":
        yield "Measurements are not checked."
    elif policy.profiles:
        yield f"The measurements must be those of {_or(map(str, policy.profiles))}."
        for profile in policy.profiles:
            yield from _profile(profile)
    else:
        yield _NO_PROFILES


_NO_PROFILES: Final = "The measurements must be those of a profile that the server's configuration names."


def _profile(profile: Profile) -> Iterator[str]:
    """The sentences about all that a profile leaves open, or decides in the policy's place."""
    for rule in profile.rules:
        register = rule.register if rule.stage is None else f"{rule.register} at {rule.stage}"
        yield f"Of {profile}, {register} may have any value{_replayed(rule) if rule.check == 'replayed' else ''}."
    if profile.attributes is not None:
        yield f"Of {profile}, these attributes count instead of those above:"
        yield from (f"{_INDENT}{sentence}" for sentence in _attributes(profile.attributes))


def _replayed(rule: RegisterRule) -> str:
    demands: list[str] = []
    if rule.prefix:
        demands.append(f"begin with {len(rule.prefix)} known events")
    if rule.events is not None:
        later = f"have only events of the name {_or(rule.events)}" if rule.events else "have no other event"
        demands.append(f"then {later}" if rule.prefix else later)
    demands += [f"have just one {name}, of the value {_or(map(bytes.hex, accepted))}" for name, accepted in rule.values]
    log = " that the VM's event log leads to"
    return f"{log}, which must {', and '.join(demands)}" if demands else log


def _accepted(word: str) -> str:
    return "accepted" if word == "allowed" else "refused"


def _or(values: Iterable[str]) -> str:
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _time(seconds: int) -> str:
    units = {_DAY: "day", 3600: "hour", 60: "minute"}
    size = next((size for size in units if seconds and seconds % size == 0), 1)
    count, name = seconds // size, units.get(size, "second")
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def policy_notes(policies: PolicySet, now: int) -> tuple[str, ...]:
    """List rules that are probably not meant, or that weaken the policies, at the time ``now`` (unix seconds)."""
    found: list[str] = []
    for policy in policies.policies:
        date = policy.tcb.min_tcb_date
        if date is not None and date > now:
            found.append(f"tcb.min_tcb_date: {rfc3339(date)} is in the future, so every platform is refused")
        if policy.measurements == "unchecked" and not (policy.identity.mr_enclave or policy.identity.mr_signer):
            found.append('measurements: "unchecked", so whatever runs in the TD or enclave is accepted')
        if policy.attributes.unsafe_allow_debug:
            found.append("attributes.unsafe_allow_debug: hosts can read the memory of VMs, and their keys")
        if not policy.tcb.min_evaluation_number:
            found.append("tcb.min_evaluation_number: 0, so who supplies the collateral chooses the TCB recovery")
        if policy.tcb.platform_grace is None and policy.tcb.accepted_statuses & OUT_OF_DATE:
            found.append("tcb.platform_grace: platforms may be out of date for ever; say for how long")
    return tuple(dict.fromkeys(found))
