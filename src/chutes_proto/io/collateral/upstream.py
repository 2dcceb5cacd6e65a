"""Collateral from services on the network: configuration and files, without an event loop.

Rules kept here:

* TLS certificates of services are verified, against the system's CAs or those that the operator names;
* fetched collateral is kept in files that `CollateralDirectory` reads, and verified again when it is loaded.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from attrs import field, frozen

from chutes_proto.collateral.library import Family, Item
from chutes_proto.collateral.platforms import PlatformCache
from chutes_proto.errors import CollateralUnavailable, FileUnavailable
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.log import Level, Record
from chutes_proto.quote._collateral import Collateral, VerifiedCollateral

FETCH_LIMITS: Final = TimeLimits(connect=3.0, read=5.0, total=10.0)
"""Collateral is four small answers; a service that is slower than this counts as down."""


@frozen
class UpstreamCollateral:
    """Services on the network as a source of collateral; ``open_collateral`` of ``aio.py`` runs it.

    ``directory`` keeps the fetched collateral for a later process; None keeps nothing.
    """

    cache: PlatformCache
    context: ssl.SSLContext = field(repr=False)
    directory: Path | None = None
    limits: TimeLimits = FETCH_LIMITS

    def restore(self, now: int) -> list[Record]:
        """Load an earlier process's files; return records. Raises `FileUnavailable`, `CollateralUnavailable`."""
        if self.directory is None:
            return []
        _ = make_directory(self.directory)
        kept = self._items(now)
        usable = [item.content for item in kept if isinstance(item.content, VerifiedCollateral)]
        for content in sorted(usable, key=lambda content: content.window):
            self.cache.restore(Family.of(content), content)
        records = [Record(Level.INFO, "collateral_restored", {"directory": str(self.directory), "files": len(usable)})]
        useless = [item for item in kept if isinstance(item.content, str)]
        return records + [Record(Level.WARNING, "collateral_not_restored", {"error": str(item)}) for item in useless]

    def kept(self, now: int) -> list[tuple[str, VerifiedCollateral]]:
        """Return what an earlier process kept, after its file; nothing if it cannot be read."""
        try:
            items = self._items(now)
        except CollateralUnavailable:
            return []
        return [(item.name, item.content) for item in items if isinstance(item.content, VerifiedCollateral)]

    def _items(self, now: int) -> tuple[Item, ...]:
        if self.directory is None:
            return ()
        return CollateralDirectory(self.directory, self.cache.root, grace=self.cache.policy.grace).items(now)

    def keep(self, family: Family, collateral: Collateral) -> Record | None:
        """Write fetched collateral for a later process; return the log record of a fault."""
        if self.directory is None:
            return None
        try:
            _ = keep_collateral(self.directory, family, collateral)
        except FileUnavailable as exc:
            return Record(Level.WARNING, "collateral_not_kept", {"error": str(exc)})
        return None


def keep_collateral(directory: str | Path, family: Family, collateral: Collateral) -> Path:
    """Write the file of a family, in place of an older one; return its path. Raises `FileUnavailable`."""
    path = make_directory(directory) / f"{family.name}.json"
    write_file(path, collateral.to_json() + b"\n")
    return path
