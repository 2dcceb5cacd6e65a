"""Intel's statements about platforms and quoting enclaves: TCB info and QE identity, as values.

Rules kept here:

* TCB info of version 3, for SGX also of version 2; QE identity of version 2; everything that a verdict needs must be
  there, of its type, in its range; what is not known is ignored;
* a level of a TDX module or a quoting enclave is ``UpToDate``, ``OutOfDate`` or ``Revoked``, and nothing else: nothing
  would follow from another status;
* levels are sorted here, best first, whatever their order in the text; no level stands twice;
* nothing is verified here: who signed the text is ``_verify.py``'s to check, over the text itself.

Source: Intel SGX and TDX Provisioning Certification Service API, version 4 ("TCB Info V3", "Enclave Identity V2") and
version 3 ("TCB Info V2"); the statuses of quoting enclaves: the same, "Enclave Identity V2", ``tcbStatus``, and Intel's
Quote Verification Library, ``IdentityTcbLevel``, which refuses an identity with any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, TypeAlias, TypeVar

from msgspec import UNSET, Struct, UnsetType

from chutes_proto.quote import _statement_forms as forms
from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._layout import Tee
from chutes_proto.quote._strict_json import JsonError, date, hexadecimal

T = TypeVar("T")


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
"""The statuses that a statement may use, by their names."""

_OF_PLATFORMS: Final[Statuses] = {
    str(status): status for status in TcbStatus if not status.startswith("TDRelaunchAdvised")
}
_OF_COMPONENTS: Final[Statuses] = {name: _OF_PLATFORMS[name] for name in ("UpToDate", "OutOfDate", "Revoked")}
"""Of TDX modules and quoting enclaves."""


class Stated(Struct, frozen=True):
    """The status of the TCBs that reach a level; ``date`` (unix seconds) is when the level was the newest."""

    status: TcbStatus
    date: int
    advisory_ids: tuple[str, ...]


class PlatformLevel(Struct, frozen=True):
    """A TCB level: reached with at least these SVNs, a byte for each component (``tdx`` is empty for SGX)."""

    sgx: bytes
    pce_svn: int
    tdx: bytes
    stated: Stated


class SvnLevel(Struct, frozen=True):
    """A level of a TDX module or a quoting enclave: reached with at least this SVN."""

    svn: int
    stated: Stated


class ModuleIdentity(Struct, frozen=True):
    """A TDX module of one major version: who signs it, with which attributes; levels, best first."""

    mr_signer: bytes
    attributes: int
    levels: tuple[SvnLevel, ...]


class TcbInfo(Struct, frozen=True):
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


class QeIdentity(Struct, frozen=True):
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


class AnotherKindError(JsonError):
    """A statement of an unsupported kind: id, version or TCB type."""


def read_tcb_info(text: bytes) -> TcbInfo:
    """Read TCB info. Raises `JsonError`; `AnotherKindError` for a kind or version that is not supported."""
    kind = forms.decode(text, forms.TCB_INFO_KIND)
    name = "SGX" if kind.version == 2 and kind.id is UNSET else _id(kind)
    if name not in ("SGX", "TDX"):
        raise _another_kind(text, f"id {name!r} is not of TCB info")
    tee: Tee = "TDX" if name == "TDX" else "SGX"
    form = forms.TCB_INFO.get((tee, kind.version))
    if form is None:
        raise _another_kind(text, f"version {kind.version} of TCB info for {tee} is not read here")
    if kind.tcb_type != 0:
        raise _another_kind(text, f"TCB type {kind.tcb_type} is not read here")
    info: forms.TdxTcbInfoForm | forms.SgxTcbInfoForm[Any] = forms.read(text, form)
    module, modules = None, {}
    if isinstance(info, forms.TdxTcbInfoForm):
        module, modules = _module(info.tdx_module, ()), _modules(info.tdx_module_identities)
    return TcbInfo(
        tee=tee,
        version=kind.version,
        fmspc=hexadecimal(info.fmspc, "fmspc", 6),
        pce_id=hexadecimal(info.pce_id, "pceId", 2),
        issued=date(info.issue_date, "issueDate"),
        next_update=date(info.next_update, "nextUpdate"),
        evaluation_number=info.tcb_evaluation_data_number,
        levels=_platform_levels(info.tcb_levels),
        module=module,
        modules=modules,
    )


def read_qe_identity(text: bytes) -> QeIdentity:
    """Read a QE identity. Raises `JsonError`; `AnotherKindError` for a kind or version that is not supported."""
    kind = forms.decode(text, forms.QE_IDENTITY_KIND)
    name = _id(kind)
    if name not in ("QE", "TD_QE"):
        raise _another_kind(text, f"id {name!r} is not of a quoting enclave")
    if kind.version != 2:
        raise _another_kind(text, f"version {kind.version} of QE identity is not read here")
    identity = forms.read(text, forms.QE_IDENTITY)
    return QeIdentity(
        tee="TDX" if name == "TD_QE" else "SGX",
        issued=date(identity.issue_date, "issueDate"),
        next_update=date(identity.next_update, "nextUpdate"),
        evaluation_number=identity.tcb_evaluation_data_number,
        misc_select=_little(identity.miscselect, "miscselect", 4),
        misc_select_mask=_little(identity.miscselect_mask, "miscselectMask", 4),
        attributes=_little(identity.attributes, "attributes", 16),
        attributes_mask=_little(identity.attributes_mask, "attributesMask", 16),
        mr_signer=hexadecimal(identity.mrsigner, "mrsigner", 32),
        isv_prod_id=identity.isvprodid,
        levels=_svn_levels(identity.tcb_levels),
    )


def _id(kind: forms.KindForm) -> str:
    if kind.id is UNSET:
        raise JsonError("id is missing")
    return kind.id


def _another_kind(text: bytes, what: str) -> AnotherKindError:
    """Make the error, once it is sure that the text can mean nothing else."""
    _ = strict_json.decode(text, fractions=True)
    return AnotherKindError(what)


def _modules(entries: Sequence[forms.ModuleIdentityForm] | UnsetType) -> dict[str, ModuleIdentity]:
    modules: dict[str, ModuleIdentity] = {}
    for entry in () if entries is UNSET else entries:
        name = entry.id.upper()
        if name in modules:
            raise JsonError(f"the TDX module identity {name!r} is there twice")
        modules[name] = _module(entry, _svn_levels(entry.tcb_levels))
    return modules


def _module(entry: forms.ModuleForm | forms.ModuleIdentityForm, levels: tuple[SvnLevel, ...]) -> ModuleIdentity:
    return ModuleIdentity(
        hexadecimal(entry.mrsigner, "mrsigner", 48), _little(entry.attributes, "attributes", 8), levels
    )


def _platform_levels(entries: Sequence[forms.LevelForm[forms.TcbForm[forms.ReachedWith]]]) -> tuple[PlatformLevel, ...]:
    return tuple([PlatformLevel(*reached, stated) for reached, stated in _levels(entries, _OF_PLATFORMS)])


def _svn_levels(entries: Sequence[forms.LevelForm[forms.TcbForm[int]]]) -> tuple[SvnLevel, ...]:
    return tuple([SvnLevel(svn, stated) for svn, stated in _levels(entries, _OF_COMPONENTS)])


def _levels(entries: Sequence[forms.LevelForm[forms.TcbForm[T]]], legal: Statuses) -> list[tuple[T, Stated]]:
    """The status of the TCBs that reach each level, best first."""
    levels = {entry.tcb.reached_with(): _stated(entry, legal) for entry in entries}
    if not levels:
        raise JsonError("tcbLevels is empty")
    if len(levels) != len(entries):
        raise JsonError("tcbLevels has a level twice")
    return sorted(levels.items(), reverse=True)


def _stated(entry: forms.LevelForm[Any], legal: Statuses) -> Stated:
    status = legal.get(entry.tcb_status)
    if status is None:
        raise JsonError("tcbStatus is not one that can be stated here")
    advisories = () if entry.advisory_ids is UNSET else tuple(entry.advisory_ids)
    return Stated(status, date(entry.tcb_date, "tcbDate"), advisories)


def _little(text: str, name: str, size: int) -> int:
    return int.from_bytes(hexadecimal(text, name, size), "little")
