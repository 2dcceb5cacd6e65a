"""The boot agent and a miner's client without an event loop: for an initramfs, a script, a thread.

Nothing here needs trio, anyio or httpx.
"""

from chutes_proto.io.clients.sync import BootAgent, MinerClient
from chutes_proto.io.disks.cryptsetup import has_luks_header
from chutes_proto.io.drivers.sync import Performer
from chutes_proto.io.http.https import HttpsSender, TimeLimits
from chutes_proto.io.quoters.choose import auto_quoter, make_quoter

__all__ = [
    "BootAgent",
    "HttpsSender",
    "MinerClient",
    "Performer",
    "TimeLimits",
    "auto_quoter",
    "has_luks_header",
    "make_quoter",
]
