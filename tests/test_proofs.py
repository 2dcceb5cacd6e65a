"""The results of checks: no truth value, no pickle, and no copy but themselves."""

from __future__ import annotations

import copy
import inspect
import pickle
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_type_hints

import attrs
import pytest

import chutes_proto
from chutes_proto._proof import NoTruthValue, Proof, Proven
from tests.test_public import EXPORTED, callables

CHECK = re.compile("(verify|check|authenticate|compare|replay|appraise)(_|$)|open_quote$")


def results() -> Iterator[type]:
    """The classes of which public functions that check something return a value."""
    for package, name in EXPORTED:
        for function in callables(getattr(import_module(package), name)):
            if inspect.isfunction(function) and CHECK.match(function.__name__):
                made = get_type_hints(function)["return"]
                if inspect.isclass(made) and attrs.has(made):
                    yield made


def beneath(kind: type) -> set[type]:
    subclasses: list[type] = kind.__subclasses__()
    # attrs replaces a class with slots; the one it was made of may not be collected yet
    made = [each for each in subclasses if "__attrs_attrs__" in vars(each)]
    return {kind}.union(*map(beneath, made))


for module in pkgutil.walk_packages(chutes_proto.__path__, "chutes_proto."):
    if not module.name.endswith("__main__"):
        _ = import_module(module.name)
KINDS = sorted(({*results()} | beneath(NoTruthValue)) - {NoTruthValue, Proven}, key=lambda kind: kind.__name__)
PROVEN = [kind for kind in KINDS if any(field.type in (Proof, "Proof") for field in attrs.fields(kind))]


def blank(kind: type) -> Any:
    return object.__new__(kind)


def test_the_results_are_found() -> None:
    names = {kind.__name__ for kind in KINDS}
    assert {"AcceptedVerdict", "Verdict", "AcceptedEvidence", "GenuineDevice", "VerifiedService"} < names
    assert {"VerifiedCollateral", "VerifiedRim", "ReplayedLog", "ClientKey", "CheckedHeader", "DeviceReport"} < names


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_has_no_truth_value(kind: type) -> None:
    with pytest.raises(TypeError, match=f"^{kind.__name__} is neither true nor false: "):
        _ = bool(blank(kind))


@pytest.mark.parametrize("kind", PROVEN)
def test_a_proof_stays_in_its_process_and_no_copy_is_another_one(kind: type) -> None:
    value = blank(kind)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=f"^{kind.__name__} is not pickled: .* verify that again$"):
            _ = pickle.dumps([value], protocol)
    assert copy.copy(value) is copy.deepcopy([value])[0] is value


@pytest.mark.parametrize("kind", PROVEN)
def test_a_proof_is_made_by_its_check_only(kind: type) -> None:
    fields = {field.name: None for field in attrs.fields(kind)}
    with pytest.raises(TypeError, match="made by that check only"):
        _ = kind(**fields)
    with pytest.raises(TypeError):
        _ = kind(**{name: None for name in fields if name != "proof"})
