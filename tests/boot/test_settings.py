"""The agent's settings and the config volume: what is taken, and that every mistake and every lie names its place."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chutes_proto.auth.hotkey import Hotkey, HotkeyPair
from chutes_proto.boot._settings import (
    MAX_CONFIG_FILE,
    AgentSettings,
    ConfigVolume,
    FailureOptions,
    RetryOptions,
    RootDisk,
    StateOptions,
    VolumeDisk,
    vm_identity,
)
from chutes_proto.errors import ConfigurationError
from chutes_proto.secret import Secret
from tests.boot.talk import HOTKEY

SEED = "5e" * 32
KEY = HotkeyPair.from_secret(Secret(bytes.fromhex(SEED))).secret_key.reveal().hex()
GOOD = f"""
servers = ["https://keys-1.example:8443", "https://[2001:db8::1]/"]
hotkey = "{HOTKEY}"
vm_name = "vm-1"

[volumes.storage]
device = "/dev/vdb"

[volumes.tdx-cache]
device = "/dev/vdc"
mapping = "cache"
"""
VOLUME = """
servers = ["https://keys.example"]
config_volume.directory = "/run/config"
root.device = "/dev/vda2"
"""


def settings(text: str = GOOD) -> AgentSettings:
    return AgentSettings.from_toml(text.encode())


def problem(text: str) -> str:
    with pytest.raises(ConfigurationError) as raised:
        _ = settings(text)
    return str(raised.value)


def test_what_is_said_and_what_is_not() -> None:
    found = settings(f"retry.deadline_seconds = 60\n{GOOD}")
    assert found.servers == ("https://keys-1.example:8443", "https://[2001:db8::1]")
    assert found.volumes == {
        "storage": VolumeDisk("/dev/vdb"),
        "tdx-cache": VolumeDisk("/dev/vdc", mapping="cache"),
    }
    assert (found.quoter, found.ca_file, found.signer, found.root.device) == ("auto", None, None, None)
    assert (found.policy.deadline, found.policy.servers) == (60.0, 2)
    assert (found.on_failure.action, found.on_failure.command, found.volumes_at) == ("exit", (), "run")
    assert found.asked == ()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("server = 1", "server: Unknown key"),
        ("root.devices = '/dev/vda'", "root.devices: Unknown key"),
        ("retry.attempts = 0", "retry: attempts at least 1"),
        ("retry.base_seconds = 31", "retry: attempts at least 1, 0 < base_seconds <= cap_seconds"),
        ("retry.deadline_seconds = 1e9", "retry.deadline_seconds: at most 86400"),
        ("retry.deadline_seconds = nan", "retry.deadline_seconds: Input should be a valid number"),
        ("retry.deadline_seconds = true", "retry.deadline_seconds: Input should be a valid number"),
        ("on_failure.action = 'halt'", "on_failure.action: Input should be"),
        ("on_failure.wait_seconds = -1", "on_failure.wait_seconds: 0 to 86400"),
        ("on_failure = { action = 'reboot', reboot = [] }", "on_failure.reboot: name the program"),
        ("on_failure = { action = 'shell', shell = [''] }", "on_failure.shell: name the program"),
        ("disk_wait_seconds = -0.1", "disk_wait_seconds: 0 to 86400"),
        ("volumes_at = 'later'", "volumes_at: Input should be"),
        ("state.file = 'boot.json'", "state.file: say the whole path"),
        ("state.k3s_key_file = 'k3s'", "state.k3s_key_file: say the whole path"),
        ("ca_file = 'ca.pem'", "ca_file: say the whole path"),
        ("signer = 'my-signer'", 'signer: say "config-volume" or "command:'),
        ("signer = 'command: '", 'signer: say "config-volume" or "command:'),
        ("signer = 'command:\"'", 'PROGRAM ARGUMENTS"; it cannot be split into arguments: No closing quotation'),
        ("signer = 'config-volume'", "config_volume.directory: name it"),
        ("quoter = 'nonsense'", 'quoter: say "auto", "tsm", "tsm:DIR", "vsock", "vsock:CID:PORT", "unix:PATH" or'),
        ("quoter = 'tsm:report'", "quoter: tsm is followed by a whole path"),
        ("quoter = 'unix:qgs'", "quoter: unix is followed by a whole path"),
        ("quoter = 1", "quoter: Input should be a valid string"),
        ("config_volume.directory = 'here'", "config_volume.directory: say the whole path"),
        ("config_volume.hostname = '../hostname'", "config_volume.hostname: the name of a file"),
        ("config_volume.seed = '/etc/seed'", "config_volume.seed: the name of a file"),
        ("root = { device = 'vda' }", "root: the device of root must be an absolute path"),
        ("root = { device = '/dev/vdb' }", "a device is given twice"),
        ("root = { device = '/dev/vda', mapping = 'cache' }", "a mapping is given twice"),
        ("root = { device = '/dev/vda', mapping = '../x' }", "root: '../x' is not a volume's name"),
    ],
)
def test_a_mistake_names_its_key(line: str, named: str) -> None:
    assert named in problem(f"{line}\n{GOOD}")


@pytest.mark.parametrize(
    "text",
    [
        *("auto", "tsm", "tsm:/mnt/report", "vsock", "vsock:2:4050", "unix:/run/qgs.socket", "simulated"),
        *("simulated:/platform", "command:my-quoter", "command: '/opt/a b' {report_data}", "command:auto:"),
    ],
)
def test_a_quoter_that_can_be_made(text: str) -> None:
    assert settings(f"quoter = {json.dumps(text)}\n{GOOD}").quoter == text


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"https://keys-1.example:8443", "https://[2001:db8::1]/"', "", "servers: name 1 to 16"),
        ('"https://keys-1.example:8443"', '"http://keys-1.example:8443"', "servers.0: a server's URL has the form"),
        ('"https://keys-1.example:8443"', '"https://u:p@keys"', "servers.0: a server's URL has the form"),
        ('"https://keys-1.example:8443"', '"https://keys/path"', "servers.0: a server's URL has the form"),
        ('"https://keys-1.example:8443"', '"https://keys:99999"', "servers.0: a server's URL has the form"),
        ('"https://keys-1.example:8443"', '"https://[2001:DB8::1]"', "a server is given twice"),
        (f'hotkey = "{HOTKEY}"', 'hotkey = "5G"', "hotkey: an address of another network"),
        ('vm_name = "vm-1"', 'vm_name = "a/b"', "vm_name: a VM's name is 1 to 128"),
        ('vm_name = "vm-1"', "", "config_volume.directory: name it, or say vm_name and hotkey here"),
        ("[volumes.storage]", "[volumes.root]", "volumes.root: a reserved name"),
        ("[volumes.storage]", '[volumes."../up"]', "'../up' is not a volume's name"),
        ('device = "/dev/vdb"', "", "volumes.storage.device: Field required"),
        ('device = "/dev/vdb"', 'devices = "/dev/vdb"', "volumes.storage.devices: Unknown key"),
        ('mapping = "cache"', "mapping = 1", "volumes.tdx-cache.mapping: Input should be"),
    ],
)
def test_a_mistake_in_the_place_of_what_is_right(old: str, new: str, named: str) -> None:
    assert named in problem(GOOD.replace(old, new))


def test_every_mistake_is_named_at_once() -> None:
    said = problem('servers = ["https://a"]\nvm_name = "/"\nhotkey = "x"\n')
    assert [text in said for text in ("vm_name:", "hotkey:", "volumes: name at least one")] == [True] * 3


@pytest.mark.parametrize("data", [b"\xff", b"a = ", b"[" * 5000, b"", b"servers = 1"])
def test_what_is_no_settings_file(data: bytes) -> None:
    with pytest.raises(ConfigurationError):
        _ = AgentSettings.from_toml(data)


def test_settings_that_leave_the_volumes_to_a_later_command_have_some() -> None:
    assert "has nothing to do without volumes" in problem(f'volumes_at = "resume"\n{VOLUME}')


# --- the config volume ---


def identity(extra: str = "", files: Mapping[str, Any] | None = None) -> tuple[str, str, bytes | None]:
    found = settings(f"{extra}\n{VOLUME}")
    content: dict[str, Any] = {"hostname": b"vm-7\n", "miner-ss58": HOTKEY.encode(), "miner-seed": SEED.encode()}
    content |= {"miner-private-key": None, **(files or {})}
    who = vm_identity(found, {name: content[name] for name in found.asked if content[name] is not None})
    return who.vm_name, who.hotkey.address, None if who.secret is None else who.secret.reveal()


def wallet(**members: object) -> bytes:
    return json.dumps({"secretSeed": f"0x{SEED}", "ss58Address": HOTKEY, **members}).encode()


def test_who_the_vm_is_comes_from_the_config_volume() -> None:
    assert identity() == ("vm-7", HOTKEY, None)
    assert identity('signer = "config-volume"') == ("vm-7", HOTKEY, bytes.fromhex(SEED))
    assert identity(files={"miner-ss58": wallet()}) == ("vm-7", HOTKEY, None)
    assert identity('signer = "config-volume"', {"miner-ss58": wallet(), "miner-seed": None}) == (
        "vm-7",
        HOTKEY,
        bytes.fromhex(SEED),
    )


@pytest.mark.parametrize(
    "files",
    [
        {"miner-private-key": KEY.encode()},
        {"miner-private-key": f"0x{KEY}\n".encode(), "miner-seed": None},
        {"miner-ss58": wallet(privateKey=f"0x{KEY}")},
        {"miner-ss58": wallet(privateKey=KEY, secretSeed=None)},
    ],
)
def test_a_private_key_counts_before_the_seed(files: Mapping[str, Any]) -> None:
    assert identity('signer = "config-volume"', files) == ("vm-7", HOTKEY, bytes.fromhex(KEY))


def test_what_the_settings_say_is_not_asked_of_it() -> None:
    said = f'vm_name = "mine"\nhotkey = "{HOTKEY}"'
    assert settings(f"{said}\n{VOLUME}").asked == ()
    assert identity(said, {"hostname": b"/", "miner-ss58": b"x"}) == ("mine", HOTKEY, None)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"hostname": None}, "hostname: the file is missing"),
        ({"hostname": b""}, "hostname: a VM's name is 1 to 128 of the characters"),
        ({"hostname": b"a b"}, "hostname: a VM's name is 1 to 128 of the characters"),
        ({"hostname": b"a\nservers = x"}, "hostname: a VM's name is 1 to 128 of the characters"),
        ({"hostname": b"a" * 129}, "hostname: a VM's name is 1 to 128 of the characters"),
        ({"hostname": "vm-ä".encode()}, "hostname: the file is not ASCII"),
        ({"hostname": b"a" * (MAX_CONFIG_FILE + 1)}, "hostname: the file has more than 4096 bytes"),
        ({"miner-ss58": b"5G"}, "miner-ss58: not a hotkey"),
        ({"miner-ss58": HOTKEY[:-1].encode() + b"1"}, "miner-ss58: not a hotkey"),
        ({"miner-ss58": b"{" * 4096}, "miner-ss58: not a hotkey"),
        ({"miner-ss58": wallet(ss58Address=1)}, "miner-ss58: not a hotkey"),
        ({"miner-seed": b"zz" * 32}, "miner-seed: a seed is 32 bytes in hex, a private key 64"),
        ({"miner-seed": SEED.encode() + b"00"}, "miner-seed: a seed is 32 bytes in hex"),
        ({"miner-private-key": b""}, "miner-private-key: a seed is 32 bytes in hex"),
        ({"miner-private-key": SEED.encode() + SEED.encode()[:-1]}, "miner-private-key: a seed is 32 bytes in hex"),
        ({"miner-ss58": wallet(privateKey="0x")}, "miner-ss58: a seed is 32 bytes in hex"),
        ({"miner-ss58": wallet(secretSeed=5), "miner-seed": None}, "miner-seed: the file is missing"),
    ],
    ids=str,
)
def test_a_config_volume_that_lies(files: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        _ = identity('signer = "config-volume"', files)
    assert f"config volume: {named}" in str(raised.value)
    assert SEED not in str(raised.value)


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_whatever_it_says_it_is_taken_whole_or_refused(hostname: bytes, hotkey: bytes, seed: bytes) -> None:
    found = settings(f'signer = "config-volume"\n{VOLUME}')
    try:
        who = vm_identity(found, {"hostname": hostname, "miner-ss58": hotkey, "miner-seed": seed})
    except ConfigurationError:
        return
    assert who.vm_name.encode() in hostname
    assert Hotkey.parse(who.hotkey.address) == who.hotkey


# --- the example ---

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.toml"


def test_the_example_is_one_and_names_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text("utf-8")
    found = AgentSettings.from_toml(text.encode())
    whole = re.sub(r"^# (\w+ = .*|\[\w+\])$", r"\1", text, flags=re.MULTILINE)
    everything = tomllib.loads(whole)
    named = {**everything, "volumes": everything["volumes"]["storage"]}
    assert named.keys() == {field.name for field in attrs.fields(AgentSettings)}
    for name, kind in (
        *[("config_volume", ConfigVolume), ("root", RootDisk), ("volumes", VolumeDisk), ("retry", RetryOptions)],
        *[("state", StateOptions), ("on_failure", FailureOptions)],
    ):
        assert named[name].keys() == {field.name for field in attrs.fields(kind)}
    defaults = {
        (table, key): value
        for table in ("config_volume", "retry", "state", "on_failure")
        for key, value in everything[table].items()
        if f"\n# {key} = " in text and key != "k3s_key_file"
    }
    for (table, key), value in defaults.items():
        default = getattr(getattr(found, table), key)
        assert (list(default) if isinstance(value, list) else default) == value
    for key in ("quoter", "volumes_at", "disk_wait_seconds"):
        assert getattr(found, key) == everything[key]
