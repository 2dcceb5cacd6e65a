"""Profiles in the forms in which they are published: the JSON list of a key server, and the YAML file behind it.

Rules kept here:

* as for profiles of our own: no register goes unchecked, an unknown key is an error, errors name profile and key;
* a form that is not served yet (``snp``) is reported, not dropped, and keeps nothing else of the file out;
* an image has hardware of at least one platform, or the file is refused.

The YAML file has a list ``measurements``, one entry for each version, in one of two shapes, or entries as in JSON;
``docs/reference/policies.md`` has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, Literal

from attrs import frozen

from chutes_proto._converter import quoted
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._files import file_converter, within
from chutes_proto.quote._measurements import (
    Extras,
    ProfileAndExtras,
    Tables,
    check_distinct,
    parse_profiles_json,
    parse_profiles_toml,
    read_published,
)

_JSON: Final = re.compile(rb"\s*(?:\{|\[\s*[{\]])")
"""The beginning of JSON, which TOML cannot have."""
_YAML: Final = re.compile(rb"^(?:measurements|MEASUREMENTS)[ \t]*:", re.MULTILINE)
"""A line of YAML, which TOML cannot have."""
_ZERO: Final = "00" * 48
_LARGEST_YAML: Final = 256 * 1024
"""The reader of YAML takes ten seconds and 100 MB for so many bytes."""


@frozen
class ProfileFile:
    """The profiles of a file, each with the caller's own keys, and what in it is not served, in words."""

    profiles: tuple[ProfileAndExtras, ...]
    not_served: tuple[str, ...] = ()


def parse_profile_file(
    data: bytes,
    read_yaml: Callable[[bytes], object],
    *,
    extra_keys: frozenset[str] = frozenset(),
    defaults: Mapping[str, object] | None = None,
) -> ProfileFile:
    """Read a file of profiles in any form: TOML, the published JSON list, the YAML file.

    ``read_yaml`` reads YAML as tables, lists and texts. ``extra_keys`` and ``defaults`` are as in
    `parse_profiles_toml`. Raises `PolicyError`.
    """
    if not data.strip():
        told = "the file is empty; expected a key server's list (JSON), measurements (YAML) or [[profile]] (TOML)"
        raise PolicyError(told)
    if _JSON.match(data):
        return ProfileFile(parse_profiles_json(data, extra_keys=extra_keys, defaults=defaults))
    if _YAML.search(data):
        if len(data) > _LARGEST_YAML:
            raise PolicyError(f"more than {_LARGEST_YAML} bytes of YAML; JSON and TOML may have more")
        return _parse_entries(read_yaml(data), extra_keys, defaults or {})
    return ProfileFile(parse_profiles_toml(data, extra_keys=extra_keys, defaults=defaults))


# --- the shapes of an entry ---


@frozen(kw_only=True)
class _Hardware:
    name: str
    rtmr0: str
    gpu_count: str
    expected_gpus: tuple[str, ...]
    fingerprint: str | None = None
    fingerprints: tuple[str, ...] = ()
    description: str = ""


@frozen(kw_only=True)
class _Entry:
    """The members of both shapes."""

    version: str
    rc: Literal["true", "false"] = "false"
    authorized_hotkeys: tuple[str, ...] = ()
    authorized_signing_keys: tuple[str, ...] = ()


@frozen(kw_only=True)
class _Flat(_Entry):
    mrtd: str
    rtmr1: str
    rtmr2: str
    runtime_rtmr3: str
    hardware: tuple[_Hardware, ...]


@frozen(kw_only=True)
class _Tdx:
    """Without hardware it needs no registers: MRTD is measured for each, so that an image for AMD alone has none."""

    mrtd: str | None = None
    rtmr1: str | None = None
    rtmr2: str | None = None
    rtmr3: str | None = None
    hardware: tuple[_Hardware, ...]


@frozen(kw_only=True)
class _SnpHardware:
    """Kept in the file, not served yet."""

    name: str
    measurement: str
    acpi_sha256: str
    gpu_count: str = "0"
    expected_gpus: tuple[str, ...] = ()
    fingerprint: str | None = None
    fingerprints: tuple[str, ...] = ()
    description: str = ""


@frozen(kw_only=True)
class _Snp:
    hardware: tuple[_SnpHardware, ...]


@frozen(kw_only=True)
class _ByPlatform(_Entry):
    tdx: _Tdx | None = None
    snp: _Snp | None = None


@frozen(kw_only=True)
class _Measurements:
    measurements: Tables


_CONVERTER: Final = file_converter()
_REGISTERS: Final = ("mrtd", "rtmr1", "rtmr2", "rtmr3")
_OF_ENTRY: Final = frozenset({"rc", "authorized_hotkeys"})
"""Members that a caller without `extra_keys` of these names has no use for."""


def _parse_entries(file: object, extra_keys: frozenset[str], defaults: Mapping[str, object]) -> ProfileFile:
    content = within("the file", _CONVERTER.structure, file, _Measurements)
    if not content.measurements:
        raise PolicyError("the file: measurements: name at least one version")
    profiles: list[ProfileAndExtras] = []
    not_served: list[str] = []
    for number, entry in enumerate(content.measurements, 1):
        version = entry.get("version")
        where = f"version {quoted(version)}" if isinstance(version, str) else f"measurements {number}"
        if "boot_rtmrs" in entry:
            tables = [_counted(where, entry)]
        else:
            shape: type[_Flat | _ByPlatform] = _ByPlatform if entry.keys() & {"tdx", "snp"} else _Flat
            read = within(where, _CONVERTER.structure, entry, shape)
            tables = _tables(where, read)
            if isinstance(read, _ByPlatform) and read.snp is not None:
                not_served += [f"{hardware.name} {read.version}: SEV-SNP" for hardware in read.snp.hardware]
            if read.authorized_signing_keys:
                not_served.append(f"version {read.version}: authorized_signing_keys, of pre-releases")
        ignored = _OF_ENTRY - extra_keys
        entries = tuple({key: value for key, value in table.items() if key not in ignored} for table in tables)
        profiles += read_published(entries, extra_keys, defaults)
    check_distinct(profile for profile, _ in profiles)
    return ProfileFile(tuple(profiles), tuple(not_served))


def _tables(where: str, entry: _Flat | _ByPlatform) -> list[Extras]:
    """The profiles of an entry, as the JSON list has them."""
    image: _Flat | _Tdx
    if isinstance(entry, _ByPlatform):
        if entry.tdx is None or not entry.tdx.hardware:
            if entry.snp is None or not entry.snp.hardware:
                raise PolicyError(f"{where}: neither tdx nor snp has hardware: name at least one")
            return []
        image, runtime_rtmr3 = entry.tdx, entry.tdx.rtmr3
        if missing := [name for name in _REGISTERS if getattr(image, name) is None]:
            raise PolicyError(f"{where}: " + "; ".join(f"tdx.{name}: Field required" for name in missing))
    else:
        image, runtime_rtmr3 = entry, entry.runtime_rtmr3
        if not image.hardware:
            raise PolicyError(f"{where}: hardware: name at least one")
    tables: list[Extras] = []
    for hardware in image.hardware:
        shared = {"rtmr0": hardware.rtmr0, "rtmr1": image.rtmr1, "rtmr2": image.rtmr2}
        table: Extras = {
            "version": entry.version,
            "name": hardware.name,
            "mrtd": image.mrtd,
            "boot_rtmrs": {**shared, "rtmr3": _ZERO},
            "runtime_rtmrs": {**shared, "rtmr3": runtime_rtmr3},
            "expected_gpus": list(hardware.expected_gpus),
            "gpu_count": hardware.gpu_count,
            "fingerprint": hardware.fingerprint,
            "fingerprints": list(hardware.fingerprints),
        }
        if entry.rc == "true":
            table |= {"rc": True, "authorized_hotkeys": list(entry.authorized_hotkeys)}
        tables.append(_counted(f"{where}: {hardware.name}", table))
    return tables


def _counted(where: str, table: Mapping[str, object]) -> Extras:
    """``table`` with its number of GPUs as a number: the text of one in YAML. The published forms demand it."""
    count = table.get("gpu_count")
    if not isinstance(count, str) or not re.fullmatch(r"[1-9][0-9]{0,3}", count):
        raise PolicyError(f"{where}: gpu_count: Input should be a number from 1 to 1024")
    return {**table, "gpu_count": int(count)}
