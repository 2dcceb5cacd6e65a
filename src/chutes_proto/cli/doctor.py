"""``chutes-proto doctor``: what a machine or a configuration lacks, and the commands that mend it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.errors import ConfigurationError, FileUnavailable
from chutes_proto.io.finding import Finding
from chutes_proto.io.machine import ROLES, check_machine
from chutes_proto.server import ServerConfig

_COLOURS: Final[dict[str, output.State]] = {"ok": "good", "note": "warn", "problem": "bad"}


@click.command("doctor", cls=Command, exits=exits("nothing is missing or wrong", "something is missing or wrong"))
@click.option(
    "--for",
    "roles",
    type=click.Choice([*ROLES]),
    multiple=True,
    help="look only at the needs of this use of the machine; repeatable (default: all)",
)
@click.option("--config", metavar="FILE", help="look at a key server's configuration instead")
@json_option
def command(roles: tuple[str, ...], config: str | None) -> int:
    """Find what a machine or a configuration lacks, and the commands that mend it.

    Looks at this machine: Python, extras, the clock; for a VM also cryptsetup, and whether the TDX guest device or the
    kernel's configfs-TSM gives a quote. With --config looks at everything that a key server needs to start, at the
    permissions of its secrets, and at when its certificate and collateral expire; where a file stops the start, at the
    store alone besides. Changes nothing.

    With --json it prints an object: "ok" says whether nothing is missing or wrong; "findings" has an object for each
    finding, with "state" ("ok", "note" or "problem"), "what", "detail" and "remedy" (a command, or empty).

    Examples:
      chutes-proto doctor --for verifier
      chutes-proto doctor --config server.toml
      chutes-proto doctor --config server.toml --json

    See also: serve, agent, collateral check
    """
    if config and roles:
        raise click.UsageError("--for goes without --config")
    findings = [*(_configuration(config) if config else check_machine(roles or tuple(ROLES)))]
    is_complete = all(finding.state != "problem" for finding in findings)
    report = {"ok": is_complete, "findings": [attrs.asdict(finding) for finding in findings]}
    return answer(report, lambda: _say(findings), ok=is_complete)


def _say(findings: Iterable[Finding]) -> None:
    for finding in findings:
        output.prose(f"{finding.state:8} {finding.what}: {finding.detail}", _COLOURS[finding.state], rest=9)
        if finding.remedy:
            console.say(f"{'':8} run: {finding.remedy}")


def _configuration(path: str) -> Iterator[Finding]:
    from chutes_proto.io.server.checking import check_ends, check_setup, check_store_alone
    from chutes_proto.io.server.setup import make_setup

    config = None
    try:
        config = ServerConfig.load(path)
        setup = make_setup(config)
    except FileUnavailable:
        raise
    except ConfigurationError as exc:
        yield from map(Finding.of_problem, str(exc).splitlines())
        if config is not None:
            yield from check_store_alone(config)
            yield Finding("note", "configuration", "the rest is looked at once these problems are mended")
        return
    yield from check_setup(setup)
    yield from check_ends(setup)
