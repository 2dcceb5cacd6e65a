"""``chutes-proto policy``: an appraisal policy in a file, checked and put into words."""

from __future__ import annotations

import time
from typing import Any

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Command, Group, answer, json_option, wants
from chutes_proto.cli.describe import exits
from chutes_proto.io.files import read_file
from chutes_proto.quote._errors import PolicyError
from chutes_proto.quote._policy_set import PolicySet, parse_policy_set
from chutes_proto.quote._policy_words import explain_set, policy_notes
from chutes_proto.server._profiles import EXTRA_KEYS

command: Group = Group(
    "policy",
    help="""Check an appraisal policy, and say in words what it accepts.

    A policy says which genuine quotes are accepted: `policy` of a server's configuration names its file, and
    `verify --policy` takes the same file. Its language is in docs/reference/policies.md, a complete example in
    examples/policy.toml.

    Examples:
      chutes-proto policy check policy.toml
      chutes-proto policy explain policy.toml

    See also: verify, serve, profiles import
    """,
)


class _FileCommand(Command):
    """A command about one policy file."""

    exits = exits("it is a policy", "it is none; the text says which key is wrong")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PolicyError as exc:
            why = f"{ctx.params['file']}: {exc}"
        if wants("json"):
            console.say_json({"ok": False, "error": why})
        console.complain(why, ctx.command_path)
        return console.REFUSED


@command.command("check", cls=_FileCommand)
@click.argument("file", cls=Argument, metavar="FILE", help="the policy, in TOML")
@json_option
def check_command(file: str) -> int:
    """Check a policy file.

    Reads the whole file, with every combination of its exceptions for profiles and hotkeys, and tells what is wrong:
    unknown keys with the nearest known one, values of another type, keys that contradict each other. Notes say what is
    probably not meant, for example a date in the future that refuses every platform. Whether a server has the profiles
    and hotkeys that the file names, `chutes-proto serve --check` says.

    Examples:
      chutes-proto policy check policy.toml
      chutes-proto policy check policy.toml --json

    See also: policy explain, serve
    """
    policies = _read(file)
    notes = policy_notes(policies, int(time.time()))

    def people() -> None:
        console.say(f"{file}: a policy{_exceptions(policies)}")
        for note in notes:
            output.prose(f"note: {note}", "warn")

    return answer({"ok": True, "notes": list(notes)}, people)


@command.command("explain", cls=_FileCommand)
@click.argument("file", cls=Argument, metavar="FILE", help="the policy, in TOML")
@json_option
def explain_command(file: str) -> int:
    """Say in plain words what a policy accepts.

    One sentence for each rule, the defaults too. For a profile or hotkey with an exception: the sentences that differ.

    Examples:
      chutes-proto policy explain policy.toml
      chutes-proto policy explain policy.toml --json

    See also: policy check, verify
    """
    parts = explain_set(_read(file))

    def people() -> None:
        for title, sentences in parts:
            output.prose(f"{title}:")
            for sentence in sentences:
                output.prose(f"  {sentence}", rest=4)

    listed = [{"applies_to": title, "rules": list(sentences)} for title, sentences in parts]
    return answer({"ok": True, "policies": listed}, people)


def _read(file: str) -> PolicySet:
    return parse_policy_set(read_file(file), extra_keys=EXTRA_KEYS)


def _exceptions(policies: PolicySet) -> str:
    counts = ((len(policies.profile_names), "profile"), (len(policies.hotkeys), "hotkey"))
    told = [f"{count} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
    return f", with exceptions for {' and '.join(told)}" if told else ""
