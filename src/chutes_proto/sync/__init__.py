"""The boot agent, a miner's client and the driver of flows without an event loop: for an initramfs, a script, a thread;
and collateral for a verifier.

Nothing here needs trio, anyio or httpx.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.io.clients.boot_sync import BootAgent
    from chutes_proto.io.clients.miner_sync import MinerClient
    from chutes_proto.io.collateral.of_quote import fetch_collateral
    from chutes_proto.io.disks.cryptsetup import has_luks_header
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.hotkey_file import read_hotkey
    from chutes_proto.io.http.attested import (
        AttestationFailedError,
        AttestedIdentity,
        attested_callback,
        attested_context,
        make_attested_identity,
    )
    from chutes_proto.io.http.https import HttpsSender, TimeLimits
    from chutes_proto.io.http.tls import client_context
    from chutes_proto.io.quoters.choose import GpuTool, Quoter, auto_quoter, make_quoter
    from chutes_proto.io.quoters.gpus import make_gpu_tool
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.io.clients.boot_sync": "BootAgent",
            "chutes_proto.io.clients.miner_sync": "MinerClient",
            "chutes_proto.io.collateral.of_quote": "fetch_collateral",
            "chutes_proto.io.disks.cryptsetup": "has_luks_header",
            "chutes_proto.io.drivers.sync": "Performer",
            "chutes_proto.io.hotkey_file": "read_hotkey",
            "chutes_proto.io.http.attested": (
                "AttestationFailedError AttestedIdentity attested_callback attested_context make_attested_identity"
            ),
            "chutes_proto.io.http.https": "HttpsSender TimeLimits",
            "chutes_proto.io.http.tls": "client_context",
            "chutes_proto.io.quoters.choose": "GpuTool Quoter auto_quoter make_quoter",
            "chutes_proto.io.quoters.gpus": "make_gpu_tool",
        },
    )

__all__ = [
    "AttestationFailedError",
    "AttestedIdentity",
    "BootAgent",
    "GpuTool",
    "HttpsSender",
    "MinerClient",
    "Performer",
    "Quoter",
    "TimeLimits",
    "attested_callback",
    "attested_context",
    "auto_quoter",
    "client_context",
    "fetch_collateral",
    "has_luks_header",
    "make_attested_identity",
    "make_gpu_tool",
    "make_quoter",
    "read_hotkey",
]
