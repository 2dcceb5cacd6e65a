"""``chutes-proto collateral``: fetch it, show it, check until when it verifies, serve simulated one."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, F, Group, answer, at_option, full_option, json_option, one_of, parsed
from chutes_proto.cli.base import platform_option as simulated_option
from chutes_proto.cli.describe import exits
from chutes_proto.cli.verifier.fields import (
    QUOTE_FORMS,
    read_files,
    read_quote_file,
    root_option,
    say_fields,
    trusted_root,
    with_root_hint,
)
from chutes_proto.cli.verifier.simulate import fault_option, simulated_platform
from chutes_proto.collateral.report import described, forecast
from chutes_proto.errors import ConfigurationError, FileUnavailable, QuoteError, TransportError
from chutes_proto.io.files import read_file
from chutes_proto.quote import Collateral, VerifiedCollateral
from chutes_proto.quote._terms import rfc3339
from chutes_proto.quote._verify import authenticate_collateral, open_quote

if TYPE_CHECKING:
    from chutes_proto.collateral.library import Family
    from chutes_proto.log import Record
    from chutes_proto.quote import TrustedRoot

_SECONDS: Final = click.IntRange(0, 999_999_999)
_MARKS: Final[dict[bool, tuple[str, output.State]]] = {True: ("ok", "good"), False: ("NO", "bad")}

command: Group = Group(
    "collateral",
    help="""Fetch, show and check collateral, or serve that of the simulated platform.

    Collateral is everything that Intel signs about a platform: CRLs, TCB info, QE identity. It expires after some
    weeks.

    Examples:
      chutes-proto collateral check collateral --root sim/root.der
      chutes-proto collateral show collateral --root sim/root.der

    See also: verify, serve
    """,
)


def _fmspc(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{12}", text):
        raise ValueError("an FMSPC is 6 bytes, so 12 hex digits")
    return bytes.fromhex(text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError('give "address:port", for example "127.0.0.1:8081"')
    return host.removeprefix("[").removesuffix("]"), int(port)


# --- fetch ---


@command.command(
    "fetch",
    exits=exits(
        "written, or the same as is there",
        "no service has any that verifies and is not older than the valid one there, or the quote's PCK chain does not"
        " verify",
    ),
)
@click.option("--quote", metavar="FILE", help=f"a quote of the platform: {QUOTE_FORMS}")
@click.option("--fmspc", metavar="HEX", callback=parsed(_fmspc), help="the platform's FMSPC, 12 hex digits")
@click.option("--ca", type=click.Choice(("platform", "processor")), help="the CA of its PCK certificate, with --fmspc")
@click.option("--tee", type=click.Choice(("TDX", "SGX")), default="TDX", show_default=True, help="with --fmspc")
@click.option("--upstream", "upstreams", metavar="URL", multiple=True, required=True, help="a service; repeatable")
@click.option("--root-ca-crl", metavar="URL", help="the root CA's CRL, if not among the services' own paths")
@click.option("--ca-file", metavar="PEM", help="CAs to trust for the services' TLS, instead of the system's")
@click.option(
    "--update",
    type=click.Choice(("standard", "early")),
    default="standard",
    show_default=True,
    help="after a TCB recovery was announced: the collateral in force, or already the coming one",
)
@click.option("--out", metavar="DIR", required=True, help="the directory for the file; made if missing")
@root_option
@json_option
def fetch_command(
    quote: str | None,
    fmspc: bytes | None,
    ca: Any,
    tee: Any,
    upstreams: tuple[str, ...],
    root_ca_crl: str | None,
    ca_file: str | None,
    update: Any,
    out: str,
    root: str | None,
) -> int:
    """Fetch collateral into a directory.

    Asks collateral services, in the order given, for the collateral of one platform; verifies it up to Intel's root or
    to --root; and writes one file for all platforms with the same FMSPC, CA and TEE. Older collateral replaces none
    there that still verifies: it may lack a revocation. A server's `collateral = { directory = "…" }` reads such a
    directory, and reloads it when it changes.

    Give the platform by a quote of it, or by --fmspc and --ca.

    Examples:
      chutes-proto collateral fetch --quote quote.bin --upstream https://pccs.example:8081 --out collateral
      chutes-proto collateral fetch --fmspc 00806f050000 --ca platform --out collateral \\
          --upstream https://api.trustedservices.intel.com \\
          --root-ca-crl https://certificates.trustedservices.intel.com/IntelSGXRootCA.der

    See also: collateral show, collateral check, verify
    """
    from chutes_proto.cli.miner.asking import reporting
    from chutes_proto.collateral.cache import GiveUp, fetch, settle
    from chutes_proto.collateral.library import Family
    from chutes_proto.collateral.pcs import Upstream
    from chutes_proto.collateral.platforms import PlatformCache
    from chutes_proto.io.collateral.upstream import FETCH_LIMITS, keep_collateral
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.http.https import HttpGetter
    from chutes_proto.io.http.tls import context_trusting

    trust = trusted_root(root)
    one_of(quote=quote, fmspc=fmspc)
    if (ca is None) != (fmspc is None):
        raise ConfigurationError("--ca goes with --fmspc, and --fmspc with --ca")
    services = [Upstream.parse(url, root_ca_crl) for url in upstreams]
    context = context_trusting(ca_file)
    try:
        family = Family(fmspc, ca, tee) if fmspc is not None else _family(str(quote), trust)
    except QuoteError as exc:
        return _refuse(f"{quote}: {exc}")
    cache = PlatformCache(services, root=trust, update=update)
    file = str(Path(out) / f"{family.name}.json")
    for held in _held(Path(file), trust):
        if Family.of(held) == family:
            _ = cache.take(family, held, int(time.time()))
    problems: list[str] = []

    def note(record: Record) -> None:
        if record.event == "collateral_fetched":
            problems.clear()
        elif "error" in record.fields:
            problems.append(f"{record.fields['upstream']}: {record.fields['error']}")

    performer = Performer(get=reporting(HttpGetter(context, FETCH_LIMITS), _unverified), log=note)
    fetched = performer.run(fetch(cache, family))
    outcome = performer.run(settle(cache, family))
    if isinstance(outcome, GiveUp):
        return _refuse(outcome.reason)
    if fetched is not None:
        file = str(keep_collateral(out, family, fetched))
    elif problems:
        told = f"{file} is left as it is: {'; '.join(problems)}"
        return _refuse(f"{told}; if you want older collateral, as after --update early, move the file away first")
    found = {"file": file, "fmspc": family.fmspc.hex(), "ca": family.ca, "tee": family.tee}
    return answer({"fetched": True, **found}, file)


def _held(file: Path, root: TrustedRoot) -> Iterator[VerifiedCollateral]:
    """The collateral of a file that there may be; one that cannot be used is replaced."""
    with suppress(FileUnavailable, QuoteError):
        for one in Collateral.all_from_json(read_file(file)):
            yield authenticate_collateral(one, root=root)


def _family(quote: str, root: TrustedRoot) -> Family:
    from chutes_proto.collateral.library import Family

    return Family.of(open_quote(read_quote_file(quote), now=int(time.time()), root=root, sgx=True).pck)


def _unverified(reason: str) -> TransportError:
    """The error of a service whose certificate does not verify; other services are still asked."""
    problem = f"its certificate does not verify: {reason}; is its CA the one in --ca-file, and the clock right?"
    return TransportError(problem, maybe_delivered=False)


def _refuse(problem: str) -> int:
    why = with_root_hint(problem)
    console.complain(why)
    return answer({"fetched": False, "reason": why}, "", ok=False)


# --- show and check ---


def _files(function: F) -> F:
    argument = click.argument(
        "paths", cls=Argument, metavar="PATH...", nargs=-1, required=True, help="a file, or a directory of *.json"
    )
    return argument(root_option(json_option(function)))


def _read_all(paths: tuple[str, ...], root: str | None) -> Iterator[tuple[str, VerifiedCollateral | str]]:
    """All files that are named, by name, with their content or why they cannot be used."""
    trust = trusted_root(root)
    for path in paths:
        is_empty = True
        for file, data in read_files(path, ".json"):
            is_empty = False
            if isinstance(data, str):
                yield file, data
                continue
            try:
                found = Collateral.all_from_json(data)
            except QuoteError as exc:
                yield file, with_root_hint(str(exc))
                continue
            for one in found:
                try:
                    yield file, authenticate_collateral(one, root=trust)
                except QuoteError as exc:
                    yield file, with_root_hint(str(exc))
        if is_empty:
            raise ConfigurationError(f"{path}: the directory holds no *.json; fetch some with `collateral fetch`")


@command.command("show", exits=exits("shown", "a file is not collateral, or not the root's"))
@_files
@full_option
def show_command(paths: tuple[str, ...], root: str | None) -> int:
    """Show the content of collateral.

    Verifies who signed it, up to Intel's root or to --root, at whatever time, and shows its content and when each piece
    expires.

    Examples:
      chutes-proto collateral show collateral --root sim/root.der
      chutes-proto collateral show sim/collateral.json --root sim/root.der --json

    See also: collateral check, collateral fetch
    """
    reports = [{"file": name, **described(content)} for name, content in _read_all(paths, root)]

    def people() -> None:
        for report in reports:
            say_fields(report)
            console.say()

    return answer({"files": reports}, people, ok=not any("problem" in report for report in reports))


@command.command("check", exits=exits("all files verify then", "a file does not verify then"))
@_files
@at_option("the time to verify at")
@click.option(
    "--grace",
    metavar="SECONDS",
    type=_SECONDS,
    default=0,
    show_default=True,
    help="a server's grace_seconds: added to the end of everything but certificates",
)
def check_command(paths: tuple[str, ...], root: str | None, at: int | None, grace: int) -> int:
    """Check until when collateral verifies, and which piece expires first.

    Lists for each piece from when to when it is valid (the last second included), and whether all of them verify at
    --at. Verifies who signed it, up to Intel's root or to --root.

    Examples:
      chutes-proto collateral check collateral --root sim/root.der
      chutes-proto collateral check collateral --root sim/root.der --at $(( $(date +%s) + 7 * 86400 )) --json

    See also: collateral show, collateral fetch, serve
    """
    now = int(time.time()) if at is None else at
    reports = [{"file": name, **forecast(content, now, grace)} for name, content in _read_all(paths, root)]

    def people() -> None:
        for report in reports:
            _say_forecast(report, now)

    verifies = bool(reports) and all(report["verifies"] for report in reports)
    return answer({"at": rfc3339(now), "files": reports}, people, ok=verifies)


def _say_forecast(report: dict[str, Any], at: int) -> None:
    if "problem" in report:
        output.prose(f"NO  {report['file']}: cannot be used: {report['problem']}", "bad")
        return
    word = "verifies" if report["verifies"] else "does not verify"
    about = f"FMSPC {report['fmspc']}, {report['ca']} CA, {report['tee']}: {word} at {rfc3339(at)}"
    _say_marked(f"{report['file']}: {about}", report)
    for piece in report["pieces"]:
        _say_marked(f"{piece['piece']:24} {piece['from']} to {piece['until']}", piece, indent="  ")
    until: str = report["verifies_until"]
    if output.draws():
        until += f" ({output.age(console.moment(until))})"
    console.say(f"  all of it verifies until {until}: then {report['first_to_end']} expires")


def _say_marked(text: str, checked: Mapping[str, Any], indent: str = "") -> None:
    mark, state = _MARKS[checked["verifies"]]
    output.prose(f"{indent}{mark}  {text}", state, rest=len(indent) + 4)


# --- serve ---


@command.command("serve", exits=exits("stopped by a signal", "it cannot listen there"))
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:0",
    callback=parsed(_address),
    help="the address (default: a free port of loopback)",
)
@click.option("--tls", metavar="DIR", help="serve https, with a key and CA made in this directory")
@fault_option
@click.option("--age", metavar="SECONDS", type=_SECONDS, default=0, help="serve collateral made so long ago")
@simulated_option
@json_option
def serve_command(
    listen: tuple[str, int], tls: str | None, faults: tuple[str, ...], age: int, platform: str | None
) -> int:
    """Serve simulated collateral, for tests.

    Serves the collateral of the simulated platform at the paths of Intel's PCS, version 4, and of a PCCS, until SIGINT
    or SIGTERM; for tests of tools that fetch collateral. It is under a root that is not Intel's, and made for each
    request. The platform is the one that `serve --dev`, `boot` and `simulate` use. Without --tls it is plain HTTP.
    Prints its URL when it accepts connections.

    Examples:
      chutes-proto collateral serve
      chutes-proto collateral serve --listen 127.0.0.1:8081 --tls tls  # clients trust tls/ca.pem
      chutes-proto collateral serve --fault tcb_info_signature
      chutes-proto collateral serve --age 2592001  # expired

    See also: simulate, collateral fetch
    """
    from chutes_proto.io.collateral.simulated import CollateralServer
    from chutes_proto.testing._service import CollateralService

    now = int(time.time())
    simulated = simulated_platform(platform, now).having(*faults)
    try:
        server = CollateralServer(listen, CollateralService((simulated,)), age=age)
    except OSError as exc:
        console.complain(f"--listen: {listen[0]}:{listen[1]}: {exc.strerror or exc}")
        return console.REFUSED
    with server:
        authority = None if tls is None else str(server.use_tls(tls, now))
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        trusted = "" if authority is None else f"CA certificate: {authority}\n"
        _ = answer(
            {"url": server.url, "fmspc": simulated.fmspc.hex(), "ca_file": authority},
            f"{trusted}SIMULATED collateral of FMSPC {simulated.fmspc.hex()}: {server.url}",
        )
        _ = signal.sigwait(signals)
        server.shutdown()
        _ = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return console.GRANTED
