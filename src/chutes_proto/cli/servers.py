"""``chutes-proto servers``: a miner's servers at a key server."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from chutes_proto.cli import console
from chutes_proto.cli.miner import asking as miner

if TYPE_CHECKING:
    from collections.abc import Callable

    from chutes_proto.effects import Flow
    from chutes_proto.miner._flows import Miner

NAME = "servers"
_AT = "https://keys.example:8443 --hotkey-file h"


def add(subparsers: console.Subparsers) -> argparse.ArgumentParser:
    parser = console.command(
        subparsers,
        NAME,
        "list, show, rename and remove your servers",
        f"""
        Commands for the servers that a hotkey has registered.
        {miner.EXIT_CODES}
        """,
        f"chutes-proto servers list {_AT}\n"
        f"chutes-proto servers show {_AT} n1 --json\n"
        f"chutes-proto servers rename {_AT} n1 vm-2\n"
        f"chutes-proto servers remove {_AT} vm-2",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    _ = _action(actions, "list", "all your servers, newest first")
    show = _action(actions, "show", "one server", "n1")
    rename = _action(actions, "rename", "give a server another name; its VM's keys are not touched", "n1 vm-2")
    remove = _action(actions, "remove", "remove a server; its VM's keys are kept", "vm-2")
    console.add(show, "id", metavar="ID", help="the server's id")
    console.add(rename, "id", metavar="ID", help="the server's id")
    console.add(rename, "name", metavar="NAME", help="its new name")
    console.add(remove, "id", metavar="NAME_OR_ID", help="the server's name or id")
    return parser


def _action(actions: console.Subparsers, name: str, summary: str, example: str = "") -> argparse.ArgumentParser:
    parser = console.command(
        actions, name, summary, miner.EXIT_CODES, f"chutes-proto servers {name} {_AT} {example}".rstrip()
    )
    miner.add_miner(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    from chutes_proto.errors import Refusal
    from chutes_proto.miner import _flows as servers

    flows: dict[str, Callable[[Miner], Flow[Any]]] = {
        "list": servers.list_servers,
        "show": lambda who: servers.read_server(who, options.id),
        "rename": lambda who: servers.rename_server(who, options.id, options.name),
        "remove": lambda who: servers.remove_server(who, options.id),
    }
    try:
        answer = miner.ask(options, lambda who, _: flows[options.action](who))
    except Refusal as exc:
        return console.refused(options, exc)
    if options.action == "remove":
        if options.json:
            console.say_json({"granted": True, "removed": answer})
        else:
            console.say(f"removed: {answer}; the keys of its VM are kept")
        return console.GRANTED
    found = [console.plain(row) for row in (answer if options.action == "list" else [answer])]
    if options.json:
        console.say_json({"granted": True, **({"servers": found} if options.action == "list" else found[0])})
    elif not found:
        console.say("no servers")
    else:
        _say(found)
    return console.GRANTED


def _say(found: list[dict[str, str | None]]) -> None:
    heads = list(found[0])
    console.say_table([head.upper() for head in heads], [[row[head] or "-" for head in heads] for row in found])
