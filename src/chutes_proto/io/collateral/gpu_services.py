"""RIMs and OCSP answers from services on the network: configuration and files, without an event loop.

Rules kept here:

* TLS certificates of services are verified, against the system's CAs or those that the operator names;
* fetched pieces are kept in a directory that `GpuCollateralDirectory` reads, and verified again when they are loaded;
* a piece that ended a day ago is removed, because nothing uses it; an answer that a certificate is revoked never ends.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TypeVar

from attrs import field, frozen

from chutes_proto.collateral.gpus import HeldRim, HeldStatus, RimCache, RimKey, StatusCache, StatusKey
from chutes_proto.errors import FileUnavailable, GpuError, UpstreamError
from chutes_proto.gpu import GpuCollateral
from chutes_proto.gpu._revocation import OcspAnswer, read_status
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, make_gpu_directory
from chutes_proto.io.collateral.upstream import FETCH_LIMITS
from chutes_proto.io.files import is_there, read_file, reason, unavailable, write_file
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.log import Level, Record

_ENDED = 86_400
"""How long after its end a piece is removed, in seconds: until then a clock that is ahead removes nothing in use."""

PieceKey = TypeVar("PieceKey", RimKey, StatusKey)
Piece = TypeVar("Piece", HeldRim, HeldStatus)


@frozen
class GpuServices:
    """Services on the network as a source of RIMs and OCSP answers; ``open_gpu_collateral`` of ``aio.py`` runs it.

    A cache that is None is not asked, because nothing needs it. ``directory`` keeps what was fetched for a later
    process; None keeps nothing. The files of ``beside`` count, too, and the signers of its RIMs are asked about.
    """

    rims: RimCache | None
    status: StatusCache | None
    context: ssl.SSLContext = field(repr=False)
    directory: Path | None = None
    beside: GpuCollateralDirectory | None = None
    limits: TimeLimits = FETCH_LIMITS

    def load(self, key: PieceKey, read: Callable[[PieceKey, bytes], Piece]) -> Piece | Record | None:
        """Read an earlier process's file, if there is one; return the log record of one that cannot be used."""
        if self.directory is None:
            return None
        path = self.directory / key.file
        try:
            with unavailable(path, "cannot be read"):
                found = is_there(path)
            return read(key, read_file(path)) if found else None
        except (FileUnavailable, GpuError, UpstreamError) as exc:
            return Record(Level.WARNING, "collateral_not_restored", {"error": f"{path}: {reason(exc, path)}"})

    def keep(self, key: RimKey | StatusKey, data: bytes) -> Record | None:
        """Write a fetched piece for a later process; return the log record of a fault."""
        if self.directory is None:
            return None
        try:
            _ = keep_piece(self.directory, key, data)
        except FileUnavailable as exc:
            return Record(Level.WARNING, "collateral_not_kept", {"error": str(exc)})
        return None

    def prune(self, now: int) -> Record | None:
        """Remove the files of pieces that ended long before ``now``; return the log record of it or of a fault.

        A file that is neither a RIM nor an OCSP answer is left alone.
        """
        if self.directory is None:
            return None
        removed = 0
        try:
            for kind, end in (("rims", self._end_of_rim), ("status", self._end_of_status)):
                for path in (self.directory / kind).glob("[!.]*"):
                    with suppress(FileUnavailable, GpuError):  # read again, and told, when it is asked for
                        if end(read_file(path)) < now - _ENDED:
                            path.unlink(missing_ok=True)
                            removed += 1
        except OSError as exc:
            return Record(Level.WARNING, "collateral_not_pruned", {"error": f"{self.directory}: {exc.strerror}"})
        return Record(Level.INFO, "collateral_pruned", {"files": removed}) if removed else None

    def _end_of_rim(self, data: bytes) -> float:
        return inf if self.rims is None else authenticate_rim(data, roots=self.rims.roots).window[1]

    def _end_of_status(self, data: bytes) -> float:
        status = read_status(data)
        if self.status is None or not isinstance(status, OcspAnswer):
            return inf
        grace = self.status.policy.grace
        ends = (inf if one.state == "revoked" else one.next_update + grace for one in status.answers)
        return max(ends, default=inf)

    def files(self) -> GpuCollateral:
        """Return the files of ``beside``. Raises `CollateralUnavailable`."""
        return GpuCollateral() if self.beside is None else self.beside.fetch()


def keep_piece(directory: Path, key: RimKey | StatusKey, data: bytes) -> Path:
    """Write the file of a piece, in place of an older one; return its path. Raises `FileUnavailable`."""
    path = make_gpu_directory(directory) / key.file
    write_file(path, data)
    return path
