"""How far a platform's TCB is behind: for each part the next level, what it lacks for that, since when, and why.

Rules kept here:

* the next level of a part is the nearest better one with a better status: that is what an update reaches first;
* a part whose status only demands configuration lacks no version: it has no next level, and its advisories say more.

Source: Intel SGX and TDX Provisioning Certification Service API, version 4, "TCB Info V3": ``tcbDate`` is the date of
the newest update that a TCB level has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from msgspec import Struct

from chutes_proto.quote._layout import SgxReport, TdReport10
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._statements import PlatformLevel, QeIdentity, Stated, SvnLevel, TcbInfo, TcbStatus

L = TypeVar("L", PlatformLevel, SvnLevel)

_RANK: Final = {
    TcbStatus.UP_TO_DATE: 0,
    TcbStatus.SW_HARDENING_NEEDED: 1,
    TcbStatus.CONFIGURATION_NEEDED: 2,
    TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED: 3,
    TcbStatus.OUT_OF_DATE: 4,
    TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED: 5,
    TcbStatus.REVOKED: 6,
}
"""Lower is better, of the statuses that a level may have."""


class Lack(Struct, frozen=True):
    """A version that is too low: ``component`` names it, ``got`` is the platform's, ``needed`` that of the level."""

    component: str
    got: int
    needed: int


class Behind(Struct, frozen=True):
    """A part that is behind: ``part`` is "platform", "TDX module" or "quoting enclave".

    ``status`` is that of the level that it reaches, ``next_status`` that of the next level, of which ``lacks`` are the
    versions that it does not have. ``since`` (unix seconds) is the date of that level, and ``advisory_ids`` are those
    that no longer apply there.
    """

    part: str
    status: TcbStatus
    next_status: TcbStatus
    since: int
    lacks: tuple[Lack, ...]
    advisory_ids: tuple[str, ...]


def behind(
    info: TcbInfo,
    identity: QeIdentity,
    pck: PckIdentity,
    body: TdReport10 | SgxReport,
    qe_report: SgxReport,
    reached: tuple[Stated, Stated | None, Stated],
) -> tuple[Behind, ...]:
    """The parts that are behind, at launch; ``reached`` are the levels of platform, TDX module and quoting enclave."""
    platform, of_module, qe = reached
    found: list[Behind] = []
    tdx = b"" if isinstance(body, SgxReport) else body.tee_tcb_svn
    level = _next(info.levels, platform)
    if level is not None:
        lacks = [
            *_components("SGX TCB component", pck.components, level.sgx),
            *_lack("PCESVN", pck.pce_svn, level.pce_svn),
            *_components("TDX TCB component", tdx, level.tdx, start=2 if tdx and tdx[1] else 0),
        ]
        found.append(_behind("platform", platform, level.stated, lacks))
    if of_module is not None:
        found += _of_svn("TDX module", info.modules[f"TDX_{tdx[1]:02X}"].levels, of_module, tdx[0])
    return (*found, *_of_svn("quoting enclave", identity.levels, qe, qe_report.isv_svn))


def _of_svn(part: str, levels: Sequence[SvnLevel], reached: Stated, svn: int) -> list[Behind]:
    level = _next(levels, reached)
    return [] if level is None else [_behind(part, reached, level.stated, _lack("ISVSVN", svn, level.svn))]


def _next(levels: Sequence[L], reached: Stated) -> L | None:
    """The level to reach; ``levels`` are sorted, best first."""
    at = next(number for number, level in enumerate(levels) if level.stated is reached)
    better = (level for level in reversed(levels[:at]) if _RANK[level.stated.status] < _RANK[reached.status])
    return next(better, None)


def _behind(part: str, reached: Stated, wanted: Stated, lacks: list[Lack]) -> Behind:
    gone = tuple(advisory for advisory in reached.advisory_ids if advisory not in wanted.advisory_ids)
    return Behind(part, reached.status, wanted.status, wanted.date, tuple(lacks), gone)


def _components(name: str, got: bytes, needed: bytes, *, start: int = 0) -> list[Lack]:
    numbers = range(start, len(needed))
    return [lack for number in numbers for lack in _lack(f"{name} {number + 1}", got[number], needed[number])]


def _lack(component: str, got: int, needed: int) -> list[Lack]:
    return [Lack(component, got, needed)] if got < needed else []
