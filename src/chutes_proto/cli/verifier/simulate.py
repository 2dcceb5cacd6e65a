"""``chutes-proto simulate``: a quote of the simulated platform, with everything that a verifier needs."""

from __future__ import annotations

import os
import time
from typing import Any

import click
from attrs import evolve

from chutes_proto.cli import console
from chutes_proto.cli.base import Command, Decorator, answer, at_option, json_option, parsed, platform_option
from chutes_proto.cli.describe import wrong_usage
from chutes_proto.cli.verifier.fields import list_faults_option, stage_option
from chutes_proto.io.files import make_directory, write_file
from chutes_proto.io.quoters.simulated import open_platform, platform_directory
from chutes_proto.quote._terms import rfc3339
from chutes_proto.testing._directory import simulation_files
from chutes_proto.testing._faults import FAULTS
from chutes_proto.testing._platform import SimulatedPlatform


def _fault(name: str) -> str:
    if name not in FAULTS:
        raise ValueError(f"{name!r} is not the name of a fault; `chutes-proto simulate --list-faults` lists them")
    return name


fault_option: Decorator = click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="NAME",
    callback=parsed(_fault),
    help="make it wrong in this way, by a name of `simulate --list-faults`; repeatable",
)


def simulated_platform(directory: str | None, now: int) -> SimulatedPlatform:
    """The simulated platform of ``--platform``, made if missing."""
    return open_platform(directory or platform_directory(os.environ), now).platform


@click.command("simulate", cls=Command, exits={0: "written", 2: wrong_usage("files that cannot be written")})
@click.option(
    "--report-data",
    metavar="HEX",
    required=True,
    callback=parsed(console.report_data),
    help="64 bytes for the quote to bind",
)
@click.option("--out", metavar="DIR", required=True, help="the directory for the files; made if missing")
@fault_option
@list_faults_option({fault.name: fault.what for fault in FAULTS.values()})
@click.option(
    "--form",
    type=click.Choice(("v4", "v5-td10", "v5-td15", "v5-td15ex")),
    default="v4",
    show_default=True,
    help="format of the quote",
)
@stage_option
@at_option("the time at which the collateral is made")
@platform_option
@json_option
def command(
    report_data: bytes, out: str, faults: tuple[str, ...], form: Any, stage: Any, at: int | None, platform: str | None
) -> int:
    """Make a quote and collateral of a simulated platform.

    Writes quote.bin, collateral.json, now.txt and root.der: a complete TDX quote under a root that is not Intel's, for
    tests of your own tools. The platform is the one that `serve --dev` trusts and `boot` uses.

    Examples:
      chutes-proto simulate --report-data $(printf %0128d 0) --out sim
      chutes-proto simulate --report-data $(printf %0128d 0) --out debug --fault debug
      chutes-proto verify sim/quote.bin --collateral sim/collateral.json --root sim/root.der

    See also: verify, inspect, collateral serve
    """
    now = int(time.time()) if at is None else at
    simulated = evolve(simulated_platform(platform, now), form=form).having(*faults)
    directory = make_directory(out)
    files = {
        str(directory / name): data
        for name, data in simulation_files(simulated, report_data, now=now, stage=stage).items()
    }
    for name, data in files.items():
        write_file(name, data)
    return answer({"files": [*files], "fmspc": simulated.fmspc.hex(), "at": rfc3339(now)}, "\n".join(files))
