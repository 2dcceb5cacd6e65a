"""``collateral``: fetch, show, check and serve, as an operator uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chutes_proto.io.files import write_file
from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._verify import verify_collateral
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from tests.cli.conftest import PROGRAM, Ended, end

Command = Callable[..., Ended]
MADE = 1_800_000_000  # 2027-01-15T08:00:00Z


@pytest.fixture
def platform(no_home: Path) -> SimulatedPlatform:
    return open_platform(no_home / "chutes-proto" / "platform", MADE).platform


@pytest.fixture
def root(platform: SimulatedPlatform, tmp_path: Path) -> Path:
    write_file(tmp_path / "root.der", platform.root_der)
    return tmp_path / "root.der"


@pytest.fixture
def collected(platform: SimulatedPlatform, tmp_path: Path) -> Path:
    (tmp_path / "collected").mkdir()
    write_file(tmp_path / "collected" / "a.json", platform.collateral_json(MADE))
    return tmp_path / "collected"


@pytest.fixture
def serve(no_home: Path) -> Iterator[Callable[..., tuple[str, subprocess.Popen[str]]]]:
    """Starts ``collateral serve``; gives its URL."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object) -> tuple[str, subprocess.Popen[str]]:
        command = [*PROGRAM, "collateral", "serve", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        while True:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            if line.startswith("SIMULATED"):
                return line.split()[-1], process

    yield run
    for process in started:
        end(process)


def test_fetched_shown_checked_and_served_until_a_signal(
    command: Command, serve: Any, platform: SimulatedPlatform, root: Path, tmp_path: Path
) -> None:
    url, process = serve()
    write_file(tmp_path / "quote.bin", platform.quote(bytes(64)))
    out = tmp_path / "out"
    ended = command(
        "collateral", "fetch", "--quote", tmp_path / "quote.bin", "--upstream", url, "--root", root, "--out", out
    )
    assert (ended.code, ended.err) == (0, "")
    (file,) = out.iterdir()
    assert ended.out == f"{file}\n"
    assert file.name == f"{platform.fmspc.hex()}-platform-tdx.json"
    verified = verify_collateral(Collateral.from_json(file.read_bytes()), now=int(time.time()), root=platform.root)
    assert verified.fmspc == platform.fmspc
    ended = command("verify", tmp_path / "quote.bin", "--collateral", file, "--root", root)
    assert ended.code == 0
    assert command("collateral", "check", out, "--root", root).code == 0
    ended = command(
        "collateral", "fetch", "--fmspc", platform.fmspc.hex().upper(), "--ca", "processor", "--upstream", url,
        "--root-ca-crl", f"{url}/IntelSGXRootCA.der", "--update", "early", "--root", root, "--out", out, "--json",
    )  # fmt: skip
    assert (ended.code, len(list(out.iterdir()))) == (0, 2)
    wanted = {"fetched": True, "fmspc": platform.fmspc.hex(), "ca": "processor", "tee": "TDX"}
    assert ended.json == wanted | {"file": str(next(path for path in out.iterdir() if path != file))}
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


def test_older_collateral_replaces_none_that_verifies(
    command: Command, serve: Any, platform: SimulatedPlatform, root: Path, tmp_path: Path
) -> None:
    """A service that is old, or that somebody speaks for, would take a revocation back."""
    (older, _), (newer, _) = serve("--age", 2_000_000), serve()
    write_file(tmp_path / "quote.bin", platform.quote(bytes(64)))
    words = ("collateral", "fetch", "--quote", tmp_path / "quote.bin", "--root", root, "--out", tmp_path / "out")
    assert command(*words, "--upstream", older).code == 0
    (file,) = (tmp_path / "out").iterdir()
    before = file.read_bytes()
    assert command(*words, "--upstream", newer).code == 0
    kept = file.read_bytes()
    assert kept != before
    ended = command(*words, "--upstream", older)
    assert (ended.code, file.read_bytes()) == (1, kept)
    said = " ".join(ended.err.split())
    assert f"{file} is left as it is: {older}: it is older than the cached collateral; if you want older" in said
    assert command(*words, "--upstream", older, "--upstream", newer).code == 0
    _ = file.write_text("damaged")
    assert (command(*words, "--upstream", older).code, file.read_bytes() != kept) == (0, True)


def test_a_file_of_a_directory_that_cannot_be_read_hides_no_other(
    command: Command, collected: Path, root: Path
) -> None:
    with (collected / "b.json").open("wb") as file:
        _ = file.truncate(1 << 30)
    for words in (("check", "--at", MADE), ("show",)):
        ended = command("collateral", *words, collected, "--root", root, "--json")
        first, second = ended.json["files"]
        assert (ended.code, "problem" in first) == (1, False)
        assert second["problem"].startswith("has more than")
    assert command("collateral", "check", collected / "b.json", "--root", root).code == 2


def test_fetch_tells_why_there_is_none(
    command: Command, serve: Any, platform: SimulatedPlatform, root: Path, tmp_path: Path
) -> None:
    url, _ = serve("--age", COLLATERAL_SECONDS + 60)
    fetch = ("collateral", "fetch", "--ca", "platform", "--root", root, "--out", tmp_path / "out", "--upstream", url)
    ended = command(*fetch, "--fmspc", platform.fmspc.hex())
    assert ended.code == 1
    assert "it expired at" in ended.err
    ended = command(*fetch, "--fmspc", "00806f050000", "--upstream", "http://127.0.0.1:1")
    assert ended.code == 1
    assert f"{url}: TCB info: status 404; http://127.0.0.1:1: no connection" in ended.err
    assert not (tmp_path / "out").exists()
    url, _ = serve("--fault", "tcb_info_signature")
    ended = command(*fetch[:-1], url, "--fmspc", platform.fmspc.hex())
    assert (ended.code, "did not sign it" in ended.err) == (1, True)
    ended = command(*fetch[:-1], url, "--fmspc", platform.fmspc.hex(), "--json")
    assert (ended.json["fetched"], "did not sign it" in ended.json["reason"]) == (False, True)
    ended = command(*fetch[:4], "--out", tmp_path / "out", "--upstream", url, "--fmspc", platform.fmspc.hex())
    assert (ended.code, "root certificate" in ended.err) == (1, True)  # simulated is not Intel's
    assert ended.err.count("--root, which names one to trust") == 1


def test_fetch_over_tls(command: Command, serve: Any, platform: SimulatedPlatform, root: Path, tmp_path: Path) -> None:
    url, _ = serve("--tls", tmp_path / "tls")
    assert url.startswith("https://127.0.0.1:")
    assert (tmp_path / "tls" / "server.pem").stat().st_mode & 0o777 == 0o600
    fetch = (
        "collateral",
        "fetch",
        "--fmspc",
        platform.fmspc.hex(),
        "--ca",
        "platform",
        "--root",
        root,
        "--upstream",
        url,
    )
    ended = command(*fetch, "--out", tmp_path / "out")
    assert ended.code == 1
    assert f"{url}: its certificate does not verify: " in ended.err
    assert "is its CA the one in --ca-file, and the clock right?" in ended.err
    assert "_ssl.c" not in ended.err
    assert command(*fetch, "--out", tmp_path / "out", "--ca-file", tmp_path / "tls" / "ca.pem").code == 0


def test_a_quote_whose_chain_does_not_verify_asks_nobody(command: Command, root: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "quote.bin", SimulatedPlatform(b"another world" * 3).quote(bytes(64)))
    fetch = ("collateral", "fetch", "--upstream", "http://127.0.0.1:1", "--root", root, "--out", tmp_path / "out")
    ended = command(*fetch, "--quote", tmp_path / "quote.bin")
    assert (ended.code, "root certificate" in ended.err, "Connect" in ended.err) == (1, True, False)
    assert ended.err.count("--root, which names one to trust") == 1
    write_file(tmp_path / "quote.bin", b"no quote")
    assert command(*fetch, "--quote", tmp_path / "quote.bin").code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("fetch", "--fmspc", "00", "--ca", "platform", "--upstream", "https://h", "--out", "d"),
        ("fetch", "--fmspc", "00806f050000", "--upstream", "https://h", "--out", "d"),
        ("fetch", "--fmspc", "00806f050000", "--ca", "platform", "--upstream", "http://192.0.2.1", "--out", "d"),
        ("fetch", "--fmspc", "00806f050000", "--ca", "platform", "--upstream", "https://u:p@h", "--out", "d"),
        ("fetch", "--quote", "nowhere", "--upstream", "https://h", "--out", "d"),
        ("check", "nowhere"),
        ("check", "nowhere", "--at", "tomorrow"),
        ("check", "nowhere", "--at", "2027-02-30"),
        ("show",),
        ("serve", "--listen", "8081"),
        ("serve", "--fault", "none of these"),
        (),
    ],
)
def test_usage(command: Command, arguments: tuple[str, ...]) -> None:
    ended = command("collateral", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err


def test_serve_where_it_cannot_listen(command: Command, serve: Any) -> None:
    url, _ = serve()
    ended = command("collateral", "serve", "--listen", url.removeprefix("http://"))
    assert ended.code == 1
    assert "--listen: 127.0.0.1" in ended.err


# --- what stops verifying, and when ---

END = "2027-02-14T08:00:00Z"


def test_check_tells_of_each_piece(command: Command, collected: Path, root: Path, platform: SimulatedPlatform) -> None:
    ended = command("collateral", "check", collected, "--root", root, "--at", "2027-03-01")
    lines = ended.out.splitlines()
    about = f"FMSPC {platform.fmspc.hex()}, platform CA, TDX"
    assert lines[0] == f"NO  {collected}/a.json: {about}: does not verify at 2027-03-01T00:00:00Z"
    assert f"  NO  TCB info                 2027-01-15T08:00:00Z to {END}" in lines
    assert any(line.startswith("  ok  PCK CA certificate") for line in lines)
    assert lines[-1] == f"  all of it verifies until {END}: then PCK CRL expires"
    ended = command(
        "collateral", "check", collected, "--root", root, "--at", "2027-03-01", "--grace", 20 * 86400, "--json"
    )
    assert ended.code == 0
    assert ended.json["files"][0]["verifies_until"] == "2027-03-06T08:00:00Z"


def test_check_agrees_with_the_verifier(
    command: Command, collected: Path, root: Path, platform: SimulatedPlatform
) -> None:
    write_file(collected / "quote.bin", platform.quote(bytes(64)))
    for at in (MADE - 1, MADE, MADE + COLLATERAL_SECONDS, MADE + COLLATERAL_SECONDS + 1):
        verdict = command(
            "verify", collected / "quote.bin", "--collateral", collected / "a.json", "--root", root, "--at", at
        ).code
        assert command("collateral", "check", collected, "--root", root, "--at", at).code == verdict


def test_files_of_no_use(command: Command, collected: Path, root: Path, tmp_path: Path) -> None:
    write_file(collected / "b.json", b"{}")
    for action in ("show", "check"):
        ended = command("collateral", action, collected, "--root", root, "--json")
        assert ended.code == 1
        assert "is missing" in ended.json["files"][1]["problem"]
        assert "is missing" in command("collateral", action, collected, "--root", root).out
        ended = command("collateral", action, collected / "a.json")  # simulated is not Intel's
        assert (ended.code, "--root, which names one to trust" in ended.out) == (1, True)
        assert command("collateral", action, tmp_path, "--root", root).code == 2  # no *.json


def test_show(command: Command, collected: Path, root: Path, platform: SimulatedPlatform) -> None:
    (shown,) = command("collateral", "show", collected / "a.json", "--root", root, "--json").json["files"]
    assert (shown["fmspc"], shown["ca"], shown["tee"]) == (platform.fmspc.hex(), "platform", "TDX")
    assert (shown["revoked_by_root"], shown["revoked_pcks"]) == (0, 1)
    assert any(level.startswith("UpToDate of 20") for level in shown["tcb_levels"])
    assert (shown["valid_from"], shown["valid_until"]) == ("2027-01-15T08:00:00Z", END)
    of_intel = {"root CRL": END, "PCK CRL": END, "TCB info": END, "QE identity": END}
    of_ca = dict.fromkeys(("root certificate", "PCK CA certificate", "TCB signing certificate"), "2049-12-31T23:59:59Z")
    assert shown["ends"] == of_ca | of_intel
    said = command("collateral", "show", collected, "--root", root).out
    assert platform.fmspc.hex() in said
    assert f"ends.TCB info              {END}" in said


# --- a server ---


def test_a_server_with_upstreams(
    command: Command, serve: Any, start: Any, platform: SimulatedPlatform, tmp_path: Path
) -> None:
    from chutes_proto.io.server.development import AUTHORITY, CONFIGURATION, write_server

    service, process = serve()
    directory = tmp_path / "server"
    directory.mkdir()
    write_server(directory, platform, int(time.time()))
    text = (directory / CONFIGURATION).read_text("utf-8")
    options = f'{{ upstreams = ["{service}"], cache = "kept" }}'
    write_file(directory / CONFIGURATION, text.replace('{ directory = "collateral" }', options).encode())
    ended = command("serve", "--config", directory / CONFIGURATION, "--check")
    assert (ended.code, f"collateral: from {service}" in ended.out) == (0, True)
    assert not (directory / "kept").exists()

    def boot(server: Any, vm: str, *more: str) -> subprocess.CompletedProcess[str]:
        command_line = [*PROGRAM, "boot", server.url, "--ca", str(server.ca), "--hotkey"]
        command_line += ["5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY", "--vm", vm, *more]
        return subprocess.run(command_line, capture_output=True, text=True, timeout=60, env=os.environ, check=False)

    server = start("--config", directory / CONFIGURATION, ca=directory / AUTHORITY)
    assert boot(server, "vm-1").returncode == 0
    process.send_signal(signal.SIGTERM)
    _ = process.communicate(timeout=60)
    assert boot(server, "vm-1").returncode == 0  # an outage with a warm cache
    log = server.stop(signal.SIGTERM).err
    assert json.loads(next(line for line in log.splitlines() if "collateral_fetched" in line))["fmspc"] == (
        platform.fmspc.hex()
    )
    server = start("--config", directory / CONFIGURATION, ca=directory / AUTHORITY)
    assert boot(server, "vm-1").returncode == 0  # an outage, after a restart
    _ = server.stop(signal.SIGTERM)
