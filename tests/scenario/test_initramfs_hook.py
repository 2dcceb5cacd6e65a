"""The boot agent in an initramfs: the hook fills a tree with the real functions of initramfs-tools, and there it boots.

Nothing is in the tree but what the hook put there; the server, the host's quote service and the kernel are outside.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from attrs import define

from chutes_proto.io.quoters.simulated import open_platform
from tests.conftest import CI, ROOT
from tests.dev_server import DevServer, dev_server
from tests.guest_kernel import guest_kernel
from tests.qgs import listening, quoting
from tools.agent_zipapp import build

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""Root's, whichever user runs the tests."""
HOOK = ROOT / "examples/initramfs/hooks/chutes-proto"
SCRIPT = ROOT / "examples/initramfs/scripts/local-top/chutes-proto"
FUNCTIONS = Path("/usr/share/initramfs-tools/hook-functions")
PYTHON = "/usr/bin/python3"
HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"

# As `mkinitramfs` lays a tree out before it runs a hook.
MERGED = ("bin", "lib", "lib64", "sbin")

# The mounts of /init of the initramfs when a script runs.
ENTER = """\
set -e
mount -t proc proc "$1/proc"
mount -t tmpfs tmpfs "$1/run"
mount -t tmpfs tmpfs "$1/dev"
for node in null:3 zero:5 random:8 urandom:9; do mknod -m 666 "$1/dev/${node%:*}" c 1 "${node#*:}"; done
ln -s /sys/kernel/config/tsm/tdx_guest "$1/dev/tdx_guest"
image=$1
shift
exec chroot "$image" "$@"
"""

# A program as a quoter: it asks the host's service itself, by a report of its own making.
ASK = """\
import socket, struct, sys
report = bytes(128) + bytes.fromhex(sys.stdin.readline()) + bytes(1024 - 192)
message = struct.pack("<HHIIIII", 1, 1, 0, 1048, 0, 1024, 0) + report
service = socket.socket(socket.AF_UNIX)
service.connect("/qgs")
service.sendall(struct.pack(">I", len(message)) + message)
answer = service.makefile("rb").read()
open(sys.argv[1], "wb").write(answer[28:])
"""


@define
class Image:
    """The tree, and the settings that the hook found."""

    tree: Path
    settings: dict[str, object]

    def write(self, **changes: object) -> None:
        self.settings |= changes
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in self.settings.items())
        _ = (self.tree / "etc/chutes-proto/agent.toml").write_text(text)

    def boot(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The programs that the script of local-top runs, but disks are files."""
        agent = [PYTHON, "-I", "/usr/lib/chutes-proto/agent.pyz", "agent", "run"]
        return self.enter(*agent, "--config", "/etc/chutes-proto/agent.toml", "--images", *options)

    def enter(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", ENTER, "sh", self.tree, *command],
            env={"PATH": PATH},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )


def hook(agent: Path, settings: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": PATH,
        "DESTDIR": str(tree),
        "__MODULES_TO_ADD": str(tree.parent / "modules"),
        "verbose": "n",
        "version": "6.12",
        "CHUTES_PROTO_AGENT": str(agent),
        "CHUTES_PROTO_SETTINGS": str(settings),
    }
    return subprocess.run([HOOK], env=environment, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def programs() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes a chroot")
    missing = [path for path in (str(FUNCTIONS), "/usr/sbin/cryptsetup", PYTHON) if not Path(path).exists()]
    missing += [name for name in ("unshare", "chroot", "mount") if shutil.which(name, path=PATH) is None]
    if missing:
        refuse = pytest.fail if CI else pytest.skip
        refuse(f"{', '.join(missing)} is missing (Debian: initramfs-tools-core, cryptsetup-bin, mount)")


@pytest.fixture(scope="module")
def agent(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zipapp") / "agent.pyz"
    build(path, PYTHON)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with dev_server(tmp_path_factory.mktemp("platform")) as running:
        yield running


def laid_out(tree: Path) -> Path:
    for name in MERGED:
        (tree / "usr" / name).mkdir(parents=True)
        (tree / name).symlink_to(f"usr/{name}")
    return tree


@pytest.fixture(scope="module")
def image(agent: Path, server: DevServer) -> Iterator[Image]:
    # The path of a socket in it must be short.
    with tempfile.TemporaryDirectory(prefix="initramfs-") as directory:
        tree = laid_out(Path(directory) / "tree")
        settings = Path(directory) / "agent.toml"
        values: dict[str, object] = {
            "servers": [server.url],
            "ca_file": str(server.ca),
            "vm_name": "vm-initramfs",
            "hotkey": HOTKEY,
            "volumes.storage.device": "/storage.img",
            "volumes.tdx-cache.device": "/cache.img",
            "disk_wait_seconds": 0,
        }
        _ = settings.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()))
        done = hook(agent, settings, tree)
        assert (done.returncode, done.stderr) == (0, "")
        for name in ("proc", "run", "dev", "tmp", "sys/kernel/config/tsm"):
            (tree / name).mkdir(parents=True, exist_ok=True)
        for name in ("storage", "cache"):
            with (tree / f"{name}.img").open("wb") as file:
                _ = file.truncate(40 * 1024 * 1024)
        yield Image(tree, values)


@contextmanager
def host(image: Image, quote: Callable[[bytes], bytes]) -> Iterator[None]:
    """The host's quote service, in the tree as ``/qgs``."""
    path = image.tree / "qgs"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    with listening(listener, quoting(quote)):
        try:
            yield
        finally:
            path.unlink()


def test_it_boots_with_what_the_hook_copied_alone(image: Image, server: DevServer) -> None:
    quote = partial(open_platform(server.platform, 0).platform.quote, stage="boot")
    _ = (image.tree / "ask.py").write_text(ASK)
    image.write(quoter=f"command:{PYTHON} -I /ask.py {{output}}")
    with host(image, quote):
        first = image.boot()
        assert first.returncode == 0, first.stderr
        assert "storage.img: its key fits, formatted just now" in " ".join(first.stderr.split())
        for name in ("storage", "cache"):
            assert (image.tree / f"{name}.img").read_bytes()[:6] == b"LUKS\xba\xbe"
        again = image.boot()
        assert again.returncode == 0, again.stderr
        assert "formatted" not in again.stderr
        with guest_kernel(image.tree / "sys/kernel/config/tsm", quote) as kernel:
            image.write(quoter="auto")
            by_kernel = image.boot()
            assert by_kernel.returncode == 0, by_kernel.stderr
            assert "quotes come from configfs-TSM at /sys/kernel/config/tsm/report" in " ".join(
                by_kernel.stderr.split()
            )
            assert len(kernel.made) == 1
            assert kernel.entries == {}
            image.write(quoter="unix:/qgs")
            by_device = image.boot()
            assert by_device.returncode == 0, by_device.stderr
            assert len(kernel.made) == 1
        image.write(quoter="auto", **{"retry.attempts": 1})
        alone = image.boot()
        assert alone.returncode == 2
        told = " ".join(alone.stderr.split())
        assert "configfs-TSM at /sys/kernel/config/tsm/report: not there" in told
        assert "/dev/tdx_guest is not there: load the module tdx_guest" in told


def test_where_the_agent_fails_the_machine_goes_off_and_nobody_gets_a_shell(image: Image) -> None:
    """The script of local-top; what initramfs-tools brings beside it is played."""
    for name in ("storage", "cache"):
        with (image.tree / f"{name}.img").open("wb") as file:  # no block devices, so it stops there
            _ = file.truncate(40 * 1024 * 1024)
    _ = shutil.copy(SCRIPT, image.tree / "local-top")
    _ = shutil.copy("/bin/dash", image.tree / "bin/sh")
    (image.tree / "scripts").mkdir(exist_ok=True)
    _ = (image.tree / "scripts/functions").write_text(
        "configure_networking() { echo network; }\npanic() { echo SHELL; }\n"
    )
    for name, does in {
        "modprobe": "exit 1",
        "mount": 'echo "mount $*"',
        "sleep": "exit 0",
        "poweroff": 'echo "poweroff $*"; kill $PPID',
    }.items():
        program = image.tree / "bin" / name
        _ = program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    image.write(quoter="auto")
    ended = image.enter("/local-top")
    assert ended.stdout.splitlines()[-2:] == [
        "chutes-proto: the root disk is not open; the machine is switched off in 30 seconds",
        "poweroff -f",
    ]
    assert "network" in ended.stdout
    assert "SHELL" not in ended.stdout
    assert "BOOT FAILED" in ended.stderr
    assert image.enter("/local-top", "prereqs").stdout == "udev\n"


def test_without_a_ca_file_the_systems_authorities_are_trusted(agent: Path, tmp_path: Path) -> None:
    settings, tree = tmp_path / "agent.toml", laid_out(tmp_path / "tree")
    text = f'servers = ["https://keys.example"]\nvm_name = "vm"\nhotkey = "{HOTKEY}"\nroot.device = "/dev/vda"\n'
    _ = settings.write_text(text)
    done = hook(agent, settings, tree)
    assert (done.returncode, done.stderr) == (0, "")
    count = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    alone = {"PATH": PATH}  # without SSL_CERT_FILE, as in an initramfs
    there = [["chroot", str(tree), PYTHON, "-I", "-c", count], [PYTHON, "-I", "-c", count]]
    found = [subprocess.check_output(command, env=alone, text=True) for command in there]
    assert found[0] == found[1] != "0\n"


def test_what_is_missing_is_told_when_the_initramfs_is_made(agent: Path, tmp_path: Path) -> None:
    settings = tmp_path / "agent.toml"
    assert "agent.pyz is not there; `make zipapp` makes it" in hook(tmp_path / "agent.pyz", settings, tmp_path).stderr
    assert "agent.toml is not there" in hook(agent, settings, tmp_path).stderr
    _ = settings.write_text("not TOML")
    broken = hook(agent, settings, tmp_path)
    assert broken.returncode == 1
    assert f"chutes-proto: {settings}: not TOML" in broken.stderr
    needed = 'servers = ["https://keys.example"]\nvolumes.storage.device = "/dev/vdb"\n'
    needed += 'config_volume.directory = "/run/config-volume"\n'
    _ = settings.write_text(f"{needed}sever = 1\n")
    unknown = hook(agent, settings, tmp_path)
    assert unknown.returncode == 1
    assert f"chutes-proto: {settings}: sever: Unknown key" in unknown.stderr
    _ = settings.write_text(needed.replace("/run/", "/mnt/"))
    elsewhere = hook(agent, settings, tmp_path)
    assert elsewhere.returncode == 1
    assert "config_volume.directory: say /run/config-volume, where the script mounts it" in elsewhere.stderr
    _ = settings.write_text(f'{needed}ca_file = "{tmp_path}/none.pem"\n')
    lacking = hook(agent, settings, tmp_path)
    assert lacking.returncode == 1
    assert f"{settings}: {tmp_path}/none.pem: cannot be read: No such file or directory" in lacking.stderr
    _ = settings.write_text(f'{needed}ca_file = "/etc/hostname"\n')
    assert "/etc/hostname: not one or more PEM certificates of CAs" in hook(agent, settings, tmp_path).stderr
    _ = settings.write_text(f'{needed}quoter = "simulated"\n')
    assert "this agent has no simulated platform" in hook(agent, settings, tmp_path).stderr
    _ = settings.write_text(f'{needed}signer = "command:/no/such/signer --fast"\n')
    unsigned = hook(agent, settings, tmp_path)
    assert unsigned.returncode == 1
    assert "/no/such/signer cannot be copied" in unsigned.stderr
    _ = settings.write_text(f'{needed}signer = "config-volume"\n')
    if subprocess.run([PYTHON, "-I", "-c", "import sr25519"], capture_output=True, check=False).returncode != 0:
        unable = hook(agent, settings, tmp_path)
        assert unable.returncode == 1
        assert "signer: config-volume needs py-sr25519-bindings; run: /usr/bin/python3 -m pip" in unable.stderr
