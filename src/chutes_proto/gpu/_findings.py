"""Findings about a device: measurements without a match, and a policy's reasons."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

from attrs import frozen

Source: TypeAlias = Literal["driver", "vbios", "pinned"]

_HINTS: Final = {
    9: "NVIDIA has signed several RIMs for some VBIOS: get the latest, and see whether other GPUs differ too",
    52: "confidential computing was switched while the host ran: reboot the host",
}


@frozen
class Mismatch:
    """A measurement that has none of its reference values.

    ``index`` is the RIM's, ``source`` the RIM, or the policy's pinned values, that ``expected`` (any of which is good)
    is of; ``found`` is None if the report has no such measurement. ``shared``: all comparable devices of the machine
    have the same value there; None if there are no others.
    """

    index: int
    source: Source
    expected: tuple[bytes, ...]
    found: bytes | None
    shared: bool | None = None

    @property
    def hint(self) -> str | None:
        """A known cause of differences at this index, or None."""
        return _HINTS.get(self.index)

    def __str__(self) -> str:
        found = "nothing" if self.found is None else self.found.hex()
        others = {None: "", True: ", as on all other GPUs", False: ", unlike on other GPUs"}[self.shared]
        hint = "" if self.hint is None else f"; {self.hint}"
        expected = " or ".join(value.hex() for value in self.expected)
        return f"index {self.index} ({self.source}): found {found}{others}, expected {expected}{hint}"


@frozen
class GpuRefusal:
    """One reason why a policy does not accept a genuine device; ``got`` and ``expected`` are texts for people."""

    code: str
    detail: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"{self.code}: {self.detail} (got {self.got}, expected {self.expected})"
