"""The number of transactions that run at once, which conflicts lower and commits raise again.

PostgreSQL notes what a transaction reads by whole pages of indexes, so transactions of unrelated VMs conflict where
their rows are neighbours: the more run at once, the more are rolled back, and each that is has to run again. Without a
limit a herd of boots then does mostly work that is thrown away.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

_RISE: Final = 0.03
"""Added for each commit."""
_FALL: Final = 0.5
"""The factor of each conflict. In balance a limit of n then has about one conflict in 16 * n commits."""


@define
class Crowding:
    """How many transactions may run at once: from one to ``most``."""

    most: int
    _limit: float = field(init=False, default=2.0)

    def __attrs_post_init__(self) -> None:
        self._limit = min(self._limit, self.most)

    @property
    def allowed(self) -> int:
        """So many may run now."""
        return int(self._limit)

    def committed(self) -> None:
        """Note a transaction that was committed."""
        self._limit = min(self._limit + _RISE, self.most)

    def conflicted(self) -> None:
        """Note one that was rolled back because of another."""
        self._limit = max(self._limit * _FALL, 1.0)
