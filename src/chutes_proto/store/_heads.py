"""The head of a group of rows: a version, and the tag of each row that the group has now.

A row has its place in a head by its key. So one that is missing, superfluous, or older than the newest differs from the
head. This module has the contents of heads, and no key: who reads and writes them is in ``_vm_groups.py`` and
``_store_group.py``.

The groups:

* of a VM: its claim, its live generations (`ReadLiveGenerations`), its volumes, and its boots of the last minutes. An
  older boot has no token that is alive. A settled generation and a volume that a boot was given have a MAC alone, and
  the boot says how many of these there are;
* of the store: facts, revocations and keyring. Other rows release no key: a MAC shows that they were forged, and
  nothing shows that they were deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Final

import msgspec
from attrs import define, frozen

from chutes_proto.errors import RowNotAuthentic
from chutes_proto.store import _rows as store
from chutes_proto.store._answers import key_text
from chutes_proto.store._columns import Rows, Values, columns

RECENT_SECONDS: Final = 1200
"""A boot that is older than the newest one of its VM by more than this has nothing that is alive."""
RECENT_BOOTS: Final = 32
"""The most boots in a head; of older ones nothing counts any more."""

CREATED_AT: Final = columns(store.BootRow).index("created_at")
_ALLOWED_AT: Final = columns(store.RevocationRow).index("allowed_at")
_liveness: Final = itemgetter(*map(columns(store.GenerationRow).index, ("state", "provisional", "retirement")))
LIVE: Final = {True: b"\1", False: b"\0"}
"""The last byte of a generation's tag in a head."""

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(dict[str, dict[str, bytes]]).decode


@define(eq=False)
class Head:
    """The head of a group: for each table, the tag of each row by its key, and more where the rule needs it.

    A generation's tag has one byte more, whether it is live by itself, and a revocation's, whether it was undone; a
    boot's has the time of its grant before it.
    """

    version: int
    contents: dict[str, dict[str, bytes]]
    is_changed: bool = False
    stored: bytes = b""
    """The contents as they are stored, unless ``is_changed``."""

    @classmethod
    def of_stored(cls, version: int, stored: bytes) -> Head:
        """A head as it is stored."""
        return cls(version, _decode(stored), stored=stored)

    def of(self, table: str) -> dict[str, bytes]:
        """The tags of a table's rows, to read or to change."""
        return self.contents.setdefault(table, {})

    def advance(self) -> None:
        """Make the next version, which is about to be stored."""
        self.version += 1
        self.is_changed = False
        self.stored = _encode(self.contents)


@frozen
class Boots:
    """The boots in a head: those of the last minutes before the newest one, by the boots' own times.

    When there are too many, the oldest go, and never the one that is entered: the clocks of two servers may differ, and
    many boots may have one second. Of a boot that went for that reason no token is found.
    """

    entries: dict[str, bytes]
    """The time of each, 8 bytes, and the tag of its row, in the order in which they were granted."""

    def enter(self, boot_id: str, created_at: int, tag: bytes) -> None:
        """Enter a boot, or the present state of one, and let those go that no longer count."""
        entries = self.entries
        is_there = boot_id in entries
        entries[boot_id] = of_number(created_at) + tag
        if is_there or len(entries) == 1:  # no boot's time is new, so none has become too old, or too many
            return
        times = self._times()
        since = max(times.values()) - RECENT_SECONDS
        for key, at in times.items():
            if at < since:
                del entries[key]
        if len(entries) > RECENT_BOOTS:
            others = sorted((key for key in entries if key != boot_id), key=times.__getitem__)
            for key in others[: 1 - RECENT_BOOTS]:
                del entries[key]

    @property
    def is_full(self) -> bool:
        """Whether others may have gone that are not too old."""
        return len(self.entries) >= RECENT_BOOTS

    def oldest(self) -> int:
        """The time of the oldest."""
        return min(self._times().values())

    def is_expired(self, created_at: int) -> bool:
        """Whether nothing of a boot of that time is alive, as its own times say."""
        return bool(self.entries) and created_at < max(self._times().values()) - RECENT_SECONDS

    def _times(self) -> dict[str, int]:
        return {key: int.from_bytes(entry[:8], "big", signed=True) for key, entry in self.entries.items()}


# --- comparing ---


def expect(table: str, key: str, found: bytes | None, expected: bytes | None) -> None:
    """Compare a row's tag with its head's. Raises `RowNotAuthentic`."""
    if found == expected:
        return
    if found is None:
        why = "it is missing"
    elif expected is None:
        why = "it was not there when the group was written last"
    else:
        why = "it is not the row that was written last"
    raise RowNotAuthentic(table, key, why)


def expect_all(
    table: str, found: dict[str, bytes], expected: dict[str, bytes], vm: tuple[str, str] | None = None
) -> None:
    """Compare all rows of a table, or of a VM there, with their head. Raises for the first that differs."""
    if found == expected:
        return
    prefix = "" if vm is None else f"{name_of(vm)}/"
    for key in sorted(found.keys() | expected.keys()):
        expect(table, f"{prefix}{key}", found.get(key), expected.get(key))


def name_of(vm: tuple[str, str]) -> str:
    """A VM, as faults name it."""
    return f"{vm[0]}/{vm[1]}"


def of_number(value: int) -> bytes:
    """A number as a head has it; a value of another type, which SQLite takes in any column, is in none."""
    return value.to_bytes(8, "big", signed=True) if type(value) is int else b""


# --- rows of a VM ---


def is_live(values: Sequence[Any]) -> bool:
    """Whether a generation is in its VM's head though it is not the newest of its volume."""
    state, is_provisional, retirement = _liveness(values)
    return state in ("active", "candidate") or bool(is_provisional) or retirement == "prune"


def numbers_of(rows: Rows) -> dict[str, set[int]]:
    """The numbers of the generations of each volume; one of another type has no MAC that is right."""
    found: dict[str, set[int]] = {}
    for row in rows:
        if type(row[3]) is int:
            found.setdefault(row[2], set()).add(row[3])
    return found


def in_head(rows: Rows) -> Rows:
    """Those generations of all of a VM that are in its head."""
    newest = {volume: max(numbers) for volume, numbers in numbers_of(rows).items()}
    return [row for row in rows if row[3] == newest.get(row[2]) or is_live(row)]


def generation_tags(tagged: Iterable[tuple[Sequence[Any], bytes]]) -> dict[str, bytes]:
    """The tags of the live ones of all these generations, as a head has them."""
    rows = list(tagged)
    newest: dict[str, int] = {}
    for values, _ in rows:
        newest[values[2]] = max(values[3], newest.get(values[2], 0))
    found: dict[str, bytes] = {}
    for values, tag in rows:
        live = is_live(values)
        if live or values[3] == newest[values[2]]:
            found[f"{values[2]}/{values[3]}"] = tag + LIVE[live]
    return found


def _enter_claim(head: Head, _values: Values, tag: bytes) -> None:
    head.of("vm")[""] = tag


def _enter_volume(head: Head, values: Values, tag: bytes) -> None:
    head.of("volume")[values[2]] = tag


def _enter_generation(head: Head, values: Values, tag: bytes) -> None:
    section, volume, number = head.of("generation"), values[2], values[3]
    section[f"{volume}/{number}"] = tag + LIVE[is_live(values)]
    numbers: dict[int, str] = {}
    for key in section:
        of, _, digits = key.rpartition("/")
        if of == volume:
            numbers[int(digits)] = key
    newest = max(numbers)
    for each, key in numbers.items():
        if each != newest and not section[key][-1]:  # settled
            del section[key]


def _enter_boot(head: Head, values: Values, tag: bytes) -> None:
    Boots(head.of("boot")).enter(values[0], values[CREATED_AT], tag)


ENTER: Final[dict[type[store.Row], Callable[[Head, Values, bytes], None]]] = {
    store.VmRow: _enter_claim,
    store.VolumeRow: _enter_volume,
    store.GenerationRow: _enter_generation,
    store.BootRow: _enter_boot,
}
"""Enters a row that is the newest of its key into the head of its VM, by the kinds of rows that such a head lists."""

VM_OF: Final[dict[type[store.Row], Callable[[Sequence[Any]], tuple[str, str]]]] = {
    kind: itemgetter(*map(columns(kind).index, ("hotkey", "vm"))) for kind in ENTER
}
"""Gets the VM of a row of a VM's group."""

PLACE_OF: Final[dict[type[store.Row], Callable[[Sequence[Any]], str]]] = {
    store.VmRow: lambda _values: "",
    store.VolumeRow: itemgetter(2),
    store.GenerationRow: lambda values: f"{values[2]}/{values[3]}",
    store.BootRow: itemgetter(0),
    store.RevocationRow: partial(key_text, store.RevocationRow),
    store.KeyringRow: partial(key_text, store.KeyringRow),
}
"""Gets the key of a row in the head that lists it."""


# --- rows of the store ---

OF_STORE: Final[tuple[type[store.Row], ...]] = (store.RevocationRow, store.KeyringRow)
"""The kinds of rows that the head of the store lists; it has the facts, too, which are no rows of ours."""
FACTS: Final = "fact"
"""The place of these."""


def store_tag(kind: type[store.Row], values: Sequence[Any], tag: bytes) -> bytes:
    """The tag of such a row as the head has it: with one byte more, 1 for a revocation that was undone."""
    return tag + bytes((kind is store.RevocationRow and values[_ALLOWED_AT] is not None,))
