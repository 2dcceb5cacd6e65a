"""The state of the copies of audit rows that a store has made as its transactions were committed."""

from __future__ import annotations

from collections import Counter

from attrs import define, field


@define
class Copies:
    """``missed`` counts the lines that a kind of sink did not take, and ``failing`` has the sinks that fail now.

    Of each of these it has the time since when, in unix seconds, and the number of lines that it did not take since.
    """

    missed: Counter[str] = field(factory=Counter[str])
    failing: dict[str, tuple[int, int]] = field(factory=dict[str, tuple[int, int]])
