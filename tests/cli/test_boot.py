"""`boot` against a server in a process of its own: grants, refusals, and no answer at all."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chutes_proto.cli import console
from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.io.server.development import write_server
from chutes_proto.wire.codes import Code
from tests.cli.conftest import HOTKEY, Ended, Server, start_server

Command = Callable[..., Ended]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("platform")


@pytest.fixture(scope="module")
def server(platform: Path) -> Iterator[Server]:
    started = start_server("--dev", "--platform", platform)
    yield started
    assert started.stop(signal.SIGTERM).code == 0


@pytest.fixture
def boot(command: Command, server: Server, platform: Path) -> Command:
    """Boots a VM of its own name, with more options; an option that is given twice counts the second time."""

    def run(*options: object, vm: str = "vm-1", url: str = server.url) -> Ended:
        common = ["--ca", server.ca, "--hotkey", HOTKEY, "--vm", vm, "--platform", platform, "--wait", 0]
        return command("boot", url, *common, *options)

    return run


def test_a_boot_receives_its_passphrases_and_shows_none(boot: Command, tmp_path: Path) -> None:
    received = [tmp_path / "first", tmp_path / "second"]
    said = [boot("--keys", keys, *json) for keys, json in zip(received, ([], ["--json"]), strict=True)]
    assert [ended.code for ended in said] == [0, 0]
    passphrases = [{path.name: path.read_text() for path in keys.iterdir()} for keys in received]
    assert passphrases[0] == passphrases[1]
    assert passphrases[0].keys() == {"root", "storage", "tdx-cache"}
    assert len({*passphrases[0].values()}) == 3
    assert [oct(keys.stat().st_mode)[-3:] for keys in received] == ["700", "700"]
    for passphrase in passphrases[0].values():
        assert len(passphrase) == 128
        assert not any(passphrase in ended.out + ended.err for ended in said)
    assert "root passphrase received, 128 characters" in said[0].out
    assert said[0].err.splitlines()[:4] == [
        f"{step} (attempt 1/1)" for step in ("nonce", "quote", "attestation", "sync")
    ]
    assert said[1].json == {
        "granted": True,
        "hotkey": HOTKEY,
        "vm": "vm-1",
        "exchange": "base",
        "root_passphrase_length": 128,
        "volumes": {name: {"passphrase_length": 128, "in_use": False} for name in ("storage", "tdx-cache")},
    }


def test_the_volumes_are_those_that_are_asked_for(boot: Command) -> None:
    assert [*boot("--volumes", "tdx-cache", "--json", vm="vm-2").json["volumes"]] == ["tdx-cache"]


def test_a_refusal_is_1_with_code_and_request_id(boot: Command) -> None:
    ended = boot("--volumes", "storage,other", "--json")
    assert ended.code == 1
    said = ended.json
    assert (said["granted"], said["status"], said["code"]) == (False, 400, "volume_unknown")
    assert len(said["request_id"]) == 32
    lines = boot("--volumes", "storage,other")
    assert lines.code == 1
    assert "400 volume_unknown" in lines.out
    assert f"volume_unknown: {Code.VOLUME_UNKNOWN.meaning}\n" in lines.out
    assert "the server's log has the reason under request" in lines.out


def quoter(tmp_path: Path, platform: Path, *options: str) -> str:
    """A command that quotes as `simulate` does."""
    script = tmp_path / "quoter"
    _ = script.write_text(
        f"#!/bin/sh\nset -e\n{sys.executable} -m chutes_proto simulate --platform {platform} {' '.join(options)}"
        f' --report-data "$(cat)" --out {tmp_path}/out >&2\ncat {tmp_path}/out/quote.bin\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_command_makes_the_quote(boot: Command, tmp_path: Path, platform: Path) -> None:
    assert boot("--quoter", quoter(tmp_path, platform)).code == 0
    refused = boot("--quoter", quoter(tmp_path, platform, "--fault", "rtmr2"))
    assert refused.code == 1
    assert "(RTMR2) (403 measurement_mismatch" in refused.out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--quoter", "false"], "the quote command false ended with exit status 1"),
        (["--quoter", "no-such-program"], "cannot be run: No such file"),
        (["--quoter", ""], "the quote command: it names no program"),
        (["--quoter", "'"], "No closing quotation"),
        (["--volumes", "a,,b"], "is not a volume's name"),
        (["--volumes", "../up"], "is not a volume's name"),
        (["--volumes", "root"], "is not a volume's name"),
        (["--volumes", "a.next,a", "--keys", "keys"], "--keys: a.next is the file of another key, too"),
        (["--volumes", "root.second", "--keys", "keys"], "--keys: root.second is the file of another key, too"),
        (["--vm", "a/b"], "a VM's name is 1 to 128 of the characters"),
        (["--hotkey", "a b"], "has a character that is not base58"),
        (["--hotkey", HOTKEY[:-1] + "Z", "--wait", 30], "the address's checksum does not match"),
        (["--wait", "-1"], "--wait: 0 to 86400 seconds"),
        (["--wait", "nan"], "--wait: 0 to 86400 seconds"),
        (["--ca", "/nowhere"], "/nowhere: cannot be read"),
        (["--ca", "/dev/null"], "/dev/null: not one or more PEM certificates"),
        (["--ca", "/dev/zero"], "/dev/zero: has more than"),
        (["--keys", "/dev/null"], "/dev/null: cannot be made"),
    ],
    ids=str,
)
def test_wrong_usage_and_no_quote_are_2(boot: Command, options: list[str], told: str) -> None:
    ended = boot(*options)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "https://127.0.0.1:1/path", "ftp://x", "x", "https://a@b"])
def test_a_url_that_is_none_is_2(boot: Command, url: str) -> None:
    ended = boot(url=url)
    assert (ended.code, ended.out) == (2, "")
    assert "URL" in ended.err


def test_no_answer_is_2_and_says_what_to_look_at(boot: Command, command: Command, server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"https://127.0.0.1:{nobody.getsockname()[1]}"
    ended = boot(url=url)
    assert ended.code == 2
    assert f"no answer from {url}" in ended.err
    ended = command("boot", server.url, "--hotkey", HOTKEY, "--vm", "vm-1", "--wait", 0)
    assert ended.code == 2
    assert f"the certificate of {server.url} does not verify: " in ended.err
    assert "is its CA the one in --ca, and the clock right?" in ended.err


def test_a_server_that_does_not_verify_is_not_tried_again(command: Command, server: Server, platform: Path) -> None:
    options = ["--hotkey", HOTKEY, "--vm", "vm-1", "--platform", platform, "--wait", 3600]
    ended = command("boot", server.url, *options)
    assert ended.code == 2
    assert ended.err.splitlines()[0] == "nonce (attempt 1/8)"
    assert "does not verify" in ended.err.splitlines()[1]


def test_it_tries_again_while_it_may(boot: Command) -> None:
    ended = boot("--wait", "1.2", url="https://127.0.0.1:1")
    assert ended.code == 2
    assert "nonce failed: no connection to 127.0.0.1:1: Connection refused" in ended.err
    assert "nonce (attempt 2/8)" in ended.err


def test_a_peers_text_cannot_steer_the_terminal() -> None:
    assert console.clean("a\x1b[2Jb\r\n\u202ec\x85 é") == r"a\x1b[2Jb\r\n\u202ec\x85 é"


def test_the_two_phase_exchange_confirms_nothing(command: Command, tmp_path: Path, platform: Path) -> None:
    """The keys stay as they are: every boot is handed the same two."""
    site = tmp_path / "site"
    site.mkdir()
    write_server(site, open_platform(platform, int(time.time())).platform, int(time.time()))
    configuration = site / "server.toml"
    text = configuration.read_text().replace("[profile_defaults]", '[profile_defaults]\nexchange = "two-phase"')
    _ = configuration.write_text(f"rotate_after_hours = 0\n{text}")
    server = start_server("--config", configuration, ca=site / "ca.pem")
    common = ["boot", server.url, "--ca", server.ca, "--hotkey", HOTKEY, "--vm", "vm-1", "--platform", platform]
    handed: list[dict[str, str]] = []
    said: list[Ended] = []
    for number, json in enumerate(([], [], ["--json"])):
        keys = tmp_path / f"keys-{number}"
        said.append(command(*common, "--keys", keys, *json))
        handed.append({path.name: path.read_text() for path in keys.iterdir()})
    assert server.stop(signal.SIGTERM).code == 0
    assert [ended.code for ended in said] == [0, 0, 0]
    first, *later = handed
    assert first.keys() == {"root", "storage", "tdx-cache"}
    assert later[0] == later[1]
    assert later[0] == {**first, "storage.next": later[0]["storage.next"], "tdx-cache.next": later[0]["tdx-cache.next"]}
    assert len({*later[0].values()}) == 5
    assert "storage: passphrase received, 128 characters, and the next one; not known to be in use" in said[1].out
    assert "nothing is confirmed" in said[1].out
    assert said[2].json["exchange"] == "two-phase"
    assert not [key for key in later[0].values() for ended in said if key in ended.out + ended.err]
