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
_SIZES: Final = {**dict.fromkeys(_OF_TDS, 48), **dict.fromkeys(_OF_PLATFORMS, 16)}


@frozen(kw_only=True)
class IdentityPolicy:
    """The accepted values of each field. Registers have 48 bytes, PPID and platform instance id 16.

    Raises `PolicyError` for values of another length, and for an empty list.
    """

    mr_seam: Accepted = None
    mr_config_id: Accepted = None
    mr_owner: Accepted = None
    mr_owner_config: Accepted = None
    ppid: Accepted = None
    platform_instance_id: Accepted = None

    def __attrs_post_init__(self) -> None:
        for name, size in _SIZES.items():
            values: Any = getattr(self, name)
            if values is None:
                continue
            if type(values) is not tuple or not all(type(v) is bytes and len(v) == size for v in cast("Any", values)):
                raise PolicyError(f"{name}: must be values of {size} bytes")
            if not values:
                raise PolicyError(f"{name}: an empty list would accept nothing; leave it out to accept anything")

    def refusals(self, pck: PckIdentity, body: TdReport10 | SgxReport) -> list[Refusal]:
        """List the refusals: one for each value that is not on its list."""
        found: list[Refusal] = []
        for name, called in _OF_PLATFORMS.items():
            found += self._refusal(name, called, getattr(pck, name), None)
        for name, register in _OF_TDS.items():
            found += self._refusal(name, register, getattr(body, name, None), register)
        return found

    def _refusal(self, name: str, called: str, got: bytes | None, register: str | None) -> list[Refusal]:
        accepted: Accepted = getattr(self, name)
        if accepted is None or got in accepted:
            return []
        said = "none" if got is None else got.hex()
        expected = " or ".join(value.hex() for value in accepted)
        values = (f"{called} is not accepted", said, expected, register)
        return [mismatch("tcb" if register is None else "measurement", name, *values)]
