"""The tree of commands, grouped by who uses them; a command's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import click

from chutes_proto import __version__
from chutes_proto.cli import console
from chutes_proto.cli.base import COMPLETE, Group
from chutes_proto.cli.describe import EXITS, Pairs

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_SECTIONS: Final[Mapping[str, Mapping[str, tuple[str, str]]]] = {
    "Try it": {
        "demo": ("demo", "Show a VM that boots and receives its keys, end to end on this machine"),
        "doctor": ("doctor", "Find what a machine lacks, and the commands that mend it"),
    },
    "In the VM": {"agent": ("agent.command", "Attest a VM at boot, open its disks and rotate their keys")},
    "Operate a key server": {
        "init": ("operator.init", "Write the files of a new key server"),
        "serve": ("operator.serve", "Serve keys to VMs that prove what they are"),
        "reload": ("operator.reload", "Let a running server read its files again, without a restart"),
        "keys": ("operator.keys", "Show, restore, purge, rewrap and import keys"),
        "vm": ("operator.vm", "List, bind, rebind, revoke and erase VMs, and purge their old boots"),
        "platform": ("operator.revoking:platform", "Shut a platform out, and allow it again"),
        "revocations": ("operator.revoking:revocations", "List what is shut out"),
        "hosts": ("operator.hosts", "List host profiles, and say which measurement profiles such hosts are"),
        "registrations": ("operator.registrations", "List and remove the servers that miners registered"),
        "why": ("operator.why", "Explain why a VM was refused"),
        "audit": ("operator.audit", "Show, export and purge the audit rows"),
        "policy": ("operator.policy", "Check an appraisal policy, say what it accepts, and try it on the fleet"),
        "profiles": ("operator.profiles", "Show when reference values count, and take over published ones"),
        "store": ("operator.store", "Make, copy and check the store of a key server"),
    },
    "Run servers as a miner": {
        "boot": ("miner.boot", "Boot against a running server, as a VM without disks"),
        "register": ("miner.servers:register", "Register a server with its GPUs"),
        "servers": ("miner.servers:servers", "List, rename and remove your servers"),
        "attest": ("miner.servers:attest", "Attest a registered server at runtime"),
        "status": (
            "miner.servers:status",
            "Show the newest runtime attestation of a server, and whether it still counts",
        ),
        "hotkey": ("miner.hotkey", "Inspect a hotkey's address, check a signature, or revoke a hotkey"),
    },
    "Verify quotes": {
        "verify": ("verifier.verify", "Verify quotes against collateral, and appraise them"),
        "inspect": ("verifier.quotes:inspect", "Show the content of a quote without verifying it"),
        "profile": ("verifier.quotes:profile", "Write a measurement profile from two quotes"),
        "replay": ("verifier.replay", "Replay an event log against a quote, and find the first event that differs"),
        "collateral": (
            "verifier.collateral",
            "Fetch, show and check collateral, or serve that of the simulated platform",
        ),
        "gpu": ("verifier.gpu", "Verify the evidence of NVIDIA GPUs, and show it"),
        "simulate": ("verifier.simulate", "Make a quote and collateral of a simulated platform"),
    },
}
"""By heading and name: the module under ``chutes_proto.cli``, with the attribute where it is not ``command``, and the
first sentence of the help."""

COMMANDS: Final = {name: entry for section in _SECTIONS.values() for name, entry in section.items()}


class Root(Group):
    """All commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        path, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found: click.Command = getattr(import_module(f"chutes_proto.cli.{path}"), attribute or "command")
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = " or ".join(map(repr, get_close_matches(args[0], COMMANDS)))
            ctx.fail(f"No such command {args[0]!r}.{near and f' Did you mean {near}?'}")
        return super().resolve_command(ctx, args)

    def sections(self, ctx: click.Context) -> tuple[tuple[str, Pairs], ...]:
        del ctx
        return tuple(
            (title, tuple((name, sentence) for name, (_, sentence) in section.items()))
            for title, section in _SECTIONS.items()
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from click.shell_completion import CompletionItem

        return [CompletionItem(name, help=COMMANDS[name][1]) for name in COMMANDS if name.startswith(incomplete)]


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        console.say(f"chutes-proto {__version__}")
        ctx.exit()


ROOT: Final = Root(
    "chutes-proto",
    help="""
    Boot confidential VMs that prove with a TDX quote what they are, and serve the keys of their disks.

    `chutes-proto COMMAND --help` has examples. Start with: chutes-proto demo
    """,
    params=[
        click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="show it")
    ],
    exits={
        0: "done, granted, accepted",
        1: "refused",
        2: EXITS[2],
        130: "interrupted by SIGINT",
        141: "the reader of a pipe has ended",
        143: "ended by SIGTERM",
    },
)


def run(argv: Sequence[str]) -> int:
    """Run one command; the result is the exit code of the process."""
    import os

    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(ROOT, {}, "chutes-proto", COMPLETE, instruction)
    try:
        with ROOT.make_context("chutes-proto", [*argv]) as ctx:
            code: Any = ROOT.invoke(ctx)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.exceptions.NoArgsIsHelpError as exc:
        console.tell_lines(exc.format_message())
        return console.USAGE
    except click.ClickException as exc:
        message = exc.format_message().replace("\n\t", " ").strip().rstrip(".")
        if near := getattr(exc, "possibilities", None):  # click puts several in brackets
            message = f"{exc.message} Did you mean {' or '.join(map(repr, near))}?"
        see = " See" if message.endswith("?") else "; see"
        console.complain(f"{message[:1].lower()}{message[1:]}{see} {words_of(argv)} --help")
        return console.USAGE
    return code if isinstance(code, int) else console.GRANTED


def words_of(argv: Sequence[str]) -> str:
    """The command that a command line names."""
    found, ctx = "chutes-proto", click.Context(ROOT)
    command: click.Command | None = ROOT
    for word in argv:
        command = command.get_command(ctx, word) if isinstance(command, click.Group) else None
        if command is None:
            break
        found += f" {word}"
    return found
