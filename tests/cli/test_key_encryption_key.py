"""A wrong key-encryption key: no server starts, a running one answers "retry later", and no key is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from chutes_proto.io.quoters.simulated import open_platform
from chutes_proto.io.server.development import write_server
from tests.cli.conftest import HOTKEY, Ended, Server
from tests.waiting import wait_until

Command = Callable[..., Ended]
Start = Callable[..., Server]
KEY = bytes(range(200, 232))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    directory = tmp_path / "site"
    directory.mkdir()
    now = int(time.time())
    write_server(directory, open_platform(tmp_path / "platform", now).platform, now)
    return directory


def put(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    _ = path.write_bytes(content)
    path.chmod(0o600)


def name(site: Path, line: str, old: str = 'kek_file = "kek"') -> None:
    configuration = site / "server.toml"
    text = configuration.read_text()
    assert old in text
    _ = configuration.write_text(text.replace(old, line))


def boot(command: Command, server: Server, site: Path, vm: str, keys: Path) -> Ended:
    platform = site.parent / "platform"
    words = ["boot", server.url, "--ca", server.ca, "--hotkey", HOTKEY, "--vm", vm, "--platform", platform]
    return command(*words, "--keys", keys, "--wait", 0)


def rows(path: Path) -> list[str]:
    """All that is in the file and in its log, which workers that end at the same time leave behind."""
    with closing(sqlite3.connect(path)) as connection:
        return [*connection.iterdump()]


def passphrases(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- at the start ---


def _directory(site: Path) -> None:
    (site / "kek").unlink()
    (site / "kek").mkdir(mode=0o700)


def _loop(site: Path) -> None:
    (site / "kek").unlink()
    (site / "kek").symlink_to("kek")


def _dangling(site: Path) -> None:
    (site / "kek").unlink()
    (site / "kek").symlink_to("none")


def _open_behind_a_link(site: Path) -> None:
    put(site / "real", KEY)
    (site / "real").chmod(0o644)
    (site / "kek").unlink()
    (site / "kek").symlink_to("real")


def _copied(site: Path) -> None:
    _ = shutil.copy(site / "kek", site / "copy")
    name(site, 'kek_file = "kek"\nkek_previous_file = "copy"')


def _previous(content: bytes | None) -> Callable[[Path], None]:
    def change(site: Path) -> None:
        name(site, 'kek_file = "kek"\nkek_previous_file = "old"')
        if content is not None:
            put(site / "old", content)

    return change


def _content(content: bytes) -> Callable[[Path], None]:
    return lambda site: put(site / "kek", content)


def _mode(mode: int) -> Callable[[Path], None]:
    return lambda site: (site / "kek").chmod(mode)


WRONG = {
    "missing": (
        lambda site: (site / "kek").unlink(),
        "kek: cannot be read: No such file or directory; get it back from its backup: a new",
    ),
    "directory": (_directory, "kek: cannot be read: Is a directory"),
    "loop": (_loop, "kek: cannot be read: not a plain file, but a link or a loop of links"),
    "dangling": (_dangling, "kek: cannot be read: No such file"),
    "link": (_open_behind_a_link, "permissions are 0644, which is too open"),
    "empty": (_content(b""), "32 raw bytes or 64 hex digits; this one has 0 bytes"),
    "31": (_content(KEY[:31]), "this one has 31 bytes"),
    "33": (_content(KEY + b"\n"), "this one has 33 bytes"),
    "63": (_content(KEY.hex().encode()[:63]), "this one has 63 bytes"),
    "long": (_content(bytes(5 * 1024 * 1024)), "kek: has more than 4194304 bytes"),
    "base64": (_content(b"yMnKy8zNzs/Q0dLT1NXW19jZ2tvc3d7f4OHi4+Tl5uc="), "this one has 44 bytes"),
    "world": (_mode(0o604), "permissions are 0604, which is too open"),
    "group": (_mode(0o640), "permissions are 0640, which is too open"),
    "twice": (_copied, "kek_previous_file: "),
    "previous missing": (_previous(None), "old: cannot be read: No such file"),
    "previous short": (_previous(KEY[:16]), "old: a key-encryption key is"),
    "the same": (lambda site: name(site, 'kek_file = "kek"\nkek_previous_file = "kek"'), "the same file as kek_file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_no_command_starts_with_it(command: Command, site: Path, case: str) -> None:
    change, told = WRONG[case]
    change(site)
    before = sorted(site.iterdir())
    for words in (["serve"], ["serve", "--check"], ["store", "check"], ["store", "init"], ["keys", "rewrap"]):
        ended = command(*words, "--config", site / "server.toml")
        assert ended.code in (1, 2)
        assert told in ended.err, ended.err
        assert KEY.hex()[:16] not in ended.err
    assert sorted(site.iterdir()) == before


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n"])
def test_both_forms_are_one_key(command: Command, site: Path, content: bytes) -> None:
    put(site / "kek", KEY)
    put(site / "old", content)
    name(site, 'kek_file = "kek"\nkek_previous_file = "old"')
    assert "holds the same key as kek_file" in command("serve", "--config", site / "server.toml", "--check").err


def test_a_credential_of_the_service_manager(
    command: Command, site: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "credentials"
    given.mkdir(mode=0o700)
    put(given / "kek", KEY)
    (given / "kek").chmod(0o440)  # how systemd leaves it
    (site / "kek").unlink()
    name(site, f'kek_file = "{given}/kek"')
    config = ("--config", site / "server.toml")
    assert "which is too open" in command("serve", *config, "--check").err
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    server = start(*config, ca=site / "ca.pem")
    assert boot(command, server, site, "vm-1", tmp_path / "keys").code == 0
    assert server.stop(signal.SIGTERM).code == 0
    (given / "kek").unlink()
    told = command("serve", *config, "--check").err
    assert told.strip().endswith("No such file or directory; give the unit a line LoadCredential=kek:FILE"), told


# --- while a server runs ---


@pytest.mark.parametrize("workers", [(), ("--workers", 2)], ids=["one", "workers"])
def test_a_server_that_lacks_a_rows_key_answers_503_until_a_reload_and_nothing_is_lost(
    command: Command, site: Path, start: Start, tmp_path: Path, workers: tuple[object, ...]
) -> None:
    config = ("--config", site / "server.toml")
    name(site, 'control = "control"\nkek_file = "kek"')
    server = start(*config, *workers, ca=site / "ca.pem")
    assert boot(command, server, site, "vm-1", tmp_path / "before").code == 0
    # the running server has read its key: that the file changes, or goes, does not matter to it
    old = (site / "kek").read_bytes()
    (site / "kek").unlink()
    assert boot(command, server, site, "vm-1", tmp_path / "again").code == 0
    assert passphrases(tmp_path / "again") == passphrases(tmp_path / "before")
    # an operator takes the steps in the wrong order: the rows are wrapped under a key that this server does not have
    put(site / "kek", KEY)
    put(site / "old", old)
    name(site, 'kek_file = "kek"\nkek_previous_file = "old"')
    assert command("keys", "rewrap", *config).code == 0
    refused = boot(command, server, site, "vm-1", tmp_path / "refused")
    assert (refused.code, "503 store_unavailable" in refused.out) == (1, True), refused
    # it does not take a KEK that opens none of them
    put(site / "kek", os.urandom(32))
    lacks = command("reload", *config)
    assert (lacks.code, "key-encryption key (KEK)" in lacks.err) == (1, True), lacks
    # with the right keys everything is there
    put(site / "kek", KEY)
    assert command("reload", *config).out.startswith("reloaded KEK\n")
    # it looks at the store once a second
    wait_until(lambda: boot(command, server, site, "vm-1", tmp_path / "after").code == 0)
    assert passphrases(tmp_path / "after") == passphrases(tmp_path / "before")
    assert command("store", "check", *config).code == 0
    ended = server.stop(signal.SIGTERM)
    assert re.search(r"sealed under key-encryption key .*; if you rotated it, reload .*, or restart it", ended.err)
    # and with a stranger's key no server starts, and no key is made in the place of another
    put(site / "kek", os.urandom(32))
    put(site / "old", os.urandom(32))
    kept = rows(site / "keys.db")
    for words in (["serve"], ["serve", "--check"], ["store", "check"], ["keys", "rewrap"]):
        ended = command(*words, *config)
        assert (ended.code, "key-encryption key" in ended.err) == (1, True), words
    assert rows(site / "keys.db") == kept
