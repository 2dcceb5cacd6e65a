"""Log records as values. A flow makes them, a binding prints them; nothing secret is ever a field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import TypeAlias

from attrs import field, frozen

Value: TypeAlias = "str | int | float | bool | None | list[str]"


class Level(IntEnum):
    """Severities, with the numbers of the standard library's ``logging``."""

    DEBUG = 10
    INFO = 20
    WARNING = 30
    ERROR = 40


@frozen
class Record:
    """One thing that happened: a snake_case ``event`` and its fields, in the order in which they are printed."""

    level: Level
    event: str
    fields: Mapping[str, Value] = field(factory=dict[str, "Value"])

    def as_json(self, at: str) -> str:
        """One line of JSON without its line end; ``at`` is the time as it shall be printed."""
        line = {"at": at, "level": self.level.name.lower(), "event": self.event, **self.fields}
        return json.dumps(line, separators=(",", ":"))
