"""A miner's servers at a key server: ``register``, ``servers``, ``attest``, ``status``."""

from __future__ import annotations

import click

from chutes_proto.cli import console, output
from chutes_proto.cli.base import Argument, Group, answer, full_option
from chutes_proto.cli.miner.asking import Asker, MinerCommand, open_quoter, quoter_options
from chutes_proto.errors import ConfigurationError
from chutes_proto.io.files import read_file
from chutes_proto.io.quoters.gpus import make_gpu_tool
from chutes_proto.miner import _flows as flows
from chutes_proto.wire.codec import decode_list
from chutes_proto.wire.miners import NodeArgs

_id_argument = click.argument("server_id", cls=Argument, metavar="ID", help="the server's id")


@click.command("register", cls=MinerCommand)
@click.option("--id", "server_id", metavar="ID", required=True, help="the server's id, for example its node's uid")
@click.option("--name", metavar="NAME", help="its name, the VM's (default: the id)")
@click.option("--host", metavar="HOST", required=True, help="its public IPv4 address or DNS name")
@click.option("--gpus", metavar="FILE", required=True, help="its GPUs, a JSON list")
@click.pass_obj
def register(asker: Asker, server_id: str, name: str | None, host: str, gpus: str) -> int:
    """Register a server with its GPUs.

    The server is linked to the boot of the VM with its name, else to one from its address. The GPUs come from a file: a
    JSON list with one object for each GPU, members uuid, name, memory (bytes), clock_rate (kHz), device_index,
    gpu_identifier, verification_host, verification_port, and others that the API's description lists.

    Examples:
      chutes-proto register https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey --id n1 \\
          --name vm-1 --host 198.51.100.7 \\
          --gpus gpus.json
      chutes-proto register https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey --id n1 \\
          --name vm-1 --host 198.51.100.7 --gpus gpus.json --json

    See also: servers, attest, status
    """
    try:
        nodes = decode_list(read_file(gpus), NodeArgs)
    except ValueError as exc:
        raise ConfigurationError(f"{gpus}: not a list of GPUs: {exc}") from None
    asker.ask(lambda who: flows.register_server(who, server_id=server_id, host=host, gpus=nodes, name=name))
    name = name or server_id
    declared = f"{len(nodes)} GPU{'' if len(nodes) == 1 else 's'}"
    said = {"granted": True, "server_id": server_id, "name": name}
    return answer(said, f"registered: {server_id} ({name}) at {host}, {declared}")


# --- servers ---


servers: Group = Group(
    "servers",
    of=MinerCommand,
    help="""List, rename and remove your servers.

    Examples:
      chutes-proto servers list https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey
      chutes-proto servers remove https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1 --json

    See also: register, attest, status
    """,
)


@servers.command("list")
@full_option
@click.pass_obj
def list_servers(asker: Asker) -> int:
    """List all your servers, newest first.

    Examples:
      chutes-proto servers list https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey

    See also: status, register
    """
    found = [*map(console.plain, asker.ask(flows.list_servers))]
    return answer({"granted": True, "servers": found}, lambda: output.table(_COLUMNS, found, empty="no servers"))


@servers.command("rename")
@_id_argument
@click.argument("name", cls=Argument, metavar="NAME", help="its new name")
@click.pass_obj
def rename_server(asker: Asker, server_id: str, name: str) -> int:
    """Give a server another name; the keys of its VM stay as they are.

    Examples:
      chutes-proto servers rename https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1 vm-2

    See also: servers list
    """
    renamed = console.plain(asker.ask(lambda who: flows.rename_server(who, server_id, name)))
    return answer({"granted": True, **renamed}, lambda: output.table(_COLUMNS, [renamed], empty=""))


@servers.command("remove")
@click.argument("server", cls=Argument, metavar="NAME_OR_ID", help="the server's name or id")
@click.pass_obj
def remove_server(asker: Asker, server: str) -> int:
    """Remove a server; the keys of its VM are kept.

    Examples:
      chutes-proto servers remove https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey vm-1
      chutes-proto servers remove https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1 --json

    See also: servers list, register
    """
    removed = asker.ask(lambda who: flows.remove_server(who, server))
    return answer({"granted": True, "removed": removed}, f"removed: {removed}; the keys of its VM are kept")


_COLUMNS: output.Columns = {
    "SERVER_ID": lambda row: row["server_id"],
    "NAME": lambda row: row["name"],
    "HOST": lambda row: row["host"],
    "CREATED_AT": lambda row: output.when(console.moment(row["created_at"])),
    "UPDATED_AT": lambda row: output.when(row["updated_at"] and console.moment(row["updated_at"])),
}


# --- runtime attestation ---


@click.command("attest", cls=MinerCommand)
@_id_argument
@quoter_options
@click.option(
    "--gpu-tool",
    metavar="TOOL",
    help="send evidence of the GPUs, too: a command that gets the nonce in hex, on standard input and in place of"
    " {nonce}, and writes the evidence as JSON to standard output or to the file {output}; no shell runs; or"
    " 'simulated', 'simulated:N' (for trials)",
)
@click.pass_obj
def attest(asker: Asker, server_id: str, quoter: str, platform: str | None, gpu_tool: str | None) -> int:
    """Attest a registered server at runtime.

    Gets a nonce for the server, has the platform make a quote of it and of an ephemeral TLS key, and sends the quote.
    This shows that an accepted TD on the server's platform holds that key, not that it is the TD that booted. With
    --gpu-tool the GPUs make evidence over the same nonce; profiles with gpu_evidence = "require" demand it.

    Examples:
      chutes-proto attest https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1
      chutes-proto attest https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1 --quoter 'my-quoter {report_data}'
      chutes-proto attest https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1 --gpu-tool simulated

    See also: status, register
    """
    attested = asker.ask_as(
        lambda who, identity: flows.attest_server(who, server_id, identity.spki_sha256, with_gpus=gpu_tool is not None),
        lambda: open_quoter(quoter, platform, "runtime"),
        None if gpu_tool is None else make_gpu_tool(gpu_tool),
    )
    said = {"granted": True, **console.plain(attested)}
    return answer(said, f"verified: {server_id} at {said['verified_at']}, record {attested.attestation_id}")


@click.command("status", cls=MinerCommand)
@_id_argument
@click.pass_obj
def status(asker: Asker, server_id: str) -> int:
    """Show the newest runtime attestation of a server, and whether it still counts.

    Examples:
      chutes-proto status https://127.0.0.1:8443 --ca ca.pem --hotkey-file hotkey n1

    See also: attest, servers list
    """
    found = asker.ask(lambda who: flows.read_status(who, server_id))
    return answer({"granted": True, **console.plain(found)}, lambda: _say_status(found))


def _say_status(found: flows.AttestationStatus) -> None:
    last = found.last
    words = "never attested" if last is None else "verified" if last.error is None else "failed"
    if found.age_seconds is not None:
        words += f" {found.age_seconds} s ago, {'fresh' if found.is_fresh else 'not fresh'}"
    is_good = found.is_fresh and last is not None and last.error is None
    output.prose(f"{words}: {found.server_id} ({found.name})", "good" if is_good else "warn" if last is None else "bad")
    if last is not None and last.error is not None:
        console.say(f"reason: {last.error}")
