"""The rules of a volume's keys, one by one, and over any sequence of calls."""

from __future__ import annotations

from collections import Counter

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.keys.generations import (
    Change,
    HandOut,
    Pace,
    Supply,
    active,
    confirm,
    disown,
    fetch,
    hand_out,
    holds_keys,
    pinned,
    prune,
    purgeable,
    rekey,
    restore,
)
from chutes_proto.store._rows import GenerationRow, State, Vm

VM = Vm("hotkey", "vm")
ALWAYS = Pace(0, 0)


def row(generation: int, state: State = "active", **changes: object) -> GenerationRow:
    made = GenerationRow(
        vm=VM,
        volume="storage",
        generation=generation,
        state="active",
        sealed=b"sealed %d" % generation,
        kek_id="kek",
        wrapped_key=b"wrapped",
        provisional=False,
        created_at=0,
        origin="boot",
    )
    if state in ("retired", "purged"):
        made = evolve(made, retired_at=5, retirement="rekey")
    return evolve(made, state=state, **changes)  # type: ignore[arg-type]


def never(_: int) -> GenerationRow:
    raise AssertionError("no key is to be made")


def test_the_first_key() -> None:
    assert fetch([], row) == Supply(word="created", current=row(1), created=row(1))
    assert rekey([], row, 9) == Supply(word="created", current=row(1), created=row(1))


def test_a_key_that_is_there_is_kept() -> None:
    rows = [row(1, "retired"), row(2), row(3, "candidate")]
    assert fetch(rows, never) == Supply(word="kept", current=row(2))


def test_a_rekey_retires_and_makes_the_next() -> None:
    rows = [row(3), row(4, "candidate"), row(2, "retired")]
    change = rekey(rows, row, 9)
    assert (change.word, change.current, change.created) == ("rekeyed", row(5), row(5))
    assert change.updated == (
        row(3, "retired", retired_at=9, retirement="rekey"),
        row(4, "retired", retired_at=9, retirement="dropped"),
    )


def test_a_prune_retires_and_makes_nothing() -> None:
    assert prune([row(1)], 9) == Change((row(1, "retired", retired_at=9, retirement="prune"),))
    assert prune([row(1, "retired"), row(2, "purged")], 9) == Change()
    assert prune([], 9) == Change()


def test_a_pruned_key_comes_back() -> None:
    pruned = [row(1, "retired"), row(2, "retired", retirement="prune")]
    assert fetch(pruned, never) == Supply((row(2),), word="revived", current=row(2))
    anew = rekey(pruned, row, 9)
    assert (anew.word, anew.current) == ("created", row(3))
    assert anew.updated == (row(2, "retired", retirement="relisted"),)


def test_a_key_that_a_newer_one_followed_does_not_come_back() -> None:
    after = play(["fetch", "prune", "rekey", "prune"])
    back = fetch(after, never)
    assert back.current.generation == 2


def test_a_name_that_goes_to_another_owner_takes_no_key_along() -> None:
    rows = [row(1, "retired", retirement="prune"), row(2), row(3, "candidate"), row(4, "purged")]
    change = disown(rows, 9)
    assert change.updated == (
        row(2, "retired", retired_at=9, retirement="takeover"),
        row(3, "retired", retired_at=9, retirement="dropped"),
        row(1, "retired", retirement="takeover"),
    )
    assert fetch(apply(rows, change), row).word == "created"


def seal(number: int) -> GenerationRow:
    return row(number)


def superseded(number: int, at: int) -> GenerationRow:
    return row(number, "retired", retirement="superseded", provisional=True, retired_at=at)


def test_the_first_hand_out_is_active_at_once() -> None:
    first = hand_out([], seal, ALWAYS)
    assert (first.current, first.next, first.created) == (None, row(1), row(1))
    assert confirm([row(1)], None, 1, rotated=False, at=9) == Change()
    assert confirm([row(1)], None, 1, rotated=True, at=9) == Change()
    assert confirm([row(1, "retired"), row(2)], None, 1, rotated=True, at=9) is None
    assert confirm([row(1, "retired"), row(2)], None, 1, rotated=False, at=9) == Change()


def test_a_candidate_is_handed_out_until_it_is_decided_on() -> None:
    out = hand_out([row(1)], seal, ALWAYS)
    assert (out.current, out.next) == (row(1), row(2, "candidate"))
    again = hand_out([row(1), row(2, "candidate")], never, ALWAYS)
    assert again == HandOut(current=row(1), next=row(2, "candidate"))


def test_a_candidate_is_the_next_key_once_it_has_its_age() -> None:
    made = hand_out([row(1)], seal, Pace(5, 10))
    assert (made.current, made.next) == (row(1), row(1))
    assert made.created == row(2, "candidate", delivered_at=None)
    rows = [row(1), row(2, "candidate")]
    assert hand_out(rows, never, Pace(9, 10)) == HandOut(current=row(1), next=row(1))
    assert hand_out(rows, never, Pace(10, 10)) == HandOut(current=row(1), next=row(2, "candidate"))
    for rotated in (True, False):
        assert confirm(rows, 1, 1, rotated=rotated, at=9) == Change()
    rows = [superseded(1, 3), row(2, provisional=True), row(3, "candidate")]
    for rotated in (True, False):
        proven = confirm(rows, 2, 2, rotated=rotated, at=9)
        assert proven is not None
        assert apply(rows, proven)[1:] == [row(2), row(3, "candidate")]
        assert pinned(apply(rows, proven)) is None
    for rotated in (True, False):  # an operator chose another key since
        gone = confirm([row(1), row(2, "retired", retirement="superseded")], 2, 2, rotated=rotated, at=9)
        assert gone == (None if rotated else Change())


def test_after_a_restore_every_key_has_its_turn() -> None:
    doubted = row(3, "candidate", provisional=True)
    rows = [superseded(1, 3), row(2, provisional=True), doubted]
    turns = [hand_out(rows, never, Pace(0, 9), handed) for handed in (None, 2, 1, 3)]
    pairs = [(out.current and out.current.generation, out.next.generation) for out in turns]
    assert pairs == [(2, 2), (1, 2), (3, 3), (2, 2)]
    by_third = confirm(rows, 3, 3, rotated=True, at=9)
    assert by_third is not None
    after = apply(rows, by_third)
    assert [(r.state, r.retirement, r.provisional) for r in after] == [
        ("retired", "superseded", False),
        ("retired", "superseded", False),
        ("active", None, False),
    ]
    by_second = confirm(rows, 2, 2, rotated=False, at=9)
    assert by_second is not None
    assert apply(rows, by_second)[1:] == [row(2), row(3, "candidate")]
    by_first = confirm(rows, 1, 2, rotated=False, at=9)
    assert by_first is not None
    assert [(r.state, r.provisional) for r in apply(rows, by_first)] == [
        ("active", False),
        ("retired", False),
        ("retired", False),
    ]
    dropped = confirm([row(2), doubted], 2, 3, rotated=False, at=9)
    assert dropped is not None
    assert not any(r.provisional for r in dropped.updated)


def test_what_was_pruned_comes_back_with_a_candidate() -> None:
    pruned = [row(1, "retired", retirement="prune")]
    back = hand_out(pruned, seal, ALWAYS)
    assert (back.updated, back.current, back.next) == ((row(1),), row(1), row(2, "candidate"))


def test_a_promotion_is_provisional_and_pins_what_it_superseded() -> None:
    rows = [row(1), row(2, "candidate")]
    promoted = confirm(rows, 1, 2, rotated=True, at=9)
    assert promoted == Change((superseded(1, 9), row(2, provisional=True)))
    rows = apply(rows, promoted)
    assert hand_out(rows, seal, ALWAYS, handed=None).current == row(2, provisional=True)
    other = hand_out(rows, seal, ALWAYS, handed=2)
    assert (other.current, other.next) == (superseded(1, 9), row(2, provisional=True))
    assert hand_out(rows, seal, ALWAYS, handed=1).current == row(2, provisional=True)
    assert confirm(rows, 1, 2, rotated=True, at=10) == Change()
    rows.append(row(3, "candidate"))
    back = confirm(rows, 1, 2, rotated=False, at=10)
    assert back is not None
    assert apply(rows, back) == [
        row(1),
        row(2, "retired", retirement="dropped", retired_at=10),
        row(3, "retired", retirement="dropped", retired_at=10),
    ]


def test_a_confirmation_by_the_new_key_unpins_the_old_one() -> None:
    rows = [superseded(1, 3), row(2, provisional=True), row(3, "candidate")]
    kept = confirm(rows, 2, 3, rotated=False, at=9)
    assert kept is not None
    after = apply(rows, kept)
    assert [(r.state, r.provisional) for r in after] == [("retired", False), ("active", False), ("retired", False)]
    rotated = confirm(rows, 2, 3, rotated=True, at=9)
    assert rotated is not None
    assert pinned(apply(rows, rotated)) == superseded(2, 9)


def test_what_was_decided_meanwhile_stands() -> None:
    overtaken = [row(1, "retired"), row(2, "retired", retirement="dropped"), row(3)]
    assert confirm(overtaken, 1, 2, rotated=True, at=9) is None
    assert confirm(overtaken, 1, 2, rotated=False, at=9) == Change()


def test_a_rekey_or_a_restore_unpins() -> None:
    rows = [superseded(1, 3), row(2, provisional=True), row(3, "candidate")]
    assert pinned(apply(rows, rekey(rows, seal, 9))) is None
    assert pinned(apply(rows, disown(rows, 9))) is None
    back = restore(rows, 1, 9)
    assert back is not None
    after = apply(rows, back)
    assert (active(after), pinned(after)) == (row(1), None)
    assert [(r.retirement, r.retired_at) for r in after[1:]] == [("superseded", 9), ("dropped", 9)]
    assert not any(r.provisional for r in after)
    for generation in (2, 9):
        assert restore(rows, generation, 9) is None
    assert restore([row(1, "purged"), row(2)], 1, 9) is None


def test_what_may_be_purged() -> None:
    rows = [row(n, "retired", retired_at=n) for n in range(1, 6)]
    assert [r.generation for r in purgeable(rows, 102, 100, 3)] == [1, 2]
    assert [r.generation for r in purgeable(rows, 101, 100, 3)] == [1]
    assert [r.generation for r in purgeable(rows, 1000, 100, 0)] == [1, 2, 3, 4, 5]
    held = [superseded(1, 1), row(2, provisional=True), row(3, "candidate"), row(4, "purged")]
    assert purgeable(held, 1000, 100, 0) == ()


def test_what_holds_keys() -> None:
    assert not holds_keys([])
    assert not holds_keys([row(1, "purged")])
    assert holds_keys([row(1, "purged"), row(2, "retired")])
    assert active([row(1, "retired"), row(2)]) == row(2)
    assert active([row(1, "candidate")]) is None


def apply(rows: list[GenerationRow], change: Change) -> list[GenerationRow]:
    """The rows of a store after the change; each step keeps the unique indexes."""
    table = {row.generation: row for row in rows}
    for updated in change.updated:
        before = table[updated.generation]
        assert before.sealed == updated.sealed
        table[updated.generation] = updated
        check_unique(table)
    if change.created is not None:
        assert change.created.generation not in table
        table[change.created.generation] = change.created
        check_unique(table)
    return list(table.values())


def check_unique(table: dict[int, GenerationRow]) -> None:
    states = Counter(row.state for row in table.values())
    assert states["active"] <= 1
    assert states["candidate"] <= 1


def play(calls: list[str]) -> list[GenerationRow]:
    """The rows after these calls, starting from none; asserts what holds after each."""
    rows: list[GenerationRow] = []
    ever: dict[int, bytes | None] = {}
    for at, call in enumerate(calls):
        before = active(rows)
        change: Change
        match call:
            case "fetch":
                change = fetch(reversed(rows), row)
            case "rekey":
                change = rekey(reversed(rows), row, at)
            case "prune":
                change = prune(rows, at)
            case _:
                change = disown(rows, at)
        rows = apply(rows, change)
        if isinstance(change, Supply):
            assert active(rows) == change.current
            assert (call == "fetch" and before is not None) <= (change.current == before)
            assert (call == "rekey") <= (change.current.generation not in ever)
        else:
            assert active(rows) is None
        ever.update((row.generation, row.sealed) for row in rows)
        assert {row.generation: row.sealed for row in rows} == ever, "a key is gone"
        assert sum(row.retirement == "prune" for row in rows) <= (active(rows) is None), "two keys to revive"
        assert all((row.state == "retired") == (row.retired_at is not None) for row in rows)
    return rows


@given(st.lists(st.sampled_from(["fetch", "rekey", "prune", "disown"])))
def test_any_calls_lose_nothing(calls: list[str]) -> None:
    play(calls)
