"""Requests of a log to a witness, and the answers: c2sp.org/tlog-witness, without I/O.

A witness remembers the newest checkpoint of each log that it knows, and signs (a cosignature) only one that extends it:
so a log that shows different people different entries is found out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from chutes_proto.errors import LogError
from chutes_proto.tlog.merkle import MOST_HASHES
from chutes_proto.tlog.notes import Note, Signature, Verifier, encode_hash

PATH: Final = "add-checkpoint"
"""The path of the request below the witness's prefix, a POST."""
MOST_SIGNATURES: Final = 8
"""The most lines of an answer; a witness may sign with an old and a new key."""
LARGEST_ANSWER: Final = 8 * 1024
"""The most bytes of an answer that is read."""

_SIZE: Final = re.compile(rb"(0|[1-9][0-9]{0,18})\n")


def request_body(old: int, path: Sequence[bytes], note: Note) -> bytes:
    """The body of a request: the size that the witness knows, the proof from there, and the checkpoint."""
    if len(path) > MOST_HASHES:
        raise LogError(f"a proof of more than {MOST_HASHES} hashes")
    hashes = "".join(f"{encode_hash(each)}\n" for each in path)
    return f"old {old}\n{hashes}\n{note}".encode()


def read_size(body: bytes) -> int:
    """The size that a witness knows, from its answer 409. Raises `LogError`."""
    found = _SIZE.fullmatch(body[:LARGEST_ANSWER])
    if found is None:
        raise LogError("the witness names no size of the log that it knows")
    return int(found[1])


def read_cosignature(body: bytes, note: Note, witness: Verifier, now: int) -> Signature:
    """The cosignature of ``witness`` on ``note``, from its answer 200. Raises `LogError` for any other.

    Its time must be within a day of ``now`` (unix seconds).
    """
    if len(body) > LARGEST_ANSWER:
        raise LogError(f"the witness's answer has more than {LARGEST_ANSWER} bytes")
    try:
        lines = body.decode().split("\n")
    except UnicodeDecodeError:
        raise LogError("the witness's answer is not UTF-8") from None
    if lines.pop() or not 1 <= len(lines) <= MOST_SIGNATURES:
        raise LogError("the witness's answer is not one of signature lines")
    for signature in map(Signature.parse, lines):
        if (signature.name, signature.identifier) == (witness.name, witness.identifier):
            at = witness.verify(Note(note.text, (signature,)))
            if at is None or abs(at - now) > _DAY:
                raise LogError(f"{witness.name} signed at {at}, more than a day from {now}")
            return signature
    raise LogError(f"the witness's answer has no signature of {witness.name}")


_DAY: Final = 86_400


def cosigned_by(note: Note, witnesses: Sequence[Verifier]) -> tuple[Verifier, ...]:
    """The witnesses whose signature a note has. Raises `LogError` for one that does not verify."""
    there = {(each.name, each.identifier) for each in note.signatures}
    found = tuple(each for each in witnesses if (each.name, each.identifier) in there)
    for witness in found:
        _ = witness.verify(note)
    return found
