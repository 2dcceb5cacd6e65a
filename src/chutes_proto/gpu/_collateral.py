"""Everything that GPU evidence is verified with: RIMs and revocation."""

from __future__ import annotations

from attrs import field, frozen

from chutes_proto.gpu._revocation import Revocation
from chutes_proto.gpu._verify import Rims
from chutes_proto.quote._arguments import check_kind


@frozen(eq=False)
class GpuCollateral:
    """RIMs that their signers signed, of whatever time, and what is known about revoked certificates."""

    rims: Rims = field(factory=Rims)
    revocation: Revocation = field(factory=Revocation)

    def __attrs_post_init__(self) -> None:
        check_kind("rims", self.rims, Rims, "Rims")
        check_kind("revocation", self.revocation, Revocation, "Revocation")
