"""``chutes-proto receipt``: one entry of the audit log, for somebody who has neither the log nor the server."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chutes_proto.cli import console
from chutes_proto.cli.base import Argument, Group, answer, json_option
from chutes_proto.cli.describe import exits
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.audit import keys_option, signed
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.errors import ConfigurationError, LogError, Refused, StoreError
from chutes_proto.io.files import read_file
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditWanted, ReadAudit
from chutes_proto.tlog.notes import Verifier
from chutes_proto.tlog.receipts import LARGEST, Receipt
from chutes_proto.units.log import ProveEntry
from chutes_proto.wire.codes import Code

_INDEX_DIGITS = 15

command: Group = Group(
    "receipt",
    of=OperatorCommand,
    help="""Prove a decision of the key server offline.

    A receipt has one entry of the audit log, the proof that the log has it, and a signed checkpoint of the log. It is
    verified without the server, with the log's public key alone.

    Examples:
      chutes-proto receipt show 0 --config server.toml
      chutes-proto receipt show 0 --config server.toml > receipt.json

    See also: audit
    """,
)


@command.command(exits=exits("the receipt is printed", "no such entry, or the log cannot be signed"))
@click.argument("entry", cls=Argument, metavar="ENTRY", help="the index of an entry, or the request id of a decision")
@operating.config_option
def show(entry: str, config: str) -> int:
    """Print the receipt of an entry of the audit log.

    Sequences what is left, signs the present state, and prints one JSON object on one line, which `receipt verify`
    reads. A request id, which a refusal and the server's log show, finds the newest entry of that request.

    Examples:
      chutes-proto receipt show 0 --config server.toml
      chutes-proto receipt show 0 --config server.toml > receipt.json

    See also: receipt verify, audit list
    """
    with operating.opened(config) as (setup, store):
        _, note, found = signed(setup, store)
        if entry.isascii() and entry.isdecimal() and len(entry) <= _INDEX_DIGITS:
            index: int | None = int(entry)
        else:
            wanted = AuditWanted(request_id=entry)
            rows = store.transact(Ask(ReadAudit(1 << 62, 1, backwards=True, wanted=wanted)))
            index = rows[0][1].idx if rows else None
        if index is None or index >= found.size:
            raise Refused(
                Code.KEY_NOT_FOUND, f"the audit log has no entry {entry}; `chutes-proto audit list` shows all"
            )
        try:
            receipt = store.transact(ProveEntry(index, found.size, note))
        except LogError as exc:
            raise StoreError(f"audit log: {exc}; see `chutes-proto audit verify`") from None
    console.say(receipt.to_bytes().decode().rstrip("\n"))
    return console.GRANTED


@command.command(exits=exits("the log has the entry", "it is not proven: altered, or of another log"))
@click.argument("file", cls=Argument, metavar="FILE", help="a receipt")
@keys_option
@json_option
def verify(file: str, keys: tuple[Verifier, ...]) -> int:
    """Verify a receipt offline, and print its entry.

    Checks the signature of the checkpoint with --key, and that the log of that checkpoint has the entry. The key is the
    one that `audit key` prints: get it in another way than the receipt. It does not judge the evidence again: the entry
    has the digest of the quote, and the verdict.

    Examples:
      chutes-proto receipt verify receipt.json --key "$(cat log/key)"
      chutes-proto receipt verify receipt.json --key "$(cat log/key)" --json

    See also: receipt show, audit key
    """
    if not keys:
        raise ConfigurationError("--key: name the public key of the log, which `chutes-proto audit key` prints")
    try:
        receipt = Receipt.from_bytes(read_file(Path(file), limit=LARGEST))
        checkpoint = receipt.verify(keys)
    except LogError as exc:
        raise StoreError(f"{file}: {exc}") from None
    told = {"ok": True, "index": receipt.proof.index, "origin": checkpoint.origin, "size": checkpoint.size}
    text = f"entry {receipt.proof.index} of the log {checkpoint.origin}, which has {checkpoint.size} entries:"
    return answer(told | {"entry": json.loads(receipt.entry)}, f"{text}\n{receipt.entry}")
