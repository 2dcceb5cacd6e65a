"""A VM's side of the boot exchange, as flows and values.

The flows follow the exchange's table and the retry policy, and do no I/O. A driver carries them out:
``Performer`` of ``chutes_proto.sync``, ``chutes_proto_trio`` or ``chutes_proto_asyncio``, each of which has a
``BootAgent`` too that needs no flow.
"""

from typing import TYPE_CHECKING

from chutes_proto._lazy import lazily

if TYPE_CHECKING:
    from chutes_proto.auth.client_identity import ClientIdentity, make_client_identity
    from chutes_proto.auth.signing import Signer
    from chutes_proto.boot._disks import OpenVolume, Unlocked
    from chutes_proto.boot._flows import (
        BootGrant,
        BootSettings,
        KeyPair,
        RootKeys,
        Rotation,
        VolumeKey,
        VolumeKeys,
        Volumes,
        attest_boot,
        attest_volumes,
        boot,
        boot_and_sync,
        confirm_root,
        confirm_volumes,
        fetch_nonce,
        make_quote,
        read_cache_passphrase,
        receive_keys,
        sync_volumes,
    )
    from chutes_proto.boot._retry_policy import DEFAULT_RETRY, RetryPolicy
else:
    __getattr__ = lazily(
        globals(),
        {
            "chutes_proto.auth.client_identity": "ClientIdentity make_client_identity",
            "chutes_proto.auth.signing": "Signer",
            "chutes_proto.boot._disks": "OpenVolume Unlocked",
            "chutes_proto.boot._flows": (
                "BootGrant BootSettings KeyPair RootKeys Rotation VolumeKey VolumeKeys Volumes attest_boot "
                "attest_volumes boot boot_and_sync confirm_root confirm_volumes fetch_nonce make_quote "
                "read_cache_passphrase receive_keys sync_volumes"
            ),
            "chutes_proto.boot._retry_policy": "DEFAULT_RETRY RetryPolicy",
        },
    )

__all__ = ["boot", "boot_and_sync", "confirm_volumes", "read_cache_passphrase", "receive_keys", "sync_volumes"]
__all__ += ["attest_boot", "attest_volumes", "confirm_root", "fetch_nonce", "make_quote"]
__all__ += ["BootGrant", "BootSettings", "KeyPair", "RootKeys", "Rotation", "Signer"]
__all__ += ["OpenVolume", "Unlocked", "VolumeKey", "VolumeKeys", "Volumes"]
__all__ += ["DEFAULT_RETRY", "ClientIdentity", "RetryPolicy", "make_client_identity"]
