"""A finding of `doctor` and of `serve --check`."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from attrs import frozen

State: TypeAlias = Literal["ok", "note", "problem"]


@frozen
class Finding:
    """One thing that was looked at, and the command that mends it."""

    state: State
    what: str
    detail: str
    remedy: str = ""

    @classmethod
    def of_problem(cls, text: str) -> Finding:
        """A problem in the form of our errors, "what: why; run command"; of one in backticks the text may go on."""
        what, colon, why = text.partition(": ")
        if not colon:
            return cls("problem", "configuration", text)
        if (quoted := re.search(r"; run `([^`]+)`", why)) is not None:
            return cls("problem", what, why[: quoted.start()] + why[quoted.end() :], quoted[1])
        why, _, remedy = re.sub(r"; run:? ", "\0", why, count=1).partition("\0")
        return cls("problem", what, why, remedy)

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}" + (f"; run {self.remedy}" if self.remedy else "")
