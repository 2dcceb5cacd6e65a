"""Files appear whole, secrets stay private, and a directory of collateral follows its files."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from chutes_proto.collateral.library import Item
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable
from chutes_proto.io.collateral.directory import CollateralDirectory
from chutes_proto.io.files import read_file, read_lines, read_private, reason, write_file
from chutes_proto.quote._collateral import VerifiedCollateral
from chutes_proto.quote._pck import PckIdentity
from chutes_proto.quote._roots import TrustedRoot
from chutes_proto.quote._verify import open_quote, verify_collateral
from chutes_proto.testing._platform import COLLATERAL_SECONDS, SimulatedPlatform
from tests.quote.platform_files import pcs_client_file

NOW = 1_780_000_000
PLATFORM = SimulatedPlatform(bytes(32))
ROOT = TrustedRoot.from_der(PLATFORM.root_der)


def identity(platform: SimulatedPlatform = PLATFORM) -> PckIdentity:
    return open_quote(platform.quote(bytes(64)), now=NOW, root=ROOT).pck


# --- single files ---


def test_a_file_appears_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content in (b"first", b"second"):
        write_file(path, content, mode=0o600)
        assert read_private(path) == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["secret"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileUnavailable, match="taken: cannot be written"):
        write_file(tmp_path / "taken", b"content")
    with pytest.raises(FileUnavailable, match="cannot be written: No such file"):
        write_file(tmp_path / "missing/file", b"content")
    assert [found.name for found in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_permissions_that_are_too_open_are_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_file(path, b"content")
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"0{mode:o}.*chmod 600 {path}"):
        _ = read_private(path)


def test_a_credential_of_the_service_manager_may_be_its_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kek"
    write_file(path, b"content")
    path.chmod(0o440)  # how an access list for one user looks
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_private(path) == b"content"
    path.chmod(0o444)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        _ = read_private(path)


def test_a_credential_that_the_unit_does_not_name_is_missed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file beside the configuration is in its place, so nobody has to get it back from anywhere."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "given"))
    for read in (read_file, read_private):
        with pytest.raises(FileUnavailable, match=r"No such file .*; give the unit a line LoadCredential=new:FILE$"):
            _ = read(tmp_path / "given" / "new")
        with pytest.raises(FileUnavailable, match=r"No such file or directory$"):
            _ = read(tmp_path / "new")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file"), ("nul\0", "null")):
        for read in (read_file, read_private):
            with pytest.raises(FileUnavailable, match=why):
                _ = read(path)


def test_a_number_is_no_path() -> None:
    """`open` takes it for a file descriptor, and closes that: an event loop's, or standard output."""
    descriptor = os.open("/dev/null", os.O_RDONLY)
    number: Any = descriptor
    for read in (read_file, read_private, lambda path: list(read_lines(path, limit=9))):
        with pytest.raises(TypeError, match="not int"):
            _ = read(number)
    os.close(descriptor)


def test_a_file_that_this_user_may_not_read_says_which_user(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_file(path, b"content", mode=0o000)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read everything
    try:
        for read in (read_file, read_private):
            with pytest.raises(FileUnavailable, match=rf"Permission denied to .*uid {os.geteuid()}.*; give that user"):
                _ = read(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["a\nb: c", "a\u2028b", "a\x1b[1m", "\udcff"])
def test_a_name_that_is_not_printable_is_quoted(name: str, tmp_path: Path) -> None:
    """It would end the line of the error, and begin one of its own."""
    path = tmp_path / name
    with pytest.raises(FileUnavailable) as caught:
        _ = read_file(path)
    assert str(caught.value) == f"{str(path)!r}: cannot be read: No such file or directory"
    assert reason(caught.value, path) == "cannot be read: No such file or directory"


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(FileUnavailable, match="/dev/zero: has more than 100 bytes"):
        _ = read_file("/dev/zero", limit=100)


# --- collateral ---


@pytest.fixture
def directory(tmp_path: Path) -> CollateralDirectory:
    write_file(tmp_path / "a.json", PLATFORM.collateral_json(NOW))
    return CollateralDirectory(tmp_path, ROOT)


def test_files_come_change_and_go(directory: CollateralDirectory) -> None:
    other = PLATFORM.another(1)
    first = directory.fetch(identity(), NOW)
    assert directory.fetch(identity(), NOW) is first
    with pytest.raises(CollateralUnavailable):
        _ = directory.fetch(identity(other), NOW)
    write_file(directory.path / "b.json", other.collateral_json(NOW))
    assert directory.fetch(identity(other), NOW).fmspc == other.fmspc
    assert directory.fetch(identity(), NOW) is first
    write_file(directory.path / "a.json", PLATFORM.collateral_json(NOW - 5))
    assert directory.fetch(identity(), NOW).window[1] == NOW - 5 + COLLATERAL_SECONDS
    (directory.path / "a.json").unlink()
    with pytest.raises(CollateralUnavailable):
        _ = directory.fetch(identity(), NOW)


def test_collateral_is_available_in_the_same_second(directory: CollateralDirectory) -> None:
    assert directory.available(identity(), NOW) is None
    found = directory.fetch(identity(), NOW)
    (directory.path / "a.json").unlink()
    assert directory.available(identity(), NOW) is found
    assert directory.available(identity(PLATFORM.another(1)), NOW) is None
    assert directory.available(identity(), NOW + 1) is None
    with pytest.raises(CollateralUnavailable):
        _ = directory.fetch(identity(), NOW)
    assert directory.available(identity(), NOW) is None


def test_a_file_is_verified_once(directory: CollateralDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: object, **settings: object) -> VerifiedCollateral:
        calls.append(1)
        return verify_collateral(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("chutes_proto.io.collateral.directory.verify_collateral", counted)
    threads = [threading.Thread(target=directory.fetch, args=(identity(), NOW + n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_expired_collateral_is_missing_whenever_it_was_read(directory: CollateralDirectory) -> None:
    late = NOW + COLLATERAL_SECONDS + 1
    with pytest.raises(CollateralUnavailable, match=r"a\.json: unusable: .*expired"):
        _ = CollateralDirectory(directory.path, ROOT).fetch(identity(), late)
    _ = directory.fetch(identity(), NOW)
    with pytest.raises(CollateralUnavailable, match=r"a\.json: FMSPC .* valid "):
        _ = directory.fetch(identity(), late)


def test_collateral_that_is_not_valid_yet_is_read_again(directory: CollateralDirectory) -> None:
    with pytest.raises(CollateralUnavailable, match=r"not yet valid; is the time right\?"):
        _ = directory.fetch(identity(), NOW - 10)
    with pytest.raises(CollateralUnavailable):
        _ = directory.fetch(identity(), NOW)
    assert directory.fetch(identity(), NOW - 10 + directory.AGAIN_AFTER).fmspc == PLATFORM.fmspc


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "unusable"),
        (b"\xff\xfe", "unusable"),
        (b"[]", "not a JSON object"),
        (b"{}", "is missing"),
        (b"[" * 100_000, "unusable"),
        (bytes(5_000_000), "more than"),
        (PLATFORM.having("tcb_info_signature").collateral_json(NOW), "TCB info"),
        (SimulatedPlatform(bytes(31) + b"1").collateral_json(NOW), "root"),
    ],
    ids=["empty", "binary", "list", "object", "deep", "huge", "unsigned", "another root's"],
)
def test_a_file_of_no_use_is_named_and_harms_no_other(directory: CollateralDirectory, content: bytes, why: str) -> None:
    write_file(directory.path / "b.json", content)
    assert directory.fetch(identity(), NOW).fmspc == PLATFORM.fmspc
    with pytest.raises(CollateralUnavailable, match=rf"b\.json: unusable: .*{why}|{why}") as caught:
        _ = directory.fetch(identity(PLATFORM.another(1)), NOW)
    assert str(caught.value).count("b.json") == 1


def test_other_files_and_unreadable_ones(directory: CollateralDirectory) -> None:
    write_file(directory.path / ".hidden.json", b"")
    write_file(directory.path / "README", b"")
    (directory.path / "b.json").mkdir()
    (directory.path / "c.json").symlink_to("nowhere")
    os.link(directory.path / "a.json", directory.path / "d.json")
    os.mkfifo(directory.path / "e.json")
    found = {Path(item.name).name: item.content for item in directory.items(NOW)}
    assert list(found) == ["a.json", "b.json", "c.json", "d.json", "e.json"]
    assert "No such file" in str(found["c.json"])
    for name in ("b.json", "e.json"):
        assert "not a plain file" in str(found[name])


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollateralUnavailable, match=f"{tmp_path}/none: No such file"):
        _ = CollateralDirectory(tmp_path / "none", ROOT).fetch(identity(), NOW)


def test_a_file_of_intels_tool_counts_for_every_platform_in_it(tmp_path: Path) -> None:
    other = SimulatedPlatform(PLATFORM.seed, index=1, ca="processor")
    file = pcs_client_file(PLATFORM, other, now=NOW)
    _ = (tmp_path / "platform_collaterals.json").write_text(json.dumps(file))
    directory = CollateralDirectory(tmp_path, ROOT)
    for platform in (PLATFORM, other):
        found = directory.fetch(identity(platform), NOW)
        assert (found.fmspc, found.ca, found.tee) == (platform.fmspc, platform.ca, "TDX")
    assert len(directory.items(NOW)) == 4  # each TCB info under both CAs
    file["collaterals"]["tcbinfos"][1]["tdx_tcbinfo"]["signature"] = "00" * 64
    _ = (tmp_path / "platform_collaterals.json").write_text(json.dumps(file))
    assert directory.fetch(identity(), NOW).fmspc == PLATFORM.fmspc
    with pytest.raises(CollateralUnavailable, match=r"platform_collaterals\.json"):
        _ = directory.fetch(identity(other), NOW)
    _ = (tmp_path / "platform_collaterals.json").write_text('{"collaterals": {}}')
    with pytest.raises(CollateralUnavailable, match="certificates is missing"):
        _ = directory.fetch(identity(), NOW)
    file["collaterals"]["tcbinfos"] = []  # as in a file of early ones alone
    _ = (tmp_path / "platform_collaterals.json").write_text(json.dumps(file))
    with pytest.raises(CollateralUnavailable, match=r"platform_collaterals\.json: unusable: it has no standard TCB"):
        _ = directory.fetch(identity(), NOW)


def test_one_machines_chain_beside_the_collateral_does_not_bind_the_others(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", PLATFORM.having("pck_chain_other").collateral_json(NOW))
    assert CollateralDirectory(tmp_path, ROOT).fetch(identity(), NOW).pck_chain is None


def test_items_show_an_operator_the_content(directory: CollateralDirectory) -> None:
    (item,) = directory.items(NOW)
    assert str(item) == (
        f"{directory.path}/a.json: FMSPC {PLATFORM.fmspc.hex()}, platform CA, TDX,"
        " valid 2026-05-28T20:26:40Z to 2026-06-27T20:26:40Z"
    )
    assert str(evolve(item, content="why")) == f"{directory.path}/a.json: unusable: why"
    assert isinstance(item, Item)
