"""`serve`: what is wrong is told with its key and file, a check changes nothing, a server stops on a signal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.auth.server_identity import make_server_identity
from chutes_proto.cli.main import main
from chutes_proto.errors import CollateralUnavailable, ConfigurationError
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.files import create_private
from chutes_proto.io.server.development import RenewedCollateral, write_collateral, write_server
from chutes_proto.io.server.setup import make_setup
from chutes_proto.keys.vault import KeyEncryptionKey
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._roots import INTEL_ROOT, TrustedRoot
from chutes_proto.quote._verify import open_quote
from chutes_proto.secret import Secret
from chutes_proto.server import ServerConfig
from chutes_proto.testing._platform import COLLATERAL_SECONDS, PROFILE, SimulatedPlatform
from tests.cli.conftest import HOTKEY, PROGRAM, Ended, Server, end
from tests.waiting import wait_until

PLATFORM = SimulatedPlatform(bytes(32))
NOW = 1_780_000_000

Command = Callable[..., Ended]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An operator's directory, with collateral of today."""
    directory = tmp_path / "site"
    directory.mkdir()
    write_server(directory, PLATFORM, int(time.time()))
    return directory


def edit(site: Path, old: str, new: str, name: str = "server.toml") -> None:
    text = (site / name).read_text()
    assert old in text
    _ = (site / name).write_text(text.replace(old, new))


def check(command: Command, site: Path) -> Ended:
    return command("serve", "--config", site / "server.toml", "--check")


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


# --- --check ---


def test_a_check_says_what_is_there_and_makes_nothing(command: Command, site: Path) -> None:
    before = listing(site)
    ended = check(command, site)
    assert (ended.code, ended.err) == (0, "")
    assert listing(site) == before
    assert "NOT Intel's root but simulated-root.der" in ended.out
    assert "measurements: simulated" in ended.out
    assert "volumes: storage, tdx-cache" in ended.out
    assert "hotkeys: any hotkey" in ended.out
    assert re.search(rf"collateral: .*{PLATFORM.fmspc.hex()}, platform CA, TDX, valid .* to ", ended.out)
    assert "keys.db: not made yet" in ended.out


def test_a_check_refuses_a_lost_store_as_a_start_does(command: Command, site: Path) -> None:
    edit(site, 'store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "store.mark" }')
    setup = make_setup(ServerConfig.load(site / "server.toml"))
    with closing(setup.store.open()) as store:
        store.keep_mark()
    for file in site.glob("keys.db*"):
        file.unlink()
    before = listing(site)
    config = ("--config", site / "server.toml")
    for words in (("serve",), ("serve", "--check"), ("store", "check"), ("vm", "list")):
        ended = command(*words, *config)
        assert (ended.code, "keys.db: it does not exist, so it is not the store of this mark" in ended.err) == (1, True)
    assert listing(site) == before


def test_a_check_names_what_the_server_cannot_write(command: Command, site: Path) -> None:
    edit(site, 'store = "sqlite:keys.db"', 'store = { url = "sqlite:keys.db", mark_file = "none/store.mark" }')
    text = (site / "server.toml").read_text()
    sockets = 'control = "none/control"\n'
    tables = '[[proxy]]\nname = "front"\nunix = "none/proxy"\n'
    tables += '[admin]\nunix = "none/admin"\n[audit]\nfile = "none/audit.jsonl"\n'
    _ = (site / "server.toml").write_text(f"{sockets}{text}\n{tables}")
    keys = ("control", "proxy.unix", "admin.unix", "store.mark_file", "audit.file")
    ended = check(command, site)
    found = {key: line for key in keys for line in ended.out.splitlines() if line.startswith(f"{key}: ")}
    assert (ended.code, {*found}) == (0, {*keys})
    for line in found.values():
        assert f": {site}/none/" in line
        assert "its directory does not exist, or this user may not write it; " in line
    edit(site, 'file = "none/audit.jsonl"', 'file = "none/audit.jsonl"\nrequired = true')
    ended = check(command, site)
    assert (ended.code, "audit.jsonl: its directory does not exist" in ended.err) == (1, True)
    (site / "none").mkdir()
    ended = check(command, site)
    assert (ended.code, ended.err, "does not exist" in ended.out) == (0, "", False)


def test_an_empty_file_is_no_store_yet(command: Command, site: Path) -> None:
    (site / "keys.db").touch()
    assert check(command, site).code == 0
    assert (site / "keys.db").read_bytes() == b""


def _unreadable_kek(site: Path) -> None:
    (site / "kek").chmod(0o640)


def _short_kek(site: Path) -> None:
    _ = (site / "kek").write_bytes(bytes(31))


def _no_kek(site: Path) -> None:
    (site / "kek").unlink()


def _other_tls_key(site: Path) -> None:
    _ = (site / "server.key").write_bytes(make_server_identity(NOW, bytes(32)).key_pem.reveal())


def _open_tls_key(site: Path) -> None:
    (site / "server.key").chmod(0o644)


def _garbage(name: str) -> Callable[[Path], None]:
    def change(site: Path) -> None:
        _ = (site / name).write_bytes(b"\xff\xfe\0 garbage")

    return change


def _edited(old: str, new: str, name: str = "server.toml") -> Callable[[Path], None]:
    return lambda site: edit(site, old, new, name)


def _old_collateral(site: Path) -> None:
    write_collateral(site / "collateral", PLATFORM, NOW - 365 * 86400)


def _no_collateral(site: Path) -> None:
    for path in (site / "collateral").iterdir():
        path.unlink()


def _other_database(site: Path) -> None:
    connection = sqlite3.connect(site / "keys.db")
    _ = connection.execute("CREATE TABLE theirs (x)")
    connection.close()


def _passphrases(text: str) -> Callable[[Path], None]:
    """One for each version of the image, and no other counts."""

    def change(site: Path) -> None:
        _edited('root_passphrase = "vm"', 'root_passphrase = "image"\nroot_passphrases_file = "builds.json"')(site)
        create_private(site / "builds.json", text.encode())

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_unreadable_kek, r"kek_file: .*/kek: .*0640.*chmod 600 .*/kek"),
        (_short_kek, r"kek_file: .*/kek: .*32 raw bytes or 64 hex digits.*31 bytes"),
        (_no_kek, r"kek_file: .*/kek: cannot be read: No such file"),
        (_other_tls_key, r"tls: .*server\.pem.*server\.key.*does not match the certificate"),
        (_open_tls_key, r"tls: .*/server\.key: .*0644.*chmod 640"),
        (_garbage("server.pem"), r"tls: .*server\.pem.*not PEM"),
        (_garbage("server.key"), r"tls: .*server\.key.*not a private key"),
        (_garbage("simulated-root.der"), r'roots: .*simulated-root\.der: .*say "intel"'),
        (_garbage("measurements.toml"), r"measurements: .*measurements\.toml: not TOML"),
        (_edited("[[profile]]", "[profile]", "measurements.toml"), r"measurements: .*measurements\.toml: profile"),
        (_edited("mrtd", "mrtb", "measurements.toml"), r"measurements: .*mrt[bd]"),
        (_edited('root_passphrase = "vm"', ""), r"measurements: .*'simulated'.*root_passphrase"),
        (_edited('root_passphrase = "vm"', 'root_passphrase = "image"'), r"'simulated'.*root_passphrase_file"),
        (
            _edited("[[profile]]", '[[profile]]\nroot_passphrase_file = "none"', "measurements.toml"),
            r"'simulated'.*\"vm\" makes its own; remove root_passphrase_file",
        ),
        (
            _edited('root_passphrase = "vm"', 'root_passphrase = "image"\nroot_passphrase_file = "none"'),
            r"measurements: .*/none: cannot be read",
        ),
        (
            _edited(
                'root_passphrase = "vm"',
                'root_passphrase_file = "one"\nroot_passphrases_file = "of-all"\nroot_passphrase = "image"',
            ),
            r"'simulated'.* needs root_passphrase_file or root_passphrases_file, one of them",
        ),
        (_passphrases('{"0.9": "x"}'), r"'simulated': root_passphrases_file has no passphrase of version '1'"),
        (_passphrases('{"1": ""}'), r"'simulated': root_passphrases_file, version '1': must hold one line"),
        (_passphrases('{"1": "a\\"b"}'), r"'simulated': root_passphrases_file, version '1': must hold one line"),
        (_passphrases('{"1": "\u00e9"}'), r"'simulated': root_passphrases_file, version '1': must hold one line"),
        (_passphrases("[]"), r"'simulated': root_passphrases_file must hold a JSON object, version to passphrase"),
        (_edited('root_passphrase = "vm"', 'root_passphrase = "vm"\ncolour = 1'), r"toml: profile_defaults\.colour"),
        (
            _edited('root_passphrase = "vm"', 'root_passphrase = "VM"'),
            r"server\.toml: profile_defaults\.root_passph.*vm",
        ),
        (_edited('hotkeys = "*"', 'hotkeys = ["5Grw"]'), r"hotkeys: '5Grw' is not a hotkey"),
        (_edited('"collateral"', '"elsewhere"'), r"collateral\.directory: .*/elsewhere is not a directory"),
        (_edited('hotkeys = "*"', 'hotkeys = "*"\nnet_uid = 1'), r"/server\.toml: .*net_uid"),
        (_garbage("server.toml"), r"/server\.toml: not TOML"),
        (_old_collateral, r"collateral: .*\.json: unusable: .*expired"),
        (_no_collateral, r"collateral\.directory: .* holds no \*\.json"),
        (_other_database, r"keys\.db: it is another program's database"),
        (_garbage("keys.db"), r"keys\.db: "),
        (_edited("sqlite:keys.db", "sqlite:none/keys.db"), r"none/keys\.db: its directory does not exist"),
    ],
)
def test_what_is_wrong_is_told_with_key_and_file(
    command: Command, site: Path, change: Callable[[Path], None], told: str
) -> None:
    change(site)
    before = listing(site)
    ended = check(command, site)
    assert ended.code == 1
    assert re.search(told, ended.err), ended.err
    assert listing(site).keys() == before.keys()
    secret = (site / "kek").read_bytes() if (site / "kek").exists() else b"none"
    assert secret.hex() not in ended.err + ended.out


def test_all_that_is_wrong_is_told_at_once(command: Command, site: Path) -> None:
    for change in (_short_kek, _other_tls_key, _garbage("simulated-root.der"), _garbage("measurements.toml")):
        change(site)
    lines = check(command, site).err.splitlines()
    assert [line.split()[1] for line in lines] == ["tls:", "roots:", "kek_file:", "measurements:"]


def test_a_store_under_another_key_is_told(command: Command, site: Path, start: Callable[..., Server]) -> None:
    server = start("--config", site / "server.toml", ca=site / "ca.pem")
    boot = ["boot", server.url, "--ca", server.ca, "--hotkey", HOTKEY, "--vm", "vm-1", "--quoter", quoter(site)]
    assert command(*boot).code == 0
    _ = server.stop(signal.SIGTERM)
    old = KeyEncryptionKey.from_bytes((site / "kek").read_bytes()).kek_id
    _ = (site / "kek").rename(site / "kek.old")
    _ = (site / "kek").write_bytes(os.urandom(32))
    (site / "kek").chmod(0o600)
    for arguments in (["--check"], []):
        ended = command("serve", "--config", site / "server.toml", *arguments)
        assert ended.code == 1
        assert f"4 under {old}" in ended.err
    edit(site, 'kek_file = "kek"', 'kek_file = "kek"\nkek_previous_file = "kek.old"')
    ended = check(command, site)
    assert ended.code == 0
    assert "keys.db: sealed keys: 4, its own included" in ended.out


def quoter(site: Path) -> str:
    """A command that quotes for this site's platform."""
    script = site.parent / "quoter.py"
    _ = script.write_text(
        "import sys\n"
        "from chutes_proto.testing._platform import SimulatedPlatform\n"
        "sys.stdout.buffer.write(SimulatedPlatform(bytes(32)).quote(bytes.fromhex(sys.argv[1])))\n"
    )
    return f"{sys.executable} {script} {{report_data}}"


# --- what is read ---


def test_the_service_is_what_the_files_say(site: Path) -> None:
    edit(site, 'hotkeys = "*"', f'hotkeys = ["{HOTKEY}"]\nnetuid = 7\nlimits.verifications = 3')
    setup = make_setup(ServerConfig.load(site / "server.toml"))
    service = setup.service
    assert service.hotkeys == frozenset({HOTKEY})
    assert (service.netuid, service.verifications.size) == (7, 3)
    assert service.root == TrustedRoot.from_der(PLATFORM.root_der)
    assert service.trust.endswith(service.root.digest.hex())
    assert service.profiles[PROFILE.identity].image_passphrase is None
    assert setup.store.path == site / "keys.db"
    edit(site, '"simulated-root.der"', '"intel"')
    service = make_setup(ServerConfig.load(site / "server.toml")).service
    assert (service.root, service.trust) == (INTEL_ROOT, "Intel SGX Root CA")


CALLBACK = """
[registration]
evidence = "callback"
hotkey_file = "validator"
unsafe_private_networks = ["192.0.2.0/24"]
"""


def test_a_server_that_asks_hosts_has_a_hotkey_and_says_what_it_does_not_verify(command: Command, site: Path) -> None:
    edit(site, "[profile_defaults]", f"{CALLBACK}[profile_defaults]")
    ended = check(command, site)
    assert ended.code == 1
    assert "registration.hotkey_file" in ended.err
    pair = HotkeyPair.from_secret(Secret(bytes(32)))
    _ = (site / "validator").write_text(
        json.dumps({"secretSeed": f"0x{bytes(32).hex()}", "ss58Address": pair.hotkey.address})
    )
    (site / "validator").chmod(0o600)
    service = make_setup(ServerConfig.load(site / "server.toml")).service
    assert service.callback is not None
    assert (service.callback.hotkey, service.callback.port) == (pair.hotkey, 30443)
    assert list(map(str, service.unsafe_networks)) == ["192.0.2.0/24"]
    ended = check(command, site)
    assert (ended.code, ended.err) == (0, "")
    assert "warning: registration.unsafe_private_networks: hosts in 192.0.2.0/24 pass for public ones" in ended.out
    assert "GPUs say of themselves is fetched and NOT verified" in ended.out


def test_a_server_that_cannot_check_signatures_says_so(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_setup(ServerConfig.load(site / "server.toml")).warnings == ()
    monkeypatch.setitem(sys.modules, "sr25519", None)
    assert main(["serve", "--config", str(site / "server.toml"), "--check"]) == 0
    assert "warning: signed requests" in (said := capsys.readouterr().out)
    assert "chutes-proto[hotkey]" in said
    edit(site, "[profile_defaults]", f"{CALLBACK}[profile_defaults]")
    _ = (site / "validator").write_text(json.dumps({"secretSeed": f"0x{bytes(32).hex()}", "ss58Address": "x"}))
    (site / "validator").chmod(0o600)
    with pytest.raises(ConfigurationError, match=r"registration.hotkey_file: .*chutes-proto\[hotkey\]"):
        _ = make_setup(ServerConfig.load(site / "server.toml"))


def test_profiles_may_be_a_json_list_with_the_defaults_of_the_configuration(site: Path) -> None:
    rtmrs = {f"rtmr{number}": "ab" * 48 for number in range(4)}
    profiles = [{"name": n, "mrtd": f"c{n}" * 48, "boot_rtmrs": rtmrs, "runtime_rtmrs": rtmrs} for n in ("a", "b")]
    _ = (site / "list").write_text(json.dumps(profiles))
    _ = (site / "passphrase").write_bytes(b"the image's\n")
    (site / "passphrase").chmod(0o600)
    edit(site, '["measurements.toml"]', '["measurements.toml", "list"]')
    edit(
        site, 'root_passphrase = "vm"', 'version = "7"\nroot_passphrase = "image"\nroot_passphrase_file = "passphrase"'
    )
    service = make_setup(ServerConfig.load(site / "server.toml")).service
    assert [name for name, _ in service.profiles] == ["simulated", "a", "b"]
    assert service.profiles["a", "7"].measurements.version == "7"
    passphrase = service.profiles["b", "7"].image_passphrase
    assert passphrase is not None
    assert passphrase.reveal() == b"the image's"


def test_one_name_in_two_files_is_an_error(command: Command, site: Path) -> None:
    edit(site, '["measurements.toml"]', '["measurements.toml", "measurements.toml"]')
    ended = check(command, site)
    assert ended.code == 1
    assert "measurements: profile 'simulated': name and version '1' are given twice" in ended.err


def test_the_configuration_in_the_help_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "docs/reference/configuration.md" in " ".join(said.split())
    text = said.partition("server.toml:\n")[2].partition("measurements.toml (")[0]
    config = ServerConfig.from_toml(textwrap.dedent(text).encode())
    assert config.measurements == ("measurements.toml",)


FILES = ["server.toml", "measurements.toml", "server.pem", "server.key", "simulated-root.der", "kek"]


@pytest.mark.parametrize("path", ["s" * 108, "a\\u0000b"])
def test_a_path_that_no_socket_has(command: Command, site: Path, path: str) -> None:
    text = (site / "server.toml").read_text()
    _ = (site / "server.toml").write_text(f'{text}\n[[proxy]]\nname = "front"\nunix = "{path}"\n')
    ended = check(command, site)
    assert ended.code == 1
    assert "proxy.unix: the path of a unix socket has 1 to 107 bytes" in " ".join(ended.err.split())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    content=st.one_of(
        st.binary(max_size=300), st.text(max_size=100).map(str.encode), st.just(b"x = " + b"[" * 100_000)
    ),
)
def test_whatever_is_in_a_file_is_told_or_read(site: Path, name: str, content: bytes) -> None:
    kept = (site / name).read_bytes()
    _ = (site / name).write_bytes(content)
    try:
        _ = make_setup(ServerConfig.load(site / "server.toml"))
    except ConfigurationError as exc:
        assert str(exc)
    finally:
        _ = (site / name).write_bytes(kept)


# --- usage ---


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config"],
        ["--config", "none.toml"],
        ["--config", "."],
        ["--config", "none.toml", "--check"],
        ["--dev", "--check"],
        ["--dev", "--config", "server.toml"],
        ["--config", "server.toml", "--platform", "."],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(command: Command, arguments: list[str], site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    ended = command("serve", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "chutes-proto" in ended.err


def test_a_port_that_is_taken_is_told(command: Command, site: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        edit(site, "127.0.0.1:0", address)
        ended = command("serve", "--config", site / "server.toml")
    assert ended.code == 1
    assert f"listen: {address}: Address already in use" in ended.err


# --- processes ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_says_whom_it_trusts_and_stops_on_a_signal(
    site: Path, start: Callable[..., Server], command: Command, number: int
) -> None:
    server = start("--config", site / "server.toml", ca=site / "ca.pem")
    keys = site.parent / "received"
    options = ["--hotkey", HOTKEY, "--vm", "vm-1", "--quoter", quoter(site), "--keys", keys]
    booted = command("boot", server.url, "--ca", server.ca, *options)
    assert booted.code == 0, booted.err
    ended = server.stop(number)
    assert (ended.code, ended.out) == (0, "")
    records = [json.loads(line) for line in ended.err.splitlines()]
    assert [record["event"] for record in records] == [
        "serving",
        "warning",
        "boot_granted",
        "volumes_synced",
        "stopping",
        "stopped",
    ]
    serving, mark, granted, *_ = records
    assert serving["level"] == "warning"
    assert mark["about"].startswith("store.mark_file: not set")
    for record in (serving, granted):
        assert record["trust"] == f"NOT Intel's root but simulated-root.der, SHA-256 {root_digest()}"
    canaries = [path.read_text() for path in keys.iterdir()]
    assert len(canaries) == 3
    assert [path.stat().st_mode & 0o777 for path in keys.iterdir()] == [0o600] * 3
    for canary in canaries:
        assert canary not in ended.err + booted.out + booted.err


def root_digest() -> str:
    return TrustedRoot.from_der(PLATFORM.root_der).digest.hex()


@pytest.mark.parametrize("more", [[], ["--platform", "a platform"]], ids=["default", "platform"])
def test_the_next_commands_work_as_they_are_printed(
    start: Callable[..., Server], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server = start("--dev", *more)
    assert server.process.stdout is not None
    said = [server.process.stdout.readline() for _ in range(5)]
    assert said[0].startswith("next")
    shown = {}
    for line in said[1:]:
        program, *words = shlex.split(line)
        assert program == "chutes-proto"
        shown[words[0]] = command(*words)
    assert [ended.code for ended in shown.values()] == [0] * 4
    assert f"{HOTKEY}/vm-1" in shown["vm"].out
    assert "storage/1" in shown["keys"].out
    assert "boot" in shown["audit"].out


def test_a_full_disk_behind_the_log_stops_no_boot(start: Callable[..., Server], command: Command) -> None:
    with Path("/dev/full").open("w") as full:
        server = start("--dev", stderr=full)
    ended = command("boot", server.url, "--ca", server.ca, "--hotkey", HOTKEY, "--vm", "vm-1", "--wait", 0)
    assert ended.code == 0, ended.err


# --- collateral for development ---


def identity(platform: SimulatedPlatform) -> PckIdentity:
    return open_quote(platform.quote(bytes(64)), now=NOW, root=TrustedRoot.from_der(PLATFORM.root_der)).pck


def test_collateral_of_the_platform_is_made_anew_when_it_is_old(site: Path) -> None:
    directory = make_setup(ServerConfig.load(site / "server.toml")).collateral
    assert isinstance(directory, CollateralDirectory)
    _no_collateral(site)
    renewed = RenewedCollateral(directory, PLATFORM)
    first = renewed.fetch(identity(PLATFORM), NOW)
    assert renewed.fetch(identity(PLATFORM), NOW + COLLATERAL_SECONDS) is first
    later = renewed.fetch(identity(PLATFORM), NOW + COLLATERAL_SECONDS + 1)
    assert later.window[0] == NOW + COLLATERAL_SECONDS + 1
    with pytest.raises(CollateralUnavailable):
        _ = renewed.fetch(identity(PLATFORM.another(1)), NOW)


def test_a_development_server_removes_its_keys_when_it_is_ended(start: Callable[..., Server]) -> None:
    server = start("--dev")
    assert server.ca.exists()
    end(server.process)
    assert server.process.returncode == 0
    assert not server.ca.parent.exists()


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("words", [["serve", "--dev"], ["demo"]], ids=" ".join)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_start_leaves_no_folder_with_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], number: signal.Signals
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["env", f"--default-signal={number.name[3:]}", *PROGRAM, *words]  # a script's `&` ignores SIGINT
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _ = wait_until(lambda: any(tmp_path.glob("chutes-proto-*")) or process.poll() is not None)
            process.send_signal(number)
            assert process.wait(timeout=60) in (-number, 130 if number == signal.SIGINT else 0)
        finally:
            process.kill()
    assert not [*tmp_path.glob("chutes-proto-*")]


def test_a_server_of_an_operator_loads_no_simulator(site: Path) -> None:
    program = (
        "import sys; from chutes_proto.io.server.setup import make_setup; from chutes_proto.server import ServerConfig;"
        " import chutes_proto.io.server.serving, chutes_proto_trio, chutes_proto_asyncio;"
        " make_setup(ServerConfig.load(sys.argv[1]));"
        " print(*[name for name in sys.modules if name.startswith('chutes_proto.testing')])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(site / "server.toml")], capture_output=True, text=True, check=False
    )
    assert (ended.stdout.strip(), ended.stderr) == ("", "")


def test_a_start_where_the_system_allows_no_thread_is_refused_in_one_line(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    path = site / "server.toml"
    store = 'store = { url = "sqlite:keys.db", mark_file = "mark" }'
    _ = path.write_text(path.read_text().replace('store = "sqlite:keys.db"', store))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert main(["serve", "--config", str(path)]) == 2
    told = "chutes-proto: can't start new thread; let the system allow more (TasksMax= of systemd, a container's"
    assert capsys.readouterr().err.startswith(told)
