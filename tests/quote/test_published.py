"""Profiles in the forms in which they are published: the JSON list, the YAML file in both shapes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._measurements import Profile
from chutes_proto.quote._published import ProfileFile, parse_profile_file

KEYS = frozenset({"rc", "authorized_hotkeys"})
MRTD, RTMR1, RTMR2, RTMR3 = ("9a" * 48, "1b" * 48, "2c" * 48, "3d" * 48)
FINGERPRINT = "5f" * 32
FLAT = f"""\
---
# published with the image
measurements:
  - version: 1.10
    mrtd: {MRTD.upper()}
    rtmr1: {RTMR1}
    RTMR2: {RTMR2}
    runtime_rtmr3: "{RTMR3}"
    hardware:
      - name: 8xh200
        rtmr0: {"00" * 48}
        expected_gpus: [H200]
        gpu_count: 8
        fingerprint: {FINGERPRINT}
        description: "eight: of them"
      - {{name: 8xb200, rtmr0: {"11" * 48}, expected_gpus: [b200], gpu_count: 8, fingerprint: null}}
  - version: "1.11"
    rc: true
    authorized_hotkeys: [5Grw]
    mrtd: {"9b" * 48}
    rtmr1: {RTMR1}
    rtmr2: {RTMR2}
    runtime_rtmr3: {RTMR3}
    hardware:
      - {{name: 8xh200, rtmr0: {"00" * 48}, expected_gpus: [h200], gpu_count: 8}}
"""
BY_PLATFORM = f"""\
measurements:
- version: "1.10"
  tdx:
    mrtd: {MRTD}
    rtmr1: {RTMR1}
    rtmr2: {RTMR2}
    rtmr3: {RTMR3}
    hardware:
    - name: 8xh200
      rtmr0: {"00" * 48}
      expected_gpus: [h200]
      gpu_count: 8
      fingerprints: [{FINGERPRINT}]
    - {{name: 8xb200, rtmr0: {"11" * 48}, expected_gpus: [b200], gpu_count: 8}}
  snp:
    hardware:
    - {{name: 8xh200, measurement: {"77" * 48}, acpi_sha256: {"88" * 32}, gpu_count: 8, expected_gpus: [h200]}}
- version: "1.11"
  rc: true
  authorized_hotkeys: [5Grw]
  tdx:
    mrtd: {"9b" * 48}
    rtmr1: {RTMR1}
    rtmr2: {RTMR2}
    rtmr3: {RTMR3}
    hardware:
    - {{name: 8xh200, rtmr0: {"00" * 48}, expected_gpus: [h200], gpu_count: 8}}
"""


def parse(data: bytes, **options: Any) -> ProfileFile:
    return parse_profile_file(data, read_yaml, **options)


def rtmrs(first: str, last: str) -> tuple[bytes, bytes, bytes, bytes]:
    one, two, three, four = (bytes.fromhex(text) for text in (first, RTMR1, RTMR2, last))
    return one, two, three, four


def profile(name: str, rtmr0: str, version: str = "1.10", mrtd: str = MRTD, **more: Any) -> Profile:
    return Profile(
        name=name,
        version=version,
        mrtd=bytes.fromhex(mrtd),
        boot=rtmrs(rtmr0, "00" * 48),
        runtime=rtmrs(rtmr0, RTMR3),
        expected_gpus=(name.removeprefix("8x"),),
        gpu_count=8,
        **more,
    )


H200 = profile("8xh200", "00" * 48, fingerprints=(bytes.fromhex(FINGERPRINT),))
B200 = profile("8xb200", "11" * 48)
RC = profile("8xh200", "00" * 48, "1.11", "9b" * 48)
ALL: tuple[tuple[Profile, dict[str, object]], ...] = (
    (H200, {}),
    (B200, {}),
    (RC, {"rc": True, "authorized_hotkeys": ["5Grw"]}),
)


def published(upper: bool) -> bytes:
    """The list of a key server, in the case of the reference system or in the other."""

    def registers(of: tuple[bytes, ...]) -> dict[str, str]:
        return {f"RTMR{n}" if upper else f"rtmr{n}": cased(register) for n, register in enumerate(of)}

    def cased(octets: bytes) -> str:
        return octets.hex().upper() if upper else octets.hex()

    return json.dumps(
        [
            {
                "version": one.version,
                "name": one.name,
                "mrtd": cased(one.mrtd),
                "boot_rtmrs": registers(one.boot),
                "runtime_rtmrs": registers(one.runtime),
                "expected_gpus": list(one.expected_gpus),
                "gpu_count": one.gpu_count,
                "fingerprint": one.fingerprints[0].hex() if one.fingerprints else None,
            }
            for one in (H200, B200)
        ]
    ).encode()


def test_both_shapes_of_the_yaml_file_and_the_list_say_the_same() -> None:
    assert parse(FLAT.encode(), extra_keys=KEYS).profiles == ALL
    assert parse(BY_PLATFORM.encode(), extra_keys=KEYS).profiles == ALL
    assert parse(published(upper=True)).profiles == ALL[:2]
    assert parse(published(upper=False)).profiles == ALL[:2]
    toml = "".join(one.to_toml() for one in (H200, B200))
    assert [one.measured for one, _ in parse(toml.encode()).profiles] == [H200.measured, B200.measured]


def test_a_verifier_that_knows_no_release_candidates_reads_them_as_profiles() -> None:
    assert parse(FLAT.encode()).profiles == ((H200, {}), (B200, {}), (RC, {}))


def image(**parts: str) -> str:
    """An entry of version 1.12 in the shape by platform, of these members."""
    return '- version: "1.12"\n' + "".join(f"  {name}: {value}\n" for name, value in parts.items())


AMD = f"{{hardware: [{{name: 8xpro6000, measurement: {'66' * 48}, acpi_sha256: {'55' * 32}}}]}}"
NO_TDX = f"{{mrtd: {MRTD}, rtmr1: {RTMR1}, rtmr2: {RTMR2}, rtmr3: {RTMR3}, hardware: []}}"
WITHOUT_TDX: tuple[dict[str, str], ...] = (
    {},
    {"tdx": "null"},
    {"tdx": NO_TDX},
    {"tdx": NO_TDX.replace(MRTD, "null")},  # MRTD is measured for each hardware, so without any there is none
    {"tdx": "{hardware: []}"},
)


def test_sev_snp_is_told_and_not_served() -> None:
    assert parse(BY_PLATFORM.encode()).not_served == ("8xh200 1.10: SEV-SNP",)


@pytest.mark.parametrize("tdx", WITHOUT_TDX)
def test_an_image_for_amd_alone_leaves_the_others_served(tdx: dict[str, str]) -> None:
    amd = image(**tdx, snp=AMD)
    found = parse((BY_PLATFORM + amd).encode(), extra_keys=KEYS)
    assert (found.profiles, found.not_served) == (ALL, ("8xh200 1.10: SEV-SNP", "8xpro6000 1.12: SEV-SNP"))
    alone = parse(("measurements:\n" + amd).encode())
    assert (alone.profiles, alone.not_served) == ((), ("8xpro6000 1.12: SEV-SNP",))


@pytest.mark.parametrize("tdx", WITHOUT_TDX[1:])
@pytest.mark.parametrize("snp", [{}, {"snp": "null"}, {"snp": "{hardware: []}"}])
def test_an_image_without_any_hardware_is_refused(tdx: dict[str, str], snp: dict[str, str]) -> None:
    with pytest.raises(PolicyError, match=r"^version '1\.12': neither tdx nor snp has hardware: name at least one$"):
        _ = parse((BY_PLATFORM + image(**tdx, **snp)).encode())


def test_an_image_with_tdx_hardware_has_all_registers() -> None:
    for lacking in (BY_PLATFORM.replace(f"    rtmr1: {RTMR1}\n", "", 1), BY_PLATFORM.replace(RTMR1, "null", 1)):
        with pytest.raises(PolicyError, match=r"^version '1\.10': tdx\.rtmr1: Field required$"):
            _ = parse(lacking.encode())


def test_entries_of_the_oldest_file_have_all_registers() -> None:
    entries = json.loads(published(upper=True))
    text = "measurements: " + json.dumps([{**entry, "fingerprint": None} for entry in entries[1:]])
    assert parse(text.encode()).profiles == ALL[1:2]


def test_signing_keys_of_pre_releases_are_told_and_not_served() -> None:
    found = parse(FLAT.replace("    rc: true\n", "    rc: true\n    authorized_signing_keys: [one]\n").encode())
    assert (found.profiles[2][0], found.not_served) == (RC, ("version 1.11: authorized_signing_keys, of pre-releases",))


def test_a_file_has_a_profile_and_a_profile_hardware() -> None:
    with pytest.raises(PolicyError, match="measurements: name at least one version"):
        _ = parse(b"measurements: []\n")
    with pytest.raises(PolicyError, match=r"version '1\.10': hardware: name at least one"):
        _ = parse((FLAT.partition("    hardware:")[0] + "    hardware: []\n").encode())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"[]", "the file has no profile; expected"),
        (b"{}", "is not a list; expected"),
        (b'{"measurements": []}', "is not a list; expected"),
        (b"", "is empty; expected"),
        (b" \n", "is empty; expected"),
    ],
)
def test_a_file_without_profiles_is_told_in_its_own_form(data: bytes, problem: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _ = parse(data)
    assert problem in str(caught.value)
    assert ("[[profile]]" in str(caught.value)) is (not data.strip())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("gpu_count: 8\n", "gpu_count: 0\n", "version '1.10': 8xh200: gpu_count"),
        ("        gpu_count: 8\n", "", "version '1.10': hardware.0.gpu_count: Field required"),
        (f"    rtmr1: {RTMR1}\n", "", "version '1.10': rtmr1: Field required"),
        (f"mrtd: {MRTD.upper()}", "mrtd: 00", "profile '8xh200': mrtd"),
        ("version: 1.10", "version: null", "measurements 1: version"),
        ("version: 1.10", "version: [1]", "measurements 1: version"),
        ("    rc: true", "    rc: maybe", "version '1.11': rc"),
        ("    rc: true", "    typo: true", "version '1.11': typo: Unknown key"),
        ("version: 1.10", "version: 1.10\n    version: 1.10", "line 5: a key that is not a text, or comes twice"),
        ("version: 1.10", "version: &a 1.10\n    rc: *a", "an alias"),
        ("---\n", "other: 1\n", "other: Unknown key"),
        ("hardware:", "hardware: [] #", "not YAML"),
        ("8xb200, rtmr0: " + "11" * 48, "8xb200, rtmr0: " + "00" * 48, "has the measurements of 8xh200 1.10"),
        ("8xb200", "8xh200", "name and version '1.10' are given twice"),
    ],
)
def test_an_error_names_its_place(old: str, new: str, problem: str) -> None:
    assert old in FLAT
    with pytest.raises(PolicyError) as caught:
        _ = parse(FLAT.replace(old, new, 1).encode())
    assert problem in str(caught.value)


def test_nesting_and_size_have_an_end() -> None:
    for data in (b"measurements: " + b"[" * 500, b"measurements:\n- " + b"- " * 500, b"measurements: []\n" * 300_000):
        with pytest.raises(PolicyError):
            _ = parse(data)


def test_yaml_is_read_up_to_a_size_that_takes_seconds() -> None:
    """Of four megabytes the reader of YAML makes nodes of more than a gigabyte, for minutes."""
    assert parse(f"{FLAT}#{'a' * 200_000}".encode()).profiles
    with pytest.raises(PolicyError, match="more than 262144 bytes of YAML"):
        _ = parse(f"{FLAT}#{'a' * 262_144}".encode())
    with pytest.raises(PolicyError) as caught:
        _ = parse(f"measurements:\n- version: {'1' * 100_000}\n".encode())
    assert len(str(caught.value)) < 1000


@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from([FLAT, BY_PLATFORM])).encode()
    at = data.draw(st.integers(0, len(seed) - 1))
    mutated = seed[:at] + data.draw(st.binary(max_size=4)) + seed[at + data.draw(st.integers(0, 4)) :]
    try:
        found = parse(mutated)
    except PolicyError:
        return
    for one, _ in found.profiles:
        assert all(isinstance(register, bytes) and len(register) == 48 for register in one.measured)
        assert one.gpu_count
