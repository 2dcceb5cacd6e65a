"""RIMs and OCSP answers from services on the network: configuration and files, without an event loop.

Rules kept here:

* TLS certificates of services are verified, against the system's CAs or those that the operator names;
* fetched pieces are kept in a directory that `GpuCollateralDirectory` reads, and verified again when they are loaded.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from attrs import field, frozen

from chutes_proto.collateral.gpus import HeldRim, HeldStatus, RimCache, RimKey, StatusCache, StatusKey
from chutes_proto.errors import FileUnavailable, GpuError, UpstreamError
from chutes_proto.gpu import GpuCollateral
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, make_gpu_directory
from chutes_proto.io.collateral.upstream import FETCH_LIMITS
from chutes_proto.io.files import read_file, unavailable, write_file
from chutes_proto.io.http.https import TimeLimits
from chutes_proto.log import Level, Record

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
                is_there = path.is_file()
            return read(key, read_file(path)) if is_there else None
        except (FileUnavailable, GpuError, UpstreamError) as exc:
            return Record(Level.WARNING, "collateral_not_restored", {"error": f"{path}: {exc}"})

    def keep(self, key: RimKey | StatusKey, data: bytes) -> Record | None:
        """Write a fetched piece for a later process; return the log record of a fault."""
        if self.directory is None:
            return None
        try:
            _ = keep_piece(self.directory, key, data)
        except FileUnavailable as exc:
            return Record(Level.WARNING, "collateral_not_kept", {"error": str(exc)})
        return None

    def files(self) -> GpuCollateral:
        """Return the files of ``beside``. Raises `CollateralUnavailable`."""
        return GpuCollateral() if self.beside is None else self.beside.fetch()


def keep_piece(directory: Path, key: RimKey | StatusKey, data: bytes) -> Path:
    """Write the file of a piece, in place of an older one; return its path. Raises `FileUnavailable`."""
    path = make_gpu_directory(directory) / key.file
    write_file(path, data)
    return path
