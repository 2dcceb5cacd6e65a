"""``chutes-proto openapi``: the description of the API."""

from __future__ import annotations

import click

from chutes_proto.cli import console
from chutes_proto.cli.base import Command
from chutes_proto.cli.describe import exits, wrong_usage
from chutes_proto.wire import openapi


@click.command("openapi", cls=Command, exits=exits("printed", wrong=wrong_usage()))
def command() -> int:
    """Print the API as an OpenAPI document.

    The document is OpenAPI 3.1, in JSON: the same bytes that a server answers to GET /openapi.json.

    Examples:
      chutes-proto openapi > openapi.json
      chutes-proto openapi | python3 -m json.tool

    See also: serve
    """
    console.out(openapi.document().decode("ascii"))
    return console.GRANTED
