"""``chutes-proto profile``: the measurement profile of an image, from the quotes of one good machine."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "profile"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "write a measurement profile from two quotes",
        """
        Take MRTD and the RTMRs from a quote made at boot and one made at runtime, and print them as a profile, which a
        file under `measurements` of a server's configuration, or a policy, may hold.

        Nothing is verified: take quotes of a machine that you trust, and look at them with `chutes-proto verify`. Who
        can build the image again compares the registers with its own.

        exit code: 0 printed; 1 a quote does not parse, is none of a TD, or their MRTDs differ; 2 usage, or a file
        cannot be opened
        """,
        """
        chutes-proto profile boot.quote runtime.quote --name 8xh200 --version 1.0 > measurements.toml
        """,
    )
    console.add(parser, "boot", metavar="BOOT", help="a quote made when the TD asks for its keys")
    console.add(parser, "runtime", metavar="RUNTIME", help="a quote that the same TD made later")
    console.add(parser, "--name", metavar="NAME", required=True, help="how the profile is called")
    console.add(parser, "--version", metavar="VERSION", default="1", help="which version of it this is (default: 1)")
    console.add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.files import MAX_SIZE, read_head
    from chutes_proto.quote._layout import TdReport10, parse_quote
    from chutes_proto.quote._measurements import Profile
    from chutes_proto.quote.errors import PolicyError, QuoteFormatError

    reports: list[TdReport10] = []
    for path in (options.boot, options.runtime):
        try:
            body = parse_quote(read_head(path, MAX_SIZE)).body
        except QuoteFormatError as exc:
            return _none(options, exc.code, f"{path}: {exc}")
        if not isinstance(body, TdReport10):
            return _none(options, "quote_tee_type", f"{path}: no quote of a TD")
        reports.append(body)
    boot, runtime = reports
    if boot.mr_td != runtime.mr_td:
        return _none(options, "mrtd_differs", "the two quotes have different MRTDs, so they are not of one image")
    try:
        profile = Profile(
            name=options.name, version=options.version, mrtd=boot.mr_td, boot=boot.rtmrs, runtime=runtime.rtmrs
        )
    except PolicyError as exc:
        raise ConfigurationError(f"--{exc}") from None
    if options.json:
        stages = {"boot": profile.boot, "runtime": profile.runtime}
        registers = {
            stage: {f"rtmr{number}": rtmr.hex() for number, rtmr in enumerate(rtmrs)} for stage, rtmrs in stages.items()
        }
        content = {"name": profile.name, "version": profile.version, "mrtd": profile.mrtd.hex(), **registers}
        console.say_json({"profile": content})
    else:
        for line in profile.to_toml().splitlines():
            console.say(line)
    return console.GRANTED


def _none(options: argparse.Namespace, code: str, detail: str) -> int:
    if options.json:
        console.say_json({"profile": None, "refusals": [{"code": code, "detail": detail}]})
    else:
        console.tell(f"no profile: {detail} ({code})")
    return console.REFUSED
