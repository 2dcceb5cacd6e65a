"""``chutes-proto gpu``: verify the evidence of GPUs, and show it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click
from attrs import evolve

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Decorator, F, Group, answer, at_option, full_option, json_option, parsed
from chutes_proto.cli.describe import exits, wrong_usage
from chutes_proto.cli.verifier.fields import list_faults_option, read_files, say_fields
from chutes_proto.collateral.gpus import OCSP_SERVICE, RIM_SERVICE
from chutes_proto.errors import CollateralUnavailable, ConfigurationError, FileUnavailable
from chutes_proto.gpu import (
    NVIDIA,
    DeviceEvidence,
    DeviceReport,
    EvidenceFormatError,
    EvidenceRefusedError,
    GpuError,
    GpuPolicy,
    GpuRoots,
    Revocation,
    Rims,
    VerifiedRim,
    parse_evidence,
    parse_gpu_policy,
    parse_report,
    verify,
)
from chutes_proto.gpu._plain import claimed_fields, device_fields, rim_fields
from chutes_proto.gpu._rim import authenticate_rim
from chutes_proto.gpu._steps import UntrustedRootError
from chutes_proto.io.collateral.gpu_directory import GpuCollateralDirectory, make_gpu_directory, read_gpu_roots
from chutes_proto.io.files import read_file, write_file
from chutes_proto.quote._errors import spans
from chutes_proto.quote._terms import rfc3339
from chutes_proto.testing import SimulatedGpus
from chutes_proto.testing._gpu_faults import GPU_FAULTS
from chutes_proto.testing._gpus import SIMULATED_SEED, gpu_files

_NONE: Final = "none"
_OFF: Final = "off"

_FETCH: Final = (
    "Fetch RIMs and OCSP answers with `chutes-proto gpu fetch EVIDENCE --out DIR`; they are in DIR/rims and DIR/status."
)
_HINTS: Final = {
    UntrustedRootError.code: "The evidence, or a RIM, is under another root than NVIDIA's, or than that of --roots,"
    " which names others to trust (those of simulated GPUs are beside the evidence that `gpu simulate` writes).",
    **dict.fromkeys(("rim_missing", "status_missing", "status_expired"), _FETCH),
}
"""The remedies of refusals that are not the devices' fault."""

command: Group = Group(
    "gpu",
    help="""Verify the evidence of NVIDIA GPUs, and show it.

    A GPU in confidential computing mode signs a report of its firmware and configuration over a nonce. RIMs are the
    values that NVIDIA publishes for it. OCSP answers say that certificates are not revoked. With these files it needs
    no network.

    Examples:
      chutes-proto gpu verify gpus/evidence.json --rim gpus/rims --revocation gpus/status --roots gpus
      chutes-proto gpu show gpus/evidence.json

    See also: gpu verify, gpu simulate, verify
    """,
)


def _nonce(text: str) -> bytes:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ValueError("a nonce is 32 bytes, so 64 hex digits")
    return bytes.fromhex(text)


evidence_argument: Decorator = click.argument(
    "evidence", cls=Argument, metavar="EVIDENCE", help="the host's JSON list, or with --chain one report"
)
chain_option: Decorator = click.option(
    "--chain", metavar="PEM", help="the device's certificates: EVIDENCE is one report"
)


def _shared(function: F) -> F:
    return evidence_argument(chain_option(function))


def _devices(path: str, chain: str | None) -> tuple[DeviceEvidence, ...]:
    """The devices' evidence in a file. Raises `EvidenceFormatError`, `FileUnavailable`."""
    data = read_file(path)
    if chain is None:
        return parse_evidence(data)
    _ = parse_report(data)
    return (DeviceEvidence(data, read_file(chain)),)


def _unreadable(path: str, problem: GpuError) -> ConfigurationError:
    return ConfigurationError(f"{path}: {problem}")


# --- verify ---


@command.command("verify", exits=exits("accepted", "refused"))
@_shared
@click.argument("more_rims", cls=Argument, metavar="[RIM...]", nargs=-1, help="more RIMs, after --rim and its first")
@click.option("--nonce", metavar="HEX", callback=parsed(_nonce), help="32 bytes that every report must be over")
@click.option(
    "--rim",
    "rim_paths",
    metavar="FILE|DIR",
    multiple=True,
    help='NVIDIA\'s RIMs: a file, or a directory of them; repeatable; "none" compares no measurements, and says so',
)
@click.option(
    "--revocation",
    "status_path",
    metavar="DIR|off",
    help='a directory of OCSP answers and CRLs in DER; "off" demands no answers, and says so',
)
@click.option(
    "--grace",
    metavar="SECONDS",
    type=click.IntRange(0, 999_999_999),
    default=0,
    help="accept OCSP answers that ended so long ago (default: none)",
)
@click.option(
    "--count",
    metavar="N",
    type=click.IntRange(0, 64),
    help="how many GPUs there must be (default: at least one); 0 for switches alone",
)
@click.option("--policy", "policy_file", metavar="FILE", help="a policy in TOML: versions, modes, models, revocation")
@click.option("--roots", metavar="DIR", help="roots to trust instead of NVIDIA's: device-root.der and rim-root.der")
@at_option("the time to verify at")
@json_option
@full_option
def verify_command(
    evidence: str,
    chain: str | None,
    nonce: bytes | None,
    more_rims: tuple[str, ...],
    rim_paths: tuple[str, ...],
    status_path: str | None,
    grace: int,
    count: int | None,
    policy_file: str | None,
    roots: str | None,
    at: int | None,
) -> int:
    """Verify the evidence of a machine's GPUs.

    Verifies each device's certificates up to NVIDIA's root, firmware digest, report and nonce; the RIMs with their
    signatures; that no certificate is revoked; and compares all measurements. Every one that differs is shown. Needs no
    network. Exit code 2 also stands for evidence that cannot be read.

    Examples:
      chutes-proto gpu verify gpus/evidence.json --nonce $(cat gpus/nonce.txt) --rim gpus/rims \\
          --revocation gpus/status --roots gpus
      chutes-proto gpu verify gpus/evidence.json --rim none --revocation off --roots gpus --json

    See also: gpu show, gpu simulate, verify
    """
    now = int(time.time()) if at is None else at
    if more_rims and not rim_paths:
        raise ConfigurationError(f"{more_rims[0]}: a RIM goes after --rim; the evidence is one file")
    rim_paths += more_rims
    trust = NVIDIA if roots is None else read_gpu_roots(roots)
    policy = _policy(policy_file, rim_paths, status_path, grace)
    rims, rim_reports = _rims(rim_paths, trust)
    revocation, problems = _revocation(status_path)
    try:
        devices = _devices(evidence, chain)
    except EvidenceFormatError as exc:
        raise _unreadable(evidence, exc) from None
    error: GpuError | None = None
    reports: tuple[DeviceReport, ...]
    try:
        reports = verify(
            devices,
            nonce=nonce,
            now=now,
            rims=rims,
            revocation=revocation,
            policy=policy,
            count=count,
            roots=trust,
        ).devices
    except EvidenceRefusedError as exc:
        reports, error = exc.devices, exc.error
    report: dict[str, Any] = {
        "accepted": error is None,
        "at": now,
        "nonce": "checked" if nonce is not None else "unchecked",
        "measurements": "compared" if policy.measurements == "rims" else "unchecked",
        "revocation": {"require": "checked", "grace": "checked", "off": "unchecked"}[policy.revocation],
        "code": None if error is None else error.code,
        "error": None if error is None else str(error),
        "hint": None if error is None else _HINTS.get(error.code),
        "gpus": [device_fields(one) for one in reports],
        "rims": rim_reports,
        "unreadable": problems,
    }
    return answer(report, lambda: _say(report), ok=error is None)


def _policy(path: str | None, rims: tuple[str, ...], status: str | None, grace: int) -> GpuPolicy:
    try:
        policy = GpuPolicy() if path is None else parse_gpu_policy(read_file(path))
    except GpuError as exc:
        raise ConfigurationError(f"--policy: {path}: {exc}") from None
    if _NONE in rims:
        policy = evolve(policy, measurements="unchecked")
    if status == _OFF:
        return evolve(policy, revocation="off", revocation_grace=0)
    return policy if not grace else evolve(policy, revocation="grace", revocation_grace=grace)


def _rims(paths: tuple[str, ...], roots: GpuRoots) -> tuple[Rims, list[dict[str, Any]]]:
    """The RIMs that their signers signed, at whatever time, and a report on every file."""
    found: list[VerifiedRim] = []
    reports: list[dict[str, Any]] = []
    for file, data in (one for path in paths if path != _NONE for one in read_files(path)):
        if isinstance(data, str):
            reports.append({"file": file, "code": None, "error": data})
            continue
        try:
            rim = authenticate_rim(data, roots=roots)
        except GpuError as exc:
            reports.append({"file": file, "code": exc.code, "error": str(exc)})
        else:
            found.append(rim)
            reports.append({"file": file, **rim_fields(rim)})
    return Rims.of(found), reports


def _revocation(path: str | None) -> tuple[Revocation, list[str]]:
    """The OCSP answers and CRLs of a directory, and the files that are neither."""
    pieces: list[bytes] = []
    problems: list[str] = []
    for file, data in () if path is None or path == _OFF else read_files(path):
        if isinstance(data, str):
            problems.append(f"{file}: {data}")
            continue
        try:
            _ = Revocation.of([data])
        except GpuError as exc:
            problems.append(f"{file}: {exc}")
        else:
            pieces.append(data)
    return Revocation.of(pieces), problems


def _say(report: dict[str, Any]) -> None:
    output.prose(
        "ACCEPTED: the evidence verifies" if report["accepted"] else "REFUSED: the evidence is not acceptable",
        "good" if report["accepted"] else "bad",
    )
    if report["error"]:
        output.prose(f"{report['code']}: {report['error']}")
    if report["hint"]:
        output.prose(report["hint"])
    for name, text in (
        ("nonce", "The nonce was not compared with anything: use --nonce, or the evidence may be of any time."),
        ("measurements", "Measurements were not compared with anything: use --rim with NVIDIA's RIMs."),
        ("revocation", "Revocation was not checked: use --revocation with a directory of OCSP answers."),
    ):
        if report[name] == "unchecked":
            output.prose(text)
    for one in report["rims"]:
        if "error" in one:
            output.prose(f"{one['file']}: cannot be used: {one['error']}", "bad")
    for problem in report["unreadable"]:
        output.prose(f"cannot be used: {problem}", "bad")
    for number, one in enumerate(report["gpus"]):
        console.say()
        state = "refused" if one["error"] else "accepted"
        output.prose(f"device {number}: {state}", "bad" if one["error"] else "good")
        mismatches = one["mismatches"]
        shown = {name: value for name, value in one.items() if name not in ("mismatches", "steps")}
        say_fields({"steps": spans(one["steps"]), **shown})
        for mismatch in mismatches:
            others = {None: "", True: ", as on all other GPUs", False: ", unlike on other GPUs"}[mismatch["shared"]]
            output.prose(f"index {mismatch['index']} ({mismatch['source']}){others}:", "bad")
            output.prose(f"  found    {mismatch['found'] or 'nothing'}")
            for value in mismatch["expected"]:
                output.prose(f"  expected {value}")
            if mismatch["hint"]:
                output.prose(f"  {mismatch['hint']}")


# --- show ---


@command.command("show", exits=exits("shown", "a device's evidence cannot be read"))
@_shared
@json_option
@full_option
def show_command(evidence: str, chain: str | None) -> int:
    """Show the content of GPU evidence without verifying it.

    Shows the report of each device, its serial number, and the ids by which NVIDIA's service knows its RIMs.

    Examples:
      chutes-proto gpu show gpus/evidence.json

    See also: gpu verify
    """
    try:
        devices = _devices(evidence, chain)
    except EvidenceFormatError as exc:
        raise _unreadable(evidence, exc) from None
    found = [_shown(one) for one in devices]

    def people() -> None:
        for number, one in enumerate(found):
            output.prose(f"device {number}")
            say_fields({name: value for name, value in one.items() if name != "measurements"})
            console.say()

    return answer({"verified": False, "gpus": found}, people, ok=not any("error" in one for one in found))


def _shown(evidence: DeviceEvidence) -> dict[str, Any]:
    try:
        return claimed_fields(evidence)
    except GpuError as exc:
        return {"code": exc.code, "error": str(exc)}


# --- fetch and check ---


def _hint(problems: Iterable[str]) -> str | None:
    """The remedy where a root is not trusted: services and directories keep only the words of an error."""
    is_untrusted = any(UntrustedRootError.rule in problem for problem in problems)
    return _HINTS[UntrustedRootError.code] if is_untrusted else None


@command.command(
    "fetch", exits=exits("all of it was fetched", "something is missing, or older than the valid one that is kept")
)
@_shared
@click.option("--out", metavar="DIR", required=True, help="the directory for the files; made if missing")
@click.option("--rim-service", metavar="URL", default=RIM_SERVICE, show_default=True, help="the RIM service")
@click.option("--ocsp-service", metavar="URL", default=OCSP_SERVICE, show_default=True, help="the OCSP service")
@click.option("--ca-file", metavar="PEM", help="CAs to trust for the services' TLS, instead of the system's")
@click.option("--roots", metavar="DIR", help="roots to trust instead of NVIDIA's: device-root.der and rim-root.der")
@json_option
def fetch_command(
    evidence: str,
    chain: str | None,
    out: str,
    rim_service: str,
    ocsp_service: str,
    ca_file: str | None,
    roots: str | None,
) -> int:
    """Fetch the RIMs and OCSP answers for GPU evidence.

    Verifies each device's chain and report, asks NVIDIA's services for everything that the evidence is verified with,
    verifies the answers, and writes them below DIR, into rims and status: a directory for `gpu verify` and for a
    server's `gpu_evidence.directory`. An older answer replaces none there that is still valid, and a revocation stays.
    OCSP answers end after a day.

    Examples:
      chutes-proto gpu fetch gpus/evidence.json --roots gpus --out fetched
      chutes-proto gpu fetch gpus/evidence.json --roots gpus --out fetched --rim-service https://rims.example --json

    See also: gpu verify, gpu check
    """
    from chutes_proto.collateral.gpus import GpuService, RimCache, StatusCache, fetch_gpu_collateral
    from chutes_proto.io.collateral.gpu_services import keep_piece
    from chutes_proto.io.collateral.upstream import FETCH_LIMITS
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.http.https import HttpGetter
    from chutes_proto.io.http.tls import context_trusting

    trust = NVIDIA if roots is None else read_gpu_roots(roots)
    try:
        devices = _devices(evidence, chain)
    except EvidenceFormatError as exc:
        raise _unreadable(evidence, exc) from None
    rims, status = (GpuService.parse(url) for url in (rim_service, ocsp_service))
    performer = Performer(get=HttpGetter(context_trusting(ca_file), FETCH_LIMITS), log=lambda _: None)
    flow = fetch_gpu_collateral(
        devices,
        RimCache([rims], roots=trust),
        StatusCache([status]),
        now=int(time.time()),
        roots=trust,
        kept=lambda key: _kept(Path(out) / key.file),
    )
    fetched = performer.run(flow)
    files = [str(keep_piece(Path(out), key, data)) for key, data in fetched.pieces.items()]
    hint = _hint(fetched.problems)
    return answer(
        {"fetched": not fetched.problems, "files": files, "problems": fetched.problems, "hint": hint},
        lambda: _say_fetched(files, fetched.problems, hint),
        ok=not fetched.problems,
    )


def _kept(file: Path) -> bytes | None:
    """A piece that was fetched before; one that cannot be read is replaced."""
    with suppress(FileUnavailable):
        return read_file(file)
    return None


def _say_fetched(files: list[str], problems: list[str], hint: str | None) -> None:
    for file in files:
        console.say(file)
    for problem in (*problems, *([] if hint is None else [hint])):
        console.complain(problem)


@command.command("check", exits=exits("all of it is valid then", "something is not valid then, or cannot be used"))
@click.argument("directory", cls=Argument, metavar="DIR", help="a directory with rims and status in it")
@click.option("--roots", metavar="DIR", help="roots to trust instead of NVIDIA's: device-root.der and rim-root.der")
@at_option("the time to check at")
@json_option
@full_option
def check_command(directory: str, roots: str | None, at: int | None) -> int:
    """Check until when RIMs and OCSP answers can be used, and which ends first.

    RIM signers' certificates end after two years, and OCSP answers after a day.

    Examples:
      chutes-proto gpu check gpus --roots gpus
      chutes-proto gpu check gpus --roots gpus --at $(( $(date +%s) + 3600 )) --json

    See also: gpu fetch, gpu verify
    """
    now = int(time.time()) if at is None else at
    source = GpuCollateralDirectory(directory, NVIDIA if roots is None else read_gpu_roots(roots))
    try:
        found = source.fetch()
    except CollateralUnavailable as exc:
        raise ConfigurationError(str(exc)) from None
    pieces = [(str(rim), *rim.window) for rim in found.rims.rims]
    pieces += [
        (f"OCSP answer about {one.about.serial.hex()}", one.this_update, one.next_update)
        for ocsp in found.revocation.answers
        for one in ocsp.answers
    ]
    pieces.sort(key=lambda piece: piece[2])
    told = [
        {"piece": name, "from": rfc3339(begin), "until": rfc3339(end), "valid": begin <= now <= end}
        for name, begin, end in pieces
    ]
    is_valid = bool(told) and all(one["valid"] for one in told) and not source.problems
    hint = _hint(source.problems)

    def people() -> None:
        for one in told:
            mark, state = ("ok", "") if one["valid"] else ("NO", "bad")
            output.prose(f"{mark}  {one['piece']}: {one['from']} to {one['until']}", state)  # type: ignore[arg-type]
        for problem in source.problems:
            output.prose(f"cannot be used: {problem}", "bad")
        if hint is not None:
            output.prose(hint)

    report = {"valid": is_valid, "at": rfc3339(now), "pieces": told, "problems": [*source.problems], "hint": hint}
    return answer(report, people, ok=is_valid)


# --- simulate ---


def _fault(name: str) -> str:
    if name not in GPU_FAULTS:
        raise ValueError(f"{name!r} is not the name of a fault; `chutes-proto gpu simulate --list-faults` lists them")
    return name


@command.command("simulate", exits={0: "written", 2: wrong_usage("files that cannot be written")})
@click.option(
    "--nonce", metavar="HEX", required=True, callback=parsed(_nonce), help="32 bytes for the reports to be over"
)
@click.option("--out", metavar="DIR", required=True, help="the directory for the files; made if missing")
@click.option("--count", metavar="N", type=click.IntRange(1, 16), default=2, show_default=True, help="how many GPUs")
@click.option(
    "--arch", type=click.Choice(("HOPPER", "BLACKWELL")), default="HOPPER", show_default=True, help="their kind"
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="NAME",
    callback=parsed(_fault),
    help="make the first device, or the RIMs, wrong in this way; repeatable",
)
@list_faults_option({fault.name: fault.what for fault in GPU_FAULTS.values()})
@at_option("the time at which RIMs and OCSP answers are made")
@json_option
def simulate_command(nonce: bytes, out: str, count: int, arch: Any, faults: tuple[str, ...], at: int | None) -> int:
    """Make the evidence of simulated GPUs, with RIMs and OCSP answers.

    Writes evidence.json, nonce.txt, the directories rims and status, and the roots device-root.der and rim-root.der,
    which are not NVIDIA's: for tests of your own tools.

    Examples:
      chutes-proto gpu simulate --nonce $(printf %064d 0) --out gpus
      chutes-proto gpu simulate --nonce $(printf %064d 0) --out wrong --fault measurement
      chutes-proto gpu verify gpus/evidence.json --rim gpus/rims --revocation gpus/status --roots gpus

    See also: gpu verify, simulate
    """
    now = int(time.time()) if at is None else at
    simulated = SimulatedGpus(SIMULATED_SEED, count=count, arch=arch).having(*faults)
    directory = make_gpu_directory(out)
    files = {str(directory / name): data for name, data in gpu_files(simulated, nonce, now).items()}
    for name, data in files.items():
        write_file(name, data)
    return answer({"files": [*files], "at": rfc3339(now)}, "\n".join(files))
