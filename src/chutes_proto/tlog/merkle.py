"""The Merkle tree of RFC 6962, section 2: root hash, inclusion and consistency proofs, with SHA-256.

Makers of proofs read hashes of *whole* subtrees: ``read(level, number)`` is the hash of the leaves
``number * 2**level`` to ``(number + 1) * 2**level``. All others are computed from these.

Verifiers follow RFC 9162, sections 2.1.3.2 and 2.1.4.2. They raise `LogError`, and return nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from chutes_proto.errors import LogError

HASH_SIZE: Final = 32
"""Bytes of a hash."""
EMPTY_ROOT: Final = hashlib.sha256().digest()
"""The root hash of a tree without leaves."""

Read: TypeAlias = Callable[[int, int], bytes]
"""Returns the hash of a whole subtree by its level and its number from the left."""


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of an entry."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of two subtrees."""
    return hashlib.sha256(b"\1" + left + right).digest()


def root_hash(read: Read, size: int) -> bytes:
    """Return the root hash of the first ``size`` leaves."""
    return _range_hash(read, 0, size) if size else EMPTY_ROOT


def inclusion_proof(read: Read, index: int, size: int) -> tuple[bytes, ...]:
    """Return the proof that the tree of ``size`` leaves has its leaf ``index``; RFC 6962, section 2.1.1.

    Raises `LogError` for an index that such a tree does not have.
    """
    if not 0 <= index < size:
        raise LogError(f"a log of {size} entries has no entry {index}")
    path: list[bytes] = []
    first, last = 0, size
    while last - first > 1:
        middle = first + _left(last - first)
        if index < middle:
            path.append(_range_hash(read, middle, last))
            last = middle
        else:
            path.append(_range_hash(read, first, middle))
            first = middle
    return tuple(reversed(path))


def consistency_proof(read: Read, old: int, new: int) -> tuple[bytes, ...]:
    """Return the proof that the tree of ``new`` leaves begins with that of ``old``; RFC 6962, section 2.1.2.

    It is empty for ``old`` 0. Raises `LogError` if the new tree is the smaller one.
    """
    if not 0 <= old <= new:
        raise LogError(f"a log of {new} entries does not extend one of {old}")
    path: list[bytes] = []
    first, last = 0, new
    while 0 < old < last:
        middle = first + _left(last - first)
        if old <= middle:
            path.append(_range_hash(read, middle, last))
            last = middle
        else:
            path.append(_range_hash(read, first, middle))
            first = middle
    if first:
        path.append(_range_hash(read, first, last))
    return tuple(reversed(path))


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Verify that the tree of ``size`` leaves with this root has ``leaf`` at ``index``. Raises `LogError`."""
    if not 0 <= index < size:
        raise LogError(f"a log of {size} entries has no entry {index}")
    found, node, last = leaf, index, size - 1
    for other in path:
        if not last:
            raise LogError(f"the inclusion proof of entry {index} has too many hashes")
        if node & 1 or node == last:
            found = node_hash(other, found)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            found = node_hash(found, other)
        node, last = node >> 1, last >> 1
    if last:
        raise LogError(f"the inclusion proof of entry {index} has too few hashes")
    if found != root:
        raise LogError(f"the inclusion proof of entry {index} leads to another root than the checkpoint's")


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> None:
    """Verify that the tree of ``new`` leaves begins with the tree of ``old`` leaves. Raises `LogError`."""
    if not 0 <= old <= new:
        raise LogError(f"a log of {new} entries does not extend one of {old}")
    if old in (0, new):
        if path:
            raise LogError(f"the consistency proof from {old} to {new} entries must be empty")
        if old_root != (new_root if old else EMPTY_ROOT):
            raise LogError(f"two logs of {old} entries have different roots")
        return
    hashes = list(path)
    if not old & (old - 1):  # a whole tree is a hash of the proof itself, which leaves it out
        hashes.insert(0, old_root)
    if not hashes:
        raise LogError(f"the consistency proof from {old} to {new} entries has too few hashes")
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    before = after = hashes[0]
    for other in hashes[1:]:
        if not last:
            raise LogError(f"the consistency proof from {old} to {new} entries has too many hashes")
        if node & 1 or node == last:
            before, after = node_hash(other, before), node_hash(other, after)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, other)
        node, last = node >> 1, last >> 1
    if last:
        raise LogError(f"the consistency proof from {old} to {new} entries has too few hashes")
    if before != old_root or after != new_root:
        raise LogError(f"the log of {new} entries does not begin with the one of {old} entries")


def _left(width: int) -> int:
    """The largest power of two that is less than ``width``."""
    return 1 << (width - 1).bit_length() - 1


def _range_hash(read: Read, first: int, last: int) -> bytes:
    """The hash of the leaves ``first`` to ``last``: whole subtrees from left to right, hashed from the right."""
    *others, found = (read(level, number) for level, number in _whole(first, last))
    for left in reversed(others):
        found = node_hash(left, found)
    return found


def _whole(first: int, last: int) -> list[tuple[int, int]]:
    """The whole subtrees that leaves of one subtree consist of, the largest first; ``first`` is where it begins."""
    found: list[tuple[int, int]] = []
    while first < last:
        level = (last - first).bit_length() - 1
        found.append((level, first >> level))
        first += 1 << level
    return found
