"""``chutes-proto hotkey``: inspect an address, check a signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from chutes_proto.auth.hotkey import PREFIX, Hotkey, HotkeyError
from chutes_proto.auth.signing import check_signature
from chutes_proto.cli.base import Argument, Command, Group, answer, json_option, one_of
from chutes_proto.cli.describe import EXITS
from chutes_proto.cli.operator import operating, revoking
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.errors import ConfigurationError, Refused
from chutes_proto.io.files import read_file
from chutes_proto.units.revocations import ReadParty


class _HotkeyCommand(Command):
    """Errors in an address or a signature are the result: exit code 1."""

    exits: Mapping[int, str] = {0: "valid", 1: "not valid", 2: EXITS[2]}

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HotkeyError as exc:
            reason = f"not a hotkey's address: {exc}"
        except Refused as exc:
            reason = exc.reason
        return answer({"valid": False, "reason": reason}, f"invalid: {reason}", ok=False)


command: Group = Group(
    "hotkey",
    of=_HotkeyCommand,
    help="""Inspect a hotkey's address, check a signature, or revoke a hotkey.

    Hotkeys are SS58 addresses of sr25519 keys, network prefix 42.

    Examples:
      chutes-proto hotkey inspect 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY

    See also: register
    """,
)
_address = click.argument("address", cls=Argument, metavar="SS58", help="the address")


@command.command("inspect")
@_address
@json_option
def inspect_command(address: str) -> int:
    """Show the public key of an address, or why the address is not valid.

    Examples:
      chutes-proto hotkey inspect 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY

    See also: hotkey check
    """
    hotkey = Hotkey.parse(address)
    said = {"valid": True, "address": hotkey.address, "public_key": hotkey.public_key.hex(), "prefix": PREFIX}
    return answer(said, f"public key  {hotkey.public_key.hex()}\nprefix      {PREFIX}")


@command.command("check")
@_address
@click.option("--message", metavar="TEXT", help="the signed text")
@click.option("--message-file", metavar="FILE", help="a file of the signed bytes")
@click.option("--signature", metavar="HEX", required=True, help="the signature, 128 hex digits without 0x")
@json_option
def check_command(address: str, message: str | None, message_file: str | None, signature: str) -> int:
    """Check that a signature over a message is a hotkey's.

    Examples:
      chutes-proto hotkey check 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY --message-file message.bin \\
          --signature $(cat signature.hex)
      chutes-proto hotkey check 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY \\
          --message-file message.bin --signature $(cat signature.hex) --json

    See also: hotkey inspect
    """
    one_of(message=message, message_file=message_file)
    hotkey = Hotkey.parse(address)
    signed = read_file(message_file) if message_file is not None else str(message).encode("utf-8", "surrogateescape")
    check_signature(hotkey, (signed,), signature)
    return answer(
        {"valid": True, "address": hotkey.address}, f"valid: the signature is {hotkey.address}'s over this message"
    )


@command.command("revoke", cls=OperatorCommand)
@_address
@revoking.until_option
@operating.changes
def revoke_command(address: str, until: int | None, reason: str, config: str) -> int:
    """Shut a hotkey out, until a time or for good.

    None of its VMs boots, redeems a token or is attested, and it registers no server. VMs that run go on; those that
    are bound to a platform are listed. The keys are kept. It is in force when the command ends. For operators.

    Examples:
      chutes-proto hotkey revoke 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY --reason leaked --config server.toml
      chutes-proto hotkey revoke 5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY --until 2126-12-24 \\
          --config server.toml

    See also: hotkey allow, revocations, vm revoke
    """
    hotkey = _of_operator(address)
    return revoking.revoke("hotkey", hotkey, ReadParty("hotkey", hotkey=hotkey), until, reason, config)


@command.command("allow", cls=OperatorCommand)
@_address
@operating.changes
def allow_command(address: str, reason: str, config: str) -> int:
    """Undo the revocation of a hotkey. For operators.

    Examples:
      chutes-proto hotkey allow 5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty --config server.toml
      chutes-proto hotkey allow 5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty --reason new --config server.toml

    See also: hotkey revoke, revocations
    """
    return revoking.allow("hotkey", _of_operator(address), reason, config)


def _of_operator(address: str) -> str:
    try:
        return Hotkey.parse(address).address
    except HotkeyError as exc:
        raise ConfigurationError(f"{address!r} is not a hotkey: {exc}") from None
