"""The arguments of calls that verify: one that cannot be meant is refused at the call, before any evidence is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import pytest

from chutes_proto import gpu, quote, sync
from chutes_proto.gpu import DeviceEvidence, GpuCollateral, GpuPolicy, Revocation, Rims, ServiceBinding
from chutes_proto.quote import AllOf, AnyOf, Policy, PolicyError
from tests.gpu.simulated import GPUS
from tests.quote.simulated import (
    NOW,
    PLATFORM,
    PROFILE,
    REPORT_DATA,
    ROOT,
    collateral_of,
    signed_of,
    verdict_of,
    verified_of,
)
from tests.test_proofs import CHECK

DEVICE: Final = gpu.authenticate(GPUS.evidence(bytes(32))[0], nonce=None, now=NOW, roots=GPUS.roots)
POLICY: Final = Policy(profiles=(PROFILE,))
ARGUMENTS: Final[Mapping[str, Any]] = {
    # in place of evidence, bytes that are none: an argument that is looked at after them is told of too late
    "data": b"",
    "quote": b"",
    "certificate": b"",
    "evidence": b"",
    "collateral": collateral_of(PLATFORM),
    "opened": quote.open_quote(PLATFORM.quote(REPORT_DATA), now=NOW, root=ROOT),
    "signed": signed_of(PLATFORM.quote(REPORT_DATA)),
    "verified": verified_of(PLATFORM),
    "policy": POLICY,
    "verdict": verdict_of(PLATFORM),
    "now": NOW,
    "report_data": None,
    "stage": "boot",
    "device": DEVICE,
    "rims": Rims(),
    "revocation": Revocation(),
    "nonce": None,
    "count": None,
    "binding": ServiceBinding(bytes(64), bytes(32)),
    "gpu_policy": GpuPolicy(),
    "gpu_collateral": GpuCollateral(),
    "log": quote.EventLog(()),
    "rtmrs": (bytes(48),) * 4,
    "good": None,
}
OF_GPUS: Final[Mapping[str, Any]] = {"policy": GpuPolicy()}
DURATION: Final = (-1, 1.5, "60", True, float("nan"))
WRONG: Final[Mapping[str, tuple[Any, ...]]] = {
    "data": (None, "quote", 1),
    "quote": (None, "quote", 1),
    "certificate": (None, "-----BEGIN CERTIFICATE-----", 1),
    "evidence": (None, "[]", [b"[]"]),
    "collateral": (None, b"{}", "collateral.json"),
    "opened": (None, b""),
    "signed": (None, b""),
    "verified": (None, collateral_of(PLATFORM)),
    "verdict": (None, True, REPORT_DATA),
    "policy": (None, "policy.toml"),
    "gpu_policy": (None, "policy.toml", Policy()),
    "now": (None, "0", 1.8e9, float("nan"), True, datetime(2027, 1, 15), datetime(2027, 1, 15, tzinfo=UTC)),  # noqa: DTZ001
    "report_data": ("00" * 64, 0, [0] * 64),
    "root": (None, PLATFORM.root_der, "root.der"),
    "roots": (None, ROOT, "roots"),
    "grace": (*DURATION, None),
    "max_age": (*DURATION, None),
    "max_collateral_age": DURATION,
    "sgx": ("false", "", 0, 1, None),
    "pck_certificate_chain": ("-----BEGIN CERTIFICATE-----", 1),
    "stage": (None, "later", 1, ["boot"]),
    "event_log": (b"", "log", []),
    "device": (None, GPUS.evidence(bytes(32))[0]),
    "rims": (None, (), {"rims"}, [DEVICE]),
    "revocation": (None, (), b""),
    "nonce": ("00" * 32, bytes(31), bytearray(32), 0),
    "count": (-1, "2", 2.0, True),
    "binding": (None, bytes(64)),
    "gpu_collateral": (None, Rims()),
    "log": (None, b""),
    "good": (b"", "log"),
    "rtmrs": (None, b"", (b"",) * 4),
    "accepted": (None, "print"),
}


def calls() -> list[Any]:
    """Each public call that verifies, with each of its parameters."""
    found = {f"{each.__name__}.{name}": getattr(each, name) for each in (quote, gpu) for name in each.__all__}
    found = {name: call for name, call in found.items() if inspect.isfunction(call) and CHECK.match(call.__name__)}
    assert {"chutes_proto.quote.verify", "chutes_proto.gpu.verify", "chutes_proto.gpu.compare"} < found.keys()
    found |= {call.__name__: call for call in (quote.parse_quote, sync.attested_context, sync.attested_callback)}
    found |= {f"{type(each).__name__}.appraise": each.appraise for each in (POLICY, AllOf((POLICY,)), AnyOf((POLICY,)))}
    return [
        pytest.param(call, parameter, id=f"{name}-{parameter}")
        for name, call in found.items()
        for parameter in inspect.signature(call).parameters
    ]


@pytest.mark.parametrize(("call", "name"), calls())
def test_an_argument_that_cannot_be_meant_is_refused_at_the_call(call: Callable[..., Any], name: str) -> None:
    parameters = inspect.signature(call).parameters
    usual = {**ARGUMENTS, **(OF_GPUS if call is gpu.verify else {})}
    needed = {word: usual[word] for word, one in parameters.items() if one.default is one.empty}
    if call is gpu.authenticate:
        needed["evidence"] = DeviceEvidence(b"", b"")
    by_place = [word for word, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    for wrong in WRONG[name]:
        given = needed | {name: wrong}
        places = [given.pop(word) for word in by_place if word in given]
        with pytest.raises((TypeError, ValueError, PolicyError), match=f"^{name}: must "):
            _ = call(*places, **given)
