"""Receipts: one entry of the audit log, and the proof that the log has it. Nothing else but the log's key is needed.

A receipt is a JSON object on one line, with the members ``entry`` (the entry's exact text), ``proof`` (a tlog-proof)
and ``receipt`` (the form). It has one spelling, so a receipt with any bit changed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from attrs import frozen

from chutes_proto.errors import LogError
from chutes_proto.tlog.notes import Checkpoint, Verifier
from chutes_proto.tlog.proofs import LARGEST as LARGEST_PROOF
from chutes_proto.tlog.proofs import Proof
from chutes_proto.tlog.tiles import LARGEST_ENTRY

FORM: Final = "chutes-proto receipt 1"
LARGEST: Final = 2 * (LARGEST_ENTRY + LARGEST_PROOF)
"""The most bytes of a receipt that is read."""


@frozen
class Receipt:
    """An entry and its proof, of which nothing is verified yet."""

    entry: str
    proof: Proof

    def to_bytes(self) -> bytes:
        """The receipt as a file has it."""
        members = {"entry": self.entry, "proof": str(self.proof), "receipt": FORM}
        return json.dumps(members, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Read a receipt. Raises `LogError` for bytes that are not one."""
        if len(data) > LARGEST:
            raise LogError(f"a receipt of more than {LARGEST} bytes")
        try:
            members: dict[str, Any] = json.loads(data)
            made = cls(members["entry"], Proof.parse(members["proof"].encode()))
            is_whole = made.to_bytes() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise LogError("not a receipt") from None
        if not is_whole:
            raise LogError("not a receipt: it is not written as one")
        return made

    def verify(self, verifiers: Sequence[Verifier]) -> Checkpoint:
        """Verify that a log of one of these keys has the entry; return the checkpoint. Raises `LogError`."""
        signed = {(each.name, each.identifier) for each in self.proof.note.signatures}
        for verifier in verifiers:
            if (verifier.name, verifier.identifier) in signed:
                return self.proof.verify(self.entry.encode(), verifier)
        raise LogError("its checkpoint is not signed by a key of this log")
