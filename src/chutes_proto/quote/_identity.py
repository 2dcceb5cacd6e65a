"""Appraise a quote's origin: the part of a policy that lists TDX modules, owners and machines by name.

Rules kept here:

* a list that is not there accepts all, a list that is there accepts its members and nothing else, also where the quote
  says nothing; an empty list is refused, because it would accept nothing;
* attestation alone cannot tell a machine that its owner tampers with from one in a locked room: a caller with known
  machines lists their PPIDs or platform instance ids.

Source: Intel TDX Module Base Architecture Specification, "TD measurement" (MRSEAM is the module's, the others are
given by who starts the TD); Intel SGX PCK Certificate and CRL Profile Specification (PPID, platform instance id).
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias, cast

from attrs import frozen

from chutes_proto.quote._errors import PolicyError, Refusal, mismatch
from chutes_proto.quote._layout import SgxReport, TdReport10
from chutes_proto.quote._pck import PckIdentity

Accepted: TypeAlias = tuple[bytes, ...] | None
"""The accepted values; None accepts any."""

_OF_TDS: Final = {
    "mr_seam": "MRSEAM",
    "mr_config_id": "MRCONFIGID",
    "mr_owner": "MROWNER",
    "mr_owner_config": "MROWNERCONFIG",
}
_OF_PLATFORMS: Final = {"ppid": "the PPID", "platform_instance_id": "the platform instance id"}
_OF_ENCLAVES: Final = {"mr_enclave": "MRENCLAVE", "mr_signer": "MRSIGNER"}
_REGISTERS: Final = {**_OF_TDS, **_OF_ENCLAVES}
_SIZES: Final = {  # in the order of refusals
    **dict.fromkeys(_OF_PLATFORMS, 16),
    **dict.fromkeys(_OF_TDS, 48),
    **dict.fromkeys(_OF_ENCLAVES, 32),
}
_ISV_MOST: Final = 0xFFFF


@frozen(kw_only=True)
class IdentityPolicy:
    """The accepted values of each field. Registers have 48 bytes, PPID and platform instance id 16.

    The last four are of SGX enclaves: MRENCLAVE and MRSIGNER (32 bytes each), ISVPRODID, and a lower bound for ISVSVN.
    A product and its version mean something only with who signs them, so the two go with ``mr_signer``. Raises
    `PolicyError` for values of another length, and for an empty list.
    """

    mr_seam: Accepted = None
    mr_config_id: Accepted = None
    mr_owner: Accepted = None
    mr_owner_config: Accepted = None
    ppid: Accepted = None
    platform_instance_id: Accepted = None
    mr_enclave: Accepted = None
    mr_signer: Accepted = None
    isv_prod_id: tuple[int, ...] | None = None
    min_isv_svn: int = 0

    def __attrs_post_init__(self) -> None:
        for name, size in _SIZES.items():
            values: Any = getattr(self, name)
            if values is None:
                continue
            if type(values) is not tuple or not all(type(v) is bytes and len(v) == size for v in cast("Any", values)):
                raise PolicyError(f"{name}: must be values of {size} bytes")
            if not values:
                raise PolicyError(f"{name}: an empty list would accept nothing; leave it out to accept anything")

        products: Any = self.isv_prod_id
        if products is not None and (
            type(products) is not tuple or not products or not all(map(_is_isv, cast("Any", products)))
        ):
            raise PolicyError("isv_prod_id: must be a list of numbers of 16 bits, and not empty")
        if not _is_isv(self.min_isv_svn):
            raise PolicyError("min_isv_svn: must be a number of 16 bits")
        if (self.isv_prod_id is not None or self.min_isv_svn) and self.mr_signer is None:
            raise PolicyError("mr_signer: isv_prod_id and min_isv_svn go with it, because every signer numbers its own")

    @property
    def pins_enclaves(self) -> bool:
        """Whether only enclaves of named measurements or signers are accepted."""
        return self.mr_enclave is not None or self.mr_signer is not None

    def refusals(self, pck: PckIdentity, body: TdReport10 | SgxReport) -> list[Refusal]:
        """List the refusals: one for each value that is not on its list."""
        found: list[Refusal] = []
        for name in _SIZES:
            accepted: Accepted = getattr(self, name)
            if accepted is None:
                continue
            register = _REGISTERS.get(name)
            got: bytes | None = getattr(pck if register is None else body, name, None)
            if got not in accepted:
                said = "none" if got is None else got.hex()
                expected = " or ".join(value.hex() for value in accepted)
                values = (f"{register or _OF_PLATFORMS[name]} is not accepted", said, expected, register)
                found.append(mismatch("tcb" if register is None else "measurement", name, *values))
        if isinstance(body, SgxReport):
            product, svn = body.isv_prod_id, body.isv_svn
            if self.isv_prod_id is not None and product not in self.isv_prod_id:
                expected = " or ".join(map(str, self.isv_prod_id))
                found.append(
                    mismatch("measurement", "isv_prod_id", "ISVPRODID is not accepted", str(product), expected)
                )
            if svn < self.min_isv_svn:
                floor = f"at least {self.min_isv_svn}"
                found.append(mismatch("measurement", "isv_svn", "ISVSVN is too low", str(svn), floor))
        return found


def _is_isv(value: object) -> bool:
    return type(value) is int and 0 <= value <= _ISV_MOST
