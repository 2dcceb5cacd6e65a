"""``chutes-proto simulate``: a quote of the simulated platform with all that a verifier needs."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "simulate"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "make a quote and collateral of a simulated platform",
        """
        Write into a directory (made if missing) quote.bin, collateral.json, now.txt and root.der: a full-shape TDX
        quote under a root that is not Intel's, for people who test their own tools. The platform is the one that
        `serve --dev` trusts and `boot` uses.

        exit code: 0 written; 2 usage, or the files cannot be written
        """,
        """
        chutes-proto simulate --report-data $(printf %0128d 0) --out sim
        chutes-proto simulate --report-data $(printf %0128d 0) --fault debug --out debug
        chutes-proto verify sim/quote.bin --collateral sim/collateral.json --root sim/root.der
        """,
    )
    console.add(parser, "--report-data", type=console.report_data, metavar="HEX", help="64 bytes for the quote to bind")
    console.add(parser, "--out", metavar="DIR", help="where the files go")
    console.add(parser, "--fault", action="append", default=[], metavar="NAME", help="be wrong in this way; repeatable")
    console.add(parser, "--list-faults", action="store_true", help="list the names for --fault, and do nothing else")
    console.add(
        parser,
        "--form",
        choices=("v4", "v5-td10", "v5-td15", "v5-td15ex"),
        default="v4",
        help="format of the quote (default: v4)",
    )
    console.add(
        parser,
        "--stage",
        choices=("boot", "runtime"),
        default="boot",
        help="measurements of which stage (default: boot)",
    )
    console.add_at(parser, "when the collateral is made")
    console.add_platform(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    import os
    import time

    from attrs import evolve

    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.files import make_directory, write_file
    from chutes_proto.io.quoters.simulated import open_platform, platform_directory
    from chutes_proto.testing._directory import simulation_files
    from chutes_proto.testing._faults import FAULTS

    if options.list_faults:
        for fault in FAULTS.values():
            console.say(f"{fault.name:42} {fault.what}")
        return console.GRANTED
    if options.report_data is None or options.out is None:
        raise ConfigurationError("simulate needs --report-data HEX and --out DIR, or --list-faults")
    for name in options.fault:
        if name not in FAULTS:
            raise ConfigurationError(f"--fault: there is no fault {name!r}; `simulate --list-faults` lists them")
    now = int(time.time()) if options.at is None else options.at
    record = open_platform(options.platform or platform_directory(os.environ), now)
    platform = evolve(record.platform, form=options.form).having(*options.fault)
    directory = make_directory(options.out)
    for name, data in simulation_files(platform, options.report_data, now=now, stage=options.stage).items():
        write_file(directory / name, data)
        console.say(str(directory / name))
    return console.GRANTED
