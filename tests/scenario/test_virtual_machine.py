"""The boot agent in a virtual machine: Debian's kernel, `mkinitramfs` with our hook, disks that are mapped.

Nothing is played but the hardware (qemu's) and Intel's platform (simulated: a program in the initramfs asks it). The
server and the quote service are outside, on the loopback of this machine, which qemu's own network shows the guest.

After each test the passphrases that the server's store holds are looked for in what was seen outside: consoles, with
the journals that they show, the server's log, and the disks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Literal, cast

import attr
import pytest
from attrs import define, evolve, field
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from chutes_proto.auth.server_identity import ServerIdentity, make_server_identity
from chutes_proto.io.files import write_file
from chutes_proto.io.server.setup import make_setup
from chutes_proto.keys.vault import Address
from chutes_proto.server import ServerConfig
from chutes_proto.store._rows import GenerationRow, Scan
from chutes_proto.store._run import Ask
from tests.cli.conftest import HOTKEY
from tests.conftest import CI, ROOT, SOAK
from tests.luks import headers
from tests.qgs import listening, qgs_answer, quoting, requested_report, take_request
from tests.scenario.premises import VOLUMES, Premises
from tests.scenario.test_canary import leaks
from tools.agent_zipapp import build
from tools.ports import free_port

EXAMPLES = ROOT / "examples/initramfs"
PYTHON = "/usr/bin/python3"
QEMU = "qemu-system-x86_64"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
LIBRARY = "/usr/lib/python3/dist-packages/cryptography"
SYSTEMD = "/usr/lib/systemd"
PACKAGES = {
    QEMU: "qemu-system-x86",
    "mkinitramfs": "initramfs-tools",
    "unmkinitramfs": "initramfs-tools",
    "cpio": "cpio",
    "zstd": "zstd",
    "mke2fs": "e2fsprogs",
    "xorriso": "xorriso",
    "cryptsetup": "cryptsetup-bin",
    "dmsetup": "dmsetup",
    PYTHON: "python3",
    LIBRARY: "python3-cryptography",
    "systemctl": "systemd",
    f"{SYSTEMD}/systemd-makefs": "systemd",
    f"{SYSTEMD}/systemd-udevd": "udev",
}
"""Of Debian, by what the tests run of them here or in the machine."""
KERNEL = "linux-image-amd64"
KEY = re.compile(r"[0-9a-f]{64}")  # tokens and nonces, which no store holds in the clear
GATEWAY = "10.0.2.2"
"""The guest's name of this machine's loopback (qemu's network of its own)."""
TWO_PHASE = ('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')
SIZE = 64 * 1024 * 1024
ROOT_SIZE = 256 * 1024 * 1024
OFFSET = 16 * 1024 * 1024
SECONDS = 900
"""For one boot: emulated, and on a busy machine."""

# A quoter: it asks the quote service by a report of its own making.
QUOTER = """\
#!/usr/bin/python3 -I
import socket, struct, sys
report = bytes(128) + bytes.fromhex(sys.stdin.readline()) + bytes(1024 - 192)
message = struct.pack("<HHIIIII", 1, 1, 0, 1048, 0, 1024, 0) + report
service = socket.create_connection(("GATEWAY", PORT))
service.sendall(struct.pack(">I", len(message)) + message)
sys.stdout.buffer.write(service.makefile("rb").read()[28:])
"""

# The probe's needs, and those of the programs of the quoter and of the root disk beside the agent.
HOOK = """\
#!/bin/sh
set -e
[ "$1" != prereqs ] || exit 0
. /usr/share/initramfs-tools/hook-functions
copy_exec /sbin/mke2fs
copy_file script "$PROBE" /probe
manual_add_modules ext4
copy_file script "$DEVICE" /guest_device
manual_add_modules cuse vsock_loopback 9pnet_virtio 9p overlay
"""

# Asked for on the kernel's command line: what a TD has of its kernel and its host.
TD = """\
#!/bin/sh
case "$(cat /proc/cmdline)" in *guest_device*) ;; *) exit 0 ;; esac
modprobe cuse
modprobe vsock_loopback
python3 -I /guest_device HOST &
"""

LATER = """\
#!/bin/sh
case "$1" in prereqs) echo chutes-proto; exit 0 ;; esac
case "$(cat /proc/cmdline)" in *root=/dev/mapper/none*) exec /probe ;; esac
"""

# Is run when the agent has opened the volumes: a file that was written into a volume is there at the next boot.
PROBE = """\
#!/bin/sh
mkdir -p /run/volume
for name in storage tdx-cache; do
    volume=/dev/mapper/$name
    eval "$(fstype "$volume")"
    [ "$FSTYPE" = ext4 ] || mke2fs -q -t ext4 "$volume"
    mount -t ext4 "$volume" /run/volume
    [ -e /run/volume/kept ] && echo "PROBE: $name holds $(cat /run/volume/kept)"
    echo "the data of $name" >/run/volume/kept
    umount /run/volume
    echo "PROBE: $name is $(dmsetup table "$name")"
done
poweroff -f
"""

# The programs of the system on the root disk are those of this machine, which are only read, and its own beside them.
USR = """\
#!/bin/sh
case "$1" in prereqs) exit 0 ;; esac
case "$(cat /proc/cmdline)" in *init=/usr/lib/systemd/systemd*) ;; *) exit 0 ;; esac
modprobe 9pnet_virtio
modprobe 9p
modprobe overlay
mkdir /run/usr
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=262144 usr /run/usr
mount -t overlay -o "lowerdir=$rootmnt/usr:/run/usr" usr "$rootmnt/usr"
"""

WITH_SYSTEMD = "rw init=/usr/lib/systemd/systemd systemd.getty_auto=0 systemd.log_color=0 SYSTEMD_COLORS=0" + "".join(
    f" systemd.mask={name}" for name in ("ldconfig.service", "dbus.socket", "dbus.service", "systemd-logind.service")
)

# In the place of the script that runs the agent in the initramfs.
NETWORK = """\
#!/bin/sh
case "$1" in prereqs) echo udev; exit 0 ;; esac
. /scripts/functions
configure_networking
"""

# As an operator writes them, see docs/how-to/systemd.md.
(CONFIG_MOUNT,) = re.findall("^(LABEL=config .*\n)", (ROOT / "docs/how-to/systemd.md").read_text("utf-8"), re.M)
FSTAB = """\
/dev/mapper/storage /data ext4 _netdev,x-systemd.requires=storage-makefs.service,x-systemd.device-timeout=15min 0 2
"""
MAKEFS = """\
[Unit]
Requires=UNIT
After=UNIT

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/lib/systemd/systemd-makefs ext4 /dev/mapper/storage
"""
SERVICE = """\
[Unit]
Requires=UNIT
After=UNIT multi-user.target
RequiresMountsFor=/data

[Service]
Type=oneshot
ExecStart=/usr/lib/chutes-proto/report UNIT
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""
REPORT = """\
#!/bin/sh
[ -e /data/kept ] && echo "PROBE: storage holds $(cat /data/kept)"
echo "the data of storage" >/data/kept
for name in storage tdx-cache; do echo "PROBE: $name is $(dmsetup table "$name")"; done
systemctl restart "$1" 2>&1 | sed "s/^/RESTART: /"
systemctl status --no-pager --full "$1" | sed "s/^/STATUS: /"
journalctl --no-pager --boot | sed "s/^/JOURNAL: /"
systemctl start --no-block end.service
"""
# Within the unit's sandbox: what a quote by configfs takes, with a part of the kernel that every machine has.
CONFIGFS = """\
[Unit]
After=sys-kernel-config.mount

[Service]
Environment=ENTRY=/sys/kernel/config/nullb/entry
ExecStartPre=/bin/sh -ec "mkdir $ENTRY; echo 4096 >$ENTRY/blocksize; grep -x 4096 $ENTRY/blocksize; rmdir $ENTRY"
ExecStartPre=/bin/sh -c "if touch /etc/written; then exit 1; fi"
ExecStartPre=/bin/echo configfs can be written to
"""
# Says no more than that it requires the unit: not what it needs of the mount.
WRITER = """\
[Unit]
Requires=UNIT
After=UNIT

[Service]
Type=oneshot
ExecStart=/bin/sh -c "echo PROBE: written into the bare mount point"
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""
END_SERVICE = """\
[Unit]
After=multi-user.target report.service writer.service
IgnoreOnIsolate=yes

[Service]
Type=oneshot
ExecStart=/usr/lib/chutes-proto/end UNIT
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""
END = """\
#!/bin/sh
systemctl isolate bare.target
while systemctl list-jobs --no-pager | grep -q " stop "; do sleep 1; done
echo "END: $1 is $(systemctl is-active "$1")"
systemctl poweroff
"""
BARE = """\
[Unit]
Requires=basic.target
After=basic.target
AllowIsolate=yes
"""

# In the same place: an agent of somebody's own with the library, and with the Python and the packages of this machine.
OWN_AGENT = """\
#!/bin/sh
case "$1" in prereqs) echo udev; exit 0 ;; esac
. /scripts/functions
configure_networking
modprobe 9pnet_virtio
modprobe 9p
for tag in usr project packages; do
    mkdir -p "/run/$tag"
    mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=262144 "$tag" "/run/$tag"
done
export LD_LIBRARY_PATH=/run/usr/lib/x86_64-linux-gnu
export PYTHONPATH=/run/usr/lib/python3/dist-packages:/run/project/src:/run/packages
by_id=/dev/disk/by-id/virtio
/run/usr/bin/python3 /run/project/examples/boot_agent_sync.py ARGUMENTS \
    "$by_id-root" "storage=$by_id-storage" "tdx-cache=$by_id-tdx-cache" || poweroff -f
"""

# The system on the root disk.
INIT = """\
#!/bin/sh
python3 -I /usr/lib/chutes-proto/agent.pyz agent resume --config /etc/chutes-proto/agent.toml && exec /probe
poweroff -f
"""


@define
class Image:
    kernel: Path
    initrd: Path
    settings: dict[str, object]
    authority: ServerIdentity
    ports: tuple[int, int]


def kernel() -> str | None:
    """The newest kernel that is here with its modules."""
    names = sorted(path.name.removeprefix("vmlinuz-") for path in Path("/boot").glob("vmlinuz-*-amd64"))
    return next((name for name in reversed(names) if Path("/lib/modules", name).is_dir()), None)


@pytest.fixture(scope="module")
def version() -> str:
    """Of the kernel, where all is here that the tests need; CI misses none of it, but asks for none either."""
    if not SOAK:
        pytest.skip("a virtual machine takes minutes: `make soak SOAK_TESTS=tests/scenario/test_virtual_machine.py`")
    if os.geteuid() != 0:
        pytest.skip("only root makes an initramfs")
    found = kernel()
    missing = [name for name in PACKAGES if not (shutil.which(name, path=PATH) or Path("/", name).is_dir())]
    missing += [] if found else ["a kernel in /boot"]
    if missing or found is None:
        refuse = pytest.fail if CI else pytest.skip
        packages = " ".join(sorted({*PACKAGES.values(), KERNEL}))
        refuse(f"{', '.join(missing)}: not there (Debian: apt-get install {packages})")
    return found


def toml(settings: dict[str, object]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


@pytest.fixture(scope="module")
def image(version: str, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The initramfs, made by the system's own program with nothing but what the hook and the probe put there."""
    folder = tmp_path_factory.mktemp("image")
    ports = free_port(), free_port()
    authority = make_server_identity(int(time.time()), os.urandom(32), (GATEWAY, "127.0.0.1"))
    _ = (folder / "ca.pem").write_bytes(authority.ca_pem)
    agent = folder / "agent.pyz"
    build(agent, PYTHON)
    quoter = folder / "quoter"
    _ = quoter.write_text(QUOTER.replace("GATEWAY", GATEWAY).replace("PORT", str(ports[1])))
    quoter.chmod(0o755)
    settings: dict[str, object] = {
        "servers": [f"https://{GATEWAY}:{ports[0]}"],
        "ca_file": str(folder / "ca.pem"),
        "quoter": f"command:{quoter}",
        "vm_name": "vm-1",
        "hotkey": HOTKEY,
        **{f"volumes.{name}.device": f"/dev/disk/by-id/virtio-{name}" for name in VOLUMES},
        "on_failure.action": "poweroff",
        "on_failure.wait_seconds": 1,
    }
    _ = (folder / "agent.toml").write_text(toml(settings))
    conf = folder / "conf"
    _ = shutil.copytree("/etc/initramfs-tools", conf)
    _ = (conf / "initramfs.conf").write_text("MODULES=list\nBUSYBOX=n\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\nRUNSIZE=10%\n")
    scripts = {"hooks/probe": HOOK, "scripts/local-top/probe": LATER, "probe": PROBE}
    scripts["scripts/init-premount/td"] = TD.replace("HOST", f"{GATEWAY} {ports[1]}")
    scripts["scripts/local-bottom/usr"] = USR
    for name, text in scripts.items():
        (conf / name).parent.mkdir(parents=True, exist_ok=True)
        _ = (conf / name).write_text(text)
        (conf / name).chmod(0o755)
    for name in ("hooks/chutes-proto", "scripts/local-top/chutes-proto"):
        _ = shutil.copy(EXAMPLES / name, conf / name)
    initrd = folder / "initrd"
    done = subprocess.run(
        ["mkinitramfs", "-d", conf, "-o", initrd, version],
        env={
            "PATH": PATH,
            "CHUTES_PROTO_AGENT": str(agent),
            "CHUTES_PROTO_SETTINGS": str(folder / "agent.toml"),
            "PROBE": str(conf / "probe"),
            "DEVICE": str(ROOT / "tests/guest_device.py"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return Image(Path("/boot", f"vmlinuz-{version}"), initrd, settings, authority, ports)


def write_tree(tree: Path, files: Mapping[str, str]) -> None:
    """Text files by their paths; what is a script can be run."""
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _ = path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o600)


def write_system(tree: Path) -> None:
    """The files that a system of systemd has beside its programs."""
    files = {
        "etc/machine-id": f"{os.urandom(16).hex()}\n",
        "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": "root:x:0:\n",
        "usr/lib/clock-epoch": "",  # systemd distrusts a clock that is years ahead of this file
    }
    write_tree(tree, files)
    for name in ("bin", "lib", "lib64", "sbin"):
        (tree / name).symlink_to(f"usr/{name}")


@define
class Machine:
    """A VM: raw disks, and what its console says."""

    folder: Path
    image: Image
    site: Premises
    cryptsetup: str
    settings: dict[str, object] = field(factory=dict[str, object])
    disks: list[str] = field(factory=lambda: [*VOLUMES])
    root: str = "/dev/mapper/none"
    clock: str = "utc"
    words: str = ""
    """More of the kernel's command line."""
    files: dict[str, str] = field(factory=dict[str, str])
    """The differences in the initramfs."""
    shares: dict[str, str] = field(factory=lambda: {"usr": "/usr"})
    """Folders of this machine that it can read, by their tags."""
    forwarded: str = ""
    """The ports of this machine that lead into it, as qemu writes them."""
    faults: list[Callable[[socket.socket], None]] = field(factory=list[Callable[[socket.socket], None]])
    """The quote service's faults in its first connections."""

    def __attrs_post_init__(self) -> None:
        for name in VOLUMES:
            self.blank(name)

    def disk(self, name: str) -> Path:
        return self.folder / f"{name}.img"

    def blank(self, name: str) -> None:
        with self.disk(name).open("wb") as file:
            _ = file.truncate(SIZE)

    def prints(self) -> dict[str, str]:
        return {name: hashlib.sha256(self.disk(name).read_bytes()).hexdigest() for name in VOLUMES}

    def boots_elsewhere(self) -> None:
        """Two boots of the same VM without a machine: its disks are formatted, and the server knows it."""
        here: dict[str, object] = {
            **self.image.settings,
            "servers": [self.site.url],
            "quoter": f"simulated:{self.site.platform_directory}",
            "on_failure.action": "exit",
            **{f"volumes.{name}.device": str(self.disk(name)) for name in VOLUMES},
        }
        settings = self.folder / "elsewhere.toml"
        _ = settings.write_text(toml(here))
        for _ in range(2):
            ended = self.site.run("agent", "run", "--config", settings, "--images")
            assert ended.code == 0, ended

    def initrd(self) -> Path:
        """The kernel unpacks one archive after the other: files of this machine's own come last."""
        files = dict(self.files)
        if self.settings:
            files["etc/chutes-proto/agent.toml"] = toml(self.image.settings | self.settings)
        if not files:
            return self.image.initrd
        tree = self.folder / "tree"
        write_tree(tree, files)
        packed = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            input="\n".join(files).encode(),
            cwd=tree,
            capture_output=True,
            check=True,
        )
        path = self.folder / "initrd"
        data = self.image.initrd.read_bytes()
        _ = path.write_bytes(data + bytes(-len(data) % 4) + packed.stdout)
        return path

    def command(self) -> list[str]:
        line = f"console=ttyS0 loglevel=4 panic=-1 ip=dhcp root={self.root} {self.words}"
        command = [QEMU, "-accel", "tcg", "-cpu", "max", "-m", "512", "-nodefaults", "-no-user-config", "-no-reboot"]
        command += ["-display", "none", "-monitor", "none", "-serial", "stdio", "-rtc", f"base={self.clock}"]
        command += ["-kernel", str(self.image.kernel), "-initrd", str(self.initrd()), "-append", line]
        command += ["-netdev", f"user,id=net{self.forwarded}", "-device", "virtio-net-pci,netdev=net,romfile="]
        for name in self.disks:
            command += ["-drive", f"if=none,id={name},format=raw,file={self.disk(name)}"]
            command += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
        for name, path in self.shares.items():
            command += ["-fsdev", f"local,id={name},path={path},security_model=none,readonly=on"]
            command += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
        return command

    def boots(self, hear: Callable[[str], None] = lambda _: None) -> str:
        """A boot that comes to its end."""
        said = self.boot(hear)
        assert "DONE: VM vm-1 is booted" in said, said
        assert "FAILED" not in said, said
        assert len(passphrases(self.site)) >= len(VOLUMES)
        return said

    def stops(self) -> str:
        """A boot that opens nothing and changes no disk; what its console said, on one line."""
        before = self.prints()
        said = self.boot()
        assert self.prints() == before
        assert "PROBE" not in said, said
        assert "BOOT FAILED" in said, said
        return " ".join(said.split())

    def boot(self, hear: Callable[[str], None] = lambda _: None) -> str:
        """Until the machine goes off; what its console said. ``hear`` gets each line at once."""
        stages: Iterator[Literal["boot", "runtime"]] = iter(("boot", "runtime"))
        service = quoting(lambda data: self.site.platform.quote(data, stage=next(stages)))
        said: list[str] = []

        def serve(connection: socket.socket) -> None:
            (self.faults.pop(0) if self.faults else service)(connection)

        with listening(socket.create_server(("127.0.0.1", self.image.ports[1])), serve):
            command = self.command()
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as qemu:
                alarm = threading.Timer(SECONDS, qemu.kill)
                alarm.start()
                try:
                    assert qemu.stdout is not None
                    for line in qemu.stdout:
                        said.append(line.decode("utf-8", "backslashreplace").rstrip())
                        hear(said[-1])
                finally:
                    alarm.cancel()
                    qemu.kill()
        return self.heard("\n".join(said))

    def heard(self, said: str) -> str:
        _ = sys.stdout.write(f"{said}\n\n")  # pytest -s shows the console
        assert "Traceback" not in said, said
        in_one = "".join(said.split())
        assert KEY.search(in_one) is None, said
        self.site.heard += [said.encode(), in_one.encode()]
        return said

    def make_system(self, files: dict[str, str]) -> Path:
        """A file system with the initramfs as its system, and files beside it."""
        tree = self.folder / "root"
        _ = subprocess.run(["unmkinitramfs", self.image.initrd, tree], check=True, timeout=SECONDS)
        tree = tree / "main" if (tree / "main").is_dir() else tree
        (tree / "init").unlink()
        settings = {"etc/chutes-proto/agent.toml": toml(self.image.settings | self.settings)}
        write_tree(tree, settings | files)
        return self.file_system(tree)

    def make_systemd(self, unit: str, *enabled: str) -> Path:
        """A file system with this machine's systemd, the unit as it is shipped, and what needs the unit's volumes."""
        self.words = f"{WITH_SYSTEMD} guest_device initcall_blacklist=virtio_vsock_init"
        self.settings["quoter"] = "auto"
        here: dict[str, object] = {"ca_file": "/etc/chutes-proto/ca.pem", "on_failure.action": "exit"}
        files = {
            "etc/chutes-proto/agent.toml": toml(self.image.settings | self.settings | here),
            "etc/chutes-proto/ca.pem": self.image.authority.ca_pem.decode(),
            f"etc/systemd/system/{unit}": (ROOT / "examples/systemd" / unit).read_text(),
            f"etc/systemd/system/{unit}.d/configfs.conf": CONFIGFS,
            "etc/modules-load.d/null_blk.conf": "null_blk\n",
            "etc/modprobe.d/null_blk.conf": "options null_blk nr_devices=0\n",
            "etc/systemd/system/report.service": SERVICE.replace("UNIT", unit),
            "usr/lib/chutes-proto/report": REPORT,
            "etc/systemd/system/storage-makefs.service": MAKEFS.replace("UNIT", unit),
            "etc/systemd/system/writer.service": WRITER.replace("UNIT", unit),
            "etc/systemd/system/end.service": END_SERVICE.replace("UNIT", unit),
            "etc/systemd/system/bare.target": BARE,
            "usr/lib/chutes-proto/end": END,
            "etc/fstab": FSTAB + (CONFIG_MOUNT if "config" in self.disks else ""),
        }
        tree = self.folder / "root"
        write_tree(tree, files)
        write_system(tree)
        build(tree / "usr/lib/chutes-proto/agent.pyz", PYTHON)
        command = ["systemctl", f"--root={tree}", "enable", "--quiet", unit, "report.service", *enabled]
        _ = subprocess.run(command, check=True)
        return self.file_system(tree)

    def file_system(self, tree: Path) -> Path:
        """An image of what is in ``tree``, which is no more."""
        for name in ("data", "dev", "proc", "root", "run", "sys", "tmp"):
            (tree / name).mkdir(exist_ok=True)
        plain = self.folder / "plain"
        with plain.open("wb") as file:
            _ = file.truncate(ROOT_SIZE)
        _ = subprocess.run(["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", tree, plain], check=True, timeout=SECONDS)
        shutil.rmtree(tree)
        return plain

    def add_config_volume(self) -> None:
        """The VM's identity is on a disk of the host's, and nowhere else."""
        folder = self.folder / "config"
        write_tree(folder, {"hostname": "vm-1\n", "miner-ss58": f"{HOTKEY}\n"})
        command: list[str | Path] = ["xorriso", "-as", "mkisofs", "-quiet", "-V", "config", "-R"]
        _ = subprocess.run([*command, "-o", self.disk("config"), folder], check=True, timeout=SECONDS)
        self.disks.append("config")
        settings = {name: value for name, value in self.image.settings.items() if name not in {"vm_name", "hotkey"}}
        self.image = evolve(self.image, settings=settings)
        self.settings["config_volume.directory"] = "/run/config-volume"

    def root_is_plain(self, system: Path) -> None:
        """And the initramfs has no agent."""
        _ = system.rename(self.disk("root"))
        self.disks.insert(0, "root")
        self.root = "/dev/disk/by-id/virtio-root"
        self.files["scripts/local-top/chutes-proto"] = NETWORK

    def root_is_encrypted(self) -> None:
        """In the settings of the initramfs and of its root disk."""
        self.settings |= {"root.device": "/dev/disk/by-id/virtio-root", "volumes_at": "resume"}

    def encrypt(self, plain: Path) -> None:
        """A root disk that the VM's root passphrase opens."""
        keys = self.folder / "keys"
        arguments = ["--hotkey", HOTKEY, "--vm", "vm-1", "--ca", self.site.ca, "--keys", keys]
        ended = self.site.run("boot", self.site.url, *arguments, "--platform", self.site.platform_directory)
        assert ended.code == 0, ended
        key = os.urandom(64)
        _ = (keys / "volume").write_bytes(key)
        with self.disk("root").open("wb") as disk:
            _ = disk.truncate(OFFSET + ROOT_SIZE)
        how = "--type luks2 --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-size 512"
        place = f"--sector-size 4096 --offset {OFFSET // 512} --volume-key-file {keys / 'volume'}"
        command: list[str | Path] = [self.cryptsetup, "luksFormat", *how.split(), *place.split()]
        command += [self.disk("root"), keys / "root"]
        _ = subprocess.run(command, check=True, timeout=SECONDS)
        shutil.rmtree(keys)
        with plain.open("rb") as file, self.disk("root").open("r+b") as disk:
            _ = disk.seek(OFFSET)
            while block := file.read(4096):
                sector = (file.tell() - 4096) // 512
                cipher = Cipher(algorithms.AES(key), modes.XTS(sector.to_bytes(16, "little"))).encryptor()
                _ = disk.write(cipher.update(block))
        plain.unlink()
        self.disks.insert(0, "root")
        self.root = "/dev/mapper/root"


@pytest.fixture
def site(image: Image, tmp_path: Path) -> Iterator[Premises]:
    premises = Premises(tmp_path / "site", "sqlite:keys.db")
    place = premises.directory
    write_file(place / "ca.pem", image.authority.ca_pem)
    write_file(place / "server.pem", image.authority.chain_pem)
    write_file(place / "server.key", image.authority.key_pem.reveal(), mode=0o600)
    premises.edit("127.0.0.1:0", f"127.0.0.1:{image.ports[0]}")
    yield premises
    premises.close()
    secrets = passphrases(premises)
    assert leaks(secrets, premises.heard) == []
    for disk in tmp_path.glob("vm/*.img"):
        assert leaks(secrets, [disk.read_bytes()]) == [], disk


def passphrases(site: Premises) -> set[bytes]:
    """All that the server ever handed out, of volumes and of k3s, as its store holds them."""
    setup = make_setup(ServerConfig.load(site.configuration))
    with closing(setup.store.open()) as store:
        rows = store.transact(Ask(Scan(GenerationRow)))
    return {setup.service.vault.open(Address(row.vm, row.volume, row.generation), row).reveal() for row in rows}


@pytest.fixture
def machine(image: Image, site: Premises, tmp_path: Path, require_program: Callable[[str], str]) -> Machine:
    folder = tmp_path / "vm"
    folder.mkdir()
    return Machine(folder, image, site, require_program("cryptsetup"))


def test_volumes_are_formatted_mapped_and_hold_their_data(machine: Machine, site: Premises) -> None:
    site.start()
    first = machine.boots()
    for name in VOLUMES:
        assert f"{name}: open as /dev/mapper/{name}, formatted just now" in " ".join(first.split())
        assert re.search(rf"PROBE: {name} is 0 [0-9]+ crypt aes-xts-plain64 ", first)
        assert f"the data of {name}".encode() not in machine.disk(name).read_bytes()
    again = machine.boots()
    assert "formatted" not in again
    for name in VOLUMES:
        assert f"PROBE: {name} holds the data of {name}" in again


def test_keys_are_rotated_and_the_data_stays(machine: Machine, site: Premises) -> None:
    site.edit(*TWO_PHASE)
    site.start()
    _ = machine.boots()
    prints = machine.prints()
    rotated = machine.boots()
    assert "storage: promoted, tdx-cache: promoted" in " ".join(rotated.split())
    for name in VOLUMES:
        assert f"PROBE: {name} holds the data of {name}" in rotated
        assert machine.prints()[name] != prints[name]


def test_the_config_volume_says_who_the_machine_is(machine: Machine, site: Premises) -> None:
    site.start()
    machine.add_config_volume()
    assert f"VM vm-1 of hotkey {HOTKEY}" in " ".join(machine.boots().split())


def test_a_server_that_comes_up_late_is_waited_for(machine: Machine, site: Premises) -> None:
    def hear(line: str) -> None:
        if "RETRY LATER" in line and site.server is None:
            site.start()

    told = machine.boots(hear)
    assert "Connection refused" in told


def test_a_blank_disk_in_the_place_of_one_in_use_stops(machine: Machine, site: Premises) -> None:
    site.start()
    machine.boots_elsewhere()
    machine.blank("storage")
    told = machine.stops()
    assert "the disk of storage is blank, but the server knows it to hold data: it is not formatted" in told
    assert re.search(
        r"next poweroff in 1 s \[[ 0-9.]+\] reboot: Power down$", told
    )  # and no Ctrl-C, which nobody hears


def test_a_header_with_the_null_cipher_stops(machine: Machine, site: Premises) -> None:
    site.start()
    machine.boots_elsewhere()
    told = headers.told()
    told["segments"]["0"]["encryption"] = "cipher_null-ecb"
    with machine.disk("storage").open("r+b") as disk:
        _ = disk.write(headers.both(told))
    machine.settings["on_failure.action"] = "reboot"
    said = machine.stops()
    assert "cipher_null-ecb" in said
    assert re.search(r"next reboot in 1 s \[[ 0-9.]+\] reboot: Restarting system$", said)


def test_a_clock_that_is_wrong_is_told(machine: Machine, site: Premises) -> None:
    site.start()
    machine.clock = "2020-01-01"
    machine.settings["retry.attempts"] = 1
    told = machine.stops()
    assert "certificate is not yet valid" in told
    assert "its clock says 2020-01-01 00:00:" in told
    assert "If its certificate does not verify, check the VM's clock and the CA file of the settings" in told


def test_the_guest_device_and_a_quote_service_over_vsock(machine: Machine, site: Premises) -> None:
    def answering(answer: bytes) -> Callable[[socket.socket], None]:
        def serve(connection: socket.socket) -> None:
            _ = requested_report(take_request(connection))
            connection.sendall(answer)

        return serve

    site.start()
    machine.words = "guest_device"
    machine.faults = [answering(qgs_answer(b"", error=0x12001)), answering(qgs_answer(bytes(5000))[:1000])]
    machine.settings["quoter"] = "vsock:1:4050"
    told = " ".join(machine.boots().split())
    refusals = [
        " cannot be reached: Connection reset by peer; does the host run it?",
        ": it made no quote: error 0x12001, unexpected error; its own log says more",
        ": it closed the connection after 996 of 5024 bytes",
    ]
    places = [told.index(f"RETRY LATER: the quote generation service at vsock 1:4050{what}") for what in refusals]
    assert places == sorted(places)
    # Without the driver of a host's vsock the kernel's loopback answers as the host, whom `auto` asks.
    machine.words += " initcall_blacklist=virtio_vsock_init"
    machine.settings["quoter"] = "auto"
    told = " ".join(machine.boots().split())
    assert "no quote from configfs-TSM at /sys/kernel/config/tsm/report: no provider: load the module tdx_guest" in told
    assert "quotes come from TDX guest device /dev/tdx_guest with a quote generation service at vsock 2:4050" in told


@pytest.mark.parametrize("exchange", ["base", "two-phase"])
def test_the_root_disk_first_and_the_volumes_in_the_booted_system(
    machine: Machine, site: Premises, exchange: str
) -> None:
    if exchange == "two-phase":
        site.edit(*TWO_PHASE)
    site.start()
    machine.root_is_encrypted()
    machine.encrypt(machine.make_system({"usr/sbin/init": INIT}))
    for boot in range(2):
        told = machine.boots()
        assert "root: open as /dev/mapper/root" in " ".join(told.split())
        assert "going on with the boot of VM vm-1" in told
        for name in VOLUMES:
            assert boot == 0 or f"PROBE: {name} holds the data of {name}" in told


@pytest.mark.parametrize("exchange", ["base", "two-phase"])
def test_an_agent_of_ones_own_opens_the_disks_by_one_call(machine: Machine, site: Premises, exchange: str) -> None:
    if exchange == "two-phase":
        site.edit(*TWO_PHASE)
    site.start()
    machine.encrypt(machine.make_system({"usr/sbin/init": "#!/bin/sh\nexec /probe\n"}))
    machine.shares |= {"project": str(ROOT), "packages": str(Path(attr.__file__).parents[1])}
    given = machine.image.settings
    arguments = [*cast("list[str]", given["servers"]), HOTKEY, "vm-1", given["quoter"], "/etc/chutes-proto/ca.pem"]
    machine.files = {
        "scripts/local-top/chutes-proto": OWN_AGENT.replace("ARGUMENTS", " ".join(map(str, arguments))),
        "etc/chutes-proto/ca.pem": machine.image.authority.ca_pem.decode(),
    }
    for boot in range(2):
        told = machine.boot()
        for name in VOLUMES:
            formatted = ", without a file system" if boot == 0 else ""
            assert f"virtio-{name} is /dev/mapper/{name}{formatted}\n" in told
            assert re.search(rf"PROBE: {name} is 0 [0-9]+ crypt aes-xts-plain64 ", told)
            assert boot == 0 or f"PROBE: {name} holds the data of {name}" in told


def test_systemd_opens_the_volumes_and_mounts_after_it(machine: Machine, site: Premises) -> None:
    site.edit(*TWO_PHASE)
    site.start()
    machine.root_is_encrypted()
    machine.encrypt(machine.make_systemd("chutes-proto-resume.service"))
    for boot in range(2):
        told = machine.boots()
        assert "going on with the boot of VM vm-1" in told
        assert re.search(r"^PROBE: storage is 0 [0-9]+ crypt aes-xts-plain64 ", told, re.M)
        assert "STATUS:      Active: active (exited)" in told
        assert "RESTART: Failed to restart chutes-proto-resume.service: Operation refused" in told
        assert "END: chutes-proto-resume.service is active" in told
        assert re.search("^JOURNAL: .*configfs can be written to$", told, re.M)
        assert re.search("^JOURNAL: .*DONE: VM vm-1 is booted$", told, re.M)
        assert "Received message with invalid length" not in told  # udevd, of a connection that says nothing
        assert boot == 0 or "PROBE: storage holds the data of storage" in told


def test_a_refusal_under_systemd_stops_what_needs_the_volumes(machine: Machine, site: Premises) -> None:
    site.start()
    unit = "chutes-proto-agent.service"
    machine.add_config_volume()
    machine.root_is_plain(machine.make_systemd(unit))
    machine.faults = [quoting(lambda data: site.platform.quote(data, stage="runtime"))]
    told = machine.stops()
    assert "measurement_mismatch (status 403)" in told
    assert "[FAILED] Failed to start chutes-proto-agent" in told
    for dependent in ("storage-makefs.service", "data.mount", "report.service"):
        assert f"[DEPEND] Dependency failed for {dependent}" in told
    assert re.search(r"reboot: Power down$", told)
    told = machine.boots()
    assert "STATUS:      Active: active (exited)" in told
    assert "RESTART: Failed to restart chutes-proto-agent.service: Operation refused" in told
    assert "END: chutes-proto-agent.service is active" in told
    assert re.search("^JOURNAL: .*configfs can be written to$", told, re.M)


def test_what_needs_the_volumes_does_not_start_where_the_initramfs_left_nothing(
    machine: Machine, site: Premises
) -> None:
    site.start()
    unit = "chutes-proto-resume.service"
    machine.root_is_plain(machine.make_systemd(unit, "writer.service", "end.service"))
    told = machine.boot()
    assert "[ASSERT] Assertion failed for chutes-proto" in told
    for dependent in ("writer.service", "storage-makefs.service", "data.mount", "report.service"):
        assert f"[DEPEND] Dependency failed for {dependent}" in told
    assert "PROBE" not in told
    assert f"END: {unit} is inactive" in told  # not failed: no FailureAction, the machine stays up
