"""What Intel states about platforms and quoting enclaves: TCB info and QE identity, as values.

Rules kept here:

* TCB info of version 3, for SGX also of version 2; QE identity of version 2; everything that a verdict needs must be
  there, of its type, in its range; what is not known is ignored;
* a text is what would be written for what was read of it, byte for byte, as Intel's are: then it can mean nothing else.
  Or it is JSON by the rules of ``strict_json.py``;
* levels are sorted here, best first, whatever their order in the text; no level stands twice;
* nothing is verified here: who signed the text is ``verify.py``'s to check, over the text itself.

Source: Intel SGX and TDX Provisioning Certification Service API, version 4 ("TCB Info V3", "Enclave Identity V2") and
version 3 ("TCB Info V2").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from operator import attrgetter
from typing import Annotated, Any, Final, Generic, Protocol, TypeAlias, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType, field
from msgspec.json import Decoder, Encoder
from msgspec.structs import astuple

from chutes_proto.quote import strict_json
from chutes_proto.quote.layout import Tee
from chutes_proto.quote.strict_json import JsonError, date, hexadecimal


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


class Stated(Struct, frozen=True):
    """What a level says of the TCBs that reach it; ``date`` (unix seconds) is when this was the TCB to have."""

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


# --- the texts: objects with the members that Intel writes, in its order ---

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_Byte: TypeAlias = Annotated[int, Meta(ge=0, le=0xFF)]
_U16: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
_U32: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]

ReachedWith: TypeAlias = tuple[bytes, int, bytes]
"""SGX components, PCESVN, TDX components."""


class _Object(Struct, rename="camel", gc=False):
    pass


class _Component(_Object):
    svn: _Byte
    category: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


_Components: TypeAlias = Annotated[list[_Component], Meta(min_length=16, max_length=16)]
_SVN: Final = attrgetter("svn")


class _Tcb(Protocol[T_co]):
    def reached_with(self) -> T_co:
        """What a level is reached with; of two levels, the greater one is better."""
        ...


class _SgxTcb(_Object):
    sgxtcbcomponents: _Components
    pcesvn: _U16

    def reached_with(self) -> ReachedWith:
        return bytes(map(_SVN, self.sgxtcbcomponents)), self.pcesvn, b""


class _TdxTcb(_SgxTcb):
    tdxtcbcomponents: _Components

    def reached_with(self) -> ReachedWith:
        return (
            bytes(map(_SVN, self.sgxtcbcomponents)),
            self.pcesvn,
            bytes(map(_SVN, self.tdxtcbcomponents)),
        )


class _NumberedTcb(_Object):
    """Of version 2."""

    __annotations__ = {**{f"sgxtcbcomp{i:02}svn": _Byte for i in range(1, 17)}, "pcesvn": _U16}

    def reached_with(self) -> ReachedWith:
        *components, pce_svn = astuple(self)
        return bytes(components), pce_svn, b""


class _SvnTcb(_Object):
    isvsvn: _U16

    def reached_with(self) -> int:
        return self.isvsvn


class _Level(_Object, Generic[T_co]):
    tcb: T_co
    tcb_date: str
    tcb_status: str
    advisory_ids: list[str] | UnsetType = field(default=UNSET, name="advisoryIDs")


class _Module(_Object):
    mrsigner: str
    attributes: str
    attributes_mask: str | UnsetType = UNSET


class _ModuleWithLevels(_Object, kw_only=True):
    id: str
    mrsigner: str
    attributes: str
    attributes_mask: str | UnsetType = UNSET
    tcb_levels: list[_Level[_SvnTcb]]


class _TcbInfo(_Object, Generic[T], kw_only=True):
    id: str | UnsetType = UNSET
    version: _U32
    issue_date: str
    next_update: str
    fmspc: str
    pce_id: str
    tcb_type: _U32
    tcb_evaluation_data_number: _U32
    tdx_module: _Module | UnsetType = UNSET
    tdx_module_identities: list[_ModuleWithLevels] = field(default_factory=list)
    tcb_levels: list[_Level[T]]


class _QeIdentity(_Object):
    id: str
    version: _U32
    issue_date: str
    next_update: str
    tcb_evaluation_data_number: _U32
    miscselect: str
    miscselect_mask: str
    attributes: str
    attributes_mask: str
    mrsigner: str
    isvprodid: _U16
    tcb_levels: list[_Level[_SvnTcb]]


class _Kind(_Object, kw_only=True):
    """What says which of these a text is."""

    id: str | UnsetType = UNSET
    version: _U32
    tcb_type: _U32 = 0


_KIND: Final = Decoder(_Kind)
_TCB_INFO: Final[Mapping[tuple[Tee, int], Decoder[_TcbInfo[Any]]]] = {
    ("TDX", 3): Decoder(_TcbInfo[_TdxTcb]),
    ("SGX", 3): Decoder(_TcbInfo[_SgxTcb]),
    ("SGX", 2): Decoder(_TcbInfo[_NumberedTcb]),
}
_QE_IDENTITY: Final = Decoder(_QeIdentity)
_ENCODER: Final = Encoder()


# --- reading ---


class StatementKindError(JsonError):
    """A statement of another kind: id, version or TCB type."""


def read_tcb_info(text: bytes) -> TcbInfo:
    """Raises `JsonError`, as `StatementKindError` for a kind that is not read here."""
    kind = _decode(text, _KIND)
    name = "SGX" if kind.version == 2 and kind.id is UNSET else kind.id
    if name not in ("SGX", "TDX"):
        raise StatementKindError(f"id {name!r} is not of TCB info")
    tee: Tee = "TDX" if name == "TDX" else "SGX"
    decoder = _TCB_INFO.get((tee, kind.version))
    if decoder is None:
        raise StatementKindError(f"version {kind.version} of TCB info for {tee} is not read here")
    if kind.tcb_type != 0:
        raise StatementKindError(f"TCB type {kind.tcb_type} is not read here")
    info = _read(text, decoder)
    if tee == "SGX":
        module, modules = None, {}
    elif info.tdx_module is UNSET:
        raise JsonError("tdxModule is missing")
    else:
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
    """Raises `JsonError`, as `StatementKindError` for a kind that is not read here."""
    kind = _decode(text, _KIND)
    if kind.id not in ("QE", "TD_QE"):
        raise StatementKindError(f"id {kind.id!r} is not of a quoting enclave")
    if kind.version != 2:
        raise StatementKindError(f"version {kind.version} of QE identity is not read here")
    identity = _read(text, _QE_IDENTITY)
    return QeIdentity(
        tee="TDX" if kind.id == "TD_QE" else "SGX",
        issued=date(identity.issue_date, "issueDate"),
        next_update=date(identity.next_update, "nextUpdate"),
        evaluation_number=identity.tcb_evaluation_data_number,
        misc_select=_little(identity.miscselect, "miscselect", 4),
        misc_select_mask=_little(identity.miscselect_mask, "miscselectMask", 4),
        attributes=_little(identity.attributes, "attributes", 16),
        attributes_mask=_little(identity.attributes_mask, "attributesMask", 16),
        mr_signer=hexadecimal(identity.mrsigner, "mrsigner", 32),
        isv_prod_id=identity.isvprodid,
        levels=_svn_levels(identity.tcb_levels, _OF_ENCLAVES),
    )


def _read(text: bytes, decoder: Decoder[T]) -> T:
    """The text's value, if it can have no other."""
    value = _decode(text, decoder)
    if _ENCODER.encode(value) != text:
        _ = strict_json.decode(text)
    return value


def _decode(text: bytes, decoder: Decoder[T]) -> T:
    if len(text) > strict_json.MAX_SIZE:
        raise JsonError(f"more than {strict_json.MAX_SIZE} bytes of JSON")
    try:
        return decoder.decode(text)
    except (ValueError, RecursionError) as exc:
        _ = strict_json.decode(text)  # says it better of what is no JSON
        raise JsonError(f"not of its form: {exc}") from None


def _modules(entries: Iterable[_ModuleWithLevels]) -> dict[str, ModuleIdentity]:
    modules: dict[str, ModuleIdentity] = {}
    for entry in entries:
        name = entry.id.upper()
        if name in modules:
            raise JsonError(f"the TDX module identity {name!r} is there twice")
        modules[name] = _module(entry, _svn_levels(entry.tcb_levels, _OF_MODULES))
    return modules


def _module(entry: _Module | _ModuleWithLevels, levels: tuple[SvnLevel, ...]) -> ModuleIdentity:
    return ModuleIdentity(
        hexadecimal(entry.mrsigner, "mrsigner", 48), _little(entry.attributes, "attributes", 8), levels
    )


def _platform_levels(entries: Sequence[_Level[_Tcb[ReachedWith]]]) -> tuple[PlatformLevel, ...]:
    levels = _levels(entries, _OF_PLATFORMS)
    return tuple([PlatformLevel(sgx, pce_svn, tdx, stated) for (sgx, pce_svn, tdx), stated in levels])


def _svn_levels(entries: Sequence[_Level[_SvnTcb]], legal: Statuses) -> tuple[SvnLevel, ...]:
    return tuple([SvnLevel(svn, stated) for svn, stated in _levels(entries, legal)])


def _levels(entries: Sequence[_Level[_Tcb[T]]], legal: Statuses) -> list[tuple[T, Stated]]:
    """What is stated of the TCBs that reach each level, best first."""
    levels = {entry.tcb.reached_with(): _stated(entry, legal) for entry in entries}
    if not levels:
        raise JsonError("tcbLevels is empty")
    if len(levels) != len(entries):
        raise JsonError("tcbLevels has a level twice")
    return sorted(levels.items(), reverse=True)


def _stated(entry: _Level[Any], legal: Statuses) -> Stated:
    status = legal.get(entry.tcb_status)
    if status is None:
        raise JsonError("tcbStatus is not one that can be stated here")
    advisories = () if entry.advisory_ids is UNSET else tuple(entry.advisory_ids)
    return Stated(status, date(entry.tcb_date, "tcbDate"), advisories)


def _little(text: str, name: str, size: int) -> int:
    return int.from_bytes(hexadecimal(text, name, size), "little")
