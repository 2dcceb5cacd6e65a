"""``chutes-proto inspect``: what a quote says, verified by nobody."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "inspect"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "show what a quote says, without verifying it",
        """
        Decode a quote: header, report, attributes by name, and what the PCK certificate in it says of its platform.
        Nothing is verified: anyone can make a quote that says this. For a verdict see `chutes-proto verify`.

        exit code: 0 decoded; 1 it does not parse; 2 usage, or the file cannot be opened
        """,
        """
        chutes-proto inspect quote.bin
        chutes-proto inspect quote.bin --json | python3 -m json.tool
        """,
    )
    console.add(parser, "quote", metavar="QUOTE", help="a file with the quote's bytes")
    console.add_json(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.cli.quotes import claimed_platform, platform_fields, quote_fields, say_fields
    from chutes_proto.io.files import MAX_SIZE, read_head
    from chutes_proto.quote._layout import parse_quote
    from chutes_proto.quote.errors import QuoteFormatError

    data = read_head(options.quote, MAX_SIZE)
    try:
        quote = parse_quote(data, sgx=True)
    except QuoteFormatError as exc:
        if options.json:
            console.say_json({"parsed": False, "verified": False, "refusals": [{"code": exc.code, "detail": str(exc)}]})
        else:
            console.say(f"not a quote: {exc} ({exc.code})")
        return console.REFUSED
    fields = quote_fields(quote) | platform_fields(claimed_platform(quote))
    if options.json:
        console.say_json({"parsed": True, "verified": False, **fields})
    else:
        console.say("This is what the quote says. Nothing of it was verified; `chutes-proto verify` does that.")
        say_fields(fields)
    return console.GRANTED
