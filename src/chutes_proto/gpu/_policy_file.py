"""Read a policy for GPUs from TOML: an unknown key is an error, and every error names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import field, fields_dict, frozen

from chutes_proto._converter import (
    Hook,
    MismatchError,
    ProblemsError,
    StrictConverter,
    file_array,
    list_of,
    load_toml,
    string,
)
from chutes_proto.gpu._errors import GpuPolicyError
from chutes_proto.gpu._policy import GpuPolicy, PinnedMeasurements, RevocationDemand
from chutes_proto.quote._arguments import BytesLike, as_utf8
from chutes_proto.quote._strict_json import digits

MAX_SIZE: Final = 1024 * 1024


@frozen(kw_only=True)
class PinnedForm:
    """One ``[[pinned]]`` as it stands in a file: values are hex, by the RIM's index."""

    chip: str
    driver: str
    vbios: str
    values: Mapping[str, str]

    def pinned(self) -> PinnedMeasurements:
        """The measurements. Raises `GpuPolicyError`."""
        values: dict[int, bytes] = {}
        for index, text in self.values.items():
            value = digits(text)
            if value is None or not index.isdecimal() or not index.isascii() or len(index) > 3:
                raise GpuPolicyError("values: must be hexadecimal digits by the index of the measurement")
            values[int(index)] = value
        return PinnedMeasurements(chip=self.chip, driver=self.driver, vbios=self.vbios, values=values)


@frozen(kw_only=True)
class GpuPolicyForm:
    """The keys of a policy in a file; None leaves the policy's default."""

    min_driver: str | None = None
    min_vbios: Mapping[str, str] = field(factory=dict[str, str])
    modes: frozenset[str] | None = None
    models: frozenset[str] | None = None
    boards: Mapping[str, str] = field(factory=dict[str, str])
    measurements: str = "rims"
    revocation: RevocationDemand = "require"
    revocation_grace: int = 0
    allow_rim_signer_on_hold: bool = False
    pinned: tuple[PinnedForm, ...] = ()

    def policy(self) -> GpuPolicy:
        """The policy. Raises `GpuPolicyError`."""
        members: dict[str, Any] = {name: getattr(self, name) for name in fields_dict(GpuPolicyForm)}
        members["pinned"] = tuple(one.pinned() for one in self.pinned)
        return GpuPolicy(**members)


def parse_gpu_policy(data: BytesLike | str) -> GpuPolicy:
    """Read the policy in a TOML file. Raises `GpuPolicyError`, which names the key."""
    data = as_utf8(data, "the bytes or text of a TOML file")
    if len(data) > MAX_SIZE:
        raise GpuPolicyError(f"more than {MAX_SIZE} bytes of TOML")
    try:
        return CONVERTER.structure(load_toml(data), GpuPolicyForm).policy()
    except ProblemsError as exc:
        raise GpuPolicyError(str(exc)) from None


def _words(value: object, _: object) -> frozenset[str]:
    words = list_of(string, file_array)(value)
    if not words:
        raise MismatchError("value_error", "must name at least one")
    return frozenset(words)


HOOKS: Final[Mapping[object, Hook]] = {frozenset[str]: _words}
CONVERTER: Final = StrictConverter(HOOKS, own_file=True, refusal=GpuPolicyError)
