"""``chutes-proto serve``: the key server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chutes_proto.cli import console

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chutes_proto.io.collateral.upstream import UpstreamCollateral
    from chutes_proto.io.drivers.sync import CollateralSource
    from chutes_proto.io.server.serving import Transport
    from chutes_proto.io.server.setup import ServerSetup

NAME = "serve"

_CONFIGURATION = """
    listen = "0.0.0.0:8443"
    tls = { certificate = "server.pem", key = "server.key" }
    store = "sqlite:keys.db"           # or "postgresql://user@host/database", made by `chutes-proto store migrate`
    kek_file = "kek"                   # made with: (umask 077; head -c 32 /dev/urandom > kek)
    roots = "intel"
    collateral = { directory = "collateral" }    # or { upstreams = ["https://pccs.example:8081"], cache = "cache" }
    measurements = ["measurements.toml"]
    hotkeys = ["5Grw..."]              # or "*"
    [profile_defaults]
    root_passphrase = "vm"             # or "image", with root_passphrase_file

measurements.toml:

    [[profile]]
    name = "8xh200"
    version = "1.0"
    mrtd = "..."                       # 96 hex digits, as each register
    boot = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }
    runtime = { rtmr0 = "...", rtmr1 = "...", rtmr2 = "...", rtmr3 = "..." }
"""


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "serve keys",
        """
        Run the key server until SIGINT or SIGTERM. It prints its URLs on standard output and logs lines of JSON to
        standard error; who does not read them loses some, and then a line says how many. Relative paths in the
        configuration file begin at the file's directory. All its keys, and what they mean, are in README.md of the
        package chutes_proto.server.

        After a signal to stop, new boots are sent away, and the server ends as soon as the boots that it has granted
        are complete, after limits.drain_seconds at the latest. A second signal ends it at once.
        Where the store hangs then, the process ends two seconds later: a transaction is done as a whole or not at all.
        SIGHUP takes the TLS certificate's files anew, and keeps the old ones where the new are of no use.

        --dev serves at once on a free loopback port, with a store that ends with it: it trusts the simulated platform
        that `boot` and `simulate` use, and knows every hotkey. Never expose it.

        exit code: 0 stopped by a signal, or --check found nothing wrong; 1 the configuration, or what it names, is
        wrong; 2 usage, or the configuration file cannot be opened
        """,
        "chutes-proto serve --dev\n"
        "chutes-proto serve --config /etc/chutes/server.toml --check\n"
        "chutes-proto serve --config /etc/chutes/server.toml\n\n"
        "server.toml:\n" + _CONFIGURATION,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    _ = which.add_argument("--config", metavar="FILE", help="the configuration file (TOML)")
    _ = which.add_argument("--dev", action="store_true", help="a server for development, on loopback")
    console.add(parser, "--check", action="store_true", help="check files, store and keys, say what is found, and stop")
    console.add(
        parser, "--transport", choices=("trio", "asyncio"), default="trio", help="the event loop (default: trio)"
    )
    console.add_platform(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import ConfigurationError, FileUnavailable
    from chutes_proto.io.server.setup import make_setup
    from chutes_proto.server import ServerConfig

    if options.dev:
        return _develop(options)
    if options.platform:
        raise ConfigurationError("--platform goes with --dev; a configuration names its root under roots")
    try:
        setup = make_setup(ServerConfig.load(options.config))
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        for problem in str(exc).splitlines():
            console.tell(f"chutes-proto: {problem}")
        return console.REFUSED
    return _check(setup) if options.check else _serve(options.transport, setup, setup.collateral, _announce)


def _check(setup: ServerSetup) -> int:
    """Say what there is; 1 if something of it cannot work."""
    import time

    from chutes_proto.errors import CollateralUnavailable, ConfigurationError, StoreError
    from chutes_proto.io.collateral.upstream import UpstreamCollateral
    from chutes_proto.io.server.setup import check_store

    faults: list[str] = []
    console.say(f"root: {setup.service.trust}")
    for profile in setup.service.policy.profiles:
        console.say(f"measurements: {profile.name}, version {profile.version}")
    console.say(f"volumes: {', '.join(setup.service.volumes)}")
    hotkeys = setup.service.hotkeys
    console.say(f"hotkeys: {'every hotkey' if hotkeys == '*' else len(hotkeys)}")
    if isinstance(setup.collateral, UpstreamCollateral):
        for upstream in setup.collateral.cache.upstreams:
            console.say(f"collateral: from {upstream.url} (not asked now)")
    else:
        try:
            items = setup.collateral.items(int(time.time()))
            for item in items:
                console.say(f"collateral: {item}")
                if isinstance(item.content, str):
                    faults.append(f"collateral: {item}")
            if not items:
                faults.append(f"collateral.directory: {setup.collateral.path} holds no *.json")
        except CollateralUnavailable as exc:
            faults.append(str(exc))
    try:
        console.say(f"store: {check_store(setup.store, setup.service.vault)}")
    except (ConfigurationError, StoreError) as exc:
        faults.append(str(exc))
    for warning in setup.warnings:
        console.say(f"warning: {warning}")
    for fault in faults:
        console.tell(f"chutes-proto: {fault}")
    return console.REFUSED if faults else console.GRANTED


def _serve(
    transport: Transport,
    setup: ServerSetup,
    collateral: CollateralSource | UpstreamCollateral,
    announce: Callable[[Sequence[str]], None],
    *more: int,
) -> int:
    import signal

    from chutes_proto.errors import ConfigurationError, StoreError
    from chutes_proto.io.server.serving import serve_until_stopped

    stops = (signal.SIGINT, signal.SIGTERM, *map(signal.Signals, more))
    try:
        serve_until_stopped(transport, setup, collateral, announce, stops)
    except (ConfigurationError, StoreError) as exc:
        console.tell(f"chutes-proto: {exc}")
        return console.REFUSED
    return console.GRANTED


def _announce(urls: Sequence[str]) -> None:
    for url in urls:
        console.say(url)


def _develop(options: argparse.Namespace) -> int:
    import os
    import signal
    import tempfile
    import time
    from pathlib import Path

    from chutes_proto.cli.development import AUTHORITY, CONFIGURATION, RenewedCollateral, write_server
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.collateral.directory import CollateralDirectory
    from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    from chutes_proto.io.server.setup import make_setup
    from chutes_proto.server import ServerConfig

    if options.check:
        raise ConfigurationError("--check goes with --config")
    now = int(time.time())
    kept = Path(options.platform or platform_directory(os.environ))
    platform = open_platform(kept, now).platform
    with tempfile.TemporaryDirectory(prefix="chutes-proto-") as name:
        directory = Path(name).resolve()
        write_server(directory, platform, now)

        def announce(urls: Sequence[str]) -> None:
            console.say(
                f"This server trusts a SIMULATED platform ({kept}) and knows every hotkey: for development only."
            )
            for url in urls:
                console.say(f"key server: {url}")
            console.say(f"CA certificate: {directory / AUTHORITY}")
            other = f" --platform {options.platform}" if options.platform else ""
            boot = f"chutes-proto boot {urls[0]} --ca {directory / AUTHORITY}{other}"
            console.say(f"try: {boot} --hotkey 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY --vm vm-1")

        setup = make_setup(ServerConfig.load(directory / CONFIGURATION))
        renewed = RenewedCollateral(CollateralDirectory(directory / "collateral", setup.service.root), platform)
        return _serve(options.transport, setup, renewed, announce, signal.SIGHUP)
