"""A proof that a log has an entry, which needs nothing else but the log's public key: c2sp.org/tlog-proof@v1."""

from __future__ import annotations

import base64
from typing import Final

from attrs import frozen

from chutes_proto.tlog.notes import Note

FORM: Final = "c2sp.org/tlog-proof@v1"


@frozen
class Proof:
    """An entry and its index, the inclusion proof, and the checkpoint as a note. The entry is the form's extra data."""

    entry: bytes
    index: int
    path: tuple[bytes, ...]
    note: Note

    def __str__(self) -> str:
        extra, *hashes = (base64.b64encode(each).decode("ascii") for each in (self.entry, *self.path))
        lines = "".join(f"{each}\n" for each in hashes)
        return f"{FORM}\nextra {extra}\nindex {self.index}\n{lines}\n{self.note}"
