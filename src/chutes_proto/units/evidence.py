"""The evidence that is kept of boots, read page by page with the claims on the names that it is of."""

from __future__ import annotations

from attrs import frozen

from chutes_proto.store import _rows as store
from chutes_proto.store._run import Script, Unit


@frozen
class KeptEvidence:
    """A row of evidence; ``proven`` says whether its VM's hotkey was proven, ``is_bound`` whether its name is bound."""

    row: store.EvidenceRow
    proven: bool
    is_bound: bool


@frozen
class ReadEvidence(Unit[tuple[KeptEvidence, ...]]):
    """The next ``limit`` rows of evidence."""

    after: store.EvidenceRow | None
    limit: int

    def script(self) -> Script[tuple[KeptEvidence, ...]]:
        """Read a page, and a claim for each row."""
        found: list[KeptEvidence] = []
        for row in (yield from store.ReadPage(store.EvidenceRow, self.after, self.limit)):
            claim = yield from store.Read(store.VmRow, row.vm)
            found.append(KeptEvidence(row, claim is not None and claim.proven, claim is not None))
        return tuple(found)
