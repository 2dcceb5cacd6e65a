"""A finding of `doctor`."""

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
        """A problem in the form of our errors, "what: why; run command"."""
        what, colon, why = text.partition(": ")
        why, _, remedy = re.sub(r"; run:? ", "\0", why, count=1).partition("\0")
        return cls("problem", what, why, remedy) if colon else cls("problem", "configuration", text)

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}" + (f"; run {self.remedy}" if self.remedy else "")
