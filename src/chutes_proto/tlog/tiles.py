"""The tree as tiles, c2sp.org/tlog-tiles: 256 hashes each, and bundles of entries beside them.

A tile of level 0 has hashes of leaves; one of a higher level has a hash for each *full* tile below it. The last tile of
a level may be partial. Tiles are never changed but by hashes that are added to a partial one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

from attrs import frozen

from chutes_proto.errors import LogError
from chutes_proto.tlog.merkle import HASH_SIZE, Read, node_hash

WIDTH: Final = 256
"""The hashes of a full tile, and the entries of a full bundle."""
LARGEST_ENTRY: Final = 65_535
"""The most bytes of an entry."""

_FULL: Final = WIDTH * HASH_SIZE
_SMALL: Final = 16 * HASH_SIZE
_LEVELS: Final = 8
"""Levels of the tree in a tile: 256 is 2**8."""

_PATH: Final = re.compile(
    r"tile/(?P<level>entries|0|[1-5][0-9]?|6[0-3]?|[7-9])"
    r"/(?P<number>(?:x[0-9]{3}/){0,5}[0-9]{3})(?:\.p/(?P<width>[1-9][0-9]{0,2}))?"
)


@frozen
class Place:
    """The place of a tile: its level (None: a bundle of entries) and its number; ``width`` is 256 for a full one."""

    level: int | None
    number: int
    width: int = WIDTH

    def __str__(self) -> str:
        """The path of its file, below the log's prefix."""
        *others, last = _thousands(self.number)
        number = "".join(f"x{each:03}/" for each in others) + f"{last:03}"
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{'entries' if self.level is None else self.level}/{number}{partial}"

    @classmethod
    def parse(cls, path: str) -> Place:
        """Read a path. Raises `LogError` for a text that is not the path of a tile."""
        found = _PATH.fullmatch(path)
        if found is None:
            raise LogError("not the path of a tile")
        number = int(re.sub("[x/]", "", found["number"]))
        level = None if found["level"] == "entries" else int(found["level"])
        place = cls(level, number, int(found["width"] or WIDTH))
        if str(place) != path or place.width > WIDTH:  # str: a leading x000, or a width of 256
            raise LogError("not the path of a tile")
        return place


def _thousands(number: int) -> list[int]:
    parts = [number % 1000]
    while number := number // 1000:
        parts.append(number % 1000)
    return parts[::-1]


def places(size: int, since: int = 0) -> list[Place]:
    """The tiles of a tree of ``size`` leaves; of level 0, those from the leaf ``since`` on."""
    found: list[Place] = []
    level, count, first = 0, size, since // WIDTH
    while count:
        full, partial = divmod(count, WIDTH)
        found += (Place(level, number) for number in range(first, full))
        if partial:
            found.append(Place(level, full, partial))
        level, count, first = level + 1, full, 0
    return found


# --- hashes ---

Fetch: TypeAlias = Callable[[int, int], bytes]
"""Returns the hashes of the tile of a level and number, all that there are, one after the other."""


def reader(fetch: Fetch) -> Read:
    """Return a function that reads hashes of subtrees from tiles, each of which is fetched once.

    The function raises `LogError` where a tile lacks a hash.
    """
    kept = lru_cache(64)(fetch)

    def read(level: int, number: int) -> bytes:
        tile_level, within = divmod(level, _LEVELS)
        first = number << within  # in hashes of the tile's level
        tile, at = divmod(first, WIDTH)
        hashes = kept(tile_level, tile)
        some = hashes[at * HASH_SIZE : (at + (1 << within)) * HASH_SIZE]
        if len(some) != HASH_SIZE << within:
            raise LogError(f"tile {Place(tile_level, tile)} lacks a hash")
        return fold(some)

    return read


def needed(compute: Callable[[Read], object]) -> tuple[tuple[int, int], ...]:
    """Return the tiles that a computation reads, by level and number; it must read the same whatever the hashes are."""
    found: dict[tuple[int, int], None] = {}

    def read(level: int, number: int) -> bytes:
        tile_level, within = divmod(level, _LEVELS)
        found[tile_level, (number << within) // WIDTH] = None
        return bytes(HASH_SIZE)

    _ = compute(read)
    return tuple(found)


def fold(hashes: bytes) -> bytes:
    """Return the hash of a whole subtree, from those of its leaves, of which there are a power of two."""
    if len(hashes) > _SMALL:
        return _fold_large(hashes)
    row = [hashes[at : at + HASH_SIZE] for at in range(0, len(hashes), HASH_SIZE)]
    while len(row) > 1:
        row = [node_hash(row[at], row[at + 1]) for at in range(0, len(row), 2)]
    return row[0]


@lru_cache(64)
def _fold_large(hashes: bytes) -> bytes:
    """The same, remembered: a log that grows asks for the subtrees of its last tile again and again."""
    middle = len(hashes) // 2
    return node_hash(fold(hashes[:middle]), fold(hashes[middle:]))


def edge(size: int) -> tuple[Place, ...]:
    """The partial tiles of a tree, the lowest level first: together they have its root hash."""
    levels = ((level, size >> _LEVELS * level) for level in range(_LEVELS))
    return tuple(Place(level, count // WIDTH, count % WIDTH) for level, count in levels if count % WIDTH)


def grow(size: int, partial: Sequence[bytes], leaves: Iterable[bytes]) -> dict[tuple[int, int], bytes]:
    """Add leaves to a tree of ``size``: return every tile that changes, by level and number, with all its hashes.

    ``partial`` are the tiles of `edge`, in its order. Raises `LogError` if they are not.
    """
    held: dict[int, bytes] = {}
    for place, hashes in zip(edge(size), partial, strict=True):
        if len(hashes) != place.width * HASH_SIZE or place.level is None:
            raise LogError(f"tile {place} has {len(hashes)} bytes")
        held[place.level] = hashes
    changed: dict[tuple[int, int], bytes] = {}
    count = size
    for leaf in leaves:
        count += 1
        added, level, number = leaf, 0, (count - 1) // WIDTH
        while True:
            hashes = held.pop(level, b"") + added
            changed[level, number] = hashes
            if len(hashes) < _FULL:
                held[level] = hashes
                break
            added, level, number = fold(hashes), level + 1, number // WIDTH
    return changed


# --- entries ---


def bundle(entries: Iterable[bytes]) -> bytes:
    """Return a bundle of entries, each of at most `LARGEST_ENTRY` bytes, after its length in two bytes."""
    return b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def unbundle(data: bytes) -> tuple[bytes, ...]:
    """Return the entries of a bundle. Raises `LogError` for one that ends within an entry, or has too many."""
    found: list[bytes] = []
    at = 0
    while at < len(data):
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if end > len(data) or len(found) == WIDTH:
            raise LogError("not a bundle of entries: it ends within an entry, or has more than 256")
        found.append(data[at + 2 : end])
        at = end
    return tuple(found)
