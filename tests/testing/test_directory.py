"""The files of a simulated platform are read back whole, or not at all."""

from __future__ import annotations

import json

import dcap_qvl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.errors import ConfigurationError
from chutes_proto.quote._measurements import parse_profiles_toml
from chutes_proto.quote._policy import Policy, parse_policy_toml
from chutes_proto.testing._directory import PlatformRecord, simulation_files
from chutes_proto.testing._platform import PROFILE, SimulatedPlatform

NOW = 1_780_000_000
RECORD = PlatformRecord(bytes(range(32)), NOW)


def test_a_platform_is_restored_from_its_file() -> None:
    again = PlatformRecord.decode(RECORD.encode())
    assert again == RECORD
    assert again.platform.root_der == SimulatedPlatform(bytes(range(32))).root_der


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"seed": "00" * 31},
        {"seed": "00" * 33},
        {"seed": "AB" * 32},
        {"seed": "zz" * 32},
        {"seed": 7},
        {"created": "yesterday"},
        {"created": 1.5},
        {"further": None},
    ],
    ids=str,
)
def test_a_file_that_is_not_of_this_format_is_an_error(change: dict[str, object]) -> None:
    changed = {**json.loads(RECORD.encode()), **change}
    with pytest.raises(ConfigurationError, match=r"platform\.json") as caught:
        _ = PlatformRecord.decode(json.dumps(changed, separators=(",", ":")).encode() + b"\n")
    assert RECORD.seed.hex() not in str(caught.value)


@given(st.one_of(st.binary(max_size=200), st.integers(0, 200).map(lambda size: RECORD.encode()[:size])))
def test_other_bytes_are_an_error(data: bytes) -> None:
    try:
        record = PlatformRecord.decode(data)
    except ConfigurationError:
        return
    assert record.encode() == data


def test_the_measurements_read_back_as_profile_and_as_policy() -> None:
    assert parse_profiles_toml(PROFILE.to_toml().encode()) == ((PROFILE, {}),)
    assert parse_policy_toml(PROFILE.to_toml().encode()) == Policy(profiles=(PROFILE,))


def test_a_simulation_has_all_inputs_of_a_verifier() -> None:
    files = simulation_files(SimulatedPlatform(bytes(32)), bytes(64), now=NOW)
    assert files.keys() == {"quote.bin", "collateral.json", "now.txt", "root.der"}
    report = dcap_qvl.verify_with_root_ca(
        files["quote.bin"],
        dcap_qvl.QuoteCollateralV3.from_json(files["collateral.json"].decode()),
        files["root.der"],
        int(files["now.txt"]),
    )
    assert report.status == "UpToDate"
