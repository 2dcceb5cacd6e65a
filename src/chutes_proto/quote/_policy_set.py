"""A policy file with exceptions: a default policy, and what differs from it for a profile or for a hotkey.

    policies = parse_policy_set(data).bind(profiles)
    accepted = policies.appraise(verdict, now=now, stage="boot", claimed=hotkey)

The language is that of `parse_policy_toml`, and two tables of tables beside it, ``per_profile`` and ``per_hotkey``.

Rules kept here:

* an exception says only what differs, key by key; the hotkey's comes before the profile's, one of a profile's name and
  version before one of its name. Where a default or an exception is ``any_of`` or ``all_of``, the exception says all;
* a hotkey's exception takes the place of the rest only for a caller that proves the hotkey. For one that only claims
  it both must accept, by the same profile, so a claim never loosens anything and never escapes anything;
* every combination is made, and so checked, when the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Final, TypeAlias, cast

from attrs import Factory, evolve, field, frozen

from chutes_proto._converter import nearest, quoted
from chutes_proto.quote._errors import AppraisalError, PolicyError
from chutes_proto.quote._files import CONVERTER, read_toml, within
from chutes_proto.quote._measurements import Profile, Stage
from chutes_proto.quote._policy import (
    COMBINED,
    MAX_AGE,
    MAX_DEPTH,
    AcceptedVerdict,
    AllOf,
    AnyOf,
    AnyPolicy,
    Policy,
    read_policy,
)
from chutes_proto.quote._verify import Verdict

if TYPE_CHECKING:
    from chutes_proto.quote._eventlog import EventLog

Appraise: TypeAlias = Callable[[AnyPolicy], AcceptedVerdict]
"""Appraises the verdict of a request by a policy."""
Table: TypeAlias = Mapping[str, object]
Tables: TypeAlias = Mapping[str, Table]
Case: TypeAlias = tuple[tuple[str, ...], "str | None"]
"""The exceptions that apply: the names of those of a profile, and a hotkey."""

MOST: Final = 10_000
"""The most combinations of exceptions."""
_OF_DEFAULT: Final = frozenset({"profile", "profile_defaults", "measurements"})


@frozen
class _Exceptions:
    per_profile: Mapping[str, Table] = field(factory=dict[str, Table])
    per_hotkey: Mapping[str, Table] = field(factory=dict[str, Table])


@frozen(kw_only=True)
class PolicySet:
    """The policies of one file. ``exceptions`` has the policy of each combination that differs from ``default``."""

    default: AnyPolicy = Policy()
    exceptions: Mapping[Case, AnyPolicy] = field(factory=dict[Case, AnyPolicy])

    @property
    def profile_names(self) -> tuple[str, ...]:
        """The names of profiles, or names and versions, that have an exception, in the order of the file."""
        return tuple(dict.fromkeys(name for names, _ in self.exceptions for name in names))

    @property
    def hotkeys(self) -> tuple[str, ...]:
        """The hotkeys that have an exception, in the order of the file."""
        return tuple(dict.fromkeys(hotkey for _, hotkey in self.exceptions if hotkey is not None))

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Every policy in it, members of ``any_of`` and ``all_of`` too."""
        return tuple(leaf for policy in (self.default, *self.exceptions.values()) for leaf in leaves(policy))

    @property
    def collateral_grace(self) -> int:
        """The longest time, in seconds, for which one of them accepts expired collateral."""
        return max(policy.tcb.collateral_grace for policy in self.policies)

    def of(self, profile: Profile, hotkey: str | None = None) -> AnyPolicy:
        """The policy for a VM of ``profile``, without profiles; for a ``hotkey`` that is not here as for none."""
        names = tuple(name for name in (profile.name, str(profile)) if name in self.profile_names)
        return self.exceptions.get((names, hotkey if hotkey in self.hotkeys else None), self.default)

    def bind(self, profiles: Iterable[Profile]) -> BoundPolicies:
        """Join them with the reference values of a caller. Raises `PolicyError` if the file has some of its own."""
        for policy in leaves(self.default):
            if policy.profiles or policy.measurements == "unchecked":
                key = "profile" if policy.profiles else "measurements"
                raise PolicyError(f"{key}: the reference values come from elsewhere; remove it from this policy")
        return self._bound(tuple(profiles))

    def with_own_profiles(self) -> AnyPolicy | BoundPolicies:
        """Join them with the profiles in the file itself. Raises `PolicyError` if that cannot be done."""
        if not self.exceptions:
            return self.default
        if not isinstance(self.default, Policy) or not self.default.profiles:
            raise PolicyError("per_profile, per_hotkey: go with [[profile]] at the file's top, or a server's profiles")
        return self._bound(self.default.profiles)

    def _bound(self, profiles: tuple[Profile, ...]) -> BoundPolicies:
        groups: dict[str | None, tuple[AnyPolicy, ...]] = {}
        for hotkey in (None, *self.hotkeys):
            together: dict[int, tuple[AnyPolicy, list[Profile]]] = {}
            for profile in profiles:
                policy = self.of(profile, hotkey)
                together.setdefault(id(policy), (policy, []))[1].append(profile)
            bound = tuple(_with_profiles(policy, tuple(members)) for policy, members in together.values())
            groups[hotkey] = bound or (_with_profiles(self.default, ()),)
        return BoundPolicies(profiles, groups)


@frozen
class BoundPolicies:
    """A `PolicySet` with reference values, ready to appraise."""

    profiles: tuple[Profile, ...]
    _groups: Mapping[str | None, tuple[AnyPolicy, ...]]
    """By hotkey, the policies of all profiles; profiles that have the same policy are together in it."""
    hotkeys: frozenset[str | None] = field(
        init=False, eq=False, default=Factory(lambda self: frozenset(self._groups) - {None}, takes_self=True)
    )
    """The hotkeys that have an exception."""

    @property
    def policies(self) -> tuple[AnyPolicy, ...]:
        """The policies of all groups of profiles, for any hotkey."""
        return tuple(policy for group in self._groups.values() for policy in group)

    def appraise(
        self,
        verdict: Verdict,
        *,
        now: int,
        stage: Stage,
        event_log: EventLog | None = None,
        max_age: int = MAX_AGE,
        max_collateral_age: int | None = None,
        claimed: str | None = None,
        proven: str | None = None,
    ) -> AcceptedVerdict:
        """Accept a verdict in a stage. Raises `AppraisalError`, with the refusals against the nearest profile.

        ``proven`` is a hotkey that the caller has proven to hold, ``claimed`` one that it only names. The other
        arguments are those of `Policy.appraise`.
        """

        def appraise(policy: AnyPolicy) -> AcceptedVerdict:
            return policy.appraise(
                verdict,
                now=now,
                stage=stage,
                event_log=event_log,
                max_age=max_age,
                max_collateral_age=max_collateral_age,
            )

        if proven in self.hotkeys:
            return self._by(proven, appraise)
        accepted = self._by(None, appraise)
        if claimed not in self.hotkeys:
            return accepted
        own = self._by(claimed, appraise)
        return own if own.matched == accepted.matched else self._by_both(claimed, appraise)

    def _by_both(self, claimed: str | None, appraise: Appraise) -> AcceptedVerdict:
        """Accept by the first profile by which both the default and the exception accept."""
        refused: list[AppraisalError] = []
        for profile in self.profiles:
            try:
                _ = self._by(None, appraise, profile)
                return self._by(claimed, appraise, profile)
            except AppraisalError as exc:
                refused.append(exc)
        raise min(refused, key=_distance)

    def _by(self, hotkey: str | None, appraise: Appraise, only: Profile | None = None) -> AcceptedVerdict:
        refused: list[AppraisalError] = []
        policies = self._groups[hotkey]
        if only is not None:
            policies = tuple(_with_profiles(each, (only,)) for each in policies if only in leaves(each)[0].profiles)
        for policy in policies:
            try:
                return appraise(policy)
            except AppraisalError as exc:
                refused.append(exc)
        raise min(refused, key=_distance)


def _distance(error: AppraisalError) -> tuple[int, int]:
    """How far the nearest profile is: registers that differ, then other refusals."""
    return sum(one.register is not None for one in error.refusals), len(error.refusals)


def leaves(policy: AnyPolicy) -> tuple[Policy, ...]:
    """The policies in a policy: itself, or those of ``any_of`` and ``all_of``."""
    if isinstance(policy, Policy):
        return (policy,)
    return tuple(leaf for member in policy.policies for leaf in leaves(member))


def _with_profiles(policy: AnyPolicy, profiles: tuple[Profile, ...]) -> AnyPolicy:
    if isinstance(policy, Policy):
        return evolve(policy, profiles=profiles)
    kind: type[AllOf | AnyOf] = type(policy)
    return kind(tuple(_with_profiles(member, profiles) for member in policy.policies))


# --- reading ---


def parse_policy_set(data: bytes | str, *, extra_keys: frozenset[str] = frozenset()) -> PolicySet:
    """Read a policy file. ``extra_keys`` are those of `parse_policy_toml`. Raises `PolicyError`, with the key."""
    table = dict(read_toml(data))
    given = {name: table.pop(name) for name in ("per_profile", "per_hotkey") if name in table}
    default = within("", read_policy, table, extra_keys, MAX_DEPTH)
    found = within("", CONVERTER.structure, given, _Exceptions)
    per_profile, per_hotkey = found.per_profile, found.per_hotkey
    own = {name for leaf in leaves(default) for each in leaf.profiles for name in (each.name, str(each))}
    for name in per_profile if own else ():
        if name not in own:
            near = nearest(name, own)
            problem = "no profile of this file has this name" + (f"; did you mean {near}?" if near else "")
            raise PolicyError(f"per_profile.{quoted(name)}: {problem}")
    pairs = [(one, other) for one in per_profile for other in per_profile if other.startswith(f"{one} ")]
    cases: list[Case] = [*product([(), *((name,) for name in per_profile), *pairs], [None, *per_hotkey])]
    if len(cases) > MOST:
        raise PolicyError(f"per_profile, per_hotkey: {len(cases)} combinations, more than {MOST}")
    exceptions: dict[Case, AnyPolicy] = {}
    for names, hotkey in cases:
        layers = [(f"per_profile.{quoted(name)}", per_profile[name]) for name in names]
        layers += [] if hotkey is None else [(f"per_hotkey.{hotkey!r}", per_hotkey[hotkey])]
        if layers:
            exceptions[names, hotkey] = _exception(table, layers)
    return PolicySet(default=default, exceptions=exceptions)


def _exception(default: Table, layers: list[tuple[str, Table]]) -> AnyPolicy:
    """The policy of a combination: ``default``, and over it each of ``layers``."""
    table: Table = {key: value for key, value in default.items() if key not in _OF_DEFAULT}
    for where, layer in layers:
        if not layer:
            raise PolicyError(f"{where}: says nothing; say what differs from the default, or remove it")
        if mine := sorted(layer.keys() & _OF_DEFAULT):
            raise PolicyError(f"{where}: {mine[0]}: an exception cannot say this")
        table = _merged(table, layer)
    where = " with ".join(where for where, _ in layers)
    policy = within(where, read_policy, table, frozenset[str](), MAX_DEPTH)
    if any(leaf.profiles or leaf.measurements == "unchecked" for leaf in leaves(policy)):
        raise PolicyError(f"{where}: an exception has no profiles of its own, and leaves no measurements unchecked")
    return policy


def _merged(below: Table, above: Table) -> Table:
    if COMBINED & (below.keys() | above.keys()):
        return above
    merged = dict(below)
    for key, value in above.items():
        beneath = below.get(key)
        both = isinstance(value, dict) and isinstance(beneath, dict)
        merged[key] = {**cast("Table", beneath), **cast("Table", value)} if both else value
    return merged
