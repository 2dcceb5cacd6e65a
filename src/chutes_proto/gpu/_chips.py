"""The chips and models that are known here. Keep this table: NVIDIA publishes none.

A chip is told by the device's certificate, a model by the project and SKU that the signed report names. The models are
keys of the key server's GPU table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from chutes_proto.gpu import _steps as steps
from chutes_proto.gpu._report import Report

Arch: TypeAlias = Literal["HOPPER", "BLACKWELL", "LS10"]

_FAMILIES: Final[dict[str, Arch]] = {"GH": "HOPPER", "GB": "BLACKWELL", "LS": "LS10"}
_CHIP: Final = re.compile("([A-Z]{2})_?([0-9]{2,3}[A-Z]?)")

_SWITCH: Final = "5612_0002_890"
"""Project and SKUs of the one switch; its report has none."""

_MODELS: Final = {
    "1010_0200_882": "h100",
    "G520_0200_885": "h100_sxm",
    "G520_0202_885": "h100_sxm",
    "G520_0280_895": "h200",
}
"""By project, project SKU and chip SKU."""


def chip_of(common_name: str, report: Report, arch: str | None) -> tuple[Arch, str]:
    """Architecture and chip of a device whose certificate has this common name (step 9).

    A report of Blackwell may name the chip more exactly than the certificate; ``arch`` is the host's word for it.
    """
    named = _chip(common_name.partition(" ")[0])
    if named is None:
        raise steps.ChipError("device certificate", "it names no chip that is known here", got=common_name)
    found, chip = named
    if report.chip is not None:
        reported = _chip(report.chip)
        if reported is None or reported[0] != found:
            raise steps.ChipError("report", "its chip is not of the certificate's kind", got=report.chip, expected=chip)
        chip = reported[1]
    if arch is not None and arch.upper() != found:
        raise steps.ChipError("evidence", "the host calls the device another kind", got=arch, expected=found)
    return found, chip


def _chip(word: str) -> tuple[Arch, str] | None:
    match = _CHIP.fullmatch(word)
    arch = _FAMILIES.get(match[1]) if match else None
    return None if match is None or arch is None else (arch, match[1] + match[2])


def is_chip(word: object) -> bool:
    """Whether `chip_of` may call a chip this."""
    return isinstance(word, str) and (found := _chip(word)) is not None and found[1] == word


def board_of(report: Report, arch: Arch) -> str | None:
    """Project, project SKU and chip SKU, as RIM ids have them; None if the report lacks one."""
    if arch == "LS10":
        return _SWITCH
    parts = (report.project, report.project_sku, report.chip_sku)
    return "_".join(part.upper() for part in parts if part) if all(parts) else None


def model_of(board: str | None, more: Mapping[str, str]) -> str | None:
    """The key of the GPU table, or None for a board that neither ``more`` nor the table here knows."""
    return None if board is None else more.get(board, _MODELS.get(board))


def driver_rim_id(arch: Arch, chip: str, driver: str) -> str:
    """The id by which NVIDIA's RIM service knows the RIM of a driver."""
    return f"NV_GPU_DRIVER_{chip}_{driver}" if arch == "HOPPER" else f"NV_GPU_CC_DRIVER_{chip}_{driver}"


def vbios_rim_id(arch: Arch, board: str, vbios: str) -> str:
    """The id by which NVIDIA's RIM service knows the RIM of a VBIOS, or of a switch's BIOS."""
    return f"NV_{'SWITCH_BIOS' if arch == 'LS10' else 'GPU_VBIOS'}_{board}_{vbios.replace('.', '').upper()}"
