"""Log records as values. A flow makes them, a driver prints them; no field ever holds a secret."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Final, TypeAlias

from attrs import field, frozen

__all__ = ["LONGEST", "Level", "Record", "Value"]

Value: TypeAlias = "str | int | float | bool | None | list[str]"
"""A value of a log record, as JSON has it."""

LONGEST: Final = 4096
"""How many characters of a text, or of all texts of a list, are printed: a peer may choose their length."""


class Level(IntEnum):
    """Severities, with the numbers of the standard library's ``logging``."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


@frozen
class Record:
    """One event: its name in snake_case, and its fields in the order in which they are printed.

    ``is_noise``: a stranger may cause any number of such records, so they are the first to be dropped.
    """

    level: Level
    event: str
    fields: Mapping[str, Value] = field(factory=dict[str, "Value"])
    is_noise: bool = False

    @classmethod
    def of(cls, level: Level, event: str, **fields: Value) -> Record:
        """Make a record of these fields."""
        return cls(level, event, fields)

    @property
    def shown(self) -> dict[str, Value]:
        """The fields, each no longer than `LONGEST`."""
        return {name: _cut(value) for name, value in self.fields.items()}

    def as_json(self, at: str) -> str:
        """Format as one line of JSON without its line end; ``at`` is the time as it is printed."""
        line = {"at": at, "level": self.level.name.lower(), "event": self.event, **self.shown}
        return _compact(line)


_compact: Final = json.JSONEncoder(separators=(",", ":")).encode  # dumps makes an encoder each time


def _cut(value: Value) -> Value:
    if isinstance(value, str):
        return value if len(value) <= LONGEST else value[:LONGEST] + "…"
    if not isinstance(value, list) or sum(map(len, value)) + len(value) <= LONGEST:
        return value
    kept: list[str] = []
    left = LONGEST
    for text in value:
        left -= len(text) + 1
        if left < 0:
            break
        kept.append(text)
    return [*kept, "…"]
