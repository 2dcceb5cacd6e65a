"""The public evidence, RIMs and OCSP answers of NVIDIA's devices, as files, and how each is read."""

from __future__ import annotations

import calendar
import time
from typing import Final

from chutes_proto.gpu import DeviceEvidence, Rims, verify_rim
from chutes_proto.gpu._policy import GpuPolicy
from tests.quote.cases import FOLDER

GPU: Final = FOLDER / "gpu"
ABSENT: Final = f"no test vectors: {GPU} is not there"
UNCHECKED: Final = GpuPolicy(measurements="unchecked", revocation="off")
RIMS_ONLY: Final = GpuPolicy(revocation="off")


def at(day: str, hour: int = 12) -> int:
    return calendar.timegm(time.strptime(day, "%Y-%m-%d")) + hour * 3600


COLLECTED_AT: Final = at("2025-08-21")
"""When the OCSP answers about the complete set's device were made."""
RIM_STATUS_AT: Final = at("2025-10-24")
"""When those about its RIMs' signers were."""


def read(name: str) -> bytes:
    return (GPU / name).read_bytes()


def complete_set() -> DeviceEvidence:
    return DeviceEvidence(read("full-report.bin"), read("full-chain.pem"), "HOPPER")


def complete_rims(now: int = COLLECTED_AT) -> Rims:
    return Rims.of(verify_rim(read(f"full-rim-{kind}.xml"), now=now) for kind in ("driver", "vbios"))
