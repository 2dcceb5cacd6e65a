"""The rules of a volume's keys, one by one, and over any sequence of calls."""

from __future__ import annotations

from collections import Counter

from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.keys.generations import Change, Supply, active, disown, fetch, holds_keys, prune, rekey
from chutes_proto.store.rows import GenerationRow, State, Vm

VM = Vm("hotkey", "vm")


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


def test_a_pruned_key_comes_back_or_not() -> None:
    pruned = [row(1, "retired"), row(2, "retired", retirement="prune")]
    assert fetch(pruned, never) == Supply((row(2),), word="revived", current=row(2))
    anew = fetch(pruned, row, "new")
    assert (anew.word, anew.current) == ("created", row(3))
    assert anew.updated == (row(2, "retired", retirement="relisted"),)


def test_a_key_that_a_newer_one_followed_does_not_come_back() -> None:
    after = play([("fetch", "new"), ("prune", ""), ("rekey", ""), ("prune", "")])
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


def test_what_holds_keys() -> None:
    assert not holds_keys([])
    assert not holds_keys([row(1, "purged")])
    assert holds_keys([row(1, "purged"), row(2, "retired")])
    assert active([row(1, "retired"), row(2)]) == row(2)
    assert active([row(1, "candidate")]) is None


def apply(rows: list[GenerationRow], change: Change) -> list[GenerationRow]:
    """What a store would hold after the change; each step keeps the unique indexes."""
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


def play(calls: list[tuple[str, str]]) -> list[GenerationRow]:
    """The rows after these calls, starting from none; asserts what holds after each."""
    rows: list[GenerationRow] = []
    ever: dict[int, bytes | None] = {}
    for at, (call, pruned) in enumerate(calls):
        before = active(rows)
        change: Change
        match call:
            case "fetch":
                change = fetch(reversed(rows), row, "revive" if pruned == "revive" else "new")
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


@given(st.lists(st.tuples(st.sampled_from(["fetch", "rekey", "prune", "disown"]), st.sampled_from(["revive", "new"]))))
def test_any_calls_lose_nothing(calls: list[tuple[str, str]]) -> None:
    play(calls)
