"""Receipts: one entry of the audit log, and the proof that the log has it. Nothing else but the log's key is needed.

A receipt is a JSON object on one line, with the members ``entry`` (the entry's exact text), ``proof`` (a tlog-proof)
and ``receipt`` (the form); if the evidence is in it, ``evidence``, an object with each document in base64. It has one
spelling, so a receipt with any bit changed is refused, or is not what the entry names.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import field, frozen

from chutes_proto.errors import LogError
from chutes_proto.tlog.merkle import leaf_hash, verify_inclusion
from chutes_proto.tlog.notes import Checkpoint, Verifier, open_checkpoint
from chutes_proto.tlog.proofs import LARGEST as LARGEST_PROOF
from chutes_proto.tlog.proofs import Proof
from chutes_proto.tlog.tiles import LARGEST_ENTRY

FORM: Final = "chutes-proto receipt 1"
LARGEST: Final = 2 * (LARGEST_ENTRY + LARGEST_PROOF) + 16 * 1024 * 1024
"""The most bytes of a receipt that is read."""


@frozen
class Receipt:
    """An entry, its proof and maybe the evidence, by name, of which nothing is verified yet."""

    entry: str
    proof: Proof
    evidence: Mapping[str, bytes] = field(factory=dict[str, bytes])

    def to_bytes(self) -> bytes:
        """The receipt as a file has it."""
        members: dict[str, object] = {"entry": self.entry, "proof": str(self.proof), "receipt": FORM}
        if self.evidence:
            found = {name: base64.b64encode(self.evidence[name]).decode("ascii") for name in sorted(self.evidence)}
            members = {"entry": self.entry, "evidence": found, "proof": str(self.proof), "receipt": FORM}
        return json.dumps(members, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Read a receipt. Raises `LogError` for bytes that are not one."""
        if len(data) > LARGEST:
            raise LogError(f"a receipt of more than {LARGEST} bytes")
        try:
            members: dict[str, Any] = json.loads(data)
            given: dict[str, str] = members.get("evidence", {})
            evidence = {name: base64.b64decode(text, validate=True) for name, text in given.items()}
            made = cls(members["entry"], Proof.parse(members["proof"].encode()), evidence)
            is_whole = isinstance(members["entry"], str) and made.to_bytes() == data
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise LogError("it is cut off, or another file") from None
        if not is_whole:
            raise LogError("its bytes are not those that a key server writes")
        return made

    def signed(self, verifiers: Sequence[Verifier]) -> Checkpoint:
        """Verify that one of these keys signed the checkpoint; return it. Raises `LogError`."""
        signed = {(each.name, each.identifier) for each in self.proof.note.signatures}
        for verifier in verifiers:
            if (verifier.name, verifier.identifier) in signed:
                checkpoint, _ = open_checkpoint(str(self.proof.note).encode(), verifier)
                break
        else:
            raise LogError("its checkpoint is not signed by a key of this log")
        return checkpoint

    def cosigned(self, witnesses: Sequence[Verifier]) -> tuple[int, ...]:
        """Verify that each of these witnesses signed the checkpoint; return when (unix seconds). Raises `LogError`."""
        times: list[int] = []
        for witness in witnesses:
            at = witness.verify(self.proof.note)
            if at is None:
                raise LogError(f"{witness.name} is not the key of a witness")
            times.append(at)
        return tuple(times)

    def included(self, checkpoint: Checkpoint) -> None:
        """Verify that the log of ``checkpoint`` has the entry. Raises `LogError`."""
        proof = self.proof
        verify_inclusion(leaf_hash(self.entry.encode()), proof.index, checkpoint.size, proof.path, checkpoint.root)

    def verify(self, verifiers: Sequence[Verifier]) -> Checkpoint:
        """Verify that a log of one of these keys has the entry; return the checkpoint. Raises `LogError`."""
        checkpoint = self.signed(verifiers)
        self.included(checkpoint)
        return checkpoint
