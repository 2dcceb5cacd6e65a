"""The erasures of a store in a file beside its mark: a store that comes back from a backup repeats them.

Rules kept here:

* a server, and each command that erases, adds what the store has to the file, and erases again what the file has and
  the store has not; before a server serves, and before `store restored` lets others go on;
* the file is replaced as a whole or not at all, and only ever grows. A line is one erasure; one that cannot be read is
  an error that names the file: an erasure that is skipped would bring keys back;
* a line has the number of its store. Those of another store stay in the file and erase nothing: the other may have a
  VM of the same name, whose keys were never erased.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from chutes_proto.errors import ConfigurationError, StoreError
from chutes_proto.io.files import read_lines, write_file
from chutes_proto.io.stores.address import DurableStore, StorePlace
from chutes_proto.io.stores.sqlite import SqliteStore
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import ErasureRow, Scan, Vm
from chutes_proto.units.erasure import RepeatErasure, through_of

LONGEST: Final = 64 * 1024
"""The most bytes of a line."""
_BLOCK: Final = 1 << 20
_MEMBERS: Final = {"store", "erasure_id", "hotkey", "vm", "erased_at", "through"}


def file_beside(mark_file: Path) -> Path:
    """The file of erasures that goes with a mark."""
    return mark_file.with_name(f"{mark_file.name}.erasures")


def keep_erasures(store: DurableStore, path: Path | None) -> tuple[int, int]:
    """Repeat in ``store`` the erasures of the file, and add those of the store to it.

    Returns how many erasures were repeated, and how many keys that destroyed. Raises `StoreError` also for a file that
    cannot be read or written.
    """
    if path is None:
        return 0, 0
    known, others = _read(path, store.store_id)
    repeated = keys = 0
    there = {row.erasure_id: row for row in store.transact(Ask(Scan(ErasureRow)))}
    for record in known.values():
        if record.erasure_id in there:
            continue
        erased = store.transact(RepeatErasure(int(time.time()), 1 + secrets.randbits(62), record))
        repeated, keys = repeated + (erased is not None), keys + (erased or 0)
    if there.keys() - known.keys():
        lines = [json.dumps(_plain(row, store.store_id)).encode() for row in {**known, **there}.values()]
        try:
            write_file(path, b"".join(line + b"\n" for line in (*others, *lines)), mode=0o600)
            owner = path.parent.stat()
            if os.geteuid() == 0:  # an operator's command; the server must be able to read it
                os.chown(path, owner.st_uid, owner.st_gid)
        except (ConfigurationError, OSError) as exc:
            raise StoreError(f"erasures: {path}: {exc}") from None
    return repeated, keys


def _plain(row: ErasureRow, store_id: int) -> dict[str, object]:
    members = {"store": store_id, "erasure_id": row.erasure_id, "hotkey": row.vm.hotkey, "vm": row.vm.name}
    return {**members, "erased_at": row.erased_at, "through": row.through}


def _read(path: Path, store_id: int) -> tuple[dict[str, ErasureRow], list[bytes]]:
    """Read the erasures of a store by their ids, and the lines of other stores as they are."""
    try:
        lines = [*read_lines(path, limit=LONGEST)] if path.exists() else []
    except (ConfigurationError, OSError) as exc:
        raise StoreError(f"erasures: {path}: {exc}") from None
    found: dict[str, ErasureRow] = {}
    others: list[bytes] = []
    for number, line in enumerate(lines, 1):
        try:
            told: Any = json.loads(line)
            if told.keys() != _MEMBERS:
                raise ValueError(told)
            texts = (told["erasure_id"], told["hotkey"], told["vm"], told["through"])
            numbers = (told["store"], told["erased_at"])
            if not all(type(text) is str for text in texts) or not all(type(one) is int for one in numbers):
                raise ValueError(told)
            row = ErasureRow(told["erasure_id"], Vm(told["hotkey"], told["vm"]), told["erased_at"], told["through"])
            _ = through_of(row)
        except (ValueError, AttributeError, RecursionError):
            text = f"erasures: {path}, line {number}: not an erasure; restore the file, or remove the line if you know"
            raise StoreError(f"{text} what it was") from None
        if told["store"] == store_id:
            found[row.erasure_id] = row
        else:
            others.append(line.strip())
    return found, others


def scrub(place: StorePlace, erased: Sequence[bytes]) -> list[Path]:
    """Remove what deleted values left in an SQLite file and its log; return the files that still hold one of them.

    SQLite overwrites what it deletes, and its log is emptied here. A file that an older release wrote may have older
    copies in free pages: then it is rewritten as a whole, which takes as much space again. So it is without values:
    they were erased before, and nobody knows any more what to look for.
    """
    path = place.path
    if path is None:
        return []
    left: list[Path] = []
    for rewrite in (False, True) if erased else (True,):
        with closing(SqliteStore(path)) as store:
            store.empty_log(rewrite=rewrite)
        # After it is closed: closing another descriptor of the file would drop SQLite's locks of this process.
        left = [file for file in (path, path.with_name(f"{path.name}-wal")) if _holds(file, erased)]
        if not left:
            break
    return left


def _holds(path: Path, values: Sequence[bytes]) -> bool:
    """Return whether a file holds one of these values, wherever in it."""
    overlap = max(map(len, values), default=1) - 1
    before = b""
    with suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(_BLOCK):
            block = before + block
            if any(value in block for value in values):
                return True
            before = block[-overlap:] if overlap else b""
    return False
