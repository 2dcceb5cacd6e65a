"""A sans-I/O protocol library for confidential VMs: attest at boot, receive disk passphrases, keep proving.

Nothing but the packages ``io`` and ``cli`` opens a socket, reads a clock or draws randomness. Each package's
``__init__`` says what it is for. This file imports nothing, so that ``import chutes_proto.quote`` stays cheap.
"""

__version__ = "0.1.0"


class ChutesError(Exception):
    """Root of every error that this distribution raises on purpose (the tree is in ``chutes_proto.errors``)."""
