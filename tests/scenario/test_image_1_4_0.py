"""A VM of image 1.4.0, a client of plain sh, with real cryptsetup over real TLS, against the served thing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen
from cryptography.x509 import load_pem_x509_certificate

from chutes_proto.io.files import create_private
from chutes_proto.io.server.development import write_server
from chutes_proto.testing._directory import PLATFORM_FILE, PlatformRecord
from tests.cli.conftest import PROGRAM, Server, end, start_server
from tests.conftest import SOAK
from tests.scenario.image_helper import PAIR, PLATFORM, helper_program
from tests.scenario.test_nginx import CONFIGURATION, GUIDE, nginx
from tests.waiting import wait_until
from tools.ports import free_port

SCRIPT = Path(__file__).with_name("image_1_4_0.sh")
BUILD = "the passphrase of build 1.4.0"
OPTIONS = """
[profile_defaults]
root_passphrase = "image"
root_passphrases_file = "passphrases.json"
exchange = "{exchange}"
"""
NEEDED = ("cryptsetup", "curl", "jq", "openssl")
UP, POWERED_OFF = 0, 10


@frozen
class Site:
    """A folder with a server's files, its process, and the URL of its front."""

    folder: Path
    server: Server
    url: str

    @property
    def log(self) -> Path:
        """What the server says."""
        return self.folder / "log"

    def operator(self, *words: str) -> Any:
        command = [*PROGRAM, *words, "--config", str(self.folder / "server.toml"), "--json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def audit(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.operator("audit", "list")["rows"]
        return rows[::-1]


@define
class Vm:
    """One VM with three disks, of which root is a fresh copy of the published image."""

    site: Site
    folder: Path
    helper: Path
    name: str = "vm-1"

    def __attrs_post_init__(self) -> None:
        for disk in ("storage", "cache"):
            with (self.folder / disk).open("wb") as file:
                _ = file.truncate(20 << 20)
        self.copy_image()

    def start_of_a_second(self) -> None:
        """No machine starts twice in a second: a first boot whose nonce is of the second of the last one is refused."""
        now = int(time.time())
        wait_until(lambda: int(time.time()) > now)

    def copy_image(self) -> None:
        disk = self.folder / "root"
        with disk.open("wb") as file:
            _ = file.truncate(20 << 20)
        quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file=-"]
        command = ["cryptsetup", "luksFormat", "-q", "--type", "luks2", *quick, str(disk)]
        _ = subprocess.run(command, input=BUILD.encode(), check=True)
        token = json.dumps({"type": "chutes-first-boot", "keyslots": []}).encode()
        command = ["cryptsetup", "token", "import", "--token-id", "15", str(disk)]
        _ = subprocess.run(command, input=token, check=True)

    def boot(self, **more: str) -> tuple[int, str]:
        """The exit code of one boot, and what its console said."""
        said = {"URL": self.site.url, "CA": str(self.site.folder / "ca.pem"), "VM": self.name}
        said |= {"HOTKEY": PAIR.hotkey.address, "HELPER": str(self.helper)}
        said |= {name.upper(): str(self.folder / name) for name in ("root", "storage", "cache")}
        said |= {"RSA_BITS": "2048", "PAUSE": "0"} | more
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **said}
        done = subprocess.run(["sh", SCRIPT], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr

    def boot_up(self, **more: str) -> None:
        """A boot that brings the system up; else its console and the server's log say why not."""
        ended, said = self.boot(**more)
        assert ended == UP, said + self.site.log.read_text()

    def slots(self, disk: str) -> int:
        command = ["cryptsetup", "luksDump", "--dump-json-metadata", str(self.folder / disk)]
        return len(json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["keyslots"])


AT_EVERY_BOOT = "rotate_after_hours = 0\n"


def write_site(
    folder: Path, more: str = "", exchange: str = "provisioned", store: str = "", pace: str = AT_EVERY_BOOT
) -> None:
    write_server(folder, PLATFORM, int(time.time()))
    path = folder / "server.toml"
    text = path.read_text().partition("[profile_defaults]")[0]
    if store:
        text = text.replace("sqlite:keys.db", store)
    _ = path.write_text(pace + text + more + OPTIONS.format(exchange=exchange))
    _ = (folder / "passphrases.json").write_text(json.dumps({"1": BUILD}))
    (folder / "passphrases.json").chmod(0o600)


def _start(folder: Path) -> Server:
    with (folder / "log").open("w") as log:
        return start_server("--config", folder / "server.toml", ca=folder / "ca.pem", stderr=log)


SITES = ["sqlite, direct", "postgresql, behind nginx"]
MORE_SITES = ["sqlite, behind nginx", "postgresql, direct"] if SOAK else []


@pytest.fixture(params=SITES + MORE_SITES)
def site(request: pytest.FixtureRequest, tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[Site]:
    for program in NEEDED:
        _ = require_program(program)
    folder = tmp_path / "site"
    folder.mkdir()
    store = "" if request.param.startswith("sqlite") else str(request.getfixturevalue("empty_schema"))
    is_direct = request.param.endswith("direct")
    write_site(folder, "" if is_direct else GUIDE[0].text, store=store)
    if store:
        make = [*PROGRAM, "store", "init", "--config", str(folder / "server.toml")]
        _ = subprocess.run(make, check=True, capture_output=True)
    server = _start(folder)
    if is_direct:
        yield Site(folder, server, server.url)
        end(server.process)
        return
    _ = require_program("nginx")
    with nginx(folder, CONFIGURATION.read_text()) as url:
        yield Site(folder, server, url)
    end(server.process)


@pytest.fixture
def fleet(tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[dict[str, Site]]:
    """A server behind the two proxies of the guide: the ways to it by their names."""
    for program in (*NEEDED, "nginx"):
        _ = require_program(program)
    folder = tmp_path / "site"
    folder.mkdir()
    write_site(folder, GUIDE[4].text)
    block = re.search(r"^    server \{\n.*?^    \}\n", CONFIGURATION.read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    headers = {"attestation": "X-Attestation-Proxy-Auth", "cvm": "X-Cvm-Proxy-Auth"}
    ports = {name: free_port() for name in headers}
    blocks = ""
    for name, header in headers.items():
        secret = f"the-secret-of-{name}"
        create_private(folder / f"{name}-secret", secret.encode())
        create_private(folder / f"{name}.conf", f'proxy_set_header {header} "{secret}";\n'.encode())
        text = block[0].replace("listen 8443 ssl", f"listen 127.0.0.1:{ports[name]} ssl")
        blocks += re.sub(f"proxy_set_header {header} .*", f"include {name}.conf;", text)
    server = _start(folder)
    with nginx(folder, CONFIGURATION.read_text().replace(block[0], blocks), ports["cvm"]):
        yield {
            "direct": Site(folder, server, server.url),
            **{name: Site(folder, server, f"https://localhost:{port}") for name, port in ports.items()},
        }
    end(server.process)


def test_it_boots_through_the_proxy_for_its_images_alone(fleet: dict[str, Site], helper: Path, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    vm = Vm(fleet["cvm"], tmp_path / "vm", helper)
    vm.boot_up()
    vm.boot_up()
    for way, step in (("attestation", "provision: 403"), ("direct", "boot refused")):
        vm.site = fleet[way]
        ended, said = vm.boot()
        assert (ended, step in said) == (POWERED_OFF, True), said
        assert "This operation is not served on this way." in said
    log = vm.site.log.read_text()
    assert '"vm":"vm-1"' in next(line for line in log.splitlines() if "it came through attestation" in line)
    assert "the-secret" not in log


@define
class OurVm:
    """The same VM with an image of ours: its disks, hotkey and platform, and the agent of this project."""

    vm: Vm
    changes: dict[str, object] = field(factory=dict[str, object])

    def __attrs_post_init__(self) -> None:
        folder, platform = self.vm.folder, self.vm.folder / "platform"
        platform.mkdir(mode=0o700)
        create_private(platform / PLATFORM_FILE, PlatformRecord(bytes(32), int(time.time())).encode())
        (folder / "hostname").write_text(self.vm.name)
        wallet = {"secretSeed": f"0x{bytes(range(32)).hex()}", "ss58Address": PAIR.hotkey.address}
        create_private(folder / "miner-ss58", json.dumps(wallet).encode())

    def command(self, action: str) -> list[str]:
        folder = self.vm.folder
        lines: dict[str, object] = {
            "servers": [self.vm.site.url],
            "ca_file": str(self.vm.site.folder / "ca.pem"),
            "quoter": f"simulated:{folder / 'platform'}",
            "signer": "config-volume",
            "config_volume.directory": str(folder),
            "root.device": str(folder / "root"),
            "volumes.storage.device": str(folder / "storage"),
            "volumes.tdx-cache.device": str(folder / "cache"),
            "state.file": str(folder / "boot.json"),
            "state.on_disk": True,
            **self.changes,
        }
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
        _ = (folder / "agent.toml").write_text(text)
        return [*PROGRAM, "agent", action, "--config", str(folder / "agent.toml"), "--images", "--json"]

    def do(self, action: str = "run") -> list[dict[str, Any]]:
        """The records of a run that succeeds."""
        done = subprocess.run(self.command(action), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout
        return [json.loads(line) for line in done.stdout.splitlines()]

    def key_of_root(self) -> str:
        """The key that opened the root disk in a boot."""
        (opened,) = [one for one in self.do() if one["event"] == "disk_opened" and one["volume"] == "root"]
        return str(opened["key"])


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with helper_program(tmp_path_factory.mktemp("helper")) as path:
        yield path


@pytest.fixture
def vm(site: Site, helper: Path, tmp_path: Path) -> Vm:
    folder = tmp_path / "vm"
    folder.mkdir()
    return Vm(site, folder, helper)


def test_boots_lost_confirmations_and_a_new_copy_of_the_image(vm: Vm) -> None:
    """A lost answer to a confirmation costs one boot that powers off, at most; then each disk opens again."""
    vm.boot_up()
    caller = (vm.folder / "root.caller").read_text()
    recorded = vm.site.operator("vm", "root-ca", "vm-1")["root_ca"]
    assert "CN=sek8s-vm-root-ca" in load_pem_x509_certificate(recorded.encode()).subject.rfc4514_string()
    assert [vm.slots(disk) for disk in ("root", "storage", "cache")] == [1, 1, 1]
    vm.boot_up()
    assert (vm.folder / "root.caller").read_text() != caller  # a hotkey of the new boot's own
    for lost, disk in (("confirm-root", "the root disk"), ("confirm", "storage")):
        vm.boot_up(LOSE=lost)  # it boots on, without the key that the server holds for the newest
        assert [vm.slots(disk) for disk in ("root", "storage", "cache")] == [1, 1, 1]
        ended, said = vm.boot()
        assert (ended, f"{disk} does not open" in said) == (POWERED_OFF, True)
        vm.boot_up()
    vm.boot_up()
    vm.copy_image()
    vm.start_of_a_second()
    vm.boot_up()  # only the build's passphrase opens the copy
    assert vm.slots("root") == 1
    vm.boot_up()
    granted = [row for row in vm.site.audit() if row["event"] == "boot"]
    assert {row["decision"] for row in granted} == {"granted"}


@pytest.mark.parametrize("site", ["sqlite, direct"], indirect=True)
def test_our_agent_boots_at_once_after_a_lost_confirmation(vm: Vm) -> None:
    """It speaks the same exchange, with the same disks, and tries the second key that it asks for."""
    ours = OurVm(vm)
    records = ours.do()
    assert [row["text"] for row in records if row["event"] == "disk_action" and row["volume"] == "root"] == [
        f"root: open {vm.folder / 'root'} as /dev/mapper/root with the current, else with the next key",
        f"root: remove the mark of a fresh image from {vm.folder / 'root'}",
        f"root: add the next key to {vm.folder / 'root'} unless it has it, and test it",
        f"root: take every key but the next one off {vm.folder / 'root'}",
    ]
    assert records[-1]["vm_auth_ss58"].startswith("5")
    assert vm.slots("root") == 1  # that of the build, which every VM has, is gone
    vm.boot_up(LOSE="confirm-root")  # an image 1.4.0, which takes the key off that the server has promoted
    assert ours.key_of_root() == "second"
    assert ours.key_of_root() == "current"
    assert vm.slots("root") == 1
    ours.changes = {"volumes_at": "resume"}
    assert ours.do()[-1]["left"]
    assert ours.do("resume")[-1]["opened"] == [f"storage: {vm.folder / 'storage'}", f"tdx-cache: {vm.folder / 'cache'}"]
    vm.boot_up()
    command = [*PROGRAM, "boot", vm.site.url, "--ca", str(vm.site.folder / "ca.pem"), "--vm", vm.name, "--json"]
    signing = ["--hotkey-file", str(vm.folder / "miner-ss58"), "--platform", str(vm.folder / "platform")]
    done = subprocess.run([*command, *signing], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["exchange"] == "provisioned"


PLACES = ("granted", "root-added", "root-confirmed", "provisioned", "storage", "added", "confirmed")


@pytest.mark.parametrize("site", ["sqlite, direct"], indirect=True)
def test_power_that_goes_at_every_place(vm: Vm) -> None:
    """After it, two boots at most bring each disk up; here at some places, in the long form at all."""
    for place in PLACES if SOAK else ("root-added",):
        vm.boot_up()
        assert vm.boot(OFF=place)[0] == POWERED_OFF
        assert UP in [vm.boot()[0] for _ in range(2)], place


@pytest.fixture
def unhurried(helper: Path, tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[Vm]:
    """The VM of a server with the usual pace: a key is replaced once a day."""
    for program in NEEDED:
        _ = require_program(program)
    folder = tmp_path / "site"
    for made in (folder, tmp_path / "vm"):
        made.mkdir()
    write_site(folder, pace="")
    server = _start(folder)
    yield Vm(Site(folder, server, server.url), tmp_path / "vm", helper)
    end(server.process)


def test_within_a_day_the_next_key_is_the_present_one(unhurried: Vm) -> None:
    """But the build's passphrase, which every VM has, is replaced at once."""
    unhurried.boot_up()
    assert subprocess.run(
        ["cryptsetup", "open", "--test-passphrase", "--key-file=-", str(unhurried.folder / "root")],
        input=BUILD.encode(),
        check=False,
        capture_output=True,
    ).returncode
    unhurried.boot_up(LOSE="confirm-root confirm")
    unhurried.boot_up()
    assert [unhurried.slots(disk) for disk in ("root", "storage", "cache")] == [1, 1, 1]


@pytest.fixture
def mistaken(helper: Path, tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[Vm]:
    """The VM of a server whose operator gave image 1.4.0 the exchange of 1.3."""
    for program in NEEDED:
        _ = require_program(program)
    folder = tmp_path / "site"
    for made in (folder, tmp_path / "vm"):
        made.mkdir()
    write_site(folder, exchange="two-phase")
    server = _start(folder)
    yield Vm(Site(folder, server, server.url), tmp_path / "vm", helper)
    end(server.process)


def test_an_operators_mistake_is_one_audit_row_and_one_log_line(mistaken: Vm) -> None:
    ended, said = mistaken.boot()
    assert (ended, "403 This image speaks another exchange" in said) == (POWERED_OFF, True)
    reason = "image asked for root_next (its request has first_boot); profile simulated 1 has exchange two-phase"
    (row,) = (row for row in mistaken.site.audit() if row["event"] != "started")
    assert (row["event"], row["decision"], row["reason"]) == ("boot", "refused", f"exchange_mismatch: {reason}")
    lines = [line for line in mistaken.site.log.read_text().splitlines() if "has exchange" in line]
    assert len(lines) == 1
    assert reason in lines[0]
