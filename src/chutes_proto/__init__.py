"""A sans-I/O protocol library for confidential VMs: attest at boot, receive disk passphrases, keep proving.

This is the front: the few names that most programs need. The rest is in the public packages:

* ``chutes_proto.sync``, ``chutes_proto_trio``, ``chutes_proto_asyncio``: clients, and the key server in a program;
* ``chutes_proto.boot``, ``chutes_proto.miner``: a VM's and a miner's flows and values;
* ``chutes_proto.server``: the key server's configuration and ASGI application;
* ``chutes_proto.quote``: the verifier of quotes, usable alone; ``chutes_proto.gpu``: that of the evidence of GPUs;
* ``chutes_proto.store``, ``chutes_proto.effects``: for a store or a driver of one's own;
* ``chutes_proto.testing``: a simulated platform, playbooks, the contract of a store;
* ``chutes_proto.errors``, ``chutes_proto.secret``, ``chutes_proto.log``.

Only ``chutes_proto.io`` and the commands open sockets, read clocks or draw randomness. Names are imported
when they are first used, so ``import chutes_proto.quote`` stays cheap.
"""

from typing import TYPE_CHECKING

from chutes_proto._error import ChutesError
from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.errors import Refusal, Refused, TransportError, Unavailable
    from chutes_proto.log import Level, Record
    from chutes_proto.quote._errors import VerificationError
    from chutes_proto.secret import Secret
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.errors": "Refusal Refused TransportError Unavailable",
            "chutes_proto.log": "Level Record",
            "chutes_proto.quote._errors": "VerificationError",
            "chutes_proto.secret": "Secret",
        },
    )

__version__ = "0.1.0"

__all__ = ["ChutesError", "Refusal", "Refused", "TransportError", "Unavailable", "VerificationError"]
__all__ += ["Level", "Record", "Secret"]
