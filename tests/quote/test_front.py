"""The public package: its names, that they are imported late, and the one call that decides."""

from __future__ import annotations

import inspect
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import attrs
import pytest

from chutes_proto import quote
from chutes_proto.errors import FileUnavailable
from chutes_proto.quote import (
    AcceptedVerdict,
    AppraisalError,
    Collateral,
    CollateralFormatError,
    Policy,
    PolicyError,
    QuoteError,
    QuoteFormatError,
    TcbPolicy,
    VerificationError,
    verify,
)
from tests.conftest import ROOT as PROJECT
from tests.quote.logs import event as event_of
from tests.quote.logs import log
from tests.quote.simulated import NOW, PLATFORM, PROFILE, REPORT_DATA, ROOT, collateral_of

POLICY = Policy(profiles=(PROFILE,))

# --- names ---


def test_the_package_is_used_alone_with_the_modules_that_the_documentation_names(tmp_path: Path) -> None:
    page = (PROJECT / "docs" / "reference" / "verification.md").read_text("utf-8")
    (named,) = re.findall(r"The package can be copied and used alone, with ([^;]*);", page)
    source, copy = PROJECT / "src" / "chutes_proto", tmp_path / "chutes_proto"
    _ = shutil.copytree(source / "quote", copy / "quote")
    _ = (copy / "__init__.py").write_text("")
    for name in re.findall("`(.*?)`", named):
        _ = shutil.copy(source / name, copy)
    text = "from chutes_proto.quote import *; parse_policy_toml('')"
    _ = subprocess.run([sys.executable, "-c", text], check=True, env={"PYTHONPATH": str(tmp_path)})


def test_importing_the_package_imports_nothing_else() -> None:
    text = "import sys; old = {*sys.modules}; import chutes_proto.quote; print(*{*sys.modules} - old)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=True, text=True, env={})
    of_project = {name for name in done.stdout.split() if name.startswith("chutes_proto")}
    assert of_project == {"chutes_proto", "chutes_proto._error", "chutes_proto._lazy", "chutes_proto.quote"}
    assert {"attrs", "cryptography", "msgspec"}.isdisjoint(done.stdout.split())


# --- verify ---


def _verify(data: bytes, collateral: Collateral, **options: Any) -> AcceptedVerdict:
    usual: dict[str, Any] = {"now": NOW, "report_data": REPORT_DATA, "policy": POLICY, "root": ROOT}
    return verify(data, collateral, **usual | options)


def test_what_the_policy_accepts_is_returned() -> None:
    verdict = _verify(PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM))
    assert (verdict.profile, verdict.stage, verdict.tcb_status) == (PROFILE, "boot", "UpToDate")
    assert verdict.quote.body.report_data == REPORT_DATA
    runtime = PLATFORM.quote(REPORT_DATA, stage="runtime")
    assert _verify(runtime, collateral_of(PLATFORM), stage="runtime").stage == "runtime"


@pytest.mark.parametrize(
    ("fault", "step", "code", "got", "expected"),
    [
        ("truncated_body", 0, "quote_too_short", 548, "at least 632"),
        ("version", 0, "quote_version", 6, "4 or 5"),
        ("auth_trailing", 0, "quote_structure", None, None),
        ("cert_type", 2, "certification_type", 4, 5),
        ("tcb_revoked", 36, "tcb_revoked", None, None),
        ("tcb_out_of_date", 38, "tcb_status", "OutOfDate", "UpToDate"),
        ("migratable", 38, "migratable", "0x0000000030000000", "bit 29 clear"),
        ("rtmr1", 38, "measurement_mismatch", None, PROFILE.boot[1].hex()),
    ],
)
def test_every_refusal_is_one_error_with_its_step(fault: str, step: int, code: str, got: Any, expected: Any) -> None:
    platform = PLATFORM.having(fault)
    quote_bytes = platform.quote(REPORT_DATA)
    with pytest.raises(VerificationError) as caught:
        _ = _verify(quote_bytes, collateral_of(platform))
    exc = caught.value
    if fault == "rtmr1":
        got = quote.parse_quote(quote_bytes).body.rtmrs[1].hex()  # type: ignore[union-attr]
    assert (exc.step, exc.code, exc.got, exc.expected) == (step, code, got, expected)
    assert isinstance(exc, AppraisalError) == (step == 38)
    assert isinstance(exc, QuoteFormatError) == (step == 0)


def test_report_data_and_policy_must_be_said() -> None:
    parameters = inspect.signature(verify).parameters
    for name in ("now", "report_data", "policy"):
        assert (parameters[name].kind, parameters[name].default) == (inspect.Parameter.KEYWORD_ONLY, inspect._empty)
    data, collateral = PLATFORM.quote(REPORT_DATA), collateral_of(PLATFORM)
    with pytest.raises(VerificationError, match="report data"):
        _ = _verify(data, collateral, report_data=bytes(64))
    assert _verify(data, collateral, report_data=None).steps[-1] == 36
    for wrong in (None, "policy.toml", SimpleNamespace(appraise=lambda verdict, stage: verdict)):
        with pytest.raises(TypeError, match=r"policy: must be a Policy, AllOf or AnyOf, as of Policy\.load"):
            _ = _verify(data, collateral, policy=wrong)
    with pytest.raises(TypeError, match=r"as of Collateral\.load"):
        _ = _verify(data, "collateral.json")  # type: ignore[arg-type]


# --- arguments of another type ---

READERS: dict[str, tuple[Any, str]] = {
    "parse_quote": (quote.parse_quote, "the bytes of a quote"),
    "Collateral.from_json": (Collateral.from_json, "the bytes or text of a collateral file"),
    "Collateral.all_from_json": (Collateral.all_from_json, "the bytes or text of a collateral file"),
    "parse_policy_toml": (quote.parse_policy_toml, "the bytes or text of a TOML file"),
    "parse_profiles_toml": (quote.parse_profiles_toml, "the bytes or text of a TOML file"),
    "parse_profiles_json": (quote.parse_profiles_json, "the bytes or text of a JSON file"),
    "parse_event_log": (quote.parse_event_log, "the bytes of an event log"),
    "parse_event_log_json": (quote.parse_event_log_json, "the bytes or text of an event log"),
    "TrustedRoot.from_der": (quote.TrustedRoot.from_der, "the bytes of a certificate in DER"),
    "read_evidence": (quote.read_evidence, "the bytes of a certificate in DER"),
    "evidence_for": (quote.evidence_for, "the bytes of a public key in DER"),
}
"""What reads bytes, and what it says that they must be."""


@pytest.mark.parametrize(("read", "must"), READERS.values(), ids=READERS)
def test_what_is_read_must_be_bytes(read: Any, must: str) -> None:
    for wrong in cast("tuple[Any, ...]", (None, 5, [1, 2], {}, Path("quote.bin"), "text")):
        if isinstance(wrong, str) and "text" in must:
            continue
        with pytest.raises(TypeError, match=rf"^\w+: must be {must}, not {type(wrong).__name__}$"):
            read(wrong)


def test_whatever_holds_the_bytes_is_read_as_they_are_then() -> None:
    """What was verified does not change with the buffer that it came from."""
    root = quote.TrustedRoot.from_der(PLATFORM.root_der)
    assert [quote.TrustedRoot.from_der(kind(PLATFORM.root_der)) for kind in (bytearray, memoryview)] == [root, root]
    assert Collateral.from_json(memoryview(PLATFORM.collateral_json(NOW))) == collateral_of(PLATFORM)
    event = quote.parse_event_log(bytearray(log(event_of(1, 4, b"x")))).events[0]
    assert (type(event.digest), type(event.data)) == (bytes, bytes)


def test_each_piece_of_collateral_is_bytes() -> None:
    collateral: Any = collateral_of(PLATFORM)
    for name in [piece.name for piece in attrs.fields(Collateral)]:
        piece = getattr(collateral, name) or b""
        for wrong in cast("tuple[Any, ...]", (piece.hex(), bytearray(piece), memoryview(piece), {})):
            with pytest.raises(TypeError, match=rf"^{name}: must be bytes, not {type(wrong).__name__}$"):
                _ = attrs.evolve(collateral, **{name: wrong})


# --- files ---


@pytest.mark.parametrize("kind", [str, Path])
def test_collateral_and_policies_are_loaded_from_files(tmp_path: Path, kind: Any) -> None:
    collateral, policy = tmp_path / "collateral.json", tmp_path / "policy.toml"
    _ = collateral.write_bytes(PLATFORM.collateral_json(NOW))
    _ = policy.write_text(f'[tcb]\naccepted_statuses = ["UpToDate", "OutOfDate"]\n{PROFILE.to_toml()}')
    assert Collateral.load(kind(collateral)) == collateral_of(PLATFORM)
    accepting = TcbPolicy(accepted_statuses=frozenset({quote.TcbStatus.UP_TO_DATE, quote.TcbStatus.OUT_OF_DATE}))
    assert Policy.load(kind(policy)) == Policy(tcb=accepting, profiles=(PROFILE,))


@pytest.mark.parametrize(
    ("load", "error"),
    [(Collateral.load, CollateralFormatError), (Policy.load, PolicyError)],
    ids=["collateral", "policy"],
)
def test_a_file_that_cannot_be_loaded_is_named(tmp_path: Path, load: Any, error: type[QuoteError]) -> None:
    bad = tmp_path / "bad"
    with pytest.raises(FileUnavailable, match=re.escape(str(bad))):
        load(bad)
    _ = bad.write_bytes(b'unknown_key = "value"')
    with pytest.raises(error, match=re.escape(f"{bad}: ")):
        load(bad)


# --- examples ---


def test_the_example_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.time", lambda: NOW)
    main = runpy.run_path(str(PROJECT / "examples" / "verify_quote.py"))["main"]

    def run(*faults: str) -> object:
        platform = PLATFORM.having(*faults)
        for name, data in (
            ("quote.bin", platform.quote(REPORT_DATA)),
            ("collateral.json", platform.collateral_json(NOW)),
            ("policy.toml", PROFILE.to_toml().encode()),
            ("root.der", platform.root_der),
        ):
            _ = (tmp_path / name).write_bytes(data)
        files = [tmp_path / name for name in ("quote.bin", "collateral.json", "policy.toml")]
        return main(*files, REPORT_DATA.hex(), tmp_path / "root.der")

    assert run() == 0
    assert capsys.readouterr().out == f"accepted: simulated, MRTD {PROFILE.mrtd.hex()}, TCB UpToDate\n"
    assert run("tcb_out_of_date") == "refused: tcb_status (step 38, got OutOfDate, expected UpToDate)"


def test_the_example_tests_pass() -> None:
    examples = sorted(path.relative_to(PROJECT) for path in (PROJECT / "examples").glob("test_*.py"))
    assert [path.name for path in examples] == ["test_confidential_service.py", "test_with_quotes.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, examples)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
