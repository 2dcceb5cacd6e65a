"""A proof that a log has an entry, which needs nothing else but the log's public key: c2sp.org/tlog-proof@v1."""

from __future__ import annotations

import re
from typing import Final

from attrs import frozen

from chutes_proto.errors import LogError
from chutes_proto.tlog.merkle import MOST_HASHES, leaf_hash, verify_inclusion
from chutes_proto.tlog.notes import LARGEST_NOTE, Checkpoint, Note, Verifier, decode_hash, encode_hash, open_checkpoint

FORM: Final = "c2sp.org/tlog-proof@v1"
LARGEST: Final = 2 * LARGEST_NOTE
"""The most bytes of a proof that is read."""

_INDEX: Final = re.compile(r"index (0|[1-9][0-9]{0,18})")


@frozen
class Proof:
    """The index of an entry, its inclusion proof, and the checkpoint as a note. Extra data is refused."""

    index: int
    path: tuple[bytes, ...]
    note: Note

    def __str__(self) -> str:
        hashes = "".join(f"{encode_hash(each)}\n" for each in self.path)
        return f"{FORM}\nindex {self.index}\n{hashes}\n{self.note}"

    @classmethod
    def parse(cls, data: bytes) -> Proof:
        """Read a proof. Raises `LogError` for bytes that are not one."""
        if len(data) > LARGEST:
            raise LogError(f"a proof of more than {LARGEST} bytes")
        head, _, note = data.partition(b"\n\n")
        try:
            form, *lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError:
            raise LogError("not a tlog-proof") from None
        index = _INDEX.fullmatch(lines[0]) if lines else None
        if form != FORM or index is None:
            raise LogError("not a tlog-proof: its first lines are the form and the index")
        if len(lines) > MOST_HASHES + 1:
            raise LogError(f"a proof of more than {MOST_HASHES} hashes")
        return cls(int(index[1]), tuple(map(decode_hash, lines[1:])), Note.parse(note))

    def verify(self, entry: bytes, verifier: Verifier) -> Checkpoint:
        """Verify that the log of ``verifier`` has this entry; return the checkpoint. Raises `LogError`."""
        checkpoint, _ = open_checkpoint(str(self.note).encode(), verifier)
        verify_inclusion(leaf_hash(entry), self.index, checkpoint.size, self.path, checkpoint.root)
        return checkpoint
