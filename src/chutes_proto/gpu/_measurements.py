"""Compare a report's measurements with reference values, and tell every difference.

Rules kept here:

* a RIM's index is one less than a report's: here, and in all texts, indexes are the RIM's;
* each active reference value counts, but for index 35 while the report says that the video decoder is disabled;
* a measurement that the report lacks is a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from attrs import evolve

from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._findings import Mismatch, Source
from chutes_proto.gpu._report import Report

NVDEC_INDEX: Final = 35
_DISABLED, _ENABLED = b"\x55", b"\xaa"


def differences(report: Report, values: Mapping[int, tuple[bytes, ...]], source: Source) -> tuple[Mismatch, ...]:
    """All measurements that differ from their reference values."""
    exempt = {NVDEC_INDEX} if report.nvdec == _DISABLED else set[int]()
    return tuple(
        Mismatch(index, source, expected, report.measurements.get(index + 1))
        for index, expected in sorted(values.items())
        if index not in exempt and report.measurements.get(index + 1) not in expected
    )


def check_nvdec(report: Report) -> None:
    """Step 28: a GPU's decoder is in one of the two states that there are; a report may lack the state."""
    if report.nvdec not in (None, _DISABLED, _ENABLED):
        raise steps.NvdecStatusError("report", "the state of the decoder is not known", got=report.nvdec)


def told_beside(mismatches: Iterable[Mismatch], others: Iterable[Report]) -> tuple[Mismatch, ...]:
    """The differences, each with whether the reports of comparable devices agree with it."""
    reports = tuple(others)
    return tuple(
        evolve(one, shared=all(other.measurements.get(one.index + 1) == one.found for other in reports))
        if reports
        else one
        for one in mismatches
    )
