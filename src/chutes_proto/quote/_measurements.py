"""Measurement profiles: reference values of accepted images (RFC 9334, section 4.1).

Rules kept here:

* a profile says all of MRTD and the four RTMRs, for the boot and for the runtime stage: no register goes unchecked
  unseen. One whose value is not known beforehand has a rule in its place, which is spelled out and told in the verdict;
* an unknown key, a register of the wrong length, an identity (name and version) or measurements that are there twice
  are errors that name the profile and key;
* keys that only the caller knows pass through if it names them (``extra_keys``), and are errors otherwise.

Two forms are read, described in ``docs/reference/policies.md``: TOML, and the JSON list that key servers publish.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NewType, NoReturn, Protocol, TypeAlias, cast, get_args

from attrs import astuple, evolve, field, fields_dict, frozen

from chutes_proto._converter import (
    Hook,
    MismatchError,
    ProblemsError,
    StrictConverter,
    file_array,
    integer,
    list_of,
    nearest,
    quoted,
    string,
)
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._arguments import BytesLike, as_utf8
from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._errors import PolicyError, Refusal, mismatch
from chutes_proto.quote._files import CONVERTER, MAX_SIZE, UnixTime, file_converter, read_toml, within
from chutes_proto.quote._layout import TdReport10
from chutes_proto.quote._terms import rfc3339

Stage: TypeAlias = Literal["boot", "runtime"]
"""When a quote was made: before the VM has its keys, or later."""

Rtmrs: TypeAlias = "tuple[bytes, bytes, bytes, bytes]"
Extras: TypeAlias = "dict[str, object]"
ProfileAndExtras: TypeAlias = "tuple[Profile, Extras]"
Tables: TypeAlias = tuple[Mapping[str, object], ...]

_LONGEST_NAME: Final = 128
_LIST: Final = 'the list that key servers publish: [{"version": …, "name": …, "mrtd": …, …}, …]'
REGISTERS = ("MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3")


@frozen(kw_only=True)
class RegisterRule:
    """The rule of a register that no reference value pins. Raises `PolicyError` for impossible values.

    "any" accepts every value. "replayed" accepts a value that the TD's event log leads to (`replay`), if the log of the
    register begins with the digests of ``prefix`` (48 bytes each), if all events after that have names of ``events``
    (None: any event, with ``values`` any that has a name), and if each of ``values``, names with accepted values, is
    the value of just one event. Names and values count only where a digest covers them (`Event.name`, `Event.value`).
    ``stage`` None, of MRTD, is both; no log leads to MRTD.
    """

    register: str
    stage: Stage | None
    check: Literal["any", "replayed"]
    prefix: tuple[bytes, ...] = ()
    events: tuple[str, ...] | None = None
    values: tuple[tuple[str, tuple[bytes, ...]], ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.register not in REGISTERS or (self.stage is None) != (self.register == "MRTD"):
            raise PolicyError("register: must be MRTD without a stage, or RTMR0 to RTMR3 with one")
        if self.check not in ("any", "replayed") or (self.check == "replayed" and self.register == "MRTD"):
            raise PolicyError('check: must be "any" or, for an RTMR, "replayed"')
        if self.check == "any" and (self.prefix or self.values or self.events is not None):
            raise PolicyError('check: "any" goes without prefix, events and values')
        if type(self.prefix) is not tuple or any(type(one) is not bytes or len(one) != 48 for one in self.prefix):
            raise PolicyError("prefix: must be digests of 48 bytes")
        if self.events is not None and (type(self.events) is not tuple or not all(map(_is_event_name, self.events))):
            raise PolicyError("events: must be names, which have no colon")
        if type(self.values) is not tuple or not all(_is_event_name(name) for name, _ in self.values):
            raise PolicyError("values: must be accepted values by names, which have no colon")
        for _, accepted in self.values:
            if type(accepted) is not tuple or not all(type(value) is bytes for value in accepted):
                raise PolicyError("values: must be lists of bytes")
            if not accepted:
                raise PolicyError("values: an event with an empty list would accept nothing")

    def refusals(self, events: Sequence[VouchedEvent]) -> list[Refusal]:
        """List the refusals of a "replayed" register whose log has these events."""
        found: list[Refusal] = []

        def refuse(code: str, problem: str, got: str, expected: str) -> None:
            found.append(mismatch("measurement", code, f"{self.register}: {problem}", got, expected, self.register))

        for number, digest in enumerate(self.prefix):
            got = events[number].digest.hex() if number < len(events) else "no more events"
            if got != digest.hex():
                refuse("event_prefix", f"event {number} is not that of the prefix", got, digest.hex())
                return found
        later = events[len(self.prefix) :]
        for event in later:
            if event.name is None and (self.values or self.events is not None):  # it could be a second one of any name
                refuse("event_name", "an event has no name that its digest covers", "none", "a name")
            elif self.events is not None and event.name not in self.events:
                refuse("event_name", "an event is not on the list", str(event.name), " or ".join(self.events) or "none")
        for name, accepted in self.values:
            values = [event.value for event in later if event.name == name]
            if len(values) != 1 or values[0] not in accepted:
                got = ", ".join(value.hex() if value is not None else "unmeasured" for value in values) or "none"
                refuse("event_value", f"the event {name!r}", got, " or ".join(value.hex() for value in accepted))
        return found


def _is_event_name(name: object) -> bool:
    """Whether an event can have this name: a digest does not say at which of several colons a name ends."""
    return type(name) is str and ":" not in name


class VouchedEvent(Protocol):
    """An event as a `RegisterRule` reads it: name and value are None where the digest does not cover them."""

    @property
    def digest(self) -> bytes: ...
    @property
    def name(self) -> str | None: ...
    @property
    def value(self) -> bytes | None: ...


ProfileState: TypeAlias = Literal["scheduled", "enforced", "warned", "retiring", "ended"]
"""The state of a profile at a time: not yet; its VMs are accepted; accepted and listed, on trial or until they are
replaced; no longer."""


@frozen(kw_only=True)
class Schedule:
    """When a profile counts. Raises `PolicyError` for times that contradict each other.

    Times are unix seconds, None for no limit: from ``not_before`` on, and before ``not_after``. After that its VMs
    are still accepted for ``retirement_grace`` seconds, and listed. With ``mode`` "warn" they are listed all the time:
    the mode never accepts a VM that has other measurements.
    """

    not_before: UnixTime | None = None
    not_after: UnixTime | None = None
    retirement_grace: int = 0
    mode: Literal["enforce", "warn"] = "enforce"

    def __attrs_post_init__(self) -> None:
        for name in ("not_before", "not_after"):
            at = getattr(self, name)
            if at is not None and (type(at) is not int or at < 0):
                raise PolicyError(f"{name}: must be a date, in code whole unix seconds")
        if self.not_before is not None and self.not_after is not None and self.not_after <= self.not_before:
            raise PolicyError("not_after: must be later than not_before")
        if type(self.retirement_grace) is not int or self.retirement_grace < 0:
            raise PolicyError("retirement_grace: must be a whole number of seconds that is not negative")
        if self.retirement_grace and self.not_after is None:
            raise PolicyError("retirement_grace: goes with not_after")
        if self.mode not in ("enforce", "warn"):
            raise PolicyError('mode: must be "enforce" or "warn"')

    @property
    def end(self) -> int | None:
        """The time from which on no VM is accepted; None if there is none."""
        return None if self.not_after is None else self.not_after + self.retirement_grace

    @property
    def changes(self) -> frozenset[int]:
        """The times at which `state` changes."""
        return frozenset(at for at in (self.not_before, self.not_after, self.end) if at is not None)

    def state(self, now: int) -> ProfileState:
        """The state at the time ``now``."""
        if self.not_before is not None and now < self.not_before:
            return "scheduled"
        if self.not_after is not None and now >= self.not_after:
            return "retiring" if now < self.not_after + self.retirement_grace else "ended"
        return "warned" if self.mode == "warn" else "enforced"

    def accepts(self, now: int) -> bool:
        """Whether VMs are accepted at the time ``now``."""
        return self.state(now) not in ("scheduled", "ended")


SCHEDULE_KEYS: Final = frozenset(fields_dict(Schedule))
_DEFAULTABLE = frozenset({"version", "expected_gpus", "gpu_count", "attributes"}) | SCHEDULE_KEYS


def read_schedule(table: Mapping[str, object]) -> Schedule:
    """Read the keys of a schedule. Raises `PolicyError`."""
    return within("", CONVERTER.structure, table, Schedule)


@frozen(kw_only=True)
class Profile:
    """Reference values of one image on one kind of hardware. Raises `PolicyError` for impossible values.

    Name and version together identify a profile: one kind of hardware has the same name in each version of the image.
    Registers have 48 bytes. ``boot`` and ``runtime`` are RTMR0 to RTMR3 when the TD asks for its keys, and later.
    ``rules`` are those of registers without a value, which is then zero. ``gpu_count`` None means any number.
    ``attributes`` replace the policy's for this profile. ``fingerprints`` (32 bytes each), of hosts that give these
    measurements, pass through. ``schedule`` says when it counts.
    """

    name: str
    version: str
    mrtd: bytes
    boot: Rtmrs
    runtime: Rtmrs
    expected_gpus: tuple[str, ...] = ()
    gpu_count: int | None = None
    attributes: AttributePolicy | None = None
    fingerprints: tuple[bytes, ...] = ()
    rules: tuple[RegisterRule, ...] = ()
    schedule: Schedule = Schedule()

    def __attrs_post_init__(self) -> None:
        for name in ("name", "version"):
            text = getattr(self, name)
            if type(text) is not str or not 1 <= len(text) <= _LONGEST_NAME or not text.isprintable():
                raise PolicyError(f"{name}: must be 1 to {_LONGEST_NAME} printable characters")
        for name, registers, count in (("mrtd", (self.mrtd,), 1), ("boot", self.boot, 4), ("runtime", self.runtime, 4)):
            if len(registers) != count or any(len(register) != 48 for register in registers):
                raise PolicyError(f"{name}: must be {'48 bytes' if count == 1 else 'four registers of 48 bytes'}")
        if self.gpu_count is not None and not 1 <= self.gpu_count <= 1024:
            raise PolicyError("gpu_count: must be from 1 to 1024, or 0 for any number")
        if any(len(fingerprint) != 32 for fingerprint in self.fingerprints):
            raise PolicyError("fingerprints: must be 32 bytes each")
        if len({(rule.register, rule.stage) for rule in self.rules}) != len(self.rules):
            raise PolicyError("rules: a register has two")
        for rule in self.rules:
            if any(self.registers(rule.stage or "boot")[REGISTERS.index(rule.register)]):
                raise PolicyError(f"rules: {rule.register} has a value and a rule")

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def identity(self) -> tuple[str, str]:
        """Name and version."""
        return self.name, self.version

    @property
    def measured(self) -> tuple[object, ...]:
        """All reference values, and the rules of registers that have none."""
        return (self.mrtd, *self.boot, *self.runtime, *self.rules)

    def registers(self, stage: Stage) -> tuple[bytes, ...]:
        """The values of `REGISTERS` in a stage."""
        return (self.mrtd, *(self.boot if stage == "boot" else self.runtime))

    def rules_of(self, stage: Stage) -> dict[str, RegisterRule]:
        """The rules of a stage, by register."""
        return {rule.register: rule for rule in self.rules if rule.stage in (stage, None)}

    def untimely(self, now: int) -> list[Refusal]:
        """List the refusal of a profile that does not count at the time ``now`` (unix seconds)."""
        match self.schedule.state(now):
            case "scheduled":
                code, when = "profile_not_yet", f"from {rfc3339(self.schedule.not_before or 0)} on"
            case "ended":
                code, when = "profile_ended", f"before {rfc3339(self.schedule.end or 0)}"
            case _:
                return []
        return [mismatch("measurement", code, f"profile {self} does not count now", rfc3339(now), when)]

    def to_toml(self) -> str:
        """Name, version and registers, as `parse_profiles_toml` reads them; rules are left out."""
        lines = ["[[profile]]"]
        lines += [f"{key} = {json.dumps(getattr(self, key), ensure_ascii=False)}" for key in ("name", "version")]
        lines += [f'mrtd = "{self.mrtd.hex()}"']
        for stage, rtmrs in (("boot", self.boot), ("runtime", self.runtime)):
            lines += [f'{stage}.rtmr{number} = "{rtmr.hex()}"' for number, rtmr in enumerate(rtmrs)]
        return "\n".join(lines) + "\n"

    def refusals(
        self, body: TdReport10, stage: Stage, events: Mapping[str, Sequence[VouchedEvent]] | str = ""
    ) -> list[Refusal]:
        """List the refusals: those of each register of the report that does not match the profile.

        ``events`` are those of the TD's log, by register, or why there are none.
        """
        found: list[Refusal] = []
        rules = self.rules_of(stage)
        for register, got, expected in zip(REGISTERS, (body.mr_td, *body.rtmrs), self.registers(stage), strict=True):
            rule = rules.get(register)
            if rule is not None:
                if rule.check == "replayed":
                    if isinstance(events, str):
                        found.append(Refusal("measurement", "event_log", f"{register}: {events}", register))
                    else:
                        found += rule.refusals(events[register])
            elif got != expected:
                where = f"profile {self.name!r} {self.version}, {stage} stage"
                values = (f"{register} does not match {where}", got.hex(), expected.hex(), register)
                found.append(mismatch("measurement", "measurement_mismatch", *values))
        return found


@frozen(kw_only=True)
class ProfileTables:
    """The tables of profiles in a TOML file."""

    profile: Tables = ()
    profile_defaults: Mapping[str, object] = field(factory=dict[str, object])


def parse_profiles_toml(
    data: BytesLike | str, *, extra_keys: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """Read the profiles of a TOML file, each with its keys that are in ``extra_keys``.

    ``defaults`` stand in for keys that neither a profile nor the file's ``profile_defaults`` has. Raises `PolicyError`.
    """
    tables = within("", CONVERTER.structure, read_toml(data), ProfileTables)
    if not tables.profile:
        raise PolicyError("the file has no profile; add a [[profile]]")
    return read_profiles(tables, extra_keys, defaults)


def parse_profiles_json(
    data: BytesLike | str, *, extra_keys: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """Read the profiles of a JSON list, each with its keys that are in ``extra_keys``.

    ``defaults`` stand in for keys that a profile lacks. Raises `PolicyError`.
    """
    data = as_utf8(data, "the bytes or text of a JSON file")
    try:
        content = strict_json.decode(data, limit=MAX_SIZE)
    except strict_json.JsonError as exc:
        raise PolicyError(str(exc)) from None
    if not isinstance(content, list):
        raise PolicyError(f"the file is not a list; expected {_LIST}")
    entries = within("the file", CONVERTER.structure, cast("object", content), Tables)
    if not entries:
        raise PolicyError(f"the file has no profile; expected {_LIST}")
    return read_published(entries, extra_keys, defaults or {})


def read_published(
    entries: Tables, extra_keys: frozenset[str], defaults: Mapping[str, object]
) -> tuple[ProfileAndExtras, ...]:
    """Read the entries of a published list. Raises `PolicyError`."""
    return _profiles(entries, _IN_JSON, extra_keys, defaults)


def read_profiles(
    tables: ProfileTables, extra_keys: frozenset[str], defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """Read profiles from tables, each with its keys that are in ``extra_keys``. Raises `PolicyError`."""
    own = tables.profile_defaults
    _ = own_defaults(own, extra_keys)
    return _profiles(tables.profile, _IN_TOML, extra_keys, {**(defaults or {}), **own})


def own_defaults(defaults: Mapping[str, object], extra_keys: frozenset[str]) -> dict[str, object]:
    """The defaults that are not in ``extra_keys``. Raises `PolicyError` for a key that can have none."""
    known = _DEFAULTABLE | extra_keys
    for name in sorted(defaults.keys() - known):
        near = nearest(name, known)
        hint = f"; did you mean {near}?" if near else ""
        raise PolicyError(f"profile_defaults.{name}: unknown key, or one that has no default{hint}")
    return {key: value for key, value in defaults.items() if key not in extra_keys}


def _profiles(
    entries: Tables, converter: StrictConverter, extra_keys: frozenset[str], defaults: Mapping[str, object]
) -> tuple[ProfileAndExtras, ...]:
    profiles: list[ProfileAndExtras] = []
    for number, entry in enumerate(entries, 1):
        name = entry.get("name")
        where = f"profile {quoted(name)}" if isinstance(name, str) else f"profile {number}"
        own = {**defaults, **entry}
        extras = {key: own.pop(key) for key in own.keys() & extra_keys}
        rules = within(where, _take_rules, own) if converter is _IN_TOML else ()
        fingerprint = own.pop("fingerprint", None)  # one, in the older forms
        schedule = within(where, read_schedule, {key: own.pop(key) for key in own.keys() & SCHEDULE_KEYS})
        profile = within(where, converter.structure, own, Profile)
        if schedule != Schedule():
            profile = evolve(profile, schedule=schedule)
        if rules:
            profile = within(where, evolve, profile, rules=rules)
        if fingerprint is not None:
            one = within(f"{where}: fingerprint", _fingerprint, fingerprint)
            profile = evolve(profile, fingerprints=tuple(dict.fromkeys((one, *profile.fingerprints))))
        profiles.append((profile, extras))
    check_distinct(profile for profile, _ in profiles)
    return tuple(profiles)


def check_distinct(profiles: Iterable[Profile]) -> None:
    """Raise `PolicyError` for two profiles of one identity, or of which the second could never count."""
    identities: set[tuple[str, str]] = set()
    measured: dict[object, Profile] = {}
    for profile in profiles:
        if profile.identity in identities:
            raise PolicyError(f"profile {profile.name!r}: name and version {profile.version!r} are given twice")
        identities.add(profile.identity)
        if (other := measured.setdefault((profile.measured, profile.attributes), profile)) is not profile:
            raise PolicyError(f"profile {profile.name!r}: version {profile.version!r} has the measurements of {other}")


def _fingerprint(value: object) -> bytes:
    octets = CONVERTER.structure(value, bytes)
    if len(octets) != 32:
        raise MismatchError("value_error", "must be 64 hexadecimal digits")
    return octets


# --- strict structuring ---

_Register = NewType("_Register", bytes)


@frozen
class _Rtmrs:
    rtmr0: _Register
    rtmr1: _Register
    rtmr2: _Register
    rtmr3: _Register


def _register(value: object, _: object) -> bytes:
    register = CONVERTER.structure(value, bytes)
    if len(register) != 48:
        raise MismatchError("value_error", "must be 96 hexadecimal digits")
    return register


@frozen(kw_only=True)
class _ReplayedForm:
    """The table of a "replayed" register."""

    prefix: tuple[_Register, ...] = ()
    events: tuple[str, ...] | None = None
    values: Mapping[str, tuple[bytes, ...]] = field(factory=dict[str, "tuple[bytes, ...]"])


@frozen
class _ReplayedRegister:
    replayed: _ReplayedForm


def _take_rules(own: dict[str, object]) -> tuple[RegisterRule, ...]:
    """Put zeros in the place of registers without a value, and return their rules. Raises `PolicyError`."""
    rules: list[RegisterRule] = []
    own["mrtd"], rule = _rule(own.get("mrtd"), "MRTD", None)
    rules += rule
    if own["mrtd"] is None:
        del own["mrtd"]
    for stage in get_args(Stage):
        table = own.get(stage)
        if isinstance(table, dict):
            members = dict(cast("dict[str, object]", table))
            for name, value in members.items():
                members[name], rule = within(f"{stage}.{name}", _rule, value, name.upper(), stage)
                rules += rule
            own[stage] = members
    return tuple(rules)


def _rule(value: object, register: str, stage: Stage | None) -> tuple[object, list[RegisterRule]]:
    if value == "any":
        return _ZERO, [RegisterRule(register=register, stage=stage, check="any")]
    if not isinstance(value, dict):
        return value, []
    form = _REPLAYED.structure(cast("object", value), _ReplayedRegister).replayed
    values = tuple((name, tuple(accepted)) for name, accepted in sorted(form.values.items()))
    kind = RegisterRule(
        register=register, stage=stage, check="replayed", prefix=form.prefix, events=form.events, values=values
    )
    return _ZERO, [kind]


def _no_rules(_: object, __: object) -> NoReturn:
    raise MismatchError("extra_forbidden", 'Unknown key; write "any" or { replayed = {} } in the register\'s place')


def _no_schedule(_: object, __: object) -> NoReturn:
    raise MismatchError("extra_forbidden", f"Unknown key; {', '.join(sorted(SCHEDULE_KEYS))} are keys of the profile")


_ZERO: Final = "00" * 48


def _rtmrs(value: object, _: object) -> tuple[bytes, ...]:
    """Key servers publish the names of registers in upper case."""
    return astuple(_IN_TOML.structure(_lowered(value), _Rtmrs))


def _lowered(value: object) -> object:
    """A table with its keys in lower case; anything else, and one with a key in both, as it is."""
    if not isinstance(value, dict):
        return value
    table = {key.lower(): item for key, item in cast("dict[str, object]", value).items()}
    return table if len(table) == len(cast("dict[str, object]", value)) else cast("object", value)


def _attributes(value: object, _: object) -> AttributePolicy:
    """Null is refused: it would take a default away unseen."""
    attributes = CONVERTER.structure(value, AttributePolicy)
    if "unsafe_allow_debug" in cast("dict[str, object]", value):
        raise ProblemsError(MismatchError("extra_forbidden", "a profile cannot say this").at("unsafe_allow_debug"))
    return attributes


_HOOKS: Final[Mapping[Any, Hook]] = {
    _Register: _register,
    tuple[bytes, bytes, bytes, bytes]: _rtmrs,
    AttributePolicy | None: _attributes,
    int | None: lambda value, _: None if value is None else integer(value) or None,
    tuple[str, ...]: list_of(lambda value: string(value).lower(), file_array),
    tuple[bytes, ...]: list_of(_fingerprint, file_array),
    tuple[RegisterRule, ...]: _no_rules,
    Schedule: _no_schedule,
}
_IN_TOML: Final = file_converter(_HOOKS)
_REPLAYED: Final = file_converter({_Register: _register})
_IN_JSON: Final = file_converter(_HOOKS, names={"boot": "boot_rtmrs", "runtime": "runtime_rtmrs"})
