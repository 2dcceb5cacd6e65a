"""The boot agent as a VM runs it: the command as a process, a real server over TLS, disks in files, real `cryptsetup`.

Whatever happens, it ends with a reason and in its time; a boot that must stop has changed no disk; nothing that it says
holds a key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from chutes_proto.auth.hotkey import HotkeyPair
from chutes_proto.cli.main import main
from chutes_proto.io.agent import IN_MEMORY, file_system
from chutes_proto.io.disks import cryptsetup
from chutes_proto.secret import Secret
from tests.cli.conftest import HOTKEY, PROGRAM, Ended, end, start_server
from tests.io.peers import Credentials, make_credentials, peer
from tests.luks import headers
from tests.scenario.premises import Premises
from tests.slow_peer import drip
from tools.ports import free_port

SIZE = 20 * 1024 * 1024
VOLUMES = ("storage", "tdx-cache")
NOWHERE = "https://127.0.0.1:1"
_KEY = re.compile(r"[0-9a-f]{64}")  # passphrases, tokens and nonces


@define
class Machine:
    """A VM: its settings, and its disks in files."""

    folder: Path
    memory: Path
    cryptsetup: str
    site: Premises
    servers: list[str] = field(factory=list[str])
    quoter: str = ""
    changes: dict[str, object] = field(factory=dict[str, object])
    root: bool = False

    def __attrs_post_init__(self) -> None:
        for name in VOLUMES:
            self.blank(name)

    def disk(self, name: str) -> Path:
        return self.folder / f"{name}.img"

    def blank(self, name: str) -> None:
        self.disk(name).unlink(missing_ok=True)
        with self.disk(name).open("wb") as file:
            _ = file.truncate(SIZE)

    def format(self, name: str, key: bytes) -> None:
        options = "--type luks2 --batch-mode --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file=-".split()
        command: list[str | Path] = [self.cryptsetup, "luksFormat", *options, self.disk(name)]
        done = subprocess.run(command, input=key, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

    def prints(self) -> dict[str, str]:
        return {name: hashlib.sha256(self.disk(name).read_bytes()).hexdigest() for name in VOLUMES}

    def slots(self, name: str) -> int:
        said = subprocess.run(
            [self.cryptsetup, "luksDump", self.disk(name)], capture_output=True, text=True, check=True
        )
        return len(
            re.findall(r"^ +[0-9]+: luks2$", said.stdout.partition("Keyslots:")[2].partition("Tokens:")[0], re.M)
        )

    def write(self) -> Path:
        lines: dict[str, object] = {
            "servers": self.servers or [self.site.url],
            "ca_file": str(self.site.ca),
            "quoter": self.quoter or f"simulated:{self.site.platform_directory}",
            "vm_name": "vm-1",
            "hotkey": HOTKEY,
            "retry.base_seconds": 0.1,
            "retry.deadline_seconds": 60,
            "state.file": str(self.memory / "boot.json"),
            "disk_wait_seconds": 0,
            **{f"volumes.{name}.device": str(self.disk(name)) for name in VOLUMES},
            **({"root.device": str(self.disk("root"))} if self.root else {}),
            **self.changes,
        }
        path = self.folder / "agent.toml"
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items() if value is not None)
        _ = path.write_text(text)
        return path

    def command(self, action: str, *options: str) -> list[str]:
        return [*PROGRAM, "agent", action, "--config", str(self.write()), "--images", *options]

    def do(self, action: str = "run", *options: str) -> Ended:
        done = subprocess.run(self.command(action, *options), capture_output=True, text=True, timeout=120, check=False)
        return self.heard(Ended(done.returncode, done.stdout, done.stderr))

    def heard(self, ended: Ended) -> Ended:
        for text in (ended.out, ended.err):
            assert _KEY.search("".join(text.split())) is None, text
            assert "Traceback" not in text, text
        assert ended.err.isascii()
        assert all(len(line) < 80 for line in ended.err.splitlines()), ended.err
        return ended

    def here(self, action: str = "run", *options: str) -> Ended:
        """`do` in this process, where it is of no matter whose process it is."""
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
            code = main(self.command(action, *options)[len(PROGRAM) :])
        return self.heard(Ended(code, out.getvalue(), err.getvalue()))

    def boots(self, *options: str) -> dict[str, Any]:
        """A boot that comes to its end; the last record."""
        ended = self.do("run", "--json", *options)
        assert ended.code == 0, ended.out
        return dict(json.loads(ended.out.splitlines()[-1]))

    def trusts(self, hostile: Credentials) -> None:
        """It asks a hostile server."""
        _ = (self.folder / "hostile.pem").write_bytes(hostile.ca_pem)
        self.changes |= {"ca_file": str(self.folder / "hostile.pem")}
        self.changes |= {"retry.deadline_seconds": 3, "retry.attempts": 2}

    def stops(self, code: int, action: str = "run") -> str:
        """A boot that ends with ``code`` and changes no disk; its last words, on one line."""
        before = self.prints()
        ended = self.here(action)
        assert ended.code == code, ended.err
        assert self.prints() == before
        head, _, last = ended.err.partition("BOOT FAILED")
        assert last, head
        assert "nothing was written to any" in last
        return " ".join(last.split())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Premises]:
    premises = Premises(tmp_path / "site", "sqlite:keys.db")
    yield premises
    premises.close()


@pytest.fixture
def machine(site: Premises, tmp_path: Path, require_program: Callable[[str], str]) -> Iterator[Machine]:
    folder = tmp_path / "vm"
    folder.mkdir()
    base = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=base if base.is_dir() else tmp_path) as memory:
        yield Machine(folder, Path(memory), require_program("cryptsetup"), site)


# --- what goes well ---


def test_a_first_boot_formats_and_later_ones_open(site: Premises, machine: Machine) -> None:
    site.start_here()
    first = machine.boots()
    assert (first["event"], first["formatted"]) == ("agent_done", [*VOLUMES])
    assert first["opened"] == [f"{name}: {machine.disk(name)}" for name in VOLUMES]
    formatted = machine.prints()
    site.stop()
    site.start_here()
    assert machine.boots()["formatted"] == []
    assert machine.prints() == formatted
    told = machine.do().err
    assert "known to hold data: storage, tdx-cache" in " ".join(told.split())
    assert "DONE: VM vm-1 is booted" in told


def test_a_server_that_comes_up_late_is_waited_for(site: Premises, machine: Machine) -> None:
    port = free_port()
    site.edit('listen = "127.0.0.1:0"', f'listen = "127.0.0.1:{port}"')
    machine.servers = [f"https://127.0.0.1:{port}"]
    with subprocess.Popen(machine.command("run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        while "RETRY LATER" not in (line := agent.stderr.readline()):
            assert line, "it ended without an attempt"
        site.start_here()
        out, err = agent.communicate(timeout=90)
    ended = machine.heard(Ended(agent.returncode, out, err))
    assert ended.code == 0, ended.err
    assert "DONE" in ended.err


def test_the_next_server_is_asked_where_one_is_down(site: Premises, machine: Machine) -> None:
    site.start_here()
    machine.servers = [NOWHERE, site.url]
    ended = machine.do()
    assert ended.code == 0, ended.err
    assert re.search(rf"trying again in [0-9.]+ s at {site.url}", " ".join(ended.err.split()))
    assert f"asking {site.url} for a nonce (attempt 2/30)" in ended.err


def test_a_server_that_dies_after_its_grant_is_replaced(site: Premises, machine: Machine, tmp_path: Path) -> None:
    """Its grant holds at every server of the store: the same bytes go to the next one."""
    two_phase(site)
    site.start()
    other = start_server("--config", site.configuration, ca=site.ca, stderr=subprocess.DEVNULL)
    try:
        machine.servers = [site.url, other.url]
        machine.quoter = quote_command(site, tmp_path, second=f"kill -9 {site.server.process.pid}")  # type: ignore[union-attr]
        ended = machine.do()
    finally:
        end(other.process)
    assert ended.code == 0, ended.err
    told = " ".join(ended.err.split())
    assert f"attesting to {site.url} for the keys (attempt 1/30)" in told
    assert f"attesting to {other.url} for the keys (attempt 2/30)" in told
    assert told.count("for a nonce") == 1


def quote_command(site: Premises, tmp_path: Path, *options: str, first: str = "true", second: str = "true") -> str:
    """A program that quotes as `simulate` does; ``first`` and ``second`` are run before its first and second quote."""
    script = tmp_path / "quoter"
    command = f"{shlex.join(PROGRAM)} simulate --platform {site.platform_directory} {' '.join(options)}"
    _ = script.write_text(
        f"#!/bin/sh\nset -e\nif [ -e {tmp_path}/out ]; then stage=runtime; {second}; else stage=boot; {first}; fi\n"
        f'{command} --stage $stage --report-data "$(cat)" --out {tmp_path}/out >&2\ncat {tmp_path}/out/quote.bin\n'
    )
    script.chmod(0o755)
    return f"command:{script}"


# --- the two-phase exchange ---


def two_phase(site: Premises) -> None:
    site.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nexchange = "two-phase"')


def test_keys_are_rotated_at_each_boot(site: Premises, machine: Machine) -> None:
    two_phase(site)
    site.start_here()
    key_file = machine.memory / "k3s"
    machine.changes["state.k3s_key_file"] = str(key_file)
    assert machine.boots()["formatted"] == [*VOLUMES]
    k3s = key_file.read_bytes()
    assert (len(k3s), key_file.stat().st_mode & 0o777) == (44, 0o600)
    prints = machine.prints()
    for _ in range(2):
        ended = machine.do()
        assert ended.code == 0, ended.err
        told = " ".join(ended.err.split())
        assert "storage: promoted, tdx-cache: promoted" in told
        assert [machine.slots(name) for name in VOLUMES] == [2, 2]  # the key before stays until the next rotation
        assert all(machine.prints()[name] != prints[name] for name in VOLUMES)
        prints = machine.prints()
        assert key_file.read_bytes() == k3s


def make_root(machine: Machine) -> None:
    """A root disk that the VM's root passphrase opens."""
    keys = machine.folder / "keys"
    arguments = ["--hotkey", HOTKEY, "--vm", "vm-1", "--ca", machine.site.ca, "--keys", keys]
    ended = machine.site.run("boot", machine.site.url, *arguments, "--platform", machine.site.platform_directory)
    assert ended.code == 0, ended.err + ended.out
    machine.blank("root")
    machine.format("root", (keys / "root").read_bytes())
    shutil.rmtree(keys)
    machine.root = True


@pytest.mark.parametrize("exchange", ["base", "two-phase"])
def test_the_root_disk_first_and_the_volumes_later(site: Premises, machine: Machine, exchange: str) -> None:
    if exchange == "two-phase":
        two_phase(site)
    site.start_here()
    make_root(machine)
    machine.servers = [NOWHERE, site.url]
    machine.changes["volumes_at"] = "resume"
    state = machine.memory / "boot.json"
    if file_system(machine.memory) not in IN_MEMORY:
        machine.changes["state.on_disk"] = True
    before = machine.prints()
    ended = machine.do()
    assert ended.code == 0, ended.err
    assert "left to `chutes-proto agent resume`" in ended.err
    assert machine.prints() == before
    assert state.stat().st_mode & 0o777 == 0o600
    later = machine.do("resume")
    assert later.code == 0, later.err
    assert "going on with the boot of VM vm-1" in later.err
    assert NOWHERE not in later.err  # the server that granted is asked first
    assert "storage: open" in later.err
    assert not state.exists()
    assert machine.prints() != before
    assert "agent run` leaves it" in machine.stops(2, action="resume")


def test_state_that_is_not_ours_is_not_used(site: Premises, machine: Machine) -> None:
    site.start_here()
    machine.changes["volumes_at"] = "resume"
    if file_system(machine.memory) not in IN_MEMORY:
        machine.changes["state.on_disk"] = True
    assert machine.do().code == 0
    state = machine.memory / "boot.json"
    state.chmod(0o644)
    assert "not a plain file that is this user's alone" in machine.stops(2, action="resume")
    state.chmod(0o600)
    left = json.loads(state.read_text())
    _ = state.write_text(json.dumps({**left, "server": "https://evil.example"}, separators=(",", ":")) + "\n")
    told = machine.stops(2, action="resume")
    assert "boot.json: left by a boot at a server that the settings do not name" in told
    assert "The key hand-off of `agent run` to the booted system is too old, of another boot" in told


@pytest.mark.parametrize("name", ["file", "k3s_key_file"])
def test_state_is_not_left_on_a_disk(site: Premises, machine: Machine, tmp_path: Path, name: str) -> None:
    if file_system(tmp_path) in IN_MEMORY:
        pytest.skip(f"{tmp_path} is in memory")
    site.start_here()
    place = tmp_path / "left"
    machine.changes |= {"volumes_at": "resume", f"state.{name}": str(place)}
    assert "not in memory: a boot token is not written there" in machine.stops(2)
    assert not place.exists()


# --- what must stop ---


def test_a_refusal_is_told_whole(site: Premises, machine: Machine, tmp_path: Path) -> None:
    site.start_here()
    machine.quoter = quote_command(site, tmp_path, "--fault", "rtmr1")
    told = machine.stops(1)
    assert told.startswith(f"at step attestation, at {site.url} reason Quote does not match")
    assert "(RTMR1)" in told
    assert "code measurement_mismatch (status 403)" in told
    request = re.search(r"request ([0-9a-f]{32}) ", told)
    assert request is not None
    site.wait_for_log(request[1])
    assert "means The server does not accept what was booted here" in told
    assert "do Boot the image that the server's operator released" in told


def test_a_refusal_as_json(site: Premises, machine: Machine, tmp_path: Path) -> None:
    site.start_here()
    machine.quoter = quote_command(site, tmp_path, "--fault", "rtmr1")
    ended = machine.do("run", "--json")
    assert ended.code == 1
    records = [json.loads(line) for line in ended.out.splitlines()]
    last = records[-1]
    assert (last["event"], last["level"], last["code"], last["exit_code"]) == (
        *("agent_failed", "error"),
        *("measurement_mismatch", 1),
    )
    assert (last["step"], last["server"], last["written"]) == ("attestation", site.url, [])
    assert len(last["request_id"]) == 32
    assert [record["step"] for record in records if record["event"] == "boot_step"] == ["nonce", "quote", "attestation"]
    assert all("seconds_left" in record for record in records[:-1])


def test_a_blank_disk_in_the_place_of_a_volume_stops(site: Premises, machine: Machine) -> None:
    site.start_here()
    for _ in range(2):  # the second boot shows the server that the disk has a header
        _ = machine.boots()
    machine.blank("storage")
    told = machine.stops(1)
    assert "the disk of storage is blank, but the server knows it to hold data: it is not formatted" in told
    assert "keys allow-format" in told


def test_a_disk_that_is_too_small_stops_before_a_server_is_asked(machine: Machine) -> None:
    """The other disk stays blank. A dry run says so."""
    machine.servers = [NOWHERE]
    os.truncate(machine.disk("tdx-cache"), 17 * 1024 * 1024 - 512)
    assert "the disk of tdx-cache has 17825280 bytes; a volume needs 17825792 or more" in machine.stops(1)
    said = machine.here("run", "--dry-run", "--json")
    assert (said.code, said.json["disks"][1]["error"]["reason"]) == (1, "too_small")


def test_a_machine_without_cryptsetup_stops_before_a_server_is_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An initramfs may lack it. A dry run says so."""
    machine.servers = [NOWHERE]
    monkeypatch.setattr(cryptsetup, "find_cryptsetup", lambda: None)
    assert "cryptsetup is not installed; get it with: apt-get install cryptsetup-bin" in machine.stops(1)
    said = machine.here("run", "--dry-run", "--json")
    assert (said.code, said.json["disks"][0]["error"]["reason"]) == (1, "no_cryptsetup")


def test_a_header_with_the_null_cipher_stops_before_a_server_is_asked(site: Premises, machine: Machine) -> None:
    site.start_here()
    _ = machine.boots()
    told = headers.told()
    told["segments"]["0"]["encryption"] = "cipher_null-ecb"
    with machine.disk("storage").open("r+b") as disk:
        _ = disk.write(headers.both(told))
    said = machine.stops(1)
    assert "cipher_null-ecb" in said
    assert "asking" not in machine.do().err


def test_another_vms_disk_stops(site: Premises, machine: Machine) -> None:
    site.start_here()
    _ = machine.boots()
    machine.changes["vm_name"] = "vm-2"
    assert "the current key does not open it" in machine.stops(1)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "missing"])
def test_what_is_no_disk_stops(site: Premises, machine: Machine, kind: str) -> None:
    site.start_here()
    place = machine.folder / "strange"
    match kind:
        case "folder":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)
        case "link":
            place.symlink_to("/dev/null")
        case _:
            pass
    machine.changes["volumes.storage.device"] = str(place)
    assert "not a block device" in (said := machine.stops(1)) or "cannot be opened" in said


@pytest.mark.parametrize(
    ("change", "told"),
    [("truncate -s -4096 storage.img", "now has"), ("ln -sfn other.img link", "now leads to another device")],
    ids=["it shrinks", "its link changes"],
)
def test_a_disk_that_changes_after_it_was_looked_at(
    site: Premises, machine: Machine, tmp_path: Path, change: str, told: str
) -> None:
    site.start_here()
    link, other = machine.folder / "link", machine.folder / "other.img"
    link.symlink_to("storage.img")
    _ = shutil.copyfile(machine.disk("storage"), other)
    machine.changes |= {"volumes.storage.device": str(link), "volumes.tdx-cache.device": None}
    machine.quoter = quote_command(site, tmp_path, first=f"cd {machine.folder}; {change}")
    ended = machine.here()
    assert ended.code == 1, ended.err
    assert told in " ".join(ended.err.split())
    assert not any(machine.disk("storage").read_bytes() + other.read_bytes())


def test_a_disk_that_appears_late_is_waited_for(site: Premises, machine: Machine) -> None:
    site.start_here()
    hidden = machine.disk("storage").rename(machine.folder / "hidden")
    machine.changes["disk_wait_seconds"] = 60
    with subprocess.Popen(machine.command("run"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        while "waiting at most 60.0 s for" not in (line := agent.stderr.readline()):
            assert line, "it ended without waiting"
        _ = hidden.rename(machine.disk("storage"))
        out, err = agent.communicate(timeout=90)
    assert machine.heard(Ended(agent.returncode, out, err)).code == 0, err


def test_the_deadline_ends_it(machine: Machine) -> None:
    machine.servers = [NOWHERE, "https://127.0.0.1:2"]
    machine.changes["retry.deadline_seconds"] = 2
    begun = time.monotonic()
    told = machine.stops(2)
    assert time.monotonic() - begun < 60
    assert "at step nonce" in told
    assert "Connection refused" in told
    assert "No server that this agent trusts answered before the deadline" in told


def test_the_deadline_ends_a_quote(site: Premises, machine: Machine) -> None:
    site.start_here()
    machine.quoter = "command:/bin/sleep 100"
    machine.changes["retry.deadline_seconds"] = 1
    begun = time.monotonic()
    told = machine.stops(2)
    assert time.monotonic() - begun < 60  # the quote command would take 100
    assert "the quote command /bin/sleep: the deadline, retry.deadline_seconds, ended it" in told


def test_the_deadline_is_that_of_cryptsetup(site: Premises, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    site.start_here()
    stuck = machine.folder / "bin" / "cryptsetup"
    stuck.parent.mkdir()
    _ = stuck.write_text("#!/bin/sh\nexec sleep 100\n")
    stuck.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stuck.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(cryptsetup, "_LATE_SECONDS", 0.1)
    machine.changes["retry.deadline_seconds"] = 2
    begun = time.monotonic()
    ended = machine.here()
    assert time.monotonic() - begun < 60  # cryptsetup would take 100
    assert ended.code == 1
    assert "cryptsetup luksFormat did not end in" in " ".join(ended.err.split())


# --- servers that are hostile ---

NONCE = "5e" * 32


def page(status: str, body: bytes, *more: bytes) -> bytes:
    head = [f"HTTP/1.1 {status}".encode(), b"content-type: application/json", *more, b"content-length: %d" % len(body)]
    return b"\r\n".join([*head, b"", body])


def saying(answers: dict[str, bytes]) -> Callable[[ssl.SSLSocket], None]:
    """Answers by the end of the path; ``""`` is for all others."""

    def behave(stream: ssl.SSLSocket) -> None:
        while request := one_request(stream):
            path = request.split(b" ")[1].partition(b"?")[0].decode()
            stream.sendall(next(data for end, data in answers.items() if path.endswith(end)))

    return behave


def one_request(stream: ssl.SSLSocket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := stream.recv(65536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: ([0-9]+)", head, re.IGNORECASE)
    while length is not None and len(body) < int(length[1]):
        body += stream.recv(65536)
    return head + b"\r\n\r\n" + body


def endless(stream: ssl.SSLSocket) -> None:
    _ = one_request(stream)
    stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        stream.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")


def dripping(stream: ssl.SSLSocket) -> None:
    _ = one_request(stream)
    drip(stream.sendall, [bytes([byte]) for byte in b"HTTP/1.1 200 OK\r\n" * 100], 0.2)


def half(stream: ssl.SSLSocket) -> None:
    _ = one_request(stream)
    stream.sendall(page("200 OK", b'{"nonce":"' + NONCE.encode() + b'"}')[:-9])


def garbage(stream: ssl.SSLSocket) -> None:
    _ = one_request(stream)
    stream.sendall(os.urandom(4096) + b"\r\n\r\n")


def own_terminal(stream: ssl.SSLSocket) -> None:
    _ = one_request(stream)
    text = "\x1b[2J\x1b]0;pwned\x07\u202e\xff" + "x" * 5000
    stream.sendall(page("403 Forbidden", json.dumps({"detail": text, "code": text, "request_id": text}).encode()))


def granting(answer: dict[str, object], keys: dict[str, object] | None = None) -> Callable[[ssl.SSLSocket], None]:
    nonce = {"nonce": NONCE, "expires_at": "2030-01-01T00:00:00+00:00"}
    said = {"/nonce": nonce, "/attestation": answer, "/luks": keys or {}}
    return saying({path: page("200 OK", json.dumps(value).encode()) for path, value in said.items()})


def redirecting(stream: ssl.SSLSocket) -> None:
    saying({"": page("307 Temporary Redirect", b"", b"location: https://127.0.0.1:1/servers/nonce")})(stream)


TOKEN = "70" * 32
WRONG = "wrong-" * 20


def repeating(stream: ssl.SSLSocket) -> None:
    """Grants, and then repeats the token, at length."""
    granted = {"/nonce": {"nonce": NONCE, "expires_at": "2030-01-01T00:00:00+00:00"}}
    granted |= {"/attestation": {"key": WRONG, "boot_token": TOKEN}}
    answers = {path: page("200 OK", json.dumps(value).encode()) for path, value in granted.items()}
    refused = json.dumps({"detail": f"no such token: {TOKEN} {'x' * 5000}", "code": TOKEN, "request_id": TOKEN})
    saying({**answers, "": page("403 Forbidden", refused.encode())})(stream)


@pytest.mark.parametrize(
    ("behaviour", "code", "told"),
    [
        (garbage, 2, "not an answer of HTTP/1.1"),
        (half, 2, "the connection broke"),
        (endless, 2, "more than 1048576 bytes"),
        (dripping, 2, "no whole answer within"),
        (redirecting, 2, "307"),
        (own_terminal, 1, r"\x1b[2J"),
        (granting({"key": "", "boot_token": TOKEN}), 2, "key"),
        (granting({"key": WRONG}), 2, "boot_token: Field required"),
        (granting({"key": WRONG, "boot_token": "x"}), 2, "64 lowercase hex digits"),
        (granting({"key": WRONG, "boot_token": TOKEN}, {"storage": WRONG}), 2, "exactly the volumes"),
        (granting({"key": WRONG, "boot_token": TOKEN}, {"storage": "", "tdx-cache": WRONG}), 2, "passphrases.0"),
        (
            granting({"key": WRONG, "boot_token": TOKEN}, {"storage": WRONG, "tdx-cache": WRONG, "other": WRONG}),
            2,
            "exactly the volumes",
        ),
        (repeating, 1, "no such token: ***"),
        (
            granting(
                {"key": WRONG, "boot_token": TOKEN}, {"storage": WRONG, "tdx-cache": WRONG, "in_use": [VOLUMES[1]]}
            ),
            1,
            "it is not formatted",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_hostile_server(machine: Machine, hostile: Credentials, behaviour: Any, code: int, told: str) -> None:
    machine.format("storage", b"precious")  # there is something to lose; the other disk is blank, and has to stay so
    machine.trusts(hostile)
    begun = time.monotonic()
    with peer(hostile, behaviour) as (url, _ended):
        machine.servers = [url]
        said = machine.stops(code)
    assert told in said
    assert WRONG not in said
    assert TOKEN not in said.replace(" ", "")
    assert len(said) < 2000
    assert time.monotonic() - begun < 60


WORD = "word-" * 25
_NONCE: dict[str, object] = {"nonce": NONCE, "expires_at": "2030-01-01T00:00:00+00:00"}
_PAIR = {"current": WRONG, "next": WORD}
BASE: dict[str, dict[str, object]] = {
    "nonce": _NONCE,
    "attestation": {"key": WRONG, "boot_token": TOKEN},
    "luks": {"storage": WRONG, "tdx-cache": WRONG, "in_use": []},
}
"""A server's answers in an exchange that succeeds, by the last word of the path."""
TWO_PHASE: dict[str, dict[str, object]] = {
    "nonce": _NONCE,
    "attestation": {"key": WRONG, "boot_token": None, "luks_quote_nonce": TOKEN},
    "attest": {"volumes": dict.fromkeys(VOLUMES, _PAIR), "confirm_nonce": TOKEN, "k3s_encryption_key": f"{'A' * 43}="},
    "confirm": {"status": "confirmed", "volumes": {name: {"result": "promoted"} for name in VOLUMES}},
}
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
TURNS: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "garbage": (lambda _body, _place: os.urandom(4096) + b"\r\n\r\n", "not an answer of HTTP/1.1"),
    "half": (lambda body, _place: page("200 OK", body)[:-9], "the connection broke"),
    "endless": (
        lambda body, _place: (
            CHUNKED + b"%x\r\n%b\r\n" % (len(body), body) + (b"10000\r\n" + b" " * 65536 + b"\r\n") * 32
        ),
        "more than 1048576 bytes",
    ),
    "redirect": (lambda _body, place: page("307 Temporary Redirect", b"", b"location: " + place), "307"),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("exchange", "step"),
    [(BASE, "attestation"), (BASE, "luks"), (TWO_PHASE, "attest"), (TWO_PHASE, "confirm")],
    ids=["attestation", "luks", "attest", "confirm"],
)
def test_a_server_that_turns_hostile(
    machine: Machine, hostile: Credentials, exchange: dict[str, dict[str, object]], step: str, turn: str
) -> None:
    """Up to the last answer no disk is touched. Without that one, both keys open the disks. Nobody else is asked."""
    machine.format("storage", WRONG.encode())
    if step == "confirm":  # by then, a disk that is blank was formatted
        machine.format("tdx-cache", WRONG.encode())
    machine.trusts(hostile)
    machine.changes["retry.deadline_seconds"] = 60  # attempts end it
    before, asked = machine.prints(), list[str]()
    bodies = {name: json.dumps(said).encode() for name, said in exchange.items()}
    answers = {name: page("200 OK", body) for name, body in bodies.items()}

    def behave(stream: ssl.SSLSocket) -> None:
        if request := one_request(stream):
            asked.append(re.split(rb"[ ?]", request, maxsplit=2)[1].rpartition(b"/")[2].decode())
            stream.sendall(answers[asked[-1]])

    with socket.create_server(("127.0.0.1", 0)) as elsewhere, peer(hostile, behave) as (url, _ended):
        machine.servers = [url]
        make, told = TURNS[turn]
        answers[step] = make(bodies[step], b"https://localhost:%d/" % elsewhere.getsockname()[1])
        ended = machine.here()
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            _ = elsewhere.accept()
    steps = [*exchange]
    again = steps[:2] if step == "attestation" else [step]  # it redeems a nonce
    assert asked == [*steps[: steps.index(step) + 1], *again]
    assert told in " ".join(ended.err.split())
    assert not any(secret in ended.out + ended.err for secret in (WRONG, WORD, TOKEN, NONCE))
    if step == "confirm":
        assert ended.code == 0
        assert [machine.slots(name) for name in VOLUMES] == [2, 2]
    else:
        assert ended.code == 2
        assert machine.prints() == before


@pytest.mark.parametrize(
    ("status", "is_kept"), [("408 Request Timeout", True), ("503 Service Unavailable", True), ("403 Forbidden", False)]
)
def test_what_is_left_of_a_boot_stays_for_another_try_where_that_may_succeed(
    machine: Machine, hostile: Credentials, status: str, is_kept: bool
) -> None:
    machine.trusts(hostile)
    machine.changes["volumes_at"] = "resume"
    if file_system(machine.memory) not in IN_MEMORY:
        machine.changes["state.on_disk"] = True
    answers = {f"/{name}": page("200 OK", json.dumps(said).encode()) for name, said in BASE.items()}
    with peer(hostile, saying(answers | {"/luks": page(status, b"{}")})) as (url, _ended):
        machine.servers = [url]
        assert machine.here().code == 0
        assert machine.here("resume").code == 1
    assert (machine.memory / "boot.json").exists() is is_kept


@pytest.fixture
def hostile(tmp_path: Path) -> Credentials:
    folder = tmp_path / "hostile"
    folder.mkdir()
    return make_credentials(folder)


def test_tls_with_another_name_or_authority(
    site: Premises, machine: Machine, hostile: Credentials, tmp_path: Path
) -> None:
    site.start_here()
    machine.changes["retry.deadline_seconds"] = 2
    asked: list[bytes] = []
    with peer(hostile, lambda stream: asked.append(one_request(stream))) as (url, _ended):
        machine.servers = [url]
        assert "certificate does not verify" in machine.stops(2)
        machine.servers = [url.replace("localhost", "127.0.0.1")]
        authority = tmp_path / "hostile.pem"
        _ = authority.write_bytes(hostile.ca_pem)
        machine.changes["ca_file"] = str(authority)
        assert "certificate does not verify: IP address mismatch" in machine.stops(2)
    assert asked == []


# --- a config volume that lies ---


@pytest.fixture
def volume(machine: Machine) -> Path:
    folder = machine.folder / "config"
    folder.mkdir()
    _ = (folder / "hostname").write_text("vm-1\n")
    _ = (folder / "miner-ss58").write_text(f"{HOTKEY}\n")
    machine.changes |= {"vm_name": None, "hotkey": None, "config_volume.directory": str(folder)}
    return folder


def test_a_config_volume_says_who_the_vm_is(site: Premises, machine: Machine, volume: Path) -> None:
    site.start_here()
    assert (machine.boots()["vm_name"], volume.is_dir()) == ("vm-1", True)


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("hostname", "pipe"),
        ("miner-ss58", "link"),
        ("hostname", "huge"),
        ("miner-ss58", "binary"),
        ("hostname", "escape"),
    ],
)
def test_a_config_volume_that_lies(machine: Machine, volume: Path, name: str, lie: str) -> None:
    file = volume / name
    file.unlink()
    match lie:
        case "pipe":
            os.mkfifo(file)
        case "link":
            file.symlink_to("/etc/hostname")
        case "huge":
            with file.open("wb") as sparse:
                _ = sparse.truncate(1 << 40)
        case "binary":
            _ = file.write_bytes(bytes(range(256)))
        case _:
            _ = file.write_text("\x1b[2Jvm\n")
    machine.servers = [NOWHERE]
    told = machine.stops(2)
    assert f"config volume: {name}: " in told


def test_a_config_volume_chooses_nothing_else(site: Premises, machine: Machine, volume: Path) -> None:
    site.start_here()
    for name in ("agent.toml", "servers", "ca.pem", "ca_file", "quoter"):
        _ = (volume / name).write_text('servers = ["https://evil.example"]\n')
    assert machine.boots()["event"] == "agent_done"


@pytest.mark.parametrize("held", ["wallet with a seed", "wallet with a private key", "file with a private key"])
def test_the_key_of_the_config_volume_signs(site: Premises, machine: Machine, volume: Path, held: str) -> None:
    seed = bytes(range(32))
    pair = HotkeyPair.from_secret(Secret(seed))
    address, key = pair.hotkey.address, pair.secret_key.reveal().hex()
    wallet = {"ss58Address": address}
    if held == "file with a private key":
        _ = (volume / "miner-private-key").write_text(key)
    else:
        wallet |= {"secretSeed": f"0x{seed.hex()}"} if held == "wallet with a seed" else {"privateKey": f"0x{key}"}
    _ = (volume / "miner-ss58").write_text(json.dumps(wallet))
    site.edit('root_passphrase = "vm"', 'root_passphrase = "vm"\nrequire_hotkey_signature = true')
    site.start_here()
    machine.changes["disk_wait_seconds"] = 1
    assert "signature_invalid" in machine.stops(1)
    machine.changes["signer"] = "config-volume"
    assert machine.boots()["hotkey"] == address


# --- before and after ---


def test_a_dry_run_asks_no_server_and_writes_nothing(site: Premises, machine: Machine) -> None:
    site.start_here()
    _ = machine.boots()
    machine.servers = [NOWHERE]
    machine.blank("tdx-cache")
    before = machine.prints()
    ended = machine.do("run", "--dry-run")
    assert ended.code == 0, ended.err
    assert re.search(r"^storage: .*: LUKS2, UUID", ended.out, re.MULTILINE)
    assert "format" in ended.out
    assert "if the server does not know it to hold data; else the boot stops" in ended.out
    assert "not known without the server" in ended.out
    _ = machine.disk("storage").write_bytes(b"something else" * 200_000)
    ended = machine.do("run", "--dry-run", "--json")
    assert ended.code == 1
    said = ended.json
    assert (said["stops"], said["disks"][0]["error"]["reason"]) == (True, "foreign")
    assert machine.prints()["tdx-cache"] == before["tdx-cache"]


@pytest.mark.parametrize("action", ["reboot", "poweroff", "shell"])
def test_what_follows_a_failure(machine: Machine, action: str) -> None:
    machine.servers = [NOWHERE]
    gone = machine.folder / "went-off"
    machine.changes |= {
        "retry.attempts": 1,
        "on_failure.action": action,
        "on_failure.wait_seconds": 0.2,
        f"on_failure.{action}": ["touch", str(gone)],
    }
    assert f"next {action} in 0.2 s" in machine.stops(2)
    assert gone.exists()


@pytest.mark.parametrize(
    ("number", "awaited", "attempts", "code"),
    [
        (signal.SIGINT, ["RETRY LATER", "next  "], 30, 130),
        (signal.SIGTERM, ["RETRY LATER", "next  "], 30, 143),
        (signal.SIGINT, ["next  "], 1, 2),
    ],
)
def test_an_interruption_is_a_failure_or_ends_the_wait(
    machine: Machine, number: signal.Signals, awaited: list[str], attempts: int, code: int
) -> None:
    machine.servers = [NOWHERE]
    gone = machine.folder / "went-off"
    machine.changes |= {
        "retry.attempts": attempts,
        "on_failure.action": "reboot",
        "on_failure.wait_seconds": 3600,
        "on_failure.reboot": ["touch", str(gone)],
    }
    with subprocess.Popen(machine.command("run"), stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        for text in awaited:
            while text not in (line := agent.stderr.readline()):
                assert line, f"it ended before {text}"
            agent.send_signal(number)
        try:
            assert agent.wait(60) == code
        finally:
            agent.kill()  # a test that fails ends, too
    assert gone.exists()


def test_ctrl_c_is_offered_where_it_comes(machine: Machine, require_program: Callable[[str], str]) -> None:
    machine.servers = [NOWHERE]
    machine.changes |= {"retry.attempts": 1, "on_failure.action": "poweroff", "on_failure.wait_seconds": 0}
    machine.changes["on_failure.poweroff"] = ["true"]
    command = machine.command("run")
    terminal = [require_program("script"), "-qec", shlex.join(command), "/dev/null"]
    for how, offered in ((terminal, True), (command, False)):
        done = subprocess.run(
            how, start_new_session=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        said = done.stdout + done.stderr
        assert "next    poweroff in 0 s" in said, said
        assert ("(Ctrl-C: at once)" in said) == offered


def test_a_console_that_went_away_keeps_no_failed_boot_from_its_end(machine: Machine) -> None:
    machine.servers = [NOWHERE]
    gone = machine.folder / "went-off"
    machine.changes |= {
        "retry.attempts": 1,
        "on_failure.action": "poweroff",
        "on_failure.wait_seconds": 0,
        "on_failure.poweroff": ["touch", str(gone)],
    }
    for options, stream in (((), "stderr"), (("--json",), "stdout")):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            with subprocess.Popen(
                machine.command("run", *options),
                stdout=writing if stream == "stdout" else subprocess.DEVNULL,
                stderr=writing if stream == "stderr" else subprocess.DEVNULL,
            ) as agent:
                assert agent.wait(60) != 0
        finally:
            os.close(writing)
        gone.unlink()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("servers = 1\n", "servers: Input should be an array"),
        ("", "servers: Field required"),
        ("bogus\n", "not TOML"),
        ('servers = ["https://a"]\nquoter = "nonsense"\n', 'quoter: say "auto", "tsm"'),
    ],
)
def test_settings_that_are_none(machine: Machine, text: str, told: str) -> None:
    path = machine.folder / "none.toml"
    _ = path.write_text(text)
    for options in (["run"], ["run", "--dry-run"], ["resume"]):
        done = subprocess.run(
            [*PROGRAM, "agent", *options, "--config", path], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"chutes-proto: {path}: ")
        assert told in done.stderr
