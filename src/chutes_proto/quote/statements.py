"""What Intel states about platforms and quoting enclaves: TCB info and QE identity, as values.

Rules kept here:

* TCB info of version 3, for SGX also of version 2; QE identity of version 2; everything that a verdict needs must be
  there, of its type, in its range; what is not known is ignored;
* levels are sorted here, best first, whatever their order in the text; no level stands twice;
* nothing is verified here: who signed the text is ``verify.py``'s to check, over the text itself.

Source: Intel SGX and TDX Provisioning Certification Service API, version 4 ("TCB Info V3", "Enclave Identity V2") and
version 3 ("TCB Info V2").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import chain, repeat
from operator import attrgetter, itemgetter
from typing import Any, Final, TypeAlias, cast

from attrs import frozen

from chutes_proto.quote.layout import Tee
from chutes_proto.quote.strict_json import JsonError, array, date, decode, hexadecimal, member, number

U16: Final = 0xFFFF
U32: Final = 0xFFFFFFFF


class TcbStatus(StrEnum):
    """How well a TCB is kept. The two relaunch states are a verifier's conclusions and never stated."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"
    REVOKED = "Revoked"


Statuses: TypeAlias = Mapping[str, TcbStatus]
"""Those that can be stated of something, by their names."""

_OF_PLATFORMS: Final[Statuses] = {
    str(status): status for status in TcbStatus if not status.startswith("TDRelaunchAdvised")
}
_OF_MODULES: Final[Statuses] = {name: _OF_PLATFORMS[name] for name in ("UpToDate", "OutOfDate", "Revoked")}
_OF_ENCLAVES: Final[Statuses] = {**_OF_MODULES, "ConfigurationNeeded": TcbStatus.CONFIGURATION_NEEDED}
_SVN: Final = itemgetter("svn")
_REACHED_WITH: Final = attrgetter("sgx", "pce_svn", "tdx")
_STRINGS: Final = frozenset({str})


@frozen
class Stated:
    """What a level says of the TCBs that reach it; ``date`` (unix seconds) is when this was the TCB to have."""

    status: TcbStatus
    date: int
    advisory_ids: tuple[str, ...]


@frozen
class PlatformLevel:
    """A TCB level: reached with at least these SVNs, a byte for each component (``tdx`` is empty for SGX)."""

    sgx: bytes
    pce_svn: int
    tdx: bytes
    stated: Stated


@frozen
class SvnLevel:
    """A level of a TDX module or a quoting enclave: reached with at least this SVN."""

    svn: int
    stated: Stated


@frozen
class ModuleIdentity:
    """A TDX module of one major version: who signs it, with which attributes; levels, best first."""

    mr_signer: bytes
    attributes: int
    levels: tuple[SvnLevel, ...]


@frozen
class TcbInfo:
    """Levels of all platforms with one FMSPC and PCE-ID, best first; ``modules`` by id in capitals (``TDX_01``).

    ``module`` is the one TDX module before there were several.
    """

    tee: Tee
    version: int
    fmspc: bytes
    pce_id: bytes
    issued: int
    next_update: int
    evaluation_number: int
    levels: tuple[PlatformLevel, ...]
    module: ModuleIdentity | None
    modules: Mapping[str, ModuleIdentity]


@frozen
class QeIdentity:
    """The quoting enclave that may sign quotes of a TEE; levels, best first. Numbers are of the report's bytes."""

    tee: Tee
    issued: int
    next_update: int
    evaluation_number: int
    misc_select: int
    misc_select_mask: int
    attributes: int
    attributes_mask: int
    mr_signer: bytes
    isv_prod_id: int
    levels: tuple[SvnLevel, ...]


class StatementKindError(JsonError):
    """A statement of another kind: id, version or TCB type."""


def read_tcb_info(text: bytes) -> TcbInfo:
    """Raises `JsonError`, as `StatementKindError` for a kind that is not read here."""
    table = _table(decode(text), "TCB info")
    version = number(table, "version", U32)
    name = "SGX" if version == 2 and "id" not in table else member(table, "id", str)
    if name not in ("SGX", "TDX"):
        raise StatementKindError(f"id {name!r} is not of TCB info")
    tee: Tee = "TDX" if name == "TDX" else "SGX"
    if version != 3 and (version, tee) != (2, "SGX"):
        raise StatementKindError(f"version {version} of TCB info for {tee} is not read here")
    if (tcb_type := number(table, "tcbType", U32)) != 0:
        raise StatementKindError(f"TCB type {tcb_type} is not read here")
    tdx = tee == "TDX"
    return TcbInfo(
        tee=tee,
        version=version,
        fmspc=hexadecimal(table, "fmspc", 6),
        pce_id=hexadecimal(table, "pceId", 2),
        issued=date(table, "issueDate"),
        next_update=date(table, "nextUpdate"),
        evaluation_number=number(table, "tcbEvaluationDataNumber", U32),
        levels=_platform_levels(table, version, tdx=tdx),
        module=_module(_table(table.get("tdxModule"), "tdxModule"), ()) if tdx else None,
        modules=_modules(table) if tdx else {},
    )


def read_qe_identity(text: bytes) -> QeIdentity:
    """Raises `JsonError`, as `StatementKindError` for a kind that is not read here."""
    table = _table(decode(text), "QE identity")
    name = member(table, "id", str)
    if name not in ("QE", "TD_QE"):
        raise StatementKindError(f"id {name!r} is not of a quoting enclave")
    if (version := number(table, "version", U32)) != 2:
        raise StatementKindError(f"version {version} of QE identity is not read here")
    return QeIdentity(
        tee="TDX" if name == "TD_QE" else "SGX",
        issued=date(table, "issueDate"),
        next_update=date(table, "nextUpdate"),
        evaluation_number=number(table, "tcbEvaluationDataNumber", U32),
        misc_select=_little(table, "miscselect", 4),
        misc_select_mask=_little(table, "miscselectMask", 4),
        attributes=_little(table, "attributes", 16),
        attributes_mask=_little(table, "attributesMask", 16),
        mr_signer=hexadecimal(table, "mrsigner", 32),
        isv_prod_id=number(table, "isvprodid", U16),
        levels=_svn_levels(table, _OF_ENCLAVES),
    )


def _platform_levels(table: Mapping[str, object], version: int, *, tdx: bool) -> tuple[PlatformLevel, ...]:
    entries = _tables(table, "tcbLevels")
    tcbs = [_table(entry.get("tcb"), "tcb") for entry in entries]
    sgx = _components(tcbs, "sgxtcbcomponents") if version == 3 else map(_numbered_components, tcbs)
    pce_svns = [number(tcb, "pcesvn", U16) for tcb in tcbs]
    of_module = _components(tcbs, "tdxtcbcomponents") if tdx else repeat(b"", len(tcbs))
    stated = [_stated(entry, _OF_PLATFORMS) for entry in entries]
    levels = sorted(map(PlatformLevel, sgx, pce_svns, of_module, stated), key=_REACHED_WITH, reverse=True)
    _check_levels("tcbLevels", [*map(_REACHED_WITH, levels)])
    return tuple(levels)


def _components(tcbs: Sequence[Mapping[str, object]], name: str) -> list[bytes]:
    """The components of each TCB, a byte each."""
    arrays = [array(tcb, name) for tcb in tcbs]
    try:
        svns = [*map(_SVN, chain.from_iterable(arrays))]
        components = bytes(svns)
    except (TypeError, KeyError, ValueError):  # no object, no svn, no number, or out of range
        svns, components = [None], b""
    if not {*map(len, arrays)} <= {16} or not {*map(type, svns)} <= {int}:
        raise JsonError(f"{name} is not sixteen objects with an svn from 0 to 255")
    return [components[at : at + 16] for at in range(0, len(components), 16)]


def _numbered_components(tcb: Mapping[str, object]) -> bytes:
    return bytes(number(tcb, f"sgxtcbcomp{i:02}svn", 255) for i in range(1, 17))


def _modules(table: Mapping[str, object]) -> dict[str, ModuleIdentity]:
    modules: dict[str, ModuleIdentity] = {}
    for entry in _tables(table, "tdxModuleIdentities") if "tdxModuleIdentities" in table else ():
        name = member(entry, "id", str).upper()
        if name in modules:
            raise JsonError(f"the TDX module identity {name!r} is there twice")
        modules[name] = _module(entry, _svn_levels(entry, _OF_MODULES))
    return modules


def _module(entry: Mapping[str, object], levels: tuple[SvnLevel, ...]) -> ModuleIdentity:
    return ModuleIdentity(hexadecimal(entry, "mrsigner", 48), _little(entry, "attributes", 8), levels)


def _svn_levels(table: Mapping[str, object], legal: Statuses) -> tuple[SvnLevel, ...]:
    levels = [
        SvnLevel(number(_table(entry.get("tcb"), "tcb"), "isvsvn", U16), _stated(entry, legal))
        for entry in _tables(table, "tcbLevels")
    ]
    levels.sort(key=lambda level: level.svn, reverse=True)
    _check_levels("tcbLevels", [level.svn for level in levels])
    return tuple(levels)


def _stated(entry: Mapping[str, object], legal: Statuses) -> Stated:
    status = legal.get(member(entry, "tcbStatus", str))
    if status is None:
        raise JsonError("tcbStatus is not one that can be stated here")
    advisories = array(entry, "advisoryIDs") if "advisoryIDs" in entry else []
    if not _STRINGS.issuperset(map(type, advisories)):
        raise JsonError("advisoryIDs holds more than strings")
    return Stated(status, date(entry, "tcbDate"), tuple(advisories))


def _check_levels(name: str, keys: list[Any]) -> None:
    if not keys:
        raise JsonError(f"{name} is empty")
    if len(set(keys)) != len(keys):
        raise JsonError(f"{name} has a level twice")


def _little(table: Mapping[str, object], name: str, size: int) -> int:
    return int.from_bytes(hexadecimal(table, name, size), "little")


def _table(value: object, name: str) -> Mapping[str, object]:
    if type(value) is not dict:
        raise JsonError(f"{name} is missing or no object")
    return cast("dict[str, object]", value)


def _tables(table: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    what = f"an entry of {name}"
    return [_table(entry, what) for entry in array(table, name)]
