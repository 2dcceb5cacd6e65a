"""``chutes-proto reload``: a running server reads its files again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.server.control import ask_to_reload
from chutes_proto.server import ServerConfig


@click.command(
    "reload", cls=Command, exits=exits("reloaded, or there was no change", "refused: nothing was changed, and why")
)
@click.option("--config", metavar="FILE", required=True, help="the configuration file (TOML)")
@json_option
def command(config: str) -> int:
    """Let a running server read its files again, without a restart.

    Asks the server at the socket that `control` of the configuration names, waits, and prints what changed. The server
    reads its configuration, policy, reference values, hotkeys, GPU kinds, collateral directory, certificates and KEKs,
    and checks them whole first. If anything is wrong, nothing changes, in none of its workers. Settings of sockets,
    limits, store and root of trust are named, and stay until a restart. Rules that are probably not meant, and what
    ends soon, are noted, as `serve --check` does. The audit row has the digests of before and after, and the user id of
    who asked.

    SIGHUP does the same, and the result is in the server's log.

    Examples:
      chutes-proto reload --config server.toml

    See also: serve, policy check, profiles list
    """
    loaded = ServerConfig.load(config)
    if loaded.control is None:
        raise ConfigurationError(f"{config}: control: name a Unix socket, and restart the server; or send it SIGHUP")
    found = ask_to_reload(Path(loaded.path or config).parent / loaded.control)
    if not found["ok"]:
        console.complain(f"nothing was changed: {found['error']}")
    return answer(found, lambda: _say(found, str(loaded.path)), ok=bool(found["ok"]))


def _say(found: Mapping[str, Any], config: str) -> None:
    if not found["ok"]:
        return
    for change in found["changes"]:
        output.prose(f"reloaded {change}", "good")
    if not found["changes"]:
        console.say("nothing has changed")
    for name in found["needs_restart"]:
        output.prose(f"not applied until a restart: {name}", "warn")
    if Path(found.get("configuration", config)).resolve() != Path(config).resolve():
        output.prose(f"note: the server reads {found['configuration']}, and not {config}", "warn")
    for warning in found.get("warnings", ()):  # of this release on
        output.prose(f"note: {warning}", "warn")
