"""``chutes-proto openapi``: the description of the API."""

from __future__ import annotations

import argparse

from chutes_proto.cli import console

NAME = "openapi"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    return console.command(
        subparsers,
        NAME,
        "print the API as an OpenAPI document",
        "Print the API as an OpenAPI 3.1 document: the bytes that the server answers to GET /openapi.json.",
        "chutes-proto openapi > openapi.json",
    )


def run(options: argparse.Namespace) -> int:
    from chutes_proto.wire import openapi

    console.out(openapi.document().decode("ascii"))
    return console.GRANTED
