"""Files as Intel's PcsClientTool writes them, of simulated platforms."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote as encoded

from chutes_proto.testing._pki import pem
from chutes_proto.testing._platform import SimulatedPlatform


def pcs_client_file(*platforms: SimulatedPlatform, now: int, prefix: str = "SGX-") -> dict[str, Any]:
    """The content of ``platform_collaterals.json``: TCB info as objects, identities as texts, chains encoded."""
    made = [(platform, platform.collateral(now)) for platform in platforms]
    last = made[-1][1]
    identity = f'{{"enclaveIdentity":{last.qe_identity.decode()},"signature":"{last.qe_identity_signature.hex()}"}}'
    certs = [
        {
            "qe_id": "00" * 16,
            "enc_ppid": encrypted_ppid(platform).hex(),
            "certs": [{"tcbm": "00" * 18, "cert": "-"}, {"tcbm": _tcbm(), "cert": encoded(_pem(platform, 0, 1))}],
        }
        for platform in platforms
    ]
    return {
        "platforms": [],
        "collaterals": {
            "version": 4,
            "pck_certs": [{"enc_ppid": "00", "certs": []}, *certs],
            "tcbinfos": [
                {
                    "fmspc": platform.fmspc.hex().upper(),
                    "tdx_tcbinfo": {"tcbInfo": json.loads(made.tcb_info), "signature": made.tcb_info_signature.hex()},
                }
                for platform, made in made
            ],
            "pckcacrl": {f"{platform.ca}Crl": made.pck_crl.hex() for platform, made in made},
            "qeidentity": "",
            "tdqeidentity": identity,
            "certificates": {
                f"{prefix}PCK-Certificate-Issuer-Chain": {p.ca.upper(): encoded(_pem(p, 1, 3)) for p in platforms},
                f"{prefix}TCB-Info-Issuer-Chain": encoded(last.tcb_info_issuer_chain),
                "SGX-Enclave-Identity-Issuer-Chain": encoded(last.qe_identity_issuer_chain),
            },
            "rootcacrl": last.root_ca_crl.hex(),
        },
    }


def encrypted_ppid(platform: SimulatedPlatform) -> bytes:
    """What stands for the encrypted PPID of a simulated platform: nobody decrypts it."""
    return platform.ppid.ljust(384, b"\0")


def _pem(platform: SimulatedPlatform, begin: int, end: int) -> str:
    return pem(platform.pck_chain()[begin:end])


def _tcbm() -> str:
    from chutes_proto.testing._statements import PCE_SVN, SGX_COMPONENTS

    return (bytes(SGX_COMPONENTS) + PCE_SVN.to_bytes(2, "little")).hex()
