"""`simulate` and `openapi`, and what all commands have in common."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dcap_qvl
import pytest

from chutes_proto import __version__
from chutes_proto.cli.main import main
from chutes_proto.testing._faults import FAULTS, Fault
from chutes_proto.testing._gpu_faults import GPU_FAULTS, GpuFault

REPORT_DATA = bytes(range(64))
FILES = {"quote.bin", "collateral.json", "now.txt", "root.der"}


def simulate(tmp_path: Path, *options: str) -> Path:
    out = tmp_path / "out"
    arguments = ["--report-data", REPORT_DATA.hex(), "--out", str(out), "--platform", str(tmp_path / "platform")]
    assert main(["simulate", *arguments, *options]) == 0
    return out


def test_an_independent_verifier_takes_what_is_simulated(tmp_path: Path) -> None:
    out = simulate(tmp_path)
    assert {path.name for path in out.iterdir()} == FILES
    report = dcap_qvl.verify_with_root_ca(
        (out / "quote.bin").read_bytes(),
        dcap_qvl.QuoteCollateralV3.from_json((out / "collateral.json").read_text()),
        (out / "root.der").read_bytes(),
        int((out / "now.txt").read_text()),
    )
    assert report.status == "UpToDate"
    assert REPORT_DATA in (out / "quote.bin").read_bytes()


def test_a_fault_is_in_what_is_simulated(tmp_path: Path) -> None:
    honest = (simulate(tmp_path, "--at", "1780000000") / "quote.bin").read_bytes()
    wrong = (simulate(tmp_path, "--at", "1780000000", "--fault", "debug") / "quote.bin").read_bytes()
    assert honest != wrong
    assert len(honest) == len(wrong)


def test_one_platform_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    first = (simulate(tmp_path) / "root.der").read_bytes()
    assert (simulate(tmp_path) / "root.der").read_bytes() == first
    kept = tmp_path / "platform"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()] == [0o600]


def test_the_platform_is_one_per_user_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arguments = ["simulate", "--report-data", REPORT_DATA.hex(), "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert (tmp_path / "state/chutes-proto/platform/platform.json").is_file()
    for relative in ("", "state"):  # the specification says: a relative path is ignored
        monkeypatch.setenv("XDG_STATE_HOME", relative)
        assert main([*arguments, str(tmp_path / "b")]) == 0
    assert (tmp_path / "home/.local/state/chutes-proto/platform/platform.json").is_file()


def test_those_who_make_the_platform_at_the_same_moment_share_one(tmp_path: Path) -> None:
    def run(number: int) -> int:
        out = str(tmp_path / str(number))
        command = [sys.executable, "-m", "chutes_proto", "simulate", "--report-data", REPORT_DATA.hex()]
        options = ["--out", out, "--platform", str(tmp_path / "platform")]
        return subprocess.run([*command, *options], check=False, stdout=subprocess.DEVNULL).returncode

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(run, range(4))) == [0] * 4
    assert len({(tmp_path / str(number) / "root.der").read_bytes() for number in range(4)}) == 1
    assert [path.name for path in (tmp_path / "platform").iterdir()] == ["platform.json"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate"],
        ["simulate", "--report-data", "00", "--out", "x"],
        ["simulate", "--report-data", "g" * 128, "--out", "x"],
        ["simulate", "--report-data", "٣" * 128, "--out", "x"],
        ["simulate", "--report-data", "00" * 64],
        ["simulate", "--report-data", "00" * 64, "--out", "x", "--at", "tomorrow"],
        ["simulate", "--report-data", "00" * 64, "--out", "x", "--at", "9" * 12],
        ["simulate", "--report-data", "00" * 64, "--out", "x", "--fault", "none_such"],
        ["simulate", "--report-data", "00" * 64, "--out", "nul\0", "--platform", "platform"],
        ["simulate", "--report-data", "00" * 64, "--out", "a_file", "--platform", "platform"],
        ["simulate", "--report-data", "00" * 64, "--out", "x", "--platform", "a_file"],
        ["nonsense"],
        ["--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_one_readable_complaint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _ = Path("a_file").write_bytes(b"")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("chutes-proto")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", bytes(5_000_000)], ids=["empty", "text", "object", "huge"])
def test_a_platform_file_that_is_none_is_named(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "platform.json"
    kept.touch(0o600)
    _ = kept.write_bytes(content)
    arguments = ["--report-data", REPORT_DATA.hex(), "--out", str(tmp_path / "out"), "--platform", str(tmp_path)]
    assert main(["simulate", *arguments]) == 2
    assert str(kept) in capsys.readouterr().err


def test_a_platform_file_that_others_can_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = simulate(tmp_path)
    (tmp_path / "platform/platform.json").chmod(0o644)
    arguments = ["--report-data", REPORT_DATA.hex(), "--out", str(out), "--platform", str(tmp_path / "platform")]
    assert main(["simulate", *arguments]) == 2
    assert f"chmod 600 {tmp_path}/platform/platform.json" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "faults"), [(["simulate"], FAULTS), (["gpu", "simulate"], GPU_FAULTS)])
def test_the_faults_are_listed_as_json(
    words: list[str], faults: Mapping[str, Fault | GpuFault], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {fault.name: fault.what for fault in faults.values()}
    for options in (["--list-faults", "--json"], ["--json", "--list-faults"]):
        assert main([*words, *options]) == 0
        assert json.loads(capsys.readouterr().out) == {"faults": listed}


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"chutes-proto {__version__}\n"


def test_a_reader_who_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "chutes_proto", "simulate", "--list-faults"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_that_knows_ascii_only_is_no_error() -> None:
    command = [sys.executable, "-m", "chutes_proto", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False, env=environment).returncode == 0
