"""``chutes-proto serve``: the key server."""

from __future__ import annotations

import os
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click
from attrs import evolve

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, json_option, one_of, platform_option, wants
from chutes_proto.cli.describe import exits
from chutes_proto.cli.extras import need
from chutes_proto.errors import ConfigurationError, FileUnavailable, StoreError
from chutes_proto.io.stop_signals import STOPS
from chutes_proto.server import ServerConfig

if TYPE_CHECKING:
    from chutes_proto.io.collateral.upstream import UpstreamCollateral
    from chutes_proto.io.drivers.sync import CollateralSource
    from chutes_proto.io.server.serving import Transport
    from chutes_proto.io.server.setup import ServerSetup
    from chutes_proto.io.server.workers import Given

_HOTKEY = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"

_EXITS = exits(
    "stopped by a signal, or --check found nothing wrong", "the configuration, or something that it names, is wrong"
)


@click.command("serve", cls=Command, exits=_EXITS)
@click.option("--config", metavar="FILE", help="the configuration file (TOML)")
@click.option("--dev", is_flag=True, help="a server for development, on loopback")
@click.option("--check", is_flag=True, help="check files, store, keys and expiry, report, and stop")
@click.option("--transport", type=click.Choice(["trio", "asyncio"]), help="the event loop (default: trio if installed)")
@click.option(
    "--workers", metavar="N", type=click.IntRange(1, 256), default=1, help="processes that serve (default: 1)"
)
@platform_option
@json_option
def command(
    config: str | None, dev: bool, check: bool, transport: Transport | None, workers: int, platform: str | None
) -> int:
    """Serve keys to VMs that prove what they are.

    Runs the key server until SIGINT or SIGTERM. It prints its URLs on standard output and logs lines of JSON to
    standard error; when nobody reads the log, lines are dropped, and a later line says how many. Relative paths in the
    configuration file begin at the directory of the file. All keys are in docs/reference/configuration.md and in
    examples/server.toml.

    After a signal to stop, new boots are sent away, and the server ends as soon as the boots that it has granted are
    complete, after limits.drain_seconds at the latest. A second signal ends it at once. If the store hangs then, the
    process ends two seconds later: every transaction is done as a whole or not at all. SIGHUP lets it read
    its files again, as `chutes-proto reload` does; one that comes during the start waits for its end.

    No boot is lost in a restart if systemd holds the listening sockets (socket activation): connections wait there
    until the new server serves.

    With --workers, several processes serve on the same sockets, one for each core. A worker that ends is replaced. Each
    has its share of the limits on connections, verifications, requests and store connections. A store in SQLite has one
    writer at a time, so more workers help with a store in PostgreSQL.

    --check looks at everything that a start needs, at the permissions of secrets, and at what expires and when; where
    a file stops the start, at the store besides. With --json it prints "ok" and "findings", each with "state" ("ok",
    "note" or "problem"), "what", "detail" and "remedy" (a command, or empty).

    Give one of --config and --dev. With --dev it serves at once on a free loopback port, with a store that ends with
    it: it trusts the simulated platform that `boot` and `simulate` use, and accepts any hotkey. Never expose it.

    server.toml:
      listen = "0.0.0.0:8443"
      tls = { certificate = "server.pem", key = "server.key" }
      store = "sqlite:keys.db"  # or "postgresql://user@host/database"
      kek_file = "kek"          # (umask 077; head -c 32 /dev/urandom > kek)
      roots = "intel"
      collateral = { directory = "collateral" }
      # or { upstreams = ["https://pccs.example:8081"], cache = "cache" }
      measurements = ["measurements.toml"]
      hotkeys = ["5Grw..."]     # or "*"
      [profile_defaults]
      root_passphrase = "vm"    # or "image", with root_passphrase_file

    measurements.toml (MRTD and registers have 96 hex digits):
      [[profile]]
      name = "8xh200"
      version = "1.0"
      mrtd = "..."
      boot = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }
      runtime = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }

    Examples:
      chutes-proto serve --dev
      chutes-proto serve --config server.toml --check
      chutes-proto serve --config server.toml --check --json
      chutes-proto serve --config server.toml --workers 4
      chutes-proto serve --config server.toml

    See also: reload, store init, boot, collateral fetch, profile
    """
    one_of(config=config, dev=dev)
    if check and dev:
        raise ConfigurationError("--check goes with --config")
    if wants("json") and not check:
        raise ConfigurationError("--json goes with --check; a server's log is JSON")
    if workers > 1 and dev:
        raise ConfigurationError("--workers goes with --config")
    if platform and not dev:
        raise ConfigurationError("--platform goes with --dev; a configuration names its root under roots")
    transport = transport or ("trio" if find_spec("trio") else "asyncio")
    need(transport)
    if dev:
        return _develop(transport, platform)

    from chutes_proto.io.files import Files
    from chutes_proto.io.server.setup import load_config, make_setup
    from chutes_proto.io.server.workers import given_by_supervisor

    if check:
        return _check(str(config))
    given = given_by_supervisor(os.environ)
    try:
        files = Files() if given is None else given.files
        loaded = load_config(str(config), files)
        if given is not None:
            loaded = evolve(loaded, limits=loaded.limits.shared(given.workers))
        setup = make_setup(loaded, files)
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        console.complain(str(exc))
        return console.REFUSED
    if workers > 1:
        from chutes_proto.io.server.serving import supervise_until_stopped

        return _run(lambda: supervise_until_stopped(workers, transport, setup, _announce, STOPS))
    return _serve(transport, setup, setup.collateral, _announce, given=given)


def _check(config: str) -> int:
    """Report what there is; 1 if something of it cannot work."""
    from chutes_proto.io.server.checking import check_start

    findings = [*check_start(config)]
    faults = [finding for finding in findings if finding.state == "problem"]

    def people() -> None:
        for finding in findings:
            if finding.state != "problem":
                output.prose(str(finding), "warn" if finding.state == "note" else "")
        for fault in faults:
            console.complain(str(fault))

    report = {"ok": not faults, "findings": [attrs.asdict(finding) for finding in findings]}
    return answer(report, people, ok=not faults)


def _serve(
    transport: Transport,
    setup: ServerSetup,
    collateral: CollateralSource | UpstreamCollateral,
    announce: Callable[[Sequence[str]], None],
    *more: int,
    given: Given | None = None,
) -> int:
    from chutes_proto.io.server.serving import serve_until_stopped

    stops = (*STOPS, *map(signal.Signals, more))
    return _run(lambda: serve_until_stopped(transport, setup, collateral, announce, stops, given))


def _run(serve: Callable[[], None]) -> int:
    from cryptography.utils import CryptographyDeprecationWarning

    # It is about certificates that will not be read one day. A stranger may present one, and the log is JSON alone.
    warnings.filterwarnings("ignore", category=CryptographyDeprecationWarning)
    try:
        serve()
    except (ConfigurationError, StoreError) as exc:
        console.complain(str(exc))
        return console.REFUSED
    return console.GRANTED


def _announce(urls: Sequence[str]) -> None:
    for url in urls:
        console.say(url)


def _develop(transport: Transport, platform: str | None) -> int:
    from chutes_proto.io.collateral.directory import CollateralDirectory
    from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    from chutes_proto.io.server.development import (
        AUTHORITY,
        CONFIGURATION,
        RenewedCollateral,
        folder_of_this_run,
        write_gpus,
        write_server,
    )
    from chutes_proto.io.server.setup import make_setup
    from chutes_proto.testing._gpus import SIMULATED_SEED, SimulatedGpus

    now = int(time.time())
    kept = Path(platform or platform_directory(os.environ))
    simulated = open_platform(kept, now).platform
    with folder_of_this_run("chutes-proto-") as directory:
        write_server(directory, simulated, now)
        write_gpus(directory, SimulatedGpus(SIMULATED_SEED, count=8), now, demand="record")
        authority, configuration = str(directory / AUTHORITY), str(directory / CONFIGURATION)

        def announce(urls: Sequence[str]) -> None:
            warning = f"SIMULATED: this server trusts a simulated platform ({kept}) and accepts any hotkey."
            output.prose(f"{warning} It is for development only.", "warn")
            for url in urls:
                console.say(f"key server: {url}")
            console.say(f"CA certificate: {authority}")
            where = ["--platform", platform] if platform else []
            console.say("next, in another terminal:")
            for words in (
                ["boot", urls[0], "--ca", authority, *where, "--hotkey", _HOTKEY, "--vm", "vm-1"],
                ["vm", "list", "--config", configuration],
                ["keys", "history", "vm-1", "--config", configuration],
                ["audit", "list", "--config", configuration],
            ):
                console.say(f"  chutes-proto {shlex.join(words)}")

        setup = make_setup(ServerConfig.load(configuration))
        renewed = RenewedCollateral(CollateralDirectory(directory / "collateral", setup.service.root), simulated)
        hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)  # `nohup` ignores it
        return _serve(transport, setup, renewed, announce, *hangup)
