"""A key server for one run on this machine, as files like an operator's, that trusts the simulated platform.

Rules kept here:

* the directory is private and belongs to this run: keys, store and certificates end with it;
* the server is the one that `serve --config` makes of the same files.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from attrs import frozen

from chutes_proto.auth.client_identity import ENTROPY_SIZE
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.errors import CollateralUnavailable
from chutes_proto.io.files import make_directory, read_file, write_file
from chutes_proto.testing._gpus import SimulatedGpus, gpu_files
from chutes_proto.testing._platform import PROFILE

if TYPE_CHECKING:
    from chutes_proto.io.collateral.directory import CollateralDirectory
    from chutes_proto.quote._collateral import VerifiedCollateral
    from chutes_proto.quote._pck import PckIdentity
    from chutes_proto.server._gpu_evidence import Demand
    from chutes_proto.testing._platform import SimulatedPlatform

CONFIGURATION: Final = "server.toml"
AUTHORITY: Final = "ca.pem"

_SERVER: Final = """\
listen = "127.0.0.1:0"
tls = { certificate = "server.pem", key = "server.key" }
store = "sqlite:keys.db"
kek_file = "kek"
roots = "simulated-root.der"
collateral = { directory = "collateral" }
measurements = ["measurements.toml"]
signing_keys_file = "signing-keys.json"
hotkeys = "*"
limits.drain_seconds = 0

[profile_defaults]
root_passphrase = "vm"
"""

_DEFAULTS: Final = "[profile_defaults]\n"
_GPU_EVIDENCE: Final = """
[gpu_evidence]
directory = "gpus"
roots = "gpus"
policy = "gpus/policy.toml"
"""
_GPU_POLICY: Final = """\
revocation = "grace"
revocation_grace = 31536000
"""


@contextmanager
def folder_of_this_run(prefix: str) -> Generator[Path]:
    """A private folder that is removed at the end, also where SIGTERM or SIGHUP ends the process before.

    Must be entered in the main thread. A server sets handlers of its own, and then lets both signals do nothing; one
    whose store hangs at its end leaves the folder.
    """
    ends = (signal.SIGTERM, signal.SIGHUP)
    with ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ends, signal.SIGINT))
        try:  # until the folder is known
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix))

            def end(number: int, *_frame: object) -> None:
                shutil.rmtree(name, ignore_errors=True)
                _ = signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)  # the process ends as it would have without a handler

            for each in ends:
                if signal.getsignal(each) is not signal.SIG_IGN:  # as `nohup` sets it
                    _ = signal.signal(each, end)
        finally:
            _ = signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield Path(name).resolve()


def write_server(directory: Path, platform: SimulatedPlatform, now: int) -> None:
    """All files of a server that trusts ``platform`` and accepts what it measures."""
    identity = make_server_identity(now, os.urandom(ENTROPY_SIZE))
    write_file(directory / AUTHORITY, identity.ca_pem)
    write_file(directory / "server.pem", identity.chain_pem)
    write_file(directory / "server.key", identity.key_pem.reveal(), mode=0o600)
    write_file(directory / "kek", os.urandom(32), mode=0o600)
    write_file(directory / "simulated-root.der", platform.root_der)
    write_file(directory / "signing-keys.json", b'{"version":1,"keys":{},"signatures":{}}')
    write_file(directory / "measurements.toml", PROFILE.to_toml().encode())
    write_file(directory / CONFIGURATION, _SERVER.encode(), mode=0o600)  # it may come to hold a password
    write_collateral(make_directory(directory / "collateral"), platform, now)


def write_collateral(directory: Path, platform: SimulatedPlatform, now: int) -> None:
    """Fresh collateral of ``platform``, in place of its older."""
    write_file(directory / f"{platform.fmspc.hex()}.json", platform.collateral_json(now))


def write_gpus(directory: Path, gpus: SimulatedGpus, now: int, *, demand: Demand) -> None:
    """Have the server in ``directory`` appraise GPU evidence, of ``gpus``; OCSP answers count for a year."""
    for name, data in gpu_files(gpus, bytes(32), now).items():
        _ = make_directory((directory / "gpus" / name).parent)
        write_file(directory / "gpus" / name, data)
    write_file(directory / "gpus" / "policy.toml", _GPU_POLICY.encode())
    configuration = directory / CONFIGURATION
    text = read_file(configuration).decode().replace(_DEFAULTS, f'{_DEFAULTS}gpu_evidence = "{demand}"\n')
    write_file(configuration, (text + _GPU_EVIDENCE).encode(), mode=0o600)


@frozen
class RenewedCollateral:
    """Collateral from a directory; that of ``platform`` is made again there when it has expired or is missing."""

    directory: CollateralDirectory
    platform: SimulatedPlatform

    def available(self, identity: PckIdentity, now: int) -> VerifiedCollateral | None:
        """See `CollateralDirectory.available`."""
        return self.directory.available(identity, now)

    def fetch(self, identity: PckIdentity, now: int) -> VerifiedCollateral:
        """See `CollateralDirectory.fetch`."""
        try:
            return self.directory.fetch(identity, now)
        except CollateralUnavailable:
            if identity.fmspc != self.platform.fmspc:
                raise
            write_collateral(self.directory.path, self.platform, now)
            return self.directory.fetch(identity, now)
