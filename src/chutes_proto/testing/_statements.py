"""Statements of the simulated Intel: TCB info v3 and QE identity v2, as signed JSON.

Rules kept here:

* the form is that of Intel's Provisioning Certification Service API v4; the signature covers the exact text;
* the levels form ladders, one level a status, so that one honest TCB info has every status, by SVNs alone.
"""

from __future__ import annotations

import datetime
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from attrs import field, frozen

Respelling: TypeAlias = Callable[[str], str]

TCB_LADDER: Final = {
    "UpToDate": 8,
    "SWHardeningNeeded": 7,
    "ConfigurationNeeded": 6,
    "ConfigurationAndSWHardeningNeeded": 5,
    "OutOfDate": 4,
    "OutOfDateConfigurationNeeded": 3,
    "Revoked": 2,
}
"""TCB status by the SVN that a platform needs for it, in its first SGX and its third TDX component (microcode)."""

SVN_LADDER: Final = {"UpToDate": 6, "OutOfDate": 4, "Revoked": 2}
"""Status by ISVSVN, of the quoting enclave and of the TDX module."""

SGX_COMPONENTS: Final = (8, 3, 2, 2, 4, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0)
PCE_SVN: Final = 13
EVALUATION_NUMBER: Final = 20
_DATES: Final = {"UpToDate": "2025-08-13T00:00:00Z", "SWHardeningNeeded": "2025-08-13T00:00:00Z"}
_OLD_DATE: Final = "2024-03-13T00:00:00Z"


def tcb_components(status: str) -> tuple[int, ...]:
    """Return the sixteen TDX component SVNs of the level with this status; the first two are the TDX module's."""
    return (0, 0, TCB_LADDER[status], *[0] * 13)


def tee_tcb_svn(status: str | None = "UpToDate", *, module: str | None = "UpToDate", module_version: int = 1) -> bytes:
    """Return the SVNs in a TD report for a TCB status and a TDX module; None stands for below every level."""
    svn = 0 if status is None else TCB_LADDER[status]
    return bytes([0 if module is None else SVN_LADDER[module], module_version, svn, *[0] * 13])


@frozen(kw_only=True)
class TcbLevel:
    """One TCB level of a platform."""

    status: str
    sgx: tuple[object, ...] = SGX_COMPONENTS
    tdx: tuple[object, ...]
    pce_svn: int = PCE_SVN

    def document(self) -> dict[str, object]:
        tcb = {
            "sgxtcbcomponents": [{"svn": svn} for svn in self.sgx],
            "pcesvn": self.pce_svn,
            "tdxtcbcomponents": [{"svn": svn} for svn in self.tdx],
        }
        return {"tcb": tcb, **_level(self.status)}


def _level(status: str) -> dict[str, object]:
    verdict: dict[str, object] = {"tcbDate": _DATES.get(status, _OLD_DATE), "tcbStatus": status}
    return verdict if status == "UpToDate" else {**verdict, "advisoryIDs": [f"SIMULATED-SA-{status}"]}


def _svn_levels(ladder: Mapping[str, int]) -> list[dict[str, object]]:
    return [{"tcb": {"isvsvn": svn}, **_level(status)} for status, svn in ladder.items()]


def _honest_levels() -> tuple[TcbLevel, ...]:
    return tuple(
        TcbLevel(status=status, sgx=(svn, *SGX_COMPONENTS[1:]), tdx=tcb_components(status))
        for status, svn in TCB_LADDER.items()
    )


@frozen(kw_only=True)
class Statement(ABC):
    """A signed document before it is text; ``respell`` changes it before it is signed, ``alter`` afterwards."""

    id: str
    version: int
    issued: int
    next_update: int
    evaluation_number: int = EVALUATION_NUMBER
    leave_out: str = ""
    respell: Respelling = str
    alter: Respelling = str
    flip_signature: bool = False

    @abstractmethod
    def members(self) -> dict[str, object]:
        """Return the members of the kind of document."""

    def text(self) -> str:
        """Return the signed text."""
        document: dict[str, object] = {
            "id": self.id,
            "version": self.version,
            "issueDate": _rfc3339(self.issued),
            "nextUpdate": _rfc3339(self.next_update),
            **self.members(),
        }
        document = {name: value for name, value in document.items() if name != self.leave_out}
        return self.respell(json.dumps(document, separators=(",", ":")))


@frozen(kw_only=True)
class TcbInfo(Statement):
    """TCB info of one FMSPC, for TDX."""

    id: str = "TDX"
    version: int = 3
    fmspc: bytes
    pce_id: bytes = bytes(2)
    tcb_type: int = 0
    levels: tuple[TcbLevel, ...] = field(factory=_honest_levels)

    def members(self) -> dict[str, object]:
        return {
            "fmspc": self.fmspc.hex().upper(),
            "pceId": self.pce_id.hex().upper(),
            "tcbType": self.tcb_type,
            "tcbEvaluationDataNumber": self.evaluation_number,
            "tdxModule": _module(),
            "tdxModuleIdentities": [{"id": "TDX_01", **_module(), "tcbLevels": _svn_levels(SVN_LADDER)}],
            "tcbLevels": [level.document() for level in self.levels],
        }


def _module() -> dict[str, object]:
    return {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}


@frozen(kw_only=True)
class QeIdentity(Statement):
    """The identity of the quoting enclave for TDs."""

    id: str = "TD_QE"
    version: int = 2
    mr_signer: bytes
    levels: Mapping[str, int] = field(factory=lambda: SVN_LADDER)

    def members(self) -> dict[str, object]:
        return {
            "tcbEvaluationDataNumber": self.evaluation_number,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": self.mr_signer.hex().upper(),
            "isvprodid": 2,
            "tcbLevels": _svn_levels(self.levels),
        }


def _rfc3339(moment: int) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
