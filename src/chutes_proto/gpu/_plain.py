"""Results as plain data, for JSON and for people; bytes are lowercase hex."""

from __future__ import annotations

from typing import Any

from chutes_proto.gpu._chips import board_of, chip_of, driver_rim_id, vbios_rim_id
from chutes_proto.gpu._evidence import DeviceEvidence
from chutes_proto.gpu._policy import DeviceReport
from chutes_proto.gpu._report import parse_report
from chutes_proto.gpu._rim import VerifiedRim
from chutes_proto.gpu._verify import read_leaf
from chutes_proto.quote._terms import rfc3339


def device_fields(report: DeviceReport) -> dict[str, Any]:
    """A report on a device; members that are not known are None."""
    error = report.error
    return {
        "serial_number": report.serial_number,
        "device_id": report.device_id,
        "arch": report.arch,
        "chip": report.chip,
        "driver": report.driver,
        "vbios": report.vbios,
        "mode": report.mode,
        "board": report.board,
        "model": report.model,
        "steps": list(report.steps),
        "fresh": report.is_fresh,
        "reference": report.reference,
        "compared": report.compared,
        "rims": [rim.digest.hex() for rim in report.rims],
        "revocation_checked": report.revocation_checked,
        "mismatches": [
            {
                "index": one.index,
                "source": one.source,
                "expected": [value.hex() for value in one.expected],
                "found": None if one.found is None else one.found.hex(),
                "shared": one.shared,
                "hint": one.hint,
            }
            for one in report.mismatches
        ],
        "code": None if error is None else error.code,
        "error": None if error is None else str(error),
    }


def claimed_fields(evidence: DeviceEvidence) -> dict[str, Any]:
    """The content of a device's evidence, which nothing has verified. Raises `GpuVerificationError`."""
    report, leaf = parse_report(evidence.report), read_leaf(evidence.chain)
    arch, chip = chip_of(leaf.name, report, None)
    board = board_of(report, arch)
    ids = (
        None if report.driver is None or arch == "LS10" else driver_rim_id(arch, chip, report.driver),
        None if report.vbios is None or board is None else vbios_rim_id(arch, board, report.vbios),
    )
    return {
        "serial_number": leaf.serial_number,
        "arch": arch,
        "rim_ids": [one for one in ids if one is not None],
        "nonce": report.nonce.hex(),
        "driver": report.driver,
        "vbios": report.vbios,
        "chip": report.chip,
        "project": report.project,
        "project_sku": report.project_sku,
        "chip_sku": report.chip_sku,
        "mode": report.mode,
        "fwid": None if report.fwid is None else report.fwid.hex(),
        "nvdec": None if report.nvdec is None else report.nvdec.hex(),
        "pdis": [pdi.hex() for pdi in report.pdis],
        "measurements": {str(index - 1): value.hex() for index, value in sorted(report.measurements.items())},
    }


def rim_fields(rim: VerifiedRim) -> dict[str, Any]:
    """A RIM that was verified."""
    return {
        "product": rim.product,
        "version": rim.version,
        "edition": rim.edition,
        "digest": rim.digest.hex(),
        "values": len(rim.values),
        "valid_from": rfc3339(rim.window[0]),
        "valid_until": rfc3339(rim.window[1]),
    }
