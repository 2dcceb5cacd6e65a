"""Measurement profiles: the images that are accepted, by what they measure to.

Rules kept here:

* a profile says all of MRTD and the four RTMRs, for the boot and for the runtime stage: no register goes unchecked;
* an unknown key, a register of the wrong length, a name that is there twice are errors that name the profile and key;
* keys that only the caller knows pass through if it names them (``extra_keys``), and are errors otherwise.

Two forms are read, described in ``README.md`` beside this file: TOML, and the JSON list that key servers publish.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from attrs import frozen

from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._attributes import AttributePolicy, read_attributes
from chutes_proto.quote._layout import TdReport10
from chutes_proto.quote._tables import Table
from chutes_proto.quote.errors import PolicyError, Refusal

Stage: TypeAlias = Literal["boot", "runtime"]
Rtmrs: TypeAlias = "tuple[bytes, bytes, bytes, bytes]"
Extras: TypeAlias = "dict[str, object]"
ProfileAndExtras: TypeAlias = "tuple[Profile, Extras]"

REGISTERS = ("MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3")
MAX_SIZE = 4 * 1024 * 1024

_DEFAULTABLE = frozenset({"version", "expected_gpus", "gpu_count", "attributes"})
_NULLABLE = frozenset({"gpu_count", "fingerprint"})
"""Where null is none at all. Elsewhere it would take a default away unseen, and is refused."""


@frozen(kw_only=True)
class Profile:
    """An accepted image on accepted hardware. Raises `PolicyError` for what cannot be one.

    Registers have 48 bytes. ``boot`` and ``runtime`` are RTMR0 to RTMR3 when the TD asks for its keys, and later.
    ``gpu_count`` None means any number. ``attributes`` replace the policy's for this profile. ``fingerprint`` (32
    bytes) passes through.
    """

    name: str
    version: str
    mrtd: bytes
    boot: Rtmrs
    runtime: Rtmrs
    expected_gpus: tuple[str, ...] = ()
    gpu_count: int | None = None
    attributes: AttributePolicy | None = None
    fingerprint: bytes | None = None

    def __attrs_post_init__(self) -> None:
        for name in ("name", "version"):
            text = getattr(self, name)
            if type(text) is not str or not 1 <= len(text) <= 128 or not text.isprintable():
                raise PolicyError(f"{name}: must be 1 to 128 printable characters")
        registers = (self.mrtd, *self.boot, *self.runtime)
        if len(self.boot) != 4 or len(self.runtime) != 4 or any(len(register) != 48 for register in registers):
            raise PolicyError("a profile has MRTD and twice four RTMRs of 48 bytes")
        if self.gpu_count is not None and not 1 <= self.gpu_count <= 1024:
            raise PolicyError("gpu_count: must be from 1 to 1024, or 0 for any number")
        if self.fingerprint is not None and len(self.fingerprint) != 32:
            raise PolicyError("fingerprint: must be 32 bytes")

    def registers(self, stage: Stage) -> tuple[bytes, ...]:
        """The values of `REGISTERS` in a stage."""
        return (self.mrtd, *(self.boot if stage == "boot" else self.runtime))

    def to_toml(self) -> str:
        """Name, version and registers, as `parse_profiles_toml` reads them."""
        lines = ["[[profile]]"]
        lines += [f"{key} = {json.dumps(getattr(self, key), ensure_ascii=False)}" for key in ("name", "version")]
        lines += [f'mrtd = "{self.mrtd.hex()}"']
        for stage, rtmrs in (("boot", self.boot), ("runtime", self.runtime)):
            lines += [f'{stage}.rtmr{number} = "{rtmr.hex()}"' for number, rtmr in enumerate(rtmrs)]
        return "\n".join(lines) + "\n"

    def refusals(self, body: TdReport10, stage: Stage) -> list[Refusal]:
        """One for each register of the report that is not the profile's."""
        found: list[Refusal] = []
        for register, got, expected in zip(REGISTERS, (body.mr_td, *body.rtmrs), self.registers(stage), strict=True):
            if got != expected:
                where = f"profile {self.name!r} {self.version}, {stage} stage"
                detail = f"{register} is another than that of {where} (got {got.hex()}, expected {expected.hex()})"
                found.append(
                    Refusal("measurement", "measurement_mismatch", detail, register, got.hex(), expected.hex())
                )
        return found


def parse_profiles_toml(
    data: bytes | str, *, extra_keys: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """The profiles of a TOML file, each with its keys that are in ``extra_keys``.

    ``defaults`` stand in for keys that neither a profile nor the file's ``profile_defaults`` has. Raises `PolicyError`.
    """
    table = read_toml(data)
    profiles = read_profiles(table, extra_keys=extra_keys, defaults=defaults)
    table.finish()
    return _not_empty(profiles)


def parse_profiles_json(
    data: bytes, *, extra_keys: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """The profiles of a JSON list, each with its keys that are in ``extra_keys``.

    ``defaults`` stand in for keys that a profile lacks. Raises `PolicyError`.
    """
    try:
        entries = strict_json.decode(data, limit=MAX_SIZE)
    except strict_json.JsonError as exc:
        raise PolicyError(str(exc)) from None
    if not isinstance(entries, list):
        raise PolicyError("the file: must be a list of profiles")
    values = cast("list[object]", entries)
    return _not_empty(_profiles(values, "profile", ("boot_rtmrs", "runtime_rtmrs"), extra_keys, defaults or {}))


def read_toml(data: bytes | str) -> Table:
    """The table of a TOML file, or of its text. Raises `PolicyError`."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")  # a lone surrogate is refused below
    if len(data) > MAX_SIZE:
        raise PolicyError(f"more than {MAX_SIZE} bytes of TOML")
    try:
        return Table(tomllib.loads(data.decode("utf-8")), "")
    except (ValueError, RecursionError) as exc:
        raise PolicyError(f"not TOML: {exc}") from None


def read_profiles(
    table: Table, *, extra_keys: frozenset[str] = frozenset(), defaults: Mapping[str, object] | None = None
) -> tuple[ProfileAndExtras, ...]:
    """Take ``profile`` and ``profile_defaults`` from a table. Raises `PolicyError`."""
    own = table.table("profile_defaults", {})
    if unknown := own.keys() - _DEFAULTABLE - extra_keys:
        raise PolicyError(f"{own.at(min(unknown))}: there is no such key, or it has no default")
    entries = table.tables("profile")
    return _profiles(entries, table.at("profile"), ("boot", "runtime"), extra_keys, {**(defaults or {}), **own.rest()})


def _profiles(
    entries: Sequence[object],
    path: str,
    stages: tuple[str, str],
    extra_keys: frozenset[str],
    defaults: Mapping[str, object],
) -> tuple[ProfileAndExtras, ...]:
    profiles: dict[str, ProfileAndExtras] = {}
    for number, entry in enumerate(entries, 1):
        profile, extras = _profile(Table(entry, f"{path} {number}"), path, stages, extra_keys, defaults)
        if profile.name in profiles:
            raise PolicyError(f"{path} {profile.name!r}: the name is there twice")
        profiles[profile.name] = profile, extras
    return tuple(profiles.values())


def _profile(
    table: Table, path: str, stages: tuple[str, str], extra_keys: frozenset[str], defaults: Mapping[str, object]
) -> ProfileAndExtras:
    name = table.take("name", str)
    own = {**defaults, **table.rest()}
    own = {key: value for key, value in own.items() if value is not None or key not in _NULLABLE}
    table = Table(own, f"{path} {name!r}: ")
    fields: dict[str, Any] = {
        "version": table.take("version", str),
        "mrtd": table.octets("mrtd", 48),
        "boot": _rtmrs(table.table(stages[0])),
        "runtime": _rtmrs(table.table(stages[1])),
        "expected_gpus": tuple(gpu.lower() for gpu in table.strings("expected_gpus", ())),
        "gpu_count": table.take("gpu_count", int, 0) or None,
        "attributes": read_attributes(table.table("attributes")) if "attributes" in own else None,
        "fingerprint": table.octets("fingerprint", 32) if "fingerprint" in own else None,
    }
    extras = {key: own[key] for key in table.keys() & extra_keys}
    if unknown := table.keys() - extra_keys:
        raise PolicyError(f"{table.at(min(unknown))}: there is no such key")
    try:
        return Profile(name=name, **fields), extras
    except PolicyError as exc:
        raise PolicyError(table.at(str(exc))) from None


def _rtmrs(table: Table) -> Rtmrs:
    rtmrs = tuple(table.octets(f"rtmr{index}", 48) for index in range(4))
    table.finish()
    return rtmrs[0], rtmrs[1], rtmrs[2], rtmrs[3]


def _not_empty(profiles: tuple[ProfileAndExtras, ...]) -> tuple[ProfileAndExtras, ...]:
    if not profiles:
        raise PolicyError("the file: there is no profile in it")
    return profiles
