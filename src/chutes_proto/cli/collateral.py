"""``chutes-proto collateral``: fetch what Intel signs about platforms, look at it, forecast its end, simulate it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chutes_proto.cli import console
from chutes_proto.quote._terms import rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chutes_proto.collateral.library import Family
    from chutes_proto.errors import TransportError
    from chutes_proto.quote._collateral import VerifiedCollateral
    from chutes_proto.quote._roots import TrustedRoot
    from chutes_proto.quote._terms import Term

NAME = "collateral"

_EXAMPLES = """
chutes-proto collateral fetch --quote quote.bin --upstream https://pccs.example:8081 --out collateral
chutes-proto collateral show collateral
chutes-proto collateral check collateral --at 2030-01-31
chutes-proto collateral serve --listen 127.0.0.1:8081
"""


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "fetch collateral, look at it, forecast its end, or serve simulated",
        "Collateral is all that Intel signs about a platform: CRLs, TCB info, QE identity. It ends after some weeks.",
        _EXAMPLES,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for add_action, action in ((_add_fetch, _fetch), (_add_show, _show), (_add_check, _check), (_add_serve, _serve)):
        add_action(actions).set_defaults(action=action)
    return parser


def run(options: argparse.Namespace) -> int:
    code: int = options.action(options)
    return code


# --- fetch ---


def _add_fetch(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        "fetch",
        "fetch collateral into a directory",
        """
        Ask collateral services, in the order in which they are named, for the collateral of one platform; verify it up
        to Intel's root or to --root; and write it into a directory, one file for all platforms with the same FMSPC, CA
        and TEE. A server's `collateral = { directory = "…" }` reads such a directory, and reads it again when it
        changes.

        The platform is that of a quote, or is spelled with --fmspc and --ca.

        exit code: 0 written; 1 no service has what verifies, or the quote's PCK chain does not; 2 usage, or a file that
        cannot be opened or written
        """,
        """
        chutes-proto collateral fetch --quote quote.bin --upstream https://pccs.example:8081 --ca-file ca.pem --out dir
        chutes-proto collateral fetch --fmspc 00806f050000 --ca platform --out dir \\
            --upstream https://api.trustedservices.intel.com \\
            --root-ca-crl https://certificates.trustedservices.intel.com/IntelSGXRootCA.der
        """,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    _ = which.add_argument("--quote", metavar="FILE", help="a quote of the platform")
    _ = which.add_argument("--fmspc", type=_fmspc, metavar="HEX", help="the platform's FMSPC, 12 hex digits")
    console.add(parser, "--ca", choices=("platform", "processor"), help="the CA of its PCK certificate, with --fmspc")
    console.add(parser, "--tee", choices=("TDX", "SGX"), default="TDX", help="with --fmspc (default: TDX)")
    console.add(parser, "--upstream", metavar="URL", action="append", required=True, help="a service; repeatable")
    console.add(
        parser, "--root-ca-crl", metavar="URL", help="where the root CA's CRL is, if not among the services' own paths"
    )
    console.add(parser, "--ca-file", metavar="PEM", help="CAs to trust with the services' TLS, instead of the system's")
    console.add(
        parser,
        "--update",
        choices=("standard", "early"),
        default="standard",
        help="what counts since a TCB recovery was announced, or already what will (default: standard)",
    )
    console.add(parser, "--out", metavar="DIR", required=True, help="where the file goes; made if missing")
    _add_root(parser)
    return parser


def _fetch(options: argparse.Namespace) -> int:
    import httpx

    from chutes_proto.cli.quotes import trusted_root
    from chutes_proto.cli.sending import telling
    from chutes_proto.collateral.cache import CollateralCache, GiveUp, fetch, settle
    from chutes_proto.collateral.pcs import Upstream
    from chutes_proto.errors import ConfigurationError, QuoteError
    from chutes_proto.io.collateral.upstream import FETCH_LIMITS, keep_collateral
    from chutes_proto.io.drivers.sync import Performer
    from chutes_proto.io.http.httpx_messages import HttpxGetter
    from chutes_proto.io.http.tls import context_trusting

    root = trusted_root(options)
    if (options.ca is None) != (options.fmspc is None):
        raise ConfigurationError("--ca goes with --fmspc, and --fmspc with --ca")
    upstreams = [Upstream.parse(url, options.root_ca_crl) for url in options.upstream]
    context = context_trusting(options.ca_file)
    try:
        family = _family(options, root)
    except QuoteError as exc:
        console.tell(f"chutes-proto: {options.quote}: {_with_hint(str(exc))}")
        return console.REFUSED
    cache = CollateralCache(upstreams, root=root, update=options.update)
    with httpx.Client(verify=context, trust_env=False) as client:
        performer = Performer(get=telling(HttpxGetter(client, FETCH_LIMITS), _unverified), log=lambda _: None)
        fetched = performer.run(fetch(cache, family))
        outcome = performer.run(settle(cache, family))
    if isinstance(outcome, GiveUp) or fetched is None:
        why = outcome.reason if isinstance(outcome, GiveUp) else "nothing was fetched"
        console.tell(f"chutes-proto: {_with_hint(why)}")
        return console.REFUSED
    console.say(str(keep_collateral(options.out, family, fetched)))
    return console.GRANTED


def _unverified(told: str) -> TransportError:
    """What becomes of a service whose certificate does not verify; other services are still asked."""
    from chutes_proto.errors import TransportError

    problem = f"its certificate does not verify: {told}; is its CA the one in --ca-file?"
    return TransportError(problem, maybe_delivered=False)


def _with_hint(problem: str) -> str:
    """A problem in the words of who found it, and what to do where a root is not trusted: a cache tells words only."""
    from chutes_proto.cli.quotes import ANOTHER_ROOT
    from chutes_proto.quote._steps import UntrustedRootError

    return f"{problem}. It {ANOTHER_ROOT}." if UntrustedRootError.rule in problem else problem


def _family(options: argparse.Namespace, root: TrustedRoot) -> Family:
    import time

    from chutes_proto.collateral.library import Family
    from chutes_proto.io.files import read_file
    from chutes_proto.quote._verify import open_quote

    if options.quote is None:
        return Family(options.fmspc, options.ca, options.tee)
    data = read_file(options.quote)
    return Family.of(open_quote(data, now=int(time.time()), root=root, sgx=True).pck)


# --- show and check ---


def _add_show(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        "show",
        "show what collateral says",
        """
        Verify who signed collateral, up to Intel's root or to --root, whatever its time, and show what it says and when
        each piece of it ends.

        exit code: 0 shown; 1 one of the files is no collateral, or not the root's; 2 usage, or a file that cannot be
        opened
        """,
        """
        chutes-proto collateral show collateral
        chutes-proto collateral show sim/collateral.json --root sim/root.der --json
        """,
    )
    _add_files(parser)
    return parser


def _show(options: argparse.Namespace) -> int:
    from chutes_proto.cli.quotes import say_fields

    reports = [{"file": name} | _described(content) for name, content in _read_all(options)]
    if options.json:
        console.say_json({"files": reports})
    else:
        for report in reports:
            say_fields(report)
            console.say()
    return console.REFUSED if any("problem" in report for report in reports) else console.GRANTED


def _described(content: VerifiedCollateral | str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"problem": content}
    info, identity = content.tcb_info, content.qe_identity
    ends = sorted(((term.end, term.subject) for term in content.terms), reverse=True)
    return {
        "fmspc": content.fmspc.hex(),
        "ca": content.ca,
        "tee": content.tee,
        "pce_id": info.pce_id.hex(),
        "tcb_evaluation_number": info.evaluation_number,
        "qe_evaluation_number": identity.evaluation_number,
        "tcb_levels": [f"{level.stated.status} of {rfc3339(level.stated.date)[:10]}" for level in info.levels],
        "tdx_modules": sorted(info.modules),
        "root_crl_number": content.root_crl_number,
        "revoked_by_root": len(content.revoked_by_root),
        "pck_crl_number": content.pck_crl_number,
        "revoked_pcks": len(content.revoked_pcks),
        "valid_from": rfc3339(content.window[0]),
        "valid_until": rfc3339(content.window[1]),
        "ends": {subject: rfc3339(end) for end, subject in ends},
    }


def _add_check(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        "check",
        "tell what of it stops verifying, and when",
        """
        Tell for each piece of collateral from when to when it is valid (the last second included), and whether all of
        it verifies at --at. Who signed it is verified, up to Intel's root or to --root.

        exit code: 0 all files verify then; 1 one does not; 2 usage, or a file that cannot be opened
        """,
        """
        chutes-proto collateral check /var/lib/chutes/collateral --at 2030-01-31
        chutes-proto collateral check collateral.json --at $(( $(date +%s) + 7 * 86400 )) --json
        """,
    )
    _add_files(parser)
    console.add_at(parser, "the time to judge at")
    console.add(
        parser,
        "--grace",
        type=_seconds,
        metavar="SECONDS",
        default=0,
        help="as a server's grace_seconds: added to the end of all but certificates (default: 0)",
    )
    return parser


def _check(options: argparse.Namespace) -> int:
    import time

    at = int(time.time()) if options.at is None else options.at
    reports = [{"file": name} | _forecast(content, at, options.grace) for name, content in _read_all(options)]
    if options.json:
        console.say_json({"at": rfc3339(at), "files": reports})
    else:
        for report in reports:
            _say_forecast(report, at)
    return console.GRANTED if reports and all(report["verifies"] for report in reports) else console.REFUSED


def _forecast(content: VerifiedCollateral | str, at: int, grace: int) -> dict[str, Any]:
    if isinstance(content, str):
        return {"verifies": False, "problem": content}
    pieces = sorted(dict.fromkeys(content.terms), key=lambda term: (_end(term, grace), term.subject))
    return {
        "fmspc": content.fmspc.hex(),
        "ca": content.ca,
        "tee": content.tee,
        "verifies": all(term.begin <= at <= _end(term, grace) for term in pieces),
        "verifies_from": rfc3339(max(term.begin for term in pieces)),
        "verifies_until": rfc3339(_end(pieces[0], grace)),
        "first_to_end": pieces[0].subject,
        "pieces": [
            {
                "piece": term.subject,
                "from": rfc3339(term.begin),
                "until": rfc3339(_end(term, grace)),
                "verifies": term.begin <= at <= _end(term, grace),
            }
            for term in pieces
        ],
    }


def _end(term: Term, grace: int) -> int:
    return term.end if term.is_certificate else term.end + grace


def _say_forecast(report: dict[str, Any], at: int) -> None:
    if "problem" in report:
        console.say(f"{report['file']}: of no use: {report['problem']}")
        return
    judged = "verifies" if report["verifies"] else "DOES NOT VERIFY"
    console.say(
        f"{report['file']}: FMSPC {report['fmspc']}, {report['ca']} CA, {report['tee']}: {judged} at {rfc3339(at)}"
    )
    for piece in report["pieces"]:
        mark = "ok" if piece["verifies"] else "NO"
        console.say(f"  {mark}  {piece['piece']:24} {piece['from']} to {piece['until']}")
    console.say(f"  all of it verifies until {report['verifies_until']}: then {report['first_to_end']} ends")


def _add_files(parser: argparse.ArgumentParser) -> None:
    console.add(parser, "path", metavar="PATH", nargs="+", help="a file of collateral, or a directory of *.json")
    _add_root(parser)
    console.add_json(parser)


def _read_all(options: argparse.Namespace) -> Iterator[tuple[str, VerifiedCollateral | str]]:
    """All files that are named, by name, with what they hold or why they are of no use."""
    from chutes_proto.cli.quotes import trusted_root
    from chutes_proto.errors import ConfigurationError, QuoteError
    from chutes_proto.io.files import read_file
    from chutes_proto.quote._collateral import Collateral
    from chutes_proto.quote._verify import authenticate_collateral

    root = trusted_root(options)
    for path in map(Path, options.path):
        files = sorted(path.glob("[!.]*.json")) if path.is_dir() else [path]
        if not files:
            raise ConfigurationError(f"{path} holds no *.json")
        for file in files:
            data = read_file(file)
            try:
                yield str(file), authenticate_collateral(Collateral.from_json(data), root=root)
            except QuoteError as exc:
                yield str(file), _with_hint(str(exc))


# --- serve ---


def _add_serve(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        "serve",
        "serve simulated collateral, for tests",
        """
        Serve the collateral of the simulated platform behind the paths of Intel's PCS, version 4, and of a PCCS, until
        SIGINT or SIGTERM; for tests of tools that fetch collateral. It is under a root that is not Intel's, and made
        anew for each request. The platform is the one that `serve --dev`, `boot` and `simulate` use.

        Without --tls it is plain HTTP. It prints its URL.

        exit code: 0 stopped by a signal; 1 it cannot listen there; 2 usage, or a file that cannot be opened or written
        """,
        """
        chutes-proto collateral serve
        chutes-proto collateral serve --listen 127.0.0.1:8081 --tls tls        # clients trust tls/ca.pem
        chutes-proto collateral serve --fault tcb_info_signature
        chutes-proto collateral serve --age 2592001                            # expired
        """,
    )
    console.add(
        parser,
        "--listen",
        type=_address,
        metavar="HOST:PORT",
        default=("127.0.0.1", 0),
        help="where (default: a free port of loopback)",
    )
    console.add(parser, "--tls", metavar="DIR", help="serve https, with a key and CA made in this directory")
    console.add(parser, "--fault", action="append", default=[], metavar="NAME", help="as of `simulate`; repeatable")
    console.add(parser, "--age", type=_seconds, default=0, metavar="SECONDS", help="give what was made so long ago")
    console.add_platform(parser)
    return parser


def _serve(options: argparse.Namespace) -> int:
    import os
    import signal
    import threading
    import time

    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.collateral.simulated import CollateralServer
    from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    from chutes_proto.testing._faults import FAULTS
    from chutes_proto.testing._service import CollateralService

    for name in options.fault:
        if name not in FAULTS:
            raise ConfigurationError(f"--fault: there is no fault {name!r}; `simulate --list-faults` lists them")
    now = int(time.time())
    platform = open_platform(options.platform or platform_directory(os.environ), now).platform.having(*options.fault)
    try:
        server = CollateralServer(options.listen, CollateralService((platform,)), age=options.age)
    except OSError as exc:
        host, port = options.listen
        console.tell(f"chutes-proto: --listen: {host}:{port}: {exc.strerror or exc}")
        return console.REFUSED
    with server:
        if options.tls is not None:
            console.say(f"CA certificate: {server.use_tls(options.tls, now)}")
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        console.say(f"SIMULATED collateral of FMSPC {platform.fmspc.hex()}: {server.url}")
        _ = signal.sigwait(signals)
        server.shutdown()
        _ = signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return console.GRANTED


# --- options ---


def _add_root(parser: argparse.ArgumentParser) -> None:
    console.add(parser, "--root", metavar="DER", help="a root to trust instead of Intel's")


def _fmspc(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{12}", text):
        raise argparse.ArgumentTypeError("an FMSPC is 6 bytes, so 12 hex digits")
    return bytes.fromhex(text)


def _seconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError("whole seconds, for example 86400")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise argparse.ArgumentTypeError('say "address:port", for example "127.0.0.1:8081"')
    return host.removeprefix("[").removesuffix("]"), int(port)
