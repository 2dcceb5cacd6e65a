"""Measurement profiles in both forms: all registers, no unknown key, errors that name profile and key."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.quote._attributes import AttributePolicy
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._measurements import Profile, parse_profiles_json, parse_profiles_toml

EXTRA_KEYS = frozenset({"root_passphrase", "require_hotkey_signature"})


def _register(number: int) -> bytes:
    return bytes([number]) * 48


BOOT = (_register(1), _register(2), _register(3), _register(4))
RUNTIME = (_register(1), _register(2), _register(3), _register(5))
PROFILE = Profile(
    name="8xh200",
    version="0.2.0",
    mrtd=_register(9),
    boot=BOOT,
    runtime=RUNTIME,
    expected_gpus=("h200",),
    gpu_count=8,
    fingerprints=(bytes(32),),
)


def _rtmrs(values: tuple[bytes, ...]) -> dict[str, str]:
    return {f"rtmr{index}": value.hex().upper() for index, value in enumerate(values)}


def _entry(**changes: Any) -> dict[str, Any]:
    entry = {
        "version": "0.2.0",
        "name": "8xh200",
        "mrtd": PROFILE.mrtd.hex(),
        "boot_rtmrs": _rtmrs(BOOT),
        "runtime_rtmrs": _rtmrs(RUNTIME),
        "expected_gpus": ["H200"],
        "gpu_count": 8,
        "fingerprint": "00" * 32,
    }
    return {name: value for name, value in {**entry, **changes}.items() if value is not ...}


def _toml(entry: dict[str, Any]) -> str:
    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{name} = {value(inner)}" for name, inner in item.items()) + "}"
        return json.dumps(item)

    names = {"boot_rtmrs": "boot", "runtime_rtmrs": "runtime"}
    return "[[profile]]\n" + "".join(f"{names.get(name, name)} = {value(item)}\n" for name, item in entry.items())


def _parse(form: str, *entries: dict[str, Any], **options: Any) -> tuple[tuple[Profile, dict[str, object]], ...]:
    if form == "json":
        return parse_profiles_json(json.dumps(entries).encode(), **options)
    return parse_profiles_toml("".join(map(_toml, entries)).encode(), **options)


@pytest.fixture(params=["json", "toml"])
def form(request: pytest.FixtureRequest) -> str:
    form: str = request.param
    return form


def test_both_forms_say_the_same(form: str) -> None:
    assert _parse(form, _entry()) == ((PROFILE, {}),)
    two = _parse(
        form, _entry(), _entry(name="other", mrtd="08" * 48, fingerprint=..., gpu_count=..., expected_gpus=...)
    )
    other = attrs.evolve(PROFILE, name="other", mrtd=_register(8), fingerprints=(), gpu_count=None, expected_gpus=())
    assert two == ((PROFILE, {}), (other, {}))


def test_no_gpu_count_is_any(form: str) -> None:
    for count in (0, ...):
        assert _parse(form, _entry(gpu_count=count))[0][0].gpu_count is None
    assert _parse("json", _entry(gpu_count=None, fingerprint=None))[0][0].fingerprints == ()


@pytest.mark.parametrize("key", ["attributes", "expected_gpus", "version"])
def test_null_takes_no_default_away(key: str) -> None:
    defaults = {"attributes": {"xfam_allowed": 7}, "expected_gpus": ["h200"], "version": "1"}
    with pytest.raises(PolicyError, match=f"'8xh200': {key}: Input should be"):
        _ = _parse("json", _entry(**{key: None}), defaults=defaults)


def test_keys_of_the_callers_come_back(form: str) -> None:
    entry = _entry(root_passphrase="vm", require_hotkey_signature=True)
    ((profile, extras),) = _parse(form, entry, extra_keys=EXTRA_KEYS)
    assert (profile, extras) == (PROFILE, {"root_passphrase": "vm", "require_hotkey_signature": True})
    with pytest.raises(PolicyError, match="'8xh200': require_hotkey_signature"):
        _ = _parse(form, entry)


def test_defaults_stand_in_and_give_way(form: str) -> None:
    defaults = {"version": "0", "gpu_count": 4, "root_passphrase": "vm", "attributes": {"sept_ve_disable": "any"}}
    ((profile, extras),) = _parse(form, _entry(gpu_count=...), extra_keys=EXTRA_KEYS, defaults=defaults)
    assert (profile.version, profile.gpu_count, extras) == ("0.2.0", 4, {"root_passphrase": "vm"})
    assert profile.attributes == AttributePolicy(sept_ve_disable="any")


def test_a_toml_file_has_defaults_of_its_own() -> None:
    text = '[profile_defaults]\nversion = "7"\nroot_passphrase = "image"\n' + _toml(_entry(version=...))
    ((profile, extras),) = parse_profiles_toml(
        text.encode(), extra_keys=EXTRA_KEYS, defaults={"root_passphrase": "vm", "gpu_count": 4}
    )
    assert (profile.version, profile.gpu_count, extras) == ("7", 8, {"root_passphrase": "image"})
    for key in ("name", "mrtd", "boot", "typo"):
        with pytest.raises(PolicyError, match=f"profile_defaults.{key}"):
            _ = parse_profiles_toml(f"[profile_defaults]\n{key} = 1\n".encode() + _toml(_entry()).encode())
    with pytest.raises(PolicyError, match=r"profile_defaults\.gpu_cont: .*; did you mean gpu_count\?"):
        _ = parse_profiles_toml(b"[profile_defaults]\ngpu_cont = 1\n" + _toml(_entry()).encode())


def test_attributes_of_a_profile() -> None:
    text = _toml(_entry()) + '[profile.attributes]\nsept_ve_disable = "any"\n'
    assert parse_profiles_toml(text.encode())[0][0].attributes == AttributePolicy(sept_ve_disable="any")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"name": ...}, "profile 1: name"),
        ({"name": 5}, "profile 1: name"),
        ({"name": ""}, "profile '': name"),
        ({"name": "a\nb"}, "profile 'a\\nb': name"),
        ({"version": ...}, "profile '8xh200': version"),
        ({"version": ""}, "profile '8xh200': version"),
        ({"mrtd": "00" * 47}, "profile '8xh200': mrtd"),
        ({"mrtd": "0x" + "00" * 47}, "profile '8xh200': mrtd"),
        ({"mrtd": "00 " * 32}, "profile '8xh200': mrtd"),
        ({"mrtd": ...}, "profile '8xh200': mrtd"),
        ({"expected_gpus": "h200"}, "profile '8xh200': expected_gpus"),
        ({"expected_gpus": [1]}, "profile '8xh200': expected_gpus.0"),
        ({"gpu_count": -1}, "profile '8xh200': gpu_count"),
        ({"gpu_count": True}, "profile '8xh200': gpu_count"),
        ({"boot_rtmrs": []}, "profile '8xh200': boot"),
        ({"fingerprint": "zz"}, "profile '8xh200': fingerprint"),
        ({"fingerprint": "00"}, "profile '8xh200': fingerprint"),
        ({"mr_td": "00"}, "profile '8xh200': mr_td"),
        ({"attributes": {"debug": "allowed"}}, "profile '8xh200': attributes.debug"),
        ({"attributes": {"unsafe_allow_debug": False}}, "profile '8xh200': attributes.unsafe_allow_debug"),
        ({"attributes": {"unsafe_allow_debug": True}}, "profile '8xh200': attributes.unsafe_allow_debug"),
        ({"attributes": {"service_td": "allowed"}}, "profile '8xh200': attributes.mr_service_td"),
    ],
)
def test_an_error_names_profile_and_key(form: str, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _ = _parse(form, _entry(**changes))
    if form == "json" and "boot_rtmrs" in changes:
        path += "_rtmrs"
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("register", range(4))
@pytest.mark.parametrize("stage", ["boot", "runtime"])
def test_no_register_may_be_left_out(form: str, stage: str, register: int) -> None:
    rtmrs = _rtmrs(BOOT)
    del rtmrs[f"rtmr{register}"]
    key = stage if form == "toml" else f"{stage}_rtmrs"
    with pytest.raises(PolicyError, match=f"'8xh200': {key}.rtmr{register}: Field required"):
        _ = _parse(form, _entry(**{f"{stage}_rtmrs": rtmrs}))
    with pytest.raises(PolicyError, match=f"'8xh200': {key}.rtmr4"):
        _ = _parse(form, _entry(**{f"{stage}_rtmrs": {**_rtmrs(BOOT), "rtmr4": "00" * 48}}))
    with pytest.raises(PolicyError, match=f"'8xh200': {key}: Field required"):
        _ = _parse(form, _entry(**{f"{stage}_rtmrs": ...}))


def test_name_and_version_together_stand_once(form: str) -> None:
    assert len(_parse(form, _entry(), _entry(version="0.3.0", mrtd="08" * 48))) == 2
    with pytest.raises(PolicyError, match=r"'8xh200': name and version '0\.2\.0' are given twice"):
        _ = _parse(form, _entry(), _entry(mrtd="08" * 48))
    with pytest.raises(PolicyError, match=r"'8xh200': version '0\.3\.0' has the measurements of 8xh200 0\.2\.0"):
        _ = _parse(form, _entry(), _entry(version="0.3.0"))


def test_the_names_of_registers_are_of_either_case(form: str) -> None:
    upper = {name.upper(): value for name, value in _rtmrs(BOOT).items()}
    assert _parse(form, _entry(boot_rtmrs=upper)) == ((PROFILE, {}),)
    with pytest.raises(PolicyError, match="RTMR0"):
        _ = _parse(form, _entry(boot_rtmrs={**_rtmrs(BOOT), "RTMR0": "00" * 48}))


def test_a_list_says_something() -> None:
    for parse, data in ((parse_profiles_json, b"[]"), (parse_profiles_toml, b""), (parse_profiles_json, b"{}")):
        with pytest.raises(PolicyError, match="the file"):
            _ = parse(data)
    with pytest.raises(PolicyError, match=r"0: Input should be a table of names and values \(in JSON, an object\)$"):
        _ = parse_profiles_json(b"[5]")
    with pytest.raises(PolicyError, match="profiles"):
        _ = parse_profiles_toml(_toml(_entry()).encode() + b"[profiles]\n")
    with pytest.raises(PolicyError, match="a member twice: 'name'"):
        _ = parse_profiles_json(b'[{"name":"a","name":"b"}]')


@pytest.mark.parametrize(
    "changes",
    [
        {"mrtd": bytes(47)},
        {"boot": BOOT[:3]},
        {"runtime": (*RUNTIME, bytes(48))},
        {"name": ""},
        {"gpu_count": 0},
        {"fingerprints": (b"",)},
    ],
)
def test_what_cannot_be_a_profile(changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError):
        _ = attrs.evolve(PROFILE, **changes)


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for parse in (parse_profiles_json, parse_profiles_toml):
        with pytest.raises(PolicyError):
            _ = parse(data)


@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    for parse, seed in (
        (parse_profiles_json, json.dumps([_entry()]).encode()),
        (parse_profiles_toml, _toml(_entry()).encode()),
    ):
        at = data.draw(st.integers(0, len(seed) - 1))
        mutated = seed[:at] + data.draw(st.binary(max_size=4)) + seed[at + data.draw(st.integers(0, 4)) :]
        try:
            ((profile, _),) = parse(mutated)
        except PolicyError:
            continue
        assert all(len(register) == 48 for register in (*profile.registers("boot"), *profile.registers("runtime")))


def test_a_file_that_is_too_large_is_not_read() -> None:
    with pytest.raises(PolicyError, match="more than 4194304 bytes"):
        _ = parse_profiles_toml(b"#" * (4 * 1024 * 1024 + 1))


def test_a_register_of_another_length_is_refused(form: str) -> None:
    with pytest.raises(PolicyError, match="96 hexadecimal digits"):
        _ = _parse(form, _entry(boot_rtmrs={**_rtmrs(BOOT), "rtmr0": "00" * 47}))
