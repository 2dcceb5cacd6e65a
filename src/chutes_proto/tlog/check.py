"""The check of a whole log: entries against the tiles, tiles against each other, all against signed checkpoints.

A change of an entry alone is found by its index; one that is carried into its tile, by the tile. A change that is
carried into all tiles contradicts the first checkpoint after it: then it lies after the checkpoint before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Final

from attrs import define, evolve, field, frozen

from chutes_proto._proof import NoTruthValue
from chutes_proto.errors import LogError
from chutes_proto.tlog.merkle import HASH_SIZE, leaf_hash, root_hash
from chutes_proto.tlog.notes import Checkpoint
from chutes_proto.tlog.tiles import WIDTH, Fetch, Place, fold, reader

MOST_FINDINGS: Final = 1000


@frozen
class Finding:
    """A fault in the entries from ``first`` to ``last``, both included."""

    first: int
    last: int
    what: str

    def __str__(self) -> str:
        entries = f"entry {self.first}" if self.first == self.last else f"entries {self.first} to {self.last}"
        return f"{entries}: {self.what}"


@frozen
class Report(NoTruthValue):
    """The outcome of a check: the number of entries of the log, the first that is there, and what is wrong."""

    size: int
    first: int
    findings: tuple[Finding, ...]

    def beside(self, kept: Iterable[Checkpoint]) -> Report:
        """Require that one of the checkpoints that were ``kept`` elsewhere, if any, is newer than the last purge.

        Otherwise a log that was rewritten, with an entry by which its beginning was purged, would pass.
        """
        newest = max((each.size for each in kept), default=self.first)
        if newest >= self.first:
            return self
        what = f"purged: the checkpoint of {newest} entries cannot be compared; name one of {self.first} or more"
        return evolve(self, findings=(*self.findings, Finding(0, max(0, newest - 1), what)))


def check_log(
    size: int,
    entries: Iterable[tuple[int, bytes]],
    fetch: Fetch,
    checkpoints: Iterable[Checkpoint],
    announced: Callable[[bytes], int],
    minimum: int = 0,
    follow: Callable[[bytes], str] = lambda _: "",
    stated: Checkpoint | None = None,
) -> Report:
    """Check a log of ``size`` entries, of which a purge may have deleted the first ones.

    ``entries`` are those that there are, by index. ``announced`` returns the index below which entries are deleted, if
    an entry says so, otherwise 0; ``minimum`` is the one that a later row has announced, which is not an entry yet.
    ``checkpoints`` are verified already; the result is only as good as the newest. ``follow`` gets each entry, and says
    what is wrong with it after those before it. ``stated`` is the state that the store itself has of its log: it counts
    like a checkpoint, and is not called one.
    """
    check = _Check(size, fetch, follow, minimum)
    check.entries(entries, announced)
    check.tiles()
    check.checkpoints(checkpoints, stated)
    return Report(size, check.first, tuple(check.findings))


@define
class _Check:
    size: int
    fetch: Fetch
    follow: Callable[[bytes], str]
    minimum: int
    first: int = 0
    findings: list[Finding] = field(factory=list[Finding])

    def note(self, first: int, last: int, what: str) -> None:
        """Note a fault; one that goes on from the last one is the same."""
        if self.findings:
            before = self.findings[-1]
            if (before.last + 1, before.what) == (first, what):
                self.findings[-1] = Finding(before.first, last, what)
                return
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(first, last, what))

    def entries(self, entries: Iterable[tuple[int, bytes]], announced: Callable[[bytes], int]) -> None:
        """Compare the entries with the tiles of level 0."""
        tile = -1
        self.first = self.size
        for number, group in groupby(entries, key=lambda entry: entry[0] // WIDTH):
            leaves: dict[int, bytes] = {}
            told: dict[int, int] = {}
            for index, text in group:
                if index in leaves:
                    self.note(index, index, "it is there twice")
                leaves[index] = leaf_hash(text)
                told[index] = announced(text)
                if what := self.follow(text):
                    self.note(index, index, what)
            if tile < 0:
                self.first, tile = min(leaves), number
            self._missing(tile, number)
            self._tile(number, leaves, told)
            tile = number + 1
        self._missing(max(tile, self.first // WIDTH), -(-self.size // WIDTH))
        if self.first > self.minimum:
            self.note(self.minimum, self.first - 1, "it is missing, and no entry says that it was purged")

    def _missing(self, tile: int, until: int) -> None:
        """Note that no entry of these tiles is there. A log may say any size: not every tile is looked at."""
        until = min(until, -(-self.size // WIDTH))
        looked = min(until, tile + MOST_FINDINGS)
        for number in range(tile, looked):
            self._tile(number, {}, {})
        if looked < until:
            self.note(looked * WIDTH, min(until * WIDTH, self.size) - 1, "it is missing")

    def _tile(self, number: int, leaves: dict[int, bytes], told: dict[int, int]) -> None:
        """Compare entries with their tile; those that it has excuse what they tell was purged."""
        begin = number * WIDTH
        width = max(0, min(WIDTH, self.size - begin))
        hashes = self._fetched(0, number, width)
        for index in range(max(begin, self.first), begin + width):
            leaf = leaves.pop(index, None)
            at = (index - begin) * HASH_SIZE
            if leaf is None:
                self.note(index, index, "it is missing")
            elif leaf != hashes[at : at + HASH_SIZE]:
                self.note(index, index, "it was changed, or its tile was")
            else:
                self.minimum = max(self.minimum, told[index])
        for index in leaves:
            self.note(index, index, f"it is not below the size of the log, {self.size}")

    def _fetched(self, level: int, number: int, width: int) -> bytes:
        """The hashes of a tile, which must have ``width``."""
        hashes = self.fetch(level, number)
        if len(hashes) != width * HASH_SIZE:
            span = WIDTH**level
            begin = number * WIDTH * span
            last = max(begin, min(begin + width * span, self.size) - 1)
            self.note(begin, last, f"tile {Place(level, number)} has {len(hashes) // HASH_SIZE} hashes, not {width}")
        return hashes

    def tiles(self) -> None:
        """Compare each full tile with the hash above it."""
        level, first = 0, -(-self.first // WIDTH)
        while count := self.size >> 8 * (level + 1):
            above, number_above, absent = b"", -1, 0
            span = WIDTH ** (level + 1)
            for number in range(first, count):
                if number // WIDTH != number_above:
                    number_above = number // WIDTH
                    above = self._fetched(level + 1, number_above, min(WIDTH, count - number_above * WIDTH))
                at = number % WIDTH * HASH_SIZE
                hashes = self.fetch(level, number)
                absent += not hashes
                if absent > MOST_FINDINGS:  # a log may say any size; the tiles of missing entries are told already
                    break
                is_full = len(hashes) == WIDTH * HASH_SIZE
                if is_full and fold(hashes) != above[at : at + HASH_SIZE]:
                    what = f"tile {Place(level, number)} contradicts the tile above it"
                    self.note(number * span, (number + 1) * span - 1, what)
            level, first = level + 1, 0

    def checkpoints(self, checkpoints: Iterable[Checkpoint], stated: Checkpoint | None) -> None:
        """Compare the root of each checkpoint, and of the log's own state, with the root that the tiles have."""
        read = reader(self.fetch)
        good = self.first
        named = dict.fromkeys([] if stated is None else [stated], _STATED) | dict.fromkeys(checkpoints, _CHECKPOINT)
        for checkpoint, name in sorted(named.items(), key=lambda each: (each[0].size, each[1])):
            size = checkpoint.size
            if size > self.size:
                what = f"some are missing: a checkpoint of {size} entries is signed, and the log has {self.size}"
                self.note(good, size - 1, what)
                return
            if size < self.first:
                continue
            try:
                is_same = root_hash(read, size) == checkpoint.root
            except LogError as exc:
                self.note(good, max(good, size - 1), f"the root of {name} of {size} entries: {exc}")
                return
            if not is_same:
                self.note(good, max(good, size - 1), f"one of them is not as {name} of {size} entries has it")
                return
            good = size


_CHECKPOINT: Final = "the checkpoint"
_STATED: Final = "the store's own state"
"""Of two of one size, the checkpoint comes first: it was outside the store."""
