"""``chutes-proto register``: tell a key server of a server and its GPUs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from chutes_proto.cli import console
from chutes_proto.cli.miner import asking as miner

if TYPE_CHECKING:
    from chutes_proto.wire.miners import NodeArgs

NAME = "register"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "register a server with its GPUs",
        f"""
        Register a server of yours. It is linked to the boot of the VM with its name, else to one from its address. The
        GPUs come from a file: a JSON list with one object a GPU, members uuid, name, memory (bytes), clock_rate (kHz),
        device_index, gpu_identifier, verification_host, verification_port, and what else the API's description has.
        {miner.EXIT_CODES}
        """,
        """
        chutes-proto register https://keys.example:8443 --hotkey-file ~/.bittensor/wallets/w/hotkeys/h \\
            --id 3f1c... --name vm-1 --host 198.51.100.7 --gpus gpus.json
        """,
    )
    miner.add_miner(parser)
    console.add(parser, "--id", metavar="ID", required=True, help="the server's id, for example its node's uid")
    console.add(parser, "--name", metavar="NAME", help="its name, the VM's (default: the id)")
    console.add(parser, "--host", metavar="HOST", required=True, help="its public IPv4 address or DNS name")
    console.add(parser, "--gpus", metavar="FILE", required=True, help="its GPUs, a JSON list")
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import Refusal
    from chutes_proto.miner._flows import register_server

    gpus = _gpus(options.gpus)
    try:
        miner.ask(
            options,
            lambda who, _: register_server(who, server_id=options.id, host=options.host, gpus=gpus, name=options.name),
        )
    except Refusal as exc:
        return console.refused(options, exc)
    if options.json:
        console.say_json({"granted": True, "server_id": options.id, "name": options.name or options.id})
    else:
        declared = f"{len(gpus)} GPU{'' if len(gpus) == 1 else 's'}"
        console.say(f"registered: {options.id} ({options.name or options.id}) at {options.host}, {declared}")
    return console.GRANTED


def _gpus(path: str) -> tuple[NodeArgs, ...]:
    from chutes_proto.errors import ConfigurationError
    from chutes_proto.io.files import read_file
    from chutes_proto.wire.codec import decode_list
    from chutes_proto.wire.miners import NodeArgs

    try:
        return decode_list(read_file(path), NodeArgs)
    except ValueError as exc:
        raise ConfigurationError(f"{path}: not a list of GPUs: {exc}") from None
