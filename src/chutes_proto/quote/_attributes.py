"""Appraise a TD's attributes: the part of a policy that a measurement profile may replace.

Rules kept here:

* reserved bits are zero, always; a bit that has no name yet is zero unless ``attributes_allowed`` has it;
* the bits under test (TUD: debug, profiling) are zero unless ``unsafe_allow_debug`` says otherwise, which no file of
  measurement profiles can say;
* SEPT_VE_DISABLE is set, MIGRATABLE and SERVTD_EXT are clear and a service TD is refused unless allowed by name;
* what could export a TD's memory, a migratable TD or a service TD, is only allowed together with the measurements of
  those service TDs, so only for reports that have them (TDX 1.5).

Source: Intel TDX Module Base Architecture Specification, "TD attributes" and "XFAM".
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

from attrs import frozen

from chutes_proto.quote._errors import PolicyError, Refusal, mismatch
from chutes_proto.quote._layout import TdAttributes, TdReport10, TdReport15

Demand: TypeAlias = Literal["required", "any"]
Allowance: TypeAlias = Literal["refused", "allowed"]

UNDER_TEST: Final = 0xFF
NAMED_UNDER_TEST: Final = (
    TdAttributes.DEBUG | TdAttributes.HGS_PLUS_PROF | TdAttributes.PERF_PROF | TdAttributes.PMT_PROF
)
RESERVED: Final = 0x3FFF_FFFF_0780_FF00 | (UNDER_TEST & ~int(NAMED_UNDER_TEST))
"""Bits 1-3 and 7, 8-15, 23-26 and 32-61."""
ATTRIBUTES_KNOWN: Final = sum(map(int, TdAttributes))
"""The bits that have names. Bits 18 to 22 are neither reserved for ever nor named, so far."""

_DEBUG: Final = int(TdAttributes.DEBUG)  # as numbers: to combine members of an enumeration makes new ones each time
_PROFILING: Final = int(NAMED_UNDER_TEST & ~TdAttributes.DEBUG)
_SEPT_VE_DISABLE: Final = int(TdAttributes.SEPT_VE_DISABLE)
_MIGRATABLE: Final = int(TdAttributes.MIGRATABLE)
_SERVTD_EXT: Final = int(TdAttributes.SERVTD_EXT)

XFAM_FIXED: Final = 0x3
"""x87 and SSE are always on."""
XFAM_KNOWN: Final = 0x6DBE7


@frozen(kw_only=True)
class AttributePolicy:
    """The TD attributes and XFAM that are acceptable. Raises `PolicyError` for fields that contradict each other.

    ``mr_service_td`` are the measurements (48 bytes each) of service TDs that a TD may be bound to; it goes with
    ``migratable`` or ``service_td`` "allowed" and only with them. ``attributes_allowed`` are the bits that the TD
    attributes may have, as far as the other fields let them. ``xfam_required`` are the bits that XFAM must have,
    ``xfam_allowed`` all that it may have.
    """

    sept_ve_disable: Demand = "required"
    migratable: Allowance = "refused"
    servtd_ext: Allowance = "refused"
    service_td: Allowance = "refused"
    mr_service_td: tuple[bytes, ...] = ()
    attributes_allowed: int = ATTRIBUTES_KNOWN
    xfam_required: int = XFAM_FIXED
    xfam_allowed: int = XFAM_KNOWN
    unsafe_allow_debug: bool = False

    def __attrs_post_init__(self) -> None:
        if self.sept_ve_disable not in get_args(Demand):
            raise PolicyError('sept_ve_disable: must be "required" or "any"')
        for name in ("migratable", "servtd_ext", "service_td"):
            if getattr(self, name) not in get_args(Allowance):
                raise PolicyError(f'{name}: must be "refused" or "allowed"')
        if type(self.unsafe_allow_debug) is not bool:
            raise PolicyError("unsafe_allow_debug: must be true or false")
        for name in ("attributes_allowed", "xfam_required", "xfam_allowed"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < 1 << 64:
                raise PolicyError(f"{name}: must be a number of 64 bits")
        if self.xfam_required & ~self.xfam_allowed:
            raise PolicyError("xfam_required: must be among the bits of xfam_allowed")
        if type(self.mr_service_td) is not tuple or any(
            type(value) is not bytes or len(value) != 48 or not any(value) for value in self.mr_service_td
        ):
            raise PolicyError("mr_service_td: must be measurements of 48 bytes that are not all zero")
        if (self.migratable == "allowed" or self.service_td == "allowed") != bool(self.mr_service_td):
            raise PolicyError(
                'mr_service_td: goes with migratable = "allowed" or service_td = "allowed", and these only with it'
            )

    def refusals(self, body: TdReport10) -> list[Refusal]:
        """List every reason to refuse the attributes, XFAM and service TD of a TD's report."""
        bits = body.td_attributes
        found: list[Refusal] = []

        def refuse(code: str, detail: str, got: int, expected: str) -> None:
            found.append(mismatch("attributes", code, detail, f"0x{got:016x}", expected))

        if bits & RESERVED:
            refuse("td_attributes_reserved", "reserved TD attributes are set", bits, f"no bit of 0x{RESERVED:016x}")
        if unknown := bits & ~self.attributes_allowed & ~RESERVED:
            expected = f"no bit of 0x{unknown:016x}"
            refuse("td_attributes", "TD attributes are set that attributes_allowed does not have", bits, expected)
        if not self.unsafe_allow_debug:
            if bits & _DEBUG:
                refuse("debug", "the TD can be debugged by its host", bits, "bit 0 clear")
            if bits & _PROFILING:
                refuse("profiling", "the TD can be profiled by its host", bits, "bits 4 to 6 clear")
        if self.sept_ve_disable == "required" and not bits & _SEPT_VE_DISABLE:
            refuse("sept_ve_disable", "SEPT_VE_DISABLE is clear", bits, "bit 28 set")
        if self.migratable == "refused" and bits & _MIGRATABLE:
            refuse("migratable", "the TD can be migrated", bits, "bit 29 clear")
        if self.servtd_ext == "refused" and bits & _SERVTD_EXT:
            refuse("servtd_ext", "SERVTD_EXT is set", bits, "bit 17 clear")
        if self.xfam_required & ~body.xfam or body.xfam & ~self.xfam_allowed:
            expected = f"bits of 0x{self.xfam_allowed:x}, those of 0x{self.xfam_required:x} set"
            refuse("xfam", "XFAM is not allowed", body.xfam, expected)
        return found + self._service_td(body)

    def _service_td(self, body: TdReport10) -> list[Refusal]:
        migratable = bool(body.td_attributes & _MIGRATABLE)
        bound = body.mr_service_td if isinstance(body, TdReport15) else None
        acceptable, expected = bound is None or not any(bound), "none"
        if migratable and self.migratable == "allowed":
            acceptable, expected = bound in self.mr_service_td, "one of mr_service_td, as the TD is migratable"
        elif self.service_td == "allowed":
            acceptable, expected = acceptable or bound in self.mr_service_td, "one of mr_service_td"
        if acceptable:
            return []
        got = "a report without MRSERVICETD" if bound is None else bound.hex()
        return [mismatch("attributes", "service_td", "the service TD is not allowed", got, expected)]
