"""``chutes-proto doctor``: what a machine lacks, and the commands that mend it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs
import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Command, answer, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.io.finding import Finding
from chutes_proto.io.machine import ROLES, check_machine

_COLOURS: Final[dict[str, output.State]] = {"ok": "good", "note": "warn", "problem": "bad"}


@click.command("doctor", cls=Command, exits=exits("nothing is missing or wrong", "something is missing or wrong"))
@click.option(
    "--for",
    "roles",
    type=click.Choice([*ROLES]),
    multiple=True,
    help="look only at the needs of this use of the machine; repeatable (default: all)",
)
@json_option
def command(roles: tuple[str, ...]) -> int:
    """Find what a machine lacks, and the commands that mend it.

    Looks at this machine: Python, extras, the clock; for a VM also cryptsetup, and whether the TDX guest device or the
    kernel's configfs-TSM gives a quote. Changes nothing. `serve --check` looks at a key server's configuration.

    With --json it prints an object: "ok" says whether nothing is missing or wrong; "findings" has an object for each
    finding, with "state" ("ok", "note" or "problem"), "what", "detail" and "remedy" (a command, or empty).

    Examples:
      chutes-proto doctor --for verifier

    See also: serve, agent
    """
    findings = [*check_machine(roles or tuple(ROLES))]
    is_complete = all(finding.state != "problem" for finding in findings)
    report = {"ok": is_complete, "findings": [attrs.asdict(finding) for finding in findings]}
    return answer(report, lambda: _say(findings), ok=is_complete)


def _say(findings: Iterable[Finding]) -> None:
    for finding in findings:
        output.prose(f"{finding.state:8} {finding.what}: {finding.detail}", _COLOURS[finding.state], rest=9)
        if finding.remedy:
            console.say(f"{'':8} run: {finding.remedy}")
