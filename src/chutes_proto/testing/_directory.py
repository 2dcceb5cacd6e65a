"""The files of a simulated platform, as names and bytes: nothing here touches a disk.

There are two kinds of directory. A *platform's* has `PLATFORM_FILE` alone: root, certificates and measurements follow
from the seed, and collateral is made again when it has expired. A *simulation's* has one quote and everything that a
verifier needs.

Rules kept here:

* `PLATFORM_FILE` holds the keys of a root that someone may trust: it is written readable by its owner alone;
* it is read only if it equals, byte for byte, the output of `PlatformRecord.encode`: nothing is understood in part.
"""

from __future__ import annotations

from typing import Final

from attrs import frozen

from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._measurements import Stage
from chutes_proto.testing._platform import SimulatedPlatform
from chutes_proto.wire import json

PLATFORM_FILE: Final = "platform.json"
SEED_SIZE: Final = 32
_FORMAT: Final = 1


@frozen
class PlatformRecord:
    """The content of `PLATFORM_FILE`. ``created`` (unix seconds) is for people: nothing follows from it."""

    seed: bytes
    created: int

    @property
    def platform(self) -> SimulatedPlatform:
        """The first machine of this world."""
        return SimulatedPlatform(self.seed)

    def encode(self) -> bytes:
        return json.encode({"format": _FORMAT, "seed": self.seed.hex(), "created": self.created}) + b"\n"

    @classmethod
    def decode(cls, data: bytes) -> PlatformRecord:
        """Raise `ConfigurationError` for any other data; its text repeats nothing of the file."""
        try:
            match json.decode(data):
                case {"seed": str(seed), "created": int(created)}:
                    record = cls(bytes.fromhex(seed), created)
                    if record.encode() == data and len(record.seed) == SEED_SIZE:
                        return record
                case _:
                    pass
        except ValueError:
            pass
        raise ConfigurationError(
            f"{PLATFORM_FILE} is not a simulated platform of format {_FORMAT}; remove it to get a new one"
        )


def simulation_files(
    platform: SimulatedPlatform, report_data: bytes, *, now: int, stage: Stage = "boot"
) -> dict[str, bytes]:
    """Return a quote over 64 bytes of report data and everything to verify it at ``now``, by file name."""
    return {
        "quote.bin": platform.quote(report_data, stage=stage),
        "collateral.json": platform.collateral_json(now),
        "now.txt": f"{now}\n".encode(),
        "root.der": platform.root_der,
    }
