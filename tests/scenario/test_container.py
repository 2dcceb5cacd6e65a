"""The container: its image is built on a base of Debian's packages, and started without root and with a read-only root.

Where no container runs, its root directory is entered by chroot, as the same user, in mounts of its own.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from attrs import frozen

from tests.conftest import ROOT, SOAK
from tests.scenario.premises import Premises
from tests.scenario.test_admin import listen
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not SOAK, reason="an image takes minutes: see `make soak`"),
    pytest.mark.parametrize("premises", ["sqlite"], indirect=True),
]
BASE, IMAGE = "localhost/chutes-proto-base", "localhost/chutes-proto-test"
PACKAGES = "python3,python3-venv,ca-certificates"
FILE = ROOT / "examples/container/Containerfile"
GUIDE = ROOT / "docs/how-to/container.md"
SECONDS = 1800
USER = 65532


def run(*words: object, **options: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, timeout=SECONDS, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return str(done.stdout)


def mirror() -> tuple[str, str]:
    """The release of Debian that this machine has, and where its packages come from."""
    lines = Path("/etc/os-release").read_text().splitlines()
    (release,) = (line.partition("=")[2].strip('"') for line in lines if line.startswith("VERSION_CODENAME="))
    for line in run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines():
        place, _, of = line.partition(" ")
        if of == release and not place.startswith("file:"):
            return release, place
    raise AssertionError(f"apt has no source of {release}")


def pip_files() -> set[str]:
    """The files that this machine's settings of pip are in, and name: the image is built with the same."""
    told = run(sys.executable, "-m", "pip", "config", "debug") + run(sys.executable, "-m", "pip", "config", "list")
    paths = {*re.findall(r"(/\S+), exists: True", told), *re.findall(r"'(/[^']+)'", told)}
    return {path for path in paths if Path(path).exists() and not path.startswith("/root/")}


def options_of_the_guide() -> list[str]:
    """What the guide builds the image with, beside its name and the file."""
    (line,) = re.findall(r"^podman build (.*) -t chutes-proto -f \S+ \.$", GUIDE.read_text(), re.MULTILINE)
    return shlex.split(line)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Build the image from the files of the last commit."""
    if os.geteuid() != 0:
        pytest.skip("only root makes a base from Debian's packages")
    for program in ("podman", "debootstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = tmp_path_factory.mktemp("image")
    release, place = mirror()
    _ = run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, folder / "base", place)
    _ = run("sh", "-c", f'tar -C "$1" -c . | podman import - {BASE}', "sh", folder / "base")
    shutil.rmtree(folder / "base")
    checkout = folder / "checkout"
    checkout.mkdir()
    _ = run("sh", "-c", 'git -C "$1" archive HEAD | tar -x -C "$2"', "sh", ROOT, checkout)
    settings = [word for path in pip_files() for word in ("--volume", f"{path}:{path}:ro")]
    environ = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
    settings += [word for each in environ for word in ("--env", each)]
    file = checkout / FILE.relative_to(ROOT)
    built = ["podman", "build", *options_of_the_guide(), "--isolation", "chroot", "--network", "host"]
    built += ["--build-arg", f"BASE={BASE}", *settings]
    for name, limit in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        most = resource.getrlimit(limit)[1]
        built += ["--ulimit", f"{name}={most}:{most}"]  # higher ones are not for everybody to set
    try:
        _ = run(*built, "-t", IMAGE, "-f", file, checkout)
        yield IMAGE
    finally:
        _ = subprocess.run(["podman", "rmi", "--force", IMAGE, BASE], capture_output=True, check=False)
        _ = subprocess.run(["podman", "image", "prune", "--force"], capture_output=True, check=False)


# In mounts of its own: the root read only, and what the container has beside it.
CHROOT = f"""\
set -e
root=$1 site=$2 state=$3
shift 3
mount --bind "$root" "$root"
mount --bind "$site" "$root/etc/chutes-proto"
mount --bind "$state" "$root/var/lib/chutes-proto"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount -o remount,bind,ro "$root"
mount -o remount,bind,ro "$root/etc/chutes-proto"
exec chroot --userspec={USER}:{USER} "$root" "$@"
"""


@frozen
class Container:
    """The image, with its root read only and the operator's two directories in it."""

    image: str
    directories: tuple[Path, Path]
    root: str | None
    """Its root directory where no container runs."""

    @classmethod
    def of(cls, image: str, premises: Premises) -> Container:
        directories = (premises.directory, premises.directory.with_name("state"))
        container = cls(image, directories, None)
        if subprocess.run(container.command("true"), capture_output=True, check=False, timeout=SECONDS).returncode == 0:
            return container
        root = Path(run("podman", "mount", run("podman", "create", image).strip()).strip())
        for place in ("etc/chutes-proto", "var/lib/chutes-proto", "dev", "tmp"):
            (root / place).mkdir(parents=True, exist_ok=True)
        return cls(image, directories, str(root))

    def command(self, *words: str) -> list[str]:
        """Runs a program in it, by default its own."""
        site, state = map(str, self.directories)
        if self.root is not None:
            return [
                "unshare",
                "--mount",
                "sh",
                "-c",
                CHROOT,
                "sh",
                self.root,
                site,
                state,
                *(words or entry(self.image)),
            ]
        whole = ["podman", "run", "--rm", "--read-only", "--cap-drop", "all", "--network", "host", "--tmpfs", "/tmp"]
        whole += ["-v", f"{site}:/etc/chutes-proto:ro", "-v", f"{state}:/var/lib/chutes-proto"]
        return [*whole, *(("--entrypoint", words[0]) if words else ()), self.image, *words[1:]]


def entry(image: str) -> Sequence[str]:
    both = run("podman", "inspect", "--format", "{{json .Config.Entrypoint}}\n{{json .Config.Cmd}}", image)
    return [word for line in both.strip().splitlines() for word in json.loads(line)]


def test_it_serves_without_root_and_with_a_read_only_root(premises: Premises, image: str) -> None:
    assert run("podman", "inspect", "--format", "{{.Config.User}}", image).strip() == f"{USER}:{USER}"
    root = Path(run("podman", "mount", run("podman", "create", image).strip()).strip())
    in_image = (root / "var/lib/chutes-proto").stat()  # a new volume gets its owner and its mode
    assert (in_image.st_uid, in_image.st_gid, in_image.st_mode & 0o777) == (USER, USER, 0o700)
    state = premises.directory.with_name("state")
    state.mkdir()
    premises.edit("sqlite:keys.db", "sqlite:/var/lib/chutes-proto/keys.db")
    listen(premises, 'listen = "127.0.0.1:9464"')
    for place in (premises.directory, state):
        _ = run("chown", "-R", f"{USER}:{USER}", place)
    container = Container.of(image, premises)
    for where in ("/opt/chutes-proto/bin", "/etc/chutes-proto", "/"):
        tried = subprocess.run(
            container.command("touch", f"{where}/written"), capture_output=True, text=True, check=False
        )
        assert "Read-only file system" in tried.stderr
    assert run(*container.command("id", "-u")).strip() == str(USER)
    log = premises.directory.with_name("container.log")
    with log.open("w") as file, subprocess.Popen(container.command(), stdout=file, stderr=file) as server:
        try:
            _ = wait_until(lambda: server.poll() is not None or '"serving"' in log.read_text(), 120)
            assert server.poll() is None, log.read_text()
            with httpx.Client(base_url="http://127.0.0.1:9464", trust_env=False, timeout=60) as admin:
                assert admin.get("/livez").text == "ok\n"
                assert admin.get("/readyz").json()["ready"] is True
            assert run(*container.command(*health_check(image))) == ""
        finally:
            server.terminate()
            _ = server.wait(60)
    assert '"stopped"' in log.read_text()


def health_check(image: str) -> Sequence[str]:
    """The command of the image's health check."""
    words: list[str] = json.loads(run("podman", "inspect", "--format", "{{json .HealthCheck.Test}}", image))
    assert words[0] == "CMD"
    return words[1:]
