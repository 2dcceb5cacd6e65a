"""The content of a verdict, where the parts that it is made of differ: dates, numbers, levels, masks, steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.quote._behind import Lack
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._errors import AppraisalError
from chutes_proto.quote._policy import Policy, TcbPolicy
from chutes_proto.quote._statements import TcbStatus
from chutes_proto.quote._steps import QeIdentityMismatchError, TcbNotSupportedError, TdxModuleMismatchError
from chutes_proto.quote._verify import Verdict, verify_genuine
from chutes_proto.testing._faults import Fault
from chutes_proto.testing._quotes import QuoteDraft
from chutes_proto.testing._statements import PCE_SVN, SGX_COMPONENTS, TcbLevel, tee_tcb_svn
from tests.quote.simulated import NOW, PLATFORM, REPORT_DATA, ROOT, collateral_of, forget, verdict_of

Statement = dict[str, Any]
DAYS = ("2024-02-14T00:00:00Z", "2024-08-14T00:00:00Z", "2025-02-12T00:00:00Z")
SECONDS = dict(zip(DAYS, (1707868800, 1723593600, 1739318400), strict=True))
OUT_OF_DATE = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE})


def _respelled(change: Callable[[Statement], None]) -> Callable[[str], str]:
    def respell(text: str) -> str:
        statement: Statement = json.loads(text)
        change(statement)
        return json.dumps(statement)

    return respell


def _stating(
    info: Callable[[Statement], None] = lambda _: None, identity: Callable[[Statement], None] = lambda _: None
) -> Fault:
    """Intel's statements, signed, with these changes to TCB info and QE identity."""
    return Fault(
        name="stating",
        side="collateral",
        what="other statements",
        tcb_info=lambda draft: evolve(draft, respell=_respelled(info)),
        qe_identity=lambda draft: evolve(draft, respell=_respelled(identity)),
    )


def _quoting(change: Callable[[QuoteDraft], QuoteDraft]) -> Fault:
    return Fault(name="quoting", side="quote", what="another quote", quote=change)


def _dated(platform: str, module: str, qe: str) -> Fault:
    """All levels of the platform, of its TDX module and of its quoting enclave have the dates of these days."""

    def info(statement: Statement) -> None:
        for level in statement["tcbLevels"]:
            level["tcbDate"] = platform
        for level in statement["tdxModuleIdentities"][0]["tcbLevels"]:
            level["tcbDate"] = module

    def identity(statement: Statement) -> None:
        for level in statement["tcbLevels"]:
            level["tcbDate"] = qe

    return _stating(info, identity)


# --- dates and numbers ---


@pytest.mark.parametrize("days", [*permutations(DAYS)])
def test_the_date_is_the_earliest_of_the_parts(days: tuple[str, str, str]) -> None:
    verdict = verdict_of(PLATFORM.having(_dated(*days)))
    assert verdict.module is not None
    assert [part.date for part in (verdict.platform, verdict.module, verdict.qe)] == [SECONDS[day] for day in days]
    assert verdict.tcb_date == SECONDS[DAYS[0]]


@pytest.mark.parametrize("days", [*permutations(DAYS[:2])])
def test_the_date_is_the_earliest_of_both_parts_where_the_module_has_no_level(days: tuple[str, str]) -> None:
    first = _quoting(lambda draft: evolve(draft, body=evolve(draft.body, tee_tcb_svn=tee_tcb_svn(module_version=0))))
    verdict = verdict_of(PLATFORM.having(first, _dated(days[0], DAYS[2], days[1])))
    assert verdict.module is None
    assert [part.date for part in (verdict.platform, verdict.qe)] == [SECONDS[day] for day in days]
    assert verdict.tcb_date == SECONDS[DAYS[0]]


@pytest.mark.parametrize(("info", "identity"), [(17, 18), (18, 17)])
def test_the_evaluation_number_is_the_lower_one(info: int, identity: int) -> None:
    def numbered(number: int) -> Callable[[Statement], None]:
        return lambda statement: statement.update(tcbEvaluationDataNumber=number)

    verdict = verdict_of(PLATFORM.having(_stating(numbered(info), numbered(identity))))
    assert verdict.evaluation_number == 17
    assert (verdict.collateral.tcb_info_number, verdict.collateral.qe_identity_number) == (info, identity)
    assert _refusals(verdict, min_evaluation_number=17, evaluation_numbers="any") == []
    assert _refusals(verdict, min_evaluation_number=18, evaluation_numbers="any") == ["evaluation_number"]
    assert _refusals(verdict, evaluation_numbers="equal") == _refusals(verdict) == ["evaluation_numbers"]


def test_a_rollback_can_be_seen() -> None:
    """All CRLs of one CA may have one number, so their dates are there as well."""
    older, newer = (verdict_of(PLATFORM, now=now).collateral for now in (NOW, NOW + 60))
    assert (older.root_crl_number, older.pck_crl_number) == (newer.root_crl_number, newer.pck_crl_number) == (1, 1)
    for name in ("root_crl_issued", "pck_crl_issued", "tcb_info_issued", "qe_identity_issued"):
        assert (getattr(older, name), getattr(newer, name)) == (NOW, NOW + 60)


def _refusals(verdict: Verdict, **tcb: Any) -> list[str]:
    try:
        _ = Policy(tcb=TcbPolicy(**tcb), measurements="unchecked").appraise(verdict, now=NOW, stage="boot")
    except AppraisalError as exc:
        return [refusal.code for refusal in exc.refusals]
    return []


@pytest.mark.parametrize(
    ("platform", "module", "days", "earliest"),
    [
        ("OutOfDate", "OutOfDate", (DAYS[0], DAYS[1], DAYS[2]), DAYS[0]),
        ("OutOfDate", "OutOfDate", (DAYS[1], DAYS[0], DAYS[2]), DAYS[0]),
        ("OutOfDate", "OutOfDate", (DAYS[2], DAYS[1], DAYS[0]), DAYS[1]),
        ("OutOfDate", "UpToDate", (DAYS[2], DAYS[0], DAYS[1]), DAYS[2]),
        ("UpToDate", "OutOfDate", (DAYS[0], DAYS[2], DAYS[1]), DAYS[2]),
    ],
    ids=["platform first", "module first", "QE first", "only the platform", "only the module"],
)
def test_the_grace_of_a_platform_begins_with_its_first_outdated_part(
    platform: str, module: str, days: tuple[str, str, str], earliest: str
) -> None:
    """A part that is up to date does not count, nor does the quoting enclave, which has a grace of its own."""
    svns = tee_tcb_svn(platform, module=module)
    outdated = _quoting(lambda draft: evolve(draft, body=evolve(draft.body, tee_tcb_svn=svns)))
    verdict = verdict_of(PLATFORM.having("qe_outdated", outdated, _dated(*days)))
    assert verdict.tcb_status == "OutOfDate"
    for name, day in (("platform_grace", earliest), ("qe_grace", days[2])):
        age = NOW - SECONDS[day]
        assert _refusals(verdict, accepted_statuses=OUT_OF_DATE, **{name: age}) == []
        assert _refusals(verdict, accepted_statuses=OUT_OF_DATE, **{name: age - 1}) == [name]


# --- levels and masks ---

LOWER_SGX = (SGX_COMPONENTS[0] - 1, *SGX_COMPONENTS[1:])
TDX = (0, 0, 8, *[0] * 13)
LOWER_TDX = (0, 0, 7, *[0] * 13)


def _levels(*levels: TcbLevel) -> Fault:
    return Fault(
        name="levels", side="collateral", what="other levels", tcb_info=lambda draft: evolve(draft, levels=levels)
    )


def _higher(components: tuple[int, ...], number: int) -> tuple[int, ...]:
    return (*components[:number], components[number] + 1, *components[number + 1 :])


@pytest.mark.parametrize(
    ("sgx", "pce_svn", "tdx"),
    [
        *((_higher(SGX_COMPONENTS, number), PCE_SVN, TDX) for number in range(16)),
        (SGX_COMPONENTS, PCE_SVN + 1, TDX),
        *((SGX_COMPONENTS, PCE_SVN, _higher(TDX, number)) for number in range(2, 16)),
    ],
)
def test_a_level_is_reached_in_all_its_parts(sgx: tuple[int, ...], pce_svn: int, tdx: tuple[int, ...]) -> None:
    missed = TcbLevel(status="UpToDate", sgx=sgx, pce_svn=pce_svn, tdx=tdx)
    reached = TcbLevel(status="OutOfDate", sgx=SGX_COMPONENTS, pce_svn=PCE_SVN, tdx=TDX)
    assert verdict_of(PLATFORM.having(_levels(missed, reached))).tcb_status == "OutOfDate"
    with pytest.raises(TcbNotSupportedError):
        _ = verdict_of(PLATFORM.having(_levels(missed)))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((SGX_COMPONENTS, PCE_SVN, LOWER_TDX), (SGX_COMPONENTS, PCE_SVN - 1, TDX)),
        ((SGX_COMPONENTS, PCE_SVN - 1, TDX), (LOWER_SGX, PCE_SVN, TDX)),
        ((SGX_COMPONENTS, PCE_SVN, LOWER_TDX), (LOWER_SGX, PCE_SVN, TDX)),
        ((SGX_COMPONENTS, PCE_SVN, TDX), (SGX_COMPONENTS, PCE_SVN, LOWER_TDX)),
    ],
    ids=["PCESVN before TDX", "SGX before PCESVN", "SGX before TDX", "TDX at last"],
)
@pytest.mark.parametrize("better_first", [True, False])
def test_the_best_level_is_the_first_by_sgx_then_pce_then_tdx(
    better: tuple[Any, ...], worse: tuple[Any, ...], better_first: bool
) -> None:
    """The platform reaches both levels; in which order they are stated is nothing."""
    levels = tuple(
        TcbLevel(status=status, sgx=sgx, pce_svn=pce_svn, tdx=tdx)
        for status, (sgx, pce_svn, tdx) in (("SWHardeningNeeded", better), ("ConfigurationNeeded", worse))
    )
    verdict = verdict_of(PLATFORM.having(_levels(*levels[:: 1 if better_first else -1])))
    assert verdict.tcb_status == "SWHardeningNeeded"
    assert verdict.advisory_ids == ("SIMULATED-SA-SWHardeningNeeded",)


def test_a_platform_lacks_nothing_that_its_module_has_levels_for() -> None:
    """The first two TDX components are the module's own."""
    better = TcbLevel(status="UpToDate", sgx=SGX_COMPONENTS, pce_svn=PCE_SVN, tdx=(9, 9, 9, *TDX[3:]))
    reached = TcbLevel(status="OutOfDate", sgx=SGX_COMPONENTS, pce_svn=PCE_SVN, tdx=TDX)
    (behind,) = verdict_of(PLATFORM.having(_levels(better, reached))).behind()
    assert behind.lacks == (Lack("TDX TCB component 3", 8, 9),)


MASKS = {
    "misc_select": ("miscselect", {"mask": "FEFFFFFF", "inside": "00000000", "outside": "01000000"}),
    "attributes": (
        "attributes",
        {
            "mask": "FBFFFFFFFFFFFFFF0000000000000000",
            "inside": "11000000000000000000000000000000",
            "outside": "15000000000000000000000000000000",
        },
    ),
}


@pytest.mark.parametrize("field", MASKS)
@pytest.mark.parametrize("reported", ["inside", "outside"])
def test_only_what_is_reported_is_masked(field: str, reported: str) -> None:
    """A bit outside the mask may be as it likes in the report, but an identity that expects it fits no enclave."""
    name, values = MASKS[field]
    value = bytes.fromhex(values[reported])
    report: Any = int.from_bytes(value, "little") if field == "misc_select" else value
    enclave = _quoting(lambda draft: evolve(draft, qe_report=evolve(draft.qe_report, **{field: report})))

    def expecting(what: str) -> Fault:
        changes = {name: values[what], f"{name}Mask": values["mask"]}
        return _stating(identity=lambda statement: statement.update(changes))

    assert verdict_of(PLATFORM.having(enclave, expecting("inside"))).tcb_status == "UpToDate"
    with pytest.raises(QeIdentityMismatchError, match=field.replace("_", "").upper()):
        _ = verdict_of(PLATFORM.having(enclave, expecting("outside")))


def test_an_identity_of_a_module_with_seam_attributes_fits_none() -> None:
    def info(statement: Statement) -> None:
        statement["tdxModuleIdentities"][0]["attributes"] = "0100000000000000"

    with pytest.raises(TdxModuleMismatchError, match="SEAM attributes are not zero"):
        _ = verdict_of(PLATFORM.having(_stating(info)))


# --- steps ---

ALL_STEPS = tuple(number for number in range(1, 38) if number != 26)
"""Without a PCK chain beside the collateral."""


def _without_root(collateral: Collateral) -> Collateral:
    names = ("pck_crl_issuer_chain", "tcb_info_issuer_chain", "qe_identity_issuer_chain")
    ends = b"-----END CERTIFICATE-----\n"
    return evolve(collateral, **{name: getattr(collateral, name).split(ends)[0] + ends for name in names})


def test_a_root_that_no_chain_brings_is_not_checked() -> None:
    bare = Fault(name="bare", side="certificates", what="no root", pck_chain=lambda chain: chain[:2])
    for platform, steps in ((PLATFORM, ALL_STEPS), (PLATFORM.having(bare), tuple(n for n in ALL_STEPS if n != 6))):
        forget()
        for _ in range(2):  # made, then remembered
            collateral = _without_root(collateral_of(platform))
            quote = platform.quote(REPORT_DATA)
            verdict = verify_genuine(quote, collateral, now=NOW, report_data=REPORT_DATA, root=ROOT)
            assert verdict.steps == steps
