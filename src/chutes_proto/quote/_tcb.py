"""Find the TCB level that a platform reaches, and the status that follows from it.

Rules kept here, with the numbers of the steps:

* 34: the TDX module is the one that Intel names for its major version, signed by the named signer; its SEAM attributes
  are zero;
* 35: the platform's level is the best one of which it reaches every SGX component, the PCESVN and, for a TD, every TDX
  component; the first two TDX components are the module's own and do not count once modules have identities. Module
  and quoting enclave have levels of their own;
* 36: nothing that is reached is revoked, at launch or now;
* an outdated module or quoting enclave makes the platform outdated; otherwise the platform's status stands;
* a TD of TDX 1.5 reports the TCB at launch and the present one: what was outdated at launch and is not so now is cured
  by a relaunch.

Source: Intel's Quote Verification Library (``QuoteVerifier``); Intel TDX DCAP Quote Generation Library and Quote
Verification Library, "TCB level".
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import ge
from typing import Final

from msgspec import Struct

from chutes_proto.quote import _steps as steps
from chutes_proto.quote._layout import SgxReport, TdReport10, TdReport15
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._statements import ModuleIdentity, QeIdentity, Stated, SvnLevel, TcbInfo, TcbStatus

OUT_OF_DATE: Final = frozenset({TcbStatus.OUT_OF_DATE, TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED})
_NEEDS_CONFIGURATION: Final = frozenset(
    {
        TcbStatus.CONFIGURATION_NEEDED,
        TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
    }
)


class TcbAssessment(Struct, frozen=True):
    """The result of the TCB levels. ``status`` is that of all of them; the parts are those at launch.

    ``current`` is the status of the present TCB where the report has one. ``date`` (unix seconds) is the earliest of
    the levels', ``advisory_ids`` are those of all of them, once each; ``current_advisory_ids`` those at present.
    """

    status: TcbStatus
    current: TcbStatus | None
    platform: Stated
    module: Stated | None
    qe: Stated
    date: int
    advisory_ids: tuple[str, ...]
    current_advisory_ids: tuple[str, ...]


def assess(
    info: TcbInfo, identity: QeIdentity, pck: PckIdentity, body: TdReport10 | SgxReport, qe_report: SgxReport
) -> TcbAssessment:
    """Assess a platform's TCB (steps 34 to 36). Raises `VerificationError`."""
    svn = None
    if not isinstance(body, SgxReport):
        svn = body.tee_tcb_svn
        _check_module(info, body)  # 34
    platform, module = _levels(info, pck, svn, "")  # 35
    qe = _svn_level(identity.levels, qe_report.isv_svn, "quoting enclave")
    _check_not_revoked(platform, module, qe, "")  # 36
    status = _converge(platform, module, qe)
    current = None
    advisories_now: tuple[str, ...] = ()
    if isinstance(body, TdReport15):
        platform_now, module_now = _levels(info, pck, body.tee_tcb_svn_2, " at present")
        _check_not_revoked(platform_now, module_now, qe, " at present")
        current = _converge(platform_now, module_now, qe)
        status = _relaunch(status, current)
        advisories_now = _advisories(platform_now, module_now, qe)
    parts = (platform, qe) if module is None else (platform, module, qe)
    date = min([part.date for part in parts])
    advisories = _advisories(platform, module, qe)
    return TcbAssessment(status, current, platform, module, qe, date, advisories, advisories_now)


def _advisories(platform: Stated, module: Stated | None, qe: Stated) -> tuple[str, ...]:
    parts = (platform, qe) if module is None else (platform, module, qe)
    return tuple(dict.fromkeys([advisory for part in parts for advisory in part.advisory_ids]))


def _module_identity(info: TcbInfo, major: int) -> ModuleIdentity | None:
    """The identity of a module by its major version; before version 1 there was one module without levels."""
    return info.modules.get(f"TDX_{major:02X}") if major else info.module


def _check_module(info: TcbInfo, body: TdReport10) -> None:
    major = body.tee_tcb_svn[1]
    identity = _module_identity(info, major)
    if identity is None:  # 34
        raise steps.TdxModuleMismatchError("TDX module", f"the TCB info lacks the identity TDX_{major:02X}")
    if body.mr_signer_seam != identity.mr_signer:  # 34
        raise steps.TdxModuleMismatchError(
            "TDX module", "MRSIGNERSEAM does not match", got=body.mr_signer_seam, expected=identity.mr_signer
        )
    if body.seam_attributes != 0 or identity.attributes != 0:  # 34
        got, expected = f"0x{body.seam_attributes:x}", f"0 and an identity with 0x{identity.attributes:x} = 0"
        raise steps.TdxModuleMismatchError("TDX module", "the SEAM attributes are not zero", got=got, expected=expected)


def _levels(info: TcbInfo, pck: PckIdentity, svn: bytes | None, when: str) -> tuple[Stated, Stated | None]:
    """The level of the platform and, for a TD whose module has an identity, that of the module."""
    module = None
    start = 0
    if svn is not None and svn[1] > 0:
        start = 2
        identity = _module_identity(info, svn[1])
        if identity is None:  # 35
            raise steps.TcbNotSupportedError(f"TDX module{when}", f"the TCB info lacks the identity TDX_{svn[1]:02X}")
        module = _svn_level(identity.levels, svn[0], f"TDX module{when}")
    components, tdx = pck.components, b"" if svn is None else svn[start:]
    for level in info.levels:
        if (
            pck.pce_svn >= level.pce_svn
            and all(map(ge, components, level.sgx))
            and all(map(ge, tdx, level.tdx[start:]))
        ):
            return level.stated, module
    got = f"CPUSVN {pck.cpu_svn.hex()}, PCESVN {pck.pce_svn}" + ("" if svn is None else f", TEE_TCB_SVN {svn.hex()}")
    raise steps.TcbNotSupportedError(f"platform{when}", "it reaches no TCB level", got=got)  # 35


def _svn_level(levels: Iterable[SvnLevel], svn: int, subject: str) -> Stated:
    for level in levels:
        if svn >= level.svn:
            return level.stated
    raise steps.TcbNotSupportedError(subject, "it reaches no TCB level", got=f"SVN {svn}")  # 35


def _check_not_revoked(platform: Stated, module: Stated | None, qe: Stated, when: str) -> None:
    for subject, stated in (("platform", platform), ("TDX module", module), ("quoting enclave", qe)):
        if stated is not None and stated.status is TcbStatus.REVOKED:  # 36
            raise steps.TcbRevokedError(subject + when, "its TCB level is revoked")


def _converge(platform: Stated, module: Stated | None, qe: Stated) -> TcbStatus:
    status = platform.status
    if qe.status is not TcbStatus.OUT_OF_DATE and (module is None or module.status is not TcbStatus.OUT_OF_DATE):
        return status
    if status in _NEEDS_CONFIGURATION:
        return TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED
    return TcbStatus.OUT_OF_DATE


def _relaunch(launch: TcbStatus, current: TcbStatus) -> TcbStatus:
    if launch not in OUT_OF_DATE or current in OUT_OF_DATE:
        return launch
    if launch in _NEEDS_CONFIGURATION or current in _NEEDS_CONFIGURATION:
        return TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    return TcbStatus.TD_RELAUNCH_ADVISED
