"""Decode the JSON of TCB info and QE identity, member by member.

Rules kept here:

* a form has the members that Intel writes, in its order, with their types and ranges; what is not known is ignored;
* a text is what would be written for what was read of it, byte for byte, as Intel's are: then it can mean nothing else.
  Or it is JSON by the rules of ``_strict_json.py``, with fractions, which no member that is read here may have.

Source: Intel SGX and TDX Provisioning Certification Service API, version 4 ("TCB Info V3", "Enclave Identity V2") and
version 3 ("TCB Info V2").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Annotated, Any, Final, Generic, Protocol, TypeAlias, TypeVar

from msgspec import UNSET, Meta, MsgspecError, Struct, UnsetType, field
from msgspec.json import Decoder, Encoder
from msgspec.structs import astuple

from chutes_proto.quote import _strict_json as strict_json
from chutes_proto.quote._layout import Tee
from chutes_proto.quote._strict_json import JsonError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_Byte: TypeAlias = Annotated[int, Meta(ge=0, le=0xFF)]
_U16: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
_U32: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]

ReachedWith: TypeAlias = tuple[bytes, int, bytes]
"""SGX components, PCESVN, TDX components."""


class _Object(Struct, rename="camel", gc=False):  # what is decoded has no cycles
    """Members that are not known are ignored."""


class _Component(_Object):
    svn: _Byte
    category: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


_Components: TypeAlias = Annotated[list[_Component], Meta(min_length=16, max_length=16)]
_SVN: Final = attrgetter("svn")


def _svns(components: Sequence[_Component]) -> bytes:
    return bytes(map(_SVN, components))


class TcbForm(Protocol[T_co]):
    """A TCB: of a platform, in one of three forms, or of a TDX module or a quoting enclave."""

    def reached_with(self) -> T_co:
        """The SVNs that reach this level; of two levels, the one with the greater SVNs is better."""
        ...


class _SgxTcb(_Object):
    sgxtcbcomponents: _Components
    pcesvn: _U16

    def reached_with(self) -> ReachedWith:
        return _svns(self.sgxtcbcomponents), self.pcesvn, b""


class _TdxTcb(_SgxTcb):
    tdxtcbcomponents: _Components

    def reached_with(self) -> ReachedWith:
        return _svns(self.sgxtcbcomponents), self.pcesvn, _svns(self.tdxtcbcomponents)


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


class LevelForm(_Object, Generic[T_co]):
    """An entry of ``tcbLevels``."""

    tcb: T_co
    tcb_date: str
    tcb_status: str
    advisory_ids: list[str] | UnsetType = field(default=UNSET, name="advisoryIDs")


class ModuleForm(_Object):
    """The ``tdxModule`` of before there were several."""

    mrsigner: str
    attributes: str
    attributes_mask: str | UnsetType = UNSET


class ModuleIdentityForm(_Object, kw_only=True):
    """An entry of ``tdxModuleIdentities``."""

    id: str
    mrsigner: str
    attributes: str
    attributes_mask: str | UnsetType = UNSET
    tcb_levels: list[LevelForm[_SvnTcb]]


class KindForm(_Object, kw_only=True):
    """The members that tell the forms apart."""

    id: str | UnsetType = UNSET
    version: _U32


class _TcbInfoForm(KindForm, kw_only=True):
    issue_date: str
    next_update: str
    fmspc: str
    pce_id: str
    tcb_type: _U32
    tcb_evaluation_data_number: _U32


class SgxTcbInfoForm(_TcbInfoForm, Generic[T], kw_only=True):
    """TCB info for SGX, of version 2 or 3 by its TCB."""

    tcb_levels: list[LevelForm[T]]


class TdxTcbInfoForm(_TcbInfoForm, kw_only=True):
    """TCB info for TDX."""

    tdx_module: ModuleForm
    tdx_module_identities: list[ModuleIdentityForm] | UnsetType = UNSET
    tcb_levels: list[LevelForm[_TdxTcb]]


class QeIdentityForm(_Object):
    """QE identity, for either TEE."""

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
    tcb_levels: list[LevelForm[_SvnTcb]]


class TcbInfoKindForm(KindForm, kw_only=True):
    """The same of TCB info."""

    tcb_type: _U32


QE_IDENTITY_KIND: Final = Decoder(KindForm)
TCB_INFO_KIND: Final = Decoder(TcbInfoKindForm)
TCB_INFO: Final[Mapping[tuple[Tee, int], Decoder[Any]]] = {
    ("TDX", 3): Decoder(TdxTcbInfoForm),
    ("SGX", 3): Decoder(SgxTcbInfoForm[_SgxTcb]),
    ("SGX", 2): Decoder(SgxTcbInfoForm[_NumberedTcb]),
}
"""Forms by TEE and version; each decodes to a `TdxTcbInfoForm` or `SgxTcbInfoForm`."""
QE_IDENTITY: Final = Decoder(QeIdentityForm)
_ENCODER: Final = Encoder()


def read(text: bytes, form: Decoder[T]) -> T:
    """Decode a text in its form, if it can mean nothing else. Raises `JsonError`."""
    value = decode(text, form)
    if _ENCODER.encode(value) != text:
        _ = strict_json.decode(text, fractions=True)
    return value


def decode(text: bytes, form: Decoder[T]) -> T:
    """Decode a text in its form; of a doubled member, one counts. Raises `JsonError`."""
    if len(text) > strict_json.MAX_SIZE:
        raise JsonError(f"more than {strict_json.MAX_SIZE} bytes of JSON")
    try:
        return form.decode(text)
    except (MsgspecError, ValueError, RecursionError) as exc:
        _ = strict_json.decode(text, fractions=True)  # has the better text for bytes that are not JSON
        raise JsonError(f"not of its form: {exc}") from None
