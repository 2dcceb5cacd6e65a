"""Every single edit of a log of 1,000 entries is found, in the entry alone or carried into the tree as well."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Final, TypeAlias

import pytest

from chutes_proto.tlog import merkle, tiles
from chutes_proto.tlog.check import Finding, Report, check_log
from chutes_proto.tlog.merkle import leaf_hash
from chutes_proto.tlog.notes import Checkpoint

SIZE: Final = 1000
STRIDE: Final = 1 if os.environ.get("CHUTES_PROTO_SOAK") else 61
INDEXES: Final = sorted({*range(0, SIZE, STRIDE), 1, 255, 256, 767, 768, SIZE - 2, SIZE - 1})
Log: TypeAlias = list[bytes]
Tiles: TypeAlias = dict[tuple[int, int], bytes]


@cache
def honest() -> tuple[bytes, ...]:
    return tuple(f"entry {number}".encode() for number in range(SIZE))


def tree(entries: Log) -> Tiles:
    return tiles.grow(0, [], map(leaf_hash, entries))


@cache
def honest_tree() -> Tiles:
    return tree([*honest()])


@cache
def checkpoints() -> list[Checkpoint]:
    """Of every 100 entries."""
    read = tiles.reader(lambda level, number: honest_tree()[level, number])
    return [Checkpoint("log", size, merkle.root_hash(read, size)) for size in range(100, SIZE + 1, 100)]


def report(entries: list[tuple[int, bytes]], hashes: Tiles, size: int = SIZE) -> Report:
    return check_log(
        size,
        entries,
        lambda level, number: hashes.get((level, number), b""),
        checkpoints(),
        lambda entry: int(entry[7:]) if entry.startswith(b"purged") else 0,
    )


def change(index: int, log: Log) -> Log:
    return [*log[:index], log[index] + b"!", *log[index + 1 :]]


def remove(index: int, log: Log) -> Log:
    return [*log[:index], *log[index + 1 :]]


def swap(index: int, log: Log) -> Log:
    other = (index + 1) % SIZE
    changed = [*log]
    changed[index], changed[other] = log[other], log[index]
    return changed


def double(index: int, log: Log) -> Log:
    return [*log[:index], log[index], *log[index:]]


EDITS = [change, remove, swap, double]


def test_an_honest_log_is_whole() -> None:
    assert report([*enumerate(honest())], honest_tree()) == Report(SIZE, 0, ())


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_an_entry_alone_is_found_by_its_index(edit: Callable[[int, Log], Log]) -> None:
    for index in INDEXES:
        rows = [*enumerate(honest())]
        other = (index + 1) % SIZE
        changed: dict[int, bytes] = {}
        if edit is change:
            changed = {index: rows[index][1] + b"!"}
        elif edit is swap:
            changed = {index: rows[other][1], other: rows[index][1]}
        kept = [(at, changed.get(at, text)) for at, text in rows if edit is not remove or at != index]
        if edit is double:
            kept.insert(index, (index, b"another"))
        found = report(kept, honest_tree()).findings
        assert found, (edit, index)
        assert all(index in range(each.first, each.last + 1) or each.first in (index, other) for each in found)
        assert any(each.first <= index <= each.last for each in found)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_that_is_carried_into_the_whole_tree_is_found_between_two_checkpoints(
    edit: Callable[[int, Log], Log],
) -> None:
    for index in INDEXES[:: 1 if STRIDE == 1 else 3]:
        log = edit(index, [*honest()])
        found = report([*enumerate(log)], tree(log), len(log)).findings
        first = 0 if edit is swap and index == SIZE - 1 else index  # the last and the first are swapped
        assert found, (edit, index)
        assert found[0].first <= first <= found[0].last
        assert found[0].last - found[0].first < 100


def test_an_edit_that_is_carried_into_one_tile_is_found_by_the_tile_above() -> None:
    for index in INDEXES:
        log = change(index, [*honest()])
        hashes = honest_tree() | {(0, index // 256): tree(log)[0, index // 256]}
        (found,) = report([*enumerate(log)], hashes).findings[:1]
        assert found.first <= index <= found.last
        assert found.last - found.first < 256


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (1, 0)])
def test_a_tile_that_is_missing_or_cut_is_found(place: tuple[int, int]) -> None:
    for hashes in (b"", honest_tree()[place][:-32]):
        assert report([*enumerate(honest())], honest_tree() | {place: hashes}).findings


def test_a_log_that_ends_before_a_checkpoint_is_found() -> None:
    log = [*honest()][:850]
    assert report([*enumerate(log)], tree(log), 850).findings == (
        Finding(800, 899, "some are missing: a checkpoint of 900 entries is signed, and the log has 850"),
    )
    assert report([], {}, 0).findings[0].first == 0
    late = report([*enumerate(honest()), (SIZE + 300, b"later")], honest_tree()).findings
    assert Finding(SIZE + 300, SIZE + 300, f"it is not below the size of the log, {SIZE}") in late


def test_the_largest_index_that_a_row_can_have_is_a_fault_like_others() -> None:
    """A look at each tile before it would not end."""
    last = 2**63 - 1
    found = report([*enumerate(honest()), (last, b"later")], honest_tree()).findings
    assert Finding(last, last, f"it is not below the size of the log, {SIZE}") in found


def test_a_prefix_may_be_missing_if_an_entry_says_that_it_was_purged() -> None:
    log = [*honest()[:-1], b"purged 512"]
    hashes = tree(log)
    read = tiles.reader(lambda level, number: hashes[level, number])
    signed = [Checkpoint("log", size, merkle.root_hash(read, size)) for size in (100, 600, SIZE)]
    kept = {place: each for place, each in hashes.items() if place not in ((0, 0), (0, 1))}

    def checked(first: int) -> Report:
        rows = [(at, text) for at, text in enumerate(log) if at >= first]
        announced = lambda entry: int(entry[7:]) if entry.startswith(b"purged") else 0  # noqa: E731
        return check_log(SIZE, rows, lambda level, number: kept.get((level, number), b""), signed, announced)

    assert checked(512) == Report(SIZE, 512, ())
    assert checked(513).findings == (Finding(512, 512, "it is missing, and no entry says that it was purged"),)
    assert checked(600).findings[0].last == 599
    log[-1] = honest()[-1]
    assert any("no entry says" in each.what for each in checked(512).findings)


def test_an_entry_that_is_not_in_the_tree_excuses_no_purge() -> None:
    rows = [*enumerate([*honest()[:-1], b"purged 512"])][512:]
    found = report(rows, honest_tree()).findings
    assert Finding(0, 511, "it is missing, and no entry says that it was purged") in found


def test_a_purged_log_is_compared_with_a_checkpoint_of_what_is_left() -> None:
    purged = Report(SIZE, 512, ())
    kept = [Checkpoint("log", size, bytes(32)) for size in (100, 512)]
    assert purged.beside(kept) == purged
    (found,) = purged.beside(kept[:1]).findings
    assert (found.last, "name one of 512 or more" in found.what) == (99, True)


def test_of_a_checkpoint_and_the_stores_own_state_the_checkpoint_is_named() -> None:
    hashes = tree(change(SIZE - 1, [*honest()]))
    signed, stated = checkpoints()[-1], Checkpoint("log", SIZE, bytes(32))
    fetch = lambda level, number: hashes[level, number]  # noqa: E731
    findings = check_log(SIZE, (), fetch, [signed], lambda _: 0, stated=stated).findings
    assert "as the checkpoint of 1000 entries has it" in findings[-1].what


def test_findings_that_go_on_are_one() -> None:
    rows = [(at, text) for at, text in enumerate(honest()) if not 300 <= at < 700]
    assert report(rows, honest_tree()).findings[0] == Finding(300, 699, "it is missing")
    assert str(Finding(3, 3, "it is missing")) == "entry 3: it is missing"
    assert str(Finding(3, 4, "it is missing")) == "entries 3 to 4: it is missing"
    assert len(report([(at, b"x") for at in range(0, SIZE, 2)], honest_tree()).findings) == 1000
