"""RIMs and OCSP answers for GPUs in a directory: files that come, go and change while a server runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable
from chutes_proto.gpu import GpuCollateral, GpuError, GpuRoots, Revocation, Rims, VerifiedRim, read_root
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.io.files import make_directory, read_file, reason

_KINDS: Final = ("rims", "status")


class GpuCollateralDirectory:
    """RIMs in the directory ``rims`` and OCSP answers and CRLs in ``status`` below a directory.

    Files are read again when one of them changes; one that cannot be used is left out, and ``problems`` names it. May
    be used from several threads.
    """

    def __init__(self, path: str | Path, roots: GpuRoots) -> None:
        self.path: Path = Path(path)
        self.problems: tuple[str, ...] = ()
        self._roots = roots
        self._lock = threading.Lock()
        self._stamp: object = None
        self._found = GpuCollateral()

    def fetch(self) -> GpuCollateral:
        """Return all that is there. Raises `CollateralUnavailable` if a directory cannot be read."""
        with self._lock:
            rims, status = (self._files(name) for name in _KINDS)
            try:
                stamp = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in (*rims, *status))
            except OSError as exc:  # it went while it was looked at
                raise CollateralUnavailable(f"GPU collateral directory {self.path}: {exc.strerror}") from None
            if stamp != self._stamp:
                self._found = self._read(rims, status)
                self._stamp = stamp
            return self._found

    def _files(self, name: str) -> list[Path]:
        try:
            found = [one for one in (self.path / name).iterdir() if one.is_file() and not one.name.startswith(".")]
        except OSError as exc:
            raise CollateralUnavailable(f"GPU collateral directory {self.path / name}: {exc.strerror}") from None
        return sorted(found)

    def _read(self, rims: list[Path], status: list[Path]) -> GpuCollateral:
        problems: list[str] = []
        found: list[VerifiedRim] = []
        pieces: list[bytes] = []
        for path in rims:
            try:
                found.append(authenticate_rim(read_file(path), roots=self._roots))
            except (GpuError, FileUnavailable) as exc:
                problems.append(f"{path}: {reason(exc, path)}")
        for path in status:
            try:
                data = read_file(path)
                _ = Revocation.of([data])
                pieces.append(data)
            except (GpuError, FileUnavailable) as exc:
                problems.append(f"{path}: {reason(exc, path)}")
        self.problems = tuple(problems)
        return GpuCollateral(Rims.of(found), Revocation.of(pieces))


def make_gpu_directory(path: str | Path) -> Path:
    """Return a directory that `GpuCollateralDirectory` reads, made if it is missing. Raises `FileUnavailable`."""
    for name in _KINDS:
        _ = make_directory(Path(path) / name)
    return Path(path)


def gpu_root_files(directory: str | Path) -> tuple[Path, Path]:
    """The files of the roots for devices and for RIMs in a directory."""
    return Path(directory) / "device-root.der", Path(directory) / "rim-root.der"


def read_gpu_roots(directory: str | Path, read: Callable[[Path], bytes] = read_file) -> GpuRoots:
    """Read the roots of `gpu_root_files`. Raises `ConfigurationError`."""
    try:
        device, rim = (read_root(read(file)) for file in gpu_root_files(directory))
    except GpuError as exc:
        raise ConfigurationError(f"{directory}: {exc}") from None
    return GpuRoots(device, rim)
