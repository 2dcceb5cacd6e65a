"""The table of GPUs that may be declared, and the check of a declaration against it.

Rules kept here:

* a declaration must have the model, memory, processors, threads and clock of its ``gpu_identifier`` in the table or the
  configuration;
* a server has 1 to 10 GPUs, as many as there are indexes, and none twice: no evidence is needed for them, and a list of
  all is one transaction;
* facts that a declaration leaves out are filled in from the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import attrs
from attrs import frozen

from chutes_proto.errors import BadRequest
from chutes_proto.store._rows import GpuRow
from chutes_proto.wire import json
from chutes_proto.wire.codes import Code
from chutes_proto.wire.miners import NodeArgs

_UUID: Final = re.compile(r"[!-~]{1,128}")
_TEXT: Final = re.compile(r"[ -~]{1,256}")
_MOST: Final = 10


@frozen
class Gpu:
    """The facts of one kind; ``model`` is a regular expression that is found in its name."""

    model: str
    memory_gb: int
    processors: int
    max_threads_per_processor: int
    clock_base_mhz: int
    clock_boost_mhz: int


GPUS: Final = {
    "3090": Gpu(r"RTX 3090", 24, 82, 1536, 1395, 1695),
    "4090": Gpu(r"RTX 4090", 24, 128, 1536, 2235, 2520),
    "5090": Gpu(r"RTX 5090", 32, 170, 1536, 2017, 2407),
    "a4000": Gpu(r"RTX A4000(?! Ada)", 16, 48, 1536, 765, 1560),
    "a4000_ada": Gpu(r"RTX 4000 Ada", 20, 48, 1536, 765, 2175),
    "a5000": Gpu(r"RTX A5000", 24, 64, 1536, 1170, 1695),
    "a6000": Gpu(r"RTX A6000(?! Ada)", 48, 84, 1536, 1455, 1860),
    "a6000_ada": Gpu(r"RTX 6000 Ada", 48, 142, 1536, 915, 2505),
    "pro_6000": Gpu(r"RTX PRO 6000", 96, 188, 1024, 1590, 2617),
    "l4": Gpu(r"L4(?!0)", 24, 58, 1536, 795, 2040),
    "a10": Gpu(r"A10(?!0)(?!G)", 24, 72, 1536, 1110, 1710),
    "a40": Gpu(r"A40", 48, 84, 1536, 1305, 1740),
    "l40": Gpu(r"L40(?!S)", 48, 142, 1536, 735, 2490),
    "l40s": Gpu(r"L40S", 48, 142, 1536, 1065, 2520),
    "a100_40gb": Gpu(r"A100.?PCIE.?40GB", 40, 108, 2048, 1065, 1410),
    "a100_40gb_sxm": Gpu(r"A100.?SXM.?.?40GB", 40, 108, 2048, 1065, 1410),
    "a100": Gpu(r"A100.?80GB.?PCIe", 80, 108, 2048, 1065, 1410),
    "a100_sxm": Gpu(r"A100.?SXM.?.?80GB", 80, 108, 2048, 1275, 1410),
    "h100": Gpu(r"H100.*PCIe", 80, 114, 2048, 1095, 1755),
    "h100_nvl": Gpu(r"H100.*NVL", 96, 132, 2048, 1590, 1980),
    "h100_sxm": Gpu(r"H100.*HBM3", 80, 132, 2048, 1590, 1980),
    "h800": Gpu(r"H800.*PCIe", 80, 114, 2048, 1095, 1755),
    "h20": Gpu(r" H20$", 96, 78, 1024, 1590, 1980),
    "h200": Gpu(r" H200", 140, 132, 2048, 1590, 1980),
    "mi300x": Gpu(r"gfx942:sramecc", 192, 304, 256, 1600, 2100),
    "b200": Gpu(r" B200", 192, 148, 1024, 1590, 1965),
}
"""By ``gpu_identifier``. A configuration may have more: b300, for one, whose facts the published table lacked."""


def check_nodes(server_id: str, gpus: Sequence[NodeArgs], table: Mapping[str, Gpu]) -> tuple[GpuRow, ...]:
    """The rows of a server's declared GPUs. Raises `BadRequest`, which names the first wrong one and its problems."""
    if not 1 <= len(gpus) <= _MOST:
        raise _invalid(f"gpus must name 1 to {_MOST}")
    if len({gpu.uuid.lower() for gpu in gpus}) != len(gpus):
        raise _invalid("gpus: a uuid is given twice")
    return tuple(_row(server_id, index, gpu, table) for index, gpu in enumerate(gpus))


def _row(server_id: str, index: int, args: NodeArgs, table: Mapping[str, Gpu]) -> GpuRow:
    gpu = table.get(args.gpu_identifier)
    if gpu is None:
        raise _invalid(f"gpus.{index}: gpu_identifier is not in the GPU table")
    if wrong := _problems(args, gpu):
        raise _invalid(f"gpus.{index}: {', '.join(wrong)}")
    filled = attrs.evolve(args, processors=gpu.processors, max_threads_per_processor=gpu.max_threads_per_processor)
    declared = json.encode(attrs.asdict(filled)).decode("ascii")
    return GpuRow(args.uuid.lower(), server_id, args.gpu_identifier, declared)


def _problems(args: NodeArgs, gpu: Gpu) -> list[str]:
    """The members that differ from the table, or that no GPU could have."""
    clock, base, boost = args.clock_rate / 1000, gpu.clock_base_mhz, gpu.clock_boost_mhz
    threads = gpu.max_threads_per_processor
    parts = [part for part in (args.major, args.minor) if part is not None]
    checks = {
        "uuid is not 1 to 128 visible ASCII characters": _UUID.fullmatch(args.uuid),
        "name is not that of the model": _TEXT.fullmatch(args.name) and re.search(gpu.model, args.name),
        f"memory is not {gpu.memory_gb} GB": gpu.memory_gb - 1 <= args.memory // 10**9 <= gpu.memory_gb * 1.024**3 + 1,
        f"processors is not {gpu.processors}": args.processors in (None, gpu.processors),
        f"max_threads_per_processor is not {threads}": args.max_threads_per_processor in (None, threads),
        f"clock_rate is not {base} to {boost} MHz": base <= clock <= boost * 1.1,
        f"device_index is not 0 to {_MOST - 1}": 0 <= args.device_index < _MOST,
        "major or minor is not 0 to 99": all(0 <= part <= 99 for part in parts),
        "verification_host is not 1 to 256 ASCII characters": _TEXT.fullmatch(args.verification_host),
        "verification_port is not 80 to 65535": 80 <= args.verification_port <= 65535,
    }
    return [text for text, holds in checks.items() if not holds]


def _invalid(text: str) -> BadRequest:
    return BadRequest(Code.GPU_INVALID, text)
