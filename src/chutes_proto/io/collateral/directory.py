"""Collateral in a directory: files that come, go and change while a server runs."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from chutes_proto.collateral.library import Item, choose
from chutes_proto.errors import CollateralUnavailable, FileUnavailable
from chutes_proto.io.files import read_file, reason
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral
from chutes_proto.quote._errors import QuoteError
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import verify_collateral


@frozen
class _Read:
    """A file as it was read at ``at``; ``stamp`` changes with the file."""

    stamp: tuple[int, int, int]
    at: int
    items: tuple[Item, ...]


class CollateralDirectory:
    """Collateral in the ``*.json`` files of a directory, of one or many platform families (`Collateral.from_json`).

    Files may come, go and change at any time. Drivers ask `available` before `fetch`, so a change counts for them at
    the latest from the next second on. Each file is read and verified once; one that does not verify is read again
    after a minute, because its validity may begin later. Expired collateral is used for ``grace`` seconds, as long as
    there is none that is valid. A file of many families counts once for each, and as far as it verifies. May be used
    from several threads.

    A PCK certificate chain in the file is left out: it belongs to one machine, and a file here serves many.
    """

    AGAIN_AFTER: Final = 60

    def __init__(self, path: str | Path, root: TrustedRoot, *, grace: int = 0) -> None:
        self.path: Path = Path(path)
        self._root = root
        self._grace = grace
        self._lock = threading.Lock()
        self._read: dict[str, _Read] = {}
        self._found: tuple[int, tuple[Item, ...]] = (0, ())

    def available(self, identity: PckIdentity, now: int) -> VerifiedCollateral | None:
        """Return the result of `fetch` in the second in which the files were last read, otherwise None."""
        at, items = self._found
        if at != now:
            return None
        try:
            return choose(items, identity, now, str(self.path))
        except CollateralUnavailable:
            return None

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """Return the collateral for a platform at ``now`` (unix seconds). Raises `CollateralUnavailable`."""
        return choose(self.items(now), identity, now, str(self.path))

    def items(self, now: int) -> tuple[Item, ...]:
        """Return all files, by name. Raises `CollateralUnavailable` if the directory cannot be read."""
        with self._lock:
            try:
                with os.scandir(self.path) as entries:
                    names = sorted(e.name for e in entries if e.name.endswith(".json") and not e.name.startswith("."))
            except OSError as exc:
                raise CollateralUnavailable(f"collateral directory {self.path}: {exc.strerror}") from None
            self._read = {name: self._current(name, now) for name in names}
            items = tuple(item for read in self._read.values() for item in read.items)
            self._found = now, items
            return items

    def _current(self, name: str, now: int) -> _Read:
        path = self.path / name
        try:
            found = path.stat()
        except OSError as exc:
            return _Read((0, 0, 0), now, (Item(str(path), exc.strerror or "it cannot be read"),))
        stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = self._read.get(name)
        if known is not None and known.stamp == stamp:
            is_verified = all(isinstance(item.content, VerifiedCollateral) for item in known.items)
            if is_verified or abs(now - known.at) < self.AGAIN_AFTER:
                return known
        return _Read(stamp, now, self._items(path, now))

    def _items(self, path: Path, now: int) -> tuple[Item, ...]:
        try:
            found = Collateral.all_from_json(read_file(path, plain=True))
        except (FileUnavailable, QuoteError) as exc:
            return (Item(str(path), reason(exc, path)),)
        return tuple(Item(str(path), self._verified(one, now)) for one in found)

    def _verified(self, collateral: Collateral, now: int) -> VerifiedCollateral | str:
        try:
            without = evolve(collateral, pck_certificate_chain=None)
            return verify_collateral(without, now=now, root=self._root, grace=self._grace)
        except QuoteError as exc:
            return str(exc)
