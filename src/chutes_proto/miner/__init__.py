"""A miner's servers at a key server, as flows and values.

The flows do no I/O. A driver carries them out: ``Performer`` of ``chutes_proto.sync``, ``chutes_proto_trio`` or
``chutes_proto_asyncio``, each of which has a ``MinerClient`` too that needs no flow.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.auth.hotkey import Hotkey, HotkeyError, HotkeyPair
    from chutes_proto.auth.signing import Signer, SigningPolicy
    from chutes_proto.miner._flows import (
        MINER_RETRY,
        AttestationStatus,
        Gpu,
        Miner,
        RuntimeAttestation,
        RuntimeVerdict,
        Server,
        attest_server,
        list_servers,
        read_server,
        read_status,
        register_server,
        remove_server,
        rename_server,
    )
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.auth.hotkey": "Hotkey HotkeyError HotkeyPair",
            "chutes_proto.auth.signing": "Signer SigningPolicy",
            "chutes_proto.miner._flows": (
                "MINER_RETRY AttestationStatus Gpu Miner RuntimeAttestation RuntimeVerdict Server attest_server "
                "list_servers read_server read_status register_server remove_server rename_server"
            ),
        },
    )

__all__ = ["attest_server", "read_status"]
__all__ += ["list_servers", "read_server", "register_server", "remove_server", "rename_server"]
__all__ += ["AttestationStatus", "Gpu", "Miner", "RuntimeAttestation", "RuntimeVerdict", "Server"]
__all__ += ["MINER_RETRY", "Hotkey", "HotkeyError", "HotkeyPair", "Signer", "SigningPolicy"]
