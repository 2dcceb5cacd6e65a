"""``chutes-proto receipt``: one entry of the audit log, for somebody who has neither the log nor the server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from attrs import evolve

from chutes_proto.cli import console
from chutes_proto.cli.base import Argument, Group, answer, json_option, parsed
from chutes_proto.cli.describe import EXITS, exits
from chutes_proto.cli.operator import operating
from chutes_proto.cli.operator.audit import keys_option, signed, witness_key
from chutes_proto.cli.operator.operating import OperatorCommand
from chutes_proto.cli.verifier.fields import root_option, trusted_root, with_root_hint
from chutes_proto.errors import ConfigurationError, FileUnavailable, LogError, Refused, StoreError, VerdictError
from chutes_proto.io.files import Files, read_file
from chutes_proto.io.server.store_setup import StoreSetup
from chutes_proto.io.server.witnesses import read_witnessed, witnessed_path
from chutes_proto.io.stores.address import DurableStore
from chutes_proto.io.stores.marks import checkpoint_path
from chutes_proto.io.yaml_file import read_yaml
from chutes_proto.quote._collateral import Collateral
from chutes_proto.quote._errors import CollateralFormatError
from chutes_proto.quote._terms import rfc3339
from chutes_proto.server._grounds import Bundle, digests_of, judge_again, missing_digests, names_evidence
from chutes_proto.store._run import Ask
from chutes_proto.store.rows import AuditWanted, EvidenceRow, Read, ReadAudit
from chutes_proto.tlog.notes import Checkpoint, Verifier
from chutes_proto.tlog.receipts import LARGEST, Receipt
from chutes_proto.units.boot import REFUSED_KEPT
from chutes_proto.units.log import ProveEntry, ReadLogKeys
from chutes_proto.wire.codes import Code

T = TypeVar("T")

_INDEX_DIGITS = 15

command: Group = Group(
    "receipt",
    of=OperatorCommand,
    help="""Prove a decision of the key server offline.

    A receipt has one entry of the audit log, the proof that the log has it, and a signed checkpoint of the log; if you
    like the evidence, too: quote, collateral, policy and reference values. It is verified without the server, with the
    log's public key alone.

    Examples:
      chutes-proto receipt show 0 --config server.toml
      chutes-proto receipt show 0 --config server.toml > receipt.json

    See also: audit
    """,
)


_STEPS: Final = {
    11: "step 1: not a receipt",
    12: "step 2: its checkpoint is not signed by the log, or not by a witness",
    13: "step 3: the log does not have the entry",
    14: "step 4: the evidence is not what the entry names",
    15: "step 5: the evidence is judged otherwise than the entry says",
}
"""The exit codes of `receipt verify`, by the first step that fails."""


@command.command(exits=exits("the receipt is printed", "no such entry, or the log cannot be signed"))
@click.argument("entry", cls=Argument, metavar="ENTRY", help="the index of an entry, or the request id of a decision")
@click.option("--evidence", "with_evidence", is_flag=True, help="put in what the verdict rested on, which must be kept")
@click.option("--collateral", "file", metavar="FILE", help="with --evidence: the collateral that the entry names")
@operating.config_option
def show(entry: str, with_evidence: bool, file: str | None, config: str) -> int:
    """Print the receipt of an entry of the audit log.

    Sequences what is left, signs the present state, and prints one JSON object on one line, which `receipt verify`
    reads. A request id, which a refusal and the server's log show, finds the newest entry of that request.

    If witnesses cosigned a checkpoint that has the entry, as audit.witnesses and `audit checkpoint` ask them to, that
    checkpoint is in the receipt, with their signatures.

    With --evidence, the quote, the collateral, the policy and the reference values are in it, so that it can be judged
    again. They are taken from the store and from the server's files, as long as these are still those that the entry
    names: of each VM the store keeps the quote of its newest granted boot. Collateral is taken from the files of the
    server and from the folder `earlier` beside them, or from the file of --collateral, and never another than the entry
    names.

    Examples:
      chutes-proto receipt show 0 --config server.toml
      chutes-proto receipt show 0 --config server.toml > receipt.json

    See also: receipt verify, audit list, audit checkpoint
    """
    if file is not None and not with_evidence:
        raise ConfigurationError("--collateral: is for a receipt with the evidence; add --evidence")
    with operating.opened(config) as (setup, store):
        _, note, found = signed(setup, store)
        if entry.isascii() and entry.isdecimal() and len(entry) <= _INDEX_DIGITS:
            index: int | None = int(entry)
        else:
            wanted = AuditWanted(request_id=entry)
            rows = store.transact(Ask(ReadAudit(1 << 62, 100, backwards=True, wanted=wanted)))
            index = next((row.idx for _, row in rows if not row.is_forged), None)
        if index is None or index >= found.size:
            raise Refused(
                Code.KEY_NOT_FOUND, f"the audit log has no entry {entry}; `chutes-proto audit list` shows all"
            )
        try:
            receipt = _cosigned(setup, store, index) or store.transact(ProveEntry(index, found.size, note))
        except LogError as exc:
            raise StoreError(f"audit log: {exc}; see `chutes-proto audit verify`") from None
        if with_evidence:
            receipt = evolve(receipt, evidence=_kept_evidence(setup, store, json.loads(receipt.entry), file))
    console.say(receipt.to_bytes().decode().rstrip("\n"))
    return console.GRANTED


def _cosigned(setup: StoreSetup, store: DurableStore, index: int) -> Receipt | None:
    """The receipt by the newest cosigned checkpoint; None if that has not the entry, or is not of this log."""
    file = checkpoint_path(setup.mark_file)
    try:
        kept = None if file is None else read_witnessed(witnessed_path(file))
        if kept is None or (size := Checkpoint.of(kept).size) <= index:
            return None
        receipt = store.transact(ProveEntry(index, size, kept))
        _ = receipt.verify([each.verifier for each in store.transact(ReadLogKeys(setup.vault))])
    except LogError as exc:  # after a loss, it is of what is lost
        console.tell(f"without the signatures of witnesses: {exc}")
        return None
    return receipt


def _kept_evidence(
    setup: StoreSetup, store: DurableStore, entry: Mapping[str, Any], file: str | None
) -> dict[str, bytes]:
    """The evidence of an entry, if all of it is still kept; its collateral is in ``file``, if one is named.

    A document is the one whose digest the entry names: no other stands in for it. Raises `Refused`.
    """
    from chutes_proto.io.server.setup import read_documents

    documents = read_documents(setup.config, setup.store.base, Files())
    candidates = _kept_collateral(setup) if file is None else _read_collateral(file)
    try:
        quote = _kept_quote(store, entry)
        bundles = [Bundle(quote, each, documents) for each in candidates]
        lacking = missing_digests(entry, digests_of(quote, documents))
        for bundle in bundles:
            if not (wrong := missing_digests(entry, bundle.digests)):
                return bundle.evidence
            lacking = min(lacking, wrong, key=len)
    except LogError as exc:
        raise Refused(Code.KEY_NOT_FOUND, f"{exc}; leave out --evidence") from None
    told = ", ".join(f"{name} (SHA-256 {digest})" for name, digest in lacking.items())
    has_other = file is not None and any(name.startswith("collateral.") for name in lacking)
    of_file = f", and {file} does not have it" if has_other else ""
    raise Refused(Code.KEY_NOT_FOUND, f"not kept: {told}{of_file}; leave out --evidence")


def _read_collateral(file: str) -> tuple[Collateral, ...]:
    try:
        return Collateral.all_from_json(read_file(file))
    except CollateralFormatError as exc:
        raise ConfigurationError(f"--collateral: {file}: {exc}") from None


def _kept_quote(store: DurableStore, entry: Mapping[str, Any]) -> bytes:
    """The quote of an entry; nothing if the store has another one, or none."""
    pin = f"{entry.get('platform_kind')}:{entry.get('platform_id')}"
    names = [f"vm {entry.get('hotkey')}/{entry.get('vm')}", *(f"refused {pin} {at}" for at in range(REFUSED_KEPT))]
    for name in names:
        row = store.transact(Ask(Read(EvidenceRow, name)))
        if row is not None and hashlib.sha256(row.quote).hexdigest() == entry.get("quote_digest"):
            return row.quote
    return b""


def _kept_collateral(setup: StoreSetup) -> Sequence[Collateral]:
    """The collateral in the files of a server, those of earlier times as well."""
    from chutes_proto.io.collateral.upstream import EARLIER

    options = setup.config.collateral
    name = options.directory or options.cache
    places = () if name is None else (setup.store.base / name, setup.store.base / name / EARLIER)
    found: list[Collateral] = []
    for path in (path for place in places for path in sorted(place.glob("*.json"))):
        with suppress(CollateralFormatError, FileUnavailable):
            found += Collateral.all_from_json(read_file(path))
    return found


@command.command(exits={0: "all of it holds", 2: EXITS[2], **_STEPS})
@click.argument("file", cls=Argument, metavar="FILE", help="a receipt")
@keys_option("a verifier key of the log, as `audit key` prints it; may be repeated")
@click.option(
    "--witness",
    "witnesses",
    metavar="KEY",
    multiple=True,
    callback=parsed(witness_key),
    help="the key of a witness that must have signed, too; may be repeated",
)
@root_option
@json_option
def verify(file: str, keys: tuple[Verifier, ...], witnesses: tuple[Verifier, ...], root: str | None) -> int:
    """Verify a receipt offline, and print its entry.

    The steps are: 1. it is a receipt; 2. its checkpoint is signed with --key and by each --witness; 3. the log of that
    checkpoint has the entry; 4. the evidence, if it is in the receipt, is what the entry names; 5. judged again, with
    the collateral, policy and reference values that it names, it has the same verdict, platform and profile, of that
    time, and no grant for a quote that is rejected. The exit code says which step failed first. The names of VM and
    hotkey are the server's word. Without the evidence, the entry is proven, and its verdict taken as it stands.

    The key is the one that `audit key` prints: get it in another way than the receipt.

    Examples:
      chutes-proto receipt verify receipt.json --key "$(cat log/key)"
      chutes-proto receipt verify receipt.json --key "$(cat log/key)" --json

    See also: receipt show, audit key
    """
    if not keys:
        raise ConfigurationError("--key: name the public key of the log, which `chutes-proto audit key` prints")
    trusted, data = trusted_root(root), read_file(Path(file), limit=LARGEST)
    try:
        receipt, entry = _step(11, lambda: _read(data))
        checkpoint = _step(12, lambda: receipt.signed(keys))
        times = _step(12, lambda: receipt.cosigned(witnesses))
        _step(13, lambda: receipt.included(checkpoint))
        verdict = None
        if receipt.evidence:
            bundle = _step(14, lambda: Bundle.of(receipt.evidence))
            verdict = _step(14, lambda: judge_again(entry, bundle, read_yaml, trusted))
    except _StepError as exc:
        why = with_root_hint(exc.why)
        told: dict[str, object] = {"ok": False, "step": exc.code - _STEP, "error": why}
        _ = answer(told, f"{file}: {_STEPS[exc.code]}: {why}")
        return exc.code
    about = f"entry {receipt.proof.index} of the log {checkpoint.origin}, which has {checkpoint.size} entries:"
    last = (
        f"the evidence, judged again at {rfc3339(json.loads(entry['evidence'])['judged_at'])}: {verdict}"
        if verdict
        else "not judged again: the receipt is without quote, collateral, policy and reference values of the entry"
        if names_evidence(entry)
        else "nothing to judge again: the entry names no evidence"
    )
    cosigned = [{"witness": str(each), "at": at} for each, at in zip(witnesses, times, strict=True)]
    seen = [f"cosigned at {rfc3339(at)} by {each}" for each, at in zip(witnesses, times, strict=True)]
    told = {"ok": True, "index": receipt.proof.index, "origin": checkpoint.origin, "size": checkpoint.size}
    return answer(
        told | {"entry": entry, "verdict": verdict, "cosigned": cosigned},
        "\n".join([about, receipt.entry, *seen, last]),
    )


def _read(data: bytes) -> tuple[Receipt, dict[str, Any]]:
    """A receipt, and the members of its entry. Raises `LogError`."""
    receipt = Receipt.from_bytes(data)
    try:
        return receipt, dict(json.loads(receipt.entry))
    except (ValueError, TypeError, RecursionError):
        raise LogError("its entry is not an audit row") from None


_STEP: Final = 10


class _StepError(Exception):
    """A step that failed, by its exit code."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code
        self.why = why


def _step(code: int, attempt: Callable[[], T]) -> T:
    try:
        return attempt()
    except VerdictError as exc:
        raise _StepError(15, str(exc)) from None
    except LogError as exc:
        raise _StepError(code, str(exc)) from None
