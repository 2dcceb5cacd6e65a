"""A receipt proves its entry with the log's key alone, and is refused with any bit changed."""

from __future__ import annotations

import json
import os

import pytest
from attrs import evolve

from chutes_proto.errors import LogError
from chutes_proto.secret import Secret
from chutes_proto.tlog import merkle
from chutes_proto.tlog.notes import Checkpoint, Signature, Signer, Verifier
from chutes_proto.tlog.proofs import Proof
from chutes_proto.tlog.receipts import FORM, Receipt
from tests.tlog.test_tlog import SIGNER, Tree, entry

OTHER = Signer(SIGNER.name, Secret(bytes(32))).verifier
STRIDE = 1 if os.environ.get("CHUTES_PROTO_SOAK") else 13
KEYS = [OTHER, SIGNER.verifier]


def receipt() -> Receipt:
    tree = Tree(300)
    checkpoint = Checkpoint(SIGNER.name, 300, tree.root())
    proof = Proof(7, merkle.inclusion_proof(tree.read, 7, 300), SIGNER.sign(checkpoint.text))
    return Receipt(entry(7).decode(), proof)


def test_a_receipt_is_verified_with_the_key_alone() -> None:
    data = receipt().to_bytes()
    assert Receipt.from_bytes(data) == receipt()
    assert Receipt.from_bytes(data).verify(KEYS).size == 300
    with pytest.raises(LogError, match="not signed by a key of this log"):
        receipt().verify([OTHER])


def test_a_receipt_with_any_bit_changed_is_refused() -> None:
    data = receipt().to_bytes()
    for at in range(0, 8 * len(data), STRIDE):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(LogError):
            Receipt.from_bytes(bytes(changed)).verify(KEYS)


WITNESS = Signer("witness.example/w", Secret(b"w" * 32))
WITNESS_KEY = Verifier(WITNESS.name, WITNESS.verifier.key, is_witness=True)
AT = 1_700_000_000


def cosignature(text: str, at: int = AT) -> Signature:
    signed = WITNESS.sign(f"cosignature/v1\ntime {at}\n{text}").signatures[0].value
    return Signature(WITNESS.name, WITNESS_KEY.identifier, at.to_bytes(8, "big") + signed)


def cosigned(*signatures: Signature) -> Receipt:
    bare = receipt()
    note = bare.proof.note
    return evolve(bare, proof=evolve(bare.proof, note=note.with_signatures(signatures or [cosignature(note.text)])))


def test_cosignatures_are_verified_by_who_knows_the_witness() -> None:
    data = cosigned().to_bytes()
    assert Receipt.from_bytes(data).cosigned([WITNESS_KEY]) == (AT,)
    assert Receipt.from_bytes(data).verify(KEYS).size == 300, "who does not know it leaves its line out"
    tree, other = Tree(300), Signer("other.example/log", SIGNER.seed)
    older = Checkpoint(SIGNER.name, 299, tree.root(299)).text
    of_another_log = Checkpoint(other.name, 300, tree.root()).text
    text, namesake = receipt().proof.note.text, Verifier(WITNESS.name, bytes(32), is_witness=True)
    for refused, key, why in [
        (receipt(), WITNESS_KEY, "no signature of witness.example/w"),
        (cosigned(), namesake, "no signature of witness.example/w"),
        (cosigned(cosignature(older)), WITNESS_KEY, "does not verify"),
        (cosigned(cosignature(of_another_log)), WITNESS_KEY, "does not verify"),
        (cosigned(cosignature(text), cosignature(older)), WITNESS_KEY, "does not verify"),
        (cosigned(evolve(cosignature(text), value=b"short")), WITNESS_KEY, "does not verify"),
        (cosigned(), SIGNER.verifier, "is not the key of a witness"),
    ]:
        with pytest.raises(LogError, match=why):
            _ = refused.cosigned([key])


def test_a_cosignature_with_any_bit_changed_is_refused() -> None:
    data = cosigned().to_bytes()
    line = str(cosignature(receipt().proof.note.text)).rstrip().encode()
    begin = data.index(line)
    for at in range(8 * begin, 8 * (begin + len(line)), STRIDE):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(LogError):
            _ = Receipt.from_bytes(bytes(changed)).cosigned([WITNESS_KEY])


@pytest.mark.parametrize("data", [b"", b"[]", b'{"entry": 1}', b"[" * 100_000, b"x" * 1_000_000])
def test_other_bytes_are_not_receipts(data: bytes) -> None:
    with pytest.raises(LogError, match=r"not a receipt|a receipt of more than"):
        Receipt.from_bytes(data)


def test_a_receipt_has_no_other_members_and_one_spelling() -> None:
    members = json.loads(receipt().to_bytes())
    for other in (members | {"more": 1}, members | {"receipt": FORM[:-1]}, dict(reversed([*members.items()]))):
        with pytest.raises(LogError, match="not written as one"):
            Receipt.from_bytes(json.dumps(other).encode() + b"\n")
