"""``chutes-proto init``: the files of a new key server."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, answer, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.errors import ConfigurationError, FileUnavailable


@click.command(
    "init", cls=Command, exits=exits("written", "nothing was written: a file exists, or the name cannot be used")
)
@click.argument("directory", cls=Argument, metavar="DIR", help="where the files are written")
@click.option("--name", metavar="HOST", required=True, help="the host name or IP address that VMs connect to")
@click.option("--state", metavar="DIR", help="where the store is kept (default: with the files)")
@json_option
def command(directory: str, name: str, state: str | None) -> int:
    """Write the files of a new key server.

    It writes a configuration that works, a key-encryption key, a TLS key with a certificate request, and a template of
    reference values. Each file explains itself. Nothing is replaced. The remaining steps are printed: have the request
    signed, fill the template, and start the server.

    Examples:
      chutes-proto init keys --name keys.example
      chutes-proto init etc --name 192.0.2.7 --state /var/lib/chutes-proto

    See also: serve, profile
    """
    from chutes_proto.io.server.initial import write_initial

    place = Path(directory)
    try:
        made = write_initial(place, name, None if state is None else Path(state).absolute())
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        console.complain(str(exc))
        return console.REFUSED

    def show() -> None:
        for file in made:
            output.prose(f"{file.path}: {file.purpose}")
        console.say("next:")
        measurements, config = (shlex.quote(str(place / name)) for name in ("measurements.toml", "server.toml"))
        for line in (
            f"have your CA sign {place / 'server.csr'}, and save the chain as {place / 'server.pem'}",
            f"chutes-proto profile boot.quote runtime.quote --name NAME --version 1.0 > {measurements}",
            f"chutes-proto serve --config {config} --check",
            f"chutes-proto serve --config {config}",
        ):
            console.say(f"  {line}")

    return answer({"ok": True, "files": [{"path": str(file.path), "purpose": file.purpose} for file in made]}, show)
